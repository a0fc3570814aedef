"""Token sequences that begin alike, read once each: all of them as one tree, in one row with an attention mask.

The choices of an item share its question, the items of a task often an instruction or examples. So the tokens of many
sequences are the nodes of a tree, a common beginning once: each node sees those above it and itself, and its position
is its depth. Nothing is padded, and what a model makes of a sequence is, up to rounding, what it makes of it alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Pack:
    """A tree of N nodes, each after the one that it hangs on.

    `ids`, `depths`: of each node (N,). `sees`: whether a node sees another (N, N). `paths`: of each sequence, by its
    place among those that were packed, its nodes in order.
    """

    ids: NDArray[np.int64]
    depths: NDArray[np.int64]
    sees: NDArray[np.bool_]
    paths: dict[int, list[int]]

    @property
    def longest(self) -> int:
        """The place of the longest sequence."""
        return max(self.paths, key=lambda place: len(self.paths[place]))

    @property
    def last(self) -> int:
        """The place of the sequence that was added last, before which all others stand."""
        return next(reversed(self.paths))


def packs(sequences: Sequence[Sequence[int]], most: int) -> Iterator[Pack]:
    """All sequences, none of which is empty, in trees of at most `most` tokens, a longer sequence in one of its own.

    In the order of their tokens, so that those that begin alike are in one tree.
    """
    tree = _Tree()
    for place in sorted(range(len(sequences)), key=lambda place: tuple(sequences[place])):
        sequence = sequences[place]
        if tree.ids and len(tree.ids) + len(sequence) - tree.shared(sequence) > most:
            yield tree.packed()
            tree = _Tree()
        tree.add(place, sequence)
    if tree.ids:
        yield tree.packed()


class _Tree:
    """What a pack is made of; `last` are the nodes of the sequence before, which alone the next one can share."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.above: list[int] = []  # of each node the one that it hangs on, -1 for none
        self.last: list[int] = []
        self.paths: dict[int, list[int]] = {}

    def shared(self, sequence: Sequence[int]) -> int:
        """How many of its tokens are there already, as the sequences come in the order of their tokens."""
        pairs = enumerate(zip(self.last, sequence, strict=False))
        return next((at for at, (node, token) in pairs if self.ids[node] != token), min(len(self.last), len(sequence)))

    def add(self, place: int, sequence: Sequence[int]) -> None:
        path = self.last[: self.shared(sequence)]
        for token in sequence[len(path) :]:
            self.above.append(path[-1] if path else -1)
            path.append(len(self.ids))
            self.ids.append(token)
        self.paths[place] = self.last = path

    def packed(self) -> Pack:
        sees = np.eye(len(self.ids), dtype=bool)
        depths = np.zeros(len(self.ids), dtype=np.int64)
        for node, above in enumerate(self.above):
            if above >= 0:
                sees[node] |= sees[above]
                depths[node] = depths[above] + 1
        return Pack(np.asarray(self.ids, dtype=np.int64), depths, sees, self.paths)
