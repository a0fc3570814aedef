"""Outcomes of items beside the base's: who is set beside whom, what is refused, and the file of a run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from rlrazor.errors import RazorError
from rlrazor.experiments.language.outcomes import beside_base, items_of, questions_of
from rlrazor.lm.scores import ItemResults, Question, Score
from rlrazor.runs import items
from rlrazor.runs.records import Record, RunSpec
from rlrazor.runs.store import Checkpoint, RunStore

SPEC = RunSpec("toy", "sft", {"lr": 1e-4, "schedule": "constant", "epochs": 1}, 0)


def scores(shift: float = 0.0, hits: str = "1100") -> dict[str, Score]:
    """A group of two tasks, one of which has the same row twice; and one without choices."""
    names = [f"{at}-same" for at in range(len(hits))]
    outcomes = dict(zip(names, map(float, hits), strict=True))
    asked = {name: Question("?", ("a", "b"), (-1.0 - shift, -2.0), (0,)) for name in names}
    group = ItemResults({"g_x": outcomes, "g_y": {"0-y": 1.0}}, questions={"g_x": asked}, categories={"g_x": "hard"})
    return {
        "g": Score(0.5, 0.1, 5, "acc", "1", items=group),
        "said": Score(0.5, 0.1, 1, "exact_match", "1", items=ItemResults({"said": {"0-s": 0.25}})),
        "perplexity": Score(12.0, None, 1, "perplexity", "1", higher_is_better=False),
    }


def checkpoint(step: int, of: pl.DataFrame | None) -> Checkpoint:
    return Checkpoint(Record(SPEC.run_id, step, step / 2, 0.5, {"p": 0.7}, {}), items=of)


def test_a_models_outcomes_stand_beside_the_bases_item_by_item() -> None:
    base, tuned = items_of(scores()), items_of(scores(shift=3.0, hits="0110"))
    assert base is not None
    assert tuned is not None
    found = beside_base(base.sample(fraction=1.0, shuffle=True, seed=1), tuned)  # whatever the order
    assert found is not None
    assert found.columns == list(items.BESIDE)
    rows = found.filter(pl.col("task") == "g_x").rows(named=True)
    assert [(row["item"], row["base"], row["tuned"]) for row in rows] == [
        ("0-same", 1.0, 0.0), ("1-same", 1.0, 1.0), ("2-same", 0.0, 1.0), ("3-same", 0.0, 0.0),
    ]  # fmt: skip
    assert {(row["prior"], row["category"], row["choices"]) for row in rows} == {("g", "hard", 2)}
    assert (rows[0]["right"], rows[0]["base_logprobs"], rows[0]["tuned_logprobs"]) == ([0], [-1, -2], [-4, -2])
    (said,) = found.filter(pl.col("prior") == "said").rows(named=True)
    assert (said["base"], said["choices"], said["right"], said["base_logprobs"]) == (0.25, None, None, None)
    assert set(found["prior"]) == {"g", "said"}  # perplexity is no mean of outcomes


def test_without_any_outcome_there_is_nothing() -> None:
    assert items_of({"perplexity": scores()["perplexity"]}) is None
    assert beside_base(items_of(scores()), None) is None


def test_what_one_of_the_two_does_not_know_is_null() -> None:
    one, both = {"g": scores()["g"]}, scores()
    found = beside_base(items_of(one), items_of(both))
    assert found is not None
    assert found.filter(pl.col("prior") == "said").select("base", "tuned").rows() == [(None, 0.25)]
    gone = beside_base(items_of(both), items_of(one))
    assert gone is not None
    assert gone.filter(pl.col("prior") == "said").select("base", "tuned").rows() == [(0.25, None)]
    alone = beside_base(None, items_of(both))
    assert alone is not None
    assert alone["base"].null_count() == len(alone) == 6


@pytest.mark.parametrize(("hits", "said"), [("110", "0 of them are new, and 1 are"), ("11001", "1 of them are new")])
def test_other_items_than_the_bases_are_refused(hits: str, said: str) -> None:
    with pytest.raises(RazorError, match=f"prior task g are not those that the base was scored on: {said}"):
        beside_base(items_of(scores()), items_of(scores(hits=hits)))


def test_a_runs_file_has_all_its_checkpoints_and_is_read_back(tmp_path: Path) -> None:
    store, own = RunStore(tmp_path), beside_base(items_of(scores()), items_of(scores(hits="0001")))
    assert own is not None
    store.write(SPEC, [checkpoint(1, own), checkpoint(2, None), checkpoint(3, own)], seconds=0)
    found = store.items(SPEC.run_id)
    assert dict(found.schema) == items.SCHEMA
    assert found["step"].unique().to_list() == [1, 3]
    assert_frame_equal(found.filter(pl.col("step") == 3).drop("step"), own)
    assert_frame_equal(items.outcomes_of(found, 3, "base"), items_of(scores()), check_row_order=False)  # type: ignore[arg-type]
    store.write(SPEC, [checkpoint(1, None)], seconds=0)
    assert not store.has_items(SPEC.run_id)
    with pytest.raises(RazorError, match="it is not known what became of each item"):
        store.items(SPEC.run_id)


def test_a_model_whose_likelihoods_were_no_numbers_is_read_back(tmp_path: Path) -> None:
    """Beside those of the base, which were."""
    without = {
        name: replace(score, items=replace(score.items, questions={})) for name, score in scores(hits="0001").items()
    }
    own = beside_base(items_of(scores()), items_of(without))
    assert own is not None
    store = RunStore(tmp_path)
    store.write(SPEC, [checkpoint(1, own)], seconds=0)
    found = store.items(SPEC.run_id).filter(pl.col("task") == "g_x")
    assert found["choices"].null_count() == found["tuned_logprobs"].null_count() == len(found)
    assert found["base_logprobs"].null_count() == 0


def test_a_full_disk_leaves_the_run_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, own = RunStore(tmp_path), beside_base(None, items_of(scores()))
    store.write(SPEC, [checkpoint(1, own)], seconds=0)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full(table: pl.DataFrame) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(items, "to_bytes", full)
    with pytest.raises(RazorError, match="No space left"):
        store.write(SPEC, [checkpoint(1, own)], seconds=0)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_what_the_items_ask_lies_beside_the_bases_outcomes(tmp_path: Path) -> None:
    asked = questions_of(scores())
    assert asked is not None
    assert asked.filter(pl.col("item") == "1-same").rows() == [("g", "g_x", "1-same", "?", ["a", "b"])]
    assert set(asked["task"]) == {"g_x"}  # of the others nothing is known
    store = RunStore(tmp_path)
    assert store.questions(SPEC.run_id) is None
    store.write(SPEC, [replace(checkpoint(0, None), questions=asked)], seconds=0)
    found = store.questions(SPEC.run_id)
    assert found is not None
    assert_frame_equal(found, asked)
    assert dict(found.schema) == items.ASKED
    (path,) = tmp_path.rglob(items.QUESTIONS)
    for wrong in (asked.drop("answers"), pl.concat([asked, asked]), asked.with_columns(prompt=pl.lit(None, pl.String))):
        path.write_bytes(items.to_bytes(wrong))
        with pytest.raises(RazorError, match=r"cannot be read.*questions.parquet is damaged"):
            store.questions(SPEC.run_id)
    store.write(SPEC, [checkpoint(0, None)], seconds=0)
    assert store.questions(SPEC.run_id) is None
    assert questions_of({"perplexity": scores()["perplexity"]}) is None


def damaged(own: pl.DataFrame) -> dict[str, Any]:
    return {
        "without a column": own.drop("tuned"),
        "with another type": own.with_columns(pl.col("tuned").cast(pl.String)),
        "an item without a name": own.with_columns(item=pl.lit(None, pl.String)),
        "an outcome that is no number": own.with_columns(tuned=pl.lit(float("nan"))),
        "an item that is there twice": pl.concat([own, own[:1]]),
        "a log-likelihood that is no number": own.with_columns(tuned_logprobs=pl.lit([float("nan"), 1.0])),
        "fewer log-likelihoods than answers": own.with_columns(tuned_logprobs=pl.lit([-1.0])),
    }


@pytest.mark.parametrize("how", [*damaged(pl.DataFrame({"tuned": [1.0], "item": ["a"]})), "cut off"])
def test_a_damaged_file_is_one_sentence(how: str, tmp_path: Path) -> None:
    store, own = RunStore(tmp_path), beside_base(None, items_of(scores()))
    store.write(SPEC, [replace(checkpoint(1, own))], seconds=0)
    (path,) = tmp_path.rglob(items.NAME)
    if how == "cut off":
        path.write_bytes(path.read_bytes()[:-20])
    else:
        path.write_bytes(items.to_bytes(damaged(store.items(SPEC.run_id))[how]))
    with pytest.raises(RazorError, match=r"cannot be read.*items.parquet is damaged.*run the same command again"):
        store.items(SPEC.run_id)
