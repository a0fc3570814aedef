"""How many CPU cores this process may use, which in a container is fewer than the machine has."""

import os
import re
from contextlib import suppress
from pathlib import Path

from rlrazor.errors import RazorError

CGROUP = Path("/sys/fs/cgroup")


def available() -> int:
    """Those that it may run on, or as many as its container's quota of CPU time is worth, at least one."""
    # Where the system has no affinity, such as macOS, all of the machine's.
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota()
    return count if quota is None else max(1, min(count, round(quota)))


def threads_asked() -> int | None:
    """What RLRAZOR_THREADS says, if it is set; raises RazorError where that is no number of threads."""
    asked = os.environ.get("RLRAZOR_THREADS")
    if asked is not None and not re.fullmatch("[1-9][0-9]{0,3}", asked):
        raise RazorError(f"RLRAZOR_THREADS is a number of threads, at least 1, not {asked!r}.")
    return None if asked is None else int(asked)


def threads_alone() -> int:
    """Of a process that has the machine to itself: a thread per core, or as many as OMP_NUM_THREADS says if fewer.

    RLRAZOR_THREADS overrides both.
    """
    if (asked := threads_asked()) is not None:
        return asked
    limit, _, _ = os.environ.get("OMP_NUM_THREADS", "").partition(",")
    return min(available(), int(limit)) if limit.isdecimal() and int(limit) else available()


def _quota() -> float | None:
    """Cores' worth of CPU time, of cgroup v2 or v1; None where there is no limit."""
    with suppress(OSError, ValueError):
        quota, period = (CGROUP / "cpu.max").read_text().split()
        return int(quota) / int(period)  # "max" is no limit, and no number
    with suppress(OSError, ValueError):
        quota, period = ((CGROUP / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else None
    return None
