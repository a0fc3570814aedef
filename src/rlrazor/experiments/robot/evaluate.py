"""A checkpoint's scores and drift. What is the base's side of a comparison is computed once, in a `Reference`."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import Self

import polars as pl
import torch
from torch import Tensor

from rlrazor import drift
from rlrazor.drift import DISTRIBUTION_MEASURES, WEIGHT_MEASURES, Representation
from rlrazor.drift.representation import NEIGHBOURS
from rlrazor.errors import RazorError
from rlrazor.experiments.robot.policy import Acting, Policy, Steps, kl, log_probs_of
from rlrazor.experiments.robot.rollout import Rolled, roll_out
from rlrazor.experiments.robot.simulators import Simulators
from rlrazor.experiments.robot.world import Episode, World, episodes_of
from rlrazor.lm.kl import Drift
from rlrazor.lm.means import MeanKL
from rlrazor.lm.sampling import NotFiniteError
from rlrazor.lm.scores import stderr_of_mean
from rlrazor.runs import items
from rlrazor.runs.records import Record, RunSpec
from rlrazor.runs.store import Checkpoint, Weights
from rlrazor.runs.sweep import DivergedError
from rlrazor.system import phases

LANES = 50  # of each of a roll-out's two batches, at most
HELD_OUT_SEED = 0  # of the episodes that all policies are measured on
COMPARED = 1_000  # steps on which distances other than KL, and representations, are compared
AT_A_TIME = 64  # states that are looked inside at: of images, many fill the memory
SAMPLED, GREEDY = "sampled", "greedy"
MODES = (SAMPLED, GREEDY)
PLAYING, COMPARING = "playing held-out episodes", "comparing with the base"

ON_PRIOR = "_on_prior"
PER_EPISODE = "_per_episode"
KLS = ("kl_forward", "kl_reverse")
REPRESENTATION_MEASURES = ("activation_l1", "activation_l2", "cka", "cknna")
_DISTANCES = (*KLS, *(name + PER_EPISODE for name in KLS), *(one for one in DISTRIBUTION_MEASURES if one not in KLS))
_WEIGHTS = tuple(name for name in WEIGHT_MEASURES if name != "weight_fisher_l2")
DRIFT = (
    *_DISTANCES,
    *REPRESENTATION_MEASURES,
    *(name + ON_PRIOR for name in (*_DISTANCES, *REPRESENTATION_MEASURES)),
    *_WEIGHTS,
)
"""The columns of drift that `evaluate` measures, beside `kl_forward_on_TASK` for each prior task."""


@dataclass(frozen=True)
class Settings:
    """How policies are measured: `episodes` of each task in each mode, of which the first `kl_episodes` for KL.

    `scored`: which mode's success is the score; the other's is among the metrics.
    """

    new_task: str
    prior_tasks: Sequence[str]
    episodes: int
    kl_episodes: int
    scored: str

    @classmethod
    def of(cls, spec: RunSpec) -> Self:
        """Those of a run's base, so that it and its runs are measured alike."""
        params = spec.root.params
        return cls(*(params[name] for name in ("new_task", "prior_tasks", "episodes", "kl_episodes", "scored")))

    @property
    def tasks(self) -> list[str]:
        """The new one, and the prior ones."""
        return [self.new_task, *self.prior_tasks]

    def held_out(self, world: World, task: str, count: int) -> list[Episode]:
        """The first episodes of a task that policies are measured on: the same for all."""
        return episodes_of(world, task, count, seed=HELD_OUT_SEED, purpose="held out")


@dataclass(frozen=True)
class Own:
    """What a policy says at steps of its own episodes of a task: log-probabilities (T, A, V) of all bins."""

    steps: Steps
    logp: Tensor

    @classmethod
    def of(cls, policy: Policy, rolled: Sequence[Rolled]) -> Self:
        """Ask it again at what it saw."""
        steps = Steps.of(rolled)
        return cls(steps, log_probs_of(policy, steps))

    @property
    def entropy(self) -> float:
        """Of an action in nats, the mean."""
        logp = self.logp.double()
        return -(logp.exp() * logp).nan_to_num(nan=0.0).sum(dim=(1, 2)).mean().item()


@dataclass(frozen=True)
class Reference:
    """A base policy as every checkpoint is compared with it: its weights, and of each task what it does itself.

    `inside`: its last hidden layer on states of the new task, and on those of the prior ones.
    """

    policy: Policy
    weights: Weights
    own: Mapping[str, Own]
    inside: Sequence[Representation]

    @classmethod
    def of(cls, policy: Policy, settings: Settings, rolled: Mapping[str, Sequence[Rolled]]) -> Self:
        """Measure the base; `rolled`: sampled episodes of each task."""
        own = {task: Own.of(policy, found[: settings.kl_episodes]) for task, found in rolled.items()}
        groups = _groups(settings, own)
        return cls(policy, parameters_of(policy), own, [inside(policy, group) for group in groups])


@dataclass(frozen=True)
class Measured:
    """A record, and what became of each episode of the prior tasks."""

    record: Record
    items: pl.DataFrame

    def checkpoint(self, metrics: Mapping[str, float], weights: Callable[[], Weights]) -> Checkpoint:
        """With these metrics beside its own."""
        record = self.record
        whole = Record(**{**vars(record), "metrics": {**record.metrics, **metrics}})
        return Checkpoint(whole, weights, items=self.items)


def play(
    policy: Policy, simulators: Simulators, settings: Settings, count: int, *, sampled: bool
) -> dict[str, list[Rolled]]:
    """The first `count` held-out episodes of each task."""
    found, acting = {}, Acting(policy)
    for done, task in enumerate(settings.tasks):
        phases.at(f"{PLAYING}, {SAMPLED if sampled else GREEDY}", done, len(settings.tasks))
        episodes = settings.held_out(simulators.world, task, count)
        found[task] = roll_out(simulators, episodes, acting, sampled=sampled, lanes=lanes_for(count))
    return found


def lanes_for(episodes: int) -> int:
    """Lanes of each batch: as many as so many episodes fill, so that the last ones seldom run with few beside them."""
    return min(LANES, -(-episodes // 2))


def evaluate(
    spec: RunSpec,
    step: int,
    epoch: float,
    policy: Policy,
    simulators: Simulators,
    reference: Reference | None = None,
    before: pl.DataFrame | None = None,
) -> Measured:
    """Success on held-out episodes of all tasks, and every measure of drift from the base.

    Without `reference` this is the base. KL is that of actions on the new task's states, which is the paper's claim,
    and beside it on the prior tasks': forward on episodes that the base sampled, reverse on the policy's own.
    `before`: what became of the prior tasks' episodes under the base. Raises DivergedError when an output or a measure
    is not finite.
    """
    settings = Settings.of(spec)
    with finite(step, epoch):
        played = {
            mode: play(policy, simulators, settings, settings.episodes, sampled=mode == SAMPLED) for mode in MODES
        }
        reference = reference or Reference.of(policy, settings, played[SAMPLED])
        phases.at(COMPARING)
        own = {task: Own.of(policy, rolled[: settings.kl_episodes]) for task, rolled in played[SAMPLED].items()}
        drifted, errors = _drift(settings, policy, own, reference)
        if not all(map(math.isfinite, drifted.values())):
            raise NotFiniteError("a measure of drift is not finite")
    metrics = {**_successes(settings, played), **_entropies(settings, own), **errors}
    record = Record(
        run_id=spec.run_id,
        step=step,
        epoch=epoch,
        new=metrics[f"{settings.scored}_new"],
        prior={task: metrics[f"{settings.scored}_{task}"] for task in settings.prior_tasks},
        drift=drifted,
        metrics={**metrics, "episodes": float(settings.episodes)},
    )
    outcomes = _outcomes(settings, played[settings.scored])
    return Measured(record, items.beside(outcomes if before is None else before, outcomes))


@contextmanager
def finite(step: int, epoch: float) -> Iterator[None]:
    """Raise DivergedError where the outputs of the policy that is at work here are not finite."""
    try:
        yield
    except NotFiniteError as error:
        raise DivergedError(step, epoch) from error


def parameters_of(policy: Policy) -> dict[str, Tensor]:
    """Name -> parameter, detached, as it is now."""
    return {name: weight.detach().clone() for name, weight in policy.module.named_parameters()}


@torch.no_grad()
def inside(policy: Policy, owns: Sequence[Own]) -> Representation:
    """The last hidden layer at a spread of the steps. Raises RazorError for too few of them."""
    if (steps := sum(len(one.steps) for one in owns)) <= NEIGHBOURS:
        raise RazorError(
            f"The episodes that KL is measured on have {steps} steps in all, too few to compare representations, which "
            f"takes {NEIGHBOURS + 1}: raise kl_episodes."
        )
    chosen = [(one.steps, _spread(len(one.steps), COMPARED // len(owns))) for one in owns]
    parts = ((steps, part) for steps, rows in chosen for part in rows.split(AT_A_TIME))
    return Representation(torch.cat([policy.represent(steps.seen(part)) for steps, part in parts]))


def _groups(settings: Settings, own: Mapping[str, Own]) -> list[list[Own]]:
    """The new task alone, and the prior tasks together."""
    return [[own[settings.new_task]], [own[task] for task in settings.prior_tasks]]


def _spread(count: int, most: int) -> Tensor:
    """At most so many of `count` rows, evenly spaced."""
    return torch.arange(count) if count <= most else torch.linspace(0, count - 1, most).long()


def _drift(
    settings: Settings, policy: Policy, own: Mapping[str, Own], reference: Reference
) -> tuple[dict[str, float], dict[str, float]]:
    """The columns of drift, and the standard errors of those that are KLs."""
    forward: dict[str, Drift] = {}
    reverse: dict[str, Drift] = {}
    said = {task: log_probs_of(policy, one.steps) for task, one in reference.own.items()}
    for task, base in reference.own.items():
        forward[task] = kl(base.steps, base.logp, said[task])
        reverse[task] = kl(own[task].steps, own[task].logp, log_probs_of(reference.policy, own[task].steps))
    drifted: dict[str, float] = {}
    errors: dict[str, float] = {}
    groups = _groups(settings, reference.own)
    parts = (("", [settings.new_task], groups[0]), (ON_PRIOR, list(settings.prior_tasks), groups[1]))
    for (on, tasks, group), base_inside in zip(parts, reference.inside, strict=True):
        estimates: dict[str, list[MeanKL]] = {}
        for name, of_task in (("kl_forward", forward), ("kl_reverse", reverse)):
            estimates[name] = [of_task[task].per_token for task in tasks]
            estimates[name + PER_EPISODE] = [of_task[task].per_completion for task in tasks]
        if on:
            estimates |= {f"kl_forward_on_{task}": [forward[task].per_token] for task in tasks}
        for name, found in estimates.items():
            column = name if "_on_" in name else name + on
            drifted[column] = fmean(one.mean for one in found)
            error = stderr_of_mean([one.stderr if math.isfinite(one.stderr) else None for one in found])
            errors |= {} if error is None else {f"{column}_stderr": error}
        measured = {**_distances(reference, said, tasks), **_change(base_inside, inside(policy, group))}
        drifted |= {name + on: value for name, value in measured.items()}
    drifted |= drift.measure_weights(reference.weights, parameters_of(policy))
    return drifted, errors


def _distances(reference: Reference, said: Mapping[str, Tensor], tasks: Sequence[str]) -> dict[str, float]:
    """The other distances of outputs, of a token and not of an action, on a spread of the base's steps."""
    rows = {task: _spread(len(said[task]), COMPARED // len(tasks)) for task in tasks}
    base = torch.cat([reference.own[task].logp[rows[task]] for task in tasks]).flatten(0, 1)
    tuned = torch.cat([said[task][rows[task]] for task in tasks]).flatten(0, 1)
    return {name: value for name, value in drift.measure(base, tuned).items() if name not in KLS}


def _change(base: Representation, tuned: Representation) -> dict[str, float]:
    return {
        "activation_l1": drift.activation_l1(base.activations, tuned.activations),
        "activation_l2": drift.activation_l2(base.activations, tuned.activations),
        "cka": drift.cka(base, tuned),
        "cknna": drift.cknna(base, tuned),
    }


def _successes(settings: Settings, played: Mapping[str, Mapping[str, Sequence[Rolled]]]) -> dict[str, float]:
    """The share of episodes that succeeded in each mode: of the new task, of each prior one, and their mean.

    `greedy_alone`: of those that did so greedily and not when sampled, which pairs the two modes.
    """
    found = {}
    for task in settings.tasks:
        pairs = zip(played[SAMPLED][task], played[GREEDY][task], strict=True)
        name = "new" if task == settings.new_task else task
        found[f"greedy_alone_{name}"] = fmean(greedy.success and not sampled.success for sampled, greedy in pairs)
    for mode, of_tasks in played.items():
        shares = {task: fmean(one.success for one in rolled) for task, rolled in of_tasks.items()}
        found[f"{mode}_new"] = shares[settings.new_task]
        found[f"{mode}_prior"] = fmean(shares[task] for task in settings.prior_tasks)
        found |= {f"{mode}_{task}": shares[task] for task in settings.prior_tasks}
    return found


def _entropies(settings: Settings, own: Mapping[str, Own]) -> dict[str, float]:
    prior = fmean(own[task].entropy for task in settings.prior_tasks)
    return {"entropy": own[settings.new_task].entropy, "entropy" + ON_PRIOR: prior}


def _outcomes(settings: Settings, of_tasks: Mapping[str, Sequence[Rolled]]) -> pl.DataFrame:
    """What became of each episode of the prior tasks, of the columns `items.OWN`."""
    rows = [
        {"prior": task, "task": task, "item": str(place), "outcome": float(one.success)}
        for task in settings.prior_tasks
        for place, one in enumerate(of_tasks[task])
    ]
    return pl.DataFrame(rows, schema=items.OWN)
