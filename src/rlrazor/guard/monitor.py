"""`ForgettingMonitor`: KL to the base while training, and how much of the prior tasks it says is gone.

    trainer = SFTTrainer(..., callbacks=[ForgettingMonitor("prompts.jsonl", law="law.json", budget=0.02)])

For `transformers.Trainer` and whatever is built on it, TRL's trainers among them; full fine-tuning or PEFT; one process
or many under DistributedDataParallel. The base's side is computed when the trainer has been made, before any update, so
the model that the trainer was given is the base; of a PEFT model it is what is left without its adapter, which is
checked. Models are measured in one precision, that of their weights unless `settings` or the law say otherwise,
whatever autocast training is under. Training is left as it is: generators, modes and gradients are put back, nothing is
logged through the trainer, and the loss is the same to the bit with the monitor and without it. What fails before
training is an error; what fails later ends measuring, not training.

Left out: models sharded over processes (FSDP, ZeRO-3), whose parameters no process has whole.
"""

from __future__ import annotations

import sys
import time
import traceback
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from rlrazor import bounds
from rlrazor.analysis.forecast import FORWARD
from rlrazor.errors import RazorError
from rlrazor.extras import needs_extra
from rlrazor.guard import plan as planning
from rlrazor.guard import ranks, trackers
from rlrazor.guard.base_side import BaseSide, Sizes, cautions_of, joined, kls_of, shortened
from rlrazor.guard.law_file import LawFile
from rlrazor.guard.outputs import LOG, Claim, KeptModel, Log, mark_checkpoint, rows_until
from rlrazor.guard.overlap import count_overlap, template_caution
from rlrazor.guard.plan import Costs, Plan
from rlrazor.guard.reading import Reading
from rlrazor.guard.steps import StepClock, TokenCounter, tokens_of_step
from rlrazor.guard.verdict import Verdict, judge, upper_end
from rlrazor.guard.waiting import SetUpProgress
from rlrazor.lm import compute, encoding
from rlrazor.lm.adapters import is_adapted, unwrapped
from rlrazor.lm.kl import Drift
from rlrazor.lm.models import base_digest, is_digest, is_same_base
from rlrazor.lm.probes import (
    GenericText,
    ProbeSettings,
    Prompt,
    content_hash,
    default_cache,
    encode,
    probe_hash,
    read_generic,
    read_prompts,
)
from rlrazor.lm.sampling import NotFiniteError
from rlrazor.lm.suitable import require_measurable
from rlrazor.lm.undone import check_undone
from rlrazor.system import writing
from rlrazor.system.terminal import shown_on

try:
    from accelerate.state import AcceleratorState, is_initialized
    from accelerate.utils import DistributedType
    from transformers import TrainerCallback
except ImportError:
    needs_extra("guard")
    raise

T = TypeVar("T")
OnBudget = Literal["warn", "stop", "keep"]
KEPT = "within-budget"  # folder in the trainer's output folder: the last model whose forecast was within the budget
TRAINING_COST = 2.0  # forward passes that an update costs per token: its own, and one for the gradients of activations
MEASURING_COST = 2.0  # ... and a measurement: its own, the products with two heads, and batches smaller than training's
FLOAT32_COST = 8.0  # a float32 product on a GPU against the half-precision ones of training
NO_MEMORY = (
    "Out of memory while the base completes the prompts, before training: give fewer or shorter prompts, or lower "
    "max_new_tokens in `settings`."
)


class ForgettingMonitor(TrainerCallback):  # type: ignore[misc]
    """Measure KL to the base every `every` steps, forecast the drop of the prior score, and act on a budget.

    `prompts`: the new task's, held out from training: a file (`probes.read_prompts`) or a list of texts or
    conversations. `law`: what `razor calibrate` wrote; without one there is KL and no forecast. `budget`: the largest
    drop of the prior score to accept, a fraction of 1; beyond it, `on_budget` is to `warn`, to `stop` training, or to
    `keep` the last model within it in OUTPUT_DIR/within-budget. It is the forecast that counts, with `cautious` the
    upper end of its interval; at a KL beyond those that the law was fitted to nothing is within, and with `cautious`
    all is over. A law that may not judge watches no budget. `every`: None measures as often as costs 5 %
    of training, by counting tokens, with probes thinned if need be, and at least four times whatever it costs; the plan
    and its costs are said before the first step. `generic`: text that stands for what must not change, a file or
    `GenericText`; by default the law's, or else sixty built-in paragraphs. `settings`: how the base completes prompts,
    by default the law's. `level`: of the interval, by default the law's. `tokenizer`: by default the trainer's. `log`:
    the JSONL, by default OUTPUT_DIR/razor.jsonl. `cache_dir`: where the base's completions are kept, by default in the
    user's cache.

    Raises RazorError, when the trainer is made or as training begins, for prompts or a law that cannot be read, a law
    of another base or precision, an adapter without which the model is not the base, two monitors with one log, and
    models sharded over processes. Once training has begun it raises nothing: what fails is said, and measuring ends.
    """

    def __init__(
        self,
        prompts: str | Path | Sequence[Prompt],
        law: str | Path | LawFile | None = None,
        *,
        budget: float | None = None,
        on_budget: OnBudget = "warn",
        cautious: bool = False,
        every: int | None = None,
        generic: str | Path | GenericText | None = None,
        settings: ProbeSettings | None = None,
        level: float | None = None,
        tokenizer: Any = None,
        log: str | Path | None = None,
        cache_dir: Path | None = None,
    ) -> None:
        self.prompts = read_prompts(Path(prompts)) if isinstance(prompts, str | Path) else list(prompts)
        self.law = LawFile.load(law) if isinstance(law, str | Path) else law
        _check_numbers(budget, on_budget, level, every)
        if log is not None and Path(log).is_dir():
            raise RazorError(f"log is a file, and {log} is a folder: name a file in it, such as {Path(log) / LOG}.")
        if log is not None:
            writing.check_apart([Path(log)], [of for of in (prompts, law, generic) if isinstance(of, str | Path)])
        self.budget, self.on_budget, self.cautious, self.every, self.level = budget, on_budget, cautious, every, level
        self.prompts_hash = content_hash(self.prompts)
        own = read_generic(Path(generic)) if isinstance(generic, str | Path) else generic
        self.generic = self._the_laws("generic", own, GenericText.built_in)
        self.settings = self._the_laws("settings", settings, ProbeSettings)
        self.asked = every, self.settings  # what follows from them is another thing for each trainer
        self.tokenizer, self.cache_dir = tokenizer, cache_dir or default_cache()
        self.log_path = None if log is None else Path(log)
        self.readings: list[Reading] = []
        self.last_seen = 0  # the last step at which it was tried to measure
        self.base: BaseSide | None = None
        self.thin: BaseSide | None = None
        self.last: BaseSide | None = None
        self.plan: Plan | None = None if every is None else Plan(every, asked=True)
        self.sizes: Sizes | None = None
        self.costs: Costs | None = None
        self.clock = StepClock()
        self.counter: TokenCounter | None = None
        self.training_cost = 0.0
        self.callbacks: Sequence[Any] = ()  # of the trainer
        self.log: Log | None = None  # of the first process, from the beginning of training on, like what follows
        self.kept: KeptModel | None = None
        self.claim: Claim | None = None
        # The model that is the base, and its trainer's control, as long as there are any.
        self.looked_at: Callable[[], Any] = lambda: None
        self.trainer: Callable[[], Any] = lambda: None
        self.unreachable: set[str] = set()  # trackers
        self.vocabulary: Any = None
        self.provenance: dict[str, str] = {}
        self.first_prompt = ""  # as it is measured
        self.setup_seconds = 0.0
        self.is_off = False  # measuring has failed

    def _the_laws(self, name: str, given: Any, default: Any) -> Any:
        """What was given, which has to be the law's where there is one, or else the law's or the default."""
        if self.law is None:
            return default() if given is None else given
        of_law = getattr(self.law, name)
        if isinstance(given, ProbeSettings) and None in (given.precision, of_law.precision):
            of_law = replace(of_law, precision=of_law.precision or given.precision)
            given = replace(given, precision=of_law.precision)
        if given is not None and given != of_law:
            raise RazorError(
                f"The law was calibrated with another `{name}` than the one given, and KLs measured in two ways cannot "
                "be compared: leave it out, and the law's is used."
            )
        return of_law

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Look at the base, before any update, and before a run that resumes loads its checkpoint."""
        if model is not None and not _is_placed_later(args, unwrapped(model)):
            self._prepare(args, control, model, kwargs.get("processing_class"))

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Warn of what can be seen now; count the tokens of the first step."""
        # Added to a trainer that was there already, or the model was still to be placed, or is another trainer's; with
        # `model_init` it is made anew, and as training resumes no longer the base.
        resumed = state.global_step > 0 and self.trainer() is control
        if self.base is None or not (resumed or self.looked_at() is unwrapped(model)):
            if state.global_step > 0 and not is_adapted(model):
                raise RazorError(
                    "Training resumes, and the base is gone: ForgettingMonitor was added after the trainer was made, "
                    "or the trainer places the model only as it trains (DeepSpeed, bf16_full_eval). Give it to the "
                    "trainer as callbacks=[...], or measure the checkpoints afterwards with `razor pick`."
                )
            self._prepare(args, control, model, kwargs.get("processing_class"))
        if _is_sharded(args, unwrapped(model)):
            raise _sharded()
        dataloader, told = kwargs.get("train_dataloader"), getattr(args, "chat_template_kwargs", None)
        ranks.together(lambda: self._say_what_is_wrong(dataloader, told))
        path = self._log_path(args)
        earlier = ranks.together(lambda: self._earlier(path, state.global_step))
        earlier = ranks.gather(earlier)[0]  # of the first process, which writes them
        ranks.together(lambda: self._begin_outputs(args, path, earlier, fresh=state.global_step == 0))
        measured = [row for row in earlier if "error" not in row]
        self.last_seen = measured[-1]["step"] if measured else 0
        self.callbacks = trackers.beside(self)
        if self.plan is None and measured:
            self.plan = Plan.of_row(measured[-1])
        self._or_else_off(state, lambda: self._begin_plan(args, state, model, dataloader))

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Time the first steps."""
        self.clock.begin(model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> Any:
        """Measure where it is due: at every so many steps, and at the last."""
        self.clock.end(model)
        if self.plan is None and not self.is_off:
            self._or_else_off(state, lambda: self._decide(self._counted()))
        last = state.global_step >= state.max_steps or control.should_training_stop
        due = self.plan is not None and (last or state.global_step % self.plan.every == 0)
        if self.clock.is_ready(due=due) and not self.is_off:
            self._or_else_off(state, self._say_timed)
        if due:
            self._look(args, state, control, model, kwargs.get("processing_class"), last=last)
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> Any:
        """Measure where something else than the monitor ends training: trackers are still open."""
        if control.should_training_stop:
            self._look_at_the_end(args, state, control, model, kwargs.get("processing_class"))
        return control

    def on_log(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> Any:
        """The same where that was decided after an epoch: what a trainer logs last comes before trackers close."""
        if control.should_training_stop and not getattr(args, "load_best_model_at_end", False):
            self._look_at_the_end(args, state, control, model, kwargs.get("processing_class"))
        return control

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say in the checkpoint whose it is: a folder may hold those of several runs."""
        if ranks.is_first() and self.claim is not None:
            mark_checkpoint(
                Path(args.output_dir) / f"checkpoint-{state.global_step}", self.claim.run, state.global_step
            )

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Close what is open; measure, where something else than the monitor ended training between measurements."""
        if self.counter:
            self.counter.remove()
        if not getattr(args, "load_best_model_at_end", False):  # by now it is an earlier model
            self._look_at_the_end(args, state, control, model, kwargs.get("processing_class"))
        self.callbacks = ()

    def _look_at_the_end(self, args: Any, state: Any, control: Any, model: Any, processing_class: Any) -> None:
        if self.base is not None and model is not None and 0 < state.global_step != self.last_seen:
            self._look(args, state, control, model, processing_class, last=True)

    def _look(self, args: Any, state: Any, control: Any, model: Any, processing_class: Any, *, last: bool) -> None:
        """Measure, report and act, unless measuring has failed."""
        if self.is_off:
            return
        self.last_seen = state.global_step
        side = (self.last if last else self.thin) or self.base
        assert side is not None
        start = time.perf_counter()
        parts = self._or_else_off(state, lambda: ranks.everywhere(lambda: self._measure(unwrapped(model), side)))
        if parts is None:
            return

        def act() -> None:
            measured = [part for part in parts if not isinstance(part, str)]
            if len(measured) < len(parts):
                failed = next(part for part in parts if isinstance(part, str))
                _say(f"[razor] step {state.global_step}: {failed}; nothing was measured.")
                return
            reading = self._reading(state, side, joined(measured), time.perf_counter() - start)
            self.readings.append(reading)
            self._report(args, reading)
            if reading.verdict is Verdict.ABOVE and self.on_budget == "stop":
                control.should_training_stop = True
            elif reading.verdict is Verdict.WITHIN and self.kept is not None:
                self.kept.save(unwrapped(model), processing_class, reading.as_json())

        self._or_else_off(state, lambda: ranks.together(act))

    def _or_else_off(self, state: Any, work: Callable[[], T]) -> T | None:
        """Do what fails in all processes or in none; None, and no more measuring, where it fails.

        No error of ours, or of what we rely on, is worth somebody's training run.
        """
        try:
            return work()
        except Exception as error:
            self.is_off = True
            where = ""
            if self.log is not None and self.claim is not None:
                row = {"run": self.claim.run, "step": int(state.global_step), "error": traceback.format_exc()}
                with suppress(Exception):  # it may be the log that has failed
                    self.log.add(row)
                    where = f" The whole error is in {self.log.path}."
            said = str(error) if isinstance(error, RazorError) else f"{type(error).__name__}: {error}"
            _say(
                f"[razor] step {state.global_step}: measuring has failed and ends here; training goes on. "
                f"{' '.join(said.split()).removesuffix('.')}.{where}"
            )
            return None

    # The base

    def _prepare(self, args: Any, control: Any, model: Any, processing_class: Any) -> None:
        start = time.perf_counter()
        model = unwrapped(model)
        if _is_sharded(args, model):
            raise _sharded()
        ranks.together(lambda: self._look_at_base(args, control, model, processing_class))
        self.setup_seconds = time.perf_counter() - start

    def _look_at_base(self, args: Any, control: Any, model: Any, processing_class: Any) -> None:
        """Raises RazorError for all that cannot be watched."""
        self._forget()
        self.claim = Claim.of(control, self._log_path(args), self._kept_path(args))
        processing_class = self.tokenizer or processing_class
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        if tokenizer is None:
            raise RazorError("ForgettingMonitor needs the tokenizer: give it, or processing_class to the trainer.")
        self.vocabulary = tokenizer
        self.settings = self.settings.on(model)
        self.looked_at, self.trainer = weakref.ref(model), (lambda: None) if control is None else weakref.ref(control)
        try:
            with compute.generators_untouched(), compute.memory_errors(NO_MEMORY), self._progress(args) as progress:
                require_measurable(model, tokenizer)
                digest = base_digest(model, self.settings.precision)
                check_undone(model, recognised=self.law is not None and is_same_base(digest, self.law.base_digest))
                if self.law is not None:
                    self.law.check(model, tokenizer, digest)
                self.provenance = {
                    "base": digest,
                    "probe": probe_hash(self.settings, self.generic),
                    "prompts_hash": self.prompts_hash,
                }
                self.base = BaseSide.of(
                    model,
                    tokenizer,
                    self.prompts,
                    self.generic,
                    self.settings,
                    cache_dir=self.cache_dir,
                    digest=digest,
                    share=(ranks.rank(), ranks.count()),
                    told=progress,
                )
        except NotFiniteError as error:
            raise RazorError(
                "The model's outputs are NaN or infinite before training: its weights are damaged."
            ) from error
        except RazorError:
            raise
        except Exception as error:  # of a model's own code, on inputs that its trainer would not give it
            raise RazorError(
                f"ForgettingMonitor cannot measure this model, {type(model).__name__}: {type(error).__name__}: "
                f"{' '.join(str(error).split())}. Train without the monitor, and report this."
            ) from error
        self.first_prompt = encoding.as_read(tokenizer, self.base.first_prompt)

    @staticmethod
    def _progress(args: Any) -> SetUpProgress:
        return SetUpProgress(speaks=ranks.is_first(), draws=not getattr(args, "disable_tqdm", False))

    def _forget(self) -> None:
        """What another trainer has left, where the monitor was given to two, one after the other."""
        self.every, self.settings = self.asked
        self.base = self.thin = self.last = self.claim = self.sizes = self.costs = None
        self.plan = None if self.every is None else Plan(self.every, asked=True)
        self.readings, self.last_seen, self.is_off = [], 0, False

    def _say_what_is_wrong(self, dataloader: Any, told: Mapping[str, Any] | None) -> None:
        if self.law is None:
            _say(
                "[razor] uncalibrated: no law was given, so there is KL to the base and no forecast. `razor calibrate` "
                "makes a law; `razor pick --kl-budget` takes a checkpoint without one."
            )
            if self.budget is not None:
                _say("[razor] the budget is not watched: without a law, KL says nothing about scores.")
        else:
            _say(f"[razor] {self.law.describe(self.level)}")
            for caution in self.law.cautions(self.level, limit=self.budget):
                _say(f"[razor] {caution}")
            if self.budget is not None and self.law.objection(limit=self.budget) is not None:
                _say("[razor] the budget is not watched: by such a law nothing is warned of, stopped or kept.")
        assert self.base is not None
        _say(f"[razor] the first prompt, as measured in {self.settings.precision}: {shortened(self.first_prompt)!r}")
        for caution in cautions_of(self.base.whole, self.prompts, self.generic, self.settings):
            _say(f"[razor] {caution}")
        if not ranks.is_first():
            return
        try:
            forms = [encode(self.vocabulary, self.prompts, chat) for chat in {self.settings.chat, False}]
            shared = count_overlap(self.prompts, list(zip(*forms, strict=True)), dataloader)
            form = template_caution(self.prompts, self.vocabulary, self.settings, dataloader, told)
        except Exception as error:  # of a data set of the user's own
            _say(f"[razor] whether the prompts are in the training set cannot be seen: {type(error).__name__}: {error}")
            return
        if shared:
            _say(
                f"[razor] {shared} of the {len(self.prompts)} prompts are in the training set: KL on them is larger "
                "than on prompts the model has not seen. Hold prompts out."
            )
        if form is not None:
            _say(f"[razor] {form}")

    # What is left on disk

    def _log_path(self, args: Any) -> Path:
        return self.log_path or Path(args.output_dir) / LOG

    def _kept_path(self, args: Any) -> Path | None:
        return Path(args.output_dir) / KEPT if self.on_budget == "keep" else None

    def _earlier(self, path: Path, step: int) -> list[dict[str, Any]]:
        """What the run has logged before it was resumed; raises RazorError where it was measured otherwise."""
        if not ranks.is_first():
            return []
        earlier = rows_until(path, step, ("every",))
        for row in (row for row in earlier if "error" not in row):
            if not is_digest(str(row.get("base"))):
                raise RazorError(
                    f"Training resumes, and the KLs in {path} are of another version of rlrazor: move that file away."
                )
            same = {name: row.get(name) == value for name, value in self.provenance.items()}
            same["base"] = is_same_base(str(row.get("base")), self.provenance["base"])
            if not all(same.values()):
                raise RazorError(
                    f"Training resumes, and the KLs in {path} are of another base, other prompts or another probe: go "
                    "on with what the run began with, or move that file away."
                )
        return earlier

    def _begin_outputs(self, args: Any, path: Path, earlier: Sequence[Mapping[str, Any]], *, fresh: bool) -> None:
        if not ranks.is_first():
            return
        assert self.claim is not None
        self.claim.begin(str(earlier[-1]["run"]) if earlier and "run" in earlier[-1] else None)
        self.log = Log(path, _say)
        self.log.begin(earlier, fresh=fresh)
        if (folder := self._kept_path(args)) is not None:
            self.kept = KeptModel(folder, _say)
            self.kept.begin(fresh=fresh)

    # When to measure

    def _is_slower_than_training(self, args: Any, model: Any) -> bool:
        """Whether training multiplies in half precision on a GPU, and measuring does not."""
        state = AcceleratorState() if is_initialized() else None
        # `accelerate launch` sets it beside the trainer's own arguments.
        half = getattr(state, "mixed_precision", "no") != "no" or any(
            getattr(args, name, False) for name in ("bf16", "fp16")
        )
        return bool(half) and self.settings.precision == "float32" and next(model.parameters()).device.type == "cuda"

    def _begin_plan(self, args: Any, state: Any, model: Any, dataloader: Any) -> None:
        """Say the plan, which is decided now where the rows that are trained on show how many tokens they have."""
        assert self.base is not None
        self.clock = StepClock()
        weights = [(weight.numel(), weight.requires_grad) for weight in unwrapped(model).parameters()]
        trained = sum(size for size, trains in weights if trains) / sum(size for size, _ in weights)
        self.training_cost = TRAINING_COST + trained  # and one for the gradients of all weights
        if self._is_slower_than_training(args, unwrapped(model)):
            self.training_cost /= FLOAT32_COST
        base = self.base
        found = ranks.everywhere(lambda: (base.sizes, base.pace, tokens_of_step(args, dataloader)))
        self.sizes = Sizes.joined([sizes for sizes, _, _ in found])
        seen = [tokens for _, _, tokens in found]
        pace = max(pace for _, pace, _ in found)
        self.costs = Costs(int(state.max_steps), int(state.global_step), self.sizes.read, pace)
        if self.plan is not None or all(seen):
            self._decide(min(tokens or 0.0 for tokens in seen))
            return
        if not getattr(args, "torch_compile", False):
            self.counter = TokenCounter(unwrapped(model))
        _say(f"[razor] {planning.undecided(self.costs, self.sizes.described)}")

    def _counted(self) -> float:
        """Tokens of the first step, of the process that read fewest; 0 where they could not be counted."""
        return float(min(ranks.everywhere(lambda: self.counter.remove() if self.counter else 0)))

    def _decide(self, step_tokens: float) -> None:
        """Settle the plan, unless it is, and say it."""
        assert self.sizes is not None
        assert self.costs is not None
        sizes, allowed = self.sizes, self.training_cost * step_tokens
        worth = (lambda fraction: MEASURING_COST * sizes.read(fraction) / allowed) if allowed else None
        self.costs = replace(self.costs, worth=worth)
        plan = self.plan or planning.choose(self.costs.steps, worth)
        ranks.together(lambda: self._settle(plan))
        _say(f"[razor] {planning.described(plan, self.costs, sizes.described)}")

    def _settle(self, plan: Plan) -> None:
        assert self.base is not None
        self.plan, self.every = plan, plan.every
        self.thin = self.base.thinned(plan.fraction) if plan.fraction < 1 else self.base
        self.last = self.base.thinned(plan.last_fraction) if plan.last_fraction < 1 else self.base

    def _say_timed(self) -> None:
        """Once: what the plan costs by the clock."""
        assert self.costs is not None
        assert self.plan is not None
        self.costs = replace(self.costs, step_seconds=max(ranks.everywhere(self.clock.read)))
        _say(f"[razor] {planning.timed(self.plan, self.costs)}")

    # Measuring

    @staticmethod
    def _measure(policy: Any, side: BaseSide) -> Mapping[str, Drift] | str:
        """This process's part; a sentence where it cannot be done: the policy has diverged, or there is no memory."""
        with compute.generators_untouched():
            try:
                return side.measure(policy)
            except NotFiniteError:
                return "the model's outputs are no longer finite"
            except (RuntimeError, MemoryError) as error:
                if not compute.is_out_of_memory(error):
                    raise
                return "out of memory"

    def _reading(self, state: Any, side: BaseSide, drifts: Mapping[str, Drift], seconds: float) -> Reading:
        kl = kls_of(drifts)
        forecast, level, remaining = None, None, {}
        verdict: Verdict | None = None
        if self.law is not None:
            asked, measured = self.prompts_hash if side is self.base else "", side.whole[FORWARD]
            forecast = self.law.forecast(kl, self.level, prompts=asked, measured=measured)
            level = self.law.attainable(self.level)
            if self.budget is not None and self.law.objection(limit=self.budget) is None:
                remaining = self.law.remaining(
                    kl, self.budget, self.level, prompts=asked, measured=measured, cautious=self.cautious
                )
                # Who is not cautious goes by the forecast itself, as far as the law has seen.
                low, high = (forecast.low, forecast.high) if self.cautious else (forecast.drop, forecast.drop)
                high = upper_end(high, beyond=forecast.extrapolated)
                verdict = judge(forecast.drop, low, high, self.budget, cautious=self.cautious)
        return Reading(
            int(state.global_step),
            float(state.epoch or 0.0),
            kl,
            {name: drift.per_token.mean for name, drift in drifts.items()},
            {name: drift.n_prompts for name, drift in drifts.items()},
            side is self.base,
            forecast,
            level,
            self.budget,
            remaining,
            verdict,
            seconds,
        )

    # Acting

    def _report(self, args: Any, reading: Reading) -> None:
        if not ranks.is_first():
            return
        assert self.log is not None
        assert self.claim is not None
        assert self.plan is not None
        row = {"run": self.claim.run, **reading.as_json(), **self.plan.as_json(), **self.provenance}
        if not self.log.lines:
            row["first_prompt"] = self.first_prompt
        if self.law is not None:
            row["law_useful"], row["law_objection"] = self.law.useful, self.law.objection()
        self.log.add(row)
        for name, error in trackers.send(args, reading.scalars(), reading.step, self.callbacks).items():
            if name not in self.unreachable:
                _say(f"[razor] {name} does not take what was measured ({error}); training goes on.")
            self.unreachable.add(name)
        _say(reading.line(self._done_about(reading)))

    def _done_about(self, reading: Reading) -> str:
        """What follows from a forecast that is over the budget, or of which that cannot be told."""
        if reading.verdict is Verdict.UNCERTAIN:
            return "training goes on" if self.kept is None else "this model is not kept"
        if reading.verdict is not Verdict.ABOVE:
            return ""
        kept = None if self.kept is None else self.kept.step
        return {
            "warn": "training goes on",
            "stop": "training stops here",
            "keep": f"the model of step {kept}, within it, is in {KEPT}"
            if kept
            else "no measured model within it is kept",
        }[self.on_budget]


def _check_numbers(budget: float | None, on_budget: str, level: float | None, every: int | None) -> None:
    """Raise RazorError for settings that are none."""
    if on_budget not in ("warn", "stop", "keep"):
        raise RazorError(f"on_budget is 'warn', 'stop' or 'keep', not {on_budget!r}.")
    for name, value in (("budget", budget), ("level", level), ("every", every)):
        bounds.require_number(name, value)
    if budget is not None and not 0 < budget < 1:
        raise RazorError(f"budget is a fraction of 1, such as 0.02 for two points of the prior score, not {budget}.")
    if level is not None and not 0 < level < 1:
        raise RazorError(f"level is a fraction of 1, such as 0.9, not {level}.")
    if every is not None and every < 1:
        raise RazorError(f"every is a number of steps, at least 1, not {every}.")
    if every is not None:
        bounds.check_whole("every", every)


def _is_placed_later(args: Any, model: Any) -> bool:
    """Whether the trainer will move or cast the model as training begins: what is measured is what is trained."""
    device = getattr(args, "device", None)
    elsewhere = device is not None and next(model.parameters()).device.type != torch.device(device).type
    # By the trainer's own argument, or by `accelerate launch`.
    return elsewhere or any(getattr(args, name, None) for name in ("deepspeed", "deepspeed_plugin"))


def _is_sharded(args: Any, model: Any) -> bool:
    """Whether no process holds the whole model: FSDP, ZeRO-3, or distributed tensors."""
    if getattr(args, "fsdp", None) or (
        is_initialized() and AcceleratorState().distributed_type == DistributedType.FSDP
    ):
        return True
    return any(
        hasattr(parameter, "ds_id") or type(parameter.data).__name__ == "DTensor" for parameter in model.parameters()
    )


def _sharded() -> RazorError:
    return RazorError(
        "ForgettingMonitor needs every process to hold the whole model, which FSDP and ZeRO-3 do not do. Use "
        "DistributedDataParallel or ZeRO-2, or measure the checkpoints afterwards with `razor compare`."
    )


def _say(text: str) -> None:
    """A line above the progress bar; where it cannot be printed, that is not worth somebody's training run."""
    from tqdm.auto import tqdm

    if ranks.is_first():
        with suppress(OSError, ValueError, AttributeError):  # full; closed; none
            tqdm.write(shown_on(sys.stdout, text))
