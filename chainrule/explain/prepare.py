"""A graph made ready to be explained.

In: a graph as it was recorded. Out: the same function, in which the calls that are left can stay named in both passes, and nothing is
computed twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..derive.backward import backward
from ..graph.node import OPS, Graph, Node, rebuilt
from ..graph.trace import apply, build, inline
from ..normalize import graph_key
from ..ops.call import expand
from ..ops.elementwise import strong_multiply


def prepared(graph: Graph) -> Graph:
    """The graph with those calls put in place that cannot stay named in the backward pass.

    A function of one array that works element by element and has no derivative of its own gets its slope as a function: gelu'(x).
    What was recorded twice stands once, so that the gradient by it is whole.
    """
    return _shared(expand(_with_slopes(graph), keep=lambda node: node.attrs["derivative"] is not None))


def is_elementwise(body: Graph) -> bool:
    """Whether each element of the result depends on the same element of the arguments only."""
    for node in body.nodes():
        if node.op == "call":
            if not is_elementwise(node.attrs["body"]):
                return False
        elif node.op == "broadcast":
            if node.args[0].op != "constant":
                return False
        elif node.op not in ("input", "constant") and not OPS[node.op].elementwise:
            return False
    return all(i.shape == o.shape for i in body.inputs for o in body.outputs)


def _with_slopes(graph: Graph) -> Graph:
    """Every call gets a derivative, if it can have one without being put in place."""
    table: dict[Node, Node] = {i: i for i in graph.inputs}
    for node in graph.nodes():
        if node in table:
            continue
        args, attrs = tuple(table[a] for a in node.args), dict(node.attrs)
        if isinstance(attrs.get("body"), Graph):
            attrs["body"] = _with_slopes(attrs["body"])
        if node.op == "call" and attrs["derivative"] is None:
            attrs["derivative"] = _slope(node, attrs["body"])
        table[node] = rebuilt(node, args, attrs)
    return Graph(graph.inputs, tuple(table[o] for o in graph.outputs), graph.captures, graph.name)


def _slope(node: Node, body: Graph) -> Any:
    """The derivative of a call by its one argument, as a call; None if it has no such form."""
    if all(a.dtype.kind != "f" for a in node.args):
        return (None,) * len(node.args)
    if len(node.args) != 1 or len(node.types) != 1 or body.captures or not is_elementwise(body):
        return None
    back = backward(body, [0])
    slope = build(lambda x: inline(back, [x, np.ones_like(x)]), [body.inputs[0].type], name=f"{body.name}'")
    attrs = {k: v for k, v in node.attrs.items() if k not in ("body", "derivative")}

    def derivative(need: Sequence[bool], g: Any, y: Any, x: Any) -> list[Any]:
        return [strong_multiply(g, apply("call", x, body=slope, derivative=None, **attrs))]

    return derivative


def _shared(graph: Graph) -> Graph:
    """Equal nodes as one. Calls stay, so this is no matter for `normalize`."""
    known: dict[Any, Node] = {}
    table: dict[Node, Node] = {i: i for i in graph.inputs}
    for node in graph.nodes():
        if node not in table:
            args = tuple(table[a] for a in node.args)
            attrs = tuple((k, _key(v)) for k, v in sorted(node.attrs.items()))
            table[node] = known.setdefault((node.op, tuple(map(id, args)), attrs, node.types), rebuilt(node, args))
    return Graph(graph.inputs, tuple(table[o] for o in graph.outputs), graph.captures, graph.name)


def _key(value: Any) -> Any:
    if isinstance(value, Graph):
        return graph_key(value)
    return (value.dtype.str, value.tobytes()) if isinstance(value, np.generic) else value
