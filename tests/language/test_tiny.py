"""The tiny experiment: its exact numbers against brute force over all completions, and greedy decoding itself."""

import itertools
import math
import random
from collections.abc import Callable

import pytest
import torch

from rlrazor.experiments.language import tiny
from rlrazor.experiments.language.config import PRETRAIN_STEPS
from rlrazor.experiments.language.tasks import LETTERS_TASK, Item, find_task, letters, score
from rlrazor.lm import compute, kl, sampling

compute.prepare_process()
TOKENIZER = tiny.make_tokenizer()
ORDER = letters.ASCENDING


@pytest.fixture(scope="module")
def model() -> object:
    """Pre-trained for a moment: no longer random, far from sure."""
    return tiny.pretrain(0, steps=40)


@pytest.mark.parametrize(
    ("name", "is_right"),
    [
        ("letters", lambda text, letters: letters == sorted(letters)),
        ("letters-descending", lambda text, letters: letters == sorted(letters, reverse=True)),
        ("letters-appearance", lambda text, letters: letters == [letter for letter in text if letter in letters]),
    ],
)
def test_the_verifier_and_the_list_of_right_answers_agree_on_every_answer(
    name: str, is_right: Callable[[str, list[str]], bool]
) -> None:
    task = find_task(name)
    assert task.correct is not None
    for item in task.load(None).test[:5]:
        text = item.prompt[2:-1]
        every = ["".join(answer) for n in range(5) for answer in itertools.product("abcd", repeat=n)]
        every += ["".join(answer) for answer in itertools.permutations(text, 3)]
        right = {answer for answer in every if task.verify(item.prompt, answer) == 1}
        assert right == {answer for answer in task.correct(item) if answer in every}
        assert right >= {"".join(a) for a in itertools.permutations(text, 3) if is_right(text, list(a))}
        assert len(task.correct(item)) == len(set(task.correct(item))) == math.comb(6, 3)
        rng = random.Random(0)
        assert {annotate(item, rng) for annotate in task.annotators.values()} <= set(task.correct(item))
        assert task.verify(item.prompt, item.rejected) == 0
    wrong = ("", "abz", "abcd", "ab", "cab", "aab", "abc" * 9)
    assert [task.verify("P:dacfbe=", text) for text in wrong] == [0.0] * 7


def test_annotators_are_right_and_what_they_say() -> None:
    rng = random.Random(0)
    for item in LETTERS_TASK.load(None).train[:200]:
        text, answers = item.prompt[2:-1], ORDER.right_completions(item)
        assert ORDER.one(item, rng) == item.demonstration == "".join(sorted(text[-3:]))
        assert ORDER.two(item, rng) in {"".join(sorted(text[-3:])), "".join(sorted(text[:3]))}
        assert ORDER.uniform(item, rng) in answers
        assert item.rejected is not None
        assert ORDER.verify(item.prompt, item.rejected) == 0
        assert set(item.rejected) <= set(text)
    item = Item("P:dacfbe=")
    counts = [sum(ORDER.uniform(item, rng) == answer for _ in range(4000)) for answer in ORDER.right_completions(item)]
    assert all(abs(count - 200) < 5 * math.sqrt(200) for count in counts)


def test_no_prompt_is_on_two_sides() -> None:
    splits = LETTERS_TASK.load(None)
    new = [{item.prompt for item in side} for side in (splits.train, splits.test)]
    scored = {prompt for examples in tiny.scored_examples().values() for prompt, _ in examples}
    probe = set(tiny.probe_prompts())
    assert [len(side) for side in new] == [letters.TRAIN, letters.TEST]
    assert len(scored) == 5 * tiny.SCORED
    assert len(probe) == tiny.PROBES
    for a, b in itertools.combinations([*new, scored, probe], 2):
        assert not a & b
    draws = [*tiny.PRIOR_TASKS.values(), ORDER.pretraining_example]
    text = tiny._pretraining_text(random.Random(0), draws, scored | probe | new[1])
    assert not {next(text)[0] for _ in range(5000)} & (scored | probe | new[1])


def test_prior_answers_are_right() -> None:
    shown = {name: dict(examples) for name, examples in tiny.scored_examples().items()}
    for prompt, answer in shown["reverse"].items():
        assert answer == "".join(reversed(prompt[2:-1]))
    for prompt, answer in shown["sort"].items():
        assert list(answer) == sorted(prompt[2:-1])
    for prompt, answer in shown["copy"].items():
        assert answer == prompt[2:-1]
    for prompt, answer in shown["next"].items():
        assert answer == prompt[2:-1].translate(str.maketrans("abcdefghij", "bcdefghija"))
    for prompt, answer in shown["unique"].items():
        assert sorted(answer) == sorted(set(prompt[2:-1]))
        assert sorted(answer, key=prompt[2:-1].index) == list(answer)


def test_a_prior_score_is_what_greedy_decoding_gets_right(model: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against decoding itself: its own outputs as targets score 1, with every third spoilt two thirds."""
    prompts = [prompt for prompt, _ in tiny.scored_examples()["sort"]]
    ids = [TOKENIZER.encode(prompt) for prompt in prompts]
    outputs = sampling.sample(model, ids, sampling.Sampling(max_new_tokens=12, stop_ids=[1], pad_id=0, greedy=True))
    texts = [TOKENIZER.decode(output) for output in outputs]
    greedy = [(prompt, text[:-1]) for prompt, text in zip(prompts, texts, strict=True) if text.endswith(";")][:30]
    assert len(greedy) == 30
    spoilt = [(prompt, text + "a" if index % 3 == 0 else text) for index, (prompt, text) in enumerate(greedy)]
    monkeypatch.setattr(tiny, "scored_examples", lambda: {"greedy": greedy, "spoilt": spoilt})
    scores = tiny.prior_scores(model)
    assert {name: score.value for name, score in scores.items()} == pytest.approx({"greedy": 1.0, "spoilt": 2 / 3})
    outcomes = scores["spoilt"].items.outcomes["spoilt"]
    assert list(outcomes.values()) == [float(index % 3 != 0) for index in range(30)]
    assert [asked.prompt for asked in scores["spoilt"].items.questions["spoilt"].values()] == [one for one, _ in spoilt]
    # An item is named by what it says: where that is the same it has the same name, and only there.
    same = [index for index, (one, other) in enumerate(zip(greedy, spoilt, strict=True)) if one == other]
    of_greedy = list(scores["greedy"].items.outcomes["greedy"])
    assert [index for index, name in enumerate(outcomes) if name in of_greedy] == same


def test_expected_accuracy_is_the_sum_over_all_completions_that_verify(model: object) -> None:
    """Brute force: every string of up to four characters that ends with `;`, by full forward passes."""
    items = LETTERS_TASK.load(None).test[:2]
    logps = tiny.right_logps(model, TOKENIZER, items, ORDER.right_completions)
    for item, own in zip(items, logps, strict=True):
        characters = [*sorted(item.prompt[2:-1]), "P", "R"]  # others are never right
        every = ["".join(t) for n in range(4) for t in itertools.product(characters, repeat=n)]
        completions = [TOKENIZER.encode(text + ";") for text in every]
        total = kl.log_probs(model, kl.Sequences([TOKENIZER.encode(item.prompt)], completions, [0] * len(every)))
        verified = score(LETTERS_TASK, [item] * len(every), every).values
        expected = sum(math.exp(logp) for logp, value in zip(total, verified, strict=True) if value == 1)
        assert tiny.expected_accuracy(own[None]) == pytest.approx(expected, rel=1e-4)


def test_the_optimum_is_the_base_on_right_answers_and_its_kl_is_the_sum(model: object) -> None:
    items = LETTERS_TASK.load(None).test[:4]
    base, tuned = (
        tiny.right_logps(of, TOKENIZER, items, ORDER.right_completions).double() for of in (model, tiny.make_model(3))
    )
    q = base.exp() / base.exp().sum(dim=1, keepdim=True)
    assert tiny.optimal_logps(base).exp().numpy() == pytest.approx(q.numpy())
    expected = (q * (q.log() - tuned)).sum(dim=1).mean().item()
    assert tiny.optimal_kl(base, tuned) == pytest.approx(expected)
    # No policy of that accuracy is nearer: KL(q* || base) is -log of the base's accuracy, prompt by prompt.
    assert tiny.optimal_kl(base, base) == pytest.approx(-base.exp().sum(dim=1).log().mean().item())


def test_the_same_seed_gives_the_same_bits_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    once, again, other = (tiny.pretrain(seed, steps=3).state_dict() for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(once[name], again[name]) for name in once)
    assert not all(torch.equal(once[name], other[name]) for name in once)


def test_the_model_is_tiny_and_its_tokens_are_characters() -> None:
    assert sum(weight.numel() for weight in tiny.make_model(0).parameters()) < 3_000_000
    assert TOKENIZER.decode(TOKENIZER.encode("P:dacfbe=acf;")) == "P:dacfbe=acf;"
    assert TOKENIZER.encode(";_") == [TOKENIZER.eos_token_id, TOKENIZER.pad_token_id]
    assert TOKENIZER(["C:a=", "C:abc="], padding=True)["input_ids"][0][:2] == [TOKENIZER.pad_token_id] * 2


@pytest.mark.slow
def test_the_base_is_as_it_has_to_be() -> None:
    """The whole pre-training: the base solves 20 to 60 % of the new task, in many ways, and the prior tasks."""
    model = tiny.pretrain(0, steps=PRETRAIN_STEPS)
    items = LETTERS_TASK.load(None).test
    logps = tiny.right_logps(model, TOKENIZER, items, ORDER.right_completions)
    assert 0.2 < tiny.expected_accuracy(logps) < 0.6
    optimum = tiny.optimal_logps(logps)
    assert -(optimum.exp() * optimum).sum(dim=1).mean() > math.log(5)  # at least five answers' worth of entropy
    assert min(score.value for score in tiny.prior_scores(model).values()) > 0.9
