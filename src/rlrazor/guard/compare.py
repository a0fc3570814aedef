"""Two checkpoints side by side: how far apart, on which prompts, at which tokens, in which weights, and at what price.

One model is in memory at a time: of the other side there are only the hidden states of the probes and an LM head, which
is all that an exact KL needs (`lm.kl`). The base is loaded twice, the second time for the tuned model's completions; an
adapter is taken off instead, where that gives the base. Weights are read from the files in pairs, a tensor at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlrazor import drift
from rlrazor.analysis.forecast import FORWARD, PROBE
from rlrazor.drift.representation import NEIGHBOURS
from rlrazor.errors import RazorError
from rlrazor.extras import needs_package
from rlrazor.guard import scale
from rlrazor.guard.base_side import kls_of
from rlrazor.guard.by_prompt import by_prompt
from rlrazor.guard.comparison import (
    REVERSE,
    Comparison,
    Distances,
    LawSays,
    MeasuringSetup,
    Weights,
)
from rlrazor.guard.comparison import Pair as Pair
from rlrazor.guard.law_file import LawFile
from rlrazor.guard.measured_on import MeasuredOn, Measuring
from rlrazor.guard.measuring import NO_MEMORY, ReadBase, of_another_base
from rlrazor.guard.overlap import template_caution
from rlrazor.guard.parts import notes_of as parts_notes
from rlrazor.guard.parts import parts_of
from rlrazor.guard.recover import Recovered, RecoverySet, recover, trainings
from rlrazor.guard.recovery import Recovery
from rlrazor.guard.scale import Noise
from rlrazor.guard.truth import truth_of
from rlrazor.guard.weight_changes import WeightChange, changes, total
from rlrazor.lm import compute, images, kl, noise_floor, probes
from rlrazor.lm.adapters import AdaptedWeights, BaseWeights
from rlrazor.lm.digests import base_digest, is_same_base
from rlrazor.lm.encoding import text_ids
from rlrazor.lm.harness.asking import Asking
from rlrazor.lm.kl import Drift, Sequences
from rlrazor.lm.models import LanguageModel, load
from rlrazor.lm.noise_floor import VARIANTS, NoiseFloor
from rlrazor.lm.prior import PriorTasks
from rlrazor.lm.probes import GenericText, ProbeSettings, Prompt
from rlrazor.lm.prompts import texts_of
from rlrazor.lm.representation import representation_of_ids
from rlrazor.lm.sampling import NotFiniteError
from rlrazor.lm.scores import PriorScores
from rlrazor.lm.sources import SavedWeights, stored_scheme
from rlrazor.lm.weight_files import check_adapter, is_adapter

STEPS = 6  # of the progress, without prior tasks
LEVEL = 0.9  # of intervals where neither a law nor the caller says another


def steps(suite: PriorTasks | None, *, noise_floor: bool = False, recovery: Recovery | None = None) -> int:
    """Of the progress: so often `compare` says what it begins, at most."""
    tasks = 0 if suite is None else len(dict.fromkeys(suite.tasks or ()))
    scored = 2 + (noise_floor and VARIANTS) + (0 if recovery is None else 2)
    return STEPS + scored * tasks + trainings(suite, recovery)


@dataclass(frozen=True)
class _Request:
    """What is measured, all defaults resolved. `examples`: what copies of both are trained on; None for no recovery."""

    pair: Pair
    on: MeasuredOn
    law: LawFile | None
    suite: PriorTasks | None
    level: float
    told: Callable[[str], None]
    examples: RecoverySet | None = None

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
    suite: PriorTasks | None = None,
    level: float | None = None,
    told: Callable[[str], None] = lambda step: None,
) -> Comparison:
    """Compare two checkpoints; `told` hears of each of the `steps` as it begins.

    With a law its probe and settings are used, and its level where none is given. Raises RazorError for models that
    cannot be loaded, do not belong together or seem to be swapped, a law of another base, and no prompts.
    """
    asked = Measuring(generic, settings, level)
    pair = replace(pair, base=_expanded(pair.base), tuned=_expanded(pair.tuned))
    notes = _check_order(pair)
    on = MeasuredOn(prompts, law.generic, law.settings) if law else asked.on(prompts, None)
    if (precision := on.settings.precision) not in (None, pair.dtype):
        raise RazorError(
            f"The law was calibrated in {precision}, and the models are to be loaded in {pair.dtype}, whose KL is "
            f"another: leave --dtype out, or give --dtype {precision}."
        )
    on = replace(on, settings=replace(on.settings, precision=pair.dtype))
    law = law and law.at_level(level)
    examples = None
    if pair.recovery is not None:
        if suite is None:
            raise RazorError("--recover is of the prior tasks: name them with --prior.")
        if pair.recovery.rank:
            needs_package("peft", "A LoRA")
        examples = RecoverySet.of(suite, pair.recovery.seed)
    request = _Request(pair, on, law, suite, law.interval.level if law else level or LEVEL, told, examples)
    try:
        with compute.memory_errors(NO_MEMORY):
            found = _measure(request)
    except NotFiniteError as error:
        raise RazorError(
            f"The outputs of {pair.base} or {pair.tuned} are NaN or infinite: training has diverged, or {pair.dtype} "
            "is too coarse for them."
        ) from error
    return _comparison(request, found, notes)


def _comparison(request: _Request, found: _Found, notes: list[str]) -> Comparison:
    """What the measurements amount to."""
    on, law, tokenizer = request.on, request.law, found.base.read.tokenizer
    drawn = {**found.tuned.drifts, REVERSE: found.reverse}
    measured = {name: drift.n_prompts for name, drift in found.tuned.drifts.items()}
    notes += [*on.cautions(measured), *found.base.read.side.cautions]
    if (form := template_caution(on.prompts, tokenizer, on.settings)) is not None:
        notes.append(form)
    truth, before, after = None, found.base.scores, found.tuned.scores
    if before is not None and after is not None and request.suite is not None:
        parts = parts_of(before, after, found.recovered, request.level)
        truth = truth_of(before, after, request.level, request.suite.limit)
        truth = replace(truth, floor=found.base.floor, parts=parts, recovered=found.recovered)
        notes += [*dict.fromkeys([*before.notes, *after.notes]), *truth.notes]
        notes += [*parts_notes(parts, before, found.recovered), *(request.examples.notes if request.examples else ())]
    estimates = kls_of(drawn)
    law_says = None
    if law is not None:
        kls = {name: estimates[name] for name in (FORWARD, PROBE)}
        forecast = law.forecast(kls, prompts=on.prompts, measured=measured[FORWARD])
        law_says = LawSays(forecast, law)
        notes += law.cautions()
        if request.suite is not None and dict(law.prior.asked) != request.suite.asking.as_json():
            notes.append(
                f"The law's prior tasks were asked {Asking(**law.prior.asked).words}, and here they are asked "
                f"{request.suite.asking.words}: its forecast is of other scores than the measured ones."
            )
        if forecast.extrapolated:
            notes.append("KL is larger than in any run that the law was fitted to: the interval may be too narrow.")
    forward, first = found.tuned.drifts[FORWARD], request.pair.first_tokens
    per_token = {name: drift.per_token for name, drift in drawn.items()}
    base, tuned = (found.base.completions, forward), (found.tuned.completions, found.reverse)
    return Comparison(
        pair=request.pair,
        distances=Distances(
            kl=estimates,
            per_token=per_token,
            noise=found.base.noise,
            focus=scale.focus_of(forward, first),
            cknna=found.tuned.cknna,
            depth={name: scale.depth_of(drift, first) for name, drift in drawn.items()},
        ),
        prompts=by_prompt(base, tuned, tokenizer, on.prompts, on.settings),
        weights=found.weights,
        law_says=law_says,
        truth=truth,
        setup=_setup(request, found),
        notes=[*notes, *found.notes],
    )


def _setup(request: _Request, found: _Found) -> MeasuringSetup:
    more = {"peft"} if request.adapted else set()
    more |= {"lm-eval"} if request.suite is not None else set()
    base = found.base
    return MeasuringSetup.now(
        request.on, base.completions, base.read.tokenizer, request.level, suite=request.suite, more=more
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
        if (note := of_another_base(pair.tuned, pair.base)) is not None:
            return [note]
    return []


@dataclass
class _OfBase:
    """What is left of the base when it is not in memory any more.

    `rows`: the generic probe as token ids; `similar`: how similar the base takes its texts for, None for too few.
    """

    read: ReadBase
    completions: Sequences
    rows: list[list[int]]
    similar: Any
    noise: Noise
    scores: PriorScores | None
    floor: NoiseFloor | None = None


@dataclass
class _OfTuned:
    """The same of the tuned model, and its KLs to the base."""

    drifts: dict[str, Drift]
    completions: Sequences
    probe: kl.Probe
    cknna: float | None
    scores: PriorScores | None
    notes: list[str]


@dataclass
class _Found:
    """What the passes over the models leave behind."""

    base: _OfBase
    tuned: _OfTuned
    reverse: Drift
    weights: Weights
    notes: list[str]
    recovered: Recovered | None


def _measure(request: _Request) -> _Found:
    pair, told, notes = request.pair, request.told, list[str]()
    names = pair.base, pair.tuned
    layers: list[WeightChange] = []
    schemes = stored_scheme(pair.base), "" if request.adapted else stored_scheme(pair.tuned)
    if pair.recovery is not None and any(schemes):
        raise RazorError("--recover trains copies of both models, and one that is quantised cannot be trained.")
    if not request.adapted and not any(schemes):
        told("weights")  # first: it finds out soonest that the two do not belong together
        layers, notes = changes(SavedWeights(pair.base), SavedWeights(pair.tuned), names)

    told("loading the base")
    lm = load(pair.base, dtype=pair.dtype)
    if schemes[0] and not schemes[1] and not request.adapted:
        told("weights")  # of what is quantised, the numbers that it stands for
        layers, notes = changes(BaseWeights(lm.model), SavedWeights(pair.tuned), names)
    base = _base_side(lm, request)
    del lm
    compute.free()
    base.floor = _floor(request, base)
    compute.free()
    told("loading the tuned model")
    tuned, tokenizer = base.read.opened(pair.tuned)
    side = _tuned_side(tuned, tokenizer, base, request)
    # Some adapters put other weights into the base, or train its biases: then it is not there.
    precision = request.on.settings.precision
    undone = request.adapted and is_same_base(base_digest(tuned.model, precision), base.read.digest)
    if request.adapted:
        told("weights")
        layers, notes = changes(
            BaseWeights(tuned.model) if undone else SavedWeights(pair.base), AdaptedWeights(tuned.model), names
        )
    elif schemes[1] and not schemes[0]:
        told("weights")
        layers, notes = changes(SavedWeights(pair.base), BaseWeights(tuned.model), names)
    elif all(schemes):
        notes = ["Both are quantised: the weights are not compared, as only one of the two is in memory at a time."]
    notes += _quantised_notes(pair, schemes, adapted=request.adapted)
    weights = Weights(total("all", layers), layers, untold=bool(notes))
    if request.adapted and not any(layer.l2 for layer in layers) and side.drifts[FORWARD].sums.any():
        notes.append("The adapter adds to the model and changes no weight of it: what it adds is not among these.")

    told("the base on the tuned model's completions")
    if not undone:
        del tuned
        compute.free()
        tuned = load(pair.base, dtype=pair.dtype)
    reverse = kl.between(side.probe, kl.Probe(tuned.model, side.completions, precision=precision))
    del tuned
    compute.free()
    return _Found(base, side, reverse, weights, [*notes, *side.notes], _recovered(base, request))


def _quantised_notes(pair: Pair, schemes: tuple[str, str], *, adapted: bool) -> list[str]:
    """What the KL is of, where one of the two or both are quantised, or the adapter was trained on such a base."""
    base, tuned = schemes
    if base and adapted:
        return [
            f"The base is quantised ({base}), and the adapter is on top of it: the KL is of the adapter alone. Merged "
            "into weights of more bits it would be another."
        ]
    if base and tuned:
        return [f"Both are quantised (the base: {base}; the tuned model: {tuned}): the KL is of the two as they are."]
    if base:
        return [
            f"The base is quantised ({base}), and the tuned model is not: the KL is to the quantised base, and holds "
            "what its rounding does as well as what training did. For training alone, give the adapter itself as "
            "TUNED, or as BASE the model that was quantised."
        ]
    if tuned:
        return [
            f"The tuned model is quantised ({tuned}), and the base is not: the KL is of the quantised model, and holds "
            "what its rounding does as well as what training did."
        ]
    return []


def _recovered(base: _OfBase, request: _Request) -> Recovered | None:
    recovery, examples = request.pair.recovery, request.examples
    if recovery is None or examples is None or request.suite is None:
        return None
    return recover(base.read, request.pair.tuned, request.suite, recovery, examples, request.told)


def _base_side(base: LanguageModel, request: _Request) -> _OfBase:
    request.told("the base on the probes")
    read = ReadBase.of(base, request.pair.dtype, request.on, request.law, request.pair.cache_dir)
    forward, text = read.side.probes[FORWARD], read.side.probes[PROBE].sequences
    rows = [[*text.before(n), *completion] for n, completion in enumerate(text.completions)]
    return _OfBase(
        read=read,
        completions=forward.sequences,
        rows=rows,
        similar=representation_of_ids(base.model, rows) if len(rows) > NEIGHBOURS else None,
        noise=scale.noise_of(base.model, forward),
        scores=_prior_scores(base, request, "base"),
    )


def _floor(request: _Request, base: _OfBase) -> NoiseFloor | None:
    """How far the base's prior scores are from themselves: what the cache knows, or measured where that is asked."""
    pair = request.pair
    if request.suite is None or base.scores is None:
        return None
    path = noise_floor.path_of(pair.cache_dir, base.read.digest, pair.dtype, base.scores)
    found = noise_floor.cached(path, base.scores)
    if found is None and pair.noise_floor:
        found = noise_floor.measure(pair.base, pair.dtype, request.suite, base.scores, request.told)
        noise_floor.cache(path, found)
    return found


def _prior_scores(lm: LanguageModel, request: _Request, whose: str) -> PriorScores | None:
    if request.suite is None:
        return None
    return request.suite.scores(lm, lambda task: request.told(f"the {whose} on {task}"))


def _tuned_side(tuned: LanguageModel, own_tokenizer: Any, base: _OfBase, request: _Request) -> _OfTuned:
    """The base's probes are given back as soon as they are measured on."""
    settings, tokenizer, notes = request.on.settings, base.read.tokenizer, list[str]()
    if own_tokenizer is tokenizer and not request.adapted:
        notes.append(f"{request.pair.tuned} has no tokenizer: the base's is used.")
    notes += _tokenizer_notes(tokenizer, own_tokenizer, request.on.prompts)
    request.told("the tuned model on the probes")
    drifts = base.read.side.measure(tuned.model)
    base.read.side.probes.clear()
    # Drawn with the base's numbers: two models that are alike say the same.
    drawn = probes.complete(tuned.model, tokenizer, base.completions.prompts, settings, probes.NEW)
    own = base.completions.redrawn(drawn)
    cknna = None
    if base.similar is None:
        notes.append(f"CKNNA needs more than {NEIGHBOURS} texts in the generic probe; there are {len(base.rows)}.")
    else:
        cknna = drift.cknna(base.similar, representation_of_ids(tuned.model, base.rows))
    return _OfTuned(
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
    if images.have_images(prompts) and (other := images.processor_note(base, tuned)) is not None:
        notes.append(other)
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
