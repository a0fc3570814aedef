"""New tasks for language models: one small module each, and the registry that `razor tasks` prints.

Adding one: a module with a `load`, a `verify` and a `Task`, and its name here; in `FROM_HUB` too where `load` asks the
hub. See also `OwnTask`.
"""

from collections.abc import Mapping

from rlrazor.errors import RazorError
from rlrazor.experiments.language.tasks.letter_word import LETTER_WORD
from rlrazor.experiments.language.tasks.letters import (
    FORM_TASKS,
    LETTERS_APPEARANCE,
    LETTERS_DESCENDING,
    LETTERS_TASK,
)
from rlrazor.experiments.language.tasks.math import GSM8K, MATH, MATH500
from rlrazor.experiments.language.tasks.multiple import MULTIPLE
from rlrazor.experiments.language.tasks.own import OwnTask
from rlrazor.experiments.language.tasks.rows import with_demonstrations
from rlrazor.experiments.language.tasks.science import SCIENCE
from rlrazor.experiments.language.tasks.task import Form, Item, Scores, Splits, Task, score
from rlrazor.experiments.language.tasks.tools import TOOLS

__all__ = [
    "FROM_HUB",
    "LETTERS_TASK",
    "TASKS",
    "Form",
    "Item",
    "OwnTask",
    "Scores",
    "Splits",
    "Task",
    "find_task",
    "score",
    "with_demonstrations",
]

TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        *(MATH, GSM8K, MATH500, SCIENCE, TOOLS, LETTER_WORD, MULTIPLE),
        *(LETTERS_TASK, LETTERS_DESCENDING, LETTERS_APPEARANCE, *FORM_TASKS),
    )
}
FROM_HUB = frozenset(task.name for task in (MATH, GSM8K, MATH500, SCIENCE))
"""The tasks whose own source is a data set on the hub."""


def find_task(name: str) -> Task:
    """The task of that name. Raises RazorError with the names there are."""
    if name not in TASKS:
        raise RazorError(f"There is no task {name!r}. Tasks: {', '.join(TASKS)}; your own: --prompts and --verifier.")
    return TASKS[name]
