"""The least KL that a stage costs, held against numerical optimisation over policies, and what is forecast from it."""

import math
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import rel_entr, softmax

from rlrazor.analysis.ahead import Finished, StageForecast, finished_of, forecast, least_kl


def cheapest(before_XY: np.ndarray, scores_XY: np.ndarray, target: float) -> tuple[float, np.ndarray]:
    """The policy with the least mean KL(before || after) among those with this mean score, by SLSQP over logits."""

    def after(logits: np.ndarray) -> np.ndarray:
        return np.asarray(softmax(logits.reshape(before_XY.shape), axis=1))

    found = minimize(
        lambda logits: rel_entr(before_XY, after(logits)).sum(axis=1).mean(),
        np.log(before_XY).ravel(),
        constraints={"type": "eq", "fun": lambda logits: (after(logits) * scores_XY).sum(axis=1).mean() - target},
        options={"maxiter": 500, "ftol": 1e-12},
    )
    assert found.success
    return float(found.fun), after(found.x)


@pytest.mark.parametrize("seed", range(8))
def test_no_policy_gets_to_the_target_for_less(seed: int) -> None:
    """Several prompts, each with outcomes of which some are right, or, in every second case, right in part."""
    rng = np.random.default_rng(seed)
    before_XY = rng.dirichlet(np.ones(5), size=3)
    scores_XY = rng.integers(0, 2, size=(3, 5)) if seed % 2 else rng.uniform(size=(3, 5))
    scores_XY[:, 0], scores_XY[:, 1] = 1, 0
    score = float((before_XY * scores_XY).sum(axis=1).mean())
    for share in (0.2, 0.5, 0.8):
        target = score + share * (0.95 - score)
        least, _ = cheapest(before_XY, scores_XY, target)
        assert least >= least_kl(score, target) - 1e-7
        assert least > 0


@pytest.mark.parametrize(("score", "target"), [(0.1, 0.5), (0.3, 0.9), (0.6, 0.99)])
def test_reweighting_the_right_answers_costs_just_that(score: float, target: float) -> None:
    """Where all prompts are as hard, the bound is attained, by what keeps the ratios among right and wrong answers."""
    right, wrong = np.array([0.5, 0.3, 0.2]), np.array([0.9, 0.1])
    before_XY = np.tile(np.concatenate([score * right, (1 - score) * wrong]), (2, 1))
    scores_XY = np.tile([1, 1, 1, 0, 0], (2, 1))
    least, after_XY = cheapest(before_XY, scores_XY, target)
    assert least == pytest.approx(least_kl(score, target), abs=1e-6)
    reweighted = np.concatenate([target * right, (1 - target) * wrong])
    np.testing.assert_allclose(after_XY, np.tile(reweighted, (2, 1)), atol=1e-3)


def test_what_is_learned_already_costs_nothing_and_never_to_err_costs_anything() -> None:
    assert least_kl(0.9, 0.9) == least_kl(0.95, 0.9) == least_kl(1, 1) == 0
    assert least_kl(0.99, 1) == math.inf
    assert least_kl(0, 0.75) == pytest.approx(math.log(4))


def test_the_first_forecast_is_the_bound() -> None:
    found = forecast(0.5, 0.0, 0.9, [])
    assert found.kl == found.least == found.low == found.high == pytest.approx(0.5 * math.log(25 / 9))
    assert forecast(0.9, 0.0, 0.9, [Finished(0.1, 0.9, 5.0)]).kl == 0


def test_later_forecasts_add_what_the_dearest_stage_cost_beyond_its_bound() -> None:
    least = least_kl(0.2, 0.8)
    dear, cheap = Finished(0.2, 0.9, least + 0.7), Finished(0.2, 0.8, least + 0.1)
    assert dear.excess(0.8) == pytest.approx(0.7)  # more than the target is the method's own doing
    found = forecast(0.4, 0.0, 0.8, [dear, cheap])
    assert found.least == least_kl(0.4, 0.8)
    assert found.kl == pytest.approx(least_kl(0.4, 0.8) + 0.7)
    short = Finished(0.2, 0.5, least_kl(0.2, 0.5) + 0.3)  # did not get there: less had to be paid
    assert forecast(0.4, 0.0, 0.8, [short]).kl == pytest.approx(least_kl(0.4, 0.8) + 0.3)
    assert forecast(0.4, 0.0, 0.8, [Finished(0.79, 0.8, 0.9)]).kl < 2  # its ratio is above 2000
    lucky = Finished(0.2, 0.8, least - 0.1)  # by the error of what was measured: the bound stays
    assert forecast(0.4, 0.0, 0.8, [lucky]).kl == least_kl(0.4, 0.8)


def test_the_scores_error_is_the_forecasts() -> None:
    found = forecast(0.5, 0.05, 0.9, [])
    assert found.low == pytest.approx(least_kl(0.598, 0.9))
    assert found.high == pytest.approx(least_kl(0.402, 0.9))
    assert forecast(0.02, 0.05, 0.9, []).high == pytest.approx(math.log(10))  # no score is below 0


def test_without_a_target_a_stage_is_as_dear_as_the_dearest() -> None:
    assert forecast(0.5, 0.1, 1.0, []) == StageForecast(0, 0, 0, 0)
    assert forecast(0.5, 0.1, 1.0, [Finished(0.1, 0.5, 0.7), Finished(0.5, 0.9, 0.4)]) == StageForecast(
        0, 0.7, 0.7, 0.7
    )


def test_a_sequence_has_a_stage_per_row_after_the_first() -> None:
    rows: list[dict[str, Any]] = [
        {"task": None, "score_a": 0.1, "score_b": 0.2, "new": 0.3, "kl_forward_since_before": None},
        {"task": "a", "score_a": 0.8, "score_b": 0.3, "new": 0.8, "kl_forward_since_before": 1.5},
        {"task": "b", "score_a": 0.7, "score_b": 0.9, "new": 0.9, "kl_forward_since_before": 2.5},
    ]
    assert finished_of(rows) == [Finished(0.1, 0.8, 1.5), Finished(0.3, 0.9, 2.5)]
    assert finished_of(rows[:1]) == []
