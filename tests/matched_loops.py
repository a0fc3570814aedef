"""The rule of `rlrazor.analysis.matched` by loops, for tests of what is made of it."""

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

Row = Mapping[str, Any]
Key = Callable[[Row], Hashable]


def reported(
    rows: Iterable[Row],
    at: float | Callable[[Row], float],
    group: Key = lambda row: row["method"],
    setting: Callable[[Row], Any] = lambda row: row["lr"],
) -> dict[tuple[Any, int], Row]:
    """Group and seed -> the checkpoint: the first of a run that gets there, of the run that the other seeds choose.

    `setting` tells a seed's runs apart. It is for tables of several seeds.
    """
    there: dict[tuple[Any, int], dict[Any, Row]] = {}
    for row in sorted(rows, key=lambda row: row["step"]):
        if row["new"] >= (at(row) if callable(at) else at):
            there.setdefault((group(row), row["seed"]), {}).setdefault(setting(row), row)
    chosen = {}
    for (name, seed), own in there.items():
        others = [runs for (other, at_seed), runs in there.items() if other == name and at_seed != seed]
        ranks = {}
        for one in own:
            lost = [runs[one]["forgetting"] for runs in others if one in runs]
            ranks[one] = (-len(lost), sum(lost) / len(lost) if lost else 0.0, one)
        chosen[name, seed] = own[min(own, key=lambda one: ranks[one])]
    return chosen


def by_seed(
    rows: Iterable[Row], name: Any, at: float, column: str = "prior", group: Key = lambda row: row["method"]
) -> list[float]:
    """A column of the checkpoints of a group, seed by seed."""
    found = reported(rows, at, group, lambda row: (row["lr"], row["method"]))
    return [float(row[column]) for (own, _), row in sorted(found.items(), key=lambda one: one[0][1]) if own == name]
