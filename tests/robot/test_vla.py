"""A vision-language-action policy against whole forward passes of its model, enumeration, and scipy."""

import io
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from rich.console import Console
from scipy.special import rel_entr
from torch import Tensor

from rlrazor.errors import RazorError
from rlrazor.experiments.robot.base import load_policy
from rlrazor.experiments.robot.config import Config
from rlrazor.experiments.robot.experiment import Robot
from rlrazor.experiments.robot.policy import Acting, Seen, kl_of_actions, taken
from rlrazor.experiments.robot.rollout import demonstrate, roll_out
from rlrazor.experiments.robot.simulators import Simulators
from rlrazor.experiments.robot.vla.loading import Source, load, with_adapter
from rlrazor.experiments.robot.vla.model import VisionLanguageAction
from rlrazor.experiments.robot.vla.tokens import action_token_ids
from rlrazor.experiments.robot.world import episodes_of
from rlrazor.runs import runner
from rlrazor.runs.store import RunStore
from vla_models import ARCHITECTURES, FURTHER, LETTERS, SIDE, Squares, tokenizer

WORLD = Squares()
INSTRUCTIONS = ("push the square up", "down with the square please", "up with it")
FIRST_ACTION_TOKEN = len(LETTERS) + len(FURTHER) - 1


@pytest.fixture(params=sorted(ARCHITECTURES))
def policy(request: pytest.FixtureRequest) -> VisionLanguageAction:
    return VisionLanguageAction(*ARCHITECTURES[request.param](), WORLD)


def seen() -> Seen:
    images = np.random.default_rng(0).integers(0, 256, (3, 2, SIDE, SIDE, 3), dtype=np.uint8)
    return Seen(INSTRUCTIONS, torch.from_numpy(images))


def tokens() -> Tensor:
    return torch.from_numpy(np.random.default_rng(1).integers(0, 256, (3, 3)))


def whole_logits(policy: VisionLanguageAction, row: int, said: list[int]) -> Tensor:
    """The model's logits after a prompt without padding and these tokens, by one pass without a cache."""
    prompt = f"<image>In: What action should the robot take to {INSTRUCTIONS[row]}?\nOut:"
    image = np.asarray(seen().history[row, -1])
    inputs = policy.processor(text=[prompt], images=[[image]], return_tensors="pt")
    ids = torch.cat([inputs["input_ids"], torch.tensor([said], dtype=torch.long)], dim=1)
    more = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        logits: Tensor = policy.model(**{**inputs, **more}, use_cache=False).logits[0, -1].double()
        return logits


def test_actions_are_the_last_ordinary_tokens_from_the_end_of_the_vocabulary() -> None:
    ids = action_token_ids(tokenizer(), 256)
    assert ids.tolist() == list(range(FIRST_ACTION_TOKEN, FIRST_ACTION_TOKEN - 256, -1))
    assert tokenizer().convert_ids_to_tokens([int(ids[0]), int(ids[255])]) == ["rare299", "rare44"]
    with pytest.raises(RazorError, match="556 ordinary tokens, and 600 have to stand for actions"):
        action_token_ids(tokenizer(), 600)


def test_log_probs_are_those_of_whole_passes(policy: VisionLanguageAction) -> None:
    """Row by row and token by token, without padding; over the bins and over the vocabulary."""
    given = tokens()
    found, over_all = policy.log_probs(seen(), given), policy.vocabulary_log_probs(seen(), given)
    assert found.shape == (3, 3, 256)
    assert found.requires_grad
    for row in range(3):
        for place in range(3):
            said = [FIRST_ACTION_TOKEN - int(token) for token in given[row, :place]]
            logits = whole_logits(policy, row, said)
            bins = logits[FIRST_ACTION_TOKEN - 255 : FIRST_ACTION_TOKEN + 1].flip(0).log_softmax(dim=0)
            torch.testing.assert_close(found[row, place].double(), bins, atol=2e-4, rtol=1e-4)
            torch.testing.assert_close(over_all[row, place].double(), logits.log_softmax(0), atol=2e-4, rtol=1e-4)


def test_a_few_states_at_a_time_are_all_at_once(policy: VisionLanguageAction, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last digits, and so are gradients, though the forward passes are done again for them."""
    found = []
    for at_a_time in (16, 2):
        monkeypatch.setattr("rlrazor.experiments.robot.vla.model.AT_A_TIME", at_a_time)
        policy.module.zero_grad()
        logp = taken(policy.log_probs(seen(), tokens()), tokens())
        logp.sum().backward()
        found.append((logp.detach(), [one.grad for one in policy.module.parameters() if one.grad is not None]))
    (one, gradients), (other, others) = found
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    assert len(gradients) == len(others) > 10
    for first, second in zip(gradients, others, strict=True):
        torch.testing.assert_close(first, second, atol=1e-3, rtol=1e-3)


def test_the_likeliest_action_and_a_drawn_one_are_those_of_whole_passes(policy: VisionLanguageAction) -> None:
    noise = np.random.default_rng(2).random((3, 3))
    for drawn in (None, torch.from_numpy(noise)):
        found = policy.act(seen(), drawn)
        for row in range(3):
            said: list[int] = []
            for place in range(3):
                logits = whole_logits(policy, row, said)[FIRST_ACTION_TOKEN - 255 : FIRST_ACTION_TOKEN + 1].flip(0)
                shares = np.cumsum(logits.softmax(0).numpy())
                wanted = int(logits.argmax()) if drawn is None else int(np.searchsorted(shares, noise[row, place]))
                assert int(found[row, place]) == wanted
                said.append(FIRST_ACTION_TOKEN - wanted)


def test_kl_of_actions_is_scipys_over_bins_and_over_the_vocabulary(policy: VisionLanguageAction) -> None:
    """And so it is over all actions of two dimensions, by enumeration of the first: the chain rule."""
    other = VisionLanguageAction(*ARCHITECTURES["idefics3"](), WORLD)
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)))
        pairs = [
            (policy.log_probs(seen(), tokens()), other.log_probs(seen(), tokens())),
            (policy.vocabulary_log_probs(seen(), tokens()), other.vocabulary_log_probs(seen(), tokens())),
        ]
    for one, two in pairs:
        expected = rel_entr(one.double().exp().numpy(), two.double().exp().numpy()).sum(axis=(1, 2))
        np.testing.assert_allclose(kl_of_actions(one, two).numpy(), expected, rtol=1e-4)
        assert (expected > 0.01).all()


@torch.no_grad()
def test_the_kl_of_a_whole_action_is_the_mean_over_the_tokens_before(policy: VisionLanguageAction) -> None:
    """Enumerated: KL of the joint distribution of two tokens = KL of the first + mean over it of KL of the second."""
    other = VisionLanguageAction(policy.model, policy.processor, WORLD)
    one = Seen(INSTRUCTIONS[:1], seen().history[:1])
    firsts = torch.arange(256)
    many = Seen(INSTRUCTIONS[:1] * 256, one.history.expand(256, -1, -1, -1, -1))
    given = torch.stack([firsts, firsts * 0, firsts * 0], dim=1)
    base = policy.log_probs(many, given)[:, :2].double()
    for weight in other.parameters():
        weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(4)))
    tuned = other.log_probs(many, given)[:, :2].double()
    joint, other_joint = (logp[:, 0].diagonal()[:, None] + logp[:, 1] for logp in (base, tuned))
    of_joint = float(rel_entr(joint.exp().numpy(), other_joint.exp().numpy()).sum())
    per_action = kl_of_actions(base, tuned)
    by_chain_rule = float((base[0, 0].exp() * per_action).sum())
    assert of_joint == pytest.approx(by_chain_rule, rel=1e-6)


def test_an_adapter_alone_is_trained_stored_and_put_back(policy: VisionLanguageAction, tmp_path: Path) -> None:
    whole = sum(weight.numel() for weight in policy.module.parameters())
    adapted = VisionLanguageAction(with_adapter(policy.model, 2), policy.processor, WORLD)
    names = list(adapted.module.state_dict())
    assert names
    assert all("lora" in name for name in names)
    assert sum(weight.numel() for weight in adapted.module.parameters()) < whole / 3
    before = adapted.log_probs(seen(), tokens()).detach()
    (-taken(adapted.log_probs(seen(), tokens()), tokens()).mean()).backward()
    with torch.no_grad():
        moved = [weight for weight in adapted.module.parameters() if weight.grad is not None]
        assert len(moved) > len(names) / 2  # LLaVA passes over the vision encoder's last layer
        for weight in moved:
            assert weight.grad is not None
            weight.sub_(0.1 * weight.grad)
    after = adapted.log_probs(seen(), tokens()).detach()
    assert taken(after, tokens()).mean() > taken(before, tokens()).mean() + 0.1
    kept = {name: tensor.clone() for name, tensor in adapted.module.state_dict().items()}
    with torch.no_grad():
        for weight in adapted.module.parameters():
            weight.zero_()
    assert not torch.equal(adapted.log_probs(seen(), tokens()), after)
    adapted.module.load_state_dict(kept)
    assert torch.equal(adapted.log_probs(seen(), tokens()), after)


def test_a_saved_model_is_loaded_from_safetensors_alone(policy: VisionLanguageAction, tmp_path: Path) -> None:
    policy.model.save_pretrained(tmp_path)
    policy.processor.save_pretrained(tmp_path)
    again = load(Source(str(tmp_path)), WORLD)
    assert torch.equal(again.log_probs(seen(), tokens()), policy.log_probs(seen(), tokens()))
    weights = tmp_path / "model.safetensors"
    torch.save(policy.model.state_dict(), tmp_path / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(RazorError, match="cannot be loaded"):
        load(Source(str(tmp_path)), WORLD)


def test_what_the_last_layer_has_is_the_models_own(policy: VisionLanguageAction) -> None:
    """The head, put on it, gives the logits."""
    hidden = policy.represent(seen())
    logits = policy.model.get_output_embeddings()(hidden).double()
    for row in range(3):
        torch.testing.assert_close(logits[row], whole_logits(policy, row, []), atol=5e-4, rtol=1e-4)


def test_bins_are_the_worlds(policy: VisionLanguageAction) -> None:
    actions = torch.tensor([[-1.0, 0.001, 3.0], [-5.0, -0.001, 1.0]])
    assert policy.tokens_of(actions).tolist() == [[0, 128, 255], [0, 127, 128]]
    torch.testing.assert_close(policy.actions_of(torch.tensor([[0, 128, 255]]))[0, 2], torch.tensor(3 - 4 / 512))


def test_it_learns_two_tasks_from_images_by_their_instructions() -> None:
    """The whole path: demonstrations, cloning, roll-outs with the policy; an idle lane does no harm."""
    policy = VisionLanguageAction(*ARCHITECTURES["idefics3"](), WORLD)
    with Simulators(WORLD) as simulators:
        shown = [
            one
            for task in WORLD.tasks
            for one in demonstrate(simulators, episodes_of(WORLD, task, 6, seed=0, purpose="demonstrations"))
        ]
        assert all(one.success for one in shown)
        told = [one.episode.instruction for one in shown for _ in one.actions]
        history = torch.from_numpy(np.concatenate([one.history for one in shown]))
        wanted = policy.tokens_of(torch.from_numpy(np.concatenate([one.actions for one in shown])))
        optimizer = torch.optim.AdamW(policy.module.parameters(), lr=3e-3)
        rng = torch.Generator().manual_seed(0)
        for _ in range(60):
            rows = torch.randperm(len(told), generator=rng)[:16]
            logp = policy.log_probs(Seen([told[row] for row in rows], history[rows]), wanted[rows])
            loss = -taken(logp, wanted[rows]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        episodes = [one for task in WORLD.tasks for one in episodes_of(WORLD, task, 3, seed=0, purpose="held out")]
        rolled = roll_out(simulators, episodes, Acting(policy), sampled=False, lanes=4)
    assert [one.success for one in rolled] == [True] * 6
    assert {one.history.dtype for one in rolled} == {np.dtype(np.uint8)}
    assert rolled[0].tokens[0].tolist() == wanted[told.index(episodes[0].instruction)].tolist()


def test_the_experiment_runs_with_it_from_base_to_records(tmp_path: Path) -> None:
    """A model in a folder, its base by cloning, SFT and REINFORCE with an adapter, measured as any policy is."""
    model, processor = ARCHITECTURES["idefics3"]()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    config = Config(
        methods=("sft", "reinforce+kl"),
        lrs=(3e-3,),
        rl_lrs=(3e-3,),
        seeds=(0,),
        checkpoints_per_epoch=1,
        new_task="up",
        prior_tasks=("down",),
        updates=8,
        batch_size=8,
        grid=2,
        per_start=1,
        rl_updates=1,
        starts=2,
        group_size=2,
        demonstrations=4,
        new_demonstrations=4,
        bc_updates=40,
        bc_batch=8,
        bc_lr=2e-2,
        episodes=4,
        kl_episodes=4,
        world="libero_goal",
        policy=str(tmp_path / "model"),
        lora_rank=4,
        noise=0.0,
        new_noise=0.0,
        expert_noise=0.0,
    )
    experiment = Robot(cache=tmp_path / "cache", filmed=False, world=WORLD)
    options = runner.Options(tmp_path / "run", weights="final")
    assert runner.run(experiment, config, options, Console(file=io.StringIO())).trained == 3
    table = pl.read_parquet(tmp_path / "run" / "records.parquet")
    base = table.filter(method="base").row(0, named=True)
    assert base["kl_forward"] == base["kl_forward_on_prior"] == 0.0
    sft = table.filter(method="sft").row(-1, named=True)
    assert sft["kl_forward"] > 0.01
    assert sft["weight_l2"] > 0
    (spec,) = config.specs(WORLD.name, ["sft"])
    store = RunStore(tmp_path / "run")
    weights = [store.load_weights(spec.root, 0), store.load_weights(spec, 8)]
    assert all("lora" in name for name in weights[1])
    before, after, again = (load_policy(spec.root.params, WORLD, kept) for kept in (*weights, weights[1]))
    with Simulators(WORLD) as simulators:
        (shown,) = demonstrate(simulators, episodes_of(WORLD, "up", 1, seed=7, purpose="never seen"))
    states = Seen([shown.episode.instruction] * len(shown.actions), torch.from_numpy(shown.history))
    wanted = before.tokens_of(torch.from_numpy(shown.actions))
    likely = [taken(one.log_probs(states, wanted), wanted).mean().item() for one in (before, after, again)]
    assert likely[0] < likely[1] == likely[2]
