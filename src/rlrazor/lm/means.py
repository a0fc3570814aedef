"""Means over prompts with their standard errors, which is what every KL is told as."""

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from rlrazor.errors import RazorError
from rlrazor.lm.head import Floats


class MeanKL(NamedTuple):
    """A mean over prompts and its standard error, NaN with fewer than two prompts."""

    mean: float
    stderr: float

    def interval(self, prompts: int, level: float) -> tuple[float, float]:
        """Of a KL: Student's t over so many prompts, from 0 on; of a single one KL itself is taken for the error."""
        error = self.stderr if math.isfinite(self.stderr) else self.mean
        half = float(stdtrit(max(prompts - 1, 1), (1 + level) / 2)) * error
        return max(self.mean - half, 0.0), self.mean + half


def by_prompt(values_N: NDArray[Any], prompt_of_N: NDArray[np.int64]) -> Floats:
    """Means over each prompt's completions, of the prompts that have any."""
    _, prompt_N, counts_P = np.unique(prompt_of_N, return_inverse=True, return_counts=True)
    return np.asarray(np.bincount(prompt_N, weights=values_N) / counts_P)


def mean(values_P: Floats) -> MeanKL:
    """Of independent values; the standard error of one alone is NaN."""
    spread = values_P.std(ddof=1) / np.sqrt(len(values_P)) if len(values_P) > 1 else np.nan
    return MeanKL(float(values_P.mean()), float(spread))


def ratio_of_means(over_P: Floats, under_P: Floats) -> MeanKL:
    """A ratio of means. Its standard error is that of over - ratio * under, divided by the mean of under."""
    if not under_P.any():
        raise RazorError("All completions are empty, so there is no KL per token.")
    ratio = float(over_P.mean() / under_P.mean())
    return MeanKL(ratio, mean(over_P - ratio * under_P).stderr / float(under_P.mean()))
