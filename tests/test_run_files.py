"""The JSON files of an output folder in which anything was changed: refused in a sentence, or read as something."""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from documents import changes, is_a_sentence
from rlrazor.errors import RazorError
from rlrazor.report import figures, load, sections, sweep, sweep_tables, tables
from rlrazor.report.description import SweepDescription
from rlrazor.report.results import Results
from rlrazor.report.study import Study, with_family
from rlrazor.runs.records import Record, RunSpec
from rlrazor.runs.store import Checkpoint, FinishedRun, RunStore
from rlrazor.studies import kinds, quadrants
from test_report import CONFIG, TEACHERS, make_folder, make_table

FULL = {
    **CONFIG,
    "thresholds": [0.95, 0.96],
    "families": {"RL": ["near"], "SFT": ["far"]},
    "quadrants": {"near": [True, True], "far": [True, False], "a": [False, True], "b": [False, False]},
    "kl_unit": "nats",
    "prior_tasks": ["a", "b"],
    "probe": "text",
    "representation": "text",
    "accuracy_margin": 0.005,
}
SPEC = RunSpec("toy", "grpo", {"lr": 1e-4, "schedule": "constant", "epochs": 1}, 0)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return load(make_folder(tmp_path_factory.mktemp("run"), make_table(seeds=1, runs=1)))


def test_any_change_of_a_config_is_refused_or_shown(results: Results) -> None:
    assert results.sweep is not None
    refused = 0
    shown_elsewhere = {"thresholds", "families", "quadrants", "kl_unit", "labels", "prior_tasks", "drift"}
    for where, changed in changes(FULL):
        (results.folder / "config.json").write_text(json.dumps(changed))
        try:
            config = sweep.described(results.folder / "config.json", SweepDescription)
        except RazorError as error:
            is_a_sentence(error)
            refused += 1
            continue
        study = replace(results.sweep.study, name="kl-laws", description=config)
        changed_sweep = replace(results.sweep, study=study)
        assert tables.run_table(config, study.table, study.points)
        if where[0] not in shown_elsewhere:
            continue
        assert sweep_tables.retention_table(changed_sweep)
        assert sweep_tables.range_table(changed_sweep)
        assert with_family(study)["family"].n_unique() >= 1
        assert quadrants.applies(study) in (True, False)
        assert all(isinstance(study.label(method), str) for method in study.methods)
    assert refused > 300
    figures.trade_off_figure(results.sweep)


def test_any_change_of_teachers_is_refused_or_read(results: Results) -> None:
    path = results.folder / "teachers.json"
    (results.folder / "config.json").write_text(json.dumps(CONFIG))
    table = make_table()
    for _, changed in changes(TEACHERS[:1]):
        path.write_text(json.dumps(changed))
        try:
            sweep._read_distillation(results.folder, table)
        except RazorError as error:
            is_a_sentence(error)
    path.unlink()


@pytest.mark.parametrize(
    ("column", "sentence"),
    [
        ({"new": pl.lit(95.0)}, "column new has a value that is no fraction of 1"),
        ({"prior": pl.lit(float("nan"))}, "column prior has a value that is no fraction of 1"),
        ({"forgetting": pl.lit(None, pl.Float64)}, "column forgetting has a value that is no fraction of 1"),
        ({"kl_forward": pl.lit(float("inf"))}, "column kl_forward has an infinite value"),
        ({"kl_reverse": pl.lit("high")}, "column kl_reverse holds no numbers"),
        ({"seed": pl.lit(0.5)}, "column seed holds anything but whole numbers"),
        ({"step": pl.lit(-1)}, "column step holds anything but whole numbers"),
        ({"method": pl.lit(3)}, "column method holds no text"),
        ({"run_id": pl.lit(None, pl.String)}, "a checkpoint lacks its run"),
        ({"lr": pl.lit([1.0])}, "no numbers in the columns lr"),
    ],
)
def test_a_table_that_holds_something_else_is_refused(
    column: dict[str, pl.Expr], sentence: str, tmp_path: Path
) -> None:
    make_folder(tmp_path, make_table(seeds=1, runs=1).with_columns(**column))
    with pytest.raises(RazorError, match=sentence):
        load(tmp_path)


def test_a_study_whose_table_lacks_its_own_columns_is_refused(tmp_path: Path) -> None:
    table = make_table(seeds=1, runs=1)
    for name in (known := kinds()):
        points = table.filter(pl.col("method") != "base")
        study = Study(name, {**CONFIG, "seeds": [0], "name": name}, table, points, table.filter(method="base"))
        with suppress(RazorError):  # and nothing else
            sections.build(study, known)


def test_any_change_of_a_theory_is_refused_or_shown(tmp_path: Path) -> None:
    rows = [{"accuracy": 0.5, "ratio": 1.0, "time": 2.0}]
    stored = {"name": "theory", "preset": "quick", "command": "", "seeds": [0], "tables": {"first_check": rows}}
    (tmp_path / "studies").mkdir()
    for _, changed in changes(stored):
        (tmp_path / "studies" / "theory.json").write_text(json.dumps(changed))
        with pytest.raises(RazorError) as raised:
            load(tmp_path, kinds())
        is_a_sentence(raised.value)


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    records = [
        Record(SPEC.run_id, step, step / 2, 0.9, {"a": 0.8}, {"kl_forward": 0.1}, {"loss": 1.0}) for step in (1, 2)
    ]
    store = RunStore(tmp_path)
    store.write(SPEC, [Checkpoint(record) for record in records], seconds=1.5)
    return store


@pytest.mark.parametrize("name", ["spec.json", "records.jsonl", "seconds.json"])
def test_any_change_of_a_runs_files_is_refused_or_read(name: str, store: RunStore) -> None:
    path = store.runs / SPEC.run_id / name
    lines = path.read_text().splitlines() if name.endswith("l") else [path.read_text()]
    read: Callable[[RunSpec], FinishedRun | float] = store.seconds if name == "seconds.json" else store.read
    assert read(SPEC)
    for where, changed in changes(json.loads(lines[0])):
        path.write_text("\n".join([json.dumps(changed), *lines[1:]]))
        found = None
        with suppress(RazorError):
            found = read(SPEC)
        if found is None:
            with pytest.raises(RazorError, match=f"The run folder {path.parent} ") as raised:
                read(SPEC)
            is_a_sentence(raised.value)
            continue
        assert where[0] not in ("run_id", "schema_version", "experiment", "method", "params")
        values = [found] if isinstance(found, float) else [record.new for record in found.records]
        assert np.isfinite(values).all()
