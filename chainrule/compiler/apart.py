"""Memory of loops that threads write, each its own part in one piece.

In: items, cut for a number of threads. Out: buffers that know that they lie part by part; and kernels that index them so, made just
before they become code.

What a loop keeps of each step has time as its first dimension, or the number of a panel, and the rows within it. Cut by rows, threads
would write next to each other step after step, and a core that reads ahead of its own rows takes lines away from the core that writes
the next: measured on parts of 0.5 to 5 kB, two to four times as slow. So the rows of a unit come first. Neither what is computed nor the
order of a sum depends on it.

    buffer[time, row, ...]  lies as  [row / length, time, row % length, ...]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from .affine import Affine, Axis, of
from .fuse import Names
from .kernels import Buffer, Index, Item, Kernel, Loop, Value, kernels_of, load, rebuilt, reindexed, roots
from .phases import Access, accesses
from .schedule import Schedule, cut


def set_apart(items: Sequence[Item], threads: int) -> None:
    """Tells buffers of loops that they lie so: where each unit of each kernel that touches one stays in one part."""
    if threads == 1:
        return
    touched = {a.buffer for i in items if isinstance(i, Loop) and i.ends is None for a in accesses(i)}
    kernels = list(kernels_of(items))
    found: dict[Buffer, tuple[int, int]] = {}
    for kernel in kernels:
        count, length = cut(kernel, threads)
        for s in kernel.stores:
            place = _place(s.index, kernel.unit)
            if count > 1 and place and place < len(s.index) - 1 and s.buffer in touched and s.buffer.space == "scratch":
                found[s.buffer] = place, length
    fits = dict.fromkeys(found, True)
    for kernel in kernels:
        for a in accesses(kernel):
            if a.buffer in found:
                fits[a.buffer] &= _fits(kernel, a, *found[a.buffer], threads)
    for buffer, how in found.items():
        buffer.apart = how if fits[buffer] else None


def moved(kernel: Kernel, made: Schedule, threads: int, names: Names) -> tuple[Kernel, Schedule]:
    """The kernel with such indices, and its schedule, which stays what it was: the order of sums hangs on it."""
    apart = [(a, a.buffer.apart) for a in accesses(kernel) if a.buffer.apart is not None]
    if not apart:
        return kernel, made
    where: dict[Axis, Affine] = {}
    unit = kernel.unit
    if unit is not None and any(_place(a.index, unit) == place for a, (place, _) in apart):
        length = cut(kernel, threads)[1]
        outer, inner = Axis(names("u"), unit.extent // length), Axis(unit.name, length)
        where = {unit: of(outer) * length + of(inner)}
        domain = tuple(x for a in kernel.domain for x in ((outer, inner) if a is unit else (a,)))
        kernel = replace(kernel, domain=domain, unit=outer, length=1)
        lanes, tile, side, across = (inner if a is unit else a for a in (made.lanes, made.tile, made.side, made.across))
        made = replace(made, lanes=lanes, tile=tile, side=side, across=across)
    return _rewritten(kernel, where), made


def _rewritten(kernel: Kernel, where: Mapping[Axis, Affine]) -> Kernel:
    def loaded(v: Value) -> Value:
        if v.op != "load" or v.buffer is None or v.buffer.apart is None:
            return v
        return load(v.buffer, *_by_parts(v.index, v.shape, v.buffer.apart))

    table = rebuilt([*roots(kernel.stores), *kernel.limits()], {}, where, loaded)
    stores = []
    for s in kernel.stores:
        index: Index = reindexed(s.index, table, where)
        shape = s.shape
        if s.buffer.apart is not None:
            index, shape = _by_parts(index, s.view, s.buffer.apart)
        stores.append(replace(s, index=index, value=table[s.value], shape=shape))
    packed = {table[v]: buffer for v, buffer in kernel.packed.items()}
    between = {a: (table[first], table[end]) for a, (first, end) in kernel.between.items()}
    return replace(kernel, stores=stores, packed=packed, between=between)


def _place(index: Index, unit: Axis | None) -> int | None:
    """The dimension that the unit axis runs along, and along no other."""
    along = [d for d, i in enumerate(index) if unit in i.axes]
    return along[0] if len(along) == 1 and unit is not None and index[along[0]] == of(unit) else None


def _fits(kernel: Kernel, a: Access, place: int, length: int, threads: int) -> bool:
    """Whether what each unit of a kernel touches lies in one part."""
    if a.view != a.buffer.shape or a.view[place] % length:
        return False
    if _place(a.index, kernel.unit) == place:
        return cut(kernel, threads)[1] == length
    row = a.index[place]
    return isinstance(row, Affine) and row.divided(length) is not None


def _by_parts(index: Index, shape: tuple[int, ...], apart: tuple[int, int]) -> tuple[Index, tuple[int, ...]]:
    place, length = apart
    row = index[place]
    assert isinstance(row, Affine)
    where = row.divided(length)
    assert where is not None
    own = shape[place] // length, *shape[:place], length, *shape[place + 1 :]
    return (where[0], *index[:place], where[1], *index[place + 1 :]), own
