"""The forecast: its interval against MAPIE and brute force, its coverage on simulated runs, what it refuses."""

import math
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from mapie.regression import CrossConformalRegressor
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import LeaveOneOut

from rlrazor.analysis import forecast, law
from rlrazor.analysis.law import Saturating
from rlrazor.errors import RazorError

TRUE = Saturating(0.8, 1.5, 1.0)


def simulated(
    runs: int, rng: np.random.Generator, *, noise: float = 0.2, methods: int = 2, checkpoints: int = 5
) -> pl.DataFrame:
    """Runs that follow the true law of the probe, each with an error of its own; the new task's KL says nothing."""
    rows = []
    for run in range(runs):
        factor = 1 + noise * rng.normal()
        for step in range(checkpoints):
            probe = 2 * (step + 1) / checkpoints * rng.uniform(0.5, 1)
            rows.append(
                {
                    "trajectory": f"run {run}",
                    "method": f"method {run % methods}",
                    "kl_forward": rng.uniform(0, 5),
                    "kl_probe": probe,
                    "loss": -probe,
                    "forgetting": float(TRUE.predict(probe)) * factor,
                }
            )
    return pl.DataFrame(rows)


@pytest.mark.parametrize("level", [0.5, 0.8, 0.9, 0.95])
def test_with_a_checkpoint_a_run_the_interval_is_the_jackknife_plus_of_mapie(level: float) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(29, 1))
    y = 2 * x[:, 0] + rng.normal(size=29)
    asked = np.linspace(-2, 2, 7)[:, None]
    theirs = CrossConformalRegressor(LinearRegression(), confidence_level=level, method="plus", cv=LeaveOneOut())
    _, intervals = theirs.fit_conformalize(x, y).predict_interval(asked)

    without = [LinearRegression().fit(np.delete(x, i, axis=0), np.delete(y, i)) for i in range(29)]
    residuals = [[abs(y[i] - fit.predict(x[i : i + 1])[0])] for i, fit in enumerate(without)]
    means = np.stack([fit.predict(asked) for fit in without])
    low, high = forecast.jackknife_plus(means, np.ones_like(means), residuals, level)
    assert low == pytest.approx(intervals[:, 0, 0])
    assert high == pytest.approx(intervals[:, 1, 0])


def test_each_run_counts_once_however_many_checkpoints_it_has() -> None:
    """By hand: three runs of weight 1/4; the upper end at 1/2 is where the second run's share is complete."""
    means, scales = np.zeros((3, 1)), np.ones((3, 1))
    residuals = [[1.0] * 50, [2.0, 2.0], [3.0]]
    assert forecast.jackknife_plus(means, scales, residuals, 0.25)[1] == pytest.approx([1.0])
    assert forecast.jackknife_plus(means, scales, residuals, 0.5)[1] == pytest.approx([2.0])
    assert forecast.jackknife_plus(means, scales, residuals, 0.51)[1] == pytest.approx([3.0])
    low, high = forecast.jackknife_plus(means, scales, residuals, 0.76)
    assert (low[0], high[0]) == (-math.inf, math.inf)
    # Half of the second run's weight is enough for 3/8; the scale at the point multiplies the residual.
    low, high = forecast.jackknife_plus(means, 2 * scales, [[1.0], [2.0, 4.0], [5.0]], 0.375)
    assert (low[0], high[0]) == (-4.0, 4.0)


def test_the_interval_covers_new_runs_as_often_as_it_says() -> None:
    """Runs of one law with errors of their own: 200 fits, a new run each; checkpoints of a run share their error."""
    rng = np.random.default_rng(1)
    covered = []
    for _ in range(200):
        table = simulated(12, rng)
        fitted = forecast.fit_forecaster(table.filter(pl.col("trajectory") != "run 11"), ["kl_probe"], 1.0)
        new = table.filter(pl.col("trajectory") == "run 11")
        _, low, high = fitted.predict(new.select("kl_probe").to_numpy(), 0.9)
        y = new["forgetting"].to_numpy()
        covered.append(float(np.mean((low <= y) & (y <= high))))
    # 11 runs: 10 of 12 parts of the weight and up. Four standard errors of a mean of 200 runs.
    assert 0.9 - 4 * np.std(covered) / math.sqrt(200) < np.mean(covered) <= 1


def test_a_law_is_fitted_to_what_forecasts_best() -> None:
    table = simulated(10, np.random.default_rng(2), noise=0.02)
    choice = forecast.choose(table)
    assert choice.by == "method"
    assert choice.useful
    assert choice.best.columns == ("kl_probe",)
    errors = {candidate.columns: candidate.error for candidate in choice.candidates}
    assert errors["kl_probe",] < 0.05 < errors["kl_forward",]
    assert errors["kl_forward", "kl_probe"] < 0.05
    # By hand, for one of them: the mean over methods of the mean absolute error.
    by_hand = law.leave_one_method_out(
        law.fit_saturating, table["kl_probe"], table["forgetting"], table["method"].to_list()
    )
    assert errors["kl_probe",] == pytest.approx(by_hand.mean)
    assert forecast.choose(table.with_columns(method=pl.lit("one"))).by == "run"
    # A KL that was never measured is passed over, whether its column is there or not.
    for without in (table.drop("kl_forward"), table.with_columns(kl_forward=pl.lit(None, pl.Float64))):
        assert [candidate.columns for candidate in forecast.choose(without).candidates] == [("kl_probe",)]
    with pytest.raises(RazorError, match="none of the KLs"):
        forecast.choose(table.drop("kl_forward", "kl_probe"))
    noise = np.random.default_rng(3).uniform(size=len(table))
    useless = table.with_columns(forgetting=pl.Series(noise))
    assert forecast.choose(useless, [("kl_forward",)]).guess == pytest.approx(
        law.leave_one_method_out(law.fit_constant, noise, noise, table["method"].to_list()).mean
    )


def test_two_kls_are_weighed_by_what_they_explain() -> None:
    rng = np.random.default_rng(4)
    kls = rng.uniform(0, 1, size=(200, 2)) * [10.0, 0.1]
    forgetting = TRUE.predict(kls @ [0.1, 10.0])
    fitted = forecast.fit_law(kls, forgetting, ["kl_forward", "kl_probe"])
    assert np.abs(fitted.predict(kls) - forgetting).mean() < 0.01
    alone = [forecast.fit_law(kls[:, [i]], forgetting, [name]) for i, name in enumerate(["kl_forward", "kl_probe"])]
    assert all(np.abs(one.predict(kls[:, [i]]) - forgetting).mean() > 0.05 for i, one in enumerate(alone))


def test_a_budget_is_reached_where_the_law_says() -> None:
    fitted = forecast.fit_forecaster(simulated(8, np.random.default_rng(5), noise=0.0), ["kl_probe"], 1.0)
    room = fitted.remaining({"kl_probe": 0.05}, 0.2)["kl_probe"]
    assert fitted.forecast({"kl_probe": 0.05 + room}).drop == pytest.approx(0.2)
    assert room == pytest.approx(-math.log(1 - 0.2 / 0.8) / 1.5 - 0.05, rel=0.02)
    assert fitted.remaining({"kl_probe": 1.0}, 0.2) == {"kl_probe": 0.0}
    # No further than the law was fitted to, and from below 0, as an estimate may be, with an end.
    (end,) = fitted.highest
    assert fitted.remaining({"kl_probe": 0.5}, 0.95) == {"kl_probe": pytest.approx(end - 0.5)}
    assert fitted.remaining({"kl_probe": end + 0.1}, 0.95) == {"kl_probe": 0.0}
    assert fitted.remaining({"kl_probe": -0.01}, 0.95) == {"kl_probe": pytest.approx(end + 0.01)}
    # Cautiously: until the upper end of the interval is there, with what the KL's own error adds.
    noisy = forecast.fit_forecaster(simulated(12, np.random.default_rng(5)), ["kl_probe"], 1.0)
    here, errors = {"kl_probe": 0.05}, {"kl_probe": 0.01}
    careful = noisy.remaining(here, 0.3, cautious=True, level=0.8, stderr=errors)["kl_probe"]
    assert noisy.forecast({"kl_probe": 0.05 + careful}, 0.8, errors).high == pytest.approx(0.3)
    assert careful < noisy.remaining(here, 0.3)["kl_probe"]
    # Two KLs grow in proportion to what they are; at first, to what the runs came to.

    def beside(law_: forecast.KLLaw) -> forecast.KLLaw:
        return replace(law_, columns=("kl_forward", "kl_probe"), weights=(0.0, *law_.weights))

    left_out = tuple(replace(run, law=beside(run.law)) for run in noisy.left_out)
    two = replace(noisy, law=beside(noisy.law), left_out=left_out, highest=(20.0, *noisy.highest))
    alone = noisy.remaining(here, 0.3)["kl_probe"]
    both = two.remaining({"kl_forward": 1.0, **here}, 0.3)
    assert both == {"kl_forward": pytest.approx(alone / 0.05), "kl_probe": pytest.approx(alone)}
    first = two.remaining({"kl_forward": 0.0, "kl_probe": 0.0}, 0.3)
    assert first["kl_forward"] / first["kl_probe"] == pytest.approx(20.0 / noisy.highest[0])
    assert two.forecast(first).drop == pytest.approx(0.3)
    # A drop is never more than the base's score.
    assert replace(noisy, base_score=0.25).remaining(here, 0.3) == {"kl_probe": pytest.approx(noisy.highest[0] - 0.05)}


def test_an_interval_says_what_it_cannot_know() -> None:
    rng = np.random.default_rng(6)
    few = forecast.fit_forecaster(simulated(4, rng), ["kl_probe"], 0.9)
    assert few.attainable(0.9) == pytest.approx(0.8)
    assert forecast.fit_forecaster(simulated(9, rng), ["kl_probe"], 0.9).attainable(0.9) == pytest.approx(0.9)
    found = few.forecast({"kl_probe": 1.0})
    assert -0.1 <= found.low <= found.drop <= found.high <= 0.9
    assert not found.extrapolated
    beyond = few.forecast({"kl_probe": 2.1})
    assert beyond.extrapolated
    # What the KL's own error adds: the ends are those at KL +- 2 standard errors.
    wide = few.forecast({"kl_probe": 0.5}, stderr={"kl_probe": 0.1})
    ends = [few.forecast({"kl_probe": kl}) for kl in (0.3, 0.5, 0.7)]
    assert wide.low == pytest.approx(min(end.low for end in ends))
    assert wide.high == pytest.approx(max(end.high for end in ends))
    assert wide.drop == ends[1].drop
    # No drift, no forgetting: nothing but the floor is left of the interval.
    still = few.forecast({"kl_probe": 0.0})
    assert still.drop == 0
    assert still.high < 0.02


def test_a_trial_is_what_leaving_out_by_hand_gives() -> None:
    table = simulated(10, np.random.default_rng(7))
    for columns in ([], ["kl_probe"], ["loss"]):
        found = forecast.trial(table, columns, "method", 1.0)
        assert [one.unit for one in found] == ["method 0", "method 1"]
        for one in found:
            own, rest = (table.filter((pl.col("method") == one.unit) == same) for same in (True, False))
            fitted = forecast.fit_forecaster(rest, columns, 1.0)
            y = own["forgetting"].to_numpy()
            drop, low, high = fitted.predict(own.select(columns).to_numpy().reshape(len(y), -1))
            assert one.checkpoints == len(y) == 25
            assert one.coverage == pytest.approx(np.mean((low <= y) & (y <= high)))
            assert one.width == pytest.approx(np.mean(high - low))
            assert one.error == pytest.approx(np.mean(np.abs(y - drop)))
            assert one.level == pytest.approx(5 / 6)  # of five runs
    # Fitted to one method alone.
    (beyond,) = forecast.trial(table, ["kl_probe"], "method", 1.0, fitted_to=["method 0"])
    assert beyond == next(one for one in forecast.trial(table, ["kl_probe"], "method", 1.0) if one.unit == "method 1")
    widths = [forecast.trial(table, columns, "method", 1.0)[0].width for columns in (["kl_probe"], [])]
    assert widths[0] < widths[1]


def test_what_cannot_be_fitted_is_refused() -> None:
    table = simulated(2, np.random.default_rng(8))
    with pytest.raises(RazorError, match="at least 3 runs; there are 2"):
        forecast.fit_forecaster(table, ["kl_probe"], 1.0)
    with pytest.raises(RazorError, match="at least 3 runs"):
        forecast.choose(table)
    with pytest.raises(RazorError, match="none of the KLs"):
        forecast.choose(table.drop("kl_forward", "kl_probe"))
    with pytest.raises(RazorError, match="at least 2 of them"):
        forecast.trial(table.with_columns(task=pl.lit("one")), ["kl_probe"], "task", 1.0)
    fitted = forecast.fit_forecaster(simulated(4, np.random.default_rng(9)), ["kl_probe"], 1.0)
    with pytest.raises(RazorError, match="kl_probe was not measured"):
        fitted.forecast({"kl_forward": 1.0})


def test_errors_by_range_are_of_what_was_forecast_each_run_counting_once() -> None:
    """By hand: three runs; the second was forecast to be well where it had lost 30 points."""
    forecasts = [[0.01, 0.03, 0.10], [0.02], [0.04, 0.5]]
    drops = [[0.02, 0.01, 0.14], [0.30], [0.04, 0.4]]
    low, middle, high = forecast.errors_by_range(forecasts, drops)
    assert (low.low, low.high, low.checkpoints, low.runs) == (0.0, 0.05, 4, 3)
    assert low.error == pytest.approx(((0.01 + 0.02) / 2 + 0.28 + 0.0) / 3)
    # The others' means in the range: (.30 + .04) / 2, (.02 + .01 + .04) / 3, (.02 + .01 + .30) / 3.
    assert low.guess == pytest.approx(((0.15 + 0.16) / 2 + (0.30 - 0.07 / 3) + (0.11 - 0.04)) / 3)
    assert (middle.checkpoints, middle.runs, middle.guess) == (1, 1, None)
    assert middle.error == pytest.approx(0.04)
    assert (high.low, high.high, high.checkpoints) == (0.2, np.inf, 1)
    assert high.error == pytest.approx(0.1)
    assert [(one.runs, one.error) for one in forecast.errors_by_range([], [])] == [(0, None)] * 3
    # The edge is of the range below.
    assert [one.checkpoints for one in forecast.errors_by_range([[0.05], [0.2]], [[0.0], [0.0]])] == [1, 1, 0]
