"""What a sweep is made of: presets, a config file, the command line, and the specs that follow from them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any

from rlrazor import bounds
from rlrazor.errors import RazorError
from rlrazor.experiments.parity_mnist.methods import METHODS, TEACHER, find_method
from rlrazor.experiments.parity_mnist.train import EXPERIMENT, RECIPE, base_spec
from rlrazor.runs import settings
from rlrazor.runs.records import RunSpec
from rlrazor.runs.settings import check_bounds, check_many, check_positive, check_runs, kinds_of, log_spaced

SCHEDULES = ("constant", "cosine")
PAPER_METHODS = ("sft-1", "sft-2", "oracle", "grpo", "grpo+kl")
CORE_METHODS = (
    *("sft-1", "sft-2", "oracle", "rl-distilled", "simpo", "reinforce", "grpo", "dr-grpo", "kl-dpg", "grpo+kl"),
)
ALL_METHODS = (*METHODS, "grpo+kl", "dft+kl")
_SETS: Mapping[Any, tuple[str, ...]] = {"paper": PAPER_METHODS, "core": CORE_METHODS, "all": ALL_METHODS}


@dataclass(frozen=True)
class Config:
    """The grid of one sweep: every combination of methods, lrs, schedules, epochs and seeds is a run.

    Defaults of the lower half are choices the paper leaves open; the README gives the evidence for them.
    """

    methods: tuple[str, ...]
    lrs: tuple[float, ...]
    schedules: tuple[str, ...]
    epochs: tuple[int, ...]
    seeds: tuple[int, ...] = (0,)
    checkpoints_per_epoch: int = 5
    batch_size: int = 128
    group_size: int = 64
    kl_coef: float = 0.1  # of the methods named "...+kl"
    pretrain_epochs: int = 20
    pretrain_size: int = 500  # images of each task

    def __post_init__(self) -> None:
        check_many(self, ("methods", "lrs", "schedules", "epochs", "seeds"))
        for method in self.methods:
            if find_method(method)[0].from_teacher and TEACHER not in self.methods:
                raise RazorError(f"{method} imitates the sweep's best {TEACHER} policy: add {TEACHER} to the methods.")
        for schedule in self.schedules:
            if schedule not in SCHEDULES:
                raise RazorError(f"Unknown schedule {schedule!r:.60}. Schedules: {', '.join(SCHEDULES)}.")
        check_positive(self, _KINDS, but=("seeds", "kl_coef"))
        if self.group_size < 2:
            raise RazorError("group_size must be at least 2: a group of one has nothing to compare its reward with.")
        if not 0 <= self.kl_coef < float("inf"):
            raise RazorError(f"kl_coef must be 0 or more, not {self.kl_coef}.")
        if min(self.seeds) < 0:
            raise RazorError(f"seeds must be 0 or more, not {min(self.seeds)}.")
        check_bounds(self, _KINDS)
        runs = len(self.methods) * len(self.lrs) * len(self.schedules) * len(self.epochs) * len(self.seeds)
        check_runs(runs, max(self.epochs) * self.checkpoints_per_epoch)
        samples = self.batch_size * self.group_size
        bounds.check_size("samples a step", samples, bounds.MOST_SAMPLES, "lower batch_size or group_size")

    def used(self) -> list[str]:
        """The settings that matter to these methods."""
        found = [find_method(name) for name in self.methods]
        idle = set() if any(method.on_policy for method, _ in found) else {"group_size"}
        idle |= set() if any(regularised for _, regularised in found) else {"kl_coef"}
        return [field.name for field in fields(self) if field.name not in idle]

    def base_specs(self, data: str, variant: Mapping[str, Any] | None = None) -> list[RunSpec]:
        """One base run per seed; `data` is the fingerprint of the images, `variant` as in `specs`."""
        return [base_spec({**self._shared(data), **(variant or {})}, seed) for seed in self.seeds]

    def specs(
        self,
        data: str,
        methods: Sequence[str],
        teachers: Mapping[int, Any] | None = None,
        variant: Mapping[str, Any] | None = None,
    ) -> list[RunSpec]:
        """The fine-tuning runs of these methods, method by method; `teachers` (seed -> teacher) for `rl-distilled`.

        `variant`: further params of every run, for what `train.pretrain` and `train.finetune` can do besides.
        """
        specs = []
        for seed, name in product(self.seeds, methods):
            method, regularised = find_method(name)
            fixed = {
                **self._shared(data),
                "batch_size": self.batch_size,
                "group_size": self.group_size if method.on_policy else None,
                "kl_coef": self.kl_coef if regularised else 0.0,
                "checkpoints_per_epoch": self.checkpoints_per_epoch,
            }
            if method.strength is not None:
                fixed["strength"] = method.strength
            if method.from_teacher:
                assert teachers is not None
                fixed["teacher"] = teachers[seed]
            for lr, schedule, epochs in product(self.lrs, self.schedules, self.epochs):
                params = {"lr": lr, "schedule": schedule, "epochs": epochs, **fixed, **(variant or {})}
                specs.append(RunSpec(EXPERIMENT, name, params, seed))
        return specs

    def _shared(self, data: str) -> dict[str, Any]:
        return {
            "recipe": RECIPE,
            "data": data,
            "pretrain_size": self.pretrain_size,
            "pretrain_epochs": self.pretrain_epochs,
        }


_KINDS = kinds_of(Config)

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
    thin = replace(
        config,
        methods=tuple(name for name in config.methods if not find_method(name)[0].from_teacher),
        lrs=config.lrs[::-3][::-1],
        schedules=("constant",),
        epochs=(1,),
        seeds=config.seeds[:1],
    )
    variants = []
    for setting, others in SENSITIVITY.items():
        for value in sorted({getattr(config, setting), *others}):
            overridden: dict[str, Any] = {setting: value}
            variants.append((setting, value, replace(thin, **overridden)))
    return variants


def resolve(preset: str, settings: Mapping[str, Any] | None = None) -> Config:
    """The preset with these settings, as `parse_setting` returns them, in place of its own."""
    if preset not in PRESETS:
        raise RazorError(f"Unknown preset {preset!r:.60}. Presets: {', '.join(PRESETS)}.")
    return replace(PRESETS[preset], **(settings or {}))


def parse_setting(name: str, value: Any) -> Any:
    """A setting as Config holds it: see `grid.parse_setting`. `methods` also takes `all`, `core` and `paper`."""
    return settings.parse_setting(_KINDS, _SETS, name, value)
