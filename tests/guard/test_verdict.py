"""Limits and intervals."""

import math

import pytest

from rlrazor.guard.verdict import Limits, Verdict


@pytest.mark.parametrize(
    ("low", "estimate", "high", "verdict", "cautious", "accepting"),
    [
        (-0.01, 0.0, 0.02, Verdict.WITHIN, Verdict.WITHIN, Verdict.WITHIN),
        (0.03, 0.04, 0.05, Verdict.ABOVE, Verdict.ABOVE, Verdict.ABOVE),
        (-0.237, 0.0, 0.237, Verdict.UNCERTAIN, Verdict.ABOVE, Verdict.WITHIN),
        (0.01, 0.03, 0.05, Verdict.UNCERTAIN, Verdict.ABOVE, Verdict.ABOVE),
        (0.02, 0.03, 0.05, Verdict.UNCERTAIN, Verdict.ABOVE, Verdict.ABOVE),
        (-0.1, 0.01, math.nan, Verdict.UNCERTAIN, Verdict.ABOVE, Verdict.WITHIN),
        (math.nan, math.nan, math.nan, Verdict.UNCERTAIN, Verdict.ABOVE, Verdict.ABOVE),
    ],
)
def test_an_interval_and_a_limit(
    low: float, estimate: float, high: float, verdict: Verdict, cautious: Verdict, accepting: Verdict
) -> None:
    assert Limits().judge(estimate, low, high, 0.02) is verdict
    assert Limits(cautious=True).judge(estimate, low, high, 0.02) is cautious
    assert Limits(accept_uncertain=True).judge(estimate, low, high, 0.02) is accepting
