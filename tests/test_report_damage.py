"""Folders that a report cannot be made of, or hardly: tiny, incomplete, damaged."""

import json
from pathlib import Path

import polars as pl
import pytest

from rlrazor.errors import RazorError
from rlrazor.report import load, write_report
from rlrazor.studies import kinds
from study_tables import planted
from test_report import TEACHERS, make_folder, make_table, text_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path, make_table(seeds=1, runs=1))


def test_tiny_table_makes_a_report(folder: Path) -> None:
    tiny = make_table(seeds=1, runs=1, checkpoints=1).filter(pl.col("method").is_in(["base", "near"]))
    shown = text_of(write_report(load(make_folder(folder, tiny))).read_text())
    assert "by 1 method " in shown
    assert "over 1 checkpoint." in shown
    assert "No checkpoint reaches" not in shown
    assert "Near &lt;b&gt; alone reaches 95 % on the new task" in shown


@pytest.mark.parametrize("name", ["records.parquet", "config.json"])
def test_missing_or_damaged_file(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"PAR1 is how it begins, {")
    with pytest.raises(RazorError, match=rf"{name} .*run the same command again"):
        load(folder)
    (folder / name).unlink()
    with pytest.raises(RazorError, match=rf"There is no .*{name}"):
        load(folder)


def test_missing_columns_and_keys(folder: Path) -> None:
    make_folder(folder, make_table(seeds=1, runs=1).drop("kl_forward", "lr"))
    with pytest.raises(RazorError, match="lacks the columns lr, kl_forward"):
        load(folder)
    make_folder(folder, make_table(seeds=1, runs=1).with_columns(new=pl.lit("high")))
    with pytest.raises(RazorError, match="no numbers in the columns new"):
        load(folder)
    (folder / "config.json").write_text('{"title": "x"}')
    with pytest.raises(RazorError, match="lacks preset, command"):
        load(folder)


def test_bases_alone_or_missing(folder: Path) -> None:
    table = make_table(seeds=2, runs=1)
    make_folder(folder, table.filter(pl.col("method") == "base"))
    with pytest.raises(RazorError, match="base policies only"):
        load(folder)
    make_folder(folder, table.filter((pl.col("method") != "base") | (pl.col("seed") == 0)))
    with pytest.raises(RazorError, match="no base policy for seed 1"):
        load(folder)


@pytest.mark.parametrize(
    ("teachers", "message"),
    [("{}", "not a list of teachers"), ("[", "cannot be read"), (json.dumps(TEACHERS), "names a teacher that")],
)
def test_broken_teachers(folder: Path, teachers: str, message: str) -> None:
    (folder / "teachers.json").write_text(teachers)
    with pytest.raises(RazorError, match=message):
        load(folder)


def test_broken_sensitivity(folder: Path) -> None:
    make_table(seeds=1, runs=1).write_parquet(folder / "sensitivity.parquet")
    with pytest.raises(RazorError, match="lacks the columns setting, value"):
        load(folder)


@pytest.mark.parametrize("column", ["weight_sparsity", "weight_rank"])
def test_a_column_without_values_is_one_that_the_study_lacks(tmp_path: Path, column: str) -> None:
    study = planted("precision", lambda spec: 0.5 + 0.01 * spec.seed)
    (tmp_path / "studies").mkdir()
    described: dict[str, object] = {
        "preset": "quick",
        "command": "razor",
        "config": {},
        "data": "",
        "versions": {},
        "machine": "x",
    }
    described |= {"name": "precision", "core_seconds": 1, "diverged": [], **study.description}
    (tmp_path / "studies" / "precision.json").write_text(json.dumps(described))
    table = study.table.with_columns(pl.lit(None, pl.Float64).alias(column))
    table.write_parquet(tmp_path / "studies" / "precision.parquet")
    with pytest.raises(RazorError, match=f"(?s)precision lack.*{column}"):
        load(tmp_path, kinds())
