"""Graph -> graph, for machine code: what has no kernel of its own is written in terms of what has.

In, out: a graph in normal form. argmax becomes the first index among those whose element is the largest, or NaN. A derivative that is 1
or 0 chooses. A product gets its operands in the order in which lanes read them: next to each other along the last axis of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod

import numpy as np

from ..graph.node import Graph, Node, constant_node, make, rebuilt
from ..normalize import normalize
from ..ops.contract import parse
from .views import added_up

LEAST_LANES = 4  # an axis as short as that is not worth a copy of the operand
LEAST_REUSE = 4  # how often a copied element is read at least


def simplify(graph: Graph) -> Graph:
    """The same function without operators that have no kernel."""
    if not _holds(graph, RULES):
        return graph
    table: dict[Node, Node] = {i: i for i in graph.inputs}
    filled: dict[Node, tuple[int, int]] = {}
    folds = [(seen[-1], n) for n in graph.nodes() if n.op == "fold" and (seen := added_up(n))]
    last = {product: len(product.shape) - len(n.attrs["size"]) - 1 for product, n in folds}
    for node in graph.nodes():
        if node in table:
            continue
        attrs = {k: simplify(v) if isinstance(v, Graph) else v for k, v in node.attrs.items()}
        new = rebuilt(node, tuple(table[a] for a in node.args), attrs)
        if (own := _filled(new, filled)) is not None:
            filled[new] = own
        if new.op == "contract":
            table[node] = _in_order(new, last.get(node, len(new.shape) - 1))
        elif new.op == "add":
            table[node] = _add(new, own)
        else:
            table[node] = RULES[new.op](new) if new.op in RULES else new
    return normalize(Graph(graph.inputs, tuple(table[o] for o in graph.outputs), graph.captures, graph.name))


def _holds(graph: Graph, rules: dict[str, Callable[[Node], Node]]) -> bool:
    bodies = [v for n in graph.nodes() for v in n.attrs.values() if isinstance(v, Graph)]
    return any(n.op in rules or n.op in ("contract", "add") for n in graph.nodes()) or any(_holds(b, rules) for b in bodies)


def _argmax(node: Node) -> Node:
    (x,) = node.args
    axis = node.attrs["axis"]
    top = make("max", (x,), {"axes": (axis,)}, node.source, node.scope)
    kept = tuple(1 if i == axis else n for i, n in enumerate(x.shape))
    wide = make("broadcast", (make("reshape", (top,), {"shape": kept}),), {"shape": x.shape})
    chosen = make("equal", (x, wide), {})
    if x.dtype.kind == "f":
        number = make("equal", (x, x), {})
        chosen = make("logical_or", (chosen, make("logical_not", (number,), {})), {})
    places = make("iota", (), {"length": x.shape[axis], "dtype": np.dtype(np.int64)})
    row = tuple(n if i == axis else 1 for i, n in enumerate(x.shape))
    place = make("broadcast", (make("reshape", (places,), {"shape": row}),), {"shape": x.shape})
    beyond = make("broadcast", (constant_node(x.shape[axis], np.int64),), {"shape": x.shape})
    return make("min", (make("where", (chosen, place, beyond), {}),), {"axes": (axis,)}, node.source, node.scope)


def _in_order(node: Node, last: int) -> Node:
    """With a transposed copy of the operand that has the result's last axis, where that is not its last. last: the axis that is the last
    one where the result goes: windows are added up over the axes behind it."""
    left, right, out = parse(node.attrs["spec"])
    words, args = [left, right], list(node.args)
    lanes = out[last] if out else ""
    for i, (word, arg) in enumerate(zip(words, args, strict=True)):
        if not lanes or lanes not in word or word.endswith(lanes) or node.shape[last] < LEAST_LANES:
            continue
        if prod(n for letter, n in zip(out, node.shape, strict=True) if letter not in word) < LEAST_REUSE:
            continue
        order = [*(d for d, letter in enumerate(word) if letter != lanes), word.index(lanes)]
        args[i] = make("transpose", (arg,), {"axes": tuple(order)}, node.source, node.scope)
        words[i] = "".join(word[d] for d in order)
    if args == list(node.args):
        return node
    return make("contract", tuple(args), {"spec": f"{words[0]},{words[1]}->{out}"}, node.source, node.scope)


def _filled(node: Node, known: Mapping[Node, tuple[int, int]]) -> tuple[int, int] | None:
    """The axis and how long all parts along it are together, if a node is a sum of parts that are 0 elsewhere on that axis: counted from
    what is known of its terms, as a sum of many is one of sums."""
    if node.op == "add":
        a, b = (known.get(x) for x in node.args)
        return (a[0], a[1] + b[1]) if a is not None and b is not None and a[0] == b[0] else None
    if node.op != "pad" or node.args[1].op != "constant" or node.args[1].attrs["value"] != 0:
        return None
    padded = [d for d, amounts in enumerate(node.attrs["amounts"]) if amounts != (0, 0, 0)]
    if len(padded) != 1 or node.attrs["amounts"][padded[0]][2]:
        return None
    return padded[0], node.args[0].shape[padded[0]]


def _add(node: Node, filled: tuple[int, int] | None) -> Node:
    """A sum of arrays that are zero but for their own part of one axis is these parts, one after the other: so come the gradients of
    slices. The parts are only looked at where they can fill the axis, which is once for all sums that they are in."""
    if filled is None or filled[1] != node.shape[filled[0]]:
        return node
    axis, at = filled[0], 0
    pieces: list[tuple[int, Node]] = []
    stack = [node]
    while stack:
        n = stack.pop()
        if n.op == "add":
            stack += n.args
        else:
            pieces.append((n.attrs["amounts"][axis][0], n.args[0]))
    pieces.sort(key=lambda p: p[0])
    for start, piece in pieces:
        if start != at:
            return node
        at += piece.shape[axis]
    return make("concatenate", tuple(piece for _, piece in pieces), {"axis": axis}, node.source, node.scope)


def _gated(node: Node) -> Node:
    """What is multiplied by 1 or 0 is chosen: 0 · ∞ is 0 in such a product. Only the sign of that 0 may be another."""
    for x, gate in (node.args, node.args[::-1]):
        if gate.op == "cast" and gate.args[0].dtype.kind == "b":
            zero = make("broadcast", (constant_node(0, node.dtype),), {"shape": node.shape})
            return make("where", (gate.args[0], x, zero), {}, node.source, node.scope)
    return node


RULES: dict[str, Callable[[Node], Node]] = {"argmax": _argmax, "strong_multiply": _gated}
