"""What tells models and tokenizers apart: digests of what they hold and compute, the same whatever they are called."""

import hashlib
import math
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlrazor.lm import compute, lockstep
from rlrazor.lm.adapters import adapter_disabled, base_parameters, unwrapped, without_wrapper
from rlrazor.lm.forward import context_length, embedding_rows
from rlrazor.lm.sampling import NotFiniteError

DIGEST_TOKENS = 128
SERVED = "served"  # in a digest, in place of a precision: of a base whose weights are not here
DIGEST_VALUES = 32  # log-probabilities that are kept of them
SAME_WEIGHTS = 1e-9  # of their norm: what the order of a sum in float64 may change
# Nats by which a log-probability may differ between machines and libraries, whose weights are the same.
SAME_LOGITS = {"float32": 5e-3}
SAME_LOGITS_IN_HALF = 0.15


def fixed_tokens(rows: int, length: int) -> list[int]:
    """So many token ids, the same for all models of a vocabulary, and spread over it."""
    return [(7919 * at * at + 104729 * at + 1) % rows for at in range(length)]


@torch.no_grad()
def token_log_probs(model: Any, precision: str | None = None, *, adapted: bool = False) -> Tensor:
    """What a model thinks of fixed tokens, spread over its vocabulary: log pi of each but the first, in nats, float64.

    Of a PEFT model without its adapter, or with `adapted` with it; in its weights' own precision unless one is named.
    """
    model = unwrapped(model)
    rows = embedding_rows(model) or len(model.get_input_embeddings().weight)
    length = min(DIGEST_TOKENS, context_length(without_wrapper(model)) or DIGEST_TOKENS)
    ids_T = torch.tensor(fixed_tokens(rows, length), dtype=torch.long, device=compute.device_of(model))
    off = nullcontext() if adapted else adapter_disabled(model)
    with compute.measuring(model, precision), off:
        logits_TV = model(input_ids=ids_T[None], use_cache=False).logits[0, -length:]
    logp_TV = logits_TV[:-1].double().log_softmax(dim=-1)
    logp_T: Tensor = logp_TV.gather(1, ids_T[1:, None].to(logp_TV.device))[:, 0].cpu()
    return logp_T


@torch.no_grad()
def base_digest(model: Any, precision: str | None = None) -> str:
    """What tells bases apart, and an adapter's base from another: all of its weights, and what they compute.

    The sum and the norm of the weights, rounded to bfloat16, so that a base loaded in float32 and in bfloat16 is one;
    and log-probabilities of fixed tokens in the named precision. Neither depends on the names, the order or the fusing
    of weights, nor on those of settings, which change with the version of a library. To be compared by `is_same_base`,
    as last digits depend on the machine. Raises NotFiniteError.
    """
    total, square = 0.0, 0.0

    def add(_: str, weight: Tensor) -> None:
        nonlocal total, square
        rounded = weight.detach().to(torch.bfloat16) if weight.is_floating_point() else weight.detach().float()
        total += float(rounded.sum(dtype=torch.float64))
        square += float(torch.linalg.vector_norm(rounded, dtype=torch.float64)) ** 2

    lockstep.each_whole(model, base_parameters, add)
    logp_T = token_log_probs(model, precision)
    if not logp_T.isfinite().all():
        raise NotFiniteError("logits are not finite")
    values = " ".join(f"{value:.4f}" for value in logp_T[compute.spread(len(logp_T), DIGEST_VALUES)].tolist())
    return f"{precision or compute.precision_of(model)} {total:.12e} {math.sqrt(square):.12e} {values}"


def is_digest(text: str) -> bool:
    """Whether this is a digest of this version's."""
    return len(text.split()) > 3 and text.split()[0] in (*compute.PRECISIONS, SERVED)


def is_same_base(one: str, other: str) -> bool:
    """Whether two digests are of one base: the same weights, and log-probabilities that differ by rounding only."""
    if not is_digest(one) or not is_digest(other) or len(one.split()) != len(other.split()):
        return False
    try:
        ours, theirs = (np.array(text.split()[1:], dtype=float) for text in (one, other))
    except ValueError:
        return False
    apart, (total, norm) = np.abs(ours - theirs), ours[:2]
    if not all(one <= SAME_WEIGHTS * max(abs(total), norm) for one in apart[:2]):  # also where one is NaN
        return False
    tolerance = max(SAME_LOGITS.get(text.split()[0], SAME_LOGITS_IN_HALF) for text in (one, other))
    # Of a mixture of experts a few tokens may be routed otherwise.
    return bool(np.sort(apart[2:])[len(apart[2:]) // 2] <= tolerance)


def tokenizer_digest(tokenizer: Any) -> str:
    """A SHA-256 of what it makes of a prompt: the id of each token, the chat template, eos; 16 hexadecimal digits."""
    defining = [sorted(tokenizer.get_vocab().items()), getattr(tokenizer, "chat_template", None), tokenizer.eos_token]
    return hashlib.sha256(str(defining).encode()).hexdigest()[:16]
