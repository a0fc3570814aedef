"""The theory, computed: does alternating the paper's two projections end at the KL-minimal policy, and does RL?

`theory_study` computes every number on small finite sets, in seconds, and `describe` makes them a study's JSON, which
the report draws. `rlrazor.projection` says why the numbers come out so.
"""

import platform
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import polars as pl
from scipy import special

from rlrazor import bounds, projection
from rlrazor.analysis import law
from rlrazor.errors import RazorError
from rlrazor.projection import ExponentialFamily, Floats, Mask, Network
from rlrazor.runs.records import JSON

NAME = "theory"
RL_METHODS = {
    "grpo": "GRPO",
    "dr-grpo": "Dr. GRPO",
    "reinforce": "1-0 REINFORCE",
    "grpo+kl": "GRPO + KL",
    "kl-dpg": "KL-DPG",
}
SHARE_COLUMNS = ("kl_reverse", "kl_forward", "kl_reverse_within_correct", "kl_forward_within_correct")

FIRST_CHECK = np.array([0.2, 0.1, 0.7])  # the base of the picture: two correct outcomes, one wrong
FIRST_CORRECT = np.array([True, True, False])
FIRST_ACCURACIES = (0.9, 0.97, 0.99, 0.999, 0.9999, 0.99999)
FIRST_TIME = 4000.0

OUTCOMES, UNTIL = 10, 0.97  # ParityMNIST's ten labels, five of them correct; and the accuracy at which RL is compared
CORRECT = np.arange(OUTCOMES) < OUTCOMES // 2
SPREAD = 20.0  # prompts' base accuracies are Beta(SPREAD p, SPREAD (1 - p)): for p = .5, a standard deviation of .11
FLOOR = 1e-4  # least base probability of an outcome
LR, MOST_STEPS = 0.5, 20_000
STEPS_PER_ROUND = (1, 10, 100, 1000)
M_STEP_LR = 0.1
ERROR = 0.3
NETWORK_UNTIL = 0.99
AGREE = 1e-6


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


PRESETS: dict[str, Preset] = {
    "quick": Preset(4, 32, (0.1, 0.5, 0.9), (8,), 200, (3,), 1),
    "paper": Preset(30, 128, (0.1, 0.3, 0.5, 0.7, 0.9), (8, 64), 1000, (3, 6), 4),
}

FLOWS: Mapping[str, str] = {
    "policy-gradient": "policy gradient, exact",
    "grpo": "GRPO, exact",
    "kl-dpg": "KL-DPG, exact",
    "natural-gradient": "natural gradient, exact",
}
SAMPLED: Mapping[projection.Advantage, str] = {
    "dr-grpo": "policy gradient",
    "grpo": "GRPO",
    "reinforce": "1-0 REINFORCE",
    "kl-dpg": "KL-DPG",
}

Rows = list[dict[str, Any]]


def check(preset: str, seeds: Sequence[int]) -> None:
    """Raise RazorError for an unknown preset or seeds that are not different whole numbers from 0 up."""
    if preset not in PRESETS:
        raise RazorError(f"Unknown preset {preset!r:.60}. Presets: {', '.join(sorted(PRESETS))}.")
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise RazorError("Seeds have to be different whole numbers, not below 0, and at least one.")
    if len(seeds) > bounds.MOST_VALUES:
        raise RazorError(f"There are {len(seeds):,} seeds, and {bounds.MOST_VALUES:,} are the most.")
    for seed in seeds:
        bounds.check("seeds", seed)


def theory_study(
    preset: str,
    seeds: Sequence[int],
    sweep: pl.DataFrame | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, pl.DataFrame]:
    """Compute every number of the study: name -> table, most with a row per seed.

    `sweep` is a sweep's table, for `share_within_correct`. `progress` is told before each part its name, how many are
    done and how many there are. KL is in nats. Raises RazorError as `check` does.
    """
    check(preset, seeds)
    scale = PRESETS[preset]
    parts: Mapping[str, Callable[[], dict[str, pl.DataFrame]]] = {
        "three outcomes": lambda: _three_outcomes(seeds),
        "alternation": lambda: {"alternation": _table(_alternation(scale, seeds))},
        "inexact M-steps": lambda: _inexact(scale, seeds),
        "SFT": lambda: {"sft": _table(_sft(scale, seeds))},
        "gradients": lambda: {"gradients": _table(_gradients(scale, seeds))},
        "M-steps by gradient": lambda: {"m_steps": _table(_m_steps(scale, seeds))},
        "networks": lambda: {"networks": _table(_networks(scale, seeds))},
        "ParityMNIST": lambda: {"parity": share_within_correct(sweep)},
    }
    study: dict[str, pl.DataFrame] = {}
    for done, (name, compute) in enumerate(parts.items()):
        if progress:
            progress(name, done, len(parts))
        study |= compute()
    return study


def share_within_correct(
    table: pl.DataFrame | None, at_least: float = UNTIL, methods: Collection[str] = tuple(RL_METHODS)
) -> pl.DataFrame:
    """How much of the KL that RL pays is among correct outputs, where a KL-minimal policy pays none.

    By the chain rule KL(pi || pi0) is that of the split correct/wrong, plus pi(correct) KL(pi(.|correct) ||
    pi0(.|correct)), plus the same for wrong outputs; likewise for KL(pi0 || pi). A row per method and seed, means over
    the distinct checkpoints of a sweep's table with new >= `at_least`: `kl_reverse`, `kl_reverse_within_correct` (nats)
    and `share_reverse`, the one over the other; the same for forward; and `checkpoints`. Empty for no table, or one
    that lacks the columns or such checkpoints.
    """
    schema = {
        "method": pl.String,
        "seed": pl.Int64,
        "checkpoints": pl.Int64,
        **dict.fromkeys((*SHARE_COLUMNS, "share_reverse", "share_forward"), pl.Float64),
    }
    needed = {"method", "seed", "new", "trajectory", "step", *SHARE_COLUMNS}
    if table is None or not needed <= set(table.columns):
        return pl.DataFrame(schema=schema)
    reached = law.distinct(table).filter(
        pl.col("method").is_in(methods),
        pl.col("new") >= at_least,
        *(pl.col(name).cast(pl.Float64).is_finite() for name in SHARE_COLUMNS),
    )
    means = reached.group_by("method", "seed", maintain_order=True).agg(
        pl.len().alias("checkpoints"), *(pl.col(name).mean() for name in SHARE_COLUMNS)
    )
    shares = means.with_columns(
        (pl.col(f"kl_{way}_within_correct") / pl.col(f"kl_{way}")).alias(f"share_{way}")
        for way in ("reverse", "forward")
    )
    return shares.select(pl.col(name).cast(kind) for name, kind in schema.items()).sort("method", "seed")


def describe(study: Mapping[str, pl.DataFrame], preset: str, seeds: Sequence[int], command: str) -> JSON:
    """The study as JSON, from which the report draws: what a run folder's studies/theory.json holds."""
    return {
        "name": NAME,
        "preset": preset,
        "command": command,
        "seeds": list(seeds),
        "labels": {},
        "config": asdict(PRESETS[preset]),
        "data": None,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("rlrazor", "scipy")}},
        "tables": {name: table.to_dicts() for name, table in study.items()},
    }


# The parts


def _three_outcomes(seeds: Sequence[int]) -> dict[str, pl.DataFrame]:
    """The paths on the simplex, and the first check: the ratio of two correct outcomes along policy gradient."""
    base, correct = FIRST_CHECK, FIRST_CORRECT
    plain = projection.policy_gradient_flow(base, correct, FIRST_ACCURACIES[-1])
    checks = []
    at_time = float(projection.accuracy(plain.policy(FIRST_TIME), correct))
    for accuracy in sorted({*FIRST_ACCURACIES, at_time}):
        exact = projection.policy_gradient_at(base, correct, accuracy)
        flow = projection.policy_gradient_flow(base, correct, accuracy)
        normalised = projection.policy_gradient_flow(base, correct, accuracy, "std")
        checks.append(
            {
                "accuracy": accuracy,
                "ratio": exact[0] / exact[1],
                "time": flow.duration,
                "time_normalised": normalised.duration,
                "solver_difference": max(np.abs(flow.end - exact).max(), np.abs(normalised.end - exact).max()),
                "derivative_error": _derivative_error(flow),
                "excess": float(projection.excess_kl(exact, base, correct)),
                "excess_forward": float(projection.excess_forward_kl(exact, base, correct)),
            }
        )
    optimum = projection.i_projection(base, correct)
    labels = np.array([0.1, 0.9, 0.0])
    until = 0.999
    paths = {
        "policy-gradient": projection.policy_gradient_flow(base, correct, until).along(80),
        "grpo": projection.policy_gradient_flow(base, correct, until, "std").along(80),
        "natural-gradient": projection.natural_gradient_flow(base, correct, until).along(80),
        "kl-dpg": projection.sft_flow(base, optimum, correct, until).along(80),
        "sft": projection.sft_flow(base, labels, correct, until).along(80),
    }
    for seed in seeds[:3]:
        rng = np.random.default_rng(seed)
        sampled = projection.sampled_policy_gradient(base, correct, "grpo", 8, 0.25, MOST_STEPS, rng, 0.995)
        paths[f"sampled {seed}"] = sampled
    rows = [
        {"path": name, **dict(zip("abc", np.round(point, 4).tolist(), strict=True))}
        for name, path in paths.items()
        for point in path
    ]
    return {"first_check": _table(checks), "paths": _table(rows)}


def _derivative_error(flow: projection.Flow) -> float:
    """The largest miss of d/dt log(pi_a/pi_b) = (pi_a - pi_b)(1 - E[R]), by central differences along the flow."""
    h = 1e-3
    misses = []
    for time in np.linspace(0.05, 0.95, 19) * flow.duration:
        before, now, after = (flow.policy(at) for at in (time - h, time, time + h))
        slope = (np.log(after[0] / after[1]) - np.log(before[0] / before[1])) / (2 * h)
        misses.append(float(abs(slope - (now[0] - now[1]) * now[2])))
    return max(misses)


def _alternation(scale: Preset, seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Random families, their alternation's end, and the solver's argmin."""
    for seed in seeds:
        for kind in ("softmax", "R + 1", "R + 2", "R + 4", "graded", "random"):
            for index in range(scale.families):
                rng = np.random.default_rng([seed, index])
                family, correct = _family(kind, rng)
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
                    "seed": seed,
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
        levels = np.repeat([2.0, 1.0, 0.0], (3, 4, 3))
        return ExponentialFamily(base, levels[:, None]), np.arange(OUTCOMES) < 5
    others = int(kind.removeprefix("R + "))
    statistics = np.column_stack([correct, rng.normal(size=(OUTCOMES, others))])
    # Mixed, so that R is in the span without being one of the statistics.
    return ExponentialFamily(base, statistics @ rng.normal(size=(others + 1, others + 1))), correct


_SCHEDULES: Mapping[str, Callable[[int], float]] = {
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


def _inexact(scale: Preset, seeds: Sequence[int]) -> dict[str, pl.DataFrame]:
    """M-steps with errors of a given size, and the curves of the distance to the argmin."""
    rows: Rows = []
    curves: Rows = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        family, correct = _family("R + 2", rng)
        nearest = projection.closest_correct_policy(family.base, correct)
        wrong = projection.i_projection(family.base, ~correct)
        # A direction along which the correct outcomes differ, by one standard deviation under q*.
        direction: Floats = rng.normal(size=(family.statistics.shape[1],))
        along = family.statistics @ direction
        direction = direction / np.sqrt(nearest @ (along - nearest @ along) ** 2)
        for what, schedule, anchored in _ERRORS:
            size = _SCHEDULES[schedule]
            inexact = _error(family, size, direction if what == "ratios" else None, wrong)
            policies = projection.alternate(family, correct, scale.rounds, error=inexact, anchored=anchored)
            distances = projection.total_variation(policies, nearest)
            total = sum(size(step) for step in range(1, scale.rounds + 1))
            shifted = family.tilt(nearest, total * direction)
            rows.append(
                {
                    "what": what,
                    "schedule": schedule,
                    "anchored": anchored,
                    "seed": seed,
                    "sum": total,
                    **{f"after_{step}": float(distances[step]) for step in (10, 100, scale.rounds)},
                    "end": float(distances[-1]),
                    # What the sum of the errors foretells, where they stay.
                    "foretold": float(projection.total_variation(shifted, nearest))
                    if what == "ratios" and not anchored
                    else None,
                }
            )
            if seed == seeds[0] and what == "ratios" and "ᵗ" not in schedule:
                curves += _curve(f"{schedule}{', base projected' if anchored else ''}", distances)
    curves += _curve("graded", _distances(*_family("graded", np.random.default_rng(seeds[0])), scale.rounds))
    curves += _curve("random", _elsewhere(seeds[0], scale.rounds))
    return {"inexact": _table(rows), "convergence": _table(curves)}


def _error(
    family: ExponentialFamily, size: Callable[[int], float], shift: Floats | None, wrong: Floats
) -> Callable[[int, Floats], Floats]:
    """An M-step's error: the exact policy moved along `shift` in natural parameters, or mixed with wrong outcomes."""

    def inexact(step: int, exact: Floats) -> Floats:
        if shift is not None:
            return family.tilt(exact, size(step) * shift)
        return (1 - size(step)) * exact + size(step) * wrong

    return inexact


def _distances(family: ExponentialFamily, correct: Mask, rounds: int) -> Floats:
    nearest = projection.closest_optimal_policy(family, correct)
    assert nearest is not None
    return projection.total_variation(projection.alternate(family, correct, rounds), nearest)


def _elsewhere(seed: int, rounds: int) -> Floats:
    """The distances of the first random family that comes to rest away from its argmin; some in four do."""
    for index in range(100):
        family, correct = _family("random", np.random.default_rng([seed, index]))
        if projection.closest_optimal_policy(family, correct) is not None:
            distances = _distances(family, correct, rounds)
            if distances[-1] > 0.01 and abs(distances[-1] - distances[len(distances) // 2]) < AGREE:
                return distances
    raise AssertionError("no random family came to rest elsewhere")


def _curve(name: str, distances: Floats) -> Rows:
    """Rounds 1, 2, 3... and then sparser: as many as a logarithmic axis shows."""
    rounds = np.unique(np.geomspace(1, len(distances) - 1, 60).round().astype(int))
    return [{"curve": name, "round": int(step), "distance": float(distances[step])} for step in rounds]


def _sft(scale: Preset, seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Where SFT ends on correct labels of various distributions: the excess KL and the total variation from q*."""
    for seed in seeds:
        rng = np.random.default_rng(seed)
        base = _prompts("uneven", 0.5, scale.prompts, rng)
        optimum = projection.i_projection(base, CORRECT)
        order = rng.permuted(np.tile(np.arange(OUTCOMES // 2), (scale.prompts, 1)), axis=1)
        rows = np.arange(scale.prompts)
        one, two = np.zeros_like(base), np.zeros_like(base)
        one[rows, order[:, 0]] = 1.0
        two[rows[:, None], order[:, :2]] = 0.5
        arbitrary = np.zeros_like(base)
        arbitrary[:, CORRECT] = rng.dirichlet(np.ones(OUTCOMES // 2), scale.prompts)
        uniform = np.broadcast_to(CORRECT / CORRECT.sum(), base.shape)
        labels: dict[str, Floats] = {
            "q*, the oracle": optimum,
            "uniform over the correct": uniform,
            "a random correct distribution": arbitrary,
            "two correct outcomes": two,
            "one correct outcome": one,
        }
        for name, target in labels.items():
            yield _sft_row("softmax", name, seed, target, base, optimum)
        # In a family that cannot tell every outcome apart, SFT on the same labels ends at the nearest it can hold.
        family, correct = _family("R + 2", rng)
        q = projection.i_projection(family.base, correct)
        ends = []
        for _ in range(scale.families):
            target = np.zeros(OUTCOMES)
            target[correct] = rng.dirichlet(np.ones(OUTCOMES // 2))
            ends.append(family.m_projection(target))
        yield _sft_row("3 statistics", "a random correct distribution", seed, np.array(ends), family.base, q)


def _sft_row(policy: str, labels: str, seed: int, end: Floats, base: Floats, optimum: Floats) -> dict[str, Any]:
    return {
        "policy": policy,
        "labels": labels,
        "seed": seed,
        "excess": float((projection.kl(end, base) - projection.kl(optimum, base)).mean()),
        "total_variation": float(projection.total_variation(end, optimum).mean()),
    }


def _prompts(kind: str, accuracy: float, prompts: int, rng: np.random.Generator) -> Floats:
    """Base policies on `prompts` prompts, (prompts, OUTCOMES), of that mean accuracy.

    "even": all correct outcomes of a prompt are equally likely, as ParityMNIST's pre-training asks for; "uneven": drawn
    from the flat Dirichlet distribution. Wrong outcomes alike.
    """
    quantiles = (np.arange(prompts) + 0.5) / prompts
    right = special.betaincinv(SPREAD * accuracy, SPREAD * (1 - accuracy), quantiles)[:, None]
    half = OUTCOMES // 2
    given = [np.full((prompts, half), 1 / half) if kind == "even" else rng.dirichlet(np.ones(half), prompts)] * 2
    if kind == "uneven":
        given[1] = rng.dirichlet(np.ones(half), prompts)
    base = np.maximum(np.concatenate([right * given[0], (1 - right) * given[1]], axis=1), FLOOR)
    return np.asarray(base / base.sum(axis=1, keepdims=True))


def _gradients(scale: Preset, seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Every gradient variant from every base, stopped at a mean accuracy of UNTIL."""
    for seed in seeds:
        for kind in ("uneven", "even"):
            for accuracy in scale.accuracies:
                rng = np.random.default_rng([seed, round(100 * accuracy)])
                base = _prompts(kind, accuracy, scale.prompts, rng)
                optimum = projection.i_projection(base, CORRECT)
                flows = {
                    "policy-gradient": projection.policy_gradient_flow(base, CORRECT, UNTIL),
                    "grpo": projection.policy_gradient_flow(base, CORRECT, UNTIL, "std"),
                    "kl-dpg": projection.sft_flow(base, optimum, CORRECT, UNTIL),
                    "natural-gradient": projection.natural_gradient_flow(base, CORRECT, UNTIL),
                }
                setting = {"base": kind, "accuracy": accuracy, "seed": seed}
                for name, flow in flows.items():
                    yield {
                        **setting,
                        "algorithm": FLOWS[name],
                        "group": None,
                        "time": flow.duration,
                        **_costs(flow.end, base),
                    }
                for advantage, name in SAMPLED.items():
                    for group in scale.groups:
                        path = projection.sampled_policy_gradient(
                            base, CORRECT, advantage, group, LR, MOST_STEPS, rng, UNTIL
                        )
                        yield {
                            **setting,
                            "algorithm": f"{name}, groups of {group}",
                            "group": group,
                            "time": LR * (len(path) - 1),
                            **_costs(path[-1], base),
                        }


def _costs(policy: Floats, base: Floats) -> dict[str, float]:
    """Means over prompts, in nats."""
    kl = float(projection.kl(policy, base).mean())
    excess = float(projection.excess_kl(policy, base, CORRECT).mean())
    return {
        "reached": float(projection.accuracy(policy, CORRECT).mean()),
        "kl": kl,
        "excess": excess,
        "share": excess / kl,
        "excess_forward": float(projection.excess_forward_kl(policy, base, CORRECT).mean()),
    }


def _m_steps(scale: Preset, seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
    """How long an M-step by gradient has to be before the alternation is the projection."""
    for seed in seeds:
        base = _prompts("uneven", 0.5, scale.prompts, np.random.default_rng([seed, 50]))
        for gradient_steps in STEPS_PER_ROUND:
            end = projection.gradient_alternation(base, CORRECT, gradient_steps, M_STEP_LR, UNTIL)
            yield {"gradient_steps": gradient_steps, "seed": seed, **_costs(end, base)}


def _networks(scale: Preset, seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Small networks: where the alternation ends, the nearest policy that the class was found to hold, the minimum."""
    for hidden in scale.hidden:
        for seed in seeds:
            for index in range(scale.networks):
                rng = np.random.default_rng([seed, index, hidden])
                yield {"hidden": hidden, "seed": seed, **_network(hidden, rng)}


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
    minimum = projection.natural_gradient_flow(pi0, correct, min(accuracy, 1 - 1e-9)).end
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


def _table(rows: Iterator[dict[str, Any]] | Rows) -> pl.DataFrame:
    return pl.DataFrame(list(rows), infer_schema_length=None)
