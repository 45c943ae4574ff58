"""A graph computed by NumPy, node by node.

In: a closed graph and arrays. Out: its results. `Plan` fixes the order and the moment each value can be forgotten, so that a graph
that runs many times is walked once; `evaluate` is for one run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from ..errors import ChainruleError, DataError
from .node import OPS, Array, Graph, Node


class Plan:
    """A graph ready to run. Call it with one array for each input."""

    def __init__(self, graph: Graph) -> None:
        order = [n for n in graph.nodes() if n.op != "input"]
        slots = {n: i for i, n in enumerate((*graph.inputs, *order))}
        users: dict[Node, list[Node | None]] = {o: [None] for o in graph.outputs}  # None: read from outside
        last: dict[Node, Node] = {}
        for node in order:
            for a in node.args:
                users.setdefault(a, []).append(node)
                last[a] = node
        kept = {*graph.outputs, *graph.inputs}
        dead: dict[Node, list[int]] = {}
        for a, node in last.items():
            if a not in kept:
                dead.setdefault(node, []).append(slots[a])
        self._size = len(slots)
        self._steps = [
            (slots[n], _function(n, users), tuple(slots[a] for a in n.args), tuple(dead.get(n, ())), n)
            for n in order
        ]  # fmt: skip
        self._outputs = tuple(slots[o] for o in graph.outputs)
        self._inputs = len(graph.inputs)

    def __call__(self, arrays: Sequence[Array]) -> list[Any]:
        values: list[Any] = [*arrays, *[None] * (self._size - self._inputs)]
        node = None
        try:
            with np.errstate(all="ignore"):
                for slot, function, args, dead, node in self._steps:  # noqa: B007  # named in the message below
                    values[slot] = function(*[values[a] for a in args])
                    for d in dead:
                        values[d] = None
        except DataError as error:
            assert node is not None
            place = ", ".join(p for p in (node.scope and f'layer "{node.scope}"', node.source) if p)
            raise DataError(f"{error} [{place}]") from None
        return [values[o] for o in self._outputs]


def _function(node: Node, users: dict[Node, list[Node | None]]) -> Callable[..., Any]:
    """What to call for a node. A broadcast that only elementwise forms read, each with a full argument beside it, is left to
    NumPy's own broadcasting, which costs nothing."""
    if node.op == "constant":
        value = np.asarray(node.attrs["value"])
        return lambda: value
    if node.op == "output":
        return partial(_pick, node.attrs["index"])
    if node.op == "broadcast" and all(_broadcasts_itself(u) for u in users.get(node, [None])):
        return _same
    value_of = OPS[node.op].value
    return partial(value_of, **node.attrs) if node.attrs else value_of


def _broadcasts_itself(user: Node | None) -> bool:
    if user is None or not OPS[user.op].elementwise or user.op == "cast":
        return False
    return any(a.op != "broadcast" and a.shape == user.shape for a in user.args)


def _same(x: Any) -> Any:
    return x


def _pick(index: int, results: Any) -> Any:
    return results[index]


_plans: WeakKeyDictionary[Graph, Plan] = WeakKeyDictionary()


def plan_of(graph: Graph) -> Plan:
    """The plan of a graph, made once for as long as the graph lives."""
    plan = _plans.get(graph)
    if plan is None:
        plan = _plans[graph] = Plan(graph)
    return plan


def evaluate(graph: Graph, arrays: Sequence[Array]) -> list[Any]:
    """The results of `graph` for these inputs (captured arrays are filled in by themselves)."""
    missing = len(graph.inputs) - len(arrays)
    captured = graph.captures[len(graph.captures) - missing :] if missing else ()
    if missing > len(graph.captures):
        raise ChainruleError(f"this graph takes {len(graph.inputs) - len(graph.captures)} arrays, got {len(arrays)}")
    return plan_of(graph)([*arrays, *captured])


def first_not_finite(graph: Graph, arrays: Sequence[Array], names: Sequence[str]) -> str:
    """Where NaN or infinity first appears, in words: an input by its name, or the layer and operator of a node; "" if nowhere
    in what the graph returns."""
    values: dict[Node, Any] = dict(zip(graph.inputs, (*arrays, *graph.captures), strict=True))
    for name, value in zip(names, arrays, strict=False):
        if value.dtype.kind == "f" and not np.all(np.isfinite(value)):
            return f'"{name}" already holds values that are not finite'
    if all(np.all(np.isfinite(r)) for r in evaluate(graph, arrays) if np.asarray(r).dtype.kind == "f"):
        return ""  # infinities on the way, such as in a branch not taken, do no harm
    with np.errstate(all="ignore"):
        for node in graph.nodes():
            if node in values:
                continue
            result = _function(node, {})(*(values[a] for a in node.args))
            values[node] = result
            parts = result if isinstance(result, tuple) else (result,)
            if any(np.asarray(p).dtype.kind == "f" and not np.all(np.isfinite(p)) for p in parts):
                where = f'layer "{node.scope}"' if node.scope else "the loss or the update"
                return f"the first value that is not finite arises in {where}, in {node.op} of shape {node.shape}"
    return ""
