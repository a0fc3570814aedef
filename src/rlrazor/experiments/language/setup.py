"""What the runs of a language model need besides their specs: where the base, the prompts and the prior tasks are.

Small to pickle: models and prompts are loaded in the process that trains.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rlrazor.experiments.language.config import RECIPE, TINY
from rlrazor.experiments.language.suites import PriorSuite, lm_eval_suite, tiny_suite
from rlrazor.experiments.language.tasks import Splits, Task, find_task, own_task, with_demonstrations
from rlrazor.lm.probes import read_generic
from rlrazor.lm.task_names import are_none
from rlrazor.runs.records import RunSpec
from rlrazor.system.apart.verifier import SECONDS


@dataclass(frozen=True)
class OwnPrompts:
    """A task of one's own: a file of prompts, and what verifies a completion, where their completions do not say it.

    A call of the verifier may take `seconds`. `chat`: whether prompts are put into the tokenizer's chat template, where
    it has one. `max_new_tokens`: of a completion; 0: as many as `own_task` says.
    """

    file: Path
    verifier: str | None = None
    seconds: float = SECONDS
    stop: tuple[str, ...] = ()
    chat: bool = True
    max_new_tokens: int = 0

    def task(self) -> Task:
        """The task. Raises RazorError where the verifier cannot be loaded."""
        length = {"max_new_tokens": self.max_new_tokens} if self.max_new_tokens else {}
        return own_task(self.file, self.verifier, stop=self.stop, chat=self.chat, seconds=self.seconds, **length)

    def content(self) -> list[Any]:
        """What decides its scores besides the prompts."""
        file = Path((self.verifier or "").rpartition(":")[0])
        code = file.read_text(encoding="utf-8", errors="surrogateescape") if file.is_file() else self.verifier
        length = [self.max_new_tokens] if self.max_new_tokens else []
        return [code, self.stop, *([] if self.chat else ["plain"]), *length]


@dataclass(frozen=True)
class TaskSource:
    """Where the new task comes from; small to pickle. `own`: prompts of one's own, under that name.

    `generic` is a file of text or prompts that stand for what must not change, in place of the built-in probe.
    """

    name: str
    data: Path | None = None
    demonstrations: Path | None = None
    generic: Path | None = None
    own: OwnPrompts | None = None

    def task(self) -> Task:
        """The task; raises RazorError where there is none of that name."""
        return find_task(self.name) if self.own is None else self.own.task()

    def load(self) -> Splits:
        """Its prompts, with the demonstrations of the file where there is one."""
        splits = self.task().load(self.data)
        if self.demonstrations is None:
            return splits
        return replace(splits, train=with_demonstrations(splits.train, self.demonstrations))

    def fingerprint(self, splits: Splits) -> str:
        """A content hash of the prompts and all that comes with them, a verifier of one's own included: 16 digits."""
        items = [[asdict(item) for item in side] for side in (splits.train, splits.test)]
        content = json.dumps([items, *([None, []] if self.own is None else self.own.content())], default=str)
        if self.generic is not None:
            content += read_generic(self.generic).content_hash
        return hashlib.sha256(content.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class PriorSource:
    """Where prior tasks come from. `texts`: of the generic probe and the like, at most: for a trial that is timed."""

    data_mirror: Path | None = None
    allow_code_execution: bool = False
    texts: int | None = None


@dataclass(frozen=True)
class Running:
    """How to train, none of which changes a result.

    `micro_batch` (sequences at a time), `save_every` (steps between states that an interrupted run resumes from; None:
    at each checkpoint, 0: none), `keep_models` (each run's final policy goes into OUT/models).
    """

    micro_batch: int | None = None
    save_every: int | None = None
    keep_models: bool = False
    report_to: str = "none"


@dataclass(frozen=True)
class Setup:
    """All of it. `base`: "tiny", a hub id, a folder or a GGUF file. `further`: tasks that come after, in a sequence."""

    base: str
    task: TaskSource
    prior: PriorSource = field(default_factory=PriorSource)
    running: Running = field(default_factory=Running)
    further: tuple[TaskSource, ...] = ()

    @property
    def sources(self) -> tuple[TaskSource, ...]:
        """All tasks."""
        return (self.task, *self.further)

    @cached_property
    def fingerprint(self) -> str:
        """What stands for the base in a run's id: a hash of its content; `tiny` is decided by recipe and seed."""
        if self.base == TINY:
            return f"{TINY} {RECIPE}"
        from rlrazor.lm.models import load

        return load(self.base).fingerprint[:16]

    def suite(self, spec: RunSpec) -> PriorSuite:
        """What the base could do before, as this run measures it."""
        measured = spec.settings["measured"]
        return self.suite_of(measured["prior"], measured["prior_limit"])

    def suite_of(self, tasks: Sequence[str], limit: int) -> PriorSuite:
        """The same of these prior tasks, with so many items of each, 0 for all."""
        generic = None if self.task.generic is None else read_generic(self.task.generic)
        if self.base == TINY:
            return tiny_suite(generic).without_scores() if are_none(tasks) else tiny_suite(generic)
        suite = lm_eval_suite(
            tasks,
            limit=limit or None,
            data_mirror=self.prior.data_mirror,
            allow_code_execution=self.prior.allow_code_execution,
            generic=generic,
        )
        suite = suite.without_scores() if are_none(tasks) else suite
        return suite if self.prior.texts is None else suite.cut(self.prior.texts)
