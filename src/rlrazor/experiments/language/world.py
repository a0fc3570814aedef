"""A base policy with all that is measured on it: loaded once in a process, for the runs that start from it."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rlrazor.errors import RazorError
from rlrazor.experiments.language import tiny
from rlrazor.experiments.language.config import TINY
from rlrazor.experiments.language.demonstrations import Prompts
from rlrazor.experiments.language.evaluate import Asked, Reference
from rlrazor.experiments.language.setup import Setup, TaskSource
from rlrazor.experiments.language.suites import PriorSuite
from rlrazor.experiments.language.tasks import Scores, Task
from rlrazor.experiments.language.unfinished import save_model
from rlrazor.lm.digests import base_digest, tokenizer_digest
from rlrazor.lm.models import LanguageModel, load
from rlrazor.lm.probes import GenericText
from rlrazor.runs.records import Ancestor, RunSpec
from rlrazor.runs.store import RunStore
from rlrazor.system import phases


class World:
    """A base policy, the tasks that runs train or are asked about, and what checkpoints are compared by.

    `tasks` and `splits` are by name, in the order of the sources; of an experiment on one task there is one.
    """

    def __init__(
        self, base: LanguageModel, sources: Sequence[TaskSource], params: Mapping[str, Any], suite: PriorSuite
    ) -> None:
        self.base, self.measured, self.suite = base, params["measured"], suite
        base.model.requires_grad_(False)
        form = params["max_new_tokens"], params.get("chat_template_kwargs")
        self.tasks = {source.name: source.task().limited(*form) for source in sources}
        self.splits = {source.name: source.load() for source in sources}
        self._said_failures = False

    def say_failures(self, scores: Scores) -> None:
        """Say, the first time, that the verifier fails on completions of training; of those measured, records say."""
        if scores.failures and not self._said_failures:
            self._said_failures = True
            phases.say(scores.describe_failures())

    @cached_property
    def asked(self) -> Mapping[str, Asked]:
        """What the base says to each task. Only the process that measures asks for it."""
        measured, asked = self.measured, dict[str, Asked]()
        for name, task in self.tasks.items():
            test = Prompts.of(task, self.splits[name].test[: measured["test_prompts"]], self.base)
            how = self.suite, measured["kl_samples"], measured["scored"]
            probes = [other.probe for other in asked.values()]
            asked[name] = Asked(self.base, task, test, *how, beside=probes[0] if probes else None)
        return asked

    @cached_property
    def reference(self) -> Reference:
        """The base as checkpoints are compared with it, on all tasks."""
        return Reference(self.base, list(self.asked.values()), self.suite)


last_world: dict[tuple[Any, ...], World] = {}


def world_of(setup: Setup, spec: RunSpec, store: RunStore, model: Any = None) -> World:
    """The world of this run's base, whose `model` may be at hand. The last one is kept: a sweep goes base by base."""
    own = spec.root
    key = (str(store.folder), own.run_id, setup.base, setup.sources)
    if key not in last_world:
        last_world.clear()
        phases.at("loading the base, the task and the prior tasks")
        suite = setup.suite(own)
        suite.check()
        base = LanguageModel.in_memory(model, tiny.make_tokenizer(), TINY) if model else load_base(setup, own, store)
        last_world[key] = World(base, setup.sources, own.params, suite)
    return last_world[key]


def load_base(setup: Setup, base: RunSpec, store: RunStore) -> LanguageModel:
    """The base of a base run: from where it lies, or, of the tiny one, what that run has pre-trained."""
    if setup.base != TINY:
        return load(setup.base, dtype=base.params.get("dtype", "float32"))
    return LanguageModel.in_memory(policy_of(Ancestor(base, 0), tiny.make_model(0), store), tiny.make_tokenizer(), TINY)


def policy_of(of: Ancestor, like: Any, store: RunStore) -> Any:
    """A checkpoint's policy, as a copy of a model like it."""
    policy, weights = copy.deepcopy(like), store.load_weights(of.spec, of.step)
    if not weights:  # of a base that lies elsewhere nothing is stored
        raise RazorError(f"No weights were kept of step {of.step} of {of.spec.describe()}: train it again.")
    # Parameters come once, tied ones under both names.
    tied = {name: tensor for name, tensor in policy.state_dict().items() if name not in weights}
    policy.load_state_dict({**tied, **weights})
    return policy


@dataclass(frozen=True, eq=False)
class CalibrationBase:
    """What a law says of the base that a sweep started from."""

    digest: str
    tokenizer_digest: str
    generic: GenericText
    max_new_tokens: int
    has_chat_template: bool
    chat_template_kwargs: Mapping[str, Any] | None = None

    def limited(self, task: Task) -> Task:
        """The task as the sweep has measured it."""
        return task.limited(self.max_new_tokens, self.chat_template_kwargs)


def calibration_base(setup: Setup, spec: RunSpec, store: RunStore, save_to: Path | None = None) -> CalibrationBase:
    """The base of a base run, loaded once more to take its digest, and written to the folder `save_to`, if any."""
    lm = load_base(setup, spec, store)
    if save_to is not None:
        save_model(lm.model, lm.tokenizer, save_to)
    return CalibrationBase(
        base_digest(lm.model),
        tokenizer_digest(lm.tokenizer),
        setup.suite(spec).generic,
        spec.params["max_new_tokens"],
        bool(getattr(lm.tokenizer, "chat_template", None)),
        spec.params.get("chat_template_kwargs"),
    )
