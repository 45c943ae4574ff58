"""The largest (or the sum) of a few neighbours, taken where they still stand in the registers of the kernel that computes them.

In: kernels. Out: kernels. A convolution and the pooling behind it become one kernel with a sum for each place of a window, if rows lie in
lanes, so that weights come from memory no more often than before. What is pooled
goes to memory only if others read it, as the way back does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from itertools import product
from math import prod
from typing import Any

from .affine import Affine, Axis, of
from .former import EXPENSIVE
from .fuse import DEAR, HEAVIEST
from .kernels import Buffer, Item, Kernel, Store, Value, bounds, constant, elementwise, rebuilt, reindexed, roots
from .operators import COMBINE
from .phases import accesses
from .siblings import MOST_SUMS, key_of

Places = Mapping[Axis, Affine]  # an axis of the kernel that is pooled -> in terms of those of the pooling


def pooled(items: Sequence[Item]) -> list[Item]:
    """The items, each such pooling in the kernel that computes what it reads."""
    made = list(items)
    for item in items:
        buffer = _pooled_by(item) if isinstance(item, Kernel) else None
        if not isinstance(item, Kernel) or buffer is None:
            continue
        writer = _writer(made, item, buffer)
        where = _where(writer, item, buffer) if writer is not None else None
        if writer is not None and where is not None:
            others = (a for i in made if i is not item for a in accesses(i))
            wanted = buffer.space != "scratch" or any(a.buffer is buffer and not a.write for a in others)
            made[made.index(writer)] = _with(writer, item, buffer, where, wanted)
            made.remove(item)
    return made


def _pooled_by(kernel: Kernel) -> Buffer | None:
    """The array of which it takes a few neighbours together, rows in lanes."""
    sums = [v for v in kernel.values() if v.op == "reduce"]
    read = {v.buffer for v in kernel.loads() if v.axes & {*kernel.reduced}}
    few = _is_plain(kernel) and kernel.inner is not None and len(sums) == 1 and 1 < _terms(kernel) <= MOST_SUMS
    return read.pop() if few and len(read) == 1 else None


def _is_plain(kernel: Kernel) -> bool:
    """Whether it sums over all of its axes, from end to end, in any order of its places."""
    return not kernel.sequential and not kernel.between and not bounds(kernel.values())


def _terms(kernel: Kernel) -> int:
    return prod(a.extent for a in kernel.reduced)


def _weight(kernel: Kernel) -> int:
    """About how many instructions its operators are, all of which each place of a window needs."""
    return sum(DEAR if v.op in EXPENSIVE else 1 for v in kernel.values())


def _writer(items: Sequence[Item], kernel: Kernel, buffer: Buffer) -> Kernel | None:
    """The kernel that alone writes the buffer, if the pooling can be done there: nothing in between writes what it reads or touches what
    it writes."""
    reads = {a.buffer for a in accesses(kernel) if not a.write} - {buffer}
    writes = {a.buffer for a in accesses(kernel) if a.write}
    found = None
    for item in items[: items.index(kernel)]:
        touched = list(accesses(item))
        if any(a.write and a.buffer is buffer for a in touched):
            if found is not None or not isinstance(item, Kernel):
                return None
            found = item
        elif found is not None and any(a.buffer in writes or (a.write and a.buffer in reads) for a in touched):
            return None
    if found is None or any(a.buffer in writes or (a.write and a.buffer in reads) for a in accesses(found)):
        return None
    return found


def _where(writer: Kernel, kernel: Kernel, buffer: Buffer) -> Places | None:
    """Where in the writer's domain the places are that the pooling reads; None if it does not read each of them once, in blocks of the
    same rows, or would need too many sums."""
    sums = [v for v in writer.values() if v.op == "reduce"]
    stores = [s for s in writer.stores if s.buffer is buffer]
    seen = [v for v in kernel.loads() if v.buffer is buffer]
    if not sums or len(stores) != 1 or len(seen) != 1 or len(sums) * _terms(kernel) > MOST_SUMS:
        return None
    if _weight(writer) * _terms(kernel) > HEAVIEST:
        return None
    if not _is_plain(writer) or stores[0].view != seen[0].shape or stores[0].mode != "set":
        return None
    where: dict[Axis, Affine] = {}
    for mine, theirs in zip(stores[0].index, seen[0].index, strict=True):
        axis = next((a for a in writer.domain if mine == of(a)), None)
        if axis is not None and isinstance(theirs, Affine) and axis not in where and _covers(theirs, axis.extent):
            where[axis] = theirs
        elif not mine == theirs == Affine():
            return None
    used = [a for i in where.values() for a in i.axes_in_order]
    everything = [a for a in (*kernel.domain, *kernel.reduced) if a.extent > 1]
    if any((a in where) < (a.extent > 1) for a in writer.domain) or len(used) != len(everything) or {*used} != {*everything}:
        return None
    roles = ((writer.unit, kernel.unit), (writer.inner, kernel.inner))
    same = (a is not None and b is not None and where.get(a, of(a)) == of(b) for a, b in roles)
    return where if all(same) else None


def _covers(index: Affine, extent: int) -> bool:
    """Whether it takes each number below `extent` once."""
    size = 1
    for axis, factor in sorted(index.terms, key=lambda t: t[1]):
        if factor != size:
            return False
        size *= axis.extent
    return index.constant == 0 and size == extent


def _with(writer: Kernel, kernel: Kernel, buffer: Buffer, where: Places, wanted: bool) -> Kernel:
    """The writer with a sum for each place of a window; wanted: what it pools is read elsewhere."""
    (store,) = (s for s in writer.stores if s.buffer is buffer)
    (total,) = (v for v in kernel.values() if v.op == "reduce")
    (taken,) = (v for v in kernel.loads() if v.buffer is buffer)
    known: dict[Any, Value] = {}
    stores: list[Store] = []
    terms: list[Value] = []
    for places in product(*(range(a.extent) for a in kernel.reduced)):
        fixed = {a: Affine(n) for a, n in zip(kernel.reduced, places, strict=True)}
        at = {a: i.replaced(fixed) for a, i in where.items()}
        table = rebuilt(roots(writer.stores), {}, at, lambda v: known.setdefault(key_of(v), v))
        terms.append(rebuilt(total.args, {taken: table[store.value]}, fixed)[total.args[0]])
        stores += [
            replace(s, value=table[s.value], index=reindexed(s.index, table, at))
            for s in writer.stores
            if wanted or s is not store
        ]
    how = COMBINE[total.attrs["how"]]
    if how == "add":
        terms.insert(0, constant(0, total.dtype))  # as every sum begins: of -0 alone it is +0
    table = {total: reduce(lambda a, b: elementwise(how, total.dtype, [a, b]), terms)}
    rebuilt(roots(kernel.stores), table)
    stores += [replace(s, value=table[s.value], index=reindexed(s.index, table, {})) for s in kernel.stores]
    return replace(kernel, reduced=writer.reduced, stores=stores, origin=(*writer.origin, *kernel.origin))
