"""Expressions as a reader writes them: sums, products, functions, with NumPy's broadcasting left to the reader.

In: operations on terms. Out: terms in a normal form in which equal expressions are one object, numbers are exact fractions, like terms
are joined, and what says nothing (x · 1, + 0, axes of length 1 put in and taken out again) is gone.

A term's `shape` is that of the printed expression under NumPy's rules. It may be smaller than the shape of the value that it stands
for, as long as NumPy would broadcast it there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import isfinite, prod
from typing import Any, NamedTuple

import numpy as np

Shape = tuple[int, ...]
LETTERS = "ijklmnopqrsabcdefgh"
COUNTERS = "tsrqpkji"
# What an operator adds to the length of its arguments, where it is no function call.
_OVERHEAD = {"less": 4, "less_equal": 4, "equal": 4, "logical_and": 7, "logical_or": 7, "logical_not": 1, "where": 11, "power": 2}


class Ratio(NamedTuple):
    """A factor. Numerator and denominator are kept apart, so that 2 (a - y) / 4 stays recognisable."""

    num: Fraction
    den: int

    @property
    def value(self) -> Fraction:
        return self.num / self.den

    def __neg__(self) -> Ratio:
        return Ratio(-self.num, self.den)


def ratio(num: Fraction, den: Fraction = Fraction(1)) -> Ratio:
    """num / den with a whole positive denominator; ½ is written as a denominator, a whole quotient is divided out.

    >>> ratio(Fraction(1, 2), Fraction(4)), ratio(Fraction(8), Fraction(4))
    (Ratio(num=Fraction(1, 1), den=8), Ratio(num=Fraction(2, 1), den=1))
    """
    if den < 0:
        num, den = -num, -den
    num, den = num * den.denominator, Fraction(den.numerator)
    if (num.denominator in (2, 4, 8, 16) and abs(num.numerator) == 1) or not _is_decimal(num):
        num, den = Fraction(num.numerator), den * num.denominator
    if num % den == 0:
        num, den = num / den, Fraction(1)
    return Ratio(num, int(den))


ONE, MINUS_ONE, ZERO = Ratio(Fraction(1), 1), Ratio(Fraction(-1), 1), Ratio(Fraction(0), 1)


def _is_decimal(x: Fraction) -> bool:
    rest = x.denominator
    for p in (2, 5):
        while rest % p == 0:
            rest //= p
    return rest == 1


def times(a: Ratio, b: Ratio, precision: float = 1e-14) -> Ratio:
    """a b. A product of decimals that is a plain fraction but for rounding is taken as that."""
    if a == ONE or b == ONE:
        return b if a == ONE else a
    num = a.num * b.num
    if num.denominator > 10**12 and num:
        near = num.limit_denominator(12 if precision > 1e-10 else 1000)
        num = near if abs(near / num - 1) <= precision else num
    return ratio(num, Fraction(a.den * b.den))


def nearest_fraction(x: Any) -> Fraction:
    """The number that a float stands for: 1/6 for the float nearest to it, else the shortest decimal that denotes it.

    >>> nearest_fraction(np.float32(1 / 6)), nearest_fraction(0.1)
    (Fraction(1, 6), Fraction(1, 10))
    """
    decimal = Fraction(str(x))
    if len(str(decimal.numerator)) > 6 and abs(x) > 1e-7:
        near = decimal.limit_denominator(1000) if abs(x) > 1e-3 else Fraction(1, round(1 / abs(x))) * (1 if x > 0 else -1)
        if type(x)(near.numerator / near.denominator) == x:
            return near
    return decimal


def plus(a: Ratio, b: Ratio) -> Ratio:
    """a + b, over a common denominator as it is."""
    if a.den == b.den:
        return ratio(a.num + b.num, Fraction(a.den))
    return ratio(a.num * b.den + b.num * a.den, Fraction(a.den * b.den))


@dataclass(frozen=True)
class Index:
    """The counter of a loop. Loops at one depth over one number of steps share it, so that the backward loop finds h[t] again."""

    level: int
    length: int
    letter: str


@dataclass(eq=False)
class Var:
    """A named value. With `indices` it has one value for each step of these loops.

    role: input, value, gradient, state (carried through a loop), sum (added to in a loop), draw (random), slot, scalar.
    wish: the name it would like; `of`: the value whose gradient it is. kept: not put into its only reader.
    """

    shape: Shape
    kind: str
    role: str = "value"
    wish: str = ""
    indices: tuple[Index, ...] = ()
    of: Var | None = None
    kept: bool = False
    name: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Term:
    """One expression; equal expressions are the same object. kind: "f" real, "i" whole, "b" true or false. weight: about the
    number of characters when printed. loops: the counters it depends on."""

    op: str
    args: tuple[Term, ...]
    attrs: tuple[Any, ...]
    shape: Shape
    kind: str
    weight: int
    loops: frozenset[Index]

    def __repr__(self) -> str:
        return f"<{self.op} {self.attrs} {self.shape}>"


@dataclass(eq=False)
class Function:
    """A named function with its definition: parameters and a term in them. options: those that stand in each call.

    parts: names for what comes up several times in the definition.
    """

    name: str
    options: tuple[tuple[str, Any], ...]
    parameters: tuple[Var, ...]
    definition: Term
    elementwise: bool
    notation: str = ""
    note: str = ""
    parts: tuple[tuple[Var, Term], ...] = ()

    @property
    def terms(self) -> list[Term]:
        return [self.definition, *(t for _, t in self.parts)]


ATOMS = frozenset(("var", "at", "sequence", "const", "index", "special"))
_FOLDED_NAMES = "abs sign floor maximum minimum exp expm1 log log1p sqrt sin cos tan tanh arctan arcsin arccos arccosh"
_FOLDED: dict[str, Any] = {name: getattr(np, name) for name in _FOLDED_NAMES.split()}
_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "less": lambda a, b: bool(a < b),
    "less_equal": lambda a, b: bool(a <= b),
    "equal": lambda a, b: bool(a == b),
}


class Terms:
    """Makes terms. `names`: what a term has been named, so that it is referred to wherever it comes up again.

    taken: names that counters of loops must not have; precision: of the floats that constants come from.
    """

    def __init__(self, taken: Iterable[str] = (), precision: float = 1e-14) -> None:
        self._precision = precision
        self._letters = [c for c in COUNTERS if c not in set(taken)]
        self._known: dict[Any, Term] = {}
        self.names: dict[Term, Term] = {}
        self.one = self.const(1)
        self.zero = self.const(0)

    def make(self, op: str, args: Sequence[Term] = (), attrs: tuple[Any, ...] = (), shape: Shape = (), kind: str = "f",
             weight: int | None = None, key: Any = None, loops: Iterable[Index] = ()) -> Term:  # fmt: skip
        full = (op, attrs, tuple(id(a) for a in args), shape, kind) if key is None else (op, key, kind)
        found = self._known.get(full)
        if found is None:
            if weight is None:
                weight = sum(a.weight for a in args) + _OVERHEAD.get(op, len(op) + 2 * len(args))
            depends = frozenset(loops).union(*(a.loops for a in args))
            found = self._known[full] = Term(op, tuple(args), attrs, shape, kind, weight, depends)
        return found

    # ---- numbers and names ---------------------------------------------------------------------------------------------------

    def const(self, value: Any, kind: str = "f") -> Term:
        """A number. Floats are read as the shortest decimal that denotes them: 0.1 is one tenth."""
        if isinstance(value, (bool, np.bool_)):
            return self.make("special", (), (bool(value),), kind="b", weight=4)
        if isinstance(value, Ratio):
            exact = value
        elif isinstance(value, Fraction):
            exact = ratio(value)
        elif isinstance(value, (int, np.integer)):
            exact = Ratio(Fraction(int(value)), 1)
        elif not isfinite(value):
            return self.make("special", (), (str(float(value)),), kind="f", weight=3)
        else:
            exact = ratio(nearest_fraction(value))
        return self.make("const", (), (exact,), kind=kind, weight=len(number(exact)))

    def var(self, var: Var) -> Term:
        return self.make("var", (), (var,), var.shape, var.kind, len(var.wish) or 3)

    def at(self, var: Var, places: Sequence[tuple[Index | None, int]]) -> Term:
        """The value of `var` at each of `places`: (counter, offset), or (None, step) for a certain step."""
        loops = [ix for ix, _ in places if ix is not None]
        return self.make("at", (), (var, tuple(places)), var.shape, var.kind, 3 * len(places) + 3, loops=loops)

    def reference(self, var: Var) -> Term:
        """`var` where it is defined."""
        return self.at(var, [(ix, 0) for ix in var.indices]) if var.indices else self.var(var)

    def counter(self, level: int, length: int) -> Index:
        """The counter of loops at this depth."""
        return Index(level, length, self._letters[level - 1] if level <= len(self._letters) else f"t{level}")

    def index(self, ix: Index) -> Term:
        return self.make("index", (), (ix,), (), "i", 1, loops=(ix,))

    def _times(self, a: Ratio, b: Ratio) -> Ratio:
        return times(a, b, self._precision)

    # ---- arithmetic ----------------------------------------------------------------------------------------------------------

    def _core(self, t: Term) -> tuple[Ratio, Term]:
        """A term as factor and rest."""
        if t.op == "const":
            return t.attrs[0], self.one
        if t.op == "mul" and t.attrs[0] != ONE:
            return t.attrs[0], self._product(ONE, dict(zip(t.args, t.attrs[1], strict=True)))
        return ONE, t

    def add(self, *parts: tuple[Ratio, Term]) -> Term:
        """Σ factor · term."""
        table: dict[Term, Ratio] = {}
        whole = all(t.kind != "f" for _, t in parts)

        def collect(r: Ratio, t: Term) -> None:
            if t.op == "add" and r in (ONE, MINUS_ONE):
                for inner, each in zip(t.attrs[0], t.args, strict=True):
                    put(self._times(r, inner), each)
                return
            factor, core = self._core(t)
            put(self._times(r, factor), core)

        def put(r: Ratio, core: Term) -> None:
            if core.op == "const":
                r, core = self._times(r, core.attrs[0]), self.one
            table[core] = plus(table[core], r) if core in table else r

        for r, t in parts:
            collect(r, t)
        if self.one in table:  # exp(x) - 1 + 1, as the derivative of expm1 has it
            for core in [t for t in table if t.op == "expm1" and table[t].value == table[self.one].value]:
                del table[self.one]
                put(table.pop(core), self.elementwise("exp", core.args))
                break
        entries = {t: r for t, r in table.items() if r.num != 0}
        if not entries:
            return self.const(0, "i" if whole else "f")
        if len(entries) == 1:
            ((core, r),) = entries.items()
            return self.const(r, "i" if whole else "f") if core is self.one else self.mul((core, 1), by=r)
        args, ratios = tuple(entries), tuple(entries.values())
        weight = sum(a.weight + 3 + (0 if abs(r.num) == r.den else 3) for a, r in zip(args, ratios, strict=True))
        shape = np.broadcast_shapes(*(a.shape for a in args))
        key = frozenset((id(a), r) for a, r in entries.items())
        return self.make("add", args, (ratios,), shape, "i" if whole else "f", weight, key)

    def plus(self, a: Term, b: Term) -> Term:
        return self.add((ONE, a), (ONE, b))

    def minus(self, a: Term, b: Term) -> Term:
        return self.add((ONE, a), (MINUS_ONE, b))

    def negative(self, a: Term) -> Term:
        return self.add((MINUS_ONE, a))

    def mul(self, *factors: tuple[Term, int], by: Ratio = ONE) -> Term:
        """by · Π factor ** exponent."""
        table: dict[Term, int] = {}
        for t, e in factors:
            if t.op == "const" and (t.attrs[0].num != 0 or e > 0):
                value = t.attrs[0] if e > 0 else ratio(Fraction(t.attrs[0].den), t.attrs[0].num)
                for _ in range(abs(e)):
                    by = self._times(by, value)
            elif t.op == "mul":
                if e != 0:
                    r = t.attrs[0] if e > 0 else ratio(Fraction(t.attrs[0].den), t.attrs[0].num)
                    for _ in range(abs(e)):
                        by = self._times(by, r)
                for inner, each in zip(t.args, t.attrs[1], strict=True):
                    table[inner] = table.get(inner, 0) + e * each
            else:
                table[t] = table.get(t, 0) + e
        return self._product(by, table)

    def _product(self, by: Ratio, table: Mapping[Term, int]) -> Term:
        entries = {t: (1 if t.op == "iverson" and e > 0 else e) for t, e in table.items() if e != 0}
        if by.num == 0:
            return self.zero
        if not entries:
            return self.const(by)
        if len(entries) == 1:
            ((t, e),) = entries.items()
            if e == 1 and by == ONE:
                return t
            if e == 1 and t.op == "add" and by == MINUS_ONE:
                return self.add(*((self._times(by, r), each) for r, each in zip(t.attrs[0], t.args, strict=True)))
        args, powers = tuple(entries), tuple(entries.values())
        weight = sum(a.weight + 3 + (2 if a.op in ("add", "contract") else 0) for a in args) + (0 if by == ONE else 3)
        shape = np.broadcast_shapes(*(a.shape for a in args))
        kind = "f" if any(a.kind == "f" for a in args) or by.den != 1 or any(e < 0 for e in powers) else "i"
        return self.make("mul", args, (by, powers), shape, kind, weight, (by, frozenset((id(a), e) for a, e in entries.items())))

    def times(self, *terms: Term) -> Term:
        return self.mul(*((t, 1) for t in terms))

    def over(self, a: Term, b: Term) -> Term:
        return self.mul((a, 1), (b, -1))

    def power(self, a: Term, b: Term) -> Term:
        if b.op == "const":
            value = b.attrs[0].value
            if value.denominator == 1 and abs(value) <= 9 and value != 0:
                return self.mul((a, int(value)))
        return self.elementwise("power", (a, b))

    # ---- elementwise ---------------------------------------------------------------------------------------------------------

    def elementwise(self, op: str, args: Sequence[Term], kind: str = "") -> Term:
        if op == "abs" and args[0].op == "mul" and args[0].attrs[0].num < 0:
            args = (self.negative(args[0]),)
        if all(a.op == "const" for a in args) and op in _FOLDED:
            with np.errstate(all="ignore"):
                value = float(_FOLDED[op](*(float(a.attrs[0].value) for a in args)))
            if value.is_integer() or op in ("abs", "maximum", "minimum"):
                return self.const(value, args[0].kind)
        shape = np.broadcast_shapes(*(a.shape for a in args))
        return self.make(op, args, (), shape, kind or ("f" if any(a.kind == "f" for a in args) else args[0].kind))

    def compare(self, op: str, a: Term, b: Term) -> Term:
        if a.op == b.op == "const":
            return self.const(_COMPARISONS[op](a.attrs[0].value, b.attrs[0].value))
        return self.elementwise(op, (a, b), "b")

    def logical_not(self, c: Term) -> Term:
        if c.op == "logical_not":
            return c.args[0]
        return self.const(not c.attrs[0]) if c.op == "special" else self.elementwise("logical_not", (c,), "b")

    def iverson(self, c: Term) -> Term:
        """1 where c, else 0. A product with it is 0 where c is false, whatever the other factors are."""
        if c.op == "special":
            return self.const(int(c.attrs[0]))
        return self.make("iverson", (c,), (), c.shape, "i", c.weight + 13)

    def where(self, c: Term, a: Term, b: Term) -> Term:
        if c.op == "special":
            return a if c.attrs[0] else b
        if a is b:
            return a
        if a.kind == "b":
            return self.elementwise("where", (c, a, b), "b")
        bound = self._bound(c, a, b)
        if bound is not None:
            return bound
        a, b = self.assume(a, c, True), self.assume(b, c, False)
        if a is b:
            return a
        if _is_number(b, 0):
            return self.times(a, self.iverson(c))
        if _is_number(a, 0):
            return self.times(b, self.iverson(self.logical_not(c)))
        if c.op == "logical_not":
            return self.where(c.args[0], b, a)
        return self.elementwise("where", (c, a, b))

    def _bound(self, c: Term, a: Term, b: Term) -> Term | None:
        """x < k ? k : x is the larger of the two, x > k ? k : x the smaller; NaN stays NaN in both."""
        if c.op in ("less", "less_equal") and b in c.args and a in c.args and a is not b:
            return self.elementwise("maximum" if c.args[0] is b else "minimum", (b, a))
        return None

    def assume(self, t: Term, c: Term, truth: bool) -> Term:
        """`t`, knowing that condition `c` holds, or does not."""
        known = {c: self.const(truth)}
        if c.op in ("less", "less_equal") and any(_is_number(a, 0) for a in c.args):
            x = c.args[1] if _is_number(c.args[0], 0) else c.args[0]
            rising = _is_number(c.args[0], 0) == truth  # x is positive, or at least not negative
            known[self.elementwise("abs", (x,))] = x if rising else self.negative(x)
            known[self.elementwise("maximum", (x, self.zero))] = x if rising else self.zero
            known[self.elementwise("minimum", (x, self.zero))] = self.zero if rising else x
        return self.substitute(t, known)

    # ---- axes ----------------------------------------------------------------------------------------------------------------

    def reduce(self, op: str, t: Term, axes: Sequence[int], keep: bool = False) -> Term:
        """sum, max or min over axes of `t`."""
        if not axes:
            return t
        if op == "sum" and t.op == "mul":
            numbers = [(a, e) for a, e in zip(t.args, t.attrs[1], strict=True) if a.shape == ()]
            if (numbers or t.attrs[0] != ONE) and len(numbers) < len(t.args):
                rest = self.mul(*((a, e) for a, e in zip(t.args, t.attrs[1], strict=True) if a.shape != ()))
                return self.mul((self.reduce(op, rest, axes, keep), 1), *numbers, by=t.attrs[0])
        if op == "sum" and t.op == "sum" and not keep and not t.attrs[1]:
            left = [i for i in range(len(t.args[0].shape)) if i not in t.attrs[0]]
            return self.reduce(op, t.args[0], [*t.attrs[0], *(left[a] for a in axes)])
        gone = tuple(sorted(axes))
        shape = tuple(1 if i in gone else n for i, n in enumerate(t.shape) if keep or i not in gone)
        weight = t.weight + len(op) + (2 if len(gone) == len(t.shape) else 10) + 15 * keep
        return self.make(op, (t,), (gone, keep), shape, t.kind, weight)

    def expand(self, t: Term, spec: Sequence[int | None]) -> Term:
        """Axes of length 1 put in (None) and taken out; the others stay in order: x[:, None]."""
        spec = tuple(spec)
        if spec == tuple(range(len(t.shape))) or t.op in ("const", "special"):
            return t
        if t.op == "expand":
            inner = t.attrs[0]
            return self.expand(t.args[0], [None if s is None else inner[s] for s in spec])
        if t.op in ("sum", "max", "min"):
            (x,), (gone, keep) = t.args, t.attrs
            whole = [i for i in range(len(x.shape)) if i not in gone]
            places = iter(range(len(whole)))
            if not keep and spec == tuple(None if i in gone else next(places) for i in range(len(x.shape))):
                return self.reduce(t.op, x, gone, True)
            if keep and list(spec) == whole:
                return self.reduce(t.op, x, gone, False)
        if t.op in ("add", "mul") and self._absorbs(t, spec):
            return self.rebuild(t, [self.expand(a, spec) if a.shape else a for a in t.args])
        if t.op == "slice":
            bounds, left = list(t.attrs[0]), [i for i, b in enumerate(t.attrs[0]) if b[3]]
            lost = [s for s in range(len(t.shape)) if s not in spec]
            if lost:
                for s in lost:
                    bounds[left[s]] = (*bounds[left[s]][:3], False)
                kept = [s for s in range(len(t.shape)) if s in spec]
                return self.expand(self._slice(t.args[0], tuple(bounds)), [None if s is None else kept.index(s) for s in spec])
        shape = tuple(1 if s is None else t.shape[s] for s in spec)
        return self.make("expand", (t,), (spec,), shape, t.kind, t.weight + 3 * len(spec))

    def _absorbs(self, t: Term, spec: tuple[int | None, ...]) -> bool:
        """Whether the new axes become keepdims of sums, so that no index is left."""
        if t.shape == ():
            return t.op in ATOMS
        if t.op in ("add", "mul"):
            return all(a.shape in (t.shape, ()) and (not a.shape or self._absorbs(a, spec)) for a in t.args)
        return t.op in ("sum", "max", "min") and self.expand(t, spec).op == t.op

    def padded(self, t: Term, ndim: int) -> Term:
        """`t` with axes of length 1 in front, so that it has `ndim`."""
        extra = ndim - len(t.shape)
        return self.expand(t, [*[None] * extra, *range(len(t.shape))]) if extra > 0 else t

    def transpose(self, t: Term, axes: Sequence[int]) -> Term:
        axes = tuple(axes)
        if axes == tuple(range(len(axes))) or t.op in ("const", "special"):
            return t
        if t.op == "transpose":
            inner = t.attrs[0]
            return self.transpose(t.args[0], [inner[a] for a in axes])
        if t.op == "contract":
            left, right, out = t.attrs
            return self.contract(f"{left},{right}->{''.join(out[a] for a in axes)}", *t.args)
        long = [a for a in axes if t.shape[a] != 1]
        if long == sorted(long):
            return self.expand(t, [a if t.shape[a] != 1 else None for a in axes])
        weight = t.weight + (2 if len(axes) == 2 else 14)
        return self.make("transpose", (t,), (axes,), tuple(t.shape[a] for a in axes), t.kind, weight)

    def reshape(self, t: Term, shape: Shape) -> Term:
        if t.shape == shape or t.op in ("const", "special"):
            return t
        if t.op == "reshape":
            return self.reshape(t.args[0], shape)
        if [n for n in t.shape if n != 1] == [n for n in shape if n != 1]:
            places = iter(i for i, n in enumerate(t.shape) if n != 1)
            return self.expand(t, [next(places) if n != 1 else None for n in shape])
        return self.make("reshape", (t,), (shape,), shape, t.kind, t.weight + 14)

    def slice(self, t: Term, start: Shape, stop: Shape, step: Shape) -> Term:
        if t.op in ("const", "special"):
            return t
        return self._slice(t, tuple((a, b, s, True) for a, b, s in zip(start, stop, step, strict=True)))

    def _slice(self, t: Term, bounds: tuple[tuple[int, int, int, bool], ...]) -> Term:
        """bounds: start, stop, step, and whether the axis stays."""
        if all(b == (0, n, 1, True) for b, n in zip(bounds, t.shape, strict=True)):
            return t
        shape = tuple(len(range(a, b, s)) for a, b, s, stays in bounds if stays)
        return self.make("slice", (t,), (bounds,), shape, t.kind, t.weight + 4 * len(bounds))

    def full(self, t: Term, shape: Shape) -> Term:
        """`t` with exactly this shape."""
        if t.shape == shape:
            return t
        if t.op in ("const", "special"):
            return self.make("full", (t,), (shape,), shape, t.kind, t.weight + 12)
        if t.shape == tuple(n for n in shape if n != 1) and prod(t.shape) == prod(shape):
            return self.reshape(t, shape)
        return self.make("broadcast_to", (t,), (shape,), shape, t.kind, t.weight + 22)

    # ---- products over shared axes -------------------------------------------------------------------------------------------

    def contract(self, spec: str, a: Term, b: Term) -> Term:
        """Σ a b by letters; transpositions go into the letters, and what is no matrix product becomes a product or a sum."""
        words, out = spec.split("->")[0].split(","), spec.split("->")[1]
        operands = [a, b]
        for i, t in enumerate(operands):
            if t.op == "transpose":
                operands[i] = t.args[0]
                letters = dict(zip(t.attrs[0], words[i], strict=True))
                words[i] = "".join(letters[k] for k in range(len(words[i])))
        known = dict(zip(dict.fromkeys("".join(words) + out), LETTERS, strict=False))
        left, right, out = ("".join(known[c] for c in w) for w in (*words, out))
        a, b = operands
        summed = [c for c in dict.fromkeys(left + right) if c not in out]
        if not summed:
            a, b = (x.args[0] if x.op == "full" else x for x in (a, b))  # one number for all places needs no places
            return self.times(self._aligned(a, left, out), self._aligned(b, right, out))
        for x, wx, y, wy in ((a, left, b, right), (b, right, a, left)):
            if x.op == "full" and _is_number(x.args[0], 0):
                return self.zero
            if x.op == "full" and set(wx) <= set(summed) & set(wy):  # a sum over all of these places
                made = self.reduce("sum", y, [i for i, c in enumerate(wy) if c in summed])
                rest = [c for c in wy if c in out]
                return self.times(x.args[0], self.transpose(made, [rest.index(c) for c in out]))
            if x.op == "full" and not _is_number(x.args[0], 1):
                ones = self.full(self.one, x.shape)
                return self.times(x.args[0], self.contract(f"{wx},{wy}->{out}", ones, y))
        both = [c for c in summed if c in left and c in right]
        if len(both) != 1 or set(left) == set(right):
            for x, wx, y, wy in ((a, left, b, right), (b, right, a, left)):
                if set(wy) <= set(wx):
                    product = self.times(x, self._aligned(y, wy, wx))
                    made = self.reduce("sum", product, [i for i, c in enumerate(wx) if c not in out])
                    rest = [c for c in wx if c in out]
                    return self.transpose(made, [rest.index(c) for c in out])
        sizes = {**dict(zip(left, a.shape, strict=True)), **dict(zip(right, b.shape, strict=True))}
        shape = tuple(sizes[c] for c in out)
        plain = matrix_product(left, right, out) is not None
        return self.make("contract", (a, b), (left, right, out), shape, a.kind, a.weight + b.weight + (5 if plain else 24))

    def _aligned(self, t: Term, word: str, to: str) -> Term:
        """`t`, whose axes are `word`, so that it broadcasts against axes `to`."""
        if not t.shape:
            return t
        order = sorted(range(len(word)), key=lambda i: to.index(word[i]))
        t = self.transpose(t, order)
        first = min((to.index(c) for c in word), default=len(to))
        places = iter(range(len(word)))
        return self.expand(t, [next(places) if c in word else None for c in to[first:]])

    # ---- rebuilding ----------------------------------------------------------------------------------------------------------

    def rebuild(self, t: Term, args: Sequence[Term]) -> Term:
        """The same operation on other arguments, simplified anew."""
        if all(a is b for a, b in zip(t.args, args, strict=True)):
            return t
        op, attrs = t.op, t.attrs
        if op == "add":
            return self.add(*zip(attrs[0], args, strict=True))
        if op == "mul":
            return self.mul(*zip(args, attrs[1], strict=True), by=attrs[0])
        if op == "where":
            return self.where(*args)
        if op == "iverson":
            return self.iverson(*args)
        if op == "logical_not":
            return self.logical_not(*args)
        if op in _COMPARISONS:
            return self.compare(op, *args)
        if op == "power":
            return self.power(*args)
        if op in ("sum", "max", "min") and args[0].shape == t.args[0].shape:
            return self.reduce(op, args[0], *attrs)
        if any(a.shape != b.shape for a, b in zip(t.args, args, strict=True)):
            if op in ELEMENTWISE or (op == "call" and attrs[0].elementwise):
                return self.make(op, args, attrs, np.broadcast_shapes(*(a.shape for a in args)), t.kind)
            args = [self.full(a, b.shape) for a, b in zip(args, t.args, strict=True)]
        if op == "expand":
            return self.expand(args[0], attrs[0])
        if op == "transpose":
            return self.transpose(args[0], attrs[0])
        if op == "contract":
            return self.contract(f"{attrs[0]},{attrs[1]}->{attrs[2]}", *args)
        return self.make(op, args, attrs, t.shape, t.kind, t.weight + sum(a.weight for a in args) - sum(a.weight for a in t.args))

    def substitute(self, t: Term, known: Mapping[Term, Term]) -> Term:
        """`t` with terms replaced, innermost first."""
        done: dict[Term, Term] = dict(known)
        for each in walk(t):
            if each not in done:
                new = self.rebuild(each, [done[a] for a in each.args])
                done[each] = known.get(new, new)
        return done[t]


_BY_ELEMENT = """less less_equal equal logical_and logical_or logical_not where maximum minimum abs sign exp expm1 log log1p sqrt sin
    cos tan tanh arctan arcsin arccos arccosh floor erf power cast trunc right_shift iverson add mul"""
ELEMENTWISE = frozenset(_BY_ELEMENT.split())


def walk(t: Term) -> list[Term]:
    """All terms within `t`, arguments first."""
    order: list[Term] = []
    seen: set[Term] = set()
    stack = [(t, False)]
    while stack:
        each, ready = stack.pop()
        if ready:
            order.append(each)
        elif each not in seen:
            seen.add(each)
            stack.append((each, True))
            stack.extend((a, False) for a in reversed(each.args) if a not in seen)
    return order


def variables(terms: Iterable[Term]) -> list[Var]:
    """The variables that terms refer to, once for each place."""
    return [each.attrs[0] for t in terms for each in walk(t) if each.op in ("var", "at", "sequence")]


def _is_number(t: Term, value: int) -> bool:
    return t.op == "const" and t.attrs[0].value == value


def number(r: Ratio) -> str:
    """A ratio as a reader writes it.

    >>> number(Ratio(Fraction(1, 10), 1)), number(Ratio(Fraction(2), 3)), number(Ratio(Fraction(-1), 2))
    ('0.1', '2/3', '-0.5')
    """
    value = r.value
    if value.denominator == 1:
        return str(value.numerator) if abs(value) < 10**15 else _decimal(float(value))
    if _is_decimal(value) or abs(value.numerator) > 10**9 or value.denominator > 10**9:
        return _decimal(float(value))
    return f"{value.numerator}/{value.denominator}"


def _decimal(x: float) -> str:
    return repr(x) if len(repr(x)) <= 12 else f"{x:.10g}"


def matrix_product(left: str, right: str, out: str) -> tuple[bool, bool, bool] | None:
    """How a contraction is a matrix product: (operands swapped, first transposed, second transposed); None if it is none.

    >>> matrix_product("ij", "jk", "ik"), matrix_product("ij", "ik", "jk"), matrix_product("ij", "jk", "ki")
    ((False, False, False), (False, True, False), (True, True, True))
    """
    batch = 0
    while batch < min(len(left), len(right), len(out)) and left[batch] == right[batch] == out[batch]:
        batch += 1
    l, r, o = left[batch:], right[batch:], out[batch:]
    if any(c in l + r + o for c in left[:batch]) or len(l) > 2 or len(r) > 2 or (batch and (len(l), len(r)) != (2, 2)):
        return None
    summed = [c for c in l if c in r and c not in o]
    if len(summed) != 1 or len(set(l)) != len(l) or len(set(r)) != len(r):
        return None
    s = summed[0]
    for swapped, first, second in ((False, l, r), (True, r, l)):
        free = first.replace(s, "") + second.replace(s, "")
        if free == o and len(set(free)) == len(free):
            if len(first) == 1 and len(second) == 2 and second[0] != s:
                return (not swapped, False, False)  # x Wᵀ of a vector x is W x
            return (swapped, len(first) == 2 and first[-1] != s, len(second) == 2 and second[0] != s)
    return None
