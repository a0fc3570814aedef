"""The scripts for a GPU: which calls the one makes, with a stand-in for razor, and the other's cases on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPT = BENCHMARKS / "smollm2_gpu.sh"


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


@pytest.mark.slow
def test_costs_are_measured_case_by_case_and_a_case_that_fails_is_named() -> None:
    pytest.importorskip("peft")
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--steps", "8", "--tokens", "32", "--cases"]
    done = subprocess.run([*command, "tiny:kl,none:kl,tiny:lora"], check=True, capture_output=True, text=True)
    kl, failed, lora = (json.loads(line) for line in done.stdout.splitlines())
    assert kl["tokens"] == 16 * 31
    assert min(kl[name] for name in ("kl_ms", "forward_ms")) > 0
    assert failed == {"case": "none:kl", "left_out": "KeyError: 'none'"}
    assert lora["parameters"] == 202_048
    assert lora["measurements"] >= 4
    assert 0 < lora["peak_gb"] < 5
    done = subprocess.run([*command, "tiny:kl", "--seconds", "0"], check=True, capture_output=True, text=True)
    assert json.loads(done.stdout) == {"case": "tiny:kl", "left_out": "no time left"}
