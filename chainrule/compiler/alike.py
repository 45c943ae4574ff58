"""Kernels that are the same but for the buffers they touch: what is made for one serves the others.

In: kernels. Out: for each the first one like it, and what in one stands for what in the other. A deep network has many layers of one
size, so most of its kernels are scheduled, lowered and written once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from .affine import Affine, Axis
from .kernels import Buffer, Kernel, Value
from .schedule import Schedule


@dataclass(frozen=True)
class Likeness:
    """key: equal for kernels that are alike; axes, buffers: those of this kernel, in an order that corresponds."""

    key: Any
    axes: tuple[Axis, ...]
    buffers: tuple[Buffer, ...]


def likeness(kernel: Kernel) -> Likeness:
    """A kernel with numbers in place of its axes, buffers and values."""
    axes: dict[Axis, int] = {a: i for i, a in enumerate((*kernel.domain, *kernel.reduced))}
    buffers: dict[Buffer, int] = {}
    numbers: dict[Value, int] = {}

    def indices(index: Iterable[Affine | Value]) -> tuple[Any, ...]:
        return tuple(("value", numbers[i]) if isinstance(i, Value) else affine(i) for i in index)

    def affine(i: Affine) -> tuple[Any, ...]:
        return (i.constant, *((axes.setdefault(a, len(axes)), c) for a, c in i.terms))

    def buffer(b: Buffer | None) -> Any:
        if b is None:
            return None
        apart = b.part_of[0].shape if b.part_of is not None else b.apart  # how far its copies or its parts are from each other
        return (buffers.setdefault(b, len(buffers)), b.shape, b.dtype.str, apart, b.part_of is None)

    values = []
    for v in kernel.values():
        numbers[v] = len(numbers)
        attrs = tuple((k, tuple(axes[x] for x in a) if k == "over" else repr(a)) for k, a in sorted(v.attrs.items()))
        args = tuple(numbers[a] for a in v.args)
        values.append((v.op, v.dtype.str, args, attrs, buffer(v.buffer), indices(v.index), v.shape))
    stores = [(buffer(s.buffer), indices(s.index), numbers[s.value], s.mode, s.view) for s in kernel.stores]
    unit = axes.get(kernel.unit) if kernel.unit is not None else None
    inner = axes.get(kernel.inner) if kernel.inner is not None else None
    extents = tuple(a.extent for a in axes)
    between = tuple((axes[a], *(numbers[v] for v in both)) for a, both in kernel.between.items())
    shape = (len(kernel.domain), len(kernel.reduced), extents, unit, inner, kernel.length, kernel.sequential)
    key = (shape, tuple(values), tuple(stores), between)
    return Likeness(key, tuple(axes), tuple(buffers))


def adapted(made: Schedule, first: Likeness, other: Likeness) -> Schedule:
    """The schedule of one kernel for another that is like it."""
    table: dict[Axis | None, Axis | None] = {None: None, **dict(zip(first.axes, other.axes, strict=True))}
    return replace(made, lanes=table[made.lanes], tile=table[made.tile], side=table[made.side], across=table[made.across])


def counterparts(kernel: Kernel, likeness: Likeness) -> tuple[Buffer, ...]:
    """All buffers that the code of a kernel touches, its own memory for operands and sums included."""
    own = [*kernel.packed.values(), *([kernel.partial] if kernel.partial is not None else [])]
    return (*likeness.buffers, *own)
