"""How much memory completions of thousands of tokens take, with a vocabulary as large as today's models have.

    python benchmarks/long_completions.py

The KL of a tiny Llama to a moved copy of it, on a completion of random tokens, which is also read as the sampler reads
one once more to check it (`sampling._Batch.check`): each length in a process of its own, whose peak is set beside that
of one that has the two models and measures one token. Logits of all positions would be `logits_mb` for each model,
before softmax makes as much again. With --sample the model completes the prompt itself, which takes many times as long;
a step of that keeps the logits of one position, and the cache.
"""

import argparse
import copy
import json
import resource
import subprocess
import sys
import time

VOCABULARY, HIDDEN = 150_000, 64
LENGTHS = (1, 2048, 8192)
PROMPTS = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", action="store_true", help="have the model write the completion")
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.length is not None:
        _measure(arguments.length, sampled=arguments.sample)
        return
    found = [_peak(length, sampled=arguments.sample) for length in LENGTHS]
    for row in found[1:]:
        row["more_than_one_token_mb"] = round(row["peak_mb"] - found[0]["peak_mb"])
        row["logits_mb"] = round(PROMPTS * row["tokens"] * VOCABULARY * 4 / 2**20)
    print(json.dumps(found, indent=1))


def _peak(length: int, *, sampled: bool) -> dict[str, float]:
    command = [sys.executable, __file__, "--length", str(length), *(["--sample"] if sampled else [])]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    row: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return row


def _measure(length: int, *, sampled: bool) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from rlrazor.lm import compute, forward, kl, sampling

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
    if sampled:
        how = sampling.Sampling(length, [], 0, rng=torch.Generator().manual_seed(0))
        completions = sampling.sample(base, prompts, how)
    else:
        completions = [torch.randint(VOCABULARY, (length,)).tolist() for _ in prompts]
        places = list(range(0, length, max(1, length // sampling.CHECKED)))
        with torch.no_grad():
            forward.read_alone(base, [*prompts[0], *completions[0]][:-1], [len(prompts[0]) - 1 + at for at in places])
    sequences = kl.Sequences.grouped(prompts, completions)
    drawn = time.perf_counter()
    drift = kl.forward_kl(kl.Probe(base, sequences), tuned)
    done = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    row = {"tokens": length, "peak_mb": round(peak), "completing_s": drawn - begun, "kl_s": done - drawn}
    print(json.dumps({**row, "kl_per_token": drift.per_token.mean}))


if __name__ == "__main__":
    main()
