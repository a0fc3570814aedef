"""The command `razor`: parse, call, print. One module per command; heavy imports wait until a command needs them."""

import argparse
import errno
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import rlrazor
from rlrazor import bounds
from rlrazor.cli import (
    calibrate,
    compare,
    continual,
    convert,
    doctor,
    evaluate,
    exits,
    finetune,
    pick,
    report,
    reproduce,
    sweep,
    tasks,
    theory,
    watch,
)
from rlrazor.errors import RazorError
from rlrazor.system import interrupts, processes, quiet
from rlrazor.system.documents import is_utf8
from rlrazor.system.terminal import never_fail_to_encode, say

_DISK_ERRORS = {errno.ENOSPC, errno.EFBIG, errno.EIO, errno.EBADF, getattr(errno, "EDQUOT", errno.ENOSPC)}

# Commands that go on from where they were.
_KEEPING = {command.__name__ for command in (calibrate, continual, finetune, reproduce, sweep, watch)}


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        # An abbreviation is a misspelling: `--lr` of a grid would be its `--lrs`.
        super().__init__(**{**options, "allow_abbrev": False})
        self.register("type", Path, _path)

    def _print_message(self, message: str, file: Any = None) -> None:
        """Argparse's own would pass over a full disk."""
        if message:
            (file or sys.stderr).write(message)

    def error(self, message: str) -> NoReturn:
        """One sentence instead of argparse's usage block."""
        short = message if len(message) <= 300 else f"{message[:300]}…"  # a value may be of any length
        say(f"razor: {short}. See '{self.prog} --help'.")
        sys.exit(exits.ERROR)


def _path(text: str) -> Path:
    """A path that an option names; nothing would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty: name a file or a folder")
    return Path(text)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(prog="razor", description="Measure, predict and prevent forgetting in fine-tuning.")
    parser.add_argument("--version", action="version", version=f"razor {rlrazor.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (
        calibrate,
        compare,
        pick,
        watch,
        finetune,
        continual,
        evaluate,
        sweep,
        convert,
        tasks,
        reproduce,
        report,
        theory,
        doctor,
    ):
        command.add_to(commands)
    _complete(parser)
    return parser


def _complete(parser: argparse.ArgumentParser) -> None:
    """Say in the help of each option that is a number what it may be; know the options for who misspells one."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                _complete(inner)
        elif action.dest in bounds.BOUNDS and action.help:
            action.help += f" [{bounds.BOUNDS[action.dest]}]"
    named = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
    parser.set_defaults(options=named)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `razor`; the exit code is 0 done, 2 an error said in one sentence, 130 interrupted, 141 output cut short.

    A bug keeps its traceback, and is an error too: 1 says that `compare` found more forgetting than allowed, 3 that it
    cannot be told.
    """
    # Before torch is imported. Threads that spin while they wait keep those that they wait for from running, where the
    # machine is busy: two took six times as long as one, and two that sleep a third of it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    quiet.libraries()
    given = list(sys.argv[1:] if argv is None else argv)
    if not _prepare_streams():
        say("razor: standard output is closed: redirect it to a file, or to /dev/null.")
        return exits.ERROR
    try:
        code = _run(given)
    except SystemExit as done:  # --help, --version, wrong usage
        if not _flushed():
            return exits.ERROR
        raise done
    except BrokenPipeError:  # whoever read the output, `head` say, has seen enough
        _silence(sys.stdout, sys.stderr)
        return exits.PIPE
    interrupted = code > exits.SIGNALLED
    written = _flushed(saying=not interrupted and code != exits.ERROR)  # one sentence is enough
    return code if written or interrupted else exits.ERROR


def _run(given: list[str]) -> int:
    """Parse, run, and say what went wrong; a pipe that nobody reads any more, and the end of argparse, are raised."""
    try:
        if any("\0" in argument for argument in given):
            raise RazorError("An argument holds a NUL character, which no name of a file or model has: leave it out.")
        arguments, unknown = build_parser().parse_known_args(given)
        arguments.argv = given
        bounds.check_options(vars(arguments))
        for name in ("base", "tuned", "model"):
            if getattr(arguments, name, None) == "":
                raise RazorError(f"{name.upper()} is empty: name a folder, a hub id or a .gguf file.")
        keeps = arguments.run.__module__ in _KEEPING and not getattr(arguments, "dry_run", False)
        with interrupts.remembered(keeps=keeps), processes.together():
            if unknown:
                raise RazorError(f"Unknown option {unknown[0]!r}. Options: {', '.join(arguments.options)}.")
            if processes.count() > 1 and arguments.run is not finetune.run:
                raise RazorError("torchrun starts `razor finetune` only: every other command is one process.")
            code: int = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except RazorError as error:
        say(f"razor: {error}")
    except KeyboardInterrupt:
        return interrupts.say()
    except BrokenPipeError:
        raise
    except Exception as error:
        if not _flushed():
            return exits.ERROR
        if (sentence := _users_files(error, given)) is not None:
            say(f"razor: {sentence}")
        else:
            say(traceback.format_exc().rstrip("\n"))
            say(
                "razor: this is a bug of rlrazor; please report it with the lines above and what `razor doctor` prints."
            )
    return exits.ERROR


def _users_files(error: Exception, given: Sequence[str]) -> str | None:
    """What is wrong with a file or a name of the user's, where no module foresaw it; None: it is something else."""
    if isinstance(error, OSError) and error.filename is not None:
        name = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename
        return f"{name} cannot be read or written: {error.strerror or error}. Mend that, or name another place."
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        return (
            f"{error.strerror}, which is what came of writing to standard output or to a temporary file: make room "
            "there, then run the same command again."
        )
    if isinstance(error, UnicodeError) and (odd := next((one for one in given if not is_utf8(one)), None)):
        return f"{odd} is not UTF-8, which a library that reads it cannot take: rename it."
    return None


# Standard output and error


def _prepare_streams() -> bool:
    """Have nothing that is printed fail for its characters; False where standard output is closed.

    A closed standard error says nothing. It must not stay closed: the next file opened would take its place, and
    libraries that print would write into it.
    """
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    never_fail_to_encode()
    return sys.stdout is not None and not getattr(sys.stdout, "closed", False)


def _flushed(*, saying: bool = True) -> bool:
    """Whether what was printed has gone out; if it cannot, that is said, and Python does not try again as it ends."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        if saying:
            say(f"razor: standard output cannot be written to: {why}. Redirect it to where there is space.")
        _silence(sys.stdout)
        return False
    return True


def _silence(*streams: Any) -> None:
    for stream in streams:
        with suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
