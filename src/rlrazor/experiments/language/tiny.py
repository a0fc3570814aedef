"""`tiny`: a language model, prior tasks and a new task small enough that everything exact is affordable on a CPU.

A Llama-style model of characters is pre-trained from scratch on five prior tasks on strings of letters, and partly on
the new one: name three different letters of the string, in alphabetical order.

    C:daca=daca;   R:daca=acad;   S:daca=aacd;   N:daca=ebdb;   U:daca=dac;
    P:dacfbe=acf;  P:dacfbe=bdf;  ...

copy, reverse, sort, next letter, each letter once; and the new task (`tasks.letters`), with 20 right answers a prompt.

The base knows the new task's form, not its rule: in its pre-training text the three letters are likelier the earlier
they stand in the string, and mostly in the order drawn. So a sample is right a third of the time, spread over all
twenty right answers but not evenly: the KL-minimal policy is neither uniform nor any annotator's. All right answers
being known, accuracy and KL(q* || pi) are sums, not estimates; and a prior score is one forward pass per task.

Left out of pre-training: loss on the prompts, which are random strings and teach nothing.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rlrazor.experiments.language.config import TINY
from rlrazor.experiments.language.tasks.letters import ASCENDING, EOS, FORMS, LETTERS, Example, distinct
from rlrazor.experiments.language.tasks.task import Item
from rlrazor.lm import forward
from rlrazor.lm.prior_prompts import PriorPrompts
from rlrazor.lm.probes import GenericText, content_hash
from rlrazor.lm.scores import ItemResults, Question, Score

PAD = "_"
ALPHABET = PAD + EOS + LETTERS + "CRSNUP" + ":="
SCORED = PROBES = OLD = 256


def _letters(rng: random.Random) -> str:
    return "".join(rng.choices(LETTERS, k=rng.randint(4, 7)))


def _copy(rng: random.Random) -> Example:
    text = _letters(rng)
    return f"C:{text}=", text


def _reverse(rng: random.Random) -> Example:
    text = _letters(rng)
    return f"R:{text}=", text[::-1]


def _sort(rng: random.Random) -> Example:
    text = _letters(rng)
    return f"S:{text}=", "".join(sorted(text))


def _next(rng: random.Random) -> Example:
    text = _letters(rng)
    return f"N:{text}=", "".join(LETTERS[(LETTERS.index(letter) + 1) % len(LETTERS)] for letter in text)


def _unique(rng: random.Random) -> Example:
    text = _letters(rng)
    return f"U:{text}=", "".join(dict.fromkeys(text))


PRIOR_TASKS: Mapping[str, Callable[[random.Random], Example]] = {
    "copy": _copy, "reverse": _reverse, "sort": _sort, "next": _next, "unique": _unique,
}  # fmt: skip


def scored_examples() -> dict[str, list[Example]]:
    """The held-out prompts of each prior task with their only right completions; the same for every seed."""
    return {name: distinct(draw, random.Random(f"scored {name}"), SCORED) for name, draw in PRIOR_TASKS.items()}


def old_examples() -> dict[str, list[Example]]:
    """Examples of each prior task as the pre-training text has them; none of them is scored, or of the probe."""
    held_out = _scored_prompts() | set(probe_prompts())
    drawn = {name: distinct(draw, random.Random(f"old {name}"), 2 * OLD) for name, draw in PRIOR_TASKS.items()}
    return {name: [one for one in examples if one[0] not in held_out][:OLD] for name, examples in drawn.items()}


def _scored_prompts() -> set[str]:
    return {prompt for examples in scored_examples().values() for prompt, _ in examples}


def probe_prompts() -> list[str]:
    """Prior-like prompts without answers, the generic probe; none of them is scored."""
    scored = _scored_prompts()
    share = -(-PROBES // len(PRIOR_TASKS))
    drawn = [distinct(draw, random.Random(f"probe {name}"), 2 * share) for name, draw in PRIOR_TASKS.items()]
    return [prompt for examples in drawn for prompt in [p for p, _ in examples if p not in scored][:share]][:PROBES]


def probe() -> GenericText:
    """The generic probe, which is of the prior tasks' own prompts, completed as the new task's are."""
    return GenericText(prompts=tuple(probe_prompts()), prior=PriorPrompts((TINY,), max_new_tokens=None))


def prior_texts() -> list[str]:
    """The scored prompts with their completions: text whose token loss is the cheap proxy of the prior scores."""
    return [prompt + completion + EOS for examples in scored_examples().values() for prompt, completion in examples]


def unrelated_texts() -> list[str]:
    """Random strings that belong to no task, on which representations are compared."""
    rng = random.Random("unrelated")
    return ["".join(rng.choices(LETTERS, k=12)) for _ in range(PROBES)]


# The model


def make_tokenizer() -> Any:
    """One token per character; `;` ends a sequence, `_` pads on the left, and nothing begins it."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({character: i for i, character in enumerate(ALPHABET)}, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


HIDDEN, LAYERS, HEADS, INNER = 96, 3, 4, 256


def make_model(seed: int) -> Any:
    """An untrained LlamaForCausalLM; the weights depend on `seed` alone, and the global generator is left alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(ALPHABET),
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=INNER,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=ALPHABET.index(EOS),
        pad_token_id=ALPHABET.index(PAD),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


BATCH, LEARNING_RATE, WARMUP = 96, 3e-3, 100


def pretrain(seed: int, *, steps: int, forms: Sequence[str] = (), progress: Callable[[int], None] | None = None) -> Any:
    """The base policy of a seed, in eval mode: same seed and steps, same bits on the same machine.

    AdamW with a cosine schedule, in float32, which is faster than bfloat16 at this size. No prompt that is scored, or
    of the new task's test set, is in the text. `forms`: the new tasks, of `letters.FORMS`, in place of the one.
    `progress` is called with the number of steps done.
    """
    orders = [FORMS[form] for form in forms] or [ASCENDING]
    model = make_model(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warmup_cosine(step, steps))
    held_out = (
        _scored_prompts() | {item.prompt for order in orders for item in order.load().test} | set(probe_prompts())
    )
    draws = [*PRIOR_TASKS.values(), *(order.pretraining_example for order in orders)]
    text = _pretraining_text(random.Random(seed), draws, held_out)
    model.train()
    for step in range(steps):
        ids_BT, completion_BT = _rows([next(text) for _ in range(BATCH)])
        loss = _token_losses(model, ids_BT, completion_BT).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step + 1)
    return model.eval()


def _warmup_cosine(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _pretraining_text(
    rng: random.Random, draws: Sequence[Callable[[random.Random], Example]], held_out: Collection[str]
) -> Iterator[Example]:
    while True:
        prompt, completion = rng.choice(draws)(rng)
        if prompt not in held_out:
            yield prompt, completion


_ID_OF = {character: i for i, character in enumerate(ALPHABET)}


def _rows(examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Token ids (B, T), padded on the right where a causal model needs no mask, and where the completion stands."""
    texts = [[_ID_OF[character] for character in prompt + completion + EOS] for prompt, completion in examples]
    width = max(map(len, texts))
    ids_BT = torch.tensor([text + [_ID_OF[PAD]] * (width - len(text)) for text in texts])
    starts_B1 = torch.tensor([len(prompt) for prompt, _ in examples])[:, None]
    ends_B1 = torch.tensor(list(map(len, texts)))[:, None]
    positions_T = torch.arange(width)
    return ids_BT, (positions_T >= starts_B1) & (positions_T < ends_B1)


def _token_losses(model: Any, ids_BT: Tensor, completion_BT: Tensor) -> Tensor:
    """-log pi of every completion token, in nats, as one flat tensor."""
    logits_BTV = model(input_ids=ids_BT).logits[:, :-1]
    chosen_BT = completion_BT[:, 1:]
    return F.cross_entropy(logits_BTV[chosen_BT].float(), ids_BT[:, 1:][chosen_BT], reduction="none")


# Exact scores


@torch.no_grad()
def prior_scores(model: Any) -> dict[str, Score]:
    """Exact match of greedy decoding on the held-out prompts of each prior task, and on which of them.

    Greedy decoding gives the target exactly when the target's every token is the most likely one after those before it:
    one teacher-forced pass.
    """
    scores = {}
    for name, examples in scored_examples().items():
        ids_BT, completion_BT = _rows(examples)
        greedy_BT = model(input_ids=ids_BT).logits[:, :-1].argmax(dim=-1)
        hit_B = ((greedy_BT == ids_BT[:, 1:]) | ~completion_BT[:, 1:]).all(dim=1)
        value = float(hit_B.float().mean())
        stderr = math.sqrt(value * (1 - value) / len(examples))
        names = [f"{at}-{content_hash(list(example))[:12]}" for at, example in enumerate(examples)]
        scores[name] = Score(
            value=value,
            stderr=stderr,
            n=len(examples),
            metric="exact_match",
            version="1",
            items=ItemResults(
                outcomes={name: dict(zip(names, map(float, hit_B.tolist()), strict=True))},
                questions={name: dict(zip(names, (Question(prompt) for prompt, _ in examples), strict=True))},
            ),
        )
    return scores


@torch.no_grad()
def right_logps(model: Any, tokenizer: Any, items: Sequence[Item], right: Callable[[Item], Sequence[str]]) -> Tensor:
    """log pi(y|x) of every right completion with its stop token, (B items, C completions), in nats.

    `right` lists an item's, as many for each. All prompts have the same number of tokens.
    """
    device = next(model.parameters()).device
    prompts_BT = torch.tensor([tokenizer.encode(item.prompt) for item in items], device=device)
    answers_BCT = torch.tensor(
        [[tokenizer.encode(answer + EOS) for answer in right(item)] for item in items], device=device
    )
    count = answers_BCT.shape[1]
    first_NV, cache = forward.prefill(model, prompts_BT, torch.ones_like(prompts_BT), count)
    answers_NT = answers_BCT.flatten(0, 1)
    rest_NTV = model(input_ids=answers_NT[:, :-1], use_cache=True, **cache).logits
    logits_NTV = torch.cat([first_NV[:, None], rest_NTV], dim=1)
    logp_NT = logits_NTV.float().log_softmax(dim=-1).gather(-1, answers_NT[..., None])[..., 0]
    return logp_NT.sum(dim=-1).view(len(items), count)


def expected_accuracy(logps_BC: Tensor) -> float:
    """The exact probability that a sampled completion is right, averaged over prompts; takes `right_logps`."""
    return float(logps_BC.exp().sum(dim=1).mean())


def optimal_logps(base_logps_BC: Tensor) -> Tensor:
    """log q*(y|x): the base's distribution restricted to the right completions and renormalised. The exact oracle."""
    return base_logps_BC.log_softmax(dim=1)


def optimal_kl(base_logps_BC: Tensor, logps_BC: Tensor) -> float:
    """KL(q* || pi), exact, averaged over prompts, in nats per completion; both tensors are `right_logps`."""
    q_BC = optimal_logps(base_logps_BC)
    return float((q_BC.exp() * (q_BC - logps_BC)).sum(dim=1).mean())
