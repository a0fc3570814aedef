"""What a dry run says a sweep would take, and the word before hours of training where every answer scores alike."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlrazor.cli import main
from rlrazor.cli.running import counts_in_words, in_words
from rlrazor.experiments.language import cost, tiny
from rlrazor.experiments.language.config import PRESETS
from rlrazor.experiments.language.cost import Seconds, Timing, kind_of
from rlrazor.experiments.language.demonstrations import Prompts
from rlrazor.experiments.language.evaluate import Asked, Reference
from rlrazor.experiments.language.experiment import Language
from rlrazor.experiments.language.methods import find_method
from rlrazor.experiments.language.setup import TaskSource
from rlrazor.experiments.language.suites import PriorSuite
from rlrazor.experiments.language.tasks import Form, Item, Splits, Task
from rlrazor.lm.models import LanguageModel
from rlrazor.lm.probes import GenericText
from rlrazor.lm.scores import Score
from rlrazor.runs.dry_run import Counts, DryRun, Measured, estimate, planned
from rlrazor.runs.experiment import Cost, Phase
from rlrazor.runs.records import BASE
from rlrazor.system import cores, phases
from tiny_models import char_tokenizer, tiny_llama


def test_seconds_are_counts_times_what_was_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(PRESETS["tiny"], seeds=(0, 1), batch_sizes=(8,), rl_prompts=2, group_size=4)
    bases, offline, on_policy = (config.base_specs("b", "d"), config.specs("b", "d", ["sft-one"]), [])
    on_policy = config.specs("b", "d", ["grpo"])
    sft, grpo = (kind_of(find_method(name)[0], penalised=False) for name in ("sft-one", "grpo"))
    assert kind_of(find_method("oracle")[0], penalised=False) == sft != kind_of(find_method("sft")[0], penalised=True)
    # What samples counts as RL does, and what looks at a second model as a kind of its own.
    assert kind_of(find_method("self-sft")[0], penalised=False) == grpo
    assert kind_of(find_method("lwf")[0], penalised=False) not in (sft, grpo)
    timing = Timing(Seconds({sft: 0.5, grpo: 2.0}, measurement=7.0, reference=11.0, pretraining=13.0))
    counts = {BASE: Cost(0, 1), "sft-one": Cost(100, 3), "grpo": Cost(10, 2)}
    monkeypatch.setattr(Language, "cost", lambda _, spec: counts[spec.method])
    monkeypatch.setattr(cost, "time_trial", lambda *_: timing)
    assert (len(offline), len(on_policy), {spec.method for spec in bases}) == (8, 8, {BASE})
    monkeypatch.setattr(cores, "available", lambda: 16)

    def seconds(jobs: int, threads: int) -> float:
        own, phases = replace(config, threads=threads), [Phase("all", [*bases, *offline, *on_policy])]
        found = estimate(Language("tiny", TaskSource("letters")), own, phases, jobs=jobs)
        assert found.measured is not None
        return found.measured.seconds

    # Of SFT 8 sequences an update, of GRPO 2 prompts with 4 samples each.
    whole = 2 * (13 + 7) + 8 * (100 * 8 * 0.5 + 3 * 7) + 8 * (10 * 8 * 2.0 + 2 * 7)
    assert seconds(jobs=1, threads=1) == pytest.approx(whole + 2 * 11)
    # Each worker, and the one that measured the bases, has to have the base's side once.
    assert seconds(jobs=4, threads=1) == pytest.approx((whole + 2 * 5 * 11) / 4)
    # More processes than cores for their threads are no faster.
    assert seconds(jobs=4, threads=8) == pytest.approx((whole + 2 * 5 * 11) / 2)


def test_a_run_that_begins_a_longer_one_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """With epochs 1,2 the longer run alone is trained, and its checkpoints are the shorter one's too."""
    timing = Timing(
        Seconds({kind_of(find_method("sft-one")[0], penalised=False): 0.5}, measurement=7.0, reference=11.0)
    )
    monkeypatch.setattr(cost, "time_trial", lambda *_: timing)
    config = replace(PRESETS["tiny"], methods=("sft-one",), lrs=(1e-3,), batch_sizes=(8,), max_steps=0, warmup_steps=9)
    experiment = Language("tiny", TaskSource("letters"))
    two, both = (
        estimate(experiment, own, planned(experiment, own))
        for own in (replace(config, epochs=(2,)), replace(config, epochs=(1, 2)))
    )
    assert two.measured is not None
    assert both.measured is not None
    assert both.measured.seconds == two.measured.seconds
    assert both.counts == replace(two.counts, runs=two.counts.runs + 1)


def test_memory_grows_with_what_is_at_a_time_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tried were 4 sequences, whose activations were 400 bytes; a step of 64 has 6,400, in micro-batches of 8 800."""
    config = replace(PRESETS["tiny"], batch_sizes=(4,))
    spec = config.specs("b", "d", ["sft-one"])[0]
    monkeypatch.setattr(cost, "_peak", lambda: 1000 + 4 * 3 * 10 + 400)
    clock, real = cost._Clock(loaded=1000), replace(config, batch_sizes=(64,))
    assert clock.bytes_for(spec, real, 10, None) - 1000 - 120 == 6400
    assert clock.bytes_for(spec, real, 10, 8) - 1000 - 120 == 800


def test_a_dry_run_measures_time_memory_and_disk(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "PRETRAINING", 4)
    out = tmp_path / "out"
    command = ["calibrate", "tiny", "--task", "letters", "--lrs", "1e-3,1e-4", "--max-steps", "20", "--out", str(out)]
    command += ["--test-prompts", "16", "--kl-samples", "1", "--dry-run", "--jobs", "1"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)["estimate"]
    assert (found["runs"], found["steps"], found["checkpoints"]) == (3, 40, 17)
    assert 1 < found["seconds"] < 3600
    assert 0 < found["error"] < 10
    assert 2e8 < found["memory_bytes"] < 2e10
    weights = 4 * sum(weight.numel() for weight in tiny.make_model(0).parameters())
    assert weights < found["disk_bytes"] < 3 * weights  # the base, which is pre-trained here, and small files
    assert found["passing_bytes"] == 2 * 3 * weights  # weights and two moments, the old ones until the new are there
    assert "4 updates of 64 sequences by sft" in found["timed"]
    assert found["missing"] == ""
    assert not out.exists()


def test_without_the_base_a_dry_run_counts_and_says_what_is_missing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "time_trial", lambda *_: pytest.fail("tried"))
    for command in (
        ["calibrate", "nobody/nothing", "--task", "letters"],
        ["sweep", "--base", "nobody/nothing", "--task", "letters"],
        ["finetune", "./nowhere", "--task", "letters", "--method", "sft", "--lr", "1e-4"],
    ):
        assert main([*command, "--dry-run", "--out", str(tmp_path / "out")]) == 0
        said = " ".join(capfd.readouterr().out.split())
        assert "updates" in said
        assert "were not measured: the base" in said
        assert "is not on this machine" in said
    assert not (tmp_path / "out").exists()


def test_an_estimate_in_words() -> None:
    measured = Measured(7200.0, 0.3, 2_100_000_000, 3_000_000, 1_600_000_000, "4 updates")
    found = DryRun(Counts(3, 2, 1200, 17), measured)
    assert counts_in_words(found) == "3 runs, 1,200 updates, 17 checkpoints measured."
    assert in_words(found, Path("out"), 2) == (
        "About 2 h 0 min, give or take 30 %, with 2 jobs on this machine; 2.1 GB of memory a job; 3 MB of disk in out, "
        "and up to 1.6 GB while it trains (--save-every 0: none).\nTimed: 4 updates."
    )


@pytest.mark.parametrize(("score", "said"), [(0.0, "all score 0"), (1.0, "all score 1"), (None, "")])
def test_answers_that_all_score_alike_are_said_before_hours_of_training(score: float | None, said: str) -> None:
    tokenizer, model = char_tokenizer(), tiny_llama()
    base = LanguageModel.in_memory(model.requires_grad_(False), tokenizer, "base")
    items = [Item(f"{letter}=", {"wanted": letter}, demonstration="ddd") for letter in "abcd"]

    def verify(prompt: str, completion: str, *, wanted: str) -> float:
        return float(wanted == "a") if score is None else score

    task = Task("own", "own", "", lambda path: Splits(items, items), verify, Form(3, chat=False))
    text = GenericText(("some text", "and more"))
    suite = PriorSuite(
        lambda lm: {"a": Score(0.5, None, 4, "acc", "1")}, text, text.texts, ("ab", "cd", "ef", "abc") * 4
    )
    reference = Reference(base, [Asked(base, task, Prompts.of(task, items, base), suite, 1, "greedy")], suite)
    heard: list[str] = []
    ignored: Any = lambda *_: None  # noqa: E731
    with phases.heard(ignored, heard.append):
        reference.base_checkpoint("base")
        for step in (5, 10):
            reference.checkpoint("run", step, 0.5, tiny_llama(seed=2), frozen=model)
    if score is None:
        assert heard == []
        return
    first, second = heard  # the base, and the first checkpoint, once
    assert first.startswith(f"The base's answers to the new task {said}: to the prompt that ends in 'a=' it says '")
    assert "where 'ddd' is right" in first
    assert second.startswith(f"After 5 updates too, all answers to the new task {said}.")
    assert "verifier" in first
    assert ("--max-new-tokens" in first) is (score == 0)
