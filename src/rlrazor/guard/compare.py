"""Two checkpoints side by side: how far apart, on which prompts, at which tokens, in which weights, and at what price.

One model is in memory at a time: of the other side there are only the hidden states of the probes and an LM head, which
is all that an exact KL needs (`lm.kl`). The base is loaded twice, the second time for the tuned model's completions; an
adapter is taken off instead, where that gives the base. Weights are read from the files in pairs, a tensor at a time.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlrazor import bounds, drift
from rlrazor.analysis.forecast import FORWARD, PROBE, Forecast
from rlrazor.drift.representation import NEIGHBOURS
from rlrazor.errors import RazorError
from rlrazor.guard import scale
from rlrazor.guard.base_side import cautions_of
from rlrazor.guard.law_file import LawFile
from rlrazor.guard.overlap import template_caution
from rlrazor.guard.scale import Focus, Noise
from rlrazor.guard.truth import PriorSuite as PriorSuite
from rlrazor.guard.truth import Truth, truth_of
from rlrazor.guard.weight_changes import WeightChange, changes, total
from rlrazor.lm import compute, kl, probes
from rlrazor.lm.adapters import AdaptedWeights, base_weights
from rlrazor.lm.digests import base_digest, is_same_base
from rlrazor.lm.encoding import as_read, text_ids
from rlrazor.lm.kl import Drift, Estimate, Sequences
from rlrazor.lm.models import LanguageModel, Vocabulary, load, tokenizer_of
from rlrazor.lm.probes import GenericText, ProbeSettings, Prompt
from rlrazor.lm.prompts import last_said, texts_of
from rlrazor.lm.representation import representation_of_ids
from rlrazor.lm.sampling import NotFiniteError
from rlrazor.lm.scores import PriorScores
from rlrazor.lm.sources import SavedWeights
from rlrazor.lm.weight_files import check_adapter, is_adapter, named_base

REVERSE = "kl_reverse"
STEPS = 6  # of the progress, without prior tasks
LEVEL = 0.9  # of intervals where neither a law nor the caller says another
NO_MEMORY = "Out of memory: --dtype bfloat16 takes half of it; fewer or shorter prompts and completions take less."
Told = Callable[[str], None]


def steps(suite: PriorSuite | None) -> int:
    """Of the progress: so often `compare` says what it begins."""
    return STEPS + 2 * (0 if suite is None else len(dict.fromkeys(suite.tasks)))


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
    """Where the policy moved on one prompt; `total` is the mean forward KL of the base's completions, in nats.

    `prompt` is all of it, in the chat template where it was put into one; `said` what the user said last in it.
    """

    prompt: str
    total: float
    base: tuple[Completion, ...]
    tuned: tuple[Completion, ...]
    said: str = ""

    @property
    def first_share(self) -> float:
        """The share of `total` in the first `scale.FIRST` tokens of the base's completions."""
        first = sum(sum(completion.kl[: scale.FIRST]) for completion in self.base)
        return first / max(sum(completion.total for completion in self.base), 1e-30)


@dataclass(frozen=True)
class Setup:
    """How it was measured: KLs can be compared where the probe's settings and hashes are the same.

    `prompts` were given and `measured` of them fitted into the context; `generic_rows` are texts or prompts. `sources`:
    the files that these came from, and the command, as far as the caller said them.
    """

    probe: ProbeSettings
    prompts: int
    measured: int
    prompts_hash: str
    generic_rows: int
    generic_hash: str
    level: float
    prior_limit: int | None
    date: str
    versions: Mapping[str, str]
    sources: Mapping[str, str]


@dataclass(frozen=True)
class Comparison:
    """What was found. KLs in nats, per completion or text (`kl`) and per token; `notes` are sentences of caution.

    `first_prompt`: as the models read it, special tokens included; `precision`: what they computed in. `focus` is of
    the forward KL on the new task's prompts; `untold_weights`: some weights of the two could not be compared.
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
    noise: Noise
    focus: Focus
    setup: Setup
    untold_weights: bool = False
    notes: Sequence[str] = field(default_factory=tuple)
    precision: str = "float32"
    first_prompt: str = ""

    @property
    def drop(self) -> float | None:
        """The measured drop, or else the forecast one."""
        if self.truth is not None and self.truth.drop is not None:
            return self.truth.drop
        return None if self.forecast is None else self.forecast.drop

    @property
    def same(self) -> bool:
        """Whether the two are one model: no weight has changed, and no KL is more than the noise of measuring it."""
        moved = any(not scale.is_zero(one, self.noise) for one in self.per_token.values())
        return not (moved or self.weights.l2 or self.untold_weights)


@dataclass(frozen=True)
class _Request:
    """What is measured, all defaults resolved."""

    pair: Pair
    prompts: Sequence[Prompt]
    generic: GenericText
    settings: ProbeSettings
    law: LawFile | None
    suite: PriorSuite | None
    told: Told

    @property
    def adapted(self) -> bool:
        return is_adapter(self.pair.tuned)


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
    sources: Mapping[str, str] | None = None,
) -> Comparison:
    """Compare two checkpoints; `told` hears of each of the `steps` as it begins, `sources` are kept with the settings.

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
    request = _Request(pair, prompts, generic, replace(settings, precision=pair.dtype), law, suite, told)
    try:
        with compute.memory_errors(NO_MEMORY):
            found = _measure(request)
    except NotFiniteError as error:
        raise RazorError(
            f"The outputs of {pair.base} or {pair.tuned} are NaN or infinite: training has diverged, or {pair.dtype} "
            "is too coarse for them."
        ) from error
    return _comparison(request, found, level, notes, sources or {})


def _comparison(
    request: _Request, found: _Found, level: float | None, notes: list[str], sources: Mapping[str, str]
) -> Comparison:
    """What the measurements amount to."""
    law, prompts, suite = request.law, request.prompts, request.suite
    measured = {FORWARD: found.forward.n_prompts, PROBE: found.probe.n_prompts}
    notes += cautions_of(measured, prompts, request.generic, request.settings)
    if (form := template_caution(prompts, found.tokenizer, request.settings)) is not None:
        notes.append(form)
    wanted = level if level is not None else law.level if law else LEVEL
    truth = None
    if found.scores is not None and suite is not None:
        truth = truth_of(*found.scores, wanted, suite.limit)
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
        base=request.pair.base,
        tuned=request.pair.tuned,
        kl=estimates,
        per_token={name: of.per_token for name, of in drawn.items()},
        prompts=_by_prompt(found, request),
        weights=total("all", found.layers),
        layers=found.layers,
        cknna=found.cknna,
        forecast=forecast,
        level=None if law is None else law.attainable(level),
        law=None if law is None else law.describe(level),
        truth=truth,
        noise=found.noise,
        focus=scale.focus_of(found.forward),
        setup=_setup(request, measured[FORWARD], wanted, sources),
        untold_weights=found.untold_weights,
        notes=[*notes, *found.notes],
        precision=request.pair.dtype,
        first_prompt=as_read(found.tokenizer, found.base_completions.prompts[0]),
    )


def _setup(request: _Request, measured: int, level: float, sources: Mapping[str, str]) -> Setup:
    packages = {"rlrazor", "torch", "transformers"} | ({"peft"} if request.adapted else set())
    packages |= {"lm-eval"} if request.suite is not None else set()
    versions = {}
    for name in sorted(packages):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    generic = request.generic
    return Setup(
        probe=request.settings,
        prompts=len(request.prompts),
        measured=measured,
        prompts_hash=probes.content_hash(list(request.prompts)),
        generic_rows=len(generic.texts or generic.prompts),
        generic_hash=generic.content_hash,
        level=level,
        prior_limit=None if request.suite is None else request.suite.limit,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=versions,
        sources=dict(sources),
    )


def _expanded(source: str) -> str:
    return str(Path(source).expanduser()) if source.startswith("~") else source


def _check_order(pair: Pair) -> list[str]:
    """Raise RazorError where the two seem to be swapped; return notes."""
    swap, adapted = "The order is BASE TUNED", is_adapter(pair.tuned)
    if is_adapter(pair.base):
        raise RazorError(f"{pair.base} is an adapter, so it is not the base. {swap}.")
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
    noise: Noise
    scores: tuple[PriorScores, PriorScores] | None
    layers: list[WeightChange]
    untold_weights: bool
    notes: list[str]


@dataclass
class _BaseSide:
    """What is left of the base when it is not in memory any more. `rows`: the generic probe as token ids."""

    digest: str
    tokenizer: Any
    vocabulary: Vocabulary
    completions: Sequences
    probes: dict[str, kl.Probe]
    rows: list[list[int]]
    similar: Any
    noise: Noise
    scores: PriorScores | None


@dataclass
class _TunedSide:
    """The same of the tuned model, and its KLs to the base."""

    drifts: dict[str, Drift]
    completions: Sequences
    probe: kl.Probe
    cknna: float | None
    scores: PriorScores | None
    notes: list[str]


def _measure(request: _Request) -> _Found:
    pair, told, notes = request.pair, request.told, list[str]()
    names = pair.base, pair.tuned
    layers: list[WeightChange] = []
    if not request.adapted:
        told("weights")  # first: it finds out soonest that the two do not belong together
        layers, notes = changes(SavedWeights(pair.base), SavedWeights(pair.tuned), names)

    told("loading the base")
    base = _base_side(load(pair.base, dtype=pair.dtype), request)
    _free()
    told("loading the tuned model")
    tuned = _tuned_model(request, base.tokenizer)
    side = _tuned_side(tuned, base, request)
    # Some adapters put other weights into the base, or train its biases: then it is not there.
    precision = request.settings.precision
    undone = request.adapted and is_same_base(base_digest(tuned.model, precision), base.digest)
    if request.adapted:
        told("weights")
        there = base_weights(tuned.model) if undone else SavedWeights(pair.base)
        layers, notes = changes(there, AdaptedWeights(tuned.model), names)
    untold = bool(notes)
    if request.adapted and not any(layer.l2 for layer in layers) and side.drifts[FORWARD].sums.any():
        notes.append("The adapter adds to the model and changes no weight of it: what it adds is not among these.")

    told("the base on the tuned model's completions")
    if not undone:
        del tuned
        _free()
        tuned = load(pair.base, dtype=pair.dtype)
    reverse = kl.between(side.probe, kl.Probe(tuned.model, side.completions, precision=precision))
    return _Found(
        forward=side.drifts[FORWARD],
        probe=side.drifts[PROBE],
        reverse=reverse,
        base_completions=base.completions,
        tuned_completions=side.completions,
        tokenizer=base.tokenizer,
        cknna=side.cknna,
        noise=base.noise,
        scores=None if base.scores is None or side.scores is None else (base.scores, side.scores),
        layers=layers,
        untold_weights=untold,
        notes=[*notes, *side.notes],
    )


def _base_side(base: LanguageModel, request: _Request) -> _BaseSide:
    settings = request.settings
    kept: dict[str, Any] = {"cache_dir": request.pair.cache_dir, "digest": base_digest(base.model, settings.precision)}
    if request.law is not None:
        request.law.check(base.model, base.tokenizer, kept["digest"])
    request.told("the base on the probes")
    new = probes.of_prompts(base.model, base.tokenizer, request.prompts, settings, **kept)
    text = probes.of_generic(base.model, base.tokenizer, request.generic, settings, **kept)
    first = kl.Probe(base.model, new, precision=settings.precision)
    rows = [[*text.prompts[at], *completion] for at, completion in zip(text.prompt_of, text.completions, strict=True)]
    return _BaseSide(
        digest=kept["digest"],
        tokenizer=base.tokenizer,
        vocabulary=Vocabulary.of(base),
        completions=new,
        probes={FORWARD: first, PROBE: kl.Probe(base.model, text, beside=first, precision=settings.precision)},
        rows=rows,
        similar=representation_of_ids(base.model, rows) if len(rows) > NEIGHBOURS else None,
        noise=scale.noise_of(base.model, first),
        scores=_prior_scores(base, request, "base"),
    )


def _prior_scores(lm: LanguageModel, request: _Request, whose: str) -> PriorScores | None:
    if request.suite is None:
        return None
    return request.suite.scores(lm, lambda task: request.told(f"the {whose} on {task}"))


def _tuned_model(request: _Request, tokenizer: Any) -> LanguageModel:
    pair = request.pair
    if request.adapted:
        return load(pair.base, adapter=Path(pair.tuned), dtype=pair.dtype)
    return load(pair.tuned, dtype=pair.dtype, tokenizer=tokenizer)


def _tuned_side(tuned: LanguageModel, base: _BaseSide, request: _Request) -> _TunedSide:
    """`base.probes` are given back as soon as they are measured on."""
    settings, tokenizer, notes = request.settings, base.tokenizer, list[str]()
    if tuned.tokenizer is tokenizer and not request.adapted:
        notes.append(f"{request.pair.tuned} has no tokenizer: the base's is used.")
    notes += _tokenizer_notes(tokenizer, tokenizer_of(tuned, request.pair.tuned, base.vocabulary), request.prompts)
    request.told("the tuned model on the probes")
    drifts = {name: kl.forward_kl(probe, tuned.model) for name, probe in base.probes.items()}
    base.probes.clear()
    # Drawn with the base's numbers: two models that are alike say the same.
    drawn = probes.complete(tuned.model, tokenizer, base.completions.prompts, settings, probes.NEW)
    own = Sequences.grouped(base.completions.prompts, drawn)
    cknna = None
    if base.similar is None:
        notes.append(f"CKNNA needs more than {NEIGHBOURS} texts in the generic probe; there are {len(base.rows)}.")
    else:
        cknna = drift.cknna(base.similar, representation_of_ids(tuned.model, base.rows))
    return _TunedSide(
        drifts=drifts,
        completions=own,
        probe=kl.Probe(tuned.model, own, adapted=True, precision=settings.precision),
        cknna=cknna,
        scores=_prior_scores(tuned, request, "tuned model"),
        notes=notes,
    )


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


# Where on the prompts


def _by_prompt(found: _Found, request: _Request) -> list[PromptDrift]:
    """The worst first."""
    base = _completions(found.base_completions, found.forward, found.tokenizer)
    tuned = _completions(found.tuned_completions, found.reverse, found.tokenizer)
    ids = found.base_completions.prompts
    rendered = [str(found.tokenizer.decode(list(prompt), skip_special_tokens=True)) for prompt in ids]
    said = _said(request, found.tokenizer, ids) or rendered
    shown = [
        PromptDrift(
            rendered[index],
            float(np.mean([completion.total for completion in base[index]])),
            tuple(base[index]),
            tuple(tuned[index]),
            said[index],
        )
        for index in range(len(ids))
    ]
    return sorted(shown, key=lambda one: -one.total)


def _said(request: _Request, tokenizer: Any, measured: Sequence[Sequence[int]]) -> list[str]:
    """What the user says last in each prompt that is measured, some having been left out; none where that is lost."""
    left = list(zip(request.prompts, probes.encode(tokenizer, request.prompts, request.settings.chat), strict=True))
    said = []
    for ids in measured:
        while left and left[0][1] != list(ids):
            left.pop(0)
        if not left:  # a template that says what time it is, say
            return []
        said.append(last_said(left.pop(0)[0]))
    return said


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
