"""What all trainers share: examples and settings, the arguments of TRL's trainers, the loss of each step, the base."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from rlrazor.errors import RazorError
from rlrazor.experiments.language.methods import Method
from rlrazor.lm.adapters import unwrapped
from rlrazor.runs.sweep import DivergedError
from rlrazor.system import processes

Reward = Callable[[Sequence[int], Sequence[Sequence[int]]], Sequence[float | None]]
"""(positions of examples, their completions' token ids) -> rewards; None where the verifier failed."""


@dataclass(frozen=True)
class Example:
    """A prompt to train on, as token ids; completions end with a stop token. SDFT takes `text`, `demonstration`."""

    prompt: Sequence[int]
    completion: Sequence[int] = ()
    rejected: Sequence[int] = ()
    text: str = ""
    demonstration: str = ""


@dataclass(frozen=True)
class Settings:
    """How to train. A step is one update of the weights.

    `batch_size`: sequences per step, or for on-policy methods prompts per step, each with `group_size` samples.
    `micro_batch`: sequences at a time on a device, which bounds memory; None: all. `iterations`: updates per batch of
    samples. `saved_at`: the steps after which there is something that an interrupted run resumes from.
    """

    lr: float
    schedule: str
    steps: int
    warmup_steps: int
    batch_size: int
    group_size: int
    kl_coef: float
    seed: int
    max_new_tokens: int
    stop_ids: Sequence[int]
    iterations: int = 1
    micro_batch: int | None = None
    bf16: bool = False
    gradient_checkpointing: bool = False
    saved_at: Collection[int] = ()
    folder: Path = Path("unused")
    report_to: str = "none"
    vllm: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Job:
    """What a trainer is built from. `base`: the frozen base policy, or None; see `trainers.train`."""

    method: Method
    settings: Settings
    model: Any
    tokenizer: Any
    examples: Sequence[Example]
    reward: Reward | None
    base: Any
    callback: Any


def given(job: Job, args: Any, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What every trainer of TRL's is made from."""
    return {
        "model": job.model,
        "args": args,
        "train_dataset": Dataset.from_list(list(rows)),
        "processing_class": job.tokenizer,
        "callbacks": [job.callback],
    }


def arguments_of(settings: Settings, sequences: int) -> dict[str, Any]:
    """What all trainers share; `sequences` per step on all devices together."""
    count = processes.count()
    if sequences % count:
        raise RazorError(f"A step of {sequences} sequences cannot be shared by {count} processes: use a divisor.")
    micro = min(settings.micro_batch or sequences, sequences // count)
    if sequences % (micro * count):
        raise RazorError(
            f"A step of {sequences} sequences cannot be cut into micro-batches of {micro} on {count} processes: "
            "set --micro-batch to a divisor."
        )
    return {
        "output_dir": str(settings.folder),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": sequences // (micro * count),
        "max_steps": settings.steps,
        "learning_rate": settings.lr,
        "lr_scheduler_type": "cosine" if settings.schedule == "cosine" else "constant_with_warmup",
        "warmup_steps": settings.warmup_steps,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "bf16": settings.bf16,
        "activation_checkpointing": settings.gradient_checkpointing,
        "seed": settings.seed,
        "save_strategy": "no",  # `AtStep` says when
        "save_total_limit": 1,
        "logging_strategy": "no" if settings.report_to == "none" else "steps",
        "report_to": settings.report_to,
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "remove_unused_columns": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


class Measured:
    """Keeps the loss of each step, over its micro-batches and processes, which has to be finite."""

    measured: dict[str, float]
    so_far: Tensor | float = 0.0

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """TRL's, a micro-batch at a time; raises DivergedError in all processes or in none."""
        loss: Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        self.so_far = self.so_far + loss
        if self.accelerator.sync_gradients:  # type: ignore[attr-defined]
            whole = self.accelerator.reduce(self.so_far, reduction="mean")  # type: ignore[attr-defined]
            if not whole.isfinite():
                raise DivergedError(self.state.global_step, self.state.epoch or 0.0)  # type: ignore[attr-defined]
            self.measured["loss"], self.so_far = whole.item(), 0.0
        return loss


def without_adapter(model: Any, base: Any) -> AbstractContextManager[Any]:
    """The base policy: `base` itself or, where it is None, the model without its adapter for as long as that lasts."""
    return nullcontext(base) if base is not None else _Disabled(model)


class _Disabled:
    def __init__(self, model: Any) -> None:
        self.model = unwrapped(model)
        self.context = self.model.disable_adapter()

    def __enter__(self) -> Any:
        self.context.__enter__()
        return self.model

    def __exit__(self, *error: Any) -> None:
        self.context.__exit__(*error)
