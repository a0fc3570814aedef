"""The figures that a table of lost and gained items shows: their headers, and a row's cells."""

from collections.abc import Callable, Mapping

from rlrazor.analysis.lost import WITHIN_LUCK, Moved, Transitions
from rlrazor.analysis.paired import Interval

NOT_ADJUSTED = "—"  # the model does not choose among answers, or not all of its items do
HEADERS: Mapping[str, str] = {
    "n": "n (in tasks)",
    "lost-share": "lost, %",
    "gained-share": "gained, %",
    "lost-beyond": "lost beyond luck, %",
    "gained-beyond": "gained beyond luck, %",
    "drop": "net drop, points",
}
"""By the key of a column. Those that end with `beyond` are of items that are chosen among answers."""

Form = Callable[[float, Interval], str]
"""How a fraction of 1 and its interval are written."""


def cells_of(of: Transitions, share: Form, drop: Form) -> dict[str, str]:
    """What some items became, by the key of a column; `share` writes a share of the items, `drop` the net drop."""
    return {
        "n": f"{of.n:,}" + ("" if of.clusters is None else f" ({of.clusters})"),
        "lost-share": share(of.lost.share, of.lost.interval),
        "gained-share": share(of.gained.share, of.gained.interval),
        "lost-beyond": _beyond_luck(of.lost, share),
        "gained-beyond": _beyond_luck(of.gained, share),
        "drop": drop(of.drop, of.interval),
    }


def _beyond_luck(flow: Moved, share: Form) -> str:
    if flow.shown is None:
        return NOT_ADJUSTED
    return WITHIN_LUCK if flow.within_luck else share(*flow.shown)
