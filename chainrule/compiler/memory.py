"""Where scratch buffers lie.

In: a plan. Out: an offset for each scratch buffer in one arena, such that two buffers share memory only if one is no longer read
when the other is first written, phases apart; where threads do not meet at the end of a step, its last phase is none apart from the first.
A buffer in parts of threads is longer by the gaps between them, and by one behind the last: a core reads ahead there too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..graph.node import Array
from .kernels import Buffer, kernels_of
from .phases import Plan, accesses
from .schedule import APART

ALIGNMENT = 64  # bytes: a cache line, and the widest vector


@dataclass(frozen=True, slots=True)
class Arena:
    """Where each buffer begins, how many bytes it takes with its gaps, and how many all take."""

    offsets: dict[Buffer, int]
    sizes: dict[Buffer, int]
    bytes: int


def arena(planned: Plan, guard: int = 0) -> Arena:
    """Offsets by first fit, the largest buffers first. guard: so many bytes stay free after each buffer (for tests)."""
    end = len(planned.phases) - 1
    always = (s.buffer for k in planned.late for s in k.stores)
    live: dict[Buffer, tuple[int, int]] = dict.fromkeys(always, (0, end))
    inside: dict[Buffer, tuple[Buffer, int]] = {}
    for at, items in enumerate(planned.phases):
        own = [b for k in kernels_of(items) for b in (*k.packed.values(), k.partial)]
        for b in (*(a.buffer for i in items for a in accesses(i)), *own):
            if b is not None and b.space == "scratch":
                if b.part_of is not None:
                    inside[b] = b.part_of
                    b = b.part_of[0]
                first, last = live.get(b, (at, at))
                live[b] = (min(first, at), max(last, at))
    live |= {other: live[b] for b, other in planned.twice.items()}
    sizes = {b: b.bytes + (planned.threads * APART if b in planned.parts else 0) for b in live}
    order = sorted(live, key=lambda b: -sizes[b])
    born, dies = np.array([live[b] for b in order], np.int64).reshape(-1, 2).T
    starts, ends = np.zeros((2, len(order)), np.int64)
    for n, b in enumerate(order):
        size = -(-(sizes[b] + guard) // ALIGNMENT) * ALIGNMENT
        together = (born[:n] <= dies[n]) & (born[n] <= dies[:n])
        if not planned.waits:
            together |= ((born[:n] == 0) & (dies[n] == end)) | ((born[n] == 0) & (dies[:n] == end))
        near = np.flatnonzero(together) if not guard else np.arange(n)
        starts[n] = _first_gap(starts[near], ends[near], size)
        ends[n] = starts[n] + size
    offsets = dict(zip(order, starts.tolist(), strict=True))
    offsets.update({b: offsets[around] + at * b.dtype.itemsize for b, (around, at) in inside.items()})
    sizes.update({b: b.bytes for b in inside})
    return Arena(offsets, sizes, int(ends.max(initial=0)))


def _first_gap(starts: Array, ends: Array, size: int) -> int:
    """The first place where `size` bytes are free."""
    by_start = np.argsort(starts, kind="stable")
    free = np.concatenate([[0], np.maximum.accumulate(ends[by_start])])  # behind all that begin before
    fits = starts[by_start] - free[:-1] >= size
    return int(free[np.argmax(fits) if fits.any() else -1])
