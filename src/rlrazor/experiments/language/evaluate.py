"""A checkpoint's scores and drift. The base's side of a comparison is computed once, in `Asked` and `Reference`."""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import polars as pl
import torch

from rlrazor import drift
from rlrazor.errors import RazorError
from rlrazor.experiments.language import tiny
from rlrazor.experiments.language.config import PROBES, Config
from rlrazor.experiments.language.demonstrations import Prompts
from rlrazor.experiments.language.outcomes import items_of, questions_of
from rlrazor.experiments.language.setup import Setup
from rlrazor.experiments.language.suites import PriorSuite
from rlrazor.experiments.language.tasks import Task, score
from rlrazor.lm import encoding, kl, probes, representation, sampling
from rlrazor.lm.adapters import weights_of
from rlrazor.lm.kl import Drift, Sequences
from rlrazor.lm.models import LanguageModel, Vocabulary, check_same_vocabulary, load
from rlrazor.lm.probes import GenericText, ProbeSettings
from rlrazor.lm.scores import NotANumberError, stderr_of_mean
from rlrazor.runs.records import BASE, Record
from rlrazor.runs.sweep import DivergedError
from rlrazor.system import phases

# The phases of measuring that take longer with more prompts, with more texts, and with longer ones of the base's own.
OF_PROMPTS, OF_TEXTS = "answering and comparing the new task's prompts", "comparing the probe's texts"
OWN_TEXTS = "writing the probe's texts"
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
    *(f"kl_forward_on_{name}{per}" for per in ("", "_per_token") for name in PROBES),
    "kl_optimal",
    *("weight_l1", "weight_l2", "weight_spectral", "weight_sparsity", "weight_rank", "cknna_on_probe"),
)
"""The columns of drift that a record may have, in the order of the report."""
TUNED, SAMPLED = "tuned", "sampled"  # the purpose of samples of a policy that is measured; one of config.SCORED


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a checkpoint is made of: its record's new, prior, drift and metrics, and the outcomes of the prior's items.

    `answers`: to each task that is asked. `items`: of the columns `items.OWN`; None where no outcome is known.
    `questions`: what these ask, of the columns `items.ASKED`; None where that is not known.
    """

    new: float
    prior: dict[str, float]
    drift: dict[str, float]
    metrics: dict[str, float]
    answers: Sequence["Answers"]
    items: pl.DataFrame | None
    questions: pl.DataFrame | None


@dataclass(frozen=True, eq=False)
class Answers:
    """What a policy says to a task's prompts: its score, its drift and other metrics by column, and its samples."""

    score: float
    drift: Mapping[str, float]
    metrics: Mapping[str, float]
    sequences: Sequences


class Asked:
    """A task's test prompts, and what the base says to them, so that a later policy's answers can be set beside it.

    `samples`: completions of each prompt. `scored` decides which accuracy is the score: `greedy`, or `sampled`, which
    is exact where all right completions can be listed; the other is kept among the metrics. `beside`: a probe of
    the same base, whose copy of the LM head is shared.
    """

    def __init__(
        self,
        base: LanguageModel,
        task: Task,
        test: Prompts,
        suite: PriorSuite,
        samples: int,
        scored: str,
        beside: kl.Probe | None = None,
    ) -> None:
        self.base, self.task, self.test, self.samples = base, task, test, samples
        self.scored, self.said_failures = scored, False
        self.list_exact = None if task.correct is None else suite.exact
        phases.at(OF_PROMPTS)
        sequences = self.complete(base, probes.NEW)
        self.probe = kl.Probe(base.model, sequences, beside=beside)
        rewards = self._rewards(sequences.completions)
        self.correct = [reward == 1 for reward in rewards]
        self.same = _same_for_all(rewards)
        self.example = self._example(sequences.completions[0])
        self.exact = self._exact(base)

    def complete(self, lm: LanguageModel, purpose: str | None) -> Sequences:
        """What a policy says to the prompts, as `probes.complete` draws it; greedily, once, without a purpose."""
        settings = probe_settings(self.task, 1 if purpose is None else self.samples)
        completions = probes.complete(lm.model, lm.tokenizer, self.test.ids, settings, purpose)
        return Sequences.grouped(self.test.ids, completions)

    def answers(self, tuned: LanguageModel, frozen: Any) -> Answers:
        """Of a policy; `frozen` is the base's model, None where `tuned` is a PEFT model around it."""
        forward, sequences = kl.forward_kl(self.probe, tuned.model), self.complete(tuned, TUNED)
        drifts = {"forward": forward, "reverse": kl.reverse_kl(tuned.model, sequences, frozen)}
        if any(self.correct):
            drifts["correct"] = forward.restricted(self.correct)
        own: dict[str, float] = {}
        measures: dict[str, float] = {}
        for name, found in drifts.items():
            measures |= _columns(f"kl_{name}", found, own)
        greedy = self._rewards(self.complete(tuned, None).completions)
        for name, values in {"greedy": greedy, "sampled": self._rewards(sequences.completions)}.items():
            counted = [value for value in values if value is not None]
            own |= {f"new_{name}": float(np.mean(counted)), f"new_{name}_stderr": self._stderr(counted)}
            own["unverified"] = own.get("unverified", 0.0) + len(values) - len(counted)
        score = own[f"new_{self.scored}"]
        if self.exact is not None and (logps := self._exact(tuned)) is not None:
            measures["kl_optimal"] = tiny.optimal_kl(self.exact, logps)
            own["new_expected"] = tiny.expected_accuracy(logps)
            score = own["new_expected"] if self.scored == SAMPLED else score
        return Answers(score, measures, own, sequences)

    def score(self, tuned: LanguageModel) -> float:
        """That of `answers`, without the rest."""
        if self.scored == SAMPLED and (logps := self._exact(tuned)) is not None:
            return tiny.expected_accuracy(logps)
        values = self._rewards(self.complete(tuned, TUNED if self.scored == SAMPLED else None).completions)
        return float(np.mean([value for value in values if value is not None]))

    def _example(self, completion: Sequence[int]) -> str:
        """The first prompt, what the base answers, and a right answer where there is one."""
        item, answer = self.test.items[0], encoding.decode(self.base.tokenizer, completion)
        right = item.demonstration or item.columns.get("reference")
        beside = "" if right is None else f", where {str(right)!r:.80} is right"
        return f"to the prompt that ends in {item.prompt[-60:]!r} it says {answer!r:.80}{beside}"

    def _exact(self, lm: LanguageModel) -> torch.Tensor | None:
        """Log-probabilities of all right completions, where the suite and the task can list them."""
        if self.list_exact is None or self.task.correct is None:
            return None
        return self.list_exact(lm, self.test.items, self.task.correct)

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


@dataclass(frozen=True, eq=False)
class Scored:
    """A checkpoint's record, the outcomes of the prior's items as in `Evaluation`, and of a base what these ask."""

    record: Record
    items: pl.DataFrame | None = None
    questions: pl.DataFrame | None = None


class Reference:
    """A base policy as every checkpoint is compared with it: on the tasks that are `asked`, and on prior ones.

    Where several tasks are asked, what is measured on them is their mean.
    """

    def __init__(self, base: LanguageModel, asked: Sequence[Asked], suite: PriorSuite) -> None:
        self.base, self.asked, self.suite = base, asked, suite
        self.settings = probe_settings(asked[0].task, asked[0].samples)
        self.probe = kl.Probe(base.model, self.generic_of(base), beside=asked[0].probe)
        self.further = {name: self._probe_of(name, one) for name, one in suite.further.items()}
        self.representation = representation.representation(base.model, base.tokenizer, suite.unrelated)
        self.weights = weights_of(base.model)
        self.spectra = sum(weight.numel() for weight in self.weights.values()) <= SPECTRA_UP_TO
        self.warned = False

    def generic_of(self, lm: LanguageModel) -> Sequences:
        """The generic probe of a policy."""
        return _sequences(lm, self.suite.generic, self.settings)

    def _probe_of(self, name: str, one: GenericText) -> kl.Probe:
        """A further probe, which may be the generic one. Raises RazorError where the base makes nothing of it."""
        if one == self.suite.generic:
            return self.probe
        base = self.base
        try:
            sequences = _sequences(base, one, self.settings)
        except RazorError as error:
            raise RazorError(f"The probe {name!r} cannot be made of this base: {error}") from error
        return kl.Probe(base.model, sequences, beside=self.probe)

    def about(self, asked: Sequence[Asked]) -> "Reference":
        """The same with other tasks as the new ones."""
        other = copy.copy(self)
        other.asked = asked
        return other

    def checkpoint(
        self,
        run_id: str,
        step: int,
        epoch: float,
        model: Any,
        metrics: Mapping[str, float] | None = None,
        *,
        frozen: Any = None,
    ) -> Scored:
        """Measure a policy. `frozen` is the base's model, None where `model` is a PEFT model around it.

        Raises DivergedError where an output or a measure is not finite.
        """
        with finite(step, epoch):
            found = self.measure(replace(self.base, model=model), frozen)
            self._warn(step, found.new)
            own = {**(metrics or {}), **found.metrics}
            return Scored(Record(run_id, step, epoch, found.new, found.prior, found.drift, own), found.items)

    def base_checkpoint(self, run_id: str) -> Scored:
        """The base's own scores; its drift is 0 by definition, and left out."""
        found = self.measure_base()
        record = Record(run_id, 0, 0.0, found.new, found.prior, {}, found.metrics)
        return Scored(record, found.items, found.questions)

    def measure_base(self) -> Evaluation:
        """Measure the base, and say where its answers to a task that is asked are all alike."""
        lm, found = self.base, self.measure(self.base, self.base.model)
        generics = {self.probe: self.suite.generic}
        generics |= {probe: self.suite.further[name] for name, probe in self.further.items()}
        for probe, generic in generics.items():
            left_out = generic.left_out(self.settings, len(probe.sequences.prompts))
            for sentence in [*left_out, *probes.cautions_of(lm.model, lm.tokenizer, generic, probe.sequences)]:
                phases.say(sentence)
        for asked in self.asked:
            if asked.same is not None:
                task = "the new task" if len(self.asked) == 1 else f"the task {asked.task.name}"
                phases.say(
                    f"The base's answers to {task} {_SAME[asked.same]}: {asked.example}. {_WHAT_TO_DO[asked.same]}"
                )
        return found

    def _warn(self, step: int, new: float) -> None:
        """Say once that the first checkpoint scores as the base, all or nothing."""
        if not self.warned and all(new == asked.same for asked in self.asked):
            phases.say(f"After {step} updates too, all answers to the new task {_SAME[new]}. {_WHAT_TO_DO[new]}")
        self.warned = True

    def measure(self, tuned: LanguageModel, frozen: Any) -> Evaluation:
        """What a checkpoint is made of."""
        own: dict[str, float] = {}
        prior = self.suite.scores(tuned)
        own |= {f"prior_{name}_stderr": one.stderr for name, one in prior.items() if one.stderr is not None}
        own |= {f"robust_{name}": value for name, one in prior.items() if (value := one.items.robust_mean) is not None}
        if (of_mean := stderr_of_mean(one.stderr for one in prior.values())) is not None:
            own["prior_stderr"] = of_mean
        phases.at(OF_TEXTS)
        texts = representation.ids_of_texts(tuned.model, tuned.tokenizer, self.suite.loss_texts)
        own["prior_loss"] = kl.token_loss(tuned.model, texts).mean
        phases.at(OF_PROMPTS)
        answers = [asked.answers(tuned, frozen) for asked in self.asked]
        measures = _mean_of([one.drift for one in answers])
        own |= _mean_of([one.metrics for one in answers])
        phases.at(OF_TEXTS)
        columns = {"kl_probe": self.probe, **{f"kl_forward_on_{name}": probe for name, probe in self.further.items()}}
        found = {probe: kl.forward_kl(probe, tuned.model) for probe in dict.fromkeys(columns.values())}
        for column, probe in columns.items():
            measures |= _columns(column, found[probe], own)
        phases.at("comparing weights")
        measures |= drift.measure_weights(self.weights, weights_of(tuned.model), spectra=self.spectra)
        phases.at(OF_TEXTS)
        unrelated = representation.representation(tuned.model, tuned.tokenizer, self.suite.unrelated)
        measures["cknna_on_probe"] = drift.cknna(self.representation, unrelated)
        measures = {name: measures[name] for name in DRIFT if name in measures}
        scores = {name: one.value for name, one in prior.items()}
        new, asked = fmean(one.score for one in answers), questions_of(prior)
        return Evaluation(new, scores, measures, own, answers, items_of(prior), asked)


def _sequences(lm: LanguageModel, generic: GenericText, settings: ProbeSettings) -> Sequences:
    """What is measured of a probe."""
    phases.at(OWN_TEXTS if generic.own else OF_TEXTS)
    sequences = probes.of_generic(lm.model, lm.tokenizer, generic, settings)
    phases.at(OF_TEXTS)
    return sequences


@contextmanager
def finite(step: int, epoch: float) -> Iterator[None]:
    """Raise DivergedError where an output of the policy measured here, or a measure, is not finite."""
    try:
        yield
    except (sampling.NotFiniteError, NotANumberError, ValueError) as error:  # Record refuses such numbers
        if isinstance(error, ValueError) and "finite" not in str(error):
            raise
        raise DivergedError(step, epoch) from error


def _mean_of(columns: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The means of the columns that all have."""
    shared = [name for name in columns[0] if all(name in other for other in columns)]
    return {name: fmean(one[name] for one in columns) for name in shared}


def _same_for_all(rewards: Sequence[float | None]) -> float | None:
    """0 or 1 where all that could be scored have that score."""
    counted = {reward for reward in rewards if reward is not None}
    return counted.pop() if counted in ({0.0}, {1.0}) else None


def _columns(name: str, found: Drift, errors: dict[str, float]) -> dict[str, float]:
    """A KL per completion and per token; their standard errors go into `errors`."""
    estimates = {name: found.per_completion, f"{name}_per_token": found.per_token}
    errors |= {f"{column}_stderr": of.stderr for column, of in estimates.items() if math.isfinite(of.stderr)}
    return {column: estimate.mean for column, estimate in estimates.items()}


def probe_settings(task: Task, samples: int) -> ProbeSettings:
    """How the base completes prompts where this task is the new one."""
    form = task.form
    told = form.chat_template_kwargs
    return ProbeSettings(form.max_new_tokens, samples, form.stop, form.chat, chat_template_kwargs=told)


def compare(
    setup: Setup, config: Config, source: str, base_source: str | None, adapter: Path | None = None
) -> tuple[Record | None, Record]:
    """The base's record and the model's, with its drift; without a base, None and the model's scores.

    With `adapter`, the model is `source` with that adapter. Raises RazorError where one of them cannot be loaded, or
    their vocabularies differ.
    """
    task, splits = setup.task.task(), setup.task.load()
    suite = setup.suite_of(config.prior, config.prior_limit, config.probes, config.asking)
    suite.check()
    task = task.limited(config.max_new_tokens, config.told)
    base = load(base_source or source)
    test = Prompts.of(task, splits.test[: config.test_prompts], base)
    reference = Reference(base, [Asked(base, task, test, suite, config.kl_samples, config.scored)], suite)
    if base_source is None:
        return None, reference.base_checkpoint(source).record
    tuned = load(source, adapter=adapter, tokenizer=base.tokenizer)
    if tuned.tokenizer is base.tokenizer:
        phases.say(f"{source} has no tokenizer: the base's is used.")
    check_same_vocabulary(Vocabulary.of(base), Vocabulary.of(tuned))
    before = reference.base_checkpoint(BASE)
    return before.record, reference.checkpoint(source, 0, 0.0, tuned.model, frozen=base.model).record
