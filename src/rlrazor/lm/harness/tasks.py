"""lm-eval's tasks as it loads them: which number is a task's score, and whether more of it is better."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlrazor.errors import RazorError, cause_of, disk_error_in
from rlrazor.lm import hub
from rlrazor.lm.harness.asking import AS_THE_TASKS_SAY, Asking
from rlrazor.lm.harness.guest import untrained_punkt
from rlrazor.lm.scores import OWN_UNITS, Metric
from rlrazor.lm.task_names import DEFAULT_TASKS, RUNS_MODEL_CODE, unknown_task

# Of DEFAULT_TASKS, in lm-eval.
_FOLDERS = ("hellaswag", "truthfulqa", "mmlu/default", "ifeval", "winogrande", "humaneval")
_METRICS = ("acc_norm", "acc", "exact_match")  # the first of them that a task has is its score; else see `_rank`


@dataclass(frozen=True)
class Task:
    """A task or group as lm-eval loads it, and the name under which it reports the score.

    `examples`: by leaf, how many it shows as it is written; None where it does not say.
    """

    name: str
    content: Mapping[str, Any]
    examples: Mapping[str, int | None] = field(default_factory=dict)

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

    @property
    def categories(self) -> dict[str, str]:
        """Of a group's tasks, the group right below this one that each is in, or its own name; empty of a task."""
        group = self.content.get("groups", {}).get(self.name)
        found: dict[str, str] = {}
        for part in group or ():
            own = part.get_all_tasks() if hasattr(part, "get_all_tasks") else ()
            found |= {task.task_name: part.name for task in own}
        return {leaf: found.get(leaf, leaf) for leaf in self.leaves} if group else {}

    def choose(self, keys: Sequence[str]) -> str:
        """Which of lm-eval's "metric,filter" is the score."""
        return min(keys, key=lambda key: self._rank(key.split(",")[0]))

    def _rank(self, metric: str) -> tuple[bool, int, bool]:
        """Accuracies first; of others the first that is a fraction of which more is better, or else the first.

        Last what has no direction, such as numbers that a task's code returns beside what it declares.
        """
        place = _METRICS.index(metric) if metric in _METRICS else len(_METRICS)
        higher = self.directions.get(metric)
        return higher is None, place, higher is not True or OWN_UNITS.search(metric) is not None

    def no_score(self) -> RazorError:
        """The error of a group that only collects tasks."""
        return RazorError(f"{self.name} has no score of its own. Name its tasks: {', '.join(self.leaves)}.")


def set_up(task: Task, asking: Asking, examples_seed: int) -> None:
    """As many examples in a prompt as is asked for, drawn by the seed."""
    for name, leaf in task.leaves.items():
        leaf.set_config(key="num_fewshot", value=asking.examples(task.examples.get(name)))
        leaf.set_fewshot_seed(examples_seed)


def load_all(
    tasks: Sequence[str] | None, mirror: Path | None, allow_code_execution: bool, asking: Asking = AS_THE_TASKS_SAY
) -> dict[str, "Task"]:
    """The tasks of these names, by default `DEFAULT_TASKS` without those that may not run. Raises RazorError."""
    if tasks is None:
        tasks = [task for task in DEFAULT_TASKS if allow_code_execution or task != RUNS_MODEL_CODE]
    if not tasks:
        raise RazorError(f"No prior task to evaluate. Name some of lm-eval's, for example {DEFAULT_TASKS[0]}.")
    found = {name: load(name, mirror, allow_code_execution) for name in dict.fromkeys(tasks)}
    for task in found.values() if mirror else ():
        for leaf, one in task.leaves.items():
            if asking.examples(task.examples[leaf]) and not len(one.fewshot_docs()):
                raise RazorError(f"{leaf} shows examples from a split that {mirror} does not have.")
    return found


@functools.cache
def load(name: str, mirror: Path | None, allow_code_execution: bool) -> Task:
    """The task or group of a name, or of a YAML file. Raises RazorError where it cannot be scored."""
    manager = _manager(every_task=False)
    if name not in manager.all_tasks and not Path(name).is_file():
        manager = _manager(every_task=True)
        if name not in manager.all_tasks:
            raise unknown_task(name, manager.all_tasks)
    untrained_punkt()
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
    task = Task(reported, content, {leaf: one.get_config("num_fewshot") for leaf, one in leaves.items()})
    _ = task.declared  # raises
    return task


@functools.cache
def _manager(*, every_task: bool) -> Any:
    """lm-eval's index of tasks: all of them (it reads 14,000 files, 10 s) or the default ones (0.1 s)."""
    import lm_eval.tasks

    folder = Path(lm_eval.tasks.__file__).parent
    include = None if every_task else [folder / task for task in _FOLDERS]
    return lm_eval.tasks.TaskManager(include_path=include, include_defaults=every_task)
