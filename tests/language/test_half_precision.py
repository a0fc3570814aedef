"""A base in bfloat16: what is trained on it is in float32, and measured and saved as the base is."""

import pytest
import torch

from rlrazor.experiments.language import train
from rlrazor.lm import compute
from rlrazor.lm.adapters import weights_of
from rlrazor.lm.models import add_lora
from rlrazor.runs.records import RunSpec
from tiny_models import tiny_llama

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
        kept = train.as_kept(policies.model, base)
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
        kept = weights_of(train.as_kept(policies.model, base))
    assert all(torch.equal(kept[name], weight) for name, weight in weights_of(base).items())


def test_a_policy_like_its_base_is_measured_as_it_is() -> None:
    base = tiny_llama()
    with train._policies(base, None, spec()) as policies:
        assert train.as_kept(policies.model, base) is policies.model


def test_an_adapter_is_measured_as_it_is() -> None:
    base = tiny_llama().bfloat16()
    model = add_lora(base, 2)
    assert train.as_kept(model, base) is model
