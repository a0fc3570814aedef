"""`razor compare` where a model is behind a server: KLs both ways as estimates, beside what they are at least."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlrazor.analysis.forecast import FORWARD, PROBE
from rlrazor.errors import RazorError
from rlrazor.guard.base_side import generic_of
from rlrazor.guard.by_prompt import by_prompt
from rlrazor.guard.comparison import REVERSE, MeasuringSetup, Pair, PromptDrift
from rlrazor.guard.measured_on import MeasuredOn
from rlrazor.guard.measuring import NO_MEMORY
from rlrazor.guard.served import (
    AS_SERVED,
    EXACT,
    Asking,
    ServedKL,
    between,
    drawn_by_server,
    require_drawn,
    require_same_tokens,
    tokenizer_of,
)
from rlrazor.lm import compute, probes
from rlrazor.lm.encoding import stop_ids
from rlrazor.lm.kl import Sequences
from rlrazor.lm.models import load
from rlrazor.lm.sampling import NotFiniteError, Told, unheard
from rlrazor.lm.served import is_served
from rlrazor.lm.served.llama_file import LlamaFile
from rlrazor.lm.served.local import LocalModel
from rlrazor.lm.served.model import Served, opened
from rlrazor.lm.weight_files import is_adapter

STEPS = 5  # of the progress
LEVEL = 0.9  # of intervals, unless another is asked for


@dataclass(frozen=True)
class ServedComparison:
    """What was found. `kl`: by name as a Comparison's; `prompts`: the worst first, by the estimate; `kinds`: what each
    of the two is behind, "here" or whose server; `notes`: sentences of caution.
    """

    pair: Pair
    kl: Mapping[str, ServedKL]
    prompts: Sequence[PromptDrift]
    setup: MeasuringSetup
    asking: Asking
    kinds: tuple[str, str]
    notes: Sequence[str]


def compare_served(
    pair: Pair,
    on: MeasuredOn,
    asking: Asking,
    *,
    level: float | None = None,
    told: Callable[[str], None] = lambda step: None,
) -> ServedComparison:
    """Compare two models of which one at least is an address; `told` hears of each of the STEPS as it begins.

    Raises RazorError for a server, model or tokenizer that cannot be used, and what cannot be measured of one.
    """
    require_drawn(on)
    here = [source for source in (pair.base, pair.tuned) if not is_served(source)]
    if here and is_adapter(here[0]):
        raise RazorError(f"{here[0]} is an adapter, whose base is behind a server: merge it, or serve it too.")
    told("the servers")
    tokenizer = tokenizer_of(asking, here[0] if here else None)
    served = [
        opened(source, tokenizer, asking.top) if is_served(source) else None for source in (pair.base, pair.tuned)
    ]
    try:
        with compute.memory_errors(NO_MEMORY):
            return _compared(pair, on, asking, served, tokenizer, level or LEVEL, told)
    except NotFiniteError as error:
        raise RazorError(
            f"The outputs of {here[0]} are NaN or infinite: training has diverged, or {pair.dtype} is too coarse."
        ) from error


def _compared(
    pair: Pair,
    on: MeasuredOn,
    asking: Asking,
    served: Sequence[Served | None],
    tokenizer: Any,
    level: float,
    told: Callable[[str], None],
) -> ServedComparison:
    base, tuned = served
    in_process = all(one is None or isinstance(one, LlamaFile) for one in served)
    notes, model = (
        [EXACT if in_process else AS_SERVED, *(said for one in served if one is not None for said in one.cautions)],
        None,
    )
    for source, one in zip((pair.base, pair.tuned), served, strict=True):
        if one is None:
            told("loading the model that is here")
            lm = load(source, dtype=pair.dtype, tokenizer=tokenizer)
            require_same_tokens(lm.tokenizer, tokenizer, source)
            model = lm.model
            notes.append(f"{source} is read in {pair.dtype}; the other as it was started.")
    own = LocalModel(model, on.settings.precision)
    p, q = base or own, tuned or own
    drawn = _by_the_base(pair, on, base, model, tokenizer, told)
    told("both on the base's completions")
    kl = {name: between(p, q, sequences) for name, sequences in drawn.items()}
    told("both on the tuned model's completions")
    forward, settings = drawn[FORWARD], on.settings
    if tuned is not None:
        ends = stop_ids(tokenizer, model, settings.stop)
        completions = tuned.draw(forward.prompts, settings.samples, settings.max_new_tokens, ends)
    else:
        completions = probes.complete(model, tokenizer, forward.prompts, settings, probes.NEW)
    back = forward.redrawn(completions)
    kl[REVERSE] = between(q, p, back)
    notes += on.cautions({name: len(one.prompts) for name, one in drawn.items()})
    notes += probes.cautions_of(model, tokenizer, on.generic, drawn[PROBE])
    estimates = (forward, kl[FORWARD].estimate), (back, kl[REVERSE].estimate)
    kinds = [("here" if one is None else one.kind) for one in (base, tuned)]
    return ServedComparison(
        pair=pair,
        kl=kl,
        prompts=by_prompt(*estimates, tokenizer, on.prompts, settings),
        setup=MeasuringSetup.now(on, forward, tokenizer, level),
        asking=replace(asking, top=0) if in_process else asking,
        kinds=(kinds[0], kinds[1]),
        notes=notes,
    )


def _by_the_base(
    pair: Pair, on: MeasuredOn, base: Served | None, model: Any, tokenizer: Any, told: Callable[[str], None]
) -> dict[str, Sequences]:
    """Both probes, completed by the base, wherever it is."""
    if base is None:
        told("the base completes the prompts")
        return {
            FORWARD: probes.of_prompts(model, tokenizer, on.prompts, on.settings, cache_dir=pair.cache_dir),
            PROBE: generic_of(model, tokenizer, on, cache_dir=pair.cache_dir),
        }

    def heard(what: str) -> Told:
        told(what)
        return unheard

    return drawn_by_server(base, on, heard, model)
