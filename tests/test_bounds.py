"""Settings that would hang, exhaust memory or overflow are refused before anything is counted out."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlrazor import bounds
from rlrazor.cli import build_parser, main
from rlrazor.errors import RazorError
from rlrazor.experiments.language import config as language
from rlrazor.experiments.parity_mnist import config as parity
from rlrazor.guard import ForgettingMonitor
from rlrazor.guard.pick import pick
from rlrazor.guard.verdict import Limits
from rlrazor.lm.probes import ProbeSettings
from rlrazor.runs.settings import kinds_of, read_settings
from rlrazor.studies import theory

HUGE = ("1e30", "1e300", str(10**11), "9" * 5000, "-1", "nan", "inf", "-inf", "1e400", "", "0x10", "true", "1_0e9")


@pytest.mark.parametrize("experiment", [parity, language])
def test_no_setting_of_a_grid_hangs(experiment: Any) -> None:
    preset = {parity: "quick", language: "tiny"}[experiment]
    begun = time.monotonic()
    for name, (_, kind) in kinds_of(experiment.Config).items():
        if kind is str:
            continue
        for text in HUGE:
            try:
                config = experiment.resolve(preset, {name: experiment.parse_setting(name, text)})
            except RazorError as error:
                said = str(error)
                assert "\n" not in said
                assert len(said) < 300
                continue
            assert text in ("1e30", "1e300", str(10**11), "1_0e9") or (name, text) == ("fewshot", "-1")  # as tasks say
            found = getattr(config, name)
            assert max(found if isinstance(found, tuple) else (found,)) <= 3.4e38
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize(
    ("experiment", "settings", "sentence"),
    [
        (parity, {"seeds": str(10**30)}, "seeds must be at most 4,294,967,295, not a number of 31 digits"),
        (parity, {"group_size": str(10**11)}, "group_size must be at most 1,000,000, not 100,000,000,000"),
        (parity, {"group_size": str(10**6), "batch_size": str(10**5)}, "come to 100,000,000,000 samples a step"),
        (parity, {"checkpoints_per_epoch": str(10**9)}, "checkpoints_per_epoch must be at most 10,000"),
        (parity, {"epochs": str(10**6), "checkpoints_per_epoch": "100"}, "100,000,000 checkpoints of a run"),
        (parity, {"lrs": "1e-5:1e-3:1000000000"}, "COUNT from 2 to 1,000"),
        (parity, {"lrs": ",".join(map(str, range(1, 1500)))}, "lrs has 1,499 values, and 1,000 are the most"),
        (
            parity,
            {"lrs": ",".join(map(str, range(1, 900))), "seeds": ",".join(map(str, range(500)))},
            "runs, and 100,000 are the most",
        ),
        (parity, {"kl_coef": "nan"}, "kl_coef must be at least 0"),
        (language, {"kl_coef": "nan"}, "kl_coef must be at least 0, not nan"),
        (language, {"kl_coef": "inf"}, "kl_coef must be at most 1,000,000, not inf"),
        (language, {"max_steps": str(10**18)}, "max_steps must be at most 1,000,000,000"),
        (language, {"max_new_tokens": str(10**9)}, "max_new_tokens must be at most 1,000,000"),
        (language, {"prior_limit": str(10**18)}, "prior_limit must be at most"),
        (language, {"kl_samples": str(10**9)}, "kl_samples must be at most 10,000"),
        (language, {"test_prompts": str(10**9), "kl_samples": "64"}, "64,000,000,000 measured completions"),
        (language, {"thresholds": "1.5"}, "thresholds must be a fraction of 1, at most 1, not 1.5"),
        (language, {"lrs": "1e39"}, "lrs must be at most 3.4e\\+38"),
        (language, {"group_size": "1000000", "rl_prompts": "1000"}, "samples a step"),
    ],
)
def test_what_is_too_much_is_said(experiment: Any, settings: dict[str, str], sentence: str) -> None:
    preset = {parity: "quick", language: "tiny"}[experiment]
    with pytest.raises(RazorError, match=sentence):
        experiment.resolve(preset, {name: experiment.parse_setting(name, value) for name, value in settings.items()})


def test_every_numeric_setting_has_bounds() -> None:
    for kinds in map(kinds_of, (parity.Config, language.Config)):
        assert {name for name, (_, kind) in kinds.items() if kind is not str} <= set(bounds.BOUNDS)


def test_every_preset_is_within_its_bounds() -> None:
    for config in parity.PRESETS.values():
        assert replace(config) == config
    for tiny_or_paper in language.PRESETS.values():
        assert replace(tiny_or_paper) == tiny_or_paper


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["reproduce", "parity-mnist", "--jobs", "1000000000"], "--jobs must be at most 1,024, not 1,000,000,000."),
        (["compare", "a", "b", "--prompts", "c", "--samples", "1000000000"], "--samples must be at most 10,000"),
        (["compare", "a", "b", "--prompts", "c", "--samples", "0"], "--samples must be at least 1, not 0."),
        (
            ["compare", "a", "b", "--prompts", "c", "--level", "nan"],
            "--level must be a fraction of 1, more than 0, not nan.",
        ),
        (["compare", "a", "b", "--prompts", "c", "--prior-limit", "-1"], "--prior-limit must be at least 0, not -1."),
        (["pick", "a", "--budget", "1"], "--budget must be a fraction of 1, less than 1, not 1."),
        (["sweep", "--micro-batch", "1000000000000"], "--micro-batch must be at most 1,000,000"),
        (
            ["finetune", "a", "--task", "b", "--lr", "1", "--save-every", "-1"],
            "--save-every must be at least 0, not -1.",
        ),
        (["theory", "--seeds", "0,4294967296"], "seeds must be at most 4,294,967,295"),
    ],
)
def test_options_are_checked_first(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert sentence in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_value_of_any_length_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["reproduce", "parity-mnist", "--jobs", "9" * 100_000])
    assert len(capsys.readouterr().err) < 500


def test_bounds_stand_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    build_parser()
    with pytest.raises(SystemExit):
        main(["sweep", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "[1 to 1,024]" in shown
    assert "[above 0 to 3.4e+38]" in shown


@pytest.mark.parametrize(
    "settings",
    [
        *({"samples": value} for value in (0, 10**9, True, 2.0, "3", None)),
        *({"max_new_tokens": value} for value in (0, 10**9, True, 2.0, "3", None)),
        *({"stop": value} for value in ("x", ("",), (1,))),
        {"precision": "int4"},
        {"chat": "yes"},
    ],
)
def test_probe_settings_are_checked(settings: dict[str, Any]) -> None:
    with pytest.raises(RazorError):
        ProbeSettings(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        *({"budget": value} for value in (0, 1, -0.1, float("nan"), True, "0.02")),
        *({"level": value} for value in (0, 1, float("nan"), True, "0.9")),
        *({"every": value} for value in (0, -1, 10**12, True, 2.5, float("nan"), "10")),
    ],
)
def test_a_monitors_settings_are_checked(settings: dict[str, Any]) -> None:
    with pytest.raises(RazorError, match=next(iter(settings))):
        ForgettingMonitor(["a prompt"], **settings)


@pytest.mark.parametrize("budget", [-0.1, 1, float("nan"), True, "0.02"])
def test_a_picks_budget_is_checked(budget: Any, tmp_path: Path) -> None:
    with pytest.raises(RazorError, match="budget"):
        pick(tmp_path, Limits(budget))


def test_theorys_seeds_are_bounded() -> None:
    with pytest.raises(RazorError, match="1,500 seeds"):
        theory.check("quick", range(1500))


def test_bounds_hold_no_nan() -> None:
    for name in bounds.BOUNDS:
        with pytest.raises(RazorError, match=f"{name} must be"):
            bounds.check(name, float("nan"))


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.json", "[" * 10_000, "nested too deeply"),
        ("a.toml", "a = " + "[" * 10_000, "nested too deeply|not TOML"),
        ("a.toml", "a = " + "[" * 500 + "]" * 500, "nested too deeply|not TOML"),
        ("a.json", '{"seeds": 1e400}', "a number that is too large"),
        ("a.toml", "kl_coef = nan", "infinite, NaN or too large"),
        ("a.toml", f"seeds = {10**30}", "infinite, NaN or too large"),
        ("a.json", '{"lrs": 1, "lrs": 2}', 'the key "lrs" twice'),
        ("a.json", '{"preset": 3}', "preset that is not a name"),
        ("a.json", "", "not JSON"),
        ("a.json", "3", "not a table of settings"),
    ],
)
def test_a_hostile_config_file_is_refused(name: str, content: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(RazorError, match=sentence) as raised:
        read_settings(tmp_path / name)
    assert len(str(raised.value)) < 400


def test_a_config_file_with_a_mark_of_byte_order_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("\ufeffseeds = [1]", encoding="utf-8")
    assert read_settings(tmp_path / "a.toml") == {"seeds": [1]}
