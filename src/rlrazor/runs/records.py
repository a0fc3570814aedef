"""The one type that joins the two halves: experiments make `Record`s, analysis reads them as a table."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import polars as pl

from rlrazor.errors import RazorError

SCHEMA_VERSION = 1
BASE = "base"  # the method name of the untuned policy

JSON = dict[str, Any]


@dataclass(frozen=True)
class RunSpec:
    """All that decides a run's results: the same spec gives the same bits.

    `params` holds JSON values; `lr`, `schedule` and `epochs` are there for every fine-tuning run.
    """

    experiment: str
    method: str
    params: Mapping[str, Any]
    seed: int

    @property
    def run_id(self) -> str:
        """The content hash, 16 hexadecimal digits: the name of the run's folder."""
        return _digest(asdict(self))

    @property
    def trajectory(self) -> str:
        """An id shared by runs of which one is a prefix of the other.

        At a constant learning rate a short run is the beginning of a longer one; so the two are trained once, and are
        one observation, not two, to any statistic.
        """
        spec = asdict(self)
        if self.params.get("schedule") == "constant":
            spec["params"] = {name: value for name, value in self.params.items() if name != "epochs"}
        return _digest(spec)

    def __hash__(self) -> int:
        return hash(self.run_id)

    def describe(self) -> str:
        """A short human name, such as `grpo lr 1e-04 cosine 2 epochs seed 0`."""
        if self.method == BASE:
            return f"{BASE} seed {self.seed}"
        lr, schedule, epochs = (self.params.get(name) for name in ("lr", "schedule", "epochs"))
        return f"{self.method} lr {lr:.1e} {schedule} {epochs} epoch{'s' if epochs != 1 else ''} seed {self.seed}"


@dataclass(frozen=True)
class Record:
    """One checkpoint. Scores are fractions of 1, KL is in nats.

    Wall time is not a field: records of the same spec must be equal to the bit. The store keeps it beside them.
    """

    run_id: str
    step: int
    epoch: float
    new: float
    prior: Mapping[str, float]
    drift: Mapping[str, float]
    metrics: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        named = {"new": self.new, **self.prior, **self.drift, **self.metrics}
        wrong = [name for name, value in named.items() if not math.isfinite(value)]
        if wrong:
            raise ValueError(f"run {self.run_id}, step {self.step}: {', '.join(wrong)} is not a finite number")

    @property
    def prior_mean(self) -> float:
        """The prior score: the mean over the prior tasks; NaN where there are none."""
        return sum(self.prior.values()) / len(self.prior) if self.prior else math.nan


def to_table(runs: Iterable[tuple[RunSpec, Iterable[Record]]]) -> pl.DataFrame:
    """A row per checkpoint, in the order given; scalar params are columns; forgetting is counted from the seed's base.

    Every seed among the runs needs its base run (method `base`), whose row has `forgetting` 0. Raises RazorError for
    runs without prior tasks, of which nobody knows what they forgot.
    """
    rows: list[JSON] = []
    base_prior: dict[tuple[str, int], float] = {}
    for spec, records in runs:
        scalars = {name: value for name, value in spec.params.items() if not isinstance(value, dict | list)}
        for record in records:
            if not record.prior:
                raise RazorError(f"Run {record.run_id} was measured without prior tasks: it has no forgetting to show.")
            if spec.method == BASE:
                base_prior[spec.experiment, spec.seed] = record.prior_mean
            rows.append(
                {
                    "run_id": record.run_id,
                    "trajectory": spec.trajectory,
                    "experiment": spec.experiment,
                    "method": spec.method,
                    "lr": None,
                    "schedule": None,
                    "epochs": None,
                    **scalars,
                    "seed": spec.seed,
                    "step": record.step,
                    "epoch": record.epoch,
                    "new": record.new,
                    "prior": record.prior_mean,
                    **{f"prior_{name}": score for name, score in record.prior.items()},
                    **record.drift,
                    **record.metrics,
                }
            )
    for row in rows:
        row["forgetting"] = base_prior[row["experiment"], row["seed"]] - row["prior"]
    return pl.DataFrame(rows, infer_schema_length=None)


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
