"""Tables that a study may add to the engine's own: one law for all arms, and the best of several arms."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

import polars as pl

from rlrazor.analysis import law
from rlrazor.analysis.law import LeftOut, Quadratic
from rlrazor.analysis.statistics import Estimate, Verdict, correlation, estimate_of, floats, verdict
from rlrazor.errors import RazorError
from rlrazor.report.keyed import WORDS, Judged, Keyed
from rlrazor.report.text import NEVER, nats, number, percent, signed, written
from rlrazor.studies.engine import KL, Arm, Compared, TableOf, seeds_of

Row = TypeVar("Row")
Value = Estimate | str | None

MORE_OR_LESS: Mapping[Verdict, str] = {**WORDS, Verdict.BETTER: "more", Verdict.WORSE: "less"}
"""The verdicts where neither is better."""


@dataclass(frozen=True, eq=False)
class SharedLaw:
    """One quadratic of forgetting in forward KL through all checkpoints, which are `rows`, with `beyond`, the rest."""

    quadratic: Quadratic
    r2: float
    rows: pl.DataFrame

    @classmethod
    def fit(cls, points: pl.DataFrame) -> "SharedLaw | None":
        """None where the checkpoints are too few."""
        rows = points.filter(pl.col(KL).is_finite(), pl.col("forgetting").is_finite())
        x, y = floats(rows, KL), floats(rows, "forgetting")
        try:
            quadratic = law.fit_quadratic(x, y)
            r2 = law.r_squared(y, quadratic.predict(x))
        except RazorError:
            return None
        return cls(quadratic, r2, rows.with_columns(beyond=pl.Series(y - quadratic.predict(x))))

    def beyond(self, by: str) -> dict[str, Estimate]:
        """By value of the column `by`, what is forgotten beyond the law: the mean of each seed, then over seeds."""
        per_seed = self.rows.group_by(by, "seed", maintain_order=True).agg(pl.col("beyond").mean()).sort("seed")
        names = self.rows[by].unique(maintain_order=True).to_list()
        return {name: Estimate.over(per_seed.filter(pl.col(by) == name)["beyond"].to_list()) for name in names}

    def left_out(self, fit: law.FitLaw, by: str) -> LeftOut | None:
        """The error on each value of `by` of a law fitted to the others."""
        with suppress(RazorError):
            x, y = floats(self.rows, KL), floats(self.rows, "forgetting")
            return law.leave_one_method_out(fit, x, y, self.rows[by].to_list())
        return None


def law_table(by: str, label: Callable[[str], str]) -> TableOf:
    """Whether one quadratic in forward KL serves all arms: what is forgotten beyond it, by the column `by`.

    Its numbers are `law.r2` and `law.VALUE.beyond`, ...: `law.VALUE.error` is on checkpoints left out of the fit.
    """

    def make(compared: Compared) -> Keyed:
        columns = {
            "checkpoints": "checkpoints",
            "r2": "R²",
            "beyond": "beyond the law, points",
            "error": "left-out error",
            "guess": "guessing the others’ mean",
        }
        shared = SharedLaw.fit(compared.points)
        rows = {"law": ("all", {**dict.fromkeys(columns, NEVER), "checkpoints": f"{len(compared.points):,}"})}
        if shared:
            rows["law"][1]["r2"] = number(shared.r2)
            errors, guesses = (shared.left_out(fit, by) for fit in (law.fit_quadratic, law.fit_constant))
            for value, beyond in shared.beyond(by).items():
                cells = {
                    "checkpoints": f"{shared.rows.filter(pl.col(by) == value).height:,}",
                    "r2": NEVER,
                    "beyond": signed(beyond),
                    "error": percent(errors.by_method[value] if errors else None),
                    "guess": percent(guesses.by_method[value] if guesses else None),
                }
                rows[f"law.{value}"] = (label(value), cells)
        return Keyed("One quadratic in forward KL for all arms", "", columns, rows)

    return make


def rank_table(compared: Compared) -> Keyed:
    """Whether over the arms what is kept follows the KL: `ranks.correlation`, of `ranks.arms`."""
    reached = pl.DataFrame(list(compared.kept.values()), infer_schema_length=None).drop_nulls(KL)
    found = correlation(reached, KL, "prior", by=compared.of.by[0], samples=0) if compared.reached else None
    rank = NEVER if found is None else number(found.spearman).replace("-", "−")
    cells = {"arms": str(len(reached)), "correlation": rank}
    columns = {"arms": "arms that get there", "correlation": "rank correlation of prior kept and forward KL"}
    return Keyed(f"Over the arms, at new ≥ {compared.at:.0%}", "", columns, {"ranks": ("all arms", cells)})


def ends_of(points: pl.DataFrame) -> pl.DataFrame:
    """The last checkpoint of each run."""
    return points.filter(pl.col("step") == pl.col("step").max().over("trajectory"))


@dataclass(frozen=True)
class Group:
    """Arms of which the best is asked for: `key` names it in numbers, `title` for people."""

    key: str
    title: str
    holds: Callable[[Arm], bool]


def best_table(groups: Sequence[Group], against: Mapping[str, Arm]) -> TableOf:
    """The arm of each group that keeps most, of those that get there in all seeds, beside each of `against`.

    `against`: name for people -> arm. Numbers: `GROUP.arm`, `GROUP.prior`, `GROUP.kl`, and for each arm compared with
    `GROUP.ARM.gap`, `GROUP.ARM.verdict`. The best is chosen on the score shown.
    """

    def make(compared: Compared) -> Keyed:
        unit = compared.study.kl_unit
        columns = {"arm": "the best", "prior": "prior kept, %", "kl": f"forward KL, {unit}"}
        columns |= {"gap": "difference, points", "verdict": "verdict"}
        rows = {}
        for group in groups:
            best = best_of(compared, group)
            cells = {**dict.fromkeys(columns, NEVER), "gap": "", "verdict": ""}
            if best:
                row = compared.kept[best]
                cells |= {"arm": compared.label(best), "prior": written(estimate_of(row, "prior"))}
                cells["kl"] = written(estimate_of(row, KL), nats)
            rows[group.key] = (group.title, cells)
            for name, arm in against.items():
                judged = compared.judge(best, arm) if best else Judged(name, None, Verdict.APART)
                shown = {"gap": signed(judged.gap), "verdict": str(judged.verdict)}
                rows[f"{group.key}.{compared.key(arm)}"] = (f"minus {name}", {**dict.fromkeys(columns, ""), **shown})
        return Keyed(f"The best at new ≥ {compared.at:.0%}", "of", columns, rows)

    return make


def best_of(compared: Compared, group: Group) -> Arm | None:
    """Who keeps most on average, among those that get there in all seeds."""
    seeds = len(compared.study.seeds)
    whole = {
        arm: compared.kept[arm]["prior"]
        for arm in compared.arms
        if group.holds(arm) and compared.reached and compared.kept[arm]["n_seeds"] == seeds
    }
    return max(whole, key=lambda arm: whole[arm]) if whole else None


@dataclass(frozen=True)
class Column(Generic[Row]):
    """What a table says of each of its rows: a number over seeds, written by `form`, or a word.

    With `judge` it is a difference, whose `key` ends in `gap`: its seeds and the verdict on it stand beside it, as `n`
    and `verdict` with the same beginning.
    """

    key: str
    header: str
    of: Callable[[Row], Value]
    form: Callable[[Estimate | None], str] = written
    judge: Callable[[Estimate | None, int], str] | None = None


def gap(
    key: str,
    header: str,
    of: Callable[[Row], Value],
    judge: Callable[[Estimate | None, int], str] = verdict,
) -> Column[Row]:
    """A difference that is judged; a word where a row is not compared."""
    return Column(key, header, of, signed, judge)


def table_of(
    title: str, corner: str, rows: Mapping[str, tuple[str, Row]], columns: Sequence[Column[Row]], seeds: int
) -> Keyed:
    """A table, column by column; `rows`: key -> name and what the columns are of. `seeds`: those of the study."""
    headers: dict[str, str] = {}
    cells: dict[str, dict[str, str]] = {key: {} for key in rows}
    for column in columns:
        start = column.key.removesuffix("gap")
        own = {column.key: column.header}
        if column.judge:
            own |= {f"{start}n": "seeds", f"{start}verdict": "verdict"}
        headers |= own
        for key, (_, row) in rows.items():
            cells[key] |= dict(zip(own, _cells(column, column.of(row), seeds), strict=True))
    return Keyed(title, corner, headers, {key: (name, cells[key]) for key, (name, _) in rows.items()})


def _cells(column: Column[Row], value: Value, seeds: int) -> list[str]:
    """What a column, and those beside it, say of a row."""
    if isinstance(value, str):
        return [value] * (3 if column.judge else 1)
    text, got = column.form(value), value.seeds if value else 0
    if column.judge:
        return [text, seeds_of(got, seeds), str(column.judge(value, seeds))]
    return [text + (f" ({got} of {seeds} seeds)" if 0 < got < seeds else "")]
