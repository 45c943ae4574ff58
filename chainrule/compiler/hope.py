"""Strong products made as plain ones, in the hope that none is NaN.

In: a kernel; what its values were made of. Out: which of its products may be plain, and at the end of a tile a statement that looks whether
one of the results is NaN, and only then makes them again as they truly are. Where terms of sums are stored, and so products inside of sums
count, it is the sums that are looked at, and made again (sums.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from .kernels import Kernel, Value, ordered, terms
from .loops import IfNaN, Let, Register, Statement

PLAIN = {"strong_multiply": "multiply", "strong_divide": "divide"}
# Operators whose result is NaN if a floating-point argument is, but for the one that `where` does not take.
SPREADS = {*PLAIN, *PLAIN.values(), "add", "subtract", "negative", "maximum", "minimum", "abs", "where"}
SPREADS |= {"sqrt", "exp", "expm1", "log", "log1p", "tanh", "logistic", "sin", "cos"}


def hopeful(kernel: Kernel) -> frozenset[Value]:
    """The strong products and quotients that may be made as plain ones, in the hope that none is NaN: they differ in nothing else, and NaN
    spreads from them to what is stored, where it is noticed. Empty where it would not, or where they are parts of sums."""
    inside = terms(v for v in kernel.values() if v.op == "reduce") | set(ordered([s.value for s in kernel.inside()]))
    strong = [v for v in kernel.values() if v.op in PLAIN and v.dtype.kind == "f" and v not in inside]
    reached = set(strong)
    for v in kernel.values():
        if any(a in reached for a in v.args):
            if v.op not in SPREADS or v in inside or (v.args[0] in reached and v.op == "where"):
                return frozenset()
            reached.add(v)
    stored = {s.value for s in kernel.stores}
    read = {a for v in reached for a in v.args}
    if any(v not in read and v not in stored for v in reached) or any(i in reached for s in kernel.stores for i in s.index):
        return frozenset()
    return frozenset(strong)


def hopeful_terms(kernel: Kernel) -> tuple[frozenset[Value], frozenset[Value]]:
    """The same of the terms of sums, where each that is stored is summed too, so that NaN shows in a sum; and all that is made of them."""
    sums = [v for v in kernel.values() if v.op == "reduce"]
    stored = {s.value for s in kernel.inside()}
    points = frozenset().union(*(v.axes for v in stored))
    fits = stored and stored <= {v.args[0] for v in sums} and all(v.attrs["how"] == "sum" for v in sums)
    strong = [v for v in terms(sums) if v.op in PLAIN and v.dtype.kind == "f" and v.axes == points] if fits else []
    reached = set(strong)
    for v in kernel.values():
        if v.op == "reduce" and v.args[0] in reached:
            reached.add(v)
        elif v.axes == points and any(a in reached for a in v.args):
            if v.op not in SPREADS or (v.args[0] in reached and v.op == "where"):
                return frozenset(), frozenset()
            reached.add(v)
    return frozenset(strong), frozenset(reached)


class Hope:
    """What was made of plain products in place of strong ones, and how it is made without hope."""

    def __init__(self, kernel: Kernel) -> None:
        self.products = hopeful(kernel)
        self.terms, self.spread = hopeful_terms(kernel)
        self.given_up = False  # for terms: they are made as they truly are
        self._made: dict[Register, Let] = {}

    def plain(self, target: Register, strong: Let) -> None:
        """A plain product stands in `target`; `strong` is what it is in place of."""
        self._made[target] = strong

    def follow(self, made: Let) -> None:
        """What is made of a register for which there is hope is made in hope too."""
        if any(a in self._made for a in made.args):
            self._made[made.target] = made

    def made_sure(
        self, values: Sequence[Register], lanes: int, register: Callable[[np.dtype[Any], int], Register]
    ) -> tuple[list[Statement], dict[Register, Register]]:
        """What stands in place of values for which there was hope: themselves, or if one is NaN, what they truly are.

        Args: lanes: so many of a vector count; register: gives a new one of this type and width.
        Returns: the statements that look and make it so; by each such value what stands in its place.
        """
        doubtful = [r for r in dict.fromkeys(values) if r in self._made]
        if not doubtful:
            return [], {}
        truly: dict[Register, Register] = {}
        body: list[Statement] = []
        for r in doubtful:
            stack = [r]
            while stack:
                missing = [a for a in self._made[stack[-1]].args if a in self._made and a not in truly]
                if missing or stack[-1] in truly:
                    stack = [*stack, *missing] if missing else stack[:-1]
                    continue
                made = self._made[stack.pop()]
                truly[made.target] = target = register(made.target.dtype, made.target.width)
                body.append(replace(made, target=target, args=tuple(truly.get(a, a) for a in made.args)))
        sure = {r: register(r.dtype, r.width) for r in doubtful}
        tested = tuple((r, lanes if r.width > 1 else 1) for r in doubtful)
        return [IfNaN(tested, body, tuple((new, r, truly[r]) for r, new in sure.items()))], sure
