"""Methods at matched new-task score, their learning rates tuned by one rule, beside the curve over learning rates."""

from pathlib import Path

from rlrazor.analysis.matched import RATE
from rlrazor.analysis.statistics import difference, mean_of, shared_threshold
from rlrazor.report.drawing import Figure, style_of
from rlrazor.report.keyed import Column, Judged, Keyed, gap, in_short, table_of
from rlrazor.report.prose import Shown, told
from rlrazor.report.rates import Line, Rates, kept_columns
from rlrazor.report.study import Section, Study
from rlrazor.report.text import INTERVALS, MATCHED, written

TEXT = Path(__file__).with_suffix(".md")
NAME = "learning-rates"
BY = ("method",)


def applies(study: Study) -> bool:
    """Whether a method was run at several learning rates, and a run is no stage of a sequence."""
    if "stage" in study.table.columns or RATE not in study.points.columns:
        return False
    return bool((study.points.group_by(BY).n_unique()[RATE] > 1).any())


def section(study: Study) -> Section:
    """What each method keeps at the highest new-task score that all reach, and at each of its learning rates."""
    at = shared_threshold(study.points, study.bases, BY, study.thresholds)
    lines = {name: Line((name,), study.label(name), style_of(index)) for index, name in enumerate(study.methods)}
    rates = Rates(study.points, BY, study.thresholds[0] if at is None else at, lines)
    judged = None if at is None else judge(study, rates)
    tables = [kept_table(study, rates), gap_table(study, rates, judged or {}), *rates.tables]
    numbers = {
        "at": f"{rates.at:.0%}",
        "reference": study.label(reference_of(study)),
        "intervals": INTERVALS,
        "matched": MATCHED,
    }
    shown = Shown(finding(study, rates, judged), Figure(NAME, rates.panels, 2), tables, numbers)
    return told(study, TEXT, shown)


def reference_of(study: Study) -> str:
    """The method that the others are compared with, whatever the scores: the first of RL, or the first of all."""
    return next((name for name in study.families["RL"] if name in study.methods), study.methods[0])


def judge(study: Study, rates: Rates) -> dict[str, Judged]:
    """Each method beside the reference, by prior score kept."""
    name, found = reference_of(study), {}
    reference = rates.reported.filter(method=name)
    for method in study.methods:
        if method != name:
            gap = difference(rates.reported.filter(method=method), reference, "prior")
            found[method] = Judged.of(study.label(method), gap, len(study.seeds))
    return found


def finding(study: Study, rates: Rates, judged: dict[str, Judged] | None) -> str:
    """The verdicts, and what is unfair about them."""
    at, name = f"new ≥ {rates.at:.0%}", study.label(reference_of(study))
    if judged is None:
        return f"Nothing can be compared: no method gets to {at} in all seeds, above the base."
    if not judged:
        kept = written(mean_of(rates.reported, "prior"))
        return f"Prior score kept at {at}, learning rate tuned, by {name}: {kept} %. {rates.cautions}".strip()
    told = f"Prior score kept at {at}, learning rates tuned, against {name}’s: {in_short([*judged.values()])}."
    return f"{told} {rates.cautions}".strip()


def kept_table(study: Study, rates: Rates) -> Keyed:
    """What each method keeps, and what its learning rate was chosen from: `METHOD.prior`, `METHOD.lr`, ..."""
    columns = [*kept_columns(rates.mean, study.kl_unit, len(study.seeds), "reached"), *rates.columns]
    rows = {name: (line.label, line.values) for name, line in rates.lines.items()}
    return table_of(f"At new ≥ {rates.at:.0%}", "method", rows, columns)


def gap_table(study: Study, rates: Rates, judged: dict[str, Judged]) -> Keyed:
    """Each method minus the reference: `METHOD.gap`, `METHOD.verdict`."""
    name = study.label(reference_of(study))
    columns: list[Column[Judged]] = [gap("gap", "prior score kept, points", lambda one: one.gap)]
    rows = {method: (one.label, one) for method, one in judged.items()}
    return table_of(f"Minus {name}’s, at new ≥ {rates.at:.0%}", "method", rows, columns, len(study.seeds))
