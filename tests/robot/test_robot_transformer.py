"""The transformer: one token after another as all at once, rows apart from each other, the instruction heard."""

import numpy as np
import pytest
import torch
from torch import Tensor

from rlrazor.errors import RazorError
from rlrazor.experiments.robot.policy import Acting, Seen
from rlrazor.experiments.robot.tasks import TASKS
from rlrazor.experiments.robot.transformer import ActionTransformer, Size
from robot_worlds import Points

SIZE = Size(width=48, layers=3, heads=4, bins=32)


class Arm(Points):
    """Meta-World's sizes, without its simulator."""

    def __init__(self) -> None:
        super().__init__("arm", tasks=TASKS, observation_shape=(39,))

    @property
    def action_low(self) -> np.ndarray:
        return np.full(4, -1, np.float32)

    @property
    def action_high(self) -> np.ndarray:
        return np.full(4, [1, 1, 1, 2], np.float32)


def policy_in(world: Points, size: Size = SIZE, sharp: float = 20.0) -> ActionTransformer:
    """Weights at random; the head's so large that some bins are much likelier than others."""
    torch.manual_seed(0)
    policy = ActionTransformer(world, size)
    with torch.no_grad():
        policy.head.weight.mul_(sharp)
        policy.word.weight.mul_(20)
    return policy


def seen_by(policy: ActionTransformer, count: int) -> tuple[Seen, Tensor]:
    """States and instructions at random, and noise."""
    rng = np.random.default_rng(0)
    instructions = [policy.known[row] for row in rng.integers(len(policy.known), size=count)]
    history = rng.standard_normal((count, 2, len(policy.mean))).astype(np.float32)
    return Seen(instructions, torch.from_numpy(history)), torch.from_numpy(rng.random((count, policy.action_size)))


def acted(policy: ActionTransformer, seen: Seen, noise: Tensor | None) -> Tensor:
    history = np.asarray(seen.history.numpy())
    return torch.from_numpy(Acting(policy).act(seen.instructions, history, None if noise is None else noise.numpy()))


def test_tokens_are_drawn_from_the_distribution_of_a_full_pass() -> None:
    """With keys and values kept from token to token as without: each token is where the noise falls, in log_probs."""
    policy = policy_in(Arm())
    seen, noise = seen_by(policy, 300)
    tokens = acted(policy, seen, noise)
    with torch.no_grad():
        probs = policy.log_probs(seen, tokens).double().exp()
    np.testing.assert_allclose(probs.sum(dim=-1), 1, atol=1e-5)
    below = (probs * (torch.arange(32) < tokens[..., None])).sum(dim=-1)
    up_to = below + probs.gather(2, tokens[..., None])[..., 0]
    assert (below - 1e-5 <= noise).all()
    assert (noise <= up_to + 1e-5).all()
    assert len(tokens.unique()) > 20  # and not the same bin each time
    greedy = acted(policy, seen, None)
    with torch.no_grad():
        likeliest = policy.log_probs(seen, greedy).argmax(dim=-1)
    assert torch.equal(greedy, likeliest)
    assert probs.amax(dim=-1).median() > 2 / 32


def test_a_token_does_not_depend_on_those_after_it_but_on_those_before() -> None:
    policy = policy_in(Arm())
    seen, _ = seen_by(policy, 5)
    tokens = torch.randint(32, (5, 4))
    with torch.no_grad():
        before = policy.log_probs(seen, tokens)
        for place in range(4):
            changed = tokens.clone()
            changed[:, place] = (changed[:, place] + 7) % 32
            differs = (policy.log_probs(seen, changed) - before).abs().amax(dim=(0, 2)) > 1e-4
            assert differs.tolist() == [later > place for later in range(4)]


def test_rows_do_not_influence_each_other() -> None:
    """To the bit, whatever is in the other lanes, wherever the row is, and with lanes that have no episode."""
    policy = policy_in(Arm())
    seen, noise = seen_by(policy, 32)
    alone, _ = seen_by(policy_in(Arm()), 32)
    whole = acted(policy, seen, noise)
    with torch.no_grad():
        logits = policy.log_probs(seen, whole)
        for keep in (5, 20):
            history = torch.zeros_like(seen.history)
            history[:keep] = seen.history[:keep]
            lanes = Seen([*seen.instructions[:keep], *[""] * (32 - keep)], history)
            assert torch.equal(acted(policy, lanes, noise)[:keep], whole[:keep])
            others = Seen(
                [*seen.instructions[:keep], *alone.instructions[keep:]],
                torch.cat([seen.history[:keep], -alone.history[keep:]]),
            )
            assert torch.equal(policy.log_probs(others, whole)[:keep], logits[:keep])
        order = torch.randperm(32)
        turned = Seen([seen.instructions[row] for row in order.tolist()], seen.history[order])
        assert torch.equal(acted(policy, turned, noise[order]), whole[order])


def test_padding_of_short_instructions_is_not_seen() -> None:
    policy = policy_in(Points())
    seen, _ = seen_by(policy, 20)
    assert len({len(text.split()) for text in seen.instructions}) > 2
    tokens = torch.randint(32, (20, 2))
    with torch.no_grad():
        before = policy.log_probs(seen, tokens)
        policy.word.weight[0] += 100.0
        assert torch.equal(policy.log_probs(seen, tokens), before)


def test_the_instruction_decides_and_nothing_else_says_what_is_asked_for() -> None:
    policy = policy_in(Points())
    history = torch.zeros(len(policy.known), 2, 7)
    with torch.no_grad():
        logp = policy.log_probs(Seen(policy.known, history), torch.zeros(len(policy.known), 2, dtype=torch.int64))
    apart = (logp[:, None] - logp[None]).abs().amax(dim=(2, 3))
    assert (apart + torch.eye(len(apart)) > 1e-3).all()
    # Of all parameters only the words' embeddings grow with the number of tasks.
    one_task = Points(tasks={"reach": Points().tasks["reach"]})
    sizes = [
        {name: weight.numel() for name, weight in policy_in(world).named_parameters() if "word" not in name}
        for world in (Points(), one_task)
    ]
    longest = [
        max(len(text.split()) for task in world.tasks.values() for text in task.paraphrases)
        for world in (Points(), one_task)
    ]
    assert {name for name in sizes[0] if sizes[0][name] != sizes[1][name]} == {"position.weight"}
    assert sizes[0]["position.weight"] - sizes[1]["position.weight"] == (longest[0] - longest[1]) * SIZE.width


def test_a_history_is_told_from_its_reverse() -> None:
    policy = policy_in(Points())
    seen, _ = seen_by(policy, 4)
    tokens = torch.zeros(4, 2, dtype=torch.int64)
    with torch.no_grad():
        apart = policy.log_probs(seen, tokens) - policy.log_probs(Seen(seen.instructions, seen.history.flip(1)), tokens)
    assert (apart.abs().amax(dim=(1, 2)) > 1e-3).all()


def test_by_default_it_has_one_to_five_million_parameters() -> None:
    assert 1e6 < sum(weight.numel() for weight in ActionTransformer(Arm()).parameters()) < 5e6


def test_an_action_is_the_middle_of_its_bin() -> None:
    policy = policy_in(Arm())
    tokens = torch.stack([torch.arange(32)] * 4, dim=1)
    actions = policy.actions_of(tokens)
    assert torch.equal(policy.tokens_of(actions), tokens)
    assert actions[0].tolist() == pytest.approx([-1 + 1 / 32] * 3 + [-1 + 1.5 / 32])
    rng = np.random.default_rng(0)
    drawn = torch.from_numpy(rng.uniform(-1, [1, 1, 1, 2], (1000, 4)).astype(np.float32))
    width = torch.tensor([2.0, 2.0, 2.0, 3.0]) / 32
    assert ((policy.actions_of(policy.tokens_of(drawn)) - drawn).abs() <= width / 2 + 1e-6).all()
    beyond = policy.tokens_of(torch.tensor([[-5.0, 1.0, 5.0, 2.0]]))
    assert beyond.tolist() == [[0, 31, 31, 31]]


def test_states_are_normalised_by_statistics_that_go_with_the_weights() -> None:
    """Scaling and moving all states, the demonstrations' too, changes nothing."""
    policy, other = policy_in(Points()), policy_in(Points())
    seen, _ = seen_by(policy, 200)
    scale, shift = torch.tensor([10.0, 0.1, 1, 3, 1, 1, 1]), torch.tensor([5.0, -1, 0, 0, 0, 0, 2])
    policy.normalise_by(seen.history)
    other.normalise_by(seen.history * scale + shift)
    np.testing.assert_allclose(policy.std, seen.history.numpy().reshape(-1, 7).std(axis=0, ddof=1), rtol=1e-5)
    again = ActionTransformer(Points(), SIZE)
    again.load_state_dict(other.state_dict())
    tokens = torch.zeros(200, 2, dtype=torch.int64)
    with torch.no_grad():
        expected = policy.log_probs(seen, tokens)
        moved = Seen(seen.instructions, seen.history * scale + shift)
        np.testing.assert_allclose(again.log_probs(moved, tokens), expected, atol=1e-3)
        assert (other.log_probs(seen, tokens) - expected).abs().max() > 0.1


def test_a_number_that_never_changes_does_not_become_infinite() -> None:
    policy = policy_in(Points())
    history = torch.randn(50, 2, 7)
    history[..., 3] = 4.0
    policy.normalise_by(history)
    assert policy.std[3] == 1
    assert policy.mean[3] == 4
    history[..., 3] = 1e9  # and what is far from all demonstrations stays in bounds
    seen = Seen([policy.known[0]] * 50, history)
    assert policy.log_probs(seen, torch.zeros(50, 2, dtype=torch.int64)).isfinite().all()


def test_an_instruction_that_no_task_has_is_refused() -> None:
    policy = policy_in(Points())
    with pytest.raises(RazorError, match=r"does not know the instruction 'fly away'"):
        policy.log_probs(Seen(["fly away"], torch.zeros(1, 2, 7)), torch.zeros(1, 2, dtype=torch.int64))


def test_what_it_is_represented_by_is_where_the_first_token_comes_from() -> None:
    policy = policy_in(Points())
    seen, _ = seen_by(policy, 30)
    with torch.no_grad():
        logits = policy.represent(seen) @ policy.head.weight.T + policy.head.bias
        first = policy.log_probs(seen, torch.zeros(30, 2, dtype=torch.int64))[:, 0]
    np.testing.assert_allclose(logits.log_softmax(dim=-1), first, atol=1e-4)
