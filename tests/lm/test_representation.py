import copy

import pytest
import torch

from rlrazor.drift import cknna
from rlrazor.errors import RazorError
from rlrazor.lm.representation import ids_of_texts, paragraphs, representation
from tiny_models import char_tokenizer, tiny_llama

TEXTS = ["one text", "another", "the last of a few texts", "x", "3+4=7", "abc", "zyx abc", "q: 1"]
TEXTS += [f"text number {n}" for n in range(12)]


def test_it_is_the_mean_of_the_last_hidden_state() -> None:
    model, tokenizer = tiny_llama(), char_tokenizer()
    measured = representation(model, tokenizer, TEXTS).activations
    for row, text in zip(measured, TEXTS, strict=True):
        ids = torch.tensor([tokenizer(text).input_ids])
        with torch.no_grad():
            hidden_TD = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
        torch.testing.assert_close(row, hidden_TD.mean(dim=0))


def test_cknna_falls_as_the_model_is_moved() -> None:
    base, tokenizer = tiny_llama(max_position_embeddings=512), char_tokenizer()
    before = representation(base, tokenizer, paragraphs())
    alignments = [cknna(before, before)]
    for size in (0.003, 0.3):
        moved = copy.deepcopy(base)
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in moved.parameters():
                parameter += size * torch.randn_like(parameter)
        alignments.append(cknna(before, representation(moved, tokenizer, paragraphs())))
    assert alignments[0] == pytest.approx(1)
    assert 1 > alignments[1] > 0.9 > alignments[2]


def test_a_long_text_is_cut_to_the_context_and_to_what_is_measured() -> None:
    model, tokenizer = tiny_llama(max_position_embeddings=64), char_tokenizer()
    long, cut = (representation(model, tokenizer, [*TEXTS, "a" * length]).activations for length in (100, 64))
    torch.testing.assert_close(long, cut)
    roomy = tiny_llama(max_position_embeddings=1024)
    assert [len(ids) for ids in ids_of_texts(roomy, tokenizer, ["a" * 600, "bc"])] == [512, 2]


def test_a_text_without_tokens_is_refused() -> None:
    with pytest.raises(RazorError, match="empty"):
        representation(tiny_llama(), char_tokenizer(), [*TEXTS, ""])


def test_the_paragraphs_are_many_short_and_different() -> None:
    texts = paragraphs()
    assert len(texts) == 60
    assert all(100 < len(text) < 300 and "\n" not in text for text in texts)
    # Unrelated: no two share more than a third of their words.
    words = [set(text.lower().split()) for text in texts]
    assert max(len(a & b) / len(a | b) for i, a in enumerate(words) for b in words[:i]) < 1 / 3
