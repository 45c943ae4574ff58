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
class Carry:
    """A register that goes from one iteration to the next."""

    register: Register
    first: Register
    next: Register


@dataclass(frozen=True, slots=True, eq=False)
class For:
    """variable = first, first + 1, ..., below `last`; the two are numbers, registers or names of parameters; where `last` is a pair,
    the smaller of its two counts. scale: parameters are multiplied by it."""

    variable: Axis
    first: int | str | Register
    last: int | str | tuple[str, int] | Register
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


Statement = Let | Read | Write | For | If | Call


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
            by = f"*{s.scale}" if s.scale > 1 else ""
            last = f"min({s.last[0]}{by}, {s.last[1]})" if isinstance(s.last, tuple) else s.last
            down = " descending" if s.descending else ""
            lines.append(f"{indent}for {s.variable.name} = {s.first}{by}..{last}{down}")
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
        elif isinstance(s, Call):
            lines.append(f"{indent}{s.function}({', '.join(map(str, (s.first, s.last, *(v.name for v in s.variables))))})")
        else:
            lines.append(f"{indent}{_place(s.place)} = {s.value.name}")
    return lines


def _register(r: Register) -> str:
    return f"{r.name}:{r.dtype}" + (f"x{r.width}" if r.width > 1 else "")


def _place(p: Place) -> str:
    more = "".join(f" + {r.name}*{n}" for r, n in p.looked_up)
    lanes = "" if p.lanes == 1 else f", {p.lanes} lanes"
    stride = "" if p.stride == 1 else f", stride {p.stride}"
    return f"{p.buffer.name}[{p.address}{more}{lanes}{stride}]"
