"""What was learnt and what was kept by how much it took: steps of the environment, and updates."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil, floor, log10
from pathlib import Path

import polars as pl

from rlrazor.analysis.statistics import Estimate, floats, mean_of, over
from rlrazor.report.drawing import Axis, Figure, Layer, Marker, Panel, Points, style_of
from rlrazor.report.keyed import Column, Keyed, table_of
from rlrazor.report.layers import padded
from rlrazor.report.prose import Shown, told
from rlrazor.report.sections.successes import Arm, arms_of, threshold_of
from rlrazor.report.study import Section, Study
from rlrazor.report.text import NEVER, percent, with_seeds
from rlrazor.runs.records import BASE

TEXT = Path(__file__).with_suffix(".md")
NAME = "interactions"
COSTS = {"interactions": "steps of the environment", "step": "updates"}


@dataclass(frozen=True, eq=False)
class Run:
    """A method, by all checkpoints of the runs that it is reported by, one of each seed."""

    label: str
    points: pl.DataFrame

    def within(self, cost: str, budget: float) -> pl.DataFrame:
        """The last checkpoint of each seed that took no more."""
        there = self.points.filter(pl.col(cost) <= budget).sort("step", maintain_order=True)
        return there.unique("seed", keep="last", maintain_order=True)


def applies(study: Study) -> bool:
    """Whether it is known how many steps of an environment each checkpoint took."""
    return "interactions" in study.points.columns


def section(study: Study) -> Section:
    """Scores at equal numbers of steps, and of updates."""
    study.points.select("interactions")  # polars says so where it is missing
    at = threshold_of(study)
    runs = runs_of(study, at)
    tables = [cost_table(study, at)]
    tables += [budget_table(study, runs, cost) for cost in COSTS]
    panels = [panel(study, runs, score, cost) for cost in COSTS for score in ("new", "prior")]
    shown = Shown(finding(study, at), Figure(NAME, panels, 2), tables, {"at": f"{at:.0%}"})
    return told(study, TEXT, shown)


def methods_of(study: Study, at: float) -> dict[str, Arm]:
    """What the section on success shows, but for the base."""
    return {method: arm for method, arm in arms_of(study, at).items() if method != BASE}


def runs_of(study: Study, at: float) -> dict[str, Run]:
    """The runs of which that shows a checkpoint, from beginning to end."""
    shown = {method: [row["run_id"] for row in arm.rows] for method, arm in methods_of(study, at).items()}
    return {
        method: Run(study.label(method), study.points.filter(pl.col("run_id").is_in(own)))
        for method, own in shown.items()
    }


def price(arm: Arm, column: str) -> Estimate | None:
    """What it took to get to the new score; None where no seed gets there."""
    return over(float(row[column]) for row in arm.rows) if arm.reached else None


def finding(study: Study, at: float) -> str:
    """What it takes to get there."""
    prices = {arm.label: price(arm, "interactions") for arm in methods_of(study, at).values()}
    listed = [f"{label} {found.mean:,.0f}" for label, found in prices.items() if found]
    if not listed:
        return f"No method gets to {at:.0%} on the new task, so there is no price to compare."
    return f"Steps of the environment to a new score of {at:.0%}, demonstrations included: {', '.join(listed)}."


def cost_table(study: Study, at: float) -> Keyed:
    """`METHOD.steps`, `METHOD.updates`: what it took to get to that new score, in the seeds that do."""

    def mean(column: str) -> Callable[[Arm], str]:
        def of(arm: Arm) -> str:
            found = price(arm, column)
            return with_seeds(f"{found.mean:,.0f}", found, len(study.seeds)) if found else NEVER

        return of

    columns = [
        Column[Arm]("steps", "steps of the environment", mean("interactions")),
        Column("updates", "updates", mean("step")),
    ]
    rows = {method: (arm.label, arm) for method, arm in methods_of(study, at).items()}
    return table_of(f"To a new score of {at:.0%}", "method", rows, columns)


def budget_table(study: Study, runs: Mapping[str, Run], cost: str) -> Keyed:
    """`METHOD.COST-N`: new / prior score of the last checkpoint that took at most N, mean over seeds."""

    def scores(budget: int) -> Callable[[Run], str]:
        def of(run: Run) -> str:
            rows = run.within(cost, budget)
            new, prior = mean_of(rows, "new"), mean_of(rows, "prior")
            if new is None or prior is None:
                return NEVER
            return with_seeds(f"{percent(new.mean)} / {percent(prior.mean)}", new, len(study.seeds))

        return of

    columns = [Column[Run](f"{cost}-{budget}", f"≤ {budget:,}", scores(budget)) for budget in budgets(study, cost)]
    rows = {method: (run.label, run) for method, run in runs.items()}
    return table_of(f"New / prior score, %, within so many {COSTS[cost]}", "method", rows, columns)


def budgets(study: Study, cost: str) -> list[int]:
    """Round numbers, from the first checkpoint on to beyond the last, six at most: 1, 2 and 5 times powers of ten."""
    values = [value for value in floats(study.points, cost) if value > 0]
    if not values:
        return []
    low, high = min(values), max(values)
    rounded = [digit * 10**power for power in range(floor(log10(low)), ceil(log10(high)) + 1) for digit in (1, 2, 5)]
    first = next(value for value in rounded if value >= low)
    last = next(value for value in rounded if value >= high)
    within = [value for value in rounded if first <= value <= last]
    return within[:: -max(1, ceil(len(within) / 6))][::-1]


def panel(study: Study, runs: Mapping[str, Run], score: str, cost: str) -> Panel:
    """A line per method: the mean over the seeds of its checkpoints."""
    layers: list[Layer] = []
    for index, run in enumerate(runs.values()):
        means = run.points.group_by("step").agg(pl.col(score, *({cost} - {"step"})).mean()).sort("step")
        marker = Marker(*style_of(index), size=6.0, line=True)
        layers.append(Points(run.label, floats(means, cost), floats(means, score), marker))
    names = {"new": "new-task score", "prior": "prior score"}
    y = Axis(names[score], padded(floats(study.points, score)))
    return Panel(f"{names[score]} by {COSTS[cost]}", Axis(COSTS[cost], percent=False, log=True), y, layers)
