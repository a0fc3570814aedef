"""A monitor that fails never takes the training run with it, in one process or many."""

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from laws import law_of
from rlrazor.errors import RazorError
from rlrazor.guard import ranks
from rlrazor.guard.base_side import BaseSide
from rlrazor.guard.law_file import LawFile
from rlrazor.guard.outputs import KeptModel
from tiny_models import tiny_llama
from watching import losses_of, trainer_of, watch

TIME_LIMIT = 120  # seconds: a process that waits for another that has failed waits for half an hour


def boom(*_: Any, **__: Any) -> Any:
    raise TypeError("no such thing\nin two lines")


@pytest.mark.parametrize(
    ("where", "name", "every"),
    [(BaseSide, "measure", 2), (LawFile, "forecast", 2), (KeptModel, "save", 2), (BaseSide, "thinned", None)],
    ids=["measuring", "forecasting", "keeping", "planning"],
)
def test_training_goes_on_without_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    where: type,
    name: str,
    every: Any,
) -> None:
    plain = trainer_of(tmp_path / "plain", [])
    plain.train()
    model = tiny_llama()
    watching = watch(tmp_path, law_of(model, scale=20.0), every=every, budget=0.9, on_budget="keep")
    trainer = trainer_of(tmp_path / "run", [watching], model)
    monkeypatch.setattr(where, name, boom)
    trainer.train()
    assert losses_of(trainer) == losses_of(plain)
    out = capfd.readouterr().out
    assert out.count("measuring has failed and ends here; training goes on. TypeError: no such thing in two") == 1
    assert out.count("no such thing") == 1
    rows = [json.loads(line) for line in (tmp_path / "run" / "razor.jsonl").read_text().splitlines()]
    failures = [row for row in rows if "error" in row]
    assert len(failures) == 1
    assert failures[0]["step"] == (0 if every is None else 2)
    assert 'raise TypeError("no such thing' in failures[0]["error"]
    assert max(row["step"] for row in rows) == failures[0]["step"]


def test_before_training_it_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BaseSide, "of", boom)
    with pytest.raises(RazorError, match="cannot measure this model, LlamaForCausalLM: TypeError: no such thing in"):
        trainer_of(tmp_path, [watch(tmp_path)])


class Unreadable(list[Any]):
    """A data set of the user's own whose columns cannot be read."""

    column_names = ("text",)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, str):
            raise ConnectionError("the shelf is closed")
        return super().__getitem__(index)


def test_a_data_set_that_cannot_be_looked_into_is_trained_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    trainer = trainer_of(tmp_path, [watch(tmp_path, every=6)])
    trainer.train_dataset = Unreadable(trainer.train_dataset)
    trainer.train()
    assert "whether the prompts are in the training set cannot be seen: ConnectionError" in capfd.readouterr().out
    assert trainer.state.global_step == 6


def test_alone_everywhere_is_here() -> None:
    assert ranks.everywhere(lambda: 3) == [3]
    assert ranks.together(lambda: None) is None
    work: Callable[[], None] = boom
    with pytest.raises(TypeError, match="no such thing"):
        ranks.together(work)


SCRIPT = """
import json
import sys
from pathlib import Path

import torch

torch.set_num_threads(1)
from laws import law_of
from rlrazor.errors import RazorError
from rlrazor.guard import ranks
from rlrazor.guard.base_side import BaseSide
from rlrazor.guard.law_file import LawFile
from rlrazor.guard.log import Log
from tiny_models import tiny_llama
from watching import leave, trainer_of, watch

out = Path(sys.argv[1])
PLACES = {
    "set-up": (BaseSide, "of"), "log": (Log, "begin"), "plan": (BaseSide, "thinned"), "measure": (BaseSide, "measure"),
    "forecast": (LawFile, "forecast"), "write": (Log, "add"),
}
found = {}


def failing(place, rank):
    owner, name = PLACES[place]
    original = getattr(owner, name)

    def boom(*given, **named):
        if ranks.rank() == rank:
            raise TypeError(f"{place} in {rank}")
        return original(*given, **named)

    setattr(owner, name, boom)
    return lambda: setattr(owner, name, original)


for rank in (0, 1, None):
    for place in PLACES if rank is not None else ("nowhere",):
        model = tiny_llama()
        law, own = law_of(model, scale=20.0), out / f"{place}-{rank}"
        every = None if place == "plan" else 1
        original = BaseSide.__dict__["of"]
        repair = failing(place, rank) if place != "set-up" and rank is not None else lambda: None
        if place == "set-up":
            made = BaseSide.of
            def of(*given, **named):
                if ranks.rank() == rank:
                    raise TypeError(f"set-up in {rank}")
                return made(*given, **named)
            BaseSide.of = of
            repair = lambda: setattr(BaseSide, "of", original)
        try:
            watching = watch(own, law, every=every)
            trainer = trainer_of(own, [watching], model, max_steps=3, per_device_train_batch_size=4)
            trainer.train()
            found[f"{place} {rank}"] = [trainer.state.global_step, watching.is_off, len(watching.readings)]
        except Exception as error:
            found[f"{place} {rank}"] = f"{type(error).__name__}: {error}"
        finally:
            repair()
(out / f"found-{ranks.rank()}.json").write_text(json.dumps(found))
leave()
"""


def test_no_process_waits_for_one_that_has_failed(tmp_path: Path) -> None:
    """Each of two fails in turn, wherever it can; both go on training or end, and neither hangs."""
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    tests = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")])}
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*run, str(tmp_path / "script.py"), str(tmp_path)],
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        timeout=TIME_LIMIT,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    found = [json.loads((tmp_path / f"found-{rank}.json").read_text()) for rank in (0, 1)]
    for mine in found:
        assert mine["nowhere None"] == [3, False, 3]
        assert mine["log 1"] == mine["write 1"] == [3, False, 3]  # the first process alone writes
        for place in ("plan 0", "plan 1", "measure 0", "measure 1"):
            assert mine[place] == [3, True, 0], place
        assert [mine[f"forecast {rank}"][:2] for rank in (0, 1)] == [[3, True]] * 2
        assert mine["write 0"][:2] == [3, True]
    sentence = "ForgettingMonitor cannot measure this model, LlamaForCausalLM: TypeError: set-up in {}."
    for rank in (0, 1):
        for failed in (0, 1):
            own = found[rank][f"set-up {failed}"]
            assert own.startswith("RazorError: ")
            assert sentence.format(failed) in own
            assert (f"Process {failed} has failed, and all end with it." in own) == (rank != failed)
    assert "log in 0" in found[0]["log 0"]
    assert found[1]["log 0"] == "RazorError: Process 0 has failed, and all end with it. TypeError: log in 0"
