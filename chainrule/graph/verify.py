"""What a legal graph is.

In: a graph. Out: nothing, or a `GraphError` that names the node. Run between all passes under test.

1. Every leaf is one of the graph's inputs, a constant scalar, or an operator without arguments; no input stands twice.
2. The operator of each node is known, and its shape rule gives the types that the node has.
3. A node with several results is read only through "output" nodes, whose index exists.
4. Bodies of loops and calls are legal, and closed: they capture nothing.
5. There is one captured value for each of the last inputs, of its type.
6. In normal form there is no call, no two equal nodes, no weak type except at inputs.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import ChainruleError, GraphError
from .node import OPS, Graph, Node

_LEAVES = ("input", "constant")


def verify(graph: Graph, *, normal: bool = False) -> Graph:
    """Return `graph` if it is legal.

    Raises: `GraphError` that says which rule is broken, where.
    """
    if len(set(graph.inputs)) != len(graph.inputs):
        raise GraphError("an input stands twice")
    inputs = set(graph.inputs)
    seen: set[Any] = set()
    for node in graph.nodes():
        problem = _problem(node, inputs, normal) or (_not_normal(node, seen) if normal else "")
        if problem:
            raise GraphError(f"{node!r} {node.source}: {problem}")
    for node, value in zip(graph.inputs[len(graph.inputs) - len(graph.captures) :], graph.captures, strict=True):
        if tuple(np.shape(value)) != node.shape or value.dtype != node.dtype:
            raise GraphError(
                f"the captured value of shape {np.shape(value)} and type {value.dtype} stands for an input {node.type}"
            )
    return graph


def _not_normal(node: Node, seen: set[Any]) -> str:
    if node.op == "input":
        return ""
    if any(t.weak for t in node.types):
        return "a weak type in normal form"
    attrs = tuple((k, id(v) if isinstance(v, Graph) else repr(v)) for k, v in sorted(node.attrs.items()))
    key = (node.op, node.args, attrs)
    if key in seen:
        return "an equal node stands before it, in normal form"
    seen.add(key)
    return ""


def _problem(node: Node, inputs: set[Node], normal: bool) -> str:
    if node.op == "input":
        return "" if node in inputs else "an input that is not one of this graph: it was recorded elsewhere"
    if node.op == "constant":
        return (
            "" if node.shape == () and node.attrs["value"].dtype == node.dtype else "a constant must be a scalar of its own type"
        )
    if any(len(a.types) > 1 for a in node.args) and node.op != "output":
        return "reads a node with several results without choosing one"
    if node.op == "output":
        types = node.args[0].types
        known = node.attrs["index"] in range(len(types)) and node.types == (types[node.attrs["index"]],)
        return "" if known else f"result {node.attrs['index']} of a node that has {len(types)}"
    if node.op not in OPS:
        return "an operator that is not registered"
    if normal and node.op == "call":
        return "a call in normal form"
    body = node.attrs.get("body")
    if isinstance(body, Graph):
        if body.captures:
            return "a body that captures values"
        verify(body, normal=normal)
    try:
        inferred = OPS[node.op].infer(*(a.type for a in node.args), **node.attrs)
    except ChainruleError as error:
        return str(error)
    types = inferred if isinstance(inferred, tuple) else (inferred,)
    if [(t.shape, t.dtype) for t in types] != [(t.shape, t.dtype) for t in node.types]:
        return f"the shape rule gives {', '.join(map(str, types))}"
    return ""
