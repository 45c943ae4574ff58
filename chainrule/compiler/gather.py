"""Sums that a loop gathers over its steps, taken out of the steps: many terms at a time.

In: items. Out: items in which a loop over T steps that adds to such sums has become a loop over chunks of steps. In each chunk the steps
run first, and leave what the sums are made of; then it is added, over all steps of the chunk and all rows at once, by kernels that
threads share out by the elements of the sums. So the backward pass of a recurrent network goes through many steps with its rows in
the nearest cache, and the gradients of weights are large matrix products.

    sum += Σ over a chunk's steps (Σ over rows (term)),        chunks in the order of the loop, steps and rows ascending inside

Chunks are aligned at the step with which the loop ends (a backward loop: where the forward loop began) and of one length, but for the
one that it begins with; the length follows from the number of rows alone. So the order of a sum depends neither on threads, nor on which
states were kept and which computed again (replay.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import ceil, prod

from .affine import Affine, Axis, of
from .fuse import Names
from .kernels import Buffer, Item, Kernel, Loop, Store, Value, elementwise, kernels_of, load, rebuilt, reduce, roots
from .schedule import CHUNK, together

Index = tuple[Affine | Value, ...]


def gathered(items: Sequence[Item], names: Names) -> list[Item]:
    """The items with such loops cut into chunks. Only loops that stand in no other are looked at."""
    made: list[Item] = []
    for item in items:
        sums = sums_of(item, items) if isinstance(item, Loop) and not item.meets else []
        made += _Chunks(item, sums, names).items() if sums and isinstance(item, Loop) else [item]
    return made


def chunk(loop: Loop) -> tuple[int, int]:
    """The steps of a chunk (1 if the loop gathers no sums), and the bytes that are kept until its end."""
    sums = sums_of(loop, [loop])
    if not sums:
        return 1, 0
    made = _Chunks(loop, sums, Names())
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


# ---- chunks ------------------------------------------------------------------------------------------------------------------


def steps_of_a_chunk(length: int, rows: int) -> int:
    """How many steps of so many rows a chunk has.

    >>> [steps_of_a_chunk(1000, rows) for rows in (4, 32, 1000)], steps_of_a_chunk(10, 1)
    ([128, 16, 1], 10)
    """
    return min(length, ceil(CHUNK / max(rows, 1)))


class _Chunks:
    """One loop cut into chunks."""

    def __init__(self, loop: Loop, sums: Sequence[Kernel], names: Names) -> None:
        self.loop, self.sums, self.names = loop, sums, names
        self.rest = [i for i in loop.items if i not in sums]
        self.length = steps_of_a_chunk(loop.axis.extent, max(prod(a.extent for a in k.reduced) for k in sums))
        written = {s.buffer for k in kernels_of(self.rest) for s in k.stores}
        own = {s.buffer for k in sums for s in k.stores}
        read = dict.fromkeys(v for k in sums for v in k.loads() if v.buffer in written and v.buffer not in own)
        kept = dict.fromkeys(v.buffer for v in read if not any(loop.axis in i.axes for i in v.index))
        self.kept = {b: Buffer(names("t"), (self.length, *b.shape), b.dtype) for b in kept if b is not None}

    def items(self) -> list[Item]:
        """The chunk that the loop begins with, if it is shorter, and a loop over the others."""
        time = self.loop.axis
        whole, rest = divmod(time.extent, self.length)
        turn = Axis(time.name + "c", whole)
        many = self._chunk(of(turn) * self.length + (0 if self.loop.reverse else rest), self.length)
        first = self._chunk(Affine(whole * self.length if self.loop.reverse else 0), rest) if rest else []
        return [*first, *(many if whole == 1 else [Loop(self.names("loop"), turn, self.loop.reverse, many, [], True)])]

    def _chunk(self, first: Affine, length: int) -> list[Item]:
        step = Axis(self.loop.axis.name + "s", length)
        where = {self.loop.axis: first + of(step)}
        states = [b for b in self.loop.states if not any(b is s.buffer for k in self.sums for s in k.stores)]
        ends = self.loop.ends.moved(where) if self.loop.ends is not None else None
        inside = [self._moved(i, where, of(step)) for i in self.rest]
        steps = Loop(self.names("loop"), step, self.loop.reverse, inside, states, ends=ends)
        return [steps, *(part for k in self.sums for part in self._sum(k, first, length))]

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
            index = tuple(table[i] if isinstance(i, Value) else i.replaced(where) for i in s.index)
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

    def _sum(self, kernel: Kernel, first: Affine, length: int) -> list[Kernel]:
        """All steps of a chunk added at once; where rows end, for those that end together at a time, up to their last step."""
        step = Axis(self.names("r"), length)
        ends = self.loop.ends
        if ends is None or kernel.rows is None:
            reduced = (*((step,) if length > 1 else ()), *kernel.reduced)
            return [self._added(kernel, {self.loop.axis: first + of(step)}, of(step), reduced, {})]
        made = []
        size = together(kernel.rows.extent)
        groups, rest = divmod(kernel.rows.extent, size)
        for start, count, own in ((0, groups, size), (groups * size, 1, rest)):
            if not count or not own:
                continue
            step, group, row = Axis(self.names("r"), length), Axis(self.names("r"), count), Axis(self.names("r"), own)
            begin = of(group) * own + start if count > 1 else Affine(start)
            where = {self.loop.axis: first + of(step), kernel.rows: begin + of(row)}
            inner = [row if a is kernel.rows else a for a in kernel.reduced]
            until = {step: ends.moved(where).turns(begin, step)}
            outer = (group, step) if count > 1 else (step,)
            made.append(self._added(kernel, where, of(step), (*outer, *inner), until))
        return made

    def _added(
        self, kernel: Kernel, where: Mapping[Axis, Affine], step: Affine, reduced: tuple[Axis, ...], until: dict[Axis, Value]
    ) -> Kernel:
        stores = []
        for s in self._stores(kernel, where, step):
            old, term = _old(s), _term(s)
            assert old is not None
            assert term is not None
            inner = term.args[0] if term.op == "reduce" else term
            total = reduce("sum", inner, reduced) if reduced else inner
            stores.append(replace(s, value=elementwise("add", term.dtype, [old, total])))
        return replace(kernel, name=self.names("k"), stores=stores, reduced=reduced, until=until, rows=None)
