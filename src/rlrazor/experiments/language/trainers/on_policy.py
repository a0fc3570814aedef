"""GRPO and its kin, and self-distillation, by TRL, on our samples."""

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # "experimental" is what the version pin is for
    from trl import GRPOConfig, GRPOTrainer
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer
    from trl.experimental.sdft.teacher_sync import SyncTeacherModelCallback
    from trl.trainer.utils import add_fused_lm_head

from rlrazor import objectives
from rlrazor.experiments.language.methods import Method
from rlrazor.experiments.language.trainers.common import (
    Example,
    Job,
    KeepsLoss,
    Settings,
    arguments_of,
    given,
    sampled,
    without_adapter,
)
from rlrazor.system import phases, processes

CHUNK = 256  # sequences that are sampled at a time
SDFT_TOP = 100  # tokens that are distilled at a position, TRL's default
SDFT_TEMPLATE = (
    "{prompt}\n\nThis is an example of a right answer:\n{privileged_context}\n\nAnswer with one of your own."
)


class _Sampling(KeepsLoss):
    """Prompts are positions of examples; samples come from `lm.sampling`, with a seed that the step decides."""

    settings: Settings
    samples: int  # of a prompt

    def sample(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """A completion for each of a process's prompts, which come in runs of equal ones: groups, or parts of them.

        They are what one process would draw: a chunk of the step's sequences has a random stream of its own, of which
        each process uses its share. Raises DivergedError, in all processes or in none.
        """
        phases.at(f"sampling for step {self.state.global_step + 1} of {self.settings.updates.steps}")  # type: ignore[attr-defined]
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
        group, purpose = math.gcd(self.samples, len(prompts)), f"sampling/{self.state.global_step}/{chunk}"  # type: ignore[attr-defined]
        how = {"samples": group, "chunk": len(prompts), "within": within}
        return sampled(self, self.settings, prompts[::group], purpose, **how)


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


def grpo(job: Job) -> Any:
    """GRPO's trainer, with our samples."""
    reward = job.reward
    assert reward is not None

    def scored(prompts: list[str], completion_ids: list[list[int]], **columns: Any) -> Sequence[float | None]:
        return processes.in_all(lambda: reward([int(position) for position in prompts], completion_ids))

    updates, samples = job.settings.updates, job.settings.samples
    shared = arguments_of(job.settings, updates.batch_size * samples.group_size)
    args = GRPOConfig(
        **shared,
        steps_per_generation=shared["gradient_accumulation_steps"],
        num_generations=samples.group_size,
        num_iterations=samples.iterations,
        max_completion_length=samples.max_new_tokens,
        # Dr. GRPO is two settings: no division by the group's standard deviation, none by the length.
        loss_type="grpo" if job.method.advantage == "group" else "dr_grpo",
        scale_rewards="group" if job.method.advantage == "group" else "none",
        beta=0.0,
    )
    positions = [{"prompt": str(position)} for position in range(len(job.examples))]
    trainer = _OnPolicy(**given(job, args, positions), reward_funcs=scored)
    trainer.method, trainer.settings, trainer.examples, trainer.base = job.method, job.settings, job.examples, job.base
    trainer.samples = samples.group_size
    # Not through the config: there TRL would load the reference policy from the path that the model came from.
    trainer.beta, trainer.ref_model = updates.kl_coef, job.base
    if job.base is not None:
        add_fused_lm_head(job.base)
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


def sdft(job: Job) -> Any:
    """SDFT's trainer, with our samples."""
    shared = arguments_of(job.settings, job.settings.updates.batch_size)
    args = SDFTConfig(
        **shared,
        steps_per_generation=shared["gradient_accumulation_steps"],
        num_generations=1,
        max_completion_length=job.settings.samples.max_new_tokens,
        teacher_model_kind="ema",
        distillation_topk=min(SDFT_TOP, len(job.tokenizer)),
        teacher_prompt_template=SDFT_TEMPLATE,
    )
    rows = [{"prompt": example.text, "privileged_context": example.demonstration} for example in job.examples]
    trainer = _Sdft(**given(job, args, rows))
    trainer.settings, trainer.samples = job.settings, 1
    return trainer
