"""Prompts in the chat template and training without it, or the other way round, as far as rows show it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from tokenizers import AddedToken
from trl import SFTConfig, SFTTrainer

from laws import GENERIC, PROMPTS
from rlrazor.guard import ForgettingMonitor
from rlrazor.guard.overlap import count_overlap, template_caution
from rlrazor.lm.probes import ProbeSettings, Prompt, encode
from tiny_models import CHARACTERS, char_tokenizer, tiny_llama

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
]
OF_WORDS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<a>"
    "{% if enable_thinking is defined %}{% if enable_thinking %}b{% else %}c{% endif %}{% endif %}{% endif %}"
)
OF_TOKENS = "{{ bos_token }}{% if tools %}<|system|>tools\n{% endif %}" + OF_WORDS.replace("<", "<|").replace(">", "|>")
CHAT, PLAIN = ProbeSettings(6), ProbeSettings(6, chat=False)
USER, ANSWER = {"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}


def chat_tokenizer(kind: str) -> Any:
    tokenizer = char_tokenizer(CHARACTERS + "<>|")
    tokenizer.chat_template = OF_WORDS
    if kind == "tokens":
        tokenizer.add_special_tokens({"bos_token": "<s>"})
        tokenizer.add_tokens([AddedToken(f"<|{name}|>", special=True) for name in ("user", "system", "assistant", "a")])
        tokenizer.chat_template = OF_TOKENS
    return tokenizer


def loader(column: str, *values: Any) -> Any:
    return SimpleNamespace(dataset=Dataset.from_list([{column: value} for value in values]))


@pytest.mark.parametrize("kind", ["words", "tokens"])
def test_a_form_that_is_not_trainings_is_said(kind: str) -> None:
    tokenizer = chat_tokenizer(kind)
    conversations: list[Prompt] = [[USER], [{"role": "system", "content": "x"}, USER]]
    rows: list[list[dict[str, str]]] = [[USER, ANSWER], [{"role": "system", "content": "y"}, USER, ANSWER]]
    texts = [tokenizer.apply_chat_template(row, tokenize=False) for row in rows]
    in_template = {"prompt": [[USER]], "messages": rows, "text": texts, "input_ids": encode(tokenizer, rows, True)}
    in_template["prompt_ids"] = encode(tokenizer, [{"prompt": [USER], "tools": [TOOL]}], True)
    plain = {"prompt": ["ab"], "text": ["abc", "x"], "input_ids": [tokenizer("abc").input_ids], "prompt_ids": [[5, 6]]}
    for column, values in in_template.items():
        data = loader(column, *values)
        assert template_caution(["ab"], tokenizer, CHAT, data) is None
        assert template_caution(conversations, tokenizer, PLAIN, data) is None
        assert template_caution(texts, tokenizer, PLAIN, data) is None
        assert "measured as plain text, and the rows" in str(template_caution(["ab"], tokenizer, PLAIN, data))
    for column, values in plain.items():
        data = loader(column, *values)
        assert template_caution(["ab"], tokenizer, PLAIN, data) is None
        for prompts, settings in ((["ab"], CHAT), (conversations, PLAIN), (texts, PLAIN)):
            assert "measured in the tokenizer's chat template" in str(
                template_caution(prompts, tokenizer, settings, data)
            )
    assert "are put into it again" in str(template_caution(texts, tokenizer, CHAT))
    told = {"enable_thinking": False}
    so_told: Prompt = {"prompt": [USER], "chat_template_kwargs": told}
    assert template_caution([so_told], tokenizer, PLAIN, loader("prompt", [USER]), told) is None
    without = str(template_caution([so_told, [USER]], tokenizer, PLAIN, loader("prompt", [USER]), told))
    assert "The trainer gives the chat template {'enable_thinking': False}, and the prompts are" in without
    assert template_caution(["ab"], tokenizer, PLAIN, loader("prompt", "ab"), told) is None
    so_set = ProbeSettings(6, chat_template_kwargs=told)
    assert template_caution([[USER], "ab"], tokenizer, so_set, loader("prompt", [USER]), told) is None
    other = ProbeSettings(6, chat_template_kwargs={"enable_thinking": True})
    assert "and the prompts are measured without" in str(
        template_caution([[USER]], tokenizer, other, loader("prompt", [USER]), told)
    )


def test_what_a_template_has_no_ear_for_is_said() -> None:
    tokenizer = chat_tokenizer("words")  # which knows no tools
    tools: Prompt = {"prompt": [USER], "tools": [TOOL]}
    said = str(template_caution([tools, [USER]], tokenizer, CHAT))
    assert said.startswith("The chat template says nothing of the `tools` that 1 of the 2 prompts come with")
    assert template_caution([tools], chat_tokenizer("tokens"), CHAT) is None
    told = ProbeSettings(6, chat_template_kwargs={"thinking": False})
    assert "says nothing of `thinking` that the prompts come with" in str(template_caution(["ab"], tokenizer, told))
    heard = ProbeSettings(6, chat_template_kwargs={"enable_thinking": False})
    assert template_caution(["ab"], tokenizer, heard) is None


def test_what_cannot_be_seen_is_not_said() -> None:
    tokenizer = chat_tokenizer("words")
    data = loader("text", "abc")
    assert template_caution(["ab"], char_tokenizer(), CHAT, data) is None  # no template: all is plain
    for unseen in (None, SimpleNamespace(dataset=iter([])), loader("other", "ab"), loader("text", 3)):
        assert template_caution(["ab"], tokenizer, PLAIN, unseen) is None
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}="
    assert template_caution(["ab"], tokenizer, CHAT, data) is None
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert template_caution(["ab"], tokenizer, PLAIN, data) is None


def test_prompts_of_every_form_are_found_in_the_training_set() -> None:
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add"}}]}
    prompts: list[Prompt] = [{"prompt": [USER], "tools": [TOOL]}, [parts], [USER, ANSWER], [USER, call, ANSWER], "cd"]
    ids: list[list[list[int]]] = [[[n]] for n in range(5)]
    assert count_overlap(prompts, ids, loader("messages", [USER, ANSWER])) == 4
    assert count_overlap(prompts, ids, loader("messages", [parts])) == 4
    assert count_overlap(prompts, ids, loader("prompt", "cd")) == 1


def test_the_monitor_says_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": f"{a}{b}=", "completion": f"{b}{a}"} for a in "abcd" for b in "0123"]
    for settings, said in ((CHAT, True), (PLAIN, False)):
        tokenizer = chat_tokenizer("words")
        watching = ForgettingMonitor(PROMPTS, settings=settings, generic=GENERIC, cache_dir=tmp_path / "c", every=1)
        SFTTrainer(
            tiny_llama(len(tokenizer)),
            SFTConfig(str(tmp_path), max_steps=1, report_to="none", save_strategy="no", use_cpu=True, bf16=False),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[watching],
        ).train()
        assert ("[razor] The prompts are measured in the tokenizer's chat template" in capfd.readouterr().out) is said
