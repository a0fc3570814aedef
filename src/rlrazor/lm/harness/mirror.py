"""A data mirror: a folder of JSON Lines files in the schemas of the hub's data sets, as far as lm-eval reads them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from rlrazor.errors import RazorError
from rlrazor.system import jsonl
from rlrazor.system.documents import checked, read_text, unreadable
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


@dataclass(frozen=True)
class Mirror:
    """How a hub data set is mirrored: the file `{stem}_{split}.jsonl` with a `row` in every line.

    `split` is the one that is evaluated. `examples` is the one that few-shot examples come from, needed by few-shot
    variants of a task only.
    """

    stem: str
    split: str
    row: type[Open]
    examples: str | None = None


MIRRORED = {
    "Rowan/hellaswag": Mirror("hellaswag", "validation", HellaSwag, "train"),
    "truthfulqa/truthful_qa": Mirror("truthfulqa_mc", "validation", TruthfulQA),
    "cais/mmlu": Mirror("mmlu", "test", MMLU, "dev"),
    "google/IFEval": Mirror("ifeval", "train", IFEval),
    "allenai/winogrande": Mirror("winogrande", "validation", WinoGrande, "train"),
    "openai/openai_humaneval": Mirror("humaneval", "test", HumanEval),
}


def read_mirror(folder: Path, dataset: str, subset: str | None) -> dict[str, Any]:
    """Split -> Dataset. The few-shot split is empty where the mirror has no file of it."""
    from datasets import Dataset

    if dataset not in MIRRORED:
        raise RazorError(
            f"The data set {dataset} cannot be mirrored. Tasks on {', '.join(MIRRORED)} can; evaluate others without a "
            "mirror."
        )
    mirror = MIRRORED[dataset]
    rows = {mirror.split: read_rows(folder / f"{mirror.stem}_{mirror.split}.jsonl", mirror.row)}
    if mirror.examples:
        examples = folder / f"{mirror.stem}_{mirror.examples}.jsonl"
        rows[mirror.examples] = read_rows(examples, mirror.row) if examples.exists() else ()
    if dataset == "cais/mmlu":  # one file for all subjects, which on the hub are subsets
        rows = {split: tuple(row for row in of_split if row["subject"] == subset) for split, of_split in rows.items()}
        if not rows[mirror.split]:
            raise RazorError(f"{folder / 'mmlu_test.jsonl'} has no row of the subject {subset}.")
    template = Dataset.from_list(list(rows[mirror.split]))  # an empty split needs its columns
    return {
        split: Dataset.from_list(list(of_split)) if of_split else template.select([])
        for split, of_split in rows.items()
    }


@functools.lru_cache(maxsize=2)  # MMLU reads its two files once per subject
def read_rows(path: Path, row: type[Open]) -> tuple[dict[str, Any], ...]:
    """The rows of one file. Raises RazorError where it is missing, damaged or empty, or a row is none of these."""
    schema = f"one JSON object per line with {', '.join(row.model_fields)}"
    mend = f"the file should be {schema}"
    text = read_text(path, mend=mend, missing=f"The mirror needs the file {path}: {schema}.")
    rows = tuple(jsonl.strict(text, path, say=functools.partial(unreadable, mend=mend)))
    for where, found in rows:
        checked(row, found, where, mend=mend)
    if not rows:
        raise RazorError(f"{path} is empty. It should be {schema}.")
    return tuple(found for _, found in rows)
