r"""Terms as formulas, for LaTeX and MathML alike.

In: terms and names. Out: a `Box`, a tree of rows, fractions, indices and signs, which `latex` and `mathml` write out:
\delta_0 = (\delta_1 W_1^\top) \odot a_0 \odot (1 - a_0).
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from .equations import Equation, added
from .terms import ONE, Function, Index, Ratio, Term, Terms, Var, matrix_product, number
from .text import bounds, expansion, one_hot, stacked

CHOICE, COMPARE, ADD, SUM, MUL, MATMUL, UNARY, POWER, ATOM = range(9)


@dataclass(frozen=True)
class Box:
    """A piece of a formula. kind: row, number, bold, name (one letter), word (several), sign, space, text, frac, sub, sup, subsup, sqrt,
    abs, paren, bracket, under (a sign with something below), cases, matrix."""

    kind: str
    parts: tuple[Box, ...] = ()
    text: str = ""


def row(*parts: Box) -> Box:
    """Boxes side by side."""
    return parts[0] if len(parts) == 1 else Box("row", parts)


def sign(text: str) -> Box:
    """An operator, a relation, a bracket."""
    return Box("sign", text=text)


def word(text: str) -> Box:
    """A name that is set as it is."""
    return Box("name" if len(text) == 1 else "word", text=text)


def num(text: str) -> Box:
    """A number; 1e-05 becomes a power of ten."""
    if text.startswith("-"):
        return row(sign("-"), num(text[1:]))
    if "/" in text:
        over, _, under = text.partition("/")
        return Box("frac", (num(over), num(under)))
    if "e" in text:
        base, _, exponent = text.partition("e")
        power = Box("sup", (Box("number", text="10"), num(str(int(exponent)))))
        return power if base in ("1", "1.0") else row(Box("number", text=base), sign("·"), power)
    return Box("number", text=text)


GREEK = {
    "α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "varepsilon", "ζ": "zeta", "η": "eta", "θ": "theta", "ι": "iota",
    "κ": "kappa", "λ": "lambda", "μ": "mu", "ν": "nu", "ξ": "xi", "π": "pi", "ρ": "rho", "σ": "sigma", "τ": "tau", "υ": "upsilon",
    "φ": "varphi", "χ": "chi", "ψ": "psi", "ω": "omega", "Γ": "Gamma", "Δ": "Delta", "Θ": "Theta", "Λ": "Lambda", "Ξ": "Xi", "Π": "Pi",
    "Σ": "Sigma", "Φ": "Phi", "Ψ": "Psi", "Ω": "Omega",
}  # fmt: skip


# ---- names -------------------------------------------------------------------------------------------------------------------


def name_box(name: str, steps: Sequence[Box] = ()) -> Box:
    """A name as it is set: W0 as W with index 0, ∂L/∂W0 as a fraction, W2_layer_0 with the index 2.layer.0."""
    if name.startswith("∂L/∂"):
        return Box("frac", (row(sign("∂"), word("L")), row(sign("∂"), name_box(name[4:], steps))))
    if name.startswith("δ") and len(name) > 1 and name[1].isalpha():
        return Box("sub", (word("δ"), name_box(name[1:], steps)))
    power = name.endswith("ᵗ")
    plain = re.fullmatch(r"([^\W\d_]+)(\d*)(?:_(\w+?))?_?", name.removesuffix("ᵗ"))
    if plain is None:
        base: Box = Box("text", text=name)
        low: list[Box] = []
    else:
        letters, digits, rest = plain.groups()
        base = word(letters)
        low = [Box("number", text=digits)] if digits else []
        if rest:
            low = [Box("text", text=f"{digits}.{rest.replace('_', '.')}")] if digits else [name_box(rest)]
    for s in steps:
        low += [*([sign(",")] if low else []), s]
    if power:
        return Box("subsup", (base, row(*low), word("t"))) if low else Box("sup", (base, word("t")))
    return Box("sub", (base, row(*low))) if low else base


def place_box(var: Var, places: Sequence[tuple[Index | None, int]]) -> Box:
    """A variable at certain steps."""
    steps = []
    for ix, k in places:
        if ix is None:
            steps.append(num(str(k)))
        else:
            letter = word(ix.letter)
            steps.append(letter if k == 0 else row(letter, sign("+" if k > 0 else "-"), num(str(abs(k)))))
    if var.role == "sum" and len(steps) == len(var.indices):
        steps.pop()
    return name_box(var.name, steps)


# ---- terms -------------------------------------------------------------------------------------------------------------------

_FUNCTIONS = {"arctan": "arctan", "exp": "exp", "log": "log", "sin": "sin", "cos": "cos", "tanh": "tanh", "erf": "erf", "sign": "sign",
              "tan": "tan", "arcsin": "arcsin", "arccos": "arccos", "arccosh": "arccosh", "maximum": "max",
              "minimum": "min", "trunc": "int"}  # fmt: skip
_SIGNS = {"less": "<", "less_equal": "≤", "equal": "="}
_TURNED = {"less": ">", "less_equal": "≥", "equal": "="}
_NEGATED = {"less": "≥", "less_equal": ">", "equal": "≠"}


class Formula:
    """Sets terms as boxes. definition: within the definition of a function, which may meet arrays of another number of axes."""

    def __init__(self, *, definition: bool = False) -> None:
        self.definition = definition

    def term(self, t: Term, least: int = CHOICE) -> Box:
        """`t`, in parentheses if it binds weaker than `least`."""
        box, level = self._box(t)
        return box if level >= least else Box("paren", (box,))

    def _box(self, t: Term) -> tuple[Box, int]:
        method = getattr(self, f"_{t.op}", None)
        if method is not None:
            made: tuple[Box, int] = method(t)
            return made
        return self._applied(word(_FUNCTIONS.get(t.op, t.op)), t.args), ATOM

    def _applied(self, function: Box, args: Sequence[Term], extra: Sequence[Box] = ()) -> Box:
        inner: list[Box] = []
        for b in (*(self.term(a) for a in args), *extra):
            inner += [sign(","), b] if inner else [b]
        return row(function, Box("paren", (row(*inner),)))

    def _with(self, name: str, options: str) -> Box:
        return Box("sub", (word(name), Box("text", text=options)))

    # ---- atoms ---------------------------------------------------------------------------------------------------------------

    def _const(self, t: Term) -> tuple[Box, int]:
        text = number(t.attrs[0])
        return num(text), UNARY if text.startswith("-") else ATOM

    def _special(self, t: Term) -> tuple[Box, int]:
        text = str(t.attrs[0])
        return (num(text.replace("inf", "∞")) if "inf" in text else word(text.lower())), ATOM

    def _index(self, t: Term) -> tuple[Box, int]:
        return word(t.attrs[0].letter), ATOM

    def _var(self, t: Term) -> tuple[Box, int]:
        return name_box(t.attrs[0].name), ATOM

    def _at(self, t: Term) -> tuple[Box, int]:
        return place_box(*t.attrs), ATOM

    def _sequence(self, t: Term) -> tuple[Box, int]:
        var, offset = t.attrs
        outer = [(ix, 0) for ix in var.indices[:-1]]
        if offset == 0:
            return place_box(var, outer), ATOM
        ix = var.indices[-1]
        return Box("sub", (Box("paren", (place_box(var, [*outer, (ix, offset)]),)), word(ix.letter))), ATOM

    def _pick(self, t: Term) -> tuple[Box, int]:
        ix, axis = t.attrs
        return self._indexed(t.args[0], [*[sign(":")] * axis, word(ix.letter)]), ATOM

    def _indexed(self, t: Term, index: Sequence[Box]) -> Box:
        inner: list[Box] = []
        for b in index:
            inner += [sign(","), b] if inner else [b]
        base = self.term(t, ATOM) if t.op == "var" and not _has_index(t) else Box("paren", (self.term(t),))
        return Box("sub", (base, row(*inner)))

    # ---- arithmetic ----------------------------------------------------------------------------------------------------------

    def _add(self, t: Term) -> tuple[Box, int]:
        parts = [(r.num < 0, self._product(Ratio(abs(r.num), r.den), a)) for r, a in zip(t.attrs[0], t.args, strict=True)]
        first = next((i for i, (negative, _) in enumerate(parts) if not negative), 0)
        parts.insert(0, parts.pop(first))
        out: list[Box] = [sign("-")] if parts[0][0] else []
        for i, (negative, (box, level)) in enumerate(parts):
            if i:
                out.append(sign("-" if negative else "+"))
            out.append(box if level >= SUM else Box("paren", (box,)))
        return row(*out), ADD

    def _mul(self, t: Term) -> tuple[Box, int]:
        r: Ratio = t.attrs[0]
        box, level = self._product(Ratio(abs(r.num), r.den), t)
        if r.num > 0:
            return box, level
        return row(sign("-"), box if level >= MUL else Box("paren", (box,))), min(level, SUM)

    def _product(self, by: Ratio, t: Term) -> tuple[Box, int]:
        """A factor times the product `t`, whose own factor is left out."""
        if t.op == "const":
            return num(number(by)), ATOM
        factors = list(zip(t.args, t.attrs[1], strict=True)) if t.op == "mul" else [(t, 1)]
        if len(factors) == 1 and by == ONE and factors[0][1] == 1:
            return self._box(factors[0][0])
        rest = [(a, e) for a, e in factors if a.op != "iverson"]
        den = by.den
        upper: list[tuple[Box, bool, int]] = []  # box, whether it is a plain number, how strongly it binds
        lower: list[tuple[Box, bool, int]] = []
        for a, e in rest:
            count = prod(a.args[0].shape[i] for i in a.attrs[0]) if a.op == "sum" and e == 1 else 0
            if count > 1 and den % count == 0:
                den //= count
                upper.append((self._mean(a), not a.shape, ATOM))
                continue
            box, level = self._box(a)
            if abs(e) != 1:
                base = box if level >= ATOM and not _is_raised(box) else Box("paren", (box,))
                box, level = Box("sup", (base, num(str(abs(e))))), POWER
            (upper if e > 0 else lower).append((box, not a.shape, level))
        for a, _ in factors:
            if a.op == "iverson":
                upper.append((self._iverson(a)[0], not a.shape, ATOM))
        factor = number(Ratio(by.num, 1)) if by.num != 1 or not upper else ""
        if den != 1:
            lower.insert(0, (num(str(den)), True, ATOM))
        top = self._joined(factor, upper, alone=bool(lower))
        if not lower:
            return top, MUL if len(upper) + bool(factor) > 1 else upper[0][2] if upper else ATOM
        return Box("frac", (top, self._joined("", lower, alone=True))), MUL

    def _joined(self, factor: str, factors: Sequence[tuple[Box, bool, int]], alone: bool) -> Box:
        """Factors side by side: numbers in front, between arrays the sign of the product by elements."""
        ordered = [f for f in factors if f[1]] + [f for f in factors if not f[1]]
        if len(ordered) == 1 and not factor:
            return ordered[0][0] if alone or ordered[0][2] >= MUL else Box("paren", (ordered[0][0],))
        out: list[Box] = [num(factor)] if factor else []
        before = True
        for box, plain, level in ordered:
            if out:
                out.append(Box("space") if before else sign("⊙"))
            out.append(box if level >= UNARY else Box("paren", (box,)))
            before = plain
        return row(*out)

    def _iverson(self, t: Term) -> tuple[Box, int]:
        hot = one_hot(t.args[0])
        return (self._applied(word("onehot"), [hot[0]]) if hot is not None else Box("bracket", (self.term(t.args[0]),))), ATOM

    def _power(self, t: Term) -> tuple[Box, int]:
        base = self.term(t.args[0], ATOM)
        return Box("sup", (Box("paren", (base,)) if _is_raised(base) else base, self.term(t.args[1]))), POWER

    def _contract(self, t: Term) -> tuple[Box, int]:
        left, right, out = t.attrs
        product = matrix_product(left, right, out)
        if product is None:
            return self._applied(self._with("einsum", f"{left},{right}→{out}"), t.args), ATOM
        swapped, first, second = product
        a, b = reversed(t.args) if swapped else t.args
        return row(self._matrix(a, first), Box("space"), self._matrix(b, second)), MATMUL

    def _matrix(self, t: Term, turned: bool) -> Box:
        box = self.term(t, ATOM if turned else POWER)
        return Box("sup", (Box("paren", (box,)) if _is_raised(box) else box, sign("⊤"))) if turned else box

    # ---- tests and choices ---------------------------------------------------------------------------------------------------

    def _compare(self, t: Term, signs: dict[str, str] = _SIGNS, turned: dict[str, str] = _TURNED) -> tuple[Box, int]:
        a, b = t.args
        if a.op == "const" and b.op != "const":
            return row(self.term(b, ADD), sign(turned[t.op]), self.term(a, ADD)), COMPARE
        return row(self.term(a, ADD), sign(signs[t.op]), self.term(b, ADD)), COMPARE

    def _less(self, t: Term) -> tuple[Box, int]:
        return self._compare(t)

    _less_equal = _equal = _less

    def _logical_not(self, t: Term) -> tuple[Box, int]:
        (c,) = t.args
        if c.op in _NEGATED:
            return self._compare(c, _NEGATED, {"less": "≤", "less_equal": "<", "equal": "≠"})
        return row(sign("¬"), self.term(c, ATOM)), UNARY

    def _logical(self, t: Term) -> tuple[Box, int]:
        joint = sign("∧" if t.op == "logical_and" else "∨")
        return row(self._side(t.args[0]), joint, self._side(t.args[1])), COMPARE

    def _side(self, t: Term) -> Box:
        return Box("paren", (self.term(t),)) if t.op in ("logical_and", "logical_or") else self.term(t, COMPARE)

    _logical_and = _logical_or = _logical

    def _where(self, t: Term) -> tuple[Box, int]:
        branches: list[Box] = []
        while t.op == "where":
            branches.append(Box("case", (self.term(t.args[1]), self.term(t.args[0]))))
            t = t.args[2]
        return Box("cases", (*branches, Box("case", (self.term(t),)))), CHOICE

    # ---- functions with a notation of their own ------------------------------------------------------------------------------

    def _expm1(self, t: Term) -> tuple[Box, int]:
        return row(self._applied(word("exp"), t.args), sign("-"), num("1")), ADD

    def _log1p(self, t: Term) -> tuple[Box, int]:
        return row(word("log"), Box("paren", (row(num("1"), *self._after_plus(t.args[0])),))), ATOM

    def _after_plus(self, t: Term) -> list[Box]:
        box = self.term(t, ADD)
        if box.kind == "row" and box.parts[0] == sign("-"):
            return list(box.parts)
        return [sign("+"), box]

    def _sqrt(self, t: Term) -> tuple[Box, int]:
        return Box("sqrt", (self.term(t.args[0]),)), ATOM

    def _abs(self, t: Term) -> tuple[Box, int]:
        return Box("abs", (self.term(t.args[0]),)), ATOM

    def _floor(self, t: Term) -> tuple[Box, int]:
        return row(sign("⌊"), self.term(t.args[0]), sign("⌋")), ATOM

    def _cast(self, t: Term) -> tuple[Box, int]:
        return self._box(t.args[0])

    def _call(self, t: Term) -> tuple[Box, int]:
        function: Function = t.attrs[0]
        return self._applied(function_box(function), t.args, option_boxes(function)), ATOM

    # ---- axes ----------------------------------------------------------------------------------------------------------------

    def _axes(self, t: Term) -> str:
        axes, ndim = t.attrs[0], len(t.args[0].shape)
        if self.definition and axes == (ndim - 1,):
            return "last axis"
        if len(axes) == ndim:
            return ""
        return f"axis {axes[0]}" if len(axes) == 1 else f"axes {', '.join(map(str, axes))}"

    def _reduced(self, symbol: Box, t: Term) -> Box:
        axes = self._axes(t)
        return Box("under", (symbol, Box("text", text=axes))) if axes else symbol

    def _sum(self, t: Term) -> tuple[Box, int]:
        return row(self._reduced(sign("∑"), t), self.term(t.args[0], MUL)), SUM

    def _mean(self, t: Term) -> Box:
        return self._applied(self._reduced(word("mean"), t), t.args)

    def _max(self, t: Term) -> tuple[Box, int]:
        names = {"max": "any", "min": "all"} if t.kind == "b" else {}
        return self._applied(self._reduced(word(names.get(t.op, t.op)), t), t.args), ATOM

    _min = _max

    def _argmax(self, t: Term) -> tuple[Box, int]:
        return self._applied(self._with("argmax", f"axis {t.attrs[0]}"), t.args), ATOM

    def _expand(self, t: Term) -> tuple[Box, int]:
        index = [Box("text", text="new") if i == "None" else sign(i) if i == ":" else num(i) for i in expansion(t)]
        return self._indexed(t.args[0], index), ATOM

    def _slice(self, t: Term) -> tuple[Box, int]:
        return self._indexed(t.args[0], [Box("number", text=b) for b in bounds(t)]), ATOM

    def _transpose(self, t: Term) -> tuple[Box, int]:
        axes = t.attrs[0]
        if len(axes) == 2 or axes == (*range(len(axes) - 2), len(axes) - 1, len(axes) - 2):
            return self._matrix(t.args[0], True), POWER
        return self._applied(self._with("transpose", ", ".join(map(str, axes))), t.args), ATOM

    def _reshape(self, t: Term) -> tuple[Box, int]:
        return self._applied(self._with("reshape", "×".join(map(str, t.shape))), t.args), ATOM

    def _broadcast_to(self, t: Term) -> tuple[Box, int]:
        return self._applied(self._with("spread", "×".join(map(str, t.shape))), t.args), ATOM

    def _full(self, t: Term) -> tuple[Box, int]:
        shape, value = Box("text", text="×".join(map(str, t.shape))), self.term(t.args[0], UNARY)
        if value in (num("0"), num("1")):
            return Box("sub", (Box("bold", text=value.text), shape)), ATOM
        return row(value, Box("space"), Box("sub", (Box("bold", text="1"), shape))), MUL

    def _iota(self, t: Term) -> tuple[Box, int]:
        n = t.attrs[0]
        return Box("paren", (row(num("0"), sign(","), sign("…"), sign(","), num(str(n - 1))),)), ATOM

    def _flip(self, t: Term) -> tuple[Box, int]:
        return self._applied(self._with("flip", f"axis {', '.join(map(str, t.attrs[0]))}"), t.args), ATOM

    def _pad(self, t: Term) -> tuple[Box, int]:
        amounts = [a if a[2] else a[:2] for a in t.attrs[0]]
        fill = t.args[1:] if not (t.args[1].op == "const" and t.args[1].attrs[0].num == 0) else ()
        around = ", ".join(f"({', '.join(map(str, a))})" for a in amounts)
        return self._applied(self._with("pad", around), [t.args[0], *fill]), ATOM

    def _concatenate(self, t: Term) -> tuple[Box, int]:
        parts = stacked(t)
        name = "concatenate" if parts is None else "stack"
        return self._applied(self._with(name, f"axis {t.attrs[0]}"), parts or t.args), ATOM

    def _take(self, t: Term) -> tuple[Box, int]:
        return self._indexed(t.args[0], [*[sign(":")] * t.attrs[0], self.term(t.args[1])]), ATOM

    def _item(self, t: Term) -> tuple[Box, int]:
        return self._indexed(t.args[0], [num(str(t.attrs[0]))]), ATOM

    def _scatter_add(self, t: Term) -> tuple[Box, int]:
        return self._applied(self._with("scatter_add", f"axis {t.attrs[0]}"), t.args), ATOM

    def _window(self, t: Term) -> tuple[Box, int]:
        options = [
            f"{k} {'×'.join(map(str, v))}" for k, v in t.attrs if k not in ("stride", "dilation") or any(n != 1 for n in v)
        ]
        return self._applied(self._with("windows" if t.op == "window" else "fold", ", ".join(options)), t.args), ATOM

    _fold = _window


def _has_index(t: Term) -> bool:
    return name_box(t.attrs[0].name).kind != "name"


def _is_raised(box: Box) -> bool:
    """Whether an exponent at this box would be misread."""
    return box.kind in ("sup", "subsup", "frac") or (box.kind == "row" and len(box.parts) > 1)


def function_box(function: Function) -> Box:
    """A function's name."""
    name = function.notation or function.name
    stem = name.rstrip("'")
    base = word(stem)
    return Box("sup", (base, sign("′"))) if stem != name else base


def option_boxes(function: Function) -> list[Box]:
    """The options that stand in each call of a function."""
    return [Box("text", text=f"{k}={v!r}") for k, v in function.options]


# ---- equations ---------------------------------------------------------------------------------------------------------------


def sides(e: Equation) -> tuple[Box, str, Box]:
    """Left side, sign and right side of an equation. The left side of δ says what it is the gradient of."""
    left = place_box(e.var, e.left)
    if e.var.role == "gradient" and e.var.of is not None and not e.var.name.startswith("∂"):
        left = row(left, sign("="), name_box(f"∂L/∂{e.var.of.name}"))
    formula = Formula()
    if e.mode == "draw":
        return left, "∼", Box("text", text="uniform on [0, 1)")
    if e.mode == "add":
        return left, "+=", formula.term(added(Terms(), e))
    return left, "←" if e.mode == "update" else "=", formula.term(e.term)


def definition_sides(function: Function) -> tuple[Box, Box, list[tuple[Box, Box]]]:
    """Left and right side of a function's definition, and of what it names."""
    formula = Formula(definition=True)
    inner: list[Box] = []
    for b in (*(name_box(p.name) for p in function.parameters), *option_boxes(function)):
        inner += [sign(","), b] if inner else [b]
    left = row(function_box(function), Box("paren", (row(*inner),)))
    return left, formula.term(function.definition), [(name_box(v.name), formula.term(t)) for v, t in function.parts]


# ---- LaTeX -------------------------------------------------------------------------------------------------------------------

_LATEX_SIGNS = {
    "⊙": r"\odot", "⊤": r"\top", "∂": r"\partial", "≤": r"\le", "≥": r"\ge", "≠": r"\ne", "∧": r"\wedge", "∨": r"\vee", "¬": r"\neg",
    "·": r"\cdot", "∞": r"\infty", "←": r"\leftarrow", "∼": r"\sim", "+=": r"\mathrel{+}=", "∑": r"\sum", "…": r"\dots", "′": r"\prime",
    "⌊": r"\lfloor", "⌋": r"\rfloor", ":": "{:}", ",": r",\,",
}  # fmt: skip
_FENCES = {"paren": ("(", ")"), "bracket": ("[", "]"), "abs": ("|", "|")}
_LATEX_FUNCTIONS = frozenset(("exp", "log", "sin", "cos", "tan", "tanh", "arctan", "arcsin", "arccos", "max", "min"))
_TEXT_ESCAPES = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
     "→": r"$\to$", "×": r"$\times$", "−": "-", "·": r"$\cdot$", "…": r"\dots{}", "∂": r"$\partial$",
    "⊙": r"$\odot$", "←": r"$\leftarrow$", "∞": r"$\infty$",
}  # fmt: skip


def latex_text(text: str) -> str:
    """Any text in LaTeX's text mode, in ASCII: what has no macro is written as its code point."""
    out = []
    for c in text:
        if c in _TEXT_ESCAPES:
            out.append(_TEXT_ESCAPES[c])
        elif c in GREEK:
            out.append(f"$\\{GREEK[c]}$")
        elif " " <= c < "\x7f":
            out.append(c)
        elif c.isspace():
            out.append(" ")
        else:
            plain = unicodedata.normalize("NFKD", c).encode("ascii", "ignore").decode()
            out.append("".join(_TEXT_ESCAPES.get(p, p) for p in plain) or f"[U+{ord(c):04X}]")
    return "".join(out)


def latex(box: Box) -> str:
    """A box in LaTeX's math mode."""
    kind, parts = box.kind, box.parts
    if kind == "row":
        return " ".join(latex(p) for p in parts)
    if kind == "number":
        return box.text.replace("∞", r"\infty ").replace(":", "{:}")
    if kind == "bold":
        return rf"\mathbf{{{box.text}}}"
    if kind == "name":
        if box.text in GREEK:
            return f"\\{GREEK[box.text]}"
        return box.text if box.text.isascii() else rf"\text{{{latex_text(box.text)}}}"
    if kind == "word":
        if box.text in _LATEX_FUNCTIONS:
            return f"\\{box.text}"
        if box.text.isascii() and box.text.isalpha():
            return rf"\mathrm{{{box.text}}}"
        return rf"\text{{{latex_text(box.text)}}}"
    if kind == "sign":
        return _LATEX_SIGNS.get(box.text, box.text)
    if kind == "space":
        return r"\,"
    if kind == "text":
        return rf"\text{{{latex_text(box.text)}}}"
    if kind == "frac":
        return rf"\frac{{{latex(parts[0])}}}{{{latex(parts[1])}}}"
    if kind == "sub":
        return f"{_base(parts[0])}_{{{latex(parts[1])}}}"
    if kind == "sup":
        return f"{_base(parts[0])}^{{{latex(parts[1])}}}"
    if kind == "subsup":
        return f"{_base(parts[0])}_{{{latex(parts[1])}}}^{{{latex(parts[2])}}}"
    if kind == "under":
        limits = r"\sum" if parts[0].text == "∑" else rf"\operatorname*{{{parts[0].text}}}"
        return rf"{limits}_{{{latex(parts[1])}}}"
    if kind == "sqrt":
        return rf"\sqrt{{{latex(parts[0])}}}"
    if kind == "case":
        return latex(parts[0]) + (rf" & \text{{if }} {latex(parts[1])}" if len(parts) > 1 else r" & \text{otherwise}")
    if kind == "cases":
        return r"\begin{cases} " + r" \\ ".join(latex(p) for p in parts) + r" \end{cases}"
    if kind == "matrix":
        rows = r" \\ ".join(" & ".join(latex(c) for c in r.parts) for r in parts)
        return rf"\begin{{pmatrix}} {rows} \end{{pmatrix}}"
    left, right = _FENCES[kind]
    return rf"\left{left} {latex(parts[0])} \right{right}"


def _base(box: Box) -> str:
    text = latex(box)
    return text if box.kind in ("name", "word", "number", "paren", "bracket") else f"{{{text}}}"


# ---- MathML ------------------------------------------------------------------------------------------------------------------


_FIRM_SPACE = "\u00a0"


def mathml(box: Box) -> str:
    """A box in MathML Core."""
    kind, parts = box.kind, box.parts
    if kind == "row":
        return f"<mrow>{''.join(mathml(p) for p in parts)}</mrow>"
    if kind == "number":
        return f"<mn>{html.escape(box.text)}</mn>"
    if kind == "bold":
        return f'<mn style="font-weight:bold">{html.escape(box.text)}</mn>'
    if kind in ("name", "word"):
        return f"<mi>{html.escape(box.text)}</mi>"
    if kind == "sign":
        text = {"-": "−", "+=": "+=", "⊤": "⊤"}.get(box.text, box.text)
        if box.text in ("∂", "⊤", "′", "∞"):
            return f'<mi mathvariant="normal">{text}</mi>'
        return f"<mo>{html.escape(text)}</mo>"
    if kind == "space":
        return '<mspace width="0.17em"></mspace>'
    if kind == "text":
        text = html.escape(box.text).replace(" ", _FIRM_SPACE)  # plain ones at the ends would not be shown
        return f"<mtext>{text}</mtext>"
    tags = {"frac": "mfrac", "sub": "msub", "sup": "msup", "subsup": "msubsup", "sqrt": "msqrt"}
    if kind in tags:
        return f"<{tags[kind]}>{''.join(mathml(p) for p in parts)}</{tags[kind]}>"
    if kind == "under":
        symbol = '<mo movablelimits="false">∑</mo>' if parts[0].text == "∑" else mathml(parts[0])
        return f"<munder>{symbol}{mathml(parts[1])}</munder>"
    if kind == "case":
        condition = f"<mtext>if{_FIRM_SPACE}</mtext>{mathml(parts[1])}" if len(parts) > 1 else "<mtext>otherwise</mtext>"
        cell = '<mtd style="text-align:left'
        return f'<mtr>{cell}">{mathml(parts[0])}</mtd>{cell};padding-left:1em">{condition}</mtd></mtr>'
    if kind == "cases":
        return f'<mrow><mo stretchy="true" fence="true">{{</mo><mtable>{"".join(mathml(p) for p in parts)}</mtable></mrow>'
    left, right = _FENCES[kind]
    fence = '<mo fence="true" stretchy="true" lspace="0" rspace="0">'
    return f"<mrow>{fence}{left}</mo>{mathml(parts[0])}{fence}{right}</mo></mrow>"
