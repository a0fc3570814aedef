"""A sequence of a user's own: what tasks.yaml says, and its stages, of which none is begun that the budget cannot hold.

The keys of the file are the options of `razor finetune`, each with one value; `tasks` is the list of the stages, and
`kl_budget` what they may cost together, in nats.
"""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from rlrazor.errors import RazorError
from rlrazor.experiments.language.config import KINDS
from rlrazor.system.apart.verifier import SECONDS
from rlrazor.system.documents import checked, read_text
from rlrazor.system.schema import Name, Schema

GRID = {"method": ("methods",), "lr": ("lrs", "rl_lrs"), "seed": ("seeds",), "schedule": ("schedules",)}
GRID |= {"batch_size": ("batch_sizes",)}
"""What has one value here -> the settings of a grid that it is."""
KEYS = (*GRID, "target", "epochs", "prior", *(name for name, (many, _) in KINDS.items() if not many and name != "task"))
"""The settings of the file."""
SCORED = "sampled"  # unless the user says otherwise: what a KL bounds is how often the policy's own samples are right


class OwnTask(Schema):
    """A stage's task: one of `razor tasks`, or prompts and what verifies a completion."""

    task: Name | None = None
    data: Name | None = None
    demonstrations: Name | None = None
    prompts: Name | None = None
    verifier: Name | None = None
    verifier_timeout: float = SECONDS
    stop: list[Name] = []  # noqa: RUF012
    chat: bool = True

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {"task": value} if isinstance(value, str) else value

    def options(self, folder: Path) -> dict[str, Any]:
        """The task as the options of `razor finetune` name it; its files lie where they do from the folder."""
        found = self.model_dump() | {"no_chat": not self.chat}
        for name in ("data", "demonstrations", "prompts"):
            found[name] = None if found[name] is None else folder / found[name]
        source, colon, function = (self.verifier or "").rpartition(":")
        if source.endswith(".py"):
            found["verifier"] = f"{folder / source}{colon}{function}"
        return found


class Sequence(Schema):
    """The file; of its settings the values are checked as those of the command line are."""

    tasks: Annotated[list[OwnTask], Field(min_length=1)]
    generic: Name | None = None
    kl_budget: Annotated[float, Field(ge=0, le=1e6)] | None = None
    settings: dict[str, Any] = {}  # noqa: RUF012


def read(path: Path) -> Sequence:
    """What the file says. Raises RazorError where it may not say it."""
    from rlrazor.system.yaml_text import parse_yaml

    found = parse_yaml(read_text(path), path)
    if not isinstance(found, dict):
        raise RazorError(f"{path} has no keys: it needs `tasks`, a list.")
    settings = {name: found.pop(name) for name in KEYS if name in found}
    known = ", ".join(("tasks", "kl_budget", "generic", *KEYS))
    if unknown := [name for name in found if name not in Sequence.model_fields or name == "settings"]:
        raise RazorError(f"{path}: there is no key {unknown[0]!r:.60}. Keys: {known}.")
    base = settings.get("base")
    if isinstance(base, str) and (path.parent / base).exists():
        settings["base"] = str(path.parent / base)
    return checked(Sequence, found | {"settings": settings}, path)
