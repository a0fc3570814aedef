"""The command `razor`, which is `python -m rlrazor` too. Signals are minded before anything heavy is imported."""

import sys

from rlrazor.system import interrupts


def main() -> int:
    """Run `razor` with the command line's arguments; the exit code."""
    return interrupts.as_process(_command)


def _command() -> int:
    from rlrazor.cli import main

    return main()


if __name__ == "__main__":
    sys.exit(main())
