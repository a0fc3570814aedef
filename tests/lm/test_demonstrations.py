"""Prior items to train on: those that are not scored, in the form in which they would be, with their right answers."""

import json
from pathlib import Path
from typing import Any

import pytest

from hellaswag import CONTEXTS, write_mirror
from own_tasks import metric, own_task
from rlrazor.lm.harness.demonstrations import Demonstration
from rlrazor.lm.prior import PriorTasks

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore")  # of lm-eval's own libraries


def rows_of(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    """Four rows of HellaSwag that are scored; to train on two of these and three others."""
    write_mirror(tmp_path)
    scored = rows_of(tmp_path, "hellaswag_validation")
    others = [{**scored[0], "ctx_a": f"A cat sees {n} birds. The cat", "label": str(n)} for n in range(3)]
    write(tmp_path, "hellaswag_train", [*scored[:2], *others])
    winogrande = [
        {"sentence": f"The {a} met the {b} and _ was glad.", "option1": a, "option2": b, "answer": str(1 + n % 2)}
        for n, (a, b) in enumerate([("cat", "dog"), ("sun", "moon"), ("king", "page"), ("oak", "elm")])
    ]
    write(tmp_path, "winogrande_validation", winogrande)
    mmlu = [
        {"subject": "anatomy", "question": f"What is {n}?", "choices": ["one", "two", "three", f"{n}"], "answer": n % 4}
        for n in range(6)
    ]
    write(tmp_path, "mmlu_test", mmlu[:3])
    write(tmp_path, "mmlu_dev", mmlu[2:])
    asked = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    write(tmp_path, "ifeval_train", [{"key": n, "prompt": f"Say {n}.", **asked} for n in range(3)])
    return tmp_path


def drawn(mirror: Path, *tasks: str, limit: int | None = None, count: int = 8, seed: int = 0) -> Any:
    return PriorTasks(tasks, limit, mirror).demonstrations(count, seed)


def test_the_training_split_comes_first_and_none_of_it_is_scored(mirror: Path) -> None:
    found = drawn(mirror, "hellaswag")["hellaswag"]
    assert len(found) == 3
    assert not any(context in one.context for one in found for context in CONTEXTS)
    endings = rows_of(mirror, "hellaswag_train")[2]["endings"]
    assert {one.answer for one in found} == {f" {ending}" for ending in endings[:3]}  # by their labels 0, 1, 2
    for one in found:
        (n,) = [n for n in range(3) if f"{n} birds" in one.context]
        assert one == Demonstration("hellaswag", one.context, f" {endings[n]}", ends=False)


def test_without_such_a_split_rows_beyond_the_scored_ones_are_taken(mirror: Path) -> None:
    assert drawn(mirror, "winogrande") == {"winogrande": []}  # all are scored
    found = drawn(mirror, "winogrande", limit=1)["winogrande"]
    # The option is in the context, and what is likelier after the right one is the answer.
    assert {one.context for one in found} == {
        "The sun met the moon and moon",
        "The king met the page and king",
        "The oak met the elm and elm",
    }
    assert {one.answer for one in found} == {" was glad."}


def test_the_examples_split_does_as_well_and_a_row_asked_twice_is_left_out(mirror: Path) -> None:
    found = drawn(mirror, "mmlu_anatomy")["mmlu_anatomy"]
    assert sorted((one.context.split("What is ")[1][0], one.answer) for one in found) == [
        ("3", " D"),
        ("4", " A"),
        ("5", " B"),
    ]


def test_tasks_take_turns_and_one_without_right_answers_shows_none(mirror: Path) -> None:
    found = drawn(mirror, "hellaswag", "ifeval", "mmlu_anatomy", count=4)
    assert {name: len(of) for name, of in found.items()} == {"hellaswag": 2, "ifeval": 0, "mmlu_anatomy": 2}


def test_a_seed_draws_the_same(mirror: Path) -> None:
    assert drawn(mirror, "mmlu_anatomy", count=2) == drawn(mirror, "mmlu_anatomy", count=2)
    assert len({str(drawn(mirror, "mmlu_anatomy", count=2, seed=seed)) for seed in range(8)}) > 1


def test_examples_that_give_the_answer_away_are_no_demonstration(tmp_path: Path) -> None:
    """Of a task that shows two rows of the split that is trained on, the rows that it shows."""
    path = Path(own_task(tmp_path, metric("acc", "true")))
    text = path.read_text().replace("test_split: test", "test_split: test\nfewshot_split: train\nnum_fewshot: 2")
    write(tmp_path, "more", [{"q": f"b{n}:", "choices": ["b", "c", "d"], "label": n % 3} for n in range(6)])
    path.write_text(text.replace("  data_files:\n", f"  data_files:\n    train: {tmp_path / 'more.jsonl'}\n"))
    (found,) = PriorTasks([str(path)]).demonstrations(6, 0).values()
    assert found
    for one in found:
        *examples, asked = str(one.context).split("\n\n")
        assert len(examples) == 2
        assert not any(example.startswith(asked) for example in examples)
        assert one.answer == f" {'bcd'[int(asked[1]) % 3]}"
