"""What a study left behind, and the section of the report that it becomes."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import polars as pl

from rlrazor.report.drawing import Figure
from rlrazor.report.tables import Table, kl_unit_of, thresholds_of
from rlrazor.runs.records import JSON


@dataclass(frozen=True)
class Section:
    """A part of the report: one question, one figure, one sentence of finding.

    `finding` is computed: it says what the numbers show, or that they do not. `note` tells how it was done, the seeds,
    the counts, and what the intervals are. `warning` stands at the top of the page. All text is plain; the page escapes
    it.
    """

    name: str
    title: str
    question: str
    finding: str
    figure: Figure
    tables: Sequence[Table]
    note: str
    warning: str = ""


@dataclass(frozen=True, eq=False)
class Study:
    """A study, read: `description` is studies/NAME.json, `table` all rows of studies/NAME.parquet.

    `points` are the distinct checkpoints, `bases` the untuned policies. All three are empty for a study without a
    table, such as `theory`. With `of_sweep`, description and table are the sweep's: config.json and records.parquet.
    """

    name: str
    description: JSON
    table: pl.DataFrame = field(default_factory=pl.DataFrame)
    points: pl.DataFrame = field(default_factory=pl.DataFrame)
    bases: pl.DataFrame = field(default_factory=pl.DataFrame)
    of_sweep: bool = False

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
        """The new-task accuracies at which methods are compared, ascending."""
        return thresholds_of(self.description)

    @property
    def kl_unit(self) -> str:
        """What KL is counted in."""
        return kl_unit_of(self.description)

    def label(self, method: str) -> str:
        """The method's name for people."""
        return str(self.description.get("labels", {}).get(method, method))
