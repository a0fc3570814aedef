"""Whole runs through the command line: the tiny sweep, one's own task on a local model, and what goes wrong."""

import json
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal
from safetensors import SafetensorError

from own_tasks import SCORES, metric, own_task
from rlrazor.cli import main
from rlrazor.cli.printing import records_table
from rlrazor.errors import RazorError
from rlrazor.experiments.language import cost, evaluate, suites, tiny, trainers, world
from rlrazor.experiments.language import unfinished as unfinished_runs
from rlrazor.experiments.language.unfinished import Unfinished, save_model
from rlrazor.lm.adapters import weights_of
from rlrazor.lm.models import LanguageModel, load
from rlrazor.lm.prior import PriorTasks
from rlrazor.lm.probes import GenericText
from rlrazor.lm.scores import NotANumberError, Score
from rlrazor.report import drawing
from rlrazor.runs import items
from rlrazor.runs.records import Record
from rlrazor.runs.store import Checkpoint
from rlrazor.runs.sweep import DivergedError
from tiny_models import char_tokenizer, saved, tiny_llama

pytestmark = [
    pytest.mark.usefixtures("undrawn"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

SWEEP = [
    *("reproduce", "language", "--preset", "tiny", "--pretrain-steps", "5", "--max-steps", "2"),
    *("--checkpoints-per-epoch", "2", "--train-prompts", "64", "--test-prompts", "8", "--kl-samples", "2"),
    *("--group-size", "4", "--rl-prompts", "2", "--batch-sizes", "4", "--lrs", "1e-3", "--rl-lrs", "1e-3"),
    *("--methods", "sft-one,oracle,rl-distilled,simpo,reinforce,grpo,kl-dpg", "--seeds", "0"),
]
VERIFIER = """
import os, sys
print("said at import")
def verify(prompt, completion, wanted, **columns):
    print("said in a call")
    if wanted == "broken":
        sys.exit(0)
    if wanted == "deadly":
        os._exit(0)
    return float(completion[:1] == wanted)
"""


def results_of(out: Path) -> dict[str, bytes]:
    """Every file of the runs and the table, but for the wall times."""
    names = ("records.jsonl", "items.parquet", "spec.json")
    files = [*(path for name in names for path in out.glob(f"runs/*/{name}")), out / "records.parquet"]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sweep") / "one"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "save", lambda *arguments, **options: None)
        assert main([*SWEEP, "--jobs", "1", "--out", str(out)]) == 0
    return out


def test_the_sweep_measures_every_checkpoint(swept: Path) -> None:
    table = pl.read_parquet(swept / "records.parquet")
    tuned = table.filter(pl.col("method") != "base")
    assert table.filter(pl.col("method") == "base")["forgetting"].to_list() == [0.0]
    assert tuned.group_by("method").len()["len"].to_list() == [2] * 7
    kls = ["kl_forward", "kl_reverse", "kl_probe", "kl_optimal"]
    # The first step of a warm-up moves nothing, nor does RL on a base that is never right.
    moved = tuned.filter(pl.col("step") == 2, pl.col("method").is_in(["sft-one", "oracle", "simpo"]))
    for name in [*kls, "weight_l2"]:
        assert (moved[name] > 0).all()
    assert tuned.filter(pl.col("method") == "kl-dpg")["reward"].is_between(0, 1).all()
    # `new` is the exact expected accuracy here; the mean over 16 samples is near it.
    assert tuned["new"].to_list() == tuned["new_expected"].to_list()
    config = json.loads((swept / "config.json").read_text())
    assert set(config["quadrants"]) == {"sft-one", "simpo", "reinforce", "grpo"}
    assert json.loads((swept / "teachers.json").read_text())[0]["student"] == "rl-distilled"
    page = (swept / "report.html").read_text()
    assert "Three letters in order" in page
    assert "random strings that belong to no task" in page  # what the probes are: not those of images
    assert "1/f noise" not in page
    assert "FashionMNIST" not in page


def test_the_outcomes_of_items_are_those_of_the_scores(swept: Path) -> None:
    table = pl.read_parquet(swept / "records.parquet")
    untuned = table.row(by_predicate=pl.col("method") == "base", named=True)
    for row in table.iter_rows(named=True):
        own = pl.read_parquet(swept / "runs" / row["run_id"] / "items.parquet").filter(pl.col("step") == row["step"])
        assert set(own["prior"]) == {"copy", "reverse", "sort", "next", "unique"}
        for (prior,), of in own.group_by("prior"):
            assert of["item"].n_unique() == len(of) == 256
            assert of["base"].mean() == pytest.approx(untuned[f"prior_{prior}"])
            assert of["tuned"].mean() == pytest.approx(row[f"prior_{prior}"])


def test_what_the_items_ask_is_kept_with_the_base_and_shown(swept: Path) -> None:
    (path,) = swept.glob("runs/*/questions.parquet")
    assert json.loads((path.parent / "spec.json").read_text())["method"] == "base"
    asked = pl.read_parquet(path)
    prompts = {name: [prompt for prompt, _ in examples] for name, examples in tiny.scored_examples().items()}
    for (prior,), of in asked.group_by("prior"):
        by_place = sorted((int(item.split("-")[0]), prompt) for item, prompt in of.select("item", "prompt").rows())
        assert [prompt for _, prompt in by_place] == prompts[str(prior)]
    assert "Which items were lost, and which gained?" in (swept / "report.html").read_text()


def test_items_that_changed_since_the_base_was_scored_are_one_sentence(
    swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(swept, tmp_path / "own")
    original = tiny.scored_examples
    monkeypatch.setattr(
        tiny,
        "scored_examples",
        lambda: {name: [("C:cab=", "cab"), *examples[1:]] for name, examples in original().items()},
    )
    world.last_world.clear()
    assert main([*SWEEP, "--methods", "sft-one", "--lrs", "5e-3", "--jobs", "1", "--out", str(tmp_path / "own")]) == 2
    world.last_world.clear()
    assert "The items of the prior task copy are not those that the base was scored on: 1 of them are new, and 1" in (
        " ".join(capfd.readouterr().err.split())
    )


def test_two_processes_give_the_same_bits(swept: Path, tmp_path: Path) -> None:
    command = [*SWEEP, "--methods", "sft-one,reinforce", "--jobs", "2", "--out", str(tmp_path / "two")]
    assert main(command) == 0
    runs = {name: data for name, data in results_of(tmp_path / "two").items() if name.startswith("runs/")}
    assert len(runs) == 3 * 3
    assert runs.items() <= results_of(swept).items()


def test_the_same_command_trains_nothing_again(swept: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = pl.read_parquet(swept / "records.parquet")
    assert main([*SWEEP, "--jobs", "1", "--out", str(swept), "--json"]) == 0
    out, err = capfd.readouterr()
    assert "0 runs trained, 8 kept" in err
    assert json.loads(out)["experiment"] == "language"
    assert_frame_equal(pl.read_parquet(swept / "records.parquet"), before)


def test_an_interrupted_sweep_goes_on_within_its_runs(
    swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each run is cut at its second step, and goes on from its first checkpoint to the same bits and weights."""
    out = tmp_path / "cut"
    command = [*SWEEP, "--methods", "sft-one,reinforce", "--jobs", "1", "--weights", "all", "--out", str(out)]
    original: Any = trainers.train
    resumed: list[Any] = []
    trained: list[int] = []

    def watched(*arguments: Any, **named: Any) -> None:
        def at_step(step: int, *more: Any) -> None:
            if step == 2 and named["resume"] is None:
                raise KeyboardInterrupt
            trained.append(step)
            arguments[-1](step, *more)

        resumed.append(named["resume"] and named["resume"].name)
        original(*arguments[:-1], at_step, **named)

    monkeypatch.setattr(trainers, "train", watched)
    assert main(command) == 130
    (unfinished,) = (out / ".unfinished").iterdir()
    assert {path.name for path in unfinished.iterdir()} >= {"checkpoint-1", "records.jsonl", "weights-1.safetensors"}
    for step, written in ((2, ""), (3, "{")):  # what a killed process leaves half-written
        (unfinished / f"checkpoint-{step}").mkdir()
        (unfinished / f"checkpoint-{step}" / "trainer_state.json").write_text(written)
    (unfinished / "checkpoint-4").mkdir()
    assert main(command) == 130  # now in the second run
    assert main(command) == 0
    assert resumed == [None, "checkpoint-1", None, "checkpoint-1"]
    assert trained == [1, 2, 1, 2]
    assert not (out / ".unfinished").exists()
    runs = {name: data for name, data in results_of(out).items() if name.startswith("runs/")}
    assert len(runs) == 3 * 3
    assert runs.items() <= results_of(swept).items()
    assert (
        sorted(path.name for path in out.glob("runs/*/weights/*"))[-4:]
        == ["step-000001.safetensors"] * 2 + ["step-000002.safetensors"] * 2
    )
    # With other settings it is another run, which starts from its beginning.
    for lr in ("2e-3", "3e-3"):
        assert main([*command, "--lrs", lr, "--methods", "sft-one"]) == 130
    assert resumed[-2:] == [None, None]


def test_a_run_resumes_from_what_is_whole_or_starts_anew(tmp_path: Path) -> None:
    """Checkpoints without weights do not do where weights are wanted: they would be stored as none."""
    folder = tmp_path / "run"
    unfinished = Unfinished(folder, keep=True)

    def interrupted(*steps: int, weights: dict[str, Any]) -> None:
        (folder / "checkpoint-4").mkdir(parents=True, exist_ok=True)
        (folder / "checkpoint-4" / "trainer_state.json").write_text("{}")
        for step in steps:
            unfinished.add(Checkpoint(Record("r", step, 0.5, 0.1, {"tiny": 0.2}, {}), partial(dict, weights)))

    interrupted(2, 4, 6, weights={"w": torch.ones(1)})
    state, found = unfinished.begin([2, 4, 6], lambda step: True)
    assert (state, list(found)) == (folder / "checkpoint-4", [2, 4])
    assert found[4].weights()["w"].tolist() == [1.0]
    assert unfinished.begin([1, 2, 4, 6], lambda step: False) == (None, {})  # step 1 would never be measured
    interrupted(2, 4, weights={})
    assert list(unfinished.begin([2, 4, 6], lambda step: False)[1]) == [2, 4]
    interrupted(4, weights={"w": torch.ones(1)})
    assert list(unfinished.begin([2, 4, 6], lambda step: step == 4)[1]) == [2, 4]
    assert unfinished.begin([2, 4, 6], lambda step: True) == (None, {})
    assert not folder.exists()


def test_a_run_that_resumes_has_the_outcomes_up_to_there(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    unfinished = Unfinished(folder, keep=True)
    own = pl.DataFrame([{"prior": "a", "task": "a", "item": "1", "base": 1.0, "tuned": 0.0}], schema=items.BESIDE)
    (folder / "checkpoint-4").mkdir(parents=True)
    (folder / "checkpoint-4" / "trainer_state.json").write_text("{}")
    for step, known in ((2, own), (4, None)):
        unfinished.add(Checkpoint(Record("r", step, 0.5, 0.1, {"tiny": 0.2}, {}), items=known))
    _, found = unfinished.begin([2, 4], lambda step: False)
    assert found[2].items is not None
    assert_frame_equal(found[2].items, own)
    assert found[4].items is None
    (folder / "items-2.parquet").write_bytes(b"PAR1")
    with pytest.raises(RazorError, match=r"items-2.parquet is damaged\. Delete .*run to train from the start"):
        unfinished.begin([2, 4], lambda step: False)


def test_weights_that_cannot_be_kept_or_read_back_are_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unfinished = Unfinished(tmp_path / "run", keep=True)
    one = Checkpoint(Record("r", 4, 0.5, 0.1, {"tiny": 0.2}, {}), lambda: {"w": torch.ones(1)})

    def full(weights: dict[str, Any], path: Path) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(unfinished_runs, "save_file", full)
        with pytest.raises(RazorError, match=r"Cannot write to .*: No space left on device"):
            unfinished.add(one)
    unfinished.add(one)
    (tmp_path / "run" / "weights-4.safetensors").write_bytes(b"half")
    (tmp_path / "run" / "checkpoint-4").mkdir()
    (tmp_path / "run" / "checkpoint-4" / "trainer_state.json").write_text("{}")
    with pytest.raises(RazorError, match=r"weights-4.safetensors is damaged\. Delete .*run to train from the start"):
        unfinished.begin([4], lambda step: True)


# A local model and a task of one's own


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = char_tokenizer()
    return saved(tmp_path_factory.mktemp("base"), tiny_llama(len(tokenizer), max_position_embeddings=256), tokenizer)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Say the letter again: 40 prompts of different lengths, and a verifier."""
    folder = tmp_path_factory.mktemp("task")
    rows = [
        {"prompt": f"{'x' * (n % 5)}{letter}{n}=", "completion": letter, "wanted": letter}
        for n, letter in enumerate("abcdefghij" * 4)
    ]
    (folder / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "own.py").write_text(VERIFIER)
    mirror = folder / "mirror"
    mirror.mkdir()
    rows = [{"sentence": f"a {n} _ b", "option1": "cat", "option2": "dog", "answer": str(1 + n % 2)} for n in range(4)]
    (mirror / "winogrande_validation.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [
        *("--task", "own", "--prompts", str(folder / "own.jsonl"), "--verifier", f"{folder / 'own.py'}:verify"),
        *("--prior", "winogrande", "--data-mirror", str(mirror), "--test-prompts", "6", "--max-new-tokens", "4"),
    ]


TRAINING = ["--lr", "1e-2", "--max-steps", "4", "--checkpoints-per-epoch", "2", "--precision", "float32"]
TRAINING += ["--batch-size", "4", "--group-size", "4", "--rl-prompts", "2", "--warmup-steps", "0"]


def finetune(base: Path, task: list[str], out: Path, *more: str) -> int:
    return main(["finetune", str(base), *task, *TRAINING, "--out", str(out), *more])


def records_of(capfd: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capfd.readouterr().out)
    return found


def test_ones_own_task_from_the_prompts_to_the_model(
    base: Path, task: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = weights_of(load(base).model)
    assert finetune(base, task, tmp_path, "--method", "sft", "--json") == 0
    printed = capfd.readouterr()
    assert "base policy: 1 run, 1 checkpoint" in printed.err
    assert "sft: 1 run, 2 checkpoints" in printed.err
    found = json.loads(printed.out)
    assert [record["step"] for record in found["records"]] == [2, 4]
    assert all(record["drift"]["kl_forward"] > 0 for record in found["records"])
    assert found["records"][-1]["metrics"]["prior_loss"] > 0
    assert set(found["base"]["prior"]) == {"winogrande"}
    tuned = load(found["model"])
    assert any((weights_of(tuned.model)[name] != weight).any() for name, weight in before.items())
    # What was written scores what was recorded.
    assert main(["evaluate", found["model"], "--base", str(base), *task, "--json"]) == 0
    again = records_of(capfd)
    last = found["records"][-1]
    assert again["model"]["new"] == last["new"]
    assert again["model"]["drift"]["kl_forward"] == pytest.approx(last["drift"]["kl_forward"], rel=1e-4)
    assert again["base"]["prior"] == found["base"]["prior"]


def test_without_prior_tasks_nothing_is_said_of_forgetting(
    base: Path, task: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """KL to the base is measured as with them; lm-eval is not asked for anything."""
    for name in ("scores", "metrics", "counts"):
        monkeypatch.setattr(PriorTasks, name, Mock(side_effect=AssertionError))
    own = [*task, "--prior", "none"]
    assert finetune(base, own, tmp_path, "--method", "sft", "--dry-run") == 0
    planned = " ".join(capfd.readouterr().out.split())
    assert "prior │ none" in planned
    assert "About " in planned
    assert "of each prior task" not in planned
    assert finetune(base, own, tmp_path, "--method", "sft") == 0
    shown = capfd.readouterr()
    assert "prior, %" not in " ".join(shown.out.split())
    assert "What was forgotten was not measured: there are no prior tasks." in " ".join(shown.out.split())
    assert "nan" not in (shown.out + shown.err).lower()
    assert finetune(base, own, tmp_path, "--method", "sft", "--json") == 0
    found = records_of(capfd)
    assert found["base"]["prior"] == {}
    for record in found["records"]:
        assert record["drift"]["kl_forward"] > 0
        assert record["prior"] == {}
        assert not [name for name in record["metrics"] if name.startswith("prior") and name.endswith("stderr")]
    assert main(["evaluate", found["model"], "--base", str(base), *own, "--json"]) == 0
    assert records_of(capfd)["model"]["drift"]["kl_forward"] > 0
    # What reads such a folder, and what is about forgetting, says one sentence.
    for command in (["report", str(tmp_path)], ["pick", str(tmp_path)]):
        assert main(command) == 2
        err = capfd.readouterr().err
        assert "Traceback" not in err
        assert str(tmp_path) in err.replace("\n", "")
    for command in (["calibrate", str(base), *own[2:]], ["sweep", *own], ["reproduce", "language", *own]):
        assert main([*command, "--out", str(tmp_path / "not")]) == 2
        assert f"razor {command[0]} is about what the prior tasks lose" in " ".join(capfd.readouterr().err.split())
    assert not (tmp_path / "not").exists()
    assert finetune(base, [*task, "--prior", "none,winogrande"], tmp_path, "--method", "sft") == 2
    assert "'none' stands alone" in capfd.readouterr().err


def test_the_tiny_base_without_prior_tasks(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    size = ["--pretrain-steps", "2", "--max-steps", "1", "--checkpoints-per-epoch", "1", "--test-prompts", "4"]
    command = ["finetune", "tiny", "--task", "letters", "--method", "sft-one", "--lr", "1e-3", "--prior", "none", *size]
    assert main([*command, "--out", str(tmp_path / "out"), "--json"]) == 0
    found = records_of(capfd)
    assert [record["prior"] for record in (found["base"], *found["records"])] == [{}, {}]
    assert "kl_probe" in found["records"][0]["drift"]


def test_an_adapter_is_trained_beside_an_unchanged_base(
    base: Path, task: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    method = ["--method", "dr-grpo+kl", "--lora-rank", "2"]
    assert finetune(base, task, tmp_path, *method, "--json") == 0
    found = records_of(capfd)
    assert (Path(found["model"]) / "adapter_model.safetensors").exists()
    kept = next(iter(world.last_world.values()))
    fresh = load(base).model.state_dict()
    assert all((kept.base.model.state_dict()[name] == weight).all() for name, weight in fresh.items())
    assert main(["evaluate", str(base), "--adapter", found["model"], *task, "--json"]) == 0
    again = records_of(capfd)
    assert again["model"]["drift"]["kl_forward"] == pytest.approx(found["records"][-1]["drift"]["kl_forward"], rel=1e-3)


def test_an_interrupted_run_goes_on_where_it_was(
    base: Path, task: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--method", "reinforce", "--save-every", "2", "--json"]
    assert finetune(base, task, tmp_path / "whole", *options) == 0
    whole = records_of(capfd)
    original: Any = trainers.train
    resumed: list[Path] = []

    def killed(*arguments: Any, **named: Any) -> None:
        at_step = arguments[-1]

        def until(step: int, model: Any, measured: Any) -> None:
            if step == 3:
                raise KeyboardInterrupt
            at_step(step, model, measured)

        original(*arguments[:-1], until, **named)

    with monkeypatch.context() as patch:
        patch.setattr(trainers, "train", killed)
        assert finetune(base, task, tmp_path / "cut", *options) == 130
    capfd.readouterr()

    def watched(*arguments: Any, **named: Any) -> None:
        resumed.append(named["resume"])
        original(*arguments, **named)

    monkeypatch.setattr(trainers, "train", watched)
    assert finetune(base, task, tmp_path / "cut", *options) == 0
    assert [path.name for path in resumed] == ["checkpoint-2"]
    assert records_of(capfd)["records"] == whole["records"]
    assert not (tmp_path / "cut" / ".unfinished").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--method", "ppo"], "Unknown method 'ppo'"),
        (["--method", "rl-distilled"], "imitates"),
        (["--method", "sft-two"], "no annotator 'two'"),
        (["--method", "simpo", "--lr", "1e-3,1e-4"], "one run"),
        (["--lr", "fast"], "not a number"),
        (["--micro-batch", "0"], "at least 1"),
        (["--demonstrations", "nowhere.jsonl"], "There is no nowhere.jsonl"),
        (["--prior", "no_such_task"], "no_such_task"),
        (["--prior", "tiny"], "name others with prior"),
    ],
)
def test_bad_options_are_one_sentence(
    base: Path, task: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], options: list[str], sentence: str
) -> None:
    assert finetune(base, task, tmp_path, *options) == 2
    err = capfd.readouterr().err
    assert sentence in err
    assert "Traceback" not in err


def rows_file(folder: Path, rows: list[dict[str, Any]]) -> list[str]:
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "own.py").write_text(VERIFIER)
    return ["--prompts", str(folder / "rows.jsonl"), "--verifier", f"{folder / 'own.py'}:verify"]


def test_items_at_fault_are_counted_and_skipped(
    base: Path, task: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A prompt longer than the context, a missing demonstration, a verifier that exits and prints on one item."""
    rows = [{"prompt": f"{n}=", "completion": "a", "wanted": "a"} for n in range(40)]
    rows += [{"prompt": f"{'y' * 300}{n}=", "completion": "a", "wanted": "a"} for n in range(40, 44)]
    rows += [{"prompt": f"z{n}=", "wanted": "broken" if n < 48 else "a"} for n in range(44, 56)]
    own = [*task, *rows_file(tmp_path, rows), "--test-prompts", "50"]
    assert finetune(base, own, tmp_path / "out", "--method", "sft", "--json") == 0
    metrics = records_of(capfd)["records"][-1]["metrics"]
    assert metrics["prompts_too_long"] > 0
    assert metrics["without_demonstration"] > 0
    assert metrics["unverified"] >= 0


def test_when_nothing_can_be_used_it_is_said(
    base: Path, task: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for rows, method, sentence in (
        ([{"prompt": f"{n}=", "wanted": "a"} for n in range(40)], "sft", "no demonstrations"),
        ([{"prompt": f"{'y' * 300}{n}=", "wanted": "a"} for n in range(40)], "grpo", "No prompt"),
        ([{"prompt": f"{n}=", "wanted": "broken"} for n in range(40)], "grpo", "failed on all"),
        ([{"prompt": f"{n}=", "wanted": "deadly"} for n in range(40)], "grpo", "5 completions in a row"),
        ([{"question": "?"}], "grpo", "prompt"),
    ):
        assert finetune(base, [*task, *rows_file(tmp_path, rows)], tmp_path / method, "--method", method) == 2
        assert sentence in capfd.readouterr().err


def test_a_verifier_that_exits_is_said_before_a_model_is_looked_for(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    own = rows_file(tmp_path, [{"prompt": f"{n}=", "wanted": "a"} for n in range(40)])
    (tmp_path / "own.py").write_text("raise SystemExit(0)", encoding="utf-8")
    for options, sentence in (
        ([], f"razor: The verifier's {tmp_path / 'own.py'} cannot be loaded: SystemExit: 0.\n"),
        (["--verifier-timeout", "0"], "razor: --verifier-timeout is a number of seconds, such as 10, not 0.\n"),
    ):
        for command in (["evaluate", str(tmp_path / "nowhere"), "--task", "own"], ["calibrate", "nowhere"]):
            assert main([*command, *own, *options]) == 2
            assert capfd.readouterr() == ("", sentence)


def test_models_that_do_not_fit_together_are_refused(
    base: Path, task: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = saved(tmp_path / "other", tiny_llama(31), char_tokenizer("abcdefghijklmnopqrstuvwxyz=-:"))
    assert main(["evaluate", str(other), "--base", str(base), *task]) == 2
    assert "different vocabularies" in capfd.readouterr().err
    assert main(["evaluate", str(tmp_path / "nowhere"), *task]) == 2
    assert "There is no" in capfd.readouterr().err


def test_a_model_that_the_disk_does_not_take_is_one_sentence(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = load(base)
    save_model(lm.model, lm.tokenizer, tmp_path / "model")
    kept = (tmp_path / "model" / "model.safetensors").read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing:\n\nNo space left on device (os error 28)")

    monkeypatch.setattr(type(lm.model), "save_pretrained", full)
    with pytest.raises(RazorError, match=r"written to .*model: Error while serializing: No space left on device \(os"):
        save_model(lm.model, lm.tokenizer, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == kept


# Prior tasks of a user's


def test_a_score_of_which_less_is_better_is_refused_before_anything_is_measured(
    base: Path, task: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training would improve it, and a law call that forgetting."""
    brier = own_task(tmp_path, metric("brier_score", "false", "brier_score"))
    bleu = own_task(tmp_path, metric("bleu", "true", "bleu"), "bleu")
    monkeypatch.setattr(PriorTasks, "scores", lambda *_, **__: pytest.fail("measured"))
    where = task.index("--data-mirror")
    own = [*task[2:where], *task[where + 2 :]]
    sweep = ["--methods", "sft", "--lrs", "1e-3", "--jobs", "1", "--out", str(tmp_path / "out")]
    for name, said in ((brier, "brier_score, of which less is better"), (bleu, "bleu, which is not a fraction of 1")):
        for command in (
            ["finetune", str(base), *task[:2], *own, *TRAINING, "--method", "sft", "--out", str(tmp_path / "out")],
            ["sweep", "--base", str(base), *task[:2], *own, *sweep],
            ["reproduce", "language", "--base", str(base), *task[:2], *own, *sweep],
            ["calibrate", str(base), *own, "--lrs", "1e-3", "--out", str(tmp_path / "out")],
            ["evaluate", str(base), *task[:2], *own],
        ):
            assert main([*command, "--prior", name]) == 2, command[0]
            assert f"{name} is scored by {said}" in capfd.readouterr().err
    assert not list(tmp_path.rglob("records.jsonl"))
    assert not (tmp_path / "out" / "law.json").exists()


def test_a_standard_error_that_a_task_has_not_is_left_out(
    base: Path, task: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code = "def aggregate(items):\n    return 0.5\n\n" + SCORES + "{'rate': 0.5, 'acc': float(doc['label'] == 0)}"
    without = own_task(tmp_path, metric("rate", "true", "!function own_code.aggregate"), code=code)
    known = own_task(tmp_path, metric("acc", "true"), "known", code)
    where = task.index("--data-mirror")
    command = ["evaluate", str(base), *task[:where], *task[where + 2 :], "--json", "--prior"]
    assert main([*command, f"{known},{without}"]) == 0
    metrics = records_of(capfd)["model"]["metrics"]
    error = math.sqrt(4 / 12 * 8 / 12 / 11)
    assert metrics[f"prior_{known}_stderr"] == pytest.approx(error)
    assert "prior_stderr" not in metrics
    assert main([*command, known]) == 0
    assert records_of(capfd)["model"]["metrics"]["prior_stderr"] == pytest.approx(error)


def test_a_table_shows_no_error_that_is_not_known() -> None:
    def cells(**metrics: float) -> list[str]:
        table = records_table(Record("base", 0, 0.0, 0.5, {"a": 0.25}, {}, metrics), [])
        return [str(next(iter(column.cells))) for column in table.columns]

    assert cells() == ["base", "50.0", "25.0", "25.0", "—", "—", "—"]
    known = cells(new_greedy_stderr=0.1, prior_a_stderr=0.2, prior_stderr=0.2)
    assert known[1:4] == ["50.0 ± 10.0", "25.0 ± 20.0", "25.0 ± 20.0"]
    assert cells(robust_a=0.75) == ["base", "50.0", "25.0", "75.0", "25.0", "—", "—", "—"]


def test_a_score_that_is_no_number_is_a_run_that_diverged(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scores(lm: LanguageModel) -> dict[str, Score]:
        raise NotANumberError("a scored nan (acc), which is no number.")

    text = GenericText.built_in()
    suite = suites.PriorSuite(scores, text, text.texts[:3], text.texts[:12])
    reference = evaluate.Reference.__new__(evaluate.Reference)
    reference.base, reference.suite = load(base), suite
    with pytest.raises(DivergedError) as caught:
        reference.checkpoint("run", 3, 0.5, reference.base.model)
    assert (caught.value.step, caught.value.epoch) == (3, 0.5)
    with pytest.raises(RazorError, match="a scored nan"):  # of the base it is an error
        reference.base_checkpoint("run")


def test_a_checkpoint_without_a_tokenizer_is_evaluated_with_the_bases(
    base: Path, task: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    load(base).model.save_pretrained(tmp_path / "tuned")
    assert main(["evaluate", str(tmp_path / "tuned"), "--base", str(base), *task, "--json"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["model"]["drift"]["kl_forward"] == pytest.approx(0, abs=1e-6)
    assert "tuned has no tokenizer: the base's is used." in " ".join(err.split())
    assert main(["evaluate", str(tmp_path / "tuned"), *task]) == 2
    assert "tuned has no tokenizer (a Trainer without" in capfd.readouterr().err


def test_tasks_are_listed(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["tasks", "--json"]) == 0
    names = [task["name"] for task in json.loads(capfd.readouterr().out)]
    assert names[:8] == ["math", "gsm8k", "math500", "science", "tools", "letter-word", "multiple", "letters"]
    assert names[8:] == ["letters-descending", "letters-appearance", "ascending", "descending", "appearance"]
    assert main(["finetune", "x", "--task", "chess", "--lr", "1e-3"]) == 2
    assert "There is no task 'chess'" in capfd.readouterr().err


def test_the_plan_is_shown_without_training(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "is_at_hand", lambda base: False)  # timed elsewhere
    assert main(["reproduce", "language", "--dry-run", "--json", "--seeds", "0,1", "--out", str(tmp_path / "x")]) == 0
    plan = json.loads(capfd.readouterr().out)["estimate"]
    # Two bases; 5 offline methods and rl-distilled of 192 steps, 5 on-policy ones of 200, at 4 learning rates each.
    counts = {"runs": 2 + 2 * 11 * 4, "steps": 2 * 4 * (6 * 192 + 5 * 200), "checkpoints": 2 + 2 * 11 * 4 * 8}
    assert plan.items() >= counts.items()
    assert not (tmp_path / "x").exists()
