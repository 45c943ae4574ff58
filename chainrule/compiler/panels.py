"""How matrices lie in memory: in panels, each of which holds some columns of all rows.

In: kernels. Out: kernels that index matrices of state and of the step's own as (panel, row, column inside). A panel lies in one piece,
so a thread that has some of the columns shares no memory with its neighbours (a processor fetches lines that follow those it is asked
for, also where they are another's), and what a tile reads lies together. How a matrix is laid out follows from its shape and the target
alone, so all entries of a program agree about their state (layout.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace

from .affine import Affine, Axis, of
from .fuse import Index, Names
from .kernels import Buffer, Item, Kernel, Loop, Store, Value, kernels_of, load, rebuilt, reindexed, roots
from .layout import panel, physical
from .phases import Access, accesses
from .schedule import FEW_PANELS
from .target import Target

Split = Mapping[Axis, tuple[Axis, Axis]]  # an axis -> that of panels, and that inside a panel


def in_panels(items: Sequence[Item], state: set[Buffer], target: Target, names: Names) -> tuple[list[Item], set[Axis]]:
    """The items with such indices, and the axes that count panels. State that is read in a way that does not fit is first copied, row
    by row."""
    splits = {k: _split(k, target, names) for k in kernels_of(items)}
    matrices = dict.fromkeys(a.buffer for k in splits for a in accesses(k) if _is_matrix(a.buffer, target))
    misfits = {
        a.buffer for k, split in splits.items() for a in accesses(k) if a.buffer in matrices and not _in_panel(a, split, target)
    }
    copies = {b: Buffer(names("t"), b.shape, b.dtype) for b in matrices if b in misfits and b in state}
    before = [_copying(b, copy, names) for b, copy in copies.items()]
    splits.update({k: _split(k, target, names) for k in before})
    chosen = {b: physical(b.shape, target) for b in matrices if b not in misfits or b in copies}

    for kernel, split in splits.items():
        needed = {x for a in accesses(kernel) if a.buffer in chosen for i in a.index for x in i.axes}
        splits[kernel] = {x: both for x, both in split.items() if x in needed}
    if not any(isinstance(i, Loop) for i in items):  # whose kernels are shared out along rows
        _follow(splits, chosen.keys(), names)

    def rewritten(item: Item) -> Item:
        if isinstance(item, Loop):
            item.items[:] = [rewritten(i) for i in item.items]
            return item
        return _Panels(chosen, copies, splits[item], target).kernel(item)

    made = [rewritten(i) for i in (*before, *items)]
    for buffer, shape in chosen.items():
        buffer.shape = shape
    return made, {outer for split in splits.values() for outer, _ in split.values()}


def along(kernel: Kernel, split: Split, target: Target) -> Kernel:
    """The kernel with these axes in two, and what it touches as it was."""
    own = {x: both for x, both in split.items() if x in kernel.domain or x in kernel.reduced}
    return _Panels({}, {}, own, target).kernel(kernel)


def _is_matrix(buffer: Buffer, target: Target) -> bool:
    return buffer.space in ("state", "scratch") and len(physical(buffer.shape, target)) != len(buffer.shape)


def _copying(buffer: Buffer, copy: Buffer, names: Names) -> Kernel:
    domain = tuple(Axis(names("i"), n) for n in buffer.shape)
    index = tuple(of(a) for a in domain)
    return Kernel(names("k"), domain, (), [Store(copy, index, load(buffer, index))], domain[0])


def _split(kernel: Kernel, target: Target, names: Names) -> Split:
    """The axes that run along the columns of a matrix."""
    found: dict[Axis, tuple[Axis, Axis]] = {}
    own = {*kernel.domain, *kernel.reduced}
    for a in accesses(kernel):
        if _is_matrix(a.buffer, target) and a.view == a.buffer.shape:
            axis = next((x for x in a.index[1].axes if a.index[1] == of(x)), None)
            if axis in own and axis not in found and axis is not None and axis.extent == a.view[1]:
                size = panel(axis.extent, target)
                found[axis] = Axis(names("p"), axis.extent // size), Axis(axis.name, size)
    return found


def _follow(splits: dict[Kernel, Split], matrices: AbstractSet[Buffer], names: Names) -> None:
    """Kernels that only go on with what a product has made run through it in the same parts, so that threads share both alike."""
    parts: dict[tuple[Buffer, int], int] = {}  # columns of a panel, of a buffer that is written panel by panel along a dimension
    for kernel, split in splits.items():
        for s in kernel.stores:
            parts.update({(s.buffer, d): split[x][1].extent for d, i in enumerate(s.index) for x in split if i == of(x)})
    for kernel, split in splits.items():
        touched = list(accesses(kernel))
        if kernel.reduced or kernel.sequential or any(a.buffer in matrices or a.view != a.buffer.shape for a in touched):
            continue
        found = {x: parts[a.buffer, d] for a in touched for x in kernel.domain for d, i in enumerate(a.index)
                 if i == of(x) and (a.buffer, d) in parts}  # fmt: skip
        splits[kernel] = {**split, **{x: (Axis(names("p"), x.extent // n), Axis(x.name, n)) for x, n in found.items()}}


def _even(panels: Axis, others: Sequence[Axis]) -> Axis:
    """What threads share out of a matrix: its panels; or its rows, where these are more and three panels, say, would leave one thread
    twice as much as the other."""
    longest = max(others, key=lambda a: a.extent, default=panels)
    return longest if panels.extent % 2 and 1 < panels.extent < FEW_PANELS and longest.extent > panels.extent else panels


def _where(split: Split) -> dict[Axis, Affine]:
    return {x: of(outer) * inner.extent + of(inner) for x, (outer, inner) in split.items()}


def _in_panel(a: Access, split: Split, target: Target) -> tuple[Affine, Affine] | None:
    """Panel and column inside, where they are sums of axes, as an index has to be."""
    column = a.index[1] if a.view == a.buffer.shape else None
    return column.replaced(_where(split)).divided(panel(a.view[1], target)) if isinstance(column, Affine) else None


class _Panels:
    """One kernel written anew. chosen: matrices -> their shape in memory; copies: what stands in place of those that do not fit."""

    def __init__(
        self, chosen: Mapping[Buffer, tuple[int, ...]], copies: Mapping[Buffer, Buffer], split: Split, target: Target
    ) -> None:
        self.chosen, self.copies, self.split, self.target = chosen, copies, split, target

    def kernel(self, kernel: Kernel) -> Kernel:
        where = _where(self.split)
        table = rebuilt(roots(kernel.stores), {}, where, self._loaded)
        stores = []
        for s in kernel.stores:
            index = reindexed(s.index, table, where)
            buffer, shape, index = self._place(s.buffer, s.view, index)
            stores.append(replace(s, buffer=buffer, index=index, value=table[s.value], shape=shape))
        parts = self.split
        first = [b for x in kernel.domain[: kernel.sequential] for b in parts.get(x, (x,))]
        rest = kernel.domain[kernel.sequential :]
        domain = [*first, *(parts[x][0] for x in rest if x in parts), *(parts[x][1] if x in parts else x for x in rest)]
        reduced = tuple(b for x in kernel.reduced for b in parts.get(x, (x,)))
        unit = kernel.unit
        if unit in parts and unit is not None:
            unit = _even(parts[unit][0], [x for x in rest if x not in parts])
        sequential = len(first)
        return replace(kernel, domain=tuple(domain), reduced=reduced, stores=stores, unit=unit, sequential=sequential)

    def _loaded(self, v: Value) -> Value:
        if v.op != "load" or v.buffer is None:
            return v
        buffer, shape, index = self._place(v.buffer, v.shape, v.index)
        return v if buffer is v.buffer and shape == v.shape else replace(v, buffer=buffer, shape=shape, index=index)

    def _place(self, buffer: Buffer, shape: tuple[int, ...], index: Index) -> tuple[Buffer, tuple[int, ...], Index]:
        """Where the same element stands; index: in terms of the new axes."""
        if buffer not in self.chosen:
            return buffer, shape, index
        where = _in_panel(Access(buffer, index, shape, None, False), {}, self.target)
        return (
            (self.copies[buffer], shape, index)
            if where is None
            else (buffer, self.chosen[buffer], (where[0], index[0], where[1]))
        )
