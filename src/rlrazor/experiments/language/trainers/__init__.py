"""TRL, imported in this folder and nowhere else: one trainer per kind of method, over token ids that we made ourselves.

What is ours, and why. Sampling: `lm.sampling`, so that training, scoring and probes stop at the same strings, a group
shares its prompt's prefill, and a resumed run draws what the uninterrupted one does. Advantages other than GRPO's: TRL
has no hook for them and always subtracts the group's mean; `on_policy` overwrites them. The KL penalty of offline
methods: exact over the vocabulary, which TRL has for none of them. Everything else is TRL's: losses, batching, the
optimiser, mixed precision, saving.

Several processes (torchrun, DistributedDataParallel) share the sequences of a step and do what one process does, to
float rounding: the same samples, the same updates. The first of them measures, the others wait.

TRL's private methods are overridden in four places (`_tokenize_prompts`, `_generate_single_turn`,
`_calculate_rewards`, `_generate_and_score_completions`): pyproject.toml pins the minor version, and tests pin each.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PrinterCallback, TrainerCallback

from rlrazor.errors import RazorError, cause_of
from rlrazor.experiments.language.trainers import offline, on_policy, own_samples
from rlrazor.experiments.language.trainers.common import Example, Job, Part, Reward, Samples, Saving, Settings, Updates
from rlrazor.lm import compute
from rlrazor.lm.adapters import unwrapped, without_wrapper
from rlrazor.system import phases, processes, quiet

__all__ = ["Example", "Job", "Part", "Reward", "Samples", "Saving", "Settings", "Updates", "train"]

NO_MEMORY = (
    "Out of memory while training: set a smaller --micro-batch, or train an adapter with --lora-rank. Finished runs "
    "are kept."
)

BUILDERS = {
    "sft": offline.sft,
    "simpo": offline.simpo,
    "sdft": on_policy.sdft,
    "grpo": on_policy.grpo,
    "own": own_samples.own_samples,
}

AtStep = Callable[[int, Any, Mapping[str, float]], bool | None]
"""(step, model, what training measured since the last call) -> whether to stop: after every step, by the first process.
"""


def train(job: Job, at_step: AtStep, *, resume: Path | None = None) -> None:
    """Fine-tune the job's model in place, calling `at_step` after each step.

    `resume`: a state saved in the job's folder to continue from; an on-policy run resumes to the same bits within an
    epoch only, as TRL shuffles. Under torchrun all processes call it, with the same arguments. Raises DivergedError
    when the loss is not finite, RazorError when memory runs out, or where several processes cannot do what one does.
    """
    if not job.examples:
        raise RazorError("There is nothing to train on: no prompt of the task can be used.")
    _check_shared(job)
    processes.join()  # before TRL asks how many there are
    quiet.libraries()
    try:
        with quiet.without_advice(), compute.memory_errors(NO_MEMORY), _disk_errors(job.settings.saving):
            trainer = BUILDERS[job.method.trainer](job)
            trainer.measured = {}
            trainer.add_callback(AtStepCallback(at_step, job.settings, trainer.measured))
            trainer.remove_callback(PrinterCallback)
            trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
            processes.in_all(lambda: None)  # none is still saving
    finally:
        # TRL patches `forward` with a function that keeps hold of the model: a copy made later would call this one.
        for policy in {without_wrapper(job.model), job.base} - {None}:
            vars(policy).pop("forward", None)


@contextmanager
def _disk_errors(saving: Saving) -> Iterator[None]:
    """Raise RazorError where the state that a resumed run goes on from cannot be written."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if not saving.at or (isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error)):
            raise
        raise RazorError(
            f"What an interrupted run goes on from cannot be written to {saving.folder}: {cause_of(error)} Free some "
            "space, or do without it (--save-every 0); finished runs are kept."
        ) from error


def _check_shared(job: Job) -> None:
    """Raise RazorError for what several processes cannot share."""
    if processes.count() == 1:
        return
    examples, size = len(job.examples), job.settings.updates.batch_size
    if (
        not (job.method.on_policy or job.method.asks_alone)
        and examples % size
        and job.settings.updates.steps > examples // size
    ):
        raise RazorError(
            f"{examples} examples are no whole number of steps of {size}, which several processes need to go over all "
            "of them: set --batch-size or --train-prompts so that they are."
        )


class AtStepCallback(TrainerCallback):  # type: ignore[misc]
    """Hands every step over in float32, and leaves no trace: mode, autocast and random state are put back.

    The model is that of the first process, outside of DistributedDataParallel; the others wait.
    """

    def __init__(self, at_step: AtStep, settings: Settings, measured: Mapping[str, float]) -> None:
        self.at_step, self.steps, self.saved_at = at_step, settings.updates.steps, settings.saving.at
        self.measured = measured  # the trainer's, which changes as it trains

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        phases.at(phases.TRAINING, state.global_step, self.steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        phases.at(phases.TRAINING, step, self.steps)
        if processes.in_first(lambda: self._hand_over(step, unwrapped(kwargs["model"]))):
            control.should_training_stop = True
        elif step in self.saved_at:
            phases.at("saving what a resumed run goes on from")
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        phases.at(phases.TRAINING, state.global_step, self.steps)

    def _hand_over(self, step: int, model: Any) -> bool:
        training = model.training
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with compute.own_forward(model), torch.random.fork_rng(devices=devices):
            ends = bool(self.at_step(step, model, self.measured))
        model.train(training)
        return ends
