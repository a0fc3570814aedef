"""Sequences read as a tree, against each one read alone and against lm-eval's own padded reading."""

import random
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from rlrazor.lm.harness.packed import packs
from tiny_models import CHARACTERS, char_tokenizer, tiny_llama

HFLM: Any = pytest.importorskip("lm_eval.models.huggingface").HFLM
reader: Any = pytest.importorskip("rlrazor.lm.harness.reader")
Reader, in_trees = reader.Reader, reader.in_trees

pytestmark = pytest.mark.filterwarnings("ignore")  # of lm-eval's own libraries
VOCABULARY = len(CHARACTERS) + 2


def like_items(seed: int = 0, items: int = 6) -> tuple[list[list[int]], list[list[int]]]:
    """Contexts and continuations: a head that all share, questions, four answers to each, of a token or several."""
    rng = random.Random(seed)

    def tokens(most: int) -> list[int]:
        return [rng.randrange(2, VOCABULARY) for _ in range(rng.randint(1, most))]

    head = tokens(12)
    questions = [head + tokens(10) for _ in range(items)]
    contexts = [question for question in questions for _ in range(4)]
    return contexts, [tokens(6 if place % 8 < 4 else 1) for place in range(len(contexts))]


def requests(contexts: list[list[int]], continuations: list[list[int]]) -> list[Any]:
    return [(("", ""), context, more) for context, more in zip(contexts, continuations, strict=True)]


@torch.no_grad()
def alone(model: Any, context: list[int], more: list[int]) -> tuple[float, bool]:
    logp = model(input_ids=torch.tensor([context + more])).logits[0].log_softmax(-1)
    at = range(len(context) - 1, len(context) + len(more) - 1)
    greedy = all(int(logp[place].argmax()) == token for place, token in zip(at, more, strict=True))
    return sum(float(logp[place, token]) for place, token in zip(at, more, strict=True)), greedy


def test_a_tree_holds_each_sequence_and_what_they_share_once() -> None:
    contexts, continuations = like_items()
    sequences = [context + more for context, more in zip(contexts, continuations, strict=True)]
    (tree,) = packs(sequences, 10_000)
    prefixes = {tuple(sequence[:end]) for sequence in sequences for end in range(1, len(sequence) + 1)}
    assert len(tree.ids) == len(prefixes)  # a node for each beginning that there is
    for place, sequence in enumerate(sequences):
        path = tree.paths[place]
        assert tree.ids[path].tolist() == sequence
        assert tree.depths[path].tolist() == list(range(len(sequence)))
        assert np.flatnonzero(tree.sees[path[-1]]).tolist() == sorted(path)


def test_trees_are_of_at_most_so_many_tokens() -> None:
    contexts, continuations = like_items(items=20)
    sequences = [context + more for context, more in zip(contexts, continuations, strict=True)]
    longest = max(map(len, sequences))
    for most in (1, longest, 3 * longest):
        trees = list(packs(sequences, most))
        assert sorted(place for tree in trees for place in tree.paths) == list(range(len(sequences)))
        assert all(len(tree.ids) <= most or len(tree.paths) == 1 or len(tree.ids) <= longest for tree in trees)
    assert len(list(packs(sequences, 10_000))) == 1
    assert all(one <= other for one, other in pairwise(len(list(packs(sequences, most))) for most in (500, 200, 50)))


@pytest.mark.parametrize("most", [40, 10_000])
def test_what_is_read_in_trees_is_what_is_read_alone(most: int) -> None:
    model = tiny_llama()
    contexts, continuations = like_items()
    inputs = [(context + more)[:-1] for context, more in zip(contexts, continuations, strict=True)]
    found = in_trees(model, inputs, continuations, most)
    assert found is not None
    for (logp, greedy), context, more in zip(found, contexts, continuations, strict=True):
        expected, is_likeliest = alone(model, context, more)
        assert logp == pytest.approx(expected, abs=1e-4)
        assert greedy is is_likeliest


def test_answers_are_those_of_lm_eval_in_the_same_order(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_llama(), char_tokenizer()
    contexts, continuations = like_items()
    contexts[5] = contexts[5] * 10  # longer than the model's context: cut by lm-eval
    asked = requests(contexts, continuations)
    plain = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)._loglikelihood_tokens(asked)
    left: list[int] = []
    padded = HFLM._loglikelihood_tokens

    def counted(lm: Any, own: list[Any]) -> Any:
        left.append(len(own))
        return padded(lm, own)

    monkeypatch.setattr(HFLM, "_loglikelihood_tokens", counted)
    ours = Reader(pretrained=model, tokenizer=tokenizer, batch_size=1)._loglikelihood_tokens(asked)
    assert left == [1]
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in plain]
    assert [logp for logp, _ in ours] == pytest.approx([logp for logp, _ in plain], abs=1e-4)


def windowed(**options: Any) -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = {"num_key_value_heads": 1, "initializer_range": 0.3, "pad_token_id": 0, "eos_token_id": 1}
        return MistralForCausalLM(MistralConfig(vocab_size=VOCABULARY, **sizes, **config, **options)).eval()


def test_what_is_longer_than_a_window_is_left_to_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = windowed(sliding_window=12), char_tokenizer()
    contexts, continuations = like_items()
    asked, taken = requests(contexts, continuations), list[int]()
    plain = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)._loglikelihood_tokens(asked)

    def counted(model: Any, inputs: Any, *arguments: Any) -> Any:
        taken.extend(map(len, inputs))
        return in_trees(model, inputs, *arguments)

    monkeypatch.setattr(reader, "in_trees", counted)
    ours = Reader(pretrained=model, tokenizer=tokenizer, batch_size=1)._loglikelihood_tokens(asked)
    lengths = [len(context) + len(more) - 1 for _, context, more in asked]
    assert taken == [length for length in lengths if length <= 12] != lengths
    assert [logp for logp, _ in ours] == pytest.approx([logp for logp, _ in plain], abs=1e-4)


class Deaf(torch.nn.Module):
    """A model that goes by no mask: it sees all that stands before."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.config = inner, inner.config

    def forward(self, input_ids: Any, attention_mask: Any = None, position_ids: Any = None, **_: Any) -> Any:
        return self.inner(input_ids=input_ids)

    def get_output_embeddings(self) -> Any:
        return self.inner.get_output_embeddings()


@pytest.mark.parametrize("most", [1, 60, 10_000])
def test_a_model_that_does_not_go_by_the_mask_is_read_by_lm_eval(most: int) -> None:
    contexts, continuations = like_items()
    inputs = [(context + more)[:-1] for context, more in zip(contexts, continuations, strict=True)]
    for amiss in (windowed(sliding_window=6), Deaf(tiny_llama())):
        found = in_trees(amiss, inputs, continuations, most)
        if most == 1 and isinstance(amiss, Deaf):  # a sequence to a tree: there is nothing to see amiss
            assert found is not None
        else:
            assert found is None
    assert in_trees(windowed(sliding_window=None), inputs, continuations, most) is not None


def test_what_a_model_cannot_do_is_left_to_lm_eval_but_no_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    contexts, continuations = like_items()
    inputs = [(context + more)[:-1] for context, more in zip(contexts, continuations, strict=True)]

    def fails(error: Exception) -> Any:
        def logits(*_: Any) -> Any:
            raise error

        monkeypatch.setattr(reader, "_logits", logits)
        return in_trees(model, inputs, continuations, 50)

    assert fails(TypeError("no such mask")) is None
    with pytest.raises(MemoryError):
        fails(MemoryError())
    assert in_trees(model, [], [], 50) == []
