"""Does KL on the new task predict the forgetting of a prior task that shares nothing with it, counting dots?"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import polars as pl

from rlrazor.analysis import law
from rlrazor.analysis.carry_over import (
    beyond_all,
    beyond_guessing,
    beyond_others,
    departures,
    half_lost,
    per_seed,
    r2,
)
from rlrazor.analysis.law import PredictorSummary, error_of, r2_of
from rlrazor.analysis.statistics import Estimate, Standing, floats, over, verdict
from rlrazor.report.drawing import INK, WHITE, Axis, Figure, Floats, Layer, Marker, Panel
from rlrazor.report.keyed import Column, Judged, Keyed, Value, gap, in_short, table_of
from rlrazor.report.layers import clouds, laws, padded, r2s
from rlrazor.report.study import Section, Study
from rlrazor.report.tables import fit_cells, ranges_of
from rlrazor.report.text import NEVER, nats, number, percent, signed
from rlrazor.studies.engine import KL, PlainStudy, section_of
from rlrazor.studies.grids import LRS, Grid

NAME = "unrelated-prior"
DOT_IMAGES = 2_000
PRIORS = {"fashion": ("FashionMNIST", "prior_fashion_mnist"), "dots": ("dots", "prior_dots")}
MEASURES = {
    KL: "forward KL",
    "kl_reverse": "reverse KL",
    "total_variation": "total variation",
    "activation_l2": "activation L2",
    "kl_forward_on_prior": "forward KL on FashionMNIST",
    "total_variation_on_prior": "total variation on FashionMNIST",
    "weight_l2": "weight L2",
    "weight_fisher_l2": "weight Fisher L2",
}
NEAR = 2.0  # nats: within them methods overlap, so that no law is asked beyond where it was fitted
BEYOND = {Standing.BETTER: "forgets less", Standing.WORSE: "forgets more"}


def grids(quick: bool) -> list[Grid]:
    """Bases that were pre-trained on three tasks at once."""
    lrs = LRS[1:4:2] if quick else LRS[:4]
    return [Grid(("sft-1", "sft-2", "oracle", "grpo", "grpo+kl"), lrs, {"dots": DOT_IMAGES})]


@dataclass(frozen=True, eq=False)
class PriorTask:
    """One prior task: checkpoints with its own `forgetting`, the base's accuracy, and a fit for each measure taken."""

    key: str
    name: str
    base: Estimate
    points: pl.DataFrame
    fits: Mapping[str, PredictorSummary]

    @property
    def law(self) -> PredictorSummary:
        """The laws in forward KL on new-task inputs."""
        return self.fits[KL]

    def forgotten(self, statistic: Callable[[Floats], float]) -> Estimate | None:
        """A statistic of each seed's checkpoints, over seeds."""
        return over(per_seed(self.points, lambda rows: float(statistic(floats(rows, "forgetting")))).values())

    def beyond_guessing(self) -> Estimate | None:
        """The law's error on a method not in the fit, against guessing."""
        return over(per_seed(self.points, beyond_guessing).values())


def tasks_of(study: Study) -> list[PriorTask]:
    """The prior tasks that the study measured, FashionMNIST first."""
    tasks = []
    for key, (name, column) in PRIORS.items():
        if not {column, KL} <= set(study.points.columns) or column not in study.bases.columns:
            continue
        bases = study.bases.drop_nulls(column).group_by("seed").agg(before=pl.mean(column)).sort("seed")
        points = study.points.join(bases, on="seed", maintain_order="left")
        points = law.finite(points.with_columns(forgetting=pl.col("before") - pl.col(column)), (KL, "forgetting"))
        if not points.is_empty():
            others = [measure for measure in MEASURES if measure != KL]
            fits = [*law.summarise(points, [KL]), *law.summarise(points, others, samples=0)]
            base = Estimate.over(bases["before"].to_list())
            tasks.append(PriorTask(key, name, base, points, {fit.predictor: fit for fit in fits}))
    return tasks


def section(study: Study) -> Section:
    """The law for each prior task, and where it breaks."""
    tasks = tasks_of(study)
    seeds = len(study.seeds)
    told = in_short([Judged.of(one.name, one.beyond_guessing(), seeds, lower_is_better=True) for one in tasks])
    finding = f"Error of the monotone law in forward KL on a method not in the fit, against guessing: {told}."
    return section_of(study, NAME, finding, figure(study, tasks), tables_of(study, tasks))


_lower = partial(verdict, lower_is_better=True)


def tables_of(study: Study, tasks: Sequence[PriorTask]) -> list[Keyed]:
    """The laws of the tasks side by side, and then of each the measures, the ranges, and where its law breaks."""

    def column(task: PriorTask) -> Column[Quantity]:
        return Column(task.key, task.name, lambda quantity: quantity(task))

    title = "Forward KL on the new task, and what is forgotten"
    laws = table_of(title, "", QUANTITIES, list(map(column, tasks)), len(study.seeds))
    return [laws, judged_table(study, tasks), *(table for task in tasks for table in task_tables(study, task))]


Quantity = Callable[[PriorTask], Value]
QUANTITIES: Mapping[str, tuple[str, Quantity]] = {
    "base": ("base accuracy, %", lambda task: task.base),
    "mean": ("mean forgetting, points", lambda task: task.forgotten(np.mean)),
    "most": ("most forgotten, points", lambda task: task.forgotten(np.max)),
    "quadratic": ("quadratic R² [95 %]", lambda task: fit_cells(task.law.quadratic, 2)[0]),
    "quadratic-seeds": ("quadratic R² per seed", lambda task: fit_cells(task.law.quadratic, 2)[1]),
    "monotone": ("monotone R² [95 %]", lambda task: fit_cells(task.law.saturating, 2)[0]),
    "monotone-seeds": ("monotone R² per seed", lambda task: fit_cells(task.law.saturating, 2)[1]),
    "rank": ("Spearman’s correlation", lambda task: number(task.law.spearman)),
    "half": ("half lost by, nats", lambda task: _span(per_seed(task.points, half_lost).values())),
    "error-quadratic": ("left-out error of the quadratic, points", lambda task: percent(error_of(task.law.quadratic))),
    "error": ("left-out error of the monotone law", lambda task: percent(error_of(task.law.saturating))),
    "guess": ("left-out error of guessing the mean", lambda task: percent(error_of(task.law.baseline))),
    "best-measure": ("measure with the least left-out error", lambda task: _best(task)[0]),
    "best-error": ("its left-out error", lambda task: _best(task)[1]),
}


def judged_table(study: Study, tasks: Sequence[PriorTask]) -> Keyed:
    """`TASK.forecast.verdict`: the law against guessing. `TASK.fit.verdict`: its fit against that of FashionMNIST."""
    fits = {task.key: per_seed(task.points, r2) for task in tasks}

    def better_fit(task: PriorTask) -> Value:
        own, other = fits[task.key], fits.get("fashion", {})
        return NEVER if task.key == "fashion" else over(own[seed] - other[seed] for seed in own if seed in other)

    columns = [
        gap("forecast.gap", "left-out error minus guessing’s, points", PriorTask.beyond_guessing, _lower),
        Column("fit.gap", "R² minus FashionMNIST’s", better_fit, partial(signed, form=number), verdict),
    ]
    rows = {task.key: (task.name, task) for task in tasks}
    return table_of("The monotone law, seed by seed", "prior task", rows, columns, len(study.seeds))


def task_tables(study: Study, task: PriorTask) -> list[Keyed]:
    """`TASK.MEASURE.error`, ...; `TASK.within-1.monotone`, ...; `TASK.METHOD.gap`, `TASK.lr-1e-04.verdict`, ..."""
    fits = [
        Column[PredictorSummary]("checkpoints", "checkpoints", lambda fit: f"{fit.checkpoints:,}"),
        Column("quadratic", "quadratic R²", lambda fit: number(r2_of(fit.quadratic))),
        Column("monotone", "monotone R²", lambda fit: number(r2_of(fit.saturating))),
        Column("rank", "Spearman", lambda fit: number(fit.spearman)),
        Column("error", "left-out error, points", lambda fit: percent(error_of(fit.saturating))),
    ]
    measures = {f"{task.key}.{name}": (MEASURES[name], fit) for name, fit in task.fits.items()}
    ranges = {
        f"{task.key}.within-{near.limit:g}": (f"≤ {near.limit:g} nats", near.laws[0])
        for near in ranges_of(task.points, [KL])
    }

    def told(one: Estimate | None, seeds: int) -> str:
        judged = _lower(one, seeds)
        return BEYOND.get(judged, judged)

    near = task.points.filter(pl.col(KL) <= NEAR)
    of_all, of_near = (departures(points, "method", beyond_others) for points in (task.points, near))
    methods: dict[str, tuple[str, tuple[Value, Value]]] = {
        f"{task.key}.{name}": (study.label(name), (of_all.get(name), of_near.get(name))) for name in study.methods
    }
    rates = departures(task.points.drop_nulls("lr"), "lr", beyond_all)
    methods |= {f"{task.key}.lr-{lr:.1e}": (f"learning rate {lr:.1e}", (one, NEVER)) for lr, one in rates.items()}
    beyond: list[Column[tuple[Value, Value]]] = [
        gap("gap", "beyond the law, points", lambda row: row[0], told),
        gap("near.gap", f"the same within {NEAR:g} nats", lambda row: row[1], told),
    ]
    seeds = len(study.seeds)
    return [
        table_of(f"Forgetting of {task.name} by every measure", "measure", measures, fits, seeds),
        table_of(f"Forgetting of {task.name} by range of forward KL", "range", ranges, fits, seeds),
        table_of(f"Forgetting of {task.name} beyond the law", "checkpoints of", methods, beyond, seeds),
    ]


def _best(task: PriorTask) -> tuple[str, str]:
    errors = {name: error for name, fit in task.fits.items() if (error := error_of(fit.saturating)) is not None}
    best = min(errors, key=lambda name: errors[name], default=None)
    return (MEASURES[best], percent(errors[best])) if best else (NEVER, NEVER)


def _span(values: Collection[float]) -> str:
    """The lowest and the highest: over seeds, of what spans decades."""
    return " to ".join(dict.fromkeys((nats(min(values)), nats(max(values))))) if values else NEVER


def figure(study: Study, tasks: Sequence[PriorTask]) -> Figure:
    """Forgetting of each task by KL, with its laws; and what the other measures explain."""
    drifts = np.concatenate([np.ones(0), *(floats(task.points, KL) for task in tasks)])
    drifts = drifts[drifts > 0]
    kl = (float(drifts.min()) / 1.3, float(drifts.max()) * 1.3) if drifts.size else (0.1, 1.0)
    forgotten = padded(np.concatenate([np.zeros(1), *(floats(task.points, "forgetting") for task in tasks)]))
    x_axis = Axis(f"forward KL on the new task, {study.kl_unit}", kl, percent=False, log=True)
    y_axis = Axis("forgetting (drop in accuracy)", forgotten)
    panels = []
    for task in tasks:
        moved = replace(study, points=task.points.filter(pl.col(KL) > 0))
        layers = [*clouds(moved, KL, "forgetting"), *laws(task.law, np.geomspace(*kl, 200))]
        panels.append(Panel(f"Forgetting of {task.name}", x_axis, y_axis, layers))
    return Figure(NAME, [*panels, _measures_panel(tasks)], columns=len(panels) + 1)


def _measures_panel(tasks: Sequence[PriorTask]) -> Panel:
    """R2 of the monotone law by measure, mean and deviation over one fit per seed; the tasks one above the other."""
    shown = [name for name in reversed(MEASURES) if any(name in task.fits for task in tasks)]
    layers: list[Layer] = []
    for index, task in enumerate(tasks):
        fits = [task.fits[name].saturating if name in task.fits else None for name in shown]
        marker = Marker(INK if index else WHITE, "diamond", size=7.0, outlined=True)
        places = np.array([place + 0.1 - 0.2 * index for place in range(len(shown))])
        layers.append(r2s(f"R², {task.name}", fits, places, marker))
    lowest = min((float(np.nanmin(layer.x)) for layer in layers if np.isfinite(layer.x).any()), default=0.0)
    r2_axis = Axis("R² of the monotone law", (max(min(lowest, 0.0), -0.5) - 0.05, 1.03), percent=False)
    return Panel("What explains forgetting?", r2_axis, Axis.of([MEASURES[name] for name in shown], margin=0.7), layers)


STUDY = PlainStudy(section, grids=grids)
