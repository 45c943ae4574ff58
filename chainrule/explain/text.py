"""Terms as plain text that is Python with NumPy's meaning.

In: terms and names. Out: `(δ1 @ W1.T) * a0 * (1 - a0)`. What is not plain NumPy is explained by `NOTATION`.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from .terms import ONE, Function, Index, Ratio, Term, Var, matrix_product, number

COMPARE, OR, AND, ADD, MATMUL, MUL, UNARY, POWER, ATOM = range(9)
_SIGNS = {"less": "<", "less_equal": "<=", "equal": "=="}
_TURNED = {"less": ">", "less_equal": ">=", "equal": "=="}
_NEGATED = {"equal": "!="}
_NAMES = {"cast": "float", "trunc": "int"}

NOTATION = {
    "one_hot": "one_hot(i, n) has a 1 at place i of n, and 0 elsewhere",
    "scatter_add": "scatter_add(a, i, g) is a with each g added at the place i that belongs to it",
    "pad3": "pad(x, ((before, after, between), ...)) puts zeros around the elements of each axis and between them",
    "windows": "windows(x, axes, size) has all windows of x, the place within the window on new last axes; fold adds them back",
    "case": "where(c, a, 0) is a where c holds, and 0 elsewhere, whatever a is there",
    "zero": "a gradient of 0 stays 0 even where it meets an infinite slope",
}

# Names that the text gives a meaning; a variable of such a name is printed with an underscore behind it.
_RESERVED = """abs all any arange arccos arccosh arcsin arctan argmax broadcast_to concatenate cos einsum erf exp expm1 flip float floor
    fold full int log log1p max maximum mean min minimum one_hot ones pad range reshape right_shift scatter_add sign sin sqrt stack sum
    tan tanh transpose where windows zeros True False inf nan and or not for in is if else lambda"""
RESERVED = frozenset(_RESERVED.split())


class Text:
    """Prints terms. definition: within the definition of a function, where the last axis is written as -1. used: what of
    `NOTATION` came up."""

    def __init__(self, *, definition: bool = False) -> None:
        self.definition = definition
        self.used: set[str] = set()

    def term(self, t: Term, least: int = COMPARE) -> str:
        """`t` as text, in parentheses if it binds weaker than `least`."""
        text, level = self._print(t)
        return text if level >= least else f"({text})"

    def _print(self, t: Term) -> tuple[str, int]:
        method = getattr(self, f"_{t.op}", None)
        if method is not None:
            made: tuple[str, int] = method(t)
            return made
        if t.attrs[:1] == ("generic",):
            return self._function(t.op, t.args, t.attrs[1:]), ATOM
        return self._function(_NAMES.get(t.op, t.op), t.args), ATOM

    def _function(self, name: str, args: Sequence[Term], options: Sequence[tuple[str, object]] = ()) -> str:
        return f"{name}({', '.join([*(self.term(a) for a in args), *(f'{k}={v}' for k, v in options)])})"

    # ---- atoms ---------------------------------------------------------------------------------------------------------------

    def _const(self, t: Term) -> tuple[str, int]:
        text = number(t.attrs[0])
        return text, UNARY if text.startswith("-") else MUL if "/" in text else ATOM

    def _special(self, t: Term) -> tuple[str, int]:
        return str(t.attrs[0]), UNARY if str(t.attrs[0]).startswith("-") else ATOM

    def _index(self, t: Term) -> tuple[str, int]:
        return t.attrs[0].letter, ATOM

    def _var(self, t: Term) -> tuple[str, int]:
        return t.attrs[0].name, ATOM

    def _at(self, t: Term) -> tuple[str, int]:
        return place(*t.attrs), ATOM

    def _sequence(self, t: Term) -> tuple[str, int]:
        var, offset = t.attrs
        outer = [(ix, 0) for ix in var.indices[:-1]]
        ix = var.indices[-1]
        if offset == 0:
            return place(var, outer), ATOM
        step = place(var, [*outer, (ix, offset)])
        return f"stack([{step} for {ix.letter} in range({ix.length})])", ATOM

    def _pick(self, t: Term) -> tuple[str, int]:
        ix, axis = t.attrs
        return f"{self.term(t.args[0], ATOM)}[{':, ' * axis}{ix.letter}]", ATOM

    # ---- arithmetic ----------------------------------------------------------------------------------------------------------

    def _add(self, t: Term) -> tuple[str, int]:
        parts = [self._signed(r, a) for r, a in zip(t.attrs[0], t.args, strict=True)]
        first = next((i for i, (negative, _) in enumerate(parts) if not negative), 0)
        parts.insert(0, parts.pop(first))
        text = ("-" if parts[0][0] else "") + parts[0][1]
        return text + "".join(f" {'-' if negative else '+'} {part}" for negative, part in parts[1:]), ADD

    def _signed(self, r: Ratio, t: Term) -> tuple[bool, str]:
        """A part of a sum: whether it is subtracted, and what."""
        if t.op == "const":
            return r.num < 0, number(Ratio(abs(r.num), r.den))
        text, _ = self._product(Ratio(abs(r.num), r.den), *_factors(t))
        return r.num < 0, text

    def _mul(self, t: Term) -> tuple[str, int]:
        r: Ratio = t.attrs[0]
        text, level = self._product(Ratio(abs(r.num), r.den), *_factors(t))
        return (f"-{text}", min(level, MUL)) if r.num < 0 else (text, level)

    def _product(self, by: Ratio, args: Sequence[Term], powers: Sequence[int]) -> tuple[str, int]:
        cases = [a.args[0] for a in args if a.op == "iverson"]
        if cases:
            return self._case(by, args, powers, cases)
        factors = list(zip(args, powers, strict=True))
        if len(factors) == 1 and by == ONE and factors[0][1] == 1:
            return self._print(factors[0][0])
        upper: list[str] = []
        lower: list[str] = []
        den = by.den
        for a, e in factors:
            count = prod(a.args[0].shape[i] for i in a.attrs[0]) if a.op == "sum" and e == 1 else 0
            if count > 1 and den % count == 0:
                den //= count
                upper.append(self._reduced("mean", a))
            elif abs(e) == 1:
                (upper if e > 0 else lower).append(self.term(a, UNARY))
            else:
                (upper if e > 0 else lower).append(f"{self.term(a, ATOM)}**{abs(e)}")
        if by.num != 1 or not upper:
            upper.insert(0, number(Ratio(by.num, 1)))
        if den != 1:
            lower.insert(0, str(den))
        if not lower:
            return " * ".join(upper), MUL if len(upper) > 1 else POWER if "**" in upper[0] else ATOM
        return f"{' * '.join(upper)} / {lower[0] if len(lower) == 1 else '(' + ' * '.join(lower) + ')'}", MUL

    def _case(self, by: Ratio, args: Sequence[Term], powers: Sequence[int], cases: Sequence[Term]) -> tuple[str, int]:
        rest = [(a, e) for a, e in zip(args, powers, strict=True) if a.op != "iverson"]
        hot = one_hot(cases[0]) if len(cases) == 1 and not rest else None
        if hot is not None:
            self.used.add("one_hot")
            text = f"one_hot({self.term(hot[0])}, {hot[1]})"
            if by == ONE:
                return text, ATOM
            upper = text if by.num == 1 else f"{number(Ratio(by.num, 1))} * {text}"
            return upper if by.den == 1 else f"{upper} / {by.den}", MUL
        if rest:
            self.used.add("case")
        value, _ = self._product(by, [a for a, _ in rest], [e for _, e in rest])
        if len(cases) == 1 and cases[0].op == "logical_not" and cases[0].args[0].op != "equal":
            return f"where({self.term(cases[0].args[0])}, 0, {value})", ATOM
        condition = self.term(cases[0]) if len(cases) == 1 else " & ".join(self.term(c, ADD) for c in cases)
        return f"where({condition}, {value}, 0)", ATOM

    def _iverson(self, t: Term) -> tuple[str, int]:
        return self._case(ONE, (t,), (1,), (t.args[0],))

    def _power(self, t: Term) -> tuple[str, int]:
        return f"{self.term(t.args[0], ATOM)}**{self.term(t.args[1], ATOM)}", POWER

    def _contract(self, t: Term) -> tuple[str, int]:
        left, right, out = t.attrs
        product = matrix_product(left, right, out)
        if product is None:
            return f'einsum("{left},{right}->{out}", {self.term(t.args[0])}, {self.term(t.args[1])})', ATOM
        swapped, first, second = product
        a, b = reversed(t.args) if swapped else t.args
        turn = ".T" if len(out) <= 2 else ".mT"
        x = self.term(a, ATOM) + turn if first else self.term(a, POWER)
        y = self.term(b, ATOM) + turn if second else self.term(b, POWER)
        return f"{x} @ {y}", MATMUL

    # ---- tests ---------------------------------------------------------------------------------------------------------------

    def _compare(self, t: Term) -> tuple[str, int]:
        a, b = t.args
        if a.op == "const" and b.op != "const":  # 0 < x is how x > 0 is recorded
            return f"{self.term(b, OR)} {_TURNED[t.op]} {self.term(a, OR)}", COMPARE
        return f"{self.term(a, OR)} {_SIGNS[t.op]} {self.term(b, OR)}", COMPARE

    _less = _less_equal = _equal = _compare

    def _logical_not(self, t: Term) -> tuple[str, int]:
        (c,) = t.args
        if c.op in _NEGATED:
            return f"{self.term(c.args[0], OR)} {_NEGATED[c.op]} {self.term(c.args[1], OR)}", COMPARE
        return f"~{self.term(c, ATOM)}", UNARY

    def _logical_and(self, t: Term) -> tuple[str, int]:
        return " & ".join(self.term(a, AND) for a in t.args), AND

    def _logical_or(self, t: Term) -> tuple[str, int]:
        return " | ".join(self.term(a, AND) for a in t.args), OR

    # ---- axes ----------------------------------------------------------------------------------------------------------------

    def _axes(self, axes: Sequence[int], ndim: int) -> str:
        if self.definition and tuple(axes) == (ndim - 1,):
            return "-1"
        return str(axes[0]) if len(axes) == 1 else str(tuple(axes))

    def _reduced(self, name: str, t: Term) -> str:
        axes, keep = t.attrs
        x = t.args[0]
        whole = len(axes) == len(x.shape) and not (self.definition and len(axes) == 1)
        options = ([] if whole else [f"axis={self._axes(axes, len(x.shape))}"]) + (["keepdims=True"] if keep else [])
        return f"{name}({', '.join([self.term(x), *options])})"

    def _sum(self, t: Term) -> tuple[str, int]:
        return self._reduced("sum", t), ATOM

    def _max(self, t: Term) -> tuple[str, int]:
        return self._reduced("any" if t.kind == "b" else "max", t), ATOM

    def _min(self, t: Term) -> tuple[str, int]:
        return self._reduced("all" if t.kind == "b" else "min", t), ATOM

    def _argmax(self, t: Term) -> tuple[str, int]:
        return f"argmax({self.term(t.args[0])}, axis={self._axes(t.attrs, len(t.args[0].shape))})", ATOM

    def _expand(self, t: Term) -> tuple[str, int]:
        return f"{self.term(t.args[0], ATOM)}[{', '.join(expansion(t))}]", ATOM

    def _slice(self, t: Term) -> tuple[str, int]:
        return f"{self.term(t.args[0], ATOM)}[{', '.join(bounds(t))}]", ATOM

    def _transpose(self, t: Term) -> tuple[str, int]:
        axes = t.attrs[0]
        if len(axes) == 2:
            return f"{self.term(t.args[0], ATOM)}.T", ATOM
        if axes == (*range(len(axes) - 2), len(axes) - 1, len(axes) - 2):
            return f"{self.term(t.args[0], ATOM)}.mT", ATOM
        return f"transpose({self.term(t.args[0])}, {axes})", ATOM

    def _reshape(self, t: Term) -> tuple[str, int]:
        return f"reshape({self.term(t.args[0])}, {t.attrs[0]})", ATOM

    def _broadcast_to(self, t: Term) -> tuple[str, int]:
        return f"broadcast_to({self.term(t.args[0])}, {t.attrs[0]})", ATOM

    def _full(self, t: Term) -> tuple[str, int]:
        value, shape = self.term(t.args[0]), t.attrs[0]
        plain = {"0": "zeros", "1": "ones"}.get(value)
        return (f"{plain}({shape})" if plain else f"full({shape}, {value})"), ATOM

    def _iota(self, t: Term) -> tuple[str, int]:
        return f"arange({t.attrs[0]})", ATOM

    def _flip(self, t: Term) -> tuple[str, int]:
        return f"flip({self.term(t.args[0])}, axis={self._axes(t.attrs[0], len(t.shape))})", ATOM

    def _pad(self, t: Term) -> tuple[str, int]:
        amounts = t.attrs[0]
        if any(a[2] for a in amounts):
            self.used.add("pad3")
        else:
            amounts = tuple(a[:2] for a in amounts)
        fill = "" if t.args[1].op == "const" and t.args[1].attrs[0].num == 0 else f", {self.term(t.args[1])}"
        return f"pad({self.term(t.args[0])}, {amounts}{fill})", ATOM

    def _concatenate(self, t: Term) -> tuple[str, int]:
        (axis,) = t.attrs
        parts = stacked(t)
        name = "concatenate" if parts is None else "stack"
        return f"{name}([{', '.join(self.term(a) for a in parts or t.args)}]{f', axis={axis}' if axis else ''})", ATOM

    def _take(self, t: Term) -> tuple[str, int]:
        return f"{self.term(t.args[0], ATOM)}[{':, ' * t.attrs[0]}{self.term(t.args[1])}]", ATOM

    def _item(self, t: Term) -> tuple[str, int]:
        return f"{self.term(t.args[0], ATOM)}[{t.attrs[0]}]", ATOM

    def _scatter_add(self, t: Term) -> tuple[str, int]:
        self.used.add("scatter_add")
        return self._function("scatter_add", t.args, [("axis", t.attrs[0])] if t.attrs[0] else []), ATOM

    def _window(self, t: Term) -> tuple[str, int]:
        self.used.add("windows")
        options = [(k, v) for k, v in t.attrs if k not in ("stride", "dilation") or any(n != 1 for n in v)]
        options.sort(key=lambda o: o[0] != "shape")
        return self._function("windows" if t.op == "window" else "fold", t.args, options), ATOM

    _fold = _window

    def _call(self, t: Term) -> tuple[str, int]:
        function: Function = t.attrs[0]
        return self._function(function.notation or function.name, t.args, [(k, repr(v)) for k, v in function.options]), ATOM

    def heading(self, function: Function) -> str:
        """The left side of a function's definition."""
        options = [f"{k}={v!r}" for k, v in function.options]
        return f"{function.notation or function.name}({', '.join([*(p.name for p in function.parameters), *options])})"


def definition_text(function: Function, used: set[str] | None = None) -> str:
    """What a function is, with what its definition names. used: of `NOTATION`, is added to."""
    text = Text(definition=True)
    line = f"{text.heading(function)} = {text.term(function.definition)}"
    if function.parts:
        line += " with " + ", ".join(f"{v.name} = {text.term(t)}" for v, t in function.parts)
    if used is not None:
        used |= text.used
    return line


def _factors(t: Term) -> tuple[Sequence[Term], Sequence[int]]:
    return (t.args, t.attrs[1]) if t.op == "mul" else ((t,), (1,))


def place(var: Var, places: Sequence[tuple[Index | None, int]]) -> str:
    """A variable at certain steps: h[t-1]."""
    steps = [str(k) if ix is None else ix.letter + (f"{k:+d}" if k else "") for ix, k in places]
    if var.role == "sum" and len(steps) == len(var.indices):
        steps.pop()
    return f"{var.name}[{', '.join(steps)}]" if steps else var.name


def expansion(t: Term) -> list[str]:
    """The index that puts axes of length 1 in and takes them out."""
    spec, ndim = t.attrs[0], len(t.args[0].shape)
    out: list[str] = []
    at = 0
    for s in spec:
        if s is None:
            out.append("None")
            continue
        out += ["0"] * (s - at) + [":"]
        at = s + 1
    out += ["0"] * (ndim - at)
    while len(out) > 1 and out[-1] == ":":
        out.pop()
    return out


def bounds(t: Term) -> list[str]:
    """The index of a slice."""
    out = []
    for (start, stop, step, stays), n in zip(t.attrs[0], t.args[0].shape, strict=True):
        if not stays:
            out.append(str(start))
            continue
        last = "" if stop >= n else str(stop)
        out.append(f"{start or ''}:{last}" + (f":{step}" if step != 1 else ""))
    while len(out) > 1 and out[-1] == ":":
        out.pop()
    return out


def stacked(t: Term) -> list[Term] | None:
    """What a concatenation stacks on a new axis, or None."""
    (axis,) = t.attrs
    if len(t.args) < 2 or any(a.op != "expand" or len(a.args[0].shape) != len(a.shape) - 1 for a in t.args):
        return None
    if any(a.attrs[0] != (*range(axis), None, *range(axis, len(a.shape) - 1)) for a in t.args):
        return None
    return [a.args[0] for a in t.args]


def one_hot(condition: Term) -> tuple[Term, int] | None:
    """(i, n) if a condition compares i, on a new last axis, with 0, 1, ..., n - 1."""
    if condition.op != "equal":
        return None
    for a, b in (condition.args, condition.args[::-1]):
        if b.op == "iota" and a.op == "expand" and a.attrs[0] == (*range(len(a.args[0].shape)), None):
            return a.args[0], b.attrs[0]
    return None
