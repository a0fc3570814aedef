"""What the commands say of themselves: defaults in every help text, and the documents' commands, which parse."""

import argparse
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from rlrazor.cli import build_parser
from rlrazor.cli.calibrate import DEFAULTS, GRID, QUICK, QUICK_LEVEL, TINY_GRID, TINY_QUICK
from rlrazor.cli.printing import shown
from rlrazor.experiments.language.config import PRESETS, Config, parse_setting, resolve
from rlrazor.experiments.language.methods import SETTINGS_OF, idle_settings
from rlrazor.experiments.parity_mnist.config import PRESETS as PARITY_PRESETS

ROOT = Path(__file__).parents[1]


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for own in action.choices.values():
                yield from parsers(own)


COMMANDS = {parser.prog: parser for parser in parsers(build_parser())}
# Without these nothing of the kind is done: there is no default to name.
OFF = {
    *("--law", "--prompts", "--verifier", "--data", "--demonstrations", "--generic", "--data-mirror", "--adapter"),
    *("--config", "--stop", "--fail-above", "--fail-above-kl", "--budget", "--kl-budget", "--kl-budget-probe"),
    *("--prior", "--prior-limit", "--figure", "--markdown", "--base", "--analysis", "--data-dir", "--log", "--run"),
}


@pytest.mark.parametrize("prog", COMMANDS)
def test_every_default_is_in_the_help(prog: str) -> None:
    for action in COMMANDS[prog]._actions:
        options = [name for name in action.option_strings if name.startswith("--")]
        if not options or action.nargs == 0 or action.required:
            continue
        known = action.default not in (None, [], argparse.SUPPRESS)
        if known or not OFF & set(options):
            assert "default" in (action.help or ""), f"{prog} {options[0]}"


@pytest.mark.parametrize(
    ("prog", "preset"),
    [
        ("razor sweep", PRESETS["paper"]),
        ("razor reproduce language", PRESETS["tiny"]),
        ("razor reproduce parity-mnist", PARITY_PRESETS["quick"]),
    ],
)
def test_every_setting_is_an_option_with_the_presets_default(prog: str, preset: Any) -> None:
    helps = {action.dest: action.help or "" for action in COMMANDS[prog]._actions}
    for one in fields(preset):
        assert one.metadata["help"].replace("%", "%%") in helps[one.name]
        assert f"(default: {shown(getattr(preset, one.name))})" in helps[one.name]


def test_a_quick_calibration_has_the_runs_that_its_level_needs() -> None:
    """Of K runs, an interval of K / (K + 1) at most."""
    for preset, grid, seeds in (
        ("paper", {**GRID, **QUICK, "epochs": "1"}, 2),
        ("tiny", {**TINY_GRID, **TINY_QUICK}, 1),
    ):
        config = resolve(preset, {name: parse_setting(name, value) for name, value in grid.items()})
        runs = len(config.specs("base", "data", config.methods))
        assert (runs, len(config.seeds)) == (6, seeds)
        assert runs / (runs + 1) >= QUICK_LEVEL
    assert DEFAULTS["lrs"] == GRID["lrs"]


def test_settings_that_no_method_uses_are_not_listed() -> None:
    offline, on_policy, penalty, replay, ewc, lwf, own, rounds = map(set, SETTINGS_OF.values())
    held, drawn = replay | ewc | lwf, own | rounds
    assert idle_settings(["sft"]) == on_policy | penalty | held | drawn
    assert idle_settings(["grpo", "kl-dpg"]) == offline | penalty | held | drawn
    assert idle_settings(["sdft", "dr-grpo+kl"]) == held | drawn
    assert idle_settings(["replay", "ewc+kl"]) == on_policy | lwf | drawn
    assert idle_settings(["self-replay", "lwf", "self-sft"]) == on_policy | penalty | ewc | rounds
    assert idle_settings(["iterative-sft"]) == on_policy | penalty | held
    config = resolve("paper", {"methods": ("sft",)})
    assert not {*on_policy, *penalty, "pretrain_steps"} & set(config.used())
    assert {"lrs", "batch_sizes", "prior"} < set(config.used())
    # As the runs themselves have it: what is idle changes none of them.
    for name, other in {
        "rl_lrs": (1.0,),
        "rl_prompts": 3,
        "group_size": 5,
        "kl_coef": 9.0,
        "ewc_strength": 2.0,
        "lwf_strength": 2.0,
        "own_tries": 3,
        "rounds": 7,
    }.items():
        changed = resolve("paper", {"methods": ("sft",), name: other})
        assert changed.specs("b", "d", ["sft"]) == config.specs("b", "d", ["sft"])
    assert isinstance(config, Config)


def commands_of(path: Path) -> list[str]:
    """The lines of a document's shell blocks that call razor, continued ones as one."""
    blocks = re.findall(r"```(?:sh|bash|console)\n(.*?)```", path.read_text(), flags=re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.partition(" #")[0].strip().removeprefix("$ ") for line in lines if re.match(r"(\$ )?razor ", line)]


DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
DOCUMENTED = [(path.name, line) for path in DOCUMENTS for line in commands_of(path)]


@pytest.mark.parametrize(("name", "line"), DOCUMENTED)
def test_a_documented_command_parses(name: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(line)[1:]
    arguments, unknown = build_parser().parse_known_args(words)
    assert unknown == []
    assert callable(arguments.run)


INLINE = [
    ["finetune", "BASE", "--prompts", "F", "--verifier", "V.py:verify", "--lr", "1e-4"],
    ["evaluate", "MODEL", "--prompts", "F", "--verifier", "V.py:verify"],
    ["sweep", "--base", "BASE", "--prompts", "F", "--verifier", "V.py:verify"],
    ["calibrate", "BASE", "--prompts", "F", "--verifier", "V.py:verify"],
]


@pytest.mark.parametrize("words", INLINE)
def test_prompts_of_ones_own_need_no_task(words: list[str]) -> None:
    from rlrazor.cli.language import task_of

    arguments = build_parser().parse_args(words)
    assert task_of(arguments) == "F"


def test_documents_have_commands() -> None:
    assert {name for name, _ in DOCUMENTED} >= {"README.md", "calibrate.md", "compare.md", "pick.md"}
