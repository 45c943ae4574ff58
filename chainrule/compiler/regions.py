"""Which elements of an array an index reaches, and how many of them two indices have in common.

In: affine indices. Out: `Region`, a product of evenly spaced places, one `Run` for each dimension. Counting is exact, strides
included, and takes no time that depends on how long the runs are: so the verifier can afford it for each compilation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from itertools import accumulate
from math import gcd, prod
from operator import mul
from typing import NamedTuple

from .affine import Affine, Axis


class Run(NamedTuple):
    """The places first, first + step, ..., `length` of them."""

    first: int
    step: int
    length: int

    @property
    def last(self) -> int:
        return self.first + self.step * (self.length - 1)

    def moved(self, by: int) -> Run:
        return Run(self.first + by, self.step, self.length)

    def between(self, low: int, high: int) -> Run:
        """Those of them from `low` to `high`."""
        skipped = max(0, -((self.first - low) // self.step))
        first = self.first + self.step * skipped
        return Run(first, self.step, max(0, min(self.length - skipped, (high - first) // self.step + 1)))


def common(a: Run, b: Run) -> int:
    """How many places two runs have in common.

    >>> common(Run(0, 2, 5), Run(4, 3, 9)), common(Run(0, 2, 5), Run(1, 2, 5))
    (1, 0)
    """
    if not a.length or not b.length:
        return 0
    low, high, divisor = max(a.first, b.first), min(a.last, b.last), gcd(a.step, b.step)
    apart = b.first - a.first
    if apart % divisor or low > high:
        return 0
    turn = b.step // divisor  # of a's places every one so far from the next is b's
    place = a.first + a.step * (apart // divisor * pow(a.step // divisor, -1, turn) % turn)
    both = a.step * turn
    place += both * -((place - low) // both)
    return max(0, (high - place) // both + 1)


def run_of(constant: int, terms: Iterable[tuple[int, int]]) -> tuple[Run, bool]:
    """constant + Σ coefficient · (0, 1, ..., extent - 1) for these (coefficient, extent), and whether it is just these places; else it is
    the evenly spaced ones from the smallest to the largest.

    >>> run_of(1, [(8, 3), (1, 8)]), run_of(0, [(4, 2), (1, 2)])
    ((Run(first=1, step=1, length=24), True), (Run(first=0, step=1, length=6), False))
    """
    terms = list(terms)
    rising = sorted((abs(c), extent) for c, extent in terms)
    if any(extent == 0 for _, extent in terms):
        return Run(constant, 1, 0), True
    first = constant + sum(c * (extent - 1) for c, extent in terms if c < 0)
    step, count, exact = 1, 1, True
    for c, extent in rising:
        if extent == 1:
            continue
        if count == 1:
            step, count = c, extent
            continue
        exact = exact and c % step == 0 and c <= step * count
        divisor = gcd(step, c)
        step, count = divisor, (step * (count - 1) + c * (extent - 1)) // divisor + 1
    return Run(first, step, count), exact


@dataclass(frozen=True, slots=True)
class Region:
    """Elements of an array that is seen under `shape`: in dimension d those at base[d] + a place of runs[d]. base: sums of axes of loops,
    whatever their value; ranges: where all this is for any value (smallest and largest place). exact: it is these; else it is some of
    them, and which cannot be told."""

    shape: tuple[int, ...]
    runs: tuple[Run, ...]
    base: tuple[Affine, ...]
    ranges: tuple[tuple[int, int], ...]
    exact: bool = True

    @property
    def size(self) -> int:
        return prod([r.length for r in self.runs])

    @property
    def fixed(self) -> bool:
        """Whether it is the same in all turns of all loops."""
        return not any(b.terms for b in self.base)

    def over(self, axis: Axis, extent: int, start: int = 0) -> Region:
        """All elements of the turns of a loop in which its axis is start, start + 1, ..., `extent` of them."""
        steps = [b.coefficient(axis) for b in self.base]
        if not any(steps):
            return self
        made = [
            run_of(r.first + c * start, [(r.step, r.length), (c, extent)]) if c else (r, True)
            for r, c in zip(self.runs, steps, strict=True)
        ]
        base = tuple(b.without(axis) for b in self.base)
        exact = self.exact and all(e for _, e in made) and sum(map(bool, steps)) == 1
        return Region(self.shape, _inside([r for r, _ in made], base, self.ranges), base, self.ranges, exact)

    def moved(self, axis: Axis, turns: int) -> Region:
        """The elements that this region is when the axis of a loop is so much larger."""
        runs = tuple(r.moved(b.coefficient(axis) * turns) for r, b in zip(self.runs, self.base, strict=True))
        return replace(self, runs=runs)

    def joined(self, other: Region) -> Region | None:
        """The two as one, if they are neighbours along one dimension."""
        if (self.shape, self.base, self.exact) != (other.shape, other.base, other.exact):
            return None
        apart = [d for d, (r, s) in enumerate(zip(self.runs, other.runs, strict=True)) if r != s]
        if len(apart) != 1:
            return None
        (d,) = apart
        low, high = sorted((self.runs[d], other.runs[d]))
        if low.step != high.step or low.last + low.step != high.first:
            return None
        run = Run(low.first, low.step, low.length + high.length)
        ranges = [(min(a, c), max(b, d)) for (a, b), (c, d) in zip(self.ranges, other.ranges, strict=True)]
        return replace(self, runs=(*self.runs[:d], run, *self.runs[d + 1 :]), ranges=tuple(ranges))

    def seen_as(self, shape: Sequence[int]) -> Region:
        """The same elements of the array seen under a shape with several dimensions in one."""
        if tuple(shape) == self.shape:
            return self
        at, runs, base, ranges, exact = len(self.shape), list[Run](), list[Affine](), list[tuple[int, int]](), self.exact
        for extent in reversed(shape):
            inner, first, terms, sums, low, high = 1, 0, list[tuple[int, int]](), Affine(), 0, 0
            while inner < extent:
                at -= 1
                first += self.runs[at].first * inner
                terms.append((self.runs[at].step * inner, self.runs[at].length))
                sums += self.base[at] * inner
                low, high = low + self.ranges[at][0] * inner, high + self.ranges[at][1] * inner
                inner *= self.shape[at]
            run, just = run_of(first, terms)
            runs, base, ranges, exact = [run, *runs], [sums, *base], [(low, high), *ranges], exact and just
        return Region(tuple(shape), tuple(runs), tuple(base), tuple(ranges), exact)


def region(
    index: Sequence[object], shape: tuple[int, ...], ranges: Sequence[tuple[int, int]], loops: AbstractSet[Axis]
) -> Region:
    """The elements at an index for all values of its axes, but for one value of those of loops. Where it is looked up, that may be
    anywhere in its dimension. ranges: in each dimension, its smallest and largest place: axes may be confined in other ways."""
    runs, base, own, exact = list[Run](), list[Affine](), list[Axis](), True
    for i, extent in zip(index, shape, strict=True):
        if not isinstance(i, Affine):
            runs, base, exact = [*runs, Run(0, 1, extent)], [*base, Affine()], False
            continue
        free = [(a, c) for a, c in i.terms if a not in loops]
        run, just = run_of(i.constant, [(c, a.extent) for a, c in free])
        runs.append(run)
        base.append(Affine(0, tuple([t for t in i.terms if t[0] in loops])))
        own += [a for a, _ in free]
        exact = exact and just
    exact = exact and len(own) == len(set(own))
    return Region(shape, _inside(runs, base, ranges), tuple(base), tuple(ranges), exact)


def _inside(runs: Sequence[Run], base: Sequence[Affine], ranges: Sequence[tuple[int, int]]) -> tuple[Run, ...]:
    """Runs without what is never reached."""
    return tuple([r if b.terms else r.between(*both) for r, b, both in zip(runs, base, ranges, strict=True)])


def shared(a: Region, b: Region) -> int | None:
    """How many elements two regions of one array have in common, 0 where that depends on the turn of a loop; None if it cannot be told."""
    if a.shape != b.shape:
        shape = _coarser(a.shape, b.shape)
        a, b = a.seen_as(shape), b.seen_as(shape)
    if a.base != b.base and any(set(x.terms) != set(y.terms) for x, y in zip(a.base, b.base, strict=True)):
        return 0
    both = prod([common(r, s) for r, s in zip(a.runs, b.runs, strict=True)])
    return both if not both or (a.exact and b.exact) else None


def _coarser(a: tuple[int, ...], b: tuple[int, ...]) -> list[int]:
    """The shape with as many dimensions as two shapes of the same array agree about.

    >>> _coarser((2, 3, 4, 5), (6, 2, 10))
    [6, 20]
    """
    ends = sorted({*accumulate(reversed(a), mul)} & {*accumulate(reversed(b), mul)} | {1})
    return [outer // inner for inner, outer in zip(reversed(ends[:-1]), reversed(ends[1:]), strict=True)]
