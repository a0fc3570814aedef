"""A law for the tests: fitted to made-up runs, of any base."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from rlrazor.analysis import forecast
from rlrazor.analysis.law import Saturating
from rlrazor.guard.law_file import LawFile, Made
from rlrazor.guard.law_schema import LawBase, LawPrior, LawProbe
from rlrazor.guard.measured_on import MeasuredOn
from rlrazor.lm.digests import base_digest, tokenizer_digest
from rlrazor.lm.probes import GenericText, ProbeSettings
from tiny_models import char_tokenizer

TRUE = Saturating(0.6, 2.0, 1.0)
SETTINGS = ProbeSettings(max_new_tokens=6, chat=False)
GENERIC = GenericText(texts=tuple(f"{word} is text that has to stay" for word in "abcdefghijklmnopqrstuvwx"))
PROMPTS = [f"{letter}{number}:" for letter in "abcdef" for number in range(4)]


def made_up(runs: int = 10, *, noise: float = 0.05, scale: float = 1.0) -> pl.DataFrame:
    """Runs of two methods whose forgetting follows the KL on the probe."""
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for run in range(runs):
        factor = 1 + noise * rng.normal()
        for step in range(1, 6):
            probe = scale * step / 5 * rng.uniform(0.5, 1)
            drop = factor * float(TRUE.predict(probe))
            row = {"run": f"run {run}", "method": f"m{run % 2}", "step": step, "kl_forward": rng.uniform(0, 5)}
            rows.append({**row, "kl_probe": probe, "forgetting": drop})
    return pl.DataFrame(rows)


def law_of(base: Any, *, runs: int = 10, scale: float = 1.0) -> LawFile:
    """A law of this base, of the KL on the probe."""
    choice = forecast.choose(made_up(runs).rename({"run": "trajectory"}))  # where the law bends, whatever the scale
    return law_from(made_up(runs, scale=scale), choice, base_digest(base))


def law_from(table: pl.DataFrame, choice: forecast.Choice, digest: str) -> LawFile:
    """A law of the KL on the probe, fitted to this table."""
    return LawFile.fitted(
        forecast.fit_forecaster(table.rename({"run": "trajectory"}), ("kl_probe",), 0.9),
        choice,
        base=LawBase(name="base", digest=digest, tokenizer=tokenizer_digest(char_tokenizer())),
        prior=LawPrior(scores={"arithmetic": 0.9}, mean=0.9, noise=0.0),
        probe=LawProbe.of(MeasuredOn(PROMPTS, GENERIC, replace(SETTINGS, precision="float32"))),
        data=table.to_dicts(),
        made=Made({"rlrazor": "0"}, "razor calibrate"),
    )


def saved_with_generic(law: LawFile, path: Path, generic: Mapping[str, Any]) -> None:
    """Write the law's file, with this in the place of its generic probe, which is not checked."""
    law.save(path)
    stored = json.loads(path.read_text())
    stored["probe"]["generic"] = generic
    path.write_text(json.dumps(stored))


def changed(law: LawFile, **parts: Any) -> LawFile:
    """The same with other parts, which are not checked: `choice__guess=0.0` is that of `choice`."""
    own: dict[str, Any] = {}
    for name, value in parts.items():
        part, _, inner = name.partition("__")
        own[part] = own.get(part, getattr(law, part)).model_copy(update={inner: value}) if inner else value
    return law.model_copy(update=own)
