"""Tables that a study may add to the engine's own: one law for all arms, and the best of several arms."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from rlrazor.analysis import law
from rlrazor.analysis.law import LawSummary, PredictorSummary, r2_of
from rlrazor.analysis.matched import matched
from rlrazor.analysis.statistics import Estimate, by_group, correlation, floats, mean_of, seed_means, verdict
from rlrazor.report.keyed import Column, Keyed, table_of
from rlrazor.report.text import NEVER, by_seeds, nats, number, percent, signed, with_seeds, written
from rlrazor.studies.engine import KL, Arm, Compared, TableOf


def shared_law(points: pl.DataFrame, by: str = "method") -> PredictorSummary:
    """One law of forgetting in forward KL through all checkpoints, and for each value of `by` one of the others."""
    return law.summarise(points.with_columns(method=pl.col(by)), [KL], samples=0)[0]


def beyond(points: pl.DataFrame, fitted: LawSummary, by: str) -> dict[str, Estimate | None]:
    """By value of `by`, the mean of what is forgotten `beyond` the law: of each seed, then over seeds."""
    rows = law.finite(points, (KL, "forgetting"))
    excess = floats(rows, "forgetting") - fitted.law.predict(floats(rows, KL))
    return by_group(seed_means(rows.with_columns(beyond=pl.Series(excess)), [by], ["beyond"]), by, "beyond")


def law_table(by: str, label: Callable[[str], str]) -> TableOf:
    """Whether one quadratic in forward KL serves all arms: what is forgotten beyond it, by the column `by`.

    Its numbers are `law.r2` and `law.VALUE.beyond`, ...: `law.VALUE.error` is on checkpoints left out of the fit.
    """
    columns = [
        Column[Mapping[str, Any]]("checkpoints", "checkpoints", lambda row: f"{row['checkpoints']:,}"),
        Column("r2", "R²", lambda row: number(row.get("r2"))),
        Column("beyond", "beyond the law, points", lambda row: row.get("beyond"), signed),
        Column("error", "left-out error", lambda row: percent(row.get("error"))),
        Column("guess", "guessing the others’ mean", lambda row: percent(row.get("guess"))),
    ]

    def make(compared: Compared) -> Keyed:
        points, fits = compared.points, shared_law(compared.points, by)
        quadratic = fits.quadratic
        whole = {"checkpoints": len(points), "r2": r2_of(quadratic)}
        rows: dict[str, tuple[str, Mapping[str, Any]]] = {"law": ("all", whole)}
        for value, excess in beyond(points, quadratic, by).items() if quadratic else ():
            left_out = {"error": quadratic and quadratic.left_out, "guess": fits.baseline}
            errors = {name: of.by_method[value] if of else None for name, of in left_out.items()}
            counts = {"checkpoints": points.filter(pl.col(by) == value, pl.col(KL).is_finite()).height}
            rows[f"law.{value}"] = (label(value), {**counts, "beyond": excess, **errors})
        return table_of("One quadratic in forward KL for all arms", "", rows, columns)

    return make


def rank_table(compared: Compared) -> Keyed:
    """Whether over the arms what is kept follows the KL: `ranks.correlation`, of `ranks.arms`."""
    kept = {arm: (of["prior"], of[KL]) for arm, of in compared.kept.items()}
    reached = [{"arm": arm[0], "prior": prior.mean, KL: kl.mean} for arm, (prior, kl) in kept.items() if prior and kl]
    found = correlation(pl.DataFrame(reached), KL, "prior", "arm", samples=0) if reached and compared.reached else None
    rank = NEVER if found is None else number(found.spearman)
    cells = {"arms": str(len(reached)), "correlation": rank}
    columns = {"arms": "arms that get there", "correlation": "rank correlation of prior kept and forward KL"}
    return Keyed(f"Over the arms, at new ≥ {compared.at:.0%}", "", columns, {"ranks": ("all arms", cells)})


def ends_of(points: pl.DataFrame, *, first: bool = False) -> pl.DataFrame:
    """The last checkpoint of each run, or the first."""
    step = pl.col("step")
    return points.filter(step == (step.min() if first else step.max()).over("trajectory"))


@dataclass(frozen=True)
class ArmGroup:
    """Arms of which the best is asked for: `key` names it in numbers, `title` for people."""

    key: str
    title: str
    holds: Callable[[Arm], bool]


def best_table(groups: Sequence[ArmGroup], against: Mapping[str, Arm]) -> TableOf:
    """The best arm of each group, chosen as a learning rate is, on the other seeds; beside each of `against`.

    `against`: name for people -> arm. Numbers: `GROUP.arm`, `GROUP.prior`, `GROUP.kl`, and for each arm compared with
    `GROUP.ARM.gap`, `GROUP.ARM.verdict`.
    """

    def make(compared: Compared) -> Keyed:
        unit = compared.study.kl_unit
        columns = {"arm": "the best", "prior": "prior kept, %", "kl": f"forward KL, {unit}"}
        columns |= {"gap": "difference, points", "verdict": "verdict"}
        rows = {}
        for group in groups:
            best, seeds = best_of(compared, group), len(compared.study.seeds)
            prior, kl = mean_of(best, "prior"), mean_of(best, KL)
            names = [compared.label(arm) for arm in best.sort("seed").select(compared.of.by).rows()]
            cells = {"arm": by_seeds(names), "prior": with_seeds(written(prior), prior, seeds)}
            rows[group.key] = (group.title, {**cells, "kl": written(kl, nats), "gap": "", "verdict": ""})
            for name, arm in against.items():
                gap = compared.gap_of(best, arm)
                shown = {"gap": signed(gap), "verdict": str(verdict(gap, seeds))}
                rows[f"{group.key}.{compared.key(arm)}"] = (f"minus {name}", {**dict.fromkeys(columns, ""), **shown})
        return Keyed(f"The best at new ≥ {compared.at:.0%}", "of", columns, rows)

    return make


def best_of(compared: Compared, group: ArmGroup) -> pl.DataFrame:
    """The checkpoint of each seed, of the arm and the learning rate that the other seeds chose; empty without any."""
    own = [compared.rows(arm) for arm in compared.arms if group.holds(arm)]
    if not own or not compared.reached:
        return compared.points.clear()
    return matched(pl.concat(own), [], compared.at, compared.of.by)
