"""Prior tasks: what a model could do before it was fine-tuned, scored by lm-evaluation-harness.

RL's Razor measures forgetting as the drop of the mean score over HellaSwag, TruthfulQA, MMLU, IFEval, WinoGrande and
HumanEval. Prompts, scoring functions and metrics are lm-eval's own, with its defaults: no examples in the prompt, no
chat template, greedy generation. In a chat template, and after other numbers of examples, items are asked as
`harness.asking` says, and a score's version with it.

Whether more of a score is better, the task says (`higher_is_better`): of a Brier score or a perplexity less is. A task
that does not say is refused. Scores are fractions of 1 or, as a perplexity, in a unit of their own.

The rows come from the hub or, without a network, from a mirror (`harness.mirror`). Two other things that lm-eval would
fetch are replaced. The metric of its code tasks is a program that `evaluate` downloads and runs; `harness.programs`
scores instead. The sentence splitter of IFEval is NLTK's `punkt_tab`, which would be downloaded unasked; where it is
missing, sentences are split by a Punkt that knows no abbreviations, and a note says so. It affects how IFEval counts
sentences (after "Dr.") and, less, words.
"""

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlrazor import bounds
from rlrazor.errors import RazorError
from rlrazor.lm import compute
from rlrazor.lm.harness.answers import robust_of
from rlrazor.lm.harness.asking import AS_THE_TASKS_SAY, TRIED, Asking
from rlrazor.lm.harness.demonstrations import Demonstration, spread
from rlrazor.lm.harness.guest import as_guest, evaluating, untrained_punkt
from rlrazor.lm.harness.prompts import TaskPrompts, prompts_of
from rlrazor.lm.harness.questions import item_name, questions, scored_count
from rlrazor.lm.harness.tasks import Task, load_all, set_up
from rlrazor.lm.kl import evenly
from rlrazor.lm.models import LanguageModel
from rlrazor.lm.scores import ItemResults, Metric, NotANumberError, PriorScores, Score
from rlrazor.lm.task_names import RUNS_MODEL_CODE, check_names
from rlrazor.system import phases

_BOOTSTRAPS = 100  # for metrics whose standard error has no closed form; none of the default tasks
_SEED = 1234  # lm-eval's
BATCH = 8  # inputs that are read together
_NO_MEMORY = "Out of memory while evaluating the prior tasks: this model needs a bigger machine."


@dataclass(frozen=True)
class PriorTasks:
    """Tasks of lm-eval, by name or as the path of a task's YAML file.

    `tasks` is by default `DEFAULT_TASKS`, less HumanEval unless `allow_code_execution`: it runs programs that the model
    wrote, in a process of their own with limits on time and memory, which is no sandbox. `limit`: of the rows of each
    task at most so many; of a group, such as MMLU, the first of each of its tasks, as many of each, and one at least.
    `data_mirror`: a folder with the tasks' data, see `harness.mirror`. The data are loaded once per process. `asking`:
    how items are put to a model.

    Raises RazorError for unknown tasks, tasks that run code without leave, a group without a score of its own, data
    that are missing or do not fit, and a metric of unknown direction: all methods do, before any model is run.
    """

    tasks: Sequence[str] | None = None
    limit: int | None = None
    data_mirror: Path | None = None
    allow_code_execution: bool = False
    asking: Asking = AS_THE_TASKS_SAY

    def metrics(self) -> dict[str, Metric]:
        """What each task is scored by. Loads the tasks and their data, which stay loaded, and runs nothing."""
        with self._loaded() as (loaded, _):
            return {name: task.declared for name, task in loaded.items()}

    def counts(self) -> dict[str, int]:
        """How many rows of each task would be scored. Loads what `metrics` loads."""
        with self._loaded() as (loaded, _):
            return {
                name: sum(
                    min(self._of_each(task) or len(leaf.eval_docs), len(leaf.eval_docs))
                    for leaf in task.leaves.values()
                )
                for name, task in loaded.items()
            }

    def shows_examples(self) -> bool:
        """Whether any task puts examples into its prompts that are drawn by a seed. Loads what `metrics` loads."""
        with self._loaded() as (loaded, _):
            return any(self.asking.examples(own) for task in loaded.values() for own in task.examples.values())

    def prompts(self, count: int) -> TaskPrompts:
        """So many of their prompts at most, of rows that are not scored where there are any.

        Loads what `metrics` loads. Raises RazorError where the tasks have no prompts.
        """
        with self._loaded() as (loaded, _):
            return prompts_of(loaded, self._limits(loaded), count, _SEED, self.asking)

    def demonstrations(self, count: int, seed: int) -> dict[str, list[Demonstration]]:
        """By task: prompts with right answers, so many in all, that are not scored. Loads what `metrics` loads."""
        with self._loaded() as (loaded, _):
            for task in loaded.values():
                set_up(task, self.asking, _SEED)
            with evaluating("the prior tasks"):
                return spread(loaded, self._limits(loaded), count, seed, self.asking)

    def scores(
        self,
        lm: LanguageModel,
        told: Callable[[str], None] = lambda task: None,
        *,
        batch: int = BATCH,
        examples_seed: int = _SEED,
    ) -> PriorScores:
        """Of a model; `told` hears of each task as it begins. So many inputs are read together.

        The global random states and the model's train/eval mode are as before afterwards; a score does not depend on
        them, nor on the other tasks. With the same rows, scores are reproducible. Raises RazorError for a score that is
        no number, whatever a task's own code raises, and running out of memory.
        """
        bounds.check_number("limit", self.limit)
        if self.limit is not None and self.limit < 1:
            raise RazorError(f"The limit is {self.limit}: evaluate at least 1 row of each task.")
        was_training, pad_token = lm.model.training, lm.tokenizer.pad_token
        # All are loaded before the first is run: what is missing shows at once, not after an hour.
        with self._loaded() as (loaded, warnings):
            self.asking.check(lm.tokenizer)
            from rlrazor.lm.harness.reader import Reader  # lm-eval's models take seconds to import

            template = (
                {"chat_template_args": dict(self.asking.chat_template_kwargs)} if self.asking.chat_template else {}
            )
            try:
                with compute.memory_errors(_NO_MEMORY):
                    with evaluating("the prior tasks"):
                        harness = Reader(pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=batch, **template)
                    scores = {}
                    for number, (name, task) in enumerate(loaded.items(), 1):
                        told(f"{Path(name).name} ({number} of {len(loaded)})")
                        phases.at(f"prior task {Path(name).name},", number, len(loaded))
                        scores[name] = self._run(task, harness, examples_seed)
            finally:
                lm.model.train(was_training)  # lm-eval leaves it in eval mode,
                if lm.tokenizer.pad_token != pad_token:
                    lm.tokenizer.pad_token = pad_token  # and gives a tokenizer without one a padding token
        return PriorScores(scores, self._notes(loaded, warnings))

    def _run(self, task: Task, lm: Any, examples_seed: int) -> Score:
        """Score one task. Not by `simple_evaluate`, which also collects a report on the machine, in seconds a call."""
        import lm_eval

        # The same for a task whatever ran before it.
        random.seed(_SEED)
        np.random.seed(_SEED)
        torch.manual_seed(_SEED)
        self._try_template(task, lm.tokenizer, examples_seed)
        set_up(task, self.asking, examples_seed)
        for name, leaf in task.leaves.items():
            generated = (leaf.get_config("generation_kwargs") or {}).get("max_gen_toks", 0)
            if leaf.OUTPUT_TYPE == "generate_until" and generated >= lm.max_length:
                raise RazorError(
                    f"{name} generates up to {generated} tokens, more than the model's context of {lm.max_length}: "
                    "leave it out."
                )
        with evaluating(task.name):
            results = lm_eval.evaluate(
                lm,
                task.content,
                limit=self._of_each(task),
                bootstrap_iters=_BOOTSTRAPS,
                log_samples=True,
                confirm_run_unsafe_code=True,  # `tasks.load` has asked
                **self.asking.of_lm_eval,
            )
        return _score(task, results, self.asking)

    def _try_template(self, task: Task, tokenizer: Any, examples_seed: int) -> None:
        """On some items of each part of a task, before lm-eval uses the chat template on all."""
        if not self.asking.chat_template:
            return
        set_up(task, self.asking, examples_seed)
        conversations: list[Any] = []
        with evaluating(task.name):
            for leaf in task.leaves.values():
                count = scored_count(leaf, self._of_each(task))
                docs, examples = leaf.eval_docs, leaf.get_config("num_fewshot") or 0
                for at in evenly(count, min(count, TRIED)) if leaf.OUTPUT_TYPE != "loglikelihood_rolling" else ():
                    asked = self.asking.requests(leaf, docs[at], examples)
                    conversations += [one.arguments[0] for one in asked if isinstance(one.arguments[0], list)]
        self.asking.check(tokenizer, conversations)

    @contextmanager
    def _loaded(self) -> Iterator[tuple[dict[str, Task], list[str]]]:
        """The tasks by name, and what lm-eval warns of within this block."""
        check_names(self.tasks or ())
        with as_guest(self.data_mirror) as (mirror, warnings):
            yield load_all(self.tasks, mirror, self.allow_code_execution, self.asking), warnings

    def _of_each(self, task: Task) -> int | None:
        """Of each of a group's tasks, or of a task itself, so many rows; None for all."""
        return None if self.limit is None else max(1, self.limit // len(task.leaves))

    def _limits(self, loaded: Mapping[str, Task]) -> dict[str, int | None]:
        return {name: self._of_each(task) for name, task in loaded.items()}

    def _notes(self, loaded: Mapping[str, Task], warnings: Sequence[str]) -> list[str]:
        """What a reader of the scores has to know."""
        notes = []
        if self.tasks is None and not self.allow_code_execution:
            notes.append(f"{RUNS_MODEL_CODE} is left out: it runs code that the model wrote (--allow-code-execution).")
        if cut := sum("runcat" in warning for warning in warnings):  # "Truncating ...", "Left truncation applied"
            notes.append(f"{cut} inputs were longer than the model's context and were cut at the front.")
        if refused := sum("removing the system role" in warning for warning in warnings):
            notes.append(
                f"{refused} questions were asked without what their task says as a system's turn, which the chat "
                "template refuses; lm-eval leaves it out."
            )
        asked = [own for task in loaded.values() for own in task.examples.values()]
        if self.asking.fewshot and (none := sum(own == 0 for own in asked)):
            notes.append(
                f"{none} of the {len(asked)} tasks show no examples, as they say themselves: lm-eval leaves them so, "
                "whatever number is asked for (--fewshot)."
            )
        if untrained_punkt() and any("ifeval" in leaf for task in loaded.values() for leaf in task.leaves):
            notes.append(
                "ifeval split sentences without knowing abbreviations: NLTK's punkt_tab is not on this machine "
                "(python -m nltk.downloader punkt_tab)."
            )
        return notes


def _score(task: Task, results: Mapping[str, Any], asking: Asking) -> Score:
    """Read the one number that stands for a task out of lm-eval's results."""
    of_task = results["results"][task.name]
    keys = [key for key in of_task if "," in key and "_stderr," not in key]  # "acc_norm,none": metric, filter
    if not keys:
        raise task.no_score()
    key = task.choose(keys)
    name, filtered = key.split(",", 1)
    value, stderr = of_task[key], of_task.get(f"{name}_stderr,{filtered}")
    if not isinstance(value, Real) or not math.isfinite(value):
        raise NotANumberError(
            f"{task.name} scored {value} ({name}), which is no number: either the metric is not defined on these rows, "
            "or the model's outputs are not numbers any more."
        )
    return Score(
        value=float(value),
        stderr=float(stderr) if isinstance(stderr, float) and math.isfinite(stderr) else None,  # else "N/A"
        n=int(of_task["sample_len"]),
        metric=name,
        version=asking.of_version(str(results["versions"].get(task.name))),
        higher_is_better=task.metric(name).higher_is_better,
        items=_items(task, results["samples"], name, filtered, float(value)),
    )


def _items(task: Task, samples: Mapping[str, Any], metric: str, filtered: str, value: float) -> ItemResults:
    """Empty unless the score is the mean of their outcomes."""
    by_size = task.weighs_by_size(metric)
    outcomes = _outcomes(task, samples, metric, filtered, by_size, value)
    if not outcomes:
        return ItemResults()
    return ItemResults(
        outcomes=outcomes,
        by_size=by_size,
        questions=questions(task, samples, metric, filtered),
        categories=task.categories,
        robust=robust_of(task, samples, metric, filtered),
    )


def _outcomes(
    task: Task, samples: Mapping[str, Any], metric: str, filtered: str, by_size: bool, value: float
) -> dict[str, dict[str, float]]:
    """As `ItemResults.outcomes`."""
    from lm_eval.api.metrics import mean

    found: dict[str, dict[str, float]] = {}
    for name, leaf in task.leaves.items():
        rows = [row for row in samples.get(name, ()) if row["filter"] == filtered and metric in row]
        outcomes = [row[metric] for row in rows]
        # What has no aggregation lm-eval takes the mean of.
        if leaf.aggregation().get(metric, mean) is not mean or not all(isinstance(one, Real) for one in outcomes):
            return {}
        if rows:
            found[name] = dict(zip(map(item_name, rows), map(float, outcomes), strict=True))
    if not found:
        return {}
    means = [math.fsum(of.values()) / len(of) for of in found.values()]
    weights = [len(of) if by_size else 1 for of in found.values()]
    return found if math.isclose(np.average(means, weights=weights), value, rel_tol=1e-6, abs_tol=1e-9) else {}
