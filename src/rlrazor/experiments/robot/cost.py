"""What runs of the robot cost: counts, and a few of the things that take time, each timed and multiplied."""

import statistics
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch

from rlrazor.experiments.robot.base import imitation_loss, policy_of, weights_of
from rlrazor.experiments.robot.config import Config
from rlrazor.experiments.robot.evaluate import MODES
from rlrazor.experiments.robot.methods import find_method
from rlrazor.experiments.robot.policy import Acting, Policy, Steps
from rlrazor.experiments.robot.rollout import roll_out
from rlrazor.experiments.robot.simulators import Simulators
from rlrazor.experiments.robot.world import World, episodes_of
from rlrazor.lm.compute import prepare_process
from rlrazor.runs.dry_run import Sizes, Trial, peak_memory
from rlrazor.runs.experiment import Cost
from rlrazor.runs.records import BASE, RunSpec

EPISODES, STEPS = 64, 20  # timed: so many episodes, of so many steps
TURNS = 3
STATES = 256  # of an update that is timed, or as many as there are
LENGTH = 0.6  # of the horizon: an episode's, one with another, of those that succeed and those that do not
KL_PASSES = 3  # over the steps that KL is measured on: the base's by both policies, the policy's own by the base
RECORD_BYTES = 12_000  # of a record, twice, and what became of the prior tasks' episodes
FILM_BYTES = 700_000  # of a run
ERROR = 0.4  # of the seconds, as a share: how long episodes are depends on what a policy has learned


def of(spec: RunSpec) -> Cost:
    """Of a run."""
    if spec.method == BASE:
        return Cost(spec.params["bc_updates"], 1)
    params = spec.params
    steps = params["updates"] * params["epochs"]
    return Cost(steps, min(steps, params["epochs"] * params["checkpoints_per_epoch"]))


@dataclass(frozen=True)
class Seconds:
    """Of a step of the simulator with its part of the policy's batch, of a state's gradient, and of one looked at."""

    step: float
    gradient: float
    look: float


def trial(config: Config, world: World, workers: int) -> Trial:
    """Time steps of the simulator and updates, by a policy that has learned nothing. Raises as the world does."""
    prepare_process(1)
    (base, *_) = config.base_specs("")
    policy = policy_of(base.params, world)
    seconds = _timed(config, world, policy, workers)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in weights_of(policy).values())
    length = LENGTH * world.horizon

    return Trial(
        run=lambda spec, cost: seconds_of(spec, cost, seconds, length),
        once=lambda spec: shared_by(spec, seconds, length),
        error=ERROR,
        sizes=Sizes(peak_memory(), RECORD_BYTES, weights, weights, FILM_BYTES),
        timed=f"{TURNS} times {EPISODES * STEPS:,} steps of {config.new_task}, and an update on {STATES} states",
    )


def seconds_of(spec: RunSpec, cost: Cost, seconds: Seconds, length: float) -> float:
    """Of a run whose episodes are so long, measuring included, but for what it shares with others."""
    return _training(spec, seconds, length) + cost.checkpoints * _evaluation(spec, seconds, length)


def shared_by(spec: RunSpec, seconds: Seconds, length: float) -> dict[Hashable, float]:
    """Of what a run learns from, which is kept in the cache for all learning rates."""
    shown = _shown(spec)
    return {(spec.seed, spec.method.partition("+")[0]): shown * length * seconds.step} if shown else {}


def _training(spec: RunSpec, seconds: Seconds, length: float) -> float:
    """Of a run, but for what it shares with others, and what is measured."""
    params = spec.params
    if spec.method == BASE:
        return float(params["bc_updates"] * params["bc_batch"] * seconds.gradient)
    if find_method(spec.method)[0].on_policy:
        states = params["updates"] * params["starts"] * params["group_size"] * length
        return float(states * (seconds.step + seconds.gradient))
    return float(params["updates"] * params["batch_size"] * seconds.gradient)


def _shown(spec: RunSpec) -> int:
    """How many episodes a run learns from that are there before it: demonstrations, or tries of the base."""
    params = spec.params
    if spec.method == BASE:
        return int(params["new_demonstrations"] + params["demonstrations"] * len(params["prior_tasks"]))
    method, _ = find_method(spec.method)
    if method.on_policy:
        return 0
    return int(params["grid"] ** 2 * (params["tries"] if method.own else params["per_start"]))


def _evaluation(spec: RunSpec, seconds: Seconds, length: float) -> float:
    """Of a checkpoint."""
    params = spec.root.params
    tasks = 1 + len(params["prior_tasks"])
    played = len(MODES) * params["episodes"] * seconds.step + KL_PASSES * params["kl_episodes"] * seconds.look
    return float(tasks * length * played)


def _timed(config: Config, world: World, policy: Policy, workers: int) -> Seconds:
    short = replace(world, horizon=STEPS)  # type: ignore[type-var]  # a world is a dataclass
    episodes = episodes_of(short, config.new_task, EPISODES, seed=0, purpose="trial")
    with Simulators(short, workers=workers) as simulators:
        roll_out(simulators, episodes[:1], Acting(policy), sampled=True)  # which builds what is built once
        rolled, playing = _clock(lambda: roll_out(simulators, episodes, Acting(policy), sampled=True))
    steps = Steps.of(rolled)
    rows = torch.arange(min(STATES, len(steps)))
    imitation_loss(policy, steps, rows[:1]).backward()
    _, learning = _clock(lambda: imitation_loss(policy, steps, rows).backward())
    with torch.no_grad():
        _, looking = _clock(lambda: policy.log_probs(steps.seen(rows), steps.tokens[rows]))
    return Seconds(playing / len(steps), learning / len(rows), looking / len(rows))


def _clock(what: Callable[[], Any]) -> tuple[Any, float]:
    """What it gives, and its seconds, the median of a few turns: a busy machine may stop one for long."""
    seconds = []
    for _ in range(TURNS):
        start = time.perf_counter()
        found = what()
        seconds.append(time.perf_counter() - start)
    return found, statistics.median(seconds)
