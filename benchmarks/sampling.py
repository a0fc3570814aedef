"""What the base's side of a comparison costs, against plain `generate` and two forward passes, in one process.

    python benchmarks/sampling.py SmolLM2-135M-Instruct.Q4_1.gguf [--prompts 100] [--new-tokens 128] [--turns 3]

In turns, on the same prompts and threads:

(a) transformers' `generate`, sampling, in its fastest batch size of those tried, prompts sorted by length; and two
    forward passes with logits over prompts and completions, as a KL by hand takes: the base's and the tuned model's.
(b) ours: completions by the base and its hidden states on them, then the KL of a second model to it.

Printed: seconds and the ratio of medians. Aim: at most 1.2. Completions are not the same, as both sample: seconds are
also given per token that was drawn. Run it on an idle machine.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from rlrazor.lm import compute, encoding, kl, probes
from rlrazor.lm.models import load
from rlrazor.lm.probes import ProbeSettings
from rlrazor.system.cores import threads_alone

TOPICS = ("tea", "the sea", "prime numbers", "a lost key", "winter in the mountains", "how a bicycle stays upright")
FORMS = (
    "Write a short story about {}.",
    "Explain {} to a child of six, in three sentences.",
    "What is the most surprising thing about {}, and why do so few people know of it? Give two examples.",
    "Name five words that rhyme with something in {}.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a hub id, a folder or a .gguf file")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--batches", default="16,32,64,128", help="batch sizes of `generate` that are tried")
    parser.add_argument("--threads", type=int, default=threads_alone())
    arguments = parser.parse_args()
    compute.prepare_process(arguments.threads)
    lm = load(arguments.model)
    tuned = copy.deepcopy(lm.model)
    with torch.no_grad():
        for weight in tuned.parameters():
            weight += 1e-3 * weight.std() * torch.randn_like(weight)
    asked = [form.format(f"{topic} ({n})") for n in range(99) for topic in TOPICS for form in FORMS]
    prompts = asked[: arguments.prompts]
    settings = ProbeSettings(arguments.new_tokens)
    ids = probes.encode(lm.tokenizer, prompts, settings.chat)
    stops = encoding.stop_ids(lm.tokenizer, lm.model, ())

    def generated(batch: int) -> list[list[int]]:
        return _generate(lm.model, ids, batch, arguments.new_tokens, stops, lm.tokenizer.pad_token_id)

    trials = {}
    for batch in map(int, arguments.batches.split(",")):
        trials[batch] = _seconds(partial(generated, batch))[0] if arguments.turns > 1 else 0.0
    batch = min(trials, key=lambda size: trials[size])
    theirs: dict[str, list[float]] = {"generate": [], "two forwards": []}
    ours: dict[str, list[float]] = {"complete": [], "base's states": [], "kl": []}
    drawn: dict[str, list[int]] = {"generate": [], "complete": []}
    for turn in range(arguments.turns):
        torch.manual_seed(turn)
        seconds, completions = _seconds(partial(generated, batch))
        theirs["generate"].append(seconds)
        drawn["generate"].append(sum(map(len, completions)))
        seconds, _ = _seconds(partial(_two_forwards, lm.model, tuned, ids, completions))
        theirs["two forwards"].append(seconds)

        seconds, sequences = _seconds(
            partial(probes.of_prompts, lm.model, lm.tokenizer, prompts, settings, purpose=f"turn {turn}")
        )
        ours["complete"].append(seconds)
        drawn["complete"].append(sum(map(len, sequences.completions)))
        seconds, probe = _seconds(partial(kl.Probe, lm.model, sequences))
        ours["base's states"].append(seconds)
        seconds, drift = _seconds(partial(kl.forward_kl, probe, tuned))
        ours["kl"].append(seconds)
    medians = {name: statistics.median(values) for part in (theirs, ours) for name, values in part.items()}
    a, b = (sum(medians[name] for name in part) for part in (theirs, ours))
    per_token = {name: medians[name] / statistics.median(values) for name, values in drawn.items()}
    # Both at the number of tokens that `generate` drew.
    scale = statistics.median(drawn["generate"]) / statistics.median(drawn["complete"])
    print(
        json.dumps(
            {
                "model": lm.source, "threads": torch.get_num_threads(), "prompts": len(ids),
                "prompt_tokens": sum(map(len, ids)), "new_tokens": arguments.new_tokens, "generate_batch": batch,
                "generate_trials": {size: round(value, 2) for size, value in trials.items()},
                "drawn": drawn,
                "seconds": {name: [round(v, 2) for v in values] for name, values in (theirs | ours).items()},
                "ms_per_drawn_token": {name: round(1000 * value, 3) for name, value in per_token.items()},
                "ratio": round(b / a, 3),
                "ratio_per_token": round(b * scale / a, 3),
                "kl_per_token": drift.per_token.mean,
            },
            indent=1,
        )
    )  # fmt: skip


def _seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """Of this process's own work where there is no GPU: what else the machine does counts less."""
    on_gpu = torch.cuda.is_available()
    clock = time.perf_counter if on_gpu else time.process_time
    start = clock()
    value = call()
    if on_gpu:
        torch.cuda.synchronize()
    return clock() - start, value


def _generate(
    model: Any, ids: list[list[int]], batch: int, new_tokens: int, stops: list[int], pad: int
) -> list[list[int]]:
    """Sampled, prompts of similar length together."""
    order = sorted(range(len(ids)), key=lambda at: len(ids[at]))
    found: list[list[int]] = [[] for _ in ids]
    for start in range(0, len(order), batch):
        here = order[start : start + batch]
        width = max(len(ids[at]) for at in here)
        rows = [[pad] * (width - len(ids[at])) + list(ids[at]) for at in here]
        mask = [[0] * (width - len(ids[at])) + [1] * len(ids[at]) for at in here]
        out = model.generate(
            torch.tensor(rows), attention_mask=torch.tensor(mask), max_new_tokens=new_tokens, do_sample=True,
            temperature=1.0, top_k=0, top_p=1.0, eos_token_id=stops, pad_token_id=pad,
        )  # fmt: skip
        for at, tokens in zip(here, out[:, width:].tolist(), strict=True):
            ends = [place for place, token in enumerate(tokens) if token in stops]
            found[at] = tokens[: ends[0] + 1] if ends else tokens
    return found


def _two_forwards(base: Any, tuned: Any, ids: list[list[int]], completions: list[list[int]]) -> None:
    for model in (base, tuned):
        _forward(model, ids, completions)


@torch.no_grad()
def _forward(model: Any, ids: list[list[int]], completions: list[list[int]]) -> None:
    """With logits, in batches of as many tokens as ours."""
    rows = sorted(([*prompt, *rest] for prompt, rest in zip(ids, completions, strict=True)), key=len, reverse=True)
    while rows:
        count = max(1, kl.TOKEN_BUDGET // len(rows[0]))
        here, rows = rows[:count], rows[count:]
        padded = [row + [0] * (len(here[0]) - len(row)) for row in here]
        model(input_ids=torch.tensor(padded), use_cache=False).logits.log_softmax(-1)


if __name__ == "__main__":
    main()
