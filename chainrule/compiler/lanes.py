"""Rows in vector lanes: arrays of images and of sequences in blocks of rows whose innermost axis is the row.

In: kernels. Out: kernels that index such arrays of the step's own as (..., block, ..., row inside). Then any number of channels fills the
lanes, a window is an offset of whole vectors, and weights are broadcast. Whether arrays lie so follows from shapes and target alone:

- In a graph with windows, whose sums would leave more lanes empty if channels lay in them: arrays of three axes and more. Those of two
  stay as they are, row by row.
- In a graph with loops over time, whose steps would do so (six units fill six of sixteen lanes): all arrays.

Where kernels see an array that stays as more than it is, or rows are gathered, a copy is transposed block by block; and a result, which the
caller gets row by row, is copied out at the end.

Sums over rows and positions, such as the gradient of a convolution's weight, are made in parts, one for each block, wherever rows lie: so
they too are made by the thread that has the block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import ceil, prod

from .affine import Affine, Axis, of
from .fuse import EXPENSIVE, Names
from .kernels import Buffer, Item, Kernel, Loop, Store, Value, kernels_of, load, rebuilt, reindexed, roots
from .phases import Access, accesses
from .ragged import is_masked
from .schedule import COSTLY
from .share import in_parts
from .target import Target

LEAST = 16  # rows: so many fill the widest vector, or several
MOST = 16  # rows of a block, if that many divide a batch
LARGEST = 64
EVEN = 16  # rows; what lies between two vectors is a multiple
LEAST_PART = 64  # terms of a part of a sum
GAIN = 1.1  # times as many instructions with channels in lanes as with rows, from which on rows lie there
GAIN_OVER_TIME = 1.25  # the same where steps of a loop decide, which have little else to do
ACROSS = 1.4  # times as many instructions of a sum over lanes


@cache
def block(rows: int) -> int:
    """Rows of a block: of those numbers that divide them all, the one that fills lanes best, and is nearest to MOST; 0 if there is none.

    >>> [block(n) for n in (16, 32, 48, 64, 100, 37, 101)]
    [16, 16, 16, 16, 25, 37, 0]
    """
    fitting = [n for n in range(LEAST, min(rows, LARGEST) + 1) if rows % n == 0]
    return min(fitting, key=lambda n: (-n / _pitch(n), abs(n - MOST)), default=0)


def _pitch(rows: int) -> int:
    return -(-rows // EVEN) * EVEN


def in_lanes(items: Sequence[Item], target: Target, names: Names) -> list[Item]:
    """The items with such indices."""
    found = _over_time(items, target) or _of_windows(items, target)
    if found is None:
        return list(items)
    gathered = {a.buffer for k, a in found.fitting if a.write and _looks_up(k)}
    chosen = [b for b in dict.fromkeys(a.buffer for _, a in found.fitting) if len(b.shape) >= found.axes and b not in gathered]
    homes = {b: b if b.space == "scratch" else Buffer(names("t"), b.shape, b.dtype, row=b.row) for b in chosen}
    copied = gathered | {a.buffer for _, a in found.fitting if len(a.buffer.shape) < found.axes <= len(a.view)}
    copies = {
        b: Buffer(names("t"), (b.shape[0], prod(b.shape[1:])), b.dtype)
        for b in dict.fromkeys(a.buffer for _, a in found.fitting)
        if b in copied and found.places[b] == 0
    }
    rewriter = _Rewriter(found.places, homes, copies, found.axes, names)
    made: list[Item] = []
    for item in items:
        made.append(rewriter.item(item))
        written = dict.fromkeys(a.buffer for a in accesses(item) if a.write and a.buffer in copies)
        made += [_transposed(b, copies[b], names) for b in written]
    for buffer, home in (*homes.items(), *copies.items()):
        place = found.places[buffer]
        home.lanes, home.shape = block(home.shape[place]), _shape(home.shape, place)
    return made + [_handed_over(home, b, found.places[b], names) for b, home in homes.items() if home is not b]


@dataclass(frozen=True)
class _Found:
    """Arrays that can lie so. places: of each the dimension of its rows; fitting: who looks at them; axes: those with fewer stay as they
    are."""

    places: Mapping[Buffer, int]
    fitting: Sequence[tuple[Kernel, Access]]
    axes: int


def _of_windows(items: Sequence[Item], target: Target) -> _Found | None:
    """The arrays outside loops, if windows are taken of some and that fills lanes better so."""
    kernels = [i for i in items if isinstance(i, Kernel)]
    inside = {a.buffer for i in items if isinstance(i, Loop) for a in accesses(i)}
    every = [(k, a) for k in kernels for a in accesses(k) if _has_rows_first(a.buffer) and a.buffer not in inside]
    fitting = _fitting(every, {a.buffer: 0 for _, a in every})
    seen = {k: a.view[0] for k, a in fitting if any(_is_window(i) for i in a.index[1:])}
    if not _gains(seen, target):
        return None
    return _Found({a.buffer: 0 for _, a in fitting}, fitting, 3)


def _over_time(items: Sequence[Item], target: Target) -> _Found | None:
    """All arrays with rows, if there are loops over time whose steps fill lanes better so. Loops whose rows end stay as they are:
    rows of different length would share a vector."""
    loops = [i for i in items if isinstance(i, Loop)]
    inside = [(k, loop.axis.extent) for loop in loops for k in kernels_of([loop])]
    counts = Counter(k.unit.extent for k, _ in inside if k.unit is not None)
    rows = max(counts, key=lambda n: counts[n], default=0)
    if not block(rows) or any(is_masked(loop) for loop in loops):
        return None
    now, then = (sum(turns * _effort(k, rows, target, so) for k, turns in inside) for so in (False, True))
    if now <= GAIN_OVER_TIME * then:
        return None
    found: dict[Buffer, set[int | None]] = {}
    for k in kernels_of(items):
        for s in k.stores:
            along = [d for d, i in enumerate(s.index) if k.unit is not None and k.unit.extent == rows and i == of(k.unit)]
            found.setdefault(s.buffer, set()).add(along[0] if len(along) == 1 else None)
    places = {b: d for b, (d, *more) in found.items() if not more and d is not None and _has_rows(b, d)}
    fitting = _fitting([(k, a) for k in kernels_of(items) for a in accesses(k) if a.buffer in places], places)
    return _Found({a.buffer: places[a.buffer] for _, a in fitting}, fitting, 2)


def _effort(kernel: Kernel, rows: int, target: Target, in_lanes: bool) -> float:
    """About how many instructions a kernel has, with rows in lanes or with the axis beside them that fills lanes best."""
    if not kernel.domain:
        return 0.0
    values = kernel.values()
    sums = [v for v in values if v.op == "reduce"]
    width = target.vector_bytes // max((v.dtype.itemsize for v in values if v.dtype.kind == "f"), default=4)
    each = len(sums) * prod(a.extent for a in kernel.reduced) + sum(COSTLY if v.op in EXPENSIVE else 1 for v in values)
    effort = each * prod(a.extent for a in kernel.domain)
    if in_lanes:
        over_rows = 1 if any(a.extent == rows for a in kernel.domain) else ACROSS
        return effort * over_rows / _filled(block(rows), width)
    beside = [a.extent for a in kernel.domain]
    if rows in beside:
        beside.remove(rows)
    return effort / max((_filled(n, width) for n in beside), default=1 / width)


def _fitting(every: Sequence[tuple[Kernel, Access]], places: Mapping[Buffer, int]) -> list[tuple[Kernel, Access]]:
    misfits = {a.buffer for k, a in every if not _fits(k, a, places[a.buffer])}
    return [(k, a) for k, a in every if a.buffer not in misfits]


def in_blocks(items: Sequence[Item], names: Names) -> list[Item]:
    """The items; in graphs with windows, or with loops whose rows lie in lanes, sums over rows and positions in parts of one block of rows
    each, and blocks as what threads share out where they would not get as many rows each."""
    kernels = list(kernels_of(items))
    if any(isinstance(i, Loop) for i in items):
        apart = any(k.inner is not None for k in kernels)
    else:
        apart = any(_is_window(i) for k in kernels for a in accesses(k) for i in a.index)
    if not apart:
        return list(items)
    made = [part for i in items for part in (_summed(i, names) if isinstance(i, Kernel) else [i])]
    plain = [k for k in made if isinstance(k, Kernel) and k.inner is None]  # the units of the others are blocks
    rows = {a.buffer.shape[0] for k in plain for a in accesses(k) if _has_rows_first(a.buffer)}
    uneven = {n for n in rows if n % (2 * EVEN) and block(n) < n}
    cut = {k: _cut(k, names) for k in plain if k.unit is not None and k.unit.extent in uneven}
    return [cut.get(i, i) if isinstance(i, Kernel) else i for i in made]


def _cut(kernel: Kernel, names: Names) -> Kernel:
    """The kernel with blocks as its units."""
    rows = kernel.unit
    assert rows is not None
    outer, inner = Axis(names("b"), rows.extent // block(rows.extent)), Axis(rows.name, block(rows.extent))
    where = {rows: of(outer) * inner.extent + of(inner)}
    table = rebuilt(roots(kernel.stores), {}, where)
    stores = [replace(s, value=table[s.value], index=reindexed(s.index, table, where)) for s in kernel.stores]
    domain = tuple(x for axis in kernel.domain for x in ((outer, inner) if axis is rows else (axis,)))
    return replace(kernel, domain=domain, stores=stores, unit=outer)


def _summed(kernel: Kernel, names: Names) -> list[Kernel]:
    rows = next((x for x in kernel.reduced for a in accesses(kernel) if a.buffer.row == 0 and a.index[0] == of(x)), None)
    own = [x for x in kernel.reduced if x is not rows and x is not kernel.inner]
    if rows is None or not own or kernel.sequential:
        return [kernel]
    if kernel.inner not in kernel.reduced:
        if block(rows.extent) in (0, rows.extent):
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


def _has_rows_first(buffer: Buffer) -> bool:
    return buffer.row == 0 and _has_rows(buffer, 0)


def _has_rows(buffer: Buffer, place: int) -> bool:
    return buffer.space in ("scratch", "result") and len(buffer.shape) > 1 and buffer.size > 0 and block(buffer.shape[place]) > 0


def _fits(kernel: Kernel, a: Access, place: int) -> bool:
    """Whether the dimension of the rows is seen as such, all rows, one after the other."""
    if a.view[: place + 1] != a.buffer.shape[: place + 1]:
        return False
    axes = (*kernel.domain[kernel.sequential :], *kernel.reduced)
    return any(a.index[place] == of(x) and x.extent == a.view[place] for x in axes)


def _is_window(i: Affine | Value) -> bool:
    return isinstance(i, Affine) and len(i.terms) > 1


def _looks_up(kernel: Kernel) -> bool:
    return any(isinstance(i, Value) for v in kernel.values() for i in v.index)


def _shape(shape: Sequence[int], place: int) -> tuple[int, ...]:
    rows = shape[place]
    return (*shape[:place], rows // block(rows), *shape[place + 1 :], _pitch(block(rows)))


def _index(index: Sequence[Affine | Value], rows: int, place: int) -> tuple[Affine | Value, ...]:
    """(..., block, ..., row inside); index: in terms of the new axes."""
    row = index[place]
    assert isinstance(row, Affine)
    where = row.divided(block(rows))
    assert where is not None
    return (*index[:place], where[0], *index[place + 1 :], where[1])


def _transposed(buffer: Buffer, copy: Buffer, names: Names) -> Kernel:
    """The copy of an array, seen as rows of numbers."""
    rows, n = buffer.shape[0], prod(buffer.shape[1:])
    size = block(rows)
    outer, across, inner = (Axis(names("i"), extent) for extent in (rows // size, n, size))
    read = load(buffer, (of(outer) * size + of(inner), of(across)), (rows, n))
    stores = [Store(copy, (of(outer), of(across), of(inner)), read)]
    return Kernel(names("k"), (outer, across, inner), (), stores, outer, inner=inner)


def _handed_over(home: Buffer, result: Buffer, place: int, names: Names) -> Kernel:
    """A result row by row, from where it was computed."""
    before, rows, after = result.shape[:place], result.shape[place], prod(result.shape[place + 1 :])
    first = tuple(Axis(names("i"), n) for n in before)
    outer, inner, across = (Axis(names("i"), n) for n in (rows // block(rows), block(rows), after))
    read = load(home, (*map(of, first), of(outer), of(across), of(inner)), (*before, outer.extent, after, _pitch(inner.extent)))
    index = (*map(of, first), of(outer) * inner.extent + of(inner), of(across))
    stores = [Store(result, index, read, shape=(*before, rows, after))]
    return Kernel(names("k"), (*first, outer, inner, across), (), stores, outer, inner=inner)


class _Rewriter:
    """Kernels rewritten, the axes of rows in two: that of blocks, and last of all that inside a block. homes: arrays that lie so, and
    where."""

    def __init__(
        self,
        places: Mapping[Buffer, int],
        homes: Mapping[Buffer, Buffer],
        copies: Mapping[Buffer, Buffer],
        axes: int,
        names: Names,
    ) -> None:
        self.places, self.homes, self.copies, self.axes, self.names = places, homes, copies, axes, names

    def item(self, item: Item) -> Item:
        if isinstance(item, Loop):
            return replace(item, items=[self.item(i) for i in item.items], states=[self.homes.get(b, b) for b in item.states])
        return self._kernel(item)

    def _placed(self, a: Access) -> Buffer | None:
        if a.buffer in self.copies and not a.write and max(len(a.view), len(a.buffer.shape)) >= self.axes:
            return self.copies[a.buffer]
        return self.homes.get(a.buffer)

    def _loaded(self, v: Value) -> Value:
        if v.op != "load" or v.buffer is None:
            return v
        buffer = self._placed(Access(v.buffer, v.index, v.shape, None, False))
        if buffer is None:
            return v
        place = self.places[v.buffer]
        return load(buffer, _index(v.index, v.shape[place], place), _shape(v.shape, place))

    def _kernel(self, kernel: Kernel) -> Kernel:
        rows = [a.index[self.places[a.buffer]] for a in accesses(kernel) if self._placed(a) is not None]
        axes = list(dict.fromkeys(x for i in rows for x in i.axes))
        if not axes:
            return kernel
        both = {x: (Axis(self.names("b"), x.extent // block(x.extent)), Axis(x.name, block(x.extent))) for x in axes}
        where = {x: of(outer) * inner.extent + of(inner) for x, (outer, inner) in both.items()}
        table = rebuilt(roots(kernel.stores), {}, where, self._loaded)
        stores = []
        for s in kernel.stores:
            index = reindexed(s.index, table, where)
            if s.buffer in self.homes:
                place = self.places[s.buffer]
                index, shape = _index(index, s.view[place], place), _shape(s.view, place)
                stores.append(replace(s, buffer=self.homes[s.buffer], index=index, value=table[s.value], shape=shape))
            else:
                stores.append(replace(s, index=index, value=table[s.value]))
        unit = both[kernel.unit][0] if kernel.unit in both and kernel.unit is not None else kernel.unit
        reduced = tuple(x for x in _last(kernel.reduced, both) if x.extent != 1)
        inner = both[axes[0]][1]
        return replace(kernel, domain=_last(kernel.domain, both), reduced=reduced, stores=stores, unit=unit, inner=inner)


def _last(axes: Sequence[Axis], both: Mapping[Axis, tuple[Axis, Axis]]) -> tuple[Axis, ...]:
    return (*(both[x][0] if x in both else x for x in axes), *(both[x][1] for x in axes if x in both))
