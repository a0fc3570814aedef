"""Models that read images too, given text: samples and KL against brute force, on real architectures made tiny."""

from typing import Any

import pytest
import torch
import transformers

from architectures import PROMPTS, greedy_alone, kl_alone, moved, require_exact, tiny
from rlrazor.lm import images, kl, sampling

NAMES = [
    "AyaVisionForConditionalGeneration",  # whose logits are not scaled as those of its text model alone
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


@pytest.mark.skipif(int(transformers.__version__.partition(".")[0]) < 5, reason="older versions have no such model")
def test_what_was_read_with_an_image_does_not_shift_the_positions_of_text() -> None:
    """Models with positions in three dimensions keep how far an image has moved them."""
    model = tiny("Qwen3VLForConditionalGeneration")
    right = [greedy_alone(model, prompt) for prompt in PROMPTS]
    model.model.rope_deltas = torch.tensor([[7]])
    require_exact(model)
    assert [greedy_alone(model, prompt) for prompt in PROMPTS] == right


IMAGE = 43  # the token that an image's patches have


def shown(model: Any, grid: tuple[int, int], seed: int) -> images.SeenIds:
    """A prompt around an image of so many patches, as Qwen's processors make it of one."""
    vision = model.config.vision_config
    width = 3 * getattr(vision, "temporal_patch_size", 2) * vision.patch_size**2
    pixels = torch.randn(grid[0] * grid[1], width, generator=torch.Generator().manual_seed(seed))
    places = grid[0] * grid[1] // vision.spatial_merge_size**2
    ids = [5, 6, *[IMAGE] * places, 7, 8]
    types = torch.tensor([[int(token == IMAGE) for token in ids]])
    beside = {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, *grid]]), "mm_token_type_ids": types}
    return images.SeenIds(ids, beside)


@torch.no_grad()
def logits_given(model: Any, prompt: images.SeenIds, completion: list[int]) -> torch.Tensor:
    """Of one full forward with the image, at the completion's tokens and one behind."""
    extra = torch.zeros(1, len(completion), dtype=torch.long)
    beside = dict(prompt.beside) | {"mm_token_type_ids": torch.cat([prompt.beside["mm_token_type_ids"], extra], dim=1)}
    beside["pixel_values"] = beside["pixel_values"].to(model.dtype)
    out = model(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False, **beside)
    found: torch.Tensor = out.logits[0, len(prompt) - 1 :]
    return found


@pytest.mark.parametrize(
    "name",
    [f"{name}ForConditionalGeneration" for name in ("Qwen2VL", "Qwen2_5_VL", "Qwen3VL", "Qwen3_5")],
)
def test_positions_that_an_image_moves_are_those_of_a_whole_forward(name: str) -> None:
    if not hasattr(transformers, name) or int(transformers.__version__.partition(".")[0]) < 5:
        pytest.skip(f"this transformers has no {name}, or another layout of it")
    base = tiny(name, image_token_id=IMAGE)
    base.get_output_embeddings().weight.data[IMAGE] = 0  # so that it does not write the token of an image
    prompts = [shown(base, (4, 4), 1), shown(base, (8, 4), 2)]
    how = sampling.Sampling(greedy=True, max_new_tokens=4, stop_ids=[], pad_id=0, samples=2)
    drawn = sampling.sample(base, prompts, how)
    assert all(int(logits_given(base, prompts[0], drawn[0][:at])[-1].argmax()) == drawn[0][at] for at in range(4))
    sequences, expected = kl.Sequences.grouped(prompts, drawn), []
    exact, tuned = (model.double() for model in (base, moved(base)))
    for place, completion in zip(sequences.prompt_of, drawn, strict=True):
        assert logits_given(exact, prompts[place], completion)[:-1].argmax(dim=-1).tolist() == completion
        p, q = (logits_given(model, prompts[place], completion)[:-1].log_softmax(-1) for model in (exact, tuned))
        expected.append(float((p.exp() * (p - q)).sum()))
    found = kl.forward_kl(kl.Probe(exact, sequences), tuned).per_completion.mean
    assert found == pytest.approx(sum(expected) / len(expected), rel=1e-5)
