from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rlrazor.lm import encoding
from rlrazor.lm.prompts import encode
from tiny_models import char_tokenizer, tiny_llama

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }};{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer() -> Any:
    """A byte-level BPE as GPT-2's, with merges into tokens that hold a newline; texts begin with `<s>`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    newline, space = "Ċ", "Ġ"  # how byte-level BPE writes them
    pairs = [(newline, newline), (".", newline), ("c", "a"), ("ca", "t"), (space, "cat"), ("<", "|")]
    vocabulary = {token: index for index, token in enumerate([*alphabet, *(a + b for a, b in pairs)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", fast.bos_token_id)]
    )
    return fast


def prompt_ids(tokenizer: Any, text: str, *, chat: bool = False) -> list[int]:
    [ids] = encode(tokenizer, [text], chat)
    return ids


def model_ending_at(eos: int | list[int] | None) -> Any:
    """A model whose generation config declares `eos`."""
    model = tiny_llama()
    model.generation_config.eos_token_id = eos
    return model


def test_a_prompt_begins_as_the_tokenizer_begins_a_text_and_a_completion_does_not() -> None:
    tokenizer = byte_tokenizer()
    first, *rest = prompt_ids(tokenizer, "a cat")
    assert first == tokenizer.bos_token_id
    assert tokenizer.convert_ids_to_tokens(rest) == ["a", "Ġcat"]
    assert tokenizer.bos_token_id not in encoding.completion_ids(tokenizer, "a cat")


@pytest.mark.parametrize("ends", ["$A </s>", "<s> $A </s>", "<s> $A </s> </s>", "$A", "<s> $A"])
@pytest.mark.parametrize("text", ["a cat", "<s>a cat", "a cat</s>", "</s>", "<s>", "漢"])
def test_a_prompt_keeps_what_the_tokenizer_puts_in_front_and_not_what_it_puts_behind(ends: str, text: str) -> None:
    tokenizer = byte_tokenizer()
    own = tokenizer(text, add_special_tokens=False).input_ids
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=ends, special_tokens=[("<s>", bos), ("</s>", eos)]
    )
    assert tokenizer(text).input_ids == [bos] * ends.count("<s>") + own + [eos] * ends.count("</s>")
    front = [bos] if ends.startswith("<s>") and text not in ("<s>",) else []
    assert encoding.text_ids(tokenizer, text) == prompt_ids(tokenizer, text, chat=True) == front + own
    tokenizer.chat_template = "{{ bos_token }}" + TEMPLATE
    expected = f"<s><user>{text};<assistant>"
    chat = prompt_ids(tokenizer, text, chat=True)
    assert chat == tokenizer(expected, add_special_tokens=False).input_ids


def test_a_chat_prompt_is_the_users_turn_and_the_assistants_opening() -> None:
    tokenizer = char_tokenizer("<>acdeinrstuy: ")
    plain = prompt_ids(tokenizer, "a day", chat=True)
    assert plain == prompt_ids(tokenizer, "a day")  # no template, no turns
    tokenizer.chat_template = TEMPLATE
    ids = prompt_ids(tokenizer, "a day", chat=True)
    assert "".join(tokenizer.convert_ids_to_tokens(ids)) == "<user>a day;<assistant>"
    assert prompt_ids(tokenizer, "a day") == plain


@pytest.mark.parametrize("text", [" cat", "naïve Zürich 漢字 🙂", "", "two\n\nlines. \n", "  spaces  ,  kept . "])
def test_a_completion_survives_the_round_trip(text: str) -> None:
    tokenizer = byte_tokenizer()
    ids = encoding.completion_ids(tokenizer, text)
    assert ids[-1] == tokenizer.eos_token_id
    assert encoding.decode(tokenizer, ids) == text


def test_a_completion_ends_with_its_stop_string_where_that_is_one_token() -> None:
    tokenizer = byte_tokenizer()
    (newline,) = tokenizer("\n", add_special_tokens=False).input_ids
    assert encoding.completion_ids(tokenizer, " cat", ["\n", "?"])[-1] == newline
    assert encoding.completion_ids(tokenizer, " cat", ["cat?"])[-1] == tokenizer.eos_token_id  # of two tokens
    characters = char_tokenizer()
    # The eos that is also a character: one of them, and not shown.
    assert encoding.completion_ids(characters, "9+8", [";"]).count(characters.eos_token_id) == 1
    assert encoding.decode(characters, encoding.completion_ids(characters, "9+8", [";"])) == "9+8"


def test_every_token_that_holds_a_stop_string_ends_a_completion() -> None:
    tokenizer = byte_tokenizer()
    ends = encoding.stop_ids(tokenizer, model_ending_at(None), ["\n"])
    assert ends == sorted(ends)
    assert set(tokenizer.convert_ids_to_tokens(ends)) == {"Ċ", "ĊĊ", ".Ċ", "</s>"}
    both = encoding.stop_ids(tokenizer, model_ending_at(None), ["\n", "at"])
    assert set(tokenizer.convert_ids_to_tokens(both)) == {"Ċ", "ĊĊ", ".Ċ", "cat", "Ġcat", "</s>"}
    # Held by no single token: a verifier cuts there, sampling does not.
    assert encoding.stop_ids(tokenizer, model_ending_at(None), ["cat?"]) == [tokenizer.eos_token_id]


@pytest.mark.parametrize(("declared", "expected"), [(None, {1}), (5, {1, 5}), ([1, 7, 5], {1, 5, 7})])
def test_every_eos_of_tokenizer_and_model_ends_a_completion(
    declared: int | list[int] | None, expected: set[int]
) -> None:
    assert set(encoding.stop_ids(char_tokenizer(), model_ending_at(declared))) == expected


def test_what_a_demonstration_ends_with_ends_sampling_too() -> None:
    for tokenizer, stop in ((byte_tokenizer(), ["\n"]), (byte_tokenizer(), ["cat?"]), (char_tokenizer(), [";"])):
        ends = encoding.stop_ids(tokenizer, model_ending_at(None), stop)
        *before, last = encoding.completion_ids(tokenizer, "a dog", stop)
        assert last in ends
        assert not set(before) & set(ends)
