"""Success of a policy that samples its actions beside that of one that takes the likeliest, task by task; and films."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rlrazor.analysis.lost import wilson
from rlrazor.analysis.matched import matched_or_last
from rlrazor.analysis.paired import Mean, Proportions
from rlrazor.analysis.statistics import Estimate, over, shared_threshold
from rlrazor.report.drawing import PALETTE, Axis, Figure, Interval, Marker, Panel, Picture, Points
from rlrazor.report.keyed import Column, Keyed, table_of
from rlrazor.report.prose import Shown, told
from rlrazor.report.study import Section, Study
from rlrazor.report.text import MATCHED, percent, points, ranged, written
from rlrazor.runs.records import BASE

TEXT = Path(__file__).with_suffix(".md")
NAME = "successes"
BY = ("method",)
NEW = "new"
MODES = ("sampled", "greedy")
STYLES = ((PALETTE[0], "circle"), (PALETTE[1], "square"))
LEVEL = 0.95
COUNTED = ("episodes", *(f"{mode}_{NEW}" for mode in (*MODES, "greedy_alone")))
ENOUGH = 100  # episodes of a task: with fewer, an interval is wider than 20 points
FILMS, MISSING = "films", "missing.txt"
FILMED = (NEW, "prior")

Row = Mapping[str, Any]
"""A checkpoint."""


@dataclass(frozen=True)
class Range:
    """An estimate, a fraction of 1, and the ends of its 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def is_told(self) -> bool:
        """Whether 0 is not within."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, eq=False)
class Arm:
    """What is shown of a method, or of the base: a checkpoint per seed, which all got to the new score, or none."""

    label: str
    rows: Sequence[Row]
    reached: bool

    def success(self, mode: str, tasks: Sequence[str]) -> Range:
        """Of the episodes of these tasks: over seeds by Student's t, of one seed by Wilson's score."""
        shares = [_count(row, mode, tasks) / _episodes(row, tasks) for row in self.rows]
        if (estimate := Estimate.over(shares)).half is not None:
            return Range(estimate.mean, *_ends(estimate))
        return of_seed(self.rows[0], mode, tasks)

    def gap(self, tasks: Sequence[str]) -> Range:
        """Greedy minus sampled on the same starts: over seeds by Student's t, of one seed by Tango's score."""
        if (estimate := over(_paired(row, tasks).mean for row in self.rows)) and estimate.half is not None:
            return Range(estimate.mean, *_ends(estimate))
        pairs = _paired(self.rows[0], tasks)
        return Range(pairs.mean, *pairs.interval(LEVEL))


def of_seed(row: Row, mode: str, tasks: Sequence[str]) -> Range:
    """The success of one checkpoint, with Wilson's interval."""
    count, n = _count(row, mode, tasks), _episodes(row, tasks)
    return Range(count / n, *wilson(count, n, LEVEL))


def applies(study: Study) -> bool:
    """Whether episodes were counted in both modes."""
    return set(COUNTED) <= set(study.table.columns)


def section(study: Study) -> Section:
    """Both modes on the new task and each prior one, where each method is reported."""
    study.table.select(COUNTED)  # polars says which one is missing
    at, tasks = threshold_of(study), tasks_of(study)
    arms = arms_of(study, at)
    names = {NEW: str(study.description.get("new_task", "the new task")), **{task: task for task in tasks}}
    tables = [mean_table(arms, tasks), task_table(arms, names), gap_table(arms, names)]
    tables += [seed_table(arms, tasks)] if len(study.seeds) > 1 else []
    films, about = films_of(study, arms)
    panels = [panel(arms, task, name) for task, name in names.items()]
    figure = Figure(NAME, panels, min(3, len(panels)), pictures=films)
    numbers = {"at": f"{at:.0%}", "films": about, "matched": MATCHED, "base": base_in_words(study, arms[BASE])}
    shown = told(study, TEXT, Shown(finding(arms, names), figure, tables, numbers))
    return replace(shown, warning=warning(study))


def threshold_of(study: Study) -> float:
    """The new score at which methods are shown."""
    return shared_threshold(study.points, study.bases, BY, study.thresholds) or study.thresholds[0]


def tasks_of(study: Study) -> list[str]:
    """The prior tasks."""
    return [name for name in study.description.get("prior_tasks", []) if f"greedy_{name}" in study.table.columns]


def arms_of(study: Study, at: float) -> dict[str, Arm]:
    """The base, and each method where it is reported at that new score; where it never gets there, at its end."""
    rows = matched_or_last(study.points, BY, at).sort("seed", maintain_order=True)
    arms = {BASE: Arm("base", study.bases.to_dicts(), reached=False)}
    for method in study.methods:
        own = rows.filter(method=method).to_dicts()
        arms[method] = Arm(study.label(method), own, bool(own[0]["reached"]))
    return arms


def finding(arms: Mapping[str, Arm], names: Mapping[str, str]) -> str:
    """Where the two modes differ."""
    apart = []
    for arm in arms.values():
        for task, name in names.items():
            if (gap := arm.gap([task])).is_told:
                apart.append(f"{arm.label} on {name} ({points(gap.mean)} points)")
    if not apart:
        return "Greedy minus sampled success: cannot be told from 0 on any task."
    return f"Greedy minus sampled success, where it can be told from 0: {', '.join(apart)}."


def warning(study: Study) -> str:
    """What stands at the top of the page where too few episodes were played."""
    least = int(study.table["episodes"].min())  # type: ignore[arg-type]
    if least >= ENOUGH:
        return ""
    low, high = wilson(least / 2, least, LEVEL)
    return (
        f"Success was measured on {least} episodes of each task, which tells it to within {percent((high - low) / 2)} "
        f"points either way: a look at the experiment, not a result. Results take {ENOUGH} episodes or more."
    )


def base_in_words(study: Study, base: Arm) -> str:
    """Whether the base solves the new task now and then, as it should for RL to begin with."""
    share = base.success("sampled", [NEW])
    text = f"The base solves the new task in {percent(share.mean)} % of the sampled episodes"
    wanted = study.description.get("base_range")
    if not wanted:
        return f"{text}."
    where = "within" if wanted[0] <= share.mean <= wanted[1] else "not within"
    return f"{text}, {where} the {wanted[0]:.0%} to {wanted[1]:.0%} that it was meant to."


def mean_table(arms: Mapping[str, Arm], tasks: Sequence[str]) -> Keyed:
    """`ARM.sampled-new`, `ARM.greedy-prior`, ...: success on the new task and over all prior tasks."""
    columns = [
        Column[Arm](f"{mode}-{key}", f"{key}, {mode}, %", _success(mode, of))
        for key, of in ((NEW, [NEW]), ("prior", tasks))
        if of
        for mode in MODES
    ]
    columns.append(Column("there", "shown", lambda arm: "where it gets there" if arm.reached else "at its end"))
    columns.append(Column("seeds-shown", "seeds", lambda arm: str(len(arm.rows))))
    return table_of("Success, sampled and greedy", "method", _rows(arms), columns)


def task_table(arms: Mapping[str, Arm], names: Mapping[str, str]) -> Keyed:
    """`ARM.task-TASK`: sampled / greedy success on each task."""

    def both(task: str) -> Callable[[Arm], str]:
        return lambda arm: " / ".join(percent(arm.success(mode, [task]).mean) for mode in MODES)

    columns = [Column[Arm](f"task-{task}", name, both(task)) for task, name in names.items()]
    return table_of("Sampled / greedy success on each task, %", "method", _rows(arms), columns)


def gap_table(arms: Mapping[str, Arm], names: Mapping[str, str]) -> Keyed:
    """`ARM.gap-TASK`: greedy minus sampled."""

    def gap(tasks: Sequence[str]) -> Callable[[Arm], str]:
        return lambda arm: _ranged(arm.gap(tasks), points)

    prior = [task for task in names if task != NEW]
    columns = [Column[Arm](f"gap-{task}", name, gap([task])) for task, name in names.items()]
    columns += [Column("gap-prior", "all prior tasks", gap(prior))] if len(prior) > 1 else []
    return table_of("Greedy minus sampled, points", "method", _rows(arms), columns)


def seed_table(arms: Mapping[str, Arm], tasks: Sequence[str]) -> Keyed:
    """`ARM/SEED.seed-sampled-new`, ...: what is over seeds above, of each of them."""

    def cell(mode: str, of: Sequence[str]) -> Callable[[Row], str]:
        return lambda row: _ranged(of_seed(row, mode, of))

    columns = [
        Column[Row](f"seed-{mode}-{key}", f"{key}, {mode}, %", cell(mode, of))
        for key, of in ((NEW, [NEW]), ("prior", tasks))
        if of
        for mode in MODES
    ]
    rows = {
        f"{key}/{row['seed']}": (f"{arm.label}, seed {row['seed']}", row)
        for key, arm in arms.items()
        for row in arm.rows
    }
    return table_of("Each seed", "method", rows, columns)


def panel(arms: Mapping[str, Arm], task: str, title: str) -> Panel:
    """A dot per mode and arm, with its interval; the base on top."""
    shown = list(arms.values())[::-1]
    layers = []
    for mode, style, shift in zip(MODES, STYLES, (0.13, -0.13), strict=True):
        found = [arm.success(mode, [task]) for arm in shown]
        mean, low, high = (np.array([getattr(one, end) for one in found], float) for end in ("mean", "low", "high"))
        at = np.array([place + shift for place in range(len(shown))], float)
        bars = Interval(low.clip(0, 1), high.clip(0, 1), "x")
        layers.append(Points(mode, mean, at, Marker(*style, size=7.0), None, bars))
    return Panel(title, Axis("success", (-0.03, 1.03)), Axis.of([arm.label for arm in shown]), layers)


def films_of(study: Study, arms: Mapping[str, Arm]) -> tuple[list[Picture], str]:
    """The contact sheet and the films of each arm's first seed, and a sentence about them."""
    folder = study.store.folder / FILMS if study.store else None
    if folder is None or not folder.is_dir():
        return [], "No films were made."
    pictures = []
    for arm in arms.values():
        own = folder / str(arm.rows[0]["run_id"])
        for name, kind in (("sheet", "png"), *((name, "gif") for name in FILMED)):
            if (path := own / f"{name}.{kind}").is_file():
                pictures.append(Picture(_caption(study, arm, name), path.read_bytes(), kind))
    if pictures:
        return pictures, "Films and frames: the first held-out episode of a task, sampled, at the end of a run."
    missing = folder / MISSING
    return [], f"There are no films: {missing.read_text('utf-8').strip() if missing.is_file() else 'they are gone.'}"


def _caption(study: Study, arm: Arm, name: str) -> str:
    prior = next(iter(study.description.get("prior_tasks", [])), "a prior task")
    task = {NEW: study.description.get("new_task", "the new task"), "prior": prior}.get(name, "frames of both")
    return f"{arm.label}: {task}, {'before' if arm.label == 'base' else 'after'}, seed {arm.rows[0]['seed']}"


def _rows(arms: Mapping[str, Arm]) -> dict[str, tuple[str, Arm]]:
    return {key: (arm.label, arm) for key, arm in arms.items()}


def _success(mode: str, tasks: Sequence[str]) -> Callable[[Arm], str]:
    def cell(arm: Arm) -> str:
        if len(arm.rows) == 1:
            return _ranged(arm.success(mode, tasks))
        return written(Estimate.over([of_seed(row, mode, tasks).mean for row in arm.rows]))

    return cell


def _ranged(found: Range, form: Callable[[float], str] = percent) -> str:
    return ranged(found.mean, (found.low, found.high), form)


def _ends(estimate: Estimate) -> tuple[float, float]:
    half = estimate.half or 0.0
    return estimate.mean - half, estimate.mean + half


def _episodes(row: Row, tasks: Sequence[str]) -> int:
    return int(row["episodes"]) * len(tasks)


def _count(row: Row, mode: str, tasks: Sequence[str]) -> int:
    return sum(round(row[f"{mode}_{task}"] * row["episodes"]) for task in tasks)


def _paired(row: Row, tasks: Sequence[str]) -> Mean:
    """Greedy minus sampled, episode by episode: both are of the same starts."""
    parts = []
    for task in tasks:
        alone = round(row[f"greedy_alone_{task}"] * row["episodes"])
        more = _count(row, "greedy", [task]) - _count(row, "sampled", [task])
        parts.append(Proportions(alone, alone - more, int(row["episodes"])))
    return Mean(parts)
