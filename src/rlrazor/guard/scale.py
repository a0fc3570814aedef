"""How large a KL is, where no law says what it costs: against the noise of measuring it, and against known runs.

And where it lies: on which prompts, and on the first tokens of a completion, as where a format was learnt, or on all.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlrazor.analysis.forecast import FORWARD, PROBE
from rlrazor.lm import compute, kl
from rlrazor.lm.kl import Drift
from rlrazor.lm.means import MeanKL
from rlrazor.lm.sampling import NotFiniteError

NOISE_PROMPTS = 4  # evenly spaced, of the probe: a pass over all of them would cost as much as the comparison
FIRST = 5  # tokens of a completion that are its beginning, unless another number is asked for
MOSTLY = 0.5  # of the KL, in tokens that are less than half of that share: then it is the beginning that has moved
ZERO = 1e-6  # nats per token; rounding of float32, summed over a vocabulary, stays below it
_KNOWN = Path(__file__).parent / "known_runs.json"


@dataclass(frozen=True)
class Noise:
    """KL per token of the base to itself, in nats: one prompt at a time (`batch`), and in the precision `other`.

    `rounding` is None where there is no other precision to compute in: then the weights are half precision already.
    """

    batch: float
    rounding: float | None
    other: str | None
    prompts: int

    @property
    def floor(self) -> float:
        """Of the two the larger."""
        return max(self.batch, self.rounding or 0.0)


def noise_of(base: Any, probe: kl.Probe) -> Noise:
    """Measured on some of the prompts of `probe`, which is the base's own."""
    few = probe.spread(NOISE_PROMPTS)
    batch = kl.forward_kl(few, base, token_budget=1).per_token.mean
    rounding, other = None, None
    if few.precision == compute.PRECISIONS[0]:
        other = compute.PRECISIONS[1]
        try:
            with _without_copies():
                rounding = kl.between(few, kl.Probe(base, few.sequences, beside=few, precision=other)).per_token.mean
        except NotFiniteError:  # too coarse for this model
            other = None
    return Noise(batch, rounding, other, len(few.sequences.prompts))


@contextmanager
def _without_copies() -> Iterator[None]:
    """Autocast would keep the weights in half precision too, half of the model's memory once more."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


@dataclass(frozen=True)
class Focus:
    """Where a KL lies. `first_tokens` of each completion, their share of all tokens and of the KL; `half_prompts`: how
    many of the `prompts`, the worst ones, make up half of the KL.
    """

    first_tokens: int
    token_share: float
    kl_share: float
    half_prompts: int
    prompts: int

    @property
    def at_the_beginning(self) -> bool:
        """Whether it is how completions begin that has moved."""
        return self.kl_share >= MOSTLY and self.token_share < self.kl_share / 2


@dataclass(frozen=True)
class Depth:
    """How deep a KL goes: in nats per token over the first tokens of each completion or text, and over the rest.

    Most of what alignment changes is in the first few tokens of an answer (arXiv:2406.05946). `rest` is None where
    nothing is longer.
    """

    first: MeanKL
    rest: MeanKL | None

    def as_json(self) -> dict[str, Any]:
        """Both."""
        return {"first": self.first._asdict(), "rest": self.rest and self.rest._asdict()}


def depth_of(drift: Drift, tokens: int) -> Depth:
    """Over the first so many tokens and over the rest."""
    first, rest = drift.split(tokens)
    return Depth(first.per_token, rest.per_token if rest.lengths.any() else None)


def focus_of(drift: Drift, tokens: int = FIRST) -> Focus:
    """Of a KL on completions, the first so many tokens of which are their beginning."""
    first, _ = drift.split(tokens)
    every, total = len(drift.positions), float(drift.positions.sum())
    _, prompt_N = np.unique(drift.prompt_of, return_inverse=True)
    by_prompt = np.sort(np.bincount(prompt_N, weights=drift.sums))[::-1]
    half = int(np.searchsorted(np.cumsum(by_prompt), total / 2)) + 1
    share = float(first.positions.sum()) / total if total else 0.0
    among = len(first.positions) / every if every else 0.0
    return Focus(tokens, among, share, half if total else 0, len(by_prompt))


@cache
def known_runs() -> dict[str, Any]:
    """Those that a KL is set beside where there is no law: checkpoints, and the command that made them.

    `checkpoints`: KLs in nats per token, drops of the prior score as fractions of 1; their completions had `tokens` on
    average.
    """
    found: dict[str, Any] = json.loads(_KNOWN.read_text(encoding="utf-8"))
    return found


def is_zero(per_token: MeanKL, noise: Noise) -> bool:
    """Whether a KL is 0, as far as measuring can tell."""
    return per_token.mean <= max(ZERO, 2 * noise.batch)


def against_noise(per_token: MeanKL, noise: Noise) -> str:
    """A sentence on a KL and the noise floor."""
    count = "1 prompt" if noise.prompts == 1 else f"{noise.prompts} prompts one at a time"
    said = f"the base against itself, {count}, is {nats(noise.batch)} nats per token"
    if noise.rounding is not None:
        said += f", and in {noise.other} {nats(noise.rounding)}"
    kl = f"The forward KL per token, {nats(per_token.mean)},"
    if is_zero(per_token, noise):
        return f"Noise floor: {said}. {kl} is 0 within it."
    if per_token.mean <= noise.floor:
        return f"Noise floor: {said}. {kl} is no more than such rounding."
    return f"Noise floor: {said}. {kl} is {_times(per_token.mean, noise.floor)}."


def _times(value: float, floor: float) -> str:
    times = value / max(floor, ZERO)
    return (
        "more than 1,000 times this floor" if times > 1000 else f"{times:.{0 if times >= 10 else 1}f} times this floor"
    )


def against_known(per_token: Mapping[str, MeanKL]) -> str:
    """A sentence on KLs per token and the documented runs."""
    known = known_runs()
    places = [
        f"by {what}, {_place(per_token[name].mean, name)}"
        for name, what in ((FORWARD, "forward KL per token"), (PROBE, "the generic probe's"))
    ]
    return (
        f"Beside the runs of `{known['command']}` ({known['parameters'] / 1e6:.1f}M parameters, completions of "
        f"{known['tokens']:.0f} tokens) it lies, {'; '.join(places)}. That is a scale, not a forecast: of another "
        "model and task the same KL costs more or less."
    )


def _place(value: float, name: str) -> str:
    """Between which of the known checkpoints a KL lies, and what those had lost."""
    known = sorted(known_runs()["checkpoints"], key=itemgetter(name))
    below = [100 * one["drop"] for one in known if one[name] <= value]
    above = [100 * one["drop"] for one in known if one[name] > value]
    if not below:
        return f"below all of them; the next had lost {above[0]:.1f} points"
    if not above:
        return f"above all of them; the last had lost {below[-1]:.1f} points"
    return f"between checkpoints that had lost {below[-1]:.1f} and {above[0]:.1f} points"


def where(focus: Focus) -> str:
    """A sentence on where a KL lies."""
    if not focus.half_prompts:
        return "No prompt has moved."
    prompts = f"Half of the KL is on {focus.half_prompts} of the {focus.prompts} prompts"
    if focus.token_share > 1 - 1e-9:
        return f"{prompts}; no completion is longer than {focus.first_tokens} tokens."
    first = (
        f"{focus.kl_share:.0%} of it in the first {focus.first_tokens} tokens of a completion, which are "
        f"{focus.token_share:.0%} of the tokens"
    )
    meaning = "how answers begin has moved, as with a format" if focus.at_the_beginning else "not their beginning alone"
    return f"{prompts}, {first}: {meaning}."


def shown_estimate(estimate: MeanKL) -> str:
    """Nats with their standard error."""
    return f"{estimate.mean:.4f}" + (f" ± {estimate.stderr:.4f}" if math.isfinite(estimate.stderr) else "")


def nats(value: float) -> str:
    """Three digits, however small."""
    return "0" if value == 0 else f"{value:.3g}"
