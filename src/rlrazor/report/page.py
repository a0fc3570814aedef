"""The report: a page that opens offline, and the figures beside it as files."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import polars as pl

from rlrazor.report import drawing, figures, sweep_tables, tables
from rlrazor.report.drawing import Figure
from rlrazor.report.rates import ONE_SEED
from rlrazor.report.results import Results
from rlrazor.report.sections import KINDS
from rlrazor.report.study import Section, Study
from rlrazor.report.sweep import Sweep
from rlrazor.report.tables import Table
from rlrazor.report.text import MATCHED, number, percent, signed
from rlrazor.system.writing import Output, write_text

OF_SWEEP = ("fig3", "fig6")  # the figures of a sweep itself

_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
)
_TEMPLATES.filters.update(percent=percent, number=number, signed=signed)


@dataclass(frozen=True)
class _Part:
    """A section as the page shows it. `run` is how its study was run; None: as the sweep, or there was no run."""

    section: Section
    run: Table | None


def write_report(results: Results) -> Path:
    """Write report.html, and the figures as PNG and SVG into figures/, into the output folder; return the page's path.

    A sweep's are fig3 and fig6, a section's is called as the section. Raises RazorError when the folder cannot be
    written.
    """
    of_sweep = (
        [figures.trade_off_figure(results.sweep), figures.frontier_figure(results.sweep)] if results.sweep else []
    )
    drawn = [*of_sweep, *(section.figure for section in results.sections)]
    for figure in drawn:
        drawing.save(figure, results.folder / "figures")
    context = {
        **(_sweep_context(results.sweep, of_sweep[0].clipped) if results.sweep else {}),
        "has_sweep": results.sweep is not None,
        "parts": [
            _Part(section, _run_table(study)) for section, study in zip(results.sections, results.studies, strict=True)
        ],
    }
    return _write(results.folder / "report.html", context, drawn)


def write_comparison(section: Section, folder: Path) -> Path:
    """Write what `compare` found as comparison.html, its figure into figures/; raises RazorError if it cannot."""
    drawing.save(section.figure, folder / "figures")
    return _write(folder / "comparison.html", {"has_sweep": False, "parts": [_Part(section, None)]}, [section.figure])


def outputs(folder: Path, names: Iterable[str] = KINDS) -> list[Output]:
    """The files that `write_report` may write into an output folder; `names` are those of the sections it may have."""
    return [(folder / "report.html", "page"), *drawing.files((*OF_SWEEP, *names, "law"), folder / "figures")]


def outputs_of_comparison(folder: Path) -> list[Output]:
    """The files that `write_comparison` writes."""
    return [(folder / "comparison.html", "page"), *drawing.files(["fig2"], folder / "figures")]


def _write(path: Path, context: Mapping[str, Any], drawn: Sequence[Figure]) -> Path:
    write_text(path, _TEMPLATES.get_template("page.html").render(**context, figures=_interactive(drawn)), "page")
    return path


def _interactive(drawn: Sequence[Figure]) -> dict[str, str]:
    """Name -> HTML, for the template to take as it is: plotly escapes its script. The library comes once."""
    return {figure.name: drawing.to_html(figure, with_library=index == 0) for index, figure in enumerate(drawn)}


def _run_table(study: Study) -> Table | None:
    if study.of_sweep or study.table.is_empty():
        return None
    return tables.run_table(study.description, study.table, study.points)


def _sweep_context(sweep: Sweep, clipped: int) -> dict[str, Any]:
    """All that the template shows of a sweep; its prose is in the template."""
    lowest = sweep.retention.filter(pl.col("threshold") == sweep.study.thresholds[0], pl.col("mean").is_not_null())
    return {
        "results": sweep,
        "study": sweep.study,
        "config": sweep.config,
        "tables": sweep_tables,
        "threshold": sweep.study.thresholds[0],
        "kept": lowest.sort("mean", descending=True, maintain_order=True).to_dicts(),
        "clipped": clipped,
        "match": tables.MATCH,
        "matched": MATCHED,
        "one_seed": ONE_SEED,
        "settings": tables.run_table(sweep.config, sweep.study.table, sweep.points),
    }
