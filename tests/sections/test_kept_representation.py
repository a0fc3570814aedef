"""Does RL keep the representation: on tables where it is planted to, and where SFT is."""

import polars as pl
import pytest

from rlrazor.analysis import law
from rlrazor.report import drawing
from rlrazor.report.drawing import Points
from rlrazor.report.sections import representation
from rlrazor.report.study import Section, Study
from study_tables import cells, mean_and_half
from test_report import CONFIG, row


def study_of(table: pl.DataFrame, labels: dict[str, str] | None = None) -> Study:
    bases = table.filter(pl.col("method") == "base")
    return Study("representation", {**CONFIG, "labels": labels or {}}, table, law.distinct(table), bases, of_sweep=True)


def with_probe(loss: dict[str, float], seeds: int = 3, top: float = 0.98) -> pl.DataFrame:
    """Per method CKNNA falls by `loss` from the base's 1 as new rises to `top`; seeds differ by a thousandth."""
    rows = []
    for seed in range(seeds):
        rows.append(
            {
                **row("base", seed, 0, 0, new=0.9, prior=0.8, base_prior=0.8, kl=0.0),
                "cka_on_probe": 1.0,
                "cknna_on_probe": 1.0,
            }
        )
        for method, lost in loss.items():
            for step in range(1, 101):
                progress = step / 100
                plain = row(
                    method, seed, 0, step, new=0.9 + (top - 0.9) * progress, prior=0.7, base_prior=0.8, kl=progress
                )
                similarity = 1 - (lost + 0.001 * seed) * progress
                rows.append({**plain, "cka_on_probe": similarity, "cknna_on_probe": similarity})
    return pl.DataFrame(rows, infer_schema_length=None)


def against(section: Section) -> dict[str, list[str]]:
    """RL beside SFT, by new accuracy."""
    return {name.split(" ±")[0]: row for name, row in cells(section.tables[0]).items()}


def test_what_is_planted_and_its_opposite() -> None:
    # At 95 %, 5/8 of the way, the mean of the window is the value there, and of seeds the middle one's; at 97 %, 7/8.
    early, late = (tuple(1 - way * loss for loss in (0.101, 0.401)) for way in (0.625, 0.875))
    section = representation.section(study_of(with_probe({"grpo": 0.1, "sft-1": 0.4}), labels={"grpo": "GRPO"}))
    found = against(section)
    for at, (rl, sft) in (("new = 95%", early), ("new = 97%", late)):
        gap = f"+{rl - sft:.2f} ± 0.00"
        assert found[at] == [f"{rl:.2f} ± 0.00", f"{sft:.2f} ± 0.00", gap, "3 of 3", "better"]
        assert f"at {at} ({gap})" in section.finding
    assert "RL: GRPO. SFT: sft-1." in section.note
    opposite = representation.section(study_of(with_probe({"grpo": 0.4, "sft-1": 0.1})))
    assert {row[-1] for row in against(opposite).values()} == {"worse"}
    methods = cells(section.tables[2])
    assert methods["RL"] == methods["GRPO"]
    assert methods["SFT"][2] == f"{late[1]:.2f} ± 0.00"


def test_nothing_is_told_that_seeds_do_not_show() -> None:
    table = with_probe({"grpo": 0.2, "sft-1": 0.2})
    wobble = pl.when(pl.col("method") == "sft-1").then(0.05 * (pl.col("seed") - 1)).otherwise(0)
    equal = representation.section(study_of(table.with_columns(cknna_on_probe=pl.col("cknna_on_probe") - wobble)))
    assert {row[-1] for row in against(equal).values()} == {"cannot be told"}
    single = representation.section(study_of(with_probe({"kl-dpg": 0.1, "simpo": 0.4}, seeds=1)))
    assert against(single)["new = 95%"] == ["0.94", "0.75", "+0.19", "1 of 1", "cannot be told"]
    low = representation.section(study_of(with_probe({"grpo": 0.1, "sft-1": 0.4}, top=0.92)))
    alone = representation.section(study_of(with_probe({"grpo": 0.1, "oracle": 0.1})))
    for section in (low, alone):
        assert {tuple(row) for row in against(section).values()} == {("—", "—", "—", "0 of 3", "not comparable")}
    assert cells(alone.tables[2])["SFT"] == ["—"] * 3
    drawing.draw(alone.figure)


def test_only_what_all_seeds_reach_is_compared() -> None:
    """In seed 0 RL stops at 96 %."""
    table = with_probe({"grpo": 0.1, "sft-1": 0.4})
    short = table.filter(~((pl.col("method") == "grpo") & (pl.col("seed") == 0) & (pl.col("new") > 0.96)))
    found = against(representation.section(study_of(short)))
    assert found["new = 96%"][3:] == ["3 of 3", "better"]
    assert found["new = 97%"][3:] == ["2 of 3", "not comparable"]


def test_along_training_is_the_mean_of_seeds() -> None:
    figure = representation.section(study_of(with_probe({"grpo": 0.1}))).figure
    course = figure.panels[2].layers[0]
    assert isinstance(course, Points)
    assert course.interval
    values = [1 - (0.1 + 0.001 * seed) * 0.5 for seed in range(3)]
    mean, half = mean_and_half(values)
    assert (course.x[49], course.y[49]) == pytest.approx((20.0, mean))
    assert (course.interval.low[49], course.interval.high[49]) == pytest.approx((mean - half, mean + half))
