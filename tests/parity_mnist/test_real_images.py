"""End to end on the original images: the command, and whether it shows what the experiment is about."""

import json
from pathlib import Path

import polars as pl
import pytest

from rlrazor.cli import main
from rlrazor.errors import RazorError
from rlrazor.experiments.parity_mnist import data


@pytest.mark.real_data
def test_on_the_real_images_the_oracle_forgets_less_than_rl_and_rl_less_than_sft(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        for name in data.DATASETS:
            data.fetch(name)
    except RazorError as error:
        pytest.skip(f"The original files cannot be had here: {error}")
    out = tmp_path / "out"
    grid = ["--methods", "sft-1,oracle,dr-grpo", "--lrs", "3e-4", "--schedules", "constant", "--epochs", "1"]
    line = ["reproduce", "parity-mnist", *grid, "--checkpoints-per-epoch", "1", "--out", str(out), "--json"]
    assert main([*line, "--jobs", "2"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert Path(summary["report"]).exists()
    assert summary["runs"] == 3

    table = pl.read_parquet(out / "records.parquet")
    base = table.filter(pl.col("method") == "base").row(0, named=True)
    assert 0.89 < base["new"] < 0.95
    assert 0.72 < base["prior"] < 0.82
    last = {row["method"]: row for row in table.sort("step").to_dicts()}
    assert last["sft-1"]["step"] == 469  # 60,000 images in batches of 128
    assert all(last[method]["new"] > 0.95 for method in ("sft-1", "oracle", "dr-grpo"))
    assert last["oracle"]["prior"] > last["dr-grpo"]["prior"] > last["sft-1"]["prior"]
    assert last["oracle"]["kl_forward"] < last["dr-grpo"]["kl_forward"] < last["sft-1"]["kl_forward"]
