"""Why on-policy RL should stay near its base: RL's Razor's projection argument (its Fig. 5), and where it ends.

The argument (arXiv:2509.04259, appendix A). Keeping only the correct samples of pi is the I-projection of pi onto the
correct policies; fitting the policy class to them is an M-projection back; alternating the two ends at the correct
policy nearest to the base, argmin KL(pi || pi0). What is so on finite sets, where all can be computed:

1. The first I-projection of the base, q* proportional to pi0 R, *is* that argmin over all correct policies. Where an
   exponential family contains q* in its closure, one exact M-step returns it, and every later round leaves it alone
   (`ExponentialFamily.realises`).
2. Where the closure holds correct policies but not q*, the alternation is EM: its accuracy never falls, but of the
   faces of correct outcomes it may end on another than the nearest, and on that face at another policy than the
   nearest, unless the statistics do not tell the face's outcomes apart.
3. Every correct policy is a fixed point, so nothing pulls back. An M-step's error along the correct outcomes stays for
   good: the limit is off by the *sum* of the errors. Summable errors end somewhere, at a distance that their sum
   bounds, and not at the same limit unless they sum to zero; non-summable ones can carry the policy to a corner.
   Errors in accuracy alone do no harm as long as they vanish. Projecting the base instead of the current policy
   (`anchored`), as KL-DPG does (arXiv:2012.11635), forgets each error at the next step.
4. A policy-gradient step is *a step* of the M-projection, in its direction, not the projection. Between two correct
   outcomes of a softmax the flow of E[R] has d/dt log(pi_a/pi_b) = (pi_a - pi_b)(1 - E[R]): see
   `policy_gradient_at`, which has the whole path in closed form. It never stops, and it ends on the likeliest correct
   outcome alone.

A policy is an array whose last axis holds the probabilities of Y outcomes and sums to 1; axes before it are prompts.
`correct` is a boolean mask over the outcomes that broadcasts against the policy. KL is in nats. numpy and scipy only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special
from scipy.integrate import solve_ivp  # type: ignore[attr-defined]  # scipy exports it dynamically
from scipy.optimize import linprog  # type: ignore[attr-defined]

from rlrazor.errors import RazorError

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]
Advantage = Literal["reinforce", "dr-grpo", "grpo", "kl-dpg"]
Normalisation = Literal["none", "std"]

_STD_EPSILON = 1e-6  # as in objectives.grpo
_NEWTON_STEPS = 200
_GIVEN_UP = 1e-13  # moments do not tell a probability this small from 0, to double precision
_LONGEST = 1e7  # units of flow time; from (.2, .1 | .7) policy gradient takes 0.5 / (1 - accuracy)


# Distributions


def kl(p: ArrayLike, q: ArrayLike) -> Floats:
    """KL(p || q) in nats over the last axis; an outcome with p = 0 adds nothing, one with p > 0 = q makes it inf."""
    return np.asarray(special.rel_entr(np.asarray(p, float), np.asarray(q, float)).sum(axis=-1))


def total_variation(p: ArrayLike, q: ArrayLike) -> Floats:
    """Half the L1 distance over the last axis: a fraction of 1."""
    return np.asarray(np.abs(np.asarray(p, float) - np.asarray(q, float)).sum(axis=-1) / 2)


def accuracy(policy: ArrayLike, correct: ArrayLike) -> Floats:
    """E[R]: the probability of a correct outcome, over the last axis."""
    return np.asarray((np.asarray(policy, float) * np.asarray(correct, bool)).sum(axis=-1))


def i_projection(policy: ArrayLike, correct: ArrayLike) -> Floats:
    """argmin of KL(q || policy) over the q with E_q[R] = 1: the policy restricted to the correct outcomes.

    This is what is left of the policy's samples when the wrong ones are thrown away; of the base it is q*, the
    KL-minimal correct policy. Raises RazorError where the policy never is correct.
    """
    kept = np.asarray(policy, float) * np.asarray(correct, bool)
    total = kept.sum(axis=-1, keepdims=True)
    if not (total > 0).all():
        raise RazorError("A policy that is never correct has no projection onto the correct ones: give another base.")
    return np.asarray(kept / total)


def excess_kl(policy: ArrayLike, base: ArrayLike, correct: ArrayLike) -> Floats:
    """KL(policy || base) minus the least KL(. || base) of any policy *as accurate as this one*, in nats.

    The chain rule splits KL(pi || pi0) into that of the split correct/wrong, which accuracy alone decides, and
    pi(correct) KL(pi(.|correct) || pi0(.|correct)) plus the same for wrong; the excess is the last two, never negative.
    A policy of accuracy 1 - e is so compared with policies of accuracy 1 - e; comparing it with q* would reward it for
    the errors it still makes. At accuracy 1 the minimum is -log pi0(correct).
    """
    correct = np.asarray(correct, bool)
    return _within(policy, base, correct) + _within(policy, base, ~correct)


def excess_forward_kl(policy: ArrayLike, base: ArrayLike, correct: ArrayLike) -> Floats:
    """The same for KL(base || policy), on which forgetting depends: inf for a policy that gives up an outcome."""
    return excess_kl(base, policy, correct)


def kl_within_correct(policy: ArrayLike, base: ArrayLike, correct: ArrayLike) -> Floats:
    """The part of KL(policy || base) among correct outcomes: pi(correct) KL(pi(.|correct) || pi0(.|correct)), nats."""
    return _within(policy, base, np.asarray(correct, bool))


def _within(p: ArrayLike, q: ArrayLike, mask: Mask) -> Floats:
    """p(mask) KL(p(.|mask) || q(.|mask))."""
    p, q = np.asarray(p, float) * mask, np.asarray(q, float) * mask
    # Each conditioned before they are compared: a difference of two KLs would lose 1e-12 to rounding.
    mass, other = p.sum(axis=-1), q.sum(axis=-1)
    inside = kl(p / np.where(mass > 0, mass, 1)[..., None], q / np.where(other > 0, other, 1)[..., None])
    return np.asarray(np.where(mass > 0, mass * np.maximum(inside, 0), 0.0))


def closest_correct_policy(base: ArrayLike, allowed: ArrayLike) -> Floats:
    """argmin of KL(pi || base) over the policies on the `allowed` outcomes, by a general convex solver.

    It solves what `i_projection` knows in closed form, knowing nothing of it: SLSQP over the probabilities with the
    simplex as constraints. base is of shape (Y,). Good to about 1e-8 in each probability. Raises RazorError when no
    outcome of positive base probability is allowed or the solver fails.
    """
    base, allowed = np.asarray(base, float), np.asarray(allowed, bool)
    free = allowed & (base > 0)
    if not free.any():
        raise RazorError("No correct outcome has a positive base probability: give another base.")
    log_base = np.log(base[free])
    found = optimize.minimize(
        lambda p: special.xlogy(p, p).sum() - p @ log_base,
        np.full(free.sum(), 1 / free.sum()),
        jac=lambda p: np.log(np.maximum(p, 1e-300)) + 1 - log_base,
        bounds=[(0, 1)] * int(free.sum()),
        constraints={"type": "eq", "fun": lambda p: p.sum() - 1, "jac": np.ones_like},
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 1000},
    )
    # SLSQP may end with "positive directional derivative" where ftol is below what rounding lets it see.
    if not found.success and abs(found.x.sum() - 1) > 1e-9:
        raise RazorError(f"The convex solver found no nearest correct policy ({found.message}).")
    policy = np.zeros_like(base)
    policy[free] = found.x
    return policy


# Exponential families


@dataclass(frozen=True, eq=False)
class ExponentialFamily:
    """The policies pi_theta(y) proportional to base(y) exp(theta . statistics(y)), and their limits.

    base is of shape (Y,) and positive, statistics of shape (Y, D). As theta goes to infinity the policy retreats to a
    face of the polytope spanned by the statistics: the outcomes where a linear function of them is largest. The closure
    is the union of the families on the faces. Raises RazorError for a base that is not a positive distribution.
    """

    base: Floats
    statistics: Floats

    def __post_init__(self) -> None:
        if self.base.ndim != 1 or not (self.base > 0).all() or abs(self.base.sum() - 1) > 1e-9:
            raise RazorError("The base of a family has to be a distribution with a positive probability everywhere.")
        if self.statistics.ndim != 2 or len(self.statistics) != len(self.base):
            raise RazorError(
                f"The statistics have to be a row per outcome, ({len(self.base)}, D), not {self.statistics.shape}."
            )

    @cached_property
    def _faces(self) -> dict[bytes, Mask]:
        return {}

    @cached_property
    def _coordinates(self) -> dict[bytes, Floats]:
        return {}

    def policy(self, theta: ArrayLike) -> Floats:
        """The policy of natural parameters theta, shape (D,)."""
        return self.tilt(self.base, theta)

    def tilt(self, policy: ArrayLike, theta: ArrayLike) -> Floats:
        """Move a policy by theta in natural parameters; one on a face stays on it."""
        return _softmax(_log(policy) + self.statistics @ np.asarray(theta, float))

    def face(self, support: ArrayLike) -> Mask:
        """The outcomes of the smallest face that holds `support`: (Y,) bool to (Y,) bool, by a linear program.

        An outcome is outside when some v . statistics is largest on all of the support and smaller there.
        """
        support = np.asarray(support, bool)
        if support.all():
            return support
        if (known := self._faces.get(support.tobytes())) is not None:
            return known
        others = np.flatnonzero(~support)
        dimensions = self.statistics.shape[1]
        lifted = np.column_stack([self.statistics, -np.ones(len(self.base))])  # v . statistics - c, c the largest value
        slack = np.eye(len(others))
        found = linprog(
            np.concatenate([np.zeros(dimensions + 1), -np.ones(len(others))]),
            A_ub=np.column_stack([lifted[others], slack]),
            b_ub=np.zeros(len(others)),
            A_eq=np.column_stack([lifted[support], np.zeros((support.sum(), len(others)))]),
            b_eq=np.zeros(support.sum()),
            bounds=[(None, None)] * (dimensions + 1) + [(0, 1)] * len(others),
        )
        if not found.success:
            raise RazorError(f"The faces of the statistics cannot be computed ({found.message}): rescale them.")
        inside = support.copy()
        inside[others] = found.x[dimensions + 1 :] < 0.5  # v scales freely, so a slack is 0 or 1
        self._faces[support.tobytes()] = inside
        return inside

    def realises(self, correct: ArrayLike) -> bool:
        """Whether the closure holds q*: whether the correct outcomes are a face (R in the statistics' span does it)."""
        correct = np.asarray(correct, bool)
        return bool((self.face(correct) == correct).all())

    def correct_faces(self, correct: ArrayLike) -> list[Mask]:
        """The largest faces of correct outcomes only: where the closure is always correct. Time 2^correct."""
        outcomes = np.flatnonzero(np.asarray(correct, bool))
        found: list[Mask] = []
        for size in range(len(outcomes), 0, -1):
            for chosen in combinations(outcomes, size):
                support = np.zeros(len(self.base), bool)
                support[list(chosen)] = True
                inside_another = any((support <= larger).all() for larger in found)
                if not inside_another and (self.face(support) == support).all():
                    found.append(support)
        return found

    def m_projection(self, target: ArrayLike, start: ArrayLike | None = None) -> Floats:
        """argmin of KL(target || pi) over the closure: the policy with the target's mean statistics.

        Newton's method in the natural parameters of the smallest face that holds the target's outcomes, so that the
        limit is exact where theta would go to infinity. Moments agree to 1e-12 of the statistics' spread. `start`, a
        policy of the family, saves steps. Raises RazorError when Newton's method fails.
        """
        target = np.asarray(target, float)
        face = self.face(target > _GIVEN_UP)
        coordinates = self._coordinates_of(face)
        log_base, wanted = np.log(self.base[face]), target[face] / target[face].sum()
        theta = np.zeros(coordinates.shape[1])
        if start is not None and (np.asarray(start)[face] > 0).all():
            theta = coordinates.T @ (np.log(np.asarray(start)[face]) - log_base) / len(coordinates)
        policy = np.zeros_like(target)
        for _ in range(_NEWTON_STEPS):
            current = _softmax(log_base + coordinates @ theta)
            gradient = (wanted - current) @ coordinates
            centred = coordinates - current @ coordinates
            # Least squares: where a direction has no curvature left to double precision, leave it alone.
            step = np.linalg.lstsq((centred * current[:, None]).T @ centred, gradient, rcond=None)[0]
            # gradient @ step / 2 is about how many nats are left to gain.
            if np.abs(gradient).max(initial=0) < 1e-12 or gradient @ step < 1e-20:
                policy[face] = current
                return policy
            theta = theta + _damped(step, lambda at: wanted @ _log_softmax(log_base + coordinates @ at), theta)
        raise RazorError("The M-projection did not converge: the statistics are too badly scaled for it.")

    def _coordinates_of(self, face: Mask) -> Floats:
        """Orthogonal coordinates of the directions in which the statistics differ on a face: (outcomes, directions)."""
        known = self._coordinates.get(face.tobytes())
        if known is None:
            centred = self.statistics[face] - self.statistics[face].mean(axis=0)
            axes, sizes, _ = np.linalg.svd(centred, full_matrices=False)
            known = axes[:, sizes > 1e-10 * np.abs(self.statistics).max(initial=0)] * np.sqrt(len(centred))
            self._coordinates[face.tobytes()] = known
        return known


def _damped(step: Floats, objective: Callable[[Floats], float], at: Floats) -> Floats:
    """The longest of step, step/2, step/4... that does not lower the objective by more than rounding."""
    start = objective(at)
    for _ in range(60):
        if objective(at + step) >= start - 1e-13:
            break
        step = step / 2
    return step


def closest_optimal_policy(family: ExponentialFamily, correct: ArrayLike) -> Floats | None:
    """argmin of KL(pi || base) over the always-correct policies in the family's closure; None if it has none.

    On each face of correct outcomes the convex solver looks for the nearest policy. That searches all policies of the
    face, of which the nearest, the base restricted to it, belongs to the family; the nearest face wins.
    """
    candidates = [closest_correct_policy(family.base, face) for face in family.correct_faces(correct)]
    return min(candidates, key=lambda policy: float(kl(policy, family.base)), default=None)


def alternate(
    family: ExponentialFamily,
    correct: ArrayLike,
    steps: int,
    *,
    error: Callable[[int, Floats], Floats] | None = None,
    anchored: bool = False,
) -> Floats:
    """Rounds of I-projection and M-projection from the base: the policies after 0..steps rounds, (steps + 1, Y).

    `error(round, exact)` returns the policy that an inexact M-step reaches in place of the exact one, both of shape
    (Y,); rounds count from 1. `anchored` projects the base in every round, where the paper projects the current policy.
    Raises RazorError for a base that never is correct.
    """
    policies = [family.base]
    for step in range(1, steps + 1):
        target = i_projection(family.base if anchored else policies[-1], correct)
        exact = family.m_projection(target, policies[-1])
        policies.append(exact if error is None else error(step, exact))
    return np.array(policies)


# Gradient flows of a softmax, every prompt with logits of its own


@dataclass(frozen=True, eq=False)
class Flow:
    """A gradient flow up to `duration`, when its mean accuracy reached what was asked; time in 1/learning rate."""

    duration: float
    policy: Callable[[float], Floats]

    @property
    def end(self) -> Floats:
        """The policy at the end, of the base's shape."""
        return self.policy(self.duration)

    def along(self, points: int) -> Floats:
        """The policies at `points` times from 0 to the end, close together at first: (points, *base.shape)."""
        times = np.expm1(np.linspace(0, np.log1p(self.duration), points))
        return np.array([self.policy(time) for time in times])


def policy_gradient_flow(
    base: ArrayLike, correct: ArrayLike, until: float, normalisation: Normalisation = "none"
) -> Flow:
    """d theta / dt = grad E[R] for softmax logits, until the mean accuracy over prompts is `until` < 1.

    The exact gradient is pi_y (R_y - E[R]), whatever the baseline. With "std", GRPO's: each prompt's gradient divided
    by the standard deviation of its reward, sqrt(E[R] (1 - E[R])), as with infinite groups. That is the same path at
    another speed, prompt by prompt. base is (..., Y). Raises RazorError where `until` cannot be reached.
    """
    correct = np.asarray(correct, bool)

    def velocity(policy: Floats) -> Floats:
        hit = accuracy(policy, correct)[..., None]
        gradient = policy * (correct - hit)
        # A prompt that is always wrong, or always right, has no gradient and no standard deviation.
        return gradient / np.sqrt(np.maximum(hit * (1 - hit), 1e-30)) if normalisation == "std" else gradient

    return _integrate(base, correct, velocity, until)


def sft_flow(base: ArrayLike, target: ArrayLike, correct: ArrayLike, until: float) -> Flow:
    """d theta / dt = target - pi, the gradient of -KL(target || pi): fine-tuning on samples of `target`, (..., Y).

    With q* as the target it is oracle SFT, and KL-DPG with infinite groups. Ends as `policy_gradient_flow` does.
    """
    target = np.asarray(target, float)
    return _integrate(base, np.asarray(correct, bool), lambda policy: target - policy, until)


def natural_gradient_flow(base: ArrayLike, correct: ArrayLike, until: float) -> Flow:
    """The flow of E[R] in the Fisher metric, in closed form: pi(t) proportional to base exp(t R).

    It keeps every ratio between correct outcomes, and between wrong ones: its excess KL is 0 all along. It is the path
    of the alternation with M-steps that stop half-way. Ends as `policy_gradient_flow` does.
    """
    base, correct = np.asarray(base, float), np.asarray(correct, bool)
    _check_reachable(base, correct, until)

    def policy(time: float) -> Floats:
        return _softmax(_log(base) + time * correct)

    if accuracy(base, correct).mean() >= until:
        return Flow(0.0, policy)
    return Flow(optimize.brentq(lambda time: accuracy(policy(time), correct).mean() - until, 0, 700), policy)


def policy_gradient_at(base: ArrayLike, correct: ArrayLike, accuracies: ArrayLike) -> Floats:
    """Where the flow of E[R] passes a given accuracy, in closed form: (..., Y) and (...,) to (..., Y).

    With w = exp(theta), starting at w = base: d(1/w_y)/dt is -(1 - E[R])/Z for every correct y and E[R]/Z for every
    wrong one. So 1/w_a - 1/w_b never changes within either kind; and neither does the product of all w, as the
    gradient sums to 0. Hence 1/w = 1/base - s for the correct and 1/base + u for the wrong outcomes, where s in
    [0, 1/max base) fixes u. As s approaches its end, w of the likeliest correct outcome goes to infinity, the other
    correct ones to finite limits, and E[R] to 1: the flow ends on the likeliest correct outcome alone, or evenly on
    those that tie, at KL(pi || pi0) = -log of their base probability. GRPO's normalisation, any baseline and
    1-0 REINFORCE have the same path in expectation.

    Accuracies are at least the base's and below 1. Raises RazorError otherwise, or for a base that is 0 somewhere.
    """
    base = np.asarray(base, float)
    correct = np.broadcast_to(np.asarray(correct, bool), base.shape)
    wanted = np.broadcast_to(np.asarray(accuracies, float), base.shape[:-1])
    if not (base > 0).all() or not (correct.any(axis=-1) & ~correct.all(axis=-1)).all():
        raise RazorError("The closed form needs a positive base, and both a correct and a wrong outcome.")
    if ((wanted < accuracy(base, correct) - 1e-12) | (wanted >= 1)).any():
        raise RazorError("Policy gradient only raises the accuracy, and never to 1: ask for one from the base's to 1.")
    flat = zip(base.reshape(-1, base.shape[-1]), correct.reshape(-1, base.shape[-1]), wanted.ravel(), strict=True)
    return np.array([_at_accuracy(*one) for one in flat]).reshape(base.shape)


def _at_accuracy(base: Floats, correct: Mask, wanted: float) -> Floats:
    good, bad = 1 / base[correct], 1 / base[~correct]
    top = good.min()

    def policy_at(log_gap: float) -> Floats:
        gap = np.exp(log_gap)  # 1/w of the likeliest correct outcome, from top down to 0
        good_left = good - top + gap
        log_product = np.log(good / good_left).sum()
        # Solve sum log((bad + u) / bad) = log_product for u; its log is between these two for every set of bad.
        high = np.log(bad.max()) + log_product / len(bad) + 1.0
        grown = (
            optimize.brentq(
                lambda log_u: np.log1p(np.exp(log_u) / bad).sum() - log_product, -80.0, max(high, -79.0), xtol=1e-14
            )
            if log_product > 1e-30
            else -np.inf
        )
        logits = np.empty_like(base)
        logits[correct] = -np.log(good_left)
        logits[~correct] = -np.log(bad + np.exp(grown))
        return _softmax(logits)

    if accuracy(base, correct) >= wanted:
        return base
    start = np.log(top)
    log_gap = optimize.brentq(
        lambda gap: float(accuracy(policy_at(gap), correct)) - wanted, start - 80.0, start, xtol=1e-14
    )
    return policy_at(log_gap)


def _integrate(base: ArrayLike, correct: Mask, velocity: Callable[[Floats], Floats], until: float) -> Flow:
    base = np.asarray(base, float)
    _check_reachable(base, correct, until)

    def policy_of(logits: Floats) -> Floats:
        return _softmax(logits.reshape(base.shape))

    def passed(_: float, logits: Floats) -> float:
        return float(accuracy(policy_of(logits), correct).mean()) - until

    passed.terminal = True  # type: ignore[attr-defined]
    start = _log(base).ravel()
    if passed(0, start) >= 0:
        return Flow(0.0, lambda _: base)
    solved = solve_ivp(
        lambda _, logits: velocity(policy_of(logits)).ravel(),
        (0, _LONGEST),
        start,
        method="DOP853",
        events=passed,
        dense_output=True,
        rtol=1e-9,
        atol=1e-10,
    )
    if solved.status != 1:
        raise RazorError(f"The flow does not reach a mean accuracy of {until:g} within {_LONGEST:g} units of time.")
    return Flow(float(solved.t_events[0][0]), lambda time: policy_of(solved.sol(time)))


def _check_reachable(base: Floats, correct: Mask, until: float) -> None:
    if not (base > 0).all():
        raise RazorError("A gradient flow needs a base with a positive probability everywhere: its logits are finite.")
    if not until < 1:
        raise RazorError(f"A gradient flow comes near an accuracy of 1 and never there: ask for less than {until:g}.")
    if not np.broadcast_to(correct, base.shape).any(axis=-1).all():
        raise RazorError("Some prompt has no correct outcome: leave it out.")


# Steps rather than flows


def gradient_alternation(
    base: ArrayLike, correct: ArrayLike, gradient_steps: int, lr: float, until: float, most: int = 100_000
) -> Floats:
    """Alternation whose M-step is `gradient_steps` steps of gradient descent on KL(q_t || pi): the policy at the end.

    One gradient step per I-projection is a policy-gradient step on E[R], divided by E[R]; infinitely many are the exact
    M-projection. base is (..., Y), with logits of its own for every prompt; it stops at the gradient step that brings
    the mean accuracy to `until`. Raises RazorError when `most` gradient steps do not.
    """
    base, correct = np.asarray(base, float), np.asarray(correct, bool)
    _check_reachable(base, correct, until)
    logits, policy = _log(base), base
    target = i_projection(policy, correct)
    for step in range(most):
        if accuracy(policy, correct).mean() >= until:
            return policy
        if step % gradient_steps == 0:
            target = i_projection(policy, correct)
        logits = logits + lr * (target - policy)
        policy = _softmax(logits)
    raise RazorError(f"The alternation has not reached {until:g} after {most} gradient steps: raise the learning rate.")


def sampled_policy_gradient(
    base: ArrayLike,
    correct: ArrayLike,
    advantage: Advantage,
    group_size: int,
    lr: float,
    steps: int,
    rng: np.random.Generator,
    until: float = 1.0,
) -> Floats:
    """Policy gradient from finite groups of samples: the policies after 0, 1... steps, (steps + 1, *base.shape).

    Every prompt of base, (..., Y), has softmax logits of its own and draws `group_size` outcomes a step. The losses are
    those of rlrazor.objectives: A = R (reinforce), R - mean (dr-grpo), that over the group's std (grpo), and kl-dpg's
    weights R pi0 / pi, normalised over the group and so without a baseline. It ends early at the step that brings the
    mean accuracy to `until`. Raises RazorError for an unknown advantage.
    """
    if advantage not in get_args(Advantage):
        raise RazorError(f"Unknown advantage {advantage!r}. Advantages: {', '.join(get_args(Advantage))}.")
    base = np.asarray(base, float)
    correct = np.broadcast_to(np.asarray(correct, bool), base.shape)
    log_base = _log(base)
    logits, policies = log_base, [base]
    for _ in range(steps):
        policy = policies[-1]
        if accuracy(policy, correct).mean() >= until:
            break
        drawn = rng.multinomial(group_size, policy).astype(float)
        weighted = _weights(advantage, drawn, correct, log_base - _log(policy), group_size)
        logits = logits + lr * (weighted - policy * weighted.sum(axis=-1, keepdims=True))
        policies.append(_softmax(logits))
    return np.array(policies)


def _weights(advantage: Advantage, drawn: Floats, correct: Mask, log_ratio: Floats, group_size: int) -> Floats:
    """Each outcome's share of the group times its advantage."""
    hits = drawn * correct
    mean = hits.sum(axis=-1, keepdims=True) / group_size
    if advantage == "reinforce":
        return hits / group_size
    if advantage == "kl-dpg":
        weights = hits * np.exp(log_ratio)
        total = weights.sum(axis=-1, keepdims=True)
        return np.asarray(weights / np.where(total > 0, total, 1))
    centred = drawn * (correct - mean) / group_size
    if advantage == "dr-grpo":
        return np.asarray(centred)
    std = np.sqrt(mean * (1 - mean) * group_size / max(group_size - 1, 1))
    return np.asarray(centred / (std + _STD_EPSILON))


# A policy class that is no exponential family


@dataclass(frozen=True, eq=False)
class Network:
    """Policies pi(y|x) = softmax(W tanh(V x + b) + c) for prompts x, (N, I), with H hidden units and Y outcomes.

    All prompts share the weights, a flat array of `size`. The weights of a policy are many, and mixing two policies
    leaves the class: neither projection is what it is in an exponential family.
    """

    prompts: Floats
    hidden: int
    outcomes: int

    @property
    def size(self) -> int:
        """How many weights."""
        return int(self.hidden * (self.prompts.shape[1] + 1) + self.outcomes * (self.hidden + 1))

    def policy(self, weights: Floats) -> Floats:
        """The policy on every prompt, (N, Y)."""
        return _softmax(self._forward(weights)[1])

    def pull_back(self, weights: Floats, logit_gradient: Floats) -> Floats:
        """The gradient in the weights of a function whose gradient in the logits, (N, Y), is given."""
        active, _ = self._forward(weights)
        W = self._split(weights)[2]
        inner = (logit_gradient @ W) * (1 - active**2)
        parts = (inner.T @ self.prompts, inner.sum(axis=0), logit_gradient.T @ active, logit_gradient.sum(axis=0))
        return np.concatenate([part.ravel() for part in parts])

    def m_projection(self, target: Floats, start: Floats) -> Floats:
        """Weights at a local minimum of mean KL(target || pi), downhill from `start`, by BFGS with exact gradients."""

        def loss(weights: Floats) -> tuple[float, Floats]:
            log_policy = _log_softmax(self._forward(weights)[1])
            gradient = (np.exp(log_policy) - target) / len(target)
            return float(-(target * log_policy).sum() / len(target)), self.pull_back(weights, gradient)

        found = optimize.minimize(loss, start, jac=True, method="BFGS", options={"gtol": 1e-7, "maxiter": 500})
        return np.asarray(found.x)

    def alternate(self, base: Floats, correct: ArrayLike, until: float, most: int = 50) -> tuple[Floats, int]:
        """Rounds of both projections from the weights `base` until the mean accuracy is `until`, or `most` rounds.

        Returns the weights and how many rounds it took.
        """
        weights = base
        for done in range(most):
            policy = self.policy(weights)
            if accuracy(policy, correct).mean() >= until:
                return weights, done
            weights = self.m_projection(i_projection(policy, correct), weights)
        return weights, most

    def policy_gradient(self, base: Floats, correct: ArrayLike, until: float) -> Floats:
        """The weights where the gradient flow of the mean accuracy, from `base`, reaches `until`.

        On a plateau below it, those after 100,000 units of time.
        """
        correct = np.asarray(correct, bool)

        def velocity(_: float, weights: Floats) -> Floats:
            policy = self.policy(weights)
            return self.pull_back(weights, policy * (correct - accuracy(policy, correct)[:, None]))

        def passed(_: float, weights: Floats) -> float:
            return float(accuracy(self.policy(weights), correct).mean()) - until

        passed.terminal = True  # type: ignore[attr-defined]
        solved = solve_ivp(velocity, (0, 1e5), base, method="LSODA", events=passed, rtol=1e-6, atol=1e-8)
        return np.asarray(solved.y[:, -1])

    def closest(self, base: Floats, correct: ArrayLike, least: float, starts: Sequence[Floats]) -> Floats:
        """Weights of the least mean KL(pi || base's policy) found at a mean accuracy of at least `least`.

        SLSQP from every start; the best of local minima, hence an upper bound of the class's minimum. Raises RazorError
        when none of them is accurate enough.
        """
        correct, pi0 = np.asarray(correct, bool), self.policy(base)
        log_pi0 = np.log(pi0)

        def distance(weights: Floats) -> tuple[float, Floats]:
            log_policy = _log_softmax(self._forward(weights)[1])
            policy, ratio = np.exp(log_policy), log_policy - log_pi0
            each = (policy * ratio).sum(axis=-1, keepdims=True)
            return float(each.mean()), self.pull_back(weights, policy * (ratio - each) / len(policy))

        def margin(weights: Floats) -> float:
            return float(accuracy(self.policy(weights), correct).mean()) - least

        def margin_gradient(weights: Floats) -> Floats:
            policy = self.policy(weights)
            return self.pull_back(weights, policy * (correct - accuracy(policy, correct)[:, None]) / len(policy))

        candidates = [
            optimize.minimize(
                distance,
                start,
                jac=True,
                method="SLSQP",
                constraints={"type": "ineq", "fun": margin, "jac": margin_gradient},
                options={"ftol": 1e-8, "maxiter": 60},
            ).x
            for start in starts
        ]
        feasible = [weights for weights in [*candidates, *starts] if margin(weights) >= -1e-6]
        if not feasible:
            raise RazorError(f"No start led the network to a mean accuracy of {least:g}.")
        return np.asarray(min(feasible, key=lambda weights: distance(weights)[0]))

    def _forward(self, weights: Floats) -> tuple[Floats, Floats]:
        V, b, W, c = self._split(weights)
        active = np.tanh(self.prompts @ V.T + b)
        return active, active @ W.T + c

    def _split(self, weights: Floats) -> tuple[Floats, Floats, Floats, Floats]:
        inputs, hidden, outcomes = self.prompts.shape[1], self.hidden, self.outcomes
        V, b, W, c = np.split(weights, np.cumsum([hidden * inputs, hidden, outcomes * hidden]))
        return V.reshape(hidden, inputs), b, W.reshape(outcomes, hidden), c


def _softmax(logits: Floats) -> Floats:
    """As scipy's over the last axis, a fifth of the time on a dozen outcomes."""
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True))


def _log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def _log(policy: ArrayLike) -> Floats:
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(np.asarray(policy, float)))
