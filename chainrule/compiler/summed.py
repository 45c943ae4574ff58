"""Sums over an array, added up by the kernel that makes it.

In: kernels. Out: kernels, in which one that computes an array element by element also sums what others sum up over it, or over what it is
made of; each element is stored where it is a term. The gradient of a hidden layer before a single output is made so, from its
activations: those who sum over its rows are the gradients of the layer's bias and of the output's weights. Together they read the
activations once in place of three times, and the gradient not at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product

from .affine import Affine, Axis, of
from .former import EXPENSIVE
from .kernels import Buffer, Index, Item, Kernel, Value, bounds
from .phases import accesses
from .siblings import MOST_SUMS, with_stores_of
from .target import Target

Place = tuple[Buffer, Index, tuple[int, ...]]  # what is read or written where, and as what shape it is seen
Match = Mapping[Axis, Axis]  # an axis of the kernel that sums -> that of the one which makes what it sums


def summed(items: Sequence[Item], target: Target) -> list[Item]:
    """The items, each such sum in the kernel that makes what it is a sum of."""
    order = _Placed(items)
    for item in items:
        if isinstance(item, Kernel) and item in order.place and _makes(item, target):
            maker = item
            for reader in order.readers(item):
                both = _both(maker, reader) if order.can_come(reader, maker) else None
                if both is not None:
                    order.join(maker, reader, both)
                    maker = both
    return sorted(order.place, key=order.place.__getitem__)


class _Placed:
    """Items, and which of them touch a buffer."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.place = {item: n for n, item in enumerate(items)}
        self._touching: dict[Buffer, dict[Item, set[bool]]] = {}  # whether each reads it or writes to it
        self._sums: dict[Buffer, list[Kernel]] = {}
        for item in items:
            self._note(item)
            if isinstance(item, Kernel) and _is_sum(item):
                for buffer in dict.fromkeys(b for b, _, _ in _whole(item)):
                    self._sums.setdefault(buffer, []).append(item)

    def _note(self, item: Item) -> None:
        for a in accesses(item):
            self._touching.setdefault(a.buffer, {}).setdefault(item, set()).add(a.write)

    def join(self, maker: Kernel, reader: Kernel, both: Kernel) -> None:
        """One kernel in place of two."""
        del self.place[reader]
        self.place[both] = self.place.pop(maker)
        self._note(both)

    def readers(self, maker: Kernel) -> list[Kernel]:
        """The sums after it over an array that it makes, or that it is made of."""
        arrays = dict.fromkeys(b for b, _, _ in (*_stored(maker), *_whole(maker)))
        found = dict.fromkeys(k for b in arrays for k in self._sums.get(b, ()))
        later = (k for k in found if self.place.get(k, -1) > self.place[maker])
        return sorted(later, key=self.place.__getitem__)

    def can_come(self, reader: Kernel, maker: Kernel) -> bool:
        """Whether its work may be done as early as the maker's: nothing up to it writes what it reads, or touches what it writes, and
        nothing after the maker but itself still wants the old value of state that it writes."""
        first, last = self.place[maker], self.place[reader]
        for a in accesses(reader):
            for item, how in self._touching[a.buffer].items():
                at = self.place.get(item, -1)
                if first < at < last and (a.write or True in how):
                    return False
                late = isinstance(item, Kernel) and item.late
                if at > first and at != last and a.write and a.buffer.space == "state" and False in how and not late:
                    return False
        return True


def _makes(kernel: Kernel, target: Target) -> bool:
    """Whether it does no more than compute small arrays, nothing of which is expensive."""
    simple = not kernel.reduced and not kernel.late and kernel.inner is None
    scratch = all(s.buffer.space == "scratch" and s.mode == "set" and s.buffer.bytes <= target.level2 for s in kernel.stores)
    told = not any(isinstance(i, Value) for s in kernel.stores for i in s.index)
    return simple and scratch and told and not any(v.op in EXPENSIVE for v in kernel.values())


def _is_sum(kernel: Kernel) -> bool:
    """Whether it sums, or takes the largest, over all that there is along its axes."""
    whole = not kernel.between and not bounds(kernel.values()) and kernel.inner is None
    return bool(kernel.reduced) and whole and not kernel.late and all(s.mode == "set" for s in kernel.stores)


def _large(kernel: Kernel) -> list[Axis]:
    """The axes that count."""
    return [a for a in (*kernel.domain, *kernel.reduced) if a.extent > 1]


def _both(maker: Kernel, reader: Kernel) -> Kernel | None:
    """One kernel that does the work of two; None if that does not go together."""
    return next((both for match in _ways(maker, reader) if (both := _joined(maker, reader, match)) is not None), None)


def _ways(maker: Kernel, reader: Kernel) -> Iterator[Match]:
    """Which axes of the maker those of the sums may be: those along which both go through the same array."""
    for (a, i, view), (b, j, shape) in product((*_stored(maker), *_whole(maker)), _whole(reader)):
        match = _matched(j, i) if a is b and view == shape else None
        if match is not None:
            yield match


def _stored(maker: Kernel) -> Iterator[Place]:
    """Where it stores what it makes."""
    return ((s.buffer, s.index, s.view) for s in (maker.inside() or maker.stores))


def _whole(kernel: Kernel) -> Iterator[Place]:
    """What it reads along all axes."""
    for v in kernel.loads():
        if v.buffer is not None and v.axes == {*_large(kernel)}:
            yield v.buffer, v.index, v.shape


def _matched(index: Index, other: Index) -> Match | None:
    """The axes of one index, each at the place of one of the other."""
    match: dict[Axis, Axis] = {}
    for i, j in zip(index, other, strict=True):
        if not isinstance(i, Affine) or not isinstance(j, Affine) or len(i.terms) != len(j.terms):
            return None
        for (a, c), (b, d) in zip(*(sorted(x.terms, key=lambda t: t[1]) for x in (i, j)), strict=True):
            if c != d or a.extent != b.extent or match.setdefault(a, b) is not b:
                return None
    return match if len({*match.values()}) == len(match) else None


def _joined(maker: Kernel, reader: Kernel, match: Match) -> Kernel | None:
    """The maker with the sums of the reader; None if that does not go together."""
    domain, reduced = (tuple(match[a] for a in axes if a in match) for axes in (reader.domain, reader.reduced))
    made = {s.buffer: s for s in maker.inside() or maker.stores}
    along = {a for s in made.values() for a in next(i.axes for i in reversed(s.index) if i.axes)}  # what lies innermost in memory
    if not reduced or along & {*reduced} or (maker.reduced and {*maker.reduced} != {*reduced}):
        return None
    unit = _unit(reader)
    if _unit(maker) is not (match.get(unit, unit) if unit is not None else None):
        return None

    def own_value(v: Value) -> Value:
        s = made.get(v.buffer) if v.buffer is not None else None
        return s.value if s is not None and (v.index, v.shape) == (s.index, s.view) else v

    where = {a: of(match[a]) if a in match else Affine() for a in (*reader.domain, *reader.reduced)}
    both = with_stores_of(replace(maker, domain=domain, reduced=reduced), reader, where, own_value)
    return both if _is_right(both) else None


def _unit(kernel: Kernel) -> Axis | None:
    return kernel.unit if kernel.unit is not None and kernel.unit.extent > 1 else None


def _is_right(kernel: Kernel) -> bool:
    """Whether it reads nothing of what it stores but the old value of state, and that only where it stores the new one; and has not too
    many sums."""
    written = {s.buffer: (s.index, s.view) for s in kernel.stores}
    read = [(v.buffer, (v.index, v.shape)) for v in kernel.loads() if v.buffer in written]
    old = all(b is not None and b.space == "state" and written[b] == place for b, place in read)
    return old and sum(v.op == "reduce" for v in kernel.values()) <= MOST_SUMS
