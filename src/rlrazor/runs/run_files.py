"""What the files of one run hold: spec.json, a line of records.jsonl, seconds.json. See `store`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from rlrazor.errors import RazorError
from rlrazor.runs.records import Ancestor, Record, RunSpec
from rlrazor.system import jsonl
from rlrazor.system.documents import checked, read_text
from rlrazor.system.schema import Name, Schema, Score, Seed, Step


class StoredRun(Schema):
    """A spec, with the specs of its ancestors in it."""

    experiment: Name
    method: Name
    params: dict[Name, Any]
    seed: Seed
    starts_from: StoredAncestor | None
    teacher: StoredAncestor | None

    def spec(self) -> RunSpec:
        """The spec as it was before it was stored."""
        ancestors = (
            None if of is None else Ancestor(of.spec.spec(), of.step) for of in (self.starts_from, self.teacher)
        )
        return RunSpec(self.experiment, self.method, self.params, self.seed, *ancestors)


class StoredAncestor(Schema):
    """A checkpoint of a run."""

    spec: StoredRun
    step: Step


class StoredSpec(StoredRun):
    """What was run."""

    schema_version: int
    diverged_at: Step | None


class StoredRecord(Schema):
    """A checkpoint."""

    run_id: Name
    step: Step
    epoch: Annotated[float, Field(ge=0)]
    new: Score
    prior: dict[Name, Score]
    drift: dict[Name, float]
    metrics: dict[Name, float]


class StoredSeconds(Schema):
    """Wall time, and where it was spent, which earlier versions did not keep."""

    seconds: Annotated[float, Field(ge=0)]
    torch: Name | None = None
    machine: Name | None = None


def read_records(path: Path) -> list[Record]:
    """The records of a JSON Lines file, in the order of their steps. Raises RazorError for one that is damaged."""
    records: list[Record] = []
    for where, value in jsonl.strict(read_text(path), path):
        found = checked(StoredRecord, value, where)
        if records and found.step <= records[-1].step:
            raise RazorError(f"{where} is of step {found.step}, which does not come after the one before.")
        records.append(Record(**dict(found)))
    if not records:
        raise RazorError(f"{path} is empty.")
    return records
