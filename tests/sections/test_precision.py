"""Sparsity in float32 and bfloat16, planted each way."""

from pathlib import Path
from typing import Any

import pytest

from rlrazor.report import drawing
from rlrazor.report.study import Study
from rlrazor.studies.precision import section
from study_tables import LABELS, NEWS, cells, check, plus_minus, run, study_of

JITTER = (0.0, 0.01, -0.004)  # by seed


def study(
    sparsity: dict[tuple[str, str], float], seeds: int = 3, news: tuple[float, ...] = NEWS, rank: float = 0.99
) -> Study:
    """`sparsity`: (method, precision) -> share unchanged at learning rate 1e-4; at 1e-3 it is 0.01 less."""
    rows: list[dict[str, Any]] = []
    for (method, precision), unchanged in sparsity.items():
        params = {"precision": None if precision == "float32" else precision}
        for seed in range(seeds):
            for lr, less in ((1e-4, 0.0), (1e-3, 0.01)):
                values = {"weight_sparsity": unchanged + JITTER[seed] - less, "weight_rank": rank - 0.001 * seed}
                rows += run(method, seed, lr=lr, news=news, params=params, **values)
    return study_of("precision", rows)


DENSE = {("grpo", "float32"): 0.2, ("sft-2", "float32"): 0.15}
ROUNDED = {("grpo", "bfloat16"): 0.8, ("sft-2", "bfloat16"): 0.6}


def test_sparsity_is_rounding() -> None:
    found = section(study({**DENSE, **ROUNDED}))
    check(found, "precision")
    # The mean over two learning rates, per seed.
    grpo, rounded = ([share - 0.005 + jitter for jitter in JITTER] for share in (0.2, 0.8))
    assert f"At 97% new accuracy, float32 weights leave {plus_minus(grpo)} % of GRPO’s parameters and" in found.finding
    assert f"bfloat16 weights {plus_minus(rounded)} % of GRPO’s and" in found.finding
    assert "the least of any float32 run is 13.6 %" in found.finding  # SFT-2 at 1e-3 in the last seed
    assert ": sparsity is rounding; at the end" in found.finding
    assert found.finding.endswith("; the updates’ rank is nearly full, 98.9 % of full (3 seeds).")
    ends = [plus_minus([share + jitter for jitter in JITTER]) for share in (0.8, 0.2)]
    assert f"rate, 1.0e-04, it is {ends[0]} % of GRPO’s in bfloat16 and {ends[1]} % in float32 and" in found.finding
    table = cells(found.tables[0])
    assert list(table) == ["GRPO, float32", "GRPO, bfloat16", "SFT-2, float32", "SFT-2, bfloat16"]
    assert table["GRPO, bfloat16"] == [plus_minus(rounded)] * 3


def test_sparsity_is_not_rounding() -> None:
    same = {("grpo", "bfloat16"): 0.2, ("sft-2", "bfloat16"): 0.15}
    finding = section(study({**DENSE, **same})).finding
    assert "rounding does not explain sparsity (0.0 ± 0.0 points for GRPO and 0.0 ± 0.0 points for SFT-2)" in finding
    finding = section(study({**DENSE, ("grpo", "bfloat16"): 0.8, ("sft-2", "bfloat16"): 0.15})).finding
    assert "sparsity is rounding for GRPO, not for SFT-2" in finding
    finding = section(study({**DENSE, ("grpo", "bfloat16"): 0.3, ("sft-2", "bfloat16"): 0.25})).finding
    assert "but most parameters still move" in finding
    sparse = {("grpo", "float32"): 0.7, ("grpo", "bfloat16"): 0.9}
    finding = section(study(sparse, rank=0.5)).finding
    assert "rounding adds to a sparsity that is there without it (+20.0 ± 0.0 points for GRPO)" in finding
    assert "rank is 49.9 % of full" in finding


def test_differences_within_the_noise_of_seeds_are_none() -> None:
    rows: list[dict[str, Any]] = []
    for seed, (plain, rounded) in enumerate(((0.4, 0.7), (0.45, 0.5), (0.42, 0.41))):
        for precision, share in ((None, plain), ("bfloat16", rounded)):
            rows += run("grpo", seed, params={"precision": precision}, weight_sparsity=share, weight_rank=1.0)
    finding = section(study_of("precision", rows)).finding
    assert "rounding does not explain sparsity" in finding


def test_one_seed() -> None:
    finding = section(study({**DENSE, **ROUNDED}, seeds=1)).finding
    assert "±" not in finding
    assert "sparsity is rounding" in finding
    assert "(1 seed, which leaves it open)" in finding


@pytest.mark.parametrize(
    ("sparsity", "news"), [(DENSE, NEWS), (ROUNDED, NEWS), ({**DENSE, **ROUNDED}, (0.91, 0.92))], ids=str
)
def test_nothing_to_compare(sparsity: dict[tuple[str, str], float], news: tuple[float, ...], tmp_path: Path) -> None:
    found = section(study(sparsity, news=news))
    check(found, "precision")
    assert found.finding.startswith("float32 and bfloat16 cannot be compared")
    drawing.save(found.figure, tmp_path)


def test_compared_where_most_seeds_are() -> None:
    """One method's seeds reach 97 % in one precision only: the comparison is at 96 %."""
    rows: list[dict[str, Any]] = []
    for precision, news in ((None, NEWS), ("bfloat16", NEWS[:4])):
        for seed in range(3):
            rows += run("grpo", seed, news=news, params={"precision": precision}, weight_sparsity=0.3, weight_rank=1.0)
    assert section(study_of("precision", rows)).finding.startswith("At 96% new accuracy")


def test_study_without_bfloat16_column_and_its_drawing(tmp_path: Path) -> None:
    rows = run("grpo", 0, weight_sparsity=0.2, weight_rank=1.0)
    found = section(study_of("precision", rows))
    check(found, "precision")
    both = section(study({**DENSE, **ROUNDED}))
    drawing.save(both.figure, tmp_path)
    assert LABELS["grpo"] + ", bfloat16" in drawing.to_html(both.figure, with_library=False)
