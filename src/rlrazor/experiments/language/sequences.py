"""Sequences of tasks for language models: settings, presets, and the specs that follow from them. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from rlrazor.errors import RazorError
from rlrazor.experiments.continual.config import EXPERIMENT, PENALTIES, TO_BASE, TO_BEFORE, InSequence, check, parts_of
from rlrazor.experiments.language.config import TINY, Config
from rlrazor.experiments.language.methods import FROM_TEACHER, Method, find_method
from rlrazor.experiments.language.tasks import TASKS
from rlrazor.experiments.language.tasks.letters import FORMS
from rlrazor.runs.method_names import KL_SUFFIX
from rlrazor.runs.records import Ancestor, RunSpec
from rlrazor.runs.settings import Presets, setting

CORE_METHODS = ("sft-one", "sft-two", "oracle", "reinforce", "grpo", "dr-grpo", "kl-dpg")
PROTECTED = ("replay", "ewc")
PAPER_METHODS = (
    *CORE_METHODS,
    *(name + penalty for penalty in (TO_BASE, TO_BEFORE) for name in CORE_METHODS if name + penalty != "kl-dpg+kl"),
    *PROTECTED,
)


def method_of(name: str) -> tuple[Method, str]:
    """The method of that name, and its penalty, one of PENALTIES. Raises RazorError, with the names, for another."""
    plain, penalty = parts_of(name)
    if penalty not in PENALTIES:
        raise RazorError(
            f"Unknown method {name!r:.60}: after {plain!r:.40} comes {TO_BASE}, a KL penalty to the base, {TO_BEFORE}, "
            "one to the stage before, or nothing."
        )
    return find_method(name_of_sweep(name))[0], penalty


@dataclass(frozen=True, kw_only=True)
class ModelSequences(Config, InSequence):
    """The settings of a sweep, those of a grid with one value each, and what sequences have besides."""

    task: str = setting("none: a sequence has tasks", "")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task:
            raise RazorError("A sequence has several tasks: name them with tasks, not with task.")
        check(self, None, ("schedules", "epochs", "batch_sizes", "iterations"))
        if self.base == TINY and (others := [task for task in self.tasks if task in TASKS and task not in FORMS]):
            raise RazorError(
                f"In a sequence the base {TINY!r} takes the tasks {', '.join(FORMS)}, which their prompts tell apart, "
                f"not {others[0]!r:.60}."
            )
        for name in self.methods:
            method, penalty = method_of(name)
            if method.demonstrations == FROM_TEACHER:
                raise RazorError(f"{name} imitates a teacher, and a sequence trains none: take another method.")
            if method.advantage == "dpg" and penalty == TO_BASE:
                raise RazorError(f"{name} looks at the stage before: it takes {TO_BEFORE}, not {TO_BASE}.")

    @property
    def taught(self) -> list[str]:
        """No method imitates a teacher here."""
        return []

    def used(self) -> list[str]:
        """The settings that matter to these methods and this base."""
        return ["tasks", "orders", "target", *(one for one in self.sweep().used() if one not in ("task", "thresholds"))]

    def sweep(self, **settings: Any) -> Config:
        """The same settings, but for these, as those of a sweep on one task."""
        own = {one.name: getattr(self, one.name) for one in fields(Config)}
        names = tuple(dict.fromkeys(name_of_sweep(name) for name in self.methods))
        return Config(**{**own, "methods": names, "thresholds": (self.target,), **settings})

    def base_specs(self, base: str, data: str) -> list[RunSpec]:
        """One run per seed that measures the base; `base` and `data` are fingerprints, that of all tasks' prompts."""
        specs = super().base_specs(base, data)
        params = {name: value for name, value in specs[0].params.items() if name != "task"}
        params["tasks"] = "+".join(sorted(self.tasks))
        if self.base == TINY:
            params["forms"] = "+".join(FORMS)
        return [RunSpec(EXPERIMENT, spec.method, params, spec.seed) for spec in specs]

    def rates(self, method: str) -> Sequence[float]:
        """The learning rates that the method is tried at: those of on-policy methods, or of the others."""
        return self.rl_lrs if method_of(method)[0].advantage else self.lrs

    def stage(self, method: str, lr: float, tasks: Sequence[str], start: Ancestor) -> RunSpec:
        """A run that trains these tasks, one or several at once, from there, in as many updates of each."""
        name, count = name_of_sweep(method), len(tasks)
        of_run = {"max_steps": self.max_steps * count} if self.max_steps else {}
        of_run |= {"checkpoints_per_epoch": self.checkpoints_per_epoch * count} if self.max_steps else {}
        (spec,) = self.sweep(methods=(name,), lrs=(lr,), rl_lrs=(lr,), seeds=(0,), **of_run).specs("", "", [name])
        params = {**spec.params, "task": "+".join(tasks), "until": self.target}
        return RunSpec(EXPERIMENT, method, params, start.spec.seed, start)


def name_of_sweep(method: str) -> str:
    """A method's name in a sweep, which has one penalty."""
    plain, penalty = parts_of(method)
    return plain + KL_SUFFIX if penalty in (TO_BASE, TO_BEFORE) else method


PRESETS: Mapping[str, ModelSequences] = {
    "tiny": ModelSequences(
        base=TINY,
        tasks=("ascending", "descending", "appearance"),
        methods=(*CORE_METHODS, *PROTECTED),
        target=0.8,  # which SFT on two reaches in each stage, as it does not 0.85
        lrs=(1e-4, 3e-4),
        rl_lrs=(3e-5, 1e-4),
        epochs=(3,),
        batch_sizes=(64,),
        rl_prompts=16,
        group_size=16,
        ewc_strength=1e5,
        max_steps=160,
        checkpoints_per_epoch=32,  # of a stage: near enough that it ends near its target
        test_prompts=64,
        kl_samples=2,
        scored="sampled",
        prior=(TINY,),
        threads=1,
    ),
}


_TYPED = Presets(PRESETS, {"core": lambda: CORE_METHODS, "paper": lambda: PAPER_METHODS})
resolve, parse_setting = _TYPED.resolve, _TYPED.parse
