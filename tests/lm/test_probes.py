"""Probes: what files hold, what the base completes, that the cache changes nothing, and which base is which."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import processors

from rlrazor.errors import RazorError
from rlrazor.guard import base_side
from rlrazor.guard.measured_on import MeasuredOn
from rlrazor.lm import kl, probes, sampling
from rlrazor.lm.adapters import BaseWeights
from rlrazor.lm.digests import base_digest, is_same_base, tokenizer_digest
from rlrazor.lm.models import add_lora, load
from rlrazor.lm.probes import GenericText, ProbeSettings
from rlrazor.lm.sampling import NotFiniteError
from rlrazor.seeding import seed_of
from tiny_models import char_tokenizer, saved, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # of PEFT's

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
    with pytest.raises(RazorError, match=r"line 1: it needs a column `prompt` .* or `messages` .*; it has text"):
        probes.read_prompts(rows)
    newlines = tmp_path / "rows.NDJSON"
    newlines.write_text('{"prompt": "abc"}\n{"prompt": "def"}')
    assert probes.read_prompts(newlines) == ["abc", "def"]
    rows.write_text('{"prompt": "a"}\n{"prompt": "\\ud83d hi"}')
    with pytest.raises(RazorError, match="line 2: the text is not valid Unicode"):
        probes.read_prompts(rows)
    plain.write_text("\n \n")
    with pytest.raises(RazorError, match="is empty"):
        probes.read_prompts(plain)
    for missing in ("missing.txt", "missing.jsonl"):
        with pytest.raises(RazorError, match=rf"There is no .*{missing}"):
            probes.read_prompts(tmp_path / missing)
    with pytest.raises(RazorError, match="texts are a tuple of strings, and nan is none"):
        GenericText(texts=("a", math.nan))  # type: ignore[arg-type]
    with pytest.raises(RazorError, match="texts are a tuple of strings, and 'abc' is none"):
        GenericText(texts="abc")  # type: ignore[arg-type]
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
    drawn = sampling.sample(model, ids, sampling.Sampling(samples=2, max_new_tokens=6, stop_ids=[1], pad_id=0, rng=rng))
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
        ending = copy.deepcopy(model)
        ending.generation_config.eos_token_id = [1, 5]
        with pytest.raises(AssertionError):
            probes.of_prompts(ending, TOKENIZER, prompts, SETTINGS, cache_dir=tmp_path)
        with pytest.raises(AssertionError):
            probes.of_prompts(tiny_llama(seed=1), TOKENIZER, prompts, SETTINGS, cache_dir=tmp_path)
        with pytest.raises(AssertionError):
            probes.of_prompts(model, TOKENIZER, prompts, ProbeSettings(5, 2, chat=False), cache_dir=tmp_path)
    rows = len(drawn)
    hostile = [[[1]] * (rows - 1), [[]] * rows, [[-1]] * rows, [[10**6]] * rows, [[1] * 7] * rows, [[True]] * rows]
    for damaged in ("", "[[1]]", '[["a"], [1], [2], [3]]', "[" * 10_000, *map(json.dumps, hostile)):
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
    for stop in ((";", ""), ("",)):
        with pytest.raises(RazorError, match="A stop string is empty"):
            ProbeSettings(stop=stop)
    with pytest.raises(RazorError, match="tuple of strings"):
        ProbeSettings(stop=";.")  # type: ignore[arg-type]


def test_a_text_that_the_tokenizer_ends_is_measured_without_its_end() -> None:
    ending = char_tokenizer()
    ending.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A ;", special_tokens=[(";", 1)])
    model, generic = tiny_llama(), GenericText(texts=("abc", "e" * 100))
    assert ending("abc")["input_ids"][-1] == ending.eos_token_id
    assert probes.of_generic(model, ending, generic, SETTINGS) == probes.of_generic(model, TOKENIZER, generic, SETTINGS)
    prompts = probes.of_prompts(model, ending, ["a:", "bcd="], SETTINGS)
    assert prompts == probes.of_prompts(model, TOKENIZER, ["a:", "bcd="], SETTINGS)


def test_a_conversation_goes_through_the_chat_template() -> None:
    tokenizer = char_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}{% endfor %}="
    turns = [{"role": "system", "content": "x"}, {"role": "user", "content": "hi"}]
    assert probes.encode(tokenizer, [turns, "hi"], chat=True) == [tokenizer.encode(t) for t in ("s:xu:hi=", "u:hi=")]
    assert probes.encode(tokenizer, ["hi"], chat=False) == [tokenizer.encode("hi")]
    tokenizer.chat_template = "{{ raise_exception('only users') }}"
    with pytest.raises(RazorError, match=r"does not take a prompt \(only users\)"):
        probes.encode(tokenizer, [turns], chat=True)
    with pytest.raises(RazorError, match=r"does not take a prompt \(only users\)"):
        probes.encode(tokenizer, ["hi"], chat=True)
    with pytest.raises(RazorError, match="Prompt 2: the text is not valid Unicode"):
        probes.encode(char_tokenizer(), ["a", "\ud83d"], chat=True)
    with pytest.raises(RazorError, match="has no chat template"):
        probes.encode(char_tokenizer(), [turns], chat=True)
    with pytest.raises(RazorError, match="Prompt 2: the prompt is blank"):
        probes.encode(char_tokenizer(), ["a", ""], chat=True)


def trained_adapter(model: Any, config: Any) -> Any:
    """Every weight of the adapter moved."""
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight += 0.5
    return adapted


def test_the_base_of_a_trained_adapter_is_without_it(tmp_path: Path) -> None:
    expected = probes.of_prompts(tiny_llama(), TOKENIZER, ["a:", "bcd="], SETTINGS)
    adapted = trained_adapter(tiny_llama(), LoraConfig(r=2, target_modules="all-linear"))
    assert probes.of_prompts(adapted, TOKENIZER, ["a:", "bcd="], SETTINGS) == expected
    first = probes.of_prompts(adapted, TOKENIZER, ["a:", "bcd="], SETTINGS, cache_dir=tmp_path)
    assert first == expected
    assert probes.of_prompts(tiny_llama(), TOKENIZER, ["a:", "bcd="], SETTINGS, cache_dir=tmp_path) == expected
    assert len(list(tmp_path.iterdir())) == 1


def test_a_tokenizers_digest_is_of_all_that_makes_a_prompt() -> None:
    digest = tokenizer_digest(char_tokenizer())
    assert tokenizer_digest(char_tokenizer()) == digest
    template, eos = char_tokenizer(), char_tokenizer()
    template.chat_template = "{{ messages }}"
    eos.eos_token = "a"
    assert len({digest, *map(tokenizer_digest, (template, eos, char_tokenizer("cba")))}) == 4


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # of importing the compiler
def test_a_digest_is_of_the_base_however_it_is_held(tmp_path: Path) -> None:
    model = tiny_llama()
    digest = base_digest(model)

    def same(other: Any) -> bool:
        return is_same_base(base_digest(other), digest)

    folder = saved(tmp_path / "base", model, TOKENIZER)
    assert base_digest(load(folder).model) == digest
    assert same(load(folder, dtype="bfloat16").model)
    assert base_digest(torch.nn.parallel.DataParallel(model)) == digest
    assert base_digest(torch.compile(model)) == digest
    model.train()  # with dropout, say: it is told by what it computes without
    assert base_digest(model) == digest
    assert all(module.training for module in model.modules())
    names = set(BaseWeights(model))
    adapted = add_lora(model, 2)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if ".lora_" in name:
                weight += 1.0
    assert base_digest(adapted) == digest
    assert set(BaseWeights(adapted)) == names
    assert not same(tiny_llama(seed=1))
    moved = tiny_llama()
    with torch.no_grad():
        for weight in moved.parameters():
            weight *= 1.01
    assert not same(moved)
    assert not same(tiny_llama(layers=1))
    # The same weights, computed with in another way, are another base; in training with dropout, they are the same.
    # To transformers before 5 by the second name.
    assert not same(tiny_llama(rope_parameters={"rope_type": "default", "rope_theta": 100.0}, rope_theta=100.0))
    assert not same(tiny_llama(rms_norm_eps=0.1))
    assert same(tiny_llama(attention_dropout=0.3, activation_dropout=0.2, logging_steps=3))


def test_a_digest_bears_rounding_and_no_more() -> None:
    digest = base_digest(tiny_llama())
    precision, total, norm, *values = digest.split()
    weights = torch.cat([weight.flatten() for weight in tiny_llama().parameters()]).detach().to(torch.bfloat16).double()
    assert float(total) == pytest.approx(float(weights.sum()), rel=1e-9)
    assert float(norm) == pytest.approx(float(weights.square().sum().sqrt()), rel=1e-9)

    def moved(by: float, some: slice = slice(None)) -> str:
        numbers = [float(value) for value in values]
        numbers[some] = [number + by for number in numbers[some]]
        return " ".join([precision, total, norm, *(f"{number:.4f}" for number in numbers)])

    assert precision == "float32"
    # Tokens that none of these log-probabilities is of: a merged embedding of one.
    one = tiny_llama()
    with torch.no_grad():
        one.model.embed_tokens.weight[7] += 0.1
    assert not is_same_base(base_digest(one), digest)
    assert not is_same_base(base_digest(one.to(torch.bfloat16)), base_digest(tiny_llama().to(torch.bfloat16)))
    assert is_same_base(moved(1e-3), digest)
    assert not is_same_base(moved(1e-2), digest)
    assert is_same_base(moved(3.0, slice(0, 10)), digest)  # a few tokens that a mixture of experts routes otherwise
    assert not is_same_base(moved(3.0, slice(0, 20)), digest)
    assert is_same_base(moved(0.05), digest.replace("float32", "bfloat16"))
    for number in (total, norm):
        assert not is_same_base(digest.replace(number, "nan"), digest)
        assert not is_same_base(digest, digest.replace(number, "nan"))
    for other in ("", "0" * 16, "float32", digest.rsplit(" ", 1)[0], digest.replace(values[0], "one")):
        assert not is_same_base(other, digest)
    broken = tiny_llama()
    with torch.no_grad():
        broken.lm_head.weight.fill_(torch.nan)
    with pytest.raises(NotFiniteError):
        base_digest(broken)


def test_a_token_without_an_embedding_is_named() -> None:
    small = tiny_llama(vocab=20)
    with pytest.raises(RazorError, match=r"Prompt 2 has the token \d+ \('z'\), and the model has embeddings for 20"):
        probes.of_prompts(small, TOKENIZER, ["ab", "az"], SETTINGS)
    with pytest.raises(RazorError, match=r"Text 1 has the token \d+ \('z'\)"):
        probes.of_generic(small, TOKENIZER, GenericText(texts=("zab",)), SETTINGS)


def test_long_prompts_are_completed_fewer_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """By their number of tokens alone: the same on any machine."""
    chunks: list[int] = []
    real = sampling.sample

    def noting(model: Any, prompts: Any, how: sampling.Sampling, told: Any) -> list[list[int]]:
        chunks.append(how.chunk)
        return real(model, prompts, how, told)

    monkeypatch.setattr(sampling, "sample", noting)
    monkeypatch.setattr(probes, "KEPT_TOKENS", 100)
    model = tiny_llama()
    for prompts in (["ab:"], ["ab:", "a" * 40], ["ab:", "a" * 58]):
        probes.of_prompts(model, TOKENIZER, prompts, SETTINGS)
    assert chunks == [100 // 9, 100 // 46, 100 // 64]


def test_a_monitors_completions_are_there_for_compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks, and whether the precision was named: the base's side is sampled once."""
    on = MeasuredOn(["a:", "b="], GenericText(("abc",)), SETTINGS)
    base_side.BaseSide.of(tiny_llama(), TOKENIZER, on, cache_dir=tmp_path)
    (kept,) = tmp_path.iterdir()
    monkeypatch.setattr(sampling, "sample", None)
    model = tiny_llama()
    for settings in (SETTINGS, replace(SETTINGS, precision="float32")):
        for digest in (None, base_digest(model, settings.precision)):
            probes.of_prompts(model, TOKENIZER, ["a:", "b="], settings, cache_dir=tmp_path, digest=digest)
    assert [*tmp_path.iterdir()] == [kept]
