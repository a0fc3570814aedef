"""How many CPU cores this process may use, which in a container is fewer than the machine has."""

import os
from contextlib import suppress
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def available() -> int:
    """Those that it may run on, or as many as its container's quota of CPU time is worth, at least one."""
    # Where the system has no affinity, such as macOS, all of the machine's.
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota()
    return count if quota is None else max(1, min(count, round(quota)))


def _quota() -> float | None:
    """Cores' worth of CPU time, of cgroup v2 or v1; None where there is no limit."""
    with suppress(OSError, ValueError):
        quota, period = (CGROUP / "cpu.max").read_text().split()
        return int(quota) / int(period)  # "max" is no limit, and no number
    with suppress(OSError, ValueError):
        quota, period = ((CGROUP / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else None
    return None
