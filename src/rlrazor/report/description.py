"""What the JSON files of an output folder hold, as far as a report reads them: they may hold more."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from rlrazor.bounds import MOST_VALUES
from rlrazor.system.schema import Name, Open, Schema, Score, Seed, Step, Text

Names = Annotated[list[Name], Field(max_length=10_000)]


class Described(Open):
    """What a sweep's config.json and a study's JSON have in common."""

    preset: Text
    command: Text
    labels: dict[Name, Name]
    config: dict[Name, Any]
    data: Any
    versions: dict[Name, Name]
    machine: Name
    core_seconds: Annotated[float, Field(ge=0)]
    diverged: Names
    thresholds: Any = None
    families: Any = None
    quadrants: dict[Name, Annotated[list[bool], Field(min_length=2, max_length=2)]] | None = None
    kl_unit: Name = ""
    probe: Text = ""
    representation: Text = ""
    accuracy_margin: Score = 0.0

    @field_validator("data")
    @classmethod
    def _is_of_data(cls, value: Any) -> Any:
        of_tasks = value.values() if isinstance(value, dict) else [value]
        if not all(isinstance(one, str) for one in of_tasks):
            raise ValueError("there should be a fingerprint, or an object with one for each task")
        return value

    @field_validator("thresholds")
    @classmethod
    def _are_accuracies(cls, value: Any) -> Any:
        numbers = isinstance(value, list) and 0 < len(value) <= MOST_VALUES
        if not numbers or not all(type(at) in (int, float) and 0 < at <= 1 for at in value):
            raise ValueError("there are thresholds that are not accuracies, fractions of 1")
        return value

    @field_validator("families")
    @classmethod
    def _are_two(cls, value: Any) -> Any:
        two = isinstance(value, dict) and set(value) == {"RL", "SFT"}
        if not two or not all(
            isinstance(own, list) and all(isinstance(one, str) for one in own) for own in value.values()
        ):
            raise ValueError("there are families other than RL and SFT, each with a list of its methods")
        return value

    @field_validator("quadrants")
    @classmethod
    def _has_all_four(cls, value: dict[str, list[bool]] | None) -> dict[str, list[bool]] | None:
        if value is None or len({tuple(kind) for kind in value.values()}) < 4:
            raise ValueError(
                "one of the four is left without a method: on-policy or offline, each with and without negatives"
            )
        return value


class SweepDescription(Described):
    """config.json."""

    title: Name
    new_task: Name
    prior_task: Name
    drift: Names
    experiment: Name = ""
    prior_tasks: Names = []  # noqa: RUF012
    sections: Names | None = None  # of its report; all that apply where it names none
    kl_budget: Annotated[float, Field(ge=0)] | None = None

    @field_validator("drift")
    @classmethod
    def _has_forward_kl(cls, value: list[str]) -> list[str]:
        if "kl_forward" not in value:
            raise ValueError("it lacks kl_forward, which every law is of")
        return value


class Teaching(Open):
    """A teacher, of one accuracy and seed, and the method that imitates it."""

    seed: Seed
    method: Name
    run_id: Name
    step: Step
    student: Name


class Teachings(Schema):
    """teachers.json, which is a list."""

    teachers: list[Teaching]


class StudyTeaching(Teaching):
    """The same in a study, where there may be several accuracies."""

    level: Annotated[float, Field(gt=0, le=2)]  # of which no policy attains one above 1


class StudyDescription(Described):
    """studies/NAME.json."""

    name: Name
    seeds: list[Seed]
    teachers: list[StudyTeaching] = []  # noqa: RUF012


class TheoryDescription(Open):
    """studies/theory.json: all of its numbers, and no table beside it."""

    name: Name
    seeds: Annotated[list[Seed], Field(min_length=1)]
    tables: dict[Name, list[dict[Name, float | bool | Text | None]]] = {}  # noqa: RUF012

    @model_validator(mode="after")
    def _rows_are_alike(self) -> TheoryDescription:
        for name, rows in self.tables.items():
            if any(set(row) != set(rows[0]) for row in rows):
                raise ValueError(f"the rows of tables.{name} have different columns")
        return self
