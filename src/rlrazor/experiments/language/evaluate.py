"""A checkpoint's scores and drift. What is the base's side of a comparison is computed once, in a `Reference`."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlrazor import drift
from rlrazor.experiments.language import tiny
from rlrazor.experiments.language.config import Config
from rlrazor.experiments.language.demonstrations import Prompts
from rlrazor.experiments.language.tasks import Item, Splits, Task, score
from rlrazor.lm import encoding, kl, prior, probes, representation, sampling
from rlrazor.lm.adapters import weights_of
from rlrazor.lm.kl import Drift, Sequences
from rlrazor.lm.models import LanguageModel, Vocabulary, check_same_vocabulary, load
from rlrazor.lm.probes import GenericText, ProbeSettings
from rlrazor.lm.scores import NotANumberError, require_accuracies, stderr_of_mean
from rlrazor.lm.task_names import DEFAULT_TASKS
from rlrazor.runs.records import BASE, Record
from rlrazor.runs.sweep import DivergedError
from rlrazor.system import phases

# The phases of measuring that take longer with more prompts, and with more texts.
OF_PROMPTS, OF_TEXTS = "answering and comparing the new task's prompts", "comparing the probe's texts"
_SAME = {0.0: "all score 0", 1.0: "all score 1"}
_WHAT_TO_DO = {
    0.0: "If that is not right, stop, and look at the verifier, --max-new-tokens, --stop and --no-chat: on-policy "
    "methods learn nothing from it.",
    1.0: "There is nothing left to learn, or the verifier accepts anything: try it on a wrong answer.",
}
SPECTRA_UP_TO = 50_000_000  # parameters: singular values of larger models take minutes a checkpoint

DRIFT = (
    *("kl_forward", "kl_reverse", "kl_correct", "kl_probe"),
    *("kl_forward_per_token", "kl_reverse_per_token", "kl_correct_per_token", "kl_probe_per_token"),
    "kl_optimal",
    *("weight_l1", "weight_l2", "weight_spectral", "weight_sparsity", "weight_rank", "cknna_on_probe"),
)
"""The columns of drift that a record may have, in the order of the report."""

Right = Callable[[Item], Sequence[str]]
"""All right completions of an item."""


@dataclass(frozen=True, eq=False)
class PriorSuite:
    """What a base could do before, and text that stands for it without labels.

    `scores(lm)`: a score per prior task with its standard error. `generic`: what the generic probe is made of.
    `loss_texts`: prior text whose token loss is the cheap proxy. `unrelated`: text on which representations are
    compared. `exact(lm, items, right)`: of a task whose right completions can all be listed, log pi of each, (items,
    completions). `check()` raises RazorError where the scores could not be a record's: call it before anything is run.
    """

    scores: Callable[[LanguageModel], Mapping[str, tuple[float, float | None]]]
    generic: GenericText
    loss_texts: Sequence[str]
    unrelated: Sequence[str]
    exact: Callable[[LanguageModel, Sequence[Item], Right], torch.Tensor] | None = None
    check: Callable[[], None] = lambda: None

    def without_scores(self) -> "PriorSuite":
        """The same texts, and no prior task."""
        return replace(self, scores=lambda lm: {}, check=lambda: None)

    def cut(self, texts: int) -> "PriorSuite":
        """With so many texts, or prompts, of each sort at most."""
        generic = GenericText(self.generic.texts[:texts], self.generic.prompts[:texts])
        return replace(self, generic=generic, loss_texts=self.loss_texts[:texts], unrelated=self.unrelated[:texts])


# What the report says of a suite's inputs.
LM_EVAL_INPUTS = {
    "probe": "The generic probe is sixty paragraphs on everyday topics that come with rlrazor, each token of which is "
    "measured; they were chosen for no prior task.",
    "representation": "Similarity of the last hidden layer, averaged over a paragraph’s tokens, to the base’s, 1 for "
    "no change, on the sixty paragraphs of the generic probe.",
}
TINY_INPUTS = {
    "probe": "The generic probe is prompts of the prior tasks that are not scored, without answers, each with one "
    "completion that the base sampled: what a user has who kept the old traffic but no labels. That is as near to the "
    "prior scores as a probe can be; text that is less like the prior tasks would say less.",
    "representation": "Similarity of the last hidden layer, averaged over a string’s tokens, to the base’s, 1 for no "
    "change, on random strings that belong to no task.",
}


def lm_eval_suite(
    tasks: Sequence[str],
    *,
    limit: int | None,
    data_mirror: Path | None = None,
    allow_code_execution: bool = False,
    generic: GenericText | None = None,
) -> PriorSuite:
    """The prior tasks of lm-eval; the unrelated text, and the generic probe by default, are the built-in paragraphs.

    Of the default tasks, those that run code are left out without leave; of others they are an error, as are tasks
    whose score is not a fraction of 1 of which more is better.
    """
    texts, named = representation.paragraphs(), None if tuple(tasks) == DEFAULT_TASKS else tasks
    source: dict[str, Any] = {"data_mirror": data_mirror, "allow_code_execution": allow_code_execution}
    told: set[str] = set()

    def scores(lm: LanguageModel) -> dict[str, tuple[float, float | None]]:
        found = prior.evaluate(lm.model, lm.tokenizer, named, limit=limit, **source)
        require_accuracies(found)
        for note in set(found.notes) - told:
            told.add(note)
            phases.say(note)
        return {name: (result.value, result.stderr) for name, result in found.items()}

    def check() -> None:
        require_accuracies(prior.metrics_of(named, **source))

    return PriorSuite(scores, generic or GenericText.built_in(), texts, texts, check=check)


def tiny_suite(generic: GenericText | None = None) -> PriorSuite:
    """The prior tasks of the tiny base. Its probe is completions that the base gives to prior-like prompts."""

    def scores(lm: LanguageModel) -> dict[str, tuple[float, float | None]]:
        return {
            name: (value, math.sqrt(value * (1 - value) / tiny.SCORED))
            for name, value in tiny.prior_scores(lm.model).items()
        }

    def exact(lm: LanguageModel, items: Sequence[Item], right: Right) -> torch.Tensor:
        return tiny.right_logps(lm.model, lm.tokenizer, items, right)

    generic = generic or GenericText(prompts=tuple(tiny.probe_prompts()))
    return PriorSuite(scores, generic, tiny.prior_texts(), tiny.unrelated_texts(), exact)


class Reference:
    """A base policy as every checkpoint is compared with it.

    `samples`: completions of each test prompt. `scored` decides which accuracy is the new-task score: `greedy`, or
    `sampled`, which is exact where all right completions can be listed; the other is kept among the metrics.
    """

    def __init__(
        self, base: LanguageModel, task: Task, test: Prompts, suite: PriorSuite, samples: int, scored: str
    ) -> None:
        self.base, self.task, self.test, self.suite, self.samples = base, task, test, suite, samples
        self.scored, self.said_failures = scored, False
        phases.at(OF_PROMPTS)
        completions = _complete(base, task, test.ids, samples, probes.NEW)
        sequences = Sequences.grouped(test.ids, completions)
        self.new = kl.Probe(base.model, sequences)
        rewards = self._rewards(completions)
        self.correct = [reward == 1 for reward in rewards]
        self.same = _same_for_all(rewards)
        self.example = self._example(completions[0]) if completions else ""
        phases.at(OF_TEXTS)
        settings = probe_settings(task, samples)
        self.probe = kl.Probe(base.model, probes.of_generic(base.model, base.tokenizer, suite.generic, settings))
        self.representation = representation.representation(base.model, base.tokenizer, suite.unrelated)
        self.weights = weights_of(base.model)
        self.spectra = sum(weight.numel() for weight in self.weights.values()) <= SPECTRA_UP_TO
        self.exact = self._exact(base)
        self.warned = False

    def record(
        self,
        run_id: str,
        step: int,
        epoch: float,
        model: Any,
        metrics: Mapping[str, float] | None = None,
        *,
        frozen: Any = None,
    ) -> Record:
        """Measure a policy. `frozen` is the base's model, None where `model` is a PEFT model around it.

        Raises DivergedError where an output or a measure is not finite.
        """
        tuned = replace(self.base, model=model)
        try:
            scores, measures, own = self._measure(tuned, frozen)
            self._warn(step, scores["new"])
            return Record(run_id, step, epoch, scores.pop("new"), scores, measures, {**(metrics or {}), **own})
        except (sampling.NotFiniteError, NotANumberError, ValueError) as error:  # Record refuses such numbers
            if isinstance(error, ValueError) and "finite" not in str(error):
                raise
            raise DivergedError(step, epoch) from error

    def base_record(self, run_id: str) -> Record:
        """The base's own scores; its drift is 0 by definition, and left out."""
        scores, _, own = self._measure(self.base, self.base.model)
        if self.same is not None:
            phases.say(
                f"The base's answers to the new task {_SAME[self.same]}: {self.example}. {_WHAT_TO_DO[self.same]}"
            )
        return Record(run_id, 0, 0.0, scores.pop("new"), scores, {}, own)

    def _warn(self, step: int, new: float) -> None:
        """Say once that the first checkpoint scores as the base, all or nothing."""
        if not self.warned and new == self.same:
            phases.say(f"After {step} updates too, all answers to the new task {_SAME[new]}. {_WHAT_TO_DO[new]}")
        self.warned = True

    def _example(self, completion: Sequence[int]) -> str:
        """The first prompt, what the base answers, and a right answer where there is one."""
        item, answer = self.test.items[0], encoding.decode(self.base.tokenizer, completion)
        right = item.demonstration or item.columns.get("reference")
        beside = "" if right is None else f", where {str(right)!r:.80} is right"
        return f"to the prompt that ends in {item.prompt[-60:]!r} it says {answer!r:.80}{beside}"

    def _measure(
        self, tuned: LanguageModel, frozen: Any
    ) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
        scores: dict[str, float] = {}
        own: dict[str, float] = {}
        measured = self.suite.scores(tuned)
        for name, (value, stderr) in measured.items():
            scores[name] = value
            if stderr is not None:
                own[f"prior_{name}_stderr"] = stderr
        if (of_mean := stderr_of_mean(stderr for _, stderr in measured.values())) is not None:
            own["prior_stderr"] = of_mean
        phases.at(OF_TEXTS)
        texts = representation.ids_of_texts(tuned.model, tuned.tokenizer, self.suite.loss_texts)
        own["prior_loss"] = kl.token_loss(tuned.model, texts).mean

        phases.at(OF_PROMPTS)
        forward = kl.forward_kl(self.new, tuned.model)
        completions = _complete(tuned, self.task, self.test.ids, self.samples, "tuned")
        reverse = kl.reverse_kl(tuned.model, Sequences.grouped(self.test.ids, completions), frozen)
        accuracies = {"greedy": self._rewards(_complete(tuned, self.task, self.test.ids, 1, None))}
        accuracies["sampled"] = self._rewards(completions)
        phases.at(OF_TEXTS)
        drifts = {"forward": forward, "reverse": reverse, "probe": kl.forward_kl(self.probe, tuned.model)}
        if any(self.correct):
            drifts["correct"] = forward.restricted(self.correct)
        measures: dict[str, float] = {}
        for name, found in drifts.items():
            measures |= _columns(f"kl_{name}", found, own)
        for name, values in accuracies.items():
            counted = [value for value in values if value is not None]
            own |= {f"new_{name}": float(np.mean(counted)), f"new_{name}_stderr": self._stderr(counted)}
            own["unverified"] = own.get("unverified", 0.0) + len(values) - len(counted)
        scores["new"] = own[f"new_{self.scored}"]
        if self.exact is not None and (logps := self._exact(tuned)) is not None:
            measures["kl_optimal"] = tiny.optimal_kl(self.exact, logps)
            own["new_expected"] = tiny.expected_accuracy(logps)
            if self.scored == "sampled":
                scores["new"] = own["new_expected"]
        phases.at("comparing weights")
        measures |= drift.measure_weights(self.weights, weights_of(tuned.model), spectra=self.spectra)
        phases.at(OF_TEXTS)
        unrelated = representation.representation(tuned.model, tuned.tokenizer, self.suite.unrelated)
        measures["cknna_on_probe"] = drift.cknna(self.representation, unrelated)
        return scores, {name: measures[name] for name in DRIFT if name in measures}, own

    def _exact(self, lm: LanguageModel) -> torch.Tensor | None:
        """Log-probabilities of all right completions, where the suite and the task can list them."""
        if self.suite.exact is None or self.task.correct is None:
            return None
        return self.suite.exact(lm, self.test.items, self.task.correct)

    def _stderr(self, values: Sequence[float]) -> float:
        """Of a mean over prompts, each with as many values."""
        if len(values) % len(self.test.items):  # some could not be verified: as if all were of different prompts
            return float(np.std(values) / math.sqrt(len(values)))
        prompts = np.reshape(values, (len(self.test.items), -1)).mean(axis=1)
        return float(np.std(prompts, ddof=1) / math.sqrt(len(prompts))) if len(prompts) > 1 else 0.0

    def _rewards(self, completions: Sequence[Sequence[int]]) -> list[float | None]:
        texts = [encoding.decode(self.base.tokenizer, completion) for completion in completions]
        share = len(texts) // len(self.test.items)
        items = [item for item in self.test.items for _ in range(share)]
        scores = score(self.task, items, texts)
        if scores.failures and not self.said_failures:
            self.said_failures = True
            phases.say(scores.describe_failures())
        return scores.values


def _same_for_all(rewards: Sequence[float | None]) -> float | None:
    """0 or 1 where all that could be scored have that score."""
    counted = {reward for reward in rewards if reward is not None}
    return counted.pop() if counted in ({0.0}, {1.0}) else None


def _columns(name: str, found: Drift, errors: dict[str, float]) -> dict[str, float]:
    """A KL per completion and per token; their standard errors go into `errors`."""
    estimates = {name: found.per_completion, f"{name}_per_token": found.per_token}
    errors |= {f"{column}_stderr": of.stderr for column, of in estimates.items() if math.isfinite(of.stderr)}
    return {column: estimate.mean for column, estimate in estimates.items()}


def _complete(
    lm: LanguageModel, task: Task, prompts: Sequence[Sequence[int]], samples: int, purpose: str | None
) -> list[list[int]]:
    """What `probes.complete` gives with the task's settings."""
    return probes.complete(lm.model, lm.tokenizer, prompts, probe_settings(task, samples), purpose)


def probe_settings(task: Task, samples: int) -> ProbeSettings:
    """How the base completes prompts where this task is the new one."""
    return ProbeSettings(task.max_new_tokens, samples, task.stop, task.chat)


def compare(
    source: str,
    base_source: str | None,
    task: Task,
    splits: Splits,
    config: Config,
    *,
    adapter: Path | None = None,
    data_mirror: Path | None = None,
    allow_code_execution: bool = False,
    generic: GenericText | None = None,
) -> tuple[Record | None, Record]:
    """The base's record and the model's, with its drift; without a base, None and the model's scores.

    With `adapter`, the model is `source` with that adapter. Raises RazorError where one of them cannot be loaded, or
    their vocabularies differ.
    """
    suite = lm_eval_suite(
        config.prior,
        limit=config.prior_limit or None,
        data_mirror=data_mirror,
        allow_code_execution=allow_code_execution,
        generic=generic,
    )
    suite = suite if config.has_prior else suite.without_scores()
    suite.check()
    task = replace(task, max_new_tokens=config.max_new_tokens or task.max_new_tokens)
    base = load(base_source or source)
    test = Prompts.of(task, splits.test[: config.test_prompts], base)
    reference = Reference(base, task, test, suite, config.kl_samples, config.scored)
    if base_source is None:
        return None, reference.base_record(source)
    tuned = load(source, adapter=adapter, tokenizer=base.tokenizer)
    if tuned.tokenizer is base.tokenizer:
        phases.say(f"{source} has no tokenizer: the base's is used.")
    check_same_vocabulary(Vocabulary.of(base), Vocabulary.of(tuned))
    return reference.base_record(BASE), reference.record(source, 0, 0.0, tuned.model, frozen=base.model)
