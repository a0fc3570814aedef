"""How many threads a process computes with."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from laws import law_of
from own_tasks import metric, own_task
from rlrazor.cli import main
from rlrazor.errors import RazorError
from rlrazor.guard.compare import compare
from rlrazor.guard.comparison import Pair
from rlrazor.lm import compute
from rlrazor.lm.probes import GenericText, ProbeSettings
from rlrazor.runs.store import RunStore
from rlrazor.system import cores
from rlrazor.system.cores import threads_alone
from tiny_models import char_tokenizer, saved, tiny_llama


@pytest.fixture(autouse=True)
def _threads_put_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("RLRAZOR_THREADS", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("rlrazor.experiments.language.cost.is_at_hand", lambda base: False)  # a dry run times nothing
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 6),
        ({"cpu.max": "max 100000\n"}, 6),
        ({"cpu.max": "250000 100000\n"}, 2),
        ({"cpu.max": "10000 100000\n"}, 1),
        ({"cpu.max": "1600000 100000\n"}, 6),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 6),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
    ],
)
def test_cores_are_those_that_the_process_may_use(
    files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a machine with many more: by affinity, and by a container's quota in either version of cgroup."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(cores, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    assert cores.available() == expected
    monkeypatch.setenv("OMP_NUM_THREADS", "2,4")
    assert threads_alone() == min(2, expected)


@pytest.mark.parametrize("value", ["0", "-1", "abc", "", "2.5", " 2", "٣", "99999999999999999999"])
def test_a_bad_number_of_threads_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLRAZOR_THREADS", value)
    torch.set_num_threads(1)
    with pytest.raises(RazorError, match=f"at least 1, not {value!r}"):
        compute.prepare_process()
    assert torch.get_num_threads() == 1


ROWS = [{"prompt": f"{n}", "completion": f"{n}"} for n in range(40)]
BASE = "./empty"
PRIOR = ("--prior", "own.yaml")
BUDGET = ("--metric", "loss", "--budget", "0.5")
MEASURING = (
    ["compare", BASE, BASE, "--prompts", "prompts.jsonl"],
    ["pick", "run", "--base", BASE, "--prompts", "prompts.jsonl", "--law", "law.json", *BUDGET],
    ["evaluate", BASE, "--task", "letters", *PRIOR],
    ["finetune", BASE, "--task", "mine", "--prompts", "prompts.jsonl", "--method", "sft", "--lr", "1e-4", *PRIOR],
)
SWEEPS = (
    ["calibrate", BASE, "--prompts", "prompts.jsonl", "--prior-limit", "1", *PRIOR],
    ["calibrate", BASE, "--prompts", "prompts.jsonl", "--jobs", "2"],
    ["reproduce", "language", "--preset", "tiny", "--jobs", "1", "--dry-run"],
    ["reproduce", "forecast", "--families", "letters", "--jobs", "1", "--dry-run"],
    ["calibrate", "tiny", "--task", "letters", "--jobs", "1", "--dry-run"],
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / BASE).mkdir()
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    law_of(tiny_llama()).save(tmp_path / "law.json")
    own_task(tmp_path, metric("acc", "true"))
    checkpoint = tmp_path / "run" / "checkpoint-1"
    tiny_llama().save_pretrained(checkpoint)
    (checkpoint / "trainer_state.json").write_text(
        json.dumps({"log_history": [{"step": 1, "epoch": 1.0, "loss": 2.0}]})
    )
    return tmp_path


def test_a_bad_number_of_threads_is_a_sentence(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    before = set(folder.rglob("*"))
    monkeypatch.setenv("RLRAZOR_THREADS", "0")
    for command in (*MEASURING, *SWEEPS):
        assert main(command) == 2
        assert capsys.readouterr().err.strip() == "razor: RLRAZOR_THREADS is a number of threads, at least 1, not '0'."
    assert set(folder.rglob("*")) == before


def test_what_has_the_machine_to_itself_uses_its_cores(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sweep does not, whatever the jobs or the cores: with another number of them its results would be others."""
    pytest.importorskip("lm_eval")
    monkeypatch.setattr(cores, "available", lambda: 3)

    def threads_of(command: list[str]) -> int:
        torch.set_num_threads(7)
        main(command)
        return torch.get_num_threads()

    for command in MEASURING:
        assert threads_of(command) == 3
        assert BASE in capsys.readouterr().err
    for command in SWEEPS:
        assert threads_of(command) == (4 if BASE in command else 1)
    monkeypatch.setenv("RLRAZOR_THREADS", "5")
    assert [threads_of(command) for command in (*MEASURING, *SWEEPS)] == [5] * 9


@pytest.mark.parametrize(("asked", "policy"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_that_wait_do_not_spin(asked: str | None, policy: str, tmp_path: Path) -> None:
    """By what OpenMP itself says as torch loads it. Two that spun took six times as long as one, on a busy machine."""
    environment = {**os.environ, "OMP_DISPLAY_ENV": "TRUE"} | ({} if asked is None else {"OMP_WAIT_POLICY": asked})
    if asked is None:
        environment.pop("OMP_WAIT_POLICY", None)
    (tmp_path / "prompts.txt").write_text("a\n")
    line = [sys.executable, "-m", "rlrazor", "compare", "./a", "./b", "--prompts", "prompts.txt"]
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    if "OMP_WAIT_POLICY" not in done.stderr:
        pytest.skip("torch here has another OpenMP than libgomp")
    assert f"OMP_WAIT_POLICY = '{policy}'" in done.stderr


def test_threads_change_no_more_than_rounding(tmp_path: Path) -> None:
    for name, seed in (("base", 0), ("tuned", 1)):
        saved(tmp_path / name, tiny_llama(hidden=64, scale=0.1, seed=seed), char_tokenizer())

    def measured(threads: int) -> dict[str, float]:
        compute.prepare_process(threads)
        settings = ProbeSettings(max_new_tokens=3, chat=False)
        found = compare(
            Pair(str(tmp_path / "base"), str(tmp_path / "tuned")),
            ["a:", "b="],
            settings=settings,
            generic=GenericText(("some text that stays",)),
        )
        return {name: estimate.mean for name, estimate in found.kl.items()}

    assert measured(2) == pytest.approx(measured(1), rel=1e-5)


@pytest.mark.parametrize(("jobs", "machine"), [("1", 1), ("1", 16), ("3", 16)])
def test_a_calibration_computes_alike_whatever_the_jobs_and_the_cores(
    jobs: str, machine: int, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The threads are a setting of the runs, kept with them, and a run computes with as many as it is asked for."""
    pytest.importorskip("lm_eval")
    from rlrazor.experiments.language import train
    from rlrazor.experiments.language.config import resolve
    from rlrazor.experiments.language.experiment import Language
    from rlrazor.experiments.language.setup import TaskSource

    monkeypatch.setattr(cores, "available", lambda: machine)
    command = ["calibrate", BASE, "--prompts", "prompts.jsonl", "--jobs", jobs, "--dry-run", "--json"]
    for more, threads in (([], 4), (["--threads", "3"], 3)):
        assert main([*command, *more]) == 0
        config = json.loads(capsys.readouterr().out)["config"]
        assert config["threads"] == threads
        found: list[int] = []
        monkeypatch.setattr(train, "finetune", lambda *_, found=found: found.append(torch.get_num_threads()))
        spec = resolve("paper", {"threads": config["threads"]}).specs("base", "data", ["sft"])[0]
        Language(BASE, TaskSource("letters")).train(spec, RunStore(folder))
        assert (spec.settings["threads"], found) == (threads, [threads])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.bool])
def test_finite_is_what_torch_says_of_each_value(dtype: torch.dtype) -> None:
    for shape in ((0,), (), (7,), (300, 1000)):
        values = torch.randn(shape).to(dtype)
        assert compute.is_finite(values)
        if values.numel() and values.is_floating_point():
            for bad in (float("nan"), float("inf"), -float("inf")):
                for place in (0, values.numel() // 2, values.numel() - 1):
                    damaged = values.clone()
                    damaged.view(-1)[place] = bad
                    assert not compute.is_finite(damaged)
                    assert not damaged.isfinite().all()
    assert compute.is_finite(
        torch.full((9, 9), torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16)
    )  # their sum is not
