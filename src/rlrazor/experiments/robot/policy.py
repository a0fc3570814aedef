"""What the experiment asks of a policy, and how far apart two of them are at the same states: exact KL of actions.

An action is A tokens, each one of V bins, chosen one after another. Hence the KL of an action is exact by the chain
rule: the sum over its tokens of the KL over all bins, given the tokens before, averaged over actions of the first
policy. The KL of a whole episode is the sum over its steps, since the world answers both policies alike.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rlrazor import drift
from rlrazor.experiments.robot.rollout import Rolled, Tokens
from rlrazor.experiments.robot.world import Floats
from rlrazor.lm.kl import Drift
from rlrazor.lm.sampling import NotFiniteError

CHUNK = 512  # states at a time


@dataclass(frozen=True)
class Seen:
    """What a policy acts on: N instructions, and beside each the last states (N, H, S), or images."""

    instructions: Sequence[str]
    history: Tensor

    def __len__(self) -> int:
        return len(self.history)


class Policy(Protocol):
    """A torch module that chooses actions: A tokens, each one of `bins`."""

    @property
    def bins(self) -> int: ...  # noqa: D102
    @property
    def action_size(self) -> int: ...  # noqa: D102

    @property
    def module(self) -> nn.Module:
        """What has the parameters and the state_dict."""
        ...

    def normalise_by(self, history: Tensor) -> None:
        """Take the scale of states from those of the demonstrations, if it matters to the policy."""
        ...

    def tokens_of(self, actions_NA: Tensor) -> Tensor:
        """The bins (N, A) that actions (N, A) lie in."""
        ...

    def actions_of(self, tokens_NA: Tensor) -> Tensor:
        """The middles (N, A) of bins (N, A)."""
        ...

    def log_probs(self, seen: Seen, tokens_NA: Tensor) -> Tensor:
        """log p(bin a | seen, tokens before a), of every bin: (N, A, V) in nats, with gradient."""
        ...

    def remember(self) -> Any:
        """What `act` needs and does not depend on what is seen; it holds as long as the weights are the same."""
        ...

    def act(self, seen: Seen, noise_NA: Tensor | None, memory: Any) -> Tensor:
        """Tokens (N, A): by the inverse of the distribution function at uniform noise in [0, 1), or the likeliest."""
        ...

    def represent(self, seen: Seen) -> Tensor:
        """The last hidden layer (N, D) where the first token is chosen from."""
        ...


class Acting:
    """A policy in a roll-out, with the weights that it had when this was made."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        with torch.no_grad():
            self.memory = policy.remember()

    @torch.no_grad()
    def act(self, instructions: Sequence[str], history: Floats, noise: NDArray[np.float64] | None) -> Tokens:
        """See rollout.Actor."""
        seen = Seen(instructions, torch.from_numpy(history))
        tokens_NA = self.policy.act(seen, None if noise is None else torch.from_numpy(noise), self.memory)
        return np.asarray(tokens_NA.numpy())

    def actions_of(self, tokens: Tokens) -> Floats:
        """See rollout.Actor."""
        return np.asarray(self.policy.actions_of(torch.from_numpy(tokens)).numpy())


def choose(logits_NV: Tensor, noise_N: Tensor | None) -> Tensor:
    """The likeliest outcomes (N,), or the first whose share of the distribution function is above the noise (N,).

    Raises lm.sampling.NotFiniteError where a logit is no number.
    """
    if not logits_NV.isfinite().all():
        raise NotFiniteError("logits are not finite")
    if noise_N is None:
        return logits_NV.argmax(dim=-1)
    sums_NV = logits_NV.double().softmax(dim=-1).cumsum(dim=-1)
    return (sums_NV <= noise_N[:, None] * sums_NV[:, -1:]).sum(dim=-1).clamp(max=logits_NV.shape[-1] - 1)


def bins_of(actions_NA: Tensor, low_A: Tensor, high_A: Tensor, bins: int) -> Tensor:
    """The bins (N, A) that actions lie in, of so many between their bounds; beyond these, the outermost."""
    return ((actions_NA - low_A) / (high_A - low_A) * bins).long().clamp(0, bins - 1)


def middles_of(tokens_NA: Tensor, low_A: Tensor, high_A: Tensor, bins: int) -> Tensor:
    """The middles (N, A) of bins."""
    return low_A + (tokens_NA + 0.5) / bins * (high_A - low_A)


@dataclass(frozen=True)
class Steps:
    """All T steps of E episodes, one after another.

    `history` (T, H, S) and `tokens` (T, A) are states and actions, `episode_of` (T,) their episodes. `instructions` and
    `success` are those of the episodes.
    """

    instructions: Sequence[str]
    history: Tensor
    tokens: Tensor
    episode_of: Tensor
    success: Tensor

    @classmethod
    def of(cls, rolled: Sequence[Rolled]) -> Self:
        """Those of roll-outs."""
        lengths_E = torch.tensor([one.steps for one in rolled])
        return cls(
            [one.episode.instruction for one in rolled],
            torch.from_numpy(np.concatenate([one.history for one in rolled])),
            torch.from_numpy(np.concatenate([one.tokens for one in rolled])),
            torch.arange(len(rolled)).repeat_interleave(lengths_E),
            torch.tensor([one.success for one in rolled]),
        )

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def lengths(self) -> Tensor:
        """Steps of each episode (E,)."""
        return self.episode_of.bincount(minlength=len(self.instructions))

    def seen(self, rows: Tensor) -> Seen:
        """What the policy saw at these steps."""
        return Seen([self.instructions[one] for one in self.episode_of[rows].tolist()], self.history[rows])

    def chunks(self, size: int = CHUNK) -> Iterator[Tensor]:
        """The rows of all steps, so many at a time."""
        return iter(torch.arange(len(self)).split(size))


@torch.no_grad()
def log_probs_of(policy: Policy, steps: Steps) -> Tensor:
    """log p of every bin at each step, given the tokens before it of the action that was taken there: (T, A, V).

    Raises lm.sampling.NotFiniteError where one is no number.
    """
    logp_TAV = torch.cat([policy.log_probs(steps.seen(rows), steps.tokens[rows]) for rows in steps.chunks()])
    if not logp_TAV.isfinite().all():
        raise NotFiniteError("log-probabilities are not finite")
    return logp_TAV


def taken(logp_TAV: Tensor, tokens_TA: Tensor) -> Tensor:
    """log p(action | state) of the actions taken: (T,)."""
    return logp_TAV.gather(2, tokens_TA[..., None])[..., 0].sum(dim=1)


def kl_of_actions(logp_TAV: Tensor, other_logp_TAV: Tensor) -> Tensor:
    """KL(p || other) of each action in nats (T,): over all bins of each token, given p's own tokens before it."""
    return drift.forward_kl(logp_TAV.double(), other_logp_TAV.double()).sum(dim=1)


def kl(steps: Steps, logp_TAV: Tensor, other_logp_TAV: Tensor) -> Drift:
    """KL(p || other) at the steps of episodes that p has sampled: per action, and per episode the sum over its steps.

    As an `lm.kl.Drift`, whose positions are steps: `per_token` is the KL of an action, the ratio of the episodes' sums
    to their lengths, and `per_completion` that of an episode; standard errors are over episodes.
    """
    lengths = steps.lengths.numpy()
    return Drift(kl_of_actions(logp_TAV, other_logp_TAV).numpy(), lengths, np.arange(len(lengths)))
