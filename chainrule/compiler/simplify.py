"""Graph -> graph, for machine code: what has no kernel of its own is written in terms of what has.

In, out: a graph in normal form. argmax becomes the first index among those whose element is the largest, or NaN.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..graph.node import Graph, Node, constant_node, make, rebuilt
from ..normalize import normalize


def simplify(graph: Graph) -> Graph:
    """The same function without operators that have no kernel."""
    if not _holds(graph, RULES):
        return graph
    table: dict[Node, Node] = {i: i for i in graph.inputs}
    for node in graph.nodes():
        if node in table:
            continue
        attrs = {k: simplify(v) if isinstance(v, Graph) else v for k, v in node.attrs.items()}
        new = rebuilt(node, tuple(table[a] for a in node.args), attrs)
        table[node] = RULES[new.op](new) if new.op in RULES else new
    return normalize(Graph(graph.inputs, tuple(table[o] for o in graph.outputs), graph.captures, graph.name))


def _holds(graph: Graph, rules: dict[str, Callable[[Node], Node]]) -> bool:
    bodies = [v for n in graph.nodes() for v in n.attrs.values() if isinstance(v, Graph)]
    return any(n.op in rules for n in graph.nodes()) or any(_holds(b, rules) for b in bodies)


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


RULES: dict[str, Callable[[Node], Node]] = {"argmax": _argmax}
