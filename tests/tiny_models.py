"""Tiny language models for the tests: random weights, made in a fraction of a second, no file and no network needed."""

import copy
import gc
import weakref
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789+-=: \n"


def char_tokenizer(characters: str = CHARACTERS, *, pad_is_eos: bool = False) -> Any:
    """A token per character: `<pad>` is 0 (absent with `pad_is_eos`), then `;`, the eos, then `characters` in order."""
    special = [";"] if pad_is_eos else ["<pad>", ";"]
    vocabulary = {token: index for index, token in enumerate([*special, *dict.fromkeys(characters)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=";"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=";", pad_token=special[0])
    fast.padding_side = "left"
    return fast


def tiny_llama(
    vocab: int = len(CHARACTERS) + 2,
    *,
    seed: int = 0,
    hidden: int = 16,
    layers: int = 2,
    scale: float = 0.3,
    **config: Any,
) -> Any:
    """A Llama in eval mode whose weights have standard deviation `scale`: large enough for logits that differ."""
    config = {
        "tie_word_embeddings": False,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "eos_token_id": 1,
    } | config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocab,
                hidden_size=hidden,
                intermediate_size=2 * hidden,
                num_hidden_layers=layers,
                num_attention_heads=2,
                num_key_value_heads=1,
                initializer_range=scale,
                bos_token_id=None,
                **config,
            )
        ).eval()


def noisy(model: Any, size: float) -> Any:
    """A copy with noise of that standard deviation in every weight."""
    changed, rng = copy.deepcopy(model), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in changed.parameters():
            weight += size * torch.randn(weight.shape, generator=rng)
    return changed


def alive_at_loads(monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> list[int]:
    """How many of the models that these modules have loaded are alive whenever they load another; grows with each."""
    alive: list[weakref.ref[Any]] = []
    counts: list[int] = []
    load = modules[0].load

    def counting(*arguments: Any, **options: Any) -> Any:
        gc.collect()
        counts.append(sum(reference() is not None for reference in alive))
        lm = load(*arguments, **options)
        alive.append(weakref.ref(lm.model))
        return lm

    for module in modules:
        monkeypatch.setattr(module, "load", counting)
    return counts


def saved(folder: Path, model: Any, tokenizer: Any) -> Path:
    """Write both to `folder` as the hub has them: config, safetensors, tokenizer files."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
