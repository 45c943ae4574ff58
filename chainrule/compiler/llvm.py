"""Loops -> LLVM IR text.

In: functions over registers, where buffers lie, the target. Out: one module. A function takes a table of pointers (what driver.py says, and
the caller's buffers), the units it is to do, and the variables of loops around it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .affine import Affine, Axis
from .code import Block, Reg
from .driver import ARENA, PARTED, REPORT
from .kernels import Buffer
from .loops import Bound, Call, Clamped, Fetch, For, Function, If, IfNaN, Let, Place, Read, Register, Statement, Write
from .operators import combine, elementwise, fma, lanes_reduce, neutral, philox
from .target import Target

I8 = np.dtype(np.int64)
BOOL = np.dtype(bool)


@dataclass(frozen=True)
class Layout:
    """Slots of the caller's buffers, and offsets of the others in the arena. twice: those that steps use in turns with another one, by
    what stands in the slot `turn`; parted: those in parts of threads, for which the arena begins elsewhere to each of them."""

    slots: Mapping[Buffer, int]
    offsets: Mapping[Buffer, int]
    twice: Mapping[Buffer, Buffer] = field(default_factory=dict)
    turn: int = 0
    parted: Collection[Buffer] = ()


@dataclass(frozen=True)
class Callee:
    """The name of a function's code, and the buffers that it wants to be told of, in this order."""

    name: str
    buffers: tuple[Buffer, ...]


def _slot(slot: int, line: Callable[[str], str]) -> str:
    place = line(f"getelementptr ptr, ptr %table, i64 {slot}")
    return line(f"load ptr, ptr {place}, align 8")


class Module:
    """Functions, and what they need beside them."""

    def __init__(self, layout: Layout, target: Target, inline: bool = False) -> None:
        self.layout, self.target = layout, target
        self.inlining = "alwaysinline" if inline else "noinline"  # of functions into the entry
        self.declarations: set[str] = set()
        self.helpers: dict[str, str] = {}
        self.functions: list[str] = []
        self.known: dict[str, Callee] = {}
        self._bodies: dict[str, str] = {}
        self.checks = False  # whether an index is looked at while running

    def add(self, function: Function) -> None:
        """A function that others may call by its name. Kernels that are the same but for where their buffers lie are made once: where
        they lie is an argument."""
        writer = _Writer(self, function)
        lines = writer.write()
        self.declarations |= writer.b.declarations
        self.helpers.update(writer.b.helpers)
        buffers = [f"ptr noalias %b{i}" for i in range(len(writer.buffers))]
        parameters = ", ".join(
            ["ptr %table", "i64 %lo", "i64 %hi", *(f"i64 %t{i}" for i in range(len(function.variables))), *buffers]
        )
        body = "\n".join([f"({parameters}) {self.inlining} nounwind {self.attributes} {{\nentry:", *lines, "  ret void", "}"])
        if body not in self._bodies:
            self._bodies[body] = function.name
            self.functions.append(f"define internal void @{function.name}{body}")
        self.known[function.name] = Callee(self._bodies[body], tuple(writer.buffers))

    def add_alike(self, name: str, first: str, table: Mapping[Buffer, Buffer]) -> None:
        """A function that does what `first` does, with other buffers."""
        callee = self.known[first]
        self.known[name] = Callee(callee.name, tuple(table[b] for b in callee.buffers))

    def pointer(self, buffer: Buffer, line: Callable[[str], str], known: dict[Any, str]) -> str:
        """Where a buffer lies, from the table of pointers."""
        if buffer not in known:
            layout = self.layout
            if buffer in layout.slots:
                known[buffer] = _slot(layout.slots[buffer], line)
            else:
                arena, slot = ("parted", PARTED) if buffer in layout.parted else ("arena", ARENA)
                if arena not in known:
                    known[arena] = _slot(slot, line)
                known[buffer] = line(f"getelementptr i8, ptr {known[arena]}, i64 {layout.offsets[buffer]}")
            if buffer in layout.twice:
                if "turn" not in known:
                    known["turn"] = line(f"icmp ne ptr {_slot(layout.turn, line)}, null")
                other = self.pointer(layout.twice[buffer], line, known)
                known[buffer] = line(f"select i1 {known['turn']}, ptr {other}, ptr {known[buffer]}")
        return known[buffer]

    @property
    def attributes(self) -> str:
        bits = self.target.vector_bytes * 8
        return f'"prefer-vector-width"="{bits}" "min-legal-vector-width"="{bits}"'

    def text(self, *more: str) -> str:
        parts = [*sorted(self.declarations), *self.helpers.values(), *self.functions, *more]
        return "\n".join([f'target triple = "{self.target.triple}"', *parts]) + "\n"


class _Writer:
    def __init__(self, module: Module, function: Function) -> None:
        self.module, self.function = module, function
        self.b = Block(module.target)
        self.registers: dict[Register, Reg] = {}
        self.variables: dict[Axis, str] = {a: f"%t{i}" for i, a in enumerate(function.variables)}
        self.known: list[dict[Any, Any]] = [{}]
        self.buffers: dict[Buffer, str] = {}

    def write(self) -> list[str]:
        self.body(self.function.body)
        return self.b.lines

    def body(self, statements: Sequence[Statement]) -> None:
        for s in statements:
            if isinstance(s, For):
                self._for(s)
            elif isinstance(s, If):
                self._if(s)
            elif isinstance(s, Let):
                self.registers[s.target] = self._let(s)
            elif isinstance(s, Read):
                r, p = s.target, s.place
                stride = p.stride if r.width > 1 else 1
                self.registers[r] = self.b.load(
                    self._pointer(p), r.dtype, r.width, lanes=p.lanes if r.width > 1 else 1, stride=stride
                )
            elif isinstance(s, Write):
                value, p = self.registers[s.value], s.place
                stride = p.stride if value.width > 1 else 1
                self.b.store(self._pointer(p), value, lanes=p.lanes if value.width > 1 else 1, stride=stride)
            elif isinstance(s, Fetch):
                self.b.fetch(self._pointer(s.place))
            elif isinstance(s, IfNaN):
                self._if_nan(s)
            else:
                self._call(s)

    # ---- memory --------------------------------------------------------------------------------------------------------------

    def _memo(self, key: Any, make: Callable[[], Any]) -> Any:
        """Made once, where it is first needed; known from there on inwards."""
        for scope in self.known:
            if key in scope:
                return scope[key]
        made = self.known[-1][key] = make()
        return made

    def _pointer(self, p: Place) -> str:
        b = self.b
        size = p.buffer.dtype.itemsize
        base = self._base(p.buffer)

        def moved() -> str:
            text = base
            for axis, c in p.address.terms:
                text = b.line(f"getelementptr i8, ptr {text}, i64 {self._times(self.variables[axis], c * size)}")
            return text

        text = self._memo(("moved", p.buffer, p.address.terms), moved)
        for r, factor in p.looked_up:
            text = b.line(f"getelementptr i8, ptr {text}, i64 {self._times(self.registers[r].text, factor * size)}")
        return b.at(text, p.buffer.dtype, p.address.constant)

    def _base(self, buffer: Buffer) -> str:
        return self.buffers.setdefault(buffer, f"%b{len(self.buffers)}")

    def _times(self, text: str, factor: int) -> str:
        return text if factor == 1 else self.b.line(f"mul nsw i64 {text}, {factor}")

    def _affine(self, a: Affine) -> Reg:
        total = str(a.constant)
        for axis, c in a.terms:
            total = self.b.line(f"add nsw i64 {total}, {self._times(self.variables[axis], c)}")
        return Reg(total, I8, 1)

    # ---- control -------------------------------------------------------------------------------------------------------------

    def _number(self, n: Bound | Affine, scale: int = 1) -> str:
        if isinstance(n, Clamped):
            return self._clamped(n)
        if isinstance(n, tuple):
            name, bound = n
            value = self._times(f"%{name}", scale)
            less = self.b.line(f"icmp slt i64 {value}, {bound}")
            return self.b.line(f"select i1 {less}, i64 {value}, i64 {bound}")
        if isinstance(n, Register):
            return self.registers[n].text
        if isinstance(n, Affine):
            return self._affine(n).text
        return self._times(f"%{n}", scale) if isinstance(n, str) else str(n)

    def _clamped(self, n: Clamped) -> str:
        line = self.b.line
        at = self._affine(n.at).text
        at = line(f"select i1 {line(f'icmp sgt i64 {at}, 0')}, i64 {at}, i64 0")
        at = at if n.by == 1 else line(f"udiv i64 {at}, {n.by}")
        return line(f"select i1 {line(f'icmp slt i64 {at}, {n.most}')}, i64 {at}, i64 {n.most}")

    def _for(self, s: For) -> None:
        b = self.b
        first, last = self._number(s.first, s.scale), self._number(s.last, s.scale)
        head, out = b.fresh_label(), b.fresh_label()
        guarded = not (isinstance(s.first, int) and isinstance(s.last, int))
        before = b.label
        if guarded:
            some = b.line(f"icmp slt i64 {first}, {last}")
            b.do(f"br i1 {some}, label %{head}, label %{out}")
        else:
            b.do(f"br label %{head}")
        b.start(head)
        counter = b.name()
        at = len(b.lines)
        b.lines.append("")
        phis = []
        for c in s.carries:
            reg = self.registers[c.first]
            self.registers[c.register] = Reg(b.name(), reg.dtype, reg.width)
            phis.append(len(b.lines))
            b.lines.append("")
        self.variables[s.variable] = counter
        if s.descending:
            top = str(s.last - 1) if isinstance(s.last, int) else b.line(f"sub nsw i64 {last}, 1")
            sum_ = top if s.first == 0 else b.line(f"add nsw i64 {top}, {first}")  # of the counter and the variable
            self.variables[s.variable] = b.line(f"sub nsw i64 {sum_}, {counter}")
        self.known.append({})
        self.body(s.body)
        self.known.pop()
        end = b.label
        following = b.line(f"add nuw nsw i64 {counter}, 1")
        again = b.line(f"icmp slt i64 {following}, {last}")
        b.do(f"br i1 {again}, label %{head}, label %{out}")
        b.lines[at] = f"  {counter} = phi i64 [ {first}, %{before} ], [ {following}, %{end} ]"
        for line, c in zip(phis, s.carries, strict=True):
            one, new = self.registers[c.first], self.registers[c.next]
            reg = self.registers[c.register]
            b.lines[line] = f"  {reg.text} = phi {reg.type} [ {one.text}, %{before} ], [ {new.text}, %{end} ]"
        b.start(out)
        for r, c in zip(s.results, s.carries, strict=True):
            one, new = self.registers[c.first], self.registers[c.next]
            self.registers[r] = new
            if guarded:  # there may have been no iteration
                text = b.line(f"phi {new.type} [ {one.text}, %{before} ], [ {new.text}, %{end} ]")
                self.registers[r] = Reg(text, new.dtype, new.width)

    def _if(self, s: If) -> None:
        b = self.b
        inside, out = b.fresh_label(), b.fresh_label()
        test = b.line(f"icmp sgt i64 %{s.name}, {s.bound}")
        b.do(f"br i1 {test}, label %{inside}, label %{out}")
        b.start(inside)
        self.known.append({})
        self.body(s.body)
        self.known.pop()
        b.do(f"br label %{out}")
        b.start(out)

    def _if_nan(self, s: IfNaN) -> None:
        b = self.b
        inside, out = b.fresh_label(), b.fresh_label()
        b.do(f"br i1 {b.any_nan([(self.registers[r], n) for r, n in s.tested])}, label %{inside}, label %{out}")
        before = b.label
        b.start(inside)
        self.known.append({})
        self.body(s.body)
        self.known.pop()
        end = b.label
        b.do(f"br label %{out}")
        b.start(out)
        for result, first, second in s.results:
            one, other = self.registers[first], self.registers[second]
            text = b.line(f"phi {one.type} [ {one.text}, %{before} ], [ {other.text}, %{end} ]")
            self.registers[result] = Reg(text, one.dtype, one.width)

    def _call(self, s: Call) -> None:
        units = [f"i64 {self._number(n)}" for n in (s.first, s.last)]
        variables = [f"i64 {self.variables[a]}" for a in s.variables]
        callee = self.module.known[s.function]
        buffers = [f"ptr {self._base(b)}" for b in callee.buffers]
        self.b.do(f"call void @{callee.name}({', '.join(['ptr %table', *units, *variables, *buffers])})")

    # ---- registers -----------------------------------------------------------------------------------------------------------

    def _let(self, s: Let) -> Reg:
        b, dtype, width = self.b, s.target.dtype, s.target.width
        args = [self.registers[a] for a in s.args]
        if s.op == "constant":
            return b.const(s.attrs["value"], dtype, width)
        if s.op == "splat":
            return b.splat(args[0], width)
        if s.op == "neutral":
            return neutral(b, s.attrs["how"], dtype, width)
        if s.op == "combine":
            return combine(b, s.attrs["how"], *args)
        if s.op == "lanes":
            return lanes_reduce(b, s.attrs["how"], args[0])
        if s.op == "fma":
            return fma(b, *args)
        if s.op == "keep":
            lanes = s.attrs["lanes"]
            mask = ", ".join(f"i1 {'true' if i < lanes else 'false'}" for i in range(width))
            return b.select(Reg(f"<{mask}>", BOOL, width), args[0], neutral(b, s.attrs["how"], dtype, width))
        if s.op == "iota":
            return self._iota(s, dtype, width)
        if s.op == "philox":
            return self._philox(s, args, width)
        if s.op == "transposed":
            lines: list[Reg] = self._memo(("transposed", *s.args), lambda: b.transpose(args))
            line: Reg = lines[s.attrs["line"]]
            return line
        if s.op == "checked":
            return self._checked(s, args[0])
        return elementwise(b, s.op, s.attrs, dtype, *args)

    def _iota(self, s: Let, dtype: np.dtype[Any], width: int) -> Reg:
        b = self.b
        reg = self._affine(s.attrs["address"])
        if width > 1:
            steps = elementwise(b, "multiply", {}, I8, b.iota(I8, width), b.const(s.attrs["stride"], I8, width))
            reg = elementwise(b, "add", {}, I8, b.splat(reg, width), steps)
        return reg if dtype == I8 else elementwise(b, "cast", {"dtype": dtype}, dtype, reg)

    def _philox(self, s: Let, args: Sequence[Reg], width: int) -> Reg:
        key0, key1, offset, at, row = args
        stream = self.b.const(s.attrs["stream"], np.dtype(np.uint32), width)
        words = self._memo(("philox", *s.args, s.attrs["stream"]), lambda: philox(self.b, at, row, offset, stream, key0, key1))
        word: Reg = words[s.attrs["word"]]
        return word

    def _checked(self, s: Let, index: Reg) -> Reg:
        """An index in range. One that is not becomes 0, and is reported."""
        b = self.b
        extent = s.attrs["extent"]
        self.module.checks = True
        wide = index if index.dtype == I8 else elementwise(b, "cast", {"dtype": I8}, I8, index)
        at = wide.text
        if s.attrs["negative"]:
            below = b.line(f"icmp slt i64 {at}, 0")
            moved = b.line(f"add i64 {at}, {extent}")
            at = b.line(f"select i1 {below}, i64 {moved}, i64 {at}")
        good = b.line(f"icmp ult i64 {at}, {extent}")
        bad, out = b.fresh_label(), b.fresh_label()
        b.do(f"br i1 {good}, label %{out}, label %{bad}")
        b.start(bad)
        b.do(f"store atomic i64 1, ptr {_slot(REPORT, b.line)} monotonic, align 8")
        b.do(f"br label %{out}")
        b.start(out)
        return Reg(b.line(f"select i1 {good}, i64 {at}, i64 0"), I8, 1)
