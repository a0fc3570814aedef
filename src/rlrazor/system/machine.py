"""This machine in words: its processor decides the last digits of what is computed on it."""

import os
import platform
import sys
from contextlib import suppress
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


def processor() -> str:
    """The processor's model; where only its architecture is known, that."""
    with suppress(OSError):
        for line in CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, model = line.partition(":")
            if name.strip() == "model name" and model.strip():
                return f"{platform.machine()} {' '.join(model.split())}"
    return platform.machine() or "unknown"


MACHINE = f"{processor()}, {os.cpu_count()} cores, {sys.platform}"
