"""What the drop on each prior task is made of: format, recoverable, lost; and how that is shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rlrazor.analysis.drop_parts import NO_DROP, UNTOLD, DropParts, Outcomes, PartOfDrop, drop_parts
from rlrazor.guard.recover import Recovered
from rlrazor.lm.scores import Score


def parts_of(
    base: Mapping[str, Score], tuned: Mapping[str, Score], recovered: Recovered | None, level: float
) -> dict[str, DropParts]:
    """By task, of those that are scored item by item in fractions of 1 and whose drop can be told apart at all."""
    found = {}
    for name, before in base.items():
        one = _parts(before, tuned[name], None if recovered is None else _after(recovered, name), level)
        if one is not None:
            found[name] = one
    return found


def _after(recovered: Recovered, name: str) -> tuple[Score, Score]:
    return recovered.base.scores[name], recovered.tuned.scores[name]


def _parts(base: Score, tuned: Score, after: tuple[Score, Score] | None, level: float) -> DropParts | None:
    every = [base, tuned, *(after or ())]
    names = base.items.names()
    if not names or not all(score.is_fraction and set(score.items.names()) == set(names) for score in every):
        return None
    robust = all(score.items.robust is not None for score in every)
    if not robust and after is None:
        return None

    def of(score: Score) -> list[float]:
        outcomes = [score.items.outcomes[task][item] for task, item in names]
        return outcomes if score.higher_is_better else [1 - one for one in outcomes]

    def forgiven(score: Score) -> list[float] | None:
        if not robust or score.items.robust is None:
            return None
        return [score.items.robust.outcomes[task][item] for task, item in names]

    def outcomes(score: Score, later: Score | None) -> Outcomes:
        return Outcomes(of(score), forgiven(score), None if later is None else forgiven(later) or of(later))

    tasks = [task for task, _ in names] if len(base.items.outcomes) > 1 else None
    return drop_parts(
        outcomes(base, after and after[0]),
        outcomes(tuned, after and after[1]),
        level,
        groups_N=None if base.items.by_size else tasks,
        clusters_N=tasks,
    )


def notes_of(parts: Mapping[str, DropParts], base: Mapping[str, Score], recovered: Recovered | None) -> list[str]:
    """What a reader of the parts has to know, in sentences."""
    said = [] if recovered is None else [recovered.describe()]
    parsers = {
        name: score.items.robust.by for name, score in base.items() if score.items.robust is not None and name in parts
    }
    if parsers:
        said.append(
            "Format is what a parser that forgives the template counts as right and the task's own does not: "
            + "; ".join(f"{name} by {by}" for name, by in parsers.items())
            + "."
        )
    if recovered is not None:
        if without := [name for name in base if name not in parts]:
            said.append(
                f"Of {', '.join(without)} it is not told what is recoverable: the items' outcomes are not known, or "
                "the score is no fraction of 1."
            )
        for name, one in parts.items():
            if one.taught is not None and one.taught.interval[1] < 0:
                said.append(
                    f"Recovery's steps cost the base {-100 * one.taught.value:.1f} points on {name}: they do harm, and "
                    "what is lost there may be theirs. A smaller --recover-lr does less."
                )
    return said


def said_of(parts: Mapping[str, DropParts]) -> list[str]:
    """What each drop is mainly, in a sentence for each kind; nothing of a drop of which that cannot be told."""
    kinds: dict[str, list[str]] = {}
    for name, one in parts.items():
        kinds.setdefault(one.mainly, []).append(name)
    told = {kind: names for kind, names in kinds.items() if kind not in (NO_DROP, UNTOLD)}
    return [f"The drop on {', '.join(names)} is mainly {kind}." for kind, names in told.items()]


def headers(*, recovered: bool) -> tuple[str, ...]:
    """Of the table."""
    last = ("recoverable", "lost", "taught the base") if recovered else ("not format",)
    return "points of the drop", "n", "drop", "format", *last, "mainly"


def shown_parts(one: DropParts) -> tuple[str, ...]:
    """A row's cells after its name: each part with its interval, in points."""
    last = (one.rest,) if one.lost is None else (one.recoverable, one.lost, one.taught)
    cells = (_cell(part) for part in (one.drop, one.format, *last))
    return f"{one.n:,}", *cells, one.mainly


def _cell(part: PartOfDrop | None) -> str:
    if part is None:
        return "—"
    low, high = (100 * end for end in part.interval)
    return f"{100 * part.value:.1f} [{low:.1f}, {high:.1f}]"


def as_json(one: DropParts) -> dict[str, Any]:
    """All of it."""
    return {**asdict(one), "mainly": one.mainly}
