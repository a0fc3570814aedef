"""Tasks that were learned one after another: the score matrix, and what the field reads from it.

R[i, j] is the score on the j-th task after the i-th stage; row 0 is before any training, and stage i trains the i-th
task. So R has one row more than columns, R[j + 1, j] is a task's score right after it was trained, and the last row is
the end. Scores are fractions of 1.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlrazor.errors import RazorError

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Transfer:
    """What a sequence did to its tasks.

    `accuracy`: ACC, the mean score at the end (arXiv:1706.08840). `backward`: BWT, the mean over all tasks but the last
    of the score at the end minus that right after training; below 0 is forgetting. `forward`: FWT, the mean over all
    tasks but the first of the score right before training minus that before any; None where there is one task, as
    `backward` is. `forgetting`: of each task but the last, the best score that it has had since it was trained, minus
    that at the end (arXiv:1801.10112, which takes the best of all before the end); above 0 is forgetting.
    """

    accuracy: float
    backward: float | None
    forward: float | None
    forgetting: tuple[float, ...]


def transfer(scores: ArrayLike) -> Transfer:
    """What a matrix R, (T + 1, T), says. Raises RazorError for another shape or a missing score."""
    R = checked(scores)
    tasks = R.shape[1]
    own = R[np.arange(1, tasks + 1), np.arange(tasks)]
    before = R[np.arange(tasks), np.arange(tasks)]
    forgetting = tuple(float(R[j + 1 :, j].max() - R[-1, j]) for j in range(tasks - 1))
    if tasks == 1:
        return Transfer(float(R[-1].mean()), None, None, ())
    return Transfer(
        accuracy=float(R[-1].mean()),
        backward=float((R[-1, :-1] - own[:-1]).mean()),
        forward=float((before[1:] - R[0, 1:]).mean()),
        forgetting=forgetting,
    )


def forgotten_by_stage(scores: ArrayLike) -> Floats:
    """(T + 1, T): how far each task is below its best score since it was trained, after each stage; NaN before that."""
    R = checked(scores)
    found = np.full_like(R, np.nan)
    for j in range(R.shape[1]):
        found[j + 1 :, j] = np.maximum.accumulate(R[j + 1 :, j]) - R[j + 1 :, j]
    return found


def checked(scores: ArrayLike) -> Floats:
    """The matrix, as floats. Raises RazorError where it is none of T + 1 stages and T tasks, or lacks a score."""
    R = np.asarray(scores, dtype=np.float64)
    if R.ndim != 2 or R.shape[1] == 0 or R.shape[0] != R.shape[1] + 1:
        raise RazorError(
            f"A score matrix of shape {R.shape} is not one of a sequence: it has a row before any training and one "
            "after each task, and a column for each task."
        )
    if not np.isfinite(R).all():
        raise RazorError("A score matrix lacks a score: measure every task before training and after each stage.")
    return R
