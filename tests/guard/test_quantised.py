"""Quantised bases: KL against brute force, what it is said to be of, and adapters that were trained on them."""

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_monitor_numbers import brute_force, check_last
from transformers import AutoModelForCausalLM

from laws import GENERIC, PROMPTS, SETTINGS
from rlrazor import drift
from rlrazor.errors import RazorError
from rlrazor.guard.compare import compare
from rlrazor.guard.comparison import Comparison, Pair
from rlrazor.guard.weight_changes import changes
from rlrazor.lm import models
from rlrazor.lm.adapters import AdaptedWeights, BaseWeights, adapter_disabled
from rlrazor.lm.loading import check_finite
from rlrazor.lm.probes import of_prompts
from rlrazor.lm.quantised import is_quantised, plain_weight, scheme_of
from rlrazor.lm.undone import check_undone
from tiny_models import char_tokenizer, saved, tiny_llama
from watching import trainer_of, watch

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own
TOKENIZER = char_tokenizer()
SCHEMES = {"nf4": "bitsandbytes, 4 bits (nf4)", "int8": "bitsandbytes, 8 bits", "torchao": "torchao"}


def how(scheme: str) -> Any:
    """One of transformers' quantization configs."""
    if scheme == "torchao":
        quantization = pytest.importorskip("torchao.quantization")
        from transformers import TorchAoConfig

        return TorchAoConfig(quantization.Int8WeightOnlyConfig())
    pytest.importorskip("bitsandbytes", minversion="0.48")  # the first that computes on a CPU
    from transformers import BitsAndBytesConfig

    if scheme == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


def quantised(folder: Path, scheme: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=how(scheme), dtype=torch.float32, device_map="cpu"
    )


def made(folder: Path, scheme: str) -> tuple[Any, Any]:
    """A base in `folder`/plain, the same quantised in `folder`/few, and both."""
    base = tiny_llama(hidden=64)
    few = quantised(saved(folder / "plain", base, TOKENIZER), scheme)
    saved(folder / "few", few, TOKENIZER)
    return base, few


def learnt(model: Any) -> Any:
    adapted = models.add_lora(model, rank=2)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    return adapted.eval()


def compared(folder: Path, base: str, tuned: str) -> Comparison:
    pair = Pair(str(folder / base), str(folder / tuned))
    return compare(pair, PROMPTS, settings=SETTINGS, generic=GENERIC)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_of_which_of_the_two_the_kl_is_is_said(tmp_path: Path, scheme: str) -> None:
    base, few = made(tmp_path, scheme)
    from_few, to_few = compared(tmp_path, "few", "plain"), compared(tmp_path, "plain", "few")
    new = of_prompts(few, TOKENIZER, PROMPTS, SETTINGS)
    assert from_few.kl["kl_forward"].mean == pytest.approx(brute_force(few, base, new), rel=1e-4)
    new = of_prompts(base, TOKENIZER, PROMPTS, SETTINGS)
    assert to_few.kl["kl_forward"].mean == pytest.approx(brute_force(base, few, new), rel=1e-4)
    said = f"The base is quantised ({SCHEMES[scheme]}), and the tuned model is not: the KL is to the quantised base"
    assert any(note.startswith(said) for note in from_few.notes)
    assert any("the KL is of the quantised model" in note for note in to_few.notes)
    plain = {name: plain_weight(few.get_submodule(name.rpartition(".")[0])) for name in base.state_dict()}
    expected = drift.measure_weights(dict(base.named_parameters()), plain, spectra=False)["weight_l2"]
    assert expected > 0.1
    for found in (from_few, to_few):
        assert found.weights.l2 == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_adapter_on_a_quantised_base_is_what_it_adds_to_it(tmp_path: Path, scheme: str) -> None:
    _, few = made(tmp_path, scheme)
    adapted = learnt(few)
    adapted.save_pretrained(tmp_path / "adapter")
    found = compared(tmp_path, "few", "adapter")
    with adapter_disabled(adapted):
        new = of_prompts(adapted, TOKENIZER, PROMPTS, SETTINGS)
    assert found.kl["kl_forward"].mean == pytest.approx(
        brute_force(quantised(tmp_path / "plain", scheme), adapted, new), rel=1e-4
    )
    assert any("the KL is of the adapter alone" in note for note in found.notes)
    added = [
        layer.get_delta_weight("default").double().square().sum()
        for layer in adapted.modules()
        if hasattr(layer, "get_delta_weight")
    ]
    assert found.weights.l2 == pytest.approx(float(sum(added)) ** 0.5, rel=1e-3)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_two_that_are_quantised_are_compared_as_they_are(tmp_path: Path, scheme: str) -> None:
    made(tmp_path, scheme)
    found = compared(tmp_path, "few", "few")
    assert found.kl["kl_forward"].mean == 0
    assert any("the KL is of the two as they are" in note for note in found.notes)
    assert not found.weights.layers


@pytest.mark.parametrize("scheme", ["nf4", "torchao"])
def test_what_is_under_an_adapter_is_proven_to_be_the_base_as_it_was_quantised(tmp_path: Path, scheme: str) -> None:
    """A QLoRA that goes on: the base's files are not quantised, what is under the adapter is."""
    _, few = made(tmp_path, scheme)
    check_undone(models.add_lora(quantised(tmp_path / "plain", scheme), rank=2))
    adapted = learnt(few)
    check_undone(adapted)
    adapted.base_model.model.model.norm.weight.data[3] += 0.5
    with pytest.raises(RazorError, match="Without its adapter this model is not the base"):
        check_undone(adapted)


def test_the_monitor_measures_qlora(tmp_path: Path) -> None:
    from peft import prepare_model_for_kbit_training

    _, few = made(tmp_path, "nf4")
    adapted = models.add_lora(prepare_model_for_kbit_training(few, use_gradient_checkpointing=False), rank=2)
    watching = watch(tmp_path, every=6)
    trainer = trainer_of(tmp_path / "run", [watching], adapted, learning_rate=3e-2)
    trainer.train()
    check_last(watching, quantised(tmp_path / "plain", "nf4"), trainer.model)


def test_compressed_tensors_are_compared_as_the_numbers_that_they_stand_for(tmp_path: Path) -> None:
    compressed = pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme

    base = tiny_llama(hidden=128)
    saved(tmp_path / "plain", base, TOKENIZER)
    scheme = preset_name_to_scheme("W8A16", ["Linear"])
    scheme.weights.observer = None
    config = QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"])
    few = tiny_llama(hidden=128)
    apply_quantization_config(few, config)
    for module in few.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            module.weight_scale.data = module.weight.detach().unflatten(1, (-1, 128)).abs().amax(dim=2) / 127
            if hasattr(module, "weight_zero_point"):
                module.weight_zero_point.data.zero_()
    compressor = compressed.ModelCompressor.from_pretrained_model(few)
    compressor.compress_model(few)
    saved(tmp_path / "few", few, TOKENIZER)
    compressor.update_config(tmp_path / "few")
    assert scheme_of(json.loads((tmp_path / "few" / "config.json").read_text())) == "compressed-tensors"
    lm = models.load(tmp_path / "few")
    found = compared(tmp_path, "few", "plain")
    new = of_prompts(lm.model, TOKENIZER, PROMPTS, SETTINGS)
    assert found.kl["kl_forward"].mean == pytest.approx(brute_force(lm.model, base, new), rel=1e-4)
    assert 0 < found.kl["kl_forward"].mean < 0.1
    assert any(note.startswith("The base is quantised (compressed-tensors)") for note in found.notes)


def test_bits_of_fp8_are_no_numbers(tmp_path: Path) -> None:
    layer, held = torch.nn.Linear(4, 4), torch.nn.Module()
    layer.weight = torch.nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    held.experts = torch.nn.Parameter(torch.tensor([1.0, torch.nan]).to(torch.float8_e4m3fn), requires_grad=False)
    assert is_quantised(layer)
    with pytest.raises(NotImplementedError):
        plain_weight(layer)
    check_finite(layer, "it")
    with pytest.raises(RazorError, match="experts is NaN"):
        check_finite(held, "it")
    bits, plain = {"a": layer.weight, "b": torch.ones(2)}, {"a": torch.ones(4, 4), "b": torch.ones(2)}
    for base, tuned in ((bits, plain), (plain, bits)):
        layers, notes = changes(base, tuned, ("the base", "it"))
        assert [layer.name for layer in layers] == ["b"]
        assert any("1 weights are not among the changes. a is quantised (FP8)" in note for note in notes)


def test_what_is_added_to_a_quantised_weight_is_of_its_own_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of two active adapters is on another layer; one that is merged would count twice."""
    monkeypatch.setattr("rlrazor.lm.adapters.is_quantised", lambda module: True)  # whatever is installed
    adapted = learnt(tiny_llama())
    name = next(name for name, layer in adapted.named_modules() if hasattr(layer, "lora_A"))
    path = name.removeprefix("base_model.model.") + ".weight"
    layer: Any = adapted.get_submodule(name)
    expected = layer.base_layer.weight + layer.get_delta_weight("default")
    assert not torch.equal(expected, layer.base_layer.weight)
    layer._active_adapter = ["default", "elsewhere"]
    torch.testing.assert_close(AdaptedWeights(adapted)[path], expected)
    layer._active_adapter = ["elsewhere"]
    torch.testing.assert_close(AdaptedWeights(adapted)[path], BaseWeights(adapted)[path])
    layer._active_adapter, layer.merged_adapters = ["default"], ["default"]
    with pytest.raises(RazorError, match="merged into quantised weights"):
        AdaptedWeights(adapted)[path]


@pytest.mark.parametrize(("method", "package"), [("gptq", "gptqmodel|optimum"), ("awq", "gptqmodel|autoawq|awq")])
def test_a_package_that_is_not_installed_is_a_sentence(tmp_path: Path, method: str, package: str) -> None:
    if any(name in ("gptqmodel", "autoawq") for name in map(_named, importlib.metadata.distributions())):
        pytest.skip("it is installed")
    folder = saved(tmp_path / "few", tiny_llama(), TOKENIZER)
    path = folder / "config.json"
    said = {"quant_method": method, "bits": 4, "group_size": 32}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": said}))
    assert scheme_of(json.loads(path.read_text())) == f"{method.upper()}, 4 bits"
    with pytest.raises(RazorError, match=rf"cannot be loaded: .*({package})"):
        models.load(folder)


def _named(distribution: Any) -> str:
    return str(distribution.metadata["Name"]).lower()
