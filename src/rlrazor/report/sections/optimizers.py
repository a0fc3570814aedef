"""Does the optimiser matter? AdamW, SGD with momentum and Muon at equal new-task accuracy, for RL and for SFT."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl

from rlrazor.analysis import law
from rlrazor.analysis.law import LeftOut, Quadratic
from rlrazor.analysis.statistics import (
    HALF_POINT,
    Estimate,
    at_accuracy,
    best_checkpoints,
    difference,
    direction,
    floats,
    in_all_seeds,
    shared_threshold,
    with_params,
)
from rlrazor.errors import RazorError
from rlrazor.report.drawing import INK, PALETTE, SYMBOLS, Curve, Figure, Layer, Panel, Points
from rlrazor.report.figures import staircase
from rlrazor.report.layers import base, cloud, height, learnt, level, means
from rlrazor.report.sections.statistics import kept_table, over_seeds
from rlrazor.report.study import Section, Study
from rlrazor.report.tables import THRESHOLDS, Table
from rlrazor.report.text import INTERVALS, NEVER, how_many, in_words, nats, number, percent, signed

DEFAULT = "adamw"
NAMES = {DEFAULT: "AdamW", "sgd": "SGD", "muon": "Muon"}
ARM = ("method", "optimizer")
RL, SFT = "grpo", "sft-2"
KL = "kl_forward"


@dataclass(frozen=True)
class Shared:
    """One quadratic in forward KL through the checkpoints of all optimisers.

    `residual`: by optimiser, what it forgets beyond the law on average, per seed and then over seeds. `left_out`: the
    error on each optimiser by a law fitted to the others; `guess` the same for guessing the others' mean forgetting.
    """

    quadratic: Quadratic
    r2: float
    residual: Mapping[str, Estimate]
    left_out: LeftOut | None
    guess: LeftOut | None


def section(study: Study) -> Section:
    """Each optimiser against AdamW at equal accuracy, and one law for all."""
    points = with_params(study.points, optimizer=DEFAULT)
    at = shared_threshold(points, study.bases, ARM, THRESHOLDS[:1])
    shared = shared_law(points)
    arms = _arms(study, points)
    names = {arm: _name(study, *arm) for arm in arms}
    return Section(
        "optimizers",
        "Does the optimiser matter?",
        "Whether what is forgotten depends on the optimiser, at equal accuracy on the new task, the paper leaves open. "
        "The same methods with AdamW, SGD with momentum, and Muon, which makes every matrix’s update orthogonal.",
        finding(study, points, at, shared),
        _figure(study, points, at, shared),
        [
            kept_table(points, ARM, names, THRESHOLDS),
            *([] if at is None else [_against_default(study, points, at)]),
            *([] if shared is None else [_law_table(points, shared)]),
        ],
        f"{how_many(len(points), 'checkpoint')} of {how_many(points['trajectory'].n_unique(), 'run')}, "
        f"{how_many(len(study.seeds), 'seed')}. Learning rates: {_rates(points)}. SGD has momentum; "
        "Muon’s biases, which are no matrices, are AdamW’s at a tenth of its rate. Kept: per arm and seed, "
        "the prior accuracy of the best checkpoint with at least the new accuracy given, chosen on the score shown; "
        "that flatters an optimiser with more learning rates a little. An arm that does not get there in all seeds is "
        "not compared. The law: one quadratic of forgetting in forward KL through all checkpoints; beyond the law: "
        "mean forgetting minus the law’s. Left-out error: mean absolute error on an optimiser that the law was not "
        f"fitted to. {INTERVALS} The first panel fits the means; an interval may reach beyond. Natural policy gradient "
        "is among the methods of the analysis kl-minimal.",
    )


def shared_law(points: pl.DataFrame) -> Shared | None:
    """One quadratic through all optimisers' checkpoints; None where they are too few to fit it."""
    rows = points.filter(pl.col(KL).is_finite(), pl.col("forgetting").is_finite())
    x, y = floats(rows, KL), floats(rows, "forgetting")
    try:
        quadratic = law.fit_quadratic(x, y)
        r2 = law.r_squared(y, quadratic.predict(x))
    except RazorError:
        return None
    beyond = rows.select("optimizer", "seed", beyond=pl.Series(y - quadratic.predict(x)))
    per_seed = beyond.group_by("optimizer", "seed", maintain_order=True).agg(pl.col("beyond").mean()).sort("seed")
    return Shared(
        quadratic,
        r2,
        {
            name: Estimate.over(per_seed.filter(pl.col("optimizer") == name)["beyond"].to_list())
            for name in _optimizers(rows)
        },
        *(_left_out(fit, rows) for fit in (law.fit_quadratic, law.fit_constant)),
    )


def gaps(study: Study, points: pl.DataFrame, at: float, column: str = "prior") -> dict[str, dict[str, Estimate]]:
    """Method -> optimiser -> `column` minus AdamW's, of the best checkpoints with new >= `at`.

    Only over arms that all seeds have; methods without AdamW or without any other optimiser are left out.
    """
    kept = best_checkpoints(points, ARM, at)
    compared = _compared(points, at)
    found: dict[str, dict[str, Estimate]] = {}
    for method in study.methods:
        for optimizer in _optimizers(points):
            if optimizer == DEFAULT or not {(method, DEFAULT), (method, optimizer)} <= compared:
                continue
            gap = difference(_arm(kept, method, optimizer), _arm(kept, method, DEFAULT), column)
            if gap:
                found.setdefault(method, {})[optimizer] = gap
    return found


def finding(study: Study, points: pl.DataFrame, at: float | None, shared: Shared | None) -> str:
    """What the optimiser does to what is kept at equal accuracy, and whether forgetting follows one law."""
    found = {} if at is None else gaps(study, points, at)
    if at is None or not found:
        return (
            "Optimisers cannot be compared: no method reaches a new accuracy of "
            f"{min(THRESHOLDS):.0%} in all seeds both with AdamW and with another."
        )
    seeds = len(study.seeds)
    sizes = ", ".join(
        f"for {study.label(method)} {in_words([f'{_label(name)} {signed(gap)}' for name, gap in of_method.items()])}"
        for method, of_method in found.items()
    )
    return (
        f"At a new accuracy of at least {at:.0%}, prior accuracy against AdamW’s is, in points, {sizes}: "
        f"{_verdict(study, found)}{_across(study, points, at)}{_lawful(shared, seeds)}"
        f"{_left_behind(study, points, at)} ({over_seeds(seeds)})."
    )


def _verdict(study: Study, found: Mapping[str, Mapping[str, Estimate]]) -> str:
    seeds = len(study.seeds)
    matters = [study.label(method) for method, by in found.items() if any(direction(gap, seeds) for gap in by.values())]
    if not matters:
        return "no difference that can be told from chance"
    rest = [study.label(method) for method in found if study.label(method) not in matters]
    return f"the optimiser matters for {in_words(matters)}" + (f", not measurably for {in_words(rest)}" if rest else "")


def _across(study: Study, points: pl.DataFrame, at: float) -> str:
    """Whether RL keeps more than SFT with each optimiser, to append."""
    kept, compared = best_checkpoints(points, ARM, at), _compared(points, at)
    advantage = {
        name: gap
        for name in _optimizers(points)
        if {(RL, name), (SFT, name)} <= compared
        and (gap := difference(_arm(kept, RL, name), _arm(kept, SFT, name), "prior"))
    }
    if not advantage:
        return ""
    wins = [name for name, gap in advantage.items() if direction(gap, len(study.seeds)) > 0]
    sizes = in_words([f"{signed(gap)} with {_label(name)}" for name, gap in advantage.items()])
    if len(wins) == len(advantage):
        return f"; {study.label(RL)} keeps more than {study.label(SFT)} with each ({sizes})"
    which = f"only with {in_words([_label(name) for name in wins])}" if wins else "with none"
    return f"; {study.label(RL)} keeps measurably more than {study.label(SFT)} {which} ({sizes})"


def _lawful(shared: Shared | None, seeds: int) -> str:
    """How well one law serves all optimisers, to append."""
    if shared is None:
        return ""
    off = [
        f"{_label(name)} by {signed(beyond)} points"
        for name, beyond in shared.residual.items()
        if seeds > 1 and direction(beyond, seeds) and abs(beyond.mean) >= HALF_POINT
    ]
    beside = f", which is off for {in_words(off)}" if off else ""
    return f"; one quadratic in forward KL explains forgetting under all with R² {number(shared.r2)}{beside}"


def _left_behind(study: Study, points: pl.DataFrame, at: float) -> str:
    """The arms that were not compared, to append."""
    names = [_name(study, *arm) for arm in _arms(study, points) if arm not in _compared(points, at)]
    return f"; {in_words(names)} did not get there in all seeds" if names else ""


def _against_default(study: Study, points: pl.DataFrame, at: float) -> Table:
    levels = [level for level in THRESHOLDS if level <= at]
    prior, kl = {level: gaps(study, points, level) for level in levels}, gaps(study, points, at, KL)
    rows = [
        [
            _name(study, method, name),
            *(signed(prior[level].get(method, {}).get(name)) for level in levels),
            signed(gap, nats),
        ]
        for method, of_method in kl.items()
        for name, gap in of_method.items()
    ]
    headers = ["arm", *(f"prior accuracy at new ≥ {level:.0%}, points" for level in levels)]
    return Table("Minus AdamW’s", [*headers, f"forward KL at new ≥ {at:.0%}, nats"], rows)


def _law_table(points: pl.DataFrame, shared: Shared) -> Table:
    rows = [
        [
            _label(name),
            f"{points.filter(pl.col('optimizer') == name).height:,}",
            signed(beyond),
            _error(shared.left_out, name),
            _error(shared.guess, name),
        ]
        for name, beyond in shared.residual.items()
    ]
    headers = ["optimiser", "checkpoints", "beyond the law, points", "left-out error", "guessing the others’ mean"]
    return Table(f"One quadratic in forward KL for all (R² {number(shared.r2)})", headers, rows)


def _figure(study: Study, points: pl.DataFrame, at: float | None, shared: Shared | None) -> Figure:
    new, arms = learnt(study), _arms(study, points)
    panels = [
        Panel(
            "Trade-off",
            "new accuracy",
            "prior accuracy",
            [
                *(_cloud(study, points, arm, "new", "prior") for arm in arms),
                *(staircase(_name(study, *arm), _arm(points, *arm), _style(study, points, *arm)[0]) for arm in arms),
                base(study, "new", "prior"),
            ],
            new,
        ),
        Panel(
            "Learning against drift",
            "forward KL, nats",
            "new accuracy",
            [*(_cloud(study, points, arm, KL, "new") for arm in arms), base(study, KL, "new")],
            y_range=new,
            x_percent=False,
        ),
        Panel(
            "Forgetting law",
            "forward KL, nats",
            "forgetting",
            [*(_cloud(study, points, arm, KL, "forgetting") for arm in arms), *_law_curve(points, shared)],
            x_percent=False,
        ),
    ]
    if at is not None:
        panels.insert(0, _kept(study, points, at))
    return Figure("optimizers", panels, columns=2 if len(panels) == 4 else 3)


def _kept(study: Study, points: pl.DataFrame, at: float) -> Panel:
    """What each arm keeps at equal accuracy: a place per optimiser, methods side by side."""
    optimizers = _optimizers(points)
    cells = at_accuracy(points, ARM, at, ["prior"])
    layers: list[Layer] = []
    for name in optimizers:
        for index, method in enumerate(study.methods):
            arm = _arm(cells, method, name)
            place = optimizers.index(name) + 0.16 * (index - (len(study.methods) - 1) / 2)
            layers.append(
                means(
                    _name(study, method, name), arm, [place] * len(arm), "prior", *_style(study, points, method, name)
                )
            )
    ends = (-0.5, len(optimizers) - 0.5)
    prior = float(floats(study.bases, "prior").mean())
    layers.append(level("base’s prior", prior, ends))
    ticks = [(float(place), _label(name)) for place, name in enumerate(optimizers)]
    return Panel(f"Kept at new ≥ {at:.0%}", "", "prior accuracy", layers, ends, height(layers), x_ticks=ticks)


def _law_curve(points: pl.DataFrame, shared: Shared | None) -> list[Layer]:
    if shared is None:
        return []
    x = np.linspace(0, float(np.nanmax(floats(points, KL))), 200)
    return [Curve(f"quadratic, R² = {number(shared.r2)}", x, shared.quadratic.predict(x), INK)]


def _cloud(study: Study, points: pl.DataFrame, arm: tuple[str, str], x: str, y: str) -> Points:
    return cloud(_name(study, *arm), _arm(points, *arm), x, y, *_style(study, points, *arm))


def _style(study: Study, points: pl.DataFrame, method: str, optimizer: str) -> tuple[str, str]:
    """An optimiser's colour and a method's symbol."""
    color = PALETTE[_optimizers(points).index(optimizer) % len(PALETTE)]
    return color, SYMBOLS[study.methods.index(method) % len(SYMBOLS)]


def _compared(points: pl.DataFrame, at: float) -> set[tuple[str, str]]:
    """The arms that reach the threshold in all seeds."""
    cells = in_all_seeds(at_accuracy(points, ARM, at), points)
    return {(method, optimizer) for method, optimizer in cells.select(ARM).iter_rows()}


def _arm(table: pl.DataFrame, method: str, optimizer: str) -> pl.DataFrame:
    return table.filter(pl.col("method") == method, pl.col("optimizer") == optimizer)


def _arms(study: Study, points: pl.DataFrame) -> list[tuple[str, str]]:
    present = set(points.select(ARM).iter_rows())
    return [arm for method in study.methods for name in _optimizers(points) if (arm := (method, name)) in present]


def _optimizers(points: pl.DataFrame) -> list[str]:
    return points["optimizer"].unique(maintain_order=True).to_list()


def _rates(points: pl.DataFrame) -> str:
    used = [(name, points.filter(pl.col("optimizer") == name)["lr"].unique().sort()) for name in _optimizers(points)]
    return in_words([f"{_label(name)} {', '.join(f'{lr:g}' for lr in rates)}" for name, rates in used])


def _name(study: Study, method: str, optimizer: str) -> str:
    return f"{study.label(method)}, {_label(optimizer)}"


def _label(optimizer: str) -> str:
    return NAMES.get(optimizer, optimizer)


def _error(left_out: LeftOut | None, name: str) -> str:
    return NEVER if left_out is None else percent(left_out.by_method[name])


def _left_out(fit: law.FitLaw, rows: pl.DataFrame) -> LeftOut | None:
    try:
        return law.leave_one_method_out(fit, floats(rows, KL), floats(rows, "forgetting"), rows["optimizer"].to_list())
    except RazorError:
        return None
