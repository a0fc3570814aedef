"""Policy gradient and its relatives on a softmax, every prompt with logits of its own: as flows, and step by step.

Arrays are as in `projection`, and bases positive. A flow, or a walk of steps, ends where its mean accuracy over prompts
reaches `until`, below 1.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, assert_never

import numpy as np
from scipy import optimize
from scipy.integrate import solve_ivp  # type: ignore[attr-defined]  # scipy exports it dynamically

from rlrazor.errors import RazorError
from rlrazor.studies.theory.projection import Floats, Mask, accuracy, i_projection, log, softmax

Advantage = Literal["dr-grpo", "grpo", "reinforce", "kl-dpg"]

_STD_EPSILON = 1e-6  # as in objectives.grpo
_LONGEST = 1e7  # units of flow time; from (.2, .1 | .7) policy gradient takes 0.5 / (1 - accuracy)


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


def policy_gradient(policy: Floats, correct: Mask) -> Floats:
    """The gradient of E[R] in a softmax's logits, whatever the baseline: pi_y (R_y - E[R])."""
    return np.asarray(policy * (correct - accuracy(policy, correct)[..., None]))


def grpo_gradient(policy: Floats, correct: Mask) -> Floats:
    """The same over the reward's standard deviation, sqrt(E[R] (1 - E[R])), as of GRPO with infinite groups.

    Its flow takes the same path at another speed, prompt by prompt.
    """
    hit = accuracy(policy, correct)[..., None]
    # A prompt that is always wrong, or always right, has no gradient and no standard deviation.
    return np.asarray(policy_gradient(policy, correct) / np.sqrt(np.maximum(hit * (1 - hit), 1e-30)))


def gradient_flow(base: Floats, correct: Mask, until: float, gradient: Callable[[Floats, Mask], Floats]) -> Flow:
    """d theta / dt = gradient, by a solver."""

    def policy_of(logits: Floats) -> Floats:
        return softmax(logits.reshape(base.shape))

    start, passed = log(base).ravel(), when_accurate(policy_of, correct, until)
    if passed(0, start) >= 0:
        return Flow(0.0, lambda _: base)
    solved = solve_ivp(
        lambda _, logits: gradient(policy_of(logits), correct).ravel(),
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


def when_accurate(
    policy_of: Callable[[Floats], Floats], correct: Mask, until: float
) -> Callable[[float, Floats], float]:
    """The event at which a solver stops: the mean accuracy passes `until`."""

    def passed(_: float, parameters: Floats) -> float:
        return float(accuracy(policy_of(parameters), correct).mean()) - until

    passed.terminal = True  # type: ignore[attr-defined]
    return passed


def sft_flow(base: Floats, correct: Mask, until: float, target: Floats) -> Flow:
    """d theta / dt = target - pi, the gradient of -KL(target || pi): fine-tuning on samples of `target`, (..., Y)."""
    return gradient_flow(base, correct, until, lambda policy, _: target - policy)


def natural_gradient_flow(base: Floats, correct: Mask, until: float) -> Flow:
    """The flow of E[R] in the Fisher metric, in closed form: pi(t) proportional to base exp(t R).

    It keeps every ratio between correct outcomes, and between wrong ones: its excess KL is 0 all along. It is the path
    of the alternation with M-steps that stop half-way.
    """

    def policy(time: float) -> Floats:
        return softmax(log(base) + time * correct)

    if accuracy(base, correct).mean() >= until:
        return Flow(0.0, policy)
    return Flow(optimize.brentq(lambda time: accuracy(policy(time), correct).mean() - until, 0, 700), policy)


FLOWS: Mapping[str, Callable[[Floats, Mask, float], Flow]] = {
    "policy-gradient": lambda base, correct, until: gradient_flow(base, correct, until, policy_gradient),
    "grpo": lambda base, correct, until: gradient_flow(base, correct, until, grpo_gradient),
    # With infinite groups it is SFT on samples of q*, the oracle.
    "kl-dpg": lambda base, correct, until: sft_flow(base, correct, until, i_projection(base, correct)),
    "natural-gradient": natural_gradient_flow,
}


def policy_gradient_at(base: Floats, correct: Mask, wanted: float) -> Floats:
    """Where the flow of E[R] from a base of shape (Y,) passes an accuracy, in closed form.

    With w = exp(theta), starting at w = base: d(1/w_y)/dt is -(1 - E[R])/Z for every correct y and E[R]/Z for every
    wrong one. So 1/w_a - 1/w_b never changes within either kind; and neither does the product of all w, as the
    gradient sums to 0. Hence 1/w = 1/base - s for the correct and 1/base + u for the wrong outcomes, where s in
    [0, 1/max base) fixes u. As s approaches its end, w of the likeliest correct outcome goes to infinity, the other
    correct ones to finite limits, and E[R] to 1: the flow ends on the likeliest correct outcome alone, or evenly on
    those that tie, at KL(pi || pi0) = -log of their base probability.

    The base is positive. Raises RazorError for an accuracy below the base's, or of 1 and more.
    """
    reached = accuracy(base, correct)
    if wanted < reached - 1e-12 or wanted >= 1:
        raise RazorError("Policy gradient only raises the accuracy, and never to 1: ask for one from the base's to 1.")
    good, bad = 1 / base[correct], 1 / base[~correct]
    top = good.min()

    def policy_at(log_gap: float) -> Floats:
        gap = np.exp(log_gap)  # 1/w of the likeliest correct outcome, from top down to 0
        good_left = good - top + gap
        log_product = np.log(good / good_left).sum()
        logits = np.empty_like(base)
        logits[correct] = -np.log(good_left)
        logits[~correct] = -np.log(bad + np.exp(_grown(bad, log_product)))
        return softmax(logits)

    if reached >= wanted:
        return base
    start = np.log(top)
    return policy_at(
        optimize.brentq(lambda gap: float(accuracy(policy_at(gap), correct)) - wanted, start - 80.0, start, xtol=1e-14)
    )


def _grown(bad: Floats, log_product: float) -> float:
    """log u where sum log((bad + u) / bad) = log_product."""
    if log_product <= 1e-30:
        return -np.inf
    high = np.log(bad.max()) + log_product / len(bad) + 1.0  # log u is below it for every set of bad, and above -80
    return float(
        optimize.brentq(
            lambda log_u: np.log1p(np.exp(log_u) / bad).sum() - log_product, -80.0, max(high, -79.0), xtol=1e-14
        )
    )


# Steps rather than flows


def gradient_alternation(
    base: Floats, correct: Mask, gradient_steps: int, lr: float, until: float, most: int = 100_000
) -> Floats:
    """Alternation whose M-step is `gradient_steps` steps of gradient descent on KL(q_t || pi): the policy at the end.

    One gradient step per I-projection is a policy-gradient step on E[R], divided by E[R]; infinitely many are the exact
    M-projection. Raises RazorError also where `most` gradient steps do not get there.
    """
    logits, policy = log(base), base
    target = i_projection(policy, correct)
    for step in range(most):
        if accuracy(policy, correct).mean() >= until:
            return policy
        if step % gradient_steps == 0:
            target = i_projection(policy, correct)
        logits = logits + lr * (target - policy)
        policy = softmax(logits)
    raise RazorError(f"{until:g} is not reached after {most} gradient steps: raise the learning rate.")


def sampled_policy_gradient(
    base: Floats,
    correct: Mask,
    advantage: Advantage,
    group: int,
    lr: float,
    rng: np.random.Generator,
    *,
    until: float = 1.0,
    most: int = 20_000,
) -> Floats:
    """Policy gradient from finite groups of samples: the policies after 0, 1... steps, (steps + 1, *base.shape).

    Every prompt of base, (..., Y), draws `group` outcomes a step. The losses are those of rlrazor.objectives: A = R
    (reinforce), R - mean (dr-grpo), that over the group's std (grpo), and kl-dpg's weights R pi0 / pi, normalised over
    the group and so without a baseline. It ends with the step that reaches `until`, or after `most`.
    """
    log_base = log(base)
    logits, policies = log_base, [base]
    while len(policies) <= most and accuracy(policies[-1], correct).mean() < until:
        policy = policies[-1]
        drawn = rng.multinomial(group, policy).astype(float)
        weighted = _weights(advantage, drawn, correct, log_base - log(policy), group)
        logits = logits + lr * (weighted - policy * weighted.sum(axis=-1, keepdims=True))
        policies.append(softmax(logits))
    return np.array(policies)


def _weights(advantage: Advantage, drawn: Floats, correct: Mask, log_ratio: Floats, group: int) -> Floats:
    """Each outcome's share of the group times its advantage."""
    hits = drawn * correct
    mean = hits.sum(axis=-1, keepdims=True) / group
    if advantage == "reinforce":
        return np.asarray(hits / group)
    if advantage == "kl-dpg":
        weights = hits * np.exp(log_ratio)
        total = weights.sum(axis=-1, keepdims=True)
        return np.asarray(weights / np.where(total > 0, total, 1))
    centred = np.asarray(drawn * (correct - mean) / group)
    if advantage == "dr-grpo":
        return centred
    if advantage == "grpo":
        std = np.sqrt(mean * (1 - mean) * group / max(group - 1, 1))
        return np.asarray(centred / (std + _STD_EPSILON))
    assert_never(advantage)
