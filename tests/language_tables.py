"""A language sweep's tables, in which forgetting is a function of one KL."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from rlrazor.analysis import law
from rlrazor.report.study import Study

# Method -> how much faster than the probe's its KL on the new task grows: a law in the probe's KL alone holds across.
PACE = {"sft-one": 1.0, "sft-uniform": 4.0, "simpo": 2.0, "grpo": 0.5, "reinforce": 8.0, "kl-dpg": 0.25}
LABELS = {"sft-one": "SFT, one answer", "sft-uniform": "SFT, uniform", "simpo": "SimPO", "grpo": "GRPO"}
LABELS |= {"reinforce": "1-0 REINFORCE", "kl-dpg": "KL-DPG"}
CONFIG: dict[str, Any] = {
    "experiment": "language",
    "title": "Language model, pairs",
    "task": "pairs",
    "new_task": "pairs",
    "prior_task": "prior tasks",
    "prior_tasks": ["copy", "sort"],
    "thresholds": [0.8, 0.9],
    "kl_unit": "nats per completion",
    "families": {"RL": ["grpo", "reinforce", "kl-dpg"], "SFT": ["sft-one", "sft-uniform"]},
    "quadrants": {"grpo": [True, True], "reinforce": [True, False], "simpo": [False, True], "sft-one": [False, False]},
    "representation": "On 100 paragraphs.",
    "accuracy_margin": 0.03,
    "preset": "tiny",
    "command": "razor reproduce language --preset tiny",
    "labels": LABELS,
    "config": {"lrs": [1e-4, 2e-4]},
    "data": "fingerprint",
    "versions": {"rlrazor": "0.1.0"},
    "machine": "a machine",
    "core_seconds": 60,
    "diverged": [],
    "drift": ["kl_forward", "kl_reverse", "kl_correct", "kl_probe", "weight_l2"],
}
BASE_PRIOR = 0.95


def forgotten(kl: float) -> float:
    """What a KL on the probe costs."""
    return 0.5 * (1 - math.exp(-0.8 * kl))


def make_table(
    law_in: str = "kl_probe",
    seeds: int = 2,
    methods: Sequence[str] = tuple(PACE),
    noise: float = 0.002,
    fingerprint: float = 0.0,
) -> pl.DataFrame:
    """Forgetting is a function of `law_in`, kl_probe or kl_forward; the other is PACE times apart, method by method.

    With `fingerprint`, it is that much of how early a method comes in PACE, and nothing else, but for noise.
    """
    rng = np.random.default_rng(5)
    rows = []
    for seed in range(seeds):
        rows.append(row("base", seed, 0, 0, 0.3, 0.0, 0.0, 0.0))
        for method in methods:
            for run in range(3):
                for step in range(1, 7):
                    progress = (run + 1) * step / 18
                    drift = 1.2 * progress
                    apart = drift * PACE[method]
                    kls = {"kl_probe": drift, "kl_forward": apart}
                    if law_in == "kl_forward":
                        kls = {"kl_probe": apart, "kl_forward": drift}
                    loss = forgotten(drift) if law_in in kls else fingerprint * list(PACE).index(method)
                    new = 0.3 + 0.65 * progress ** (0.4 if method in ("grpo", "reinforce", "kl-dpg") else 0.5)
                    loss += noise * float(rng.normal())
                    rows.append(row(method, seed, run, step, new, loss, kls["kl_forward"], kls["kl_probe"]))
    return pl.DataFrame(rows, infer_schema_length=None)


def row(
    method: str, seed: int, run: int, step: int, new: float, loss: float, kl_forward: float, kl_probe: float
) -> dict[str, Any]:
    tuned = method != "base"
    rl = method in ("grpo", "reinforce", "kl-dpg")
    return {
        "run_id": f"{method} {run} {seed}",
        "trajectory": f"{method} {run} {seed}",
        "method": method,
        "lr": 1e-4 * (run + 1) if tuned else None,
        "schedule": "constant" if tuned else None,
        "epochs": 1 if tuned else None,
        "seed": seed,
        "step": step,
        "epoch": step / 6,
        "new": new,
        "prior": BASE_PRIOR - loss,
        "prior_copy": BASE_PRIOR - 2 * loss,
        "prior_sort": BASE_PRIOR,
        "forgetting": loss,
        "kl_forward": kl_forward,
        "kl_reverse": kl_forward**1.3,
        "kl_correct": kl_forward / 2,
        "kl_probe": kl_probe,
        "kl_forward_per_token": kl_forward / 5,
        "kl_probe_per_token": kl_probe / 5,
        "weight_l2": 1.0 if tuned else 0.0,
        "cknna_on_probe": 1 - (0.1 + 0.001 * seed if rl else 0.4) * new,
    }


def study_of(table: pl.DataFrame, name: str = "kl-laws", **config: Any) -> Study:
    bases = table.filter(pl.col("method") == "base")
    return Study(name, {**CONFIG, **config}, table, law.distinct(table), bases, of_sweep=True)


def make_folder(folder: Path, table: pl.DataFrame, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    table.write_parquet(folder / "records.parquet")
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    return folder
