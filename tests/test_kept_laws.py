"""The law that is kept in docs/laws: it loads, judges, and its page says what its own data say."""

import re
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from scipy import optimize, special

from rlrazor.guard.law_file import LawFile
from rlrazor.lm.probes import read_prompts

LAWS = Path(__file__).parents[1] / "docs" / "laws"
PAGE = (LAWS / "README.md").read_text()
LAW = LawFile.load(LAWS / "SmolLM2-135M-Instruct.json")
DATA = pl.DataFrame([row.model_dump() for row in LAW.data])
RUNS = DATA["run"].unique(maintain_order=True).to_list()


def left_out(columns: list[str]) -> np.ndarray:
    """By scipy's own minimiser, each run's mean error in points by a law of the others."""
    errors = []
    for run in RUNS:
        others, own = DATA.filter(pl.col("run") != run), DATA.filter(pl.col("run") == run)
        drops = others["forgetting"].to_numpy()
        if not columns:
            errors.append(np.abs(own["forgetting"].to_numpy() - drops.mean()).mean())
            continue
        (column,) = columns
        scale = float(others[column].mean())  # type: ignore[arg-type]

        def curve(kl: np.ndarray, a: float, b: float, c: float, scale: float = scale) -> np.ndarray:
            return np.asarray(a * (1 - np.exp(-b * (kl / scale) ** c)))

        bounds = ([0, 0, 0], [1, np.inf, np.inf])
        found, _ = optimize.curve_fit(curve, others[column].to_numpy(), drops, (0.15, 1.0, 1.0), bounds=bounds)
        errors.append(np.abs(own["forgetting"].to_numpy() - curve(own[column].to_numpy(), *found)).mean())
    return 100 * np.array(errors)


def is_shown(values: np.ndarray, cell: str) -> bool:
    """To a tenth of a point, rounded: another minimiser ends a little elsewhere."""
    quantile = special.stdtrit(len(values) - 1, 0.975)  # of Student's t
    half = quantile * values.std(ddof=1) / len(values) ** 0.5
    mean, error = map(float, cell.strip().split(" ± "))
    return bool(abs(mean - values.mean()) < 0.15 and abs(error - half) < 0.15)


def cells(row: str) -> list[str]:
    return next(line for line in PAGE.splitlines() if line.startswith(f"| {row}")).strip("|").split("|")


@pytest.mark.parametrize(
    ("column", "row"), [("kl_probe", "KL on the prior tasks' prompts"), ("kl_forward", "KL on the new task's prompts")]
)
def test_the_page_says_how_wrong_it_was_on_runs_left_out(column: str, row: str) -> None:
    errors, guesses = left_out([column]), left_out([])
    _, error, gain = cells(row)
    assert is_shown(errors, error)
    assert is_shown(guesses - errors, gain)
    assert is_shown(guesses, cells("*guessing the mean")[1])


def test_it_may_judge_large_drops_and_not_small_ones() -> None:
    assert len(RUNS) == 10
    assert LAW.objection() is None
    assert LAW.objection(limit=0.1) is None
    low, *_ = LAW.by_range
    assert low.error is not None
    assert low.guess is not None
    assert f"wrong by {100 * low.error:.1f}, and guessing there by {100 * low.guess:.1f}" in " ".join(PAGE.split())
    (end,) = re.findall(r"It ends at ([\d.]+) points", PAGE)
    assert end == f"{100 * LAW.law.a:.1f}"


def test_its_prompts_are_beside_it() -> None:
    prompts = read_prompts(LAWS / "SmolLM2-135M-Instruct.prompts.jsonl")
    assert len(prompts) == 128


def test_what_it_forecast_of_other_methods_is_its_curve_there() -> None:
    for method in ("LwF", "GRPO"):
        _, _, kl, forecast, _, forward, other = cells(method)
        curve, mean = LAW.law, float(kl.split(" ± ")[0])
        said = 100 * curve.a * (1 - np.exp(-curve.b * mean**curve.c))
        assert said == pytest.approx(float(forecast.split("[")[0]), abs=0.06)
        rows = DATA.sort("kl_forward")
        near = np.interp(float(forward.split(" ± ")[0]), rows["kl_forward"].to_numpy(), rows["forgetting"].to_numpy())
        assert 100 * near == pytest.approx(float(other), abs=3)  # what SFT had lost at that KL
