"""`ForgettingMonitor`: KL to the base while training, and how much of the prior tasks it says is gone.

    trainer = SFTTrainer(..., callbacks=[ForgettingMonitor("prompts.jsonl", law="law.json", budget=0.02)])

For `transformers.Trainer` and whatever is built on it, TRL's trainers among them; full fine-tuning or PEFT; one process
or many, under DistributedDataParallel, FSDP or DeepSpeed's ZeRO. The base's side is computed when the trainer has been
made, or has sharded the model: before any update, so the model that the trainer was given is the base; of a PEFT model
it is what is left without its adapter, which is checked. Models are measured in one precision, that of their weights
unless `measuring` or the law say otherwise, whatever autocast training is under. Training is left as it is: generators,
modes and gradients are put back, nothing is logged through the trainer, and the loss is the same to the bit with the
monitor and without it. What fails before training is an error; what fails later ends measuring, not training.

Left out: models whose layers are split over processes (tensor and pipeline parallel), which `razor watch` measures.
"""

from __future__ import annotations

import sys
import time
import traceback
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

from rlrazor.analysis.forecast import FORWARD
from rlrazor.errors import RazorError
from rlrazor.extras import needs_extra
from rlrazor.guard import ranks
from rlrazor.guard.base_side import BaseSide, generic_of, joined, kls_of, on_the_base, shortened
from rlrazor.guard.budget import KEPT, Budget, OnBudget
from rlrazor.guard.law_file import LawFile
from rlrazor.guard.log import Log, Row, require_same, rows_until
from rlrazor.guard.log_schema import is_monitors
from rlrazor.guard.measured_on import AS_THE_LAW_SAYS, Measuring
from rlrazor.guard.outputs import LOG, KeptModel, OutputClaim, mark_checkpoint
from rlrazor.guard.overlap import cautions_of_rows
from rlrazor.guard.plan import Plan, check_every
from rlrazor.guard.reading import Reading
from rlrazor.guard.verdict import Verdict
from rlrazor.guard.waiting import SetUpProgress
from rlrazor.lm import compute, encoding, images
from rlrazor.lm.adapters import is_adapted, unwrapped
from rlrazor.lm.digests import base_digest, is_same_base
from rlrazor.lm.kl import Drift, Sequences
from rlrazor.lm.lockstep import whole_state
from rlrazor.lm.probes import Prompt, default_cache, probe_hash, read_prompts
from rlrazor.lm.sampling import NotFiniteError
from rlrazor.lm.shards import is_sharded
from rlrazor.lm.suitable import require_measurable
from rlrazor.lm.task_names import WORDS
from rlrazor.lm.undone import check_undone
from rlrazor.system import writing
from rlrazor.system.terminal import shown_on

try:
    from transformers import TrainerCallback

    from rlrazor.guard import trackers
    from rlrazor.guard.placing import is_placed_later, require_data_parallel
    from rlrazor.guard.schedule import Schedule
except ImportError:
    needs_extra("guard")
    raise

T = TypeVar("T")


class ForgettingMonitor(TrainerCallback):  # type: ignore[misc]
    """Measure KL to the base every `every` steps, forecast the drop of the prior score, and act on a budget.

    `prompts`: the new task's, held out from training: a file (`probes.read_prompts`) or a list of texts or
    conversations. `law`: what `razor calibrate` wrote; without one there is KL and no forecast. `budget`: the largest
    drop of the prior score to accept, a fraction of 1; beyond it, `on_budget` is to `warn`, to `stop` training, or to
    `keep` the last model within it in OUTPUT_DIR/within-budget. It is the forecast that counts, with `cautious` the
    upper end of its interval; at a KL beyond those that the law was fitted to nothing is within, and with `cautious`
    all is over. A law that may not judge watches no budget. `every`: None measures as often as costs 5 %
    of training, by counting tokens, with probes thinned if need be, and at least four times whatever it costs; the plan
    and its costs are said before the first step. `log`: the JSONL, by default OUTPUT_DIR/razor.jsonl. `measuring`: how
    it is measured, where that is not as the law says and with the trainer's tokenizer; its fields may also stand here,
    as keywords.

    Raises RazorError, when the trainer is made or as training begins, for prompts or a law that cannot be read, a law
    of another base or precision, an adapter without which the model is not the base, two monitors with one log, and
    layers split over processes. Once training has begun it raises nothing: what fails is said, and measuring ends.
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
        log: str | Path | None = None,
        measuring: Measuring = AS_THE_LAW_SAYS,
        **of_measuring: Any,
    ) -> None:
        measuring = _with(measuring, of_measuring)
        check_every(every)
        if log is not None and Path(log).is_dir():
            raise RazorError(f"log is a file, and {log} is a folder: name a file in it, such as {Path(log) / LOG}.")
        if log is not None:
            inputs = (prompts, law, None if measuring.generic in WORDS else measuring.generic)
            writing.check_apart([Path(log)], [of for of in inputs if isinstance(of, str | Path)])
        given = LawFile.load(law) if isinstance(law, str | Path) else law
        self.law = given and given.at_level(measuring.level)
        self.rule = Budget(self.law, budget, on_budget, cautious)
        read = read_prompts(Path(prompts)) if isinstance(prompts, str | Path) else list(prompts)
        # What was asked for, of which something else follows for each trainer: `on`, `tokenizer` and `schedule`.
        self.measuring, self.every = measuring, every
        self.asked = self.on = measuring.on(read, self.law)
        self.log_path = None if log is None else Path(log)
        self.readings: list[Reading] = []
        self.last_seen = 0  # the last step at which it was tried to measure
        self.base: BaseSide | None = None
        self.schedule: Schedule | None = None
        self.callbacks: Sequence[Any] = ()  # of the trainer
        self.log: Log | None = None  # of the first process, from the beginning of training on, like what follows
        self.kept: KeptModel | None = None
        self.claim: OutputClaim | None = None
        # The model that is the base, and its trainer's control, as long as there are any.
        self.looked_at: Callable[[], Any] = lambda: None
        self.trainer: Callable[[], Any] = lambda: None
        self.unreachable: set[str] = set()  # trackers
        self.processing_class: Any = None  # of the trainer, and the tokenizer that is measured with
        self.tokenizer: Any = None
        self.provenance: dict[str, str] = {}
        self.first_prompt = ""  # as it is measured
        self.is_first_row = True  # of the log, which has the prompt
        self.setup_seconds = 0.0
        self.is_off = False  # measuring has failed

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Look at the base, before any update, and before a run that resumes loads its checkpoint."""
        if model is not None and not is_placed_later(args, unwrapped(model)):
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
                    "or the trainer places the model only as it trains (FSDP, DeepSpeed, bf16_full_eval). Give it to "
                    "the trainer as callbacks=[...], or measure the checkpoints afterwards with `razor pick`."
                )
            self._prepare(args, control, model, kwargs.get("processing_class"))
        dataloader, told = kwargs.get("train_dataloader"), getattr(args, "chat_template_kwargs", None)
        ranks.together(lambda: self._say_what_is_wrong(dataloader, told))
        path = self._log_path(args)
        earlier = ranks.everywhere(lambda: self._begin_outputs(args, path, state.global_step))[0]  # of who writes them
        measured = [row for row in earlier if "error" not in row and is_monitors(row)]
        self.last_seen = measured[-1]["step"] if measured else 0
        self.callbacks = trackers.beside(self)
        assert self.schedule is not None
        schedule = self.schedule
        if schedule.plan is None and measured:
            schedule.plan = Plan.of_row(measured[-1])
        self._or_else_off(state, lambda: schedule.begin(args, state, model, dataloader))

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Time the first steps."""
        if self.schedule is not None:
            self.schedule.clock.begin(model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Measure where it is due: at every so many steps, and at the last."""
        if (schedule := self.schedule) is None:
            return
        schedule.clock.end(model)
        if schedule.plan is None and not self.is_off:
            self._or_else_off(state, schedule.decide)
        last = state.global_step >= state.max_steps or control.should_training_stop
        due = schedule.plan is not None and (last or schedule.is_due(state.global_step))
        if schedule.clock.is_ready(due=due) and not self.is_off:
            self._or_else_off(state, schedule.say_timed)
        if due:
            self._look(args, state, control, model, last=last)

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Measure where something else than the monitor ends training: trackers are still open."""
        if control.should_training_stop:
            self._look_at_the_end(args, state, control, model)

    def on_log(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """The same where that was decided after an epoch: what a trainer logs last comes before trackers close."""
        if control.should_training_stop and not getattr(args, "load_best_model_at_end", False):
            self._look_at_the_end(args, state, control, model)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say in the checkpoint whose it is: a folder may hold those of several runs."""
        if ranks.is_first() and self.claim is not None:
            step = state.global_step
            mark_checkpoint(Path(args.output_dir) / f"checkpoint-{step}", self.claim.run, step)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Close what is open; measure, where something else than the monitor ended training between measurements."""
        if self.schedule is not None:
            self.schedule.stop_counting()
        if not getattr(args, "load_best_model_at_end", False):  # by now it is an earlier model
            self._look_at_the_end(args, state, control, model)
        self.callbacks = ()

    def _look_at_the_end(self, args: Any, state: Any, control: Any, model: Any) -> None:
        if self.base is not None and model is not None and 0 < state.global_step != self.last_seen:
            self._look(args, state, control, model, last=True)

    def _look(self, args: Any, state: Any, control: Any, model: Any, *, last: bool) -> None:
        """Measure, report and act, unless measuring has failed."""
        if self.is_off:
            return
        self.last_seen = state.global_step
        assert self.schedule is not None
        side = self.schedule.last if last else self.schedule.thin
        start = time.perf_counter()
        model = unwrapped(model)
        parts = self._or_else_off(state, lambda: ranks.everywhere(lambda: self._measure(model, side), model))

        def act(parts: Sequence[Mapping[str, Drift] | str]) -> Reading | None:
            measured = [part for part in parts if not isinstance(part, str)]
            if len(measured) < len(parts):
                failed = next(part for part in parts if isinstance(part, str))
                _say(f"[razor] step {state.global_step}: {failed}; nothing was measured.")
                return None
            reading = self._reading(state, side, joined(measured), time.perf_counter() - start)
            self.readings.append(reading)
            self._report(args, reading)
            if reading.verdict is Verdict.ABOVE and self.rule.on_budget == "stop":
                control.should_training_stop = True
            return reading

        reading = parts if parts is None else self._or_else_off(state, lambda: ranks.together(lambda: act(parts)))
        if reading is not None and reading.verdict is Verdict.WITHIN and self.rule.on_budget == "keep":
            self._or_else_off(state, lambda: ranks.together(lambda: self._keep(model, reading), model))

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
        require_data_parallel(model)
        told = SetUpProgress(speaks=ranks.is_first(), draws=not getattr(args, "disable_tqdm", False))
        ranks.together(lambda: self._check_base(args, control, model, processing_class), model)
        written = ranks.everywhere(lambda: self._written(model, told), model)[0]
        ranks.together(lambda: self._read_base(model, written, told), model)
        self.setup_seconds = time.perf_counter() - start

    def _check_base(self, args: Any, control: Any, model: Any, processing_class: Any) -> None:
        """Raises RazorError for all that cannot be watched."""
        # Another trainer may have left something, where the monitor is given to two, one after the other.
        self.base = self.schedule = self.claim = None
        self.readings, self.last_seen, self.is_off = [], 0, False
        self.claim = OutputClaim.of(control, self._log_path(args), self._kept_path(args))
        self.processing_class, given = processing_class, self.measuring.tokenizer or processing_class
        tokenizer = getattr(given, "tokenizer", given)
        if tokenizer is None:
            raise RazorError(
                "ForgettingMonitor needs the tokenizer: give it, measuring=Measuring(tokenizer=...), or "
                "processing_class to the trainer."
            )
        self.tokenizer = tokenizer
        images.read_with(given)
        self.on = replace(self.asked, settings=self.asked.settings.on(model))
        self.looked_at, self.trainer = weakref.ref(model), (lambda: None) if control is None else weakref.ref(control)
        with on_the_base(model):
            require_measurable(model)
            digest = base_digest(model, self.on.settings.precision)
            check_undone(model, recognised=self.law is not None and is_same_base(digest, self.law.base.digest))
            if self.law is not None:
                self.law.check(model, tokenizer, digest)
        probe = probe_hash(self.on.settings, self.on.generic)
        self.provenance = {"base": digest, "probe": probe, "prompts_hash": self.on.prompts_hash}

    def _of_completions(self) -> dict[str, Any]:
        """Where the base's completions are kept, and under which digest."""
        return {"cache_dir": Path(self.measuring.cache_dir or default_cache()), "digest": self.provenance["base"]}

    def _written(self, model: Any, told: SetUpProgress) -> Sequences | None:
        """What the base writes itself, where that is the generic probe: the first process has it write, for all."""
        if self.on.generic.own is None or not ranks.is_first():
            return None
        with on_the_base(model), told:
            return generic_of(model, self.tokenizer, self.on, told=told, **self._of_completions())

    def _read_base(self, model: Any, written: Sequences | None, told: SetUpProgress) -> None:
        """Run the base on both probes."""
        share = (ranks.rank(), ranks.count())
        with on_the_base(model), told:
            self.base = BaseSide.of(
                model, self.tokenizer, self.on, share=share, generic=written, told=told, **self._of_completions()
            )
        self.schedule = Schedule(self.base, self.on.settings.precision, self.every, _say)
        self.first_prompt = encoding.as_read(self.tokenizer, self.base.first_prompt)

    def _say_what_is_wrong(self, dataloader: Any, told: Mapping[str, Any] | None) -> None:
        assert self.base is not None
        precision = self.on.settings.precision
        said = self.rule.cautions()
        said.append(f"the first prompt, as measured in {precision}: {shortened(self.first_prompt)!r}")
        said += [*self.on.cautions(self.base.whole), *self.base.cautions]
        if ranks.is_first():
            said += cautions_of_rows(self.on, self.tokenizer, dataloader, told)
        for sentence in said:
            _say(f"[razor] {sentence}")

    # What is left on disk

    def _log_path(self, args: Any) -> Path:
        return self.log_path or Path(args.output_dir) / LOG

    def _kept_path(self, args: Any) -> Path | None:
        return Path(args.output_dir) / KEPT if self.rule.on_budget == "keep" else None

    def _begin_outputs(self, args: Any, path: Path, step: int) -> Sequence[Row]:
        """What the run has logged before it was resumed, of who writes; raises RazorError if it was of another base.

        Or other prompts, or another probe; what `razor watch` has added is no reason not to train.
        """
        if not ranks.is_first():
            return []

        def kept(rows: Sequence[Row]) -> Sequence[Row]:
            rows = rows_until(rows, step, ("every",))
            own = [row for row in rows if is_monitors(row)]
            require_same(own, path, self.provenance, "go on with what the run began with")
            return rows

        assert self.claim is not None
        self.log = Log(path, _say)
        earlier = self.log.begin(None if step == 0 else kept)
        of_run = [row["run"] for row in sorted(earlier, key=is_monitors) if "run" in row]  # by watch where by none else
        self.claim.begin(str(of_run[-1]) if of_run else None)
        self.is_first_row = not earlier
        if (folder := self._kept_path(args)) is not None:
            self.kept = KeptModel(folder, _say)
            self.kept.begin(fresh=step == 0)
        return earlier

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
        kl, is_whole = kls_of(drifts), side is self.base
        return Reading(
            int(state.global_step),
            float(state.epoch or 0.0),
            kl,
            {name: drift.per_token.mean for name, drift in drifts.items()},
            {name: drift.n_prompts for name, drift in drifts.items()},
            is_whole,
            self.rule.judged(kl, self.on.prompts_hash if is_whole else "", side.whole[FORWARD]),
            seconds,
        )

    # Acting

    def _keep(self, model: Any, reading: Reading) -> None:
        """The first process writes it, to which the others give their parts of a sharded model."""
        weights = whole_state(model, here=ranks.is_first()) if is_sharded(model) else None
        if self.kept is not None:
            self.kept.save(model, self.processing_class, reading.as_json(), weights)

    def _report(self, args: Any, reading: Reading) -> None:
        if not ranks.is_first():
            return
        assert self.log is not None
        assert self.claim is not None
        assert self.schedule is not None
        assert self.schedule.plan is not None
        row = {"run": self.claim.run, **reading.as_json(), **self.schedule.plan.as_json(), **self.provenance}
        if self.is_first_row:
            row["first_prompt"] = self.first_prompt
        self.is_first_row = False
        if self.law is not None:
            row["law_useful"], row["law_objection"] = self.law.useful, self.law.objection()
        self.log.add(row)
        for name, error in trackers.send(args, reading.scalars(), reading.step, self.callbacks).items():
            if name not in self.unreachable:
                _say(f"[razor] {name} does not take what was measured ({error}); training goes on.")
            self.unreachable.add(name)
        kept = None if self.kept is None else self.kept.step
        _say(reading.line(self.rule.done_about(reading.verdict, kept)))


def _with(measuring: Measuring, own: Mapping[str, Any]) -> Measuring:
    """It with these of its fields. Raises TypeError for a name that is none of them, or for one that is given twice."""
    known = {field.name: field.default for field in fields(Measuring)}
    for name in own:
        if name not in known:
            raise TypeError(f"ForgettingMonitor has no argument {name!r}.")
        if getattr(measuring, name) is not known[name]:
            raise TypeError(f"ForgettingMonitor is given {name!r} twice: as it is, and in its `measuring`.")
    return replace(measuring, **own)


def _say(text: str) -> None:
    """A line above the progress bar; where it cannot be printed, that is not worth somebody's training run."""
    from tqdm.auto import tqdm

    if ranks.is_first():
        with suppress(OSError, ValueError, AttributeError):  # full; closed; none
            tqdm.write(shown_on(sys.stdout, text))
