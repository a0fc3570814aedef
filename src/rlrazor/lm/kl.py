"""Exact KL between a fine-tuned policy and its base, summed over the vocabulary at each position of a completion.

    forward   E_x E_{y ~ pi0} sum_t KL(pi0(.|x, y<t) || pi(.|x, y<t))    `Probe`, `forward_kl`: RL's Razor's predictor
    reverse   E_x E_{y ~ pi}  sum_t KL(pi(.|x, y<t) || pi0(.|x, y<t))    `reverse_kl`

Only the completions are sampled: given them, each position's KL is a sum over all V tokens, not an estimate from the
one that was drawn (the k1 and k3 estimators of RL libraries), so its noise is only that of which contexts were visited.
By the chain rule the expectation of the sum over positions is the KL between whole completions.

The base's side of a fixed probe is computed once and kept as final hidden states (D numbers a position) and the LM
head, not as logits (V numbers); what is made of them is in `head`. The head is copied (1.2 GB for Qwen2.5-3B), as it
may be trained, now or later; under an adapter, where it is frozen, it is shared, and checked to be unchanged at each
measurement.

Sequences are padded on the right and carry no attention mask: under causal attention a real token never sees what
follows it, so padding is neither read nor measured, whatever its id; an eos that the policy wrote counts like any other
token. Models run in one stated precision whatever surrounds the measurement (`compute.measuring`), both sides in the
same. Left out: sharing the prefill of prompts that have several completions.

All functions raise `NotFiniteError` at a policy whose outputs are no longer numbers.
"""

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rlrazor.errors import RazorError
from rlrazor.lm import compute
from rlrazor.lm.adapters import adapter_disabled, is_adapted, is_adapter_off, unwrapped, virtual_tokens
from rlrazor.lm.forward import context_length
from rlrazor.lm.head import Floats, Head, check_head, head_of, kl_at_positions, log_probs_at_positions
from rlrazor.lm.images import SeenIds, seen
from rlrazor.lm.means import MeanKL, by_prompt, mean, ratio_of_means
from rlrazor.lm.sampling import Told, unheard
from rlrazor.lm.shards import inside, is_sharded

TOKEN_BUDGET = 4096  # tokens a forward pass, padding included: 0.1 GB of activations at D = 576, 1 GB at D = 2048

TokenIds = Sequence[int]


@dataclass(frozen=True)
class Sequences:
    """N completions (token ids) of P prompts: what a probe is made of. `prompt_of` has, per completion, its prompt.

    Standard errors take prompts to be independent, and a prompt's completions not. A completion may be empty: it has no
    positions, hence KL 0. `befores`, where there are any, has per completion what comes before it where that is not its
    prompt: it is then a turn that the prompt, a conversation, already has, and was not sampled; None of the others.
    Raises RazorError for no prompts and for an empty one, after which nothing can be predicted.
    """

    prompts: Sequence[TokenIds]
    completions: Sequence[TokenIds]
    prompt_of: Sequence[int]
    befores: Sequence[TokenIds | None] = ()

    def __post_init__(self) -> None:
        if not self.completions:
            raise RazorError("There are no completions to measure on: give at least one prompt.")
        if not all(map(len, [*self.prompts, *(before for before in self.befores if before is not None)])):
            raise RazorError("A prompt is empty (it has no tokens): leave it out, or start it with the bos token.")

    @classmethod
    def grouped(
        cls,
        prompts: Sequence[TokenIds],
        completions: Sequence[TokenIds],
        given: Sequence[Sequence[tuple[TokenIds, TokenIds]]] = (),
    ) -> "Sequences":
        """The same number of completions of each prompt, prompt by prompt: what `sampling.sample` returns.

        `given`: of each prompt the turns that it has already, each with what comes before it; they come first.
        """
        samples, rest = divmod(len(completions), max(len(prompts), 1))
        if rest:
            raise ValueError(f"{len(completions)} completions do not divide among {len(prompts)} prompts")
        if not any(given):
            return cls(prompts, completions, [index // samples for index in range(len(completions))])
        rows: list[tuple[TokenIds, int, TokenIds | None]] = []
        for prompt, turns in enumerate(given):
            rows += [(said, prompt, before) for before, said in turns]
            rows += [(one, prompt, None) for one in completions[prompt * samples : (prompt + 1) * samples]]
        return cls(prompts, *(list(column) for column in zip(*rows, strict=True)))

    def redrawn(self, completions: Sequence[TokenIds]) -> "Sequences":
        """The same with others in place of those that were sampled: as many of each prompt, prompt by prompt."""
        given: list[list[tuple[TokenIds, TokenIds]]] = [[] for _ in self.prompts]
        for said, prompt, before in zip(self.completions, self.prompt_of, self.befores, strict=False):
            if before is not None:
                given[prompt].append((before, said))
        return Sequences.grouped(self.prompts, completions, given)

    def before(self, completion: int) -> TokenIds:
        """The tokens that a completion follows."""
        own = self.befores[completion] if self.befores else None
        return self.prompts[self.prompt_of[completion]] if own is None else own

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
            [self.befores[n] for n in kept] if self.befores else (),
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
    def sums(self) -> Floats:
        """The sum over each completion's positions (N,)."""
        return _sums(self.positions, self.lengths)

    @property
    def per_completion(self) -> MeanKL:
        """Nats per completion: the mean over prompts of the mean over a prompt's completions."""
        return mean(by_prompt(self.sums, self.prompt_of))

    @property
    def per_token(self) -> MeanKL:
        """Nats per token: the mean KL of a completion over their mean length; standard error by the delta method."""
        return ratio_of_means(by_prompt(self.sums, self.prompt_of), by_prompt(self.lengths, self.prompt_of))

    def restricted(self, keep_N: Sequence[bool]) -> "Drift":
        """The same on some of the completions, such as the correct ones. Raises RazorError where none is kept."""
        keep = np.asarray(keep_N, bool)
        if not keep.any():
            raise RazorError("No completion is left to measure KL on: the base solves none of these prompts.")
        return Drift(self.positions[np.repeat(keep, self.lengths)], self.lengths[keep], self.prompt_of[keep])

    def split(self, tokens: int) -> "tuple[Drift, Drift]":
        """The first so many positions of each completion, and those behind them, of which there may be none."""
        place_T = np.concatenate([np.arange(length) for length in self.lengths])
        first_N = np.minimum(self.lengths, tokens)
        return (
            Drift(self.positions[place_T < tokens], first_N, self.prompt_of),
            Drift(self.positions[place_T >= tokens], self.lengths - first_N, self.prompt_of),
        )

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
        told: Told = unheard,
    ) -> None:
        self.sequences = sequences
        self.precision = precision or compute.precision_of(model)
        with nullcontext() if adapted else adapter_disabled(model):
            self.states, head = final_states(model, sequences, precision=self.precision, told=told)
        self._sample: Tensor | None = None  # of a head that is shared
        self._head: Head | None = None  # of a sharded model one that is shared is gathered anew
        if beside is not None:
            self._head, self._sample = beside._head, beside._sample
        elif is_adapted(model) and head.is_frozen:
            self._head, self._sample = None if is_sharded(model) else head, head.sample()
        else:  # it may have changed by the time it is compared with
            self._head = head.on_host() if is_sharded(model) else head.copied()

    @property
    def head(self) -> "Head":
        """As `head_beside`, of a model that each process has whole."""
        assert self._head is not None
        return self.head_beside(self._head)

    def head_beside(self, now: "Head") -> "Head":
        """The LM head as it was; `now`: the model's, as it is measured.

        Raises RazorError where it is shared with the model, and the model's has changed.
        """
        head = self._head or now
        if self._sample is not None and not torch.equal(head.sample(), self._sample):
            raise RazorError(
                "The model's LM head has changed, which was frozen under the adapter when the base was measured: the "
                "base is gone. Name the head among modules_to_save, or leave it frozen."
            )
        return head

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


def forward_kl(probe: Probe, tuned: Any, *, token_budget: int = TOKEN_BUDGET, head: Head | None = None) -> Drift:
    """KL(base || tuned) on the probe; for RL's Razor's, the probe holds completions sampled from the base.

    Costs a forward pass of `tuned` and a second product with the LM head, the base's. `head`: that of `tuned`, where it
    is known (`final_head`). Raises RazorError where the vocabularies differ.
    """
    tuned_TD, head = final_states(tuned, probe.sequences, token_budget, probe.precision, head=head)
    return _drift(kl_at_positions(probe.states, probe.head_beside(head), tuned_TD, head), probe.sequences)


def final_head(model: Any, precision: str | None = None) -> Head:
    """The LM head of a model, as `final_states` takes it: of a sharded one a copy, which takes a call of it."""
    model = unwrapped(model)
    with compute.measuring(model, precision):
        return head_of(model)


def between(p: Probe, q: Probe) -> Drift:
    """KL(p || q) of two policies probed on the same sequences, neither of which need be in memory any more.

    Raises RazorError where the vocabularies differ.
    """
    if p.sequences != q.sequences:
        raise ValueError("the two probes are of different sequences")
    return _drift(kl_at_positions(p.states, p.head, q.states, q.head), p.sequences)


def reverse_kl(tuned: Any, sequences: Sequences, base: Any = None) -> Drift:
    """KL(tuned || base) on completions sampled from `tuned`. `base` None: `tuned`, a PEFT model, without its adapter.

    Costs a forward pass of each, in the precision of the base's weights. Raises RazorError where the vocabularies
    differ, or without a base.
    """
    if base is None and not is_adapted(tuned):
        raise RazorError("KL to the base needs the base model: after full fine-tuning it is not in the tuned one.")
    base = tuned if base is None else base
    precision = compute.precision_of(base)
    tuned_TD, tuned_head = final_states(tuned, sequences, precision=precision)
    with adapter_disabled(base):
        base_TD, base_head = final_states(base, sequences, precision=precision)
        return _drift(kl_at_positions(tuned_TD, tuned_head, base_TD, base_head), sequences)


def log_probs(model: Any, sequences: Sequences) -> Floats:
    """log pi(y|x) of each completion (N,), in nats, 0 for an empty one."""
    states_TD, head = final_states(model, sequences)
    tokens = [token for completion in sequences.completions for token in completion]
    return _sums(log_probs_at_positions(states_TD, head, tokens), _lengths(sequences))


def token_loss(model: Any, texts: Sequence[TokenIds]) -> MeanKL:
    """The loss on text in nats per token, the first of each text not predicted: a cheap proxy of prior performance.

    The standard error takes texts to be independent. Raises RazorError where no text has a second token.
    """
    sequences = Sequences.texts(texts)
    lengths_N = _lengths(sequences)
    if not lengths_N.any():
        raise RazorError("No text has two tokens or more, so there is nothing to predict.")
    return ratio_of_means(-log_probs(model, sequences), lengths_N.astype(float))


def final_states(
    model: Any,
    sequences: Sequences,
    token_budget: int = TOKEN_BUDGET,
    precision: str | None = None,
    told: Told = unheard,
    head: Head | None = None,
) -> tuple[Tensor, Head]:
    """Hidden states (T, D) that predict each completion token, in the order of `sequences`, and the head for them.

    They are what the LM head is called with, so every normalisation of the model is in them. The head is handed a
    single position, whose logits cost nothing and are compared with ours. `precision`: as `compute.measuring` takes it,
    by default the weights' own; `told` hears how much is done; `head`: the model's, where it is known. Raises
    RazorError for sequences longer than the context, and for a model whose logits are not a linear head's.
    """
    model = unwrapped(model)
    _check_fits(model, sequences)
    lengths_N = _lengths(sequences)
    starts_N = np.cumsum(lengths_N) - lengths_N
    states_TD = None
    with compute.measuring(model, precision):
        head, batches = head or head_of(model), _batches(sequences, token_budget)
        for done, batch in enumerate(batches, 1):
            # The last token predicts nothing that is measured, so it is not fed.
            rows = [[*sequences.before(n), *sequences.completions[n]][:-1] for n in batch]
            hidden_BTD, logits, computed_in = _read(model, rows, seen(sequences.prompts[sequences.prompt_of[batch[0]]]))
            if states_TD is None:
                head = check_head(head, hidden_BTD[0, :1], logits[0, :1], computed_in)
                states_TD = hidden_BTD.new_empty(int(lengths_N.sum()), hidden_BTD.shape[-1])
            hidden_BTD = hidden_BTD[:, -max(map(len, rows)) :]  # without prompt tuning's virtual tokens in front
            # Position t of a row predicts its completion's token number t - first.
            first_B = np.array([len(sequences.before(n)) - 1 for n in batch])
            token_BT = np.arange(hidden_BTD.shape[1]) - first_B[:, None]
            measured_BT = (token_BT >= 0) & (token_BT < lengths_N[batch][:, None])
            target_T = (token_BT + starts_N[batch][:, None])[measured_BT]
            measured_T = hidden_BTD[torch.from_numpy(measured_BT).to(hidden_BTD.device)]
            states_TD[torch.from_numpy(target_T).to(states_TD.device)] = measured_T
            told(done / len(batches))
    if states_TD is None:
        states_TD = head.weight.new_empty(0, head.weight.shape[1])
    return states_TD, head


def _check_fits(model: Any, sequences: Sequences) -> None:
    longest = max(len(sequences.before(n)) + len(one) for n, one in enumerate(sequences.completions))
    limit = context_length(model)
    if limit is not None and longest - 1 > limit:
        raise RazorError(
            f"A prompt with its completion has {longest} tokens, but the model's context holds {limit}. "
            "Shorten the prompts or the completions."
        )


def _read(model: Any, rows: Sequence[TokenIds], prompt: SeenIds | None) -> tuple[Tensor, Tensor, torch.dtype]:
    """Final hidden states (B, T, D) of rows of tokens, the logits of the first position, and what made them.

    `prompt`: what a single row begins with, where images go with it.

    The head is asked for its dtype: accelerate's autocast hands half-precision logits out as float32.
    """
    called_with: list[Tensor] = []
    computed_in: list[torch.dtype] = []

    def only_first(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        called_with.append(args[0])
        return (args[0][:1, :1], *args[1:])

    def note_dtype(_: nn.Module, __: tuple[Tensor, ...], logits: Tensor) -> None:
        computed_in.append(logits.dtype)

    width, output = max(map(len, rows)), inside(model.get_output_embeddings())
    place, beside = compute.device_of(model), {} if prompt is None else prompt.inputs(model, width)
    ids_BT = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=torch.long, device=place)
    hooks = [output.register_forward_pre_hook(only_first), output.register_forward_hook(note_dtype)]
    try:
        logits: Tensor = model(input_ids=ids_BT, use_cache=False, **beside).logits
    finally:
        for hook in hooks:
            hook.remove()
    if not called_with:
        raise RazorError("This model does not call its LM head, so its hidden states cannot be told apart.")
    if called_with[0].shape[1] - width not in (0, 0 if is_adapter_off(model) else virtual_tokens(model)):
        raise RazorError("This model reads more positions than it is given tokens, so its hidden states are not known.")
    return called_with[0], logits, computed_in[0]


def _batches(sequences: Sequences, token_budget: int) -> list[NDArray[np.int64]]:
    """Indices of non-empty completions, similar lengths together, the longest first: out of memory shows at once."""
    lengths_N = _lengths(sequences)
    prompts_N = np.array([len(sequences.before(n)) for n in range(len(lengths_N))])
    order = np.argsort(-(prompts_N + lengths_N), kind="stable")
    order = order[lengths_N[order] > 0]
    with_images_N = np.array([seen(sequences.prompts[prompt]) is not None for prompt in sequences.prompt_of])
    batches = [np.array([one]) for one in order[with_images_N[order]]]
    order = order[~with_images_N[order]]
    while len(order):
        rows = max(1, token_budget // int(prompts_N[order[0]] + lengths_N[order[0]] - 1))
        batches.append(order[:rows])
        order = order[rows:]
    return batches


def _drift(kl_T: Floats, sequences: Sequences) -> Drift:
    return Drift(kl_T, _lengths(sequences), np.array(sequences.prompt_of, dtype=np.int64))


def _lengths(sequences: Sequences) -> NDArray[np.int64]:
    return np.array([len(completion) for completion in sequences.completions], dtype=np.int64)


def _sums(values_T: Floats, lengths_N: NDArray[np.int64]) -> Floats:
    """Sums over consecutive stretches, which may be empty."""
    sequence_T = np.repeat(np.arange(len(lengths_N)), lengths_N)
    sums: Floats = np.bincount(sequence_T, weights=values_T, minlength=len(lengths_N)).astype(float)
    return sums
