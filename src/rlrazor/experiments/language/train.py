"""Measuring a base policy and fine-tuning it: what `sweep.run` calls for every run, at every scale."""

import copy
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from rlrazor.errors import RazorError, cause_of
from rlrazor.experiments.language import tiny
from rlrazor.experiments.language.config import (
    EXPERIMENT,
    TINY,
    count_steps,
    due_steps,
    steps_per_epoch,
    warmup_steps,
)
from rlrazor.experiments.language.demonstrations import Prompts, Source
from rlrazor.experiments.language.evaluate import PriorSuite, Reference, lm_eval_suite, tiny_suite
from rlrazor.experiments.language.methods import find_method
from rlrazor.experiments.language.tasks import (
    Scores,
    Splits,
    Task,
    find_task,
    own_task,
    score,
    with_demonstrations,
)
from rlrazor.lm import compute, encoding
from rlrazor.lm.adapters import weights_of
from rlrazor.lm.digests import base_digest, tokenizer_digest
from rlrazor.lm.models import LanguageModel, add_lora, load
from rlrazor.lm.probes import GenericText, read_generic
from rlrazor.lm.task_names import are_none
from rlrazor.runs.records import BASE, RunSpec
from rlrazor.runs.store import Checkpoint, RunStore, WeightsMode, atomic_path, read_records
from rlrazor.runs.sweep import DivergedError
from rlrazor.seeding import seed_of
from rlrazor.system import phases, processes
from rlrazor.system.apart.verifier import SECONDS
from rlrazor.system.writing import mark_folder, require_our_folder


@dataclass(frozen=True)
class TaskSource:
    """Where the new task comes from; small to pickle. `prompts`, with a `verifier` or not, make a task of one's own.

    A call of the verifier may take `verifier_timeout` seconds. `generic` is a file of text or prompts that stand for
    what must not change, in place of the built-in probe. `chat`: whether prompts of one's own are put into the
    tokenizer's chat template, where it has one.
    """

    name: str
    data: Path | None = None
    demonstrations: Path | None = None
    prompts: Path | None = None
    verifier: str | None = None
    verifier_timeout: float = SECONDS
    stop: tuple[str, ...] = ()
    generic: Path | None = None
    chat: bool = True

    def task(self) -> Task:
        """The task; raises RazorError where there is none of that name."""
        if self.prompts is None:
            return find_task(self.name)
        return own_task(self.prompts, self.verifier, stop=self.stop, chat=self.chat, seconds=self.verifier_timeout)

    def load(self) -> Splits:
        """Its prompts, with the demonstrations of the file where there is one."""
        splits = self.task().load(self.data)
        if self.demonstrations is None:
            return splits
        return replace(splits, train=with_demonstrations(splits.train, self.demonstrations))

    def fingerprint(self, splits: Splits) -> str:
        """A content hash of the prompts and all that comes with them, a verifier of one's own included: 16 digits."""
        file = Path((self.verifier or "").rpartition(":")[0])
        code = file.read_text(encoding="utf-8", errors="surrogateescape") if file.is_file() else self.verifier
        items = [[asdict(item) for item in side] for side in (splits.train, splits.test)]
        content = json.dumps([items, code, self.stop, *([] if self.chat else ["plain"])], default=str)
        if self.generic is not None:
            content += read_generic(self.generic).content_hash
        return hashlib.sha256(content.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Trainer:
    """The callable that `sweep.run` hands to its workers: models and prompts are loaded where it runs.

    `base`: "tiny", a hub id, a folder or a GGUF file. None of what follows `task` changes a result: `micro_batch`
    (sequences at a time), `save_every` (steps between states that an interrupted run resumes from; None: at each
    checkpoint, 0: none), `weights` (which checkpoints' to hand out), `keep_models` (each run's final policy goes into
    OUT/models).
    """

    base: str
    task: TaskSource
    data_mirror: Path | None = None
    allow_code_execution: bool = False
    micro_batch: int | None = None
    save_every: int | None = None
    keep_models: bool = False
    weights: WeightsMode = "none"
    report_to: str = "none"
    texts: int | None = None  # of the generic probe and the like, at most: for a trial that is timed

    def __call__(self, spec: RunSpec, store: RunStore) -> Iterator[Checkpoint]:
        """Measure the base (`base`), or fine-tune it as `spec` says; of several processes the first alone measures."""
        compute.prepare_process(spec.params["threads"])
        if spec.method != BASE:
            return self._finetune(spec, store)
        if processes.rank() > 0:
            return iter([])
        if self.base != TINY:
            return iter([Checkpoint(self._world(spec, store).reference.base_record(spec.run_id), {})])
        steps = spec.params["pretrain_steps"]
        model = tiny.pretrain(spec.seed, steps=steps, progress=lambda step: phases.at("pre-training", step, steps))
        record = self._world(spec, store, model).reference.base_record(spec.run_id)
        return iter([Checkpoint(record, weights_of(model))])

    def with_weights(self, weights: WeightsMode) -> "Trainer":
        """The same, handing out the weights of these checkpoints."""
        return replace(self, weights=weights)

    def _world(self, spec: RunSpec, store: RunStore, model: Any = None) -> "_World":
        """The base of this run with all that is measured on it. The last one is kept: a sweep goes base by base."""
        own = base_spec(spec)
        key = (str(store.folder), own.run_id, self.base, self.task)
        if key not in _last_world:
            _last_world.clear()
            phases.at("loading the base, the task and the prior tasks")
            suite = self.suite(spec)
            suite.check()
            if self.base == TINY:
                base = LanguageModel.in_memory(model, tiny.make_tokenizer(), TINY) if model else tiny_base(own, store)
            else:
                base = load(self.base, dtype=spec.params.get("dtype", "float32"))
            _last_world[key] = _World(base, self.task, spec.params, suite)
        return _last_world[key]

    def suite(self, spec: RunSpec) -> PriorSuite:
        """What the base could do before, as this run measures it."""
        measured = spec.params["measured"]
        return self.suite_of(measured["prior"], measured["prior_limit"])

    def suite_of(self, tasks: Sequence[str], limit: int) -> PriorSuite:
        """The same of these prior tasks, with so many items of each, 0 for all."""
        generic = None if self.task.generic is None else read_generic(self.task.generic)
        if self.base == TINY:
            return tiny_suite(generic).without_scores() if are_none(tasks) else tiny_suite(generic)
        suite = lm_eval_suite(
            tasks,
            limit=limit or None,
            data_mirror=self.data_mirror,
            allow_code_execution=self.allow_code_execution,
            generic=generic,
        )
        suite = suite.without_scores() if are_none(tasks) else suite
        return suite if self.texts is None else suite.cut(self.texts)

    def _finetune(self, spec: RunSpec, store: RunStore) -> Iterator[Checkpoint]:
        from rlrazor.experiments.language import trainers  # TRL takes seconds to import

        world, (method, _) = self._world(spec, store), find_method(spec.method)
        base = world.base
        prompts = Prompts.of(world.task, world.splits.train[: spec.params["train_prompts"] or None], base)
        processes.in_first(lambda: bool(world.reference))  # measured before the base has an adapter in it

        def demonstrations() -> tuple[list[Any], dict[str, float]]:
            teacher = self._teacher(spec, store, world) if "teacher" in spec.params else None
            return Source(world.task, prompts, base, teacher, spec.seed).examples(method)

        def reward(positions: Sequence[int], completions: Sequence[Sequence[int]]) -> Sequence[float | None]:
            texts = [encoding.decode(base.tokenizer, completion) for completion in completions]
            scores = score(world.task, [prompts.items[position] for position in positions], texts)
            world.say_failures(scores)
            return scores.values

        phases.at("preparing what is trained on")
        examples, counts = processes.in_first(demonstrations)
        counts = {"prompts_too_long": float(prompts.too_long), **counts}
        unfinished = _Unfinished(store.partial_folder(spec), keep=self.save_every != 0)
        due = due_steps(spec, len(examples))
        state, checkpoints = processes.in_first(lambda: unfinished.begin(due, with_weights=self.weights == "all"))
        with _policy(base.model, spec) as (model, frozen):
            measuring = _Measuring(spec, world, frozen, len(examples), counts, self.weights, unfinished, checkpoints)
            settings = self._settings(spec, world, measuring, unfinished.folder)
            try:
                trainers.train(
                    method,
                    settings,
                    model,
                    base.tokenizer,
                    examples,
                    measuring,
                    reward=reward,
                    base=frozen,
                    resume=state,
                )
                if self.keep_models:
                    folder = store.folder / "models" / spec.run_id
                    processes.in_first(lambda: _save_model(model, base.tokenizer, folder))
            except DivergedError:
                yield from checkpoints.values()
                raise
        yield from checkpoints.values()

    def _settings(self, spec: RunSpec, world: "_World", measuring: "_Measuring", folder: Path) -> Any:
        from rlrazor.experiments.language import trainers

        params, base, task, steps = spec.params, world.base, world.task, measuring.steps
        every = self.save_every
        # The last step is followed by the run's being stored.
        saved = [] if every == 0 else range(every, steps, every) if every else measuring.due[:-1]
        return trainers.Settings(
            lr=params["lr"],
            schedule=params["schedule"],
            steps=steps,
            warmup_steps=warmup_steps(spec, measuring.examples),
            batch_size=params["batch_size"],
            group_size=params["group_size"] or 1,
            kl_coef=params["kl_coef"],
            seed=seed_of(spec.seed, "order") % 2**31,
            max_new_tokens=task.max_new_tokens,
            stop_ids=encoding.stop_ids(base.tokenizer, base.model, task.stop),
            iterations=params["iterations"],
            micro_batch=self.micro_batch,
            bf16=params["precision"] == "bf16",
            saved_at=frozenset(saved),
            folder=folder,
            report_to=self.report_to,
        )

    def _teacher(self, spec: RunSpec, store: RunStore, world: "_World") -> Any:
        taught = spec.params["teacher"]
        own = RunSpec(EXPERIMENT, taught["method"], taught["params"], taught["seed"])
        teacher = copy.deepcopy(world.base.model)
        teacher.load_state_dict(_named_as(teacher, store.load_weights(own, taught["step"])))
        return teacher


class _World:
    """A base policy, the new task, and what checkpoints are compared by."""

    def __init__(self, base: LanguageModel, source: TaskSource, params: Mapping[str, Any], suite: PriorSuite) -> None:
        measured, task = params["measured"], source.task()
        self.base = base
        self.task = replace(task, max_new_tokens=params["max_new_tokens"] or task.max_new_tokens)
        base.model.requires_grad_(False)
        self.splits = source.load()
        self.measured, self.suite = measured, suite
        self._said_failures = False

    def say_failures(self, scores: Scores) -> None:
        """Say, the first time, that the verifier fails on completions of training; of those measured, records say."""
        if scores.failures and not self._said_failures:
            self._said_failures = True
            phases.say(scores.describe_failures())

    @cached_property
    def reference(self) -> Reference:
        """The base as checkpoints are compared with it. Only the process that measures asks for it."""
        measured = self.measured
        test = Prompts.of(self.task, self.splits.test[: measured["test_prompts"]], self.base)
        return Reference(self.base, self.task, test, self.suite, measured["kl_samples"], measured["scored"])


_last_world: dict[tuple[Any, ...], _World] = {}


@contextmanager
def _policy(base: Any, spec: RunSpec) -> Iterator[tuple[Any, Any]]:
    """The model to train, and the frozen base beside it: with an adapter, None, as it is the model without that."""
    if not (rank := spec.params["lora_rank"]):
        yield copy.deepcopy(base).requires_grad_(True), base
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(spec.seed, "adapter") % 2**63)
        model = add_lora(base, rank)
    try:
        yield model, None
    finally:
        model.unload()  # leaves the base as it was


class _Measuring:
    """Called after each step, it measures where a checkpoint is due; what was measured is in `checkpoints`, by step."""

    def __init__(
        self,
        spec: RunSpec,
        world: _World,
        frozen: Any,
        examples: int,
        counts: Mapping[str, float],
        weights: WeightsMode,
        unfinished: "_Unfinished",
        checkpoints: dict[int, Checkpoint],
    ) -> None:
        self.spec, self.world, self.frozen, self.counts = spec, world, frozen, counts
        self.weights, self.unfinished, self.checkpoints = weights, unfinished, checkpoints
        self.steps, self.per_epoch = count_steps(spec, examples), steps_per_epoch(spec, examples)
        self.due, self.examples = due_steps(spec, examples), examples

    def __call__(self, step: int, policy: Any, measured: Mapping[str, float]) -> None:
        if step not in self.due or step in self.checkpoints:
            return
        phases.at("measuring checkpoint", self.due.index(step) + 1, len(self.due))
        metrics = {**self.counts, **measured}
        record = self.world.reference.record(
            self.spec.run_id, step, step / self.per_epoch, policy, metrics, frozen=self.frozen
        )
        wanted = self.weights == "all" or (self.weights == "final" and step == self.due[-1])
        self.checkpoints[step] = Checkpoint(record, weights_of(policy) if wanted else {})
        self.unfinished.add(self.checkpoints[step])
        phases.at(phases.TRAINING, step, self.steps)


class _Unfinished:
    """What is there of an unfinished run: the trainer's own saved states, and the checkpoints so far."""

    def __init__(self, folder: Path, *, keep: bool) -> None:
        self.folder, self.keep = folder, keep

    def state(self) -> Path | None:
        """The last whole state to resume from; one that a killed process left half-written is not."""
        found = [path.parent for path in self.folder.glob("checkpoint-*/trainer_state.json")] if self.keep else []
        numbered = [path for path in found if path.name.partition("-")[2].isdecimal()]
        return max(numbered, key=lambda path: int(path.name.partition("-")[2]), default=None)

    def begin(self, due: Sequence[int], *, with_weights: bool) -> tuple[Path | None, dict[int, Checkpoint]]:
        """The state to go on from, and the checkpoints up to it: later steps are trained, and measured, again.

        Where one that was `due` by then is not there, or not with the weights that are wanted, the run starts anew.
        """
        if (state := self.state()) is None:
            return None, {}
        until = int(state.name.partition("-")[2])
        found = self._checkpoints(until)
        if all(step in found and (found[step].weights or not with_weights) for step in due if step <= until):
            return state, found
        shutil.rmtree(self.folder)
        return None, {}

    def _checkpoints(self, until: int) -> dict[int, Checkpoint]:
        path = self.folder / "records.jsonl"
        if not path.exists():
            return {}
        try:
            records = read_records(path)
        except RazorError as error:
            raise RazorError(f"{error} Delete {self.folder} to train from the start.") from error
        return {
            record.step: Checkpoint(record, self._weights(record.step)) for record in records if record.step <= until
        }

    def add(self, checkpoint: Checkpoint) -> None:
        """Keep a checkpoint, if there will be a state to resume from."""
        if not self.keep:
            return
        path, record = self.folder / "records.jsonl", checkpoint.record
        before = path.read_text().splitlines() if path.exists() else []
        lines = [line for line in before if json.loads(line)["step"] < record.step]
        if checkpoint.weights:
            with atomic_path(self._weights_path(record.step)) as partial:
                save_file(dict(checkpoint.weights), partial)
        with atomic_path(path) as partial:
            partial.write_text("".join(f"{line}\n" for line in [*lines, json.dumps(asdict(record), allow_nan=False)]))

    def _weights(self, step: int) -> dict[str, Any]:
        path = self._weights_path(step)
        return load_file(path) if path.exists() else {}

    def _weights_path(self, step: int) -> Path:
        return self.folder / f"weights-{step}.safetensors"


def base_spec(spec: RunSpec) -> RunSpec:
    """The spec of the base run that a fine-tuning run with these params starts from."""
    names = ("recipe", "base", "task", "data", "max_new_tokens", "dtype", "measured", "pretrain_steps", "threads")
    own = {name: spec.params[name] for name in names if name in spec.params}
    return RunSpec(EXPERIMENT, BASE, own, spec.seed)


@dataclass(frozen=True, eq=False)
class CalibrationBase:
    """What a law says of the base that a sweep started from."""

    digest: str
    tokenizer_digest: str
    generic: GenericText
    max_new_tokens: int
    has_chat_template: bool

    def limited(self, task: Task) -> Task:
        """The task as the sweep has measured it."""
        return replace(task, max_new_tokens=self.max_new_tokens or task.max_new_tokens)


def calibration_base(trainer: Trainer, spec: RunSpec, store: RunStore, save_to: Path | None = None) -> CalibrationBase:
    """The base of a base run, loaded once more to take its digest, and written to the folder `save_to`, if any."""
    dtype = spec.params.get("dtype", "float32")
    lm = tiny_base(spec, store) if trainer.base == TINY else load(trainer.base, dtype=dtype)
    if save_to is not None:
        _save_model(lm.model, lm.tokenizer, save_to)
    return CalibrationBase(
        base_digest(lm.model),
        tokenizer_digest(lm.tokenizer),
        trainer.suite(spec).generic,
        spec.params["max_new_tokens"],
        bool(getattr(lm.tokenizer, "chat_template", None)),
    )


def tiny_base(spec: RunSpec, store: RunStore) -> LanguageModel:
    """The tiny base that a base run has pre-trained."""
    model = tiny.make_model(0)
    model.load_state_dict(_named_as(model, store.load_weights(spec, 0)))
    return LanguageModel.in_memory(model, tiny.make_tokenizer(), TINY)


def _named_as(model: Any, weights: Mapping[str, Any]) -> dict[str, Any]:
    """Weights as `load_state_dict` wants them: parameters come once, tied ones under both names."""
    tied = {name: tensor for name, tensor in model.state_dict().items() if name not in weights}
    return {**tied, **weights}


def _save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """The policy, or its adapter, in the hub's layout: whole or not at all."""
    require_our_folder(folder)
    partial = folder.with_name(f".rlrazor-{folder.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        model.save_pretrained(partial, safe_serialization=True)
        tokenizer.save_pretrained(partial)
        mark_folder(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except Exception as error:  # of a full disk safetensors and tokenizers raise types of their own
        raise RazorError(
            f"The model cannot be written to {folder}: {cause_of(error)} Free some space, then run the same command "
            "again."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
