"""a^b on vector registers. In and out as in elementary.py."""

from __future__ import annotations

import math

from .builder import Builder
from .coefficients import FLOAT64
from .reduction import (
    clamp,
    fast_two_sum,
    log_ends,
    power_of_two,
    reduce_exp,
    scale,
    split_exponent,
    split_normal,
    two_product,
)


def power(b: Builder, x: str, y: str) -> str:
    """x^y = exp(y log |x|), the logarithm to 2^-66 (float64: in two numbers) or 2^-43 (float32: in float64); signs and ends as C's pow.

    x^0 = 1^y = 1 even for NaN; a negative finite x with y no integer gives NaN.
    """
    size = b.fabs(x)
    limited = clamp(
        b, y, -(2.0**64), 2.0**64
    )  # beyond, the result is 0, 1 or inf already; inf log(1) and split products would be NaN
    if b.bits == 32:
        magnitude = _narrow(b, _power32(b.wide(), _widen(b, size), _widen(b, limited)))
    else:
        magnitude = _power64(b, size, limited)
    zero, one = b.const(0.0), b.const(1.0)
    down = b.floor(y)
    whole = b.fcmp("oeq", down, y)
    half = b.fmul(y, b.const(0.5))
    odd = b.logic("and", whole, b.fcmp("one", b.floor(half), half))
    result = b.select(odd, b.copysign(magnitude, x), magnitude)
    strictly_negative = b.logic("and", b.fcmp("olt", x, zero), b.fcmp("one", x, b.const(-math.inf)))
    fractional = b.fcmp("une", down, y)
    result = b.select(b.logic("and", strictly_negative, fractional), b.const(math.nan), result)
    return b.select(b.fcmp("oeq", x, one), one, b.select(b.fcmp("oeq", y, zero), one, result))


def _widen(b: Builder, x: str) -> str:
    return b.line(f"fpext {b.type} {x} to <{b.width} x double>")


def _narrow(b: Builder, x: str) -> str:
    return b.line(f"fptrunc <{b.width} x double> {x} to {b.type}")


def _power32(b: Builder, x: str, y: str) -> str:
    """exp(y log x), x >= 0, to about 2^-30, in float64, where nothing that float32 can hold overflows; rounded to float32 by the caller."""
    e, m = split_exponent(b, x)  # a denormal float32 is a normal float64
    f = b.fsub(m, b.const(1.0))
    s = b.fdiv(f, b.fadd(m, b.const(1.0)))
    z = b.fmul(s, s)
    logarithm = b.fma(e, b.const(math.log(2)), b.fma(b.fmul(s, z), b.polynomial(z, FLOAT64["power32_log"]), b.fadd(s, s)))
    logarithm = log_ends(b, x, 0.0, logarithm)
    bits, _, rest, _ = reduce_exp(b, clamp(b, b.fmul(y, logarithm), -200.0, 200.0))
    p = b.fadd(b.fma(b.fmul(rest, rest), b.polynomial(rest, FLOAT64["power32_exp"]), rest), b.const(1.0))
    return b.fmul(p, power_of_two(b, bits, 0))


def _power64(b: Builder, x: str, y: str) -> str:
    """exp(y log x), x >= 0, |y| <= 2^64, with log x and y log x as unevaluated sums of two numbers.

    log m = 2s + s (2/3 z + z^2 Q(z)), s = (m - 1)/(m + 1), z = s^2 < 0.03: two numbers for s, z and 2/3 z suffice for 2^-66
    (double-double after Dekker, Numer. Math. 18, 1971).
    """
    one = b.const(1.0)
    e, m = split_normal(b, x)
    f = b.fsub(m, one)
    d = b.fadd(m, one)
    d_low = b.fsub(m, b.fsub(d, one))
    inverse = b.fdiv(one, d)
    s = b.fmul(f, inverse)
    back, back_low = two_product(b, s, d)
    s_low = b.fmul(b.fsub(b.fsub(b.fsub(f, back), back_low), b.fmul(s, d_low)), inverse)

    s2 = b.fadd(s, s)
    z, z_low = two_product(b, s, s)
    z_low = b.fma(s2, s_low, z_low)
    high, low = FLOAT64["power_two_thirds"]
    u, u_low = two_product(b, b.const(high), z)
    u_low = b.fma(b.const(low), z, b.fma(b.const(high), z_low, u_low))
    w, w_low = fast_two_sum(b, u, b.fmul(b.fmul(z, z), b.polynomial(z, FLOAT64["power"])))
    w_low = b.fadd(w_low, u_low)
    t, t_low = two_product(b, s, w)
    t_low = b.fma(s_low, w, b.fma(s, w_low, t_low))
    h, h_low = fast_two_sum(b, s2, t)
    h_low = b.fadd(h_low, b.fadd(b.fadd(s_low, s_low), t_low))
    high, low = FLOAT64["log2"]
    h, rest = fast_two_sum(b, b.fmul(e, b.const(high)), h)
    h_low = b.fadd(rest, b.fma(e, b.const(low), h_low))
    h = log_ends(b, x, 0.0, h)

    p, p_low = two_product(b, y, h)
    p_low = b.fma(y, h_low, p_low)
    p_low = b.select(b.fcmp("olt", b.fabs(p), b.const(1000.0)), p_low, b.const(0.0))
    bits, n, rest, low_factor = reduce_exp(b, clamp(b, p, -760.0, 715.0))
    r = b.fadd(rest, b.fma(n, low_factor, p_low))
    return scale(b, b.fadd(b.fma(b.fmul(r, r), b.polynomial(r, FLOAT64["exp"]), r), one), bits)
