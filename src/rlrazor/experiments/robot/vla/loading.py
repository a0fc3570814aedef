"""A vision-language-action model from files: safetensors only, and no code but that of `transformers`."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlrazor.experiments.robot.vla.model import VisionLanguageAction
from rlrazor.experiments.robot.world import World
from rlrazor.extras import needs_extra
from rlrazor.lm import compute
from rlrazor.lm.loading import clear_errors, in_dtype, require_all_weights, without_peft_warning


@dataclass(frozen=True)
class Source:
    """Which model, a folder or a hub id; `dtype` of its weights; `lora_rank` of an adapter to train, 0: all weights."""

    model: str
    dtype: str = "float32"
    lora_rank: int = 0


def load(source: Source, world: World) -> VisionLanguageAction:
    """The policy on the accelerator, where there is one; a new adapter is drawn from torch's global generator.

    Raises RazorError for a model that is damaged, has no safetensors, or needs code of its own, and MissingExtraError
    without transformers or, for an adapter, PEFT.
    """
    needs_extra("guard", *(["train"] if source.lora_rank else []))
    from transformers import AutoModelForImageTextToText, AutoProcessor

    with clear_errors(source.model):
        processor = AutoProcessor.from_pretrained(source.model, trust_remote_code=False)
        model, info = AutoModelForImageTextToText.from_pretrained(
            source.model,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **in_dtype(getattr(torch, source.dtype)),
        )
        require_all_weights(info, model)
    if source.lora_rank:
        model = with_adapter(model, source.lora_rank)
    return VisionLanguageAction(model.to(compute.device()).eval(), processor, world)


def with_adapter(model: Any, rank: int) -> nn.Module:
    """The model with a LoRA adapter around every linear layer, which alone is trained: OpenVLA's settings.

    Rank 32 there, alpha at most 16, no dropout (arXiv:2406.09246, section 5.3, and its code).
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank, lora_alpha=min(rank, 16), lora_dropout=0.0, target_modules="all-linear", init_lora_weights="gaussian"
    )
    with without_peft_warning():
        adapted: nn.Module = get_peft_model(model, config)
    return adapted


def fingerprint(model: str, recordings: Path | None) -> str:
    """What a run's results depend on besides its settings: a folder's files, or a hub id; and recorded episodes."""
    digest = hashlib.sha256()
    for folder in (Path(model).expanduser(), *([recordings] if recordings else [])):
        for path in sorted(one for one in folder.rglob("*") if one.is_file()):
            digest.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"{Path(model).name} {digest.hexdigest()[:16]}"
