"""The normal form of a graph: what backends and caches see.

In: a closed graph. Out: the same function with calls replaced by their bodies, equal subexpressions made one, arithmetic on known
numbers done, and everything gone that no result needs: unread results, states and arguments of loops included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .graph.node import OPS, Graph, Node, Type, constant_node, rebuilt
from .ops.call import expand


def normalize(graph: Graph) -> Graph:
    """The normal form. Inputs stay as they are, also those that nothing reads any more."""
    graph = _share(expand(graph))
    while True:
        trimmed = _trim_loops(graph)
        if trimmed is graph:
            return graph
        graph = _share(trimmed)


def graph_key(graph: Graph) -> tuple[Any, ...]:
    """A hashable description of a graph in which nothing but the computation counts: equal keys, equal programs."""
    number: dict[Node, int] = {}
    lines = []
    for node in (*graph.inputs, *graph.nodes()):
        if node not in number:
            number[node] = len(number)
            lines.append(node_key(node, tuple(number[a] for a in node.args)))
    return (*lines, tuple(number[o] for o in graph.outputs))


def node_key(node: Node, args: tuple[int, ...]) -> tuple[Any, ...]:
    """What a node computes of its arguments, which are told by numbers."""
    attrs = () if node.op == "input" else tuple((k, _value_key(v)) for k, v in sorted(node.attrs.items()) if k != "derivative")
    return (node.op, args, attrs, tuple((t.shape, t.dtype.str, t.weak) for t in node.types))


def _value_key(value: Any) -> Any:
    if isinstance(value, Graph):
        return graph_key(value)
    if isinstance(value, np.generic):
        return (value.dtype.str, value.tobytes())  # bytes: -0.0 and 0.0 are different numbers, NaN equals itself
    return value


def _share(graph: Graph) -> Graph:
    """Equal subexpressions become one node; scalars computed from constants become constants."""
    known: dict[Any, Node] = {}
    table: dict[Node, Node] = {i: i for i in graph.inputs}
    number: dict[Node, int] = {}
    for node in graph.nodes():
        if node in table:
            continue
        args = tuple(table[a] for a in node.args)
        attrs = {k: normalize(v) if isinstance(v, Graph) else v for k, v in node.attrs.items()}
        new = _fold(_strong(rebuilt(node, args, attrs)))
        key = node_key(new, tuple(number.setdefault(a, len(number)) for a in new.args))
        table[node] = known.setdefault(key, new)
    return Graph(graph.inputs, tuple(table[o] for o in graph.outputs), graph.captures, graph.name)


def _strong(node: Node) -> Node:
    """Types are settled: a number that would have taken on the type of what it met has met it, or has the type it has."""
    if not any(t.weak for t in node.types):
        return node
    types = tuple(Type(t.shape, t.dtype) for t in node.types)
    attrs = {k: v for k, v in node.attrs.items() if k != "weak"}
    return Node(node.op, node.args, attrs, types, node.source, node.scope)


def _fold(node: Node) -> Node:
    if not node.args or node.shape != () or len(node.types) > 1 or any(a.op != "constant" for a in node.args):
        return node
    if node.op == "output" or not OPS[node.op].elementwise:
        return node
    with np.errstate(all="ignore"):
        value = OPS[node.op].value(*(np.asarray(a.attrs["value"]) for a in node.args), **node.attrs)
    return constant_node(value, node.dtype, node.source)


def _trim_loops(graph: Graph) -> Graph:
    """The graph with the unread parts of its outermost loops taken away, or the same graph if there are none."""
    order = graph.nodes()
    if not any(node.op == "scan" for node in order):
        return graph
    read: dict[Node, set[int]] = {}
    for node in order:
        if node.op == "output" and node.args[0].op == "scan":
            read.setdefault(node.args[0], set()).add(node.attrs["index"])
    table: dict[Node, Node] = {}
    moved: dict[Node, dict[int, int]] = {}
    for node in order:
        args = tuple(table[a] for a in node.args)
        if node.op == "scan":
            everything = set(range(len(node.types)))
            new, moved[node] = _trim(node, args, read.get(node, everything) if len(node.types) > 1 else everything)
            table[node] = new
        elif node.op == "output" and node.args[0] in moved:
            index = moved[node.args[0]][node.attrs["index"]]
            loop = args[0]
            table[node] = loop if len(loop.types) == 1 else rebuilt(node, args, {"index": index})
        else:
            table[node] = rebuilt(node, args)
    if all(old is new for old, new in table.items()):
        return graph
    return Graph(graph.inputs, tuple(table[o] for o in graph.outputs), graph.captures, graph.name)


def _trim(node: Node, args: tuple[Node, ...], read: set[int]) -> tuple[Node, dict[int, int]]:
    """A loop with only the results in `read`, and where each of them is now."""
    body: Graph = node.attrs["body"]
    states, sequences = node.attrs["states"], node.attrs["sequences"]
    live = {i for i in read if i < states}
    while True:  # a state is needed if it is read at the end, or if a needed output depends on it
        outputs = sorted(live | {i for i in read if i >= states})
        used = set(Graph(body.inputs, tuple(body.outputs[i] for i in outputs)).nodes())
        more = {i for i in range(states) if body.inputs[i] in used} | live
        if more == live:
            break
        live = more
    kept = [i for i, n in enumerate(body.inputs) if (i in live if i < states else n in used)]
    if len(outputs) == len(body.outputs) and len(kept) == len(body.inputs) and args == node.args:
        return node, {i: i for i in range(len(body.outputs))}
    new_body = Graph(tuple(body.inputs[i] for i in kept), tuple(body.outputs[i] for i in outputs))
    attrs = {
        **node.attrs,
        "body": new_body,
        "states": len(live),
        "sequences": sum(states <= i < states + sequences for i in kept),
    }
    types: Sequence[Type] = [node.types[i] for i in outputs]
    new = Node("scan", tuple(args[i] for i in kept), attrs, tuple(types), node.source, node.scope)
    return new, {old: at for at, old in enumerate(outputs)}
