"""The claims of the paper's argument, and what the numbers say of each: one rule for all cases, one for the average."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from rlrazor.analysis.statistics import Estimate
from rlrazor.report.text import NEVER
from rlrazor.studies.theory.parts import AGREE, EXACT, GROUP, MIDDLE

HOLDS, FAILS, OPEN = "holds", "does not hold", "cannot be told"


@dataclass(frozen=True)
class Claim:
    """A claim, what the numbers say of it, the one that decides it, and how many cases or seeds that is from."""

    text: str
    verdict: str
    value: str
    count: int


def in_every_case(text: str, misses: pl.Series, open_cases: int = 0) -> Claim:
    """A claim of every case: one that misses by over 1e-6 refutes it, and it is open while a case is, or with none."""
    if misses.is_empty():
        return Claim(text, OPEN, NEVER, open_cases)
    largest = float(np.max(np.abs(misses.to_numpy())))  # NaN where one is
    so_far = OPEN if open_cases else HOLDS
    verdict = so_far if largest <= AGREE else FAILS
    return Claim(text, verdict, in_nats(Estimate(largest, None, 1)), len(misses) + open_cases)


def on_average(text: str, differences: Sequence[float]) -> Claim:
    """A claim that a difference, one per seed, is above 0: open while its 95 % interval holds 0, or has no ends."""
    if not differences:
        return Claim(text, OPEN, NEVER, 0)
    estimate = Estimate.over(differences)
    told = estimate.half is not None and abs(estimate.mean) > max(estimate.half, AGREE)
    verdict = OPEN if not told else HOLDS if estimate.mean > 0 else FAILS
    return Claim(text, verdict, in_nats(estimate), len(differences))


def in_nats(estimate: Estimate | None) -> str:
    """To three decimals, small values to one digit; 0 is what rounding leaves of it."""
    if estimate is None:
        return NEVER
    if abs(estimate.mean) < 1e-12:
        return "0"
    if abs(estimate.mean) < 5e-4:
        return f"{estimate.mean:.0e}"
    return f"{estimate.mean:.3f}" + ("" if estimate.half is None else f" ± {estimate.half:.3f}")


def by_seed(rows: pl.DataFrame, value: str | pl.Expr) -> list[float]:
    """One value per seed that has any, ascending: the mean of its rows."""
    value = pl.col(value) if isinstance(value, str) else value
    means = rows.group_by("seed").agg(value.mean().alias("mean")).sort("seed")
    return means["mean"].drop_nulls().to_list()


def claims_of(tables: Mapping[str, pl.DataFrame]) -> dict[str, Claim]:
    """All of them, by the key that theory.md names them by."""
    return {**_of_alternation(tables), **_of_gradients(tables), **_of_others(tables)}


def _of_alternation(tables: Mapping[str, pl.DataFrame]) -> dict[str, Claim]:
    held = tables["alternation"].filter("realised")["distance"]
    rest = tables["alternation"].filter(~pl.col("realised"))
    decided = rest.filter(~pl.col("moving") | (pl.col("distance") <= AGREE))["distance"]
    inexact = tables["inexact"]
    stay = inexact.drop_nulls("foretold")
    summable = inexact.filter(what="ratios", schedule="0.3/t²")["end"]
    onward, anchored = (inexact.filter(what="ratios", schedule="0.3/t", anchored=how) for how in (False, True))
    return {
        "held": in_every_case("Exact alternation ends at the KL-minimal policy where the class holds it", held),
        "any_class": in_every_case(
            "Where it does not, alternation ends at the nearest that it holds", decided, len(rest) - len(decided)
        ),
        "sum": in_every_case("Errors of M-steps shift the end by their sum", stay["end"] - stay["foretold"]),
        "summable": in_every_case("Errors with a finite sum leave the end where it is", summable),
        "anchored": on_average("Projecting the base in every round forgets errors", _gap(onward, anchored, "end")),
    }


def _of_gradients(tables: Mapping[str, pl.DataFrame]) -> dict[str, Claim]:
    gradients = tables["gradients"]
    uneven, tied = (gradients.filter(base=base) for base in ("uneven", "even"))
    exact = {name: uneven.filter(algorithm=algorithm) for name, algorithm in EXACT.items()}
    middle = pl.col("accuracy") == MIDDLE
    plain, dpg = (exact[name].filter(middle) for name in ("policy-gradient", "kl-dpg"))
    sampled = tied.filter(middle, algorithm=f"GRPO, groups of {GROUP}")
    return {
        "gradient": in_every_case(
            "Policy gradient pays the least KL of its accuracy", exact["policy-gradient"]["excess"]
        ),
        "natural": in_every_case(
            "Natural gradient pays the least KL of its accuracy", exact["natural-gradient"]["excess"]
        ),
        "tie": in_every_case(
            "Every exact gradient does where the base's correct outcomes tie",
            tied.filter(pl.col("group").is_null())["excess"],
        ),
        "sampling": on_average("Sampling costs GRPO KL where they tie", by_seed(sampled, "excess")),
        "dpg": on_average("KL-DPG pays less than policy gradient", _gap(plain, dpg, "excess")),
        "path": in_every_case(
            "GRPO's normalisation keeps policy gradient's path", tables["first_check"]["solver_difference"]
        ),
    }


def _of_others(tables: Mapping[str, pl.DataFrame]) -> dict[str, Claim]:
    steps = tables["m_steps"]
    one, many = (steps.filter(gradient_steps=count) for count in (1, steps["gradient_steps"].max()))
    parity = tables["parity"]
    shares = [] if parity.is_empty() else by_seed(parity.filter(method="grpo"), "share_reverse")
    return {
        "long": on_average("M-steps of many gradient steps pay less than those of one", _gap(one, many, "excess")),
        "network": on_average(
            "Alternation of small networks ends farther than the nearest that was found",
            by_seed(tables["networks"], "gap_alternation"),
        ),
        "parity": on_average(
            "On ParityMNIST over half of GRPO's reverse KL is among correct outputs", [share - 0.5 for share in shares]
        ),
    }


def _gap(more: pl.DataFrame, less: pl.DataFrame, column: str) -> list[float]:
    """Seed by seed."""
    return [high - low for high, low in zip(by_seed(more, column), by_seed(less, column), strict=True)]
