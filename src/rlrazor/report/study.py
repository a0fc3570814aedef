"""What a study left behind, the section of the report that it becomes, and who makes the one from the other."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import polars as pl

from rlrazor.report.drawing import Figure
from rlrazor.report.tables import FAMILIES, THRESHOLDS, Table
from rlrazor.runs.records import JSON
from rlrazor.runs.store import RunStore


@dataclass(frozen=True)
class Section:
    """A part of the report: one question, what was found in short, one figure, tables.

    `finding` is computed: it says what the numbers show, or that they do not. `note` says how to read it, how it was
    done, the seeds, the counts, and what the intervals are: paragraphs with an empty line between them, of which one
    that begins with `## ` is a heading. `warning` stands at the top of the page. All text is plain; pages escape it.
    """

    name: str
    title: str
    question: str
    finding: str
    figure: Figure
    tables: Sequence[Table]
    note: str
    warning: str = ""

    @property
    def paragraphs(self) -> list[str]:
        """Those of the note."""
        return [" ".join(one.split()) for one in self.note.split("\n\n") if one.strip()]


@dataclass(frozen=True, eq=False)
class Study:
    """A study, read: `description` is studies/NAME.json, `table` all rows of studies/NAME.parquet.

    `points` are the distinct checkpoints, `bases` the untuned policies. All three are empty for a study without a
    table, such as `theory`. With `of_sweep`, description and table are the sweep's: config.json and records.parquet.
    `store`: its runs; None where what lies beside their records is not looked at.
    """

    name: str
    description: JSON
    table: pl.DataFrame = field(default_factory=pl.DataFrame)
    points: pl.DataFrame = field(default_factory=pl.DataFrame)
    bases: pl.DataFrame = field(default_factory=pl.DataFrame)
    of_sweep: bool = False
    store: RunStore | None = None

    @property
    def methods(self) -> list[str]:
        """The fine-tuning methods, in the order of the table."""
        return self.points["method"].unique(maintain_order=True).to_list()

    @property
    def seeds(self) -> list[int]:
        """The seeds of its checkpoints, ascending; without a table, those of the description."""
        if self.points.is_empty():
            return sorted(self.description.get("seeds", []))
        return sorted(self.points["seed"].unique().to_list())

    @property
    def thresholds(self) -> Sequence[float]:
        """The new-task accuracies, ascending, at which methods are compared: the config's, or THRESHOLDS."""
        return tuple(sorted(self.description.get("thresholds", THRESHOLDS)))

    @property
    def kl_unit(self) -> str:
        """What KL is counted in: "nats", or as the config says, such as "nats per completion"."""
        return str(self.description.get("kl_unit", "nats"))

    def label(self, method: str) -> str:
        """The method's name for people."""
        return str(self.description.get("labels", {}).get(method, method))

    @property
    def families(self) -> Mapping[str, Sequence[str]]:
        """Which methods count as RL and which as SFT."""
        families: Mapping[str, Sequence[str]] = self.description.get("families", FAMILIES)
        return families


def with_family(study: Study) -> pl.DataFrame:
    """The checkpoints with a column `family`: RL, SFT, or null for methods of neither."""
    family_of = {method: family for family, methods in study.families.items() for method in methods}
    family = pl.col("method").replace_strict(family_of, default=None, return_dtype=pl.String)
    return study.points.with_columns(family=family)


def members(study: Study, family: str) -> str:
    """The methods of the family that the study has, for people."""
    among = study.families[family]
    return ", ".join(study.label(method) for method in study.methods if method in among) or "none in this sweep"


@dataclass(frozen=True)
class Kind:
    """What makes a section of the studies of one name.

    `applies` says whether a sweep has measured what the section is about, which then needs no runs of its own; None: it
    is about no sweep. Without `has_table`, all numbers of such a study are in its description.
    """

    section: Callable[[Study], Section]
    applies: Callable[[Study], bool] | None = None
    has_table: bool = True


Kinds = dict[str, Kind]
"""The sections that a report knows, by name, in the order of the page."""
