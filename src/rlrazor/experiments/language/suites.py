"""What a base could do before: prior tasks with scores, and text without labels that stands for them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from rlrazor.experiments.language import tiny
from rlrazor.experiments.language.tasks import Item
from rlrazor.lm import representation
from rlrazor.lm.harness.asking import AS_THE_TASKS_SAY, Asking
from rlrazor.lm.models import LanguageModel
from rlrazor.lm.own_texts import OwnTexts
from rlrazor.lm.prior import PriorTasks
from rlrazor.lm.probes import GenericText
from rlrazor.lm.scores import PriorScores, Score, require_accuracies
from rlrazor.lm.task_names import DEFAULT_TASKS
from rlrazor.system import phases

Right = Callable[[Item], Sequence[str]]
"""All right completions of an item."""


@dataclass(frozen=True, eq=False)
class PriorSuite:
    """What a base could do before, and text that stands for it without labels.

    `scores(lm)`: a score per prior task. `generic`: what the generic probe is made of; `further`: other inputs on which
    KL is measured besides, by name. `loss_texts`: prior text whose token loss is the cheap proxy. `unrelated`: text on
    which representations are compared. `exact(lm, items, right)`: of a task whose right completions can all be listed,
    log pi of each, (items, completions). `check()` raises RazorError where the scores could not be a record's: call it
    before anything is run. `uncut`: what this is a part of, for a trial; None: it is whole.
    """

    scores: Callable[[LanguageModel], Mapping[str, Score]]
    generic: GenericText
    loss_texts: Sequence[str]
    unrelated: Sequence[str]
    exact: Callable[[LanguageModel, Sequence[Item], Right], torch.Tensor] | None = None
    check: Callable[[], None] = lambda: None
    further: Mapping[str, GenericText] = field(default_factory=dict)
    uncut: "PriorSuite | None" = None

    @property
    def probes(self) -> list[GenericText]:
        """The generic probe and the further ones."""
        return [self.generic, *self.further.values()]

    @property
    def count(self) -> float:
        """How many texts, and prompts of probes, a checkpoint is measured on; of the base's own by their length."""
        own = self.own_tokens / OwnTexts().max_new_tokens
        return len(self.loss_texts) + len(self.unrelated) + own + sum(one.count for one in self.probes if not one.own)

    @property
    def own_tokens(self) -> int:
        """Of the probes that the base writes itself, at most."""
        return sum(one.own.samples * one.own.max_new_tokens for one in self.probes if one.own)

    def without_scores(self) -> "PriorSuite":
        """The same texts, and no prior task."""
        return replace(self, scores=lambda lm: {}, check=lambda: None)

    def cut(self, texts: int, tokens: int | None = None) -> "PriorSuite":
        """With so many texts, or prompts, of each sort at most; those that the base writes of so many tokens."""
        generic = self.generic.cut(texts, tokens)
        further = {name: one.cut(texts, tokens) for name, one in self.further.items()}
        loss_texts, unrelated = self.loss_texts[:texts], self.unrelated[:texts]
        cut = replace(self, generic=generic, loss_texts=loss_texts, unrelated=unrelated, further=further)
        return replace(cut, uncut=self)


# What the report says of a suite's inputs.
LM_EVAL_INPUTS = {
    "probe": "The generic probe is sixty paragraphs on everyday topics that come with rlrazor, each token of which is "
    "measured; they were chosen for no prior task.",
    "representation": "Similarity of the last hidden layer, averaged over a paragraph’s tokens, to the base’s, 1 for "
    "no change, on the sixty paragraphs of the generic probe.",
}
TINY_INPUTS = {
    "probe": "The generic probe is prompts of the prior tasks that are not scored, without answers, each with one "
    "completion that the base sampled: what a user has who kept the old traffic but no labels. That is as near to the "
    "prior scores as a probe can be; text that is less like the prior tasks would say less.",
    "representation": "Similarity of the last hidden layer, averaged over a string’s tokens, to the base’s, 1 for no "
    "change, on random strings that belong to no task.",
}


def prior_tasks(
    tasks: Sequence[str],
    limit: int,
    data_mirror: Path | None = None,
    allow_code_execution: bool = False,
    asking: Asking = AS_THE_TASKS_SAY,
) -> PriorTasks:
    """These of lm-eval's, with so many items of each, 0 for all.

    Of the default tasks, those that run code are left out without leave; of others they are an error.
    """
    named = None if tuple(tasks) == DEFAULT_TASKS else tuple(tasks)
    return PriorTasks(named, limit or None, data_mirror, allow_code_execution, asking)


def lm_eval_suite(tasks: PriorTasks, generic: GenericText | None = None) -> PriorSuite:
    """The prior tasks of lm-eval; the unrelated text, and the generic probe by default, are the built-in paragraphs.

    Tasks whose score is not a fraction of 1 of which more is better are an error.
    """
    texts = representation.paragraphs()
    told: set[str] = set()

    def scores(lm: LanguageModel) -> PriorScores:
        found = tasks.scores(lm)
        require_accuracies(found)
        for note in set(found.notes) - told:
            told.add(note)
            phases.say(note)
        return found

    def check() -> None:
        require_accuracies(tasks.metrics())

    return PriorSuite(scores, generic or GenericText.built_in(), texts, texts, check=check)


def tiny_suite(generic: GenericText | None = None) -> PriorSuite:
    """The prior tasks of the tiny base. Its probe is completions that the base gives to prior-like prompts."""

    def scores(lm: LanguageModel) -> dict[str, Score]:
        return tiny.prior_scores(lm.model)

    def exact(lm: LanguageModel, items: Sequence[Item], right: Right) -> torch.Tensor:
        return tiny.right_logps(lm.model, lm.tokenizer, items, right)

    return PriorSuite(scores, generic or tiny.probe(), tiny.prior_texts(), tiny.unrelated_texts(), exact)
