"""A policy class that is no exponential family: a small network, and where both projections and policy gradient end."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize
from scipy.integrate import solve_ivp  # type: ignore[attr-defined]  # scipy exports it dynamically

from rlrazor.errors import RazorError
from rlrazor.studies.theory.flows import policy_gradient, when_accurate
from rlrazor.studies.theory.projection import Floats, Mask, accuracy, i_projection, log_softmax, softmax


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
        return softmax(self._forward(weights)[1])

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
            log_policy = log_softmax(self._forward(weights)[1])
            gradient = (np.exp(log_policy) - target) / len(target)
            return float(-(target * log_policy).sum() / len(target)), self.pull_back(weights, gradient)

        found = optimize.minimize(loss, start, jac=True, method="BFGS", options={"gtol": 1e-7, "maxiter": 500})
        return np.asarray(found.x)

    def alternate(self, base: Floats, correct: Mask, until: float, most: int = 50) -> tuple[Floats, int]:
        """Both projections in turn from the weights `base` until the mean accuracy is `until`, or `most` rounds.

        Returns the weights and how many rounds it took.
        """
        weights = base
        for done in range(most):
            policy = self.policy(weights)
            if accuracy(policy, correct).mean() >= until:
                return weights, done
            weights = self.m_projection(i_projection(policy, correct), weights)
        return weights, most

    def policy_gradient(self, base: Floats, correct: Mask, until: float) -> Floats:
        """The weights where the gradient flow of the mean accuracy, from `base`, reaches `until`.

        On a plateau below it, those after 100,000 units of time.
        """

        def velocity(_: float, weights: Floats) -> Floats:
            return self.pull_back(weights, policy_gradient(self.policy(weights), correct))

        passed = when_accurate(self.policy, correct, until)
        solved = solve_ivp(velocity, (0, 1e5), base, method="LSODA", events=passed, rtol=1e-6, atol=1e-8)
        return np.asarray(solved.y[:, -1])

    def closest(self, base: Floats, correct: Mask, least: float, starts: Sequence[Floats]) -> Floats:
        """Weights of the least mean KL(pi || base's policy) found at a mean accuracy of at least `least`.

        SLSQP from every start; the best of local minima, hence an upper bound of the class's minimum. Raises RazorError
        when none of them is accurate enough.
        """
        log_pi0 = np.log(self.policy(base))

        def distance(weights: Floats) -> tuple[float, Floats]:
            log_policy = log_softmax(self._forward(weights)[1])
            policy, ratio = np.exp(log_policy), log_policy - log_pi0
            each = (policy * ratio).sum(axis=-1, keepdims=True)
            return float(each.mean()), self.pull_back(weights, policy * (ratio - each) / len(policy))

        def margin(weights: Floats) -> float:
            return float(accuracy(self.policy(weights), correct).mean()) - least

        def margin_gradient(weights: Floats) -> Floats:
            return self.pull_back(weights, policy_gradient(self.policy(weights), correct) / len(correct))

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
