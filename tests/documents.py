"""What a file may hold that nobody meant to write there."""

import copy
from collections.abc import Iterator
from typing import Any

HOSTILE: tuple[Any, ...] = (
    *(None, True, -1, 0, 50, 2.5, 10**19, "x", "0.5", "", [], {}, "x" * 100_000, [[[1.0]]], {"near": 1}, ["near"]),
    *(float("nan"), float("inf"), 1e300, "\ud800"),
)


def changes(value: Any, hostile: tuple[Any, ...] = HOSTILE) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Each place in a document, and the document in which something hostile stands there, or nothing."""
    for path in places(value):
        for one in (*hostile, KeyError):
            changed = copy.deepcopy(value)
            holder = changed
            for key in path[:-1]:
                holder = holder[key]
            if one is KeyError:
                del holder[path[-1]]
            else:
                holder[path[-1]] = one
            yield path, changed


def places(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The places in a document; of a list, those in the first two."""
    inside = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, inner in inside:
        yield (*path, key)
        yield from places(inner, (*path, key))


def is_a_sentence(error: Exception) -> None:
    """As a user can read it."""
    said = str(error)
    assert said
    assert "\n" not in said
    assert len(said) < 700
    assert "Input should" not in said
    assert "Traceback" not in said
