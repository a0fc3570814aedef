"""compare on adapters of every kind: both KLs against brute force, weights against the merged model."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_monitor_numbers import brute_force, phi

from laws import GENERIC, PROMPTS, SETTINGS, changed, law_of
from rlrazor import drift
from rlrazor.errors import RazorError
from rlrazor.guard.compare import compare
from rlrazor.guard.comparison import Comparison, Pair
from rlrazor.lm.kl import Sequences
from rlrazor.lm.probes import NEW, complete, of_prompts
from tiny_models import char_tokenizer, saved, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
TOKENIZER = char_tokenizer()
KINDS: dict[str, Any] = {
    "dora": LoraConfig(r=2, target_modules=["q_proj", "down_proj"], use_dora=True),
    "ia3": peft.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "vera": peft.VeraConfig(r=2, target_modules=["q_proj"]),
    "tokens": LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 4]),
    "a copy of the head": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "with the base's biases": LoraConfig(r=2, target_modules=["q_proj"], bias="all"),
    "pissa": LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights="pissa"),
    "olora": LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights="olora"),
}


def learnt(config: Any, base: Any) -> Any:
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    config.task_type = "CAUSAL_LM"
    adapted = get_peft_model(copy.deepcopy(base), config)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight += 0.2 * torch.randn(weight.shape, generator=rng)
    return adapted.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_compared_as_what_it_makes_of_its_base(tmp_path: Path, kind: str) -> None:
    base = phi() if KINDS[kind].to_dict().get("bias") == "all" else tiny_llama()
    folder = saved(tmp_path / "base", base, TOKENIZER)
    adapted = learnt(KINDS[kind], base)
    adapted.save_pretrained(tmp_path / "adapter")
    found = compare(Pair(str(folder), str(tmp_path / "adapter")), PROMPTS, settings=SETTINGS, generic=GENERIC)
    new = of_prompts(base, TOKENIZER, PROMPTS, SETTINGS)
    own = Sequences.grouped(new.prompts, complete(adapted, TOKENIZER, new.prompts, SETTINGS, NEW))
    assert found.kl["kl_forward"].mean == pytest.approx(brute_force(base, adapted, new), rel=1e-3)
    assert found.kl["kl_reverse"].mean == pytest.approx(brute_force(adapted, base, own), rel=1e-3)
    assert found.kl["kl_forward"].mean > 1e-3
    merged = dict(adapted.merge_and_unload().named_parameters())
    expected = drift.measure_weights(dict(base.named_parameters()), merged, spectra=False)
    assert found.weights.l2 == pytest.approx(expected["weight_l2"], rel=1e-3)
    if kind not in ("pissa", "olora"):  # which leave rounding in what they do not change
        assert found.weights.unchanged == pytest.approx(expected["weight_sparsity"], abs=1e-3)
    assert not list(found.notes)


def test_weights_that_cannot_be_merged_are_noted(tmp_path: Path) -> None:
    folder = saved(tmp_path / "base", tiny_llama(), TOKENIZER)
    config = LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True)
    learnt(config, tiny_llama()).save_pretrained(tmp_path / "adapter")
    found = compare(Pair(str(folder), str(tmp_path / "adapter")), PROMPTS, settings=SETTINGS, generic=GENERIC)
    assert found.kl["kl_forward"].mean > 1e-3
    assert any(note.startswith("2 weights are not among the changes. PEFT cannot merge") for note in found.notes)


def compared(folder: Path, tuned: Any, dtype: str, **settings: Any) -> Comparison:
    path = saved(folder / "tuned", tuned, TOKENIZER)
    return compare(Pair(str(folder / "base"), str(path), dtype), PROMPTS, generic=GENERIC, **settings)


def test_the_precision_is_the_pairs_and_the_laws(tmp_path: Path) -> None:
    base = tiny_llama(hidden=64)
    saved(tmp_path / "base", base, TOKENIZER)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for weight in tuned.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    exact, rounded = (compared(tmp_path, tuned, dtype, settings=SETTINGS) for dtype in ("float32", "bfloat16"))
    new = of_prompts(base, TOKENIZER, PROMPTS, SETTINGS)
    assert exact.kl["kl_forward"].mean == pytest.approx(brute_force(base, tuned, new), rel=1e-4)
    assert rounded.kl["kl_probe"].mean == pytest.approx(exact.kl["kl_probe"].mean, rel=0.3)
    assert rounded.kl["kl_probe"].mean != pytest.approx(exact.kl["kl_probe"].mean, rel=1e-4)
    assert np.isfinite(rounded.kl["kl_reverse"].mean)
    halves = compared(tmp_path, tuned, "float16", settings=SETTINGS)
    assert halves.kl["kl_probe"].mean == pytest.approx(exact.kl["kl_probe"].mean, rel=0.05)  # of finer rounding
    assert (exact.pair.dtype, exact.setup.first_prompt) == ("float32", PROMPTS[0])
    law = law_of(base)
    law = changed(law, probe__precision="float32")
    assert compared(tmp_path, tuned, "float32", law=law).law_says is not None
    with pytest.raises(RazorError, match="The law was calibrated in float32, and the models are to be loaded in bfl"):
        compared(tmp_path, tuned, "bfloat16", law=law)
