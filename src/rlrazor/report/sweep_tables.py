"""The tables of a sweep itself: what is kept, what explains forgetting, and how it was run."""

from collections.abc import Mapping
from typing import Any

import polars as pl

from rlrazor.analysis.law import Quadratic, Saturating, error_of, r2_of
from rlrazor.analysis.matched import matched
from rlrazor.analysis.statistics import Estimate, difference
from rlrazor.report.measures import label_of
from rlrazor.report.sweep import Sweep
from rlrazor.report.tables import Table, fit_cells
from rlrazor.report.text import NEVER, minus, number, percent, signed, with_seeds, written


def retention_table(sweep: Sweep) -> Table:
    """The prior accuracy that each method keeps, best at the first threshold on top, below the base."""
    base_new, base_prior = sweep.base("new"), written(sweep.base("prior"))
    # In brackets where the base itself does not reach the threshold: it is there to compare with.
    compared = [base_prior if base_new.mean >= at else f"({base_prior})" for at in sweep.study.thresholds]
    rows = [["base (not fine-tuned)", *compared, written(base_new), NEVER]]
    for method in sweep.ranking:
        cells = sweep.retention.filter(pl.col("method") == method).to_dicts()
        kept = [with_seeds(written(_mean(cell)), _mean(cell), cell["seeds_total"]) for cell in cells]
        rows.append([sweep.study.label(method), *kept, percent(cells[0]["best_new"]), written(sweep.areas[method])])
    thresholds = [f"new ≥ {at:.0%}" for at in sweep.study.thresholds]
    return Table("Prior accuracy kept, %", ["method", *thresholds, "best new, %", "frontier area, %"], rows)


def prior_tasks_table(sweep: Sweep) -> Table:
    """How each prior task changed at the checkpoint that the retention table shows at the lowest threshold."""
    at, bases = sweep.study.thresholds[0], sweep.study.bases
    reported = matched(sweep.points, ["method"], at)
    rows = []
    for method in sweep.ranking:
        own = reported.filter(method=method)
        changes = [signed(difference(own, bases, f"prior_{name}")) for name in sweep.prior_tasks]
        rows.append([sweep.study.label(method), *changes])
    return Table(f"Change of each prior task at new ≥ {at:.0%}, points", ["method", *sweep.prior_tasks], rows)


def law_table(sweep: Sweep) -> Table:
    """How well each drift measure explains forgetting."""
    rows = [
        [
            label_of(law.predictor),
            *fit_cells(law.quadratic),
            fit_cells(law.saturating)[0],
            number(law.spearman),
            *(percent(error_of(fit)) for fit in (law.quadratic, law.saturating, law.baseline)),
            f"{law.checkpoints:,}",
        ]
        for law in sweep.laws
    ]
    headers = ["predictor", "quadratic R²\n[95 %]", "R² per seed", "monotone R²\n[95 %]", "Spearman"]
    headers += ["left-out error,\nquadratic", "left-out error,\nmonotone", "baseline", "points"]
    return Table("What explains forgetting?", headers, rows)


def range_table(sweep: Sweep) -> Table:
    """How the fits depend on how far the sweep went."""
    rows = []
    for within in sweep.ranges:
        fits = [fit for law in within.laws for fit in (law.quadratic, law.saturating)]
        name = "all" if within.limit is None else f"≤ {within.limit:g}"
        rows.append([name, f"{within.checkpoints:,}", *(number(r2_of(fit)) for fit in fits)])
    laws = [f"{label_of(law.predictor)},\n{kind}" for law in sweep.laws for kind in ("quadratic", "monotone")]
    return Table("R² by range", [f"forward KL,\n{sweep.study.kl_unit}", "points", *laws], rows)


def formula_table(sweep: Sweep) -> Table:
    """The fitted laws, as formulas."""
    rows = [
        [label_of(summary.predictor), name, _formula(fit.law)]
        for summary in sweep.laws
        for name, fit in (("quadratic", summary.quadratic), ("monotone", summary.saturating))
        if fit
    ]
    return Table("The laws", ["x", "law", "forgetting, a fraction of 1"], rows, words=True)


def sensitivity_table(sweep: Sweep) -> Table:
    """How the law and the order of the methods react to settings."""
    label, rows = sweep.study.label, []
    for variant in sweep.sensitivity:
        order = " > ".join(f"{label(method)} {percent(prior)}" for method, prior in variant["kept"].items())
        never = f"; never: {', '.join(map(label, variant['never']))}" if variant["never"] else ""
        scores = percent(variant["base_new"]), percent(variant["base_prior"])
        r2 = number(variant["quadratic_r2"]), number(variant["saturating_r2"])
        name = f"{variant['setting']} = {variant['value']}" + (" (as run)" if variant["configured"] else "")
        rows.append([name, *scores, *r2, order + never])
    headers = ["setting", "base new, %", "base prior, %", "quadratic R²", "monotone R²"]
    return Table("Sensitivity", [*headers, f"kept at {sweep.study.thresholds[0]:.0%}"], rows)


def distillation_table(sweep: Sweep) -> Table:
    """Each teacher beside the one of its students that is reported."""
    forms = {"new": percent, "prior": percent, "kl_forward": "{:.3f}".format}
    rows = []
    for pair in sweep.distillation:
        teacher, student = pair["teacher"], pair["student"]
        scores = [form(of[name]) if of else NEVER for of in (teacher, student) for name, form in forms.items()]
        gap = signed(Estimate.over([student["prior"] - teacher["prior"]]) if student else None)
        names = (sweep.study.label(pair[f"{who}_method"]) for who in ("teacher", "student"))
        rows.append([" → ".join(names), str(pair["seed"]), *scores, gap])
    scored = ["new, %", "prior, %", f"KL, {sweep.study.kl_unit}"]
    of_both = [f"{who} {score}" for who in ("teacher", "student") for score in scored]
    return Table("Teachers and students", ["teacher → student", "seed", *of_both, "prior difference"], rows)


def _mean(cell: Mapping[str, Any]) -> Estimate | None:
    if cell["mean"] is None:
        return None
    half = None if cell["high"] is None else cell["high"] - cell["mean"]
    return Estimate(cell["mean"], half, cell["n_seeds"])


def _formula(fitted: Quadratic | Saturating) -> str:
    if isinstance(fitted, Saturating):
        return f"{fitted.a:.3g} · (1 − exp(−{fitted.b:.3g} · x^{fitted.c:.3g}))"
    terms = ((fitted.slope, "x"), (fitted.curvature, "x²"))
    tail = "".join(f" {'+' if factor >= 0 else '−'} {abs(factor):.3g} · {power}" for factor, power in terms)
    return minus(f"{fitted.intercept:.3g}") + tail
