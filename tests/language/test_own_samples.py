"""SFT on right samples of the policy itself: what is drawn, what is learned from it, and that it resumes."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from trainer_settings import changed

from rlrazor.errors import RazorError
from rlrazor.experiments.language import trainers
from rlrazor.experiments.language.methods import METHODS
from rlrazor.experiments.language.trainers import Example, Job, Samples, Settings, Updates
from rlrazor.experiments.language.trainers.own_samples import first_step, round_of
from rlrazor.lm import compute
from tiny_models import char_tokenizer, tiny_llama

TOKENIZER = char_tokenizer()
PROMPTS = [list(TOKENIZER(text)["input_ids"]) for text in ("a=", "xb=", "c=")]
SETTINGS = Settings(
    Updates(lr=1e-2, schedule="constant", steps=4, warmup_steps=0, batch_size=6, kl_coef=0.0, seed=5),
    Samples(1, 3, stop_ids=[1], tries=16, rounds=2),
)

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    compute.prepare_process()


def reward(positions: Sequence[int], completions: Sequence[Sequence[int]]) -> list[float | None]:
    """Right where the first token's id is even; one of them cannot be verified."""
    return [None if completion[0] == 4 else float(completion[0] % 2 == 0) for completion in completions]


def policy() -> Any:
    return tiny_llama(seed=1, scale=0.3).requires_grad_(True)


def trainer_of(name: str, settings: Settings, model: Any, reward: Any = reward) -> Any:
    job = Job(METHODS[name], settings, model, TOKENIZER, [Example(prompt) for prompt in PROMPTS], reward=reward)
    trainer = trainers.BUILDERS["own"](job)
    trainer.measured = {}
    return trainer


def trained(name: str, settings: Settings, **options: Any) -> tuple[Tensor, list[float]]:
    """The weights, and the share of right samples that each step's record would have."""
    model, rewards = policy(), list[float]()

    def at_step(step: int, model: Any, measured: Mapping[str, float]) -> None:
        rewards.append(measured["reward"])

    examples = [Example(prompt) for prompt in PROMPTS]
    trainers.train(Job(METHODS[name], settings, model, TOKENIZER, examples, reward=reward), at_step, **options)
    return torch.cat([weight.detach().flatten() for weight in model.parameters()]), rewards


@pytest.mark.parametrize(("steps", "rounds"), [(1, 1), (7, 3), (12, 4), (5, 5), (3, 10), (100, 7)])
def test_rounds_share_the_updates(steps: int, rounds: int) -> None:
    numbers = [round_of(step, steps, rounds) for step in range(steps)]
    lengths = Counter(numbers)
    assert sorted(lengths) == list(range(min(steps, rounds)))
    assert numbers == sorted(numbers)
    assert max(lengths.values()) - min(lengths.values()) <= 1
    for number in lengths:
        assert first_step(number, steps, rounds) == numbers.index(number)
    assert first_step(len(lengths), steps, rounds) == steps


def test_samples_are_right_and_of_the_policy_restricted_to_what_is_right() -> None:
    """Of completions of one token, their frequencies against the probabilities, all prompts asked evenly."""
    model = policy()
    trainer = trainer_of("self-sft", changed(SETTINGS, max_new_tokens=1, tries=99), model)
    drawn = trainer._draw(0, 0, 3000)
    assert len(drawn.positions) == len(drawn.completions) == 3000
    with torch.no_grad():
        probs = torch.stack([model(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1) for prompt in PROMPTS])
    right = torch.tensor([token % 2 == 0 and token != 4 for token in range(probs.shape[1])])
    joint = probs * right / len(PROMPTS)
    assert drawn.reward == pytest.approx(joint.sum().item(), abs=0.03)
    found = np.zeros(joint.shape)
    for position, (token,) in zip(drawn.positions, drawn.completions, strict=True):
        found[position, token] += 1
    assert found[:, ~right.numpy()].sum() == 0
    expected = (joint / joint.sum() * 3000).numpy()
    kept = expected > 5
    statistic = ((found - expected)[kept] ** 2 / expected[kept]).sum()
    assert statistic < kept.sum() + 5 * np.sqrt(2 * kept.sum())  # a chi-square's mean and five standard deviations


def test_every_prompt_is_asked_before_any_a_second_time() -> None:
    asked: list[list[int]] = []

    def always(positions: Sequence[int], completions: Sequence[Sequence[int]]) -> list[float]:
        asked.append(list(positions))
        return [1.0] * len(completions)

    trainer = trainer_of("iterative-sft", SETTINGS, policy(), always)
    trainer._draw(0, 0, 6)
    trainer._draw(1, 6, 3)
    assert [sorted(turn) for turn in (asked[0][:3], asked[0][3:], asked[1])] == [[0, 1, 2]] * 3


def test_samples_are_drawn_until_there_are_enough_or_as_many_as_may_be(capfd: pytest.CaptureFixture[str]) -> None:
    """Of which every fifth is right."""
    asked = 0

    def seldom(positions: Sequence[int], completions: Sequence[Sequence[int]]) -> list[float]:
        nonlocal asked
        asked += len(completions)
        return [float(at % 5 == 0) for at in range(asked - len(completions), asked)]

    drawn = trainer_of("self-sft", changed(SETTINGS, tries=16), policy(), seldom)._draw(0, 0, 12)
    assert (len(drawn.positions), drawn.reward) == (12, 12 / asked)
    assert 56 <= asked <= 60
    asked = 0
    few = trainer_of("self-sft", changed(SETTINGS, tries=2), policy(), seldom)._draw(0, 0, 12)
    assert (asked, len(few.positions)) == (24, 5)
    assert "5 of 24 samples of the policy are right, where the updates take 12" in " ".join(
        capfd.readouterr().err.split()
    )


def test_a_step_is_sft_on_the_samples() -> None:
    """The gradient against one taken a sample at a time, without padding: a mean over the tokens."""
    model, untouched = policy(), policy()
    trainer = trainer_of("self-sft", changed(SETTINGS, steps=1), model)
    trainer.args.max_grad_norm = 0.0
    trainer.optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    trainer.train()
    samples = [trainer.drawn.sample(place) for place in range(6)]
    assert len(trainer.drawn.positions) == 6
    loss = torch.zeros(())
    for position, completion in samples:
        assert reward([position], [completion]) == [1.0]
        prompt = PROMPTS[position]
        logp = (
            untouched(input_ids=torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        )
        loss = loss - logp.gather(1, torch.tensor(completion)[:, None]).sum()
    (loss / sum(len(completion) for _, completion in samples)).backward()
    for (name, weight), other in zip(model.named_parameters(), untouched.parameters(), strict=True):
        assert torch.allclose(other - weight, 0.5 * other.grad, atol=1e-6), name


def test_one_round_is_self_sft_and_micro_batches_do_not_matter() -> None:
    once, _ = trained("self-sft", changed(SETTINGS, rounds=1))
    assert torch.equal(once, trained("iterative-sft", changed(SETTINGS, rounds=1))[0])
    assert torch.allclose(once, trained("self-sft", changed(SETTINGS, rounds=1, micro_batch=2))[0], atol=1e-5)
    several, rewards = trained("iterative-sft", SETTINGS)
    assert not torch.equal(once, several)
    assert rewards[0] == rewards[1] < rewards[2] == rewards[3]  # the second round is of a policy that has learned


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_resumed_run_is_the_uninterrupted_one(step: int, tmp_path: Path) -> None:
    """From the midst of a round, whose samples are read again, and from the beginning of one."""
    weights, rewards = trained("iterative-sft", SETTINGS)
    saving = changed(SETTINGS, at={step}, folder=tmp_path)
    trained("iterative-sft", saving)
    resumed, of_rest = trained("iterative-sft", saving, resume=tmp_path / f"checkpoint-{step}")
    assert torch.equal(weights, resumed)
    assert rewards[step:] == of_rest


def test_what_cannot_be_is_one_sentence(tmp_path: Path) -> None:
    def never(positions: Sequence[int], completions: Sequence[Sequence[int]]) -> list[float]:
        return [0.0] * len(completions)

    with pytest.raises(RazorError, match=r"None of 48 samples of the policy is right, and self-SFT learns from right"):
        trainer_of("self-sft", changed(SETTINGS, tries=4), policy(), never)._draw(0, 0, 12)
    saving = changed(SETTINGS, at={1}, folder=tmp_path)
    trained("iterative-sft", saving)
    (tmp_path / "round-0.json").unlink()
    with pytest.raises(RazorError, match=r"There is no .*round-0.json\. Delete .* to train from the start"):
        trained("iterative-sft", saving, resume=tmp_path / "checkpoint-1")
