"""The curve over learning rates beside a comparison at matched new-task score: two panels, two tables, and cautions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl

from rlrazor.analysis.forecast import FORWARD
from rlrazor.analysis.matched import RATE, budgets, by_rate, matched, rows_of
from rlrazor.analysis.statistics import Estimate, mean_of
from rlrazor.report.drawing import WHITE, Axis, Hover, Layer, Marker, Panel, Points, as_html
from rlrazor.report.keyed import Column, Keyed, table_of
from rlrazor.report.layers import height, level, means, padded
from rlrazor.report.text import NEVER, nats, of_all, written

ONE_SEED = "With one seed each learning rate is chosen on the score shown, which flatters, most who was tried at most."
NOT_TUNED = "Each has one learning rate, so that none is tuned."


Group = tuple[Any, ...]
"""By its values in the columns that make groups."""


@dataclass(frozen=True)
class Line:
    """A group: what it is called, and its colour and symbol."""

    values: Group
    label: str
    style: tuple[str, str]


@dataclass(frozen=True, eq=False)
class Rates:
    """The groups `lines`, key -> line, at each of their learning rates, compared at the new-task score `at`.

    `points` are all checkpoints, grouped by the columns `by`.
    """

    points: pl.DataFrame
    by: Sequence[str]
    at: float
    lines: Mapping[str, Line]

    @cached_property
    def curve(self) -> pl.DataFrame:
        """A row per group, learning rate and seed: see `rlrazor.analysis.matched.by_rate`."""
        return by_rate(self.points, self.by, self.at).filter(pl.col(RATE) > 0)  # the axis is logarithmic

    @cached_property
    def reported(self) -> pl.DataFrame:
        """The checkpoints compared, one of each group and seed."""
        return matched(self.points, self.by, self.at)

    @cached_property
    def budgets(self) -> dict[Group, tuple[int, int, int]]:
        """Of each group its learning rates, and its runs in a seed, the fewest and the most."""
        found = budgets(self.points, self.by).select(*self.by, "rates", "fewest", "most").rows()
        return {row[:-3]: row[-3:] for row in found}

    def mean(self, group: Group, column: str) -> Estimate | None:
        """Of a group's checkpoints compared, one per seed."""
        return mean_of(rows_of(self.reported, self.by, group), column)

    @property
    def columns(self) -> list[Column[Group]]:
        """Of a table of groups: where runs were stopped, the learning rates that were chosen, and of how many runs."""
        return [
            Column[Group]("stopped", "new there, %", lambda group: self.mean(group, "new")),
            Column("lr", "learning rates chosen", self._chosen),
            Column("lrs", "of", lambda group: str(self._budget(group)[0])),
            Column("budget", "runs a seed", lambda group: _span(*self._budget(group)[1:])),
        ]

    @property
    def rates(self) -> list[float]:
        """All learning rates, ascending."""
        return sorted(self.curve[RATE].drop_nulls().unique())

    @property
    def several(self) -> bool:
        """Whether there is a curve to show: some group has been tried at several learning rates."""
        return any(self._of(line)[RATE].n_unique() > 1 for line in self.lines.values())

    @property
    def panels(self) -> list[Panel]:
        """What is forgotten at the new-task score, and how far each learning rate gets."""
        return [self._forgotten(), self._reached()]

    @property
    def tables(self) -> list[Keyed]:
        """The same in numbers: `KEY.drop-RATE` and `KEY.new-RATE`."""
        titles = {
            "drop": f"Forgotten at new ≥ {self.at:.0%}, points, by learning rate",
            "new": "Highest new score, %, by learning rate",
        }
        return [self._table(name, title) for name, title in titles.items()]

    @property
    def cautions(self) -> str:
        """What is unfair about the comparison, a sentence each; empty where nothing is."""
        names = {line.values: line.label for line in self.lines.values()}
        said = [ONE_SEED] if self.points["seed"].n_unique() == 1 else []
        alike: dict[str, list[str]] = {}
        for group, (_, fewest, most) in self.budgets.items():
            alike.setdefault(_span(fewest, most), []).append(names[group])
        if len(alike) > 1:
            listed = "; ".join(f"{count}: {', '.join(own)}" for count, own in alike.items())
            said.append(f"The budgets differ, by runs in a seed. {listed}.")
        elif all(rates == 1 for rates, *_ in self.budgets.values()):
            said.append(NOT_TUNED)
        return " ".join(said)

    def _budget(self, group: Group) -> tuple[int, int, int]:
        return self.budgets.get(group, (0, 0, 0))

    def _chosen(self, group: Group) -> str:
        rates = rows_of(self.reported, self.by, group)[RATE].drop_nulls().unique().sort()
        return ", ".join(f"{rate:.1e}" for rate in rates) or NEVER

    def _of(self, line: Line, rate: float | None = None) -> pl.DataFrame:
        own = rows_of(self.curve, self.by, line.values)
        return own if rate is None else own.filter(pl.col(RATE) == rate)

    def _means(self, line: Line, column: str) -> dict[float, Estimate | None]:
        """By learning rate that the group was run at."""
        return {
            rate: mean_of(self._of(line, rate), column) for rate in sorted(self._of(line)[RATE].drop_nulls().unique())
        }

    def _places(self, line: Line, rates: Sequence[float]) -> list[float]:
        """Where on the axis: each group beside the others, so that none hides another."""
        order = list(self.lines.values()).index(line) - (len(self.lines) - 1) / 2
        return [rate * float(np.exp(self._apart * order / len(self.lines))) for rate in rates]

    @property
    def _apart(self) -> float:
        """How far the places of a learning rate reach, on a logarithmic axis."""
        return 0.3 * float(min(np.diff(np.log(self.rates)), default=1.0))

    def _axis(self) -> Axis:
        beside = self._apart / 2 / np.log(10)
        low, high = padded(np.log10(np.array([self.rates[0], self.rates[-1]])) + np.array([-beside, beside]))
        return Axis("learning rate", (10**low, 10**high), percent=False, log=True)

    def _forgotten(self) -> Panel:
        layers: list[Layer] = []
        absent: list[tuple[Line, list[float]]] = []
        for line in self.lines.values():
            found = self._means(line, "forgetting")
            reached = [rate for rate, one in found.items() if one]
            layers.append(
                means(line.label, [found[rate] for rate in reached], self._places(line, reached), line.style, line=True)
            )
            some = {rate: one.mean for rate, one in found.items() if one and one.seeds < len(self._of(line, rate))}
            hollow = Marker(WHITE, line.style[1], size=5.0, outlined=True)
            at = np.asarray(self._places(line, [*some]), np.float64), np.asarray([*some.values()], np.float64)
            layers.append(Points("in some of the seeds only", *at, hollow))
            absent.append((line, [rate for rate in found if rate not in reached]))
        low, high = height(layers)
        low, high = min(low, -0.02), max(high, 0.02)
        for line, rates in absent:
            hover = Hover(f"<b>{as_html(line.label)}</b><br>never reaches {self.at:.0%} new<extra></extra>")
            x = np.asarray(self._places(line, rates), np.float64)
            y = np.full(len(rates), low + 0.03 * (high - low), np.float64)
            layers.append(Points("", x, y, Marker(line.style[0], "triangle-down", size=6.0), hover))
        title = f"Forgotten at new ≥ {self.at:.0%} (triangle at the edge: never there)"
        return Panel(title, self._axis(), Axis("forgetting", (low, high)), layers)

    def _reached(self) -> Panel:
        layers: list[Layer] = []
        for line in self.lines.values():
            found = self._means(line, "new")
            layers.append(means(line.label, [*found.values()], self._places(line, [*found]), line.style, line=True))
        axis = self._axis()
        layers.append(level(f"new = {self.at:.0%}", self.at, axis.ends))
        return Panel("How far each learning rate gets", axis, Axis("highest new accuracy", height(layers)), layers)

    def _table(self, name: str, title: str) -> Keyed:
        column = "forgetting" if name == "drop" else "new"
        seeds = self.points["seed"].n_unique()

        def at(rate: float) -> Column[Line]:
            return Column(f"{name}-{rate:g}", f"{rate:.1e}", lambda line: mean_of(self._of(line, rate), column))

        rows = {key: (line.label, line) for key, line in self.lines.items()}
        return table_of(title, "learning rate", rows, list(map(at, self.rates)), seeds)


def kept_columns(
    mean: Callable[[Group, str], Estimate | None], kl_unit: str, seeds: int, count: str = "n"
) -> list[Column[Group]]:
    """Of a table of groups: what each keeps of the prior score where they are compared, at what KL, in how many seeds.

    `mean`: of a group and a column of its checkpoints compared. `count`: what the number of seeds is called.
    """
    return [
        Column[Group]("prior", "prior kept, %", lambda group: mean(group, "prior")),
        Column("drop", "drop, points", lambda group: mean(group, "forgetting")),
        Column("kl", f"forward KL, {kl_unit}", lambda group: written(mean(group, FORWARD), nats)),
        Column(count, "seeds", lambda group: of_all(mean(group, "prior"), seeds)),
    ]


def _span(fewest: int, most: int) -> str:
    return f"{most}" if fewest == most else f"{fewest} to {most}"
