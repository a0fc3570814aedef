"""Whether switching an adapter off gives back the base that it was put on.

Most adapters leave the base's weights alone. Some put others in their place as they are made (PiSSA, OLoRA, CorDA,
LoftQ, LoRA-GA) or repeat its layers, and what is left without them is no model that anybody had. It is found out by
computing, not by names: a new adapter that was only added to the base changes nothing yet; of one that has learnt
something, the weights under it have to be those of the base's files.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlrazor.errors import RazorError
from rlrazor.lm import compute, lockstep, shards
from rlrazor.lm.adapters import BaseWeights, base_parameters, is_adapted, unwrapped, virtual_tokens
from rlrazor.lm.digests import base_digest, is_same_base, token_log_probs
from rlrazor.lm.models import DTYPES, load
from rlrazor.lm.quantised import scheme_of
from rlrazor.lm.sources import SavedWeights
from rlrazor.lm.weight_files import scheme_in

COMPARED_VALUES = 4096  # of each weight: what replaces a base's weights moves nearly all of them
# Nats by which a log-probability may differ where nothing was changed: DoRA rescales weights by their own norm.
ROUNDING = {"float32": 1e-3}
ROUNDING_IN_HALF = 0.08

_CHANGED = (
    "Without its adapter this model is not the base: making the adapter has replaced weights or layers of the base "
    "(init_lora_weights of PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA do, and layer_replication), so KL to the base cannot "
    "be had by switching it off. Start from init_lora_weights=True; or convert the adapter to plain LoRA as you save "
    "it (save_pretrained(..., path_initial_model_for_weight_conversion=FOLDER)), and use that."
)
_UNKNOWN = (
    "Whether this model without its adapter is the base cannot be checked: the adapter moves it already, and the "
    "base's files ({source}) are not on this machine, or cannot be compared with the model. Load the base from a "
    "folder or the hub's cache before the adapter, give a law of the base, or begin with a new adapter. (PiSSA, OLoRA, "
    "CorDA, LoftQ and LoRA-GA replace the base's weights: start from init_lora_weights=True, or convert such an "
    "adapter as you save it, by path_initial_model_for_weight_conversion.)"
)


def check_undone(model: Any, *, recognised: bool = False) -> None:
    """Raise RazorError unless a PEFT model without its adapter is the base that the adapter was put on.

    `recognised`: what is left without it has the digest of a base that is known. A model without an adapter passes.
    """
    model = unwrapped(model)
    if not is_adapted(model):
        return
    if virtual_tokens(model):
        return  # in front of a prompt, where nothing of the base is changed
    if recognised:
        return
    moved = (token_log_probs(model, adapted=True) - token_log_probs(model)).abs().max()
    is_new = bool(moved <= ROUNDING.get(compute.precision_of(model), ROUNDING_IN_HALF))
    repeats_layers = any(getattr(config, "layer_replication", None) for config in model.peft_config.values())
    if is_new and not repeats_layers:
        return
    named = _named_base(model)
    folder = _on_this_machine(named)
    same = None if folder is None else _is_the_model_in(folder, model, by_weights=not repeats_layers)
    if same is None:
        raise RazorError(_UNKNOWN.format(source=named or "its config names none"))
    if not same:
        raise RazorError(_CHANGED)


def _named_base(model: Any) -> str:
    configs = [*model.peft_config.values(), model.get_base_model().config]
    names = [getattr(config, name, None) for config in configs for name in ("base_model_name_or_path", "name_or_path")]
    return next((str(name) for name in names if name), "")


def _on_this_machine(named: str) -> Path | None:
    """The folder with the base's files, from the hub's cache if it is there; nothing is downloaded."""
    if not named or Path(named).expanduser().is_dir():
        return Path(named).expanduser() if named else None
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(named, local_files_only=True))
    except Exception:  # not a hub id, not in the cache, or a cache that cannot be read: of several types
        return None


def _is_the_model_in(folder: Path, model: Any, *, by_weights: bool) -> bool | None:
    """Whether the files hold what is under the adapter; None where that cannot be told."""
    try:
        scheme, files = scheme_of(model.config), SavedWeights(folder)
        under = BaseWeights(model, under_adapter=True)
        if by_weights and under and not scheme and all(shards.plain(name) in files for name in under):
            verdicts: list[bool | None] = []
            lockstep.each_whole(
                model,
                lambda every: base_parameters(every, under_adapter=True),
                lambda name, weight: verdicts.append(_are_equal(weight, files[shards.plain(name)])),
            )
            return None if None in verdicts else all(verdicts)
        # By other names, as when a library has fused or split them, or quantised: then by the whole model.
        precision = compute.precision_of(model)
        if precision not in DTYPES:
            return None
        with compute.memory_errors("Out of memory while the base is loaded a second time."):
            live = model.config.quantization_config if scheme and not scheme_in(folder) else None
            return is_same_base(base_digest(load(folder, dtype=precision, quantization=live).model), base_digest(model))
    except RazorError:  # the files are not of a model that can be loaded, or not beside this one
        return None


def _are_equal(weight: Tensor, saved: Tensor) -> bool | None:
    """Also after both are rounded, as a base loaded in half precision was. None for another shape: quantised."""
    if weight.shape != saved.shape or not weight.is_floating_point():
        return None
    chosen = compute.spread(weight.numel(), COMPARED_VALUES)
    ours, theirs = weight.detach().flatten()[chosen.to(weight.device)].cpu(), saved.flatten()[chosen]
    roundings = (ours.dtype, torch.float16, torch.bfloat16)
    return any(bool((ours.to(dtype) == theirs.to(dtype)).all()) for dtype in roundings)
