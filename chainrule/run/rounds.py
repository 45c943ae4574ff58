"""What is the same for all runs of the same rounds: the kinds of steps, and how pointers go on from step to step.

In: `Steps` and programs. Out: `Layout`, in words that native code reads, with readers of the results; and `Ready`, the same for the
threads that run them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..compiler.driver import ORDER
from ..compiler.schedule import APART
from ..graph.node import Array, Rows
from ..program import Entry, Program
from .backend import Steps
from .crew import Pace
from .machines import Machine, aligned
from .pieces import starts_for

LINE = 16  # words of two cache lines, which some processors fetch together


class Layout:
    """The kinds of steps in a round, and where pointers go on.

    which: the kind of each step of a round; lying: the slots of what does not move, data and `fixed`, the numbers that are the same in
    all steps; moving: the slots of what does: the order, `numbers`, and the results that are kept, which `readers` read; unread: slots
    and bytes of the others; pace: what is known of how long its steps take.
    """

    def __init__(self, steps: Steps, programs: Mapping[int, Program], slots: Mapping[str, int]) -> None:
        self._held = (steps.entries, steps.sizes)  # so that no other lists come to lie where they do
        self.kinds, self.which = _kinds(steps)
        self.ready: dict[Any, Ready] = {}
        self.pace = Pace(0.0)
        entries = [programs[size].entries[name] for name, size in self.kinds]
        inputs = {
            name: programs[e_size].inputs[name].type
            for e, (_, e_size) in zip(entries, self.kinds, strict=True)
            for name in e.inputs
        }
        read = [k for k in steps.numbers if k in inputs]
        self.fixed = [k for k in read if len(steps.numbers[k]) == 1]
        self.numbers = [k for k in read if len(steps.numbers[k]) != 1]
        self.lying = np.array([slots[f"in/{k}"] for k in (*steps.data, *self.fixed)], np.int64)
        self._counts = np.bincount(self.which, minlength=len(self.kinds))
        sizes = np.array([size for _, size in self.kinds], np.int64)
        every, each = np.ones(len(sizes), np.int64), len(self.which)
        moves = [(slots[ORDER], 8 * sizes, steps.order.ndim == 1)]
        for k in self.numbers:
            moves.append((slots[f"in/{k}"], every * inputs[k].size * inputs[k].dtype.itemsize, len(steps.numbers[k]) == each))
        self.readers: list[_Reader] = []
        self.unread: list[tuple[int, int]] = []
        for result in dict.fromkeys(r for e in entries for r in e.results):
            reader = _reader(result, entries, self.which)
            if result in steps.keep:
                self.readers.append(reader)
                moves.append((slots[f"out/{result}"], reader.sizes, False))
            else:
                self.unread.append((slots[f"out/{result}"], int(reader.sizes.max(initial=1))))
        self.moving = np.array([slot for slot, _, _ in moves], np.int64)
        self._bytes = np.stack([bytes for _, bytes, _ in moves], axis=1)  # (kinds, moves)
        # A round ends where the next one begins: by then all that it went on, or none of it if rounds have the same.
        self._round = self._counts @ self._bytes * [not again for _, _, again in moves]
        before = (self._counts - np.eye(len(sizes), dtype=np.int64)[self.which[-1:]].sum(axis=0)) @ self._bytes
        self._rewound = self._round - before
        self.words = tuple(a.ctypes.data if isinstance(a, np.ndarray) else a
                           for a in (self.which, len(moves), self.moving, self._bytes, self._rewound))  # fmt: skip

    def offsets(self, at: int) -> Array:
        """How far the pointers of what moves have gone before step `at`."""
        turn, place = divmod(at, len(self.which))
        return turn * self._round + np.bincount(self.which[:place], minlength=len(self.kinds)) @ self._bytes


@dataclass(frozen=True)
class _Reader:
    """Reads a result out of the memory to which steps wrote it. bytes: what all of a round write; found: for each kind of step the
    result's node, None if it has none; sizes: the bytes of each; which: the kind of each step of a round."""

    name: str
    bytes: int
    found: Sequence[Any]
    sizes: Array
    which: Array
    rows: Rows

    def __call__(self, memory: Array, done: int) -> Array:
        """The results of the steps that were taken."""
        taken = [done] if len(self.found) == 1 else np.bincount(np.resize(self.which, done), minlength=len(self.found)).tolist()
        count = sum(n for n, f in zip(taken, self.found, strict=True) if f is not None)
        if not count:
            return np.zeros(0)
        node = next(n for n in self.found if n is not None)
        used: Array = memory[: sum(map(int.__mul__, taken, self.sizes.tolist()))].view(node.dtype)
        if not isinstance(self.rows, int):
            return used.reshape(count, *node.shape)
        if self.rows == 0:
            return used.reshape(-1, *node.shape[1:])
        parts, at = [], 0
        for kind in np.resize(self.which, done):
            if (one := self.found[kind]) is not None:
                parts.append(used[at : at + one.type.size].reshape(one.shape))
                at += one.type.size
        return np.concatenate(parts, self.rows)


def _reader(result: str, entries: Sequence[Entry], which: Array) -> _Reader:
    """entries: that of each kind of step."""
    found = [e.graph.outputs[e.results.index(result)] if result in e.results else None for e in entries]
    sizes = np.array([n.type.size * n.dtype.itemsize if n is not None else 0 for n in found], np.int64)
    rows = next(e.result_rows[e.results.index(result)] for e in entries if result in e.results)
    return _Reader(result, int(sizes @ np.bincount(which, minlength=len(entries))), found, sizes, which, rows)


def _kinds(steps: Steps) -> tuple[list[tuple[str, int]], Array]:
    """The different (entry, size) of the steps, and which of them each step is. Sorting would cost more than the steps."""
    sizes = np.asarray(steps.sizes, np.int64)
    names = list(dict.fromkeys(steps.entries))
    of_name = np.zeros(len(sizes), np.int64)
    if len(names) > 1:
        of_name = np.fromiter(map(names.index, steps.entries), np.int64, len(sizes))
    kinds: list[tuple[str, int]] = []
    which = np.full(len(sizes), -1)
    while len(sizes) and which[at := int(np.argmin(which))] < 0:
        same = (sizes == sizes[at]) & (of_name == of_name[at])
        which[same] = len(kinds)
        kinds.append((names[of_name[at]], int(sizes[at])))
    return kinds, which


class Last(NamedTuple):
    """Whose copies of the state in the arena are those of the state as it is, and how many threads have made them: parts lie by that."""

    machine: Machine
    threads: int


class Ready:
    """What a number of threads needs to enter native code. starts: which arrays of the state lie in parts, and how (pieces.py)."""

    def __init__(self, machines: Sequence[Machine], threads: int, shared: Array, slots: Mapping[str, int]) -> None:
        self.machines = machines
        self.starts = starts_for(machines, threads, slots)
        self._parted = np.array([slots[name] for name in self.starts], np.int64)
        self._gaps = APART * np.arange(threads)
        self._functions = np.array([(m.prepare, m.address) for m in machines], np.int64)
        self._arenas = np.zeros(len(machines), np.int64)
        self.words = (self._functions.ctypes.data, self._arenas.ctypes.data)
        line = -(-len(slots) // LINE) * LINE  # each thread writes to a table of its own, in cache lines of its own
        self._tables = aligned(threads * line, np.int64).reshape(threads, line)[:, : len(slots)]
        self._blocks = [np.array([shared.ctypes.data, t, own.ctypes.data], np.int64) for t, own in enumerate(self._tables)]
        self.arguments = [b.ctypes.data for b in self._blocks]

    def begin(self, kind: int, arena: int, last: Last | None) -> int:
        """Work in this memory. Returns the kind of the first step if the last one was of it too, so that what it has prepared holds."""
        self._arenas[:] = arena
        return kind if Last(self.machines[kind], len(self._tables)) == last else -1

    def fill(self, table: Array | None, slots: Array, pointers: Sequence[int] | Array) -> None:
        """Where all buffers lie, to each thread: as in `table`, if that is given, but for those in `slots`."""
        if table is not None:
            self._tables[:] = table
            self._tables[:, self._parted] += self._gaps[:, None]
        self._tables[:, slots] = pointers
