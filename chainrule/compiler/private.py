"""Copies of the state in another order of memory, one for each thread.

In: kernels, and how many units rows are cut in. Out: the same, where small copies that all rows read are made during a step by each unit
of the rows for itself. Made once for all, half of such a copy (of two threads) would be read out of the other core's cache, which takes
several times as long as to make that half as well: what it is made of is there, since rows have just gone through it forward.
"""

from __future__ import annotations

from collections.abc import Sequence

from .affine import Axis
from .fuse import Names
from .kernels import Item, Kernel
from .phases import Access, accesses
from .schedule import MOST_PRIVATE, cut
from .target import Target


def with_private_copies(items: Sequence[Item], target: Target, names: Names, threads: int) -> list[Item]:
    """The items, where such copies (`Kernel.late`) are private, while there is room for them, and follow what first reads the same
    state. Those of states that never change are made once; those that loops read count for little."""
    if threads == 1:
        return list(items)
    touched = [(i, a) for i in items for a in accesses(i)]
    written = {a.buffer for _, a in touched if a.write}
    room = target.level2 * MOST_PRIVATE
    after: dict[Item | None, list[Item]] = {None: []}
    for item in items:
        if not isinstance(item, Kernel) or not item.late or len(item.stores) != 1:
            after[item] = []
            continue
        read, made = {v.buffer for v in item.loads()}, item.stores[0].buffer
        counts = {_units(i, a, threads) for i, a in touched if a.buffer is made and not a.write}
        count = max(counts) if len(counts) == 1 else 0
        if count > 1 and read <= written and made.bytes <= room:
            room -= made.bytes
            made.copies, item.late, item.unit = count, False, Axis(names("u"), count)
            first = next((i for i, a in touched if i in after and a.buffer in read and not a.write), None)
            after[first].append(item)
        else:
            after[item] = []
    return [*after[None], *(i for item, copies in after.items() if item is not None for i in (item, *copies))]


def _units(reader: Item, access: Access, threads: int) -> int:
    """How many units a reader has, if each of them reads all of the copy; else 0."""
    if not isinstance(reader, Kernel) or reader.inner is not None or any(access.unit in i.axes for i in access.index):
        return 0
    return cut(reader, threads)[0]
