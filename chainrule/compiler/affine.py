"""Axes of kernels, and sums of multiples of them.

In: nothing. Out: `Axis` and `Affine`, of which every index and every address of the compiler is made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, eq=False)
class Axis:
    """A counter that runs from 0 to extent - 1. Compared by identity: equal extents are different axes."""

    name: str
    extent: int

    def __repr__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Affine:
    """constant + Σ coefficient · axis. No coefficient is 0, no axis stands twice."""

    constant: int = 0
    terms: tuple[tuple[Axis, int], ...] = ()

    @property
    def axes(self) -> frozenset[Axis]:
        return frozenset(a for a, _ in self.terms)

    @property
    def axes_in_order(self) -> tuple[Axis, ...]:
        return tuple(a for a, _ in self.terms)

    def coefficient(self, axis: Axis) -> int:
        return next((c for a, c in self.terms if a is axis), 0)

    def without(self, axis: Axis) -> Affine:
        """The same at axis = 0."""
        return Affine(self.constant, tuple(t for t in self.terms if t[0] is not axis))

    def __add__(self, other: Affine | int) -> Affine:
        if isinstance(other, int):
            return Affine(self.constant + other, self.terms) if other else self
        return affine(self.constant + other.constant, (*self.terms, *other.terms))

    def __mul__(self, factor: int) -> Affine:
        if factor == 1:
            return self
        if factor == 0:
            return Affine()
        return Affine(self.constant * factor, tuple((a, c * factor) for a, c in self.terms))

    def replaced(self, table: Mapping[Axis, Affine]) -> Affine:
        """With some axes replaced by sums of others."""
        constant, terms, changed = self.constant, [], False
        for a, c in self.terms:
            new = table.get(a)
            if new is None:
                if a.extent != 1:
                    terms.append((a, c))
                continue
            changed = True
            constant += new.constant * c
            terms += [(b, d * c) for b, d in new.terms]
        return affine(constant, terms) if changed else self

    @property
    def largest(self) -> int:
        return self.constant + sum(c * (a.extent - 1) for a, c in self.terms if c > 0)

    @property
    def smallest(self) -> int:
        return self.constant + sum(c * (a.extent - 1) for a, c in self.terms if c < 0)

    def divided(self, by: int) -> tuple[Affine, Affine] | None:
        """Quotient and remainder, where they are affine too: terms that `by` divides, and others that never reach it."""
        whole = [(a, c // by) for a, c in self.terms if c % by == 0]
        rest = [(a, c) for a, c in self.terms if c % by]
        quotient, remainder = divmod(self.constant, by)
        left = Affine(remainder, tuple(rest))
        if left.smallest < 0 or left.largest >= by:
            return None
        return Affine(quotient, tuple(whole)), left

    def __str__(self) -> str:
        parts = [{1: a.name, -1: f"-{a.name}"}.get(c, f"{c}*{a.name}") for a, c in self.terms]
        if self.constant or not parts:
            parts.append(str(self.constant))
        return " + ".join(parts).replace("+ -", "- ")


def of(axis: Axis) -> Affine:
    """The axis itself; an axis of length 1 is always 0."""
    return Affine(0, ((axis, 1),)) if axis.extent != 1 else Affine()


def affine(constant: int, terms: Iterable[tuple[Axis, int]]) -> Affine:
    """A sum, its terms collected."""
    total: dict[Axis, int] = {}
    for axis, c in terms:
        total[axis] = total.get(axis, 0) + c
    return Affine(constant, tuple([t for t in total.items() if t[1]]))


def flat(index: Iterable[Affine], shape: Iterable[int]) -> Affine:
    """The position in row-major order."""
    position = Affine()
    for i, n in zip(index, shape, strict=True):
        position = position * n + i
    return position
