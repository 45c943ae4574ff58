"""Products of arrays that stand side by side.

In, out: a graph in normal form. Where branches of a network meet, a product reads them joined: [a b] W. That is a W₁ + b W₂ with parts
of W; the gradient by W is a's, then b's; and of the gradient by [a b] only these two parts are read. So all of it is computed branch by
branch, and the update of W with it, and threads can share out each branch by its units. What else reads such a gradient, but for sums,
reads it joined.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import accumulate, pairwise

from ..graph.node import OPS, Graph, Node, make, rebuilt
from ..normalize import normalize
from ..ops.contract import parse
from .views import sliced

MOST_BRANCHES = 4  # of one array; each is a kernel of its own
MOST_JOINED = 4  # such arrays in a graph: branches of other widths share no code, so compiling many takes several times as long

Part = tuple[int, int, int]  # of an array: an axis, and from where to where (exclusive)


def branched(graph: Graph) -> Graph:
    """The same function with products of joined arrays taken apart; where there are loops, threads share out rows, and all stays."""
    if any(n.op == "scan" for n in graph.nodes()):
        return graph
    found = _Branches(graph)
    return normalize(found.computed()) if 0 < len(found.joined) <= MOST_JOINED else graph


class _Branches:
    """A graph, and what it becomes. users: who reads each node; joined: the arrays that are read by products alone, some of which add up
    along the axis; operands: what those multiply it by, and the parts of it that each branch reads; table: old nodes -> new ones; split:
    new nodes that are parts one after the other along an axis."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.users: dict[Node, list[Node]] = {}
        for n in graph.nodes():
            for a in n.args:
                self.users.setdefault(a, []).append(n)
        self.joined: set[Node] = set()
        self.operands: dict[Node, set[Part]] = {}
        self.split: dict[Node, tuple[int, tuple[Node, ...]]] = {}
        self.table: dict[Node, Node] = {i: i for i in graph.inputs}
        for node in graph.nodes():
            if node.op == "concatenate" and 1 < len(node.args) <= MOST_BRANCHES and self._only(node, "contract"):
                self._find(node)

    def _only(self, node: Node, op: str) -> bool:
        """Whether nothing but one operator reads it, and only once each time."""
        users = self.users.get(node, [])
        return node not in self.graph.outputs and all(u.op == op for u in users) and len(users) == len({*users})

    def _find(self, node: Node) -> None:
        axis = node.attrs["axis"]
        for user in self.users[node]:
            at = user.args.index(node)
            word, other, out = _words(user, at)
            if word[axis] not in out:
                self.joined.add(node)
                place = other.index(word[axis])
                parts = ((place, a, b) for a, b in _ends(node.args, axis))
                self.operands.setdefault(user.args[1 - at], set()).update(parts)

    def computed(self) -> Graph:
        """The graph, computed branch by branch."""
        table = self.table
        for node in self.graph.nodes():
            if node in table:
                continue
            new = rebuilt(node, tuple(table[a] for a in node.args))
            if node in self.joined:
                self.split[new] = node.attrs["axis"], new.args
            elif node.op == "contract":
                new = self._product(new)
            elif node.op == "slice":
                new = self._slice(node) or new
            elif node.op == "sum" and new.args[0] in self.split:
                new = self._sum(new)
            elif any(a in self.split for a in new.args) and OPS[node.op].elementwise and self._goes_on(node):
                new = self._elementwise(new)
            table[node] = new
        return Graph(self.graph.inputs, tuple(table[o] for o in self.graph.outputs), self.graph.captures, self.graph.name)

    def _product(self, node: Node) -> Node:
        """The sum of one of each part; or these one after the other, if their axis is one of the product's."""
        at = next((i for i, a in enumerate(node.args) if a in self.split), None)
        if at is None:
            return node
        axis, parts = self.split[node.args[at]]
        word, other, out = _words(node, at)
        letter, factor = word[axis], node.args[1 - at]
        pieces = []
        for part, (start, stop) in zip(parts, _ends(parts, axis), strict=True):
            beside = self._part(factor, (other.index(letter), start, stop)) if letter in other else factor
            pieces.append(self._product(_like(node, (part, beside) if at == 0 else (beside, part))))
        return self._side_by_side(out.index(letter), pieces, node) if letter in out else _added(pieces, node)

    def _slice(self, node: Node) -> Node | None:
        """A part of a product of which only such parts are read is the product with a part of its operand."""
        product = node.args[0]
        found = self._fitting(node) if product.op == "contract" and self._only(product, "slice") else None
        if found is None or not all(map(self._fitting, self.users[product])):
            return None
        at, part = found
        args = [self.table[a] for a in product.args]
        args[at] = self._part(args[at], part)
        return self._product(_like(product, args))

    def _fitting(self, node: Node) -> tuple[int, Part] | None:
        """The operand of a product of which a slice reads a part, and that part of the operand, if a branch reads it so too."""
        product, cut = node.args[0], _part_of(node)
        if cut is None:
            return None
        axis, start, stop = cut
        for at, operand in enumerate(product.args):
            word, other, out = _words(product, at)
            letter = out[axis]
            if letter in word and letter not in other:
                part = word.index(letter), start, stop
                if part in self.operands.get(operand, ()):
                    return at, part
        return None

    def _sum(self, node: Node) -> Node:
        """Those of the parts, added up or one after the other."""
        axis, parts = self.split[node.args[0]]
        axes = node.attrs["axes"]
        pieces = [_like(node, [p]) for p in parts]
        return _added(pieces, node) if axis in axes else self._side_by_side(axis - sum(a < axis for a in axes), pieces, node)

    def _goes_on(self, node: Node) -> bool:
        """Whether all that read it can do so in parts."""
        return all(
            u.op in ("contract", "slice", "sum") or (u.op in OPS and OPS[u.op].elementwise) for u in self.users.get(node, ())
        )

    def _elementwise(self, node: Node) -> Node:
        """Part for part, as one argument is split: updates are so."""
        axis, parts = next(self.split[a] for a in node.args if a in self.split)
        pieces = [_like(node, [self._part(a, (axis, *ends)) for a in node.args]) for ends in _ends(parts, axis)]
        return self._side_by_side(axis, pieces, node)

    def _side_by_side(self, axis: int, pieces: Sequence[Node], node: Node) -> Node:
        made = make("concatenate", tuple(pieces), {"axis": axis}, node.source, node.scope)
        self.split[made] = axis, tuple(pieces)
        return made

    def _part(self, node: Node, part: Part) -> Node:
        """That part of an array."""
        axis, start, stop = part
        known, parts = self.split.get(node, (None, ()))
        if known == axis and (start, stop) in (ends := _ends(parts, axis)):
            return parts[ends.index((start, stop))]
        if node.op == "broadcast" and not node.args[0].shape:
            return make("broadcast", node.args, {"shape": (*node.shape[:axis], stop - start, *node.shape[axis + 1 :])})
        return sliced(node, axis, start, stop)


def _like(node: Node, args: Sequence[Node]) -> Node:
    """The same operator on arguments of other lengths."""
    return make(node.op, tuple(args), dict(node.attrs), node.source, node.scope)


def _added(pieces: Sequence[Node], like: Node) -> Node:
    return reduce(lambda a, b: make("add", (a, b), {}, like.source, like.scope), pieces)


def _words(product: Node, at: int) -> tuple[str, str, str]:
    """Letters of the operand in that place, of the other, of the result."""
    left, right, out = parse(product.attrs["spec"])
    return (left, right, out) if at == 0 else (right, left, out)


def _ends(parts: Sequence[Node], axis: int) -> list[tuple[int, int]]:
    """From where to where each part goes."""
    return list(pairwise(accumulate((p.shape[axis] for p in parts), initial=0)))


def _part_of(node: Node) -> Part | None:
    """What a slice takes, if it is a piece along one axis and whole along the others."""
    a, shape = node.attrs, node.args[0].shape
    cut = [d for d, n in enumerate(shape) if (a["start"][d], a["stop"][d]) != (0, n)]
    if len(cut) != 1 or set(a["step"]) != {1}:
        return None
    return cut[0], a["start"][cut[0]], a["stop"][cut[0]]
