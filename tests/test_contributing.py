"""The example in CONTRIBUTING.md is run as it stands there."""

import re
from pathlib import Path

import pytest
import torch

from idx_files import write_dataset
from rlrazor.cli import main
from rlrazor.experiments.parity_mnist import methods

CONTRIBUTING = Path(__file__).parents[1] / "CONTRIBUTING.md"


def test_a_method_added_as_contributing_says_runs_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, line = re.findall(r"```python\n(.*?)```", CONTRIBUTING.read_text(), flags=re.DOTALL)
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
