"""Runs on a Ray cluster of two nodes on this machine: the same bits, a node that is killed, what a cluster lacks."""

import errno
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

# Before Ray is imported. Where the machine is busy a node takes longer to start than it is given.
os.environ.setdefault("RAY_raylet_start_wait_time_s", "240")
os.environ.setdefault("RAY_agent_register_timeout_ms", "240000")
os.environ.setdefault("RAY_worker_register_timeout_seconds", "240")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # all on 127.0.0.1
ray = pytest.importorskip("ray")

from ray.cluster_utils import Cluster as LocalCluster  # noqa: E402

from idx_files import write_dataset  # noqa: E402
from ray_runs import PATIENCE, spec, train  # noqa: E402
from rlrazor.cli import main  # noqa: E402
from rlrazor.errors import RazorError  # noqa: E402
from rlrazor.runs import ray_cluster, ray_node, sweep  # noqa: E402
from rlrazor.runs import store as of_store  # noqa: E402
from rlrazor.runs.ray_cluster import Cluster, RayWorkers  # noqa: E402
from rlrazor.runs.records import Record, RunSpec  # noqa: E402
from rlrazor.runs.runner import Options, run, warn_of_another_machine, warn_of_several_machines  # noqa: E402
from rlrazor.runs.store import Checkpoint, Keep, RunStore  # noqa: E402
from rlrazor.system.locks import locked  # noqa: E402
from test_lines import bits  # noqa: E402
from test_runner import Config, Toy, quiet  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore")]  # Ray's own

NODE: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "node_ip_address": "127.0.0.1"}
HEAD = {"include_dashboard": False, "num_gpus": 1}  # a GPU that nothing computes on
UNSEEN = "The cluster has GPUs, which runs do not see without --gpus: they are on the CPU."


class Listener(sweep.Progress):
    def __init__(self) -> None:
        self.told: list[str] = []
        self.said: list[str] = []

    def checkpoint(self, spec: RunSpec, record: Record) -> None:
        self.told.append(f"{spec.params['lr']} {record.step}")

    def finished(self, specs: Sequence[RunSpec]) -> None:
        self.told += [f"{spec.params['lr']} finished" for spec in specs]

    def say(self, sentence: str) -> None:
        self.said.append(sentence)


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """Two nodes, of one core each; the first has the driver."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)]))
        found = LocalCluster(initialize_head=True, head_node_args={**NODE, **HEAD})
        found.add_node(**NODE)
        yield found
        ray.shutdown()
        found.shutdown()


@pytest.fixture
def ours(cluster: LocalCluster) -> Iterator[RayWorkers]:
    with RayWorkers(Cluster(cluster.address)) as found:
        yield found


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RunStore]:
    store = RunStore(tmp_path / "out")
    with store.open_for_writing():
        yield store


def in_this_process(specs: Sequence[RunSpec], out: Path) -> RunStore:
    store = RunStore(out)
    for one in specs:
        store.keep(one, Keep(last=True))
    with store.open_for_writing():
        sweep.run(specs, train, store)
    return store


def test_runs_of_a_cluster_have_the_bits_of_this_process_and_are_heard_of(
    ours: RayWorkers, store: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = [spec(lr=lr) for lr in (0.1, 0.2, 0.3)]
    for one in specs:
        store.keep(one, Keep(last=True))
    listener = Listener()
    ours.run(specs, train, store, listener)
    assert all(store.is_finished(one) for one in specs)
    assert len(bits(store.folder)) == 3 * 3  # spec, records, the last weights
    assert bits(store.folder) == bits(in_this_process(specs, tmp_path / "plain").folder)
    for one in specs:
        own = [told for told in listener.told if told.startswith(f"{one.params['lr']} ")]
        assert own == [f"{one.params['lr']} {what}" for what in ("1", "2", "finished")]
    assert listener.said == [UNSEEN]
    # What is wrong with a run ends the command; what is finished stays.
    with pytest.raises(RazorError, match=r"^stillborn lr 1.0e-01 .*diverged before its first checkpoint"):
        ours.run([*specs, spec("stillborn")], train, store, listener)
    # As does a folder that takes no more, once another run is in it.
    write, taken = of_store._write_bytes, list[Path]()

    def full(path: Path, data: bytes) -> None:
        taken.append(path)
        if len({one.parent for one in taken}) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, data)

    monkeypatch.setattr(of_store, "_write_bytes", full)
    more = [spec(lr=lr) for lr in (0.4, 0.5)]
    with pytest.raises(RazorError, match=r"Cannot write to .*No space left on device.*is kept"):
        ours.run(more, train, store, listener)
    assert sum(store.is_finished(one) for one in more) == 1
    assert all(store.is_finished(one) for one in specs)


@pytest.mark.slow
def test_bases_and_teachers_go_to_the_nodes_and_what_is_finished_comes_back(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    toy, config = Toy(), Config()
    run(toy, config, Options(tmp_path / "plain"), quiet())
    done = run(toy, config, Options(tmp_path / "out", cluster=Cluster(cluster.address, at_once=2)), quiet())
    assert done.trained == 10
    assert RunStore(tmp_path / "out").made_by() == RunStore(tmp_path / "plain").made_by() != []
    assert bits(tmp_path / "out") == bits(tmp_path / "plain")
    assert not ray.is_initialized()


@pytest.mark.slow
def test_a_run_starts_again_where_its_node_is_killed(
    cluster: LocalCluster, ours: RayWorkers, store: RunStore, tmp_path: Path
) -> None:
    specs, marks = [spec(lr=lr, folder=tmp_path) for lr in (0.1, 0.2)], tmp_path
    for one in specs:
        store.keep(one, Keep(last=True))
    victim = next(iter(cluster.worker_nodes))
    listener = Listener()

    def kill_midway() -> None:
        until = time.monotonic() + PATIENCE
        while not list(marks.glob(f"*.{victim.node_id}.*")) and time.monotonic() < until:
            time.sleep(0.05)
        cluster.remove_node(victim, allow_graceful=False)
        (marks / "go").touch()

    killer = threading.Thread(target=kill_midway)
    killer.start()
    try:
        ours.run(specs, train, store, listener)
    finally:
        killer.join()
        cluster.add_node(**NODE)
    started = [path.name.split(".") for path in marks.glob("*.*.*")]
    (lost,) = [run_id for run_id, node, _ in started if node == victim.node_id]
    assert len({node for run_id, node, _ in started if run_id == lost}) == 2
    (_, said) = listener.said
    assert "was lost with its node or its process" in said
    assert bits(store.folder) == bits(in_this_process(specs, tmp_path / "plain").folder)


@pytest.mark.slow
def test_a_run_sees_the_gpus_that_it_takes(cluster: LocalCluster, store: RunStore) -> None:
    for gpus, seen in ((0, ""), (1, "0")):
        listener = Listener()
        with RayWorkers(Cluster(cluster.address, gpus=gpus)) as ours:
            ours.run([spec("seeing", lr=1.0 + gpus)], train, store, listener)
        assert listener.said == [*([] if gpus else [UNSEEN]), f"GPUs: {seen}."]


@pytest.mark.slow
def test_ctrl_c_ends_what_the_tasks_are_at(cluster: LocalCluster, store: RunStore, tmp_path: Path) -> None:
    waiting = spec(folder=tmp_path)

    def interrupt() -> None:
        until = time.monotonic() + PATIENCE
        while not list(tmp_path.glob("*.*.*")) and time.monotonic() < until:
            time.sleep(0.05)
        signal.raise_signal(signal.SIGINT)

    interrupter = threading.Thread(target=interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it may be ignored
    interrupter.start()
    try:
        with pytest.raises(KeyboardInterrupt), RayWorkers(Cluster(cluster.address)) as ours:
            ours.run([waiting], train, store, Listener())
    finally:
        interrupter.join()
        signal.signal(signal.SIGINT, before)
    (mark,) = tmp_path.glob("*.*.*")
    until = time.monotonic() + PATIENCE / 2
    while _is_alive(int(mark.suffix[1:])):
        assert time.monotonic() < until
        time.sleep(0.1)
    assert not store.is_finished(waiting)


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


GRID = [
    *("reproduce", "parity-mnist", "--methods", "grpo,rl-distilled", "--lrs", "1e-3", "--schedules", "constant"),
    *("--epochs", "1", "--seeds", "0,1", "--batch-size", "16", "--group-size", "8", "--checkpoints-per-epoch", "1"),
    *("--pretrain-epochs", "2", "--pretrain-size", "100"),
]


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_the_digits_of_a_cluster_are_those_of_two_processes(
    cluster: LocalCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_dataset(tmp_path / "data", train=300, test=100)
    command = [*GRID, "--data-dir", str(data), "--weights", "final"]
    plain, out = tmp_path / "plain", tmp_path / "out"
    assert main([*command, "--out", str(plain), "--jobs", "2"]) == 0
    assert main([*command, "--out", str(out), "--executor", "ray", "--address", cluster.address]) == 0
    assert bits(out) == bits(plain)
    capsys.readouterr()
    assert main([*command, "--out", str(out)]) == 0
    assert " runs trained, " in (said := capsys.readouterr().err)
    assert "\n0 runs trained" in f"\n{said.strip().splitlines()[-1]}"


def test_no_cluster_at_the_address_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as bound:  # which nobody listens at
        bound.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        began = time.monotonic()
        options = ["--executor", "ray", "--address", address, "--out", str(tmp_path / "out")]
        assert main(["reproduce", "parity-mnist", *options]) == 2
    assert time.monotonic() - began < 60
    said = capsys.readouterr().err
    assert said.startswith(f"razor: No Ray cluster answers at {address} (Connection refused): start one by")
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--address", "127.0.0.1:6379"], "--address goes with --executor ray."),
        (["--gpus", "1"], "--gpus goes with --executor ray."),
        (["--executor", "ray", "--address", "nowhere"], "--address is HOST:PORT of a Ray cluster's head"),
        (["--executor", "ray", "--line", "1"], "--line trains one run, in its own process"),
        (["--executor", "ray", "--print-commands"], "--print-commands prints lines, each of a process of its own"),
        (["--executor", "ray", "--gpus", "1.5"], "--gpus above 1 is a whole number, not 1.5"),
        (["--executor", "ray", "--cpus", "0"], "--cpus must be at least 0.01, not 0"),
    ],
)
def test_options_that_do_not_go_together(options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "parity-mnist", *options]) == 2
    assert sentence in capsys.readouterr().err


def test_a_node_with_other_packages_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = ray_node.versions()
    assert ray_node._unlike(theirs) is None
    for wanted, said in (({"torch": "0.1"}, f"has torch {theirs['torch']}"), ({"dinosaur": "1"}, "lacks dinosaur")):
        sentence = ray_node._unlike({**theirs, **wanted})
        assert sentence is not None
        assert f"The node {socket.gethostname()} of the cluster {said}, and the command runs with" in sentence


def test_runs_of_several_kinds_of_nodes_are_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    specs, console, store = [spec(lr=lr) for lr in (0.1, 0.2)], quiet(), RunStore(tmp_path)
    with console.capture() as captured:
        for one, machine in zip(specs, ("a node", "another"), strict=True):
            monkeypatch.setattr("rlrazor.runs.store.MACHINE", machine)
            store.write(one, [Checkpoint(Record(one.run_id, 1, 1.0, 0.5, {}, {}))], seconds=0)
            warn_of_several_machines(store, specs, console)
        warn_of_another_machine(store, Options(tmp_path, cluster=Cluster()), console)  # before, where nobody knows
    said = " ".join(captured.get().split())
    assert said.count("last digits") == 1
    assert " on a node and with torch " in said
    assert " on another: their last digits may differ." in said


def test_a_run_that_is_lost_again_and_again_ends_the_command() -> None:
    listener = Listener()
    lose: Callable[[int], None] = lambda times: ray_cluster._say_lost(spec(), "OutOfMemoryError", times, listener)  # noqa: E731
    lose(1)
    lose(2)
    assert len(listener.said) == 2
    with pytest.raises(RazorError, match=r"was lost 3 times with its node.*Finished runs are kept"):
        lose(3)


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the scratch folders are; this process is a worker that has none yet."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(ray_node, "_folder", None)
    with ExitStack() as held:
        monkeypatch.setattr(ray_node, "_while_alive", held)
        yield tmp_path


def test_a_worker_that_clears_takes_no_folder_of_one_that_starts(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = scratch / "rlrazor-ray-dead"
    (dead / "runs").mkdir(parents=True)
    make, other = tempfile.mkdtemp, ExitStack()

    def make_while_another_clears(prefix: str) -> str:
        made = make(prefix=prefix)
        for left in scratch.glob("rlrazor-ray-*"):
            if left != dead:
                other.enter_context(locked(left / ".lock", "in use"))
        return made

    monkeypatch.setattr(tempfile, "mkdtemp", make_while_another_clears)
    with other:
        folder = ray_node._scratch()
    assert [path.name for path in scratch.iterdir()] == [folder.name]
    assert folder.name.startswith("rlrazor-ray-")
    assert (folder / "runs").is_dir()
    with pytest.raises(RazorError, match="in use"), locked(folder / ".lock", "in use"):
        pass
    assert ray_node._scratch() == folder


def test_without_locks_no_worker_clears_what_may_be_in_use(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (scratch / "rlrazor-ray-live" / "runs").mkdir(parents=True)

    def flock(*_: object) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr("fcntl.flock", flock)
    ray_node._scratch()
    assert (scratch / "rlrazor-ray-live" / "runs").is_dir()


def test_secrets_do_not_go_to_the_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_TOKEN_OF_ANOTHER", "hf_secret")
    monkeypatch.setenv("RLRAZOR_API_KEY", "hf_secret")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    handed = ray_cluster.handed_on()
    assert handed["HF_HUB_OFFLINE"] == "1"
    assert handed["TOKENIZERS_PARALLELISM"] == "false"
    assert "hf_secret" not in handed.values()


@pytest.mark.parametrize(
    ("cluster_of", "cpus", "gpus", "said"),
    [
        (Cluster("head:1", cpus=8), 8, 0, None),
        (Cluster("head:1", cpus=8, gpus=1), 8, 1, None),
        (Cluster("head:1", cpus=9), 8, 0, "No node of the cluster has 9 CPUs and 0 GPUs for a run: all wait until one"),
        (Cluster("head:1"), 8, 2, UNSEEN),
        (Cluster(), 8, 2, UNSEEN),
    ],
)
def test_what_nodes_have_is_compared_with_what_runs_take(
    cluster_of: Cluster, cpus: int, gpus: int, said: str | None
) -> None:
    nodes = [
        {"Alive": True, "Resources": {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}},
        {"Alive": False, "Resources": {"CPU": 100, "GPU": 100}},
    ]
    listener = Listener()
    ray_cluster._compare(cluster_of, nodes, listener)
    assert [one[: len(said or "")] for one in listener.said] == ([said] if said else [])


def test_runs_too_large_for_a_cluster_that_nobody_can_join_are_refused() -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": 8.0, "GPU": 1.0}}]
    for one in (Cluster(cpus=64, gpus=1), Cluster(gpus=2)):
        sentence = (
            rf"This machine has 8 CPUs and 1 GPUs, not {one.cpus} CPUs and {one.gpus} GPUs for a run: ask for less"
        )
        with pytest.raises(RazorError, match=sentence):
            ray_cluster._compare(one, nodes, Listener())
