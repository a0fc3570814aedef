"""The paper's two projections on finite sets, what they cost in KL, and the alternation of both.

A policy is an array whose last axis holds the probabilities of Y outcomes and sums to 1; axes before it are prompts.
`correct` is a boolean mask over the outcomes that broadcasts against the policy. KL is in nats. numpy and scipy only.
What is so of them, and why, is in theory.md.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special
from scipy.optimize import linprog  # type: ignore[attr-defined]  # scipy exports it dynamically

from rlrazor.errors import RazorError

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

_NEWTON_STEPS = 200
_GIVEN_UP = 1e-13  # moments do not tell a probability this small from 0, to double precision


# Distributions


def kl(p: Floats, q: Floats) -> Floats:
    """KL(p || q) over the last axis; an outcome with p = 0 adds nothing, one with p > 0 = q makes it inf."""
    return np.asarray(special.rel_entr(p, q).sum(axis=-1))


def total_variation(p: Floats, q: Floats) -> Floats:
    """Half the L1 distance over the last axis: a fraction of 1."""
    return np.asarray(np.abs(p - q).sum(axis=-1) / 2)


def accuracy(policy: Floats, correct: Mask) -> Floats:
    """E[R]: the probability of a correct outcome, over the last axis."""
    return np.asarray((policy * correct).sum(axis=-1))


def i_projection(policy: Floats, correct: Mask) -> Floats:
    """argmin of KL(q || policy) over the q with E_q[R] = 1: the policy restricted to the correct outcomes.

    This is what is left of the policy's samples when the wrong ones are thrown away; of the base it is q*, the
    KL-minimal correct policy. Raises RazorError where the policy never is correct.
    """
    kept = policy * correct
    total = kept.sum(axis=-1, keepdims=True)
    if not (total > 0).all():
        raise RazorError("A policy that is never correct has no projection onto the correct ones: give another base.")
    return np.asarray(kept / total)


def excess_kl(policy: Floats, base: Floats, correct: Mask) -> Floats:
    """KL(policy || base) minus the least KL(. || base) of any policy *as accurate as this one*.

    The chain rule splits KL(pi || pi0) into that of the split correct/wrong, which accuracy alone decides, and
    pi(correct) KL(pi(.|correct) || pi0(.|correct)) plus the same for wrong; the excess is the last two, never negative.
    A policy of accuracy 1 - e is so compared with policies of accuracy 1 - e; comparing it with q* would reward it for
    the errors it still makes. With the two policies swapped it is the excess of the forward KL.
    """
    return _within(policy, base, correct) + _within(policy, base, ~correct)


def _within(p: Floats, q: Floats, mask: Mask) -> Floats:
    """p(mask) KL(p(.|mask) || q(.|mask))."""
    p, q = p * mask, q * mask
    # Each conditioned before they are compared: a difference of two KLs would lose 1e-12 to rounding.
    mass, other = p.sum(axis=-1), q.sum(axis=-1)
    inside = kl(p / np.where(mass > 0, mass, 1)[..., None], q / np.where(other > 0, other, 1)[..., None])
    return np.asarray(np.where(mass > 0, mass * np.maximum(inside, 0), 0.0))


def softmax(logits: Floats) -> Floats:
    """As scipy's over the last axis, in a fifth of the time on a dozen outcomes."""
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True))


def log_softmax(logits: Floats) -> Floats:
    """Its logarithm."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def log(policy: Floats) -> Floats:
    """Log-probabilities; of 0, -inf."""
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(policy))


def closest_correct_policy(base: Floats, allowed: Mask) -> Floats:
    """argmin of KL(pi || base) over the policies on the `allowed` outcomes, by a general convex solver.

    It solves what `i_projection` knows in closed form, knowing nothing of it: SLSQP over the probabilities with the
    simplex as constraints. base is of shape (Y,). Good to about 1e-8 in each probability. Raises RazorError when the
    solver fails.
    """
    free = allowed & (base > 0)
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
    is the union of the families on the faces.
    """

    base: Floats
    statistics: Floats
    _faces: dict[bytes, Mask] = field(default_factory=dict, init=False, repr=False)

    def tilt(self, policy: Floats, theta: Floats) -> Floats:
        """Move a policy by theta, (D,), in natural parameters; one on a face stays on it."""
        return softmax(log(policy) + self.statistics @ theta)

    def face(self, support: Mask) -> Mask:
        """The outcomes of the smallest face that holds `support`: (Y,) bool to (Y,) bool, by a linear program.

        An outcome is outside when some v . statistics is largest on all of the support and smaller there.
        """
        if support.all():
            return support
        if (known := self._faces.get(support.tobytes())) is not None:
            return known
        others = np.flatnonzero(~support)
        dimensions = self.statistics.shape[1]
        lifted = np.column_stack([self.statistics, -np.ones(len(self.base))])  # v . statistics - c, c the largest value
        found = linprog(
            np.concatenate([np.zeros(dimensions + 1), -np.ones(len(others))]),
            A_ub=np.column_stack([lifted[others], np.eye(len(others))]),
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

    def realises(self, correct: Mask) -> bool:
        """Whether the closure holds q*: whether the correct outcomes are a face (R in the statistics' span does it)."""
        return bool((self.face(correct) == correct).all())

    def correct_faces(self, correct: Mask) -> list[Mask]:
        """The largest faces of correct outcomes only: where the closure is always correct. Time 2^correct."""
        outcomes = np.flatnonzero(correct)
        found: list[Mask] = []
        for size in range(len(outcomes), 0, -1):
            for chosen in combinations(outcomes, size):
                support = np.isin(np.arange(len(self.base)), chosen)
                inside_another = any((support <= larger).all() for larger in found)
                if not inside_another and self.realises(support):
                    found.append(support)
        return found

    def m_projection(self, target: Floats, start: Floats | None = None) -> Floats:
        """argmin of KL(target || pi) over the closure: the policy with the target's mean statistics.

        Newton's method in the natural parameters of the smallest face that holds the target's outcomes, so that the
        limit is exact where theta would go to infinity. Moments agree to 1e-12 of the statistics' spread. `start`, a
        policy of the family, saves steps. Raises RazorError when Newton's method fails.
        """
        face = self.face(target > _GIVEN_UP)
        coordinates = self._coordinates_of(face)
        log_base, wanted = np.log(self.base[face]), target[face] / target[face].sum()
        theta = np.zeros(coordinates.shape[1])
        if start is not None and (start[face] > 0).all():
            theta = coordinates.T @ (np.log(start[face]) - log_base) / len(coordinates)
        policy = np.zeros_like(target)
        for _ in range(_NEWTON_STEPS):
            current = softmax(log_base + coordinates @ theta)
            gradient = (wanted - current) @ coordinates
            centred = coordinates - current @ coordinates
            # Least squares: where a direction has no curvature left to double precision, leave it alone.
            step = np.linalg.lstsq((centred * current[:, None]).T @ centred, gradient, rcond=None)[0]
            # gradient @ step / 2 is about how many nats are left to gain.
            if np.abs(gradient).max(initial=0) < 1e-12 or gradient @ step < 1e-20:
                policy[face] = current
                return policy
            theta = theta + _damped(step, lambda at: wanted @ log_softmax(log_base + coordinates @ at), theta)
        raise RazorError("The M-projection did not converge: the statistics are too badly scaled for it.")

    def _coordinates_of(self, face: Mask) -> Floats:
        """Orthogonal coordinates of the directions in which the statistics differ on a face: (outcomes, directions)."""
        centred = self.statistics[face] - self.statistics[face].mean(axis=0)
        axes, sizes, _ = np.linalg.svd(centred, full_matrices=False)
        return np.asarray(axes[:, sizes > 1e-10 * np.abs(self.statistics).max(initial=0)] * np.sqrt(len(centred)))


def _damped(step: Floats, objective: Callable[[Floats], float], at: Floats) -> Floats:
    """The longest of step, step/2, step/4... that does not lower the objective by more than rounding."""
    start = objective(at)
    for _ in range(60):
        if objective(at + step) >= start - 1e-13:
            break
        step = step / 2
    return step


def closest_optimal_policy(family: ExponentialFamily, correct: Mask) -> Floats | None:
    """argmin of KL(pi || base) over the always-correct policies in the family's closure; None if it has none.

    On each face of correct outcomes the convex solver looks for the nearest policy. That searches all policies of the
    face, of which the nearest, the base restricted to it, belongs to the family; the nearest face wins.
    """
    candidates = [closest_correct_policy(family.base, face) for face in family.correct_faces(correct)]
    return min(candidates, key=lambda policy: float(kl(policy, family.base)), default=None)


def alternate(
    family: ExponentialFamily,
    correct: Mask,
    rounds: int,
    *,
    error: Callable[[int, Floats], Floats] | None = None,
    anchored: bool = False,
) -> Floats:
    """I-projection and M-projection in turn, from the base: the policies after 0..rounds rounds, (rounds + 1, Y).

    `error(round, exact)` returns the policy that an inexact M-step reaches in place of the exact one, both of shape
    (Y,); rounds count from 1. `anchored` projects the base in every round, where the paper projects the current policy.
    """
    policies = [family.base]
    for done in range(1, rounds + 1):
        target = i_projection(family.base if anchored else policies[-1], correct)
        exact = family.m_projection(target, policies[-1])
        policies.append(exact if error is None else error(done, exact))
    return np.array(policies)
