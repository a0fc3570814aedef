"""Prior tasks by lm-eval on a mirror made here: its scores against log-likelihoods by plain forward passes."""

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlrazor.errors import RazorError
from rlrazor.lm import prior
from tiny_models import char_tokenizer, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore")  # of lm-eval's own libraries

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ.,:?'()[]"
TOKENIZER = char_tokenizer("abcdefghijklmnopqrstuvwxyz0123456789+-=: \n" + LETTERS)
Rows = list[dict[str, Any]]
HELLASWAG: Rows = [
    {"activity_label": "Cooking", "ctx_a": "A man cuts", "ctx_b": "the man", "endings": endings, "label": str(n % 4)}
    for n, endings in enumerate(
        [["eats it.", "sings a song.", "goes.", "cuts more of it."], ["a", "bb b", "ccc c c", "d d"]] * 3
    )
]
WINOGRANDE: Rows = [
    {"sentence": f"The {a} met the {b} and _ was glad.", "option1": a, "option2": b, "answer": str(1 + n % 2)}
    for n, (a, b) in enumerate([("cat", "dog"), ("sun", "moon"), ("king", "page"), ("oak", "elm")])
]
MMLU: Rows = [
    {"subject": subject, "question": f"What is {n}?", "choices": ["one", "two", "three", f"{n}"], "answer": n % 4}
    for n, subject in enumerate(["anatomy", "anatomy", "virology", "virology", "virology"])
]
TRUTHFUL: Rows = [
    {
        "question": f"Is {n} odd?",
        "mc1_targets": {"choices": ["yes", "no"], "labels": [1, 0]},
        "mc2_targets": {"choices": ["yes it is", "it is", "no"], "labels": [1, 1, 0]},
    }
    for n in range(3)
]
IFEVAL: Rows = [
    {"key": n, "prompt": f"Say {n} without commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    for n in range(3)
]
HUMANEVAL: Rows = [
    {
        "task_id": "HumanEval/0",
        "prompt": "def double(x):\n",
        "canonical_solution": "    return 2 * x\n",
        "test": "def check(candidate):\n    assert candidate(3) == 6\n",
        "entry_point": "double",
    }
]


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mirror")
    files = {
        "hellaswag_validation": HELLASWAG,
        "winogrande_validation": WINOGRANDE,
        "mmlu_test": MMLU,
        "mmlu_dev": MMLU,
        "truthfulqa_mc_validation": TRUTHFUL,
        "ifeval_train": IFEVAL,
        "humaneval_test": HUMANEVAL,
    }
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama(len(TOKENIZER), max_position_embeddings=2048, scale=0.15)


def evaluate(model: Any, mirror: Path, task: str, **options: Any) -> prior.Score:
    return prior.evaluate(model, TOKENIZER, [task], data_mirror=mirror, **options)[task]


@torch.no_grad()
def log_likelihood(model: Any, context: str, continuation: str) -> float:
    ids, start = TOKENIZER.encode(context + continuation), len(TOKENIZER.encode(context))
    logp = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return float(sum(logp[t - 1, ids[t]] for t in range(start, len(ids))))


def stderr(hits: Sequence[float]) -> float:
    return float(np.std(hits, ddof=1) / np.sqrt(len(hits)))


def test_hellaswag_is_the_likeliest_ending_by_its_length(model: Any, mirror: Path) -> None:
    hits = []
    for row in HELLASWAG:
        context = f"{row['activity_label']}: {row['ctx_a']} {str(row['ctx_b']).capitalize()}"
        scores = [log_likelihood(model, context, f" {ending}") / len(ending) for ending in row["endings"]]
        hits.append(float(int(np.argmax(scores)) == int(str(row["label"]))))
    score = evaluate(model, mirror, "hellaswag")
    assert score.value == pytest.approx(np.mean(hits))
    assert (score.n, score.metric) == (6, "acc_norm")
    assert score.stderr == pytest.approx(stderr(hits))


def test_winogrande_is_the_option_that_makes_the_rest_likelier(model: Any, mirror: Path) -> None:
    hits = []
    for row in WINOGRANDE:
        before, after = row["sentence"].split("_")
        scores = [log_likelihood(model, before + row[name], " " + after.strip()) for name in ("option1", "option2")]
        hits.append(float(int(np.argmax(scores)) + 1 == int(row["answer"])))
    score = evaluate(model, mirror, "winogrande")
    assert score.value == pytest.approx(np.mean(hits))
    assert score.n == 4


def test_mmlu_is_the_letter_over_all_subjects_by_their_size(
    model: Any, mirror: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of the 57 subjects, as two tasks; the group's own weighting is lm-eval's."""
    for subject in ("anatomy", "virology"):
        hits = []
        for row in MMLU:
            if row["subject"] == subject:
                context = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
                context += str(row["question"])
                options = zip("ABCD", row["choices"], strict=True)
                context += "".join(f"\n{letter}. {choice}" for letter, choice in options) + "\nAnswer:"
                scores = [log_likelihood(model, context, f" {letter}") for letter in "ABCD"]
                hits.append(float(int(np.argmax(scores)) == row["answer"]))
        score = evaluate(model, mirror, f"mmlu_{subject}")
        assert score.value == pytest.approx(np.mean(hits))
        assert (score.n, score.metric) == (len(hits), "acc")
    with pytest.raises(RazorError, match="no row of the subject"):
        evaluate(model, mirror, "mmlu")


def test_truthfulqa_is_the_mass_on_true_answers(model: Any, mirror: Path) -> None:
    score = evaluate(model, mirror, "truthfulqa_mc2")
    (task,) = prior._load("truthfulqa_mc2", mirror.resolve(), False).content["tasks"].values()
    masses = []
    for row, document in zip(TRUTHFUL, task.validation_docs(), strict=True):
        context = task.doc_to_text(document)
        assert context.endswith(f"Q: {row['question']}\nA:")
        targets: Any = row["mc2_targets"]
        weights = np.exp([log_likelihood(model, context, f" {choice}") for choice in targets["choices"]])
        masses.append(weights[:2].sum() / weights.sum())
    assert score.value == pytest.approx(np.mean(masses), rel=1e-3)
    assert score.n == 3
    assert score.stderr == pytest.approx(stderr(masses), rel=1e-2)


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model that always generates the same text."""
    from lm_eval.models.huggingface import HFLM

    def say(text: str) -> None:
        monkeypatch.setattr(HFLM, "generate_until", lambda self, requests, **_: [text] * len(requests))

    return say


def test_ifeval_follows_or_does_not(model: Any, mirror: Path, says: Any) -> None:
    says("no commas in here")
    assert evaluate(model, mirror, "ifeval").value == 1
    says("well, there is one")
    assert evaluate(model, mirror, "ifeval").value == 0


def test_a_context_that_generation_does_not_fit_is_said(mirror: Path) -> None:
    short = tiny_llama(len(TOKENIZER), max_position_embeddings=256)
    with pytest.raises(RazorError, match="context"):
        evaluate(short, mirror, "ifeval")


def test_humaneval_runs_programs_only_with_leave(model: Any, mirror: Path, says: Any) -> None:
    with pytest.raises(RazorError, match="--allow-code-execution"):
        evaluate(model, mirror, "humaneval")
    for body, value in (("    return x + x\n", 1.0), ("    return x\n", 0.0), ("    while True: pass\n", 0.0)):
        says(body)
        assert evaluate(model, mirror, "humaneval", allow_code_execution=True).value == value


@pytest.mark.parametrize(
    ("program", "clean"),
    [
        ("x = 1", True),
        ("raise SystemExit(0)", False),
        ("import os; os._exit(0)", False),
        ("1 / 0", False),
        ("(", False),
    ],
)
def test_a_program_is_clean_when_it_reaches_its_end(program: str, clean: bool) -> None:
    assert prior.runs_clean(program) is clean


def test_nothing_else_changes(model: Any, mirror: Path) -> None:
    model.train()
    states = random.getstate(), str(np.random.get_state()), torch.random.get_rng_state()
    evaluate(model, mirror, "winogrande")
    assert model.training
    assert random.getstate() == states[0]
    assert str(np.random.get_state()) == states[1]
    assert torch.equal(torch.random.get_rng_state(), states[2])
    model.eval()


def test_a_limit_takes_the_first_rows_and_the_mean_is_over_tasks(model: Any, mirror: Path) -> None:
    scores = prior.evaluate(model, TOKENIZER, ["winogrande", "hellaswag"], data_mirror=mirror, limit=2)
    assert [score.n for score in scores.values()] == [2, 2]
    assert scores.mean == pytest.approx(np.mean([score.value for score in scores.values()]))
    errors = [score.stderr or 0.0 for score in scores.values()]
    assert scores.stderr == pytest.approx(math.hypot(*errors) / 2)


def test_humaneval_is_left_out_of_the_default_tasks(monkeypatch: pytest.MonkeyPatch, model: Any, mirror: Path) -> None:
    monkeypatch.setattr(prior, "DEFAULT_TASKS", ("winogrande", "humaneval"))
    scores = prior.evaluate(model, TOKENIZER, data_mirror=mirror)
    assert set(scores) == {"winogrande"}
    assert "left out" in scores.notes[0]


def test_only_a_newline_ends_a_row(tmp_path: Path) -> None:
    rows = [{"text": "a\x85b"}, {"text": "c\u2028d"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8", newline="")
    assert list(prior._rows(path, ("text",))) == rows


def test_what_is_missing_is_said(model: Any, mirror: Path, tmp_path: Path) -> None:
    with pytest.raises(RazorError, match="No prior task"):
        prior.evaluate(model, TOKENIZER, [])
    with pytest.raises(RazorError, match="at least 1"):
        evaluate(model, mirror, "winogrande", limit=0)
    with pytest.raises(RazorError, match="no folder"):
        evaluate(model, tmp_path / "nowhere", "winogrande")
    with pytest.raises(RazorError, match=r"winogrande_validation.jsonl: one JSON object per line with sentence"):
        evaluate(model, tmp_path, "winogrande")
    (tmp_path / "hellaswag_validation.jsonl").write_text('{"ctx_a": "x"}')
    with pytest.raises(RazorError, match=r"Line 1 .* has no activity_label"):
        evaluate(model, tmp_path, "hellaswag")
    (tmp_path / "winogrande_validation.jsonl").write_text("")
    with pytest.raises(RazorError, match="empty"):
        evaluate(model, tmp_path, "winogrande")
