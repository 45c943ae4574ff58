"""Sliding windows, for convolution and pooling, and their adjoint.

In: an array. Out (window): each windowed axis holds the window's position, and its offset within the window stands on a new last
axis; no number is copied by the definition. `fold` adds windows back to where they came from; each is the other's derivative.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ..errors import ShapeError
from ..graph.node import OPS, Array, Op, Rows, Type
from ..graph.trace import apply
from .layout import normal_axis

Sizes = tuple[int, ...]


def count(length: int, size: int, stride: int, dilation: int) -> int:
    """How many windows fit."""
    return max(0, (length - (size - 1) * dilation - 1) // stride + 1)


def _infer_window(x: Type, *, axes: Sizes, size: Sizes, stride: Sizes, dilation: Sizes) -> Type:
    shape = list(x.shape)
    for a, k, s, d in zip(axes, size, stride, dilation, strict=True):
        if k < 1 or s < 1 or d < 1:
            raise ShapeError(f"windows need a size, stride and dilation of at least 1, not {size}, {stride}, {dilation}")
        if (k - 1) * d + 1 > x.shape[a]:
            raise ShapeError(f"a window of {k} (dilation {d}) does not fit into axis {a} of length {x.shape[a]}, shape {x.shape}")
        shape[a] = count(x.shape[a], k, s, d)
    return Type((*shape, *size), x.dtype)


def _value_window(x: Array, *, axes: Sizes, size: Sizes, stride: Sizes, dilation: Sizes) -> Array:
    reach = tuple((k - 1) * d + 1 for k, d in zip(size, dilation, strict=True))
    view = np.lib.stride_tricks.sliding_window_view(x, reach, axes)
    picks = [slice(None)] * view.ndim
    for i, (a, s, d) in enumerate(zip(axes, stride, dilation, strict=True)):
        picks[a], picks[x.ndim + i] = slice(None, None, s), slice(None, None, d)
    return np.asarray(view[tuple(picks)])


def _rule_window(g: Any, y: Any, x: Any, **attrs: Any) -> Any:
    return apply("fold", g, shape=x.shape, **attrs)


def _rows_window(rows: Sequence[Rows], types: Sequence[Type], *, axes: Sizes, **attrs: Any) -> Rows:
    return "mixed" if rows[0] in axes else rows[0]


_EXAMPLE = {"axes": (1, 2), "size": (2, 3), "stride": (1, 2), "dilation": (2, 1)}


def _examples_window(r: np.random.Generator) -> Iterable[Any]:
    yield [r.normal(size=(2, 5, 8))], _EXAMPLE
    yield [r.normal(size=(6,))], {"axes": (0,), "size": (3,), "stride": (2,), "dilation": (1,)}


OPS.add("window", Op("window", _infer_window, _value_window, (_rule_window,), _rows_window, _examples_window))


def _infer_fold(w: Type, *, shape: Sizes, axes: Sizes, size: Sizes, stride: Sizes, dilation: Sizes) -> Type:
    made = _infer_window(Type(shape, w.dtype), axes=axes, size=size, stride=stride, dilation=dilation)
    if made.shape != w.shape:
        raise ShapeError(f"windows of shape {w.shape} do not come from an array of shape {shape}: those have shape {made.shape}")
    return Type(shape, w.dtype)


def _value_fold(w: Array, *, shape: Sizes, axes: Sizes, size: Sizes, stride: Sizes, dilation: Sizes) -> Array:
    y = np.zeros(shape, w.dtype)
    for offset in np.ndindex(*size):
        target = [slice(None)] * len(shape)
        for a, o, s, d in zip(axes, offset, stride, dilation, strict=True):
            target[a] = slice(o * d, o * d + (w.shape[a] - 1) * s + 1, s)
        y[tuple(target)] += w[(..., *offset)]
    return y


def _rule_fold(g: Any, y: Any, w: Any, *, shape: Sizes, **attrs: Any) -> Any:
    return apply("window", g, **attrs)


def _rows_fold(rows: Sequence[Rows], types: Sequence[Type], *, shape: Sizes, axes: Sizes, **attrs: Any) -> Rows:
    r = rows[0]
    return r if isinstance(r, int) and r < len(shape) and r not in axes else "mixed"


def _examples_fold(r: np.random.Generator) -> Iterable[Any]:
    yield [r.normal(size=(2, 3, 3, 2, 3))], {**_EXAMPLE, "shape": (2, 5, 8)}


OPS.add("fold", Op("fold", _infer_fold, _value_fold, (_rule_fold,), _rows_fold, _examples_fold))


def windows(x: Any, axes: Sequence[int], size: Sequence[int], stride: Sequence[int] = (), dilation: Sequence[int] = ()) -> Any:
    """All windows of `size` along `axes`, every `stride`-th, their elements `dilation` apart.

    Args: x (..., N, ...). Returns: x's shape with each windowed axis of the number of windows, then `size`.

    >>> import numpy as np
    >>> windows(np.arange(5.0), [0], [2], [3]).tolist()
    [[0.0, 1.0], [3.0, 4.0]]
    """
    axes = tuple(normal_axis(a, np.ndim(x)) for a in axes)
    ones = (1,) * len(axes)
    return apply("window", x, axes=axes, size=tuple(size), stride=tuple(stride) or ones, dilation=tuple(dilation) or ones)
