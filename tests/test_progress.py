"""What is shown of a sweep while it runs: on a terminal a bar, in a log lines with the same facts."""

import io
import os
import queue
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from rlrazor.runs import sweep, workers
from rlrazor.runs.progress import SweepProgress
from rlrazor.runs.records import Record, RunSpec
from rlrazor.runs.store import Checkpoint, RunStore
from rlrazor.system import phases, progress, quiet
from rlrazor.system.progress import doing

ONE, TWO = (RunSpec("toy", "sft", {"lr": lr, "schedule": "constant", "epochs": 1}, 0) for lr in (0.1, 0.2))


def record(spec: RunSpec, step: int) -> Record:
    return Record(spec.run_id, step, step / 4, 0.5, {"a": 0.25}, {"kl_forward": 0.125})


def plain() -> Console:
    return Console(file=io.StringIO(), width=400)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_line_has_the_step_the_checkpoint_the_phase_and_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    shown = SweepProgress("sweep", 2, 8, plain(), lambda spec: 4)
    name = ONE.describe()
    shown.at(ONE, "loading the base", 0, 0)
    assert shown.line == f"sweep: 0 of 2 runs done; {name}: loading the base"
    shown.at(ONE, "prior task winogrande,", 2, 5)
    assert shown.line.endswith("prior task winogrande, 2 of 5")
    now[0] += 60
    shown.at(ONE, phases.TRAINING, 10, 20)
    # Two of eight checkpoints took a minute.
    assert shown.line == f"sweep: 0 of 2 runs done, about 3 min left; {name}: step 10 of 20, checkpoint 2 of 4"
    shown.at(ONE, "measuring checkpoint", 2, 4)  # which is no step back
    assert shown.completed == 2
    assert shown.line.endswith("step 10 of 20, checkpoint 2 of 4, measuring checkpoint 2 of 4")
    shown.checkpoint(ONE, record(ONE, 10))
    assert shown.line.endswith("new 0.500, prior 0.250, KL 0.125")
    shown.at(TWO, phases.TRAINING, 5, 20)
    assert "; ".join((name, "x"))[:10] in shown.line
    assert f"{TWO.describe()}: step 5 of 20" in shown.line
    shown.finished([ONE])
    assert shown.completed == 5
    assert shown.line.startswith("sweep: 1 of 2 runs done, about 36 s left; sft lr 2.0e-01")


def test_without_a_terminal_there_are_lines_also_while_a_run_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY", 0.02)
    console = plain()
    with SweepProgress("sweep", 1, 4, console, lambda spec: 4) as shown:
        shown.at(ONE, "measuring the base", 0, 0)
        time.sleep(0.2)
    lines = text_of(console).splitlines()
    assert lines[0] == "sweep: 1 run, 4 checkpoints to measure"
    assert lines[1:].count(f"sweep: 0 of 1 run done; {ONE.describe()}: measuring the base") >= 2
    time.sleep(0.1)
    assert text_of(console).splitlines() == lines  # and it is over
    with doing(console, "Fitting"):
        phases.at("prior task", 1, 2)
        time.sleep(0.1)
    lines = text_of(console).splitlines()[len(lines) :]
    assert lines[0] == "Fitting ..."
    assert "Fitting: prior task 1 of 2" in lines


def test_a_bar_advances_within_a_run_and_a_sentence_is_said_once() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=200)
    with SweepProgress("sweep", 2, 8, console, lambda spec: 4) as shown:
        shown.at(ONE, phases.TRAINING, 5, 20)
        assert shown.bar.tasks[0].completed == 1
        shown.say("All score 0 [x].")
        shown.say("All score 0 [x].")
        shown.bar.refresh()
    assert text_of(console).count("All score 0 [x].") == 1
    assert "step 5 of 20, checkpoint 1 of 4" in text_of(console)
    nothing = plain()
    with SweepProgress("sweep", 0, 0, nothing):
        pass
    assert text_of(nothing) == ""


def train(spec: RunSpec, store: RunStore) -> Iterator[Checkpoint]:
    """Tells what it is at, as a trainer does."""
    phases.at("loading", 0, 0)
    phases.at(phases.TRAINING, 1, 2)
    phases.say(f"Look at {spec.params['lr']}.")
    yield Checkpoint(record(spec, 1))
    phases.at(phases.TRAINING, 2, 2)


class Heard(sweep.Progress):
    def __init__(self) -> None:
        self.told: list[tuple[object, ...]] = []
        self.said: list[str] = []

    def checkpoint(self, spec: RunSpec, record: Record) -> None:
        self.told.append((spec.run_id, "checkpoint"))

    def at(self, spec: RunSpec, phase: str, done: int, total: int) -> None:
        self.told.append((spec.run_id, phase, done, total))

    def say(self, sentence: str) -> None:
        self.said.append(sentence)


@pytest.mark.parametrize("in_worker", [False, True])
def test_what_a_run_is_at_reaches_the_main_process(
    in_worker: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, heard = RunStore(tmp_path), Heard()
    with store.open_for_writing():
        if in_worker:
            messages: queue.Queue[object] = queue.Queue()
            monkeypatch.setattr(workers, "messages", messages)
            for trajectory in sweep.trajectories([ONE, TWO]):
                sweep.work(trajectory, train, store)
            sweep.forward([messages.get() for _ in range(messages.qsize())], heard)
        else:
            sweep.run([ONE, TWO], train, store, progress=heard)
    for spec in (ONE, TWO):
        own = [one[1:] for one in heard.told if one[0] == spec.run_id]
        assert own == [("loading", 0, 0), (phases.TRAINING, 1, 2), ("checkpoint",), (phases.TRAINING, 2, 2)]
    assert sorted(heard.said) == ["Look at 0.1.", "Look at 0.2."]
    phases.at("nobody listens")


def test_libraries_draw_no_bars_and_give_no_advice_to_developers() -> None:
    """In a fresh process, imported after it; and so in those that it starts."""
    code = """
import os, warnings
from rlrazor.system import quiet
quiet.libraries()
import datasets, huggingface_hub.utils, tqdm, transformers
assert huggingface_hub.utils.are_progress_bars_disabled()
assert datasets.are_progress_bars_disabled()
for bar in (transformers.utils.logging.tqdm, datasets.utils.tqdm, huggingface_hub.utils.tqdm, tqdm.tqdm):
    list(bar(range(3)))
warnings.warn("of a library", FutureWarning)
"""
    environment = {name: value for name, value in os.environ.items() if name not in quiet._ENVIRONMENT}
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
