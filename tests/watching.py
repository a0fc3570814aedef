"""A plain `Trainer` with a monitor, for tests of what the monitor measures and of how it fails."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from laws import GENERIC, PROMPTS, SETTINGS
from rlrazor.guard import ForgettingMonitor
from tiny_models import char_tokenizer, tiny_llama

TOKENIZER = char_tokenizer()
TEXTS = [f"{a}{b}={b}{a};" for a in "abcdefgh" for b in "0123456789"]
ROWS = [{"input_ids": ids, "labels": ids} for ids in TOKENIZER(TEXTS)["input_ids"]]


def watch(out: Path, law: Any = None, **settings: Any) -> ForgettingMonitor:
    own = {} if law else {"settings": SETTINGS, "generic": GENERIC}
    return ForgettingMonitor(PROMPTS, law, cache_dir=out / "cache", **{**own, **settings})


def trainer_of(out: Path, callbacks: list[Any], model: Any = None, **config: Any) -> Trainer:
    """Six steps of a batch of eight, unless `config` says otherwise."""
    optimizers = config.pop("optimizers", (None, None))
    settings = {
        "output_dir": str(out), "max_steps": 6, "per_device_train_batch_size": 8, "learning_rate": 3e-3,
        "report_to": "none", "logging_steps": 1, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True,
    } | config  # fmt: skip
    return Trainer(
        tiny_llama() if model is None else model,
        TrainingArguments(**settings),
        train_dataset=ROWS,
        eval_dataset=ROWS[:8],
        processing_class=char_tokenizer(),
        callbacks=callbacks,
        optimizers=optimizers,
    )


def losses_of(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def leave() -> None:
    """End a process of several. Python's own end aborts one run in many, when a thread of torch outlives it."""
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
