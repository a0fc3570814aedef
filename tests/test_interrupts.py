"""Signals: one sentence and an exit code at any moment, and nobody left behind."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from rlrazor.cli import exits, main
from rlrazor.system import interrupts


@pytest.fixture(autouse=True)
def _not_ignored() -> Iterator[None]:
    """A process in the background may have Ctrl-C ignored, which those that it starts inherit."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


# What is run by `as_process`, in a process that imports nothing else; it says READY where a signal may come.
SCRIPTS = {
    "waiting": "time.sleep(60)",
    # Which lets threads run, but no handler.
    "in C code": "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)",
    "swallowed": """
while True:
    try:
        time.sleep(60)
    except BaseException:
        pass
""",
    "lost": """
class Slow:
    def __del__(self):
        time.sleep(60)
Slow()
time.sleep(60)
""",
    "run by exec": "exec('time.sleep(60)')",
    "cleaning up": """
try:
    time.sleep(60)
finally:
    time.sleep(0.1)
    open("tidy", "w").close()
""",
    "failing": """
try:
    time.sleep(60)
except BaseException:
    raise ImportError("numpy failed to import")
""",
    "stuck in the end": """
import atexit
atexit.register(time.sleep, 60)
""",
}


def run(folder: Path, body: str, signals: list[int], between: float = 0.02) -> tuple[int, str, float]:
    """Exit code, standard error, and seconds after the first signal."""
    script = "import sys, time\nfrom rlrazor.system import interrupts\ndef command():\n    print('READY', flush=True)\n"
    script += "".join(f"    {line}\n" for line in body.strip().splitlines())
    script += "    return 0\nsys.exit(interrupts.as_process(command))"
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.1)
        begun = time.monotonic()
        for number in signals:
            process.send_signal(number)
            time.sleep(between)
        _, error = process.communicate(timeout=30)
    return process.returncode, error, time.monotonic() - begun


SAID = "razor: interrupted. Nothing is half-written; the same command starts anew.\n"


@pytest.mark.parametrize("where", SCRIPTS)
def test_ctrl_c_twice_is_one_sentence_wherever_the_command_is(where: str, tmp_path: Path) -> None:
    code, error, seconds = run(tmp_path, SCRIPTS[where], [signal.SIGINT] * 2)
    assert (code, error) == (exits.INTERRUPTED, SAID)
    assert seconds < 2.5
    assert (tmp_path / "tidy").exists() == (where == "cleaning up")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, exits.TERMINATED), (signal.SIGHUP, exits.HUNG_UP)], ids=["TERM", "HUP"]
)
def test_other_signals_have_their_sentence_and_exit_code(number: signal.Signals, code: int, tmp_path: Path) -> None:
    found = run(tmp_path, SCRIPTS["cleaning up"], [number])
    assert found[:2] == (code, SAID.replace("interrupted", f"ended by {number.name}"))
    assert (tmp_path / "tidy").exists()


def test_a_lost_ctrl_c_is_raised_again(tmp_path: Path) -> None:
    code, error, seconds = run(tmp_path, SCRIPTS["lost"], [signal.SIGINT])
    assert (code, error) == (exits.INTERRUPTED, SAID)
    assert seconds < interrupts.PATIENCE - 0.5  # it is not waited out


def test_a_forked_child_is_ended_alone(tmp_path: Path) -> None:
    body = """
import os, signal
child = os.fork()
if child == 0:
    time.sleep(60)
time.sleep(0.1)
os.kill(child, signal.SIGTERM)
return os.WTERMSIG(os.waitpid(child, 0)[1]) + 100 * (time.sleep(0.2) is None)
"""
    code, error, _ = run(tmp_path, body, [])
    assert (code, error) == (115, "")


def test_a_signal_is_held_back_until_the_block_ends_and_not_inherited() -> None:
    reached = False
    with pytest.raises(KeyboardInterrupt), interrupts.remembered():  # noqa: PT012
        with interrupts.held():
            signal.raise_signal(signal.SIGINT)
            code = "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))"
            blocked = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True)
            reached = True
        reached = False
    assert reached
    assert blocked.stdout == "True\n"
    interrupts.check()  # it is over


def test_what_a_library_makes_of_ctrl_c_is_ctrl_c() -> None:
    def broken() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("numpy failed to import") from None

    with pytest.raises(KeyboardInterrupt), interrupts.remembered():
        broken()
    with pytest.raises(KeyboardInterrupt), interrupts.remembered(), suppress(ImportError):  # it counts at the end
        broken()


@pytest.mark.parametrize(
    ("command", "then"),
    [
        (["tasks"], "Nothing is half-written; the same command starts anew."),
        (["sweep"], "What is finished is kept; the same command goes on from there."),
        (["sweep", "--dry-run"], "Nothing is half-written; the same command starts anew."),
    ],
)
def test_what_is_kept_is_said_where_it_is_kept(
    command: list[str], then: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(_: object) -> int:
        raise KeyboardInterrupt

    interrupt.__module__ = f"rlrazor.cli.{command[0]}"
    monkeypatch.setattr(f"rlrazor.cli.{command[0]}.run", interrupt)
    assert main(command) == exits.INTERRUPTED
    assert capsys.readouterr().err == f"razor: interrupted. {then}\n"


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_ctrl_c_at_twenty_moments_of_a_sweep(jobs: int, tmp_path: Path) -> None:
    """Two to four minutes each on two cores."""
    draw = random.Random(jobs)
    arguments = "reproduce language --methods sft --lrs 1e-3,1e-4 --pretrain-steps 50 --train-prompts 40 --seeds 0,1"
    line = [sys.executable, "-m", "rlrazor", *arguments.split(), "--jobs", str(jobs), "--out", str(tmp_path)]
    for _ in range(20):
        process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, start_new_session=True)
        time.sleep(draw.uniform(0.3, 20))
        for _ in range(draw.randint(1, 3)):
            os.killpg(process.pid, signal.SIGINT)
            time.sleep(draw.uniform(0, 0.1))
        error = process.communicate(timeout=10)[1]
        assert process.returncode == exits.INTERRUPTED
        assert error.endswith("razor: interrupted. What is finished is kept; the same command goes on from there.\n")
        assert "Traceback" not in error
        time.sleep(0.5)
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)


ORPHANED = """
import multiprocessing, re, sys
from rlrazor.runs import workers
def hold(queue):
    workers.start(queue)
    print(multiprocessing.current_process().pid, flush=True)
    re.match("(a+)+$", "a" * 60 + "b")  # for ages, in C code that lets no other thread run
if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    context.Process(target=hold, args=(None,)).start()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends it, on Linux")
def test_a_worker_ends_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "orphaned.py").write_text(ORPHANED)
    with subprocess.Popen([sys.executable, "orphaned.py"], cwd=tmp_path, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        time.sleep(0.1)
        process.kill()
        assert process.stdout.read() == b""  # until nobody can write any more
    assert not Path(f"/proc/{worker}").exists() or "Z" in Path(f"/proc/{worker}/stat").read_text().split()[2]
