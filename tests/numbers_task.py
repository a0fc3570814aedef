"""A prior task that a tiny model really knows: say the number again. And models that have changed it in known ways."""

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from tiny_models import char_tokenizer, tiny_llama

TOKENIZER = char_tokenizer()
SCORED = 24  # of the 60 rows


def taught(model: Any, answer: Callable[[int], str], steps: int, lr: float) -> Any:
    """A copy that was trained to answer so, on batches of 32 numbers, the learning rate falling to 0."""
    model, rng = copy.deepcopy(model).train(), random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 20) * (1 - step / steps)
        drawn = [rng.randrange(10, 100) for _ in range(32)]
        rows = [(TOKENIZER.encode(f"q{n}:"), TOKENIZER.encode(f"{answer(n)};")) for n in drawn]
        width = max(len(prompt) + len(said) for prompt, said in rows)
        ids_BT = torch.tensor([p + s + [0] * (width - len(p) - len(s)) for p, s in rows])
        labels_BT = torch.full_like(ids_BT, -100)
        for row, (prompt, said) in enumerate(rows):
            place = slice(len(prompt), len(prompt) + len(said))
            labels_BT[row, place] = ids_BT[row, place]
        logits_BTV = model(input_ids=ids_BT).logits[:, :-1]
        loss = F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def knowing() -> Any:
    """A model that says the number again, and then ends."""
    return taught(tiny_llama(hidden=32, scale=0.1), lambda n: f" {n}", 120, 5e-3)


def task(folder: Path) -> str:
    """Its YAML file: a space and the number, and nothing else."""
    numbers = random.Random(0).sample(range(10, 100), 60)
    (folder / "numbers.jsonl").write_text("\n".join(json.dumps({"q": f"q{n}:", "a": str(n)}) for n in numbers))
    path = folder / "numbers.yaml"
    path.write_text(f"""task: numbers
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder / "numbers.jsonl"}
test_split: test
output_type: generate_until
doc_to_text: '{{{{q}}}}'
doc_to_target: '{{{{a}}}}'
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 10
  do_sample: false
filter_list:
  - name: strict
    filter:
      - function: regex
        regex_pattern: "^ ?([0-9]+)$"
      - function: take_first
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
""")
    return str(path)
