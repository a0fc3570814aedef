"""Where on the prompts two models differ: each prompt's completions, token by token, with the KL at each."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlrazor.guard.comparison import Completion, PromptDrift
from rlrazor.lm.kl import Drift, Sequences
from rlrazor.lm.probes import ProbeSettings, Prompt, encode
from rlrazor.lm.prompts import last_said


def by_prompt(
    base: tuple[Sequences, Drift],
    tuned: tuple[Sequences, Drift],
    tokenizer: Any,
    given: Sequence[Prompt],
    settings: ProbeSettings,
) -> list[PromptDrift]:
    """The worst first. Of each model its completions, and the KL at their tokens; `given`: the prompts as they were."""
    of_base, of_tuned = _completions(*base, tokenizer), _completions(*tuned, tokenizer)
    ids = base[0].prompts
    rendered = [str(tokenizer.decode(list(prompt), skip_special_tokens=True)) for prompt in ids]
    said = _said(given, settings, tokenizer, ids) or rendered
    shown = [
        PromptDrift(
            rendered[index],
            float(np.mean([completion.total for completion in of_base[index]])),
            tuple(of_base[index]),
            tuple(of_tuned[index]),
            said[index],
        )
        for index in range(len(ids))
    ]
    return sorted(shown, key=lambda one: -one.total)


def _said(
    given: Sequence[Prompt], settings: ProbeSettings, tokenizer: Any, measured: Sequence[Sequence[int]]
) -> list[str]:
    """What the user says last in each prompt that is measured, some having been left out; none where that is lost."""
    left = list(zip(given, encode(tokenizer, given, settings.chat, settings.chat_template_kwargs), strict=True))
    said = []
    for ids in measured:
        while left and left[0][1] != list(ids):
            left.pop(0)
        if not left:  # a template that says what time it is, say
            return []
        said.append(last_said(left.pop(0)[0]))
    return said


def _completions(sequences: Sequences, drift: Drift, tokenizer: Any) -> list[list[Completion]]:
    """Each prompt's completions."""
    of_prompt: list[list[Completion]] = [[] for _ in sequences.prompts]
    ends = np.cumsum(drift.lengths)
    for n, (prompt, ids) in enumerate(zip(sequences.prompt_of, sequences.completions, strict=True)):
        kls = drift.positions[ends[n] - drift.lengths[n] : ends[n]]
        given = bool(sequences.befores) and sequences.befores[n] is not None
        of_prompt[prompt].append(Completion(tuple(pieces(tokenizer, ids)), tuple(map(float, kls)), given))
    return of_prompt


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text that each token adds. A character of several tokens comes with the last of them.

    Each is decoded after the one before it, as what a token adds may depend on it: spaces of SentencePiece do.
    """

    def text(start: int, end: int) -> str:
        return str(tokenizer.decode(list(ids[start:end]), clean_up_tokenization_spaces=False))

    shown: list[str] = []
    before = done = 0  # where the last complete piece begins and ends
    for end in range(1, len(ids) + 1):
        known, longer = text(before, done), text(before, end)
        if longer.endswith("\ufffd") and end < len(ids):
            shown.append("")
            continue
        shown.append(longer[len(known) :])
        before, done = done, end
    return shown
