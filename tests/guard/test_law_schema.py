"""A law.json in which anything was changed: it is refused in a sentence, or forecasts what a law can."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from documents import changes, is_a_sentence
from laws import made_up
from rlrazor.analysis import forecast
from rlrazor.analysis.law import Saturating
from rlrazor.errors import RazorError
from rlrazor.guard.law_file import LawFile, Made
from rlrazor.guard.law_schema import LawBase, LawPrior, LawProbe
from rlrazor.guard.measured_on import MeasuredOn
from rlrazor.lm.probes import GenericText, ProbeSettings

DIGEST = "float32 1.0e+00 2.0e+00 -1.0000 -2.0000"


def fitted(table: pl.DataFrame, columns: tuple[str, ...] = ("kl_probe",), base_score: float = 0.9) -> LawFile:
    """A law of this table, as calibration makes it."""
    rows = table.rename({"run": "trajectory"})
    candidate = forecast.Candidate(columns, 0.01)
    scores = {"one": base_score + 0.05, "two": base_score - 0.05}
    settings = ProbeSettings(6, stop=("\n",), precision="float32")
    return LawFile.fitted(
        forecast.fit_forecaster(rows, columns, base_score),
        forecast.Choice("method", (candidate,), 0.2),
        base=LawBase(name="a base", digest=DIGEST, tokenizer="0123456789abcdef"),
        prior=LawPrior(scores=scores, mean=base_score, noise=0.01),
        probe=LawProbe.of(MeasuredOn(["a prompt"] * 24, GenericText(("Text that has to stay.",)), settings)),
        data=table.to_dicts(),
        made=Made({"rlrazor": "0"}, "razor calibrate"),
    )


@pytest.fixture(scope="module")
def stored() -> dict[str, Any]:
    return fitted(made_up(3).filter(pl.col("step") <= 3)).as_json()


def refusal(text: str, path: Path) -> RazorError | None:
    """What is said of a law.json of this text; None for a law that forecasts what one can."""
    path.write_text(text, encoding="utf-8")
    try:
        law = LawFile.load(path)
    except RazorError as error:
        return error
    kls_N = [0.0, 1e-9, 0.01, 0.3, 1.0, 7.0, 1e3, 1e6]
    found = [law.forecaster.forecast(dict.fromkeys(law.forecaster.columns, kl), law.interval.level) for kl in kls_N]
    values = np.array([[one.drop, one.low, one.high] for one in found])
    assert np.isfinite(values).all()
    assert np.abs(values).max() <= 1
    assert (np.diff(values[:, 0]) >= 0).all()
    assert (np.diff(values[:, 2]) >= 0).all()
    assert (values[:, 1] <= values[:, 0]).all()
    assert (values[:, 0] <= values[:, 2]).all()
    assert 0 <= law.choice.found.best.error <= 2
    assert law.prior.noise is None or law.prior.noise >= 0
    return None


def test_the_law_itself_is_taken(stored: dict[str, Any], tmp_path: Path) -> None:
    assert refusal(json.dumps(stored), tmp_path / "law.json") is None


@pytest.mark.parametrize("part", ["base", "prior", "law", "highest", "choice", "interval", "probe", "data", "versions"])
def test_any_change_is_refused_or_leaves_a_law(part: str, stored: dict[str, Any], tmp_path: Path) -> None:
    file, tried = tmp_path / "law.json", 0
    said: list[RazorError] = []
    for _, changed in changes({part: stored[part]}):
        tried += 1
        rest = {name: value for name, value in stored.items() if name != part}
        if (error := refusal(json.dumps({**rest, **changed}), file)) is not None:
            said.append(error)
    assert len(said) > tried / 3
    for error in said:
        is_a_sentence(error)
        assert str(error).endswith("alibrate again.")


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        (("law", "a"), 50, "law.a is 50, and should be at most 1"),
        (("law", "a"), -0.5, "law.a is -0.5, and should be at least"),
        (("law", "b"), 0, "law.b is 0, and should be above 0"),
        (("law", "b"), 1e200, r"the law has b = 1e\+200, to which its data cannot have led"),
        (("law", "c"), 0, "law.c is 0, and should be at least"),
        (("law", "c"), 900, "law.c is 900, and should be at most 5"),
        (("law", "predictors"), {"kl_probe": 0}, "all of its weights are 0"),
        (("law", "predictors", "kl_probe"), -1, "should be at least 0"),
        (
            ("interval", "runs", 0, "law", "predictors"),
            {"kl_forward": 1.0},
            "is of kl_forward, and the law of kl_probe",
        ),
        (("interval", "runs", 0, "law", "a"), 50, r"interval.runs\[0\].law.a is 50, and should be at most 1"),
        (("interval", "runs", 0, "residuals", 0), -1, "should be at least 0"),
        (("interval", "runs", 0, "residuals"), [0.1], "has 1 residuals, and data 3 checkpoints"),
        (("interval", "runs", 0, "run"), "run 1", "not those of data, each once"),
        (("interval", "level"), "0.9", 'interval.level is "0.9", and should be a number'),
        (("interval", "level"), 1, "should be below 1"),
        (("prior", "noise"), -0.1, "should be at least 0"),
        (("prior", "asked"), {"shots": 2}, r"prior.asked the prior tasks cannot be asked so: .*shots"),
        (("prior", "asked"), {"fewshot": -1}, "cannot be asked so: fewshot is how many examples"),
        (("prior", "asked"), {"fewshot": "two"}, "cannot be asked so"),
        (("prior", "asked"), {"chat_template": True, "chat_template_kwargs": 3}, "cannot be asked so"),
        (("prior", "mean"), 0.7, "the mean is 0.7, and that of the scores is another"),
        (("prior", "scores", "one"), 95, "should be at most 1"),
        (("highest", "kl_probe"), -1, "should be at least 0"),
        (("highest", "kl_probe"), 2.0, "highest.kl_probe is 2, which is not that of data"),
        (("choice", "by"), "seed", "should be 'method' or 'run'"),
        (("choice", "candidates", 0, "columns"), ["kl_forward"], "not one of choice.candidates is"),
        (("choice", "candidates", 0, "columns"), ["kl_probe", "kl_probe"], "kl_probe twice"),
        (("data", 0, "method"), "another", r"data\[1\] is of another method than its run"),
        (("data", 0, "step"), 2, r"data\[1\] is of .* a step that it has already"),
        (("prior", "scores"), {}, "should have at least 1"),
        (("choice", "candidates", 0, "error"), -0.1, "should be at least 0"),
        (("probe", "samples"), 10**9, "samples must be at most 10,000, not 1,000,000,000"),
        (("probe", "max_new_tokens"), 0, "must be at least 1"),
        (("probe", "stop"), [""], "stop string is empty"),
        (("probe", "precision"), "int4", "precision is one of"),
        (("probe", "prompts_count"), 0, "should be at least 1"),
        (("probe", "generic"), {"texts": ["a"], "prompts": ["b"]}, "not both"),
        (("base", "digest"), "0" * 16, "no digest of a base"),
        (("data", 0, "forgetting"), 40, "should be at most 1"),
        (("data", 0, "kl_probe"), None, r"data\[0\] has no kl_probe"),
        (("format",), True, "no format number"),
        (("format",), -1, "no format number"),
        (("format",), 2.0, "no format number"),
        (("extra",), 1, "extra is not known here"),
    ],
)
def test_what_is_wrong_is_said(
    path: tuple[str | int, ...], value: Any, sentence: str, stored: dict[str, Any], tmp_path: Path
) -> None:
    changed = copy.deepcopy(stored)
    holder: Any = changed
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    (tmp_path / "law.json").write_text(json.dumps(changed))
    with pytest.raises(RazorError, match=sentence):
        LawFile.load(tmp_path / "law.json")


@pytest.mark.parametrize("columns", [("kl_probe",), ("kl_forward",), ("kl_forward", "kl_probe")])
@pytest.mark.parametrize("truth", [(1.0, 1e9, 5.0), (1.0, 1e-9, 0.2), (1e-5, 1.0, 0.2), (0.3, 30.0, 1.0)])
@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e4])
def test_what_calibration_writes_is_taken(
    columns: tuple[str, ...], truth: tuple[float, float, float], scale: float, tmp_path: Path
) -> None:
    """Fits that end at their bounds too: steps, constants, next to nothing, and noise."""
    table = made_up(4).with_columns(pl.col("kl_probe", "kl_forward") * scale)
    drops = Saturating(*truth).predict(table[columns[0]].to_numpy() / scale)
    noisy = np.clip(drops + np.random.default_rng(0).normal(0, 0.01, len(table)), -1, 1)
    law = fitted(table.with_columns(forgetting=pl.Series(noisy)), columns, 0.95)
    law.save(tmp_path / "law.json")
    assert LawFile.load(tmp_path / "law.json") == law


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "it is not JSON"),
        (b"\xef\xbb\xbf", "it is not JSON"),
        (b"\x80\x04\x95", "it is not text in UTF-8"),
        (b"[" * 10_000, "nested too deeply"),
        (b'{"format": 2, "a": ' + b"[" * 500 + b"]" * 500 + b"}", "nested too deeply"),
        (b'{"format": 2, "a": 1e400}', "a number that is too large"),
        (b'{"format": ' + b"9" * 5000 + b"}", "a number that is too large"),
        (b'{"format": 2, "format": 1}', 'has the key "format" twice'),
        (b'{"format": NaN}', "holds NaN"),
        (b'{"format": 2, "a": "\\ud800"}', "not valid Unicode"),
        (b'"format"', "not a law of rlrazor"),
        (b"2", "not a law of rlrazor"),
    ],
)
def test_what_is_no_document_is_refused_in_a_sentence(content: bytes, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "law.json").write_bytes(content)
    with pytest.raises(RazorError, match=sentence) as raised:
        LawFile.load(tmp_path / "law.json")
    assert len(str(raised.value)) < 400


def test_a_mark_of_byte_order_does_not_matter(stored: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "law.json").write_text("\ufeff" + json.dumps(stored), encoding="utf-8")
    assert LawFile.load(tmp_path / "law.json").base.name == "a base"


@pytest.mark.parametrize(
    ("place", "value", "sentence"),
    [
        (("law", "a"), 0.3, "the law is not fitted to data"),
        (("law", "b"), 9.0, "the law is not fitted to data"),
        (("law", "predictors", "kl_probe"), 2.0, "not the weights"),
        (("interval", "runs", 1, "law", "a"), 0.4, r"interval.runs\[1\].residuals are not those"),
        (("interval", "runs", 0, "law", "predictors", "kl_probe"), 0.5, "weighs KLs otherwise"),
        (("interval", "runs", 0, "residuals", 0), 0.0, r"interval.runs\[0\].residuals are not those"),
        (("data", 0, "forgetting"), 0.4, "residuals are not those"),
    ],
)
def test_a_law_follows_from_its_data(
    place: tuple[Any, ...], value: float, sentence: str, stored: dict[str, Any], tmp_path: Path
) -> None:
    """Numbers that are within their bounds and not those of the fit are wrong forecasts, or intervals of width 0."""
    changed = copy.deepcopy(stored)
    holder: Any = changed
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    error = refusal(json.dumps(changed), tmp_path / "law.json")
    assert error is not None
    is_a_sentence(error)
    assert re.search(sentence, str(error))


def test_laws_that_were_fitted_are_taken(tmp_path: Path) -> None:
    """Of KLs over five orders of magnitude, of one and of both, whatever forgetting looks like."""
    rng = np.random.default_rng(0)
    for trial in range(12):
        rows = []
        for run in range(4):
            for step in range(4):
                forward, probe = 10 ** rng.uniform(-3, 2), 10 ** rng.uniform(-3, 1)
                drop = (0.5 - 0.5 * np.exp(-probe), 0.3 * forward / (1 + forward), rng.uniform(-0.1, 0.6))[trial % 3]
                row = {"run": f"{run}", "method": "m", "step": step, "kl_forward": forward, "kl_probe": probe}
                rows.append({**row, "forgetting": float(drop)})
        for columns in (("kl_forward",), ("kl_probe",), ("kl_forward", "kl_probe")):
            law = fitted(pl.DataFrame(rows), columns)
            law.save(tmp_path / "law.json")
            assert LawFile.load(tmp_path / "law.json").forecaster == law.forecaster
