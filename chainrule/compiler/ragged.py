"""Loops over sequences of different lengths, which take no longer than the sequences are.

In, out: items. A step that is masked beyond the end of a sequence computes what nobody wants. Here it is found out what steps leave
behind for rows whose mask is off: the old state (also where one kernel leaves it for another of the same step), zeros, and numbers
that are read under the same mask only. Where that is all, the loop is told when its rows end, and a block of rows runs until the last
of them has ended (`schedule.together`): steps of the loop itself in lower-level code (pipeline.py), and sums over steps and rows, where
the others add nothing (gather.py).

    mask[row] = time < lengths[row];   where(mask, new, old);   a sum over rows of products with zeros

What somebody reads without the mask has to be zero where steps are left out, and is set to that before the loop.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ..graph.node import OPS
from .affine import Affine, Axis, of
from .fuse import Names
from .gather import rows_summed, rows_written, sums_of
from .kernels import (
    I8,
    Buffer,
    Ends,
    Index,
    Item,
    Kernel,
    Loop,
    Store,
    Value,
    constant,
    elementwise,
    kernels_of,
    load,
    plain,
    reduce,
)
from .phases import never_meet
from .replay import is_way_back
from .schedule import together


def ragged(items: Sequence[Item], names: Names) -> list[Item]:
    """The items with such loops told when their rows end."""
    found = [m for i in items if isinstance(i, Loop) and (m := _masked(i, items)) is not None]
    cleared: dict[Loop, list[Buffer]] = {}
    while True:
        good = [
            m for m in found if (seen := _seen_elsewhere(m, found, items)) is not None and cleared.update({m.loop: seen}) is None
        ]
        if len(good) == len(found):
            break
        found = good
    masked = {m.loop: m for m in found}
    made: list[Item] = []
    steps: dict[tuple[Buffer, int], Buffer] = {}
    for item in items:
        if isinstance(item, Loop) and item in masked:
            m = masked[item]
            key = (m.lengths, item.axis.extent)
            if key not in steps:
                steps[key] = Buffer(names("n"), m.lengths.shape, I8)
                made += _steps(m.lengths, steps[key], item.axis.extent, names)
            made += [_zeros(b, m.rows[b], names) for b in cleared[item]]
            inside: list[Item] = [replace(k, rows=m.sums.get(k)) for k in m.kernels]
            item = replace(item, items=inside, ends=Ends(steps[key], of(item.axis)))
        made.append(item)
    return made


def _steps(lengths: Buffer, steps: Buffer, most: int, names: Names) -> list[Kernel]:
    """Up to which step the rows that end together take part, for each of them."""
    rows = lengths.size
    size = together(rows)
    made = []
    for first, count, own in ((0, rows // size, size), (rows - rows % size, 1, rows % size)):
        if not count or not own:
            continue
        group, row, other = Axis(names("i"), count), Axis(names("i"), own), Axis(names("r"), own)
        start = of(group) * own + first
        longest = reduce("max", elementwise("cast", I8, [load(lengths, (start + of(other),))]), (other,))
        value = elementwise("minimum", I8, [elementwise("maximum", I8, [longest, constant(0, I8)]), constant(most, I8)])
        made.append(Kernel(names("k"), (group, row), (other,), [Store(steps, (start + of(row),), value)], group))
    return made


def _zeros(buffer: Buffer, row: int, names: Names) -> Kernel:
    domain = tuple(Axis(names("i"), n) for n in buffer.shape)
    store = Store(buffer, tuple(of(a) for a in domain), constant(0, buffer.dtype))
    return Kernel(names("k"), domain, (), [store], domain[row])


# ---- what steps leave behind ---------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Masked:
    """A loop whose rows end at `lengths`. sums: its kernels that add over rows, and the axis of the rows; rows: for each buffer that it
    writes, the dimension along which rows lie; left: what it writes at each time, and whether it leaves zeros under the mask."""

    loop: Loop
    lengths: Buffer
    kernels: list[Kernel]
    sums: dict[Kernel, Axis] = field(default_factory=dict)
    rows: dict[Buffer, int] = field(default_factory=dict)
    left: dict[Buffer, bool] = field(default_factory=dict)


def _masked(loop: Loop, items: Sequence[Item]) -> _Masked | None:
    """The loop, if rows whose mask is off leave nothing behind that counts."""
    kernels = [i for i in loop.items if isinstance(i, Kernel)]
    if loop.meets or len(kernels) < len(loop.items):
        return None
    written = {s.buffer for k in kernels for s in k.stores}
    lengths = next(
        (b for k in kernels for v in k.values() if (b := _lengths(v, k.unit, loop)) is not None and b not in written), None
    )
    if lengths is None:
        return None
    m = _Masked(loop, lengths, kernels)
    sums = sums_of(loop, items)
    if sums and any(_goes_back(i, loop, written) for i in items):
        return None  # its sums may have to stay in its steps (replay.py)
    places = rows_written([k for k in kernels if k not in sums], lengths.size)
    if places is None:
        return None
    m.rows.update(places)
    idle = _Idle(m)
    return m if all(idle.sum(k) if k in sums else idle.step(k) for k in kernels) else None


def _goes_back(item: Item, loop: Loop, written: set[Buffer]) -> bool:
    """Whether an item is a loop that reads what this one writes, and goes the other way."""
    return isinstance(item, Loop) and is_way_back(loop, item) and any(v.buffer in written for v in _loads([item]))


def is_masked(loop: Loop) -> bool:
    """Whether a step asks which rows have ended."""
    return any(_lengths(v, k.unit, loop) is not None for k in kernels_of([loop]) for v in k.values())


def _lengths(v: Value, unit: Axis | None, loop: Loop) -> Buffer | None:
    """lengths, if v is time < lengths[row]."""
    if v.op != "less" or unit is None:
        return None
    time, end = (_uncast(a) for a in v.args)
    if time.op != "iota" or time.index != (of(loop.axis),) or end.op != "load" or end.index != (of(unit),):
        return None
    assert end.buffer is not None
    whole = end.dtype.kind in "iu" and np.can_cast(end.dtype, I8)  # else `_steps` would not count as the mask does
    return end.buffer if whole and end.shape == end.buffer.shape == (unit.extent,) else None


def _uncast(v: Value) -> Value:
    """The value before casts that keep all numbers: -1 as uint8 is 255, so a row that ends at once would seem to have many steps."""
    while v.op == "cast" and np.can_cast(v.args[0].dtype, v.dtype):
        (v,) = v.args
    return v


ZERO = "zero"
Left = str | tuple[Buffer, Index] | None  # ZERO, what a state was at an index, or nothing known


class _Idle:
    """What values are for rows whose mask is off, kernel after kernel of a step."""

    def __init__(self, m: _Masked) -> None:
        self.m = m
        stores = [s for k in m.kernels for s in k.stores]
        self.timed = {s.buffer for s in stores if any(isinstance(i, Affine) and m.loop.axis in i.axes for i in s.index)}
        self.written: dict[Buffer, list[tuple[Store, Left]]] = {}  # by the step so far: where, and what
        self.known: dict[Value, Left] = {}
        self.row: Axis | None = None
        self.good = True

    def step(self, kernel: Kernel) -> bool:
        """Whether a kernel that goes row by row leaves nothing behind that counts."""
        self._begin(kernel, kernel.unit)
        for s in kernel.stores:
            left = self.known[s.value]
            by_time = [d for d, i in enumerate(s.index) if isinstance(i, Affine) and self.m.loop.axis in i.axes]
            if s.buffer in self.m.loop.states:
                self.good &= left == (s.buffer, s.index)
            elif by_time:
                self.m.left[s.buffer] = self.m.left.get(s.buffer, True) and left == ZERO
                self.good &= s.index[by_time[0]] == of(self.m.loop.axis) and len(by_time) == 1
            else:
                self.written.setdefault(s.buffer, []).append((s, left))
        return self.good

    def sum(self, kernel: Kernel) -> bool:
        """Whether such rows add nothing to the sums of a kernel."""
        row = rows_summed(kernel, self.m.rows)
        if row is None or row.extent != self.m.lengths.size:
            return False
        self._begin(kernel, row)
        self.m.sums[kernel] = row
        return self.good and all(self.known[v] == ZERO for v in kernel.values() if v.op == "reduce")

    def _begin(self, kernel: Kernel, row: Axis | None) -> None:
        self.row, self.known = row, {}
        for v in kernel.values():
            self.known[v] = self._value(v)

    def _value(self, v: Value) -> Left:
        args = [self.known[a] for a in v.args]
        if v.op == "load":
            return self._load(v)
        if v.op == "constant":
            return ZERO if v.attrs["value"] == 0 else None
        if v.op == "cast" and v.args[0].dtype.kind == "b":
            return None  # a mask that is multiplied by: 0 times what nobody knows may be NaN
        if v.op == "less" and _lengths(v, self.row, self.m.loop) is self.m.lengths:
            return ZERO
        if v.op == "where":
            return args[2] if args[0] == ZERO or args[1] == args[2] == ZERO else None
        if v.op in ("multiply", "strong_multiply", "logical_and"):
            return ZERO if ZERO in args else None
        if v.op in ("divide", "strong_divide"):
            return args[0] if args[0] == ZERO else None
        if v.op == "add" and ZERO in args:
            return args[1] if args[0] == ZERO else args[0]
        if v.op == "subtract" and args[1] == ZERO:
            return args[0]
        if v.op == "reduce":
            return args[0] if args[0] == ZERO else None
        return ZERO if args and all(a == ZERO for a in args) and _keeps_zero(v) else None

    def _load(self, v: Value) -> Left:
        b = v.buffer
        assert b is not None
        row = self.m.rows.get(b)
        if row is None:
            return None
        # What a row has written, the same row reads.
        self.good &= v.shape == b.shape and self.row is not None and v.index[row] == of(self.row)
        self.good &= not any(self.row in i.axes for d, i in enumerate(v.index) if d != row)
        self.good &= b not in self.timed  # at another time perhaps
        if b in self.m.loop.states:
            return b, v.index
        stores = self.written.get(b, ())
        if any(s.view != v.shape for s, _ in stores):
            return None  # places of an array that is seen in two shapes are not compared
        found = {_moved(left, s.index, v.index) for s, left in stores if not never_meet(s.index, v.index)}
        return found.pop() if len(found) == 1 else None


def _moved(left: Left, stored: Index, read: Index) -> Left:
    """What is read at an index, if what was left was stored at another; known where each dimension has an axis of its own."""
    if left is None or isinstance(left, str):
        return left
    state, index = left
    if any(isinstance(i, Value) for i in (*stored, *read, *index)):
        return None
    pairs = list(zip(plain(stored), plain(read), strict=True))
    table = {i.terms[0][0]: j + -i.constant for i, j in pairs if [c for _, c in i.terms] == [1]}
    if any(i.replaced(table) != j for i, j in pairs):
        return None
    return state, tuple(i.replaced(table) for i in plain(index))


def _keeps_zero(v: Value) -> bool:
    """Whether an elementwise operator makes 0 of 0."""
    if v.op not in OPS or not OPS[v.op].elementwise:
        return False
    attrs = {"dtype": v.dtype} if v.op == "cast" else v.attrs
    with np.errstate(all="ignore"):
        return bool(np.all(OPS[v.op].value(*[np.zeros(1, a.dtype) for a in v.args], **attrs) == 0))


# ---- who reads it --------------------------------------------------------------------------------------------------------------


def _seen_elsewhere(m: _Masked, found: Sequence[_Masked], items: Sequence[Item]) -> list[Buffer] | None:
    """What has to be zero where steps are left out, since others look there; None if it would not be zero."""
    alike = {o.loop: o for o in found if o.lengths is m.lengths}
    seen: list[Buffer] = []
    for b, zero in m.left.items():
        readers = [(i, k, v) for i in items if i is not m.loop for k in kernels_of([i]) for v in k.loads() if v.buffer is b]
        if b.space == "scratch" and all(i in alike and _at_its_step(v, k, alike[i], m.rows[b]) for i, k, v in readers):
            continue
        if not zero or any(s.buffer is b for k in kernels_of([i for i in items if i is not m.loop]) for s in k.stores):
            return None
        seen.append(b)
    outside = [i for i in items if i is not m.loop]
    if any(v.buffer in m.rows and v.buffer not in m.left and v.buffer not in m.loop.states for v in _loads(outside)):
        return None
    return seen


def _at_its_step(v: Value, kernel: Kernel, m: _Masked, row: int) -> bool:
    """Whether a kernel of a loop reads something at the step that the loop is at, each row its own."""
    rows = m.sums.get(kernel, kernel.unit)
    time = [i for i in v.index if isinstance(i, Affine) and m.loop.axis in i.axes]
    assert v.buffer is not None
    assert rows is not None
    return v.shape == v.buffer.shape and time == [of(m.loop.axis)] and v.index[row] == of(rows)


def _loads(items: Sequence[Item]) -> Iterator[Value]:
    return (v for k in kernels_of(items) for v in k.loads())
