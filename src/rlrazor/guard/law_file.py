"""`law.json`: the forgetting law of one base and one set of prior tasks, written by calibration, read by a monitor.

It holds all that a forecast needs and all that it rests on: the law and its intervals, which candidates there were, the
base's digest, how the probes were measured and the generic probe itself, and the data of the fit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rlrazor.errors import RazorError
from rlrazor.forecast import FLOOR, Candidate, Choice, Forecaster, KLLaw, LeftOutRun
from rlrazor.law import Saturating
from rlrazor.lm.models import base_digest, tokenizer_digest
from rlrazor.lm.probes import GenericText, ProbeSettings
from rlrazor.store import atomic_path

FORMAT = 1  # of the file: raise it when an older rlrazor would misread it
INTERVAL = "hierarchical jackknife+ over runs (arXiv:2306.06342), residuals relative to floor + forecast drop"


@dataclass(frozen=True)
class LawFile:
    """A calibrated law. `prior` are the base's scores; `prompts` hashes those that KL was measured on, and counts them.

    `data`: a row per checkpoint of the fit, with `run`, `method`, `step`, the KLs and `forgetting`.
    """

    base_name: str
    base_digest: str
    tokenizer_digest: str
    prior: Mapping[str, float]
    forecaster: Forecaster
    choice: Choice
    settings: ProbeSettings
    generic: GenericText
    prompts_hash: str
    prompts_count: int
    level: float = 0.9
    data: Sequence[Mapping[str, Any]] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    command: str = ""

    @property
    def attainable(self) -> float:
        """The level of its intervals."""
        return self.forecaster.attainable(self.level)

    def describe(self) -> str:
        """One sentence: what the law is of, how many runs it rests on, and how well it forecasts."""
        names = {"kl_forward": "KL on the new task's prompts", "kl_probe": "KL on the generic probe"}
        of = " and ".join(names.get(name, name) for name in self.forecaster.columns)
        runs, error = len(self.forecaster.left_out), 100 * self.choice.best.error
        verdict = "" if self.choice.useful else ", no better than guessing: do not rely on it"
        return (
            f"A law of {of}, fitted to {runs} runs of {self.base_name}; on a {self.choice.by} left out it was wrong by "
            f"{error:.1f} points (guessing the mean: {100 * self.choice.guess:.1f}){verdict}. Intervals are of "
            f"{self.attainable:.0%}."
        )

    def check(self, base: Any, tokenizer: Any) -> None:
        """Raise RazorError for another base than the law's, or the same with another tokenizer."""
        self.check_base(base_digest(base))
        if tokenizer_digest(tokenizer) != self.tokenizer_digest:
            raise RazorError(
                "The tokenizer is not the one that the law was calibrated with: token ids mean something else. Use the "
                "base's own, or calibrate again."
            )

    def check_base(self, digest: str) -> None:
        """The same by the base's digest alone."""
        if digest != self.base_digest:
            raise RazorError(
                f"This law was calibrated for {self.base_name} ({self.base_digest}), and this base is another one "
                f"({digest}): a law belongs to its base. Run `razor calibrate` on this base, or leave the law out."
            )

    def save(self, path: Path) -> None:
        """Write it, whole or not at all."""
        with atomic_path(path) as partial:
            partial.write_text(json.dumps(self.as_json(), indent=1, allow_nan=False) + "\n", encoding="utf-8")

    def as_json(self) -> dict[str, Any]:
        """What the file holds."""
        forecaster = self.forecaster
        return {
            "format": FORMAT,
            "base": {"name": self.base_name, "digest": self.base_digest, "tokenizer": self.tokenizer_digest},
            "prior": {"scores": dict(self.prior), "mean": forecaster.base_score},
            "law": _law_as_json(forecaster.law),
            "highest": dict(zip(forecaster.columns, forecaster.highest, strict=True)),
            "choice": {
                "by": self.choice.by,
                "candidates": [asdict(candidate) for candidate in self.choice.candidates],
                "guess": self.choice.guess,
            },
            "interval": {
                "method": INTERVAL,
                "level": self.level,
                "floor": FLOOR,
                "runs": [
                    {"run": run.run, "law": _law_as_json(run.law), "residuals": list(run.residuals)}
                    for run in forecaster.left_out
                ],
            },
            "probe": {
                **asdict(self.settings),
                "prompts_hash": self.prompts_hash,
                "prompts_count": self.prompts_count,
                "generic": {name: list(value) for name, value in asdict(self.generic).items() if value},
            },
            "data": [dict(row) for row in self.data],
            "versions": dict(self.versions),
            "command": self.command,
        }

    @classmethod
    def load(cls, path: Path | str) -> LawFile:
        """Read one. Raises RazorError where it is missing, damaged, or of a newer format than this rlrazor knows."""
        path = Path(path)
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise RazorError(f"There is no law in {path}. `razor calibrate` makes one.") from error
        except ValueError as error:
            raise RazorError(f"The law in {path} is damaged: it is not JSON. Calibrate again.") from error
        found = stored.get("format") if isinstance(stored, dict) else None
        if not isinstance(found, int):
            raise RazorError(f"{path} is not a law of rlrazor: it has no format number.")
        if found > FORMAT:
            raise RazorError(
                f"The law in {path} has format {found}, and this rlrazor knows up to {FORMAT}: it was made by a newer "
                "version. Update rlrazor, or calibrate again."
            )
        try:
            return cls._from_json(stored)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RazorError(f"The law in {path} is damaged ({error!r}). Calibrate again.") from error

    @classmethod
    def _from_json(cls, stored: Mapping[str, Any]) -> LawFile:
        law, interval, probe = _law_from_json(stored["law"]), stored["interval"], dict(stored["probe"])
        forecaster = Forecaster(
            law,
            tuple(
                LeftOutRun(run["run"], _law_from_json(run["law"]), tuple(map(float, run["residuals"])))
                for run in interval["runs"]
            ),
            tuple(float(stored["highest"][name]) for name in law.columns),
            float(stored["prior"]["mean"]),
        )
        choice = stored["choice"]
        candidates = tuple(Candidate(tuple(one["columns"]), float(one["error"])) for one in choice["candidates"])
        generic = probe.pop("generic")
        prompts_hash, prompts_count = probe.pop("prompts_hash"), int(probe.pop("prompts_count"))
        return cls(
            stored["base"]["name"],
            stored["base"]["digest"],
            stored["base"]["tokenizer"],
            dict(stored["prior"]["scores"]),
            forecaster,
            Choice(choice["by"], candidates, float(choice["guess"])),
            ProbeSettings(**{**probe, "stop": tuple(probe["stop"])}),
            GenericText(tuple(generic.get("texts", ())), tuple(generic.get("prompts", ()))),
            prompts_hash,
            prompts_count,
            float(interval["level"]),
            tuple(stored["data"]),
            dict(stored["versions"]),
            str(stored["command"]),
        )


def _law_as_json(law: KLLaw) -> dict[str, Any]:
    assert isinstance(law.law, Saturating)
    return {"predictors": dict(zip(law.columns, law.weights, strict=True)), **asdict(law.law)}


def _law_from_json(stored: Mapping[str, Any]) -> KLLaw:
    predictors = {str(name): float(weight) for name, weight in stored["predictors"].items()}
    curve = Saturating(float(stored["a"]), float(stored["b"]), float(stored["c"]))
    return KLLaw(tuple(predictors), tuple(predictors.values()), curve)
