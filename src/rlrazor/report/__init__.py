"""The report on one output folder: figures, tables and a page that explains them.

`load` reads the folder and analyses it, once; the rest presents what it found:

    results = load(Path("out"))
    write_report(results)              # out/report.html and out/figures/
    console.print(*terminal_tables(results))
    json.dumps(summary(results))

A folder may hold a sweep (`results.sweep`), studies (`results.sections`), or both.
"""

from rlrazor.report.markdown import write_markdown
from rlrazor.report.page import write_report
from rlrazor.report.results import Results, load, summary, terminal_tables
from rlrazor.report.side_by_side import compare_folders

__all__ = ["Results", "compare_folders", "load", "summary", "terminal_tables", "write_markdown", "write_report"]
