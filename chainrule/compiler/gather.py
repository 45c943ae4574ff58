"""Sums that a loop gathers over its steps, taken out of the steps: many terms at a time.

In: items. Out: items in which a loop over T steps that adds to such sums has become a loop over chunks of steps. In each chunk the steps
run first, and leave what the sums are made of; then it is added, over all steps of the chunk and all rows at once, by kernels that
threads share out by the elements of the sums. So the backward pass of a recurrent network goes through many steps with its rows in
the nearest cache, and the gradients of weights are large matrix products.

    sum += Σ over a chunk's steps (Σ over rows (term)),        chunks in the order of the loop, steps and rows ascending inside

Where the sums are not large, half of the rows go to one sum and half to another, and these two are added at the end: what a sum is
made of then lies with the thread that has these rows, and two threads go through all of the loop without waiting for each other.

Chunks are aligned at the step with which the loop ends (a backward loop: where the forward loop began) and of one length, which follows
from the number of rows alone. So the order of a sum depends neither on threads, nor on which states were kept and which computed again
(replay.py). Where the steps are no whole number of chunks, the one that the loop begins with is shorter. It is a turn like all others,
whose loops leave out the steps that do not exist: so there is one piece of code for all chunks. Only where a sum is over steps alone (a
batch of one row, say) does the shorter chunk have code of its own: the innermost loop of a sum, of which chains and lanes are made,
always goes through all of its axis.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import ceil, prod

from .affine import Affine, Axis, of
from .fuse import Names
from .kernels import (
    Buffer,
    Item,
    Kernel,
    Loop,
    Store,
    Value,
    constant,
    elementwise,
    kernels_of,
    load,
    rebuilt,
    reduce,
    reindexed,
    roots,
)
from .schedule import CHUNK, LEAST_PART, MOST_HALVED, PARTS, together, units


def gathered(items: Sequence[Item], names: Names, threads: int = 2, length: int = 0) -> list[Item]:
    """The items with such loops cut into chunks. Only loops that stand in no other are looked at. length: steps of a chunk, where a loop
    is part of a longer one; 0: as many as suit its own length."""
    made: list[Item] = []
    for item in items:
        sums = sums_of(item, items) if isinstance(item, Loop) and not item.meets else []
        made += _Chunks(item, sums, names, threads, length).items() if sums and isinstance(item, Loop) else [item]
    return made


def chunk(loop: Loop) -> tuple[int, int]:
    """The steps of a chunk (1 if the loop gathers no sums), and the bytes that are kept until its end."""
    sums = sums_of(loop, [loop])
    if not sums:
        return 1, 0
    made = _Chunks(loop, sums, Names(), 1)
    return made.length, sum(b.bytes for b in made.kept.values())


# ---- which kernels are such sums ---------------------------------------------------------------------------------------------


def sums_of(loop: Loop, items: Sequence[Item]) -> list[Kernel]:
    """The kernels of a loop that only add to what nothing else in it reads, from what is known at the end of a step."""
    if not loop.gathers:
        return []
    found = [k for k in loop.items if isinstance(k, Kernel) and _adds(k, loop.states)]
    while True:
        rest = [i for i in loop.items if i not in found]
        touched = {b for k in kernels_of(rest) for b in _buffers(k)}
        left = [k for k in found if all(s.buffer not in touched for s in k.stores) and _can_wait(k, rest, loop, items)]
        if left == found:
            return found
        found = left


def _adds(kernel: Kernel, states: Sequence[Buffer]) -> bool:
    """state[i] = state[i] + a term, or a sum of terms."""
    if kernel.sequential or len({s.buffer for s in kernel.stores}) < len(kernel.stores):
        return False
    return all(s.buffer in states and _term(s) is not None for s in kernel.stores) and all(
        v.buffer not in {s.buffer for s in kernel.stores} or any(v is _old(s) for s in kernel.stores) for v in kernel.loads()
    )


def _old(store: Store) -> Value | None:
    """The state that a store adds to."""
    if store.mode != "set" or store.value.op != "add":
        return None
    for v in store.value.args:
        if v.op == "load" and v.buffer is store.buffer and v.index == store.index and v.shape == store.view:
            return v
    return None


def _term(store: Store) -> Value | None:
    """What a store adds: a sum, or something that holds none."""
    old = _old(store)
    if old is None:
        return None
    term = store.value.args[1] if store.value.args[0] is old else store.value.args[0]
    if term.op == "reduce":
        return term if term.attrs["how"] == "sum" else None
    return None if _holds_a_sum(term) else term


def _holds_a_sum(v: Value) -> bool:
    return v.op == "reduce" or any(_holds_a_sum(a) for a in (*v.args, *(i for i in v.index if isinstance(i, Value))))


def _can_wait(kernel: Kernel, rest: Sequence[Item], loop: Loop, items: Sequence[Item]) -> bool:
    """Whether all that it reads is still there at the end of a chunk, or can be kept until then: not what goes from step to step, nor
    what is not written anew in each step."""
    written = {s.buffer for k in kernels_of(rest) for s in k.stores}
    for v in kernel.loads():
        if v.buffer in written and v.buffer not in {s.buffer for s in kernel.stores}:
            by_time = any(loop.axis in i.axes for i in v.index)
            if not by_time and (v.buffer in loop.states or not _is_own(v.buffer, loop, items)):
                return False
    return True


def _is_own(buffer: Buffer | None, loop: Loop, items: Sequence[Item]) -> bool:
    """Whether only kernels that stand in the loop itself touch it."""
    others = [*(i for i in items if i is not loop), *(i for i in loop.items if isinstance(i, Loop))]
    return not any(buffer in _buffers(k) for k in kernels_of(others))


def _buffers(kernel: Kernel) -> Iterable[Buffer | None]:
    return [*(v.buffer for v in kernel.loads()), *(s.buffer for s in kernel.stores)]


# ---- where rows are ----------------------------------------------------------------------------------------------------------


def rows_written(kernels: Iterable[Kernel], rows: int) -> dict[Buffer, int] | None:
    """For each buffer that these kernels write the dimension along which rows lie, if each kernel does the same for each of so many
    rows."""
    places: dict[Buffer, int] = {}
    for kernel in kernels:
        unit = kernel.unit
        if unit is None or unit.extent != rows or kernel.sequential:
            return None
        for s in kernel.stores:
            along = [d for d, i in enumerate(s.index) if isinstance(i, Value) or unit in i.axes]
            if len(along) != 1 or s.index[along[0]] != of(unit) or s.view != s.buffer.shape or s.mode != "set":
                return None
            if places.setdefault(s.buffer, along[0]) != along[0]:
                return None
    return places


def rows_summed(kernel: Kernel, places: Mapping[Buffer, int]) -> Axis | None:
    """The reduced axis along which a kernel sums over the rows of such buffers."""
    found = {
        i.axes
        for v in kernel.loads()
        if v.buffer is not None
        and v.buffer in places
        and v.shape == v.buffer.shape
        and isinstance(i := v.index[places[v.buffer]], Affine)
    }
    axes = next(iter(found)) if len(found) == 1 else frozenset[Axis]()
    axis = next(iter(axes)) if len(axes) == 1 else None
    return axis if axis in kernel.reduced else None


# ---- halves of the rows ------------------------------------------------------------------------------------------------------


def parted(items: Sequence[Item], names: Names) -> list[Item]:
    """The items with sums of loops in a sum for each half of the rows."""
    made: list[Item] = []
    for item in items:
        sums = sums_of(item, items) if isinstance(item, Loop) and not item.meets else []
        places = _halved(item, sums) if sums and isinstance(item, Loop) else None
        if places is None or not isinstance(item, Loop):
            made.append(item)
            continue
        before, after = list[Item](), list[Item]()
        for at, kernel in enumerate(item.items):
            if isinstance(kernel, Kernel) and kernel in sums:
                item.items[at] = _in_halves(kernel, places, item, before, after, names)
        made += [*before, item, *after]
    return made


def _halved(loop: Loop, sums: Sequence[Kernel]) -> dict[Buffer, int] | None:
    """Where rows are in what the loop writes, if halves of them are worth sums of their own."""
    written = [s.buffer for k in sums for s in k.stores]
    if len({*written}) < len(written):  # several kernels make one state, each a part
        return None
    rest = [i for i in loop.items if i not in sums]
    units_of = {k.unit for k in rest if isinstance(k, Kernel) and k.unit is not None}
    rows = max((u.extent for u in units_of), default=0)
    half, odd = divmod(rows, PARTS)
    inner = max((k.inner.extent for k in sums if k.inner is not None), default=1)
    if (
        odd
        or half * inner < LEAST_PART
        or (loop.ends is not None and half % together(rows))
        or units(rows, PARTS) != (PARTS, half)
    ):
        return None
    if sum(b.bytes for b in written) > MOST_HALVED or not all(isinstance(i, Kernel) for i in rest):
        return None
    places = rows_written([k for k in rest if isinstance(k, Kernel)], rows)
    return places if places is not None and all(rows_summed(k, places) is not None for k in sums) else None


def _in_halves(
    kernel: Kernel, places: Mapping[Buffer, int], loop: Loop, before: list[Item], after: list[Item], names: Names
) -> Kernel:
    """The kernel that adds to sums of halves; what sets these to zero goes to `before`, what adds them up to `after`."""
    rows = rows_summed(kernel, places)
    assert rows is not None
    part, row = Axis(names("h"), PARTS), Axis(names("r"), rows.extent // PARTS)
    where = {rows: of(part) * row.extent + of(row)}
    reduced = tuple(row if a is rows else a for a in kernel.reduced)
    stores, zeros = list[Store](), list[Store]()
    for s in kernel.stores:
        halves = Buffer(names("t"), (PARTS, *s.buffer.shape), s.buffer.dtype)
        loop.states[loop.states.index(s.buffer)] = halves
        index = (of(part), *s.index)
        term = _term(s)
        assert term is not None
        term = rebuilt([term], {}, where)[term]
        if term.op == "reduce":  # each half has a sum of its own
            term = reduce("sum", term.args[0], reduced, term.attrs.get("within", ()))
        stores.append(Store(halves, index, elementwise("add", term.dtype, [load(halves, index), term])))
        zeros.append(Store(halves, index, constant(0, term.dtype)))
        after.append(_both(kernel, s, halves, names))
    domain = (part, *kernel.domain)
    before.append(Kernel(names("k"), domain, (), zeros, part, origin=kernel.origin))
    return replace(kernel, domain=domain, reduced=reduced, stores=stores, unit=part, rows=row, part=part)


def _both(kernel: Kernel, store: Store, halves: Buffer, names: Names) -> Kernel:
    """sum = sum + (one half + the other)"""
    domain = tuple(Axis(names("i"), a.extent) for a in kernel.domain)
    where = {a: of(b) for a, b in zip(kernel.domain, domain, strict=True)}
    index = tuple(i.replaced(where) for i in store.index if isinstance(i, Affine))
    dtype = store.buffer.dtype
    total = load(halves, (Affine(), *index))
    for part in range(1, PARTS):
        total = elementwise("add", dtype, [total, load(halves, (Affine(part), *index))])
    value = elementwise("add", dtype, [load(store.buffer, index), total])
    unit = next((b for a, b in zip(kernel.domain, domain, strict=True) if a is kernel.unit), None)
    return Kernel(names("k"), domain, (), [Store(store.buffer, index, value)], unit, origin=kernel.origin)


# ---- chunks ------------------------------------------------------------------------------------------------------------------


def steps_of_a_chunk(length: int, rows: int) -> int:
    """How many steps of so many rows a chunk has.

    >>> [steps_of_a_chunk(1000, rows) for rows in (4, 32, 1000)], steps_of_a_chunk(10, 1)
    ([128, 16, 1], 10)
    """
    return min(length, ceil(CHUNK / max(rows, 1)))


class _Chunks:
    """One loop cut into chunks."""

    def __init__(self, loop: Loop, sums: Sequence[Kernel], names: Names, threads: int, length: int = 0) -> None:
        self.loop, self.sums, self.names = loop, sums, names
        self.rest = [i for i in loop.items if i not in sums]
        self.length = length or steps_of_a_chunk(loop.axis.extent, max(_terms(k) for k in sums))
        self.limited = all(k.reduced for k in sums)
        self.alone = all(k.part is not None for k in sums) and threads <= PARTS
        written = {s.buffer for k in kernels_of(self.rest) for s in k.stores}
        own = {s.buffer for k in sums for s in k.stores}
        read = dict.fromkeys(v for k in sums for v in k.loads() if v.buffer in written and v.buffer not in own)
        kept = dict.fromkeys(v.buffer for v in read if not any(loop.axis in i.axes for i in v.index))
        self.kept = {b: Buffer(names("t"), (self.length, *b.shape), b.dtype) for b in kept if b is not None}

    def items(self) -> list[Item]:
        """All chunks; apart from the others, where it has to be, the shorter one that the loop begins with."""
        whole, rest = divmod(self.loop.axis.extent, self.length)
        if self.limited:
            return self._turns(ceil(self.loop.axis.extent / self.length), rest - self.length if rest else 0)
        first = self._chunk(Affine(whole * self.length if self.loop.reverse else 0), rest) if rest else []
        return [*first, *self._turns(whole, rest)]

    def _turns(self, count: int, start: int) -> list[Item]:
        """A loop over so many chunks, or the only one. start: where the first one begins, if they are not aligned at step 0."""
        time, reverse = self.loop.axis, self.loop.reverse
        turn = Axis(time.name + "c", count)
        first = of(turn) * self.length + (0 if reverse else start)
        made = self._chunk(first, self.length) if count else []
        return made if count <= 1 else [Loop(self.names("loop"), turn, reverse, made, [], not self.alone)]

    def _chunk(self, first: Affine, length: int) -> list[Item]:
        """So many steps from `first`; of those only the ones that exist."""
        step = Axis(self.loop.axis.name + "s", length)
        exist = first.smallest >= 0 and first.largest + length <= self.loop.axis.extent
        between = None if exist else (first * -1, first * -1 + self.loop.axis.extent)
        where = {self.loop.axis: first + of(step)}
        states = [b for b in self.loop.states if not any(b is s.buffer for k in self.sums for s in k.stores)]
        ends = self.loop.ends.moved(where) if self.loop.ends is not None else None
        inside = [self._moved(i, where, of(step)) for i in self.rest]
        steps = Loop(self.names("loop"), step, self.loop.reverse, inside, states, ends=ends, between=between)
        return [steps, *(part for k in self.sums for part in self._sum(k, first, steps))]

    def _moved(self, item: Item, where: Mapping[Axis, Affine], step: Affine) -> Item:
        """An item of the loop at other times; what the sums read is kept for each step of the chunk."""
        if isinstance(item, Loop):
            inside = [self._moved(i, where, step) for i in item.items]
            return Loop(self.names("loop"), item.axis, item.reverse, inside, item.states)
        return replace(item, name=self.names("k"), stores=self._stores(item, where, step))

    def _stores(self, kernel: Kernel, where: Mapping[Axis, Affine], step: Affine) -> list[Store]:
        table = rebuilt(roots(kernel.stores), {}, where, lambda v: self._loaded(v, step))
        stores = []
        for s in kernel.stores:
            index = reindexed(s.index, table, where)
            kept = self.kept.get(s.buffer)
            shape = (self.length, *s.view) if kept is not None else s.shape
            stores.append(
                replace(
                    s, buffer=kept or s.buffer, index=index if kept is None else (step, *index), value=table[s.value], shape=shape
                )
            )
        return stores

    def _loaded(self, v: Value, step: Affine) -> Value:
        kept = self.kept.get(v.buffer) if v.op == "load" and v.buffer is not None else None
        return v if kept is None else load(kept, (step, *v.index), (self.length, *v.shape))

    def _sum(self, kernel: Kernel, first: Affine, steps: Loop) -> list[Kernel]:
        """All steps of a chunk added at once; where rows end, for those that end together at a time, up to their last step."""
        length, limits = steps.axis.extent, steps.limits()
        step = Axis(self.names("r"), length)
        ends = self.loop.ends
        if ends is None or kernel.rows is None:
            reduced = (*((step,) if length > 1 else ()), *kernel.reduced)
            # Also where all steps exist: how a sum runs, and so its order, shall be the same in every part of a loop.
            between = {step: limits} if length > 1 and self.limited else {}
            return [self._added(kernel, {self.loop.axis: first + of(step)}, of(step), reduced, between)]
        made = []
        whole = of(kernel.part) * kernel.rows.extent if kernel.part is not None else Affine()  # the row at which the part begins
        size = together(kernel.rows.extent * (kernel.part.extent if kernel.part is not None else 1))
        groups, rest = divmod(kernel.rows.extent, size)
        for start, count, own in ((0, groups, size), (groups * size, 1, rest)):
            if not count or not own:
                continue
            step, group, row = Axis(self.names("r"), length), Axis(self.names("r"), count), Axis(self.names("r"), own)
            begin = of(group) * own + start if count > 1 else Affine(start)
            where = {self.loop.axis: first + of(step), kernel.rows: begin + of(row)}
            inner = tuple(row if a is kernel.rows else a for a in kernel.reduced)
            between = {step: (limits[0], ends.moved(where).turns(whole + begin, step, limits[1]))}
            outer = (group, step) if count > 1 else (step,)
            made.append(self._added(kernel, where, of(step), (*outer, *inner), between))
        return made

    def _added(
        self, kernel: Kernel, where: Mapping[Axis, Affine], step: Affine, reduced: tuple[Axis, ...],
        between: dict[Axis, tuple[Value, Value]],
    ) -> Kernel:  # fmt: skip
        stores = []
        for s in self._stores(kernel, where, step):
            old, term = _old(s), _term(s)
            assert old is not None
            assert term is not None
            inner = term.args[0] if term.op == "reduce" else term
            total = reduce("sum", inner, reduced, term.attrs.get("within", ())) if reduced else inner
            stores.append(replace(s, value=elementwise("add", term.dtype, [old, total])))
        unit = kernel.unit if self.alone or kernel.part is None else _longest(kernel)
        return replace(kernel, name=self.names("k"), stores=stores, unit=unit, reduced=reduced, between=between, rows=None)


def _terms(kernel: Kernel) -> int:
    """Of a sum in one step, all rows counted."""
    return prod(a.extent for a in kernel.reduced) * (kernel.part.extent if kernel.part is not None else 1)


def _longest(kernel: Kernel) -> Axis:
    """What more threads than there are parts share out."""
    return max((a for a in kernel.domain if a is not kernel.part), key=lambda a: a.extent)
