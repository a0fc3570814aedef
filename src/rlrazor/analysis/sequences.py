"""Tasks that were learned one after another: the score matrix, and what the field reads from it.

R[i, j] is the score on the j-th task after the i-th stage; row 0 is before any training, and stage i trains the i-th
task. So R has one row more than columns, R[j + 1, j] is a task's score right after it was trained, and the last row is
the end. Scores are fractions of 1.

A table of such runs has the columns `order`, `stage` and `task`, and a `score_TASK` of each task.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
import polars as pl
from numpy.typing import ArrayLike

from rlrazor.analysis.law import Floats
from rlrazor.errors import RazorError


@dataclass(frozen=True)
class Transfer:
    """What a sequence did to its tasks.

    `accuracy`: ACC, the mean score at the end (arXiv:1706.08840). `backward`: BWT, the mean over all tasks but the last
    of the score at the end minus that right after training; below 0 is forgetting. `forward`: FWT, the mean over all
    tasks but the first of the score right before training minus that before any; None where there is one task, as
    `backward` is. `forgetting`: of each task but the last, the best score that it has had since it was trained, minus
    that at the end (arXiv:1801.10112, which takes the best of all before the end); above 0 is forgetting.
    """

    accuracy: float
    backward: float | None
    forward: float | None
    forgetting: tuple[float, ...]


def transfer(scores: ArrayLike) -> Transfer:
    """What a matrix R, (T + 1, T), says. Raises RazorError for another shape or a missing score."""
    R = checked(scores)
    tasks = R.shape[1]
    own = R[np.arange(1, tasks + 1), np.arange(tasks)]
    before = R[np.arange(tasks), np.arange(tasks)]
    forgetting = tuple(float(R[j + 1 :, j].max() - R[-1, j]) for j in range(tasks - 1))
    if tasks == 1:
        return Transfer(float(R[-1].mean()), None, None, ())
    return Transfer(
        accuracy=float(R[-1].mean()),
        backward=float((R[-1, :-1] - own[:-1]).mean()),
        forward=float((before[1:] - R[0, 1:]).mean()),
        forgetting=forgetting,
    )


def forgotten_by_stage(scores: ArrayLike) -> Floats:
    """(T + 1, T): how far each task is below its best score since it was trained, after each stage; NaN before that."""
    R = checked(scores)
    found = np.full_like(R, np.nan)
    for j in range(R.shape[1]):
        found[j + 1 :, j] = np.maximum.accumulate(R[j + 1 :, j]) - R[j + 1 :, j]
    return found


def checked(scores: ArrayLike) -> Floats:
    """The matrix, as floats. Raises RazorError where it is none of T + 1 stages and T tasks, or lacks a score."""
    R = np.asarray(scores, dtype=np.float64)
    if R.ndim != 2 or R.shape[1] == 0 or R.shape[0] != R.shape[1] + 1:
        raise RazorError(
            f"A score matrix of shape {R.shape} is not one of a sequence: it has a row before any training and one "
            "after each task, and a column for each task."
        )
    if not np.isfinite(R).all():
        raise RazorError("A score matrix lacks a score: measure every task before training and after each stage.")
    return R


@dataclass(frozen=True, eq=False)
class Course:
    """A method's way through the tasks, in order: `rows` are the base and the stages' last checkpoints."""

    method: str
    seed: int
    order: str
    rows: pl.DataFrame

    @property
    def tasks(self) -> list[str]:
        """In their order."""
        return self.rows["task"].drop_nulls().to_list()

    @cached_property
    def scores(self) -> Floats:
        """The matrix."""
        return self.rows.select(f"score_{task}" for task in self.tasks).to_numpy()

    def column(self, name: str) -> Floats:
        """Of the base and of each stage, as numbers."""
        return self.rows[name].cast(pl.Float64).to_numpy()

    @property
    def spent(self) -> Floats:
        """The KL of the stages up to each, from the one before it, on its own inputs."""
        return self.column("kl_forward_since_before")[1:].cumsum()

    def outcome(self) -> dict[str, Any]:
        """The course as a row: `new` is its lowest score on a stage's own task."""
        of, prior, kl = transfer(self.scores), self.column("prior"), float(self.spent[-1])
        named = {"method": self.method, "seed": self.seed, "new": float(self.column("new")[1:].min())}
        lost = float(np.mean(of.forgetting)) if of.forgetting else None
        kept = {"accuracy": of.accuracy, "backward": of.backward, "forward": of.forward, "forgotten": lost}
        return {**named, **kept, "prior": prior[-1], "forgetting": prior[0] - prior[-1], "kl_forward": kl}

    def stages(self, old: str) -> list[dict[str, Any]]:
        """A row per stage: what has been forgotten of the `prior` task, or of the `earlier` ones, and the KLs."""
        prior, lost, rows = self.column("prior"), forgotten_by_stage(self.scores), self.rows.to_dicts()
        of_earlier = [float(lost[at, : at - 1].mean()) if at > 1 else np.nan for at in range(len(rows))]
        forgotten = prior[0] - prior if old == "prior" else np.array(of_earlier)
        trajectory = f"{self.method} seed {self.seed}, order {self.order}"
        named = {"method": self.method, "trajectory": trajectory, "seed": self.seed}
        return [
            {
                **named,
                "step": at,
                "forgetting": forgotten[at],
                "spent": self.spent[at - 1],
                "kl_forward": row["kl_forward"],
                "old": row[f"kl_forward_on_{old}"],
            }
            for at, row in enumerate(rows)
            if at > (old == "earlier")
        ]


def ends_of_sequences(stages: pl.DataFrame) -> pl.DataFrame:
    """The last checkpoint of each sequence that got to the last stage, of a table of all checkpoints of stages."""
    last = stages.filter(pl.col("stage") == pl.col("stage").max())
    return last.sort("step", maintain_order=True).unique(["method", "seed", "order"], keep="last", maintain_order=True)


def courses_of(ends: pl.DataFrame, bases: pl.DataFrame) -> list[Course]:
    """The courses of a table that holds the last checkpoint of each stage, in the order of its methods."""
    courses = []
    for (method, seed, order), stages in ends.group_by(["method", "seed", "order"], maintain_order=True):
        base = bases.filter(seed=seed)[:1].with_columns(task=pl.lit(None, pl.String))
        rows = pl.concat([base, stages.sort("stage")], how="diagonal_relaxed")
        courses.append(Course(str(method), cast(int, seed), str(order), rows))
    methods: Sequence[str] = ends["method"].unique(maintain_order=True).to_list()
    return sorted(courses, key=lambda one: methods.index(one.method))
