"""The trade-off between the new task and the prior ones: frontier, curve, dominated area, retention.

RL's Razor (arXiv:2509.04259) compares methods at equal new-task accuracy by the Pareto frontier of their checkpoints
(Fig. 3) and a curve through what lies near it (Fig. 6). Throughout, `new` and `prior` are accuracies, fractions of 1
and of shape (n,), and more is better in both. Everything here raises RazorError for NaN or unequal lengths.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special

from rlrazor.analysis.law import Floats, finite
from rlrazor.analysis.matched import matched
from rlrazor.errors import RazorError

Mask = NDArray[np.bool_]


def pareto_set(new: ArrayLike, prior: ArrayLike) -> Mask:
    """Mark the points that none dominates: none is at least as good in both and better in one.

    Equal points do not dominate each other, so all copies of a frontier point are marked. Time O(n log n).
    """
    new, prior = _checked(new, prior)
    _, height, step_of = _staircase(new, prior)
    height_beyond = np.append(height[1:], -np.inf)  # the highest prior at strictly more new
    return np.asarray((prior == height[step_of]) & (prior > height_beyond[step_of]))


def near_frontier(new: ArrayLike, prior: ArrayLike, within: float = 0.02) -> Mask:
    """Mark the points within `within` (fraction of 1) below the frontier: RR's choice of models for Fig. 6.

    RR says "within 2 accuracy points of the Pareto frontier" and not how that is measured. Here: vertically to the
    staircase. With F(x) the highest prior among points of new >= x, a point is kept when prior >= F(new) - within.
    """
    new, prior = _checked(new, prior)
    _, height, step_of = _staircase(new, prior)
    return np.asarray(prior >= height[step_of] - within)


def hypervolume(new: ArrayLike, prior: ArrayLike, reference: tuple[float, float] = (0.0, 0.0)) -> float:
    """Area between `reference` and the staircase: what the points dominate. One number for a frontier, 1 at best.

    A point that is not above `reference` in both adds nothing; without points the area is 0.
    """
    new, prior = _checked(new, prior)
    levels, height, _ = _staircase(new, prior)
    widths = np.diff(np.maximum(levels, reference[0]), prepend=reference[0])
    return float(np.sum(widths * np.maximum(height - reference[1], 0)))


@dataclass(frozen=True)
class Exponential:
    """Prior accuracy falls as `level + change * exp(rate * (new - anchor))`.

    Either ever faster (change <= 0 < rate: kept at first, lost towards the end) or ever slower (rate < 0 <= change:
    lost at once). `anchor` is the end of the fitted range where the exponential is largest, 1, so that none overflows
    and `change` is what is lost, or was there to lose.
    """

    level: float
    change: float
    rate: float
    anchor: float

    def predict(self, new: ArrayLike) -> Floats:
        """Prior accuracy at new-task accuracy `new`, for which the fit only speaks within its range."""
        return np.asarray(self.level + self.change * np.exp(self.rate * (np.asarray(new, float) - self.anchor)))


def fit_exponential(new: ArrayLike, prior: ArrayLike) -> Exponential | None:
    """Fit the curve by least squares. None for fewer than 3 different values of `new`, which leave it undetermined."""
    new, prior = _checked(new, prior)
    if len(np.unique(new)) < 3:
        return None
    span = np.ptp(new)

    # Given the rate, level and change are a linear regression; what is left is a search over one number, and a grid
    # over all rates that mean something (nearly a line ... a cliff in a percent of the span) finds its basin.
    def at_rate(log_rate: float, sign: int) -> tuple[Exponential, float]:
        rate, anchor = sign * np.exp(log_rate), new.max() if sign > 0 else new.min()
        bend = np.exp(rate * (new - anchor))
        centred = bend - bend.mean()
        slope = float(centred @ prior) / float(centred @ centred)
        change = min(0.0, slope) if sign > 0 else max(0.0, slope)  # a curve that rises is no trade-off
        curve = Exponential(float(prior.mean() - change * bend.mean()), change, float(rate), float(anchor))
        return curve, float(np.sum((curve.predict(new) - prior) ** 2))

    def best_of(sign: int) -> tuple[Exponential, float]:
        grid = np.log(np.geomspace(0.1, 300, 60) / span)
        best = int(np.argmin([at_rate(log_rate, sign)[1] for log_rate in grid]))
        around = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
        found = optimize.minimize_scalar(lambda log_rate: at_rate(log_rate, sign)[1], bounds=around, method="bounded")
        return at_rate(float(found.x), sign)

    return min(best_of(+1), best_of(-1), key=lambda fit: fit[1])[0]


@dataclass(frozen=True, eq=False)
class TradeOff:
    """A method's trade-off as in RR's Fig. 6: masks over its points, and the curve through the kept ones, if any."""

    pareto: Mask
    kept: Mask
    curve: Exponential | None


def trade_off_curve(new: ArrayLike, prior: ArrayLike, within: float = 0.02) -> TradeOff:
    """Keep the points near the frontier and fit an exponential through them (RR Fig. 6).

    The kept points lie on and below the frontier, so the curve runs a little below it too.
    """
    new, prior = _checked(new, prior)
    kept = near_frontier(new, prior, within)
    return TradeOff(pareto_set(new, prior), kept, fit_exponential(new[kept], prior[kept]))


_RETENTION = {
    "method": pl.String,
    "threshold": pl.Float64,
    "mean": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
    "n_seeds": pl.Int64,
    "seeds_total": pl.Int64,
    "base_prior": pl.Float64,
    "best_new": pl.Float64,
}


def retention(table: pl.DataFrame, thresholds: Sequence[float] = (0.95, 0.96, 0.97)) -> pl.DataFrame:
    """How much of the prior tasks each method keeps once it has learnt the new one: a row per method and threshold.

    Needs the columns method, seed, new and prior, and of the runs what `matched` asks for. Per seed, the prior of the
    checkpoint that `rlrazor.analysis.matched` reports at the threshold; then over seeds `mean` and its 95 % t-interval
    `low`, `high` (null for one seed), `n_seeds`, the seeds that reached the threshold, of `seeds_total`. `base_prior`
    is the untuned policy's mean prior over the same `seeds_total`, null where `table` lacks it; `best_new` is the most
    the method ever reached. Methods are in order of first appearance; checkpoints without finite accuracies do not
    count. With `n_seeds` below `seeds_total`, `mean` is over the lucky seeds.
    """
    scored = finite(table, ("new", "prior"))
    base = scored.filter(pl.col("method") == "base")
    tuned = scored.filter(pl.col("method") != "base")
    reported = {threshold: matched(tuned, ["method"], threshold) for threshold in thresholds}
    rows = []
    for method in tuned["method"].unique(maintain_order=True):
        points = tuned.filter(pl.col("method") == method)
        seeds = points["seed"].unique()
        base_prior = base.filter(pl.col("seed").is_in(seeds.to_list()))["prior"].mean()
        for threshold in thresholds:
            kept = reported[threshold].filter(pl.col("method") == method).sort("seed")["prior"]
            low, high = t_interval(kept.to_list())
            rows.append(
                {
                    "method": method,
                    "threshold": threshold,
                    "mean": kept.mean(),
                    "low": low,
                    "high": high,
                    "n_seeds": len(kept),
                    "seeds_total": len(seeds),
                    "base_prior": base_prior,
                    "best_new": points["new"].max(),
                }
            )
    return pl.DataFrame(rows, schema=_RETENTION)


def t_interval(values: Sequence[float]) -> tuple[float, float] | tuple[None, None]:
    """The 95 % t-interval of a mean, one value per seed; (None, None) for fewer than two, or one that is not finite."""
    if len(values) < 2 or not np.isfinite(values).all():
        return None, None
    half = float(special.stdtrit(len(values) - 1, 0.975)) * float(np.std(values, ddof=1)) / len(values) ** 0.5
    mean = float(np.mean(values))
    return mean - half, mean + half


def _staircase(new: Floats, prior: Floats) -> tuple[Floats, Floats, NDArray[np.intp]]:
    """The different values of `new`, ascending; F at each, the highest prior at no less new; each point's place."""
    levels, step_of = np.unique(new, return_inverse=True)
    height = np.full(len(levels), -np.inf)
    np.maximum.at(height, step_of, prior)
    return levels, np.maximum.accumulate(height[::-1])[::-1], step_of


def _checked(new: ArrayLike, prior: ArrayLike) -> tuple[Floats, Floats]:
    new, prior = np.asarray(new, float), np.asarray(prior, float)
    if new.ndim != 1 or new.shape != prior.shape:
        raise RazorError(f"New and prior have to be two lists of one length, not of shapes {new.shape}, {prior.shape}.")
    if not (np.isfinite(new).all() and np.isfinite(prior).all()):
        raise RazorError("Some new or prior accuracy is NaN or infinite; leave those checkpoints out.")
    return new, prior
