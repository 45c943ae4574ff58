"""What threads share out: one axis of each kernel, and sums over such an axis in parts.

In: kernels. Out: kernels with their unit axes. Cut into blocks of rows, a batch goes through all layers without waiting, but each
thread then reads all weights, half of which another has just written, and such memory comes slowly. Cut into the units of a hidden
layer (panels of its matrix, or halves of the only one), or along the rows of a matrix with many more inputs than a batch has rows,
weights stay with their thread, and what goes around are sums over the axis: a kernel that sums over it is cut into a fixed number of
partial sums and a kernel that adds these up. Which axes are cut is settled by what a step would cost all processors of the machine; it
may not depend on how many threads there are, since the order of sums depends on it. At last kernels with sums may get another axis of
their domain, with which threads read less of each other: that changes no sum, and takes too long to be tried with each way.

Axes of different kernels belong together (a *class*) where they index the same dimension of a buffer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from math import inf, prod

from .affine import Affine, Axis, of
from .fuse import Names
from .kernels import Buffer, Item, Kernel, Store, Value, kernels_of, load, rebuilt, reduce
from .panels import along
from .phases import Access, accesses, disjoint, local, meetings
from .schedule import BARRIER, FOREIGN, LINE, MOST_ALONE, MOST_PARTS, OPERATIONS, PARTS_OF_COLUMNS, PARTS_OF_ROWS, stride, units
from .target import Target

Class = frozenset[Axis]


def share(items: Sequence[Item], panels: set[Axis], state: set[Buffer], target: Target, names: Names) -> list[Item]:
    """The items, each with its unit axis, in the cheapest of a few ways; copies of the state are put off to the end of a step.

    panels: the axes that count panels of matrices, which are what can be cut beside rows.
    """
    kernels = [i for i in items if isinstance(i, Kernel)]
    if len(kernels) < len(items):  # the kernels of a loop go on without waiting only if all are cut along the same rows
        same: list[Item] = [replace(i) if isinstance(i, Kernel) else i for i in items]
        put_off(same, state)
        return same
    best: list[Kernel] = []
    cost, best_class = inf, Class()

    def attempt(kernels: Sequence[Kernel], chosen: Class) -> None:
        nonlocal best, cost, best_class
        made = [part for k in kernels for part in _cut(k, chosen, names)]
        put_off(made, state)
        if (other := _cost(made, target)) < cost:
            best, cost, best_class = made, other, chosen

    attempt(kernels, Class())
    found = _classes(kernels, panels)
    alone = found if len(found) <= MOST_ALONE else []  # each way takes time to make
    for chosen in alone + ([frozenset().union(*found)] if len(found) > 1 else []):
        attempt(kernels, chosen)
    for axes, parts in (*((c, PARTS_OF_ROWS) for c in _tall(kernels, state)), (_narrow(kernels, state), PARTS_OF_COLUMNS)):
        split = {x: (Axis(names("p"), parts), Axis(x.name, x.extent // parts)) for x in axes}
        if split:
            attempt([along(k, split) for k in kernels], best_class | {outer for outer, _ in split.values()})
    best = _nearer(best, target.cores)
    put_off(best, state)
    return [*best]


# ---- classes -----------------------------------------------------------------------------------------------------------------


def _classes(kernels: Sequence[Kernel], panels: set[Axis]) -> list[Class]:
    """The classes of panels that can be cut: not into too many parts."""
    return [c for c in _groups(kernels, panels) if _can_be_cut(c, kernels) and max(a.extent for a in c) <= MOST_PARTS]


def _tall(kernels: Sequence[Kernel], state: set[Buffer]) -> Iterator[Class]:
    """The class of the rows of each matrix that is so tall that partial sums over them are less than the matrix. Only where no product
    has them as columns, whose lanes would be cut."""
    tall = {x for k in kernels for x in _summed_rows(k, state) if x.extent % PARTS_OF_ROWS == 0}
    if not tall:
        return
    for c in _groups(kernels, {a for k in kernels for a in (*k.domain, *k.reduced)}):
        columns = (s.index[-1] for k in kernels if k.reduced for s in k.stores if s.index)
        whole = not any(isinstance(i, Affine) and c & i.axes for i in columns)
        if whole and c & tall and len({a.extent for a in c}) == 1 and _can_be_cut(c, kernels):
            yield c


def _narrow(kernels: Sequence[Kernel], state: set[Buffer]) -> Class:
    """The columns of matrices in one panel, if they are whole lines of memory in parts too."""

    def can_be_parted(s: Store, x: Axis) -> bool:
        whole = x.extent * s.buffer.dtype.itemsize % (PARTS_OF_COLUMNS * LINE) == 0
        return whole and s.buffer in state and len(s.view) == 2 and s.index[-1] == of(x)

    found = {x for k in kernels for s in k.stores for x in k.domain if can_be_parted(s, x)}
    groups = _groups(kernels, {a for k in kernels for a in (*k.domain, *k.reduced)}) if found else []
    return Class().union(*(c for c in groups if c & found and len({a.extent for a in c}) == 1 and _can_be_cut(c, kernels)))


def _summed_rows(kernel: Kernel, state: set[Buffer]) -> Iterator[Axis]:
    """The rows of matrices over which it sums, if there are far less sums than numbers in the matrix."""
    sums = prod(a.extent for a in kernel.domain)
    for a in accesses(kernel) if kernel.reduced else ():
        if a.buffer in state and len(a.view) == 2 and sums * PARTS_OF_ROWS < prod(a.view):
            yield from (x for x in kernel.reduced if a.index[0] == of(x))


def _groups(kernels: Sequence[Kernel], among: set[Axis]) -> list[Class]:
    """The classes of these axes."""
    leader: dict[object, object] = {}

    def find(x: object) -> object:
        while (above := leader.setdefault(x, x)) is not x:
            leader[x] = x = leader[above]  # half the way next time, or chains of kernels would be gone through again and again
        return x

    for kernel in kernels:
        for place, index in _places(kernel):
            axis = next(iter(index.axes), None)
            if axis is not None and index == of(axis):
                leader[find(axis)] = find(place)
    classes: dict[object, set[Axis]] = {}
    for axis in dict.fromkeys(a for k in kernels for a in (*k.domain, *k.reduced) if a in among):
        classes.setdefault(find(axis), set()).add(axis)
    return [frozenset(c) for c in classes.values()]


def _places(kernel: Kernel) -> Iterator[tuple[object, Affine]]:
    """Each dimension of a buffer that the kernel touches, and the index there."""
    for a in accesses(kernel):
        for d, i in enumerate(a.index):
            if isinstance(i, Affine):
                yield (a.buffer, a.view, d), i


def _can_be_cut(c: Class, kernels: Sequence[Kernel]) -> bool:
    """Whether the axes are free in some kernel and summed over in another, and never twice in one."""
    once = all(len(c & {*k.domain, *k.reduced}) <= 1 for k in kernels)
    both = any(c & set(k.domain) and k.reduced for k in kernels) and any(c & set(k.reduced) for k in kernels)
    return once and both


# ---- cutting -----------------------------------------------------------------------------------------------------------------


def _cut(kernel: Kernel, chosen: Class, names: Names) -> list[Kernel]:
    """The kernel with one of the chosen axes as its unit; if it sums over one, as partial sums and their sum."""
    if kernel.sequential:
        return [replace(kernel)]
    units = [a for a in kernel.domain if a in chosen]
    if units:
        return [replace(kernel, unit=units[-1])]
    summed = [a for a in kernel.reduced if a in chosen]
    return in_parts(kernel, summed[0], names) if summed else [replace(kernel)]


def in_parts(kernel: Kernel, axis: Axis, names: Names) -> list[Kernel]:
    """A sum for each value of the axis, and a kernel that adds these up."""
    over = tuple(a for a in kernel.reduced if a is not axis)
    index = tuple(of(a) for a in kernel.domain)
    added = Axis(names("r"), axis.extent)
    stores: list[Store] = []
    sums: dict[Value, Value] = {}
    for v in kernel.values():
        if v.op == "reduce":
            buffer = Buffer(names("t"), (axis.extent, *(a.extent for a in kernel.domain)), v.dtype)
            stores.append(Store(buffer, (of(axis), *index), _over(v, over)))
            sums[v] = reduce(v.attrs["how"], load(buffer, (of(added), *index)), (added,))
    first = Kernel(names("k"), (axis, *kernel.domain), over, stores, axis, inner=kernel.inner, origin=kernel.origin[:1])
    table = rebuilt([s.value for s in kernel.stores], sums)
    rest = [replace(s, value=table[s.value]) for s in kernel.stores]
    return [first, Kernel(kernel.name, kernel.domain, (added,), rest, kernel.unit, origin=kernel.origin)]


def _over(v: Value, axes: tuple[Axis, ...]) -> Value:
    """The reduction over fewer axes."""
    return reduce(v.attrs["how"], v.args[0], axes, v.attrs.get("within", ())) if axes else v.args[0]


# ---- another axis ------------------------------------------------------------------------------------------------------------

Seen = list[tuple[Access, bool]]  # what a kernel shares with others, and whether unit for unit both touch the same part


def _nearer(kernels: Sequence[Kernel], cores: int) -> list[Kernel]:
    """The kernels; those with sums are shared out along the axis with which threads read least of what others have written, if what went
    on without waiting still does. Late copies do not count: they follow what writes their state (`put_off`)."""
    made = list(kernels)
    written = {s.buffer for k in made for s in k.stores}
    touched: dict[Buffer, dict[int, list[Access]]] = {b: {} for b in written}

    def note(n: int) -> None:
        for a in accesses(made[n]):
            if a.buffer in written:
                touched[a.buffer].setdefault(n, []).append(a)

    def seen(n: int, way: Kernel) -> Seen:
        return [
            (a, local(a, b, cores)) for a in accesses(way) if a.buffer in written
            for m, theirs in touched[a.buffer].items() if m != n for b in theirs if (a.write or b.write) and not disjoint(a, b)
        ]  # fmt: skip

    for n in (n for n, k in enumerate(made) if not k.late):
        note(n)
    for n, k in enumerate(kernels):
        others = [a for a in k.domain if _can_be_unit(k, a, cores)] if k.reduced and not k.sequential else []
        now = seen(n, k) if others else []
        least = _read_far(now, cores)
        for axis in others if least else ():
            way = replace(k, unit=axis)
            then = seen(n, way)
            far = _read_far(then, cores)
            if far < least and all(b or not a for (_, a), (_, b) in zip(now, then, strict=True)):
                made[n], least = way, far
        if made[n] is not k:
            for accessed in touched.values():
                accessed.pop(n, None)
            note(n)
    return made


def _can_be_unit(kernel: Kernel, axis: Axis, cores: int) -> bool:
    """Whether the largest share is no larger with this axis of the domain as the unit, and no two threads write to one line of memory."""
    if kernel.unit is None or axis is kernel.unit:
        return False
    (_, then), (_, now) = (units(a.extent, cores) for a in (axis, kernel.unit))
    if then * kernel.unit.extent > now * axis.extent:
        return False
    for s in kernel.stores:
        strides = {a: n for a in kernel.domain if (n := stride(s, a)) is not None}
        if len(strides) < len(kernel.domain):
            return False
        edges = [strides[axis] * then, *(n for n in strides.values() if n > strides[axis])]
        if any(n * s.buffer.dtype.itemsize % LINE for n in edges):
            return False
    return True


def _read_far(seen: Seen, cores: int) -> float:
    """Bytes that a thread reads and another has written."""
    return sum(_largest(((a.buffer, _far(a, cores)) for a, near in seen if not near and not a.write)).values())


def _largest(found: Iterable[tuple[Buffer, float]]) -> dict[Buffer, float]:
    """The largest number of each buffer: what is read twice comes once."""
    most: dict[Buffer, float] = {}
    for buffer, number in found:
        most[buffer] = max(most.get(buffer, 0.0), number)
    return most


def _far(a: Access, cores: int) -> float:
    """Bytes that a thread reads there of what others have written; of a part of the buffer if the unit counts in the index."""
    cut = a.unit is not None and any(isinstance(i, Affine) and a.unit in i.axes for i in a.index)
    return a.buffer.bytes * (1 / cores if cut else 1.0) * (1 - 1 / cores)


# ---- what it costs -----------------------------------------------------------------------------------------------------------


def _cost(items: Sequence[Item], target: Target) -> float:
    """About how many seconds a step takes the threads of a usual machine (`Target.cores`): arithmetic by the thread that has most of it,
    barriers, and memory that another thread has written."""
    ends = [i for i in items if isinstance(i, Kernel) and (i.late or any(s.buffer.space == "state" for s in i.stores))]
    order = [*(i for i in items if i not in ends), *ends]
    threads = target.cores
    foreign = sum(_foreign(order, threads).values())
    return sum(_busy(k, threads) for k in kernels_of(order)) + BARRIER * meetings(order, threads) + FOREIGN * foreign


def _busy(kernel: Kernel, threads: int) -> float:
    """Seconds of the thread that has the largest part."""
    operations = sum(prod(a.extent for a in (v.args[0] if v.op == "reduce" else v).axes) for v in kernel.values())
    count, length = units(kernel.unit.extent, threads) if kernel.unit is not None else (1, 1)
    share = length / kernel.unit.extent if kernel.unit is not None and count > 1 else 1.0
    return operations * share / OPERATIONS


def _foreign(items: Sequence[Item], threads: int) -> dict[Buffer, float]:
    """For each buffer the bytes that a thread reads and another has written."""
    every = [a for item in items for a in accesses(item)]
    writes: dict[Buffer, list[Access]] = {}
    for a in every:
        if a.write:
            writes.setdefault(a.buffer, []).append(a)
    read = (a for a in every if not a.write and a.buffer in writes)
    return _largest(
        (a.buffer, _far(a, threads)) for a in read if not all(local(a, b, threads) or disjoint(a, b) for b in writes[a.buffer])
    )


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
