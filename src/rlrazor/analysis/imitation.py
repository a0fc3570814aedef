"""Students that imitate checkpoints of other runs, each beside its own teacher, at the teacher's new-task score."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from rlrazor.analysis.matched import matched
from rlrazor.errors import RazorError


@dataclass(frozen=True, eq=False)
class Students:
    """The students of one kind whose teachers are of one level: their checkpoints, with their teachers' scores."""

    key: str
    kind: str
    level: float
    rows: pl.DataFrame

    @property
    def name(self) -> str:
        """Kind and level."""
        return f"{self.kind}, {self.level:.0%}"

    @property
    def teachers(self) -> pl.DataFrame:
        """A row for each teacher."""
        return self.rows.unique("seed", keep="first", maintain_order=True)

    @property
    def best(self) -> pl.DataFrame:
        """Per seed the highest new accuracy, and how far it is `beyond` the teacher's."""
        best = self.rows.group_by("seed", maintain_order=True).agg(pl.max("new"), pl.first("teacher_new"))
        return best.with_columns(beyond=pl.col("new") - pl.col("teacher_new"))

    def matched(self, margin: float = 0.0) -> pl.DataFrame:
        """Per seed the checkpoint that is reported no more than `margin` below the teacher's new, by the one rule.

        A row for each seed whose students get there, with `gap`, its prior accuracy minus its teacher's.
        """
        # Accuracies are counts over a test set: the last term is for those at exactly the margin.
        reported = matched(self.rows, [], pl.col("teacher_new") - margin - 1e-9)
        return reported.sort("seed").with_columns(gap=pl.col("prior") - pl.col("teacher_prior"))

    def lowest(self) -> pl.DataFrame:
        """Per row of `matched` the lowest prior accuracy of its run up to there; `gap` is that minus the teacher's."""
        until = self.rows.join(self.matched().select("run_id", last="step"), on="run_id")
        lowest = until.filter(pl.col("step") <= pl.col("last")).group_by("seed").agg(pl.all().sort_by("prior").first())
        return lowest.with_columns(gap=pl.col("prior") - pl.col("teacher_prior"))

    def ends(self, lr: float) -> pl.DataFrame:
        """The last checkpoints at a learning rate; `new_beyond`, `prior_beyond`: their scores minus the teachers'."""
        last = self.rows.filter(pl.col("lr") == lr).sort("step").unique("seed", keep="last")
        gaps = {f"{name}_beyond": pl.col(name) - pl.col(f"teacher_{name}") for name in ("new", "prior")}
        return last.with_columns(**gaps)

    def shown(self) -> pl.DataFrame:
        """Per seed the run of the checkpoint matched; where none gets there, the run that gets farthest."""
        farthest = self.rows.sort("new", descending=True, maintain_order=True).unique("seed", keep="first")
        runs = pl.concat([rows.select("seed", "run_id") for rows in (self.matched(), farthest)])
        chosen = runs.unique("seed", keep="first", maintain_order=True)["run_id"].to_list()
        return self.rows.filter(pl.col("run_id").is_in(chosen))


def taught_by_level(table: pl.DataFrame, named: Sequence[Mapping[str, Any]] | None) -> pl.DataFrame:
    """The students' checkpoints, once for each level that their teacher teaches at, with its scores.

    `named`: the teachers, each with its `level`, `seed`, `run_id` and `step`; a student's column `teacher` is
    RUN_ID/STEP. Columns besides: `level`, `teacher_run`, `teacher_new`, `teacher_prior`, `teacher_kl`. Teachers that do
    not reach their level do not count. Raises RazorError where none is named, or one that the table does not hold.
    """
    if not named or "teacher" not in table.columns:
        raise RazorError("The study of RL-distilled SFT names no teachers: run the same command again.")
    scores = table.select(
        pl.format("{}/{}", "run_id", "step").alias("teacher"),
        pl.col("run_id").alias("teacher_run"),
        *(
            pl.col(column).alias(f"teacher_{name}")
            for name, column in (("new", "new"), ("prior", "prior"), ("kl", "kl_forward"))
        ),
    )
    chosen = pl.DataFrame(named).select("level", "seed", pl.format("{}/{}", "run_id", "step").alias("teacher")).unique()
    teachers = chosen.join(scores, on="teacher", how="left")
    if teachers["teacher_new"].null_count():
        raise RazorError("The study of RL-distilled SFT names a teacher that its table lacks: run the command again.")
    teachers = teachers.filter(pl.col("teacher_new") >= pl.col("level"))
    return table.join(teachers, on=["teacher", "seed"], maintain_order="left")
