"""Which drift measure predicts forgetting: on tables where one measure is planted to, and another."""

import math
from collections.abc import Sequence

import numpy as np
import polars as pl
import pytest

from rlrazor.analysis import law
from rlrazor.report import drawing
from rlrazor.report.drawing import Points
from rlrazor.report.sections import predictors
from rlrazor.report.study import Section, Study
from study_tables import cells, mean_and_half, plus_minus
from test_report import CONFIG, make_table


def with_measures(noise_of: dict[str, float], methods: Sequence[str] = ("near", "middling", "far")) -> pl.DataFrame:
    """The toy sweep with forgetting a saturating function of a hidden drift, which measures show with their noise."""
    rng = np.random.default_rng(2)
    table = make_table(noise=0.0).filter(pl.col("method").is_in(["base", *methods]))
    hidden = table["kl_forward"].to_numpy()
    forgetting = 0.6 * (1 - np.exp(-0.8 * hidden))
    columns = {name: hidden * np.exp(noise * rng.normal(size=len(hidden))) for name, noise in noise_of.items()}
    columns |= {name: np.exp(-values) for name, values in columns.items() if name.startswith("cknna")}
    return table.drop("kl_forward", "kl_reverse").with_columns(
        forgetting=pl.Series(forgetting),
        weight_sparsity=pl.lit(0.0),
        **{name: pl.Series(values) for name, values in columns.items()},
    )


def study_of(table: pl.DataFrame, name: str = "predictors", labels: dict[str, str] | None = None) -> Study:
    bases = table.filter(pl.col("method") == "base")
    return Study(name, {**CONFIG, "labels": labels or {}}, table, law.distinct(table), bases, of_sweep=True)


def shown(section: Section) -> dict[str, dict[str, str]]:
    """The table of all measures: name -> header -> cell."""
    return {
        name: dict(zip(section.tables[0].headers[1:], row, strict=True))
        for name, row in cells(section.tables[0]).items()
    }


def test_forward_kl_wins_where_it_is_planted() -> None:
    noise = {"kl_forward": 0.02, "kl_reverse": 0.3, "total_variation_on_prior": 0.5, "weight_l1": 0.8}
    section = predictors.section(study_of(with_measures(noise)))
    found, orders = shown(section), cells(section.tables[1])
    assert next(iter(found)) == "forward KL"
    assert found["forward KL"]["measured on"] == "new-task inputs"
    assert found["forward KL"]["against baseline"] == "better"
    assert found["forward KL"]["paper’s R²"] == "0.96 ± 0.01"
    assert orders["left-out error of the monotone law"] == ["forward KL on new-task inputs", "1", "4", "1", "2"]
    assert "better: forward KL on new-task inputs (+" in section.finding
    constant = found["1 − sparsity of the update"]  # nothing to fit, so last
    assert list(found)[-1] == "1 − sparsity of the update"
    assert constant["quadratic R²"] == constant["left-out error, monotone"] == constant["Spearman"] == "—"
    assert constant["against baseline"] == "not comparable"


def test_errors_and_gains_are_by_method() -> None:
    table = with_measures({"kl_forward": 0.3, "kl_reverse": 0.3}).filter(pl.col("method") != "base")
    errors, gains = [], []
    for method in ("near", "middling", "far"):
        own, others = (table.filter(keep) for keep in (pl.col("method") == method, pl.col("method") != method))
        fit = law.fit_saturating(others["kl_forward"].to_numpy(), others["forgetting"].to_numpy())
        y = own["forgetting"].to_numpy()
        errors.append(float(np.abs(fit.predict(own["kl_forward"].to_numpy()) - y).mean()))
        gains.append(float(np.abs(others["forgetting"].to_numpy().mean() - y).mean()) - errors[-1])
    found = shown(predictors.section(study_of(with_measures({"kl_forward": 0.3, "kl_reverse": 0.3}))))["forward KL"]
    assert found["left-out error, monotone"] == plus_minus(errors)
    assert found["gain over baseline"] == f"+{plus_minus(gains)}"
    mean, half = mean_and_half(gains)
    assert found["against baseline"] == ("better" if mean > half else "cannot be told")


def test_forward_kl_loses_where_that_is_planted() -> None:
    noise = {"kl_forward": 0.5, "kl_reverse": 0.2, "cknna_on_prior": 0.02, "total_variation": 0.7}
    table = with_measures(noise)
    section = predictors.section(study_of(table))
    assert cells(section.tables[1])["left-out error of the monotone law"] == [
        *("1 − CKNNA on prior-task inputs", "3", "4", "2", "3")
    ]
    tuned = table.filter(pl.col("method") != "base")
    x, y = tuned["total_variation"].to_numpy(), tuned["forgetting"].to_numpy()
    r2 = 1 - np.var(y - np.polyval(np.polyfit(x, y, 2), x)) / np.var(y)
    found = shown(section)
    assert float(found["total variation"]["quadratic R²"]) == pytest.approx(r2, abs=0.005)
    order = [float(of["quadratic R²"]) for of in list(found.values())[:4]]
    assert order == sorted(order, reverse=True)
    assert float(found["1 − CKNNA"]["Spearman"]) > 0.99  # of 1 minus the similarity


def test_the_finding_says_which_measures_it_names() -> None:
    noise = {"kl_forward": 0.9, "kl_reverse": 0.02, "total_variation": 0.05, "output_l2": 0.1, "weight_l1": 0.2}
    beside = predictors.section(study_of(with_measures(noise)))
    least = "of the 3 of 5 measures that err least"
    assert beside.finding.startswith(
        f"Gain over guessing on a method not in the fit, {least}, and of forward KL on new-task inputs: "
    )
    assert "weight L1" not in beside.finding
    among = predictors.section(study_of(with_measures({**noise, "kl_forward": 0.01})))
    assert f"{least}: better: forward KL on new-task inputs" in among.finding


def test_one_seed_has_an_r2_too() -> None:
    table = with_measures({"kl_forward": 0.1, "kl_reverse": 0.4})
    section = predictors.section(study_of(table.filter(pl.col("seed") == 0)))
    assert f"with an R² of {shown(section)['forward KL']['quadratic R²']}." in section.note.replace("\n", " ")


def test_measures_that_forecast_nothing_and_one_method() -> None:
    rng = np.random.default_rng(3)
    table = with_measures({"kl_forward": 0.0, "kl_reverse": 0.0})
    shuffled = table.with_columns(
        kl_forward=pl.Series(rng.random(len(table))), kl_reverse=pl.Series(rng.random(len(table)))
    )
    levels = pl.col("method").replace_strict({"base": 0.0, "near": 0.1, "middling": 0.15, "far": 0.2})
    nothing = predictors.section(study_of(shuffled.with_columns(forgetting=levels + 0.01 * pl.col("kl_reverse"))))
    assert "better" not in {of["against baseline"] for of in shown(nothing).values()}
    alone = predictors.section(study_of(with_measures({"kl_forward": 0.1, "weight_l2": 0.4}, ["near"])))
    assert "not comparable: forward KL on new-task inputs" in alone.finding
    assert cells(alone.tables[1])["R² of the quadratic"][:3] == ["forward KL on new-task inputs", "1", "2"]
    tiny = predictors.section(
        study_of(with_measures({"kl_forward": 0.1}).filter(pl.col("step") < 1).vstack(table_of_one()))
    )
    assert "too small" in tiny.finding
    drawing.draw(tiny.figure)


def table_of_one() -> pl.DataFrame:
    return with_measures({"kl_forward": 0.1}).filter(pl.col("method") == "near").head(1)


def test_figure_shows_seeds_and_the_paper() -> None:
    table = with_measures({"kl_forward": 0.1, "kl_reverse": 0.4})
    panel = predictors.section(study_of(table)).figure.panels[0]
    paper, dots = (
        next(layer for layer in panel.layers if layer.label == name)
        for name in ("the paper’s Table 1", "new-task inputs")
    )
    assert isinstance(dots, Points)
    assert dots.interval
    r2 = []
    for seed in (0, 1):
        tuned = table.filter(pl.col("method") != "base", pl.col("seed") == seed)
        x, y = tuned["kl_forward"].to_numpy(), tuned["forgetting"].to_numpy()
        r2.append(1 - np.var(y - np.polyval(np.polyfit(x, y, 2), x)) / np.var(y))
    spread = abs(r2[0] - r2[1]) / math.sqrt(2)
    assert dots.x[1] == pytest.approx(np.mean(r2))
    assert dots.interval.low[1] == pytest.approx(np.mean(r2) - spread)
    assert dots.interval.high[1] == pytest.approx(np.mean(r2) + spread)
    assert dict(zip(paper.y, paper.x, strict=True)) == {1.0: 0.96, 0.0: 0.93}
    assert panel.y.ticks == [(0.0, "reverse KL on new-task inputs"), (1.0, "forward KL on new-task inputs")]
    assert panel.x.label == "R², mean ± standard deviation over seeds"
    [alone, *_] = predictors.section(study_of(table.filter(pl.col("seed") == 0))).figure.panels
    assert alone.x.label == "R²"  # one seed has no spread
