"""What a sweep would take on this machine: a few real updates and one measurement, timed, and multiplied by counts."""

import mmap
import statistics
import tempfile
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from rlrazor.experiments.language import protection, rehearsal, tiny, world
from rlrazor.experiments.language.config import TINY, Config
from rlrazor.experiments.language.demonstrations import TRIES
from rlrazor.experiments.language.evaluate import OF_PROMPTS, OF_TEXTS, OWN_TEXTS, Scored, probe_settings
from rlrazor.experiments.language.methods import (
    EWC,
    FROM_TEACHER,
    METHODS,
    OPTIMAL,
    OWN,
    Method,
    find_method,
)
from rlrazor.experiments.language.setup import Setup
from rlrazor.experiments.language.tasks import Splits
from rlrazor.experiments.language.train import train
from rlrazor.experiments.language.world import World
from rlrazor.lm import packaged, probes
from rlrazor.runs import sweep
from rlrazor.runs.dry_run import Sizes, Trial, peak_memory
from rlrazor.runs.experiment import Cost
from rlrazor.runs.method_names import KL_SUFFIX
from rlrazor.runs.records import BASE, Record, RunSpec
from rlrazor.runs.store import Keep, RunStore
from rlrazor.system import phases

STEPS, SEQUENCES, PROMPTS, ITEMS, TEXTS, TOKENS, PRETRAINING = 4, 4, 4, 4, 12, 24, 40
"""What is timed of a model that is not tiny: updates, of so many sequences; prompts, items of each prior task, texts,
tokens of a completion. Of the tiny one only the updates and those of its pre-training are fewer than a run's.
Representations cannot be compared on fewer texts."""
WITH_OLD = 2  # updates by methods that protect, which take longer
REPLAYED = 0.5  # of the examples of a trial are old ones where any are: few updates are without
RECORD_BYTES = 8000  # a record, in its run and in the table
ITEM_BYTES = 100  # what became of an item, with four log-likelihoods
STATE = 3  # an update's state in weights: the weights and AdamW's two moments
NOT_OF_THE_BASE = ("pre-training", "sampling", phases.TRAINING, rehearsal.WRITING, protection.MEASURING)
_LEAST_ERROR = 0.3  # of an estimate, as a share: machines differ so much from one minute to the next, and so do sizes


@dataclass
class Seconds:
    """`update`: of one by kind of method, per sequence of it; `among_old`: the same where old examples are among them,
    to whose length all are padded; `term`: what a protection adds to an update, whatever its sequences. `old`: of an
    old example, by the phase in which a run prepares them; `sample`: of a completion of the new task. The rest: of a
    measurement, of the base's side of it, and of a pre-training.
    """

    update: dict[tuple[str, ...], float] = field(default_factory=dict)
    among_old: dict[tuple[str, ...], float] = field(default_factory=dict)
    term: dict[str, float] = field(default_factory=dict)
    old: dict[str, float] = field(default_factory=dict)
    sample: float = 0.0
    measurement: float = 0.0
    reference: float = 0.0
    pretraining: float = 0.0


@dataclass
class Timing:
    """What a trial found. `right`: the share of the base's samples that are; `tries`: how many samples of each prompt
    there are to be, by where demonstrations come from. `spread`: of the updates' seconds, as a share. `parameters`: of
    the model. `items`: of all prior tasks. `bytes`: of a process. `timed`: in words.
    """

    seconds: Seconds = field(default_factory=Seconds)
    right: float = 1.0
    tries: Mapping[str | None, int] = field(default_factory=dict)
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
    """An update by methods of one kind takes as long, but for old examples: the same trainer, and as many models that
    look at a batch. SFT on the policy's own right samples is SFT, once they are drawn.
    """
    trainer = "sft" if method.trainer == OWN else method.trainer
    return trainer, "dpg" if method.advantage == "dpg" else "", "kl" if penalised else ""


def to_try(methods: Iterable[str], *, demonstrated: bool) -> dict[tuple[tuple[str, ...], str], str]:
    """(kind, protection) -> a method of which a few updates are timed; of each protection also one without it, first.

    SFT on own samples is timed by plain SFT or, on a task without demonstrations, by 1-0 REINFORCE, which takes longer.
    """
    plain: dict[tuple[tuple[str, ...], str], str] = {}
    protected: dict[tuple[tuple[str, ...], str], str] = {}
    for name in sorted(methods, key=lambda name: find_method(name)[0].trainer == OWN):
        method, penalised = find_method(name)
        kind = kind_of(method, penalised=penalised)
        if method.protection is not None:
            protected.setdefault((kind, method.protection), name)
        alike = "reinforce" if method.trainer == OWN and not demonstrated else "sft"
        is_one = method.protection is None and method.trainer != OWN
        plain.setdefault((kind, ""), name if is_one else alike + KL_SUFFIX * penalised)
    return plain | protected


def sequences_of(spec: RunSpec) -> int:
    """Of an update."""
    return int(spec.params["batch_size"] * (spec.params["group_size"] or 1))


def time_trial(config: Config, setup: Setup, splits: Splits) -> Timing:
    """Train and measure a little, in a folder that is removed. Raises RazorError where the sweep would."""
    found, small, data = Timing(), _small(config, _tokens(config, setup)), setup.task.fingerprint(splits)
    micro_batch = setup.running.micro_batch
    trial = replace(setup, running=replace(setup.running, save_every=0, keep_models=False, report_to="none"))
    if config.base != TINY:
        # What is tried is so few sequences that they may be no whole number of micro-batches.
        trial = replace(
            trial,
            prior=replace(trial.prior, texts=TEXTS, tokens=TOKENS),
            running=replace(trial.running, micro_batch=None),
        )
    tried = to_try(
        small.methods, demonstrated=any(item.demonstration for item in splits.train[: small.train_prompts or None])
    )
    relative: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        store = RunStore(Path(folder))
        if config.base == TINY:
            _time_pretraining(found, config, small, trial, store, data)
        for number, ((kind, protected), name) in enumerate(tried.items()):
            method, _ = find_method(name)
            spec = replace(small, max_steps=WITH_OLD if protected else STEPS).specs("trial", data, [name])[0]
            with _listening() as clock:
                *_, last = train(trial, spec, store)
            updates = clock.updates[1:] or clock.updates  # the first one warms up
            longer = _tokens(config, setup) / small.max_new_tokens if spec.params["group_size"] else 1.0
            whole = rehearsal.TEXT_TOKENS / rehearsal.tokens_of(trial) if protection.writes(trial, method) else 1.0
            update = longer * statistics.median(updates)
            _updated(found.seconds, kind, protected, update, sequences_of(spec), whole)
            _prepared(found.seconds, clock, last.record.metrics, whole)
            relative += [one / statistics.median(updates) for one in updates]
            if number == 0:
                around = next(iter(world.last_world.values()))
                _measured(found, clock, config, small, trial, around)
                _sampled(found, config, small, trial, around)
                found.parameters = sum(weight.numel() for weight in around.base.model.parameters())
                around.reference = cast(Any, _Unmeasured())  # of the others only the updates are timed
            trained = _trained(found.parameters, config)
            found.bytes = max(found.bytes, clock.bytes_for(spec, config, trained, micro_batch))
    world.last_world.clear()
    found.spread = max(_LEAST_ERROR, statistics.pstdev(relative) if len(relative) > 1 else 1.0)
    example = small.specs("trial", data, [next(iter(tried.values()))])[0]
    found.timed = (
        f"{STEPS} updates of {sequences_of(example)} sequences by {', '.join(tried.values())}, and one "
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


def _updated(
    of: Seconds, kind: tuple[str, ...], protected: str, update: float, sequences: int, whole: float = 1.0
) -> None:
    """Note how long an update of so many sequences took; old examples are `whole` times as long as those here."""
    if not protected:
        of.update[kind] = update / sequences
    elif METHODS[protected].replays:
        of.among_old[kind] = max(of.among_old.get(kind, 0.0), whole * update / sequences)
    else:
        of.term[protected] = whole * max(0.0, update - of.update[kind] * sequences)


def _prepared(of: Seconds, clock: "_Clock", metrics: Mapping[str, float], whole: float) -> None:
    """Note how long the run prepared old examples; what others of the base have written is not written again."""
    for phase in (rehearsal.WRITING, protection.MEASURING):
        if seconds := clock.parts.get((phase, False)):
            of.old[phase] = whole * seconds / metrics["old_examples"]


def _sampled(found: Timing, config: Config, small: Config, trial: Setup, around: World) -> None:
    """Draw a few samples of the new task as methods do that draw them before they train, if any does."""
    task, reference = around.tasks[trial.task.name], around.reference.asked[0]
    alike = task.correct is None
    found.tries = {OPTIMAL: TRIES * alike, FROM_TEACHER: 1}
    # Half a sample more on either side: few were drawn, and none right may be chance.
    found.right = (sum(reference.correct) + 0.5) / (len(reference.correct) + 1)
    methods = [find_method(name)[0] for name in config.methods]
    if any(method.trainer == OWN or found.tries.get(method.demonstrations) for method in methods):
        base, ids = around.base, reference.test.ids
        began = time.perf_counter()
        drawn = probes.complete(base.model, base.tokenizer, ids, probe_settings(task, SEQUENCES), "trial")
        longer = _tokens(config, trial) / small.max_new_tokens
        found.seconds.sample = longer * (time.perf_counter() - began) / len(drawn)


class _Unmeasured:
    """In place of what checkpoints are compared with."""

    def checkpoint(
        self, run_id: str, step: int, epoch: float, model: Any, metrics: Mapping[str, float], *, frozen: Any = None
    ) -> Scored:
        """A record of nothing."""
        return Scored(Record(run_id, step, epoch, 0.0, {}, {}, dict(metrics)))


def _small(config: Config, tokens: int) -> Config:
    """The same with one run of each method, short, and measured once at its end on little."""
    methods = tuple(name for name in config.methods if "distilled" not in name) or ("sft",)
    own: dict[str, Any] = {
        "methods": methods,
        "lrs": config.lrs[:1],
        "rl_lrs": config.rl_lrs[:1],
        "seeds": config.seeds[:1],
    }
    own |= {"schedules": config.schedules[:1], "iterations": config.iterations[:1], "epochs": (STEPS,)}
    own |= {
        "max_steps": STEPS,
        "checkpoints_per_epoch": 1,
        "max_new_tokens": tokens if config.base == TINY else min(TOKENS, tokens),
    }
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
        train_prompts=min(TEXTS, config.train_prompts or TEXTS),
        replay_share=REPLAYED,
    )


def _measured(found: Timing, clock: "_Clock", config: Config, small: Config, setup: Setup, tried: Any) -> None:
    """The seconds of one whole measurement, and of the base's side, from those of the small ones."""
    test = len(next(iter(tried.splits.values())).test)
    prompts = min(config.test_prompts, test) / min(small.test_prompts, test)
    tokens = _tokens(config, setup) / small.max_new_tokens
    scales = {OF_PROMPTS: prompts * tokens}
    if config.base == TINY:
        found.items = tiny.SCORED * len(tiny.PRIOR_TASKS)
    else:
        part, whole = tried.suite, tried.suite.uncut or tried.suite
        scales |= {OF_TEXTS: whole.count / part.count, OWN_TEXTS: whole.own_tokens / max(1, part.own_tokens)}
        if config.has_prior:
            items, few = (_items(config, limit, setup) for limit in (config.prior_limit, small.prior_limit))
            scales |= {f"prior task {Path(name).name},": count / few[name] for name, count in items.items()}
            found.items = sum(items.values())
    own = {False: 0.0, True: 0.0}
    for (phase, after), seconds in clock.parts.items():
        own[after] += seconds * scales.get(phase, 1.0) if phase not in NOT_OF_THE_BASE else 0.0
    found.seconds.reference, found.seconds.measurement = own[False], own[True]


def _trained(parameters: int, config: Config) -> int:
    """Of so many parameters those that are trained."""
    return parameters // 50 if config.lora_rank else parameters


def _tokens(config: Config, setup: Setup) -> int:
    return config.max_new_tokens or setup.task.task().form.max_new_tokens


def _items(config: Config, limit: int, setup: Setup) -> dict[str, int]:
    return setup.prior.tasks(config.prior, limit).counts()


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


def seconds_of(found: Timing, setup: Setup, prompts: Callable[[RunSpec], int], spec: RunSpec, cost: Cost) -> float:
    """Of one run, but for what is done once for several; `prompts`: how many of its task's it learns from."""
    of = found.seconds
    measuring = cost.checkpoints * of.measurement
    if spec.method == BASE:
        return measuring + of.pretraining
    method, penalised = find_method(spec.method)
    kind, sequences = kind_of(method, penalised=penalised), sequences_of(spec)
    each = of.update.get(kind, max(of.update.values()))
    if method.replays:
        at_a_time = min(sequences, setup.running.micro_batch or sequences)
        without = float((1 - spec.params["replay_share"]) ** at_a_time)  # the share in which there is no old example
        each = without * each + (1 - without) * of.among_old.get(kind, each)
    updating = cost.steps * (each * sequences + of.term.get(method.protection or "", 0.0))
    drawing = draws_of(found, spec, cost, prompts(spec)) * of.sample
    measured = protection.FISHER_EXAMPLES * of.old.get(protection.MEASURING, 0.0) if method.protection == EWC else 0.0
    return measuring + updating + drawing + measured


def draws_of(found: Timing, spec: RunSpec, cost: Cost, prompts: int) -> float:
    """How many completions of the new task a run draws for its updates before it begins them."""
    method, _ = find_method(spec.method)
    if method.trainer != OWN:
        return found.tries.get(method.demonstrations, 0) * prompts
    return cost.steps * sequences_of(spec) * float(min(spec.params["own_tries"], 1 / found.right))


def once_of(found: Timing, setup: Setup, prompts: Callable[[RunSpec], int], spec: RunSpec) -> Mapping[Hashable, float]:
    """The base's side of comparisons, and the old examples that a policy writes: runs from one base have the same."""
    own: dict[Hashable, float] = {spec.root.run_id: found.seconds.reference}
    if spec.method == BASE or not protection.writes(setup, method := find_method(spec.method)[0]):
        return own
    count = protection.count_of(method, spec, prompts(spec))
    start = spec.root if len(spec.chain) == 1 else spec
    return own | {(start.run_id, spec.seed, count): count * found.seconds.old.get(rehearsal.WRITING, 0.0)}


def trial_of(found: Timing, config: Config, setup: Setup, prompts: Callable[[RunSpec], int]) -> Trial:
    """What was timed, for the runs of a config to be counted by; `prompts`: how many of its task's one learns from."""
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
    return Trial(
        partial(seconds_of, found, setup, prompts),
        found.spread,
        sizes,
        found.timed,
        partial(once_of, found, setup, prompts),
        config.threads,
    )
