"""Which windows reach which places: the adjoint of sliding windows, as sums.

In: the geometry of windows along one axis. Out: the places of that axis in parts; in each part a place is reached by windows and offsets
that are affine in it and in one number that is summed over. Place y is reached by offset k of window p where y = stride · p + dilation · k,
so the places fall into classes by their remainder, and within a class consecutive places are reached by consecutive windows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd


@dataclass(frozen=True)
class Part:
    """The places first + step · q + r, q < count and r < spread. Place (q, r) is reached by offset `offset + r + between · j` of window
    `shift + q - reach · j`, for each j < terms for which there is such a window. terms 0: by none; bounded: not by all of them."""

    first: int
    step: int
    count: int
    spread: int = 1
    terms: int = 0
    offset: int = 0
    between: int = 1
    shift: int = 0
    reach: int = 1

    @property
    def bounded(self) -> bool:
        return self.terms > 1


def parts(length: int, size: int, stride: int, dilation: int, windows: int, low: int = 0, high: int | None = None) -> list[Part]:
    """The places from `low` to `high`, or to the end, of an axis of this length, on which so many windows lie.

    >>> parts(4, 2, 2, 1, 2)
    [Part(first=0, step=2, count=2, spread=2, terms=1, offset=0, between=2, shift=0, reach=1)]
    >>> [(p.first, p.step, p.count, p.terms) for p in parts(5, 1, 2, 1, 3)]
    [(0, 2, 3, 1), (1, 2, 2, 0)]
    """
    high = length if high is None else high
    found: list[Part] = []
    if dilation == 1 and stride > 1 and size % stride == 0 and (low, high) == (0, length):  # all classes are alike
        whole, rest = divmod(length, stride)
        found = [Part(0, stride, whole, stride, size // stride, 0, stride)]
        found += [Part(whole * stride, 1, 1, rest, size // stride, 0, stride, whole)] if rest else []
        return [cut for part in found for cut in _covered(part, windows)]
    common = gcd(dilation, stride)
    for r in range(min(stride, length)):
        offsets = [k for k in range(size) if (dilation * k - r) % stride == 0]
        k = offsets[0] if offsets else 0
        begin, end = (max(0, -(-(place - r) // stride)) for place in (low, high))
        shift = (r - dilation * k) // stride + begin
        found += _covered(
            Part(
                r + stride * begin,
                stride,
                end - begin,
                1,
                len(offsets),
                k,
                stride // common,
                shift,
                dilation // common,
            ),
            windows,
        )
    return found


def _covered(part: Part, windows: int) -> list[Part]:
    """A part with one term is cut where there are windows for it."""
    if part.terms != 1:
        return [part] if part.count else []
    low = min(max(0, -part.shift), part.count)
    high = min(max(low, windows - part.shift), part.count)
    cut = [(0, low, 0), (low, high, 1), (high, part.count, 0)]
    return [
        replace(part, first=part.first + part.step * a, count=b - a, terms=terms, shift=part.shift + a)
        for a, b, terms in cut
        if b > a
    ]
