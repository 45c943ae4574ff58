"""Operators that treat each element by itself.

In: arrays of one shape (broadcasting is a node of its own, put in here once for all). Out: arrays of that shape. Each declaration
holds the NumPy definition, the derivative and example inputs. Rules are written in NumPy on traced arrays, so they can be
differentiated again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from ..errors import DtypeError, ShapeError, TraceError
from ..graph.node import DTYPES, OPS, Array, Op, Rows, Rule, Type
from ..graph.trace import Tracer, answers, apply, here, is_traced, located, type_of

FLOAT = "float"  # integers become floats, as NumPy does
SAME = "same"
TEST = "test"  # the result is boolean


# ---- what all of them share --------------------------------------------------------------------------------------------------


def rows_elementwise(rows: Sequence[Rows], types: Sequence[Type], **attrs: Any) -> Rows:
    """Rows stay where they are; two different axes cannot be kept apart."""
    carried = {r for r in rows if r is not None}
    return carried.pop() if len(carried) == 1 else None if not carried else "mixed"


def _infer(kind: str, name: str) -> Callable[..., Type]:
    def infer(*types: Type) -> Type:
        shape, dtype = types[0].shape, types[-1].dtype
        if any(t.shape != shape for t in types) or any(t.dtype != dtype for t in types[1:]):
            raise ShapeError(f"{name} takes arrays of one shape and type, not {', '.join(map(str, types))}")
        if kind == FLOAT and dtype.kind != "f":
            raise DtypeError(f"{name} takes floating-point numbers, not {dtype}")
        return Type(shape, np.dtype(bool) if kind == TEST else dtype, all(t.weak for t in types))

    return infer


@lru_cache(maxsize=4096)
def _resolved(ufunc: np.ufunc, kinds: tuple[Any, ...]) -> tuple[np.dtype[Any], ...]:
    """The types NumPy computes in; Python's `float` and `int` stand for weak numbers."""
    return ufunc.resolve_dtypes((*kinds, *[None] * ufunc.nout))


def _weak_kind(type: Type) -> Any:
    """Python's bool is not weak: it is NumPy's."""
    return {"i": int, "f": float}.get(type.dtype.kind, type.dtype) if type.weak else type.dtype


def common(ufunc: np.ufunc, args: Sequence[Any]) -> list[Any]:
    """Arguments brought to the shape they broadcast to and the type in which NumPy would compute `ufunc`."""
    types = [type_of(a) for a in args]
    weak = all(t.weak for t in types)
    try:
        resolved = _resolved(ufunc, tuple(t.dtype if weak else _weak_kind(t) for t in types))
    except TypeError as error:
        raise DtypeError(located(f"np.{ufunc.__name__} of {', '.join(map(str, types))}: {error}")) from None
    wanted = list(resolved[: len(args)])
    if any(d not in DTYPES for d in wanted):
        raise DtypeError(
            located(f"np.{ufunc.__name__} of {', '.join(map(str, types))} would give {wanted[0]}, which is not known")
        )
    if weak and is_traced(*args):  # the result stays a number that takes on the type of what it meets
        return [_weakly(a, d) for a, d in zip(args, wanted, strict=True)]
    return spread([convert(a, d) for a, d in zip(args, wanted, strict=True)], f"np.{ufunc.__name__}")


def _weakly(x: Any, dtype: np.dtype[Any]) -> Any:
    if type_of(x).dtype == dtype:
        return x
    return apply("cast", x, dtype=dtype, weak=True) if is_traced(x) else dtype.type(x).item()


def convert(x: Any, dtype: Any) -> Any:
    """`x` as this data type; recorded only if it changes anything."""
    dtype = np.dtype(dtype)
    if dtype not in DTYPES:
        raise DtypeError(located(f"{dtype} is not known; known are {', '.join(map(str, DTYPES))}"))
    if not is_traced(x):
        return np.asarray(x, dtype)  # the same array, if it has this type: captured twice, it is one input
    if x.dtype == dtype and not x.node.type.weak:
        return x
    return apply("cast", x, dtype=dtype)


def spread(args: Sequence[Any], name: str) -> list[Any]:
    """Arguments broadcast to their common shape by explicit nodes."""
    shapes = [np.shape(a) for a in args]
    try:
        shape = shapes[0] if len(set(shapes)) == 1 else np.broadcast_shapes(*shapes)
    except ValueError:
        raise ShapeError(located(f"{name}: shapes {' and '.join(map(str, shapes))} do not fit together")) from None
    if is_traced(*args):  # constants are spread by a node, not held as arrays of the full size
        trace = here(name)
        args = [a if is_traced(a) else Tracer(trace.lift(a), trace) for a in args]
    return [a if s == shape else apply("broadcast", a, shape=shape) for a, s in zip(args, shapes, strict=True)]


def elementwise(
    name: str,
    value: Callable[..., Any],
    derivative: tuple[Rule | None, ...],
    *,
    kind: str = SAME,
    like: Any = None,
    numpy: Sequence[Any] = (),
    low: float = -2.0,
    high: float = 2.0,
    smooth: bool = True,
    examples: Callable[[np.random.Generator], Iterable[Any]] | None = None,
) -> Callable[..., Any]:
    """Declare an elementwise form; returns the function that records it. `like` is the ufunc whose type rules hold."""
    like = like if like is not None else value
    arity = len(derivative)

    def default(r: np.random.Generator) -> Iterable[Any]:
        yield [r.uniform(low, high, (3, 4)) for _ in range(arity)], {}
        yield [r.uniform(low, high, ()) for _ in range(arity)], {}

    OPS.add(name, Op(name, _infer(kind, name), value, derivative, rows_elementwise, examples or default, True, smooth))

    def function(*args: Any, **options: Any) -> Any:
        _no_options(name, args, options, arity)
        return apply(name, *common(like, args))

    function.__name__ = name
    function.__doc__ = f"{name}, element by element."
    return answers(*(numpy or ((like,) if isinstance(value, np.ufunc) else ())))(function)


def _no_options(name: str, args: Sequence[Any], options: dict[str, Any], arity: int) -> None:
    """`where=`, `dtype=`, `casting=` of ufuncs have no place in a graph."""
    given = sorted(k for k, v in options.items() if not (k == "where" and v is True) and v is not None)
    if given:
        raise DtypeError(located(f"np.{name} on traced arrays takes no {', '.join(given)}; use np.where or .astype instead"))
    if len(args) != arity:
        raise TypeError(f"takes {arity} arguments, got {len(args)}")


# ---- zero wins ---------------------------------------------------------------------------------------------------------------
# A derivative that is not finite meets a gradient of zero wherever `np.where` did not take a branch. 0 * inf would be NaN and
# spread; these two give 0. Their own derivatives are in terms of themselves, so higher derivatives are right as well, which
# np.where(g == 0, 0, g * d) would not be. In a product zero wins on either side: the second derivative of a branch not taken
# brings gradients that are not finite to factors that are 0.


def _strong_multiply(a: Any, b: Any) -> Any:
    y = a * b
    lost = np.isnan(y)
    return np.where(lost & ((a == 0) | (b == 0)), np.zeros_like(y), y) if lost.any() else y


def _strong_divide(g: Any, b: Any) -> Any:
    y = g / b
    lost = np.isnan(y)
    return np.where(lost & (g == 0), np.zeros_like(y), y) if lost.any() else y


strong_multiply: Callable[..., Any] = elementwise(
    "strong_multiply",
    _strong_multiply,
    (lambda g, y, a, b: strong_multiply(g, b), lambda g, y, a, b: strong_multiply(g, a)),
    like=np.multiply,
)
strong_divide: Callable[..., Any] = elementwise(
    "strong_divide",
    _strong_divide,
    (lambda g, y, a, b: strong_divide(g, b), lambda g, y, a, b: -strong_multiply(strong_divide(g, b), y)),
    like=np.true_divide,
    kind=FLOAT,
    low=0.5,
)

# ---- arithmetic --------------------------------------------------------------------------------------------------------------

negative = elementwise("negative", np.negative, (lambda g, y, x: -g,))
add = elementwise("add", np.add, (lambda g, y, a, b: g, lambda g, y, a, b: g))
subtract = elementwise("subtract", np.subtract, (lambda g, y, a, b: g, lambda g, y, a, b: -g))
multiply = elementwise(
    "multiply", np.multiply, (lambda g, y, a, b: strong_multiply(g, b), lambda g, y, a, b: strong_multiply(g, a))
)
divide = elementwise(
    "divide",
    np.true_divide,
    (lambda g, y, a, b: strong_divide(g, b), lambda g, y, a, b: -strong_multiply(strong_divide(g, b), y)),
    kind=FLOAT,
    low=0.5,
)
_power: Callable[..., Any] = elementwise(
    "power",
    np.power,
    (
        lambda g, y, a, b: strong_multiply(g, strong_multiply(b, _power(a, b - 1))),
        lambda g, y, a, b: strong_multiply(g, strong_multiply(y, np.log(a))),
    ),
    kind=FLOAT,
    low=0.5,
)
# a - floor(a / b) b, exact: the sign of the divisor, as in Python.
remainder = elementwise(
    "remainder",
    np.remainder,
    (lambda g, y, a, b: g, lambda g, y, a, b: -strong_multiply(g, np.floor_divide(a, b))),
    low=0.5,
)
# Ties share the gradient half and half, so that the result does not depend on the order of the arguments.
maximum = elementwise(
    "maximum", np.maximum, (lambda g, y, a, b: _share(g, a > b, a, b), lambda g, y, a, b: _share(g, b > a, a, b))
)
minimum = elementwise(
    "minimum", np.minimum, (lambda g, y, a, b: _share(g, a < b, a, b), lambda g, y, a, b: _share(g, b < a, a, b))
)


def _share(g: Any, wins: Any, a: Any, b: Any) -> Any:
    return np.where(wins, g, np.where(a == b, 0.5 * g, 0.0))


# ---- functions of one argument -----------------------------------------------------------------------------------------------

exp = elementwise("exp", np.exp, (lambda g, y, x: strong_multiply(g, y),), kind=FLOAT)
expm1 = elementwise("expm1", np.expm1, (lambda g, y, x: strong_multiply(g, y + 1),), kind=FLOAT)
log = elementwise("log", np.log, (lambda g, y, x: strong_divide(g, x),), kind=FLOAT, low=0.5)
log1p = elementwise("log1p", np.log1p, (lambda g, y, x: strong_divide(g, x + 1),), kind=FLOAT, low=-0.5)
# At 0 the slope is infinite: the gradient is inf there, and 0 where the incoming gradient is 0.
sqrt = elementwise("sqrt", np.sqrt, (lambda g, y, x: strong_divide(0.5 * g, y),), kind=FLOAT, low=0.5)
# At 0 the slope of |x| is taken as 0.
absolute = elementwise("abs", np.abs, (lambda g, y, x: strong_multiply(g, np.sign(x)),), numpy=(np.abs,))
sin = elementwise("sin", np.sin, (lambda g, y, x: strong_multiply(g, np.cos(x)),), kind=FLOAT)
cos = elementwise("cos", np.cos, (lambda g, y, x: -strong_multiply(g, np.sin(x)),), kind=FLOAT)
tan = elementwise("tan", np.tan, (lambda g, y, x: strong_multiply(g, 1 + y * y),), kind=FLOAT, low=-1.2, high=1.2)
tanh = elementwise("tanh", np.tanh, (lambda g, y, x: strong_multiply(g, 1 - y * y),), kind=FLOAT)
arctan = elementwise("arctan", np.arctan, (lambda g, y, x: strong_divide(g, 1 + x * x),), kind=FLOAT)
# At the ends of their ranges the slopes are infinite, as that of a root at 0.
arcsin = elementwise(
    "arcsin", np.arcsin, (lambda g, y, x: strong_divide(g, np.sqrt((1 - x) * (1 + x))),), kind=FLOAT, low=-0.9, high=0.9
)
arccos = elementwise(
    "arccos", np.arccos, (lambda g, y, x: -strong_divide(g, np.sqrt((1 - x) * (1 + x))),), kind=FLOAT, low=-0.9, high=0.9
)
arccosh = elementwise(
    "arccosh", np.arccosh, (lambda g, y, x: strong_divide(g, np.sqrt(x - 1) * np.sqrt(x + 1)),), kind=FLOAT, low=1.1, high=3.0
)
floor = elementwise("floor", np.floor, (None,), kind=SAME, smooth=False)


def _logistic(x: Any) -> Any:
    """1 / (1 + exp(-x)), from exp(-|x|), so that nothing overflows and small values keep their digits."""
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, np.ones((), e.dtype), e) / (1 + e)


logistic: Callable[..., Any] = elementwise(
    "logistic", _logistic, (lambda g, y, x: strong_multiply(g, y * (1 - y)),), kind=FLOAT, like=np.tanh
)


def _tanh_softplus(x: Any) -> Any:
    """tanh(log(1 + e)) = n / (n + 2), e = exp(x), n = e (e + 2); 1 from 20 on."""
    e = np.exp(np.minimum(x, 20))
    n = e * (e + 2)
    return n / (n + 2)


tanh_softplus = elementwise(
    "tanh_softplus",
    _tanh_softplus,
    (lambda g, y, x: strong_multiply(g, (1 - y * y) * logistic(x)),),
    kind=FLOAT,
    like=np.tanh,
)


def _erf(x: Any) -> Any:
    """Error function: |x| < 2 by its series, beyond by the continued fraction of erfc (Abramowitz & Stegun 7.1.6, 7.1.14).

    Relative error below 1e-15 in float64; float32 is computed in float64.
    """
    x = np.asarray(x)
    a = np.abs(x.astype(np.float64))
    square = a * a
    term = total = a
    for n in range(1, 56):  # all terms positive: no cancellation
        term = term * square * (2.0 / (2 * n + 1))
        total = total + term
    near = 2 / math.sqrt(math.pi) * np.exp(-square) * total
    fraction = a
    for n in range(80, 0, -1):
        fraction = a + (n / 2) / np.where(fraction == 0, 1, fraction)
    far = 1 - np.exp(-square) / (math.sqrt(math.pi) * np.where(fraction == 0, 1, fraction))
    result = np.where(a < 2, near, np.where(a > 6, 1.0, far))
    return np.copysign(np.where(np.isnan(a), a, result), x).astype(x.dtype)


erf = elementwise(
    "erf",
    _erf,
    (lambda g, y, x: strong_multiply(g, 2 / math.sqrt(math.pi) * np.exp(-(x * x))),),
    kind=FLOAT,
    like=np.tanh,
)


def _normal_cdf(x: Any) -> Any:
    """Distribution function Φ of the normal distribution: by erf for |x| < 0.67; its tail by the trapezoidal rule with the correction
    for the pole (Chiarella & Reichel, "On the evaluation of integrals related to the error function", 1968).

    Relative error below 3e-15 in float64, in the tail as well; float32 is computed in float64.
    """
    x = np.asarray(x)
    a = np.minimum(np.abs(x.astype(np.float64)), 40.0)
    square = np.maximum(a, 0.5) ** 2 / 2  # of the argument of erfc; only what is beyond 0.67 counts
    step = 0.5
    total = 1 / square
    for n in range(1, 15):
        total = total + 2 * math.exp(-((n * step) ** 2)) / ((n * step) ** 2 + square)
    short = np.round(a * 2**20) / 2**20  # its square is exact, so exp(-a²/2) keeps its digits
    factor = np.exp(-short * short / 2) * np.exp(-(a - short) * (a + short) / 2)
    root = np.sqrt(square)
    pole = np.where(root < math.pi / step, 2 / np.expm1(np.minimum(2 * math.pi / step * root, 700.0)), 0.0)
    tail = 0.5 * (factor * root * (step / math.pi) * total - pole)
    result = np.where(a < 0.67, 0.5 + 0.5 * _erf(np.where(a < 1, x, 0) / math.sqrt(2)), np.where(x < 0, tail, 1 - tail))
    return np.where(np.isnan(x), x, result).astype(x.dtype)


normal_cdf = elementwise(
    "normal_cdf",
    _normal_cdf,
    (lambda g, y, x: strong_multiply(g, 1 / math.sqrt(2 * math.pi) * np.exp(-0.5 * (x * x))),),
    kind=FLOAT,
    like=np.tanh,
)

# ---- tests and choices -------------------------------------------------------------------------------------------------------

less = elementwise("less", np.less, (None, None), kind=TEST, smooth=False)
less_equal = elementwise("less_equal", np.less_equal, (None, None), kind=TEST, smooth=False)
equal = elementwise("equal", np.equal, (None, None), kind=TEST, smooth=False)


def _booleans(name: str, value: Any, arity: int) -> Callable[..., Any]:
    def examples(r: np.random.Generator) -> Iterable[Any]:
        yield [r.integers(0, 2, (3, 4)).astype(bool) for _ in range(arity)], {}

    OPS.add(name, Op(name, _infer(TEST, name), value, (None,) * arity, rows_elementwise, examples, True, smooth=False))

    @answers(value)
    def function(*args: Any, **options: Any) -> Any:
        _no_options(name, args, options, arity)
        return apply(name, *spread([convert(a, bool) for a in args], f"np.{name}"))

    return function


logical_and = _booleans("logical_and", np.logical_and, 2)
logical_or = _booleans("logical_or", np.logical_or, 2)
logical_not = _booleans("logical_not", np.logical_not, 1)


def _bit_operator(ufunc: Any, on_booleans: Callable[..., Any]) -> None:
    @answers(ufunc)
    def function(*args: Any) -> Any:
        if any(type_of(a).dtype != bool for a in args):
            raise DtypeError(
                located(f"np.{ufunc.__name__} is recorded for booleans only, not {', '.join(str(type_of(a)) for a in args)}")
            )
        return on_booleans(*args)


_bit_operator(np.bitwise_and, logical_and)
_bit_operator(np.bitwise_or, logical_or)
_bit_operator(np.invert, logical_not)
_bit_operator(np.bitwise_xor, np.not_equal)


def _infer_where(condition: Type, a: Type, b: Type) -> Type:
    if not (condition.shape == a.shape == b.shape) or a.dtype != b.dtype or condition.dtype != bool:
        raise ShapeError(f"where takes a condition and two arrays of one shape and type, not {condition}, {a}, {b}")
    return Type(a.shape, a.dtype, a.weak and b.weak)


def _examples_where(r: np.random.Generator) -> Iterable[Any]:
    yield [r.integers(0, 2, (3, 4)).astype(bool), r.normal(size=(3, 4)), r.normal(size=(3, 4))], {}


OPS.add(
    "where",
    Op(
        "where",
        _infer_where,
        np.where,
        (None, lambda g, y, c, a, b: np.where(c, g, 0.0), lambda g, y, c, a, b: np.where(c, 0.0, g)),
        rows_elementwise,
        _examples_where,
        elementwise=True,
    ),
)


@answers(np.where)
def where(condition: Any, *choices: Any) -> Any:
    if len(choices) != 2:
        raise TraceError(located("np.where(condition) alone gives a result whose size depends on the data; give both choices"))
    a, b = common(np.maximum, choices)  # any ufunc that keeps the promoted type
    if type_of(condition).dtype != bool:
        condition = np.not_equal(condition, 0)
    return apply("where", *spread([condition, a, b], "np.where"))


# ---- types -------------------------------------------------------------------------------------------------------------------


def _infer_cast(x: Type, *, dtype: Any, weak: bool = False) -> Type:
    return Type(x.shape, np.dtype(dtype), weak)


def _value_cast(x: Array, *, dtype: Any, weak: bool = False) -> Array:
    return x.astype(dtype)


def _examples_cast(r: np.random.Generator) -> Iterable[Any]:
    yield [r.normal(size=(3, 2))], {"dtype": np.dtype("f8")}


def _rule_cast(g: Any, y: Any, x: Any, *, dtype: Any, weak: bool = False) -> Any:
    return convert(g, x.dtype)


OPS.add("cast", Op("cast", _infer_cast, _value_cast, (_rule_cast,), rows_elementwise, _examples_cast, elementwise=True))


@answers(np.astype, method="astype")
def astype(x: Any, dtype: Any, copy: bool = True) -> Any:
    return convert(x, dtype)


def _examples_shift(r: np.random.Generator) -> Iterable[Any]:
    yield [r.integers(0, 2**32, (5,), dtype=np.uint32), np.full((5,), 8, np.uint32)], {}


right_shift = elementwise("right_shift", np.right_shift, (None, None), smooth=False, examples=_examples_shift)
