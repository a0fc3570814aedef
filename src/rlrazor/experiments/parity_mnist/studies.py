"""The analyses beyond the sweep: each answers one question with a small grid of runs of its own.

A study is a list of arms, and an arm is methods and learning rates with what sets them apart from the sweep's. Arms
that do not differ from it are the sweep's own runs, by the same id, and are not trained twice in one folder. What the
runs show is worked out by `rlrazor.report.sections`, which reads their table and knows nothing of this module.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import polars as pl

from rlrazor.errors import RazorError
from rlrazor.experiments.parity_mnist.config import EXPERIMENT, PAPER_LRS, PRESETS, TAUGHT_AT, TEACHER, Config
from rlrazor.experiments.parity_mnist.task import DOTS
from rlrazor.runs.records import Ancestor, RunSpec, to_table
from rlrazor.runs.store import RunStore

OF_THE_SWEEP = ("predictors", "representation")
"""Analyses that read the sweep itself and need no runs of their own."""

THEORY = "theory"  # needs no runs at all, but looks at the plain RL runs of the sweep and of these, if they are there
WITH_RL = ("quadrants", "baselines")

NEVER_REFRESHED = 1_000_000  # updates of age: more than any run has, so the samples are the base's throughout
DOT_IMAGES = 2_000
SEEDS = {"paper": (0, 1, 2), "quick": (0,)}

LRS = PAPER_LRS[6::2]  # 3.6e-5 ... 1e-3, of the sweep's own
MIDDLE = PAPER_LRS[8:13:2]  # 8.3e-5, 1.9e-4, 4.4e-4: where methods learn the task within an epoch
ONE = PAPER_LRS[10:11]


@dataclass(frozen=True)
class Arm:
    """Runs that share a setting: `variant` are params that the training loop knows, `settings` fields of Config.

    `taught_at`: the runs imitate the best policies of that new-task score among the study's own runs of `TEACHER`.
    """

    methods: tuple[str, ...]
    lrs: tuple[float, ...]
    variant: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    taught_at: float | None = None

    def specs(self, seeds: Sequence[int], data: str, teachers: Mapping[int, Any] | None = None) -> list[RunSpec]:
        """The fine-tuning runs; `data` is the fingerprint of the images, `teachers` (seed -> teacher) of `taught_at`.

        Without `teachers`, those of students have a stand-in, which is enough to count them.
        """
        methods = self.methods if self.taught_at is None else (TEACHER, *self.methods)
        config = replace(_ONE_EPOCH, methods=methods, lrs=self.lrs, seeds=tuple(seeds), **self.settings)
        if teachers is None and self.taught_at is not None:
            teachers = unknown_teachers(self.taught_at, seeds)
        return config.specs(data, self.methods, teachers, self.variant)


_ONE_EPOCH = replace(PRESETS["paper"], schedules=("constant",), epochs=(1,))


def _precision(quick: bool) -> list[Arm]:
    lrs = LRS[1:4:2] if quick else LRS[:4]
    return [Arm(("grpo", "sft-2"), lrs, variant) for variant in ({}, {"precision": "bfloat16"})]


def _dynamics(quick: bool) -> list[Arm]:
    # At batch 512 a quick epoch is 118 steps, not 469.
    settings = {"batch_size": 512} if quick else {}
    return [Arm(("grpo", "sft-2"), PAPER_LRS[9:10], {"traced": True}, settings)]


def _quadrants(quick: bool) -> list[Arm]:
    return [Arm(("grpo", "reinforce", "sft-2", "simpo"), LRS[1:4] if quick else LRS)]


def _off_policy(quick: bool) -> list[Arm]:
    settings = {} if quick else {"epochs": (2,)}
    ages = (0, 8, NEVER_REFRESHED) if quick else (0, 1, 8, 64, 512, NEVER_REFRESHED)
    return [
        Arm(("sft-2", "oracle"), ONE, settings=settings),  # SFT, to compare with
        *(
            Arm(("grpo", "reinforce"), ONE, {"staleness": age, "importance": weighted} if age else {}, settings)
            for age in ages
            for weighted in ((False, True) if age else (False,))
        ),
    ]


def _optimizers(quick: bool) -> list[Arm]:
    methods = ("grpo", "sft-2")
    return [
        Arm(methods, ONE if quick else MIDDLE),
        Arm(methods, (0.1,) if quick else (0.03, 0.1, 0.3), {"optimizer": "sgd"}),
        Arm(methods, (0.003,), {"optimizer": "muon"}),
    ]


def _kl_penalty(quick: bool) -> list[Arm]:
    lrs = ONE if quick else MIDDLE
    return [
        Arm(("sft-2", "grpo"), lrs),
        *(
            Arm(("sft-2+kl", "grpo+kl"), lrs, settings={"kl_coef": coefficient})
            for coefficient in ((0.1, 1.0) if quick else (0.1, 0.3, 1.0))
        ),
    ]


def _unrelated_prior(quick: bool) -> list[Arm]:
    lrs = LRS[1:4:2] if quick else LRS[:4]
    return [Arm(("sft-1", "sft-2", "oracle", "grpo", "grpo+kl"), lrs, {DOTS: DOT_IMAGES})]


def _kl_minimal(quick: bool) -> list[Arm]:
    methods = ("grpo", "grpo+kl", "kl-dpg", "js-dpg", "tv-dpg", "natural-pg")
    # The share of correct labels in pre-training, and the group size. The base's own accuracy is in the table.
    grid = ((1.0, 64), (0.3, 64), (0.0, 64), (0.0, 8))
    return [
        Arm(
            methods,
            ONE,
            {"pretrain_accuracy": accuracy} if accuracy < 1 else {},
            {"group_size": group},
        )
        for accuracy, group in (grid[::2] if quick else grid)
    ]


def _baselines(quick: bool) -> list[Arm]:
    lrs = ONE if quick else MIDDLE
    return [
        Arm(("sft-2", "oracle", "grpo", "kl-dpg", "dft"), lrs),
        Arm(("replay",), lrs),
        *(Arm(("ewc",), lrs, {"strength": strength}) for strength in ((1e3,) if quick else (1e2, 1e3, 1e4))),
        *(Arm(("lwf",), lrs, {"strength": strength}) for strength in ((1.0,) if quick else (0.3, 1.0))),
        *(Arm(("dft+kl",), lrs, settings={"kl_coef": weight}) for weight in ((0.1,) if quick else (0.1, 1.0))),
        *(Arm(("lora",), (1e-3,) if quick else (3e-4, 1e-3, 3e-3), {"strength": rank}) for rank in (2, 8)),
    ]


def _distilled(quick: bool) -> list[Arm]:
    # RL's from 5.5e-5 to 4.4e-4, students' from 1.2e-4 to 6.6e-4: they learn the task more slowly.
    lrs, students_lrs = (PAPER_LRS[9:12:2],) * 2 if quick else (PAPER_LRS[7:13], PAPER_LRS[9:14:2])
    short = {} if quick else {"epochs": (2,)}
    many = {"labels_per_image": _ONE_EPOCH.group_size}
    arms = [Arm((TEACHER,), lrs, settings=short)]
    for level in TAUGHT_AT[:2] if quick else TAUGHT_AT:
        arms.append(Arm(("rl-distilled",), students_lrs, {}, short, level))
        if not quick:
            arms.append(Arm(("rl-distilled",), students_lrs[:1], {}, {"epochs": (6,)}, level))
        arms.append(Arm(("rl-distilled",), students_lrs, many, short, level))
        arms.append(Arm(("rl-distilled-correct",), students_lrs, {}, short, level))
    return arms


STUDIES = {
    "precision": _precision,
    "dynamics": _dynamics,
    "quadrants": _quadrants,
    "off-policy": _off_policy,
    "optimizers": _optimizers,
    "kl-penalty": _kl_penalty,
    "unrelated-prior": _unrelated_prior,
    "kl-minimal": _kl_minimal,
    "baselines": _baselines,
    "distilled": _distilled,
}
ANALYSES = (
    *("predictors", "precision", "representation", "dynamics", THEORY, "quadrants"),
    *("off-policy", "optimizers", "kl-penalty", "unrelated-prior", "kl-minimal", "baselines", "distilled"),
)
"""Every analysis, in the order of the report."""


def parse_analyses(text: str) -> tuple[str, ...]:
    """Comma-separated names, or `all`, in the report's order; raises RazorError for an unknown or empty one."""
    names = ANALYSES if text.strip() == "all" else tuple(name.strip() for name in text.split(","))
    unknown = [name for name in names if name not in ANALYSES]
    if unknown:
        raise RazorError(f"Unknown analysis {unknown[0]!r:.60}. Analyses: all, {', '.join(ANALYSES)}.")
    return tuple(name for name in ANALYSES if name in names)


def needs_sweep(analyses: Sequence[str]) -> bool:
    """Whether a command with these analyses is about the sweep: one without any, or with some that read it."""
    return not analyses or bool(set(analyses) & set(OF_THE_SWEEP))


def arms_of(name: str, preset: str) -> list[Arm]:
    """The arms of a study. A preset other than `paper` gets the quick ones."""
    return STUDIES[name](preset != "paper")


def base_of(spec: RunSpec) -> RunSpec:
    """The base run that a fine-tuning run starts from."""
    return spec.root


def unknown_teachers(level: float, seeds: Sequence[int]) -> dict[int, Any]:
    """Stand-ins for teachers that are not trained yet, by seed: enough to count their students."""
    return {seed: Ancestor(RunSpec(EXPERIMENT, TEACHER, {"new": level}, seed), 0) for seed in seeds}


def students_of(
    arms: Sequence[Arm], level: float, teachers: Mapping[int, Any], seeds: Sequence[int], data: str
) -> list[RunSpec]:
    """The runs of the arms that are taught at this level, by these teachers (seed -> teacher)."""
    return [spec for arm in arms if arm.taught_at == level for spec in arm.specs(seeds, data, teachers)]


def study_table(specs: Sequence[RunSpec], store: RunStore) -> pl.DataFrame:
    """The records of these runs and of their bases, base by base."""
    by_base: dict[RunSpec, list[RunSpec]] = {}
    for spec in dict.fromkeys(specs):
        by_base.setdefault(base_of(spec), []).append(spec)
    tables = [to_table((spec, store.read(spec).records) for spec in [base, *tuned]) for base, tuned in by_base.items()]
    return pl.concat(tables, how="diagonal_relaxed")


def describe_arms(arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """What was varied, for the file beside the table."""
    return [
        {
            "methods": list(arm.methods),
            "lrs": list(arm.lrs),
            **dict(arm.settings),
            **dict(arm.variant),
            **({} if arm.taught_at is None else {"taught_at": arm.taught_at}),
        }
        for arm in arms
    ]


def seeds_of(preset: str) -> tuple[int, ...]:
    """The seeds of a study unless the command names others."""
    return SEEDS.get(preset, SEEDS["quick"])


def plain_config(seeds: Sequence[int]) -> Config:
    """The settings of all arms but for their methods, learning rates, and what an arm sets itself; for the report."""
    return replace(_ONE_EPOCH, seeds=tuple(seeds))
