"""`razor reproduce forecast`, small: both families, three tasks each, from the data to the report, and again."""

import json
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest

from idx_files import write_dataset
from rlrazor.cli import main
from rlrazor.experiments import forecast
from rlrazor.experiments.language import cost, world
from rlrazor.report import drawing

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    world.last_world.clear()
    quick = forecast.PRESETS["quick"]
    grid = forecast.FamilyConfigs(
        replace(quick.digits, methods=("sft-1", "grpo"), lrs=(3e-4, 1e-3, 3e-3), batch_size=32, checkpoints_per_epoch=2,
                group_size=4, pretrain_epochs=2, pretrain_size=100),
        replace(quick.letters, methods=("sft-one", "oracle"), lrs=(1e-3, 3e-3), rl_lrs=(1e-3, 3e-3), pretrain_steps=5,
                max_steps=1, checkpoints_per_epoch=1, train_prompts=64, test_prompts=8, kl_samples=2, group_size=4,
                rl_prompts=2, batch_sizes=(4,), warmup_steps=0),
    )  # fmt: skip
    monkeypatch.setattr(forecast, "PRESETS", {"quick": grid})
    monkeypatch.setattr(drawing, "save", lambda *arguments, **options: None)


def test_both_families_from_the_data_to_the_report(
    small: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = write_dataset(tmp_path / "data", train=600, test=200)
    command = ["reproduce", "forecast", "--data-dir", str(data), "--jobs", "1", "--out", str(tmp_path / "out")]
    with pytest.MonkeyPatch.context() as patch:
        timing = cost.Timing(cost.Seconds({("sft", "", ""): 0.1}), parameters=10, timed="nothing")
        patch.setattr(cost, "time_trial", lambda *_: timing)
        assert main([*command, "--dry-run", "--json"]) == 0
    # Per family three tasks with a base; six runs of two checkpoints, or four of one.
    assert json.loads(capfd.readouterr().out)["estimate"].items() >= {"runs": 36, "checkpoints": 54}.items()
    assert main([*command, "--json"]) == 0
    printed = capfd.readouterr()
    found = json.loads(printed.out)
    assert "36 runs trained" in printed.err
    assert "ParityMNIST / a method left out" in found["sections"]["forecasts"]["finding"]
    assert "tiny language model / a task left out" in found["sections"]["forecasts"]["finding"]
    table = pl.read_parquet(tmp_path / "out" / "studies" / "forecasts.parquet")
    counts = {(family, task): count for family, task, count in table.group_by("family", "task").len().rows()}
    rows = {"parity-mnist": 13, "tiny": 5}
    assert counts == {(family, task): rows[family] for family, tasks in forecast.TASKS.items() for task in tasks}
    # A base is the same for all three tasks of its family, and so is what it could do before.
    bases = table.filter(pl.col("method") == "base")
    assert bases.group_by("family").agg(pl.col("prior").n_unique())["prior"].to_list() == [1, 1]
    assert table.filter(pl.col("family") == "parity-mnist", pl.col("method") != "base")["loss"].is_finite().all()
    moved = table.filter(pl.col("method") != "base")
    assert (moved["kl_probe"] >= 0).all()
    digits = moved.filter(pl.col("family") == "parity-mnist")
    assert digits["kl_probe"].to_list() == digits["kl_forward_on_prior"].to_list()
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Is the forecast true?" in page
    assert main(command) == 0
    assert "0 runs trained, 36 kept" in capfd.readouterr().err


def test_options_are_checked(small: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        (["--preset", "huge"], "Unknown preset 'huge'"),
        (["--families", "digits"], "Unknown family 'digits'"),
        (["--jobs", "0"], "at least 1"),
        (["--seeds", "a"], "not a whole number"),
    ):
        assert main(["reproduce", "forecast", "--out", str(tmp_path / "x"), *options]) == 2
        assert message in capfd.readouterr().err
