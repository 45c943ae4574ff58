"""exp, expm1 and tanh on vector registers. In and out as in elementary.py."""

from __future__ import annotations

from .builder import Builder
from .reduction import clamp, fast_two_sum, power_of_two, reduce_exp, scale, table

TANH32_END = 9.0  # the formula gives exactly 1 here, with FMA and without; tanh 9 is half an ulp below


def exp(b: Builder, x: str) -> str:
    """e^x = 2^n (1 + r + r^2 P(r)); in float64 only the last sum is rounded."""
    x = clamp(b, x, *table(b)["exp_range"])
    if b.bits == 64:
        bits, y, _ = exp_parts(b, x)
        return scale(b, y, bits)
    bits, y = exp_near_one(b, x)
    return scale(b, y, bits)


def exp_near_one(b: Builder, x: str) -> tuple[str, str]:
    """e^x = 2^n y: bits of n for `scale`, y."""
    bits, n, rest, low = reduce_exp(b, x)
    r = b.fma(n, low, rest)
    return bits, b.fadd(b.fma(b.fmul(r, r), b.polynomial(r, table(b)["exp"]), r), b.const(1.0))


def exp_parts(b: Builder, x: str) -> tuple[str, str, str]:
    """e^x = 2^n (y + low), low what rounding took from y, and bits of n for `scale`."""
    bits, n, rest, low = reduce_exp(b, x)
    low = b.fmul(n, low)
    r = b.fadd(rest, low)
    tail = b.fma(b.fmul(r, r), b.polynomial(r, table(b)["exp"]), low)
    head, lost = fast_two_sum(b, b.const(1.0), rest)
    return bits, *fast_two_sum(b, head, b.fadd(lost, tail))


def exp_normal(b: Builder, x: str) -> str:
    """e^x where it is a normal number; the caller limits x."""
    bits, y = exp_near_one(b, x)
    return b.fmul(y, power_of_two(b, bits, 0))


def expm1(b: Builder, x: str) -> str:
    """e^x - 1 = 2 ((s rest + s - 1/2) + s tail), s = 2^(n-1), with x - n log 2 kept as two numbers.

    The sum in the inner bracket loses nothing where it cancels, and in float64 what it loses elsewhere is added to the tail; the halved
    scale lets n reach the overflow.
    """
    limited = clamp(b, x, *table(b)["expm1_range"])
    bits, n, rest, low = reduce_exp(b, limited)
    r = b.fma(n, low, rest)
    tail = b.fma(b.fmul(r, r), b.polynomial(r, table(b)["exp"]), b.fmul(n, low))
    s = power_of_two(b, bits, 1)
    start = b.fsub(s, b.const(0.5))
    if b.bits == 32:
        y = b.fma(s, tail, b.fma(s, rest, start))
    else:
        total, lost = fast_two_sum(b, start, b.fmul(s, rest))
        y = b.fadd(total, b.fma(s, tail, lost))
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
