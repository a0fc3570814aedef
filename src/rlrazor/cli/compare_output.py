"""What `razor compare` prints: tables and sentences, or JSON."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlrazor.analysis.lost import SHOWN, Transitions
from rlrazor.cli.printing import console_for_tables
from rlrazor.guard.base_side import shortened
from rlrazor.guard.comparison import Comparison
from rlrazor.guard.comparison_page import (
    LABELS,
    distance_headers,
    score_headers,
    sentences,
    settings_of,
    shown_depth,
    shown_floor,
    shown_scores,
    told_apart,
    verdict,
)
from rlrazor.guard.judgement import Judgement, worst
from rlrazor.guard.lost_items import HEADERS, in_turn, shown_changes, shown_item
from rlrazor.guard.parts import as_json as parts_json
from rlrazor.guard.parts import headers, shown_parts
from rlrazor.guard.scale import known_runs, shown_estimate
from rlrazor.guard.truth import Truth
from rlrazor.guard.verdict import Verdict
from rlrazor.guard.weight_changes import WeightChange

WORST = 3  # prompts in the terminal
CATEGORIES = 10  # of a prior task, there
LINE = 90  # characters of one
WIDE = 110  # of a terminal: there only a task's name is wrapped, and a metric's that is as LONG
LONG = 15
WIDEST = 140  # there a figure and its interval are on a line in the table of items too


def as_json(found: Comparison, judged: Sequence[Judgement] = ()) -> dict[str, Any]:
    """All of it but the tokens; what does not exist, such as a standard error, is null, or NaN.

    `verdict`, `interval`, `above` and `fail_above` are of the judgement that decides; `judgements` has all of them.
    """
    deciding, by_law, first = worst(judged), found.law_says, found.distances.focus.first_tokens
    drop = next((one for one in judged if "drop" in one.of), None)
    return {
        "base": found.pair.base,
        "tuned": found.pair.tuned,
        "same": found.same,
        "kl": {name: one._asdict() for name, one in found.kl.items()},
        "per_token": {name: one._asdict() for name, one in found.per_token.items()},
        "depth": {"tokens": first, **{name: one.as_json() for name, one in found.distances.depth.items()}},
        "drop": found.drop,
        "forecast": None if by_law is None else asdict(by_law.forecast),
        "level": None if by_law is None else by_law.law.level,
        "law": None if by_law is None else by_law.law.describe(),
        "truth": None if found.truth is None else _truth(found.truth),
        "fail_above": None if drop is None else drop.limit,
        "judgements": [asdict(one) for one in judged],
        "verdict": None if deciding is None else deciding.verdict.value,
        "interval": None if deciding is None else [deciding.low, deciding.high],
        "above": any(one.verdict is Verdict.ABOVE for one in judged),
        "summary": [*(one.sentence for one in judged), verdict(found), *sentences(found)],
        "noise": asdict(found.distances.noise),
        "where": {**asdict(found.distances.focus), "at_the_beginning": found.distances.focus.at_the_beginning},
        "known_runs": known_runs() if by_law is None else None,
        "prompts": [
            {"said": one.said, "prompt": one.prompt, "kl_forward": one.total, "first_share": one.share_of_first(first)}
            for one in found.prompts
        ],
        "weights": _change(found.weights.whole),
        "layers": [_change(layer) for layer in found.weights.layers],
        "cknna": found.distances.cknna,
        "precision": found.pair.dtype,
        "first_prompt": found.setup.first_prompt,
        "settings": found.setup.as_json(),
        "notes": list(found.notes),
    }


def _change(change: WeightChange) -> dict[str, Any]:
    return {**asdict(change), "relative": change.relative}


_OF_TASK = ("base", "tuned", "drop", "stderr", "interval", "paired", "n", "metric", "higher_is_better", "fraction")
_OF_ALL = ("drop", "stderr", "interval", "level", "limit")


def _truth(truth: Truth) -> dict[str, Any]:
    tasks = {name: {of: getattr(task, of) for of in _OF_TASK} for name, task in truth.tasks.items()}
    scores = {of: {name: task[of] for name, task in tasks.items()} for of in ("base", "tuned")}
    items = {name: one.as_json() for name, one in truth.items.items()}
    floor = None if truth.floor is None else {**truth.floor.model_dump(), "of_mean": truth.mean_floor}
    return {
        "tasks": tasks,
        "items": items,
        "noise_floor": floor,
        "parts": {name: parts_json(one) for name, one in truth.parts.items()},
        "recovery": None if truth.recovered is None else truth.recovered.as_json(),
        **scores,
        **{of: getattr(truth, of) for of in _OF_ALL},
    }


def print_findings(found: Comparison, judged: Sequence[Judgement]) -> None:
    """Tables, what moved most, cautions, and last the verdict."""
    console = console_for_tables()
    console.print(_distances(found))
    weights = f"Weights: L2 of the change {found.weights.l2:.4g} ({100 * found.weights.whole.relative:.3g} %), "
    weights += f"{100 * found.weights.unchanged:.1f} % exactly as before."
    if not found.weights.layers:
        weights = "Weights: not compared."
    if found.distances.cknna is not None:
        weights += f" CKNNA on the generic probe {found.distances.cknna:.3f}."
    console.print(weights, highlight=False)
    if found.truth is not None:
        console.print(_scores(found.truth, wide=console.width >= WIDE))
        if found.truth.parts:
            console.print(_parts(found.truth, console))
        if found.truth.items:
            _print_items(found.truth, console)
    shown = dict(settings_of(found.setup, found.pair.dtype))
    measured = (f"{name} {shown[name]}" for name in ("prompts", "completions", "generic probe"))
    console.print(Text(f"Settings: {'; '.join(measured)}; {found.pair.dtype}.", style="dim"))
    console.print(Text(f"The first prompt, as measured in {found.pair.dtype}: {shortened(found.setup.first_prompt)!r}"))
    if not found.same:
        _print_moved(found, console)
    for sentence in sentences(found):
        console.print(Text(sentence))
    for note in found.notes:
        console.print(Text(note, style="yellow"))
    console.print(Text(verdict(found), style="bold"))
    for one in judged:
        console.print(Text(one.sentence, style="bold"))


def _print_moved(found: Comparison, console: Console) -> None:
    first = found.distances.focus.first_tokens
    console.print(f"Moved most, nats of forward KL and its share in the first {first} tokens:", highlight=False)
    for prompt, line in list(zip(found.prompts, told_apart(found.prompts), strict=True))[:WORST]:
        cut = f"{line[:LINE]}{'…' if len(line) > LINE else ''}"
        console.print(Text(f"  {prompt.total:8.3f} {100 * prompt.share_of_first(first):4.0f} %  {cut}"))


def _print_items(truth: Truth, console: Console) -> None:
    table, whole, wide = Table(box=box.SIMPLE_HEAD), console.width >= WIDE, console.width >= WIDEST
    for number, header in enumerate(HEADERS):
        first = number == 0
        table.add_column(header, justify="left" if first else "right", overflow="fold", no_wrap=first and whole)

    def add(name: str, of: Transitions) -> None:
        cells = shown_changes(of)
        table.add_row(Text(name), *(Text(cell if wide else cell.replace(" [", "\n[")) for cell in cells))

    for name, one in truth.items.items():
        add(name, one.whole)
        for category, part in list(one.categories.items())[:CATEGORIES]:
            add(f"  {category}", part)
        if (more := len(one.categories) - CATEGORIES) > 0:
            table.add_row(Text(f"  and {more} more, on the page"))
    console.print(table)
    listed = in_turn(truth.items, SHOWN)
    if not listed:
        return
    console.print(
        "Lost most surely, by how far the right answer fell behind the best wrong one; without answers to choose "
        "among, the first that were lost. Task by task in turn; more on the page:",
        highlight=False,
    )
    for name, lost in listed:
        console.print(Text(f"  {name}: {shown_item(lost)}"), soft_wrap=False)


def _distances(found: Comparison) -> Table:
    title = Text(f"{found.pair.tuned} against {found.pair.base}")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for number, header in enumerate(distance_headers(found)):
        table.add_column(header, justify="right" if number else "left")
    for name, label in LABELS.items():
        whole = shown_estimate(found.kl[name]), shown_estimate(found.per_token[name])
        table.add_row(label, *whole, *shown_depth(found.distances.depth[name]))
    return table


def _parts(truth: Truth, console: Console) -> Table:
    table, wide = Table(box=box.SIMPLE_HEAD), console.width >= WIDEST
    for number, header in enumerate(headers(recovered=truth.recovered is not None)):
        table.add_column(header, justify="right" if number else "left", overflow="fold")
    for name, one in truth.parts.items():
        cells = shown_parts(one)
        table.add_row(Text(name), *(Text(cell if wide else cell.replace(" [", "\n[")) for cell in cells))
    return table


def _scores(truth: Truth, *, wide: bool) -> Table:
    scores = Table(box=box.SIMPLE_HEAD)
    long = truth.floor is not None or any(len(task.metric) > LONG for task in truth.tasks.values())
    wrapped = ["prior task"] + ["metric"] * long
    for header in score_headers(truth):
        scores.add_column(
            f"{truth.level:.0%} interval" if header == "interval" else header,
            justify="left" if header in ("prior task", "metric") else "right",
            overflow="fold",
            no_wrap=wide and header not in wrapped,
        )
    for task, change in truth.tasks.items():
        scores.add_row(Text(task), *shown_scores(change), *shown_floor(truth, task))
    return scores
