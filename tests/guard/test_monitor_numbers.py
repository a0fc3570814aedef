"""The monitor's KL is the brute force's, whatever is trained, however, and in whatever precision."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PhiConfig, PhiForCausalLM, TrainerCallback

from laws import PROMPTS, SETTINGS, changed, law_of
from rlrazor.errors import RazorError
from rlrazor.guard import ForgettingMonitor, schedule
from rlrazor.lm import kl
from rlrazor.lm.probes import ProbeSettings
from tiny_models import tiny_llama
from watching import TOKENIZER, losses_of, trainer_of, watch

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@torch.no_grad()
def brute_force(base: Any, tuned: Any, probe: kl.Sequences) -> float:
    """Nats per completion: each alone, without padding, from all logits in float64."""
    found = []
    for prompt, completion in zip(probe.prompt_of, probe.completions, strict=True):
        ids = torch.tensor([[*probe.prompts[prompt], *completion]])
        at = slice(len(probe.prompts[prompt]) - 1, -1)
        p, q = (model.eval()(input_ids=ids).logits[0, at].double().log_softmax(-1) for model in (base, tuned))
        found.append(float((p.exp() * (p - q)).sum()))
    return float(np.mean(found))


def check_last(watching: ForgettingMonitor, base: Any, tuned: Any, rel: float = 1e-4) -> None:
    assert watching.base is not None
    for name, probe in watching.base.probes.items():
        expected = brute_force(base, tuned, probe.sequences)
        assert watching.readings[-1].kl[name].mean == pytest.approx(expected, rel=rel)
        assert expected > 1e-3


def phi() -> Any:
    """A model whose LM head has a bias."""
    torch.manual_seed(0)
    return PhiForCausalLM(
        PhiConfig(
            vocab_size=44, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=64, initializer_range=0.3, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        )
    ).eval()  # fmt: skip


class Thaw(TrainerCallback):  # type: ignore[misc]
    """Gradual unfreezing: everything is trained from step 2 on."""

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == 2:
            model.requires_grad_(True)


def only_layers(model: Any) -> Any:
    for name, weight in model.named_parameters():
        weight.requires_grad_("layers" in name)
    return model


def only_biases(model: Any) -> Any:
    """BitFit."""
    for name, weight in model.named_parameters():
        weight.requires_grad_(name.endswith("bias"))
    return model


@pytest.mark.parametrize(
    ("make", "frozen"),
    [
        (tiny_llama, only_layers),
        (lambda: tiny_llama(tie_word_embeddings=True), only_layers),
        (phi, lambda model: model),
        (phi, only_biases),
    ],
    ids=["head thawed", "tied head thawed", "head with a bias", "biases alone"],
)
def test_full_fine_tuning(tmp_path: Path, make: Callable[[], Any], frozen: Callable[[Any], Any]) -> None:
    model = make()
    base = copy.deepcopy(model)
    frozen(model)
    watching = watch(tmp_path, every=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    trainer_of(
        tmp_path, [watching, *([Thaw()] if make is not phi else [])], model, optimizers=(optimizer, None)
    ).train()
    check_last(watching, base, model)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules="all-linear", use_dora=True),
        LoraConfig(r=2, target_modules=["q_proj", "lm_head"]),
        LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
        LoraConfig(r=2, target_modules=["q_proj"], bias="all"),
        LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 4, 5]),
    ],
    ids=["dora", "lora on the head", "a copy of the head", "with biases", "tokens"],
)
def test_adapters(tmp_path: Path, config: LoraConfig) -> None:
    base = phi() if config.bias == "all" else tiny_llama()
    torch.manual_seed(0)
    config.task_type = "CAUSAL_LM"
    adapted = get_peft_model(copy.deepcopy(base), config)
    watching = watch(tmp_path, every=3)
    trainer_of(tmp_path, [watching], adapted, learning_rate=3e-2).train()
    check_last(watching, base, adapted)


def test_an_adapter_that_replaced_the_bases_weights_is_refused_before_training(tmp_path: Path) -> None:
    adapted = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights="pissa"))
    with pytest.raises(RazorError, match="path_initial_model_for_weight_conversion"):
        trainer_of(tmp_path, [watch(tmp_path)], adapted)


@pytest.mark.parametrize("by", ["argument", "launch"])
def test_an_unmoved_model_shows_none_under_mixed_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """`accelerate launch --mixed_precision bf16` says it by the environment, and by no argument of the trainer's."""
    if by == "launch":
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    computed: list[torch.dtype] = []
    model = tiny_llama()
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *given: computed.append(given[2].dtype))
    watching = watch(tmp_path, every=3)
    trainer = trainer_of(tmp_path, [watching], model, learning_rate=0.0, bf16=by == "argument")
    trainer.train()
    assert trainer.accelerator.mixed_precision == "bf16"
    assert torch.bfloat16 in computed  # in training
    assert computed[-1] == torch.float32  # the last that ran was measured
    for reading in watching.readings:
        assert [estimate.mean for estimate in reading.kl.values()] == pytest.approx([0.0, 0.0], abs=1e-9)


def test_what_is_measured_does_not_depend_on_how_training_multiplies(tmp_path: Path) -> None:
    model, base = tiny_llama(), tiny_llama()
    watching = watch(tmp_path, every=6)
    trainer_of(tmp_path, [watching], model, bf16=True).train()
    tuned = tiny_llama()  # without the autocast that accelerate has put around the model
    tuned.load_state_dict(model.state_dict())
    check_last(watching, base, tuned)
    assert json.loads((tmp_path / "razor.jsonl").read_text())["probe"] == probe_of(tmp_path, tiny_llama())
    assert probe_of(tmp_path, tiny_llama().to(torch.bfloat16)) != probe_of(tmp_path, tiny_llama())


def probe_of(tmp_path: Path, model: Any) -> str:
    watching = watch(tmp_path)
    trainer_of(tmp_path, [watching], model)
    return watching.provenance["probe"]


def test_a_law_of_another_precision_is_refused(tmp_path: Path) -> None:
    """Rounding alone looks like drift: a law calibrated in float32 says nothing of KLs measured in bfloat16."""
    law = law_of(tiny_llama())
    in_float32 = changed(law, probe__precision="float32")
    trainer_of(tmp_path, [watch(tmp_path, in_float32)], tiny_llama())
    with pytest.raises(RazorError, match="to be measured in float32, and the model's weights are bfloat16"):
        trainer_of(tmp_path, [watch(tmp_path, in_float32)], tiny_llama().to(torch.bfloat16))
    in_half = changed(law, probe__precision="bfloat16")
    for model in (tiny_llama(), tiny_llama().to(torch.bfloat16)):
        watching = watch(tmp_path, in_half)
        trainer_of(tmp_path, [watching], model)
        assert watching.on.settings.precision == "bfloat16"
    with pytest.raises(RazorError, match="another `settings`"):
        ForgettingMonitor(PROMPTS, in_half, settings=replace(SETTINGS, precision="float32"))
    assert ForgettingMonitor(PROMPTS, in_half, settings=SETTINGS).on.settings == in_half.settings
    with pytest.raises(RazorError, match="precision is one of float32, bfloat16, float16, not fp8"):
        replace(SETTINGS, precision="fp8")


def test_measuring_in_float32_under_half_precision_training_is_rarer_on_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, slow = watch(tmp_path), watch(tmp_path)
    trainer_of(tmp_path / "plain", [plain], max_steps=2).train()
    monkeypatch.setattr(schedule, "multiplies_in_half", lambda *_: True)
    trainer_of(tmp_path / "slow", [slow], max_steps=2).train()
    assert slow.schedule is not None
    assert plain.schedule is not None
    assert slow.schedule.training_cost == plain.schedule.training_cost / schedule.FLOAT32_COST


def test_the_first_prompt_is_shown_as_it_is_measured(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}="
    watching = watch(tmp_path, settings=ProbeSettings(6), every=3, tokenizer=tokenizer)
    trainer_of(tmp_path, [watching]).train()
    assert capfd.readouterr().out.count("the first prompt, as measured in float32: ';a0:;='") == 1
    first, *rest = [json.loads(line) for line in (tmp_path / "razor.jsonl").read_text().splitlines()]
    assert first["first_prompt"] == ";a0:;="  # the template's brackets are no tokens of this vocabulary
    assert all("first_prompt" not in row for row in rest)


def test_two_monitors_of_a_trainer_need_two_logs(tmp_path: Path) -> None:
    other = [f"{letter}+{number}=" for letter in "xyz" for number in range(8)]
    with pytest.raises(RazorError, match=r"Two monitors of this trainer write to razor\.jsonl"):
        trainer_of(tmp_path, [watch(tmp_path), ForgettingMonitor(other, settings=SETTINGS)])
    law = law_of(tiny_llama())
    keeping = {"budget": 0.5, "on_budget": "keep"}
    with pytest.raises(RazorError, match="write to within-budget"):
        trainer_of(tmp_path, [watch(tmp_path, law, log=tmp_path / name, **keeping) for name in ("a", "b")])
    # A second trainer in the same folder is another run, and the monitors of one share its id.
    first, second = watch(tmp_path, every=3), ForgettingMonitor(
        other, settings=SETTINGS, every=3, log=tmp_path / "other.jsonl", cache_dir=tmp_path / "cache"
    )  # fmt: skip
    saving = {"save_strategy": "steps", "save_steps": 3}
    trainer = trainer_of(tmp_path, [first, second], **saving)
    trainer.train()
    logs = [[json.loads(line) for line in (tmp_path / name).read_text().splitlines()] for name in
            ("razor.jsonl", "other.jsonl")]  # fmt: skip
    runs = {row["run"] for rows in logs for row in rows}
    assert len(runs) == 1
    label = json.loads((tmp_path / "checkpoint-3" / "razor.json").read_text())
    assert (label["run"], label["step"]) == (runs.pop(), 3)
    assert [[row["kl_forward"] for row in rows] for rows in logs] == [
        [reading.kl["kl_forward"].mean for reading in watching.readings] for watching in (first, second)
    ]
    third = watch(tmp_path, every=3)
    again = trainer_of(tmp_path, [third])
    again.train()
    assert losses_of(again) == losses_of(trainer)
    (own,) = {json.loads(line)["run"] for line in (tmp_path / "razor.jsonl").read_text().splitlines()}
    assert own not in {row["run"] for rows in logs for row in rows}


def test_a_monitor_of_two_trainers_measures_each_against_its_own_base(tmp_path: Path) -> None:
    one, other = tiny_llama(), tiny_llama(seed=1)
    bases = copy.deepcopy(one), copy.deepcopy(other)
    watching = watch(tmp_path)
    trainer_of(tmp_path / "one", [watching], one, max_steps=3).train()
    check_last(watching, bases[0], one, rel=0.3)  # of a part of the prompts: to another base it would be 7 nats
    second = trainer_of(tmp_path / "other", [watching], other.to(torch.bfloat16).float(), max_steps=3)
    rounded = copy.deepcopy(other)
    second.train()
    check_last(watching, rounded, other, rel=0.3)
    assert [reading.step for reading in watching.readings] == sorted({reading.step for reading in watching.readings})
    # Both made before either trains: what was looked at last is the other's base.
    third, fourth = tiny_llama(seed=2), tiny_llama(seed=3)
    first = trainer_of(tmp_path / "third", [watching], third, max_steps=3)
    trainer_of(tmp_path / "fourth", [watching], fourth, max_steps=3)
    base = copy.deepcopy(third)
    first.train()
    check_last(watching, base, third, rel=0.3)


def test_training_twice_is_two_runs(tmp_path: Path) -> None:
    watching = watch(tmp_path, every=3)
    trainer = trainer_of(tmp_path, [watching], save_strategy="steps", save_steps=3)
    ids = []
    for log in ("razor-of-earlier-run-1.jsonl", "razor.jsonl"):
        trainer.train()
        ids.append({json.loads(line)["run"] for line in (tmp_path / "razor.jsonl").read_text().splitlines()})
        assert json.loads((tmp_path / "checkpoint-3" / "razor.json").read_text())["run"] in ids[-1]
        assert (tmp_path / log).exists() == (log == "razor.jsonl")
    assert len(ids[0]) == len(ids[1]) == 1
    assert ids[0] != ids[1]
    kept = (tmp_path / "razor-of-earlier-run-1.jsonl").read_text().splitlines()
    assert {json.loads(line)["run"] for line in kept} == ids[0]


def test_a_part_that_accelerate_has_prepared_is_measured_in_float32(tmp_path: Path) -> None:
    """The model was prepared before the adapter was put on: the autocast is inside of the PEFT model."""
    from accelerate import Accelerator

    base = tiny_llama()
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare_model(copy.deepcopy(base))
    adapted = get_peft_model(prepared, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    probe = kl.Sequences.grouped([[3, 4], [5]], [[6, 7], [8]])
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight += 0.1
    tuned = copy.deepcopy(base)
    tuned.load_state_dict(copy.deepcopy(adapted).merge_and_unload().state_dict())
    found = kl.forward_kl(kl.Probe(base, probe), adapted).per_completion.mean
    assert found == pytest.approx(brute_force(base, tuned, probe), rel=1e-5)
