"""Prior prompts with their right answers that are not scored: what a model is shown to see what it has not lost.

They are in the very form in which the items are scored: the context that lm-eval makes of a row, and the right choice,
or the answer that is to be generated. Which rows, by the first of these that a task has: its training split, a split
that is neither trained nor evaluated on, the rows of the evaluated one beyond those that are scored. A row that asks
what a scored one asks is left out, and so is one that its own few-shot examples give away.

A task has right answers to show where it is scored by whether it gets them: choices, exact match, the likelihood of one
continuation. IFEval has none, nor has a program's test.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

from rlrazor.lm.harness.answers import EXACT, targets_of
from rlrazor.lm.harness.asking import AS_THE_TASKS_SAY, Asking
from rlrazor.lm.harness.questions import right_places, scored_count
from rlrazor.lm.harness.tasks import Task
from rlrazor.lm.prompts import Prompt, texts_of

T = TypeVar("T")
_TRIES = 4  # rows that are looked at for each that is wanted, as some ask what a scored one asks


@dataclass(frozen=True)
class Demonstration:
    """A prompt as a task is scored on, and its right answer. `ends`: the answer is a whole text, so its end is too."""

    task: str
    context: Prompt
    answer: str
    ends: bool


def spread(
    tasks: Mapping[str, Task], scored: Mapping[str, int | None], count: int, seed: int, asking: Asking
) -> dict[str, list[Demonstration]]:
    """So many in all, of the tasks in turn, and of a group's tasks in turn; fewer where there are not as many.

    `scored`: of each of a task's parts so many rows are scored, the first ones; None: all. The same for a seed. The
    tasks have to be set up as they are scored (`PriorTasks.demonstrations`).
    """
    found: dict[str, list[Demonstration]] = {name: [] for name in tasks}
    left = {name: _of_task(task, scored[name], count, seed, asking) for name, task in tasks.items()}
    for name, one in islice(_in_turn(left), count):
        found[name].append(one)
    return found


def _in_turn(left: Mapping[str, Iterator[T]]) -> Iterator[tuple[str, T]]:
    """One of each, then the next of each, as long as there are any."""
    going = dict(left)
    while going:
        for name in list(going):
            for one in islice(going[name], 1):
                yield name, one
                break
            else:
                del going[name]


def _of_task(task: Task, scored: int | None, count: int, seed: int, asking: Asking) -> Iterator[Demonstration]:
    """Of its leaves in turn, in an order by the seed."""
    names = sorted(task.leaves)
    random.Random(f"{seed} {task.name}").shuffle(names)
    share = -(-count // max(len(names), 1))
    leaves = {
        name: _of_leaf(name, task.leaves[name], scored, share, random.Random(f"{seed} {name}"), asking)
        for name in names
    }
    return (one for _, one in _in_turn(leaves))


def shows_answers(leaf: Any) -> bool:
    """Whether there are right answers to show."""
    metrics = set(leaf.higher_is_better())
    if leaf.OUTPUT_TYPE == "generate_until":
        return EXACT in metrics
    return leaf.OUTPUT_TYPE == "multiple_choice" or (leaf.OUTPUT_TYPE == "loglikelihood" and "acc" in metrics)


def _of_leaf(
    name: str, leaf: Any, scored: int | None, count: int, rng: random.Random, asking: Asking
) -> Iterator[Demonstration]:
    if not shows_answers(leaf):
        return
    known: set[str] | None = None
    for row in _rows(leaf, scored, count * _TRIES, rng):
        if known is None:  # made only where there is a row to hold against it
            known = {_asks(leaf, leaf.eval_docs[at]) for at in range(scored_count(leaf, scored))}
        asked = _asks(leaf, row)
        if asked in known:
            continue
        known.add(asked)
        found = _demonstration(name, leaf, row, asking)
        if found is not None and not _gives_away(leaf, row, found.context):
            yield found


def _rows(leaf: Any, scored: int | None, most: int, rng: random.Random) -> Iterator[Any]:
    """Rows that are not scored, in random order."""
    config = leaf.config
    evaluated = config.test_split or config.validation_split
    others = [config.training_split, config.validation_split if config.test_split else None, config.fewshot_split]
    for split in dict.fromkeys(name for name in others if name and name != evaluated):
        with suppress(KeyError):  # a mirror has not every split
            rows = leaf.dataset[split]
            if len(rows):
                chosen = rows.select(rng.sample(range(len(rows)), min(most, len(rows))))
                yield from chosen if config.process_docs is None else config.process_docs(chosen)
                return
    beyond = range(scored_count(leaf, scored), len(leaf.eval_docs))
    yield from (leaf.eval_docs[at] for at in rng.sample(beyond, min(most, len(beyond))))


def _asks(leaf: Any, row: Any) -> str:
    """What a row asks, without examples."""
    return "\0".join(str(one.arguments[0]) for one in AS_THE_TASKS_SAY.requests(leaf, row, 0))


def _gives_away(leaf: Any, row: Any, context: Prompt) -> bool:
    """Whether the examples before the question have it with its answer, the row being one of them."""
    asked = leaf.doc_to_text(row)
    examples = bool(leaf.get_config("num_fewshot"))
    return examples and isinstance(asked, str) and "\n".join(texts_of(context)).count(asked.strip()) > 1


def _demonstration(name: str, leaf: Any, row: Any, asking: Asking) -> Demonstration | None:
    requests = asking.requests(leaf, row, leaf.get_config("num_fewshot") or 0)
    if leaf.OUTPUT_TYPE == "generate_until":
        context = requests[0].arguments[0]
        begun = isinstance(context, str) or context[-1]["role"] == "assistant"
        answer = f"{leaf.config.target_delimiter if begun else ''}{targets_of(leaf, row)[0]}"
        return Demonstration(name, asking.prompt(context), answer, ends=True)
    if leaf.OUTPUT_TYPE == "loglikelihood":
        context, answer = requests[0].arguments
        return Demonstration(name, asking.prompt(context), str(answer), ends=False)
    texts: Sequence[str] = [str(one) for one in leaf.doc_to_choice(row)]
    places = right_places(leaf, row, leaf.doc_to_target(row), texts)
    if not places:
        return None
    context, answer = requests[places[0]].arguments
    return Demonstration(name, asking.prompt(context), str(answer), ends=False)
