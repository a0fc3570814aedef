"""What a law is worth, as `razor calibrate` prints it, as law.png draws it, and as the report of its runs shows it."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from rlrazor.extras import needs_extra
from rlrazor.guard.calibrate import warnings_of
from rlrazor.guard.law_file import NAMES, LawFile, range_label
from rlrazor.report import Results
from rlrazor.report.drawing import INK, PALETTE, Axis, Curve, Figure, Floats, Layer, Marker, Panel, Points
from rlrazor.report.study import Section
from rlrazor.report.tables import Table
from rlrazor.report.text import percent

FINE = 400  # points of the law's curve, half of them close together near the base, where it may be steep


def with_law(results: Results) -> Results:
    """The findings on a calibration with the section of its law in front; as they are where there is no law.json.

    Raises RazorError for a law.json that cannot be read.
    """
    path = results.folder / "law.json"
    if results.sweep is None or not path.is_file():
        return results
    needs_extra("guard")
    sweep, law = results.sweep, LawFile.load(path)
    section = law_section(law, warnings_of(law, sweep.study.table))
    study = replace(sweep.study, name=section.name)
    return replace(results, studies=[study, *results.studies], sections=[section, *results.sections])


def law_section(law: LawFile, warnings: Sequence[str]) -> Section:
    """The law's own verdict; the warnings stand at the top of the page."""
    return Section(
        "law",
        "The law of this base",
        "How much of the prior scores does a KL cost on this base, and how far is such a forecast to be relied on?",
        law.describe(),
        figure(law),
        [candidates_table(law), ranges_table(law)],
        f"{len(law.data)} checkpoints of {len(law.forecaster.left_out)} runs. Left: the law, and what each run lost. "
        "Right: each run as it was forecast by a law of the others, which is what the intervals rest on. Candidates: "
        f"mean absolute error on a {law.choice.by} left out, each counting once; a law has to beat guessing the mean "
        "by a tenth. By what was forecast: the same on a run left out, where guessing knows the mean of what the other "
        "runs lost in that range. Where it says no better there, the law cannot judge a limit in that range.",
        warning=" ".join(warnings),
    )


def candidates_table(law: LawFile) -> Table:
    """What each candidate's forecasts were worth on what was left out."""
    best = "chosen" if law.choice.found.useful else "the best of them, no better than guessing"
    rows = [
        [" + ".join(one.columns), percent(one.error), best if one == law.choice.found.best else ""]
        for one in law.choice.found.candidates
    ]
    rows.append(["guessing the mean", percent(law.choice.guess), ""])
    return Table(f"Mean error on a {law.choice.by} left out, points", ["forecast by", "error", ""], rows)


def ranges_table(law: LawFile) -> Table:
    """How wrong the law was on a run left out, by what it forecast."""
    rows = [
        [range_label(one), percent(one.error), percent(one.guess), str(one.checkpoints), str(one.runs)]
        for one in law.by_range
    ]
    headers = ["forecast, points", "error", "guessing there", "checkpoints", "runs"]
    return Table("Mean error on a run left out, by what was forecast, points", headers, rows)


def figure(law: LawFile) -> Figure:
    """The law through its runs; and what it forecast of each run when that was left out, against what was measured."""
    fitted, weights = law.forecaster.law, np.array(law.forecaster.law.weights)
    # Of one KL its nats; of two their weighted sum, in nats of the first that counts.
    lead = int(np.argmax(weights > 0))
    unit = weights / weights[lead]
    methods = {row.run: row.method for row in law.data}
    colors = {method: PALETTE[index % len(PALETTE)] for index, method in enumerate(dict.fromkeys(methods.values()))}
    kls_ND, forgetting_N, run_N = law.measured
    through: list[Layer] = []
    left_out: list[Layer] = []
    for one in law.forecaster.left_out:
        own_N, label = run_N == one.run, methods[one.run]
        drop_N = 100 * forgetting_N[own_N]
        through.append(Points(label, kls_ND[own_N] @ unit, drop_N, Marker(colors[label], line=True)))
        left_out.append(Points(label, 100 * one.law.predict(kls_ND[own_N]), drop_N, Marker(colors[label])))
    x_N = _finely(max(float(layer.x.max()) for layer in through))
    through.append(Curve("law", x_N, 100 * fitted.predict(np.outer(x_N, np.eye(len(unit))[lead])), INK))
    values_M = np.concatenate([np.concatenate([layer.x, layer.y]) for layer in left_out])
    ends = np.array([min(0.0, values_M.min()), values_M.max()])
    left_out.append(Curve("measured as forecast", ends, ends, INK, dashed=True))
    weighed = zip(fitted.columns, unit, strict=True)
    x_label = " + ".join(f"{weight:.3g} {NAMES[name]}" if weight != 1 else NAMES[name] for name, weight in weighed)
    y = Axis("measured drop of the prior score, points", percent=False)
    panels = [
        Panel(_title(law), Axis(f"{x_label}, nats", percent=False), y, through),
        Panel("Each run, by a law of the others", Axis("forecast drop, points", percent=False), y, left_out),
    ]
    return Figure("law", panels, columns=2)


def _title(law: LawFile) -> str:
    if law.objection() is None:
        return "The law"
    return f"Not to be relied on: {'no more than noise' if law.choice.found.useful else 'no better than guessing'}"


def _finely(end: float) -> Floats:
    """From 0 to `end`, close together near 0."""
    near = np.geomspace(1e-4 * end, end, FINE // 2) if end > 0 else np.empty(0)
    return np.unique(np.concatenate([np.linspace(0, end, FINE // 2), near]))
