"""Tasks: scoring, sources, a task of one's own, and every row of the real data where it is there."""

import json
import math
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest

from rlrazor.cli import tasks as cli
from rlrazor.cli.printing import Subparsers
from rlrazor.errors import RazorError
from rlrazor.experiments.language.setup import TaskSource
from rlrazor.experiments.language.tasks import (
    TASKS,
    Form,
    Item,
    OwnTask,
    Splits,
    Task,
    find_task,
    score,
    with_demonstrations,
)
from rlrazor.experiments.language.tasks.chemistry import parse_equation
from rlrazor.experiments.language.tasks.letter_word import words
from rlrazor.experiments.language.tasks.math import _equal
from rlrazor.experiments.language.tasks.own import loaded_verifier
from rlrazor.experiments.language.tasks.rows import held_out
from rlrazor.system.rows import read_located

SHARED = Path(__file__).parents[3] / "shared" / "data" / "new_tasks"
real_rows = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not part of the project")


def task(verify: Any, **form: Any) -> Task:
    return Task("test", "Test", "", lambda path: Splits([], []), verify, Form(8, **form))


def write_jsonl(file: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return file


def all_items(name: str, path: Path | None) -> list[Item]:
    splits = TASKS[name].load(path)
    assert not {item.prompt for item in splits.train} & {item.prompt for item in splits.test}
    return [*splits.train, *splits.test]


# --- scoring


def test_a_score_sees_the_completion_up_to_the_first_stop_string() -> None:
    seen = []

    def verify(prompt: str, completion: str, *, word: str) -> float:
        seen.append((prompt, completion, word))
        return 0.5

    items = [Item("p", {"word": "x"}), Item("q", {"word": "y"})]
    scores = score(task(verify, stop=("\n", ";")), items, ["a;b\nc;", ""])
    assert seen == [("p", "a", "x"), ("q", "", "y")]
    assert scores.values == [0.5, 0.5]
    assert scores.failures == {}


def test_a_verifier_that_fails_on_some_items_skips_and_counts_them() -> None:
    def verify(prompt: str, completion: str) -> Any:
        answers = {"nan": math.nan, "two": 2, "minus": -0.1, "text": "1", "none": None, "true": True, "half": 0.5}
        return answers[completion]

    completions = ["nan", "two", "minus", "text", "none", "unknown", "true", "half"]
    scores = score(task(verify), [Item("p")] * len(completions), completions)
    assert scores.values == [None] * 6 + [1.0, 0.5]
    assert sorted(scores.failures) == list(range(6))
    assert scores.failures[1] == "returned 2, not a score from 0 to 1"
    assert scores.failures[5] == "raised KeyError: 'unknown'"


def test_a_verifier_that_fails_on_every_item_is_an_error() -> None:
    with pytest.raises(RazorError, match=r"failed on all 2 completions; on the first it returned nan"):
        score(task(lambda prompt, completion: math.nan), [Item("p")] * 2, ["a", "b"])
    with pytest.raises(RazorError, match=r"raised TypeError: .*unexpected keyword argument 'extra'"):
        score(task(lambda prompt, completion: 1.0), [Item("p", {"extra": 1})], ["a"])
    assert score(task(lambda prompt, completion: 1.0), [], []).values == []


def test_an_unknown_task_is_an_error_with_the_names() -> None:
    assert find_task("science") is TASKS["science"]
    with pytest.raises(RazorError, match=r"no task 'sciense'.*math, gsm8k, math500, science, tools, letter-word"):
        find_task("sciense")


# --- sources


def test_the_held_out_fifth_does_not_depend_on_order_or_length() -> None:
    items = [Item(f"prompt {number}") for number in range(1000)]
    splits = held_out([*items, *items[:10]])
    assert len(splits.train) + len(splits.test) == 1000
    # A binomial's standard deviation at 1000 and .2 is 12.6: four of them.
    assert abs(len(splits.test) - 200) < 50
    part = held_out(items[:500][::-1])
    assert set(map(repr, part.test)) == {repr(item) for item in splits.test if item in items[:500]}
    groups = held_out(items, [f"group {number % 10}" for number in range(1000)])
    assert {int(item.prompt.split()[1]) % 10 for item in groups.train}.isdisjoint(
        int(item.prompt.split()[1]) % 10 for item in groups.test
    )
    with pytest.raises(RazorError, match=r"Too few different prompts .*: 1\."):
        held_out(items[:1] * 5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no rows"),
        ('{"a": 1}\n{"a": ', "line 2: not JSON"),
        ('{"a": 1}\n3\n', "line 2: not a JSON object"),
        ("[1]", "row 1: not a JSON object"),
        ("[" * 100_000, "nested too deeply"),
        ("\udcff", "cannot be read as text"),
    ],
)
def test_a_file_that_is_no_jsonl_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(RazorError, match=message):
        read_located(file)


def test_files_are_read_as_lines_or_as_one_array_or_as_a_folder(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"x": "line\u2028separator"}])
    (tmp_path / "b.json").write_text('[{"x": 2}, {"x": 3}]', encoding="utf-8")
    assert [row for _, row in read_located(tmp_path)] == [{"x": "line\u2028separator"}, {"x": 2}, {"x": 3}]
    with pytest.raises(RazorError, match=r"holds no file named like \*\.csv"):
        read_located(tmp_path, "*.csv")
    with pytest.raises(RazorError, match=r"There is no .*absent\.jsonl"):
        read_located(tmp_path / "absent.jsonl")


@pytest.mark.parametrize("name", ["math", "gsm8k", "math500", "science", "tools"])
def test_rows_of_another_schema_are_an_error_that_names_the_field(tmp_path: Path, name: str) -> None:
    row = {"domain": "Chemistry", "details": {"level": "L3"}, "Name": "api"}
    with pytest.raises(RazorError, match="A row has no field"):
        TASKS[name].load(write_jsonl(tmp_path / "rows.jsonl", [row]))


def test_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []

    def load_dataset(*args: str | None, split: str) -> list[dict[str, Any]]:
        loaded.append((*args, split))
        return [{"question": f"{split} {n}", "answer": f"{n} + 1 = <<{n}+1>>{n + 1}\n#### {n + 1},000"} for n in (1, 2)]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    splits = TASKS["gsm8k"].load(None)
    assert loaded == [("openai/gsm8k", "main", "train"), ("openai/gsm8k", "main", "test")]
    assert [item.columns["reference"] for item in splits.train] == ["2000", "3000"]
    assert splits.test[0].demonstration == "1 + 1 = 2\nThe final answer is \\boxed{2000}."

    def offline(*args: str | None, split: str) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=offline))
    for name in ("math", "gsm8k", "math500", "science"):
        with pytest.raises(RazorError, match=r"could not be loaded from the hub .*no route.* give --data FILE"):
            TASKS[name].load(None)

    def full(*args: str | None, split: str) -> None:
        raise RuntimeError("An error occurred while generating the dataset") from OSError(28, "No space left on device")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=full))
    with pytest.raises(RazorError, match=r"gsm8k cannot be kept in its cache: .*No space left on device\. Free some"):
        TASKS["gsm8k"].load(None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RazorError, match=r"need the extra \[language\]: in the checkout of rlrazor, pip install -e"):
        TASKS["math"].load(None)
    with pytest.raises(RazorError, match="ToolAlpaca is not on the hub"):
        TASKS["tools"].load(None)


def test_toolalpaca_training_rows_give_their_steps_as_calls(tmp_path: Path) -> None:
    step = [["search", '{"query": "x"}', "Thought: ...\nAction: search"], "found 3"]
    rows = [
        {
            "Name": f"api {number}",
            "NLDocumentation": "search: finds",
            "Instances": [
                {"input": f"Find x in {number}.", "output": "3", "intermediate_steps": [step]},
                {"input": "Nothing was called.", "output": "?", "intermediate_steps": []},
                {"input": "The agent failed."},
            ],
        }
        for number in range(20)
    ]
    splits = TASKS["tools"].load(write_jsonl(tmp_path / "train_data.jsonl", rows))
    items = [*splits.train, *splits.test]
    assert len(items) == 20
    assert items[0].demonstration == 'Action: search\nAction Input: {"query": "x"}'
    assert score(TASKS["tools"], items, [item.demonstration or "" for item in items]).values == [1.0] * 20


def test_demonstrations_from_a_file(tmp_path: Path) -> None:
    items = [Item("p", {}, "old", "bad"), Item("q"), Item("r", {}, "kept")]
    rows = [{"prompt": "p", "completion": "new"}, {"prompt": "q", "completion": "first"}]
    rows += [{"prompt": "q", "completion": "last", "rejected": "wrong"}, {"prompt": "other", "completion": "x"}]
    found = with_demonstrations(items, write_jsonl(tmp_path / "d.jsonl", rows))
    assert found == [Item("p", {}, "new", "bad"), Item("q", {}, "last", "wrong"), Item("r", {}, "kept")]
    with pytest.raises(RazorError, match="none of the task's prompts"):
        with_demonstrations(items[2:], tmp_path / "d.jsonl")
    with pytest.raises(RazorError, match="lacks the text of prompt or completion; it has prompt"):
        with_demonstrations(items, write_jsonl(tmp_path / "e.jsonl", [{"prompt": "p"}]))


# --- a task of one's own

VERIFIER = '''
"""Is the completion the sum?"""

def verify(prompt, completion, *, total, tolerance=0):
    return float(abs(int(completion) - total) <= tolerance)

WORD = "not a function"
'''


def test_a_task_of_ones_own_from_a_jsonl_and_a_function(tmp_path: Path) -> None:
    source = tmp_path / "sums.py"
    source.write_text(VERIFIER, encoding="utf-8")
    rows = [{"prompt": f"{n} + {n} =", "total": 2 * n, "completion": f"{2 * n}", "rejected": "0"} for n in range(1, 31)]
    own = OwnTask(write_jsonl(tmp_path / "sums.jsonl", rows), f"{source}:verify", Form(3, (";",))).task()
    assert (own.name, own.form.max_new_tokens, own.form.stop) == ("sums", 3, (";",))
    splits = own.load(None)
    items = [*splits.train, *splits.test]
    assert len(items) == 30
    assert score(own, items, [f"{item.demonstration}; and more" for item in items]).values == [1.0] * 30
    assert score(own, items, [str(item.rejected) for item in items]).values == [0.0] * 30
    scores = score(own, items[:2], ["no number", str(items[1].columns["total"])])
    assert scores.values == [None, 1.0]
    assert scores.failures[0].startswith("raised ValueError")


def test_ones_own_task_may_have_its_own_test_file_and_a_function_of_a_module(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"prompt": "a", "letter": "a"}])
    write_jsonl(tmp_path / "test.jsonl", [{"prompt": "b", "letter": "b"}])
    own = OwnTask(tmp_path, "rlrazor.experiments.language.tasks.letter_word:verify_letter_word").task()
    assert own.load(None) == Splits([Item("a", {"letter": "a"})], [Item("b", {"letter": "b"})])
    assert score(own, own.load(None).test, ["bridge"]).values == [1.0]
    write_jsonl(tmp_path / "test.jsonl", [{"prompt": "a", "letter": "a"}])
    with pytest.raises(RazorError, match=r"1 prompts are in both train and test"):
        own.load(None)


@pytest.mark.parametrize(
    ("verifier", "message"),
    [
        ("verify", "FILE.py:function"),
        ("absent.py:verify", "absent.py cannot be loaded: FileNotFoundError"),
        ("rlrazor.absent:verify", "rlrazor.absent cannot be loaded: ModuleNotFoundError"),
        ("{folder}/sums.py:check", "has no function check. It has: verify"),
        ("{folder}/sums.py:WORD", "has no function WORD. It has: verify"),
        ("{folder}/broken.py:verify", "broken.py cannot be loaded: SyntaxError"),
        ("{folder}/raises.py:verify", "raises.py cannot be loaded: ZeroDivisionError"),
    ],
)
def test_a_verifier_that_cannot_be_loaded_is_an_error(tmp_path: Path, verifier: str, message: str) -> None:
    for name, source in (("sums", VERIFIER), ("broken", "def"), ("raises", "1 / 0")):
        (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
    with pytest.raises(RazorError) as error:
        OwnTask(tmp_path / "prompts.jsonl", verifier.format(folder=tmp_path)).task()
    assert message in str(error.value)


def test_the_fingerprint_of_a_source_stays_what_finished_runs_were_named_by(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}+{n}=", "completion": str(2 * n)} for n in range(40)]
    prompts, code = write_jsonl(tmp_path / "sums.jsonl", rows), tmp_path / "verify.py"
    code.write_text("def verify(prompt, completion, **columns):\n    return 1.0\n", encoding="utf-8")
    verifier = f"{code}:verify"

    def own(*form: Any, **named: Any) -> TaskSource:
        return TaskSource("own", own=OwnTask(prompts, *form, **named))

    for source, found in (
        (TaskSource("letters"), "cb30d3f6107b154c"),
        (own(), "6804608ae259d87d"),
        (own(verifier), "c004e51fbb88fc48"),  # by what is in the file, wherever it lies
        (own("json:dumps"), "9326d634858fe14d"),
        (own(verifier, Form(7, (";",), chat=False), seconds=3.0), "01cf25c595da1e4d"),
    ):
        assert source.fingerprint(source.load()) == found


def test_verifiers_of_several_tasks_are_loaded_once_each(tmp_path: Path) -> None:
    one, other = (tmp_path / f"{name}.py" for name in ("one", "other"))
    for file in (one, other):
        file.write_text(VERIFIER, encoding="utf-8")
    first, second = (loaded_verifier(f"{file}:verify") for file in (one, other))
    assert loaded_verifier(f"{one}:verify") is first
    assert loaded_verifier(f"{other}:verify") is second
    one.write_text(f"{VERIFIER}\n", encoding="utf-8")  # another file now
    assert loaded_verifier(f"{one}:verify") is not first


TURNS = [{"role": "user", "content": "p"}]
SCHEMA = {"type": "function", "function": {"name": "f", "parameters": {}}}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"total": 3}, "line 2: it needs a column `prompt` .*; it has total"),
        ({"prompt": 3}, "line 2: the prompt is the number 3"),
        ({"prompt": "p", "completion": 3}, "line 2: its completion is not text; it has prompt, completion"),
        ({"prompt": TURNS}, "line 2: the prompt is a conversation"),
        ({"prompt": "p", "tools": [SCHEMA]}, "line 2: it has tools for the chat template"),
        ({"prompt": "p", "chat_template_kwargs": {"think": False}}, "line 2: it has think for the chat template"),
    ],
)
def test_a_row_without_text_is_an_error(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    good = {"prompt": "p", "tools": ["names", "for the verifier"]}
    own = OwnTask(write_jsonl(tmp_path / "p.jsonl", [good, row]), "json:dumps").task()
    with pytest.raises(RazorError, match=message):
        own.load(None)


def test_a_task_of_ones_own_from_other_formats(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}, and", "completion": str(n)} for n in range(40)]
    expected = OwnTask(write_jsonl(tmp_path / "p.jsonl", rows)).task().load(None)
    pl.DataFrame(rows).write_csv(tmp_path / "p.csv")
    assert OwnTask(tmp_path / "p.csv").task().load(None) == expected
    (tmp_path / "folder").mkdir()
    pl.DataFrame(rows[:3]).write_parquet(tmp_path / "folder" / "train.parquet")
    (tmp_path / "folder" / "test.txt").write_text(json.dumps(rows[3]))
    splits = OwnTask(tmp_path / "folder").task().load(None)
    assert [item.demonstration for item in (*splits.train, *splits.test)] == ["0", "1", "2", "3"]
    (tmp_path / "folder" / "test.csv").write_text("")
    with pytest.raises(RazorError, match=r"needs one file test, such as test\.jsonl, and has 2"):
        OwnTask(tmp_path / "folder").task().load(None)


@pytest.mark.parametrize("stop", [("",), ("a", ""), (3,)])
def test_a_task_is_not_stopped_by_nothing(tmp_path: Path, stop: tuple[Any, ...]) -> None:
    with pytest.raises(RazorError, match=r"A stop string is empty|tuple of strings"):
        OwnTask(tmp_path / "p.jsonl", form=Form(stop=stop)).task()


# --- letter-word


def test_letter_word_prompts() -> None:
    splits = TASKS["letter-word"].load(None)
    assert (len(splits.train), len(splits.test)) == (520, 130)
    items = all_items("letter-word", None)
    assert items == [*TASKS["letter-word"].load(None).train, *TASKS["letter-word"].load(None).test]
    for item in items:
        *examples, last = item.prompt.split("\n")[1:]
        assert last == f"Letter {item.columns['letter']}:"
        shown = [example.removeprefix("Letter ").split(": ") for example in examples]
        assert len({letter for letter, _ in shown} | {item.columns["letter"]}) == 5
        assert all(word in words()[letter] for letter, word in shown)
    with pytest.raises(RazorError, match="reads no file"):
        TASKS["letter-word"].load(Path("words.jsonl"))


def test_letter_word_annotators() -> None:
    letter_word, items = TASKS["letter-word"], all_items("letter-word", None)
    rng = random.Random(0)
    for annotator in letter_word.annotators.values():
        assert set(score(letter_word, items, [annotator(item, rng) for item in items]).values) == {1.0}
    assert set(score(letter_word, items, [item.rejected or "" for item in items]).values) == {0.0}
    x = next(item for item in items if item.columns["letter"] == "x")
    assert {letter_word.annotators["fixed"](x, rng) for _ in range(50)} == {" xylophone"}
    two = [letter_word.annotators["two"](x, rng) for _ in range(400)]
    assert set(two) == {" xylophone", " xenon"}
    assert abs(two.count(" xenon") - 200) < 40  # four standard deviations of a binomial
    drawn = [letter_word.annotators["uniform"](x, rng) for _ in range(1500)]
    counts = [drawn.count(f" {word}") for word in words()["x"]]
    assert sum(counts) == 1500
    # 15 words, 100 draws each: chi square with 14 degrees of freedom is below 36.1 with probability .999.
    assert sum((count - 100) ** 2 / 100 for count in counts) < 36.1


# --- multiple


def test_multiple_prompts_and_annotators() -> None:
    splits, task = TASKS["multiple"].load(None), TASKS["multiple"]
    assert (len(splits.train), len(splits.test)) == (528, 132)
    items = all_items("multiple", None)
    assert {number: [item.columns["number"] for item in items].count(number) for number in range(2, 13)} == (
        dict.fromkeys(range(2, 13), 60)
    )
    for item in items:
        *examples, last = item.prompt.split("\n")[1:]
        assert last == f"Multiple of {item.columns['number']}:"
        shown = [tuple(map(int, example.removeprefix("Multiple of ").split(": "))) for example in examples]
        assert len({number for number, _ in shown} | {item.columns["number"]}) == 5
        assert all(value % number == 0 and 2 <= value // number <= 12 for number, value in shown)
    rng = random.Random(0)
    for annotator in task.annotators.values():
        assert set(score(task, items, [annotator(item, rng) for item in items]).values) == {1.0}
    assert set(score(task, items, [item.rejected or "" for item in items]).values) == {0.0}
    three = next(item for item in items if item.columns["number"] == 3)
    drawn = {name: [annotator(three, rng) for _ in range(1100)] for name, annotator in task.annotators.items()}
    assert {name: sorted(set(texts), key=int) for name, texts in drawn.items()} == {
        "fixed": [" 21"],
        "two": [" 21", " 27"],
        "uniform": [f" {three}" for three in range(6, 37, 3)],
    }
    # 11 answers, 100 draws each: chi square with 10 degrees of freedom is below 29.6 with probability .999.
    assert sum((drawn["uniform"].count(text) - 100) ** 2 / 100 for text in set(drawn["uniform"])) < 29.6
    with pytest.raises(RazorError, match="multiple makes its own prompts and reads no file"):
        task.load(Path("numbers.jsonl"))


# --- every real row


@real_rows
def test_all_science_rows() -> None:
    science, items = TASKS["science"], all_items("science", SHARED)
    assert len(items) == 2400
    assert score(science, items, [item.demonstration or "" for item in items]).values == [1.0] * 2400
    assert score(science, items, [item.rejected or "" for item in items]).values == [0.0] * 2400
    choices = [item for item in items if item.columns["kind"] == "choice"]
    assert len(choices) == 2100
    for letter in "ABCD":
        right = [float(item.columns["reference"] == letter) for item in choices]
        for form in ("{0}", "{0}. {1}", "The answer is ({0}).", "First I thought of A.\n\\boxed{{{0}}}"):
            completions = [form.format(letter, item.columns["options"][letter]) for item in choices]
            assert score(science, choices, completions).values == right
    assert set(score(science, choices, ["A or B, or C and D"] * 2100).values) == {0.0}


@real_rows
def test_all_equations() -> None:
    items = [item for item in all_items("science", SHARED) if item.columns["kind"] == "equation"]
    science = TASKS["science"]
    assert len(items) == 300
    unbalanced = [item.demonstration for item in items if not parse_equation(item.demonstration or "").balanced()]
    assert unbalanced == ["3Br2 + 6KOH = KBrO3 + 5KBr0 + 3H2O"]  # a zero where an O was meant
    items = [item for item in items if item.demonstration not in unbalanced]
    for item in items:
        equation = parse_equation(item.demonstration or "")

        def written(left: Mapping[str, int], right: Mapping[str, int]) -> str:
            return " -> ".join(" + ".join(f"{n} {formula}" for formula, n in side.items()) for side in (left, right))

        multiple = (
            {formula: 3 * n for formula, n in equation.left.items()},
            {f: 3 * n for f, n in equation.right.items()},
        )
        reordered = dict(reversed(equation.left.items())), dict(reversed(equation.right.items()))
        # One more of a single species changes the atoms of one side only, so this never balances.
        more = [
            written({**equation.left, formula: equation.left[formula] + 1}, equation.right) for formula in equation.left
        ]
        more += [
            written(equation.left, {**equation.right, formula: equation.right[formula] + 1})
            for formula in equation.right
        ]
        completions = [written(*multiple), written(*reordered), written(equation.right, equation.left), *more]
        scores = score(science, [item] * len(completions), completions).values
        assert scores == [1.0, 1.0] + [0.0] * (len(completions) - 2), item.demonstration


@real_rows
def test_all_tool_instructions() -> None:
    tools = TASKS["tools"]
    items = [
        item for name in ("simulated", "real") for item in all_items("tools", SHARED / f"toolalpaca_eval_{name}.jsonl")
    ]
    assert len(items) == 214
    rendered = [item.demonstration or "" for item in items]
    assert score(tools, items, rendered).values == [1.0] * 214
    for perturb in (
        lambda text: text.replace("Action: ", "Action: my_", 1),
        lambda text: text + '\nAction: search\nAction Input: {"query": "more"}',
        lambda text: "Action: " + text.partition("\nAction: ")[2],
        lambda text: f"<think>{text}</think>\nDone.",
        lambda text: text.replace("Action Input", "Input"),
    ):
        assert score(tools, items, [perturb(text) for text in rendered]).values == [0.0] * 214
    # A changed value is a mistake in every call that has a plain text or number as an argument; getDetails' is open.
    closed, changed = [], []
    for item, text in zip(items, rendered, strict=True):
        call = next((call for call in item.columns["calls"] if call["Action"] != "getDetails"), None)
        try:
            arguments = json.loads(call["Action_Input"]) if call else {}
        except ValueError:
            continue
        plain = [key for key, value in arguments.items() if value not in ("", []) and "{" not in str(value)]
        if call and plain:
            closed.append(item)
            other = json.dumps({**arguments, plain[0]: "something else"})
            changed.append(text.replace(call["Action_Input"], other, 1))
    assert len(closed) == 174
    assert score(tools, closed, changed).values == [0.0] * 174


@real_rows
def test_math_references_equal_themselves() -> None:
    items = all_items("math500", SHARED)
    assert len(items) == 500
    references = [str(item.columns["reference"]) for item in items]
    # Not through the verifier: it compares the text first, and would not ask math-verify.
    assert [reference for reference in references if not _equal(reference, reference)] == []
    neighbours = list(zip(items, references[1:] + references[:1], strict=True))
    scores = score(TASKS["math500"], items, [f"\\boxed{{{other}}}" for _, other in neighbours]).values
    equal = {
        (item.columns["reference"], other) for (item, other), value in zip(neighbours, scores, strict=True) if value
    }
    assert {pair for pair in equal if pair[0] != pair[1]} == {("5", "x=5"), ("36^\\circ", "36")}  # equal indeed


@real_rows
def test_open_reasoner_zero_has_the_schema_of_math500(tmp_path: Path) -> None:
    (tmp_path / "orz_math.jsonl").symlink_to(SHARED / "math500.jsonl")
    assert all_items("math", tmp_path) == all_items("math500", SHARED)


@real_rows
def test_all_gsm8k_solutions() -> None:
    splits = TASKS["gsm8k"].load(SHARED)
    assert (len(splits.train), len(splits.test)) == (7473, 1319)
    items = all_items("gsm8k", SHARED)
    assert score(TASKS["gsm8k"], items, [item.demonstration or "" for item in items]).values == [1.0] * 8792
    assert not any("<<" in (item.demonstration or "") for item in items)
    wrong = [f"It is {item.columns['reference']}. The answer is {item.columns['reference']}1" for item in items[:100]]
    assert score(TASKS["gsm8k"], items[:100], wrong).values == [0.0] * 100


# --- the command


def test_razor_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    import argparse

    parser = argparse.ArgumentParser()
    commands: Subparsers = parser.add_subparsers()
    cli.add_to(commands)
    for argv, show in ((["tasks"], str), (["tasks", "--json"], json.loads)):
        arguments = parser.parse_args(argv)
        assert arguments.run(arguments) == 0
        shown = show(capsys.readouterr().out)
        for name, listed in TASKS.items():
            assert name in (shown if isinstance(shown, str) else [row["name"] for row in shown])
            if not isinstance(shown, str):
                (row,) = [row for row in shown if row["name"] == name]
                assert row["summary"] == listed.summary
                assert row["annotators"] == list(listed.annotators)
