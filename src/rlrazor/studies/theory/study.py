"""Every number of the study, computed on small finite sets in seconds, and its JSON, which the section is made from."""

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version

import polars as pl

from rlrazor import bounds
from rlrazor.analysis import law
from rlrazor.errors import RazorError
from rlrazor.runs.records import JSON
from rlrazor.studies.theory import parts
from rlrazor.studies.theory.parts import UNTIL, Preset, Rows
from rlrazor.system import phases

NAME = "theory"
RL_METHODS = {  # of a sweep
    "grpo": "GRPO",
    "dr-grpo": "Dr. GRPO",
    "reinforce": "1-0 REINFORCE",
    "grpo+kl": "GRPO + KL",
    "kl-dpg": "KL-DPG",
}
SHARE_COLUMNS = ("kl_reverse", "kl_forward", "kl_reverse_within_correct", "kl_forward_within_correct")

PRESETS: dict[str, Preset] = {
    "quick": Preset(4, 32, (0.1, 0.5, 0.9), (8,), 200, (3,), 1),
    "paper": Preset(30, 128, (0.1, 0.3, 0.5, 0.7, 0.9), (8, 64), 1000, (3, 6), 4),
}


def check(preset: str, seeds: Sequence[int]) -> None:
    """Raise RazorError for an unknown preset or seeds that are not different whole numbers from 0 up."""
    if preset not in PRESETS:
        raise RazorError(f"Unknown preset {preset!r:.60}. Presets: {', '.join(sorted(PRESETS))}.")
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise RazorError("Seeds have to be different whole numbers, not below 0, and at least one.")
    if len(seeds) > bounds.MOST_VALUES:
        raise RazorError(f"There are {len(seeds):,} seeds, and {bounds.MOST_VALUES:,} are the most.")
    for seed in seeds:
        bounds.check("seeds", seed)


def theory_study(preset: str, seeds: Sequence[int], sweep: pl.DataFrame | None = None) -> dict[str, pl.DataFrame]:
    """Compute every number of the study: name -> table, most with a row per seed.

    `sweep` is a sweep's table, for `share_within_correct`. KL is in nats. Raises RazorError as `check` does.
    """
    check(preset, seeds)
    scale = PRESETS[preset]

    def each_seed(part: Callable[[Preset, int], Rows]) -> Rows:
        return ({**row, "seed": seed} for seed in seeds for row in part(scale, seed))

    tables: Mapping[str, Rows] = {  # nothing is computed before its rows are asked for
        "first_check": parts.first_check(),
        "paths": parts.paths(seeds[:3]),
        "alternation": each_seed(parts.alternation),
        "inexact": each_seed(parts.inexact),
        "convergence": parts.convergence(scale, seeds[0]),
        "sft": each_seed(parts.sft),
        "gradients": each_seed(parts.gradients),
        "m_steps": each_seed(parts.m_steps),
        "networks": each_seed(parts.networks),
    }
    study: dict[str, pl.DataFrame] = {}
    for done, (name, rows) in enumerate(tables.items()):
        phases.at(name.replace("_", " "), done, len(tables))
        study[name] = pl.DataFrame(list(rows), infer_schema_length=None)
    return {**study, "parity": share_within_correct(sweep)}


def share_within_correct(table: pl.DataFrame | None, at_least: float = UNTIL) -> pl.DataFrame:
    """How much of the KL that RL pays is among correct outputs, where a KL-minimal policy pays none.

    By the chain rule KL(pi || pi0) is that of the split correct/wrong, plus pi(correct) KL(pi(.|correct) ||
    pi0(.|correct)), plus the same for wrong outputs; likewise for KL(pi0 || pi). A row per method and seed, means over
    the distinct checkpoints of a sweep's table with new >= `at_least`: `kl_reverse`, `kl_reverse_within_correct` (nats)
    and `share_reverse`, the one over the other; the same for forward; and `checkpoints`. Empty for no table, or one
    that lacks the columns or such checkpoints.
    """
    if table is None or not {"method", "seed", "new", "trajectory", "step", *SHARE_COLUMNS} <= set(table.columns):
        return pl.DataFrame()
    reached = law.finite(law.distinct(table), SHARE_COLUMNS).filter(
        pl.col("method").is_in(list(RL_METHODS)), pl.col("new") >= at_least
    )
    means = reached.group_by("method", "seed").agg(
        pl.len().alias("checkpoints"), *(pl.col(name).cast(pl.Float64).mean() for name in SHARE_COLUMNS)
    )
    return means.with_columns(
        (pl.col(f"kl_{way}_within_correct") / pl.col(f"kl_{way}")).alias(f"share_{way}")
        for way in ("reverse", "forward")
    ).sort("method", "seed")


def describe(study: Mapping[str, pl.DataFrame], preset: str, seeds: Sequence[int], command: str) -> JSON:
    """The study as JSON, from which the report draws: what a run folder's studies/theory.json holds."""
    return {
        "name": NAME,
        "preset": preset,
        "command": command,
        "seeds": list(seeds),
        "labels": {},
        "config": asdict(PRESETS[preset]),
        "data": None,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("rlrazor", "scipy")}},
        "tables": {name: table.to_dicts() for name, table in study.items()},
    }
