"""Which KL forecasts forgetting: on tables where a law in one KL is planted, its numbers computed again by loops."""

import math
import re
from collections.abc import Sequence

import numpy as np
import polars as pl
import pytest

from language_tables import LABELS, PACE, make_table, study_of
from rlrazor.analysis import carry_over, law
from rlrazor.analysis.statistics import Estimate, Standing
from rlrazor.report import drawing
from rlrazor.report.drawing import Curve, Points
from rlrazor.report.sections import kl_laws
from rlrazor.report.study import Section
from study_tables import cells, check

FORWARD, PROBE = "forward KL", "KL on a generic probe"


def examined(table: pl.DataFrame) -> dict[str, carry_over.CarryOver]:
    """Without the intervals of R2."""
    points = law.distinct(table)
    return {name: carry_over.examine(points, name, samples=0) for name in kl_laws.MAIN if name in points.columns}


@pytest.fixture(scope="module")
def probe_law() -> Section:
    return kl_laws.section(study_of(make_table()))


def test_law_in_the_probe_holds_across_methods_and_the_paper_s_within_one(probe_law: Section) -> None:
    check(probe_law, "kl-laws")
    laws, forecasts = cells(probe_law.tables[0]), cells(probe_law.tables[1])
    assert laws[PROBE][-1] == "across methods"
    assert laws[FORWARD][-1] == "within a method"
    assert laws["weight L2"][-1] == "nowhere"  # it does not vary
    assert forecasts[PROBE][3::2] == ["better", "better"]  # than guessing, and than forward KL
    assert forecasts[FORWARD][3] == "cannot be told"
    assert probe_law.finding.startswith(f"The law holds across methods: {PROBE}; within a method: ")
    assert f"gain over guessing: better: {PROBE} (+" in probe_law.finding
    text = " ".join(probe_law.paragraphs)
    assert "In KL on a generic probe: across methods, with" in text
    assert "KL on a generic probe against forward KL: better, +" in text


def test_law_in_forward_kl_holds_where_that_is_planted() -> None:
    found = examined(make_table("kl_forward"))
    assert (found["kl_forward"].holds, found["kl_probe"].holds) == ("across methods", "within a method")
    assert found["kl_forward"].verdict == Standing.BETTER
    assert found["kl_probe"].verdict != Standing.BETTER


def test_nothing_beats_guessing_where_only_the_method_matters() -> None:
    found = examined(make_table("nothing", noise=0.01, fingerprint=0.05))
    assert {one.holds for one in found.values()} == {"nowhere"}
    assert Standing.BETTER not in {one.verdict for one in found.values()}


def test_equal_measures_are_not_told_apart() -> None:
    """The same KL on both, each with noise of its own."""
    rng = np.random.default_rng(1)
    table = make_table()
    drift = table["kl_probe"].to_numpy()
    same = table.with_columns(
        pl.Series(name, drift * np.exp(0.2 * rng.normal(size=len(drift)))) for name in ("kl_forward", "kl_probe")
    )
    forecasts = kl_laws.forecast_table(list(examined(same).values())).numbers
    assert forecasts["kl_probe.lead-verdict"] == "cannot be told"
    assert forecasts["kl_probe.verdict"] == forecasts["kl_forward.verdict"] == "better"


def by_hand(table: pl.DataFrame, column: str) -> tuple[dict[str, float], dict[str, float]]:
    """Errors of the monotone law, and of guessing, on each method, seed by seed, by a loop."""
    errors: dict[str, float] = dict.fromkeys(PACE, 0.0)
    guesses: dict[str, float] = dict.fromkeys(PACE, 0.0)
    for method in PACE:
        for seed in (0, 1):
            tuned = table.filter(pl.col("method") != "base", pl.col("seed") == seed)
            own, others = (tuned.filter(keep) for keep in (pl.col("method") == method, pl.col("method") != method))
            fit = law.fit_saturating(others[column].to_numpy(), others["forgetting"].to_numpy())
            y = own["forgetting"].to_numpy()
            errors[method] += float(np.abs(fit.predict(own[column].to_numpy()) - y).mean()) / 2
            guesses[method] += float(np.abs(others["forgetting"].to_numpy().mean() - y).mean()) / 2
    return errors, guesses


def test_errors_and_gains_are_by_method(probe_law: Section) -> None:
    table = make_table()
    t_six_methods = 2.570582  # of the t-distribution with five degrees of freedom, from a printed table

    def shown(values: Sequence[float]) -> str:
        half = t_six_methods * float(np.std(values, ddof=1)) / math.sqrt(6)
        return f"{100 * abs(float(np.mean(values))):.1f} ± {100 * half:.1f}"

    forecasts = cells(probe_law.tables[1])
    forward, guesses = by_hand(table, "kl_forward")
    probe, _ = by_hand(table, "kl_probe")
    assert forecasts[PROBE][1] == shown(list(probe.values()))
    assert forecasts[FORWARD][1] == shown(list(forward.values()))
    assert forecasts["guessing the mean"][1] == shown(list(guesses.values()))
    assert forecasts[PROBE][2] == f"+{shown([guesses[m] - probe[m] for m in PACE])}"
    assert forecasts[PROBE][4] == f"+{shown([forward[m] - probe[m] for m in PACE])}"
    assert forecasts[FORWARD][4:] == ["—", "—"]


def test_within_a_method_is_a_fit_to_each(probe_law: Section) -> None:
    def r2(rows: pl.DataFrame) -> float:
        x, y = rows["kl_forward"].to_numpy(), rows["forgetting"].to_numpy()
        return float(1 - np.mean((y - law.fit_saturating(x, y).predict(x)) ** 2) / np.var(y))

    by_seed = [make_table().filter(pl.col("method") != "base", pl.col("seed") == seed) for seed in (0, 1)]
    values = [np.mean([r2(rows.filter(pl.col("method") == method)) for rows in by_seed]) for method in PACE]
    row = cells(probe_law.tables[0])["forward KL"]
    low, high = min(values), max(values)
    written = [f"{value:.2f}" if value < 0.995 else f"{value:.3f}" for value in (np.median(values), low, high)]
    assert row[4:] == ["{} ({} to {})".format(*written), "within a method"]
    one, other = map(r2, by_seed)
    assert row[3] == f"{(one + other) / 2:.2f} ± {12.7062 * abs(one - other) / 2:.2f}"
    low_r2, high_r2 = map(float, re.findall(r"\[(.*), (.*)\]", row[1])[0])
    assert low_r2 < float(row[1].split()[0]) < high_r2


def test_a_law_of_every_base_is_one_although_the_bases_differ() -> None:
    """Of two bases one forgets five times as readily: together no law in forward KL, in each alone a perfect one."""
    table = make_table("kl_forward", noise=0.0)
    easily = pl.when(pl.col("seed") == 1).then(5.0).otherwise(1.0)
    differing = table.with_columns(
        [(pl.col(name) / easily).alias(name) for name in ("kl_forward", "kl_probe", "kl_reverse", "kl_correct")]
    )
    found = examined(differing)
    forward = found["kl_forward"]
    pooled = forward.summary.saturating
    assert pooled
    assert pooled.r2 < 0.9
    assert forward.r2
    assert forward.r2.mean == pytest.approx(1.0, abs=1e-3)
    assert forward.holds == "across methods"
    assert max(forward.errors.values()) < 0.01


def test_residuals_tell_who_forgets_more_than_its_kl_suggests(probe_law: Section) -> None:
    """At one KL on the new task KL-DPG has forgotten most, since its KL grows slowest, and 1-0 REINFORCE least."""
    found = cells(probe_law.tables[2])
    forward = {name: float(row[3].split()[0].replace("−", "-")) for name, row in found.items()}
    assert max(forward, key=lambda name: forward[name]) == "KL-DPG"
    assert min(forward, key=lambda name: forward[name]) == "1-0 REINFORCE"
    assert forward["KL-DPG"] > 5
    assert forward["1-0 REINFORCE"] < -5
    assert all(row[4].split()[0].strip("+−") in ("0.0", "0.1") for row in found.values())
    tuned = make_table().filter(pl.col("method") == "grpo")
    assert float(found["GRPO"][0]) == pytest.approx(100 * tuned["forgetting"].to_numpy().mean(), abs=0.05)


def test_one_method_and_nothing_to_fit() -> None:
    alone = kl_laws.section(study_of(make_table(methods=["grpo"])))
    check(alone, "kl-laws")
    assert cells(alone.tables[0])[FORWARD][-1] == "within a method"
    assert cells(alone.tables[1])[FORWARD] == ["—", "—", "—", "not comparable", "—", "—"]
    assert ". On a method not in the fit, gain over guessing: not comparable: " in alone.finding
    drawing.draw(alone.figure)
    tiny = make_table(methods=["grpo"]).filter(pl.col("step") < 2, pl.col("seed") == 0).head(2)
    assert kl_laws.section(study_of(tiny)).finding == "The sweep is too small to fit a law to any KL."


def test_figure_has_the_laws_the_errors_and_the_residuals(probe_law: Section) -> None:
    new, probe, errors, residuals = probe_law.figure.panels
    assert [layer.label for layer in new.layers if isinstance(layer, Curve)] == ["quadratic law", "monotone law"]
    assert new.x.label == "forward KL, nats per completion"
    assert re.fullmatch(r"On a generic probe: R² 0\.99\d? / 0\.99\d?", probe.title)
    dots, guess = errors.layers
    assert isinstance(dots, Points)
    assert errors.y.ticks
    assert list(dots.x) == sorted(dots.x, reverse=True)  # the best on top
    assert errors.y.ticks[-1][1] in (PROBE, f"{PROBE} per token")
    _, guesses = by_hand(make_table(), "kl_forward")
    assert guess.x[0] == pytest.approx(100 * np.mean(list(guesses.values())))
    assert [name for _, name in residuals.x.ticks or ()] == list(LABELS.values())


def test_gap_is_taken_method_by_method() -> None:
    found = carry_over.gap({"a": 0.3, "b": 0.5, "c": 9.0}, {"a": 0.1, "b": 0.2})
    assert found
    assert (found.mean, found.half) == pytest.approx((0.25, 12.7062 * 0.1 / math.sqrt(2) / math.sqrt(2)))
    assert carry_over.gap({"a": 0.3}, {"a": 0.1}) is None
    assert isinstance(found, Estimate)


def test_r2_within_methods_leaves_out_what_cannot_be_fitted() -> None:
    x = np.linspace(0, 1, 12)
    y = np.concatenate([x[:5] ** 2, np.full(4, 0.1), x[9:]])
    methods = [*["curved"] * 5, *["flat"] * 4, *["short"] * 3]
    assert law.r2_within_methods(law.fit_quadratic, x, y, methods) == {"curved": pytest.approx(1.0)}


def test_left_out_residuals_are_signed() -> None:
    """One of two methods forgets .1 more at every drift: the other's law misses it by as much, and the reverse."""
    x = np.tile(np.linspace(0, 1, 6), 2)
    y = x**2 + np.repeat([0.0, 0.1], 6)
    found = law.left_out_residuals(law.fit_quadratic, x, y, [*"aaaaaa", *"bbbbbb"])
    np.testing.assert_allclose(found, np.repeat([-0.1, 0.1], 6), atol=1e-9)
