"""NumPy functions that are short combinations of core forms.

In: arrays. Out: arrays. Nothing here needs a line in a backend. Derivatives follow from the parts.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..errors import ShapeError, UsageError
from ..graph.trace import answers, located, type_of
from .call import composition
from .elementwise import _power, common, convert, divide, equal, floor, less, less_equal, logical_and, logical_not, logical_or

# ---- comparisons, by turning the arguments around (NaN compares false, as it must) -------------------------------------------

answers(np.greater)(lambda a, b: less(b, a))
answers(np.greater_equal)(lambda a, b: less_equal(b, a))
answers(np.not_equal)(lambda a, b: logical_not(equal(a, b)))
answers(np.logical_xor)(lambda a, b: np.not_equal(convert(a, bool), convert(b, bool)))
answers(np.isnan)(lambda x: np.not_equal(x, x))
answers(np.isfinite)(lambda x: less(np.abs(x), np.inf))
answers(np.isinf)(lambda x: equal(np.abs(x), np.inf))


@answers(np.isclose)
def isclose(a: Any, b: Any, rtol: float = 1e-5, atol: float = 1e-8) -> Any:
    return logical_or(equal(a, b), logical_and(np.isfinite(b), less_equal(np.abs(a - b), atol + rtol * np.abs(b))))


@answers(np.nan_to_num)
def nan_to_num(x: Any, copy: bool = True, nan: float = 0.0, posinf: float | None = None, neginf: float | None = None) -> Any:
    limits = np.finfo(x.dtype)
    y = np.where(np.isnan(x), nan, x)
    y = np.where(equal(y, np.inf), limits.max if posinf is None else posinf, y)
    return np.where(equal(y, -np.inf), limits.min if neginf is None else neginf, y)


# ---- powers ------------------------------------------------------------------------------------------------------------------


@answers(np.power, np.float_power)
def power(a: Any, b: Any) -> Any:
    """a ** b. Small whole exponents become products, and 0.5 a square root, as in NumPy."""
    if type(b) in (int, float) and type_of(a).dtype.kind == "f":
        if b == 1:
            return a
        if b == 2:
            return a * a
        if b == 3:
            return a * a * a
        if b == 0.5:
            return np.sqrt(a)
        if b == -1:
            return divide(1.0, a)
    return _power(a, b)


answers(np.square)(lambda x: x * x)
answers(np.reciprocal)(lambda x: divide(1.0, x))
answers(np.cbrt)(lambda x: np.sign(x) * _power(np.abs(x), 1 / 3))
answers(np.exp2)(lambda x: np.exp(x * math.log(2)))
answers(np.log2)(lambda x: np.log(x) * (1 / math.log(2)))
answers(np.log10)(lambda x: np.log(x) * (1 / math.log(10)))


@composition("hypot", numpy=(np.hypot,), elementwise=True, examples=lambda r: [([r.normal(size=4), r.normal(size=4)], {})])
def hypot(a: Any, b: Any) -> Any:
    """sqrt(a² + b²)"""
    return np.sqrt(a * a + b * b)


# ---- signs and whole numbers -------------------------------------------------------------------------------------------------


@answers(np.sign)
def sign(x: Any) -> Any:
    return np.where(less(0, x), convert(1, x.dtype), np.where(less(x, 0), convert(-1 if x.dtype.kind != "u" else 0, x.dtype), x)) \
        if x.dtype.kind != "f" else np.where(less(0, x), 1.0, np.where(less(x, 0), -1.0, np.where(equal(x, 0), 0.0, x)))  # fmt: skip


answers(np.ceil)(lambda x: -floor(-x))
answers(np.trunc)(lambda x: np.where(less(x, 0), -floor(-x), floor(x)))
answers(np.copysign)(lambda a, b: np.where(less(b, 0), -np.abs(a), np.abs(a)))


@answers(np.round, np.rint, method="round")
def round_(x: Any, decimals: int = 0) -> Any:
    """To the nearest whole number, halves to the even one."""
    if decimals:
        return round_(x * 10.0**decimals) / 10.0**decimals
    down = floor(x)
    rest = x - down
    odd = np.not_equal(floor(down * 0.5) * 2.0, down)
    return np.where(logical_or(less(0.5, rest), logical_and(equal(rest, 0.5), odd)), down + 1.0, down)


@answers(np.floor_divide)
def floor_divide(a: Any, b: Any) -> Any:
    a, b = common(np.floor_divide, (a, b))
    if a.dtype.kind == "f":
        return floor(a / b)
    return convert(floor(convert(a, np.float64) / convert(b, np.float64)), a.dtype)


@answers(np.remainder, np.mod)
def remainder(a: Any, b: Any) -> Any:
    """a - floor(a / b) b: the sign of the divisor, as in Python."""
    a, b = common(np.remainder, (a, b))
    return a - floor_divide(a, b) * b


# ---- functions ---------------------------------------------------------------------------------------------------------------

answers(np.tan)(lambda x: np.sin(x) / np.cos(x))
answers(np.sinh)(lambda x: 0.5 * (np.expm1(x) - np.expm1(-x)))
answers(np.cosh)(lambda x: 0.5 * (np.exp(x) + np.exp(-x)))
answers(np.arcsin)(lambda x: np.arctan(x / np.sqrt((1 - x) * (1 + x))))
answers(np.arccos)(lambda x: 0.5 * math.pi - np.arcsin(x))
answers(np.arctanh)(lambda x: 0.5 * (np.log1p(x) - np.log1p(-x)))
answers(np.arcsinh)(lambda x: np.sign(x) * np.log1p(np.abs(x) + x * x / (1 + np.sqrt(x * x + 1))))
answers(np.arccosh)(lambda x: np.log(x + np.sqrt((x - 1) * (x + 1))))
answers(np.deg2rad, np.radians)(lambda x: x * (math.pi / 180))
answers(np.rad2deg, np.degrees)(lambda x: x * (180 / math.pi))


@composition(
    "logaddexp", numpy=(np.logaddexp,), elementwise=True, examples=lambda r: [([r.normal(size=4), r.normal(size=4)], {})]
)
def logaddexp(a: Any, b: Any) -> Any:
    """log(exp a + exp b), without overflow."""
    return np.maximum(a, b) + np.log1p(np.exp(-np.abs(a - b)))


@answers(np.clip, method="clip")
def clip(x: Any, a_min: Any = None, a_max: Any = None, *, min: Any = None, max: Any = None) -> Any:
    """Bounded to [a_min, a_max]. Inside and on the bounds the derivative is 1, beyond them 0."""
    low, high = a_min if min is None else min, a_max if max is None else max
    if low is not None:
        x = np.where(less(x, low), low, x)
    if high is not None:
        x = np.where(less(high, x), high, x)
    return x


@answers(np.interp)
def interp(x: Any, xp: Any, fp: Any) -> Any:
    raise UsageError(located("np.interp is not recorded; write the pieces with np.where"))


@answers(np.average)
def average(x: Any, axis: Any = None, weights: Any = None) -> Any:
    if weights is None:
        return np.mean(x, axis=axis)
    if np.shape(weights) != np.shape(x):
        raise ShapeError(
            located(f"np.average on traced arrays needs weights of the shape {np.shape(x)}, not {np.shape(weights)}")
        )
    return np.sum(x * weights, axis=axis) / np.sum(weights, axis=axis)


def _triangle(keep: Any, x: Any, k: int) -> Any:
    rows, columns = np.arange(x.shape[-2])[:, None], np.arange(x.shape[-1])
    return np.where(keep(columns - rows, k), x, 0)


answers(np.triu)(lambda x, k=0: _triangle(np.greater_equal, x, k))
answers(np.tril)(lambda x, k=0: _triangle(np.less_equal, x, k))
answers(np.roll)(lambda x, shift, axis=None: _roll(x, shift, axis))


def _roll(x: Any, shift: int, axis: int | None) -> Any:
    if axis is None:
        return np.reshape(_roll(np.ravel(x), shift, 0), x.shape)
    n = x.shape[axis]
    cut = -shift % n if n else 0
    before = (slice(None),) * (axis % x.ndim)
    return np.concatenate([x[(*before, slice(cut, None))], x[(*before, slice(None, cut))]], axis=axis)
