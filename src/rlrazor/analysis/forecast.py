"""The forecast: how much a checkpoint has forgotten, from its KL to the base alone, with an interval it can rely on.

Fitted to a handful of fine-tuning runs of one base whose prior scores were measured; asked about another run of it.
The point forecast is a `law.Saturating` of one KL, or of a weighted sum of two, whichever forecast best the method, or
run, that was left out (`choose`). The interval is conformal: it makes no assumption on the law being right.

The checkpoints of a run are near copies of one another, so runs, not checkpoints, are what is exchangeable. The
interval is the hierarchical jackknife+ (Lee, Barber and Willett 2023, arXiv:2306.06342; Barber et al. 2021 for the
plain one): with a law fitted to all runs but k, r its residual at a checkpoint of run k and m its forecast here, the
ends are weighted quantiles of m - r and m + r, a run's checkpoints sharing the weight 1/(K+1), and 1/(K+1) lying at
infinity. Residuals are relative to FLOOR + the forecast drop: a checkpoint that has hardly moved cannot have forgotten
much.

What it promises: for a new run drawn like the K of the fit, coverage of at least 2 level - 1, in practice about `level`
(Barber et al. 2021), on average over its checkpoints. With K runs no interval of a level above K/(K+1) is finite:
`attainable`. That holds where the law is one fixed recipe applied to the other runs. Two steps here see all runs: which
KLs the law is of (`choose`), and the weights of two KLs, which the laws without a run take over from the whole fit. So
for a law that was chosen the promise is approximate, as it is for any model chosen on the data of its residuals. What
it cannot promise: anything about a run unlike those of the fit, such as another method or task. `trial` measures what
is left of it there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import ArrayLike
from scipy.optimize import brentq

from rlrazor.analysis.law import Constant, Floats, Quadratic, Saturating, fit_constant, fit_quadratic, fit_saturating
from rlrazor.errors import RazorError

FORWARD, PROBE = "kl_forward", "kl_probe"
CANDIDATES: tuple[tuple[str, ...], ...] = ((PROBE,), (FORWARD,), (FORWARD, PROBE))
"""What a law may be of, the simpler ones first, and of these the one that carries over to methods that it has not seen.

Where all runs are of one method nothing of that shows (docs/law.md has where it was tested).
"""
TIE = 0.05  # a second probe has to be paid for at every measurement: it has to lower the error by this much

LOSS = "loss"  # of training; a baseline. It falls while forgetting rises, if it says anything: its law is a quadratic

GAIN = 0.1  # by which a law has to lower guessing's error: on noise it does one time in four, by a twentieth at most

FLOOR = 0.01  # of a drop, added to it in the scale of residuals: one accuracy point, what noise in the scores is worth
SHARES = (0.0, 0.03, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)  # of the first of two KLs in their sum, that are tried
RANGES = (0.05, 0.2)  # of a forecast drop: up to what a budget is about, up to what shows in use, and beyond
MIN_RUNS = 3


@dataclass(frozen=True)
class KLLaw:
    """Forgetting as a function of the sum of `weights` times the KLs `columns`; without columns, a constant."""

    columns: tuple[str, ...]
    weights: tuple[float, ...]
    law: Saturating | Quadratic | Constant

    def predict(self, kls_ND: ArrayLike) -> Floats:
        """Forgetting (N,), a fraction of 1, at the KLs (N, D), in the order of `columns`."""
        kls_ND = np.asarray(kls_ND, float)
        return self.law.predict(kls_ND @ np.array(self.weights) if self.columns else np.zeros(len(kls_ND)))


def fit_law(kls_ND: Floats, forgetting_N: Floats, columns: Sequence[str], start: KLLaw | None = None) -> KLLaw:
    """Fit by `law.fit_saturating`, whose errors it raises; of two KLs, with the weight that fits best.

    `start`, a fit to similar data, settles that weight and spares the search.
    """
    columns = tuple(columns)
    if not columns:
        return KLLaw((), (), fit_constant(np.zeros(len(forgetting_N)), forgetting_N))
    if columns == (LOSS,):
        return KLLaw(columns, (1.0,), fit_quadratic(kls_ND[:, 0], forgetting_N))
    if len(columns) > 2:
        raise ValueError(f"a law is of one KL or two, not of {len(columns)}")
    if start is not None and isinstance(start.law, Saturating):
        law = fit_saturating(kls_ND @ np.array(start.weights), forgetting_N, start.law)
        return KLLaw(columns, start.weights, law)
    # The two differ by orders of magnitude: each is counted in its own median.
    scales = np.maximum(np.median(kls_ND, axis=0), 1e-12)
    shares = [(1.0,)] if len(columns) == 1 else [(share, 1 - share) for share in SHARES]
    fits = []
    for share in shares:
        weights = np.array(share) / (scales if len(columns) > 1 else 1.0)
        law = fit_saturating(kls_ND @ weights, forgetting_N)
        missed = np.abs(forgetting_N - law.predict(kls_ND @ weights))
        fits.append((float(missed.mean()), KLLaw(columns, tuple(map(float, weights)), law)))
    return min(fits, key=lambda fit: fit[0])[1]


@dataclass(frozen=True)
class LeftOutRun:
    """The law without a run, and by how much it missed that run's checkpoints, relative to FLOOR + its forecast."""

    run: str
    law: KLLaw
    residuals: tuple[float, ...]


@dataclass(frozen=True)
class Forecast:
    """A drop of the prior score, a fraction of 1, and the ends of its interval.

    `extrapolated`: a KL lies above all that the law was fitted to, so the interval may be too narrow.
    """

    drop: float
    low: float
    high: float
    extrapolated: bool


@dataclass(frozen=True)
class Forecaster:
    """A law with what its intervals need. `highest` is the largest of each KL in the fit.

    `base_score`, of the prior tasks, bounds a drop: it lies between base_score - 1 and base_score.
    """

    law: KLLaw
    left_out: tuple[LeftOutRun, ...]
    highest: tuple[float, ...]
    base_score: float

    @property
    def columns(self) -> tuple[str, ...]:
        """The KLs that it needs."""
        return self.law.columns

    def attainable(self, level: float) -> float:
        """The highest level up to `level` at which the interval is finite: K/(K+1) for K runs."""
        runs = len(self.left_out)
        return min(level, runs / (runs + 1))

    def predict(self, kls_ND: ArrayLike, level: float = 0.9) -> tuple[Floats, Floats, Floats]:
        """Drop, low and high, of shape (N,), at the KLs (N, D); the interval's level is `attainable(level)`."""
        kls_ND = np.asarray(kls_ND, float)
        means_KN = np.stack([run.law.predict(kls_ND) for run in self.left_out])
        low_N, high_N = jackknife_plus(
            means_KN, _scale(means_KN), [run.residuals for run in self.left_out], self.attainable(level)
        )
        bounds = self.base_score - 1, self.base_score
        drop_N = np.clip(self.law.predict(kls_ND), *bounds)
        # The whole fit may lie outside of what the fits without a run span; an interval holds its own forecast.
        return drop_N, np.clip(np.minimum(low_N, drop_N), *bounds), np.clip(np.maximum(high_N, drop_N), *bounds)

    def forecast(
        self, kls: Mapping[str, float], level: float = 0.9, stderr: Mapping[str, float] | None = None
    ) -> Forecast:
        """The forecast at these KLs, in nats; with their standard errors, the interval covers KL +- 2 of them too.

        Raises RazorError where a KL that the law needs is not there.
        """
        missing = [name for name in self.columns if name not in kls]
        if missing:
            raise RazorError(f"This law is of {' and '.join(self.columns)}, and {missing[0]} was not measured.")
        here_D = np.array([kls[name] for name in self.columns])
        spread_D = np.array([2 * (stderr or {}).get(name, 0.0) for name in self.columns])
        spread_D = np.where(np.isfinite(spread_D), spread_D, 0.0)
        drops, lows, highs = self.predict([here_D, np.maximum(here_D - spread_D, 0), here_D + spread_D], level)
        extrapolated = any(kls[name] > top for name, top in zip(self.columns, self.highest, strict=True))
        return Forecast(float(drops[0]), float(lows.min()), float(highs.max()), extrapolated)

    def remaining(
        self,
        kls: Mapping[str, float],
        budget: float,
        *,
        cautious: bool = False,
        level: float = 0.9,
        stderr: Mapping[str, float] | None = None,
    ) -> dict[str, float]:
        """How many nats each KL may still grow, in proportion to what they are, until the forecast reaches `budget`.

        With `cautious`, until the upper end of its interval does, of that level and these standard errors; in any case
        no further than the law was fitted to. 0 where it is there already.
        """
        here_D, highest_D = np.array([kls[name] for name in self.columns]), np.array(self.highest)
        # Before anything has moved, in proportion to what the runs of the fit came to.
        pace_D = here_D if (here_D > 0).any() else highest_D
        grows_D = pace_D > 0
        reach = float(((highest_D - here_D)[grows_D] / pace_D[grows_D]).min(initial=np.inf)) if grows_D.any() else 0.0

        def short(times: float) -> float:
            there = dict(zip(self.columns, here_D + times * pace_D, strict=True))
            found = self.forecast(there, level, stderr)
            return budget - (found.high if cautious else found.drop)

        if reach <= 0 or short(0.0) <= 0:
            return dict.fromkeys(self.columns, 0.0)
        # Laws grow with KL, and so do the quantiles of them that are the ends of an interval: there is one crossing.
        times = reach if short(reach) > 0 else float(brentq(short, 0.0, reach, xtol=1e-12, rtol=1e-9))
        return dict(zip(self.columns, map(float, times * pace_D), strict=True))


def jackknife_plus(
    means_KN: Floats, scales_KN: Floats, residuals: Sequence[Sequence[float]], level: float
) -> tuple[Floats, Floats]:
    """The hierarchical jackknife+ interval (N,), (N,): infinite where `level` is above K/(K+1).

    `means_KN`: the forecasts of the N points by the law without run k, `scales_KN` what a relative residual is
    multiplied by there, `residuals` the absolute relative residuals of each run's checkpoints under that law. With one
    checkpoint a run and scales of 1 it is the jackknife+ of Barber et al. 2021.
    """
    runs = len(residuals)
    sizes = [len(of_run) for of_run in residuals]
    run_M = np.repeat(np.arange(runs), sizes)
    weights_M = np.repeat([1 / ((runs + 1) * size) for size in sizes], sizes)
    reach_MN = np.concatenate([np.abs(of_run) for of_run in residuals])[:, None] * scales_KN[run_M]
    upper = _quantile(means_KN[run_M] + reach_MN, weights_M, level)
    return -_quantile(-(means_KN[run_M] - reach_MN), weights_M, level), upper


def _quantile(values_MN: Floats, weights_M: Floats, mass: float) -> Floats:
    """The smallest value (N,) up to which the weights reach `mass`; infinite where they never do."""
    order_MN = np.argsort(values_MN, axis=0, kind="stable")
    reached_MN = np.cumsum(weights_M[order_MN], axis=0) >= mass - 1e-9
    first_N = reached_MN.argmax(axis=0)
    found_N = np.take_along_axis(np.take_along_axis(values_MN, order_MN, axis=0), first_N[None], axis=0)[0]
    return np.where(reached_MN.any(axis=0), found_N, np.inf)


def _scale(forecast: Floats) -> Floats:
    return FLOOR + np.maximum(forecast, 0.0)


def relative_residuals(law: KLLaw, kls_ND: Floats, forgetting_N: Floats) -> Floats:
    """By how much a law misses what was forgotten at the KLs (N, D), relative to FLOOR + its forecast: (N,)."""
    predicted_N = law.predict(kls_ND)
    return np.abs(forgetting_N - predicted_N) / _scale(predicted_N)


def fit_forecaster(table: pl.DataFrame, columns: Sequence[str], base_score: float) -> Forecaster:
    """Fit to a table with `trajectory`, `forgetting` and the KLs `columns`, a row per checkpoint of one base.

    Raises RazorError for fewer than 3 runs, or data that allow no fit.
    """
    rows = measured(table, columns)
    runs = rows["trajectory"].unique(maintain_order=True).to_list()
    if len(runs) < MIN_RUNS:
        raise RazorError(f"A forecast needs at least {MIN_RUNS} runs; there are {len(runs)}.")
    kls_ND, forgetting_N = _arrays(rows, columns)
    run_N = rows["trajectory"].to_numpy()
    whole = fit_law(kls_ND, forgetting_N, columns)
    left_out = []
    for run in runs:
        own_N = run_N == run
        law = fit_law(kls_ND[~own_N], forgetting_N[~own_N], columns, whole)
        missed = relative_residuals(law, kls_ND[own_N], forgetting_N[own_N])
        left_out.append(LeftOutRun(str(run), law, tuple(map(float, missed))))
    return Forecaster(whole, tuple(left_out), tuple(map(float, kls_ND.max(axis=0))), base_score)


@dataclass(frozen=True)
class Candidate:
    """Mean absolute error (fraction of 1) of a law of `columns` on what was left out, each unit counting once."""

    columns: tuple[str, ...]
    error: float


@dataclass(frozen=True)
class Choice:
    """Which KLs forecast best. `by` is what was left out: `method`, or `run` where there is one method only.

    `guess` is the error of guessing the mean forgetting of the rest: where no candidate is well below it, nothing was
    found that a forecast could rest on (`useful`).
    """

    by: str
    candidates: tuple[Candidate, ...]
    guess: float

    @property
    def best(self) -> Candidate:
        """The first, simplest candidate whose error is within TIE of the lowest."""
        lowest = min(candidate.error for candidate in self.candidates)
        return next(candidate for candidate in self.candidates if candidate.error <= (1 + TIE) * lowest)

    @property
    def useful(self) -> bool:
        """Whether the best is better than guessing by more than luck would have it: by GAIN."""
        return self.best.error <= (1 - GAIN) * self.guess


def choose(table: pl.DataFrame, candidates: Sequence[Sequence[str]] = CANDIDATES) -> Choice:
    """Leave each method out in turn, or each run where there is only one, and forecast it by a law of the rest.

    Candidates whose KLs the table does not have are passed over. Raises RazorError where none is left, or for too few
    runs.
    """
    there = {name for name in table.columns if table[name].null_count() < len(table)}
    found = [tuple(columns) for columns in candidates if set(columns) <= there]
    if not found:
        raise RazorError("The table has none of the KLs that a law could be of.")
    rows = measured(table, sorted({name for columns in found for name in columns}))
    by = "method" if rows["method"].n_unique() > 1 else "trajectory"
    if rows["trajectory"].n_unique() < MIN_RUNS:
        raise RazorError(f"A forecast needs at least {MIN_RUNS} runs; there are {rows['trajectory'].n_unique()}.")
    errors = [Candidate(columns, _left_out_error(rows, columns, by)) for columns in found]
    return Choice("run" if by == "trajectory" else by, tuple(errors), _left_out_error(rows, (), by))


def _left_out_error(rows: pl.DataFrame, columns: Sequence[str], by: str) -> float:
    errors = []
    for unit in rows[by].unique(maintain_order=True):
        rest, own = rows.filter(pl.col(by) != unit), rows.filter(pl.col(by) == unit)
        law = fit_law(*_arrays(rest, columns), columns)
        kls_ND, forgetting_N = _arrays(own, columns)
        errors.append(float(np.abs(forgetting_N - law.predict(kls_ND)).mean()))
    return float(np.mean(errors))


@dataclass(frozen=True)
class RangeError:
    """How wrong forecasts above `low` and up to `high` were, drops as fractions of 1.

    `error`: mean absolute error over the `checkpoints` of such a forecast, each of their `runs` counting once; `guess`:
    the same of the mean of what the other runs' checkpoints in this range forgot, over the runs that there are others
    to. None where there are none.
    """

    low: float
    high: float
    checkpoints: int
    runs: int
    error: float | None
    guess: float | None


def errors_by_range(forecasts: Sequence[ArrayLike], measured_drops: Sequence[ArrayLike]) -> list[RangeError]:
    """The error in each range of what was forecast: an array a run of its forecasts, and one of what it did forget.

    By what was forecast, as that is what a user has: a ruined model that was forecast to be well counts where it was
    taken for well. Guessing knows the range and nothing more, so a law that is no better tells nothing within it.
    """
    forecast_N = np.concatenate([np.asarray(of_run, float) for of_run in forecasts] or [np.empty(0)])
    drop_N = np.concatenate([np.asarray(of_run, float) for of_run in measured_drops] or [np.empty(0)])
    run_N = np.repeat(np.arange(len(forecasts)), [len(np.atleast_1d(of_run)) for of_run in forecasts])
    found = []
    for low, high in zip((-np.inf, *RANGES), (*RANGES, np.inf), strict=True):
        within_N = (forecast_N > low) & (forecast_N <= high)
        errors, guesses = [], []
        for run in np.unique(run_N[within_N]):
            own_N, rest_N = within_N & (run_N == run), within_N & (run_N != run)
            errors.append(float(np.abs(drop_N[own_N] - forecast_N[own_N]).mean()))
            if rest_N.any():
                guesses.append(float(np.abs(drop_N[own_N] - drop_N[rest_N].mean()).mean()))
        error = float(np.mean(errors)) if errors else None
        guess = float(np.mean(guesses)) if guesses else None
        found.append(RangeError(max(low, 0.0), high, int(within_N.sum()), len(errors), error, guess))
    return found


@dataclass(frozen=True)
class LawTest:
    """How forecasts of one left-out unit came out: shares of its checkpoints, and means over them, fractions of 1.

    `level`: of the intervals, lower than what was asked for where the law rests on too few runs.
    """

    unit: str
    checkpoints: int
    coverage: float
    width: float
    error: float
    level: float


def trial(
    table: pl.DataFrame,
    columns: Sequence[str],
    by: str,
    base_score: float,
    level: float = 0.9,
    *,
    fitted_to: Sequence[str] = (),
) -> list[LawTest]:
    """Forecast each `by` (a column: method, task, trajectory) by a forecaster fitted to the others.

    With `fitted_to`, those units alone are fitted to, and the others forecast. Intervals are of `level`, or of what the
    runs allow (`attainable`). Units for which the rest allow no fit are left out. Raises RazorError for fewer than two
    units.
    """
    rows = measured(table, columns)
    units = rows[by].unique(maintain_order=True).to_list()
    if len(units) < 2:
        raise RazorError(f"Leaving one {by} out needs at least 2 of them; there are {len(units)}.")
    found = []
    forecaster: Forecaster | None = None
    for unit in units:
        if unit in fitted_to:
            continue
        rest = rows.filter(pl.col(by).is_in(list(fitted_to)) if fitted_to else pl.col(by) != unit)
        own = rows.filter(pl.col(by) == unit)
        if forecaster is None or not fitted_to:
            try:
                forecaster = fit_forecaster(rest, columns, base_score)
            except RazorError:
                continue
        kls_ND, forgetting_N = _arrays(own, columns)
        drop_N, low_N, high_N = forecaster.predict(kls_ND, level)
        inside_N = (forgetting_N >= low_N - 1e-12) & (forgetting_N <= high_N + 1e-12)
        found.append(
            LawTest(
                str(unit),
                len(own),
                float(inside_N.mean()),
                float((high_N - low_N).mean()),
                float(np.abs(drop_N - forgetting_N).mean()),
                forecaster.attainable(level),
            )
        )
    return found


def measured(table: pl.DataFrame, columns: Sequence[str]) -> pl.DataFrame:
    """The rows on which all of it is finite."""
    return table.filter(*(pl.col(name).cast(pl.Float64).is_finite() for name in (*columns, "forgetting")))


def _arrays(rows: pl.DataFrame, columns: Sequence[str]) -> tuple[Floats, Floats]:
    kls_ND = np.empty((len(rows), len(columns)))
    for index, name in enumerate(columns):
        kls_ND[:, index] = rows[name].cast(pl.Float64).to_numpy()
    return kls_ND, rows["forgetting"].to_numpy()
