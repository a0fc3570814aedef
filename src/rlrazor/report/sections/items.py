"""Which items of the prior tasks were lost, and which gained? For sweeps whose runs kept what became of each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl

from rlrazor.analysis.lost import Moved, Transitions
from rlrazor.analysis.lost_figures import HEADERS, cells_of
from rlrazor.analysis.lost_in_runs import RunsChanges, changes_of
from rlrazor.analysis.matched import matched_or_last
from rlrazor.analysis.sequences import ends_of_sequences
from rlrazor.analysis.statistics import shared_threshold
from rlrazor.report.drawing import INK, PALETTE, WHITE, Axis, Figure, Interval, Layer, Marker, Panel, Points, style_of
from rlrazor.report.keyed import Column, Keyed, Row, table_of
from rlrazor.report.layers import across, padded
from rlrazor.report.prose import Shown, told
from rlrazor.report.sections.lost_items import lost_table
from rlrazor.report.study import Section, Study
from rlrazor.report.text import MATCHED, NEVER, percent, points, ranged
from rlrazor.runs.floor import Floor
from rlrazor.runs.floor import read as read_floor
from rlrazor.runs.records import BASE
from rlrazor.runs.store import RunStore

TEXT = Path(__file__).with_suffix(".md")
NAME = "items"
BY = ("method",)
LEVEL = 0.95  # of the intervals
FELL, ROSE, OPEN = "fell", "rose", "cannot be told"
ROW = 15  # pixels of the figure for each mark of a method
LAST_STAGE = "It is the last checkpoint of the last stage of each sequence."
LAST = "Of a method that gets there in no seed it is the last one, of the run that ends with the highest new score."


@dataclass(frozen=True, eq=False)
class Counted:
    """A method's runs at the checkpoints that are looked at, and what they lost and gained there.

    `rows`: of the table, of the runs whose items are known; `runs`: how many there are with those that are not;
    `begun`: how many seeds the study has, or sequences. `items`: as `rlrazor.analysis.lost_in_runs` takes them.
    """

    method: str
    label: str
    rows: pl.DataFrame
    runs: int
    begun: int
    items: pl.DataFrame
    changes: RunsChanges

    @property
    def share(self) -> str:
        """How many of all seeds, or sequences, it is judged on: "3", "1 of 3"."""
        known = len(self.rows)
        return f"{known}" if known == self.begun else f"{known} of {self.begun}"


def applies(study: Study) -> bool:
    """Whether it is known of any run what became of each item."""
    if study.store is None:
        return False
    return any(study.store.has_items(run_id) for run_id in study.points["run_id"].unique(maintain_order=True))


def section(study: Study) -> Section:
    """What each method's runs lost and gained, on all prior tasks, on each, and in each category; and which items."""
    at = None if _is_sequence(study) else shared_threshold(study.points, study.bases, BY, study.thresholds)
    found, unknown = counted(study, at)
    tables, floor = [], None if study.store is None else read_floor(study.store.folder)
    if any(one.changes.whole is not None for one in found):
        whole = whole_table(found, _reached(study, at), floor)
        tables = [whole, *task_tables(found, floor), *category_tables(found)]
    numbers = {
        "chosen": LAST_STAGE if _is_sequence(study) else f"{MATCHED} {LAST}",
        "level": f"{LEVEL:.0%}".replace("%", " %"),
        "left-out": left_out(study, found, unknown),
        "floor": floor_in_words(floor),
    }
    made = told(study, TEXT, Shown(finding(study, found, at), figure(found), tables, numbers))
    lost = lost_table(study, {one.method: _counted_items(one) for one in found})
    return replace(made, tables=[*made.tables, *([] if lost is None else [lost])])


def counted(study: Study, at: float | None) -> tuple[list[Counted], list[str]]:
    """The methods, and the labels of those of whose runs no item is known.

    `at`: the new-task score at which they are looked at; None: at the last checkpoint.
    """
    found, unknown = [], []
    begun = _begun(study)
    for method, rows in _chosen(study, at).group_by("method", maintain_order=True):
        label = study.label(str(method[0]))
        outcomes = {row["run_id"]: _outcomes(study.store, row["run_id"], row["step"]) for row in rows.to_dicts()}
        known = [own.with_columns(run=pl.lit(run_id)) for run_id, own in outcomes.items() if own is not None]
        if not known:
            unknown.append(label)
            continue
        items = pl.concat(known)
        of_known = rows.filter(pl.col("run_id").is_in(items["run"].unique().to_list()))
        changes = changes_of(items, LEVEL)
        found.append(Counted(str(method[0]), label, of_known, len(rows), begun, items, changes))
    return found, unknown


def _is_sequence(study: Study) -> bool:
    return "stage" in study.table.columns


def _begun(study: Study) -> int:
    """How many sequences the study has, ended or not; how many seeds, where it has none."""
    if not _is_sequence(study):
        return len(study.seeds)
    return study.table.filter(pl.col("method") != BASE).select("seed", "order").n_unique()


def _chosen(study: Study, at: float | None) -> pl.DataFrame:
    """The checkpoints that are looked at, one of each run that is."""
    if _is_sequence(study):
        ends = ends_of_sequences(study.table.filter(pl.col("method") != BASE))
        return ends.with_columns(reached=pl.lit(value=True))
    return matched_or_last(study.points, BY, at)


def _outcomes(store: RunStore | None, run_id: str, step: int) -> pl.DataFrame | None:
    """Of a checkpoint's items; None where they are not known."""
    if store is None or not store.has_items(run_id):
        return None
    items = store.items(run_id).filter(pl.col("step") == step)
    return items if len(items) else None


def _counted_items(one: Counted) -> pl.DataFrame:
    return one.items.filter(pl.col("prior").is_in([*one.changes.tasks]))


# What is said


def _reached(study: Study, at: float | None) -> str:
    """What the checkpoints that are compared have in common."""
    return "the end of the last stage" if _is_sequence(study) else f"new ≥ {at or 0:.0%}"


def finding(study: Study, found: Sequence[Counted], at: float | None) -> str:
    """Which methods' prior score fell, by the interval of the net drop."""
    judged: dict[str, list[str]] = {}
    alike = not any(one.rows["reached"].all() for one in found)
    for one in found:
        if (whole := one.changes.whole) is not None:
            low, high = whole.interval
            seeds = "" if len(one.rows) == one.begun else f"; {one.share} {_what(study)}"
            counts = f"lost {_count(whole.lost, whole)}, gained {_count(whole.gained, whole)} of {whole.n:,}"
            drop = ranged(whole.drop, whole.interval, points)
            name = one.label if alike or one.rows["reached"].all() else f"{one.label} at its last checkpoint"
            verdict = FELL if low > 0 else ROSE if high < 0 else OPEN
            judged.setdefault(verdict, []).append(f"{name} ({drop} points; {counts}{seeds})")
    if not judged:
        return "Nothing can be counted item by item."
    where = "the last checkpoint" if alike else _reached(study, at)
    verdicts = "; ".join(f"{name}: {', '.join(judged[name])}" for name in (FELL, ROSE, OPEN) if name in judged)
    return f"Net drop of the prior score at {where}, item by item. {verdicts[0].upper()}{verdicts[1:]}."


def _what(study: Study) -> str:
    """What a run of a method is one of."""
    return "sequences" if _is_sequence(study) else "seeds"


def left_out(study: Study, found: Sequence[Counted], unknown: Sequence[str]) -> str:
    """What is not counted and why, a sentence each; that nothing is missing, if so."""
    whys: dict[tuple[str, str], list[str]] = {}
    for one in found:
        for prior, why in one.changes.left_out.items():
            whys.setdefault((prior, why), []).append(one.label)
    said = [f"{prior} is not counted of {', '.join(labels)}: {why}." for (prior, why), labels in whys.items()]
    few = [f"{one.label} on {one.runs} of {one.begun}" for one in found if one.runs < one.begun]
    if few:
        said.append(
            f"Some methods are judged on some of the {_what(study)} alone, as they have no such checkpoint in the "
            f"others: {', '.join(few)}."
        )
    named = {*unknown, *(one.label for one in found)}
    if nowhere := [label for label in map(study.label, study.methods) if label not in named]:
        said.append(f"{', '.join(nowhere)}: not counted, as no run has such a checkpoint.")
    some = [f"{len(one.rows)} of {one.runs} of {one.label}" for one in found if len(one.rows) < one.runs]
    if some:
        said.append(f"Of some runs alone it is known what became of the items: {', '.join(some)}.")
    if unknown:
        said.append(f"Of no run of {', '.join(unknown)} is it known what became of the items.")
    return " ".join(said) or "All prior tasks of all methods are counted."


# The tables


def floor_in_words(floor: Floor | None) -> str:
    """What the noise floor of a table is, or how to have one."""
    if floor is None:
        return "It was not measured here: `--noise-floor` does."
    return (
        f"It was measured: the most by which a score of the base differed from itself, {', or '.join(floor.how)}. "
        "A net drop that is no larger is no sign of forgetting."
    )


def whole_table(found: Sequence[Counted], reached: str, floor: Floor | None = None) -> Keyed:
    """`METHOD.drop`, `METHOD.lost`, ...: all prior tasks, each of which counts the same. `reached`: see `_reached`."""

    def where(one: Counted) -> str:
        return reached if one.rows["reached"].all() else "the last"

    rows = {one.method: (one.label, (one, whole)) for one in found if (whole := one.changes.whole) is not None}
    columns = [
        Column[tuple[Counted, Transitions]]("checkpoint", "checkpoint", lambda row: where(row[0])),
        Column("new", "new there, %", lambda row: percent(row[0].rows["new"].mean())),  # type: ignore[arg-type]
        Column("runs", "runs", lambda row: row[0].share),
        *_columns(lambda row: row[1], [whole for _, (_, whole) in rows.values()]),
        *_floor_column(floor, lambda row: [*row[0].changes.tasks]),
    ]
    return table_of("All prior tasks, item by item", "method", rows, columns)


def _floor_column(floor: Floor | None, tasks: Callable[[Row], Sequence[str]]) -> list[Column[Row]]:
    """Beside the drop of these tasks, or of their mean, where a floor is known."""
    if floor is None:
        return []

    def cell(row: Row) -> str:
        apart = floor.of_part(tasks(row))
        return NEVER if apart is None else points(apart)

    return [Column[Row]("floor", "noise floor, points", cell)]


def task_tables(found: Sequence[Counted], floor: Floor | None = None) -> list[Keyed]:
    """The same of each prior task, where there are several: `task N.METHOD.drop`."""
    names = list(dict.fromkeys(name for one in found for name in one.changes.tasks))
    tables = []
    for number, name in enumerate(names if len(names) > 1 else [], 1):
        rows = {
            f"task {number}.{one.method}": (one.label, one.changes.tasks[name])
            for one in found
            if name in one.changes.tasks
        }
        columns = _columns(_itself, [of for _, of in rows.values()])
        columns += _floor_column(floor, lambda row, name=name: [name])  # type: ignore[misc]
        tables.append(table_of(f"{name}, item by item", "method", rows, columns))
    return tables


def category_tables(found: Sequence[Counted]) -> list[Keyed]:
    """The same of each category of a prior task that has several: `categories N.CATEGORY.METHOD.drop`."""
    names = list(dict.fromkeys(name for one in found for name in one.changes.categories))
    tables = []
    for number, name in enumerate(names, 1):
        parts = dict.fromkeys(part for one in found for part in one.changes.categories.get(name, {}))
        rows = {
            f"categories {number}.{part}.{one.method}": (f"{part}: {one.label}", one.changes.categories[name][part])
            for part in parts
            for one in found
            if part in one.changes.categories.get(name, {})
        }
        tables.append(
            table_of(
                f"{name} by category, item by item",
                "category: method",
                rows,
                _columns(_itself, [of for _, of in rows.values()]),
            )
        )
    return tables


def _itself(of: Transitions) -> Transitions:
    return of


def _columns(of: Callable[[Row], Transitions], parts: Sequence[Transitions]) -> list[Column[Row]]:
    """What is told of what some items became; `parts`: those of all rows. Luck, where a row knows of any."""
    lucky = any(one.lost.adjusted is not None for one in parts)
    first, *others = [
        Column[Row](key, header, lambda row, key=key: _cells(of(row))[key])  # type: ignore[misc]
        for key, header in HEADERS.items()
        if lucky or not key.endswith("beyond")
    ]
    counts = [
        Column[Row]("lost", "lost", lambda row: _count(of(row).lost, of(row))),
        Column[Row]("gained", "gained", lambda row: _count(of(row).gained, of(row))),
    ]
    return [first, *counts, *others]


def _cells(of: Transitions) -> dict[str, str]:
    return cells_of(of, ranged, lambda drop, interval: ranged(drop, interval, points))


def _count(moved: Moved, of: Transitions) -> str:
    """How many, a mean over the runs."""
    return f"{moved.count / of.runs:,.1f}" if moved.count % of.runs else f"{moved.count // of.runs:,}"


# The figure


def figure(found: Sequence[Counted]) -> Figure:
    """The net drop of each method, on all prior tasks and on each; and what it is the difference of."""
    counted = [one for one in found if one.changes.whole is not None][::-1]  # the first on top
    tasks = list(dict.fromkeys(name for one in reversed(counted) for name in one.changes.tasks))
    panels = [_drop_panel(counted, tasks if len(tasks) > 1 else []), _flow_panel(counted)]
    marks = len(counted) * (1 + max(len(tasks), 3))
    return Figure(NAME, panels, columns=2, height=max(430, 200 + ROW * marks))


def _drop_panel(counted: Sequence[Counted], tasks: Sequence[str]) -> Panel:
    axis = Axis.of([one.label for one in counted], margin=0.6)
    series: list[tuple[str, Marker, list[Transitions | None]]] = [
        (
            "mean over the prior tasks" if tasks else "prior task",
            Marker(INK, "star", size=10.0),
            [one.changes.whole for one in counted],
        )
    ]
    for index, name in enumerate(tasks):
        series.append((name, Marker(*style_of(index), size=6.0), [one.changes.tasks.get(name) for one in counted]))
    layers: list[Layer] = [across("no drop", 0.0, axis.ends)] if counted else []
    for (label, marker, found), shift in zip(series, _shifts(len(series)), strict=True):
        layers.append(
            _marks(label, [None if one is None else (one.drop, one.interval) for one in found], shift, marker)
        )
    return Panel("Net drop: lost less gained", _points_axis("net drop, points", layers), axis, layers)


def _flow_panel(counted: Sequence[Counted]) -> Panel:
    """Lost and gained, and hollow what of them luck does not explain."""
    axis = Axis.of([one.label for one in counted], margin=0.6)
    wholes = [one.changes.whole for one in counted if one.changes.whole is not None]
    layers: list[Layer] = []
    kinds = (("lost", PALETTE[6], "triangle-down"), ("gained", PALETTE[9], "triangle-up"))
    shifts = iter(_shifts(4))
    for name, color, symbol in kinds:
        flows = [one.lost if name == "lost" else one.gained for one in wholes]
        plain = [(one.share, one.interval) for one in flows]
        layers.append(_marks(name, plain, next(shifts), Marker(color, symbol, size=7.0)))
        beyond = [None if one.within_luck else one.shown for one in flows]
        hollow = Marker(WHITE, symbol, size=6.0, outlined=True)
        layers.append(_marks(f"{name} beyond luck", beyond, next(shifts), hollow))
    return Panel("Lost and gained", _points_axis("% of the items, mean over the prior tasks", layers), axis, layers)


def _shifts(count: int) -> list[float]:
    """Places beside each other within a category, from the top."""
    return [0.0] if count == 1 else np.linspace(0.3, -0.3, count).tolist()


def _marks(
    label: str, values: Sequence[tuple[float, tuple[float, float]] | None], shift: float, marker: Marker
) -> Points:
    """Shares of 1 with their intervals in points, one for each category; None: no mark."""
    known = [(place + shift, *of) for place, of in enumerate(values) if of is not None]
    y, x = (np.array([one[column] for one in known], float) for column in (0, 1))
    low, high = (100 * np.array([one[2][end] for one in known], float) for end in (0, 1))
    return Points(label, 100 * x, y, marker, interval=Interval(low, high, "x"))


def _points_axis(label: str, layers: Sequence[Layer]) -> Axis:
    ends = [
        end
        for one in layers
        if isinstance(one, Points) and one.interval
        for end in (one.interval.low, one.interval.high)
    ]
    return Axis(label, padded(np.concatenate([np.zeros(1), *ends])), percent=False)
