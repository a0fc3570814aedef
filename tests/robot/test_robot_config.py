"""The grid of the robot: how many runs there are, what decides one, and what is refused."""

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from rlrazor.cli import main
from rlrazor.cli.robot import workers_for
from rlrazor.errors import RazorError
from rlrazor.experiments.robot import cost
from rlrazor.experiments.robot.config import ALL_METHODS, PRESETS, Config, parse_setting, resolve
from rlrazor.experiments.robot.tasks import TASKS

QUICK, PAPER = PRESETS["quick"], PRESETS["paper"]


def test_the_presets_are_what_the_help_says() -> None:
    assert len(QUICK.base_specs("")) == 1
    assert [spec.method for spec in QUICK.specs("", QUICK.methods)] == ["sft", "reinforce"]
    specs = PAPER.specs("", PAPER.methods)
    offline, on_policy = 3, 5  # methods
    assert len(specs) == len(PAPER.seeds) * (offline * len(PAPER.lrs) + on_policy * len(PAPER.rl_lrs))
    assert {spec.root for spec in specs} == set(PAPER.base_specs(""))
    assert len(PAPER.seeds) == 3
    assert {PAPER.new_task, *PAPER.prior_tasks} == set(TASKS)
    assert PAPER.episodes >= 100
    assert {"drawer-open", "drawer-close"} <= set(QUICK.prior_tasks)


def test_a_run_has_what_its_method_needs_and_no_more() -> None:
    specs = {
        spec.method: spec for spec in replace(PAPER, seeds=(0,), lrs=(1e-4,), rl_lrs=(2e-4,)).specs("", ALL_METHODS)
    }
    common = {"lr", "schedule", "epochs", "grid", "checkpoints_per_epoch", "kl_coef", "updates"}
    own = {
        "sft": {"batch_size", "per_start", "expert_noise"},
        "filtered": {"batch_size", "tries"},
        "reinforce": {"starts", "group_size"},
    }
    for method, more in own.items():
        assert set(specs[method].params) == common | more
    assert (specs["sft"].params["lr"], specs["reinforce"].params["lr"]) == (1e-4, 2e-4)
    assert (specs["grpo"].params["kl_coef"], specs["grpo+kl"].params["kl_coef"]) == (0.0, PAPER.kl_coef)
    assert specs["sft"].params["updates"] == PAPER.updates
    assert specs["kl-dpg"].params["updates"] == PAPER.rl_updates


def test_a_vision_language_base_is_told_by_its_model() -> None:
    config = replace(QUICK, policy="some/model", world="libero_goal", dtype="bfloat16", lora_rank=8)
    params = config.base_specs("digest")[0].params
    assert {"policy", "dtype", "lora_rank"} <= set(params)
    assert "width" not in params
    assert params["data"] == "digest"
    assert "policy" not in QUICK.base_specs("")[0].params
    assert "lora_rank" in config.used()
    assert "lora_rank" not in QUICK.used()


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"methods": ("ppo",)}, "Unknown method 'ppo'"),
        ({"scored": "best"}, "Unknown scored 'best'. Choose from: sampled, greedy."),
        ({"prior_tasks": ("reach", "pick-place")}, "pick-place cannot be the new task and a prior one"),
        ({"prior_tasks": ()}, "prior_tasks is empty"),
        ({"lrs": (0.1, 0.1)}, "lrs has the same value twice"),
        ({"noise": -1.0}, "noise must be at least 0"),
        ({"episodes": 0}, "episodes must be at least 1"),
        ({"kl_episodes": 41}, "kl_episodes are some of the episodes"),
        ({"starts": 101}, "There are 100 starts on a grid of 10"),
        ({"group_size": 1}, "group_size must be at least 2"),
        ({"width": 30}, "width must be a multiple of heads"),
        ({"world": "libero_goal"}, "change --policy or --world"),
        ({"policy": "some/model"}, "change --policy or --world"),
        ({"policy": "m", "world": "simpler", "dtype": "bfloat16"}, "give an adapter, --lora-rank 32 say"),
        ({"grid": 1000, "per_start": 1000}, "demonstrations, and 1,000,000 are the most: lower grid or per_start"),
    ],
)
def test_what_makes_no_sense_is_refused(wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RazorError) as raised:
        replace(QUICK, **wrong)
    assert sentence in str(raised.value)


def test_settings_are_parsed() -> None:
    assert parse_setting("methods", "all") == ALL_METHODS
    assert resolve("quick", {"rl_lrs": "1e-4:1e-2:3", "prior_tasks": "reach,push"}).rl_lrs == (1e-4, 1e-3, 1e-2)
    with pytest.raises(RazorError, match="Presets: quick, paper"):
        resolve("slow", {})


def test_costs_are_counted() -> None:
    (base,) = QUICK.base_specs("")
    assert (cost.of(base).steps, cost.of(base).checkpoints) == (QUICK.bc_updates, 1)
    for spec in QUICK.specs("", QUICK.methods):
        assert cost.of(spec).steps == (QUICK.rl_updates if spec.method == "reinforce" else QUICK.updates)
        assert cost.of(spec).checkpoints == QUICK.checkpoints_per_epoch
    assert cost.of(replace_params(QUICK, rl_updates=2)).checkpoints == 2  # no more than there are updates


def replace_params(config: Config, **settings: Any) -> Any:
    return replace(config, **settings).specs("", ["reinforce"])[0]


def test_the_config_imports_neither_torch_nor_a_simulator() -> None:
    heavy = "{'torch', 'mujoco', 'gymnasium'}"
    code = f"import sys, rlrazor.experiments.robot.config; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_dry_run_counts_and_times(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--methods", "sft,reinforce,kl-dpg", "--rl-lrs", "1e-4,1e-3", "--seeds", "0,1"]
    assert main(["reproduce", "robot", *options, "--dry-run", "--json", "--jobs", "1", "--workers", "0"]) == 0
    estimate = json.loads(capsys.readouterr().out)["estimate"]
    assert estimate["runs"] == 2 * (1 + 1 + 2 + 2)
    assert estimate["checkpoints"] == 2 * (1 + 5 * QUICK.checkpoints_per_epoch)
    assert estimate["seconds"] > 1


def test_without_the_simulator_there_is_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "metaworld", None)
    assert main(["reproduce", "robot", "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("razor: This needs the extra [robot], and metaworld is missing: ")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--new-task", "juggle"], "meta-world has no task 'juggle'. Tasks: pick-place, drawer-open"),
        (["--recordings", "."], "meta-world has scripted experts: leave --recordings out."),
        (["--world", "mars"], "Unknown world 'mars'. Worlds: meta-world, libero_spatial"),
        (["--world", "libero_goal", "--policy", "m"], "LIBERO needs the package libero, which is not installed"),
        (["--workers", "-1"], "--workers must be at least 0"),
    ],
)
def test_bad_options_are_told_in_one_sentence(
    options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reproduce", "robot", *options, "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1


MEASURED = cost.Seconds(step=0.43e-3, gradient=0.44e-3, look=0.16e-3)
"""CPU seconds of a step with its share of the policy, of a state's gradient, and of one looked at: `cost._timed` with
the policy of 1.1 million weights, on one core of a machine that was busy."""


@pytest.mark.parametrize(("preset", "most"), [("quick", 6 / 60), ("paper", 8.0)])
def test_the_presets_keep_within_their_hours_of_two_cores(preset: str, most: float) -> None:
    """By their counts times what was measured: bases one after another, then runs side by side."""
    config = PRESETS[preset]
    length = cost.LENGTH * 150
    bases, runs = config.base_specs(""), config.specs("", config.methods)
    of = {spec: cost.seconds_of(spec, cost.of(spec), MEASURED, length) for spec in (*bases, *runs)}
    shared = {what: seconds for spec in of for what, seconds in cost.shared_by(spec, MEASURED, length).items()}
    core_seconds = sum(of.values()) + sum(shared.values())
    at_least = sum(of[spec] for spec in bases[:1]) + max(of[spec] for spec in runs)  # one run has one core
    assert max(core_seconds / 2, at_least) / 3600 < 0.9 * most  # the report, and films
    assert core_seconds / 3600 > most / 4  # nor is it much less than it says


def test_simulators_get_the_cores_that_runs_leave() -> None:
    assert [workers_for(jobs, 2) for jobs in (1, 2, 4)] == [0, 0, 0]
    assert [workers_for(jobs, 16) for jobs in (1, 2, 4, 16, 20)] == [15, 7, 3, 0, 0]
