"""Kernels -> loops over registers.

In: a kernel, its schedule, and the number of units. Out: a `Function`. Each value is computed in the outermost loop where all that it
depends on is known, once for each register it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from math import prod
from typing import Any

import numpy as np

from .affine import Affine, Axis, affine, flat, of
from .flatten import can_be_lines, flattened, seen_as_lines
from .kernels import I8, Buffer, Kernel, Store, Value, bounds, constant, elementwise, iota, load, plain, terms
from .loops import Bound, Carry, Clamped, Fetch, For, Function, If, IfNaN, Let, Place, Read, Register, Statement, Write
from .schedule import LEAST_FETCH, LONG_SUM, NESTED_SUM, Schedule, balanced, cut, schedule, stride
from .target import Target

PLAIN = {"strong_multiply": "multiply", "strong_divide": "divide"}
# Operators whose result is NaN if a floating-point argument is, but for the one that `where` does not take.
SPREADS = {*PLAIN, *PLAIN.values(), "add", "subtract", "negative", "maximum", "minimum", "abs", "where"}
SPREADS |= {"sqrt", "exp", "expm1", "log", "log1p", "tanh", "logistic", "sin", "cos"}


def hopeful(kernel: Kernel) -> frozenset[Value]:
    """The strong products and quotients that may be made as plain ones, in the hope that none is NaN: they differ in nothing else, and NaN
    spreads from them to what is stored, where it is noticed. Empty where it would not, or where they are parts of sums."""
    inside = terms(v for v in kernel.values() if v.op == "reduce")
    strong = [v for v in kernel.values() if v.op in PLAIN and v.dtype.kind == "f" and v not in inside]
    reached = set(strong)
    for v in kernel.values():
        if any(a in reached for a in v.args):
            if v.op not in SPREADS or v in inside or (v.args[0] in reached and v.op == "where"):
                return frozenset()
            reached.add(v)
    stored = {s.value for s in kernel.stores}
    read = {a for v in reached for a in v.args}
    if any(v not in read and v not in stored for v in reached) or any(i in reached for s in kernel.stores for i in s.index):
        return frozenset()
    return frozenset(strong)


def lower(kernel: Kernel, made: Schedule, threads: int, target: Target, variables: tuple[Axis, ...] = ()) -> Function:
    """The function that does the units lo..hi-1 of `kernel`."""
    body: list[Statement] = []
    if all(a.extent for a in kernel.domain):
        total, length = cut(kernel, threads)
        if total == 1:
            body.append(If("hi", 0, _body(kernel, made, target, {}, {}, "", Affine(), set())))
        else:
            assert kernel.unit is not None
            body = _by_units(kernel, made, target, kernel.unit, total, length)
    return Function(kernel.name, variables, body)


def _by_units(kernel: Kernel, made: Schedule, target: Target, axis: Axis, total: int, length: int) -> list[Statement]:
    full, rest = divmod(axis.extent, length)
    unit = Axis("unit", total)
    inside = Axis(axis.name, length)
    table = {axis: affine(0, ((unit, length),)) + of(inside)}
    one = _body(kernel, made, target, {axis: inside}, table, "", of(unit), {unit})
    body: list[Statement] = [For(unit, "lo", ("hi", full) if rest else "hi", one)]
    if rest:
        last = Axis(axis.name, rest)
        one = _body(kernel, made, target, {axis: last}, {axis: of(last) + full * length}, "z", Affine(full), set())
        body.append(If("hi", full, one))
    return body


def _body(
    kernel: Kernel, made: Schedule, target: Target, renamed: Mapping[Axis, Axis], table: Mapping[Axis, Affine], stem: str, unit: Affine,
    outside: set[Axis],
) -> list[Statement]:  # fmt: skip
    """One unit. Where nothing is summed it runs through memory in lines as long as they can be; the schedule is that of the lines."""
    if made.across is None and can_be_lines(kernel):
        lines = kernel
        if renamed:
            lines = seen_as_lines(kernel, tuple(renamed.get(a, a) for a in kernel.domain), table)
        lines = flattened(lines)
        return _Lowering(lines, schedule(lines, target), {}, {}, stem, unit, outside).run()
    return _Lowering(kernel, made, renamed, table, stem, unit, outside).run()


def _whole(extent: int, size: int) -> list[tuple[int, int, int]]:
    """`extent` in pieces of `size` and a rest: (start, how many, size)."""
    count, rest = divmod(extent, size)
    return [p for p in ((0, count, size), (count * size, 1 if rest else 0, rest)) if p[1]]


class _Scope:
    def __init__(self, variables: set[Axis]) -> None:
        self.variables = variables
        self.body: list[Statement] = []
        self.known: dict[Any, Register] = {}


class _Lowering:
    """One variant of a kernel's body, all extents known.

    renamed: the unit axis -> the axis that counts inside a unit; table: axes -> sums of loop variables; unit: the
    number of the unit at hand.
    """

    def __init__(
        self, kernel: Kernel, schedule: Schedule, renamed: Mapping[Axis, Axis], table: Mapping[Axis, Affine], stem: str,
        unit: Affine, outside: set[Axis],
    ) -> None:  # fmt: skip
        self.kernel, self.s = kernel, schedule
        self.renamed = renamed
        self.table: dict[Axis, Affine] = dict(table)
        self.stem, self.unit = stem, unit
        self.numbers = count()
        self.domain = [renamed.get(a, a) for a in kernel.domain]
        self.original = dict(zip(self.domain, kernel.domain, strict=True))
        self.lanes = renamed.get(schedule.lanes, schedule.lanes) if schedule.lanes is not None else None
        self.tile = renamed.get(schedule.tile, schedule.tile) if schedule.tile is not None else None
        self.side = renamed.get(schedule.side, schedule.side) if schedule.side is not None else None
        self.columns = 1  # of the tile at hand
        self.reduced = list(kernel.reduced)
        self.scopes = [_Scope(outside)]
        self.row = self.vector = 0  # row: row of the tile · columns + column
        self.valid = 1  # lanes of the vector at hand that count
        self.tag = 0  # which copy of an unrolled body
        self.innermost = self._innermost()
        self.positions: dict[Axis, Affine] = {}  # where each axis that is tiled stands, inside the unit
        # The part of the innermost reduced axis at hand: its first place and its length.
        self.span = (Affine(), self.innermost.extent if self.innermost is not None else 0)
        self.packed_from = Affine()  # the place of that axis with which packed operands begin
        self.sums = [v for v in kernel.values() if v.op == "reduce"]
        self.within = {a: (i, n) for i, n in bounds(self.sums).items() for a in kernel.reduced if a in i.axes}
        self.after: set[Value] = set()  # what is made of sums
        for v in kernel.values():
            if v.op == "reduce" or any(a in self.after for a in (*v.args, *v.index)):
                self.after.add(v)
        self.summed: dict[Any, Register] = {}
        self.made_in: dict[Register, _Scope] = {}
        self.parts: dict[Value, list[Value]] = {}
        self.following: dict[Value, Value] = {}  # by the number of a row of data, that of the row that is read one tile later
        self.hopeful = hopeful(kernel)
        # What was made of plain products in place of strong ones, and how it is made without hope.
        self.hoped: dict[Register, Let] = {}

    # ---- small things --------------------------------------------------------------------------------------------------------

    def register(self, dtype: np.dtype[Any], width: int) -> Register:
        return Register(f"{self.stem}r{next(self.numbers)}", dtype, width)

    def variable(self, stem: str, extent: int) -> Axis:
        return Axis(f"{stem}_{self.stem}{next(self.numbers)}", extent)

    def _innermost(self) -> Axis | None:
        if not self.reduced:
            return None
        return self.lanes if self.lanes in self.reduced else self.reduced[-1]

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
        return index.replaced(self.table)

    def let(self, op: str, dtype: np.dtype[Any], width: int, args: tuple[Register, ...], scope: _Scope, **attrs: Any) -> Register:
        target = self.register(dtype, width)
        made = Let(target, op, args, attrs)
        scope.body.append(made)
        if any(a in self.hoped for a in args):
            self.hoped[target] = made
        return target

    def splat(self, r: Register, width: int) -> Register:
        if r.width == width:
            return r
        for scope in self.scopes:  # where it was made, or further in
            if ("splat", r, width) in scope.known:
                return scope.known["splat", r, width]
        scope = self.made_in.get(r, self.scopes[-1])
        made = scope.known["splat", r, width] = self.let("splat", r.dtype, width, (r,), scope)
        return made

    def _width(self, valid: int) -> int:
        """Lanes of a register of which so many count: half as many where they do, since some processors take wide vectors in halves."""
        half = self.s.width // 2
        return half if 0 < valid <= half and self.lanes in self.domain else self.s.width

    # ---- loops ---------------------------------------------------------------------------------------------------------------

    def run(self) -> list[Statement]:
        self.base = dict(self.table)
        across = self.renamed.get(self.s.across, self.s.across) if self.s.across is not None else None
        inner = (self.lanes, self.tile, self.side, across)
        outer = [a for a in self.domain if a not in inner and a.extent != 1]
        self._loops(outer, self._tiles if across is None else lambda: self._squares(across))
        return self.scopes[0].body

    def _loops(self, axes: list[Axis], inside: Callable[[], None]) -> None:
        if not axes:
            inside()
            return
        self._loop(axes[0], *self._limits(axes[0], axes[0].extent), lambda: self._loops(axes[1:], inside))

    def _loop(self, variable: Axis, first: int | Register, last: int | Register, inside: Callable[[], None]) -> None:
        scope = self._open(variable)
        inside()
        self._close(scope, variable, first, last)

    def _open(self, variable: Axis) -> _Scope:
        scope = _Scope({variable})
        self.scopes.append(scope)
        return scope

    def _close(self, scope: _Scope, variable: Axis, first: Bound, last: Bound, carries: tuple[Carry, ...] = (),
               results: tuple[Register, ...] = ()) -> None:  # fmt: skip
        assert self.scopes.pop() is scope
        self.scopes[-1].body.append(For(variable, first, last, scope.body, carries, results))

    def _tiles(self) -> None:
        by_lanes = self.lanes is not None and self.lanes in self.domain
        if not by_lanes:
            self._row_tiles(lambda rows: self._tile(rows, [(0, self.s.width)]))
        elif self.s.inner_rows:
            self._lane_tiles(self._packed_tile)
        else:
            self._row_tiles(lambda rows: self._lane_tiles(lambda vectors: self._tile(rows, vectors)))

    def _packed_tile(self, vectors: list[tuple[int, int]]) -> None:
        if self.kernel.block:
            self._blocked(vectors)
            return
        for v, buffer in self.kernel.packed.items():
            over = [a for a in self.reduced if a in v.axes]
            for a in over:
                self.table.pop(a, None)  # where it stood at the end of the tile before
            if v.attrs.get("turned"):
                self._loops(over[:-1], partial(self._pack_turned, v, over[-1], buffer, vectors))
            else:
                self._loops(over, partial(self._pack, v, buffer, vectors))
        self._row_tiles(lambda rows: self._tile(rows, vectors))

    def _blocked(self, vectors: list[tuple[int, int]]) -> None:
        """Part after part of the reduced axis, for all rows; the sums stand in memory in between. Their order is what it would be."""
        (axis,) = self.reduced
        self._row_tiles(lambda rows: self._partial_sums(rows, vectors, None))
        for start, how_many, size in _whole(axis.extent, self.kernel.block):
            variable = self.variable("part", how_many)
            self.span = (affine(start, ((variable, self.kernel.block),)) if how_many > 1 else Affine(start), size)
            if how_many > 1:
                self._loop(variable, 0, how_many, lambda: self._part(vectors))
            else:
                self._part(vectors)
        self.span, self.packed_from = (Affine(), axis.extent), Affine()
        self._row_tiles(lambda rows: self._tile(rows, vectors))

    def _part(self, vectors: list[tuple[int, int]]) -> None:
        (axis,) = self.reduced
        first, length = self.span
        self.packed_from = first
        for v, buffer in self.kernel.packed.items():
            variable = self.variable("pack", length)
            self.table[axis] = first + of(variable)
            self._loop(variable, 0, length, partial(self._pack, v, buffer, vectors))
        self._row_tiles(lambda rows: self._partial_sums(rows, vectors, length))

    def _partial_sums(self, rows: int, vectors: list[tuple[int, int]], length: int | None) -> None:
        """Sums of a tile so far: from memory, one part further, to memory. length None: nothing yet."""
        scope = _Scope(set())
        self.scopes.append(scope)
        cells = self._cells(rows, vectors)
        current = self._neutral(cells)
        if length is not None:
            current = self._in_parts(cells, self._read_sums(cells), *self.span)
        for key, register in current.items():
            scope.body.append(Write(self._sum_place(cells, key), register))
        self.scopes.pop()
        self.scopes[-1].body += scope.body

    def _together(self, a: dict[Any, Register], b: dict[Any, Register]) -> dict[Any, Register]:
        return {k: self._combine(k[0], a[k], b[k], self.scopes[-1]) for k in a}

    def _read_sums(self, cells: Mapping[Any, Any]) -> dict[Any, Register]:
        current: dict[Any, Register] = {}
        for v, r, n in cells:
            for c in range(self.s.chains):
                current[v, r, n, c] = target = self.register(v.dtype, self._sum_width(v, cells[v, r, n][2]))
                self.scopes[-1].body.append(Read(target, self._sum_place(cells, (v, r, n, c))))
        return current

    def _sum_place(self, cells: Mapping[Any, Any], key: Any) -> Place:
        v, r, n, c = key
        buffer = self.kernel.partial
        assert buffer is not None
        assert self.tile is not None
        width = self.s.width
        number = (self.sums.index(v) * self.s.vectors + n) * self.s.chains + c
        line = len(self.sums) * self.s.vectors * self.s.chains * width
        at = (self.positions[self.tile] + r) * line + number * width + self.unit * buffer.shape[1]
        return Place(buffer, at, (), 1, self._sum_width(v, cells[v, r, n][2]))

    def _pack(self, v: Value, buffer: Buffer, vectors: list[tuple[int, int]]) -> None:
        scope = self.scopes[-1]
        for n, valid in vectors:
            self.vector, self.valid = n, valid
            target = self.register(v.dtype, self._width(valid))
            assert v.buffer is not None
            scope.body.append(Read(target, self._where(v.buffer, v.index, v.shape)))
            scope.body.append(Write(self._pack_place(v, buffer), target))

    def _pack_turned(self, v: Value, axis: Axis, buffer: Buffer, vectors: list[tuple[int, int]]) -> None:
        """The same of an operand whose neighbours in memory lie along the reduced `axis`: square by square."""

        def square(columns: int) -> None:
            assert v.buffer is not None
            for self.vector, self.valid in vectors:
                read, to = self._where(v.buffer, v.index, v.shape), self._pack_place(v, buffer)
                lines = [
                    replace(read, address=read.address + read.stride * i, stride=1, lanes=columns) for i in range(self.valid)
                ]
                line = self.s.vectors * self.s.width
                self._turn(v.dtype, lines, [replace(to, address=to.address + line * i) for i in range(columns)])

        for first, how_many, size in _whole(axis.extent, self.s.width):
            self._steps(axis, first, how_many, self.s.width, partial(square, size))

    def _pack_place(self, v: Value, buffer: Buffer) -> Place:
        """Where in its own memory a packed operand's vector stands: one area for each unit."""
        over = [a for a in self.reduced if a in v.axes]
        width = self.s.vectors * self.s.width
        at = flat((of(a) for a in over), (a.extent for a in over)) * width
        at = self.address(at) + self.packed_from * -width + self.unit * buffer.shape[1] + self.vector * self.s.width
        return Place(buffer, at, (), 1, self.valid)

    def _row_tiles(self, inside: Callable[[int], None]) -> None:
        if self.tile is None:
            self._column_tiles(1, inside)
            return
        for start, how_many, size in balanced(self.tile.extent, self.s.rows):
            self._steps(self.tile, start, how_many, size, partial(self._column_tiles, size, inside))

    def _column_tiles(self, rows: int, inside: Callable[[int], None]) -> None:
        """inside: of rows times columns."""
        if self.side is None:
            inside(rows)
            return

        def some(columns: int) -> None:
            self.columns = columns
            inside(rows * columns)

        for start, how_many, size in balanced(self.side.extent, self.s.columns):
            self._steps(self.side, start, how_many, size, partial(some, size))

    def _steps(self, axis: Axis, start: int, how_many: int, size: int, inside: Callable[[], None]) -> None:
        if how_many == 1:
            self.place_axis(axis, Affine(start))
            inside()
            return
        variable = self.variable(axis.name, how_many)
        self.place_axis(axis, affine(start, ((variable, size),)))
        self._loop(variable, 0, how_many, inside)

    def _lane_tiles(self, inside: Callable[[list[tuple[int, int]]], None]) -> None:
        """vectors: for each one (number, lanes that count)."""
        assert self.lanes is not None
        width = self.s.width
        whole, rest = divmod(self.lanes.extent, width)
        count = whole + (1 if rest else 0)
        for start, how_many, size in balanced(count, self.s.vectors):
            broken = rest and start + how_many * size == count
            if how_many - (1 if broken else 0) > 0:
                full = [(v, width) for v in range(size)]
                n = how_many - (1 if broken else 0)
                self._steps(self.lanes, start * width, n, size * width, partial(inside, full))
            if broken:
                vectors = [(v, width if v < size - 1 else rest) for v in range(size)]
                self._steps(self.lanes, (count - size) * width, 1, 0, partial(inside, vectors))

    def _tile(self, rows: int, vectors: list[tuple[int, int]]) -> None:
        # what was known of another tile does not hold here
        scope = _Scope(set())
        self.scopes.append(scope)
        self.summed = {}
        if self.sums:
            self._reduce(rows, vectors)
        for r in range(rows):
            for v, valid in vectors:
                self.row, self.vector, self.valid = r, v, valid
                values = [self._stored(store) for store in self.kernel.stores]  # all read before any is written: it may be state
                sure = self._made_sure(values)
                for store, value in zip(self.kernel.stores, values, strict=True):
                    self._store(store, sure.get(value, value))
        self.scopes.pop()
        self.scopes[-1].body += scope.body

    def _made_sure(self, values: Sequence[Register]) -> dict[Register, Register]:
        """What stands in place of values for which there was hope: themselves, or if one is NaN, what they truly are."""
        doubtful = [r for r in dict.fromkeys(values) if r in self.hoped]
        if not doubtful:
            return {}
        truly: dict[Register, Register] = {}
        body: list[Statement] = []
        for r in doubtful:
            stack = [r]
            while stack:
                missing = [a for a in self.hoped[stack[-1]].args if a in self.hoped and a not in truly]
                if missing or stack[-1] in truly:
                    stack = [*stack, *missing] if missing else stack[:-1]
                    continue
                made = self.hoped[stack.pop()]
                truly[made.target] = target = self.register(made.target.dtype, made.target.width)
                body.append(replace(made, target=target, args=tuple(truly.get(a, a) for a in made.args)))
        sure = {r: self.register(r.dtype, r.width) for r in doubtful}
        tested = tuple((r, self.valid if r.width > 1 else 1) for r in doubtful)
        self.scopes[-1].body.append(IfNaN(tested, body, tuple((new, r, truly[r]) for r, new in sure.items())))
        return sure

    # ---- transposed copies ---------------------------------------------------------------------------------------------------

    def _squares(self, across: Axis) -> None:
        """Squares as wide as a vector: rows read, turned, written."""
        width, lanes = self.s.width, self.lanes
        assert lanes is not None
        for first, how_many, size in _whole(across.extent, width):
            for first2, how_many2, size2 in _whole(lanes.extent, width):
                inside = partial(self._turned, across, size, size2)
                self._steps(across, first, how_many, width, partial(self._steps, lanes, first2, how_many2, width, inside))

    def _turned(self, across: Axis, columns: int, rows: int) -> None:
        (store,) = self.kernel.stores
        read, lanes = store.value, self.lanes
        assert read.buffer is not None
        assert lanes is not None
        at, step = self._along(flat(plain(read.index), read.shape))
        lines = [Place(read.buffer, at + step[lanes] * r, (), 1, columns) for r in range(rows)]
        at, step = self._along(flat(plain(store.index), store.view))
        at = at + self._copy_of(store.buffer)
        self._turn(read.dtype, lines, [Place(store.buffer, at + step[across] * c, (), 1, rows) for c in range(columns)])

    def _turn(self, dtype: np.dtype[Any], lines: Sequence[Place], columns: Sequence[Place]) -> None:
        """Lines of memory as columns: read, turned, written."""
        scope, width = self.scopes[-1], self.s.width
        registers = [self.register(dtype, width) for _ in lines]
        scope.body += [Read(r, line) for r, line in zip(registers, lines, strict=True)]
        none = [self.let("constant", dtype, width, (), scope, value=dtype.type(0)) for _ in range(width - len(lines))]
        for number, place in enumerate(columns):
            turned = self.let("transposed", dtype, width, (*registers, *none), scope, line=number)
            scope.body.append(Write(place, turned))

    def _along(self, index: Affine) -> tuple[Affine, dict[Axis, int]]:
        return self.address(index), {a: self._coefficient(index, a) for a in self.domain}

    # ---- values --------------------------------------------------------------------------------------------------------------

    def _own(self, axes: frozenset[Axis]) -> frozenset[Axis]:
        return frozenset(self.renamed.get(a, a) for a in axes) if not axes.isdisjoint(self.renamed) else axes

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
        axes = self._own(v.axes)
        r = self._row_of(self.row, axes)
        lane = self.vector if self.lanes in axes else 0
        tag = self.tag if self.innermost in axes else 0
        valid = self.valid if self.lanes in axes else 1
        key = (v, r, lane, tag, valid)
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

    def _row_of(self, row: int, axes: frozenset[Axis]) -> int:
        """The row of a value that may not depend on the tile's axes."""
        r, column = divmod(row, self.columns)
        return (r if self.tile in axes else 0) * self.columns + (column if self.side in axes else 0)

    def _scope_of(self, v: Value, axes: frozenset[Axis]) -> _Scope:
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

    def _make(self, v: Value, axes: frozenset[Axis], scope: _Scope) -> Register:
        width = self._width(self.valid) if self.lanes in axes else 1
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
        if v in self.hopeful:
            target = self.let(PLAIN[v.op], v.dtype, width, wide, scope, **v.attrs)
            self.hoped[target] = Let(target, v.op, wide, v.attrs)
            return target
        return self.let(v.op, v.dtype, width, wide, scope, **v.attrs)

    def _moved(self, index: Affine) -> tuple[Affine, int]:
        """An index at the row, vector and copy at hand, and its step from lane to lane."""
        step = self._coefficient(index, self.lanes)
        at = self.address(index)
        row, column = divmod(self.row, self.columns)
        at = at + (self._coefficient(index, self.tile) * row + self._coefficient(index, self.side) * column)
        if self.lanes in self.domain:
            at = at + step * self.vector * self.s.width
        return at, step

    def _coefficient(self, index: Affine, axis: Axis | None) -> int:
        return index.coefficient(self.original.get(axis, axis)) if axis is not None else 0

    def _where(self, buffer: Buffer, index: tuple[Affine | Value, ...], shape: tuple[int, ...]) -> Place:
        position, looked_up, size = Affine(), [], 1
        for i, n in zip(reversed(index), reversed(shape), strict=True):
            if isinstance(i, Value):
                looked_up.append((self._value(i), size))
            else:
                position = position + i * size
            size *= n
        at, step = self._moved(position)
        return Place(buffer, at + self._copy_of(buffer), tuple(looked_up), step, self.valid)

    def _copy_of(self, buffer: Buffer) -> Affine:
        """How far this unit's own copy of a buffer is from the first unit's."""
        return self.unit * buffer.part_of[0].shape[1] if buffer.part_of is not None else Affine()

    def _load(self, v: Value, width: int, scope: _Scope) -> Register:
        packed = self.kernel.packed.get(v)
        assert v.buffer is not None
        place = self._where(v.buffer, v.index, v.shape) if packed is None else self._pack_place(v, packed)
        if width == 1:
            place = Place(place.buffer, place.address, place.looked_up)
        target = self.register(v.dtype, width)
        scope.body.append(Read(target, place))
        if (row := self._row_of_data(v)) is not None and width * v.dtype.itemsize >= LEAST_FETCH:
            scope.body.append(Fetch(self._where(v.buffer, (self._next(row), *v.index[1:]), v.shape)))
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

    def _stored(self, store: Store) -> Register:
        for i in store.index:
            if isinstance(i, Value):
                self.value(i)
        return self.splat(self.value(store.value), self._width(self.valid) if self.lanes in self.domain else 1)

    def _store(self, store: Store, value: Register) -> None:
        scope = self.scopes[-1]
        width = value.width
        place = self._where(store.buffer, store.index, store.view)
        if width == 1:
            place = Place(place.buffer, place.address, place.looked_up)
        if store.mode == "add":
            old = self.register(value.dtype, width)
            scope.body.append(Read(old, place))
            value = self.let("add", value.dtype, width, (old, value), scope)
        scope.body.append(Write(place, value))

    # ---- reductions ----------------------------------------------------------------------------------------------------------

    def _reduce(self, rows: int, vectors: list[tuple[int, int]]) -> None:
        """All sums of the kernel, for all registers of the tile."""
        scope = self.scopes[-1]
        cells = self._cells(rows, vectors)
        if self.kernel.block:
            total = self._read_sums(cells)
        else:
            total = self._neutral(cells)
            if all(a.extent for a in self.reduced):
                total = self._nest([a for a in self.reduced if a is not self.innermost], cells, total)
        for v, r, n in cells:
            parts = [total[v, r, n, c] for c in range(self.s.chains)]
            while len(parts) > 1:
                half = len(parts) // 2
                parts = [self._combine(v, parts[i], parts[i + half], scope) for i in range(half)]
            result = parts[0]
            if self.lanes in self.reduced and result.width > 1:
                result = self.let("lanes", v.dtype, 1, (result,), scope, how=v.attrs["how"])
            self.summed[v, r, n] = result

    def _cells(self, rows: int, vectors: list[tuple[int, int]]) -> dict[Any, tuple[int, int, int]]:
        """The accumulators of a tile: (value, row, vector) -> row, vector, lanes that count. They stand in the order that keeps fewer
        operands in registers: column by column where there are more columns than rows."""
        cells: dict[Any, tuple[int, int, int]] = {}
        order: Sequence[int] = range(rows)
        if self.columns > rows // self.columns:
            order = sorted(order, key=lambda r: (r % self.columns, r))
        for v in self.sums:
            axes = self._own(v.axes)
            for r in dict.fromkeys(self._row_of(r, axes) for r in order):
                for n, valid in vectors if self.lanes in axes else [(0, self.s.width)]:
                    cells[v, r, n] = (r, n, valid)
        return cells

    def _neutral(self, cells: Mapping[Any, Any]) -> dict[Any, Register]:
        scope = self.scopes[-1]
        return {
            (v, r, n, c): self.let("neutral", v.dtype, self._sum_width(v, valid), (), scope, how=v.attrs["how"])
            for (v, r, n), (_, _, valid) in cells.items()
            for c in range(self.s.chains)
        }

    def _sum_width(self, v: Value, valid: int) -> int:
        return self._width(valid) if self.lanes in self._own(v.axes | frozenset(v.attrs["over"])) else 1

    def _combine(self, v: Value, a: Register, b: Register, scope: _Scope) -> Register:
        return self.let("combine", v.dtype, a.width, (a, b), scope, how=v.attrs["how"])

    def _nest(self, axes: list[Axis], cells: Mapping[Any, Any], current: dict[Any, Register]) -> dict[Any, Register]:
        if not axes:
            return self._long(cells, current)
        assert self.innermost is not None
        within = prod(a.extent for a in axes[1:]) * self.innermost.extent
        if axes[0] in self.within:
            return self._confined(axes[0], current, lambda now: self._nest(axes[1:], cells, now))

        def inside(now: dict[Any, Register]) -> dict[Any, Register]:
            if within < NESTED_SUM or within * axes[0].extent <= LONG_SUM:
                return self._nest(axes[1:], cells, now)
            return self._together(now, self._nest(axes[1:], cells, self._neutral(cells)))

        size = max(1, LONG_SUM // max(within, 1))
        if within >= NESTED_SUM or axes[0].extent <= size:
            return self._carried(axes[0], axes[0].extent, current, inside)
        return self._outer_parts(axes[0], size, cells, current, inside)

    def _outer_parts(self, axis: Axis, size: int, cells: Mapping[Any, Any], current: dict[Any, Register],
                     inside: Callable[[dict[Any, Register]], dict[Any, Register]]) -> dict[Any, Register]:  # fmt: skip
        """A long axis around short ones, in parts, each summed from nothing."""
        assert axis not in self.kernel.between
        for start, how_many, own in _whole(axis.extent, size):
            variable = self.variable("part", how_many)

            def part(
                now: dict[Any, Register], start: int = start, own: int = own, variable: Axis = variable
            ) -> dict[Any, Register]:
                within = self.variable(axis.name, own)
                at = affine(start, ((variable, size),)) if variable.extent > 1 else Affine(start)
                self.table[axis] = at + of(within)
                return self._together(now, self._carried(within, own, self._neutral(cells), inside))

            current = self._carried(variable, how_many, current, part) if how_many > 1 else part(current)
        self.table.pop(axis, None)
        return current

    def _carried(self, variable: Axis, extent: int, current: dict[Any, Register],
                 inside: Callable[[dict[Any, Register]], dict[Any, Register]]) -> dict[Any, Register]:  # fmt: skip
        first, last = self._limits(variable, extent)
        return self._turns(variable, first, last, current, inside)

    def _confined(self, axis: Axis, current: dict[Any, Register],
                  inside: Callable[[dict[Any, Register]], dict[Any, Register]]) -> dict[Any, Register]:  # fmt: skip
        """Over those places of a reduced axis for which what confines it, at - step · axis, is at least 0 and below its bound."""
        confined, bound = self.within[axis]
        step = -confined.coefficient(axis)
        at = self.address(confined.without(axis))
        first, last = Clamped(at + (step - bound), step, axis.extent), Clamped(at + step, step, axis.extent)
        return self._turns(axis, first, last, current, inside)

    def _turns(self, variable: Axis, first: Bound, last: Bound, current: dict[Any, Register],
               inside: Callable[[dict[Any, Register]], dict[Any, Register]]) -> dict[Any, Register]:  # fmt: skip
        scope = self._open(variable)
        carried = {k: self.register(r.dtype, r.width) for k, r in current.items()}
        after = inside(carried)
        carries = tuple(Carry(carried[k], current[k], after[k]) for k in current)
        results = {k: self.register(r.dtype, r.width) for k, r in current.items()}
        self._close(scope, variable, first, last, carries, tuple(results[k] for k in current))
        return results

    def _limits(self, axis: Axis, extent: int) -> tuple[int | Register, int | Register]:
        """From where to where a loop over an axis goes."""
        between = self.kernel.between.get(axis)
        return (0, extent) if between is None else (self.value(between[0]), self.value(between[1]))

    def _long(self, cells: Mapping[Any, Any], current: dict[Any, Register]) -> dict[Any, Register]:
        """A long sum in parts; a short one as a whole."""
        axis = self.innermost
        assert axis is not None
        if axis in self.within:
            return self._confined(axis, current, lambda now: self._step(cells, now, 0, self.s.width))
        if axis.extent <= self._part_length:
            return self._inner(cells, current)
        return self._in_parts(cells, current, Affine(), axis.extent)

    @property
    def _part_length(self) -> int:
        return LONG_SUM * (self.s.width if self.lanes in self.reduced else 1)

    def _in_parts(
        self, cells: Mapping[Any, Any], current: dict[Any, Register], first: Affine, length: int
    ) -> dict[Any, Register]:
        """Parts of one length, each summed from nothing: what rounding takes grows with that length, not with the whole."""
        before = self.span
        size = self._part_length
        for start, how_many, own in _whole(length, size):
            variable = self.variable("part", how_many)

            def part(
                now: dict[Any, Register], start: int = start, own: int = own, variable: Axis = variable
            ) -> dict[Any, Register]:
                at = affine(start, ((variable, size),)) if variable.extent > 1 else Affine(start)
                self.span = (first + at, own)
                return self._together(now, self._inner(cells, self._neutral(cells)))

            current = self._carried(variable, how_many, current, part) if how_many > 1 else part(current)
        self.span = before
        return current

    def _inner(self, cells: Mapping[Any, Any], current: dict[Any, Register]) -> dict[Any, Register]:
        axis, s = self.innermost, self.s
        assert axis is not None
        step = s.width if axis is self.lanes else 1
        first, length = self.span
        whole, rest = divmod(length, step)
        loops, left = divmod(whole, s.unroll)
        tags = count(1)

        def several(now: dict[Any, Register], base: Affine, how_many: int, valid: int) -> dict[Any, Register]:
            for j in range(how_many):
                self.table[axis] = first + base + j * step
                self.tag = next(tags)
                now = self._step(cells, now, j % s.chains, valid)
            return now

        if loops > 1:
            variable = self.variable(axis.name, loops)
            base = affine(0, ((variable, s.unroll * step),))
            current = self._carried(variable, loops, current, lambda now: several(now, base, s.unroll, s.width))
        elif loops:
            left += s.unroll
        done = (whole - left) * step
        current = several(current, Affine(done), left, s.width)
        if rest:
            current = several(current, Affine(whole * step), 1, rest)
        self.tag = 0
        return current

    def _step(self, cells: Mapping[Any, Any], now: dict[Any, Register], chain: int, valid: int) -> dict[Any, Register]:
        """One more term for each accumulator."""
        after = dict(now)
        reduced_lanes = self.lanes in self.reduced
        for (v, r, n), (row, vector, own) in cells.items():
            self.row, self.vector = row, vector
            self.valid = valid if reduced_lanes else own
            key = (v, r, n, chain)
            after[key] = self._term(v, now[key], valid if reduced_lanes else None)
        return after

    def _term(self, v: Value, total: Register, valid: int | None) -> Register:
        scope = self.scopes[-1]
        (term,) = v.args
        width = total.width
        broken = valid is not None and valid < self.s.width and width > 1
        if v.attrs["how"] == "sum" and term.op == "multiply" and not broken:
            a, b = (self.splat(self.value(x), width) for x in term.args)
            return self.let("fma", v.dtype, width, (a, b, total), scope)
        made = self.splat(self.value(term), width)
        if broken:
            made = self.let("keep", v.dtype, width, (made,), scope, how=v.attrs["how"], lanes=valid)
        return self._combine(v, total, made, scope)
