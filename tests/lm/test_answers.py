"""Answers whatever the template: what is read out of a text, and that one generation is scored by both parsers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlrazor.lm.harness.answers import OURS, answer_in
from rlrazor.lm.models import LanguageModel
from rlrazor.lm.prior import PriorTasks
from rlrazor.lm.scores import ItemResults, Robust, Score
from tiny_models import char_tokenizer, tiny_llama

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore")  # of lm-eval's own libraries

TOKENIZER = char_tokenizer()


@pytest.mark.parametrize(
    ("text", "target", "right"),
    [
        ("He has 3 + 15 = 18 left.\n#### 18", "17 + 1\n#### 18", True),
        ("He has 3 + 15, so the answer is $18.00.", "#### 18", True),
        ("18 it is, of 20", "#### 18", False),
        ("that makes 1,000", "1000", True),
        ("7-5=2", "2", True),
        ("it is -2", "2", False),
        ("Answer: 12 apples. And 3 pears are left.", "3", True),  # the last of the line that declares it
        ("Answer: 12 apples\nand 3 pears are left", "12", True),
        ("no number at all", "3", False),
        ("The answer is 1/2.", "2", False),  # a part of a fraction is no answer
        ("The answer is 1/2.", "1", False),
        ("The answer is .5.", "5", False),
        ("The answer is .5.", "0.5", True),
        ("it costs $12 on 3/4/2025", "12", True),
        ("<think>it is 3", "3", False),  # reasoning that never ended
        ("<think>it is 4</think> 3", "3", True),
        ("The answer is (B), since A is not.", "B", True),
        (r"So \boxed{\text{B}}.", "(B)", True),
        ("(A) is wrong; I take (C)", "C", True),
        ("C. the third", "C", True),
        ("A molecule of water", "A", False),
        ("Answer: A triangle", "A", False),
        ("The answer is a triangle.", "A", False),
        ("Answer: A", "A", True),
        ("Answer: A is the only one left", "A", True),
        ("Answer: A, a triangle", "A", True),
        ("Answer: A Triangle", "A", True),
        ("Answer: B triangles", "B", True),
        ("Apples", "A", False),
        ("the answer is Paris.", "Paris", True),
        (r"thus \boxed{\frac{1}{2}}", r"\frac{1}{2}", True),
        ("Paris, I think", "Paris", False),  # nothing says that this is the answer
    ],
)
def test_what_a_text_answers(text: str, target: str, right: bool) -> None:
    assert (answer_in(text, target) == target) is right


@pytest.mark.parametrize("letter", ["A", "B"])
@pytest.mark.parametrize(
    "text",
    [
        "Answer: {}", "The answer is {}.", "The answer is {} in this case, while (C) is false.",
        "Answer: Option {} states that", "The answer is choice {} due to friction", "Answer: {} which is the first",
        "Answer: {} but not C", "Answer: {} given that x = 1", "Answer: {} if x is even",
        "The answer is ({}) triangle", "Answer: {}, a triangle",
    ],
)  # fmt: skip
def test_an_option_that_something_is_said_of_is_read_whichever_it_is(text: str, letter: str) -> None:
    assert answer_in(text.format(letter), letter) == letter


def test_an_article_is_no_option() -> None:
    """Nor is another letter of the text taken in its place."""
    assert answer_in("The answer is A triangle, not (B).", "B") is None


def generating(folder: Path, filters: str = "", metrics: str = "  - metric: exact_match", code: str = "") -> str:
    """A task of ten questions, `a0:` to `a9:`, whose answers are the numbers; generated."""
    (folder / "rows.jsonl").write_text("\n".join(json.dumps({"q": f"a{n}:", "a": str(n)}) for n in range(10)))
    (folder / "own_code.py").write_text(code)
    lines = [
        *("task: own", "dataset_path: json", "dataset_kwargs:", "  data_files:"),
        *(f"    test: {folder / 'rows.jsonl'}", "test_split: test", "output_type: generate_until"),
        *("doc_to_text: '{{q}}'", "doc_to_target: '{{a}}'"),
        *("generation_kwargs:", '  until: ["\\n"]', "  max_gen_toks: 8", "  do_sample: false"),
        *(["process_results: !function own_code.process"] if code else []),
        *([filters] if filters else []),
        *("metric_list:", metrics, "    aggregation: mean", "    higher_is_better: true"),
    ]
    path = folder / "own.yaml"
    path.write_text("\n".join(lines))
    return str(path)


FILTERS = """filter_list:
  - name: strict-match
    filter:
      - function: regex
        regex_pattern: "#### ([0-9]+)"
      - function: take_first"""
FLEXIBLE = """
  - name: flexible-extract
    filter:
      - function: regex
        group_select: -1
        regex_pattern: "([0-9]+)"
      - function: take_first"""


@pytest.fixture
def scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The score of a model that answers each question by `says`, and how often it was asked to generate."""
    from lm_eval.models.huggingface import HFLM

    asked: list[int] = []
    lm = LanguageModel(tiny_llama(), TOKENIZER, "it", str)

    def score(says: Any, **task: str) -> tuple[Score, int]:
        def generate(self: Any, requests: Any, **_: Any) -> list[str]:
            asked.append(len(requests))
            return [says(int(request.args[0].strip(":a"))) for request in requests]

        monkeypatch.setattr(HFLM, "generate_until", generate)
        path = generating(tmp_path, **task)
        return PriorTasks([path]).scores(lm)[path], sum(asked)

    return score


def outcomes(score: Score) -> tuple[list[float], list[float]]:
    assert score.items.robust is not None
    (strict,), (robust,) = score.items.outcomes.values(), score.items.robust.outcomes.values()
    assert strict.keys() == robust.keys()
    return list(strict.values()), list(robust.values())


def test_a_tasks_own_flexible_filter_is_the_parser_that_forgives(scored: Any) -> None:
    """Even numbers in the form, odd ones right without it, but for 9, which is wrong."""

    def says(n: int) -> str:
        return f"#### {n}" if n % 2 == 0 else "it is 8" if n == 9 else f"it is {n}"

    score, asked = scored(says, filters=FILTERS + FLEXIBLE)
    assert asked == 10  # one generation of each item
    assert score.value == 0.5
    strict, robust = outcomes(score)
    assert strict == [float(n % 2 == 0) for n in range(10)]
    assert robust == [float(n != 9) for n in range(10)]
    assert score.items.robust.by == "flexible-extract"


def test_what_the_strict_parser_counts_is_never_taken_away(scored: Any) -> None:
    strict, robust = outcomes(scored(lambda n: f"#### {n}, of 99", filters=FILTERS + FLEXIBLE)[0])
    assert strict == robust == [1.0] * 10


def test_a_task_with_one_filter_has_ours(scored: Any) -> None:
    score, asked = scored(lambda n: f"the answer is {n}.", filters=FILTERS)
    assert (score.value, score.items.robust.by, asked) == (0.0, OURS, 10)
    assert outcomes(score)[1] == [1.0] * 10


def test_what_is_no_exact_match_has_no_parser_that_forgives(scored: Any) -> None:
    """Such as IFEval, whose task is the form."""
    code = "def process(doc, results):\n    return {'followed': 0.0}"
    assert scored(lambda n: f"{n}", metrics="  - metric: followed", code=code)[0].items.robust is None


def test_a_metric_of_the_tasks_own_that_verifies_goes_before_ours(scored: Any) -> None:
    code = "def process(doc, results):\n    return {'exact_match': 0.0, 'math_verify': float(doc['a'] in '123')}"
    score, _ = scored(lambda n: f"{n}", code=code)
    assert score.items.robust.by == "math_verify"
    assert outcomes(score)[1] == [float(n in (1, 2, 3)) for n in range(10)]


def test_the_score_by_the_parser_that_forgives_weighs_items_as_the_tasks_own_does() -> None:
    outcomes = {"a": {"0-h": 1.0, "1-h": 0.0, "2-h": 0.0}, "b": {"0-k": 1.0}}
    items = ItemResults(outcomes, robust=Robust("ours", outcomes))
    assert items.robust_mean == pytest.approx(0.5)
    assert replace(items, by_size=False).robust_mean == pytest.approx((1 / 3 + 1) / 2)
    assert replace(items, robust=None).robust_mean is None
