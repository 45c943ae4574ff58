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
from typing import Any

from .affine import Affine, Axis, of
from .former import EXPENSIVE
from .kernels import Buffer, Index, Item, Kernel, Value, bounds, rebuilt, reindexed, roots
from .phases import accesses
from .siblings import MOST_SUMS, key_of
from .target import Target

Where = Mapping[Axis, Axis]  # an axis of the kernel that sums -> that of the one which makes what it sums


def summed(items: Sequence[Item], target: Target) -> list[Item]:
    """The items, each such sum in the kernel that makes what it is a sum of."""
    made = list(items)
    for item in items:
        if not isinstance(item, Kernel) or item not in made or not _makes(item, target):
            continue
        at = made.index(item)
        for reader in made[at + 1 :]:
            maker = made[at]
            assert isinstance(maker, Kernel), "it stands where the first one did"
            if isinstance(reader, Kernel) and _is_sum(reader) and _can_come(reader, made, at):
                both = next((b for w in _ways(maker, reader) if (b := _joined(maker, reader, w)) is not None), None)
                if both is not None:
                    made[at] = both
                    made.remove(reader)
    return made


def _makes(kernel: Kernel, target: Target) -> bool:
    """Whether it does no more than compute small arrays, nothing of which is expensive."""
    simple = not kernel.reduced and not kernel.sequential and not kernel.late and kernel.inner is None
    scratch = all(s.buffer.space == "scratch" and s.mode == "set" and s.buffer.bytes <= target.level2 for s in kernel.stores)
    told = not any(isinstance(i, Value) for s in kernel.stores for i in s.index)
    return simple and scratch and told and len(_large(kernel)) > 1 and not any(v.op in EXPENSIVE for v in kernel.values())


def _is_sum(kernel: Kernel) -> bool:
    """Whether it sums over all of its axes, from end to end."""
    whole = not kernel.sequential and not kernel.between and not bounds(kernel.values()) and kernel.inner is None
    return bool(kernel.reduced) and whole and not kernel.late and all(s.mode == "set" for s in kernel.stores)


def _large(kernel: Kernel) -> list[Axis]:
    """The axes that count."""
    return [a for a in (*kernel.domain, *kernel.reduced) if a.extent > 1]


def _can_come(reader: Kernel, items: Sequence[Item], at: int) -> bool:
    """Whether its work may be done as early as item `at`: nothing up to it writes what it reads, or touches what it writes, and nothing
    but that item still wants the old value of state that it writes."""
    touched = list(accesses(reader))
    reads, writes = ({a.buffer for a in touched if a.write == write} for write in (False, True))
    between = [a for i in items[at + 1 : items.index(reader)] for a in accesses(i)]
    rest = [i for i in items[at + 1 :] if i is not reader and not (isinstance(i, Kernel) and i.late)]
    old = {a.buffer for i in rest for a in accesses(i) if not a.write and a.buffer.space == "state"}
    return not any(a.buffer in writes or (a.write and a.buffer in reads) for a in between) and not old & writes


def _ways(maker: Kernel, reader: Kernel) -> Iterator[Where]:
    """Which axes of the maker those of the sums may be: those along which both go through the same array."""
    one = [(s.buffer, s.index, s.view) for s in maker.stores] + list(_whole(maker))
    for (a, i, view), (b, j, shape) in product(one, _whole(reader)):
        where = _matched(j, i) if a is b and view == shape else None
        if where is not None and {*where} == {*_large(reader)} and {*where.values()} == {*_large(maker)}:
            yield where


def _whole(kernel: Kernel) -> Iterator[tuple[Buffer, Index, tuple[int, ...]]]:
    """What it reads at a place of its own for each point."""
    for v in kernel.loads():
        if v.buffer is not None and v.axes == {*_large(kernel)}:
            yield v.buffer, v.index, v.shape


def _matched(index: Index, other: Index) -> Where | None:
    """The axes of one index that stand where those of the other do."""
    where: dict[Axis, Axis] = {}
    for i, j in zip(index, other, strict=True):
        if not isinstance(i, Affine) or not isinstance(j, Affine) or i.constant != j.constant or len(i.terms) != len(j.terms):
            return None
        for (a, c), (b, d) in zip(*(sorted(x.terms, key=lambda t: t[1]) for x in (i, j)), strict=True):
            if c != d or a.extent != b.extent or where.setdefault(a, b) is not b:
                return None
    return where if len({*where.values()}) == len(where) else None


def _joined(maker: Kernel, reader: Kernel, where: Where) -> Kernel | None:
    """The maker with the sums of the reader; None if that does not go together."""
    domain, reduced = (tuple(where[a] for a in axes if a in where) for axes in (reader.domain, reader.reduced))
    fits = not maker.reduced or {*maker.reduced} == {*reduced}
    alike = (where.get(reader.unit) if reader.unit is not None else None) is _unit(maker) and _unit(maker) not in reduced
    stored = {s.buffer: s for s in maker.inside() or maker.stores}
    lanes = {a for s in stored.values() for a in s.index[-1].axes}
    if not fits or not alike or lanes & {*reduced} or not lanes:
        return None
    known: dict[Any, Value] = {key_of(v): v for v in maker.values()}

    def same(v: Value) -> Value:
        s = stored.get(v.buffer) if v.buffer is not None else None
        return s.value if s is not None and (v.index, v.shape) == (s.index, s.view) else known.setdefault(key_of(v), v)

    places = {a: of(where[a]) if a in where else Affine() for a in (*reader.domain, *reader.reduced)}
    table = rebuilt(roots(reader.stores), {}, places, same)
    sums = [replace(s, value=table[s.value], index=reindexed(s.index, table, places)) for s in reader.stores]
    origin = tuple(dict.fromkeys((*maker.origin, *reader.origin)))
    both = replace(maker, domain=domain, reduced=reduced, stores=[*maker.stores, *sums], origin=origin)
    return both if _is_right(both, {*stored}) else None


def _unit(kernel: Kernel) -> Axis | None:
    return kernel.unit if kernel.unit is not None and kernel.unit.extent > 1 else None


def _is_right(kernel: Kernel, inside: set[Buffer]) -> bool:
    """Whether it reads nothing of what it stores inside of its sums, and state only where it writes it; and has not too many sums."""
    written = {s.buffer: (s.index, s.view) for s in kernel.stores}
    read = [(v.buffer, (v.index, v.shape)) for v in kernel.loads() if v.buffer in written]
    own = all(b not in inside and b is not None and written[b] == place for b, place in read)
    return own and sum(v.op == "reduce" for v in kernel.values()) <= MOST_SUMS
