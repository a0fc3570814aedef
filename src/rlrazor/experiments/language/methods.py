"""The methods of this experiment: which TRL trainer, where the outputs come from, and how they are weighted.

Adding one is a line in `METHODS`; a new loss is a function in `rlrazor.objectives` and a branch in `trainers`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from rlrazor.errors import RazorError
from rlrazor.runs.method_names import KL_SUFFIX

SFT_PREFIX = "sft-"  # and the name of one of the task's annotators
TEACHER = "grpo"  # the method whose best policy `rl-distilled` imitates

REFERENCE, OPTIMAL, FROM_TEACHER = "reference", "optimal", "teacher"
REPLAY: Final = "replay"
SELF_REPLAY: Final = "self-replay"
EWC: Final = "ewc"
LWF: Final = "lwf"
OWN: Final = "own"  # the trainer of SFT on right samples of the policy itself
STRENGTHS: Mapping[str, str] = {
    REPLAY: "replay_share",
    SELF_REPLAY: "replay_share",
    EWC: "ewc_strength",
    LWF: "lwf_strength",
}
"""A protection -> the setting that says how strong it is."""


@dataclass(frozen=True)
class Method:
    """How a policy is fine-tuned.

    `trainer`: TRL's; `own` is SFT on right samples of the policy itself, drawn once from what it starts from or, where
    they are `renewed`, in rounds. `demonstrations`, of an offline method: the task's own (`reference`), samples of the
    KL-minimal correct policy (`optimal`), of an RL-trained policy (`teacher`), or the name of an annotator of the task.
    `advantage`, of an on-policy one: A = R - mean over the group, divided by its standard deviation (`group`) or not
    (`centred`), the reward itself (`reward`), or the weights of `objectives.dpg_weights` (`dpg`). `negatives`: whether
    wrong outputs push back. `protection`: what holds it to what it could do, of old examples (`protection`).
    """

    label: str
    trainer: Literal["sft", "simpo", "sdft", "grpo", "own"]
    demonstrations: str | None = None
    advantage: Literal["group", "centred", "reward", "dpg"] | None = None
    negatives: bool = False
    protection: Literal["replay", "self-replay", "ewc", "lwf"] | None = None
    renewed: bool = False

    @property
    def on_policy(self) -> bool:
        """Whether it learns from samples of the policy being trained, be they off by a round."""
        return self.trainer in ("grpo", "sdft") or self.renewed

    @property
    def asks_alone(self) -> bool:
        """Whether it takes a task's prompts, and makes the rest of its examples itself as it trains."""
        return self.trainer in ("grpo", OWN)

    @property
    def replays(self) -> bool:
        """Whether old examples are among those that it trains on."""
        return self.protection in (REPLAY, SELF_REPLAY)

    @property
    def settings(self) -> tuple[str, ...]:
        """Those that it has beside its grid's."""
        strength = [] if self.protection is None else [STRENGTHS[self.protection]]
        return (*strength, *(["own_tries"] if self.trainer == OWN else []), *(["rounds"] if self.renewed else []))


METHODS: Mapping[str, Method] = {
    "sft": Method("SFT", "sft", REFERENCE),
    "oracle": Method("oracle SFT", "sft", OPTIMAL),
    "rl-distilled": Method("RL-distilled SFT", "sft", FROM_TEACHER),
    "self-sft": Method("self-SFT", OWN),
    "iterative-sft": Method("iterative SFT", OWN, renewed=True),
    "simpo": Method("SimPO", "simpo", REFERENCE, negatives=True),
    "sdft": Method("SDFT", "sdft", REFERENCE),
    "replay": Method("SFT + replay", "sft", REFERENCE, protection=REPLAY),
    "self-replay": Method("SFT + self-replay", "sft", REFERENCE, protection=SELF_REPLAY),
    "ewc": Method("SFT + EWC", "sft", REFERENCE, protection=EWC),
    "lwf": Method("SFT + LwF", "sft", REFERENCE, protection=LWF),
    "reinforce": Method("1-0 REINFORCE", "grpo", advantage="reward"),
    "grpo": Method("GRPO", "grpo", advantage="group", negatives=True),
    "dr-grpo": Method("Dr. GRPO", "grpo", advantage="centred", negatives=True),
    "kl-dpg": Method("KL-DPG", "grpo", advantage="dpg"),
}
SETTINGS_OF: Mapping[str, tuple[str, ...]] = {
    "SFT of any kind, simpo, sdft": (*("lrs", "schedules", "epochs", "batch_sizes"),),
    "reinforce, grpo, dr-grpo, kl-dpg": ("rl_lrs", "rl_prompts", "group_size", "iterations"),
    "methods named ...+kl": ("kl_coef",),
    "replay, self-replay": ("replay_share",),
    "ewc": ("ewc_strength",),
    "lwf": ("lwf_strength",),
    "self-sft, iterative-sft": ("own_tries",),
    "iterative-sft": ("rounds",),
}
"""Settings that only some methods use, by those methods: the offline grid, the on-policy one, the penalty, and those of
`Method.settings`."""
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
    """One of STRENGTHS, or none, whatever penalty there is besides."""
    return find_method(name.partition("+")[0])[0].protection


def idle_settings(names: Iterable[str]) -> set[str]:
    """The settings that none of these methods uses."""
    found = [find_method(name) for name in names]
    offline, on_policy, penalty, *others = SETTINGS_OF.values()
    used = {name for method, _ in found for name in method.settings}
    for group, is_used in (
        (offline, any(method.advantage is None for method, _ in found)),
        (on_policy, any(method.advantage is not None for method, _ in found)),
        (penalty, any(penalised for _, penalised in found)),
    ):
        used |= set(group) if is_used else set()
    return {name for group in (offline, on_policy, penalty, *others) for name in group} - used


def label_of(name: str) -> str:
    """The method's name for people."""
    method, penalised = find_method(name)
    return method.label + (" + KL" if penalised else "")
