"""Rows of tasks and of data mirrors in which anything was changed: refused in a sentence, or verified."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from documents import HOSTILE, changes, is_a_sentence
from rlrazor.errors import RazorError
from rlrazor.experiments.language.tasks import TASKS, Task, with_demonstrations
from rlrazor.experiments.language.tasks.task import Item
from rlrazor.lm.harness.mirror import MIRRORED, read_rows

TOOLS, SCIENCE, MATH, GSM8K = (TASKS[name] for name in ("tools", "science", "math", "gsm8k"))
MIRROR_ROWS = {mirror.stem: mirror.row for mirror in MIRRORED.values()}
CALL = {"Action": "find", "Action_Input": '{"q": "a"}'}
SCIENTIFIC = {"domain": "Chemistry", "details": {"level": "L3"}, "prompt": {"default": "Answer."}}
ROWS: list[tuple[Task, dict[str, Any]]] = [
    (TOOLS, {"Name": "api", "NLDocumentation": "doc", "Instructions": ["do"], "Golden_Answers": [[CALL]]}),
    (
        TOOLS,
        {
            "Name": "api",
            "NLDocumentation": "doc",
            "Instances": [{"input": "do", "intermediate_steps": [[["find", '{"q": "a"}', "log"], "seen"]]}],
        },
    ),
    (SCIENCE, {**SCIENTIFIC, "question": "q", "answerKey": "", "answer": "2H2 + O2 = 2H2O"}),
    (
        SCIENCE,
        {**SCIENTIFIC, "question": "q", "answerKey": "A", "choices": {"label": ["A", "B"], "text": ["one", "two"]}},
    ),
    (MATH, {"prompt": [{"from": "human", "value": "What is 1+1?"}], "final_answer": "2"}),
    (GSM8K, {"question": "What is 1+1?", "answer": "<<1+1=2>> two\n#### 2"}),
]


@pytest.mark.parametrize(("task", "row"), ROWS)
def test_any_change_of_a_tasks_row_is_refused_or_verified(task: Task, row: dict[str, Any], tmp_path: Path) -> None:
    # Enough others for either side, each with a prompt, and an API, of its own.
    own = []
    for number in range(30):
        other: dict[str, Any] = {
            name: f"{row[name]} other {number}" for name in ("Name", "NLDocumentation", "question") if name in row
        }
        if task is MATH:
            other["prompt"] = [{"value": f"other {number}"}]
        own.append({**row, **other})
    file = tmp_path / "rows.jsonl"
    refused = 0
    rest = "\n".join(map(json.dumps, own))
    for _, changed in changes(row, tuple(one for one in HOSTILE if one != "x" * 100_000)):
        file.write_text(f"{json.dumps(changed)}\n{rest}")
        try:
            splits = task.load(file)
        except RazorError as error:
            is_a_sentence(error)
            refused += 1
            continue
        for item in [*splits.train, *splits.test]:
            assert isinstance(item.prompt, str)
            assert item.demonstration is None or isinstance(item.demonstration, str)
            if "other" not in item.prompt and task is not MATH:  # whose verifier takes 20 ms
                with suppress(ValueError):  # a reference that is no equation
                    assert 0 <= task.verify(item.prompt, item.demonstration or "x", **item.columns) <= 1
    assert refused > 20


@pytest.mark.parametrize("rejected", [3, True, [], {}])
def test_a_demonstration_that_is_no_text_is_refused(rejected: Any, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b", "rejected": rejected}))
    with pytest.raises(RazorError, match=r"rejected is .* has to be text"):
        with_demonstrations([Item("a")], tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("hellaswag", {"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "endings": ["d", "e"], "label": "1"}),
        ("winogrande", {"sentence": "a _ b", "option1": "c", "option2": "d", "answer": "1"}),
        ("mmlu", {"subject": "a", "question": "b", "choices": ["c", "d", "e", "f"], "answer": 0}),
        ("ifeval", {"key": 1, "prompt": "a", "instruction_id_list": ["b"], "kwargs": [{}]}),
        ("humaneval", {"task_id": "a", "prompt": "b", "entry_point": "c", "test": "d"}),
        (
            "truthfulqa_mc",
            {
                "question": "a",
                "mc1_targets": {"choices": ["b", "c"], "labels": [1, 0]},
                "mc2_targets": {"choices": ["b"], "labels": [1]},
            },
        ),
    ],
)
def test_any_change_of_a_mirrors_row_is_refused_or_read(name: str, row: dict[str, Any], tmp_path: Path) -> None:
    from datasets import Dataset

    file = tmp_path / f"{name}_test.jsonl"
    file.write_text(json.dumps(row))
    assert read_rows(file, MIRROR_ROWS[name]) == (row,)
    refused = 0
    for _, changed in changes(row):
        file.write_text(json.dumps(changed))
        read_rows.cache_clear()
        try:
            found = read_rows(file, MIRROR_ROWS[name])
        except RazorError as error:
            is_a_sentence(error)
            refused += 1
            continue
        assert Dataset.from_list(list(found))
    assert refused > 40


@pytest.mark.parametrize("content", [b"", b"[" * 10_000, b"\x80", b'{"text": 1e400}', b"[]", b"3", b"null"])
def test_a_mirror_that_is_no_json_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(RazorError, match=r"a\.jsonl") as raised:
        read_rows(tmp_path / "a.jsonl", MIRROR_ROWS["winogrande"])
    is_a_sentence(raised.value)
