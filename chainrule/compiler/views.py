"""Arrays seen otherwise: with their axes in another order, with several of them as one, or one as several.

In: nodes, and indices of what they give. Out: which axes of one shape make those of another, and the index of the same element below. So a
product of groups reads windows where they are, (..., channel) as (..., group, channel inside), and what is made of its result is made
beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..graph.node import Node, make
from ..ops.contract import parse
from .affine import Affine, flat

Index = tuple[Any, ...]


def runs(fine: Sequence[int], coarse: Sequence[int]) -> list[tuple[int, int]] | None:
    """From where to where (exclusive) the axes of one shape make each axis of another; None if they do not.

    >>> runs((5, 2, 3, 4), (5, 6, 4)), runs((5, 6), (6, 5))
    ([(0, 1), (1, 3), (3, 4)], None)
    """
    found, at = [], 0
    for n in coarse:
        first, extent = at, 1
        while extent != n and at < len(fine):
            extent *= fine[at]
            at += 1
        if extent != n:
            return None
        found.append((first, at))
    return found if all(n == 1 for n in fine[at:]) else None


def joined(index: Index, fine: Sequence[int], coarse: Sequence[int]) -> Index:
    """An index of an array as one of the same array seen with fewer axes."""
    if fine == coarse:
        return index
    made = runs(fine, coarse)
    assert made is not None, "several axes make each"
    return tuple(flat(index[a:b], fine[a:b]) for a, b in made)


def parted(index: Index, fine: Sequence[int], coarse: Sequence[int]) -> Index:
    """An index of an array as one of the same array seen with more axes, where a kernel has an axis for each of them."""
    made = runs(fine, coarse)
    assert made is not None, "several axes make each"
    found: list[Any] = [Affine()] * len(fine)
    for i, (a, b) in zip(index, made, strict=True):
        longer = [d for d in range(a, b) if fine[d] != 1]
        for d in reversed(longer[1:]):
            both = i.divided(fine[d])
            assert both is not None, "the kernel has an axis for each"
            i, found[d] = both
        for d in longer[:1]:
            found[d] = i
    return tuple(found)


def sliced(node: Node, axis: int, start: int, stop: int) -> Node:
    """A piece along one axis, whole along the others."""
    ends = [(start, stop) if d == axis else (0, n) for d, n in enumerate(node.shape)]
    first, last = zip(*ends, strict=True)
    return make("slice", (node,), {"start": first, "stop": last, "step": (1,) * len(ends)}, node.source, node.scope)


def is_windows(node: Node) -> bool:
    """Whether it is windows, seen with their axes in another order or with more of them: nothing but another index."""
    while node.op == "transpose" or (node.op == "reshape" and runs(node.shape, node.args[0].shape) is not None):
        node = node.args[0]
    return node.op == "window"


def joins_groups(node: Node) -> bool:
    """Whether several axes become one, of many products of a kind: those along an axis of both operands."""
    if not _joins(node) or node.args[0].op != "contract":
        return False
    left, right, out = parse(node.args[0].attrs["spec"])
    return bool({*left} & {*right} & {*out})


def _joins(node: Node) -> bool:
    return node.op == "reshape" and runs(node.args[0].shape, node.shape) is not None


def added_up(fold: Node) -> list[Node]:
    """From the windows that are added up down to the product that they are, the ways in which it is seen between them; empty if they are
    none, or if several of its axes make one that windows lie along."""
    seen = list(fold.args)
    while seen[-1].op == "transpose" or _joins(seen[-1]):
        seen += seen[-1].args
    along = [*fold.attrs["axes"], *range(len(fold.shape), len(seen[0].shape))]
    if seen[-1].op != "contract" or any(sum(n != 1 for n in extents(seen)[d]) > 1 for d in along):
        return []
    return seen


def extents(seen: Sequence[Node]) -> list[tuple[int, ...]]:
    """For each axis of the first of these, each of which sees the next, the lengths of those of the last that make it."""
    made: list[tuple[int, ...]] = [(n,) for n in seen[-1].shape]
    for node in reversed(seen[:-1]):
        if node.op == "transpose":
            made = [made[a] for a in node.attrs["axes"]]
        else:
            made = [sum(made[a:b], ()) for a, b in runs(node.args[0].shape, node.shape) or ()]
    return made
