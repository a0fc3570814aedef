"""law.json: what is written is what is read, and what is damaged, newer or another base's is refused."""

import json
import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from laws import PROMPTS, TRUE, changed, law_from, law_of
from rlrazor.errors import RazorError
from rlrazor.guard.law_file import FORMAT, LawFile
from rlrazor.lm.digests import base_digest
from rlrazor.lm.means import MeanKL
from tiny_models import char_tokenizer, tiny_llama


def test_a_law_survives_the_file(tmp_path: Path) -> None:
    law, path = law_of(tiny_llama()), tmp_path / "law.json"
    law.save(path)
    again = LawFile.load(path)
    assert again == law
    for kl in (0.0, 0.2, 3.0):
        assert again.forecaster.forecast({"kl_probe": kl}) == law.forecaster.forecast({"kl_probe": kl})
    # The forecast by hand, from what the file says.
    stored = json.loads(path.read_text())
    a, b, c = (stored["law"][name] for name in "abc")
    kl = 0.3 * stored["law"]["predictors"]["kl_probe"]
    expected = a * (1 - math.exp(-b * kl**c))
    assert again.forecaster.forecast({"kl_probe": 0.3}).drop == pytest.approx(expected)
    assert len(stored["data"]) == 50
    assert again.level == pytest.approx(0.9)
    assert again.at_level(0.5).level == 0.5


def test_what_it_says_of_itself(tmp_path: Path) -> None:
    law = law_of(tiny_llama(), runs=4)
    text = law.describe()
    assert "KL on the generic probe, fitted to 4 runs of base" in text
    assert "on a method left out it was wrong by" in text
    assert "Intervals are of 80%" in text
    assert "Intervals are of 50%" in law.at_level(0.5).describe()
    assert law.at_level(0.5).cautions() == []
    assert "no better than guessing" not in text
    assert law.cautions() == ["The law's 4 runs allow intervals of 80%, not of 90%."]
    assert law.useful
    useless = changed(law, choice__guess=0.0)
    assert "no better than guessing" in useless.describe()
    assert useless.at_level(0.5).cautions() == [
        "No KL forecast better than guessing the mean: do not rely on this law."
    ]
    assert not useless.useful
    # Nor is a law of what the noise of the scores could be.
    largest = max(row.forgetting for row in law.data)
    doubtful, noise = (changed(law, prior__noise=factor * largest) for factor in (0.6, 1.1))
    for one in (doubtful, noise):
        (said,) = one.at_level(0.5).cautions()
        assert f"forgot more than {100 * largest:.1f} points, which the noise of the scores" in said
    assert doubtful.useful
    assert not noise.useful
    assert changed(law, prior__noise=0.4 * largest).at_level(0.5).cautions() == []
    # Noise that is not known is not none.
    unknown = changed(law, prior__noise=None)
    (said,) = unknown.at_level(0.5).cautions()
    assert "noise of the prior scores is not known" in said
    assert f"whether the {100 * largest:.1f} points" in said
    unknown.save(tmp_path / "law.json")
    assert LawFile.load(tmp_path / "law.json") == unknown


def test_how_wrong_it_is_at_small_drops_is_computed_from_its_data(tmp_path: Path) -> None:
    """The forecasts of each run by the law without it, from the numbers in the file."""
    calibrate_small(0.002).save(tmp_path / "law.json")
    law = LawFile.load(tmp_path / "law.json")
    stored = json.loads((tmp_path / "law.json").read_text())
    errors, checkpoints = [], 0
    for run in stored["interval"]["runs"]:
        a, b, c = (run["law"][name] for name in "abc")
        rows = [row for row in stored["data"] if row["run"] == run["run"]]
        found = [(row, a * (1 - math.exp(-b * row["kl_probe"] ** c))) for row in rows]
        missed = [abs(row["forgetting"] - drop) for row, drop in found if drop <= 0.05]
        checkpoints += len(missed)
        errors += [sum(missed) / len(missed)] if missed else []
    least = law.by_range[0]
    assert (least.checkpoints, least.runs) == (checkpoints, len(errors))
    assert least.error == pytest.approx(sum(errors) / len(errors))
    assert sum(one.checkpoints for one in law.by_range) == len(law.data)
    shown = f"where it forecast 0 to 5 points for a run left out, by {100 * (least.error or 0):.1f} (guessing there: "
    assert shown in law.describe()
    assert f"; {checkpoints} checkpoints of {len(errors)} runs)" in law.describe()


def calibrate_small(noise: float) -> LawFile:
    """A law whose runs span small drops and large ones; `noise` is in the small."""
    rng = np.random.default_rng(0)
    rows = [
        {
            "run": f"run {run}",
            "method": f"m{run % 2}",
            "step": step,
            "kl_probe": kl,
            "kl_forward": 0.0,
            "forgetting": drop,
        }
        for run in range(10)
        for step, kl in enumerate([0.005, 0.01, 0.02, 0.3, 1.0])
        for drop in [float(TRUE.predict(kl)) + (noise * rng.uniform(-1, 1) if kl < 0.1 else 0.0)]
    ]
    base = tiny_llama()
    return law_from(pl.DataFrame(rows), law_of(base).choice.found, base_digest(base))


def test_a_law_that_guesses_better_at_small_drops_may_not_judge_a_small_limit() -> None:
    """It is right about what is ruined, and tells nothing about what a budget of two points is about."""
    good, bad = calibrate_small(0.002), calibrate_small(0.2)
    for limit in (None, 0.02, 0.1, 0.5):
        assert good.objection(limit=limit) is None
    assert good.cautions(limit=0.02) == []
    assert bad.useful
    assert bad.objection() is None
    said = bad.objection(limit=0.02)
    assert said is not None
    assert said.startswith("Where this law forecast 0 to 5 points, it was wrong by ")
    assert said.endswith("it cannot judge a limit of 2.0 points.")
    assert bad.cautions(limit=0.02)[0] == said
    assert bad.cautions() == []
    # Nothing was forecast between 5 and 20 points: that is said, and is no reason to refuse.
    (said,) = good.cautions(limit=0.1)
    assert "of the runs that it was not fitted to, 0 had checkpoints for which it forecast 5 to 20 points" in said
    # Errors of less than a point are the scores' own, whatever guessing comes to.
    assert calibrate_small(0.01).objection(limit=0.02) is None


def test_the_interval_is_widened_by_kls_own_error_but_on_the_calibrations_prompts() -> None:
    law = law_of(tiny_llama())
    here = {"kl_forward": MeanKL(1.0, 0.1), "kl_probe": MeanKL(0.3, 0.02)}
    plain = law.forecaster.forecast({"kl_probe": 0.3})
    wide = law.forecaster.forecast({"kl_probe": 0.3}, stderr={"kl_probe": 0.02})
    assert wide.low < plain.low
    assert wide.high > plain.high
    assert law.forecast(here, prompts=PROMPTS) == law.forecast(here, prompts=law.probe.prompts_hash) == plain
    for others in (PROMPTS[:20], PROMPTS[::-1], ""):
        assert law.forecast(here, prompts=others) == wide
    few = changed(law, probe__prompts_count=15)
    assert few.forecast(here, prompts=few.probe.prompts_hash) == wide
    single = {"kl_probe": MeanKL(0.3, math.nan)}
    assert law.forecast(single, prompts="") == law.forecaster.forecast({"kl_probe": 0.3}, stderr={"kl_probe": 0.3})
    assert law.at_level(0.5).forecast(here, prompts=PROMPTS) == law.forecaster.forecast({"kl_probe": 0.3}, 0.5)
    gentle = changed(law, interval__level=0.5)
    assert gentle.forecast(here, prompts=PROMPTS) == law.forecaster.forecast({"kl_probe": 0.3}, 0.5)


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "law.json"
    with pytest.raises(RazorError, match="There is no law in"):
        LawFile.load(path)
    law_of(tiny_llama()).save(path)
    stored = json.loads(path.read_text())
    for content, message in (
        ("{", "not JSON"),
        ("[]", "not a law of rlrazor"),
        ('{"a": 1}', "not a law of rlrazor"),
        (json.dumps({**stored, "format": FORMAT + 1}), "made by a newer version"),
        (json.dumps({name: stored[name] for name in stored if name != "law"}), "lacks law: calibrate again"),
        (json.dumps({**stored, "highest": {}}), "damaged, as highest is of nothing, and the law of kl_probe"),
        (
            json.dumps({**stored, "interval": {**stored["interval"], "runs": []}}),
            "damaged, as interval.runs .* at least 3 entries",
        ),
        (
            json.dumps(
                {
                    **stored,
                    "law": {**stored["law"], "predictors": {"weight_l2": 1.0}},
                    "highest": {"weight_l2": 1.0},
                }
            ),
            "damaged, as law.predictors.weight_l2 .* 'kl_forward' or 'kl_probe'",
        ),
        (
            json.dumps({**stored, "probe": {**stored["probe"], "unknown": 1}}),
            "damaged, as probe.unknown is not known here",
        ),
        (json.dumps({**stored, "law": {**stored["law"], "a": math.nan}}), "holds NaN"),
        (json.dumps({**stored, "highest": {"kl_probe": math.inf}}), "holds Infinity"),
        (
            json.dumps({**stored, "interval": {**stored["interval"], "level": 1.5}}),
            "damaged, as interval.level is 1.5, and should be below 1",
        ),
        (json.dumps({**stored, "interval": {**stored["interval"], "floor": 0.5}}), "damaged.*floor 0.5"),
    ):
        path.write_text(content)
        with pytest.raises(RazorError, match=message):
            LawFile.load(path)


def test_another_base_or_tokenizer_is_refused() -> None:
    law = law_of(tiny_llama())
    law.check(tiny_llama(), char_tokenizer())
    with pytest.raises(RazorError, match="tokenizer is not the one"):
        law.check(tiny_llama(), char_tokenizer("zyxwvutsrqponmlkjihgfedcba0123456789+-=: \n"))
    with pytest.raises(RazorError, match="calibrated for base, and this base is another one"):
        law.check_base(base_digest(tiny_llama(seed=1)))
    with pytest.raises(RazorError, match="logged by another version of rlrazor"):
        law.check_base("0" * 16)
