"""What a new task is: prompts, a verifier, and where its demonstrations come from."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rlrazor.errors import RazorError
from rlrazor.lm.encoding import check_stop
from rlrazor.system.apart import Answer, Call
from rlrazor.system.apart.child import judged, said
from rlrazor.system.apart.verifier import Verifier

Verify = Callable[..., float]  # verify(prompt, completion, **columns) -> fraction of 1
Annotator = Callable[["Item", random.Random], str]  # a completion for the item, which need not be always the same


@dataclass(frozen=True)
class Item:
    """One prompt, and what its verifier needs to know (`columns`).

    `demonstration` is a right completion, `rejected` a wrong one, both without the stop string; None where the task has
    none.
    """

    prompt: str
    columns: Mapping[str, Any] = field(default_factory=dict)
    demonstration: str | None = None
    rejected: str | None = None


@dataclass(frozen=True)
class Splits:
    """The prompts to train on, and those to measure on: no prompt is in both."""

    train: Sequence[Item]
    test: Sequence[Item]


@dataclass(frozen=True)
class Form:
    """How a prompt is put, and what ends a completion: the first of the `stop` strings, or so many tokens.

    `chat` wraps the prompt in the tokenizer's chat template where it has one, which is told `chat_template_kwargs`.
    """

    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    chat: bool = True
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        check_stop(self.stop)

    def ended(self, completion: str) -> str:
        """A completion up to where it ends."""
        for stop in self.stop:
            completion = completion.partition(stop)[0]
        return completion


@dataclass(frozen=True)
class Task:
    """A new task. `load(path)` reads local files where a path is given, and the task's own source where it is None.

    `verify` sees a completion up to its end, without the stop string. `annotators` are named sources of right
    completions beside `Item.demonstration`; `correct` lists every right completion of an item where they can be
    enumerated. `summary` is for `razor tasks`.
    """

    name: str
    title: str
    summary: str
    load: Callable[[Path | None], Splits]
    verify: Verify
    form: Form = Form()
    annotators: Mapping[str, Annotator] = field(default_factory=dict)
    correct: Callable[[Item], Sequence[str]] | None = None

    def limited(self, max_new_tokens: int, told: Mapping[str, Any] | None = None) -> Task:
        """With completions of so many tokens at most, 0 for as it is, and what the chat template is told."""
        tokens = max_new_tokens or self.form.max_new_tokens
        form = replace(self.form, max_new_tokens=tokens, chat_template_kwargs=told or self.form.chat_template_kwargs)
        return replace(self, form=form)


@dataclass(frozen=True)
class Scores:
    """One score per completion, a fraction of 1; None where the verifier failed, with the reason in `failures`.

    `failures` maps the position of each skipped completion to one sentence.
    """

    values: list[float | None]
    failures: dict[int, str]

    def describe_failures(self) -> str:
        """How many completions were skipped, and why one of them was."""
        return (
            f"The verifier failed on {len(self.failures)} of {len(self.values)} completions, which are left out and "
            f"counted; on one it {next(iter(self.failures.values()))}."
        )


def score(task: Task, items: Sequence[Item], completions: Sequence[str]) -> Scores:
    """Verify one completion per item; both have length n.

    A verifier that raises, or returns anything but a number from 0 to 1, skips that one completion; so does a user's
    own, which runs apart, where it ends its process or takes too long. Raises RazorError where it does so on every one
    of them: then the verifier, not an item, is at fault.
    """
    calls: list[Call] = []
    for item, completion in zip(items, completions, strict=True):
        calls.append(((item.prompt, task.form.ended(completion)), item.columns))
    if isinstance(task.verify, Verifier):
        answers = task.verify.all(calls)
    else:
        answers = [_answer(task.verify, call) for call in calls]
    values: list[float | None] = [answer.value for answer in answers]
    failures = {at: answer.failure for at, answer in enumerate(answers) if answer.failure is not None}
    if values and len(failures) == len(values):
        raise RazorError(
            f"The verifier of {task.name} failed on all {len(values)} completions; on the first it {failures[0]}. "
            "Mend the verifier, or the columns of its items."
        )
    return Scores(values, failures)


def _answer(verify: Verify, call: Call) -> Answer:
    arguments, columns = call
    try:
        kind, found = judged(verify(*arguments, **columns))
    except Exception as error:
        return Answer(failure=f"raised {said(error)}")
    return Answer(found) if kind == "value" else Answer(failure=found)
