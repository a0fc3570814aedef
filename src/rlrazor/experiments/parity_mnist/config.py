"""What a sweep is made of: settings with their help, presets, and the specs that follow from them. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import TYPE_CHECKING, Any

from rlrazor.errors import RazorError
from rlrazor.runs.records import BASE, Ancestor, RunSpec
from rlrazor.runs.settings import (
    Presets,
    check_bounds,
    check_many,
    check_runs,
    check_samples,
    log_spaced,
    setting,
)

if TYPE_CHECKING:
    from rlrazor.experiments.parity_mnist.methods import Method

EXPERIMENT = "parity-mnist"
RECIPE = 3  # goes into every base's spec: raise it when a change to this folder changes the bits of a run

TEACHER = "grpo"  # the method whose best policy `rl-distilled` imitates
TAUGHT_AT = (0.95, 0.96, 0.97)  # new-task scores of teachers
OF_BASES = ("pretrain_accuracy", "dots", "precision", "rule")
"""Params of a variant that the base has already; what starts from it has them from there."""
SCHEDULES = ("constant", "cosine")
PAPER_METHODS = ("sft-1", "sft-2", "oracle", "grpo", "grpo+kl")
CORE_METHODS = (
    *("sft-1", "sft-2", "oracle", "rl-distilled", "simpo", "reinforce", "grpo", "dr-grpo", "kl-dpg", "grpo+kl"),
)


@dataclass(frozen=True)
class Config:
    """The grid of one sweep: every combination of methods, lrs, schedules, epochs and seeds is a run.

    Defaults of the lower half are choices the paper leaves open; docs/how-it-works.md gives the evidence for them.
    """

    methods: tuple[str, ...] = setting("methods, comma-separated, or 'paper' (five), 'core' (ten) or 'all'")
    lrs: tuple[float, ...] = setting("learning rates, comma-separated, or LOW:HIGH:COUNT log-spaced")
    schedules: tuple[str, ...] = setting("learning-rate schedules: constant, cosine")
    epochs: tuple[int, ...] = setting("run lengths in epochs")
    seeds: tuple[int, ...] = setting("seeds; each pre-trains a base policy of its own", (0,))
    checkpoints_per_epoch: int = setting("checkpoints measured per epoch", 5)
    batch_size: int = setting("images per step", 128)
    group_size: int = setting("labels sampled per image by on-policy methods", 64)
    kl_coef: float = setting("weight of KL(pi || pi0) in the methods named ...+kl", 0.1)
    pretrain_epochs: int = setting("length of the base policy's pre-training", 20)
    pretrain_size: int = setting("images of each task in pre-training", 500)

    def __post_init__(self) -> None:
        check_many(self, ("methods", "lrs", "schedules", "epochs", "seeds"))
        if self.methods not in (PAPER_METHODS, CORE_METHODS):  # which are right, and known so without torch
            taught = self.taught
            if taught and TEACHER not in self.methods:
                raise RazorError(
                    f"{taught[0]} imitates the sweep's best {TEACHER} policy: add {TEACHER} to the methods."
                )
        for schedule in self.schedules:
            if schedule not in SCHEDULES:
                raise RazorError(f"Unknown schedule {schedule!r:.60}. Schedules: {', '.join(SCHEDULES)}.")
        if self.group_size < 2:
            raise RazorError("group_size must be at least 2: a group of one has nothing to compare its reward with.")
        check_bounds(self)
        runs = len(self.methods) * len(self.lrs) * len(self.schedules) * len(self.epochs) * len(self.seeds)
        check_runs(runs, max(self.epochs) * self.checkpoints_per_epoch)
        check_samples(self, "batch_size")

    @property
    def taught(self) -> list[str]:
        """The methods that imitate a teacher. Raises RazorError for an unknown one."""
        return [name for name in self.methods if self.method_of(name)[0].from_teacher]

    def method_of(self, name: str) -> "tuple[Method, Any]":
        """The method of this name, and whether it has a penalty. Raises RazorError for an unknown one."""
        from rlrazor.experiments.parity_mnist.methods import find_method  # which imports torch

        return find_method(name)

    def used(self) -> list[str]:
        """The settings that matter to these methods."""
        found = [self.method_of(name) for name in self.methods]
        idle = set() if any(method.on_policy for method, _ in found) else {"group_size"}
        idle |= set() if any(regularised for _, regularised in found) else {"kl_coef"}
        return [one.name for one in fields(self) if one.name not in idle]

    def base_specs(self, data: str, variant: Mapping[str, Any] | None = None) -> list[RunSpec]:
        """One base run per seed; `data` is the fingerprint of the images, `variant` as in `specs`."""
        of_base = {name: value for name, value in (variant or {}).items() if name in OF_BASES}
        params = {"recipe": RECIPE, "data": data}
        params |= {"pretrain_size": self.pretrain_size, "pretrain_epochs": self.pretrain_epochs, **of_base}
        return [RunSpec(EXPERIMENT, BASE, params, seed) for seed in self.seeds]

    def specs(
        self,
        data: str,
        methods: Sequence[str],
        teachers: Mapping[int, Ancestor] | None = None,
        variant: Mapping[str, Any] | None = None,
    ) -> list[RunSpec]:
        """The fine-tuning runs of these methods, method by method; `teachers` (seed -> teacher) for `rl-distilled`.

        `variant`: further params of every run, for what `train.pretrain` and `train.finetune` can do besides.
        """
        from rlrazor.experiments.parity_mnist.methods import find_method

        specs = []
        own = {name: value for name, value in (variant or {}).items() if name not in OF_BASES}
        for base, name in product(self.base_specs(data, variant), methods):
            method, regularised = find_method(name)
            fixed = {
                "batch_size": self.batch_size,
                "group_size": self.group_size if method.on_policy else None,
                "kl_coef": self.kl_coef if regularised else 0.0,
                "checkpoints_per_epoch": self.checkpoints_per_epoch,
            }
            if method.strength is not None:
                fixed["strength"] = method.strength
            teacher = None
            if method.from_teacher:
                assert teachers is not None
                teacher = teachers[base.seed]
            for lr, schedule, epochs in product(self.lrs, self.schedules, self.epochs):
                params = {"lr": lr, "schedule": schedule, "epochs": epochs, **fixed, **own}
                specs.append(RunSpec(EXPERIMENT, name, params, base.seed, Ancestor(base, 0), teacher))
        return specs


def all_methods() -> tuple[str, ...]:
    """Every method, and the two with a penalty that the paper and the baselines have."""
    from rlrazor.experiments.parity_mnist.methods import METHODS

    return (*METHODS, "grpo+kl", "dft+kl")


PAPER_LRS = log_spaced(3e-6, 1e-3, 15)
PRESETS: Mapping[str, Config] = {
    "paper": Config(PAPER_METHODS, PAPER_LRS, SCHEDULES, (1, 2)),
    "quick": Config(CORE_METHODS, log_spaced(2e-5, 1e-3, 5), ("constant",), (1,)),
}
SENSITIVITY: Mapping[str, tuple[int, ...]] = {
    "batch_size": (64, 256),
    "group_size": (8, 256),
    "pretrain_epochs": (5, 10, 50),
}
"""Other values of what the paper leaves open, each tried with the rest as configured."""


def sensitivity_variants(config: Config) -> list[tuple[str, int, Config]]:
    """(setting, value, config) for each value of `SENSITIVITY`, and for the configured one beside them.

    On a thinner grid, so that the table costs minutes: every third learning rate, one constant epoch, the first seed.
    """
    taught = config.taught
    thin = replace(
        config,
        methods=tuple(name for name in config.methods if name not in taught),
        lrs=config.lrs[::-3][::-1],
        schedules=("constant",),
        epochs=(1,),
        seeds=config.seeds[:1],
    )
    variants = []
    for name, others in SENSITIVITY.items():
        for value in sorted({getattr(config, name), *others}):
            overridden: dict[str, Any] = {name: value}
            variants.append((name, value, replace(thin, **overridden)))
    return variants


_TYPED = Presets(PRESETS, {"paper": lambda: PAPER_METHODS, "core": lambda: CORE_METHODS, "all": all_methods})
resolve, parse_setting = _TYPED.resolve, _TYPED.parse
