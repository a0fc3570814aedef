"""The base's side of every comparison: both probes, computed once, and the measurement of a policy against them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlrazor.forecast import FORWARD, PROBE
from rlrazor.guard.law_file import FEW_PROMPTS
from rlrazor.lm import kl, probes
from rlrazor.lm.kl import Drift, Estimate, Sequences
from rlrazor.lm.probes import GenericText, ProbeSettings, Prompt


@dataclass(frozen=True, eq=False)
class BaseSide:
    """The base's hidden states on the new task's prompts and on the generic probe; by the names of their KLs."""

    probes: Mapping[str, kl.Probe]

    @classmethod
    def of(
        cls,
        base: Any,
        tokenizer: Any,
        prompts: Sequence[Prompt],
        generic: GenericText,
        settings: ProbeSettings,
        *,
        cache_dir: Path | None = None,
        share: tuple[int, int] = (0, 1),
    ) -> BaseSide:
        """Complete the prompts and run the base, a PEFT model's under its adapter. `share`: of (rank, processes).

        Raises RazorError where nothing is left to measure on.
        """
        sequences = {
            FORWARD: probes.of_prompts(base, tokenizer, prompts, settings, cache_dir=cache_dir),
            PROBE: probes.of_generic(base, tokenizer, generic, settings, cache_dir=cache_dir),
        }
        first = kl.Probe(base, _part(sequences[FORWARD], *share))
        return cls({FORWARD: first, PROBE: kl.Probe(base, _part(sequences[PROBE], *share), beside=first)})

    @property
    def tokens(self) -> int:
        """What a measurement has the policy read."""
        return sum(_tokens(probe.sequences) for probe in self.probes.values())

    def thinned(self, share: float, at_least: int = FEW_PROMPTS) -> BaseSide:
        """The same on a `share` of each probe's prompts, but on `at_least` as far as there are."""
        thin = {}
        for name, probe in self.probes.items():
            count = max(math.ceil(share * len(probe.sequences.prompts)), at_least)
            thin[name] = probe.spread(count)
        return BaseSide(thin)

    def measure(self, policy: Any, only: Sequence[str] | None = None) -> dict[str, Drift]:
        """KL(base || policy) on each probe, or on those of `only`. Raises as `kl.forward_kl` does."""
        return {
            name: kl.forward_kl(probe, policy) for name, probe in self.probes.items() if only is None or name in only
        }


def _part(sequences: Sequences, rank: int, processes: int) -> Sequences:
    """Every so many-th prompt with its completions; with fewer prompts than processes, some are measured twice."""
    if processes == 1:
        return sequences
    mine = [index for index in range(len(sequences.prompts)) if index % processes == rank]
    mine = mine or [rank % len(sequences.prompts)]
    return sequences.of_prompts(mine)


def _tokens(sequences: Sequences) -> int:
    return sum(
        len(sequences.prompts[prompt]) + len(completion)
        for prompt, completion in zip(sequences.prompt_of, sequences.completions, strict=True)
    )


def kls_of(drifts: Mapping[str, Drift]) -> dict[str, Estimate]:
    """Nats per completion, or per text, on each probe."""
    return {name: drift.per_completion for name, drift in drifts.items()}
