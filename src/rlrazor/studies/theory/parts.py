"""The parts of the study: functions that yield the rows of its tables, most for one seed."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import special

from rlrazor.studies.theory import flows, projection
from rlrazor.studies.theory.flows import FLOWS, Advantage, Flow
from rlrazor.studies.theory.network import Network
from rlrazor.studies.theory.projection import ExponentialFamily, Floats, Mask

AGREE = 1e-6  # what is no farther apart is the same

FIRST_CHECK = np.array([0.2, 0.1, 0.7])  # the base of the picture: two correct outcomes, one wrong
FIRST_CORRECT = np.array([True, True, False])
FIRST_ACCURACIES = (0.9, 0.97, 0.99, 0.999, 0.9999, 0.99999)
FIRST_TIME = 4000.0
FIRST_LABELS = np.array([0.1, 0.9, 0.0])

OUTCOMES, UNTIL = 10, 0.97  # ParityMNIST's ten labels, five of them correct; and the accuracy at which RL is compared
HALF = OUTCOMES // 2
CORRECT = np.arange(OUTCOMES) < HALF
SPREAD = 20.0  # prompts' base accuracies are Beta(SPREAD p, SPREAD (1 - p)): for p = .5, a standard deviation of .11
MIDDLE, GROUP = 0.5, 8  # the base's accuracy and the groups of samples that every preset has
FLOOR = 1e-4  # least base probability of an outcome
LR = 0.5
STEPS_PER_ROUND = (1, 10, 100, 1000)
M_STEP_LR = 0.1
ERROR = 0.3
NETWORK_UNTIL = 0.99

KINDS = {  # of families
    "softmax": "softmax, a logit per outcome",
    "R + 1": "exponential family, R and 1 more statistic",
    "R + 2": "exponential family, R and 2 more",
    "R + 4": "exponential family, R and 4 more",
    "graded": "exponential family, a grade of three levels",
    "random": "exponential family, 2 random statistics",
}
EXACT: Mapping[str, str] = {
    "policy-gradient": "policy gradient, exact",
    "grpo": "GRPO, exact",
    "kl-dpg": "KL-DPG, exact",
    "natural-gradient": "natural gradient, exact",
}
SAMPLED: Mapping[Advantage, str] = {
    "dr-grpo": "policy gradient",
    "grpo": "GRPO",
    "reinforce": "1-0 REINFORCE",
    "kl-dpg": "KL-DPG",
}
SCHEDULES: Mapping[str, Callable[[int], float]] = {  # of an M-step's errors
    "none": lambda step: 0.0,
    "0.3/t²": lambda step: ERROR / step**2,
    "0.3/t": lambda step: ERROR / step,
    "0.3(−1)ᵗ/t": lambda step: ERROR * (-1) ** step / step,
    "0.3": lambda step: ERROR,
}
# (what the M-step gets wrong, schedule of the errors, whether every round projects the base)
_ERRORS = (
    ("ratios", "none", False),
    ("ratios", "0.3/t²", False),
    ("ratios", "0.3(−1)ᵗ/t", False),
    ("ratios", "0.3/t", False),
    ("ratios", "0.3/t", True),
    ("accuracy", "0.3/t²", False),
    ("accuracy", "0.3/t", False),
    ("accuracy", "0.3", False),
)


@dataclass(frozen=True)
class Preset:
    """How much to compute. Families of each kind, prompts and networks of each size are per seed."""

    families: int
    prompts: int
    accuracies: tuple[float, ...]
    groups: tuple[int, ...]
    rounds: int
    hidden: tuple[int, ...]
    networks: int


Rows = Iterator[dict[str, Any]]


# Three outcomes


def first_check() -> Rows:
    """The ratio of the two correct outcomes along policy gradient, by the closed form and by the solver."""
    base, correct = FIRST_CHECK, FIRST_CORRECT
    plain = FLOWS["policy-gradient"](base, correct, FIRST_ACCURACIES[-1])
    at_time = float(projection.accuracy(plain.policy(FIRST_TIME), correct))
    for accuracy in sorted({*FIRST_ACCURACIES, at_time}):
        exact = flows.policy_gradient_at(base, correct, accuracy)
        flow, normalised = (FLOWS[name](base, correct, accuracy) for name in ("policy-gradient", "grpo"))
        yield {
            "accuracy": accuracy,
            "ratio": exact[0] / exact[1],
            "time": flow.duration,
            "time_normalised": normalised.duration,
            "solver_difference": max(np.abs(flow.end - exact).max(), np.abs(normalised.end - exact).max()),
            "derivative_error": _derivative_error(flow),
            "excess": float(projection.excess_kl(exact, base, correct)),
            "excess_forward": float(projection.excess_kl(base, exact, correct)),
        }


def _derivative_error(flow: Flow) -> float:
    """The largest miss of d/dt log(pi_a/pi_b) = (pi_a - pi_b)(1 - E[R]), by central differences along the flow."""
    h = 1e-3
    misses = []
    for time in np.linspace(0.05, 0.95, 19) * flow.duration:
        before, now, after = (flow.policy(at) for at in (time - h, time, time + h))
        slope = (np.log(after[0] / after[1]) - np.log(before[0] / before[1])) / (2 * h)
        misses.append(float(abs(slope - (now[0] - now[1]) * now[2])))
    return max(misses)


def paths(seeds: Sequence[int]) -> Rows:
    """The paths on the simplex; of GRPO from samples one per seed."""
    base, correct, until = FIRST_CHECK, FIRST_CORRECT, 0.999
    paths = {name: flow(base, correct, until).along(80) for name, flow in FLOWS.items()}
    paths["sft"] = flows.sft_flow(base, correct, until, FIRST_LABELS).along(80)
    for seed in seeds:
        rng = np.random.default_rng(seed)
        paths[f"sampled {seed}"] = flows.sampled_policy_gradient(base, correct, "grpo", GROUP, 0.25, rng, until=0.995)
    for name, path in paths.items():
        yield from ({"path": name, **dict(zip("abc", np.round(point, 4).tolist(), strict=True))} for point in path)


# Families, and their alternation


def alternation(scale: Preset, seed: int) -> Rows:
    """Random families, their alternation's end, and the solver's argmin."""
    for kind in KINDS:
        for index in range(scale.families):
            family, correct = _family(kind, np.random.default_rng([seed, index]))
            nearest = projection.closest_optimal_policy(family, correct)
            if nearest is None:  # no policy of the family is always correct: nothing to end at
                continue
            rounds = 3 if family.realises(correct) else scale.rounds
            policies = projection.alternate(family, correct, rounds)
            end, half_way = policies[-1], policies[rounds // 2]
            distances = np.abs(policies - nearest).max(axis=1)
            there = np.flatnonzero(distances <= AGREE)
            yield {
                "kind": kind,
                "realised": family.realises(correct),
                "distance": float(distances[-1]),
                "total_variation": float(projection.total_variation(end, nearest)),
                "rounds": int(there[0]) if len(there) else None,
                "accuracy": float(projection.accuracy(end, correct)),
                "moving": bool(projection.total_variation(end, half_way) > AGREE),
                "kl_gap": float(projection.kl(end, family.base) - projection.kl(nearest, family.base)),
            }


def _family(kind: str, rng: np.random.Generator) -> tuple[ExponentialFamily, Mask]:
    base = rng.dirichlet(np.full(OUTCOMES, 2.0))
    correct = rng.permutation(CORRECT)
    if kind == "softmax":
        return ExponentialFamily(base, np.eye(OUTCOMES)), correct
    if kind == "random":
        return ExponentialFamily(base, rng.normal(size=(OUTCOMES, 2))), correct
    if kind == "graded":
        # Three levels: all of the top, half of the middle one correct. The correct outcomes are not a face, the top is.
        return ExponentialFamily(base, np.repeat([2.0, 1.0, 0.0], (3, 4, 3))[:, None]), CORRECT
    others = int(kind.removeprefix("R + "))
    statistics = np.column_stack([correct, rng.normal(size=(OUTCOMES, others))])
    # Mixed, so that R is in the span without being one of the statistics.
    return ExponentialFamily(base, statistics @ rng.normal(size=(others + 1, others + 1))), correct


def inexact(scale: Preset, seed: int) -> Rows:
    """How far from the argmin M-steps with errors lead."""
    return (row for row, _ in _with_errors(scale, seed))


def _with_errors(scale: Preset, seed: int) -> Iterator[tuple[dict[str, Any], Floats]]:
    """A row for each kind of errors, and the distances to the argmin, round by round."""
    rng = np.random.default_rng(seed)
    family, correct = _family("R + 2", rng)
    nearest = projection.closest_correct_policy(family.base, correct)
    # A direction along which the correct outcomes differ, by one standard deviation under q*.
    direction: Floats = rng.normal(size=(family.statistics.shape[1],))
    along = family.statistics @ direction
    direction = direction / np.sqrt(nearest @ (along - nearest @ along) ** 2)
    for what, schedule, anchored in _ERRORS:
        size = SCHEDULES[schedule]
        error = _error(family, correct, size, direction if what == "ratios" else None)
        policies = projection.alternate(family, correct, scale.rounds, error=error, anchored=anchored)
        distances = projection.total_variation(policies, nearest)
        total = sum(size(step) for step in range(1, scale.rounds + 1))
        shifted = family.tilt(nearest, total * direction)  # where errors that stay lead
        stay = what == "ratios" and not anchored
        row = {
            "what": what,
            "schedule": schedule,
            "anchored": anchored,
            "sum": total,
            **{f"after_{step}": float(distances[step]) for step in (10, 100, scale.rounds)},
            "end": float(distances[-1]),
            "foretold": float(projection.total_variation(shifted, nearest)) if stay else None,
        }
        yield row, distances


def _error(
    family: ExponentialFamily, correct: Mask, size: Callable[[int], float], shift: Floats | None
) -> Callable[[int, Floats], Floats]:
    """An M-step's error: the exact policy moved along `shift` in natural parameters, or mixed with wrong outcomes."""
    wrong = projection.i_projection(family.base, ~correct)

    def inexact(step: int, exact: Floats) -> Floats:
        if shift is not None:
            return family.tilt(exact, size(step) * shift)
        return np.asarray((1 - size(step)) * exact + size(step) * wrong)

    return inexact


def convergence(scale: Preset, seed: int) -> Rows:
    """The curves of the distance to the argmin, with errors and in families that do not hold q*."""
    curves = {
        f"{row['schedule']}{', base projected' if row['anchored'] else ''}": distances
        for row, distances in _with_errors(scale, seed)
        if row["what"] == "ratios" and "ᵗ" not in row["schedule"]
    }
    graded = _distances(*_family("graded", np.random.default_rng(seed)), scale.rounds)
    for name, distances in {**curves, "graded": graded, "random": _elsewhere(seed, scale.rounds)}.items():
        assert distances is not None
        # Rounds 1, 2, 3... and then sparser: as many as a logarithmic axis shows.
        for step in np.unique(np.geomspace(1, len(distances) - 1, 60).round().astype(int)):
            yield {"curve": name, "round": int(step), "distance": float(distances[step])}


def _distances(family: ExponentialFamily, correct: Mask, rounds: int) -> Floats | None:
    """From the nearest correct policy, round by round; None where the family has none."""
    nearest = projection.closest_optimal_policy(family, correct)
    if nearest is None:
        return None
    return projection.total_variation(projection.alternate(family, correct, rounds), nearest)


def _elsewhere(seed: int, rounds: int) -> Floats:
    """The distances of the first random family that comes to rest away from its argmin; some in four do."""
    for index in range(100):
        distances = _distances(*_family("random", np.random.default_rng([seed, index])), rounds)
        if (
            distances is not None
            and distances[-1] > 0.01
            and abs(distances[-1] - distances[len(distances) // 2]) < AGREE
        ):
            return distances
    raise AssertionError("no random family came to rest elsewhere")


# Prompts


def _prompts(kind: str, accuracy: float, prompts: int, rng: np.random.Generator) -> Floats:
    """Base policies on `prompts` prompts, (prompts, OUTCOMES), of that mean accuracy.

    "even": all correct outcomes of a prompt are equally likely, as ParityMNIST's pre-training asks for; "uneven": drawn
    from the flat Dirichlet distribution. Wrong outcomes alike.
    """
    quantiles = (np.arange(prompts) + 0.5) / prompts
    right = special.betaincinv(SPREAD * accuracy, SPREAD * (1 - accuracy), quantiles)[:, None]
    if kind == "even":
        among_correct = among_wrong = np.full((prompts, HALF), 1 / HALF)
    else:
        among_correct, among_wrong = (rng.dirichlet(np.ones(HALF), prompts) for _ in range(2))
    base = np.maximum(np.concatenate([right * among_correct, (1 - right) * among_wrong], axis=1), FLOOR)
    return np.asarray(base / base.sum(axis=1, keepdims=True))


def sft(scale: Preset, seed: int) -> Rows:
    """Where SFT ends on correct labels of various distributions: the excess KL and the total variation from q*."""
    rng = np.random.default_rng(seed)
    base = _prompts("uneven", MIDDLE, scale.prompts, rng)
    optimum = projection.i_projection(base, CORRECT)
    order = rng.permuted(np.tile(np.arange(HALF), (scale.prompts, 1)), axis=1)
    one, two, arbitrary = (np.zeros_like(base) for _ in range(3))
    np.put_along_axis(one, order[:, :1], 1.0, axis=1)
    np.put_along_axis(two, order[:, :2], 0.5, axis=1)
    arbitrary[:, CORRECT] = rng.dirichlet(np.ones(HALF), scale.prompts)
    ends = {
        "q*, the oracle": optimum,
        "uniform over the correct": np.broadcast_to(CORRECT / CORRECT.sum(), base.shape),
        "a random correct distribution": arbitrary,
        "two correct outcomes": two,
        "one correct outcome": one,
    }
    for labels, end in ends.items():
        yield {"policy": "softmax", "labels": labels, **_miss(end, base, optimum)}
    # In a family that cannot tell every outcome apart, SFT on the same labels ends at the nearest it can hold.
    family, correct = _family("R + 2", rng)
    targets = np.zeros((scale.families, OUTCOMES))
    targets[:, correct] = rng.dirichlet(np.ones(HALF), scale.families)
    nearest = projection.i_projection(family.base, correct)
    held = np.array([family.m_projection(target) for target in targets])
    labels = "a random correct distribution"
    yield {"policy": "3 statistics", "labels": labels, **_miss(held, family.base, nearest)}


def _miss(end: Floats, base: Floats, optimum: Floats) -> dict[str, float]:
    return {
        "excess": float((projection.kl(end, base) - projection.kl(optimum, base)).mean()),
        "total_variation": float(projection.total_variation(end, optimum).mean()),
    }


def gradients(scale: Preset, seed: int) -> Rows:
    """Every gradient variant from every base, stopped at a mean accuracy of UNTIL."""
    for kind in ("uneven", "even"):
        for accuracy in scale.accuracies:
            rng = np.random.default_rng([seed, round(100 * accuracy)])
            base = _prompts(kind, accuracy, scale.prompts, rng)
            setting = {"base": kind, "accuracy": accuracy}
            for name, follow in FLOWS.items():
                flow = follow(base, CORRECT, UNTIL)
                costs = {"time": flow.duration, **_costs(flow.end, base)}
                yield {**setting, "algorithm": EXACT[name], "group": None, **costs}
            for advantage, name in SAMPLED.items():
                for group in scale.groups:
                    path = flows.sampled_policy_gradient(base, CORRECT, advantage, group, LR, rng, until=UNTIL)
                    costs = {"time": LR * (len(path) - 1), **_costs(path[-1], base)}
                    yield {**setting, "algorithm": f"{name}, groups of {group}", "group": group, **costs}


def _costs(policy: Floats, base: Floats) -> dict[str, float]:
    """Means over prompts, in nats."""
    kl = float(projection.kl(policy, base).mean())
    excess = float(projection.excess_kl(policy, base, CORRECT).mean())
    return {
        "reached": float(projection.accuracy(policy, CORRECT).mean()),
        "kl": kl,
        "excess": excess,
        "share": excess / kl,
        "excess_forward": float(projection.excess_kl(base, policy, CORRECT).mean()),
    }


def m_steps(scale: Preset, seed: int) -> Rows:
    """How long an M-step by gradient has to be before the alternation is the projection."""
    base = _prompts("uneven", MIDDLE, scale.prompts, np.random.default_rng([seed, 50]))
    for gradient_steps in STEPS_PER_ROUND:
        end = flows.gradient_alternation(base, CORRECT, gradient_steps, M_STEP_LR, UNTIL)
        yield {"gradient_steps": gradient_steps, **_costs(end, base)}


# Networks


def networks(scale: Preset, seed: int) -> Rows:
    """Small networks: where the alternation ends, the nearest policy that the class was found to hold, the minimum."""
    for hidden in scale.hidden:
        for index in range(scale.networks):
            yield {"hidden": hidden, **_network(hidden, np.random.default_rng([seed, index, hidden]))}


def _network(hidden: int, rng: np.random.Generator) -> dict[str, Any]:
    """A tanh network on eight prompts with five outcomes, two of them correct."""
    prompts, outcomes = 8, 5
    network = Network(rng.normal(size=(prompts, 2)), hidden, outcomes)
    correct = rng.permuted(np.tile(np.arange(outcomes) < 2, (prompts, 1)), axis=1)
    base = rng.normal(size=network.size)
    pi0 = network.policy(base)
    end, rounds = network.alternate(base, correct, NETWORK_UNTIL)
    reached = network.policy(end)
    accuracy = float(projection.accuracy(reached, correct).mean())
    starts = [end, network.m_projection(projection.i_projection(pi0, correct), base)]
    starts.append(base + rng.normal(size=network.size))
    best = network.policy(network.closest(base, correct, accuracy, starts))
    gradient = network.policy(network.policy_gradient(base, correct, min(accuracy, NETWORK_UNTIL)))
    # The natural gradient of free logits ends at the nearest of all policies of that mean accuracy.
    minimum = flows.natural_gradient_flow(pi0, correct, min(accuracy, 1 - 1e-9)).end
    kl_end, kl_best, kl_minimum = (float(projection.kl(policy, pi0).mean()) for policy in (reached, best, minimum))
    return {
        "rounds": rounds,
        "accuracy": accuracy,
        "gap_alternation": kl_end - kl_best,
        "gap_class": kl_best - kl_minimum,
        "gradient_accuracy": float(projection.accuracy(gradient, correct).mean()),
        "excess_alternation": float(projection.excess_kl(reached, pi0, correct).mean()),
        "excess_gradient": float(projection.excess_kl(gradient, pi0, correct).mean()),
    }
