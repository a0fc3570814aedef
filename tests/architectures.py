"""A tiny model of any causal class of transformers, and what brute force says of it.

    python tests/architectures.py

makes one of every class and writes what became of them into docs/architectures.md. A config is its class's default,
shrunk by the names of its fields.
"""

import contextlib
import copy
import inspect
import re
import unittest.mock
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rlrazor.errors import RazorError
from rlrazor.lm import forward, kl, sampling
from rlrazor.lm.suitable import require_measurable

CLASSES = sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()}, key=str.lower)
PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"
MARK = "<!-- written by tests/architectures.py from here on -->"
VOCABULARY, CONTEXT, EOS = 44, 64, 1
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [16, 17], [18, 19, 20, 21, 22]]
TOKENS = 5
WAYS = (
    "exact; a prompt is read once for all its samples",
    "exact; a prompt is read for each sample",
    "exact; prompts of equal length together",
    "exact; without a cache, slowly",
)
REFUSED, CANNOT = "refused in a sentence", "could not be made tiny here"
_LAYERS = re.compile(
    r"depth|num_hidden_layers|(n|num|encoder|decoder|num_encoder|num_decoder|attention)_layers?|num_layers_per_stack|num_blocks"
)
# The first name that matches the whole of a field's, of those that are numbers. Others keep their default.
_SIZES = {
    re.compile(name): value
    for name, value in {
        r"vocab_size|decoder_vocab_size|vocab_size_per_layer_input|unpadded_vocab_size": VOCABULARY,
        r"hidden_size|d_model|n_embd|emb_dim|embedding_(size|dim)|word_embed_proj_dim|\w+_embedding_size": 32,
        r"lru_width|attention_hidden_size|router_hidden_size|laurel_rank|hc_lowrank": 32,
        r"\w*intermediate_size\w*|\w*ffn_dim|\w*ffn_hidden_size|dff|dim_ff|feed_forward_size|d_inner": 64,
        r"num_attention_heads|n_heads?|num_heads|attention_heads|\w+_attention_heads|num_kv_heads": 4,
        r"\w*num_key_value_heads": 2,
        r"qk_head_dim": 16,
        r"\w*head_dim|dim_head|d_head|kv_channels|attention_head_size|rotary_dim": 8,
        r"linear_num_(key_|value_)?heads|index_n_heads": 2,
        r"(num|n|moe_num)_(routed_|local_)?experts": 4,
        r"num_experts_per_tok(en)?|moe_topk|moe_k": 2,
        r"n_groups?|topk_group|num_expert_group|mamba_n_?groups|o_groups": 1,
        r"\w*_lora_rank|mamba_dt_rank|time_step_rank|hidden_size_per_layer_input": 8,
        r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_target_positions|model_max_length": CONTEXT,
        r"\w*sliding_window(_size)?|attention_window_size|window_size|attention_chunk_size": 4,
        r"\w*chunk_size|block_size": 4,
        r"\w*state_size|mamba_d_state": 8,
    }.items()
}
# What the rule for sizes does not find, by model type.
_SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "blt_local_decoder": {"hidden_size_global": 32},
    "blt_local_encoder": {"hidden_size_global": 32},
    "cohere_compass_text": {
        "layer_types": ["full_attention", "sliding_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")
        },
    },
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1},
    "dots3_note_text": {"per_layer_config": None, "head_dim": 16},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 0, "intermediate_size": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention"],
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"mamba_num_heads": 4},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "qwen2_5_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
    "qwen2_5_vl_vision": {"out_hidden_size": 32, "window_size": 112, "fullatt_block_indexes": [1]},
    "qwen2_vl_vision": {"embed_dim": 32, "hidden_size": 32, "num_heads": 4},
    "qwen3_5_vision": {"out_hidden_size": 32},
    "qwen3_vl_vision": {"out_hidden_size": 32, "deepstack_visual_indexes": [0, 1]},
    "qwen2_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16]},
    "roc_bert": {
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
        "pronunciation_vocab_size": 50,
        "shape_vocab_size": 50,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "head_dim": 16,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def shrunk(default: Any) -> Any:
    """A config of the same class with small numbers in it; of different kinds of layers, one each."""
    fields = {name: value for name, value in default.to_dict().items() if name in _parameters(type(default))}
    layers = next((v for n, v in fields.items() if _LAYERS.fullmatch(n) and isinstance(v, int)), 0)
    layers = getattr(default, "num_hidden_layers", layers) or layers
    by_layer = {n: v for n, v in fields.items() if isinstance(v, list | tuple) and len(v) == layers > 0}
    numbered = [
        n for n, v in by_layer.items() if len(set(map(str, v))) == len(v) > 4
    ]  # such as the layers with experts
    kept = _kinds([v for n, v in by_layer.items() if n not in numbered], layers)
    small: dict[str, Any] = {}
    for name, value in fields.items():
        if hasattr(default.__dict__.get(name), "to_dict"):
            small[name] = shrunk(default.__dict__[name])
        elif name in numbered:
            continue
        elif name in by_layer:
            small[name] = [value[layer] for layer in kept]
        elif (isinstance(value, int) and not isinstance(value, bool)) or (value is None and name == "head_dim"):
            if _LAYERS.fullmatch(name):
                small[name] = len(kept)
            else:
                sizes = (size for pattern, size in _SIZES.items() if pattern.fullmatch(name))
                if (size := next(sizes, None)) is not None:
                    small[name] = size if value != 0 else value
    given = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1, "initializer_range": 0.3, "is_decoder": True}
    small |= {name: value for name, value in given.items() if hasattr(default, name)}
    if "kv_lora_rank" in small:
        small["num_key_value_heads"] = 4
    return type(default)(**small | _SPECIAL.get(default.model_type, {}))


def _parameters(config_class: Any) -> set[str]:
    found: set[str] = set()
    for parent in config_class.__mro__:
        found |= set(getattr(parent, "__annotations__", {}))
    found |= set(config_class.attribute_map) | set(config_class.attribute_map.values())
    return found | set(inspect.signature(config_class.__init__).parameters)


def _kinds(lists: list[Any], layers: int) -> list[int]:
    """Of each kind of layer the first, and at least two."""
    first: dict[str, int] = {}
    for layer in range(layers):
        first.setdefault(str([values[layer] for values in lists]), layer)
    kept = sorted(first.values())
    return kept if len(kept) > 1 else [0, min(1, max(layers - 1, 0))]


def tiny(name: str, *, seed: int = 0, **config: Any) -> Any:
    """A model of the class of this name in eval mode, its weights drawn with `seed`; `config` changes its config."""
    model_class = getattr(transformers, name)
    shape = shrunk(model_class.config_class())
    for key, value in config.items():
        setattr(shape, key, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(shape).eval()
    for module in model.modules():  # logits that differ: not every class goes by initializer_range
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.nn.Parameter) and weight.dim() == 2 and 0 < weight.std() < 0.2:
            weight.data.mul_(0.3 / weight.std())
    return model


def moved(model: Any) -> Any:
    """A copy whose weights are all a tenth of their spread away."""
    tuned, rng = copy.deepcopy(model), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.is_floating_point():
                spread = parameter.std(correction=0).clamp(min=0.01)
                parameter.add_(0.1 * spread * torch.randn(parameter.shape, generator=rng))
    return tuned


@torch.no_grad()
def logits_alone(model: Any, ids: Sequence[int]) -> Tensor:
    """Of one sequence (T, V), without padding, mask and cache."""
    logits: Tensor = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
    return logits


def greedy_alone(model: Any, prompt: Sequence[int]) -> list[int]:
    """TOKENS of the most probable tokens, one after the other, everything read once more for each."""
    ids = list(prompt)
    for _ in range(TOKENS):
        ids.append(int(logits_alone(model, ids)[-1].argmax()))
        if ids[-1] == EOS:
            break
    return ids[len(prompt) :]


def kl_alone(base: Any, tuned: Any, sequences: kl.Sequences) -> float:
    """Forward KL summed over each completion, averaged over completions, in float64."""
    found = []
    for place, completion in zip(sequences.prompt_of, sequences.completions, strict=True):
        prompt = sequences.prompts[place]
        p_TV, q_TV = (
            logits_alone(model, [*prompt, *completion])[len(prompt) - 1 : -1].double().log_softmax(-1)
            for model in (base, tuned)
        )
        found.append(float((p_TV.exp() * (p_TV - q_TV)).sum()))
    return sum(found) / len(found)


def require_exact(model: Any) -> None:
    """Assert that samples and KL are those of brute force; RazorError where the model is refused."""
    require_measurable(model)
    completions = [greedy_alone(model, prompt) for prompt in PROMPTS]
    drawn = sampling.sample(
        model, PROMPTS, sampling.Sampling(samples=2, max_new_tokens=TOKENS, stop_ids=[EOS], pad_id=0, greedy=True)
    )
    assert drawn == [completion for completion in completions for _ in range(2)]
    sequences, tuned = kl.Sequences.grouped(PROMPTS, completions), moved(model)
    true = kl_alone(model, tuned, sequences)
    found = kl.forward_kl(kl.Probe(model, sequences), tuned).per_completion.mean
    assert true > 1e-3
    assert abs(found - true) < 1e-3 * true, f"KL {found}, by brute force {true}"


def way_of(model: Any) -> str:
    """How it is sampled from."""
    for way, said in zip(forward.WAYS, WAYS, strict=True):
        with (
            unittest.mock.patch.object(forward, "WAYS", (way,)),
            contextlib.suppress(RazorError),
        ):
            sampling.sample(
                model,
                PROMPTS,
                sampling.Sampling(samples=2, max_new_tokens=TOKENS, stop_ids=[EOS], pad_id=0, greedy=True),
            )
            return said
    raise AssertionError("it is sampled from in none of the ways")


def outcome(name: str) -> tuple[str, str]:
    """What became of a class, and for those that are not exact, why. Anything but RazorError is raised."""
    try:
        model = tiny(name)
    except Exception as error:
        return CANNOT, " ".join(f"{type(error).__name__}: {error}".split())[:120]
    try:
        require_exact(model)
    except RazorError as error:
        return REFUSED, str(error)
    return way_of(model), ""


def table(outcomes: dict[str, tuple[str, str]]) -> str:
    """In Markdown: classes by outcome."""
    lines = ["| what became of them | classes |", "|---|---|"]
    for kind in (*WAYS, REFUSED, CANNOT):
        named = [name for name, (found, _) in outcomes.items() if found == kind]
        lines.append(f"| {kind} ({len(named)}) | {', '.join(named)} |")
    reasons = [f"- {name}: {reason}" for name, (_, reason) in outcomes.items() if reason]
    return "\n".join([*lines, "", "What was said of those that are not exact:", "", *reasons])


def main() -> None:
    """Write the table into the page."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    outcomes = {name: outcome(name) for name in CLASSES}
    head, _, _ = PAGE.read_text(encoding="utf-8").partition(MARK)
    PAGE.write_text(f"{head}{MARK}\n\n{table(outcomes)}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
