"""What a node of a graph is at an index, for one kernel.

In: what holds the graph together (`Homes`). Out: `Former`, which gives values; it asks for those of other kernels where they stand in
memory, or computes them again. Layout operators are virtual: they only change the index at which their argument is read.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..graph.node import OPS, Node
from ..ops.contract import parse
from .affine import Affine, Axis, of
from .fold import Part
from .kernels import Buffer, Value, constant, elementwise, iota, load, reduce
from .views import is_windows, joined, joins_groups, parted

Index = tuple[Any, ...]  # of Affine, or Value where an entry is looked up
Source = Callable[[Index], Value]

VIRTUAL = {"broadcast", "transpose", "slice", "flip", "iota", "constant", "window", "output", "reshape"}
EXPENSIVE = {"sqrt", "divide", "strong_divide", "remainder", "power", "exp", "expm1", "log", "log1p"}
EXPENSIVE |= {
    "sin",
    "cos",
    "tan",
    "arctan",
    "arcsin",
    "arccos",
    "arccosh",
    "tanh",
    "logistic",
    "tanh_softplus",
    "erf",
    "normal_cdf",
}


class Homes(Protocol):
    """What all kernels of a graph know of each other."""

    @property
    def sources(self) -> Mapping[Node, Source]:
        """What the inputs are."""

    @property
    def home(self) -> Mapping[Node, object]:
        """The group that a node belongs to."""

    @property
    def stored(self) -> Mapping[Node, Buffer]:
        """Where nodes stand in memory."""

    @property
    def must(self) -> Container[Node]:
        """Nodes that have to."""

    @property
    def within(self) -> Container[Node]:
        """Nodes that are terms of one sum with what reads them."""

    def buffer(self, node: Node) -> Buffer:
        """Where a node stands; it is stored from now on."""

    def axes(self, shape: tuple[int, ...], stem: str = "i") -> tuple[Axis, ...]:
        """New axes of these lengths."""


@dataclass(frozen=True)
class Folded:
    """One folded axis of the places at hand: their part, where they are in it, and how many windows there are."""

    part: Part
    place: Affine
    offset: Affine
    windows: int


class Former:
    """The values of one kernel, each made once."""

    def __init__(self, homes: Homes, group: object, domain: tuple[Axis, ...], folded: Sequence[Folded] = ()) -> None:
        self.homes, self.group, self.domain, self.folded = homes, group, domain, folded
        self.reduced: tuple[Axis, ...] = ()
        self._known: dict[tuple[Node, Index], Value] = {}

    def at(self, node: Node, index: Index) -> Value:
        """What is known of a chain of operators that only look elsewhere is known of all of them, and found without recursion."""
        met: list[tuple[Node, Index]] = []
        found: Value | None = None
        while found is None:
            met.append((node, index))
            found = self._known.get(met[-1])
            if found is None:
                made = self._make(node, index)
                if isinstance(made, Value):
                    found = made
                else:
                    node, index = made
        self._known.update(dict.fromkeys(met, found))
        return found

    def _make(self, node: Node, index: Index) -> Value | tuple[Node, Index]:
        """Its value; or where else to look for it."""
        f = self.homes
        if node.op == "input":
            return f.sources[node](index)
        if node.op == "constant":
            return constant(node.attrs["value"], node.dtype)
        if node.op == "iota":
            return self._iota(node, index)
        if node in f.home and f.home[node] is not self.group:
            return self._foreign(node, index)
        if node.op == "output":
            return load(f.buffer(node), index)
        if node.op not in VIRTUAL and OPS[node.op].elementwise:
            return self._elementwise(node, index)
        return self._rule(node, index)

    def _rule(self, node: Node, index: Index) -> Value | tuple[Node, Index]:
        made: Value | tuple[Node, Index] = getattr(self, f"_{node.op}")(node, index)
        return made

    def _elementwise(self, node: Node, index: Index) -> Value:
        attrs = {} if node.op == "cast" else node.attrs
        return elementwise(node.op, node.dtype, [self.at(a, index) for a in node.args], attrs)

    def _foreign(self, node: Node, index: Index) -> Value | tuple[Node, Index]:
        """A node that lives elsewhere: in memory, or computed again."""
        f = self.homes
        if node not in f.stored and node not in f.must and self._again(node, 3):
            return self._rule(node, index) if node.op in VIRTUAL else self._elementwise(node, index)
        return load(f.buffer(node), index)

    def _again(self, node: Node, depth: int) -> bool:
        """Whether computing `node` here costs little and reads only what is in memory anyway."""
        f = self.homes
        while node.op in VIRTUAL and node.op != "output" and node.args and node not in f.stored and node not in f.must:
            (node,) = node.args
        if node in f.stored or node in f.must or node.op in ("input", "constant", "iota"):
            return True
        if node.op == "output":
            return False
        if depth == 0 or not OPS[node.op].elementwise or node.op in EXPENSIVE:
            return False
        return all(self._again(a, depth - 1) for a in node.args)

    # ---- virtual: the argument at another index --------------------------------------------------------------------------------

    def _broadcast(self, node: Node, index: Index) -> tuple[Node, Index]:
        (x,) = node.args
        kept = index[len(index) - len(x.shape) :]
        return x, tuple(i if n != 1 else Affine() for i, n in zip(kept, x.shape, strict=True))

    def _transpose(self, node: Node, index: Index) -> tuple[Node, Index]:
        axes = node.attrs["axes"]
        return node.args[0], tuple(index[axes.index(d)] for d in range(len(axes)))

    def _slice(self, node: Node, index: Index) -> tuple[Node, Index]:
        a = node.attrs
        moved = tuple(_scaled(i, s, b) for i, s, b in zip(index, a["step"], a["start"], strict=True))
        return node.args[0], moved

    def _flip(self, node: Node, index: Index) -> tuple[Node, Index]:
        axes = node.attrs["axes"]
        moved = (_scaled(i, -1, n - 1) if d in axes else i for d, (i, n) in enumerate(zip(index, node.shape, strict=True)))
        return node.args[0], tuple(moved)

    def _iota(self, node: Node, index: Index) -> Value:
        (i,) = index
        return iota(i, node.dtype) if isinstance(i, Affine) else elementwise("cast", node.dtype, [i])

    def _window(self, node: Node, index: Index) -> tuple[Node, Index]:
        a = node.attrs
        n = len(node.args[0].shape)
        at = list(index[:n])
        for axis, offset, s, d in zip(a["axes"], index[n:], a["stride"], a["dilation"], strict=True):
            at[axis] = at[axis] * s + offset * d
        return node.args[0], tuple(at)

    def _reshape(self, node: Node, index: Index) -> Value | tuple[Node, Index]:
        if plain_reshape(node):
            rest = iter(i for i, n in zip(index, node.shape, strict=True) if n != 1)
            return node.args[0], tuple(Affine() if n == 1 else next(rest) for n in node.args[0].shape)
        f = self.homes
        (x,) = node.args
        if is_windows(node):
            return x, joined(index, node.shape, x.shape)
        if x in f.within or (joins_groups(node) and f.home[x] is self.group):
            return x, parted(index, x.shape, node.shape)
        below = viewed(node)
        if below.op == "constant":
            return self.at(below, ())
        if below.op == "input":
            made = f.sources[below](tuple(Affine() for _ in below.shape))
            assert made.buffer is not None, "a source is a load"
            if made.shape == below.shape:
                return load(made.buffer, index, node.shape)
            before = made.index[: len(made.index) - len(below.shape)]  # the time of a loop stands before
            return load(made.buffer, (*before, *index), (*made.shape[: len(before)], *node.shape))
        return load(f.buffer(below), index, node.shape)

    # ---- what starts a group ---------------------------------------------------------------------------------------------------

    def _over(self, extents: Sequence[int]) -> tuple[Axis, ...]:
        axes = self.homes.axes(tuple(extents), "r")
        self.reduced = (*self.reduced, *(a for a in axes if a.extent != 1))
        return axes

    def _reduce(self, how: str, value: Value, axes: Sequence[Axis]) -> Value:
        over = [a for a in axes if a.extent != 1]
        return reduce(how, value, over) if over else value

    def _extreme(self, node: Node, index: Index) -> Value:
        (x,) = node.args
        axes = node.attrs["axes"]
        over = self._over([x.shape[a] for a in axes])
        own = iter(index)
        full = tuple(of(over[axes.index(d)]) if d in axes else next(own) for d in range(len(x.shape)))
        return self._reduce(node.op, self.at(x, full), over)

    _sum = _max = _min = _extreme

    def _contract(self, node: Node, index: Index) -> Value:
        left, right, out = parse(node.attrs["spec"])
        a, b = node.args
        sizes = {**dict(zip(left, a.shape, strict=True)), **dict(zip(right, b.shape, strict=True))}
        letters = [c for c in left if c not in out]
        over = self._over([sizes[c] for c in letters])
        place = {**dict(zip(out, index, strict=True)), **{c: of(axis) for c, axis in zip(letters, over, strict=True)}}
        factors = [self.at(x, tuple(place[c] for c in word)) for x, word in ((a, left), (b, right))]
        return self._reduce("sum", elementwise("multiply", node.dtype, factors), over)

    def _fold(self, node: Node, index: Index) -> Value:
        """The sum over all windows that reach the place."""
        if any(f.part.terms == 0 for f in self.folded):
            return constant(0, node.dtype)
        over = self._over([f.part.terms for f in self.folded])
        at, offsets, within = list(index), [], []
        for axis, f, term in zip(node.attrs["axes"], self.folded, over, strict=True):
            window = f.place + of(term) * -f.part.reach + f.part.shift
            at[axis] = window
            offsets.append(f.offset + of(term) * f.part.between + f.part.offset)
            if f.part.bounded:
                within.append((window, f.windows))
        value = self.at(node.args[0], (*at, *offsets))
        if value.op == "reduce" and node.args[0] in self.homes.within:  # a sum of sums is one
            (value,), over = value.args, (*over, *value.attrs["over"])
        over = tuple(a for a in over if a.extent != 1)
        return reduce("sum", value, over, within) if over else value

    def _take(self, node: Node, index: Index) -> Value:
        x, indices = node.args
        axis, k = node.attrs["axis"], len(indices.shape)
        at = self.looked_up(indices, index[axis : axis + k], x.shape[axis], node.attrs.get("negative", True))
        full = (*index[:axis], at, *index[axis + k :])
        below = viewed(x)
        if below.op == "input":
            probe = self.homes.sources[below](tuple(Affine() for _ in below.shape))
            assert probe.buffer is not None
            before = probe.index[: len(probe.index) - len(below.shape)]
            return load(probe.buffer, (*before, *full), (*probe.shape[: len(before)], *x.shape))
        return load(self.homes.buffer(below), full, x.shape)

    def looked_up(self, indices: Node, index: Index, extent: int, negative: bool) -> Value:
        """The value of an index, checked."""
        attrs = {"extent": extent, "negative": negative}
        return elementwise("checked", np.dtype(np.int64), [self.at(indices, index)], attrs)


def _scaled(index: Any, factor: int, offset: int) -> Any:
    if isinstance(index, Affine):
        return index * factor + offset
    i8 = index.dtype
    made = index if factor == 1 else elementwise("multiply", i8, [index, constant(factor, i8)])
    return made if offset == 0 else elementwise("add", i8, [made, constant(offset, i8)])


def plain_reshape(node: Node) -> bool:
    """Whether only axes of length 1 come or go."""
    return [n for n in node.shape if n != 1] == [n for n in node.args[0].shape if n != 1]


def viewed(node: Node) -> Node:
    """What a chain of reshapes looks at."""
    while node.op == "reshape":
        node = node.args[0]
    return node
