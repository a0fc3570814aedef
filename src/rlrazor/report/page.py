"""The report: a page that opens offline, and the figures beside it as files."""

from pathlib import Path
from typing import Any

import jinja2
import polars as pl

from rlrazor.report import figures, tables
from rlrazor.report.tables import Results
from rlrazor.store import atomic_path

_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
)
_TEMPLATES.filters.update(percent=tables.percent, number=tables.number)


def write_report(source: Path | Results) -> Path:
    """Write report.html and figures/{fig3,fig6}.{png,svg} into the output folder; return the page's path.

    Give the `Results` where they are at hand, which saves the analysis. Raises RazorError as `load` does, or when the
    folder cannot be written.
    """
    results = source if isinstance(source, Results) else tables.load(source)
    drawn = [figures.trade_off_figure(results), figures.frontier_figure(results)]
    for figure in drawn:
        figures.save(figure, results.folder / "figures")
    page = _TEMPLATES.get_template("page.html").render(_context(results, drawn))
    path = results.folder / "report.html"
    with atomic_path(path) as partial:
        partial.write_text(page, encoding="utf-8")
    return path


def _context(results: Results, drawn: list[figures.Figure]) -> dict[str, Any]:
    """All that the template shows; its prose is in the template."""
    lowest = results.retention.filter(pl.col("threshold") == tables.THRESHOLDS[0], pl.col("mean").is_not_null())
    return {
        "results": results,
        "config": results.config,
        "law": next(law for law in results.laws if law.predictor == "kl_forward"),
        "threshold": tables.THRESHOLDS[0],
        "kept": lowest.sort("mean", descending=True, maintain_order=True).to_dicts(),
        "clipped": drawn[0].clipped,
        # The template takes them as they are: plotly escapes what it puts into its script. The library comes once.
        "figures": {
            figure.name: figures.to_html(figure, with_library=index == 0) for index, figure in enumerate(drawn)
        },
        "retention": tables.retention_table(results),
        "laws": tables.law_table(results),
        "formulas": tables.formula_table(results),
        "ranges": tables.range_table(results),
        "sensitivity": tables.sensitivity_table(results),
        "distillation": tables.distillation_table(results),
        "match": tables.MATCH,
        "settings": tables.settings_table(results),
    }
