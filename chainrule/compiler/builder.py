"""Writes straight-line LLVM IR on vector registers of one float type and one width.

In: calls such as `fma(a, b, c)` on operand texts. Out: lines of IR in `lines`, declarations in `declarations`, whole helper functions in
`helpers`. An operand is a register name or a constant; a register is `<W x float>` or `<W x double>`, an integer register has as many
bits. No fast-math flags are ever written, so a lane's bits depend neither on W nor on its neighbours.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

SPLAT = "splat ({0} {1})"


class Builder:
    """A block under construction.

    Args:
        bits: 32 or 64, the float type.
        width: lanes of a register.
        fma: the target has fused multiply-add; without it `fma` is a product and a sum.
        rounding: the target rounds to integers in one instruction (SSE4.1, NEON); changes no bits.
        block: label of the block that the next line goes into (phi nodes need it).
        names: prefix of register names and labels; unique within a function.
    """

    def __init__(
        self, bits: int, width: int, fma: bool = True, rounding: bool = True, block: str = "entry", names: str = "v"
    ) -> None:
        self.bits, self.width, self.has_fma, self.has_rounding, self.block, self.names = bits, width, fma, rounding, block, names
        self.lines: list[str] = []
        self.declarations: set[str] = set()
        self.helpers: dict[str, str] = {}
        self._count = [0]

    @property
    def scalar(self) -> str:
        return "float" if self.bits == 32 else "double"

    @property
    def type(self) -> str:
        return f"<{self.width} x {self.scalar}>"

    @property
    def itype(self) -> str:
        return f"<{self.width} x i{self.bits}>"

    @property
    def mask(self) -> str:
        return f"<{self.width} x i1>"

    @property
    def mantissa(self) -> int:
        """Stored mantissa bits."""
        return 23 if self.bits == 32 else 52

    @property
    def bias(self) -> int:
        return 127 if self.bits == 32 else 1023

    def wide(self) -> Builder:
        """The same block, seen with float64 registers of the same number of lanes."""
        other = Builder(64, self.width, self.has_fma, self.has_rounding, self.block, self.names)
        other.lines, other.declarations, other.helpers, other._count = self.lines, self.declarations, self.helpers, self._count
        return other

    # ---- constants and text ----

    def name(self) -> str:
        self._count[0] += 1
        return f"%{self.names}{self._count[0]}"

    def line(self, text: str) -> str:
        register = self.name()
        self.lines.append(f"  {register} = {text}")
        return register

    def const(self, value: float) -> str:
        """`value`, rounded to the float type, in every lane."""
        if self.bits == 32:
            value = struct.unpack("<f", struct.pack("<f", value))[0]
        return SPLAT.format(self.scalar, f"0x{struct.unpack('<Q', struct.pack('<d', value))[0]:016X}")

    def iconst(self, value: int) -> str:
        value &= (1 << self.bits) - 1
        return SPLAT.format(f"i{self.bits}", value - (1 << self.bits) if value >> (self.bits - 1) else value)

    def bits_of(self, value: float) -> int:
        """The bit pattern of `value` in the float type."""
        return int(
            struct.unpack("<I", struct.pack("<f", value))[0]
            if self.bits == 32
            else struct.unpack("<Q", struct.pack("<d", value))[0]
        )

    def intrinsic(self, name: str, *operands: str) -> str:
        symbol = f"@llvm.{name}.v{self.width}f{self.bits}"
        self.declarations.add(f"declare {self.type} {symbol}({', '.join([self.type] * len(operands))})")
        return self.line(f"call {self.type} {symbol}({', '.join(f'{self.type} {o}' for o in operands)})")

    # ---- floats ----

    def fadd(self, a: str, b: str) -> str:
        return self.line(f"fadd {self.type} {a}, {b}")

    def fsub(self, a: str, b: str) -> str:
        return self.line(f"fsub {self.type} {a}, {b}")

    def fmul(self, a: str, b: str) -> str:
        return self.line(f"fmul {self.type} {a}, {b}")

    def fdiv(self, a: str, b: str) -> str:
        return self.line(f"fdiv {self.type} {a}, {b}")

    def fneg(self, a: str) -> str:
        return self.line(f"fneg {self.type} {a}")

    def fma(self, a: str, b: str, c: str) -> str:
        """a b + c, rounded once if the target can, else twice."""
        return self.intrinsic("fma", a, b, c) if self.has_fma else self.fadd(self.fmul(a, b), c)

    def fabs(self, a: str) -> str:
        return self.intrinsic("fabs", a)

    def copysign(self, a: str, b: str) -> str:
        """|a| with the sign of b."""
        return self.intrinsic("copysign", a, b)

    def floor(self, a: str) -> str:
        """Largest integer <= a; -0 stays -0. Without an instruction: |a| + 2^mantissa - 2^mantissa, one less where that went up."""
        if self.has_rounding:
            return self.intrinsic("floor", a)
        size, whole = self.fabs(a), self.const(2.0**self.mantissa)
        near = self.copysign(self.fsub(self.fadd(size, whole), whole), a)
        down = self.fsub(near, self.select(self.fcmp("ogt", near, a), self.const(1.0), self.const(0.0)))
        return self.select(self.fcmp("olt", size, whole), down, a)

    def fcmp(self, test: str, a: str, b: str) -> str:
        return self.line(f"fcmp {test} {self.type} {a}, {b}")

    def select(self, condition: str, a: str, b: str) -> str:
        return self.line(f"select {self.mask} {condition}, {self.type} {a}, {self.type} {b}")

    def polynomial(self, x: str, coefficients: Sequence[float]) -> str:
        """c0 + c1 x + c2 x^2 + ...: Horner's rule; in x^2 on two interleaved chains from degree 7 on (half the latency)."""
        if len(coefficients) > 7:
            square = self.fmul(x, x)
            return self.fma(x, self._horner(square, coefficients[1::2]), self._horner(square, coefficients[::2]))
        return self._horner(x, coefficients)

    def _horner(self, x: str, coefficients: Sequence[float]) -> str:
        p = self.const(coefficients[-1])
        for c in coefficients[-2::-1]:
            p = self.fma(p, x, self.const(c))
        return p

    # ---- integers and masks ----

    def integer(self, operation: str, a: str, b: str | int) -> str:
        """add, sub, and, or, xor, shl, lshr."""
        return self.line(f"{operation} {self.itype} {a}, {self.iconst(b) if isinstance(b, int) else b}")

    def icmp(self, test: str, a: str, b: int) -> str:
        return self.line(f"icmp {test} {self.itype} {a}, {self.iconst(b)}")

    def logic(self, operation: str, a: str, b: str) -> str:
        """and, or, xor of masks."""
        return self.line(f"{operation} {self.mask} {a}, {b}")

    def to_bits(self, a: str) -> str:
        return self.line(f"bitcast {self.type} {a} to {self.itype}")

    def to_float(self, a: str) -> str:
        return self.line(f"bitcast {self.itype} {a} to {self.type}")

    def label(self, name: str) -> None:
        self.lines.append(f"{name}:")
        self.block = name
