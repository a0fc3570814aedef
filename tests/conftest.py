"""What every test shares."""

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from robot_runs import Stored

# Before torch is imported: tests run beside each other, on a core each, and a thread that waits must not spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def pytest_report_header() -> str:
    """What the guard's tests run with, of which there are two sets."""
    found = []
    for name in ("torch", "transformers", "accelerate", "peft", "trl"):
        with suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return ", ".join(found)


def pytest_collection_finish() -> None:
    """What was imported lives on: a collection of garbage, as after each model, need not look at it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _one_trainer_after_another() -> Iterator[None]:
    """Accelerate keeps the first trainer's precision for the whole process, and refuses another's.

    Transformers before 5 also keeps it in the environment.
    """
    yield
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    if (accelerate := sys.modules.get("accelerate.state")) is not None:
        accelerate.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands do not ask whether the hub answers: without a network the whole process would go on without it."""
    monkeypatch.setattr("rlrazor.lm.hub.answers", lambda: True)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without figures, which are looked at in other tests; with no base left over from another test."""
    from rlrazor.experiments.language import world
    from rlrazor.report import drawing

    monkeypatch.setattr(drawing, "save", lambda *arguments, **options: None)
    world.last_world.clear()
    yield
    world.last_world.clear()


@pytest.fixture(scope="session")
def robot_base(tmp_path_factory: pytest.TempPathFactory) -> "Stored":
    """A base of the robot experiment in a tiny world: six seconds, once."""
    from robot_runs import stored_base

    return stored_base(tmp_path_factory.mktemp("robot"))


@pytest.fixture(scope="session")
def briefly_measured(robot_base: "Stored") -> "Stored":
    """The same policy, of which six episodes of each task are measured."""
    from robot_runs import stored_briefly

    return stored_briefly(robot_base)
