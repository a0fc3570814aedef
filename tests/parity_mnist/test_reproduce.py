"""The whole experiment on small images, through the command line: same table however it was run, then its report."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from idx_files import write_dataset
from rlrazor.cli import main
from rlrazor.report import drawing

GRID = [
    *("--methods", "sft-1,grpo,rl-distilled"),
    *("--lrs", "1e-3", "--schedules", "constant,cosine", "--epochs", "1,2", "--seeds", "0,1"),
    *("--batch-size", "16", "--group-size", "8", "--checkpoints-per-epoch", "1"),
    *("--pretrain-epochs", "5", "--pretrain-size", "100"),
]
RUNS = 2 + 2 * 3 * 2 * 2  # bases; seeds x methods x schedules x epochs
LEVELS = (0.95, 0.96, 0.97)  # of teachers; here all three have the same, since GRPO learns these images at once


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"), train=600, test=200)


def command(out: Path, data_dir: Path, *more: str) -> list[str]:
    return ["reproduce", "parity-mnist", *GRID, "--out", str(out), "--data-dir", str(data_dir), *more]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Path:
    """The output folder of an uninterrupted run in one process."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert main(command(out, data_dir, "--jobs", "1")) == 0
    return out


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without figures, which take most of the time of a small sweep and are looked at in other tests."""
    monkeypatch.setattr(drawing, "save", lambda *arguments, **options: None)


UNDRAWN = """
import sys
from rlrazor.cli import main
from rlrazor.report import drawing
drawing.save = lambda *arguments, **options: None
sys.exit(main(sys.argv[1:]))
"""


def results_of(out: Path) -> dict[str, bytes]:
    """Every file of the runs and the table, but for the wall times."""
    files = [*out.glob("runs/*/records.jsonl"), *out.glob("runs/*/spec.json"), out / "records.parquet"]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def test_the_table_has_a_row_per_checkpoint_and_the_bases(finished: Path) -> None:
    table = pl.read_parquet(finished / "records.parquet")
    assert table.filter(pl.col("method") == "base").select("seed", "step", "forgetting").rows() == [
        (0, 0, 0),
        (1, 0, 0),
    ]
    tuned = table.filter(pl.col("method") != "base")
    assert len(tuned) == 2 * 3 * 2 * (1 + 2)  # seeds x methods x schedules x checkpoints of 1 and 2 epochs
    assert tuned["run_id"].n_unique() == RUNS - 2
    assert tuned["trajectory"].n_unique() == 2 * 3 * (1 + 2)
    columns = ["method", "lr", "schedule", "epochs", "seed", "step", "new", "prior", "kl_forward", "kl_reverse"]
    assert set(columns) < set(table.columns)
    assert tuned.select(columns).null_count().sum_horizontal().item() == 0
    base = table.filter(pl.col("method") == "base").select("seed", base="prior")
    joined = tuned.join(base, on="seed")
    assert (joined["forgetting"] - (joined["base"] - joined["prior"])).abs().max() == 0
    assert len(list((finished / "runs").iterdir())) == RUNS


def test_config_and_report_are_there(finished: Path) -> None:
    config = json.loads((finished / "config.json").read_text())
    assert config["config"]["lrs"] == [1e-3]
    assert config["config"]["checkpoints_per_epoch"] == 1
    assert config["config"]["kl_coef"] == 0.1  # resolved, not only what was given
    for name in ("report.html", "figures/fig3.png", "figures/fig3.svg", "figures/fig6.png", "figures/fig6.svg"):
        assert (finished / name).stat().st_size > 1000


def test_students_imitate_the_best_grpo_policy_of_their_seed_at_each_level(finished: Path) -> None:
    table = pl.read_parquet(finished / "records.parquet")
    teachers = json.loads((finished / "teachers.json").read_text())
    assert [(teacher["level"], teacher["seed"]) for teacher in teachers] == [(at, s) for at in LEVELS for s in (0, 1)]
    for teacher in teachers:
        grpo = table.filter((pl.col("method") == "grpo") & (pl.col("seed") == teacher["seed"]))
        chosen = grpo.filter((pl.col("run_id") == teacher["run_id"]) & (pl.col("step") == teacher["step"]))
        good = grpo.filter(pl.col("new") >= teacher["level"])
        best = good["prior"].max() if len(good) else None
        assert (chosen["prior"].item() == best) if best else (chosen["new"].item() == grpo["new"].max())
        students = table.filter(pl.col("teacher") == f"{teacher['run_id']}/{teacher['step']}")
        assert set(students["method"]) == {teacher["student"]}
        assert set(students["seed"]) == {teacher["seed"]}
    taught = table.filter(pl.col("teacher").is_not_null())
    assert taught.height == table.filter(pl.col("method") == "rl-distilled").height > 0


@pytest.mark.usefixtures("undrawn")
def test_killed_at_any_moment_and_run_again_it_ends_with_the_same_bits(
    finished: Path, data_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """With two workers, which also have to notice that their parent is gone; the whole was made by one."""
    out = tmp_path / "out"
    line = [sys.executable, "-c", UNDRAWN, *command(out, data_dir, "--jobs", "2")]
    done = 0
    for target in (5, 20):  # in the sweep, and when its 18 runs are done and students follow
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while (done := len(list(out.glob("runs/[0-9a-f]*")))) < target and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("runs/[0-9a-f]*/records.jsonl")}
    assert 5 <= done <= len(stamps) < RUNS

    assert main(command(out, data_dir, "--jobs", "1")) == 0
    assert results_of(out) == results_of(finished)
    teachers = {teacher["run_id"] for teacher in json.loads((out / "teachers.json").read_text())}
    redone = {path.parent.name for path, stamp in stamps.items() if path.stat().st_mtime_ns != stamp}
    assert redone <= teachers  # these were written again, with their weights
    assert "runs trained" in capfd.readouterr().err


@pytest.mark.usefixtures("undrawn")
def test_a_second_time_nothing_is_trained_and_more_settings_train_only_the_new(
    finished: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = results_of(finished)
    assert main(command(finished, data_dir, "--jobs", "1")) == 0
    assert f"0 runs trained, {RUNS} kept" in capsys.readouterr().err
    assert results_of(finished) == before


def test_report_rebuilds_what_was_deleted_without_training(
    finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (finished / "report.html").read_text()
    (finished / "report.html").unlink()
    (finished / "figures" / "fig3.png").unlink()
    assert main(["report", str(finished), "--json"]) == 0
    summary: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert (finished / "report.html").read_text() == page
    assert (finished / "figures" / "fig3.png").exists()
    assert Path(summary["report"]) == finished / "report.html"


@pytest.mark.usefixtures("undrawn")
def test_sensitivity_varies_the_open_choices(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--methods", "grpo", "--lrs", "3e-4,1e-3", "--schedules", "constant", "--pretrain-size", "50"]
    out = tmp_path / "out"
    line = ["reproduce", "parity-mnist", *arguments, "--out", str(out), "--data-dir", str(data_dir), "--sensitivity"]
    assert main([*line, "--jobs", "1"]) == 0
    assert "pretrain_epochs 5: base policies: 1 run, 1 checkpoint" in capsys.readouterr().err
    table = pl.read_parquet(out / "sensitivity.parquet")
    tried = table.group_by("setting").agg(pl.col("value").unique().sort()).sort("setting")
    assert tried.rows() == [
        ("batch_size", [64, 128, 256]),
        ("group_size", [8, 64, 256]),
        ("pretrain_epochs", [5, 10, 20, 50]),
    ]
    main_table = pl.read_parquet(out / "records.parquet")
    reference = table.filter((pl.col("setting") == "batch_size") & (pl.col("value") == 128), pl.col("lr") == 1e-3)
    assert_frame_equal(
        reference.select(main_table.columns), main_table.filter(pl.col("lr") == 1e-3), check_dtypes=False
    )
    assert "batch_size = 64" in (out / "report.html").read_text()


@pytest.mark.usefixtures("undrawn")
def test_another_grid_in_the_same_folder_replaces_the_findings_and_keeps_the_runs(
    data_dir: Path, tmp_path: Path
) -> None:
    def reproduce(methods: str, *more: str) -> None:
        grid = ["--methods", methods, "--lrs", "1e-3", "--pretrain-size", "50", "--out", str(tmp_path / "out")]
        assert main(["reproduce", "parity-mnist", *grid, "--data-dir", str(data_dir), "--jobs", "1", *more]) == 0

    reproduce("grpo,rl-distilled")
    runs = set((tmp_path / "out" / "runs").iterdir())
    reproduce("sft-1")  # no teacher in its table
    assert pl.read_parquet(tmp_path / "out" / "records.parquet")["method"].to_list()[1:] == ["sft-1"] * 5
    assert runs < set((tmp_path / "out" / "runs").iterdir())
    assert "Imitating" not in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.usefixtures("undrawn")
def test_a_config_file_gives_the_grid_and_the_command_line_overrides_it(data_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "grid.toml"
    file.write_text('methods = ["sft-1"]\nlrs = [1e-3]\npretrain_size = 50\nseeds = [3]\n')
    out = tmp_path / "out"
    line = ["reproduce", "parity-mnist", "--config", str(file), "--data-dir", str(data_dir), "--jobs", "1"]
    assert main([*line, "--seeds", "4", "--out", str(out)]) == 0
    stored = json.loads((out / "config.json").read_text())
    assert (stored["config"]["methods"], stored["config"]["seeds"], stored["preset"]) == (["sft-1"], [4], "quick")
    assert stored["command"].startswith("razor reproduce parity-mnist --config")
    again = ["reproduce", "parity-mnist", "--config", str(out / "config.json"), "--data-dir", str(data_dir)]
    assert main([*again, "--out", str(tmp_path / "again"), "--jobs", "1"]) == 0
    assert results_of(tmp_path / "again") == results_of(out)


def test_dry_run_counts_and_trains_nothing(data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(tmp_path / "out", data_dir, "--dry-run", "--json")) == 0
    plan = json.loads(capsys.readouterr().out)
    # As if each level had a teacher of its own: two methods, and students of three.
    assert plan["estimate"]["runs"] == 2 + 2 * (2 + len(LEVELS)) * 2 * 2
    assert plan["estimate"]["trained"] == 2 + 2 * (2 + len(LEVELS)) * (1 + 2)
    assert plan["estimate"]["checkpoints"] == 2 + 2 * (2 + len(LEVELS)) * (2 + 1 + 2)
    assert plan["estimate"]["seconds"] > 0
    assert not (tmp_path / "out").exists()
    assert main(command(tmp_path / "out", data_dir, "--dry-run")) == 0
    assert "Nothing was run" in capsys.readouterr().out


def test_weights_are_kept_when_asked_for(data_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = ["reproduce", "parity-mnist", "--methods", "sft-1", "--lrs", "1e-3", "--pretrain-size", "50"]
    assert main([*line, "--out", str(out), "--data-dir", str(data_dir), "--jobs", "1", "--weights", "all"]) == 0
    table = pl.read_parquet(out / "records.parquet")
    for run_id, step in table.select("run_id", "step").rows():
        assert (out / "runs" / run_id / "weights" / f"step-{step:06d}.safetensors").stat().st_size > 2_000_000


def test_a_disk_that_is_full_stops_with_one_sentence_and_no_damage(data_dir: Path, tmp_path: Path) -> None:
    """A file-size limit of 100 kB stands for the disk: the base policy's 2 MB of weights do not fit."""
    out = tmp_path / "out"
    arguments = command(out, data_dir, "--jobs", "1")
    limited = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
        "from rlrazor.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run([sys.executable, "-c", limited, *arguments], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 2
    assert "Cannot write to" in done.stderr
    assert "Traceback" not in done.stderr
    assert list((out / "runs").iterdir()) == []
