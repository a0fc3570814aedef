"""Old examples that need no file: what a policy writes from nothing, or answers to prompts, before it is trained.

From nothing where it can begin a text (`lm.own_texts`), and from an empty turn of a chat. The tiny base cannot, and
answers prompts of its pre-training text; another that cannot answers the prompts of the generic probe. In a sequence
the stage before also answers the prompts of the stages before it. No answer is checked: what is rehearsed is what the
policy does. (Pseudo-rehearsal: Robins 1995, "Catastrophic forgetting, rehearsal and pseudorehearsal".)

Texts are drawn with other numbers than those of the generic probe, and the tiny base's prompts are not of it: else what
is trained on would be what is measured on.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from rlrazor.errors import RazorError
from rlrazor.experiments.continual.measures import earlier_of
from rlrazor.experiments.language import tiny
from rlrazor.experiments.language.config import TINY
from rlrazor.experiments.language.lesson import Lesson
from rlrazor.experiments.language.setup import Setup
from rlrazor.experiments.language.tasks import letters
from rlrazor.experiments.language.world import World
from rlrazor.lm import compute, encoding, own_texts, probes
from rlrazor.lm.forward import context_length
from rlrazor.lm.models import LanguageModel
from rlrazor.lm.own_texts import OwnTexts
from rlrazor.lm.probes import ProbeSettings
from rlrazor.lm.prompts import encode
from rlrazor.lm.sampling import unheard
from rlrazor.runs.records import RunSpec
from rlrazor.seeding import seed_of
from rlrazor.system import phases

if TYPE_CHECKING:
    from rlrazor.experiments.language.trainers import Example

TEXT_TOKENS = 128  # of a text or an answer at most, as the generic probe of the base's own texts has them
WRITING = "writing old examples"
TINY_TOKENS = 10  # of an answer of the tiny base: seven letters and the end, and what is wrong


_written: "WeakKeyDictionary[World, dict[tuple[Any, ...], list[Example]]]" = WeakKeyDictionary()
"""By the base that runs start from: those of a sweep have the same examples."""


@dataclass(frozen=True)
class Cues:
    """Prompts, one at least, that the policy answers, as token ids; `form` says how."""

    ids: Sequence[Sequence[int]]
    form: ProbeSettings


def written(
    setup: Setup, world: World, spec: RunSpec, start: LanguageModel, count: int
) -> "tuple[list[Example], dict[str, float]]":
    """So many examples by the policy that a run starts from, as evenly as can be of all sources; and how many.

    Raises RazorError for a base that can neither begin a text nor has prompts to answer.
    """
    memory = _written.setdefault(world, {}) if start is world.base else {}
    key = (spec.seed, count, tuple(earlier_of(spec)))
    if key not in memory:
        phases.at(WRITING)
        memory[key] = _write(setup, world, spec, start, count)
    return memory[key], {"old_examples": float(len(memory[key]))}


def _write(setup: Setup, world: World, spec: RunSpec, start: LanguageModel, count: int) -> "list[Example]":
    known = _beginnings(setup, world, start)
    stages = [
        Cues(prompts.ids, ProbeSettings(task.form.max_new_tokens, 1, task.form.stop))
        for name in earlier_of(spec)
        for task, prompts in Lesson.of(world, [name], spec).parts
    ]
    sources: list[Cues | None] = [*known, *stages]
    found: list[list[Example]] = []
    for place, source in enumerate(sources):
        share, seed = len(range(place, count, len(sources))), seed_of(spec.seed, f"old examples/{place}")
        if share:
            text = OwnTexts(share, tokens_of(setup), seed % 2**32)
            found.append(_answered(source, start, share, seed) if source else _begun(start, text, seed))
    turns = zip_longest(*found)
    return [one for turn in turns for one in turn if one is not None]


def tokens_of(setup: Setup) -> int:
    """Of a text, or of an answer to a prompt of the generic probe, at most; fewer for a trial."""
    return min(TEXT_TOKENS, setup.prior.tokens or TEXT_TOKENS)


def _beginnings(setup: Setup, world: World, start: LanguageModel) -> list[Cues | None]:
    """What stands for all that came before the tasks; None for texts from nothing."""
    if setup.base == TINY:
        form = ProbeSettings(TINY_TOKENS, 1, (letters.EOS,), chat=False)
        return [
            Cues(encode(start.tokenizer, [prompt for prompt, _ in found], chat=False), form)
            for found in tiny.old_examples().values()
        ]
    try:
        own_texts.beginnings(start.model, start.tokenizer, chat=True)
    except RazorError as error:
        if not world.suite.generic.prompts:
            raise RazorError(
                "The base cannot write a text from nothing, as its tokenizer has neither bos nor eos, and there are no "
                "prompts that it could answer: give some as the generic probe (--generic FILE), or take the method "
                "replay with --old-examples FILE."
            ) from error
        own = world.tasks[setup.task.name].form
        form = ProbeSettings(tokens_of(setup), 1, chat=own.chat, chat_template_kwargs=own.chat_template_kwargs)
        form = replace(form, chat=world.suite.generic.completed(form).chat)
        ids = encode(start.tokenizer, world.suite.generic.prompts, form.chat, form.chat_template_kwargs)
        limit = context_length(start.model) or float("inf")
        fitting = [prompt for prompt in ids if len(prompt) + TEXT_TOKENS <= limit]
        if not fitting:
            raise RazorError(
                f"No prompt of the generic probe fits into the {limit} tokens of the base's context with an answer of "
                f"{TEXT_TOKENS}, so it can write nothing to rehearse: give shorter ones (--generic FILE)."
            ) from error
        return [Cues(fitting, form)]
    return [None]


def _begun(start: LanguageModel, how: OwnTexts, seed: int) -> "list[Example]":
    """So many texts from nothing, and from an empty turn where there is a chat template."""
    from rlrazor.experiments.language.trainers import Example  # TRL takes seconds to import

    begun = own_texts.beginnings(start.model, start.tokenizer, chat=True)
    ends = encoding.stop_ids(start.tokenizer, start.model)
    texts = own_texts.draw(start.model, begun, how, ends, compute.precision_of(start.model), unheard)
    sequences = own_texts.begun_with(begun, texts, how)
    written = [
        Example(sequences.prompts[prompt], completion)
        for prompt, completion in zip(sequences.prompt_of, sequences.completions, strict=True)
    ]
    random.Random(seed).shuffle(written)  # they are drawn beginning by beginning
    return written


def _answered(source: Cues, start: LanguageModel, count: int, seed: int) -> "list[Example]":
    """So many of the prompts, none twice before all once, each with an answer of its own."""
    from rlrazor.experiments.language.trainers import Example

    rng, asked = random.Random(seed), list[Sequence[int]]()
    while len(asked) < count:
        asked += rng.sample(source.ids, min(len(source.ids), count - len(asked)))
    answers = probes.complete(start.model, start.tokenizer, asked, source.form, f"old examples/{seed}")
    return [Example(prompt, answer) for prompt, answer in zip(asked, answers, strict=True)]
