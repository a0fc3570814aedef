"""Presets, config files and command-line values."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlrazor.errors import RazorError
from rlrazor.experiments.parity_mnist.config import (
    CORE_METHODS,
    PRESETS,
    all_methods,
    parse_setting,
    resolve,
    sensitivity_variants,
)
from rlrazor.runs.settings import read_settings
from rlrazor.runs.sweep import trajectories


def test_the_paper_preset_is_the_papers_grid() -> None:
    paper = resolve("paper")
    assert len(paper.lrs) == 15
    np.testing.assert_allclose(paper.lrs, np.logspace(np.log10(3e-6), -3, 15), rtol=4e-3)  # typed with 3 digits
    specs = paper.specs("data", paper.methods)
    assert len(specs) == 5 * 60
    assert len(set(specs)) == len(specs)
    records = len(specs) / 5 * 1.5 * paper.checkpoints_per_epoch
    assert records == 450  # a method; "about 500"
    epochs = sum(trajectory.longest.params["epochs"] for trajectory in trajectories(specs))
    assert epochs == 5 * 15 * (2 + 1 + 2)  # the constant 1-epoch run is not trained


def test_every_preset_is_valid_and_has_room_for_its_students() -> None:
    for name in PRESETS:
        assert resolve(name).methods
    assert set(resolve("quick").methods) == set(CORE_METHODS) < set(all_methods())


def test_a_toml_file_and_a_stored_config_give_settings(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('preset = "paper"\nlrs = [1e-4, 1e-3]\nmethods = ["grpo"]\n')
    assert read_settings(file) == {"preset": "paper", "lrs": [1e-4, 1e-3], "methods": ["grpo"]}

    config = resolve("quick", {"seeds": (3,), "kl_coef": 0.5})
    stored = tmp_path / "config.json"
    stored.write_text(json.dumps({"title": "x", "preset": "quick", "config": dataclasses.asdict(config)}))
    settings = read_settings(stored)
    assert settings.pop("preset") == "quick"
    assert resolve("paper", {name: parse_setting(name, value) for name, value in settings.items()}) == config


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("methods", "sft-1, grpo", ("sft-1", "grpo")),
        ("methods", "all", all_methods()),
        ("methods", "core", CORE_METHODS),
        ("lrs", "1e-4,3e-4", (1e-4, 3e-4)),
        ("lrs", "1e-5:1e-3:3", (1e-5, 1e-4, 1e-3)),
        ("lrs", 0.01, (0.01,)),
        ("lrs", [1, 2], (1.0, 2.0)),
        ("seeds", "0,1,2", (0, 1, 2)),
        ("batch_size", "32", 32),
        ("kl_coef", "0.5", 0.5),
    ],
)
def test_values(name: str, value: Any, expected: Any) -> None:
    assert parse_setting(name, value) == expected


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("learning_rate", "1e-4", r"Unknown setting 'learning_rate'\. Settings: methods, lrs, .*pretrain_size"),
        ("lrs", "fast", "lrs: 'fast' is not a number"),
        ("lrs", "1e-3:1e-5:3", "LOW:HIGH:COUNT"),
        ("lrs", "1e-5:1e-3:nan", "lrs: 'nan' is not a whole number"),
        ("lrs", "1e-5:inf:3", "LOW:HIGH:COUNT"),
        ("lrs", 10**400, "is not a number"),
        ("batch_size", float("inf"), "batch_size: inf is not a whole number"),
        ("epochs", "1.5", "epochs: '1.5' is not a whole number"),
        ("epochs", 1.5, "epochs: 1.5 is not a whole number"),
        ("batch_size", True, "batch_size: True is not a whole number"),
        ("batch_size", [32], r"batch_size: \[32\] is not a whole number"),
        ("methods", [1], "methods: 1 is not a name"),
    ],
)
def test_bad_values_are_named(name: str, value: Any, message: str) -> None:
    with pytest.raises(RazorError, match=message):
        parse_setting(name, value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"methods": ("grpo", "dpo")}, "Unknown method 'dpo'. Methods: "),
        ({"methods": ()}, "methods is empty"),
        ({"methods": ("rl-distilled",)}, "add grpo to the methods"),
        ({"schedules": ("linear",)}, "Unknown schedule 'linear'. Schedules: constant, cosine"),
        ({"lrs": (0.0,)}, "lrs must be more than 0, not 0"),
        ({"lrs": (float("nan"),)}, "lrs must be more than 0, not nan"),
        ({"lrs": (1e-4, 1e-4)}, "lrs has the same value twice"),
        ({"group_size": 1}, "group_size must be at least 2"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"kl_coef": -1.0}, "kl_coef must be at least 0"),
        ({"seeds": (-1,)}, "seeds must be at least 0"),
    ],
)
def test_bad_configs_are_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(RazorError, match=message):
        resolve("quick", overrides)


def test_an_unknown_preset_and_an_unreadable_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RazorError, match=r"Unknown preset 'huge'\. Presets: paper, quick"):
        resolve("huge")
    for name, text in (("a.toml", "lrs = ["), ("b.json", "{"), ("c.json", "[1]"), ("d.toml", "\udcff")):
        (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(RazorError, match=rf"{name} (cannot be read|is not a table of settings)"):
            read_settings(tmp_path / name)
    with pytest.raises(RazorError, match=r"missing.toml cannot be read: .*No such file"):
        read_settings(tmp_path / "missing.toml")


def test_sensitivity_varies_one_setting_at_a_time_and_keeps_the_configured_value() -> None:
    config = resolve("paper")
    variants = sensitivity_variants(config)
    for setting, value, variant in variants:
        assert getattr(variant, setting) == value
        others = {"batch_size", "group_size", "pretrain_epochs"} - {setting}
        assert all(getattr(variant, other) == getattr(config, other) for other in others)
    for setting in ("batch_size", "group_size", "pretrain_epochs"):
        assert getattr(config, setting) in [value for name, value, _ in variants if name == setting]
