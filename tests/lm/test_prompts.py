"""Prompts as TRL has them: which rows are prompts, what is wrong with those that are not, and their tokens."""

import json
import math
from importlib.metadata import version
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from tokenizers import processors
from trl.data_utils import apply_chat_template

from laws import changed, law_of
from rlrazor.errors import RazorError
from rlrazor.guard.law_file import LawFile
from rlrazor.guard.law_schema import LawGeneric
from rlrazor.lm.encoding import as_read
from rlrazor.lm.probes import GenericText, read_generic, read_prompts
from rlrazor.lm.prompts import encode, parts_of, prompt_of, texts_of
from tiny_models import CHARACTERS, char_tokenizer, tiny_llama

TEMPLATE = (
    "{% if tools %}[{% for tool in tools %}{{ tool.function.name }}{% endfor %}]{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}"
    "{% for call in m.tool_calls %}call {{ call.function.name }}{% endfor %};{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if think is defined and not think %}none{% endif %}{% endif %}"
)
USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "well "}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CALLS: dict[str, Any] = {"role": "assistant", "tool_calls": [CALL]}
TOOL = {"role": "tool", "name": "add", "content": "3"}
SCHEMA = {"type": "function", "function": {"name": "add", "parameters": {}}}
PARTS = {"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]}


def rendered(tokenizer: Any, prompt: Any, chat: bool) -> str:
    (ids,) = encode(tokenizer, [prompt], chat)
    return as_read(tokenizer, ids)


def chat_tokenizer(template: str = TEMPLATE) -> Any:
    """One that puts an eos behind texts."""
    tokenizer = char_tokenizer(CHARACTERS + "<>[]{}',")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A ;", special_tokens=[(";", 1)])
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": [USER]}, "<user>hi;<assistant>"),
        ({"prompt": [USER, ASSISTANT]}, "<user>hi;<assistant>well "),
        ({"prompt": [USER, CALLS, TOOL]}, "<user>hi;<assistant>call add;<tool>3;<assistant>"),
        ({"prompt": [USER, CALLS, TOOL], "tools": [SCHEMA]}, "[add]<user>hi;<assistant>call add;<tool>3;<assistant>"),
        ({"prompt": [USER], "tools": []}, "<user>hi;<assistant>"),
        ({"prompt": [USER], "chat_template_kwargs": {"think": False}}, "<user>hi;<assistant>none"),
        ({"prompt": [PARTS]}, "<user>a b;<assistant>"),
        ({"prompt": [PARTS, {**PARTS, "role": "assistant"}]}, "<user>a b;<assistant>a b"),
    ],
)
def test_a_conversation_is_measured_as_trl_renders_it(row: dict[str, Any], expected: str) -> None:
    tokenizer = chat_tokenizer()
    if not version("trl").startswith("0."):  # which did not have tools and what templates are told
        assert apply_chat_template(dict(row), tokenizer, tools=row.get("tools"))["prompt"] == expected
    for chat in (True, False):
        assert rendered(tokenizer, prompt_of(row), chat) == expected
    # As tables have it, and as an Arrow table fills up the turns.
    told: dict[str, Any] = {name: json.dumps(row[name]) for name in ("tools", "chat_template_kwargs") if name in row}
    turns = [{"content": None, "tool_calls": None, "name": None, **turn} for turn in row["prompt"]]
    assert rendered(tokenizer, prompt_of({"prompt": turns, **told}), True) == expected


def test_text_goes_into_the_users_turn_with_what_the_template_is_told() -> None:
    tokenizer = chat_tokenizer()
    row = {"prompt": "hi", "tools": [SCHEMA], "chat_template_kwargs": {"think": False}}
    prompt = prompt_of(row)
    assert rendered(tokenizer, prompt, True) == "[add]<user>hi;<assistant>none"
    assert rendered(tokenizer, prompt, False) == rendered(tokenizer, "hi", False) == "hi"
    assert prompt_of({"prompt": "hi", "tools": ["add", "divide"], "completion": "3"}) == "hi"
    assert json.loads(json.dumps(prompt)) == prompt
    generic = GenericText(prompts=(prompt, "hi"))
    assert generic.content_hash != GenericText(prompts=("hi",)).content_hash
    assert texts_of(prompt) == ["hi"]
    assert texts_of([PARTS, CALLS, TOOL]) == ["a b", "3"]
    assert parts_of(prompt) == ("hi", {"tools": [SCHEMA], "think": False})


def test_a_law_keeps_prompts_of_every_form(tmp_path: Path) -> None:
    prompts = [prompt_of({"prompt": [USER, CALLS, TOOL], "tools": [SCHEMA]}), [USER, ASSISTANT], "hi"]
    law = changed(law_of(tiny_llama()), probe__generic=LawGeneric.model_validate({"prompts": prompts}))
    law.save(tmp_path / "law.json")
    assert LawFile.load(tmp_path / "law.json").generic == law.generic


def test_messages_are_a_prompt_up_to_the_last_answer(tmp_path: Path) -> None:
    assert prompt_of({"messages": [USER, ASSISTANT, USER, ASSISTANT]}) == [USER, ASSISTANT, USER]
    assert prompt_of({"messages": [USER, CALLS, TOOL, ASSISTANT]}) == [USER, CALLS, TOOL]
    assert prompt_of({"messages": [USER]}) == [USER]
    assert prompt_of({"messages": [USER, ASSISTANT], "prompt": "text"}) == "text"
    for messages, message in (
        ([ASSISTANT], "there is no prompt"),
        ("hi", "no list of turns"),
        ([3], "no list of turns"),
    ):
        with pytest.raises(RazorError, match=f"A row: its `messages` .*{message}"):
            prompt_of({"messages": messages})
    (tmp_path / "a").write_text(json.dumps({"messages": [USER, ASSISTANT]}))
    assert read_generic(tmp_path / "a") == GenericText(prompts=([USER],))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, "is null"),
        (math.nan, "is NaN"),
        (3, "is the number 3"),
        (2.5, "is the number 2.5"),
        (True, "is true, neither text nor a list of turns"),
        (" \n", "is blank"),
        ("nan", "is 'nan', as a missing value is written"),
        ([], "is a list of nothing"),
        (str([USER]), "is a conversation written as text"),
        (json.dumps([USER]), "is a conversation written as text"),
        ({"text": "a"}, "a mapping of prompt, tools, chat_template_kwargs and images; this is one of text"),
        (["a"], "turn 1 is text, where an object with `role` and `content` is needed"),
        ([USER, None], "turn 2 is null"),
        ([{"content": "a"}], "turn 1 has no `role`; it has content"),
        ([{"role": "user"}], "turn 1 has neither `content` nor `tool_calls`"),
        ([{"role": "user", "content": None, "tool_calls": []}], "turn 1 has neither"),
        ([{"role": "user", "content": 3}], "turn 1 has a `content` that is the number 3"),
        ([{"from": "human", "value": "a"}], "turn 1 has `from` and `value`: call them `role` and `content`"),
        (
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}],
            r"more than text \(image\)",
        ),
        ([USER, CALLS], "ends with a call of a tool"),
    ],
)
def test_what_is_wrong_with_a_prompt_is_said_with_its_row(tmp_path: Path, prompt: Any, message: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": value}) for value in ("good", prompt)))
    with pytest.raises(RazorError, match=f"a.jsonl, line 2: .*{message}"):
        read_prompts(file)
    with pytest.raises(RazorError, match=f"Prompt 2: .*{message}"):
        encode(chat_tokenizer(), ["good", prompt], True)


def test_what_is_wrong_in_other_files(tmp_path: Path) -> None:
    pl.DataFrame({"prompt": ["a", None]}).write_parquet(tmp_path / "a")
    with pytest.raises(RazorError, match="a, row 2: the prompt is null"):
        read_prompts(tmp_path / "a")
    (tmp_path / "b").write_text('prompt,id\n"two\nlines",1\n,2\n')
    with pytest.raises(RazorError, match="b, line 4: the prompt is blank"):
        read_prompts(tmp_path / "b")
    (tmp_path / "c").write_text("Prompts,answer\na,b")
    with pytest.raises(RazorError, match=r"c, line 2: it needs a column `prompt` .*; it has Prompts, answer"):
        read_prompts(tmp_path / "c")
    (tmp_path / "d").write_text('{"text": "a"}\n{"text": NaN}')
    with pytest.raises(RazorError, match="d, line 2: the text is NaN"):
        read_generic(tmp_path / "d")
    (tmp_path / "d").write_text('{"text": "a"}\n{"prompt": "b"}')
    with pytest.raises(RazorError, match="d, line 2: it needs a column `text`, as the rows before it; it has prompt"):
        read_generic(tmp_path / "d")


def test_what_a_template_does_not_take_is_refused() -> None:
    plain = "{% for m in messages %}<{{ m.role }}>{{ m.content }};{% endfor %}"
    with pytest.raises(RazorError, match="shows a content that is a list of parts as Python would"):
        encode(chat_tokenizer(plain), [[PARTS]], True)
    joined = "{% for m in messages %}{{ '<' + m['content'] }}{% endfor %}"
    for turns in ([PARTS], [USER, CALLS, TOOL]):
        with pytest.raises(RazorError, match=r"template does not take a prompt .* Prompt 1 is given to it"):
            encode(chat_tokenizer(joined), [turns], True)
    for wrong, message in ((["add"], "no list of JSON schemas"), ({"a": 1}, "no list of JSON schemas")):
        with pytest.raises(RazorError, match=message):
            prompt_of({"prompt": [USER], "tools": wrong})
    with pytest.raises(RazorError, match="`chat_template_kwargs` are no object"):
        prompt_of({"prompt": [USER], "chat_template_kwargs": [3]})
    with pytest.raises(RazorError, match="not valid Unicode"):
        prompt_of({"prompt": [{"role": "user", "content": "\ud83d"}]})


def test_rows_of_every_file_are_the_same_prompts(tmp_path: Path) -> None:
    rows = [
        {"prompt": [USER, CALLS, TOOL], "tools": json.dumps([SCHEMA])},
        {"prompt": [USER, ASSISTANT], "tools": json.dumps([])},
    ]
    (tmp_path / "a").write_text("\n".join(map(json.dumps, [*rows, rows[0]])))
    pl.DataFrame(rows).write_parquet(tmp_path / "b")
    prompts = read_prompts(tmp_path / "a")
    assert prompts == [{"prompt": rows[0]["prompt"], "tools": [SCHEMA]}, rows[1]["prompt"]]
    tokenizer = chat_tokenizer()
    of_parquet = encode(tokenizer, read_prompts(tmp_path / "b"), True)
    assert of_parquet == encode(tokenizer, prompts, True)
    assert rendered(tokenizer, prompts[0], True) == "[add]<user>hi;<assistant>call add;<tool>3;<assistant>"


REFUSES = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if tools %}{{ raise_exception('No tools') }}{% endif %}"
) + TEMPLATE.replace("{% if tools %}", "{% if false %}")
SAYS_NOTHING = "{% for m in messages %}{{ m.role }};{% endfor %}"


@pytest.mark.parametrize(
    ("template", "row", "message"),
    [
        (
            REFUSES,
            {"prompt": [{"role": "system", "content": "x"}, USER]},
            r"does not take a system's turn.*Prompt 1.*\(",
        ),
        (REFUSES, {"prompt": [USER], "tools": [SCHEMA]}, r"does not take the tools of Prompt 1 \(No tools\)"),
        (SAYS_NOTHING, {"prompt": "hi"}, "shows nothing of what the user says, as text or as a list of parts"),
        (
            TEMPLATE.split("{% for call")[0] + "{% endfor %}",
            {"prompt": [USER, {**CALLS, "content": "c"}, TOOL]},
            "call of",
        ),
        (
            TEMPLATE,
            {"prompt": [USER], "chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
            "have 'chat_template', which",
        ),
    ],
)
def test_what_a_template_refuses_is_said_in_a_sentence(template: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(RazorError, match=message) as found:
        encode(chat_tokenizer(template), [prompt_of(row)], True)
    assert "\n" not in str(found.value)


def test_what_all_prompts_are_told_gives_way_to_a_prompts_own() -> None:
    tokenizer, told = chat_tokenizer(), {"think": False}
    own = prompt_of({"prompt": [USER], "chat_template_kwargs": {"think": True}})
    prompts = [[USER], "hi", own]
    shown = [as_read(tokenizer, ids) for ids in encode(tokenizer, prompts, True, told)]
    assert shown == ["<user>hi;<assistant>none"] * 2 + ["<user>hi;<assistant>"]
    assert encode(tokenizer, ["hi"], False, told) == encode(tokenizer, ["hi"], False)
