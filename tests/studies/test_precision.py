"""Sparsity in float32 and bfloat16, planted each way."""

from pathlib import Path
from typing import Any

import pytest

from rlrazor.report import drawing
from rlrazor.report.keyed import numbers_of
from rlrazor.report.study import Study
from rlrazor.studies.precision import STUDY, compared_in, tables_of
from study_tables import LABELS, NEWS, check, plus_minus, run, study_of

JITTER = (0.0, 0.01, -0.004)  # by seed
DENSE = {("grpo", "float32"): 0.2, ("sft-2", "float32"): 0.15}
ROUNDED = {("grpo", "bfloat16"): 0.8, ("sft-2", "bfloat16"): 0.6}


def study(
    sparsity: dict[tuple[str, str], float], seeds: int = 3, news: tuple[float, ...] = NEWS, rank: float = 0.99
) -> Study:
    """`sparsity`: (method, precision) -> share unchanged at learning rate 1e-4; at 1e-3 it is 0.02 less."""
    rows: list[dict[str, Any]] = []
    for (method, precision), unchanged in sparsity.items():
        params = {"precision": None if precision == "float32" else precision}
        for seed in range(seeds):
            for lr, less in ((1e-4, 0.0), (1e-3, 0.02)):
                own = 0.001 * seed * (precision == "bfloat16")
                values = {"weight_sparsity": unchanged + JITTER[seed] + own - less, "weight_rank": rank - 0.001 * seed}
                rows += run(method, seed, lr=lr, news=news, params=params, **values)
    return study_of("precision", rows)


def found_in(of: Study) -> dict[str, str]:
    return numbers_of(tables_of(compared_in(of)))


def test_sparsity_is_rounding() -> None:
    found = found_in(study({**DENSE, **ROUNDED}))
    # The mean over two learning rates, per seed; at the end of the lower one it is 0.01 more.
    plain, rounded = ([share + jitter for jitter in JITTER] for share in (0.2, 0.8))
    rounded = [share + 0.001 * seed for seed, share in enumerate(rounded)]
    assert found["grpo.float32.unchanged"] == plus_minus([share - 0.01 for share in plain])
    assert found["grpo.bfloat16.unchanged"] == plus_minus([share - 0.01 for share in rounded])
    assert found["grpo.bfloat16.at-95"] == found["grpo.bfloat16.at-97"] == found["grpo.bfloat16.unchanged"]
    assert found["grpo.float32.end.unchanged"] == plus_minus(plain)
    assert found["grpo.bfloat16.end.unchanged"] == plus_minus(rounded)
    gap = plus_minus([high - low for high, low in zip(rounded, plain, strict=True)])
    assert found["grpo.bfloat16.gap"] == found["grpo.bfloat16.end.gap"] == f"+{gap}"
    assert {found[f"{arm}.bfloat16{place}.verdict"] for arm in ("grpo", "sft-2") for place in ("", ".end")} == {"more"}
    assert found["floor"] == "12.6"  # SFT-2 at 1e-3 in the last seed
    assert found["sft-2.bfloat16.rank"] == plus_minus([0.99, 0.989, 0.988])
    assert found["grpo.float32.verdict"] == "—"  # the reference


def test_the_opposite_and_no_difference() -> None:
    less = found_in(study({**DENSE, ("grpo", "bfloat16"): 0.1, ("sft-2", "bfloat16"): 0.149}))
    assert (less["grpo.bfloat16.verdict"], less["sft-2.bfloat16.verdict"]) == ("less", "cannot be told")
    assert less["grpo.bfloat16.gap"].startswith("−9.9 ± ")


def test_equal_accuracy_and_the_end_of_training_may_differ() -> None:
    """Rounding hides what the lowest learning rate does, and nothing else."""
    rows = study({**DENSE, **ROUNDED}).points.to_dicts()
    for row in rows:
        last = row["step"] == len(NEWS) and row["lr"] == 1e-4
        if row["precision"] == "bfloat16" and not last:
            row["weight_sparsity"] -= {"grpo": 0.6, "sft-2": 0.45}[row["method"]]
            row["weight_sparsity"] += (0.01, -0.01, 0.0)[row["seed"]]
    changed = [{**row, "new": 0.9} if row["step"] == len(NEWS) else row for row in rows]  # the end is nowhere near
    found = found_in(study_of("precision", changed))
    assert (found["grpo.bfloat16.verdict"], found["grpo.bfloat16.end.verdict"]) == ("cannot be told", "more")


def test_one_seed_tells_nothing() -> None:
    section = STUDY.section(study({**DENSE, **ROUNDED}, seeds=1))
    check(section, "precision")
    assert section.finding.startswith(
        "Parameters left unchanged by bfloat16 against float32, at 97% new accuracy: cannot be told: GRPO, bfloat16 "
        "(+60.0 points), SFT-2, bfloat16 (+45.0 points); after the lowest rate: cannot be told"
    )
    assert not any("±" in cell for table in section.tables for row in table.rows for cell in row)


@pytest.mark.parametrize(
    ("sparsity", "news"), [(DENSE, NEWS), (ROUNDED, NEWS), ({**DENSE, **ROUNDED}, (0.91, 0.92))], ids=str
)
def test_nothing_to_compare(sparsity: dict[tuple[str, str], float], news: tuple[float, ...], tmp_path: Path) -> None:
    planted = study(sparsity, news=news)
    section, found = STUDY.section(planted), found_in(planted)
    check(section, "precision")
    assert found.get("grpo.bfloat16.verdict") in (None, "not comparable")
    assert found.get("sft-2.bfloat16.verdict") in (None, "not comparable")
    drawing.save(section.figure, tmp_path)


def test_compared_where_most_seeds_are() -> None:
    """One method's seeds reach 97 % in one precision only: the comparison is at 96 %."""
    rows: list[dict[str, Any]] = []
    for precision, news in ((None, NEWS), ("bfloat16", NEWS[:4])):
        for seed in range(3):
            rows += run("grpo", seed, news=news, params={"precision": precision}, weight_sparsity=0.3, weight_rank=1.0)
    section = STUDY.section(study_of("precision", rows))
    assert section.tables[1].title == "At new = 96% ± 0.5"
    assert "near 96%:" in section.note


def test_a_seed_without_its_pair_leaves_nothing_to_compare() -> None:
    rows = study({**DENSE, **ROUNDED}).points.to_dicts()
    found = found_in(study_of("precision", [r for r in rows if (r["seed"], r["precision"]) != (2, "bfloat16")]))
    assert found["grpo.bfloat16.verdict"] == found["grpo.bfloat16.end.verdict"] == "not comparable"


def test_study_without_bfloat16_column_and_its_drawing(tmp_path: Path) -> None:
    alone = STUDY.section(study_of("precision", run("grpo", 0, weight_sparsity=0.2, weight_rank=1.0)))
    check(alone, "precision")
    both = STUDY.section(study({**DENSE, **ROUNDED}))
    assert [panel.title for panel in both.figure.panels] == [
        "Sparsity at equal accuracy",
        "Sparsity after training",
        "Rank of the update",
    ]
    by_rate = both.figure.panels[1].layers
    assert [layer.label for layer in by_rate][-1] == "least in float32"
    assert by_rate[0].x.tolist() == [1e-4, 1e-3]
    assert by_rate[0].y[0] - by_rate[0].y[1] == pytest.approx(0.02)
    drawing.save(both.figure, tmp_path)
    assert LABELS["grpo"] + ", bfloat16" in drawing.to_html(both.figure, with_library=False)
