"""A base that is measured against when it is not in memory any more, and the checkpoints of a run against it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from rlrazor.errors import RazorError
from rlrazor.extras import needs_package
from rlrazor.guard.base_side import BaseSide, kls_of
from rlrazor.guard.law_file import LawFile
from rlrazor.guard.measured_on import MeasuredOn
from rlrazor.guard.pick_sources import MeasureCheckpoint
from rlrazor.guard.scored import Forgetting
from rlrazor.lm import compute, images
from rlrazor.lm.digests import base_digest
from rlrazor.lm.forward import width
from rlrazor.lm.kl import Drift
from rlrazor.lm.models import LanguageModel, Vocabulary, load, tokenizer_of
from rlrazor.lm.probes import default_cache
from rlrazor.lm.sampling import NotFiniteError
from rlrazor.lm.weight_files import is_adapter, named_base

NO_MEMORY = "Out of memory: --dtype bfloat16 takes half of it; fewer or shorter prompts and completions take less."
NO_TOKENIZER = "Checkpoints that have no tokenizer are measured with the base's."


@dataclass(frozen=True)
class ReadBase:
    """What is left of a base, loaded from `source` as `dtype`: its side of the probes, and what its token ids mean.

    `sees`: whether any prompt has images. `width`: of its hidden states, where its config says.
    """

    beside: ClassVar[Mapping[str, float]] = {}
    """What goes into a log beside a measurement: of a base that is here, nothing."""

    source: str
    dtype: str
    digest: str
    tokenizer: Any
    vocabulary: Vocabulary
    side: BaseSide
    sees: bool = False
    width: int | None = None

    @classmethod
    def of(cls, base: LanguageModel, dtype: str, on: MeasuredOn, law: LawFile | None, cache_dir: Path | None) -> Self:
        """Raises RazorError for another base than the law's, and as `BaseSide.of` does."""
        digest = base_digest(base.model, on.settings.precision)
        if law is not None:
            law.check(base.model, base.tokenizer, digest)
        side = BaseSide.of(base.model, base.tokenizer, on, cache_dir=cache_dir, digest=digest)
        sees, own = images.have_images(on.prompts), width(base.model)
        return cls(base.source, dtype, digest, base.tokenizer, Vocabulary.of(base), side, sees, own)

    @classmethod
    def of_source(
        cls, source: str, dtype: str, on: MeasuredOn, law: LawFile | None, cache_dir: Path | None = None
    ) -> Self:
        """The same of a base that is loaded for it, and given back. Raises RazorError as `load` does, too."""
        try:
            with compute.memory_errors(NO_MEMORY):
                return cls.of(load(source, dtype=dtype), dtype, on, law, cache_dir or default_cache())
        except NotFiniteError as error:
            raise RazorError(f"The outputs of {source} are NaN or infinite: {dtype} is too coarse for them.") from error

    def measured(self, path: str | Path, notes: list[str]) -> dict[str, Drift]:
        """A checkpoint, full or an adapter, on both probes; `notes` gain what has to be known of how.

        Raises RazorError for what cannot be loaded, is of another vocabulary or width, has diverged, or needs more
        memory.
        """
        try:
            with compute.memory_errors(NO_MEMORY):
                tuned, tokenizer = self.opened(path)
                if self.width != (own := width(tuned.model)) and None not in (self.width, own):
                    raise RazorError(
                        f"its hidden states have {own} numbers, and those of {self.source} {self.width}: it was not "
                        "tuned from that base."
                    )
                alone = tokenizer is self.tokenizer and not is_adapter(path)
                other = images.processor_note(self.tokenizer, tokenizer) if self.sees else None
                for note in (NO_TOKENIZER if alone else None, of_another_base(path, self.source), other):
                    if note is not None and note not in notes:
                        notes.append(note)
                return self.side.measure(tuned.model)
        except NotFiniteError as error:
            raise RazorError("its outputs are NaN or infinite: training has diverged there.") from error

    def opened(self, path: str | Path) -> tuple[LanguageModel, Any]:
        """A checkpoint, full or an adapter for this base, with its own tokenizer, which has the base's tokens.

        One without a tokenizer has the base's. Raises RazorError as `load` and `tokenizer_of` do.
        """
        source, adapter = (self.source, Path(path)) if is_adapter(path) else (path, None)
        tuned = load(source, adapter=adapter, dtype=self.dtype, tokenizer=self.tokenizer)
        return tuned, tokenizer_of(tuned, path, self.vocabulary)


def of_another_base(path: str | Path, base: str) -> str | None:
    """What an adapter says of the base that it was trained on, where that has another name; None else."""
    named = named_base(path) if is_adapter(path) else ""
    if named and Path(named).name != Path(base).name:
        return f"The adapter says that it was trained on {named}, not on {base}."
    return None


def require_loadable(checkpoints: Sequence[Path]) -> None:
    """Raise RazorError where none of these can be loaded, before the base is, which takes minutes."""
    if all(is_adapter(path) for path in checkpoints):
        needs_package("peft", "An adapter")


def measurer(
    base: str, dtype: str, on: MeasuredOn, law: LawFile | None, told: Callable[[str], None]
) -> tuple[MeasureCheckpoint, list[str]]:
    """Measures a checkpoint, full or an adapter, against the base, whose side is computed once; and cautions.

    Those gain what is found while measuring.
    """
    told("the base on the probes")
    read = ReadBase.of_source(base, dtype, on, law)
    notes = [*on.cautions(read.side.whole), *read.side.cautions]

    def measure(path: Path, step: int) -> Forgetting:
        told(path.name)
        kls = kls_of(read.measured(path, notes))
        return Forgetting.by(law, step, kls, on.prompts, read.side.whole)

    return measure, notes
