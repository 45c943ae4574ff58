"""The sums of a kernel in registers: their accumulators, the loops over reduced axes, and the order in which terms are added.

In: the values of a kernel, and the rows and vectors of a tile. Out: the register of each sum, among the values; or, where a tile goes
through its terms in parts, the sums so far in memory. A sum's order follows from kernel and schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import count, product
from math import prod
from typing import Any

from .affine import Affine, Axis, affine, of
from .kernels import Value, bounds
from .loops import Bound, Carry, Clamped, IfNaN, Place, Read, Register, Write
from .schedule import LONG_SUM, NESTED_SUM, pieces
from .values import Scope, Values


class Sums:
    """All sums of one variant of a kernel's body. Accumulators have keys (value, row, vector, chain)."""

    def __init__(self, values: Values) -> None:
        self.values = values
        self.kernel, self.s = values.kernel, values.s
        self.lanes, self.tile, self.reduced, self.innermost = values.lanes, values.tile, values.reduced, values.innermost
        # The part of the innermost reduced axis at hand: its first place and its length.
        self.span = (Affine(), self.innermost.extent if self.innermost is not None else 0)
        self.sums = [v for v in self.kernel.values() if v.op == "reduce"]
        # What is stored where it is a term: tiles of such kernels have one row, and nothing is packed.
        self.inside = self.kernel.inside()
        self.vectors: list[tuple[int, int]] = []  # of the tile at hand
        assert not self.inside or (self.tile is None and not self.kernel.packed)
        self.within = {a: (i, n) for i, n in bounds(self.sums).items() for a in self.reduced if a in i.axes}

    def reduce(self, rows: int, vectors: list[tuple[int, int]]) -> None:
        """All sums of the kernel, for all registers of the tile."""
        self.values.summed = {}
        if self.sums:
            self.vectors = vectors
            cells = self._cells(rows, vectors)
            made = self._reduced(cells)
            self.values.summed = made | self._made_sure(cells, made) if self.values.hope.terms else made

    def _made_sure(self, cells: Mapping[Any, tuple[int, int, int]], hoped: dict[Any, Register]) -> dict[Any, Register]:
        """The sums for which there was hope; if one of them is NaN, they, and what is stored for each term, are made again, of terms as
        they truly are."""
        scope, hope, again = self.values.scopes[-1], self.values.hope, Scope(set())
        self.values.scopes.append(again)
        hope.given_up = True
        truly = self._reduced(cells)
        hope.given_up = False
        assert self.values.scopes.pop() is again
        sure = {key: self.values.register(r.dtype, r.width) for key, r in hoped.items() if key[0] in hope.spread}
        tested = tuple((hoped[key], cells[key][2] if hoped[key].width > 1 else 1) for key in sure)
        scope.body.append(IfNaN(tested, again.body, tuple((r, hoped[key], truly[key]) for key, r in sure.items())))
        return sure

    def _reduced(self, cells: Mapping[Any, tuple[int, int, int]]) -> dict[Any, Register]:
        """Each sum of a tile."""
        scope = self.values.scopes[-1]
        summed: dict[Any, Register] = {}
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
                result = self.values.let("lanes", v.dtype, 1, (result,), scope, how=v.attrs["how"])
            summed[v, r, n] = result
        return summed

    def partial_sums(self, rows: int, vectors: list[tuple[int, int]], length: int | None) -> None:
        """Sums of a tile so far: from memory, one part further, to memory. length None: nothing yet."""
        with self.values.in_tile():
            cells = self._cells(rows, vectors)
            current = self._neutral(cells)
            if length is not None:
                current = self._in_parts(cells, self._read_sums(cells), *self.span)
            for key, register in current.items():
                self.values.add(Write(self._sum_place(cells, key), register))

    def _read_sums(self, cells: Mapping[Any, Any]) -> dict[Any, Register]:
        current: dict[Any, Register] = {}
        for v, r, n in cells:
            for c in range(self.s.chains):
                current[v, r, n, c] = target = self.values.register(v.dtype, self._sum_width(v, cells[v, r, n][2]))
                self.values.add(Read(target, self._sum_place(cells, (v, r, n, c))))
        return current

    def _sum_place(self, cells: Mapping[Any, Any], key: Any) -> Place:
        v, r, n, c = key
        buffer = self.kernel.partial
        assert buffer is not None
        assert self.tile is not None
        width = self.s.width
        number = (self.sums.index(v) * self.s.vectors + n) * self.s.chains + c
        line = len(self.sums) * self.s.vectors * self.s.chains * width
        at = (self.values.positions[self.tile] + r) * line + number * width + self.values.unit * buffer.shape[1]
        return Place(buffer, at, (), 1, self._sum_width(v, cells[v, r, n][2]))

    # ---- accumulators --------------------------------------------------------------------------------------------------------

    def _cells(self, rows: int, vectors: list[tuple[int, int]]) -> dict[Any, tuple[int, int, int]]:
        """The accumulators of a tile: (value, row, vector) -> row, vector, lanes that count. They stand in the order that keeps fewer
        operands in registers: column by column where there are more columns than rows."""
        cells: dict[Any, tuple[int, int, int]] = {}
        order: Sequence[int] = range(rows)
        if self.values.columns > rows // self.values.columns:
            order = sorted(order, key=lambda r: (r % self.values.columns, r))
        for v in self.sums:
            axes = self.values.own(v.axes)
            for r in dict.fromkeys(self.values.row_of(r, axes) for r in order):
                for n, valid in vectors if self.lanes in axes else [(0, self.s.width)]:
                    cells[v, r, n] = (r, n, valid)
        return cells

    def _neutral(self, cells: Mapping[Any, Any]) -> dict[Any, Register]:
        scope = self.values.scopes[-1]
        return {
            (v, r, n, c): self.values.let("neutral", v.dtype, self._sum_width(v, valid), (), scope, how=v.attrs["how"])
            for (v, r, n), (_, _, valid) in cells.items()
            for c in range(self.s.chains)
        }

    def _sum_width(self, v: Value, valid: int) -> int:
        return self.values.width(valid) if self.lanes in self.values.own(v.axes | frozenset(v.attrs["over"])) else 1

    def _combine(self, v: Value, a: Register, b: Register, scope: Scope) -> Register:
        return self.values.let("combine", v.dtype, a.width, (a, b), scope, how=v.attrs["how"])

    def _together(self, a: dict[Any, Register], b: dict[Any, Register]) -> dict[Any, Register]:
        return {k: self._combine(k[0], a[k], b[k], self.values.scopes[-1]) for k in a}

    # ---- loops ---------------------------------------------------------------------------------------------------------------

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
        for start, how_many, own in pieces(axis.extent, size):
            variable = self.values.variable("part", how_many)

            def part(
                now: dict[Any, Register], start: int = start, own: int = own, variable: Axis = variable
            ) -> dict[Any, Register]:
                within = self.values.variable(axis.name, own)
                at = affine(start, ((variable, size),)) if variable.extent > 1 else Affine(start)
                self.values.table[axis] = at + of(within)
                return self._together(now, self._carried(within, own, self._neutral(cells), inside))

            current = self._carried(variable, how_many, current, part) if how_many > 1 else part(current)
        self.values.table.pop(axis, None)
        return current

    def _carried(self, variable: Axis, extent: int, current: dict[Any, Register],
                 inside: Callable[[dict[Any, Register]], dict[Any, Register]]) -> dict[Any, Register]:  # fmt: skip
        first, last = self.values.limits(variable, extent)
        return self._turns(variable, first, last, current, inside)

    def _confined(self, axis: Axis, current: dict[Any, Register],
                  inside: Callable[[dict[Any, Register]], dict[Any, Register]]) -> dict[Any, Register]:  # fmt: skip
        """Over those places of a reduced axis for which what confines it, at - step · axis, is at least 0 and below its bound."""
        confined, bound = self.within[axis]
        step = -confined.coefficient(axis)
        at = self.values.address(confined.without(axis))
        first, last = Clamped(at + (step - bound), step, axis.extent), Clamped(at + step, step, axis.extent)
        return self._turns(axis, first, last, current, inside)

    def _turns(self, variable: Axis, first: Bound, last: Bound, current: dict[Any, Register],
               inside: Callable[[dict[Any, Register]], dict[Any, Register]]) -> dict[Any, Register]:  # fmt: skip
        scope = self.values.open(variable)
        carried = {k: self.values.register(r.dtype, r.width) for k, r in current.items()}
        after = inside(carried)
        carries = tuple(Carry(carried[k], current[k], after[k]) for k in current)
        results = {k: self.values.register(r.dtype, r.width) for k, r in current.items()}
        self.values.close(scope, variable, first, last, carries, tuple(results[k] for k in current))
        return results

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
        for start, how_many, own in pieces(length, size):
            variable = self.values.variable("part", how_many)

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
                self.values.table[axis] = first + base + j * step
                self.values.tag = next(tags)
                now = self._step(cells, now, j % s.chains, valid)
            return now

        if loops > 1:
            variable = self.values.variable(axis.name, loops)
            base = affine(0, ((variable, s.unroll * step),))
            current = self._carried(variable, loops, current, lambda now: several(now, base, s.unroll, s.width))
        elif loops:
            left += s.unroll
        done = (whole - left) * step
        current = several(current, Affine(done), left, s.width)
        if rest:
            current = several(current, Affine(whole * step), 1, rest)
        self.values.tag = 0
        return current

    # ---- terms ---------------------------------------------------------------------------------------------------------------

    def _step(self, cells: Mapping[Any, Any], now: dict[Any, Register], chain: int, valid: int) -> dict[Any, Register]:
        """One more term for each accumulator."""
        after = dict(now)
        reduced_lanes = self.lanes in self.reduced
        for (v, r, n), (row, vector, own) in cells.items():
            self.values.row, self.values.vector = row, vector
            self.values.valid = valid if reduced_lanes else own
            key = (v, r, n, chain)
            after[key] = self._term(v, now[key], valid if reduced_lanes else None)
        for (n, own), s in product(self.vectors, self.inside):
            self.values.row, self.values.vector, self.values.valid = 0, n, own
            self.values.store(s, self.values.stored(s))
        return after

    def _term(self, v: Value, total: Register, valid: int | None) -> Register:
        scope = self.values.scopes[-1]
        (term,) = v.args
        width = total.width
        broken = valid is not None and valid < self.s.width and width > 1
        if v.attrs["how"] == "sum" and term.op == "multiply" and not broken:
            a, b = (self.values.splat(self.values.value(x), width) for x in term.args)
            return self.values.let("fma", v.dtype, width, (a, b, total), scope)
        made = self.values.splat(self.values.value(term), width)
        if broken:
            made = self.values.let("keep", v.dtype, width, (made,), scope, how=v.attrs["how"], lanes=valid)
        return self._combine(v, total, made, scope)
