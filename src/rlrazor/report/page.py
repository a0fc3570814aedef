"""The report: a page that opens offline, and the figures beside it as files."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import polars as pl

from rlrazor.report import drawing, figures, tables
from rlrazor.report.drawing import Figure
from rlrazor.report.results import Results, load
from rlrazor.report.sections import Section, Study
from rlrazor.report.tables import Sweep, Table
from rlrazor.store import atomic_path

_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
)
_TEMPLATES.filters.update(percent=tables.percent, number=tables.number)


@dataclass(frozen=True)
class _Part:
    """A section as the page shows it. `run` is how its study was run; None: as the sweep, or there was no run."""

    section: Section
    run: Table | None


def write_report(source: Path | Results) -> Path:
    """Write report.html, and the figures as PNG and SVG into figures/, into the output folder; return the page's path.

    A sweep's are fig3 and fig6, a section's is called as the section. Give the `Results` where they are at hand, which
    saves the analysis. Raises RazorError as `load` does, or when the folder cannot be written.
    """
    results = source if isinstance(source, Results) else load(source)
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
        "figures": _interactive(drawn),
    }
    path = results.folder / "report.html"
    with atomic_path(path) as partial:
        partial.write_text(_TEMPLATES.get_template("page.html").render(context), encoding="utf-8")
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
    lowest = sweep.retention.filter(pl.col("threshold") == tables.THRESHOLDS[0], pl.col("mean").is_not_null())
    return {
        "results": sweep,
        "config": sweep.config,
        "law": next(law for law in sweep.laws if law.predictor == "kl_forward"),
        "threshold": tables.THRESHOLDS[0],
        "kept": lowest.sort("mean", descending=True, maintain_order=True).to_dicts(),
        "clipped": clipped,
        "retention": tables.retention_table(sweep),
        "laws": tables.law_table(sweep),
        "formulas": tables.formula_table(sweep),
        "ranges": tables.range_table(sweep),
        "sensitivity": tables.sensitivity_table(sweep),
        "distillation": tables.distillation_table(sweep),
        "match": tables.MATCH,
        "settings": tables.settings_table(sweep),
    }
