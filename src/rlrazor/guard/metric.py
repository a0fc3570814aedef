"""The new-task score in what a Trainer has logged: which one it is, and whether less of it is better."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlrazor.errors import RazorError

METRICS = (
    *("eval_reward", "eval_accuracy", "eval_exact_match", "eval_pass@1", "eval_rewards/accuracies"),
    *("eval_mean_token_accuracy", "reward", "accuracy", "rewards/accuracies", "mean_token_accuracy"),
    *("eval_loss", "loss"),
)
"""What is taken for the new-task score, unless one is named: the first of them that the run has logged."""

# Metrics of which less is better, by a word that ends their names, but for a statistic after it.
_LESS = (
    r"perplexit(y|ies)|ppl|[cdemtw]er|wil|errs?|errors?|failures?|fail|false_(positive|negative)s?|fpr|fnr|"
    r"misclassifications?|hallucinations?|violations?|toxicity|regret|r?mse|r?msle|s?mape|mae|mase|"
    r"nll|neg(ative)?_log_?likelihood|likelihood_diff|pct_stereotype|deviance|cross_?entropy|xent|ce|"
    r"(approx_?)?kld?|kl_div|jsd?|divergence|bp[bcw]|bits_per_(byte|char|character|token|word)|brier(_score)?|[em]ce|"
    r"distance|levenshtein|fid|crps"
)
_STATISTIC = (
    r"mean|avg|average|median|min|max|sum|total|std|stderr|rate|ratio|count|percent|pct|micro|macro|weighted|norm|"
    r"normali[sz]ed|first|last|final|best|all|overall|none|train|test|val|valid|validation|eval|dev|"
    r"per|token|word|byte|char|character|sample|example|sequence|completion|step|epoch"
)
# Some of the words say so anywhere, as in eval_loss_gsm8k, unless a better thing is made of them.
_BETTER = r"reduction|improvement|decrease|drop|gain|acc|accuracy|reward|success|match|f1|em"
_LOWER = re.compile(
    rf"(loss|(^|[^a-z])({_LESS}))([^a-z]+({_STATISTIC}))*[^a-z]*$|"
    rf"(^|[^a-z])(loss|perplexity|ppl|[cw]er|nll|r?mse|mae)(?=[^a-z])(?!.*[^a-z]({_BETTER})[^a-z]*$)"
)
# Scikit-learn's are negated; the negative log-likelihood is not the negation of something of which less is better.
_NEGATED = re.compile(
    r"(^|(?<!false)(?<!true)[^a-z])(neg|negative|minus|inv|inverse)[^a-z](?!log_?likelihood|sample)|^(eval_)?1 ?- ?"
)


@dataclass(frozen=True)
class NewScore:
    """Which metric of a trainer's log is the new-task score; None: the first usual one, and better as its name says."""

    metric: str | None = None
    lower_is_better: bool | None = None

    def is_lower_better(self, metric: str) -> bool:
        """Whether less of the metric that was found is better."""
        return is_lower_better(metric) if self.lower_is_better is None else self.lower_is_better


FIRST_USUAL = NewScore()


def is_lower_better(metric: str) -> bool:
    """Whether less of a metric is better, by its name."""
    return _LOWER.search(metric.lower()) is not None and _NEGATED.search(metric.lower()) is None


def find_metric(history: Sequence[Mapping[str, Any]], wanted: str | None) -> str:
    """The metric that is wanted, or the first usual one. Raises RazorError where it was not logged, or none was."""
    logged = {name: None for entry in history for name, value in entry.items() if _is_number(value)}
    names = [name for name in logged if name not in ("step", "epoch")]
    if wanted is not None and wanted not in names:
        raise RazorError(f"{wanted} was not logged. Logged: {', '.join(names) or 'nothing'}.")
    chosen = wanted or next((name for name in METRICS if name in names), None)
    if chosen is None:
        raise RazorError(f"None of the usual scores was logged: name one by its metric. Logged: {', '.join(names)}.")
    return chosen


def latest(history: Sequence[Mapping[str, Any]], step: int, metric: str) -> Mapping[str, Any]:
    """The last entry up to a step that has the metric. Raises RazorError where none has."""
    own = [entry for entry in history if entry["step"] <= step and _is_number(entry.get(metric))]
    if not own:
        raise RazorError(f"{metric} was not logged up to its step.")
    return max(own, key=lambda entry: entry["step"])


def _is_number(value: Any) -> bool:
    """Whether it is one that a float holds."""
    try:
        return isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:
        return False
