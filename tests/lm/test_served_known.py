"""What is known of two distributions by their likeliest tokens: the bound against brute force, the estimate's mean."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import minimize

from rlrazor.lm.served.known import NO_TOKEN, Known, at_least, estimate

Floats = NDArray[np.float64]


def drawn(rng: np.random.Generator, count: int, vocabulary: int, apart: float) -> tuple[Floats, Floats]:
    """Softmaxes, peaked as a language model's are, and others that are so far from them."""
    logits = 3 * rng.standard_normal((count, vocabulary))
    other = logits + apart * rng.standard_normal((count, vocabulary))
    return softmax(logits), softmax(other)


def softmax(logits: Floats) -> Floats:
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(odds / odds.sum(axis=1, keepdims=True))


def top(probabilities: Floats, k: int, tokens: NDArray[np.int64]) -> Known:
    """What a server tells of these distributions."""
    ids = np.argsort(-probabilities, axis=1)[:, :k]
    logps = np.log(np.take_along_axis(probabilities, ids, axis=1))
    follows = np.log(np.take_along_axis(probabilities, tokens[:, None], axis=1))[:, 0]
    return Known(ids, logps, follows, logps[:, -1])


def true_kl(p: Floats, q: Floats) -> Floats:
    return np.asarray((p * np.log(p / q)).sum(axis=1))


@pytest.mark.parametrize("apart", [0.02, 0.5, 3.0])
@pytest.mark.parametrize(("k_p", "k_q"), [(1, 1), (5, 5), (20, 20), (60, 20), (20, 60), (60, 60)])
def test_the_bound_holds_and_is_kl_where_all_is_known(apart: float, k_p: int, k_q: int) -> None:
    rng = np.random.default_rng(k_p + 100 * k_q)
    p, q = drawn(rng, 300, 60, apart)
    tokens = rng.integers(0, 60, 300)
    bound, kl = at_least(top(p, k_p, tokens), top(q, k_q, tokens), tokens), true_kl(p, q)
    assert (bound >= 0).all()
    assert (bound <= kl + 1e-9).all()
    if k_p == k_q == 60:
        assert bound == pytest.approx(kl, abs=1e-3)


def test_more_tokens_make_the_bound_tighter() -> None:
    rng = np.random.default_rng(0)
    p, q = drawn(rng, 100, 200, 1.0)
    tokens = rng.integers(0, 200, 100)
    means = [at_least(top(p, k, tokens), top(q, k, tokens), tokens).mean() for k in (1, 5, 20, 80, 200)]
    assert means == sorted(means)
    assert means[2] > 0.85 * true_kl(p, q).mean()
    assert means[-1] == pytest.approx(true_kl(p, q).mean(), rel=1e-3)


def test_the_bound_is_the_least_kl_there_is() -> None:
    """Against a general minimiser over all distributions that are consistent with what is known."""
    rng = np.random.default_rng(1)
    p, q = drawn(rng, 8, 12, 1.5)
    tokens = p.argmax(axis=1)  # among those that are known in any case
    known_p, known_q = top(p, 3, tokens), top(q, 3, tokens)
    bound = at_least(known_p, known_q, tokens)
    for row in range(len(p)):
        seen = [{*known.ids[row].tolist(), int(tokens[row])} for known in (known_p, known_q)]
        least = by_search(p[row], q[row], seen, [np.exp(known.caps[row]) for known in (known_p, known_q)])
        assert bound[row] == pytest.approx(least, abs=2e-3)


def by_search(p: Floats, q: Floats, seen: list[set[int]], caps: list[float]) -> float:
    free_p, free_q = ([v for v in range(len(p)) if v not in ids] for ids in seen)
    count = len(free_p)

    def kl(x: Floats) -> float:
        mine, yours = p.copy(), q.copy()
        mine[free_p], yours[free_q] = x[:count], x[count:]
        return float((mine * np.log(np.maximum(mine, 1e-15) / np.maximum(yours, 1e-15))).sum())

    def masses(x: Floats) -> Floats:
        return np.array([x[:count].sum() - p[free_p].sum(), x[count:].sum() - q[free_q].sum()])

    found = minimize(
        kl,
        np.concatenate([p[free_p], q[free_q]]),
        method="SLSQP",
        bounds=[(1e-12, caps[0])] * count + [(1e-12, caps[1])] * len(free_q),
        constraints={"type": "eq", "fun": masses},
        options={"maxiter": 1000, "ftol": 1e-12},
    )
    assert found.success
    return max(float(found.fun), 0.0)


def test_the_mean_of_the_estimate_over_what_is_drawn_is_kl() -> None:
    """By enumeration of every token that may follow, so that there is no sampling noise."""
    rng = np.random.default_rng(2)
    p, q = drawn(rng, 40, 30, 1.0)
    for k_p, k_q in ((1, 1), (4, 6), (30, 5), (5, 30)):
        mean = np.zeros(40)
        for token in range(30):
            tokens = np.full(40, token)
            mean += p[:, token] * estimate(top(p, k_p, tokens), top(q, k_q, tokens), tokens)
        assert mean == pytest.approx(true_kl(p, q), abs=1e-12)


def test_what_both_know_is_no_noise() -> None:
    """The spread over what is drawn is far below that of the log-ratio alone, which is the usual estimator."""
    rng = np.random.default_rng(3)
    p, q = drawn(rng, 200, 300, 0.5)
    tokens = np.array([rng.choice(300, p=row) for row in p])
    ours = estimate(top(p, 20, tokens), top(q, 20, tokens), tokens) - true_kl(p, q)
    usual = np.log(p / q)[np.arange(200), tokens] - true_kl(p, q)
    assert ours.std() < usual.std() / 2


def test_a_token_that_cannot_come_is_infinitely_far() -> None:
    known = Known(np.array([[0, 1]]), np.log([[0.5, 0.5]]), np.log([0.5]), np.log([0.5]))
    other = Known(np.array([[0, NO_TOKEN]]), np.array([[0.0, -np.inf]]), np.array([-np.inf]), np.array([-np.inf]))
    assert estimate(known, other, np.array([1])) == np.inf
    assert at_least(known, other, np.array([0])) == np.inf


def test_joined_parts_may_know_more_or_less() -> None:
    rng = np.random.default_rng(4)
    p, q = drawn(rng, 6, 10, 1.0)
    tokens = np.zeros(6, np.int64)
    parts = [top(p[:2], 2, tokens[:2]), top(p[2:], 5, tokens[2:])]
    apart = np.concatenate(
        [
            estimate(part, top(q[some], 10, tokens[some]), tokens[some])
            for part, some in zip(parts, (slice(2), slice(2, 6)), strict=True)
        ]
    )
    assert estimate(Known.joined(parts), top(q, 10, tokens), tokens) == pytest.approx(apart)
