"""Rows in vector lanes: arrays of images and of sequences in blocks of rows whose innermost axis is the row.

In: kernels. Out: kernels that index such arrays of the step's own as (..., block, ..., row inside). Then any number of channels fills the
lanes, a window is an offset of whole vectors, and weights are broadcast. Whether arrays lie so follows from shapes and target alone:

- In a graph with windows, whose sums would leave more lanes empty if channels lay in them: arrays of three axes and more. Those of two
  stay as they are, row by row.
- In a graph with loops over time, whose steps would do so (six units fill six of sixteen lanes): all arrays.

Rows that are left beside whole blocks (67 are four blocks of 16 and three rows) lie in arrays of their own, which kernels of their own
read and write: so nothing is computed of rows that there are not. Sums over rows are made of both.

Where kernels see an array that stays as more than it is, or rows are gathered, a copy is transposed block by block; and a result, which the
caller gets row by row, is copied out at the end.

Sums over rows and positions, such as the gradient of a convolution's weight, are made in parts, one for each block, wherever rows lie: so
they too are made by the thread that has the block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from math import ceil, prod

from .affine import Affine, Axis, of
from .former import EXPENSIVE
from .fuse import Names
from .kernels import Buffer, Item, Kernel, Loop, Store, Value, elementwise, kernels_of, load, rebuilt, reindexed, roots, terms
from .phases import Access, accesses
from .ragged import is_masked
from .schedule import COSTLY
from .share import in_parts
from .target import Target

Division = Callable[[int], tuple[int, int]]  # rows -> rows of a block, and rows that are left beside whole blocks

LEAST = 16  # rows: so many fill the widest vector, or several
MOST = 16  # rows of a block, if that many divide a batch
LARGEST = 64
EVEN = 16  # rows; what lies between two vectors is a multiple
LEAST_PART = 64  # terms of a part of a sum
GAIN = 1.1  # times as many instructions with channels in lanes as with rows, from which on rows lie there
GAIN_OVER_TIME = 1.25  # the same where steps of a loop decide, which have little else to do
ACROSS = 1.4  # times as many instructions of a sum over lanes
_COMBINE = {"sum": "add", "max": "maximum", "min": "minimum"}


@cache
def block(rows: int) -> int:
    """Rows of a block: of those numbers that divide them all, the one that fills lanes best, and is nearest to MOST; 0 if there is none.

    >>> [block(n) for n in (16, 32, 48, 64, 100, 37, 101)]
    [16, 16, 16, 16, 25, 37, 0]
    """
    fitting = [n for n in range(LEAST, min(rows, LARGEST) + 1) if rows % n == 0]
    return min(fitting, key=lambda n: (-n / _pitch(n), abs(n - MOST)), default=0)


def _evenly(rows: int) -> tuple[int, int]:
    """Blocks of a number of rows that divides them all."""
    return block(rows), 0


@cache
def division(rows: int) -> tuple[int, int]:
    """Rows of a block, and those that are left beside whole blocks, where the busier of two threads then has much less to do than with a
    divisor.

    >>> [division(n) for n in (48, 50, 64, 67, 100, 128, 130)]
    [(16, 0), (25, 0), (16, 0), (16, 3), (25, 0), (16, 0), (16, 2)]
    """
    size = block(rows)
    if rows > LARGEST and (not size or GAIN * _busiest(rows, MOST) < _busiest(rows, size)):
        return MOST, rows % MOST
    return size, 0


def _busiest(rows: int, size: int) -> int:
    """Lanes of the thread that has half of the blocks, and all rows that are left."""
    count, left = divmod(rows, size)
    return ceil(count / 2) * _pitch(size) + _pitch(left)


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
    rewriter = _Rewriter(found, homes, copies, names)
    made: list[Item] = []
    for item in items:
        made += rewriter.item(item)
        written = dict.fromkeys(a.buffer for a in accesses(item) if a.write and a.buffer in copies)
        made += [k for b in written for k in rewriter.transposed(b)]
    rewriter.shape_buffers()
    return made + [k for b, home in homes.items() if home is not b for k in rewriter.handed_over(b)]


@dataclass(frozen=True)
class _Found:
    """Arrays that can lie so. places: of each the dimension of its rows; fitting: who looks at them; axes: those with fewer stay as they
    are; divide: how many rows are a block, and how many are left."""

    places: Mapping[Buffer, int]
    fitting: Sequence[tuple[Kernel, Access]]
    axes: int
    divide: Division


def _of_windows(items: Sequence[Item], target: Target) -> _Found | None:
    """The arrays outside loops, if windows are taken of some and that fills lanes better so."""
    kernels = [i for i in items if isinstance(i, Kernel)]
    inside = {a.buffer for i in items if isinstance(i, Loop) for a in accesses(i)}

    def fitting_of(divide: Division) -> list[tuple[Kernel, Access]]:
        every = [(k, a) for k in kernels for a in accesses(k) if _has_rows_first(a.buffer, divide) and a.buffer not in inside]
        return _fitting(every, {a.buffer: 0 for _, a in every})

    divide: Division = division
    fitting = fitting_of(divide)
    if not _can_be_two([(k, a) for k, a in fitting if division(a.view[0])[1]]):
        divide, fitting = _evenly, fitting_of(_evenly)
    seen = {k: a.view[0] for k, a in fitting if any(_is_window(i) for i in a.index[1:])}
    if not _gains(seen, target, divide):
        return None
    return _Found({a.buffer: 0 for _, a in fitting}, fitting, 3, divide)


def _can_be_two(fitting: Sequence[tuple[Kernel, Access]]) -> bool:
    """Whether each of these can be a kernel for whole blocks and one for rows that are left: with one axis of rows, and no sums of sums."""
    rows: dict[Kernel, set[Affine | Value]] = {}
    for k, a in fitting:
        rows.setdefault(k, set()).add(a.index[0])
    nested = any(v.op == "reduce" for k in rows for v in terms(v for v in k.values() if v.op == "reduce"))
    return not nested and all(len(r) == 1 and not k.sequential and not k.between for k, r in rows.items())


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
    return _Found({a.buffer: places[a.buffer] for _, a in fitting}, fitting, 2, _evenly)


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
    inside = {k.inner.extent for k in made if isinstance(k, Kernel) and k.inner is not None}  # rows of the blocks that there are
    uneven = {n for n in rows if n % (2 * EVEN) and block(n) < n and (not inside or block(n) in inside)}
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


def _gains(seen: Mapping[Kernel, int], target: Target, divide: Division) -> bool:
    """Whether sums over windows fill lanes better with rows than with channels. seen: kernels that look at windows, and the rows there."""
    rows = channels = 0.0
    for kernel, count in seen.items():
        sums = [v for v in kernel.values() if v.op == "reduce"]
        if sums and kernel.domain:
            width = target.vector_bytes // sums[0].dtype.itemsize
            terms = prod(a.extent for a in (*kernel.domain, *kernel.reduced))
            size, left = divide(count)
            rows += terms / _filled(count if left else size, width)
            channels += terms / _filled(kernel.domain[-1].extent, width)
    return channels > GAIN * rows


def _filled(extent: int, width: int) -> float:
    """The part of the lanes that an axis fills."""
    return max(extent, 1) / (max(ceil(extent / width), 1) * width)


def _has_rows_first(buffer: Buffer, divide: Division = _evenly) -> bool:
    return buffer.row == 0 and _has_rows(buffer, 0, divide)


def _has_rows(buffer: Buffer, place: int, divide: Division = _evenly) -> bool:
    large = len(buffer.shape) > 1 and buffer.size > 0
    return buffer.space in ("scratch", "result") and large and divide(buffer.shape[place])[0] > 0


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


class _Rewriter:
    """Kernels rewritten, the axes of rows in two: that of blocks, and last of all that inside a block. Rows that are left beside whole
    blocks have arrays and kernels of their own, which one thread runs. homes: arrays that lie so, and where."""

    def __init__(self, found: _Found, homes: Mapping[Buffer, Buffer], copies: Mapping[Buffer, Buffer], names: Names) -> None:
        self.places, self.axes, self.divide, self.names = found.places, found.axes, found.divide, names
        self.homes, self.copies = homes, copies
        self.lies = {homes[b]: (b.shape, self.places[b]) for b in homes}
        self.lies.update({c: ((b.shape[0], prod(b.shape[1:])), 0) for b, c in copies.items()})
        left = [b for b, (shape, place) in self.lies.items() if self.divide(shape[place])[1]]
        self.rests = {b: Buffer(names("t"), b.shape, b.dtype, row=b.row) for b in left}

    def item(self, item: Item) -> list[Item]:
        if isinstance(item, Loop):
            states = [self.homes.get(b, b) for b in item.states]
            return [replace(item, items=[k for i in item.items for k in self.item(i)], states=states)]
        return [*self._kernels(item)]

    def shape_buffers(self) -> None:
        """The arrays get the shapes that they have now."""
        for b, (shape, place) in self.lies.items():
            size, left = self.divide(shape[place])
            b.lanes, b.shape = size, self._shape(shape, place, False)
            if b in self.rests:
                self.rests[b].lanes, self.rests[b].shape = left, self._shape(shape, place, True)

    def transposed(self, buffer: Buffer) -> Iterator[Kernel]:
        """The copy of an array, seen as rows of numbers."""
        rows, copy, across = buffer.shape[0], self.copies[buffer], Axis(self.names("i"), prod(buffer.shape[1:]))
        for rest in (False, True) if copy in self.rests else (False,):
            (outer, inner), where = self._split(Axis(self.names("i"), rows), rest)
            read = load(buffer, (where, of(across)), (rows, across.extent))
            stores = [Store(self.rests[copy] if rest else copy, (of(outer), of(across), of(inner)), read)]
            yield Kernel(self.names("k"), (outer, across, inner), (), stores, outer, inner=inner)

    def handed_over(self, result: Buffer) -> Iterator[Kernel]:
        """A result row by row, from where it was computed."""
        place, home = self.places[result], self.homes[result]
        before, rows, after = result.shape[:place], result.shape[place], prod(result.shape[place + 1 :])
        first, across = tuple(Axis(self.names("i"), n) for n in before), Axis(self.names("i"), after)
        for rest in (False, True) if home in self.rests else (False,):
            (outer, inner), where = self._split(Axis(self.names("i"), rows), rest)
            shape = self._shape((*before, rows, after), place, rest)
            read = load(self.rests[home] if rest else home, (*map(of, first), of(outer), of(across), of(inner)), shape)
            stores = [Store(result, (*map(of, first), where, of(across)), read, shape=(*before, rows, after))]
            yield Kernel(self.names("k"), (*first, outer, inner, across), (), stores, outer, inner=inner)

    def _split(self, axis: Axis, rest: bool) -> tuple[tuple[Axis, Axis], Affine]:
        """That of blocks and that inside a block, and where they are on the axis. rest: of rows that are left."""
        size, left = self.divide(axis.extent)
        start = axis.extent - left if rest else 0
        outer = Axis(self.names("b"), 1 if rest else axis.extent // size)
        inner = Axis(axis.name, left if rest else size)
        return (outer, inner), of(outer) * size + of(inner) + start

    def _shape(self, shape: Sequence[int], place: int, rest: bool) -> tuple[int, ...]:
        rows = shape[place]
        size, left = self.divide(rows)
        count, inside = (1, left) if rest else (rows // size, size)
        return (*shape[:place], count, *shape[place + 1 :], _pitch(inside))

    def _index(self, index: Sequence[Affine | Value], rows: int, place: int, rest: bool) -> tuple[Affine | Value, ...]:
        """(..., block, ..., row inside); index: in terms of the new axes."""
        row, (size, left) = index[place], self.divide(rows)
        assert isinstance(row, Affine)
        where = (row + (left - rows if rest else 0)).divided(size)
        assert where is not None
        return (*index[:place], where[0], *index[place + 1 :], where[1])

    def _placed(self, a: Access) -> Buffer | None:
        if a.buffer in self.copies and not a.write and max(len(a.view), len(a.buffer.shape)) >= self.axes:
            return self.copies[a.buffer]
        return self.homes.get(a.buffer)

    def _loaded(self, rest: bool, v: Value) -> Value:
        if v.op == "reduce" and not v.attrs["over"]:
            return v.args[0]  # over a single row that is left
        if v.op != "load" or v.buffer is None:
            return v
        buffer = self._placed(Access(v.buffer, v.index, v.shape, None, False))
        if buffer is None:
            return v
        place = self.places[v.buffer]
        index, shape = self._index(v.index, v.shape[place], place, rest), self._shape(v.shape, place, rest)
        return load(self.rests[buffer] if rest else buffer, index, shape)

    def _kernels(self, kernel: Kernel) -> Iterator[Kernel]:
        rows = [a.index[self.places[a.buffer]] for a in accesses(kernel) if self._placed(a) is not None]
        axes = list(dict.fromkeys(x for i in rows for x in i.axes))
        if not any(self.divide(x.extent)[1] for x in axes):
            yield self._kernel(kernel, axes, False) if axes else kernel
        elif axes[0] in kernel.domain:
            yield self._kernel(kernel, axes, False)
            yield replace(self._kernel(kernel, axes, True), name=self.names("k"))
        else:
            yield from self._sums(kernel, axes)

    def _sums(self, kernel: Kernel, axes: Sequence[Axis]) -> Iterator[Kernel]:
        """Sums over all rows: one over those in blocks and one over those that are left, and what is made of both."""
        index = tuple(of(a) for a in kernel.domain)
        sums = [v for v in kernel.values() if v.op == "reduce"]
        loads: dict[Value, list[Value]] = {v: [] for v in sums}
        for rest in (False, True):
            buffers = {v: Buffer(self.names("t"), tuple(a.extent for a in kernel.domain), v.dtype) for v in sums}
            stores = [Store(b, index, v) for v, b in buffers.items()]
            part = replace(kernel, name=self.names("k"), stores=stores, origin=kernel.origin[:1])
            yield self._kernel(part, axes, rest)
            for v, b in buffers.items():
                loads[v].append(load(b, index))
        both = {v: elementwise(_COMBINE[v.attrs["how"]], v.dtype, two) for v, two in loads.items()}
        table = rebuilt(roots(kernel.stores), dict(both))
        made = [replace(s, value=table[s.value], index=reindexed(s.index, table, {})) for s in kernel.stores]
        yield replace(kernel, reduced=(), stores=made)

    def _kernel(self, kernel: Kernel, axes: Sequence[Axis], rest: bool) -> Kernel:
        splits = {x: self._split(x, rest) for x in axes}
        both, where = {x: pair for x, (pair, _) in splits.items()}, {x: i for x, (_, i) in splits.items()}
        table = rebuilt(roots(kernel.stores), {}, where, partial(self._loaded, rest))
        stores = []
        for s in kernel.stores:
            index = reindexed(s.index, table, where)
            if s.buffer in self.homes:
                place, home = self.places[s.buffer], self.homes[s.buffer]
                index, shape = self._index(index, s.view[place], place, rest), self._shape(s.view, place, rest)
                buffer = self.rests[home] if rest else home
                stores.append(replace(s, buffer=buffer, index=index, value=table[s.value], shape=shape))
            else:
                stores.append(replace(s, index=index, value=table[s.value]))
        unit = kernel.unit
        if unit is not None and unit in both:
            unit = both[unit][0]
        reduced = tuple(x for x in _last(kernel.reduced, both) if x.extent != 1)
        inner = both[axes[0]][1]
        return replace(
            kernel, domain=_last(kernel.domain, both), reduced=reduced, stores=stores, unit=None if rest else unit,
            inner=inner if inner.extent > 1 else None,
        )  # fmt: skip


def _last(axes: Sequence[Axis], both: Mapping[Axis, tuple[Axis, Axis]]) -> tuple[Axis, ...]:
    return (*(both[x][0] if x in both else x for x in axes), *(both[x][1] for x in axes if x in both))
