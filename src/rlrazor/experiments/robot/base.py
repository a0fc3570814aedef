"""The base policy: behaviour cloning of the scripted experts, on all tasks at once.

It imitates noisy demonstrations, noise included, so that what it samples varies enough for RL to learn from. The new
task has fewer of them or noisier ones, so that the base solves it now and then.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlrazor import objectives
from rlrazor.experiments.robot.cache import cached
from rlrazor.experiments.robot.demonstrations import Demonstrations, Wanted, demonstrations_of
from rlrazor.experiments.robot.evaluate import evaluate
from rlrazor.experiments.robot.policy import Policy, Steps, taken
from rlrazor.experiments.robot.simulators import Simulators
from rlrazor.experiments.robot.transformer import ActionTransformer, Size
from rlrazor.experiments.robot.world import World
from rlrazor.runs.records import RunSpec
from rlrazor.runs.settings import lr_factor
from rlrazor.runs.store import Checkpoint
from rlrazor.seeding import seed_of
from rlrazor.system import interrupts, phases

CLONING = "cloning the experts"


def policy_of(settings: Mapping[str, Any], world: World) -> Policy:
    """A policy, not yet trained, as these settings of a base have it. Initialised from torch's global generator.

    Where they name a `policy`, that is a vision-language model; see `vla`.
    """
    if "policy" in settings:
        from rlrazor.experiments.robot.vla.loading import Source, load

        return load(Source(settings["policy"], settings["dtype"], settings["lora_rank"]), world)
    return ActionTransformer(world, Size(settings["width"], settings["layers"], settings["heads"]))


def load_policy(settings: Mapping[str, Any], world: World, weights: Mapping[str, Tensor]) -> Policy:
    """The same with these weights."""
    policy = policy_of(settings, world)
    policy.module.load_state_dict(dict(weights))
    return policy


def weights_of(policy: Policy) -> dict[str, Tensor]:
    """All that the policy is to be had again from, as it is now."""
    return {name: tensor.detach().cpu().clone() for name, tensor in policy.module.state_dict().items()}


def pretrain(spec: RunSpec, world: World, *, workers: int, cache: Path) -> Iterator[Checkpoint]:
    """Clone the experts as the spec says, and measure the base; both it and the demonstrations are in the cache then.

    Raises RazorError where an expert fails too often.
    """
    with Simulators(world, workers=workers) as simulators:
        demonstrated = demonstrations_for(spec, simulators, cache)
        versions = {"torch": str(torch.__version__), "numpy": np.__version__}
        made_of = {"run": spec.run_id, "demonstrations": demonstrated.digest, **versions}
        kept = cached(cache, "base", made_of, lambda: _as_arrays(clone(spec, world, demonstrated)))
        weights = {name: torch.from_numpy(array) for name, array in kept.items()}
        policy = load_policy(spec.params, world, weights)
        measured = evaluate(spec, 0, 0.0, policy, simulators)
        yield measured.checkpoint({"interactions": float(demonstrated.interactions)}, partial(weights_of, policy))


def demonstrations_for(spec: RunSpec, simulators: Simulators, cache: Path) -> Demonstrations:
    """What a base learns from: of the new task, then of each prior one."""
    params = spec.params
    wanted = [Wanted(params["new_task"], params["new_demonstrations"], spec.seed, noise=params["new_noise"])]
    wanted += [
        Wanted(name, params["demonstrations"], spec.seed, noise=params["noise"]) for name in params["prior_tasks"]
    ]
    wanted = [replace(one, data=params.get("data", "")) for one in wanted]
    return Demonstrations.joined([demonstrations_of(simulators, one, cache) for one in wanted])


def clone(spec: RunSpec, world: World, demonstrated: Demonstrations) -> Policy:
    """A policy after `bc_updates` of cross-entropy on the demonstrations' actions, `bc_batch` states each."""
    params = spec.params
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(spec.seed, "initialisation"))
        policy = policy_of(params, world)
    policy.normalise_by(demonstrated.history)
    steps = demonstrated.steps(policy)
    optimizer = torch.optim.AdamW(policy.module.parameters(), lr=params["bc_lr"], weight_decay=0.0, fused=True)
    batches = batches_of(len(steps), params["bc_batch"], torch.Generator().manual_seed(seed_of(spec.seed, "cloning")))
    for update in range(params["bc_updates"]):
        interrupts.check()
        phases.at(CLONING, update, params["bc_updates"])
        loss = imitation_loss(policy, steps, next(batches))
        for group in optimizer.param_groups:
            group["lr"] = params["bc_lr"] * lr_factor(update, params["bc_updates"], params["bc_updates"], "cosine")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return policy


def imitation_loss(policy: Policy, steps: Steps, rows: Tensor) -> Tensor:
    """-log p of the actions at these steps, in nats, the mean."""
    logp_N = taken(policy.log_probs(steps.seen(rows), steps.tokens[rows]), steps.tokens[rows])
    return objectives.sft(logp_N[:, None], torch.ones(len(rows), 1), torch.zeros(len(rows), 1))


def batches_of(count: int, size: int, rng: torch.Generator) -> Iterator[Tensor]:
    """Rows, so many at a time, without end: every one once before any comes again; of fewer rows all."""
    size = min(size, count)
    while True:
        order = torch.randperm(count, generator=rng)
        yield from order[: count - count % size].split(size)


def _as_arrays(policy: Policy) -> dict[str, np.ndarray[Any, Any]]:
    return {name: tensor.numpy() for name, tensor in weights_of(policy).items()}
