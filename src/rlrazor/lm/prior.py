"""Prior tasks: what a model could do before it was fine-tuned, scored by lm-evaluation-harness.

RL's Razor measures forgetting as the drop of the mean score over HellaSwag, TruthfulQA, MMLU, IFEval, WinoGrande and
HumanEval. Prompts, scoring functions and metrics are lm-eval's own, with its defaults: no examples in the prompt, no
chat template, greedy generation. Left out: few-shot numbers other than a task's own, so that a score is named by the
task and its version alone.

Whether more of a score is better, the task says (`higher_is_better`): of a Brier score or a perplexity less is. A task
that does not say is refused. Scores are fractions of 1 or, as a perplexity, in a unit of their own.

The rows come from the hub or, without a network, from a mirror: a folder of JSON Lines files in the hub's schemas (see
`MIRRORED`). Two other things that lm-eval would fetch are replaced. The metric of its code tasks is a program that
`evaluate` downloads and runs; `_CodeEval` scores instead. The sentence splitter of IFEval is NLTK's `punkt_tab`, which
would be downloaded unasked; where it is missing, sentences are split by a Punkt that knows no abbreviations, and a note
says so. It affects how IFEval counts sentences (after "Dr.") and, less, words.
"""

import atexit
import functools
import io
import logging
import math
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlrazor import bounds
from rlrazor.errors import RazorError, cause_of, disk_error_in
from rlrazor.extras import needs_extra
from rlrazor.lm import compute, hub
from rlrazor.lm.mirror_rows import MIRROR_ROWS
from rlrazor.lm.task_names import DEFAULT_TASKS as DEFAULT_TASKS
from rlrazor.lm.task_names import check_names, unknown_task
from rlrazor.system import phases
from rlrazor.system.documents import checked, loads, read_text

RUNS_MODEL_CODE = "humaneval"

_FOLDERS = (
    "hellaswag",
    "truthfulqa",
    "mmlu/default",
    "ifeval",
    "winogrande",
    "humaneval",
)  # of DEFAULT_TASKS, in lm-eval
_METRICS = ("acc_norm", "acc", "exact_match")  # the first of them that a task has is its score; else see `_rank`
# Metrics whose values may lie between 0 and 1 and are no fractions, whichever way is better: BLEU goes to 100.
_OWN_UNITS = re.compile(
    r"perplexity|bits_per|likelihood|log_?prob|(^|_)(ppl|nll|loss)(_|$)|brier|bleu(?!.*_acc)|chrf|^ter$|^mcc$|_diff$|"
    r"entropy|corr(elation)?$|(^|_)(pearson|spearman|kendall)|(^|_)r2$|latency|seconds|tokens|length"
)
# Of those of which less is better the few that are: squared errors, distances and divergences have a unit of their own.
_LESS_AND_FRACTIONS = re.compile(r"(^|_)(rate|ratio|share|fraction|error|err|[wc]er)$|^pct_")

SECONDS_PER_PROGRAM = 3.0  # as in the original HumanEval
_MEMORY_PER_PROGRAM = 4 << 30  # bytes
_BOOTSTRAPS = 100  # for metrics whose standard error has no closed form; none of the default tasks
_SEED = 1234  # lm-eval's


@dataclass(frozen=True)
class Metric:
    """What a task is scored by, and whether more of it is better, as lm-eval declares them."""

    metric: str
    higher_is_better: bool

    @property
    def is_fraction(self) -> bool:
        """Whether scores are fractions of 1, as far as the name tells: of one that is not known here, they may be."""
        known = self.higher_is_better or _LESS_AND_FRACTIONS.search(self.metric) is not None
        return known and _OWN_UNITS.search(self.metric) is None


@dataclass(frozen=True)
class Score:
    """A task's score and its standard error over the `n` items, None where it cannot be estimated.

    Both are fractions of 1 where `is_fraction`, else in the metric's own unit. `items`: task -> item -> its outcome, of
    a group's tasks or of the task itself, the same item having the same name whichever model is scored; empty where
    the score is no mean of outcomes, as perplexity and BLEU are none. `by_size`: each item of a group counts the same,
    as lm-eval has it, or else each of its tasks.
    """

    value: float
    stderr: float | None
    n: int
    metric: str
    version: str
    higher_is_better: bool = True
    items: Mapping[str, Mapping[str, float]] = field(default_factory=dict, repr=False)
    by_size: bool = True

    @property
    def is_fraction(self) -> bool:
        """Whether it is a fraction of 1, as accuracies are."""
        return 0 <= self.value <= 1 and Metric(self.metric, self.higher_is_better).is_fraction


class NotANumberError(RazorError):
    """A task's score is NaN or infinite: its own fault, or that of a model whose outputs are."""


class PriorScores(dict[str, Score]):
    """Task -> Score, and what a reader of the scores has to know about them (`notes`, sentences)."""

    def __init__(self, scores: Mapping[str, Score], notes: Sequence[str] = ()) -> None:
        super().__init__(scores)
        self.notes = tuple(notes)

    @property
    def mean(self) -> float:
        """The prior score: the mean over tasks, a fraction of 1 where all are (`require_accuracies`)."""
        return sum(score.value for score in self.values()) / len(self)

    @property
    def stderr(self) -> float | None:
        """Standard error of the mean, the tasks' items being different ones; None where a task has none."""
        return stderr_of_mean(score.stderr for score in self.values())


def stderr_of_mean(errors: Iterable[float | None]) -> float | None:
    """Standard error of a mean of independent scores by theirs; None, for unknown, where one of them has none."""
    found = list(errors)
    known = [error for error in found if error is not None]
    return math.hypot(*known) / len(known) if known and len(known) == len(found) else None


@dataclass(frozen=True)
class Mirror:
    """How a hub data set is mirrored: the file `{stem}_{split}.jsonl` with at least `columns` in every row.

    `split` is the one that is evaluated. `examples` is the one that few-shot examples come from, needed by few-shot
    variants of a task only.
    """

    stem: str
    split: str
    columns: tuple[str, ...]
    examples: str | None = None


MIRRORED = {
    "Rowan/hellaswag": Mirror(
        "hellaswag", "validation", ("activity_label", "ctx_a", "ctx_b", "endings", "label"), "train"
    ),
    "truthfulqa/truthful_qa": Mirror("truthfulqa_mc", "validation", ("question", "mc1_targets", "mc2_targets")),
    "cais/mmlu": Mirror("mmlu", "test", ("question", "subject", "choices", "answer"), "dev"),
    "google/IFEval": Mirror("ifeval", "train", ("key", "prompt", "instruction_id_list", "kwargs")),
    "allenai/winogrande": Mirror("winogrande", "validation", ("sentence", "option1", "option2", "answer"), "train"),
    "openai/openai_humaneval": Mirror("humaneval", "test", ("task_id", "prompt", "entry_point", "test")),
}


def evaluate(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str] | None = None,
    *,
    limit: int | None = None,
    batch_size: int = 8,
    data_mirror: Path | None = None,
    allow_code_execution: bool = False,
    told: Callable[[str], None] = lambda task: None,
) -> PriorScores:
    """Score a causal LM on lm-eval tasks, by name or as the path of a task's YAML file.

    `tasks` is by default `DEFAULT_TASKS`, less HumanEval unless `allow_code_execution`: it runs programs that the model
    wrote, in a process of their own with limits on time and memory, which is no sandbox. `limit` evaluates the first n
    rows of each task (of each of MMLU's 57 subjects). The tasks' data are loaded once per process. The global random
    states and the model's train/eval mode are as before afterwards; a score does not depend on them, nor on the other
    tasks. With the same rows, scores are reproducible. `told` hears of each task as it begins.

    Raises RazorError for unknown tasks, tasks that run code without leave, a group without a score of its own, data
    that are missing or do not fit, a metric of unknown direction, a score that is no number, whatever a task's own code
    raises, and running out of memory.
    """
    bounds.require_number("limit", limit)
    if limit is not None and limit < 1:
        raise RazorError(f"The limit is {limit}: evaluate at least 1 row of each task.")
    notes = []
    if tasks is None and not allow_code_execution:
        notes.append(f"{RUNS_MODEL_CODE} is left out: it runs code that the model wrote (--allow-code-execution).")
    check_names(tasks or ())
    was_training, pad_token = model.training, tokenizer.pad_token
    with _as_guest(data_mirror) as (mirror, warnings):
        from lm_eval.models.huggingface import HFLM

        # All are loaded before the first is run: what is missing shows at once, not after an hour.
        loaded = _load_all(tasks, mirror, allow_code_execution)
        remedy = f"try a batch size below {batch_size}" if batch_size > 1 else "this model needs a bigger machine"
        try:
            with compute.memory_errors(f"Out of memory while evaluating the prior tasks: {remedy}."):
                with _evaluating("the prior tasks"):
                    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
                scores = {}
                for number, (name, task) in enumerate(loaded.items(), 1):
                    told(f"{Path(name).name} ({number} of {len(loaded)})")
                    phases.at(f"prior task {Path(name).name},", number, len(loaded))
                    scores[name] = _run(task, lm, limit)
        finally:
            model.train(was_training)  # HFLM leaves it in eval mode,
            if tokenizer.pad_token != pad_token:
                tokenizer.pad_token = pad_token  # and gives a tokenizer without one a padding token
    if cut := sum("runcat" in warning for warning in warnings):  # "Truncating ...", "Left truncation applied"
        notes.append(f"{cut} inputs were longer than the model's context and were cut at the front.")
    if _untrained_punkt() and any("ifeval" in leaf for task in loaded.values() for leaf in task.leaves):
        notes.append(
            "ifeval split sentences without knowing abbreviations: NLTK's punkt_tab is not on this machine "
            "(python -m nltk.downloader punkt_tab)."
        )
    return PriorScores(scores, notes)


def metrics_of(
    tasks: Sequence[str] | None = None, *, data_mirror: Path | None = None, allow_code_execution: bool = False
) -> dict[str, Metric]:
    """What `evaluate` will score each task by. Loads the tasks and their data, which stay loaded, and runs nothing.

    Raises what `evaluate` raises before it runs a model.
    """
    check_names(tasks or ())
    with _as_guest(data_mirror) as (mirror, _):
        return {name: task.declared for name, task in _load_all(tasks, mirror, allow_code_execution).items()}


def count_items(
    tasks: Sequence[str] | None = None,
    *,
    limit: int | None = None,
    data_mirror: Path | None = None,
    allow_code_execution: bool = False,
) -> int:
    """How many rows `evaluate` would score. Loads what it loads, and raises what it raises before it runs a model."""
    with _as_guest(data_mirror) as (mirror, _):
        loaded = _load_all(tasks, mirror, allow_code_execution)
        counts = [len(leaf.eval_docs) for task in loaded.values() for leaf in task.leaves.values()]
    return sum(count if limit is None else min(limit, count) for count in counts)


def require_accuracies(found: Mapping[str, Metric] | Mapping[str, Score]) -> None:
    """Raise RazorError unless every score is a fraction of 1 of which more is better.

    Those alone can go into the mean of a record, and forgetting is the drop of that mean.
    """
    for name, one in found.items():
        if not (one.higher_is_better and one.is_fraction):
            what = "which is not a fraction of 1" if one.higher_is_better else "of which less is better"
            raise RazorError(
                f"{name} is scored by {one.metric}, {what}: forgetting is the drop of a mean of fractions of 1 of "
                "which more is better, such as accuracies. Leave the task out; `razor compare --prior` measures it "
                "beside others."
            )


@contextmanager
def _as_guest(data_mirror: Path | None) -> Iterator[tuple[Path | None, list[str]]]:
    """lm-eval kept quiet and off the net, the random states as before afterwards: the mirror, and its warnings."""
    needs_extra("eval")
    mirror = None if data_mirror is None else Path(os.path.realpath(data_mirror.expanduser()))
    if mirror is not None and not mirror.is_dir():
        raise RazorError(f"There is no folder {data_mirror} to read the prior tasks from.")
    with _quiet() as warnings, _no_downloads(mirror), compute.generators_untouched():
        yield mirror, warnings


def _load_all(tasks: Sequence[str] | None, mirror: Path | None, allow_code_execution: bool) -> dict[str, "_Task"]:
    if tasks is None:
        tasks = [task for task in DEFAULT_TASKS if allow_code_execution or task != RUNS_MODEL_CODE]
    if not tasks:
        raise RazorError(f"No prior task to evaluate. Name some of lm-eval's, for example {DEFAULT_TASKS[0]}.")
    return {name: _load(name, mirror, allow_code_execution) for name in dict.fromkeys(tasks)}


@contextmanager
def _evaluating(name: str) -> Iterator[None]:
    """Say in one sentence what lm-eval, or a task's own code, raises while it evaluates."""
    try:
        yield
    except RazorError:
        raise
    except Exception as error:
        if compute.is_out_of_memory(error):
            raise
        raise RazorError(
            f"lm-eval cannot evaluate {name} on this model: {type(error).__name__}: {cause_of(error)}"
        ) from error


@dataclass(frozen=True)
class _Task:
    """A task or group as lm-eval loads it, and the name under which it reports the score."""

    name: str
    content: Mapping[str, Any]

    @property
    def leaves(self) -> Mapping[str, Any]:
        """The tasks of a group, by name; of a task, itself."""
        tasks: Mapping[str, Any] = self.content["tasks"]
        return tasks

    @property
    def directions(self) -> dict[str, bool | None]:
        """Metric -> whether more of it is better; None where a task does not say, or the tasks disagree.

        Not out of lm-eval's results, which have none for a group of groups.
        """
        found: dict[str, bool | None] = {}
        for leaf in self.leaves.values():
            for metric, higher in leaf.higher_is_better().items():
                same = found.setdefault(metric, higher) == higher
                found[metric] = higher if same else None
        return found

    @property
    def declared(self) -> Metric:
        """The metric of its score, as far as it can be told before running."""
        group = self.content.get("groups", {}).get(self.name)
        names = [one.metric for one in group.aggregate_metric_list or ()] if group else list(self.directions)
        if not names:
            raise self.no_score()
        return self.metric(min(names, key=self._rank))

    def metric(self, name: str) -> Metric:
        """A metric with its direction; raises RazorError where lm-eval does not say it."""
        higher = self.directions.get(name)
        if not isinstance(higher, bool):
            raise RazorError(
                f"lm-eval does not say whether more {name} is better in {self.name}, or the tasks in it disagree: add "
                "higher_is_better to that metric in the task's metric_list, or name other tasks."
            )
        return Metric(name, higher)

    def weighs_by_size(self, metric: str) -> bool:
        """Whether a group's score is the mean over items, or else over its tasks; of a task it is over items."""
        group = self.content.get("groups", {}).get(self.name)
        listed = (group.aggregate_metric_list or ()) if group else ()
        return all(one.weight_by_size for one in listed if one.metric == metric)

    def choose(self, keys: Sequence[str]) -> str:
        """Which of lm-eval's "metric,filter" is the score."""
        return min(keys, key=lambda key: self._rank(key.split(",")[0]))

    def _rank(self, metric: str) -> tuple[bool, int, bool]:
        """Accuracies first; of others the first that is a fraction of which more is better, or else the first.

        Last what has no direction, such as numbers that a task's code returns beside what it declares.
        """
        place = _METRICS.index(metric) if metric in _METRICS else len(_METRICS)
        higher = self.directions.get(metric)
        return higher is None, place, higher is not True or _OWN_UNITS.search(metric) is not None

    def no_score(self) -> RazorError:
        """The error of a group that only collects tasks."""
        return RazorError(f"{self.name} has no score of its own. Name its tasks: {', '.join(self.leaves)}.")


@functools.cache
def _load(name: str, mirror: Path | None, allow_code_execution: bool) -> _Task:
    manager = _manager(every_task=False)
    if name not in manager.all_tasks and not Path(name).is_file():
        manager = _manager(every_task=True)
        if name not in manager.all_tasks:
            raise unknown_task(name, manager.all_tasks)
    _untrained_punkt()
    try:
        content = manager.load([name])
    except RazorError:
        raise
    except Exception as error:  # whatever a task's own code and data raise: it is theirs to mend, not ours
        if (disk := disk_error_in(error)) is not None:
            raise RazorError(f"The data of {name} cannot be read or kept: {cause_of(disk)}") from error
        if hub.is_unreachable(error):
            raise RazorError(
                f"The data of {name} are not on this machine and the hub cannot be reached. Try again with a "
                "connection, give a folder that mirrors them (--data-mirror), name other tasks (--prior) or, where "
                "KL to the base is enough, none (`razor finetune`, `evaluate` and `compare`: --prior none)."
            ) from error
        raise RazorError(f"lm-eval cannot build the task {name}: {type(error).__name__}: {cause_of(error)}") from error
    leaves, groups = content["tasks"], content.get("groups", {})
    unsafe = [leaf for leaf, task in leaves.items() if getattr(task, "UNSAFE_CODE", False)]
    if unsafe and not allow_code_execution:
        raise RazorError(
            f"{', '.join(unsafe)} runs code that the model wrote. Allow it (--allow-code-execution), on a machine "
            "where that can do no harm, or leave the task out."
        )
    if name in groups or name in leaves:
        reported = name
    elif len(leaves) == 1:  # a YAML file, which may be called anything
        (reported,) = leaves
    else:
        raise RazorError(f"{name} is a collection of tasks without a score of its own. Name them: {', '.join(leaves)}.")
    for leaf, task in leaves.items():
        if mirror and task.config.num_fewshot and not len(task.fewshot_docs()):
            raise RazorError(f"{leaf} shows examples from a split that {mirror} does not have.")
    task = _Task(reported, content)
    _ = task.declared  # raises
    return task


@functools.cache
def _manager(*, every_task: bool) -> Any:
    """lm-eval's index of tasks: all of them (it reads 14,000 files, 10 s) or the default ones (0.1 s)."""
    import lm_eval.tasks

    folder = Path(lm_eval.tasks.__file__).parent
    include = None if every_task else [folder / task for task in _FOLDERS]
    return lm_eval.tasks.TaskManager(include_path=include, include_defaults=every_task)


def _run(task: _Task, lm: Any, limit: int | None) -> Score:
    """Score one task. Not by `simple_evaluate`, which also collects a report on the machine, in seconds a call."""
    import lm_eval

    # The same for a task whatever ran before it.
    random.seed(_SEED)
    np.random.seed(_SEED)
    torch.manual_seed(_SEED)
    for name, leaf in task.leaves.items():
        if leaf.get_config("num_fewshot") is None:
            leaf.set_config(key="num_fewshot", value=0)
        leaf.set_fewshot_seed(_SEED)
        generated = (leaf.get_config("generation_kwargs") or {}).get("max_gen_toks", 0)
        if leaf.OUTPUT_TYPE == "generate_until" and generated >= lm.max_length:
            raise RazorError(
                f"{name} generates up to {generated} tokens, more than the model's context of {lm.max_length}: leave "
                "it out."
            )
    with _evaluating(task.name):
        results = lm_eval.evaluate(
            lm,
            task.content,
            limit=limit,
            bootstrap_iters=_BOOTSTRAPS,
            log_samples=True,
            confirm_run_unsafe_code=True,  # `_load` has asked
        )
    return _score(task, results)


def _score(task: _Task, results: Mapping[str, Any]) -> Score:
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
    by_size = task.weighs_by_size(name)
    return Score(
        value=float(value),
        stderr=float(stderr) if isinstance(stderr, float) and math.isfinite(stderr) else None,  # else "N/A"
        n=int(of_task["sample_len"]),
        metric=name,
        version=str(results["versions"].get(task.name)),
        higher_is_better=task.metric(name).higher_is_better,
        items=_items(task, results["samples"], name, filtered, by_size, float(value)),
        by_size=by_size,
    )


def _items(
    task: _Task, samples: Mapping[str, Any], metric: str, filtered: str, by_size: bool, value: float
) -> dict[str, dict[str, float]]:
    """Task -> item -> outcome, as `Score.items`; empty unless the score is their mean."""
    from lm_eval.api.metrics import mean

    found: dict[str, dict[str, float]] = {}
    for name, leaf in task.leaves.items():
        rows = [row for row in samples.get(name, ()) if row["filter"] == filtered and metric in row]
        outcomes = [row[metric] for row in rows]
        # What has no aggregation lm-eval takes the mean of.
        if leaf.aggregation().get(metric, mean) is not mean or not all(isinstance(one, Real) for one in outcomes):
            return {}
        if rows:
            names = [f"{row['doc_id']}-{row['doc_hash'][:12]}" for row in rows]  # a task may have a row twice
            found[name] = dict(zip(names, map(float, outcomes), strict=True))
    if not found:
        return {}
    means = [math.fsum(of.values()) / len(of) for of in found.values()]
    weights = [len(of) if by_size else 1 for of in found.values()]
    return found if math.isclose(np.average(means, weights=weights), value, rel_tol=1e-6, abs_tol=1e-9) else {}


# --- data, metrics and language resources without a download


@contextmanager
def _no_downloads(mirror: Path | None) -> Iterator[None]:
    """Give lm-eval the mirror's rows in place of the hub's, if there is one, and our scorer of programs in any case."""
    import datasets
    import evaluate as hf_evaluate

    original = datasets.load_dataset

    def load_dataset(path: str, name: str | None = None, **kwargs: Any) -> Any:
        if mirror is None or path in ("json", "csv", "parquet", "text"):  # a task of the user's, with files of its own
            return original(path, name, **kwargs)
        return _read_mirror(mirror, path, name)

    def load_metric(name: str) -> Any:
        if name != "code_eval":
            raise RazorError(f"The metric {name} is a program on the hub, which is not run. Choose another task.")
        return _CodeEval()

    with _replaced(datasets, "load_dataset", load_dataset), _replaced(hf_evaluate, "load", load_metric):
        yield


def _read_mirror(folder: Path, dataset: str, subset: str | None) -> dict[str, Any]:
    """Split -> Dataset. The few-shot split is empty where the mirror has no file of it."""
    from datasets import Dataset

    if dataset not in MIRRORED:
        raise RazorError(
            f"The data set {dataset} cannot be mirrored. Tasks on {', '.join(MIRRORED)} can; evaluate others without a "
            "mirror."
        )
    mirror = MIRRORED[dataset]
    rows = {mirror.split: _rows(folder / f"{mirror.stem}_{mirror.split}.jsonl", mirror.columns)}
    if mirror.examples:
        examples = folder / f"{mirror.stem}_{mirror.examples}.jsonl"
        rows[mirror.examples] = _rows(examples, mirror.columns) if examples.exists() else ()
    if dataset == "cais/mmlu":  # one file for all subjects, which on the hub are subsets
        rows = {split: tuple(row for row in of_split if row["subject"] == subset) for split, of_split in rows.items()}
        if not rows[mirror.split]:
            raise RazorError(f"{folder / 'mmlu_test.jsonl'} has no row of the subject {subset}.")
    template = Dataset.from_list(list(rows[mirror.split]))  # an empty split needs its columns
    return {
        split: Dataset.from_list(list(of_split)) if of_split else template.select([])
        for split, of_split in rows.items()
    }


@functools.lru_cache(maxsize=2)  # MMLU reads its two files once per subject
def _rows(path: Path, columns: tuple[str, ...]) -> tuple[dict[str, Any], ...]:
    schema = f"one JSON object per line with {', '.join(columns)}"
    # Not splitlines: U+0085 and U+2028, which JSON may hold, end no line.
    known = next((row for stem, row in MIRROR_ROWS.items() if path.name.startswith(f"{stem}_")), None)
    missing_file = f"The mirror needs the file {path}: {schema}."
    text = read_text(path, mend=f"the mirror needs {schema}", missing=missing_file)
    rows = []
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else (), 1):
        try:
            row = loads(line)
            missing = [column for column in columns if column not in row]
        except (ValueError, TypeError):
            missing = ["JSON"]
        if missing:
            raise RazorError(f"Line {number} of {path} has no {', '.join(missing)}. The file should be {schema}.")
        if known is not None:
            checked(known, row, f"Line {number} of {path}", mend=f"the file should be {schema}")
        rows.append(row)
    if not rows:
        raise RazorError(f"{path} is empty. It should be {schema}.")
    return tuple(rows)


@functools.cache
def _untrained_punkt() -> bool:
    """Whether NLTK's sentence splitter is missing; if so, put one without abbreviations in its place.

    Also fixes the seed of IFEval's language detector, which draws from the operating system's entropy otherwise.
    """
    import langdetect
    import nltk

    langdetect.DetectorFactory.seed = 0
    try:
        nltk.data.find("tokenizers/punkt_tab/english")
    except LookupError:
        folder = tempfile.mkdtemp(prefix="rlrazor-punkt-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        english = Path(folder) / "tokenizers" / "punkt_tab" / "english"
        english.mkdir(parents=True)
        for parameters in ("abbrev_types.txt", "collocations.tab", "ortho_context.tab", "sent_starters.txt"):
            (english / parameters).touch()
        nltk.data.path.append(folder)
        return True
    return False


class _CodeEval:
    """Stands in for the metric `code_eval` of `evaluate`: pass@k of programs, each followed by its tests."""

    def compute(
        self, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int]
    ) -> tuple[dict[str, float], None]:
        """Chance that one of k programs passes, from n of each problem: 1 - C(n - c, k) / C(n, k), arXiv:2107.03374."""
        passed = [
            (len(programs), sum(runs_clean(f"{program}\n{tests}") for program in programs))
            for tests, programs in zip(references, predictions, strict=True)
        ]
        return {
            f"pass@{draws}": sum(1 - math.comb(n - c, draws) / math.comb(n, draws) for n, c in passed) / len(passed)
            for draws in k
        }, None


# A program that ends by itself, by exit() or an exception, leaves another exit code than one that reaches its end.
_REACHED_THE_END = 113
_DRIVER = f"""
import os, sys
try:
    import resource
    for limit, most in (("AS", {_MEMORY_PER_PROGRAM}), ("CPU", {math.ceil(SECONDS_PER_PROGRAM)}), ("FSIZE", 1 << 20)):
        resource.setrlimit(getattr(resource, "RLIMIT_" + limit), (most, most))
except ImportError:
    pass  # Windows
exec(compile(sys.stdin.read(), "program", "exec"), {{"__name__": "__main__"}})
os._exit({_REACHED_THE_END})
"""


def runs_clean(program: str) -> bool:
    """Run a Python program in a process and folder of its own; True if it reaches its end within the limits.

    No sandbox: it may do whatever the user may, for `SECONDS_PER_PROGRAM`.
    """
    with tempfile.TemporaryDirectory(prefix="rlrazor-program-") as folder:
        try:
            finished = subprocess.run(
                [sys.executable, "-I", "-c", _DRIVER],
                input=program.encode("utf-8", "replace"),
                cwd=folder,
                env={},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=SECONDS_PER_PROGRAM,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
    return finished.returncode == _REACHED_THE_END


# --- lm-eval as a guest


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)


@contextmanager
def _quiet() -> Iterator[list[str]]:
    """Collect lm-eval's warnings instead of printing them; bars, and what else libraries say, go nowhere."""
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # its bootstrap would start a process per core
    logger, messages = logging.getLogger("lm_eval"), list[str]()
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    propagate = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    with ExitStack() as stack:
        stack.enter_context(redirect_stderr(io.StringIO()))
        stack.enter_context(redirect_stdout(sys.stderr))  # standard output belongs to the command's result
        try:
            yield messages
        finally:
            logger.removeHandler(handler)
            logger.propagate = propagate
