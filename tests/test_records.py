"""Run identity, and the table that analysis reads."""

import json
import math
from dataclasses import replace

import pytest

from rlrazor.errors import RazorError
from rlrazor.runs.records import BASE, Ancestor, Record, RunSpec, to_table
from rlrazor.runs.run_files import StoredRun


def spec(method: str = "grpo", seed: int = 0, **params: object) -> RunSpec:
    return RunSpec("toy", method, {"lr": 1e-4, "schedule": "constant", "epochs": 1, **params}, seed)


def record(run: RunSpec, step: int, new: float, prior: float, **drift: float) -> Record:
    return Record(run.run_id, step, step / 10, new, {"a": prior, "b": prior / 2}, drift)


def test_run_id_is_of_the_content_not_of_the_order() -> None:
    one = RunSpec("toy", "grpo", {"lr": 1e-4, "epochs": 1}, 0)
    same = RunSpec("toy", "grpo", {"epochs": 1, "lr": 1e-4}, 0)
    assert one.run_id == same.run_id
    assert hash(one) == hash(same)
    others = [RunSpec("toy", "grpo", {"lr": 1e-4, "epochs": 1}, 1), RunSpec("toy", "sft", {"lr": 1e-4, "epochs": 1}, 0)]
    assert len({one.run_id, *(other.run_id for other in others), RunSpec("toy", "grpo", {"lr": 2e-4}, 0).run_id}) == 4


def test_only_constant_schedules_share_a_trajectory() -> None:
    assert spec(epochs=1).trajectory == spec(epochs=2).trajectory
    assert spec(epochs=1).run_id != spec(epochs=2).run_id
    assert spec(epochs=1, schedule="cosine").trajectory != spec(epochs=2, schedule="cosine").trajectory
    assert spec(epochs=1).trajectory != spec(epochs=1, lr=2e-4).trajectory
    assert spec(epochs=1).trajectory != spec(epochs=1, seed=1).trajectory


def test_table_counts_forgetting_from_the_base_of_the_same_seed() -> None:
    runs = []
    for seed, base_prior in ((0, 0.8), (1, 0.6)):
        base = RunSpec("toy", BASE, {}, seed)
        tuned = replace(spec(seed=seed), starts_from=Ancestor(base, 0))
        runs += [(base, [record(base, 0, 0.5, base_prior, kl=0.0)]), (tuned, [record(tuned, 5, 0.9, 0.4, kl=0.3)])]
    table = to_table(runs)
    assert table["method"].to_list() == [BASE, "grpo", BASE, "grpo"]
    assert table["prior"].to_list() == pytest.approx([0.6, 0.3, 0.45, 0.3])  # the mean of both prior tasks
    assert table["forgetting"].to_list() == pytest.approx([0, 0.3, 0, 0.15])
    assert table["prior_b"].to_list() == pytest.approx([0.4, 0.2, 0.3, 0.2])
    assert table["lr"].to_list() == [None, 1e-4, None, 1e-4]
    assert table["kl"].to_list() == [0.0, 0.3, 0.0, 0.3]


def test_forgetting_is_counted_from_any_ancestor_that_is_named() -> None:
    base = RunSpec("toy", BASE, {}, 0)
    first = replace(spec(), starts_from=Ancestor(base, 0))
    second = replace(spec(), starts_from=Ancestor(first, 5))
    third = replace(spec(), starts_from=Ancestor(second, 5))
    scores = {base: 0.8, first: 0.7, second: 0.4, third: 0.5}
    runs = [(one, [record(one, 0 if one == base else 5, 0.5, prior, kl=0.1)]) for one, prior in scores.items()]
    table = to_table(runs, {"before": lambda one: one.starts_from, "first": lambda one: (*one.chain, None, None)[1]})
    before, of_first = (table[f"forgetting_since_{name}"].to_list() for name in ("before", "first"))
    # A record's prior is the mean of `prior` and half of it.
    assert table["forgetting"].to_list() == pytest.approx([0, 0.075, 0.3, 0.225])
    assert before == [None, *(pytest.approx(drop) for drop in (0.075, 0.225, -0.075))]
    assert of_first == [None, None, *(pytest.approx(drop) for drop in (0.225, 0.15))]
    assert not [name for name in to_table(runs).columns if "since" in name]


def test_an_id_is_of_all_that_the_run_comes_from() -> None:
    base = RunSpec("toy", BASE, {"size": 5}, 0)
    first = replace(spec(), starts_from=Ancestor(base, 0))
    second = replace(spec(), starts_from=Ancestor(first, 10), teacher=Ancestor(first, 5))
    others = [
        spec(),
        first,
        second,
        replace(second, starts_from=Ancestor(first, 9)),
        replace(second, teacher=None),
        replace(second, teacher=Ancestor(base, 5)),
        replace(second, starts_from=Ancestor(replace(first, starts_from=Ancestor(replace(base, seed=1), 0)), 10)),
    ]
    assert len({one.run_id for one in others}) == len({one.trajectory for one in others}) == len(others)
    assert [str(of) for of in second.chain] == [f"{base.run_id}/0", f"{first.run_id}/10"]
    assert (second.root, first.root, base.root) == (base, base, base)
    assert second.settings == {"size": 5, "lr": 1e-4, "schedule": "constant", "epochs": 1}
    longer = replace(second, params={**second.params, "epochs": 2})
    assert longer.trajectory == second.trajectory
    stored = json.loads(json.dumps(second.as_json()))
    assert StoredRun.model_validate(stored).spec() == second
    stored["starts_from"]["spec"]["starts_from"]["step"] = 1
    assert StoredRun.model_validate(stored).spec().run_id != second.run_id


def test_forgetting_is_counted_from_the_first_of_a_chain_or_from_a_named_one() -> None:
    base = RunSpec("toy", BASE, {"size": 5}, 0)
    first = replace(spec(lr=1e-3), starts_from=Ancestor(base, 0))
    second = replace(spec(), starts_from=Ancestor(first, 2), teacher=Ancestor(first, 1))
    runs = [
        (base, [record(base, 0, 0.1, 0.8)]),
        (first, [record(first, 1, 0.5, 0.7), record(first, 2, 0.5, 0.6)]),
        (second, [record(second, 1, 0.5, 0.5), record(second, 2, 0.5, 0.4)]),
    ]
    # The prior score is the mean of a task's and of half of it.
    since = to_table(runs)
    assert since["forgetting"].to_list() == pytest.approx([0.75 * lost for lost in (0, 0.1, 0.2, 0.3, 0.4)])
    assert since["teacher"].to_list() == [None] * 3 + [f"{first.run_id}/1"] * 2
    assert since["size"].to_list() == [5] * 5
    assert since["lr"].to_list() == [None, 1e-3, 1e-3, 1e-4, 1e-4]
    assert "teacher" not in to_table(runs[:2]).columns
    with pytest.raises(ValueError, match="starts from nothing"):
        to_table([(spec(), [record(spec(), 1, 0.5, 0.5)])])


def test_a_record_refuses_what_is_not_a_number() -> None:
    with pytest.raises(ValueError, match="kl is not a finite number"):
        Record("run", 1, 0.1, 0.5, {"a": 0.5}, {"kl": math.nan})


def test_without_prior_tasks_there_is_no_forgetting_to_tabulate() -> None:
    base = RunSpec("toy", BASE, {}, 0)
    alone = Record(base.run_id, 0, 0.0, 0.5, {}, {})
    assert math.isnan(alone.prior_mean)
    with pytest.raises(RazorError, match="measured without prior tasks"):
        to_table([(base, [alone])])
