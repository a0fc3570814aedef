"""Steps a second of the robot's simulator, and of roll-outs in it, against Meta-World's own environment.

    python benchmarks/robot.py [--task pick-place] [--workers 0 1 2] [--turns 3] [--json]

In turns, so that what else the machine does hits all, and each as the median of its turns:

- Meta-World's own `step`, one environment in one process, and with its `reset` every HORIZON steps;
- ours, in the same two ways: the same bits, but for the start;
- `roll_out` with an actor that costs nothing, and with the policy of the experiment, untrained, which samples; episodes
  of HORIZON steps, with their starts, in so many worker processes beside this one.

Aim: a roll-out with the policy makes at least 60 % of the steps of Meta-World's own environment, the simulator's rate.
Ours is several times as fast, so that the policy's forward takes the longest: it is printed alone too. The torch of
this process has one thread.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from metaworld.env_dict import ALL_V3_ENVIRONMENTS
from numpy.typing import NDArray

from rlrazor.experiments.robot.arm import arm_of
from rlrazor.experiments.robot.metaworld import MetaWorld
from rlrazor.experiments.robot.policy import Acting
from rlrazor.experiments.robot.rollout import HISTORY, Actor, Tokens, roll_out
from rlrazor.experiments.robot.simulators import Simulators
from rlrazor.experiments.robot.tasks import NEW
from rlrazor.experiments.robot.transformer import ActionTransformer
from rlrazor.experiments.robot.world import Floats, episodes_of
from rlrazor.lm.compute import prepare_process

HORIZON, LANES, EPISODES = 60, 32, 64
STEPS = 600  # of one environment
ACTION = np.array([0.1, 0.1, -0.1, 0.5], np.float32)


class Cheap:
    """The same tokens always."""

    def act(self, instructions: Sequence[str], history: Floats, noise: NDArray[np.float64] | None) -> Tokens:
        """See rollout.Actor."""
        return np.full((len(history), 4), 140)

    def actions_of(self, tokens: Tokens) -> Floats:
        """See rollout.Actor."""
        return ((tokens + 0.5) / 256 * 2 - 1).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default=NEW)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    prepare_process(1)
    torch.manual_seed(0)
    policy = ActionTransformer(MetaWorld())
    crews = [Simulators(MetaWorld(HORIZON), workers) for workers in arguments.workers]
    try:
        ways = _ways(arguments.task, crews, Acting(policy))
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(arguments.turns + 1):
            for name, way in ways.items():
                start = time.perf_counter()
                steps = way()
                if turn:  # the first builds and starts
                    rates[name].append(steps / (time.perf_counter() - start))
    finally:
        for crew in crews:
            crew.end()
    medians = {name: statistics.median(found) for name, found in rates.items()}
    own = medians["Meta-World's step"]
    if arguments.json:
        ratios = {name: round(rate / own, 3) for name, rate in medians.items()}
        parameters = sum(weight.numel() for weight in policy.parameters())
        print(json.dumps({"task": arguments.task, "parameters": parameters, "steps_per_s": medians, "ratio": ratios}))
        return
    for name, rate in medians.items():
        print(f"{name:44}{rate:10,.0f} steps/s{rate / own:8.2f} of Meta-World's")


def _ways(task: str, crews: Sequence[Simulators], acting: Actor) -> dict[str, Callable[[], int]]:
    """What is timed: each returns how many steps it made."""
    sawyer: Any = ALL_V3_ENVIRONMENTS[f"{task}-v3"]()
    sawyer._partially_observable = False
    sawyer.__dict__.pop("sawyer_observation_space", None)
    sawyer._set_task_called = sawyer._freeze_rand_vec = True
    sawyer._last_rand_vec = arm_of(task).vector(0, None)
    environment = MetaWorld().environment(task)
    ways: dict[str, Callable[[], int]] = {
        "Meta-World's step": partial(_steps, sawyer, STEPS),
        "Meta-World's step and reset": partial(_steps, sawyer, HORIZON),
        "our step": partial(_steps, environment, STEPS),
        "our step and reset": partial(_steps, environment, HORIZON),
        "the policy's forward alone": partial(_forward, task, acting),
    }
    for crew in crews:
        for name, actor in (("a cheap actor", Cheap()), ("the policy", acting)):
            ways[f"roll_out, {name}, {crew.workers} workers"] = partial(_rolled, crew, task, actor)
    return ways


def _steps(environment: Any, length: int) -> int:
    for step in range(STEPS):
        if step % length == 0:
            environment.max_path_length = STEPS
            environment.reset(seed=step)
        environment.step(ACTION)
    return STEPS


def _forward(task: str, acting: Actor) -> int:
    instruction = MetaWorld().tasks[task].paraphrases[0]
    history, noise = np.zeros((LANES, HISTORY, 39), np.float32), np.full((LANES, 4), 0.5)
    for _ in range(20):
        acting.act([instruction] * LANES, history, noise)
    return 20 * LANES


def _rolled(crew: Simulators, task: str, actor: Actor) -> int:
    episodes = episodes_of(crew.world, task, EPISODES, seed=0, purpose="benchmark")
    return sum(one.steps for one in roll_out(crew, episodes, actor, sampled=True, lanes=LANES))


if __name__ == "__main__":
    main()
