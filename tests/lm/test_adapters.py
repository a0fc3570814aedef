"""PEFT's adapters of every kind: the base without them, the weights with them, and which of them are truly undone."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from rlrazor.errors import RazorError
from rlrazor.lm import kl, sampling
from rlrazor.lm.adapters import AdaptedWeights, BaseWeights, adapter_disabled
from rlrazor.lm.digests import base_digest, is_same_base
from rlrazor.lm.forward import context_length
from rlrazor.lm.models import load
from rlrazor.lm.suitable import require_measurable
from rlrazor.lm.undone import check_undone
from rlrazor.lm.weight_files import weights_by_config
from tiny_models import char_tokenizer, saved, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # PEFT's advice

LAYERS = ["q_proj", "down_proj"]
CONFIGS: dict[str, Any] = {
    "lora": LoraConfig(r=2, target_modules=LAYERS),
    "on all linear layers": LoraConfig(r=2, target_modules="all-linear"),
    "rank-stabilised": LoraConfig(r=2, target_modules=LAYERS, use_rslora=True),
    "dora": LoraConfig(r=2, target_modules=LAYERS, use_dora=True),
    "embeddings": LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]),
    "copies": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head", "norm"]),
    "tokens": LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 4]),
    "ia3": peft.IA3Config(target_modules=LAYERS, feedforward_modules=["down_proj"]),
    "vera": peft.VeraConfig(r=2, target_modules=["q_proj"]),
    "loha": peft.LoHaConfig(r=2, target_modules=LAYERS),
    "lokr": peft.LoKrConfig(r=2, target_modules=LAYERS),
    "oft": peft.OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj"]),
    "hra": peft.HRAConfig(r=2, target_modules=LAYERS),
    "layer norms": peft.LNTuningConfig(target_modules=["input_layernorm", "norm"]),
}
SPOILT = {
    "pissa": LoraConfig(r=2, target_modules=LAYERS, init_lora_weights="pissa"),
    "pissa by a fast svd": LoraConfig(r=2, target_modules=LAYERS, init_lora_weights="pissa_niter_4"),
    "olora": LoraConfig(r=2, target_modules=LAYERS, init_lora_weights="olora"),
    "repeated layers": LoraConfig(r=2, target_modules=LAYERS, layer_replication=[[0, 2], [1, 2]]),
}


def moved(adapted: Any, size: float = 0.3) -> Any:
    """What the adapter trains, changed at random."""
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight += size * torch.randn(weight.shape, generator=rng)
    return adapted


def fresh(config: Any, base: Any = None) -> Any:
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    config.task_type = "CAUSAL_LM"
    return get_peft_model(tiny_llama() if base is None else base, config)


def same_weights(ours: Any, theirs: Any) -> None:
    assert set(ours) == set(theirs)
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight.detach(), rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_adapter_of_any_kind_can_be_taken_off_and_merged(kind: str) -> None:
    base = tiny_llama()
    adapted = fresh(CONFIGS[kind])
    check_undone(adapted)  # as it was put on
    moved(adapted)
    assert base_digest(adapted) == base_digest(base)
    same_weights(BaseWeights(adapted), dict(base.named_parameters()))
    before = {name: weight.clone() for name, weight in adapted.state_dict().items()}
    weights = {name: weight.clone() for name, weight in AdaptedWeights(adapted).items()}
    assert all(torch.equal(weight, before[name]) for name, weight in adapted.state_dict().items())
    same_weights(weights, dict(copy.deepcopy(adapted).merge_and_unload().named_parameters()))
    difference = sum(float((weights[name] - weight).norm()) for name, weight in base.named_parameters())
    assert difference > 0.01


def test_experts_that_are_parameters_are_merged_too() -> None:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=44, hidden_size=16, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, num_experts=4, num_experts_per_tok=2, head_dim=8,
        max_position_embeddings=64, initializer_range=0.3, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    base = Qwen3MoeForCausalLM(config).eval()
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    if "target_parameters" not in LoraConfig.__dataclass_fields__:
        pytest.skip("this PEFT adapts no parameters")
    adapted = fresh(LoraConfig(r=2, target_modules=["q_proj"], target_parameters=experts), copy.deepcopy(base))
    check_undone(adapted)
    moved(adapted)
    assert is_same_base(base_digest(adapted), base_digest(base))
    same_weights(BaseWeights(adapted), dict(base.named_parameters()))
    merged = copy.deepcopy(adapted).merge_and_unload()
    same_weights(AdaptedWeights(adapted), dict(merged.named_parameters()))
    weights = AdaptedWeights(adapted)
    assert {name for name, weight in base.named_parameters() if not torch.equal(weight, weights[name])} == {
        f"model.layers.{layer}.{part}" for layer in (0, 1) for part in ("self_attn.q_proj.weight", *experts)
    }


@pytest.mark.parametrize("kind", SPOILT)
def test_an_adapter_that_changed_the_base_is_refused(kind: str, tmp_path: Path) -> None:
    """Whether the base's files are there to be compared with or not."""
    with pytest.raises(RazorError, match="path_initial_model_for_weight_conversion"):
        check_undone(fresh(SPOILT[kind]))
    folder = saved(tmp_path / "base", tiny_llama(), char_tokenizer())
    with pytest.raises(RazorError, match="Without its adapter this model is not the base"):
        check_undone(fresh(SPOILT[kind], load(folder).model))


def test_an_adapter_that_has_learnt_something_is_checked_by_the_files(tmp_path: Path) -> None:
    folder = saved(tmp_path / "base", tiny_llama(), char_tokenizer())
    base = load(folder).model
    learnt = moved(fresh(LoraConfig(r=2, target_modules=LAYERS), base))
    check_undone(learnt)
    check_undone(moved(fresh(LoraConfig(r=2, target_modules=LAYERS), load(folder, dtype="bfloat16").model)))
    # Without files there is nothing to check it by but a digest of the base.
    alone = moved(fresh(LoraConfig(r=2, target_modules=LAYERS)))
    with pytest.raises(RazorError, match=r"the adapter moves it already, and the base's files \(its config names none"):
        check_undone(alone)
    check_undone(alone, recognised=True)
    # A fraction of a weight that somebody else's base has otherwise.
    with torch.no_grad():
        for name, weight in learnt.named_parameters():
            if name.endswith("layers.1.mlp.down_proj.base_layer.weight"):
                weight[5, 7] += 0.01
    with pytest.raises(RazorError, match="Without its adapter this model is not the base"):
        check_undone(learnt)


def test_files_with_other_names_are_compared_by_what_they_compute(tmp_path: Path) -> None:
    """As where a library has renamed or fused weights since they were saved."""
    from safetensors.torch import load_file, save_file

    folder = saved(tmp_path / "base", tiny_llama(), char_tokenizer())
    learnt = moved(fresh(LoraConfig(r=2, target_modules=LAYERS), load(folder).model))
    spoilt = fresh(SPOILT["pissa"], load(folder).model)
    path = folder / "model.safetensors"
    weights = {name.removeprefix("model."): weight for name, weight in load_file(path).items()}
    path.unlink()  # it may still be mapped
    save_file(weights, path, metadata={"format": "pt"})
    if not weights_by_config():
        pytest.skip("transformers before 4.57 does not load weights of other names")
    check_undone(learnt)
    with pytest.raises(RazorError, match="is not the base"):
        check_undone(spoilt)


def test_what_peft_cannot_merge_is_a_sentence() -> None:
    adapted = fresh(LoraConfig(r=2, target_modules=LAYERS, lora_bias=True))
    with pytest.raises(RazorError, match="PEFT cannot merge this adapter into the weights: "):
        AdaptedWeights(adapted)["model.layers.0.self_attn.q_proj.weight"]
    assert "lm_head.weight" in AdaptedWeights(adapted)


def test_an_adapter_that_transformers_has_put_into_the_model_is_part_of_it() -> None:
    """`model.add_adapter`: there is nothing to switch off, and the base is the model as it was given."""
    base = tiny_llama()
    model = tiny_llama()
    peft.inject_adapter_in_model(LoraConfig(r=2, target_modules=LAYERS), model)
    assert not hasattr(model, "disable_adapter")
    check_undone(model)
    same_weights(BaseWeights(model), dict(base.named_parameters()))
    digest = base_digest(model)
    assert digest == base_digest(base)
    moved(model)
    assert not is_same_base(base_digest(model), digest)
    changed = [
        name for name, weight in AdaptedWeights(model).items() if not torch.equal(weight, BaseWeights(base)[name])
    ]
    assert len(changed) == 4


VIRTUAL = {
    "prompt tuning": peft.PromptTuningConfig(num_virtual_tokens=3),
    "prefix tuning": peft.PrefixTuningConfig(num_virtual_tokens=3),
    "p-tuning": peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=16),
}


@pytest.mark.parametrize("kind", VIRTUAL)
def test_virtual_tokens_are_undone_and_measured(kind: str) -> None:
    base = tiny_llama()
    check_undone(base)
    adapted = moved(fresh(VIRTUAL[kind], copy.deepcopy(base))).eval()
    check_undone(adapted)
    assert base_digest(adapted) == base_digest(base)
    same_weights(BaseWeights(adapted), dict(base.named_parameters()))
    assert context_length(adapted) == 61
    require_measurable(adapted)
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12]]
    drawn = sampling.sample(
        adapted, prompts, sampling.Sampling(greedy=True, max_new_tokens=4, stop_ids=[1], pad_id=0, samples=2)
    )
    sequences = kl.Sequences.grouped(prompts, drawn)
    found = []
    for place, completion in zip(sequences.prompt_of, drawn, strict=True):
        ids = torch.tensor([[*prompts[place], *completion]])
        p, q = (
            model(input_ids=ids, use_cache=False).logits[0, -len(completion) - 1 :].double().log_softmax(-1)
            for model in (base, adapted)
        )
        assert q[:-1].argmax(dim=-1).tolist() == completion
        found.append(float((p.exp() * (p - q))[:-1].sum()))
    expected = sum(found) / len(found)
    assert expected > 1e-3
    assert kl.forward_kl(kl.Probe(adapted, sequences), adapted).per_completion.mean == pytest.approx(expected, rel=1e-5)
    # Prepared by accelerate, which keeps the forward that it has put its autocast around.
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare_model(adapted)
    around, kept = prepared.forward, prepared._original_forward
    again = kl.forward_kl(kl.Probe(prepared, sequences), prepared)
    assert again.per_completion.mean == pytest.approx(expected, rel=1e-5)
    assert base_digest(prepared) == base_digest(base)
    assert (prepared.forward, prepared._original_forward) == (around, kept)
    if kind != "prefix tuning":  # which adds no positions
        with adapter_disabled(prepared):
            prepared._original_forward = kept
            with pytest.raises(RazorError, match="reads more positions"):
                kl.final_states(prepared, sequences)
