"""A command that is run once, when a run has left its budget: it ends a training run, or tells somebody."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rlrazor.errors import RazorError, cause_of
from rlrazor.lm.probes import content_hash

_CHECKPOINT = "RAZOR_CHECKPOINT"
PATIENCE = 60.0  # seconds that are waited for it; then it goes on, and so does watching


@dataclass(eq=False)
class OnBudgetCommand:
    """Words, as a shell would split `text`, that are run without one.

    Raises RazorError for what cannot be split, and a program that is not there.
    """

    text: str
    running: "subprocess.Popen[bytes] | None" = None
    words: list[str] = field(init=False)

    def __post_init__(self) -> None:
        try:
            self.words = shlex.split(self.text)
        except ValueError as error:
            raise RazorError(f"--on-budget cannot be split into words ({error}): mend its quotes.") from error
        if not self.words:
            raise RazorError("--on-budget is empty: give a command, such as 'kill -TERM 4711'.")
        if shutil.which(self.words[0]) is None:
            raise RazorError(
                f"--on-budget: there is no program {self.words[0]} to run. It is run without a shell: of one's words, "
                "give sh -c '...'."
            )

    @property
    def digest(self) -> str:
        """What tells it from others in a log, which others may read: words such as a token's are not written there."""
        return content_hash(self.text)

    def run(self, step: int, checkpoint: Path | None) -> str:
        """Run it, and say what it ended with; what it prints goes to standard error.

        RAZOR_STEP and RAZOR_CHECKPOINT tell it which checkpoint is over the budget; the latter is not set for one that
        is not saved.
        """
        about = {"RAZOR_STEP": str(step), **({} if checkpoint is None else {_CHECKPOINT: str(checkpoint)})}
        try:
            self.running = _started(self.words, about)
        except OSError as error:
            return f"`{self.text}` could not be run ({cause_of(error).rstrip('.')})"
        return self.ended(PATIENCE) or f"`{self.text}` still runs after {PATIENCE:.0f} s; watching goes on"

    def ended(self, seconds: float = 0.0) -> str | None:
        """Within so many seconds, what it ended with, which is said once; None where it runs, or does no more."""
        if self.running is None:
            return None
        try:
            code = self.running.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        self.running = None
        how = f"was ended by signal {-code}" if code < 0 else f"ended with {code}"
        return f"`{self.text}` {how}"


def _started(words: list[str], about: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    try:
        out = sys.stderr.fileno()
    except (OSError, ValueError, AttributeError):  # closed, or no file
        out = subprocess.DEVNULL
    others = {name: value for name, value in os.environ.items() if name != _CHECKPOINT}
    return subprocess.Popen(words, env={**others, **about}, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
