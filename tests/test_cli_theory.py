"""`razor theory`, the study behind it and its section: numbers that agree, verdicts and a text that follow them."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from scipy import stats

from rlrazor.analysis import frontier
from rlrazor.cli import main
from rlrazor.errors import RazorError
from rlrazor.report import drawing, sections
from rlrazor.report.study import Section, Study
from rlrazor.studies import kinds, theory
from rlrazor.studies.theory import claims, parts, report, study
from rlrazor.studies.theory.parts import AGREE, CORRECT, UNTIL, Preset

SMALL = Preset(
    families=2, prompts=6, accuracies=(0.3, 0.5, 0.9), groups=(8,), rounds=100, hidden=(4,), networks=1
)  # two seconds where `quick` takes a dozen
SEEDS = [0, 1]
Tables = dict[str, pl.DataFrame]


@pytest.fixture(scope="module")
def found() -> Tables:
    """Computed for seed 0; `parity` has both."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(study.PRESETS, "quick", SMALL)
        return theory.theory_study("quick", SEEDS[:1], sweep_table())


@pytest.fixture(scope="module")
def of_two_seeds(found: Tables) -> Tables:
    """The same with a seed 1 that pays half as much again: what the section shows of it needs no second computation."""
    more = {
        name: pl.concat([table, table.with_columns(pl.col("^(excess|share)$") * 1.5, seed=pl.lit(1, pl.Int64))])
        for name, table in found.items()
        if "seed" in table.columns and name != "parity"
    }
    return {**found, **more}


def sweep_table() -> pl.DataFrame:
    """Per seed two GRPO checkpoints that count and four rows that do not."""
    columns = ("method", "seed", "trajectory", "step", "new", *study.SHARE_COLUMNS)
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


def section_of(found: Tables) -> Section:
    description = theory.describe(found, "quick", SEEDS, "razor theory")
    return sections.build(Study(theory.NAME, json.loads(json.dumps(description, allow_nan=False))), kinds())


# ParityMNIST's share


def test_share_within_correct_is_the_ratio_of_the_means() -> None:
    shares = study.share_within_correct(sweep_table())
    assert shares["method"].to_list() == ["grpo", "grpo", "kl-dpg", "kl-dpg"]
    assert shares["checkpoints"].to_list() == [2, 2, 1, 1]
    assert shares["kl_reverse"].to_list() == [2.0, 2.0, 0.1, 0.1]
    assert shares["share_reverse"].to_list() == pytest.approx([2.8 / 4, 3.8 / 4, 0.01, 0.01])
    assert shares["share_forward"].to_list() == pytest.approx([0.5, 0.5, 0.01, 0.01])
    assert study.share_within_correct(sweep_table(), 0.9)["checkpoints"].to_list()[0] == 3


@pytest.mark.parametrize(
    "table", [None, pl.DataFrame(), sweep_table().drop("kl_reverse_within_correct"), sweep_table().head(2)]
)
def test_share_within_correct_of_nothing_is_empty(table: pl.DataFrame | None) -> None:
    assert study.share_within_correct(table).is_empty()


# The study


def test_alternation_agrees_with_the_solver_where_the_class_holds_the_projection(found: Tables) -> None:
    alternation = found["alternation"]
    held = alternation.filter("realised")
    assert set(held["kind"]) == {"softmax", "R + 1", "R + 2", "R + 4"}
    assert held["distance"].to_numpy().max() < AGREE
    assert set(held["rounds"]) == {1}
    assert alternation.filter(pl.col("kind") == "random")["distance"].to_numpy().max() > 0.01


def test_errors_end_where_their_sum_foretells(found: Tables) -> None:
    stay = found["inexact"].drop_nulls("foretold")
    np.testing.assert_allclose(stay["end"], stay["foretold"], atol=1e-7)
    summable = stay.filter(pl.col("schedule") == "0.3/t²")
    assert summable["end"].to_numpy().min() > 0.05  # summable, and yet not the same limit
    harmless = found["inexact"].filter(
        pl.col("anchored") | (pl.col("what") == "accuracy") & (pl.col("schedule") != "0.3")
    )
    assert harmless["end"].to_numpy().max() < 0.01


def test_first_check(found: Tables) -> None:
    check = found["first_check"]
    assert check.filter(pl.col("accuracy") > 0.9998)["ratio"][0] == pytest.approx(118.2, abs=0.05)
    assert (check["ratio"].diff().drop_nulls() > 0).all()
    assert check["solver_difference"].to_numpy().max() < 1e-9
    assert check["derivative_error"].to_numpy().max() < 1e-7


def test_gradients_pay_what_the_theory_says(found: Tables) -> None:
    costs = found["gradients"]
    exact = costs.filter(pl.col("group").is_null())
    np.testing.assert_allclose(exact["reached"], UNTIL, atol=1e-9)
    free = exact.filter((pl.col("base") == "even") | pl.col("algorithm").str.starts_with("natural"))
    assert free["excess"].to_numpy().max() < 1e-9
    paying = costs.filter((pl.col("base") == "uneven") & pl.col("algorithm").str.starts_with("policy gradient"))
    assert paying["excess"].to_numpy().min() > 0.01
    sampled = costs.filter((pl.col("base") == "even") & (pl.col("algorithm") == "1-0 REINFORCE, groups of 8"))
    assert sampled["excess"].to_numpy().min() > 0.05
    np.testing.assert_allclose(costs["share"] * costs["kl"], costs["excess"], atol=1e-12)


def test_longer_m_steps_pay_less(found: Tables) -> None:
    means = found["m_steps"].group_by("gradient_steps", maintain_order=True).agg(pl.col("excess").mean())
    assert means["gradient_steps"].to_list() == [1, 10, 100, 1000]
    assert (means["excess"].diff().drop_nulls() < 0).all()


def test_prompts_have_the_accuracy_asked_for() -> None:
    for kind in ("even", "uneven"):
        base = parts._prompts(kind, 0.5, 200, np.random.default_rng(0))
        np.testing.assert_allclose(base.sum(axis=1), 1)
        assert base[:, CORRECT].sum(axis=1).mean() == pytest.approx(0.5, abs=2e-3)
        ratio = base[:, :5].max(axis=1) / base[:, :5].min(axis=1)
        assert (ratio == pytest.approx(1)) == (kind == "even")


def test_the_same_seeds_give_the_same_numbers(found: Tables) -> None:
    middle = replace(SMALL, accuracies=(0.5,))
    again, other = (pl.DataFrame(list(parts.gradients(middle, seed)), infer_schema_length=None) for seed in (0, 1))
    assert again.equals(found["gradients"].filter(pl.col("accuracy") == 0.5).drop("seed"))
    drawn, others = (set(rows.filter(pl.col("base") == "uneven")["excess"]) for rows in (again, other))
    assert not drawn & others


# Verdicts


@pytest.mark.parametrize(
    ("misses", "still_open", "verdict"),
    [
        ([0.0, -1e-7], 0, "holds"),
        ([0.0, -1e-5], 0, "does not hold"),
        ([0.0, 0.3], 2, "does not hold"),
        ([0.0], 1, "cannot be told"),
        ([], 0, "cannot be told"),
        ([1e-9, float("nan")], 0, "does not hold"),
    ],
)
def test_one_miss_refutes_a_claim_of_every_case(misses: list[float], still_open: int, verdict: str) -> None:
    claim = claims.in_every_case("", pl.Series(misses, dtype=pl.Float64), still_open)
    assert claim.verdict == verdict
    assert claim.count == len(misses) + still_open


@pytest.mark.parametrize("differences", [[0.1, 0.3, 0.2], [0.1, 0.3, -0.2], [-0.1, -0.3, -0.2], [0.5, 0.1]])
def test_an_average_is_judged_by_scipys_interval(differences: list[float]) -> None:
    low, high = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    expected = "holds" if low > 0 else "does not hold" if high < 0 else "cannot be told"
    assert claims.on_average("", differences).verdict == expected


@pytest.mark.parametrize("differences", [[], [0.3], [0.0, 0.0], [1e-9, 1e-9]])
def test_an_average_without_an_interval_or_a_size_cannot_be_told(differences: Sequence[float]) -> None:
    assert claims.on_average("", differences).verdict == "cannot be told"


def test_the_verdicts_follow_the_numbers(found: Tables) -> None:
    true = {key: claim.verdict for key, claim in claims.claims_of(found).items()}
    assert [true[key] for key in ("held", "sum", "natural", "tie", "path")] == ["holds"] * 5
    assert [true[key] for key in ("summable", "gradient")] == ["does not hold"] * 2
    planted = {
        **found,
        "alternation": found["alternation"].with_columns(distance=pl.col("distance") + 0.1, moving=pl.lit(True)),
        "inexact": found["inexact"].with_columns(end=pl.col("end") * 0),
        "gradients": found["gradients"].with_columns(
            excess=pl.when(pl.col("algorithm") == "policy gradient, exact").then(0.0).otherwise(0.2)
        ),
        "first_check": found["first_check"].with_columns(solver_difference=pl.lit(0.1)),
    }
    other = {key: claim.verdict for key, claim in claims.claims_of(planted).items()}
    assert [other[key] for key in ("held", "sum", "natural", "tie", "path")] == ["does not hold"] * 5
    assert [other[key] for key in ("summable", "gradient")] == ["holds"] * 2
    assert other["any_class"] == "cannot be told"  # all are on their way
    at_rest = planted["alternation"].with_columns(moving=pl.col("kind") == "graded")
    assert claims.claims_of({**planted, "alternation": at_rest})["any_class"].verdict == "does not hold"


def test_averages_are_of_differences_within_a_seed(found: Tables) -> None:
    def planted(dpg: float) -> claims.Claim:
        of_seeds = [
            found["gradients"].with_columns(
                seed=pl.lit(seed),
                excess=pl.when(pl.col("algorithm") == "KL-DPG, exact")
                .then(seed + dpg)
                .otherwise(seed + 0.1 * (seed % 2)),
            )
            for seed in range(4)
        ]
        return claims.claims_of({**found, "gradients": pl.concat(of_seeds)})["dpg"]

    less, more, same = planted(-1.0), planted(1.0), planted(0.05)
    assert [claim.verdict for claim in (less, more, same)] == ["holds", "does not hold", "cannot be told"]
    low, high = stats.ttest_1samp([1.0, 1.1, 1.0, 1.1], 0).confidence_interval(0.95)
    assert less.value == f"1.050 ± {(high - low) / 2:.3f}"


# The text


def test_the_text_names_every_number() -> None:
    text = re.sub(
        r"\{\{ .*? \}\}|arXiv:[\d.]+|\(1 − E\[R\]\)|95 %", "", report.TEXT.read_text(encoding="utf-8"), flags=re.DOTALL
    )
    assert re.findall(r"\d", text) == []
    verdicts = "|".join((claims.HOLDS, claims.FAILS, claims.OPEN))
    assert re.findall(rf"\b(?:{verdicts})\b", text.partition("\n## Alternation")[2]) == []


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
    tables = {
        table.title: [dict(zip(table.headers, row, strict=True)) for row in table.rows] for table in section.tables
    }
    gradients = tables["Excess KL at 97% accuracy, nats, by the base: its correct outcomes and accuracy"]
    assert gradients[0]["uneven, 50%"] == f"{(low + high) / 2:.3f} ± {(high - low) / 2:.3f}"
    # 70 % and 95 %, a t-interval of 12.706 standard errors; then KL-DPG's 1 %.
    shares = tables["ParityMNIST: the checkpoints with at least 97% on the new task"]
    assert [row["reverse share, %"] for row in shares] == ["82.5 ± 158.8", "1.0 ± 0.0"]
    assert [len({len(row) for row in (table.headers, *table.rows)}) for table in section.tables] == [1] * 9
    assert section.figure.panels[0].title == "Three outcomes"


def test_the_text_has_the_verdicts_and_no_key_is_left(of_two_seeds: Tables) -> None:
    section = section_of(of_two_seeds)
    assert section.title == "Is RL a projection?"
    assert section.question.endswith("is policy gradient that?")
    note = " ".join(section.paragraphs)
    assert "Claim: policy gradient pays the least KL of its accuracy. Verdict: does not hold (largest excess" in note
    assert "it has become 118 by time 4,000, at an accuracy of 99.99%" in note
    assert not re.search("[{}]", note)
    assert "Policy gradient pays the least KL of its accuracy: does not hold" in section.finding
    verdicts = section.tables[0]
    assert [row[1] for row in verdicts.rows if row[0].startswith("On ParityMNIST")] == ["cannot be told"]


def test_one_seed_has_no_interval_and_no_sweep_no_share(found: Tables) -> None:
    section = section_of({**found, "parity": study.share_within_correct(None)})
    assert len(section.tables) == 8
    assert "±" not in " ".join(cell for table in section.tables for row in table.rows for cell in row)


def test_paths_stay_on_the_simplex_and_end_where_they_should(found: Tables) -> None:
    paths = found["paths"]
    np.testing.assert_allclose(paths.select(pl.sum_horizontal("a", "b", "c")).to_series(), 1, atol=2e-4)
    ends = {path: paths.filter(pl.col("path") == path).row(-1)[1:] for path in paths["path"].unique()}
    assert ends["natural-gradient"] == pytest.approx((2 / 3, 1 / 3, 0), abs=2e-3)
    assert ends["kl-dpg"] == pytest.approx((2 / 3, 1 / 3, 0), abs=2e-3)
    assert ends["sft"] == pytest.approx((0.1, 0.9, 0), abs=2e-3)
    assert ends["policy-gradient"] == pytest.approx(ends["grpo"], abs=2e-4)
    assert ends["policy-gradient"][0] > 0.97


def test_a_description_without_its_tables_is_said() -> None:
    with pytest.raises(
        RazorError, match=r"lack what its section is made from \(KeyError: 'tables'\): run the same command again"
    ):
        sections.build(Study(theory.NAME, {"name": "theory"}), kinds())


# The command


@pytest.fixture
def computed(of_two_seeds: Tables, monkeypatch: pytest.MonkeyPatch) -> Tables:
    """The command finds the study computed."""
    monkeypatch.setattr(theory, "theory_study", lambda preset, seeds: of_two_seeds)
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
    assert "Computing the theory" in printed.err


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
    assert [table["title"] for table in printed["tables"][:2]] == ["What holds", "Alternation against a convex solver"]


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
