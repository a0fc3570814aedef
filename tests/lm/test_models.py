import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file

from gguf_files import write_gguf
from rlrazor.cli import main
from rlrazor.errors import RazorError
from rlrazor.lm import models
from rlrazor.lm.adapters import weights_of
from rlrazor.lm.forward import context_length
from tiny_models import char_tokenizer, saved, tiny_llama

IDS = torch.tensor([[2, 3, 4, 5, 1, 6]])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(tmp_path / "model", tiny_llama(), char_tokenizer())


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=IDS.to(model.device)).logits
    return out.cpu()


def tuned_adapter(folder: Path, seed: int = 0) -> Any:
    """A PEFT model with an adapter that does something, saved to `folder`."""
    torch.manual_seed(seed)
    model = models.add_lora(tiny_llama(), rank=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    return model.eval()


# --- loading


def test_a_folder_is_loaded_as_it_was_saved(folder: Path) -> None:
    lm = models.load(folder)
    torch.testing.assert_close(logits(lm.model), logits(tiny_llama()))
    assert lm.tokenizer.padding_side == "left"
    assert lm.tokenizer("a+b;").input_ids == char_tokenizer()("a+b;").input_ids
    assert not lm.model.training
    assert models.load(str(folder), dtype="bfloat16").model.dtype == torch.bfloat16


def test_an_adapter_is_loaded_onto_its_base(folder: Path, tmp_path: Path) -> None:
    tuned = tuned_adapter(tmp_path / "adapter")
    lm = models.load(folder, adapter=tmp_path / "adapter")
    torch.testing.assert_close(logits(lm.model), logits(tuned))
    with lm.model.disable_adapter():
        torch.testing.assert_close(logits(lm.model), logits(tiny_llama()))


def test_a_fingerprint_tells_policies_apart(folder: Path, tmp_path: Path) -> None:
    plain = models.load(folder).fingerprint
    assert models.load(saved(tmp_path / "copy", tiny_llama(), char_tokenizer())).fingerprint == plain
    tuned_adapter(tmp_path / "a", seed=0)
    tuned_adapter(tmp_path / "b", seed=1)
    others = [
        models.load(saved(tmp_path / "seed", tiny_llama(seed=1), char_tokenizer())),
        models.load(saved(tmp_path / "tokens", tiny_llama(), char_tokenizer("zyxwv"))),
        models.load(folder, adapter=tmp_path / "a"),
        models.load(folder, adapter=tmp_path / "b"),
    ]
    assert len({plain, *(lm.fingerprint for lm in others)}) == 5
    made = [models.LanguageModel.in_memory(tiny_llama(seed=seed), char_tokenizer(), "made") for seed in (0, 0, 1)]
    assert made[0].fingerprint == made[1].fingerprint != made[2].fingerprint


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_padding_has_a_token_and_eos_stays(tmp_path: Path, pad_is_eos: bool) -> None:
    tokenizer = char_tokenizer(pad_is_eos=True)
    if not pad_is_eos:
        tokenizer.pad_token = None
    lm = models.load(saved(tmp_path / "model", tiny_llama(vocab=43), tokenizer))
    assert lm.tokenizer.pad_token == lm.tokenizer.eos_token == ";"
    assert lm.model.config.pad_token_id == lm.model.generation_config.pad_token_id == lm.tokenizer.eos_token_id
    batch = lm.tokenizer(["ab;", "a"], padding=True, return_tensors="pt")
    # The real eos is attended to, the padding, of the same id, is not.
    assert batch.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch.input_ids[0, -1] == batch.input_ids[1, 0] == lm.tokenizer.eos_token_id


def test_a_tokenizer_that_can_pad_with_nothing_is_refused(tmp_path: Path) -> None:
    tokenizer = char_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(RazorError, match="neither a pad token nor"):
        models.load(saved(tmp_path / "model", tiny_llama(), tokenizer))


# --- refused


def test_weights_that_are_missing_are_not_made_up(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"], weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RazorError, match=r"lacks the weights model\.layers\.1\.mlp\.up_proj\.weight and model\.norm"):
        models.load(folder)


def test_an_adapter_that_is_not_whole_is_refused(folder: Path, tmp_path: Path) -> None:
    tuned_adapter(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(path)
    del weights["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(RazorError, match=r"adapter cannot be loaded: .*layers\.1\.mlp\.up_proj\.lora_B"):
        models.load(folder, adapter=tmp_path / "adapter")


def test_pickled_weights_are_not_read(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    (tmp_path / "run" / "checkpoint-5").mkdir(parents=True)
    with pytest.raises(RazorError, match=r"no model\.safetensors file\. It holds checkpoint-5: name one of them\."):
        models.load(tmp_path / "run")
    with pytest.raises(RazorError, match=r"no model\.safetensors file\.$"):
        models.load(folder)
    torch.save(tiny_llama().state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(RazorError, match="can run code"):
        models.load(folder)
    adapter = tmp_path / "adapter"
    tuned_adapter(adapter)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    saved(folder, tiny_llama(), char_tokenizer())
    with pytest.raises(RazorError, match="can run code"):
        models.load(folder, adapter=adapter)


def test_a_model_with_code_of_its_own_is_not_run(folder: Path) -> None:
    config = (folder / "config.json").read_text()
    mine = '"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}'
    (folder / "config.json").write_text(config.replace('"model_type": "llama"', mine))
    ran = folder / "ran"
    (folder / "mine.py").write_text(f"open({str(ran)!r}, 'w')\n")
    with pytest.raises(RazorError, match="cannot be loaded"):
        models.load(folder)
    assert not ran.exists()


def test_damaged_files_are_named(folder: Path) -> None:
    broken = tiny_llama()
    with torch.no_grad():
        broken.model.norm.weight[3] = torch.nan
    with pytest.raises(RazorError, match=r"damaged: model\.norm\.weight is NaN"):
        models.load(saved(folder, broken, char_tokenizer()))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(RazorError, match="not a whole safetensors file"):
        models.load(folder)


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "missing.gguf", "a/b/c"])
def test_a_path_that_is_not_there_is_not_looked_up_on_the_hub(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(RazorError, match="There is no"):
        models.load(source)


def test_other_sources_that_cannot_be_loaded(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RazorError, match="neither a folder"):
        models.load(folder / "config.json")
    with pytest.raises(RazorError, match="Unknown dtype float8"):
        models.load(folder, dtype="float8")
    with pytest.raises(RazorError, match="There is no folder"):
        models.load(folder, adapter=tmp_path / "nowhere")


class AnswerError(Exception):
    """As the hub's HTTP library has it, whichever that is."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(said)
        self.response = SimpleNamespace(status_code=status)


class TransportError(Exception):
    """The name that httpx gives what broke on the way; it is none of Python's own."""


def behind(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (LocalEntryNotFoundError("offline"), "hub cannot be reached"),
        (ConnectionError("reset"), "hub cannot be reached"),
        (TimeoutError("slow"), "hub cannot be reached"),
        (TransportError("slow"), "hub cannot be reached"),
        (RepositoryNotFoundError.__new__(RepositoryNotFoundError), "hub has no model"),
        (GatedRepoError.__new__(GatedRepoError), "only to those who have agreed to its terms"),
        (
            behind(LocalEntryNotFoundError("not here"), AnswerError(503, "try later")),
            r"The hub answered 503: not here\.$",
        ),
        (AnswerError(401, "Invalid token"), r"The hub answered 401: Invalid token\.$"),
        (OSError(28, "No space left on device"), r"cannot be kept in .*: No space left on device\. Free some space"),
        (behind(RuntimeError("xet"), OSError(28, "No space left on device")), "No space left on device"),
        (PermissionError(13, "Permission denied", "/cache/x"), r"cannot be kept in .*: Permission denied"),
        (OSError(30, "Read-only file system", "/cache/x"), r"cannot be kept in .*: Read-only file system"),
        (PermissionError(13, "Permission denied"), r"Downloading it failed: \[Errno 13\] Permission denied"),
        (ValueError("two\nlines:\n  the cause"), r"Downloading it failed: two lines: the cause\.$"),
    ],
)
def test_the_hubs_answers_become_a_sentence(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(RazorError, match=message) as caught:
        models.load("someone/something")
    assert caught.value.__cause__ is error
    assert ("cannot be reached" in str(caught.value)) == ("cannot be reached" in message)


def test_what_a_library_says_in_several_lines_keeps_its_cause(folder: Path, tmp_path: Path) -> None:
    """Of PEFT's twenty-eight lines, the number and the first."""
    models.add_lora(tiny_llama(hidden=32), 2).save_pretrained(tmp_path / "foreign")
    with pytest.raises(RazorError, match=r"shapes .*: .*lora_A.* is \[.*\], not \[.*\], and 27 more"):
        models.load(folder, adapter=tmp_path / "foreign")


def test_a_checkpoint_without_a_tokenizer_takes_the_bases(folder: Path, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "checkpoint")  # as a Trainer without processing_class does
    with pytest.raises(RazorError, match=r"checkpoint has no tokenizer .*beside its weights"):
        models.load(tmp_path / "checkpoint")
    base = models.load(folder)
    lm = models.load(tmp_path / "checkpoint", tokenizer=base.tokenizer)
    assert lm.tokenizer is base.tokenizer
    assert models.load(folder, tokenizer=base.tokenizer).tokenizer is not base.tokenizer  # it has its own


def test_vocabularies_are_compared(tmp_path: Path) -> None:
    base, same, larger, other = (
        models.LanguageModel.in_memory(tiny_llama(vocab=vocab), char_tokenizer(characters), "a model")
        for vocab, characters in ((44, "abc"), (44, "abc"), (45, "abc"), (44, "acb"))
    )
    models.check_same_vocabulary(models.Vocabulary.of(base), models.Vocabulary.of(same))
    for tuned in (larger, other):
        with pytest.raises(RazorError, match="different vocabularies"):
            models.check_same_vocabulary(models.Vocabulary.of(base), models.Vocabulary.of(tuned))


# --- GGUF


def test_a_gguf_file_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / name))
    model = tiny_llama(vocab=28)
    write_gguf(tmp_path / "model.gguf", model)
    lm = models.load(tmp_path / "model.gguf")
    torch.testing.assert_close(logits(lm.model), logits(model), atol=0.02, rtol=0.01)  # float16 matrices
    assert (lm.tokenizer.eos_token_id, lm.tokenizer.pad_token_id) == (1, 0)
    (converted,) = (tmp_path / "rlrazor" / "gguf").iterdir()
    assert {path.suffix for path in converted.glob("model*")} == {".safetensors"}

    # Renamed and loaded again, it is found by its content.
    real = transformers.AutoModelForCausalLM.from_pretrained

    def no_conversion(*arguments: Any, **options: Any) -> Any:
        assert "gguf_file" not in options
        return real(*arguments, **options)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", no_conversion)
    (tmp_path / "model.gguf").rename(tmp_path / "renamed.gguf")
    again = models.load(tmp_path / "renamed.gguf")
    assert again.fingerprint == lm.fingerprint


def test_a_conversion_is_named_by_its_file_and_found_by_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / name))
    path, cache = tmp_path / "Tiny-28.F16.gguf", tmp_path / "rlrazor" / "gguf"
    write_gguf(path, tiny_llama(vocab=28))
    models.load(path)
    assert f"{path} was converted into the folder {cache / 'Tiny-28.F16'}.\n" in capsys.readouterr().err
    assert main(["convert", str(path)]) == 0
    found = capsys.readouterr()
    assert found.out == f"{cache / 'Tiny-28.F16'}\n"
    assert "was converted" not in found.err
    # Another of the same name is another folder; one that is there and something else is not touched.
    write_gguf(path, tiny_llama(vocab=28, seed=1))
    for _ in range(2):
        assert main(["convert", str(path), "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == {"gguf": str(path), "folder": str(cache / "Tiny-28.F16-2")}
    assert main(["convert", str(path), "--out", str(tmp_path / "own")]) == 0
    assert models.load(tmp_path / "own").fingerprint == models.load(path).fingerprint
    before = sorted(tmp_path.rglob("*"))
    for refused, said in ((["--out", str(cache)], "is there already"), (["--out", str(path)], "is there already")):
        assert main(["convert", str(path), *refused]) == 2
        assert said in capsys.readouterr().err
    for no_gguf in (tmp_path, tmp_path / "nowhere.gguf", tmp_path / "nowhere"):
        assert main(["convert", str(no_gguf)]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_conversion_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / name))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(RazorError, match="cannot be loaded"):
        models.load(tmp_path / "broken.gguf")
    write_gguf(tmp_path / "model.gguf", tiny_llama(vocab=28))

    def disk_full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "save_pretrained", disk_full)
    with pytest.raises(RazorError, match=r"cannot be written to .*gguf: \[Errno 28\] No space left on device\. Free"):
        models.load(tmp_path / "model.gguf")
    assert not list(tmp_path.glob("rlrazor/gguf/*"))


def test_a_conversion_is_there_and_whole_or_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "model.gguf", tiny_llama(vocab=28))
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / name))
    cache = tmp_path / "rlrazor" / "gguf"

    def refused(self: Path, target: Path) -> Path:
        raise PermissionError(13, "Permission denied", str(target))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refused)
        with pytest.raises(RazorError, match=r"cannot be written to .* Permission denied"):
            models.load(tmp_path / "model.gguf")
    assert not list(cache.iterdir())
    models.load(tmp_path / "model.gguf")
    (converted,) = cache.iterdir()
    # Another process that was faster has made the same.
    real = Path.rename

    def overtaken(self: Path, target: Path) -> Path:
        shutil.copytree(tmp_path / "theirs", target)
        raise OSError(39, "Directory not empty", str(target))

    real(converted, tmp_path / "theirs")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", overtaken)
        models.load(tmp_path / "model.gguf")
    assert list(cache.iterdir()) == [converted]
    # Of a conversion that lost a file the rest is not taken for it.
    (converted / "model.safetensors").unlink()
    models.load(tmp_path / "model.gguf")
    assert (converted / "model.safetensors").is_file()


# --- LoRA and weights


def test_lora_starts_at_the_base_and_trains_every_linear_layer_but_the_head() -> None:
    model = models.add_lora(tiny_llama(), rank=2)
    torch.testing.assert_close(logits(model.eval()), logits(tiny_llama()), rtol=0, atol=0)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trainable) == 2 * 7 * 2  # A and B of seven matrices in two layers
    assert not any("lm_head" in name for name in trainable)


def test_weights_have_the_adapter_merged_under_the_bases_names(tmp_path: Path) -> None:
    tuned, base = tuned_adapter(tmp_path / "adapter"), tiny_llama()
    before = {name: tensor.clone() for name, tensor in tuned.state_dict().items()}
    weights = weights_of(tuned)
    assert list(weights) == list(weights_of(base))
    for name, tensor in tuned.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    merged = copy.deepcopy(tuned).merge_and_unload()
    for name, parameter in merged.named_parameters():
        torch.testing.assert_close(weights[name], parameter)
    changed = {name for name, tensor in weights_of(base).items() if not torch.equal(tensor, weights[name])}
    assert len(changed) == 14


def test_weights_are_a_copy() -> None:
    model = tiny_llama(tie_word_embeddings=True)
    weights = weights_of(model)
    assert "lm_head.weight" not in weights  # the same matrix as the embeddings: it would count twice
    with torch.no_grad():
        model.model.embed_tokens.weight += 1
    torch.testing.assert_close(weights["model.embed_tokens.weight"] + 1, model.model.embed_tokens.weight.data)


def test_context_length_is_the_configs() -> None:
    assert context_length(tiny_llama(max_position_embeddings=96)) == 96
    assert context_length(models.add_lora(tiny_llama(), rank=1)) == 64
    # ALiBi has no table of positions that could run out.
    assert context_length(SimpleNamespace(config=transformers.BloomConfig())) is None
