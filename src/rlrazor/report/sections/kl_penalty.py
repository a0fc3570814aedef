"""Does a KL penalty make SFT forget as little as RL? SFT and RL with penalties of several strengths."""

from dataclasses import dataclass

import polars as pl

from rlrazor.analysis.statistics import (
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
from rlrazor.report.drawing import Figure, Layer, Panel
from rlrazor.report.figures import staircase
from rlrazor.report.layers import base, cloud, height, learnt, level, means
from rlrazor.report.sections.statistics import kept_table, over_seeds
from rlrazor.report.study import Section, Study
from rlrazor.report.tables import THRESHOLDS, Table
from rlrazor.report.text import INTERVALS, NEVER, how_many, signed, written

PENALISED = "+kl"
SFT, RL = "sft-2", "grpo"
ARM = ("family", "kl_coef")
KL = "kl_forward"

# From no penalty to the strongest.
_SHADES = {
    SFT: ("#FDAE6B", "#FD8D3C", "#E6550D", "#A63603", "#5C1E02"),
    RL: ("#9ECAE1", "#6BAED6", "#3182BD", "#08519C", "#08244D"),
}
_SYMBOLS = {SFT: "square", RL: "circle"}


@dataclass(frozen=True)
class Comparison:
    """The best penalty of SFT at equal accuracy, against SFT and RL without one, and against RL with its own best.

    Coefficients are chosen on the score shown. `rl_*` are None where RL was not run, or does not get there, with one.
    """

    coefficient: float
    kept: Estimate
    gain: Estimate
    over_rl: Estimate
    rl_coefficient: float | None
    over_rl_penalised: Estimate | None


def section(study: Study) -> Section:
    """What is kept at equal accuracy, by the penalty's coefficient, for SFT and for RL."""
    points = by_family(study.points)
    at = shared_threshold(points, study.bases, ARM, THRESHOLDS[:1])
    arms = _arms(points)
    names = {arm: _name(study, *arm) for arm in arms}
    return Section(
        "kl-penalty",
        "Does a KL penalty make SFT forget as little as RL?",
        "If forgetting follows the KL from the base, SFT might be told to stay near. SFT and RL with c · KL(policy || "
        "base) on the new task’s inputs added to their losses, for several c.",
        finding(study, points, at),
        _figure(study, points, at),
        [kept_table(points, ARM, names, THRESHOLDS), *([] if at is None else [_gains(study, points, at)])],
        f"{how_many(len(points), 'checkpoint')} of {how_many(points['trajectory'].n_unique(), 'run')}, "
        f"{how_many(len(study.seeds), 'seed')}; all coefficients with the same learning rates. The penalty is exact, "
        "over the ten labels, and of the reverse KL; forward KL is what is shown. Kept: per arm and seed, the prior "
        "accuracy of the best checkpoint with at least the new accuracy given. The checkpoint, and the coefficient "
        "that the finding names, are chosen on the score shown, which flatters the best a little. An arm that does not "
        "get there in all seeds is not compared. "
        f"{INTERVALS} Axes of the first two panels fit the means; an interval may reach beyond. Lines of the "
        "trade-off: frontiers over all seeds.",
    )


def by_family(points: pl.DataFrame) -> pl.DataFrame:
    """The checkpoints of SFT and RL, with `family`, the method without its penalty, and `kl_coef`, 0 for none."""
    rows = with_params(points, kl_coef=0.0).with_columns(family=pl.col("method").str.strip_suffix(PENALISED))
    return rows.filter(pl.col("family").is_in([SFT, RL]))


def compare(points: pl.DataFrame, at: float) -> Comparison | None:
    """SFT with its best penalty against the rest, over arms that reach `at` in all seeds.

    None where SFT with a penalty, SFT without or RL without is not among them.
    """
    cells = in_all_seeds(at_accuracy(points, ARM, at), points)
    coefficient, rl_coefficient = (_best_penalty(cells, family) for family in (SFT, RL))
    plain = set(cells.filter(pl.col("kl_coef") == 0)["family"])
    if coefficient is None or plain != {SFT, RL}:
        return None
    kept = best_checkpoints(points, ARM, at)
    own = _arm(kept, SFT, coefficient)

    def over(family: str, other: float) -> Estimate:
        gap = difference(own, _arm(kept, family, other), "prior")
        assert gap  # all seeds have both
        return gap

    return Comparison(
        coefficient,
        Estimate.over(own.sort("seed")["prior"].to_list()),
        over(SFT, 0.0),
        over(RL, 0.0),
        rl_coefficient,
        None if rl_coefficient is None else over(RL, rl_coefficient),
    )


def finding(study: Study, points: pl.DataFrame, at: float | None) -> str:
    """Whether SFT with a penalty keeps as much as RL, by how much, and with which coefficient."""
    found = None if at is None else compare(points, at)
    if at is None or found is None:
        return (
            "KL-regularised SFT and RL cannot be compared: SFT with a penalty, SFT without and RL without do not all "
            f"reach a new accuracy of {min(THRESHOLDS):.0%} in all seeds."
        )
    seeds = len(study.seeds)
    sft, rl = study.label(SFT), study.label(RL)
    with_both = ""
    if found.over_rl_penalised:
        own_best = f"{rl} with its own best (coefficient {found.rl_coefficient:g})"
        with_both = f", and against {own_best} it is {signed(found.over_rl_penalised)}"
    return (
        f"At a new accuracy of at least {at:.0%}, {sft} with its best penalty (coefficient {found.coefficient:g}) "
        f"keeps a prior accuracy of {written(found.kept)} %, {signed(found.gain)} points against {sft} without and "
        f"{signed(found.over_rl)} against {rl} without: {_verdict(found, seeds)}{with_both} "
        f"({over_seeds(seeds)})."
    )


def _verdict(found: Comparison, seeds: int) -> str:
    gain, over_rl = direction(found.gain, seeds), direction(found.over_rl, seeds)
    if gain > 0:
        against = {
            1: "less than RL",
            0: "less, and no longer measurably more than RL",
            -1: "less, but still more than RL",
        }
        return f"the penalty makes SFT forget {against[over_rl]}"
    helps = (
        "the penalty makes no difference that can be told from chance" if gain == 0 else "even the best penalty harms"
    )
    against = {1: "SFT forgets less than RL", 0: "SFT and RL cannot be told apart", -1: "SFT forgets more than RL"}
    return f"{helps}, and {against[over_rl]}"


def _best_penalty(cells: pl.DataFrame, family: str) -> float | None:
    """The coefficient above 0 with which the family keeps most, the smallest of equals."""
    rows = cells.filter(pl.col("family") == family, pl.col("kl_coef") > 0).sort("kl_coef")
    return None if rows.is_empty() else float(rows.sort("prior", descending=True, maintain_order=True)["kl_coef"][0])


def _gains(study: Study, points: pl.DataFrame, at: float) -> Table:
    """Each coefficient against none, and SFT against RL."""
    reached = in_all_seeds(at_accuracy(points, ARM, at), points)
    arms = set(reached.select(ARM).iter_rows())
    kept = best_checkpoints(points, ARM, at)

    def gap(first: tuple[str, float], second: tuple[str, float]) -> str:
        if not {first, second} <= arms:
            return NEVER
        return signed(difference(_arm(kept, *first), _arm(kept, *second), "prior"))

    rows = [
        [
            f"{coefficient:g}",
            *(NEVER if coefficient == 0 else gap((family, coefficient), (family, 0.0)) for family in (SFT, RL)),
            gap((SFT, coefficient), (RL, 0.0)),
            gap((SFT, coefficient), (RL, coefficient)),
        ]
        for coefficient in _coefficients(points)
    ]
    sft, rl = study.label(SFT), study.label(RL)
    headers = ["coefficient", f"{sft}, against none", f"{rl}, against none"]
    headers += [f"{sft} − {rl} without", f"{sft} − {rl} with the same"]
    return Table(f"What the penalty is worth at new ≥ {at:.0%}, points of prior accuracy", headers, rows)


def _figure(study: Study, points: pl.DataFrame, at: float | None) -> Figure:
    new, arms = learnt(study), _arms(points)
    panels = [
        Panel(
            "Trade-off",
            "new accuracy",
            "prior accuracy",
            [
                *(
                    cloud(_name(study, *arm), _arm(points, *arm), "new", "prior", *_style(points, *arm), opacity=0.4)
                    for arm in arms
                ),
                *(staircase(_name(study, *arm), _arm(points, *arm), _style(points, *arm)[0]) for arm in arms),
                base(study, "new", "prior"),
            ],
            new,
        )
    ]
    if at is not None:
        prior = float(floats(study.bases, "prior").mean())
        untuned = level("base’s prior", prior, (-0.3, len(_coefficients(points)) - 0.7))
        panels = [
            _by_coefficient(study, points, at, "prior", [untuned]),
            _by_coefficient(study, points, at, KL, []),
            *panels,
        ]
    return Figure("kl-penalty", panels, columns=len(panels))


def _by_coefficient(study: Study, points: pl.DataFrame, at: float, column: str, also: list[Layer]) -> Panel:
    """The best checkpoints at equal accuracy, a line per family."""
    coefficients = _coefficients(points)
    layers = []
    for family in _families(points):
        cells = at_accuracy(points.filter(pl.col("family") == family), ["kl_coef"], at, ["prior", KL]).sort("kl_coef")
        places = [float(coefficients.index(coefficient)) for coefficient in cells["kl_coef"]]
        layers.append(means(study.label(family), cells, places, column, _SHADES[family][2], _SYMBOLS[family]))
    of_prior = column == "prior"
    return Panel(
        f"{'Kept' if of_prior else 'Drift'} at new ≥ {at:.0%}",
        "coefficient c of the KL penalty",
        "prior accuracy" if of_prior else "forward KL, nats",
        [*layers, *also],
        (-0.3, len(coefficients) - 0.7),
        height([*layers, *also]),
        y_percent=of_prior,
        x_ticks=[(float(place), f"{coefficient:g}") for place, coefficient in enumerate(coefficients)],
    )


def _coefficients(points: pl.DataFrame) -> list[float]:
    return sorted(points["kl_coef"].unique().to_list())


def _families(points: pl.DataFrame) -> list[str]:
    return [family for family in (SFT, RL) if family in set(points["family"])]


def _arms(points: pl.DataFrame) -> list[tuple[str, float]]:
    present = set(points.select(ARM).iter_rows())
    return [arm for family in (SFT, RL) for value in _coefficients(points) if (arm := (family, value)) in present]


def _arm(table: pl.DataFrame, family: str, coefficient: float) -> pl.DataFrame:
    return table.filter(pl.col("family") == family, pl.col("kl_coef") == coefficient)


def _name(study: Study, family: str, coefficient: float) -> str:
    return f"{study.label(family)}, c = {coefficient:g}"


def _style(points: pl.DataFrame, family: str, coefficient: float) -> tuple[str, str]:
    """The stronger the penalty, the darker the family's colour."""
    coefficients, shades = _coefficients(points), _SHADES[family]
    place = coefficients.index(coefficient) * (len(shades) - 1) / max(len(coefficients) - 1, 1)
    return shades[round(place)], _SYMBOLS[family]
