"""Models that do not fit on one device, placed by accelerate in memory and on disk: the same numbers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_monitor_numbers import brute_force
from transformers import AutoModelForCausalLM

from laws import GENERIC, PROMPTS, SETTINGS
from rlrazor import drift
from rlrazor.errors import RazorError
from rlrazor.guard.compare import compare
from rlrazor.guard.comparison import Pair
from rlrazor.lm import compute, kl, loading, models, offloading
from rlrazor.lm.adapters import BaseWeights
from rlrazor.lm.digests import base_digest
from rlrazor.lm.probes import of_prompts
from tiny_models import char_tokenizer, noisy, saved, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
TOKENIZER = char_tokenizer()


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """In tmp_path/base; whatever is loaded has room for half of it."""
    model = tiny_llama(hidden=64, layers=4)
    saved(tmp_path / "base", model, TOKENIZER)
    size = sum(weight.numel() * 4 for weight in model.parameters())
    monkeypatch.setattr(offloading, "room", lambda: {"cpu": size // 2})
    return model


def require_offloaded(model: Any) -> None:
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    assert any(weight.device.type == "meta" for weight in model.parameters())


def test_what_does_not_fit_is_offloaded_and_measured_as_ever(tmp_path: Path, base: Any) -> None:
    lm = models.load(tmp_path / "base")
    require_offloaded(lm.model)
    assert compute.device_of(lm.model).type == "cpu"
    assert base_digest(lm.model) == base_digest(base)
    weights = BaseWeights(lm.model)
    assert all(torch.equal(weights[name], weight) for name, weight in base.named_parameters())
    sequences = of_prompts(base, TOKENIZER, PROMPTS, SETTINGS)
    assert of_prompts(lm.model, TOKENIZER, PROMPTS, SETTINGS) == sequences
    tuned = noisy(base, 0.02)
    expected = kl.forward_kl(kl.Probe(base, sequences), tuned).per_completion.mean
    saved(tmp_path / "tuned", tuned, TOKENIZER)
    there = models.load(tmp_path / "tuned").model
    require_offloaded(there)
    found = kl.forward_kl(kl.Probe(lm.model, sequences), there).per_completion.mean
    assert found == pytest.approx(expected, rel=1e-5)
    assert found == pytest.approx(brute_force(base, tuned, sequences), rel=1e-5)


def with_adapter(base: Any, kind: str) -> Any:
    """LoRA, or DoRA whose magnitudes have been trained as well, of which the layers' own weights have to be known."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        targets = ["q_proj", "down_proj", "embed_tokens"] if kind == "dora" else "all-linear"
        tuned = get_peft_model(base, LoraConfig(r=2, use_dora=kind == "dora", target_modules=targets)).eval()
        for name, weight in tuned.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                weight.data.normal_(std=0.1)
            elif "magnitude" in name:
                weight.data *= 1 + 0.1 * torch.randn_like(weight)
    return tuned


@pytest.mark.parametrize("kind", ["full", "adapter", "dora"])
def test_both_sides_of_a_comparison_may_be_offloaded(tmp_path: Path, base: Any, kind: str) -> None:
    if kind == "full":
        tuned = merged = noisy(base, 0.02)
        saved(tmp_path / "tuned", tuned, TOKENIZER)
    else:
        tuned = with_adapter(tiny_llama(hidden=64, layers=4), kind)
        tuned.save_pretrained(tmp_path / "tuned")
        merged = None
    found = compare(Pair(str(tmp_path / "base"), str(tmp_path / "tuned")), PROMPTS, settings=SETTINGS, generic=GENERIC)
    new = of_prompts(base, TOKENIZER, PROMPTS, SETTINGS)
    assert found.kl["kl_forward"].mean == pytest.approx(brute_force(base, tuned, new), rel=1e-5)
    merged = dict((tuned.merge_and_unload() if merged is None else merged).named_parameters())
    expected = drift.measure_weights(dict(base.named_parameters()), merged, spectra=False)
    assert found.weights.l2 == pytest.approx(expected["weight_l2"], rel=1e-3)
    assert not list(found.notes)


def test_a_model_that_its_owner_has_placed_is_measured_where_it_is(tmp_path: Path, base: Any) -> None:
    """`device_map="auto"` with the head on disk and a layer on the CPU."""
    placed = {"model": "cpu", "lm_head": "disk"} | {f"model.layers.{layer}": "disk" for layer in range(3)}
    placed |= {"model.layers.3": "cpu", "model.embed_tokens": "cpu", "model.norm": "disk", "model.rotary_emb": "cpu"}
    del placed["model"]
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", device_map=placed, offload_folder=tmp_path / "offloaded", **loading.in_dtype(torch.float32)
    ).eval()
    sequences = of_prompts(base, TOKENIZER, PROMPTS, SETTINGS)
    tuned = noisy(base, 0.02)
    found = kl.forward_kl(kl.Probe(model, sequences), tuned).per_completion.mean
    assert found == pytest.approx(brute_force(base, tuned, sequences), rel=1e-5)


def test_damage_shows_in_what_is_offloaded_too(tmp_path: Path, base: Any) -> None:
    with torch.no_grad():
        base.lm_head.weight[3, 5] = torch.nan
    saved(tmp_path / "base", base, TOKENIZER)
    with pytest.raises(RazorError, match=r"damaged: lm_head\.weight is NaN"):
        models.load(tmp_path / "base")


def test_what_fits_is_not_placed(tmp_path: Path, base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offloading, "room", lambda: {"cpu": 1 << 40})
    assert not offloading.is_placed(models.load(tmp_path / "base").model)
    assert offloading.placing(1 << 41, torch.device("cpu"), quantised=False)["device_map"] == "auto"
    assert offloading.placing(1, torch.device("cpu"), quantised=True) == {"device_map": {"": torch.device("cpu")}}
