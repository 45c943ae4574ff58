"""How matrices lie in memory: in panels, each of which holds some columns of all rows, or some rows of all columns.

In: kernels. Out: kernels that index matrices of state and of the step's own as (panel, row, column inside), or (panel, column, row
inside) where they lie transposed. A panel lies in one piece, so a thread that has some of the columns shares no memory with its
neighbours (a processor fetches lines that follow those it is asked for, also where they are another's), and what a tile reads lies
together. How a matrix is laid out is the same for all entries of a session (layout.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace

from .affine import Affine, Axis, of
from .former import Index
from .fuse import Names
from .kernels import Buffer, Item, Kernel, Loop, Store, Value, kernels_of, load, rebuilt, reindexed, roots
from .layout import Cut, Shape, Storage, shape_in
from .phases import Access, accesses
from .schedule import FEW_PANELS

Split = Mapping[Axis, tuple[Axis, Axis]]  # an axis -> that of panels, and that inside a panel


def in_panels(items: Sequence[Item], state: set[Buffer], storage: Storage, names: Names) -> tuple[list[Item], set[Axis]]:
    """The items with such indices, and the axes that count panels. State that is read in a way that does not fit is first copied, row
    by row; what is written to it in such a way is copied into it at the end."""
    touched = dict.fromkeys(a.buffer for k in kernels_of(items) for a in accesses(k))
    matrices = {b: found for b in touched if (found := storage.cut_of(b)) is not None}
    splits = {k: _split(k, matrices, names) for k in kernels_of(items)}
    misfits = [
        a for k, split in splits.items() for a in accesses(k)
        if a.buffer in matrices and not _in_panel(a, split, matrices[a.buffer])
    ]  # fmt: skip
    read, written = (dict.fromkeys(a.buffer for a in misfits if a.write is write) for write in (False, True))
    copies, later = ({b: Buffer(names("t"), b.shape, b.dtype) for b in found if b in state} for found in (read, written))
    before = [_copying(b, copy, names) for b, copy in copies.items()]
    after = [_copying(copy, b, names) for b, copy in later.items()]
    splits.update({k: _split(k, matrices, names) for k in (*before, *after)})
    chosen = {b: found for b, found in matrices.items() if b in state or not (b in read or b in written)}

    for kernel, split in splits.items():
        needed = {x for a in accesses(kernel) if a.buffer in chosen for i in a.index for x in i.axes}
        splits[kernel] = {x: both for x, both in split.items() if x in needed}
    if not any(isinstance(i, Loop) for i in items):  # whose kernels are shared out along rows
        _follow(splits, chosen.keys(), names)

    def rewritten(item: Item) -> Item:
        if isinstance(item, Loop):
            item.items[:] = [rewritten(i) for i in item.items]
            return item
        return _Panels(chosen, copies, later if item not in after else {}, splits[item]).kernel(item)

    made = [rewritten(i) for i in (*before, *items, *after)]
    for buffer, found in chosen.items():
        buffer.shape = shape_in(buffer.shape, found)
    return made, {outer for split in splits.values() for outer, _ in split.values()}


def along(kernel: Kernel, split: Split) -> Kernel:
    """The kernel with these axes in two, and what it touches as it was."""
    own = {x: both for x, both in split.items() if x in kernel.domain or x in kernel.reduced}
    return _Panels({}, {}, {}, own).kernel(kernel)


def _copying(buffer: Buffer, copy: Buffer, names: Names) -> Kernel:
    domain = tuple(Axis(names("i"), n) for n in buffer.shape)
    index = tuple(of(a) for a in domain)
    return Kernel(names("k"), domain, (), [Store(copy, index, load(buffer, index))], domain[0])


def _split(kernel: Kernel, matrices: Mapping[Buffer, Cut], names: Names) -> Split:
    """The axes along which matrices are cut into panels."""
    found: dict[Axis, tuple[Axis, Axis]] = {}
    own = {*kernel.domain, *kernel.reduced}
    for a in accesses(kernel):
        if a.buffer in matrices and a.view == a.buffer.shape:
            at, size = matrices[a.buffer]
            assert size > 1, "an axis of one place is none"
            axis = next((x for x in a.index[at].axes if a.index[at] == of(x)), None)
            if axis in own and axis not in found and axis is not None and axis.extent == a.view[at] > size:
                found[axis] = Axis(names("p"), axis.extent // size), Axis(axis.name, size)
    return found


def _follow(splits: dict[Kernel, Split], matrices: AbstractSet[Buffer], names: Names) -> None:
    """Kernels that only go on with what a product has made run through it in the same parts, so that threads share both alike."""
    parts: dict[tuple[Buffer, int], int] = {}  # columns of a panel, of a buffer that is written panel by panel along a dimension
    for kernel, split in splits.items():
        for s in kernel.stores:
            for d, x in _whole(s.buffer, s.view, s.index, split):
                parts[s.buffer, d] = split[x][1].extent
    for kernel, split in splits.items():
        touched = list(accesses(kernel))
        if kernel.reduced or kernel.sequential or any(a.buffer in matrices or a.view != a.buffer.shape for a in touched):
            continue
        found = {x: parts[a.buffer, d] for a in touched for d, x in _whole(a.buffer, a.view, a.index, kernel.domain)
                 if (a.buffer, d) in parts}  # fmt: skip
        splits[kernel] = {**split, **{x: (Axis(names("p"), x.extent // n), Axis(x.name, n)) for x, n in found.items()}}


def _whole(buffer: Buffer, view: Shape, index: Index, axes: Iterable[Axis]) -> Iterator[tuple[int, Axis]]:
    """The dimensions of a buffer along which one of these axes runs from end to end. Others go through a part of it, which need be no
    whole panels."""
    for d, (i, n) in enumerate(zip(index, view, strict=True)):
        yield from ((d, x) for x in axes if view == buffer.shape and x.extent == n and i == of(x))


def _even(panels: Axis, others: Sequence[Axis]) -> Axis:
    """What threads share out of a matrix: its panels; or its rows, where these are more and three panels, say, would leave one thread
    twice as much as the other."""
    longest = max(others, key=lambda a: a.extent, default=panels)
    return longest if panels.extent % 2 and 1 < panels.extent < FEW_PANELS and longest.extent > panels.extent else panels


def _where(split: Split) -> dict[Axis, Affine]:
    return {x: of(outer) * inner.extent + of(inner) for x, (outer, inner) in split.items()}


def _in_panel(a: Access, split: Split, found: Cut) -> Index | None:
    """The index in panels; None where panel and place inside would be no sums of axes."""
    if a.view != a.buffer.shape:
        return None
    at, size = found
    place, other = a.index[at], a.index[1 - at]
    both = place.replaced(_where(split)).divided(size) if isinstance(place, Affine) else None
    return (both[0], other, both[1]) if both is not None else None


class _Panels:
    """One kernel written anew. chosen: matrices -> their panels; copies: what is read in place of those that do not fit; later: what is
    written in place of such."""

    def __init__(
        self, chosen: Mapping[Buffer, Cut], copies: Mapping[Buffer, Buffer], later: Mapping[Buffer, Buffer], split: Split
    ) -> None:
        self.chosen, self.copies, self.later, self.split = chosen, copies, later, split

    def kernel(self, kernel: Kernel) -> Kernel:
        where = _where(self.split)
        table = rebuilt(roots(kernel.stores), {}, where, self._loaded)
        stores = []
        for s in kernel.stores:
            index = reindexed(s.index, table, where)
            buffer, shape, index = self._place(self.later.get(s.buffer, s.buffer), s.view, index)
            stores.append(replace(s, buffer=buffer, index=index, value=table[s.value], shape=shape))
        parts = self.split
        first = [b for x in kernel.domain[: kernel.sequential] for b in parts.get(x, (x,))]
        rest = kernel.domain[kernel.sequential :]
        inside = [parts[x][1] if x in parts else x for x in rest]
        domain = [*first, *(parts[x][0] for x in rest if x in parts), *self._as_they_lie(inside, stores)]
        reduced = tuple(b for x in kernel.reduced for b in parts.get(x, (x,)))
        unit = kernel.unit
        if unit in parts and unit is not None:
            unit = _even(parts[unit][0], [x for x in rest if x not in parts])
        sequential = len(first)
        return replace(kernel, domain=tuple(domain), reduced=reduced, stores=stores, unit=unit, sequential=sequential)

    def _as_they_lie(self, axes: Sequence[Axis], stores: Sequence[Store]) -> list[Axis]:
        """Axes in the order in which memory is written: rows of transposed panels come last."""
        transposed = (s.index[-1] for s in stores if s.buffer in self.chosen and self.chosen[s.buffer][0] == 0)
        rows = next((i.axes for i in transposed if isinstance(i, Affine)), frozenset())
        return sorted(axes, key=lambda a: a in rows)

    def _loaded(self, v: Value) -> Value:
        if v.op != "load" or v.buffer is None:
            return v
        buffer, shape, index = self._place(v.buffer, v.shape, v.index)
        return v if buffer is v.buffer and shape == v.shape else replace(v, buffer=buffer, shape=shape, index=index)

    def _place(self, buffer: Buffer, shape: tuple[int, ...], index: Index) -> tuple[Buffer, tuple[int, ...], Index]:
        """Where the same element stands; index: in terms of the new axes."""
        if buffer not in self.chosen:
            return buffer, shape, index
        found = self.chosen[buffer]
        where = _in_panel(Access(buffer, index, shape, None, False), {}, found)
        return (self.copies[buffer], shape, index) if where is None else (buffer, shape_in(buffer.shape, found), where)
