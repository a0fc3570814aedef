"""KL where of each distribution only the K likeliest tokens are known: a lower bound, and an estimate without bias.

Write p for the base and q for the tuned model at one position. A server tells p and q on its K likeliest tokens, and of
the token that follows, y. Of every other token it is known that it is no likelier than the least of those K (the cap),
and that all of them together have what is left of 1 (the rest).

**No finite upper bound.** Nothing that a server tells keeps q(v) above 0 for a token v outside the tuned model's K. If
p may be above 0 there, as it is for every softmax, q(v) -> 0 is consistent with all that is known, and KL grows without
bound. So none is given.

**At least** (`at_least`). Let A be the tokens known of both, B those known of p alone, C of q alone, D the others; r_p
and r_q the rests, c_p and c_q the caps. The least KL of all (p, q) that are consistent with what is known is a convex
problem. For any m <= l, both above 0,

    KL(p || q) >= sum_A p log(p/q)  +  sum_B h(p) - l r_q  +  sum_C k(q) + (1 + log m) r_p

    h(p) = min over 0 < x <= c_q of  p log(p/x) + l x,              which is at x = min(p/l, c_q)
    k(q) = min over 0 <= x <= c_p of x log(x/q) - (1 + log m) x,    which is at x = min(m q, c_p)

Proof. KL is the sum of the terms of A, B, C and D. Add l (sum_{B,D} q - r_q), which is at most 0, and (1 + log m) (r_p
- sum_{C,D} p), which is 0. The terms of B are then at least h, those of C at least k, and those of D, p log(p/q) + l q
- (1 + log m) p, are least at q = p/l, where they are p (log l - log m) >= 0. What is left is the right-hand side. It
holds for every l and m, so that rounding in how they are chosen makes the bound looser and never wrong. The best are
found by bisection: as the problem is convex, with them the bound is the least KL itself, where D has room, as it has in
a real vocabulary. Without the caps it would be l = m = (sum_B p + r_p) / (sum_C q + r_q), and the bound the KL with all
that is not in A merged into one: data processing.

**Estimate** (`estimate`). Where y is drawn from p,

    sum_A p log(p/q)  +  [y not in A] log(p(y)/q(y))

has the mean KL(p || q), as A does not depend on y. What both know enters exactly, and what was drawn stands for the
rest alone, so that its noise is that of few tokens. Summed over the positions of a completion drawn from the base, its
mean is the KL between whole completions. Single values may be below 0.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
NO_TOKEN = -1
SLACK = 1e-5  # of a probability mass: servers sum up a vocabulary in float32
STEPS, REACH = 44, 32.0  # bisections of log l and log m within that many nats of 0
ROWS = 512  # positions at a time


@dataclass(frozen=True, eq=False)
class Known:
    """What is known of a model's next-token distribution at T positions, in nats.

    `ids` (T, K) are tokens and `logps` (T, K) their log-probabilities; where there is no token, NO_TOKEN and -inf.
    Which tokens these are must not depend on the token that follows, whose own log-probability is `drawn` (T,). `caps`
    (T,): the log-probability that no other token is above.
    """

    ids: Ints
    logps: Floats
    drawn: Floats
    caps: Floats

    @classmethod
    def joined(cls, parts: "list[Known]") -> "Known":
        """One after the other, of K the largest."""
        width = max(part.ids.shape[1] for part in parts)
        wide = [((0, 0), (0, width - part.ids.shape[1])) for part in parts]
        return cls(
            np.concatenate(
                [np.pad(one.ids, to, constant_values=NO_TOKEN) for one, to in zip(parts, wide, strict=True)]
            ),
            np.concatenate(
                [np.pad(one.logps, to, constant_values=-np.inf) for one, to in zip(parts, wide, strict=True)]
            ),
            np.concatenate([part.drawn for part in parts]),
            np.concatenate([part.caps for part in parts]),
        )

    @property
    def rests(self) -> Floats:
        """The probability of all other tokens together (T,)."""
        rests: Floats = np.maximum(1 - np.exp(self.logps).sum(axis=1), 0.0)
        return rests

    def rows(self, some: slice) -> "Known":
        """Of some of the positions."""
        return Known(self.ids[some], self.logps[some], self.drawn[some], self.caps[some])

    def with_drawn(self, tokens: Ints) -> "Known":
        """The token that follows among the others: for a bound, which holds whatever it was."""
        new = (self.ids != tokens[:, None]).all(axis=1)
        ids = np.where(new, tokens, NO_TOKEN)
        logps = np.where(new, self.drawn, -np.inf)
        joined = np.column_stack([self.ids, ids]), np.column_stack([self.logps, logps])
        return Known(*joined, self.drawn, self.caps)


def estimate(p: Known, q: Known, tokens: Ints) -> Floats:
    """KL(p || q) at each position (T,), without bias where `tokens` (T,), which follow, were drawn from p.

    Infinite where q is 0 and p is not.
    """
    found = np.empty(len(tokens))
    for start in range(0, len(tokens), ROWS):
        rows = slice(start, start + ROWS)
        here, there, drawn = p.rows(rows), q.rows(rows), tokens[rows]
        both, q_logps = _matched(here, there)
        in_both = (both & (here.ids == drawn[:, None])).any(axis=1)
        with np.errstate(invalid="ignore"):
            sampled = np.where(in_both, 0.0, here.drawn - there.drawn)
        found[rows] = _terms(here.logps, q_logps, both).sum(axis=1) + sampled
    return found


def at_least(p: Known, q: Known, tokens: Ints) -> Floats:
    """What KL(p || q) is at least at each position (T,), whatever the distributions are where they are not known.

    It holds to within SLACK of the probabilities; see the module.
    """
    found = np.empty(len(tokens))
    for start in range(0, len(tokens), ROWS):
        rows = slice(start, start + ROWS)
        found[rows] = _least(p.rows(rows).with_drawn(tokens[rows]), q.rows(rows).with_drawn(tokens[rows]))
    return np.maximum(found, 0.0)


def _matched(p: Known, q: Known) -> tuple[NDArray[np.bool_], Floats]:
    """Which of the tokens of p are also q's (T, K), and q's log-probabilities of those."""
    same = (p.ids[:, :, None] == q.ids[:, None, :]) & (p.ids != NO_TOKEN)[:, :, None]
    both = same.any(axis=2)
    return both, np.where(both, np.take_along_axis(q.logps, same.argmax(axis=2), axis=1), -np.inf)


def _terms(p_logps: Floats, q_logps: Floats, where: NDArray[np.bool_]) -> Floats:
    """p log(p/q) there, and 0 elsewhere and where p is 0."""
    where = where & (p_logps > -np.inf)
    apart = np.where(where, p_logps, 0.0) - np.where(where, q_logps, 0.0)
    terms: Floats = np.where(where, np.exp(p_logps) * apart, 0.0)
    return terms


def _least(p: Known, q: Known) -> Floats:
    both, q_of_p = _matched(p, q)
    also, _ = _matched(q, p)
    b = np.where(both, 0.0, np.exp(p.logps))  # of those known of p alone, and 0 for all others
    c = np.where(also, 0.0, np.exp(q.logps))
    c_p, c_q = (np.exp(np.minimum(one.caps, 0.0))[:, None] * (1 + SLACK) for one in (p, q))
    r_p, r_q = p.rests, q.rests + SLACK

    def q_taken(log_l: Floats) -> Floats:
        """What B takes of the rest of q; falls with l."""
        return np.asarray(np.minimum(b / np.exp(log_l)[:, None], c_q).sum(axis=1, where=b > 0))

    def p_taken(log_m: Floats) -> Floats:
        """What C takes of the rest of p; grows with m."""
        return np.asarray(np.minimum(c * np.exp(log_m)[:, None], c_p).sum(axis=1, where=c > 0))

    low, high = np.full(len(b), -REACH), np.full(len(b), REACH)
    log_l = _bisected(lambda log: q_taken(log) - r_q, low, high)
    log_m = _bisected(lambda log: r_p - p_taken(log), low, high)
    # Where there is something left for D on both sides its p/q is l and m at once.
    shared = _bisected(
        lambda log: r_p - p_taken(log) - np.exp(log) * (r_q - q_taken(log)), log_l, np.maximum(log_l, log_m)
    )
    apart = log_m <= log_l
    log_l, log_m = np.where(apart, log_l, shared), np.where(apart, log_m, shared)
    x_b = np.minimum(b / np.exp(log_l)[:, None], c_q)
    x_c = np.minimum(c * np.exp(log_m)[:, None], c_p)
    with np.errstate(divide="ignore", invalid="ignore"):
        h = np.where(b > 0, b * np.log(b / x_b) + np.exp(log_l)[:, None] * x_b, 0.0)
        k = np.where(c > 0, x_c * (np.log(x_c / c) - 1 - log_m[:, None]), 0.0)
    known = _terms(p.logps, q_of_p, both).sum(axis=1)
    least: Floats = (
        known + h.sum(axis=1) - np.exp(log_l) * r_q + k.sum(axis=1) + (1 + log_m) * r_p - np.abs(1 + log_m) * SLACK
    )
    return least


def _bisected(falling: Callable[[Floats], Floats], low: Floats, high: Floats) -> Floats:
    """Where a function that falls from `low` to `high` crosses 0, or the end that it does not reach it by."""
    for _ in range(STEPS):
        middle = (low + high) / 2
        above = falling(middle) > 0
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return low
