"""Language models as the runner sees them: the base, the sweep, students of its best policy; and what they cost."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from rlrazor.errors import RazorError
from rlrazor.experiments.language import config as configs
from rlrazor.experiments.language import cost
from rlrazor.experiments.language.config import TINY, Config
from rlrazor.experiments.language.cost import Timing
from rlrazor.experiments.language.evaluate import DRIFT
from rlrazor.experiments.language.further import ABOUT, described
from rlrazor.experiments.language.methods import METHODS, TEACHER, Method, find_method, label_of
from rlrazor.experiments.language.old import check_old
from rlrazor.experiments.language.setup import Setup
from rlrazor.experiments.language.suites import LM_EVAL_INPUTS, TINY_INPUTS
from rlrazor.experiments.language.train import train
from rlrazor.lm import packaged
from rlrazor.lm.own_texts import OwnTexts
from rlrazor.lm.prior import PriorTasks
from rlrazor.lm.task_names import PRIOR, SELF
from rlrazor.runs.dry_run import Trial
from rlrazor.runs.experiment import Cost, Phase
from rlrazor.runs.records import BASE, RunSpec
from rlrazor.runs.runner import versions_of
from rlrazor.runs.store import Checkpoint, RunStore
from rlrazor.runs.teachers import students

# One for each quadrant of the paper's Fig. 4, where a sweep has them: on-policy or not, with negatives or not.
QUADRANTS = ("grpo", "dr-grpo", "reinforce", "sft", "sft-one", "simpo")


@dataclass(frozen=True)
class Language(Setup):
    """The experiment on one base and one new task."""

    name: ClassVar[str] = configs.EXPERIMENT
    config: ClassVar[type[Config]] = Config
    presets: ClassVar[Mapping[str, Config]] = configs.PRESETS
    methods: ClassVar[Mapping[str, Method]] = METHODS

    @property
    def title(self) -> str:
        """The task and the base."""
        task = self.task.task()
        return f"{task.title}{'' if task.title == task.name else f' ({task.name})'}, {name_of(self.base)}"

    @cached_property
    def data(self) -> tuple[str, int]:
        """The fingerprint of the task's prompts, and how many there are to train on."""
        splits = self.task.load()
        return self.task.fingerprint(splits), len(splits.train)

    @cached_property
    def count(self) -> int:
        """The same without the fingerprint, which may take the prior tasks' data."""
        return len(self.task.load().train)

    def phases(self, config: Config, store: RunStore | None) -> Iterator[Phase]:
        """Bases, the methods that need no teacher, and those that imitate the best of them."""
        check_old(self.task.old, config.methods, self.base, alone=True)
        base, data = ("", "") if store is None else (self.fingerprint, self.data[0])
        yield Phase("base policies", config.base_specs(base, data))
        taught = config.taught
        specs = config.specs(base, data, [name for name in config.methods if name not in taught])
        yield Phase("sweep", specs)
        if taught:
            level = max(config.thresholds)
            yield students(
                specs, store, TEACHER, [level], lambda _, teachers: config.specs(base, data, taught, teachers)
            )

    def train(self, spec: RunSpec, store: RunStore) -> Iterator[Checkpoint]:
        """Measure the base, or fine-tune it as `spec` says."""
        return train(self, spec, store)

    def cost(self, spec: RunSpec) -> Cost:
        """Updates and checkpoints of a run on the task's prompts."""
        if spec.method == BASE:
            return Cost(0, 1)
        prompts = self.prompts(spec)
        prompts += configs.replayed(spec, prompts)
        return Cost(configs.count_steps(spec, prompts), len(configs.due_steps(spec, prompts)))

    def prompts(self, spec: RunSpec) -> int:
        """How many of the task's a run learns from."""
        return min(self.count, spec.params["train_prompts"] or self.count)

    def trial(self, config: Config) -> Trial:
        """A few updates and one measurement, where the base is at hand. Raises RazorError where it is not."""
        return cost.trial_of(self.timing(config), config, self, self.prompts)

    def timing(self, config: Config) -> Timing:
        """What the trial found. Raises RazorError as `trial` does."""
        if not cost.is_at_hand(config.base):
            raise RazorError(f"the base {config.base} is not on this machine, and was not downloaded")
        try:
            return cost.time_trial(config, self, self.task.load())
        except RazorError as error:
            raise RazorError(f"a trial on little of it failed. {error}") from error

    def describe(self, config: Config) -> Mapping[str, Any]:
        """Names for the report, and what the runs were made from."""
        task = self.task.task()
        return {
            "task": task.name,
            "new_task": task.name,
            "labels": {name: label_of(name) for name in config.methods},
            **({"quadrants": four} if len(four := quadrants(config.methods)) == 4 else {}),
            "thresholds": list(config.thresholds),
            "data": self.data[0],
            "drift": list(DRIFT),
            **described_as(self, config),
        }


def described_as(setup: Setup, config: Config) -> Mapping[str, Any]:
    """What the report of any runs of this base says of how they were measured."""
    about = {**(TINY_INPUTS if config.base == TINY else LM_EVAL_INPUTS), **_probe_of(setup.task.generic)}
    about["probe"] = f"{about['probe']} {described(config.base, config.probes)}".strip()
    return {
        "prior_task": "prior tasks",
        "scored": config.scored,
        "kl_unit": "nats per completion",
        "base": setup.fingerprint,
        "versions": versions_of("transformers", "trl", "peft", "lm-eval"),
        **about,
    }


def _probe_of(generic: str | Path | PriorTasks | None) -> Mapping[str, str]:
    """What the report says of a generic probe that was asked for."""
    if generic is None:
        return {}
    if isinstance(generic, PriorTasks):
        return {"probe": f"The generic probe is {ABOUT[PRIOR]}."}
    if generic != SELF:
        return {"probe": "The generic probe is the text, or the prompts completed by the base, of a file."}
    own = OwnTexts()
    return {
        "probe": f"The generic probe is {own.samples} texts of at most {own.max_new_tokens} tokens that the base wrote "
        "from nothing, by sampling."
    }


def name_of(base: str) -> str:
    """A base as a title names it: a hub's id, a file or a folder by its name, without the hashes of caches and runs."""
    if base in packaged.BASES:
        return packaged.BASES[base].title
    if base == TINY or not Path(base).exists():
        return base
    for part in reversed(Path(base).resolve().parts):
        if (found := re.fullmatch(r"models--(.+)", part)) is not None:
            return found[1].replace("--", "/")
        if part not in ("snapshots", "models") and not re.fullmatch(r"(.*-)?[0-9a-f]{12,}", part):
            return part.removesuffix(".gguf")
    return base


def quadrants(methods: Sequence[str]) -> Mapping[str, tuple[bool, bool]]:
    """Method -> (on-policy, with negative examples), one method for each of the four, as far as there are any."""
    chosen: dict[tuple[bool, bool], str] = {}
    for name in QUADRANTS:
        method = find_method(name)[0]
        if name in methods:
            chosen.setdefault((method.on_policy, method.negatives), name)
    return {name: quadrant for quadrant, name in chosen.items()}
