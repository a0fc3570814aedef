"""How the tests of trainers train: settings with some of their fields changed, whichever part they are in."""

from dataclasses import replace
from typing import Any

from rlrazor.experiments.language.trainers import Settings


def changed(settings: Settings, **fields: Any) -> Settings:
    """The same settings with these fields of them, or of their updates, samples and saving."""
    parts: dict[str, Any] = {}
    for name in ("updates", "samples", "saving"):
        part = getattr(settings, name)
        own = {one: fields.pop(one) for one in list(fields) if one in part.__dataclass_fields__}
        parts[name] = replace(part, **own)
    return replace(settings, **parts, **fields)
