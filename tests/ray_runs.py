"""What the tests of the Ray executor train: importable by the workers of a cluster, as a test file may not be."""

import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from rlrazor.runs.records import Record, RunSpec
from rlrazor.runs.store import Checkpoint, RunStore
from rlrazor.runs.sweep import DivergedError
from rlrazor.system import phases

PATIENCE = 240.0  # seconds


def spec(method: str = "toy", lr: float = 0.1, folder: Path | None = None) -> RunSpec:
    params = {"lr": lr, "schedule": "cosine", "epochs": 1, "folder": str(folder or "")}
    return RunSpec("toy", method, params, 0)


def train(spec: RunSpec, store: RunStore) -> Iterator[Checkpoint]:
    """Two checkpoints of random weights; says in its folder where it is, and waits there for `go`, if it has one.

    A "stillborn" run has none. One that is "seeing" tells which GPUs it sees.
    """
    if spec.method == "stillborn":
        raise DivergedError(1, 0.5)
    if spec.method == "seeing":
        phases.say(f"GPUs: {os.environ.get('CUDA_VISIBLE_DEVICES', 'all')}.")
    if spec.params["folder"]:
        _wait(Path(spec.params["folder"]), spec)
    for step in (1, 2):
        torch.manual_seed(step + round(1000 * spec.params["lr"]))
        weights = {"w": torch.randn(3, 4).exp()}
        score = weights["w"].mean().item() / 100
        yield Checkpoint(
            Record(spec.run_id, step, step / 2, score, {"p": score}, {"kl": score}), partial(dict, weights)
        )


def _wait(folder: Path, spec: RunSpec) -> None:
    import ray

    if ray.is_initialized():
        node = ray.get_runtime_context().get_node_id()
        (folder / f"{spec.run_id}.{node}.{os.getpid()}").touch()
    until = time.monotonic() + PATIENCE
    while not (folder / "go").exists() and time.monotonic() < until:
        time.sleep(0.05)
