"""Short trainings in two processes whose model is sharded in every way there is: `test_sharded.py` starts them.

    torchrun --nproc-per-node 2 sharded_runs.py FOLDER CASE ...

accelerate shards on accelerators only, so it is told here that the CPU is one; all else is a real `Trainer`'s.
"""

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import accelerate.state
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from laws import GENERIC, PROMPTS, SETTINGS, law_of
from rlrazor.errors import RazorError
from rlrazor.guard import monitor, ranks
from rlrazor.guard.base_side import BaseSide, joined, kls_of
from rlrazor.guard.measured_on import MeasuredOn
from rlrazor.lm import compute, kl, lockstep
from rlrazor.lm.digests import base_digest
from rlrazor.lm.models import add_lora
from rlrazor.lm.undone import check_undone
from tiny_models import char_tokenizer, saved, tiny_llama
from watching import leave, losses_of, trainer_of, watch

LAYERS = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
FSDP1 = {"version": 1, "sync_module_states": False, "cpu_ram_efficient_loading": False, **LAYERS}
FSDP2 = {"version": 2, "cpu_ram_efficient_loading": False, **LAYERS}
AUTO = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size"), "auto")
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


BARE = ("plain", "tied", "one prompt", "adapted head", "half")
FAILING = ("setup", "setup-within-call", "within-call", "between-calls", "writing", "gathering")


class Failing(TrainerCallback):  # type: ignore[misc]
    """Has one place fail in one process; within a call, a part of the model that is no unit of its own."""

    def __init__(self, where: str, rank: int) -> None:
        self.here, self.where, self.count = torch.distributed.get_rank() == rank, where, 0

    def fail(self, *_: Any, **__: Any) -> Any:
        raise ValueError("planted")

    def fail_late(self, *args: Any, **kwargs: Any) -> Any:
        """The second call of a measurement."""
        self.count += 1
        return self.fail() if self.count == 2 else forward_kl(*args, **kwargs)

    def plant(self, model: Any, monitor: Any) -> None:
        if not self.here:
            return
        if self.where == "setup":
            monitor.base_digest = self.fail
        if self.where == "between-calls":
            kl.forward_kl = self.fail_late
        if self.where == "writing":
            monitor.ForgettingMonitor._report = self.fail
        if self.where == "gathering":
            monitor.whole_state = self.fail
        if self.where.endswith("within-call"):
            (part,) = (one for name, one in model.named_modules() if name.endswith("layers.1.mlp.act_fn"))
            part.forward = partial(self.fail_within, part, part.forward)

    def fail_within(self, part: Any, forward: Any, *args: Any) -> Any:
        return forward(*args) if part.training or not self.armed else self.fail()

    @property
    def armed(self) -> bool:
        return self.where == "setup-within-call" or self.began

    began = False

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.began = True

    @staticmethod
    def mend(monitor: Any) -> None:
        monitor.base_digest, monitor.whole_state, kl.forward_kl = base_digest, lockstep.whole_state, forward_kl
        monitor.ForgettingMonitor._report = report


forward_kl, report = kl.forward_kl, monitor.ForgettingMonitor._report


def failed(how: str, folder: Path, where: str, rank: int) -> dict[str, Any]:
    """What one process's failure comes to, in this process."""
    failing, model = Failing(where, rank), model_of(how, lora=False, folder=folder)
    law = law_of(tiny_llama(), scale=20.0)
    watching = watch(folder, law, every=1, budget=0.9, on_budget="keep")
    failing.plant(model, monitor)
    try:
        losses = losses_of(train(how, folder, [failing, watching], model=model, max_steps=2))
        error = ""
    except RazorError as raised:
        losses, error = [], str(raised)
    finally:
        failing.mend(monitor)
    # Nobody is left behind.
    torch.distributed.barrier()
    return {"losses": losses, "error": error, "off": watching.is_off, "readings": len(watching.readings)}


def bare(kind: str) -> dict[str, Any]:
    """KLs of a model that `fully_shard` has sharded without any trainer, and of the same in each process whole."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if kind == "half" else MixedPrecisionPolicy()

    def made(*, sharded: bool) -> Any:
        model = tiny_llama(tie_word_embeddings=kind == "tied")
        if kind == "adapted head":
            config = LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
            torch.manual_seed(3)
            model = get_peft_model(model, config)
        if sharded:
            for layer in model.get_decoder().layers:
                fully_shard(layer, mp_policy=half)
            fully_shard(model, mp_policy=half)
        return model

    def measured(*, sharded: bool) -> dict[str, Any]:
        model = made(sharded=sharded)
        on = MeasuredOn(PROMPTS[:1] if kind == "one prompt" else PROMPTS, GENERIC, SETTINGS)
        share = (torch.distributed.get_rank(), 2) if sharded else (0, 1)

        def work(work: Any) -> Any:
            return ranks.everywhere(work, model) if sharded else [work()]

        (side, *_), parts = [work(lambda: BaseSide.of(model, char_tokenizer(), on, share=share))[share[0] :], []]
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1.02) if kind != "adapted head" else None
        parts = work(lambda: side.measure(model))
        return {
            "digest": work(lambda: base_digest(model))[0],
            "precision": compute.precision_of(model),
            **{name: kl.mean for name, kl in kls_of(joined(parts)).items()},
        }

    return {"sharded": measured(sharded=True), "whole": measured(sharded=False)}


def undone(folder: Path) -> dict[str, str]:
    """What is said of a sharded model whose adapter has learnt something, on its base and on another."""
    from torch.distributed.fsdp import fully_shard

    if torch.distributed.get_rank() == 0:
        saved(folder / "base", tiny_llama(), char_tokenizer())
    torch.distributed.barrier()
    said = {}
    for name, factor in (("right", 1.0), ("wrong", 1.1)):
        model = AutoModelForCausalLM.from_pretrained(folder / "base")
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        with torch.no_grad():
            model.get_decoder().layers[0].self_attn.q_proj.base_layer.weight.mul_(factor)
        for layer in model.get_decoder().layers:
            fully_shard(layer)
        fully_shard(model)
        try:
            ranks.everywhere(partial(check_undone, model), model)
            said[name] = ""
        except RazorError as error:
            said[name] = str(error)
    return said


def main() -> None:
    """Run the cases named and leave what came of each in a file of this process.

    `HOW/full` or `HOW/lora`; `HOW/fails` has each process fail in turn in each place; `bare/kl` has no trainer.
    """
    torch.set_num_threads(1)
    folder, cases = Path(sys.argv[1]), sys.argv[2:]
    torch.distributed.init_process_group("gloo")
    for case in cases:
        how, _, what = case.partition("/")
        own = folder / case
        if what == "fails":
            found = {
                f"{where} {rank}": failed(how, own / f"{where}-{rank}", where, rank)
                for where in FAILING
                for rank in range(torch.distributed.get_world_size())
            }
        elif how == "bare":
            found = {**{kind: bare(kind) for kind in BARE}, "undone": undone(own)}
        else:
            found = outcome(how, own, lora=what == "lora")
        own.mkdir(parents=True, exist_ok=True)
        (own / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
    leave()


if __name__ == "__main__":
    main()
