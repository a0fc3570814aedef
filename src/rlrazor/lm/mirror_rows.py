"""What the rows of a data mirror hold, as far as lm-eval's tasks read them: in the schema of the hub's data sets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from rlrazor.system.schema import Open

Texts = Annotated[list[str], Field(min_length=1)]


class HellaSwag(Open):
    """Four endings of a context, one of them right."""

    activity_label: str
    ctx_a: str
    ctx_b: str
    endings: Annotated[list[str], Field(min_length=2)]
    label: Any

    @model_validator(mode="after")
    def _label_is_of_an_ending(self) -> HellaSwag:
        if type(self.label) not in (int, str) or str(self.label) not in map(str, range(len(self.endings))):
            raise ValueError(f"its label is {self.label!r:.40}, and should be the number of an ending, from 0")
        return self


class Targets(Open):
    """Answers, and which of them are true."""

    choices: Texts
    labels: list[Annotated[int, Field(ge=0, le=1)]]

    @model_validator(mode="after")
    def _are_as_many(self) -> Targets:
        if len(self.choices) != len(self.labels) or 1 not in self.labels:
            raise ValueError("choices and labels should be as many, and one label at least be 1")
        return self


class TruthfulQA(Open):
    """A question with true and false answers."""

    question: str
    mc1_targets: Targets
    mc2_targets: Targets


class MMLU(Open):
    """A question with four answers, one of them right."""

    question: str
    subject: str
    choices: Annotated[list[str], Field(min_length=4, max_length=4)]
    answer: Annotated[int, Field(ge=0, le=3)]


class IFEval(Open):
    """A prompt, and the instructions in it, each with its arguments."""

    key: int
    prompt: str
    instruction_id_list: Texts
    kwargs: list[dict[str, Any]]

    @model_validator(mode="after")
    def _are_as_many(self) -> IFEval:
        if len(self.instruction_id_list) != len(self.kwargs):
            raise ValueError("instruction_id_list and kwargs should be as many")
        return self


class WinoGrande(Open):
    """A sentence with a gap, and two words for it."""

    sentence: str
    option1: str
    option2: str
    answer: Literal["1", "2"]

    @field_validator("sentence")
    @classmethod
    def _has_a_gap(cls, value: str) -> str:
        if "_" not in value:
            raise ValueError("it has no gap, which is written _")
        return value


class HumanEval(Open):
    """The beginning of a program, and its tests."""

    task_id: str
    prompt: str
    entry_point: str
    test: str


MIRROR_ROWS: Mapping[str, type[Open]] = {
    "hellaswag": HellaSwag,
    "truthfulqa_mc": TruthfulQA,
    "mmlu": MMLU,
    "ifeval": IFEval,
    "winogrande": WinoGrande,
    "humaneval": HumanEval,
}
"""By how the name of the file begins."""
