"""Replay, EWC and LwF for language models, against closed forms, sums over all tokens, and counts."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from trainer_settings import changed

from rlrazor.cli import main
from rlrazor.errors import RazorError
from rlrazor.experiments.language import protection, rehearsal, tiny, trainers
from rlrazor.experiments.language.config import PRESETS, Config
from rlrazor.experiments.language.cost import Timing, draws_of
from rlrazor.experiments.language.experiment import Language
from rlrazor.experiments.language.methods import METHODS
from rlrazor.experiments.language.old import OldText, read_old
from rlrazor.experiments.language.setup import TaskSource
from rlrazor.experiments.language.tasks import Form, letters
from rlrazor.experiments.language.trainers import Example, Job, Part, Samples, Settings, Updates, own_samples
from rlrazor.lm import compute, own_texts
from rlrazor.lm.models import LanguageModel, add_lora
from rlrazor.lm.probes import GenericText
from rlrazor.runs import runner
from rlrazor.runs.experiment import Cost
from rlrazor.runs.store import FinishedRun, RunStore
from rlrazor.runs.sweep import DivergedError
from tiny_models import char_tokenizer, tiny_llama

TOKENIZER = char_tokenizer()
SETTINGS = Settings(
    Updates(lr=1e-2, schedule="constant", steps=2, warmup_steps=0, batch_size=4, kl_coef=0.0, seed=5),
    Samples(2, 3, stop_ids=[]),
)

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    compute.prepare_process()


def example(prompt: str, completion: str) -> Example:
    return Example(TOKENIZER(prompt)["input_ids"], TOKENIZER(completion)["input_ids"])


WHOLE = Part(0, 0, 1)  # of a step: all of it
EXAMPLES = [example(f"{letter}=", f"{letter}b;") for letter in "acdefgh"]


# What is drawn


def test_old_examples_are_drawn_evenly_and_none_twice_before_all_once() -> None:
    few, many = [example("a=", f"{letter};") for letter in "bcd"], [example(f"{letter}=", "a;") for letter in "efghij"]
    drawn = protection.draw([few, [], many], 12, random.Random(0))
    assert [one in few for one in drawn] == [True, False] * 6
    assert sorted(map(few.index, drawn[:6:2])) == sorted(map(few.index, drawn[6::2])) == [0, 1, 2]
    assert sorted(map(many.index, drawn[1::2])) == list(range(6))
    assert drawn == protection.draw([few, [], many], 12, random.Random(0))
    assert drawn != protection.draw([few, [], many], 12, random.Random(1))
    assert protection.draw([], 3, random.Random(0)) == []


def test_old_examples_of_the_tiny_base_are_right_and_not_scored() -> None:
    old = tiny.old_examples()
    assert {name: len(examples) for name, examples in old.items()} == dict.fromkeys(tiny.PRIOR_TASKS, tiny.OLD)
    assert {completion == prompt[2:-1][::-1] for prompt, completion in old["reverse"]} == {True}
    seen = {prompt for examples in tiny.scored_examples().values() for prompt, _ in examples}
    assert not (seen | set(tiny.probe_prompts())) & {prompt for examples in old.values() for prompt, _ in examples}


def test_a_file_has_texts_or_prompts_with_completions(tmp_path: Path) -> None:
    file = tmp_path / "old.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n{"text": "some text"}\n{"text": "some text"}\n')
    assert read_old(file) == [OldText("b", "a"), OldText("some text")]
    lines = tmp_path / "old.txt"
    lines.write_text("one text\nanother\n")
    assert read_old(lines) == [OldText("one text"), OldText("another")]


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ('{"prompt": "a"}', "row 1.*an old example is `text`, or `prompt` and `completion`"),
        ('{"prompt": "a", "completion": 3}', "row 1: the completion is 3, no text"),
        ('{"text": null}', "row 1.*text"),
        ('{"text": " "}', "row 1.*text"),
        ('{"prompt": "a", "completion": ""}', "row 1: the completion is '', no text"),
        ('{"prompt": "a", "completion": NaN}', "row 1: the completion is nan, no text"),
        ('{"prompt": null, "completion": "b"}', "row 1, prompt: the text is null"),
        ('{"prompt": "a", "completion": "\\ud800"}', "row 1: the text is not valid Unicode"),
    ],
)
def test_a_row_that_is_no_example_is_refused(tmp_path: Path, row: str, sentence: str) -> None:
    file = tmp_path / "old.jsonl"
    file.write_text(row + "\n")
    with pytest.raises(RazorError, match=sentence.replace("row 1", "(row|line) 1")):
        read_old(file)


# EWC


def squares(model: Any, loss: Tensor) -> dict[str, Tensor]:
    names, weights = zip(*model.named_parameters(), strict=True)
    slopes = torch.autograd.grad(loss, weights, allow_unused=True, retain_graph=True)
    return {name: slope.square() for name, slope in zip(names, slopes, strict=True) if slope is not None}


def test_the_fisher_information_is_the_sum_over_all_tokens_that_could_be_drawn() -> None:
    """Of contexts of one and of two positions: a sum over positions, although one gradient is squared for all."""
    model = tiny_llama(seed=1, scale=0.3).requires_grad_(True)
    contexts = [example("a=", "c"), example("b=", "dc")]
    exact = {name: torch.zeros_like(weight) for name, weight in model.named_parameters()}
    for one in contexts:
        logp_TV = model(input_ids=torch.tensor([[*one.prompt, *one.completion]])).logits[0].log_softmax(dim=-1)
        for position in range(len(one.prompt) - 1, len(one.prompt) + len(one.completion) - 1):
            for logp in logp_TV[position]:
                for name, square in squares(model, logp).items():
                    exact[name] += logp.exp().detach() * square / len(contexts)
    found = protection.diagonal_fisher(model, contexts * 600, seed=3)
    found_all, exact_all = (sum(of.sum().item() for of in each.values()) for each in (found, exact))
    assert found_all == pytest.approx(exact_all, rel=0.05)
    for name, of_weight in exact.items():
        assert found[name].sum().item() == pytest.approx(of_weight.sum().item(), rel=0.15), name
    assert all(weight.grad is None for weight in model.parameters())


def test_the_pull_is_a_quadratic_around_the_weights_that_it_began_with() -> None:
    model = tiny_llama(seed=1, scale=0.3).requires_grad_(True)
    fisher = protection.diagonal_fisher(model, EXAMPLES, seed=7)
    term = protection.elastic(model, EXAMPLES, 10.0, seed=7)
    assert term(model, WHOLE).item() == 0.0
    torch.manual_seed(2)
    moves = {name: 0.1 * torch.randn_like(weight) for name, weight in model.named_parameters()}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight += moves[name]
    value = term(model, WHOLE)
    assert term(model, Part(3, 1, 4)).item() == pytest.approx(value.item() / 4)
    assert value.item() == pytest.approx(
        5.0 * sum((fisher[name] * moves[name] ** 2).sum().item() for name in moves), rel=1e-4
    )
    value.backward()
    for name, weight in model.named_parameters():
        assert torch.allclose(weight.grad, 10.0 * fisher[name] * moves[name], rtol=1e-3, atol=1e-7), name


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_the_pull_is_added_once_a_step(micro_batch: int | None) -> None:
    """After one step of plain gradient descent: whatever the micro-batch, the weights of both gradients by hand."""

    def trained(term: Any) -> dict[str, Tensor]:
        model = tiny_llama(seed=1, scale=0.3).requires_grad_(True)
        settings = replace(changed(SETTINGS, steps=1), micro_batch=micro_batch)
        trainer = trainers.BUILDERS["sft"](Job(METHODS["ewc"], settings, model, TOKENIZER, EXAMPLES, term=term))
        trainer.measured = {}
        trainer.args.max_grad_norm = 0.0
        trainer.optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        trainer.train()
        return {name: weight.detach() for name, weight in model.named_parameters()}

    def pull(model: Any, part: Part) -> Any:
        return 0.01 * sum(weight.sum() for weight in model.parameters()) / part.of

    plain, pulled = trained(None), trained(pull)
    for name, weight in plain.items():
        assert torch.allclose(weight - pulled[name], torch.full_like(weight, 0.5 * 0.01), atol=1e-6), name


# LwF


def moved(model: Any, by: float) -> Any:
    torch.manual_seed(2)
    with torch.no_grad():
        for weight in model.parameters():
            weight += by * torch.randn_like(weight)
    return model


def test_lwf_is_the_mean_kl_from_what_was_at_the_tokens_of_old_examples() -> None:
    """Example by example, without padding; an update takes so many, and the next one goes on from there."""
    before = tiny_llama(seed=1, scale=0.3)
    model = moved(tiny_llama(seed=1, scale=0.3), 0.05).requires_grad_(True)
    old = [example("ab=", "c" * (1 + n % 4)) for n in range(11)]
    term = protection.without_forgetting(before, old, 3.0)
    for step in (0, 1):
        total, tokens = 0.0, 0
        for at in range(8):
            one = old[(8 * step + at) % 11]
            ids, start = torch.tensor([[*one.prompt, *one.completion]]), len(one.prompt) - 1
            logp_TV, to_TV = (of(input_ids=ids).logits[0, start:-1].log_softmax(-1) for of in (before, model))
            total += (logp_TV.exp() * (logp_TV - to_TV)).sum().item()
            tokens += len(one.completion)
        assert term(model, Part(step, 0, 1)).item() == pytest.approx(3.0 * total / tokens, rel=1e-4)
        parts = [term(model, Part(step, place, 3)).item() for place in range(3)]
        assert sum(parts) == pytest.approx(3.0 * total / tokens, rel=1e-4)
    assert term(before, Part(0, 0, 1)).item() == pytest.approx(0.0, abs=1e-6)
    assert term(model, Part(0, 9, 12)).item() == 0.0  # more parts than examples


def test_lwf_of_an_adapter_holds_to_the_model_without_it() -> None:
    torch.manual_seed(0)
    model = add_lora(tiny_llama(seed=1, scale=0.3), 2)
    of_adapter, of_base = (
        protection.without_forgetting(before, EXAMPLES, 1.0) for before in (None, tiny_llama(seed=1, scale=0.3))
    )
    assert of_adapter(model, WHOLE).item() == pytest.approx(0.0, abs=1e-6)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight += 0.5
    assert of_adapter(model, WHOLE).item() == pytest.approx(of_base(model, WHOLE).item(), rel=1e-4)
    assert of_adapter(model, WHOLE).item() > 1e-3


# What a policy writes itself


def base_of(model: Any, tokenizer: Any) -> LanguageModel:
    return LanguageModel.in_memory(model, tokenizer, "a base")


class World:
    base: Any
    suite: Any
    tasks: Any


def write(base: str, lm: LanguageModel, count: int, generic: GenericText) -> tuple[list[Example], dict[str, float]]:
    """Of a run on one task that starts from the base."""
    world: Any = World()
    world.base, world.suite = lm, type("Suite", (), {"generic": generic})()
    world.tasks = {"letters": type("Task", (), {"form": Form(stop=(letters.EOS,), chat=False)})()}
    spec = replace(PRESETS["tiny"], methods=("self-replay",)).specs("b", "d", ["self-replay"])[0]
    return rehearsal.written(Language(base, TaskSource("letters")), world, spec, lm, count)


def test_texts_from_nothing_are_the_bases_own_and_not_those_of_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frequencies of the first token against its probabilities after what begins a text, here the eos."""
    monkeypatch.setattr(rehearsal, "TEXT_TOKENS", 2)
    lm = base_of(tiny_llama(seed=1, scale=0.6), TOKENIZER)
    found, counts = write("elsewhere", lm, 2000, GenericText.built_in())
    assert counts == {"old_examples": 2000.0}
    assert {tuple(one.prompt) for one in found} == {(TOKENIZER.eos_token_id,)}
    with torch.no_grad():
        probs = lm.model(input_ids=torch.tensor([[TOKENIZER.eos_token_id]])).logits[0, -1].softmax(-1)
    seen = torch.bincount(torch.tensor([one.completion[0] for one in found]), minlength=len(probs)) / len(found)
    assert (seen - probs).abs().max() < 5 * (0.25 / len(found)) ** 0.5
    ends = [TOKENIZER.eos_token_id]
    of_probe = own_texts.draw(
        lm.model, [[TOKENIZER.eos_token_id]], own_texts.OwnTexts(64, 2), ends, None, lambda done: None
    )
    assert [list(one.completion) for one in found[:64]] != of_probe


def test_the_tiny_base_answers_prompts_that_are_neither_scored_nor_of_the_probe() -> None:
    lm = base_of(tiny.make_model(0), tiny.make_tokenizer())
    found, _ = write("tiny", lm, 52, GenericText(prompts=tuple(tiny.probe_prompts())))
    prompts = ["".join(tiny.ALPHABET[token] for token in one.prompt) for one in found]
    assert [prompt[0] for prompt in prompts[:10]] == [*"CRSNU"] * 2  # evenly of each task
    seen = {prompt for examples in tiny.scored_examples().values() for prompt, _ in examples}
    assert not (seen | set(tiny.probe_prompts())) & set(prompts)
    assert len(set(prompts)) == 52
    assert all(0 < len(one.completion) <= rehearsal.TINY_TOKENS for one in found)


def test_a_base_that_cannot_begin_a_text_answers_generic_prompts_or_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(*arguments: Any, **named: Any) -> None:
        raise RazorError("It cannot.")

    monkeypatch.setattr(own_texts, "beginnings", cannot)
    monkeypatch.setattr(rehearsal, "TEXT_TOKENS", 3)
    lm = base_of(tiny_llama(seed=1), TOKENIZER)
    found, _ = write("elsewhere", lm, 5, GenericText(prompts=("ab=", "c=")))
    assert [tuple(one.prompt) for one in found].count(tuple(TOKENIZER("c=")["input_ids"])) in (2, 3)
    with pytest.raises(RazorError, match=r"cannot write a text from nothing.*--generic FILE.*replay with"):
        write("elsewhere", lm, 5, GenericText.built_in())


# Runs


CONFIG: Config = replace(
    PRESETS["tiny"], methods=("sft", "replay", "ewc", "self-replay", "lwf", "self-sft"), lrs=(1e-3,), max_steps=0,
    pretrain_steps=30, epochs=(1,), checkpoints_per_epoch=2, train_prompts=95, batch_sizes=(10,), test_prompts=4,
    kl_samples=1, ewc_strength=1e4,
)  # fmt: skip


def run(out: Path, config: Config, source: TaskSource = TaskSource("letters")) -> dict[str, FinishedRun]:  # noqa: B008
    experiment = Language(config.base, source)
    runner.run(experiment, config, runner.Options(out, jobs=1), Console(quiet=True))
    store = RunStore(out)
    found = [store.read(spec) for spec in config.specs(experiment.fingerprint, experiment.data[0], config.methods)]
    return {one.spec.method: one for one in found}


def test_replay_takes_its_share_and_ewc_holds_what_it_says(
    tmp_path: Path, undrawn: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    original: Any = own_samples._OwnSamples._sample

    def sample(self: Any, positions: Any, purpose: str) -> Any:
        drawn.append(len(positions))
        return original(self, positions, purpose)

    monkeypatch.setattr(own_samples._OwnSamples, "_sample", sample)
    found = run(tmp_path, CONFIG)
    assert [record.metrics["old_examples"] for record in found["replay"].records] == [5.0, 5.0]  # 5 % of 100
    assert found["ewc"].records[-1].metrics["old_examples"] == protection.FISHER_EXAMPLES
    assert found["self-replay"].records[-1].metrics["old_examples"] == 5.0
    assert found["lwf"].records[-1].metrics["old_examples"] == protection.LWF_EXAMPLES
    assert "old_examples" not in found["sft"].records[0].metrics
    # Of 95 prompts; where some are old, of 100 examples.
    assert [of.records[-1].step for of in found.values()] == [9, 10, 9, 10, 9, 9]
    own = found["self-sft"]
    right = own.records[0].metrics["reward"]
    assert 0 < right < 1
    # As many samples as a dry run counts that knows how many are right.
    counted = draws_of(Timing(right=right), own.spec, Cost(own.records[-1].step, 2), 95)
    assert counted == pytest.approx(sum(drawn), rel=0.15)
    on_old = {name: of.records[-1].drift["kl_probe"] for name, of in found.items()}
    assert on_old["ewc"] < 0.5 * on_old["sft"]  # 0.07 and 0.75 nats
    assert max(on_old[name] for name in ("replay", "self-replay", "lwf")) < on_old["sft"]


def test_training_on_own_samples_that_diverges_is_recorded_where_it_did(
    tmp_path: Path, undrawn: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose trainer counts an epoch a step."""

    original: Any = trainers.train

    def diverge(job: Job, at_step: Any, **options: Any) -> None:
        def watched(step: int, *more: Any) -> None:
            if step == 7:
                raise DivergedError(7, 7.0)
            at_step(step, *more)

        original(job, watched, **options)

    monkeypatch.setattr(trainers, "train", diverge)
    experiment, config = Language("tiny", TaskSource("letters")), replace(CONFIG, methods=("self-sft",))
    runner.run(experiment, config, runner.Options(tmp_path, jobs=1), Console(quiet=True))
    (spec,) = config.specs(experiment.fingerprint, experiment.data[0], config.methods)
    assert RunStore(tmp_path).read(spec).diverged_at == 7


def test_a_file_of_ones_own_takes_the_place_of_the_pre_training_text(tmp_path: Path) -> None:
    """It decides the result, so it is in the id of the runs."""
    file = tmp_path / "old.jsonl"
    file.write_text('{"prompt": "C:abcd=", "completion": "abcd"}\n{"text": "R:abcd=dcba;"}\n')
    source = TaskSource("letters", old=file)
    experiment = Language("tiny", source)
    assert experiment.data[0] != Language("tiny", TaskSource("letters")).data[0]
    lm = type("Lm", (), {"model": tiny.make_model(0), "tokenizer": tiny.make_tokenizer()})()
    world: Any = World()
    world.base = lm
    world.tasks = {"letters": type("Task", (), {"form": Form(stop=(letters.EOS,), chat=False)})()}
    (known,), too_long = protection._known(experiment, world)
    code = {character: index for index, character in enumerate(tiny.ALPHABET)}
    pair, text = ([code[one] for one in said] for said in ("C:abcd=abcd;", "R:abcd=dcba;"))
    assert [[*one.prompt, *one.completion] for one in known] == [pair, text]
    assert [len(one.prompt) for one in known] == [7, 1]
    assert too_long == 0
    file.write_text('{"prompt": "%s", "completion": "a"}\n{"text": "R"}\n' % ("a" * 200))
    with pytest.raises(RazorError, match=r"old.jsonl: none of the old examples has two tokens and fits into the \d+"):
        protection._known(experiment, world)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--method", "replay", "--base", "somewhere"], "replay needs examples of what must not be lost"),
        (["--method", "sft", "--base", "tiny", "--old-examples", "FILE"], "for the methods replay, ewc, lwf"),
        (["--method", "self-replay", "--base", "tiny", "--old-examples", "FILE"], "and none of these is one"),
        (["--method", "ewc", "--base", "tiny", "--lora-rank", "2"], "ewc holds each weight to where it was"),
        (["--method", "replay", "--base", "tiny", "--old-examples", "missing.jsonl"], "missing.jsonl"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    tmp_path: Path, options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "old.jsonl"
    file.write_text('{"text": "R:abcd=dcba;"}\n')
    base = options[options.index("--base") + 1]
    rest = [str(file) if one == "FILE" else one for one in options if one not in ("--base", base)]
    said = main(["finetune", base, "--task", "letters", "--lr", "1e-4", "--out", str(tmp_path / "out"), *rest])
    error = capsys.readouterr().err
    assert said == 2
    assert sentence in error
    assert "Traceback" not in error
