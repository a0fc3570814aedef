"""What is measured of a checkpoint, against loops over single episodes and sums over bins."""

import math
from collections.abc import Mapping
from statistics import fmean

import numpy as np
import pytest
import torch
from scipy.special import rel_entr

from rlrazor.errors import RazorError
from rlrazor.experiments.robot import demonstrations
from rlrazor.experiments.robot.demonstrations import Wanted
from rlrazor.experiments.robot.evaluate import DRIFT, MODES, Measured, Own, Reference, Settings, evaluate, inside, play
from rlrazor.experiments.robot.policy import Policy, Seen, Steps
from rlrazor.experiments.robot.simulators import Simulators
from rlrazor.experiments.robot.train import training_starts
from rlrazor.experiments.robot.world import FIRST, SECOND, Episode, Floats, episodes_of
from rlrazor.runs.records import RunSpec
from rlrazor.runs.sweep import DivergedError
from robot_runs import OFFLINE, Stored, base_spec, run_spec
from robot_worlds import Points

TASKS = ("carry", "reach", "touch")
Totals = Mapping[str, tuple[list[float], list[int]]]


def moved(stored: Stored, by: float = 0.02) -> Policy:
    """Weights a little away from the base's."""
    policy = stored.policy
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in policy.module.parameters():
            weight.add_(by * torch.randn_like(weight))
    return policy


@pytest.fixture(scope="module")
def tuned(robot_base: Stored) -> tuple[Policy, Measured]:
    """A policy beside the base, and what is measured of it."""
    policy, spec = moved(robot_base), run_spec(robot_base.spec, "sft", OFFLINE)
    with Simulators(Points()) as simulators:
        settings = Settings.of(spec)
        rolled = play(robot_base.policy, simulators, settings, settings.kl_episodes, sampled=True)
        reference = Reference.of(robot_base.policy, settings, rolled)
        before = robot_base.store.items(robot_base.spec.run_id).filter(step=0).drop("step")
        own = before.rename({"base": "outcome", "base_logprobs": "logprobs"}).drop("tuned", "tuned_logprobs")
        return policy, evaluate(spec, 3, 0.75, policy, simulators, reference, own)


def alone(policy: Policy, episode: Episode, *, sampled: bool) -> tuple[bool, Steps]:
    """One episode in an environment of its own, the policy asked for one state at a time, without its `act`."""
    world = Points()
    environment, noise = world.environment(episode.task), episode.noise("actions").random((world.horizon, 2))
    observation, _ = environment.reset(seed=episode.seed, options={"cell": episode.cell})
    history, success = np.stack([observation] * 2), False
    seen: list[Floats] = []
    taken: list[torch.Tensor] = []
    while not success and len(taken) < world.horizon:
        tokens = torch.zeros(1, 2, dtype=torch.int64)
        for place in range(2):
            with torch.no_grad():
                logp = policy.log_probs(Seen([episode.instruction], torch.from_numpy(history[None])), tokens)[0, place]
            sums = logp.double().exp().cumsum(0)
            drawn = int((sums <= noise[len(taken)][place] * sums[-1]).sum())
            tokens[0, place] = drawn if sampled else int(logp.argmax())
        seen.append(history)
        taken.append(tokens[0])
        observation, _, _, _, info = environment.step(policy.actions_of(tokens)[0].numpy())
        history, success = np.stack([history[1], observation]), bool(info["success"])
    states = torch.from_numpy(np.stack(seen))
    episodes = torch.zeros(len(taken), dtype=torch.int64)
    return success, Steps([episode.instruction], states, torch.stack(taken), episodes, torch.tensor([success]))


def held_out(task: str, count: int) -> list[Episode]:
    return episodes_of(Points(), task, count, seed=0, purpose="held out")


@pytest.mark.parametrize("mode", MODES)
def test_success_is_that_of_single_episodes(mode: str, tuned: tuple[Policy, Measured]) -> None:
    """Of 40 held-out episodes of the new task, and of the prior ones; what became of each is kept."""
    policy, measured = tuned
    metrics = measured.record.metrics
    for task in TASKS:
        outcomes = [alone(policy, one, sampled=mode == "sampled")[0] for one in held_out(task, 40)]
        assert metrics[f"{mode}_{'new' if task == 'carry' else task}"] == pytest.approx(fmean(outcomes))
        if mode == "sampled" and task != "carry":
            kept = measured.items.filter(prior=task)
            assert kept["tuned"].to_list() == outcomes
    assert metrics[f"{mode}_prior"] == pytest.approx((metrics[f"{mode}_reach"] + metrics[f"{mode}_touch"]) / 2)
    assert metrics["episodes"] == 40


def totals(robot_base: Stored, sampler: Policy, other: Policy) -> Totals:
    """Of each task's 20 episodes that one policy samples: the sum of KL(sampler || other) by scipy, and the length."""
    found = {}
    for task in TASKS:
        sums, lengths = [], []
        for episode in held_out(task, 20):
            _, steps = alone(sampler, episode, sampled=True)
            everything = torch.arange(len(steps))
            with torch.no_grad():
                p, q = (
                    one.log_probs(steps.seen(everything), steps.tokens).double().exp().numpy()
                    for one in (sampler, other)
                )
            sums.append(float(rel_entr(p, q).sum()))
            lengths.append(len(steps))
        found[task] = (sums, lengths)
    return found


@pytest.mark.parametrize("name", ["kl_forward", "kl_reverse"])
def test_kl_is_that_of_single_episodes(name: str, robot_base: Stored, tuned: tuple[Policy, Measured]) -> None:
    """Forward on what the base samples, reverse on what the tuned one does; on prior tasks the mean over tasks."""
    policy, record = tuned[0], tuned[1].record
    sides = (robot_base.policy, policy) if name == "kl_forward" else (policy, robot_base.policy)
    of_task = totals(robot_base, *sides)
    sums, lengths = of_task["carry"]
    drift, errors = record.drift, record.metrics
    assert drift[name] == pytest.approx(sum(sums) / sum(lengths), rel=1e-3)
    assert drift[f"{name}_per_episode"] == pytest.approx(fmean(sums), rel=1e-3)
    assert errors[f"{name}_per_episode_stderr"] == pytest.approx(np.std(sums, ddof=1) / math.sqrt(20), rel=1e-3)
    each = [sum(of_task[task][0]) / sum(of_task[task][1]) for task in ("reach", "touch")]
    assert drift[f"{name}_on_prior"] == pytest.approx(fmean(each), rel=1e-3)
    spread = [np.std(of_task[task][0], ddof=1) / math.sqrt(20) for task in ("reach", "touch")]
    assert errors[f"{name}_per_episode_on_prior_stderr"] == pytest.approx(math.hypot(*spread) / 2, rel=1e-3)
    if name == "kl_forward":
        assert [drift["kl_forward_on_reach"], drift["kl_forward_on_touch"]] == pytest.approx(each, rel=1e-3)
    assert drift[name] > 0.05


def test_a_base_is_no_way_from_itself(robot_base: Stored) -> None:
    record = robot_base.record
    assert set(DRIFT) | {"kl_forward_on_reach", "kl_forward_on_touch"} == set(record.drift)
    same = {"cka", "cknna", "cka_on_prior", "cknna_on_prior", "weight_sparsity"}
    assert {name: value for name, value in record.drift.items() if name not in same and abs(value) > 1e-9} == {}
    assert [record.drift[name] for name in sorted(same)] == pytest.approx([1] * 5, abs=1e-4)
    items = robot_base.store.items(robot_base.spec.run_id)
    assert items["base"].to_list() == items["tuned"].to_list()
    assert len(items) == 80


def test_the_inside_and_the_weights_have_moved(robot_base: Stored, tuned: tuple[Policy, Measured]) -> None:
    policy, record = tuned[0], tuned[1].record
    before = dict(robot_base.policy.module.named_parameters())
    change = sum(((weight - before[name]) ** 2).sum().item() for name, weight in policy.module.named_parameters())
    assert record.drift["weight_l2"] == pytest.approx(math.sqrt(change), rel=1e-4)
    for name in ("cka", "cknna", "cka_on_prior", "cknna_on_prior"):
        assert 0.2 < record.drift[name] < 0.9999
    assert record.drift["activation_l2"] > 0.1
    assert set(record.drift) == set(robot_base.record.drift)


def test_which_mode_is_the_score_is_a_setting(tuned: tuple[Policy, Measured], robot_base: Stored) -> None:
    """The new task's and the prior tasks' scores, and what became of the items, are by that mode."""
    policy, _ = tuned
    spec: RunSpec = base_spec(scored="greedy", episodes=12, kl_episodes=11)
    with Simulators(Points()) as simulators:
        measured = evaluate(spec, 0, 0.0, policy, simulators)
    record = measured.record
    greedy = {task: [alone(policy, one, sampled=False)[0] for one in held_out(task, 12)] for task in TASKS}
    assert record.new == pytest.approx(fmean(greedy["carry"]))
    assert record.prior == {task: pytest.approx(fmean(greedy[task])) for task in ("reach", "touch")}
    assert measured.items["tuned"].to_list() == [*greedy["reach"], *greedy["touch"]]
    assert record.metrics["sampled_new"] != record.metrics["greedy_new"]


def test_entropy_is_of_an_action(robot_base: Stored) -> None:
    """Of the base on its own first 20 sampled episodes; by hand."""
    policy, of_steps = robot_base.policy, []
    for episode in held_out("carry", 20):
        _, steps = alone(policy, episode, sampled=True)
        with torch.no_grad():
            probs = policy.log_probs(steps.seen(torch.arange(len(steps))), steps.tokens).double().exp()
        of_steps += (-(probs * probs.log()).sum(dim=(1, 2))).tolist()
    assert robot_base.record.metrics["entropy"] == pytest.approx(fmean(of_steps), rel=1e-3)


def test_held_out_episodes_are_no_others_and_all_methods_learn_from_the_same(robot_base: Stored) -> None:
    """Of evaluation, the base's demonstrations, and training not one start is shared; each method has the same 100."""
    world, run = Points(), run_spec(robot_base.spec, "grpo", {}, grid=10)
    base, *experts = (
        {(one.seed, one.cell) for queue in demonstrations._starts(world, wanted) for one in queue}
        for wanted in (
            Wanted("carry", 5, seed=0),
            *(Wanted("carry", 5, 0, route, grid=10) for route in (FIRST, SECOND)),
        )
    )
    own = {(one.seed, one.cell) for one in training_starts(run, world)}
    assert own == experts[0] == experts[1]
    assert {cell for _, cell in own} == {(x, y, 10) for x in range(10) for y in range(10)}
    held = {one.seed for one in Settings.of(run).held_out(world, "carry", 200)}
    assert len(held | {seed for seed, _ in own | base}) == 200 + 100 + 100


def test_outputs_that_are_no_numbers_are_told_of(robot_base: Stored) -> None:
    policy = robot_base.policy
    with torch.no_grad():
        policy.module.get_parameter("head.bias")[3] = math.nan
    with Simulators(Points()) as simulators, pytest.raises(DivergedError) as caught:
        evaluate(base_spec(episodes=2, kl_episodes=2), 7, 0.5, policy, simulators)
    assert (caught.value.step, caught.value.epoch) == (7, 0.5)


def test_too_few_steps_to_compare_representations_are_one_sentence(robot_base: Stored) -> None:
    with Simulators(Points()) as simulators:
        rolled = play(robot_base.policy, simulators, Settings.of(robot_base.spec), 1, sampled=True)
    first, *_ = (Own.of(robot_base.policy, one) for one in rolled.values())
    few = first.steps.chunks(size=5).__next__()
    steps = Steps(
        first.steps.instructions,
        first.steps.history[few],
        first.steps.tokens[few],
        first.steps.episode_of[few],
        first.steps.success,
    )
    with pytest.raises(RazorError, match=r"have 5 steps in all.*takes 11: raise kl_episodes\.$"):
        inside(robot_base.policy, [Own(steps, first.logp[few])])
