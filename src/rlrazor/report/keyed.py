"""Tables whose cells have names, for the text beside them, and the verdicts of a table in one sentence."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from rlrazor.analysis.statistics import Estimate, Verdict
from rlrazor.report.tables import Table
from rlrazor.report.text import percent, signed

WORDS: Mapping[Verdict, str] = {one: one.value for one in Verdict}


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

    def under(self, key: str, title: str) -> "Keyed":
        """The same table with `key` before its rows' names, where several of one kind stand side by side."""
        return replace(self, title=title, rows={f"{key}.{row}".rstrip("."): of for row, of in self.rows.items()})


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
    verdict: Verdict


def in_short(
    judged: Sequence[Judged],
    form: Callable[[float], str] = percent,
    unit: str = "points",
    words: Mapping[Verdict, str] = WORDS,
) -> str:
    """The verdicts, of each kind those that have it, with their differences: "better: A (+1.2 ± 0.5 points); ..."."""
    parts = []
    for kind in Verdict:
        names = [
            one.label if one.gap is None else f"{one.label} ({f'{signed(one.gap, form)} {unit}'.strip()})"
            for one in judged
            if one.verdict == kind
        ]
        if names:
            parts.append(f"{words[kind]}: {', '.join(names)}")
    return "; ".join(parts) if parts else f"{words[Verdict.APART]}: there are no runs to compare"
