"""The files beside a Trainer's checkpoints in which anything was changed: said in a sentence, or picked from."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_pick import write_run

from documents import changes, is_a_sentence
from laws import GENERIC, SETTINGS, law_of
from rlrazor.errors import RazorError
from rlrazor.guard.log import rows_in_log, rows_until
from rlrazor.guard.log_schema import LogRow
from rlrazor.guard.outputs import KeptModel
from rlrazor.guard.pick import pick
from rlrazor.guard.run_folder import run_in
from rlrazor.lm.probes import probe_hash
from rlrazor.system.documents import checked
from tiny_models import tiny_llama
from watching import trainer_of, watch

ROW: dict[str, Any] = {
    "run": "a",
    "step": 5,
    "epoch": 0.5,
    "kl_forward": 0.5,
    "kl_forward_stderr": 0.1,
    "kl_probe": 0.2,
    "kl_probe_stderr": None,
    "prompts": {"kl_forward": 24, "kl_probe": 24},
    "whole": True,
    "forecast": {"drop": 0.1, "low": 0.0, "high": 0.2, "extrapolated": False},
    "level": 0.9,
    "budget": 0.3,
    "within": True,
    "remaining": {"kl_forward": 0.5},
    "law_useful": True,
    "base": "float32 1 2 3",
    "probe": probe_hash(SETTINGS, GENERIC),
    "prompts_hash": "0123456789abcdef",
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", "eval_accuracy", {5: 0.5}, {5: (0.1, 0.0, 0.2)}, "a")


def picked(run: Path) -> str | None:
    """What is wrong with a folder; None where a checkpoint is picked, by numbers."""
    try:
        found = pick(run)
    except RazorError as error:
        is_a_sentence(error)
        return str(error)
    for one in found.candidates:  # of which none may be recommended, where the log says that its law is of no use
        drop = () if one.drop is None else (one.drop.drop, one.drop.low, one.drop.high)
        numbers = [one.new, *drop]
        assert np.isfinite(numbers).all()
    assert all("\n" not in note for note in found.notes)
    return None


def test_all_that_a_monitor_writes_is_in_the_schema_of_its_log(tmp_path: Path) -> None:
    model = tiny_llama()
    watching = watch(tmp_path, law_of(model, scale=20.0), budget=0.5, every=2)
    trainer_of(tmp_path / "run", [watching], model).train()
    written = [json.loads(line) for line in (tmp_path / "run" / "razor.jsonl").read_text().splitlines()]
    assert [row["step"] for row in written] == [2, 4, 6]
    for row in written:
        assert set(row) <= set(LogRow.model_fields)
        assert checked(LogRow, row, "it").kls == watching.readings[row["step"] // 2 - 1].kl


def test_any_change_of_a_log_is_said_or_picked_from(run: Path) -> None:
    (run / "razor.jsonl").write_text(json.dumps(ROW) + "\n")
    assert picked(run) is None
    refused = 0
    for _, changed in changes(ROW):
        (run / "razor.jsonl").write_text(json.dumps(changed) + "\n")
        refused += picked(run) is not None
    assert refused > 150


def test_any_change_of_a_state_is_said_or_picked_from(run: Path) -> None:
    path = run / "checkpoint-5" / "trainer_state.json"
    stored = {**json.loads(path.read_text()), "max_steps": 5, "train_batch_size": 4}
    for _, changed in changes(stored):
        path.write_text(json.dumps(changed))
        picked(run)


def test_any_change_of_a_label_is_no_label(run: Path) -> None:
    path = run / "checkpoint-5" / "razor.json"
    for _, changed in changes(json.loads(path.read_text())):
        path.write_text(json.dumps(changed))
        assert isinstance(run_in(run).checkpoints[0].run, str | None)
        picked(run)


@pytest.mark.parametrize("content", [b"", b"[" * 10_000, b"\x80", b'{"step": 1e400}', b"[]", b"3", b'{"a":1,"a":2}\n'])
@pytest.mark.parametrize("name", ["razor.jsonl", "checkpoint-5/trainer_state.json", "checkpoint-5/razor.json"])
def test_what_is_no_document_is_said(name: str, content: bytes, run: Path) -> None:
    (run / name).write_bytes(content)
    picked(run)


@pytest.mark.parametrize(
    "line", ["[" * 10_000, '{"step": true}', '{"step": "1"}', '{"step": NaN}', "3", "null", "[]", "{"]
)
def test_a_monitor_goes_on_past_lines_that_are_none(line: str, tmp_path: Path) -> None:
    (tmp_path / "razor.jsonl").write_text(f'{line}\n{{"step": 2, "every": 1}}\n')
    assert rows_until(rows_in_log(tmp_path / "razor.jsonl"), 5, ("every",)) == [{"step": 2, "every": 1}]
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "razor.json").write_text(line)
    assert KeptModel(tmp_path / "kept", print).step in (None, 1)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"kl_forward": -5.0, "kl_forward_stderr": 0.01}, "kl_forward is -5, and a KL is below 0 by"),
        ({"kl_probe": -50.0, "kl_probe_stderr": 1.0}, "kl_probe is -50"),
        ({"forecast": {"drop": 0.1, "low": 0.5, "high": 0.0}}, "begins at 0.5 and ends at 0"),
        ({"kl_forward": -0.4, "kl_forward_stderr": 0.3}, None),
        ({"kl_forward": -0.4}, None),
        ({"forecast": {"drop": 0.1, "low": 0.1, "high": 0.1}}, None),
    ],
)
def test_a_row_of_a_log_could_have_been_measured(change: dict[str, Any], sentence: str | None) -> None:
    row = {"run": "a", "step": 1, **change}
    if sentence is None:
        assert checked(LogRow, row, "it").step == 1
    else:
        with pytest.raises(RazorError, match=sentence):
            checked(LogRow, row, "it")
