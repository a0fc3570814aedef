"""Texts that the base writes itself: KL on them beside a sum over all texts, how they are drawn, what is said."""

import copy
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from transformers import T5Config, T5ForConditionalGeneration

from rlrazor.errors import RazorError
from rlrazor.lm import forward, kl, own_texts, probes, sampling
from rlrazor.lm.kl import Sequences
from rlrazor.lm.own_texts import OwnTexts
from rlrazor.lm.probes import GenericText, ProbeSettings
from rlrazor.seeding import seed_of
from tiny_models import char_tokenizer, noisy, tiny_llama

TOKENIZER = char_tokenizer()
EOS = TOKENIZER.eos_token_id
SETTINGS = ProbeSettings(max_new_tokens=6)
TEMPLATE = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}{% endfor %}="


def few_tokens(chat: str | None = None) -> Any:
    """A tokenizer of seven tokens: pad, `;` the eos, and `abu:=`."""
    tokenizer = char_tokenizer("abu:=")
    tokenizer.chat_template = chat
    return tokenizer


def kl_of_texts(base: Any, tuned: Any, beginning: list[int], longest: int) -> float:
    """KL(base || tuned) of whole texts, of every text there is: those that eos ends, and those cut after `longest`."""

    def logp(model: Any, text: tuple[int, ...]) -> float:
        ids = torch.tensor([[*beginning, *text]])
        with torch.no_grad():
            logp_TV = model(input_ids=ids).logits[0].double().log_softmax(dim=-1)
        return sum(float(logp_TV[len(beginning) - 1 + at, token]) for at, token in enumerate(text))

    texts = [
        text
        for length in range(1, longest + 1)
        for text in itertools.product(range(base.config.vocab_size), repeat=length)
        if EOS not in text[:-1] and (text[-1] == EOS or length == longest)
    ]
    of_base = [logp(base, text) for text in texts]
    assert math.fsum(map(math.exp, of_base)) == pytest.approx(1, abs=1e-6)
    return math.fsum(math.exp(p) * (p - logp(tuned, text)) for p, text in zip(of_base, texts, strict=True))


@pytest.mark.parametrize("longest", [1, 2, 3])
def test_kl_is_that_of_the_distribution_of_texts(longest: int) -> None:
    """The mean over samples, and the exact sum over all texts of three tokens at most."""
    base = tiny_llama(7, scale=0.5)
    tuned = noisy(base, 0.2)
    generic = GenericText.of_base(samples=4000, max_new_tokens=longest)
    found = kl.forward_kl(kl.Probe(base, probes.of_generic(base, few_tokens(), generic, SETTINGS)), tuned)
    exact = kl_of_texts(base, tuned, [EOS], longest)
    mean, error = found.per_completion
    assert found.n_prompts == 4000
    assert error < 0.05 * exact
    # The first token has no context that is drawn, so that its KL is exact; of more, two errors and a bit.
    assert mean == pytest.approx(exact, abs=2.5 * error if longest > 1 else 1e-5)
    if longest > 1:
        assert mean > kl_of_texts(base, tuned, [EOS], longest - 1) + 5 * error


def test_with_a_chat_template_it_is_the_mean_of_both_beginnings() -> None:
    base = tiny_llama(7, scale=0.5)
    tuned, tokenizer = noisy(base, 0.2), few_tokens(TEMPLATE)
    generic = GenericText.of_base(samples=4000, max_new_tokens=2)
    sequences = probes.of_generic(base, tokenizer, generic, SETTINGS)
    turn = tokenizer.encode("u:=")
    assert [*map(tuple, sequences.prompts)] == [(EOS,)] * 2000 + [tuple(turn)] * 2000
    mean, error = kl.forward_kl(kl.Probe(base, sequences), tuned).per_completion
    exact = [kl_of_texts(base, tuned, beginning, 2) for beginning in ([EOS], turn)]
    assert abs(exact[0] - exact[1]) > 10 * error
    assert mean == pytest.approx(sum(exact) / 2, abs=2.5 * error)
    plain = probes.of_generic(base, tokenizer, generic, ProbeSettings(chat=False))
    assert {*map(tuple, plain.prompts)} == {(EOS,)}


def drawn_alone(model: Any, beginning: list[int], place: int, text: int, how: OwnTexts) -> list[int]:
    """A text by itself, read anew for each token, with the numbers that are its own."""
    first = text // own_texts.AT_A_TIME * own_texts.AT_A_TIME
    rng = torch.Generator().manual_seed(seed_of(how.seed, f"measure/own/{place}/{first}"))
    drawn: list[int] = []
    while len(drawn) < how.max_new_tokens and drawn[-1:] != [EOS]:
        noise_SV = torch.empty(own_texts.AT_A_TIME, model.config.vocab_size).exponential_(generator=rng)
        with torch.no_grad():
            probs_V = model(input_ids=torch.tensor([[*beginning, *drawn]])).logits[0, -1].softmax(dim=-1)
        drawn.append(int((probs_V / noise_SV[text - first]).argmax()))
    return drawn


def test_a_text_is_the_same_whatever_is_drawn_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_llama(), char_tokenizer()

    def texts(samples: int, seed: int = 0) -> list[list[int]]:
        generic = GenericText.of_base(samples=samples, max_new_tokens=12, seed=seed)
        return [list(text) for text in probes.of_generic(model, tokenizer, generic, SETTINGS).completions]

    many = texts(70)
    assert len({*map(tuple, many)}) > 60
    for fewer in (1, 31, 40):
        assert texts(fewer) == many[:fewer]
    how = OwnTexts(70, 12)
    assert many[:5] + many[60:] == [drawn_alone(model, [EOS], 0, at, how) for at in (*range(5), *range(60, 70))]
    assert texts(70, seed=1) != many
    for way in forward.WAYS:
        monkeypatch.setattr(forward, "WAYS", (way, way))
        assert texts(40) == many[:40]
    monkeypatch.undo()
    # With two beginnings, each of the two goes on in its own way.
    tokenizer.chat_template = TEMPLATE
    for samples in (10, 11, 67):
        drawn = texts(samples)
        half = -(-samples // 2)
        assert drawn[:half] == many[:half]
        assert drawn[-1] == drawn_alone(model, tokenizer.encode("u:="), 1, samples - half - 1, how)


def test_what_was_written_is_kept_by_the_bases_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, generic = tiny_llama(), GenericText.of_base(samples=5, max_new_tokens=4)
    first = probes.of_generic(model, TOKENIZER, generic, SETTINGS, cache_dir=tmp_path)
    (kept,) = tmp_path.iterdir()
    assert json.loads(kept.read_text()) == first.completions
    assert first == probes.of_generic(model, TOKENIZER, generic, SETTINGS)

    def no_sampling(*_: Any, **__: Any) -> None:
        raise AssertionError("sampled again")

    with monkeypatch.context() as patched:
        patched.setattr(sampling, "sample", no_sampling)
        # Neither how prompts are completed nor what ends those matters.
        for settings in (SETTINGS, ProbeSettings(3, 2, ("a",), precision="float32")):
            again = probes.of_generic(copy.deepcopy(model), TOKENIZER, generic, settings, cache_dir=tmp_path)
            assert again == first
        ending = copy.deepcopy(model)
        ending.generation_config.eos_token_id = [1, 5]
        chatting = char_tokenizer()
        chatting.chat_template = TEMPLATE
        others: list[tuple[Any, Any, GenericText]] = [
            (tiny_llama(seed=1), TOKENIZER, generic),
            (ending, TOKENIZER, generic),
            (model, chatting, generic),
            (model, TOKENIZER, GenericText.of_base(samples=5, max_new_tokens=4, seed=1)),
            (model, TOKENIZER, GenericText.of_base(samples=6, max_new_tokens=4)),
            (model, TOKENIZER, GenericText.of_base(samples=5, max_new_tokens=3)),
        ]
        for other, tokenizer, asked in others:
            with pytest.raises(AssertionError):
                probes.of_generic(other, tokenizer, asked, SETTINGS, cache_dir=tmp_path)
    for damaged in ("", "[[1]]", json.dumps([[99]] * 5), json.dumps([[2] * 5] * 5)):
        kept.write_text(damaged)
        assert probes.of_generic(model, TOKENIZER, generic, SETTINGS, cache_dir=tmp_path) == first


def test_the_base_of_an_adapter_writes_without_it() -> None:
    from rlrazor.lm.models import add_lora

    generic = GenericText.of_base(samples=5, max_new_tokens=8)
    expected = probes.of_generic(tiny_llama(), TOKENIZER, generic, SETTINGS)
    adapted = add_lora(tiny_llama(), 2)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if ".lora_" in name:
                weight += 1.0
    assert probes.of_generic(adapted, TOKENIZER, generic, SETTINGS) == expected


def test_what_begins_a_text() -> None:
    model = tiny_llama()
    assert own_texts.beginnings(model, char_tokenizer(), chat=True) == [[EOS]]
    named = char_tokenizer()
    named.bos_token = "="
    equals = named.convert_tokens_to_ids("=")
    assert own_texts.beginnings(model, named, chat=True) == [[equals]]
    # What the tokenizer does comes before what it declares; what it puts behind a text begins none.
    putting = char_tokenizer()
    putting.bos_token = "="
    putting.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="+ - $A ;", special_tokens=[(token, putting.convert_tokens_to_ids(token)) for token in "+-;"]
    )
    assert own_texts.beginnings(model, putting, chat=True) == [putting.convert_tokens_to_ids(["+", "-"])]
    # The model's own, where its tokenizer knows it for a special one: else it is a class's default.
    by_model = tiny_llama()
    by_model.generation_config.bos_token_id = 7
    assert own_texts.beginnings(by_model, char_tokenizer(), chat=True) == [[EOS]]
    by_model.generation_config.bos_token_id = 0
    assert own_texts.beginnings(by_model, char_tokenizer(), chat=True) == [[0]]


def test_a_template_that_takes_no_empty_turn_is_left_out() -> None:
    model, tokenizer = tiny_llama(), char_tokenizer()
    tokenizer.chat_template = "{% if not messages[0]['content'] %}{{ raise_exception('empty') }}{% endif %}"
    assert own_texts.beginnings(model, tokenizer, chat=True) == [[EOS]]
    # One that is nothing but special tokens is a beginning like any other.
    tokenizer.chat_template = ";{{ messages[0]['content'] }};"
    assert own_texts.beginnings(model, tokenizer, chat=True) == [[EOS], [EOS, EOS]]
    assert own_texts.beginnings(model, tokenizer, chat=False) == [[EOS]]


def test_a_base_that_cannot_write_is_refused() -> None:
    nothing = char_tokenizer()
    nothing.eos_token = None
    generic = GenericText.of_base(samples=2)
    with pytest.raises(RazorError, match=r"no token that begins one, neither bos nor eos\. Give a file of text"):
        probes.of_generic(tiny_llama(), nothing, generic, SETTINGS)
    sizes = {"vocab_size": 20, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    with pytest.raises(RazorError, match="T5ForConditionalGeneration is an encoder-decoder"):
        probes.of_generic(T5ForConditionalGeneration(T5Config(**sizes)), TOKENIZER, generic, SETTINGS)
    beyond = char_tokenizer()
    beyond.bos_token = "z"
    with pytest.raises(RazorError, match=r"Beginning 1 has the token \d+ \('z'\), and the model has embeddings for 20"):
        probes.of_generic(tiny_llama(20), beyond, generic, SETTINGS)
    with pytest.raises(RazorError, match="The 1 tokens of the base's context hold no text"):
        probes.of_generic(tiny_llama(max_position_embeddings=1), TOKENIZER, generic, SETTINGS)
    # As far as the context goes: 63 tokens after the one that begins.
    endless = char_tokenizer()
    endless.bos_token, endless.eos_token = "=", None
    model = tiny_llama(eos_token_id=None)
    assert {len(text) for text in probes.of_generic(model, endless, generic, SETTINGS).completions} == {63}
    for wrong in ({"samples": 0}, {"max_new_tokens": 0}, {"seed": -1}, {"samples": 2.5}, {"samples": 10**6}):
        with pytest.raises(RazorError, match=f"{next(iter(wrong))} must be"):
            GenericText.of_base(**wrong)


def test_what_says_little_is_said() -> None:
    def said(*texts: list[int]) -> list[str]:
        return own_texts.cautions(Sequences([[EOS]] * len(texts), texts, range(len(texts))), {EOS})

    alike, other = [*range(2, 22)], [*range(22, 2, -1)]
    looping = [*range(2, 12), *[5, 6, 7] * 3, 5, EOS]
    assert said(alike, other) == []
    (empty,) = said([EOS], [EOS])
    assert empty.startswith(
        "The 2 texts that the base wrote for the generic probe are one and the same, and all end at"
    )
    assert "--generic FILE" in empty
    (same,) = said(alike, alike)
    assert "are one and the same: KL on it says little" in same
    assert said(alike) == []  # of one there is nothing to say
    (all_empty,) = said([EOS], [EOS + 1], [EOS])
    assert "Of the 3 texts" in all_empty
    assert "67% end at once: KL on it says little" in all_empty
    (some,) = said(*[alike, other] * 4, [EOS], looping)
    assert "10% end at once and 10% loop" in some
    assert "says little" not in some
    (mostly,) = said(alike, looping, [*looping[:-1], 6])
    assert "67% loop (their last half repeats a few tokens): KL on it says little" in mostly
    assert said(*[alike, other] * 5, looping) == []  # one of eleven
    # A model that knows one token only says so itself.
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.model.norm.weight.zero_()
    model.lm_head.bias = torch.nn.Parameter(torch.where(torch.arange(44) == 9, 50.0, 0.0))
    generic = GenericText.of_base(samples=4, max_new_tokens=20)
    assert probes.cautions_of(model, TOKENIZER, GenericText(("abc",)), Sequences.texts([[1, 2]])) == []
    found = probes.cautions_of(model, TOKENIZER, generic, probes.of_generic(model, TOKENIZER, generic, SETTINGS))
    assert ["are one and the same, and all loop" in one for one in found] == [True]


@pytest.mark.parametrize(
    ("text", "repeats"),
    [
        ([3] * 16, True),
        ([3] * 15, False),  # too short to tell
        ([*range(8), 1, 2, 1, 2, 1, 2, 1, 2], True),
        ([*range(8), 1, 2, 3, 4, 1, 2, 3, 4], True),
        ([*range(8), 1, 2, 3, 4, 5, 1, 2, 3], False),  # not twice
        ([*range(8), 1, 2, 1, 2, 1, 2, 1, 3], False),
        ([*[1, 2] * 4, *range(10, 18)], False),
        ([], False),
    ],
)
def test_a_loop_is_a_last_half_of_one_ngram(text: list[int], repeats: bool) -> None:
    assert own_texts.loops(text) is repeats


def test_the_word_and_a_file_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert probes.read_generic("self") == GenericText.of_base() == GenericText(own=OwnTexts())
    for path in (Path("self"), "./self"):
        with pytest.raises(RazorError, match=r"There is no self|There is no \./self"):
            probes.read_generic(path)
    Path("self").write_text("a line\n")
    assert probes.read_generic("./self") == probes.read_generic(Path("self")) == GenericText(("a line",))
    assert probes.read_generic("self").own is not None
    with pytest.raises(RazorError, match="one of the three"):
        GenericText(("a",), own=OwnTexts())
    hashes = {GenericText.of_base(seed=seed, samples=samples).content_hash for seed in (0, 1) for samples in (8, 9)}
    assert len(hashes) == 4
    assert GenericText.of_base(samples=9).cut(4) == GenericText.of_base(samples=4)
    assert GenericText.of_base(samples=3).cut(4).count == 3
    assert GenericText.of_base(samples=9).cut(4, tokens=5) == GenericText.of_base(samples=4, max_new_tokens=5)
    assert GenericText.of_base(max_new_tokens=4).cut(64, tokens=5) == GenericText.of_base(max_new_tokens=4)
    # Hashes of the other kinds are those of before, which laws and logs hold.
    assert GenericText(("abc",)).content_hash == probes.content_hash([("abc",), ()])
