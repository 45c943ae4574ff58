"""What kernels cost: operations, bytes, and the time that they need at least.

In: a kernel, or a loop of kernels. Out: a `Work`, counted from the kernel's own index space, so it is exact for the code as it runs:
what fusion computes twice counts twice.

An operation is one result of an operator on floating-point numbers; a multiply-add is two, and exp, tanh and their like are as many as
their code has (elementary.py), about twenty to 140. Copies, casts, choices (where) and comparisons are none. Bytes are those that a
kernel has to read and to write at least: each element once for each run of the kernel, however often it is read again from registers or
the nearest cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

from .affine import Affine, Axis
from .driver import ORDER
from .elementary import FUNCTIONS, operations
from .former import VIRTUAL
from .kernels import Buffer, Item, Kernel, Limits, Loop, Value, bounds, kernels_of, limits_of

FREE = {"load", "constant", "iota", "cast", "where", "philox", "checked"}  # no operations on floating-point numbers


@dataclass(frozen=True)
class Work:
    """flops: operations on floating-point numbers; read, written: bytes."""

    flops: int
    read: int
    written: int

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.read + other.read, self.written + other.written)

    def times(self, count: float) -> Work:
        """So many times this."""
        return Work(round(self.flops * count), round(self.read * count), round(self.written * count))


def work(item: Item, around: frozenset[Axis] = frozenset()) -> Work:
    """What an item costs. around: the axes of the loops that it stands in, each turn of which is counted by the loop."""
    if isinstance(item, Loop):
        inside = [work(i, around | {item.axis}).times(n) for i, n in zip(item.items, repetitions(item), strict=True)]
        return sum(inside, Work(0, 0, 0))
    read, written = traffic(item, around)
    limits, confined = limits_of(item), bounds(item.values())
    flops = sum(_operations(v, around, limits, confined) for v in item.values())
    return Work(round(flops), sum(read.values()), sum(written.values()))


def repetitions(loop: Loop) -> list[float]:
    """How often each of its items runs; a loop of which single turns are run, in parts of all its turns."""
    if not loop.turns:
        return [_places(loop.axis, limits_of(loop))] * len(loop.items)
    parts = [i.axis.extent if isinstance(i, Loop) else 1 for i in loop.items]
    return [sum(which == n for which, _ in loop.turns) / part for n, part in enumerate(parts)]


def traffic(kernel: Kernel, around: frozenset[Axis] = frozenset()) -> tuple[dict[Buffer, int], dict[Buffer, int]]:
    """The bytes that a kernel reads and writes, of each buffer. What it adds to, it reads as well."""
    added = [(s.buffer, _axes(s.index)) for s in kernel.stores if s.mode == "add"]
    loads = [(v.buffer, v.axes) for v in kernel.loads() if v.buffer is not None]
    stores = [(s.buffer, _axes(s.index)) for s in kernel.stores]
    limits = limits_of(kernel)
    return _bytes([*loads, *added], around, limits), _bytes(stores, around, limits)


def touched(items: Iterable[Item]) -> int:
    """Bytes of all that these items read and write, each element once."""
    return sum({b: n for k in kernels_of(list(items)) for part in traffic(k) for b, n in part.items()}.values())


def seconds(item: Item, peak: float, near: float, far: float) -> float:
    """The time that an item needs at least: max(operations / peak, bytes / bandwidth).

    Args: peak: operations a second; near: bytes a second of what a step makes for itself; far: of state, data and results.
    """
    done = work(item)
    return max(done.flops / peak, _moved(item, near, far, frozenset()))


def _moved(item: Item, near: float, far: float, around: frozenset[Axis]) -> float:
    if isinstance(item, Loop):
        inside = zip(item.items, repetitions(item), strict=True)
        return sum(n * _moved(i, near, far, around | {item.axis}) for i, n in inside)
    both = traffic(item, around)
    return sum(n / (near if b.space == "scratch" else far) for part in both for b, n in part.items())


def _operations(v: Value, around: frozenset[Axis], limits: Limits, confined: Mapping[Affine, int]) -> float:
    """Of a sum that is confined, only the terms that it has."""
    if v.op in FREE or v.dtype.kind != "f":
        return 0
    axes = v.args[0].axes if v.op == "reduce" else v.axes
    points = _points(axes, around, limits)
    for at, bound in confined.items():
        if at.axes <= axes and points:
            points = points * _inside(at, bound) / prod(a.extent for a in at.axes)
    return points * (operations(v.op, 8 * v.dtype.itemsize) if v.op in FUNCTIONS else 1)


def _inside(at: Affine, bound: int) -> int:
    """At how many points of its axes a sum is at least 0 and below `bound`."""
    reached = {at.constant: 1}
    for axis, c in at.terms:
        further: dict[int, int] = {}
        for place, times in reached.items():
            for i in range(axis.extent):
                further[place + c * i] = further.get(place + c * i, 0) + times
        reached = further
    return sum(times for place, times in reached.items() if 0 <= place < bound)


def _points(axes: Iterable[Axis], around: frozenset[Axis], limits: Limits) -> float:
    return prod(_places(a, limits) for a in set(axes) - around)


def _places(axis: Axis, limits: Limits) -> float:
    """How many values an axis takes; where its limits depend on other axes, on average over their values."""
    firsts, ends = limits.get(axis, ((), ()))
    others = list({a: None for i in (*firsts, *ends) for a in i.axes_in_order})
    points = list(product(*(range(a.extent) for a in others)))

    def at(i: Affine, point: Sequence[int]) -> int:
        return i.constant + sum(i.coefficient(a) * n for a, n in zip(others, point, strict=True))

    spans = (min([axis.extent, *(at(i, p) for i in ends)]) - max([0, *(at(i, p) for i in firsts)]) for p in points)
    return sum(max(0, n) for n in spans) / len(points)


def _axes(index: Iterable[Affine | Value]) -> frozenset[Axis]:
    return frozenset[Axis]().union(*(i.axes for i in index))


def _bytes(accesses: Iterable[tuple[Buffer, frozenset[Axis]]], around: frozenset[Axis], limits: Limits) -> dict[Buffer, int]:
    found: dict[Buffer, int] = {}
    for buffer, axes in accesses:
        found[buffer] = found.get(buffer, 0) + round(_points(axes, around, limits) * buffer.dtype.itemsize)
    return {b: min(n, b.bytes) for b, n in found.items()}  # parts that overlap


def sizes(item: Item) -> str:
    """Its loops: "32x128 over 64" for a sum over 64 numbers at each of 32 x 128 places, "20 times 3 kernels" for a loop."""
    if isinstance(item, Loop):
        count = len(list(kernels_of([item])))
        return f"{item.axis.extent} times {count} kernel{'s' * (count != 1)}"
    over = "x".join(str(a.extent) for a in item.reduced)
    return ("x".join(str(a.extent) for a in item.domain) or "1") + (f" over {over}" if over else "")


def layers(item: Item) -> tuple[str, ...]:
    """The dotted names of the layers that an item computes for; where no node says so, those whose state it reads or writes."""
    scopes = [n.scope for k in kernels_of([item]) for n in k.origin if n.scope]
    return tuple(dict.fromkeys(scopes or [b.name.rpartition(".")[0] for b in (*_written(item), *_read(item)) if _is_of_layer(b)]))


def copies_of_data(items: Iterable[Item]) -> set[Buffer]:
    """The buffers that hold rows of data, gathered by the numbers in a step's order."""
    found = set()
    for store in (s for k in kernels_of([*items]) for s in k.stores):
        row = store.value.args[0] if store.value.op == "cast" else store.value
        first = row.index[0] if row.op == "load" and row.index else None
        if isinstance(first, Value) and first.buffer is not None and first.buffer.name == ORDER:
            found.add(store.buffer)
    return found


def words(item: Item, most: int = 3) -> str:
    """What an item computes, in the names of operators, and what it gives: "contract add where -> scores"."""
    ops = list(dict.fromkeys(n.op for k in kernels_of([item]) for n in k.origin if n.op not in VIRTUAL))
    said = " ".join(ops[:most]) + (" ..." if len(ops) > most else "")
    if not ops:
        given = dict.fromkeys(b.name.removeprefix("in/") for b in _read(item) if b.name != ORDER)
        said = f"copy {', '.join(given)}"
    kept = dict.fromkeys(b.name.removeprefix("out/") for b in _written(item) if b.space in ("result", "state"))
    named = [n for n in kept if not n.startswith("slot/")] or list(kept)
    return f"{said} -> {', '.join(named)}" if named else said


def _written(item: Item) -> list[Buffer]:
    return [s.buffer for k in kernels_of([item]) for s in k.stores]


def _read(item: Item) -> list[Buffer]:
    return [v.buffer for k in kernels_of([item]) for v in k.loads() if v.buffer is not None]


def _is_of_layer(buffer: Buffer) -> bool:
    return buffer.space == "state" and "." in buffer.name and not buffer.name.startswith("slot/")
