"""Prior tasks by lm-eval on a mirror made here: its scores against log-likelihoods by plain forward passes."""

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from own_tasks import SCORES, metric, own_task
from rlrazor.errors import RazorError
from rlrazor.lm import prior
from rlrazor.lm.harness import tasks
from rlrazor.lm.harness.mirror import WinoGrande, read_rows
from rlrazor.lm.harness.programs import runs_clean
from rlrazor.lm.harness.tasks import Task, load
from rlrazor.lm.models import LanguageModel
from rlrazor.lm.prior import PriorTasks
from rlrazor.lm.scores import Metric, NotANumberError, PriorScores, Score, require_accuracies, stderr_of_mean
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


def evaluate(model: Any, mirror: Path, task: str, **options: Any) -> Score:
    return scores_of(model, PriorTasks([task], data_mirror=mirror, **options))[task]


def scores_of(model: Any, tasks: PriorTasks, **options: Any) -> PriorScores:
    return tasks.scores(LanguageModel(model, TOKENIZER, "it", str), **options)


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
    assert (score.n, score.metric, score.higher_is_better, score.is_fraction) == (6, "acc_norm", True, True)
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
    (task,) = load("truthfulqa_mc2", mirror.resolve(), False).content["tasks"].values()
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
    assert runs_clean(program) is clean


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
    told: list[str] = []
    tasks = ["winogrande", "hellaswag"]
    scores = scores_of(model, PriorTasks(tasks, 2, mirror), told=told.append)
    assert told == ["winogrande (1 of 2)", "hellaswag (2 of 2)"]
    assert [score.n for score in scores.values()] == [2, 2]
    assert scores.mean == pytest.approx(np.mean([score.value for score in scores.values()]))
    errors = [score.stderr or 0.0 for score in scores.values()]
    assert scores.stderr == pytest.approx(math.hypot(*errors) / 2)


def test_a_limit_is_of_all_of_a_groups_tasks_together(model: Any, tmp_path: Path) -> None:
    subjects = (
        *("business_ethics", "clinical_knowledge", "college_medicine", "global_facts", "human_aging", "management"),
        *("marketing", "medical_genetics", "miscellaneous", "nutrition", "professional_accounting"),
        *("professional_medicine", "virology"),
    )
    sizes = {subject: 1 + n % 3 for n, subject in enumerate(subjects)}
    rows = [{**MMLU[0], "subject": subject} for subject, size in sizes.items() for _ in range(size)]
    (tmp_path / "mmlu_test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for limit, each in ((None, 3), (1, 1), (25, 1), (26, 2), (100, 3)):
        expected = sum(min(each, size) for size in sizes.values())
        assert PriorTasks(["mmlu_other"], limit, tmp_path).counts() == {"mmlu_other": expected}
    assert evaluate(model, tmp_path, "mmlu_other", limit=26).n == sum(min(2, size) for size in sizes.values())


def test_humaneval_is_left_out_of_the_default_tasks(monkeypatch: pytest.MonkeyPatch, model: Any, mirror: Path) -> None:
    monkeypatch.setattr(tasks, "DEFAULT_TASKS", ("winogrande", "humaneval"))
    scores = scores_of(model, PriorTasks(data_mirror=mirror))
    assert set(scores) == {"winogrande"}
    assert "left out" in scores.notes[0]


def test_only_a_newline_ends_a_row(tmp_path: Path) -> None:
    rows = [{**WINOGRANDE[0], "option1": text} for text in ("a\x85b", "c\u2028d")]
    path = tmp_path / "rows.jsonl"
    path.write_text("\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8", newline="")
    assert list(read_rows(path, WinoGrande)) == rows


def test_what_is_missing_is_said(model: Any, mirror: Path, tmp_path: Path) -> None:
    with pytest.raises(RazorError, match="No prior task"):
        scores_of(model, PriorTasks([]))
    with pytest.raises(RazorError, match="at least 1"):
        evaluate(model, mirror, "winogrande", limit=0)
    with pytest.raises(RazorError, match="no folder"):
        evaluate(model, tmp_path / "nowhere", "winogrande")
    with pytest.raises(RazorError, match=r"winogrande_validation.jsonl: one JSON object per line with sentence"):
        evaluate(model, tmp_path, "winogrande")
    (tmp_path / "hellaswag_validation.jsonl").write_text('{"ctx_a": "x"}')
    with pytest.raises(RazorError, match=r"line 1 lacks activity_label, ctx_b, endings, label"):
        evaluate(model, tmp_path, "hellaswag")
    (tmp_path / "winogrande_validation.jsonl").write_text("")
    with pytest.raises(RazorError, match="empty"):
        evaluate(model, tmp_path, "winogrande")


# --- the items' outcomes


def test_a_score_has_its_items_outcomes_by_names_that_any_model_shares(model: Any, mirror: Path) -> None:
    other = tiny_llama(len(TOKENIZER), max_position_embeddings=2048, scale=0.15, seed=1)
    for task, count in (("hellaswag", 6), ("truthfulqa_mc2", 3)):
        score, again = (evaluate(one, mirror, task) for one in (model, other))
        outcomes = score.items.outcomes[task]
        assert len(outcomes) == count  # though rows of hellaswag are there three times
        assert outcomes.keys() == again.items.outcomes[task].keys()
        assert np.mean(list(outcomes.values())) == pytest.approx(score.value)
        assert stderr(list(outcomes.values())) == pytest.approx(score.stderr)
    assert any(0 < outcome < 1 for outcome in outcomes.values())


def test_of_a_group_items_are_those_of_its_tasks_as_lm_eval_weighs_them() -> None:
    from lm_eval.api.metrics import mean

    samples = {
        "a": [{"filter": "none", "doc_id": n, "doc_hash": "h" * 64, "acc": bool(n % 2)} for n in range(4)],
        "b": [{"filter": "none", "doc_id": 0, "doc_hash": "k" * 64, "acc": True}],
    }
    samples["a"].append({**samples["a"][0], "filter": "other", "acc": True})

    def items(value: float, by_size: bool, aggregation: Any = mean) -> Any:
        leaf = SimpleNamespace(aggregation=lambda: {"acc": aggregation})
        listed = SimpleNamespace(aggregate_metric_list=[SimpleNamespace(metric="acc", weight_by_size=by_size)])
        task = Task("g", {"tasks": {"a": leaf, "b": leaf, "c": leaf}, "groups": {"g": listed}})
        assert task.weighs_by_size("acc") is by_size
        return prior._outcomes(task, samples, "acc", "none", by_size, value)

    for found in (items(0.6, True), items(0.75, False)):
        assert {name: list(of.values()) for name, of in found.items()} == {"a": [0, 1, 0, 1], "b": [1]}
    assert len({name for of in found.values() for name in of}) == 5
    assert items(0.75, True) == {}  # whatever it is, it is not their mean
    assert items(0.6, True, aggregation=max) == {}


def test_a_question_has_its_answers_and_what_the_model_took_for_likely(model: Any, mirror: Path) -> None:
    """Against log-likelihoods by plain forward passes; the likeliest being a right one explains each outcome."""
    score = evaluate(model, mirror, "hellaswag")
    asked = list(score.items.questions["hellaswag"].values())
    for question, row in zip(asked, HELLASWAG, strict=True):
        context = f"{row['activity_label']}: {row['ctx_a']} {str(row['ctx_b']).capitalize()}"
        likely = [log_likelihood(model, context, f" {ending}") / len(ending) for ending in row["endings"]]
        assert question.logprobs == pytest.approx(likely, rel=1e-4)
        assert question.prompt.lower() == context.lower()
        assert (question.choices, question.right) == (tuple(row["endings"]), (int(row["label"]),))
    for task in ("hellaswag", "winogrande", "mmlu_anatomy", "mmlu_virology"):
        score = evaluate(model, mirror, task)
        for name, question in score.items.questions[task].items():
            assert len(question.choices) == len(question.logprobs) == (2 if task == "winogrande" else 4)
            assert score.items.outcomes[task][name] == float(int(np.argmax(question.logprobs)) in question.right)
    winogrande = next(iter(evaluate(model, mirror, "winogrande").items.questions["winogrande"].values()))
    assert winogrande.prompt == "The cat met the dog and _ was glad."  # what is before the options, and after them
    assert winogrande.choices == ("cat", "dog")


def test_of_what_is_no_choice_only_the_prompt_is_told(model: Any, mirror: Path, says: Any) -> None:
    mass = next(iter(evaluate(model, mirror, "truthfulqa_mc2").items.questions["truthfulqa_mc2"].values()))
    assert mass.right == ()  # its score is a mass, not the likeliest
    assert mass.choices == ("yes it is", "it is", "no")
    assert mass.prompt.endswith("Q: Is 0 odd?\nA:")
    says("no commas in here")
    told = next(iter(evaluate(model, mirror, "ifeval").items.questions["ifeval"].values()))
    assert (told.choices, told.logprobs, told.prompt) == ((), (), "Say 0 without commas.")


def test_a_groups_tasks_are_in_its_groups() -> None:
    class Group(list[Any]):
        name = "g_stem"

        def get_all_tasks(self) -> list[Any]:
            return [SimpleNamespace(task_name="a"), SimpleNamespace(task_name="b")]

    leaves = dict.fromkeys("abc", SimpleNamespace())
    within = Task("g", {"tasks": leaves, "groups": {"g": [Group(), SimpleNamespace(task_name="c")]}})
    assert within.categories == {"a": "g_stem", "b": "g_stem", "c": "c"}
    assert Task("a", {"tasks": {"a": SimpleNamespace()}, "groups": {}}).categories == {}


def test_a_score_of_a_whole_corpus_has_no_items(model: Any, tmp_path: Path) -> None:
    assert score_of(model, own_task(tmp_path, metric("brier_score", "false", "brier_score"))).items.outcomes == {}
    code = "def aggregate(items):\n    return 0.5\n\n" + SCORES + "{'rate': 0.5}"
    own = score_of(model, own_task(tmp_path, metric("rate", "true", "!function o_code.aggregate"), "o", code=code))
    assert own.items.outcomes == {}


# --- whether more or less is better, and in what unit


def score_of(model: Any, task: str) -> Score:
    return scores_of(model, PriorTasks([task]))[task]


def test_of_a_brier_score_less_is_better_and_it_is_no_fraction(model: Any, tmp_path: Path) -> None:
    task = own_task(tmp_path, metric("brier_score", "false", "brier_score"))
    assert PriorTasks([task]).metrics() == {task: Metric("brier_score", False)}
    score = score_of(model, task)
    errors = []
    for n in range(12):
        share = torch.tensor([log_likelihood(model, f"a{n}:", f" {choice}") for choice in "bcd"]).softmax(0)
        errors.append(float((share - torch.eye(3)[n % 3]).square().sum()))
    assert score.value == pytest.approx(np.mean(errors), rel=1e-4)
    assert (score.higher_is_better, score.is_fraction) == (False, False)
    with pytest.raises(RazorError, match="is scored by brier_score, of which less is better"):
        require_accuracies({task: score})
    # Where the task does not say it, lm-eval knows it of its own metrics.
    silent = own_task(tmp_path, metric("brier_score", None, "brier_score"), "silent")
    assert PriorTasks([silent]).metrics()[silent].higher_is_better is False


def test_a_unit_is_known_by_the_metrics_name_or_by_its_values(model: Any, tmp_path: Path) -> None:
    code = SCORES + "{'rate': 0.25, 'error': 0.5, 'word_perplexity': 0.5, 'points': 40.0}"
    found = {}
    for name, higher in (("rate", "true"), ("error", "false"), ("word_perplexity", "false"), ("points", "true")):
        found[name] = score_of(model, own_task(tmp_path, metric(name, higher), name, code=code))
    assert {name: (one.higher_is_better, one.is_fraction) for name, one in found.items()} == {
        "rate": (True, True),
        "error": (False, True),
        "word_perplexity": (False, False),
        "points": (True, False),
    }
    named = ("bits_per_byte", "bleu", "bleurt", "chrf++", "mcc", "ter", "likelihood_diff", "eval_loss", "ppl")
    assert not any(Metric(name, True).is_fraction for name in named)
    assert all(Metric(name, True).is_fraction for name in ("acc", "f1", "pass@1", "bleu_acc", "glossary"))
    assert all(Metric(name, False).is_fraction for name in ("error", "error_rate", "wer", "pct_stereotype"))
    unlike = ("mse", "rmse", "mae", "ece", "cross_entropy", "bpb", "kl", "entropy", "latency", "edit_distance")
    assert not any(Metric(name, False).is_fraction for name in unlike)
    require_accuracies({"rate": found["rate"]})
    with pytest.raises(RazorError, match="scored by points, which is not a fraction of 1"):
        require_accuracies({"points": found["points"]})


def test_a_direction_that_is_not_said_is_not_assumed(model: Any, tmp_path: Path) -> None:
    for name, higher in (("unsaid", None), ("quoted", "'false'")):
        task = own_task(tmp_path, metric("oddity", higher), name, SCORES + "{'oddity': 0.5}")
        for ask in (lambda task=task: PriorTasks([task]).metrics(), lambda task=task: score_of(model, task)):
            with pytest.raises(RazorError, match="does not say whether more oddity is better"):
                ask()
    # A task's code may return what the task does not declare.
    task = own_task(tmp_path, metric("declared", "true"), "beside", SCORES + "{'acc': 1.0, 'declared': 0.5}")
    assert score_of(model, task).metric == "declared"
    task = own_task(tmp_path, metric("declared", "true"), "instead", SCORES + "{'acc': 1.0}")
    with pytest.raises(RazorError, match="does not say whether more acc is better"):
        score_of(model, task)


@pytest.mark.parametrize(
    ("declared", "chosen"),
    [
        ([("brier_score", "false"), ("acc", "true")], "acc"),
        ([("error", "false"), ("rate", "true")], "rate"),
        ([("bleu", "true"), ("rate", "true")], "rate"),
        ([("oddity", None), ("rate", "true")], "rate"),
        ([("likelihood_diff", "false"), ("error", "false")], "likelihood_diff"),
    ],
)
def test_the_score_is_a_fraction_of_which_more_is_better_where_there_is_one(
    model: Any, tmp_path: Path, declared: list[tuple[str, str | None]], chosen: str
) -> None:
    code = SCORES + str({name: 0.5 for name, _ in declared})
    task = own_task(tmp_path, "\n".join(metric(*one) for one in declared), code=code)
    assert PriorTasks([task]).metrics()[task].metric == score_of(model, task).metric == chosen


def test_a_group_has_a_direction_where_its_tasks_agree() -> None:
    """lm-eval's results have none for a group of groups."""

    def leaf(**metrics: bool | None) -> Any:
        return SimpleNamespace(higher_is_better=lambda: metrics)

    def group(*leaves: Any) -> Any:
        metrics = [SimpleNamespace(metric="error")]
        within = {"tasks": {str(n): one for n, one in enumerate(leaves)}}
        return Task("g", {**within, "groups": {"g": SimpleNamespace(aggregate_metric_list=metrics)}})

    assert group(leaf(error=False, acc=True), leaf(error=False), leaf(acc=True)).declared == Metric("error", False)
    for differing in ([leaf(error=False), leaf(error=True)], [leaf(error=True), leaf(error=None)], [leaf(acc=True)]):
        with pytest.raises(RazorError, match=r"in g, or the tasks in it disagree"):
            _ = group(*differing).declared
    only_collects = Task("g", {"tasks": {"a": leaf(acc=True)}, "groups": {"g": group().content["groups"]["g"]}})
    only_collects.content["groups"]["g"].aggregate_metric_list = None
    with pytest.raises(RazorError, match=r"g has no score of its own\. Name its tasks: a"):
        _ = only_collects.declared


@pytest.mark.parametrize("value", ["float('nan')", "float('inf')"])
def test_a_score_that_is_no_number_is_an_error(model: Any, tmp_path: Path, value: str) -> None:
    task = own_task(tmp_path, metric("rate", "true"), code=SCORES + f"{{'rate': {value}}}")
    with pytest.raises(NotANumberError, match=r"own scored (nan|inf) \(rate\), which is no number"):
        score_of(model, task)


def test_a_standard_error_that_a_task_has_not_is_unknown(model: Any, tmp_path: Path) -> None:
    code = "def aggregate(items):\n    return 0.5\n\n" + SCORES + "{'rate': 0.5}"
    without = score_of(model, own_task(tmp_path, metric("rate", "true", "!function own_code.aggregate"), code=code))
    assert without.stderr is None
    known = Score(0.5, 0.03, 7, "acc", "1")
    assert PriorScores({"a": known, "b": without}).stderr is None
    assert PriorScores({"a": known, "b": known}).stderr == pytest.approx(0.03 / math.sqrt(2))
    assert stderr_of_mean([]) is None


# --- what a task's own code and data raise


def test_what_a_task_raises_names_it_and_keeps_the_cause(model: Any, tmp_path: Path) -> None:
    code = "def process(doc, results):\n    raise ValueError('cannot score:\\n\\n  no such column')"
    with pytest.raises(
        RazorError, match=r"evaluate own on this model: ValueError: cannot score: no such col"
    ) as caught:
        score_of(model, own_task(tmp_path, metric("rate", "true"), code=code))
    assert type(caught.value.__cause__) is ValueError
    exhausted = "import torch\n\ndef process(doc, results):\n    raise torch.OutOfMemoryError('CUDA out of memory')"
    with pytest.raises(RazorError, match="Out of memory while evaluating the prior tasks"):
        score_of(model, own_task(tmp_path, metric("rate", "true"), "big", exhausted))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("no route"), "hub cannot be reached"),
        (OSError(28, "No space left on device"), r"cannot be read or kept: \[Errno 28\] No space left on device\.$"),
        (ValueError("bad split:\n\n  'tests'"), r"cannot build the task .*: ValueError: bad split: 'tests'\.$"),
    ],
)
def test_why_data_are_missing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    import datasets

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(RazorError, match=message):
        PriorTasks([own_task(tmp_path, metric("acc", "true"))]).metrics()
