"""The analyses: their names, their runs, their tables, and one of them through the command line."""

import json
from pathlib import Path

import polars as pl
import pytest

from idx_files import write_dataset
from rlrazor import studies
from rlrazor.cli import main, running
from rlrazor.errors import RazorError
from rlrazor.experiments.parity_mnist.config import EXPERIMENT, PRESETS, TEACHER
from rlrazor.experiments.parity_mnist.evaluate import DRIFT
from rlrazor.report import drawing
from rlrazor.runs import store, teachers
from rlrazor.runs.records import RunSpec
from rlrazor.studies import distilled, precision, quadrants
from rlrazor.studies.engine import PlainStudy
from rlrazor.studies.grids import Grid
from rlrazor.studies.run import grids_of


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"), train=600, test=200)


def runs_of(arm: Grid, seeds: tuple[int, ...]) -> list[RunSpec]:
    """The runs of students, too, whoever teaches them."""
    bases = [RunSpec(EXPERIMENT, "base", {}, seed) for seed in seeds]
    return arm.specs(seeds, "data", teachers.unknown(bases, TEACHER, arm.taught_at) if arm.taught_at else None)


def specs_of(name: str, preset: str, seeds: tuple[int, ...] = (0,)) -> list[RunSpec]:
    return [spec for arm in grids_of(name, preset) for spec in runs_of(arm, seeds)]


def test_every_analysis_has_a_section_and_runs_or_reads_the_sweep() -> None:
    elsewhere = {*studies.SEQUENCES, studies.TEXT_PROBES, "items", "learning-rates", "kl-laws", "forecasts"}
    elsewhere |= {studies.STATES, "successes", "interactions"}  # of robots
    assert [name for name in studies.PAGE if name not in elsewhere] == list(studies.ANALYSES)
    assert list(studies.kinds()) == list(studies.PAGE)
    assert set(studies.ANALYSES) == {*studies.STUDIES, *studies.OF_THE_SWEEP, studies.THEORY}


def test_names_are_put_in_the_reports_order_and_unknown_ones_refused() -> None:
    assert studies.parse_analyses("theory, dynamics") == ("dynamics", "theory")
    assert studies.parse_analyses("all") == studies.ANALYSES
    with pytest.raises(RazorError, match=r"Unknown analysis 'dynamic'. Analyses: all, predictors, .*baselines"):
        studies.parse_analyses("dynamic")
    with pytest.raises(RazorError, match="Unknown analysis ''"):
        studies.parse_analyses("")


@pytest.mark.parametrize("name", studies.STUDIES)
def test_quick_arms_are_few_and_no_arm_holds_a_run_twice(name: str) -> None:
    for preset in ("quick", "paper"):
        for arm in grids_of(name, preset):
            own = runs_of(arm, (0, 1))
            assert len(set(own)) == len(own) == 2 * len(arm.methods) * len(arm.lrs)
    assert len(set(specs_of(name, "quick"))) <= 16


def test_plain_arms_are_the_sweeps_own_runs() -> None:
    """So that in one folder nothing is trained twice."""
    paper = PRESETS["paper"]
    swept = set(paper.specs("data", paper.methods))
    shared = {spec for spec in specs_of("quadrants", "paper") if spec.method in paper.methods}
    assert shared
    assert shared <= swept
    assert not {spec for spec in specs_of("off-policy", "paper") if spec.params.get("staleness")} & swept


def test_ages_and_weighting_are_as_asked_for() -> None:
    pairs = {(s.params.get("staleness", 0), s.params.get("importance", False)) for s in specs_of("off-policy", "paper")}
    assert pairs == {(0, False), *((age, way) for age in (1, 8, 64, 512, 1_000_000) for way in (False, True))}


def test_an_analysis_runs_from_the_command_line_and_continues(
    tmp_path: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """kl-minimal, which has bases of different accuracies at one seed: forgetting is counted from a run's own."""
    out = tmp_path / "out"
    command = [
        *("reproduce", "parity-mnist", "--analysis", "kl-minimal", "--seeds", "0", "--jobs", "1"),
        *("--out", str(out), "--data-dir", str(data_dir), "--json"),
    ]
    assert main(command) == 0
    printed = json.loads(capsys.readouterr().out)
    assert set(printed["sections"]) == {"kl-minimal"}
    assert printed["sections"]["kl-minimal"]["finding"].endswith(".")

    table = pl.read_parquet(out / "studies" / "kl-minimal.parquet")
    tuned = table.filter(pl.col("method") != "base")
    assert set(DRIFT) < set(table.columns)
    assert tuned.drop_nulls(DRIFT).height == tuned.height
    assert set(tuned["method"]) == {"grpo", "grpo+kl", "kl-dpg", "js-dpg", "tv-dpg", "natural-pg"}
    bases = {row["pretrain_accuracy"]: row["prior"] for row in table.filter(pl.col("method") == "base").to_dicts()}
    assert len(bases) == 2
    for row in table.to_dicts():
        assert row["forgetting"] == bases[row["pretrain_accuracy"]] - row["prior"]
    assert (out / "report.html").stat().st_size > 1000
    assert (out / "figures" / "kl-minimal.png").stat().st_size > 1000
    assert not (out / "records.parquet").exists()  # the sweep was not asked for

    before = {path: path.stat().st_mtime_ns for path in (out / "runs").glob("*/records.jsonl")}
    assert main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in (out / "runs").glob("*/records.jsonl")} == before


def test_students_have_the_best_teacher_of_each_level(
    tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At levels that GRPO passes on its way; the last is one that it does not get to."""
    levels, small = (0.68, 0.9, 1.01), {"batch_size": 32, "pretrain_size": 20, "pretrain_epochs": 4}
    arms = [
        Grid(("grpo",), (1e-4, 4e-4), settings=small),
        *(Grid(("rl-distilled",), (4e-4,), settings=small, taught_at=level) for level in levels),
    ]
    monkeypatch.setattr(distilled, "STUDY", PlainStudy(distilled.section, grids=lambda quick: arms))
    monkeypatch.setattr(drawing, "save", lambda *arguments, **options: None)
    out = tmp_path / "out"
    command = ["reproduce", "parity-mnist", "--analysis", "distilled", "--seeds", "0,1", "--jobs", "1"]
    command += ["--out", str(out), "--data-dir", str(data_dir)]
    assert main(command) == 0
    table = pl.read_parquet(out / "studies" / "distilled.parquet")
    description = json.loads((out / "studies" / "distilled.json").read_text())
    assert [(of["level"], of["seed"]) for of in description["teachers"]] == [(at, s) for at in levels for s in (0, 1)]
    rl = table.filter(pl.col("method") == "grpo")
    for of in description["teachers"]:
        rows = rl.filter(pl.col("seed") == of["seed"])
        good = [row for row in rows.to_dicts() if row["new"] >= of["level"]]
        best = max(good, key=lambda row: row["prior"]) if good else max(rows.to_dicts(), key=lambda row: row["new"])
        assert (of["run_id"], of["step"]) == (best["run_id"], best["step"])
        own = table.filter(pl.col("teacher") == f"{of['run_id']}/{of['step']}")
        assert (set(own["seed"]), set(own["method"])) == ({of["seed"]}, {"rl-distilled"})
        spec = json.loads((out / "runs" / own["run_id"][0] / "spec.json").read_text())
        assert spec["teacher"]["step"] == of["step"]
    assert len({(of["run_id"], of["step"]) for of in description["teachers"]}) >= 4  # levels have their own
    assert rl["teacher"].null_count() == len(rl)
    assert [arm.get("taught_at") for arm in description["config"]["arms"]] == [None, *levels]


def test_settings_of_the_sweep_are_refused_where_no_sweep_is_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "parity-mnist", "--analysis", "dynamics", "--lrs", "1e-4"]) == 2
    assert "lrs is a setting of the sweep, which dynamics does not run" in capsys.readouterr().err
    assert main(["reproduce", "parity-mnist", "--analysis", "dynamics", "--sensitivity"]) == 2
    assert "sensitivity is a setting of the sweep" in capsys.readouterr().err


def test_the_dry_run_counts_an_analysis(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["reproduce", "parity-mnist", "--analysis", "quadrants", "--preset", "paper", "--dry-run", "--json"]) == 0
    )
    said = json.loads(capsys.readouterr().out)
    counted = said["estimate"]
    assert said["config"] == {"analysis": ["quadrants"], "preset": "paper", "seeds": [0, 1, 2]}  # no sweep is run
    assert counted["runs"] == 3 + 3 * 4 * 5  # bases; seeds x methods x learning rates
    assert counted["checkpoints"] == 3 + 5 * 3 * 4 * 5


def test_the_help_lists_a_study_that_was_added(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    analyses = (*studies.ANALYSES, "group-size")
    monkeypatch.setattr(studies, "ANALYSES", analyses)
    monkeypatch.setenv("COLUMNS", "1000")  # or argparse breaks names at their hyphens
    with pytest.raises(SystemExit):
        main(["reproduce", "parity-mnist", "--help"])
    listed = " ".join(capsys.readouterr().out.split()).partition("or 'all': ")[2]
    assert listed.startswith(", ".join(analyses))


def test_another_machine_is_told_of_once_however_many_analyses(
    tmp_path: Path, data_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = Grid(("sft-1",), (1e-3,), settings={"batch_size": 64, "pretrain_size": 20, "pretrain_epochs": 1})
    for study in (precision, quadrants):
        monkeypatch.setattr(study, "STUDY", PlainStudy(study.STUDY.section, grids=lambda quick: [small]))
    locked: list[set[Path]] = []  # while the report is drawn

    def drawn(out: Path, console: object) -> tuple[None, None]:
        locked.append(set(store._held))
        return None, None

    monkeypatch.setattr(running, "write_and_load", drawn)
    monkeypatch.setattr(running, "print_results", lambda *_, **__: None)
    made_by = {"versions": {"rlrazor": "0", "torch": "1.0"}, "machine": "another one"}
    (tmp_path / "config.json").write_text(json.dumps(made_by))
    command = ["reproduce", "parity-mnist", "--analysis", "precision,quadrants", "--jobs", "1"]
    assert main([*command, "--out", str(tmp_path), "--data-dir", str(data_dir)]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("were made with torch 1.0 on another one") == 1
    assert locked == [{tmp_path.resolve()}]
    assert {path.stem for path in (tmp_path / "studies").iterdir()} == {"precision", "quadrants"}
