"""How a matrix lies in memory: row by row, or in panels, each of which holds some columns of all rows in one piece, or, transposed, some
rows of all columns.

In: shapes and arrays. Out: the shape under which native code has them, and arrays in it and back. It follows from the target and the
shapes of a program's whole state, so that all entries of all programs over it agree.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from math import ceil
from typing import Any

import numpy as np

from .schedule import BROKEN_PANELS, ENOUGH, MOST_PARTS, MOST_ROWS_OF_PANEL, NARROW, TALL
from .target import Target

Array = np.ndarray[Any, np.dtype[Any]]
Shape = tuple[int, ...]


def tall(factors: Iterable[Shape], state: Iterable[Shape], target: Target) -> tuple[Shape, ...]:
    """Which matrices of a state lie transposed: of the factors of products those with many rows whose columns would leave many lanes empty.
    Not those that follow a layer with as many units as they have rows, since they are cut as that layer's weights are.

    >>> from chainrule.compiler.target import narrowed
    >>> tall([(1000, 5), (600, 8)], [(1000, 5), (600, 8), (5,)], narrowed("sse2"))
    ((1000, 5),)
    >>> tall([(1000, 5)], [(20, 1000), (1000, 5)], narrowed("sse2"))
    ()
    """
    units = {shape[1] for shape in state if len(shape) == 2}
    matrices = {shape for shape in factors if len(shape) == 2 and shape[0] not in units}
    return tuple(sorted(s for s in matrices if s[0] >= TALL and s[1] > 1 and _full(s[1], target) < NARROW))


def panels(shape: Shape, target: Target, tall: Collection[Shape] = ()) -> tuple[int, int] | None:
    """How an array lies in panels: the axis of which each panel holds a part, and how long that is; None if it lies row by row.

    >>> from chainrule.compiler.target import narrowed
    >>> [panels((100, n), narrowed("sse2")) for n in (10, 32, 64, 96, 100, 300)]
    [None, None, (1, 32), (1, 48), None, (1, 75)]
    >>> [panels((n, 5), narrowed("sse2"), [(n, 5)]) for n in (999, 1000, 3000)]
    [(0, 999), (0, 500), (0, 750)]
    """
    if len(shape) != 2:
        return None
    if shape in tall:
        return 0, _part_of_rows(shape[0], target)
    columns = shape[1]
    whole = next((p for p in target.panels if columns > p and columns % p == 0), 0)
    size = whole or max(_broken(columns, target), key=lambda p: (columns // p % 2 == 0, _full(p, target), p), default=0)
    return (1, size) if size else None


def _part_of_rows(rows: int, target: Target) -> int:
    """The rows of a transposed panel: there are as few as leave lanes full and no panel too long, an even number if that is possible."""
    least = ceil(rows / MOST_ROWS_OF_PANEL)
    parts = [rows // n for n in range(least, MOST_PARTS + 1) if rows % n == 0 and _full(rows // n, target) >= ENOUGH]
    return max(parts, key=lambda p: (rows // p % 2 == 0, p), default=rows)


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


def physical(shape: Shape, target: Target, tall: Collection[Shape] = ()) -> Shape:
    """The shape under which an array lies in memory row by row.

    >>> from chainrule.compiler.target import narrowed
    >>> [physical(shape, narrowed("sse2"), [(1000, 5)]) for shape in ((30, 128), (1000, 5), (128,))]
    [(2, 30, 64), (2, 5, 500), (128,)]
    """
    found = panels(shape, target, tall)
    if found is None:
        return shape
    axis, size = found
    return shape[axis] // size, shape[1 - axis], size


def laid_out(array: Array, target: Target, tall: Collection[Shape] = ()) -> Array:
    """An array as native code has it."""
    found = panels(array.shape, target, tall)
    if found is None:
        return array
    axis, size = found
    lines = array if axis else array.T
    return lines.reshape(len(lines), array.shape[axis] // size, size).swapaxes(0, 1)


def logical(array: Array, shape: Shape) -> Array:
    """An array as everybody else has it."""
    if array.ndim == len(shape):
        return array
    lines = array.swapaxes(0, 1)
    return lines.reshape(shape) if len(lines) == shape[0] else lines.reshape(shape[::-1]).T
