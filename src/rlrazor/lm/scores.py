"""Scores on prior tasks: what a number is called, whether it is a fraction, and the mean of several."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from rlrazor.errors import RazorError

# Metrics whose values may lie between 0 and 1 and are no fractions, whichever way is better: BLEU goes to 100.
OWN_UNITS = re.compile(
    r"perplexity|bits_per|likelihood|log_?prob|(^|_)(ppl|nll|loss)(_|$)|brier|bleu(?!.*_acc)|chrf|^ter$|^mcc$|_diff$|"
    r"entropy|corr(elation)?$|(^|_)(pearson|spearman|kendall)|(^|_)r2$|latency|seconds|tokens|length"
)
# Of those of which less is better the few that are: squared errors, distances and divergences have a unit of their own.
_LESS_AND_FRACTIONS = re.compile(r"(^|_)(rate|ratio|share|fraction|error|err|[wc]er)$|^pct_")


@dataclass(frozen=True)
class Metric:
    """What a task is scored by, and whether more of it is better, as lm-eval declares them."""

    metric: str
    higher_is_better: bool

    @property
    def is_fraction(self) -> bool:
        """Whether scores are fractions of 1, as far as the name tells: of one that is not known here, they may be."""
        known = self.higher_is_better or _LESS_AND_FRACTIONS.search(self.metric) is not None
        return known and OWN_UNITS.search(self.metric) is None


@dataclass(frozen=True)
class Question:
    """What an item asks, and what a model took for likely.

    `prompt`: its end, after "…" where it is longer. Where the model chooses among answers: `choices`, their texts;
    `logprobs`, the log-likelihood of each in nats as the metric compares them (of `acc_norm` per character of the
    answer, of `acc_bytes` per byte); and `right`, the places of the right ones, empty where the outcome is not whether
    the likeliest is one of them.
    """

    prompt: str
    choices: tuple[str, ...] = ()
    logprobs: tuple[float, ...] = ()
    right: tuple[int, ...] = ()


_NOTHING = Question("")


@dataclass(frozen=True)
class Robust:
    """Outcomes by a parser that forgives the template, named by `by`: task -> item -> 1 for right, named as in
    `ItemResults.outcomes`.

    None is less than the strict parser's.
    """

    by: str
    outcomes: Mapping[str, Mapping[str, float]] = field(repr=False)


@dataclass(frozen=True)
class ItemResults:
    """What became of the items of a group's tasks, or of the task itself.

    `outcomes`: task -> item -> its outcome, the same item having the same name whichever model is scored; empty where
    the score is no mean of outcomes, as perplexity and BLEU are none. `by_size`: each item of a group counts the same,
    as lm-eval has it, or else each of its tasks. `questions`: what the items ask, by the same names. `categories`: of a
    group's tasks, the group that each is in, such as mmlu_stem, or its own name where it is in none below this one.
    `robust`: the same generations read by a parser that forgives the template; None where there is none.
    """

    outcomes: Mapping[str, Mapping[str, float]] = field(default_factory=dict, repr=False)
    by_size: bool = True
    questions: Mapping[str, Mapping[str, Question]] = field(default_factory=dict, repr=False)
    categories: Mapping[str, str] = field(default_factory=dict, repr=False)
    robust: Robust | None = field(default=None, repr=False)

    def names(self) -> list[tuple[str, str]]:
        """Of the items whose outcomes are known: (task, item) of each, in the order of the outcomes."""
        return [(task, item) for task, items in self.outcomes.items() for item in items]

    def question(self, task: str, item: str) -> Question:
        """What an item asks; an empty one where that is not known."""
        return self.questions.get(task, {}).get(item, _NOTHING)

    @property
    def robust_mean(self) -> float | None:
        """Of the robust outcomes, the items weighed as in the score; None where there are none."""
        if self.robust is None:
            return None
        tasks = [list(of.values()) for of in self.robust.outcomes.values()]
        if self.by_size:
            return fmean(one for of in tasks for one in of)
        return fmean(fmean(of) for of in tasks)


@dataclass(frozen=True)
class Score:
    """A task's score and its standard error over the `n` items, None where it cannot be estimated.

    Both are fractions of 1 where `is_fraction`, else in the metric's own unit. `items`: what became of each.
    """

    value: float
    stderr: float | None
    n: int
    metric: str
    version: str
    higher_is_better: bool = True
    items: ItemResults = field(default_factory=ItemResults, repr=False)

    @property
    def is_fraction(self) -> bool:
        """Whether it is a fraction of 1, as accuracies are."""
        return 0 <= self.value <= 1 and Metric(self.metric, self.higher_is_better).is_fraction


class NotANumberError(RazorError):
    """A task's score is NaN or infinite: its own fault, or that of a model whose outputs are."""


class PriorScores(dict[str, Score]):
    """Task -> Score, and what a reader of the scores has to know about them (`notes`, sentences)."""

    def __init__(self, scores: Mapping[str, Score], notes: Sequence[str] = ()) -> None:
        super().__init__(scores)
        self.notes = tuple(notes)

    @property
    def mean(self) -> float:
        """The prior score: the mean over tasks, a fraction of 1 where all are (`require_accuracies`)."""
        return sum(score.value for score in self.values()) / len(self)

    @property
    def stderr(self) -> float | None:
        """Standard error of the mean, the tasks' items being different ones; None where a task has none."""
        return stderr_of_mean(score.stderr for score in self.values())


def stderr_of_mean(errors: Iterable[float | None]) -> float | None:
    """Standard error of a mean of independent scores by theirs; None, for unknown, where one of them has none."""
    found = list(errors)
    known = [error for error in found if error is not None]
    return math.hypot(*known) / len(known) if known and len(known) == len(found) else None


def require_accuracies(found: Mapping[str, Metric] | Mapping[str, Score]) -> None:
    """Raise RazorError unless every score is a fraction of 1 of which more is better.

    Those alone can go into the mean of a record, and forgetting is the drop of that mean.
    """
    for name, one in found.items():
        if not (one.higher_is_better and one.is_fraction):
            what = "which is not a fraction of 1" if one.higher_is_better else "of which less is better"
            raise RazorError(
                f"{name} is scored by {one.metric}, {what}: forgetting is the drop of a mean of fractions of 1 of "
                "which more is better, such as accuracies. Leave the task out; `razor compare --prior` measures it "
                "beside others."
            )
