"""A document as plain text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from .document import Document
from .equations import Equation, Item, Loop, added
from .terms import Terms
from .text import NOTATION, Text, definition_text, place

_LARGE = 48  # arrays with more elements than this are summed up


def plain_text(document: Document) -> str:
    """The whole explanation."""
    text = Text()
    blocks = [document.title]
    if document.names:
        width = max(len(n.var.name) for n in document.names) + 2
        rows = [
            f"  {n.var.name:<{width}} {shape_text(n.var.shape) if not n.number else '= ' + n.number:<12} {n.about}".rstrip()
            for n in document.names
        ]
        if document.numbers:
            shown = zip(rows, document.names, strict=True)
            rows = [
                line for row, n in shown for line in (row, *([] if n.number else _value(document.numbers.get(n.var), "    ")))
            ]
        blocks.append("\n".join(["Names", *rows]))
    for section in document.sections:
        lines: list[tuple[str, str, Any]] = []
        for part in section.parts:
            if part.heading:
                lines.append((f"  {part.heading}", "", None))
            made = _lines(part.items, text, document, "    " if part.heading else "  ")
            lines += made if part.shapes else ((left, "", value) for left, _, value in made)
        blocks.append("\n".join([section.title, *(f"  {r}" for r in section.remarks), *_aligned(lines)]))
    if document.after:
        rows = []
        for name, value in document.after:
            rows += [f"  {name}", *_value(value, "    ")]
        blocks.append("\n".join(["After the first step", *rows]))
    definitions = []
    for function in document.functions:
        line = f"  {definition_text(function, text.used)}"
        definitions.append(line + (f"    ({function.note})" if function.note else ""))
    remarks = [f"  {NOTATION[k]}" for k in NOTATION if k in text.used or k in document.remarks]
    remarks += [f"  {r}" for r in document.remarks if r not in NOTATION]
    if definitions or remarks:
        blocks.append("\n".join(["Where", *definitions, *remarks]))
    return "\n\n".join(blocks)


def _aligned(lines: list[tuple[str, str, Any]]) -> list[str]:
    """Shapes in one column, as long as the equations are not too long for it."""
    column = max((len(left) for left, right, _ in lines if right and len(left) <= 96), default=0) + 2
    out = []
    for left, right, value in lines:
        out.append(f"{left:<{column - 2}}  {right}".rstrip() if right else left)
        if value is not None:
            indent = " " * (len(left) - len(left.lstrip()) + 2)
            out += _value(value, indent)
    return out


def _lines(items: list[Item], text: Text, document: Document, indent: str) -> Iterator[tuple[str, str, Any]]:
    for item in items:
        if isinstance(item, Loop):
            first, last = item.span
            yield f"{indent}for {item.index.letter} = {first} … {last}:", "", None
            yield from _lines(item.items, text, document, indent + "    ")
            continue
        yield f"{indent}{equation_text(item, text)}", _margin(item), document.number(item)


def _value(value: Any, indent: str) -> list[str]:
    return [] if value is None else [indent + row for row in array_text(value).splitlines()]


def equation_text(e: Equation, text: Text) -> str:
    """One equation."""
    left = place(e.var, e.left)
    if e.mode == "draw":
        return f"{left} ~ uniform[0, 1)"
    if e.mode == "add":
        return f"{left} += {text.term(added(Terms(), e))}"
    return f"{left} {'←' if e.mode == 'update' else '='} {text.term(e.term)}"


def _margin(e: Equation) -> str:
    shape = shape_text(e.var.shape)
    if e.var.role == "gradient" and e.var.of is not None and not e.var.name.startswith("∂"):
        return f"{shape}  ∂L/∂{e.var.of.name}"
    return shape


def shape_text(shape: tuple[int, ...]) -> str:
    """A shape for the margin."""
    return str(shape) if shape else "number"


def array_text(value: Any) -> str:
    """Small arrays in full, large ones by what is typical of them."""
    value = np.asarray(value)
    if value.size <= _LARGE:
        if value.dtype.kind == "f":
            plain = bool(np.all(np.abs(value[np.isfinite(value)]) < 1e6))
            return np.array2string(value, precision=6, suppress_small=plain, max_line_width=110)
        return np.array2string(value, max_line_width=110)
    return ", ".join(f"{k} {v}" for k, v in summary(value))


def summary(value: Any) -> list[tuple[str, str]]:
    """A large array in a few numbers."""
    real = np.asarray(value, np.float64)
    return [
        ("mean", f"{real.mean():.6g}"),
        ("norm", f"{np.sqrt(np.sum(real * real)):.6g}"),
        ("least", f"{real.min():.6g}"),
        ("largest", f"{real.max():.6g}"),
    ]
