"""The runner on a toy experiment: a base, a sweep, a student, and three stages one after another."""

import io
import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import polars as pl
import pytest
import torch
from rich.console import Console

from rlrazor.errors import RazorError
from rlrazor.runs.dry_run import Counts, DryRun, Measured, Sizes, Trial, estimate, planned, specs_of
from rlrazor.runs.experiment import Cost, Experiment, Phase
from rlrazor.runs.records import BASE, Ancestor, Record, RunSpec, to_table
from rlrazor.runs.runner import Options, Runner, run
from rlrazor.runs.store import Checkpoint, RunStore, WeightsMode
from rlrazor.runs.sweep import DivergedError
from rlrazor.runs.teachers import choose, students


@dataclass(frozen=True)
class Config:
    methods: tuple[str, ...] = ("plus", "student")
    lrs: tuple[float, ...] = (0.1, 0.2)
    seeds: tuple[int, ...] = (0, 1)
    stages: int = 3


@dataclass(frozen=True)
class Toy:
    """A policy is a number: a tenth of its seed. A run adds `lr` a step to what it starts from, or to its teacher's.

    Which runs were trained is in trained.log.
    """

    staged: bool = False

    name: ClassVar[str] = "toy"
    title: ClassVar[str] = "Toy"
    config: ClassVar[type[Config]] = Config
    presets: ClassVar[Mapping[str, Config]] = {}
    methods: ClassVar[Mapping[str, str]] = {"plus": "Plus", "student": "Student"}

    def phases(self, config: Config, store: RunStore | None) -> Iterator[Phase]:
        bases = [RunSpec("toy", BASE, {"size": 3}, seed) for seed in config.seeds]
        if self.staged:
            yield from self.stages(config, bases[0])
            return
        specs = [self.spec(Ancestor(base, 0), lr) for base in bases for lr in config.lrs]
        yield Phase("sweep", specs)

        def taught(level: float, teachers: Mapping[int, Ancestor]) -> list[RunSpec]:
            plain = [self.spec(Ancestor(base, 0), 0.5, "student") for base in bases]
            return [replace(spec, teacher=teachers[spec.seed]) for spec in plain]

        yield students(specs, store, "plus", [0.15, 0.9], taught)

    def stages(self, config: Config, base: RunSpec) -> Iterator[Phase]:
        before = Ancestor(base, 0)
        for number in range(config.stages):
            spec = self.spec(before, 0.01 * (number + 1))
            yield Phase(f"stage {number}", [spec], keep="final")
            before = Ancestor(spec, 2)

    def spec(self, start: Ancestor, lr: float, method: str = "plus") -> RunSpec:
        params = {"lr": lr, "schedule": "constant", "epochs": 1}
        return RunSpec("toy", method, params, start.spec.seed, start)

    def train(self, spec: RunSpec, store: RunStore) -> Iterator[Checkpoint]:
        with (store.folder / "trained.log").open("a") as log:
            log.write(f"{spec.run_id}\n")
        with (store.folder / "processes.log").open("a") as log:
            log.write(f"{os.getpid()}\n")
        of = spec.teacher or spec.starts_from
        policy = torch.tensor([spec.seed / 10]) if of is None else store.load_weights(of.spec, of.step)["w"]
        for step in (0,) if of is None else (1, 2):
            policy += spec.params.get("lr", 0.0)
            if policy > 5:
                raise DivergedError(step, step / 2)
            record = Record(spec.run_id, step, step / 2, min(1.0, policy.item()), {"p": 1 - policy.item() / 5}, {})
            yield Checkpoint(record, partial(lambda policy: {"w": policy.clone()}, policy))

    def cost(self, spec: RunSpec) -> Cost:
        return Cost(2 if spec.chain else 0, 2 if spec.chain else 1)

    def describe(self, config: Config) -> Mapping[str, Any]:
        return {"new_task": "sum", "labels": dict(self.methods)}


def quiet() -> Console:
    return Console(file=io.StringIO())


def trained(out: Path) -> Counter[str]:
    log = out / "trained.log"
    return Counter(log.read_text().split() if log.exists() else [])


@pytest.mark.parametrize("jobs", [1, 2])
def test_bases_and_teachers_are_there_before_who_needs_them(tmp_path: Path, jobs: int) -> None:
    toy: Experiment = Toy()
    done = run(toy, Config(), Options(tmp_path, jobs, preset="p", command="c"), quiet())
    assert (done.trained, done.kept, done.diverged) == (2 + 4 + 4, 0, ())
    table = pl.read_parquet(tmp_path / "records.parquet")
    assert table["method"].to_list() == [BASE, BASE] + 2 * (["plus"] * 4 + ["student"] * 4)
    # The processes that trained the bases go on to the sweep and the students.
    trained_by = set((tmp_path / "processes.log").read_text().split())
    assert trained_by == {str(os.getpid())} if jobs == 1 else 1 <= len(trained_by) <= jobs
    assert not multiprocessing.active_children()
    assert set(table["size"]) == {3}
    base = table.filter(method=BASE)["prior"].to_list()
    assert base == pytest.approx([1, 0.98])
    for row in table.iter_rows(named=True):
        assert row["forgetting"] == pytest.approx(base[row["seed"]] - row["prior"])
    # 0.15: the gentlest that gets there, of seed 0 after two steps of 0.1; 0.9, which none does: the best of all.
    teachings = json.loads((tmp_path / "teachers.json").read_text())
    assert [(of["level"], of["seed"], of["step"], of["student"]) for of in teachings] == [
        (0.15, 0, 2, "student"), (0.15, 1, 1, "student"), (0.9, 0, 2, "student"), (0.9, 1, 2, "student"),
    ]  # fmt: skip
    scores = {f"{row['run_id']}/{row['step']}": row["new"] for row in table.iter_rows(named=True)}
    for row in table.filter(pl.col("method") == "student").iter_rows(named=True):
        assert row["new"] == pytest.approx(min(1, scores[row["teacher"]] + 0.5 * row["step"]))
    assert {of["run_id"] + f"/{of['step']}" for of in teachings} == set(table["teacher"].drop_nulls())
    # Of teachers alone the run was made again, for the weights of that step and no other; a base's are kept at once.
    again = {of["run_id"] for of in teachings}
    assert {run_id: count for run_id, count in trained(tmp_path).items() if count > 1} == dict.fromkeys(again, 2)
    kept = {path.parents[1].name + f"/{int(path.stem[5:])}" for path in tmp_path.glob("runs/*/weights/*")}
    bases = {f"{run_id}/0" for run_id in table.filter(method=BASE)["run_id"]}
    assert kept == bases | set(table["teacher"].drop_nulls())
    stored = json.loads((tmp_path / "config.json").read_text())
    assert (stored["title"], stored["preset"], stored["config"]["lrs"]) == ("Toy", "p", [0.1, 0.2])
    before = trained(tmp_path)
    done = run(toy, Config(), Options(tmp_path, jobs), quiet())
    assert (done.trained, done.kept) == (0, 10)
    assert trained(tmp_path) == before
    # Without students there is nobody who teaches.
    run(toy, replace(Config(), methods=("plus",), seeds=(2,)), Options(tmp_path, jobs), quiet())
    assert set(pl.read_parquet(tmp_path / "records.parquet")["seed"]) == {2}


def test_stages_go_on_from_one_another_and_none_is_trained_twice(tmp_path: Path) -> None:
    toy = Toy(staged=True)
    runner = Runner(toy, Options(tmp_path), quiet())
    with runner.store.open_for_writing():
        specs = runner.finish(toy.phases(Config(), runner.store))
    assert set(trained(tmp_path).values()) == {1}
    assert [len(spec.chain) for spec in specs] == [1, 2, 3]
    news = [runner.store.read(spec).records[-1].new for spec in specs]
    assert news == pytest.approx([0.02, 0.06, 0.12])
    runs = [(spec, runner.store.read(spec).records) for spec in (specs[0].root, *specs)]
    assert to_table(runs)["forgetting"].to_list()[-1] == pytest.approx(0.12 / 5)
    # Whoever comes later, and finds weights gone, has the chain trained again, from the first that lacks them.
    for spec in specs[:2]:
        runner.store.weights_path(spec, 2).unlink()
    later = Runner(toy, Options(tmp_path), quiet())
    fourth = toy.spec(Ancestor(specs[1], 1), 0.3)
    with later.store.open_for_writing():
        later.finish([Phase("another end", [fourth])])
    assert later.store.read(fourth).records[-1].new == pytest.approx(0.02 + 0.02 + 0.6)
    assert trained(tmp_path)[specs[0].run_id] == trained(tmp_path)[specs[1].run_id] == 2
    assert [set(later.store.kept_steps(spec)) for spec in specs[:2]] == [{2}, {1}]
    assert later.trained == {specs[0], specs[1], fourth}


def test_what_is_asked_for_is_kept_besides(tmp_path: Path) -> None:
    toy, config = Toy(), replace(Config(), seeds=(0,))
    for weights, steps in (("final", {2}), ("all", {1, 2})):
        out = tmp_path / weights
        run(toy, config, Options(out, weights=weights), quiet())  # type: ignore[arg-type]
        store = RunStore(out)
        specs = [spec for phase in toy.phases(config, store) for spec in phase.specs]
        assert all(store.kept_steps(spec) >= steps for spec in specs)
        assert store.kept_steps(specs[0].root) == {0}


def test_a_run_that_diverges_is_told_of_and_its_last_weights_are_kept(tmp_path: Path) -> None:
    config = replace(Config(), lrs=(4.0,), seeds=(0,))
    done = run(Toy(), config, Options(tmp_path, weights="final"), quiet())
    assert done.diverged == ("plus lr 4.0e+00 constant 1 epoch seed 0",)
    store = RunStore(tmp_path)
    (spec,) = [spec for spec in specs_of(planned(Toy(), config)) if spec.method == "plus"]
    assert store.kept_steps(spec) == {1}
    assert json.loads((tmp_path / "config.json").read_text())["diverged"] == list(done.diverged)


def test_a_dry_run_knows_all_runs_before_any_is_trained() -> None:
    """As if each level had a teacher of its own."""
    specs = specs_of(planned(Toy(), Config()))
    assert Counter(spec.method for spec in specs) == {BASE: 2, "plus": 4, "student": 4}
    assert [len(one.chain) for one in specs_of(planned(Toy(staged=True), Config()))] == [0, 1, 2, 3]


class Sized(Toy):
    def trial(self, config: Config) -> Trial:
        return Trial(lambda spec, cost: 1.0, 0.2, Sizes(memory=1, record=0, weights=1000, base=0), "nothing")


@pytest.mark.parametrize(
    ("weights", "keep", "count"),
    [("none", "none", 0), ("none", "final", 8), ("final", "final", 8), ("all", "final", 16)],
)
def test_a_dry_run_counts_the_weights_that_are_kept(
    weights: WeightsMode, keep: WeightsMode, count: int, tmp_path: Path
) -> None:
    """Of eight runs that are no bases: those that a phase keeps and those that a user asks for, none of them twice."""
    phases = planned(Sized(), Config())

    def disk(phases: list[Phase], weights: WeightsMode) -> int:
        found = estimate(Sized(), Config(), phases, weights=weights).measured
        assert found is not None
        return found.disk_bytes

    kept = [replace(phase, keep=keep) for phase in phases]
    assert disk([*kept, *phases], weights) - disk(phases, "none") == 1000 * count


def test_of_several_estimates_what_was_timed_is_said_once() -> None:
    def one(timed: str) -> DryRun:
        return DryRun(Counts(1, 1, 2, 1), Measured(1.0, 0.2, 10, 5, 0, timed))

    found = one("updates") + one("updates") + one("samples") + one("samples") + one("samples")
    assert found.measured is not None
    assert (found.counts.steps, found.measured.seconds, found.measured.timed) == (10, 5.0, "updates; samples")


def test_the_best_teacher_is_the_one_that_forgot_least_of_those_good_enough(tmp_path: Path) -> None:
    toy, config = Toy(), Config()
    run(toy, replace(config, methods=("plus",)), Options(tmp_path), quiet())
    store = RunStore(tmp_path)
    specs = next(toy.phases(config, store)).specs
    for level in (0.0, 0.15, 0.25, 0.45, 2.0):
        for seed, teacher in choose(specs, store, "plus", level).items():
            all_of_seed = [(s, r) for s in specs if s.seed == seed for r in store.read(s).records]
            good = [(s, r) for s, r in all_of_seed if r.new >= level]
            best = max(r.prior["p"] for _, r in good) if good else min(r.prior["p"] for _, r in all_of_seed)
            (found,) = [r for s, r in all_of_seed if (s, r.step) == (teacher.spec, teacher.step)]
            assert found.prior["p"] == best


def test_a_folder_of_another_experiment_is_refused(tmp_path: Path) -> None:
    run(Toy(), Config(), Options(tmp_path), quiet())
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    class Other(Toy):
        name = "other"

    with pytest.raises(RazorError, match="has the tables of another experiment, Toy, which these would replace"):
        run(Other(), Config(), Options(tmp_path), quiet())
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    run(Toy(), Config(), Options(tmp_path), quiet())


def test_an_old_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "runs" / "0123456789abcdef").mkdir(parents=True)
    (tmp_path / "runs" / "0123456789abcdef" / "spec.json").write_text('{"schema_version": 1}')
    with pytest.raises(RazorError, match=r"has schema version 1, this rlrazor reads 2\. Choose another --out\."):
        run(Toy(), Config(), Options(tmp_path), quiet())
    assert not (tmp_path / "trained.log").exists()
