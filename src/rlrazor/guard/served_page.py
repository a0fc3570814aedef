"""What a comparison with a served model found, for people: the cells of its table, and a page that opens offline."""

from collections.abc import Sequence
from pathlib import Path

from rlrazor.guard.compare_served import ServedComparison
from rlrazor.guard.comparison_page import LABELS, SHOWN, TEMPLATES, settings_of, shade
from rlrazor.guard.judgement import Judgement
from rlrazor.guard.scale import shown_estimate
from rlrazor.guard.served import ServedKL
from rlrazor.system.writing import write_text

HEADERS = ("distance, nats", "estimate", "at least", "gap", "per token", "not told")


def cells(one: ServedKL) -> tuple[str, ...]:
    """Per completion the estimate, what is certain and the gap; per token; what is not told of either side."""
    return (
        shown_estimate(one.estimate.per_completion),
        shown_estimate(one.bound.per_completion),
        f"{one.gap:.4f}",
        shown_estimate(one.estimate.per_token),
        " / ".join(f"{100 * share:.2g} %" for share in one.unknown),
    )


def settings_shown(found: ServedComparison) -> list[tuple[str, str]]:
    """How it was measured, a name and a text each."""
    kinds = {"here": f"here, in {found.pair.dtype}"}
    where = [
        (name, f"{source}: {kinds.get(kind, f'by {kind}')}")
        for name, source, kind in zip(("base", "tuned"), (found.pair.base, found.pair.tuned), found.kinds, strict=True)
    ]
    rows = [row for row in settings_of(found.setup, found.pair.dtype) if row[0] not in ("law", "items of a prior task")]
    return [*where, ("likeliest tokens", str(found.asking.top or "all")), *rows]


def write_page(found: ServedComparison, path: Path, judged: Sequence[Judgement] = ()) -> Path:
    """Write the page; raises RazorError where it cannot be written."""
    html = TEMPLATES.get_template("served.html").render(
        found=found,
        judged=judged,
        labels=LABELS,
        headers=HEADERS,
        cells=cells,
        shown=found.prompts[:SHOWN],
        shade=shade,
        settings=settings_shown(found),
    )
    write_text(path, html, "page")
    return path
