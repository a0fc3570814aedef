"""Text to token ids and back, the same way for training, sampling, scoring and probes."""

from collections.abc import Sequence
from typing import Any


def prompt_ids(tokenizer: Any, text: str, *, chat: bool = False) -> list[int]:
    """A prompt's token ids, with what the tokenizer begins a text with.

    With `chat`, as the user's turn of the tokenizer's chat template, where it has one.
    """
    if chat and getattr(tokenizer, "chat_template", None):
        turn = [{"role": "user", "content": text}]
        return list(tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=True, return_dict=False))
    return list(tokenizer(text)["input_ids"])


def completion_ids(tokenizer: Any, text: str, stop: Sequence[str] = ()) -> list[int]:
    """A completion's token ids, ended by the first stop string where that is one token, else by eos.

    Tokenised apart from its prompt, so that the prompt's tokens are the ones a policy sees when it samples.
    """
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    end = list(tokenizer(stop[0], add_special_tokens=False)["input_ids"]) if stop else []
    return ids + (end if len(end) == 1 else [tokenizer.eos_token_id])


def stop_ids(tokenizer: Any, model: Any, stop: Sequence[str] = ()) -> list[int]:
    """The tokens that end a completion: every eos of the tokenizer and the model, and whatever holds a stop string.

    A stop string that no single token holds does not end sampling; it still ends what a verifier sees.
    """
    said_by = getattr(model, "generation_config", None) or model.config
    declared = getattr(said_by, "eos_token_id", None)
    ends = {tokenizer.eos_token_id} | set(declared if isinstance(declared, list) else [declared])
    if stop:
        texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
        ends |= {token for token, text in enumerate(texts) if any(string in text for string in stop)}
    return sorted(ends - {None})


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of a completion, without special tokens."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))
