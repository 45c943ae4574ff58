"""Kernels -> loops over registers.

In: a kernel, its schedule, and the number of units. Out: a `Function`: loops over units, over the axes of the domain, and over tiles of
rows and vectors; operands that are packed before, and what is stored at the end. Values stand in registers by values.py, sums by sums.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from .affine import Affine, Axis, affine, flat, of
from .flatten import can_be_lines, flattened, seen_as_lines
from .kernels import Buffer, Kernel, Value, plain
from .loops import For, Function, If, Place, Read, Register, Statement, Write
from .schedule import Schedule, balanced, cut, pieces, schedule
from .sums import Sums
from .target import Target
from .values import Values


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
        return _Lowering(Values(lines, schedule(lines, target), {}, {}, stem, unit, outside)).run()
    return _Lowering(Values(kernel, made, renamed, table, stem, unit, outside)).run()


class _Lowering:
    """The loops of one variant of a kernel's body."""

    def __init__(self, values: Values) -> None:
        self.values, self.sums = values, Sums(values)
        self.kernel, self.s = values.kernel, values.s
        inside = self.kernel.inside()
        self.stores = [s for s in self.kernel.stores if s not in inside]
        self.domain, self.reduced = values.domain, values.reduced
        self.lanes, self.tile, self.side = values.lanes, values.tile, values.side

    def run(self) -> list[Statement]:
        across = self.values.renamed.get(self.s.across, self.s.across) if self.s.across is not None else None
        inner = (self.lanes, self.tile, self.side, across)
        outer = [a for a in self.domain if a not in inner and a.extent != 1]
        self._loops(outer, self._tiles if across is None else lambda: self._squares(across))
        return self.values.scopes[0].body

    def _loops(self, axes: list[Axis], inside: Callable[[], None]) -> None:
        if not axes:
            inside()
            return
        self._loop(axes[0], *self.values.limits(axes[0], axes[0].extent), lambda: self._loops(axes[1:], inside))

    def _loop(self, variable: Axis, first: int | Register, last: int | Register, inside: Callable[[], None]) -> None:
        scope = self.values.open(variable)
        inside()
        self.values.close(scope, variable, first, last)

    def _steps(self, axis: Axis, start: int, how_many: int, size: int, inside: Callable[[], None]) -> None:
        if how_many == 1:
            self.values.place_axis(axis, Affine(start))
            inside()
            return
        variable = self.values.variable(axis.name, how_many)
        self.values.place_axis(axis, affine(start, ((variable, size),)))
        self._loop(variable, 0, how_many, inside)

    # ---- tiles ---------------------------------------------------------------------------------------------------------------

    def _tiles(self) -> None:
        by_lanes = self.lanes is not None and self.lanes in self.domain
        if not by_lanes:
            self._row_tiles(lambda rows: self._tile(rows, [(0, self.s.width)]))
        elif self.s.inner_rows:
            self._lane_tiles(self._packed_tile)
        else:
            self._row_tiles(lambda rows: self._lane_tiles(lambda vectors: self._tile(rows, vectors)))

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
            self.values.columns = columns
            inside(rows * columns)

        for start, how_many, size in balanced(self.side.extent, self.s.columns):
            self._steps(self.side, start, how_many, size, partial(some, size))

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
        with self.values.in_tile():
            self.sums.reduce(rows, vectors)
            for r in range(rows):
                for v, valid in vectors:
                    self.values.row, self.values.vector, self.values.valid = r, v, valid
                    # All are read before any is written: it may be state.
                    stored = [self.values.stored(store) for store in self.stores]
                    sure = self._made_sure(stored)
                    for store, value in zip(self.stores, stored, strict=True):
                        self.values.store(store, sure.get(value, value))

    def _made_sure(self, stored: Sequence[Register]) -> dict[Register, Register]:
        """What stands in place of values for which there was hope."""
        statements, sure = self.values.hope.made_sure(stored, self.values.valid, self.values.register)
        for statement in statements:
            self.values.add(statement)
        return sure

    # ---- packed operands -----------------------------------------------------------------------------------------------------

    def _packed_tile(self, vectors: list[tuple[int, int]]) -> None:
        if self.kernel.block:
            self._blocked(vectors)
            return
        for v, buffer in self.kernel.packed.items():
            over = [a for a in self.reduced if a in v.axes]
            for a in over:
                self.values.table.pop(a, None)  # where it stood at the end of the tile before
            if v.attrs.get("turned"):
                self._loops(over[:-1], partial(self._pack_turned, v, over[-1], buffer, vectors))
            else:
                self._loops(over, partial(self._pack, v, buffer, vectors))
        self._row_tiles(lambda rows: self._tile(rows, vectors))

    def _blocked(self, vectors: list[tuple[int, int]]) -> None:
        """Part after part of the reduced axis, for all rows; the sums stand in memory in between. Their order is what it would be."""
        (axis,) = self.reduced
        self._row_tiles(lambda rows: self.sums.partial_sums(rows, vectors, None))
        for start, how_many, size in pieces(axis.extent, self.kernel.block):
            variable = self.values.variable("part", how_many)
            self.sums.span = (affine(start, ((variable, self.kernel.block),)) if how_many > 1 else Affine(start), size)
            if how_many > 1:
                self._loop(variable, 0, how_many, lambda: self._part(vectors))
            else:
                self._part(vectors)
        self.sums.span, self.values.packed_from = (Affine(), axis.extent), Affine()
        self._row_tiles(lambda rows: self._tile(rows, vectors))

    def _part(self, vectors: list[tuple[int, int]]) -> None:
        (axis,) = self.reduced
        first, length = self.sums.span
        self.values.packed_from = first
        for v, buffer in self.kernel.packed.items():
            variable = self.values.variable("pack", length)
            self.values.table[axis] = first + of(variable)
            self._loop(variable, 0, length, partial(self._pack, v, buffer, vectors))
        self._row_tiles(lambda rows: self.sums.partial_sums(rows, vectors, length))

    def _pack(self, v: Value, buffer: Buffer, vectors: list[tuple[int, int]]) -> None:
        for n, valid in vectors:
            self.values.vector, self.values.valid = n, valid
            target = self.values.register(v.dtype, self.values.width(valid))
            assert v.buffer is not None
            self.values.add(Read(target, self.values.place(v.buffer, v.index, v.shape)))
            self.values.add(Write(self.values.pack_place(v, buffer), target))

    def _pack_turned(self, v: Value, axis: Axis, buffer: Buffer, vectors: list[tuple[int, int]]) -> None:
        """The same of an operand whose neighbours in memory lie along the reduced `axis`: square by square."""

        def square(columns: int) -> None:
            assert v.buffer is not None
            for n, valid in vectors:
                self.values.vector, self.values.valid = n, valid
                read, to = self.values.place(v.buffer, v.index, v.shape), self.values.pack_place(v, buffer)
                lines = [replace(read, address=read.address + read.stride * i, stride=1, lanes=columns) for i in range(valid)]
                line = self.s.vectors * self.s.width
                self._turn(v.dtype, lines, [replace(to, address=to.address + line * i) for i in range(columns)])

        for first, how_many, size in pieces(axis.extent, self.s.width):
            self._steps(axis, first, how_many, self.s.width, partial(square, size))

    # ---- transposed copies ---------------------------------------------------------------------------------------------------

    def _squares(self, across: Axis) -> None:
        """Squares as wide as a vector: rows read, turned, written."""
        width, lanes = self.s.width, self.lanes
        assert lanes is not None
        for first, how_many, size in pieces(across.extent, width):
            for first2, how_many2, size2 in pieces(lanes.extent, width):
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
        at = at + self.values.copy_of(store.buffer)
        self._turn(read.dtype, lines, [Place(store.buffer, at + step[across] * c, (), 1, rows) for c in range(columns)])

    def _turn(self, dtype: np.dtype[Any], lines: Sequence[Place], columns: Sequence[Place]) -> None:
        """Lines of memory as columns: read, turned, written."""
        scope, width = self.values.scopes[-1], self.s.width
        registers = [self.values.register(dtype, width) for _ in lines]
        scope.body += [Read(r, line) for r, line in zip(registers, lines, strict=True)]
        none = [self.values.let("constant", dtype, width, (), scope, value=dtype.type(0)) for _ in range(width - len(lines))]
        for number, place in enumerate(columns):
            turned = self.values.let("transposed", dtype, width, (*registers, *none), scope, line=number)
            scope.body.append(Write(place, turned))

    def _along(self, index: Affine) -> tuple[Affine, dict[Axis, int]]:
        return self.values.address(index), {a: self.values.coefficient(index, a) for a in self.domain}
