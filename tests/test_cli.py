"""The command line: exit codes, one clear sentence, no traceback."""

import errno
import io
import os
import shlex
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
    assert error.endswith(
        "razor: this is a bug of rlrazor; please report it with the lines above and what `razor doctor` prints.\n"
    )


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


class Full(io.RawIOBase):
    """A stream on a full disk."""

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("unbuffered", [False, True])
@pytest.mark.parametrize("command", ["tasks", "tasks --json", "--help", "--version", "compare --help"])
def test_a_full_disk_is_one_sentence(
    command: str, unbuffered: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = io.TextIOWrapper(io.BufferedWriter(Full()), encoding="utf-8", write_through=unbuffered)
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", stream)
        assert main(command.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("razor: ")
    assert "No space left on device" in error
    assert error.count("\n") == 1
    with pytest.raises(OSError, match="No space"):
        stream.close()


def test_closed_streams(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", None)
        assert main(["tasks"]) == 2
    assert capsys.readouterr().err == "razor: standard output is closed: redirect it to a file, or to /dev/null.\n"
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", None)
        assert main(["report", "nowhere"]) == 2
        sys.stderr.close()
    assert capsys.readouterr().out == ""
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", io.TextIOWrapper(Full(), write_through=True))  # type: ignore[type-var]
        assert main(["report", "nowhere"]) == 2


def test_streams_as_a_shell_closes_them() -> None:
    """Python itself says nothing either as it ends."""
    razor = f"{shlex.quote(sys.executable)} -m rlrazor"
    full = " ; ".join(f"{razor} {command} > /dev/full; echo $? >&2" for command in ("tasks", "--help"))
    script = f"{razor} tasks >&-; echo $? >&2; {razor} report nowhere 2>&-; echo $?"
    if Path("/dev/full").is_char_device():
        script += f"; {full}"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=False)
    lines = done.stderr.splitlines()
    assert done.stdout == "2\n"
    assert lines[1::2] == ["2"] * (len(lines) // 2)
    # Which it is cannot be told from a temporary file, where output is not buffered.
    assert all(line.startswith("razor: ") and "standard output" in line for line in lines[::2])


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            PermissionError(13, "Permission denied", "locked/law.json"),
            "locked/law.json cannot be read or written: Perm",
        ),
        (OSError(36, "File name too long", b"xx\xff"), "xx\\udcff cannot be read or written: File name too long."),
        (OSError(28, "No space left on device"), "No space left on device, which is what came of writing to"),
        (OSError(9, "Bad file descriptor"), "Bad file descriptor, which is what came of writing to"),
    ],
)
def test_what_is_wrong_with_a_users_file_is_no_bug(
    error: OSError, sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(arguments: object) -> int:
        raise error

    monkeypatch.setattr("rlrazor.cli.tasks.run", fails)
    assert main(["tasks"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"razor: {sentence}")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["report", "a\0b"], "NUL character"),
        (["report", "x" * 300], "File name too long"),
        (["pick", "x" * 300], "File name too long"),
        (["report", "\x1b[31m"], "There is no \\x1b[31m/config.json"),
        (["tasks", "--\x1b[31m"], "Unknown option '--\\x1b[31m'"),
        (["tasks", "[/red]"], "Unknown option '[/red]'"),
        (["report", "\udcff\udcfe"], "There is no \\udcff\\udcfe/config.json"),
        (["report", "loop"], "loop"),
        (["pick", "loop"], "loop"),
        (["report", "loop", "file"], "loop"),
        (["calibrate", "tiny", "--task", ""], "There is no task ''"),
        (["compare", "base", "tuned", "--prompts", "file", "--prior", "winogrande", "--data-mirror", "loop"], "loop"),
        (["report", "file"], "Not a directory"),
        (["report", "/dev/null"], "Not a directory"),
        (["pick", "pipe"], "pipe"),
        (["compare", "base", "tuned", "--prompts", "file/x"], "file/x"),
        (["compare", "", "tuned", "--prompts", "file"], "BASE is empty"),
        (["compare", "base", "", "--prompts", "file"], "TUNED is empty"),
    ],
)
def test_names_that_no_file_has(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    Path("file").write_text("a prompt")
    os.mkfifo("pipe")
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("razor: ")
    assert said in error
    assert error.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"loop", "file", "pipe"}
