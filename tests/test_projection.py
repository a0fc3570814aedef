"""The projections against closed forms, scipy's solvers and brute force; the flows against their invariants."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import optimize, stats
from scipy.integrate import solve_ivp  # type: ignore[attr-defined]  # scipy exports it dynamically
from scipy.special import expit, logit, softmax

from rlrazor import objectives
from rlrazor.errors import RazorError
from rlrazor.studies.theory import flows, projection
from rlrazor.studies.theory.flows import FLOWS, Advantage
from rlrazor.studies.theory.network import Network
from rlrazor.studies.theory.projection import ExponentialFamily

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

policy_gradient_flow = FLOWS["policy-gradient"]
BASE = np.array([0.2, 0.1, 0.7])
CORRECT = np.array([True, True, False])
SQUARE = ExponentialFamily(
    np.array([0.3, 0.1, 0.1, 0.2, 0.3]), np.array([[0.0, 0], [1, 0], [1, 1], [0, 1], [0.5, 0.5]])
)


def random_case(seed: int, outcomes: int = 7, right: int = 4) -> tuple[Floats, Mask, np.random.Generator]:
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.full(outcomes, 2.0)), rng.permutation(np.arange(outcomes) < right), rng


# Distributions


def test_kl_is_scipys_entropy() -> None:
    p, q = np.random.default_rng(0).dirichlet(np.ones(4), (2, 3))
    np.testing.assert_allclose(projection.kl(p, q), stats.entropy(p, q, axis=-1), rtol=1e-12)
    assert projection.kl(np.array([0.5, 0.5, 0.0]), np.array([0.25, 0.25, 0.5])) == pytest.approx(np.log(2))
    assert projection.kl(np.array([0.5, 0.5]), np.array([1.0, 0.0])) == np.inf


@pytest.mark.parametrize("seed", range(4))
def test_i_projection_is_what_the_convex_solver_finds(seed: int) -> None:
    base, correct, rng = random_case(seed)
    projected = projection.i_projection(base, correct)
    np.testing.assert_allclose(projected, projection.closest_correct_policy(base, correct), atol=1e-7)
    assert projection.kl(projected, base) == pytest.approx(-np.log(base[correct].sum()))
    others = np.zeros((1000, len(base)))
    others[:, correct] = rng.dirichlet(np.ones(correct.sum()), 1000)
    assert (projection.kl(others, base) > projection.kl(projected, base)).all()


def test_what_is_never_correct_has_no_projection() -> None:
    with pytest.raises(RazorError, match="base"):
        projection.i_projection(np.array([0.0, 1.0]), np.array([True, False]))


@pytest.mark.parametrize("seed", range(3))
def test_excess_is_above_the_least_kl_of_that_accuracy(seed: int) -> None:
    base, correct, rng = random_case(seed)
    policy = rng.dirichlet(np.ones(len(base)))
    reached = policy[correct].sum()
    least = optimize.minimize(
        lambda p: stats.entropy(p / p.sum(), base),
        base,
        bounds=[(1e-9, 1)] * len(base),
        constraints=[
            {"type": "eq", "fun": lambda p: p.sum() - 1},
            {"type": "eq", "fun": lambda p: p[correct].sum() - reached},
        ],
        method="SLSQP",
        options={"ftol": 1e-14},
    )
    excess = projection.excess_kl(policy, base, correct)
    assert excess == pytest.approx(stats.entropy(policy, base) - least.fun, abs=1e-6)


def test_excess_of_a_correct_policy_counts_from_minus_log_of_the_bases_accuracy() -> None:
    likeliest = np.array([1.0, 0, 0])
    assert projection.excess_kl(likeliest, BASE, CORRECT) == pytest.approx(-np.log(0.2) + np.log(0.3))
    assert projection.excess_kl(np.array([2 / 3, 1 / 3, 0]), BASE, CORRECT) == pytest.approx(0, abs=1e-15)
    assert projection.excess_kl(BASE, likeliest, CORRECT) == np.inf


# Exponential families


@pytest.mark.parametrize("seed", range(4))
def test_m_projection_maximises_the_likelihood(seed: int) -> None:
    base, _, rng = random_case(seed)
    family = ExponentialFamily(base, rng.normal(size=(len(base), 3)))
    target = rng.dirichlet(np.ones(len(base)))
    found = optimize.minimize(lambda theta: -target @ np.log(family.tilt(base, theta)), np.zeros(3), tol=1e-12)
    policy = family.m_projection(target)
    np.testing.assert_allclose(policy, family.tilt(base, found.x), atol=1e-6)
    np.testing.assert_allclose(policy @ family.statistics, target @ family.statistics, atol=1e-11)
    np.testing.assert_allclose(family.m_projection(target, family.tilt(base, rng.normal(size=3))), policy, atol=1e-11)


def test_m_projection_reaches_the_limits_of_the_family() -> None:
    edge = SQUARE.m_projection(np.array([0.25, 0.75, 0, 0, 0]))
    np.testing.assert_allclose(edge, [0.25, 0.75, 0, 0, 0], atol=1e-12)
    np.testing.assert_allclose(
        edge, SQUARE.tilt(SQUARE.base, np.array([np.log(0.75 / 0.1) - np.log(0.25 / 0.3), -60])), atol=1e-12
    )
    np.testing.assert_allclose(SQUARE.m_projection(np.array([0, 0, 1.0, 0, 0])), [0, 0, 1, 0, 0], atol=1e-12)
    diagonal = SQUARE.m_projection(
        np.array([0.5, 0, 0.5, 0, 0])
    )  # not a face: the centre and the other corners come along
    assert (diagonal > 0.05).all()


def test_faces_of_a_square() -> None:
    corners = [[0], [1], [2], [3], [0, 1], [1, 2], [2, 3], [3, 0]]
    for size in range(1, 5):
        for support in itertools.combinations(range(5), size):
            chosen = np.isin(np.arange(5), support)
            is_face = sorted(support) in [sorted(corner) for corner in corners]
            assert (SQUARE.face(chosen) == chosen).all() == is_face, support
    assert SQUARE.face(np.array([False, False, False, False, True])).all()


def test_which_correct_outcomes_a_family_can_hold() -> None:
    edge, corner = np.array([1, 1, 0, 0, 0], bool), np.array([1, 1, 1, 0, 0], bool)
    assert SQUARE.realises(edge)
    assert not SQUARE.realises(corner)
    assert sorted(tuple(face) for face in SQUARE.correct_faces(corner)) == sorted(
        [(True, True, False, False, False), (False, True, True, False, False)]
    )
    # Of the two edges that are always correct, the one of more base mass: .3 + .1 against .1 + .1.
    nearest = projection.closest_optimal_policy(SQUARE, corner)
    assert nearest is not None
    np.testing.assert_allclose(nearest, [0.75, 0.25, 0, 0, 0], atol=1e-7)
    assert projection.closest_optimal_policy(SQUARE, np.array([0, 0, 0, 0, 1], bool)) is None


def test_closest_optimal_policy_is_the_best_of_a_grid_of_limits() -> None:
    rng = np.random.default_rng(3)
    family = ExponentialFamily(rng.dirichlet(np.ones(6)), rng.normal(size=(6, 2)))
    correct = np.array([1, 1, 1, 1, 0, 0], bool)
    nearest = projection.closest_optimal_policy(family, correct)
    assert nearest is not None
    angles = np.linspace(0, 2 * np.pi, 1000, endpoint=False)
    far = np.stack([np.cos(angles), np.sin(angles)], axis=1)[:, None] * np.geomspace(1, 500, 100)[:, None]
    policies = softmax(np.log(family.base) + far.reshape(-1, 2) @ family.statistics.T, axis=1)
    good = policies[policies[:, correct].sum(axis=1) > 1 - 1e-4]
    least = projection.kl(good, family.base).min()
    assert least == pytest.approx(float(projection.kl(nearest, family.base)), abs=0.02)


# The alternation


def with_reward(seed: int, others: int) -> tuple[ExponentialFamily, Mask]:
    base, correct, rng = random_case(seed)
    mixed = np.column_stack([correct, rng.normal(size=(len(base), others))]) @ rng.normal(size=(others + 1, others + 1))
    return ExponentialFamily(base, mixed), correct


@pytest.mark.parametrize("others", [0, 1, 2, 4])
@pytest.mark.parametrize("seed", range(3))
def test_alternation_ends_at_the_solvers_argmin_where_the_family_holds_it(seed: int, others: int) -> None:
    family, correct = with_reward(seed, others)
    assert family.realises(correct)
    policies = projection.alternate(family, correct, 5)
    nearest = projection.closest_correct_policy(family.base, correct)
    for policy in policies[1:]:  # one exact round is all it takes
        np.testing.assert_allclose(policy, nearest, atol=1e-6)


def test_alternation_takes_many_rounds_to_a_face_whose_outcomes_look_alike() -> None:
    family = ExponentialFamily(np.array([0.1, 0.05, 0.2, 0.25, 0.4]), np.array([[2.0], [2], [1], [1], [0]]))
    correct = np.array([1, 1, 1, 0, 0], bool)
    assert not family.realises(correct)
    distances = projection.total_variation(projection.alternate(family, correct, 60), np.array([2 / 3, 1 / 3, 0, 0, 0]))
    assert distances[5] > 1e-2
    assert distances[-1] < 1e-6


def test_alternation_may_end_on_a_farther_face() -> None:
    family = ExponentialFamily(np.array([0.35, 0.4, 0.25]), np.array([[-1.0], [0], [2]]))
    correct = np.array([True, False, True])
    nearest = projection.closest_optimal_policy(family, correct)
    assert nearest is not None
    np.testing.assert_allclose(nearest, [1, 0, 0], atol=1e-9)  # -log .35 nats away, the other -log .25
    np.testing.assert_allclose(projection.alternate(family, correct, 60)[-1], [0, 0, 1], atol=1e-9)


def test_alternation_may_end_elsewhere_on_the_nearest_face() -> None:
    # Outcome 2 is correct but no limit of the family; while it is given up it drags the ratio of 0 and 1 along.
    statistics = np.array([[1.0, 0], [1, 1], [0.5, 0.9], [0, 0], [0, 1]])
    family = ExponentialFamily(np.array([0.1, 0.1, 0.4, 0.2, 0.2]), statistics)
    correct = np.array([1, 1, 1, 0, 0], bool)
    end = projection.alternate(family, correct, 300)[-1]
    assert projection.accuracy(end, correct) > 1 - 1e-4
    assert [list(face) for face in family.correct_faces(correct)] == [[True, True, False, False, False]]
    assert projection.total_variation(end, np.array([0.5, 0.5, 0, 0, 0])) > 0.1


@pytest.mark.parametrize("seed", range(5))
def test_accuracy_never_falls_whatever_the_family(seed: int) -> None:
    base, correct, rng = random_case(seed, outcomes=8)
    family = ExponentialFamily(base, rng.normal(size=(8, 2)))
    reached = projection.accuracy(projection.alternate(family, correct, 40), correct)
    assert (np.diff(reached) > -1e-12).all()
    assert reached[-1] > reached[0]


@pytest.mark.parametrize("schedule", [lambda t: 0.3 / t**2, lambda t: 0.3 / t, lambda t: (-1) ** t / t])
def test_errors_along_the_correct_outcomes_add_up(schedule: Callable[[int], float]) -> None:
    family, correct = with_reward(0, 2)
    direction = np.array([0.5, -1.0, 0.7])
    rounds = 40
    sizes = [schedule(step) for step in range(1, rounds + 1)]

    def error(step: int, exact: Floats) -> Floats:
        return family.tilt(exact, schedule(step) * direction)

    optimum = projection.i_projection(family.base, correct)
    end = projection.alternate(family, correct, rounds, error=error)[-1]
    np.testing.assert_allclose(end, family.tilt(optimum, sum(sizes) * direction), atol=1e-9)
    assert projection.total_variation(end, optimum) > 0.01
    # Projecting the base anew forgets all errors but the last.
    anchored = projection.alternate(family, correct, rounds, error=error, anchored=True)[-1]
    np.testing.assert_allclose(anchored, family.tilt(optimum, sizes[-1] * direction), atol=1e-9)


def test_errors_in_accuracy_alone_only_have_to_vanish() -> None:
    family, correct = with_reward(1, 1)
    wrong = projection.i_projection(family.base, ~correct)
    optimum = projection.i_projection(family.base, correct)
    ends = [
        projection.alternate(family, correct, 30, error=lambda t, exact, e=e: (1 - e(t)) * exact + e(t) * wrong)[-1]  # type: ignore[misc]
        for e in (lambda t: 0.3 / t, lambda t: 0.3)
    ]
    np.testing.assert_allclose(projection.total_variation(np.array(ends), optimum), [0.01, 0.3], rtol=1e-9)


# Gradient flows


def by_lsoda(base: Floats, correct: Mask, time: float) -> Floats:
    """The flow of E[R], integrated by another method and with no code of the module."""

    def velocity(_: float, theta: Floats) -> Floats:
        policy = softmax(theta)
        return np.asarray(policy * (correct - policy @ correct))

    solved = solve_ivp(velocity, (0, time), np.log(base), method="LSODA", rtol=1e-11, atol=1e-12)
    return np.asarray(softmax(solved.y[:, -1]))


def test_the_likelier_outcome_gains_by_the_formula() -> None:
    flow = policy_gradient_flow(BASE, CORRECT, 0.999)
    for time in np.linspace(0.1, 0.9, 9) * flow.duration:
        before, now, after = (flow.policy(time + shift) for shift in (-1e-3, 0, 1e-3))
        slope = (np.log(after[0] / after[1]) - np.log(before[0] / before[1])) / 2e-3
        assert slope == pytest.approx((now[0] - now[1]) * (1 - now[:2].sum()), abs=1e-8)


def test_the_ratio_118_is_where_one_stops_not_where_it_ends() -> None:
    after = by_lsoda(BASE, CORRECT, 4000)
    assert after[0] / after[1] == pytest.approx(118.22, abs=0.01)
    np.testing.assert_allclose(flows.policy_gradient_at(BASE, CORRECT, after[:2].sum()), after, atol=1e-8)
    flow = policy_gradient_flow(BASE, CORRECT, after[:2].sum())
    assert flow.duration == pytest.approx(4000, rel=1e-5)
    later = flows.policy_gradient_at(BASE, CORRECT, 1 - 1e-10)
    assert later[0] / later[1] > 1e5
    assert projection.kl(later, BASE) == pytest.approx(-np.log(0.2), abs=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_closed_form_is_the_flow(seed: int) -> None:
    base, correct, _ = random_case(seed)
    for time in (1.0, 20.0, 200.0):
        policy = by_lsoda(base, correct, time)
        np.testing.assert_allclose(flows.policy_gradient_at(base, correct, policy[correct].sum()), policy, atol=1e-7)
        # 1/w differs by constants within the correct and within the wrong outcomes, for some scale of w = Z pi.
        (scale, *_), residual, *_ = np.linalg.lstsq(
            np.column_stack([1 / policy, correct, ~correct]), 1 / base, rcond=None
        )
        assert residual[0] < 1e-8
        assert np.sum(np.log(policy / scale)) == pytest.approx(np.log(base).sum())


def test_a_tie_stays_a_tie_and_the_rest_is_given_up() -> None:
    base = np.array([0.2, 0.2, 0.1, 0.3, 0.2])
    end = flows.policy_gradient_at(base, np.array([1, 1, 1, 0, 0], bool), 1 - 1e-9)
    assert end[0] == pytest.approx(0.5, abs=1e-3)
    assert end[0] == pytest.approx(end[1], rel=1e-12)


def test_grpo_takes_the_same_path_at_another_speed() -> None:
    base, correct, _ = random_case(5)
    plain = policy_gradient_flow(base, correct, 0.99)
    normalised = FLOWS["grpo"](base, correct, 0.99)
    np.testing.assert_allclose(plain.end, normalised.end, atol=1e-8)
    # dt = dt' / sqrt(J (1 - J)): the times of the two, from one path.
    times = np.linspace(0, normalised.duration, 4001)
    hit = projection.accuracy(np.array([normalised.policy(time) for time in times]), correct)
    assert plain.duration == pytest.approx(np.trapezoid(1 / np.sqrt(hit * (1 - hit)), times), rel=1e-4)


def test_prompts_flow_each_on_its_own_to_a_mean_accuracy() -> None:
    base = np.random.default_rng(0).dirichlet(np.ones(4), 3)
    correct = np.array([True, True, False, False])
    flow = policy_gradient_flow(base, correct, 0.9)
    reached = projection.accuracy(flow.end, correct)
    assert reached.mean() == pytest.approx(0.9, abs=1e-9)
    for end, start, hit in zip(flow.end, base, reached, strict=True):
        np.testing.assert_allclose(end, flows.policy_gradient_at(start, correct, hit), atol=1e-7)
    assert flow.along(5).shape == (5, 3, 4)
    np.testing.assert_allclose(flow.along(5)[0], base, atol=1e-12)


def test_natural_gradient_keeps_every_ratio() -> None:
    flow = flows.natural_gradient_flow(BASE, CORRECT, 0.99)
    assert flow.duration == pytest.approx(logit(0.99) - logit(0.3))
    policy = flow.policy(1.7)
    assert policy[:2].sum() == pytest.approx(expit(logit(0.3) + 1.7))
    assert policy[0] / policy[1] == pytest.approx(2)
    assert projection.excess_kl(flow.end, BASE, CORRECT) == pytest.approx(0, abs=1e-15)
    assert flows.natural_gradient_flow(BASE, CORRECT, 0.2).duration == 0


def test_sft_flow_descends_to_its_target() -> None:
    target = np.array([0.1, 0.9, 0.0])
    flow = flows.sft_flow(BASE, CORRECT, 0.999, target)
    h = 1e-5
    moved = np.log(flow.policy(h)) - np.log(BASE)
    np.testing.assert_allclose(moved - moved.mean(), h * (target - BASE), atol=1e-9)
    np.testing.assert_allclose(flow.end, target, atol=2e-3)


def test_a_flow_says_that_it_does_not_get_there() -> None:
    with pytest.raises(RazorError, match=r"does not reach a mean accuracy of 0\.9"):
        policy_gradient_flow(np.array([[0.2, 0.8], [0.5, 0.5]]), np.array([[True, False], [False, False]]), 0.9)


@pytest.mark.parametrize("wanted", [0.1, 1.0])
def test_the_closed_form_knows_its_range(wanted: float) -> None:
    with pytest.raises(RazorError, match="only raises"):
        flows.policy_gradient_at(BASE, CORRECT, wanted)


# Steps


def test_one_gradient_step_per_round_is_policy_gradient_and_many_are_the_projection() -> None:
    base, correct, _ = random_case(2)
    hit = float(base[correct].sum())
    stepped = flows.gradient_alternation(base, correct, 1, 1e-3, hit + 1e-9)
    moved = np.log(stepped) - np.log(base)
    np.testing.assert_allclose(moved - moved.mean(), 1e-3 * base * (correct - hit) / hit, atol=1e-12)
    plain = projection.excess_kl(flows.policy_gradient_at(base, correct, 0.99), base, correct)
    excess = [
        float(projection.excess_kl(flows.gradient_alternation(base, correct, steps, 0.02, 0.99), base, correct))
        for steps in (1, 500, 5_000)
    ]
    assert excess[0] == pytest.approx(float(plain), rel=0.02)
    assert excess[0] > 4 * excess[1] > 8 * excess[2]
    with pytest.raises(RazorError, match="10 gradient steps"):
        flows.gradient_alternation(base, correct, 1, 1e-3, 0.99, most=10)


LOSSES = {
    "reinforce": objectives.reinforce,
    "dr-grpo": objectives.dr_grpo,
    "grpo": objectives.grpo,
    "kl-dpg": objectives.kl_dpg,
}


@pytest.mark.parametrize("advantage", list(LOSSES))
def test_a_sampled_step_is_the_objectives_gradient(advantage: Advantage) -> None:
    base, correct, _ = random_case(7)
    lr, group, steps = 0.3, 8, 4
    path = flows.sampled_policy_gradient(base, correct, advantage, group, lr, np.random.default_rng(1), most=steps)
    rng = np.random.default_rng(1)
    logits = torch.tensor(np.log(base), requires_grad=True)
    for step in range(steps):
        drawn = rng.multinomial(group, path[step])
        actions = torch.tensor(np.repeat(np.arange(len(base)), drawn))
        logp = logits.log_softmax(-1)[actions]
        rewards = torch.tensor(correct)[actions].double()
        loss = LOSSES[advantage](logp[None], rewards[None], torch.tensor(np.log(base))[actions][None])
        (gradient,) = torch.autograd.grad(loss, logits)
        logits = (logits - lr * gradient).detach().requires_grad_()
        np.testing.assert_allclose(path[step + 1], logits.softmax(-1).detach().numpy(), atol=1e-9)


def test_sampled_steps_follow_the_flow_on_average() -> None:
    base = np.tile(BASE, (20_000, 1))
    step = flows.sampled_policy_gradient(base, CORRECT, "dr-grpo", 4, 0.01, np.random.default_rng(0), most=1)[1]
    moved = (np.log(step) - np.log(base)).mean(axis=0)
    # The baseline holds the sample itself: (1 - 1/G) of the gradient.
    expected = 0.01 * (1 - 1 / 4) * BASE * (CORRECT - 0.3)
    np.testing.assert_allclose(moved - moved.mean(), expected, atol=5e-5)


def test_sampling_alone_collapses_a_tie_and_only_without_a_baseline_goes_on() -> None:
    base = np.tile([0.25, 0.25, 0.5], (200, 1))
    advantages: tuple[Advantage, ...] = ("dr-grpo", "reinforce")
    ends = {
        how: flows.sampled_policy_gradient(base, CORRECT, how, 8, 0.5, np.random.default_rng(0), most=400)
        for how in advantages
    }
    excess = {how: projection.excess_kl(path, base, CORRECT).mean(axis=1) for how, path in ends.items()}
    assert excess["dr-grpo"][-1] > 0.01  # the exact flow: 0
    assert excess["reinforce"][-1] > 5 * excess["dr-grpo"][-1]
    sure = np.array([0.5, 0.5 - 1e-12, 1e-12])
    still = flows.sampled_policy_gradient(sure, CORRECT, "dr-grpo", 8, 0.5, np.random.default_rng(0), most=50)
    np.testing.assert_allclose(still[-1], sure, atol=1e-15)


def test_sampling_stops_at_the_accuracy_asked_for() -> None:
    path = flows.sampled_policy_gradient(BASE, CORRECT, "grpo", 8, 0.2, np.random.default_rng(0), until=0.9, most=500)
    reached = projection.accuracy(path, CORRECT)
    assert len(path) < 500
    assert reached[-1] >= 0.9 > reached[:-1].max()


# The network


def small_network(seed: int, hidden: int) -> tuple[Network, Floats, Mask]:
    rng = np.random.default_rng(seed)
    network = Network(rng.normal(size=(4, 2)), hidden, 4)
    correct = rng.permuted(np.tile([True, True, False, False], (4, 1)), axis=1)
    return network, rng.normal(size=network.size), correct


def test_network_gradient_is_the_finite_difference() -> None:
    network, weights, _ = small_network(0, 3)
    direction = np.random.default_rng(1).normal(size=(4, 4))

    def objective(at: Floats) -> float:
        return float((direction * network.policy(at)).sum())

    policy = network.policy(weights)
    logit_gradient = policy * (direction - (direction * policy).sum(axis=1, keepdims=True))
    gradient = network.pull_back(weights, logit_gradient)
    np.testing.assert_allclose(gradient, optimize.approx_fprime(weights, objective, 1e-7), atol=1e-5)
    np.testing.assert_allclose(policy.sum(axis=1), 1)


def test_a_wide_network_holds_the_projection_and_a_narrow_one_pays() -> None:
    gaps = []
    for hidden in (8, 1):
        network, base, correct = small_network(2, hidden)
        pi0 = network.policy(base)
        end, _ = network.alternate(base, correct, 0.95)
        gaps.append(float(projection.excess_kl(network.policy(end), pi0, correct).mean()))
    assert gaps[0] < 1e-4
    assert gaps[1] > 0.01


def test_closest_network_is_accurate_and_no_farther_than_its_starts() -> None:
    network, base, correct = small_network(4, 2)
    pi0 = network.policy(base)
    end = network.policy_gradient(base, correct, 0.8)
    reached = float(projection.accuracy(network.policy(end), correct).mean())
    best = network.policy(network.closest(base, correct, reached, [end]))
    assert projection.accuracy(best, correct).mean() >= reached - 1e-5
    assert projection.kl(best, pi0).mean() <= projection.kl(network.policy(end), pi0).mean()
    least = flows.natural_gradient_flow(pi0, correct, reached).end
    assert projection.kl(best, pi0).mean() >= projection.kl(least, pi0).mean() - 1e-4
    with pytest.raises(RazorError, match=r"mean accuracy of 1\.1"):
        network.closest(base, correct, 1.1, [base])
