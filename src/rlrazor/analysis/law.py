"""The forgetting law: how well a drift measure explains forgetting, and how sure the data let us be.

Forgetting is the base policy's prior-task accuracy minus the checkpoint's, a fraction of 1 (negative where the prior
tasks improved). RL's Razor (arXiv:2509.04259) reports it to be a function of the forward KL on the new task, whatever
the method: R2 of a 2nd-degree polynomial .96±.01 on ParityMNIST (Table 1). Three questions are asked of that claim:
how good the fit is (R2), how far it would move with other runs (`bootstrap`), and whether it carries over to a method
it never saw (`leave_one_method_out`), the only one of the three that a law "whatever the method" can fail.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import polars as pl
from numpy.polynomial import polynomial
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

from rlrazor.errors import RazorError

Floats = NDArray[np.float64]

MIN_POINTS = 4  # one more than either law has parameters; with three, every R2 is 1
MIN_GROUPS = 5  # 126 distinct resamples; four groups have 35, too few to place two tails of 2.5 %

# Misses beyond two accuracy points count linearly, not squared, in the saturating fit. Two points is one standard error
# of an accuracy over 625 items and four of one over 10,000: what exceeds it is a broken run or a wrong law, not noise.
SOFT_MARGIN = 0.02

# Where a saturating fit may end. a: from one test image in 10,000 to everything. c: outside, a step or a constant. The
# drift at which 63 % of `a` is lost: any, near or far, by this much in its logarithm from the largest that was seen.
LEAST = 1e-4
SHAPES = (0.2, 5.0)
REACH = 25.0


class Law(Protocol):
    """Anything that predicts forgetting (fraction of 1) from a drift measure, both of shape (n,)."""

    def predict(self, x: ArrayLike) -> Floats:
        """Forgetting at drift `x`."""


FitLaw = Callable[[Floats, Floats], Law]


@dataclass(frozen=True)
class Constant:
    """Forgetting is `mean`, whatever the drift: the baseline that any law has to beat."""

    mean: float

    def predict(self, x: ArrayLike) -> Floats:
        """Forgetting at drift `x`."""
        return np.full(np.shape(x), self.mean)


@dataclass(frozen=True)
class Quadratic:
    """Forgetting is `intercept + slope * x + curvature * x**2`: RR's law. It need not be monotone."""

    intercept: float
    slope: float
    curvature: float

    def predict(self, x: ArrayLike) -> Floats:
        """Forgetting at drift `x`."""
        return np.asarray(polynomial.polyval(np.asarray(x, float), (self.intercept, self.slope, self.curvature)))


@dataclass(frozen=True)
class Saturating:
    """Forgetting is `a * (1 - exp(-b * x**c))`: none without drift, monotone increasing, never above `a` <= 1.

    Not in RR: its quadratic turns down again beyond its vertex, which a forecast must not. Negative `x`, which a
    sampled estimate of a KL can be, counts as 0.
    """

    a: float
    b: float
    c: float

    def predict(self, x: ArrayLike) -> Floats:
        """Forgetting at drift `x`."""
        with np.errstate(over="ignore"):  # far beyond where all of `a` is lost
            return np.asarray(-self.a * np.expm1(-self.b * np.maximum(x, 0.0) ** self.c))


def distinct(table: pl.DataFrame) -> pl.DataFrame:
    """Drop the base's rows and the repeats of a (trajectory, step), keeping the order: what every fit uses.

    A constant-schedule run of one epoch is a prefix of the run of two; counting their shared checkpoints twice would
    weight them double. A trajectory belongs to one seed, so its name has to tell seeds apart.
    """
    return table.filter(pl.col("method") != "base").unique(["trajectory", "step"], keep="first", maintain_order=True)


def finite(table: pl.DataFrame, columns: Iterable[str]) -> pl.DataFrame:
    """The rows with a finite number in each of these columns; null is none."""
    return table.filter([pl.col(name).cast(pl.Float64).is_finite() for name in dict.fromkeys(columns)])


def r_squared(y: ArrayLike, predicted: ArrayLike) -> float:
    """Return the share of the variance of `y` that `predicted` explains: at most 1, negative if worse than the mean.

    Raises RazorError where `y` does not vary, since no share of nothing can be explained.
    """
    y = np.asarray(y, float)
    if y.size == 0 or np.ptp(y) == 0:
        raise RazorError("R2 is undefined: forgetting is the same in every row.")
    return float(1 - np.sum((y - predicted) ** 2) / np.sum((y - y.mean()) ** 2))


def fit_constant(x: ArrayLike, y: ArrayLike) -> Constant:
    """Fit the mean of `y`. Raises RazorError as `fit_quadratic` does."""
    return Constant(float(_checked(x, y)[1].mean()))


def fit_quadratic(x: ArrayLike, y: ArrayLike) -> Quadratic:
    """Fit RR's law by least squares, with intercept; `x` drift and `y` forgetting, of shape (n,).

    Raises RazorError for fewer than 4 points, fewer than 3 different `x`, or anything that is not finite.
    """
    x, y = _checked(x, y)
    coefficients, (_, rank, _, _) = polynomial.polyfit(x, y, 2, full=True)
    if rank < 3:
        raise RazorError("A quadratic needs at least 3 different values of the drift.")
    return Quadratic(*map(float, coefficients))


def fit_saturating(x: ArrayLike, y: ArrayLike, start: Saturating | None = None) -> Saturating:
    """Fit the saturating law robustly (soft L1 loss, see SOFT_MARGIN); `x` drift and `y` forgetting, of shape (n,).

    `y` has to be a fraction of 1. `start`, a fit to similar data, spares the search for a starting point. Where `y`
    shows no saturation, `a` and `b` trade off against each other; bounds then keep them finite, and predictions within
    the data's range are unaffected. Raises RazorError for fewer than 4 points, fewer than 3 different `x` (at least 0),
    or anything that is not finite.
    """
    x, y = _checked(x, y)
    if len(np.unique(np.maximum(x, 0))) < 3:
        raise RazorError("A saturating law needs at least 3 different values of the drift (below 0 counts as 0).")
    log_x = np.log(np.maximum(x, 1e-300))  # stands for 0: small enough that every power of it is nothing

    # With s = b**(-1/c), the drift at which 63 % of `a` is lost, the law is a * (1 - exp(-(x / s)**c)). Log s is far
    # less correlated with log c than log b is, and logs keep all three positive.
    def saturation(log_s: float, log_c: float) -> tuple[Floats, Floats]:
        log_u = np.exp(log_c) * (log_x - log_s)
        return np.exp(log_u), log_u

    def residuals(theta: Floats) -> Floats:
        log_a, log_s, log_c = theta
        return np.asarray(-np.exp(log_a) * np.expm1(-saturation(log_s, log_c)[0]) - y)

    def jacobian(theta: Floats) -> Floats:
        log_a, log_s, log_c = theta
        u, log_u = saturation(log_s, log_c)
        a, kept = np.exp(log_a), np.exp(-u)
        by_log_u = a * u * kept
        return np.stack([a * (1 - kept), -np.exp(log_c) * by_log_u, log_u * by_log_u], axis=1)

    top = log_x.max()
    low = np.array([np.log(LEAST), top - REACH, np.log(SHAPES[0])])
    high = np.array([np.log(1.0), top + REACH, np.log(SHAPES[1])])

    def start_at(log_s: float, log_c: float) -> Floats:
        shape = -np.expm1(-saturation(log_s, log_c)[0])
        a = np.dot(shape, y) / max(float(np.dot(shape, shape)), 1e-12)  # least squares: linear in a
        return np.array([np.log(np.clip(a, LEAST, 1.0)), log_s, log_c])

    if start is None:
        scales = [*np.quantile(log_x[x > 0], [0.1, 0.3, 0.5, 0.7, 0.9]), top, top + 1, top + 3]
        starts = [start_at(s, c) for s in scales for c in np.log([0.5, 1.0, 2.0])]
        first = min(starts, key=lambda theta: float(np.abs(residuals(theta)).sum()))
    else:
        first = np.array([np.log(start.a), -np.log(start.b) / start.c, np.log(start.c)])
    fit = optimize.least_squares(  # type: ignore[operator]  # mypy takes it for the module of that name
        residuals,
        np.clip(first, low, high),
        jac=jacobian,
        bounds=(low, high),
        loss="soft_l1",
        f_scale=SOFT_MARGIN,
        max_nfev=100,
    )
    a, s, c = np.exp(fit.x)
    return Saturating(float(a), float(s**-c), float(c))


def bootstrap(
    statistic: Callable[[pl.DataFrame], float],
    table: pl.DataFrame,
    by: str = "trajectory",
    *,
    samples: int = 200,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Return a percentile interval for `statistic(table)`, resampling whole groups of rows with replacement.

    Checkpoints of one run are near copies of each other: drawing them one by one would take each for fresh evidence
    and give an interval far too narrow (Cameron, Gelbach and Miller 2008). Drawn are the groups of `by`. The interval
    does not know what all groups share (the base policy of a seed, the task), and like every percentile interval
    it is a little narrow: for a mean, 95 % covers 92 % of the time with 40 groups and 90 % with 10.

    Resamples on which `statistic` raises RazorError or is not finite are left out. None where half or more are, or
    where there are fewer than 5 groups. The same `seed` gives the same interval.
    """
    rows = table.select(group=by, row=pl.int_range(pl.len()))
    groups = [group.to_numpy() for group in rows.group_by("group", maintain_order=True).agg("row")["row"]]
    if len(groups) < MIN_GROUPS:
        return None
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(samples):
        drawn = rng.integers(len(groups), size=len(groups))
        try:
            values.append(statistic(table[np.concatenate([groups[i] for i in drawn])]))
        except RazorError:
            continue
    values = [value for value in values if np.isfinite(value)]
    if 2 * len(values) <= samples:
        return None
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class LeftOut:
    """Mean absolute error (fraction of 1) on each method by a law fitted to the others, and the mean over methods."""

    by_method: dict[str, float]
    mean: float


def leave_one_method_out(fit: FitLaw, x: ArrayLike, y: ArrayLike, methods: Sequence[str]) -> LeftOut:
    """Fit to all methods but one, predict that one, for each in order of first appearance.

    `x` drift, `y` forgetting and `methods` have shape (n,). `fit=fit_constant` is the baseline: it predicts the other
    methods' mean forgetting. A method counts once in the mean, however many checkpoints it has.
    Raises RazorError for fewer than 2 methods, or where `fit` does.
    """
    missed = np.abs(left_out_residuals(fit, x, y, methods))
    method_of = np.asarray(methods)
    errors = {name: float(np.mean(missed[method_of == name])) for name in dict.fromkeys(methods)}
    return LeftOut(errors, float(np.mean(list(errors.values()))))


def left_out_residuals(fit: FitLaw, x: ArrayLike, y: ArrayLike, methods: Sequence[str]) -> Floats:
    """What each checkpoint forgets beyond what a law fitted to the other methods predicts, signed, of shape (n,).

    Arguments and errors are those of `leave_one_method_out`, whose errors are the means of its absolute values.
    """
    x, y = _checked(x, y)
    method_of = np.asarray(methods)
    names = list(dict.fromkeys(methods))
    if len(names) < 2:
        raise RazorError("Leaving one method out needs checkpoints of at least 2 methods.")
    residuals = np.empty_like(y)
    for name in names:
        held_out = method_of == name
        residuals[held_out] = y[held_out] - fit(x[~held_out], y[~held_out]).predict(x[held_out])
    return residuals


def r2_within_methods(fit: FitLaw, x: ArrayLike, y: ArrayLike, methods: Sequence[str]) -> dict[str, float]:
    """R2 of the law fitted to each method alone, in order of first appearance; arrays of shape (n,).

    A law can hold within every method and not across them. Methods with too few checkpoints for a fit, or all of one
    forgetting, are not in the result.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    method_of, found = np.asarray(methods), {}
    for name in dict.fromkeys(methods):
        own = method_of == name
        with suppress(RazorError):
            found[name] = r_squared(y[own], fit(x[own], y[own]).predict(x[own]))
    return found


@dataclass(frozen=True)
class LawSummary:
    """How one law, fitted to one predictor, does. None where the table is too small to say.

    `r2` with its 95 % bootstrap interval over trajectories; `r2_seed_mean` and `r2_seed_sd` are over one fit per seed.
    That last pair is what RR's .96±.01 is compared with; RR does not say what its ± is.
    """

    law: Quadratic | Saturating
    r2: float
    r2_interval: tuple[float, float] | None
    r2_seed_mean: float | None
    r2_seed_sd: float | None
    left_out: LeftOut | None


def r2_of(fit: LawSummary | None) -> float | None:
    """R2, if there is a fit."""
    return fit.r2 if fit else None


def error_of(fit: LawSummary | LeftOut | None) -> float | None:
    """The mean left-out error, if there is one."""
    left_out = fit.left_out if isinstance(fit, LawSummary) else fit
    return left_out.mean if left_out else None


@dataclass(frozen=True)
class FitCounts:
    """What the checkpoints of the fits are of; `skipped` ones had no finite drift or forgetting."""

    trajectories: int
    methods: int
    seeds: int
    skipped: int


@dataclass(frozen=True)
class PredictorSummary:
    """How well one drift measure explains forgetting, by the `checkpoints` that the fits used.

    `spearman` is the rank correlation. A law is None where it cannot be fitted; `baseline` is the other methods' mean
    forgetting.
    """

    predictor: str
    checkpoints: int
    counts: FitCounts
    spearman: float | None
    quadratic: LawSummary | None
    saturating: LawSummary | None
    baseline: LeftOut | None

    def as_json(self) -> dict[str, Any]:
        """All of it, the counts side by side."""
        whole = asdict(self)
        return {
            "predictor": whole.pop("predictor"),
            "checkpoints": whole.pop("checkpoints"),
            **whole.pop("counts"),
            **whole,
        }


def summarise(
    table: pl.DataFrame,
    predictors: Sequence[str] = ("kl_forward", "kl_reverse", "total_variation"),
    *,
    samples: int = 200,
) -> list[PredictorSummary]:
    """Summarise each of `predictors` that `table` has, over its distinct checkpoints.

    `samples` are the bootstrap's. What a small table cannot tell is None; nothing raises for its size.
    """
    rows = distinct(table)
    return [_summarise(rows, name, samples) for name in predictors if name in rows.columns]


def _summarise(rows: pl.DataFrame, predictor: str, samples: int) -> PredictorSummary:
    columns = rows.select("trajectory", "method", "seed", "forgetting", drift=pl.col(predictor).cast(pl.Float64))
    measured = finite(columns, ("drift", "forgetting"))
    return PredictorSummary(
        predictor,
        checkpoints=len(measured),
        counts=FitCounts(
            trajectories=measured["trajectory"].n_unique(),
            methods=measured["method"].n_unique(),
            seeds=measured["seed"].n_unique(),
            skipped=len(rows) - len(measured),
        ),
        spearman=_spearman(*_arrays(measured)),
        quadratic=_summarise_law(fit_quadratic, measured, samples),
        saturating=_summarise_law(fit_saturating, measured, samples),
        baseline=_left_out(fit_constant, measured),
    )


def _summarise_law(
    fit: Callable[[Floats, Floats], Quadratic | Saturating], measured: pl.DataFrame, samples: int
) -> LawSummary | None:
    x, y = _arrays(measured)
    try:
        law = fit(x, y)
        r2 = r_squared(y, law.predict(x))
    except RazorError:
        return None

    def r2_of(resample: pl.DataFrame) -> float:
        x, y = _arrays(resample)
        # Resamples look like the whole: a search that starts at its fit takes a fifth of the time.
        again = fit_saturating(x, y, start=law) if isinstance(law, Saturating) else fit(x, y)
        return r_squared(y, again.predict(x))

    seed_mean, seed_sd = _over_seeds(fit, measured)
    return LawSummary(
        law,
        r2,
        r2_interval=bootstrap(r2_of, measured.select("trajectory", "drift", "forgetting"), samples=samples),
        r2_seed_mean=seed_mean,
        r2_seed_sd=seed_sd,
        left_out=_left_out(fit, measured),
    )


def _over_seeds(fit: FitLaw, measured: pl.DataFrame) -> tuple[float | None, float | None]:
    """Mean and standard deviation of R2 over seeds that allow a fit; None for fewer than two."""
    values = []
    for rows in measured.partition_by("seed"):
        x, y = _arrays(rows)
        try:
            values.append(r_squared(y, fit(x, y).predict(x)))
        except RazorError:
            continue
    return (float(np.mean(values)), float(np.std(values, ddof=1))) if len(values) > 1 else (None, None)


def _left_out(fit: FitLaw, measured: pl.DataFrame) -> LeftOut | None:
    try:
        return leave_one_method_out(fit, *_arrays(measured), measured["method"].to_list())
    except RazorError:
        return None


def _spearman(x: Floats, y: Floats) -> float | None:
    if len(x) < MIN_POINTS or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(stats.spearmanr(x, y).statistic)


def _arrays(table: pl.DataFrame) -> tuple[Floats, Floats]:
    return table["drift"].to_numpy(), table["forgetting"].to_numpy()


def _checked(x: ArrayLike, y: ArrayLike) -> tuple[Floats, Floats]:
    x, y = np.asarray(x, float), np.asarray(y, float)
    if x.ndim != 1 or x.shape != y.shape:
        raise RazorError(
            f"Drift and forgetting have to be two lists of one length, not of shapes {x.shape}, {y.shape}."
        )
    if len(x) < MIN_POINTS:
        raise RazorError(f"A law needs at least {MIN_POINTS} checkpoints; there are {len(x)}.")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise RazorError("Some drift or forgetting is NaN or infinite; leave those checkpoints out.")
    return x, y
