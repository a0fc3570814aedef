"""The sweep on a toy training loop: prefixes, resume, workers that die, divergence."""

import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from rlrazor.errors import RazorError
from rlrazor.runs import sweep
from rlrazor.runs.records import Record, RunSpec
from rlrazor.runs.store import Checkpoint, RunStore
from rlrazor.runs.sweep import DivergedError
from rlrazor.system import interrupts


def spec(method: str = "toy", epochs: int = 1, schedule: str = "constant", lr: float = 0.1) -> RunSpec:
    return RunSpec("toy", method, {"lr": lr, "schedule": schedule, "epochs": epochs}, 0)


def train(spec: RunSpec, store: RunStore) -> Iterator[Checkpoint]:
    """Two checkpoints per epoch; leaves a mark each time a run is trained."""
    with (store.folder / "trained.log").open("a") as log:
        log.write(f"{spec.run_id}\n")
    if spec.method == "suicidal":
        os.kill(os.getpid(), signal.SIGKILL)
    if spec.method == "stillborn":
        raise DivergedError(1, 0.5)
    for step in range(1, 2 * spec.params["epochs"] + 1):
        if spec.method == "diverging" and step == 3:
            raise DivergedError(step, step / 2)
        yield Checkpoint(Record(spec.run_id, step, step / 2, spec.params["lr"] * step, {"p": 1 / step}, {"kl": 0.1}))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RunStore]:
    store = RunStore(tmp_path / "out")
    with store.open_for_writing():
        yield store


def trained(store: RunStore) -> list[str]:
    log = store.folder / "trained.log"
    return log.read_text().split() if log.exists() else []


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_short_constant_run_is_the_beginning_of_the_long_one(store: RunStore, jobs: int) -> None:
    short, long, cosine = spec(epochs=1), spec(epochs=2), spec(epochs=2, schedule="cosine")
    sweep.run([short, long, cosine], train, store, jobs=jobs)
    assert sorted(trained(store)) == sorted([long.run_id, cosine.run_id])
    assert [record.step for record in store.read(short).records] == [1, 2]
    assert [record.step for record in store.read(long).records] == [1, 2, 3, 4]
    assert {record.run_id for record in store.read(short).records} == {short.run_id}
    assert store.read(short).records[0].new == store.read(long).records[0].new


def test_several_runs_at_a_time_are_refused_under_torchrun(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RazorError, match="torchrun"):
        sweep.run([spec(), spec(epochs=2)], train, store, jobs=2)
    assert trained(store) == []


def test_only_what_is_missing_is_trained(store: RunStore) -> None:
    first, second = spec(lr=0.1), spec(lr=0.2)
    sweep.run([first], train, store)
    sweep.run([first, second], train, store)
    sweep.run([first, second], train, store)
    assert trained(store) == [first.run_id, second.run_id]


def test_progress_is_told_of_every_checkpoint_and_run(store: RunStore) -> None:
    class Listener(sweep.Progress):
        def __init__(self) -> None:
            self.steps: list[tuple[str, int]] = []
            self.runs: list[RunSpec] = []

        def checkpoint(self, spec: RunSpec, record: Record) -> None:
            self.steps.append((spec.run_id, record.step))

        def finished(self, specs: Sequence[RunSpec]) -> None:
            self.runs += specs

    specs = [spec(lr=0.1), spec(lr=0.2), spec(lr=0.3)]
    for jobs, method in ((1, "toy"), (2, "other")):
        listener = Listener()
        renamed = [RunSpec(s.experiment, method, s.params, s.seed) for s in specs]
        sweep.run(renamed, train, store, jobs=jobs, progress=listener)
        assert sorted(listener.runs, key=lambda s: s.run_id) == sorted(renamed, key=lambda s: s.run_id)
        assert sorted(listener.steps) == sorted((s.run_id, step) for s in renamed for step in (1, 2))


def test_a_worker_that_dies_is_one_sentence_and_finished_runs_stay(store: RunStore) -> None:
    good, bad = spec(), spec(method="suicidal")
    sweep.run([good], train, store)
    with pytest.raises(RazorError, match=r"worker process died.*Finished runs are kept"):
        sweep.run([good, bad, spec(method="suicidal", lr=0.2)], train, store, jobs=2)
    assert store.is_finished(good)
    assert not store.is_finished(bad)


def test_a_worker_that_is_killed_while_it_has_nothing_to_do_costs_nothing(store: RunStore) -> None:
    with sweep.Workers(2) as ours:
        ours.run([spec(lr=0.1)], train, store, sweep.Progress())
        (idle,) = multiprocessing.active_children()
        idle.kill()
        idle.join()
        ours.run([spec(lr=0.2)], train, store, sweep.Progress())
        assert idle not in multiprocessing.active_children()
    assert not multiprocessing.active_children()
    assert all(store.is_finished(spec(lr=lr)) for lr in (0.1, 0.2))


def test_what_a_worker_says_is_heard_before_its_run_is_over(store: RunStore) -> None:
    class Listener(sweep.Progress):
        def __init__(self) -> None:
            self.told: list[str] = []

        def checkpoint(self, spec: RunSpec, record: Record) -> None:
            self.told.append("checkpoint")

        def finished(self, specs: Sequence[RunSpec]) -> None:
            self.told.append("finished")

    with sweep.Workers(2) as ours:
        for number in range(30):
            listener = Listener()
            ours.run([spec(lr=0.001 * (number + 1))], train, store, listener)
            assert listener.told == ["checkpoint", "checkpoint", "finished"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_is_not_lost_where_python_ignores_it(store: RunStore) -> None:
    class Interrupted:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    def interrupted(spec: RunSpec, store: RunStore) -> Iterator[Checkpoint]:
        for number, checkpoint in enumerate(train(spec, store)):
            if spec.params["lr"] == 0.2 and number == 1:
                Interrupted()
            yield checkpoint

    specs = [spec(lr=0.1), spec(lr=0.2), spec(lr=0.3)]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it may be ignored
    try:
        with pytest.raises(KeyboardInterrupt), interrupts.remembered():
            sweep.run(specs, interrupted, store)
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
        # Where it is ignored, it stays so.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with interrupts.remembered():
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert [store.is_finished(one) for one in specs] == [True, False, False]
    sweep.run(specs, train, store)  # and it is over
    assert all(store.is_finished(one) for one in specs)


def test_a_diverged_run_keeps_what_was_measured(store: RunStore) -> None:
    short, long = spec("diverging", epochs=1), spec("diverging", epochs=2)
    sweep.run([short, long], train, store)
    assert store.read(long).diverged_at == 3
    assert [record.step for record in store.read(long).records] == [1, 2]
    assert store.read(short).diverged_at is None  # it ended before the trouble


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_run_without_a_single_checkpoint_stops_the_sweep(store: RunStore, jobs: int) -> None:
    with pytest.raises(RazorError, match=r"stillborn lr 1.0e-01 .*diverged before its first checkpoint"):
        sweep.run([spec("stillborn"), spec("stillborn", lr=0.1, epochs=1, schedule="cosine")], train, store, jobs=jobs)
