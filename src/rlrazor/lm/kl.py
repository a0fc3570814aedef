"""Exact KL between a fine-tuned policy and its base, summed over the vocabulary at each position of a completion.

    forward   E_x E_{y ~ pi0} sum_t KL(pi0(.|x, y<t) || pi(.|x, y<t))    `Probe`, `forward_kl`: RL's Razor's predictor
    reverse   E_x E_{y ~ pi}  sum_t KL(pi(.|x, y<t) || pi0(.|x, y<t))    `reverse_kl`

Only the completions are sampled: given them, each position's KL is a sum over all V tokens, not an estimate from the
one that was drawn (the k1 and k3 estimators of RL libraries), so its noise is only that of which contexts were visited.
By the chain rule the expectation of the sum over positions is the KL between whole completions.

The base's side of a fixed probe is computed once and kept as final hidden states (D numbers a position) and the LM
head, not as logits (V numbers). What one position needs is, with l_p and l_q the logits,

    KL(p || q) = E_p[l_p - l_q] - logsumexp(l_p) + logsumexp(l_q),

which one pass over the vocabulary yields, a tile of `TILE_ROWS` positions x `TILE_COLUMNS` tokens at a time, with
running maxima. At V = 152k and D = 2048 (Qwen2.5-3B), 10,000 positions of logits would be 6 GB for each policy; here
they are 82 MB of hidden states each, tiles of 2 MB, and 16 MB of each head in float32. The head is copied, 1.2 GB
there, as it may be trained, now or later; under an adapter, where it is frozen, it is shared, and checked to be
unchanged at each measurement.

Sequences are padded on the right and carry no attention mask: under causal attention a real token never sees what
follows it, so padding is neither read nor measured, whatever its id; an eos that the policy wrote counts like any other
token. Models run in one stated precision whatever surrounds the measurement (`compute.measuring`), both sides in the
same, and products with the LM heads are float32 in any case: half-precision logits would be too coarse. Left out:
sharing the prefill of prompts that have several completions.

All functions raise `NotFiniteError` at a policy whose outputs are no longer numbers.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import stdtrit
from torch import Tensor, nn

from rlrazor.errors import RazorError
from rlrazor.lm import compute
from rlrazor.lm.adapters import adapter_disabled, is_adapted, unwrapped
from rlrazor.lm.models import context_length
from rlrazor.lm.sampling import NotFiniteError

TOKEN_BUDGET = 4096  # tokens a forward pass, padding included: 0.1 GB of activations at D = 576, 1 GB at D = 2048
SAMPLED = 1 << 16  # values of a shared head that are watched
TILE_ROWS, TILE_COLUMNS = 256, 2048  # two such float32 tiles, 2 MB each, stay in a core's cache

Told = Callable[[float], None]  # hears how much is done, a fraction of 1

Floats = NDArray[np.float64]
TokenIds = Sequence[int]


class Estimate(NamedTuple):
    """A mean over prompts and its standard error, NaN with fewer than two prompts."""

    mean: float
    stderr: float

    def interval(self, prompts: int, level: float) -> tuple[float, float]:
        """Of a KL: Student's t over so many prompts, from 0 on; of a single one KL itself is taken for the error."""
        error = self.stderr if math.isfinite(self.stderr) else self.mean
        half = float(stdtrit(max(prompts - 1, 1), (1 + level) / 2)) * error
        return max(self.mean - half, 0.0), self.mean + half


@dataclass(frozen=True)
class Sequences:
    """N completions (token ids) of P prompts: what a probe is made of. `prompt_of` has, per completion, its prompt.

    Standard errors take prompts to be independent, and a prompt's completions not. A completion may be empty: it has no
    positions, hence KL 0. Raises RazorError for no prompts and for an empty one, after which nothing can be predicted.
    """

    prompts: Sequence[TokenIds]
    completions: Sequence[TokenIds]
    prompt_of: Sequence[int]

    def __post_init__(self) -> None:
        if not self.completions:
            raise RazorError("There are no completions to measure on: give at least one prompt.")
        if not all(len(prompt) for prompt in self.prompts):
            raise RazorError("A prompt is empty (it has no tokens): leave it out, or start it with the bos token.")

    @classmethod
    def grouped(cls, prompts: Sequence[TokenIds], completions: Sequence[TokenIds]) -> "Sequences":
        """The same number of completions of each prompt, prompt by prompt: what `sampling.sample` returns."""
        samples, rest = divmod(len(completions), max(len(prompts), 1))
        if rest:
            raise ValueError(f"{len(completions)} completions do not divide among {len(prompts)} prompts")
        return cls(prompts, completions, [index // samples for index in range(len(completions))])

    @classmethod
    def texts(cls, texts: Sequence[TokenIds]) -> "Sequences":
        """Whole texts: the first token (bos, where the tokenizer has one) is the prompt, the rest is predicted."""
        return cls([text[:1] for text in texts], [text[1:] for text in texts], range(len(texts)))

    def of_prompts(self, chosen: Sequence[int]) -> "Sequences":
        """Those of some of the prompts, in their order."""
        place = {prompt: index for index, prompt in enumerate(chosen)}
        kept = [n for n, prompt in enumerate(self.prompt_of) if prompt in place]
        return Sequences(
            [self.prompts[prompt] for prompt in chosen],
            [self.completions[n] for n in kept],
            [place[self.prompt_of[n]] for n in kept],
        )


@dataclass(frozen=True, eq=False)
class Drift:
    """KL at every position, in nats, and its means.

    `positions` is the KL at the T positions of all N completions, one after the other; `lengths` (N,) are the
    completions' lengths in tokens, `prompt_of` (N,) their prompts.
    """

    positions: Floats
    lengths: NDArray[np.int64]
    prompt_of: NDArray[np.int64]

    @property
    def n_prompts(self) -> int:
        """Prompts that have a completion here."""
        return len(np.unique(self.prompt_of))

    @property
    def n_tokens(self) -> int:
        """Positions measured, T."""
        return len(self.positions)

    @property
    def sums(self) -> Floats:
        """The sum over each completion's positions (N,)."""
        return _sums(self.positions, self.lengths)

    @property
    def per_completion(self) -> Estimate:
        """Nats per completion: the mean over prompts of the mean over a prompt's completions."""
        return _mean(_by_prompt(self.sums, self.prompt_of))

    @property
    def per_token(self) -> Estimate:
        """Nats per token: the mean KL of a completion over their mean length; standard error by the delta method."""
        return _ratio(_by_prompt(self.sums, self.prompt_of), _by_prompt(self.lengths, self.prompt_of))

    def restricted(self, keep_N: Sequence[bool]) -> "Drift":
        """The same on some of the completions, such as the correct ones. Raises RazorError where none is kept."""
        keep = np.asarray(keep_N, bool)
        if not keep.any():
            raise RazorError("No completion is left to measure KL on: the base solves none of these prompts.")
        return Drift(self.positions[np.repeat(keep, self.lengths)], self.lengths[keep], self.prompt_of[keep])

    @classmethod
    def joined(cls, parts: Sequence["Drift"]) -> "Drift":
        """Measurements on different prompts, such as those of several processes, as one."""
        ends = np.cumsum([0, *(int(part.prompt_of.max()) + 1 for part in parts)])
        return cls(
            np.concatenate([part.positions for part in parts]),
            np.concatenate([part.lengths for part in parts]),
            np.concatenate([part.prompt_of + end for part, end in zip(parts, ends[:-1], strict=True)]),
        )


class Probe:
    """The base's side of a KL on fixed sequences, computed once: final hidden states and LM head.

    `model` is the base; of a PEFT model, it is what is left with the adapter disabled. It may be trained afterwards.
    With `adapted`, the model as it is: the other side of `between`. `beside`: another probe of the same model, whose
    head is shared. `precision`: what both sides are computed in (`compute.measuring`), by default as the weights are.
    `told` hears how much is done. Raises RazorError for sequences longer than the context, and for a model whose logits
    are not a linear head's.
    """

    def __init__(
        self,
        model: Any,
        sequences: Sequences,
        *,
        adapted: bool = False,
        beside: "Probe | None" = None,
        precision: str | None = None,
        token_budget: int = TOKEN_BUDGET,
        told: Told | None = None,
    ) -> None:
        self.sequences = sequences
        self.precision = precision or compute.precision_of(model)
        with nullcontext() if adapted else adapter_disabled(model):
            self.states, head = final_states(model, sequences, token_budget, self.precision, told)
        self._sample: Tensor | None = None  # of a head that is shared
        self._head: Head
        if beside is not None:
            self._head, self._sample = beside._head, beside._sample
        elif is_adapted(model) and head.is_frozen:
            self._head, self._sample = head, head.sample()
        else:  # it may have changed by the time it is compared with
            self._head = head.copied()

    @property
    def head(self) -> "Head":
        """The LM head as it was. Raises RazorError where it is shared with the model, and the model's has changed."""
        if self._sample is not None and not torch.equal(self._head.sample(), self._sample):
            raise RazorError(
                "The model's LM head has changed, which was frozen under the adapter when the base was measured: the "
                "base is gone. Name the head among modules_to_save, or leave it frozen."
            )
        return self._head

    def spread(self, prompts: int) -> "Probe":
        """The same on so many prompts, evenly spaced, as a file may be sorted; itself where there are no more."""
        total = len(self.sequences.prompts)
        if prompts >= total:
            return self
        few, chosen = copy.copy(self), evenly(total, prompts)
        few.sequences = self.sequences.of_prompts(chosen)
        kept_N = np.isin(self.sequences.prompt_of, chosen)
        few.states = self.states[torch.from_numpy(np.repeat(kept_N, _lengths(self.sequences))).to(self.states.device)]
        return few


def evenly(total: int, count: int) -> list[int]:
    """So many of the first numbers, evenly spaced."""
    return [index * total // count for index in range(count)]


def forward_kl(probe: Probe, tuned: Any, *, token_budget: int = TOKEN_BUDGET) -> Drift:
    """KL(base || tuned) on the probe; for RL's Razor's, the probe holds completions sampled from the base.

    Costs a forward pass of `tuned` and a second product with the LM head, the base's. Raises RazorError where the
    vocabularies differ.
    """
    tuned_TD, head = final_states(tuned, probe.sequences, token_budget, probe.precision)
    return _drift(_kl(probe.states, probe.head, tuned_TD, head), probe.sequences)


def between(p: Probe, q: Probe) -> Drift:
    """KL(p || q) of two policies probed on the same sequences, neither of which need be in memory any more.

    Raises RazorError where the vocabularies differ.
    """
    if p.sequences != q.sequences:
        raise ValueError("the two probes are of different sequences")
    return _drift(_kl(p.states, p.head, q.states, q.head), p.sequences)


def reverse_kl(tuned: Any, sequences: Sequences, base: Any = None, *, token_budget: int = TOKEN_BUDGET) -> Drift:
    """KL(tuned || base) on completions sampled from `tuned`. `base` None: `tuned`, a PEFT model, without its adapter.

    Costs a forward pass of each, in the precision of the base's weights. Raises RazorError where the vocabularies
    differ, or without a base.
    """
    if base is None and not is_adapted(tuned):
        raise RazorError("KL to the base needs the base model: after full fine-tuning it is not in the tuned one.")
    precision = compute.precision_of(tuned if base is None else base)
    tuned_TD, tuned_head = final_states(tuned, sequences, token_budget, precision)
    with adapter_disabled(tuned if base is None else base):
        base_TD, base_head = final_states(tuned if base is None else base, sequences, token_budget, precision)
        return _drift(_kl(tuned_TD, tuned_head, base_TD, base_head), sequences)


def log_probs(model: Any, sequences: Sequences, *, token_budget: int = TOKEN_BUDGET) -> Floats:
    """log pi(y|x) of each completion (N,), in nats, 0 for an empty one."""
    return _sums(_token_log_probs(model, sequences, token_budget), _lengths(sequences))


def token_loss(model: Any, texts: Sequence[TokenIds], *, token_budget: int = TOKEN_BUDGET) -> Estimate:
    """The loss on text in nats per token, the first of each text not predicted: a cheap proxy of prior performance.

    The standard error takes texts to be independent. Raises RazorError where no text has a second token.
    """
    sequences = Sequences.texts(texts)
    lengths_N = _lengths(sequences)
    if not lengths_N.any():
        raise RazorError("No text has two tokens or more, so there is nothing to predict.")
    return _ratio(-_sums(_token_log_probs(model, sequences, token_budget), lengths_N), lengths_N.astype(float))


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
            logits_TC += self.bias[columns].detach().float()
        return self.transformed(logits_TC)

    def transformed(self, logits: Tensor) -> Tensor:
        """Scale and softcap, in place."""
        if self.scale != 1:
            logits *= self.scale
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    @property
    def is_frozen(self) -> bool:
        """Whether nothing of it is trained, as things stand."""
        return not self.weight.requires_grad and (self.bias is None or not self.bias.requires_grad)

    def sample(self) -> Tensor:
        """Evenly spaced values of it, SAMPLED at most: no training leaves all of them as they were."""
        parts = [self.weight] if self.bias is None else [self.weight, self.bias]
        flat = [part.detach().flatten() for part in parts]
        places = [np.linspace(0, len(part) - 1, min(len(part), SAMPLED)).astype(np.int64) for part in flat]
        chosen = [part[torch.from_numpy(at).to(part.device)] for part, at in zip(flat, places, strict=True)]
        return torch.cat([values.cpu() for values in chosen])

    def copied(self) -> "Head":
        """One of its own memory."""
        bias = None if self.bias is None else self.bias.detach().clone()
        return Head(self.weight.detach().clone(), bias, self.scale, self.softcap)


def _head_of(model: Any) -> Head:
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
    if type(module) is nn.Linear:
        return Head(module.weight, module.bias, scale, softcap)
    # Any other affine map, such as a head with an adapter of its own: its matrix is its values on the unit vectors.
    embeddings = model.get_input_embeddings().weight
    zero_1D = torch.zeros(1, config.hidden_size, dtype=embeddings.dtype, device=embeddings.device)
    unit_DD = torch.eye(config.hidden_size, dtype=embeddings.dtype, device=embeddings.device)
    with torch.autocast(embeddings.device.type, enabled=False):
        bias_V = module(zero_1D)[0]
        return Head((module(unit_DD) - bias_V).T.contiguous(), bias_V, scale, softcap)


def final_states(
    model: Any,
    sequences: Sequences,
    token_budget: int = TOKEN_BUDGET,
    precision: str | None = None,
    told: Told | None = None,
) -> tuple[Tensor, Head]:
    """Hidden states (T, D) that predict each completion token, in the order of `sequences`, and the head for them.

    They are what the LM head is called with, so every normalisation of the model is in them. The head is handed a
    single position, whose logits cost nothing and are compared with ours. `precision`: as `compute.measuring` takes it,
    by default the weights' own; `told` hears how much is done. Raises RazorError for sequences longer than the context,
    and for a model whose logits are not a linear head's.
    """
    model = unwrapped(model)
    longest = max(
        len(sequences.prompts[p]) + len(c) for p, c in zip(sequences.prompt_of, sequences.completions, strict=True)
    )
    limit = context_length(model)
    if limit is not None and longest - 1 > limit:
        raise RazorError(
            f"A prompt with its completion has {longest} tokens, but the model's context holds {limit}. "
            "Shorten the prompts or the completions."
        )
    called_with: list[Tensor] = []
    computed_in: list[torch.dtype] = []

    def only_first(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        called_with.append(args[0])
        return (args[0][:1, :1], *args[1:])

    def note_dtype(_: nn.Module, __: tuple[Tensor, ...], logits: Tensor) -> None:
        computed_in.append(logits.dtype)  # accelerate's autocast hands half-precision logits out as float32

    lengths_N = _lengths(sequences)
    starts_N = np.cumsum(lengths_N) - lengths_N
    states_TD = None
    with compute.measuring(model, precision or compute.precision_of(model)):
        head = _head_of(model)
        device = head.weight.device
        output = model.get_output_embeddings()
        hooks = [output.register_forward_pre_hook(only_first), output.register_forward_hook(note_dtype)]
        try:
            batches = _batches(sequences, token_budget)
            for done, batch in enumerate(batches, 1):
                # The last token predicts nothing that is measured, so it is not fed.
                rows = [[*sequences.prompts[sequences.prompt_of[n]], *sequences.completions[n]][:-1] for n in batch]
                width = max(map(len, rows))
                padded = [row + [0] * (width - len(row)) for row in rows]
                called_with.clear()
                ids_BT = torch.tensor(padded, dtype=torch.long, device=device)
                logits = model(input_ids=ids_BT, use_cache=False).logits
                if not called_with:
                    raise RazorError("This model does not call its LM head, so its hidden states cannot be told apart.")
                hidden_BTD = called_with[0]
                if hidden_BTD.shape[1] != width:
                    raise RazorError(
                        "This model reads more positions than it is given tokens (prompt tuning puts virtual ones in "
                        "front), so its hidden states cannot be told apart."
                    )
                if states_TD is None:
                    _check_head(head, hidden_BTD[0, :1], logits[0, :1], computed_in[0])
                    states_TD = hidden_BTD.new_empty(int(lengths_N.sum()), hidden_BTD.shape[-1])
                # Position t of a row predicts its completion's token number t - first.
                first_B = np.array([len(sequences.prompts[sequences.prompt_of[n]]) - 1 for n in batch])
                token_BT = np.arange(width) - first_B[:, None]
                measured_BT = (token_BT >= 0) & (token_BT < lengths_N[batch][:, None])
                target_T = (token_BT + starts_N[batch][:, None])[measured_BT]
                measured_T = hidden_BTD[torch.from_numpy(measured_BT).to(hidden_BTD.device)]
                states_TD[torch.from_numpy(target_T).to(states_TD.device)] = measured_T
                if told is not None:
                    told(done / len(batches))
        finally:
            for hook in hooks:
                hook.remove()
    if states_TD is None:
        states_TD = head.weight.new_empty(0, head.weight.shape[1])
    return states_TD, head


def _check_head(head: Head, states_1D: Tensor, logits_1V: Tensor, computed_in: torch.dtype) -> None:
    with compute.float32_products(states_1D.device.type):
        ours_1V = head.logits(states_1D, head.weight.float(), slice(None))
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


def _batches(sequences: Sequences, token_budget: int) -> list[NDArray[np.int64]]:
    """Indices of non-empty completions, similar lengths together, the longest first: out of memory shows at once."""
    lengths_N = _lengths(sequences)
    prompts_N = np.array([len(sequences.prompts[p]) for p in sequences.prompt_of])
    order = np.argsort(-(prompts_N + lengths_N), kind="stable")
    order = order[lengths_N[order] > 0]
    batches = []
    while len(order):
        rows = max(1, token_budget // int(prompts_N[order[0]] + lengths_N[order[0]] - 1))
        batches.append(order[:rows])
        order = order[rows:]
    return batches


@torch.no_grad()
def _kl(p_TD: Tensor, p_head: Head, q_TD: Tensor, q_head: Head) -> Floats:
    """KL(p || q) at each position (T,), in one pass over the vocabulary."""
    vocabulary = len(p_head.weight)
    if len(q_head.weight) != vocabulary:
        raise RazorError(
            f"The two models have vocabularies of {vocabulary} and {len(q_head.weight)} tokens: KL between them is "
            "not defined. Compare a model with the base it was fine-tuned from."
        )
    p_sum, q_sum = _RunningSum(p_TD), _RunningSum(q_TD)
    gap_T = torch.zeros(len(p_TD), dtype=torch.float64, device=p_TD.device)
    with compute.float32_products(p_TD.device.type):
        for columns, weights in _columns(p_head, q_head):
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
def _token_log_probs(model: Any, sequences: Sequences, token_budget: int) -> Floats:
    """log pi of each completion token (T,)."""
    states_TD, head = final_states(model, sequences, token_budget)
    tokens = [token for completion in sequences.completions for token in completion]
    chosen_T = torch.tensor(tokens, dtype=torch.long, device=states_TD.device)
    sum_ = _RunningSum(states_TD)
    logit_T = torch.zeros(len(states_TD), dtype=torch.float64, device=states_TD.device)
    with compute.float32_products(states_TD.device.type):
        for columns, (weight_CD,) in _columns(head):
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


def _columns(*heads: Head) -> Iterator[tuple[slice, list[Tensor]]]:
    """Slices of the vocabulary with the float32 weights of each head there."""
    vocabulary = len(heads[0].weight)
    for start in range(0, vocabulary, TILE_COLUMNS):
        columns = slice(start, min(start + TILE_COLUMNS, vocabulary))
        yield columns, [head.weight[columns].detach().float() for head in heads]


def _finite(values_T: Tensor) -> Floats:
    if not values_T.isfinite().all():
        raise NotFiniteError("log-probabilities are not finite")
    return np.asarray(values_T.cpu())


def _drift(kl_T: Floats, sequences: Sequences) -> Drift:
    return Drift(kl_T, _lengths(sequences), np.array(sequences.prompt_of, dtype=np.int64))


def _lengths(sequences: Sequences) -> NDArray[np.int64]:
    return np.array([len(completion) for completion in sequences.completions], dtype=np.int64)


def _sums(values_T: Floats, lengths_N: NDArray[np.int64]) -> Floats:
    """Sums over consecutive stretches, which may be empty."""
    sequence_T = np.repeat(np.arange(len(lengths_N)), lengths_N)
    sums: Floats = np.bincount(sequence_T, weights=values_T, minlength=len(lengths_N)).astype(float)
    return sums


def _by_prompt(values_N: NDArray[Any], prompt_of_N: NDArray[np.int64]) -> Floats:
    """Means over each prompt's completions, of the prompts that have any."""
    _, prompt_N, counts_P = np.unique(prompt_of_N, return_inverse=True, return_counts=True)
    return np.asarray(np.bincount(prompt_N, weights=values_N) / counts_P)


def _mean(values_P: Floats) -> Estimate:
    spread = values_P.std(ddof=1) / np.sqrt(len(values_P)) if len(values_P) > 1 else np.nan
    return Estimate(float(values_P.mean()), float(spread))


def _ratio(over_P: Floats, under_P: Floats) -> Estimate:
    """A ratio of means. Its standard error is that of over - ratio * under, divided by the mean of under."""
    if not under_P.any():
        raise RazorError("All completions are empty, so there is no KL per token.")
    ratio = float(over_P.mean() / under_P.mean())
    return Estimate(ratio, _mean(over_P - ratio * under_P).stderr / float(under_P.mean()))
