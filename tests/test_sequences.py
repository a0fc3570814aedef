"""ACC, BWT, FWT and forgetting, against loops written from their papers' equations."""

import math
import random
from typing import Any

import numpy as np
import pytest

from rlrazor.analysis.sequences import forgotten_by_stage, transfer
from rlrazor.errors import RazorError


@pytest.mark.parametrize("tasks", [2, 3, 6])
def test_each_measure_is_its_equation(tasks: int) -> None:
    rng = random.Random(tasks)
    R = [[rng.random() for _ in range(tasks)] for _ in range(tasks + 1)]
    found = transfer(R)
    # GEM's equations count stages from 1, and R's row 0 is their b.
    last = R[tasks]
    assert found.accuracy == pytest.approx(sum(last) / tasks)
    assert found.backward == pytest.approx(sum(last[i - 1] - R[i][i - 1] for i in range(1, tasks)) / (tasks - 1))
    assert found.forward == pytest.approx(sum(R[i - 1][i - 1] - R[0][i - 1] for i in range(2, tasks + 1)) / (tasks - 1))
    for task, forgotten in enumerate(found.forgetting):
        assert forgotten == pytest.approx(max(R[stage][task] for stage in range(task + 1, tasks + 1)) - last[task])
        assert forgotten >= 0


def test_learning_that_keeps_everything_forgets_nothing() -> None:
    kept = transfer([[0.1, 0.1, 0.1], [0.9, 0.1, 0.1], [0.9, 0.8, 0.1], [0.9, 0.8, 0.7]])
    assert kept.accuracy == pytest.approx(0.8)
    assert (kept.backward, kept.forward) == (0.0, 0.0)
    assert kept.forgetting == (0.0, 0.0)
    lost = transfer([[0.1, 0.2], [0.9, 0.4], [0.3, 0.8]])
    assert lost.backward == pytest.approx(-0.6)
    assert lost.forward == pytest.approx(0.2)
    assert list(lost.forgetting) == pytest.approx([0.6])


def test_of_one_task_nothing_can_be_forgotten() -> None:
    alone = transfer([[0.2], [0.9]])
    assert (alone.accuracy, alone.backward, alone.forward, alone.forgetting) == (0.9, None, None, ())


def test_what_is_forgotten_by_each_stage() -> None:
    found = forgotten_by_stage([[0.1, 0.2], [0.9, 0.4], [0.3, 0.8]])
    assert math.isnan(found[0, 0])
    assert math.isnan(found[1, 1])
    assert found[1, 0] == 0
    assert found[2, 0] == pytest.approx(0.6)
    assert found[2, 1] == 0
    np.testing.assert_array_equal(np.isnan(found), [[True, True], [False, True], [False, False]])


@pytest.mark.parametrize("scores", [[], [[0.1, 0.2], [0.3, 0.4]], [[0.1], [math.nan]], [0.1, 0.2]])
def test_anything_but_a_whole_matrix_is_refused(scores: Any) -> None:
    with pytest.raises(RazorError, match="A score matrix"):
        transfer(scores)
