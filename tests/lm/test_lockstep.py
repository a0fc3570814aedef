"""What models that are spread over processes are asked, in one process: FSDP1's own wrapper, over gloo alone."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import distributed
from torch._C._distributed_c10d import HashStore
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from rlrazor.errors import RazorError
from rlrazor.guard.placing import require_data_parallel
from rlrazor.lm import forward, undone
from rlrazor.lm.adapters import adapter_disabled
from rlrazor.lm.lockstep import Lockstep, whole_state
from rlrazor.lm.models import add_lora
from tiny_models import char_tokenizer, saved, tiny_llama

IDS_14 = torch.tensor([[1, 2, 3, 4]])
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def group() -> Iterator[None]:
    distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def fsdp1(model: Any) -> Any:
    """By layers, as trainers wrap it."""
    layers = partial(transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer})
    return FullyShardedDataParallel(model, auto_wrap_policy=layers, use_orig_params=True, device_id=torch.device("cpu"))


def test_each_call_says_whether_the_adapter_is_on() -> None:
    """Whoever calls for others has to call the same parts."""
    model = add_lora(tiny_llama(), 2)
    steps = Lockstep(model)
    steps.is_for_others = True  # nobody is there to agree with
    said = []
    with steps.installed():
        model(input_ids=IDS_14)
        said.append(steps.without_adapter)
        with adapter_disabled(model):
            with adapter_disabled(model):
                model(input_ids=IDS_14)
            said.append(steps.without_adapter)
            model(input_ids=IDS_14)
            said.append(steps.without_adapter)
        model(input_ids=IDS_14)
        said.append(steps.without_adapter)
    assert said == [False, True, True, False]


def test_fsdp1_is_told_only_what_the_model_inside_names(group: None) -> None:
    model = fsdp1(tiny_llama())
    assert forward._accepted(model, logits_to_keep=1, no_such_option=1) == {"logits_to_keep": 1}
    assert forward.plain_logits(model, IDS_14, [1, 3]).shape[1] == 2


def test_an_adapter_under_fsdp1_is_compared_with_the_bases_files_by_name(
    group: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the weights, one at a time: the base is not loaded a second time in each process."""
    monkeypatch.setattr(undone, "load", None)
    folder = saved(tmp_path / "base", tiny_llama(), char_tokenizer())
    for factor in (1.0, 1.1):
        model = AutoModelForCausalLM.from_pretrained(folder)
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        with torch.no_grad():
            model.get_decoder().layers[0].self_attn.q_proj.base_layer.weight.mul_(factor)
        wrapped = fsdp1(model)
        if factor == 1.0:
            undone.check_undone(wrapped)
        else:
            with pytest.raises(RazorError, match="this model is not the base"):
                undone.check_undone(wrapped)


def test_of_an_adapter_the_frozen_base_is_not_put_together(group: None) -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"]))
    names = set(model.state_dict())
    state = whole_state(fsdp1(model), here=True)
    assert state is not None
    tables = {name for name in names if "embed_tokens" in name or "lm_head" in name}
    trained = {name for name in names if "lora_" in name or "modules_to_save" in name}
    assert len(trained) == 2 * 2 + 5  # LoRA's, and every norm's copy
    assert {name for name in state if "inv_freq" not in name} == trained | tables


def test_sharded_and_quantised_is_refused(group: None) -> None:
    """Of such a model processes see packed bits."""
    model = fsdp1(tiny_llama())
    require_data_parallel(model)
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    with pytest.raises(RazorError, match=r"bitsandbytes, 4 bits \(fp4\).*razor watch"):
        require_data_parallel(model)
