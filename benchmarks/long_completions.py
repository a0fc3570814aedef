"""How much memory completions of thousands of tokens take, with a vocabulary as large as today's models have.

    python benchmarks/long_completions.py

A tiny Llama completes two prompts, and the KL of a moved copy is measured on what it said: each length in a process of
its own, whose peak is set beside that of a process that has the two models and measures one token. Logits of all
positions would be `logits_mb`, for each model, before softmax makes as much again.
"""

import argparse
import copy
import json
import resource
import subprocess
import sys
import time

VOCABULARY, HIDDEN = 150_000, 64
LENGTHS = (1, 1024, 2048, 4096, 8192)
PROMPTS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    if (length := parser.parse_args().length) is not None:
        _measure(length)
        return
    found = [_peak(length) for length in LENGTHS]
    for row in found[1:]:
        row["more_than_one_token_mb"] = round(row["peak_mb"] - found[0]["peak_mb"])
        row["logits_mb"] = round(PROMPTS * row["tokens"] * VOCABULARY * 4 / 2**20)
    print(json.dumps(found, indent=1))


def _peak(length: int) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, __file__, "--length", str(length)], check=True, capture_output=True, text=True
    )
    row: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return row


def _measure(length: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from rlrazor.lm import compute, kl, sampling

    compute.prepare_process()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2 * LENGTHS[-1],
        initializer_range=0.1,
    )
    base = LlamaForCausalLM(config).eval()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for weight in tuned.parameters():
            weight += 0.01 * torch.randn_like(weight)
    prompts = [list(range(10, 26)), list(range(30, 42))][:PROMPTS]
    begun = time.perf_counter()
    how = sampling.Sampling(length, [], 0, rng=torch.Generator().manual_seed(0))
    sequences = kl.Sequences.grouped(prompts, sampling.sample(base, prompts, how))
    sampled = time.perf_counter()
    drift = kl.forward_kl(kl.Probe(base, sequences), tuned)
    done = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    row = {"tokens": length, "peak_mb": round(peak), "sampling_s": sampled - begun, "kl_s": done - sampled}
    print(json.dumps({**row, "kl_per_token": drift.per_token.mean}))


if __name__ == "__main__":
    main()
