"""Run folders: whole or absent, and clear words when the disk or a file is at fault."""

import contextlib
import errno
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import polars as pl
import pytest
import torch

from rlrazor.errors import RazorError
from rlrazor.runs import store as store_module
from rlrazor.runs.records import Record, RunSpec
from rlrazor.runs.store import Checkpoint, Keep, RunStore
from rlrazor.system.documents import read_text
from rlrazor.system.writing import atomic_path

SPEC = RunSpec("toy", "grpo", {"lr": 1e-4, "schedule": "constant", "epochs": 1}, 0)


def weights(step: int) -> dict[str, torch.Tensor]:
    return {"w": torch.ones(3) * step}


def checkpoints() -> list[Checkpoint]:
    return [
        Checkpoint(
            Record(SPEC.run_id, step, step / 2, 0.1 + step / 3, {"p": 0.7}, {"kl": 1 / 3}),
            partial(weights, step),
        )
        for step in (1, 2)
    ]


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(tmp_path / "out")


def test_what_is_written_is_read_back_to_the_bit(store: RunStore) -> None:
    store.keep(SPEC, Keep(all=True))
    with store.open_for_writing():
        store.write(SPEC, checkpoints(), seconds=1.5)
    run = store.read(SPEC)
    assert list(run.records) == [checkpoint.record for checkpoint in checkpoints()]
    assert run.diverged_at is None
    assert store.seconds(SPEC) == 1.5
    assert torch.equal(store.load_weights(SPEC, 2)["w"], torch.full((3,), 2.0))


def test_finished_means_finished_with_the_weights_asked_for(store: RunStore) -> None:
    assert not store.is_finished(SPEC)
    store.write(SPEC, checkpoints(), seconds=0)
    assert store.is_finished(SPEC)
    for keep, steps in ((Keep(last=True), {2}), (Keep(steps=frozenset({1})), {1, 2}), (Keep(all=True), {1, 2})):
        store.keep(SPEC, keep)
        assert store.is_finished(SPEC) is (store.kept_steps(SPEC) == steps)
        store.write(SPEC, checkpoints(), seconds=0)
        assert store.is_finished(SPEC)
        assert store.kept_steps(SPEC) == steps
    assert RunStore(store.folder).is_finished(SPEC)  # whoever wants no weights


def test_a_stray_file_among_the_weights_is_not_a_step(store: RunStore) -> None:
    store.keep(SPEC, Keep(all=True))
    store.write(SPEC, checkpoints(), seconds=0)
    store.weights_path(SPEC, 1).rename(store.weights_path(SPEC, 1).with_stem("step-000001 (copy)"))
    assert store.kept_steps(SPEC) == {2}


def test_a_full_disk_leaves_no_half_written_run(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write(SPEC, checkpoints(), seconds=0)
    before = {path: path.read_bytes() for path in store.folder.rglob("*") if path.is_file()}
    written = 0

    def full_after_two_files(path: Path, data: bytes) -> None:
        nonlocal written
        written += 1
        if written > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        path.write_bytes(data)

    monkeypatch.setattr(store_module, "_write_bytes", full_after_two_files)
    store.keep(SPEC, Keep(all=True))
    with pytest.raises(RazorError, match=r"Cannot write to .*No space left on device.*free some space"):
        store.write(SPEC, checkpoints(), seconds=0)
    assert {path: path.read_bytes() for path in store.folder.rglob("*") if path.is_file()} == before


def test_a_full_disk_keeps_the_table_of_before(tmp_path: Path) -> None:
    """In a process whose files may not exceed 4 kB, which is how the kernel reports a full disk's kin, EFBIG."""
    code = (
        "import pathlib, resource, signal, sys, polars as pl; from rlrazor.runs.store import RunStore\n"
        "store = RunStore(pathlib.Path(sys.argv[1])); own = dict.fromkeys(['run_id', 'method', 'seed', 'step'], 1)\n"
        "store.write_table('records', pl.DataFrame({**own, 'x': [1]}))\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try: store.write_table('records', pl.DataFrame({'x': [hash(str(i)) for i in range(10_000)]}))\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("RazorError Cannot write to")
    assert pl.read_parquet(tmp_path / "records.parquet")["x"].to_list() == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["records.parquet"]


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with (
        pytest.raises(RazorError, match=r"Cannot write to .*Not a directory"),
        RunStore(tmp_path / "file" / "out").open_for_writing(),
    ):
        pass


def test_a_folder_stays_locked_until_the_outer_block_ends(store: RunStore) -> None:
    ask = (
        "import sys, pathlib, rlrazor.runs.store as s\n"
        "with s.RunStore(pathlib.Path(sys.argv[1])).open_for_writing(): pass"
    )
    line = [sys.executable, "-c", ask, str(store.folder)]
    with store.open_for_writing():
        with RunStore(store.folder / "runs" / "..").open_for_writing():
            pass
        refused = subprocess.run(line, capture_output=True, text=True, check=False)
    assert "Another razor process is writing" in refused.stderr
    assert subprocess.run(line, check=False).returncode == 0


def test_a_second_writer_is_refused_and_the_lock_dies_with_its_process(store: RunStore) -> None:
    hold = (
        "import sys, pathlib, rlrazor.runs.store as s\n"
        "with s.RunStore(pathlib.Path(sys.argv[1])).open_for_writing():\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(store.folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(RazorError, match="Another razor process"), store.open_for_writing():
            pass
        other.kill()
    with store.open_for_writing():
        pass


def test_leftovers_of_a_killed_process_are_cleared(store: RunStore) -> None:
    store.write(SPEC, checkpoints(), seconds=0)
    (store.runs / ".0123456789abcdef.77").mkdir()
    (store.runs / ".0123456789abcdef.77" / "records.jsonl").write_text("{")
    half = contextlib.ExitStack()
    half.enter_context(atomic_path(store.folder / "records.parquet")).write_bytes(b"PAR1")
    others = [store.runs / ".gitignore", store.folder / ".notes.tmp"]
    for path in others:
        path.write_text("the user's")
    with store.open_for_writing():
        assert sorted(path.name for path in store.runs.iterdir()) == sorted([SPEC.run_id, ".gitignore"])
        assert sorted(path.name for path in store.folder.iterdir()) == [".lock", ".notes.tmp", "runs"]
    assert [path.read_text() for path in others] == ["the user's"] * 2


def test_a_run_can_be_read_at_every_moment_of_its_replacement(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write(SPEC, checkpoints(), seconds=0)
    before, reader, rename, looked = store.read(SPEC), RunStore(store.folder), Path.rename, list[Path]()

    def look(path: Path, target: Path) -> Path:
        for _ in range(2):
            assert reader.is_finished(SPEC)
            assert reader.read(SPEC) == before
            looked.append(path)
            path = rename(path, target) if path.exists() else path
        return target

    store.keep(SPEC, Keep(last=True))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", look)
        store.write(SPEC, checkpoints(), seconds=0)
    assert len(looked) >= 2
    assert store.is_finished(SPEC)  # with its weights
    assert [path.name for path in store.runs.iterdir()] == [SPEC.run_id]


def test_a_run_is_read_though_it_moves_twice_meanwhile(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write(SPEC, checkpoints(), seconds=0)
    before, folder = store.read(SPEC), store.runs / SPEC.run_id
    moves = [lambda: folder.rename(store._aside(SPEC.run_id)), lambda: store._aside(SPEC.run_id).rename(folder)]

    def read(path: Path) -> str:
        if moves:
            moves.pop(0)()
        return read_text(path)

    monkeypatch.setattr("rlrazor.runs.store.read_text", read)
    assert store.read(SPEC) == before
    assert not moves


def test_a_process_that_is_killed_while_it_replaces_a_run_loses_none(store: RunStore) -> None:
    store.write(SPEC, checkpoints(), seconds=0)
    before = {path.name: path.read_bytes() for path in (store.runs / SPEC.run_id).iterdir()}
    code = (
        "import os, pathlib, sys, test_store as t; from rlrazor.runs.store import RunStore\n"
        "rename = pathlib.Path.rename\n"
        "def dies(path, target):\n"
        "    os._exit(9) if target.name == t.SPEC.run_id else rename(path, target)\n"
        "pathlib.Path.rename = dies\n"
        "RunStore(pathlib.Path(sys.argv[1])).write(t.SPEC, t.checkpoints(), seconds=0)"
    )
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    line = [sys.executable, "-c", code, str(store.folder)]
    assert subprocess.run(line, check=False, env={**os.environ, "PYTHONPATH": path}).returncode == 9
    assert store.is_finished(SPEC)  # to who reads it, such as another line
    with store.open_for_writing():
        assert [one.name for one in store.runs.iterdir()] == [SPEC.run_id]
    assert {one.name: one.read_bytes() for one in (store.runs / SPEC.run_id).iterdir()} == before


@pytest.mark.parametrize("damage", ["{", '{"run_id": "x", "colour": 1}\n', ""])
def test_a_damaged_record_file_is_named(store: RunStore, damage: str) -> None:
    store.write(SPEC, checkpoints(), seconds=0)
    (store.runs / SPEC.run_id / "records.jsonl").write_text(damage)
    with pytest.raises(RazorError, match=rf"{SPEC.run_id} cannot be read.*Delete it"):
        store.read(SPEC)


def test_damaged_weights_are_named(store: RunStore) -> None:
    store.keep(SPEC, Keep(last=True))
    store.write(SPEC, checkpoints(), seconds=0)
    store.weights_path(SPEC, 2).write_bytes(b"\x00" * 40)
    with pytest.raises(RazorError, match=r"step-000002.safetensors cannot be read"):
        store.load_weights(SPEC, 2)


def test_a_run_of_another_schema_is_refused(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "SCHEMA_VERSION", 0)
        store.write(SPEC, checkpoints(), seconds=0)
    with pytest.raises(RazorError, match="schema version 0"):
        store.read(SPEC)
    # Its runs would never be found again, and all would be trained anew beside them.
    sentence = r"schema version 0, this rlrazor reads 2. Choose another --out."
    with pytest.raises(RazorError, match=sentence), RunStore(store.folder).open_for_writing():
        pass


def test_atomic_path_keeps_the_old_file_when_the_writer_fails(tmp_path: Path) -> None:
    path = tmp_path / "table"
    path.write_text("old")

    def fail(partial: Path) -> None:
        partial.write_text("new, half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), atomic_path(path) as partial:
        fail(partial)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["table"]
