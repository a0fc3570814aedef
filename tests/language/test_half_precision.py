"""A base in bfloat16: what is trained on it is in float32, and measured and saved as the base is."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlrazor.cli import main
from rlrazor.experiments.language import train
from rlrazor.lm import compute
from rlrazor.lm.adapters import weights_of
from rlrazor.lm.models import load
from rlrazor.runs.records import RunSpec
from tiny_models import char_tokenizer, saved, tiny_llama

LR, STEPS = 1e-4, 100  # an update is below half the distance of two bfloat16 numbers around 0.1


def spec(rank: int = 0) -> RunSpec:
    return RunSpec("language", "sft", {"lora_rank": rank}, 0)


def test_small_updates_add_up() -> None:
    base = tiny_llama().bfloat16().requires_grad_(False)
    with torch.no_grad():
        base.lm_head.weight.fill_(0.1)
    with train._policies(base, None, spec()) as policies:
        weight = policies.model.lm_head.weight
        assert weight.dtype == torch.float32
        assert weight.requires_grad
        before = weight[0, 0].item()
        with torch.no_grad():
            for _ in range(STEPS):
                weight -= LR
        kept = policies.as_kept(policies.model)
    assert compute.precision_of(kept) == "bfloat16"
    # 2^-11 is the distance of bfloat16's numbers between 1/16 and 1/8.
    assert float(kept.lm_head.weight[0, 0]) == pytest.approx(before - LR * STEPS, abs=2**-12)
    alone = base.lm_head.weight.clone()
    for _ in range(STEPS):
        alone -= LR
    assert float(alone[0, 0]) == before  # the weights' own rounding would have undone each
    assert float(base.lm_head.weight[0, 0]) == before


def test_what_has_not_moved_is_the_base_to_the_bit() -> None:
    base = tiny_llama().bfloat16()
    with train._policies(base, None, spec()) as policies:
        kept = weights_of(policies.as_kept(policies.model))
    assert all(torch.equal(kept[name], weight) for name, weight in weights_of(base).items())


def test_a_policy_like_its_base_is_measured_as_it_is() -> None:
    base = tiny_llama()
    with train._policies(base, None, spec()) as policies:
        assert policies.as_kept(policies.model) is policies.model


def test_an_adapter_is_measured_as_it_is() -> None:
    with train._policies(tiny_llama().bfloat16(), None, spec(rank=2)) as policies:
        assert policies.as_kept(policies.model) is policies.model


@pytest.mark.parametrize("method", ["sft", "grpo", "grpo+kl", "self-replay"])
def test_every_kind_of_trainer_is_measured_and_saved_so(method: str, tmp_path: Path) -> None:
    """Trainers change the forward of what they are given, of the base too."""
    saved(tmp_path / "base", tiny_llama(max_position_embeddings=256), char_tokenizer())
    rows = [{"prompt": f"{a}+{b}=", "completion": f"{(a + b) % 10}"} for a in range(6) for b in range(6)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "out"
    command = ["finetune", str(tmp_path / "base"), "--prompts", str(tmp_path / "rows.jsonl"), "--no-chat"]
    command += ["--method", method, "--lr", "1e-3", "--max-steps", "2", "--max-new-tokens", "2", "--prior", "none"]
    command += ["--dtype", "bfloat16", "--precision", "bf16", "--test-prompts", "4", "--save-every", "0"]
    if "grpo" in method:
        command += ["--rl-prompts", "4", "--group-size", "4"]
    assert main([*command, "--out", str(out)]) == 0
    (folder,) = (out / "models").iterdir()
    found = load(str(folder), dtype="bfloat16").model
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    base = load(str(tmp_path / "base"), dtype="bfloat16").model
    assert compute.precision_of(found) == "bfloat16"
    moved = [not torch.equal(*pair) for pair in zip(found.parameters(), base.parameters(), strict=True)]
    assert any(moved) or method == "grpo"  # whose rewards may all be alike
