"""How a matrix lies in memory.

In: shapes and arrays. Out: the shape under which native code has them, and arrays in it and back. It follows from the shape alone, so
that all entries of all programs agree about their state.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
PANELS = (64, 48, 32)  # columns of a panel, which lies in one piece: whole tiles; the first that divides a matrix is taken


def panel(columns: int) -> int:
    """The columns of a panel; 0 if a matrix of so many lies row by row.

    >>> [panel(n) for n in (10, 64, 96, 100, 128, 784)]
    [0, 0, 48, 0, 64, 0]
    """
    return next((p for p in PANELS if columns > p and columns % p == 0), 0)


def physical(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape under which an array lies in memory row by row.

    >>> physical((30, 128)), physical((128,))
    ((2, 30, 64), (128,))
    """
    size = panel(shape[1]) if len(shape) == 2 else 0
    return (shape[1] // size, shape[0], size) if size else shape


def laid_out(array: Array) -> Array:
    """An array as native code has it."""
    shape = physical(array.shape)
    return array if len(shape) == array.ndim else array.reshape(shape[1], shape[0], shape[2]).swapaxes(0, 1)


def logical(array: Array, shape: tuple[int, ...]) -> Array:
    """An array as everybody else has it."""
    return array if array.ndim == len(shape) else array.swapaxes(0, 1).reshape(shape)
