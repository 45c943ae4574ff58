"""Loops over registers: the last form before LLVM IR.

In: nothing. Out: the statements of which a function is made, and their text. Registers hold one number (width 1) or one for each lane.
Addresses are affine in loop variables, which count iterations; what is looked up while running is added to them.

    function = name, parameters, statement*
    statement = for variable from..to carry* { statement* }
              | if parameter > number { statement* }
              | function(from, to, variable*)
              | register = operator register*
              | register = buffer[address], lanes, stride
              | buffer[address] = register, lanes, stride
              | fetch buffer[address]
              | if one of register, lanes* is NaN { statement* }, register = register or register*
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .affine import Affine, Axis
from .kernels import Buffer


@dataclass(frozen=True, slots=True, eq=False)
class Register:
    """Assigned once."""

    name: str
    dtype: np.dtype[Any]
    width: int

    def __repr__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True, eq=False)
class Let:
    """target = op(args)."""

    target: Register
    op: str
    args: tuple[Register, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """Part of a buffer: `lanes` elements, `stride` apart. looked_up: registers that are added to the address, times a factor."""

    buffer: Buffer
    address: Affine
    looked_up: tuple[tuple[Register, int], ...] = ()
    stride: int = 1
    lanes: int = 1


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """Memory to register."""

    target: Register
    place: Place


@dataclass(frozen=True, slots=True, eq=False)
class Write:
    """Register to memory."""

    place: Place
    value: Register


@dataclass(frozen=True, slots=True, eq=False)
class Fetch:
    """Moves memory that will be read soon nearer. No value depends on it."""

    place: Place


@dataclass(frozen=True, slots=True, eq=False)
class Carry:
    """A register that goes from one iteration to the next."""

    register: Register
    first: Register
    next: Register


@dataclass(frozen=True, slots=True)
class Clamped:
    """`at` / `by`, rounded down, but at least 0 and at most `most`."""

    at: Affine
    by: int
    most: int


Bound = int | str | tuple[str, int] | Register | Clamped


@dataclass(frozen=True, slots=True, eq=False)
class For:
    """variable = first, first + 1, ..., below `last`; the two are numbers, names of parameters or registers, a pair the smaller of its two
    counts, or they follow from the variables of loops around. scale: parameters are multiplied by it."""

    variable: Axis
    first: Bound
    last: Bound
    body: list[Statement]
    carries: tuple[Carry, ...] = ()
    results: tuple[Register, ...] = ()  # what the carried registers hold after the last iteration
    descending: bool = False
    scale: int = 1


@dataclass(frozen=True, slots=True, eq=False)
class If:
    """Runs if the parameter `name` is greater than `bound`."""

    name: str
    bound: int
    body: list[Statement]


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """Another function, for the units `first` to `last`, with the variables of enclosing loops. A unit is a number, the name of a
    parameter or affine in those variables."""

    function: str
    first: int | str | Affine
    last: int | str | Affine
    variables: tuple[Axis, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class IfNaN:
    """If one of `tested` is NaN in one of its first lanes (so many), the body runs, and each of `results` is the second of its two
    registers; else it is the first."""

    tested: tuple[tuple[Register, int], ...]
    body: list[Statement]
    results: tuple[tuple[Register, Register, Register], ...]


Statement = Let | Read | Write | Fetch | For | If | IfNaN | Call


@dataclass(slots=True, eq=False)
class Function:
    """Works on the units lo..hi-1; `variables` of enclosing loops are parameters as well."""

    name: str
    variables: tuple[Axis, ...]
    body: list[Statement]


def loops_text(functions: Sequence[Function]) -> str:
    """Functions as text."""
    return "\n\n".join(_function_text(f) for f in functions)


def _function_text(f: Function) -> str:
    parameters = ", ".join(["lo", "hi", *(a.name for a in f.variables)])
    return f"function {f.name}({parameters})\n" + "\n".join(_lines(f.body, "    "))


def _lines(body: Sequence[Statement], indent: str) -> list[str]:
    lines: list[str] = []
    for s in body:
        if isinstance(s, For):
            first, last = _bound(s.first, s.scale), _bound(s.last, s.scale)
            down = " descending" if s.descending else ""
            lines.append(f"{indent}for {s.variable.name} = {first}..{last}{down}")
            lines += [f"{indent}    carry {c.register.name} = {c.first.name}" for c in s.carries]
            lines += _lines(s.body, indent + "    ")
            lines += [f"{indent}    next {c.register.name} = {c.next.name}" for c in s.carries]
            lines += [f"{indent}{r.name} = last {c.register.name}" for r, c in zip(s.results, s.carries, strict=True)]
        elif isinstance(s, If):
            lines.append(f"{indent}if {s.name} > {s.bound}")
            lines += _lines(s.body, indent + "    ")
        elif isinstance(s, Let):
            attrs = "".join(f" {k}={v}" for k, v in s.attrs.items())
            lines.append(f"{indent}{_register(s.target)} = {s.op} {' '.join(a.name for a in s.args)}{attrs}".rstrip())
        elif isinstance(s, Read):
            lines.append(f"{indent}{_register(s.target)} = {_place(s.place)}")
        elif isinstance(s, Fetch):
            lines.append(f"{indent}fetch {_place(s.place)}")
        elif isinstance(s, IfNaN):
            tested = ", ".join(r.name if r.width == 1 else f"{r.name}, {n} lanes" for r, n in s.tested)
            lines += [f"{indent}if NaN is in {tested}", *_lines(s.body, indent + "    ")]
            lines += [f"{indent}{_register(r)} = {first.name} or {second.name}" for r, first, second in s.results]
        elif isinstance(s, Call):
            lines.append(f"{indent}{s.function}({', '.join(map(str, (s.first, s.last, *(v.name for v in s.variables))))})")
        else:
            lines.append(f"{indent}{_place(s.place)} = {s.value.name}")
    return lines


def _bound(b: Bound, scale: int) -> str:
    by = f"*{scale}" if scale > 1 else ""
    if isinstance(b, Clamped):
        return f"clamp({f'({b.at}) / {b.by}' if b.by != 1 else b.at}, 0, {b.most})"
    if isinstance(b, tuple):
        return f"min({b[0]}{by}, {b[1]})"
    return f"{b}{by}" if isinstance(b, str) else str(b)


def _register(r: Register) -> str:
    return f"{r.name}:{r.dtype}" + (f"x{r.width}" if r.width > 1 else "")


def _place(p: Place) -> str:
    more = "".join(f" + {r.name}*{n}" for r, n in p.looked_up)
    lanes = "" if p.lanes == 1 else f", {p.lanes} lanes"
    stride = "" if p.stride == 1 else f", stride {p.stride}"
    return f"{p.buffer.name}[{p.address}{more}{lanes}{stride}]"
