"""The exit codes of `razor`, one meaning each; docs/exit-codes.md says what they mean for each command."""

from rlrazor.guard.verdict import Verdict

DONE = 0
ABOVE = 1  # a limit that the user gave is exceeded
ERROR = 2  # said in one sentence
UNCERTAIN = 3  # the evidence does not tell on which side of the limit it is
SIGNALLED = 128  # plus the number of the signal that ended it: the next three
INTERRUPTED = 130  # by Ctrl-C
HUNG_UP = 129  # the terminal was closed
TERMINATED = 143  # by `kill`, or a scheduler's time limit
PIPE = 141  # as the shell counts a process that SIGPIPE ended


def of_verdict(verdict: Verdict | None) -> int:
    """What a command ends with that has judged limits; None: there were none."""
    return {Verdict.ABOVE: ABOVE, Verdict.UNCERTAIN: UNCERTAIN}.get(verdict, DONE)  # type: ignore[arg-type]
