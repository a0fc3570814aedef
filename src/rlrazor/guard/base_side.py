"""The base's side of every comparison: both probes, computed once, and the measurement of a policy against them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rlrazor.analysis.forecast import FORWARD, PROBE
from rlrazor.errors import RazorError
from rlrazor.guard.measured_on import FEW_PROMPTS, MeasuredOn
from rlrazor.lm import compute, kl, probes
from rlrazor.lm.digests import base_digest
from rlrazor.lm.kl import Drift, Sequences
from rlrazor.lm.means import MeanKL
from rlrazor.lm.sampling import NotFiniteError
from rlrazor.lm.shards import name_of

SHOWN = 400  # characters of a prompt
NO_MEMORY = (
    "Out of memory while the base completes the prompts, before training: give fewer or shorter prompts, or lower "
    "max_new_tokens in Measuring(settings=ProbeSettings(...))."
)
HEADS = 1.4  # what measuring a policy takes, as a multiple of the base's pass: that, and the products with two heads
ToldWhat = Callable[[str, float], None]  # what is being done, and how much of it has been


@dataclass(frozen=True)
class ProbeSizes:
    """Tokens of each prompt with its completions, by probe, in each process's part: what a measurement reads."""

    parts: Sequence[Mapping[str, Sequence[int]]]

    def read(self, fraction: float) -> int:
        """Tokens that a measurement with a fraction of the probes reads, in the process that reads most."""
        return max(
            sum(sum(tokens[at] for at in kl.evenly(len(tokens), _count(fraction, tokens))) for tokens in part.values())
            for part in self.parts
        )

    def described(self, fraction: float) -> str:
        """How many of the prompts and texts that is."""
        said = []
        for name, what in ((FORWARD, "prompts"), (PROBE, "generic texts")):
            tokens = [part[name] for part in self.parts if name in part]
            count, total = sum(_count(fraction, one) for one in tokens), sum(map(len, tokens))
            said.append(f"all {count} {what}" if count == total else f"{count} of {total} {what}")
        return " and ".join(said)


def _count(fraction: float, prompts: Sequence[Any]) -> int:
    return min(len(prompts), max(math.ceil(fraction * len(prompts)), FEW_PROMPTS))


@dataclass(frozen=True, eq=False)
class BaseSide:
    """The base's hidden states on the new task's prompts and on the generic probe; by the names of their KLs.

    Of several processes each has a part of a probe, or none where there are more of them than prompts. `whole` counts
    the prompts of all parts: those that fit into the context. `seconds`: what the base's pass over this part took.
    `cautions`: sentences on what the base has written itself, where that is the generic probe.
    """

    probes: dict[str, kl.Probe]
    whole: Mapping[str, int]
    seconds: float = 0.0
    cautions: Sequence[str] = ()

    @classmethod
    def of(
        cls,
        base: Any,
        tokenizer: Any,
        on: MeasuredOn,
        *,
        cache_dir: Path | None = None,
        digest: str | None = None,
        share: tuple[int, int] = (0, 1),
        generic: Sequences | None = None,
        told: ToldWhat = lambda what, done: None,
    ) -> BaseSide:
        """Complete the prompts and run the base, a PEFT model's under its adapter. `share`: of (rank, processes).

        `digest` is the base's, and `generic` its probe (`generic_of`), where they are known. `told` hears how far it
        is. Raises RazorError where nothing is left to measure on.
        """
        precision = on.settings.precision
        digest = digest or (None if cache_dir is None else base_digest(base, precision))
        kept: dict[str, Any] = {"cache_dir": cache_dir, "digest": digest}
        told_of = partial(told, "the base completes the prompts")
        sequences = {
            FORWARD: probes.of_prompts(base, tokenizer, on.prompts, on.settings, told=told_of, **kept),
            PROBE: generic_of(base, tokenizer, on, told=told, **kept) if generic is None else generic,
        }
        found: dict[str, kl.Probe] = {}
        begun = compute.now(base)
        for name, what in ((FORWARD, "the prompts"), (PROBE, "the generic texts")):
            if (part := _part(sequences[name], *share)) is not None:
                found[name] = kl.Probe(
                    base,
                    part,
                    beside=next(iter(found.values()), None),
                    precision=precision,
                    told=partial(told, f"the base reads {what}"),
                )
        seconds = compute.now(base) - begun
        whole = {name: len(every.prompts) for name, every in sequences.items()}
        return cls(found, whole, seconds, probes.cautions_of(base, tokenizer, on.generic, sequences[PROBE]))

    @property
    def first_prompt(self) -> Sequence[int]:
        """Token ids of the first of the new task's prompts that this process measures; none where it has none."""
        return self.probes[FORWARD].sequences.prompts[0] if FORWARD in self.probes else ()

    @property
    def sizes(self) -> Mapping[str, Sequence[int]]:
        """Tokens of each prompt with its completions, by probe, in this process's part."""
        return {name: _tokens(probe.sequences) for name, probe in self.probes.items()}

    @property
    def tokens(self) -> int:
        """What a measurement has the policy read."""
        return sum(map(sum, self.sizes.values()))

    @property
    def pace(self) -> float:
        """About how many seconds a measurement takes for each token that it reads."""
        return HEADS * self.seconds / max(self.tokens, 1)

    def thinned(self, fraction: float) -> BaseSide:
        """The same on a `fraction` of each probe's prompts, but on FEW_PROMPTS as far as there are; itself of 1."""
        if fraction == 1:
            return self
        counts = {name: _count(fraction, probe.sequences.prompts) for name, probe in self.probes.items()}
        return BaseSide({name: probe.spread(counts[name]) for name, probe in self.probes.items()}, self.whole)

    def measure(self, policy: Any) -> dict[str, Drift]:
        """KL(base || policy) on each probe, the policy's LM head gathered once. Raises as `kl.forward_kl` does."""
        if not self.probes:
            return {}
        head = kl.final_head(policy, next(iter(self.probes.values())).precision)
        return {name: kl.forward_kl(probe, policy, head=head) for name, probe in self.probes.items()}


def generic_of(
    base: Any,
    tokenizer: Any,
    on: MeasuredOn,
    *,
    cache_dir: Path | None = None,
    digest: str | None = None,
    told: ToldWhat = lambda what, done: None,
) -> Sequences:
    """The generic probe, as `BaseSide.of` would draw it."""
    what = "the base writes texts of its own" if on.generic.own else "the base completes the generic prompts"
    kept: dict[str, Any] = {"cache_dir": cache_dir, "digest": digest}
    return probes.of_generic(base, tokenizer, on.generic, on.settings, told=partial(told, what), **kept)


def joined(parts: Sequence[Mapping[str, Drift]]) -> dict[str, Drift]:
    """What the processes measured, as one; the first of them has a part of every probe."""
    return {name: Drift.joined([part[name] for part in parts if name in part]) for name in parts[0]}


def _part(sequences: Sequences, rank: int, processes: int) -> Sequences | None:
    """Every so many-th prompt with its completions; None where none is left for this process."""
    if processes == 1:
        return sequences
    mine = range(rank, len(sequences.prompts), processes)
    return sequences.of_prompts(mine) if mine else None


def _tokens(sequences: Sequences) -> list[int]:
    """Of each prompt with its completions."""
    found = [0] * len(sequences.prompts)
    for n, (prompt, completion) in enumerate(zip(sequences.prompt_of, sequences.completions, strict=True)):
        found[prompt] += len(sequences.before(n)) + len(completion)
    return found


def kls_of(drifts: Mapping[str, Drift]) -> dict[str, MeanKL]:
    """Nats per completion, or per text, on each probe."""
    return {name: drift.per_completion for name, drift in drifts.items()}


def shortened(text: str) -> str:
    """Its beginning and its end, where it is too long for a terminal."""
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} ... {text[-SHOWN // 2 :]}"


@contextmanager
def on_the_base(model: Any) -> Iterator[None]:
    """Leave generators as they are; raise RazorError for whatever fails on the base."""
    try:
        with compute.generators_untouched(), compute.memory_errors(NO_MEMORY):
            yield
    except NotFiniteError as error:
        raise RazorError("The model's outputs are NaN or infinite before training: its weights are damaged.") from error
    except RazorError:
        raise
    except Exception as error:  # of a model's own code, on inputs that its trainer would not give it
        raise RazorError(
            f"ForgettingMonitor cannot measure this model, {name_of(model)}: {type(error).__name__}: "
            f"{' '.join(str(error).split())}. Train without the monitor, and report this."
        ) from error
