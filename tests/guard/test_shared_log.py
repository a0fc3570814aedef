"""One log to which two processes add: a monitor in training, which is not waited with, and `razor watch`."""

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

import pytest

from laws import PROMPTS, law_of
from rlrazor.errors import RazorError
from rlrazor.guard import log as log_module
from rlrazor.guard.log import PATIENCE, Log, rows_in_log, rows_until
from rlrazor.guard.log_schema import LogRow, is_monitors
from rlrazor.guard.pick import pick
from rlrazor.guard.run_folder import Run, rows_of
from rlrazor.guard.verdict import Limits
from rlrazor.system import locks
from rlrazor.system.locks import open_alone
from tiny_models import char_tokenizer, saved, tiny_llama
from watching import trainer_of, watch

ROOT = Path(__file__).parents[2]
PATHS = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT / "src"), str(ROOT / "tests")))}


def row(step: int, by: str = "monitor", **more: Any) -> dict[str, Any]:
    return {"run": "a", "step": step, "kl_forward": 0.5, **({} if by == "monitor" else {"weights": by}), **more}


def of_file(path: Path) -> list[Any]:
    """Every line, which has to be whole."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def process(script: str, *given: Any) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", script, *map(str, given)]
    return subprocess.Popen(command, env=PATHS, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


# Two that write

WRITER = """
import sys, time, random
from pathlib import Path
from rlrazor.guard.log import Log, rows_until

path, name, go = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
log, heard, rng = Log(path, lambda text: heard.append(text)), [], random.Random(name)
log.begin(lambda rows: rows)
(go / name).touch()
while len(list(go.iterdir())) < 2:
    time.sleep(0.01)
for step in range(1, 201):
    long = {"first_prompt": name * rng.randrange(5_000)}
    if name == "monitor":
        if step % 50 == 0:  # it resumes ten steps earlier
            log = Log(path, heard.append)
            log.begin(lambda rows: rows_until(rows, step - 10, ()))
        log.add({"run": "a", "step": step, "kl_forward": 0.5, **long})
    else:
        log.add({"run": "a", "step": step, "kl_forward": 0.5, "weights": f"{step:016x}", **long})
    time.sleep(rng.random() / 200)
assert not heard, heard
"""


def test_two_processes_lose_nothing_and_cut_nothing_in_two(tmp_path: Path) -> None:
    """Also where one of them writes the log anew, without some of its own rows."""
    path, go = tmp_path / "run" / "razor.jsonl", tmp_path / "go"
    go.mkdir()
    both = [process(WRITER, path, name, go) for name in ("monitor", "watch")]
    for one in both:
        out, _ = one.communicate(timeout=120)
        assert one.returncode == 0, out
    rows = of_file(path)
    expected = [step for step in range(1, 201) if step % 50 < 41]  # the others were taken out as it resumed
    assert [one["step"] for one in rows if "weights" not in one] == expected
    assert [one["step"] for one in rows if "weights" in one] == list(range(1, 201))
    assert not [found for found in path.parent.iterdir() if found != path]


def test_who_was_stopped_while_writing_is_not_waited_for(tmp_path: Path) -> None:
    """A process that has the file and never gives it back."""
    path = tmp_path / "razor.jsonl"
    heard: list[str] = []
    log = Log(path, heard.append)
    log.begin(None)
    log.add(row(1))
    with open_alone(path, 0.0):
        begun = time.monotonic()
        log.add(row(2))
        resumed = Log(path, heard.append)
        assert [one["step"] for one in resumed.begin(lambda rows: rows_until(rows, 1, ()))] == [1]
        resumed.add(row(2, first_prompt="again"))
        took = time.monotonic() - begun
    assert 2 * PATIENCE <= took < 3 * PATIENCE + 1.0  # the last has the file that it has written itself
    assert of_file(path) == [row(1), row(2, first_prompt="again")]
    assert not heard


def test_who_waited_writes_into_the_file_that_has_the_name_by_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlrazor.guard.log.PATIENCE", 60.0)
    path = tmp_path / "razor.jsonl"
    log = Log(path, print)
    log.begin(None)
    with ThreadPoolExecutor() as pool, open_alone(path, 0.0):
        added = pool.submit(log.add, row(2))
        time.sleep(0.2)
        assert not added.done()
        path.rename(tmp_path / "earlier.jsonl")
        path.write_text(json.dumps(row(1)) + "\n")
    assert of_file(path) == [row(1), row(2)]
    assert (tmp_path / "earlier.jsonl").read_text() == ""


def test_who_was_stopped_after_renaming_is_not_waited_for_either(tmp_path: Path) -> None:
    """And what is written then is in the file that has the name, not in the one that had it."""
    path = tmp_path / "razor.jsonl"
    log = Log(path, print)
    log.begin(None)
    with ThreadPoolExecutor() as pool, open_alone(path, 0.0):
        added = pool.submit(log.add, row(2))
        time.sleep(PATIENCE / 4)
        path.rename(tmp_path / "earlier.jsonl")
        path.write_text(json.dumps(row(1)) + "\n")
        added.result(timeout=PATIENCE + 10.0)
    assert of_file(path) == [row(1), row(2)]
    assert (tmp_path / "earlier.jsonl").read_text() == ""


def test_where_a_file_never_seems_to_have_its_name_it_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a file system that tells an open file otherwise than its name."""
    monkeypatch.setattr(locks, "_has_the_name", lambda *_: False)
    path = tmp_path / "razor.jsonl"
    begun = time.monotonic()
    with ThreadPoolExecutor() as pool:
        added = pool.submit(Log(path, print).add, row(1))
        try:
            added.result(timeout=PATIENCE + 10.0)
        finally:
            monkeypatch.undo()
    assert time.monotonic() - begun >= PATIENCE
    assert of_file(path) == [row(1)]


@pytest.mark.parametrize(
    ("tail", "kept"),
    [
        ('{"run": "a", "step": 3, "kl_for', ""),
        ('{"ru', ""),
        (json.dumps(row(2)), json.dumps(row(2)) + "\n"),
        ("a note", "a note\n"),
    ],
)
def test_a_row_is_not_written_behind_half_a_row(tail: str, kept: str, tmp_path: Path) -> None:
    path = tmp_path / "razor.jsonl"
    log = Log(path, print)
    log.begin(None)
    log.add(row(1))
    with path.open("a") as file:
        file.write(tail)
    log.add(row(4))
    assert path.read_text() == json.dumps(row(1)) + "\n" + kept + json.dumps(row(4)) + "\n"


def test_a_full_disk_leaves_no_half_row_and_what_is_late_comes_later(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")  # not on Windows
    path = tmp_path / "razor.jsonl"
    heard: list[str] = []
    log = Log(path, heard.append)
    log.begin(None)
    log.add(row(1))
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, limits[1]))
        log.add(row(2))
        log.add(row(3))
        found = path.read_bytes()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert found == before
    assert len(heard) == 1
    assert "razor.jsonl cannot be written" in heard[0]
    Log(path, print).add(row(9))  # another's
    log.add(row(4))
    assert [one["step"] for one in of_file(path)] == [1, 9, 2, 3, 4]


def test_a_row_that_cannot_be_written_takes_no_other_with_it(tmp_path: Path) -> None:
    """Another, who did not wait, writes between the half of a row that the disk takes and its error."""
    path = tmp_path / "razor.jsonl"
    Log(path, print).add(row(1))

    class Full(FileIO):
        is_full = False

        def write(self, data: Any) -> int:
            if self.is_full:
                with path.open("ab") as other:
                    other.write(b"\n" + json.dumps(row(2)).encode() + b"\n")
                raise OSError(errno.ENOSPC, "No space left on device")
            self.is_full = True
            return super().write(data[:10])

    with Full(path, "a+") as file, pytest.raises(OSError, match="No space"):
        log_module._append(file, json.dumps(row(3)).encode() + b"\n")
    assert [one["step"] for one in rows_in_log(path)] == [1, 2]


def test_a_fresh_run_moves_the_log_away_and_a_resumed_one_takes_out_its_own_rows_alone(tmp_path: Path) -> None:
    path = tmp_path / "razor.jsonl"
    heard: list[str] = []
    for log, kept in ((Log(path, heard.append), None), (Log(path, heard.append), None)):
        assert log.begin(kept) == []
        for step in (1, 2, 3):
            log.add(row(step))
    assert heard == ["[razor] razor.jsonl is an earlier run's: it is in razor-of-earlier-run-1.jsonl now."]
    assert of_file(tmp_path / "razor-of-earlier-run-1.jsonl") == of_file(path) == rows_in_log(path)
    log.add(row(3, "0123456789abcdef"))
    log.add({"run": "a", "step": 3, "on_budget": "sha"})
    log.add({"run": "a", "step": 3, "error": "no memory"})
    resumed = Log(path, heard.append).begin(lambda rows: rows_until(rows, 2, ("kl_forward",)))
    assert resumed == of_file(path)
    assert [(one["step"], "kl_forward" in one) for one in resumed] == [(1, True), (2, True), (3, True), (3, False)]

    def refused(_: Any) -> Any:
        raise RazorError("of another base")

    with pytest.raises(RazorError, match="of another base"):
        Log(path, print).begin(refused)
    assert of_file(path) == resumed


def test_without_locks_no_file_is_open_that_another_takes_the_name_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows, which has none, and refuses to rename what is open."""
    opened: list[FileIO] = []
    renamed: list[str] = []

    @contextmanager
    def open_recorded(path: Path, patience: float) -> Iterator[FileIO]:
        with open_alone(path, patience) as file:
            opened.append(file)
            yield file

    def strict(known: Any) -> Any:
        def rename(path: Path, target: Path) -> Any:
            assert all(file.closed for file in opened)
            renamed.append(target.name)
            return known(path, target)

        return rename

    monkeypatch.setattr(locks, "fcntl", None)
    monkeypatch.setattr(log_module, "open_alone", open_recorded)
    for name in ("rename", "replace"):
        monkeypatch.setattr(Path, name, strict(getattr(Path, name)))
    path = tmp_path / "razor.jsonl"
    for _ in range(2):
        log = Log(path, print)
        assert log.begin(None) == []
        for step in (1, 2):
            log.add(row(step))
    resumed = Log(path, print)
    assert resumed.begin(lambda rows: rows_until(rows, 1, ())) == [row(1)]
    resumed.add(row(2, first_prompt="again"))
    assert of_file(path) == [row(1), row(2, first_prompt="again")]
    assert of_file(tmp_path / "razor-of-earlier-run-1.jsonl") == [row(1), row(2)]
    assert renamed == ["razor-of-earlier-run-1.jsonl", "razor.jsonl"]


def test_whose_a_row_is_is_told_alike_of_a_file_and_of_what_was_read(tmp_path: Path) -> None:
    """A row of a command alone is no monitor's, though it may be of a step that only a monitor has measured."""
    path = tmp_path / "razor.jsonl"
    command = {"run": "a", "step": 1, "on_budget": "sha"}
    by_watch = row(2, "0123456789abcdef")
    rows = [row(1), command, by_watch, {**row(3, "0123456789abcdef"), "on_budget": "sha"}, row(4, error="no memory")]
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    for one in rows:
        assert is_monitors(one) == is_monitors(LogRow(**one)) == (one["step"] == 4 or one == rows[0])
    found, _ = rows_of(Run(tmp_path, path, None, False, [], [], []))
    assert [one.step for one in found] == [1, 4, 2, 3]


# A monitor and a watch

TRAINING = """
import sys, time
from pathlib import Path
import transformers
from rlrazor.guard.law_file import LawFile
from watching import trainer_of, watch

folder = Path(sys.argv[1])


class Slow(transformers.TrainerCallback):
    def __init__(self, until): self.until = until
    def on_step_end(self, args, state, control, **_):
        time.sleep(1.0)
        control.should_training_stop |= state.global_step == self.until


while not (folder / "run" / ".razor.jsonl.lock").exists():
    time.sleep(0.1)
for until, resumed in ((8, None), (12, str(folder / "run" / "checkpoint-4"))):
    monitor = watch(folder, LawFile.load(folder / "law.json"), every=4)
    saving = {"max_steps": 12, "save_strategy": "steps", "save_steps": 2}
    trainer_of(folder / "run", [Slow(until), monitor], **saving).train(resume_from_checkpoint=resumed)
"""


@pytest.mark.slow
def test_a_monitor_that_resumes_and_a_watch_share_a_log(tmp_path: Path) -> None:
    """Each step is measured once, by the monitor where it is due, else by the watch, whatever either did before."""
    base, run = tiny_llama(), tmp_path / "run"
    saved(tmp_path / "base", base, char_tokenizer())
    law_of(base, scale=20.0).save(tmp_path / "law.json")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    run.mkdir()
    both = [
        subprocess.Popen(
            [sys.executable, *command], env=PATHS, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for command in (
            ["-c", TRAINING, str(tmp_path)],
            ["-m", "rlrazor", "watch", str(run), "--base", str(tmp_path / "base"), "--interval", "0.1", "--idle", "5",
             "--prompts", str(tmp_path / "prompts.jsonl"), "--law", str(tmp_path / "law.json")],
        )
    ]  # fmt: skip
    try:
        for one in both:
            out, _ = one.communicate(timeout=600)
            assert one.returncode == 0, out
    finally:
        for one in both:
            one.kill()
    rows = of_file(run / "razor.jsonl")
    by_monitor, by_watch = ([one for one in rows if ("weights" in one) == watched] for watched in (False, True))
    assert [one["step"] for one in by_monitor] == [4, 8, 12]
    assert {one["step"] for one in by_watch} == {2, 6, 10}
    assert len({one["weights"] for one in by_watch}) == len(by_watch)
    assert len({one["run"] for one in by_monitor}) == 1  # before it wrote, the watch had an id of its own
    alone = watch(tmp_path, None, every=2)
    trainer_of(tmp_path / "alone", [alone], max_steps=12).train()
    for reading in alone.readings:
        last = [one for one in rows if one["step"] == reading.step][-1]
        assert last["kl_forward"] == pytest.approx(reading.kl["kl_forward"].mean, rel=1e-4)
    found = pick(run, Limits(drop=0.99, accept_uncertain=True))
    assert [one.step for one in found.candidates] == [2, 4, 6, 8, 10, 12]
