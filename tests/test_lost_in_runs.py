"""What runs lost and gained, item by item, against loops over made-up outcomes; and of the runs that are kept."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from rlrazor.analysis.lost import Transitions, transitions
from rlrazor.analysis.lost_in_runs import (
    NOT_RIGHT_OR_WRONG,
    OTHERS,
    UNKNOWN,
    changes_of,
    surest_in_runs,
)
from rlrazor.runs.items import SCHEMA
from rlrazor.runs.store import RunStore

KEPT = Path(__file__).parents[1] / "docs" / "language" / "smollm2" / "run"
GROUP = {f"group_{at}": ("easy" if at < 3 else "hard") for at in range(10)}  # task -> category


def row(run: str, prior: str, item: str, base: float | None, tuned: float | None, **more: Any) -> dict[str, Any]:
    named = {"run": run, "step": 5, "prior": prior, "task": prior, "category": None, "item": item}
    return {**dict.fromkeys(SCHEMA), **named, "base": base, "tuned": tuned, **more}


def table(rows: Sequence[Mapping[str, Any]]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema={"run": pl.String, **SCHEMA}, orient="row")


def made_up(runs: int = 3, seed: int = 0) -> pl.DataFrame:
    """A task without choices and a group of ten tasks with four, in another order in each run."""
    rng, rows = np.random.default_rng(seed), []
    for run in range(runs):
        own = []
        for at in range(40):
            base, tuned = map(float, rng.random(2) < (0.7, 0.5))
            own.append(row(f"run {run}", "said", f"{at}-said", base, tuned))
        for task, category in GROUP.items():
            for at in range(6):
                base, tuned = map(float, rng.random(2) < (0.6, 0.5))
                asked = {"task": task, "category": category, "choices": 4, "right": [1]}
                own.append(row(f"run {run}", "group", f"{at}-{task}", base, tuned, **asked))
        rows += [own[at] for at in rng.permutation(len(own))]
    return table(rows)


def outcomes(items: pl.DataFrame, prior: str, category: str | None = None) -> tuple[Any, Any, list[str]]:
    """(R, N) outcomes of the base and of the tuned model by a loop, and the task of each item."""
    rows = [
        one for one in items.to_dicts() if one["prior"] == prior and (category is None or one["category"] == category)
    ]
    names = sorted({(one["task"], one["item"]) for one in rows})
    runs = sorted({one["run"] for one in rows})
    by_name = {(one["run"], one["task"], one["item"]): one for one in rows}
    base, tuned = ([[by_name[run, *name][of] for name in names] for run in runs] for of in ("base", "tuned"))
    return base, tuned, [task for task, _ in names]


def numbers_of(of: Transitions) -> list[float | None]:
    """All of them, whatever the order of the runs that sums were taken in."""
    flows = [
        (one.count, one.share, *one.interval, one.adjusted, *(one.adjusted_interval or ()))
        for one in (of.lost, of.gained)
    ]
    return [of.n, of.drop, *of.interval, of.p or -1, of.clusters or -1, of.runs, *flows[0], *flows[1]]


def test_each_task_and_each_category_is_counted_over_the_same_items_of_all_runs() -> None:
    items = made_up()
    seen = changes_of(items, 0.9)
    base, tuned, _ = outcomes(items, "said")
    assert seen.tasks["said"] == transitions(base, tuned, 0.9)
    base, tuned, tasks = outcomes(items, "group")
    group = transitions(base, tuned, 0.9, choices_N=[4] * 60, clusters_N=tasks)
    assert group is not None
    assert numbers_of(seen.tasks["group"]) == pytest.approx(numbers_of(group))
    assert seen.tasks["group"].clusters == 10
    assert set(seen.categories) == {"group"}
    assert set(seen.categories["group"]) == {"easy", "hard"}
    for category, one in seen.categories["group"].items():
        base, tuned, tasks = outcomes(items, "group", category)
        assert one.lost.count == sum(
            b > t for bs, ts in zip(base, tuned, strict=True) for b, t in zip(bs, ts, strict=True)
        )
        assert one.drop == pytest.approx(np.mean(base) - np.mean(tuned))
        assert one.n == len(tasks)
    assert seen.whole is not None
    assert seen.whole.drop == pytest.approx((seen.tasks["said"].drop + seen.tasks["group"].drop) / 2)
    assert seen.left_out == {}


def test_a_group_without_categories_has_its_tasks_for_them() -> None:
    seen = changes_of(made_up().with_columns(category=pl.lit(None, pl.String)), 0.9)
    assert list(seen.categories) == ["group"]
    assert set(seen.categories["group"]) == set(GROUP)


@pytest.mark.parametrize("clusters", [True, False])
def test_a_category_of_one_task_is_of_a_group_all_the_same(clusters: bool) -> None:
    """Its items may be lost together, as those of one cluster, of which there are too few to tell."""
    items = made_up().filter(
        pl.col("task").is_in(["group_0", "group_5", "group_6"]) if clusters else pl.lit(value=True)
    )
    easy = changes_of(items, 0.9).categories["group"]["easy"]
    assert easy.clusters is None


def test_what_cannot_be_counted_is_left_out_and_why() -> None:
    items = made_up()
    of_run = (pl.col("run") == "run 1") & (pl.col("prior") == "said")
    one = pl.col("item") == "3-said"

    def changed(how: pl.Expr, name: str) -> Mapping[str, str]:
        return changes_of(items.with_columns(how.alias(name)), 0.9).left_out

    assert changed(pl.when(of_run & one).then(None).otherwise("base"), "base") == {"said": UNKNOWN}
    assert changed(pl.when(of_run & one).then(pl.lit("3-other")).otherwise("item"), "item") == {"said": OTHERS}
    assert changed(pl.when(of_run & one).then(0.5).otherwise("tuned"), "tuned") == {"said": NOT_RIGHT_OR_WRONG}
    assert changes_of(items.filter(~of_run), 0.9).left_out == {"said": UNKNOWN}
    assert changes_of(items.filter(~(of_run & one)), 0.9).left_out == {"said": OTHERS}
    nothing = changes_of(items.with_columns(base=pl.lit(None, pl.Float64)), 0.9)
    assert (nothing.whole, nothing.tasks, set(nothing.left_out)) == (None, {}, {"said", "group"})


def chosen(item: str, run: str, fall: float, prior: str = "a", lost: bool = True, said: int = 1) -> dict[str, Any]:
    """An item with three answers, the first of which is right; its margin was 1 and fell by so much."""
    wrong = [-2.0, -2.0]
    wrong[said - 1] = -2.0 + fall
    likely = {"base_logprobs": [-1.0, -2.0, -2.0], "tuned_logprobs": [-1.0, *wrong]}
    return row(run, prior, item, 1.0, 0.0 if lost else 1.0, choices=3, right=[0], **likely)


def test_first_is_what_most_runs_lost_then_what_fell_furthest_task_by_task_in_turn() -> None:
    def kept(item: str, run: str, prior: str = "a") -> dict[str, Any]:
        return chosen(item, run, 0.5, prior, lost=False)

    of_m = [*(chosen("everywhere", run, 1.2, said=2) for run in "pq"), chosen("near", "p", 1.5)]
    of_m += [kept("near", "q"), kept("z", "p", "b"), kept("z", "q", "b")]
    of_n = [chosen("everywhere", "r", 1.8), chosen("x", "r", 3.0), chosen("y", "r", 9.0), kept("near", "r")]
    of_n += [chosen("z", "r", 0.1, "b"), chosen("alone", "r", 0.1, "c")]
    methods = {"m": table(of_m), "n": table(of_n)}
    found = surest_in_runs(methods)
    assert [one.item for one in found] == ["everywhere", "alone", "y", "z", "x", "near"]
    first, last = found[0], found[-1]
    assert (first.runs, first.share) == ({"m": (2, 2), "n": (1, 1)}, 1.0)
    assert first.fall == pytest.approx((1.2 + 1.2 + 1.8) / 3)
    assert (first.right, first.said) == (0, 2)  # two of three runs took it
    assert last.share == pytest.approx((1 / 2 + 0) / 2)
    assert found[1].runs == {"n": (1, 1)}  # the other method was never asked
    assert found[2].runs == {"m": (0, 2), "n": (1, 1)}
    assert [one.item for one in surest_in_runs(methods, 2)] == ["everywhere", "alone"]


def test_without_likelihoods_there_are_no_falls_and_without_losses_nothing() -> None:
    lost = table([row("p", "a", f"{at}", 1.0, 0.0) for at in range(12)])
    found = surest_in_runs({"m": lost})
    assert len(found) == 10
    assert {(one.fall, one.right, one.said) for one in found} == {(None, None, None)}
    assert surest_in_runs({"m": lost.with_columns(tuned=pl.lit(1.0))}) == surest_in_runs({}) == []


README = {  # docs/language/smollm2/README.md: lost, gained, and the net drops of the three tasks in points
    "sft-fixed": (17, 8, {"hellaswag": (1.8, -0.9, 4.9), "truthfulqa_mc1": (0.4, -2.5, 3.5), "mmlu": (1.8, -0.9, 4.9)}),
    "grpo": (8, 2, {"hellaswag": (0.9, -1.6, 3.7), "truthfulqa_mc1": (1.3, -0.4, 3.8), "mmlu": (0.4, -1.2, 2.4)}),
    "reinforce": (6, 2, {"hellaswag": (0.9, -1.3, 3.4), "truthfulqa_mc1": (0.4, -1.6, 2.8), "mmlu": (0.4, -1.2, 2.4)}),
}


@pytest.mark.parametrize("method", README)
def test_the_runs_that_are_kept_lost_and_gained_what_is_written_of_them(method: str) -> None:
    records = pl.read_parquet(KEPT / "records.parquet")
    (record,) = records.filter(method=method).to_dicts()
    spec = json.loads((KEPT / "runs" / record["run_id"] / "spec.json").read_text())
    assert spec["method"] == method
    seen = changes_of(RunStore(KEPT).items(record["run_id"]).with_columns(run=pl.lit(record["run_id"])), 0.95)
    lost, gained, tasks = README[method]
    assert seen.whole is not None
    assert (seen.whole.n, seen.whole.lost.count, seen.whole.gained.count) == (684, lost, gained)
    assert seen.whole.drop == pytest.approx(record["forgetting"])
    for name, shown in tasks.items():
        one = seen.tasks[name]
        assert tuple(round(100 * value, 1) for value in (one.drop, *one.interval)) == shown
    assert set(seen.categories["mmlu"]) == {
        f"mmlu_{name}" for name in ("stem", "other", "social_sciences", "humanities")
    }
