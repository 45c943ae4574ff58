"""Where scratch buffers lie.

In: phases. Out: an offset for each scratch buffer in one arena, such that two buffers share memory only if one is no longer read
when the other is first written, phases apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .kernels import Buffer, Item, Kernel, kernels_of
from .phases import accesses

ALIGNMENT = 64  # bytes: a cache line, and the widest vector


@dataclass(frozen=True, slots=True)
class Arena:
    """Where each buffer begins, and how many bytes all take."""

    offsets: dict[Buffer, int]
    bytes: int


def arena(phases: Sequence[Sequence[Item]], late: Sequence[Kernel] = (), guard: int = 0) -> Arena:
    """Offsets by first fit, the largest buffers first. late: kernels whose results stay from step to step; guard: so many bytes stay
    free after each buffer (for tests)."""
    live: dict[Buffer, tuple[int, int]] = {s.buffer: (0, len(phases)) for k in late for s in k.stores}
    for at, items in enumerate(phases):
        own = [b for k in kernels_of(items) for b in (*k.packed.values(), k.partial)]
        for b in (*(a.buffer for i in items for a in accesses(i)), *own):
            if b is not None and b.space == "scratch":
                first, last = live.get(b, (at, at))
                live[b] = (min(first, at), max(last, at))
    placed: list[tuple[int, int, Buffer]] = []
    for b in sorted(live, key=lambda b: -b.bytes):
        size = -(-(b.bytes + guard) // ALIGNMENT) * ALIGNMENT
        taken = sorted((start, end) for start, end, other in placed if guard or _overlap(live[b], live[other]))
        at = 0
        for start, end in taken:
            if start - at >= size:
                break
            at = max(at, end)
        placed.append((at, at + size, b))
    return Arena({b: start for start, _, b in placed}, max((end for _, end, _ in placed), default=0))


def _overlap(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return a[0] <= b[1] and b[0] <= a[1]
