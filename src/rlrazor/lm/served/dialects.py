"""What servers understand: how completions are drawn from a model, and how its likeliest tokens are asked for.

Token ids go in and come out, never text, whose tokens a server might choose otherwise. Read in the servers' sources:
vLLM's entrypoints/openai/completion, SGLang's managers (its own /generate), llama.cpp's tools/server. A completion is
drawn at temperature 1 from the whole distribution, whatever a model's generation_config.json would have.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from rlrazor.errors import RazorError
from rlrazor.lm.served.client import Client
from rlrazor.lm.served.known import Known

NEVER = -9999.0  # vLLM's for a probability of 0: JSON has no infinity
FAINTEST = -103.0  # nats: less is 0 in float32, which is what llama.cpp computes a probability in
TOO_MUCH = 1.01  # of probability, on the tokens that are told: then these are no log-probabilities
MOST_TOKENS = 1 << 31  # of a vocabulary: the servers' ids are 32 bits wide
FORCED = 1e4  # added to a logit: the token that is wanted is drawn
Tops = list[tuple[int, float]]


class Dialect(Protocol):
    """Of a server with one model chosen."""

    @property
    def at_once(self) -> int:
        """How many requests it is sent at a time."""
        ...

    def draw(self, prompt: Sequence[int], most: int, seed: int) -> list[int]:
        """A completion of at most so many tokens, with the end of sequence where it came to one."""
        ...

    def read(self, tokens: Sequence[int], first: int, top: int) -> Known:
        """What is known of the model at the tokens from `first` on, each predicted by those before it."""
        ...

    def text(self, tokens: Sequence[int]) -> str:
        """What the server's tokenizer makes of token ids."""
        ...


@dataclass(frozen=True)
class Vllm:
    """vLLM's `prompt_logprobs`: the K likeliest at each token of the prompt, and the token itself, in one request."""

    client: Client
    model: str
    at_once: int = 8

    def draw(self, prompt: Sequence[int], most: int, seed: int) -> list[int]:
        """A completion."""
        body = {
            "model": self.model,
            "prompt": list(prompt),
            "max_tokens": most,
            "seed": seed,
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "return_token_ids": True,
        }
        choice = _choice(self.client, self.client.post("/v1/completions", body))
        if "token_ids" not in choice:
            raise self.client.refused(
                "does not tell the token ids of what it writes (return_token_ids, vLLM 0.10.2 or newer), and text is "
                "no substitute."
            )
        return _ended(_ids(self.client, choice["token_ids"], most), choice.get("stop_reason"))

    def read(self, tokens: Sequence[int], first: int, top: int) -> Known:
        """What is known at the tokens from `first` on."""
        body = {
            "model": self.model,
            "prompt": list(tokens),
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": top,
        }
        choice = _choice(self.client, self.client.post("/v1/completions", body))
        rows = choice.get("prompt_logprobs")
        if not isinstance(rows, list):
            raise self.client.refused("does not tell prompt_logprobs, which KL is made of.")
        if len(rows) != len(tokens):
            raise self.client.refused(f"was sent {len(tokens)} token ids and read {len(rows)}: it changes prompts.")
        found = []
        for token, row in zip(tokens[first:], rows[first:], strict=True):
            tops = _pairs(self.client, row, lambda name, one: (int(name), one["logprob"]))
            logps = dict(tops)
            if token not in logps:
                raise self.client.refused("reads other token ids than it was sent: it changes prompts.")
            if len(tops) == top + 1:  # then the token is the one that is none of the K, also where it is as likely
                tops = [one for one in tops if one[0] != token]
            found.append((_likeliest(self.client, tops, top), logps[token]))
        return _known(found)

    def text(self, tokens: Sequence[int]) -> str:
        """The text of token ids."""
        answer = self.client.post("/detokenize", {"model": self.model, "tokens": list(tokens)})
        return _text(self.client, answer, "prompt")


@dataclass(frozen=True)
class Sglang:
    """SGLang's own /generate, whose answers have token ids in any case."""

    client: Client
    model: str
    at_once: int = 8

    def draw(self, prompt: Sequence[int], most: int, seed: int) -> list[int]:
        """A completion."""
        how = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
        how |= {"frequency_penalty": 0.0, "presence_penalty": 0.0, "max_new_tokens": most}
        answer = self._generated({"input_ids": list(prompt), "sampling_params": how})
        reason = answer["meta_info"].get("finish_reason")
        ended = reason.get("matched") if isinstance(reason, dict) else None
        if "output_ids" not in answer:
            raise self.client.refused("does not tell the token ids of what it writes, and text is no substitute.")
        return _ended(_ids(self.client, answer["output_ids"], most), ended)

    def read(self, tokens: Sequence[int], first: int, top: int) -> Known:
        """What is known at the tokens from `first` on."""
        asked = {
            "input_ids": list(tokens),
            "sampling_params": {"temperature": 0.0, "max_new_tokens": 1},
            "return_logprob": True,
            "logprob_start_len": 0,
            "top_logprobs_num": top,
        }
        told = self._generated(asked)["meta_info"]
        own, tops = (told.get(f"input_{what}_logprobs") for what in ("token", "top"))
        if not (isinstance(own, list) and isinstance(tops, list)):
            raise self.client.refused("does not tell log-probabilities of a prompt, which KL is made of.")
        if not len(own) == len(tops) == len(tokens):
            raise self.client.refused(f"was sent {len(tokens)} token ids and read {len(own)}: it changes prompts.")
        found = []
        for token, mine, row in zip(tokens[first:], own[first:], tops[first:], strict=True):
            ((read, logp),) = _pairs(self.client, [mine], lambda _, one: (one[1], one[0]))
            if read != token:
                raise self.client.refused("reads other token ids than it was sent: it changes prompts.")
            pairs = _pairs(self.client, row, lambda _, one: (one[1], one[0]))
            found.append((_likeliest(self.client, pairs, top), logp))
        return _known(found)

    def text(self, tokens: Sequence[int]) -> str:
        """The text of token ids."""
        body = {"model": self.model, "tokens": list(tokens), "skip_special_tokens": False}
        return _text(self.client, self.client.post("/detokenize", body), "text")

    def _generated(self, body: Mapping[str, Any]) -> dict[str, Any]:
        answer = self.client.post("/generate", body)
        if not (isinstance(answer, dict) and isinstance(answer.get("meta_info"), dict)):
            raise self.client.refused("answers /generate otherwise than SGLang does.")
        return answer


@dataclass(frozen=True)
class LlamaCpp:
    """llama.cpp's server, which tells the likeliest of what it generates alone: a prompt is read a token at a time.

    Each token is forced, by its logit, and the server tells the probabilities before that; what came before is in its
    cache. Of a token that is part of a character it tells none: then the end of sequence is forced instead, and the
    whole vocabulary asked for.
    """

    client: Client
    model: str
    vocabulary: int
    end: int
    at_once: int = 1

    def draw(self, prompt: Sequence[int], most: int, seed: int) -> list[int]:
        """A completion."""
        body = {**self._plain(prompt, most), "seed": seed, "temperature": 1.0, "return_tokens": True}
        answer = self._completed(body)
        if answer.get("truncated"):
            raise self.client.refused("has no room for the prompts and completions: start it with a larger context.")
        return _ids(self.client, answer.get("tokens"), most)

    def read(self, tokens: Sequence[int], first: int, top: int) -> Known:
        """What is known at the tokens from `first` on."""
        found = []
        for at in range(first, len(tokens)):
            told = self._next(tokens[:at], tokens[at], top)
            if told is None:
                told = self._next(tokens[:at], self.end, self.vocabulary)
                if told is None:
                    raise self.client.refused("tells no probabilities (n_probs), which KL is made of.")
                tops, logp = told[0], dict(told[0]).get(tokens[at])
                if logp is None:
                    raise self.client.refused(f"does not tell the probability of token {tokens[at]}.")
                told = tops[:top], logp
            found.append(told)
        return _known(found)

    def text(self, tokens: Sequence[int]) -> str:
        """The text of token ids."""
        return _text(self.client, self.client.post("/detokenize", {"tokens": list(tokens)}), "content")

    def _plain(self, prompt: Sequence[int], most: int) -> dict[str, Any]:
        return {
            "model": self.model,
            "prompt": list(prompt),
            "n_predict": most,
            "samplers": ["temperature"],
            "top_k": 0,
            "top_p": 1.0,
            "min_p": 0.0,
            "repeat_penalty": 1.0,
            "cache_prompt": True,
            "stop": [],
        }

    def _completed(self, body: Mapping[str, Any]) -> dict[str, Any]:
        answer = self.client.post("/completion", body)
        if not isinstance(answer, dict):
            raise self.client.refused("answers /completion otherwise than llama.cpp does.")
        sent = len(body["prompt"])
        if (read := answer.get("tokens_evaluated", sent)) != sent:
            raise self.client.refused(
                f"was sent {sent} token ids and read {self.client.said(str(read))}: it changes prompts."
            )
        return answer

    def _next(self, before: Sequence[int], token: int, top: int) -> tuple[Tops, float] | None:
        """The likeliest after these, and the log-probability of that token; None where it tells none."""
        body = {**self._plain(before, 1), "temperature": 0.0, "n_probs": top, "post_sampling_probs": False}
        rows = self._completed({**body, "logit_bias": [[token, FORCED]]}).get("completion_probabilities")
        if not rows:
            return None
        row = rows[0] if isinstance(rows, list) else None
        if not isinstance(row, dict) or "top_logprobs" not in row:
            raise self.client.refused("tells probabilities otherwise than llama.cpp does (since December 2024).")
        ((read, logp),) = _pairs(self.client, [row], lambda _, one: (one["id"], one["logprob"]))
        if read != token:
            raise self.client.refused("does not draw the token that it was told to (logit_bias).")
        pairs = _pairs(self.client, row["top_logprobs"], lambda _, one: (one["id"], one["logprob"]))
        faint = [(token, max(one, FAINTEST)) for token, one in pairs]
        return _likeliest(self.client, faint, top), max(logp, FAINTEST)


def _choice(client: Client, answer: Any) -> dict[str, Any]:
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not (isinstance(choices, list) and len(choices) == 1 and isinstance(choices[0], dict)):
        raise client.refused("answers /v1/completions otherwise than OpenAI's and vLLM's do.")
    return dict(choices[0])


def _ids(client: Client, found: Any, most: int) -> list[int]:
    if not (isinstance(found, list) and len(found) <= most and all(map(_is_token, found))):
        raise client.refused(f"answers with something else than at most {most} token ids.")
    return list(found)


def _ended(tokens: list[int], by: Any) -> list[int]:
    """With the token that ended it, which a server may leave out."""
    return [*tokens, by] if _is_token(by) and tokens[-1:] != [by] else tokens


def _is_token(found: Any) -> bool:
    return type(found) is int and 0 <= found < MOST_TOKENS


def _pairs(client: Client, rows: Any, pair: Callable[[Any, Any], tuple[Any, Any]]) -> Tops:
    """Token ids and log-probabilities, checked."""
    try:
        named = rows.items() if isinstance(rows, dict) else enumerate(rows)
        found = [pair(name, one) for name, one in named]
        right = all(_is_token(token) and not math.isnan(logp) and logp < 1e-2 for token, logp in found)
    except (TypeError, ValueError, KeyError, IndexError, OverflowError):
        found, right = [], False
    if not right:
        raise client.refused("answers with something that is no log-probability of a token.")
    return [(token, -math.inf if logp <= NEVER and logp > 2 * NEVER else float(logp)) for token, logp in found]


def _likeliest(client: Client, pairs: Tops, top: int) -> Tops:
    """The first so many."""
    tops = sorted(pairs, key=lambda one: -one[1])[:top]
    if len(tops) < top:
        raise client.refused(
            f"was asked for the {top} likeliest tokens and tells {len(tops)}: give --top-k {max(len(tops), 1)}, or "
            "start it so that it tells more (vLLM: --max-logprobs)."
        )
    if sum(math.exp(logp) for _, logp in tops) > TOO_MUCH:
        raise client.refused("tells numbers that are no log-probabilities, such as logits (vLLM: --logprobs-mode).")
    return tops


def _known(found: Sequence[tuple[Tops, float]]) -> Known:
    logps = np.array([[logp for _, logp in tops] for tops, _ in found])
    return Known(
        ids=np.array([[token for token, _ in tops] for tops, _ in found], np.int64),
        logps=logps,
        drawn=np.array([logp for _, logp in found]),
        caps=logps[:, -1],
    )


def _text(client: Client, answer: Any, name: str) -> str:
    if not (isinstance(answer, dict) and isinstance(answer.get(name), str)):
        raise client.refused("does not tell the text of token ids (/detokenize).")
    return str(answer[name])


def dialect_of(client: Client, card: Mapping[str, Any], model: str, end: int) -> Dialect:
    """The one that a server speaks, by what it says of its model in /v1/models; vLLM's of those that do not say.

    Raises RazorError for servers that are known to tell nothing that KL could be made of.
    """
    owner = str(card.get("owned_by", ""))
    if owner == "llamacpp":
        meta = card.get("meta")
        count = meta.get("n_vocab") if isinstance(meta, dict) else None
        if type(count) is not int or count < 2:
            raise client.refused("does not say how many tokens its model has (n_vocab).")
        return LlamaCpp(client, model, count, end)
    if owner == "openai" or "openai.com" in client.address.root:
        raise RazorError(
            "OpenAI's models take no token ids and tell nothing of a prompt's tokens: KL is not to be had."
        )
    return Sglang(client, model) if owner == "sglang" else Vllm(client, model)
