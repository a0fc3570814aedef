"""What the files of one run hold: spec.json, a line of records.jsonl, seconds.json. See `store`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from rlrazor.system.schema import Name, Schema, Score, Seed, Step


class StoredSpec(Schema):
    """What was run."""

    schema_version: int
    experiment: Name
    method: Name
    params: dict[Name, Any]
    seed: Seed
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
    """Wall time."""

    seconds: Annotated[float, Field(ge=0)]
