"""How far a base's prior scores are from themselves: a file beside the records, where that was measured."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from rlrazor.system.documents import read_json
from rlrazor.system.schema import Digest, Name, Schema
from rlrazor.system.writing import write_text

FILE = "noise_floor.json"

Apart = Annotated[float, Field(ge=0, le=1)]


class Floor(Schema):
    """The largest differences of each task's score and of their mean, fractions of 1, over the ways in `how`.

    `of`: a digest of the base and of what was scored.
    """

    of: Digest
    how: list[Name]
    tasks: dict[Name, Apart]
    mean: Apart

    def of_part(self, tasks: Sequence[str]) -> float | None:
        """That of one task, or of the mean of all; None of others, as of a part of them nothing is known."""
        if len(tasks) == 1:
            return self.tasks.get(tasks[0])
        return self.mean if set(tasks) == set(self.tasks) else None


def write(folder: Path, floor: Floor) -> None:
    """Keep it in a run folder."""
    write_text(folder / FILE, json.dumps(floor.model_dump(), indent=1) + "\n", "json")


def read(folder: Path) -> Floor | None:
    """That of a run folder; None where none was measured. Raises RazorError where the file is damaged."""
    path = folder / FILE
    return read_json(path, Floor) if path.exists() else None
