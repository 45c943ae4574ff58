"""NumPy functions that are short combinations of core forms.

In: arrays. Out: arrays. Nothing here needs a line in a backend. Derivatives follow from the parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import DtypeError, ShapeError, UsageError
from ..graph.trace import answers, located, type_of
from .call import composition
from .elementwise import (
    _power,
    common,
    convert,
    divide,
    equal,
    floor,
    less,
    less_equal,
    logical_and,
    logical_not,
    logical_or,
    remainder,
    strong_divide,
    strong_multiply,
)


def unary(*ufuncs: Any) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    """Declare what functions of one array mean. The argument comes in the type in which NumPy would compute."""

    def declare(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        for ufunc in ufuncs:
            answers(ufunc)(lambda x, ufunc=ufunc: function(*common(ufunc, (x,))))
        return function

    return declare


# ---- comparisons, by turning the arguments around (NaN compares false, as it must) -------------------------------------------

answers(np.greater)(lambda a, b: less(b, a))
answers(np.greater_equal)(lambda a, b: less_equal(b, a))
answers(np.not_equal)(lambda a, b: logical_not(equal(a, b)))
answers(np.logical_xor)(lambda a, b: np.not_equal(convert(a, bool), convert(b, bool)))
answers(np.fabs)(lambda x: np.abs(*common(np.fabs, (x,))))
answers(np.isnan)(lambda x: np.not_equal(x, x))
answers(np.isfinite)(lambda x: less(np.abs(x), np.inf))
answers(np.isinf)(lambda x: equal(np.abs(x), np.inf))


@answers(np.isclose)
def isclose(a: Any, b: Any, rtol: float = 1e-5, atol: float = 1e-8) -> Any:
    return logical_or(equal(a, b), logical_and(np.isfinite(b), less_equal(np.abs(a - b), atol + rtol * np.abs(b))))


@answers(np.nan_to_num)
def nan_to_num(x: Any, copy: bool = True, nan: float = 0.0, posinf: float | None = None, neginf: float | None = None) -> Any:
    if x.dtype.kind != "f":
        return x
    limits = np.finfo(x.dtype)
    y = np.where(np.isnan(x), nan, x)
    y = np.where(equal(y, np.inf), float(limits.max) if posinf is None else posinf, y)
    return np.where(equal(y, -np.inf), float(limits.min) if neginf is None else neginf, y)


# ---- powers ------------------------------------------------------------------------------------------------------------------


@answers(np.power)
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
    if type_of(a).dtype.kind in "iu" and type(b) is int and b >= 0:
        return _whole_power(a, b)
    return _power(a, b)


def _whole_power(a: Any, b: int) -> Any:
    """Whole numbers to a known exponent, by squaring. To an exponent that is computed there is none: it might be negative."""
    if b == 0:
        return np.ones_like(a)
    half = _whole_power(a, b // 2)
    return half * half * a if b % 2 else half * half


answers(np.float_power)(lambda a, b: power(*common(np.float_power, (a, b))))
unary(np.square)(lambda x: x * x)
unary(np.exp2)(lambda x: _power(2.0, x))
unary(np.log2)(lambda x: np.log(x) * (1 / math.log(2)))
unary(np.log10)(lambda x: np.log(x) * math.log10(math.e))  # 1 / math.log(10) is off by more than its last bit


@composition(
    "cbrt",
    numpy=(np.cbrt,),
    elementwise=True,
    derivative=(lambda g, y, x: strong_divide(g, 3.0 * (y * y)),),
    examples=lambda r: [([r.normal(size=4)], {})],
)
def cbrt(x: Any) -> Any:
    """The cube root. 1/3 is not a binary number, so the power is off by some ulp for large and small x: one step of Newton's."""
    near = _power(np.abs(x), 1 / 3)
    root = near - (near - np.abs(x) / (near * near)) * (1 / 3)
    return np.where(equal(x, 0.5 * x), x, np.where(less(x, 0), -root, root))  # 0, -0 and the infinities are their own roots


@unary(np.reciprocal)
def reciprocal(x: Any) -> Any:
    if x.dtype.kind != "f":
        raise DtypeError(located(f"np.reciprocal of {x.dtype} is 0 almost everywhere; write 1 / x"))
    return divide(1.0, x)


@composition(
    "hypot",
    numpy=(np.hypot,),
    elementwise=True,
    derivative=(
        lambda g, y, a, b: strong_multiply(g, strong_divide(a, y)),
        lambda g, y, a, b: strong_multiply(g, strong_divide(b, y)),
    ),
    examples=lambda r: [([r.normal(size=4), r.normal(size=4)], {})],
)
def hypot(a: Any, b: Any) -> Any:
    """sqrt(a² + b²), without overflow; infinite if one of them is, whatever the other."""
    a, b = np.abs(a), np.abs(b)
    large, ratio = np.maximum(a, b), np.minimum(a, b) / np.maximum(a, b)
    y = np.where(equal(large, 0), large, large * np.sqrt(1 + ratio * ratio))
    return np.where(logical_or(equal(a, np.inf), equal(b, np.inf)), np.inf, y)


# ---- signs and whole numbers -------------------------------------------------------------------------------------------------


@unary(np.sign)
def sign(x: Any) -> Any:
    """1, 0, -1, or NaN."""
    one = np.ones((), x.dtype)
    return np.where(
        less(0, x), one, x if x.dtype.kind == "u" else np.where(less(x, 0), np.full((), -1, x.dtype), np.where(equal(x, 0), 0, x))
    )


unary(np.ceil)(lambda x: -floor(-x) if x.dtype.kind == "f" else x)
unary(np.trunc)(lambda x: np.where(less(x, 0), -floor(-x), floor(x)) if x.dtype.kind == "f" else x)


@answers(np.copysign)
def copysign(a: Any, b: Any) -> Any:
    a, b = common(np.copysign, (a, b))
    minus = logical_or(less(b, 0), logical_and(equal(b, 0), less(divide(1.0, b), 0)))  # -0.0 is below 0 as well
    return np.where(minus, -np.abs(a), np.abs(a))


@answers(np.round, method="round")
def round_(x: Any, decimals: int = 0) -> Any:
    if x.dtype.kind in "iu":
        return x if decimals >= 0 else convert(round_(convert(x, np.float64), decimals), x.dtype)
    if decimals > 0:
        return rint(x * 10.0**decimals) / 10.0**decimals
    return rint(x / 10.0**-decimals) * 10.0**-decimals if decimals else np.rint(x)


@unary(np.rint)
def rint(x: Any) -> Any:
    """To the nearest whole number, halves to the even one."""
    down = floor(x)
    rest = x - down
    odd = np.not_equal(floor(down * 0.5) * 2.0, down)
    y = np.where(logical_or(less(0.5, rest), logical_and(equal(rest, 0.5), odd)), down + 1.0, down)
    return np.where(equal(y, 0), 0.0 * x, y)  # from below it is -0


@answers(np.floor_divide)
def floor_divide(a: Any, b: Any) -> Any:
    """floor(a / b), from the exact remainder: 1.0 // 0.1 is 9. Whole numbers are exact up to 2**53; divided by 0 they give 0."""
    a, b = common(np.floor_divide, (a, b))
    rest = remainder(a, b)
    whole = a - rest
    if a.dtype.kind == "f":
        turned = np.isinf(rest)  # a is finite, b infinite and of the other sign
        return np.where(equal(b, 0), a / b, np.where(turned, -1.0, rint(whole / b)))
    return np.where(equal(b, 0), 0, convert(rint(convert(whole, np.float64) / convert(b, np.float64)), a.dtype))


# ---- functions ---------------------------------------------------------------------------------------------------------------

unary(np.sinh)(lambda x: _halved(x, _within(np.expm1, x) - _within(np.expm1, -x)))
unary(np.cosh)(lambda x: _halved(x, _within(np.exp, x) + _within(np.exp, -x)))
unary(np.arctanh)(lambda x: 0.5 * (np.log1p(x) - np.log1p(-x)))
unary(np.deg2rad, np.radians)(lambda x: x * (math.pi / 180))
unary(np.rad2deg, np.degrees)(lambda x: x * (180 / math.pi))


_FAR = 64  # beyond, x - 1 is exact, expm1 is exp, and of exp(x) and exp(-x) the smaller is nothing


def _within(f: Callable[[Any], Any], x: Any) -> Any:
    """f(x) of exp or expm1; where x is large f(x - 1), which does not overflow before f(x) / 2 does."""
    return f(np.where(less(_FAR, x), x - 1, x))


def _halved(x: Any, y: Any) -> Any:
    """y / 2, and e y / 2 where y was computed from |x| - 1."""
    return np.where(less(_FAR, np.abs(x)), 0.5 * math.e * y, 0.5 * y)


_LARGE = 1e9  # beyond, x² + 1 is x² in every type


@composition(
    "arcsinh",
    numpy=(np.arcsinh,),
    elementwise=True,
    derivative=(lambda g, y, x: strong_divide(g, np.hypot(x, 1.0)),),
    examples=lambda r: [([r.normal(size=4)], {})],
)
def arcsinh(x: Any) -> Any:
    """log(a + sqrt(a² + 1)) for a = |x|, with the sign of x, without cancellation and without overflow."""
    a = np.abs(x)
    near = np.where(less(a, _LARGE), a, 0.0)
    size = np.where(less(a, _LARGE), np.log1p(near + near * near / (1 + np.sqrt(near * near + 1))), np.log(a) + math.log(2))
    return np.where(less(x, 0), -size, np.where(equal(x, 0), x, size))  # -0 stays


def _above(a: Any, b: Any) -> Any:
    """a - b, and 0 for equal infinities."""
    return np.where(logical_and(equal(a, b), np.isinf(a)), 0.0, a - b)


@composition(
    "logaddexp",
    numpy=(np.logaddexp,),
    elementwise=True,
    # The derived ones are those of max and |a - b|, whose own derivatives are wrong where a = b.
    derivative=(
        lambda g, y, a, b: strong_multiply(g, divide(1.0, 1.0 + np.exp(_above(b, a)))),
        lambda g, y, a, b: strong_multiply(g, divide(1.0, 1.0 + np.exp(_above(a, b)))),
    ),
    examples=lambda r: [([r.normal(size=4), r.normal(size=4)], {})],
)
def logaddexp(a: Any, b: Any) -> Any:
    """log(exp a + exp b), without overflow."""
    return np.maximum(a, b) + np.log1p(np.exp(-np.abs(_above(a, b))))


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
    return np.where(keep(columns - rows, k), x, np.zeros((), x.dtype))


answers(np.triu)(lambda x, k=0: _triangle(np.greater_equal, x, k))
answers(np.tril)(lambda x, k=0: _triangle(np.less_equal, x, k))


@answers(np.roll)
def roll(x: Any, shift: Any, axis: Any = None) -> Any:
    if axis is None:
        return np.reshape(roll(np.ravel(x), shift, 0), x.shape)
    for s, a in np.broadcast(shift, axis):
        x = _roll(x, int(s), int(a))
    return x


def _roll(x: Any, shift: int, axis: int) -> Any:
    n = x.shape[axis]
    cut = -shift % n if n else 0
    before = (slice(None),) * (axis % x.ndim)
    return np.concatenate([x[(*before, slice(cut, None))], x[(*before, slice(None, cut))]], axis=axis)
