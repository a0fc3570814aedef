"""The methods of this experiment: which TRL trainer, where the outputs come from, and how they are weighted.

Adding one is a line in `METHODS`; a new loss is a function in `rlrazor.objectives` and a branch in `trainers`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from rlrazor.errors import RazorError

KL_SUFFIX = "+kl"
SFT_PREFIX = "sft-"  # and the name of one of the task's annotators
TEACHER = "grpo"  # the method whose best policy `rl-distilled` imitates

REFERENCE, OPTIMAL, FROM_TEACHER = "reference", "optimal", "teacher"
REPLAY: Final = "replay"
EWC: Final = "ewc"


@dataclass(frozen=True)
class Method:
    """How a policy is fine-tuned.

    `trainer`: TRL's. `demonstrations`, of an offline method: the task's own (`reference`), samples of the KL-minimal
    correct policy (`optimal`), of an RL-trained policy (`teacher`), or the name of an annotator of the task.
    `advantage`, of an on-policy one: A = R - mean over the group, divided by its standard deviation (`group`) or not
    (`centred`), the reward itself (`reward`), or the weights of `objectives.dpg_weights` (`dpg`). `negatives`: whether
    wrong outputs push back. `protection`: what holds it to what it could do, of old examples (`protection`).
    """

    label: str
    trainer: Literal["sft", "simpo", "sdft", "grpo"]
    demonstrations: str | None = None
    advantage: Literal["group", "centred", "reward", "dpg"] | None = None
    negatives: bool = False
    protection: Literal["replay", "ewc"] | None = None

    @property
    def on_policy(self) -> bool:
        """Whether it learns from samples of the policy being trained."""
        return self.trainer in ("grpo", "sdft")


METHODS: Mapping[str, Method] = {
    "sft": Method("SFT", "sft", REFERENCE),
    "oracle": Method("oracle SFT", "sft", OPTIMAL),
    "rl-distilled": Method("RL-distilled SFT", "sft", FROM_TEACHER),
    "simpo": Method("SimPO", "simpo", REFERENCE, negatives=True),
    "sdft": Method("SDFT", "sdft", REFERENCE),
    "replay": Method("SFT + replay", "sft", REFERENCE, protection=REPLAY),
    "ewc": Method("SFT + EWC", "sft", REFERENCE, protection=EWC),
    "reinforce": Method("1-0 REINFORCE", "grpo", advantage="reward"),
    "grpo": Method("GRPO", "grpo", advantage="group", negatives=True),
    "dr-grpo": Method("Dr. GRPO", "grpo", advantage="centred", negatives=True),
    "kl-dpg": Method("KL-DPG", "grpo", advantage="dpg"),
}
SETTINGS_OF: Mapping[str, tuple[str, ...]] = {
    "sft, sft-ANNOTATOR, oracle, rl-distilled, simpo, sdft, replay, ewc": (
        *("lrs", "schedules", "epochs", "batch_sizes"),
    ),
    "reinforce, grpo, dr-grpo, kl-dpg": ("rl_lrs", "rl_prompts", "group_size", "iterations"),
    "methods named ...+kl": ("kl_coef",),
    "replay": ("replay_share",),
    "ewc": ("ewc_strength",),
}
"""Settings that only some methods use, by those methods: the offline grid, the on-policy one, the penalty, and what
each protection has."""
WITHOUT_PENALTY = ("sdft",)  # TRL's self-distillation has a divergence of its own


def find_method(name: str) -> tuple[Method, bool]:
    """The method, and whether it adds a KL penalty (`NAME+kl`); `sft-ANNOTATOR` is SFT on that annotator's outputs.

    Raises RazorError for an unknown name. Whether the task has the annotator is the task's to say.
    """
    plain = name.removesuffix(KL_SUFFIX)
    suffix = name != plain
    if suffix and plain in WITHOUT_PENALTY:
        raise RazorError(f"Unknown method {name!r:.60}: {plain} takes no {KL_SUFFIX}.")
    if plain.startswith(SFT_PREFIX) and plain != SFT_PREFIX and "+" not in plain:
        annotator = plain.removeprefix(SFT_PREFIX)
        return Method(f"SFT on {annotator}", "sft", annotator), suffix
    if plain not in METHODS:
        known = ", ".join(METHODS)
        raise RazorError(
            f"Unknown method {name!r:.60}. Methods: {known}, {SFT_PREFIX}ANNOTATOR, each with or without +kl, or "
            "+kl-before in a sequence."
        )
    return METHODS[plain], suffix


def protection_of(name: str) -> str | None:
    """REPLAY, EWC or none, whatever penalty there is besides."""
    return find_method(name.partition("+")[0])[0].protection


def idle_settings(names: Iterable[str]) -> set[str]:
    """The settings that none of these methods uses."""
    found = [find_method(name) for name in names]
    protections = {method.protection for method, _ in found}
    are_used = (
        any(method.advantage is None for method, _ in found),
        any(method.advantage is not None for method, _ in found),
        any(penalised for _, penalised in found),
        REPLAY in protections,
        EWC in protections,
    )
    groups = zip(SETTINGS_OF.values(), are_used, strict=True)
    return {name for names, is_used in groups if not is_used for name in names}


def label_of(name: str) -> str:
    """The method's name for people."""
    method, penalised = find_method(name)
    return method.label + (" + KL" if penalised else "")
