"""Chat templates of any author: one sentence within a time limit, and for those that work the tokens of ever."""

import time
from typing import Any

import pytest

from rlrazor.errors import RazorError
from rlrazor.lm import encoding, trials
from rlrazor.lm.prompts import encode
from rlrazor.system.apart import Apart
from tiny_models import char_tokenizer

GOOD = "{% for turn in messages %}{{ turn.content }}{% endfor %}"
SQUARE = "{% set r = range(100000) %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}"


def with_template(template: str) -> Any:
    tokenizer = char_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 1 / 0 }}", r"does not take a prompt \(division by zero\): Prompt 1 "),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth"),
        ("{% if 1 %}" * 10_000 + "x" + "{% endif %}" * 10_000, "maximum recursion depth"),
        (SQUARE, r"took longer than 0\.5 s on a prompt"),
        ("{% for i in range(100000) %}{{ 'a' * 1000 }}{% endfor %}", r"writes more than 10\d,\d\d\d characters"),
        ("{{ 'a' * 10 ** 10 }}", "takes more memory than a chat template needs"),
        ("{{ raise_exception('not so') }}", r"\(not so\)"),
        ("{{ a.b }}", r"\('a' is undefined\)"),
        ("{# nothing #}", "it makes no text of it"),
        (" \n", "it makes no text of it"),
    ],
)
def test_a_template_that_does_not_work_is_one_sentence(
    template: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials, "SECONDS", 0.5)
    started = time.monotonic()
    with pytest.raises(RazorError, match=message) as error:
        encode(with_template(template), ["ab", "cd"], chat=True)
    assert time.monotonic() - started < 10
    assert len(str(error.value)) < 400
    assert "\n" not in str(error.value)


def test_each_prompt_is_tried_and_none_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A template may be good to all prompts but one; to those that it is good to, it gives what it always did."""
    monkeypatch.setattr(trials, "SECONDS", 0.5)
    tried: list[int] = []
    own = trials._try

    def counted(text: str, calls: Any) -> None:
        tried.append(len(calls))
        own(text, calls)

    monkeypatch.setattr(trials, "_try", counted)
    tokenizer = with_template(GOOD)
    rows = encode(tokenizer, ["ab", "cd", [{"role": "user", "content": "e"}]], chat=True)
    assert rows == [encoding.text_ids(tokenizer, text) for text in ("ab", "cd", "e")]
    assert encode(tokenizer, ["cd", "ab"], chat=True) == rows[1::-1]
    assert tried == [3]
    sometimes = with_template("{% if messages[0].content == 'cd' %}" + SQUARE + "{% endif %}" + GOOD)
    assert encode(sometimes, ["ab"], chat=True) == rows[:1]
    with pytest.raises(RazorError, match="took longer"):
        encode(sometimes, ["ab", "cd"], chat=True)
    assert tried == [3, 1, 1]


def test_what_templates_may_use_is_there_where_they_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or else a template that transformers renders would not be tried at all."""
    answers: list[Any] = []
    own = Apart.call

    def kept(apart: Apart, calls: Any) -> Any:
        answers.extend(own(apart, calls))
        return answers

    monkeypatch.setattr(Apart, "call", kept)
    used = (
        "{% generation %}{{ messages | tojson(indent=1) }}{% endgeneration %}{{ strftime_now('%Y') }}{{ eos_token }}"
        "{% for tool in tools %}{{ tool | tojson }}{% break %}{% endfor %}{{ loud }}{{ dict(a=1) }}"
        "{{ namespace(a=1).a }}"
    )
    prompt = {"prompt": "ab", "tools": [{"type": "function"}], "chat_template_kwargs": {"loud": "yes"}}
    assert encode(with_template(used), [prompt], chat=True)
    assert answers
    assert [answer.failure for answer in answers] == [None] * len(answers)
