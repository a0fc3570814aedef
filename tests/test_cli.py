"""The command line: exit codes, one clear sentence, no traceback."""

import subprocess
import sys
from pathlib import Path

import pytest

import rlrazor
from rlrazor.cli import main


def test_version_and_module(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert done.value.code == 0
    assert capsys.readouterr().out == f"razor {rlrazor.__version__}\n"
    line = [sys.executable, "-m", "rlrazor", "--version"]
    assert subprocess.run(line, capture_output=True, text=True, check=True).stdout == f"razor {rlrazor.__version__}\n"


def test_a_bug_is_no_verdict(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """1 would say that `compare` found too much forgetting."""

    def broken(arguments: object) -> int:
        raise ZeroDivisionError("here")

    monkeypatch.setattr("rlrazor.cli.tasks.run", broken)
    assert main(["tasks"]) == 2
    error = capsys.readouterr().err
    assert "ZeroDivisionError: here" in error
    assert error.endswith("razor: this is a bug of rlrazor; please report it with the lines above.\n")


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, rlrazor.cli; rlrazor.cli.build_parser(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("command", [["tasks"], ["tasks", "--json"]])
def test_a_reader_that_has_seen_enough_is_no_error(command: list[str]) -> None:
    line = [sys.executable, "-m", "rlrazor", *command]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
    assert process.returncode == 141


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reproduce", "parity-mnist", "--methods", "gpro"], "Unknown method 'gpro'. Methods: sft-1, sft-2, oracle"),
        (["reproduce", "parity-mnist", "--lrs", "fast"], "lrs: 'fast' is not a number."),
        (["reproduce", "parity-mnist", "--preset", "huge"], "Unknown preset 'huge'. Presets: paper, quick."),
        (["reproduce", "parity-mnist", "--config", "nowhere.toml"], "nowhere.toml cannot be read"),
        (["reproduce", "parity-mnist", "--jobs", "0"], "--jobs must be at least 1, not 0."),
        (["reproduce", "parity-mnist", "--data-dir", "nowhere"], "nowhere"),
        (["report", "nowhere"], "nowhere"),
        (
            ["reproduce", "parity-mnist", "--colour", "red"],
            "Unknown option '--colour'. Options: --help, --preset",
        ),
        (["report", "--colour", "red"], "Unknown option '--colour'. Options: --help, --out, --markdown, --json."),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("razor: ")
    assert message in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [[], ["reproduce"], ["report"], ["fly"]])
def test_wrong_usage_is_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert done.value.code == 2
    assert "--help" in capsys.readouterr().err


def test_interrupted_is_said_and_exit_code_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rlrazor.experiments.parity_mnist.config.resolve", interrupt)
    assert main(["reproduce", "parity-mnist"]) == 130
    assert "the same command goes on from there" in capsys.readouterr().err
