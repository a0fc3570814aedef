"""The report on one output folder: figures, tables and a page that explains them.

`load` reads the folder and analyses it, once; the rest presents what it found:

    results = load(Path("out"))
    write_report(results)              # out/report.html and out/figures/
    console.print(*terminal_tables(results))
    json.dumps(summary(results))
"""

from rlrazor.report.page import write_report
from rlrazor.report.tables import Results, load, summary, terminal_tables

__all__ = ["Results", "load", "summary", "terminal_tables", "write_report"]
