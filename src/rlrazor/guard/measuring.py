"""Checkpoints of a run measured one after another against their base, where no monitor has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlrazor.errors import RazorError
from rlrazor.extras import needs_package
from rlrazor.guard.base_side import BaseSide, kls_of
from rlrazor.guard.compare import NO_MEMORY
from rlrazor.guard.law_file import LawFile
from rlrazor.guard.measured_on import MeasuredOn
from rlrazor.guard.pick_sources import MeasureCheckpoint
from rlrazor.guard.scored import Forgetting
from rlrazor.lm import compute
from rlrazor.lm.digests import base_digest
from rlrazor.lm.models import Vocabulary, load, tokenizer_of
from rlrazor.lm.probes import default_cache
from rlrazor.lm.sampling import NotFiniteError
from rlrazor.lm.weight_files import is_adapter

NO_TOKENIZER = "Checkpoints that have no tokenizer are measured with the base's."


@dataclass(frozen=True)
class Against:
    """What checkpoints are measured against, and how."""

    base: str
    dtype: str
    on: MeasuredOn


def require_loadable(checkpoints: Sequence[Path]) -> None:
    """Raise RazorError where none of these can be loaded, before the base is, which takes minutes."""
    if all(is_adapter(path) for path in checkpoints):
        needs_package("peft", "An adapter")


def measurer(against: Against, law: LawFile | None, told: Callable[[str], None]) -> tuple[MeasureCheckpoint, list[str]]:
    """Measures a checkpoint, full or an adapter, against the base, whose side is computed once; and cautions.

    Those gain what is found while measuring.
    """
    base, dtype, on = against.base, against.dtype, against.on
    try:
        with compute.memory_errors(NO_MEMORY):
            own = load(base, dtype=dtype)
            digest = base_digest(own.model, on.settings.precision)
            if law is not None:
                law.check(own.model, own.tokenizer, digest)
            side = BaseSide.of(own.model, own.tokenizer, on, cache_dir=default_cache(), digest=digest)
    except NotFiniteError as error:
        raise RazorError(f"The outputs of {base} are NaN or infinite: {dtype} is too coarse for them.") from error
    vocabulary, tokenizer = Vocabulary.of(own), own.tokenizer
    notes = on.cautions(side.whole)
    del own
    told("checkpoints")

    def measure(path: Path, step: int) -> Forgetting:
        try:
            with compute.memory_errors(NO_MEMORY):
                adapter = path if is_adapter(path) else None
                tuned = load(base if adapter else path, adapter=adapter, dtype=dtype, tokenizer=tokenizer)
                if tuned.tokenizer is tokenizer and adapter is None and NO_TOKENIZER not in notes:
                    notes.append(NO_TOKENIZER)
                tokenizer_of(tuned, path, vocabulary)
                kls = kls_of(side.measure(tuned.model))
        except NotFiniteError as error:
            raise RazorError("its outputs are NaN or infinite: training has diverged there.") from error
        finally:
            told(path.name)
        return Forgetting.by(law, step, kls, on.prompts, side.whole)

    return measure, notes
