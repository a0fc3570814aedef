"""Models that read images too, given text: samples and KL against brute force, on real architectures made tiny."""

import pytest
import torch
import transformers

from architectures import PROMPTS, greedy_alone, kl_alone, moved, require_exact, tiny
from rlrazor.lm import kl

NAMES = [
    "Gemma3ForConditionalGeneration", "Idefics3ForConditionalGeneration", "InternVLForConditionalGeneration",
    "Lfm2VlForConditionalGeneration", "LlavaForConditionalGeneration", "LlavaOnevisionForConditionalGeneration",
    "Mistral3ForConditionalGeneration", "MllamaForConditionalGeneration", "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration", "Qwen3VLForConditionalGeneration", "Qwen3VLMoeForConditionalGeneration",
    "Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration", "SmolVLMForConditionalGeneration",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_text_alone_is_measured_through_the_text_path(name: str) -> None:
    if not hasattr(transformers, name) or int(transformers.__version__.partition(".")[0]) < 5:
        pytest.skip(f"this transformers has no {name}, or another layout of it")
    base = tiny(name)
    require_exact(base)
    for config in (base.config, base.config.get_text_config()):
        config._experts_implementation = "eager"  # which takes float64
    exact, tuned = (model.double() for model in (base, moved(base)))
    sequences = kl.Sequences.grouped(PROMPTS, [greedy_alone(base, prompt) for prompt in PROMPTS])
    found = kl.forward_kl(kl.Probe(exact, sequences), tuned).per_completion.mean
    assert found == pytest.approx(kl_alone(exact, tuned, sequences), rel=1e-5)


def test_what_was_read_with_an_image_does_not_shift_the_positions_of_text() -> None:
    """Models with positions in three dimensions keep how far an image has moved them."""
    model = tiny("Qwen3VLForConditionalGeneration")
    right = [greedy_alone(model, prompt) for prompt in PROMPTS]
    model.model.rope_deltas = torch.tensor([[7]])
    require_exact(model)
    assert [greedy_alone(model, prompt) for prompt in PROMPTS] == right
