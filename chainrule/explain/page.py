r"""A document as LaTeX and as HTML."""

from __future__ import annotations

import html
from collections.abc import Iterator
from typing import Any

import numpy as np

from .document import Document, Part
from .equations import Item, Loop, equations
from .formula import Box, definition_sides, latex_text, mathml, name_box, num, sides
from .formula import latex as math
from .plain import summary
from .text import NOTATION, Text, definition_text, place

_IN_FULL = 48  # elements of an array that is shown in full
_WIDE = 8  # columns of an array that is shown in full

# The remarks on what formulas mean; those on the notation of the text do not apply to them.
_READING = (
    "⊙ and fractions work element by element; a product of arrays without a sign is the matrix product; "
    "[c] is 1 where c holds, else 0"
)


def _remarks(document: Document) -> list[str]:
    """What a reader of the formulas must be told."""
    text = Text()
    for section in document.sections:
        for part in section.parts:
            for e in equations(part.items):
                if e.mode != "draw":
                    text.term(e.term)
    for f in document.functions:
        definition_text(f, text.used)
    kept = [k for k in NOTATION if (k in text.used or k in document.remarks) and k not in ("case", "one_hot")]
    hot = ["onehot(i) has a 1 at place i, and 0 elsewhere"] if "one_hot" in text.used else []
    return [_READING, *hot, *(NOTATION[k] for k in kept), *(r for r in document.remarks if r not in NOTATION)]


def _in_full(value: Any) -> bool:
    return bool(0 < value.size <= _IN_FULL and value.ndim <= 2 and (value.ndim == 0 or value.shape[-1] <= _WIDE))


def _entries(value: Any) -> list[list[str]]:
    rows = np.atleast_2d(value)
    return [[_short(v) for v in r] for r in rows.tolist()]


def _short(v: Any) -> str:
    if isinstance(v, float):
        text = f"{v:.4g}"
        return text if "e" not in text or abs(v) < 1e-4 else f"{v:.6g}"
    return str(v)


# ---- LaTeX -------------------------------------------------------------------------------------------------------------------


def latex(document: Document) -> str:
    """The explanation for a LaTeX document that uses amsmath."""
    out = [rf"\section*{{{latex_text(document.title)}}}"]
    if document.names:
        rows = []
        for n in document.names:
            shape = _latex_shape(n.var.shape) if not n.number else f"$= {math(num(n.number))}$"
            rows.append(rf"${math(name_box(n.var.name))}$ & {shape} & {latex_text(n.about)} \\")
        out.append("\\begin{tabular}{lll}\n" + "\n".join(rows) + "\n\\end{tabular}")
        shown = [(n.var, document.numbers.get(n.var)) for n in document.names if not n.number]
        lines = [rf"& {math(name_box(v.name))} = {_latex_value(np.asarray(value))}" for v, value in shown if value is not None]
        if lines:
            out.append("\\begin{align*}\n" + " \\\\\n".join(lines) + "\n\\end{align*}")
    for section in document.sections:
        out.append(rf"\subsection*{{{latex_text(section.title)}}}")
        out += [latex_text(r) + "\n" for r in section.remarks]
        for part in section.parts:
            if part.heading:
                out.append(rf"\paragraph*{{{latex_text(part.heading)}}}")
            lines = list(_latex_lines(part.items, part, document, 0))
            if lines:
                out.append("\\begin{align*}\n" + " \\\\\n".join(lines) + "\n\\end{align*}")
    if document.after:
        out.append(r"\subsection*{After the first step}")
        lines = [rf"& {math(name_box(n))} && {_latex_value(np.asarray(v))}" for n, v in document.after]
        out.append("\\begin{align*}\n" + " \\\\\n".join(lines) + "\n\\end{align*}")
    out.append(r"\subsection*{Where}")
    lines = []
    for f in document.functions:
        left, right, parts = definition_sides(f)
        note = rf"\quad \text{{({latex_text(f.note)})}}" if f.note else ""
        lines.append(f"{math(left)} &= {math(right)}{note}")
        lines += [rf"& \quad \text{{with }} {math(a)} = {math(b)}" for a, b in parts]
    if lines:
        out.append("\\begin{align*}\n" + " \\\\\n".join(lines) + "\n\\end{align*}")
    out += [latex_text(r) + "\n" for r in _remarks(document)]
    return "\n".join(out).rstrip() + "\n"


def _latex_shape(shape: tuple[int, ...]) -> str:
    product = r" \times ".join(map(str, shape))
    return f"${product}$" if shape else "number"


def _latex_lines(items: list[Item], part: Part, document: Document, depth: int) -> Iterator[str]:
    quad = r"\quad " * depth
    for item in items:
        if isinstance(item, Loop):
            first, last = item.span
            letter = item.index.letter
            yield rf"& {quad}\text{{for }} {letter} = {first}, \dots, {last}{{:}}"
            yield from _latex_lines(item.items, part, document, depth + 1)
            continue
        left, relation, right = sides(item)
        margin = rf"\text{{{_latex_shape(item.var.shape)}}}" if part.shapes else ""
        line = rf"& {quad}{math(left)} {math(Box('sign', text=relation))} {math(right)}" + (f" && {margin}" if margin else "")
        yield line
        value = document.number(item)
        if value is not None:
            yield rf"& {quad}\quad = {_latex_value(np.asarray(value))}"


def _latex_value(value: Any) -> str:
    if value.ndim == 0:
        return math(num(_short(value[()].item())))
    if _in_full(value):
        return math(Box("matrix", tuple(Box("row", tuple(num(v) for v in r)) for r in _entries(value))))
    return rf"\text{{{latex_text(', '.join(f'{k} {v}' for k, v in summary(value)))}}}"


# ---- HTML --------------------------------------------------------------------------------------------------------------------

_STYLE = """
.chainrule-explain{font:15px/1.5 system-ui,sans-serif;max-width:62rem;color:inherit}
.chainrule-explain h2{font-size:1.25em;margin:.2em 0 .6em}
.chainrule-explain h3{font-size:1.05em;margin:1.4em 0 .4em;padding-bottom:.2em;border-bottom:1px solid rgba(128,128,128,.45)}
.chainrule-explain h4{font-size:.95em;margin:1em 0 .2em;font-weight:600;opacity:.85}
.chainrule-explain p{margin:.3em 0}
.chainrule-explain math{font-size:1.12em}
.chainrule-explain .names{border-collapse:collapse}
.chainrule-explain .names td{padding:.1em 1.2em .1em 0;border:0;text-align:left;background:none;vertical-align:top}
.chainrule-explain .eq{max-width:52rem;display:flex;gap:1.5em;align-items:center;padding:.18em 0 .18em .8em}
.chainrule-explain .eq{border-left:3px solid transparent}
.chainrule-explain .eq:hover{border-left-color:rgba(64,128,255,.7)}
.chainrule-explain .formula{overflow:auto hidden;flex:1 1 auto;padding:.25em 0}
.chainrule-explain .shape{opacity:.65;white-space:nowrap;font-size:.86em}
.chainrule-explain .loop{margin-left:1.2em;padding-left:.6em;border-left:2px solid rgba(128,128,128,.35)}
.chainrule-explain .for{padding:.2em 0 0 .8em}
.chainrule-explain .value{margin:.1em 0 .5em 2em;font:12.5px/1.35 ui-monospace,monospace;opacity:.9;overflow-x:auto}
.chainrule-explain .value table{border-collapse:collapse;border-left:1px solid;border-right:1px solid;border-radius:4px}
.chainrule-explain .value td{padding:0 .6em;text-align:right;border:0;background:none}
.chainrule-explain .with{padding-left:2.5em}
.chainrule-explain .about{opacity:.8;font-size:.92em}
""".strip()


def html_page(document: Document) -> str:
    """The explanation as a page that needs nothing else."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">\n'
        f'<meta name="color-scheme" content="light dark"><title>{html.escape(document.title)}</title>\n'
        "<style>:root{color-scheme:light dark}body{margin:2rem auto;padding:0 1.5rem;max-width:62rem}</style></head>\n<body>\n"
        f"{html_fragment(document)}\n</body></html>\n"
    )


def html_fragment(document: Document) -> str:
    """The explanation as a part of a page, such as a notebook's output."""
    out = [f'<div class="chainrule-explain"><style>{_STYLE}</style>', f"<h2>{html.escape(document.title)}</h2>"]
    if document.names:
        rows = []
        for n in document.names:
            value = document.numbers.get(n.var)
            shape = f"= {html.escape(n.number)}" if n.number else _html_shape(n.var.shape)
            shown = _html_value(np.asarray(value)) if value is not None and not n.number else ""
            about = f'<span class="about">{html.escape(n.about)}</span>'
            rows.append(f"<tr><td>{_math(name_box(n.var.name))}</td><td>{shape}</td><td>{about}{shown}</td></tr>")
        out.append(f'<h3>Names</h3><table class="names">{"".join(rows)}</table>')
    for section in document.sections:
        out.append(f"<h3>{html.escape(section.title)}</h3>")
        out += [f'<p class="about">{html.escape(r)}</p>' for r in section.remarks]
        for part in section.parts:
            if part.heading:
                out.append(f"<h4>{html.escape(part.heading)}</h4>")
            out += _html_lines(part.items, part, document)
    if document.after:
        out.append("<h3>After the first step</h3>")
        for name, after in document.after:
            out.append(
                f'<div class="eq"><span class="formula">{_math(name_box(name))}</span></div>{_html_value(np.asarray(after))}'
            )
    out.append("<h3>Where</h3>")
    for f in document.functions:
        left, right, parts = definition_sides(f)
        note = f'<span class="about">{html.escape(f.note)}</span>' if f.note else ""
        out.append(_html_equation(Box("row", (left, Box("sign", text="="), right)), note))
        out += [
            f'<div class="with">{_html_equation(Box("row", (Box("text", text="with "), a, Box("sign", text="="), b)), "")}</div>'
            for a, b in parts
        ]
    out += [f'<p class="about">{html.escape(r)}</p>' for r in _remarks(document)]
    return "\n".join([*out, "</div>"])


def _math(box: Box) -> str:
    return f"<math>{mathml(box)}</math>"


def _html_shape(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape)) if shape else "number"


def _html_equation(box: Box, right: str, label: str = "") -> str:
    title = f' title="{html.escape(label)}"' if label else ""
    formula = f'<span class="formula"{title}><math displaystyle="true">{mathml(box)}</math></span>'
    return f'<div class="eq">{formula}<span class="shape">{right}</span></div>'


def _html_lines(items: list[Item], part: Part, document: Document) -> Iterator[str]:
    for item in items:
        if isinstance(item, Loop):
            first, last = item.span
            counter = Box("row", (Box("name", text=item.index.letter), Box("sign", text="="), num(str(first))))
            yield f'<div class="for">for {_math(counter)} to {_math(num(str(last)))}</div>'
            yield f'<div class="loop">{"".join(_html_lines(item.items, part, document))}</div>'
            continue
        left, relation, right = sides(item)
        margin = _html_shape(item.var.shape) if part.shapes else ""
        label = place(item.var, item.left)
        yield _html_equation(Box("row", (left, Box("sign", text=relation), right)), margin, label)
        value = document.number(item)
        if value is not None:
            yield _html_value(np.asarray(value))


def _html_value(value: Any) -> str:
    if value.ndim == 0:
        return f'<div class="value">= {html.escape(_short(value[()].item()))}</div>'
    if _in_full(value):
        rows = "".join(f"<tr>{''.join(f'<td>{html.escape(v)}</td>' for v in r)}</tr>" for r in _entries(value))
        return f'<div class="value"><table>{rows}</table></div>'
    return f'<div class="value">{html.escape(", ".join(f"{k} {v}" for k, v in summary(value)))}</div>'
