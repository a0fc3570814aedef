"""What a tuned model lost and gained on a prior task, item by item, and which items it lost most surely."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rlrazor.analysis import lost_figures
from rlrazor.analysis.lost import Likelihoods, Transitions, fall, guessed_among, surest, transitions
from rlrazor.lm.scores import Question, Score

MARGIN, ORDER = "margin", "order"


@dataclass(frozen=True)
class LostItem:
    """An item that was right and is wrong now: the end of its prompt, and the model's answers where it has choices.

    `fall`: of the margin of the right answer over the best wrong one, in nats as the task's metric compares answers;
    None where it has none.
    """

    task: str
    item: str
    prompt: str
    before: str | None
    after: str | None
    fall: float | None


@dataclass(frozen=True)
class ItemChanges:
    """Of a prior task's items: all of them, those of each category of a group, and those that were lost most surely.

    `ranked`: whether these come by how far their margin fell (MARGIN), or, as they have none, in the task's own ORDER.
    """

    whole: Transitions
    categories: Mapping[str, Transitions]
    surest: Sequence[LostItem] = field(default=())
    ranked: str = ORDER

    def as_json(self) -> dict[str, Any]:
        """All of it."""
        return {
            **_json(self.whole),
            "categories": {name: _json(one) for name, one in self.categories.items()},
            "lost_items": [asdict(one) for one in self.surest],
            "ranked_by": self.ranked,
        }


def _json(of: Transitions) -> dict[str, Any]:
    return {**asdict(of), "drop": of.drop}


def item_changes(base: Score, tuned: Score, level: float) -> ItemChanges | None:
    """Of a task that both were scored on; None where the items' outcomes are not known, or not right or wrong.

    The items have to be the same in both.
    """
    names = base.items.names()
    whole = _transitions(base, tuned, names, level)
    if whole is None:
        return None
    categories: dict[str, list[tuple[str, str]]] = {}
    for task, item in names:
        categories.setdefault(base.items.categories.get(task, task), []).append((task, item))
    parts = {name: _transitions(base, tuned, own, level) for name, own in categories.items()}
    lost = [_lost(base, tuned, *name) for name in names if _right(base, *name) > _right(tuned, *name)]
    chosen = surest(lost, lambda one: one.fall)
    return ItemChanges(
        whole=whole,
        categories={name: one for name, one in parts.items() if one is not None} if len(parts) > 1 else {},
        surest=chosen,
        ranked=MARGIN if chosen and chosen[0].fall is not None else ORDER,
    )


def _transitions(base: Score, tuned: Score, names: Sequence[tuple[str, str]], level: float) -> Transitions | None:
    """Of some items; in a group's, items of one task may be lost together."""
    asked = [base.items.question(*name) for name in names]
    return transitions(
        [_right(base, *name) for name in names],
        [_right(tuned, *name) for name in names],
        level,
        choices_N=[guessed_among(len(one.choices), one.right) for one in asked],
        clusters_N=[task for task, _ in names] if len(base.items.outcomes) > 1 else None,
    )


def _right(score: Score, task: str, item: str) -> float:
    """1 for right: where less of a score is better, an outcome of 0."""
    outcome = score.items.outcomes[task][item]
    return outcome if score.higher_is_better else 1 - outcome


def _lost(base: Score, tuned: Score, task: str, item: str) -> LostItem:
    before, after = base.items.question(task, item), tuned.items.question(task, item)
    fell = fall(_likelihoods(before), _likelihoods(after))
    return LostItem(task, item, before.prompt, _answer(before), _answer(after), fell)


def _likelihoods(asked: Question) -> Likelihoods:
    return Likelihoods(asked.logprobs, asked.right)


def _answer(asked: Question) -> str | None:
    place = _likelihoods(asked).likeliest
    return None if place is None else asked.choices[place]


HEADERS = ("of the items", *lost_figures.HEADERS.values())


def shown_changes(of: Transitions) -> tuple[str, ...]:
    """A row's cells after its name: a figure with its interval in each."""
    return tuple(lost_figures.cells_of(of, _cell, _cell).values())


def _cell(value: float, interval: tuple[float, float]) -> str:
    low, high = interval
    return f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def shown_item(one: LostItem) -> str:
    """An item on a line: the end of what was asked and, where it chose among answers, what it said before and now."""
    asked = " ".join(one.prompt.split())
    answers = "" if one.before is None else f"  base {_line(one.before)}, tuned {_line(one.after or '')}"
    return f"{asked}{answers}"


def _line(text: str) -> str:
    return repr(" ".join(text.split()))


def in_turn(items: Mapping[str, ItemChanges], count: int) -> list[tuple[str, LostItem]]:
    """Of the items lost most surely the first of each task, then the second, and so on; margins of two tasks, which
    may be in different units, are not compared.
    """
    longest = max((len(one.surest) for one in items.values()), default=0)
    listed = [
        (name, one.surest[place]) for place in range(longest) for name, one in items.items() if place < len(one.surest)
    ]
    return listed[:count]
