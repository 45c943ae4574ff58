"""Whether kernels are what the passes after them take them for.

In: kernels and loops in an order in which they could run. Out: nothing, or an error that shows the kernel at fault: it would be a
defect of chainrule, which would show as wrong numbers or a crash.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import numpy as np

from ..errors import GraphError
from .affine import Affine, Axis, flat, of
from .kernels import Buffer, Item, Kernel, Limits, Loop, Store, Value, bounds, kernels_text, limits_of, ordered, plain
from .regions import Region, region, shared


def verify(items: Sequence[Item]) -> None:
    """Whether kernels are what the passes after this one take them for.

    Each by itself: indices lie inside what they index, and that is the buffer, whatever shape it is seen under; every axis of a value
    is one of the kernel's or of a loop around it; all sums of a kernel run over its reduced axes; what is stored has the buffer's type,
    and no store writes an element twice, but for one that adds.

    All together, in their order: stores of one kernel write different elements of a buffer; what a kernel stores where others have
    stored lies wholly inside of that (it is written over: a loop's state, what is padded), or is of a buffer that has been read since
    (its memory serves again); each element of a scratch buffer or a result that is read, or added to, has been written before, by an
    earlier kernel or an earlier turn of a loop; results and new state are written whole.

    This is exact where indices are evenly spaced places along each dimension. Not told, and so let pass: reads of and stores to a
    buffer in which a place was stored that is looked up while running, that runs along two dimensions at once, or with gaps that are
    not even; and reads at such places, unless the whole buffer has been written. Limits that are only known while running (where rows
    of a batch or a loop's chunk end) are taken to be as wide as the buffer, and a loop's `turns` to take each of its items at all places.
    Raises: `GraphError`.
    """
    _verify(items, frozenset(), {})
    memory = _Memory()
    memory.items(items)
    memory.ended()


def _verify(items: Sequence[Item], around: frozenset[Axis], limits: Limits) -> None:
    for item in items:
        if isinstance(item, Loop):
            _verify(item.items, around | {item.axis}, {**limits, **limits_of(item)})
            continue
        known = {*item.domain, *item.reduced, *around}
        within, confined = {**limits, **limits_of(item)}, bounds(item.values())
        for v in item.values():
            demand(v.axes <= known, item, f"{v.op} depends on an axis from elsewhere")
            if v.op == "load":
                assert v.buffer is not None
                demand(_inside(v.index, v.shape, within, confined), item, f"reads {v.buffer} outside of it")
                demand(_is_seen(v.buffer, v.shape, v.dtype), item, f"reads {v.buffer} as what it is not")
            if v.op == "reduce":
                demand(set(v.attrs["over"]) == set(item.reduced), item, "sums over other axes than its own")
        for_terms = item.inside()
        for s in item.stores:
            demand(_inside(s.index, s.view, within, {}), item, f"writes {s.buffer} outside of it")
            demand(_is_seen(s.buffer, s.view, s.value.dtype), item, f"writes {s.buffer} as what it is not")
            used = frozenset[Axis]().union(*(i.axes for i in s.index))
            inside = s in for_terms
            axes = (*item.domain, *item.reduced) if inside else item.domain
            demand(used <= {*axes, *around}, item, f"writes {s.buffer} along an axis from elsewhere")
            demand(s.mode == "add" or _once(s, axes), item, f"writes elements of {s.buffer} twice")
            demand(inside or not s.value.axes & set(item.reduced), item, "stores what still has a reduced axis")
            if inside:
                demand(s.mode == "set", item, "adds to what it stores inside of sums")
                demand(not item.between and not bounds(item.values()), item, "does not store all terms of its sums")
                demand(all(v.op != "reduce" for v in ordered([s.value])), item, "stores sums inside of sums")
        for axis, both in item.between.items():
            demand(axis in item.reduced[:-1], item, "does not sum over all of what it sums over last")  # that has no such limits
            outer = {*around, *item.domain, *item.reduced[: item.reduced.index(axis)]}
            demand(all(v.axes <= outer for v in both), item, "sums over an axis as far as nobody knows yet")


def demand(holds: bool, item: Item, problem: str) -> None:
    """An error that shows this item, if something does not hold of it."""
    if not holds:
        raise GraphError(f"kernel {item.name}, which is a defect of chainrule: {problem}\n{kernels_text([item])}")


def _inside(index: Sequence[Affine | Value], shape: tuple[int, ...], limits: Limits, confined: Mapping[Affine, int]) -> bool:
    """Whether an index is one of an array, as far as its axes go. confined: sums of axes, and below what they stay."""
    if len(index) != len(shape):
        return False
    empty = any(a.extent == 0 for i in index for a in i.axes)
    return empty or all(
        low >= 0 and high < n for (low, high), n in zip(ranges(index, shape, limits, confined), shape, strict=True)
    )


def ranges(
    index: Sequence[Affine | Value], shape: tuple[int, ...], limits: Limits, confined: Mapping[Affine, int]
) -> list[tuple[int, int]]:
    """In each dimension, the smallest and largest place of an index."""
    found = []
    for i, n in zip(index, shape, strict=True):
        low, high = (0, n - 1) if isinstance(i, Value) else _range(i, limits)
        inside = confined.get(i) if isinstance(i, Affine) else None
        found.append((low, high) if inside is None else (max(low, 0), min(high, inside - 1)))
    return found


def _range(i: Affine, limits: Limits) -> tuple[int, int]:
    """The smallest and largest that an index can be, its axes between their limits."""
    rising = [(a, *limits[a]) for a, c in i.terms if c > 0 and a in limits]
    smallest = [i.smallest, *(i.replaced({a: first}).smallest for a, firsts, _ in rising for first in firsts)]
    largest = [i.largest, *(i.replaced({a: end + -1}).largest for a, _, ends in rising for end in ends)]
    return max(smallest), min(largest)


def _is_seen(buffer: Buffer, shape: tuple[int, ...], dtype: np.dtype[Any]) -> bool:
    """Whether a buffer can be seen as an array of this shape and type."""
    return prod(shape) == buffer.size and dtype == buffer.dtype


def _once(store: Store, domain: Sequence[Axis]) -> bool:
    """Whether each point of the domain is stored at a place of its own: a step along an axis leads further than all shorter ones
    together."""
    if any(isinstance(i, Value) for i in store.index):
        return False
    if not all(a.extent for a in domain):
        return True
    position, reach = flat(plain(store.index), store.view), 0
    for step, extent in sorted((abs(position.coefficient(a)), a.extent) for a in domain if a.extent > 1):
        if step <= reach:
            return False
        reach += step * (extent - 1)
    return True


# ---- what has been written --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Part:
    """What a kernel reads of a buffer, or stores there. after: how many stores there had been before it; seen: how many before the buffer
    was last read."""

    item: Item
    buffer: Buffer
    region: Region
    after: int = 0
    seen: int = 0


@dataclass
class _Memory:
    """What has been written so far, item after item. parts, waiting: for all items and each loop around: what has been written, in a
    loop by the turn at hand, no element twice; and what this turn reads and did not write. sizes: of the parts that are the
    same in all turns; whole: buffers of which that is all; untold: those of which nothing can be said; stores: how many there were;
    seen: for each buffer, how many before it was last read; limits, confined: of axes and their sums, as far as they are known."""

    parts: list[dict[Buffer, list[_Part]]] = field(default_factory=lambda: [{}])
    waiting: list[list[_Part]] = field(default_factory=lambda: [[]])
    loops: set[Axis] = field(default_factory=set)
    sizes: dict[Buffer, int] = field(default_factory=dict)
    whole: set[Buffer] = field(default_factory=set)
    untold: set[Buffer] = field(default_factory=set)
    stores: int = 0
    seen: dict[Buffer, int] = field(default_factory=dict)
    limits: Limits = field(default_factory=dict)
    confined: Mapping[Affine, int] = field(default_factory=dict)

    def items(self, items: Sequence[Item]) -> None:
        for item in items:
            if isinstance(item, Kernel):
                self._kernel(item)
            elif item.axis.extent:
                self._loop(item)

    def ended(self) -> None:
        """Nothing follows."""
        for buffer, parts in self.parts[0].items():
            if buffer.space in ("result", "state") and buffer not in self.whole | self.untold:
                demand(False, parts[-1].item, f"is the last to write {buffer}, of which something is missing")

    # ---- kernels -------------------------------------------------------------------------------------------------------------

    def _kernel(self, kernel: Kernel) -> None:
        before, self.limits, self.confined = self.limits, {**self.limits, **limits_of(kernel)}, bounds(kernel.values())
        for v in kernel.loads():
            assert v.buffer is not None
            self._look(kernel, v.buffer, v.index, v.shape)
        for s in kernel.stores:
            if s.mode == "add":
                self._look(kernel, s.buffer, s.index, s.view)
        own: dict[Buffer, list[Region]] = {}
        for s in kernel.stores:
            if s.mode == "set":
                own.setdefault(s.buffer, []).append(self._region(s.index, s.view))
        for buffer, regions in own.items():
            for made in _disjoint(regions, kernel, buffer):
                self.stores += 1
                self._write(_Part(kernel, buffer, made, self.stores, self.seen.get(buffer, 0)))
        self.limits = before

    def _region(self, index: Sequence[Affine | Value], shape: tuple[int, ...]) -> Region:
        return region(index, shape, ranges(index, shape, self.limits, self.confined), self.loops)

    def _look(self, item: Item, buffer: Buffer, index: Sequence[Affine | Value], shape: tuple[int, ...]) -> None:
        if buffer.space in ("scratch", "result"):
            self.seen[buffer] = self.stores + 1
            if buffer not in self.whole:
                self._need(_Part(item, buffer, self._region(index, shape)))

    def _need(self, part: _Part) -> None:
        """What is read has been written; in a loop this is asked again when all that a turn writes is known."""
        if part.buffer in self.untold:
            return
        found = [shared(part.region, p.region) for table in self.parts for p in table.get(part.buffer, ())]
        if any(n is None for n in found) or sum(n or 0 for n in found) >= part.region.size:
            return
        if len(self.parts) > 1:
            self.waiting[-1].append(part)
        else:
            demand(not part.region.exact, part.item, f"reads {part.buffer} where nobody has written")

    def _write(self, part: _Part) -> None:
        buffer, made = part.buffer, part.region
        if buffer in self.whole or buffer in self.untold or not made.size:
            return
        met = [(table, p, shared(made, p.region)) for table in self.parts for p in table.get(buffer, ())]
        if not made.exact or any(n is None for _, _, n in met):
            self.untold.add(buffer)
            return
        common = sum(n or 0 for _, _, n in met)
        if common < made.size:
            for table, p, n in met:
                demand(not n or p.after < part.seen, part.item, f"writes over some of {buffer} that nobody has read")
                if n == p.region.size:
                    table[buffer].remove(p)
                    self._count(p, -1)
                elif n:
                    self.untold.add(buffer)
            self._keep(part)
            self._count(part, 1)

    def _keep(self, part: _Part) -> None:
        known = self.parts[-1].setdefault(part.buffer, [])
        joined = known[-1].region.joined(part.region) if known else None
        known[len(known) - (joined is not None) :] = [
            part if joined is None else replace(known[-1], item=part.item, region=joined)
        ]

    def _count(self, part: _Part, sign: int) -> None:
        if part.region.fixed:
            self.sizes[part.buffer] = self.sizes.get(part.buffer, 0) + sign * part.region.size
            if self.sizes[part.buffer] == part.buffer.size:
                self.whole.add(part.buffer)

    # ---- loops ---------------------------------------------------------------------------------------------------------------

    def _loop(self, loop: Loop) -> None:
        if loop.ends is not None:
            self._look(loop, loop.ends.steps, [of(Axis("row", n)) for n in loop.ends.steps.shape], loop.ends.steps.shape)
        before, self.limits = self.limits, {**self.limits, **limits_of(loop)}
        self.loops.add(loop.axis)
        self.parts.append({})
        self.waiting.append([])
        taken = dict.fromkeys(which for which, _ in loop.turns) or range(len(loop.items))  # in the order in which they first run
        self.items([loop.items[which] for which in taken])
        self.loops.remove(loop.axis)
        self.limits = before
        turn, reads = self.parts.pop(), self.waiting.pop()
        for part in reads:
            left = _left(part.region, [p.region for p in turn.get(part.buffer, ())], loop)
            if left is not None:
                self._need(replace(part, region=left))
        for part in (p for parts in turn.values() for p in parts):
            whole = part.region.over(loop.axis, loop.axis.extent)
            if whole is part.region:
                self._keep(part)
            else:
                self._write(replace(part, region=whole))


def _disjoint(regions: Sequence[Region], kernel: Kernel, buffer: Buffer) -> list[Region]:
    """What the stores of one kernel write of a buffer, if no two of them write the same element: nobody says which would be last."""
    made: list[Region] = []
    for r in regions:
        demand(not any(shared(r, other) for other in made), kernel, f"writes elements of {buffer} by two stores")
        joined = made[-1].joined(r) if made else None
        made[len(made) - (joined is not None) :] = [r if joined is None else joined]
    return made


def _left(read: Region, turn: Sequence[Region], loop: Loop) -> Region | None:
    """What all turns of a loop read that no turn has written, if each reads this region and writes those; None if that is nothing, or
    only known while running."""
    axis, extent = loop.axis, loop.axis.extent
    for turns in {n for r in turn if (n := _turns_before(read, r, axis)) is not None}:
        before = -turns if loop.reverse else turns
        found = [shared(read, r.moved(axis, -turns)) for r in turn]
        if before > 0 and (None in found or sum(n or 0 for n in found) >= read.size):
            first = min(before, extent)  # so many turns have none so long before them
            return read.over(axis, first, extent - first if loop.reverse else 0) if loop.between is None else None
    return read.over(axis, extent)


def _turns_before(read: Region, written: Region, axis: Axis) -> int | None:
    """How much smaller the axis of a loop was when what is read now was written; None if it was not."""
    if read.base != written.base:
        return None
    for r, w, b in zip(read.runs, written.runs, read.base, strict=True):
        c = b.coefficient(axis)
        if c:
            return (w.first - r.first) // c if (w.first - r.first) % c == 0 else None
    return None
