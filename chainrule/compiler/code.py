"""Writes the lines of one LLVM function: registers of every data type at every width, their lanes, and memory.

In: a target (its features) and calls such as `load(pointer, dtype, 16)` or `binary("fadd", a, b)`. Out: lines of IR in `lines`; what must
stand beside the function in `declarations` and `helpers`. What operators make of registers is in operators.py. No fast-math flag is ever
written.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from .builder import Builder
from .gates import Gate

Dtype = np.dtype[Any]

MASKS = 64  # bytes of vectors with which come registers of masks: without them a masked store takes up to 40 instructions
BOOL = np.dtype(bool)


class Target(Protocol):
    """What the code depends on. fma: it has fused multiply-add; rounding: and rounds to integers in one instruction."""

    @property
    def fma(self) -> bool: ...
    @property
    def rounding(self) -> bool: ...
    @property
    def vector_bytes(self) -> int: ...


def scalar_type(dtype: Dtype) -> str:
    """The LLVM type of one element in a register."""
    if dtype.kind == "f":
        return "float" if dtype.itemsize == 4 else "double"
    return f"i{bits_of(dtype)}"


def bits_of(dtype: Dtype) -> int:
    """Bits of one element in a register."""
    return 1 if dtype.kind == "b" else 8 * dtype.itemsize


def vector(type: str, width: int) -> str:
    """The type of `width` elements; width 1 is the element itself."""
    return type if width == 1 else f"<{width} x {type}>"


@dataclass(frozen=True, slots=True)
class Reg:
    """A register or a constant.

    text: "%v12", or a constant without its type. width: 1 is a scalar, else a vector of that many lanes.
    """

    text: str
    dtype: Dtype
    width: int = 1

    @property
    def scalar(self) -> str:
        return scalar_type(self.dtype)

    @property
    def type(self) -> str:
        return vector(self.scalar, self.width)

    def __str__(self) -> str:
        """As an operand: type and text."""
        return f"{self.type} {self.text}"


# ---- constants as text -------------------------------------------------------------------------------------------------------


def literal(value: Any, dtype: Dtype) -> str:
    """One constant: floats by their bits, widened to those of a double (as LLVM writes them), integers signed and wrapped."""
    if dtype.kind == "b":
        return "true" if value else "false"
    if dtype.kind != "f":
        wrapped = int(value) & ((1 << bits_of(dtype)) - 1)
        return str(wrapped - (1 << bits_of(dtype)) if wrapped >> (bits_of(dtype) - 1) else wrapped)
    with np.errstate(over="ignore"):
        number = np.asarray(value, dtype)
    if dtype.itemsize == 4 and np.isnan(number):  # a conversion could change the payload
        bits = int(number.view(np.uint32))
        return f"0x{(bits >> 31 << 63) | (0x7FF << 52) | ((bits & 0x7FFFFF) << 29):016X}"
    return f"0x{int(number.astype(np.float64).view(np.uint64)):016X}"


_CONSTANT = re.compile(r"(?:splat \(\w+ )?(true|false|0x[0-9A-F]{16}|-?\d+)\)?")


def constant_value(reg: Reg) -> Any:
    """The NumPy scalar that all lanes of a constant hold; None for a register and for lanes that differ."""
    found = _CONSTANT.fullmatch(reg.text)
    if found is None:
        return None
    text = found[1]
    if reg.dtype.kind == "b":
        return np.bool_(text == "true")
    if reg.dtype.kind == "f":
        return reg.dtype.type(struct.unpack("<d", struct.pack("<Q", int(text, 16)))[0])
    return np.array(int(text) & ((1 << bits_of(reg.dtype)) - 1), np.uint64).astype(reg.dtype)[()]


# ---- the block ---------------------------------------------------------------------------------------------------------------


class Block:
    """Lines of one function under construction.

    Args:
        target: what `Target` says.
        names: prefix of registers and labels; unique within a function.

    The first block's label is `label`, "entry"; whoever writes the function's head writes that label too. Several methods begin further
    blocks (sin and cos branch), so phi nodes read `label` after the call.
    """

    def __init__(self, target: Target, names: str = "v") -> None:
        self.target, self.names, self.label = target, names, "entry"
        self.lines: list[str] = []
        self.declarations: set[str] = set()
        self.helpers: dict[str, str] = {}
        # By the register of a gate: what it is the gate of, and the gate times a power of two.
        self.gates: dict[str, tuple[Reg, Gate]] = {}
        self._count = [0]

    # ---- text ----

    def name(self) -> str:
        """A fresh register's name."""
        self._count[0] += 1
        return f"%{self.names}{self._count[0]}"

    def fresh_label(self) -> str:
        """A label that nothing else has."""
        return f"{self.name()[1:]}.block"

    def line(self, text: str) -> str:
        """Appends an instruction that has a result; returns the result's name."""
        register = self.name()
        self.lines.append(f"  {register} = {text}")
        return register

    def do(self, text: str) -> None:
        """Appends an instruction without a result."""
        self.lines.append(f"  {text}")

    def start(self, label: str) -> None:
        """Begins a basic block; the one before must have ended with a jump."""
        self.lines.append(f"{label}:")
        self.label = label

    def builder(self, dtype: Dtype, width: int) -> Builder:
        """A Builder for a float type that writes into this block; `label` must be taken over from its `block` afterwards."""
        b = Builder(bits_of(dtype), width, self.target.fma, self.target.rounding, self.label, self.names)
        b.lines, b.declarations, b.helpers, b._count = self.lines, self.declarations, self.helpers, self._count
        return b

    def intrinsic(self, name: str, result: Dtype, *args: Reg, flags: Sequence[str] = ()) -> Reg:
        """A call of @llvm.<name> on registers of one width; `flags` are trailing arguments such as "i1 false"."""
        width, types = args[0].width, [a.type for a in args]
        overloads = [result] if args[0].dtype == result else [result, args[0].dtype]
        symbol, type = f"@llvm.{name}.{'.'.join(_mangled(d, width) for d in overloads)}", vector(scalar_type(result), width)
        self.declarations.add(f"declare {type} {symbol}({', '.join(types + [f.split()[0] for f in flags])})")
        return Reg(self.line(f"call {type} {symbol}({', '.join([*map(str, args), *flags])})"), result, width)

    def binary(self, operation: str, a: Reg, b: Reg) -> Reg:
        """An instruction on two registers of one type, with a result of that type."""
        return Reg(self.line(f"{operation} {a}, {b.text}"), a.dtype, a.width)

    def compare(self, test: str, a: Reg, b: Reg) -> Reg:
        """A mask; `test` is "fcmp olt", "icmp ult", ..."""
        return Reg(self.line(f"{test} {a}, {b.text}"), BOOL, a.width)

    def convert(self, operation: str, reg: Reg, dtype: Dtype) -> Reg:
        """zext, trunc, sitofp, ..."""
        return Reg(self.line(f"{operation} {reg} to {vector(scalar_type(dtype), reg.width)}"), dtype, reg.width)

    def select(self, mask: Reg, a: Reg, b: Reg) -> Reg:
        """a where the mask is true, else b."""
        return a if a == b else Reg(self.line(f"select {mask}, {a}, {b}"), a.dtype, a.width)

    # ---- constants and lanes ----

    def const(self, value: Any, dtype: Any, width: int = 1) -> Reg:
        """`value` in every lane, bit for bit; integers wrap."""
        dtype = np.dtype(dtype)
        text = literal(value, dtype)
        return Reg(text if width == 1 else f"splat ({scalar_type(dtype)} {text})", dtype, width)

    def iota(self, dtype: Any, width: int) -> Reg:
        """0, 1, 2, ..."""
        dtype = np.dtype(dtype)
        if width == 1:
            return self.const(0, dtype)
        lanes = ", ".join(f"{scalar_type(dtype)} {literal(i, dtype)}" for i in range(width))
        return Reg(f"<{lanes}>", dtype, width)

    def splat(self, reg: Reg, width: int) -> Reg:
        """The scalar in every lane; a register of this width stays as it is."""
        if reg.width == width:
            return reg
        if reg.width != 1:
            raise ValueError(f"{reg} has {reg.width} lanes, not 1 or {width}")
        if not reg.text.startswith("%"):
            return Reg(f"splat ({reg})", reg.dtype, width)
        first = Reg(self.line(f"insertelement {vector(reg.scalar, width)} poison, {reg}, i64 0"), reg.dtype, width)
        return self.shuffle(first, None, [0] * width)

    def shuffle(self, a: Reg, b: Reg | None, places: Sequence[int]) -> Reg:
        """The lanes of a, then of b, in the order that `places` says; as many as it has, at least two."""
        second = f"{a.type} poison" if b is None else str(b)
        order = ", ".join(f"i32 {p}" for p in places)
        return Reg(self.line(f"shufflevector {a}, {second}, <{len(places)} x i32> <{order}>"), a.dtype, len(places))

    def extract(self, reg: Reg, lane: int) -> Reg:
        """One lane as a scalar."""
        if reg.width == 1:
            return reg
        value = constant_value(reg)
        if value is not None:
            return self.const(value, reg.dtype)
        return Reg(self.line(f"extractelement {reg}, i64 {lane}"), reg.dtype)

    def insert(self, reg: Reg, scalar: Reg, lane: int) -> Reg:
        """`reg` with one lane replaced."""
        return scalar if reg.width == 1 else Reg(self.line(f"insertelement {reg}, {scalar}, i64 {lane}"), reg.dtype, reg.width)

    def part(self, reg: Reg, first: int, count: int) -> Reg:
        """`count` neighbouring lanes."""
        if count == reg.width:
            return reg
        return self.extract(reg, first) if count == 1 else self.shuffle(reg, None, range(first, first + count))

    def padded(self, reg: Reg, width: int) -> Reg:
        """`reg` with lanes of 0 after its own."""
        if reg.width == width:
            return reg
        if reg.width == 1:
            return self.insert(self.const(0, reg.dtype, width), reg, 0)
        return self.shuffle(reg, self.const(0, reg.dtype, reg.width), [min(i, reg.width) for i in range(width)])

    def transpose(self, regs: Sequence[Reg]) -> list[Reg]:
        """n registers of n lanes, n a power of two: lane j of result i is lane i of register j.

        Each stage exchanges the blocks off the diagonal of squares half as large as before. The last two stages of 4-byte lanes instead
        interleave neighbours and then pairs of them, within 16 bytes: unpck on x86, zip on ARM.
        """
        n, regs = len(regs), list(regs)
        quads = n >= 4 and regs[0].dtype.itemsize == 4
        distance = n // 2
        while distance > (2 if quads else 0):
            for i in (i for i in range(n) if not i & distance):
                regs[i], regs[i + distance] = self._exchanged(regs[i], regs[i + distance], distance)
            distance //= 2
        return [r for i in range(0, n, 4) for r in self._quads(regs[i : i + 4])] if quads else regs

    def _exchanged(self, a: Reg, b: Reg, distance: int) -> tuple[Reg, Reg]:
        n = a.width
        low = [j if not j & distance else n + j - distance for j in range(n)]
        high = [j + distance if not j & distance else n + j for j in range(n)]
        return self.shuffle(a, b, low), self.shuffle(a, b, high)

    def _quads(self, regs: list[Reg]) -> list[Reg]:
        """Four registers, each group of four lanes transposed."""
        a, b, c, d = regs
        pairs = [(self._merged(a, b, half), self._merged(c, d, half)) for half in ((0, 4, 1, 5), (2, 6, 3, 7))]
        return [self._merged(x, y, places) for x, y in pairs for places in ((0, 1, 4, 5), (2, 3, 6, 7))]

    def _merged(self, a: Reg, b: Reg, places: Sequence[int]) -> Reg:
        """In each group of four lanes: these of the eight of a's and b's."""
        return self.shuffle(a, b, [group + p % 4 + (a.width if p >= 4 else 0) for group in range(0, a.width, 4) for p in places])

    # ---- memory ----
    # bool is a byte of 0 or 1 in memory and a bit in registers.

    def at(self, pointer: str, dtype: Dtype, offset: int) -> str:
        """The pointer `offset` elements further."""
        return self.line(f"getelementptr i8, ptr {pointer}, i64 {offset * dtype.itemsize}") if offset else pointer

    def any_nan(self, values: Sequence[tuple[Reg, int]]) -> str:
        """Whether one of these is NaN in one of its first lanes (so many)."""
        found: list[str] = []
        alike: dict[tuple[str, int], list[Reg]] = {}
        for r, lanes in values:
            alike.setdefault((r.type, lanes), []).append(r)
        for (_, lanes), registers in alike.items():
            pairs = zip(registers[::2], [*registers[1::2], *registers[-1:]], strict=False)
            tests = [self.compare("fcmp uno", a, b) for a, b in pairs]
            test = tests[0]
            for other in tests[1:]:
                test = self.binary("or", test, other)
            found.append(self._any(test, lanes))
        text, *others = found
        for more in others:
            text = self.line(f"or i1 {text}, {more}")
        return text

    def _any(self, test: Reg, lanes: int) -> str:
        """Whether a truth value is true in one of its first lanes."""
        if test.width == 1:
            return test.text
        bits = self.line(f"bitcast {test} to i{test.width}")
        if lanes < test.width:
            bits = self.line(f"and i{test.width} {bits}, {(1 << lanes) - 1}")
        return self.line(f"icmp ne i{test.width} {bits}, 0")

    def load(
        self, pointer: str, dtype: Any, width: int = 1, *, lanes: int | None = None, stride: int = 1, align: int | None = None
    ) -> Reg:
        """`width` lanes, the first `lanes` of them from memory, the others 0; no other element is touched.

        Args: pointer: of lane 0; stride: from lane to lane, in elements, may be 0 or negative; align: of the pointer in bytes, by default
        an element's size.
        """
        dtype, lanes = np.dtype(dtype), width if lanes is None else lanes
        memory, align = (np.dtype(np.uint8) if dtype.kind == "b" else dtype), align or dtype.itemsize
        if lanes == 0:
            return self.const(0, dtype, width)
        reg = self._loaded(pointer, memory, width, lanes, stride, align)
        return self.compare("icmp ne", reg, self.const(0, memory, width)) if dtype.kind == "b" else reg

    def _loaded(self, pointer: str, dtype: Dtype, width: int, lanes: int, stride: int, align: int) -> Reg:
        if stride == 0:
            one = self.splat(self._plain(pointer, dtype, 1, align), lanes)
            return self.padded(one, width)
        if stride == -1 and lanes > 1:  # one load, turned round
            first = self.at(pointer, dtype, 1 - lanes)
            forward = self._loaded(first, dtype, width, lanes, 1, min(align, dtype.itemsize))
            if lanes == width:
                return self.shuffle(forward, None, range(width - 1, -1, -1))
            turned = [*range(lanes - 1, -1, -1), *[width] * (width - lanes)]
            return self.shuffle(forward, self.const(0, dtype, width), turned)
        if stride == 1 and lanes & (lanes - 1) == 0:
            return self.padded(self._plain(pointer, dtype, lanes, align), width)
        if stride == 1 and self.target.vector_bytes < MASKS:
            low = 1 << (lanes.bit_length() - 1)
            lower = self.padded(self._plain(pointer, dtype, low, align), width)
            rest = self._loaded(self.at(pointer, dtype, low), dtype, width, lanes - low, 1, min(align, dtype.itemsize))
            return self.shuffle(lower, rest, [i if i < low else width + i - low for i in range(width)])
        if stride == 1:
            return self._masked_load(pointer, dtype, width, lanes, align)
        reg = self.const(0, dtype, width)
        for i in range(lanes):
            element = self._plain(self.at(pointer, dtype, i * stride), dtype, 1, min(align, dtype.itemsize))
            reg = self.insert(reg, element, i)
        return reg

    def _plain(self, pointer: str, dtype: Dtype, width: int, align: int) -> Reg:
        return Reg(self.line(f"load {vector(scalar_type(dtype), width)}, ptr {pointer}, align {align}"), dtype, width)

    def _masked_load(self, pointer: str, dtype: Dtype, width: int, lanes: int, align: int) -> Reg:
        zero, mask = self.const(0, dtype, width), _first_lanes(width, lanes)
        symbol = f"@llvm.masked.load.{_mangled(dtype, width)}.p0"
        self.declarations.add(f"declare {zero.type} {symbol}(ptr, i32, <{width} x i1>, {zero.type})")
        return Reg(self.line(f"call {zero.type} {symbol}(ptr {pointer}, i32 {align}, {mask}, {zero})"), dtype, width)

    def store(self, pointer: str, reg: Reg, *, lanes: int | None = None, stride: int = 1, align: int | None = None) -> None:
        """The first `lanes` lanes to memory; arguments as of `load`. With stride 0 the last of them stays."""
        lanes = reg.width if lanes is None else lanes
        align = align or reg.dtype.itemsize
        if reg.dtype.kind == "b":
            reg = self.convert("zext", reg, np.dtype(np.uint8))
        if lanes == 0:
            return
        if stride == 1 and lanes & (lanes - 1) == 0:
            self.do(f"store {self.part(reg, 0, lanes)}, ptr {pointer}, align {align}")
        elif stride == 1 and self.target.vector_bytes < MASKS:
            at = 0
            for bit in reversed(range(lanes.bit_length())):
                if lanes & (1 << bit):
                    place = self.at(pointer, reg.dtype, at)
                    self.do(f"store {self.part(reg, at, 1 << bit)}, ptr {place}, align {min(align, reg.dtype.itemsize)}")
                    at += 1 << bit
        elif stride == 1:
            symbol = f"@llvm.masked.store.{_mangled(reg.dtype, reg.width)}.p0"
            self.declarations.add(f"declare void {symbol}({reg.type}, ptr, i32, <{reg.width} x i1>)")
            self.do(f"call void {symbol}({reg}, ptr {pointer}, i32 {align}, {_first_lanes(reg.width, lanes)})")
        else:
            for i in [lanes - 1] if stride == 0 else range(lanes):
                place = self.at(pointer, reg.dtype, i * stride)
                self.do(f"store {self.extract(reg, i)}, ptr {place}, align {min(align, reg.dtype.itemsize)}")

    def fetch(self, pointer: str) -> None:
        """Memory from there on goes into the second cache, if it can be read at all."""
        self.declarations.add("declare void @llvm.prefetch.p0(ptr, i32, i32, i32)")
        self.do(f"call void @llvm.prefetch.p0(ptr {pointer}, i32 0, i32 2, i32 1)")


def _mangled(dtype: Dtype, width: int) -> str:
    """The type in an intrinsic's name."""
    return f"{'' if width == 1 else f'v{width}'}{'f' if dtype.kind == 'f' else 'i'}{bits_of(dtype)}"


def _first_lanes(width: int, lanes: int) -> str:
    """A constant mask, with its type."""
    return f"<{width} x i1> <{', '.join('i1 true' if i < lanes else 'i1 false' for i in range(width))}>"
