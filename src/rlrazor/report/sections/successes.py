"""Success of a policy that samples its actions beside that of one that takes the likeliest, task by task; and films."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from rlrazor.analysis.lost import wilson
from rlrazor.analysis.matched import matched
from rlrazor.analysis.statistics import shared_threshold
from rlrazor.report.drawing import PALETTE, Axis, Figure, Interval, Marker, Panel, Picture, Points
from rlrazor.report.keyed import Column, Keyed, table_of
from rlrazor.report.prose import Shown, told
from rlrazor.report.study import Section, Study
from rlrazor.report.text import MATCHED, NEVER, percent, ranged
from rlrazor.runs.records import BASE

TEXT = Path(__file__).with_suffix(".md")
NAME = "successes"
BY = ("method",)
MODES = ("sampled", "greedy")
STYLES = ((PALETTE[0], "circle"), (PALETTE[1], "square"))
LEVEL = 0.95
FILMS, MISSING = "films", "missing.txt"
FILMED = ("new", "prior")


@dataclass(frozen=True)
class Share:
    """Of `n` episodes so many succeeded, with Wilson's interval. Several seeds' episodes are counted together."""

    count: float
    n: int

    @property
    def mean(self) -> float:
        """As a fraction of 1."""
        return self.count / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """Its 95 % interval."""
        return wilson(self.count, self.n, LEVEL)

    def __str__(self) -> str:
        """As tables have it."""
        return ranged(self.mean, self.interval)

    def __add__(self, other: "Share") -> "Share":
        return Share(self.count + other.count, self.n + other.n)


@dataclass(frozen=True, eq=False)
class Arm:
    """What is shown of a method, or of the base: a checkpoint per seed, of which `reached` got to the new score."""

    label: str
    rows: pl.DataFrame
    reached: int

    def share(self, mode: str, *tasks: str) -> Share:
        """Of the episodes of these tasks, `new` or a prior one, over all seeds."""
        found = Share(0.0, 0)
        for row in self.rows.to_dicts():
            for task in tasks:
                n = int(row["episodes"])
                found += Share(round(row[f"{mode}_{task}"] * n), n)
        return found


def applies(study: Study) -> bool:
    """Whether episodes were counted in both modes."""
    return {"episodes", *(f"{mode}_new" for mode in MODES)} <= set(study.table.columns)


def section(study: Study) -> Section:
    """Both modes on the new task and each prior one, where each method is reported."""
    at = shared_threshold(study.points, study.bases, BY, study.thresholds) or study.thresholds[0]
    arms, tasks = arms_of(study, at), tasks_of(study)
    names = {"new": str(study.description.get("new_task", "the new task")), **{task: task for task in tasks}}
    tables = [mean_table(arms, tasks, len(study.seeds)), *(task_table(arms, task) for task in tasks)]
    columns = min(3, len(names))
    films, about = films_of(study, arms)
    panels = [panel(arms, task, name) for task, name in names.items()]
    figure = Figure(NAME, panels, columns, pictures=films)
    numbers = {"at": f"{at:.0%}", "films": about, "matched": MATCHED}
    return told(study, TEXT, Shown(finding(arms, tasks), figure, tables, numbers))


def tasks_of(study: Study) -> list[str]:
    """The prior tasks."""
    return [name for name in study.description.get("prior_tasks", []) if f"greedy_{name}" in study.table.columns]


def arms_of(study: Study, at: float) -> dict[str, Arm]:
    """The base, and each method where it is reported at that new score; where it never gets there, at its highest."""
    columns = study.points.columns
    reported = matched(study.points, BY, at).select(columns)
    there = reported.select("method", "seed")
    rest = study.points.join(there, on=["method", "seed"], how="anti").sort("new", descending=True, maintain_order=True)
    highest = rest.unique(["method", "seed"], keep="first", maintain_order=True)
    arms = {BASE: Arm("base", study.bases, len(study.bases))}
    for method in study.methods:
        own, others = (rows.filter(method=method) for rows in (reported, highest))
        arms[method] = Arm(study.label(method), pl.concat([own, others]).sort("seed"), len(own))
    return arms


def finding(arms: Mapping[str, Arm], tasks: Sequence[str]) -> str:
    """Where the two modes differ by more than their intervals."""
    apart = []
    for arm in arms.values():
        for task in ("new", *tasks):
            one, other = (arm.share(mode, task) for mode in MODES)
            if one.interval[0] > other.interval[1] or other.interval[0] > one.interval[1]:
                name = "the new task" if task == "new" else task
                apart.append(f"{arm.label} on {name} ({percent(one.mean)} % sampled, {percent(other.mean)} % greedy)")
    if not apart:
        return "Sampled and greedy success differ nowhere by more than their intervals."
    return f"Sampled and greedy success differ by more than their intervals: {'; '.join(apart)}."


def mean_table(arms: Mapping[str, Arm], tasks: Sequence[str], seeds: int) -> Keyed:
    """`ARM.sampled-new`, `ARM.greedy-prior`, ...: success on the new task and over all prior tasks."""
    columns = [
        Column[Arm](f"{mode}-{key}", f"{key}, {mode}, %", _cell(mode, *of))
        for key, of in (("new", ("new",)), ("prior", tuple(tasks)))
        if of
        for mode in MODES
    ]

    def reached(arm: Arm) -> str:
        return NEVER if arm.label == "base" else f"{arm.reached} of {seeds}"

    columns.append(Column("seeds-there", "seeds that get there", reached))
    return table_of("Success, sampled and greedy", "method", _rows(arms), columns)


def task_table(arms: Mapping[str, Arm], task: str) -> Keyed:
    """`ARM.sampled-TASK`, `ARM.greedy-TASK`."""
    columns = [Column[Arm](f"{mode}-{task}", f"{mode}, %", _cell(mode, task)) for mode in MODES]
    return table_of(task, "method", _rows(arms), columns)


def panel(arms: Mapping[str, Arm], task: str, title: str) -> Panel:
    """A dot per mode and arm, with its interval; the base on top."""
    shown = list(arms.values())[::-1]
    layers = []
    for mode, style, shift in zip(MODES, STYLES, (0.13, -0.13), strict=True):
        shares = [arm.share(mode, task) for arm in shown]
        mean = np.array([one.mean for one in shares], float)
        low, high = (np.array([one.interval[end] for one in shares], float) for end in (0, 1))
        at = np.array([place + shift for place in range(len(shown))], float)
        layers.append(Points(mode, mean, at, Marker(*style, size=7.0), None, Interval(low, high, "x")))
    return Panel(title, Axis("success", (-0.03, 1.03)), Axis.of([arm.label for arm in shown]), layers)


def films_of(study: Study, arms: Mapping[str, Arm]) -> tuple[list[Picture], str]:
    """The contact sheet and the films of each arm's first seed, and a sentence about them."""
    folder = study.store.folder / FILMS if study.store else None
    if folder is None or not folder.is_dir():
        return [], "No films were made."
    pictures = []
    for arm in arms.values():
        own = folder / str(arm.rows["run_id"][0])
        for name, kind in (("sheet", "png"), *((name, "gif") for name in FILMED)):
            if (path := own / f"{name}.{kind}").is_file():
                pictures.append(Picture(_caption(study, arm, name), path.read_bytes(), kind))
    if pictures:
        return pictures, "Films and frames: the first held-out episode of a task, sampled, at the end of a run."
    missing = folder / MISSING
    return [], f"There are no films: {missing.read_text('utf-8').strip() if missing.is_file() else 'they are gone.'}"


def _caption(study: Study, arm: Arm, name: str) -> str:
    prior = next(iter(study.description.get("prior_tasks", [])), "a prior task")
    task = {"new": study.description.get("new_task", "the new task"), "prior": prior}.get(name)
    when = "before" if arm.label == "base" else "after"
    seed = f"seed {arm.rows['seed'][0]}"
    return f"{arm.label}: {task}, {when}, {seed}" if task else f"{arm.label}: frames, {when}, {seed}"


def _rows(arms: Mapping[str, Arm]) -> dict[str, tuple[str, Arm]]:
    return {key: (arm.label, arm) for key, arm in arms.items()}


def _cell(mode: str, *tasks: str) -> Callable[[Arm], str]:
    return lambda arm: str(arm.share(mode, *tasks))
