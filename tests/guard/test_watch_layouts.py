"""The folders that trainers save, made after their sources: where the policy is in each, and what is said of shards."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from laws import PROMPTS
from rlrazor.cli import main
from rlrazor.errors import RazorError
from rlrazor.guard import watch
from rlrazor.guard.watch_layout import model_in, steps_in, why_none
from rlrazor.guard.watch_whole import weights_digest
from tiny_models import char_tokenizer, noisy, saved, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:torch.distributed")

Make = Callable[[Path, Path], None]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a tuned model of three shards, and prompts."""
    folder = tmp_path_factory.mktemp("models")
    base = tiny_llama()
    saved(folder / "base", base, char_tokenizer())
    tuned = noisy(base, 0.05)
    tuned.save_pretrained(folder / "tuned", max_shard_size="12KB")
    char_tokenizer().save_pretrained(folder / "tuned")
    assert len(list((folder / "tuned").glob("model-*.safetensors"))) > 1
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS[:4]))
    return folder


def copied(source: Path, place: Path, *, without: tuple[str, ...] = ()) -> Path:
    return Path(shutil.copytree(source, place, ignore=shutil.ignore_patterns(*without), dirs_exist_ok=True))


def pickles(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save({"weight": torch.ones(2)}, folder / name)


def state(folder: Path, step: int, most: int = 100) -> None:
    (folder / "trainer_state.json").write_text(
        json.dumps({"global_step": step, "max_steps": most, "epoch": step / 50, "log_history": []})
    )


def dcp(folder: Path) -> None:
    """What `torch.distributed.checkpoint` itself writes: shards and .metadata."""
    checkpoint: Any = pytest.importorskip("torch.distributed.checkpoint")
    checkpoint.save({"model": {"weight": torch.ones(4)}}, checkpoint_id=str(folder), no_dist=True)
    assert (folder / ".metadata").is_file()
    assert list(folder.glob("*.distcp"))


# What each trainer saves at step 50, where that has weights in the hub's layout.


def transformers(run: Path, tuned: Path) -> None:
    """Also TRL, axolotl, LLaMA-Factory, unsloth."""
    place = copied(tuned, run / "checkpoint-50")
    pickles(place, "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth")
    state(place, 50)
    copied(tuned, run)  # the last model, which Trainer.save_model puts beside its checkpoints


def deepspeed(run: Path, tuned: Path) -> None:
    """A Trainer's under ZeRO-3, with stage3_gather_16bit_weights_on_model_save."""
    place = copied(tuned, run / "checkpoint-50")
    pickles(place, "global_step50/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "zero_to_fp32.py")
    (place / "latest").write_text("global_step50")
    state(place, 50)


def ms_swift(run: Path, tuned: Path) -> None:
    """Its run is a folder in what was named as output."""
    place = copied(tuned, run / "v0-20261130-120000" / "checkpoint-50")
    state(place, 50)
    (run / "v0-20261130-120000" / "args.json").write_text("{}")
    (run / "v0-20261130-120000" / "runs").mkdir()


def verl_fsdp(run: Path, tuned: Path) -> None:
    """With hf_model among actor.checkpoint.save_contents; a critic beside the actor."""
    actor = run / "global_step_50" / "actor"
    ranks = [f"{what}_world_size_2_rank_{rank}.pt" for what in ("model", "optim", "extra_state") for rank in (0, 1)]
    pickles(actor, *ranks)
    copied(tuned, actor / "huggingface")
    (actor / "fsdp_config.json").write_text("{}")
    critic = copied(tuned, run / "global_step_50" / "critic" / "huggingface")
    assert critic.is_dir()
    pickles(run / "global_step_50", "data.pt")
    (run / "latest_checkpointed_iteration.txt").write_text("50")


def verl_megatron(run: Path, tuned: Path) -> None:
    """Its second layout."""
    actor = run / "global_step_50" / "actor"
    copied(tuned, actor / "model" / "huggingface")
    dcp(actor / "optimizer" / "dist_ckpt")
    dcp(actor / "extra" / "dist_ckpt")
    (actor / "transformer_config.json").write_text("{}")
    (actor / "ckpt_contents.json").write_text(json.dumps({"schema_version": 2}))


def nemo_rl(run: Path, tuned: Path) -> None:
    """Shards, and beside them what its converter has made, with the tokenizer in a folder, as its page says."""
    step = run / "step_50"
    dcp(step / "policy" / "weights")
    dcp(step / "policy" / "optimizer")
    copied(tuned, step / "policy" / "tokenizer", without=("*.safetensors", "config.json", "*.index.json"))
    (step / "training_info.json").write_text(json.dumps({"step": 50}))
    (step / "config.yaml").write_text("policy: {}\n")
    place = copied(tuned, run / "step_50-hf", without=("tokenizer*", "special_tokens*"))
    copied(step / "policy" / "tokenizer", place / "tokenizer")
    copied(tuned, run / "tmp_step_60")  # being written
    copied(tuned, run / "run_0" / "step_70")  # archived


def automodel(run: Path, tuned: Path) -> None:
    """NeMo Automodel: shards that are safetensors, and a model of them all; links to the steps."""
    model = run / "epoch_0_step_50" / "model"
    copied(tuned, model / "consolidated")
    save_file({"weight": torch.ones(2)}, model / "shard-00001-model-00001-of-00001.safetensors")
    dcp(run / "epoch_0_step_50" / "optim")
    (run / "LATEST").symlink_to("epoch_0_step_50")


def torchtitan(run: Path, tuned: Path) -> None:
    """With last_save_in_hf, as torch itself writes that: no config and no tokenizer; the step before is shards."""
    checkpoint: Any = pytest.importorskip("torch.distributed.checkpoint")
    if not hasattr(checkpoint, "HuggingFaceStorageWriter"):
        pytest.skip("torch has no writer of the hub's format")
    dcp(run / "checkpoint" / "step-25")
    place = run / "checkpoint" / "step-50"
    weights = {name: weight for path in tuned.glob("*.safetensors") for name, weight in load_file(path).items()}
    writer = checkpoint.HuggingFaceStorageWriter(str(place), save_distributed=True, enable_consolidation=True)
    checkpoint.save(weights, storage_writer=writer, no_dist=True)
    assert [path.name for path in (place / "sharded").iterdir()] == ["shard-00001-model-00001-of-00001.safetensors"]
    assert not (place / "config.json").exists()
    copied(tuned, run / "tb")


def megatron(run: Path, tuned: Path) -> None:
    """An export of Megatron Bridge beside its own checkpoint."""
    iteration = run / "iter_0000050"
    dcp(iteration)
    (iteration / "run_config.yaml").write_text("{}")
    copied(tuned, run / "iter_0000050_hf")
    (run / "latest_checkpointed_iteration.txt").write_text("50")


def openrlhf(run: Path, tuned: Path) -> None:
    pickles(run / "_actor" / "global_step50", "mp_rank_00_model_states.pt")
    copied(tuned, run / "global_step50_hf")


def torchtune(run: Path, tuned: Path) -> None:
    copied(tuned, run / "epoch_50")
    pickles(run / "recipe_state", "recipe_state.pt")


LAYOUTS: dict[str, Make] = {
    one.__name__: one
    for one in (
        transformers, deepspeed, ms_swift, verl_fsdp, verl_megatron, nemo_rl, automodel, torchtitan, megatron,
        openrlhf, torchtune,
    )
}  # fmt: skip


def watched(run: Path, models: Path, capfd: pytest.CaptureFixture[str], *more: str) -> tuple[int, list[Any], str]:
    """The exit code, the rows printed, and what is said."""
    command = [
        "watch", str(run), "--base", str(models / "base"), "--prompts", str(models / "prompts.jsonl"), "--once",
        "--json", "--max-new-tokens", "4", "--interval", "0.05", *more,
    ]  # fmt: skip
    capfd.readouterr()
    code = main(command)
    out, said = capfd.readouterr()
    return code, [json.loads(line) for line in out.splitlines()], said


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "SETTLE", 0.1)


@pytest.fixture(scope="module")
def expected(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """The KLs of the tuned model by `razor compare`."""
    from rlrazor.guard.compare import compare
    from rlrazor.guard.comparison import Pair
    from rlrazor.lm.probes import ProbeSettings, read_prompts

    found = compare(
        Pair(str(models / "base"), str(models / "tuned"), "float32", True),
        read_prompts(models / "prompts.jsonl"),
        settings=ProbeSettings(max_new_tokens=4),
    )
    return {name: found.distances.kl[name].mean for name in ("kl_forward", "kl_probe")}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_policy_is_found_in_what_a_trainer_saves(
    name: str, models: Path, tmp_path: Path, expected: dict[str, float], capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    LAYOUTS[name](run, models / "tuned")
    code, rows, said = watched(run, models, capfd)
    assert code == 0, said
    assert [row["step"] for row in rows] == [50]
    assert {of: rows[0][of] for of in expected} == pytest.approx(expected, abs=1e-6)
    if name != "torchtitan":  # which saves the same in one file
        assert rows[0]["weights"] == weights_digest(models / "tuned")
    assert rows[0]["epoch"] == (1.0 if name in ("transformers", "deepspeed", "ms_swift") else None)
    assert [json.loads(line) for line in (run / "razor.jsonl").read_text().splitlines()] == rows
    # Once more, nothing is measured.
    assert watched(run, models, capfd)[:2] == (0, [])


# What has no such weights.


def verl_shards(run: Path, tuned: Path) -> None:
    verl_fsdp(run, tuned)
    for weights in (run / "global_step_50" / "actor" / "huggingface").glob("model*"):
        weights.unlink()


def verl_dist(run: Path, tuned: Path) -> None:
    verl_megatron(run, tuned)
    shutil.rmtree(run / "global_step_50" / "actor" / "model")
    dcp(run / "global_step_50" / "actor" / "model" / "dist_ckpt")


def nemo_shards(run: Path, tuned: Path) -> None:
    nemo_rl(run, tuned)
    shutil.rmtree(run / "step_50-hf")


def nemo_megatron(run: Path, tuned: Path) -> None:
    dcp(run / "step_50" / "policy" / "weights" / "iter_0000000")


def titan_shards(run: Path, tuned: Path) -> None:
    dcp(run / "checkpoint" / "step-50")


def megatron_shards(run: Path, tuned: Path) -> None:
    megatron(run, tuned)
    shutil.rmtree(run / "iter_0000050_hf")


def megatron_legacy(run: Path, tuned: Path) -> None:
    pickles(run / "iter_0000050", "mp_rank_00/model_optim_rng.pt", "mp_rank_01/model_optim_rng.pt")


def accelerate_fsdp(run: Path, tuned: Path) -> None:
    dcp(run / "checkpoint-50" / "pytorch_model_fsdp_0")
    dcp(run / "checkpoint-50" / "optimizer_0")
    state(run / "checkpoint-50", 50)


def zero_shards(run: Path, tuned: Path) -> None:
    deepspeed(run, tuned)
    for weights in (run / "checkpoint-50").glob("model*"):
        weights.unlink()


def openrlhf_shards(run: Path, tuned: Path) -> None:
    for model in ("_actor", "_critic"):
        pickles(
            run / model / "global_step50", "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"
        )


def automodel_shards(run: Path, tuned: Path) -> None:
    automodel(run, tuned)
    shutil.rmtree(run / "epoch_0_step_50" / "model" / "consolidated")


def pickled(run: Path, tuned: Path) -> None:
    copied(tuned, run / "checkpoint-50", without=("*.safetensors", "*.index.json"))
    pickles(run / "checkpoint-50", "pytorch_model.bin")


def nothing(run: Path, tuned: Path) -> None:
    pickles(run / "checkpoint-50", "optimizer.pt")


REFUSED: list[tuple[Make, str]] = [
    (verl_shards, "add hf_model to actor_rollout_ref.actor.checkpoint.save_contents, or convert it with python -m "),
    (verl_shards, "--backend fsdp --local_dir {run}/global_step_50/actor --target_dir {run}/global_step_50-hf"),
    (verl_dist, "--backend megatron --local_dir"),
    (nemo_shards, "convert_dcp_to_hf.py --hf-ckpt-path={run}/step_50-hf"),
    (nemo_megatron, "convert_megatron_to_hf.py"),
    (titan_shards, "convert_to_hf.py {run}/checkpoint/step-50 {run}/checkpoint/step-50-hf"),
    (megatron_shards, "AutoBridge.export_ckpt"),
    (megatron_legacy, "AutoBridge.export_ckpt"),
    (accelerate_fsdp, "accelerate merge-weights"),
    (zero_shards, "zero_to_fp32.py"),
    (openrlhf_shards, "--save_hf_ckpt"),
    (automodel_shards, "save_consolidated"),
    (pickled, "save_safetensors"),
    (nothing, "it has no weights in the hub's format"),
]


@pytest.mark.parametrize(("make", "sentence"), REFUSED)
def test_of_shards_it_is_said_how_to_convert_them(make: Make, sentence: str, models: Path, tmp_path: Path) -> None:
    make(tmp_path, models / "tuned")
    (step,) = steps_in(tmp_path)
    assert step.step == 50
    assert model_in(step) is None
    said = why_none(step)
    assert sentence.format(run=tmp_path) in said
    assert "\n" not in said


def test_what_a_converter_makes_later_is_measured(
    models: Path, tmp_path: Path, expected: dict[str, float], capfd: pytest.CaptureFixture[str]
) -> None:
    """The refused checkpoint is not in the log, so that nothing stands in the way of its conversion."""
    titan_shards(tmp_path, models / "tuned")
    code, rows, said = watched(tmp_path, models, capfd)
    assert (code, rows) == (0, [])
    assert "[razor] step-50 is not measured: it is a distributed checkpoint (DCP)" in said
    copied(models / "tuned", tmp_path / "checkpoint" / "step-50-hf")
    code, rows, _ = watched(tmp_path, models, capfd)
    assert rows[0]["kl_forward"] == pytest.approx(expected["kl_forward"], abs=1e-6)


def lora(folder: Path, models: Path) -> dict[str, torch.Tensor]:
    """An adapter that has learnt something, as PEFT saves it; its weights."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(tiny_llama(), config)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.copy_(0.3 * torch.randn(weight.shape, generator=rng))
    adapted.save_pretrained(folder)
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "place",
    ["checkpoint-50", "global_step_50/actor/lora_adapter", "step_50/policy/weights/model", "epoch_0_step_50/model"],
)
def test_adapters_are_measured_over_the_base(
    place: str, models: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The same as the adapter merged by hand: W + 2 B A."""
    from transformers import AutoModelForCausalLM

    weights = lora(tmp_path / "run" / place, models)
    config = tmp_path / "run" / place / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "someone/other"}))
    if "actor" in place:  # verl saves the config of the whole model as well, and no weights
        copied(models / "tuned", tmp_path / "run/global_step_50/actor/huggingface", without=("model*",))
    code, rows, said = watched(tmp_path / "run", models, capfd)
    assert code == 0, said
    assert f"The adapter says that it was trained on someone/other, not on {models / 'base'}." in said
    merged = AutoModelForCausalLM.from_pretrained(models / "base")
    for name, weight in merged.named_parameters():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if f"{key}A.weight" in weights:
            weight.data += 2 * weights[f"{key}B.weight"] @ weights[f"{key}A.weight"]
    saved(tmp_path / "merged" / "checkpoint-50", merged, char_tokenizer())
    _, by_hand, _ = watched(tmp_path / "merged", models, capfd)
    assert rows[0]["kl_forward"] == pytest.approx(by_hand[0]["kl_forward"], abs=1e-5)
    assert rows[0]["kl_forward"] > 0.01


def test_steps_are_in_order_of_their_numbers(models: Path, tmp_path: Path) -> None:
    names = ["checkpoint-100", "checkpoint-20", "checkpoint-3", "checkpoint-best", "tmp-checkpoint-7", ".checkpoint-9"]
    for name in [*names, "logs", "checkpoint-20-merged"]:
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-3000").write_text("no folder")
    (tmp_path / "checkpoint-21").symlink_to(tmp_path / "checkpoint-20")
    assert [(one.step, one.name) for one in steps_in(tmp_path)] == [
        (3, "checkpoint-3"),
        (20, "checkpoint-20"),
        (100, "checkpoint-100"),
    ]
    assert [path.name for path in steps_in(tmp_path)[1].folders] == ["checkpoint-20", "checkpoint-20-merged"]


def test_of_several_runs_one_has_to_be_named(models: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for version in ("v0-20261130-120000", "v1-20261130-130000"):
        copied(models / "tuned", tmp_path / version / "checkpoint-50")
    with pytest.raises(RazorError, match="several runs, in v0-20261130-120000, v1-20261130-130000: name one of these"):
        steps_in(tmp_path)
    code, rows, said = watched(tmp_path, models, capfd)
    assert (code, rows) == (2, [])
    assert "name one of these folders" in said


def test_a_folder_with_nothing_in_it(models: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, rows, said = watched(tmp_path, models, capfd)
    assert (code, rows) == (2, [])
    assert "has no checkpoints (folders such as checkpoint-50" in said
