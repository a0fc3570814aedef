"""What goes wrong in a simulator is one sentence and exit code 2, and what was finished before stays."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import polars as pl
import pytest

from rlrazor.cli import main
from rlrazor.experiments.robot.experiment import Robot
from rlrazor.experiments.robot.world import Floats, World
from robot_worlds import Plane, Points

SETTINGS = {
    "world": "points",
    "methods": "reinforce",
    "new-task": "carry",
    "prior-tasks": "reach",
    "demonstrations": "10",
    "new-demonstrations": "10",
    "bc-updates": "3",
    "width": "16",
    "layers": "1",
    "heads": "1",
    "episodes": "2",
    "kl-episodes": "1",
    "rl-updates": "1",
    "checkpoints-per-epoch": "1",
    "grid": "2",
    "starts": "2",
    "group-size": "2",
}


class Failing(Plane):
    """Sound where policies are evaluated and experts shown; on a grid of starts, in training, it fails."""

    def __init__(self, task: str, how: str) -> None:
        super().__init__(task)
        self.how, self.trained = how, False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Floats, dict[str, Any]]:
        self.trained = (options or {}).get("cell") is not None
        return super().reset(seed=seed, options=options)

    def step(self, action: Floats) -> tuple[Floats, float, bool, bool, dict[str, Any]]:
        seen, reward, terminated, truncated, info = super().step(action)
        if self.trained:
            if self.how == "dies":
                os._exit(1)
            if self.how == "raises":
                raise ValueError("the gripper is in the table")
            if self.how == "no number":
                seen = np.full_like(seen, np.nan)
            if self.how == "never ends":
                info = {"success": 0.0}
        return seen, reward, terminated, truncated, info


@dataclass(frozen=True)
class Bad(Points):
    """The world of points with an environment that fails so."""

    how: str = ""

    def environment(self, task: str) -> gymnasium.Env[Any, Any]:
        return Failing(task, self.how)


@pytest.fixture
def reproduce(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run the command in a world; the same folder each time."""

    def run(world: World, workers: int) -> int:
        experiment = Robot(workers, cache=tmp_path / "cache", filmed=False, world=world)
        monkeypatch.setattr("rlrazor.cli.robot.experiment_of", lambda *_: experiment)
        settings = [part for name, value in SETTINGS.items() for part in (f"--{name}", value)]
        return main(["reproduce", "robot", *settings, "--out", str(tmp_path / "run"), "--jobs", "1"])

    return run


@pytest.mark.parametrize(
    ("how", "workers", "sentence"),
    [
        ("raises", 0, "the gripper is in the table"),
        ("raises", 1, "the gripper is in the table"),
        ("no number", 0, "not a number"),
        ("dies", 1, "A process that simulates points died"),
    ],
)
def test_a_simulator_that_fails_in_training_costs_that_run_alone(
    how: str,
    workers: int,
    sentence: str,
    reproduce: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert reproduce(Bad(how=how), workers) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("razor: ")]
    assert len(said) == 1
    assert sentence in said[0]
    assert [path.parent.name for path in (tmp_path / "run/runs").glob("*/records.jsonl")] != []
    if how == "dies":
        assert reproduce(Points(), 0) == 0
        assert "1 run trained, 1 kept" in capsys.readouterr().err


def test_an_environment_that_never_ends_is_ended_at_the_horizon(
    reproduce: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reproduce(Bad(how="never ends"), 0) == 0
    table = pl.read_parquet(tmp_path / "run" / "records.parquet")
    steps = 1 * 2 * 2 * Points().horizon  # updates, starts, trajectories of each
    assert table.filter(method="reinforce")["interactions"].to_list() == [steps]


def test_a_policy_whose_actions_are_no_numbers_has_diverged(
    reproduce: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nowhere(self: Any, tokens: Any) -> Floats:
        return np.full(tokens.shape, np.nan, np.float32)

    monkeypatch.setattr("rlrazor.experiments.robot.policy.Acting.actions_of", nowhere)
    assert reproduce(Points(), 0) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("razor: ")]
    assert len(said) == 1
    assert "not a number: it has diverged" in said[0]
