"""What is there of a run before it is finished, to go on from; and its policy, whole, when it is."""

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rlrazor.errors import RazorError, cause_of
from rlrazor.runs import items
from rlrazor.runs.records import Record
from rlrazor.runs.run_files import read_records
from rlrazor.runs.store import Checkpoint
from rlrazor.system import jsonl
from rlrazor.system.documents import read_text
from rlrazor.system.writing import atomic_path, mark_folder, require_our_folder


class Unfinished:
    """What is there of an unfinished run: the trainer's own saved states, and the checkpoints so far."""

    def __init__(self, folder: Path, *, keep: bool) -> None:
        self.folder, self.keep = folder, keep

    def state(self) -> Path | None:
        """The last whole state to resume from; one that a killed process left half-written is not."""
        written = self.folder.glob("checkpoint-*/trainer_state.json") if self.keep else ()
        found = [path.parent for path in written if _is_json(path)]  # which the trainer writes last
        numbered = [path for path in found if path.name.partition("-")[2].isdecimal()]
        return max(numbered, key=lambda path: int(path.name.partition("-")[2]), default=None)

    def begin(self, due: Sequence[int], wanted: Callable[[int], bool]) -> tuple[Path | None, dict[int, Checkpoint]]:
        """The state to go on from, and the checkpoints up to it: later steps are trained, and measured, again.

        Where one that was `due` by then is not there, or without weights that are `wanted`, the run starts anew.
        """
        if (state := self.state()) is None:
            return None, {}
        until = int(state.name.partition("-")[2])
        found = self._checkpoints(until)
        if all(step in found and (found[step].weights() or not wanted(step)) for step in due if step <= until):
            return state, found
        shutil.rmtree(self.folder)
        return None, {}

    def _checkpoints(self, until: int) -> dict[int, Checkpoint]:
        path = self.folder / "records.jsonl"
        if not path.exists():
            return {}
        try:
            return {one.step: self._checkpoint(one) for one in read_records(path) if one.step <= until}
        except RazorError as error:
            raise RazorError(f"{error} Delete {self.folder} to train from the start.") from error

    def _checkpoint(self, record: Record) -> Checkpoint:
        path = self._items_path(record.step)
        there = items.read(path, items.BESIDE) if path.exists() else None
        return Checkpoint(record, partial(self._weights, record.step), there)

    def add(self, checkpoint: Checkpoint) -> None:
        """Keep a checkpoint, if there will be a state to resume from."""
        if not self.keep:
            return
        path, record = self.folder / "records.jsonl", checkpoint.record
        before = jsonl.strict(read_text(path), path) if path.exists() else ()
        rows = [*(row for _, row in before if row["step"] < record.step), asdict(record)]
        if weights := checkpoint.weights():
            with atomic_path(self._weights_path(record.step)) as half:
                try:
                    save_file(dict(weights), half)
                except SafetensorError as error:  # of a full disk
                    raise OSError(str(error)) from error
        if checkpoint.items is not None:
            with atomic_path(self._items_path(record.step)) as half:
                half.write_bytes(items.to_bytes(checkpoint.items))
        with atomic_path(path) as half:
            half.write_text("".join(f"{json.dumps(row, allow_nan=False)}\n" for row in rows))

    def forget_weights(self, step: int) -> None:
        """Of a checkpoint that turned out not to be the last."""
        self._weights_path(step).unlink(missing_ok=True)

    def _weights(self, step: int) -> dict[str, Any]:
        path = self._weights_path(step)
        try:
            return load_file(path) if path.exists() else {}
        except (OSError, SafetensorError) as error:
            raise RazorError(f"{path} is damaged. Delete {self.folder} to train from the start.") from error

    def _weights_path(self, step: int) -> Path:
        return self.folder / f"weights-{step}.safetensors"

    def _items_path(self, step: int) -> Path:
        return self.folder / f"items-{step}.parquet"


def _is_json(path: Path) -> bool:
    with suppress(OSError, ValueError):
        json.loads(path.read_text(encoding="utf-8"))
        return True
    return False


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """The policy, or its adapter, in the hub's layout: whole or not at all."""
    require_our_folder(folder)
    half = folder.with_name(f".rlrazor-{folder.name}.tmp")
    shutil.rmtree(half, ignore_errors=True)
    try:
        half.mkdir(parents=True)
        model.save_pretrained(half, safe_serialization=True)
        tokenizer.save_pretrained(half)
        mark_folder(half)
        shutil.rmtree(folder, ignore_errors=True)
        half.rename(folder)
    except Exception as error:  # of a full disk safetensors and tokenizers raise types of their own
        raise RazorError(
            f"The model cannot be written to {folder}: {cause_of(error)} Free some space, then run the same command "
            "again."
        ) from error
    finally:
        shutil.rmtree(half, ignore_errors=True)
