"""What a sweep would take on this machine: a few real updates and one measurement, timed, and multiplied by counts."""

import mmap
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rlrazor.experiments.language import tiny, world
from rlrazor.experiments.language.config import TINY, Config
from rlrazor.experiments.language.evaluate import OF_PROMPTS, OF_TEXTS
from rlrazor.experiments.language.methods import KL_SUFFIX, LWF, OWN, Method, find_method
from rlrazor.experiments.language.setup import Setup
from rlrazor.experiments.language.tasks import Splits
from rlrazor.experiments.language.train import train
from rlrazor.lm import packaged
from rlrazor.runs import sweep
from rlrazor.runs.dry_run import Sizes, Trial, peak_memory
from rlrazor.runs.experiment import Cost
from rlrazor.runs.records import BASE, RunSpec
from rlrazor.runs.store import Keep, RunStore
from rlrazor.system import phases

STEPS, SEQUENCES, PROMPTS, ITEMS, TEXTS, TOKENS, PRETRAINING = 4, 4, 4, 4, 12, 24, 40
"""What is timed of a model that is not tiny: updates, of so many sequences; prompts, items of each prior task, texts,
tokens of a completion. Of the tiny one only the updates and those of its pre-training are fewer than a run's."""
RECORD_BYTES = 8000  # a record, in its run and in the table
ITEM_BYTES = 100  # what became of an item, with four log-likelihoods
STATE = 3  # an update's state in weights: the weights and AdamW's two moments
_LEAST_ERROR = 0.3  # of an estimate, as a share: machines differ so much from one minute to the next, and so do sizes


@dataclass
class Seconds:
    """Of an update by kind of method, per sequence of it; of a measurement, and of measuring the base once more in each
    process; of a pre-training.
    """

    update: dict[tuple[str, ...], float] = field(default_factory=dict)
    measurement: float = 0.0
    reference: float = 0.0
    pretraining: float = 0.0


@dataclass
class Timing:
    """What a trial found. `spread`: of the updates' seconds, as a share. `parameters`: of the model. `items`: of all
    prior tasks. `bytes`: of a process. `timed`: in words.
    """

    seconds: Seconds = field(default_factory=Seconds)
    spread: float = 0.0
    parameters: int = 0
    items: int = 0
    bytes: int = 0
    timed: str = ""


def is_at_hand(base: str) -> bool:
    """Whether a base can be loaded without a download."""
    if base in packaged.BASES:
        return packaged.is_installed(base)
    if base == TINY or Path(base).exists():
        return True
    from huggingface_hub import try_to_load_from_cache

    try:
        return isinstance(try_to_load_from_cache(base, "config.json"), str)
    except ValueError:  # no name that the hub could have
        return False


def kind_of(method: Method, *, penalised: bool) -> tuple[str, ...]:
    """Methods of one kind take as long: the same trainer, and as many models that look at a batch.

    SFT on the policy's own right samples counts as RL, which draws as many where all are right: in a trial none may be.
    """
    trainer = "grpo" if method.trainer == OWN else method.trainer
    looks = "dpg" if method.advantage == "dpg" else LWF if method.protection == LWF else ""
    return trainer, looks, "kl" if penalised else ""


def sequences_of(spec: RunSpec) -> int:
    """Of an update."""
    return int(spec.params["batch_size"] * (spec.params["group_size"] or 1))


def time_trial(config: Config, setup: Setup, splits: Splits) -> Timing:
    """Train and measure a little, in a folder that is removed. Raises RazorError where the sweep would."""
    found, small, data = Timing(), _small(config), setup.task.fingerprint(splits)
    micro_batch = setup.running.micro_batch
    trial = replace(setup, running=replace(setup.running, save_every=0, keep_models=False, report_to="none"))
    if config.base != TINY:
        # What is tried is so few sequences that they may be no whole number of micro-batches.
        trial = replace(
            trial, prior=replace(trial.prior, texts=TEXTS), running=replace(trial.running, micro_batch=None)
        )
    kinds: dict[tuple[str, ...], str] = {}
    for name in small.methods:
        method, penalised = find_method(name)
        timed = "reinforce" + KL_SUFFIX * penalised if method.trainer == OWN else name
        kinds.setdefault(kind_of(method, penalised=penalised), timed)
    relative: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        store = RunStore(Path(folder))
        if config.base == TINY:
            _time_pretraining(found, config, small, trial, store, data)
        for number, (kind, name) in enumerate(kinds.items()):
            spec = small.specs("trial", data, [name])[0]
            with _listening() as clock:
                for _ in train(trial, spec, store):
                    pass
            updates = clock.updates[1:] or clock.updates  # the first one warms up
            longer = _tokens(config, setup) / TOKENS if spec.params["group_size"] and config.base != TINY else 1.0
            found.seconds.update[kind] = longer * statistics.median(updates) / sequences_of(spec)
            relative += [one / statistics.median(updates) for one in updates]
            if number == 0:
                tried = next(iter(world.last_world.values()))
                _measured(found, clock, config, small, trial, tried)
                found.parameters = sum(weight.numel() for weight in tried.base.model.parameters())
            trained = _trained(found.parameters, config)
            found.bytes = max(found.bytes, clock.bytes_for(spec, config, trained, micro_batch))
    world.last_world.clear()
    found.spread = max(_LEAST_ERROR, statistics.pstdev(relative) if len(relative) > 1 else 1.0)
    example = small.specs("trial", data, [next(iter(kinds.values()))])[0]
    found.timed = (
        f"{STEPS} updates of {sequences_of(example)} sequences by {', '.join(kinds.values())}, and one "
        f"measurement on {small.test_prompts} prompts"
        + (f" and {small.prior_limit} items of each prior task" if config.base != TINY and config.has_prior else "")
    )
    return found


def _time_pretraining(found: Timing, config: Config, small: Config, trial: Setup, store: RunStore, data: str) -> None:
    """Make the base that is tried, and count what a whole one takes."""
    bases = small.base_specs("trial", data)
    for base in bases:
        store.keep(base, Keep(last=True))
    with _listening() as clock:
        sweep.run(bases, partial(train, trial), store)
    found.seconds.pretraining = clock.parts["pre-training", False] * config.pretrain_steps / small.pretrain_steps
    world.last_world.clear()


def _small(config: Config) -> Config:
    """The same with one run of each method, short, and measured once at its end on little."""
    methods = tuple(name for name in config.methods if "distilled" not in name) or ("sft",)
    own: dict[str, Any] = {
        "methods": methods,
        "lrs": config.lrs[:1],
        "rl_lrs": config.rl_lrs[:1],
        "seeds": config.seeds[:1],
    }
    own |= {"schedules": config.schedules[:1], "iterations": config.iterations[:1], "epochs": (1,)}
    own |= {"max_steps": STEPS, "checkpoints_per_epoch": 1}
    if config.base == TINY:
        size = max(config.batch_sizes)
        return replace(config, **own, batch_sizes=(size,), pretrain_steps=min(PRETRAINING, config.pretrain_steps))
    return replace(
        config,
        **own,
        batch_sizes=(min(SEQUENCES, max(config.batch_sizes)),),
        rl_prompts=1,
        group_size=min(SEQUENCES, config.group_size),
        test_prompts=min(PROMPTS, config.test_prompts),
        prior_limit=min(ITEMS, config.prior_limit or ITEMS),
        max_new_tokens=TOKENS,
        train_prompts=min(64, config.train_prompts or 64),
    )


def _measured(found: Timing, clock: "_Clock", config: Config, small: Config, setup: Setup, tried: Any) -> None:
    """The seconds of one whole measurement, and of the base's side, from those of the small ones."""
    test = len(next(iter(tried.splits.values())).test)
    prompts = min(config.test_prompts, test) / min(small.test_prompts, test)
    if config.base == TINY:
        tokens = texts = items = 1.0
        found.items = tiny.SCORED * len(tiny.PRIOR_TASKS)
    else:
        tokens = _tokens(config, setup) / TOKENS
        whole = replace(setup, prior=replace(setup.prior, texts=None)).suite_of(
            config.prior, config.prior_limit, config.probes
        )
        texts = max(1.0, whole.count / tried.suite.count)
        items = 1.0
        if config.has_prior:
            found.items = _items(config, config.prior_limit, setup)
            items = found.items / _items(config, small.prior_limit, setup)
    scales = {OF_PROMPTS: prompts * tokens, OF_TEXTS: texts}
    own = {False: 0.0, True: 0.0}
    for (phase, after), seconds in clock.parts.items():
        scale = items if phase.startswith("prior task") else scales.get(phase, 1.0)
        own[after] += seconds * scale if phase not in ("pre-training", "sampling", phases.TRAINING) else 0.0
    found.seconds.reference, found.seconds.measurement = own[False], own[True]


def _trained(parameters: int, config: Config) -> int:
    """Of so many parameters those that are trained."""
    return parameters // 50 if config.lora_rank else parameters


def _tokens(config: Config, setup: Setup) -> int:
    return config.max_new_tokens or setup.task.task().form.max_new_tokens


def _items(config: Config, limit: int, setup: Setup) -> int:
    return setup.prior.tasks(config.prior, limit).count()


@dataclass
class _Clock:
    """Listens to a run: seconds of each phase, before and after training began, and of each update; its memory."""

    parts: dict[tuple[str, bool], float] = field(default_factory=dict)
    updates: list[float] = field(default_factory=list)
    loaded: int = 0  # bytes, before the first update
    last: tuple[str, float] = ("", 0.0)
    last_update: tuple[int, float] = (-1, 0.0)

    def at(self, phase: str, done: int, total: int) -> None:
        now = time.perf_counter()
        phase = "sampling" if phase.startswith("sampling for step") else phase
        before, since = self.last
        key = (before, self.last_update[0] > 0)
        self.parts[key] = self.parts.get(key, 0.0) + (now - since if since else 0.0)
        self.last = (phase, now)
        if phase == phases.TRAINING:
            step, began = self.last_update
            if done == step + 1 and step >= 0:
                self.updates.append(now - began)
            if step < 0:
                self.loaded = _memory_now()
            self.last_update = (done, now)

    def bytes_for(self, spec: RunSpec, config: Config, trained: int, micro_batch: int | None) -> int:
        """Of a process that trains runs like this one: what was there before, the updates' state, and activations,
        which grow with the sequences at a time.
        """
        fixed = self.loaded + 4 * (STATE * trained)
        real = config.rl_prompts * config.group_size if spec.params["group_size"] else max(config.batch_sizes)
        activations = max(0, _peak() - fixed)
        return int(max(_peak(), fixed + activations * min(real, micro_batch or real) / sequences_of(spec)))


@contextmanager
def _listening() -> Iterator[_Clock]:
    clock = _Clock()
    with phases.heard(clock.at, lambda sentence: None):
        yield clock
    clock.at("", 0, 0)


def _peak() -> int:
    """Bytes that this process, or the GPU, has had at most."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return peak_memory()


def _memory_now() -> int:
    if torch.cuda.is_available():
        return int(torch.cuda.memory_allocated())
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
    except OSError:  # not Linux
        return _peak()


def seconds_of(found: Timing, spec: RunSpec, cost: Cost) -> float:
    """Of one run."""
    measuring = cost.checkpoints * found.seconds.measurement
    if spec.method == BASE:
        return measuring + found.seconds.pretraining
    method, penalised = find_method(spec.method)
    update = found.seconds.update
    own = update.get(kind_of(method, penalised=penalised), max(update.values()))
    return measuring + cost.steps * own * sequences_of(spec)


def trial_of(found: Timing, config: Config, setup: Setup) -> Trial:
    """What was timed, for the runs of a config to be counted by."""
    trained = _trained(found.parameters, config)
    weights, state = 4 * found.parameters, 4 * STATE * trained
    sizes = Sizes(
        memory=found.bytes,
        record=RECORD_BYTES + ITEM_BYTES * found.items,
        weights=weights,
        base=weights if config.base == TINY else 0,
        model=4 * trained if setup.running.keep_models else 0,
        passing=0 if setup.running.save_every == 0 else 2 * state,
    )
    return Trial(partial(seconds_of, found), found.spread, sizes, found.timed, found.seconds.reference, config.threads)
