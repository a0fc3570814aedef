"""Short trainings in two processes whose model is sharded in every way there is: `test_sharded.py` starts them.

    torchrun --nproc-per-node 2 sharded_runs.py FOLDER CASE ...

accelerate shards on accelerators only, so it is told here that the CPU is one; all else is a real `Trainer`'s.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import accelerate.state
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback
from watching import leave, losses_of, trainer_of, watch

from laws import law_of
from rlrazor.lm.models import add_lora
from tiny_models import char_tokenizer, saved, tiny_llama

LAYERS = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
FSDP1 = {"version": 1, "sync_module_states": False, "cpu_ram_efficient_loading": False, **LAYERS}
FSDP2 = {"version": 2, "cpu_ram_efficient_loading": False, **LAYERS}
AUTO = {name: "auto" for name in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")}
HOW: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp1": {"fsdp": "full_shard auto_wrap", "fsdp_config": {**FSDP1, "use_orig_params": True}},
    "fsdp1-flat": {"fsdp": "full_shard auto_wrap", "fsdp_config": {**FSDP1, "use_orig_params": False}},
    "fsdp2": {"fsdp": True, "fsdp_config": FSDP2},
    "fsdp2-lean": {"fsdp": True, "fsdp_config": {**FSDP2, "cpu_ram_efficient_loading": True}},
    "loaded": {},
    "zero2": {"deepspeed": {"zero_optimization": {"stage": 2}, **AUTO}},
    "zero3": {"deepspeed": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}, **AUTO}},
}


def pretend(*, sharding: bool) -> None:
    """Have accelerate take the CPU for an accelerator, or not, from the next trainer on."""
    for state in (AcceleratorState, GradientState):
        state._reset_state()
    PartialState._reset_state()
    for name in [name for name in os.environ if name.startswith(("FSDP_", "ACCELERATE_"))]:
        del os.environ[name]  # what the last trainer was asked for
    kind = DistributedType.MULTI_XPU if sharding else DistributedType.MULTI_CPU
    accelerate.state.PartialState._prepare_backend = lambda *_, **__: ("gloo", kind)
    accelerate.state.PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))


def model_of(how: str, *, lora: bool, folder: Path) -> Any:
    """The base, or with an adapter that changes nothing yet; of `fsdp2-lean` only the first process has its weights."""
    torch.manual_seed(5)
    if how == "loaded":
        from transformers.distributed import DistributedConfig

        if torch.distributed.get_rank() == 0:
            saved(folder / "base", tiny_llama(), char_tokenizer())
        torch.distributed.barrier()
        config = DistributedConfig(fsdp_size=torch.distributed.get_world_size())
        model = AutoModelForCausalLM.from_pretrained(folder / "base", distributed_config=config)
        model.config.attention_dropout = 0.3
    else:
        model = tiny_llama(attention_dropout=0.3)
    if how == "fsdp2-lean" and torch.distributed.get_rank() > 0:
        with torch.no_grad():
            for weight in model.parameters():
                weight.fill_(torch.nan)
    return add_lora(model, 2) if lora else model


def train(
    how: str, out: Path, callbacks: list[Any], *, lora: bool = False, model: Any = None, **config: Any
) -> Trainer:
    """Four steps of a batch of eight in all."""
    pretend(sharding=how.startswith("fsdp"))
    own = {"max_steps": 4, "per_device_train_batch_size": 4, **HOW[how], **config}
    model = model_of(how, lora=lora, folder=out) if model is None else model
    trainer = trainer_of(out, callbacks, model, **own)
    trainer.train()
    return trainer


class Sharding(TrainerCallback):  # type: ignore[misc]
    """Notes what the model was as it was trained."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.seen = sorted({type(weight.data).__name__ for weight in model.parameters()})
        self.here = sum(weight.numel() for weight in model.parameters())


def outcome(how: str, folder: Path, *, lora: bool) -> dict[str, Any]:
    """The losses without the monitor and with it, what it measured, and how the model was sharded."""
    plain = train(how, folder / "plain", [], lora=lora)
    law = law_of(tiny_llama(), scale=20.0)
    watching = watch(folder / "watched", law, every=2, budget=0.9, on_budget="keep")
    sharding = Sharding()
    watched = train(how, folder / "watched", [watching, sharding], lora=lora)
    return {
        "plain": losses_of(plain),
        "watched": losses_of(watched),
        "kl": [{name: kl.mean for name, kl in reading.kl.items()} for reading in watching.readings],
        "steps": [reading.step for reading in watching.readings],
        "sharding": sharding.seen,
        "here": sharding.here,
    }


def main() -> None:
    """Run the cases named, each `HOW/full` or `HOW/lora`, and leave what came of each in a file of this process."""
    torch.set_num_threads(1)
    folder, cases = Path(sys.argv[1]), sys.argv[2:]
    if not any(case.startswith("zero") for case in cases):
        torch.distributed.init_process_group("gloo")
    for case in cases:
        how, _, what = case.partition("/")
        own = folder / case
        found = outcome(how, own, lora=what == "lora")
        (own / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
    leave()


if __name__ == "__main__":
    main()
