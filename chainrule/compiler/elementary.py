"""Elementary functions on vector registers, as LLVM IR text.

In: a Builder and operands of its float type. Out: a register with the function of each lane. At most 4 ulp in float32 and 2 ulp in
float64 over the whole range, NaN, infinities, signed zeros and denormals as NumPy has them (measured: test_elementary.py). A lane's bits
depend on nothing but the lane's argument and on whether the target has FMA: not on the width, not on the neighbours. With denormals
flushed (FTZ, DAZ) a denormal argument counts as 0 and a denormal result is 0.

Sources: W. Cody and W. Waite, Software Manual for the Elementary Functions, 1980 (reductions by split constants); P. Tang, ACM TOMS 16
(1990) and 18 (1992) (log, expm1); J.-M. Muller, Elementary Functions, 3rd ed., 2016; coefficients: derive_polynomials.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from inspect import signature

from .builder import Builder
from .exponential import exp, exp_normal, expm1, tanh
from .gates import GATES, gate_of
from .power import power
from .reduction import (
    fast_two_sum,
    log_ends,
    residual,
    split_exponent,
    split_normal,
    table,
    two_product,
    two_sum,
)
from .trigonometric import cos, sin, tan

# ---- logarithms --------------------------------------------------------------------------------------------------------------


def log_sum(b: Builder, e: str, f: str, low: str | None = None) -> str:
    """e log 2 + log(1 + f) + low. float32: a polynomial in f. float64: in s = f / (2 + f) (Tang 1990, as fdlibm arranges it)."""
    t = table(b)
    half_square = b.fmul(b.fmul(f, b.const(0.5)), f)
    if b.bits == 32:
        tail = b.fmul(b.fmul(b.fmul(f, f), f), b.polynomial(f, t["log"]))
    else:
        s = b.fdiv(f, b.fadd(f, b.const(2.0)))
        z = b.fmul(s, s)
        tail = b.fmul(s, b.fma(z, b.polynomial(z, t["log"]), half_square))
    tail = b.fma(e, b.const(t["log2"][1]), tail)
    if low is not None:
        tail = b.fadd(tail, low)
    return b.fma(e, b.const(t["log2"][0]), b.fsub(f, b.fsub(half_square, tail)))


def log(b: Builder, x: str) -> str:
    """log x = e log 2 + log m; denormals are scaled up first."""
    e, m = split_normal(b, x)
    return log_ends(b, x, 0.0, log_sum(b, e, b.fsub(m, b.const(1.0))))


def log1p(b: Builder, x: str) -> str:
    """log(1 + x) = log u + c / u, u = 1 + x rounded and c what rounding took (Knuth's two-sum); f = x itself where e = 0."""
    one = b.const(1.0)
    u, c = two_sum(b, one, x)
    e, m = split_exponent(b, u)
    near = b.fcmp("oeq", e, b.const(0.0))
    f = b.select(near, x, b.fsub(m, one))
    low = b.select(near, b.const(0.0), b.fdiv(c, u))
    return b.copysign(log_ends(b, x, -1.0, log_sum(b, e, f, low)), x)


def arccosh(b: Builder, x: str) -> str:
    """log u, u = x + sqrt(x^2 - 1) as the sum of two numbers: near 1 a result is about as small as what u has lost. Far up, log 2x."""
    one, zero = b.const(1.0), b.const(0.0)
    far = b.fcmp("ogt", x, b.const(2.0 ** (b.mantissa // 2 + 2)))
    square, rest = two_product(b, x, x)
    w, lost = b.fsub(square, one), rest  # the square is below 2 where the difference matters to the last bit: it is exact there
    root = sqrt(b, w)
    missing = b.fadd(residual(b, w, root, root), lost)
    u, lost = fast_two_sum(b, x, root)
    twice = b.fadd(root, root)
    # (lost + missing / 2 root) / u by one division; at 1, where root is 0, all of it is 0
    low = b.fdiv(b.fma(lost, twice, missing), b.fmul(b.fadd(twice, b.const(2.0 ** (2 - b.bias))), u))
    e, m = split_exponent(b, b.select(far, x, u))
    e = b.fadd(e, b.select(far, one, zero))
    y = log_sum(b, e, b.fsub(m, one), b.select(far, zero, low))
    y = b.select(b.fcmp("olt", x, b.const(math.inf)), y, x)
    return b.select(b.fcmp("olt", x, one), b.const(math.nan), y)


# ---- the others --------------------------------------------------------------------------------------------------------------


def erf(b: Builder, x: str) -> str:
    """x + x P(x^2) for small |x|; beyond, 1 - exp(-x^2) R(|x| - 2), whose second term only needs an absolute error."""
    t = table(b)
    a = b.fabs(x)
    near = b.fma(a, b.polynomial(b.fmul(a, a), t["erf"]), a)
    end = b.const(t["erf_end"][0])
    a = b.select(b.fcmp("ogt", a, end), end, a)
    e = exp_normal(b, b.fneg(b.fmul(a, a)))
    far = b.fsub(b.const(1.0), b.fmul(e, b.polynomial(b.fsub(a, b.const(2.0)), t["erfc"])))
    return b.copysign(b.select(b.fcmp("olt", a, b.const(t["erf_middle"][0])), near, far), x)


def arctan(b: Builder, x: str) -> str:
    """k pi/4 + arctan t, |t| <= tan(pi/8): t = |x|, (|x| - 1)/(|x| + 1) or -1/|x| for k = 0, 1, 2; one division serves all."""
    t = table(b)
    one = b.const(1.0)
    a = b.fabs(x)
    middle = b.fcmp("ogt", a, b.const(math.tan(math.pi / 8)))
    large = b.fcmp("ogt", a, b.const(math.tan(3 * math.pi / 8)))
    above = b.select(large, b.const(-1.0), b.select(middle, b.fsub(a, one), a))
    below = b.select(large, a, b.select(middle, b.fadd(a, one), one))
    k = b.select(large, b.const(2.0), b.select(middle, one, b.const(0.0)))
    q = b.fdiv(above, below)
    z = b.fmul(q, q)
    high, low = t["quarter_pi"]
    tail = b.fma(b.fmul(q, z), b.polynomial(z, t["arctan"]), b.fmul(k, b.const(low)))
    total, lost = fast_two_sum(b, b.fmul(k, b.const(high)), q)  # its rounding counts double where the result is below 1/2
    return b.copysign(b.fadd(total, b.fadd(lost, tail)), x)


def arcsin(b: Builder, x: str) -> str:
    """|x| + tail below 1/2, beyond pi/2 - 2 (root + tail)."""
    near, size, tail = _arcsin_parts(b, b.fabs(x))
    high, low = table(b)["half_pi_sum"]
    zero = b.const(0.0)
    factor = b.select(near, b.const(1.0), b.const(-2.0))
    y = _add_up(b, (b.select(near, zero, b.const(high)), b.select(near, zero, b.const(low))), factor, size, tail)
    return b.copysign(y, x)


def arccos(b: Builder, x: str) -> str:
    """pi/2 - (x + tail) for |x| <= 1/2; above, 2 (root + tail), and below pi less that."""
    near, size, tail = _arcsin_parts(b, b.fabs(x))
    high, low = table(b)["half_pi_sum"]
    above = b.fcmp("ogt", x, b.const(0.0))
    ends = [b.select(near, b.const(part), b.select(above, b.const(0.0), b.const(2 * part))) for part in (high, low)]
    factor = b.copysign(b.select(near, b.const(1.0), b.const(2.0)), b.select(near, b.fneg(x), x))
    return _add_up(b, (ends[0], ends[1]), factor, size, tail)


def _arcsin_parts(b: Builder, a: str) -> tuple[str, str, str]:
    """a <= 1/2 or not; r; arcsin r - r, r = a or root((1 - a)/2), in float64 with what the root has lost."""
    near = b.fcmp("ole", a, b.const(0.5))
    z = b.select(near, b.fmul(a, a), b.fmul(b.fsub(b.const(1.0), a), b.const(0.5)))
    root = sqrt(b, z)
    r = b.select(near, a, root)
    tail = b.fmul(b.fmul(r, z), b.polynomial(z, table(b)["arcsin"]))
    if b.bits == 64:
        lost = b.fdiv(residual(b, z, root, root), b.fadd(b.fadd(root, root), b.const(2.0 ** (2 - b.bias))))
        tail = b.fadd(tail, b.select(near, b.const(0.0), lost))
    return near, r, tail


def _add_up(b: Builder, start: tuple[str, str], factor: str, x: str, tail: str) -> str:
    """start + factor (x + tail); start is 0 or larger than the rest, the factor a power of two."""
    total, lost = fast_two_sum(b, start[0], b.fmul(factor, x))
    return b.fadd(total, b.fadd(lost, b.fma(factor, tail, start[1])))


def sqrt(b: Builder, x: str) -> str:
    """The processor's, correctly rounded."""
    return b.intrinsic("sqrt", x)


def floor(b: Builder, x: str) -> str:
    """The largest integer <= x; -0 stays -0."""
    return b.floor(x)


def absolute(b: Builder, x: str) -> str:
    """|x|: the sign bit cleared."""
    return b.fabs(x)


def maximum(b: Builder, x: str, y: str) -> str:
    """The larger; NaN if either is NaN."""
    return b.select(b.fcmp("uno", y, y), y, b.select(b.fcmp("uge", x, y), x, y))


def minimum(b: Builder, x: str, y: str) -> str:
    """The smaller; NaN if either is NaN."""
    return b.select(b.fcmp("uno", y, y), y, b.select(b.fcmp("ule", x, y), x, y))


FUNCTIONS: dict[str, Callable[..., str]] = {
    "exp": exp,
    "expm1": expm1,
    "log": log,
    "log1p": log1p,
    "arccosh": arccosh,
    "sin": sin,
    "cos": cos,
    "tan": tan,
    "tanh": tanh,
    **{name: gate_of(grown) for name, grown in GATES.items()},
    "erf": erf,
    "arctan": arctan,
    "arcsin": arcsin,
    "arccos": arccos,
    "power": power,
    "sqrt": sqrt,
    "floor": floor,
    "abs": absolute,
    "maximum": maximum,
    "minimum": minimum,
}


@cache
def operations(name: str, bits: int) -> int:
    """The floating-point operations of function `name` on one number, a multiply-add being two.

    >>> operations("sqrt", 32), operations("exp", 32) < operations("exp", 64)
    (1, True)
    """
    b = Builder(bits, 1)
    function = FUNCTIONS[name]
    function(b, *("%x", "%y")[: len(signature(function).parameters) - 1])
    counts = {"fadd": 1, "fsub": 1, "fmul": 1, "fdiv": 1, "@llvm.sqrt": 1, "@llvm.fma": 2}
    return max(1, sum(n for line in b.lines for word, n in counts.items() if f" {word}" in line))


def emit(b: Builder, name: str, *registers: str) -> str:
    """Appends the lines of function `name` (a key of FUNCTIONS) to `b` and returns the result's register."""
    return FUNCTIONS[name](b, *registers)
