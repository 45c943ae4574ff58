"""Functions from 0 to 1 that arguments are multiplied by: x logistic(x) is silu, x tanh(log(1 + e^x)) mish, x Phi(x) gelu.

In and out as in elementary.py, but each gives the gate times 2^GROWTH: far below 0 a gate is denormal where x times it is not, so the
product is taken first and scaled last. float64 keeps numbers in two parts each, so that the product too is within 2 ulp.
"""

from __future__ import annotations

from collections.abc import Callable

from .builder import Builder
from .exponential import exp_near_one, exp_parts
from .reduction import clamp, fast_two_sum, power_of_two, quotient, reduce_exp, residual, table, two_product, two_sum

GROWTH = {32: 32, 64: 100}  # halves of float64's products (reduction.py) still do not overflow
CDF_MIDDLE = 0.8

Gate = tuple[str, str | None]  # times 2^GROWTH; of two numbers, their sum counts


def logistic(b: Builder, x: str) -> Gate:
    """e / (1 + e), e = exp x; 1 from the end of `gate_range` on."""
    x = clamp(b, x, *table(b)["gate_range"])
    one = b.const(1.0)
    if b.bits == 32:
        grown = _grown_exp(b, x)
        return b.fdiv(grown, b.fma(grown, _shrink(b), one)), None
    e, low, grown, power = _exp_parts(b, x)
    d, lost = two_sum(b, b.fmul(power, e), one)
    return b.fmul(quotient(b, e, low, d, b.fma(power, low, lost)), grown), None


def tanh_softplus(b: Builder, x: str) -> Gate:
    """n / (n + 2), n = e (e + 2), e = exp x; 1 from the end of `gate_range` on."""
    x = clamp(b, x, *table(b)["gate_range"])
    two = b.const(2.0)
    if b.bits == 32:
        grown = _grown_exp(b, x)
        n = b.fma(grown, b.fmul(grown, _shrink(b)), b.fadd(grown, grown))
        return b.fdiv(n, b.fma(n, _shrink(b), two)), None
    e, low, grown, power = _exp_parts(b, x)
    a, a_low = two_sum(b, b.fmul(power, e), two)
    a_low = b.fma(power, low, a_low)
    n, n_low = two_product(b, e, a)
    n_low = b.fma(e, a_low, b.fma(low, a, n_low))
    d, d_low = two_sum(b, b.fmul(power, n), two)
    return b.fmul(quotient(b, n, n_low, d, b.fma(power, n_low, d_low)), grown), None


def normal_cdf(b: Builder, x: str) -> Gate:
    """(1 + x)/2 + x P(x^2) for small |x| = a; below, exp(-a^2/2) S u/4, S = 1/4 + u + P(3/4 - 2u), u = 4 / (a + 4); above, 1 less that."""
    near = b.fcmp("olt", b.fabs(x), b.const(CDF_MIDDLE))
    negative = b.fcmp("olt", x, b.const(0.0))
    growth = 2.0 ** GROWTH[b.bits]
    half, one = b.const(growth / 2), b.const(growth)
    head = b.fma(x, half, half)
    p = b.polynomial(b.fmul(x, x), [c * growth for c in table(b)["cdf"]])
    tail, rest = _cdf_tail(b, x)
    below = b.fadd(tail, rest)
    if b.bits == 32:
        far = b.select(negative, below, b.fsub(one, below))
        return b.select(near, b.fma(x, p, head), far), None
    lost = b.fma(x, half, b.fsub(half, head))
    first = b.select(near, head, b.select(negative, tail, one))
    second = b.select(near, b.fma(x, p, lost), b.select(negative, rest, b.fneg(below)))
    return first, second


def _cdf_tail(b: Builder, x: str) -> tuple[str, str]:
    """normal_cdf of -|x|, grown, as the sum of two numbers; right from CDF_MIDDLE on, 0 at the end.

    The square is taken exactly, as the sum of two numbers: its rounding would be up to 700 times as large in the result. What u has
    lost is made good by what the result changes with u, which need not be exact.
    """
    t = table(b)
    a, four, end = b.fabs(x), b.const(4.0), b.const(t["cdf_end"][0])
    a = b.select(b.fcmp("ogt", a, end), end, a)
    square, rest = two_product(b, b.fmul(a, b.const(-0.5)), a)
    d = b.fadd(a, four)
    u = b.fdiv(four, d)
    more = b.fsub(b.fsub(d, four), a)  # what rounding gave d
    off = b.fma(more, u, residual(b, four, u, d))  # of u, relative, times 4
    s = b.fma(u, b.const(-2.0), b.const(0.75))
    bits, n, r, low = reduce_exp(b, square)
    low = b.fma(n, low, rest)
    whole = b.fadd(r, low)
    more = b.fma(b.fmul(whole, whole), b.polynomial(whole, t["exp"]), low)
    grown = b.fmul(u, power_of_two(b, bits, 2 - GROWTH[b.bits]))
    head, rounded = fast_two_sum(b, b.const(0.25), u)
    total, lost = fast_two_sum(b, head, b.polynomial(s, t["cdf_tail"]))
    tail, rest = two_product(b, total, grown)
    if b.bits == 64:
        rest = b.fma(b.fadd(rounded, lost), grown, rest)
    rest = b.fma(tail, b.fmul(off, b.polynomial(s, t["cdf_slope"])), rest)
    return tail, b.fma(tail, r, b.fma(tail, more, b.fma(rest, r, rest)))


def _shrink(b: Builder) -> str:
    return b.const(2.0 ** -GROWTH[b.bits])


def _grown_exp(b: Builder, x: str) -> str:
    """e^x times 2^GROWTH."""
    bits, y = exp_near_one(b, x)
    return b.fmul(y, power_of_two(b, bits, -GROWTH[b.bits]))


def _exp_parts(b: Builder, x: str) -> tuple[str, str, str, str]:
    """e^x = 2^n (y + low): y, low, 2^n times 2^GROWTH, 2^n."""
    bits, y, low = exp_parts(b, x)
    grown = power_of_two(b, bits, -GROWTH[b.bits])
    return y, low, grown, b.fmul(grown, _shrink(b))


GATES: dict[str, Callable[[Builder, str], Gate]] = {
    "logistic": logistic,
    "tanh_softplus": tanh_softplus,
    "normal_cdf": normal_cdf,
}


def gate_of(function: Callable[[Builder, str], Gate]) -> Callable[[Builder, str], str]:
    """The function that gives the gate itself."""
    return lambda b, x: shrunk(b, function(b, x))


def shrunk(b: Builder, grown: Gate) -> str:
    """The gate itself."""
    first, second = grown
    return b.fmul(first if second is None else b.fadd(first, second), _shrink(b))


def times_gate(b: Builder, x: str, grown: Gate) -> str:
    """x times the gate of x: x itself from where gates are 1."""
    first, second = grown
    if second is None:
        product = b.fmul(x, first)
    elif b.has_fma:
        product = b.fma(x, first, b.fmul(x, second))
    else:
        product, rest = two_product(b, clamp(b, x, *table(b)["gate_range"]), first)  # halves of huge numbers overflow
        product = b.copysign(b.fadd(product, b.fma(x, second, rest)), x)  # the rest of -0 is +0
    large = b.fcmp("ogt", x, b.const(table(b)["gate_range"][1]))
    return b.select(large, x, b.fmul(product, _shrink(b)))
