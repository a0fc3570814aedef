"""Methods that aim at the KL-minimal correct policy: when do they beat GRPO + KL, and when does exploration fail?"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from rlrazor.analysis.statistics import (
    Estimate,
    at_accuracy,
    best_checkpoints,
    difference,
    direction,
    floats,
    seed_means,
    threshold_most_reach,
    with_params,
)
from rlrazor.report.drawing import INK, PALETTE, SYMBOLS, Figure, Layer, Panel, Points
from rlrazor.report.layers import log_height, never, share_height
from rlrazor.report.sections.statistics import over_seeds
from rlrazor.report.study import Section, Study
from rlrazor.report.tables import Table
from rlrazor.report.text import INTERVALS, NEVER, cell, how_many, in_words, percent, signed, written
from rlrazor.studies.engine import PlainStudy
from rlrazor.studies.grids import ONE, Grid

REFERENCE = "grpo+kl"
NOT_AIMED = ("grpo", REFERENCE)  # at the KL-minimal correct policy
THRESHOLDS = (0.97, 0.96, 0.95, 0.9, 0.8, 0.5)
ESS, WITHIN = "relative_ess", "kl_reverse_within_correct"
DRIFTS = ("kl_forward", "kl_reverse", "kl_forward_within_correct", WITHIN)

FAR = 0.05  # of accuracy

_RARE = 0.01  # less often without a correct sample than this, a group is no matter of exploration


@dataclass(frozen=True, eq=False)
class Setting:
    """A kind of base and a group size. `points` and `bases` are its own rows; `threshold` is where methods compare."""

    group: int
    points: pl.DataFrame
    bases: pl.DataFrame
    threshold: float | None

    @property
    def expected(self) -> Estimate:
        """The probability that a sample of the base is correct, averaged over inputs."""
        return Estimate.over(self.bases["new_expected"].to_list())

    @property
    def without(self) -> Estimate:
        """The probability (1 - p)^G that a group of the base's samples holds no correct one, were all inputs alike.

        The true share is higher: inputs differ, and the function is convex in p.
        """
        return Estimate.over([(1 - p) ** self.group for p in self.bases["new_expected"].to_list()])

    @property
    def name(self) -> str:
        """Base and group size, as tables say it."""
        return f"base {percent(self.expected.mean)} %, groups of {self.group}"

    def kept(self) -> pl.DataFrame:
        """By method: prior accuracy and drift of the best checkpoints at the threshold; null without a threshold."""
        return at_accuracy(self.points, ["method"], self._at, ["prior", *DRIFTS])

    def gain(self, method: str) -> Estimate | None:
        """Prior accuracy that a method keeps beyond GRPO + KL, both at the threshold, seed by seed."""
        best = best_checkpoints(self.points, ["method"], self._at)
        own, reference = (best.filter(pl.col("method") == name) for name in (method, REFERENCE))
        return difference(own, reference, "prior")

    def best(self) -> pl.DataFrame:
        """By method: the highest new accuracy, at any learning rate and time."""
        return seed_means(self._highest(), ["method"], ["new"])

    def lead(self, method: str) -> Estimate | None:
        """How much more than GRPO + KL a method learns at best, seed by seed."""
        own, reference = (self._highest().filter(pl.col("method") == name) for name in (method, REFERENCE))
        return difference(own, reference, "new")

    def behind(self) -> list[str]:
        """The methods that learn far less than the best of them: those that explore too little."""
        best = self.best()
        top = float(floats(best, "new").max())
        return best.filter(pl.col("new") < top - FAR)["method"].to_list()

    def ess(self, *, first: bool) -> pl.DataFrame:
        """By method: effective sample size at the first checkpoints of all runs, or at the last."""
        step = pl.col("step")
        end = (step.min() if first else step.max()).over("trajectory")
        return seed_means(self.points.filter(step == end), ["method"], [ESS])

    def _highest(self) -> pl.DataFrame:
        return self.points.group_by("method", "seed", maintain_order=True).agg(pl.max("new"))

    @property
    def _at(self) -> float:
        return np.inf if self.threshold is None else self.threshold


def section(study: Study) -> Section:
    """Prior accuracy, learning, and distance from the KL-minimal policy, by method and base."""
    settings = settings_of(study)
    return Section(
        "kl-minimal",
        "Do methods that aim at the KL-minimal policy beat GRPO + KL?",
        "The correct policy nearest to the base is q*, the base restricted to its correct outputs. KL-DPG, its "
        "relatives with other divergences, and natural policy gradient aim there; GRPO does not. When does that beat "
        "GRPO + KL, and when, with a base that is seldom right, does exploration fail?",
        finding(study, settings),
        _figure(study, settings),
        _tables(study, settings),
        f"{how_many(len(study.points), 'checkpoint')}, {how_many(len(study.seeds), 'seed')}. Bases differ in the share "
        "of correct labels that they were pre-trained on; a base is called by its expected accuracy, the probability "
        "that a sample is correct. A group holds no correct sample with probability (1 − p)^G, and more often on "
        "inputs where the base is worse than on average. Methods compare at the highest new accuracy of "
        f"{in_words([f'{at:.0%}' for at in THRESHOLDS])} above the base’s own that most runs reach; per seed the "
        "checkpoint with the highest prior accuracy, over learning rates and time, chosen on the scores that are "
        "shown. Within correct: the part of the KL that is between the two policies given a correct output, which is 0 "
        "at q*. Effective sample size: of the policy’s own samples as importance samples of q*, as a share, exact; "
        "the normalised weights have variance 1/ESS − 1. It is the base’s accuracy at first, and 1 at q*; shown is the "
        f"mean over learning rates. Exploration fails a method whose best new accuracy is more than "
        f"{100 * FAR:.0f} points below the best method’s. An interval may reach beyond the axes. {INTERVALS}",
    )


def settings_of(study: Study) -> list[Setting]:
    """The settings of the study, the base that is right most often first, large groups before small."""
    points = with_params(study.points, pretrain_accuracy=1.0, group_size=0)
    bases = with_params(study.bases, pretrain_accuracy=1.0)
    settings = []
    for share, group in sorted(points.select("pretrain_accuracy", "group_size").unique().rows(), reverse=True):
        own = points.filter(pl.col("pretrain_accuracy") == share, pl.col("group_size") == group)
        own_bases = bases.filter(pl.col("pretrain_accuracy") == share)
        if not own_bases.is_empty():
            at = threshold_most_reach(own, own_bases, ["method"], THRESHOLDS)
            settings.append(Setting(group, own, own_bases, at))
    return settings


def finding(study: Study, settings: Sequence[Setting]) -> str:
    """Per setting: who keeps more than GRPO + KL, who less, who never gets there."""
    aimed = [method for method in study.methods if method not in NOT_AIMED]
    if not (aimed and settings and REFERENCE in study.methods):
        lacking = study.label(REFERENCE) if aimed else "methods that aim at the KL-minimal policy"
        return f"The study has no runs of {lacking}, so there is nothing to compare."
    clauses = [f"{_base_in_words(setting)}: {_verdict(study, setting, aimed)}" for setting in settings]
    return (
        f"Compared with {study.label(REFERENCE)}, with a base that is right "
        f"{'; '.join(clauses)}{_explored(settings, aimed)} ({over_seeds(len(study.seeds))})."
    )


def _explored(settings: Sequence[Setting], aimed: Sequence[str]) -> str:
    """That exploration fails none of `aimed`, where that is so."""
    of_aimed = pl.col("method").is_in(list(aimed))
    if any(setting.threshold is None or set(setting.behind()) & set(aimed) for setting in settings):
        return ""
    lowest = min(float(floats(setting.best().filter(of_aimed), "new").min(initial=1.0)) for setting in settings)
    return f"; exploration fails none of them: all learn, to {percent(lowest)} % new or more"


def _base_in_words(setting: Setting) -> str:
    words = f"{percent(setting.expected.mean)} % of the time"
    if setting.without.mean < _RARE:
        return words
    share = percent(setting.without.mean)
    return f"{words} and groups of {setting.group}, of which at least {share} % hold nothing correct"


def _verdict(study: Study, setting: Setting, aimed: Sequence[str]) -> str:
    """Who of `aimed` learns more than GRPO + KL, who keeps more prior accuracy at the threshold, who stays behind."""
    best = {row["method"]: row for row in setting.best().to_dicts()}
    if setting.threshold is None:
        row = max(best.values(), key=lambda one: one["new"])
        return f"no method learns enough to compare (best: {study.label(row['method'])}, {cell(row, 'new')} % new)"
    own = [method for method in aimed if method in best]
    more = [
        method
        for method in own
        if (lead := setting.lead(method)) and lead.mean > FAR and direction(lead, len(study.seeds)) > 0
    ]
    clauses = []
    if more:
        names = in_words([f"{study.label(method)} ({cell(best[method], 'new')} % new)" for method in more])
        clauses.append(f"{names} {_s('learn', more)} more than its {cell(best[REFERENCE], 'new')}")
    clauses.append(f"at {setting.threshold:.0%} new {_kept_in_words(study, setting, own)}")
    behind = [method for method in own if method in setting.behind()]
    if behind:
        names = in_words([f"{study.label(method)} ({cell(best[method], 'new')} % new)" for method in behind])
        clauses.append(f"exploration fails {names}")
    return ", ".join(clauses)


def _kept_in_words(study: Study, setting: Setting, own: Sequence[str]) -> str:
    """How the prior accuracies of the methods `own` stand against that of GRPO + KL, at the threshold."""
    reached = setting.kept().drop_nulls("prior")["method"].to_list()
    gains = {method: gain for method in own if method in reached and (gain := setting.gain(method))}
    by_side: dict[int, list[str]] = {1: [], 0: [], -1: []}
    for method in sorted(gains, key=lambda method: gains[method].mean, reverse=True):
        by_side[direction(gains[method], len(study.seeds))].append(method)
    names = {sign: in_words([study.label(method) for method in group]) for sign, group in by_side.items()}
    # Of whom keeps more the gain of the first, or of the first of all: how much chance could hide.
    best = next(iter([*by_side[1], *by_side[0]]), None)
    size = f" ({study.label(best)} {signed(gains[best])} points)" if best else ""
    clauses = []
    if by_side[1]:
        clauses.append(f"{names[1]} {_s('keep', by_side[1])} more prior accuracy{size}")
    if by_side[-1]:
        clauses.append(f"{names[-1]} {_s('keep', by_side[-1])} less")
    if by_side[0] and not clauses:
        clauses.append(f"none keeps measurably more or less prior accuracy{size}")
    elif by_side[0]:
        clauses.append(f"{names[0]} {_s('keep', by_side[0])} not measurably more or less")
    there = [method for method in own if method in reached and REFERENCE not in reached]
    absent = [method for method in (REFERENCE, *own) if method not in reached]
    for verb, group in (("get", there), ("never get", absent)):
        if group:
            clauses.append(f"{in_words([study.label(method) for method in group])} {_s(verb, group)} there")
    return ", ".join(clauses)


def _s(verb: str, names: Sequence[str]) -> str:
    return f"{verb}s" if len(names) == 1 else verb


def _tables(study: Study, settings: Sequence[Setting]) -> list[Table]:
    compared, explored, weights = [], [], []
    for setting in settings:
        for row in setting.kept().to_dicts() if setting.threshold else []:
            gain = setting.gain(row["method"]) if row["method"] != REFERENCE else None
            compared.append(
                [
                    setting.name,
                    study.label(row["method"]),
                    f"≥ {setting.threshold:.0%}",
                    cell(row, "prior"),
                    signed(gain),
                    *(cell(row, name, _nats) for name in DRIFTS),
                ]
            )
        best = {row["method"]: cell(row, "new") for row in setting.best().to_dicts()}
        explored.append(
            [
                setting.name,
                written(Estimate.over(setting.bases["new"].to_list())),
                written(setting.without),
                *(best.get(method, NEVER) for method in study.methods),
            ]
        )
        start = written(Estimate.over(setting.bases[ESS].to_list()))
        for early, late in zip(setting.ess(first=True).to_dicts(), setting.ess(first=False).to_dicts(), strict=True):
            variance = NEVER if not late[ESS] else f"{1 / late[ESS] - 1:.3g}"
            names = setting.name, study.label(early["method"])
            weights.append([*names, start, cell(early, ESS), cell(late, ESS), variance])
    drifts = ["forward KL, nats", "reverse KL", "forward, within correct", "reverse, within correct"]
    methods = [study.label(method) for method in study.methods]
    return [
        Table(
            "At equal new accuracy",
            ["setting", "method", "new", "prior kept, %", f"beyond {study.label(REFERENCE)}, points", *drifts],
            compared,
        ),
        Table(
            "Best new accuracy, %",
            ["setting", "base, greedy", "groups without a correct sample, at least, %", *methods],
            explored,
        ),
        Table(
            "Effective sample size of importance weights towards q*, %",
            ["setting", "method", "base", "first checkpoint", "end", "variance of the weights at the end"],
            weights,
        ),
    ]


def _nats(value: float) -> str:
    return f"{round(value, 4):.3g}"  # from 13 nats to less than a thousandth


def _figure(study: Study, settings: Sequence[Setting]) -> Figure:
    kept = [setting.kept() for setting in settings]
    best = [setting.best() for setting in settings]
    ends = [setting.ess(first=False) for setting in settings]
    return Figure(
        "kl-minimal",
        [
            _panel(study, settings, kept, "prior", "Kept at equal new accuracy", "prior accuracy", bases="prior"),
            _panel(study, settings, best, "new", "What is learnt at all", "best new accuracy", bases="new"),
            _panel(study, settings, kept, WITHIN, "How far from q* among correct outputs", "reverse KL, nats"),
            _panel(study, settings, ends, ESS, "Weights towards q* at the end", "effective sample size", bases=ESS),
        ],
        columns=2,
    )


def _panel(
    study: Study,
    settings: Sequence[Setting],
    cells: Sequence[pl.DataFrame],
    column: str,
    title: str,
    y_label: str,
    bases: str | None = None,
) -> Panel:
    """`column` of `cells`, a row per method and a table per setting; with `bases`, that column of theirs."""
    layers: list[Layer] = [*_dots(study, cells, column)]
    if bases:
        layers.append(_bases(study, settings, bases))
    log = column == WITHIN  # from a thousandth of a nat to several
    low, high = log_height(layers) if log else share_height(layers)
    texts = []
    if column in ("prior", WITHIN):  # at equal accuracy
        layers.append(_absent(study, cells, low * 1.3 if log else low + 0.04 * (high - low)))
        low = low / 2 if log else low - 0.1 * (high - low)
        at = ((place, one.threshold) for place, one in enumerate(settings) if one.threshold)
        texts = [(place - 0.15, low, f"≥ {threshold:.0%}") for place, threshold in at]
    ticks = [(float(place), f"{one.expected.mean:.0%}, {one.group}") for place, one in enumerate(settings)]
    return Panel(
        title,
        "base’s expected accuracy, group size",
        y_label,
        layers,
        (-0.5, max(len(settings), 1) - 0.5),
        (low, high),
        x_percent=False,
        y_percent=not log,
        y_log=log,
        x_ticks=ticks or None,
        texts=texts,
    )


def _dots(study: Study, cells: Sequence[pl.DataFrame], column: str) -> list[Layer]:
    """Each method's means over the settings."""
    layers: list[Layer] = []
    for index, method in enumerate(study.methods):
        own = [(at, row) for at, table in enumerate(cells) for row in table.to_dicts() if row["method"] == method]
        low, mean, high = (
            np.array([row[name] for _, row in own], float) for name in (f"{column}_low", column, f"{column}_high")
        )
        layers.append(
            Points(
                study.label(method),
                np.array([_place(study, at, method) for at, _ in own], float),
                mean,
                PALETTE[index % len(PALETTE)],
                SYMBOLS[index % len(SYMBOLS)],
                size=7.5,
                error_low=low,
                error_high=high,
            )
        )
    return layers


def _absent(study: Study, kept: Sequence[pl.DataFrame], y: float) -> Points:
    """A mark for each method and setting that no seed gets there with."""
    absent = [(at, row["method"]) for at, table in enumerate(kept) for row in table.to_dicts() if row["prior"] is None]
    places = [_place(study, at, method) for at, method in absent]
    return never("never gets there", [study.label(method) for _, method in absent], places, y)


def _bases(study: Study, settings: Sequence[Setting], column: str) -> Points:
    """The bases themselves, left of the methods, a star for each seed."""
    left = 0.1 * len(study.methods) / 2
    stars = [(at - left, value) for at, setting in enumerate(settings) for value in floats(setting.bases, column)]
    x, y = np.array(stars, float).reshape(-1, 2).T
    return Points("base", x, y, INK, "star", size=9.0)


def _place(study: Study, setting: int, method: str) -> float:
    """Where on the axis a method is in a setting: beside the others, so that no interval hides another."""
    return setting + 0.1 * (1 + study.methods.index(method) - len(study.methods) / 2)


def grids(quick: bool) -> list[Grid]:
    """Its runs."""
    methods = ("grpo", "grpo+kl", "kl-dpg", "js-dpg", "tv-dpg", "natural-pg")
    # The share of correct labels in pre-training, and the group size. The base's own accuracy is in the table.
    grid = ((1.0, 64), (0.3, 64), (0.0, 64), (0.0, 8))
    return [
        Grid(
            methods,
            ONE,
            {"pretrain_accuracy": accuracy} if accuracy < 1 else {},
            {"group_size": group},
        )
        for accuracy, group in (grid[::2] if quick else grid)
    ]


STUDY = PlainStudy(grids, section)
