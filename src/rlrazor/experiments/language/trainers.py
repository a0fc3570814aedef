"""TRL, imported here and nowhere else: one trainer per kind of method, over token ids that we made ourselves.

What is ours, and why. Sampling: `lm.sampling`, so that training, scoring and probes stop at the same strings, a group
shares its prompt's prefill, and a resumed run draws what the uninterrupted one does. Advantages other than GRPO's: TRL
has no hook for them and always subtracts the group's mean; `_OnPolicy` overwrites them. The KL penalty of offline
methods: exact over the vocabulary, which TRL has for none of them. Everything else is TRL's: losses, batching, the
optimiser, mixed precision, vLLM, saving.

Several processes (torchrun, DistributedDataParallel) share the sequences of a step and do what one process does, to
float rounding: the same samples, the same updates. The first of them measures, the others wait.

TRL's private methods are overridden in four places (`_tokenize_prompts`, `_generate_single_turn`,
`_calculate_rewards`, `_generate_and_score_completions`): pyproject.toml pins the minor version, and tests pin each.
"""

import copy
import json
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from datasets import Dataset
from safetensors import SafetensorError
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # "experimental" is what the version pin is for
    from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer
    from trl.experimental.sdft.teacher_sync import SyncTeacherModelCallback
    from trl.trainer.utils import add_fused_lm_head

from rlrazor import objectives
from rlrazor.errors import RazorError, cause_of
from rlrazor.experiments.language.methods import Method
from rlrazor.lm import compute, sampling
from rlrazor.lm.adapters import unwrapped, without_wrapper
from rlrazor.runs.sweep import DivergedError
from rlrazor.seeding import seed_of
from rlrazor.system import phases, processes

NO_MEMORY = (
    "Out of memory while training: set a smaller --micro-batch, or train an adapter with --lora-rank. Finished runs "
    "are kept."
)

Reward = Callable[[Sequence[int], Sequence[Sequence[int]]], Sequence[float | None]]
"""(positions of examples, their completions' token ids) -> rewards; None where the verifier failed."""

SIMPO_BETA = SIMPO_GAMMA = 1.0  # RL's Razor's margin of 1; log-probabilities averaged over tokens, as TRL and SimPO do
CHUNK = 256  # sequences that are sampled at a time
SDFT_TOP = 100  # tokens that are distilled at a position, TRL's default
SDFT_TEMPLATE = (
    "{prompt}\n\nThis is an example of a right answer:\n{privileged_context}\n\nAnswer with one of your own."
)


@dataclass(frozen=True)
class Example:
    """A prompt to train on, as token ids; completions end with a stop token. SDFT takes `text`, `demonstration`."""

    prompt: Sequence[int]
    completion: Sequence[int] = ()
    rejected: Sequence[int] = ()
    text: str = ""
    demonstration: str = ""


@dataclass(frozen=True)
class Settings:
    """How to train. A step is one update of the weights.

    `batch_size`: sequences per step, or for on-policy methods prompts per step, each with `group_size` samples.
    `micro_batch`: sequences at a time on a device, which bounds memory; None: all. `iterations`: updates per batch of
    samples. `saved_at`: the steps after which there is something that an interrupted run resumes from.
    """

    lr: float
    schedule: str
    steps: int
    warmup_steps: int
    batch_size: int
    group_size: int
    kl_coef: float
    seed: int
    max_new_tokens: int
    stop_ids: Sequence[int]
    iterations: int = 1
    micro_batch: int | None = None
    bf16: bool = False
    gradient_checkpointing: bool = False
    saved_at: Collection[int] = ()
    folder: Path = Path("unused")
    report_to: str = "none"
    vllm: Mapping[str, Any] = field(default_factory=dict)


AtStep = Callable[[int, Any, Mapping[str, float]], None]
"""(step, model, what training measured since the last call): called after every step, by the first process."""


def train(
    method: Method,
    settings: Settings,
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    at_step: AtStep,
    *,
    reward: Reward | None = None,
    base: Any = None,
    resume: Path | None = None,
) -> None:
    """Fine-tune `model` in place, calling `at_step` after each step.

    `base`: the frozen base policy, for methods that look at it (a KL penalty, DPG); None with LoRA, where the base is
    the model without its adapter. `resume`: a state saved in `settings.folder` to continue from; an on-policy run
    resumes to the same bits within an epoch only, as TRL shuffles. Under torchrun all processes call it, with the same
    arguments. Raises DivergedError when the loss is not finite, RazorError when memory runs out, or where several
    processes cannot do what one does.
    """
    if not examples:
        raise RazorError("There is nothing to train on: no prompt of the task can be used.")
    _check_shared(method, settings, len(examples))
    processes.join()  # before TRL asks how many there are
    build = {"sft": _sft, "simpo": _simpo, "sdft": _sdft, "grpo": _grpo}[method.trainer]
    quiet = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    compute.leave_progress_to_us()
    try:
        with warnings.catch_warnings(), compute.memory_errors(NO_MEMORY), _disk_errors(settings):
            warnings.simplefilter("ignore")  # advice to the caller of TRL, who is us
            callback = _AtStep(at_step, settings)
            trainer = build(method, settings, model, tokenizer, examples, reward, base, callback)
            callback.trainer = trainer
            trainer.measured = {}
            trainer.remove_callback(PrinterCallback)
            trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
            processes.in_all(lambda: None)  # none is still saving
    finally:
        transformers.utils.logging.set_verbosity(quiet)
        # TRL patches `forward` with a function that keeps hold of the model: a copy made later would call this one.
        for policy in {without_wrapper(model), base} - {None}:
            vars(policy).pop("forward", None)


@contextmanager
def _disk_errors(settings: Settings) -> Iterator[None]:
    """Raise RazorError where the state that a resumed run goes on from cannot be written."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if not settings.saved_at or (isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error)):
            raise
        raise RazorError(
            f"What an interrupted run goes on from cannot be written to {settings.folder}: {cause_of(error)} Free some "
            "space, or do without it (--save-every 0); finished runs are kept."
        ) from error


def _check_shared(method: Method, settings: Settings, examples: int) -> None:
    """Raise RazorError for what several processes cannot share."""
    if processes.count() == 1:
        return
    if settings.vllm:
        raise RazorError("vLLM samples otherwise in several processes than in one: start without torchrun.")
    size = settings.batch_size
    if not method.on_policy and examples % size and settings.steps > examples // size:
        raise RazorError(
            f"{examples} examples are no whole number of steps of {size}, which several processes need to go over all "
            "of them: set --batch-size or --train-prompts so that they are."
        )


class _AtStep(TrainerCallback):  # type: ignore[misc]
    """Hands every step over in float32, and leaves no trace: mode, autocast and random state are put back.

    The model is that of the first process, outside of DistributedDataParallel; the others wait.
    """

    def __init__(self, at_step: AtStep, settings: Settings) -> None:
        self.at_step, self.settings = at_step, settings
        self.trainer: Any = None  # set when there is one

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        phases.at(phases.TRAINING, state.global_step, self.settings.steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        phases.at(phases.TRAINING, step, self.settings.steps)
        processes.in_first(lambda: self._hand_over(step, unwrapped(kwargs["model"])))
        if step in self.settings.saved_at:
            phases.at("saving what a resumed run goes on from")
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        phases.at(phases.TRAINING, state.global_step, self.settings.steps)

    def _hand_over(self, step: int, model: Any) -> None:
        training = model.training
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with compute.own_forward(model), torch.random.fork_rng(devices=devices):
            self.at_step(step, model, self.trainer.measured)
        model.train(training)


def _arguments(settings: Settings, sequences: int) -> dict[str, Any]:
    """What all trainers share; `sequences` per step on all devices together."""
    count = processes.count()
    if sequences % count:
        raise RazorError(f"A step of {sequences} sequences cannot be shared by {count} processes: use a divisor.")
    micro = min(settings.micro_batch or sequences, sequences // count)
    if sequences % (micro * count):
        raise RazorError(
            f"A step of {sequences} sequences cannot be cut into micro-batches of {micro} on {count} processes: "
            "set --micro-batch to a divisor."
        )
    return {
        "output_dir": str(settings.folder),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": sequences // (micro * count),
        "max_steps": settings.steps,
        "learning_rate": settings.lr,
        "lr_scheduler_type": "cosine" if settings.schedule == "cosine" else "constant_with_warmup",
        "warmup_steps": settings.warmup_steps,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "bf16": settings.bf16,
        "activation_checkpointing": settings.gradient_checkpointing,
        "seed": settings.seed,
        "save_strategy": "no",  # `_AtStep` says when
        "save_total_limit": 1,
        "logging_strategy": "no" if settings.report_to == "none" else "steps",
        "report_to": settings.report_to,
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "remove_unused_columns": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


class _Measured:
    """Keeps the loss of each step, over its micro-batches and processes, which has to be finite."""

    measured: dict[str, float]
    so_far: Tensor | float = 0.0

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """TRL's, a micro-batch at a time; raises DivergedError in all processes or in none."""
        loss: Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        self.so_far = self.so_far + loss
        if self.accelerator.sync_gradients:  # type: ignore[attr-defined]
            whole = self.accelerator.reduce(self.so_far, reduction="mean")  # type: ignore[attr-defined]
            if not whole.isfinite():
                raise DivergedError(self.state.global_step, self.state.epoch or 0.0)  # type: ignore[attr-defined]
            self.measured["loss"], self.so_far = whole.item(), 0.0
        return loss


# Offline


class _WithPenalty(_Measured):
    """Adds kl_coef KL(pi || pi0), exact over the vocabulary and averaged over completion tokens, to a trainer's loss.

    It costs a forward pass of both policies: TRL's losses do not hand out the logits.
    """

    kl_coef: float
    base: Any
    side = ""  # how the columns of completions begin
    tokens: Tensor | None = None  # of the step, in all processes
    micro_batches: int = 1  # of the step, in each of them

    def get_batch_samples(self, *args: Any) -> tuple[list[Any], Any]:
        """The micro-batches of a step, whose completion tokens the penalty is averaged over."""
        batches, items = super().get_batch_samples(*args)  # type: ignore[misc]
        if batches and self.kl_coef:
            counted = sum((self._completions(batch)[2][:, 1:] != -100).sum() for batch in batches)
            self.tokens = self.accelerator.gather(counted).sum()  # type: ignore[attr-defined]
            self.micro_batches = len(batches)
        return batches, items

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss, and the penalty."""
        batch = self._completions(inputs)
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        value = loss[0] if return_outputs else loss
        if self.kl_coef:
            # Gradients are averaged over processes, and over micro-batches where TRL has not counted the tokens.
            shares = self.accelerator.num_processes * (self.micro_batches if num_items_in_batch is None else 1)  # type: ignore[attr-defined]
            value = value + self.kl_coef * shares * penalty(unwrapped(model), self.base, *batch, self.tokens)
        return (value, loss[1]) if return_outputs else value

    def _completions(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids, attention mask and labels (-100: not counted) of what the penalty is taken on."""
        device = self.args.device  # type: ignore[attr-defined]
        ids, mask, labels = (inputs[self.side + name].to(device) for name in ("input_ids", "attention_mask", "labels"))
        return ids, mask, labels


def penalty(
    model: Any, base: Any, ids_BT: Tensor, mask_BT: Tensor, labels_BT: Tensor, tokens: Tensor | int | None = None
) -> Tensor:
    """KL(pi || pi0) in nats, summed over the positions that predict a label, over `tokens`, by default their number.

    `base` None: the model with its adapter disabled.
    """
    counted_BT = labels_BT[:, 1:] != -100
    logp_NV = model(input_ids=ids_BT, attention_mask=mask_BT).logits[:, :-1][counted_BT].log_softmax(dim=-1)
    with torch.no_grad(), without_adapter(model, base) as frozen:
        base_logp_NV = frozen(input_ids=ids_BT, attention_mask=mask_BT).logits[:, :-1][counted_BT].log_softmax(dim=-1)
    kl: Tensor = F.kl_div(base_logp_NV, logp_NV, reduction="sum", log_target=True)
    return kl / (counted_BT.sum().clamp(min=1) if tokens is None else tokens)


def without_adapter(model: Any, base: Any) -> AbstractContextManager[Any]:
    """The base policy: `base` itself or, where it is None, the model without its adapter for as long as that lasts."""
    return nullcontext(base) if base is not None else _Disabled(model)


class _Disabled:
    def __init__(self, model: Any) -> None:
        self.model = unwrapped(model)
        self.context = self.model.disable_adapter()

    def __enter__(self) -> Any:
        self.context.__enter__()
        return self.model

    def __exit__(self, *error: Any) -> None:
        self.context.__exit__(*error)


class _Sft(_WithPenalty, SFTTrainer):  # type: ignore[misc]
    pass


def _sft(
    method: Method, settings: Settings, model: Any, tokenizer: Any, examples: Sequence[Example], reward: Reward | None,
    base: Any, callback: TrainerCallback,
) -> Any:  # fmt: skip
    rows = [_labelled(example.prompt, example.completion) for example in examples]
    args = SFTConfig(
        **_arguments(settings, settings.batch_size),
        # The rows are token ids with labels already: TRL's preparation would read them all again.
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
    )
    trainer = _Sft(
        model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[callback]
    )
    trainer.kl_coef, trainer.base = settings.kl_coef, base
    return trainer


def _labelled(prompt: Sequence[int], completion: Sequence[int]) -> dict[str, list[int]]:
    return {"input_ids": [*prompt, *completion], "labels": [-100] * len(prompt) + list(completion)}


class _SimPo(_WithPenalty, CPOTrainer):  # type: ignore[misc]
    side = "chosen_"

    def tokenize_row(self, feature: Mapping[str, Any], model: Any = None) -> dict[str, list[int]]:
        """What TRL tokenises from text is there as token ids already."""
        row: dict[str, list[int]] = {}
        for side in ("chosen", "rejected"):
            labelled = _labelled(json.loads(feature["prompt"]), json.loads(feature[side]))
            row |= {f"{side}_{name}": ids for name, ids in labelled.items()}
            row[f"{side}_attention_mask"] = [1] * len(labelled["input_ids"])
        return row


def _simpo(
    method: Method, settings: Settings, model: Any, tokenizer: Any, examples: Sequence[Example], reward: Reward | None,
    base: Any, callback: TrainerCallback,
) -> Any:  # fmt: skip
    # TRL wants text in these columns; JSON is what `tokenize_row` makes token ids of.
    sides = {"prompt": "prompt", "chosen": "completion", "rejected": "rejected"}
    rows = [{side: json.dumps(list(getattr(example, of))) for side, of in sides.items()} for example in examples]
    args = CPOConfig(
        **_arguments(settings, settings.batch_size),
        loss_type="simpo",
        cpo_alpha=0.0,  # the default 1 would mix in SFT
        beta=SIMPO_BETA,
        simpo_gamma=SIMPO_GAMMA,
        max_length=1 << 20,
    )
    trainer = _SimPo(
        model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[callback]
    )
    trainer.kl_coef, trainer.base = settings.kl_coef, base
    return trainer


# On-policy


class _Sampling(_Measured):
    """Prompts are positions of examples; samples come from `lm.sampling`, with a seed that the step decides."""

    settings: Settings
    samples: int  # of a prompt

    def sample(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """A completion for each of a process's prompts, which come in runs of equal ones: groups, or parts of them.

        They are what one process would draw: a chunk of the step's sequences has a random stream of its own, of which
        each process uses its share. Raises DivergedError, in all processes or in none.
        """
        phases.at(f"sampling for step {self.state.global_step + 1} of {self.settings.steps}")  # type: ignore[attr-defined]
        own = len(prompts)
        start, whole = own * self.accelerator.process_index, own * self.accelerator.num_processes  # type: ignore[attr-defined]
        size = max(1, CHUNK // self.samples) * self.samples

        def draw() -> list[list[int]]:
            completions: list[list[int]] = []
            for chunk in range(start // size, (start + own - 1) // size + 1):
                before = chunk * size
                first, last = max(start, before), min(start + own, before + size)
                within = (first - before, min(size, whole - before))
                completions += self._sample_chunk(prompts[first - start : last - start], chunk, within)
            return completions

        return processes.in_all(draw)

    def _sample_chunk(self, prompts: Sequence[Sequence[int]], chunk: int, within: tuple[int, int]) -> list[list[int]]:
        settings, model = self.settings, self.accelerator.unwrap_model(self.model)  # type: ignore[attr-defined]
        group = math.gcd(self.samples, len(prompts))
        place = f"sampling/{self.state.global_step}/{chunk}"  # type: ignore[attr-defined]
        rng = torch.Generator(self.accelerator.device).manual_seed(seed_of(settings.seed, place))  # type: ignore[attr-defined]
        # In the precision of training: the distribution that is sampled is the one whose gradient is taken.
        with self.compute_loss_context_manager():  # type: ignore[attr-defined]
            try:
                return sampling.sample(
                    model, prompts[::group], samples=group, max_new_tokens=settings.max_new_tokens,
                    stop_ids=settings.stop_ids, pad_id=self.processing_class.pad_token_id,  # type: ignore[attr-defined]
                    rng=rng, chunk=len(prompts), within=within,
                )  # fmt: skip
            except sampling.NotFiniteError as error:
                raise DivergedError(self.state.global_step, self.state.epoch or 0.0) from error  # type: ignore[attr-defined]


class _OnPolicy(_Sampling, GRPOTrainer):  # type: ignore[misc]
    """GRPO with our samples and, where the method has other ones, our advantages."""

    method: Method
    examples: Sequence[Example]
    base: Any

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return [list(self.examples[int(position)].prompt) for position in prompts], None, {}

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], images: Any, multimodal_fields: Any, num_generations: int, **kwargs: Any
    ) -> tuple[list[list[int]], Any]:
        if self.use_vllm:
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields, num_generations, **kwargs)  # type: ignore[no-any-return]
        return self.sample(prompt_ids), None

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        rewards: Tensor = super()._calculate_rewards(*args, **kwargs)
        self.rewards = rewards
        return rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Tensor]:
        output: dict[str, Tensor] = super()._generate_and_score_completions(inputs)
        rewards_N = self.rewards[:, 0].nan_to_num()  # of all processes; a completion that nobody could score is no gain
        if self.method.advantage == "reward":
            output["advantages"] = self._own(rewards_N)
        elif self.method.advantage == "dpg":
            logp_N = self.accelerator.gather(self._log_probs(output, self.model))
            with without_adapter(self.model, self.base) as frozen:
                base_logp_N = self.accelerator.gather(self._log_probs(output, frozen))
            logp_BG, base_logp_BG, rewards_BG = (
                values.view(-1, self.num_generations) for values in (logp_N, base_logp_N, rewards_N)
            )
            weights_BG = objectives.dpg_weights(logp_BG, rewards_BG, base_logp_BG, truncate=True)
            solved_B = weights_BG.sum(dim=1) > 0
            if solved_B.any():  # as a share of the group, over the groups that are not lost
                size_B = 1 / weights_BG[solved_B].square().sum(dim=1)
                self.measured["effective_sample_size"] = size_B.mean().item() / self.num_generations
            # TRL averages over the group where DPG sums.
            output["advantages"] = self._own((weights_BG * self.num_generations).flatten())
        self.measured["reward"] = rewards_N.mean().item()
        return output

    def _own(self, values_N: Tensor) -> Tensor:
        """This process's share of what was gathered from all."""
        share = len(values_N) // self.accelerator.num_processes
        return values_N[self.accelerator.process_index * share :][:share]

    def _log_probs(self, output: Mapping[str, Tensor], model: Any) -> Tensor:
        """log pi(y|x) of this process's samples, (N,)."""
        ids_NT = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
        mask_NT = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
        with torch.no_grad(), self.compute_loss_context_manager():
            logp_NT, *_ = self._get_per_token_logps_and_entropies(
                model, ids_NT, mask_NT, output["completion_ids"].shape[1], self.args.per_device_train_batch_size
            )
        total_N: Tensor = (logp_NT * output["completion_mask"]).sum(dim=1)
        return total_N


def _grpo(
    method: Method, settings: Settings, model: Any, tokenizer: Any, examples: Sequence[Example], reward: Reward | None,
    base: Any, callback: TrainerCallback,
) -> Any:  # fmt: skip
    assert reward is not None

    def scored(prompts: list[str], completion_ids: list[list[int]], **columns: Any) -> Sequence[float | None]:
        return processes.in_all(lambda: reward([int(position) for position in prompts], completion_ids))

    shared = _arguments(settings, settings.batch_size * settings.group_size)
    args = GRPOConfig(
        **shared,
        **settings.vllm,
        steps_per_generation=shared["gradient_accumulation_steps"],
        num_generations=settings.group_size,
        num_iterations=settings.iterations,
        max_completion_length=settings.max_new_tokens,
        # Dr. GRPO is two settings: no division by the group's standard deviation, none by the length.
        loss_type="grpo" if method.advantage == "group" else "dr_grpo",
        scale_rewards="group" if method.advantage == "group" else "none",
        beta=0.0,
    )
    trainer = _OnPolicy(
        model=model, args=args, reward_funcs=scored, processing_class=tokenizer, callbacks=[callback],
        train_dataset=Dataset.from_list([{"prompt": str(position)} for position in range(len(examples))]),
    )  # fmt: skip
    trainer.method, trainer.settings, trainer.examples, trainer.base = method, settings, examples, base
    trainer.samples = settings.group_size
    # Not through the config: there TRL would load the reference policy from the path that the model came from.
    trainer.beta, trainer.ref_model = settings.kl_coef, base
    if base is not None:
        add_fused_lm_head(base)
    return trainer


class _Sdft(_Sampling, SDFTTrainer):  # type: ignore[misc]
    def _setup_teacher_model(self) -> None:
        """A moving average of the student. TRL would load it from the path that the model came from."""
        if self._use_peft_ema_teacher_adapter():
            super()._setup_teacher_model()
            return
        self.teacher_model = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.add_callback(SyncTeacherModelCallback(self.teacher_model, self.accelerator))

    def _generate_transformers(self, prompt_ids: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
        return prompt_ids, self.sample(prompt_ids)


def _sdft(
    method: Method, settings: Settings, model: Any, tokenizer: Any, examples: Sequence[Example], reward: Reward | None,
    base: Any, callback: TrainerCallback,
) -> Any:  # fmt: skip
    shared = _arguments(settings, settings.batch_size)
    args = SDFTConfig(
        **shared,
        steps_per_generation=shared["gradient_accumulation_steps"],
        num_generations=1,
        max_completion_length=settings.max_new_tokens,
        teacher_model_kind="ema",
        distillation_topk=min(SDFT_TOP, len(tokenizer)),
        teacher_prompt_template=SDFT_TEMPLATE,
    )
    rows = [{"prompt": example.text, "privileged_context": example.demonstration} for example in examples]
    trainer = _Sdft(
        model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[callback]
    )
    trainer.settings, trainer.samples = settings, 1
    return trainer
