"""`law.json`: the forgetting law of one base and one set of prior tasks, written by calibration, read by a monitor.

It holds all that a forecast needs and all that it rests on: the law and its intervals, which candidates there were, the
base's digest, how the probes were measured and the generic probe itself, and the data of the fit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from rlrazor.analysis.forecast import (
    FLOOR,
    FORWARD,
    MIN_RUNS,
    PROBE,
    Choice,
    Forecast,
    Forecaster,
    KLLaw,
    RangeError,
    errors_by_range,
)
from rlrazor.analysis.law import Saturating
from rlrazor.errors import RazorError
from rlrazor.guard.law_schema import LawBase, LawParts, LawPrior, LawProbe
from rlrazor.guard.measured_on import FEW_PROMPTS
from rlrazor.lm.digests import base_digest, is_digest, is_same_base, tokenizer_digest
from rlrazor.lm.means import MeanKL
from rlrazor.lm.probes import GenericText, ProbeSettings, Prompt, content_hash
from rlrazor.system.documents import checked, parse_json, read_text
from rlrazor.system.writing import atomic_path

MEND = "calibrate again"
FORMAT = 2
NAMES = {FORWARD: "KL on the new task's prompts", PROBE: "KL on the generic probe"}
INTERVAL = "hierarchical jackknife+ over runs (arXiv:2306.06342), residuals relative to floor + forecast drop"


@dataclass(frozen=True)
class Made:
    """By what a law was made: the versions of packages, and the command."""

    versions: Mapping[str, str] = field(default_factory=dict)
    command: str = ""


UNKNOWN = Made()


class LawFile(LawParts):
    """A calibrated law: what the file holds, and what it says of KLs."""

    @classmethod
    def fitted(
        cls,
        forecaster: Forecaster,
        choice: Choice,
        *,
        base: LawBase | Mapping[str, Any],
        prior: LawPrior | Mapping[str, Any],
        probe: LawProbe,
        level: float = 0.9,
        data: Sequence[Mapping[str, Any]],
        made: Made = UNKNOWN,
    ) -> LawFile:
        """From a fit to `data`. Raises RazorError for what could not be read again, such as a law of another KL."""
        runs = [
            {"run": run.run, "law": _curve(run.law), "residuals": list(run.residuals)} for run in forecaster.left_out
        ]
        parts = {
            "format": FORMAT,
            "base": base,
            "prior": prior,
            "law": _curve(forecaster.law),
            "highest": dict(zip(forecaster.columns, forecaster.highest, strict=True)),
            "choice": {
                "by": choice.by,
                "candidates": [{"columns": list(one.columns), "error": one.error} for one in choice.candidates],
                "guess": choice.guess,
            },
            "interval": {"method": INTERVAL, "level": level, "floor": FLOOR, "runs": runs},
            "probe": probe,
            "data": [dict(row) for row in data],
            "versions": dict(made.versions),
            "command": made.command,
        }
        return checked(cls, parts, "The law of these runs")

    @property
    def settings(self) -> ProbeSettings:
        """How KL was measured."""
        return self.probe.settings

    @property
    def generic(self) -> GenericText:
        """The generic probe that it was measured on."""
        return self.probe.generic.found

    def require_own(self, name: Literal["settings", "generic"], given: Any) -> Any:
        """The law's, with the precision given where its own is open; raises RazorError where another was given."""
        own = getattr(self, name)
        if isinstance(given, ProbeSettings) and None in (given.precision, own.precision):
            own = replace(own, precision=own.precision or given.precision)
            given = replace(given, precision=own.precision)
        found = [one.content_hash if isinstance(one, GenericText) else one for one in (given, own)]
        if given is not None and found[0] != found[1]:
            raise RazorError(
                f"The law was calibrated with another `{name}` than the one given, and KLs measured in two ways cannot "
                "be compared: leave it out, and the law's is used."
            )
        return own

    @property
    def largest(self) -> float:
        """The most that a run of the fit has forgotten, a fraction of 1."""
        return max(row.forgetting for row in self.data)

    @property
    def useful(self) -> bool:
        """Whether it may judge anything: see `objection`."""
        return self.objection() is None

    def objection(self, *, limit: float | None = None) -> str | None:
        """Why this law may not judge, in a sentence, or None where it may: all that judge or recommend by it ask here.

        It may not where no KL beat guessing on what was left out, or where no run of its fit forgot more than the noise
        of the scores. Nor, of a `limit` for the drop, a fraction of 1, where its forecasts in the limit's range missed
        the runs left out by more than guessing there, and by more than a point, which is what scores are good for.
        """
        if not self.choice.found.useful:
            return "No KL forecast better than guessing the mean: do not rely on this law."
        if self.prior.noise is not None and self.largest < self.prior.noise:
            return self._could_be_noise(self.prior.noise)
        if limit is None:
            return None
        near = self._range_of(limit)
        if near.runs < MIN_RUNS or near.error is None or near.guess is None or near.error <= max(near.guess, FLOOR):
            return None
        return (
            f"Where this law forecast {range_label(near)} points, it was wrong by {100 * near.error:.1f} points on the "
            f"{near.runs} runs that it was not fitted to, and guessing there by {100 * near.guess:.1f}: it cannot "
            f"judge a limit of {100 * limit:.1f} points."
        )

    @property
    def by_range(self) -> list[RangeError]:
        """How wrong it was on each run left out of it, by what it forecast there (`forecast.errors_by_range`)."""
        kls_ND, forgetting_N, run_N = self.measured
        left_out = [(run.law, run_N == run.run) for run in self.forecaster.left_out]
        forecasts = [law.predict(kls_ND[own_N]) for law, own_N in left_out]
        return errors_by_range(forecasts, [forgetting_N[own_N] for _, own_N in left_out])

    def _range_of(self, limit: float) -> RangeError:
        return next(one for one in self.by_range if limit <= one.high)

    def at_level(self, level: float | None) -> LawFile:
        """The same with intervals of another level, a fraction of 1; None: its own."""
        if level is None:
            return self
        return self.model_copy(update={"interval": self.interval.model_copy(update={"level": level})})

    @property
    def level(self) -> float:
        """Of its intervals: what is asked for, or what its runs allow."""
        return self.forecaster.attainable(self.interval.level)

    def forecast(
        self, kls: Mapping[str, MeanKL], *, prompts: Sequence[Prompt] | str, measured: int | None = None
    ) -> Forecast:
        """The forecast at these KLs, the interval widened by their standard errors.

        Not widened on the very `prompts` of the calibration (they, or their `content_hash`; "" where only some of
        them were measured): the law's residuals have that error in them. But always where fewer than FEW_PROMPTS were
        `measured`, by default all of them, as some may not have fitted into the context. With a single prompt there is
        no standard error, and KL could be anything up to twice what was seen.
        """
        means = {name: one.mean for name, one in kls.items()}
        return self.forecaster.forecast(means, self.interval.level, self._errors(kls, prompts, measured))

    def remaining(
        self,
        kls: Mapping[str, MeanKL],
        budget: float,
        *,
        prompts: Sequence[Prompt] | str,
        measured: int | None = None,
        cautious: bool = False,
    ) -> dict[str, float]:
        """How many nats each KL may still grow until `forecast`, with `cautious` its upper end, reaches the budget.

        No further than the law was fitted to.
        """
        means = {name: one.mean for name, one in kls.items()}
        errors = self._errors(kls, prompts, measured)
        return self.forecaster.remaining(means, budget, cautious=cautious, level=self.interval.level, stderr=errors)

    def _errors(
        self, kls: Mapping[str, MeanKL], prompts: Sequence[Prompt] | str, measured: int | None
    ) -> dict[str, float]:
        found = prompts if isinstance(prompts, str) else content_hash(list(prompts))
        count = self.probe.prompts_count if measured is None else min(measured, self.probe.prompts_count)
        if found == self.probe.prompts_hash and count >= FEW_PROMPTS:
            return {}
        return {name: one.stderr if math.isfinite(one.stderr) else one.mean for name, one in kls.items()}

    @property
    def has_its_level(self) -> bool:
        """Whether its runs allow intervals of the level that is asked for."""
        return self.level >= self.interval.level

    def cautions(self, *, limit: float | None = None) -> list[str]:
        """Sentences on what a user of its forecasts has to know, its objection first; of a `limit`, also near that."""
        objection = self.objection(limit=limit)
        said = [] if objection is None else [objection]
        if self.prior.noise is None:
            said.append(
                "The noise of the prior scores is not known, as a task among them has no standard error: whether the "
                f"{100 * self.largest:.1f} points that a run of the calibration forgot at most are more than it was "
                "not tested."
            )
        elif self.largest < 2 * self.prior.noise and (noise := self._could_be_noise(self.prior.noise)) != objection:
            said.append(noise)
        if limit is not None and (near := self._range_of(limit)).runs < MIN_RUNS:
            said.append(
                f"How well this law does near a limit of {100 * limit:.1f} points was hardly tested: of the runs that "
                f"it was not fitted to, {near.runs} had checkpoints for which it forecast {range_label(near)} points."
            )
        if not self.has_its_level:
            said.append(
                f"The law's {len(self.interval.runs)} runs allow intervals of {self.level:.0%}, not of "
                f"{self.interval.level:.0%}."
            )
        return said

    def _could_be_noise(self, noise: float) -> str:
        return (
            f"No run of the calibration forgot more than {100 * self.largest:.1f} points, which the noise of the "
            f"scores ({100 * noise:.1f}) could be: before relying on this law raise the learning rates or the "
            "updates, or measure more items."
        )

    def describe(self) -> str:
        """One sentence: what the law is of, how many runs it rests on, and how well it forecasts, small drops too."""
        asked = " (the prior tasks' own prompts)" if self.generic.prior else ""
        of = " and ".join(NAMES[name] + asked * (name == PROBE) for name in self.forecaster.columns)
        runs, error = len(self.interval.runs), 100 * self.choice.found.best.error
        noise = "" if self.useful else ", fitted to what noise could be"
        verdict = noise if self.choice.found.useful else ", no better than guessing"
        least = self.by_range[0]
        if least.error is None:
            small = ""
        else:
            small = f"; where it forecast {range_label(least)} points for a run left out, by {100 * least.error:.1f}"
            guess = "" if least.guess is None else f"guessing there: {100 * least.guess:.1f}; "
            small += f" ({guess}{_counted(least)})"
        return (
            f"A law of {of}, fitted to {runs} runs of {self.base.name}; on a {self.choice.by} left out it was wrong by "
            f"{error:.1f} points (guessing the mean: {100 * self.choice.guess:.1f}){verdict}{small}. Intervals are of "
            f"{self.level:.0%}."
        )

    def check(self, base: Any, tokenizer: Any, digest: str | None = None) -> None:
        """Raise RazorError for another base than the law's, or the same in another precision or with another tokenizer.

        Of a PEFT model the base is what is left without its adapter. `digest`: of the base in the law's precision,
        where it is known.
        """
        self.check_base(digest or base_digest(base, self.settings.precision))
        if tokenizer_digest(tokenizer) != self.base.tokenizer:
            raise RazorError(
                "The tokenizer is not the one that the law was calibrated with: it has other token ids, another chat "
                "template or another eos. Use the base's own, or calibrate again."
            )

    def check_base(self, digest: str) -> None:
        """The same by the base's digest alone."""
        if not is_digest(digest):
            raise RazorError(
                "KL was logged by another version of rlrazor, which told bases apart in another way: measure the "
                "checkpoints anew, with a base, prompts and the law."
            )
        if not is_same_base(digest, self.base.digest):
            raise RazorError(
                f"This law was calibrated for {self.base.name}, and this base is another one: it has other "
                "weights, or computes otherwise with them, and a law belongs to its base. Run `razor calibrate` on "
                "this base, or leave the law out."
            )

    def is_same(self, other: LawFile) -> bool:
        """Whether it is that law, whatever command and versions made the two."""
        made = {"command", "versions"}
        return self.model_dump(exclude=made) == other.model_dump(exclude=made)

    def save(self, path: Path) -> None:
        """Write it, whole or not at all; raises RazorError where there is a file that is no law, or none can be."""
        with atomic_path(path, "json") as partial:
            partial.write_text(json.dumps(self.as_json(), indent=1, allow_nan=False) + "\n", encoding="utf-8")

    def as_json(self) -> dict[str, Any]:
        """What the file holds."""
        return self.model_dump(mode="json", exclude_unset=True)

    @classmethod
    def load(cls, path: Path | str) -> LawFile:
        """Read one. Raises RazorError where it is missing, of another format, or holds what no calibration writes."""
        path = Path(path)
        where = f"The law in {path}"
        text = read_text(path, mend=MEND, missing=f"There is no law in {path}. `razor calibrate` makes one.")
        stored = parse_json(text, where, mend=MEND)
        found = stored.get("format") if isinstance(stored, dict) else None
        if isinstance(found, bool) or not isinstance(found, int) or found < 1:
            raise RazorError(f"{path} is not a law of rlrazor: it has no format number.")
        if found > FORMAT:
            raise RazorError(
                f"The law in {path} has format {found}, and this rlrazor knows up to {FORMAT}: it was made by a newer "
                "version. Update rlrazor, or calibrate again."
            )
        if found < FORMAT:
            raise RazorError(
                f"The law in {path} has format {found}, of an rlrazor that told bases apart in another way: calibrate "
                "again."
            )
        return checked(cls, stored, where, mend=MEND)


def range_label(one: RangeError) -> str:
    """A range of forecast drops in points: `0 to 5`, `5 to 20`, `over 20`."""
    low, high = 100 * one.low, 100 * one.high
    return f"{low:.0f} to {high:.0f}" if math.isfinite(high) else f"over {low:.0f}"


def _counted(one: RangeError) -> str:
    """`12 checkpoints of 3 runs`."""
    checkpoints, runs = one.checkpoints, one.runs
    return f"{checkpoints} checkpoint{'s' * (checkpoints != 1)} of {runs} run{'s' * (runs != 1)}"


def _curve(law: KLLaw) -> dict[str, Any]:
    assert isinstance(law.law, Saturating)
    return {"predictors": dict(zip(law.columns, law.weights, strict=True)), **asdict(law.law)}
