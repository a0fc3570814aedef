"""The examples in CONTRIBUTING.md are run as they stand there."""

import json
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import polars as pl
import pytest
import torch
from scipy.spatial.distance import chebyshev

from idx_files import write_dataset
from rlrazor import studies
from rlrazor.cli import main
from rlrazor.drift import distribution
from rlrazor.experiments.language import tasks
from rlrazor.experiments.parity_mnist import methods
from rlrazor.report import load, write_report
from rlrazor.runs import runner
from rlrazor.studies import engine
from rlrazor.system.terminal import Terminal
from tiny_models import char_tokenizer, saved, tiny_llama

CONTRIBUTING = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")


def examples(heading: str, language: str = "python") -> list[str]:
    """The code blocks under a heading."""
    sections = dict(
        re.findall(r"^## (.*?)\n(.*?)(?=^## (?:Adding|Rules)|\Z)", CONTRIBUTING, flags=re.DOTALL | re.MULTILINE)
    )
    return re.findall(rf"```{language}\n(.*?)```", sections[heading], flags=re.DOTALL)


def test_a_method_added_as_contributing_says_runs_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, line = examples("Adding a method")
    namespace = dict(vars(methods))
    exec(loss, namespace)
    added = eval("{" + line + "}", namespace)
    monkeypatch.setattr(methods, "METHODS", {**methods.METHODS, **added})

    # RLOO is Dr. GRPO times G / (G - 1): an identity that its paper states.
    logp, rewards = torch.randn(3, 5), torch.randint(2, (3, 5)).float()
    expected = methods.METHODS["dr-grpo"].objective(logp, rewards, logp) * 5 / 4
    torch.testing.assert_close(added["rloo"].objective(logp, rewards, logp), expected)

    data = write_dataset(tmp_path / "data", train=300, test=100)
    out = tmp_path / "out"
    grid = ["--methods", "rloo,rloo+kl", "--lrs", "1e-4,1e-3", "--pretrain-size", "50", "--group-size", "4"]
    assert main(["reproduce", "parity-mnist", *grid, "--data-dir", str(data), "--out", str(out), "--jobs", "1"]) == 0
    assert "RLOO + KL" in (out / "report.html").read_text()


def test_a_drift_measure_added_as_contributing_says_is_a_column(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    function, line = examples("Adding a drift measure")
    namespace = dict(vars(distribution))
    exec(function, namespace)
    ((name, measure),) = eval("{" + line + "}", namespace).items()

    rng = np.random.default_rng(0)
    base, tuned = rng.dirichlet(np.ones(10), size=7), rng.dirichlet(np.full(10, 0.3), size=7)
    base[:, 0] = tuned[:, 0] = 0  # not normalised any more, which no distance between vectors minds
    found = measure(torch.tensor(base).log(), torch.tensor(tuned).log())
    np.testing.assert_allclose(found, [chebyshev(p, q) for p, q in zip(base, tuned, strict=True)])

    monkeypatch.setattr(distribution, "DISTRIBUTION_MEASURES", {**distribution.DISTRIBUTION_MEASURES, name: measure})
    data, out = write_dataset(tmp_path / "data", train=300, test=100), tmp_path / "out"
    grid = ["--methods", "sft-1", "--lrs", "1e-3", "--pretrain-size", "50"]
    assert main(["reproduce", "parity-mnist", *grid, "--data-dir", str(data), "--out", str(out), "--jobs", "1"]) == 0
    table = pl.read_parquet(out / "records.parquet").filter(pl.col("method") == "sft-1")
    for suffix in ("", "_on_prior"):
        largest, total = table[name + suffix], table["total_variation" + suffix]
        assert ((largest > 0) & (largest <= total + 1e-9) & (largest >= total / 5)).all()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_task_added_as_contributing_says_is_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (example,) = examples("Adding a task for language models")
    module = ModuleType("backwards")
    exec(example, vars(module))
    task = module.BACKWARDS
    monkeypatch.setattr(tasks, "TASKS", {**tasks.TASKS, task.name: task})
    items = task.load(None).test
    completions = [item.columns["word"][::-1] for item in items[:2]] + ["", items[3].columns["word"]]
    assert tasks.score(task, items, completions).values == [1, 1, 0, 0]

    base = saved(tmp_path / "base", tiny_llama(max_position_embeddings=512), char_tokenizer())
    rows = [{"sentence": f"a {n} _ b", "option1": "cat", "option2": "dog", "answer": "1"} for n in range(2)]
    (tmp_path / "winogrande_validation.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ["--task", "backwards", "--prior", "winogrande", "--data-mirror", str(tmp_path), "--precision", "float32"]
    options += ["--method", "sft", "--lr", "1e-2", "--max-steps", "1", "--batch-size", "2", "--warmup-steps", "0"]
    assert main(["finetune", str(base), *options, "--out", str(tmp_path / "out"), "--json"]) == 0
    (record,) = json.loads(capfd.readouterr().out)["records"]
    assert record["drift"]["kl_forward"] > 0
    assert main(["tasks"]) == 0
    assert "Words backwards" in capfd.readouterr().out


def test_a_study_added_as_contributing_says_is_a_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,), (text,) = examples("Adding a study"), examples("Adding a study", "markdown")
    module = ModuleType("rlrazor.studies.group_size")
    exec(code, vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(studies, "STUDIES", {**studies.STUDIES, "group-size": module.__name__})
    for listed in ("PAGE", "ANALYSES"):
        monkeypatch.setattr(studies, listed, (*getattr(studies, listed), "group-size"))
    (tmp_path / "group_size.md").write_text(text)
    monkeypatch.setattr(engine, "text_of", lambda name: tmp_path / f"{name.replace('-', '_')}.md")

    data, out = write_dataset(tmp_path / "data", train=300, test=100), tmp_path / "out"
    study = ["--analysis", "group-size", "--data-dir", str(data), "--out", str(out), "--jobs", "1"]
    assert main(["reproduce", "parity-mnist", *study]) == 0
    table = pl.read_parquet(out / "studies" / "group-size.parquet").filter(pl.col("method") == "grpo")
    assert set(table["group_size"]) == {8, 64}
    page = (out / "report.html").read_text()
    assert "How large does a group have to be?" in page
    assert "GRPO, groups of 8" in page
    assert re.search(r"against groups of 64: [a-z ]+,", " ".join(page.split()))  # the verdict, not its name


def test_an_experiment_added_as_contributing_says_runs_and_goes_on(tmp_path: Path) -> None:
    (code,) = examples("Adding an experiment")
    module = ModuleType("two_bandits")
    exec(code, vars(module))
    for trained, kept in ((10, 0), (0, 10)):  # two bases; two methods at two learning rates on each
        done = runner.run(module.TwoBandits(), module.Config(), runner.Options(tmp_path), Terminal(stderr=True))
        assert (done.trained, done.kept) == (trained, kept)
    table = pl.read_parquet(tmp_path / "records.parquet")
    assert table.filter(pl.col("method") == "base")["kl_forward"].to_list() == [0, 0]
    for _, run in table.filter(pl.col("method") != "base").group_by("run_id"):
        assert run.sort("step")["new"].is_sorted()
        assert run.sort("step")["kl_forward"].is_sorted()
        assert run.height == 4
    # A label that is one of five is farther away than what the policy does already.
    last = table.filter(pl.col("step") == 20).group_by("method").agg(pl.col("kl_forward", "forgetting").mean())
    of = {row["method"]: row for row in last.to_dicts()}
    assert of["sft"]["kl_forward"] > of["reinforce"]["kl_forward"]
    assert of["sft"]["forgetting"] > of["reinforce"]["forgetting"]
    assert "Two bandits" in write_report(load(tmp_path)).read_text()
