"""Rows in vector lanes: arrays of images and of sequences, of which windows are taken, in blocks of rows whose innermost axis is the row.

In: kernels. Out: kernels that index such arrays of the step's own as (block, ..., row inside). Then any number of channels fills the
lanes, a window is an offset of whole vectors, and weights are broadcast. Whether arrays lie so follows from shapes and target alone: from
three axes on, in a graph with windows whose sums would leave more lanes empty if channels lay in them. Arrays of two axes stay as they
are, row by row; where kernels see one as more, or rows are gathered, a copy is transposed block by block.

Sums over rows and positions, such as the gradient of a convolution's weight, are made in parts, one for each block, wherever rows lie: so
they too are made by the thread that has the block.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import ceil, prod

from .affine import Affine, Axis, of
from .fuse import Names
from .kernels import Buffer, Item, Kernel, Loop, Store, Value, load, rebuilt, roots
from .phases import Access, accesses
from .share import in_parts
from .target import Target

LEAST = 16  # rows: so many fill the widest vector, or several
MOST = 16  # rows of a block, if that many divide a batch
EVEN = 16  # rows; what lies between two vectors is a multiple
LEAST_PART = 64  # terms of a part of a sum
GAIN = 1.1  # times as many instructions with channels in lanes as with rows, from which on rows lie there


def block(rows: int) -> int:
    """Rows of a block: of those numbers that divide them all, the one that fills lanes best, and is nearest to MOST.

    >>> [block(n) for n in (16, 32, 48, 64, 100, 37)]
    [16, 16, 16, 16, 25, 37]
    """
    fitting = [n for n in range(LEAST, rows + 1) if rows % n == 0]
    return min(fitting, key=lambda n: (n > 4 * MOST, -n / _pitch(n), abs(n - MOST)))


def _pitch(rows: int) -> int:
    return -(-rows // EVEN) * EVEN


def in_lanes(items: Sequence[Item], target: Target, names: Names) -> list[Item]:
    """The items with such indices."""
    kernels = [i for i in items if isinstance(i, Kernel)]
    inside = {a.buffer for i in items if isinstance(i, Loop) for a in accesses(i)}
    touched = {k: list(accesses(k)) for k in kernels}
    every = [(k, a) for k in kernels for a in touched[k] if _has_rows(a.buffer) and a.buffer not in inside]
    misfits = {a.buffer for k, a in every if not _fits(k, a)}
    fitting = [(k, a) for k, a in every if a.buffer not in misfits]
    seen = {k: a.view[0] for k, a in fitting if any(_is_window(i) for i in a.index[1:])}
    if not _gains(seen, target):
        return list(items)
    gathered = {a.buffer for k, a in fitting if a.write and _looks_up(k)}
    chosen = {a.buffer for _, a in fitting if len(a.buffer.shape) > 2} - gathered
    copied = gathered | {a.buffer for _, a in fitting if len(a.buffer.shape) == 2 and len(a.view) > 2}
    copies = {
        b: Buffer(names("t"), (b.shape[0], prod(b.shape[1:])), b.dtype)
        for b in dict.fromkeys(a.buffer for _, a in fitting)
        if b in copied
    }
    made: list[Item] = []
    for item in items:
        if isinstance(item, Loop):
            made.append(item)
            continue
        made.append(_rewritten(item, chosen, copies, names))
        written = dict.fromkeys(a.buffer for a in touched[item] if a.write and a.buffer in copies)
        made += [_transposed(b, copies[b], names) for b in written]
    for buffer in (*chosen, *copies.values()):
        buffer.shape = _shape(buffer.shape)
    return made


def in_blocks(items: Sequence[Item], names: Names) -> list[Item]:
    """The items; in graphs with windows, sums over rows and positions in parts of one block of rows each, and blocks as what threads share
    out where they would not get as many rows each."""
    if any(isinstance(i, Loop) for i in items) or not any(_is_window(i) for k in items for a in accesses(k) for i in a.index):
        return list(items)
    made = [part for k in items if isinstance(k, Kernel) for part in _summed(k, names)]
    rows = {a.buffer.shape[0] for k in made for a in accesses(k) if _has_rows(a.buffer)}
    uneven = {n for n in rows if n % (2 * EVEN) and block(n) < n}
    return [_cut(k, names) if k.unit is not None and k.unit.extent in uneven else k for k in made]


def _cut(kernel: Kernel, names: Names) -> Kernel:
    """The kernel with blocks as its units."""
    rows = kernel.unit
    assert rows is not None
    outer, inner = Axis(names("b"), rows.extent // block(rows.extent)), Axis(rows.name, block(rows.extent))
    where = {rows: of(outer) * inner.extent + of(inner)}
    table = rebuilt(roots(kernel.stores), {}, where)
    stores = [
        replace(s, value=table[s.value], index=tuple(table[i] if isinstance(i, Value) else i.replaced(where) for i in s.index))
        for s in kernel.stores
    ]
    domain = tuple(x for axis in kernel.domain for x in ((outer, inner) if axis is rows else (axis,)))
    return replace(kernel, domain=domain, stores=stores, unit=outer)


def _summed(kernel: Kernel, names: Names) -> list[Kernel]:
    rows = next((x for x in kernel.reduced for a in accesses(kernel) if a.buffer.row == 0 and a.index[0] == of(x)), None)
    own = [x for x in kernel.reduced if x is not rows and x is not kernel.inner]
    if rows is None or not own or kernel.sequential:
        return [kernel]
    if kernel.inner not in kernel.reduced:
        if rows.extent < 2 * LEAST or block(rows.extent) == rows.extent:
            return [kernel]
        size = block(rows.extent)
        outer, inner = Axis(names("b"), rows.extent // size), Axis(rows.name, size)
        table = rebuilt(roots(kernel.stores), {}, {rows: of(outer) * size + of(inner)})
        stores = [replace(s, value=table[s.value]) for s in kernel.stores]
        reduced = (outer, *(inner if x is rows else x for x in kernel.reduced))
        kernel, rows = replace(kernel, stores=stores, reduced=reduced), outer
    parts = prod(a.extent for a in kernel.domain) * rows.extent
    if parts * LEAST_PART > prod(a.extent for a in (*kernel.domain, *kernel.reduced)):
        return [kernel]
    return in_parts(kernel, rows, names)


def _gains(seen: Mapping[Kernel, int], target: Target) -> bool:
    """Whether sums over windows fill lanes better with rows than with channels. seen: kernels that look at windows, and the rows there."""
    rows = channels = 0.0
    for kernel, count in seen.items():
        sums = [v for v in kernel.values() if v.op == "reduce"]
        if sums and kernel.domain:
            width = target.vector_bytes // sums[0].dtype.itemsize
            terms = prod(a.extent for a in (*kernel.domain, *kernel.reduced))
            rows += terms / _filled(block(count), width)
            channels += terms / _filled(kernel.domain[-1].extent, width)
    return channels > GAIN * rows


def _filled(extent: int, width: int) -> float:
    """The part of the lanes that an axis fills."""
    return max(extent, 1) / (max(ceil(extent / width), 1) * width)


def _has_rows(buffer: Buffer) -> bool:
    return (
        buffer.space == "scratch" and buffer.row == 0 and len(buffer.shape) > 1 and buffer.shape[0] >= LEAST and buffer.size > 0
    )


def _fits(kernel: Kernel, a: Access) -> bool:
    """Whether the first axis of what is seen is the rows, all of them, one after the other."""
    first = a.index[0]
    return (
        a.view[0] == a.buffer.shape[0]
        and isinstance(first, Affine)
        and any(first == of(x) for x in (*kernel.domain[kernel.sequential :], *kernel.reduced))
    )


def _is_window(i: Affine | Value) -> bool:
    return isinstance(i, Affine) and len(i.terms) > 1


def _looks_up(kernel: Kernel) -> bool:
    return any(isinstance(i, Value) for v in kernel.values() for i in v.index)


def _shape(shape: Sequence[int]) -> tuple[int, ...]:
    rows = block(shape[0])
    return (shape[0] // rows, *shape[1:], _pitch(rows))


def _index(index: Sequence[Affine | Value], rows: int) -> tuple[Affine | Value, ...]:
    """(block, ..., row inside); index: in terms of the new axes."""
    assert isinstance(index[0], Affine)
    where = index[0].divided(block(rows))
    assert where is not None
    return (where[0], *index[1:], where[1])


def _transposed(buffer: Buffer, copy: Buffer, names: Names) -> Kernel:
    """The copy of an array, seen as rows of numbers."""
    rows, n = buffer.shape[0], prod(buffer.shape[1:])
    size = block(rows)
    outer, across, inner = (Axis(names("i"), extent) for extent in (rows // size, n, size))
    read = load(buffer, (of(outer) * size + of(inner), of(across)), (rows, n))
    stores = [Store(copy, (of(outer), of(across), of(inner)), read)]
    return Kernel(names("k"), (outer, across, inner), (), stores, outer, inner=inner)


def _rewritten(kernel: Kernel, chosen: Iterable[Buffer], copies: Mapping[Buffer, Buffer], names: Names) -> Kernel:
    """One kernel, the axes of rows in two: that of blocks, and last of all that inside a block."""

    def placed(a: Access) -> Buffer | None:
        if a.buffer in copies and not a.write and (len(a.view) > 2 or len(a.buffer.shape) > 2):
            return copies[a.buffer]
        return a.buffer if a.buffer in chosen else None

    axes = list(dict.fromkeys(x for a in accesses(kernel) if placed(a) is not None for x in a.index[0].axes))
    if not axes:
        return kernel
    both = {x: (Axis(names("b"), x.extent // block(x.extent)), Axis(x.name, block(x.extent))) for x in axes}
    where = {x: of(outer) * inner.extent + of(inner) for x, (outer, inner) in both.items()}

    def loaded(v: Value) -> Value:
        if v.op != "load" or v.buffer is None:
            return v
        buffer = placed(Access(v.buffer, v.index, v.shape, None, False))
        return v if buffer is None else load(buffer, _index(v.index, v.shape[0]), _shape(v.shape))

    table = rebuilt(roots(kernel.stores), {}, where, loaded)
    stores = []
    for s in kernel.stores:
        index = tuple(table[i] if isinstance(i, Value) else i.replaced(where) for i in s.index)
        if s.buffer in chosen:
            stores.append(replace(s, index=_index(index, s.view[0]), value=table[s.value], shape=_shape(s.view)))
        else:
            stores.append(replace(s, index=index, value=table[s.value]))
    unit = both[kernel.unit][0] if kernel.unit in both and kernel.unit is not None else kernel.unit
    reduced = tuple(x for x in _last(kernel.reduced, both) if x.extent != 1)
    inner = both[axes[0]][1]
    return replace(kernel, domain=_last(kernel.domain, both), reduced=reduced, stores=stores, unit=unit, inner=inner)


def _last(axes: Sequence[Axis], both: Mapping[Axis, tuple[Axis, Axis]]) -> tuple[Axis, ...]:
    return (*(both[x][0] if x in both else x for x in axes), *(both[x][1] for x in axes if x in both))
