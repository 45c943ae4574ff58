"""The chain rule: from a graph to the graph of its gradients.

In: a closed graph, and which inputs to differentiate by. Out: a closed graph that takes the same inputs and the gradient of the loss
by each output (the seed), and gives the gradient by each chosen input. It goes from the outputs to the inputs; each node is
visited once, after all that reads it, so the gradients of a value that is used several times are summed before they are passed
on. The forward values are shared, not computed twice; bodies of loops are closed graphs of their own, at which the sweep stops.

Source: Linnainmaa 1970; Griewank & Walther, "Evaluating derivatives", 2nd ed. 2008, section 3.2 (incremental reverse mode).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..graph.node import OPS, Graph, Node, input_node, output_node, topological
from ..graph.trace import Trace, Tracer
from ..ops.call import expand


def backward(graph: Graph, wrt: Sequence[int], by: Sequence[int] | None = None, *, values: bool = False) -> Graph:
    """The gradient graph of `graph`.

    Args: wrt: positions of the inputs to differentiate by; by: positions of the outputs that have a gradient (default all).
    Returns: a graph with inputs [*inputs, *one seed for each of `by`] and outputs [one gradient for each of `wrt`], with
    `values` the outputs of `graph` in front. Captured values are ordinary inputs to the caller: they stand last again.
    """
    graph = expand(graph, keep=lambda node: node.op == "call" and node.attrs["derivative"] is not None)
    outputs = [graph.outputs[i] for i in (range(len(graph.outputs)) if by is None else by)]
    own = len(graph.inputs) - len(graph.captures)
    trace = Trace(name=graph.name or "backward")
    trace.captures.update({id(n): (n, v) for n, v in zip(graph.inputs[own:], graph.captures, strict=True)})
    seeds = [input_node(o.type, "seed") for o in outputs]
    with trace.active():
        gradients = sweep(trace, list(zip(outputs, seeds, strict=True)), [graph.inputs[i] for i in wrt])
        shown = [Tracer(o, trace) for o in graph.outputs] if values else []
        return trace.close([*graph.inputs[:own], *seeds], [*shown, *gradients])


def sweep(trace: Trace, outputs: Sequence[tuple[Node, Node]], wrt: Sequence[Node]) -> list[Any]:
    """The gradient of Σ outputs · seeds by each node of `wrt`: inputs, or values on the way to the outputs."""
    order = topological([o for o, _ in outputs])
    kept = set(wrt)
    needed = _depends_on(order, kept)
    sums: dict[tuple[Node, int], Any] = {}  # the gradient by each result of each node, as far as it is known

    def add(node: Node, index: int, g: Any) -> None:
        if g is not None and node in needed:
            sums[node, index] = sums[node, index] + g if (node, index) in sums else g

    for output, seed in outputs:
        add(output, 0, Tracer(seed, trace))
    for node in reversed(order):
        if node not in needed or node.op == "input":
            continue
        take = sums.get if node in kept else sums.pop
        g = [take((node, i), None) for i in range(len(node.types))]
        if all(part is None for part in g):
            continue
        with trace.within(node.scope):
            for arg, d in zip(node.args, _gradients(trace, node, g, needed), strict=True):
                add(arg, node.attrs["index"] if node.op == "output" else 0, d)
    return [sums[w, 0] if (w, 0) in sums else np.zeros_like(Tracer(w, trace)) for w in wrt]


def _gradients(trace: Trace, node: Node, g: list[Any], needed: set[Node]) -> list[Any]:
    """The gradient by each argument of one node, from those by its results: the local step of the chain rule."""
    if node.op == "output":
        return g
    rules = OPS[node.op].derivative
    args = [Tracer(a, trace) for a in node.args]
    need = [a in needed for a in node.args]
    if isinstance(rules, tuple):
        y = Tracer(node, trace)
        return [rule(g[0], y, *args, **node.attrs) if n and rule else None for n, rule in zip(need, rules, strict=True)]
    single = len(node.types) == 1
    ys = [Tracer(node if single else output_node(node, i), trace) for i in range(len(node.types))]
    if node.op == "scan":
        return rules(need, g, ys, *args, **node.attrs, sweep=backward)
    return rules(need, g[0] if single else g, ys[0] if single else ys, *args, **node.attrs)


def _depends_on(order: Sequence[Node], wrt: set[Node]) -> set[Node]:
    """The nodes that depend on `wrt` through floating-point values only: no gradient flows through integers."""
    needed: set[Node] = set()
    for node in order:
        reached = node in wrt or any(a in needed for a in node.args)
        if reached and any(t.dtype.kind == "f" for t in node.types):
            needed.add(node)
    return needed
