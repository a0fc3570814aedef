"""The monitor on models that are sharded over two processes, against the same in one; and processes that fail in turn.

Real trainings by `transformers.Trainer` over gloo on a CPU, of `sharded_runs.py`: one start for all cases of a library.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import sharded_runs
import transformers

from laws import GENERIC, PROMPTS, SETTINGS
from rlrazor.lm import kl, models, probes
from rlrazor.lm.digests import is_same_base
from tiny_models import char_tokenizer, saved, tiny_llama

WAYS = ["ddp", "fsdp1", "fsdp1-flat", "fsdp2", "fsdp2-lean", "loaded", "zero2", "zero3"]
WHAT = ["full", "lora"]
TAKEN = {"ddp": 1.0, "zero2": 1.0, "fsdp1": 0.5, "fsdp1-flat": 0.5}  # of the parameters, in each process
pytestmark = pytest.mark.filterwarnings("ignore")


def started(folder: Path, cases: Sequence[str]) -> None:
    """Run cases in two processes; a hang is a failure."""
    tests = Path(__file__).parents[1]
    paths = [str(tests), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         sharded_runs.__file__, folder, *cases],
        env=environment, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def torchs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("torch")
    ways = [way for way in WAYS if not way.startswith("zero")]
    started(folder, [f"{way}/{what}" for way in ways for what in WHAT] + ["fsdp1/fails", "fsdp2/fails", "bare/kl"])
    return folder


@pytest.fixture(scope="module")
def deepspeeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    folder = tmp_path_factory.mktemp("deepspeed")
    started(folder, [f"{way}/{what}" for way in ("zero2", "zero3") for what in WHAT] + ["zero3/fails"])
    return folder


def found(request: pytest.FixtureRequest, case: str) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of a case, and what each process left of it."""
    folder = request.getfixturevalue("deepspeeds" if case.startswith("zero") else "torchs") / case
    return folder, [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def require_same_as_whole(folder: Path, processes: Sequence[dict[str, Any]], what: str, own: Path) -> None:
    """The loss is the same to the bit; KL is that of the model kept last, in one process, which `pick` reads."""
    for process in processes:
        assert process["watched"] == process["plain"] == processes[0]["plain"]
        assert process["steps"] == [2, 4]
        assert process["kl"] == processes[0]["kl"]
    kept = folder / "watched" / "within-budget"
    assert json.loads((kept / "razor.json").read_text())["step"] == 4
    base = models.load(saved(own / "base", tiny_llama(), char_tokenizer()))
    tuned = models.load(own / "base", adapter=kept) if what == "lora" else models.load(kept)
    for name, sequences in (
        ("kl_forward", probes.of_prompts(base.model, base.tokenizer, PROMPTS, SETTINGS)),
        ("kl_probe", probes.of_generic(base.model, base.tokenizer, GENERIC, SETTINGS)),
    ):
        expected = kl.forward_kl(kl.Probe(base.model, sequences), tuned.model).per_completion.mean
        assert processes[0]["kl"][-1][name] == pytest.approx(expected, rel=1e-4)
        assert expected > 1e-3


@pytest.mark.skipif(
    int(transformers.__version__.partition(".")[0]) < 5, reason="older versions shard on accelerators only"
)
def test_fsdp2_is_measured_as_whole(tmp_path: Path) -> None:
    started(tmp_path / "runs", ["fsdp2/lora"])
    folder = tmp_path / "runs" / "fsdp2" / "lora"
    processes = [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert all(process["sharding"] == ["DTensor"] for process in processes)
    require_same_as_whole(folder, processes, "lora", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("what", WHAT)
@pytest.mark.parametrize("way", WAYS)
def test_sharded_is_measured_as_whole(request: pytest.FixtureRequest, way: str, what: str, tmp_path: Path) -> None:
    folder, processes = found(request, f"{way}/{what}")
    for process in processes:
        if way in TAKEN:
            assert process["here"] == pytest.approx(TAKEN[way] * (7120 if what == "lora" else 6096))
        elif way == "zero3":
            assert process["here"] <= 32  # what is smaller than the number of processes is not shared out
        else:
            assert "DTensor" in process["sharding"]
    require_same_as_whole(folder, processes, what, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("where", sharded_runs.FAILING)
@pytest.mark.parametrize("way", ["fsdp1", "fsdp2", "zero3"])
def test_a_process_that_fails_ends_measuring_in_all(
    request: pytest.FixtureRequest, way: str, where: str, rank: int
) -> None:
    """Before training it is an error in both; later training goes on, to the same losses."""
    folder, processes = found(request, f"{way}/fails")
    _, whole = found(request, f"{way}/full")
    outcomes = [process[f"{where} {rank}"] for process in processes]
    for number, outcome in enumerate(outcomes):
        if where.startswith("setup"):
            elsewhere = "" if number == rank else f"Process {rank} has failed, and all end with it. "
            assert outcome["error"].startswith(elsewhere)
            assert "planted" in outcome["error"]
            assert outcome["losses"] == []
        else:
            assert outcome["off"]
            assert len(outcome["losses"]) == 2
            assert outcome["losses"][0] == whole[0]["plain"][0]
            assert outcome["losses"] == outcomes[0]["losses"]
            assert outcome["readings"] == (0 if "call" in where else 1)
    if not where.startswith("setup"):
        rows = (folder / f"{where}-{rank}" / "razor.jsonl").read_text().splitlines()
        assert "planted" in json.loads(rows[-1])["error"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", sharded_runs.BARE)
def test_a_model_sharded_by_hand_is_the_model(request: pytest.FixtureRequest, kind: str) -> None:
    _, processes = found(request, "bare/kl")
    for process in processes:
        sharded, whole = process[kind]["sharded"], process[kind]["whole"]
        if kind == "half":  # what `fully_shard` casts to is what is measured in
            assert (sharded["precision"], whole["precision"]) == ("bfloat16", "float32")
            continue
        assert is_same_base(sharded["digest"], whole["digest"])
        for name in ("kl_forward", "kl_probe"):
            assert sharded[name] == pytest.approx(whole[name], rel=1e-4)


@pytest.mark.slow
def test_an_adapter_that_has_learnt_is_checked_against_the_bases_files(request: pytest.FixtureRequest) -> None:
    _, processes = found(request, "bare/kl")
    for process in processes:
        assert process["undone"]["right"] == ""
        assert "this model is not the base" in process["undone"]["wrong"]
