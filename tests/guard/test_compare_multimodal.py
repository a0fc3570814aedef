"""compare, pick and the monitor on models that read images too, given text: KL by brute force, weights by layer."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_monitor_numbers import brute_force, check_last

from architectures import tiny
from laws import GENERIC, PROMPTS, SETTINGS
from rlrazor import drift
from rlrazor.errors import RazorError
from rlrazor.guard.compare import compare
from rlrazor.guard.comparison import Pair
from rlrazor.guard.measured_on import MeasuredOn
from rlrazor.guard.measuring import measurer
from rlrazor.lm import models
from rlrazor.lm.probes import of_prompts
from tiny_models import char_tokenizer, noisy, saved
from watching import trainer_of, watch

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
TOKENIZER = char_tokenizer()


def made(name: str) -> Any:
    if not hasattr(transformers, name) or int(transformers.__version__.partition(".")[0]) < 5:
        pytest.skip(f"this transformers has no {name}, or another layout of it")
    return tiny(name)


@pytest.mark.parametrize("name", ["Qwen3_5ForConditionalGeneration", "Gemma3ForConditionalGeneration"])
def test_text_prompts_are_compared_through_the_text_path(tmp_path: Path, name: str) -> None:
    base = made(name)
    tuned = copy.deepcopy(base)
    language = {id(weight) for weight in tuned.model.language_model.parameters()}
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in tuned.parameters():
            if id(weight) in language:
                weight += 0.02 * torch.randn(weight.shape, generator=rng)
    folders = [saved(tmp_path / kind, model, TOKENIZER) for kind, model in (("base", base), ("tuned", tuned))]
    found = compare(Pair(str(folders[0]), str(folders[1])), PROMPTS, settings=SETTINGS, generic=GENERIC)
    new = of_prompts(base, TOKENIZER, PROMPTS, SETTINGS)
    assert found.kl["kl_forward"].mean == pytest.approx(brute_force(base, tuned, new), rel=1e-4)
    expected = drift.measure_weights(dict(base.named_parameters()), dict(tuned.named_parameters()), spectra=False)
    assert found.weights.l2 == pytest.approx(expected["weight_l2"], rel=1e-3)
    by_name = {layer.name: layer.l2 for layer in found.weights.layers}
    assert by_name["layer 0"] > 0
    seen = [change for layer, change in by_name.items() if layer.startswith(("visual layer", "vision layer"))]
    assert seen
    assert not any(seen)


def test_a_text_model_that_was_tuned_out_of_a_multimodal_one_is_compared_with_it(tmp_path: Path) -> None:
    """TRL loads Qwen3.5 as its text model alone, and saves that."""
    base = made("Qwen3_5ForConditionalGeneration")
    text = transformers.Qwen3_5ForCausalLM(base.config.text_config).eval()
    text.model.load_state_dict(base.model.language_model.state_dict())
    text.lm_head.load_state_dict(base.lm_head.state_dict())
    tuned = noisy(text, 0.02)
    folders = [saved(tmp_path / kind, model, TOKENIZER) for kind, model in (("base", base), ("tuned", tuned))]
    found = compare(Pair(str(folders[0]), str(folders[1])), PROMPTS, settings=SETTINGS, generic=GENERIC)
    new = of_prompts(text, TOKENIZER, PROMPTS, SETTINGS)
    assert found.kl["kl_forward"].mean == pytest.approx(brute_force(text, tuned, new), rel=1e-4)
    expected = drift.measure_weights(dict(text.named_parameters()), dict(tuned.named_parameters()), spectra=False)
    assert found.weights.l2 == pytest.approx(expected["weight_l2"], rel=1e-3)
    assert any("are in one of the two only" in note for note in found.notes)  # what sees


@pytest.mark.parametrize("kind", ["Qwen3_5ForConditionalGeneration", "Qwen3_5ForCausalLM"])
def test_an_adapter_is_put_on_the_class_that_it_was_trained_on(tmp_path: Path, kind: str) -> None:
    base = made("Qwen3_5ForConditionalGeneration")
    folder = saved(tmp_path / "base", base, TOKENIZER)
    on = getattr(transformers, kind).from_pretrained(folder)
    adapted = models.add_lora(on, rank=2)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.2, generator=torch.Generator().manual_seed(3))
    adapted.eval().save_pretrained(tmp_path / "adapter")
    lm = models.load(folder, adapter=tmp_path / "adapter")
    assert type(lm.model.get_base_model()).__name__ == kind
    found = compare(Pair(str(folder), str(tmp_path / "adapter")), PROMPTS, settings=SETTINGS, generic=GENERIC)
    new = of_prompts(base, TOKENIZER, PROMPTS, SETTINGS)
    assert found.kl["kl_forward"].mean == pytest.approx(brute_force(base, adapted, new), rel=1e-4)
    assert found.kl["kl_forward"].mean > 1e-3


@pytest.mark.parametrize("name", ["T5Gemma2ForConditionalGeneration", "Florence2ForConditionalGeneration"])
def test_encoder_decoders_that_read_images_are_refused_by_name(tmp_path: Path, name: str) -> None:
    folder = saved(tmp_path / "model", made(name), TOKENIZER)
    with pytest.raises(RazorError, match=rf"is an encoder-decoder \({name}\)"):
        models.load(folder)


@pytest.mark.filterwarnings("ignore")
def test_the_monitor_and_pick_measure_them(tmp_path: Path) -> None:
    base = made("Qwen3_5ForConditionalGeneration")
    saved(tmp_path / "base", base, TOKENIZER)
    watching = watch(tmp_path, every=6)
    trainer = trainer_of(tmp_path / "run", [watching], copy.deepcopy(base), save_strategy="steps", save_steps=6)
    trainer.train()
    check_last(watching, base, trainer.model)
    on = MeasuredOn(PROMPTS, GENERIC, SETTINGS)
    measure, _ = measurer(str(tmp_path / "base"), "float32", on, None, lambda told: None)
    found = measure(tmp_path / "run" / "checkpoint-6", 6)
    assert found.kl["kl_forward"].mean == pytest.approx(watching.readings[-1].kl["kl_forward"].mean, rel=1e-4)
