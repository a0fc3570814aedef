"""axolotl's plugin: a monitor with the settings that axolotl's YAML gives it (docs/guides/integrations.md).

Under `razor` stand the arguments of `ForgettingMonitor` and of its `Measuring`, under its `settings` those of
`ProbeSettings`; the tokenizer is axolotl's. Only axolotl imports this module. Its interface, as axolotl 0.19.0 has it:
`integrations/base.py`, BasePlugin; `integrations/config.py`, how a plugin's section gets into the config;
`core/builders/base.py`.
"""

import inspect
from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from rlrazor.bounds import WrongKindError
from rlrazor.errors import RazorError
from rlrazor.guard.measured_on import Measuring
from rlrazor.guard.monitor import ForgettingMonitor
from rlrazor.lm.probes import ProbeSettings

_OURS = inspect.signature(ForgettingMonitor).parameters
ARGUMENTS = [
    *(name for name, one in _OURS.items() if one.kind is not one.VAR_KEYWORD and name != "measuring"),
    *(field.name for field in fields(Measuring) if field.name != "tokenizer"),
]
PROBE = [field.name for field in fields(ProbeSettings)]


class RazorArgs(BaseModel):
    """What the plugin adds to axolotl's config."""

    razor: dict[str, Any]


class RazorPlugin(BasePlugin):  # type: ignore[misc]
    """Gives axolotl's trainer a `ForgettingMonitor`. Raises RazorError for settings that it does not have."""

    def get_input_args(self) -> str:
        """Where the section is declared."""
        return f"{__name__}.RazorArgs"

    def register(self, cfg: Mapping[str, Any]) -> None:
        """Check the names as the config is read, before the model is."""
        given = cfg.get("razor") or {}
        _check(given, ARGUMENTS, "razor")
        _check(given.get("settings") or {}, PROBE, "razor.settings")
        if not given.get("prompts"):
            raise RazorError("axolotl's config needs a section `razor` with at least `prompts`, a file.")

    def add_callbacks_pre_trainer(self, cfg: Mapping[str, Any], model: Any) -> list[ForgettingMonitor]:
        """The monitor of the trainer that is about to be made."""
        given = dict(cfg["razor"])
        try:
            if settings := given.get("settings"):
                given["settings"] = ProbeSettings(**{**settings, "stop": tuple(settings.get("stop") or ())})
            return [ForgettingMonitor(**given)]
        except (TypeError, WrongKindError) as error:  # to YAML 2e-2 is text
            why = str(error).rstrip(".")
            raise RazorError(f"axolotl's config has a value of the wrong kind under `razor`: {why}.") from error


def _check(given: Mapping[str, Any], known: Collection[str], where: str) -> None:
    if unknown := [name for name in given if name not in known]:
        raise RazorError(f"axolotl's config has {unknown[0]!r} under `{where}`, which has only {', '.join(known)}.")
