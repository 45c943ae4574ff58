"""The optimizer's rule as equations.

In: an optimizer and the parameters. Out: a section of the document. The rule is recorded by calling the optimizer's own update on
symbols, so that any optimizer that `fit` takes is shown as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..graph.node import Type
from ..graph.trace import build
from ..optim import Optimizer, apply_update
from .build import Builder, Library
from .document import Document, Part, Section, settle_names, tidy
from .equations import Equation, equations
from .terms import Terms, Var, variables
from .text import RESERVED

_SYMBOLS = {
    "learning_rate": "η", "momentum": "μ", "beta1": "β1", "beta2": "β2", "eps": "ε", "rho": "ρ", "weight_decay": "λ",
    "clip_norm": "c", "momentum_decay": "ψ", "beta1_power": "β1ᵗ", "beta2_power": "β2ᵗ",
}  # fmt: skip
_EACH = 4  # as many parameters at most are written out one by one


def add_update(
    document: Document, terms: Terms, optimizer: Optimizer, chosen: Sequence[tuple[Var, Var, Any]], taken: set[str]
) -> None:
    """Append the update of parameters, given as (parameter, gradient, value), to a document. taken: names in use."""
    parameters = [p for p, _, _ in chosen]
    gradients = [g for _, g, _ in chosen]
    name = type(optimizer).__name__
    if optimizer.driver:
        summary = (type(optimizer).__doc__ or "").strip().split("\n")[0]
        asks = "It asks for value and gradient as often as it needs them."
        document.sections.append(Section(f"Update: {name}", [], [summary, asks]))
        return
    rule = _Rule(terms, optimizer, taken)
    by_axes = bool(optimizer.l1 or optimizer.l2 or optimizer.weight_decay)
    plain = not optimizer.shared() and not optimizer.slots(np.zeros(1))
    if optimizer.clip_norm is not None or (plain and len(parameters) <= _EACH):
        parts = [Part("", list(rule.items(list(zip(parameters, gradients, strict=True)))))]
    else:
        groups: list[tuple[str, tuple[Var, Var]]] = []
        for wide in (True, False):
            like = next((p for p in parameters if not by_axes or (len(p.shape) >= 2) == wide), None)
            if like is not None and (by_axes or wide):
                which = "" if not by_axes else " with two axes or more" if wide else " with less than two axes"
                w, g = (Var(like.shape, "f", "input", n, name=rule.free(n)) for n in ("w", "g"))
                groups.append((f"For every parameter {w.name}{which}, with {g.name} = ∂L/∂{w.name}", (w, g)))
        parts = rule.grouped(groups)
    document.sections.append(Section(f"Update: {name}", parts, rule.remarks()))
    if document.numbers:
        moved = rule.step(parameters, gradients, [value for _, _, value in chosen], document)
        document.after = [(p.name, value) for p, value in zip(parameters, moved, strict=True)]


class _Rule:
    """An optimizer's update on symbols."""

    def __init__(self, terms: Terms, optimizer: Optimizer, taken: set[str]) -> None:
        self.terms = terms
        self.optimizer = optimizer
        self.taken = set(taken) | {"L"}
        rate = float(optimizer.schedule(np.zeros(1), 1)[0])
        self.numbers = {"learning_rate": rate, **optimizer.hyper()}
        self.hyper = {k: self._scalar(k, "scalar") for k in self.numbers}
        self.shared = {k: self._scalar(k, "slot") for k in optimizer.shared()}
        self.owner: dict[Var, int] = {}

    def free(self, wish: str) -> str:
        """A name that nothing else has."""
        name = wish
        while name in self.taken or name in RESERVED:
            name += "_"
        return name

    def _scalar(self, name: str, role: str) -> Var:
        symbol = self.free(_SYMBOLS.get(name, name))
        self.taken.add(symbol)
        return Var((), "f", role, symbol, name=symbol)

    def grouped(self, groups: Sequence[tuple[str, tuple[Var, Var]]]) -> list[Part]:
        """Equations for one parameter of each group, and before them what is the same for all."""
        self.owner = {v: k for k, (_, pair) in enumerate(groups) for v in pair}
        items = self.items([pair for _, pair in groups], alone=True)
        parts = [Part("Once in each step", []), *(Part(heading, [], shapes=False) for heading, _ in groups)]
        for e in items:
            parts[self._group(e) + 1].items.append(e)
        return [p for p in parts if p.items]

    def _group(self, e: Equation) -> int:
        """Whose equation it is: that of a group, or -1 for what is the same for all parameters."""
        if e.var not in self.owner:
            self.owner[e.var] = max((self.owner.get(v, -1) for v in variables([e.term])), default=-1)
        return self.owner[e.var]

    def items(self, pairs: Sequence[tuple[Var, Var]], alone: bool = False) -> list[Equation]:
        """Equations for these (parameter, gradient). alone: each parameter stands for many, so slots need not say whose they are."""
        names = [str(i) for i in range(len(pairs))]
        slots: dict[str, dict[str, Var]] = {}
        for key, (w, _) in zip(names, pairs, strict=True):
            kept = self.optimizer.slots(np.zeros(w.shape))
            slots[key] = {k: self._slot(k if alone else f"{k}_{w.name}", w) for k in kept}
            self.owner.update({v: self.owner.get(w, -1) for v in slots[key].values()})
        old: list[Var] = [*(w for w, _ in pairs), *(g for _, g in pairs), *(v for s in slots.values() for v in s.values()),
                          *self.shared.values(), *self.hyper.values()]  # fmt: skip
        changed: list[Var] = []

        def flat(*values: Any) -> list[Any]:
            at = dict(zip(old, values, strict=True))
            given = {k: {s: at[v] for s, v in kept.items()} for k, kept in slots.items()}
            moved, new_slots, new_shared = apply_update(
                self.optimizer,
                {k: at[w] for k, (w, _) in zip(names, pairs, strict=True)},
                {k: at[g] for k, (_, g) in zip(names, pairs, strict=True)},
                given,
                {k: at[v] for k, v in self.shared.items()},
                {k: at[v] for k, v in self.hyper.items()},
            )
            results = [(self.shared[k], v) for k, v in new_shared.items()]
            results += [(slots[k][s], v) for k, kept in new_slots.items() for s, v in kept.items()]
            results += [(w, moved[k]) for k, (w, _) in zip(names, pairs, strict=True)]
            results = [(var, value) for var, value in results if value is not at[var]]
            changed[:] = [var for var, _ in results]
            return [value for _, value in results]

        graph = build(flat, [Type(v.shape, np.dtype(np.float64)) for v in old])
        builder = Builder(self.terms, Library(self.terms))
        for node, var in zip(graph.inputs, old, strict=True):
            builder.table[node] = self.terms.var(var)
        new: dict[Var, Var] = {}
        for node, var in zip(graph.outputs, changed, strict=True):
            fresh = Var(var.shape, "f", "update", var.name, kept=True, name=var.name)
            new[var] = fresh
            builder.forced[node] = fresh
        builder.nodes(graph.nodes(), graph.outputs)
        for e in equations(builder.items):
            if e.var.role == "update":
                e.mode = "update"
        (items,) = tidy(self.terms, [builder.items], gradients=[True])
        found = [e for e in items if isinstance(e, Equation)]
        for old_one, fresh in new.items():
            self.owner[fresh] = self.owner.get(old_one, -1)
        common = {v for v in new if self.owner[new[v]] == -1}
        for e in found:
            if e.var.role != "update":
                e.var.role = "temporary"
            if alone and self._group(e) >= 0:  # the common part comes first, so the old values need other names
                for v in common & set(variables([e.term])):
                    new[v].name = f"{v.name}_new"
        ordered = _in_order(found, new)
        settle_names(ordered, self.taken)
        return ordered

    def _slot(self, wish: str, w: Var) -> Var:
        name = self.free(wish)
        return Var(w.shape, "f", "slot", name, name=name)

    def remarks(self) -> list[str]:
        """What the symbols are, and where they start."""
        options = (f"{v.name} = {self.numbers[k]:.6g}" + (f" ({k})" if v.name != k else "") for k, v in self.hyper.items())
        lines = [", ".join(options)]
        schedule = self.optimizer.learning_rate
        if not isinstance(schedule, float):
            lines.append(f"{self.hyper['learning_rate'].name} follows {schedule!r}; the number is that of the first step")
        starts = [f"{v.name} = {self.optimizer.shared()[k]:.6g}" for k, v in self.shared.items()]
        for k, v in self.optimizer.slots(np.zeros(1)).items():
            starts.append(f"{self.free(k)} = {v[0]:.6g}")
        if starts:
            lines.append(f"before the first step {', '.join(starts)}")
        if self.optimizer.accumulate > 1:
            lines.append(f"the gradients of {self.optimizer.accumulate} batches are added for one update")
        return lines

    def step(self, parameters: Sequence[Var], gradients: Sequence[Var], values: Sequence[Any], document: Document) -> list[Any]:
        """The parameters after the first step of this example."""
        names = [p.name for p in parameters]
        w = {n: np.asarray(v, np.float64) for n, v in zip(names, values, strict=True)}
        g = {n: np.asarray(document.numbers[v], np.float64) for n, v in zip(names, gradients, strict=True)}
        slots = {n: self.optimizer.slots(v) for n, v in w.items()}
        moved, _, _ = apply_update(self.optimizer, w, g, slots, self.optimizer.shared(), self.numbers)
        return [moved[n] for n in names]


def _in_order(items: Sequence[Equation], new: Mapping[Var, Var]) -> list[Equation]:
    """Equations so that each name is read before it changes where the old value is meant, and after where the new one is.

    Where both are meant, the new value gets a name of its own.
    """
    maker = {e.var: e for e in items}
    before: dict[Equation, set[Equation]] = {e: set() for e in items}
    for e in items:
        for v in set(variables([e.term])):
            if v in maker and maker[v] is not e:
                before[e].add(maker[v])
            elif v in new and new[v] in maker and maker[new[v]] is not e:
                before[maker[new[v]]].add(e)
    order: list[Equation] = []
    left = list(items)
    while left:
        ready = next((e for e in left if not (before[e] & set(left))), None)
        if ready is None:  # both the old and the new value are read later
            ready = next(e for e in left if e.mode == "update")
            ready.var.name += "_new"
        order.append(ready)
        left.remove(ready)
    return order
