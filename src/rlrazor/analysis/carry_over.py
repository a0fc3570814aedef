"""How well the law of a drift measure serves a method that it was not fitted to, and who departs from it.

A law belongs to a base, and every seed has a base of its own: what is asked of a law is asked seed by seed, and then
averaged. Fitted to all seeds at once, a law that holds in each can look as if it held in none.

Tables have a row per checkpoint, with `seed`, `method`, `forgetting` and drifts. The law is the monotone one of
forgetting in forward KL, unless another drift is named.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import polars as pl

from rlrazor.analysis import law
from rlrazor.analysis.forecast import FORWARD, measured
from rlrazor.analysis.law import Floats, PredictorSummary
from rlrazor.analysis.statistics import Estimate, Standing, floats, over, verdict
from rlrazor.errors import RazorError

HOLDS = 0.5  # of the variance: a law that explains less than half of it is not one to forecast with
WHERE = ("across methods", "within a method", "nowhere")

ByMethod = Mapping[str, float]
T = TypeVar("T")


@dataclass(frozen=True)
class CarryOver:
    """A measure put to the test. Errors are mean absolute errors on a method left out of the fit, fractions of 1.

    `summary` has the fits to all methods and seeds at once. The rest is by seed: `r2s`, those of the monotone law; and
    by method the means over seeds of `within`, R2 of the law fitted to that method alone, of `errors` by the monotone
    law, of `quadratic_errors`, and of `guesses`, by the other methods' mean forgetting. Errors are empty for fewer than
    two methods. `errors_of_seeds` and `guesses_of_seeds` are those of each seed, by seed.
    """

    summary: PredictorSummary
    r2s: Sequence[float]
    within: ByMethod
    errors: ByMethod
    quadratic_errors: ByMethod
    guesses: ByMethod
    errors_of_seeds: Mapping[int, ByMethod]
    guesses_of_seeds: Mapping[int, ByMethod]

    @property
    def column(self) -> str:
        """The measure."""
        return self.summary.predictor

    @property
    def r2(self) -> Estimate | None:
        """R2 of the monotone law over all methods together, a seed at a time, over seeds."""
        return over(self.r2s)

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
    def verdict(self) -> Standing:
        """Whether its law serves a method not in the fit better than guessing does, by the one rule, over methods."""
        return verdict(self.gain, len(self.guesses))

    @property
    def holds(self) -> str:
        """Where the law holds, one of WHERE.

        Across: better than guessing, and it explains HOLDS of forgetting. Within: so it does in the median method.
        """
        if self.verdict == Standing.BETTER and self.r2 is not None and self.r2.mean >= HOLDS:
            return WHERE[0]
        return WHERE[1] if (self.median_within or 0.0) >= HOLDS else WHERE[2]


def examine(points: pl.DataFrame, column: str, samples: int = 200) -> CarryOver:
    """Fit the laws to a measure: to all methods, to each alone, and to all but one.

    `samples` are the bootstrap's, which takes nearly all the time.
    """
    rows, fits = measured(points, [column]), (law.fit_saturating, law.fit_quadratic, law.fit_constant)

    def alone(own: pl.DataFrame) -> tuple[float, ByMethod]:
        within = law.r2_within_methods(law.fit_saturating, *_columns(own, column), own["method"].to_list())
        return r2(own, column), within

    def left_out(own: pl.DataFrame) -> list[ByMethod]:
        methods = own["method"].to_list()
        return [law.leave_one_method_out(fit, *_columns(own, column), methods).by_method for fit in fits]

    of_seeds = per_seed(rows, alone).values()
    by_seed = per_seed(rows, left_out).items()
    monotone, quadratic, guesses = ({seed: of[place] for seed, of in by_seed} for place in range(len(fits)))
    return CarryOver(
        law.summarise(points, [column], samples=samples)[0],
        [of_seed for of_seed, _ in of_seeds],
        within=over_seeds([within for _, within in of_seeds]),
        errors=over_seeds(monotone.values()),
        quadratic_errors=over_seeds(quadratic.values()),
        guesses=over_seeds(guesses.values()),
        errors_of_seeds=monotone,
        guesses_of_seeds=guesses,
    )


def over_methods(values: ByMethod) -> Estimate | None:
    """The mean over methods with a t-interval over methods; None for no method."""
    return over(values.values())


def gap(more: ByMethod, less: ByMethod) -> Estimate | None:
    """Mean of `more` minus `less` over the methods in both, with a t-interval over methods; None for fewer than two."""
    gaps = [more[name] - less[name] for name in more if name in less]
    return Estimate.over(gaps) if len(gaps) > 1 else None


def over_seeds(by_seed: Collection[ByMethod]) -> dict[str, float]:
    """Method -> mean over the seeds that have it."""
    names = dict.fromkeys(name for of_seed in by_seed for name in of_seed)
    return {name: float(np.mean([of_seed[name] for of_seed in by_seed if name in of_seed])) for name in names}


# Seed by seed


def per_seed(points: pl.DataFrame, of: Callable[[pl.DataFrame], T]) -> dict[int, T]:
    """What a seed's checkpoints come to, by seed; without the seeds that allow no law."""
    found = {}
    for (seed,), rows in points.sort("seed", maintain_order=True).group_by(["seed"], maintain_order=True):
        with suppress(RazorError):
            found[int(str(seed))] = of(rows)
    return found


def r2(rows: pl.DataFrame, drift: str = FORWARD) -> float:
    """Of the law, on the checkpoints of one seed that it was fitted to."""
    x, y = _columns(rows, drift)
    return law.r_squared(y, law.fit_saturating(x, y).predict(x))


def half_lost(rows: pl.DataFrame) -> float:
    """The KL at which half is lost of what the law, a (1 - exp(-b x^c)), loses over the range of its data."""
    x, y = _columns(rows)
    fitted = law.fit_saturating(x, y)
    share = float(fitted.predict(x.max())) / 2 / fitted.a
    return float((-np.log1p(-share) / fitted.b) ** (1 / fitted.c))


def beyond_guessing(rows: pl.DataFrame) -> float:
    """The law's mean absolute error on a method not in the fit, minus that of guessing the others' mean."""
    fits: tuple[law.FitLaw, ...] = (law.fit_saturating, law.fit_constant)
    own, guess = (law.leave_one_method_out(fit, *_columns(rows), rows["method"].to_list()).mean for fit in fits)
    return own - guess


def beyond_others(rows: pl.DataFrame, drift: str = FORWARD) -> Floats:
    """What each checkpoint of a seed forgets beyond the law of the other methods."""
    return law.left_out_residuals(law.fit_saturating, *_columns(rows, drift), rows["method"].to_list())


def beyond_all(rows: pl.DataFrame) -> Floats:
    """The same beyond the law of all, less the mean: the fit is robust, and whoever departs from it moves the mean."""
    x, y = _columns(rows)
    excess = y - law.fit_saturating(x, y).predict(x)
    return np.asarray(excess - excess.mean())


def departures(points: pl.DataFrame, by: str, beyond: Callable[[pl.DataFrame], Floats]) -> dict[str | float, Estimate]:
    """By value of the column `by`, the mean of what its checkpoints forget `beyond` a law of their own seed.

    Empty where no seed allows that law.
    """

    def means(rows: pl.DataFrame) -> dict[str | float, float]:
        own = rows.with_columns(beyond=pl.Series(beyond(rows))).group_by(by, maintain_order=True)
        return dict(own.agg(pl.mean("beyond")).iter_rows())

    seeds = list(per_seed(points, means).values())
    names = dict.fromkeys(name for of_seed in seeds for name in of_seed)
    return {name: Estimate.over([of_seed[name] for of_seed in seeds if name in of_seed]) for name in names}


def _columns(rows: pl.DataFrame, drift: str = FORWARD) -> tuple[Floats, Floats]:
    return floats(rows, drift), floats(rows, "forgetting")
