"""The rule of comparisons at matched new-task score: by a loop, and on tables whose answers are known."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
import pytest

import matched_loops
from rlrazor.analysis.matched import budgets, by_rate, matched, matched_or_last

AT = 0.95
Forgotten = Mapping[tuple[float, int], float | None]
"""Learning rate and seed -> what is forgotten where the run gets to AT; None: it does not."""


def runs(method: str, forgotten: Forgotten) -> list[dict[str, Any]]:
    """Three checkpoints a run: below AT, where it gets there, and beyond, with something forgotten at each."""
    rows = []
    for (lr, seed), lost in forgotten.items():
        news = (0.90, 0.94, 0.945) if lost is None else (0.90, 0.96, 0.97)
        drops = (0.0, 0.01, 0.02) if lost is None else (0.0, lost, lost / 2)
        for step, (new, drop) in enumerate(zip(news, drops, strict=True), 1):
            base = 0.8 + 0.02 * seed
            rows.append(
                {"method": method, "lr": lr, "schedule": "constant", "epochs": 1, "seed": seed, "step": step}
                | {"trajectory": f"{method} {lr} {seed}", "new": new, "prior": base - drop, "forgetting": drop}
            )
    return rows


def table(**methods: Forgotten) -> pl.DataFrame:
    return pl.DataFrame([row for name, forgotten in methods.items() for row in runs(name, forgotten)])


def grid(*by_lr: Sequence[float | None]) -> Forgotten:
    """A row of seeds for each learning rate: 1e-4, 2e-4, ..."""
    return {(1e-4 * place, seed): lost for place, of in enumerate(by_lr, 1) for seed, lost in enumerate(of)}


def reported(points: pl.DataFrame, method: str, at: float = AT) -> dict[int, tuple[float, float]]:
    """Seed -> learning rate and forgetting."""
    found = matched(points, ["method"], at).filter(method=method)
    return {row["seed"]: (row["lr"], row["forgetting"]) for row in found.to_dicts()}


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_what_is_reported_is_what_a_loop_finds(seeds: int) -> None:
    rng = np.random.default_rng(seeds)
    rows = [
        {"method": method, "lr": 1e-4 * (1 + lr), "schedule": "cosine", "epochs": 1, "seed": seed, "step": step}
        | {"trajectory": f"{method} {lr} {seed}", "new": 0.85 + 0.12 * float(rng.random())}
        | {"prior": 0.8 - (lost := float(rng.random())), "forgetting": lost}
        for method in ("b", "a")
        for lr in range(6)
        for seed in range(seeds)
        for step in (3, 1, 2)
        if rng.random() < 0.9
    ]
    points = pl.DataFrame(rows)
    for at in (0.9, 0.94, 0.96):
        found = {(row["method"], row["seed"]): row for row in matched(points, ["method"], at).to_dicts()}
        assert found == matched_loops.reported(points.to_dicts(), at)
        assert matched(points, ["method"], at).columns == points.columns
    assert matched(points, ["method"], 0.99).is_empty()


def test_no_seeds_luck_has_a_part_in_its_own_choice() -> None:
    """Each seed has a learning rate that did well by chance, there alone: the least of the same numbers would be 0."""
    lucky = ((0.0, 0.2, 0.2), (0.2, 0.0, 0.2), (0.2, 0.2, 0.0))
    assert reported(table(a=grid(*lucky)), "a") == {0: (2e-4, 0.2), 1: (1e-4, 0.2), 2: (1e-4, 0.2)}
    sure = reported(table(a=grid(*lucky, (0.09, 0.09, 0.09))), "a")
    assert {seed: round(lr, 9) for seed, (lr, _) in sure.items()} == dict.fromkeys(range(3), 4e-4)
    assert {lost for _, lost in sure.values()} == {0.09}
    # In the mean over many tables of noise the rule is right about it, and the least of the same numbers is not.
    rng = np.random.default_rng(0)
    honest, flattered = [], []
    for _ in range(100):
        noise = rng.normal(0.3, 0.05, size=(6, 3))
        points = table(a=grid(*noise.tolist()))
        honest.append(np.mean([lost for _, lost in reported(points, "a").values()]))
        flattered.append(noise.min(axis=0).mean())
    assert np.mean(honest) == pytest.approx(0.3, abs=3 * 0.05 / 300**0.5)
    assert np.mean(flattered) < 0.25


def test_a_run_stops_where_it_gets_there_though_it_keeps_more_later() -> None:
    """Every run forgets half as much at its last checkpoint, which the rule does not look at."""
    assert reported(table(a=grid((0.2, 0.2))), "a") == {0: (1e-4, 0.2), 1: (1e-4, 0.2)}


def test_who_never_gets_there_has_no_number_and_who_gets_there_elsewhere_comes_first() -> None:
    points = table(
        never=grid((None, None, None), (None, None, None)),
        # The first forgets least, but gets there in two seeds; the second in all three.
        some=grid((0.05, 0.05, None), (0.1, 0.11, 0.12)),
        # Gets there in one seed alone, of which no other seed tells: the lowest rate, whatever it forgets.
        once=grid((0.3, None, None), (0.1, None, None)),
    )
    assert reported(points, "never") == {}
    assert reported(points, "some") == {0: (2e-4, 0.1), 1: (2e-4, 0.11), 2: (2e-4, 0.12)}
    assert reported(points, "once") == {0: (1e-4, 0.3)}


def test_a_learning_rate_that_a_seed_lacks_is_not_chosen_there() -> None:
    forgotten = {key: lost for key, lost in grid((0.1, 0.1, 0.1), (0.2, 0.2, 0.2)).items() if key != (1e-4, 2)}
    points = table(a=forgotten, b=grid((0.1, 0.1, 0.1)))
    # In seed 2 there is the second alone; in the others it is in more of the other seeds.
    assert {seed: lr for seed, (lr, _) in reported(points, "a").items()} == dict.fromkeys(range(3), 2e-4)
    told = {row["method"]: (row["rates"], row["fewest"], row["most"]) for row in budgets(points, ["method"]).to_dicts()}
    assert told == {"a": (2, 1, 2), "b": (1, 1, 1)}
    without = points.filter((pl.col("method") == "a") | (pl.col("seed") < 2))
    assert budgets(without, ["method"])["fewest"].to_list() == [1, 0]


def test_with_one_seed_the_run_is_chosen_on_what_is_reported() -> None:
    assert reported(table(a=grid((0.2,), (0.1,), (0.3,))), "a") == {0: (2e-4, 0.1)}


def test_settings_besides_the_learning_rate_are_chosen_with_it() -> None:
    def of(schedule: str, epochs: int, trajectory: str, lost: float) -> list[pl.DataFrame]:
        rows = table(a=grid((lost, lost, lost)))
        name = pl.format("{} {}", pl.lit(trajectory), "seed")
        return [rows.with_columns(schedule=pl.lit(schedule), epochs=pl.lit(epochs), trajectory=name)]

    parts = [*of("cosine", 1, "x", 0.2), *of("cosine", 2, "y", 0.1), *of("constant", 1, "z", 0.3)]
    points = pl.concat(parts)
    assert matched(points, ["method"], AT).select("schedule", "epochs").unique().rows() == [("cosine", 2)]
    assert budgets(points, ["method"]).select("rates", "fewest", "most").rows() == [(1, 3, 3)]
    # A constant run is the beginning of a longer one: one run, of which a part has another number of epochs.
    longer = parts[2].with_columns(epochs=pl.when(pl.col("step") < 3).then(1).otherwise(2))
    assert budgets(longer, ["method"])["most"].to_list() == [1]
    assert len(matched(longer, ["method"], 0.965)) == 3
    # Of several runs of a seed with the same settings the second is alike to the others' second.
    taught = pl.concat([*of("constant", 1, "first", 0.3), *of("constant", 1, "second", 0.1)])
    assert matched(taught, ["method"], AT)["forgetting"].to_list() == [0.1] * 3


def test_groups_may_be_chosen_from_as_well_and_the_score_may_be_each_rows_own() -> None:
    points = table(a=grid((0.3, 0.1, 0.1)), b=grid((0.1, 0.2, 0.2)))
    chosen = matched(points.with_columns(family=pl.lit("all")), ["family"], AT)
    # On the other seeds b forgets .2, a .2 (seeds 0 and 1 or 2), or a .1.
    assert dict(chosen.select("seed", "method").rows()) == {0: "a", 1: "b", 2: "b"}
    assert matched(points, [], AT).equals(chosen.drop("family"))
    goal = points.with_columns(goal=pl.when(pl.col("seed") == 0).then(0.97).otherwise(0.5))
    steps = matched(goal, ["method"], pl.col("goal")).select("method", "seed", "step").rows()
    assert set(steps) == {(method, seed, 3 if seed == 0 else 1) for method in "ab" for seed in range(3)}


def test_scores_that_are_not_finite_do_not_count_and_bare_tables_will_do() -> None:
    points = table(a=grid((0.2, 0.2)))
    broken = points.with_columns(new=pl.when(pl.col("step") == 2).then(float("nan")).otherwise("new"))
    assert matched(broken, ["method"], AT)["step"].to_list() == [3, 3]
    bare = points.select("seed", "new", "prior")
    assert matched(bare, [], AT)["prior"].to_list() == pytest.approx([0.6, 0.62])
    assert matched(points.clear(), ["method"], AT).is_empty()


def test_the_curve_over_learning_rates() -> None:
    points = table(a=grid((None, None), (0.1, 0.2), (0.3, None)))
    found = by_rate(points, ["method"], AT)
    assert found["seed"].to_list() == [0, 1] * 3
    assert found["lr"].to_list() == pytest.approx([1e-4, 1e-4, 2e-4, 2e-4, 3e-4, 3e-4])
    assert found["new"].to_list() == [0.945, 0.945, 0.97, 0.97, 0.97, 0.945]
    assert found["forgetting"].to_list() == [None, None, 0.1, 0.2, 0.3, None]


def test_of_a_group_that_never_gets_there_it_is_the_last_of_the_run_that_learned_most() -> None:
    points = table(a=grid((0.05, 0.06), (0.01, None)), b=grid((None, None), (None, None)))
    learned = pl.when((pl.col("method") == "b") & (pl.col("lr") > 1.5e-4) & (pl.col("step") == 3)).then(0.949)
    points = points.with_columns(new=learned.otherwise("new")).sample(fraction=1.0, shuffle=True, seed=1)
    found = matched_or_last(points, ["method"], AT)
    there = found.filter(method="a")
    assert there["reached"].all()
    assert there.drop("reached").sort("seed").equals(matched(points, ["method"], AT).sort("seed"))
    others = found.filter(method="b").sort("seed")
    assert others.select("seed", "step", "lr", "reached").rows() == [(seed, 3, 2e-4, False) for seed in (0, 1)]
    last = matched_or_last(points, ["method"], None).filter(method="a")
    assert last["reached"].sum() == 0
    assert set(last.select("step", "new").rows()) == {(3, 0.97)}
