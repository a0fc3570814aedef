"""Run identity, and the table that analysis reads."""

import math

import pytest

from rlrazor.errors import RazorError
from rlrazor.runs.records import BASE, Record, RunSpec, to_table


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
        tuned = spec(seed=seed)
        runs += [(base, [record(base, 0, 0.5, base_prior, kl=0.0)]), (tuned, [record(tuned, 5, 0.9, 0.4, kl=0.3)])]
    table = to_table(runs)
    assert table["method"].to_list() == [BASE, "grpo", BASE, "grpo"]
    assert table["prior"].to_list() == pytest.approx([0.6, 0.3, 0.45, 0.3])  # the mean of both prior tasks
    assert table["forgetting"].to_list() == pytest.approx([0, 0.3, 0, 0.15])
    assert table["prior_b"].to_list() == pytest.approx([0.4, 0.2, 0.3, 0.2])
    assert table["lr"].to_list() == [None, 1e-4, None, 1e-4]
    assert table["kl"].to_list() == [0.0, 0.3, 0.0, 0.3]


def test_a_record_refuses_what_is_not_a_number() -> None:
    with pytest.raises(ValueError, match="kl is not a finite number"):
        Record("run", 1, 0.1, 0.5, {"a": 0.5}, {"kl": math.nan})


def test_without_prior_tasks_there_is_no_forgetting_to_tabulate() -> None:
    base = RunSpec("toy", BASE, {}, 0)
    alone = Record(base.run_id, 0, 0.0, 0.5, {}, {})
    assert math.isnan(alone.prior_mean)
    with pytest.raises(RazorError, match="measured without prior tasks"):
        to_table([(base, [alone])])
