"""A model's configs in which anything was changed, and files that have no end."""

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from documents import changes, is_a_sentence
from rlrazor.errors import RazorError
from rlrazor.lm.probes import read_generic, read_prompts
from rlrazor.lm.weight_files import (
    WeightFiles,
    _named_by_config,
    check_config,
    named_base,
    read_adapter_config,
    require_causal,
)
from rlrazor.system import documents, files
from rlrazor.system.rows import read_located

NO_WEIGHTS = WeightFiles([], {}, {})
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "eos_token_id": [1, 2],
    "pad_token_id": None,
    "bos_token_id": 0,
    "is_encoder_decoder": False,
    "transformers_weights": None,
}


def test_any_change_of_a_config_is_refused_or_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for where, changed in changes(CONFIG):
        path.write_text(json.dumps(changed))
        try:
            check_config(tmp_path, "it", NO_WEIGHTS)
            require_causal(tmp_path, "it")
            assert isinstance(_named_by_config(tmp_path), str)
        except RazorError as error:
            is_a_sentence(error)
            continue
        if where[0] == "eos_token_id":
            found = changed.get("eos_token_id")
            ids = found if isinstance(found, list) else [found]
            assert all(one is None or type(one) is int for one in ids)


def test_any_change_of_an_adapters_config_is_refused_or_read(tmp_path: Path) -> None:
    for _, changed in changes({"task_type": "CAUSAL_LM", "base_model_name_or_path": "base", "r": 8}):
        (tmp_path / "adapter_config.json").write_text(json.dumps(changed))
        try:
            assert isinstance(named_base(tmp_path), str)
            assert isinstance(read_adapter_config(tmp_path).task_type, str | None)
        except RazorError as error:
            is_a_sentence(error)


@pytest.mark.parametrize("content", [b"", b"[" * 10_000, b"\x80", b'{"a": 1e400}', b"[]", b"3", b"null"])
def test_a_config_that_is_none_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_bytes(content)
    with pytest.raises(RazorError, match=r"generation_config\.json") as raised:
        check_config(tmp_path, "it", NO_WEIGHTS)
    is_a_sentence(raised.value)


def test_what_other_libraries_write_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"eos_token_id": 2, "time_step_limit": [0.0, Infinity], "a": 1, "a": 2, "n": 10000000000000000000000}'
    )
    check_config(tmp_path, "it", NO_WEIGHTS)


@pytest.mark.parametrize("read", [read_located, read_prompts, read_generic])
@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"prompt": ' + "[" * 10_000, "nested too deeply"),
        ('{"prompt": "a", "x": ' + "[" * 500 + "]" * 500 + "}", "nested too deeply"),
        ('{"prompt": "a", "x": 1e400}', "a number that is too large"),
        ('{"prompt": "a", "x": ' + "9" * 5000 + "}", "a number that is too large"),
        ('{"prompt": "a", "prompt": "b"}', 'has the key "prompt" twice'),
        ('{"prompt": "\\ud800"}', "not valid Unicode"),
    ],
)
def test_hostile_rows_are_refused(read: Any, content: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(RazorError, match=sentence) as raised:
        read(tmp_path / "a.jsonl")
    is_a_sentence(raised.value)


@pytest.mark.parametrize("read", [read_located, lambda path: documents.read_text(path)])
def test_what_has_no_end_is_refused(read: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = time.monotonic()
    with pytest.raises(RazorError, match="a device"):
        read(Path("/dev/zero"))
    monkeypatch.setattr(files, "_SECONDS", 0.05)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RazorError, match="nothing writes into"):
        read(tmp_path / "pipe")
    with pytest.raises(RazorError, match=r"directory|no file named"):
        read(tmp_path)
    assert time.monotonic() - begun < 2


def test_a_pipe_that_is_written_into_is_read_to_its_end(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")

    def write() -> None:
        with (tmp_path / "pipe").open("wb") as pipe:
            for _ in range(3):
                pipe.write(b"x" * 100_000)
                pipe.flush()
                time.sleep(0.02)

    thread = threading.Thread(target=write)
    thread.start()
    assert len(files.read_bytes(tmp_path / "pipe")) == 300_000
    thread.join()


@pytest.mark.parametrize("size", [9, 10, 11])
def test_a_file_is_read_up_to_its_limit(size: int, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * size)
    if size <= 10:
        assert files.read_bytes(tmp_path / "a", 10) == b"x" * size
    else:
        with pytest.raises(OSError, match="more than 10 bytes"):
            files.read_bytes(tmp_path / "a", 10)
