"""The script for a GPU, with a stand-in for razor: which calls it makes, and how it ends."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "smollm2_gpu.sh"


def run(tmp_path: Path, body: str, seconds: int = 60) -> tuple[int, list[str]]:
    razor, calls = tmp_path / "razor", tmp_path / "calls"
    razor.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n{body}\n')
    razor.chmod(0o755)
    line = ["bash", str(SCRIPT), "prior", "data", str(tmp_path / "state"), str(seconds)]
    done = subprocess.run(line, env={**os.environ, "RAZOR": str(razor)}, check=False, capture_output=True)
    return done.returncode, calls.read_text().splitlines()


def test_all_tasks_are_asked_for_in_folders_of_their_own(tmp_path: Path) -> None:
    code, calls = run(tmp_path, "exit 0")
    assert code == 0
    tasks = [call.split("--task ")[1].split()[0] for call in calls]
    assert tasks == ["letter-word", "science", "math"]
    assert [call.split("--out ")[1] for call in calls] == [f"{tmp_path}/state/{task}" for task in tasks]
    assert ["--data " in call for call in calls] == [False, True, True]


@pytest.mark.parametrize(("body", "code"), [("exec sleep 30", 75), ("exit 130", 75), ("exit 2", 2)])
def test_a_call_that_ends_early_has_more_to_do_and_one_that_fails_says_so(tmp_path: Path, body: str, code: int) -> None:
    found, calls = run(tmp_path, body, 1 if "sleep" in body else 60)
    assert found == code
    assert len(calls) == 1
