"""What people use today against forgetting, beside on-policy RL: all on one frontier."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl

from rlrazor.analysis.statistics import (
    Estimate,
    at_accuracy,
    best_checkpoints,
    difference,
    direction,
    floats,
    threshold_most_reach,
    with_params,
)
from rlrazor.report.drawing import INK, PALETTE, SYMBOLS, Curve, Figure, Layer, Panel, Points
from rlrazor.report.figures import staircase
from rlrazor.report.layers import base, cloud, learnt, never, padded
from rlrazor.report.sections.statistics import follows_kl, over_seeds
from rlrazor.report.study import Section, Study
from rlrazor.report.tables import THRESHOLDS, Table
from rlrazor.report.text import INTERVALS, NEVER, cell, how_many, in_words, nats, percent, signed, written

PLAIN = "sft-2"
TODAY = ("ewc", "lwf", "replay", "lora", "dft", "dft+kl")
COMPARED = ("grpo", "kl-dpg", "oracle")
PRIOR_DATA = {"ewc": "yes, for its Fisher information", "replay": "yes, to replay"}
TEACHES = {"grpo": "its own samples", "kl-dpg": "its own samples", "oracle": "the base’s correct outputs"}
KL = "kl_forward"
ARM = ("method", "setting")

_SETTINGS = {"ewc": ", λ = {:g}", "lwf": ", λ = {:g}", "lora": ", rank {:g}", "dft+kl": ", weight {:g}"}


@dataclass(frozen=True, eq=False)
class Variant:
    """A method at one strength."""

    method: str
    label: str
    points: pl.DataFrame

    @property
    def needs_prior(self) -> bool:
        """Whether it takes data of the prior task."""
        return self.method in PRIOR_DATA

    def kept(self, threshold: float) -> dict[str, Any]:
        """Prior accuracy and forward KL of its best checkpoints with new >= `threshold`."""
        [row] = at_accuracy(self.points, ["method"], threshold, ["prior", KL]).to_dicts()
        return row

    def best(self, threshold: float) -> pl.DataFrame:
        """Its best checkpoint of each seed that gets to new >= `threshold`."""
        return best_checkpoints(self.points, ["method"], threshold)


def section(study: Study) -> Section:
    """Every method and strength on one frontier, and what it keeps at equal accuracy."""
    variants = variants_of(study)
    threshold = threshold_most_reach(_with_setting(study.points), study.bases, ARM, THRESHOLDS)
    return Section(
        "baselines",
        "How do today’s methods against forgetting compare?",
        "EWC, learning without forgetting (LwF), replay, LoRA, and the forgetting-aware losses DFT and ASFT all start "
        "from plain SFT on an external annotator’s labels. How much of the prior task do they keep at equal new "
        "accuracy, beside on-policy RL?",
        finding(study, variants, threshold),
        _figure(study, variants, threshold),
        _tables(study, variants, threshold),
        f"{how_many(len(study.points), 'checkpoint')}, {how_many(len(study.seeds), 'seed')}. Today’s methods learn "
        "from the labels of SFT-2, one of two per parity. EWC and LwF: λ weighs their term; LwF distils the base on "
        "the new task’s images, asked as the prior task. Replay: 5 % of each batch are prior-task images of "
        "pre-training. LoRA: low-rank updates of the MLP’s matrices. DFT weighs each label by the policy’s own "
        "probability for it (arXiv:2508.05629); with a KL penalty to the base, its weight given, it is ASFT "
        "(arXiv:2509.23753). GRPO and KL-DPG sample for themselves and need a verifier, not labels. Kept: per seed the "
        "checkpoint with the highest prior accuracy among those that have reached the new accuracy given, over "
        "learning rates and time, chosen on the scores that are shown; so is the best strength, which favours methods "
        f"with several.{_law(variants, threshold)} Lines: frontiers over all seeds, strengths and learning rates. "
        f"{INTERVALS}",
    )


def variants_of(study: Study) -> list[Variant]:
    """Each method at each strength, in the order of the table."""
    variants = []
    for (method, setting), rows in _with_setting(study.points).group_by(ARM, maintain_order=True):
        name = _SETTINGS.get(str(method), "").format(setting)
        variants.append(Variant(str(method), study.label(str(method)) + name, rows))
    return variants


def finding(study: Study, variants: Sequence[Variant], threshold: float | None) -> str:
    """The best of today's methods, with and without prior data, against RL and the oracle at equal accuracy."""
    today = [one for one in variants if one.method in TODAY]
    if not today:
        return "The study has none of today’s methods against forgetting."
    if threshold is None:
        return f"No method reaches a new accuracy of {min(THRESHOLDS):.0%}, so there is nothing to compare."
    clauses: list[str] = []
    for needs_prior, kind in ((True, "with prior data"), (False, "without prior data")):
        group = [one for one in today if one.needs_prior == needs_prior]
        leader, of_them = leader_of(group, threshold), "" if clauses else " of today’s methods"
        if leader:
            row = leader.kept(threshold)
            kept = f"a prior accuracy of {cell(row, 'prior')} % at a forward KL of {cell(row, KL, nats)} nats"
            verdict = _verdict(study, leader, variants, threshold)
            clauses.append(f"the best{of_them} {kind}, {leader.label}, keeps {kept}{verdict}")
        elif group:
            clauses.append(f"none{of_them} {kind} gets there in most seeds")
    plain = leader_of([one for one in variants if one.method == PLAIN], threshold)
    beside = f" (plain {plain.label} keeps {cell(plain.kept(threshold), 'prior')} %)" if plain else ""
    return f"At {threshold:.0%} new accuracy{beside}, {'; '.join(clauses)} ({over_seeds(len(study.seeds))})."


def leader_of(variants: Sequence[Variant], threshold: float) -> Variant | None:
    """Who keeps most on average, among those of which most seeds get there."""
    rows = [(one, one.kept(threshold)) for one in variants]
    there = [(one, row["prior"]) for one, row in rows if 2 * row["n_seeds"] > row["seeds_total"]]
    return max(there, key=lambda pair: pair[1])[0] if there else None


def _verdict(study: Study, leader: Variant, variants: Sequence[Variant], threshold: float) -> str:
    """How the leader stands against each of `COMPARED`."""
    said: dict[int, list[str]] = {1: [], 0: [], -1: []}
    for one in variants:
        gap = difference(leader.best(threshold), one.best(threshold), "prior") if one.method in COMPARED else None
        if gap:
            said[direction(gap, len(study.seeds))].append(f"{one.label} ({signed(gap)} points)")
    words = {1: "more than {}", 0: "not to be told apart from {}", -1: "less than {}"}
    clauses = [words[sign].format(in_words(names)) for sign, names in said.items() if names]
    return f", {', '.join(clauses)}" if clauses else ""


def _law(variants: Sequence[Variant], threshold: float | None) -> str:
    """Whether what is kept follows the KL, over all variants."""
    if threshold is None:
        return ""
    arms = pl.DataFrame([one.kept(threshold) for one in variants], infer_schema_length=None)
    return follows_kl(arms, threshold, "variant")


def _with_setting(points: pl.DataFrame) -> pl.DataFrame:
    """With what tells a method's variants apart: its strength, or the weight of its KL penalty; 0 for neither."""
    both = with_params(points, strength=0.0, kl_coef=0.0)
    return both.with_columns(setting=pl.col("strength") + pl.col("kl_coef"))


def _tables(study: Study, variants: Sequence[Variant], threshold: float | None) -> list[Table]:
    order = _ranked(variants, threshold or min(THRESHOLDS))
    levels = [f"new ≥ {at:.0%}" for at in THRESHOLDS]
    new, prior = (written(Estimate.over(study.bases[name].to_list())) for name in ("new", "prior"))
    kept = [["base (not fine-tuned)", *[f"({prior})"] * len(levels), new, NEVER, NEVER]]
    drifted = []
    for one in order:
        rows = [one.kept(at) for at in THRESHOLDS]
        kept.append(
            [
                one.label,
                *(cell(row, "prior") for row in rows),
                percent(floats(one.points, "new").max()),
                PRIOR_DATA.get(one.method, "no"),
                TEACHES.get(one.method, "an annotator’s labels"),
            ]
        )
        drifted.append([one.label, *(cell(row, KL, nats) for row in rows)])
    return [
        Table("Prior accuracy kept, %", ["method", *levels, "best new, %", "needs prior data", "learns from"], kept),
        Table("Forward KL there, nats", ["method", *levels], drifted),
    ]


def _ranked(variants: Sequence[Variant], threshold: float) -> list[Variant]:
    """Who keeps most first; last those that never get there, by how far they do."""

    def rank(one: Variant) -> tuple[float, float]:
        prior = one.kept(threshold)["prior"]
        return (-1.0 if prior is None else prior), float(floats(one.points, "new").max())

    return sorted(variants, key=rank, reverse=True)


def _figure(study: Study, variants: Sequence[Variant], threshold: float | None) -> Figure:
    clouds: list[Layer] = []
    steps: list[Layer] = []
    for method in study.methods:
        points, color, symbol = study.points.filter(pl.col("method") == method), *_style(study, method)
        clouds.append(cloud(study.label(method), points, "new", "prior", color, symbol))
        steps.append(staircase(study.label(method), points, color))
    new = learnt(study)
    panels = [
        Panel(
            "Trade-off, all strengths",
            "new accuracy",
            "prior accuracy",
            [*clouds, *steps, base(study, "new", "prior")],
            new,
        )
    ]
    if threshold is not None:
        panels.append(_kept_panel(study, variants, threshold))
    return Figure("baselines", panels, columns=len(panels), height=250 + 24 * max(len(variants), 14))


def _kept_panel(study: Study, variants: Sequence[Variant], threshold: float) -> Panel:
    """A dot per variant, best on top."""
    order = _ranked(variants, threshold)
    place = {one.label: float(len(order) - index) for index, one in enumerate(order)}
    kept = {one.label: one.kept(threshold) for one in order}
    base_prior = float(np.nanmean(floats(study.bases, "prior")))
    low, high = padded(np.array([base_prior, *(row["prior"] for row in kept.values())], float))
    rows = (0.3, len(order) + 0.7)
    dots: list[Layer] = []
    for method in study.methods:
        own = [one.label for one in order if one.method == method]
        ends = [np.array([kept[name][f"prior{end}"] for name in own], float) for end in ("_low", "", "_high")]
        dots.append(
            Points(
                study.label(method),
                ends[1],
                np.array([place[name] for name in own]),
                *_style(study, method),
                size=7.5,
                error_low=ends[0],
                error_high=ends[2],
                error_along="x",
            )
        )
    absent = [name for name, row in kept.items() if row["prior"] is None]
    edge = np.full(len(absent), low + 0.02 * (high - low))
    marks = never(f"never reaches {threshold:.0%} new", absent, edge.tolist(), 0.0)
    return Panel(
        f"Kept at new ≥ {threshold:.0%}",
        "prior accuracy; *: needs prior data",
        "",
        [
            *dots,
            replace(marks, y=np.array([place[name] for name in absent])),
            Curve("base", np.repeat(base_prior, 2), np.array(rows), INK, dashed=True),
        ],
        (low, high),
        rows,
        y_percent=False,
        y_ticks=[(place[one.label], f"{one.label}{' *' if one.needs_prior else ''}") for one in order],
    )


def _style(study: Study, method: str) -> tuple[str, str]:
    index = study.methods.index(method)
    return PALETTE[index % len(PALETTE)], SYMBOLS[index % len(SYMBOLS)]
