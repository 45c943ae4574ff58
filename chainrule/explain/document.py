"""What an explanation says, before it is printed: sections of equations, names, functions, remarks.

In: equations as the builder left them. Out: a `Document`. Here equations that nobody reads are dropped, those that one other equation
reads are put into it while it stays short, equations of a layer are brought together, and every variable gets its final name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Any

from .algebra import factored, merge_cases
from .build import LONG
from .equations import Equation, Item, Loop, equations
from .terms import ATOMS, Function, Term, Terms, Var, variables, walk
from .text import RESERVED


@dataclass(frozen=True)
class Named:
    """A line of the table of names. about: what the variable is; number: its value, where it is a single number worth printing."""

    var: Var
    about: str
    number: str = ""


@dataclass(frozen=True)
class Part:
    """Equations under a heading ("" for none). shapes: whether to say what shape each value has."""

    heading: str
    items: list[Item]
    shapes: bool = True


@dataclass(frozen=True)
class Section:
    """Parts under a title. remarks: lines before them."""

    title: str
    parts: list[Part]
    remarks: list[str] = field(default_factory=list)


@dataclass
class Document:
    """An explanation. numbers: values of variables, if they are to be shown; after: names and values once the update is done."""

    title: str
    names: list[Named]
    sections: list[Section]
    functions: list[Function] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    numbers: Mapping[Var, Any] = field(default_factory=dict)
    after: list[tuple[str, Any]] = field(default_factory=list)

    def number(self, equation: Equation) -> Any:
        """The value to show with an equation: of a loop's variable that of all steps; None for none."""
        return None if equation.mode == "start" else self.numbers.get(equation.var)


# ---- leaving out and putting together ----------------------------------------------------------------------------------------


def tidy(terms: Terms, sections: Sequence[list[Item]], *, gradients: Sequence[bool]) -> list[list[Item]]:
    """Equations that are read, short ones within their only reader. gradients: in which sections sums are factored."""
    current = [list(s) for s in sections]
    for _ in range(4):
        used = _live([i for s in current for i in s])
        current = [_kept(s, used) for s in current]
        if not _inline(terms, current, gradients):
            break
    used = _live([i for s in current for i in s])
    current = [_kept(s, used) for s in current]
    for items, factor in zip(current, gradients, strict=True):
        for e in equations(items):
            if e.mode != "draw" and e.var.role != "sum":
                e.term = merge_cases(terms, factored(terms, e.term) if factor else e.term)
    return current


def _live(items: Sequence[Item]) -> set[Var]:
    """The variables that what is kept depends on."""
    made: dict[Var, list[Equation]] = {}
    for e in equations(items):
        made.setdefault(e.var, []).append(e)
    live: set[Var] = set()
    stack = [
        v for v in made if v.kept and v.role != "draw" and (not v.indices or v.role == "sum" or (v.role == "gradient" and v.of))
    ]
    while stack:
        v = stack.pop()
        if v not in live:
            live.add(v)
            stack += [w for e in made.get(v, ()) if e.mode != "draw" for w in variables([e.term])]
    return live


def _kept(items: Sequence[Item], live: set[Var]) -> list[Item]:
    kept: list[Item] = []
    for item in items:
        if isinstance(item, Loop):
            item.items = _kept(item.items, live)
            if item.items:
                kept.append(item)
        elif item.var in live:
            kept.append(item)
    return kept


def _inline(terms: Terms, sections: Sequence[list[Item]], gradients: Sequence[bool]) -> bool:
    """Put what a single equation reads into it, as long as that stays short."""
    every = [(e, factor) for s, factor in zip(sections, gradients, strict=True) for e in equations(s)]
    readers: dict[Var, list[Equation]] = {}
    for e, _ in every:
        for t in walk(e.term):
            for a in (*t.args, *((t,) if t is e.term else ())):
                if a.op in ("var", "at", "sequence"):
                    readers.setdefault(a.attrs[0], []).append(e)
    definition: dict[Term, Equation] = {
        terms.reference(e.var): e
        for e, _ in every
        if e.mode == "define" and not e.places and not e.var.kept and e.var.role in ("value", "gradient")
        and len(set(readers.get(e.var, ()))) == 1
    }  # fmt: skip
    changed = False
    for e, factor in every:
        if e.mode == "draw":
            continue
        for t in walk(e.term):
            source = definition.get(t)
            if source is None or source is e or (t.op != "at" and source.var.indices):
                continue
            once = len(readers[source.var]) == 1
            if source.term.op not in ATOMS and once and e.term.weight + source.term.weight > LONG:
                continue
            longest = LONG if once else min(LONG, e.term.weight + source.term.weight)
            new = terms.substitute(e.term, {t: source.term})
            if factor and e.var.role != "sum":
                new = factored(terms, new)
            if source.term.op not in ATOMS and new.weight > longest:
                continue
            e.term = new
            del definition[t]
            changed = True
    return changed


# ---- order -------------------------------------------------------------------------------------------------------------------


def grouped(items: Sequence[Item], heading: Callable[[str], str]) -> list[Part]:
    """Equations in an order that respects what they read and keeps those of one layer together, under the layer's heading."""
    reads, writes = [_reads(i) for i in items], [_writes(i) for i in items]
    maker = {v: k for k, vs in enumerate(writes) for v in vs}
    needs = [sorted({maker[v] for v in r if v in maker} - {k}) for k, r in enumerate(reads)]
    for k, item in enumerate(items):  # a loop needs the starts of its states, and a start of a state or sum stands before it
        if isinstance(item, Equation) and item.mode == "start":
            loop = next((j for j, other in enumerate(items) if isinstance(other, Loop) and item.var in writes[j]), None)
            if loop is not None and k not in needs[loop]:
                needs[loop].append(k)
    order = _scheduled([i.scope for i in items], needs)
    parts: list[Part] = []
    last = None
    for k in order:
        if items[k].scope != last or not parts:
            last = items[k].scope
            parts.append(Part(heading(last), []))
        parts[-1].items.append(items[k])
    return parts


def _scheduled(scopes: Sequence[str], needs: Sequence[Sequence[int]]) -> list[int]:
    """An order that respects `needs`. It stays with a layer while it can, and prefers to begin one that it can finish."""
    readers: list[list[int]] = [[] for _ in scopes]
    missing = [len(n) for n in needs]
    outside = dict.fromkeys(scopes, 0)  # how many things of other layers each layer still waits for
    for k, n in enumerate(needs):
        for j in n:
            readers[j].append(k)
            outside[scopes[k]] += scopes[j] != scopes[k]
    ready: dict[str, list[int]] = {s: [] for s in scopes}
    for k, m in enumerate(missing):
        if m == 0:
            heappush(ready[scopes[k]], k)
    order: list[int] = []
    scope = None
    while len(order) < len(scopes):
        if scope is None or not ready[scope]:
            open_ = [s for s, r in ready.items() if r]
            if not open_:  # a circle, which no graph has
                return list(range(len(scopes)))
            scope = min(open_, key=lambda s: (outside[s] > 0, ready[s][0]))
        k = heappop(ready[scope])
        order.append(k)
        for j in readers[k]:
            missing[j] -= 1
            outside[scopes[j]] -= scopes[j] != scopes[k]
            if missing[j] == 0:
                heappush(ready[scopes[j]], j)
    return order


def _reads(item: Item) -> set[Var]:
    return {v for e in equations([item]) if e.mode != "draw" for v in variables([e.term])}


def _writes(item: Item) -> set[Var]:
    return {e.var for e in equations([item]) if not (isinstance(item, Equation) and item.mode == "start")}


# ---- names -------------------------------------------------------------------------------------------------------------------


def settle_names(items: Iterable[Item], taken: Iterable[str] = ()) -> None:
    """A name for each variable: what it wishes, the gradient of something, or v1, g1, u1."""
    used = set(taken) | RESERVED
    counts: dict[str, int] = {}

    def unique(wish: str) -> str:
        name, n = wish, 2
        while name in used:
            name, n = (f"{wish}_{n}" if wish[-1:].isdigit() else f"{wish}{n}"), n + 1
        used.add(name)
        return name

    def numbered(letter: str) -> str:
        while True:
            counts[letter] = counts.get(letter, 0) + 1
            if f"{letter}{counts[letter]}" not in used:
                used.add(f"{letter}{counts[letter]}")
                return f"{letter}{counts[letter]}"

    order = list(dict.fromkeys(e.var for e in equations(list(items))))
    for var in order:
        if not var.name and var.wish:
            var.name = unique(var.wish)
    for var in order:
        if var.name:
            continue
        if var.of is not None and var.of.name:
            var.name = unique(f"δ{var.of.name}" if var.role == "state" else f"∂L/∂{var.of.name}")
        else:
            var.name = numbered({"draw": "u", "gradient": "g", "sum": "s", "state": "g", "temporary": "k"}.get(var.role, "v"))


def functions_in(terms: Iterable[Term]) -> list[Function]:
    """The functions that terms call, and those that these call, once each."""
    found: dict[Function, None] = {}
    stack = list(terms)
    while stack:
        t = stack.pop(0)
        for e in walk(t):
            if e.op == "call" and e.attrs[0] not in found:
                found[e.attrs[0]] = None
                stack += e.attrs[0].terms
    return list(found)
