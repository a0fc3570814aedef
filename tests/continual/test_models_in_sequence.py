"""Sequences of tasks for language models: scores and KL against loops, where stages start, stop and go on from."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal
from rich.console import Console

from rlrazor.cli import main
from rlrazor.errors import RazorError
from rlrazor.experiments.language import tiny, trainers
from rlrazor.experiments.language.evaluate import Scored
from rlrazor.experiments.language.lesson import Lesson
from rlrazor.experiments.language.sequences import PAPER_METHODS, PRESETS, ModelSequences, method_of
from rlrazor.experiments.language.setup import TaskSource
from rlrazor.experiments.language.stage_reference import StageReference
from rlrazor.experiments.language.stages import Models
from rlrazor.experiments.language.tasks import TASKS, Form, Item, Splits, Task
from rlrazor.experiments.language.tasks.letters import FORMS
from rlrazor.experiments.language.world import policy_of, world_of
from rlrazor.lm import probes
from rlrazor.runs import runner
from rlrazor.runs.records import Ancestor, RunSpec
from rlrazor.runs.store import RunStore
from rlrazor.runs.sweep import DivergedError

pytestmark = [
    pytest.mark.usefixtures("undrawn"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
SETTINGS: dict[str, Any] = {"pretrain_steps": 30, "max_steps": 4, "checkpoints_per_epoch": 2, "train_prompts": 128}
SETTINGS |= {"test_prompts": 6, "kl_samples": 2, "group_size": 4, "rl_prompts": 4, "batch_sizes": (8,)}
CONFIG: ModelSequences = replace(
    PRESETS["tiny"], tasks=("ascending", "descending"), methods=("sft-two",), lrs=(1e-3,), rl_lrs=(1e-3,), **SETTINGS
)


def models(config: ModelSequences) -> Models:
    first, *further = (TaskSource(name) for name in config.tasks)
    return Models(config.base, first, further=tuple(further))


def in_order(out: Path, config: ModelSequences) -> tuple[RunStore, list[RunSpec]]:
    """The stages of the first order, finished, with all their weights."""
    experiment = models(config)
    one = runner.Runner(experiment, runner.Options(out, weights="all"), Console(quiet=True))
    rates = {name: config.rates(name)[0] for name in config.methods}
    return one.store, one.finish(experiment.in_order(config, config.tasks, rates, one.store))


def with_runs(out: Path, store: RunStore, *specs: RunSpec) -> RunStore:
    """A folder that has these runs of another one already."""
    (out / "runs").mkdir(parents=True)
    for spec in specs:
        (out / "runs" / spec.run_id).symlink_to(store.runs / spec.run_id)
    return RunStore(out)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunStore, list[RunSpec]]:
    """Two stages of SFT, of 4 steps each."""
    return in_order(tmp_path_factory.mktemp("trained") / "one", CONFIG)


# What is asked


@pytest.mark.parametrize("name", FORMS)
def test_the_tasks_of_a_sequence_are_told_apart_by_their_prompts_alone(name: str) -> None:
    items = {form: TASKS[form].load(None).test for form in FORMS}
    prompts = [{item.prompt for item in TASKS[form].load(None).train} for form in FORMS]
    assert not prompts[0] & prompts[1]
    assert len({item.prompt.partition(":")[2] for of in items.values() for item in of}) == 256  # the same strings
    right: Callable[[str, str], list[str]] = {
        "ascending": lambda text, letters: sorted(letters),
        "descending": lambda text, letters: sorted(letters, reverse=True),
        "appearance": lambda text, letters: sorted(letters, key=text.index),
    }[name]
    correct = TASKS[name].correct
    assert correct is not None
    for item in items[name][:20]:
        text = item.prompt.partition(":")[2][:-1]
        for answer in correct(item):
            assert list(answer) == right(text, answer)
            assert TASKS[name].verify(item.prompt, answer) == 1
        assert TASKS[name].verify(item.prompt, item.rejected) == 0
    assert set(items[name][0].prompt) <= set(tiny.ALPHABET)


def test_the_base_of_a_sequence_sees_all_forms_and_none_that_is_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    rows = tiny._rows

    def noted(examples: Any) -> Any:
        seen.extend(prompt for prompt, _ in examples)
        return rows(examples)

    monkeypatch.setattr(tiny, "_rows", noted)
    tiny.pretrain(0, steps=8, forms=tuple(FORMS))
    begins = {prompt.partition(":")[0] for prompt in seen}
    assert begins == {"C", "R", "S", "N", "U", "PS", "PR", "PC"}
    assert not set(seen) & {item.prompt for form in FORMS for item in TASKS[form].load(None).test}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"tasks": ("ascending", "letters")}, "takes the tasks ascending, descending, appearance"),
        ({"tasks": ("ascending",)}, "A sequence has two tasks or more"),
        ({"task": "ascending"}, "name them with tasks, not with task"),
        ({"methods": ("grpo", "lora")}, "Unknown method 'lora'. Methods: sft, "),
        ({"methods": ("grpo+kl-after",)}, "Unknown method 'grpo.kl-after'"),
        ({"methods": ("grpo", "rl-distilled")}, "imitates a teacher, and a sequence trains none"),
        ({"methods": ("kl-dpg+kl",)}, "kl-dpg.kl looks at the stage before"),
        ({"epochs": (1, 2)}, "A stage has one value of epochs, not 2"),
    ],
)
def test_what_is_no_sequence_is_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(RazorError, match=said):
        replace(CONFIG, **wrong)


def test_the_paper_s_methods_are_known_with_both_penalties() -> None:
    assert len(PAPER_METHODS) == 22
    assert [method_of(name)[1] for name in ("grpo", "grpo+kl", "kl-dpg+kl-before")] == ["", "+kl", "+kl-before"]
    assert replace(CONFIG, methods=PAPER_METHODS).used()


# What is measured


def kl_by_hand(p: Any, q: Any, prompts: list[list[int]], completions: list[list[int]]) -> float:
    """The sum over a completion's positions of KL(p || q), a completion at a time; the mean over them."""
    totals = []
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.tensor([[*prompt, *completion]])
        with torch.no_grad():
            logp, logq = (model.double()(input_ids=ids).logits.log_softmax(-1)[0].numpy() for model in (p, q))
        places = range(len(prompt) - 1, len(prompt) + len(completion) - 1)
        totals.append(sum(float((np.exp(logp[at]) * (logp[at] - logq[at])).sum()) for at in places))
    return float(np.mean(totals))


def test_scores_and_kls_of_a_second_stage_are_those_of_loops(trained: tuple[RunStore, list[RunSpec]]) -> None:
    store, specs = trained
    spec = specs[-1]
    record = store.read(spec).records[-1]
    ours = world_of(models(CONFIG), spec, store)
    base = ours.base.model
    before, now = (policy_of(of, base, store) for of in (spec.chain[-1], Ancestor(spec, record.step)))
    for suffix, origin in (("", base), ("_since_before", before)):
        by_task = {}
        for task, asked in ours.asked.items():
            drawn = asked.complete(replace(ours.base, model=origin.float()), probes.NEW)
            prompts = [list(drawn.prompts[at]) for at in drawn.prompt_of]
            by_task[task] = kl_by_hand(origin, now, prompts, [list(ids) for ids in drawn.completions])
            origin.float(), now.float()
        expected = {"": "descending", "_on_ascending": "ascending", "_on_earlier": "ascending"}
        for on, task in expected.items():
            assert record.drift[f"kl_forward{on}{suffix}"] == pytest.approx(by_task[task], rel=1e-3), (on, suffix)
    assert record.drift["kl_forward"] != pytest.approx(record.drift["kl_forward_since_before"], rel=0.1)
    assert record.drift["kl_forward_on_prior"] == record.drift["kl_probe"]
    for task, asked in ours.asked.items():
        total = 0.0
        for item in asked.test.items:
            assert asked.task.correct is not None
            for answer in asked.task.correct(item):
                ids = torch.tensor([[tiny.ALPHABET.index(one) for one in item.prompt + answer + ";"]])
                with torch.no_grad():
                    logp = now(input_ids=ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
                total += float(logp[len(item.prompt) - 1 :].sum().exp())
        assert record.metrics[f"score_{task}"] == pytest.approx(total / 6, rel=1e-3)
    assert record.new == record.metrics["score_descending"]


def test_a_first_stage_is_as_far_from_the_base_as_from_what_it_starts_from(
    trained: tuple[RunStore, list[RunSpec]],
) -> None:
    store, (first, second) = trained
    for record in store.read(first).records:
        for name in ("kl_forward", "kl_reverse", "kl_forward_on_prior", "kl_forward_on_descending"):
            assert record.drift[f"{name}_since_before"] == record.drift[name]
        assert "kl_forward_on_earlier" not in record.drift
    base = store.read(first.root).records[0]
    assert base.new == pytest.approx((base.metrics["score_ascending"] + base.metrics["score_descending"]) / 2)
    assert second.chain == (Ancestor(first.root, 0), Ancestor(first, store.read(first).records[-1].step))


def test_a_stage_starts_from_the_weights_of_the_one_before(
    trained: tuple[RunStore, list[RunSpec]], tmp_path: Path
) -> None:
    """At a learning rate of almost 0 it stays there, which is far from the base."""
    store, (first, second) = trained
    still = replace(second, params={**second.params, "lr": 1e-12})
    last = [one.record for one in models(CONFIG).train(still, with_runs(tmp_path / "out", store, first.root, first))][
        -1
    ]
    end = store.read(first).records[-1]
    assert last.drift["kl_forward_since_before"] == pytest.approx(0, abs=1e-6)
    assert last.drift["kl_forward_on_ascending"] == pytest.approx(end.drift["kl_forward"], rel=1e-4)
    assert last.drift["kl_forward_on_ascending"] > 0.01
    assert last.metrics["score_ascending"] == pytest.approx(end.metrics["score_ascending"], rel=1e-4)


# How it is trained


def test_a_stage_ends_at_its_first_checkpoint_that_gets_there(
    trained: tuple[RunStore, list[RunSpec]], tmp_path: Path
) -> None:
    store, (first, _) = trained
    scores = [record.new for record in store.read(first).records]
    assert len(scores) == 2
    for number, until in enumerate((scores[0], max(scores), 1.0)):
        spec = replace(first, params={**first.params, "until": until})
        folder = with_runs(tmp_path / str(number), store, first.root)
        records = [one.record for one in models(CONFIG).train(spec, folder)]
        reached = [score >= until for score in scores]
        assert [record.new for record in records] == scores[: reached.index(True) + 1 if any(reached) else 2]
        assert [record.metrics["reached"] for record in records] == [float(one.new >= until) for one in records]


def test_a_killed_stage_goes_on_to_the_same_bits(
    trained: tuple[RunStore, list[RunSpec]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, (first, second) = trained
    with_runs(tmp_path / "out", store, first.root, first)
    original: Any = trainers.train
    resumed: list[Any] = []

    def killed(job: trainers.Job, measuring: Any, *, resume: Path | None) -> None:
        def at_step(step: int, *more: Any) -> Any:
            if step == 3 and resume is None:
                raise KeyboardInterrupt
            return measuring(step, *more)

        resumed.append(resume and resume.name)
        original(job, at_step, resume=resume)

    monkeypatch.setattr(trainers, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        in_order(tmp_path / "out", CONFIG)
    ours_store, specs = in_order(tmp_path / "out", CONFIG)
    assert specs[-1] == second
    assert resumed == [None, "checkpoint-2"]
    assert ours_store.read(second).records == store.read(second).records
    ours, theirs = (of.load_weights(second, 4) for of in (ours_store, store))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


Reached = dict[str, Any]


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> Reached:
    """What the trainer was handed, in place of training."""
    seen: Reached = {}

    def noted(job: trainers.Job, *more: Any, **named: Any) -> None:
        seen.update(vars(job))
        seen["weights"] = {name: weight.clone() for name, weight in job.model.state_dict().items()}

    monkeypatch.setattr(trainers, "train", noted)
    return seen


@pytest.mark.parametrize(
    ("method", "rank", "held_to"),
    [
        ("grpo+kl", 0, "base"),
        ("grpo+kl-before", 0, "before"),
        ("kl-dpg", 0, "before"),
        ("grpo+kl", 2, "base"),
        ("grpo+kl-before", 2, None),  # the model without its adapter, which is the stage before
    ],
)
def test_penalties_hold_to_the_base_or_to_the_stage_before(
    trained: tuple[RunStore, list[RunSpec]], handed: Reached, method: str, rank: int, held_to: str | None
) -> None:
    store, (_, second) = trained
    config = replace(CONFIG, methods=(method,), lora_rank=rank)
    spec = config.stage(method, 1e-3, ["descending"], second.chain[-1])
    assert spec.params["kl_coef"] == (0.1 if "+" in method else 0)
    list(models(config).train(spec, store))
    base, before = (store.load_weights(of.spec, of.step) for of in spec.chain)
    assert any(not torch.equal(base[name], before[name]) for name in base)
    if held_to is None:
        assert handed["base"] is None
        assert torch.equal(handed["weights"]["base_model.model.model.norm.weight"], before["model.norm.weight"])
        return
    expected, held = {"base": base, "before": before}[held_to], handed["base"].state_dict()
    assert all(torch.equal(held[name], expected[name]) for name in expected)


def test_the_oracle_draws_its_demonstrations_from_the_stage_before(
    trained: tuple[RunStore, list[RunSpec]], handed: Reached, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, (_, second) = trained
    config = replace(CONFIG, methods=("oracle",))
    list(models(config).train(config.stage("oracle", 1e-3, ["descending"], second.chain[-1]), store))
    ours = world_of(models(config), second, store)
    before = replace(ours.base, model=policy_of(second.chain[-1], ours.base.model, store))
    lesson = Lesson.of(ours, ["descending"], second)
    expected, _ = lesson.examples(method_of("oracle")[0], before, None, 0)
    of_base, _ = lesson.examples(method_of("oracle")[0], ours.base, None, 0)
    assert handed["examples"] == expected
    assert handed["examples"] != of_base


@pytest.mark.parametrize("method", ["replay", "self-replay"])
def test_replay_in_a_second_stage_is_of_the_first_one_too(
    trained: tuple[RunStore, list[RunSpec]], handed: Reached, method: str
) -> None:
    """A sixth of what is replayed: there are five prior tasks. With demonstrations, as the first stage had them.

    Or with what the policy says that the stage starts from.
    """
    store, (first, second) = trained
    config = replace(CONFIG, methods=(method,), replay_share=0.25)
    shares = {}
    for task, start in (("ascending", first.chain[0]), ("descending", second.chain[-1])):
        list(models(config).train(config.stage(method, 1e-3, [task], start), store))
        said = [handed["tokenizer"].decode([*one.prompt, *one.completion]) for one in handed["examples"]]
        old = [text.replace(" ", "") for text in said[128:]]  # after the stage's own
        shares[task] = [sum(text.startswith(mark) for text in old) for mark in ("C:", "R:", "S:", "N:", "U:", "PS:")]
        items = {item.prompt: item.demonstration for item in TASKS["ascending"].load(None).train[:128]}
        told = [(items[text.partition("=")[0] + "="], text.partition("=")[2]) for text in old if text[0] == "P"]
        assert method == "self-replay" or all(f"{right};" == said for right, said in told)
    assert shares == {"ascending": [9, 9, 9, 8, 8, 0], "descending": [8, 7, 7, 7, 7, 7]}


def test_all_at_once_learns_from_the_prompts_of_each_task(
    trained: tuple[RunStore, list[RunSpec]], handed: Reached
) -> None:
    store, (first, _) = trained
    config = replace(CONFIG, methods=("grpo",))
    spec = config.stage("grpo", 1e-3, config.tasks, first.chain[0])
    assert (spec.params["task"], spec.params["max_steps"]) == ("ascending+descending", 8)
    list(models(config).train(spec, store))
    prompts = [handed["tokenizer"].decode(example.prompt).replace(" ", "") for example in handed["examples"]]
    each = [[item.prompt for item in TASKS[name].load(None).train[:128]] for name in config.tasks]
    assert prompts == [*each[0], *each[1]]
    ids = [handed["tokenizer"].encode(text) for text in ("abc;", "cba;")]
    for position in (0, 130):
        letters = sorted(prompts[position].partition(":")[2][:3])
        ids = [handed["tokenizer"].encode("".join(letters)), handed["tokenizer"].encode("".join(letters[::-1]))]
        assert handed["reward"]([position, position], ids) == ([1.0, 0.0] if position == 0 else [0.0, 1.0])


def test_completions_of_several_tasks_end_where_all_do_and_are_scored_by_their_own() -> None:
    def task(name: str, stop: tuple[str, ...], longest: int) -> Task:
        return Task(name, name, "", lambda path: Splits([], []), lambda p, c: float(c == name), Form(longest, stop))

    class Asked:
        def __init__(self, count: int) -> None:
            self.items, self.ids, self.too_long = [Item("x")] * count, [[1]] * count, 0

    parts: Any = [(task("a", ("\n", ";"), 5), Asked(2)), (task("b", (";",), 9), Asked(3))]
    lesson = Lesson(parts)
    assert (lesson.stop, lesson.max_new_tokens) == ((";",), 9)
    found = lesson.score([4, 0, 1, 2], ["b", "a\nmore", "b", "b"])
    assert found.values == [1.0, 1.0, 0.0, 1.0]


def test_an_adapter_of_a_second_stage_is_put_on_the_first_one_s_end(tmp_path: Path) -> None:
    store, (_, second) = in_order(tmp_path / "out", replace(CONFIG, lora_rank=2, lrs=(1e-2,)))
    ours = world_of(models(CONFIG), second, store)
    base, before, now = (
        store.load_weights(of.spec, of.step)
        for of in (*second.chain, Ancestor(second, store.read(second).records[-1].step))
    )
    untouched = ours.base.model.state_dict()
    assert all(torch.equal(untouched[name], weight) for name, weight in base.items())
    name = "model.layers.0.self_attn.q_proj.weight"
    for start, stop in ((base, before), (before, now)):
        assert torch.linalg.matrix_rank(stop[name] - start[name], rtol=1e-3) == 2
    assert torch.linalg.matrix_rank(now[name] - base[name], rtol=1e-3) > 2
    record = store.read(second).records[-1]
    assert record.drift["kl_forward_since_before"] != pytest.approx(record.drift["kl_forward"], rel=0.01)


def test_a_stage_that_diverges_keeps_the_weights_of_its_last_checkpoint(
    trained: tuple[RunStore, list[RunSpec]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, (first, _) = trained
    with_runs(tmp_path / "out", store, first.root)
    checkpoint: Callable[..., Scored] = StageReference.checkpoint

    def not_finite(self: Any, run_id: str, step: int, *more: Any, **named: Any) -> Scored:
        if step == 4:
            raise DivergedError(step, 0.5)
        return checkpoint(self, run_id, step, *more, **named)

    monkeypatch.setattr(StageReference, "checkpoint", not_finite)
    experiment = models(CONFIG)
    one = runner.Runner(experiment, runner.Options(tmp_path / "out"), Console(quiet=True))
    one.finish([next(experiment.in_order(CONFIG, CONFIG.tasks, {"sft-two": 1e-3}, one.store))])
    assert one.store.read(first).diverged_at == 4
    weights = one.store.load_weights(first, 2)
    assert all(torch.equal(weight, store.load_weights(first, 2)[name]) for name, weight in weights.items())
    assert weights


# The whole

COMMAND = ["reproduce", "continual", "--preset", "tiny", "--tasks", "ascending,descending", "--lrs", "1e-3"]
COMMAND += ["--methods", "sft-two,grpo+kl-before", "--rl-lrs", "1e-3", "--jobs", "1"]
COMMAND += [
    text for name, value in SETTINGS.items() for text in (f"--{name.replace('_', '-')}", f"{value}".strip("(),"))
]


def test_the_command_writes_the_table_and_the_page(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main([*COMMAND, "--out", str(out)]) == 0
    table = pl.read_parquet(out / "records.parquet")
    assert set(table["order"]) == {"rates", "1", "alone", "joint"}
    assert set(table.filter(order="joint")["method"]) == {"base", "sft-two"}
    stages = table.filter(pl.col("method") != "base", pl.col("order") == "1")
    assert stages.select("stage", "task").unique().sort("stage").rows() == [(1, "ascending"), (2, "descending")]
    columns = ["new", "prior", "kl_forward", "kl_forward_on_prior", "kl_forward_since_before", "reached"]
    assert stages.select(columns).null_count().sum_horizontal().item() == 0
    assert set(stages.filter(method="grpo+kl-before")["kl_coef"]) == {0.1}
    page = (out / "report.html").read_text()
    assert "Does RL forget less than SFT over a sequence of tasks?" in page
    assert "not run" not in page
    assert json.loads((out / "config.json").read_text())["config"]["tasks"] == ["ascending", "descending"]
    assert main([*COMMAND, "--out", str(out)]) == 0  # trains nothing again
    assert_frame_equal(pl.read_parquet(out / "records.parquet"), table)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--train-size", "100"], "train_size is a setting of sequences on images: give --preset quick with it."),
        (
            ["--preset", "quick", "--base", "tiny"],
            "base is a setting of sequences of language models: give --preset tiny",
        ),
        (["--methods", "gpro"], "Unknown method 'gpro'"),
        (["--methods", "grpo+kl-after"], "after 'grpo' comes +kl, a KL penalty to the base, +kl-before, one to the"),
        (["--tasks", "letters,ascending"], "takes the tasks ascending, descending, appearance"),
        (["--tasks", "parity,prime"], "There is no task 'parity'. Tasks: "),
        (["--base", "some/model", "--tasks", "math,chess", "--prior", "winogrande"], "There is no task 'chess'"),
        (["--base", "./nowhere", "--tasks", "math,science", "--prior", "winogrande"], "There is no ./nowhere"),
        (["--prior", "none"], "takes at least one"),
    ],
)
def test_what_cannot_be_run_is_one_sentence(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["reproduce", "continual", "--preset", "tiny", "--out", str(tmp_path / "out"), *options]
    assert main(command) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
