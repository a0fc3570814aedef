"""What a comparison of two checkpoints found: distances, prompts, weights, scores, and how they were measured."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rlrazor.analysis.forecast import Forecast
from rlrazor.extras import versions_of
from rlrazor.guard import scale
from rlrazor.guard.law_file import LawFile
from rlrazor.guard.measured_on import MeasuredOn
from rlrazor.guard.recovery import Recovery
from rlrazor.guard.scale import FIRST, Depth, Focus, Noise
from rlrazor.guard.truth import Truth
from rlrazor.guard.weight_changes import WeightChange
from rlrazor.lm.encoding import as_read
from rlrazor.lm.kl import Sequences
from rlrazor.lm.means import MeanKL

if TYPE_CHECKING:
    from rlrazor.lm.prior import PriorTasks

REVERSE = "kl_reverse"


@dataclass(frozen=True)
class Pair:
    """What to compare. `tuned` is a model, or the folder of an adapter for `base`. `as_given`: trust the order.

    `dtype`: what both are loaded, and measured, in. `noise_floor`: measure how far the base's prior scores are from
    themselves, unless the cache knows it. `first_tokens`: how many of a completion are its beginning. `recovery`: train
    copies of both on other prior items, to see what comes back.
    """

    base: str
    tuned: str
    dtype: str = "float32"
    as_given: bool = False
    cache_dir: Path | None = None
    noise_floor: bool = False
    first_tokens: int = FIRST
    recovery: Recovery | None = None


@dataclass(frozen=True)
class Completion:
    """A completion with the KL at each token, in nats: of the base (forward KL) or of the tuned model (reverse).

    `given`: an earlier turn of the assistant's, which the prompt already has, and neither model said.
    """

    tokens: tuple[str, ...]
    kl: tuple[float, ...]
    given: bool = False

    @property
    def total(self) -> float:
        """Nats."""
        return sum(self.kl)


@dataclass(frozen=True)
class PromptDrift:
    """Where the policy moved on one prompt; `total` is the mean forward KL of the base's completions, in nats.

    `prompt` is all of it, in the chat template where it was put into one; `said` what the user said last in it.
    """

    prompt: str
    total: float
    base: tuple[Completion, ...]
    tuned: tuple[Completion, ...]
    said: str = ""

    def share_of_first(self, tokens: int) -> float:
        """The share of `total` in the first so many tokens of the base's completions."""
        first = sum(sum(completion.kl[:tokens]) for completion in self.base)
        return first / max(sum(completion.total for completion in self.base), 1e-30)


@dataclass(frozen=True)
class Distances:
    """KLs in nats, per completion or text (`kl`) and per token, beside the noise of measuring them.

    `focus`: where the forward KL on the new task's prompts lies. `cknna`: of the last hidden layer on the generic
    probe; None where that has too few texts. `depth`: of each KL, over the first tokens and over the rest.
    """

    kl: Mapping[str, MeanKL]
    per_token: Mapping[str, MeanKL]
    noise: Noise
    focus: Focus
    cknna: float | None
    depth: Mapping[str, Depth]


@dataclass(frozen=True)
class Weights:
    """What changed in all weights and in each layer's; `untold`: some weights of the two could not be compared."""

    whole: WeightChange
    layers: Sequence[WeightChange]
    untold: bool = False

    @property
    def l2(self) -> float:
        """Of the change of all weights."""
        return self.whole.l2

    @property
    def unchanged(self) -> float:
        """The share of all weights that is as it was."""
        return self.whole.unchanged


@dataclass(frozen=True)
class LawSays:
    """What a law forecasts."""

    forecast: Forecast
    law: LawFile


@dataclass(frozen=True)
class MeasuringSetup:
    """How it was measured: KLs can be compared where the probe's settings and hashes are the same.

    `measured`: how many of the prompts, as they fitted into the context; `first_prompt`: of those, as the models read
    it, special tokens included. `suite`: the prior tasks that are scored, if any. `sources`: the files that prompts
    and probe came from, and the command, as far as the caller said them.
    """

    on: MeasuredOn
    measured: int
    first_prompt: str
    level: float
    suite: PriorTasks | None
    date: str
    versions: Mapping[str, str]
    sources: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def now(
        cls,
        on: MeasuredOn,
        forward: Sequences,
        tokenizer: Any,
        level: float,
        suite: PriorTasks | None = None,
        more: Collection[str] = (),
    ) -> Self:
        """Of today, of completions of the new task's prompts, with the packages that are always used and `more`."""
        return cls(
            on=on,
            measured=len(set(forward.prompt_of)),
            first_prompt=as_read(tokenizer, forward.prompts[0]),
            level=level,
            suite=suite,
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            versions=versions_of(sorted({"rlrazor", "torch", "transformers", *more})),
        )

    def as_json(self) -> dict[str, Any]:
        """All of it but the first prompt."""
        return {
            "probe": self.on.settings.as_json(),
            "prompts": len(self.on.prompts),
            "measured": self.measured,
            "prompts_hash": self.on.prompts_hash,
            "generic_rows": self.on.generic.count,
            "generic_own": self.on.generic.own and asdict(self.on.generic.own),
            "generic_prior": self.on.generic.prior and asdict(self.on.generic.prior),
            "generic_hash": self.on.generic.content_hash,
            "level": self.level,
            "prior_limit": None if self.suite is None else self.suite.limit,
            "prior_asked": {} if self.suite is None else self.suite.asking.as_json(),
            "date": self.date,
            "versions": dict(self.versions),
            "sources": dict(self.sources),
        }


@dataclass(frozen=True)
class Comparison:
    """What was found. `prompts`: the worst first; `law_says`: None without a law; `notes`: sentences of caution."""

    pair: Pair
    distances: Distances
    prompts: Sequence[PromptDrift]
    weights: Weights
    law_says: LawSays | None
    truth: Truth | None
    setup: MeasuringSetup
    notes: Sequence[str] = ()

    @property
    def kl(self) -> Mapping[str, MeanKL]:
        """The KLs per completion or text, in nats."""
        return self.distances.kl

    @property
    def per_token(self) -> Mapping[str, MeanKL]:
        """The KLs per token, in nats."""
        return self.distances.per_token

    @property
    def forecast(self) -> Forecast | None:
        """What the law forecasts; None without one."""
        return None if self.law_says is None else self.law_says.forecast

    @property
    def drop(self) -> float | None:
        """The measured drop, or else the forecast one."""
        if self.truth is not None and self.truth.drop is not None:
            return self.truth.drop
        return None if self.forecast is None else self.forecast.drop

    @property
    def same(self) -> bool:
        """Whether the two are one model: no weight has changed, and no KL is more than the noise of measuring it."""
        noise = self.distances.noise
        moved = any(not scale.is_zero(one, noise) for one in self.per_token.values())
        return not (moved or self.weights.l2 or self.weights.untold)
