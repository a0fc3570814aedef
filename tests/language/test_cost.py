"""What a dry run says a sweep would take, and the word before hours of training where every answer scores alike."""

import json
import random
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest

from rlrazor.cli import main
from rlrazor.cli.running import counts_in_words, in_words
from rlrazor.experiments.language import cost, protection, rehearsal, sequences, tiny
from rlrazor.experiments.language.config import PRESETS
from rlrazor.experiments.language.cost import Seconds, Timing, kind_of
from rlrazor.experiments.language.demonstrations import Prompts
from rlrazor.experiments.language.evaluate import Asked, Reference
from rlrazor.experiments.language.experiment import Language
from rlrazor.experiments.language.lesson import Lesson
from rlrazor.experiments.language.methods import METHODS, find_method
from rlrazor.experiments.language.setup import Setup, TaskSource
from rlrazor.experiments.language.stages import Models
from rlrazor.experiments.language.suites import PriorSuite
from rlrazor.experiments.language.tasks import Form, Item, Splits, Task
from rlrazor.experiments.language.trainers import Example
from rlrazor.lm.models import LanguageModel
from rlrazor.lm.probes import GenericText
from rlrazor.lm.scores import Score
from rlrazor.runs import dry_run
from rlrazor.runs.dry_run import Counts, DryRun, Measured, estimate, planned
from rlrazor.runs.experiment import Cost, Phase
from rlrazor.runs.records import BASE, Ancestor
from rlrazor.system import cores, phases
from tiny_models import char_tokenizer, tiny_llama


def test_seconds_are_counts_times_what_was_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(PRESETS["tiny"], seeds=(0, 1), batch_sizes=(8,), rl_prompts=2, group_size=4)
    bases, offline, on_policy = (config.base_specs("b", "d"), config.specs("b", "d", ["sft-one"]), [])
    on_policy = config.specs("b", "d", ["grpo"])
    sft, grpo = (kind_of(find_method(name)[0], penalised=False) for name in ("sft-one", "grpo"))
    assert kind_of(find_method("oracle")[0], penalised=False) == sft != kind_of(find_method("sft")[0], penalised=True)
    assert kind_of(find_method("self-sft")[0], penalised=False) == sft  # once its samples are drawn
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


SFT = kind_of(find_method("sft")[0], penalised=False)
TINY = replace(PRESETS["tiny"], methods=("sft",), lrs=(1e-3,), batch_sizes=(24,), max_steps=10, replay_share=0.1)


def seconds(found: Timing, method: str, prompts: int = 95, **settings: Any) -> float:
    """Of one run of ten updates, of 24 sequences unless the settings say otherwise, but for its measurements."""
    (spec,) = replace(TINY, methods=(method,), **settings).specs("b", "d", [method])[:1]
    setup = Setup("tiny", TaskSource("letters"))
    return cost.seconds_of(found, setup, lambda spec: prompts, spec, Cost(10, 0))


def test_what_holds_to_old_examples_adds_as_much_to_small_updates_as_to_large_ones() -> None:
    """Of four sequences plain ones took 4 s, and 16 with LwF's eight old examples: of 24 they take 24, and 36."""
    found = Seconds()
    cost._updated(found, SFT, "", 4.0, 4)
    cost._updated(found, SFT, "lwf", 16.0, 4)
    for size in (4, 24):
        assert seconds(Timing(found), "sft", batch_sizes=(size,)) == pytest.approx(10 * size)
        assert seconds(Timing(found), "lwf", batch_sizes=(size,)) == pytest.approx(10 * (size + 12))


def test_an_update_takes_longer_where_an_old_example_is_in_it() -> None:
    """All of its sequences are padded to that one's length: counted over updates drawn at random."""
    found = Seconds({SFT: 1.0}, old={rehearsal.WRITING: 5.0})
    cost._updated(found, SFT, "self-replay", 4 * 7.0, 4)
    rng = random.Random(0)
    with_old = fmean(any(rng.random() < 0.1 for _ in range(24)) for _ in range(20_000))
    expected = 10 * 24 * (1 + (7 - 1) * with_old)
    assert seconds(Timing(found), "self-replay") == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("base", ["somewhere", "tiny"])
def test_a_stage_replays_what_was_before_it(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many updates as the examples make that a run is given; the tiny base has old ones before any stage."""
    monkeypatch.setattr(Lesson, "of", lambda *_: SimpleNamespace(examples=lambda *_: ([Example([1], [2])] * 5, {})))
    world: Any = SimpleNamespace(base=SimpleNamespace(tokenizer=tiny.make_tokenizer(), model=tiny.make_model(0)))
    tasks = ("ascending", "descending")
    config = replace(
        sequences.PRESETS["tiny"], base=base, tasks=tasks, methods=("replay",), max_steps=0, epochs=(1,),
        batch_sizes=(8,), train_prompts=128, replay_share=0.5, prior=("tiny",) if base == "tiny" else ("hellaswag",),
    )  # fmt: skip
    one, other = (TaskSource(name) for name in tasks)
    experiment = Models(base, one, further=(other,))
    first = config.stage("replay", 1e-3, tasks[:1], Ancestor(config.base_specs("b", "d")[0], 0))
    second = config.stage("replay", 1e-3, tasks[1:], Ancestor(first, 16))
    for spec, expected in ((first, 0 if base == "somewhere" else 128), (second, 128)):
        old, _ = protection.old_examples(experiment, world, spec, METHODS["replay"], world.base, 128)
        assert len(old) == expected
        assert experiment.cost(spec).steps == (128 + len(old)) // 8


def test_what_a_policy_writes_is_counted_once_for_the_runs_that_share_it() -> None:
    config = replace(TINY, methods=("self-replay", "lwf", "ewc"), lrs=(1e-3, 1e-4))
    found = Timing(Seconds({SFT: 0.0}, old={rehearsal.WRITING: 5.0, protection.MEASURING: 0.5}, reference=11.0))
    setup = Setup("tiny", TaskSource("letters"))
    trial = cost.trial_of(found, config, setup, lambda spec: 90)
    specs = config.specs("b", "d", config.methods)
    assert len(specs) == 6
    # 10 of 100 examples are old; LwF goes round 128. The base's side, and each of the two, once in one process.
    assert dry_run._once(trial, specs, 1) == pytest.approx(11 + (10 + 128) * 5)
    assert dry_run._once(trial, specs, 3) == pytest.approx(3 * 11 + 2 * (10 + 128) * 5)  # two runs need them
    # What EWC measures weights by, each of its runs does.
    assert seconds(found, "ewc") == pytest.approx(256 * 0.5)
    file = replace(setup, task=TaskSource("letters", old=Path("old.txt")))
    assert dry_run._once(cost.trial_of(found, config, file, lambda spec: 90), specs, 1) == pytest.approx(11 + 10 * 5)


def test_samples_that_are_drawn_before_training_are_counted() -> None:
    """For each right one as many as it takes, up to --own-tries; of rejection sampling sixteen of each prompt."""
    found = Timing(Seconds({SFT: 0.0}, sample=0.01), right=0.25, tries={"optimal": 16})
    assert seconds(found, "self-sft") == pytest.approx(10 * 24 * 4 * 0.01)
    assert seconds(found, "self-sft", own_tries=2) == pytest.approx(10 * 24 * 2 * 0.01)
    assert seconds(found, "oracle") == pytest.approx(95 * 16 * 0.01)
    assert seconds(found, "sft") == 0


def test_one_method_of_each_kind_is_tried_and_plain_ones_first() -> None:
    tried = cost.to_try(["lwf", "self-sft", "sft-one", "grpo", "self-replay"], demonstrated=True)
    assert list(tried.values()) == ["sft", "grpo", "lwf", "self-replay"]
    assert list(cost.to_try(["self-sft"], demonstrated=False).values()) == ["reinforce"]
    assert list(cost.to_try(["self-sft", "sft-one"], demonstrated=False).values()) == ["sft-one"]


def test_a_trial_measures_once_and_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the methods; and no more than it says of the texts, those that the base writes among them."""
    monkeypatch.setattr(cost, "PRETRAINING", 4)
    measured: list[str] = []
    original = Reference.measure

    def measure(self: Reference, *args: Any) -> Any:
        measured.append("a policy")
        return original(self, *args)

    monkeypatch.setattr(Reference, "measure", measure)
    methods = ("sft", "grpo", "lwf", "self-replay", "self-sft")
    config = replace(TINY, methods=methods, rl_prompts=2, group_size=2, test_prompts=4, kl_samples=1, train_prompts=95)
    experiment = Language("tiny", TaskSource("letters"))
    found = experiment.timing(config)
    assert len(measured) == 2  # the base, which is pre-trained here, and one checkpoint
    assert {"lwf"} == set(found.seconds.term)
    assert set(found.seconds.old) == {rehearsal.WRITING}
    assert min(found.seconds.sample, found.seconds.old[rehearsal.WRITING], *found.seconds.update.values()) > 0
    assert 0 < found.right < 1


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
