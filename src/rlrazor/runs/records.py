"""What a run is, and what it measures: experiments make `Record`s of `RunSpec`s, analysis reads them as a table.

A spec is whole: what a run starts from (its base, or the stage before) and whom it imitates are specs inside it, each
with a step, so that the id of a run hashes all that decides its bits.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

import polars as pl

from rlrazor.errors import RazorError

SCHEMA_VERSION = 2
BASE = "base"  # the method name of the untuned policy

JSON = dict[str, Any]


@dataclass(frozen=True)
class Ancestor:
    """A checkpoint of a run, which another one starts from, or imitates."""

    spec: "RunSpec"
    step: int

    def __str__(self) -> str:
        """As tables name it."""
        return f"{self.spec.run_id}/{self.step}"


@dataclass(frozen=True)
class RunSpec:
    """All that decides a run's results: the same spec gives the same bits.

    `params` holds JSON values, those of the run itself and not again those of what it starts from; `lr`, `schedule` and
    `epochs` are there for every fine-tuning run.
    """

    experiment: str
    method: str
    params: Mapping[str, Any]
    seed: int
    starts_from: Ancestor | None = None
    teacher: Ancestor | None = None

    @cached_property
    def run_id(self) -> str:
        """The content hash, 16 hexadecimal digits: the name of the run's folder."""
        return self._digest(self.params)

    @cached_property
    def trajectory(self) -> str:
        """An id shared by runs of which one is a prefix of the other.

        At a constant learning rate a short run is the beginning of a longer one; so the two are trained once, and are
        one observation, not two, to any statistic.
        """
        if self.params.get("schedule") != "constant":
            return self.run_id
        return self._digest({name: value for name, value in self.params.items() if name != "epochs"})

    @cached_property
    def chain(self) -> tuple[Ancestor, ...]:
        """What it starts from, and what that starts from, the first first: a base, and the stages since."""
        return () if self.starts_from is None else (*self.starts_from.spec.chain, self.starts_from)

    @property
    def root(self) -> "RunSpec":
        """The run at the beginning of the chain: the base, or this one if it starts from nothing."""
        return self.chain[0].spec if self.chain else self

    @cached_property
    def settings(self) -> JSON:
        """The params of the root, and over them its own."""
        return {**self.root.params, **self.params}

    def __hash__(self) -> int:
        return hash(self.run_id)

    def as_json(self) -> JSON:
        """All of it, its ancestors whole; `run_files.StoredRun` reads it."""
        named = {"experiment": self.experiment, "method": self.method, "params": dict(self.params), "seed": self.seed}
        return {**named, **self._ancestors(lambda of: {"spec": of.spec.as_json(), "step": of.step})}

    def describe(self) -> str:
        """A short human name, such as `grpo lr 1e-04 cosine 2 epochs seed 0`."""
        if self.method == BASE:
            return f"{BASE} seed {self.seed}"
        lr, schedule, epochs = (self.params.get(name) for name in ("lr", "schedule", "epochs"))
        return f"{self.method} lr {lr:.1e} {schedule} {epochs} epoch{'s' if epochs != 1 else ''} seed {self.seed}"

    def _digest(self, params: Mapping[str, Any]) -> str:
        hashed = {"experiment": self.experiment, "method": self.method, "params": dict(params), "seed": self.seed}
        text = json.dumps({**hashed, **self._ancestors(str)}, sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _ancestors(self, shown: Callable[[Ancestor], Any]) -> JSON:
        both = {"starts_from": self.starts_from, "teacher": self.teacher}
        return {name: None if of is None else shown(of) for name, of in both.items()}


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


def to_table(
    runs: Iterable[tuple[RunSpec, Iterable[Record]]],
    since: Mapping[str, Callable[[RunSpec], Ancestor | None]] = MappingProxyType({}),
) -> pl.DataFrame:
    """A row per checkpoint, in the order given; scalar settings are columns, as is `teacher` where a run has one.

    `forgetting` is what the prior score has lost since the first checkpoint of the run's chain, which has to be among
    the runs, or of a base since its own first one. `since`: by name further ancestors, of each run the one to count
    from or None for none, as columns `forgetting_since_NAME`. Raises RazorError for runs without prior tasks, of which
    nobody knows what they forgot.
    """
    listed = [(spec, list(records)) for spec, records in runs]
    unscored = [record.run_id for _, records in listed for record in records if not record.prior]
    if unscored:
        raise RazorError(f"Run {unscored[0]} was measured without prior tasks: it has no forgetting to show.")
    prior = {(spec.run_id, record.step): record.prior_mean for spec, records in listed for record in records}
    taught = any(spec.teacher is not None for spec, _ in listed)
    rows: list[JSON] = []
    for spec, records in listed:
        scalars = {name: value for name, value in spec.settings.items() if not isinstance(value, dict | list)}
        origin = spec.chain[0] if spec.chain else None
        if origin is None and spec.method != BASE:
            raise ValueError(f"{spec.describe()} starts from nothing that its forgetting could be counted from")
        before = records[0].prior_mean if origin is None else prior[origin.spec.run_id, origin.step]
        named = {name: ancestor_of(spec) for name, ancestor_of in since.items()}
        marks = {name: None if one is None else prior[one.spec.run_id, one.step] for name, one in named.items()}
        rows += [
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
                "forgetting": before - record.prior_mean,
                **{
                    f"forgetting_since_{name}": None if mark is None else mark - record.prior_mean
                    for name, mark in marks.items()
                },
                **({"teacher": None if spec.teacher is None else str(spec.teacher)} if taught else {}),
            }
            for record in records
        ]
    return pl.DataFrame(rows, infer_schema_length=None)
