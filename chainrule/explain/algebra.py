"""Two simplifications that need a look at the whole expression.

In: a term. Out: an equal one. `merge_cases` drops a distinction of cases that makes no difference: where(x >= 0, 1, e) / (1 + e) with
e = exp(-|x|), which does not overflow, is 1 / (1 + exp(-x)) in exact arithmetic. `factored` takes out what all parts of a sum share.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import numpy as np

from .terms import ATOMS, ELEMENTWISE, ONE, Ratio, Term, Terms, Var, times, walk
from .values import Values

_MOST_CASES = 3
_LONGEST = 400
_CASES = "where iverson abs sign maximum minimum floor less less_equal equal trunc"
_WITH_CASES = frozenset(_CASES.split())


def merge_cases(terms: Terms, t: Term) -> Term:
    """`t` without distinctions of cases whose two sides are the same function."""
    if not any(e.op in _WITH_CASES or (e.op == "call" and _elementwise(e)) for e in walk(t)):
        return t
    if t.weight <= _LONGEST and _elementwise(t):
        merged = _merged(terms, t, _MOST_CASES)
        if merged is not None:
            return merged
    return terms.rebuild(t, [merge_cases(terms, a) for a in t.args])


def _elementwise(t: Term) -> bool:
    return t.op in ELEMENTWISE or (t.op == "call" and t.attrs[0].elementwise)


def _parts(t: Term) -> Iterator[Term]:
    """The terms that `t` is made of element by element, down to those that are not."""
    stack, seen = [t], {t}
    while stack:
        each = stack.pop()
        yield each
        if _elementwise(each):
            for a in each.args:
                if a not in seen:
                    seen.add(a)
                    stack.append(a)


def _conditions(terms: Terms, t: Term) -> list[Term]:
    found: dict[Term, None] = {}
    for e in _parts(t):
        if e.op in ("where", "iverson"):
            c = e.args[0]
            found[c.args[0] if c.op == "logical_not" else c] = None
    for e in _parts(t):
        if e.op == "abs" or (e.op in ("maximum", "minimum") and terms.zero in e.args):
            x = next((a for a in e.args if a is not terms.zero), terms.zero)
            if not any(c.op in ("less", "less_equal") and terms.zero in c.args and x in c.args for c in found):
                found[terms.compare("less", terms.zero, x)] = None
    return list(found)


def _merged(terms: Terms, t: Term, depth: int) -> Term | None:
    """`t` without cases, or None."""
    conditions = _conditions(terms, t)
    if not conditions:
        return None if any(e.op in _WITH_CASES for e in _parts(t)) else t
    if depth == 0:
        return None
    for c in conditions:
        sides = [_merged(terms, terms.assume(t, c, truth), depth - 1) for truth in (True, False)]
        if sides[0] is not None and sides[1] is not None and _same(terms, sides[0], sides[1]):
            return min((s for s in sides if s is not None), key=lambda s: s.weight)
    return None


def _same(terms: Terms, a: Term, b: Term) -> bool:
    """Whether two terms without cases are one analytic function: they agree at many random points."""
    if a is b:
        return True
    random = np.random.Generator(np.random.Philox(0))
    leaves = dict.fromkeys(e for s in (a, b) for e in _parts(s) if not _elementwise(e) and e.op not in ("const", "special"))
    points = {e: random.normal(0, 1.5, 32) for e in leaves}
    values = _At(terms, points)
    with np.errstate(all="ignore"):
        x, y = np.broadcast_arrays(values.at(a), values.at(b), np.zeros(32))[:2]
    fine = np.isfinite(x)
    return bool(fine.sum() >= 12 and np.array_equal(fine, np.isfinite(y)) and np.allclose(x[fine], y[fine], rtol=1e-9, atol=1e-9))


class _At(Values):
    """Terms with their leaves at given points."""

    def __init__(self, terms: Terms, points: dict[Term, np.ndarray]) -> None:
        super().__init__(terms, {})
        self._points = points

    def at(self, t: Term) -> np.ndarray:
        done: dict[Term, np.ndarray] = dict(self._points)
        order = [e for e in walk(t) if e not in done]
        wanted = set(_parts(t))
        for e in order:
            if e in wanted:
                done[e] = np.asarray(self._one(e, [done[a] for a in e.args]))
        return done[t]


def factored(terms: Terms, t: Term) -> Term:
    """A sum with what its parts share in front: g a - g b becomes g (a - b)."""
    if t.op == "mul":
        return terms.rebuild(t, [factored(terms, a) if a.op == "add" else a for a in t.args])
    if t.op != "add":
        return t
    simpler = _joined(terms, _distributed(terms, t))
    if simpler is not t:
        return factored(terms, simpler)
    parts = [(r, _factors(a)) for r, a in zip(t.attrs[0], t.args, strict=True)]
    shared: dict[Term, int] = {}
    for f, e in parts[0][1].items():
        if f.op != "const" and all(f in p and p[f] * e > 0 for _, p in parts):
            shared[f] = min((p[f] for _, p in parts), key=abs)
    den = parts[0][0].den if len({r.den for r, _ in parts}) == 1 else 1
    if not shared and den == 1:
        return t
    rest = []
    for r, p in parts:
        left = [(f, e - shared.get(f, 0)) for f, e in p.items()]
        rest.append((Ratio(r.num, 1) if den != 1 else r, terms.mul(*left)))
    return terms.mul((terms.add(*rest), 1), *shared.items(), by=Ratio(Fraction(1), den) if den != 1 else ONE)


def _factors(t: Term) -> dict[Term, int]:
    return dict(zip(t.args, t.attrs[1], strict=True)) if t.op == "mul" else {t: 1}


def _distributed(terms: Terms, t: Term) -> Term:
    """a + (b - 4 a) / 4 as b / 4: numbers before sums within a sum, where that makes it shorter."""
    parts = [
        [(times(r, q), b) for q, b in zip(a.attrs[0], a.args, strict=True)] if a.op == "add" else [(r, a)]
        for r, a in zip(t.attrs[0], t.args, strict=True)
    ]
    new = terms.add(*(p for group in parts for p in group))
    return new if new.weight < t.weight else t


def _joined(terms: Terms, t: Term) -> Term:
    """where(c, a, 0) + where(c, 0, b) as where(c, a, b), if anything is to be joined so."""
    if t.op != "add":
        return t
    cases: dict[Term, list[list[Term]]] = {}
    rest: list[tuple[Ratio, Term]] = []
    for r, a in zip(t.attrs[0], t.args, strict=True):
        factors = _factors(a)
        conditions = [f.args[0] for f in factors if f.op == "iverson"]
        if len(conditions) != 1:
            rest.append((r, a))
            continue
        (c,) = conditions
        value = terms.mul(*((f, e) for f, e in factors.items() if f.op != "iverson"), by=r)
        base, side = (c.args[0], 1) if c.op == "logical_not" else (c, 0)
        cases.setdefault(base, [[], []])[side].append(value)
    if all(len(a) + len(b) < 2 for a, b in cases.values()):
        return t
    for c, sides in cases.items():
        yes, no = (factored(terms, terms.add(*((ONE, v) for v in side))) for side in sides)
        rest.append((ONE, terms.where(c, yes, no)))
    return terms.add(*rest)


def shared_parts(terms: Terms, t: Term, longest: int, shortest: int, names: Iterator[str]) -> tuple[Term, list[tuple[Var, Term]]]:
    """A long term with names for what comes up in it several times, those that the others need first."""
    parts: list[tuple[Var, Term]] = []
    while t.weight > longest:
        readers: dict[Term, int] = {}
        for each in [e for s in (t, *(p for _, p in parts)) for e in walk(s)]:
            for a in each.args:
                readers[a] = readers.get(a, 0) + 1
        several = [e for e, n in readers.items() if n > 1 and e.op not in ATOMS and e.weight >= shortest and not e.loops]
        if not several:
            break
        chosen = max(several, key=lambda e: e.weight)
        name = next(names)
        var = Var(chosen.shape, chosen.kind, "value", name, name=name)
        known = {chosen: terms.var(var)}
        t = terms.substitute(t, known)
        parts = [(v, terms.substitute(p, known)) for v, p in parts]
        parts.insert(0, (var, chosen))
    return t, parts
