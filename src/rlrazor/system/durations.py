"""How long something took, or may take, as people read it."""


def took(seconds: float) -> str:
    """What was measured, to the second or minute: `47 s`, `2 min 5 s` or `1 h 12 min`."""
    if round(seconds) < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def about(seconds: float) -> str:
    """An estimate, to two digits: `0.05 s`, `3.2 s`, `47 s`, `12 min` or `1.5 h`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s" if seconds >= 0.995 else f"{seconds:.2g} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{seconds / 3600:.1f} h"
