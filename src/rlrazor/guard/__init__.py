"""What users install rlrazor for: watch a training run, forecast its forgetting, compare checkpoints, pick one.

ForgettingMonitor     a `transformers.TrainerCallback`: KL to the base and its forecast while training
watch                 the same from another process: each checkpoint as it is saved
compare               two checkpoints: KL, where it is, weights, forecast; a page
calibrate             the law of a base, from a few measured runs
pick                  which checkpoint of a run to take
Measuring             how the monitor measures, where that is not the law's way: tokenizer, generic text ...
ProbeSettings         ... and how prompts are completed
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rlrazor.extras import needs_extra

if TYPE_CHECKING:
    from rlrazor.guard.measured_on import Measuring
    from rlrazor.guard.monitor import ForgettingMonitor
    from rlrazor.lm.probes import ProbeSettings

__all__ = ["ForgettingMonitor", "Measuring", "ProbeSettings"]
_HOMES = {"ForgettingMonitor": "guard.monitor", "Measuring": "guard.measured_on", "ProbeSettings": "lm.probes"}


def __getattr__(name: str) -> Any:
    """Import what is asked for, and torch and transformers with it, only then."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "ForgettingMonitor":
        needs_extra("guard")
    return getattr(import_module(f"rlrazor.{_HOMES[name]}"), name)
