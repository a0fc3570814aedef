"""Tables whose cells have names, for the text beside them, and the verdicts of a table in one sentence."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from rlrazor.analysis.statistics import Estimate, Standing, verdict
from rlrazor.report.tables import Table
from rlrazor.report.text import of_all, percent, signed, with_seeds, written

Row = TypeVar("Row")
Value = Estimate | str | None

WORDS: Mapping[Standing, str] = {one: one.value for one in Standing}
MORE_OR_LESS: Mapping[Standing, str] = {**WORDS, Standing.BETTER: "more", Standing.WORSE: "less"}
"""The verdicts where neither is better."""


@dataclass(frozen=True)
class Keyed:
    """A table, of which a cell's name is that of its row and of its column: `ROW.COLUMN`, or `COLUMN` in row "".

    `columns`: name -> header. `rows`: name -> what it is called, and its cells by column.
    """

    title: str
    corner: str
    columns: Mapping[str, str]
    rows: Mapping[str, tuple[str, Mapping[str, str]]]

    @property
    def table(self) -> Table:
        """As it is shown."""
        rows = [[name, *(cells[column] for column in self.columns)] for name, cells in self.rows.values()]
        return Table(self.title, [self.corner, *self.columns.values()], rows)

    @property
    def numbers(self) -> dict[str, str]:
        """Its cells by their names."""
        return {
            f"{row}.{column}".removeprefix("."): text
            for row, (_, cells) in self.rows.items()
            for column, text in cells.items()
        }


def numbers_of(tables: Iterable[Keyed]) -> dict[str, str]:
    """The cells of all tables by their names, each of which stands for one cell."""
    numbers: dict[str, str] = {}
    for table in tables:
        if twice := set(numbers) & set(table.numbers):
            raise ValueError(f"two cells are called {min(twice)}")
        numbers |= table.numbers
    return numbers


@dataclass(frozen=True)
class Judged:
    """What is called `label` beside what it is compared with."""

    label: str
    gap: Estimate | None
    verdict: Standing

    @classmethod
    def of(cls, label: str, gap: Estimate | None, seeds: int, *, lower_is_better: bool = False) -> "Judged":
        """With the verdict on a difference over a study's seeds, by the one rule: `statistics.verdict`."""
        return cls(label, gap, verdict(gap, seeds, lower_is_better=lower_is_better))


def in_short(
    judged: Sequence[Judged],
    form: Callable[[float], str] = percent,
    unit: str = "points",
    words: Mapping[Standing, str] = WORDS,
) -> str:
    """The verdicts, of each kind those that have it, with their differences: "better: A (+1.2 ± 0.5 points); ..."."""
    parts = []
    for kind in Standing:
        names = [
            one.label if one.gap is None else f"{one.label} ({f'{signed(one.gap, form)} {unit}'.strip()})"
            for one in judged
            if one.verdict == kind
        ]
        if names:
            parts.append(f"{words[kind]}: {', '.join(names)}")
    return "; ".join(parts) if parts else f"{words[Standing.APART]}: there are no runs to compare"


@dataclass(frozen=True)
class Column(Generic[Row]):
    """What a table says of each of its rows: a number over seeds, written by `form`, or a word.

    With `judge` it is a difference, whose `key` ends in `gap`: its seeds and the verdict on it stand beside it, as `n`
    and `verdict` with the same beginning.
    """

    key: str
    header: str
    of: Callable[[Row], Value]
    form: Callable[[Estimate | None], str] = written
    judge: Callable[[Estimate | None, int], str] | None = None


def gap(
    key: str,
    header: str,
    of: Callable[[Row], Value],
    judge: Callable[[Estimate | None, int], str] = verdict,
) -> Column[Row]:
    """A difference that is judged; a word where a row is not compared."""
    return Column(key, header, of, signed, judge)


def table_of(
    title: str, corner: str, rows: Mapping[str, tuple[str, Row]], columns: Sequence[Column[Row]], seeds: int = 0
) -> Keyed:
    """A table, column by column; `rows`: key -> name and what the columns are of.

    A number that rests on fewer than `seeds`, those of the study, says so.
    """
    headers: dict[str, str] = {}
    cells: dict[str, dict[str, str]] = {key: {} for key in rows}
    for column in columns:
        start = column.key.removesuffix("gap")
        own = {column.key: column.header}
        if column.judge:
            own |= {f"{start}n": "seeds", f"{start}verdict": "verdict"}
        headers |= own
        for key, (_, row) in rows.items():
            cells[key] |= dict(zip(own, _cells(column, column.of(row), seeds), strict=True))
    return Keyed(title, corner, headers, {key: (name, cells[key]) for key, (name, _) in rows.items()})


def _cells(column: Column[Row], value: Value, seeds: int) -> list[str]:
    """What a column, and those beside it, say of a row."""
    if isinstance(value, str):
        return [str(value)] * (3 if column.judge else 1)
    text = column.form(value)
    if column.judge:
        return [text, of_all(value, seeds), str(column.judge(value, seeds))]
    return [with_seeds(text, value, seeds)]
