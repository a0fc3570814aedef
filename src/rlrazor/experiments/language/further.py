"""Further inputs on which KL to the base is measured, beside the new task's and the generic probe: `Config.probes`.

A run measures several, so that they can be compared as predictors of what is forgotten.
"""

from collections.abc import Callable, Sequence

from rlrazor.experiments.language import tiny
from rlrazor.experiments.language.config import TINY, UNLIKE
from rlrazor.lm.prior import PriorTasks
from rlrazor.lm.prior_prompts import PROMPTS, TOKENS
from rlrazor.lm.probes import GenericText
from rlrazor.lm.representation import unlike
from rlrazor.lm.task_names import PARAGRAPHS, PRIOR, SELF

ABOUT = {
    PARAGRAPHS: "sixty built-in paragraphs on everyday topics",
    SELF: "texts that the base wrote from nothing, by sampling",
    PRIOR: f"{PROMPTS} prompts of the prior tasks at most, of items that are not scored where there are any, with up "
    f"to {TOKENS} tokens that the base sampled after each",
    UNLIKE: "forty short texts that come with rlrazor, unlike prose and exam questions: code, tables, other languages",
}
ABOUT_TINY = {
    SELF: ABOUT[SELF],
    PRIOR: "prompts of the prior tasks that are not scored, completed by the base",
    UNLIKE: "random strings that belong to no task",
}


def described(base: str, names: Sequence[str]) -> str:
    """What the report says of these probes."""
    about = ABOUT_TINY if base == TINY else ABOUT
    return "; ".join(f"KL on {name!r} is on {about[name]}" for name in names) + "." if names else ""


def of_tiny(names: Sequence[str]) -> dict[str, GenericText]:
    """The further probes of the tiny base."""
    made: dict[str, Callable[[], GenericText]] = {
        SELF: GenericText.of_base,
        PRIOR: tiny.probe,
        UNLIKE: lambda: GenericText(tuple(tiny.unrelated_texts())),
    }
    return {name: made[name]() for name in names}


def of_models(names: Sequence[str], tasks: PriorTasks) -> dict[str, GenericText]:
    """Those of any other base. Raises RazorError where the prior tasks' data cannot be had, or hold no prompts."""
    made: dict[str, Callable[[], GenericText]] = {
        PARAGRAPHS: GenericText.built_in,
        SELF: GenericText.of_base,
        PRIOR: lambda: GenericText.of_prior(tasks),
        UNLIKE: lambda: GenericText(tuple(unlike())),
    }
    return {name: made[name]() for name in names}
