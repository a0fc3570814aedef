"""What the files beside checkpoints hold: a Trainer's state, the label and the log of a monitor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, model_validator

from rlrazor.analysis.forecast import FORWARD, PROBE
from rlrazor.bounds import MOST_STEPS
from rlrazor.lm.means import MeanKL
from rlrazor.system.schema import LARGEST_KL, Digest, Drop, Name, Open, Score, Step, Text

Kl = Annotated[float, Field(ge=-LARGEST_KL, le=LARGEST_KL)]
Stderr = Annotated[float, Field(ge=0, le=LARGEST_KL)]

LOWEST = 1.0  # nats below 0 that few samples, whose standard error is itself a guess, may come to


class Entry(Open):
    """What a Trainer logged; most have a step."""

    step: Step = 0


class TrainerState(Open):
    """trainer_state.json."""

    log_history: list[Entry]
    global_step: Step = 0


class Label(Open):
    """razor.json: the run that a checkpoint is of, and the hash of the state that was saved in it."""

    run: Name
    step: Step
    state: Digest


class ForecastRow(Open):
    """A forecast in the log."""

    drop: Drop
    low: Drop
    high: Drop
    extrapolated: bool = False

    @model_validator(mode="after")
    def _is_an_interval(self) -> ForecastRow:
        if self.low > self.high:
            raise ValueError(f"the interval begins at {self.low:g} and ends at {self.high:g}")
        return self


class LogRow(Open):
    """A line of razor.jsonl: all that a monitor or `razor watch` writes. Of earlier versions: `share`, `last_share`.

    `Reading` has what most of it means. `every` and the fractions are the plan's, `base` to `prompts_hash` tell whether
    rows were measured alike; `error` is that of a measurement that failed, and such a row has none. Of `razor watch`:
    `checkpoint`, the folder, `weights`, what tells its weights from others, and `on_budget`, a hash of the command that
    was run; with a served base the KLs are estimates, and those `_at_least` are what is certain.
    """

    run: Name | None = None
    step: Step = 0
    epoch: float | None = None
    error: Text | None = None
    kl_forward: Kl | None = None
    kl_forward_stderr: Stderr | None = None
    kl_probe: Kl | None = None
    kl_probe_stderr: Stderr | None = None
    kl_forward_at_least: Kl | None = None
    kl_probe_at_least: Kl | None = None
    kl_forward_per_token: Kl | None = None
    kl_probe_per_token: Kl | None = None
    prompts: dict[Name, Annotated[int, Field(ge=0)]] = {}  # noqa: RUF012
    whole: bool = False
    forecast: ForecastRow | None = None
    level: Annotated[float, Field(gt=0, lt=1)] | None = None
    budget: Score | None = None
    law_useful: bool = True
    law_objection: Text | None = None
    within: bool | None = None
    verdict: str | None = None
    seconds: float | None = None
    first_prompt: str | None = None
    base: Text = ""
    probe: Text = ""
    prompts_hash: Text = ""
    every: Annotated[int, Field(ge=1, le=MOST_STEPS)] | None = None
    share: Annotated[float, Field(gt=0, le=1)] | None = None
    last_share: Annotated[float, Field(gt=0, le=1)] | None = None
    probe_fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    last_probe_fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    remaining: dict[Name, Any] = {}  # noqa: RUF012
    checkpoint: Name | None = None
    weights: Digest | None = None
    on_budget: Text | None = None

    @property
    def kls(self) -> dict[str, MeanKL]:
        """On each probe that was measured; without a standard error (NaN) of a single prompt."""
        found = {FORWARD: (self.kl_forward, self.kl_forward_stderr), PROBE: (self.kl_probe, self.kl_probe_stderr)}
        return {
            name: MeanKL(mean, math.nan if stderr is None else stderr)
            for name, (mean, stderr) in found.items()
            if mean is not None
        }

    @model_validator(mode="after")
    def _could_be_measured(self) -> LogRow:
        for name in ("kl_forward", "kl_probe"):
            kl, stderr = getattr(self, name), getattr(self, f"{name}_stderr")
            if kl is not None and stderr is not None and kl < -LOWEST - 10 * stderr:
                raise ValueError(f"{name} is {kl:g}, and a KL is below 0 by its samples' noise alone ({stderr:g})")
        return self


def is_monitors(row: LogRow | Mapping[str, Any]) -> bool:
    """Whether a monitor wrote it, and not `razor watch`; of a row as it is in the file too."""
    names = row.model_fields_set if isinstance(row, LogRow) else row.keys()
    return names.isdisjoint(("weights", "on_budget"))
