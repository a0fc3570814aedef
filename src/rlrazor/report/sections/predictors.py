"""Which drift measure predicts forgetting? Every measure that the sweep took, ranked; the paper's Table 1 beside it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from rlrazor.analysis import law
from rlrazor.analysis.law import LeftOut, PredictorSummary
from rlrazor.report.drawing import INK, PALETTE, SYMBOLS, WHITE, Curve, Figure, Panel, Points
from rlrazor.report.study import Section, Study
from rlrazor.report.tables import LABELS, MAIN_MEASURES, Table, predictor_label
from rlrazor.report.text import NEVER, how_many, number, percent

NEW, PRIOR, PROBE, WEIGHTS = "new-task inputs", "prior-task inputs", "unrelated inputs", "weights"
GENERIC = "unlabelled generic prompts"
GROUPS = (NEW, PRIOR, PROBE, WEIGHTS, GENERIC)

_OF_INPUTS = {
    "kl_forward": LABELS["kl_forward"],
    "kl_reverse": LABELS["kl_reverse"],
    "total_variation": "total variation",
    "output_l2": "output L2",
    "jensen_shannon": "Jensen-Shannon",
    "hellinger": "Hellinger",
    "wasserstein_1": "1-Wasserstein",
    "activation_l1": "activation L1",
    "activation_l2": "activation L2",
    "cka": "1 − CKA",
    "cknna": "1 − CKNNA",
}
_OF_WEIGHTS = {
    "weight_l1": "weight L1",
    "weight_l2": "weight L2",
    "weight_fisher_l2": "weight Fisher L2",
    "weight_spectral": "weight spectral norm",
    "weight_sparsity": "1 − sparsity of the update",
    "weight_rank": "rank of the update",
}
# Of language models, by column: KL per token is that per completion divided by the completion's length.
_OF_COMPLETIONS = {
    **dict.fromkeys(("kl_correct", "kl_optimal"), NEW),
    **{f"kl_{name}_per_token": NEW for name in ("forward", "reverse", "correct")},
    **dict.fromkeys(("kl_probe", "kl_probe_per_token"), GENERIC),
}
_SIMILARITIES = ("cka", "cknna", "weight_sparsity")  # 1 for a policy that has not moved

# Table 1 of arXiv:2509.04259: R2 of a quadratic, and its ±.
PAPER = {
    "kl_forward": (0.96, 0.01),
    "kl_reverse": (0.93, 0.01),
    "total_variation": (0.80, 0.01),
    "output_l2": (0.56, 0.02),
    "weight_l1": (0.34, 0.02),
    "weight_fisher_l2": (0.58, 0.02),
    "weight_spectral": (0.58, 0.02),
    "activation_l1": (0.52, 0.02),
    "activation_l2": (0.55, 0.02),
}


@dataclass(frozen=True)
class Measure:
    """A drift measure: its column, its name for people, and what it is measured on, one of `GROUPS`."""

    column: str
    label: str
    group: str

    @property
    def full_name(self) -> str:
        """The name and, unless it says so itself or is the weights', the inputs."""
        tells = self.group == WEIGHTS or self.column.startswith(("kl_correct", "kl_optimal", "kl_probe"))
        return self.label if tells else f"{self.label} on {self.group}"


MEASURES = (
    *(
        Measure(f"{column}{suffix}", label, group)
        for suffix, group in (("", NEW), ("_on_prior", PRIOR), ("_on_probe", PROBE))
        for column, label in _OF_INPUTS.items()
    ),
    *(Measure(column, predictor_label(column), group) for column, group in _OF_COMPLETIONS.items()),
    *(Measure(column, label, WEIGHTS) for column, label in _OF_WEIGHTS.items()),
)


@dataclass(frozen=True)
class Ranked:
    """A measure and how well it explains forgetting."""

    measure: Measure
    fits: PredictorSummary

    @property
    def r2(self) -> float | None:
        """R2 of the quadratic over all checkpoints, what the paper's Table 1 ranks by."""
        return self.fits.quadratic.r2 if self.fits.quadratic else None

    @property
    def error(self) -> float | None:
        """Left-out error of the monotone law, fraction of 1."""
        return _mean(self.fits.saturating.left_out if self.fits.saturating else None)


def applies(study: Study) -> bool:
    """Whether the sweep took more measures than the page's laws are about."""
    return any(measure.column in study.table.columns for measure in MEASURES if measure.column not in MAIN_MEASURES)


def section(study: Study) -> Section:
    """All measures of the sweep, ranked by the R2 of their quadratic."""
    ranked = ranking(study.points)
    return Section(
        "predictors",
        "Which drift measure predicts forgetting?",
        "Of all ways to measure how far a policy has moved from its base, does forward KL on the new task’s inputs "
        "explain best what it forgot, and does it carry over to a method that was not in the fit?",
        finding(ranked),
        _figure(ranked),
        [_table(ranked)],
        f"{how_many(len(study.points), 'checkpoint')} of {how_many(len(study.methods), 'method')}, "
        f"{how_many(len(study.seeds), 'seed')}. Ranked by the R² of a quadratic "
        "over all of them, as in the paper. R² per seed, the dots: mean ± standard deviation over one fit per seed. "
        "Diamonds: the paper’s Table 1, five methods on ParityMNIST. Left-out error: mean absolute error, in accuracy "
        "points, on a method that the law was not fitted to, averaged over methods; baseline, the dashed line: the "
        "same for guessing the other methods’ mean forgetting. It is the honest ranking: R² rewards a measure for "
        "telling apart the methods it was fitted to. Prior-task inputs are what a forecast from the new task alone "
        "does not have. CKA, CKNNA and sparsity are similarities, and enter as 1 minus the value, which turns the sign "
        "of Spearman’s correlation and nothing else. Intervals of the three main measures are in the table of the laws "
        "above. “—”: the measure does not vary, or the sweep has too few methods or seeds.",
    )


def ranking(points: pl.DataFrame) -> list[Ranked]:
    """The measures that `points` has, best quadratic first; last those that allow no fit."""
    present = {measure.column: measure for measure in MEASURES if measure.column in points.columns}
    falling = [name for name in present if name.startswith(_SIMILARITIES)]
    drifts = points.with_columns((1 - pl.col(name)).alias(name) for name in falling)
    fits = law.summarise(drifts, list(present), samples=0)
    ranked = [Ranked(present[fit.predictor], fit) for fit in fits]
    return sorted(ranked, key=lambda one: -1.0 if one.r2 is None else one.r2, reverse=True)


def finding(ranked: Sequence[Ranked]) -> str:
    """Which measure carries over best to a method not seen, and where forward KL on new-task inputs stands."""
    by_r2 = [one for one in ranked if one.r2 is not None]
    by_error = sorted((one for one in ranked if one.error is not None), key=lambda one: one.error or 0.0)
    if not by_r2:
        return "The sweep is too small to fit a law to any measure."
    if not by_error:
        best = by_r2[0]
        return (
            f"Of {len(by_r2)} measures, {best.measure.full_name} explains forgetting best "
            f"(R² {number(best.r2)}){_place(by_r2)}; what carries over to a method not seen, too few methods tell."
        )
    best = by_error[0]
    baseline, error = _mean(best.fits.baseline), best.error
    if baseline is not None and error is not None and error >= baseline:
        return (
            f"None of {len(by_error)} measures forecasts a method not seen better than guessing the other methods’ "
            f"mean forgetting, which is wrong by {percent(baseline)} accuracy points; the nearest is "
            f"{best.measure.full_name}, with {percent(error)}{_place(by_error)}."
        )
    return (
        f"Of {len(by_error)} measures, {best.measure.full_name} best forecasts the forgetting of a method not seen: "
        f"the monotone law is wrong by {percent(error)} accuracy points, guessing by {percent(baseline)}"
        f"{_place(by_error)}."
    )


def _place(order: Sequence[Ranked]) -> str:
    """Where forward KL on new-task inputs stands in `order`, in words to append; nothing where it is first."""
    columns = [one.measure.column for one in order]
    if columns[0] == "kl_forward" or "kl_forward" not in columns:
        return ""
    own = order[columns.index("kl_forward")]
    peers = [one.measure.column for one in order if one.measure.group == NEW]
    value = "" if own.error is None else f" with {percent(own.error)} points"
    place, among_peers = _ordinal(columns.index("kl_forward") + 1), _ordinal(peers.index("kl_forward") + 1)
    return (
        f"; forward KL on new-task inputs comes {place}{value} and R² {number(own.r2)}{_over_seeds(own)}, "
        f"{among_peers} of the {len(peers)} measured on new-task inputs"
    )


def _over_seeds(one: Ranked) -> str:
    fit = one.fits.quadratic
    if fit is None or fit.r2_seed_mean is None or fit.r2_seed_sd is None:
        return ""
    return f" ({fit.r2_seed_mean:.2f} ± {fit.r2_seed_sd:.2f} over {one.fits.seeds} seeds)"


def _ordinal(place: int) -> str:
    ending = "th" if place % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(place % 10, "th")
    return f"{place}{ending}"


def _table(ranked: Sequence[Ranked]) -> Table:
    rows = []
    for one in ranked:
        quadratic, monotone = one.fits.quadratic, one.fits.saturating
        of_seeds = quadratic is not None and quadratic.r2_seed_mean is not None
        rows.append(
            [
                one.measure.label,
                one.measure.group,
                number(one.r2),
                f"{quadratic.r2_seed_mean:.3f} ± {quadratic.r2_seed_sd:.3f}" if quadratic and of_seeds else NEVER,
                number(monotone.r2 if monotone else None),
                number(one.fits.spearman),
                f"{percent(_mean(quadratic.left_out if quadratic else None))} / {percent(one.error)}",
                percent(_mean(one.fits.baseline)),
                "{:.2f} ± {:.2f}".format(*PAPER[one.measure.column]) if one.measure.column in PAPER else NEVER,
            ]
        )
    headers = ["measure", "measured on", "quadratic R²", "R² per seed", "monotone R²", "Spearman"]
    headers += ["left-out error, quadratic / monotone", "baseline", "paper’s R²"]
    return Table("All drift measures", headers, rows)


def _figure(ranked: Sequence[Ranked]) -> Figure:
    shown = [one for one in ranked if one.r2 is not None]
    height_of = {one.measure.column: float(len(shown) - index) for index, one in enumerate(shown)}
    names = [(height_of[one.measure.column], one.measure.full_name) for one in shown]
    unnamed = [(height, "") for height, _ in names]
    rows = (0.3, len(shown) + 0.7)
    by_group = {group: [one for one in shown if one.measure.group == group] for group in GROUPS}
    of_paper = [one.measure.column for one in shown if one.measure.column in PAPER]
    errors = [one.error for one in shown if one.error is not None]
    baselines = [mean for one in shown if (mean := _mean(one.fits.baseline)) is not None]
    panels = [
        Panel(
            "Explained: R² of the quadratic",
            "R², mean ± standard deviation over seeds",
            "",
            [
                Points(
                    "the paper’s Table 1",
                    np.array([PAPER[column][0] for column in of_paper]),
                    np.array([height_of[column] for column in of_paper]),
                    WHITE,
                    "diamond",
                    outlined=True,
                    size=9,
                ),
                *(_r2_points(group, members, height_of) for group, members in by_group.items()),
            ],
            (-0.03, 1.03),
            rows,
            x_percent=False,
            y_percent=False,
            y_ticks=names,
        )
    ]
    if errors:
        end = 1.08 * max(errors + baselines)
        guess = Curve("guessing the mean", 100 * np.repeat(baselines[:1], 2), np.array(rows), INK, dashed=True)
        panels.append(
            Panel(
                "Forecast: left-out error of the monotone law",
                "error on a method not in the fit, accuracy points",
                "",
                [*(_error_points(group, members, height_of) for group, members in by_group.items()), guess],
                (0.0, 100 * end),
                rows,
                x_percent=False,
                y_percent=False,
                y_ticks=unnamed,
            )
        )
    return Figure("predictors", panels, columns=len(panels), height=200 + 24 * len(shown))


def _r2_points(group: str, members: Sequence[Ranked], height_of: Mapping[str, float]) -> Points:
    """A dot per measure: the mean over seeds with its standard deviation; with one seed, the R2 of all checkpoints."""
    r2, spread = [], []
    for one in members:
        fit = one.fits.quadratic
        of_seeds = None if fit is None else fit.r2_seed_mean
        r2.append(one.r2 if of_seeds is None else of_seeds)
        spread.append(None if fit is None else fit.r2_seed_sd)
    x, half = np.array(r2, float), np.array(spread, float)
    return Points(
        group,
        x,
        np.array([height_of[one.measure.column] for one in members]),
        *_style(group),
        hover="<b>%{customdata[0]}</b><br>R² %{x:.3f} ± %{customdata[1]}<extra></extra>",
        rows=[
            (one.measure.full_name, NEVER if sd is None else f"{sd:.3f}")
            for one, sd in zip(members, spread, strict=True)
        ],
        error_low=x - half,
        error_high=x + half,
        error_along="x",
    )


def _error_points(group: str, members: Sequence[Ranked], height_of: Mapping[str, float]) -> Points:
    return Points(
        group,
        100 * np.array([one.error for one in members], float),
        np.array([height_of[one.measure.column] for one in members]),
        *_style(group),
        hover="<b>%{customdata[0]}</b><br>wrong by %{x:.1f} points<extra></extra>",
        rows=[(one.measure.full_name,) for one in members],
    )


def _style(group: str) -> tuple[str, str]:
    index = GROUPS.index(group)
    return PALETTE[index], SYMBOLS[index]


def _mean(left_out: LeftOut | None) -> float | None:
    return left_out.mean if left_out else None
