"""Writes the lines of one LLVM function: registers of every data type at every width, memory, lanes, and each elementwise core form.

In: a target (its features) and calls such as `load(pointer, dtype, 16)` or `elementwise("add", {}, dtype, a, b)`. Out: lines of IR in
`lines`; what must stand beside the function in `declarations` and `helpers`. Lane by lane a core form gives what `OPS[name].value` gives,
the functions of elementary.py to a few ulp, all else to the bit (of NaN only that it is one). A lane's bits do not depend on the width.
No fast-math flag is ever written, nothing traps and nothing is poison, whatever the arguments.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from .builder import Builder
from .elementary import emit
from .gates import GATES, Gate, shrunk, times_gate

Dtype = np.dtype[Any]
Attrs = Mapping[str, Any]

MASKS = 64  # bytes of vectors with which come registers of masks: without them a masked store takes up to 40 instructions
BOOL, U4, U8, F8 = np.dtype(bool), np.dtype(np.uint32), np.dtype(np.uint64), np.dtype(np.float64)


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

    # ---- arithmetic that schedules need ----

    def combine(self, how: str, a: Reg, b: Reg) -> Reg:
        """One step of a reduction: "sum", "max" or "min", as NumPy's add, maximum and minimum."""
        return self.elementwise(COMBINE[how], {}, a.dtype, a, b)

    def neutral(self, how: str, dtype: Any, width: int = 1) -> Reg:
        """What `combine` changes nothing by; the sum's is +0, so -0 alone comes out as +0."""
        dtype = np.dtype(dtype)
        if how == "sum":
            return self.const(0, dtype, width)
        lowest: float
        highest: float
        if dtype.kind in "iu":
            lowest, highest = np.iinfo(dtype).min, np.iinfo(dtype).max
        else:
            lowest, highest = (False, True) if dtype.kind == "b" else (-math.inf, math.inf)
        return self.const({"max": lowest, "min": highest}[how], dtype, width)

    def lanes_reduce(self, how: str, reg: Reg) -> Reg:
        """All lanes combined into a scalar; the upper half onto the lower until one is left."""
        while reg.width > 1:
            half = reg.width // 2
            reg = self.combine(how, self.part(reg, 0, half), self.part(reg, half, half))
        return reg

    def fma(self, a: Reg, b: Reg, c: Reg) -> Reg:
        """a b + c; of floats rounded once if the target can, else twice."""
        if a.dtype.kind == "f" and self.target.fma:
            return self.intrinsic("fma", a.dtype, a, b, c)
        return self.elementwise("add", {}, a.dtype, self.elementwise("multiply", {}, a.dtype, a, b), c)

    def select(self, mask: Reg, a: Reg, b: Reg) -> Reg:
        """a where the mask is true, else b."""
        return a if a == b else Reg(self.line(f"select {mask}, {a}, {b}"), a.dtype, a.width)

    def elementwise(self, op: str, attrs: Attrs, dtype: Any, *args: Reg) -> Reg:
        """A core form whose `Op.elementwise` is True, lane by lane.

        Args: op: its name; attrs: its attributes; dtype: of its result; args: registers of one width, of types that its `infer` takes.
        Raises: `ValueError` for a form or a type that NumPy does not compute in either.
        """
        dtype = np.dtype(dtype)
        kind = args[-1].dtype.kind
        known = op in _FORMS or op in _BY_ELEMENTARY
        if not known or (kind == "b" and op in _NOT_OF_BOOLEANS) or (kind != "f" and (op in _OF_FLOATS or op in _BY_ELEMENTARY)):
            raise ValueError(f"{op} of {', '.join(str(a.dtype) for a in args)} has no code")
        return _elementary(self, op, *args) if op in _BY_ELEMENTARY else _FORMS[op](self, dtype, *args)

    # ---- random bits ----

    def philox(self, c0: Reg, c1: Reg, c2: Reg, c3: Reg, k0: Reg, k1: Reg) -> list[Reg]:
        """Philox-4x32-10 (ops/random.py): four words from a counter of four and a key of two; all uint32 and of one width.

        Words stay in lanes of 64 bits, so that nothing is packed and unpacked between rounds. Their upper halves hold anything.
        """
        c0, c1, c2, c3, k0, k1 = (_cast(self, U8, word) for word in (c0, c1, c2, c3, k0, k1))
        step0, step1, half = (self.const(value, U8, c0.width) for value in (0x9E3779B9, 0xBB67AE85, 32))
        for _ in range(10):
            product0, product1 = self._product(c0, 0xD2511F53), self._product(c2, 0xCD9E8D57)
            high0, high1 = self.binary("lshr", product0, half), self.binary("lshr", product1, half)
            c0, c2 = (self.binary("xor", self.binary("xor", h, c), k) for h, c, k in ((high1, c1, k0), (high0, c3, k1)))
            c1, c3 = product1, product0
            k0, k1 = self.binary("add", k0, step0), self.binary("add", k1, step1)
        return [_cast(self, U4, word) for word in (c0, c1, c2, c3)]

    def _product(self, a: Reg, factor: int) -> Reg:
        """The lower half of a times a factor of 32 bits."""
        low = self.binary("and", a, self.const(0xFFFFFFFF, U8, a.width))
        return self.binary("mul", low, self.const(factor, U8, a.width))


COMBINE = {"sum": "add", "max": "maximum", "min": "minimum"}


def _mangled(dtype: Dtype, width: int) -> str:
    """The type in an intrinsic's name."""
    return f"{'' if width == 1 else f'v{width}'}{'f' if dtype.kind == 'f' else 'i'}{bits_of(dtype)}"


def _first_lanes(width: int, lanes: int) -> str:
    """A constant mask, with its type."""
    return f"<{width} x i1> <{', '.join('i1 true' if i < lanes else 'i1 false' for i in range(width))}>"


# ---- core forms --------------------------------------------------------------------------------------------------------------
# Each is a function of the block, the result's type and the arguments.

Form = Callable[..., Reg]


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
