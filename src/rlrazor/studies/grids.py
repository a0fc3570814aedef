"""The runs of a study: grids of methods and learning rates with what sets them apart from the sweep's.

A grid that does not differ from the sweep asks for the sweep's own runs, by the same id: in one folder they are not
trained twice.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rlrazor.experiments.parity_mnist.config import PAPER_LRS, PRESETS, TEACHER, Config
from rlrazor.runs.records import Ancestor, RunSpec

LRS = PAPER_LRS[6::2]  # 3.6e-5 ... 1e-3
MIDDLE = PAPER_LRS[8:13:2]  # 8.3e-5, 1.9e-4, 4.4e-4: where methods learn the task within an epoch
ONE = PAPER_LRS[10:11]

SEEDS = {"paper": (0, 1, 2), "quick": (0,)}


@dataclass(frozen=True)
class Grid:
    """Every one of `methods` at every one of `lrs`, for one epoch unless `settings` says otherwise.

    `variant` are params that the training loop knows, `settings` fields of Config. `taught_at`: the runs imitate the
    best policies of that new-task score among the study's own runs of `TEACHER`.
    """

    methods: tuple[str, ...]
    lrs: tuple[float, ...]
    variant: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    taught_at: float | None = None

    def specs(self, seeds: Sequence[int], data: str, teachers: Mapping[int, Ancestor] | None = None) -> list[RunSpec]:
        """The fine-tuning runs; `data` fingerprints the images; `teachers` of `taught_at`, by seed."""
        methods = self.methods if self.taught_at is None else (TEACHER, *self.methods)
        config = replace(plain_config(seeds), methods=methods, lrs=self.lrs, **self.settings)
        return config.specs(data, self.methods, teachers, self.variant)

    def describe(self) -> dict[str, Any]:
        """What was varied, for the file beside the table."""
        return {
            "methods": list(self.methods),
            "lrs": list(self.lrs),
            **dict(self.settings),
            **dict(self.variant),
            **({} if self.taught_at is None else {"taught_at": self.taught_at}),
        }


def plain_config(seeds: Sequence[int]) -> Config:
    """The settings of all grids but for their methods, learning rates, and what a grid sets itself."""
    return replace(PRESETS["paper"], schedules=("constant",), epochs=(1,), seeds=tuple(seeds))


def seeds_of(preset: str) -> tuple[int, ...]:
    """The seeds of a study unless the command names others."""
    return SEEDS.get(preset, SEEDS["quick"])
