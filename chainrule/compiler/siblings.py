"""Sums over all of one array, in one kernel: so it is read once.

In: kernels. Out: kernels, in which those that sum over the same axes what they read in the same order, such as a gradient, and its
products with something else, are one. Batch norm has four such sums on the way back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from .affine import Affine, Axis, of
from .kernels import Buffer, Item, Kernel, Value, bounds, plain, rebuilt, reindexed, roots
from .phases import accesses

MOST_SUMS = 4  # of a kernel: each has registers of its own


def with_siblings(items: Sequence[Item]) -> list[Item]:
    """The items, each of such sums in the first kernel that it can be part of."""
    made: list[Item] = []
    for item in items:
        sibling = _sibling(made, item) if isinstance(item, Kernel) and _is_sum(item) else None
        if sibling is None or not isinstance(item, Kernel):
            made.append(item)
        else:
            made[made.index(sibling)] = _joined(sibling, item)
    return made


def _is_sum(kernel: Kernel) -> bool:
    """Whether it sums up, over all axes that there are, and stores scratch memory that nothing else is known of."""
    whole = not kernel.sequential and not kernel.between and not bounds(kernel.values())
    return bool(kernel.reduced) and whole and all(s.buffer.space == "scratch" and s.mode == "set" for s in kernel.stores)


def _sibling(made: Sequence[Item], kernel: Kernel) -> Kernel | None:
    """The first kernel that can do this one's work as well: nothing from there on writes what it reads, or touches what it writes."""
    reads, writes = _touched(kernel)
    found = None
    for other in reversed(made):
        others, written = _touched(other)
        if written & (reads | writes) or others & writes:
            break
        if isinstance(other, Kernel) and _is_sum(other) and _alike(other, kernel):
            found = other
    return found


def _touched(item: Item) -> tuple[set[Buffer], set[Buffer]]:
    """What it reads and what it writes."""
    every = list(accesses(item))
    return {a.buffer for a in every if not a.write}, {a.buffer for a in every if a.write}


def _alike(a: Kernel, b: Kernel) -> bool:
    """Whether both have the same axes and read some array, along all of them, in the same order."""
    if _shape(a) != _shape(b) or sum(v.op == "reduce" for k in (a, b) for v in k.values()) > MOST_SUMS:
        return False
    return bool(_whole(a) & _whole(b))


def _shape(kernel: Kernel) -> Any:
    axes = (*kernel.domain, *kernel.reduced)
    own = tuple(axes.index(x) if x is not None else None for x in (kernel.unit, kernel.inner))
    return [a.extent for a in axes], len(kernel.domain), own, kernel.length


def _whole(kernel: Kernel) -> set[Any]:
    """The loads that have all axes, as far as they say what is read in which order."""
    axes = (*kernel.domain, *kernel.reduced)
    number = {a: i for i, a in enumerate(axes)}
    return {
        (v.buffer, v.shape, tuple((i.constant, frozenset((number[a], c) for a, c in i.terms)) for i in plain(v.index)))
        for v in kernel.loads()
        if v.axes == {*axes} and not any(isinstance(i, Value) for i in v.index)
    }


def _joined(a: Kernel, b: Kernel) -> Kernel:
    """The first kernel with the sums of the second, in terms of its axes; what both compute it computes once."""
    return with_stores_of(a, b, {y: of(x) for x, y in zip((*a.domain, *a.reduced), (*b.domain, *b.reduced), strict=True)})


def with_stores_of(a: Kernel, b: Kernel, where: Mapping[Axis, Affine], change: Callable[[Value], Value] = lambda v: v) -> Kernel:
    """A kernel that stores what another one does as well. where: the other's axes in terms of its own; change: the last word on what the
    other's values become. What both compute is computed once."""
    known: dict[Any, Value] = {key_of(v): v for v in a.values()}

    def same(v: Value) -> Value:
        new = change(v)
        return known.setdefault(key_of(new), new)

    table = rebuilt(roots(b.stores), {}, where, same)
    stores = [replace(s, value=table[s.value], index=reindexed(s.index, table, where)) for s in b.stores]
    return replace(a, stores=[*a.stores, *stores], origin=tuple(dict.fromkeys((*a.origin, *b.origin))))


def key_of(v: Value) -> Any:
    """Equal for values that are the same but for identity, made of the same arguments."""
    return v.op, v.dtype, v.args, repr(sorted(v.attrs.items(), key=lambda a: a[0])), v.buffer, v.index, v.shape
