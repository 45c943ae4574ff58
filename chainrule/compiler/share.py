"""What threads share out: one axis of each kernel, and sums over such an axis in parts.

In: kernels. Out: kernels with their unit axes. Cut into blocks of rows, a batch goes through all layers without waiting, but each
thread then reads all weights, half of which another has just written, and such memory comes slowly. Cut into the units of a hidden
layer, weights stay with their thread, and what goes around are sums over the units: a kernel that sums over the axis is cut into a fixed
number of partial sums and a kernel that adds these up. Which axes are cut is settled by what it would cost two threads; it may not
depend on how many there are, since the order of sums depends on it.

Axes of different kernels belong together (a *class*) where they index the same dimension of a buffer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from .affine import Affine, Axis, of
from .fuse import Names
from .kernels import Buffer, Item, Kernel, Store, Value, load, rebuilt, reduce
from .layout import panel
from .phases import accesses, levels, local
from .schedule import BARRIER, FOREIGN, MOST_PARTS

NOMINAL = 2  # threads for which the cost is weighed

Class = frozenset[Axis]


def share(items: Sequence[Item], state: set[Buffer], names: Names) -> list[Item]:
    """The items, each with its unit axis, in the cheapest of a few ways; copies of the state are put off to the end of a step."""
    best = [_copy(i) for i in items]
    put_off(best, state)
    if not all(isinstance(i, Kernel) for i in items):
        return best  # the kernels of a loop go on without waiting only if all are cut along the same rows
    kernels = [i for i in items if isinstance(i, Kernel)]
    cost = _cost(best)
    found = _classes(kernels)
    for chosen in [[c] for c in found] + ([found] if len(found) > 1 else []):
        made: list[Item] = [part for k in kernels for part in _cut(k, frozenset().union(*chosen), names)]
        put_off(made, state)
        if (other := _cost(made)) < cost:
            best, cost = made, other
    return best


def _copy(item: Item) -> Item:
    return replace(item) if isinstance(item, Kernel) else item


# ---- classes -----------------------------------------------------------------------------------------------------------------


def _classes(kernels: Sequence[Kernel]) -> list[Class]:
    """The classes that can be cut: long enough, summed over by some kernel and free in another, and never twice in one kernel."""
    leader: dict[object, object] = {}

    def find(x: object) -> object:
        while (above := leader.setdefault(x, x)) is not x:
            x = above
        return x

    for kernel in kernels:
        for place, index in _places(kernel):
            if len(index.terms) == 1 and index.constant == 0 and index.terms[0][1] == 1:
                leader[find(index.terms[0][0])] = find(place)
    classes: dict[object, set[Axis]] = {}
    for axis in dict.fromkeys(a for k in kernels for a in (*k.domain, *k.reduced)):
        classes.setdefault(find(axis), set()).add(axis)
    return [frozenset(c) for c in classes.values() if _can_be_cut(c, kernels)]


def _places(kernel: Kernel) -> Iterator[tuple[object, Affine]]:
    """Each dimension of a buffer that the kernel touches, and the index there."""
    touched = [(v.buffer, v.shape, v.index) for v in kernel.loads()] + [(s.buffer, s.view, s.index) for s in kernel.stores]
    for buffer, shape, index in touched:
        for d, i in enumerate(index):
            if isinstance(i, Affine):
                yield (buffer, shape, d), i


def _can_be_cut(c: set[Axis], kernels: Sequence[Kernel]) -> bool:
    extents = {a.extent for a in c}
    once = all(len(c & {*k.domain, *k.reduced}) <= 1 for k in kernels)
    both = any(c & set(k.domain) and k.reduced for k in kernels) and any(c & set(k.reduced) for k in kernels)
    return once and both and len(extents) == 1 and parts(extents.pop()) > 1


def parts(extent: int) -> int:
    """Into how many parts a sum over an axis is cut: one for each panel."""
    size = panel(extent)
    return extent // size if size and extent // size <= MOST_PARTS else 1


# ---- cutting -----------------------------------------------------------------------------------------------------------------


def _cut(kernel: Kernel, chosen: Class, names: Names) -> list[Kernel]:
    """The kernel with the last of the chosen axes as its unit; if it sums over one, as partial sums and their sum."""
    units = [a for a in kernel.domain[kernel.sequential :] if a in chosen]
    if units and not kernel.sequential:
        return [replace(kernel, unit=units[-1])]
    summed = [a for a in kernel.reduced if a in chosen]
    if summed and not kernel.sequential:
        return _in_parts(kernel, summed[0], names)
    return [replace(kernel)]


def _in_parts(kernel: Kernel, axis: Axis, names: Names) -> list[Kernel]:
    count = parts(axis.extent)
    part, inside = Axis(names("s"), count), Axis(axis.name, axis.extent // count)
    where = {axis: of(part) * inside.extent + of(inside)}
    over = [inside if a is axis else a for a in kernel.reduced]
    index = tuple(of(a) for a in kernel.domain)
    stores: list[Store] = []
    sums: dict[Value, Value] = {}
    added = Axis(names("r"), count)
    moved: dict[Value, Value] = {}
    for v in kernel.values():
        if v.op == "reduce":
            buffer = Buffer(names("t"), (count, *(a.extent for a in kernel.domain)), v.dtype)
            rebuilt(v.args, moved, where)
            stores.append(Store(buffer, (of(part), *index), reduce(v.attrs["how"], moved[v.args[0]], over)))
            sums[v] = reduce(v.attrs["how"], load(buffer, (of(added), *index)), (added,))
    first = Kernel(names("k"), (part, *kernel.domain), tuple(over), stores, part, origin=kernel.origin[:1])
    rest = [replace(s, value=rebuilt([s.value], sums)[s.value]) for s in kernel.stores]
    return [first, Kernel(kernel.name, kernel.domain, (added,), rest, kernel.unit, origin=kernel.origin)]


# ---- what it costs -----------------------------------------------------------------------------------------------------------


def _cost(items: Sequence[Item]) -> float:
    """Seconds that the nominal number of threads lose in a step: in barriers, and for memory that another has written."""
    ends = [i for i in items if isinstance(i, Kernel) and (i.late or any(s.buffer.space == "state" for s in i.stores))]
    order = [*(i for i in items if i not in ends), *ends]
    phases = 1 + max(levels(order, NOMINAL).values(), default=0)
    return BARRIER * phases + FOREIGN * sum(_foreign(order).values())


def _foreign(items: Sequence[Item]) -> dict[Buffer, float]:
    """For each buffer the bytes that a thread reads and another has written."""
    writes = {}
    found: dict[Buffer, float] = {}
    for item in items:
        writes.update({a.buffer: a for a in accesses(item) if a.write})
    for item in items:
        for a in accesses(item):
            if not a.write and a.buffer in writes and not local(a, writes[a.buffer], NOMINAL):
                own = a.unit is not None and a.unit.extent > 1
                part = 1 / NOMINAL if own and any(isinstance(i, Affine) and a.unit in i.axes for i in a.index) else 1.0
                found[a.buffer] = max(found.get(a.buffer, 0.0), a.buffer.bytes * part * (1 - 1 / NOMINAL))
    return found


# ---- copies of the state -------------------------------------------------------------------------------------------------------


def put_off(items: Sequence[Item], state: set[Buffer]) -> None:
    """Copies of the state in another order of memory are made at the end of a step, for the next, where each thread still has what it
    has just written; so no step begins by waiting for them."""
    kernels = [i for i in items if isinstance(i, Kernel)]
    writers: dict[Buffer, int] = {}
    for item in items:
        for a in accesses(item):
            if a.write:
                writers[a.buffer] = writers.get(a.buffer, 0) + 1
    for kernel in kernels:
        loads = list(kernel.loads())
        if not loads or kernel.reduced or kernel.sequential or not kernel.domain:
            continue
        plain = all(v.buffer in state and not any(isinstance(i, Value) for i in v.index) for v in loads)
        if plain and all(s.buffer.space == "scratch" and writers[s.buffer] == 1 for s in kernel.stores):
            kernel.late = True
            kernel.unit = _unit_of_writer(kernels, loads[0]) or kernel.unit


def _unit_of_writer(kernels: Iterable[Kernel], read: Value) -> Axis | None:
    """The axis of the copy that runs along the one whose parts the writer's threads share out."""
    for kernel in kernels:
        for store in kernel.stores:
            if store.buffer is read.buffer and kernel.unit is not None and of(kernel.unit) in store.index:
                place = read.index[store.index.index(of(kernel.unit))]
                return next((a for a in read.axes if place == of(a)), None)
    return None
