"""How a language model represents text that has nothing to do with its tasks, to be compared with how its base does.

RL's Razor (Fig. 7) compares by CKNNA, `rlrazor.drift.cknna`: at matched accuracy .94 after RL and .56 after SFT.
"""

from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import torch

from rlrazor.drift import Representation
from rlrazor.lm import encoding
from rlrazor.lm.forward import context_length
from rlrazor.lm.kl import Sequences, final_states

TEXT_TOKENS = 512  # of a text that are measured: a long document should not outweigh a hundred short ones


def paragraphs() -> list[str]:
    """Sixty short paragraphs on everyday topics, written for this purpose; also a generic probe that needs no data."""
    return _shipped("paragraphs.txt")


def unlike() -> list[str]:
    """Forty short texts, written for this purpose, unlike prose and exam questions: code, tables, other languages."""
    return _shipped("unlike.txt")


def _shipped(name: str) -> list[str]:
    text = (files("rlrazor.lm") / name).read_text(encoding="utf-8")
    return [paragraph.strip() for paragraph in text.split("\n\n")]


def ids_of_texts(model: Any, tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text as it is measured: its first TEXT_TOKENS, or as many as the model's context holds."""
    longest = min(TEXT_TOKENS, context_length(model) or TEXT_TOKENS)
    return [encoding.text_ids(tokenizer, text)[:longest] for text in texts]


def representation(model: Any, tokenizer: Any, texts: Sequence[str]) -> Representation:
    """The last hidden layer (after the final norm), averaged over each text's tokens as in Huh et al. 2024.

    Of a long text its beginning. Raises RazorError for a text without tokens. For a base in a PEFT model, call it under
    `model.disable_adapter()`.
    """
    return representation_of_ids(model, ids_of_texts(model, tokenizer, texts))


def representation_of_ids(model: Any, ids: Sequence[Sequence[int]]) -> Representation:
    """The same of texts that are token ids already. Raises RazorError for one longer than the context."""
    # The last token of a sequence is not fed to the model; repeated, all of the text's are.
    sequences = Sequences.texts([[*text, text[-1]] if text else [] for text in ids])
    states_TD, _ = final_states(model, sequences)
    return Representation(
        torch.stack([rows.float().mean(dim=0) for rows in states_TD.split([len(text) for text in ids])])
    )
