"""Operators that only move numbers: broadcast, reshape, transpose, slice, pad, concatenate, flip, iota.

In: arrays. Out: the same numbers at other places. All indices are known when tracing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np

from ..errors import ShapeError, UsageError
from ..graph.node import OPS, Array, Op, Rows, Type
from ..graph.trace import Tracer, answers, apply, here, located, type_of
from .elementwise import common, convert, spread

Examples = Iterable[tuple[Sequence[Any], dict[str, Any]]]


def normal_axis(axis: int, ndim: int) -> int:
    """`axis` counted from the front.

    Raises: `ShapeError` if the array has no such axis.
    """
    axis = int(axis)
    if not -ndim <= axis < ndim:
        raise ShapeError(located(f"axis {axis} does not exist in an array with {ndim} axes"))
    return axis % ndim


def normal_axes(axis: Any, ndim: int) -> tuple[int, ...]:
    """One axis, several or None (all), as a sorted tuple without repeats."""
    if axis is None:
        return tuple(range(ndim))
    axes = tuple(normal_axis(a, ndim) for a in (axis if isinstance(axis, (tuple, list)) else (axis,)))
    if len(set(axes)) != len(axes):
        raise ShapeError(located(f"an axis is given twice in {axis}"))
    return tuple(sorted(axes))


# ---- broadcast ---------------------------------------------------------------------------------------------------------------


def _infer_broadcast(x: Type, *, shape: tuple[int, ...]) -> Type:
    if len(x.shape) > len(shape) or any(a not in (1, b) for a, b in zip(x.shape[::-1], shape[::-1], strict=False)):
        raise ShapeError(f"shape {x.shape} cannot be broadcast to {shape}")
    return Type(tuple(shape), x.dtype)


def _rule_broadcast(g: Any, y: Any, x: Any, *, shape: tuple[int, ...]) -> Any:
    new = len(shape) - x.ndim
    axes = (*range(new), *(i + new for i, n in enumerate(x.shape) if n != shape[i + new]))
    return reshape(np.sum(g, axis=axes), x.shape)


def _rows_broadcast(rows: Sequence[Rows], types: Sequence[Type], *, shape: tuple[int, ...]) -> Rows:
    r = rows[0]
    assert isinstance(r, int)
    at = r + len(shape) - len(types[0].shape)
    return at if types[0].shape[r] == shape[at] else "mixed"


def _examples_broadcast(r: np.random.Generator) -> Examples:
    yield [r.normal(size=(3, 1))], {"shape": (2, 3, 4)}
    yield [r.normal(size=())], {"shape": (2,)}


OPS.add("broadcast", Op("broadcast", _infer_broadcast, np.broadcast_to, (_rule_broadcast,), _rows_broadcast, _examples_broadcast))


@answers(np.broadcast_to)
def broadcast_to(x: Any, shape: Any) -> Any:
    shape = (shape,) if isinstance(shape, int) else tuple(int(n) for n in shape)
    return x if x.shape == shape else apply("broadcast", x, shape=shape)


@answers(np.broadcast_arrays)
def broadcast_arrays(*args: Any) -> tuple[Any, ...]:
    return tuple(spread(args, "np.broadcast_arrays"))


# ---- reshape and transpose ---------------------------------------------------------------------------------------------------


def _infer_reshape(x: Type, *, shape: tuple[int, ...]) -> Type:
    if x.size != prod(shape):
        raise ShapeError(f"an array of shape {x.shape} ({x.size} elements) cannot take the shape {shape} ({prod(shape)})")
    return Type(tuple(shape), x.dtype)


def _rows_reshape(rows: Sequence[Rows], types: Sequence[Type], *, shape: tuple[int, ...]) -> Rows:
    """Rows survive as an axis of the same length with the same number of elements before it."""
    r = rows[0]
    assert isinstance(r, int)
    before, length = prod(types[0].shape[:r]), types[0].shape[r]
    for i, n in enumerate(shape):
        if n == length and prod(shape[:i]) == before:
            return i
    return "mixed"


def _examples_reshape(r: np.random.Generator) -> Examples:
    yield [r.normal(size=(3, 4))], {"shape": (3, 2, 2)}
    yield [r.normal(size=(3, 4))], {"shape": (12,)}


OPS.add(
    "reshape",
    Op(
        "reshape",
        _infer_reshape,
        lambda x, *, shape: np.reshape(x, shape),
        (lambda g, y, x, *, shape: reshape(g, x.shape),),
        _rows_reshape,
        _examples_reshape,
    ),
)


@answers(np.reshape)
def reshape(x: Any, shape: Any, order: str = "C") -> Any:
    if order != "C":
        raise UsageError(located(f'reshape with order="{order}" is not recorded; transpose first'))
    shape = (shape,) if isinstance(shape, (int, np.integer)) else tuple(shape)
    if -1 in shape:
        known = prod(n for n in shape if n != -1)
        if shape.count(-1) > 1 or known == 0 or type_of(x).size % known:
            raise ShapeError(located(f"an array of shape {x.shape} cannot take the shape {shape}"))
        shape = tuple(type_of(x).size // known if n == -1 else n for n in shape)
    shape = tuple(int(n) for n in shape)
    return x if x.shape == shape else apply("reshape", x, shape=shape)


@answers(method="reshape")
def _reshape_method(x: Any, *shape: Any, order: str = "C") -> Any:
    return reshape(x, shape[0] if len(shape) == 1 else shape, order)


@answers(np.ravel, method="ravel")
def ravel(x: Any, order: str = "C") -> Any:
    return reshape(x, (-1,) if type_of(x).size else (0,), order)


METHOD_FLATTEN = answers(method="flatten")(ravel)


@answers(np.expand_dims)
def expand_dims(x: Any, axis: Any) -> Any:
    axes = axis if isinstance(axis, (tuple, list)) else (axis,)
    ndim = x.ndim + len(axes)
    new = normal_axes(tuple(axes), ndim)
    sizes = iter(x.shape)
    return reshape(x, tuple(1 if i in new else next(sizes) for i in range(ndim)))


@answers(np.squeeze, method="squeeze")
def squeeze(x: Any, axis: Any = None) -> Any:
    axes = tuple(i for i, n in enumerate(x.shape) if n == 1) if axis is None else normal_axes(axis, x.ndim)
    if any(x.shape[a] != 1 for a in axes):
        raise ShapeError(located(f"only axes of length 1 can be squeezed; axis {axis} of shape {x.shape} is longer"))
    return reshape(x, tuple(n for i, n in enumerate(x.shape) if i not in axes))


def _infer_transpose(x: Type, *, axes: tuple[int, ...]) -> Type:
    if sorted(axes) != list(range(len(x.shape))):
        raise ShapeError(f"axes {axes} are no order of the axes of shape {x.shape}")
    return Type(tuple(x.shape[a] for a in axes), x.dtype)


def _rule_transpose(g: Any, y: Any, x: Any, *, axes: tuple[int, ...]) -> Any:
    return transpose(g, tuple(int(i) for i in np.argsort(axes)))


def _examples_transpose(r: np.random.Generator) -> Examples:
    yield [r.normal(size=(2, 3, 4))], {"axes": (2, 0, 1)}


OPS.add(
    "transpose",
    Op(
        "transpose",
        _infer_transpose,
        lambda x, *, axes: np.transpose(x, axes),
        (_rule_transpose,),
        lambda rows, types, *, axes: axes.index(rows[0]),
        _examples_transpose,
    ),
)


@answers(np.transpose)
def transpose(x: Any, axes: Any = None) -> Any:
    order = tuple(range(x.ndim))[::-1] if axes is None else tuple(normal_axis(a, x.ndim) for a in axes)
    return x if order == tuple(range(x.ndim)) else apply("transpose", x, axes=order)


@answers(method="transpose")
def _transpose_method(x: Any, *axes: Any) -> Any:
    return transpose(x, axes[0] if len(axes) == 1 and not isinstance(axes[0], int) else axes or None)


@answers(np.swapaxes, method="swapaxes")
def swapaxes(x: Any, axis1: int, axis2: int) -> Any:
    order = list(range(x.ndim))
    a, b = normal_axis(axis1, x.ndim), normal_axis(axis2, x.ndim)
    order[a], order[b] = b, a
    return transpose(x, order)


@answers(np.moveaxis)
def moveaxis(x: Any, source: Any, destination: Any) -> Any:
    pairs = zip(*([s] if isinstance(s, int) else list(s) for s in (destination, source)), strict=True)
    moved = sorted((normal_axis(d, x.ndim), normal_axis(s, x.ndim)) for d, s in pairs)
    order = [i for i in range(x.ndim) if i not in {s for _, s in moved}]
    for d, s in moved:
        order.insert(d, s)
    return transpose(x, order)


# ---- slice and pad, each the other's derivative ------------------------------------------------------------------------------


def _infer_slice(x: Type, *, start: tuple[int, ...], stop: tuple[int, ...], step: tuple[int, ...]) -> Type:
    if not len(start) == len(stop) == len(step) == len(x.shape):
        raise ShapeError(f"a slice of an array of shape {x.shape} needs {len(x.shape)} starts, stops and steps")
    bounds = zip(start, stop, step, x.shape, strict=True)
    if any(a < 0 or b > n or s < 1 for a, b, s, n in bounds):
        raise ShapeError(f"the slice {start}:{stop}:{step} reaches outside shape {x.shape}")
    return Type(tuple(max(0, -((a - b) // s)) for a, b, s in zip(start, stop, step, strict=True)), x.dtype)


def _value_slice(x: Array, *, start: tuple[int, ...], stop: tuple[int, ...], step: tuple[int, ...]) -> Array:
    return x[tuple(slice(*b) for b in zip(start, stop, step, strict=True))]


def _rule_slice(g: Any, y: Any, x: Any, *, start: Any, stop: Any, step: Any) -> Any:
    amounts = []
    for n, m, a, s in zip(x.shape, y.shape, start, step, strict=True):
        covered = (m - 1) * s + 1 if m else 0
        amounts.append((a, n - a - covered, s - 1) if m else (0, n, 0))
    return apply("pad", g, _zero(g), amounts=tuple(amounts))


def _rows_slice(rows: Sequence[Rows], types: Sequence[Type], *, start: Any, stop: Any, step: Any) -> Rows:
    r = rows[0]
    assert isinstance(r, int)
    return r if (start[r], stop[r], step[r]) == (0, types[0].shape[r], 1) else "mixed"


def _examples_slice(r: np.random.Generator) -> Examples:
    yield [r.normal(size=(5, 6))], {"start": (0, 1), "stop": (5, 6), "step": (1, 2)}
    yield [r.normal(size=(5, 6))], {"start": (1, 2), "stop": (4, 3), "step": (2, 1)}


OPS.add("slice", Op("slice", _infer_slice, _value_slice, (_rule_slice,), _rows_slice, _examples_slice))


def _zero(x: Any) -> Any:
    return np.zeros((), x.dtype)


def _infer_pad(x: Type, fill: Type, *, amounts: tuple[tuple[int, int, int], ...]) -> Type:
    if fill.shape != () or fill.dtype != x.dtype:
        raise ShapeError(f"the number to pad {x} with must be a scalar of the same type, not {fill}")
    if len(amounts) != len(x.shape) or any(min(a) < 0 for a in amounts):
        raise ShapeError(f"padding {amounts} does not fit shape {x.shape}: (before, after, between) for each axis, none negative")
    return Type(tuple(lo + hi + n + max(n - 1, 0) * mid for n, (lo, hi, mid) in zip(x.shape, amounts, strict=True)), x.dtype)


def _inside(shape: tuple[int, ...], amounts: Any) -> tuple[slice, ...]:
    return tuple(
        slice(lo, lo + (n - 1) * (mid + 1) + 1 if n else lo, mid + 1) for n, (lo, _, mid) in zip(shape, amounts, strict=True)
    )


def _value_pad(x: Array, fill: Array, *, amounts: Any) -> Array:
    y = np.full(_infer_pad(type_of(x), type_of(fill), amounts=amounts).shape, fill, x.dtype)
    y[_inside(x.shape, amounts)] = x
    return y


def _rule_pad(g: Any, y: Any, x: Any, fill: Any, *, amounts: Any) -> Any:
    return g[_inside(x.shape, amounts)]


def _rule_fill(g: Any, y: Any, x: Any, fill: Any, *, amounts: Any) -> Any:
    return np.sum(g) - np.sum(_rule_pad(g, y, x, fill, amounts=amounts))


def _rows_pad(rows: Sequence[Rows], types: Sequence[Type], *, amounts: Any) -> Rows:
    r = rows[0]
    return r if isinstance(r, int) and tuple(amounts[r]) == (0, 0, 0) else "mixed"


def _examples_pad(r: np.random.Generator) -> Examples:
    yield [r.normal(size=(2, 3)), r.normal(size=())], {"amounts": ((0, 0, 0), (2, 1, 1))}


OPS.add("pad", Op("pad", _infer_pad, _value_pad, (_rule_pad, _rule_fill), _rows_pad, _examples_pad))


@answers(np.pad)
def pad(x: Any, pad_width: Any, mode: str = "constant", constant_values: Any = 0) -> Any:
    if mode != "constant":
        raise UsageError(located(f'np.pad with mode="{mode}" is not recorded, only "constant"; use np.concatenate of slices'))
    widths = np.broadcast_to(np.asarray(pad_width), (x.ndim, 2))
    amounts = tuple((int(a), int(b), 0) for a, b in widths)
    return apply("pad", x, convert(constant_values, x.dtype), amounts=amounts)


# ---- concatenate and its kin -------------------------------------------------------------------------------------------------


def _infer_concatenate(*types: Type, axis: int) -> Type:
    first = types[0]
    for t in types[1:]:
        if t.dtype != first.dtype or t.shape[:axis] != first.shape[:axis] or t.shape[axis + 1 :] != first.shape[axis + 1 :]:
            raise ShapeError(f"arrays {', '.join(map(str, types))} cannot be joined along axis {axis}: the others must agree")
    length = sum(t.shape[axis] for t in types)
    return Type((*first.shape[:axis], length, *first.shape[axis + 1 :]), first.dtype)


def _derivative_concatenate(need: Sequence[bool], g: Any, y: Any, *args: Any, axis: int) -> list[Any]:
    gradients, at = [], 0
    for x in args:
        gradients.append(g[(slice(None),) * axis + (slice(at, at + x.shape[axis]),)])
        at += x.shape[axis]
    return gradients


def _rows_concatenate(rows: Sequence[Rows], types: Sequence[Type], *, axis: int) -> Rows:
    carried = {r for r in rows if r is not None}
    r = carried.pop() if len(carried) == 1 else "mixed"
    return r if r != axis else "mixed"


def _examples_concatenate(r: np.random.Generator) -> Examples:
    yield [r.normal(size=(2, 3)), r.normal(size=(2, 1)), r.normal(size=(2, 2))], {"axis": 1}


OPS.add(
    "concatenate",
    Op(
        "concatenate",
        _infer_concatenate,
        lambda *xs, axis: np.concatenate(xs, axis),
        _derivative_concatenate,
        _rows_concatenate,
        _examples_concatenate,
    ),
)


@answers(np.concatenate)
def concatenate(arrays: Sequence[Any], axis: int | None = 0) -> Any:
    dtype = np.result_type(*(type_of(a).dtype for a in arrays))
    parts = [convert(a if axis is not None else np.ravel(a), dtype) for a in arrays]
    ndim = parts[0].ndim
    if ndim == 0 or any(p.ndim != ndim for p in parts):
        raise ShapeError(
            located(f"np.concatenate needs arrays with the same number of axes, at least one: {[p.shape for p in parts]}")
        )
    return apply("concatenate", *parts, axis=normal_axis(axis or 0, ndim))


@answers(np.stack)
def stack(arrays: Sequence[Any], axis: int = 0) -> Any:
    arrays = list(arrays)
    if len({np.shape(a) for a in arrays}) != 1:
        raise ShapeError(located(f"np.stack needs arrays of one shape, not {[np.shape(a) for a in arrays]}"))
    return concatenate([np.expand_dims(a, axis) for a in arrays], normal_axis(axis, np.ndim(arrays[0]) + 1))


@answers(np.hstack)
def hstack(arrays: Sequence[Any]) -> Any:
    parts = [np.atleast_1d(a) if np.ndim(a) == 0 else a for a in arrays]
    return concatenate(parts, 0 if np.ndim(parts[0]) == 1 else 1)


@answers(np.vstack)
def vstack(arrays: Sequence[Any]) -> Any:
    return concatenate([np.reshape(a, (1, -1)) if np.ndim(a) < 2 else a for a in arrays], 0)


@answers(np.column_stack)
def column_stack(arrays: Sequence[Any]) -> Any:
    return concatenate([np.reshape(a, (-1, 1)) if np.ndim(a) < 2 else a for a in arrays], 1)


@answers(np.atleast_1d)
def atleast_1d(x: Any) -> Any:
    return x if x.ndim else reshape(x, (1,))


@answers(np.split)
def split(x: Any, indices_or_sections: Any, axis: int = 0) -> list[Any]:
    n = x.shape[normal_axis(axis, x.ndim)]
    if isinstance(indices_or_sections, (int, np.integer)) and n % int(indices_or_sections):
        raise ShapeError(located(f"axis {axis} of shape {x.shape} does not divide into {indices_or_sections} equal parts"))
    parts: list[Any] = array_split(x, indices_or_sections, axis)
    return parts


@answers(np.array_split)
def array_split(x: Any, indices_or_sections: Any, axis: int = 0) -> list[Any]:
    """Into parts whose lengths differ by one at most, the longer ones first; or at the given indices."""
    axis = normal_axis(axis, x.ndim)
    n = x.shape[axis]
    if isinstance(indices_or_sections, (int, np.integer)):
        parts = int(indices_or_sections)
        cuts = [i * (n // parts) + min(i, n % parts) for i in range(1, parts)]
    else:
        cuts = [int(i) for i in indices_or_sections]
    edges = [0, *cuts, n]
    return [x[(slice(None),) * axis + (slice(a, b),)] for a, b in pairwise(edges)]


@answers(np.tile)
def tile(x: Any, reps: Any) -> Any:
    counts = (reps,) if isinstance(reps, int) else tuple(reps)
    ndim = max(len(counts), x.ndim)
    counts = (1,) * (ndim - len(counts)) + counts
    shape = (1,) * (ndim - x.ndim) + x.shape
    paired = reshape(x, tuple(n for s in shape for n in (1, s)))
    return reshape(
        broadcast_to(paired, tuple(n for c, s in zip(counts, shape, strict=True) for n in (c, s))),
        tuple(c * s for c, s in zip(counts, shape, strict=True)),
    )


@answers(np.repeat, method="repeat")
def repeat(x: Any, repeats: int, axis: int | None = None) -> Any:
    if not isinstance(repeats, (int, np.integer)):
        raise UsageError(
            located("np.repeat with a different count for each element is not recorded; use np.take with an index array")
        )
    if axis is None:
        x, axis = ravel(x), 0
    axis = normal_axis(axis, x.ndim)
    wide = (*x.shape[: axis + 1], int(repeats), *x.shape[axis + 1 :])
    return reshape(
        broadcast_to(np.expand_dims(x, axis + 1), wide), (*x.shape[:axis], x.shape[axis] * int(repeats), *x.shape[axis + 1 :])
    )


# ---- flip and iota -----------------------------------------------------------------------------------------------------------


def _infer_flip(x: Type, *, axes: tuple[int, ...]) -> Type:
    return Type(x.shape, x.dtype)


def _examples_flip(r: np.random.Generator) -> Examples:
    yield [r.normal(size=(3, 4))], {"axes": (1,)}


OPS.add(
    "flip",
    Op(
        "flip",
        _infer_flip,
        lambda x, *, axes: np.flip(x, axes),
        (lambda g, y, x, *, axes: apply("flip", g, axes=axes),),
        lambda rows, types, *, axes: "mixed" if rows[0] in axes else rows[0],
        _examples_flip,
    ),
)


@answers(np.flip)
def flip(x: Any, axis: Any = None) -> Any:
    axes = normal_axes(axis, x.ndim)
    return apply("flip", x, axes=axes) if axes else x


def _examples_iota(r: np.random.Generator) -> Examples:
    yield [], {"length": 5, "dtype": np.dtype("f8")}


OPS.add(
    "iota",
    Op(
        "iota",
        lambda *, length, dtype: Type((length,), np.dtype(dtype)),
        lambda *, length, dtype: np.arange(length, dtype=dtype),
        (),
        lambda rows, types, **attrs: None,
        _examples_iota,
    ),
)


@answers(np.zeros_like)
def zeros_like(x: Any, dtype: Any = None, shape: Any = None) -> Any:
    return full_like(x, 0, dtype, shape)


@answers(np.ones_like)
def ones_like(x: Any, dtype: Any = None, shape: Any = None) -> Any:
    return full_like(x, 1, dtype, shape)


@answers(np.full_like)
def full_like(x: Any, fill_value: Any, dtype: Any = None, shape: Any = None) -> Any:
    value = convert(fill_value, dtype or x.dtype)
    shape = x.shape if shape is None else (shape,) if isinstance(shape, int) else tuple(shape)
    return value if shape == () else apply_constant(value, shape)


def apply_constant(value: Any, shape: tuple[int, ...]) -> Any:
    """A scalar spread to `shape` as a node, never as an array held in memory."""
    trace = here("a constant")
    return apply("broadcast", Tracer(trace.lift(value), trace), shape=shape)


METHOD_COPY = answers(np.copy, method="copy")(lambda x: x)
answers(np.positive)(lambda x: common(np.positive, (x,))[0])
answers(np.shape)(lambda x: x.shape)
answers(np.ndim)(lambda x: x.ndim)
answers(np.size)(lambda x, axis=None: x.size if axis is None else x.shape[axis])
answers(np.result_type)(lambda *args: np.result_type(*(a.dtype if hasattr(a, "dtype") else a for a in args)))


@answers(np.array_equal)
def array_equal(a: Any, b: Any) -> Any:
    return np.shape(a) == np.shape(b) and np.all(np.equal(*common(np.equal, (a, b))))
