"""Reading and adding at places that are computed: take, scatter_add, and Python's indexing.

In: an array and integers. Out: the chosen parts. An index outside the array is an error, never clamped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ..errors import DataError, DtypeError, ShapeError, TraceError
from ..graph.node import OPS, Array, Op, Rows, Type
from ..graph.trace import answers, apply, apply_many, is_traced, located, type_of
from .elementwise import convert
from .layout import flip, moveaxis, normal_axis, ravel, reshape, transpose

Examples = Iterable[tuple[Sequence[Any], dict[str, Any]]]


def _integers(indices: Type, what: str) -> None:
    if indices.dtype.kind not in "iu":
        raise DtypeError(f"{what} needs integer indices, not {indices.dtype}")


def _check(indices: Array, n: int, negative: bool = True) -> None:
    """Indices run from -n to n - 1; negative ones count from the end, as in NumPy, unless they are refused."""
    lowest = -n if negative else 0
    if indices.size and (indices.min() < lowest or indices.max() >= n):
        bad = np.flatnonzero((indices < lowest) | (indices >= n))[0]
        raise DataError(
            f"index {indices.reshape(-1)[bad]} (element {bad} of the indices) lies outside {lowest}..{n - 1}; correct the data, "
            "or make the table longer"
        )


def _infer_take(x: Type, indices: Type, *, axis: int, negative: bool = True) -> Type:
    _integers(indices, "take")
    return Type((*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]), x.dtype)


def _value_take(x: Array, indices: Array, *, axis: int, negative: bool = True) -> Array:
    _check(indices, x.shape[axis], negative)
    return np.take(x, indices, axis)


def _rule_take(g: Any, y: Any, x: Any, indices: Any, *, axis: int, negative: bool = True) -> Any:
    return apply("scatter_add", np.zeros_like(x), indices, g, axis=axis)


def _rows_take(rows: Sequence[Rows], types: Sequence[Type], *, axis: int, negative: bool = True) -> Rows:
    x, indices = rows
    if x is None:
        return axis + indices if isinstance(indices, int) else None
    if indices is not None or x == axis or not isinstance(x, int):
        return "mixed"
    return x if x < axis else x - 1 + len(types[1].shape)


def _examples_take(r: np.random.Generator) -> Examples:
    yield [r.normal(size=(5, 2)), np.array([[0, 3], [3, 4]])], {"axis": 0}
    yield [r.normal(size=(2, 5)), np.array([4, 4, 1])], {"axis": 1}


OPS.add("take", Op("take", _infer_take, _value_take, (_rule_take, None), _rows_take, _examples_take))


def _infer_scatter(x: Type, indices: Type, updates: Type, *, axis: int) -> Type:
    _integers(indices, "scatter_add")
    wanted = (*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])
    if updates.shape != wanted or updates.dtype != x.dtype:
        raise ShapeError(
            f"scatter_add into {x} at indices of shape {indices.shape} needs updates of shape {wanted}, not {updates}"
        )
    return Type(x.shape, x.dtype)


def _value_scatter(x: Array, indices: Array, updates: Array, *, axis: int) -> Array:
    _check(indices, x.shape[axis])
    y = np.array(x)
    flat = updates.reshape(*x.shape[:axis], indices.size, *x.shape[axis + 1 :])
    np.add.at(np.moveaxis(y, axis, 0), indices.reshape(-1), np.moveaxis(flat, axis, 0))
    return y


def _rows_scatter(rows: Sequence[Rows], types: Sequence[Type], *, axis: int) -> Rows:
    x, indices, updates = rows
    if isinstance(indices, int) and updates == axis + indices and x is None:
        return None  # summed over the rows
    if indices is None and isinstance(updates, int) and updates < axis and x in (updates, None):
        return updates
    return "mixed"


def _examples_scatter(r: np.random.Generator) -> Examples:
    yield [r.normal(size=(4, 2)), np.array([1, 1, 3]), r.normal(size=(3, 2))], {"axis": 0}


OPS.add(
    "scatter_add",
    Op(
        "scatter_add",
        _infer_scatter,
        _value_scatter,
        (
            lambda g, y, x, indices, updates, *, axis: g,
            None,
            lambda g, y, x, indices, updates, *, axis: apply("take", g, indices, axis=axis),
        ),
        _rows_scatter,
        _examples_scatter,
    ),
)


def _checked(indices: Any, n: int) -> Any:
    """Indices that are known now are checked now."""
    if is_traced(indices):
        return indices
    array = np.asarray(indices)
    if array.dtype.kind not in "iu":
        raise DtypeError(located(f"indices must be integers, not {array.dtype}"))
    if array.size and (array.min() < -n or array.max() >= n):
        bad = array.max() if array.max() >= n else array.min()
        raise IndexError(located(f"index {bad} lies outside an axis of length {n}"))
    return array


def _from_front(indices: Any, n: int) -> Any:
    """The same indices as int64, none negative: for arithmetic on them."""
    whole = convert(_checked(indices, n), np.int64)
    return np.where(whole < 0, whole + n, whole)


@answers(np.take, method="take")
def take(x: Any, indices: Any, axis: int | None = None, out: Any = None, mode: str = "raise") -> Any:
    if out is not None or mode != "raise":
        raise TraceError(located("np.take on traced arrays takes neither out nor mode"))
    x, axis = (ravel(x), 0) if axis is None else (x, normal_axis(axis, np.ndim(x)))
    return apply("take", x, _checked(indices, np.shape(x)[axis]), axis=axis)


def lookup(table: Any, indices: Any) -> Any:
    """Rows of a table: table[indices], where indices run from 0 to N - 1 and negative ones are refused.

    >>> import numpy as np
    >>> lookup(np.array([[1.0], [2.0]]), np.array([1, 0])).tolist()
    [[2.0], [1.0]]
    """
    return apply("take", table, indices, axis=0, negative=False)


def scatter_add(x: Any, indices: Any, updates: Any, axis: int = 0) -> Any:
    """`x` with `updates` added at `indices` along `axis`; an index that stands twice is added twice.

    Args: x any shape; indices integers of any shape; updates of x's shape with `axis` replaced by the shape of `indices`.

    >>> import numpy as np
    >>> scatter_add(np.zeros(3), np.array([1, 1]), np.array([2.0, 3.0])).tolist()
    [0.0, 5.0, 0.0]
    """
    axis = normal_axis(axis, np.ndim(x))
    return apply("scatter_add", x, _checked(indices, np.shape(x)[axis]), convert(updates, type_of(x).dtype), axis=axis)


@answers(np.take_along_axis)
def take_along_axis(x: Any, indices: Any, axis: int = -1) -> Any:
    """One element for each index along `axis`, by an index into the flattened array."""
    axis = normal_axis(axis, np.ndim(x))
    order = [i for i in range(np.ndim(x)) if i != axis] + [axis]
    y, at = transpose(x, order) if is_traced(x) else np.transpose(x, order), np.transpose(indices, order)
    if y.shape[:-1] != at.shape[:-1]:
        raise ShapeError(located(f"take_along_axis: shapes {np.shape(x)} and {np.shape(indices)} differ outside axis {axis}"))
    n = y.shape[-1]
    starts = np.arange(int(np.prod(y.shape[:-1]))).reshape(*y.shape[:-1], 1) * n
    picked = apply("take", np.reshape(y, (-1,)), _from_front(at, n) + starts, axis=0)
    return np.transpose(picked, np.argsort(order))


def one_hot(indices: Any, depth: int, dtype: Any = np.float32) -> Any:
    """1 at each index, 0 elsewhere, on a new last axis of length `depth`.

    >>> import numpy as np
    >>> one_hot(np.array([0, 2]), 3).tolist()
    [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    """
    classes = apply_many("iota", [], length=depth, dtype=np.dtype(np.int64))[0] if is_traced(indices) else np.arange(depth)
    return np.equal(np.expand_dims(indices, -1), classes).astype(dtype)


# ---- Python's indexing -------------------------------------------------------------------------------------------------------


@answers(method="__getitem__")
def getitem(x: Any, index: Any) -> Any:
    """x[...] with integers, slices, None, an ellipsis and integer arrays. Slices come first, then the arrays together."""
    index = index if isinstance(index, tuple) else (index,)
    index = tuple(np.asarray(i, None if i else np.int64) if isinstance(i, list) else i for i in index)
    index = tuple(part for i in index for part in _known_mask(i))
    _no_masks(index)
    consumed = sum(i is not None and i is not Ellipsis for i in index)
    if consumed > x.ndim:
        raise ShapeError(located(f"{consumed} indices for an array with {x.ndim} axes (shape {x.shape})"))
    if not any(i is Ellipsis for i in index):
        index = (*index, Ellipsis)
    at = next(k for k, i in enumerate(index) if i is Ellipsis)
    index = (*index[:at], *[slice(None)] * (x.ndim - consumed), *index[at + 1 :])

    bounds: list[slice] = []
    flips: list[int] = []
    shape: list[int | None] = []  # None: an axis that an integer took away
    arrays: list[tuple[int, Any]] = []  # (position in the result, indices)
    for i in index:
        if i is None:
            shape.append(1)
            continue
        n = x.shape[len(bounds)]
        if isinstance(i, slice):
            start, stop, step = _bounds(i, n)
            if step < 0:
                flips.append(len(bounds))
                start, stop, step = n - 1 - start, n - 1 - stop, -step
            bounds.append(slice(start, max(start, stop), step))
            shape.append(len(range(start, stop, step)))
        elif isinstance(i, (int, np.integer)):
            if not -n <= i < n:
                raise IndexError(located(f"index {i} lies outside axis {len(bounds)} of length {n}"))
            bounds.append(slice(int(i) % n, int(i) % n + 1, 1))
            shape.append(None)
        else:
            arrays.append((len(shape), i))
            bounds.append(slice(0, n, 1))
            shape.append(n)
    if flips:
        x = flip(x, tuple(flips))
    if any((b.start, b.stop, b.step) != (0, n, 1) for b, n in zip(bounds, x.shape, strict=True)):
        parts = zip(*((b.start, b.stop, b.step) for b in bounds), strict=True)
        x = apply("slice", x, **dict(zip(("start", "stop", "step"), map(tuple, parts), strict=True)))
    positions = [k - sum(s is None for s in shape[:k]) for k, _ in arrays]
    x = reshape(x, tuple(s for s in shape if s is not None))
    if not arrays:
        return x
    # NumPy puts the axes of index arrays where they stood if they stood side by side, else in front; integers count as arrays.
    fancy = [k for k, i in enumerate(index) if i is not None and not isinstance(i, slice)]
    first = fancy[0] if fancy == list(range(fancy[0], fancy[0] + len(fancy))) else 0
    return _take_many(x, positions, [i for _, i in arrays], first)


def _known_mask(i: Any) -> tuple[Any, ...]:
    """A mask that is known now is an index array for each of its axes."""
    if isinstance(i, np.ndarray) and i.dtype.kind == "b" and i.ndim:
        return tuple(np.nonzero(i))
    return (i,)


def _bounds(i: slice, n: int) -> tuple[int, int, int]:
    if is_traced(i.start, i.stop, i.step):
        raise TraceError(
            located("a slice with traced bounds has a size that depends on the data; use np.take with an index array")
        )
    return i.indices(n)


def _no_masks(index: tuple[Any, ...]) -> None:
    for i in index:
        if i is None or i is Ellipsis or (isinstance(i, (int, np.integer, slice)) and not isinstance(i, bool)):
            continue
        dtype = type_of(i).dtype
        if dtype.kind == "b" and is_traced(i):
            raise TraceError(
                located("indexing with a mask gives a size that depends on the data; use np.where(mask, x, 0) instead")
            )
        if dtype.kind not in "iu":
            raise DtypeError(located(f"arrays used as indices must be of integers, not {dtype}"))


def _take_many(x: Any, axes: list[int], indices: list[Any], first: int) -> Any:
    """x[..., i, j, ...]: several index arrays are one index into their axes laid together. Their axes come to stand at `first`."""
    if len(axes) == 1:
        y, k = take(x, indices[0], axes[0]), np.ndim(indices[0])
        return y if first == axes[0] else moveaxis(y, range(axes[0], axes[0] + k), range(first, first + k))
    try:
        shape = np.broadcast_shapes(*(np.shape(i) for i in indices))
    except ValueError:
        raise ShapeError(located(f"index arrays of shapes {[np.shape(i) for i in indices]} do not fit together")) from None
    order = [*axes, *(a for a in range(x.ndim) if a not in axes)]
    flat: Any = 0
    for a, i in zip(axes, indices, strict=True):
        flat = flat * x.shape[a] + np.broadcast_to(_from_front(i, x.shape[a]), shape)
    y = transpose(x, order)
    y = reshape(y, (int(np.prod(y.shape[: len(axes)])), *y.shape[len(axes) :]))
    y = apply("take", y, flat, axis=0)
    k = len(shape)
    return moveaxis(y, range(k), range(first, first + k)) if first else y
