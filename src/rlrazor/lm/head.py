"""An LM head, and one pass over its vocabulary: exact KL and log-probabilities from final hidden states.

What one position needs is, with l_p and l_q the logits,

    KL(p || q) = E_p[l_p - l_q] - logsumexp(l_p) + logsumexp(l_q),

which one pass over the vocabulary yields, a tile of `TILE_ROWS` positions x `TILE_COLUMNS` tokens at a time, with
running maxima. At V = 152k and D = 2048 (Qwen2.5-3B), 10,000 positions of logits would be 6 GB for each policy; here
they are 82 MB of hidden states each, tiles of 2 MB, and 16 MB of each head in float32. Products with the LM heads are
float32 in any case: half-precision logits would be too coarse.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rlrazor.errors import RazorError
from rlrazor.lm import compute, shards
from rlrazor.lm.offloading import brought_weight
from rlrazor.lm.quantised import is_quantised
from rlrazor.lm.sampling import NotFiniteError

SAMPLED = 1 << 16  # values of a shared head that are watched
TILE_ROWS, TILE_COLUMNS = 256, 2048  # two such float32 tiles, 2 MB each, stay in a core's cache
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Head:
    """What turns final hidden states into logits: softcap(scale * (states W^T + bias))."""

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None

    def logits(self, states_TD: Tensor, weight_CD: Tensor, columns: slice) -> Tensor:
        """Float32 logits (T, C) of the tokens `columns`; `weight_CD` is their float32 weight."""
        logits_TC: Tensor = states_TD.float() @ weight_CD.T
        if self.bias is not None:
            logits_TC += self.bias[columns].detach().to(logits_TC.device).float()
        if self.scale != 1:
            logits_TC *= self.scale
        if self.softcap is not None:
            logits_TC.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_TC

    @property
    def is_frozen(self) -> bool:
        """Whether nothing of it is trained, as things stand."""
        return not self.weight.requires_grad and (self.bias is None or not self.bias.requires_grad)

    def sample(self) -> Tensor:
        """Evenly spaced values of it, SAMPLED at most: no training leaves all of them as they were."""
        parts = [self.weight] if self.bias is None else [self.weight, self.bias]
        flat = [part.detach().flatten() for part in parts]
        return torch.cat([part[compute.spread(len(part), SAMPLED).to(part.device)].cpu() for part in flat])

    def copied(self) -> "Head":
        """One of its own memory."""
        bias = None if self.bias is None else self.bias.detach().clone()
        return Head(self.weight.detach().clone(), bias, self.scale, self.softcap)

    def on_host(self) -> "Head":
        """The same in the host's memory."""
        bias = None if self.bias is None else self.bias.detach().cpu()
        return Head(self.weight.detach().cpu(), bias, self.scale, self.softcap)


def head_of(model: Any) -> Head:
    """A model's, as its config says; of a sharded model a copy. Raises RazorError where there is none."""
    module = model.get_output_embeddings()
    if module is None:
        raise RazorError("This model has no LM head, so it is not a causal language model.")
    config = model.config.get_text_config()
    # Cohere, Falcon-H1, Granite.
    multipliers = [getattr(config, name, None) or 1.0 for name in ("logit_scale", "lm_head_multiplier")]
    divisor = None if hasattr(config, "dim_model_base") else getattr(config, "logits_scaling", None)  # not MiniCPM3's
    scale = math.prod(multipliers) / (divisor or 1.0)
    # Gemma, RecurrentGemma, xLSTM.
    caps = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    softcap = next((cap for name in caps if (cap := getattr(config, name, None))), None)
    if shards.is_sharded(model):
        return Head(*_while_gathered(model, shards.inside(module)), scale, softcap)
    if type(module) is nn.Linear and not is_quantised(module):
        bias = None if module.bias is None else brought_weight(module, "bias")
        return Head(brought_weight(module, "weight"), bias, scale, softcap)
    # Any other affine map, such as a head with an adapter of its own: its matrix is its values on the unit vectors.
    dtype, device = model.get_input_embeddings().weight.dtype, compute.device_of(model)
    zero_1D = torch.zeros(1, config.hidden_size, dtype=dtype, device=device)
    unit_DD = torch.eye(config.hidden_size, dtype=dtype, device=device)
    with torch.autocast(device.type, enabled=False):
        bias_V = module(zero_1D)[0]
        return Head((module(unit_DD) - bias_V).T.contiguous(), bias_V, scale, softcap)


def _while_gathered(model: Any, module: Any) -> tuple[Tensor, Tensor | None]:
    """A sharded model's head, in a call of one token, during which it is whole and what the model computes with.

    Any other affine map than a plain one is asked for its values on the unit vectors, as above.
    """
    is_plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    found: list[Tensor | None] = []

    def before(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if is_plain:
            found.extend(None if part is None else part.detach().clone() for part in (module.weight, module.bias))
            return args
        width = args[0].shape[-1]
        rows_RD = torch.cat([args[0].new_zeros(1, width), torch.eye(width).to(args[0])])
        return (rows_RD[None], *args[1:])

    def after(_: nn.Module, __: tuple[Tensor, ...], logits_1RV: Tensor) -> None:
        if not is_plain:
            bias_V = logits_1RV[0, 0].clone()
            found.extend([(logits_1RV[0, 1:] - bias_V).T.contiguous(), bias_V])

    # By the parameter, which is trained or not, and not by what is gathered of it.
    own = getattr(module, "weight", None)
    frozen = isinstance(own, nn.Parameter) and not own.requires_grad
    hooks = [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=compute.device_of(model)), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        raise RazorError("This model does not call its LM head, so its hidden states cannot be told apart.")
    weight, bias = found
    assert weight is not None
    return weight.requires_grad_(not (is_plain and frozen)), bias


def check_head(head: Head, states_1D: Tensor, logits_1V: Tensor, computed_in: torch.dtype) -> Head:
    """The head, as it makes the model's own logits of a final hidden state; raises RazorError where it does not.

    Where the config is of a text model inside of another, that may leave out the scale and the cap (Aya Vision).
    """
    as_it_is, place = replace(head, scale=1.0, softcap=None), states_1D.device
    logits_1V, weight_VD = logits_1V.to(place), head.weight.to(place).float()  # of a placed model they may be elsewhere
    with compute.float32_products(place.type):
        ours_1V, bare_1V = (one.logits(states_1D, weight_VD, slice(None)) for one in (head, as_it_is))
    if bare_1V.shape == logits_1V.shape == ours_1V.shape and logits_1V.isfinite().all():
        apart, bare_apart = ((one_1V - logits_1V.float()).abs().max() for one_1V in (ours_1V, bare_1V))
        if bare_apart < apart:
            head, ours_1V = as_it_is, bare_1V
    # Half-precision logits are rounded by the model, ours are not.
    tolerance = 1e-3 if computed_in == torch.float32 else 3e-2
    scale = logits_1V.float().abs().max().clamp(min=1e-3)
    if not logits_1V.isfinite().all():
        raise NotFiniteError("logits are not finite")
    if ours_1V.shape != logits_1V.shape or (ours_1V - logits_1V.float()).abs().max() > tolerance * scale:
        raise RazorError(
            "This model's logits are not its final hidden states times its LM head, scaled and capped as its config "
            "says, so its KL cannot be computed."
        )
    return head


@torch.no_grad()
def kl_at_positions(p_TD: Tensor, p_head: Head, q_TD: Tensor, q_head: Head) -> Floats:
    """KL(p || q) at each position (T,), in one pass over the vocabulary."""
    vocabulary = len(p_head.weight)
    if len(q_head.weight) != vocabulary:
        raise RazorError(
            f"The two models have vocabularies of {vocabulary} and {len(q_head.weight)} tokens: KL between them is "
            "not defined. Compare a model with the base it was fine-tuned from."
        )
    q_TD = q_TD.to(p_TD.device)
    p_sum, q_sum = _RunningSum(p_TD), _RunningSum(q_TD)
    gap_T = torch.zeros(len(p_TD), dtype=torch.float64, device=p_TD.device)
    with compute.float32_products(p_TD.device.type):
        for columns, weights in _columns(p_TD.device, p_head, q_head):
            for start in range(0, len(p_TD), TILE_ROWS):
                rows = slice(start, start + TILE_ROWS)
                p_RC = p_head.logits(p_TD[rows], weights[0], columns)
                q_RC = q_head.logits(q_TD[rows], weights[1], columns)
                difference_RC = p_RC - q_RC
                kept_R = p_sum.add(rows, p_RC)
                q_sum.add(rows, q_RC)
                # p_RC now holds exp(l_p - max).
                gap_T[rows] = gap_T[rows] * kept_R + p_RC.mul_(difference_RC).sum(dim=1)
    # Rounding can leave a KL of 0 a hair below it.
    return _finite((gap_T / p_sum.total_T - p_sum.log() + q_sum.log()).clamp(min=0))


@torch.no_grad()
def log_probs_at_positions(states_TD: Tensor, head: Head, tokens: Sequence[int]) -> Floats:
    """log pi of the token that follows each position (T,), in one pass over the vocabulary."""
    chosen_T = torch.tensor(tokens, dtype=torch.long, device=states_TD.device)
    sum_ = _RunningSum(states_TD)
    logit_T = torch.zeros(len(states_TD), dtype=torch.float64, device=states_TD.device)
    with compute.float32_products(states_TD.device.type):
        for columns, (weight_CD,) in _columns(states_TD.device, head):
            for start in range(0, len(states_TD), TILE_ROWS):
                rows = slice(start, start + TILE_ROWS)
                logits_RC = head.logits(states_TD[rows], weight_CD, columns)
                column_R = chosen_T[rows] - columns.start
                here_R = (column_R >= 0) & (column_R < columns.stop - columns.start)
                picked_R = logits_RC.gather(1, column_R.clamp(0, columns.stop - columns.start - 1)[:, None])[:, 0]
                logit_T[rows] += torch.where(here_R, picked_R, 0.0)
                sum_.add(rows, logits_RC)
    return _finite(logit_T - sum_.log())


class _RunningSum:
    """The sum of exp(logits) over the vocabulary, relative to the maximum so far, for T positions."""

    def __init__(self, states_TD: Tensor) -> None:
        self.top_T = torch.full((len(states_TD),), -torch.inf, dtype=torch.float32, device=states_TD.device)
        self.total_T = torch.zeros(len(states_TD), dtype=torch.float64, device=states_TD.device)

    def add(self, rows: slice, logits_RC: Tensor) -> Tensor:
        """Add a tile, which becomes exp(logits - maximum); returns what earlier tiles' sums are to be multiplied by."""
        top_R = torch.maximum(self.top_T[rows], logits_RC.amax(dim=1))
        kept_R: Tensor = (self.top_T[rows] - top_R).exp().double()
        self.total_T[rows] = self.total_T[rows] * kept_R + logits_RC.sub_(top_R[:, None]).exp_().sum(dim=1)
        self.top_T[rows] = top_R
        return kept_R

    def log(self) -> Tensor:
        """Logsumexp (T,), float64."""
        return self.total_T.log() + self.top_T


def _columns(device: torch.device, *heads: Head) -> Iterator[tuple[slice, list[Tensor]]]:
    """Slices of the vocabulary with the float32 weights of each head there, on a device that need not hold them all."""
    vocabulary = len(heads[0].weight)
    for start in range(0, vocabulary, TILE_COLUMNS):
        columns = slice(start, min(start + TILE_COLUMNS, vocabulary))
        yield columns, [head.weight[columns].detach().to(device).float() for head in heads]


def _finite(values_T: Tensor) -> Floats:
    if not values_T.isfinite().all():
        raise NotFiniteError("log-probabilities are not finite")
    return np.asarray(values_T.cpu())
