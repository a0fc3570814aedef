"""Options that say where a task of one's own comes from."""

import argparse
import json
import os
from pathlib import Path

import pytest

from rlrazor.cli import main
from rlrazor.cli.language import add_source, source_of
from rlrazor.errors import RazorError


def parsed(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_source(parser)
    return parser.parse_args(options)


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    rows = [{"prompt": f"{n}+{n}=", "completion": str(2 * n)} for n in range(40)]
    (tmp_path / "own").write_text("\n".join(map(json.dumps, rows)))
    return str(tmp_path / "own")


@pytest.mark.parametrize(
    ("text", "meant"),
    [(r"\n", "\n"), (r"\\n", r"\n"), (r"\t.", "\t."), (r"\d", r"\d"), ("\n", "\n"), (" ", " "), (r"\\\n", "\\\n")],
)
def test_an_escape_in_a_stop_string_is_decoded_once(prompts: str, text: str, meant: str) -> None:
    source = source_of(parsed("--prompts", prompts, "--stop", text, "--stop", ";"), "own")
    assert source.task().form.stop == (meant, ";")


def test_an_empty_stop_string_is_refused(prompts: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RazorError, match="A stop string is empty"):
        source_of(parsed("--prompts", prompts, "--stop", ""), "own")
    assert main(["calibrate", "tiny", "--prompts", prompts, "--stop", "", "--dry-run"]) == 2
    assert "A stop string is empty" in capfd.readouterr().err


def test_prompts_of_ones_own_may_be_plain_text(prompts: str) -> None:
    plain, chat = (source_of(parsed("--prompts", prompts, *more), "own") for more in (["--no-chat"], []))
    assert (plain.task().form.chat, chat.task().form.chat) == (False, True)
    splits = plain.load()
    assert plain.fingerprint(splits) != chat.fingerprint(splits)
    with pytest.raises(RazorError, match="--no-chat goes with --prompts FILE"):
        source_of(parsed("--no-chat"), "letters")


def test_what_is_read_more_than_once_is_no_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RazorError, match=r"--generic is read more than once, and .*pipe is a pipe: give a file"):
        source_of(parsed("--generic", str(tmp_path / "pipe")), "letters")


def test_a_preset_of_the_command_line_goes_before_that_of_a_file(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "grid.toml").write_text('preset = "of-the-file"\n')
    line = ["reproduce", "language", "--config", str(tmp_path / "grid.toml"), "--out", str(tmp_path / "out")]
    assert main(line) == 2
    assert "'of-the-file'" in capfd.readouterr().err
    assert main([*line, "--preset", "of-the-line"]) == 2
    assert "'of-the-line'" in capfd.readouterr().err
