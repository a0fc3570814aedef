"""Which KL forecasts forgetting, across methods or only within one? For sweeps that measured KL on a generic probe.

A law belongs to a base, and every seed has a base of its own: what is asked of a law is asked seed by seed, and then
averaged. Fitted to all seeds at once, a law that holds in each can look as if it held in none.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl

from rlrazor.analysis import frontier, law
from rlrazor.analysis.law import PredictorSummary
from rlrazor.analysis.statistics import Estimate, floats
from rlrazor.errors import RazorError
from rlrazor.report.drawing import INK, PALETTE, SYMBOLS, Curve, Figure, Layer, Panel, Points, Ticks
from rlrazor.report.layers import base, cloud, height, level, padded
from rlrazor.report.sections.predictors import MEASURES
from rlrazor.report.study import Section, Study
from rlrazor.report.tables import Table, fit_cells
from rlrazor.report.text import NEVER, how_many, in_words, nats, number, percent, signed, written

FORWARD, PROBE = "kl_forward", "kl_probe"
# What the verdict is about, then what is shown beside it.
MAIN = (FORWARD, "kl_reverse", "kl_correct", "kl_optimal", PROBE, "weight_l2")
BESIDE = (*(f"kl_{name}_per_token" for name in ("forward", "reverse", "correct", "probe")), "total_variation")
HOLDS = 0.5  # of the variance: a law that explains less than half of it is not one to forecast with

Verdict = Literal["across", "within", "neither"]
_NAMES = {measure.column: measure.label for measure in MEASURES}


@dataclass(frozen=True)
class Tested:
    """A measure put to the test. Errors are mean absolute errors on a method left out of the fit, fractions of 1.

    `summary` has the fits to all methods and seeds at once. The rest is by seed: `r2s`, those of the monotone law; and
    by method the means over seeds of `within`, R2 of the law fitted to that method alone, of `errors` by the monotone
    law, of `quadratic_errors`, and of `guesses`, by the other methods' mean forgetting. Errors are empty for fewer than
    two methods.
    """

    column: str
    summary: PredictorSummary
    r2s: Sequence[float]
    within: dict[str, float]
    errors: dict[str, float]
    quadratic_errors: dict[str, float]
    guesses: dict[str, float]

    @property
    def name(self) -> str:
        """For people."""
        return _NAMES[self.column]

    @property
    def r2(self) -> float | None:
        """R2 of the monotone law over all methods together, a seed at a time, the mean over seeds."""
        return float(np.mean(self.r2s)) if self.r2s else None

    @property
    def error(self) -> Estimate | None:
        """The mean error over methods, each counting once, and half its t-interval over methods."""
        return Estimate.over(list(self.errors.values())) if self.errors else None

    @property
    def gain(self) -> Estimate | None:
        """How much smaller the error is than that of guessing, method by method; None for fewer than two methods."""
        return gap(self.guesses, self.errors)

    @property
    def verdict(self) -> Verdict:
        """Whether its law holds across methods, only within one, or in neither sense; see the section's note."""
        if self.gain and _told(self.gain) > 0 and (self.r2 or 0) >= HOLDS:
            return "across"
        return "within" if self.within and float(np.median(list(self.within.values()))) >= HOLDS else "neither"


def applies(study: Study) -> bool:
    """Whether the sweep measured KL on a generic probe."""
    return PROBE in study.table.columns


def section(study: Study) -> Section:
    """Every KL of the sweep and the weights' distance: R2 across and within methods, and forecasts of a new method."""
    tested = examine(study.points)
    residuals = {column: residuals_of(study.points, column) for column in (FORWARD, PROBE)}
    return Section(
        "kl-laws",
        "Which KL forecasts forgetting?",
        "The paper’s law is that forgetting is a function of the forward KL on the new task, whatever the method. Does "
        "it hold across methods here, or only within one? And does another KL do better: the reverse, that on the "
        "base’s correct completions, or that on a generic probe, which needs no labels either?",
        finding(tested),
        _figure(study, tested, residuals),
        [_law_table(tested), _forecast_table(tested), _residual_table(study, residuals)],
        f"{how_many(len(study.points), 'checkpoint')} of {how_many(study.points['trajectory'].n_unique(), 'run')}, "
        f"{how_many(len(study.methods), 'method')}, {how_many(len(study.seeds), 'seed')}; KL in {study.kl_unit}, or "
        "per token where it says so. "
        "R² is over all methods together. Of all seeds at once: in a panel’s title quadratic / monotone, in brackets "
        "its 95 % bootstrap interval, drawing whole runs. Every seed has a base of its own, and a law belongs to a "
        "base: all else is fitted a seed at a time and averaged, R² by seed ± half the 95 % t-interval over seeds. "
        "(The tables of other sections fit all seeds at once.) Within a method: fitted to the checkpoints of one "
        "method and one seed, the median over methods and their range. "
        "Left-out error: mean absolute error, in accuracy points, of the monotone law on a method that it was not "
        "fitted to; mean over methods ± half the 95 % t-interval over methods, since what is asked is how it would do "
        "on one more. The methods’ fits share most of their checkpoints, so take that interval as a guide. Guessing: "
        "the other methods’ mean forgetting. Gains over it, and over forward KL, are taken method by method. A law "
        f"holds across methods if its gain over guessing can be told from chance and it explains at least {HOLDS:.0%} "
        f"of forgetting; otherwise only within a method if the median R² within methods is at least {HOLDS}. Residual: "
        "forgetting beyond what the law fitted to the other methods says, mean over a method’s checkpoints, per seed "
        "and then over seeds; above 0 the method forgets more than its KL suggests. "
        f"{study.description.get('probe', '')}".rstrip(),
    )


def examine(points: pl.DataFrame, samples: int = 200) -> list[Tested]:
    """Fit the laws to each measure that `points` has: to all methods, to each alone, and to all but one.

    `samples` are the bootstrap's, which takes nearly all the time.
    """
    return [_examine(points, name, samples) for name in (*MAIN, *BESIDE) if name in points.columns]


def _examine(points: pl.DataFrame, column: str, samples: int) -> Tested:
    summary = law.summarise(points, [column], samples=samples)[0]
    r2s: list[float] = []
    within: list[dict[str, float]] = []
    errors: list[dict[str, float]] = []
    quadratic_errors: list[dict[str, float]] = []
    guesses: list[dict[str, float]] = []
    for _, own in points.group_by("seed", maintain_order=True):
        x, y, methods = _columns(own, column)
        with suppress(RazorError):
            fitted = law.fit_saturating(x, y)
            r2s.append(law.r_squared(y, fitted.predict(x)))
            within.append(law.r2_within_methods(law.fit_saturating, x, y, methods))
            missed = law.leave_one_method_out(law.fit_saturating, x, y, methods)
            quadratic = law.leave_one_method_out(law.fit_quadratic, x, y, methods)
            guessed = law.leave_one_method_out(law.fit_constant, x, y, methods)
            errors.append(missed.by_method)
            quadratic_errors.append(quadratic.by_method)
            guesses.append(guessed.by_method)
    return Tested(column, summary, r2s, *map(_over_seeds, (within, errors, quadratic_errors, guesses)))


def _over_seeds(by_seed: Sequence[dict[str, float]]) -> dict[str, float]:
    """Method -> mean over the seeds that have it."""
    names = dict.fromkeys(name for of_seed in by_seed for name in of_seed)
    return {name: float(np.mean([of_seed[name] for of_seed in by_seed if name in of_seed])) for name in names}


def gap(more: dict[str, float], less: dict[str, float]) -> Estimate | None:
    """Mean of `more` minus `less` over the methods in both, with a t-interval over methods; None for fewer than two."""
    gaps = [more[name] - less[name] for name in more if name in less]
    return Estimate.over(gaps) if len(gaps) > 1 else None


def residuals_of(points: pl.DataFrame, column: str) -> dict[str, Estimate]:
    """Method -> mean forgetting beyond the monotone law of the other methods and its seed; empty for one method.

    Fractions of 1; positive where the method forgets more than its drift suggests.
    """
    rows = []
    for _, own in points.group_by("seed", maintain_order=True):
        with suppress(RazorError):
            residuals = law.left_out_residuals(law.fit_saturating, *_columns(own, column))
            rows.append(_measured(own, column).with_columns(residual=pl.Series(residuals)))
    if not rows:
        return {}
    means = pl.concat(rows).group_by("method", "seed", maintain_order=True).agg(pl.mean("residual"))
    by_method = means.group_by("method", maintain_order=True).agg("residual")
    return {method: Estimate.over(values) for method, values in by_method.rows()}


# The finding


def finding(tested: Sequence[Tested]) -> str:
    """Which law holds across methods, which only within one, and by how much the best beats forward KL and guessing."""
    main = [one for one in tested if one.column in MAIN and one.r2 is not None]
    ranked = sorted((one for one in main if one.error), key=_mean_error)
    if not ranked:
        fitted = [one for one in main if one.within]
        if not fitted:
            return "The sweep is too small to fit a law to any KL."
        listed = in_words([f"{one.name} (R² {number(one.r2)})" for one in fitted])
        return f"With one method nothing can be said across methods; within it the law is that of {listed}."
    best = ranked[0]
    of = {verdict: [one for one in main if one.verdict == verdict] for verdict in ("across", "within", "neither")}
    parts = [
        f"across methods the law holds in {_listed(of['across'], _across)}" if of["across"] else "",
        f"only within a method in {_listed(of['within'], _within)}" if of["within"] else "",
        f"in neither sense in {_listed(of['neither'], _within)}" if of["neither"] else "",
    ]
    if not of["across"]:
        parts.insert(0, "across methods no law holds")
    verdicts = "; ".join(part for part in parts if part)
    return f"{verdicts[0].upper()}{verdicts[1:]}. {_forecast(best, ranked)}"


def _forecast(best: Tested, ranked: Sequence[Tested]) -> str:
    """How wrong the best is on a method not seen, against forward KL, or the next best, and guessing."""
    guess = Estimate.over(list(best.guesses.values()))
    rival = next((one for one in ranked if one.column == FORWARD and one is not best), None)
    rival = rival or next((one for one in ranked[1:]), None)
    sentence = f"On a method not in the fit, {best.name} is wrong by {written(best.error)} accuracy points"
    if rival:
        sentence += f", {rival.name} by {written(rival.error)}"
    sentence += f" and guessing the mean by {written(guess)}: "
    if best.gain is None or _told(best.gain) <= 0:
        return f"{sentence}no measure can be told from guessing ({signed(best.gain)} points gained)."
    sentence += f"a gain of {written(best.gain)} points over guessing"
    lead = gap(rival.errors, best.errors) if rival else None
    if rival is None or lead is None:
        return f"{sentence}."
    apart = "" if _told(lead) > 0 else ", which does not tell the two apart"
    beaten = "" if rival.gain and _told(rival.gain) > 0 else f"; {rival.name} itself cannot be told from guessing"
    return f"{sentence}, and of {written(lead)} over {rival.name}{apart}{beaten}."


def _told(estimate: Estimate) -> int:
    """The sign of a difference whose interval over methods excludes 0, else 0."""
    return int(np.sign(estimate.mean)) if estimate.half is not None and abs(estimate.mean) > estimate.half else 0


def _mean_error(one: Tested) -> float:
    return one.error.mean if one.error else np.inf


def _listed(some: Sequence[Tested], describe: Callable[[Tested], str]) -> str:
    return in_words([f"{one.name} ({describe(one)})" for one in some])


def _across(one: Tested) -> str:
    return f"R² {number(one.r2)}"


def _within(one: Tested) -> str:
    median = number(float(np.median(list(one.within.values())))) if one.within else NEVER
    return f"R² {number(one.r2)} across, {median} within".replace("-", "−")


# Tables


def _law_table(tested: Sequence[Tested]) -> Table:
    rows = [
        [
            one.name,
            fit_cells(one.summary.quadratic)[0],
            fit_cells(one.summary.saturating)[0],
            number(one.summary.spearman),
            _by_seed(one.r2s),
            _spread(one.within),
            {"across": "across methods", "within": "within a method", "neither": "no"}[one.verdict],
        ]
        for one in tested
    ]
    headers = ["measure", "quadratic R² [95 %]", "monotone R² [95 %]", "Spearman", "monotone R², by seed"]
    headers += ["R² within a method", "law holds"]
    return Table("Across methods and within one", headers, rows)


def _by_seed(r2s: Sequence[float]) -> str:
    return written(Estimate.over(list(r2s)), number).replace("-", "−") if r2s else NEVER


def _spread(within: dict[str, float]) -> str:
    """The median over methods and their range."""
    if not within:
        return NEVER
    values = list(within.values())
    return "{} ({} to {})".format(*map(number, (float(np.median(values)), min(values), max(values)))).replace("-", "−")


def _forecast_table(tested: Sequence[Tested]) -> Table:
    forward = next(one for one in tested if one.column == FORWARD)
    rows = [
        [
            one.name,
            percent(_mean(one.quadratic_errors)),
            written(one.error),
            signed(one.gain),
            NEVER if one is forward else signed(gap(forward.errors, one.errors)),
        ]
        for one in sorted(tested, key=_mean_error)
    ]
    guess = Estimate.over(list(forward.guesses.values())) if forward.guesses else None
    rows.append(
        [
            "guessing the mean",
            percent(guess.mean if guess else None),
            written(guess),
            NEVER,
            signed(gap(forward.errors, forward.guesses)),
        ]
    )
    headers = ["measure", "quadratic", "monotone", "gain over guessing", "gain over forward KL"]
    return Table("Left-out error, accuracy points", headers, rows)


def _mean(errors: dict[str, float]) -> float | None:
    return float(np.mean(list(errors.values()))) if errors else None


def _residual_table(study: Study, residuals: dict[str, dict[str, Estimate]]) -> Table:
    rows = []
    for method in study.methods:
        own = study.points.filter(pl.col("method") == method)
        found = [residuals[column].get(method) for column in residuals]
        drifts = [nats(float(np.nanmean(floats(own, column)))) for column in residuals]
        rows.append([study.label(method), percent(floats(own, "forgetting").mean()), *drifts, *map(signed, found)])
    names = ["forward KL", "KL on the probe"]
    headers = ["method", "mean forgetting, %", *(f"mean {name}" for name in names)]
    headers += [f"residual in {name}, points" for name in names]
    return Table("What each method forgets beyond the law of the others", headers, rows)


# The figure


def _figure(study: Study, tested: Sequence[Tested], residuals: dict[str, dict[str, Estimate]]) -> Figure:
    of = {one.column: one.summary for one in tested}
    return Figure(
        "kl-laws",
        [
            _law_panel(study, of[FORWARD], "On the new task", f"forward KL, {study.kl_unit}"),
            _law_panel(study, of[PROBE], "On a generic probe", f"KL on the probe, {study.kl_unit}"),
            _error_panel(tested),
            _residual_panel(study, residuals),
        ],
        columns=2,
    )


def _law_panel(study: Study, summary: PredictorSummary, title: str, x_label: str) -> Panel:
    """Forgetting against one KL, coloured by method, with both laws; the title has their R2."""
    layers: list[Layer] = []
    for index, method in enumerate(study.methods):
        own = study.points.filter(pl.col("method") == method)
        style = PALETTE[index % len(PALETTE)], SYMBOLS[index % len(SYMBOLS)]
        layers.append(cloud(study.label(method), own, summary.predictor, "forgetting", *style))
    across = padded(np.append(floats(study.points, summary.predictor), 0.0))
    x = np.linspace(0.0, max(across[1], 0.0), 200)
    explained = []
    for name, fit in (("quadratic", summary.quadratic), ("monotone", summary.saturating)):
        if fit:
            layers.append(Curve(f"{name} law", x, fit.law.predict(x), INK, dashed=name == "monotone"))
            explained.append(number(fit.r2))
    shown = height([layer for layer in layers if isinstance(layer, Points)])
    if summary.predictor in study.bases.columns:
        layers.append(base(study, summary.predictor, "forgetting"))
    return Panel(
        f"{title}: R² {' / '.join(explained)}" if explained else title,
        x_label,
        "forgetting",
        layers,
        across,
        shown,
        x_percent=False,
    )


def _error_panel(tested: Sequence[Tested]) -> Panel:
    """A dot per measure with its interval over methods; the dashed line is guessing."""
    ranked = [(one, error) for one in sorted(tested, key=_mean_error, reverse=True) if (error := one.error)]
    rows = (-0.6, len(ranked) - 0.4)
    x = 100 * np.array([error.mean for _, error in ranked])
    half = 100 * np.array([error.half for _, error in ranked], float)
    layers: list[Layer] = [
        Points(
            "left-out error, mean over methods",
            x,
            np.arange(len(ranked), dtype=float),
            PALETTE[0],
            "diamond",
            error_low=x - half,
            error_high=x + half,
            error_along="x",
            size=7.5,
        )
    ]
    if ranked:
        guess = 100 * float(np.mean(list(ranked[0][0].guesses.values())))
        layers.append(Curve("guessing the mean", np.array([guess, guess]), np.array(rows), INK, dashed=True))
    ticks: Ticks = [(float(place), one.name) for place, (one, _) in enumerate(ranked)]
    return Panel(
        "Asked about a method not in the fit",
        "left-out error of the monotone law, accuracy points",
        "",
        layers,
        y_range=rows,
        x_percent=False,
        y_percent=False,
        y_ticks=ticks or None,
    )


def _residual_panel(study: Study, residuals: dict[str, dict[str, Estimate]]) -> Panel:
    """Which methods lie above the law of the others, and which below: two dots per method."""
    layers: list[Layer] = []
    styles = ((PALETTE[1], "circle", "forward KL"), (PALETTE[2], "square", "KL on the probe"))
    for shift, found, (color, symbol, name) in zip((-0.12, 0.12), residuals.values(), styles, strict=True):
        at = [index for index, method in enumerate(study.methods) if method in found]
        own = [found[study.methods[index]] for index in at]
        y = 100 * np.array([one.mean for one in own])
        half = 100 * np.array([one.half for one in own], float)
        places = np.array(at, float) + shift
        label = f"residual in {name}"
        layers.append(Points(label, places, y, color, symbol, size=6.5, error_low=y - half, error_high=y + half))
    edges = (-0.6, len(study.methods) - 0.4)
    shown = height(layers)
    layers.append(level("the others’ law", 0.0, edges, "#777777"))
    return Panel(
        "More or less than the others’ law",
        "",
        "forgetting beyond the law, points",
        layers,
        edges,
        (min(shown[0], -0.1), max(shown[1], 0.1)),
        x_percent=False,
        y_percent=False,
        x_ticks=[(float(index), study.label(method)) for index, method in enumerate(study.methods)],
    )


def _measured(points: pl.DataFrame, column: str) -> pl.DataFrame:
    return points.filter(pl.col(column).cast(pl.Float64).is_finite(), pl.col("forgetting").is_finite())


def _columns(points: pl.DataFrame, column: str) -> tuple[frontier.Floats, frontier.Floats, list[str]]:
    rows = _measured(points, column)
    return floats(rows, column), floats(rows, "forgetting"), rows["method"].to_list()
