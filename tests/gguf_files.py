"""GGUF files of tiny models, for tests that have one converted."""

from pathlib import Path
from typing import Any

import pytest


def write_gguf(path: Path, model: Any) -> None:
    """A tiny Llama as llama.cpp's converter writes it: float16 matrices, rotary dimensions interleaved."""
    gguf = pytest.importorskip("gguf")

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    tokens = ["<pad>", ";", *(chr(ord("a") + n) for n in range(config.vocab_size - 3)), "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (config.vocab_size - 2))  # 3: control, 1: normal
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:
            out, width = tensor.shape
            tensor = tensor.reshape(heads, 2, out // heads // 2, width).swapaxes(1, 2).reshape(out, width)
        array = tensor.numpy().astype("float16" if tensor.ndim == 2 else "float32")
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
