"""What a tuned model has not lost: copies of it and of its base, trained a few steps on prior items not scored.

Supervised fine-tuning on the prompts of the prior tasks with their right answers, in the form in which they are scored.
What then comes back in the tuned model was there. How much of that the steps would have taught any model, the base
shows, which gets the same ones (`analysis.drop_parts`).

AdamW, a constant learning rate, no weight decay, no dropout; batches of `BATCH` items, each of which counts the same
however long its answer is, in an order by the seed, epoch after epoch. The learning rate, unless one is given, is the
largest of `LEARNING_RATES` at which the base, after those steps, takes the right answers to further prior items, which
are neither trained on nor scored, for no less likely than before: as strong as does a model no harm that has nothing to
recover. It is chosen on the base alone.

All weights are trained, in float32, an adapter having been merged into them; or, with a rank, a LoRA on every linear
layer, beside weights in the precision that was asked for. One model is in memory at a time.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

import torch
from torch.nn import functional as F

from rlrazor.errors import RazorError
from rlrazor.guard.measuring import ReadBase
from rlrazor.guard.recovery import Recovery
from rlrazor.lm import compute
from rlrazor.lm.adapters import is_adapted
from rlrazor.lm.encoding import begun_ids
from rlrazor.lm.forward import context_length
from rlrazor.lm.harness.demonstrations import Demonstration
from rlrazor.lm.models import LanguageModel, add_lora, load
from rlrazor.lm.prior import PriorTasks
from rlrazor.lm.prompts import as_text
from rlrazor.lm.scores import PriorScores
from rlrazor.lm.weight_files import is_adapter
from rlrazor.system import phases

ITEMS = 32  # that are trained on; as many again judge the learning rate
BATCH = 8
LEARNING_RATES = (3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 3e-6)
NO_MEMORY = (
    "Out of memory while training a copy of a model for --recover: --recover-rank 16 trains a LoRA, which takes little "
    "more than the model itself."
)
Rows = Sequence[tuple[list[int], int]]
"""Token ids, and where the answer in them begins."""


@dataclass(frozen=True)
class Trained:
    """A copy after the steps at `lr`: its prior scores, and the loss of right answers before and after.

    Losses are in nats per token, each item counting the same: of the items that were trained on (`loss`), and of as
    many that were not (`other_loss`). `parameters` were trained; the weights, their gradients and Adam's moments take
    so many `bytes`.
    """

    lr: float
    loss: tuple[float, float]
    other_loss: tuple[float, float]
    parameters: int
    bytes: int
    scores: PriorScores


@dataclass(frozen=True)
class Recovered:
    """Both copies, trained on so many `items` by task.

    `ladder`: the learning rates that were tried on the base and what its loss on other items became; empty where one
    was given.
    """

    settings: Recovery
    items: Mapping[str, int]
    ladder: Mapping[float, float]
    base: Trained
    tuned: Trained

    def as_json(self) -> dict[str, Any]:
        """How it was done, without the scores."""
        kept = ("loss", "other_loss", "parameters", "bytes")
        return {
            **asdict(self.settings),
            "lr": self.base.lr,
            "items": dict(self.items),
            "tried": [{"lr": lr, "other_loss": loss} for lr, loss in self.ladder.items()],
            "base": {name: getattr(self.base, name) for name in kept},
            "tuned": {name: getattr(self.tuned, name) for name in kept},
        }

    def describe(self) -> str:
        """How it was done and what became of the loss, in a sentence or two."""
        rule = "given" if self.settings.lr is not None else "by rule"
        what = f"a LoRA of rank {self.settings.rank}" if self.settings.rank else "all weights"
        losses = [f"{before:.3g} to {after:.3g}" for before, after in (self.tuned.loss, self.base.loss)]
        return (
            f"Recovery: {self.settings.steps} steps on {sum(self.items.values())} prior items that are not scored, "
            f"learning rate {self.base.lr:g} ({rule}), seed {self.settings.seed}, {what} ({self.base.parameters:,} "
            f"trained; {self.base.bytes / 1e9:.2g} GB with gradients and Adam's moments). Nats per token of their "
            f"right answers: tuned model {losses[0]}, base {losses[1]}."
        )


def trainings(suite: PriorTasks | None, recovery: Recovery | None) -> int:
    """How often copies are trained, at most."""
    return 0 if suite is None or recovery is None else 1 + (1 if recovery.lr else len(LEARNING_RATES))


@dataclass(frozen=True)
class RecoverySet:
    """What copies are trained on, and what judges the learning rate; drawn before any model is loaded."""

    trained: Sequence[Demonstration]
    other: Sequence[Demonstration]
    items: Mapping[str, int]

    @classmethod
    def of(cls, suite: PriorTasks, seed: int) -> RecoverySet:
        """Raises RazorError where there are not two items that are not scored and have a right answer to show."""
        drawn = suite.demonstrations(2 * ITEMS, seed)
        trained = {name: of_task[0::2] for name, of_task in drawn.items()}
        other = [one for of_task in drawn.values() for one in of_task[1::2]]
        chosen = [one for of_task in trained.values() for one in of_task]
        if not chosen or not other:
            raise RazorError(
                f"--recover has nothing to train on: {', '.join(drawn)} has no two items with right answers to show "
                "that are not scored. Score fewer of them (--prior-limit), or name tasks with a training split."
            )
        return cls(chosen, other, {name: len(of_task) for name, of_task in trained.items()})

    @property
    def notes(self) -> list[str]:
        """What a reader of the parts has to know, in sentences."""
        said = []
        if without := [name for name, count in self.items.items() if not count]:
            said.append(
                f"Recovery trained on no item of {', '.join(without)}: there are none with a right answer to show that "
                "are not scored. What comes back there comes from the other tasks' items."
            )
        if len(self.trained) < ITEMS:
            said.append(f"Recovery trained on {len(self.trained)} items, as there are no more that are not scored.")
        return said


def recover(
    read: ReadBase,
    tuned: str,
    suite: PriorTasks,
    settings: Recovery,
    examples: RecoverySet,
    told: Callable[[str], None],
) -> Recovered:
    """Train a copy of the base and one of the tuned model, and score both. Raises RazorError."""
    with compute.memory_errors(NO_MEMORY):
        ladder: dict[float, float] = {}
        # Of both copies: where an adapter is merged, which takes float32, the base is in that too.
        merged = is_adapter(tuned) or is_adapter(read.source)
        dtype = "float32" if merged or not settings.rank else read.dtype
        control = _control(read, settings, dtype, examples, ladder, told)
        scores = suite.scores(control.lm, lambda task: told(f"the base after recovery on {task}"))
        of_base = control.told(scores)
        del control
        compute.free()
        told("recovery: training a copy of the tuned model")
        copy = _trained(_opened(read, tuned, dtype), examples, settings, of_base.lr)
        scores = suite.scores(copy.lm, lambda task: told(f"the tuned model after recovery on {task}"))
    return Recovered(settings, examples.items, ladder, of_base, copy.told(scores))


@dataclass
class _Copy:
    """A trained copy, as `Trained` but for its scores; it is what keeps the model in memory."""

    lm: LanguageModel
    lr: float
    loss: tuple[float, float]
    other_loss: tuple[float, float]
    parameters: int
    bytes: int

    def told(self, scores: PriorScores) -> Trained:
        """What is left of it."""
        return Trained(self.lr, self.loss, self.other_loss, self.parameters, self.bytes, scores)


def _control(
    read: ReadBase,
    settings: Recovery,
    dtype: str,
    examples: RecoverySet,
    ladder: dict[float, float],
    told: Callable[[str], None],
) -> _Copy:
    """A trained copy of the base, at the learning rate that was given or at the one by rule.

    Where even the smallest does harm, at that one.
    """
    rates = (settings.lr,) if settings.lr is not None else LEARNING_RATES
    for place, lr in enumerate(rates):
        told(f"recovery: training a copy of the base at {lr:g}")
        is_last = place == len(rates) - 1
        copy = _trained(_opened(read, read.source, dtype), examples, settings, lr, may_diverge=not is_last)
        before, after = copy.other_loss
        if settings.lr is None:
            ladder[lr] = after
        if after <= before or is_last:
            return copy
        del copy
        compute.free()
    raise AssertionError("there is a learning rate")


def _opened(read: ReadBase, source: str, dtype: str) -> LanguageModel:
    """The model, an adapter merged into its weights."""
    if source == read.source:
        return load(source, dtype=dtype)
    lm, _ = replace(read, dtype=dtype).opened(source)
    return lm if not is_adapted(lm.model) else replace(lm, model=_merged(lm.model))


def _merged(model: Any) -> Any:
    try:
        return model.merge_and_unload()
    except (RuntimeError, ValueError, NotImplementedError, AttributeError) as error:
        raise RazorError(f"--recover trains merged weights, and PEFT cannot merge this adapter: {error}") from error


def _trained(
    lm: LanguageModel, examples: RecoverySet, settings: Recovery, lr: float, *, may_diverge: bool = False
) -> _Copy:
    """Raises RazorError where training diverges and may not."""
    trained, other = (_rows(lm, demonstrations) for demonstrations in (examples.trained, examples.other))
    with compute.generators_untouched():
        torch.manual_seed(settings.seed)
        model = lm.model if not settings.rank else add_lora(lm.model, settings.rank)
    model.eval()  # no dropout
    for parameter in model.parameters() if not settings.rank else ():
        parameter.requires_grad_(True)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [_mean_loss(model, rows) for rows in (trained, other)]
    with compute.own_forward(model), compute.float32_products(compute.device_of(model).type):
        _fit(model, weights, trained, settings, lr)
    for parameter in weights:
        parameter.requires_grad_(False)
        parameter.grad = None
    after = [_mean_loss(model, rows) for rows in (trained, other)]
    if math.inf in after and not may_diverge:
        raise RazorError(f"Training for --recover diverges at a learning rate of {lr:g}: give a smaller --recover-lr.")
    held = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    size = held + sum(3 * weight.numel() * weight.element_size() for weight in weights)
    loss, other_loss = zip(before, after, strict=True)
    return _Copy(replace(lm, model=model), lr, loss, other_loss, sum(weight.numel() for weight in weights), size)


def _fit(model: Any, weights: Sequence[Any], rows: Rows, settings: Recovery, lr: float) -> None:
    """Gradient steps. An item at a time, so that long prompts take no more memory than one of them."""
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0)
    batches = _batches(len(rows), settings.seed)
    for step in range(settings.steps):
        phases.at("recovery step", step + 1, settings.steps)
        batch = next(batches)
        optimizer.zero_grad()
        for at in batch:
            (_loss(model, *rows[at]) / len(batch)).backward()
        optimizer.step()


def _batches(count: int, seed: int) -> Iterator[list[int]]:
    """Places of `BATCH` items, or of all where there are fewer, each once before any comes again."""
    rng, left = random.Random(seed), list[int]()
    size = min(BATCH, count)
    while True:
        while len(left) < size:
            left += rng.sample(range(count), count)
        batch, left = left[:size], left[size:]
        yield batch


def _rows(lm: LanguageModel, demonstrations: Sequence[Demonstration]) -> Rows:
    """As lm-eval encodes a prompt with its continuation, cut at the front where the context ends."""
    limit, found = context_length(lm.model), []
    for one in demonstrations:
        text = as_text(lm.tokenizer, one.context)
        whole = begun_ids(lm.tokenizer, text + one.answer)
        begins = max(len(begun_ids(lm.tokenizer, text.rstrip())), 1)  # something has to come first
        whole += [lm.tokenizer.eos_token_id] if one.ends and lm.tokenizer.eos_token_id is not None else []
        cut = max(len(whole) - limit, 0) if limit else 0
        if begins < len(whole):
            found.append((whole[cut:], max(begins - cut, 1)))
    return found


def _loss(model: Any, ids: Sequence[int], begins: int) -> Any:
    """Nats per token of the answer."""
    ids_1T = torch.tensor([ids], device=compute.device_of(model))
    logits_TV = model(input_ids=ids_1T, use_cache=False).logits[0, begins - 1 : -1]
    return F.cross_entropy(logits_TV.float(), ids_1T[0, begins:])


def _mean_loss(model: Any, rows: Rows) -> float:
    """Over items; infinite where it is no number."""
    with torch.no_grad():
        loss = fmean(float(_loss(model, *row)) for row in rows)
    return loss if math.isfinite(loss) else math.inf
