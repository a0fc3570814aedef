"""What offline methods learn from: a task's demonstrations, an annotator's, the KL-minimal policy's, a teacher's.

Prompts that cannot be used are counted, never dropped in silence.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rlrazor.errors import RazorError
from rlrazor.experiments.language.methods import FROM_TEACHER, OPTIMAL, REFERENCE, Method
from rlrazor.experiments.language.tasks import Item, Task, score
from rlrazor.lm import encoding, kl, sampling
from rlrazor.lm.forward import context_length
from rlrazor.lm.models import LanguageModel
from rlrazor.lm.prompts import encode
from rlrazor.seeding import seed_of

if TYPE_CHECKING:
    from rlrazor.experiments.language.trainers import Example

TRIES = 16  # samples of the base among which a right answer is looked for; RL's Razor's number for its annotator


@dataclass(frozen=True, eq=False)
class Prompts:
    """Items of a task with their prompts as token ids; `too_long` counts those that the context has no room for."""

    items: Sequence[Item]
    ids: Sequence[Sequence[int]]
    too_long: int

    @classmethod
    def of(cls, task: Task, items: Sequence[Item], lm: LanguageModel) -> "Prompts":
        """Encode the prompts; raises RazorError where none fits into the context with a completion."""
        form = task.form
        ids = encode(lm.tokenizer, [item.prompt for item in items], form.chat, form.chat_template_kwargs)
        limit = context_length(lm.model) or float("inf")
        fitting = [len(prompt) + task.form.max_new_tokens <= limit for prompt in ids]
        if not any(fitting):
            raise RazorError(
                f"No prompt of {task.name} fits into the {limit} tokens of {lm.source} with a completion of "
                f"{task.form.max_new_tokens}: lower --max-new-tokens, or take a model with a longer context."
            )
        kept = [index for index, fits in enumerate(fitting) if fits]
        return cls([items[index] for index in kept], [ids[index] for index in kept], len(ids) - len(kept))


@dataclass(frozen=True, eq=False)
class Source:
    """Where demonstrations are drawn: the task, its prompts, and the policies that may be asked."""

    task: Task
    prompts: Prompts
    base: LanguageModel
    teacher: Any
    seed: int

    def examples(self, method: Method) -> "tuple[list[Example], dict[str, float]]":
        """What the method trains on, and counts for the record: prompts without a demonstration, and unsolved ones.

        Methods that sample as they train get the prompts alone. Raises RazorError where the task has no demonstrations.
        """
        from rlrazor.experiments.language.trainers import Example  # TRL takes seconds to import

        items, ids = self.prompts.items, self.prompts.ids
        if method.asks_alone:
            return [Example(prompt) for prompt in ids], {}
        texts, counts = self._texts(method)
        rejected: Sequence[str | None] = [None] * len(items)
        if method.trainer == "simpo":
            rejected = [item.rejected for item in items]
            if all(text is None for text in rejected):
                rejected, _ = self._of_base(right=False)
            counts["without_rejected"] = float(sum(text is None for text in rejected))
        usable = [
            index
            for index, text in enumerate(texts)
            if text is not None and (method.trainer != "simpo" or rejected[index] is not None)
        ]
        tokenizer, stop = self.base.tokenizer, self.task.form.stop
        examples = [
            Example(
                prompt=ids[index],
                completion=encoding.completion_ids(tokenizer, texts[index] or "", stop),
                rejected=encoding.completion_ids(tokenizer, rejected[index] or "", stop),
                text=items[index].prompt,
                demonstration=texts[index] or "",
            )
            for index in usable
        ]
        if not examples:
            raise RazorError(
                f"{self.task.name} has no demonstrations that {method.label} could learn from: give them with "
                "--demonstrations FILE, in a file of tasks as `demonstrations`, or train by an on-policy method."
            )
        return examples, counts

    def _texts(self, method: Method) -> tuple[Sequence[str | None], dict[str, float]]:
        """A completion for each item, None where there is none."""
        kind, items = method.demonstrations, self.prompts.items
        if kind == OPTIMAL and self.task.correct is not None:
            return self._of_optimum(), {}
        if kind == OPTIMAL:
            texts, unsolved = self._of_base(right=True)
            return texts, {"unsolved_prompts": float(unsolved)}
        if kind == FROM_TEACHER:
            return self._sampled(self.teacher, 1, "teacher"), {}
        if kind == REFERENCE:
            texts = [item.demonstration for item in items]
            return texts, {"without_demonstration": float(sum(text is None for text in texts))}
        if kind is None or kind not in self.task.annotators:
            known = ", ".join(self.task.annotators) or "none"
            raise RazorError(
                f"{self.task.name} has no annotator {kind!r}: it has {known}. Plain SFT is the method sft."
            )
        annotate = self.task.annotators[kind]
        return [annotate(item, random.Random(seed_of(self.seed, f"{kind}/{item.prompt}"))) for item in items], {}

    def _of_optimum(self) -> list[str]:
        """A draw from q*, the base's distribution restricted to the right completions, which can all be listed."""
        assert self.task.correct is not None
        listed = [list(self.task.correct(item)) for item in self.prompts.items]
        tokenizer, stop = self.base.tokenizer, self.task.form.stop
        completions = [encoding.completion_ids(tokenizer, text, stop) for texts in listed for text in texts]
        prompt_of = [index for index, texts in enumerate(listed) for _ in texts]
        logp = kl.log_probs(self.base.model, kl.Sequences(self.prompts.ids, completions, prompt_of))
        rng, drawn, start = torch.Generator().manual_seed(seed_of(self.seed, "optimum")), [], 0
        for texts in listed:
            weights = torch.from_numpy(logp[start : start + len(texts)]).softmax(dim=0)
            drawn.append(texts[int(torch.multinomial(weights, 1, generator=rng))])
            start += len(texts)
        return drawn

    def _of_base(self, *, right: bool) -> tuple[list[str | None], int]:
        """The base's first right (or wrong) sample of each prompt, and how many prompts have none in `TRIES`.

        The first right one is a draw from q*: rejection sampling is the I-projection onto right completions.
        """
        items = [item for item in self.prompts.items for _ in range(TRIES)]
        texts = self._sampled(self.base.model, TRIES, "rejection sampling")
        scores = score(self.task, items, texts).values
        chosen: list[str | None] = []
        for start in range(0, len(items), TRIES):
            fitting = [
                at for at in range(start, start + TRIES) if scores[at] is not None and (scores[at] == 1) is right
            ]
            chosen.append(self.task.form.ended(texts[fitting[0]]) if fitting else None)
        return chosen, sum(text is None for text in chosen)

    def _sampled(self, model: Any, samples: int, purpose: str) -> list[str]:
        tokenizer, device = self.base.tokenizer, next(model.parameters()).device
        how = sampling.Sampling(
            self.task.form.max_new_tokens,
            encoding.stop_ids(tokenizer, self.base.model, self.task.form.stop),
            tokenizer.pad_token_id,
            samples,
            rng=torch.Generator(device).manual_seed(seed_of(self.seed, purpose)),
        )
        completions = sampling.sample(model, self.prompts.ids, how)
        return [self.task.form.ended(encoding.decode(tokenizer, completion)) for completion in completions]
