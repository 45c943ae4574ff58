"""Which windows reach which places: the adjoint of sliding windows, as sums.

In: the geometry of windows along one axis. Out: the places of that axis in parts; in each part a place is reached by windows and offsets
that are affine in it and in one number that is summed over. Place y is reached by offset k of window p where y = stride · p + dilation · k,
so the places fall into classes by their remainder, and within a class consecutive places are reached by consecutive windows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd

LEAST_INSIDE = 4  # places that all windows reach, from which on they are a part of their own: a tile has as many columns


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
    bounded: bool = False


def parts(
    length: int, size: int, stride: int, dilation: int, windows: int, low: int = 0, high: int | None = None, apart: bool = False
) -> list[Part]:  # fmt: skip
    """The places from `low` to `high`, or to the end, of an axis of this length, on which so many windows lie. apart: those near the
    ends, which fewer windows reach, are parts of their own, so that all others are reached by as many.

    >>> parts(4, 2, 2, 1, 2)
    [Part(first=0, step=2, count=2, spread=2, terms=1, offset=0, between=2, shift=0, reach=1, bounded=False)]
    >>> [(p.first, p.step, p.count, p.terms) for p in parts(5, 1, 2, 1, 3)]
    [(0, 2, 3, 1), (1, 2, 2, 0)]
    """
    high = length if high is None else high
    found: list[Part] = []
    if dilation == 1 and stride > 1 and size % stride == 0 and (low, high) == (0, length):  # all classes are alike
        whole, rest = divmod(length, stride)
        found = [Part(0, stride, whole, stride, size // stride, 0, stride)]
        found += [Part(whole * stride, 1, 1, rest, size // stride, 0, stride, whole)] if rest else []
        return [cut for part in found for cut in _covered(part, windows, apart)]
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
            apart,
        )
    return _joined(found)


def _joined(found: list[Part]) -> list[Part]:
    """The parts; neighbours that no window reaches, or one, are joined: a stride has as many classes as it is long, which for images would
    be that many kernels squared.

    >>> [(p.first, p.spread, p.count, p.terms) for p in parts(20, 3, 8, 1, 3)]
    [(0, 3, 3, 1), (3, 1, 3, 0), (4, 4, 2, 0)]
    """
    made: list[Part] = []
    awaited: dict[Part, int] = {}  # the neighbour that a part could take in -> its place
    for part in found:
        part = part if part.terms else Part(part.first, part.step, part.count)
        at = awaited.pop(part, len(made))
        if at == len(made):
            made.append(part)
        else:
            made[at] = replace(made[at], spread=made[at].spread + 1)
        n = made[at].spread
        if part.terms <= 1 and n < part.step:
            awaited[replace(made[at], first=made[at].first + n, spread=1, offset=made[at].offset + n * part.terms)] = at
    return made


def _covered(part: Part, windows: int, apart: bool) -> list[Part]:
    """A part with one term is cut where there are windows for it."""
    if part.terms > 1:
        return _reached(part, windows, apart)
    if part.terms == 0:
        return [part] if part.count else []
    low = min(max(0, -part.shift), part.count)
    high = min(max(low, windows - part.shift), part.count)
    cut = [(0, low, 0), (low, high, 1), (high, part.count, 0)]
    return [
        replace(part, first=part.first + part.step * a, count=b - a, terms=terms, shift=part.shift + a)
        for a, b, terms in cut
        if b > a
    ]


def _reached(part: Part, windows: int, apart: bool) -> list[Part]:
    """A part with several terms, those places apart that all of them reach if there are many."""
    low = min(max(0, part.reach * (part.terms - 1) - part.shift), part.count)
    high = min(max(low, windows - part.shift), part.count)
    if high - low < part.count and (not apart or high - low < LEAST_INSIDE):
        return [replace(part, bounded=True)] if part.count else []
    inside = replace(part, first=part.first + part.step * low, count=high - low, shift=part.shift + low)
    return [*_end(part, 0, low, windows), inside, *_end(part, high, part.count, windows)]


def _end(part: Part, begin: int, end: int, windows: int) -> list[Part]:
    """The places from `begin` to `end` of a part. Of a single one it is known which terms reach it."""
    if begin == end:
        return []
    cut = replace(part, first=part.first + part.step * begin, count=end - begin, shift=part.shift + begin)
    if cut.count > 1:
        return [replace(cut, bounded=True)]
    first = max(0, -(-(cut.shift - windows + 1) // cut.reach))
    terms = max(0, min(cut.terms - 1, cut.shift // cut.reach) - first + 1)
    return [replace(cut, terms=terms, offset=cut.offset + cut.between * first, shift=cut.shift - cut.reach * first)]
