"""How a matrix lies in memory: row by row, or in panels, each of which holds some columns of all rows in one piece; or, transposed, some
rows of all columns.

In: the programs of a session, and arrays of their state. Out: the shape under which native code has them, and arrays in it and back. It
follows from the target, the shapes of the whole state, and which of them the programs multiply by; so all entries of a session agree.
Sessions need not: each takes its state as everybody else has it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np

from .kernels import Buffer
from .schedule import BROKEN_PANELS, ENOUGH, LEAST_TRANSPOSED, MOST_PARTS, MOST_TRANSPOSED, NARROW
from .target import Target

if TYPE_CHECKING:
    from ..program import Program

Array = np.ndarray[Any, np.dtype[Any]]
Shape = tuple[int, ...]
Cut = tuple[int, int]  # the axis of which each panel holds a part, and how long that is


@dataclass(frozen=True)
class Storage:
    """How the arrays of a state lie. transposed: the shapes of matrices that lie transposed, and how many of their rows are in a panel.

    >>> from chainrule.compiler.target import narrowed
    >>> storage = Storage(narrowed("sse2"), (((1000, 5), 500),))
    >>> [storage.physical(shape) for shape in ((30, 128), (30, 10), (1000, 5), (128,))]
    [(2, 30, 64), (30, 10), (2, 5, 500), (128,)]
    """

    target: Target
    transposed: tuple[tuple[Shape, int], ...] = ()

    @cached_property
    def _rows(self) -> dict[Shape, int]:
        return dict(self.transposed)

    def cut(self, shape: Shape) -> Cut | None:
        """How an array of this shape lies in panels; None if it lies row by row."""
        return (0, self._rows[shape]) if shape in self._rows else by_columns(shape, self.target)

    def cut_of(self, buffer: Buffer) -> Cut | None:
        """The same of a buffer. What a step makes of weights lies as they do; what is the caller's lies row by row, and transposed panels
        are no place for rows of a batch."""
        if buffer.space not in ("state", "scratch"):
            return None
        return self.cut(buffer.shape) if buffer.row is None else by_columns(buffer.shape, self.target)

    def physical(self, shape: Shape) -> Shape:
        """The shape under which an array lies in memory row by row."""
        found = self.cut(shape)
        return shape if found is None else shape_in(shape, found)

    def laid_out(self, array: Array) -> Array:
        """An array as native code has it."""
        found = self.cut(array.shape)
        if found is None:
            return array
        axis, size = found
        lines = array if axis else array.T
        return lines.reshape(len(lines), array.shape[axis] // size, size).swapaxes(0, 1)

    def logical(self, array: Array, shape: Shape) -> Array:
        """An array as everybody else has it."""
        found = self.cut(shape)
        if found is None:
            return array
        lines = array.swapaxes(0, 1)
        return lines.reshape(shape) if found[0] else lines.reshape(shape[::-1]).T


def shape_in(shape: Shape, cut: Cut) -> Shape:
    """Of a matrix in panels: (panel, row, column inside), or (panel, column, row inside)."""
    axis, size = cut
    return shape[axis] // size, shape[1 - axis], size


# ---- transposed --------------------------------------------------------------------------------------------------------------


def storage_of(programs: Iterable[Program], target: Target) -> Storage:
    """How a state is stored over which these are the programs. Matrices by which they multiply lie transposed if they have many rows, and
    few columns that would leave many lanes empty: lanes then go along rows. Not where a layer before them has as many units as they have
    rows, since they are cut as that layer's weights are; nor where rows are looked up, or steps of a loop read them."""
    programs = list(programs)
    shapes = {v.type.shape for p in programs for v in p.state.values()}
    units = {shape[1] for shape in shapes if len(shape) == 2}
    found = sorted(shape for shape in _factors(programs) if shape[0] not in units and _is_tall(shape, target))
    return Storage(target, tuple((shape, rows_of_panel(shape[0], target)) for shape in found))


def _factors(programs: Iterable[Program]) -> set[Shape]:
    """The shapes of matrices by which products multiply, if no loop and nothing that looks up rows reads one like that."""
    read: dict[str, set[Shape]] = {"contract": set(), "take": set(), "scan": set()}
    for entry in (e for p in programs for e in p.entries.values()):
        state = set(entry.graph.inputs[: len(entry.reads)])
        for node in entry.graph.nodes():
            if node.op in read:
                read[node.op].update(a.shape for a in node.args if a in state and len(a.shape) == 2)
    return read["contract"] - read["take"] - read["scan"]


def _is_tall(shape: Shape, target: Target) -> bool:
    """Whether a matrix has many rows, and few columns; a single one lies in one piece anyway."""
    rows, columns = shape
    return rows >= LEAST_TRANSPOSED and columns > 1 and _full(columns, target) < NARROW


def rows_of_panel(rows: int, target: Target) -> int:
    """How many rows of a transposed matrix are in a panel: of the parts that leave lanes full the longest that is not too long, rather an
    even number of them; if all are too long, the shortest. There is a sum over each panel, and threads share panels out: two, because
    that is weighed for two threads on all machines (`Target.cores`).

    >>> from chainrule.compiler.target import narrowed
    >>> [rows_of_panel(n, narrowed("avx512")) for n in (784, 999, 1000, 3000, 20_000, 10_007)]
    [392, 999, 500, 750, 1250, 10007]
    """
    counts = [n for n in range(1, MOST_PARTS + 1) if rows % n == 0 and _full(rows // n, target) >= ENOUGH] or [1]
    short = [n for n in counts if rows // n <= MOST_TRANSPOSED] or counts[-1:]
    return rows // min(short, key=lambda n: (n % 2, n))


# ---- by columns --------------------------------------------------------------------------------------------------------------


def by_columns(shape: Shape, target: Target) -> Cut | None:
    """How an array lies in panels that hold columns; None if it lies row by row.

    >>> from chainrule.compiler.target import narrowed
    >>> [by_columns((100, n), narrowed("sse2")) for n in (0, 10, 32, 64, 96, 100, 128, 300)]
    [None, None, None, (1, 32), (1, 48), None, (1, 64), (1, 75)]
    """
    if len(shape) != 2:
        return None
    columns = shape[1]
    whole = next((p for p in target.panels if columns > p and columns % p == 0), 0)
    size = whole or max(_broken(columns, target), key=lambda p: (columns // p % 2 == 0, _full(p, target), p), default=0)
    return (1, size) if size else None


def _broken(columns: int, target: Target) -> list[int]:
    """Panels that are no whole tiles, but leave few more lanes empty than there would be without panels."""
    least, most = BROKEN_PANELS
    if columns < 2 * least:
        return []
    enough = ENOUGH * _full(columns, target)
    return [p for p in range(least, min(most, columns // 2) + 1) if columns % p == 0 and _full(p, target) >= enough]


def _full(columns: int, target: Target) -> float:
    """The part of the lanes that columns of four bytes fill."""
    lanes = target.vector_bytes // 4
    return columns / (ceil(columns / lanes) * lanes)
