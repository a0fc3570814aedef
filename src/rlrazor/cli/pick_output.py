"""What `razor pick` prints and draws: a table and sentences, or JSON, and the frontiers."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from rlrazor.cli.printing import console_for_tables
from rlrazor.errors import RazorError
from rlrazor.guard.law_file import NAMES
from rlrazor.guard.pick import Pick, kind_of
from rlrazor.guard.scored import ScoredCheckpoint
from rlrazor.guard.verdict import DROP
from rlrazor.report import drawing
from rlrazor.report.drawing import INK, PALETTE, Axis, Curve, Figure, Interval, Layer, Marker, Panel, Points


def as_json(found: Pick) -> dict[str, Any]:
    """All of it. The frontiers are lists of checkpoints, as is one."""

    def candidate(one: ScoredCheckpoint) -> dict[str, Any]:
        return one.as_json() if not found.limits.most else {**one.as_json(), "verdict": found.verdict_of(one)}

    advice = found.advice
    chosen = advice.recommended
    return {
        "candidates": [candidate(one) for one in found.candidates],
        "frontier": [candidate(one) for one in found.frontier],
        "frontiers": {of: [one.name for one in front] for of, front in found.frontiers.items()},
        "recommended": None if chosen is None else candidate(chosen),
        "why": advice.why,
        "metric": found.metric,
        "lower_is_better": found.lower_is_better,
        "notes": list(found.notes),
        "level": found.level,
        "limits": dict(found.limits.most),
        "verdict": advice.verdict,
        "doubt": advice.doubt,
    }


_SHORT = {"drop": "drop", "kl_forward": "new task", "kl_probe": "generic probe"}  # by scored.AXES


def print_findings(found: Pick) -> None:
    """The table, cautions, and what is advised."""
    console = console_for_tables()
    console.print(_table(found))
    for note in found.notes:
        console.print(note, style="yellow", highlight=False)
    advice = found.advice
    said = advice.why if advice.recommended is None else f"Take {advice.recommended.name}: {advice.why}."
    console.print(said, style="bold", highlight=False)
    if advice.doubt is not None:
        console.print(advice.doubt, style="yellow", highlight=False)


def _table(found: Pick) -> Table:
    """The checkpoints by what is known of them: their drops, and where these do not judge alone, their KLs."""
    has_drop = any(one.drop is not None for one in found.candidates)
    kls = _kls_shown(found)
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("checkpoint")
    table.add_column(f"{found.metric}{', less is better' if found.lower_is_better else ''}", justify="right")
    if has_drop:
        kind = kind_of(found.candidates[0])
        level = "" if found.level is None else f" ({found.level:.0%} interval)"
        table.add_column(f"{kind} drop, points{level}", justify="right")
    for of in kls:
        table.add_column(f"KL, {_SHORT[of]}, nats", justify="right")
    if found.limits.most:
        table.add_column("budget")
    table.add_column("")
    shown = found.candidates if len(found.candidates) <= 30 else _marked(found)
    for one in shown:
        cells = [one.name, f"{one.new:.4g}"]
        if has_drop:
            cells.append(_drop_cell(one))
        cells += [_kl_cell(one, of) for of in kls]
        if found.limits.most:
            cells.append(found.verdict_of(one).removesuffix(" the limit"))
        on = [of for of, front in found.frontiers.items() if one in front]
        several = len(kls) > 1 and len(on) == 1
        mark = f"on the frontier: {_SHORT[on[0]]}" if several else "on the frontier" if on else ""
        style = "bold" if one == found.advice.recommended else "" if on else "dim"
        table.add_row(*cells, "take this" if one == found.advice.recommended else mark, style=style)
    if len(shown) < len(found.candidates):
        table.caption = f"the frontier of {len(found.candidates)} checkpoints"
    return table


def _kls_shown(found: Pick) -> list[str]:
    """The KLs that are weighed: all where the drop is not, else those that have a budget."""
    return [of for of in found.frontiers if of != DROP and (DROP not in found.frontiers or of in found.limits.most)]


def _marked(found: Pick) -> list[ScoredCheckpoint]:
    """Those on a frontier, and the recommended one."""
    return [
        one
        for one in found.candidates
        if one == found.advice.recommended or any(one in front for front in found.frontiers.values())
    ]


def _drop_cell(one: ScoredCheckpoint) -> str:
    if (drop := one.drop) is None:
        return ""
    known = drop.low != drop.high and math.isfinite(drop.high)
    return f"{100 * drop.drop:.1f}" + (f" [{100 * drop.low:.1f}, {100 * drop.high:.1f}]" if known else "")


def _kl_cell(one: ScoredCheckpoint, of: str) -> str:
    if of not in one.kl:
        return ""
    kl = one.kl[of]
    return f"{kl.mean:.3f}" + (f" ± {kl.stderr:.3f}" if math.isfinite(kl.stderr) and kl.stderr else "")


def draw(found: Pick, folder: Path) -> None:
    """A panel for each frontier that is weighed."""
    shown = ([DROP] if DROP in found.frontiers else []) + _kls_shown(found)
    if not shown:
        raise RazorError("There is no frontier to draw: nothing is known of these checkpoints that may be relied on.")
    panels = [_panel(found, of) for of in shown]
    drawing.save(Figure("pick", panels, columns=len(panels)), folder)


def _panel(found: Pick, of: str) -> Panel:

    scale = 100 if of == DROP else 1
    known = [one for one in found.candidates if one.interval(of) is not None]

    def points(label: str, own: Sequence[ScoredCheckpoint], color: str, symbol: str, size: float) -> Points:
        ends = np.array([one.interval(of) for one in own], float).reshape(-1, 3) * scale
        ends = np.where(np.isfinite(ends), ends, ends[:, :1])  # no bar where the error is not known
        x = np.array([one.new for one in own])
        return Points(label, x, ends[:, 0], Marker(color, symbol, size=size), interval=Interval(ends[:, 1], ends[:, 2]))

    front = found.frontiers[of]
    line = sorted(front, key=lambda one: one.new)
    layers: list[Layer] = [
        Curve("frontier", np.array([one.new for one in line]), np.array([scale * one.at(of) for one in line]), INK),
        points("checkpoint", [one for one in known if one not in front], "#999999", "circle", 5.0),
        points("on the frontier", front, PALETTE[0], "circle", 6.0),
        points("recommended", [one for one in known if one == found.advice.recommended], PALETTE[1], "star", 12.0),
    ]
    label = f"{kind_of(found.candidates[0])} drop of the prior score, points" if of == DROP else f"{NAMES[of]}, nats"
    return Panel("Which checkpoint to take", Axis(found.metric, percent=False), Axis(label, percent=False), layers)
