"""A model that a server has: completions drawn from it, and what it says of each of their tokens."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from rlrazor.errors import RazorError
from rlrazor.lm.encoding import as_read
from rlrazor.lm.kl import Sequences
from rlrazor.lm.sampling import Told, unheard
from rlrazor.lm.served import LLAMA
from rlrazor.lm.served.client import Address, Client
from rlrazor.lm.served.dialects import Dialect, dialect_of
from rlrazor.lm.served.known import Known
from rlrazor.lm.served.llama_file import LlamaFile
from rlrazor.seeding import seed_of

TOP = 20  # likeliest tokens: what vLLM tells at most, unless it is started otherwise
SPREAD = 256  # tokens by which two tokenizers are told apart
PIECE = 24  # bytes of a token: llama.cpp's binding has no room for longer ones
LISTED = 8  # models of a server, in a message


@dataclass(frozen=True, eq=False)
class ServedModel:
    """One model of a server. `tokenizer` is ours, held against the server's; `context` in tokens, None if not known."""

    address: Address
    client: Client
    dialect: Dialect
    tokenizer: Any
    top: int
    context: int | None

    @classmethod
    def at(cls, source: str, tokenizer: Any, top: int = TOP) -> "ServedModel":
        """The model at `http://HOST:PORT#NAME`. Raises RazorError where it is not there."""
        address = Address.of(source)
        client = Client(address)
        card = _card(client, address)
        named = Address(address.root, str(card["id"]))
        end = tokenizer.eos_token_id
        dialect = dialect_of(client, card, named.model, 0 if end is None else end)
        meta = card["meta"] if isinstance(card.get("meta"), dict) else {}
        room = next(
            (one for one in (card.get("max_model_len"), meta.get("n_ctx")) if type(one) is int and one > 0), None
        )
        return cls(named, client, dialect, tokenizer, top, room)

    @property
    def cautions(self) -> list[str]:
        """What has to be known of how it is asked."""
        return self.client.cautions

    def text(self, tokens: Sequence[int]) -> str:
        """What the server's tokenizer makes of token ids."""
        return self.dialect.text(tokens)

    @property
    def shown(self) -> str:
        """Its address and name, as text that can be shown."""
        return self.client.said(self.address.shown)

    @property
    def kind(self) -> str:
        """Whose dialect it speaks."""
        return type(self.dialect).__name__

    def draw(
        self, prompts: Sequence[Sequence[int]], samples: int, most: int, stops: Sequence[int], told: Told = unheard
    ) -> list[list[int]]:
        """So many completions of each prompt, prompt by prompt, each cut behind the first of the `stops`."""
        ends = frozenset(stops)

        def one(number: int) -> list[int]:
            prompt = prompts[number // samples]
            seed = seed_of(0, f"served/{number}") % (1 << 31)
            tokens = self.dialect.draw(prompt, most, seed)
            if not tokens:
                raise self.client.refused("writes nothing at all: not even an end of sequence.")
            cut = next((at for at, token in enumerate(tokens) if token in ends), len(tokens) - 1)
            return tokens[: cut + 1]

        return self._each(one, len(prompts) * samples, told)

    def read(self, sequences: Sequences, beside: Known | None = None, told: Told = unheard) -> Known:
        """What it says of every token of the completions, in their order. `beside` is for those that know all."""

        def one(number: int) -> Known:
            before, completion = sequences.before(number), sequences.completions[number]
            return self.dialect.read([*before, *completion], len(before), self.top)

        return Known.joined(self._each(one, len(sequences.completions), told))

    def _each(self, one: Callable[[int], Any], count: int, told: Told) -> list[Any]:
        found = []
        pool = ThreadPoolExecutor(self.dialect.at_once)
        try:
            for done, result in enumerate(pool.map(one, range(count)), 1):
                found.append(result)
                told(done / count)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        return found


Served = ServedModel | LlamaFile


def opened(source: str, tokenizer: Any, top: int = TOP) -> Served:
    """The model at `http://HOST:PORT#NAME`, or of `llama.cpp:FILE`.

    Raises RazorError where it is not there, and where token ids mean something else there than to the tokenizer.
    """
    of_file = source.lower().startswith(LLAMA)
    found: Served = LlamaFile.at(source, tokenizer, top) if of_file else ServedModel.at(source, tokenizer, top)
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    spread = sorted({at * len(tokenizer) // SPREAD for at in range(SPREAD)} - special)
    texts = {token: as_read(tokenizer, [token]) for token in spread}
    ids = [token for token, text in texts.items() if "\ufffd" not in text and len(text.encode()) <= PIECE]
    ours, theirs = as_read(tokenizer, ids), found.text(ids)
    if "".join(ours.split()) != "".join(theirs.split()):
        raise RazorError(
            f"Token ids mean something else to {found.shown} than to the tokenizer here: compare a model with its "
            "own base, or name its tokenizer with --tokenizer."
        )
    return found


def _card(client: Client, address: Address) -> dict[str, Any]:
    """What the server says of the model. Raises RazorError where it has no such one, or several and none is named."""
    answer = client.get("/v1/models")
    data = answer.get("data") if isinstance(answer, dict) else None
    cards = (
        [one for one in data if isinstance(one, dict) and isinstance(one.get("id"), str)]
        if isinstance(data, list)
        else []
    )
    if not cards:
        raise client.refused("names no model in /v1/models.")
    ids = [one["id"] for one in cards]
    more = "" if len(ids) <= LISTED else f" and {len(ids) - LISTED} more"
    listed = client.said(", ".join(ids[:LISTED])) + more
    if address.model:
        chosen = [one for one in cards if address.model in (one["id"], *_aliases(one))]
        if not chosen:
            raise client.refused(f"has no model {client.said(address.model)}. It has {listed}.")
        return chosen[0]
    if len(cards) > 1:
        raise client.refused(
            f"has several models: name one, as in {address.root}#{client.said(ids[0])}. It has {listed}."
        )
    return cards[0]


def _aliases(card: dict[str, Any]) -> list[Any]:
    found = card.get("aliases")
    return found if isinstance(found, list) else []
