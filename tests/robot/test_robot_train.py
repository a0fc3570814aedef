"""The training loop: gradients by hand, what each method learns from, the same bits each time."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlrazor.errors import RazorError
from rlrazor.experiments.robot import rollout
from rlrazor.experiments.robot import train as training
from rlrazor.experiments.robot.methods import find_method
from rlrazor.experiments.robot.policy import Acting, Policy, Steps
from rlrazor.experiments.robot.rollout import Rolled
from rlrazor.experiments.robot.simulators import Simulators
from rlrazor.experiments.robot.train import Fixed, OwnTrajectories, learnt_from, trajectory_log_probs, updates
from rlrazor.lm.sampling import NotFiniteError
from rlrazor.runs.records import Ancestor, RunSpec
from rlrazor.runs.store import RunStore
from rlrazor.runs.sweep import DivergedError
from rlrazor.seeding import seed_of
from robot_runs import OFFLINE, ONLINE, Stored, checkpoints_of, run_spec
from robot_worlds import Points


@pytest.fixture
def rolled(monkeypatch: pytest.MonkeyPatch) -> list[list[Rolled]]:
    """All that is rolled out for training."""
    found: list[list[Rolled]] = []

    def spied(*given: Any, **options: Any) -> list[Rolled]:
        found.append(rollout.roll_out(*given, **options))
        return found[-1]

    monkeypatch.setattr(training, "roll_out", spied)
    return found


def gradients(policy: Policy) -> Tensor:
    return torch.cat([weight.grad.flatten() for weight in policy.module.parameters() if weight.grad is not None])


def perturbed(stored: Stored) -> Policy:
    """Somewhere else than the base, so that a penalty has a gradient."""
    policy = stored.policy
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in policy.module.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    return policy


def by_hand(policy: Policy, base: Policy, trajectories: list[Rolled], kl_coef: float) -> tuple[float, Tensor]:
    """REINFORCE's loss and gradient: -A log p of each trajectory, whose states are asked about one by one."""
    rewards = np.array([float(one.success) for one in trajectories])
    advantages = (rewards - rewards.mean()) / rewards.std(ddof=1)
    loss: Tensor = torch.zeros((), dtype=torch.float64)
    for advantage, one in zip(advantages, trajectories, strict=True):
        steps = Steps.of([one])
        everything = torch.arange(one.steps)
        logp = policy.log_probs(steps.seen(everything), steps.tokens).double()
        chosen = sum(logp[t, a, steps.tokens[t, a]] for t in range(one.steps) for a in range(2))
        loss = loss - advantage * chosen / len(trajectories)
        if kl_coef:
            with torch.no_grad():
                other = base.log_probs(steps.seen(everything), steps.tokens).double()
            loss = loss + kl_coef * (logp.exp() * (logp - other)).sum() / len(trajectories)
    policy.module.zero_grad()
    loss.backward()
    return loss.item(), gradients(policy)


@pytest.mark.parametrize(("name", "kl_coef"), [("reinforce", 0.0), ("reinforce+kl", 0.1)])
def test_the_gradient_of_reinforce_is_the_one_by_hand(
    name: str, kl_coef: float, robot_base: Stored, rolled: list[list[Rolled]]
) -> None:
    spec = run_spec(robot_base.spec, name, ONLINE, starts=4, kl_coef=kl_coef)
    policy, base = perturbed(robot_base), robot_base.policy
    policy.module.zero_grad()
    with Simulators(Points()) as simulators:
        source = OwnTrajectories(spec, find_method(name)[0], simulators, base)
        loss = source.accumulate(0, policy)
    found = gradients(policy).clone()
    (trajectories,) = rolled
    assert source.interactions == sum(one.steps for one in trajectories)
    assert len(trajectories) == 16
    assert 0 < sum(one.success for one in trajectories) < 16
    expected, gradient = by_hand(policy, base, trajectories, kl_coef)
    assert loss == pytest.approx(expected, rel=1e-3)
    assert (found - gradient).norm() < 1e-3 * gradient.norm()


def test_trajectories_are_new_each_time_and_from_starts_of_the_grid(
    robot_base: Stored, rolled: list[list[Rolled]]
) -> None:
    spec = run_spec(robot_base.spec, "grpo", ONLINE)
    policy = robot_base.policy
    with Simulators(Points()) as simulators:
        source = OwnTrajectories(spec, find_method("grpo")[0], simulators, robot_base.policy)
        for update in range(4):
            policy.module.zero_grad()
            source.accumulate(update, policy)
    starts = [[one.episode.cell for one in batch] for batch in rolled]
    for batch in starts:
        assert len(set(batch)) == 8
        assert batch == [cell for cell in dict.fromkeys(batch) for _ in range(4)]
    assert len({*starts[0], *starts[1]}) == 16  # all of the 4 x 4 grid before any comes again
    every = [one for batch in rolled for one in batch]
    assert len({(one.episode.seed, one.episode.draw) for one in every}) == len(every)
    assert source.interactions == sum(one.steps for one in every)


def test_log_probs_of_trajectories_are_sums_over_their_steps(robot_base: Stored, rolled: list[list[Rolled]]) -> None:
    spec, policy = run_spec(robot_base.spec, "kl-dpg", ONLINE), perturbed(robot_base)
    with Simulators(Points()) as simulators:
        source = OwnTrajectories(spec, find_method("kl-dpg")[0], simulators, robot_base.policy)
        policy.module.zero_grad()
        source.accumulate(0, policy)
    steps, row = Steps.of(rolled[0]), 0
    found = trajectory_log_probs(policy, steps)
    with torch.no_grad():
        logp = policy.log_probs(steps.seen(torch.arange(len(steps))), steps.tokens).double()
    for place, one in enumerate(rolled[0]):
        own = sum(logp[row + t, a, one.tokens[t, a]].item() for t in range(one.steps) for a in range(2))
        assert found[place].item() == pytest.approx(own, rel=1e-4)
        row += one.steps


def test_the_penalty_of_offline_methods_is_kl_to_the_base(robot_base: Stored) -> None:
    """The gradient with it, less the one without: that of sum pi log(pi / pi0) over the bins, on the batch's states."""
    policy, found = perturbed(robot_base), []
    with Simulators(Points()) as simulators:
        for kl_coef in (0.0, 0.3):
            spec = run_spec(robot_base.spec, "sft+kl", OFFLINE, batch_size=50, kl_coef=kl_coef)
            given = learnt_from(spec, find_method("sft")[0], simulators, robot_base.policy, robot_base.cache)
            source = Fixed(spec, find_method("sft")[0], given, robot_base.policy)
            policy.module.zero_grad()
            found.append((source.accumulate(0, policy), gradients(policy).clone()))
    rows = torch.randperm(len(source.steps), generator=torch.Generator().manual_seed(seed_of(0, "order")))[:50]
    seen, tokens = source.steps.seen(rows), source.steps.tokens[rows]
    logp = policy.log_probs(seen, tokens).double()
    kl = (logp.exp() * (logp - robot_base.policy.log_probs(seen, tokens).double().detach())).sum(dim=(1, 2)).mean()
    policy.module.zero_grad()
    (0.3 * kl).backward()
    assert found[1][0] - found[0][0] == pytest.approx(0.3 * kl.item(), rel=1e-3)
    assert (found[1][1] - found[0][1] - gradients(policy)).norm() < 1e-3 * gradients(policy).norm()


def test_offline_methods_learn_from_what_their_name_says(robot_base: Stored) -> None:
    """SFT from either expert, whose routes differ, or from successes of the base; all on the same grid of starts."""
    base, given = robot_base.policy, {}
    with Simulators(Points()) as simulators:
        for name, kind in (("sft", OFFLINE), ("sft-second", OFFLINE), ("filtered", {"batch_size": 256, "tries": 6})):
            spec = run_spec(robot_base.spec, name, kind)
            given[name] = learnt_from(spec, find_method(name)[0], simulators, base, robot_base.cache)
    assert [len(given[name].lengths) for name in ("sft", "sft-second")] == [32, 32]
    assert given["sft-second"].lengths.double().mean() > given["sft"].lengths.double().mean() + 3
    own = given["filtered"]
    assert 10 < len(own.lengths) < 16 * 6
    assert own.interactions > len(own.actions)  # failures are counted, and are not learnt from
    steps = own.steps(base)
    assert torch.equal(base.actions_of(steps.tokens), own.actions)  # what the base did is a middle of a bin
    with torch.no_grad():
        logp = trajectory_log_probs(base, steps) / own.lengths
        other = trajectory_log_probs(base, given["sft"].steps(base)) / given["sft"].lengths
    assert logp.mean() > -8
    assert logp.isfinite().all()
    assert other.isfinite().all()


def test_successes_of_other_weights_are_others(robot_base: Stored) -> None:
    """Though the run has the same name, as where it was made by other versions of the libraries."""
    spec = run_spec(robot_base.spec, "filtered", {"batch_size": 256, "tries": 1})
    with Simulators(Points()) as simulators:
        first, other, again = (
            learnt_from(spec, find_method("filtered")[0], simulators, policy, robot_base.cache).digest
            for policy in (robot_base.policy, perturbed(robot_base), robot_base.policy)
        )
    assert first == again != other


def test_a_base_that_never_succeeds_has_nothing_to_learn_from(robot_base: Stored) -> None:
    spec = run_spec(robot_base.spec, "filtered", {"batch_size": 8, "tries": 1})
    with Simulators(Points(horizon=2)) as simulators, pytest.raises(RazorError, match="none of 16 tries"):
        learnt_from(spec, find_method("filtered")[0], simulators, robot_base.policy, robot_base.cache)


def test_sft_and_reinforce_learn_the_new_task(robot_base: Stored) -> None:
    """SFT in 80 updates of 256 states, REINFORCE in 20 rounds of 80 trajectories, each from another start of 100."""
    before = robot_base.record.new
    sft = run_spec(robot_base.spec, "sft", OFFLINE, per_start=8, updates=80, checkpoints_per_epoch=1)
    rounds = {"starts": 16, "group_size": 5, "grid": 10, "lr": 3e-4}
    rl = run_spec(robot_base.spec, "reinforce", rounds, updates=20, checkpoints_per_epoch=1)
    for spec in (sft, rl):
        (last,) = checkpoints_of(spec, robot_base.store, robot_base.cache)
        assert last.record.new > before + 0.1
        assert 0.01 < last.record.drift["kl_forward"] < 5
        assert last.record.step == spec.params["updates"]


@pytest.mark.parametrize(("name", "kind"), [("grpo+kl", ONLINE), ("sft-second", OFFLINE)])
def test_the_same_spec_gives_the_same_bits(name: str, kind: Mapping[str, Any], briefly_measured: Stored) -> None:
    spec = run_spec(briefly_measured.spec, name, kind, kl_coef=0.02 if "+kl" in name else 0.0, updates=2)
    first, again = (checkpoints_of(spec, briefly_measured.store, briefly_measured.cache) for _ in range(2))
    assert [one.record for one in first] == [one.record for one in again]
    assert [one.record.step for one in first] == [1, 2]
    assert [one.record.epoch for one in first] == [0.5, 1.0]
    for one, other in zip(first, again, strict=True):
        weights, same = one.weights(), other.weights()
        assert all(torch.equal(weights[name], same[name]) for name in weights)
    counted = [one.record.metrics["interactions"] for one in first]
    assert counted[0] < counted[1] if kind is ONLINE else counted[0] == counted[1] > 0


@pytest.mark.parametrize(("name", "kind"), [("reinforce", ONLINE), ("kl-dpg", ONLINE), ("sft", OFFLINE)])
def test_a_run_that_diverges_says_when(name: str, kind: Mapping[str, Any], briefly_measured: Stored) -> None:
    """At its first update, and not when trajectories of a policy that is no more have all failed."""
    spec = run_spec(briefly_measured.spec, name, kind, lr=math.inf)
    with pytest.raises(DivergedError) as caught:
        checkpoints_of(spec, briefly_measured.store, briefly_measured.cache)
    assert (caught.value.step, caught.value.epoch) == (1, 0.25)


@pytest.mark.parametrize("sampled", [True, False])
def test_a_policy_whose_outputs_are_no_numbers_does_not_act(sampled: bool, robot_base: Stored) -> None:
    policy = robot_base.policy
    with torch.no_grad():
        policy.module.get_parameter("head.weight")[0, 0] = math.nan
    noise, history = np.full((3, 2), 0.5), np.zeros((3, 2, 7), np.float32)
    with pytest.raises(NotFiniteError):
        Acting(policy).act(["go to the goal"] * 3, history, noise if sampled else None)
    spec = run_spec(robot_base.spec, "reinforce", ONLINE)
    with Simulators(Points()) as simulators, pytest.raises(DivergedError) as caught:
        next(updates(spec, policy, OwnTrajectories(spec, find_method("reinforce")[0], simulators, robot_base.policy)))
    assert caught.value.step == 0


def test_a_base_in_another_world_or_with_other_weights_is_another(robot_base: Stored) -> None:
    """One is kept between runs: what its episodes are depends on more than its name."""
    of = Ancestor(robot_base.spec, 0)

    def longest(world: Points, store: RunStore) -> int:
        with Simulators(world) as simulators:
            found = training.load_base(of, store, simulators)
            assert training.load_base(of, store, simulators) is found
            return max(int(one.steps.lengths.max()) for one in found.reference.own.values())

    class Other(RunStore):
        def load_weights(self, spec: RunSpec, step: int) -> dict[str, Tensor]:
            weights = super().load_weights(spec, step)
            return {name: weight * (not name.startswith("head")) for name, weight in weights.items()}

    assert longest(Points(), robot_base.store) == 40
    assert longest(Points(horizon=7), robot_base.store) == 7
    with Simulators(Points(horizon=7)) as simulators:
        given = training.load_base(of, Other(robot_base.store.folder), simulators)
    assert all((one.logp.exp() - 1 / 256).abs().max() < 1e-6 for one in given.reference.own.values())


def test_rounds_without_any_advantage_are_updates_too(robot_base: Stored) -> None:
    """Where every trajectory fails, the loss is 0 and nothing moves."""
    spec: RunSpec = run_spec(robot_base.spec, "reinforce", ONLINE, updates=2)
    policy = robot_base.policy
    with Simulators(Points(horizon=2)) as simulators:
        source = OwnTrajectories(spec, find_method("reinforce")[0], simulators, robot_base.policy)
        steps = [(step, epoch, loss) for step, epoch, loss, _ in updates(spec, policy, source)]
    assert steps == [(1, 0.5, 0.0), (2, 1.0, 0.0)]
    assert source.interactions == 2 * 32 * 2
    untouched = robot_base.policy.module.state_dict()
    assert all(torch.equal(weight, untouched[name]) for name, weight in policy.module.state_dict().items())
