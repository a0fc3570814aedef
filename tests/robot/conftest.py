"""What the tests of the robot's policy share: a base in the tiny world, made once."""

import pytest
import torch

from rlrazor.experiments.robot.base import pretrain, weights_of
from rlrazor.experiments.robot.evaluate import evaluate
from rlrazor.experiments.robot.simulators import Simulators
from rlrazor.runs.store import Keep, RunStore
from robot_runs import Stored, base_spec
from robot_worlds import Points


@pytest.fixture(scope="session")
def robot_base(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    """The base of `base_spec()`: about six seconds."""
    torch.set_num_threads(1)
    folder, spec = tmp_path_factory.mktemp("robot"), base_spec()
    store = RunStore(folder / "out")
    store.keep(spec, Keep(all=True))
    store.write(spec, list(pretrain(spec, Points(), workers=0, cache=folder / "cache")), seconds=0)
    return Stored(spec, store, folder / "cache")


@pytest.fixture(scope="session")
def briefly_measured(robot_base: Stored) -> Stored:
    """The same policy, of which six episodes of each task are measured."""
    spec, policy = base_spec(episodes=6, kl_episodes=3), robot_base.policy
    with Simulators(Points()) as simulators:
        checkpoint = evaluate(spec, 0, 0.0, policy, simulators).checkpoint({}, lambda: weights_of(policy))
    robot_base.store.keep(spec, Keep(all=True))
    robot_base.store.write(spec, [checkpoint], seconds=0)
    return Stored(spec, robot_base.store, robot_base.cache)
