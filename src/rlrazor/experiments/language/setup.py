"""What the runs of a language model need besides their specs: where the base, the prompts and the prior tasks are.

Small to pickle: models and prompts are loaded in the process that trains.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

from rlrazor.experiments.language import further
from rlrazor.experiments.language.config import RECIPE, TINY, Config
from rlrazor.experiments.language.old import read_old
from rlrazor.experiments.language.suites import PriorSuite, lm_eval_suite, prior_tasks, tiny_suite
from rlrazor.experiments.language.tasks import Form, OwnTask, Splits, Task, find_task, with_demonstrations
from rlrazor.lm.harness.asking import AS_THE_TASKS_SAY, Asking
from rlrazor.lm.prior import PriorTasks
from rlrazor.lm.probes import content_hash, read_generic
from rlrazor.lm.task_names import PARAGRAPHS, PRIOR, are_none
from rlrazor.runs.records import RunSpec


@dataclass(frozen=True)
class TaskSource:
    """Where the new task comes from; small to pickle. `name`: of a built-in task, or what one's `own` is called.

    `generic` is a file of text or prompts that stand for what must not change, "self", or prior tasks, for their own
    prompts (`probed`), in place of the base's own probe, `old` one of examples of that, for methods that train on them.
    """

    name: str
    data: Path | None = None
    demonstrations: Path | None = None
    own: OwnTask | None = None
    generic: str | Path | PriorTasks | None = None
    old: Path | None = None

    def task(self) -> Task:
        """The task; raises RazorError where there is none of that name."""
        if self.own is None:
            return find_task(self.name)
        return replace(self.own.task(), name=self.name, title=self.name)

    def load(self) -> Splits:
        """Its prompts, with the demonstrations of the file where there is one."""
        splits = self.task().load(self.data)
        if self.demonstrations is None:
            return splits
        return replace(splits, train=with_demonstrations(splits.train, self.demonstrations))

    def fingerprint(self, splits: Splits) -> str:
        """A content hash of the prompts and all that comes with them, a verifier of one's own included: 16 digits."""
        # A built-in task's code and form are this package's. In their place stands what always has: runs' ids hash it.
        code, given = (None, Form()) if self.own is None else (self.own.code(), self.own.form)
        items = [[asdict(item) for item in side] for side in (splits.train, splits.test)]
        length = given.max_new_tokens
        form = [*([] if given.chat else ["plain"]), *([] if length == Form().max_new_tokens else [length])]
        content = json.dumps([items, code, given.stop, *form], default=str)
        if self.generic is not None:
            content += read_generic(self.generic).content_hash
        if self.old is not None:
            content += content_hash([asdict(one) for one in read_old(self.old)])
        return hashlib.sha256(content.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class PriorSource:
    """Where prior tasks come from.

    For a trial that is timed, `texts`: of the generic probe and the like, at most; `tokens`: of those that the base
    writes.
    """

    data_mirror: Path | None = None
    allow_code_execution: bool = False
    texts: int | None = None
    tokens: int | None = None

    def tasks(self, names: Sequence[str], limit: int, asking: Asking = AS_THE_TASKS_SAY) -> PriorTasks:
        """These, with so many items of each, 0 for all."""
        return prior_tasks(names, limit, self.data_mirror, self.allow_code_execution, asking)


def probed(source: TaskSource, config: Config, prior: PriorSource) -> TaskSource:
    """The source with what "prior" and "paragraphs" stand for as its generic probe: these prior tasks, the base's own.

    That of a base, None, is the paragraphs; of the tiny one it is its prior tasks' prompts, as it knows no words.
    """
    if source.generic == PARAGRAPHS or (source.generic == PRIOR and config.base == TINY):
        return replace(source, generic=None)
    if source.generic == PRIOR:
        return replace(source, generic=prior.tasks(config.prior, config.prior_limit, config.asking))
    return source


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
        asking = Asking(**measured.get("asked", {}))
        return self.suite_of(measured["prior"], measured["prior_limit"], measured.get("probes", ()), asking)

    def suite_of(
        self, tasks: Sequence[str], limit: int, probes: Sequence[str] = (), asking: Asking = AS_THE_TASKS_SAY
    ) -> PriorSuite:
        """The same of these prior tasks, with so many items of each, 0 for all, and these further probes."""
        generic = None if self.task.generic is None else read_generic(self.task.generic)
        if self.base == TINY:
            suite = replace(tiny_suite(generic), further=further.of_tiny(probes))
            return suite.without_scores() if are_none(tasks) else suite
        named = self.prior.tasks(tasks, limit, asking)
        suite = replace(lm_eval_suite(named, generic), further=further.of_models(probes, named))
        suite = suite.without_scores() if are_none(tasks) else suite
        return suite if self.prior.texts is None else suite.cut(self.prior.texts, self.prior.tokens)
