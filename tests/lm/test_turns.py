"""Conversations of which all of the assistant's turns are measured: which tokens these are, and their KL."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlrazor import drift
from rlrazor.errors import RazorError
from rlrazor.guard.compare import compare
from rlrazor.guard.comparison import Pair
from rlrazor.lm import kl, probes
from rlrazor.lm.encoding import as_read, stop_ids
from rlrazor.lm.probes import GenericText, ProbeSettings, of_prompts
from rlrazor.lm.prompts import Prompt, answers, encode
from rlrazor.lm.representation import representation_of_ids
from tiny_models import CHARACTERS, char_tokenizer, noisy, saved, tiny_llama

TURNS = "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }};{% endfor %}"
BEGINS = "{% if add_generation_prompt %}<a>{% endif %}"
PLAIN = TURNS + BEGINS
# Thinks, and shows of earlier turns what came of it.
THINKS = (
    "{% for m in messages %}<{{ m.role[0] }}>{% if m.role == 'assistant' and loop.last %}think {% endif %}"
    "{{ m.content }};{% endfor %}" + BEGINS
)
PREFILLED = TURNS + "{% if add_generation_prompt %}<a>think{% endif %}"
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<a>{% generation %}{{ m.content }};{% endgeneration %}"
    "{% else %}<{{ m.role[0] }}>{{ m.content }};{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<a>think{% endif %}"
)
SILENT = "{% for m in messages %}{% if m.role != 'assistant' %}<u>{{ m.content }};{% endif %}{% endfor %}"
U1, A1, U2, A2, U3 = (
    {"role": role, "content": said}
    for role, said in zip(("user", "assistant") * 2 + ("user",), ("a", "be", "ca", "dad", "ef"), strict=True)
)
ALL = ProbeSettings(5, turns="all")


def tokenizer_of(template: str) -> Any:
    tokenizer = char_tokenizer(CHARACTERS + "<>")
    tokenizer.chat_template = template
    return tokenizer


def shown(tokenizer: Any, prompt: Prompt) -> list[tuple[str, str]]:
    (found,) = answers(tokenizer, [prompt], [tokenizer.eos_token_id])
    return [(as_read(tokenizer, before), as_read(tokenizer, said)) for before, said in found]


def test_each_turn_follows_all_that_came_before_it() -> None:
    expected = [("<u>a;<a>", "be;"), ("<u>a;<a>be;<u>ca;<a>", "dad;")]
    conversation = [U1, A1, U2, A2, U3]
    assert shown(tokenizer_of(PLAIN), conversation) == expected
    assert shown(tokenizer_of(PLAIN), [*conversation, A1]) == expected  # which is to be continued
    assert shown(tokenizer_of(MARKED), conversation) == expected
    thought = [("<u>a;<a>", "think be;"), ("<u>a;<a>be;<u>ca;<a>", "think dad;")]
    assert shown(tokenizer_of(THINKS), conversation) == thought
    # Nothing of a text, nor of what the assistant says before anybody else.
    assert shown(tokenizer_of(PLAIN), "a be") == shown(tokenizer_of(PLAIN), [A1, U2]) == []
    # What a template puts behind a turn is not said.
    behind = PLAIN.replace(";{% endfor %}", ";\n{% endfor %}")
    assert shown(tokenizer_of(behind), conversation[:3]) == [("<u>a;\n<a>", "be;")]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (PREFILLED, "it begins a turn of the assistant's in one way and"),
        (SILENT, "it shows nothing of a turn of the assistant's"),
    ],
)
def test_a_template_that_does_not_tell_which_tokens_were_said_is_refused(template: str, message: str) -> None:
    with pytest.raises(RazorError, match=rf"turn 2 of Prompt 1 cannot be told by .*\({message}.*--turns last"):
        shown(tokenizer_of(template), [U1, A1, U2])


FAMILIES = ("qwen3", "llama3", "gptoss", "glm4moe")
SPECIAL = (
    *("<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|end|>", "<|return|>"),
    *("<|user|>", "<|assistant|>", "<|endoftext|>"),
)
TRLS = Path(trl.__file__).parent / "chat_templates"


def byte_tokenizer(template: str) -> Any:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    found = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    found.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    found.chat_template = template
    return found


@pytest.mark.skipif(not TRLS.is_dir(), reason="an older TRL has no templates of its own")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_turns_in_real_templates_are_those_that_trl_trains_on(family: str) -> None:
    """TRL's assistant-only loss is of the whole conversation, by the marks that it has put into the templates."""
    original, training = (
        byte_tokenizer((TRLS / f"{family}{kind}.jinja").read_text("utf-8")) for kind in ("", "_training")
    )
    told = {} if family != "gptoss" else {"model_identity": "You are a model."}
    found = training.apply_chat_template(
        [U1, A1, U2, A2], tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **told
    )
    ids, mask = np.array(found["input_ids"]), np.array(found["assistant_masks"], bool)
    trained = as_read(training, ids[mask].tolist())
    ends = [original.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|eot_id|>", "<|return|>", "<|end|>")]
    for tokenizer in (original, training):
        (turns,) = answers(tokenizer, [[U1, A1, U2, A2, U3]], ends, told)
        said = [as_read(tokenizer, one) for _, one in turns]
        # TRL trains gpt-oss on what begins a turn too, and GLM on what begins the next one; of gpt-oss the last turn of
        # a conversation ends otherwise than an earlier one.
        own, trls = "".join(said), trained
        for other in ("<|start|>assistant", "<|user|>", "<|return|>", "<|end|>", "\n"):
            own, trls = own.replace(other, ""), trls.replace(other, "")
        assert own == trls, family
        assert all(answer["content"] in one for answer, one in zip((A1, A2), said, strict=True))


def brute_force(base: Any, tuned: Any, before: list[int], said: list[int]) -> float:
    with torch.no_grad():
        p_TV, q_TV = (
            model(torch.tensor([[*before, *said]])).logits[0, len(before) - 1 : -1].double().log_softmax(-1)
            for model in (base, tuned)
        )
    return float((p_TV.exp() * (p_TV - q_TV)).sum())


def test_kl_is_on_every_turn_of_the_assistants_and_on_no_other_token() -> None:
    tokenizer = tokenizer_of(THINKS)
    base = tiny_llama(len(tokenizer))
    tuned = noisy(base, 0.05)
    prompts: list[Prompt] = [[U1, A1, U2, A2, U3], [U2, A1, U1], "ab", [U3]]
    last, every = (of_prompts(base, tokenizer, prompts, ProbeSettings(5, turns=turns)) for turns in ("last", "all"))
    assert every.prompts == last.prompts == encode(tokenizer, prompts, True)
    sampled = [one for one, before in zip(every.completions, every.befores, strict=True) if before is None]
    assert sampled == last.completions
    given = answers(tokenizer, prompts, stop_ids(tokenizer, base))
    pairs = [
        [*turns, (ids, completion)]
        for turns, ids, completion in zip(given, last.prompts, last.completions, strict=True)
    ]
    assert [len(turns) for turns in pairs] == [3, 2, 1, 1]
    expected = [[brute_force(base, tuned, *pair) for pair in turns] for turns in pairs]
    found = kl.forward_kl(kl.Probe(base, every), tuned)
    assert found.sums == pytest.approx([one for turns in expected for one in turns], rel=1e-4)
    # Conversations count the same, and are what is independent.
    means = [np.mean(turns) for turns in expected]
    assert found.n_prompts == len(prompts)
    assert found.per_completion == pytest.approx((np.mean(means), np.std(means, ddof=1) / 2), rel=1e-4)
    # A part of the prompts, as of several processes, and other samples.
    part = every.of_prompts([2, 0])
    of_part = kl.forward_kl(kl.Probe(base, part), tuned)
    assert sorted(of_part.sums) == pytest.approx(sorted([*expected[0], *expected[2]]), rel=1e-4)
    assert every.redrawn(last.completions) == every
    other = every.redrawn([[7]] * 4)
    assert [len(one) for one in other.completions].count(1) == 4
    assert [n for n, one in enumerate(other.completions) if one == [7]] == [2, 4, 5, 6]


def test_turns_that_do_not_fit_are_left_out_with_their_conversation() -> None:
    tokenizer = tokenizer_of(PLAIN)
    long: Prompt = [U1, {"role": "assistant", "content": "b" * 60}, U2]
    base = tiny_llama(len(tokenizer))  # a context of 64 tokens
    assert len(of_prompts(base, tokenizer, [long, [U1, A1, U2]], ALL).prompts) == 1
    stripping = tokenizer_of(THINKS.replace("{{ m.content }}", "{{ m.content[:5] if not loop.last else m.content }}"))
    assert len(of_prompts(base, stripping, [long, "a"], ProbeSettings(5)).prompts) == 2
    assert len(of_prompts(base, stripping, [long, "a"], ALL).prompts) == 1
    with pytest.raises(RazorError, match="No prompt fits into the 64 tokens"):
        of_prompts(base, tokenizer, [long], ALL)


def test_a_comparison_is_of_all_turns(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(PLAIN)
    base = tiny_llama(len(tokenizer))
    tuned = noisy(base, 0.05)
    pair = Pair(str(saved(tmp_path / "base", base, tokenizer)), str(saved(tmp_path / "tuned", tuned, tokenizer)))
    prompts: list[Prompt] = [[U1, A1, U2], [U2]]
    found = compare(pair, prompts, generic=GenericText(("abc", "def")), settings=ALL)
    every = of_prompts(base, tokenizer, prompts, ALL)
    assert found.kl["kl_forward"] == pytest.approx(kl.forward_kl(kl.Probe(base, every), tuned).per_completion, rel=1e-4)
    own = every.redrawn(probes.complete(tuned, tokenizer, every.prompts, ALL, probes.NEW))
    reverse = kl.reverse_kl(tuned, own, base)
    assert found.kl["kl_reverse"] == pytest.approx(reverse.per_completion, rel=1e-4)
    said = {one.said: ["".join(shown.tokens) for shown in one.base] for one in found.prompts}
    assert said["ca"][0] == "be;" or len(said["ca"]) == 1
    assert sorted(len(one.base) for one in found.prompts) == [1, 2]
    assert found.setup.as_json()["probe"]["turns"] == "all"


def test_hidden_states_are_of_what_each_turn_follows(tmp_path: Path) -> None:
    """CKNNA's texts: an earlier turn is not put behind the whole conversation."""
    tokenizer = tokenizer_of(PLAIN)
    base = tiny_llama(len(tokenizer))
    tuned = noisy(base, 0.05)
    pair = Pair(str(saved(tmp_path / "base", base, tokenizer)), str(saved(tmp_path / "tuned", tuned, tokenizer)))
    generic = GenericText(prompts=tuple([{"role": "user", "content": said}, A1, U2] for said in "abcdef"))
    found = compare(pair, [[U2]], generic=generic, settings=ALL)
    every = probes.of_generic(base, tokenizer, generic, ALL)
    texts = [[*every.before(n), *said] for n, said in enumerate(every.completions)]
    assert as_read(tokenizer, texts[0]) == "<u>a;<a>be;"
    expected = drift.cknna(*(representation_of_ids(model, texts) for model in (base, tuned)))
    assert found.distances.cknna == pytest.approx(expected, abs=1e-5)


def test_settings_of_before_are_as_they_were() -> None:
    usual, every = ProbeSettings(), ProbeSettings(turns="all", chat_template_kwargs={"enable_thinking": False})
    assert list(usual.as_json()) == ["max_new_tokens", "samples", "stop", "chat", "precision"]
    assert every.as_json() == {
        **usual.as_json(),
        "turns": "all",
        "chat_template_kwargs": {"enable_thinking": False},
    }
    assert probes.probe_hash(usual, GenericText.built_in()) != probes.probe_hash(every, GenericText.built_in())
    with pytest.raises(RazorError, match="turns is one of last, all, not some"):
        ProbeSettings(turns="some")
    for wrong, message in (([3], "no object of names and values"), ({"tokenize": False}, "have 'tokenize', which is")):
        with pytest.raises(RazorError, match=message):
            ProbeSettings(chat_template_kwargs=wrong)  # type: ignore[arg-type]
