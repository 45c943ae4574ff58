"""A graph as text, one line a node.

In: a graph. Out: lines such as `v3 float32[4, 8] = tanh(v2)    # model.py:12, layer 0`.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from .node import Graph, Node


def graph_text(graph: Graph, *, sources: bool = True, indent: str = "") -> str:
    """The graph's inputs, nodes and outputs. `sources=False` leaves out files and lines, for texts that are compared."""
    names: dict[Node, str] = {}
    lines = []
    for i, node in enumerate(graph.inputs):
        names[node] = f"x{i}"
        lines.append(f"{indent}x{i} {node.type}")
    for node in graph.nodes():
        if node in names:
            continue
        names[node] = f"v{len(names) - len(graph.inputs)}"
        attrs = {k: v for k, v in node.attrs.items() if not isinstance(v, Graph) and k != "derivative"}
        words = [*(names[a] for a in node.args), *(f"{k}={_show(v)}" for k, v in attrs.items())]
        types = ", ".join(map(str, node.types))
        line = f"{indent}{names[node]} {types} = {node.op}({', '.join(words)})"
        places = ", ".join(p for p in (os.path.basename(node.source), node.scope and f"layer {node.scope}") if p)
        lines.append(f"{line}    # {places}" if sources and places else line)
        if isinstance(node.attrs.get("body"), Graph):
            lines.append(graph_text(node.attrs["body"], sources=sources, indent=indent + "    "))
    lines.append(f"{indent}return {', '.join(names[o] for o in graph.outputs)}")
    return "\n".join(lines)


def _show(value: Any) -> str:
    if isinstance(value, np.generic):
        return repr(value.item())
    return str(value).replace(" ", "") if isinstance(value, tuple) else str(value)
