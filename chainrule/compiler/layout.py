"""How a matrix lies in memory: row by row, or in panels, each of which holds some columns of all rows in one piece.

In: shapes and arrays. Out: the shape under which native code has them, and arrays in it and back. It follows from shape and target
alone, so that all entries of all programs agree about their state.
"""

from __future__ import annotations

from math import ceil
from typing import Any

import numpy as np

from .schedule import BROKEN_PANELS, ENOUGH
from .target import Target

Array = np.ndarray[Any, np.dtype[Any]]


def panel(columns: int, target: Target) -> int:
    """The columns of a panel; 0 if a matrix of so many lies row by row.

    >>> from chainrule.compiler.target import narrowed
    >>> [panel(n, narrowed("sse2")) for n in (0, 10, 32, 64, 96, 100, 128, 300)]
    [0, 0, 0, 32, 48, 0, 64, 75]
    """
    whole = next((p for p in target.panels if columns > p and columns % p == 0), 0)
    return whole or max(_broken(columns, target), key=lambda p: (columns // p % 2 == 0, _full(p, target), p), default=0)


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


def physical(shape: tuple[int, ...], target: Target) -> tuple[int, ...]:
    """The shape under which an array lies in memory row by row.

    >>> from chainrule.compiler.target import narrowed
    >>> physical((30, 128), narrowed("sse2")), physical((128,), narrowed("sse2"))
    ((2, 30, 64), (128,))
    """
    size = panel(shape[1], target) if len(shape) == 2 else 0
    return (shape[1] // size, shape[0], size) if size else shape


def laid_out(array: Array, target: Target) -> Array:
    """An array as native code has it."""
    shape = physical(array.shape, target)
    return array if len(shape) == array.ndim else array.reshape(shape[1], shape[0], shape[2]).swapaxes(0, 1)


def logical(array: Array, shape: tuple[int, ...]) -> Array:
    """An array as everybody else has it."""
    return array if array.ndim == len(shape) else array.swapaxes(0, 1).reshape(shape)
