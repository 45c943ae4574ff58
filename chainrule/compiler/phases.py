"""The order of kernels, and where threads have to wait for each other.

In: kernels and loops in an order in which they could run. Out: phases; between two of them all threads meet. Inside a phase a thread
runs its units of each kernel, one kernel after the other, and needs nothing of another thread: this is how a block of rows goes
through all layers, forward and back, without waiting. At the end of a step they meet too, unless what threads touch of the first phase
lets others still be in the last: then only memory for what is made in each step stands between two steps, and if it is little there is
twice as much of it, used in turns.

State is read before it is written: a kernel that stores new state comes after all that read the old one, and where no order can have
that, or an index is checked only after it, it stores beside the state, and a last kernel copies. Several kernels may store parts of
one state: all of them in place, or all beside.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

from .affine import Affine, Axis, of
from .former import Index
from .fuse import Names
from .kernels import Buffer, Item, Kernel, Loop, Store, Value, kernels_of, load, loops_of
from .schedule import MOST_TWICE, Parts, units


@dataclass(frozen=True, slots=True)
class Access:
    """One read or write of a buffer, and the axis of the unit that does it."""

    buffer: Buffer
    index: tuple[Affine | Value, ...]
    view: tuple[int, ...]
    unit: Axis | None
    write: bool


Touched = dict[Buffer, list[tuple[Item, Access]]]


@dataclass(slots=True, eq=False)
class Plan:
    """Phases in order; `inner`: the kernels of each loop in order; `meeting`: for loops in which threads meet, the phases of a turn;
    `units`: what each item shares out, by its extent; `late`: copies of the state, made before the first step; `waits`: whether
    threads meet at the end of a step; `twice`: buffers that steps use in turns with another one each, so that they need not;
    `threads`: how many work was cut for; `parts`: buffers of which each thread touches its own part only (gaps.py)."""

    phases: list[list[Item]]
    inner: dict[Loop, list[Item]]
    meeting: dict[Loop, list[list[Item]]]
    units: dict[Item, int | None]
    late: list[Kernel]
    waits: bool = True
    twice: dict[Buffer, Buffer] = field(default_factory=dict)
    threads: int = 1
    parts: dict[Buffer, Parts] = field(default_factory=dict)


def plan(items: Sequence[Item], state: Sequence[Buffer], names: Names, threads: int = 2, turns: bool = False) -> Plan:
    """Phases for items over this state (buffers that are read as they were before), their work cut for so many threads. turns: buffers
    may be there twice, for steps in turns."""
    inner: dict[Loop, list[Item]] = {}
    late = [i for i in items if isinstance(i, Kernel) and i.late]
    ordered = _arranged([i for i in items if not (isinstance(i, Kernel) and i.late)], state, names, inner)
    written = {a.buffer for i in ordered for a in accesses(i) if a.write}
    ordered += [k for k in late if any(v.buffer in written for v in k.loads())]  # of state that never changes one copy will do
    units = {i: _extent(i, inner, threads) for i in ordered}
    for loop in inner:
        units.update({i: _extent(i, inner, threads) for i in inner[loop]})
    level = _levels(ordered, units, {}, threads)
    level = _levels(ordered, units, _after_checks(ordered, level, set(state)), threads)
    units.update({k: _extent(k, inner, threads) for k in late})
    meeting = {i: _by_level(inner[i], _levels(inner[i], units, {}, threads)) for i in inner if i.meets}
    between = _between_steps(ordered, level, units, threads) if turns else None
    twice = {b: replace(b, name=names("t")) for b in between or ()}
    return Plan(_by_level(ordered, level), inner, meeting, units, late, between is None, twice, threads)


def _by_level(items: Sequence[Item], level: dict[Item, int]) -> list[list[Item]]:
    count = max(level.values(), default=-1) + 1
    return [[i for i in items if level[i] == n] for n in range(count)]


def _arranged(items: Sequence[Item], state: Sequence[Buffer], names: Names, inner: dict[Loop, list[Item]]) -> list[Item]:
    """An order that keeps dependences and reads state before it is written."""
    items = list(items)
    for item in items:
        if isinstance(item, Loop):
            inner[item] = item.items[:] = _arranged(item.items, item.states, names, inner)
    kept = set(state)
    order = _Order(items)
    touched = {i: list(accesses(i)) for i in items}
    readers: Touched = {}
    writers: Touched = {}
    for item in items:  # those before it are in the tables, and nobody else
        for a in touched[item]:
            if a.write or a.buffer not in kept:
                order.add(item, _met(a, writers))
            if a.write and a.buffer not in kept:
                order.add(item, _met(a, readers))
        for a in touched[item]:
            (writers if a.write else readers).setdefault(a.buffer, []).append((item, a))
    copies: list[Item] = []
    checking = [i for i in items if checks(i)]
    for buffer in dict.fromkeys(a.buffer for i in items for a in touched[i] if a.write and a.buffer in kept):
        trial = order.copy() if len(writers[buffer]) > 1 else order  # of several writers some may have found a place in vain
        waits = checking if buffer.space == "state" else []
        if all(_can_write(item, a, trial, readers, writers, waits) for item, a in writers[buffer]):
            order = trial
            continue
        beside = Buffer(names("t"), buffer.shape, buffer.dtype, lanes=buffer.lanes)
        copies.append(_copied(beside, buffer, names))
        for item, _ in writers[buffer]:
            assert isinstance(item, Kernel), "a loop does not write to state of what it stands in"
            item.stores[:] = [replace(s, buffer=beside) if s.buffer is buffer else s for s in item.stores]
    return [*order.sorted(), *copies]


def _can_write(item: Item, a: Access, order: _Order, readers: Touched, writers: Touched, checking: Sequence[Item]) -> bool:
    """Whether it can store new state where the old one stands, after all that read it, and none of those that check indices comes after
    it; if so, it will."""
    others = [r for r in _met(a, readers) if r is not item]
    alone = all(w is item for w in _met(a, writers))
    if not (isinstance(item, Kernel) and _in_place(item, a.buffer) and alone):
        return False
    if any(order.reaches(item, i) for i in (*others, *checking)):
        return False
    order.add(item, others)
    return True


def _met(a: Access, known: Touched) -> list[Item]:
    """The items among these that touch what `a` does."""
    return list(dict.fromkeys(item for item, b in known.get(a.buffer, ()) if not disjoint(a, b)))


class _Order:
    """What has to come after what."""

    def __init__(self, items: Iterable[Item], known: _Order | None = None) -> None:
        self._place = {item: n for n, item in enumerate(items)}
        self._before: dict[Item, set[Item]] = {i: {*known._before[i]} if known else set() for i in self._place}
        self._after: dict[Item, set[Item]] = {i: {*known._after[i]} if known else set() for i in self._place}

    def copy(self) -> _Order:
        """One that can be added to by itself."""
        return _Order(self._place, self)

    def add(self, item: Item, before: Iterable[Item]) -> None:
        """`item` comes after those."""
        for b in before:
            if b is not item:
                self._before[item].add(b)
                self._after[b].add(item)

    def reaches(self, start: Item, goal: Item) -> bool:
        """Whether `goal` has to come after `start`."""
        seen, stack = set(), [start]
        while stack:
            item = stack.pop()
            if item is goal:
                return True
            if item not in seen:
                seen.add(item)
                stack += self._after[item]
        return False

    def sorted(self) -> list[Item]:
        """The order given at first, as far as it can be kept."""
        done: dict[Item, None] = {}
        for item in self._place:
            stack = [item]
            while stack:
                top = stack[-1]
                waiting = (
                    [] if top in done else sorted((i for i in self._before[top] if i not in done), key=self._place.__getitem__)
                )
                if waiting:
                    stack += reversed(waiting)
                else:
                    done[stack.pop()] = None
        return list(done)


def _in_place(kernel: Kernel, buffer: Buffer) -> bool:
    """Whether the kernel reads each element of `buffer` only where it writes it."""
    written = [s for s in kernel.stores if s.buffer is buffer]
    same = all(a.view == b.view and never_meet(a.index, b.index) for a, b in combinations(written, 2))
    places = {(s.index, s.view) for s in written}
    return same and not kernel.sequential and all((v.index, v.shape) in places for v in kernel.loads() if v.buffer is buffer)


def _copied(other: Buffer, buffer: Buffer, names: Names) -> Kernel:
    """The copy at the end of what all kernels that compute new state have stored elsewhere."""
    domain = tuple(Axis(names("i"), n) for n in buffer.used)
    index = tuple(of(a) for a in domain)
    return Kernel(names("k"), domain, (), [Store(buffer, index, load(other, index))], domain[0] if domain else None)


def accesses(item: Item) -> Iterator[Access]:
    """All reads and writes."""
    for loop in loops_of([item]):
        if loop.ends is not None:  # by each thread for its rows
            unit = next(k.unit for k in kernels_of([loop]))
            assert unit is not None
            yield Access(loop.ends.steps, (of(unit),), loop.ends.steps.shape, unit, False)
    for k in kernels_of([item]):
        for v in k.loads():
            assert v.buffer is not None
            yield Access(v.buffer, v.index, v.shape, k.unit, False)
        for s in k.stores:
            yield Access(s.buffer, s.index, s.view, k.unit, True)


def _conflicts(touched: Sequence[Access]) -> Iterator[tuple[Access, Access]]:
    """Pairs of which one writes what the other touches."""
    by: dict[Buffer, list[Access]] = {}
    for a in touched:
        by.setdefault(a.buffer, []).append(a)
    return (
        (a, b) for same in by.values() if any(a.write for a in same)
        for b in same for a in same if (a.write or b.write) and not disjoint(a, b)
    )  # fmt: skip


def disjoint(a: Access, b: Access) -> bool:
    """Whether they touch parts of a buffer that have nothing in common: along some dimension one ends before the other begins."""
    return a.view == b.view and never_meet(a.index, b.index)


def never_meet(one: Index, other: Index) -> bool:
    """Whether two indices of one array never reach the same place."""
    both = ((i, j) for i, j in zip(one, other, strict=True) if isinstance(i, Affine) and isinstance(j, Affine))
    return any(i.largest < j.smallest or j.largest < i.smallest for i, j in both)


def local(a: Access, b: Access, threads: int) -> bool:
    """Whether unit for unit both touch the same part of the buffer, cut for so many threads."""
    if a.unit is None or b.unit is None or a.unit.extent == 1 or b.unit.extent == 1:
        return (a.unit is None or a.unit.extent == 1) and (b.unit is None or b.unit.extent == 1)
    if a.buffer.part_of is not None:
        return True  # each unit has its own
    if a.view != b.view and a.view[:1] != b.view[:1]:
        return False
    both = list(zip(blocks(a, a.unit, threads), blocks(b, b.unit, threads), strict=False))
    shared = both if a.view == b.view else both[:1]  # of arrays seen in two shapes, what the first axis of both counts
    return any(x is not None and x == y for x, y in shared)


def blocks(a: Access, unit: Axis, threads: int) -> list[tuple[int, int, int] | None]:
    """For each dimension how many units there are, how many places of it each touches, and where the first begins; None where a unit is
    no block of it: one is where the index is c · unit + something below c, from some place on."""
    count, length = units(unit.extent, threads)
    found: list[tuple[int, int, int] | None] = []
    for i in a.index:
        c = i.coefficient(unit) if isinstance(i, Affine) else 0
        inside = i.without(unit) if isinstance(i, Affine) else Affine()
        block = c > 0 and inside.smallest == inside.constant and inside.largest - inside.constant < c
        found.append((count, length * c, inside.constant) if block else None)
    return found


def _extent(item: Item, inner: dict[Loop, list[Item]], threads: int) -> int | None:
    """The length of the axis that threads share out; None: one thread does it all."""
    if isinstance(item, Kernel):
        return item.unit.extent if item.unit is not None and item.unit.extent > 1 else None
    extents = {_extent(i, inner, threads) for i in inner[item]}
    counts = {units(n, threads)[0] if n is not None else 0 for n in extents}
    touched = [a for i in inner[item] for a in accesses(i)]
    if len(counts) != 1 or not all(local(a, b, threads) for a, b in _conflicts(touched)):
        return None
    return max((n for n in extents if n is not None), default=None)


def meetings(ordered: Sequence[Item], threads: int) -> int:
    """How often threads meet in a step of kernels in this order (there are no loops)."""
    units = {k: _extent(k, {}, threads) for k in ordered}
    level = _levels(ordered, units, {}, threads)
    return max(level.values(), default=0) + (_between_steps(ordered, level, units, threads) is None)


def _levels(ordered: Sequence[Item], units: dict[Item, int | None], least: dict[Item, int], threads: int) -> dict[Item, int]:
    """The phase of each item: after all that it waits for, or with it if no unit needs what another has done."""
    level: dict[Item, int] = {}
    read: Touched = {}
    written: Touched = {}
    for item in ordered:
        first, touched = least.get(item, 0), list(accesses(item))
        for b in touched:
            for before, a in (*written.get(b.buffer, ()), *(read.get(b.buffer, ()) if b.write else ())):
                if level[before] >= first and not disjoint(a, b):
                    near = _by_same_threads(before, a, item, b, units, threads) and not meets(before) and not meets(item)
                    first = level[before] + (0 if near else 1)
        for b in touched:
            (written if b.write else read).setdefault(b.buffer, []).append((item, b))
        level[item] = first
    return level


def _by_same_threads(one: Item, a: Access, other: Item, b: Access, units: dict[Item, int | None], threads: int) -> bool:
    """Whether each thread touches the same part of the buffer in both."""
    alone = units[one] is None, units[other] is None
    return all(alone) or (not any(alone) and local(a, b, threads))


def _between_steps(
    ordered: Sequence[Item], level: dict[Item, int], units: dict[Item, int | None], threads: int
) -> list[Buffer] | None:
    """The buffers that have to be there twice if threads go on to the first phase of a step while others are in the last of the one
    before; None if they cannot. Nothing but late copies reads scratch memory that the same step has not written, so nobody can tell."""
    last = max(level.values(), default=0)
    ends, begins = ([i for i in ordered if level[i] == n] for n in (last, 0))
    if not last or any(meets(i) for i in (*ends, *begins)) or any(map(checks, ordered)):
        return None
    touched: Touched = {}
    for item in ends:
        for a in accesses(item):
            touched.setdefault(a.buffer, []).append((item, a))
    found: dict[Buffer, None] = {}
    for item in begins:
        for b in accesses(item):
            for other, a in touched.get(b.buffer, ()):
                apart = not (a.write or b.write) or disjoint(a, b) or _by_same_threads(other, a, item, b, units, threads)
                if not apart:
                    found[b.buffer] = None
    kept = {s.buffer for i in ordered if isinstance(i, Kernel) and i.late for s in i.stores}
    fits = sum(b.bytes for b in found) <= MOST_TWICE
    return list(found) if fits and all(b.space == "scratch" and b.part_of is None and b not in kept for b in found) else None


def meets(item: Item) -> bool:
    """Whether it is a loop in which threads meet."""
    return isinstance(item, Loop) and item.meets


def checks(item: Item) -> bool:
    """Whether an index is checked there."""
    return any(v.op == "checked" for k in kernels_of([item]) for v in k.values())


def _after_checks(ordered: Sequence[Item], level: dict[Item, int], state: set[Buffer]) -> dict[Item, int]:
    """No state is written before all indices are known to be right: the earliest phase of what writes state."""
    least = max((level[i] for i in ordered if checks(i)), default=-1) + 1
    return {i: least for i in ordered if any(a.write and a.buffer in state for a in accesses(i))}
