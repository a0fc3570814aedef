"""Architectures: those that are measured, exactly, and those that are refused, in a sentence."""

import copy
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

import architectures
from architectures import CANNOT, CLASSES, PAGE, PROMPTS, logits_alone, outcome, require_exact, table, tiny
from rlrazor.errors import RazorError
from rlrazor.lm import encoding, forward, kl, models, sampling
from rlrazor.lm.forward import context_length
from rlrazor.lm.suitable import require_embeddings, require_measurable
from tiny_models import char_tokenizer, saved, tiny_llama

# At least one of each kind: of attention, of positions, of heads, of caches, of mixtures, of hybrids.
FAST = [
    "BambaForCausalLM", "BartForCausalLM", "BertLMHeadModel", "BloomForCausalLM", "Cohere2ForCausalLM",
    "DeepseekV3ForCausalLM", "DeepseekV4ForCausalLM", "FalconForCausalLM", "FalconH1ForCausalLM",
    "FalconMambaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "Gemma3nForCausalLM", "GPT2LMHeadModel",
    "GPTJForCausalLM", "GPTNeoForCausalLM", "GPTNeoXForCausalLM", "GptOssForCausalLM", "GraniteForCausalLM",
    "GraniteMoeHybridForCausalLM", "JambaForCausalLM", "Lfm2ForCausalLM", "Lfm2MoeForCausalLM", "Llama4ForCausalLM",
    "LlamaForCausalLM", "MambaForCausalLM", "Mamba2ForCausalLM", "MiniCPM3ForCausalLM", "MiniMaxForCausalLM",
    "MistralForCausalLM", "MixtralForCausalLM", "MptForCausalLM", "NemotronHForCausalLM", "OPTForCausalLM",
    "OpenAIGPTLMHeadModel", "Phi3ForCausalLM", "PhiForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM",
    "Qwen3NextForCausalLM", "Qwen3_5ForCausalLM", "RecurrentGemmaForCausalLM", "ReformerModelWithLMHead",
    "RobertaForCausalLM", "RwkvForCausalLM", "XGLMForCausalLM", "XLMRobertaForCausalLM", "Zamba2ForCausalLM",
    "xLSTMForCausalLM",
]  # fmt: skip


# What transformers before 5 gets wrong itself: in a batch, on a CPU, or at all.
WRONG_BEFORE_5 = ("JambaForCausalLM", "Llama4ForCausalLM", "RecurrentGemmaForCausalLM", "Zamba2ForCausalLM")
IS_5 = int(transformers.__version__.partition(".")[0]) >= 5


def made(name: str) -> Any:
    if not hasattr(transformers, name) or (name in WRONG_BEFORE_5 and not IS_5):
        pytest.skip(f"this transformers has no {name}, or none that is right")
    return tiny(name)


@pytest.mark.parametrize("name", FAST)
def test_samples_and_kl_are_those_of_brute_force(name: str) -> None:
    require_exact(made(name))


@pytest.mark.slow  # half a minute
@pytest.mark.filterwarnings("ignore")
def test_the_page_says_what_became_of_every_class() -> None:
    outcomes = {name: outcome(name) for name in CLASSES}  # raises what is no sentence
    assert sum(kind.startswith("exact") for kind, _ in outcomes.values()) >= 150
    assert sum(kind == CANNOT for kind, _ in outcomes.values()) <= 5
    assert table(outcomes) in PAGE.read_text(encoding="utf-8")


# --- how samples are made right


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("LlamaForCausalLM", "once for all its samples"),
        ("Qwen3_5ForCausalLM", "for each sample"),  # half of its cache cannot be repeated
        ("RobertaForCausalLM", "equal length"),  # counts positions by itself
        ("MambaForCausalLM", "equal length"),  # padding gets into its state
        ("xLSTMForCausalLM", "without a cache"),  # its cache has the wrong shape
    ],
)
def test_the_fastest_way_that_is_right_is_taken(name: str, said: str) -> None:
    found = architectures.way_of(made(name))
    assert said in found or not IS_5  # an older cache may be of no use


def test_what_is_drawn_does_not_depend_on_the_ways_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def draw() -> list[list[int]]:
        rng = torch.Generator().manual_seed(0)
        return sampling.sample(
            model, PROMPTS, sampling.Sampling(samples=3, max_new_tokens=6, stop_ids=[1], pad_id=0, rng=rng)
        )

    model = tiny("RobertaForCausalLM")
    drawn = draw()
    monkeypatch.setattr(forward, "WAYS", forward.WAYS[2:])
    assert draw() == drawn


def test_a_failure_that_no_way_mends_is_a_sentence_and_memory_is_left_to_the_caller() -> None:
    model = tiny_llama()
    wanted: dict[str, Any] = {"greedy": True, "max_new_tokens": 2, "stop_ids": [1], "pad_id": 0}
    with pytest.raises(RazorError, match="LlamaForCausalLM cannot be sampled from with token ids alone: index out of"):
        sampling.sample(model, [[2, 99]], sampling.Sampling(**wanted))
    hook = model.register_forward_pre_hook(raising(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")))
    with pytest.raises(RuntimeError, match="out of memory"):
        sampling.sample(model, [[2, 3]], sampling.Sampling(**wanted))
    hook.remove()


def raising(error: Exception) -> Any:
    def hook(*_: Any) -> None:
        raise error

    return hook


@pytest.mark.parametrize("name", ["Qwen3_5ForCausalLM", "RobertaForCausalLM", "xLSTMForCausalLM"])
def test_under_an_adapter_samples_are_the_same(name: str) -> None:
    model = made(name)
    wanted: dict[str, Any] = {"greedy": True, "samples": 2, "max_new_tokens": 4, "stop_ids": [1], "pad_id": 0}
    right = sampling.sample(model, PROMPTS, sampling.Sampling(**wanted))
    assert sampling.sample(models.add_lora(model, rank=2), PROMPTS, sampling.Sampling(**wanted)) == right


def test_no_pad_token_is_needed_nor_one_with_an_embedding() -> None:
    model = tiny_llama()
    wanted: dict[str, Any] = {"greedy": True, "max_new_tokens": 4, "stop_ids": [1]}
    right = sampling.sample(model, PROMPTS, sampling.Sampling(pad_id=0, **wanted))
    assert sampling.sample(model, PROMPTS, sampling.Sampling(pad_id=None, **wanted)) == right
    assert sampling.sample(model, PROMPTS, sampling.Sampling(pad_id=44, **wanted)) == right


def test_the_half_precision_of_a_model_is_not_taken_for_a_failure() -> None:
    model = tiny_llama(layers=8, hidden=64).bfloat16()
    assert architectures.way_of(model) == architectures.WAYS[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert architectures.way_of(tiny_llama(layers=8, hidden=64)) == architectures.WAYS[0]


# --- what is refused


REFUSED = [
    ("T5ForConditionalGeneration", {}, "encoder-decoder"),
    ("BartForConditionalGeneration", {}, "encoder-decoder"),
    ("LlamaForSequenceClassification", {}, "no LM head"),
    ("Qwen2ForTokenClassification", {}, "no LM head"),
    ("GPT2ForQuestionAnswering", {}, "no LM head"),
    ("BertModel", {}, "no LM head"),
    ("LlamaModel", {}, "no LM head"),
    ("BertForMaskedLM", {"is_decoder": False}, "BertForMaskedLM is not causal"),
    ("BertLMHeadModel", {"is_decoder": False}, "BertLMHeadModel is not causal"),
    ("RobertaForCausalLM", {"is_decoder": False}, "not causal"),
    ("XLNetLMHeadModel", {}, "not causal"),
    ("XLMWithLMHeadModel", {}, "not causal"),
    ("CpmAntForCausalLM", {}, "not causal"),
    ("ProphetNetForCausalLM", {}, "more positions than it is given tokens"),
    ("XmodForCausalLM", {"default_language": None}, "does not run on token ids alone.*Input language unknown"),
]


@pytest.mark.parametrize(("name", "config", "said"), REFUSED)
def test_what_is_no_causal_language_model_is_refused_in_a_sentence(
    name: str, config: dict[str, Any], said: str
) -> None:
    with pytest.raises(RazorError, match=said) as raised:
        require_measurable(tiny(name, **config))
    assert "\n" not in str(raised.value)


def test_weak_weights_do_not_hide_that_a_model_is_not_causal() -> None:
    """As the class draws them logits hardly depend on the context."""
    torch.manual_seed(0)
    shape = architectures.shrunk(transformers.BertConfig())
    shape.is_decoder, shape.initializer_range = False, 0.02
    with pytest.raises(RazorError, match="not causal"):
        require_measurable(transformers.BertLMHeadModel(shape).eval())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_weak_encoder_in_half_precision_is_told_from_a_weak_decoder(dtype: torch.dtype) -> None:
    """At transformers' own initialisation one token does little to another, no more than rounding does."""
    from transformers import BertConfig, BertLMHeadModel

    for seed in range(3):
        torch.manual_seed(seed)
        config = BertConfig(
            vocab_size=44, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=64,
        )  # fmt: skip
        with pytest.raises(RazorError, match="is not causal"):
            require_measurable(BertLMHeadModel(config).eval().to(dtype))
        config.is_decoder = True
        require_measurable(BertLMHeadModel(config).eval().to(dtype))
        require_measurable(tiny_llama(scale=0.02, seed=seed).to(dtype))


def test_half_precision_neither_hides_it_nor_is_taken_for_it() -> None:
    encoder, decoder = (tiny("BertLMHeadModel", is_decoder=causal) for causal in (False, True))
    mixture = tiny("Qwen3MoeForCausalLM")
    with pytest.raises(RazorError, match="not causal"):
        require_measurable(encoder.bfloat16())
    require_measurable(decoder.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        require_measurable(mixture)
    require_measurable(mixture.bfloat16())


def test_a_model_that_draws_in_evaluation_is_refused() -> None:
    model = tiny_llama()
    model.model.norm.register_forward_hook(lambda _, __, out: out + torch.randn_like(out))
    with pytest.raises(RazorError, match="other logits each time"):
        require_measurable(model)


@pytest.mark.skipif(not IS_5, reason="the router is elsewhere in older versions")
def test_a_mixture_that_drops_tokens_beyond_its_experts_capacity_is_refused() -> None:
    """As Switch does: the first tokens of a batch that want an expert have it, the others none."""
    model = tiny("MixtralForCausalLM")
    router = model.model.layers[0].mlp.gate
    require_measurable(model)

    def dropping(_: Any, __: Any, out: Any) -> Any:
        logits, weights_TK, experts_TK = out
        capacity = max(1, int(1.25 * len(experts_TK) * 2 / 4))
        wanted_TKE = torch.nn.functional.one_hot(experts_TK, 4)
        rank_TK = (wanted_TKE.cumsum(dim=0) * wanted_TKE).sum(dim=-1)
        return logits, weights_TK * (rank_TK <= capacity), experts_TK

    router.register_forward_hook(dropping)
    with pytest.raises(RazorError, match=r"beside others.*experts drop tokens beyond their capacity"):
        require_measurable(model)


@pytest.mark.skipif(not IS_5, reason="older versions do not take the config of a tiny DBRX")
@pytest.mark.parametrize("noise", ["router_jitter_noise", "moe_jitter_eps"])
def test_the_noise_of_a_router_is_off_while_it_is_measured(noise: str) -> None:
    model = tiny({"router_jitter_noise": "MixtralForCausalLM", "moe_jitter_eps": "DbrxForCausalLM"}[noise])
    routers = [module for module in model.modules() if hasattr(module, noise) or hasattr(module, "jitter_noise")]
    assert routers
    for router in routers:
        setattr(router, noise if hasattr(router, noise) else "jitter_noise", 0.9)
    ids = torch.tensor([PROMPTS[2]])
    model.train()
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)  # as it is trained
    require_measurable(model)
    sequences = kl.Sequences.texts([PROMPTS[2]])
    assert not kl.forward_kl(kl.Probe(model, sequences), model).positions.any()
    assert model.training


def test_a_model_that_takes_zeros_for_padding_is_refused() -> None:
    model = tiny_llama()

    def as_padding(_: Any, args: Any, kwargs: Any) -> Any:  # what BERT-like models do by themselves
        zeros = (kwargs["input_ids"] == 0).sum()
        return args, kwargs | {"position_ids": torch.arange(kwargs["input_ids"].shape[1])[None] * (1 + zeros)}

    model.register_forward_pre_hook(as_padding, with_kwargs=True)
    with pytest.raises(RazorError, match="takes token 0 for padding"):
        require_measurable(model)


def test_a_prompt_token_without_an_embedding_is_named() -> None:
    tokenizer = char_tokenizer()
    tokenizer.add_tokens(["<tool>"])
    ids = tokenizer("a<tool>b")["input_ids"]
    require_embeddings(tiny_llama(), tokenizer, [ids[:1]])
    with pytest.raises(RazorError, match=r"Prompt 2 has the token 44 \('<tool>'\).*embeddings for 44 tokens"):
        require_embeddings(tiny_llama(), tokenizer, [[2], ids])
    model = tiny_llama()
    model.set_input_embeddings(torch.nn.Embedding(40, 16))
    with pytest.raises(RazorError, match="outputs for 44 tokens and embeddings for 40"):
        require_measurable(model)


def test_what_is_no_model_of_transformers_is_refused() -> None:
    with pytest.raises(RazorError, match="Linear is not a model of transformers"):
        require_measurable(torch.nn.Linear(2, 2))
    model = tiny_llama()
    model.forward = lambda input_ids, **_: (torch.zeros(1, 6, 44),)  # as TRL's with a value head: a tuple
    with pytest.raises(RazorError, match=r"does not run on token ids alone.*no attribute 'logits'"):
        require_measurable(model)
    model.forward = lambda input_ids, **_: SimpleNamespace(logits=torch.zeros(1, 1, 44))
    with pytest.raises(RazorError, match="does not give logits for each token"):
        require_measurable(model)


def test_looking_leaves_everything_as_it_was() -> None:
    model = models.add_lora(tiny_llama(attention_dropout=0.5), rank=2).train()
    model.base_model.model.lm_head.eval()  # frozen, say
    next(parameter for parameter in model.parameters() if parameter.requires_grad).grad = torch.ones(2, 16)
    modes = [module.training for module in model.modules()]
    before, state = copy.deepcopy(model.state_dict()), (torch.get_rng_state(), random.getstate())
    require_measurable(model)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]
    assert sum(parameter.grad is not None for parameter in model.parameters()) == 1
    assert not any(module._forward_hooks for module in model.modules())


def test_logits_that_are_not_finite_are_left_to_what_measures_them() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[3].fill_(torch.nan)
    require_measurable(model)
    with pytest.raises(sampling.NotFiniteError):
        sampling.sample(model, [[2]], sampling.Sampling(max_new_tokens=2, stop_ids=[1], pad_id=0))


def test_a_model_without_a_generation_config_or_an_eos_is_sampled_from(tmp_path: Path) -> None:
    model = tiny_llama(eos_token_id=5)
    model.generation_config = None
    assert encoding.stop_ids(char_tokenizer(), model) == [1, 5]
    assert models.LanguageModel.in_memory(model, char_tokenizer(), "made").model.config.pad_token_id == 0
    bare = SimpleNamespace(eos_token_id=None)
    model.config.eos_token_id = None
    assert encoding.stop_ids(bare, model) == []
    drawn = sampling.sample(model, PROMPTS, sampling.Sampling(max_new_tokens=4, stop_ids=[], pad_id=None))
    assert [len(completion) for completion in drawn] == [4] * len(PROMPTS)


# --- how much fits


@pytest.mark.parametrize(
    ("name", "length"),
    [
        ("GPT2LMHeadModel", 64),
        ("OPTForCausalLM", 64),  # two rows more in its table
        ("BartForCausalLM", 64),
        ("BertLMHeadModel", 64),
        ("RobertaForCausalLM", 62),  # those up to the pad token's are never used
        ("CamembertForCausalLM", 62),
        ("XLMRobertaForCausalLM", 62),
        ("Data2VecTextForCausalLM", 62),
        ("WhisperForCausalLM", 64),
        ("CTRLLMHeadModel", 64),
        ("ReformerModelWithLMHead", 64),
    ],
)
def test_the_context_is_as_long_as_runs(name: str, length: int) -> None:
    model = tiny(name, pad_token_id=1)
    assert context_length(model) == length
    ids = [3 + place % 40 for place in range(length + 1)]
    assert logits_alone(model, ids[:length]).isfinite().all()
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        logits_alone(model, ids)
    with pytest.raises(RazorError, match=f"context holds {length}"):
        kl.token_loss(model, [[*ids, 3]])


def test_no_limit_is_none() -> None:
    assert context_length(tiny("MambaForCausalLM")) is None
    assert context_length(tiny("XLNetLMHeadModel")) is None  # says -1
    assert context_length(tiny("MptForCausalLM")) == 64  # max_seq_len


# --- loading


def claiming(folder: Path, **changes: Any) -> Path:
    """The folder, its config changed."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


OTHER_KINDS = [
    f"Llama{kind}" for kind in ("ForSequenceClassification", "ForRewardModel", "RewardModel", "EncoderModel")
]


@pytest.mark.parametrize("name", OTHER_KINDS)
def test_another_kind_of_model_is_not_loaded_as_a_language_model(tmp_path: Path, name: str) -> None:
    folder = saved(tmp_path, tiny_llama(tie_word_embeddings=True), char_tokenizer())
    models.load(claiming(folder, architectures=["LlamaForCausalLM"]))
    with pytest.raises(RazorError, match=f"by its config a {name}"):
        models.load(claiming(folder, architectures=[name]))


@pytest.mark.parametrize("name", ["LlamaForSequenceClassification", "Qwen2ForTokenClassification"])
def test_a_saved_classifier_of_a_causal_model_is_refused(tmp_path: Path, name: str) -> None:
    folder = saved(tmp_path, tiny(name, tie_word_embeddings=True), char_tokenizer())
    with pytest.raises(RazorError, match=f"by its config a {name}"):
        models.load(folder)


def test_encoder_decoders_and_encoders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RazorError, match="an encoder-decoder"):  # transformers would take its decoder alone
        models.load(saved(tmp_path / "bart", tiny("BartForConditionalGeneration"), char_tokenizer()))
    with pytest.raises(RazorError, match="by its config a BertForMaskedLM"):
        models.load(saved(tmp_path / "masked", tiny("BertForMaskedLM", is_decoder=False), char_tokenizer()))
    with pytest.raises(RazorError, match="BertLMHeadModel is not causal"):
        models.load(saved(tmp_path / "bert", tiny("BertLMHeadModel", is_decoder=False), char_tokenizer()))
    models.load(saved(tmp_path / "decoder", tiny("BertLMHeadModel"), char_tokenizer()))


def test_a_bare_model_with_a_tied_head_is_loaded_and_without_one_is_not(tmp_path: Path) -> None:
    tied, untied = tiny_llama(tie_word_embeddings=True), tiny_llama()
    lm = models.load(saved(tmp_path / "tied", tied.model, char_tokenizer()))
    torch.testing.assert_close(logits_alone(lm.model.cpu(), [2, 3, 4]), logits_alone(tied, [2, 3, 4]))
    with pytest.raises(RazorError, match="lacks the weight lm_head"):
        models.load(saved(tmp_path / "untied", untied.model, char_tokenizer()))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_of_a_classifier_is_refused(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", tiny_llama(), char_tokenizer())
    classifier = tiny("LlamaForSequenceClassification")
    get_peft_model(classifier, LoraConfig(r=2, task_type="SEQ_CLS")).save_pretrained(tmp_path / "adapter")
    with pytest.raises(RazorError, match="is for SEQ_CLS, not for a causal language model"):
        models.load(base, adapter=tmp_path / "adapter")
