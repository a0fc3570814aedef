"""What is kept on the disk, where several processes need it at the same time."""

import multiprocessing
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlrazor.experiments.robot import cache
from rlrazor.experiments.robot.cache import Arrays, cached
from rlrazor.system import phases

KIND, MADE_OF = "demonstrations", {"seed": 1}
DEADLINE = 60  # s, for what takes one


def until(what: Any) -> None:
    deadline = time.monotonic() + DEADLINE
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def make_slowly(folder: Path, signs: Path) -> None:
    """In another process: it is at it until it is told to end."""

    def make() -> Arrays:
        (signs / "making").touch()
        until((signs / "end").exists)
        return {"by": np.array("the other")}

    cached(folder, KIND, MADE_OF, make)


@pytest.mark.parametrize("killed", [False, True])
def test_one_process_makes_what_two_need(killed: bool, tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    folder = tmp_path / "cache"
    made: list[int] = []
    found: list[Arrays] = []
    heard: list[str] = []

    def make() -> Arrays:
        made.append(1)
        return {"by": np.array("this one")}

    other = multiprocessing.get_context("spawn").Process(target=make_slowly, args=(folder, tmp_path), daemon=True)
    other.start()
    until((tmp_path / "making").exists)
    with phases.heard(lambda phase, *_: heard.append(phase), lambda _: None):
        own = threading.Thread(target=lambda: found.append(cached(folder, KIND, MADE_OF, make)))
        own.start()
        until(lambda: heard)
        assert cached(folder, KIND, {"seed": 2}, lambda: {"by": np.array("nobody else")})  # is not waited for
        assert (made, found, heard) == ([], [], [cache.WAITING])
        if killed:
            other.kill()
        else:
            (tmp_path / "end").touch()
        own.join(DEADLINE)
    other.join(DEADLINE)
    assert [str(one["by"]) for one in found] == ["this one" if killed else "the other"]
    assert made == [1] * killed
    assert str(cached(folder, KIND, MADE_OF, make)["by"]) == str(found[0]["by"])
    assert made == [1] * killed
    other.close()


def test_who_fails_lets_the_next_one_try(tmp_path: Path) -> None:
    def fail() -> Arrays:
        raise ValueError("the expert fails")

    for _ in range(2):
        with pytest.raises(ValueError, match="the expert fails"):
            cached(tmp_path, KIND, MADE_OF, fail)
    assert cached(tmp_path, KIND, MADE_OF, lambda: {"is": np.arange(3)})["is"].tolist() == [0, 1, 2]


def test_a_lock_that_cannot_be_had_costs_nothing_but_time(tmp_path: Path) -> None:
    """It is a link to somebody's file: that is left alone, and what is made is kept all the same."""
    cached(tmp_path / "one", KIND, MADE_OF, lambda: {"is": np.arange(3)})
    (name,) = [path.name for path in (tmp_path / "one").glob(".*.lock")]
    (tmp_path / "somebodys").write_text("precious")
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / name).symlink_to(tmp_path / "somebodys")
    assert cached(tmp_path / "two", KIND, MADE_OF, lambda: {"is": np.arange(4)})["is"].tolist() == [0, 1, 2, 3]
    assert (tmp_path / "somebodys").read_text() == "precious"
    assert cached(tmp_path / "two", KIND, MADE_OF, dict)["is"].tolist() == [0, 1, 2, 3]
