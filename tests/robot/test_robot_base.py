"""Demonstrations and the base that clones them: what is asked for is there, made once, and learnt."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rlrazor.errors import RazorError
from rlrazor.experiments.robot import base as cloning
from rlrazor.experiments.robot import demonstrations as demonstrating
from rlrazor.experiments.robot.base import batches_of, clone, demonstrations_for, imitation_loss, pretrain, weights_of
from rlrazor.experiments.robot.cache import cached
from rlrazor.experiments.robot.demonstrations import Demonstrations, Wanted, demonstrations_of
from rlrazor.experiments.robot.simulators import Simulators
from rlrazor.experiments.robot.world import SECOND, Task
from robot_runs import Stored, base_spec
from robot_worlds import NEAR, STRIDE, Points

LATE = Wanted("carry", 6, seed=1, noise=0.8)


def solved_again(given: Demonstrations, wanted: Wanted) -> list[bool]:
    """Whether the actions solve the task, carried out by hand from the states where the episodes began."""
    found, row = [], 0
    for length in given.lengths.tolist():
        point, box, goal = np.split(given.history[row, -1, :6].numpy().astype(np.float64), 3)
        held = False
        for action in given.actions[row : row + length].numpy():
            point = np.clip(point + STRIDE * action.astype(np.float64), -1, 1)
            held = held or bool(np.linalg.norm(point - box) < NEAR)
            box = point if held else box
        found.append(bool(held and np.linalg.norm(box - goal) < NEAR))
        row += length
    assert row == len(given.actions)
    return found


def test_demonstrations_are_successes_as_many_as_are_wanted(tmp_path: Path) -> None:
    with Simulators(Points()) as simulators:
        plain = demonstrations_of(simulators, Wanted("carry", 8, seed=0), tmp_path)
        noisy = demonstrations_of(simulators, Wanted("carry", 8, seed=0, noise=3.0), tmp_path)
        on_grid = demonstrations_of(simulators, Wanted("carry", 2, seed=0, noise=0.5, grid=3), tmp_path)
        around = demonstrations_of(simulators, Wanted("carry", 8, seed=0, route=SECOND), tmp_path)
    for given, count in ((plain, 8), (noisy, 8), (on_grid, 18), (around, 8)):
        assert solved_again(given, LATE) == [True] * count
    assert plain.interactions == len(plain.actions)
    assert noisy.interactions > len(noisy.actions)  # what failed took steps too
    assert (around.lengths > plain.lengths).all()  # from the same starts by a longer way
    assert torch.equal(around.history[0], plain.history[0])
    firsts = torch.cat([torch.zeros(1, dtype=torch.int64), on_grid.lengths.cumsum(0)[:-1]])
    boxes = {tuple(round(value, 5) for value in row) for row in on_grid.history[firsts][:, -1, 2:4].tolist()}
    middles = (-0.66667, 0.0, 0.66667)
    assert boxes == {(x, y) for x in middles for y in middles}
    first, second = (on_grid.actions[at] for at in firsts[:2])
    assert torch.equal(on_grid.history[firsts[0]], on_grid.history[firsts[1]])
    assert not torch.equal(first, second)  # the same start, another draw of noise


def test_an_expert_that_fails_too_often_is_told_of(tmp_path: Path) -> None:
    with (
        Simulators(Points(horizon=2)) as simulators,
        pytest.raises(RazorError, match=r"'carry' \(first route, noise 0.8\) fails"),
    ):
        demonstrations_of(simulators, LATE, tmp_path)


def test_demonstrations_are_made_once_and_again_where_the_file_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    make = demonstrating._make

    def counted(simulators: Simulators, wanted: Wanted) -> Demonstrations:
        made.append(wanted)
        return make(simulators, wanted)

    monkeypatch.setattr(demonstrating, "_make", counted)
    with Simulators(Points()) as simulators:
        first = demonstrations_of(simulators, LATE, tmp_path)
        assert demonstrations_of(simulators, LATE, tmp_path).digest == first.digest
        assert len(made) == 1
        (path,) = tmp_path.glob("*.npz")
        whole = path.read_bytes()
        place = whole.index(first.actions.numpy().tobytes()) + 5
        for damaged in (b"", whole[:-100], b"junk", whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]):
            path.write_bytes(damaged)
            again = demonstrations_of(simulators, LATE, tmp_path)
            assert again.digest == first.digest
            assert path.read_bytes() == whole
        assert len(made) == 5
        other = demonstrations_of(simulators, Wanted("carry", 6, seed=2, noise=0.8), tmp_path)
        assert other.digest != first.digest
        (tmp_path / "file").write_text("")
        in_the_way = demonstrations_of(simulators, LATE, tmp_path / "file")  # nothing can be kept there
        assert in_the_way.digest == first.digest


def test_other_instructions_and_another_release_are_demonstrated_anew(tmp_path: Path) -> None:
    """In a world of the same name: what was kept would be asked for in words that nobody uses."""
    renamed = Points(tasks={"carry": Task("carry", ("lift the box",))})
    given = []
    for world, wanted in ((Points(), LATE), (renamed, LATE), (renamed, replace(LATE, data="a later release"))):
        with Simulators(world) as simulators:
            given.append(demonstrations_of(simulators, wanted, tmp_path))
    assert [one.instructions == ["lift the box"] * 6 for one in given] == [False, True, True]
    assert len(list(tmp_path.glob("*.npz"))) == 3


def test_what_is_kept_is_told_apart_by_all_that_it_is_made_of(tmp_path: Path) -> None:
    for kind, of in (("one", {"a": 1}), ("one", {"a": 2}), ("two", {"a": 1})):
        text = f"{kind} {of}"
        assert cached(tmp_path, kind, of, lambda text=text: {"is": np.array(text)})["is"] == text  # type: ignore[misc]
    assert cached(tmp_path, "one", {"a": 2}, dict)["is"] == "one {'a': 2}"


def test_the_base_has_learnt_all_tasks(robot_base: Stored) -> None:
    """From 1,240 demonstrations: two prior tasks nearly always, the new one of noisy, fewer ones less often."""
    record = robot_base.record
    assert min(record.prior.values()) >= 0.85
    assert 0.1 < record.new < min(record.prior.values()) - 0.2
    assert record.metrics["greedy_prior"] >= 0.85
    assert record.prior == {"reach": record.metrics["sampled_reach"], "touch": record.metrics["sampled_touch"]}


def test_the_base_imitates_better_than_chance_and_than_its_own_frequencies(robot_base: Stored) -> None:
    """Cross-entropy on demonstrations that it has not seen, against the entropy of each token's frequencies."""
    policy = robot_base.policy
    with Simulators(Points()) as simulators:
        seen = demonstrations_for(robot_base.spec, simulators, robot_base.cache)
        other = Demonstrations.joined(
            [
                demonstrations_of(simulators, Wanted(task, 30, seed=9, noise=0.1), robot_base.cache)
                for task in ("reach", "touch")
            ]
        )
    steps = other.steps(policy)
    with torch.no_grad():
        loss = imitation_loss(policy, steps, torch.arange(len(steps))).item()
    counts = [np.bincount(column, minlength=256) + 0.5 for column in seen.steps(policy).tokens.T.numpy()]
    frequencies = [np.log(count / count.sum()) for count in counts]
    alone = -np.mean([sum(frequencies[a][token] for a, token in enumerate(row)) for row in steps.tokens.numpy()])
    assert loss < alone - 1.5 < 2 * math.log(256) - 1.5


def test_the_same_spec_gives_the_same_base_from_the_cache_or_anew(robot_base: Stored, tmp_path: Path) -> None:
    spec = base_spec(demonstrations=20, new_demonstrations=10, bc_updates=5, episodes=12, kl_episodes=3)
    first, again, elsewhere = (
        next(pretrain(spec, Points(), workers=0, cache=cache))
        for cache in (tmp_path / "one", tmp_path / "one", tmp_path / "two")
    )
    assert first.record == again.record == elsewhere.record
    for name, weight in first.weights().items():
        assert torch.equal(again.weights()[name], weight)
        assert torch.equal(elsewhere.weights()[name], weight)
    assert len(list((tmp_path / "one").glob("base-*.npz"))) == 1


def test_a_base_in_the_cache_is_not_cloned_again(robot_base: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*given: object) -> None:
        raise AssertionError("cloned again")

    monkeypatch.setattr(cloning, "clone", never)
    (checkpoint,) = pretrain(robot_base.spec, Points(), workers=0, cache=robot_base.cache)
    assert checkpoint.record == robot_base.record


def test_seeds_and_sizes_of_the_spec_count(robot_base: Stored) -> None:
    with Simulators(Points()) as simulators:
        given = demonstrations_for(robot_base.spec, simulators, robot_base.cache)
    assert len(given.lengths) == 40 + 2 * 600
    tasks = Points().tasks
    assert [
        sum(one in tasks[name].paraphrases for one in given.instructions) for name in ("carry", "reach", "touch")
    ] == [40, 600, 600]
    policy = clone(base_spec(bc_updates=1, width=32, layers=1), Points(), given)
    assert policy.module.get_parameter("head.weight").shape == (256, 32)
    np.testing.assert_allclose(weights_of(policy)["mean"], given.history.numpy().reshape(-1, 7).mean(axis=0), atol=1e-4)


def test_batches_go_over_all_rows_before_any_comes_again() -> None:
    batches = batches_of(10, 3, torch.Generator().manual_seed(0))
    for _ in range(3):
        rows = torch.cat([next(batches) for _ in range(3)])
        assert len(rows.unique()) == 9
    assert next(batches_of(2, 5, torch.Generator())).sort().values.tolist() == [0, 1]
