"""What all trainers share: examples and settings, the arguments of TRL's trainers, the loss of each step, the base."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from rlrazor.errors import RazorError
from rlrazor.experiments.language.methods import Method
from rlrazor.lm import sampling
from rlrazor.lm.adapters import unwrapped
from rlrazor.runs.sweep import DivergedError
from rlrazor.seeding import seed_of
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
class Updates:
    """How the weights are updated, once a step. `batch_size`: sequences, or of on-policy methods prompts, of a step."""

    lr: float
    schedule: str
    steps: int
    warmup_steps: int
    batch_size: int
    kl_coef: float
    seed: int
    bf16: bool = False


@dataclass(frozen=True)
class Samples:
    """What on-policy methods draw: `group_size` completions of a prompt, for so many updates (`iterations`).

    Of SFT on the policy's own right samples: for each of these so many `tries` at most, drawn in so many `rounds`.
    """

    group_size: int
    max_new_tokens: int
    stop_ids: Sequence[int]
    iterations: int = 1
    tries: int = 1
    rounds: int = 1


@dataclass(frozen=True)
class Saving:
    """The steps after which there is something that an interrupted run resumes from, and the folder of that."""

    at: Collection[int] = ()
    folder: Path = Path("unused")


@dataclass(frozen=True)
class Settings:
    """How to train. `micro_batch`: sequences at a time on a device, which bounds memory; None: all of a step."""

    updates: Updates
    samples: Samples
    saving: Saving = Saving()
    micro_batch: int | None = None
    report_to: str = "none"


@dataclass(frozen=True)
class Part:
    """A part of a step: of the `of` micro-batches that all processes have of it, the one at `place`."""

    step: int
    place: int
    of: int


@dataclass(frozen=True, eq=False)
class Job:
    """What is trained: `model`, in place, by `method`.

    `base`: the frozen base policy, for methods that look at it (a KL penalty, DPG); None with LoRA, where the base is
    the model without its adapter. `reward`: of methods that sample as they train. `term`: of the model, by the parts of
    a step; their sum is added to the loss of each step of SFT.
    """

    method: Method
    settings: Settings
    model: Any
    tokenizer: Any
    examples: Sequence[Example]
    base: Any = None
    reward: Reward | None = None
    term: Callable[[Any, Part], Tensor] | None = None


def given(job: Job, args: Any, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What every trainer of TRL's is made from."""
    return {
        "model": job.model,
        "args": args,
        "train_dataset": Dataset.from_list(list(rows)),
        "processing_class": job.tokenizer,
    }


def arguments_of(settings: Settings, sequences: int) -> dict[str, Any]:
    """What all trainers share; `sequences` per step on all devices together."""
    count, updates = processes.count(), settings.updates
    if sequences % count:
        raise RazorError(f"A step of {sequences} sequences cannot be shared by {count} processes: use a divisor.")
    micro = min(settings.micro_batch or sequences, sequences // count)
    if sequences % (micro * count):
        raise RazorError(
            f"A step of {sequences} sequences cannot be cut into micro-batches of {micro} on {count} processes: "
            "set --micro-batch to a divisor."
        )
    return {
        "output_dir": str(settings.saving.folder),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": sequences // (micro * count),
        "max_steps": updates.steps,
        "learning_rate": updates.lr,
        "lr_scheduler_type": "cosine" if updates.schedule == "cosine" else "constant_with_warmup",
        "warmup_steps": updates.warmup_steps,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "bf16": updates.bf16,
        "seed": updates.seed,
        "save_strategy": "no",  # `AtStep` says when
        "save_total_limit": 1,
        "logging_strategy": "no" if settings.report_to == "none" else "steps",
        "report_to": settings.report_to,
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "remove_unused_columns": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


class KeepsLoss:
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


def sampled(
    trainer: Any, settings: Settings, prompts: Sequence[Sequence[int]], purpose: str, **how: Any
) -> list[list[int]]:
    """Completions of the model that a trainer trains; `how`: of `Sampling`. The seed and `purpose` decide the draws.

    In the precision of training: the distribution that is sampled is the one whose gradient is taken. Raises
    DivergedError.
    """
    asked, rng = settings.samples, torch.Generator(trainer.accelerator.device)
    rng.manual_seed(seed_of(settings.updates.seed, purpose))
    pad_id = trainer.processing_class.pad_token_id
    drawn = sampling.Sampling(asked.max_new_tokens, asked.stop_ids, pad_id, rng=rng, **how)
    with trainer.compute_loss_context_manager():
        try:
            return sampling.sample(trainer.accelerator.unwrap_model(trainer.model), prompts, drawn)
        except sampling.NotFiniteError as error:
            raise DivergedError(trainer.state.global_step, trainer.state.epoch or 0.0) from error


@contextmanager
def without_adapter(model: Any, base: Any) -> Iterator[Any]:
    """The base policy: `base` itself or, where it is None, the model without its adapter for as long as that lasts."""
    if base is not None:
        yield base
        return
    plain = unwrapped(model)
    with plain.disable_adapter():
        yield plain
