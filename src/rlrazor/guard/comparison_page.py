"""What `compare` found, for people: a sentence, and a page that opens offline."""

from __future__ import annotations

import math
from pathlib import Path

import jinja2
import numpy as np

from rlrazor.forecast import FORWARD, PROBE
from rlrazor.guard.compare import REVERSE, Comparison, TaskChange, Truth
from rlrazor.lm.kl import Estimate
from rlrazor.writing import write_text

LABELS = {FORWARD: "forward KL, new task", REVERSE: "reverse KL, new task", PROBE: "forward KL, generic probe"}
SHOWN = 30  # prompts on the page
DARKEST = 0.75  # opacity of the shade at the top of the scale: text has to stay readable
TOP = 0.99  # quantile of the tokens' KL that is the top of the scale, so that one outlier does not blanch the rest

_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
)


def write_page(found: Comparison, path: Path, shown: int = SHOWN) -> Path:
    """Write the page; raises RazorError where it cannot be written."""
    kls = [kl for prompt in found.prompts for part in (prompt.base, prompt.tuned) for of in part for kl in of.kl]
    top = float(np.quantile(kls, TOP)) if kls else 0.0

    def shade(kl: float) -> str:
        return f"{DARKEST * min(1.0, kl / top):.2f}" if top > 0 else "0"

    html = _TEMPLATES.get_template("compare.html").render(
        found=found,
        verdict=verdict(found),
        labels=LABELS,
        estimate=shown_estimate,
        scores=shown_scores,
        mean_drop=None if found.truth is None else shown_drop(found.truth),
        shown=found.prompts[:shown],
        shade=shade,
        top=top,
        darkest=DARKEST,
    )
    write_text(path, html, "page")
    return path


def verdict(found: Comparison) -> str:
    """The forecast and the truth, as far as there are any, in a sentence or two."""
    parts = []
    if found.forecast is not None:
        shown = found.forecast
        parts.append(
            f"Forecast: the prior score drops by {100 * shown.drop:.1f} points "
            f"[{100 * shown.low:.1f}, {100 * shown.high:.1f}] ({found.level:.0%} interval)."
        )
    if found.truth is not None and found.truth.drop is not None:
        said = f"Measured: it drops by {shown_drop(found.truth)}"
        if found.forecast is not None:
            inside = found.forecast.low <= found.truth.drop <= found.forecast.high
            said += ", which is in the interval" if inside else ", which is not in the interval"
        parts.append(f"{said}.")
    if found.forecast is None:
        parts.append("Uncalibrated: without a law, KL says nothing about scores. `razor calibrate` makes one.")
    return " ".join(parts)


def shown_drop(truth: Truth) -> str | None:
    """The mean drop with its standard error, where there are any."""
    if truth.drop is None:
        return None
    error = "" if truth.stderr is None else f" ± {100 * truth.stderr:.1f}"
    return f"{100 * truth.drop:.1f}{error} points"


def shown_scores(task: TaskChange) -> tuple[str, str, str, str]:
    """The metric with its direction, the two scores, and by how much the tuned model is worse, in the score's unit."""
    metric = f"{task.metric}, {'more' if task.higher_is_better else 'less'} is better"
    if not task.fraction:
        return metric, f"{task.base:.4g}", f"{task.tuned:.4g}", f"{task.drop:.4g}"
    return metric, f"{100 * task.base:.1f} %", f"{100 * task.tuned:.1f} %", f"{100 * task.drop:.1f} points"


def shown_estimate(estimate: Estimate) -> str:
    """Nats with their standard error."""
    return f"{estimate.mean:.4f}" + (f" ± {estimate.stderr:.4f}" if math.isfinite(estimate.stderr) else "")
