"""What runs in the child process: a user's function, or a model's template, and nothing of rlrazor beside this file.

Started as a script by `Apart`, with one end of a socket as its argument and, as standard input, a pipe
that ends when razor does. The first message says what to load; each later one is a list of calls, and each call has a
line of JSON as its answer: [kind, value], in which the kind is "value", "raised" or "refused". Only the standard
library is imported, so that a child is ready in a few hundredths of a second.
"""

import contextlib
import importlib
import importlib.util
import inspect
import json
import math
import os
import pickle
import random
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

LONGEST = 200  # characters of what is said of a failure
Answer = tuple[str, Any]  # its kind and its value


def main(descriptor: int) -> None:
    """Load what the first message names, say whether that worked, and answer calls until razor hangs up."""
    _end_with_razor()
    channel = socket.socket(fileno=descriptor)
    own = os.getpid()
    if hasattr(os, "register_at_fork"):  # what a function forks neither answers nor keeps the socket open
        os.register_at_fork(after_in_child=lambda: os.close(channel.detach()))
    read = channel.makefile("rb")

    def answer(kind: str, value: Any) -> None:
        if os.getpid() != own:
            os._exit(0)
        channel.sendall(json.dumps([kind, value]).encode() + b"\n")

    try:
        role, what, path, memory = pickle.load(read)
        sys.path[:] = path
        _limit(memory)
        function = _loaded(role, what, answer)
        while function is not None:
            for call in pickle.load(read):
                answer(*_called(function, call))
    except (EOFError, OSError):  # razor has hung up
        os._exit(0)


def _loaded(role: str, what: Sequence[Any], answer: Callable[[str, Any], None]) -> Callable[..., Answer] | None:
    random.seed(0)  # the same calls have the same answers, whoever made them
    try:
        function = ROLES[role](*what)
    except AbsentError as error:
        answer("refused", str(error))
        return None
    except BaseException as error:  # exit() among others
        answer("raised", said(error))
        return None
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    answer("value", None)
    return function


def _called(function: Callable[..., Answer], call: bytes) -> Answer:
    try:
        arguments, named = pickle.loads(call)
        return function(*arguments, **named)
    except BaseException as error:
        return "raised", said(error)
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(BaseException):  # it is closed, or replaced by anything
                stream.flush()


def said(error: BaseException) -> str:
    """An exception's type and message, which may be of anyone's making, in one line."""
    try:
        text = str(error)
    except BaseException:
        text = "(its message cannot be shown)"
    return _in_a_line(f"{type(error).__name__}: {text}")


def _in_a_line(text: str) -> str:
    """Text that anyone may have written, short and without what a terminal would obey."""
    text = " ".join(text[: 2 * LONGEST].split())[:LONGEST]
    return "".join(character if character.isprintable() else "�" for character in text).rstrip(": ")


# --- Verifiers


def judged(found: Any) -> Answer:
    """A score from 0 to 1 out of what a verifier returned, or why it is none."""
    value = math.nan if isinstance(found, str | bytes) else float(found)
    if math.isfinite(value) and 0 <= value <= 1:
        return "value", value
    try:
        shown = f"{found!r:.100}"
    except BaseException:
        shown = f"a {type(found).__name__}"
    return "refused", f"returned {_in_a_line(shown)}, not a score from 0 to 1"


class AbsentError(Exception):
    """The code is there and the function is not."""


def _verifier(source: str, name: str) -> Callable[..., Answer]:
    """The function `name` of a file or a module; its score, judged. Raises AbsentError where it is not there."""
    if source.endswith(".py"):
        spec = importlib.util.spec_from_file_location("rlrazor_verifier", source)  # its own name may be a library's
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look there
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(source)
    verify = getattr(module, name, None)
    if not callable(verify):
        functions = [other for other, _ in inspect.getmembers(module, inspect.isfunction)]
        raise AbsentError(f"{source} has no function {name}. It has: {', '.join(functions) or 'none'}")
    return lambda *arguments, **columns: judged(verify(*arguments, **columns))


# --- Chat templates

MOST, MORE = 100_000, 10  # characters that a template may add to a prompt, and how often it may repeat that
SLOW = 0.1  # seconds for a prompt on average, where all of them come to more than a call may take


def _template(text: str, seconds: float) -> Callable[..., Answer]:
    """What renders a chat template as transformers does, and says what is wrong with one that does not come to an end.

    That is one that writes too much, takes more than `seconds` for all prompts or needs too much memory. Errors of
    the template's own are raised, and left to transformers, which has them too.
    """
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """{% generation %}, with which templates mark what the assistant says."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = lambda value, ensure_ascii=False, **told: json.dumps(
        value, ensure_ascii=ensure_ascii, **told
    )
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": lambda form: form}
    compiled: list[Any] = []
    took: list[float] = []

    def render(**variables: Any) -> Answer:
        began = time.process_time()
        try:
            if not compiled:
                compiled.append(environment.from_string(text))
            size, most = 0, MOST + MORE * len(str(variables))
            for part in compiled[0].generate(**variables):
                size += len(part)
                if size > most:
                    return "value", f"writes more than {most:,} characters for a prompt"
        except MemoryError:
            return "value", "takes more memory than a chat template needs"
        took.append(time.process_time() - began)
        if sum(took) > max(seconds, SLOW * len(took)):
            return "value", f"takes {sum(took) / len(took):.1f} s for a prompt"
        return "value", None

    return render


# --- Tokenizers

SOME_TEXT = (
    "".join(map(chr, range(32, 127))) + "\n\t\r  \u00e9\u4e2d\U0001f642 " + "a" * 40 + "!" + " 1" * 40 + "\n" * 40
)


def _tokenizer(path: str) -> Callable[..., Answer]:
    """What tokenises a text with a tokenizer.json, for the time and memory that it takes.

    Errors of its own are left to transformers, which has them too.
    """
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    from tokenizers import Tokenizer

    def tokenise() -> Answer:
        try:
            Tokenizer.from_file(path).encode(SOME_TEXT)
        except Exception:
            return "value", None
        return "value", None

    return tokenise


# --- Regular expressions

FORMS = ("{}$", r"(^|.*\.){}($|\..*)", r"(.*\.)?({})$", r"(?:^|.*?\.){}\.(?P<idx>\d+)\.")  # as PEFT puts them together


def _patterns() -> Callable[..., Answer]:
    """What matches patterns with names, for the time that it takes."""

    def match(patterns: Sequence[str], names: Sequence[str]) -> Answer:
        for pattern in patterns:
            for form in FORMS:
                with contextlib.suppress(re.error, RecursionError, OverflowError):  # as PEFT will say
                    compiled = re.compile(form.replace("{}", pattern))
                    for name in names:
                        compiled.match(name)
        return "value", None

    return match


ROLES: dict[str, Callable[..., Callable[..., Answer]]] = {
    "verifier": _verifier,
    "template": _template,
    "tokenizer": _tokenizer,
    "patterns": _patterns,
}


# --- The process itself


def _end_with_razor() -> None:
    """Have this process and what it starts end when razor does, killed or not; give functions /dev/null to read.

    Two ways, as each has its gaps: the kernel's signal, which not every system sends, and a thread, which waits as
    long as a function keeps the interpreter to itself, as a regular expression may for hours.
    """
    lifeline = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)

    def watch() -> None:
        os.read(lifeline, 1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    with contextlib.suppress(ImportError, AttributeError, OSError):
        import fcntl

        signal.signal(signal.SIGIO, signal.SIG_DFL)  # which ends a process
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)


def _limit(memory: int | None) -> None:
    """No file of a crashed process's memory; and at most `memory` bytes, where there is a limit."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if memory is not None:
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))


if __name__ == "__main__":
    main(int(sys.argv[1]))
