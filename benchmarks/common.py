"""What several benchmarks share: random models of known shapes, a tokenizer for them, and the peak of memory."""

import re
from pathlib import Path
from typing import Any

import torch

from rlrazor.lm import compute

WORDS = ["the", "river", "was", "low", "that", "year", "and", "the", "mill", "stood", "still"]

# Layers, width, width of the MLP, heads, heads of keys, vocabulary, and whether the LM head is the embedding.
SHAPES = {
    "tiny": (2, 64, 128, 4, 2, 2_000, True),
    "smollm2-135m": (30, 576, 1_536, 9, 3, 49_152, True),
    "qwen2.5-0.5b": (24, 896, 4_864, 14, 2, 151_936, True),
    "qwen2.5-1.5b": (28, 1_536, 8_960, 12, 2, 151_936, True),
    "qwen2.5-3b": (36, 2_048, 11_008, 16, 2, 151_936, True),
    "qwen2.5-7b": (28, 3_584, 18_944, 28, 4, 152_064, False),
}


def made(shape: str, *, layers: int | None = None) -> Any:
    """A model of this shape with random weights, made on torch's default device in its default type."""
    from transformers import LlamaConfig, LlamaForCausalLM

    depth, width, inner, heads, of_keys, vocabulary, tied = SHAPES[shape]
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers or depth,
            num_attention_heads=heads,
            num_key_value_heads=of_keys,
            tie_word_embeddings=tied,
            max_position_embeddings=4096,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=0,
        )
    )


def tokenizer(vocabulary: int) -> Any:
    """A token per word, of a vocabulary of this size."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    entries = ["<eos>", *WORDS, *(f"w{at}" for at in range(vocabulary))]
    numbered = {word: at for at, word in enumerate(dict.fromkeys(entries)) if at < vocabulary}
    words = Tokenizer(models.WordLevel(numbered, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")


def peak() -> float:
    """MB since `reset`: of a GPU what torch has allocated, of a CPU all that the process has resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    (high,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(high) * 1024 / 1e6


def reset() -> None:
    """Begin anew, without what was freed."""
    compute.free()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def synchronize() -> None:
    """Wait for what the GPU was given to do, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
