"""Text to token ids and back, the same way for training, sampling, scoring and probes."""

import functools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

from rlrazor.errors import RazorError, cause_of, is_panic
from rlrazor.lm import content_parts, trials

P = ParamSpec("P")
T = TypeVar("T")

# Where a conversation ends: where the assistant goes on, in a turn of its own or in that which it has begun; where one
# of its own begins, whoever spoke last; or behind its last turn.
_BY_ROLE, _BEGUN, _ENDED = "by role", "begun", "ended"
_SYSTEM = ("system", "developer")
_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def _without_panics(function: Callable[P, T]) -> Callable[P, T]:
    """The function, raising RazorError where the tokenizer's library itself fails: it panics, or has no token."""

    @functools.wraps(function)
    def guarded(*arguments: P.args, **named: P.kwargs) -> T:
        try:
            return function(*arguments, **named)
        except BaseException as error:
            if not is_panic(error) and type(error) is not Exception:  # which is what tokenizers raises, and no other
                raise
            raise RazorError(
                f"The tokenizer fails on a text ({cause_of(error).rstrip('.')}): its files are damaged. Download them "
                "again."
            ) from error

    return guarded


@_without_panics
def text_ids(tokenizer: Any, text: str) -> list[int]:
    """A text's token ids, with what the tokenizer puts in front of one and without what it puts behind.

    Behind an end of sequence (`add_eos_token`, a post-processor) a model begins something else: a prompt that is to be
    continued has none. Nor has a text that is measured whole, as it is the tokenizer that ends there, not the text.
    """
    whole, own = (list(tokenizer(text, add_special_tokens=added)["input_ids"]) for added in (True, False))
    for front in range(len(whole) - len(own) + 1):
        if whole[front : front + len(own)] == own:
            return whole[: front + len(own)]
    return whole


@_without_panics
def front_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer puts in front of a text: bos, or nothing."""
    own, ids = list(tokenizer("a", add_special_tokens=False)["input_ids"]), text_ids(tokenizer, "a")
    return ids[: -len(own)] if own and ids[-len(own) :] == own else []


@_without_panics
def turns_ids(tokenizer: Any, turns: Sequence[Mapping[str, Any]], **template: Any) -> list[int]:
    """Token ids of a conversation in the tokenizer's chat template, up to where the assistant goes on.

    That is at the beginning of a turn of its own, or where the last turn is the assistant's at the end of that, as in
    TRL. Special tokens are the template's, and no others. `template`: what else the template is given, such as `tools`.
    Raises RazorError for a template that does not come to an end, ValueError for one that makes nothing of the turns,
    and what the template raises.
    """
    ids = _in_template(tokenizer, turns, template, tokenize=True)
    rendered = str(_in_template(tokenizer, turns, template, tokenize=False))
    if any(isinstance(turn.get("content"), list) and str(turn["content"]) in rendered for turn in turns):
        raise ValueError("it shows a content that is a list of parts as Python would: give the content as text")
    calls = [call for turn in turns for call in turn.get("tool_calls") or ()]
    if any(str(_called(call)) not in rendered for call in calls):
        raise ValueError("it shows nothing of a call of a tool")
    if not rendered.strip():
        raise ValueError("it makes no text of it")
    asks = next((at for at in reversed(range(len(turns))) if turns[at]["role"] == "user"), None)
    for at, turn in enumerate(turns):
        if (
            at == asks
            or turn["role"] == "tool"
            or (turn["role"] in _SYSTEM and not isinstance(turn.get("content"), str))
        ):
            _require_shown(tokenizer, turns, at, template, rendered)
    if not tokenizer.decode(list(ids), skip_special_tokens=True).strip():
        raise ValueError("it makes no text of it")
    return list(ids)


def _require_shown(
    tokenizer: Any, turns: Sequence[Mapping[str, Any]], at: int, template: Mapping[str, Any], rendered: str
) -> None:
    """Raise ValueError where the text of a turn is not in the rendered conversation, nor would be if it were another.

    What an assistant says some templates leave out rightly (what it thinks), and a system's text some never show.
    """
    texts = content_parts.texts_of(turns[at].get("content"))
    if all(text.strip() in rendered for text in texts):
        return
    other = [*turns[:at], content_parts.with_more(turns[at], "."), *turns[at + 1 :]]
    if str(_in_template(tokenizer, other, template, tokenize=False)) == rendered:
        who = {"tool": "a tool answers"}.get(turns[at]["role"], f"the {turns[at]['role']} says")
        in_parts = not isinstance(turns[at]["content"], str)
        way_out = " in parts: give the content as text" if in_parts else ", as text or as a list of parts"
        raise ValueError(f"it shows nothing of what {who}{way_out}")


@_without_panics
def turns_text(tokenizer: Any, turns: Sequence[Mapping[str, Any]], **template: Any) -> str:
    """The text of which `turns_ids` makes tokens. Raises as that does."""
    turns_ids(tokenizer, turns, **template)
    return str(_in_template(tokenizer, turns, template, tokenize=False))


@_without_panics
def begun_ids(tokenizer: Any, text: str) -> list[int]:
    """As `text_ids`, but of a text that begins with bos already, as one in a chat template may: without another."""
    own = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    begins = tokenizer.bos_token_id is not None and own[:1] == [tokenizer.bos_token_id]
    return own if begins else text_ids(tokenizer, text)


def _called(call: Any) -> Any:
    """The name of the tool; nothing where there is none."""
    function = call.get("function", call) if isinstance(call, Mapping) else {}
    return function.get("name", "") if isinstance(function, Mapping) else ""


@_without_panics
def empty_turn_ids(tokenizer: Any) -> list[int] | None:
    """The chat template around a user who says nothing, up to where the assistant begins; None where it takes no such.

    Raises RazorError for a template that does not come to an end.
    """
    try:
        return list(_in_template(tokenizer, [{"role": "user", "content": ""}], {}, tokenize=True))
    except RazorError:
        raise
    except Exception:  # a template may raise anything
        return None


@_without_panics
def answer_ids(
    tokenizer: Any, turns: Sequence[Mapping[str, Any]], ends: Collection[int], **template: Any
) -> tuple[list[int], list[int]]:
    """The last turn of a conversation, which is the assistant's, as token ids: what comes before it, and the turn.

    The turn is what it adds to the conversation without it, up to where the assistant begins: what a model would have
    had to sample. Where the template shows the two otherwise, it is what the template marks ({% generation %}), as for
    TRL's `assistant_only_loss`. The turn ends with the last of the tokens `ends` in it, if there is one: what a
    template puts behind, nobody samples. Raises as `turns_ids` does, and ValueError where it cannot be told.
    """
    before, whole = (
        list(_in_template(tokenizer, given, template, tokenize=True, ends=end))
        for given, end in ((turns[:-1], _BEGUN), (turns, _ENDED))
    )
    if whole[: len(before)] == before:
        said = whole[len(before) :]
    else:
        text, all_text = (
            str(_in_template(tokenizer, given, template, tokenize=False, ends=end))
            for given, end in ((turns[:-1], _BEGUN), (turns, _ENDED))
        )
        if all_text.startswith(text):  # tokens merge where it goes on, which they do not where it is said
            said = list(tokenizer(all_text[len(text) :], add_special_tokens=False)["input_ids"])
        elif (marked := _marked(tokenizer, turns, template)) is not None:
            before, said = marked
        else:
            raise ValueError("it begins a turn of the assistant's in one way and shows it, once said, in another")
    last = max((at for at, token in enumerate(said) if token in ends), default=len(said) - 1)
    said = said[: last + 1]
    if not tokenizer.decode(said, skip_special_tokens=True).strip():
        raise ValueError("it shows nothing of a turn of the assistant's")
    return before, said


def _marked(
    tokenizer: Any, turns: Sequence[Mapping[str, Any]], template: Mapping[str, Any]
) -> tuple[list[int], list[int]] | None:
    """The same by the template's own marks; None where it has none there."""
    text = tokenizer.get_chat_template(None, template.get("tools"))
    if not isinstance(text, str) or not _MARK.search(text) or not tokenizer.is_fast:
        return None
    found = _in_template(tokenizer, turns, template, tokenize=True, ends=_ENDED, masked=True)
    ids = list(found["input_ids"])
    earlier = _in_template(tokenizer, turns[:-1], template, tokenize=True, ends=_ENDED)  # whose turns are marked too
    begins = next((at for at, (a, b) in enumerate(zip(earlier, ids, strict=False)) if a != b), len(earlier))
    places = [at for at, mark in enumerate(found["assistant_masks"]) if mark and at >= begins]
    return (ids[: places[0]], ids[places[0] : places[-1] + 1]) if places else None


def try_turns(tokenizer: Any, conversations: Sequence[tuple[Sequence[Mapping[str, Any]], Mapping[str, Any]]]) -> None:
    """Try the chat template on many conversations at once, each its turns and what the template is given beside.

    `turns_ids` tries its own where that was not done, which takes a tenth of a second each time. Raises RazorError.
    """
    _try(tokenizer, [(turns, template, _BY_ROLE) for turns, template in conversations])


def try_answers(tokenizer: Any, conversations: Sequence[tuple[Sequence[Mapping[str, Any]], Mapping[str, Any]]]) -> None:
    """The same for `answer_ids`."""
    _try(tokenizer, [(turns[:-1], template, _BEGUN) for turns, template in conversations])
    _try(tokenizer, [(turns, template, _ENDED) for turns, template in conversations])


def _try(tokenizer: Any, asked: Sequence[tuple[Sequence[Mapping[str, Any]], Mapping[str, Any], str]]) -> None:
    trials.try_template(tokenizer, [{**one[1], **_asked(tokenizer, *one)} for one in asked])


def _asked(
    tokenizer: Any, turns: Sequence[Mapping[str, Any]], template: Mapping[str, Any], ends: str
) -> dict[str, Any]:
    """What every template is given."""
    begins = turns[-1]["role"] != "assistant" if ends == _BY_ROLE else ends == _BEGUN
    return {
        "messages": content_parts.as_shown(tokenizer, turns, template.get("tools")),
        "tools": template.get("tools") or None,  # some templates announce tools where the list of them is empty
        "add_generation_prompt": begins,
    }


def _in_template(
    tokenizer: Any,
    turns: Sequence[Mapping[str, Any]],
    template: Mapping[str, Any],
    *,
    tokenize: bool,
    ends: str = _BY_ROLE,
    masked: bool = False,
) -> Any:
    """As text, as token ids, or `masked`, as both the ids and which of them the template marks as the assistant's."""
    _try(tokenizer, [(turns, template, ends)])
    asked = _asked(tokenizer, turns, template, ends)
    beside = {name: value for name, value in template.items() if name != "tools"}
    return tokenizer.apply_chat_template(
        asked.pop("messages"),
        **asked,
        continue_final_message=ends == _BY_ROLE and not asked["add_generation_prompt"],
        tokenize=tokenize,
        return_dict=masked,
        **({"return_assistant_tokens_mask": True} if masked else {}),
        **beside,
    )


@_without_panics
def completion_ids(tokenizer: Any, text: str, stop: Sequence[str] = ()) -> list[int]:
    """A completion's token ids, ended by the first stop string where that is one token, else by eos.

    Tokenised apart from its prompt, so that the prompt's tokens are the ones a policy sees when it samples.
    """
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    end = list(tokenizer(stop[0], add_special_tokens=False)["input_ids"]) if stop else []
    return ids + (end if len(end) == 1 else [tokenizer.eos_token_id])


def check_stop(stop: Sequence[str]) -> None:
    """Raise RazorError for what are no stop strings: every token holds the empty one, so it ends all completions."""
    if isinstance(stop, str) or not all(isinstance(text, str) for text in stop):
        raise RazorError(f"stop is a tuple of strings, such as ('\\n',), not {stop!r}.")
    if "" in stop:
        raise RazorError(
            "A stop string is empty, which would end every completion at its first token: leave it out, and "
            "completions end where the model ends them."
        )


@_without_panics
def stop_ids(tokenizer: Any, model: Any, stop: Sequence[str] = ()) -> list[int]:
    """The tokens that end a completion: every eos of the tokenizer and the model, and whatever holds a stop string.

    A stop string that no single token holds does not end sampling; it still ends what a verifier sees. `model` is None
    where it is not here.
    """
    said_by = getattr(model, "generation_config", None) or getattr(model, "config", None)
    declared = getattr(said_by, "eos_token_id", None)
    declared = declared if isinstance(declared, list) else [declared]
    if not all(token is None or isinstance(token, int) for token in declared):
        raise RazorError(f"The model's eos_token_id is {declared!r:.100}, no token's id: mend generation_config.json.")
    ends = {tokenizer.eos_token_id, *declared}
    if stop:
        texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
        ends |= {token for token, text in enumerate(texts) if any(string in text for string in stop)}
    return sorted(ends - {None})


@_without_panics
def as_read(tokenizer: Any, ids: Sequence[int]) -> str:
    """Token ids as the model reads them: text with special tokens, and every space as it is."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


@_without_panics
def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of a completion, without special tokens."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))
