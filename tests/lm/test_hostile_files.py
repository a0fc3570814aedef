"""Models and adapters from anywhere: whatever is in their files, one sentence, soon, and nothing is run."""

import json
import os
import shutil
import struct
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from transformers import PreTrainedTokenizerFast

from rlrazor.errors import RazorError
from rlrazor.lm import encoding, models, trials
from tiny_models import char_tokenizer, saved, tiny_llama

DEEP = "[" * 10_000 + "]" * 10_000
NAME = "model.embed_tokens.weight"
Change = Callable[[Path], Any]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, an adapter of it and one of a model of twice its width; they are copied before they are changed."""
    root = tmp_path_factory.mktemp("folders")
    saved(root / "model", tiny_llama(), char_tokenizer())
    models.add_lora(tiny_llama(), 2).save_pretrained(root / "adapter")
    models.add_lora(tiny_llama(hidden=32), 2).save_pretrained(root / "wide")
    models.add_lora(tiny_llama(layers=4), 2).save_pretrained(root / "long")
    return root


def config(name: str = "config.json", /, **changed: Any) -> Change:
    """Sets values of a JSON file."""

    def change(folder: Path) -> None:
        before = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**before, **changed}))

    return change


def text(name: str, content: str) -> Change:
    return lambda folder: (folder / name).write_text(content)


def pipe(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return change


def shards(*names: str) -> Change:
    """The weights under each of these names, and an index of them all."""

    def change(folder: Path) -> None:
        content = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").unlink()
        weight_map = {f"{number}": name for number, name in enumerate(names)}
        text("model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": weight_map}))(folder)
        for name in names:
            if name.isprintable() and "/" not in name and len(name) < 100:
                (folder / name).write_bytes(content)

    return change


def header(changed: Mapping[str, Any] | str) -> Change:
    """Changes the entry of one tensor in the header, or puts text in the header's place."""

    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        content = path.read_bytes()
        end = 8 + struct.unpack("<Q", content[:8])[0]
        entries = json.loads(content[8:end])
        if not isinstance(changed, str):
            entries[NAME] |= changed
        new = (changed if isinstance(changed, str) else json.dumps(entries)).encode()
        path.write_bytes(struct.pack("<Q", len(new)) + new + content[end:])

    return change


def without_layer(folder: Path) -> None:
    config(num_hidden_layers=1)(folder)


def refused(load: Callable[[], Any], message: str) -> None:
    started = time.monotonic()
    with pytest.raises(RazorError, match=message) as error:
        load()
    assert time.monotonic() - started < 10
    assert len(str(error.value)) < 600
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (config(num_hidden_layers=10**6), r"num_hidden_layers = 1e\+06, and its weights are 21 tensors"),
        (config(num_labels=10**9), r"num_labels = 1e\+09, and its weights are 21 tensors"),
        (config(text_config={"n_layer": 10**9}), r"n_layer = 1e\+09"),
        (config(num_hidden_layers=-1), "num_hidden_layers = -1, and a model has at least one layer"),
        (without_layer, "it has 9 weights, such as .* and .*, in layers that its config.json leaves out"),
        (config(hidden_size=10**9), "its config describes 381,000,000,000 weights, and its files have room for 6,096"),
        (config(vocab_size=10**12), "its config describes 32,000,000,004,688 weights"),
        (config(vocab_size=10), r"weight is \[44, 16\], not \[10, 16\]"),
        (config(architectures=[1]), "architectures that are no list of names"),
        (config(_attn_implementation="some/kernel"), "code of the hub's to run it, _attn_impl.*'some/kernel'"),
        (text("config.json", DEEP), r"config\.json is damaged \(it is nested too deeply"),
        (text("config.json", "[]"), r"config\.json is damaged \(it is no JSON object\)"),
        (text("generation_config.json", DEEP), "it is nested too deeply"),
        (pipe("config.json"), r"config\.json is no file but a pipe"),
        (pipe("chat_template.jinja"), r"chat_template\.jinja is no file but a pipe"),
        (pipe("model.safetensors"), r"model\.safetensors is no file but a pipe"),
        (shards("pytorch_model.bin"), r"names pytorch_model\.bin as its weights, which is no safetensors file of it"),
        (shards("../model/a.safetensors"), "which is no safetensors file of it"),
        (shards("/a.safetensors"), "which is no safetensors file of it"),
        (shards("a\0.safetensors"), r"lacks 'a\\x00\.safetensors', of its weights"),
        (shards("a" * 5000 + ".safetensors"), "lacks 'a{255}', of its weights"),
        (shards("a.safetensors", "b.safetensors"), "has 21 weights, such as .*, in two files, b.safetensors being one"),
        (header({"shape": [-1, -1]}), "it is not a whole safetensors file"),
        (header({"shape": [2**40, 2**40]}), "[Oo]verflow"),
        (header({"data_offsets": [0, 4]}), "[Ii]nvalid"),
        (header({"dtype": "I32"}), r"its model\.embed_tokens\.weight is stored as I32|Only Tensors of floating point"),
        (header(DEEP), "it is not a whole safetensors file"),
        (header('{"a": {"dtype": "F32", "shape": 3, "data_offsets": [0, 4]}}'), "it is not a whole safetensors file"),
        (text("tokenizer.json", "[" * 10**6), "tokenizer.json|cannot be loaded"),
    ],
)  # fmt: skip
def test_a_hostile_model_is_one_sentence(root: Path, tmp_path: Path, change: Change, message: str) -> None:
    folder = shutil.copytree(root / "model", tmp_path / "it")
    change(folder)
    refused(lambda: models.load(folder), message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            config("tokenizer.json", model={"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]}),
            "Panic|cannot be loaded",
        ),
        (
            config("tokenizer.json", normalizer={"type": "Sequence", "normalizers": [
                {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}] * 4}),
            r"cannot be used: reading a short text with it (took longer than 1 s|was ended by SIGABRT)",
        ),
    ],
)  # fmt: skip
def test_a_tokenizer_is_read_elsewhere_first(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Change, message: str
) -> None:
    monkeypatch.setattr(trials, "SECONDS", 1.0)
    folder = shutil.copytree(root / "model", tmp_path / "it")
    change(folder)
    refused(lambda: models.load(folder), message)


def test_a_tokenizer_that_panics_on_a_text_is_one_sentence() -> None:
    class PanicException(BaseException):
        """As Rust's libraries have it, which is no Exception."""

    class Tokenizer:
        def __call__(self, text: str, **_: Any) -> Any:
            raise PanicException("index out of range")

    refused(lambda: encoding.text_ids(Tokenizer(), "a"), r"The tokenizer fails on a text \(index out of range\)")


def test_what_a_tokenizer_fails_at_in_use_is_one_sentence(root: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(root / "model", tmp_path / "it")
    config("tokenizer_config.json", model_max_length="x")(folder)
    refused(lambda: models.load(folder), "cannot be loaded: '>' not supported")
    wordpiece = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordPiece({"a": 0}, unk_token="[UNK]")))
    refused(lambda: encoding.text_ids(wordpiece, "b"), r"The tokenizer fails on a text \(WordPiece error: Missing")


PATTERN = "(.*.*)*!"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (config("adapter_config.json", target_modules=PATTERN), r"such as '\(\.\*\.\*\)\*!', .* took longer than"),
        (config("adapter_config.json", rank_pattern={PATTERN: 2}), r"took longer than 0\.5 s"),
        (config("adapter_config.json", layers_to_transform=[10**9]), r"has layers_to_transform = 1e\+09"),
        (config("adapter_config.json", layer_replication=[[0, 2]] * 1000), "repeats layers 1,000 times"),
        (config("adapter_config.json", r=10**9), r"has r = 1e\+09, which none of its weights has room for"),
        (config("adapter_config.json", r=4096), "has r = 4096 by its config, and 2 by its weights"),
        (config("adapter_config.json", megatron_config={"a": 1}), "names a module of Megatron's"),
        (config("adapter_config.json", use_dora=True), "missing adapter keys .*: 14 weights, such as [^ ]* and [^ ]*$"),
        (text("adapter_config.json", DEEP), r"adapter_config\.json is damaged \(it is nested too deeply"),
        (text("adapter_config.json", "[]"), r"adapter_config\.json is damaged \(it is no JSON object\)"),
        (pipe("adapter_config.json"), r"adapter_config\.json is no file but a pipe"),
        (pipe("adapter_model.safetensors"), r"adapter_model\.safetensors is no file but a pipe"),
    ],
)  # fmt: skip
def test_a_hostile_adapter_is_one_sentence(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Change, message: str
) -> None:
    monkeypatch.setattr(trials, "SECONDS", 0.5)
    folder = shutil.copytree(root / "adapter", tmp_path / "it")
    change(folder)
    refused(lambda: models.load(root / "model", adapter=folder), message)


def test_an_adapter_of_another_model_is_one_sentence(root: Path) -> None:
    for name, message in (
        ("wide", r"shapes that its config describes: .*lora_A.* is \[\d+, \d+\], not \[\d+, \d+\], and 27 more\.$"),
        ("long", r"it has 28 weights, such as .*layers\.2.* and .*, for layers that the model does not have"),
    ):
        refused(lambda name=name: models.load(root / "model", adapter=root / name), message)  # type: ignore[misc]


def test_links_into_a_cache_are_followed_and_what_is_right_is_untouched(root: Path, tmp_path: Path) -> None:
    """As the hub's cache has them; and neither looking at a model nor what is beside it changes what is loaded."""
    (tmp_path / "it").mkdir()
    for path in (root / "model").iterdir():
        (tmp_path / "it" / path.name).symlink_to(path)
    os.mkfifo(tmp_path / "it" / "a.log")
    before = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = models.load(tmp_path / "it").model.state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    stored = load_file(root / "model" / "model.safetensors")
    assert all(torch.equal(loaded[name].cpu(), weight) for name, weight in stored.items())
    assert len(stored) == 21


def test_what_is_no_number_is_no_eos(root: Path) -> None:
    lm = models.load(root / "model")
    several: list[Any] = ["x", [["a"]], {}]
    for wrong in several:
        lm.model.generation_config.eos_token_id = wrong
        refused(lambda: encoding.stop_ids(lm.tokenizer, lm.model), "eos_token_id is .*, no token's id")
