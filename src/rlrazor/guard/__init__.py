"""What users install rlrazor for: watch a training run, forecast its forgetting, compare checkpoints, pick one.

ForgettingMonitor     a `transformers.TrainerCallback`: KL to the base and its forecast while training
compare               two checkpoints: KL, where it is, weights, forecast; a page
calibrate             the law of a base, from a few measured runs
pick                  which checkpoint of a run to take
ProbeSettings         how prompts are completed and measured, for the monitor
"""

from typing import TYPE_CHECKING, Any

from rlrazor.extras import needs_extra

if TYPE_CHECKING:
    from rlrazor.guard.monitor import ForgettingMonitor
    from rlrazor.lm.probes import ProbeSettings

__all__ = ["ForgettingMonitor", "ProbeSettings"]


def __getattr__(name: str) -> Any:
    """Import the monitor, and transformers with it, only where it is asked for."""
    if name == "ForgettingMonitor":
        needs_extra("guard")
        from rlrazor.guard.monitor import ForgettingMonitor

        return ForgettingMonitor
    if name == "ProbeSettings":
        from rlrazor.lm.probes import ProbeSettings

        return ProbeSettings
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
