"""Small sums inside the one kernel that reads them, where this stores a few places for each sum.

In: kernels. Out: kernels. The gradient of a pooling first counts for each window how many of its places share the largest value, and then
gives each place of the window its part. In one kernel the places of a window stand in registers side by side, as rows and columns of a
tile, so the count is made once for all of them, of what is read anyway, and never is in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod

from .affine import Affine, Axis, of
from .kernels import Item, Kernel, Value, bounds, rebuilt, reindexed, roots
from .phases import accesses
from .schedule import MOST_COLUMNS

MOST_TERMS = MOST_COLUMNS**2  # of a sum, in two directions


def absorbed(items: Sequence[Item]) -> list[Item]:
    """The items, such sums in the kernels that read them."""
    made = list(items)
    for item in items:
        if not isinstance(item, Kernel) or not _is_small_sum(item):
            continue
        reader = _reader(made, item)
        where = _where(reader, item) if reader is not None else None
        if reader is not None and where is not None and _side_by_side(reader, where):
            made[made.index(reader)] = _with(reader, item, where)
            made.remove(item)
    return made


def _is_small_sum(kernel: Kernel) -> bool:
    """Whether it sums a few terms, and each element of the scratch memory that it writes has a place of its own in the domain."""
    if not kernel.reduced or kernel.sequential or kernel.between or len(kernel.stores) != 1 or bounds(kernel.values()):
        return False
    (store,) = kernel.stores
    plain = store.buffer.space == "scratch" and store.mode == "set" and all(isinstance(i, Affine) for i in store.index)
    return plain and {*store.index} == {*map(of, kernel.domain)} and prod(a.extent for a in kernel.reduced) <= MOST_TERMS


def _reader(items: Sequence[Item], kernel: Kernel) -> Kernel | None:
    """The kernel that alone reads such sums, if nothing up to it writes what they are made of."""
    (store,) = kernel.stores
    reads = {a.buffer for a in accesses(kernel) if not a.write}
    found: Kernel | None = None
    for item in items[items.index(kernel) + 1 :]:
        touched = list(accesses(item))
        if any(a.buffer is store.buffer for a in touched):
            if found is not None or not isinstance(item, Kernel):
                return None
            found = item
        if found is None and any(a.write and a.buffer in reads for a in touched):
            return None
    if found is None or any(a.write and a.buffer in (*reads, store.buffer) for a in accesses(found)):
        return None
    return found


def _where(reader: Kernel, kernel: Kernel) -> Mapping[Axis, Axis] | None:
    """Which axes of the reader those of the sums are; None if it does not read all of them, each at one place, and in the same blocks."""
    (store,) = kernel.stores
    seen = [v for v in reader.loads() if v.buffer is store.buffer]
    if len({(v.index, v.shape) for v in seen}) != 1 or seen[0].shape != store.view:
        return None
    where: dict[Axis, Axis] = {}
    for mine, theirs in zip(store.index, seen[0].index, strict=True):
        axis = next(a for a in kernel.domain if mine == of(a))
        other = next((a for a in reader.domain if theirs == of(a) and a.extent == axis.extent), None)
        if other is None:
            return None
        where[axis] = other
    roles = ((kernel.unit, reader.unit), (kernel.inner, reader.inner))
    return where if all((where.get(a) if a is not None else None) is b for a, b in roles) else None


def _side_by_side(reader: Kernel, where: Mapping[Axis, Axis]) -> bool:
    """Whether it has nothing to sum itself, rows in lanes, and so few places for each sum that they are one tile."""
    others = [a.extent for a in reader.domain if a not in where.values()]
    return (
        not reader.reduced
        and not reader.sequential
        and reader.inner is not None
        and 1 <= len(others) <= 2
        and max(others) <= MOST_COLUMNS
    )


def _with(reader: Kernel, kernel: Kernel, where: Mapping[Axis, Axis]) -> Kernel:
    (store,) = kernel.stores
    value = rebuilt([store.value], {}, {a: of(b) for a, b in where.items()})[store.value]
    table: dict[Value, Value] = {v: value for v in reader.loads() if v.buffer is store.buffer}
    rebuilt(roots(reader.stores), table)
    stores = [replace(s, value=table[s.value], index=reindexed(s.index, table, {})) for s in reader.stores]
    return replace(reader, reduced=kernel.reduced, stores=stores, origin=(*kernel.origin, *reader.origin))
