"""Operators that take an axis away: sum, max, min, argmax, and what is made of them.

In: an array. Out: the same without the reduced axes (`keepdims` is a reshape, put in here once for all).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import Any

import numpy as np

from ..errors import DtypeError, ShapeError, UsageError
from ..graph.node import OPS, Array, Op, Rows, Type
from ..graph.trace import answers, apply, located
from .call import composition
from .elementwise import convert, equal, strong_divide, strong_multiply
from .layout import normal_axes, normal_axis, ravel, reshape

Examples = Iterable[tuple[Sequence[Any], dict[str, Any]]]


def _without(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for i, n in enumerate(shape) if i not in axes)


def kept(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    """`shape` with the reduced axes of length 1."""
    return tuple(1 if i in axes else n for i, n in enumerate(shape))


def _infer_sum(x: Type, *, axes: tuple[int, ...]) -> Type:
    if x.dtype == bool:
        raise DtypeError("a sum needs numbers; convert booleans first")
    return Type(_without(x.shape, axes), x.dtype)


def _infer_extreme(x: Type, *, axes: tuple[int, ...]) -> Type:
    if x.dtype.kind != "b" and any(x.shape[a] == 0 for a in axes):
        raise ShapeError(f"the largest or smallest of no elements: axes {axes} of shape {x.shape}")
    return Type(_without(x.shape, axes), x.dtype)


def _rows_reduce(rows: Sequence[Rows], types: Sequence[Type], *, axes: tuple[int, ...]) -> Rows:
    r = rows[0]
    assert isinstance(r, int)
    return None if r in axes else r - sum(a < r for a in axes)


def _spread_back(x: Any, like: Any, axes: tuple[int, ...]) -> Any:
    return np.broadcast_to(reshape(x, kept(like.shape, axes)), like.shape)


def _rule_extreme(g: Any, y: Any, x: Any, *, axes: tuple[int, ...]) -> Any:
    """Ties share the gradient in equal parts."""
    chosen = convert(np.equal(x, _spread_back(y, x, axes)), x.dtype)
    return strong_multiply(_spread_back(strong_divide(g, np.sum(chosen, axis=axes)), x, axes), chosen)


def _examples(r: np.random.Generator) -> Examples:
    yield [r.normal(size=(3, 4))], {"axes": (0,)}
    yield [r.normal(size=(2, 3, 4))], {"axes": (0, 2)}
    yield [r.normal(size=(3,))], {"axes": (0,)}


def _value(reduce: Callable[..., Any], on_booleans: Callable[..., Any]) -> Callable[..., Any]:
    def value(x: Array, *, axes: tuple[int, ...]) -> Any:
        return (on_booleans if x.dtype.kind == "b" else reduce)(x, axis=axes)

    return value


OPS.add(
    "sum",
    Op(
        "sum",
        _infer_sum,
        lambda x, *, axes: np.sum(x, axis=axes, dtype=x.dtype),
        (lambda g, y, x, *, axes: _spread_back(g, x, axes),),
        _rows_reduce,
        _examples,
    ),
)
OPS.add("max", Op("max", _infer_extreme, _value(np.max, np.any), (_rule_extreme,), _rows_reduce, _examples))
OPS.add("min", Op("min", _infer_extreme, _value(np.min, np.all), (_rule_extreme,), _rows_reduce, _examples))


def _reduce(op: str, x: Any, axis: Any, keepdims: Any) -> Any:
    axes = normal_axes(axis, x.ndim)
    if not axes:
        return x
    y = apply(op, x, axes=axes)
    return reshape(y, kept(x.shape, axes)) if wanted(keepdims) else y


def wanted(keepdims: Any) -> bool:
    return keepdims is not np._NoValue and bool(keepdims)


def _no_more(name: str, options: dict[str, Any]) -> None:
    given = [k for k, v in options.items() if v is not None and v is not np._NoValue and not (k == "where" and v is True)]
    if given:
        raise UsageError(located(f"np.{name} on traced arrays takes no {', '.join(given)}"))


@answers(np.sum, method="sum")
def sum_(x: Any, axis: Any = None, dtype: Any = None, out: Any = None, keepdims: Any = False, **options: Any) -> Any:
    _no_more("sum", {"out": out, **options})
    if dtype is None and x.dtype.kind in "biu":
        dtype = np.sum(np.zeros(0, x.dtype)).dtype  # NumPy adds small integers in the platform's integer
    return _reduce("sum", convert(x, dtype) if dtype is not None else x, axis, keepdims)


@answers(np.mean, method="mean")
def mean(x: Any, axis: Any = None, dtype: Any = None, out: Any = None, keepdims: Any = False, **options: Any) -> Any:
    _no_more("mean", {"out": out, **options})
    x = convert(x, dtype or (x.dtype if x.dtype.kind == "f" else np.float64))
    count = prod(x.shape[a] for a in normal_axes(axis, x.ndim))
    return _reduce("sum", x, axis, keepdims) / (count if count else np.nan)


@answers(np.max, np.amax, method="max")
def max_(x: Any, axis: Any = None, out: Any = None, keepdims: Any = False, **options: Any) -> Any:
    """The largest element. Where several are equal, the derivative is shared among them in equal parts."""
    _no_more("max", {"out": out, **options})
    return _reduce("max", x, axis, keepdims)


@answers(np.min, np.amin, method="min")
def min_(x: Any, axis: Any = None, out: Any = None, keepdims: Any = False, **options: Any) -> Any:
    _no_more("min", {"out": out, **options})
    return _reduce("min", x, axis, keepdims)


@answers(np.any, method="any")
def any_(x: Any, axis: Any = None, out: Any = None, keepdims: Any = False, **options: Any) -> Any:
    _no_more("any", {"out": out, **options})
    return (
        np.not_equal(count_nonzero(x, axis, keepdims=keepdims), 0)
        if not x.size
        else _reduce("max", convert(x, bool), axis, keepdims)
    )


@answers(np.all, method="all")
def all_(x: Any, axis: Any = None, out: Any = None, keepdims: Any = False, **options: Any) -> Any:
    _no_more("all", {"out": out, **options})
    return np.logical_not(any_(np.logical_not(x), axis, keepdims=keepdims))


@answers(np.count_nonzero)
def count_nonzero(x: Any, axis: Any = None, *, keepdims: bool = False) -> Any:
    return sum_(convert(np.not_equal(x, 0), np.int64), axis, keepdims=keepdims)


@answers(np.var, method="var")
def var(
    x: Any, axis: Any = None, dtype: Any = None, out: Any = None, ddof: int = 0, keepdims: Any = False, **options: Any
) -> Any:
    """Mean square deviation from the mean, in two passes: the deviations first, then their squares."""
    _no_more("var", {"out": out, **options})
    axes = normal_axes(axis, x.ndim)
    deviation = x - mean(x, axes, dtype, keepdims=True)
    return sum_(deviation * deviation, axes, keepdims=keepdims) / (prod(x.shape[a] for a in axes) - ddof)


@answers(np.std, method="std")
def std(
    x: Any, axis: Any = None, dtype: Any = None, out: Any = None, ddof: int = 0, keepdims: Any = False, **options: Any
) -> Any:
    return np.sqrt(var(x, axis, dtype, out, ddof, keepdims, **options))


@answers(np.linalg.norm)
def norm(x: Any, ord: Any = None, axis: Any = None, keepdims: bool = False) -> Any:
    """Euclidean norm. At 0 its derivative is taken as 0, the smallest subgradient."""
    if ord not in (None, 2, "fro") or (ord == 2 and len(normal_axes(axis, x.ndim)) > 1):
        raise UsageError(located(f"np.linalg.norm with ord={ord} is not recorded; write it out with np.sum"))
    square = sum_(x * x, axis, keepdims=keepdims)
    return np.where(equal(square, 0), 0.0, np.sqrt(np.where(equal(square, 0), 1.0, square)))


def _mean_kept(x: Any, axes: tuple[int, ...]) -> Any:
    return np.sum(x, axis=axes, keepdims=True) * (1.0 / prod(x.shape[a] for a in axes))


def _rule_standardize(g: Any, y: Any, x: Any, *, axes: tuple[int, ...], eps: float) -> Any:
    deviation = x - _mean_kept(x, axes)
    slope = g - _mean_kept(g, axes) - y * _mean_kept(g * y, axes)
    return slope / np.sqrt(_mean_kept(deviation * deviation, axes) + eps)


@composition(
    "standardize",
    derivative=(_rule_standardize,),
    examples=lambda r: [
        ([r.normal(size=(4, 3))], {"axes": (0,), "eps": 1e-5}),
        ([r.normal(size=(3, 4))], {"axes": (1,), "eps": 0.1}),
    ],
)
def standardize(x: Any, *, axes: tuple[int, ...], eps: float) -> Any:
    """(x - μ) / sqrt(σ² + eps), μ and σ² the mean and variance over `axes`. The written derivative needs two sums where the derived
    one needs four, one after the other."""
    deviation = x - _mean_kept(x, axes)
    return deviation / np.sqrt(_mean_kept(deviation * deviation, axes) + eps)


# ---- argmax ------------------------------------------------------------------------------------------------------------------


def _infer_argmax(x: Type, *, axis: int) -> Type:
    return Type(_infer_extreme(x, axes=(axis,)).shape, np.dtype(np.int64))


OPS.add(
    "argmax",
    Op(
        "argmax",
        _infer_argmax,
        lambda x, *, axis: np.argmax(x, axis=axis),
        (None,),
        lambda rows, types, *, axis: "mixed" if rows[0] == axis else rows[0] - (axis < rows[0]),
        lambda r: [([r.normal(size=(3, 4))], {"axis": 1}), ([np.array([1.0, 3.0, 3.0])], {"axis": 0})],
        smooth=False,
    ),
)


@answers(np.argmax, method="argmax")
def argmax(x: Any, axis: int | None = None, out: Any = None, *, keepdims: Any = False) -> Any:
    """Index of the first largest element."""
    _no_more("argmax", {"out": out})
    x, axis = (ravel(x), 0) if axis is None else (x, normal_axis(axis, x.ndim))
    y = apply("argmax", x, axis=axis)
    return reshape(y, kept(x.shape, (axis,))) if wanted(keepdims) else y


@answers(np.argmin, method="argmin")
def argmin(x: Any, axis: int | None = None, out: Any = None, *, keepdims: Any = False) -> Any:
    """Index of the first smallest element."""
    if x.dtype == bool:
        turned = np.logical_not(x)
    else:  # whole numbers: -1 - x, or the largest - x, which cannot overflow
        turned = -x if x.dtype.kind == "f" else convert(-1 if x.dtype.kind == "i" else np.iinfo(x.dtype).max, x.dtype) - x
    return argmax(turned, axis, out, keepdims=keepdims)


# ---- sums of exponentials ----------------------------------------------------------------------------------------------------


def _examples_axis(r: np.random.Generator) -> Examples:
    yield [r.normal(size=(3, 4))], {}
    yield [r.normal(size=(3, 4))], {"axis": 0}


@composition(
    "softmax",
    derivative=(lambda g, y, x, *, axis=-1: strong_multiply(y, g - np.sum(strong_multiply(g, y), axis=axis, keepdims=True)),),
    examples=_examples_axis,
)
def softmax(x: Any, axis: int = -1) -> Any:
    """exp(x) / Σ exp(x) along `axis`, computed from differences to the largest, so that nothing overflows."""
    e = np.exp(x - np.max(x, axis=axis, keepdims=True))
    return e / np.sum(e, axis=axis, keepdims=True)


@composition(
    "log_softmax",
    derivative=(lambda g, y, x, *, axis=-1: g - strong_multiply(np.exp(y), np.sum(g, axis=axis, keepdims=True)),),
    examples=_examples_axis,
)
def log_softmax(x: Any, axis: int = -1) -> Any:
    """x - log Σ exp(x) along `axis`."""
    shifted = x - np.max(x, axis=axis, keepdims=True)
    return shifted - np.log(np.sum(np.exp(shifted), axis=axis, keepdims=True))


def _rule_logsumexp(g: Any, y: Any, x: Any, *, axis: Any = None, keepdims: bool = False) -> Any:
    axes = normal_axes(axis, x.ndim)
    whole = kept(x.shape, axes)
    return strong_multiply(np.exp(x - reshape(y, whole)), reshape(g, whole))


@composition("logsumexp", derivative=(_rule_logsumexp,), examples=_examples_axis)
def logsumexp(x: Any, axis: Any = None, keepdims: bool = False) -> Any:
    """log Σ exp(x) over `axis`."""
    top = np.max(x, axis=axis, keepdims=True)
    top = np.where(np.abs(top) < np.inf, top, 0.0)  # all -inf: the sum is 0, its logarithm -inf, not NaN
    y = np.log(np.sum(np.exp(x - top), axis=axis, keepdims=True)) + top
    return y if keepdims else np.reshape(y, tuple(n for i, n in enumerate(x.shape) if i not in normal_axes(axis, x.ndim)))
