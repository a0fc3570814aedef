"""Does KL on the new task predict the forgetting of a prior task that shares nothing with it, counting dots?"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import polars as pl

from rlrazor.analysis import law
from rlrazor.analysis.law import LawSummary, PredictorSummary, Saturating
from rlrazor.analysis.statistics import Estimate, direction, floats
from rlrazor.errors import RazorError
from rlrazor.report.drawing import INK, PALETTE, SYMBOLS, WHITE, Curve, Figure, Layer, Panel, Points, Range
from rlrazor.report.layers import cloud, padded
from rlrazor.report.sections.statistics import over_seeds
from rlrazor.report.study import Section, Study
from rlrazor.report.tables import Table, fit_cells, ranges_of
from rlrazor.report.text import INTERVALS, NEVER, how_many, in_words, nats, number, percent, signed, written
from rlrazor.studies.engine import PlainStudy
from rlrazor.studies.grids import LRS, Grid

KL = "kl_forward"
RELATED, UNRELATED = "prior_fashion_mnist", "prior_dots"
PRIORS = {RELATED: "FashionMNIST", UNRELATED: "dots"}
MEASURES = {
    KL: "forward KL",
    "kl_reverse": "reverse KL",
    "total_variation": "total variation",
    "activation_l2": "activation L2",
    "kl_forward_on_prior": "KL on FashionMNIST",
    "total_variation_on_prior": "TV on FashionMNIST",
    "weight_l2": "weight L2",
    "weight_fisher_l2": "weight Fisher L2",
}

NEAR = 2.0  # nats: within them methods overlap, so that no law is asked beyond where it was fitted

_NOTABLE = 0.01  # of accuracy: a smaller departure from the law is no break of it
_HARDLY = 0.02  # of accuracy: a task that never loses more has no forgetting to predict
_POOR = 0.5  # R2: most of the variance is left


@dataclass(frozen=True)
class Departure:
    """How much more a group of checkpoints forgot than the law says, a fraction of 1: mean over its seeds."""

    name: str
    excess: Estimate


@dataclass(frozen=True, eq=False)
class PriorTask:
    """One prior task. `points` have its own `forgetting`; `fits` has a summary for each measure that was taken.

    `ranges`: the laws of the checkpoints within so many nats, for each range that holds some but not all; last, with
    None, those of all. `by_seed`: the monotone law of each seed that allows one, and the checkpoints it was fitted to.
    `by_method`, the same `near` the base, and `by_lr`: see `departures`.
    """

    name: str
    base: Estimate
    points: pl.DataFrame
    fits: dict[str, PredictorSummary]
    ranges: Sequence[tuple[float | None, PredictorSummary]]
    by_seed: Mapping[int, tuple[Saturating, pl.DataFrame]]
    by_method: Sequence[Departure]
    near: Sequence[Departure]
    by_lr: Sequence[Departure]

    @property
    def law(self) -> PredictorSummary:
        """The laws in forward KL on new-task inputs."""
        return self.fits[KL]

    @property
    def mean_forgotten(self) -> Estimate:
        """Forgetting, averaged over checkpoints."""
        return _per_seed(self.points, pl.mean("forgetting"))

    @property
    def most_forgotten(self) -> Estimate:
        """The most that any checkpoint of a seed forgot."""
        return _per_seed(self.points, pl.max("forgetting"))

    def half_lost(self) -> list[float]:
        """The KL, in nats, at which half is lost of what the monotone law of a seed loses over the range of its data.

        Ascending, one for each seed that allows a law.
        """
        return sorted(_half(fitted, float(floats(rows, KL).max())) for fitted, rows in self.by_seed.values())

    def r2_by_seed(self) -> dict[int, float]:
        """R2 of a monotone law in forward KL for each seed that allows one."""
        found = {}
        for seed, (fitted, rows) in self.by_seed.items():
            with suppress(RazorError):  # forgetting that does not vary has no R2
                found[seed] = law.r_squared(floats(rows, "forgetting"), fitted.predict(floats(rows, KL)))
        return found


def _half(fitted: Saturating, end: float) -> float:
    """Where the law has half of its value at `end`: the inverse of a (1 - exp(-b x^c))."""
    share = float(fitted.predict(end)) / 2 / fitted.a
    return float((-np.log1p(-share) / fitted.b) ** (1 / fitted.c))


def section(study: Study) -> Section:
    """The law for each prior task, and where it breaks."""
    tasks = tasks_of(study)
    return Section(
        "unrelated-prior",
        "Does the law hold for a prior task that shares nothing with the new one?",
        "The law predicts what is forgotten of FashionMNIST from the KL on the new task alone. The two are images of "
        "one kind. Counting dots in synthetic images shares nothing with the new task: does its KL still tell how much "
        "of that is forgotten, and where does the law break?",
        finding(study, tasks),
        _figure(study, tasks),
        _tables(study, tasks),
        f"{how_many(len(study.points), 'checkpoint')} of {how_many(len(study.methods), 'method')}, "
        f"{how_many(len(study.seeds), 'seed')}. The bases were pre-trained on three tasks at once. Forgetting: the "
        "base’s accuracy on that task minus the checkpoint’s, seed by seed. Monotone law, dashed: "
        "a (1 − exp(−b KL^c)); the quadratic is solid. R² in brackets: 95 % bootstrap interval over runs; per seed: "
        "mean ± standard deviation over one fit per seed. Half lost: of what a seed’s law loses over its data; lowest "
        "and highest seed. Left-out error: mean absolute error, in accuracy points, on a method that the law was not "
        "fitted to, averaged over methods. On FashionMNIST: forward KL (KL) and total variation (TV) on the prior "
        "task’s inputs. Beyond the law: forgetting minus what the monotone law of the same seed says, for a method "
        "that of the other methods, for a learning rate that of all, less what all checkpoints are off it on average. "
        f"{INTERVALS}",
    )


def tasks_of(study: Study) -> list[PriorTask]:
    """The prior tasks that the study measured, FashionMNIST first."""
    tasks = []
    for column, name in PRIORS.items():
        if not {column, KL} <= set(study.points.columns) or column not in study.bases.columns:
            continue
        bases = study.bases.drop_nulls(column).group_by("seed").agg(before=pl.mean(column)).sort("seed")
        points = study.points.join(bases, on="seed", maintain_order="left")
        points = points.with_columns(forgetting=pl.col("before") - pl.col(column))
        points = points.filter(pl.col(KL).is_finite(), pl.col("forgetting").is_finite())
        if points.is_empty():
            continue
        others = [measure for measure in MEASURES if measure != KL]
        fits = [*law.summarise(points, [KL]), *law.summarise(points, others, samples=0)]
        tasks.append(
            PriorTask(
                name,
                Estimate.over(bases["before"].to_list()),
                points,
                {fit.predictor: fit for fit in fits},
                [*((near.limit, near.laws[0]) for near in ranges_of(points, [KL])), (None, fits[0])],
                _laws_by_seed(points),
                departures(points, "method", unseen=True),
                departures(points.filter(pl.col(KL) <= NEAR), "method", unseen=True),
                departures(points, "lr", unseen=False),
            )
        )
    return tasks


def _laws_by_seed(points: pl.DataFrame) -> dict[int, tuple[Saturating, pl.DataFrame]]:
    found = {}
    for rows in points.partition_by("seed", maintain_order=True):
        with suppress(RazorError):
            found[rows["seed"][0]] = law.fit_saturating(floats(rows, KL), floats(rows, "forgetting")), rows
    return found


def departures(points: pl.DataFrame, by: str, *, unseen: bool) -> list[Departure]:
    """By value of the column `by`, how far its checkpoints are from the monotone law of their own seed, over seeds.

    `unseen`: from the law of the others. Else from that of all, and beyond what all checkpoints are off it on average:
    the fit is robust, and a method that departs from it leaves that average above or below 0. Without the seeds, and
    the values, that allow no fit.
    """
    found: dict[str, list[float]] = {}
    for rows in points.sort("seed", maintain_order=True).partition_by("seed", maintain_order=True):
        for value in rows[by].drop_nulls().unique(maintain_order=True):
            is_own = rows[by] == value
            basis = rows.filter(~is_own) if unseen else rows
            try:
                fitted = law.fit_saturating(floats(basis, KL), floats(basis, "forgetting"))
            except RazorError:
                continue
            excess = floats(rows, "forgetting") - fitted.predict(floats(rows, KL))
            all_of_them = 0.0 if unseen else excess.mean()
            name = f"{value:.1e}" if isinstance(value, float) else str(value)
            found.setdefault(name, []).append(float(excess[is_own.to_numpy()].mean() - all_of_them))
    return [Departure(name, Estimate.over(excess)) for name, excess in found.items()]


def finding(study: Study, tasks: Sequence[PriorTask]) -> str:
    """Whether the KL predicts the unrelated task's forgetting, beside the related one's, and where it does not."""
    by_name = {task.name: task for task in tasks}
    dots, fashion = by_name.get(PRIORS[UNRELATED]), by_name.get(PRIORS[RELATED])
    if dots is None:
        return "The study has no prior task that is unrelated to the new one, so the law is not put to that test."
    most = dots.most_forgotten
    if most.mean < _HARDLY:
        return (
            f"{dots.name.capitalize()} are hardly forgotten at all, by {written(most)} points at most, so there is "
            f"nothing for a law to predict ({over_seeds(len(study.seeds))})."
        )
    fit = dots.law.saturating
    if fit is None:
        return f"The study is too small to fit a law to the forgetting of {dots.name}."
    return (
        f"Forward KL on the new task {_prediction(dots)}{_compared(study, dots, fashion)}; "
        f"{_scales(dots, fashion)}{_breaks(study, dots)}{_better(dots)} ({over_seeds(len(study.seeds))})."
    )


def _prediction(task: PriorTask) -> str:
    """Whether the monotone law carries over to a method that it has not seen."""
    error, guess = _error(task.law.saturating), task.law.baseline.mean if task.law.baseline else None
    r2 = f"R² {number(task.law.saturating.r2 if task.law.saturating else None)}"
    if error is None or guess is None:
        return f"explains the forgetting of {task.name} with a monotone law of {r2} (too few methods to forecast one)"
    words = (
        "still predicts" if error <= guess / 2 else "predicts only poorly" if error < guess else "no longer predicts"
    )
    return (
        f"{words} the forgetting of {task.name} by a method not in the fit: the monotone law ({r2}) is wrong by "
        f"{percent(error)} accuracy points, guessing by {percent(guess)}"
    )


def _compared(study: Study, dots: PriorTask, fashion: PriorTask | None) -> str:
    """The same of the related task, and whether the fits differ by more than chance."""
    if fashion is None or fashion.law.saturating is None:
        return ""
    mine, other = dots.r2_by_seed(), fashion.r2_by_seed()
    both = sorted(set(mine) & set(other))
    gap = Estimate.over([mine[seed] - other[seed] for seed in both]) if both else None
    words = {1: "a better fit than", 0: "a fit not to be told apart from", -1: "a worse fit than"}
    name = f"that of {fashion.name} (R² {number(fashion.law.saturating.r2)}"
    error = _error(fashion.law.saturating)
    tail = f", wrong by {percent(error)})" if error is not None else ")"
    return f", {words[direction(gap, len(study.seeds))]} {name}{tail}"


def _scales(dots: PriorTask, fashion: PriorTask | None) -> str:
    """At what KL half of each is lost: the two laws differ in scale however well each fits."""
    if fashion is None or not (dots.half_lost() and fashion.half_lost()):
        return ""
    return (
        f"half of what is lost of {dots.name} is lost by {_span(dots.half_lost())} nats, of {fashion.name} by "
        f"{_span(fashion.half_lost())}; "
    )


def _span(values: Sequence[float]) -> str:
    """The lowest and the highest: over seeds, of what spans decades."""
    if not values:
        return NEVER
    ends = list(dict.fromkeys((nats(values[0]), nats(values[-1]))))
    return " to ".join(ends)


def _breaks(study: Study, task: PriorTask) -> str:
    """Where forgetting departs from the law: the method and the learning rate that do most, and the range of KL."""
    clauses = []
    method = _worst(study, task.near)
    where, method = (f"within {NEAR:g} nats ", method) if method else ("", _worst(study, task.by_method))
    if method:
        clauses.append(f"{where}{study.label(method.name)} forgets {_beyond(method)} than the others’ law says")
    rate = _worst(study, task.by_lr)
    if rate:
        clauses.append(f"runs at a learning rate of {rate.name} forget {_beyond(rate)} than the law of all says")
    total = task.law.saturating
    poor = [limit for limit, fits in task.ranges if limit and fits.saturating and fits.saturating.r2 < _POOR]
    if poor and total and total.r2 >= _POOR:
        clauses.append(f"KL stays below {max(poor):g} nat{'s' if max(poor) != 1 else ''} (R² below {_POOR:g})")
    return f"the law breaks where {in_words(clauses)}" if clauses else "no method or learning rate measurably breaks it"


def _worst(study: Study, groups: Sequence[Departure]) -> Departure | None:
    """The greatest departure that is clear and of some size."""
    clear = [one for one in groups if direction(one.excess, len(study.seeds)) and abs(one.excess.mean) >= _NOTABLE]
    return max(clear, key=lambda one: abs(one.excess.mean), default=None)


def _beyond(one: Departure) -> str:
    size = written(replace(one.excess, mean=abs(one.excess.mean)))
    return f"{size} points {'more' if one.excess.mean > 0 else 'less'}"


def _better(task: PriorTask) -> str:
    """The measure that carries over best to a method not seen, where it is not forward KL."""
    errors = {name: error for name, fit in task.fits.items() if (error := _error(fit.saturating)) is not None}
    if not errors:
        return ""
    best = min(errors, key=lambda name: errors[name])
    if best == KL:
        return f"; of {len(errors)} measures none forecasts better"
    name = MEASURES[best].replace("TV on", "total variation on").replace("KL on", "forward KL on")
    return f"; of {len(errors)} measures {name} forecasts best, wrong by {percent(errors[best])}"


def _per_seed(points: pl.DataFrame, statistic: pl.Expr) -> Estimate:
    per_seed = points.group_by("seed").agg(value=statistic).sort("seed")
    return Estimate.over(per_seed["value"].to_list())


def _error(fit: LawSummary | None) -> float | None:
    return fit.left_out.mean if fit and fit.left_out else None


def _tables(study: Study, tasks: Sequence[PriorTask]) -> list[Table]:
    names = [task.name for task in tasks]
    laws = [_law_column(task) for task in tasks]
    measures = [
        [label, *(text for task in tasks for text in _measure_cells(task.fits[column]))]
        for column, label in MEASURES.items()
        if any(column in task.fits for task in tasks)
    ]
    columns = ("quadratic / monotone R²", "Spearman", "left-out error")
    return [
        Table(
            "Forward KL on the new task, and what is forgotten",
            ["", *names],
            [[name, *(column[name] for column in laws)] for name in (laws[0] if laws else {})],
        ),
        Table("Every measure", ["measure", *(f"{name}: {column}" for name in names for column in columns)], measures),
        Table(
            "Forgetting beyond the law, points",
            ["checkpoints of", *names, *(f"{name}, within {NEAR:g} nats" for name in names)],
            _departure_rows(study, tasks),
        ),
        Table("R² by range of KL, quadratic / monotone", ["forward KL", "points", *names], _range_rows(tasks)),
    ]


def _law_column(task: PriorTask) -> dict[str, str]:
    """What the first table says of a task, by the names of its rows."""
    fit = task.law
    (quadratic, quadratic_seeds), (monotone, monotone_seeds) = (
        fit_cells(one, digits=2) for one in (fit.quadratic, fit.saturating)
    )
    return {
        "base accuracy, %": written(task.base),
        "mean forgetting, points": written(task.mean_forgotten),
        "most forgotten, points": written(task.most_forgotten),
        "quadratic R² [95 %]": quadratic,
        "quadratic R² per seed": quadratic_seeds,
        "monotone R² [95 %]": monotone,
        "monotone R² per seed": monotone_seeds,
        "Spearman’s correlation": number(fit.spearman).replace("-", "−"),
        "half lost by, nats": _span(task.half_lost()),
        "left-out error of the quadratic, points": percent(_error(fit.quadratic)),
        "left-out error of the monotone law": percent(_error(fit.saturating)),
        "left-out error of guessing the mean": percent(fit.baseline.mean if fit.baseline else None),
    }


def _measure_cells(fits: PredictorSummary) -> list[str]:
    return [_both(fits), number(fits.spearman).replace("-", "−"), percent(_error(fits.saturating))]


def _both(fits: PredictorSummary) -> str:
    return " / ".join(number(fit.r2 if fit else None) for fit in (fits.quadratic, fits.saturating))


def _departure_rows(study: Study, tasks: Sequence[PriorTask]) -> list[list[str]]:
    """A row per method, and one per learning rate."""
    columns: list[dict[str, str]] = []
    for task in tasks:
        methods = {study.label(one.name): signed(one.excess) for one in task.by_method}
        columns.append({**methods, **{f"learning rate {one.name}": signed(one.excess) for one in task.by_lr}})
    columns += [{study.label(one.name): signed(one.excess) for one in task.near} for task in tasks]
    names = dict.fromkeys(name for column in columns for name in column)
    return [[name, *(column.get(name, NEVER) for column in columns)] for name in names]


def _range_rows(tasks: Sequence[PriorTask]) -> list[list[str]]:
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for task in tasks:
        for limit, fits in task.ranges:
            name = "all" if limit is None else f"≤ {limit:g} nats"
            rows.setdefault((name, f"{fits.checkpoints:,}"), {})[task.name] = _both(fits)
    return [[*names, *(cells.get(task.name, NEVER) for task in tasks)] for names, cells in rows.items()]


def _figure(study: Study, tasks: Sequence[PriorTask]) -> Figure:
    drifts = np.concatenate([np.zeros(0), *(floats(task.points, KL) for task in tasks)])
    drifts = drifts[drifts > 0]
    kl = (float(drifts.min()) / 1.3, float(drifts.max()) * 1.3) if drifts.size else (0.1, 1.0)
    forgotten = padded(np.concatenate([np.zeros(1), *(floats(task.points, "forgetting") for task in tasks)]))
    panels = [
        Panel(
            f"Forgetting of {task.name}",
            "forward KL on the new task, nats",
            "forgetting (drop in accuracy)",
            [*_clouds(study, task), *_laws(task, kl)],
            kl,
            forgotten,
            x_percent=False,
            x_log=True,
        )
        for task in tasks
    ]
    return Figure("unrelated-prior", [*panels, _measures_panel(tasks)], columns=len(panels) + 1)


def _clouds(study: Study, task: PriorTask) -> list[Layer]:
    layers: list[Layer] = []
    for index, method in enumerate(study.methods):
        points = task.points.filter(pl.col("method") == method, pl.col(KL) > 0)
        color, symbol = PALETTE[index % len(PALETTE)], SYMBOLS[index % len(SYMBOLS)]
        layers.append(cloud(study.label(method), points, KL, "forgetting", color, symbol))
    return layers


def _laws(task: PriorTask, kl: Range) -> list[Layer]:
    x = np.geomspace(*kl, 200)
    fits = (("quadratic law", task.law.quadratic), ("monotone law", task.law.saturating))
    return [Curve(name, x, fit.law.predict(x), INK, dashed=name == "monotone law") for name, fit in fits if fit]


def _measures_panel(tasks: Sequence[PriorTask]) -> Panel:
    """R2 of the monotone law by measure, the prior tasks one above the other."""
    shown = [column for column in MEASURES if any(column in task.fits for task in tasks)]
    layers: list[Layer] = []
    for index, task in enumerate(tasks):
        fits = [task.fits[column].saturating for column in shown]
        mean = np.array([_r2(fit) for fit in fits], float)
        half = np.array([fit.r2_seed_sd if fit else None for fit in fits], float)
        layers.append(
            Points(
                f"R², {task.name}",
                mean,
                np.array([len(shown) - place - 0.2 * index for place in range(len(shown))], float),
                INK if index else WHITE,
                "diamond",
                size=7.0,
                outlined=True,
                error_low=mean - half,
                error_high=mean + half,
                error_along="x",
            )
        )
    lowest = min((float(np.nanmin(layer.x)) for layer in layers if np.isfinite(layer.x).any()), default=0.0)
    return Panel(
        "What explains forgetting?",
        "R² of the monotone law",
        "",
        layers,
        (max(min(lowest, 0.0), -0.5) - 0.05, 1.03),
        (0.3, len(shown) + 0.7),
        x_percent=False,
        y_percent=False,
        y_ticks=[(len(shown) - index - 0.1, MEASURES[column]) for index, column in enumerate(shown)] or None,
    )


def _r2(fit: LawSummary | None) -> float | None:
    """The mean over one fit per seed; with one seed, that of all checkpoints."""
    if fit is None:
        return None
    return fit.r2 if fit.r2_seed_mean is None else fit.r2_seed_mean


DOT_IMAGES = 2_000


def grids(quick: bool) -> list[Grid]:
    """Its runs."""
    lrs = LRS[1:4:2] if quick else LRS[:4]
    return [Grid(("sft-1", "sft-2", "oracle", "grpo", "grpo+kl"), lrs, {"dots": DOT_IMAGES})]


STUDY = PlainStudy(grids, section)
