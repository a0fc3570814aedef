"""What an output folder holds, a sweep, studies or both: read and analysed once, for page, terminal and JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table as RichTable

from rlrazor.report import sections, sweep_tables, tables
from rlrazor.report.sections import KINDS
from rlrazor.report.study import Kinds, Section, Study
from rlrazor.report.sweep import Sweep, load_sweep, sweep_summary
from rlrazor.report.tables import Table
from rlrazor.runs.records import JSON


@dataclass(frozen=True, eq=False)
class Results:
    """A folder, read and analysed. `studies` are what `sections` were made from, one each, in the page's order.

    A sweep of stages is a section as well, and all that is shown of it.
    """

    folder: Path
    sweep: Sweep | None
    studies: Sequence[Study]
    sections: Sequence[Section]


def load(folder: Path, kinds: Kinds = KINDS) -> Results:
    """Read an output folder and analyse it (half a minute for a sweep of 12,000 checkpoints and 30 drift measures).

    `kinds` are the sections it may have: the report's own, unless the caller knows of studies besides.
    Raises RazorError when it holds neither a sweep nor a study, or a file is missing, damaged or incomplete.
    """
    studies = sections.load_studies(folder, kinds)
    # Without any study, a sweep is what the error should miss.
    has_sweep = not studies or any((folder / name).exists() for name in ("config.json", "records.parquet"))
    sweep = load_sweep(folder) if has_sweep else None
    if sweep:
        studies += sections.of_sweep(sweep, kinds)
        studies.sort(key=lambda study: list(kinds).index(study.name))
    shown = None if sweep and sweep.is_sequence else sweep
    return Results(folder, shown, studies, [sections.build(study, kinds) for study in studies])


def terminal_tables(results: Results) -> list[RichTable]:
    """For the terminal: a sweep's retention, its laws and how they depend on the range; the findings of studies.

    Of a calibration no other laws than the one that it was for, which has a section.
    """
    shown = []
    if results.sweep:
        laws = () if results.sweep.is_calibration else (sweep_tables.law_table, sweep_tables.range_table)
        shown += [table(results.sweep) for table in (sweep_tables.retention_table, *laws)]
    if results.sections:
        findings = [[section.name, section.finding] for section in results.sections]
        shown.append(Table("Analyses", ["analysis", "finding"], findings, words=True))
    return [tables.to_rich(table) for table in shown]


def summary(results: Results) -> JSON:
    """The numbers of the report, for JSON; the sweep's accuracies and forgetting as fractions of 1."""
    numbers = sweep_summary(results.sweep) if results.sweep else {}
    found = {
        section.name: {"finding": section.finding, "tables": [asdict(table) for table in section.tables]}
        for section in results.sections
    }
    return {**numbers, "sections": found}
