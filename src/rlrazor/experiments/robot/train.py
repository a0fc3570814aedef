"""The one training loop that serves every method, and what it learns from."""

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import polars as pl
import torch
from torch import Tensor

from rlrazor.errors import RazorError
from rlrazor.experiments.robot.base import batches_of, load_policy, weights_of
from rlrazor.experiments.robot.cache import Arrays, cached, digest_of
from rlrazor.experiments.robot.demonstrations import Demonstrations, Wanted, demonstrations_of, of_world, training_grid
from rlrazor.experiments.robot.evaluate import LANES, Reference, Settings, evaluate, finite, lanes_for, play
from rlrazor.experiments.robot.methods import Method, find_method
from rlrazor.experiments.robot.policy import Acting, Policy, Seen, Steps, kl_of_actions, taken
from rlrazor.experiments.robot.rollout import Rolled, roll_out
from rlrazor.experiments.robot.simulators import Simulators
from rlrazor.experiments.robot.world import Episode, World, repeated
from rlrazor.runs.items import outcomes_of
from rlrazor.runs.records import Ancestor, RunSpec
from rlrazor.runs.settings import checkpoint_steps, lr_factor
from rlrazor.runs.store import Checkpoint, RunStore
from rlrazor.runs.sweep import DivergedError
from rlrazor.seeding import seed_of
from rlrazor.system import interrupts, phases

CHUNK = 256  # states at a time, with gradient

OWN = "trying what the base can do"


class Source(Protocol):
    """What a run learns from, update by update.

    `interactions`: steps of the simulator that it has taken so far. `metrics`: what else is known of the last update.
    """

    interactions: int
    metrics: Mapping[str, float]

    def accumulate(self, update: int, policy: Policy) -> float:
        """Add the gradient of this update's loss to the policy's, and give the loss."""
        ...


@dataclass(frozen=True)
class Base:
    """A base policy with what every run on it needs; `outcomes`: what became of the prior tasks' episodes under it."""

    reference: Reference
    outcomes: pl.DataFrame

    @property
    def policy(self) -> Policy:
        """The base itself."""
        return self.reference.policy


def finetune(spec: RunSpec, world: World, store: RunStore, *, workers: int, cache: Path) -> Iterator[Checkpoint]:
    """Fine-tune on the new task by the spec's method; a checkpoint every 1/checkpoints_per_epoch of an epoch.

    An epoch is `updates` updates: of an on-policy method a round of trajectories each, else a batch of states. Raises
    DivergedError when the loss, or an output of the policy, is no longer finite.
    """
    method, _ = find_method(spec.method)
    assert spec.starts_from is not None
    with Simulators(world, workers=workers) as simulators:
        base = load_base(spec.starts_from, store, simulators)
        policy = copy.deepcopy(base.policy)
        source: Source
        if method.on_policy:
            source = OwnTrajectories(spec, method, simulators, base.policy)
        else:
            source = Fixed(spec, method, learnt_from(spec, method, simulators, base.policy, cache), base.policy)
        for step, epoch, loss, due in updates(spec, policy, source):
            if due:
                measured = evaluate(spec, step, epoch, policy, simulators, base.reference, base.outcomes)
                metrics = {"interactions": float(source.interactions), "loss": loss, **source.metrics}
                yield measured.checkpoint(metrics, partial(weights_of, policy))


def updates(spec: RunSpec, policy: Policy, source: Source) -> Iterator[tuple[int, float, float, bool]]:
    """Update the policy, over and over; after each update its number from 1, the epoch, the loss, and if it is due.

    Due are the checkpoints to be measured.
    """
    params = spec.params
    weights = [weight for weight in policy.module.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=params["lr"], weight_decay=0.0, fused=True)
    each, total = params["updates"], params["updates"] * params["epochs"]
    due = checkpoint_steps(each, params["epochs"], params["checkpoints_per_epoch"])
    for step in range(total):
        interrupts.check()
        phases.at(phases.TRAINING, step, total)
        for weight in weights:  # zero, not none: a round without any advantage is an update too
            weight.grad = torch.zeros_like(weight)
        with finite(step, step / each):
            loss = source.accumulate(step, policy)
        if not math.isfinite(loss):
            raise DivergedError(step, step / each)
        for group in optimizer.param_groups:
            group["lr"] = params["lr"] * lr_factor(step, total, each, params["schedule"])
        optimizer.step()
        if not all(weight.isfinite().all() for weight in weights):
            raise DivergedError(step + 1, (step + 1) / each)
        yield step + 1, (step + 1) / each, loss, step + 1 in due


class Fixed:
    """Trajectories that are there from the beginning, states of which are drawn for each update.

    The penalty is `kl_coef` times KL(pi || pi0) of an action, on these states, given the tokens of the trajectories.
    """

    def __init__(self, spec: RunSpec, method: Method, given: Demonstrations, base: Policy) -> None:
        self.method, self.base, self.kl_coef = method, base, spec.params["kl_coef"]
        self.steps, self.interactions = given.steps(base), given.interactions
        self.metrics: Mapping[str, float] = {}
        rng = torch.Generator().manual_seed(seed_of(spec.seed, "order"))
        self.batches = batches_of(len(self.steps), spec.params["batch_size"], rng)

    def accumulate(self, update: int, policy: Policy) -> float:
        """See Source."""
        rows = next(self.batches)
        seen, tokens_NA = self.steps.seen(rows), self.steps.tokens[rows]
        logp_NAV = policy.log_probs(seen, tokens_NA)
        logp_N1 = taken(logp_NAV, tokens_NA)[:, None]
        loss = self.method.objective(logp_N1, torch.ones_like(logp_N1), torch.zeros_like(logp_N1))
        if self.kl_coef:
            loss = loss + self.kl_coef * penalty(logp_NAV, self.base, seen, tokens_NA).mean()
        loss.backward()
        return loss.item()


class OwnTrajectories:
    """Trajectories of the policy as it is, anew for each update: `group_size` of each of `starts` starts of the grid.

    The penalty is `kl_coef` times KL(pi || pi0) of an episode, on the states and tokens of these trajectories. Left out
    is what it would be to go where the KL is lower. `metrics`: the share of them that succeeded, and where weights
    depend on log-probabilities the effective sample size of the trajectories, (sum of w)^2 / sum of w^2.
    """

    def __init__(self, spec: RunSpec, method: Method, simulators: Simulators, base: Policy) -> None:
        params = spec.params
        self.method, self.simulators, self.base = method, simulators, base
        self.kl_coef, self.group_size, self.interactions = params["kl_coef"], params["group_size"], 0
        self.metrics: Mapping[str, float] = {}
        self.starts = training_starts(spec, simulators.world)
        rng = torch.Generator().manual_seed(seed_of(spec.seed, "order"))
        self.batches = batches_of(len(self.starts), params["starts"], rng)

    def accumulate(self, update: int, policy: Policy) -> float:
        """See Source. A chunk of states at a time, since a round of trajectories has thousands."""
        episodes = repeated([self.starts[row] for row in next(self.batches).tolist()], self.group_size)
        episodes = [replace(one, draw=one.draw + update * self.group_size) for one in episodes]
        lanes = lanes_for(len(episodes))
        steps = Steps.of(roll_out(self.simulators, episodes, Acting(policy), sampled=True, lanes=lanes))
        self.interactions += len(steps)
        weights_E = self.weights(policy, steps)
        weighted = {"effective_trajectories": effective(weights_E)} if self.method.weighted else {}
        self.metrics = {"sampled_training": steps.success.double().mean().item(), **weighted}
        counted = torch.arange(len(steps)) if self.kl_coef else weights_E[steps.episode_of].nonzero()[:, 0]
        loss = 0.0
        for rows in counted.split(CHUNK) if len(counted) else ():
            seen, tokens_NA = steps.seen(rows), steps.tokens[rows]
            logp_NAV = policy.log_probs(seen, tokens_NA)
            part = (weights_E[steps.episode_of[rows]] * taken(logp_NAV, tokens_NA)).sum()
            if self.kl_coef:
                part = part + self.kl_coef * penalty(logp_NAV, self.base, seen, tokens_NA).sum() / len(episodes)
            part.backward()
            loss += part.item()
        return loss

    def weights(self, policy: Policy, steps: Steps) -> Tensor:
        """What the objective's gradient is with respect to each trajectory's log-probability: (E,)."""
        rewards_BG = steps.success.float().view(-1, self.group_size)
        logp_BG, base_logp_BG = torch.zeros_like(rewards_BG), torch.zeros_like(rewards_BG)
        if self.method.weighted:
            logp_BG, base_logp_BG = (
                trajectory_log_probs(one, steps).view(-1, self.group_size) for one in (policy, self.base)
            )
        return trajectory_weights(self.method, logp_BG, rewards_BG, base_logp_BG)


def effective(weights_E: Tensor) -> float:
    """The effective sample size of weights, (sum of w)^2 / sum of w^2; 0 where all are 0."""
    squares = weights_E.double().square().sum().item()
    return weights_E.double().sum().item() ** 2 / squares if squares else 0.0


def trajectory_weights(method: Method, logp_BG: Tensor, rewards_BG: Tensor, base_logp_BG: Tensor) -> Tensor:
    """The gradient (B * G,) of a method's objective with respect to the trajectories' log-probabilities.

    The loss whose gradient is the policy's is then the sum of these times log-probabilities, which can be taken a few
    states at a time.
    """
    if method.pooled:
        logp_BG, rewards_BG, base_logp_BG = (each.view(1, -1) for each in (logp_BG, rewards_BG, base_logp_BG))
    logp_BG = logp_BG.detach().requires_grad_()
    (weights_BG,) = torch.autograd.grad(method.objective(logp_BG, rewards_BG, base_logp_BG), logp_BG)
    return weights_BG.flatten()


@torch.no_grad()
def trajectory_log_probs(policy: Policy, steps: Steps) -> Tensor:
    """log p of each episode's actions (E,), in nats: the sum over its steps."""
    logp_E = torch.zeros(len(steps.instructions), dtype=torch.float64)
    for rows in steps.chunks():
        tokens_NA = steps.tokens[rows]
        logp_N = taken(policy.log_probs(steps.seen(rows), tokens_NA), tokens_NA).double()
        logp_E.index_add_(0, steps.episode_of[rows], logp_N)
    return logp_E.float()


def penalty(logp_NAV: Tensor, base: Policy, seen: Seen, tokens_NA: Tensor) -> Tensor:
    """KL(pi || pi0) of an action at each state (N,), given the tokens before; exact over the bins of each token."""
    with torch.no_grad():
        base_logp_NAV = base.log_probs(seen, tokens_NA)
    return kl_of_actions(logp_NAV, base_logp_NAV)


def training_starts(spec: RunSpec, world: World) -> list[Episode]:
    """What a run tries itself: see `demonstrations.training_grid`."""
    return training_grid(world, spec.root.params["new_task"], spec.params["grid"], spec.seed)


def learnt_from(spec: RunSpec, method: Method, simulators: Simulators, base: Policy, cache: Path) -> Demonstrations:
    """What an offline method learns from: an expert's demonstrations, or the base's own successes.

    Raises RazorError where there are none.
    """
    params, task = spec.params, spec.root.params["new_task"]
    if method.route is not None:
        wanted = Wanted(task, params["per_start"], spec.seed, method.route, params["expert_noise"], params["grid"])
        wanted = replace(wanted, data=spec.root.params.get("data", ""))
        return demonstrations_of(simulators, wanted, cache)
    drawn = {
        "weights": digest_of_weights(weights_of(base)),
        "seed": spec.seed,
        "grid": params["grid"],
        "tries": params["tries"],
    }
    made_of = {**of_world(simulators.world, task), "data": spec.root.params.get("data", ""), **drawn}
    return Demonstrations.of(cached(cache, "own", made_of, lambda: own_successes(spec, simulators, base)))


def own_successes(spec: RunSpec, simulators: Simulators, base: Policy) -> Arrays:
    """Sample `tries` trajectories of the base from each start, and keep those that succeed.

    A part of them at a time: what failed is dropped at once, since where states are images many fill the memory.
    """
    episodes = repeated(training_starts(spec, simulators.world), spec.params["tries"])
    succeeded: list[Rolled] = []
    interactions, at_a_time = 0, 4 * LANES
    for start in range(0, len(episodes), at_a_time):
        phases.at(OWN, start, len(episodes))
        part = episodes[start : start + at_a_time]
        rolled = roll_out(simulators, part, Acting(base), sampled=True, lanes=lanes_for(len(part)))
        interactions += sum(one.steps for one in rolled)
        succeeded += [one for one in rolled if one.success]
    if not succeeded:
        raise RazorError(
            f"The base has solved the new task in none of {len(episodes)} tries, so it has no successes to learn from: "
            "give more tries, or a base that solves it now and then."
        )
    steps = Steps.of(succeeded)
    actions = base.actions_of(steps.tokens)
    return Demonstrations(steps.instructions, steps.lengths, steps.history, actions, interactions).arrays()


def digest_of_weights(weights: Mapping[str, Tensor]) -> str:
    """Of all that is in them; numpy knows no bfloat16."""
    return digest_of({name: tensor.float().numpy() for name, tensor in weights.items()})


_last_base: dict[tuple[str, str, str, int], Base] = {}


def load_base(of: Ancestor, store: RunStore, simulators: Simulators) -> Base:
    """The policy that runs start from; the last one is kept, since a sweep goes through the runs of one base.

    It is told by its run, its weights and the world.
    """
    settings, world, weights = Settings.of(of.spec), simulators.world, store.load_weights(of.spec, of.step)
    key = (str(of), digest_of_weights(weights), world.name, world.horizon)
    if key not in _last_base:
        policy = load_policy(of.spec.root.params, world, weights)
        rolled = play(policy, simulators, settings, settings.kl_episodes, sampled=True)
        outcomes = outcomes_of(store.items(of.spec.run_id), of.step)
        _last_base.clear()
        _last_base[key] = Base(Reference.of(policy, settings, rolled), outcomes)
    return _last_base[key]
