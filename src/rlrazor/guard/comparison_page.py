"""What `compare` found, for people: sentences, and a page that opens offline."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np

from rlrazor.analysis.forecast import FORWARD, PROBE
from rlrazor.guard import scale
from rlrazor.guard.comparison import REVERSE, Comparison, Completion, MeasuringSetup, PromptDrift
from rlrazor.guard.judgement import Judgement, worst
from rlrazor.guard.lost_items import HEADERS, MARGIN, shown_changes
from rlrazor.guard.parts import headers, said_of, shown_parts
from rlrazor.guard.truth import TaskChange, Truth
from rlrazor.lm.probes import GenericText
from rlrazor.lm.task_names import ALL
from rlrazor.system.writing import write_text

LABELS = {FORWARD: "forward KL, new task", REVERSE: "reverse KL, new task", PROBE: "forward KL, generic probe"}
SHOWN = 30  # prompts on the page
DARKEST = 0.75  # opacity of the shade at the top of the scale: text has to stay readable
TOP = 4.0  # nats at a token that have the darkest shade on every page, so that pages can be told apart at a glance
TICKS = (0.0, 0.01, 0.1, 0.5, 1.0, 2.0, TOP)
DECADES = (-4, 2)  # of nats per completion, of the histogram on every page
PER_DECADE = 2
LONG_OPENING = 30  # characters that all prompts begin, or end, with: more are left out of a list

TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
)


def write_page(found: Comparison, path: Path, judged: Sequence[Judgement] = ()) -> Path:
    """Write the page; raises RazorError where it cannot be written."""
    html = TEMPLATES.get_template("compare.html").render(
        found=found,
        verdict=verdict(found),
        judged=judged,
        worst=worst(judged),
        labels=LABELS,
        estimate=scale.shown_estimate,
        score_headers=None if found.truth is None else score_headers(found.truth),
        floor=shown_floor,
        scores=shown_scores,
        item_headers=HEADERS,
        changes=shown_changes,
        margin=MARGIN,
        mean_drop=None if found.truth is None else shown_drop(found.truth),
        said=sentences(found),
        settings=settings_of(found.setup, found.pair.dtype),
        per_decade=PER_DECADE,
        histogram=histogram([prompt.total for prompt in found.prompts]),
        largest=max((layer.relative for layer in found.weights.layers), default=0.0) or 1.0,
        shown=found.prompts[:SHOWN],
        first=found.distances.focus.first_tokens,
        distance_headers=distance_headers(found),
        depth=shown_depth,
        part_headers=headers(recovered=found.truth is not None and found.truth.recovered is not None),
        parts=shown_parts,
        labelled=labelled,
        all_turns=ALL,
        shade=shade,
        ticks=TICKS,
        known=scale.known_runs() if found.law_says is None else None,
    )
    write_text(path, html, "page")
    return path


def shade(kl: float) -> str:
    """The opacity of a token's background: by the root of its KL, so that small ones show, TOP and above the darkest.

    The same for every page.
    """
    return f"{DARKEST * math.sqrt(min(1.0, max(kl, 0.0) / TOP)):.2f}"


@dataclass(frozen=True)
class Bar:
    """A bar of a histogram: its ends in nats, `low` 0 and `high` infinite in the outermost, and its count."""

    low: float
    high: float
    count: int


def histogram(values: Sequence[float]) -> list[Bar]:
    """Counts of nats per completion in steps of a factor, the same for every page."""
    first, last = DECADES
    inner = 10.0 ** np.linspace(first, last, (last - first) * PER_DECADE + 1)
    edges = np.array([0.0, *inner, np.inf])
    counts = np.bincount(np.searchsorted(inner, values, side="right"), minlength=len(edges) - 1)
    return [
        Bar(float(low), float(high), int(count)) for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
    ]


def verdict(found: Comparison) -> str:
    """The forecast and the truth, as far as there are any, in a sentence or two."""
    parts = []
    if found.same:
        parts.append("The two are the same model: no weight has changed, and KL is 0 within the noise of measuring it.")
    if (by_law := found.law_says) is not None:
        drop, low, high = (100 * one for one in (by_law.forecast.drop, by_law.forecast.low, by_law.forecast.high))
        interval = f"[{low:.1f}, {high:.1f}] ({by_law.law.level:.0%} interval)"
        parts.append(f"Forecast: the prior score drops by {drop:.1f} points {interval}.")
    if found.truth is not None and found.truth.drop is not None:
        said = f"Measured: it drops by {shown_drop(found.truth)}"
        if (floor := found.truth.mean_floor) is not None:
            said += f", noise floor {100 * floor:.1f} points"
        if by_law is not None:
            inside = by_law.forecast.low <= found.truth.drop <= by_law.forecast.high
            said += f", which is {'' if inside else 'not '}in the forecast's interval"
        parts += [f"{said}.", *said_of(found.truth.parts)]
    if by_law is None and not found.same:
        parts.append("Uncalibrated: without a law, KL says nothing about scores. `razor calibrate` makes one.")
    return " ".join(parts)


def sentences(found: Comparison) -> list[str]:
    """What can be said of the KL itself: noise, known runs where there is no law, and where it lies."""
    per_token = found.per_token[FORWARD]
    said = [scale.against_noise(per_token, found.distances.noise)]
    if found.same:
        return said
    if found.law_says is None:
        said.append(scale.against_known(found.per_token))
    return [*said, scale.where(found.distances.focus)]


def settings_of(setup: MeasuringSetup, precision: str) -> list[tuple[str, str]]:
    """How it was measured, a name and a text each."""
    probe, given, sources = setup.on.settings, len(setup.on.prompts), setup.sources
    fitting = "" if setup.measured == given else f", of which {setup.measured} fit into the context"
    where = f"of {sources['prompts']}" if "prompts" in sources else "given"
    generic_hash = setup.on.generic.content_hash
    own, prior, suite = setup.on.generic.own, setup.on.generic.prior, setup.suite
    generic = (
        f"texts of at most {own.max_new_tokens} tokens, which the base wrote from nothing, seed {own.seed}"
        if own
        else f"prompts of {', '.join(prior.tasks)}, with at most {prior.max_new_tokens or probe.max_new_tokens} tokens "
        "that the base sampled after each"
        if prior
        else "texts, built in"
        if setup.on.generic == GenericText.built_in()
        else f"rows of {sources['generic']}"
        if "generic" in sources
        else "rows"
    )
    told = [f"{name} = {json.dumps(value)}" for name, value in probe.chat_template_kwargs.items()]
    rows = [
        ("prompts", f"{given} {where}{fitting} (hash {setup.on.prompts_hash})"),
        ("completions", f"{probe.samples} of each prompt, of at most {probe.max_new_tokens} tokens"),
        ("stop", ", ".join(map(repr, probe.stop)) or "the model's end of sequence"),
        ("chat template", ", ".join(["where there is one" if probe.chat else "not used", *told])),
        *([("turns", "the earlier ones of the assistant's too, as they are")] if probe.turns == ALL else []),
        ("generic probe", f"{setup.on.generic.count} {generic} (hash {generic_hash})"),
        ("law", sources.get("law", "none")),
        ("precision", precision),
        ("intervals", f"{setup.level:.0%}"),
        ("items of a prior task", f"at most {suite.limit}" if suite and suite.limit else "all"),
        *([("prior tasks are asked", suite.asking.words)] if suite and suite.asking.as_json() else []),
        ("date", setup.date),
        ("versions", ", ".join(f"{name} {version}" for name, version in setup.versions.items())),
    ]
    return rows + ([("command", sources["command"])] if "command" in sources else [])


def labelled(prompt: PromptDrift) -> list[tuple[str, list[Completion]]]:
    """What is shown below a prompt, with whose words they are: first those that the base's KL is of, then the tuned's.

    Both models are measured on the turns that a conversation has already, which neither of them said.
    """
    shown: list[tuple[str, list[Completion]]] = []
    for who, kind, completions in (("base", "forward", prompt.base), ("tuned model", "reverse", prompt.tuned)):
        given = [one for one in completions if one.given]
        shown += [
            (f"turn {number} of the assistant, as the prompt has it, shaded by {kind} KL", [one])
            for number, one in enumerate(given, 1)
        ]
        shown.append((f"what the {who} says, shaded by {kind} KL", [one for one in completions if not one.given]))
    return shown


def told_apart(prompts: Sequence[PromptDrift]) -> list[str]:
    """What the user said last in each, on a line, without the words that all of them begin or end with, if many."""
    lines = [" ".join((prompt.said or prompt.prompt).split()) for prompt in prompts]
    if len(set(lines)) < 2:
        return lines
    opening = os.path.commonprefix(lines)  # noqa: RUF071  # characters are meant
    ending = os.path.commonprefix([line[::-1] for line in lines])  # noqa: RUF071
    start, end = opening.rfind(" ") + 1, ending.rfind(" ") + 1  # at a word
    shortest = min(map(len, lines))
    if start > LONG_OPENING:
        lines = [f"… {line[start:]}" for line in lines]
    if end > LONG_OPENING and start + end < shortest:
        lines = [f"{line[: len(line) - end]} …" for line in lines]
    return lines


def shown_drop(truth: Truth) -> str | None:
    """The mean drop with its standard error and interval, where there are any."""
    if truth.drop is None:
        return None
    error = f" ± {100 * truth.stderr:.1f}" if truth.stderr else ""  # 0 says only that no item differed
    interval = truth.interval
    between = "" if interval is None else f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"
    return f"{100 * truth.drop:.1f}{error} points{between}" + (f" ({truth.level:.0%} interval)" if between else "")


SCORE_HEADERS = ("prior task", "metric", "base", "tuned", "worse by", "interval", "paired error", "n")


def distance_headers(found: Comparison) -> tuple[str, ...]:
    """Of the table of KLs."""
    first = found.distances.focus.first_tokens
    return "distance, nats", "per completion", "per token", f"first {first} tokens", "the rest"


def shown_depth(depth: scale.Depth) -> tuple[str, str]:
    """Per token of the first tokens, and of the rest."""
    return scale.shown_estimate(depth.first), "—" if depth.rest is None else scale.shown_estimate(depth.rest)


def score_headers(truth: Truth) -> tuple[str, ...]:
    """With the noise floor, where it was measured."""
    return SCORE_HEADERS if truth.floor is None else (*SCORE_HEADERS, "noise floor")


def shown_floor(truth: Truth, name: str) -> tuple[str, ...]:
    """The most by which a task's score in the base differs from itself, in its unit; no cell where not measured."""
    if truth.floor is None:
        return ()
    apart = truth.floor.of_task(name)
    return (f"{100 * apart:.1f} points" if truth.tasks[name].fraction else f"{apart:.4g}",)


def shown_scores(task: TaskChange) -> tuple[str, ...]:
    """The metric with its direction, the two scores, and by how much the tuned model is worse, in the score's unit.

    With the interval and the standard error of that, and on how many items.
    """
    metric = f"{task.metric}, {'more' if task.higher_is_better else 'less'} is better"
    unpaired = "" if task.paired else " (not paired)"
    if task.fraction:
        scores = (f"{100 * task.base:.1f} %", f"{100 * task.tuned:.1f} %", f"{100 * task.drop:.1f} points")
        interval = None if task.interval is None else "[{:.1f}, {:.1f}]".format(*(100 * end for end in task.interval))
        error = None if task.stderr is None else f"± {100 * task.stderr:.1f}{unpaired}"
    else:
        scores = (f"{task.base:.4g}", f"{task.tuned:.4g}", f"{task.drop:.4g}")
        interval = None if task.interval is None else "[{:.4g}, {:.4g}]".format(*task.interval)
        error = None if task.stderr is None else f"± {task.stderr:.4g}{unpaired}"
    if task.paired and task.stderr == 0 and not task.drop:
        error = "no item differs"
    return metric, *scores, interval or "unknown", error or "unknown", f"{task.n:,}"
