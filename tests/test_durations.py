"""How long things take, in words."""

import pytest

from rlrazor.system.durations import about, took


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.0, "0 s"), (0.0524, "0.052 s"), (0.996, "1.0 s"), (3.24, "3.2 s"), (9.96, "10 s"), (89.9, "90 s"),
     (90, "2 min"), (5369, "89 min"), (5400, "1.5 h"), (36000, "10.0 h")],
)  # fmt: skip
def test_an_estimate(seconds: float, shown: str) -> None:
    assert about(seconds) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(47.2, "47 s"), (59.6, "1 min 0 s"), (125.2, "2 min 5 s"), (3599.7, "1 h 0 min"), (4320, "1 h 12 min")],
)
def test_what_was_measured(seconds: float, shown: str) -> None:
    assert took(seconds) == shown
