"""What ForgettingMonitor takes of each process's memory where the model is sharded: MB at the peak, by what is done.

    torchrun --nproc-per-node 2 benchmarks/sharded.py             # full fine-tuning of a random Llama of 32M parameters
    torchrun --nproc-per-node 2 benchmarks/sharded.py --lora
    torchrun --nproc-per-node 8 benchmarks/sharded.py --model Qwen/Qwen2.5-7B --steps 4

transformers shards the model as it loads it (FSDP2), on a CPU too. Of a GPU it is what torch has allocated; of a CPU
all that the process has resident, libraries included, so that differences count. Trained without the monitor first.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.distributed import DistributedConfig

from common import WORDS, peak, reset, tokenizer
from rlrazor.guard import ForgettingMonitor, Measuring
from rlrazor.lm.models import add_lora
from rlrazor.lm.probes import GenericText, ProbeSettings

VOCABULARY, WIDTH, LAYERS, LENGTH = 32_000, 384, 4, 256


class Peaks(TrainerCallback):  # type: ignore[misc]
    """The peak since the one before it in the list of callbacks was asked, by what was done."""

    def __init__(self, names: dict[str, str], peaks: dict[str, float]) -> None:
        self.names, self.peaks = names, peaks

    def _note(self, event: str) -> None:
        if (name := self.names.get(event)) is not None:
            self.peaks[name] = max(self.peaks.get(name, 0.0), peak())
        reset()

    def on_init_end(self, *_: Any, **__: Any) -> None:
        """The trainer has been made."""
        self._note("init")

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """A step has been trained."""
        self._note("step")


def small(folder: Path) -> Path:
    """A random model, which the first process writes for all."""
    if torch.distributed.get_rank() == 0:
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=LAYERS,
            num_attention_heads=4, max_position_embeddings=LENGTH, eos_token_id=0, pad_token_id=0, bos_token_id=None,
            tie_word_embeddings=False,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer(VOCABULARY).save_pretrained(folder)
    torch.distributed.barrier()
    return folder


def trained(source: Any, words: Any, out: Path, *, lora: bool, steps: int, watched: bool) -> dict[str, float]:
    """Peaks of one training."""
    sharded = DistributedConfig(fsdp_size=torch.distributed.get_world_size())
    model = AutoModelForCausalLM.from_pretrained(source, distributed_config=sharded)
    model = add_lora(model, 8) if lora else model
    row = words(" ".join(WORDS * 8))["input_ids"][:64]
    peaks: dict[str, float] = {}
    before = Peaks({"step": "training"}, peaks)
    after = Peaks({"init": "the base's side", "step": "measuring"} if watched else {}, peaks)
    prompts = [f"the {word} was {other}" for word in WORDS for other in WORDS][:32]
    measuring = Measuring(GenericText.built_in().cut(16), ProbeSettings(8, chat=False), cache_dir=out / "cache")
    watching = [ForgettingMonitor(prompts, every=max(steps // 2, 1), measuring=measuring)] if watched else []
    Trainer(
        model,
        TrainingArguments(
            output_dir=str(out), max_steps=steps, per_device_train_batch_size=2, report_to="none", save_strategy="no",
            use_cpu=not torch.cuda.is_available(), disable_tqdm=True, logging_strategy="no",
        ),
        train_dataset=[{"input_ids": row, "labels": row}] * 64,
        processing_class=words,
        callbacks=[before, *watching, after],
    ).train()  # fmt: skip
    return peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a hub id or a folder; by default a small random one")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--steps", type=int, default=4)
    arguments = parser.parse_args()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    with tempfile.TemporaryDirectory() as own:
        folders: list[Any] = [own]
        torch.distributed.broadcast_object_list(folders)
        from transformers import AutoTokenizer

        source = arguments.model or small(Path(folders[0]))
        words = AutoTokenizer.from_pretrained(source)
        found = {}
        for turn, watched in enumerate((False, False, True)):  # the first warms up: what it leaves, others have too
            out = Path(own) / str(turn)
            found[watched] = trained(source, words, out, lora=arguments.lora, steps=arguments.steps, watched=watched)
        plain, peaks = found[False]["training"], found[True]
        line = f"process {torch.distributed.get_rank()}: MB at the peak: training alone {plain:.0f}"
        line += "".join(f", {name} {value:.0f}" for name, value in peaks.items() if name != "training")
        line += f", training with the monitor {peaks['training']:.0f}"
        every: list[Any] = [line] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(every, line)
        if torch.distributed.get_rank() == 0:
            print("\n".join(every), flush=True)
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
