"""How much memory `razor compare` takes, as a ratio to one model: peak resident memory of two processes.

    python benchmarks/compare_memory.py SmolLM2-135M-Instruct.Q4_1.gguf

The pair is the model and the same with its weights moved. The one process loads the model and runs it over the prompts
once, as any use of it has to; the other compares the pair. The libraries alone, measured in a third, are taken off both
for the second ratio, since they do not grow with the model.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

PROMPTS = [f"Write a short story about the number {number}." for number in range(16)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a hub id, a folder or a .gguf file")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        _measure(arguments.part, arguments.model, arguments.dtype)
        return
    with tempfile.TemporaryDirectory() as folder:
        pair = _make_pair(arguments.model, Path(folder))
        peaks = {
            part: _peak(part, pair, arguments.dtype)
            for part in ("libraries", "one", "one-and-its-adapter", "compare", "compare-adapter")
        }
    base = peaks["libraries"]
    print(
        json.dumps(
            {
                "model": arguments.model,
                "dtype": arguments.dtype,
                "peak_mb": {part: round(peak) for part, peak in peaks.items()},
                "ratio_to_one_model": round(peaks["compare"] / peaks["one"], 3),
                "ratio_without_libraries": round((peaks["compare"] - base) / (peaks["one"] - base), 3),
                "adapter_ratio": round(peaks["compare-adapter"] / peaks["one-and-its-adapter"], 3),
            },
            indent=1,
        )
    )


def _make_pair(source: str, folder: Path) -> Path:
    """Folders base, tuned and adapter; in a process of its own, whose memory is not measured."""
    script = f"""
import torch
from rlrazor.lm.models import add_lora, load
lm = load({source!r})
lm.model.save_pretrained({str(folder / "base")!r}); lm.tokenizer.save_pretrained({str(folder / "base")!r})
adapted = add_lora(lm.model, 8)
with torch.no_grad():
    for name, weight in adapted.named_parameters():
        if ".lora_B." in name:
            weight.normal_(std=1e-3)
adapted.save_pretrained({str(folder / "adapter")!r})
model = adapted.unload()
with torch.no_grad():
    for weight in model.parameters():
        weight += 1e-3 * torch.randn_like(weight)
model.save_pretrained({str(folder / "tuned")!r}); lm.tokenizer.save_pretrained({str(folder / "tuned")!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    return folder


def _peak(part: str, pair: Path, dtype: str) -> float:
    """MB."""
    command = [sys.executable, __file__, str(pair), "--dtype", dtype, "--part", part]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.splitlines()[-1])


def _measure(part: str, folder: str, dtype: str) -> None:
    from rlrazor.guard.compare import compare
    from rlrazor.guard.comparison import Pair
    from rlrazor.lm import compute, kl, probes
    from rlrazor.lm.models import load
    from rlrazor.lm.probes import GenericText, ProbeSettings

    compute.prepare_process()
    base, settings = f"{folder}/base", ProbeSettings(32)
    import peft  # noqa: F401
    from transformers import AutoModelForCausalLM  # noqa: F401

    if part.startswith("one"):
        adapter = Path(folder) / "adapter" if part == "one-and-its-adapter" else None
        lm = load(base, adapter=adapter, dtype=dtype)
        sequences = probes.of_prompts(lm.model, lm.tokenizer, PROMPTS, settings)
        kl.log_probs(lm.model, sequences)
    elif part.startswith("compare"):
        tuned = "adapter" if part == "compare-adapter" else "tuned"
        compare(Pair(base, f"{folder}/{tuned}", dtype), PROMPTS, generic=GenericText.built_in(), settings=settings)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


if __name__ == "__main__":
    main()
