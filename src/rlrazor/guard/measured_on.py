"""What KL is measured on, and how: what a user may ask for, and what follows from it with a law or without one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlrazor import bounds
from rlrazor.analysis.forecast import FORWARD, PROBE
from rlrazor.lm.probes import GenericText, ProbeSettings, Prompt, content_hash, read_generic, too_long
from rlrazor.lm.task_names import PRIOR

if TYPE_CHECKING:
    from rlrazor.guard.law_file import LawFile
    from rlrazor.lm.prior import PriorTasks

FEW_PROMPTS = 16  # below it a standard error is itself a guess, and a forecast's interval is widened by it in any case


@dataclass(frozen=True)
class MeasuredOn:
    """The new task's prompts, the generic probe, and how the base completes prompts."""

    prompts: Sequence[Prompt]
    generic: GenericText
    settings: ProbeSettings

    @cached_property
    def prompts_hash(self) -> str:
        """16 hexadecimal digits."""
        return content_hash(list(self.prompts))

    def cautions(self, measured: Mapping[str, int]) -> list[str]:
        """Sentences on what of the probes is measured, of which `measured` counts the prompts; whether it is enough."""
        said = []
        if (missing := len(self.prompts) - measured[FORWARD]) > 0:
            said.append(f"{missing} of the {len(self.prompts)} prompts are left out: {too_long(self.settings)}.")
        said += self.generic.left_out(self.settings, measured[PROBE])
        for name, one, more in (
            (FORWARD, "prompt", "prompts"),
            (PROBE, "row of the generic probe", "rows of the generic probe"),
        ):
            if (few := measured[name]) < FEW_PROMPTS:
                counted = f"1 {one} is" if few == 1 else f"{few} {more} are"
                said.append(
                    f"{counted} few: KL is uncertain, and the interval is widened by it. Give at least {FEW_PROMPTS}, "
                    "better a hundred."
                )
        return said


@dataclass(frozen=True)
class Measuring:
    """How a monitor is to measure, where that is not as the law says and with the trainer's tokenizer.

    `generic`: text that stands for what must not change: a file or `GenericText`; "self", which is what the base writes
    from nothing; "paragraphs", the sixty built-in ones; `PriorTasks` for their own prompts, or "prior" for those of the
    law. By default the law's, or else the paragraphs. `settings`: how the base completes prompts, by default the law's.
    `level`: of the forecast's interval, by default the law's. `cache_dir`: where the base's completions are kept, by
    default in the user's cache.
    """

    generic: str | Path | GenericText | PriorTasks | None = None
    settings: ProbeSettings | None = None
    level: float | None = None
    tokenizer: Any = None
    cache_dir: str | Path | None = None

    def __post_init__(self) -> None:
        bounds.check_number("level", self.level)

    def on(self, prompts: Sequence[Prompt], law: LawFile | None) -> MeasuredOn:
        """Raises RazorError for a file that cannot be read, and where a law was calibrated in another way."""
        own: GenericText | None
        if self.generic is None or isinstance(self.generic, GenericText):
            own = self.generic
        elif self.generic == PRIOR and law is not None and law.generic.prior is not None:
            own = law.generic
        else:
            own = read_generic(self.generic)
        generic = law.require_own("generic", own) if law else own
        settings = law.require_own("settings", self.settings) if law else self.settings
        return MeasuredOn(prompts, generic or GenericText.built_in(), settings or ProbeSettings())


AS_THE_LAW_SAYS = Measuring()
