"""How a law of each seed's own does: its fit, its error on a method that it never saw, and who departs from it.

Tables have a row per checkpoint, with `seed`, `method`, `kl_forward` and `forgetting`. The law is the monotone one of
forgetting in forward KL. Seeds are fitted one by one, so that what is found has an interval over them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TypeVar

import numpy as np
import polars as pl

from rlrazor.analysis import law
from rlrazor.analysis.law import Floats
from rlrazor.analysis.statistics import Estimate, floats
from rlrazor.errors import RazorError

T = TypeVar("T")


def per_seed(points: pl.DataFrame, of: Callable[[pl.DataFrame], T]) -> dict[int, T]:
    """What a seed's checkpoints come to, by seed; without the seeds that allow no law."""
    found = {}
    for (seed,), rows in points.sort("seed", maintain_order=True).group_by(["seed"], maintain_order=True):
        with suppress(RazorError):
            found[int(str(seed))] = of(rows)
    return found


def over(values: Iterable[float]) -> Estimate | None:
    """The estimate from one value per seed; None for none."""
    found = list(values)
    return Estimate.over(found) if found else None


def r2(rows: pl.DataFrame) -> float:
    """Of the law, on the checkpoints of one seed that it was fitted to."""
    x, y = _columns(rows)
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


def beyond_others(rows: pl.DataFrame) -> Floats:
    """What each checkpoint of a seed forgets beyond the law of the other methods."""
    return law.left_out_residuals(law.fit_saturating, *_columns(rows), rows["method"].to_list())


def beyond_all(rows: pl.DataFrame) -> Floats:
    """The same beyond the law of all, less the mean: the fit is robust, and whoever departs from it moves the mean."""
    x, y = _columns(rows)
    excess = y - law.fit_saturating(x, y).predict(x)
    return np.asarray(excess - excess.mean())


def departures(
    points: pl.DataFrame, by: str, beyond: Callable[[pl.DataFrame], Floats]
) -> dict[str | float, Estimate | None]:
    """By value of the column `by`, the mean of what its checkpoints forget `beyond` a law of their own seed."""

    def means(rows: pl.DataFrame) -> dict[str | float, float]:
        own = rows.with_columns(beyond=pl.Series(beyond(rows))).group_by(by, maintain_order=True)
        return dict(own.agg(pl.mean("beyond")).iter_rows())

    seeds = list(per_seed(points, means).values())
    names = dict.fromkeys(name for of_seed in seeds for name in of_seed)
    return {name: over(of_seed[name] for of_seed in seeds if name in of_seed) for name in names}


def _columns(rows: pl.DataFrame) -> tuple[Floats, Floats]:
    return floats(rows, "kl_forward"), floats(rows, "forgetting")
