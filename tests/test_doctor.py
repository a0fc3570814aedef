"""`razor doctor`: what it finds is what is installed, it survives what is broken, and names nobody."""

import argparse
import getpass
import json
import platform
import re
import socket
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from rlrazor import extras
from rlrazor.cli import build_parser, doctor, main

ROOT = Path(__file__).parents[1]


def printed(capsys: pytest.CaptureFixture[str], *more: str) -> str:
    capsys.readouterr()
    assert main(["doctor", *more]) == 0
    return capsys.readouterr().out


def found(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return dict(json.loads(printed(capsys, "--json")))


def test_it_says_what_is_installed(capsys: pytest.CaptureFixture[str]) -> None:
    said, text = found(capsys), printed(capsys)
    assert said["torch"] == torch.__version__
    assert said["python"].startswith(platform.python_version())
    for extra, packages in said["extras"].items():
        for name, one in packages.items():
            try:
                version = metadata.version(name)
            except metadata.PackageNotFoundError:
                version = None
            assert one["version"] == version, (extra, name)
            assert f"{name} {version or 'missing'}" in text
    assert len(said["devices"]) == torch.cuda.device_count()


def test_every_command_and_every_extra_is_in_it() -> None:
    (choices,) = (
        action.choices for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction)
    )
    words = set(re.findall(r"[\w-]+", " ".join(doctor.COMMANDS)))
    assert set(choices) - {"doctor"} <= words
    assert {extra for needed in doctor.COMMANDS.values() for extra in needed} == set(extras.EXTRAS)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(extras.EXTRAS) <= set(project["optional-dependencies"])


REFUSED = {
    "sweep": ["--base", "tiny", "--task", "letters"],
    "calibrate": ["tiny", "--task", "letters"],
    "finetune": ["tiny", "--task", "letters", "--lr", "1e-4"],
    "evaluate": ["tiny", "--task", "letters"],
    "compare": ["a", "b", "--prompts", "p.txt"],
    "convert": ["model.gguf", "--out", "folder"],
    "watch": [".", "--base", "a", "--prompts", "p.txt"],
}


@pytest.mark.parametrize("command", REFUSED)
def test_what_a_command_lacks_is_what_it_says_itself(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Without any of the packages of an extra, the command asks for one that is in its line here."""
    (needed,) = (needed for names, needed in doctor.COMMANDS.items() if re.search(rf"\b{command}\b(?! --)", names))
    monkeypatch.chdir(tmp_path)
    Path("model.gguf").touch()
    for extra in needed:
        with monkeypatch.context() as patch:
            for name in extras.EXTRAS[extra]:
                patch.setitem(sys.modules, name, None)
            assert main([command, *REFUSED[command]]) == 2
        assert f"This needs the extra [{extra}]" in capsys.readouterr().err


def without(*missing: str, **versions: str) -> Any:
    known = metadata.version

    def version(name: str) -> str:
        if name in missing:
            raise metadata.PackageNotFoundError(name)
        return versions.get(name, known(name))

    return version


def test_what_is_missing_or_too_old_is_said_with_what_needs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = [
        "transformers<6,>=4.51; extra == 'guard'",
        "transformers>=5.20; extra == 'train'",
        "peft>=0.20; extra=='train'",
    ]
    monkeypatch.setattr(metadata, "requires", lambda name: wanted)
    monkeypatch.setattr(metadata, "version", without("trl", "gguf", transformers="4.57.1", peft="0.21.0"))
    said, text = found(capsys), printed(capsys)
    assert said["extras"]["train"]["trl"] == {"version": None, "needs": None}
    assert said["extras"]["guard"]["transformers"] == {"version": "4.57.1", "needs": None}
    assert said["extras"]["train"]["transformers"] == {"version": "4.57.1", "needs": ">=5.20"}
    assert "trl missing" in text
    assert "transformers 4.57.1 (needs >=5.20)" in text
    lacks = {command: one["lacks"] for command, one in said["commands"].items()}
    for command, missing in lacks.items():
        assert missing == (["train"] if "calibrate" in command else []), command
    assert "finetune, sweep, calibrate, continual, reproduce language: lacks [train]" in text
    assert "ForgettingMonitor, watch, compare, pick --base, convert: ready" in text
    assert "pip install -e '.[train]'" in text
    assert "gguf missing (for GGUF files)" in text


def test_it_names_nobody(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    home = tmp_path / "home" / "jane.doe"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(getpass, "getuser", lambda: "jane.doe")
    monkeypatch.setattr(socket, "gethostname", lambda: "janes-laptop")
    monkeypatch.setattr(platform, "release", lambda: "6.1-janes-laptop")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("WANDB_API_KEY", "wandb_secret")
    monkeypatch.setenv("RLRAZOR_CACHE", str(home / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", f"log:{home}/private file")
    trouble = f"cannot open shared object file /opt/secret-project/lib/x.so, {home}/lib/libcudart.so of jane.doe"
    monkeypatch.setattr(torch.cuda, "is_available", Mock(side_effect=OSError(trouble)))
    for text in (printed(capsys), printed(capsys, "--json")):
        for secret in ("jane", "secret", str(tmp_path), "private"):
            assert secret not in text, secret
        assert "OMP_NUM_THREADS" in text
        assert "libcudart.so" in text


def test_a_torch_that_cannot_be_used_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    text = printed(capsys)
    assert "torch missing, without CUDA" in text
    assert "torch cannot be used: " in text


def test_devices_are_listed_with_what_is_free(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    card = Mock(major=9, minor=0)
    card.name = "NVIDIA H200"
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: card)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (40 * 10**9, 150 * 10**9))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    text = printed(capsys)
    assert "CUDA 12.8" in text
    assert "cuda:1 NVIDIA H200, 40.0 GB of 150.0 GB free, capability 9.0, with bfloat16" in text
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "built for CUDA and sees no device" in printed(capsys)


def test_a_cache_that_cannot_be_written_to_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RLRAZOR_CACHE", str(tmp_path / "file" / "cache"))
    assert "The cache cannot be written to: set RLRAZOR_CACHE" in printed(capsys)
