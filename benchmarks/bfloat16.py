"""Is bfloat16 faster than float32 on this machine? Reading and training a random model of SmolLM2-135M's shape.

    python benchmarks/bfloat16.py [--turns 3]

One thread; medians. On a CPU it depends on the instructions that it has, which are printed.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import LlamaForCausalLM

from common import SHAPES, made

INSTRUCTIONS = ("avx512_bf16", "amx_bf16")


def main() -> None:
    """Time each, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    turns = parser.parse_args().turns
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, half = made("smollm2-135m"), made("smollm2-135m").bfloat16()
    read, trained = (torch.randint(SHAPES["smollm2-135m"][5], shape) for shape in ((8, 96), (24, 40)))
    capabilities = torch.cpu.get_capabilities()
    print("instructions:", ", ".join(name for name in INSTRUCTIONS if capabilities.get(name)) or "none for bfloat16")
    with torch.no_grad():
        print(f"reading, float32: {seconds(lambda: model(read), turns):.2f} s")
        print(f"reading, bfloat16: {seconds(lambda: half(read), turns):.2f} s")
    print(f"a step, float32: {seconds(lambda: step(model, trained), turns):.2f} s")
    with torch.autocast("cpu", torch.bfloat16):
        print(f"a step, bfloat16 by autocast: {seconds(lambda: step(model, trained), turns):.2f} s")


def step(model: LlamaForCausalLM, ids_BT: torch.Tensor) -> None:
    """The gradient of the loss on all tokens."""
    model(input_ids=ids_BT, labels=ids_BT).loss.backward()
    model.zero_grad()


def seconds(run: Callable[[], object], turns: int) -> float:
    """Of one call: the median, after one that is not counted."""
    run()
    taken = []
    for _ in range(turns):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


if __name__ == "__main__":
    main()
