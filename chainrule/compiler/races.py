"""Whether an order of kernels gives the same numbers however many threads run it, and reads state before it is written.

In: a plan. Out: nothing, or an error that names the kernels at fault: it would be a defect of chainrule, which would show as numbers
that are wrong, or not the same twice. The plan was made by rules about indices (`phases.local`, `phases.disjoint`); here the elements are
counted that each thread reads and writes, for each number of threads, by nothing but what the entry hands out. Not looked at: in which
order a thread does its own units (kernels over blocks of rows take turns block by block), and which scratch buffers share memory.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations_with_replacement, permutations, product
from math import prod

from .affine import Affine, Axis, of
from .kernels import Buffer, Index, Item, Kernel, Limits, Loop, bounds, kernels_of, kernels_text, limits_of
from .phases import Plan, checks, meets
from .regions import Region, region, shared
from .schedule import share_of, units
from .verify import demand, ranges


def verify_plan(planned: Plan, state: Collection[Buffer], threads: int) -> None:
    """Whether the phases of a plan, its work cut for so many threads, are right.

    State (of steps, and in each loop its own) is read before any of the same elements is written, and so are late copies of it, which are
    made anew when nothing writes it any more. No state is written before the phase that follows the last check of an index. A kernel
    reads what it stores into only where it stores, or where it never does. Between two meetings no thread touches an element that
    another one writes, in steps, from one step to the next and where late copies are made before the first. Of an array in parts each
    thread touches its own. This is exact where indices are evenly spaced places along each dimension; where it cannot be told whether two
    kernels meet, or depends on the turn of a loop, they are taken to.
    Raises: `GraphError`.
    """
    shared_out = _SharedOut(planned, threads)
    copies = {s.buffer for k in planned.late for s in k.stores}
    _verify_state([i for items in planned.phases for i in items], shared_out, {*state, *copies}, frozenset())
    _verify_checks(shared_out, set(state))
    _verify_phase(planned.late, shared_out, frozenset())
    for items in planned.phases:
        _verify_phase(items, shared_out, frozenset())
    if not planned.waits:
        _verify_between_steps(shared_out, copies)
    _verify_parts(shared_out)


MOST_PARTS = 64  # in which what a thread touches is looked at, if it cannot be told as a whole


@dataclass(eq=False)
class _Touch:
    """One read or write by a kernel. item: what stands in the phase: the kernel itself, or a loop; called: what the entry calls with a
    share of the work, the same but for what is inside a loop in which threads meet; limits, confined: of axes and of their sums, as far as
    they are known."""

    item: Item
    called: Item
    kernel: Kernel
    buffer: Buffer
    index: Index
    view: tuple[int, ...]
    write: bool
    limits: Limits
    confined: Mapping[Affine, int]

    def region(self, fixed: frozenset[Axis], where: Mapping[Axis, Affine] | None = None) -> Region:
        """The elements that it touches in all turns of loops, but for one turn of those with these axes. where: what stands for some
        axes."""
        where = where or {}
        index = tuple(i.replaced(where) if isinstance(i, Affine) else i for i in self.index)
        confined = {i.replaced(where): n for i, n in self.confined.items()}
        return region(index, self.view, ranges(index, self.view, self.limits, confined), fixed)

    def regions(self, fixed: frozenset[Axis], own: Affine) -> list[Region]:
        """The same at some places of the unit axis, in parts that are each exactly known if there are few: an uneven part of a panel, in
        several panels, is no evenly spaced places."""
        assert self.kernel.unit is not None
        where = {self.kernel.unit: own}
        whole = self.region(fixed, where)
        outer = {
            a for i in self.index if isinstance(i, Affine) for a, _ in sorted(i.terms, key=lambda t: -abs(t[1]))[:-1]
        } - fixed
        axes = sorted(outer - {self.kernel.unit}, key=lambda a: a.name)
        if whole.exact or prod(a.extent for a in axes) > MOST_PARTS:
            return [whole]
        places = product(*(range(a.extent) for a in axes))
        return [self.region(fixed, where | {a: Affine(n) for a, n in zip(axes, at, strict=True)}) for at in places]


@dataclass
class _SharedOut:
    """Who touches what, if work is cut for so many threads."""

    planned: Plan
    threads: int
    _known: dict[Item, list[_Touch]] = field(default_factory=dict)
    _parts: dict[tuple[_Touch, int, int, frozenset[Axis]], list[Region]] = field(default_factory=dict)

    def touches(self, item: Item) -> list[_Touch]:
        """All reads and writes."""
        if item not in self._known:
            self._known[item] = list(_touches(item, item, item, {}))
        return self._known[item]

    def numbers(self, a: _Touch, b: _Touch) -> Iterable[int]:
        """The numbers of threads that have to be looked at: where both are cut into as many units, those of fewer threads have several of
        the units that the most threads have one of."""
        alike = self._count(a) == self._count(b)
        return range(self.threads if alike and self.threads > 1 else 2, self.threads + 1)

    def _count(self, touch: _Touch) -> int:
        extent = self.planned.units[touch.called]
        return 1 if extent is None else units(extent, self.threads)[0]

    def part(self, touch: _Touch, thread: int, threads: int, fixed: frozenset[Axis]) -> list[Region]:
        """What one of so many threads that run it touches, in parts; none if it has nothing to do."""
        key = touch, thread, threads, fixed
        if key not in self._parts:
            self._parts[key] = self._part(touch, thread, threads, fixed)
        return self._parts[key]

    def _part(self, touch: _Touch, thread: int, threads: int, fixed: frozenset[Axis]) -> list[Region]:
        extent, count = self.planned.units[touch.called], self._count(touch)
        first, end = share_of(thread, threads, count)
        unit = touch.kernel.unit
        if first == end:
            return []
        if touch.buffer.part_of is not None:  # each unit has its own
            every = touch.buffer.part_of[0].shape[0]
            return [_units(*((0, every) if extent is None else (first, end)), every)]
        if extent is None or unit is None:
            return [touch.region(fixed)]
        length = units(unit.extent, self.threads)[1]
        first, end = first * length, min(end * length, unit.extent)
        return touch.regions(fixed, of(Axis(unit.name, end - first)) + first)


def _touches(item: Item, top: Item, called: Item, limits: Limits) -> Iterator[_Touch]:
    """What is added to is read and written."""
    limits = {**limits, **limits_of(item)}
    if isinstance(item, Loop):
        for i in item.items:
            yield from _touches(i, top, i if item.meets else called, limits)
        if item.ends is not None:  # looked at by each thread for its rows
            kernel, steps = next(kernels_of([item])), item.ends.steps
            assert kernel.unit is not None
            yield _Touch(top, called, kernel, steps, (of(kernel.unit),), steps.shape, False, limits, {})
        return
    places = [(v.buffer, v.index, v.shape, False) for v in item.loads() if v.buffer is not None]
    places += [(s.buffer, s.index, s.view, False) for s in item.stores if s.mode == "add"]
    places += [(s.buffer, s.index, s.view, True) for s in item.stores]
    confined = bounds(item.values())
    for buffer, index, view, write in places:
        yield _Touch(top, called, item, buffer, index, view, write, limits, confined)


def _units(first: int, end: int, count: int) -> Region:
    """Some of the units that have a private copy each."""
    return region((of(Axis("unit", end - first)) + first,), (count,), [(first, end - 1)], frozenset())


def _meet(a: _Touch, b: _Touch, fixed: frozenset[Axis]) -> bool:
    """Whether both touch some of the same elements, in the same turn of loops with these axes."""
    one, other = a.region(fixed), b.region(fixed)
    if _depend_on_turns(one, other):
        one, other = a.region(frozenset()), b.region(frozenset())
    return shared(one, other) != 0


def _depend_on_turns(one: Region, other: Region) -> bool:
    """Whether what they have in common may be something else in each turn of a loop."""
    return (one.shape, one.base) != (other.shape, other.base)


# ---- state -------------------------------------------------------------------------------------------------------------------


def _verify_state(items: Sequence[Item], shared_out: _SharedOut, state: set[Buffer], fixed: frozenset[Axis]) -> None:
    """Whether all that is read of the state is as it was, and what late kernels read as it will be; in loops too, in each turn."""
    written: list[_Touch] = []
    copied: list[_Touch] = []
    for item in items:
        late = isinstance(item, Kernel) and item.late
        touched = [t for t in shared_out.touches(item) if t.buffer in state]
        alone = isinstance(item, Kernel) or not any(t.write for t in touched)
        demand(alone, item, "writes to state of what it stands in, and may read there what it has written")
        for t in touched:
            if t.write:
                _demand_none(t, copied, fixed, "writes {} after the late copy of it by {}")
            elif not late:
                _demand_none(t, written, fixed, "reads {}, whose old value {} has written over")
        written += [t for t in touched if t.write]
        copied += [t for t in touched if late]
        if isinstance(item, Loop):
            _verify_state(shared_out.planned.inner[item], shared_out, set(item.states), fixed | {item.axis})
        else:
            _verify_in_place(item, shared_out, fixed)


def _demand_none(touch: _Touch, others: Iterable[_Touch], fixed: frozenset[Axis], problem: str) -> None:
    for other in others:
        if other.buffer is touch.buffer:
            demand(not _meet(touch, other, fixed), touch.item, problem.format(touch.buffer, other.kernel.name))


def _verify_in_place(kernel: Kernel, shared_out: _SharedOut, fixed: frozenset[Axis]) -> None:
    """Whether it reads no element that another of its points stores."""
    touched = shared_out.touches(kernel)
    into = {s.buffer for s in kernel.stores}
    demand(not (kernel.sequential and any(v.buffer in into for v in kernel.loads())), kernel, "reads what it is adding to")
    for a in touched:
        for b in touched:
            if b.write and not a.write and a.buffer is b.buffer and (a.index, a.view) != (b.index, b.view):
                demand(not _meet(a, b, fixed), kernel, f"reads {a.buffer} at other places than it stores it")


def _verify_checks(shared_out: _SharedOut, state: set[Buffer]) -> None:
    """Whether all indices have been checked, by all threads, when the first state is written."""
    phases = shared_out.planned.phases
    last = max((n for n, items in enumerate(phases) if any(map(checks, items))), default=-1)
    for item in (i for items in phases[: last + 1] for i in items):
        writes = any(t.write and t.buffer in state for t in shared_out.touches(item))
        demand(not writes, item, "writes state before all indices are known to be right")


# ---- threads -----------------------------------------------------------------------------------------------------------------


def _verify_between_steps(shared_out: _SharedOut, copies: set[Buffer]) -> None:
    """Whether threads share nothing that one of them writes if some are in the first phase of a step and others in the last of the one
    before, but for buffers that are there twice: and what is read of those, the same step has written. Where indices are checked, a
    thread may have to stop before the next step."""
    phases, twice = shared_out.planned.phases, shared_out.planned.twice
    demand(len(phases) > 1, phases[0][0], "is in the only phase: threads never meet")
    for item in (i for items in phases for i in items):
        demand(not checks(item), item, "checks an index, and nobody waits for it")
    touched: set[Buffer] = set()
    for item in (i for items in phases for i in items):
        new = {t.buffer: t for t in reversed(shared_out.touches(item)) if t.buffer in twice and t.buffer not in touched}
        for buffer, t in new.items():
            scratch = buffer.space == "scratch" and buffer not in copies
            demand(t.write and scratch, item, f"reads {buffer}, in which a step finds what the one before the last has left")
        touched |= new.keys()
    _verify_phase([*phases[-1], *phases[0]], shared_out, frozenset(), twice)


def _verify_phase(
    items: Sequence[Item], shared_out: _SharedOut, fixed: frozenset[Axis], but: Collection[Buffer] = frozenset()
) -> None:
    """Whether threads share nothing that one of them writes, `but` these buffers. fixed: axes of loops in which they meet in each turn."""
    by: dict[Buffer, list[_Touch]] = {}
    for item in items:
        for t in shared_out.touches(item):
            if t.buffer not in but:
                by.setdefault(t.buffer, []).append(t)
    pairs = (pair for same in by.values() for pair in combinations_with_replacement(same, 2))
    for a, b in pairs:
        inside = a.item is b.item and meets(a.item)  # looked at below
        if (a.write or b.write) and not inside and any(_race(a, b, n, shared_out, fixed) for n in shared_out.numbers(a, b)):
            how = f"a thread touches {a.buffer} where another one does in {b.kernel.name}, and does not wait"
            demand(False, a.item, f"{how}\n{kernels_text([b.item])}")
    for item in items:
        if isinstance(item, Loop) and item.meets:
            for loop in item.items if item.turns else [item]:
                assert isinstance(loop, Loop)
                for phase in shared_out.planned.meeting[loop]:
                    _verify_phase(phase, shared_out, fixed | {item.axis, loop.axis})


def _verify_parts(shared_out: _SharedOut) -> None:
    """Whether each thread touches its own part only of arrays that lie in parts."""
    planned = shared_out.planned
    items = (*planned.late, *(i for items in planned.phases for i in items))
    for t in (t for i in items for t in shared_out.touches(i) if t.buffer in planned.parts):
        parts, size = planned.parts[t.buffer], t.buffer.dtype.itemsize
        for threads in range(2, shared_out.threads + 1):
            for thread in range(threads):
                first, end = (parts.start(n, threads) // size for n in (thread, thread + 1))
                reached = map(_ends, shared_out.part(t, thread, threads, frozenset()))
                inside = all(first <= low and high < min(end, t.buffer.size) for low, high in reached)
                demand(inside, t.item, f"touches {t.buffer} in the part of another thread")


def _ends(region: Region) -> tuple[int, int]:
    """The first element that a region reaches, and the last one, of the array as it lies."""
    steps = [prod(region.shape[d + 1 :]) for d in range(len(region.shape))]
    low = sum(run.first * step for run, step in zip(region.runs, steps, strict=True))
    return low, sum(run.last * step for run, step in zip(region.runs, steps, strict=True))


def _race(a: _Touch, b: _Touch, threads: int, shared_out: _SharedOut, fixed: frozenset[Axis]) -> bool:
    """Whether one of so many threads touches what another does."""
    for one, other in permutations(range(threads), 2):
        both = shared_out.part(a, one, threads, fixed), shared_out.part(b, other, threads, fixed)
        if any(_depend_on_turns(mine, yours) for mine, yours in product(*both)):
            both = shared_out.part(a, one, threads, frozenset()), shared_out.part(b, other, threads, frozenset())
        if any(shared(mine, yours) != 0 for mine, yours in product(*both)):
            return True
    return False
