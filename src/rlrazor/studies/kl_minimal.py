"""Methods that aim at the KL-minimal correct policy, beside GRPO + KL, from bases that are right often or seldom."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import polars as pl

from rlrazor.analysis.statistics import (
    Estimate,
    difference,
    mean_of,
    seed_means,
    threshold_most_reach,
    with_params,
)
from rlrazor.errors import RazorError
from rlrazor.report.drawing import INK, Axis, Figure, Layer, Marker, Panel, Points, style_of
from rlrazor.report.keyed import Column, Keyed, Value, gap, in_short, table_of
from rlrazor.report.layers import log_height, means, never, share_height
from rlrazor.report.study import Section, Study
from rlrazor.report.text import NEVER, percent, written
from rlrazor.studies.engine import Against, Arms, At, Compared, PlainStudy, judge_all, section_of
from rlrazor.studies.grids import ONE, Grid
from rlrazor.studies.tables import ends_of

NAME = "kl-minimal"
METHODS = ("grpo", "grpo+kl", "kl-dpg", "js-dpg", "tv-dpg", "natural-pg")
REFERENCE = "grpo+kl"
THRESHOLDS = (0.97, 0.96, 0.95, 0.9, 0.8, 0.5)
ESS, WITHIN = "relative_ess", "kl_reverse_within_correct"
DRIFTS = {
    "kl_forward": "forward KL, nats",
    "kl_reverse": "reverse KL",
    "kl_forward_within_correct": "forward, within correct",
    WITHIN: "reverse, within correct",
}

ARMS = Arms(("method",), label=lambda study, arm: study.label(arm[0]))


def grids(quick: bool) -> list[Grid]:
    """Bases by the share of correct labels in pre-training, and group sizes."""
    settings = ((1.0, 64), (0.3, 64), (0.0, 64), (0.0, 8))
    return [
        Grid(METHODS, ONE, {"pretrain_accuracy": share} if share < 1 else {}, {"group_size": group})
        for share, group in (settings[::2] if quick else settings)
    ]


@dataclass(frozen=True, eq=False)
class Setting:
    """A kind of base and a group size, and the methods compared there, at the setting's own new-task score."""

    key: str
    group: int
    compared: Compared

    def base(self, column: str) -> Estimate:
        """A column of the bases."""
        return Estimate.over(self.compared.study.bases[column].to_list())

    @property
    def name(self) -> str:
        """The probability that a sample of the base is correct, averaged over inputs, and the group size."""
        return f"Base {percent(self.base('new_expected').mean)} %, groups of {self.group}"

    @property
    def without(self) -> Estimate:
        """The probability (1 - p)^G that a group of the base's samples holds no correct one, were all inputs alike.

        The true share is higher: inputs differ, and the function is convex in p.
        """
        return Estimate.over([(1 - p) ** self.group for p in self.compared.study.bases["new_expected"]])

    @property
    def at(self) -> str:
        """Where methods are compared."""
        return f"≥ {self.compared.at:.0%}" if self.compared.reached else NEVER

    def ess(self, *, first: bool) -> pl.DataFrame:
        """By method and seed: effective sample size at the first checkpoints of all runs, or at the last."""
        return seed_means(ends_of(self.compared.points, first=first), ARMS.by, [ESS])


class OfMethod(NamedTuple):
    """A method in a setting."""

    setting: Setting
    method: str

    def mean(self, table: pl.DataFrame, column: str) -> Estimate | None:
        """Of the method's rows of `table`, one per seed."""
        return self.setting.compared.mean((self.method,), table, column)

    def kept(self, column: str) -> Estimate | None:
        """Of its checkpoints reported."""
        return self.mean(self.setting.compared.reported, column)

    def ess(self, *, first: bool = False) -> Estimate | None:
        """Its effective sample size."""
        return self.mean(self.setting.ess(first=first), ESS)


def settings_of(study: Study) -> list[Setting]:
    """The settings of the study, the base that is right most often first, large groups before small."""
    points = with_params(study.points, pretrain_accuracy=1.0, group_size=0)
    bases = with_params(study.bases, pretrain_accuracy=1.0)
    settings = []
    for share, group in sorted(points.select("pretrain_accuracy", "group_size").unique().rows(), reverse=True):
        own_base = bases.filter(pl.col("pretrain_accuracy") == share)
        if own_base.is_empty():
            raise RazorError("The study kl-minimal lacks the base of some of its runs: run the same command again.")
        own = points.filter(pl.col("pretrain_accuracy") == share, pl.col("group_size") == group)
        of_setting = replace(study, points=own, bases=own_base)
        compared = Compared.make(of_setting, ARMS, At(THRESHOLDS, threshold_most_reach))
        settings.append(Setting(f"{share:g}-{group}", group, compared))
    return settings


def section(study: Study) -> Section:
    """Prior accuracy, learning, and distance from the KL-minimal policy, by method and base."""
    settings, against = settings_of(study), Against("", {"method": REFERENCE})
    told = [f"{one.name}, new {one.at}: {in_short(judge_all(one.compared, against))}." for one in settings]
    finding = f"Prior score kept against {study.label(REFERENCE)}’s, by setting. {' '.join(told)}"
    return section_of(study, NAME, finding, figure(study, settings), tables_of(study, settings), tuned=True)


def tables_of(study: Study, settings: Sequence[Setting]) -> list[Keyed]:
    """What bases can do, `SETTING.expected`; what methods keep and how far they get, `SETTING.METHOD.prior` ..."""
    minus, in_nats = f"minus {study.label(REFERENCE)}’s, points", partial(written, form=_nats)
    bases = [
        Column[Setting]("expected", "base’s samples correct, %", lambda one: one.base("new_expected")),
        Column("greedy", "base’s new score, greedy, %", lambda one: one.base("new")),
        Column("without", "groups without a correct sample, at least, %", lambda one: one.without),
        Column("base-ess", "base’s effective sample size, %", lambda one: one.base(ESS)),
        Column("at", "compared at new", lambda one: one.at),
    ]
    kept = [
        Column[OfMethod]("prior", "prior kept, %", lambda of: of.kept("prior")),
        Column("drop", "drop, points", lambda of: of.kept("forgetting")),
        gap("gap", minus, _gap),
        *(Column(name, title, partial(OfMethod.kept, column=name), in_nats) for name, title in DRIFTS.items()),
    ]
    learnt = [
        Column[OfMethod]("best.new", "best new, %", lambda of: of.mean(of.setting.compared.highest, "new")),
        gap("best.gap", minus, _lead),
        Column("ess.first", "effective sample size, first, %", lambda of: of.ess(first=True)),
        Column("ess.end", "at the end, %", OfMethod.ess),
        Column("variance", "variance of the weights at the end", _variance),
    ]
    rows = {one.key: (one.name, one) for one in settings}
    methods = {
        f"{one.key}.{arm[0]}": (f"{one.name}: {one.compared.label(arm)}", OfMethod(one, str(arm[0])))
        for one in settings
        for arm in one.compared.arms
    }
    corner, seeds = "setting, method", len(study.seeds)
    return [
        table_of("The settings", "setting", rows, bases, seeds),
        table_of("At equal new accuracy", corner, methods, kept, seeds),
        table_of("What is learnt at all, and the importance weights towards q*", corner, methods, learnt, seeds),
    ]


def _gap(of: OfMethod) -> Value:
    return NEVER if of.method == REFERENCE else of.setting.compared.gap((of.method,), (REFERENCE,))


def _lead(of: OfMethod) -> Value:
    """How much more than GRPO + KL a method learns at best, seed by seed."""
    highest = of.setting.compared.highest
    own, reference = (highest.filter(method=method) for method in (of.method, REFERENCE))
    return NEVER if of.method == REFERENCE else difference(own, reference, "new")


def _variance(of: OfMethod) -> str:
    share = of.ess()
    return f"{1 / share.mean - 1:.3g}" if share and share.mean else NEVER


def _nats(value: float) -> str:
    return f"{round(value, 4):.3g}"  # from 13 nats to less than a thousandth


def figure(study: Study, settings: Sequence[Setting]) -> Figure:
    """A panel for each of four numbers: settings along the axis, methods side by side."""
    kept = [one.compared.reported for one in settings]
    best = [one.compared.highest for one in settings]
    ends = [one.ess(first=False) for one in settings]
    panels = [
        _panel(study, settings, kept, "prior", "Kept at equal new accuracy", "prior accuracy"),
        _panel(study, settings, best, "new", "What is learnt at all", "best new accuracy"),
        _panel(study, settings, kept, WITHIN, "How far from q* among correct outputs", "reverse KL, nats"),
        _panel(study, settings, ends, ESS, "Weights towards q* at the end", "effective sample size"),
    ]
    return Figure(NAME, panels, columns=2)


def _panel(
    study: Study, settings: Sequence[Setting], cells: Sequence[pl.DataFrame], column: str, title: str, y_label: str
) -> Panel:
    """`column` of `cells`, a row per method and seed and a table per setting, and of the bases; their KL is 0."""
    layers: list[Layer] = []
    absent: list[tuple[float, str]] = []
    left = 0.1 * len(study.methods) / 2
    for index, method in enumerate(study.methods):  # beside each other, so that no interval hides another
        run = [place for place, one in enumerate(settings) if (method,) in one.compared.arms]
        found = {place + 0.1 * (1 + index) - left: mean_of(cells[place].filter(method=method), column) for place in run}
        layers.append(means(study.label(method), [*found.values()], [*found], style_of(index)))
        absent += [(place, study.label(method)) for place, one in found.items() if one is None]
    log = column == WITHIN  # from a thousandth of a nat to several
    if not log:
        stars = [(at - left, value) for at, one in enumerate(settings) for value in one.compared.study.bases[column]]
        x, y = np.array(stars, float).T
        layers.append(Points("base", x, y, Marker(INK, "star", size=9.0)))
    low, high = log_height(layers) if log else share_height(layers)
    texts = []
    if column in ("prior", WITHIN):  # at equal accuracy: where that is, and who never gets there
        y = low * 1.3 if log else low + 0.04 * (high - low)
        layers.append(never("never gets there", [name for _, name in absent], [place for place, _ in absent], y))
        low = low / 2 if log else low - 0.1 * (high - low)
        texts = [(place - 0.15, low, one.at) for place, one in enumerate(settings) if one.compared.reached]
    names = [f"{one.base('new_expected').mean:.0%}, {one.group}" for one in settings]
    axis = Axis.of(names, "base’s expected accuracy, group size")
    return Panel(title, axis, Axis(y_label, (low, high), percent=not log, log=log), layers, texts=texts)


STUDY = PlainStudy(section, grids=grids)
