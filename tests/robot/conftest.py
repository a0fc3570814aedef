"""What the tests of the robot's policy share: a base in the tiny world, made once."""

import pytest
import torch

from rlrazor.experiments.robot.base import pretrain
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
