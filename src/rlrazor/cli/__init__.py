"""The command `razor`: parse, call, print. One module per command; heavy imports wait until a command needs them."""

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

import rlrazor
from rlrazor import interrupts, processes
from rlrazor.cli import (
    calibrate,
    compare,
    convert,
    evaluate,
    exits,
    finetune,
    pick,
    report,
    reproduce,
    sweep,
    tasks,
    theory,
)
from rlrazor.errors import RazorError

# Commands that go on from where they were.
_KEEPING = {command.__name__ for command in (calibrate, finetune, reproduce, sweep)}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One sentence instead of argparse's usage block."""
        print(f"razor: {message}. See '{self.prog} --help'.", file=sys.stderr)
        sys.exit(exits.ERROR)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(prog="razor", description="Measure, predict and prevent forgetting in fine-tuning.")
    parser.add_argument("--version", action="version", version=f"razor {rlrazor.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (calibrate, compare, pick, finetune, evaluate, sweep, convert, tasks, reproduce, report, theory):
        command.add_to(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `razor`; the exit code is 0 done, 2 an error said in one sentence, 130 interrupted, 141 output cut short.

    A bug keeps its traceback, and is an error too: 1 says that `compare` found more forgetting than allowed, 3 that it
    cannot be told.
    """
    # Before torch is imported. Threads that spin while they wait keep those that they wait for from running, where the
    # machine is busy: two took six times as long as one, and two that sleep a third of it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    given = list(sys.argv[1:] if argv is None else argv)
    arguments, unknown = build_parser().parse_known_args(given)
    arguments.argv = given
    try:
        with interrupts.remembered(keeps=arguments.run.__module__ in _KEEPING), processes.together():
            if unknown:
                raise RazorError(f"Unknown option {unknown[0]!r}. Options: {', '.join(arguments.options)}.")
            if processes.count() > 1 and arguments.run is not finetune.run:
                raise RazorError("torchrun starts `razor finetune` only: every other command is one process.")
            code: int = arguments.run(arguments)
        sys.stdout.flush()
    except RazorError as error:
        print(f"razor: {error}", file=sys.stderr)
        return exits.ERROR
    except KeyboardInterrupt:
        return interrupts.say()
    except BrokenPipeError:  # whoever read the output, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return exits.PIPE
    except Exception:
        traceback.print_exc()
        print("razor: this is a bug of rlrazor; please report it with the lines above.", file=sys.stderr)
        return exits.ERROR
    return code
