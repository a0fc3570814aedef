"""A GGUF file as llama.cpp computes with it, through its Python binding, against torch: where that is installed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gguf_files import write_gguf
from rlrazor.cli import main
from rlrazor.errors import RazorError
from rlrazor.guard.compare_served import compare_served
from rlrazor.guard.comparison import REVERSE, Pair
from rlrazor.guard.measured_on import MeasuredOn
from rlrazor.guard.served import Asking, between
from rlrazor.lm.kl import Sequences
from rlrazor.lm.models import load
from rlrazor.lm.probes import GenericText, ProbeSettings
from rlrazor.lm.served.llama_file import LlamaFile
from rlrazor.lm.served.local import LocalModel
from rlrazor.lm.served.model import opened
from tiny_models import noisy, saved, tiny_llama

ON = MeasuredOn(
    ("ab", "cde", "f"),
    GenericText(prompts=("ba", "g")),
    ProbeSettings(max_new_tokens=4, chat=False, precision="float32"),
)


def test_without_the_binding_it_is_a_sentence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llama_cpp", None)
    with pytest.raises(RazorError, match="needs the package llama_cpp, which is not installed: pip install llama-cpp"):
        LlamaFile.at("llama.cpp:x.gguf", None, 20)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("ab\n")
    command = ["compare", "llama.cpp:x.gguf", "llama.cpp:y.gguf", "--prompts", str(prompts)]
    assert main([*command, "--out", str(tmp_path / "page.html")]) == 2
    assert "--tokenizer" in capfd.readouterr().err


class Engine:
    """As much as is asked of llama.cpp's binding, around numbers: after token t comes t + 1, nearly for certain."""

    n_tokens = 0
    scores = np.zeros((16, 8), np.float32)

    def reset(self) -> None:
        self.n_tokens = 0

    def eval(self, tokens: list[int]) -> None:
        for token in tokens:
            if self.n_tokens == len(self.scores):
                raise RuntimeError("llama_decode returned 1")
            self.scores[self.n_tokens] = np.where(np.arange(8) == (token + 1) % 8, 60.0, 0.0)
            self.n_tokens += 1


def test_it_ends_a_text_where_the_file_says() -> None:
    model = LlamaFile("llama.cpp:x", Engine(), None, 4, 16, frozenset({5}))
    assert model.draw([[1], [4]], 1, 10, [7]) == [[2, 3, 4, 5], [5]]
    assert model.draw([[5]], 1, 10, [7]) == [[6, 7]]
    assert model.draw([[5]], 1, 4, []) == [[6, 7, 0, 1]]


def test_what_it_has_no_room_for_is_a_sentence() -> None:
    model = LlamaFile("llama.cpp:x", Engine(), None, 4, 16)
    assert model.log_probs([*range(8), *range(8)]).shape == (15, 8)
    for ask in (lambda: model.log_probs([1] * 30), lambda: model.draw([[1], [1] * 10], 1, 20, [])):
        with pytest.raises(RazorError, match="has room for 16 tokens, and a prompt with its completion comes to 30"):
            ask()


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path, Any]:
    """A base and a tuned model as GGUF files of float16, and the tuned one as torch computes it."""
    pytest.importorskip("llama_cpp")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = tiny_llama(28, hidden=64)
    for name, one in (("base", model), ("tuned", noisy(model, 0.05))):
        write_gguf(tmp_path / f"{name}.gguf", one)
    return tmp_path / "base.gguf", tmp_path / "tuned.gguf", noisy(model, 0.05)


def test_its_log_probabilities_are_torchs(files: tuple[Path, Path, Any]) -> None:
    base, tuned, model = files
    lm = load(base)
    served = opened(f"llama.cpp:{tuned}", lm.tokenizer)
    assert isinstance(served, LlamaFile)
    assert served.ends == {1}  # its eos
    ids = [3, 9, 4, 11, 20, 5]
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1).numpy()
    assert np.abs(served.log_probs(ids) - expected).max() < 0.02
    sequences = Sequences([[3, 9], [5]], [[4, 11, 20], [7, 7]], [0, 1])
    found = between(LocalModel(lm.model, "float32"), served, sequences)
    mine = (
        lm.model(input_ids=torch.tensor([[3, 9, 4, 11, 20]])).logits[0, 1:-1].detach().double().log_softmax(-1).numpy()
    )
    yours = model(input_ids=torch.tensor([[3, 9, 4, 11, 20]])).logits[0, 1:-1].detach().double().log_softmax(-1).numpy()
    kl = (np.exp(mine) * (mine - yours)).sum(axis=1)
    assert found.estimate.positions[:3] == pytest.approx(kl, abs=0.02)


def test_a_comparison_either_way(files: tuple[Path, Path, Any]) -> None:
    base, tuned, _ = files
    for pair in (Pair(str(base), f"llama.cpp:{tuned}"), Pair(f"llama.cpp:{base}", str(tuned))):
        found = compare_served(pair, ON, Asking())
        for name, one in found.kl.items():
            assert one.gap == pytest.approx(0, abs=1e-6), name
            assert one.unknown == (0, 0)
        assert found.kl[REVERSE].estimate.per_completion.mean > 0.001


def test_a_run_is_watched_against_a_file(files: tuple[Path, Path, Any], capfd: pytest.CaptureFixture[str]) -> None:
    base, _, model = files
    run, prompts = base.parent / "run", base.parent / "prompts.txt"
    saved(run / "checkpoint-2", model, load(base).tokenizer)
    saved(base.parent / "tokenizer", model, load(base).tokenizer)
    prompts.write_text("ab\ncde\n")
    generic = base.parent / "generic.jsonl"
    generic.write_text('{"prompt": "ba"}\n{"prompt": "g"}\n')
    command = ["watch", str(run), "--base", f"llama.cpp:{base}", "--prompts", str(prompts), "--once", "--json"]
    command += ["--max-new-tokens", "4", "--no-chat", "--generic", str(generic)]
    assert main([*command, "--tokenizer", str(base.parent / "tokenizer")]) == 0
    out, said = capfd.readouterr()
    row = json.loads(out)
    assert row["kl_forward"] == pytest.approx(row["kl_forward_at_least"], abs=1e-6)
    assert "KL is exact" in " ".join(said.split())
    assert "estimates without bias" not in said
