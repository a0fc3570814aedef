"""The parts of a law.json, a class each, and all of them together, as a calibration can have written them.

A fit ends within bounds, and rests on its data. Beyond them a forecast would be wrong without looking so: a = 50 is a
drop of 5,000 points, a negative one a gain.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator

from rlrazor.analysis.forecast import (
    FLOOR,
    MIN_RUNS,
    Candidate,
    Choice,
    Forecaster,
    KLLaw,
    LeftOutRun,
    fit_law,
    relative_residuals,
)
from rlrazor.analysis.law import LEAST, REACH, SHAPES, Floats, Saturating
from rlrazor.errors import RazorError
from rlrazor.guard.measured_on import MeasuredOn
from rlrazor.lm.digests import is_digest
from rlrazor.lm.harness.asking import Asking
from rlrazor.lm.own_texts import OwnTexts
from rlrazor.lm.prior_prompts import PriorPrompts
from rlrazor.lm.probes import GenericText, ProbeSettings
from rlrazor.lm.prompts import check as check_prompt
from rlrazor.lm.prompts import check_text
from rlrazor.lm.task_names import LAST
from rlrazor.system.documents import checked
from rlrazor.system.schema import LARGEST_KL, Digest, Drop, Name, Schema, Score, Seed, Step, Text

Kl = Literal["kl_forward", "kl_probe"]
Error = Annotated[float, Field(ge=0, le=2)]
"""Mean of absolute errors of a drop, which lies within -1 and 1, as its forecast does."""
Value = Annotated[float, Field(ge=-LARGEST_KL, le=LARGEST_KL)]
"""A measured KL, in nats: that of samples may be below 0."""
_OFF = 1e-6  # by which what is written twice may differ: rounding

_LARGEST_RESIDUAL = (1 + _OFF) / FLOOR  # a drop of 1 where none was forecast


class LawCurve(Schema):
    """a (1 - exp(-b x^c)) of the weighted sum of KLs, within what `law.fit_saturating` may end at."""

    predictors: Annotated[dict[Kl, Annotated[float, Field(ge=0, le=1e15)]], Field(min_length=1)]
    a: Annotated[float, Field(ge=LEAST * (1 - _OFF), le=1 + _OFF)]
    b: Annotated[float, Field(gt=0)]
    c: Annotated[float, Field(ge=SHAPES[0] * (1 - _OFF), le=SHAPES[1] * (1 + _OFF))]

    @field_validator("predictors")
    @classmethod
    def _weighs(cls, value: dict[Kl, float]) -> dict[Kl, float]:
        if not any(value.values()):
            raise ValueError("all of its weights are 0, so that it is of no KL")
        return value

    @property
    def law(self) -> KLLaw:
        """As what forecasts."""
        return KLLaw(tuple(self.predictors), tuple(self.predictors.values()), Saturating(self.a, self.b, self.c))

    def check_scale(self, kls_ND: Floats, what: str) -> None:
        """Raise ValueError where it bends at no KL that a fit to these, in the order of `predictors`, would come to."""
        largest = float((kls_ND @ np.array(list(self.predictors.values()))).max())
        if not largest > 0:
            raise ValueError(f"{what} rests on no KL above 0")
        scale = -math.log(self.b) / self.c  # the logarithm of the KL at which 63 % of `a` are lost
        if abs(scale - math.log(largest)) > REACH + _OFF:
            raise ValueError(f"{what} has b = {self.b:g}, to which its data cannot have led")


class LawWithoutRun(Schema):
    """The law without a run, and how it missed that run's checkpoints."""

    run: Name
    law: LawCurve
    residuals: Annotated[list[Annotated[float, Field(ge=0, le=_LARGEST_RESIDUAL)]], Field(min_length=1)]


class LawInterval(Schema):
    """The intervals."""

    method: Name
    level: Annotated[float, Field(gt=0, lt=1)]
    floor: float
    runs: Annotated[list[LawWithoutRun], Field(min_length=MIN_RUNS, max_length=10_000)]

    @field_validator("floor")
    @classmethod
    def _is_ours(cls, value: float) -> float:
        if value != FLOOR:  # residuals are relative to it
            raise ValueError(f"the intervals are of floor {value:g}, not {FLOOR}")
        return value


class LawCandidate(Schema):
    """What a law could have been of."""

    columns: Annotated[list[Kl], Field(min_length=1, max_length=2)]
    error: Error

    @field_validator("columns")
    @classmethod
    def _are_different(cls, value: list[Kl]) -> list[Kl]:
        if len(set(value)) < len(value):
            raise ValueError(f"there is {value[0]} twice")
        return value


class LawChoice(Schema):
    """Which it was."""

    by: Literal["method", "run"]
    candidates: Annotated[list[LawCandidate], Field(min_length=1, max_length=3)]
    guess: Error

    @property
    def found(self) -> Choice:
        """As what says which is best."""
        candidates = (Candidate(tuple(one.columns), one.error) for one in self.candidates)
        return Choice(self.by, tuple(candidates), self.guess)


class LawBase(Schema):
    """Whose law it is, by the digests of what it computes and of its tokenizer."""

    name: Name
    digest: Name
    tokenizer: Digest

    @field_validator("digest")
    @classmethod
    def _is_one(cls, value: str) -> str:
        if not is_digest(value):
            raise ValueError("it is no digest of a base, as this rlrazor makes it")
        return value


class LawPrior(Schema):
    """The base's scores, and the noise of a difference of two: its standard error, a fraction of 1.

    Of the largest drop that the law was fitted to, by the items of both, paired. Where it is not known what became of
    each, and in files made before rlrazor kept that, as if the two were of different items, as a rule too large; None,
    for unknown, where a task has no standard error. `asked`: how the tasks were asked, where not as they say
    (`harness.asking`).
    """

    scores: Annotated[dict[Name, Score], Field(min_length=1)]
    mean: Score
    noise: Annotated[float, Field(ge=0, le=1)] | None
    asked: dict[str, Any] = Field(default_factory=dict)

    @field_validator("asked")
    @classmethod
    def _can_be_asked(cls, value: dict[str, Any]) -> dict[str, Any]:
        try:
            Asking(**value)
        except (TypeError, RazorError) as error:
            raise ValueError(f"the prior tasks cannot be asked so: {error}") from error
        return value

    @model_validator(mode="after")
    def _is_their_mean(self) -> LawPrior:
        if abs(self.mean - sum(self.scores.values()) / len(self.scores)) > _OFF:
            raise ValueError(f"the mean is {self.mean:g}, and that of the scores is another")
        return self


class LawOwnTexts(Schema):
    """How the base writes the generic probe itself: the texts follow from it."""

    samples: int
    max_new_tokens: int
    seed: int


class LawPriorPrompts(Schema):
    """Whose the prompts of the generic probe are, where they are the prior tasks' own; see `PriorPrompts`."""

    tasks: tuple[Name, ...] = Field(strict=False)
    scored: tuple[Name, ...] = Field((), strict=False)
    max_new_tokens: int | None
    without: tuple[Name, ...] = Field((), strict=False)


class LawGeneric(Schema):
    """The generic probe: one of the three, and of prompts whether they are the prior tasks' own."""

    texts: tuple[str, ...] = Field((), strict=False)
    prompts: tuple[Any, ...] = Field((), strict=False)
    own: LawOwnTexts | None = None
    prior: LawPriorPrompts | None = None

    @property
    def found(self) -> GenericText:
        """As what is measured on. Raises RazorError for none of the three, for more of them, and for no numbers."""
        own = None if self.own is None else OwnTexts(**self.own.model_dump())
        prior = None if self.prior is None else PriorPrompts(**self.prior.model_dump())
        return GenericText(self.texts, self.prompts, own, prior)

    @model_validator(mode="after")
    def _is_one(self) -> LawGeneric:
        try:
            _ = self.found
            for number, text in enumerate(self.texts):
                check_text(text, f"texts[{number}]")
            for number, prompt in enumerate(self.prompts):
                check_prompt(prompt, f"prompts[{number}]")
        except RazorError as error:
            raise ValueError(str(error)) from error
        return self


class LawProbe(Schema):
    """How KL was measured: the settings, the generic probe, and the prompts, which are hashed and counted."""

    max_new_tokens: int
    samples: int
    stop: Annotated[list[str], Field(max_length=1000)]
    chat: bool
    precision: str | None
    turns: str = LAST
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    prompts_hash: Digest
    prompts_count: Annotated[int, Field(ge=1, le=10**9)]
    generic: LawGeneric

    @model_validator(mode="after")
    def _can_be_set(self) -> LawProbe:
        try:
            _ = self.settings
        except RazorError as error:
            raise ValueError(str(error)) from error
        return self

    @property
    def settings(self) -> ProbeSettings:
        """As what measures. Raises RazorError for settings that are none."""
        given = {one.name: getattr(self, one.name) for one in fields(ProbeSettings)}
        return ProbeSettings(**{**given, "stop": tuple(self.stop)})

    @classmethod
    def of(cls, on: MeasuredOn) -> LawProbe:
        """Of what was measured on. Raises RazorError for what could not be read again."""
        parts = {
            **on.settings.as_json(),
            "stop": list(on.settings.stop),
            "prompts_hash": on.prompts_hash,
            "prompts_count": len(on.prompts),
            "generic": {name: value for name, value in asdict(on.generic).items() if value},
        }
        return checked(cls, parts, "The probe")


class LawRow(Schema):
    """A checkpoint of the fit."""

    run: Name
    method: Name
    seed: Seed | None = None
    lr: Annotated[float, Field(ge=0)] | None = None
    step: Step | None = None
    new: float | None = None
    prior: Score | None = None
    kl_forward: Value | None = None
    kl_probe: Value | None = None
    forgetting: Drop


class LawParts(Schema):
    """All of it: the data of the fit, a row per checkpoint, and what follows from them."""

    format: Literal[2]  # raise it when another rlrazor would misread it; 2: digests of what the base computes
    base: LawBase
    prior: LawPrior
    law: LawCurve
    highest: dict[Kl, Annotated[float, Field(ge=0, le=LARGEST_KL)]]
    choice: LawChoice
    interval: LawInterval
    probe: LawProbe
    data: Annotated[list[LawRow], Field(min_length=1, max_length=200_000)]
    versions: dict[Name, Name]
    command: Text

    @property
    def forecaster(self) -> Forecaster:
        """As what forecasts, with intervals."""
        law = self.law.law
        left_out = tuple(LeftOutRun(run.run, run.law.law, tuple(run.residuals)) for run in self.interval.runs)
        highest = tuple(self.highest[name] for name in self.law.predictors)
        return Forecaster(law, left_out, highest, self.prior.mean)

    @property
    def measured(self) -> tuple[Floats, Floats, NDArray[np.str_]]:
        """Of the checkpoints of the fit: KLs (N, D) in the order of the law's, drops (N,), and the runs' names (N,)."""
        kls_ND = np.array([[getattr(row, name) for name in self.law.predictors] for row in self.data], float)
        return kls_ND, np.array([row.forgetting for row in self.data]), np.array([row.run for row in self.data])

    @model_validator(mode="after")
    def _agrees(self) -> LawParts:
        columns = tuple(self.law.predictors)
        if set(self.highest) != set(columns):
            raise ValueError(f"highest is of {_names(self.highest)}, and the law of {_names(columns)}")
        candidates = [tuple(candidate.columns) for candidate in self.choice.candidates]
        if columns not in candidates or len(set(candidates)) < len(candidates):
            raise ValueError(f"the law is of {_names(columns)}, and not one of choice.candidates is, or they repeat")
        if (best := self.choice.found.best.columns) != columns:
            raise ValueError(f"the law is of {_names(columns)}, and of choice.candidates {_names(best)} is best")
        for number, run in enumerate(self.interval.runs):
            if tuple(run.law.predictors) != columns:
                raise ValueError(
                    f"interval.runs[{number}].law is of {_names(run.law.predictors)}, and the law of {_names(columns)}"
                )
        _check_data(self, columns)
        return self


def _check_data(stored: LawParts, columns: Sequence[str]) -> None:
    """Raise ValueError where the law's parts are not of the checkpoints that it says it was fitted to."""
    counts: Counter[str] = Counter()
    seen: dict[str, tuple[str, set[int | None]]] = {}
    for number, row in enumerate(stored.data):
        method, steps = seen.setdefault(row.run, (row.method, set()))
        if row.method != method or (row.step is not None and row.step in steps):
            raise ValueError(f"data[{number}] is of another method than its run, or of a step that it has already")
        missing = [name for name in columns if getattr(row, name) is None]
        if missing:
            raise ValueError(f"data[{number}] has no {missing[0]}, which the law is of")
        steps.add(row.step)
        counts[row.run] += 1
    names = [run.run for run in stored.interval.runs]
    if len(set(names)) < len(names) or set(names) != set(counts):
        raise ValueError("the runs of interval.runs are not those of data, each once")
    for number, run in enumerate(stored.interval.runs):
        if len(run.residuals) != counts[run.run]:
            raise ValueError(
                f"interval.runs[{number}] has {len(run.residuals)} residuals, and data {counts[run.run]} checkpoints"
            )
    kls_ND, _, run_N = stored.measured
    for name, highest in zip(columns, kls_ND.max(axis=0), strict=True):
        if not np.isclose(stored.highest[name], highest, rtol=_OFF, atol=0):  # type: ignore[index]
            raise ValueError(f"highest.{name} is {stored.highest[name]:g}, which is not that of data")  # type: ignore[index]
    stored.law.check_scale(kls_ND, "the law")
    for number, run in enumerate(stored.interval.runs):
        run.law.check_scale(kls_ND[run_N != run.run], f"interval.runs[{number}].law")
    _check_fit(stored)


def _check_fit(stored: LawParts) -> None:
    """Raise ValueError where the law, or how it missed the runs that were left out, does not follow from the data."""
    weights, (kls_ND, forgetting_N, run_N) = stored.law.predictors, stored.measured
    scales = np.maximum(np.median(kls_ND, axis=0), 1e-12) if len(weights) > 1 else np.ones(1)
    if not math.isclose(float(scales @ list(weights.values())), 1, rel_tol=_OFF):  # shares of 1, in units of these
        found = _names(f"{weight:g}" for weight in weights.values())
        raise ValueError(f"law.predictors are {found}, which are not the weights that a fit to data gives")
    for number, run in enumerate(stored.interval.runs):
        if run.law.predictors != weights:
            raise ValueError(f"interval.runs[{number}].law weighs KLs otherwise than the law")
        own_N = run_N == run.run
        missed = relative_residuals(run.law.law, kls_ND[own_N], forgetting_N[own_N])
        if not np.allclose(run.residuals, missed, rtol=_OFF, atol=_OFF):
            raise ValueError(f"interval.runs[{number}].residuals are not those of its law and of data")
    law = stored.law.law
    predicted_N = law.predict(kls_ND)
    refitted = fit_law(kls_ND, forgetting_N, law.columns, law)  # from where it is: a fit stays where it is
    moved = float(np.abs(refitted.predict(kls_ND) - predicted_N).mean())
    if moved > FLOOR:
        raise ValueError(f"the law is not fitted to data: a fit to it is other by {100 * moved:.1f} points on average")


def _names(columns: Iterable[str]) -> str:
    return " and ".join(columns) or "nothing"
