"""Programs that a model wrote, run against their tests: what the metric of lm-eval's code tasks does.

`evaluate` would download that metric as a program and run it.
"""

import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence

SECONDS_PER_PROGRAM = 3.0  # as in the original HumanEval
_MEMORY_PER_PROGRAM = 4 << 30  # bytes


class CodeEval:
    """Stands in for the metric `code_eval` of `evaluate`: pass@k of programs, each followed by its tests."""

    def compute(
        self, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int]
    ) -> tuple[dict[str, float], None]:
        """Chance that one of k programs passes, from n of each problem: 1 - C(n - c, k) / C(n, k), arXiv:2107.03374."""
        passed = [
            (len(programs), sum(runs_clean(f"{program}\n{tests}") for program in programs))
            for tests, programs in zip(references, predictions, strict=True)
        ]
        return {
            f"pass@{draws}": sum(1 - math.comb(n - c, draws) / math.comb(n, draws) for n, c in passed) / len(passed)
            for draws in k
        }, None


# A program that ends by itself, by exit() or an exception, leaves another exit code than one that reaches its end.
_REACHED_THE_END = 113
_DRIVER = f"""
import os, sys
try:
    import resource
    for limit, most in (("AS", {_MEMORY_PER_PROGRAM}), ("CPU", {math.ceil(SECONDS_PER_PROGRAM)}), ("FSIZE", 1 << 20)):
        resource.setrlimit(getattr(resource, "RLIMIT_" + limit), (most, most))
except ImportError:
    pass  # Windows
exec(compile(sys.stdin.read(), "program", "exec"), {{"__name__": "__main__"}})
os._exit({_REACHED_THE_END})
"""


def runs_clean(program: str) -> bool:
    """Run a Python program in a process and folder of its own; True if it reaches its end within the limits.

    No sandbox: it may do whatever the user may, for `SECONDS_PER_PROGRAM`.
    """
    with tempfile.TemporaryDirectory(prefix="rlrazor-program-") as folder:
        try:
            finished = subprocess.run(
                [sys.executable, "-I", "-c", _DRIVER],
                input=program.encode("utf-8", "replace"),
                cwd=folder,
                env={},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=SECONDS_PER_PROGRAM,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
    return finished.returncode == _REACHED_THE_END
