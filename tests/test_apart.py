"""A user's verifier in a process of its own: whatever it does, razor goes on, says so, and leaves nothing running."""

import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlrazor.errors import RazorError
from rlrazor.system.apart import Answer
from rlrazor.system.apart.verifier import DEATHS, Verifier

SOURCE = r"""
from __future__ import annotations
import ctypes, dataclasses, os, random, re, signal, subprocess, sys, threading, time

@dataclasses.dataclass
class Kept:
    calls: int = 0

KEPT = Kept()

class Hostile(Exception):
    def __str__(self):
        raise SystemExit(0)

def fork_and_return():
    os.fork()
    return 0.75

def start_a_thread():
    threading.Thread(target=time.sleep, args=(1000,)).start()
    return 1

def close():
    sys.stdout.close()
    os.close(1)
    return 1

def replace():
    sys.stdout = sys.stderr = None
    return 1

def raise_(error):
    raise error

def print_(text):
    print(text)
    return 1

ACTIONS = {
    "count": lambda: KEPT.calls / 1000,
    "random": lambda: random.random(),
    "print": lambda: print_("printed"),
    "read": lambda: len(sys.stdin.read()),
    "exit": lambda: sys.exit(0),
    "base": lambda: raise_(BaseException("odd")),
    "interrupt": lambda: raise_(KeyboardInterrupt()),
    "hostile": lambda: raise_(Hostile()),
    "escape": lambda: raise_(ValueError("\x1b[31m\nred \ud800" + "x" * 1000)),
    "text": lambda: "1",
    "huge": lambda: ["x"] * 10**6,
    "integer": lambda: 10**5000,
    "nan": lambda: float("nan"),
    "none": lambda: None,
    "two": lambda: 2,
    "close": close,
    "replace": replace,
    "thread": start_a_thread,
    "fork": fork_and_return,
    "_exit": lambda: os._exit(0),
    "segv": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "crash": lambda: ctypes.string_at(0),
    "loop": lambda: time.sleep(1000),
    "regex": lambda: re.match("(a+)+$", "a" * 40 + "b"),
    "files": lambda: os.closerange(0, 1000),
    "group": lambda: subprocess.Popen(["sleep", "1000"]) and time.sleep(1000),
}

def verify(prompt, completion, **columns):
    KEPT.calls += 1
    return ACTIONS[completion]()
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("verifiers") / "json.py"  # a name of the standard library's
    path.write_text(SOURCE, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def kept(source: Path) -> Iterator[Verifier]:
    verifier = Verifier(f"{source}:verify", seconds=0.5)
    yield verifier
    verifier.close()


def ask(verifier: Verifier, *completions: str) -> list[Answer]:
    return verifier.all([(("prompt", completion), {"column": 1}) for completion in completions])


@pytest.mark.parametrize(
    ("completion", "failure"),
    [
        ("exit", "raised SystemExit: 0"),
        ("base", "raised BaseException: odd"),
        ("interrupt", "raised KeyboardInterrupt"),
        ("hostile", "raised Hostile: (its message cannot be shown)"),
        ("escape", "raised ValueError: �[31m red �xxx"),
        ("text", "returned '1', not a score"),
        ("huge", "raised TypeError"),
        ("integer", "raised OverflowError"),
        ("nan", "returned nan, not a score from 0 to 1"),
        ("none", "raised TypeError"),
        ("two", "returned 2, not a score from 0 to 1"),
    ],
)
def test_what_is_no_score_is_a_failure_and_the_process_stays(kept: Verifier, completion: str, failure: str) -> None:
    before, found, after = ask(kept, "count", completion, "count")
    assert found.value is None
    assert (found.failure or "").startswith(failure)
    assert len(found.failure or "") < 250
    assert after.value - before.value == pytest.approx(0.002)


def test_what_a_verifier_does_to_its_process_is_its_own_affair(
    kept: Verifier, capfd: pytest.CaptureFixture[str]
) -> None:
    kept.close()  # a new process writes to what is standard error now
    completions = ["count", "print", "read", "thread", "fork", "close", "replace", "count"]
    (first, *answers), values = ask(kept, *completions), [1, 0, 1, 0.75, 1, 1]
    assert [answer.value for answer in answers[:-1]] == values
    assert answers[-1].value - first.value == pytest.approx(0.007)
    assert capfd.readouterr() == ("", "printed\n")


@pytest.mark.parametrize(
    ("completion", "failure"),
    [
        ("_exit", "ended its process with exit code 0"),
        ("segv", "was ended by SIGSEGV"),
        ("crash", "was ended by SIGSEGV"),
        ("loop", "took longer than 0.5 s"),
        ("files", "ended its process with exit code 0"),
    ],
)
def test_a_process_that_ends_is_one_failure_and_a_new_one_goes_on(
    kept: Verifier, completion: str, failure: str
) -> None:
    assert ask(kept, completion, "count", "count") == [Answer(failure=failure), Answer(0.001), Answer(0.002)]


def test_calls_are_those_of_one_process_in_order(source: Path) -> None:
    """As in razor's own process with the same seed, in one batch or in several, and anew after a pickle."""
    random.seed(0)
    expected = [random.random() for _ in range(4)]
    verifier = Verifier(f"{source}:verify")
    again = pickle.loads(pickle.dumps(verifier))
    assert [answer.value for answer in ask(verifier, *["random"] * 4)] == expected
    assert [again("p", "random") for _ in range(4)] == expected
    with pytest.raises(ValueError, match=r"json\.py:verify raised SystemExit"):
        again("p", "exit")
    [unsent, sent] = verifier.all([(("p", "random"), {"lock": threading.Lock()}), (("p", "random"), {})])
    assert "cannot be given its arguments (TypeError: cannot pickle" in str(unsent.failure)
    assert sent.value < 1
    for one in (verifier, again):
        one.close()


def test_deaths_in_a_row_end_the_command(source: Path) -> None:
    verifier = Verifier(f"{source}:verify", 9)
    few = ["_exit"] * (DEATHS - 1)
    assert len(ask(verifier, *few, "count", *few)) == 2 * DEATHS - 1
    with pytest.raises(RazorError, match=rf"{DEATHS} completions in a row; .* exit code 0\. .*--verifier-timeout"):
        ask(verifier, "_exit", "count")
    verifier.close()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import sys; sys.exit(0)", "cannot be loaded: SystemExit: 0."),
        ("import os; os._exit(0)", "cannot be loaded: ended its process with exit code 0."),
        ("raise BaseException", "cannot be loaded: BaseException."),
        ("import os; os.kill(os.getpid(), 11)", "cannot be loaded: was ended by SIGSEGV."),
    ],
)
def test_an_exit_at_import_is_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "v.py").write_text(text, encoding="utf-8")
    with pytest.raises(RazorError) as error:
        Verifier(f"{tmp_path / 'v.py'}:verify").load()
    assert str(error.value) == f"The verifier's {tmp_path / 'v.py'} {message}"


@pytest.mark.parametrize(("completion", "how"), [("regex", signal.SIGKILL), ("group", signal.SIGTERM)])
def test_nothing_outlives_razor(source: Path, completion: str, how: signal.Signals) -> None:
    """Neither a child that never lets go of the interpreter, nor what it has started."""
    code = (
        f"from rlrazor.system.apart.verifier import Verifier; v = Verifier({f'{source}:verify'!r}, 100); v.load(); "
        f"print('loaded', flush=True); v('p', {completion!r})"
    )
    # Standard error is a pipe that all of them hold, and that ends when the last one does.
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as razor:
        assert razor.stdout is not None
        assert razor.stdout.readline() == "loaded\n"
        time.sleep(0.2)  # into the call
        assert razor.poll() is None
        razor.send_signal(how)
        assert razor.communicate(timeout=5) == ("", "")
