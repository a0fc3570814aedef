"""`razor theory`, the study behind it and its section: numbers that agree, a finding that follows them."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from rlrazor import theory
from rlrazor.analysis import frontier
from rlrazor.cli import main
from rlrazor.errors import RazorError
from rlrazor.report import drawing, sections
from rlrazor.report.study import Section, Study
from rlrazor.studies import kinds
from rlrazor.theory import Preset

SMALL = Preset(
    families=2, prompts=6, accuracies=(0.3, 0.5, 0.9), groups=(8,), rounds=100, hidden=(4,), networks=1
)  # two seconds where `quick` takes a dozen
SEEDS = [0, 1]
Tables = dict[str, pl.DataFrame]


@pytest.fixture(scope="module")
def study() -> Tables:
    """Computed for seed 0; `parity` has both."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(theory.PRESETS, "quick", SMALL)
        return theory.theory_study("quick", SEEDS[:1], sweep_table())


@pytest.fixture(scope="module")
def of_two_seeds(study: Tables) -> Tables:
    """The same with a seed 1 that pays half as much again: what the section shows of it needs no second computation."""
    more = {
        name: pl.concat([table, table.with_columns(pl.col("^(excess|share)$") * 1.5, seed=pl.lit(1, pl.Int64))])
        for name, table in study.items()
        if "seed" in table.columns and name != "parity"
    }
    return {**study, **more}


def sweep_table() -> pl.DataFrame:
    """Per seed two GRPO checkpoints that count and four rows that do not."""
    columns = ("method", "seed", "trajectory", "step", "new", *theory.SHARE_COLUMNS)
    rows: list[tuple[Any, ...]] = []
    for seed in SEEDS:
        grpo, other = f"grpo {seed}", f"sft {seed}"
        rows += [
            ("base", seed, f"base {seed}", 0, 0.99, 0.0, 0.0, 0.0, 0.0),
            ("grpo", seed, grpo, 1, 0.90, 9.0, 9.0, 9.0, 9.0),
            ("grpo", seed, grpo, 2, 0.97, 1.0, 2.0, 0.8, 1.0),
            ("grpo", seed, grpo, 2, 0.97, 1.0, 2.0, 0.8, 1.0),
            ("grpo", seed, grpo, 3, 0.98, 3.0, 4.0, 2.0 + seed, 2.0),
            ("sft-1", seed, other, 3, 0.98, 3.0, 4.0, 2.0, 2.0),
            ("kl-dpg", seed, f"dpg {seed}", 3, 0.98, 0.1, 0.1, 0.001, 0.001),
        ]
    return pl.DataFrame(rows, schema=columns, orient="row")


def section_of(study: Tables) -> Section:
    description = theory.describe(study, "quick", SEEDS, "razor theory")
    return sections.build(Study(theory.NAME, json.loads(json.dumps(description, allow_nan=False))), kinds())


# ParityMNIST's share


def test_share_within_correct_is_the_ratio_of_the_means() -> None:
    shares = theory.share_within_correct(sweep_table())
    assert shares["method"].to_list() == ["grpo", "grpo", "kl-dpg", "kl-dpg"]
    assert shares["checkpoints"].to_list() == [2, 2, 1, 1]
    assert shares["kl_reverse"].to_list() == [2.0, 2.0, 0.1, 0.1]
    assert shares["share_reverse"].to_list() == pytest.approx([2.8 / 4, 3.8 / 4, 0.01, 0.01])
    assert shares["share_forward"].to_list() == pytest.approx([0.5, 0.5, 0.01, 0.01])
    assert theory.share_within_correct(sweep_table(), 0.9)["checkpoints"].to_list()[0] == 3


@pytest.mark.parametrize(
    "table", [None, pl.DataFrame(), sweep_table().drop("kl_reverse_within_correct"), sweep_table().head(2)]
)
def test_share_within_correct_of_nothing_is_empty(table: pl.DataFrame | None) -> None:
    assert theory.share_within_correct(table).is_empty()
    assert theory.share_within_correct(table).columns == theory.share_within_correct(sweep_table()).columns


# The study


def test_alternation_agrees_with_the_solver_where_the_class_holds_the_projection(study: Tables) -> None:
    alternation = study["alternation"]
    held = alternation.filter("realised")
    assert set(held["kind"]) == {"softmax", "R + 1", "R + 2", "R + 4"}
    assert held["distance"].to_numpy().max() < theory.AGREE
    assert set(held["rounds"]) == {1}
    assert alternation.filter(pl.col("kind") == "random")["distance"].to_numpy().max() > 0.01


def test_errors_end_where_their_sum_foretells(study: Tables) -> None:
    stay = study["inexact"].drop_nulls("foretold")
    np.testing.assert_allclose(stay["end"], stay["foretold"], atol=1e-7)
    summable = stay.filter(pl.col("schedule") == "0.3/t²")
    assert summable["end"].to_numpy().min() > 0.05  # summable, and yet not the same limit
    harmless = study["inexact"].filter(
        pl.col("anchored") | (pl.col("what") == "accuracy") & (pl.col("schedule") != "0.3")
    )
    assert harmless["end"].to_numpy().max() < 0.01


def test_first_check(study: Tables) -> None:
    check = study["first_check"]
    assert check.filter(pl.col("accuracy") > 0.9998)["ratio"][0] == pytest.approx(118.2, abs=0.05)
    assert (check["ratio"].diff().drop_nulls() > 0).all()
    assert check["solver_difference"].to_numpy().max() < 1e-9
    assert check["derivative_error"].to_numpy().max() < 1e-7


def test_gradients_pay_what_the_theory_says(study: Tables) -> None:
    costs = study["gradients"]
    exact = costs.filter(pl.col("group").is_null())
    np.testing.assert_allclose(exact["reached"], theory.UNTIL, atol=1e-9)
    free = exact.filter((pl.col("base") == "even") | pl.col("algorithm").str.starts_with("natural"))
    assert free["excess"].to_numpy().max() < 1e-9
    paying = costs.filter((pl.col("base") == "uneven") & pl.col("algorithm").str.starts_with("policy gradient"))
    assert paying["excess"].to_numpy().min() > 0.01
    sampled = costs.filter((pl.col("base") == "even") & (pl.col("algorithm") == "1-0 REINFORCE, groups of 8"))
    assert sampled["excess"].to_numpy().min() > 0.05
    np.testing.assert_allclose(costs["share"] * costs["kl"], costs["excess"], atol=1e-12)


def test_longer_m_steps_pay_less(study: Tables) -> None:
    means = study["m_steps"].group_by("gradient_steps", maintain_order=True).agg(pl.col("excess").mean())
    assert means["gradient_steps"].to_list() == [1, 10, 100, 1000]
    assert (means["excess"].diff().drop_nulls() < 0).all()


def test_prompts_have_the_accuracy_asked_for() -> None:
    for kind in ("even", "uneven"):
        base = theory._prompts(kind, 0.5, 200, np.random.default_rng(0))
        np.testing.assert_allclose(base.sum(axis=1), 1)
        assert base[:, theory.CORRECT].sum(axis=1).mean() == pytest.approx(0.5, abs=2e-3)
        ratio = base[:, :5].max(axis=1) / base[:, :5].min(axis=1)
        assert (ratio == pytest.approx(1)) == (kind == "even")


def test_the_same_seeds_give_the_same_numbers(study: Tables) -> None:
    middle = replace(SMALL, accuracies=(0.5,))
    again = pl.DataFrame(list(theory._gradients(middle, SEEDS[::-1])), infer_schema_length=None)
    assert again.filter(pl.col("seed") == 0).equals(study["gradients"].filter(pl.col("accuracy") == 0.5))
    drawn = again.filter(pl.col("base") == "uneven").select("seed", "excess")
    assert not set(drawn.filter(pl.col("seed") == 0)["excess"]) & set(drawn.filter(pl.col("seed") == 1)["excess"])


# The section


def test_section_shows_means_and_intervals_over_seeds(of_two_seeds: Tables) -> None:
    section = section_of(of_two_seeds)
    assert section.name == "theory"
    middle = of_two_seeds["gradients"].filter(
        pl.col("base") == "uneven", pl.col("accuracy") == 0.5, pl.col("algorithm") == "policy gradient, exact"
    )["excess"]
    low, high = frontier.t_interval(middle.to_list())
    assert low is not None
    assert high is not None
    assert f"{(low + high) / 2:.3f} ± {(high - low) / 2:.3f} nats above the minimum" in section.finding
    assert "is not that projection" in section.finding
    # 70 % and 95 %, a t-interval of 12.706 standard errors; then KL-DPG's 1 %.
    assert "82.5 ± 158.8 % of GRPO's and 1.0 ± 0.0 % of KL-DPG's reverse KL" in section.note
    assert section.finding.count(". ") == 0
    assert [len({len(row) for row in (table.headers, *table.rows)}) for table in section.tables] == [1] * 8
    assert section.figure.panels[0].title == "Three outcomes"


def test_one_seed_has_no_interval_and_no_sweep_no_share(study: Tables) -> None:
    section = section_of({**study, "parity": theory.share_within_correct(None)})
    assert "±" not in section.finding
    assert "ParityMNIST" not in section.note
    assert len(section.tables) == 7


def test_the_finding_follows_the_numbers(study: Tables) -> None:
    off = study["alternation"].with_columns(distance=pl.col("distance") + 0.1)
    free = study["gradients"].with_columns(excess=pl.col("excess") * 0)
    finding = section_of({**study, "alternation": off, "gradients": free}).finding
    assert "does not end at the KL-minimal" in finding
    assert "a policy-gradient step is that projection" in finding


def test_paths_stay_on_the_simplex_and_end_where_they_should(study: Tables) -> None:
    paths = study["paths"]
    np.testing.assert_allclose(paths.select(pl.sum_horizontal("a", "b", "c")).to_series(), 1, atol=2e-4)
    ends = {path: paths.filter(pl.col("path") == path).row(-1)[1:] for path in paths["path"].unique()}
    assert ends["natural-gradient"] == pytest.approx((2 / 3, 1 / 3, 0), abs=2e-3)
    assert ends["kl-dpg"] == pytest.approx((2 / 3, 1 / 3, 0), abs=2e-3)
    assert ends["sft"] == pytest.approx((0.1, 0.9, 0), abs=2e-3)
    assert ends["policy-gradient"] == pytest.approx(ends["grpo"], abs=2e-4)
    assert ends["policy-gradient"][0] > 0.97


def test_a_description_without_its_tables_is_said() -> None:
    with pytest.raises(RazorError, match="lacks first_check"):
        sections.build(Study(theory.NAME, {"name": "theory"}), kinds())


# The command


@pytest.fixture
def computed(of_two_seeds: Tables, monkeypatch: pytest.MonkeyPatch) -> Tables:
    """The command finds the study computed."""
    monkeypatch.setattr(theory, "theory_study", lambda preset, seeds, progress: progress("part", 0, 1) or of_two_seeds)
    return of_two_seeds


def test_the_command_writes_figure_and_numbers(
    computed: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(drawing, "save", partial(drawing.save, kinds=("png",), dpi=50))  # an SVG takes a second more
    out = tmp_path / "deep" / "theory"
    assert main(["theory", "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["theory.json", "theory.png"]
    assert (out / "theory.png").read_bytes().startswith(b"\x89PNG")
    description = json.loads((out / "theory.json").read_text())
    assert description["seeds"] == [0, 1, 2]
    assert description["command"] == f"razor theory --out {out}"
    assert len(description["tables"]["gradients"]) == len(computed["gradients"])
    printed = capsys.readouterr()
    assert "Alternation against a convex solver" in printed.out
    assert printed.out.rstrip().endswith(f"Figure: {out / 'theory.png'}")
    assert "part (1 of 1)" in printed.err


def test_json_is_the_finding_and_the_tables(
    computed: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved: list[tuple[str, Path]] = []
    monkeypatch.setattr(drawing, "save", lambda figure, folder: saved.append((figure.name, folder)))
    assert main(["theory", "--json", "--seeds", "3", "--out", str(tmp_path)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert saved == [("theory", tmp_path)]
    assert printed["finding"].startswith("Exact alternation ends")
    assert printed["figure"] == str(tmp_path / "theory.png")
    assert printed["tables"][0]["title"] == "Alternation against a convex solver"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "huge"], "Unknown preset 'huge'. Presets: paper, quick."),
        (["--seeds", "many"], "--seeds takes whole numbers separated by commas"),
        (["--seeds", "0,0"], "Seeds have to be different whole numbers"),
        (["--seeds", "-1"], "Seeds have to be different whole numbers"),
        (["--colour", "red"], "Unknown option '--colour'. Options: --help, --preset, --seeds, --out, --json."),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["theory", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("razor: ")
    assert message in error
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_said_before_computing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(theory, "theory_study", lambda *_, **__: pytest.fail("computed first"))
    (tmp_path / "file").write_text("")
    assert main(["theory", "--out", str(tmp_path / "file" / "theory")]) == 2
    assert "Cannot write to" in capsys.readouterr().err
