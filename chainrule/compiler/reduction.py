"""What several elementary functions share: reductions to a small argument, scaling, the ends of the range."""

from __future__ import annotations

import math

from .builder import Builder
from .coefficients import FLOAT32, FLOAT64

Table = dict[str, tuple[float, ...]]


def table(b: Builder) -> Table:
    """The coefficients for the builder's float type."""
    return FLOAT32 if b.bits == 32 else FLOAT64


def clamp(b: Builder, x: str, low: float, high: float) -> str:
    """x within [low, high]; NaN stays (comparison and choice, not minnum)."""
    lowest, highest = b.const(low), b.const(high)
    x = b.select(b.fcmp("olt", x, lowest), lowest, x)
    return b.select(b.fcmp("ogt", x, highest), highest, x)


def reduce_exp(b: Builder, x: str) -> tuple[str, str, str, str]:
    """x = n log 2 + r, |r| <= log(2)/2: bits whose low end is n + 2 bias; n; x - n hi (exact); its correction factor -lo.

    n is rounded by adding 1.5 2^mantissa, so its integer lies ready in the low bits; 2 bias makes it positive.
    """
    high, low = table(b)["log2"]
    magic = b.const(1.5 * 2**b.mantissa + 2 * b.bias)
    shifted = b.fma(x, b.const(1 / math.log(2)), magic)
    n = b.fsub(shifted, magic)
    return b.to_bits(shifted), n, b.fma(n, b.const(-high), x), b.const(-low)


def power_of_two(b: Builder, n: str, offset: int) -> str:
    """2^(n - offset), n from reduce_exp; the result must be normal, or 2^-bias, which becomes 0."""
    return b.to_float(b.integer("shl", b.integer("sub", n, b.bias + offset), b.mantissa))


def scale(b: Builder, y: str, bits: str) -> str:
    """y 2^n, n from reduce_exp, by two factors: one rounding makes a denormal, and overflow makes inf."""
    half = b.integer("lshr", bits, 1)
    first, second = (b.to_float(b.integer("shl", part, b.mantissa)) for part in (half, b.integer("sub", bits, half)))
    return b.fmul(b.fmul(y, first), second)


def split_exponent(b: Builder, x: str, scaled: str | None = None) -> tuple[str, str]:
    """x = 2^e m, m in [sqrt 1/2, sqrt 2): e as a float, and m. x is positive and normal; mask `scaled`: as scaled by split_normal.

    Only shifts and masks of integers: 64-bit arithmetic shifts and conversions are missing below AVX-512.
    """
    root = b.bits_of(math.sqrt(0.5))
    shifted = b.integer("add", b.to_bits(x), b.bits_of(1.0) - root)
    e = b.integer("or", b.integer("lshr", shifted, b.mantissa), b.bits_of(2.0**b.mantissa))
    m = b.integer("add", b.integer("and", shifted, (1 << b.mantissa) - 1), root)
    bias = b.const(2.0**b.mantissa + b.bias)
    if scaled is not None:
        bias = b.select(scaled, b.const(2.0**b.mantissa + b.bias + b.mantissa + 2), bias)
    return b.fsub(b.to_float(e), bias), b.to_float(m)


def split_normal(b: Builder, x: str) -> tuple[str, str]:
    """split_exponent for positive x that may be denormal: scaled up first."""
    small = b.fcmp("olt", x, b.const(2.0 ** (1 - b.bias)))
    return split_exponent(b, b.select(small, b.fmul(x, b.const(2.0 ** (b.mantissa + 2))), x), small)


def log_ends(b: Builder, x: str, at: float, y: str) -> str:
    """y, but -inf where x == at, NaN below, and x itself where it is inf or NaN."""
    y = b.select(b.fcmp("olt", x, b.const(math.inf)), y, x)
    y = b.select(b.fcmp("oeq", x, b.const(at)), b.const(-math.inf), y)
    return b.select(b.fcmp("olt", x, b.const(at)), b.const(math.nan), y)


def fast_two_sum(b: Builder, x: str, y: str) -> tuple[str, str]:
    """x + y as its rounding and the rest, exactly, for |x| >= |y| or x = 0 (Dekker 1971)."""
    total = b.fadd(x, y)
    return total, b.fsub(y, b.fsub(total, x))


def two_sum(b: Builder, x: str, y: str) -> tuple[str, str]:
    """x + y as its rounding and the rest, exactly, whichever is larger (Knuth)."""
    total = b.fadd(x, y)
    part = b.fsub(total, x)
    return total, b.fadd(b.fsub(x, b.fsub(total, part)), b.fsub(y, part))


def two_product(b: Builder, x: str, y: str) -> tuple[str, str]:
    """x y as its rounding and the rest, exactly: by FMA, or by Veltkamp's and Dekker's halves (1971)."""
    product = b.fmul(x, y)
    if b.has_fma:
        return product, b.fma(x, y, b.fneg(product))
    (xh, xl), (yh, yl) = _halves(b, x), _halves(b, y)
    rest = b.fadd(b.fsub(b.fmul(xh, yh), product), b.fmul(xh, yl))
    return product, b.fadd(b.fadd(rest, b.fmul(xl, yh)), b.fmul(xl, yl))


def _halves(b: Builder, x: str) -> tuple[str, str]:
    spread = b.fmul(x, b.const(2.0 ** ((b.mantissa + 2) // 2) + 1))
    high = b.fsub(spread, b.fsub(spread, x))
    return high, b.fsub(x, high)


def residual(b: Builder, n: str, q: str, d: str) -> str:
    """n - q d, exactly, where q d is near n."""
    if b.has_fma:
        return b.fma(b.fneg(q), d, n)
    product, rest = two_product(b, q, d)
    return b.fsub(b.fsub(n, product), rest)


def quotient(b: Builder, n: str, n_low: str, d: str, d_low: str) -> str:
    """(n + n_low) / (d + d_low), hardly farther off than its last rounding; the low parts are what rounding took from the others."""
    inverse = b.fdiv(b.const(1.0), d)
    q = b.fmul(n, inverse)
    rest = b.fadd(residual(b, n, q, d), b.fsub(n_low, b.fmul(q, d_low)))
    return b.fma(rest, inverse, q)
