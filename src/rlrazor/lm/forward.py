"""How a model is given tokens, without a name of its architecture: how many it takes, and ways of reading prompts.

Not every architecture can share a prefill, sees padding as padding, or continues from its cache as it says; the last
way, plain reading, is right for all.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlrazor.lm import compute
from rlrazor.lm.adapters import virtual_tokens, without_wrapper
from rlrazor.lm.images import SeenIds, seen
from rlrazor.lm.quantised import scheme_of
from rlrazor.lm.shards import inside

_CACHES = ("cache", "past_key_values", "cache_params", "state", "mems")  # renamed in transformers 5.24


# What configs call the most positions, the first that there is.
_CONTEXTS = (
    "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions", "model_max_length",
)  # fmt: skip


def context_length(model: Any) -> int | None:
    """The most tokens a sequence may have; None where the config sets no limit.

    RoBERTa and its kin count positions from behind the padding row of their table, which holds so many fewer.
    """
    config = _text_config(model)
    limits = [limit for name in _CONTEXTS if isinstance(limit := getattr(config, name, None), int) and limit > 0][:1]
    for name, module in model.named_modules() if isinstance(model, torch.nn.Module) else ():
        table = isinstance(module, torch.nn.Embedding) and "position" in name.rpartition(".")[-1]
        if table and module.padding_idx is not None:
            limits.append(module.num_embeddings - module.padding_idx - 1)
    return min(limits) - virtual_tokens(model) if limits else None


def window(model: Any) -> int | None:
    """Of some or all layers, so many tokens that they see; None where the config names none."""
    found = getattr(_text_config(model), "sliding_window", None)
    return found if isinstance(found, int) and found > 0 else None


def width(model: Any) -> int | None:
    """How many numbers a hidden state has; None where the config does not say."""
    found = getattr(_text_config(model), "hidden_size", None)
    return found if isinstance(found, int) else None


def _text_config(model: Any) -> Any:
    try:
        return model.config.get_text_config(decoder=True)
    except ValueError:  # a config of several parts, of which transformers will not choose
        return model.config


def embedding_rows(model: Any) -> int | None:
    """How many tokens the model has embeddings for; None where it does not say."""
    try:
        return int(model.get_input_embeddings().num_embeddings)
    except (AttributeError, NotImplementedError):
        return None


def prefill(model: Any, ids_BT: Tensor, mask_BT: Tensor, repeats: int) -> tuple[Tensor, dict[str, Any]]:
    """Read left-padded prompts once, each for `repeats` continuations.

    Returns the logits of their first tokens, (B * repeats, V), and the cache as the keyword argument that takes it.
    """
    positions_BT = (mask_BT.cumsum(dim=1) - 1).clamp(min=0)
    last = _accepted(model, logits_to_keep=1)
    out = model(input_ids=ids_BT, attention_mask=mask_BT, position_ids=positions_BT, use_cache=True, **last)
    cache = cache_of(out)
    if repeats > 1:
        next(iter(cache.values())).batch_repeat_interleave(repeats)
    return out.logits[:, -1].repeat_interleave(repeats, dim=0), cache


def plain_logits(
    model: Any, ids_BT: Tensor, kept: int | Sequence[int] | None = None, prompt: SeenIds | None = None
) -> Tensor:
    """Logits of so many last positions, of those named, or of all, (B, T, V), read from token ids of equal length.

    The others' are not computed where the model's forward can leave them out: of thousands they would be gigabytes.
    `prompt`: what all begin with, where images go with it.
    """
    if kept is None or isinstance(kept, int):
        options = _accepted(model, use_cache=False, **({} if kept is None else {"logits_to_keep": kept}))
    else:  # counted from the end: prompt tuning puts virtual tokens in front
        places = torch.tensor(list(kept), device=ids_BT.device) - ids_BT.shape[1]
        options = _accepted(model, use_cache=False, logits_to_keep=places)
    beside = {} if prompt is None else prompt.inputs(model, ids_BT.shape[1], len(ids_BT))
    logits: Tensor = model(input_ids=ids_BT, **options, **beside).logits
    if kept is None or isinstance(kept, int):
        return logits[:, -(kept or ids_BT.shape[1]) :]  # behind prompt tuning's virtual tokens
    return logits if "logits_to_keep" in options else logits[:, places]


def masked_logits(model: Any, ids_1N: Tensor, mask_11NN: Tensor, positions_1N: Tensor, kept_K: Tensor) -> Tensor:
    """Float32 logits (K, V) of some positions of one row whose tokens see what an additive mask leaves them.

    The others' are not computed where the model's forward can leave them out.
    """
    options = _accepted(model, use_cache=False, logits_to_keep=kept_K)
    out = model(input_ids=ids_1N, attention_mask=mask_11NN, position_ids=positions_1N, **options)
    logits_NV: Tensor = out.logits[0]
    return (logits_NV if "logits_to_keep" in options else logits_NV[kept_K]).float()


def read_alone(
    model: Any, ids: Sequence[int], kept: int | Sequence[int] | None = None, prompt: SeenIds | None = None
) -> tuple[Tensor, bool]:
    """Float32 logits (T, V) of one sequence, as `plain_logits` has them, and whether computed in half precision, or
    quantised.

    Of eight bits the rounding is of a batch: which features are not rounded is decided by all of its tokens. The LM
    head is asked for its dtype: accelerate's autocast hands half-precision logits out as float32.
    """
    dtypes: set[torch.dtype] = set()
    head = model.get_output_embeddings()
    hook = head.register_forward_hook(lambda _, __, logits: dtypes.add(logits.dtype)) if head is not None else None
    try:
        logits = plain_logits(model, _tensor(model, [ids]), kept, prompt)[0]
    finally:
        if hook is not None:
            hook.remove()
    rounded = any(dtype.itemsize < 4 for dtype in dtypes | {logits.dtype}) or bool(scheme_of(model.config))
    return logits.float(), rounded


class PromptReader:
    """What reads prompts (B) for so many samples of each. `logits` (N, V), N = B * samples, are of the next token."""

    logits: Tensor

    def follow(self, token_N: Tensor) -> None:
        """Read a token of each."""
        raise NotImplementedError

    def keep(self, rows_M: Tensor) -> bool:
        """Go on with some of the sequences only; False where that cannot be."""
        return False


class Padded(PromptReader):
    """On the left, as the mask and the positions say. `shared`: a prompt is read once for all its samples."""

    def __init__(
        self, model: Any, prompts: Sequence[Sequence[int]], samples: int, pad_id: int, *, shared: bool
    ) -> None:
        width = max(map(len, prompts))
        ids_BT = _tensor(model, [[pad_id] * (width - len(prompt)) + [*prompt] for prompt in prompts])
        mask_BT = _tensor(model, [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        self.model, self.mask_NT = model, mask_BT.repeat_interleave(samples, dim=0)
        if not shared:
            ids_BT, mask_BT, samples = ids_BT.repeat_interleave(samples, dim=0), self.mask_NT, 1
        self.logits, self.cache = prefill(model, ids_BT, mask_BT, samples)
        self.position_N = self.mask_NT.sum(dim=1)

    def follow(self, token_N: Tensor) -> None:
        """Read a token of each."""
        self.mask_NT = torch.cat([self.mask_NT, self.mask_NT.new_ones(len(self.mask_NT), 1)], dim=1)
        out = self.model(
            input_ids=token_N[:, None],
            attention_mask=self.mask_NT,
            position_ids=self.position_N[:, None],
            use_cache=True,
            **self.cache,
        )
        self.position_N, self.cache, self.logits = self.position_N + 1, cache_of(out), out.logits[:, -1]

    def keep(self, rows_M: Tensor) -> bool:
        """Go on with some of the sequences only; False where the cache does not allow it."""
        if not _keep(self.cache, rows_M):
            return False
        self.mask_NT, self.position_N, self.logits = self.mask_NT[rows_M], self.position_N[rows_M], self.logits[rows_M]
        return True


class Cached(PromptReader):
    """Of equal length, so that there is nothing to say but tokens; then a token at a time with what the model keeps.

    Which may have any shape, so that all sequences are kept.
    """

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], samples: int, pad_id: int) -> None:
        self.model, prompt = model, seen(prompts[0])
        self.out = model(
            input_ids=_tensor(model, prompts, samples),
            use_cache=True,
            **_accepted(model, logits_to_keep=1),
            **({} if prompt is None else prompt.inputs(model, len(prompt), samples)),
        )
        self.logits = self.out.logits[:, -1]

    def follow(self, token_N: Tensor) -> None:
        """Read a token of each."""
        self.out = self.model(input_ids=token_N[:, None], use_cache=True, **cache_of(self.out))
        self.logits = self.out.logits[:, -1]


class Plain(PromptReader):
    """Of equal length, and for each token all of it once more."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], samples: int, pad_id: int) -> None:
        self.model, self.ids_NT, self.prompt = model, _tensor(model, prompts, samples), seen(prompts[0])
        self.logits = plain_logits(model, self.ids_NT, 1, self.prompt)[:, 0]

    def follow(self, token_N: Tensor) -> None:
        """Read a token of each."""
        self.ids_NT = torch.cat([self.ids_NT, token_N[:, None]], dim=1)
        self.logits = plain_logits(self.model, self.ids_NT, 1, self.prompt)[:, 0]

    def keep(self, rows_M: Tensor) -> bool:
        """Go on with some of the sequences only."""
        self.ids_NT, self.logits = self.ids_NT[rows_M], self.logits[rows_M]
        return True


def _tensor(model: Any, rows: Sequence[Sequence[int]], repeats: int = 1) -> Tensor:
    """Rows of equal length, each so many times, on the model's device."""
    rows_BT = torch.tensor([list(row) for row in rows], dtype=torch.long, device=compute.device_of(model))
    return rows_BT.repeat_interleave(repeats, dim=0)


# The fastest first. With one sample the second is the first; the last two want prompts of equal length.
WAYS: Sequence[Callable[..., PromptReader]] = (
    partial(Padded, shared=True),
    partial(Padded, shared=False),
    Cached,
    Plain,
)


def cache_of(out: Any) -> dict[str, Any]:
    """What a model keeps of the tokens it has read, as the argument that it takes it by. Raises AttributeError."""
    for name in _CACHES:
        if out.get(name) is not None:
            return {name: out[name]}
    raise AttributeError("it keeps no cache")


def _keep(cache: dict[str, Any], rows_M: Tensor) -> bool:
    """Leave only some sequences in a cache; False, and nothing done, where more than keys and values would have to."""
    (held,) = cache.values()
    layers = getattr(held, "layers", None)
    if not layers or not hasattr(held, "batch_select_indices"):
        return False
    if not all(
        hasattr(layer, "batch_select_indices") and _of_sequences(layer) <= {"keys", "values"} for layer in layers
    ):
        return False
    held.batch_select_indices(rows_M)
    return True


def _of_sequences(layer: Any) -> set[str]:
    """What a layer keeps that may have a row for each sequence."""
    return {
        name
        for name, value in vars(layer).items()
        if isinstance(value, list | tuple | dict) or (isinstance(value, Tensor) and value.dim() > 1)
    }


def _accepted(model: Any, **options: Any) -> dict[str, Any]:
    """Those that the model's forward names, under an adapter and FSDP1 too, or a wrapper of it that names nothing.

    `use_cache` also where it takes others unnamed, since some classes hand it on so.
    """
    named = inspect.signature(inside(without_wrapper(model)).forward).parameters
    kinds = {parameter.kind for parameter in named.values()}
    wrapped = kinds == {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    unnamed = set(options) if wrapped else {"use_cache"} if inspect.Parameter.VAR_KEYWORD in kinds else set()
    return {name: value for name, value in options.items() if name in named or name in unnamed}
