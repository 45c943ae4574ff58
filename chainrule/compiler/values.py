"""The values of a kernel in registers.

In: a kernel, its schedule, and from sums.py and lower.py where one is: in which loops, at which row, vector and copy. Out: registers, and
the statements that make them. Each value is computed in the outermost loop where all that it depends on is known, once for each register
it needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from typing import Any

import numpy as np

from .affine import Affine, Axis, flat, of
from .hope import PLAIN, Hope
from .kernels import I8, Buffer, Kernel, Store, Value, constant, elementwise, iota, load
from .loops import Bound, Carry, Fetch, For, Let, Place, Read, Register, Statement, Write
from .schedule import LEAST_FETCH, Schedule, stride


class Scope:
    """A loop that is being made, or a tile in it: its body so far, and what is known there."""

    def __init__(self, variables: set[Axis]) -> None:
        self.variables = variables
        self.body: list[Statement] = []
        self.known: dict[Any, Register] = {}


class Values:
    """The registers of one variant of a kernel's body, all extents known, and the scopes in which they are made.

    renamed: the unit axis -> the axis that counts inside a unit; table: axes -> sums of loop variables; unit: the
    number of the unit at hand. Where one is (columns, row, vector, valid, tag, packed_from) is set by who asks for values.
    """

    def __init__(
        self, kernel: Kernel, schedule: Schedule, renamed: Mapping[Axis, Axis], table: Mapping[Axis, Affine], stem: str,
        unit: Affine, outside: set[Axis],
    ) -> None:  # fmt: skip
        self.kernel, self.s = kernel, schedule
        self.renamed = renamed
        self.table, self.base = dict(table), dict(table)
        self.stem, self.unit = stem, unit
        self.numbers = count()
        self.domain = [renamed.get(a, a) for a in kernel.domain]
        self.original = dict(zip(self.domain, kernel.domain, strict=True))
        self.lanes = renamed.get(schedule.lanes, schedule.lanes) if schedule.lanes is not None else None
        self.tile = renamed.get(schedule.tile, schedule.tile) if schedule.tile is not None else None
        self.side = renamed.get(schedule.side, schedule.side) if schedule.side is not None else None
        self.columns = 1  # of the tile at hand
        self.reduced = list(kernel.reduced)
        self.innermost = self._innermost()
        self.scopes = [Scope(outside)]
        self.row = self.vector = 0  # row: row of the tile · columns + column
        self.valid = 1  # lanes of the vector at hand that count
        self.tag = 0  # which copy of an unrolled body
        self.positions: dict[Axis, Affine] = {}  # where each axis that is tiled stands, inside the unit
        self.packed_from = Affine()  # the place of the innermost reduced axis with which packed operands begin
        self.after: set[Value] = set()  # what is made of sums
        for v in kernel.values():
            if v.op == "reduce" or any(a in self.after for a in (*v.args, *v.index)):
                self.after.add(v)
        self.summed: dict[Any, Register] = {}  # the sums of the tile at hand: (value, row, vector)
        self.made_in: dict[Register, Scope] = {}
        self.parts: dict[Value, list[Value]] = {}
        self.following: dict[Value, Value] = {}  # by the number of a row of data, that of the row that is read one tile later
        self.hope = Hope(kernel)

    def _innermost(self) -> Axis | None:
        if not self.reduced:
            return None
        return self.lanes if self.lanes in self.reduced else self.reduced[-1]

    def register(self, dtype: np.dtype[Any], width: int) -> Register:
        """A new one."""
        return Register(f"{self.stem}r{next(self.numbers)}", dtype, width)

    def variable(self, stem: str, extent: int) -> Axis:
        """A new one, for a loop."""
        return Axis(f"{stem}_{self.stem}{next(self.numbers)}", extent)

    def let(self, op: str, dtype: np.dtype[Any], width: int, args: tuple[Register, ...], scope: Scope, **attrs: Any) -> Register:
        """The register of op(args), made in `scope`."""
        target = self.register(dtype, width)
        made = Let(target, op, args, attrs)
        scope.body.append(made)
        self.hope.follow(made)
        return target

    def splat(self, r: Register, width: int) -> Register:
        """One number in every lane, once for each register that was made."""
        if r.width == width:
            return r
        for scope in self.scopes:  # where it was made, or further in
            if ("splat", r, width) in scope.known:
                return scope.known["splat", r, width]
        scope = self.made_in.get(r, self.scopes[-1])
        made = scope.known["splat", r, width] = self.let("splat", r.dtype, width, (r,), scope)
        return made

    def width(self, valid: int) -> int:
        """Lanes of a register of which so many count: half as many where they do, since some processors take wide vectors in halves."""
        half = self.s.width // 2
        return half if 0 < valid <= half and self.lanes in self.domain else self.s.width

    def own(self, axes: frozenset[Axis]) -> frozenset[Axis]:
        """The kernel's axes as those that count in this variant."""
        return frozenset(self.renamed.get(a, a) for a in axes) if not axes.isdisjoint(self.renamed) else axes

    # ---- scopes --------------------------------------------------------------------------------------------------------------

    def open(self, variable: Axis) -> Scope:
        """Begins the body of a loop."""
        scope = Scope({variable})
        self.scopes.append(scope)
        return scope

    def close(self, scope: Scope, variable: Axis, first: Bound, last: Bound, carries: tuple[Carry, ...] = (),
               results: tuple[Register, ...] = ()) -> None:  # fmt: skip
        """The loop whose body is now complete, in the scope around it."""
        assert self.scopes.pop() is scope
        self.scopes[-1].body.append(For(variable, first, last, scope.body, carries, results))

    @contextmanager
    def in_tile(self) -> Iterator[None]:
        """What is made inside is known inside only: in one tile, and not in the next."""
        scope = Scope(set())
        self.scopes.append(scope)
        yield
        assert self.scopes.pop() is scope
        self.scopes[-1].body += scope.body

    def add(self, statement: Statement) -> None:
        """To the innermost scope."""
        self.scopes[-1].body.append(statement)

    def limits(self, axis: Axis, extent: int) -> tuple[int | Register, int | Register]:
        """From where to where a loop over an axis goes."""
        between = self.kernel.between.get(axis)
        return (0, extent) if between is None else (self.value(between[0]), self.value(between[1]))

    # ---- values --------------------------------------------------------------------------------------------------------------

    def value(self, v: Value) -> Register:
        """The register of `v` for the row, vector and copy at hand; first of all that it is made of, so that no chain is too long."""
        for part in self._parts(v):
            self._value(part)
        return self._value(v)

    def _parts(self, v: Value) -> list[Value]:
        """What `v` is made of, arguments first, up to sums."""
        if v not in self.parts:
            order: dict[Value, None] = {}
            stack = [(v, False)]
            while stack:
                part, ready = stack.pop()
                if ready:
                    order[part] = None
                elif part not in order and part.op != "reduce":
                    stack.append((part, True))
                    stack += [(a, False) for a in reversed((*part.args, *part.index)) if isinstance(a, Value)]
            self.parts[v] = list(order)[:-1]
        return self.parts[v]

    def _value(self, v: Value) -> Register:
        axes = self.own(v.axes)
        r = self.row_of(self.row, axes)
        lane = self.vector if self.lanes in axes else 0
        tag = self.tag if self.innermost in axes else 0
        valid = self.valid if self.lanes in axes else 1
        key = (v, r, lane, tag, valid, self.hope.given_up and v in self.hope.spread)
        if v.op == "reduce":
            return self.summed[v, r, lane]
        for scope in reversed(self.scopes):
            if key in scope.known:
                return scope.known[key]
        scope = self._scope_of(v, axes)
        made = self._make(v, axes, scope)
        scope.known[key] = made
        self.made_in[made] = scope
        return made

    def row_of(self, row: int, axes: frozenset[Axis]) -> int:
        """The row of a value that may not depend on the tile's axes."""
        r, column = divmod(row, self.columns)
        return (r if self.tile in axes else 0) * self.columns + (column if self.side in axes else 0)

    def _scope_of(self, v: Value, axes: frozenset[Axis]) -> Scope:
        """The outermost scope in which all is known that `v` depends on."""
        needed: set[Axis] = set()
        for a in v.axes:
            needed |= self.address(of(a)).axes
        if v in self.after:
            return self.scopes[-1]  # what reductions gave is known in the tile only
        depth = 0
        for i, scope in enumerate(self.scopes):
            if scope.variables & needed:
                depth = i
        if not axes.isdisjoint((self.tile, self.side, self.lanes)):  # rows and vectors are numbered within the tile at hand
            depth = max(depth, self._tile_depth())
        return self.scopes[depth]

    def _tile_depth(self) -> int:
        return next(i for i, s in enumerate(self.scopes) if not s.variables and i)

    def _make(self, v: Value, axes: frozenset[Axis], scope: Scope) -> Register:
        width = self.width(self.valid) if self.lanes in axes else 1
        if v.op == "load":
            return self._load(v, width, scope)
        if v.op == "constant":
            return self.let("constant", v.dtype, 1, (), scope, value=v.attrs["value"])
        if v.op == "iota":
            (index,) = v.index
            assert isinstance(index, Affine)
            at, step = self._moved(index)
            return self.let("iota", v.dtype, width, (), scope, address=at, stride=step)
        args = [self._value(a) for a in v.args]
        if v.op == "checked":
            return self.let("checked", v.dtype, 1, tuple(args), scope, **v.attrs)
        wide = tuple(self.splat(a, width) for a in args)
        if v in self.hope.products:
            target = self.let(PLAIN[v.op], v.dtype, width, wide, scope, **v.attrs)
            self.hope.plain(target, Let(target, v.op, wide, v.attrs))
            return target
        hoped = v in self.hope.terms and not self.hope.given_up
        return self.let(PLAIN[v.op] if hoped else v.op, v.dtype, width, wide, scope, **v.attrs)

    def _load(self, v: Value, width: int, scope: Scope) -> Register:
        packed = self.kernel.packed.get(v)
        assert v.buffer is not None
        place = self.place(v.buffer, v.index, v.shape) if packed is None else self.pack_place(v, packed)
        if width == 1:
            place = Place(place.buffer, place.address, place.looked_up)
        target = self.register(v.dtype, width)
        scope.body.append(Read(target, place))
        if (row := self._row_of_data(v)) is not None and width * v.dtype.itemsize >= LEAST_FETCH:
            scope.body.append(Fetch(self.place(v.buffer, (self._next(row), *v.index[1:]), v.shape)))
        return target

    def _row_of_data(self, v: Value) -> Value | None:
        """The number of the row of data that is read, if lanes go through it from end to end. The next row may lie anywhere, so a processor
        cannot guess what will be read then."""
        row = v.index[0] if v.index else None
        if self.lanes not in self.reduced or v.buffer is None or v.buffer.space != "input" or not isinstance(row, Value):
            return None
        one = row.op == "load" and len(row.axes) == 1 and row.index == (of(*row.axes),)
        return row if one and stride(v, self.lanes) == 1 else None

    def _next(self, row: Value) -> Value:
        """The number of the row that the next tile reads in place of this one; the last one again where there is none. Behind a smaller
        tile it is a row beyond, which costs nothing but that row."""
        if row not in self.following:
            (axis,) = row.axes
            own = self.renamed.get(axis, axis)
            tile = self.s.rows if own is self.tile else self.s.columns if own is self.side else 1
            place = elementwise("minimum", I8, [iota(of(axis) + tile, I8), constant(axis.extent - 1, I8)])
            assert row.buffer is not None
            self.following[row] = load(row.buffer, (place,), row.shape)
        return self.following[row]

    def stored(self, store: Store) -> Register:
        """The register of what is stored, for the row and vector at hand."""
        for i in store.index:
            if isinstance(i, Value):
                self.value(i)
        width = self.width(self.valid) if self.lanes in self.domain else 1
        return self.splat(self.value(store.value), width)

    def store(self, store: Store, value: Register) -> None:
        """Puts it, or adds it, where it belongs."""
        width = value.width
        place = self.place(store.buffer, store.index, store.view)
        if width == 1:
            place = Place(place.buffer, place.address, place.looked_up)
        if store.mode == "add":
            old = self.register(value.dtype, width)
            self.add(Read(old, place))
            value = self.let("add", value.dtype, width, (old, value), self.scopes[-1])
        self.add(Write(place, value))

    # ---- places --------------------------------------------------------------------------------------------------------------

    def place_axis(self, axis: Axis, where: Affine) -> None:
        """`axis` (one that counts in this variant) is `where`."""
        self.positions[axis] = where
        outer = self.original.get(axis, axis)
        if outer is not axis and outer in self.renamed:
            base = self.base[outer].without(axis)
            self.table[outer] = base + where
        else:
            self.table[axis] = where

    def address(self, index: Affine) -> Affine:
        """An index over axes as a sum of loop variables."""
        return index.replaced(self.table)

    def _moved(self, index: Affine) -> tuple[Affine, int]:
        """An index at the row, vector and copy at hand, and its step from lane to lane."""
        step = self.coefficient(index, self.lanes)
        at = self.address(index)
        row, column = divmod(self.row, self.columns)
        at = at + (self.coefficient(index, self.tile) * row + self.coefficient(index, self.side) * column)
        if self.lanes in self.domain:
            at = at + step * self.vector * self.s.width
        return at, step

    def coefficient(self, index: Affine, axis: Axis | None) -> int:
        """That of an axis that counts in this variant."""
        return index.coefficient(self.original.get(axis, axis)) if axis is not None else 0

    def place(self, buffer: Buffer, index: tuple[Affine | Value, ...], shape: tuple[int, ...]) -> Place:
        """Where an element lies, at the row, vector and copy at hand."""
        position, looked_up, size = Affine(), [], 1
        for i, n in zip(reversed(index), reversed(shape), strict=True):
            if isinstance(i, Value):
                looked_up.append((self._value(i), size))
            else:
                position = position + i * size
            size *= n
        at, step = self._moved(position)
        return Place(buffer, at + self.copy_of(buffer), tuple(looked_up), step, self.valid)

    def copy_of(self, buffer: Buffer) -> Affine:
        """How far this unit's own copy of a buffer is from the first unit's."""
        return self.unit * buffer.part_of[0].shape[1] if buffer.part_of is not None else Affine()

    def pack_place(self, v: Value, buffer: Buffer) -> Place:
        """Where in its own memory a packed operand's vector stands: one area for each unit."""
        over = [a for a in self.reduced if a in v.axes]
        width = self.s.vectors * self.s.width
        at = flat((of(a) for a in over), (a.extent for a in over)) * width
        at = self.address(at) + self.packed_from * -width + self.unit * buffer.shape[1] + self.vector * self.s.width
        return Place(buffer, at, (), 1, self.valid)
