"""The outcomes of the prior tasks' items as a table, beside what the base made of them."""

from collections.abc import Mapping

import polars as pl

from rlrazor.lm.scores import Score
from rlrazor.runs import items
from rlrazor.runs.records import Ancestor
from rlrazor.runs.store import RunStore


def items_of(scores: Mapping[str, Score]) -> pl.DataFrame | None:
    """Of a model's scores, of the columns `items.OWN`; None where no score has outcomes."""
    rows = [
        _row(prior, score, task, item, outcome)
        for prior, score in scores.items()
        for task, outcomes in score.items.outcomes.items()
        for item, outcome in outcomes.items()
    ]
    return pl.DataFrame(rows, schema=items.OWN, orient="row") if rows else None


def _row(prior: str, score: Score, task: str, item: str, outcome: float) -> tuple[object, ...]:
    asked = score.items.question(task, item)
    likely = list(asked.logprobs) or None
    choices = None if likely is None else len(likely)
    return prior, task, score.items.categories.get(task), item, outcome, choices, list(asked.right) or None, likely


def questions_of(scores: Mapping[str, Score]) -> pl.DataFrame | None:
    """What the items ask of which `items_of` has outcomes, of the columns `items.ASKED`; None where that is none."""
    rows = [
        (prior, task, item, asked.prompt, list(asked.choices) or None)
        for prior, score in scores.items()
        for task, item in score.items.names()
        if (asked := score.items.question(task, item)).prompt
    ]
    return pl.DataFrame(rows, schema=items.ASKED, orient="row") if rows else None


def base_items(base: Ancestor, store: RunStore) -> pl.DataFrame | None:
    """Those of the base that a run starts from, of the columns `items.OWN`; None where its run did not keep them."""
    if not store.has_items(base.spec.run_id):
        return None
    return items.outcomes_of(store.items(base.spec.run_id), base.step)


def beside_base(base: pl.DataFrame | None, own: pl.DataFrame | None) -> pl.DataFrame | None:
    """A model's outcomes beside the base's, as `Checkpoint.items`; None where its own are not known."""
    return None if own is None else items.beside(base, own)
