"""Gaps between the parts of an array that threads have each for itself.

In: a plan. Out: the arrays of which each unit touches one piece only, in all kernels of the step. To a thread such an array begins some
bytes later than to the thread before, so that its piece does not follow the other's at once: a core reads ahead of what it is asked
for, and at the end of its own piece that takes lines away from the core that writes the next one. Indices, and with them the code of
kernels, stay what they are; only the pointers differ (`Layout.parted` in llvm.py, run/pieces.py).

Measured on 64-128-10 and 20-256-1, two threads: 11 and 5 % of a step where the cores share a cache, 22 and 23 % where they do not.
"""

from __future__ import annotations

from math import ceil, prod

from .kernels import Buffer, Loop
from .phases import Access, Plan, accesses, blocks
from .schedule import MOST_APART, Parts


def parts_of(planned: Plan) -> dict[Buffer, Parts]:
    """The arrays that lie in pieces, one for each unit that touches them. What loops touch is none of them."""
    items = [*planned.late, *(i for items in planned.phases for i in items)]
    if planned.threads == 1 or any(isinstance(i, Loop) for i in items):
        return {}
    found: dict[Buffer, Parts | None] = {}
    written = {a.buffer for i in items for a in accesses(i) if a.write}
    for a in (a for i in items for a in accesses(i) if a.buffer in written and _can_lie_apart(a.buffer)):
        parts = _parts(a, planned.threads)
        found[a.buffer] = parts if found.get(a.buffer, parts) == parts else None
    made = {b: parts for b, parts in found.items() if parts is not None}
    return made | {planned.twice[b]: parts for b, parts in made.items() if b in planned.twice}


def _can_lie_apart(buffer: Buffer) -> bool:
    return buffer.space in ("state", "scratch") and buffer.part_of is None and 0 < buffer.bytes <= MOST_APART


def _parts(a: Access, threads: int) -> Parts | None:
    """The pieces of which each unit touches one; None if units are no pieces of the first dimension."""
    if a.unit is None or a.unit.extent == 1 or prod(a.view) != a.buffer.size:
        return None
    first = next(iter(blocks(a, a.unit, threads)), None)
    if first is None:
        return None
    count, places, start = first
    whole = count > 1 and start == 0 and ceil(a.view[0] / places) == count
    return Parts(count, places * (a.buffer.bytes // a.view[0])) if whole else None
