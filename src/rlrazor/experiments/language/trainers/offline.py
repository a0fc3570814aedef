"""SFT and SimPO by TRL, with an exact KL penalty, which TRL has for none of them."""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # "experimental" is what the version pin is for
    from trl import SFTConfig, SFTTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer

from rlrazor.experiments.language.trainers.common import Job, KeepsLoss, Part, arguments_of, given, without_adapter
from rlrazor.lm.adapters import unwrapped

SIMPO_BETA = SIMPO_GAMMA = 1.0  # RL's Razor's margin of 1; log-probabilities averaged over tokens, as TRL and SimPO do


class _WithPenalty(KeepsLoss):
    """Adds kl_coef KL(pi || pi0), exact over the vocabulary and averaged over completion tokens, to a trainer's loss.

    It costs a forward pass of both policies: TRL's losses do not hand out the logits. And the job's `term`, if any.
    """

    kl_coef: float
    base: Any
    term: Callable[[Any, Part], Tensor] | None = None
    side = ""  # how the columns of completions begin
    tokens: Tensor | None = None  # of the step, in all processes
    micro_batches: int = 1  # of the step, in each of them
    done: int = 0  # of these

    def get_batch_samples(self, *args: Any) -> tuple[list[Any], Any]:
        """The micro-batches of a step, whose completion tokens the penalty is averaged over."""
        batches, items = super().get_batch_samples(*args)  # type: ignore[misc]
        self.micro_batches, self.done = len(batches), 0
        if batches and self.kl_coef:
            counted = sum((self._completions(batch)[2][:, 1:] != -100).sum() for batch in batches)
            self.tokens = self.accelerator.gather(counted).sum()  # type: ignore[attr-defined]
        return batches, items

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss, and the penalty."""
        batch = self._completions(inputs)
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        value = loss[0] if return_outputs else loss
        # Gradients are averaged over processes, and over micro-batches where TRL has not counted the tokens.
        processes = self.accelerator.num_processes  # type: ignore[attr-defined]
        shares = processes * (self.micro_batches if num_items_in_batch is None else 1)
        if self.kl_coef:
            value = value + self.kl_coef * shares * penalty(unwrapped(model), self.base, *batch, self.tokens)
        if self.term is not None:
            place = self.done % self.micro_batches * processes + self.accelerator.process_index  # type: ignore[attr-defined]
            part = Part(self.state.global_step, place, processes * self.micro_batches)  # type: ignore[attr-defined]
            value = value + shares * self.term(unwrapped(model), part)
        self.done += 1
        return (value, loss[1]) if return_outputs else value

    def _completions(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids, attention mask and labels (-100: not counted) of what the penalty is taken on."""
        device = self.args.device  # type: ignore[attr-defined]
        ids, mask, labels = (inputs[self.side + name].to(device) for name in ("input_ids", "attention_mask", "labels"))
        return ids, mask, labels


class Sft(_WithPenalty, SFTTrainer):  # type: ignore[misc]
    """TRL's, with the penalty and the term."""


def sft(job: Job) -> Any:
    """SFT's trainer."""
    return sft_trainer(Sft, job, [labelled(example.prompt, example.completion) for example in job.examples])


def sft_trainer(kind: type[Sft], job: Job, rows: Sequence[Mapping[str, list[int]]]) -> Any:
    """A trainer of that kind on rows of `labelled`."""
    args = SFTConfig(
        **arguments_of(job.settings, job.settings.updates.batch_size),
        # The rows are token ids with labels already: TRL's preparation would read them all again.
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
    )
    trainer = kind(**given(job, args, rows))
    trainer.kl_coef, trainer.base, trainer.term = job.settings.updates.kl_coef, job.base, job.term
    return trainer


def labelled(prompt: Sequence[int], completion: Sequence[int]) -> dict[str, list[int]]:
    """A row whose completion is learned."""
    return {"input_ids": [*prompt, *completion], "labels": [-100] * len(prompt) + list(completion)}


class _SimPo(_WithPenalty, CPOTrainer):  # type: ignore[misc]
    side = "chosen_"

    def tokenize_row(self, feature: Mapping[str, Any], model: Any = None) -> dict[str, list[int]]:
        """What TRL tokenises from text is there as token ids already."""
        row: dict[str, list[int]] = {}
        for side in ("chosen", "rejected"):
            own = labelled(json.loads(feature["prompt"]), json.loads(feature[side]))
            row |= {f"{side}_{name}": ids for name, ids in own.items()}
            row[f"{side}_attention_mask"] = [1] * len(own["input_ids"])
        return row


def simpo(job: Job) -> Any:
    """SimPO's trainer: CPO's, without SFT in it."""
    # TRL wants text in these columns; JSON is what `tokenize_row` makes token ids of.
    sides = {"prompt": "prompt", "chosen": "completion", "rejected": "rejected"}
    rows = [{side: json.dumps(list(getattr(example, of))) for side, of in sides.items()} for example in job.examples]
    args = CPOConfig(
        **arguments_of(job.settings, job.settings.updates.batch_size),
        loss_type="simpo",
        cpo_alpha=0.0,  # the default 1 would mix in SFT
        beta=SIMPO_BETA,
        simpo_gamma=SIMPO_GAMMA,
        max_length=1 << 20,
    )
    trainer = _SimPo(**given(job, args, rows))
    trainer.kl_coef, trainer.base = job.settings.updates.kl_coef, job.base
    return trainer


def penalty(
    model: Any,
    base: Any,
    ids_BT: Tensor,
    mask_BT: Tensor,
    labels_BT: Tensor,
    tokens: Tensor | int | None = None,
    *,
    forward: bool = False,
) -> Tensor:
    """KL(pi || pi0) in nats, summed over the positions that predict a label, over `tokens`, by default their number.

    `base` None: the model with its adapter disabled. `forward`: KL(pi0 || pi) instead.
    """
    counted_BT = labels_BT[:, 1:] != -100
    logp_NV = model(input_ids=ids_BT, attention_mask=mask_BT).logits[:, :-1][counted_BT].log_softmax(dim=-1)
    with torch.no_grad(), without_adapter(model, base) as frozen:
        base_logp_NV = frozen(input_ids=ids_BT, attention_mask=mask_BT).logits[:, :-1][counted_BT].log_softmax(dim=-1)
    of, to = (base_logp_NV, logp_NV) if forward else (logp_NV, base_logp_NV)
    kl: Tensor = F.kl_div(to, of, reduction="sum", log_target=True)
    return kl / (counted_BT.sum().clamp(min=1) if tokens is None else tokens)
