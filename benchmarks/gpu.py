"""What rlrazor costs on a GPU, in ms and GB, within nine minutes: one measurement of KL, and the monitor in training.

    python benchmarks/gpu.py                                         # all cases, the smallest first
    python benchmarks/gpu.py --cases kl,qwen2.5-7b:lora --seconds 300
    python benchmarks/gpu.py --cases tiny:kl,tiny:lora,tiny:full --steps 8 --tokens 32       # the same code on a CPU

Models are of random weights in bfloat16, of SmolLM2's and Qwen2.5's shapes. Each case is a process of its own, which
prints one line of JSON; one that does not fit into the memory or the time says so, and the others go on.

A case is SHAPE:WHAT. `kl`, which stands for qwen2.5-7b:kl, compares KL to the base on 16 texts of random tokens with
the forward pass, with logits, that it takes anyway. It needs the LM head and the last hidden states only, so the model
has one layer. `lora` (rank 16) and `full` train without the monitor and with it, at its default setting; the first of
the three trainings warms up.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LEARNED = ("smollm2-135m", "qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-3b", "qwen2.5-7b")
CASES = ("qwen2.5-7b:kl", *(f"{shape}:{what}" for shape in LEARNED for what in ("lora", "full")))
TEXTS, BATCH, REPEATS = 16, 4, 5


def main() -> None:
    """Run each case while there is time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--seconds", type=float, default=520, help="for all; what is left out is named")
    parser.add_argument("--steps", type=int, default=40, help="of each training")
    parser.add_argument("--tokens", type=int, default=512, help="of each text")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps({"case": arguments.case, **measured(arguments.case, arguments.steps, arguments.tokens)}))
        return
    ends = time.monotonic() + arguments.seconds
    for case in arguments.cases.split(","):
        name = "qwen2.5-7b:kl" if case == "kl" else case
        sizes = ["--steps", str(arguments.steps), "--tokens", str(arguments.tokens)]
        print(json.dumps(in_a_process(name, sizes, ends - time.monotonic())), flush=True)


def in_a_process(case: str, sizes: list[str], seconds: float) -> dict[str, Any]:
    """What a case found, or why there is nothing."""
    if seconds <= 0:
        return {"case": case, "left_out": "no time left"}
    command = [sys.executable, __file__, "--case", case, *sizes]
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"case": case, "left_out": "no time left"}
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or [f"exit {done.returncode}"]
    found: dict[str, Any] = json.loads(lines[-1]) if done.returncode == 0 else {"case": case, "left_out": lines[-1]}
    return found


def measured(case: str, steps: int, tokens: int) -> dict[str, Any]:
    """One case, in this process."""
    import torch

    from rlrazor.lm import compute

    compute.prepare_process()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    shape, _, what = case.partition(":")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    with torch.device(compute.device()):
        found = kl_cost(shape, tokens) if what == "kl" else monitor_cost(shape, what == "lora", steps, tokens)
    return {"device": device, **found}


def kl_cost(shape: str, tokens: int) -> dict[str, Any]:
    """One KL to the base, beside the forward passes of it, and both peaks above what the models take."""
    import copy

    import torch

    from common import SHAPES, made, peak, reset, synchronize
    from rlrazor.lm import compute, kl

    base = made(shape, layers=1).eval()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for weight in tuned.parameters():
            weight += 0.02 * weight.std() * torch.randn_like(weight)
    texts_BT = torch.randint(SHAPES[shape][5], (TEXTS, tokens))
    rows = max(1, kl.TOKEN_BUDGET // tokens)

    def forward() -> None:
        for batch_BT in texts_BT[:, :-1].split(rows):
            tuned(input_ids=batch_BT, use_cache=False)

    def cost(call: Callable[[], object]) -> tuple[float, float]:
        reset()
        before = peak()
        call()
        taken = []
        for _ in range(REPEATS):
            synchronize()
            start = time.perf_counter()
            call()
            synchronize()
            taken.append(time.perf_counter() - start)
        return statistics.median(taken), (peak() - before) / 1000

    with compute.measuring(tuned, "bfloat16"):
        probe = kl.Probe(base, kl.Sequences.texts(texts_BT.tolist()), precision="bfloat16")
        forward_s, forward_gb = cost(forward)
        kl_s, kl_gb = cost(lambda: kl.forward_kl(probe, tuned))
    return {
        "vocabulary": SHAPES[shape][5],
        "tokens": texts_BT[:, 1:].numel(),
        "forward_ms": round(1000 * forward_s, 1),
        "kl_ms": round(1000 * kl_s, 1),
        "forward_gb": round(forward_gb, 3),
        "kl_gb": round(kl_gb, 3),
    }


def monitor_cost(shape: str, lora: bool, steps: int, tokens: int) -> dict[str, Any]:
    """Training without the monitor and with it."""
    import torch

    from common import SHAPES, made

    model = made(shape)
    parameters = sum(weight.numel() for weight in model.parameters())
    rows_NT = torch.randint(1, SHAPES[shape][5], (BATCH * steps, tokens))
    rows = [{"input_ids": row, "labels": row} for row in rows_NT.tolist()]
    start = {name: value.to("cpu", copy=True) for name, value in model.state_dict().items()}
    found: dict[bool, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for turn, watched in enumerate((False, False, True)):
            model.load_state_dict(start)
            found[watched] = trained(model, rows, Path(folder) / str(turn), lora=lora, watched=watched)
    plain, with_monitor = found[False], found[True]
    return {
        "parameters": parameters,
        "batch": f"{BATCH} of {tokens} tokens",
        "steps": steps,
        "step_ms": round(1000 * plain["seconds"] / steps, 1),
        "overhead": round(with_monitor["seconds"] / plain["seconds"] - 1, 4),
        "measurements": with_monitor["measurements"],
        "measurement_ms": round(1000 * with_monitor["measuring"], 1),
        "base_side_ms": round(1000 * with_monitor["setup"], 1),
        "peak_gb": round(plain["peak"] / 1000, 3),
        "peak_gb_with_monitor": round(with_monitor["peak"] / 1000, 3),
    }


def trained(model: Any, rows: list[dict[str, Any]], out: Path, *, lora: bool, watched: bool) -> dict[str, Any]:
    """Seconds of training, the peak in MB from the trainer's making on, and what the monitor says of itself."""
    import torch
    from transformers import Trainer, TrainingArguments

    from common import WORDS, peak, reset, synchronize, tokenizer
    from rlrazor.guard import ForgettingMonitor, Measuring
    from rlrazor.lm.models import add_lora
    from rlrazor.lm.probes import ProbeSettings

    words = tokenizer(model.config.vocab_size)
    prompts = [f"the {word} was {other}" for word in WORDS for other in WORDS]
    reset()
    policy = add_lora(model, 16) if lora else model
    measuring = Measuring(settings=ProbeSettings(chat=False), cache_dir=out / "cache")
    monitors = [ForgettingMonitor(prompts, measuring=measuring)] if watched else []
    trainer = Trainer(
        policy,
        TrainingArguments(
            output_dir=str(out), max_steps=len(rows) // BATCH, per_device_train_batch_size=BATCH, learning_rate=1e-5,
            report_to="none", save_strategy="no", disable_tqdm=True, logging_strategy="no",
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=rows,
        processing_class=words,
        callbacks=monitors,
    )  # fmt: skip
    synchronize()
    begun = time.perf_counter()
    trainer.train()
    synchronize()
    found = {"seconds": time.perf_counter() - begun, "peak": peak()}
    for monitor in monitors:
        taken = [reading.seconds for reading in monitor.readings]
        found |= {"measurements": len(taken), "measuring": statistics.median(taken), "setup": monitor.setup_seconds}
    if lora:
        policy.unload()
    return found


if __name__ == "__main__":
    main()
