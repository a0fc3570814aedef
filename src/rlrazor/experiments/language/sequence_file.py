"""The file of a user's own sequence, `razor continual tasks.yaml`, and the settings that come of it. Imports no torch.

Its keys are the options of `razor finetune`, each with one value; `tasks` is the list of the stages, and `kl_budget`
what they may cost together, in nats.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from rlrazor.bounds import BOUNDS, MOST_TOKENS
from rlrazor.errors import RazorError
from rlrazor.experiments.language.config import KINDS, PRESETS, TINY
from rlrazor.experiments.language.sequences import ModelSequences, parse_setting
from rlrazor.system import cores
from rlrazor.system.apart.verifier import SECONDS
from rlrazor.system.documents import checked, read_text
from rlrazor.system.schema import Name, Schema

GRID: Mapping[str, tuple[str, ...]] = {
    "method": ("methods",),
    "lr": ("lrs", "rl_lrs"),
    "seed": ("seeds",),
    "schedule": ("schedules",),
    "batch_size": ("batch_sizes",),
}
"""What has one value here -> the settings of a grid that it is."""
KEYS = (*GRID, "target", "epochs", "prior", *(name for name, (many, _) in KINDS.items() if not many and name != "task"))
"""The settings of the file."""
DEFAULTS: Mapping[str, Any] = {
    "method": "dr-grpo",
    "seed": 0,
    "schedule": "constant",
    "batch_size": 32,
    "target": 1.0,
    "epochs": 1,
    "warmup_steps": 0.05,
    "precision": "auto",
    "scored": "sampled",  # what a KL bounds is how often a policy's own samples are right
}
"""Where they are not those of the preset `paper` of a sweep, or of `tiny` for that base."""


class StageTask(Schema):
    """A stage's task: one of `razor tasks`, or prompts and what verifies a completion."""

    task: Name | None = None
    data: Name | None = None
    demonstrations: Name | None = None
    prompts: Name | None = None
    verifier: Name | None = None
    verifier_timeout: float = SECONDS
    stop: list[Name] = []  # noqa: RUF012
    chat: bool = True
    max_new_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"task": value}
        return value | {"stop": [value["stop"]]} if isinstance(value, dict) and _is_text(value, "stop") else value

    @property
    def name(self) -> str | None:
        """The task's, or that of its file of prompts; None where there is neither."""
        return self.task if self.task is not None or self.prompts is None else Path(self.prompts).stem

    def options(self, folder: Path) -> dict[str, Any]:
        """The task as the options of `razor finetune` name it; its files lie where they do from the folder."""
        found = self.model_dump() | {"no_chat": not self.chat, "own_max_new_tokens": self.max_new_tokens}
        for name in ("data", "demonstrations", "prompts"):
            found[name] = None if found[name] is None else folder / found[name]
        source, colon, function = (self.verifier or "").rpartition(":")
        if source.endswith(".py"):
            found["verifier"] = f"{folder / source}{colon}{function}"
        return found


def _is_text(value: Mapping[str, Any], name: str) -> bool:
    return isinstance(value.get(name), str)


class SequenceFile(Schema):
    """The file. Of its settings, values are checked as those of the command line are."""

    tasks: Annotated[list[StageTask], Field(min_length=2)]
    generic: Name | None = None
    old_examples: Name | None = None
    kl_budget: Annotated[float, Field(ge=BOUNDS["kl_budget"].low, le=BOUNDS["kl_budget"].high)] | None = None
    settings: dict[str, Any] = {}  # noqa: RUF012

    @property
    def names(self) -> list[str]:
        """The tasks'."""
        return [str(task.name) for task in self.tasks]


def read(path: Path) -> SequenceFile:
    """What the file says. Raises RazorError where it may not say it."""
    from rlrazor.system.yaml_text import parse_yaml  # a package that comes with the extra [train]

    found = parse_yaml(read_text(path), path)
    if not isinstance(found, dict):
        raise RazorError(f"{path} has no keys: it needs `tasks`, a list.")
    settings = {name: found.pop(name) for name in KEYS if name in found}
    keys = [name for name in SequenceFile.model_fields if name != "settings"]
    if unknown := [name for name in found if name not in keys]:
        raise RazorError(f"{path}: there is no key {unknown[0]!r:.60}. Keys: {', '.join((*keys, *KEYS))}.")
    base = settings.get("base")
    if isinstance(base, str) and base != TINY and (path.parent / base).exists():
        settings["base"] = str(path.parent / base)
    file = checked(SequenceFile, found | {"settings": settings}, path, by_hand=True)
    for number, task in enumerate(file.tasks):
        _check_task(path, file, number, task)
    return file


def _check_task(path: Path, file: SequenceFile, number: int, task: StageTask) -> None:
    """Raise RazorError for a task without a name, with one that no column can have, or with that of one before."""
    name = task.name
    if name is None:
        raise RazorError(f"{path}: tasks[{number}] needs `task`, one of `razor tasks`, or `prompts`, a file.")
    if not re.fullmatch(r"\w[\w .-]*", name):
        raise RazorError(f"{path}: a task's name has letters, digits, spaces, '.', '-' and '_', not {name!r:.60}.")
    if name in file.names[:number]:
        raise RazorError(f"{path}: the task {name!r:.60} is there twice: name one otherwise.")
    if task.max_new_tokens is not None and (task.prompts is None or "max_new_tokens" in file.settings):
        raise RazorError(
            f"{path}, {name}: max_new_tokens is of prompts of one's own, in a file that has none for all tasks."
        )


def config_of(tasks: Sequence[str], settings: Mapping[str, Any]) -> ModelSequences:
    """One method, one learning rate, one seed and one order. Raises RazorError for a setting that has no such value."""
    given = {**DEFAULTS, **settings}
    if "lr" not in given:
        raise RazorError("Name a learning rate: lr in the file, or --lr.")
    if "base" not in given:
        raise RazorError("Name the model to start from: base in the file, or --base.")
    threads = cores.threads_asked() or (None if given["base"] == TINY else cores.threads_alone())
    given |= {"threads": threads} if threads and "threads" not in given else {}
    preset = PRESETS[TINY if given["base"] == TINY else "paper"]
    values: dict[str, Any] = {one.name: getattr(preset, one.name) for one in fields(preset)} | {"iterations": (1,)}
    try:
        for name, value in given.items():
            for setting in GRID.get(name, (name,)):
                parsed = values[setting] = parse_setting(setting, value)
                if setting != "prior" and isinstance(parsed, tuple) and len(parsed) != 1:
                    raise RazorError(f"{name} has one value in a sequence, not {len(parsed)}.")
        return ModelSequences(**{**values, "task": "", "tasks": tuple(tasks), "orders": 1})
    except RazorError as error:  # which calls a setting what a grid calls it
        ours = {setting: name for name, settings in GRID.items() for setting in settings}
        raise RazorError(re.sub(r"^\w+", lambda first: ours.get(first[0], first[0]), str(error))) from error
