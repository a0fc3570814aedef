"""Short trainings that have to come out the same in one process and in two: `test_processes.py` starts both.

Prompts and completions differ in length, so that a mean of means is not the mean.
"""

import copy
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from trainer_settings import changed

from rlrazor.cli import main
from rlrazor.errors import RazorError
from rlrazor.experiments.language import trainers
from rlrazor.experiments.language.methods import EWC, LWF, find_method
from rlrazor.experiments.language.protection import elastic, without_forgetting
from rlrazor.experiments.language.trainers import Example, Job, Samples, Settings, Updates, offline
from rlrazor.lm import compute
from rlrazor.lm.models import add_lora
from rlrazor.runs.sweep import DivergedError
from rlrazor.system import processes
from tiny_models import char_tokenizer, tiny_llama

TOKENIZER = char_tokenizer()


def ids(text: str) -> list[int]:
    return list(TOKENIZER(text)["input_ids"])


EXAMPLES = [
    Example(
        ids("x" * (n % 4) + f"{letter}="), ids(letter * (1 + n % 3) + "b;"), ids(f"z{letter};"),
        f"{letter}=", f"{letter}b",
    )
    for n, letter in enumerate("acdefghi")
]  # fmt: skip
SETTINGS = Settings(
    Updates(lr=3e-3, schedule="cosine", steps=4, warmup_steps=1, batch_size=4, kl_coef=0.5, seed=5),
    Samples(group_size=1, max_new_tokens=5, stop_ids=[TOKENIZER.eos_token_id, *range(10, 20)]),
)
ON_POLICY = changed(SETTINGS, batch_size=4, group_size=4)
# Name: (method, settings, rank of the adapter). Two epochs of the offline ones, whose second is shuffled anew.
CASES: dict[str, tuple[str, Settings, int]] = {
    "sft": ("sft+kl", SETTINGS, 0),
    "sft, micro-batches of 1, adapter": ("sft+kl", changed(SETTINGS, micro_batch=1), 2),
    "ewc, micro-batches of 1": ("ewc+kl", changed(SETTINGS, micro_batch=1), 0),
    "lwf, micro-batches of 1": ("lwf", changed(SETTINGS, micro_batch=1), 0),
    "iterative-sft": ("iterative-sft+kl", changed(SETTINGS, tries=8, rounds=2), 0),
    "simpo": ("simpo+kl", SETTINGS, 0),
    "simpo, micro-batches of 1": ("simpo+kl", changed(SETTINGS, micro_batch=1), 0),
    "dr-grpo": ("dr-grpo+kl", changed(ON_POLICY, iterations=2, kl_coef=0.05), 0),
    "grpo, groups in both, adapter": ("grpo+kl", changed(ON_POLICY, batch_size=3, micro_batch=2, kl_coef=0.05), 2),
    "kl-dpg": ("kl-dpg", ON_POLICY, 0),
    "sdft": ("sdft", changed(SETTINGS, batch_size=4), 0),
}


def reward(positions: Sequence[int], completions: Sequence[Sequence[int]]) -> list[float | None]:
    """Right where the first token's id is even; one that cannot be verified."""
    return [None if len(completion) == 3 else float(completion[0] % 2 == 0) for completion in completions]


def train(name: str, settings: Settings, lora: int, **options: Any) -> tuple[torch.Tensor, list[Any]]:
    """The weights that were trained, and (step, what was measured) of each step."""
    base = tiny_llama(seed=1, scale=0.1).requires_grad_(False)
    torch.manual_seed(1)
    model = add_lora(copy.deepcopy(base), lora) if lora else copy.deepcopy(base).requires_grad_(True)
    steps: list[Any] = []

    def at_step(step: int, model: Any, measured: Mapping[str, float]) -> None:
        assert not hasattr(model, "module")
        steps.append((step, dict(measured)))

    method, penalised = find_method(name)
    settings = settings if penalised else changed(settings, kl_coef=0.0)
    frozen = None if lora else base
    terms = {EWC: lambda: elastic(model, EXAMPLES, 1e4, seed=3), LWF: lambda: without_forgetting(base, EXAMPLES, 2.0)}
    term = terms[method.protection]() if method.protection in terms else None
    trainers.train(Job(method, settings, model, TOKENIZER, EXAMPLES, frozen, reward, term), at_step, **options)
    return torch.cat([weight.detach().flatten() for weight in model.parameters() if weight.requires_grad]), steps


def outcomes(folder: Path) -> Iterator[tuple[str, torch.Tensor, list[Any]]]:
    """What comes of every case, and of one that goes on from where it was saved."""
    compute.prepare_process()
    for case, (name, settings, lora) in CASES.items():
        yield case, *train(name, settings, lora)
    for name, settings in {"sft+kl": SETTINGS, "dr-grpo": changed(ON_POLICY, batch_size=2)}.items():
        saving = changed(settings, at={2}, folder=folder / name)
        train(name, saving, 0)
        yield f"{name}, resumed", *train(name, saving, 0, resume=folder / name / "checkpoint-2")


def failures() -> Iterator[tuple[str, str]]:
    """What is said where something cannot be shared, or fails in the second process alone."""

    def told(make: Callable[[], object]) -> str:
        try:
            return f"returned {make()}"
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    def fails_in(rank: int) -> int:
        if processes.rank() == rank:
            raise DivergedError(3, 0.5)
        return processes.rank()

    yield "first", told(lambda: processes.in_first(processes.rank))
    yield "first fails", told(lambda: processes.in_first(lambda: fails_in(0)))
    yield "second fails", told(lambda: processes.in_all(lambda: fails_in(1)))
    yield "none fails", told(lambda: processes.in_all(lambda: fails_in(2)))
    yield "odd", told(lambda: train("sft", changed(SETTINGS, batch_size=3, steps=1), 0))
    yield "epochs", told(lambda: train("sft", changed(SETTINGS, batch_size=6), 0))
    yield "diverged", told(lambda: train("dr-grpo", changed(ON_POLICY, lr=float("inf")), 0))


COMMAND = (
    "finetune tiny --task letters --method sft+kl --lr 1e-3 --max-steps 4 --batch-size 8 --pretrain-steps 10 "
    "--train-prompts 40 --test-prompts 8 --kl-samples 2 --checkpoints-per-epoch 1 --save-every 2 --json"
)


def fail_in_the_second() -> None:
    """The second process fails while the first waits for its gradients."""
    theirs = offline.Sft.compute_loss

    def failing(trainer: Any, *arguments: Any, **named: Any) -> Any:
        if processes.rank() == 1 and trainer.state.global_step == 1:
            raise RazorError("The second process says why.")
        return theirs(trainer, *arguments, **named)

    offline.Sft.compute_loss = failing  # type: ignore[assignment, method-assign]
    with processes.together():
        train("sft", SETTINGS, 0)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.save(list(outcomes(folder)), folder / f"outcomes-{processes.rank()}.pt")
    (folder / f"failures-{processes.rank()}.json").write_text(json.dumps(dict(failures())))
    code = main([*COMMAND.split(), "--out", str(folder / "run")])
    (folder / f"code-{processes.rank()}").write_text(str(code))
    fail_in_the_second()
