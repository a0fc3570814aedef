"""Probes: what files hold, what the base completes, that the cache changes nothing, and which base is which."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlrazor.errors import RazorError
from rlrazor.lm import kl, probes, sampling
from rlrazor.lm.models import add_lora, base_digest, base_weights, load
from rlrazor.lm.probes import GenericText, ProbeSettings
from rlrazor.seeding import seed_of
from tiny_models import char_tokenizer, saved, tiny_llama

TOKENIZER = char_tokenizer()
SETTINGS = ProbeSettings(max_new_tokens=6, samples=2, chat=False)


def test_files_of_prompts_and_texts(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "hi"}]
    rows.write_text(
        "\n".join(json.dumps({"prompt": prompt, "answer": 1}) for prompt in ("a\u2028b", turns, "a\u2028b"))
    )
    assert probes.read_prompts(rows) == ["a\u2028b", turns]
    assert probes.read_generic(rows) == GenericText(prompts=("a\u2028b", turns))
    plain = tmp_path / "rows.txt"
    plain.write_text("one\n\n two \none\n")
    assert probes.read_prompts(plain) == ["one", "two"]
    assert probes.read_generic(plain) == GenericText(texts=("one", "two"))
    rows.write_text('{"text": "abc"}\n{"text": "def"}')
    assert probes.read_generic(rows) == GenericText(texts=("abc", "def"))
    with pytest.raises(RazorError, match="row 1: it needs a field 'prompt' with text; it has text"):
        probes.read_prompts(rows)
    plain.write_text("\n \n")
    with pytest.raises(RazorError, match="is empty"):
        probes.read_prompts(plain)
    with pytest.raises(RazorError, match="cannot be read"):
        probes.read_prompts(tmp_path / "missing.txt")
    with pytest.raises(RazorError, match="texts or prompts"):
        GenericText()
    assert len(GenericText.built_in().texts) == 60
    hashes = [GenericText(texts=("a", "b")), GenericText(texts=("b", "a")), GenericText(prompts=("a", "b"))]
    assert len({text.content_hash for text in hashes}) == 3


def test_completions_are_the_samplers_and_come_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    prompts = ["a:", "bcd="]
    first = probes.of_prompts(model, TOKENIZER, prompts, SETTINGS, cache_dir=tmp_path)
    ids = [TOKENIZER.encode(prompt) for prompt in prompts]
    rng = torch.Generator().manual_seed(seed_of(0, "measure/base"))
    drawn = sampling.sample(model, ids, samples=2, max_new_tokens=6, stop_ids=[1], pad_id=0, rng=rng)
    assert first.completions == drawn
    assert first.prompts == ids

    def no_sampling(*_: Any, **__: Any) -> None:
        raise AssertionError("sampled again")

    (kept,) = tmp_path.iterdir()
    with monkeypatch.context() as patched:
        patched.setattr(sampling, "sample", no_sampling)
        again = probes.of_prompts(copy.deepcopy(model), TOKENIZER, prompts, SETTINGS, cache_dir=tmp_path)
        assert again == first
        for other in (prompts[:1], [*prompts, "x"]):
            with pytest.raises(AssertionError):
                probes.of_prompts(model, TOKENIZER, other, SETTINGS, cache_dir=tmp_path)
        with pytest.raises(AssertionError):
            probes.of_prompts(tiny_llama(seed=1), TOKENIZER, prompts, SETTINGS, cache_dir=tmp_path)
        with pytest.raises(AssertionError):
            probes.of_prompts(model, TOKENIZER, prompts, ProbeSettings(5, 2, chat=False), cache_dir=tmp_path)
    for damaged in ("", "[[1]]", '[["a"], [1], [2], [3]]'):
        kept.write_text(damaged)
        assert probes.of_prompts(model, TOKENIZER, prompts, SETTINGS, cache_dir=tmp_path) == first
    unwritable = tmp_path / "file"
    unwritable.write_text("")
    assert probes.of_prompts(model, TOKENIZER, prompts, SETTINGS, cache_dir=unwritable) == first


def test_texts_are_measured_whole_and_prompts_that_do_not_fit_are_left_out(tmp_path: Path) -> None:
    model = tiny_llama()
    generic = probes.of_generic(model, TOKENIZER, GenericText(texts=("abc", "d", "e" * 100)), SETTINGS)
    assert generic == kl.Sequences.texts([TOKENIZER.encode("abc"), TOKENIZER.encode("e" * 64)])
    asked = probes.of_generic(model, TOKENIZER, GenericText(prompts=("abc",)), SETTINGS, cache_dir=tmp_path)
    assert asked.prompts == [TOKENIZER.encode("abc")]
    assert asked != probes.of_prompts(model, TOKENIZER, ["abc"], SETTINGS, cache_dir=tmp_path)  # another stream
    fits = probes.of_prompts(model, TOKENIZER, ["a" * 59, "a" * 58], SETTINGS, cache_dir=tmp_path)
    assert [len(prompt) for prompt in fits.prompts] == [58]
    with pytest.raises(RazorError, match="No prompt fits into the 64 tokens"):
        probes.of_prompts(model, TOKENIZER, ["a" * 59], SETTINGS, cache_dir=tmp_path)
    with pytest.raises(RazorError, match="no prompts"):
        probes.of_prompts(model, TOKENIZER, [], SETTINGS, cache_dir=tmp_path)
    with pytest.raises(RazorError, match="two tokens"):
        probes.of_generic(model, TOKENIZER, GenericText(texts=("a",)), SETTINGS)
    with pytest.raises(RazorError, match="at least 1"):
        ProbeSettings(max_new_tokens=0)


def test_a_conversation_goes_through_the_chat_template() -> None:
    tokenizer = char_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}{% endfor %}="
    turns = [{"role": "system", "content": "x"}, {"role": "user", "content": "hi"}]
    assert probes.encode(tokenizer, [turns, "hi"], chat=True) == [tokenizer.encode(t) for t in ("s:xu:hi=", "u:hi=")]
    assert probes.encode(tokenizer, ["hi"], chat=False) == [tokenizer.encode("hi")]


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # of importing the compiler
def test_a_digest_is_of_the_base_however_it_is_held(tmp_path: Path) -> None:
    model = tiny_llama()
    digest = base_digest(model)
    folder = saved(tmp_path / "base", model, TOKENIZER)
    assert base_digest(load(folder, dtype="bfloat16").model) == digest
    assert base_digest(torch.nn.parallel.DataParallel(model)) == digest
    assert base_digest(torch.compile(model)) == digest
    names = set(base_weights(model))
    adapted = add_lora(model, 2)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if ".lora_" in name:
                weight += 1.0
    assert base_digest(adapted) == digest
    assert set(base_weights(adapted)) == names
    assert base_digest(tiny_llama(seed=1)) != digest
    moved = tiny_llama()
    with torch.no_grad():
        for weight in moved.parameters():
            weight *= 1.01
    assert base_digest(moved) != digest
    assert base_digest(tiny_llama(layers=1)) != digest
