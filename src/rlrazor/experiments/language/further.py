"""Further inputs on which KL to the base is measured, beside the new task's and the generic probe: `Config.probes`.

A run measures several, so that they can be compared as predictors of what is forgotten.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rlrazor.experiments.language import tiny
from rlrazor.experiments.language.config import ASKED, PARAGRAPHS, TINY, UNLIKE
from rlrazor.lm.prior import PriorTasks
from rlrazor.lm.probes import GenericText, ProbeSettings
from rlrazor.lm.representation import unlike
from rlrazor.lm.task_names import SELF

PROMPTS, TOKENS = 64, 32  # of the prior tasks, and of what the base says to each


@dataclass(frozen=True)
class Further:
    """Inputs of a probe; `settings`: how the base completes prompts, None: as the new task's.

    `note`: a sentence for who reads KL on it.
    """

    generic: GenericText
    settings: ProbeSettings | None = None
    note: str = ""


ABOUT = {
    PARAGRAPHS: "sixty built-in paragraphs on everyday topics",
    SELF: "texts that the base wrote from nothing, by sampling",
    ASKED: f"{PROMPTS} prompts of the prior tasks at most, of items that are not scored where there are any, with up "
    f"to {TOKENS} tokens that the base sampled after each",
    UNLIKE: "forty short texts that come with rlrazor, unlike prose and exam questions: code, tables, other languages",
}
ABOUT_TINY = {
    SELF: ABOUT[SELF],
    ASKED: "prompts of the prior tasks that are not scored, completed by the base",
    UNLIKE: "random strings that belong to no task",
}


def described(base: str, names: Sequence[str]) -> str:
    """What the report says of these probes."""
    about = ABOUT_TINY if base == TINY else ABOUT
    return "; ".join(f"KL on {name!r} is on {about[name]}" for name in names) + "." if names else ""


def of_tiny(names: Sequence[str]) -> dict[str, Further]:
    """The further probes of the tiny base."""
    made: dict[str, Callable[[], GenericText]] = {
        SELF: GenericText.of_base,
        ASKED: lambda: GenericText(prompts=tuple(tiny.probe_prompts())),
        UNLIKE: lambda: GenericText(tuple(tiny.unrelated_texts())),
    }
    return {name: Further(made[name]()) for name in names}


def of_models(names: Sequence[str], tasks: PriorTasks) -> dict[str, Further]:
    """Those of any other base. Raises RazorError where the prior tasks' data cannot be had, or hold no prompts."""
    made: dict[str, Callable[[], Further]] = {
        PARAGRAPHS: lambda: Further(GenericText.built_in()),
        SELF: lambda: Further(GenericText.of_base()),
        ASKED: lambda: _of_prior(tasks),
        UNLIKE: lambda: Further(GenericText(tuple(unlike()))),
    }
    return {name: made[name]() for name in names}


def _of_prior(tasks: PriorTasks) -> Further:
    found = tasks.prompts(PROMPTS)
    note = ""
    if found.scored:
        note = (
            f"The probe {ASKED!r} has prompts of items that are scored of {', '.join(found.scored)}, where no others "
            "are left: with --prior-limit there are."
        )
    # Plain text, as lm-eval gives it to the model.
    settings = ProbeSettings(TOKENS, chat=False)
    return Further(GenericText(prompts=tuple(found.prompts)), settings, note)
