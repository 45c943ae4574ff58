"""The arrays of a state in memory, with gaps between the parts that threads have each for itself.

In: the arrays. Out: the same in memory where they can lie in one piece, or with gaps: to thread t, an array of which it touches only its
own part begins t times APART bytes later (compiler/gaps.py). They lie as the code wants that ran last, and in one piece for everybody
else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from ..compiler.driver import NO_EXPONENT
from ..compiler.schedule import APART, MOST_APART
from ..graph.node import Array
from .machines import Machine, aligned

Starts = tuple[int, ...]  # the bytes at which the part of each thread begins
Copy = Callable[[int, int], int]  # `keep_ir`: the address of its rows, and how many there are
JOINED: Mapping[str, Starts] = {}
NO, YES = np.zeros(1, np.int64), np.ones(1, np.int64)


class Piece(NamedTuple):
    """Some bytes of an array: where they begin in it, and in memory from where it begins; how many."""

    start: int
    place: int
    size: int


class _Moves(NamedTuple):
    """The rows of `keep_ir` that lay arrays in the parts that begin at `starts`, and that join them again."""

    starts: Mapping[str, Starts]
    part: Array
    join: Array


class Pieces:
    """arrays: in one piece, which they are only after `join`; places: their addresses. threads: the most for which they may be laid in
    parts."""

    def __init__(self, arrays: Mapping[str, Array], threads: int, copy: Copy) -> None:
        self._threads, self._copy = threads, copy
        self.arrays: dict[str, Array] = {}
        for name, array in arrays.items():
            gaps = (threads - 1) * APART if array.nbytes <= MOST_APART else 0
            memory = aligned(array.nbytes + gaps)[: array.nbytes]
            self.arrays[name] = memory.view(array.dtype).reshape(array.shape)
            self.arrays[name][...] = array
        self.places = {name: array.ctypes.data for name, array in self.arrays.items()}
        # Whether they lie in parts. Machine code that moves them writes it too: a Ctrl-C comes before both or after both.
        self._parted = np.zeros(1, np.int64)
        self._moves = _Moves({}, *(np.zeros((0, 5), np.int64),) * 2)

    def part(self, starts: Mapping[str, Starts]) -> None:
        """Lay these arrays in the parts that begin there, all others in one piece."""
        if starts == self.starts:
            return
        self.join()
        if starts:
            if starts != self._moves.starts:
                self._moves = self._made(starts)
            self._copy(self._moves.part.ctypes.data, len(self._moves.part))

    def join(self) -> dict[str, Array]:
        """All of them, each in one piece."""
        if self._parted[0]:
            self._copy(self._moves.join.ctypes.data, len(self._moves.join))
        return self.arrays

    @property
    def starts(self) -> Mapping[str, Starts]:
        """Which arrays lie in parts, and how."""
        return self._moves.starts if self._parted[0] else JOINED

    def pieces(self, name: str) -> list[Piece]:
        """How an array lies now."""
        return pieces(self.arrays[name].nbytes, self.starts.get(name, (0,)))

    def _made(self, starts: Mapping[str, Starts]) -> _Moves:
        """Bytes go down in their order, and up in pieces no longer than they move by, the last first."""
        fits = all(len(s) <= self._threads and self.arrays[name].nbytes <= MOST_APART for name, s in starts.items())
        assert fits, f"no room for parts of {self._threads} threads"
        moved = [
            (base, *piece)
            for name, base in self.places.items()
            for piece in pieces(self.arrays[name].nbytes, starts.get(name, (0,)))
            if piece.start != piece.place
        ]
        down = [(base + start, base + place, size) for base, start, place, size in moved]
        up = [
            (base + place + at, base + start + at, min(place - start, size - at))
            for base, start, place, size in reversed(moved)
            for at in reversed(range(0, size, place - start))
        ]
        part, join = (
            np.array([(*r, *NO_EXPONENT) for r in (*rows, (self._parted.ctypes.data, said.ctypes.data, said.nbytes))], np.int64)
            for rows, said in ((up, YES), (down, NO))
        )
        return _Moves(starts, part, join)


def pieces(size: int, starts: Starts) -> list[Piece]:
    """An array of so many bytes in the parts that begin there.

    >>> pieces(100, (0, 64))
    [Piece(start=0, place=0, size=64), Piece(start=64, place=4160, size=36)]
    """
    return [Piece(a, a + thread * APART, b - a) for thread, (a, b) in enumerate(pairwise((*starts, size))) if b > a]


def starts_for(machines: Sequence[Machine], threads: int, slots: Mapping[str, int]) -> dict[str, Starts]:
    """The arrays in parts if so many threads run the code of these machines: where they all want the same parts."""
    wanted = dict(set.intersection(*(set(m.parts.items()) for m in machines))) if threads > 1 else {}
    parts = {name: wanted[slot] for name, slot in slots.items() if slot in wanted}
    return {name: tuple([p.start(thread, threads) for thread in range(threads)]) for name, p in parts.items()}
