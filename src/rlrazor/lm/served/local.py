"""A model that is here, read as a served one is: all of its distribution is known, and of that what is needed."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rlrazor.errors import RazorError
from rlrazor.lm import compute
from rlrazor.lm.kl import Sequences, final_states
from rlrazor.lm.sampling import NotFiniteError, Told, unheard
from rlrazor.lm.served.known import NO_TOKEN, Floats, Known

TOP = 256  # likeliest tokens, beside those that the other side knows
ROWS = 64  # positions at a time: at V = 152k their logits are 39 MB


@dataclass(frozen=True, eq=False)
class LocalModel:
    """One in memory, measured in `precision`."""

    model: Any
    precision: str | None

    def read(self, sequences: Sequences, beside: Known | None = None, told: Told = unheard) -> Known:
        """What it says of every token of the completions, in their order; also on the tokens that `beside` has.

        Raises RazorError where the other side has tokens that this model lacks, and NotFiniteError.
        """
        states_TD, head = final_states(self.model, sequences, precision=self.precision, told=told)
        tokens = np.array([token for completion in sequences.completions for token in completion], np.int64)
        weight_VD = head.weight.detach().to(states_TD.device).float()
        vocabulary = len(weight_VD)
        others = np.zeros((len(tokens), 0), np.int64) if beside is None else beside.ids
        if (most := max(others.max(initial=0), tokens.max(initial=0))) >= vocabulary:
            raise RazorError(
                f"The served model has a token {most}, and the one here {vocabulary} tokens: KL between them is not "
                "defined. Compare a model with the base it was fine-tuned from."
            )
        parts = []
        with torch.no_grad(), compute.float32_products(states_TD.device.type):
            for start in range(0, len(tokens), ROWS):
                rows = slice(start, start + ROWS)
                logps_RV = head.logits(states_TD[rows], weight_VD, slice(None)).log_softmax(dim=-1)
                if not logps_RV.isfinite().all():
                    raise NotFiniteError("log-probabilities are not finite")
                parts.append(known_of(logps_RV.cpu().double(), tokens[rows], others[rows], TOP))
        return Known.joined(parts)

    def whole(self, sequences: Sequences) -> Iterator[Floats]:
        """Of each completion, the log-probabilities of the whole vocabulary at its tokens (T, V)."""
        states_TD, head = final_states(self.model, sequences, precision=self.precision)
        weight_VD, at = head.weight.detach().to(states_TD.device).float(), 0
        for completion in sequences.completions:
            with torch.no_grad(), compute.float32_products(states_TD.device.type):
                logits_TV = head.logits(states_TD[at : at + len(completion)], weight_VD, slice(None))
            if not logits_TV.isfinite().all():
                raise NotFiniteError("logits are not finite")
            at += len(completion)
            yield np.asarray(logits_TV.cpu().double().log_softmax(dim=-1))


def known_of(logps_RV: torch.Tensor, tokens_R: Any, others_RK: Any, top: int) -> Known:
    """Of whole distributions: the likeliest tokens, those that the other side knows, and the token that follows."""
    tops = logps_RV.topk(min(top, logps_RV.shape[1]), dim=1)
    top_RT, others = tops.indices.numpy(), torch.from_numpy(np.maximum(others_RK, 0))
    known_RK = logps_RV.gather(1, others).numpy()
    new_RK = (others_RK != NO_TOKEN) & ~(others_RK[:, :, None] == top_RT[:, None, :]).any(axis=2)
    return Known(
        ids=np.column_stack([np.where(new_RK, others_RK, NO_TOKEN), top_RT]),
        logps=np.column_stack([np.where(new_RK, known_RK, -np.inf), tops.values.numpy()]),
        drawn=logps_RV.gather(1, torch.from_numpy(tokens_R)[:, None]).numpy()[:, 0],
        caps=tops.values[:, -1].numpy(),
    )
