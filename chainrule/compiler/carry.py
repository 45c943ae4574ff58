"""States of loops that live where they are stacked.

In, out: items. A loop for a backward pass stacks the state that each step begins with, and often the one that it leaves. Such a state needs
no memory of its own: step t reads it at place t of a stack that is one longer and writes it at place t + 1. So no step copies it, and
what reads the old state and what writes the new one need not wait for each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from .affine import Affine, Axis, of
from .fuse import Names
from .kernels import Buffer, Index, Item, Kernel, Loop, Store, Value, kernels_of, load, loops_of, plain, rebuilt, roots


def carried(items: Sequence[Item], names: Names) -> list[Item]:
    """The items with such states moved."""
    made = list(items)
    tried: set[Buffer] = set()
    while (found := next(_stacks(made, tried), None)) is not None:
        tried.add(found.buffer)
        if _fits(found, made):
            made = _Moved(found, made, names).items(made)
    return made


def doubled(items: Sequence[Item]) -> set[Buffer]:
    """The buffers that `carried` will do without, because states lie where another has the same."""
    stacks = [s for s in _stacks(items, set()) if _fits(s, items)]
    return {b for s in stacks for b in _Moved(s, items, Names()).same}


@dataclass(frozen=True)
class _Stack:
    """A buffer in which steps put the state with which they begin. where: loops, and for each the kernel that does so."""

    buffer: Buffer
    where: Mapping[Loop, Kernel]

    def state(self, loop: Loop) -> Buffer:
        (store,) = self.where[loop].stores
        assert store.value.buffer is not None
        return store.value.buffer

    def place(self, loop: Loop, index: Index) -> Index:
        """Where in a step's part of the stack an element of the state stands."""
        (store,) = self.where[loop].stores
        table = {
            next(iter(i.axes)): j
            for i, j in zip(store.value.index, plain(index), strict=True)
            if isinstance(i, Affine) and i.axes
        }
        return tuple(i.replaced(table) for i in plain(store.index[1:]))


def _stacks(items: Sequence[Item], tried: set[Buffer]) -> Iterator[_Stack]:
    """Stacks of all loops, those inside others included."""
    where: dict[Buffer, dict[Loop, Kernel]] = {}
    for loop in loops_of(items):
        for kernel in loop.items:
            if isinstance(kernel, Kernel) and _stacks_a_state(kernel, loop):
                where.setdefault(kernel.stores[0].buffer, {})[loop] = kernel
    return (_Stack(b, found) for b, found in where.items() if b not in tried)


def _stacks_a_state(kernel: Kernel, loop: Loop) -> bool:
    """stack[time, ...] = state[...], each dimension of the state along an axis of its own."""
    if len(kernel.stores) != 1 or kernel.sequential or loop.meets:
        return False
    (store,) = kernel.stores
    read = store.value
    if read.op != "load" or read.buffer not in loop.states or store.buffer.space != "scratch" or read.shape != read.buffer.shape:
        return False
    plain = all(isinstance(i, Affine) and (i == Affine() or any(i == of(a) for a in kernel.domain)) for i in read.index)
    whole = prod(a.extent for a in kernel.domain) == prod(read.buffer.used) and store.view == store.buffer.shape
    stacks = bool(store.index) and store.index[0] == of(loop.axis)  # a state that is one number has no index
    return plain and whole and stacks and read.buffer.space == "scratch" and loop.axis.extent > 1


def _fits(stack: _Stack, items: Sequence[Item]) -> bool:
    """Whether nobody else writes the stack, nobody looks at stack or state in another shape, and loops go the same way."""
    stacking = set(stack.where.values())
    kernels = list(kernels_of(items))
    if len({loop.reverse for loop in stack.where}) != 1:
        return False
    buffers = {stack.buffer, *(stack.state(loop) for loop in stack.where)}
    for kernel in kernels:
        views = [(v.buffer, v.shape) for v in kernel.loads()] + [(s.buffer, s.view) for s in kernel.stores]
        if any(b in buffers and shape != b.shape for b, shape in views if b is not None):
            return False
        if any(v.buffer in buffers and _is_looked_up(v) for v in kernel.loads()):
            return False
        if any(s.buffer is stack.buffer for s in kernel.stores) and kernel not in stacking:
            return False
    for loop in stack.where:
        if loop.ends is not None and loop.reverse:
            return False  # each row begins at a step of its own
        state = stack.state(loop)
        inside = [k for i in loop.items if isinstance(i, Loop) for k in kernels_of([i])]
        touched = {b for k in inside for b in (*(v.buffer for v in k.loads()), *(s.buffer for s in k.stores))}
        writes = [s for i in loop.items if isinstance(i, Kernel) for s in i.stores if s.buffer is state]
        if state in touched or len(writes) != 1 or writes[0].mode != "set":
            return False
        if any(isinstance(j, Value) for j in writes[0].index) or any(
            isinstance(j, Value)
            for i in loop.items
            if isinstance(i, Kernel)
            for v in i.loads()
            if v.buffer is state
            for j in v.index
        ):
            return False
    return True


def _is_looked_up(v: Value) -> bool:
    """Whether the time at which a stack is read is only known while running."""
    return bool(v.index) and isinstance(v.index[0], Value)


class _Moved:
    """One stack and the states that move into it."""

    def __init__(self, stack: _Stack, items: Sequence[Item], names: Names) -> None:
        self.stack, self.names = stack, names
        old = stack.buffer
        self.buffer = Buffer(names("t"), (old.shape[0] + 1, *old.shape[1:]), old.dtype)
        self.reverse = next(iter(stack.where)).reverse
        self.before, self.after = (1, 0) if self.reverse else (0, 1)  # of a step's time: the places of old and new state
        self.same = self._same(items)

    def _same(self, items: Sequence[Item]) -> set[Buffer]:
        """Other stacks, that hold the state which each step leaves."""
        found: dict[Buffer, int] = {}
        for loop in self.stack.where:
            state = self.stack.state(loop)
            for kernel in (i for i in loop.items if isinstance(i, Kernel)):
                for new in (s for s in kernel.stores if s.buffer is state):
                    index = (of(loop.axis), *self.stack.place(loop, new.index))
                    for s in kernel.stores:
                        fits = s.buffer.space == "scratch" and s.view == s.buffer.shape == self.stack.buffer.shape
                        if fits and s.mode == "set" and s.value is new.value and s.index == index:
                            found[s.buffer] = found.get(s.buffer, 0) + 1
        writers: dict[Buffer, int] = {}
        viewed: set[Buffer | None] = set()
        for kernel in kernels_of(items):
            for s in kernel.stores:
                writers[s.buffer] = writers.get(s.buffer, 0) + 1
            viewed |= {v.buffer for v in kernel.loads() if v.buffer in found and (v.shape != v.buffer.shape or _is_looked_up(v))}
        return {b for b, n in found.items() if n == writers[b] == len(self.stack.where) and b not in viewed}

    def items(self, items: Sequence[Item]) -> list[Item]:
        made: list[Item] = []
        for item in items:
            if isinstance(item, Kernel):
                made.append(self._kernel(item, None))
            elif item in self.stack.where:
                made += [self._copy(item, False), self._loop(item), self._copy(item, True)]
            else:
                item.items[:] = self.items(item.items)
                made.append(item)
        return made

    def _loop(self, loop: Loop) -> Loop:
        state = self.stack.state(loop)
        inside = [i for i in loop.items if i is not self.stack.where[loop]]
        items = [self._kernel(i, loop) if isinstance(i, Kernel) else replace(i, items=self.items(i.items)) for i in inside]
        return replace(loop, items=items, states=[b for b in loop.states if b is not state])

    def _kernel(self, kernel: Kernel, loop: Loop | None) -> Kernel:
        """loop: the one whose state moves, if the kernel stands in it."""
        state = self.stack.state(loop) if loop is not None else None
        gone = {self.stack.buffer, *self.same, state}
        if not any(b in gone for b in (*(v.buffer for v in kernel.loads()), *(s.buffer for s in kernel.stores))):
            return kernel

        def place(buffer: Buffer | None, index: Index, new: bool) -> Index | None:
            if buffer is None or buffer not in gone:
                return None
            if buffer is state and loop is not None:
                return (of(loop.axis) + (self.after if new else self.before), *self.stack.place(loop, index))
            (first, *rest) = index
            assert isinstance(first, Affine)
            return (first + (self.after if buffer in self.same else self.before), *rest)

        def loaded(v: Value) -> Value:
            index = place(v.buffer, v.index, False) if v.op == "load" else None
            return v if index is None else load(self.buffer, index)

        table = rebuilt(roots(kernel.stores), {}, None, loaded)
        stores = []
        for s in kernel.stores:
            if s.buffer in self.same:
                continue  # it is where the new state is
            index = place(s.buffer, s.index, True)
            own = tuple(table[i] if isinstance(i, Value) else i for i in s.index)
            stores.append(
                replace(s, index=own, value=table[s.value])
                if index is None
                else Store(self.buffer, index, table[s.value], s.mode)
            )
        return replace(kernel, stores=stores)

    def _copy(self, loop: Loop, out: bool) -> Kernel:
        """The first state into the stack, or the last one out of it."""
        kernel, state = self.stack.where[loop], self.stack.state(loop)
        domain = tuple(Axis(self.names("i"), a.extent) for a in kernel.domain)
        where = {a: of(b) for a, b in zip(kernel.domain, domain, strict=True)}
        (store,) = kernel.stores
        index = tuple(i.replaced(where) for i in store.value.index if isinstance(i, Affine))
        place = tuple(i.replaced(where) for i in store.index[1:] if isinstance(i, Affine))
        at: Affine | Value = Affine(loop.axis.extent if out != self.reverse else 0)
        if loop.between is not None:
            at = loop.limits()[out != self.reverse]
        unit = next((b for a, b in zip(kernel.domain, domain, strict=True) if a is kernel.unit), None)
        if loop.ends is not None and out:
            assert unit is not None
            at = loop.ends.turns(of(unit), loop.axis, loop.limits()[1])
        stacked = (at, *place)
        stores = [Store(state, index, load(self.buffer, stacked)) if out else Store(self.buffer, stacked, load(state, index))]
        return Kernel(self.names("k"), domain, (), stores, unit, origin=kernel.origin)
