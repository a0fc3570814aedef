"""Two checkpoints side by side: how far apart, on which prompts, at which tokens, in which weights, and at what price.

One model is in memory at a time: of the other side there are only the hidden states of the probes and an LM head, which
is all that an exact KL needs (`lm.kl`). The base is loaded twice, the second time for the tuned model's completions; an
adapter is taken off instead, where that gives the base. Weights are read from the files in pairs, a tensor at a time.
"""

from __future__ import annotations

import ctypes
import gc
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlrazor import bounds, drift
from rlrazor.drift.representation import NEIGHBOURS
from rlrazor.errors import RazorError
from rlrazor.forecast import FORWARD, PROBE, Forecast
from rlrazor.guard.base_side import cautions_of
from rlrazor.guard.law_file import LawFile
from rlrazor.guard.overlap import template_caution
from rlrazor.lm import compute, kl, prior, probes
from rlrazor.lm.adapters import AdaptedWeights, base_weights
from rlrazor.lm.encoding import as_read, text_ids
from rlrazor.lm.kl import Drift, Estimate, Sequences
from rlrazor.lm.models import (
    LanguageModel,
    SavedWeights,
    Vocabulary,
    base_digest,
    check_adapter,
    is_adapter,
    is_same_base,
    load,
    named_base,
    tokenizer_of,
)
from rlrazor.lm.probes import GenericText, ProbeSettings, Prompt
from rlrazor.lm.prompts import texts_of
from rlrazor.lm.representation import representation_of_ids
from rlrazor.lm.sampling import NotFiniteError

REVERSE = "kl_reverse"
STEPS = 6  # of the progress
NO_MEMORY = "Out of memory: --dtype bfloat16 takes half of it; fewer or shorter prompts and completions take less."
Told = Callable[[str], None]


@dataclass(frozen=True)
class Pair:
    """What to compare. `tuned` is a model, or the folder of an adapter for `base`. `as_given`: trust the order.

    `dtype`: what both are loaded, and measured, in.
    """

    base: str
    tuned: str
    dtype: str = "float32"
    as_given: bool = False
    cache_dir: Path | None = None


@dataclass(frozen=True)
class PriorSuite:
    """Prior tasks of lm-eval to measure the truth by."""

    tasks: tuple[str, ...]
    limit: int | None = None
    data_mirror: Path | None = None
    allow_code_execution: bool = False

    def metrics(self) -> dict[str, prior.Metric]:
        """What each task is scored by; raises RazorError for tasks that cannot be evaluated. Loads their data."""
        return prior.metrics_of(
            self.tasks, data_mirror=self.data_mirror, allow_code_execution=self.allow_code_execution
        )


@dataclass(frozen=True)
class Completion:
    """A completion with the KL at each token, in nats: of the base (forward KL) or of the tuned model (reverse)."""

    tokens: tuple[str, ...]
    kl: tuple[float, ...]

    @property
    def total(self) -> float:
        """Nats."""
        return sum(self.kl)


@dataclass(frozen=True)
class PromptDrift:
    """Where the policy moved on one prompt; `total` is the mean forward KL of the base's completions, in nats."""

    prompt: str
    total: float
    base: tuple[Completion, ...]
    tuned: tuple[Completion, ...]


@dataclass(frozen=True)
class WeightChange:
    """The change of some weights: L2 norms of the change and of what they were, and the share exactly as before."""

    name: str
    parameters: int
    l2: float
    norm: float
    unchanged: float

    @property
    def relative(self) -> float:
        """The change as a share of what they were."""
        return self.l2 / self.norm if self.norm else 0.0


@dataclass(frozen=True)
class TaskChange:
    """A prior task's score in both models: fractions of 1 where `fraction`, else in the metric's own unit.

    `stderr` is of the difference; None where lm-eval gives none.
    """

    base: float
    tuned: float
    stderr: float | None
    metric: str
    higher_is_better: bool
    fraction: bool

    @property
    def drop(self) -> float:
        """How much worse the tuned model is, whichever direction is better."""
        return self.base - self.tuned if self.higher_is_better else self.tuned - self.base


@dataclass(frozen=True)
class Truth:
    """Measured prior scores of both; the mean drop of those that are fractions of 1, and its standard error.

    `drop` is None where none is a fraction, and `stderr` where one of them has none: unknown is not 0.
    """

    tasks: Mapping[str, TaskChange]
    drop: float | None
    stderr: float | None

    @property
    def base(self) -> dict[str, float]:
        """The base's scores."""
        return {name: task.base for name, task in self.tasks.items()}

    @property
    def tuned(self) -> dict[str, float]:
        """The tuned model's scores."""
        return {name: task.tuned for name, task in self.tasks.items()}

    @property
    def notes(self) -> list[str]:
        """What a reader of the mean drop has to know, in sentences."""
        said = []
        if apart := [f"{name} ({task.metric})" for name, task in self.tasks.items() if not task.fraction]:
            said.append(
                f"Scores that are not fractions of 1 are shown in their own unit and left out of the mean drop: "
                f"{', '.join(apart)}."
            )
        unknown = [name for name, task in self.tasks.items() if task.fraction and task.stderr is None]
        if unknown and self.drop is not None:
            said.append(
                f"The mean drop has no standard error: lm-eval gives none for {', '.join(unknown)}. How much of it is "
                "chance is not known."
            )
        return said


@dataclass(frozen=True)
class Comparison:
    """What was found. KLs in nats, per completion or text (`kl`) and per token; `notes` are sentences of caution.

    `first_prompt`: as the models read it, special tokens included; `precision`: what they computed in.
    """

    base: str
    tuned: str
    kl: Mapping[str, Estimate]
    per_token: Mapping[str, Estimate]
    prompts: Sequence[PromptDrift]
    weights: WeightChange
    layers: Sequence[WeightChange]
    cknna: float | None
    forecast: Forecast | None
    level: float | None
    law: str | None
    truth: Truth | None
    notes: Sequence[str] = field(default_factory=tuple)
    precision: str = "float32"
    first_prompt: str = ""

    @property
    def drop(self) -> float | None:
        """The measured drop, or else the forecast one."""
        if self.truth is not None and self.truth.drop is not None:
            return self.truth.drop
        return None if self.forecast is None else self.forecast.drop


def compare(
    pair: Pair,
    prompts: Sequence[Prompt],
    *,
    law: LawFile | None = None,
    generic: GenericText | None = None,
    settings: ProbeSettings | None = None,
    suite: PriorSuite | None = None,
    level: float | None = None,
    told: Told = lambda step: None,
) -> Comparison:
    """Compare two checkpoints; `told` hears of each of the STEPS as it begins.

    With a law its probe and settings are used, and its level where none is given. Raises RazorError for models that
    cannot be loaded, do not belong together or seem to be swapped, a law of another base, and no prompts.
    """
    bounds.require_number("level", level)
    bounds.check("level", level)
    pair = replace(pair, base=_expanded(pair.base), tuned=_expanded(pair.tuned))
    notes = _check_order(pair)
    generic = (law.generic if law else generic) or GenericText.built_in()
    settings = (law.settings if law else settings) or ProbeSettings()
    if settings.precision not in (None, pair.dtype):
        raise RazorError(
            f"The law was calibrated in {settings.precision}, and the models are to be loaded in {pair.dtype}, whose "
            f"KL is another: leave --dtype out, or give --dtype {settings.precision}."
        )
    settings = replace(settings, precision=pair.dtype)
    try:
        with compute.memory_errors(NO_MEMORY):
            found = _measure(pair, prompts, generic, settings, law, suite, told)
    except NotFiniteError as error:
        raise RazorError(
            f"The outputs of {pair.base} or {pair.tuned} are NaN or infinite: training has diverged, or {pair.dtype} "
            "is too coarse for them."
        ) from error
    measured = {FORWARD: found.forward.n_prompts, PROBE: found.probe.n_prompts}
    notes += cautions_of(measured, prompts, generic, settings)
    if (form := template_caution(prompts, found.tokenizer, settings)) is not None:
        notes.append(form)
    truth = None if found.scores is None else _truth(*found.scores)
    if found.scores is not None and truth is not None:
        notes += [*dict.fromkeys(note for scores in found.scores for note in scores.notes), *truth.notes]
    forecast, drawn = None, {FORWARD: found.forward, PROBE: found.probe, REVERSE: found.reverse}
    estimates = {name: of.per_completion for name, of in drawn.items()}
    if law is not None:
        kls = {name: estimates[name] for name in (FORWARD, PROBE)}
        forecast = law.forecast(kls, level, prompts=prompts, measured=measured[FORWARD])
        notes += law.cautions(level)
        if forecast.extrapolated:
            notes.append("KL is larger than in any run that the law was fitted to: the interval may be too narrow.")
    return Comparison(
        pair.base,
        pair.tuned,
        estimates,
        {name: of.per_token for name, of in drawn.items()},
        _by_prompt(found),
        _total("all", found.layers),
        found.layers,
        found.cknna,
        forecast,
        None if law is None else law.attainable(level),
        None if law is None else law.describe(level),
        truth,
        [*notes, *found.notes],
        pair.dtype,
        as_read(found.tokenizer, found.base_completions.prompts[0]),
    )


def _expanded(source: str) -> str:
    return str(Path(source).expanduser()) if source.startswith("~") else source


def _check_order(pair: Pair) -> list[str]:
    """Raise RazorError where the two seem to be swapped; return notes."""
    swap, adapted = "The order is BASE TUNED", is_adapter(pair.tuned)
    if is_adapter(pair.base):
        raise RazorError(f"{pair.base} is an adapter, so it is not the base. {swap}.")
    there = Path(pair.base).exists() and Path(pair.tuned).exists()
    if pair.base == pair.tuned or (there and Path(pair.base).samefile(pair.tuned)):
        raise RazorError(f"{pair.base} was given twice: compare a model with what it was fine-tuned from. {swap}.")
    trained = [(Path(of) / "trainer_state.json").is_file() for of in (pair.base, pair.tuned)]
    if trained == [True, False] and not adapted and not pair.as_given:
        raise RazorError(
            f"{pair.base} is a checkpoint of a training run and {pair.tuned} is not: they seem to be swapped. {swap}; "
            "if it is right as it stands, add --as-given."
        )
    if adapted:
        check_adapter(pair.tuned)
        named = named_base(pair.tuned)
        if named and Path(named).name != Path(pair.base).name:
            return [f"The adapter says that it was trained on {named}, not on {pair.base}."]
    return []


@dataclass
class _Found:
    """What the passes over the models leave behind."""

    forward: Drift
    probe: Drift
    reverse: Drift
    base_completions: Sequences
    tuned_completions: Sequences
    tokenizer: Any
    cknna: float | None
    scores: tuple[prior.PriorScores, prior.PriorScores] | None
    layers: list[WeightChange]
    notes: list[str]


def _measure(
    pair: Pair,
    prompts: Sequence[Prompt],
    generic: GenericText,
    settings: ProbeSettings,
    law: LawFile | None,
    suite: PriorSuite | None,
    told: Told,
) -> _Found:
    adapted, notes = is_adapter(pair.tuned), []
    layers: list[WeightChange] = []
    if not adapted:
        told("weights")  # first: it finds out soonest that the two do not belong together
        layers, unmatched = _changes(SavedWeights(pair.base), SavedWeights(pair.tuned), pair)
        notes += unmatched

    told("loading the base")
    base = load(pair.base, dtype=pair.dtype)
    digest = base_digest(base.model, settings.precision)
    if law is not None:
        law.check(base.model, base.tokenizer, digest)
    tokenizer, vocabulary = base.tokenizer, Vocabulary.of(base)
    told("the base on the probes")
    new = probes.of_prompts(base.model, tokenizer, prompts, settings, cache_dir=pair.cache_dir, digest=digest)
    text = probes.of_generic(base.model, tokenizer, generic, settings, cache_dir=pair.cache_dir, digest=digest)
    first = kl.Probe(base.model, new, precision=settings.precision)
    before = {FORWARD: first, PROBE: kl.Probe(base.model, text, beside=first, precision=settings.precision)}
    del first
    rows = [[*text.prompts[at], *completion] for at, completion in zip(text.prompt_of, text.completions, strict=True)]
    similar = representation_of_ids(base.model, rows) if len(rows) > NEIGHBOURS else None
    scores_before = _prior_scores(base, suite)
    del base
    _free()

    told("loading the tuned model")
    if adapted:
        tuned = load(pair.base, adapter=Path(pair.tuned), dtype=pair.dtype)
    else:
        tuned = load(pair.tuned, dtype=pair.dtype, tokenizer=tokenizer)
        if tuned.tokenizer is tokenizer:
            notes.append(f"{pair.tuned} has no tokenizer: the base's is used.")
    notes += _tokenizer_notes(tokenizer, tokenizer_of(tuned, pair.tuned, vocabulary), prompts)
    told("the tuned model on the probes")
    drifts = {name: kl.forward_kl(probe, tuned.model) for name, probe in before.items()}
    del before
    own = Sequences.grouped(new.prompts, probes.complete(tuned.model, tokenizer, new.prompts, settings, "tuned"))
    after = kl.Probe(tuned.model, own, adapted=True, precision=settings.precision)
    cknna = None
    if similar is None:
        notes.append(f"CKNNA needs more than {NEIGHBOURS} texts in the generic probe; there are {len(rows)}.")
    else:
        cknna = drift.cknna(similar, representation_of_ids(tuned.model, rows))
    scores_after = _prior_scores(tuned, suite)
    # Some adapters put other weights into the base, or train its biases: then it is not there.
    undone = adapted and is_same_base(base_digest(tuned.model, settings.precision), digest)
    if adapted:
        told("weights")
        there = base_weights(tuned.model) if undone else SavedWeights(pair.base)
        layers, unmatched = _changes(there, AdaptedWeights(tuned.model), pair)
        notes += unmatched
        if not any(layer.l2 for layer in layers) and drifts[FORWARD].sums.any():
            notes.append("The adapter adds to the model and changes no weight of it: what it adds is not among these.")

    told("the base on the tuned model's completions")
    if not undone:
        del tuned
        _free()
        tuned = load(pair.base, dtype=pair.dtype)
    reverse = kl.between(after, kl.Probe(tuned.model, own, precision=settings.precision))
    scores = None if scores_before is None or scores_after is None else (scores_before, scores_after)
    return _Found(drifts[FORWARD], drifts[PROBE], reverse, new, own, tokenizer, cknna, scores, layers, notes)


def _tokenizer_notes(base: Any, tuned: Any, prompts: Sequence[Prompt]) -> list[str]:
    """What differs between two tokenizers to which the base's tokens mean the same."""
    notes = []
    if more := sorted(set(tuned.get_vocab()) - set(base.get_vocab())):
        notes.append(f"The tuned model's tokenizer has {len(more)} tokens more than the base's, such as {more[0]}.")
    if getattr(tuned, "chat_template", None) != getattr(base, "chat_template", None):
        notes.append("The two tokenizers have different chat templates; prompts are put into the base's.")
    texts = [texts_of(prompt) for prompt in prompts]
    if differing := sum(any(text_ids(base, one) != text_ids(tuned, one) for one in parts) for parts in texts):
        notes.append(
            f"The two tokenizers turn {differing} of the {len(texts)} prompts into different tokens; the base's are "
            "used."
        )
    if tuned.eos_token != base.eos_token:
        notes.append(
            f"The tuned model's tokenizer ends a text with {tuned.eos_token!r}, the base's with {base.eos_token!r}."
        )
    return notes


def _free() -> None:
    """Give back what is no longer referred to, before the next model is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with suppress(OSError, AttributeError):  # glibc keeps what was freed
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _prior_scores(lm: LanguageModel, suite: PriorSuite | None) -> prior.PriorScores | None:
    if suite is None:
        return None
    return prior.evaluate(
        lm.model,
        lm.tokenizer,
        suite.tasks,
        limit=suite.limit,
        data_mirror=suite.data_mirror,
        allow_code_execution=suite.allow_code_execution,
    )


def _truth(before: prior.PriorScores, after: prior.PriorScores) -> Truth:
    """The standard errors take the two models' scores to be independent; on the same items they are smaller."""
    tasks = {}
    for name, base in before.items():
        tuned = after[name]
        known = base.stderr is not None and tuned.stderr is not None
        tasks[name] = TaskChange(
            base.value,
            tuned.value,
            math.hypot(base.stderr or 0.0, tuned.stderr or 0.0) if known else None,
            base.metric,
            base.higher_is_better,
            base.is_fraction and tuned.is_fraction,
        )
    counted = [task for task in tasks.values() if task.fraction]
    drop = float(np.mean([task.drop for task in counted])) if counted else None
    return Truth(tasks, drop, prior.stderr_of_mean(task.stderr for task in counted))


# Where on the prompts


def _by_prompt(found: _Found) -> list[PromptDrift]:
    """The worst first."""
    base = _completions(found.base_completions, found.forward, found.tokenizer)
    tuned = _completions(found.tuned_completions, found.reverse, found.tokenizer)
    shown = [
        PromptDrift(
            str(found.tokenizer.decode(list(prompt), skip_special_tokens=True)),
            float(np.mean([completion.total for completion in base[index]])),
            tuple(base[index]),
            tuple(tuned[index]),
        )
        for index, prompt in enumerate(found.base_completions.prompts)
    ]
    return sorted(shown, key=lambda one: -one.total)


def _completions(sequences: Sequences, drift_: Drift, tokenizer: Any) -> list[list[Completion]]:
    """Each prompt's completions."""
    by_prompt: list[list[Completion]] = [[] for _ in sequences.prompts]
    ends = np.cumsum(drift_.lengths)
    for n, (prompt, ids) in enumerate(zip(sequences.prompt_of, sequences.completions, strict=True)):
        kls = drift_.positions[ends[n] - drift_.lengths[n] : ends[n]]
        by_prompt[prompt].append(Completion(tuple(pieces(tokenizer, ids)), tuple(map(float, kls))))
    return by_prompt


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text that each token adds. A character of several tokens comes with the last of them.

    Each is decoded after the one before it, as what a token adds may depend on it: spaces of SentencePiece do.
    """

    def text(start: int, end: int) -> str:
        return str(tokenizer.decode(list(ids[start:end]), clean_up_tokenization_spaces=False))

    shown: list[str] = []
    before = done = 0  # where the last complete piece begins and ends
    for end in range(1, len(ids) + 1):
        known, longer = text(before, done), text(before, end)
        if longer.endswith("\ufffd") and end < len(ids):
            shown.append("")
            continue
        shown.append(longer[len(known) :])
        before, done = done, end
    return shown


# Where in the weights


def _changes(
    base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], pair: Pair
) -> tuple[list[WeightChange], list[str]]:
    """A row per layer, and per weight outside of them, in the order of the model; and a note of what has no pair."""
    paired = _paired(list(base), list(tuned))
    if not paired:
        raise RazorError(f"{pair.tuned} and {pair.base} have no weight in common: one is not tuned from the other.")
    alone = [name for name in base if name not in paired]
    alone += sorted(set(tuned) - set(paired.values()))
    notes = []
    if alone:
        notes.append(
            f"{len(alone)} weights are in one of the two only, such as {alone[0]} (a head that is tied, say): they are "
            "not among the changes."
        )
    layers: dict[str, list[WeightChange]] = {}
    unmerged: list[str] = []
    for name in sorted(paired, key=_natural):
        try:
            before, after = base[name], tuned[paired[name]]
        except RazorError as error:
            unmerged.append(str(error))
            continue
        if before.shape != after.shape:
            raise RazorError(
                f"{name} has shape {tuple(after.shape)} in {pair.tuned} and {tuple(before.shape)} in {pair.base}: "
                "one is not tuned from the other."
            )
        if not after.isfinite().all():
            raise RazorError(f"The weights of {pair.tuned} are damaged: {name} is NaN or infinite in places.")
        measured = drift.measure_weights({name: before}, {name: after}, spectra=False)
        norm = float(before.double().norm())
        layers.setdefault(_layer(name), []).append(
            WeightChange(
                name,
                before.numel(),
                measured["weight_l2"],
                norm,
                measured["weight_sparsity"],
            )
        )
    if unmerged:
        notes.append(f"{len(unmerged)} weights are not among the changes. {unmerged[0]}")
    return [_total(layer, parts) for layer, parts in layers.items()], notes


def _paired(base: Sequence[str], tuned: Sequence[str]) -> dict[str, str]:
    """Which weight of the one is which of the other: by name, or by what follows a prefix such as `transformer.`.

    A base may have been saved as the bare transformer, without the prefix that a model with an LM head gives it.
    """
    there = set(tuned)
    if shared := {name: name for name in base if name in there}:
        return shared
    prefixed = {name: rest for name in tuned if (rest := name.partition(".")[2]) in set(base)}
    if prefixed:
        return {rest: name for name, rest in prefixed.items()}
    return {name: rest for name in base if (rest := name.partition(".")[2]) in there}


def _total(name: str, parts: Sequence[WeightChange]) -> WeightChange:
    """All of them as one."""
    size = sum(part.parameters for part in parts)
    unchanged = sum(part.unchanged * part.parameters for part in parts) / size
    l2, norm = (math.hypot(*values) for values in zip(*((part.l2, part.norm) for part in parts), strict=True))
    return WeightChange(name, size, l2, norm, unchanged)


def _layer(name: str) -> str:
    found = re.search(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.", name)
    return f"layer {found[1]}" if found else name.removesuffix(".weight").removeprefix("model.")


def _natural(name: str) -> list[Any]:
    """Layer 10 after layer 9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
