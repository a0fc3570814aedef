"""What one measurement of KL to the base costs, against one forward pass, with logits, over the same tokens.

    python benchmarks/language_kl.py MODEL [--texts 16] [--tokens 256] [--repeats 5] [--bf16]

MODEL is a hub id, a folder or a .gguf file. The texts are random tokens, all of which are measured: the worst case,
since a prompt costs a forward pass but no KL. Both take the same batches, in turns; the ratio is of medians. Aim: at
most 1.3.
"""

import argparse
import copy
import resource
import statistics
import time
from collections.abc import Callable

import torch

from rlrazor.lm import compute, kl
from rlrazor.lm.models import load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--token-budget", type=int, default=kl.TOKEN_BUDGET)
    parser.add_argument(
        "--bf16", action="store_true", help="autocast the models to bfloat16; the LM heads stay float32"
    )
    arguments = parser.parse_args()

    compute.prepare_process()
    base = load(arguments.model).model
    tuned = copy.deepcopy(base)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.02 * parameter.std() * torch.randn_like(parameter))
    texts_BT = torch.randint(base.config.vocab_size, (arguments.texts, arguments.tokens))
    sequences = kl.Sequences.texts(texts_BT.tolist())
    device = compute.device()
    rows = max(1, arguments.token_budget // arguments.tokens)

    def seconds(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def forward() -> None:
        for batch_BT in texts_BT[:, :-1].split(rows):
            tuned(input_ids=batch_BT.to(device), use_cache=False)

    precision = "bfloat16" if arguments.bf16 else "float32"
    with compute.measuring(tuned, precision):
        probe = kl.Probe(base, sequences, precision=precision)
        drift = kl.forward_kl(probe, tuned, token_budget=arguments.token_budget)
        forwards, measurements = [], []
        forward()
        for _ in range(arguments.repeats):
            forwards.append(seconds(forward))
            measurements.append(seconds(lambda: kl.forward_kl(probe, tuned, token_budget=arguments.token_budget)))
    before, after = statistics.median(forwards), statistics.median(measurements)
    print(f"{arguments.texts} texts of {arguments.tokens} tokens; KL {drift.per_token.mean:.4f} nats per token")
    print(f"forward pass with logits {before:8.3f} s   {len(drift.positions) / before:9.0f} tokens/s")
    print(f"KL measurement           {after:8.3f} s   {len(drift.positions) / after:9.0f} tokens/s")
    print(f"ratio                    {after / before:8.3f}")
    print(f"peak memory              {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:8.2f} GB")


if __name__ == "__main__":
    main()
