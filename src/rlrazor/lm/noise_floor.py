"""How far a base's scores on prior tasks are from themselves, where nothing but how they are computed changes.

In other batches sums are rounded in another order, in another precision more of them, and a task that shows examples in
its prompt may show others. None of that is forgetting. It is measured once for a base and its tasks, and kept in the
user's cache.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean

from rlrazor.errors import RazorError
from rlrazor.lm import compute
from rlrazor.lm.models import LanguageModel, load
from rlrazor.lm.prior import BATCH, PriorTasks
from rlrazor.lm.probes import content_hash
from rlrazor.lm.scores import NotANumberError, PriorScores, Score
from rlrazor.system.documents import read_json
from rlrazor.system.schema import Name, Schema
from rlrazor.system.writing import write_cache

FORMAT = 2  # 1: read without trees, and by a limit of each of a group's tasks
VARIANTS = 3  # ways of computing, at most
OTHER_BATCH, OTHER_SEED = BATCH // 2, 4321


class OfTask(Schema):
    """How much worse a task's score was than the base's own, in its unit, and how many items were lost and gained.

    `lost` and `gained` are None where the items' outcomes are not known.
    """

    drop: float
    lost: int | None
    gained: int | None


class NoiseFloor(Schema):
    """By how it was computed, and by task."""

    variants: dict[Name, dict[Name, OfTask]]

    def of_task(self, name: str) -> float:
        """The largest difference of a task's score, whichever way, in its unit."""
        return max((abs(tasks[name].drop) for tasks in self.variants.values()), default=0.0)

    def of_mean(self, names: Sequence[str]) -> float | None:
        """The largest difference of the mean over these tasks; None for none of them."""
        if not names:
            return None
        return max((abs(fmean(tasks[name].drop for name in names)) for tasks in self.variants.values()), default=0.0)

    def describe(self) -> str:
        """A sentence on what it is."""
        how = ", or ".join(self.variants)
        return (
            f"Noise floor of the scores: the most by which one of the base's differs from itself when it is computed "
            f"{how}. A drop that is no larger is no sign of forgetting."
        )


def path_of(cache_dir: Path | None, digest: str, dtype: str, scores: PriorScores) -> Path | None:
    """Where that of this base is kept, on these very items."""
    if cache_dir is None:
        return None
    tasks = {
        name: [score.metric, score.version, score.n, {task: sorted(of) for task, of in score.items.outcomes.items()}]
        for name, score in scores.items()
    }
    return cache_dir / f"floor-{content_hash([FORMAT, digest, dtype, tasks])}.json"


def cached(path: Path | None, scores: PriorScores) -> NoiseFloor | None:
    """None where it is not there, or is not of these tasks."""
    if path is None or not path.exists():
        return None
    with suppress(RazorError):
        found = read_json(path, NoiseFloor)
        if found.variants and all(set(tasks) == set(scores) for tasks in found.variants.values()):
            return found
    return None


def cache(path: Path | None, floor: NoiseFloor) -> None:
    """Keep it there, unless nothing was measured."""
    if path is not None and floor.variants:
        write_cache(path, json.dumps(floor.model_dump(), allow_nan=False))


def of_base(base: str, dtype: str, suite: PriorTasks, told: Callable[[str], None] = lambda task: None) -> NoiseFloor:
    """The same where its own scores are not at hand."""
    own = suite.scores(load(base, dtype=dtype), lambda task: told(f"the base on {task}"))
    return measure(base, dtype, suite, own, told)


def measure(base: str, dtype: str, suite: PriorTasks, scores: PriorScores, told: Callable[[str], None]) -> NoiseFloor:
    """Score the base again in each way; `scores` are its own. One model is in memory at a time.

    In a precision that is too coarse for it, it is not.
    """
    other = compute.PRECISIONS[1] if dtype == compute.PRECISIONS[0] else compute.PRECISIONS[0]
    examples = suite.shows_examples()
    found: dict[str, Mapping[str, OfTask]] = {}

    def say(task: str) -> None:
        told(f"the base once more, for the noise floor, on {task}")

    def beside(lm: LanguageModel) -> None:
        found[f"in batches of {OTHER_BATCH}"] = _of_tasks(scores, suite.scores(lm, say, batch=OTHER_BATCH))
        if examples:
            again = suite.scores(lm, say, examples_seed=OTHER_SEED)
            found["with other examples in the prompts"] = _of_tasks(scores, again)

    beside(load(base, dtype=dtype))
    with suppress(NotANumberError):
        found[f"in {other}"] = _of_tasks(scores, suite.scores(load(base, dtype=other), say))
    return NoiseFloor(variants={name: dict(tasks) for name, tasks in found.items()})


def _of_tasks(own: PriorScores, again: PriorScores) -> dict[str, OfTask]:
    return {name: _of_task(score, again[name]) for name, score in own.items()}


def _of_task(own: Score, again: Score) -> OfTask:
    sign = 1 if own.higher_is_better else -1
    pairs = [
        (sign * outcome, sign * again.items.outcomes[task][item])
        for task, items in own.items.outcomes.items()
        for item, outcome in items.items()
        if item in again.items.outcomes.get(task, {})
    ]
    known = pairs or None
    return OfTask(
        drop=sign * (own.value - again.value),
        lost=known and sum(before > after for before, after in pairs),
        gained=known and sum(before < after for before, after in pairs),
    )
