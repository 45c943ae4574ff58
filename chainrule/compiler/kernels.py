"""What a kernel is: an index space of named axes, and values over subsets of them.

In: nothing. Out: `Buffer`, `Value`, `Store`, `Kernel`, `Loop`, and their text. A kernel has a domain, over which it stores, and reduced
axes, over which it sums (or takes the largest, or smallest); what it stores along reduced axes too, it stores where it is a term of the
sums. Every load has an index that is affine in the axes; broadcast,
transpose, slice and window do not exist here: they are indices.

    kernel = name, domain axis*, reduced axis*, store*
    store  = buffer, index, value, "set" | "add"
    value  = load buffer index | constant | iota affine | reduce how value | elementwise value* | philox ...
    index  = affine | value, one for each dimension (a value: looked up while running)
    loop   = axis, reverse, (kernel | loop)*            the axis is free in what stands inside
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Literal, TypeAlias

import numpy as np

from ..graph.node import Node
from .affine import Affine, Axis

I8 = np.dtype(np.int64)
Space = Literal["input", "state", "result", "scratch"]
Index: TypeAlias = "tuple[Affine | Value, ...]"  # a value where an entry is looked up


@dataclass(slots=True, eq=False)
class Buffer:
    """Memory for one array. input, state, result: given by the caller, row-major; scratch: a place in the arena. row: which axis
    carries the rows of a batch, if that is known; apart: the dimension of the rows and the length of a part, if it lies part by part
    (apart.py); lanes: so much of the last axis is used, 0 for all (lanes.py); part_of: there is one for each unit of what touches it, in a
    row of another buffer, beginning at this place of the row (copies.py)."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    space: Space = "scratch"
    row: int | None = None
    apart: tuple[int, int] | None = None
    lanes: int = 0
    part_of: tuple[Buffer, int] | None = None

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def used(self) -> tuple[int, ...]:
        """The part of its shape in which anything stands."""
        return (*self.shape[:-1], self.lanes) if self.lanes else self.shape

    @property
    def bytes(self) -> int:
        return self.size * self.dtype.itemsize

    def __repr__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """One number for each point of `axes`."""

    op: str  # "load", "constant", "iota", "reduce", "philox", or an elementwise core form
    dtype: np.dtype[Any]
    args: tuple[Value, ...] = ()
    attrs: Mapping[str, Any] = field(default_factory=dict)
    axes: frozenset[Axis] = frozenset()

    # a load: what it reads and where; `shape` is the shape under which the buffer is indexed
    buffer: Buffer | None = None
    index: Index = ()
    shape: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Store:
    """One array written. mode "add": added to what is there, in the order of the domain, first axis outermost."""

    buffer: Buffer
    index: Index
    value: Value
    mode: Literal["set", "add"] = "set"
    shape: tuple[int, ...] = ()  # under which the buffer is indexed; () stands for its own

    @property
    def view(self) -> tuple[int, ...]:
        return self.shape or self.buffer.shape


@dataclass(slots=True, eq=False)
class Kernel:
    """unit: the axis of the domain that threads share out among them, None if one thread does all; an axis of its own if each unit does
    all, for itself (copies.py). sequential: so many of the first axes of the domain are run through in order, outermost, because what they
    store is added up. late: it copies state into another order of memory; it runs at the end of a step, on the new state, and once before
    the first step. between: from where to where (exclusive) a reduced axis is summed over, where that is known only while running; rows:
    the reduced axis that runs over the rows of a batch, if those that have ended (`Ends`) add nothing; part: the axis that counts parts of
    the rows, each with a sum of its own; length: places of the unit axis that are one unit, 0 for as many as leave each thread one
    (`schedule.cut`); inner: the axis of the rows of a block, along which arrays lie innermost (lanes.py)."""

    name: str
    domain: tuple[Axis, ...]
    reduced: tuple[Axis, ...]
    stores: list[Store]
    unit: Axis | None = None
    sequential: int = 0
    late: bool = False
    inner: Axis | None = None
    packed: dict[Value, Buffer] = field(default_factory=dict)  # operands that are copied together first, and where to
    between: dict[Axis, tuple[Value, Value]] = field(default_factory=dict)
    rows: Axis | None = None
    part: Axis | None = None
    length: int = 0
    block: int = 0  # so long a part of the reduced axis is summed at a time, for all rows of a unit; 0: all of it
    partial: Buffer | None = None  # where sums stand between two parts
    origin: tuple[Node, ...] = ()  # the nodes that it computes, for tables; nothing else may depend on it
    _values: tuple[list[Store], list[Value]] = field(default=([], []), init=False, repr=False)  # what they were for which stores

    def values(self) -> list[Value]:
        """All values, arguments first. The list is kept: not to be changed."""
        if self._values[0] != self.stores:
            values = ordered([*roots(self.stores), *self.limits()])
            self._values = (self.stores[:], values)
        return self._values[1]

    def limits(self) -> Iterator[Value]:
        """What its sums begin and end with, as far as that is known only while running."""
        return (v for both in self.between.values() for v in both)

    def loads(self) -> Iterator[Value]:
        return (v for v in self.values() if v.op == "load")

    def inside(self) -> list[Store]:
        """What it stores for each term of its sums."""
        reduced = {*self.reduced}
        return [s for s in self.stores if any(not reduced.isdisjoint(i.axes) for i in s.index)] if reduced else []


@dataclass(frozen=True, slots=True)
class Ends:
    """When rows end: row r takes no part in turns of a loop at a `time`, which is affine in the axes of loops, of `steps[r]` or later."""

    steps: Buffer
    time: Affine

    def moved(self, where: Mapping[Axis, Affine]) -> Ends:
        """The same in terms of other axes."""
        return Ends(self.steps, self.time.replaced(where))

    def turns(self, row: Affine, axis: Axis, end: Value) -> Value:
        """In how many of a loop's turns a row takes part; `axis` is the loop's, and goes as far as `end`."""
        left = elementwise("subtract", I8, [load(self.steps, (row,)), iota(self.time.without(axis), I8)])
        return _minimum(_maximum(left, constant(0, I8)), end)


@dataclass(slots=True, eq=False)
class Loop:
    """Kernels that run again for each value of `axis`, which is free in their indices. states: what goes from step to step; meets: the
    kernels are not all cut alike, so threads meet in each turn, as they do between phases. turns: if there are any, each turn runs one
    of the items, which are loops, once: (which, the value of its axis). memory: bytes
    that may be kept of its steps for a backward loop. gathers: its sums may be added for many steps at a time (gather.py). ends: when
    each row has taken its last step, if that is known only while running (ragged.py). between: the axis takes no value below the first
    of these, which are affine in the axes of loops around, nor the second or one above (gather.py). layer: the dotted name of the one
    that the loop was recorded in, for reports."""

    name: str
    axis: Axis
    reverse: bool
    items: list[Kernel | Loop]
    states: list[Buffer]
    meets: bool = False
    turns: tuple[tuple[int, int], ...] = ()
    memory: int | None = None
    gathers: bool = True
    ends: Ends | None = None
    between: tuple[Affine, Affine] | None = None
    layer: str = ""

    def limits(self) -> tuple[Value, Value]:
        """From where to where (exclusive) its axis goes."""
        first, end = constant(0, I8), constant(self.axis.extent, I8)
        if self.between is None:
            return first, end
        return _maximum(iota(self.between[0], I8), first), _minimum(iota(self.between[1], I8), end)


Item = Kernel | Loop
Limits = Mapping[Axis, tuple[Sequence[Affine], Sequence[Affine]]]  # what an axis is not below, and what it is below


def kernels_of(items: Sequence[Item]) -> Iterator[Kernel]:
    """All kernels, those inside loops included."""
    for item in items:
        if isinstance(item, Kernel):
            yield item
        else:
            yield from kernels_of(item.items)


def loops_of(items: Sequence[Item]) -> Iterator[Loop]:
    """All loops, those inside others included."""
    for item in items:
        if isinstance(item, Loop):
            yield item
            yield from loops_of(item.items)


def limits_of(item: Item) -> Limits:
    """What is known, before running, of the limits that axes of an item have while it runs."""
    between = {item.axis: item.limits()} if isinstance(item, Loop) else item.between
    return {a: (_sides(first, "maximum"), _sides(end, "minimum")) for a, (first, end) in between.items()}


def _sides(v: Value, how: str) -> list[Affine]:
    """The affine ones of the numbers of which `v` is the maximum (minimum): it is not below (above) any of them."""
    if v.op == how:
        return [i for a in v.args for i in _sides(a, how)]
    return [i for i in v.index if isinstance(i, Affine)] if v.op == "iota" else []


def ordered(roots: Sequence[Value]) -> list[Value]:
    """All values that these are made of, arguments first."""
    order: list[Value] = []
    seen: set[Value] = set()
    stack = [(v, False) for v in reversed(roots)]
    while stack:
        value, ready = stack.pop()
        if ready:
            order.append(value)
        elif value not in seen:
            seen.add(value)
            stack.append((value, True))
            stack.extend((a, False) for a in reversed((*value.args, *(i for i in value.index if isinstance(i, Value)))))
    return order


def terms(sums: Iterable[Value]) -> set[Value]:
    """All values that these reductions are made of."""
    return set(ordered([a for v in sums for a in v.args]))


def plain(index: Index) -> tuple[Affine, ...]:
    """An index of which no part is looked up."""
    assert not any(isinstance(i, Value) for i in index), "part of it is looked up"
    return tuple(i for i in index if isinstance(i, Affine))


def reindexed(index: Index, table: Mapping[Value, Value], where: Mapping[Axis, Affine]) -> Index:
    """An index whose values and axes stand for others."""
    return tuple(table[i] if isinstance(i, Value) else i.replaced(where) for i in index)


def rebuilt(
    roots: Sequence[Value], table: dict[Value, Value], where: Mapping[Axis, Affine] | None = None,
    change: Callable[[Value], Value] | None = None,
) -> dict[Value, Value]:  # fmt: skip
    """All that `roots` are made of, made anew. table: what stands in place of some of them, to which all others are added; where: sums
    of other axes in place of some axes; change: the last word on each value."""
    where = where or {}
    for v in ordered(roots):
        if v in table:
            continue
        args = tuple(table[a] for a in v.args)
        index = reindexed(v.index, table, where)
        axes = frozenset[Axis]().union(*(a.axes for a in args), *(i.axes for i in index))
        new = v
        if args != v.args or index != v.index or "within" in v.attrs or any(a in where for a in v.attrs.get("over", ())):
            new = replace(v, args=args, index=index, axes=axes)
        if v.op == "reduce" and new is not v:
            over = tuple(b for a in v.attrs["over"] for b in (where[a].axes_in_order if a in where else (a,)))
            attrs = {**v.attrs, "over": over}
            if "within" in attrs:
                attrs["within"] = tuple((i.replaced(where), n) for i, n in attrs["within"])
            new = replace(new, attrs=attrs, axes=_left(axes, attrs))
        table[v] = change(new) if change is not None else new
    return table


def bounds(values: Iterable[Value]) -> dict[Affine, int]:
    """What the terms of these reductions are confined to."""
    return {i: n for v in values for i, n in v.attrs.get("within", ())}


def roots(stores: Iterable[Store]) -> list[Value]:
    """What stores are made of: what they put somewhere, and the places that are looked up."""
    return [v for s in stores for v in (*(i for i in s.index if isinstance(i, Value)), s.value)]


# ---- making values -----------------------------------------------------------------------------------------------------------


def load(buffer: Buffer, index: Sequence[Affine | Value], shape: tuple[int, ...] | None = None) -> Value:
    """What stands in `buffer` at `index`."""
    axes: frozenset[Axis] = frozenset().union(*(i.axes for i in index))
    return Value(
        "load", buffer.dtype, axes=axes, buffer=buffer, index=tuple(index), shape=buffer.shape if shape is None else shape
    )


def constant(value: Any, dtype: np.dtype[Any]) -> Value:
    """A number."""
    return Value("constant", dtype, attrs={"value": dtype.type(value)})


def iota(index: Affine, dtype: np.dtype[Any]) -> Value:
    """The index itself."""
    return Value("iota", dtype, index=(index,), axes=index.axes)


def elementwise(op: str, dtype: np.dtype[Any], args: Sequence[Value], attrs: Mapping[str, Any] | None = None) -> Value:
    """An operator, element by element."""
    return Value(op, dtype, tuple(args), attrs or {}, frozenset().union(*(a.axes for a in args)))


def _maximum(a: Value, b: Value) -> Value:
    return elementwise("maximum", I8, [a, b])


def _minimum(a: Value, b: Value) -> Value:
    return elementwise("minimum", I8, [a, b])


Within = Sequence[tuple[Affine, int]]  # sums, and below what they stay


def reduce(how: str, value: Value, axes: Sequence[Axis], within: Within = ()) -> Value:
    """The sum, largest or smallest over `axes`; within: only of those terms for which these are at least 0 and below their bound. Each
    of them has one of the axes, with a negative coefficient."""
    attrs: dict[str, Any] = {"how": how, "over": tuple(axes)}
    if within:
        attrs["within"] = tuple(within)
    return Value("reduce", value.dtype, (value,), attrs, _left(value.axes, attrs))


def _left(axes: frozenset[Axis], attrs: Mapping[str, Any]) -> frozenset[Axis]:
    """The axes of a reduction of something with these axes."""
    return axes.union(*(i.axes for i, _ in attrs.get("within", ()))) - set(attrs["over"])


# ---- text --------------------------------------------------------------------------------------------------------------------


def kernels_text(items: Sequence[Item], indent: str = "") -> str:
    """Kernels as text."""
    return "\n".join(_item_text(i, indent) for i in items)


def _item_text(item: Item, indent: str) -> str:
    if isinstance(item, Loop):
        how = " descending" * item.reverse + ", in phases" * (item.meets and not item.turns)
        how += f", {item.between[0]} <= {item.axis.name} < {item.between[1]}" if item.between is not None else ""
        how += f", each row to {item.ends.time} = {item.ends.steps}" if item.ends is not None else ""
        how += ", one of these at a time: " * bool(item.turns) + " ".join(f"{which}@{at}" for which, at in item.turns)
        head = f"{indent}loop {item.name}: {item.axis.name} < {item.axis.extent}{how}"
        return f"{head}\n{kernels_text(item.items, indent + '    ')}"
    axes = " ".join(f"{a.name}<{a.extent}{'*' if a is item.unit else ''}" for a in item.domain)
    over = " ".join(f"{a.name}<{a.extent}" for a in item.reduced)
    each = "" if item.unit is None or item.unit in item.domain else f" by each of {item.unit.extent} units"
    lines = [f"{indent}kernel {item.name} [{axes}]" + (f" over [{over}]" if over else "") + each]
    names: dict[Value, str] = {}
    for v in item.values():
        names[v] = f"v{len(names)}"
        lines.append(f"{indent}    {names[v]}: {v.dtype}{_axes(v)} = {_value_text(v, names)}")
    lines += [f"{indent}    {names[first]} <= {a.name} < {names[end]}" for a, (first, end) in item.between.items()]
    for s in item.stores:
        sign = "=" if s.mode == "set" else "+="
        lines.append(f"{indent}    {s.buffer.name}[{_index_text(s.index, names)}] {sign} {names[s.value]}")
    return "\n".join(lines)


def _axes(v: Value) -> str:
    return f"({', '.join(sorted(a.name for a in v.axes))})"


def _index_text(index: Sequence[Affine | Value], names: Mapping[Value, str]) -> str:
    return ", ".join(names[i] if isinstance(i, Value) else str(i) for i in index)


def _value_text(v: Value, names: Mapping[Value, str]) -> str:
    if v.op == "load":
        assert v.buffer is not None
        view = f" as {list(v.shape)}" if v.shape != v.buffer.shape else ""
        return f"{v.buffer.name}[{_index_text(v.index, names)}]{view}{' turned' * ('turned' in v.attrs)}"
    if v.op == "constant":
        return str(v.attrs["value"])
    if v.op == "iota":
        return f"iota {v.index[0]}"
    if v.op == "reduce":
        within = "".join(f", 0 <= {i} < {n}" for i, n in v.attrs.get("within", ()))
        return f"{v.attrs['how']} of {names[v.args[0]]} over {', '.join(a.name for a in v.attrs['over'])}{within}"
    attrs = ", ".join(f"{k}={a}" for k, a in v.attrs.items() if k != "checked")
    return f"{v.op}({', '.join(names[a] for a in v.args)}{', ' + attrs if attrs else ''})"
