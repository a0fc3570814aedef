"""What a model says of itself, whatever its architecture: its context, its embeddings, its device."""

from typing import Any

import torch

# What configs call the most positions, the first that there is.
_CONTEXTS = (
    "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions", "model_max_length",
)  # fmt: skip


def context_length(model: Any) -> int | None:
    """The most tokens a sequence may have; None where the config sets no limit.

    RoBERTa and its kin count positions from behind the padding row of their table, which holds so many fewer.
    """
    try:
        config = model.config.get_text_config(decoder=True)
    except ValueError:  # a config of several parts, of which transformers will not choose
        config = model.config
    limits = [limit for name in _CONTEXTS if isinstance(limit := getattr(config, name, None), int) and limit > 0][:1]
    for name, module in model.named_modules() if isinstance(model, torch.nn.Module) else ():
        table = isinstance(module, torch.nn.Embedding) and "position" in name.rpartition(".")[-1]
        if table and module.padding_idx is not None:
            limits.append(module.num_embeddings - module.padding_idx - 1)
    return min(limits, default=None)


def embedding_rows(model: Any) -> int | None:
    """How many tokens the model has embeddings for; None where it does not say."""
    try:
        return int(model.get_input_embeddings().num_embeddings)
    except (AttributeError, NotImplementedError):
        return None


def device_of(model: Any) -> torch.device:
    """Where its first parameter is."""
    device: torch.device = next(model.parameters()).device
    return device
