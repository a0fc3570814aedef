"""Templates that take a content in parts alone: text is given as one, and the tokens are the processor's own."""

from pathlib import Path
from typing import Any

import pytest

from rlrazor.errors import RazorError
from rlrazor.lm import content_parts, encoding
from rlrazor.lm.models import LanguageModel
from rlrazor.lm.prompts import encode
from tiny_models import CHARACTERS, char_tokenizer, tiny_llama

SMOLVLM = (  # as its files have it
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
LLAVA = (  # the same; no turn of the assistant's shows anything but parts
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
MIXED = (  # the system's turn as text alone
    "{% for m in messages %}{% if m.role == 'system' %}{{ '[' + m.content + ']' }}{% else %}<{{ m.role }}>"
    "{% for part in m.content %}{{ part.text }}{% endfor %};{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
BOTH = (  # Llama 3.2's and Qwen2-VL's way: text as text, parts as parts
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}text={{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %};{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}text"
USER, SYSTEM, ASSISTANT = (
    {"role": role, "content": text} for role, text in (("user", "hi"), ("system", "be good"), ("assistant", "well "))
)


def tokenizer_of(template: str) -> Any:
    tokenizer = char_tokenizer("".join(dict.fromkeys(CHARACTERS + template + "ASITNUER")))
    tokenizer.chat_template = template
    return tokenizer


def parted(*turns: dict[str, Any]) -> list[dict[str, Any]]:
    return [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]


def shown(tokenizer: Any, turns: list[Any], **how: Any) -> list[int]:
    """By transformers, of turns in parts."""
    return list(tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False, **how))


@pytest.mark.parametrize("template", [SMOLVLM, LLAVA], ids=["SmolVLM", "LLaVA"])
def test_text_has_the_tokens_of_its_parts(template: str) -> None:
    tokenizer = tokenizer_of(template)
    for given, turns in (
        ("hi", [USER]),
        ([USER], [USER]),
        ([SYSTEM, USER], [SYSTEM, USER]),
        ([USER, ASSISTANT, USER], [USER, ASSISTANT, USER]),
        ([parted(USER)[0], ASSISTANT, USER], [USER, ASSISTANT, USER]),
    ):
        expected = shown(tokenizer, parted(*turns), add_generation_prompt=True)
        assert "hi" in tokenizer.decode(expected)
        assert encode(tokenizer, [given], True) == [expected]
    begun = shown(tokenizer, parted(USER, ASSISTANT), continue_final_message=True)
    assert encode(tokenizer, [[USER, ASSISTANT]], True) == [begun]
    assert tokenizer.decode(begun).endswith("well ")


def test_the_assistants_turns_are_those_of_their_parts() -> None:
    for template in (SMOLVLM, LLAVA):
        tokenizer, ends = tokenizer_of(template), (tokenizer_of(template).eos_token_id,)
        found = encoding.answer_ids(tokenizer, [USER, ASSISTANT], ends)
        assert found == encoding.answer_ids(tokenizer, parted(USER, ASSISTANT), ends)
        assert "well" in tokenizer.decode(found[1])
        assert found[0] == shown(tokenizer, parted(USER), add_generation_prompt=True)


def test_which_roles_want_parts_is_found_out_for_each() -> None:
    found = content_parts.as_shown(tokenizer_of(MIXED), [SYSTEM, USER, ASSISTANT])
    assert found == [SYSTEM, *parted(USER, ASSISTANT)]
    assert encoding.turns_text(tokenizer_of(MIXED), [SYSTEM, USER]) == "[be good]<user>hi;<assistant>"
    calls = {"role": "assistant", "tool_calls": [{"function": {"name": "add"}}]}
    assert content_parts.as_shown(tokenizer_of(SMOLVLM), [calls]) == [calls]  # without content


INSISTS = (  # parts alone, and a call before what a tool answers
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'tool' and not messages[loop.index0 - 1].tool_calls %}"
    "{{ raise_exception('a tool that nobody has called') }}{% endif %}{% for call in m.tool_calls or [] %}"
    "{{ call.function.name }}{% endfor %}{% for part in m.content or [] %}{{ part.text }}{% endfor %};{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CALL: dict[str, Any] = {
    "role": "assistant",
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {}}}],
}


def test_what_a_tool_answers_is_shown() -> None:
    turns = [USER, CALL, {"role": "tool", "content": "three"}]
    assert encoding.turns_text(tokenizer_of(INSISTS), turns) == "<user>hi;<assistant>add;<tool>three;<assistant>"
    assert content_parts.as_shown(tokenizer_of(BOTH), turns) == turns


@pytest.mark.parametrize(
    ("template", "turns", "message"),
    [
        (INSISTS.replace("a tool that nobody", "text").replace("{% for part in", "{% for part in m.role != 'tool' and"),
         [USER, CALL, {"role": "tool", "content": "three"}], "of what a tool answers, as text or as a list of parts"),
        (MIXED.replace("m.content + ']'", "(m.content if m.content is string else '') + ']'"),
         [*parted(SYSTEM), USER], "of what the system says in parts: give the content as text"),
    ],
)  # fmt: skip
def test_what_is_lost_is_said(template: str, turns: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"it shows nothing {message}"):
        encoding.turns_ids(tokenizer_of(template), turns)


def test_a_template_may_speak_of_types() -> None:
    """As in its instructions on tools, whatever is said; but not of what is said, as Python or JSON would write it."""
    front = """{{ 'Call {"type": "function"}, not {\\'type\\': 1}. ' }}"""
    expected = """Call {"type": "function"}, not {'type': 1}. <user>hi;<assistant>"""
    assert encoding.turns_text(tokenizer_of(front + MIXED), [USER]) == expected
    for written in ("m.content", "m.content | tojson", "m.content | tojson | tojson"):
        template = "{% for m in messages %}{% if m.content is not string %}{{ " + written + " }}{% endif %}{% endfor %}"
        assert content_parts.as_shown(tokenizer_of(template + "{# text #}"), [USER]) == [USER]


@pytest.mark.parametrize("template", [BOTH, "{% for m in messages %}<{{ m.role }}>{{ m.content }};{% endfor %}"])
def test_a_template_that_takes_text_is_given_text(template: str) -> None:
    tokenizer = tokenizer_of(template)
    assert content_parts.as_shown(tokenizer, [SYSTEM, USER, ASSISTANT]) == [SYSTEM, USER, ASSISTANT]
    assert encode(tokenizer, ["hi"], True) == [shown(tokenizer, [USER], add_generation_prompt=True)]


def test_a_template_that_does_not_end_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlrazor.lm.trials.SECONDS", 1.0)
    with pytest.raises(RazorError, match=r"chat template .* so it is not used"):
        encode(tokenizer_of(ENDLESS), ["hi"], True)


def test_a_processors_own_tokens(tmp_path: Path) -> None:
    """Of a model that sees images, from its folder: what its processor makes of the parts, without an image."""
    pytest.importorskip("gymnasium")  # which the module of the models imports
    from transformers import AutoProcessor, AutoTokenizer

    from vla_models import ARCHITECTURES

    for name in ("idefics3", "llava"):
        _, processor = ARCHITECTURES[name]()
        processor.chat_template = SMOLVLM if name == "idefics3" else LLAVA
        processor.save_pretrained(tmp_path / name)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        expected = AutoProcessor.from_pretrained(tmp_path / name).apply_chat_template(
            parted(SYSTEM, USER), add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
        assert encode(tokenizer, [[SYSTEM, USER]], True) == [list(expected[0])]


def test_prior_tasks_are_asked_in_such_a_template(tmp_path: Path) -> None:
    """As in another that makes the same text of text."""
    pytest.importorskip("lm_eval")
    from test_asking import CHAT, task

    from rlrazor.lm.prior import PriorTasks

    texts = MIXED.replace("{% for part in m.content %}{{ part.text }}{% endfor %}", "{{ m.content }}")
    model = tiny_llama(len(tokenizer_of(MIXED)), hidden=32, max_position_embeddings=256)
    for kind in ("choices", "generated"):
        path = task(tmp_path, kind, name=kind)
        logged = []
        for template in (MIXED, texts):
            tokenizer = tokenizer_of(MIXED)
            tokenizer.chat_template = template
            score = PriorTasks([path], asking=CHAT).scores(LanguageModel(model, tokenizer, "it", str))[path]
            logged.append((score.value, score.items))
        assert logged[0] == logged[1]
