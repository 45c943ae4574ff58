"""Operators on registers: each elementwise core form, and the steps of sums and the random bits that loops have besides.

In: a Block (code.py), an operator, and registers of one width. Out: the register of its result; its lines stand in the block. Lane by
lane a core form gives what `OPS[name].value` gives, the functions of elementary.py to a few ulp, all else to the bit (of NaN only that it
is one). A lane's bits do not depend on the width. Nothing traps and nothing is poison, whatever the arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .builder import Builder
from .code import BOOL, Block, Dtype, Reg, bits_of, constant_value
from .elementary import emit
from .gates import GATES, Gate, shrunk, times_gate

Attrs = Mapping[str, Any]
Form = Callable[..., Reg]

COMBINE = {"sum": "add", "max": "maximum", "min": "minimum"}
U4, U8, F8 = np.dtype(np.uint32), np.dtype(np.uint64), np.dtype(np.float64)


def elementwise(b: Block, op: str, attrs: Attrs, dtype: Any, *args: Reg) -> Reg:
    """A core form whose `Op.elementwise` is True, lane by lane.

    Args: op: its name; attrs: its attributes; dtype: of its result; args: registers of one width, of types that its `infer` takes.
    Raises: `ValueError` for a form or a type that NumPy does not compute in either.
    """
    dtype = np.dtype(dtype)
    kind = args[-1].dtype.kind
    known = op in _FORMS or op in _BY_ELEMENTARY
    if not known or (kind == "b" and op in _NOT_OF_BOOLEANS) or (kind != "f" and (op in _OF_FLOATS or op in _BY_ELEMENTARY)):
        raise ValueError(f"{op} of {', '.join(str(a.dtype) for a in args)} has no code")
    return _elementary(b, op, *args) if op in _BY_ELEMENTARY else _FORMS[op](b, dtype, *args)


# ---- sums --------------------------------------------------------------------------------------------------------------------


def combine(b: Block, how: str, x: Reg, y: Reg) -> Reg:
    """One step of a reduction: "sum", "max" or "min", as NumPy's add, maximum and minimum."""
    return elementwise(b, COMBINE[how], {}, x.dtype, x, y)


def neutral(b: Block, how: str, dtype: Any, width: int = 1) -> Reg:
    """What `combine` changes nothing by; the sum's is +0, so -0 alone comes out as +0."""
    dtype = np.dtype(dtype)
    if how == "sum":
        return b.const(0, dtype, width)
    lowest: float
    highest: float
    if dtype.kind in "iu":
        lowest, highest = np.iinfo(dtype).min, np.iinfo(dtype).max
    else:
        lowest, highest = (False, True) if dtype.kind == "b" else (-math.inf, math.inf)
    return b.const({"max": lowest, "min": highest}[how], dtype, width)


def lanes_reduce(b: Block, how: str, reg: Reg) -> Reg:
    """All lanes combined into a scalar; the upper half onto the lower until one is left."""
    while reg.width > 1:
        half = reg.width // 2
        reg = combine(b, how, b.part(reg, 0, half), b.part(reg, half, half))
    return reg


def fma(b: Block, x: Reg, y: Reg, z: Reg) -> Reg:
    """x y + z; of floats rounded once if the target can, else twice."""
    if x.dtype.kind == "f" and b.target.fma:
        return b.intrinsic("fma", x.dtype, x, y, z)
    return elementwise(b, "add", {}, x.dtype, elementwise(b, "multiply", {}, x.dtype, x, y), z)


# ---- random bits -------------------------------------------------------------------------------------------------------------


def philox(b: Block, c0: Reg, c1: Reg, c2: Reg, c3: Reg, k0: Reg, k1: Reg) -> list[Reg]:
    """Philox-4x32-10 (ops/random.py): four words from a counter of four and a key of two; all uint32 and of one width.

    Words stay in lanes of 64 bits, so that nothing is packed and unpacked between rounds. Their upper halves hold anything.
    """
    c0, c1, c2, c3, k0, k1 = (_cast(b, U8, word) for word in (c0, c1, c2, c3, k0, k1))
    step0, step1, half = (b.const(value, U8, c0.width) for value in (0x9E3779B9, 0xBB67AE85, 32))
    for _ in range(10):
        product0, product1 = _low_product(b, c0, 0xD2511F53), _low_product(b, c2, 0xCD9E8D57)
        high0, high1 = b.binary("lshr", product0, half), b.binary("lshr", product1, half)
        c0, c2 = (b.binary("xor", b.binary("xor", h, c), k) for h, c, k in ((high1, c1, k0), (high0, c3, k1)))
        c1, c3 = product1, product0
        k0, k1 = b.binary("add", k0, step0), b.binary("add", k1, step1)
    return [_cast(b, U4, word) for word in (c0, c1, c2, c3)]


def _low_product(b: Block, x: Reg, factor: int) -> Reg:
    """The lower half of x times a factor of 32 bits."""
    low = b.binary("and", x, b.const(0xFFFFFFFF, U8, x.width))
    return b.binary("mul", low, b.const(factor, U8, x.width))


# ---- core forms --------------------------------------------------------------------------------------------------------------
# Each is a function of the block, the result's type and the arguments.


def _zero(b: Block, like: Reg) -> Reg:
    return b.const(0, like.dtype, like.width)


def _elementary(b: Block, op: str, *args: Reg) -> Reg:
    """By elementary.py, whose registers are vectors at width 1 too."""
    cheap = _cheap_power(b, *args) if op == "power" else None
    if cheap is not None:
        return cheap
    if op not in GATES:
        return _by_builder(b, args, lambda builder, *texts: emit(builder, op, *texts))
    grown: list[Gate] = []

    def gate(builder: Builder, x: str) -> str:
        grown.append(GATES[op](builder, x))
        return shrunk(builder, grown[0])

    result = _by_builder(b, args, gate)
    b.gates[result.text] = args[0], grown[0]
    return result


def _by_builder(b: Block, args: Sequence[Reg], write: Callable[..., str]) -> Reg:
    """What `write` makes of a builder and the registers, as vectors."""
    dtype, width = args[0].dtype, args[0].width
    builder, single = b.builder(dtype, width), f"<1 x {args[0].scalar}>"
    texts = [b.line(f"bitcast {a} to {single}") if width == 1 else a.text for a in args]
    text = write(builder, *texts)
    if width == 1:
        text = b.line(f"bitcast {single} {text} to {args[0].scalar}")
    b.label = builder.block
    return Reg(text, dtype, width)


def _cheap_power(b: Block, x: Reg, exponent: Reg) -> Reg | None:
    """x^c for a few constants c, at most 1 ulp from the correctly rounded result; None for the others."""
    value, one = constant_value(exponent), b.const(1, x.dtype, x.width)
    if value is None:
        return None
    if value == 0:
        return one
    if value == 1:
        return x
    if value == 2:
        return b.binary("fmul", x, x)
    if value == 3:
        return b.binary("fmul", b.binary("fmul", x, x), x)
    if value == -1:
        return b.binary("fdiv", one, x)
    if abs(value) == 0.5:  # C's pow differs from the root at -0, which the sum makes +0, and at -inf
        root = b.intrinsic("sqrt", x.dtype, b.binary("fadd", x, _zero(b, x)))
        infinite = b.compare("fcmp oeq", x, b.const(-math.inf, x.dtype, x.width))
        root = b.select(infinite, b.const(math.inf, x.dtype, x.width), root)
        return root if value > 0 else b.binary("fdiv", one, root)
    return None


def _arithmetic(on_floats: str, on_integers: str = "", on_booleans: str = "") -> Form:
    """One instruction, by the kind of the arguments."""

    def form(b: Block, dtype: Dtype, x: Reg, y: Reg) -> Reg:
        return b.binary({"f": on_floats, "b": on_booleans}.get(x.dtype.kind, on_integers), x, y)

    return form


_product = _arithmetic("fmul", "mul", "and")


def _multiply(b: Block, dtype: Dtype, x: Reg, y: Reg) -> Reg:
    """The product. Of a number and its gate (silu, mish, gelu) it keeps the digits that the gate alone has lost where it is denormal."""
    for number, gate in ((x, y), (y, x)):
        argument, grown = b.gates.get(gate.text, (None, None))
        if grown is not None and argument == number:
            return _by_builder(b, (number,), lambda builder, text, g=grown: times_gate(builder, text, g))
    return _product(b, dtype, x, y)


def _is_zero(b: Block, x: Reg) -> Reg:
    return b.compare("fcmp oeq", x, _zero(b, x))


def _strong_multiply(b: Block, dtype: Dtype, x: Reg, y: Reg) -> Reg:
    """The product, but +0 where it is NaN and a factor is 0."""
    product = _multiply(b, dtype, x, y)
    if x.dtype.kind != "f" or x == y:  # a square is NaN only of NaN
        return product
    for c, other in ((constant_value(x), y), (constant_value(y), x)):
        if c is None:
            continue
        if c == 0:
            return b.select(b.compare("fcmp uno", product, product), _zero(b, x), product)
        if np.isfinite(c):  # NaN only of NaN, which is not 0
            return product
        return b.select(_is_zero(b, other), _zero(b, x), product)
    lost = b.compare("fcmp uno", product, product)
    lost = b.binary("and", lost, b.binary("or", _is_zero(b, x), _is_zero(b, y)))
    return b.select(lost, _zero(b, x), product)


def _strong_divide(b: Block, dtype: Dtype, g: Reg, y: Reg) -> Reg:
    """The quotient, but +0 where it is NaN and g is 0."""
    quotient = b.binary("fdiv", g, y)
    dividend, divisor = constant_value(g), constant_value(y)
    if (dividend is not None and dividend != 0) or (divisor is not None and divisor != 0 and not np.isnan(divisor)):
        return quotient  # 0 divided by anything but 0 and NaN is 0
    if divisor is not None:
        return b.select(_is_zero(b, g), _zero(b, g), quotient)
    lost = b.compare("fcmp uno", quotient, quotient)
    if dividend is None:
        lost = b.binary("and", lost, _is_zero(b, g))
    return b.select(lost, _zero(b, g), quotient)


def _negative(b: Block, dtype: Dtype, x: Reg) -> Reg:
    return Reg(b.line(f"fneg {x}"), x.dtype, x.width) if x.dtype.kind == "f" else b.binary("sub", _zero(b, x), x)


def _absolute(b: Block, dtype: Dtype, x: Reg) -> Reg:
    """The smallest integer stays: it wraps."""
    if x.dtype.kind == "f":
        return b.intrinsic("fabs", x.dtype, x)
    return b.intrinsic("abs", x.dtype, x, flags=("i1 false",)) if x.dtype.kind == "i" else x


def _floor(b: Block, dtype: Dtype, x: Reg) -> Reg:
    return _elementary(b, "floor", x) if x.dtype.kind == "f" else x


def _extreme(test: str, on_booleans: str) -> Form:
    """maximum ("g") and minimum ("l"); the first of equals, which -0 and +0 are; NaN if either is."""

    def form(b: Block, dtype: Dtype, x: Reg, y: Reg) -> Reg:
        if x.dtype.kind == "b":
            return b.binary(on_booleans, x, y)
        if x.dtype.kind != "f":
            return b.select(b.compare(f"icmp {'u' if x.dtype.kind == 'u' else 's'}{test}e", x, y), x, y)
        first, second = constant_value(x), constant_value(y)
        if first is not None and not np.isnan(first):
            return b.select(b.compare(f"fcmp o{test}e", x, y), x, y)
        larger = b.select(b.compare(f"fcmp u{test}e", x, y), x, y)
        if second is not None and not np.isnan(second):
            return larger
        return b.select(b.compare("fcmp uno", y, y), y, larger)

    return form


def _test(predicate: str) -> Form:
    """A comparison; `predicate` as of floats without its "o"."""

    def form(b: Block, dtype: Dtype, x: Reg, y: Reg) -> Reg:
        if x.dtype.kind == "f":
            return b.compare(f"fcmp o{predicate}", x, y)
        sign = "" if predicate == "eq" else "s" if x.dtype.kind == "i" else "u"
        return b.compare(f"icmp {sign}{predicate}", x, y)

    return form


def _truth(b: Block, x: Reg) -> Reg:
    """x != 0, which NaN is."""
    return x if x.dtype.kind == "b" else b.compare("fcmp une" if x.dtype.kind == "f" else "icmp ne", x, _zero(b, x))


def _logical(operation: str) -> Form:
    def form(b: Block, dtype: Dtype, x: Reg, y: Reg) -> Reg:
        return b.binary(operation, _truth(b, x), _truth(b, y))

    return form


def _logical_not(b: Block, dtype: Dtype, x: Reg) -> Reg:
    truth = _truth(b, x)
    return b.binary("xor", truth, b.const(True, BOOL, x.width))


def _where(b: Block, dtype: Dtype, mask: Reg, x: Reg, y: Reg) -> Reg:
    return b.select(mask, x, y)


def _right_shift(b: Block, dtype: Dtype, x: Reg, y: Reg) -> Reg:
    """A shift by as many bits as x has, by more, or by a negative number takes all bits out: 0, or -1 for negative x."""
    inside = b.compare("icmp ult", y, b.const(bits_of(x.dtype), y.dtype, y.width))
    if x.dtype.kind == "u":
        return b.select(inside, b.binary("lshr", x, y), _zero(b, x))  # a shift too far is poison, which select does not pass on
    return b.binary("ashr", x, b.select(inside, y, b.const(bits_of(x.dtype) - 1, y.dtype, y.width)))


def _cast(b: Block, dtype: Dtype, x: Reg) -> Reg:
    """As `astype`; a float too large for the integer type becomes its nearest, NaN becomes 0 (NumPy promises nothing there)."""
    source = x.dtype
    if source == dtype:
        return x
    value = constant_value(x)
    if value is not None and not (source.kind == "f" and dtype.kind in "iu"):
        with np.errstate(over="ignore"):
            return b.const(value.astype(dtype), dtype, x.width)
    if dtype.kind == "b":
        return _truth(b, x)
    if source.kind == "f" and dtype.kind == "f":
        return b.convert("fpext" if dtype.itemsize > source.itemsize else "fptrunc", x, dtype)
    if source.kind == "f":
        return b.intrinsic("fptosi.sat" if dtype.kind == "i" else "fptoui.sat", dtype, x)
    if dtype.kind == "f":
        return b.convert("sitofp" if source.kind == "i" else "uitofp", x, dtype)
    if bits_of(dtype) == bits_of(source):
        return Reg(x.text, dtype, x.width)
    if bits_of(dtype) < bits_of(source):
        return b.convert("trunc", x, dtype)
    return b.convert("sext" if source.kind == "i" else "zext", x, dtype)


# ---- remainder ---------------------------------------------------------------------------------------------------------------


def _remainder(b: Block, dtype: Dtype, x: Reg, y: Reg) -> Reg:
    """x - floor(x / y) y: the sign of the divisor. Of integers x % 0 is 0."""
    if x.dtype.kind == "f":
        return _float_remainder(b, x, y)
    unsafe = b.compare("icmp eq", y, _zero(b, y))
    if x.dtype.kind == "i":  # the smallest integer divided by -1 would trap; any x % -1 is x % 1
        unsafe = b.binary("or", unsafe, b.compare("icmp eq", y, b.const(-1, y.dtype, y.width)))
    safe = b.select(unsafe, b.const(1, y.dtype, y.width), y)
    if x.dtype.kind == "u":
        return b.binary("urem", x, safe)
    rest = b.binary("srem", x, safe)
    opposite = b.compare("icmp slt", b.binary("xor", rest, safe), _zero(b, rest))
    wrong = b.binary("and", opposite, b.compare("icmp ne", rest, _zero(b, rest)))
    return b.select(wrong, b.binary("add", rest, safe), rest)


def _float_remainder(b: Block, x: Reg, y: Reg) -> Reg:
    """C's fmod, which is exact, moved to the sign of the divisor; a remainder of 0 has that sign too (NumPy's npy_remainder)."""
    dtype, zero = x.dtype, _zero(b, x)
    size = _truncated(b, b.intrinsic("fabs", dtype, x), b.intrinsic("fabs", dtype, y))
    rest = b.intrinsic("copysign", dtype, size, x)
    opposite = b.binary("xor", b.compare("fcmp olt", y, zero), b.compare("fcmp olt", rest, zero))
    moved = b.select(opposite, b.binary("fadd", rest, y), rest)
    return b.select(_is_zero(b, rest), b.intrinsic("copysign", dtype, zero, y), moved)


def _truncated(b: Block, x: Reg, y: Reg) -> Reg:
    """fmod of numbers >= 0, lane after lane; float32 in float64, which holds its remainder too."""
    b.helpers["chainrule_fmod"] = _FMOD
    b.declarations |= {f"declare i64 @llvm.{name}" for name in ("ctlz.i64(i64, i1)", "umin.i64(i64, i64)", "umax.i64(i64, i64)")}
    result = _zero(b, x)
    for i in range(x.width):
        over, under = (_cast(b, F8, b.extract(r, i)) for r in (x, y))
        rest = Reg(b.line(f"call double @chainrule_fmod({over}, {under})"), F8)
        result = b.insert(result, _cast(b, x.dtype, rest), i)
    return result


# x = M 2^d u, y = N u, u a power of two: M 2^d mod N by 11 bits at a time, as many as fit beside the 53 of a remainder. Integers only,
# so exact for denormals, whatever the processor does with them. NaN for a dividend that is not finite and a divisor that is 0 or NaN.
_FMOD = """define internal double @chainrule_fmod(double %x, double %y) noinline {
entry:
  %finite = fcmp olt double %x, 0x7FF0000000000000
  %divides = fcmp ogt double %y, 0.0
  %legal = and i1 %finite, %divides
  br i1 %legal, label %sizes, label %none
none:
  ret double 0x7FF8000000000000
sizes:
  %less = fcmp olt double %x, %y
  br i1 %less, label %same, label %split
same:
  ret double %x
split:
  %bx = bitcast double %x to i64
  %by = bitcast double %y to i64
  %fx = lshr i64 %bx, 52
  %fy = lshr i64 %by, 52
  %ex = call i64 @llvm.umax.i64(i64 %fx, i64 1)
  %ey = call i64 @llvm.umax.i64(i64 %fy, i64 1)
  %sx = sub i64 %ex, 1
  %sy = sub i64 %ey, 1
  %hx = shl i64 %sx, 52
  %hy = shl i64 %sy, 52
  %mx = sub i64 %bx, %hx
  %my = sub i64 %by, %hy
  %d0 = sub i64 %ex, %ey
  %m0 = urem i64 %mx, %my
  br label %check
check:
  %d = phi i64 [ %d0, %split ], [ %d1, %step ]
  %m = phi i64 [ %m0, %split ], [ %m1, %step ]
  %some = icmp ne i64 %d, 0
  br i1 %some, label %step, label %join
step:
  %s = call i64 @llvm.umin.i64(i64 %d, i64 11)
  %up = shl i64 %m, %s
  %m1 = urem i64 %up, %my
  %d1 = sub i64 %d, %s
  br label %check
join:
  %zeros = call i64 @llvm.ctlz.i64(i64 %m, i1 false)
  %room = sub i64 %zeros, 11
  %shift = call i64 @llvm.umin.i64(i64 %room, i64 %sy)
  %full = shl i64 %m, %shift
  %exponent = sub i64 %sy, %shift
  %high = shl i64 %exponent, 52
  %bits = add i64 %high, %full
  %zero = icmp eq i64 %m, 0
  %chosen = select i1 %zero, i64 0, i64 %bits
  %r = bitcast i64 %chosen to double
  ret double %r
}"""

_BY_ELEMENTARY = frozenset(["exp", "expm1", "log", "log1p", "sin", "cos", "tan", "arctan", "arcsin", "arccos", "arccosh", "tanh"])
_BY_ELEMENTARY |= {"logistic", "tanh_softplus", "erf", "normal_cdf", "power", "sqrt"}
_OF_FLOATS = frozenset(["divide", "strong_divide"])
_NOT_OF_BOOLEANS = frozenset(["negative", "subtract", "remainder", "right_shift"])
_FORMS: dict[str, Form] = {
    "add": _arithmetic("fadd", "add", "or"),
    "subtract": _arithmetic("fsub", "sub"),
    "multiply": _multiply,
    "divide": _arithmetic("fdiv"),
    "strong_multiply": _strong_multiply,
    "strong_divide": _strong_divide,
    "negative": _negative,
    "remainder": _remainder,
    "maximum": _extreme("g", "or"),
    "minimum": _extreme("l", "and"),
    "abs": _absolute,
    "floor": _floor,
    "less": _test("lt"),
    "less_equal": _test("le"),
    "equal": _test("eq"),
    "logical_and": _logical("and"),
    "logical_or": _logical("or"),
    "logical_not": _logical_not,
    "where": _where,
    "cast": _cast,
    "right_shift": _right_shift,
}
