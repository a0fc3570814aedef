"""Numbers as people read them: per cent to a tenth, a mean with half its interval, a difference with its sign."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from rlrazor.analysis.statistics import Estimate

NEVER = "—"
INTERVALS = "±: half the 95 % t-interval of a mean over seeds; differences are taken seed by seed."
MATCHED = (
    "At new ≥ T: a run is stopped at its first checkpoint whose new score is at least T. Of a seed’s runs that get "
    "there, the one is taken whose learning rate, schedule and length got there in the largest number of the other "
    "seeds and forgot least in them, the lowest learning rate where no other seed tells; so no seed is reported at a "
    "learning rate that its own score chose."
)


def minus(text: str) -> str:
    """With the sign that is as wide as a plus."""
    return text.replace("-", "−")


def percent(value: float | None) -> str:
    """A fraction of 1 as per cent, to a tenth."""
    return NEVER if value is None else minus(f"{100 * value:z.1f}")


def number(value: float | None) -> str:
    """A statistic, to two decimals; three where two would round to 1, as R² of .996 does."""
    if value is None:
        return NEVER
    return minus(f"{value:z.2f}" if abs(value) < 0.995 else f"{value:.3f}")


def written(estimate: Estimate | None, form: Callable[[float], str] = percent) -> str:
    """The mean, and half the interval if there is one: "77.3 ± 0.4". A dash where there is nothing."""
    if estimate is None:
        return NEVER
    return form(estimate.mean) + ("" if estimate.half is None else f" ± {form(estimate.half)}")


def with_seeds(text: str, estimate: Estimate | None, total: int) -> str:
    """A cell, and the seeds that it rests on where these are not all of `total`."""
    some = estimate is not None and estimate.seeds < total
    return text + (f" ({of_all(estimate, total)} seeds)" if some else "")


def of_all(estimate: Estimate | None, total: int) -> str:
    """How many seeds a cell rests on: "3", "2 of 3"."""
    count = estimate.seeds if estimate else 0
    return NEVER if not count else str(count) if count == total else f"{count} of {total}"


def by_seeds(names: Sequence[str]) -> str:
    """What was chosen in each seed: one name for all, else "A (2 of 3 seeds), B (1 of 3 seeds)"; a dash for none."""
    counts = Counter(names).most_common()
    if len(counts) < 2:
        return "".join(counts[0][:1]) if counts else NEVER
    return ", ".join(f"{name} ({count} of {len(names)} seeds)" for name, count in counts)


def nats(value: float) -> str:
    """A KL, to two decimals."""
    return minus(f"{value:z.2f}")


def signed(estimate: Estimate | None, form: Callable[[float], str] = percent) -> str:
    """A difference with its sign: "+6.1 ± 2.0", "−3.0"; without, where it is rounded to nothing."""
    if estimate is None:
        return NEVER
    sign = "−" if estimate.mean < 0 else "+"
    is_nothing = form(abs(estimate.mean)) == form(0.0)
    return ("" if is_nothing else sign) + written(replace(estimate, mean=abs(estimate.mean)), form)


def ranged(value: float, interval: tuple[float, float], form: Callable[[float], str] = percent) -> str:
    """A number with the ends of its interval: "2.5 [1.6, 4.0]"."""
    return f"{form(value)} [{form(interval[0])}, {form(interval[1])}]"


def points(value: float) -> str:
    """A difference in points with its sign: "+1.3"; without, where it is rounded to nothing."""
    text = percent(value)
    return text if value < 0 or text == percent(0.0) else f"+{text}"


def how_many(count: int, noun: str) -> str:
    """The count with its noun: "1 seed", "300 checkpoints"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
