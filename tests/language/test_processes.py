"""One run in two processes, over gloo, against the same run in one: all that takes two is one start of them."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import two_processes
from safetensors.torch import load_file
from torch import Tensor

from rlrazor.cli import main
from rlrazor.system import processes

pytestmark = pytest.mark.filterwarnings("ignore")  # TRL's advice to its callers, which `train` silences
Outcome = tuple[Tensor, list[Any]]


@dataclass(frozen=True)
class Runs:
    """What came of one process and of two; `folder` has what the two wrote, `printed` what they said."""

    one: dict[str, Outcome]
    first: dict[str, Outcome]
    second: dict[str, Outcome]
    folder: Path
    printed: str
    said: str
    code: int


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("two")
    tests = Path(__file__).parents[1]
    paths = [str(tests), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    started = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         two_processes.__file__, folder],
        env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    saved = [folder / f"outcomes-{rank}.pt" for rank in (0, 1)]
    assert all(path.exists() for path in saved), started.stderr[-4000:]
    first, second = ({name: (weights, steps) for name, weights, steps in torch.load(path)} for path in saved)
    alone = two_processes.outcomes(tmp_path_factory.mktemp("one"))
    one = {name: (weights, steps) for name, weights, steps in alone}
    return Runs(one, first, second, folder, started.stdout, started.stderr, started.returncode)


RESUMED = ["sft+kl, resumed", "dr-grpo, resumed"]


@pytest.mark.parametrize("case", [*two_processes.CASES, *RESUMED])
def test_two_processes_train_what_one_does(case: str, runs: Runs) -> None:
    """Steps, their losses and rewards, and every weight; so also batches, samples, schedule and penalty."""
    weights, steps = runs.one[case]
    assert [step for step, _ in steps] == ([3, 4] if case in RESUMED else [1, 2, 3, 4])
    shared, measured = runs.first[case]
    assert len(measured) == len(steps)
    for (step, of_one), (same_step, of_two) in zip(steps, measured, strict=True):
        assert same_step == step
        assert of_two == pytest.approx(of_one, rel=1e-5, abs=2e-6)
    torch.testing.assert_close(shared, weights, rtol=0, atol=5e-5)  # of steps of 3e-3
    assert torch.equal(runs.second[case][0], shared)
    assert runs.second[case][1] == []  # the first alone measures


def test_micro_batches_change_neither_the_penalty_nor_the_loss(runs: Runs) -> None:
    whole, cut = (runs.one[f"simpo{cut}"] for cut in ("", ", micro-batches of 1"))
    assert [pytest.approx(measured, rel=1e-5) for _, measured in whole[1]] == [measured for _, measured in cut[1]]
    torch.testing.assert_close(cut[0], whole[0], rtol=0, atol=5e-5)


def test_a_command_in_two_processes_is_the_command(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One lock, one folder, one table on standard output, the same numbers and the same model."""
    assert main([*two_processes.COMMAND.split(), "--out", str(tmp_path / "run")]) == 0
    one, two = json.loads(capsys.readouterr().out), json.loads(runs.printed)
    assert [record["step"] for record in two["records"]] == [record["step"] for record in one["records"]] == [4]
    for of_one, of_two in zip([one["base"], *one["records"]], [two["base"], *two["records"]], strict=True):
        for measures in ("prior", "drift", "metrics"):
            assert of_two[measures] == pytest.approx(of_one[measures], rel=1e-3, abs=1e-6)
    models = [load_file(Path(of["model"]) / "model.safetensors") for of in (one, two)]
    for name, weight in models[0].items():
        torch.testing.assert_close(models[1][name], weight, rtol=0, atol=5e-5)
    assert [(runs.folder / f"code-{rank}").read_text() for rank in (0, 1)] == ["0", "0"]
    assert not (runs.folder / "run" / ".unfinished").exists()  # no state of a finished run is left


def test_a_failure_in_one_is_said_once_and_ends_all(runs: Runs) -> None:
    assert runs.code != 0
    assert runs.said.count("RazorError: The second process says why.") == 1
    assert "gloo" not in runs.said  # what the first process saw of it


def test_what_one_process_has_happens_in_all(runs: Runs) -> None:
    first, second = (json.loads((runs.folder / f"failures-{rank}.json").read_text()) for rank in (0, 1))
    assert (first.pop("none fails"), second.pop("none fails")) == ("returned 0", "returned 1")
    assert first == second
    assert first["first"] == "returned 0"
    assert first["first fails"] == first["second fails"] == "DivergedError: (3, 0.5)"
    assert first["diverged"].startswith("DivergedError")
    for case, sentence in {"odd": "be shared by 2", "epochs": "whole number of steps"}.items():
        assert first[case].startswith("RazorError")
        assert sentence in first[case]


def test_only_finetune_takes_several_processes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for command in (["sweep", "--base", "tiny", "--task", "letters"], ["reproduce", "language"]):
        assert main([*command, "--out", str(tmp_path / "out")]) == 2
        assert capsys.readouterr().err.startswith("razor: torchrun starts `razor finetune` only")
    assert not (tmp_path / "out").exists()


def test_without_torchrun_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")  # a cluster's own, without the rank that torchrun sets
    monkeypatch.delenv("RANK", raising=False)
    assert (processes.count(), processes.rank()) == (1, 0)
    assert processes.in_first(lambda: 3) == processes.in_all(lambda: 3) == 3
