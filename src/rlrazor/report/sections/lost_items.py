"""The items that were lost most surely over methods, with what they ask: a table of words."""

from collections.abc import Mapping, Sequence

import polars as pl

from rlrazor.analysis.lost_in_runs import LostInRuns, surest_in_runs
from rlrazor.report.study import Study
from rlrazor.report.tables import Table
from rlrazor.report.text import NEVER, minus
from rlrazor.system.terminal import printable

LONGEST = 160  # characters of a question, of which its end is shown, or of an answer

Asked = Mapping[tuple[str, str, str], tuple[str, Sequence[str | None]]]
"""By prior task, task and item what it asks, and the answers to choose among."""


def lost_table(study: Study, methods: Mapping[str, pl.DataFrame]) -> Table | None:
    """`methods`: their items, as `rlrazor.analysis.lost_in_runs` takes them; None where none was lost."""
    lost = surest_in_runs(methods)
    if not lost:
        return None
    asked = asked_of(study)
    headers = ["prior task", "what is asked", "right answer", "answered now", "lost by", "fell by, nats"]
    return Table("Lost most surely", headers, [_row(study, one, asked) for one in lost], words=True)


def asked_of(study: Study) -> Asked:
    """What the items ask, as far as the bases' folders say."""
    found: dict[tuple[str, str, str], tuple[str, Sequence[str | None]]] = {}
    for run_id in study.bases["run_id"].unique(maintain_order=True) if study.store else ():
        questions = study.store.questions(run_id) if study.store else None
        for prior, task, item, prompt, answers in () if questions is None else questions.rows():
            found.setdefault((prior, task, item), (prompt, answers or ()))
    return found


def _row(study: Study, one: LostInRuns, asked: Asked) -> list[str]:
    prompt, answers = asked.get((one.prior, one.task, one.item), (f"{one.task}, item {one.item}", ()))
    fall = NEVER if one.fall is None else minus(f"{one.fall:.2g}")
    return [
        one.prior,
        _shown(prompt),
        _answer(answers, one.right),
        _answer(answers, one.said),
        _lost_by(study, one),
        fall,
    ]


def _answer(answers: Sequence[str | None], place: int | None) -> str:
    """By its text, or its place where that is not known; a dash for none."""
    if place is None:
        return NEVER
    text = answers[place] if place < len(answers) else None
    return f"no. {place + 1}" if text is None else _shown(text)


def _lost_by(study: Study, one: LostInRuns) -> str:
    """The methods, and in how many of their runs where these are several."""
    if one.share == 1:
        return "all" if len(one.runs) > 1 else study.label(next(iter(one.runs)))
    return ", ".join(
        study.label(method) + (f" ({lost} of {of})" if of > 1 else "")
        for method, (lost, of) in one.runs.items()
        if lost
    )


def _shown(text: str) -> str:
    """On one line, and no longer than there is room."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= LONGEST else f"…{line[-LONGEST:]}"
