"""KL on inputs that stand for the prior task: which inputs these are, and the numbers beside scipy's."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from scipy.special import log_softmax, rel_entr, softmax

from idx_files import write_dataset
from rlrazor.cli import main
from rlrazor.experiments.parity_mnist.config import PRESETS
from rlrazor.experiments.parity_mnist.policy import NEITHER_TASK, NEW_TASK, PIXELS, PRIOR_TASK, DigitPolicy
from rlrazor.experiments.parity_mnist.probes import Probes, inputs_of
from rlrazor.experiments.parity_mnist.sampling import generator
from rlrazor.experiments.parity_mnist.task import Task, load_dots, load_task
from rlrazor.experiments.parity_mnist.train import pretraining_images, probes_of
from rlrazor.report import drawing
from rlrazor.runs.sweep import DivergedError

COLUMNS = {f"kl_forward_on_{name}" for name in ("unseen", "digits", "dots", "noise")}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"), train=600, test=200)


@pytest.fixture(scope="module")
def task(data_dir: Path) -> Task:
    return load_task(data_dir)


def test_the_inputs_are_unseen_and_asked_as_the_prior_task(task: Task) -> None:
    config = replace(PRESETS["quick"], methods=("sft-1",), pretrain_size=550, seeds=(3,))
    (spec, *_) = config.specs("data", config.methods, variant={"probes": True})
    inputs = probes_of(spec, task)
    assert {name: len(asked) for name, asked in inputs.items()} == {
        "unseen": 50,
        "digits": 200,
        "dots": 1000,
        "noise": 1000,
    }
    assert all((asked[:, PIXELS:] == PRIOR_TASK).all() for asked in inputs.values())
    _, seen, _ = pretraining_images(550, task, generator(3, "pretrain"))
    whole = {image.numpy().tobytes() for image in task.prior_train_images}
    met, unmet = (
        {(255 * row[:PIXELS]).round().to(torch.uint8).numpy().tobytes() for row in rows}
        for rows in (seen, inputs["unseen"])
    )
    assert len(whole) == 600
    assert not met & unmet
    assert met | unmet == whole
    # Of what was there already nothing has changed.
    assert (task.new_test[:, PIXELS:] == NEW_TASK).all()
    assert (load_dots().test[:, PIXELS:] == NEITHER_TASK).all()
    assert torch.equal(inputs["digits"][:, :PIXELS], task.new_test[:, :PIXELS])


def test_kl_is_scipys(task: Task) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = DigitPolicy()
    tuned, rng = copy.deepcopy(base), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in tuned.parameters():
            weight.add_(0.03 * torch.randn(weight.shape, generator=rng))
    inputs = inputs_of(task, task.prior_train_images[:40])
    found = Probes.of(base, inputs).measure(tuned, 1, 0.5)
    assert set(found) == COLUMNS
    for name, asked in inputs.items():
        with torch.no_grad():
            before, after = (policy(asked).double().numpy() for policy in (base, tuned))
        expected = rel_entr(softmax(before, axis=1), np.exp(log_softmax(after, axis=1))).sum(axis=1).mean()
        assert found[f"kl_forward_on_{name}"] == pytest.approx(expected, rel=1e-4)
    assert set(Probes.of(base, inputs).measure(base, 1, 0.5).values()) == {0.0}
    with torch.no_grad():
        next(tuned.parameters())[0, PIXELS:] = torch.nan
    with pytest.raises(DivergedError) as diverged:
        Probes.of(base, inputs).measure(tuned, 3, 0.5)
    assert (diverged.value.step, diverged.value.epoch) == (3, 0.5)


def test_the_study_runs_and_changes_nothing_else(
    tmp_path: Path, data_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawing, "save", lambda *arguments, **options: None)  # figures are looked at in other tests
    out = tmp_path / "out"
    command = ["reproduce", "parity-mnist", "--seeds", "0", "--jobs", "1", "--data-dir", str(data_dir), "--json"]
    assert main([*command, "--analysis", "which-probe", "--out", str(out)]) == 0
    assert set(json.loads(capsys.readouterr().out)["sections"]) == {"which-probe"}
    table = pl.read_parquet(out / "studies" / "which-probe.parquet").filter(pl.col("method") != "base")
    assert table.drop_nulls(list(COLUMNS)).height == table.height == 14 * 5
    # The same runs without the probes have the same scores and drift.
    plain = [*command, "--methods", "sft-1", "--lrs", str(table["lr"].min()), "--out", str(tmp_path / "plain")]
    assert main(plain) == 0
    capsys.readouterr()
    same = pl.read_parquet(tmp_path / "plain" / "records.parquet").filter(pl.col("method") != "base")
    of_study = table.filter(pl.col("method") == "sft-1", pl.col("lr") == table["lr"].min())
    for column in ("new", "prior", "kl_forward", "kl_forward_on_prior", "weight_l2"):
        assert same[column].to_list() == of_study[column].to_list()
    assert not COLUMNS & set(same.columns)
