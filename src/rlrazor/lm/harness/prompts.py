"""The prompts that lm-eval gives to a model, beside those of the items that are scored."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlrazor.errors import RazorError
from rlrazor.lm.harness.asking import Asking
from rlrazor.lm.harness.guest import evaluating
from rlrazor.lm.harness.questions import scored_count
from rlrazor.lm.harness.tasks import Task, set_up
from rlrazor.lm.kl import evenly
from rlrazor.lm.prompts import Prompt, is_prompt


@dataclass(frozen=True)
class TaskPrompts:
    """Prompts of `tasks`; `scored`: those whose prompts are of items that are scored, as there are no others.

    `without`: tasks that were asked for, and of which no prompt is here.
    """

    prompts: Sequence[Prompt]
    tasks: Sequence[str]
    scored: Sequence[str]
    without: Sequence[str] = ()


def prompts_of(
    tasks: Mapping[str, Task], limits: Mapping[str, int | None], count: int, examples_seed: int, asking: Asking
) -> TaskPrompts:
    """So many prompts at most, as many of each task, of items that are not scored where there are any.

    `limits`: of each of a task's parts so many items are scored, the first ones; None: all. What is read whole, as for
    a perplexity, is no prompt. Raises RazorError where there is none at all.
    """
    found: dict[str, Prompt] = {}
    asked: list[str] = []
    scored: list[str] = []
    for at, (name, task) in enumerate(tasks.items()):
        share = len(range(at, count, len(tasks)))
        leaves = list(task.leaves.values())
        shares = Counter(place * len(leaves) // share for place in range(share))
        with evaluating(name):
            set_up(task, asking, examples_seed)
            for place, wanted in shares.items():
                own, beside = _of_leaf(leaves[place], limits[name], wanted, asking)
                found |= {_key(prompt): prompt for prompt in own}
                if own and name not in asked:
                    asked.append(name)
                if own and not beside and name not in scored:
                    scored.append(name)
    if not found:
        raise RazorError(
            f"The prior tasks {', '.join(tasks)} give a model no prompts to complete: give another generic probe, "
            "--generic FILE, self or paragraphs."
        )
    return TaskPrompts(list(found.values()), asked, scored, [name for name in tasks if name not in asked])


def _key(prompt: Prompt) -> str:
    return json.dumps(prompt, sort_keys=True, default=str)


def _of_leaf(leaf: Any, limit: int | None, count: int, asking: Asking) -> tuple[list[Prompt], bool]:
    """So many prompts of one task, evenly spaced, and whether they are of items that are not scored."""
    if leaf.OUTPUT_TYPE == "loglikelihood_rolling":
        return [], True
    docs = leaf.eval_docs  # which lm-eval makes anew each time
    total, first = len(docs), scored_count(leaf, limit)
    if first < total:
        scored = set(map(_key, _prompts(leaf, docs, range(first), asking)))
        chosen = [first + place for place in evenly(total - first, min(count, total - first))]
        beside = [prompt for prompt in _prompts(leaf, docs, chosen, asking) if _key(prompt) not in scored]
        if beside:
            return beside, True
    return list(_prompts(leaf, docs, evenly(first, min(count, first)), asking)), False


def _prompts(leaf: Any, docs: Any, places: Sequence[int], asking: Asking) -> Iterator[Prompt]:
    """What the model reads before it answers, of a choice between texts that begin alike the first.

    What could be no prompt of a probe is left out: a blank one, what stands for a missing value, turns as text.
    """
    examples = leaf.get_config("num_fewshot") or 0
    for place in places:
        prompt = asking.prompt(asking.requests(leaf, docs[place], examples)[0].arguments[0])
        if is_prompt(prompt):
            yield prompt
