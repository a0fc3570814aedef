"""How well the law of a drift measure serves a method that it was not fitted to.

A law belongs to a base, and every seed has a base of its own: what is asked of a law is asked seed by seed, and then
averaged. Fitted to all seeds at once, a law that holds in each can look as if it held in none.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import polars as pl

from rlrazor.analysis import law
from rlrazor.analysis.frontier import Floats
from rlrazor.analysis.law import PredictorSummary
from rlrazor.analysis.statistics import Estimate, Verdict, floats, verdict
from rlrazor.errors import RazorError

HOLDS = 0.5  # of the variance: a law that explains less than half of it is not one to forecast with
WHERE = ("across methods", "within a method", "nowhere")

ByMethod = Mapping[str, float]


@dataclass(frozen=True)
class Transfer:
    """A measure put to the test. Errors are mean absolute errors on a method left out of the fit, fractions of 1.

    `summary` has the fits to all methods and seeds at once. The rest is by seed: `r2s`, those of the monotone law; and
    by method the means over seeds of `within`, R2 of the law fitted to that method alone, of `errors` by the monotone
    law, of `quadratic_errors`, and of `guesses`, by the other methods' mean forgetting. Errors are empty for fewer than
    two methods.
    """

    summary: PredictorSummary
    r2s: Sequence[float]
    within: ByMethod
    errors: ByMethod
    quadratic_errors: ByMethod
    guesses: ByMethod

    @property
    def column(self) -> str:
        """The measure."""
        return self.summary.predictor

    @property
    def r2(self) -> Estimate | None:
        """R2 of the monotone law over all methods together, a seed at a time, over seeds."""
        return Estimate.over(list(self.r2s)) if self.r2s else None

    @property
    def median_within(self) -> float | None:
        """The median over methods of the law's R2 within one."""
        return float(np.median(list(self.within.values()))) if self.within else None

    @property
    def error(self) -> Estimate | None:
        """The mean error over methods, each counting once, and half its t-interval over methods."""
        return over_methods(self.errors)

    @property
    def gain(self) -> Estimate | None:
        """How much smaller the error is than that of guessing, method by method; None for fewer than two methods."""
        return gap(self.guesses, self.errors)

    @property
    def verdict(self) -> Verdict:
        """Whether its law serves a method not in the fit better than guessing does, by the one rule, over methods."""
        return verdict(self.gain, len(self.guesses))

    @property
    def holds(self) -> str:
        """Where the law holds, one of WHERE.

        Across: better than guessing, and it explains HOLDS of forgetting. Within: so it does in the median method.
        """
        if self.verdict == Verdict.BETTER and self.r2 is not None and self.r2.mean >= HOLDS:
            return WHERE[0]
        return WHERE[1] if (self.median_within or 0.0) >= HOLDS else WHERE[2]


def examine(points: pl.DataFrame, column: str, samples: int = 200) -> Transfer:
    """Fit the laws to a measure: to all methods, to each alone, and to all but one.

    `samples` are the bootstrap's, which takes nearly all the time.
    """
    summary = law.summarise(points, [column], samples=samples)[0]
    r2s: list[float] = []
    by_seed: dict[str, list[ByMethod]] = {name: [] for name in ("within", "errors", "quadratic_errors", "guesses")}
    for _, own in points.group_by("seed", maintain_order=True):
        x, y, methods = _columns(own, column)
        with suppress(RazorError):
            r2s.append(law.r_squared(y, law.fit_saturating(x, y).predict(x)))
            by_seed["within"].append(law.r2_within_methods(law.fit_saturating, x, y, methods))
            fits = (law.fit_saturating, law.fit_quadratic, law.fit_constant)
            left_out = [law.leave_one_method_out(fit, x, y, methods).by_method for fit in fits]
            for name, errors in zip(("errors", "quadratic_errors", "guesses"), left_out, strict=True):
                by_seed[name].append(errors)
    return Transfer(summary, r2s, **{name: _over_seeds(found) for name, found in by_seed.items()})


def residuals(points: pl.DataFrame, column: str) -> dict[str, Estimate]:
    """Method -> mean forgetting beyond the monotone law of the other methods and its seed; empty for one method.

    Fractions of 1; positive where the method forgets more than its drift suggests.
    """
    rows = []
    for _, own in points.group_by("seed", maintain_order=True):
        with suppress(RazorError):
            beyond = law.left_out_residuals(law.fit_saturating, *_columns(own, column))
            rows.append(_measured(own, column).with_columns(residual=pl.Series(beyond)))
    if not rows:
        return {}
    means = pl.concat(rows).group_by("method", "seed", maintain_order=True).agg(pl.mean("residual"))
    by_method = means.group_by("method", maintain_order=True).agg("residual")
    return {method: Estimate.over(values) for method, values in by_method.rows()}


def over_methods(values: ByMethod) -> Estimate | None:
    """The mean over methods with a t-interval over methods; None for no method."""
    return Estimate.over(list(values.values())) if values else None


def gap(more: ByMethod, less: ByMethod) -> Estimate | None:
    """Mean of `more` minus `less` over the methods in both, with a t-interval over methods; None for fewer than two."""
    gaps = [more[name] - less[name] for name in more if name in less]
    return Estimate.over(gaps) if len(gaps) > 1 else None


def _over_seeds(by_seed: Sequence[ByMethod]) -> dict[str, float]:
    """Method -> mean over the seeds that have it."""
    names = dict.fromkeys(name for of_seed in by_seed for name in of_seed)
    return {name: float(np.mean([of_seed[name] for of_seed in by_seed if name in of_seed])) for name in names}


def _measured(points: pl.DataFrame, column: str) -> pl.DataFrame:
    return points.filter(pl.col(column).cast(pl.Float64).is_finite(), pl.col("forgetting").is_finite())


def _columns(points: pl.DataFrame, column: str) -> tuple[Floats, Floats, list[str]]:
    rows = _measured(points, column)
    return floats(rows, column), floats(rows, "forgetting"), rows["method"].to_list()
