"""Tasks in sequence: the tasks by hand, chains of planted records, KL against loops, and the whole through the CLI."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal
from rich.console import Console

from idx_files import write_dataset
from rlrazor.cli import main
from rlrazor.errors import RazorError
from rlrazor.experiments.continual.measures import earlier_of
from rlrazor.experiments.parity_mnist.methods import sft_1, sft_2
from rlrazor.experiments.parity_mnist.policy import load_weights
from rlrazor.experiments.parity_mnist.sequences import PAPER_METHODS, PRESETS, ImageSequences
from rlrazor.experiments.parity_mnist.splits import ALL, Questions, correct_answers, load_tests, pretraining
from rlrazor.experiments.parity_mnist.stages import Images, find_method, label_of, training_inputs_of
from rlrazor.report import drawing
from rlrazor.runs import runner
from rlrazor.runs.dry_run import planned, specs_of
from rlrazor.runs.experiment import Phase
from rlrazor.runs.records import BASE, Record, RunSpec
from rlrazor.runs.store import Checkpoint, RunStore

SETTINGS: dict[str, Any] = {"train_size": 200, "test_size": 60, "checkpoints_per_epoch": 3, "batch_size": 32}
SETTINGS |= {"group_size": 8, "epochs": (2,), "pretrain_size": 60, "pretrain_epochs": 4, "target": 0.95}
SETTINGS["schedules"] = ("constant",)
CONFIG = ImageSequences(("sft-2", "grpo"), (3e-4, 1e-3), tasks=("parity", "prime"), **SETTINGS)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"), train=300, test=100)


# Tasks and methods


@pytest.mark.parametrize(
    ("task", "classes"),
    [
        ("parity", ({0, 2, 4, 6, 8}, {1, 3, 5, 7, 9})),
        ("above-four", ({5, 6, 7, 8, 9}, {0, 1, 2, 3, 4})),
        ("prime", ({2, 3, 5, 7}, {0, 1, 4, 6, 8, 9})),
        ("three", ({0, 3, 6, 9}, {1, 2, 4, 5, 7, 8})),
        ("round", ({0, 3, 6, 8, 9}, {1, 2, 4, 5, 7})),
    ],
)
def test_each_task_splits_the_digits_as_it_says(task: str, classes: tuple[set[int], set[int]]) -> None:
    correct = correct_answers(task, torch.arange(10))
    logp = torch.zeros(10, 10)
    for own in classes:
        members = sorted(own)
        for digit in own:
            assert set(correct[digit].nonzero().flatten().tolist()) == own
            assert sft_1(correct, logp)[digit].nonzero().flatten().tolist() == members[:1]
            two = sft_2(correct, logp)[digit]
            assert two.nonzero().flatten().tolist() == [members[0], members[2]]
            assert two.sum().item() == 1


def test_a_task_is_told_by_one_indicator_and_the_prior_task_has_one_answer() -> None:
    images = torch.full((3, 28, 28), 255, dtype=torch.uint8)
    for place, task in enumerate(ALL):
        asked = Questions.of(task, images, torch.tensor([3, 4, 5]))
        assert asked.inputs.shape == (3, 784 + 6)
        assert asked.inputs[:, 784:].tolist() == [[float(at == place) for at in range(6)]] * 3
    assert correct_answers("fashion_mnist", torch.tensor([3, 4])).nonzero().tolist() == [[0, 3], [1, 4]]
    logp = torch.eye(10)[[9, 0, 7]]
    assert Questions.of("prime", images, torch.tensor([3, 4, 5])).score(logp) == pytest.approx(2 / 3)  # 9 is no prime


def test_methods_are_known_with_both_penalties() -> None:
    assert [find_method(name)[1] for name in ("grpo", "grpo+kl", "grpo+kl-before")] == ["", "+kl", "+kl-before"]
    assert len({label_of(name) for name in PAPER_METHODS}) == len(PAPER_METHODS) == 23
    for wrong in ("grpo+", "grpo+kl+kl", "simpo", "+kl"):
        with pytest.raises(RazorError, match="Unknown method"):
            find_method(wrong)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"tasks": ("parity", "odd")}, "Unknown task 'odd'"),
        ({"batch_size": 100_000, "group_size": 100_000}, "lower batch_size or group_size"),
        ({"orders": 3}, "orders must be at least|at most"),
        ({"target": 1.5}, "target must be a fraction of 1"),
        ({"tasks": ("parity", "parity")}, "tasks has the same value twice"),
        ({"tasks": ("parity",)}, "A sequence has two tasks or more"),
    ],
)
def test_what_is_no_sequence_is_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(RazorError, match=said):
        replace(CONFIG, **wrong)


# Phases, on planted records

Scores = Callable[[RunSpec], list[tuple[float, float]]]


def planted(store: RunStore, config: ImageSequences, data_dir: Path, scores: Scores) -> list[Phase]:
    """Go through the phases; a run has these (new, prior) at steps 10, 20 ..."""
    phases = []
    for phase in Images(data_dir).phases(config, store):
        for spec in phase.specs:
            pairs = scores(spec)
            records = [
                Record(spec.run_id, 10 * at, at / 10, new, {"fashion_mnist": prior}, {"kl_forward": 0.1})
                for at, (new, prior) in enumerate(pairs, 1)
            ]
            if not store.is_finished(spec):
                store.write(spec, [Checkpoint(record) for record in records], seconds=0.0)
        phases.append(phase)
    return phases


def of_order(phases: list[Phase], order: str) -> list[RunSpec]:
    return [spec for phase in phases if phase.columns["order"] == order for spec in phase.specs]


def test_the_rate_is_that_of_the_best_prior_at_the_target_and_stages_start_where_the_last_ended(
    tmp_path: Path, data_dir: Path
) -> None:
    def scores(spec: RunSpec) -> list[tuple[float, float]]:
        if spec.params["lr"] == 1e-3:
            return [(0.96, 0.60)]
        if spec.method == "grpo":
            return [(0.90, 0.99), (0.95, 0.61)]  # 0.99 does not count: it is below the target
        return [(0.90, 0.80), (0.94, 0.70)]  # never gets there, so the other rate is chosen

    config = replace(CONFIG, orders=2, seeds=(0, 1))
    phases = planted(RunStore(tmp_path), config, data_dir, scores)
    chosen = {spec.method: spec.params["lr"] for spec in of_order(phases, "1")}
    assert chosen == {"sft-2": 1e-3, "grpo": 3e-4}
    assert {spec.seed for spec in of_order(phases, "rates")} == {0}
    for order, tasks in (("1", ["parity", "prime"]), ("2", ["prime", "parity"])):
        runs = of_order(phases, order)
        assert len(runs) == 2 * 2 * 2  # methods, seeds, stages
        for spec in runs[4:]:
            first, before = spec.chain
            assert first.spec.method == BASE
            assert (before.spec.method, before.spec.seed) == (spec.method, spec.seed)
            assert (before.spec.params["task"], spec.params["task"]) == (*tasks,)
            assert before.step == (10 if spec.method == "sft-2" else 20)  # its last, which got there
            assert earlier_of(spec) == tasks[:1]
    alone, joint = of_order(phases, "alone"), of_order(phases, "joint")
    assert {spec.params["task"] for spec in alone} == {"parity", "prime"}
    assert {spec.params["task"] for spec in joint} == {"parity+prime"}
    assert all(len(spec.chain) == 1 for spec in alone + joint)


def test_where_no_rate_gets_to_the_target_the_highest_score_counts_and_the_sequence_goes_on(
    tmp_path: Path, data_dir: Path
) -> None:
    def scores(spec: RunSpec) -> list[tuple[float, float]]:
        return [(0.90, 0.9), (0.93 if spec.params["lr"] == 3e-4 else 0.92, 0.1), (0.91, 0.9)]

    phases = planted(RunStore(tmp_path), CONFIG, data_dir, scores)
    runs = of_order(phases, "1")
    assert {spec.params["lr"] for spec in runs} == {3e-4}
    assert [spec.starts_from.step for spec in runs[2:] if spec.starts_from] == [30, 30]


def test_a_dry_run_counts_as_many_runs_as_there_are(tmp_path: Path, data_dir: Path) -> None:
    phases = planted(RunStore(tmp_path), CONFIG, data_dir, lambda spec: [(0.96, 0.6 + spec.params["lr"])])
    there = {spec for phase in phases for spec in [*phase.specs, *(of.spec for s in phase.specs for of in s.chain)]}
    # The rate that a dry run takes may be another one than the rule's, with which `rates` would share its runs.
    assert abs(len(specs_of(planned(Images(data_dir), CONFIG))) - len(there)) <= len(CONFIG.methods)
    assert len(specs_of(planned(Images(), PRESETS["paper"]))) > 690  # 23 methods, 3 seeds, 2 orders of 5 stages


# Training


def trained(out: Path, data_dir: Path, config: ImageSequences) -> tuple[RunStore, list[Phase]]:
    """All of a config's runs, with all their weights."""
    options = runner.Options(out, weights="all")
    one = runner.Runner(Images(data_dir), options, Console(quiet=True))
    with one.store.open_for_writing():
        one.finish(one.experiment.phases(config, one.store))
    return one.store, one.phases


def by_hand(logp: np.ndarray, other: np.ndarray) -> float:
    """KL(logp || other), input by input and outcome by outcome."""
    total = 0.0
    for p_row, q_row in zip(logp, other, strict=True):
        total += sum(np.exp(p) * (p - q) for p, q in zip(p_row, q_row, strict=True))
    return float(total / len(logp))


def test_scores_and_kls_are_those_of_a_loop(tmp_path: Path, data_dir: Path) -> None:
    config = replace(CONFIG, tasks=("parity", "prime", "round"), methods=("sft-2",), lrs=(1e-3,), target=0.99)
    store, phases = trained(tmp_path / "out", data_dir, config)
    spec = of_order(phases, "1")[-1]
    assert [of.spec.params.get("task") for of in spec.chain] == [None, "parity", "prime"]
    record = store.read(spec).records[-1]
    tests = load_tests(("parity", "prime", "round"), 60, data_dir)

    def said(run: RunSpec, step: int) -> dict[str, np.ndarray]:
        policy = load_weights(store.load_weights(run, step)).double()
        with torch.no_grad():
            return {name: policy(asked.inputs.double()).log_softmax(1).numpy() for name, asked in tests.items()}

    now, base, before = said(spec, record.step), said(spec.root, 0), said(spec.chain[-1].spec, spec.chain[-1].step)
    assert len(now["parity"]) == 60
    for suffix, origin in (("", base), ("_since_before", before)):
        forward = {name: by_hand(origin[name], now[name]) for name in now}
        reverse = {name: by_hand(now[name], origin[name]) for name in now}
        expected = {"": "round", "_on_prior": "fashion_mnist", "_on_parity": "parity", "_on_prime": "prime"}
        for on, name in expected.items():
            assert record.drift[f"kl_forward{on}{suffix}"] == pytest.approx(forward[name], rel=1e-4, abs=1e-6)
            assert record.drift[f"kl_reverse{on}{suffix}"] == pytest.approx(reverse[name], rel=1e-4, abs=1e-6)
        earlier = (forward["parity"] + forward["prime"]) / 2
        assert record.drift[f"kl_forward_on_earlier{suffix}"] == pytest.approx(earlier, rel=1e-4, abs=1e-6)
    assert record.drift["kl_forward"] != pytest.approx(record.drift["kl_forward_since_before"], rel=0.01)
    for name, asked in tests.items():
        right = [bool(mask[answer]) for mask, answer in zip(asked.correct, now[name].argmax(1), strict=True)]
        assert record.metrics[f"score_{name}"] == pytest.approx(sum(right) / 60)
    assert record.new == record.metrics["score_round"]
    assert record.prior_mean == record.metrics["score_fashion_mnist"]


def test_a_stage_ends_at_its_first_checkpoint_that_gets_there(tmp_path: Path, data_dir: Path) -> None:
    store, phases = trained(tmp_path / "out", data_dir, replace(CONFIG, target=0.9))
    for spec in {spec for phase in phases for spec in phase.specs}:
        *earlier, last = store.read(spec).records
        assert all(record.new < 0.9 and record.metrics["reached"] == 0 for record in earlier)
        assert last.metrics["reached"] == (last.new >= 0.9)
        assert last.new >= 0.9 or last.epoch == 2


def test_penalties_hold_to_the_base_or_to_the_stage_before(tmp_path: Path, data_dir: Path) -> None:
    config = replace(CONFIG, methods=("grpo+kl", "grpo+kl-before", "oracle"), lrs=(1e-3,))
    store, phases = trained(tmp_path / "out", data_dir, config)
    for spec in of_order(phases, "1")[-3:]:
        base, before = (load_weights(store.load_weights(of.spec, of.step)) for of in spec.chain)
        lesson = training_inputs_of(spec, data_dir, base, before)
        with torch.no_grad():
            said = {name: policy(lesson.inputs).log_softmax(1) for name, policy in (("base", base), ("before", before))}
        torch.testing.assert_close(lesson.base_logp, said["before"], rtol=1e-4, atol=1e-5)
        anchor = said["base" if spec.method == "grpo+kl" else "before"]
        torch.testing.assert_close(lesson.anchor_logp, anchor, rtol=1e-4, atol=1e-5)
        assert spec.params["kl_coef"] == (0.1 if "+" in spec.method else 0)
        assert lesson.inputs[:, 784:].sum(dim=0).tolist() == [0, 0, 200, 0, 0, 0]  # all under the indicator of prime


def test_images_of_pretraining_do_not_depend_on_what_else_there_is(data_dir: Path) -> None:
    both, one = pretraining(["parity", "prime"], 50, 3, data_dir), pretraining(["prime"], 50, 3, data_dir)
    assert torch.equal(both.inputs[50:], one.inputs)
    assert not torch.equal(both.inputs[:50, :784], one.inputs[:, :784])


# The whole

COMMAND = ["reproduce", "continual", "--methods", "sft-2,grpo,replay,ewc", "--tasks", "parity,prime", "--seeds", "0,1"]
COMMAND += ["--lrs", "1e-3", "--orders", "2", "--jobs", "1"]
COMMAND += [
    text for name, value in SETTINGS.items() for text in (f"--{name.replace('_', '-')}", str(value).strip("(),'"))
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert main([*COMMAND, "--data-dir", str(data_dir), "--out", str(out)]) == 0
    return out


def test_the_table_has_the_sequences_and_what_they_are_compared_with(finished: Path) -> None:
    table = pl.read_parquet(finished / "records.parquet")
    assert set(table["order"]) == {"rates", "1", "2", "alone", "joint"}
    stages = table.filter(pl.col("method") != "base", pl.col("order").is_in(["1", "2"]))
    assert stages.select("order", "stage", "task").unique().sort("order", "stage").rows() == [
        *(("1", 1, "parity"), ("1", 2, "prime"), ("2", 1, "prime"), ("2", 2, "parity")),
    ]
    ends = stages.unique(["run_id", "order"], keep="last")
    assert len(ends) == 2 * 2 * 4 * 2  # orders, stages, methods, seeds
    # Forgetting is counted from the base, whatever the stage.
    bases = dict(table.filter(method="base").select("seed", "prior").rows())
    assert all(row["forgetting"] == bases[row["seed"]] - row["prior"] for row in stages.to_dicts())
    columns = ["new", "prior", "kl_forward", "kl_reverse", "kl_forward_on_prior", "kl_forward_since_before", "reached"]
    assert stages.select(columns).null_count().sum_horizontal().item() == 0
    assert stages.filter(stage=1)["kl_forward_on_earlier"].null_count() == len(stages.filter(stage=1))
    assert stages.filter(stage=2)["kl_forward_on_earlier"].null_count() == 0
    first = stages.filter(stage=1)
    assert first["kl_forward"].to_list() == first["kl_forward_since_before"].to_list()


def test_the_page_has_one_section_and_no_best_checkpoint_over_stages(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    assert "Does RL forget less than SFT over a sequence of tasks?" in page
    assert "How much is kept" not in page  # the heading of the best checkpoints of a sweep
    assert "not run" not in page  # of a number that the text names and no table has
    assert (finished / "figures" / "continual.png").exists()
    assert json.loads((finished / "config.json").read_text())["config"]["tasks"] == ["parity", "prime"]


def test_an_interruption_between_stages_changes_nothing(
    finished: Path, tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawing, "save", lambda *arguments, **options: None)
    train = Images.train
    trained_specs: list[RunSpec] = []

    def stopping(self: Images, spec: RunSpec, store: RunStore) -> Iterator[Checkpoint]:
        trained_specs.append(spec)
        if len(spec.chain) == 2:  # the second stage
            raise RazorError("stopped here")
        return train(self, spec, store)

    command = [*COMMAND, "--data-dir", str(data_dir), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(Images, "train", stopping)
    assert main(command) == 2
    before = len(trained_specs) - 1
    assert before > 0
    assert not (tmp_path / "out" / "records.parquet").exists()
    trained_specs.clear()

    def counting(self: Images, spec: RunSpec, store: RunStore) -> Iterator[Checkpoint]:
        trained_specs.append(spec)
        return train(self, spec, store)

    monkeypatch.setattr(Images, "train", counting)
    assert main(command) == 0
    resumed, whole = (pl.read_parquet(out / "records.parquet") for out in (tmp_path / "out", finished))
    assert_frame_equal(resumed, whole, check_exact=True)
    assert before + len(trained_specs) == len(list((finished / "runs").iterdir()))  # none was trained twice


def test_a_dry_run_says_what_it_would_take(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, "--dry-run", "--json", "--data-dir", str(data_dir)]) == 0
    said = json.loads(capsys.readouterr().out)
    # Bases; rates are those of the first stage with the first seed; two orders of two stages, and both tasks at once.
    assert said["estimate"]["runs"] == 2 + 2 * 4 * (2 * 2 + 1)
    assert said["config"]["target"] == 0.95


def test_an_unknown_method_is_one_sentence(capsys: pytest.CaptureFixture[str], tmp_path: Path, data_dir: Path) -> None:
    command = ["reproduce", "continual", "--methods", "gpro", "--out", str(tmp_path), "--data-dir", str(data_dir)]
    assert main(command) == 2
    assert "Unknown method 'gpro'" in capsys.readouterr().err
