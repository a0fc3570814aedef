"""A GGUF file as llama.cpp computes with it, quantised as it is, through its Python binding: what a server would serve.

A `.gguf` given as a model without `llama.cpp:` in front is converted and computed by torch in floats instead, where the
rounding of llama.cpp's products is not.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlrazor.errors import RazorError, cause_of
from rlrazor.extras import needs_package
from rlrazor.lm.kl import Sequences
from rlrazor.lm.sampling import Told, unheard
from rlrazor.lm.served import LLAMA
from rlrazor.lm.served.known import Floats, Known
from rlrazor.lm.served.local import known_of
from rlrazor.seeding import seed_of

LONGEST = 4096  # tokens: the binding keeps the logits of all of them, 0.8 GB of V = 49k and 2.5 GB of V = 152k at most


@dataclass(frozen=True, eq=False)
class LlamaFile:
    """A model in this process. `context` in tokens; `ends`: those that it itself ends a text with."""

    source: str
    engine: Any
    tokenizer: Any
    top: int
    context: int
    ends: frozenset[int] = frozenset()
    cautions: tuple[str, ...] = ()
    kind: str = "llama.cpp"

    @classmethod
    def at(cls, source: str, tokenizer: Any, top: int) -> "LlamaFile":
        """The file of `llama.cpp:FILE`. Raises RazorError where it is not there, or cannot be loaded."""
        needs_package("llama_cpp", f"A model named {LLAMA}FILE", "llama-cpp-python")
        path = Path(source.removeprefix(LLAMA)).expanduser()
        if not path.is_file():
            raise RazorError(f"There is no file {path}, which {source} names.")
        import llama_cpp

        try:
            engine = llama_cpp.Llama(str(path), n_ctx=LONGEST, logits_all=True, verbose=False)
            told = engine.metadata
            room = min(int(told.get(f"{told['general.architecture']}.context_length", LONGEST)), LONGEST)
            vocab = engine._model.vocab
            ends = frozenset(one for one in range(engine.n_vocab()) if llama_cpp.llama_vocab_is_eog(vocab, one))
        except Exception as error:  # of a library that says no more than that
            raise RazorError(f"llama.cpp cannot load {path}: {cause_of(error)}") from error
        return cls(source, engine, tokenizer, top, room, ends)

    @property
    def shown(self) -> str:
        """As it was named."""
        return self.source

    def text(self, tokens: Sequence[int]) -> str:
        """What llama.cpp's tokenizer makes of token ids."""
        return bytes(self.engine.detokenize(list(tokens), special=True)).decode("utf-8", errors="replace")

    def draw(
        self, prompts: Sequence[Sequence[int]], samples: int, most: int, stops: Sequence[int], told: Told = unheard
    ) -> list[list[int]]:
        """So many completions of each prompt, prompt by prompt, each up to the first of the `stops` or its own `ends`.

        Raises RazorError for a prompt that has no room for its completion.
        """
        found, ends = list[list[int]](), self.ends | frozenset(stops)
        self._require_room(max(map(len, prompts), default=0) + most)
        for number in range(len(prompts) * samples):
            rng = np.random.default_rng(seed_of(0, f"served/{number}") % (1 << 31))
            self.engine.reset()
            self.engine.eval(list(prompts[number // samples]))
            tokens: list[int] = []
            while True:
                probabilities = np.exp(_log_softmax(self.engine.scores[self.engine.n_tokens - 1][None])[0])
                tokens.append(int(rng.choice(len(probabilities), p=probabilities / probabilities.sum())))
                if len(tokens) == most or tokens[-1] in ends:
                    break
                self.engine.eval(tokens[-1:])
            found.append(tokens)
            told(len(found) / (len(prompts) * samples))
        return found

    def read(self, sequences: Sequences, beside: Known | None = None, told: Told = unheard) -> Known:
        """What it says of every token of the completions, in their order; also on the tokens that `beside` has."""
        parts, at = [], 0
        for number, logps_TV in enumerate(self.whole(sequences)):
            completion, rows = sequences.completions[number], slice(at, at + len(logps_TV))
            others = np.zeros((len(completion), 0), np.int64) if beside is None else beside.ids[rows]
            tokens = np.array(completion, np.int64)
            if max(others.max(initial=0), tokens.max(initial=0)) >= logps_TV.shape[1]:
                raise RazorError(f"The other model has tokens that {self.source} lacks: KL is not defined.")
            parts.append(known_of(torch.from_numpy(logps_TV), tokens, others, self.top))
            at += len(completion)
            told((number + 1) / len(sequences.completions))
        return Known.joined(parts)

    def whole(self, sequences: Sequences) -> Iterator[Floats]:
        """Of each completion, the log-probabilities of the whole vocabulary at its tokens (T, V)."""
        for number, completion in enumerate(sequences.completions):
            before = sequences.before(number)
            yield self.log_probs([*before, *completion])[len(before) - 1 :]

    def log_probs(self, tokens: Sequence[int]) -> Floats:
        """Of every token but the first, over the whole vocabulary (T - 1, V). Raises RazorError for too many."""
        self._require_room(len(tokens))
        self.engine.reset()
        self.engine.eval(list(tokens[:-1]))
        return _log_softmax(self.engine.scores[: len(tokens) - 1])

    def _require_room(self, length: int) -> None:
        if length > self.context:
            raise RazorError(
                f"{self.source} has room for {self.context} tokens, and a prompt with its completion comes to "
                f"{length}: leave the long prompts out, or lower --max-new-tokens."
            )


def _log_softmax(logits_TV: Any) -> Floats:
    return np.asarray(torch.from_numpy(np.asarray(logits_TV, np.float64)).log_softmax(dim=1))
