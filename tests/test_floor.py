"""The noise floor of a sweep: measured once, kept beside the records, shown beside each drop."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlrazor.cli import floor as of_sweep
from rlrazor.cli import main
from rlrazor.errors import RazorError
from rlrazor.experiments.language.config import resolve
from rlrazor.experiments.language.setup import PriorSource
from rlrazor.lm import noise_floor
from rlrazor.lm.prior import BATCH, PriorTasks
from rlrazor.lm.scores import PriorScores, Score
from rlrazor.runs import floor
from rlrazor.runs.floor import Floor
from rlrazor.system.terminal import Terminal
from tiny_models import char_tokenizer, saved, tiny_llama

FOUND = Floor(of="0" * 16, how=["in batches of 4", "in bfloat16"], tasks={"copy": 0.02, "sort": 0.0}, mean=0.01)


def test_it_is_kept_and_read_again(tmp_path: Path) -> None:
    assert floor.read(tmp_path) is None
    floor.write(tmp_path, FOUND)
    assert floor.read(tmp_path) == FOUND
    (tmp_path / floor.FILE).write_text("{")
    with pytest.raises(RazorError, match=r"noise_floor\.json"):
        floor.read(tmp_path)


def test_of_a_part_of_the_tasks_nothing_is_known() -> None:
    assert FOUND.of_part(["copy"]) == 0.02
    assert FOUND.of_part(["sort", "copy"]) == 0.01
    assert FOUND.of_part(["other"]) is None
    three = FOUND.model_copy(update={"tasks": {**FOUND.tasks, "third": 0.0}})
    assert three.of_part(["copy", "sort"]) is None


def test_the_base_is_scored_otherwise_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = saved(tmp_path / "base", tiny_llama(), char_tokenizer())
    asked: list[tuple[str, int]] = []

    def scores(tasks: PriorTasks, lm: Any, told: Any = None, *, batch: int = BATCH, **_: Any) -> PriorScores:
        asked.append((str(next(lm.model.parameters()).dtype), batch))
        off = 0.1 * (batch != BATCH) + 0.3 * (asked[-1][0] == "torch.bfloat16")
        of = {"a": 0.5 - off, "b": 0.5 + off / 2}
        return PriorScores({name: Score(value, 0.1, 10, "acc", "1") for name, value in of.items()})

    monkeypatch.setattr(PriorTasks, "scores", scores)
    monkeypatch.setattr(PriorTasks, "shows_examples", lambda _: False)
    config = resolve("smollm2", {"base": str(base), "prior": "a,b", "prior_limit": "10"})
    experiment: Any = SimpleNamespace(fingerprint="f", prior=PriorSource())
    of_sweep.keep(experiment, config, tmp_path, Terminal(stderr=True))
    assert asked == [("torch.float32", BATCH), ("torch.float32", BATCH // 2), ("torch.bfloat16", BATCH)]
    found = floor.read(tmp_path)
    assert found is not None
    assert found.tasks == {"a": pytest.approx(0.3), "b": pytest.approx(0.15)}
    assert found.mean == pytest.approx(0.075)  # of the mean of the two drops, .3 and -.15
    assert found.how == [f"in batches of {noise_floor.OTHER_BATCH}", "in bfloat16"]
    asked.clear()
    of_sweep.keep(experiment, config, tmp_path, Terminal(stderr=True))
    assert asked == []
    fewer = resolve("smollm2", {"base": str(base), "prior": "a,b", "prior_limit": "9"})
    of_sweep.keep(experiment, fewer, tmp_path, Terminal(stderr=True))
    assert len(asked) == 3


def test_the_tiny_base_has_none(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["reproduce", "language", "--noise-floor", "--out", str(out)]) == 2
    assert "leave --noise-floor out" in capsys.readouterr().err
    assert not out.exists()


def test_it_is_json_for_people(tmp_path: Path) -> None:
    floor.write(tmp_path, FOUND)
    assert json.loads((tmp_path / floor.FILE).read_text())["tasks"] == {"copy": 0.02, "sort": 0.0}
