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

from .builder import Builder
from .power import power
from .reduction import (
    clamp,
    fast_two_sum,
    log_ends,
    power_of_two,
    reduce_exp,
    scale,
    split_exponent,
    split_normal,
    table,
    two_product,
)
from .trigonometric import cos, sin

CDF_MIDDLE = 0.8
TANH32_END = 9.0  # the formula gives exactly 1 here, with FMA and without; tanh 9 is half an ulp below


# ---- exponentials ------------------------------------------------------------------------------------------------------------


def exp(b: Builder, x: str) -> str:
    """e^x = 2^n (1 + r + r^2 P(r))."""
    x = clamp(b, x, *table(b)["exp_range"])
    bits, n, rest, low = reduce_exp(b, x)
    r = b.fma(n, low, rest)
    y = b.fadd(b.fma(b.fmul(r, r), b.polynomial(r, table(b)["exp"]), r), b.const(1.0))
    return scale(b, y, bits)


def exp_normal(b: Builder, x: str) -> str:
    """e^x where it is a normal number; the caller limits x."""
    bits, n, rest, low = reduce_exp(b, x)
    r = b.fma(n, low, rest)
    y = b.fadd(b.fma(b.fmul(r, r), b.polynomial(r, table(b)["exp"]), r), b.const(1.0))
    return b.fmul(y, power_of_two(b, bits, 0))


def expm1(b: Builder, x: str) -> str:
    """e^x - 1 = 2 ((s rest + s - 1/2) + s tail), s = 2^(n-1), with x - n log 2 kept as two numbers.

    The sum in the inner bracket loses nothing where it cancels; the halved scale lets n reach the overflow.
    """
    limited = clamp(b, x, *table(b)["expm1_range"])
    bits, n, rest, low = reduce_exp(b, limited)
    r = b.fma(n, low, rest)
    tail = b.fma(n, low, b.fmul(b.fmul(r, r), b.polynomial(r, table(b)["exp"])))
    s = power_of_two(b, bits, 1)
    y = b.fma(s, tail, b.fma(s, rest, b.fsub(s, b.const(0.5))))
    y = b.fadd(y, y)
    tiny = b.fcmp("olt", b.fabs(x), b.const(2.0 ** -(b.mantissa + 3)))  # halving a denormal would lose a bit, and -0 its sign
    return b.select(tiny, x, y)


def tanh(b: Builder, x: str) -> str:
    """float32: 2n d / (d^2 + n^2) with n/d = tanh(x/2); float64: x + x^3 P(x^2) below 0.55, beyond 1 - 2 / (e^2x + 1).

    The duplication formula needs no exponential: n = x P(x^2) and d = Q(x^2) are of degree 2 and 3, and where tanh x nears 1 their
    errors do not matter (their share is sech x). As 2n (d / (...)) no rounding is larger than the result's own where n is just above
    a power of two and the result just below.
    """
    t = table(b)
    if b.bits == 32:
        x = clamp(b, x, -TANH32_END, TANH32_END)
        z = b.fmul(x, x)
        n = b.fma(b.fmul(x, z), b.polynomial(z, t["tanh_p"][1:]), x)  # P starts with 1; a sum would lose the sign of -0
        d = b.polynomial(z, t["tanh_q"])
        if b.has_fma:
            return b.fmul(b.fadd(n, n), b.fdiv(d, b.fma(d, d, b.fmul(n, n))))
        # Without, every product is rounded: as 2n / (d + n (n/d)) fewer of them count. Rounding can still end above 1.
        return clamp(b, b.fdiv(b.fadd(n, n), b.fadd(d, b.fmul(n, b.fdiv(n, d)))), -1.0, 1.0)
    a = b.fabs(x)
    z = b.fmul(a, a)
    near = b.fma(b.fmul(a, z), b.polynomial(z, t["tanh"]), a)
    end = b.const(20.0)
    limited = b.select(b.fcmp("ogt", a, end), end, a)
    e = exp_normal(b, b.fadd(limited, limited))
    far = b.fsub(b.const(1.0), b.fdiv(b.const(2.0), b.fadd(e, b.const(1.0))))
    return b.copysign(b.select(b.fcmp("olt", a, b.const(0.55)), near, far), x)


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
    u = b.fadd(x, one)
    part = b.fsub(u, one)
    c = b.fadd(b.fsub(one, b.fsub(u, part)), b.fsub(x, part))
    e, m = split_exponent(b, u)
    near = b.fcmp("oeq", e, b.const(0.0))
    f = b.select(near, x, b.fsub(m, one))
    low = b.select(near, b.const(0.0), b.fdiv(c, u))
    return b.copysign(log_ends(b, x, -1.0, log_sum(b, e, f, low)), x)


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


def normal_cdf(b: Builder, x: str) -> str:
    """(1/2 + 3/8 x) + x P(x^2) for small |x| = a; below, exp(-a^2/2) S(3/4 - 8u) u with u = 1 / (a + 4), and above, 1 less that.

    The square is taken exactly, as the sum of two numbers: its rounding would be up to 700 times as large in the result. What u has
    lost is made good, since S varies.
    """
    t = table(b)
    a = b.fabs(x)
    near = b.fma(x, b.polynomial(b.fmul(x, x), t["cdf"]), b.fma(x, b.const(0.375), b.const(0.5)))
    end = b.const(t["cdf_end"][0])
    limited = b.select(b.fcmp("ogt", a, end), end, a)
    square, rest = two_product(b, b.fmul(limited, b.const(-0.5)), limited)
    d = b.fadd(limited, b.const(4.0))
    u = b.fdiv(b.const(1.0), d)
    product, lost = two_product(b, u, d)
    left = b.fsub(limited, b.fsub(d, b.const(4.0)))  # what rounding took from d
    off = b.fsub(b.fsub(b.fsub(b.const(1.0), product), lost), b.fmul(left, u))  # of u, relative
    s = b.fma(b.fmul(u, b.const(-8.0)), off, b.fma(u, b.const(-8.0), b.const(0.75)))
    total, rounded = fast_two_sum(b, b.const(0.625), b.polynomial(s, t["cdf_tail"]))
    tail, lost = two_product(b, total, u)
    lost = b.fma(rounded, u, lost)
    bits, n, r, low = reduce_exp(b, square)
    r = b.fadd(b.fma(n, low, rest), r)
    more = b.fadd(b.fma(b.fmul(r, r), b.polynomial(r, t["exp"]), r), off)
    below = scale(b, b.fadd(b.fma(tail, more, lost), tail), bits)
    far = b.select(b.fcmp("olt", x, b.const(0.0)), below, b.fsub(b.const(1.0), below))
    return b.select(b.fcmp("olt", a, b.const(CDF_MIDDLE)), near, far)


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
    "sin": sin,
    "cos": cos,
    "tanh": tanh,
    "erf": erf,
    "normal_cdf": normal_cdf,
    "arctan": arctan,
    "power": power,
    "sqrt": sqrt,
    "floor": floor,
    "abs": absolute,
    "maximum": maximum,
    "minimum": minimum,
}


def emit(b: Builder, name: str, *registers: str) -> str:
    """Appends the lines of function `name` (a key of FUNCTIONS) to `b` and returns the result's register."""
    return FUNCTIONS[name](b, *registers)
