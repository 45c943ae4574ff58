"""sin and cos on vector registers. In and out as in elementary.py.

|x| below some ten thousand: Cody and Waite's reduction, in lanes. Beyond: a branch, taken if any lane is that large, calls a function that
reduces those lanes one by one in integers (M. Payne and R. Hanek, SIGNUM Newsletter 18, 1983) and leaves the others' bits alone.
"""

from __future__ import annotations

import math

from .builder import Builder
from .coefficients import HALF_PI_128, TWO_OVER_PI
from .reduction import fast_two_sum, quotient, table


def sin(b: Builder, x: str) -> str:
    """sin x: sin r or cos r, with a sign, by the quadrant."""
    return _sin_or_cos(b, x, 0)


def cos(b: Builder, x: str) -> str:
    """cos x = sin(x + pi/2): one quadrant further."""
    return _sin_or_cos(b, x, 1)


def tan(b: Builder, x: str) -> str:
    """sin r / cos r or -cos r / sin r, by the quadrant; in float64 each as the sum of two numbers."""
    quadrant, r, low = _reduce(b, x)
    (s, s_low), (c, c_low) = _both(b, r, low)
    odd = b.icmp("ne", b.integer("and", quadrant, 1), 0)
    n, n_low, d, d_low = (b.select(odd, p, q) for p, q in ((c, s), (c_low, s_low), (s, c), (s_low, c_low)))
    y = b.fdiv(n, d) if b.bits == 32 else quotient(b, n, n_low, d, d_low)
    return b.select(b.fcmp("oeq", x, b.const(0.0)), x, b.select(odd, b.fneg(y), y))  # keeps -0


def _sin_or_cos(b: Builder, x: str, further: int) -> str:
    """sin r or cos r, with a sign, by the quadrant. Both polynomials are computed and one is chosen."""
    quadrant, r, low = _reduce(b, x)
    if further:
        quadrant = b.integer("add", quadrant, further)
    (sine, _), (cosine, _) = _both(b, r, low)
    odd = b.icmp("ne", b.integer("and", quadrant, 1), 0)
    y = b.to_bits(b.select(odd, cosine, sine))
    sign = b.integer("shl", b.integer("and", quadrant, 2), b.bits - 2)
    y = b.to_float(b.integer("xor", y, sign))
    return y if further else b.select(b.fcmp("oeq", x, b.const(0.0)), x, y)  # keeps -0


def _both(b: Builder, r: str, low: str) -> tuple[tuple[str, str], tuple[str, str]]:
    """sin r = r + (r z P(z) + low); cos r = (1 - z/2) + (what that rounding took + z^2 Q(z) - r low); z = r^2. Each with what its last
    sum has lost; float32: without.

    The low part of r matters in float64 only: r alone is off by up to an ulp.
    """
    t = table(b)
    z = b.fmul(r, r)
    cubic = b.fmul(r, z)
    one = b.const(1.0)
    half = b.fmul(z, b.const(0.5))
    head = b.fsub(one, half)
    if b.bits == 32:
        none = b.const(0.0)
        return (b.fma(cubic, b.polynomial(z, t["sin"]), r), none), (b.fma(b.fmul(z, z), b.polynomial(z, t["cos"]), head), none)
    lost = b.fsub(b.fsub(b.fsub(one, head), half), b.fmul(r, low))
    sine = fast_two_sum(b, r, b.fma(cubic, b.polynomial(z, t["sin"]), low))
    return sine, fast_two_sum(b, head, b.fma(b.fmul(z, z), b.polynomial(z, t["cos"]), lost))


def _reduce(b: Builder, x: str) -> tuple[str, str, str]:
    """x = q pi/2 + r + low: an integer register whose last two bits are q's, r, low (float32: none, repeats r)."""
    t = table(b)
    magic = b.const(1.5 * 2**b.mantissa)
    shifted = b.fma(x, b.const(2 / math.pi), magic)
    n = b.fsub(shifted, magic)
    if b.bits == 32:
        r = x
        for piece in t["half_pi_fma" if b.has_fma else "half_pi"]:
            r = b.fma(n, b.const(-piece), r)
        low = r
        limit = t["trigonometric_range" if b.has_fma else "trigonometric_range_unfused"][0]
    else:  # n times either of the first two parts is exact; Knuth's two-sum keeps what their difference loses
        first, second, third = t["half_pi"]
        rest = b.fma(n, b.const(-first), x)
        product = b.fmul(n, b.const(-second))
        r = b.fadd(rest, product)
        part = b.fsub(r, rest)
        error = b.fadd(b.fsub(rest, b.fsub(r, part)), b.fsub(product, part))
        low = b.fma(n, b.const(-third), error)
        limit = t["trigonometric_range"][0]
    huge = b.fcmp("ogt", b.fabs(x), b.const(limit))
    return _huge(b, huge, x, (b.to_bits(shifted), r, low))


def _huge(b: Builder, huge: str, x: str, near: tuple[str, str, str]) -> tuple[str, str, str]:
    """Phi of `near` and, where a lane is huge, of what the helper makes of it."""
    triple = f"{{ {b.itype}, {b.type}, {b.type} }}"
    helper = f"@chainrule_reduce_{b.bits}x{b.width}"
    # the mask travels as integers: without optimisation LLVM cannot pass a vector of one bit
    arguments = f"{b.itype} {{}}, {b.type} {{}}, {b.itype} {{}}, {b.type} {{}}, {b.type} {{}}"
    b.helpers["chainrule_reduce"] = _payne_hanek()
    b.helpers[helper] = _lanes_helper(b, helper, triple, arguments)
    any_lane = f"@llvm.vector.reduce.or.v{b.width}i1"
    b.declarations.add(f"declare i1 {any_lane}({b.mask})")
    some = b.line(f"call i1 {any_lane}({b.mask} {huge})")
    before, slow, after = b.block, f"{b.name()[1:]}.huge", f"{b.name()[1:]}.reduced"
    b.lines.append(f"  br i1 {some}, label %{slow}, label %{after}")
    b.label(slow)
    flags = b.line(f"sext {b.mask} {huge} to {b.itype}")
    called = b.line(f"call {triple} {helper}({arguments.format(flags, x, *near)})")
    far = [b.line(f"extractvalue {triple} {called}, {i}") for i in range(3)]
    b.lines.append(f"  br label %{after}")
    b.label(after)
    types = (b.itype, b.type, b.type)
    q, r, low = (b.line(f"phi {type} [ {a}, %{before} ], [ {c}, %{slow} ]") for type, a, c in zip(types, near, far, strict=True))
    return q, r, low


def _lanes_helper(b: Builder, name: str, triple: str, arguments: str) -> str:
    """A loop over the lanes that replaces q, r, low where the mask says so and the lane is finite."""
    f, w = b.scalar, b.width
    to_double, to_float = (
        ("fpext float {} to double", "fptrunc double {} to float") if b.bits == 32 else ("fadd double {}, -0.0",) * 2
    )
    to_int = "trunc i64 {} to i32" if b.bits == 32 else "or i64 {}, 0"
    infinity = "0x7FF0000000000000"
    return f"""define internal {triple} {name}({arguments.format("%mask", "%x", "%q0", "%r0", "%l0")}) noinline cold {{
entry:
  br label %next
next:
  %i = phi i32 [ 0, %entry ], [ %j, %done ]
  %q = phi {b.itype} [ %q0, %entry ], [ %qn, %done ]
  %r = phi {b.type} [ %r0, %entry ], [ %rn, %done ]
  %l = phi {b.type} [ %l0, %entry ], [ %ln, %done ]
  %flag = extractelement {b.itype} %mask, i32 %i
  %on = icmp ne i{b.bits} %flag, 0
  %v = extractelement {b.type} %x, i32 %i
  %finite = fcmp one {f} %v, {infinity}
  %finite2 = fcmp one {f} %v, 0xFFF0000000000000
  %both = and i1 %finite, %finite2
  %go = and i1 %on, %both
  br i1 %go, label %reduce, label %done
reduce:
  %d = {to_double.format("%v")}
  %s = call {{ i64, double, double }} @chainrule_reduce(double %d)
  %s0 = extractvalue {{ i64, double, double }} %s, 0
  %s1 = extractvalue {{ i64, double, double }} %s, 1
  %s2 = extractvalue {{ i64, double, double }} %s, 2
  %t0 = {to_int.format("%s0")}
  %t1 = {to_float.format("%s1")}
  %t2 = {to_float.format("%s2")}
  %q1 = insertelement {b.itype} %q, i{b.bits} %t0, i32 %i
  %r1 = insertelement {b.type} %r, {f} %t1, i32 %i
  %l1 = insertelement {b.type} %l, {f} %t2, i32 %i
  br label %done
done:
  %qn = phi {b.itype} [ %q, %next ], [ %q1, %reduce ]
  %rn = phi {b.type} [ %r, %next ], [ %r1, %reduce ]
  %ln = phi {b.type} [ %l, %next ], [ %l1, %reduce ]
  %j = add i32 %i, 1
  %more = icmp ult i32 %j, {w}
  br i1 %more, label %next, label %end
end:
  %e0 = insertvalue {triple} poison, {b.itype} %qn, 0
  %e1 = insertvalue {triple} %e0, {b.type} %rn, 1
  %e2 = insertvalue {triple} %e1, {b.type} %ln, 2
  ret {triple} %e2
}}"""


def _payne_hanek() -> str:
    """x -> (q, r, low), x = q pi/2 + r + low, for finite |x| >= 2.

    |x| = M 2^E. Of 2/pi only the 192 bits that neither give whole turns nor lie below the result are multiplied by M, modulo a turn:
    two bits are q, the rest is r, with 137 bits below the point, of which cancellation takes at most 62 (Muller 2016, ch. 11).
    """
    table = (TWO_OVER_PI >> 0).to_bytes(192, "little")
    text = "".join(f"\\{byte:02X}" for byte in table)
    return f"""@chainrule_two_over_pi = internal unnamed_addr constant [192 x i8] c"{text}", align 16
declare i192 @llvm.ctlz.i192(i192, i1)
define internal {{ i64, double, double }} @chainrule_reduce(double %x) noinline cold {{
  %bits = bitcast double %x to i64
  %up = lshr i64 %bits, 52
  %exponent = and i64 %up, 2047
  %fraction = and i64 %bits, {(1 << 52) - 1}
  %M = or i64 %fraction, {1 << 52}
  %S = sub i64 {1216 - 190 + 1075}, %exponent
  %byte = lshr i64 %S, 3
  %at = getelementptr i8, ptr @chainrule_two_over_pi, i64 %byte
  %window = load i256, ptr %at, align 1
  %odd = and i64 %S, 7
  %odd256 = zext i64 %odd to i256
  %aligned = lshr i256 %window, %odd256
  %T = trunc i256 %aligned to i192
  %M192 = zext i64 %M to i192
  %turn = mul i192 %T, %M192
  %rounded = add i192 %turn, {1 << 189}
  %q192 = lshr i192 %rounded, 190
  %whole = shl i192 %q192, 190
  %rest = sub i192 %turn, %whole
  %negative = icmp slt i192 %rest, 0
  %minus = sub i192 0, %rest
  %size = select i1 %negative, i192 %minus, i192 %rest
  %zeros = call i192 @llvm.ctlz.i192(i192 %size, i1 false)
  %full = shl i192 %size, %zeros
  %top = lshr i192 %full, 64
  %A = zext i192 %top to i256
  %P = mul i256 %A, {HALF_PI_128}
  %hi256 = lshr i256 %P, 203
  %hi64 = trunc i256 %hi256 to i64
  %mid256 = lshr i256 %P, 150
  %mid64 = trunc i256 %mid256 to i64
  %mid53 = and i64 %mid64, {(1 << 53) - 1}
  %hi = uitofp i64 %hi64 to double
  %mid = uitofp i64 %mid53 to double
  %z64 = trunc i192 %zeros to i64
  %h_exp = sub i64 {1023 - 50}, %z64
  %h_bits = shl i64 %h_exp, 52
  %h_scale = bitcast i64 %h_bits to double
  %l_exp = sub i64 {1023 - 103}, %z64
  %l_bits = shl i64 %l_exp, 52
  %l_scale = bitcast i64 %l_bits to double
  %h = fmul double %hi, %h_scale
  %l = fmul double %mid, %l_scale
  %r = fadd double %h, %l
  %taken = fsub double %r, %h
  %low = fsub double %l, %taken
  %minus_x = icmp slt i64 %bits, 0
  %flip = xor i1 %minus_x, %negative
  %r_minus = fneg double %r
  %low_minus = fneg double %low
  %r_out = select i1 %flip, double %r_minus, double %r
  %low_out = select i1 %flip, double %low_minus, double %low
  %q = trunc i192 %q192 to i64
  %q_minus = sub i64 0, %q
  %q_out = select i1 %minus_x, i64 %q_minus, i64 %q
  %o0 = insertvalue {{ i64, double, double }} poison, i64 %q_out, 0
  %o1 = insertvalue {{ i64, double, double }} %o0, double %r_out, 1
  %o2 = insertvalue {{ i64, double, double }} %o1, double %low_out, 2
  ret {{ i64, double, double }} %o2
}}"""
