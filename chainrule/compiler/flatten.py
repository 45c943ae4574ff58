"""Kernels without sums over as few and as long axes as they can have.

In: kernels. Out: the same, where neighbouring axes that every load and store runs through as one are one, so that lanes are full; and
kernels whose sums fill lanes badly in two parts: the sums, and what is made of them, which then fills lanes well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import ceil

from .affine import Affine, Axis, flat, of
from .former import EXPENSIVE
from .fuse import Names
from .kernels import Buffer, Item, Kernel, Loop, Store, Value, load, plain, rebuilt, terms
from .layout import Storage

FULL = 0.75  # of the lanes: a kernel that fills fewer is worth splitting, if
LEAST_COST = 2  # so many expensive operators follow its sums


def split(items: Sequence[Item], storage: Storage, names: Names) -> list[Item]:
    """Sums that fill lanes badly apart from an expensive rest. Both keep the unit axis, so no thread waits in between."""
    made: list[Item] = []
    for item in items:
        if isinstance(item, Loop):
            item.items[:] = split(item.items, storage, names)
            made.append(item)
        else:
            made += _split(item, storage, names)
    return made


def _split(kernel: Kernel, storage: Storage, names: Names) -> list[Kernel]:
    sums = [v for v in kernel.values() if v.op == "reduce"]
    if not sums or len(kernel.domain) < 2 or kernel.sequential:
        return [kernel]
    inside = terms(sums)
    rest = [v for v in kernel.values() if v.op in EXPENSIVE and v not in inside and v.axes]
    width = storage.target.vector_bytes // sums[0].dtype.itemsize
    extent = _along_lanes(kernel, storage)
    if len(rest) < LEAST_COST or not extent > 1 or extent / (ceil(extent / width) * width) >= FULL:
        return [kernel]
    index = tuple(of(a) for a in kernel.domain)
    buffers = {v: Buffer(names("t"), tuple(a.extent for a in kernel.domain), v.dtype) for v in sums}
    parts = [Store(b, index, v) for v, b in buffers.items()]
    first = Kernel(names("k"), kernel.domain, kernel.reduced, parts, kernel.unit, inner=kernel.inner, origin=kernel.origin[:1])
    table = rebuilt([s.value for s in kernel.stores], {v: load(b, index) for v, b in buffers.items()})
    stores = [replace(s, value=table[s.value]) for s in kernel.stores]
    return [first, Kernel(kernel.name, kernel.domain, (), stores, kernel.unit, inner=kernel.inner, origin=kernel.origin[1:])]


def _along_lanes(kernel: Kernel, storage: Storage) -> int:
    """How long the axis is that lanes can go along: the last one, but rows of a panel where matrices lie transposed."""
    cuts = (storage.cut_of(s.buffer) for s in kernel.stores if s.view == s.buffer.shape)
    return next((size for axis, size in filter(None, cuts) if axis == 0), kernel.domain[-1].extent)


def can_be_lines(kernel: Kernel) -> bool:
    """Whether nothing is summed or looked up, so that only the order of memory counts."""
    indices = [i for v in kernel.values() for i in v.index] + [i for s in kernel.stores for i in s.index]
    return not (kernel.reduced or kernel.sequential or any(isinstance(i, Value) for i in indices))


def flattened(kernel: Kernel) -> Kernel:
    """A kernel without sums over as few axes as possible, its arrays seen as one line each; the same kernel if nothing changes."""
    if not can_be_lines(kernel) or len(kernel.domain) < 2:
        return kernel
    values = kernel.values()
    indexed = [*((v.index, v.shape) for v in values if v.op == "load"), *((s.index, s.view) for s in kernel.stores)]
    places = [flat(plain(index), shape) for index, shape in indexed]
    places += [v.index[0] for v in values if v.op == "iota" and isinstance(v.index[0], Affine)]
    table: dict[Axis, Affine] = {}
    domain = list(kernel.domain)
    for at in range(len(domain) - 2, -1, -1):
        outer, inner = domain[at], domain[at + 1]
        if all(p.coefficient(outer) == p.coefficient(inner) * inner.extent for p in places):
            one = Axis(inner.name, outer.extent * inner.extent)
            for place in range(len(places)):
                places[place] = places[place].without(outer).replaced({inner: of(one)})
            for axis, where in table.items():
                table[axis] = where.without(outer).replaced({inner: of(one)})
            table.update({outer: Affine(), inner: of(one)})
            domain[at : at + 2] = [one]
    if not table:
        return kernel
    return seen_as_lines(kernel, tuple(domain), table)


def seen_as_lines(kernel: Kernel, domain: tuple[Axis, ...], table: Mapping[Axis, Affine]) -> Kernel:
    """The kernel with its arrays as one line each, and some axes replaced."""
    new: dict[Value, Value] = {}
    for v in kernel.values():
        index, shape = v.index, v.shape
        if v.op == "load":
            assert v.buffer is not None
            index, shape = (flat(plain(v.index), v.shape).replaced(table),), (v.buffer.size,)
        elif v.op == "iota":
            index = (plain(v.index)[0].replaced(table),)
        args = tuple(new[a] for a in v.args)
        axes = frozenset[Axis]().union(*(a.axes for a in args), *(i.axes for i in index))
        new[v] = replace(v, index=index, shape=shape, args=args, axes=axes)
    stores = [
        Store(s.buffer, (flat(plain(s.index), s.view).replaced(table),), new[s.value], s.mode, (s.buffer.size,))
        for s in kernel.stores
    ]
    return Kernel(kernel.name, domain, (), stores, None)
