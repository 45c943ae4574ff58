"""What is explained: a function or a network, made a document.

In: what `explain` was given. Out: a `Document`, or the error that says what cannot be explained.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..errors import DtypeError, ShapeError, UsageError
from ..graph import tree as trees
from ..graph.node import Graph, Node
from ..optim import Optimizer
from ..transforms import Traced, trace_call
from .assemble import Assembly
from .document import Document
from .network import Input, Objective, network_input
from .text import RESERVED

# ---- networks ----------------------------------------------------------------------------------------------------------------


def of_network(net: Any, args: Sequence[Any], numbers: bool, argnums: Any, loss: Any, optimizer: Optimizer | None, seed: int,
               training: bool) -> Document:  # fmt: skip
    """The document of a network with data and a loss."""
    if len(args) != 2:
        raise UsageError(f"explain: a network takes x and y, explain(net, x, y, loss=...); got {len(args)} arguments besides it")
    if argnums is not None:
        raise UsageError("explain: argnums= is for functions; a network is differentiated by its trainable parameters")
    o: Objective = net._explained(*args, loss, seed=seed, training=training)
    loss = loss if loss is not None else getattr(net, "_loss", None)
    optimizer = optimizer if optimizer is not None else getattr(net, "_optimizer", None)
    graph = Graph(o.graph.inputs, o.graph.outputs[:1], o.graph.captures)
    assembly = Assembly(graph, [network_input(name) for name in o.names], o.values, o.wrt, o.layers)
    word = loss if isinstance(loss, str) else getattr(loss, "name", getattr(loss, "__name__", ""))
    title = f"{type(net).__name__}: {len(o.wrt)} parameters to train" + (f", loss {word}" if word else "")
    return assembly.document(title, numbers, optimizer)


# ---- functions ---------------------------------------------------------------------------------------------------------------


def of_function(f: Callable[..., Any], args: Sequence[Any], numbers: bool, argnums: int | Sequence[int] | None,
                optimizer: Optimizer | None) -> Document:  # fmt: skip
    """The document of a function with arguments."""
    traced = trace_call(f, args)
    outputs = traced.graph.outputs
    if len(outputs) != 1 or outputs[0].shape != () or outputs[0].dtype.kind != "f":
        raise ShapeError(
            "explain needs a function that returns one floating-point number; this one returns "
            f"{', '.join(str(o.type) for o in outputs)} (use np.sum or np.mean)"
        )
    wrt = _wanted(traced, argnums)
    names = _leaf_names(f, traced)
    inputs = [Input(names[i]) for i in traced.inputs]
    assembly = Assembly(traced.graph, inputs, [np.asarray(traced.leaves[i]) for i in traced.inputs], wrt)
    assembly.wish = _variable_names(f, assembly.graph)
    called = str(getattr(f, "__name__", type(f).__name__))
    title = f"L = {called if called.isidentifier() else 'f'}({', '.join(_parameters(f, len(args)))})"
    return assembly.document(title, numbers, optimizer)


def _wanted(traced: Traced, argnums: int | Sequence[int] | None) -> list[int]:
    """The positions among the graph's inputs of what to differentiate by."""
    count = len(traced.spans)
    chosen = range(count) if argnums is None else [argnums] if isinstance(argnums, int) else list(argnums)
    wrt = []
    for a in chosen:
        if not -count <= a < count:
            raise UsageError(f"explain: argnums={a}, but the function got {count} arguments")
        for i in range(*traced.spans[a]):
            if i in traced.inputs and traced.graph.inputs[traced.inputs.index(i)].dtype.kind == "f":
                wrt.append(traced.inputs.index(i))
            elif argnums is not None:
                raise DtypeError(
                    f"explain: argument {a} holds {traced.leaves[i]!r:.60}, which has no derivative: "
                    "pass floating-point numbers, or choose other arguments with argnums"
                )
    if not wrt:
        raise DtypeError("explain: none of the arguments holds floating-point numbers, so there is nothing to differentiate by")
    return wrt


def _parameters(f: Any, count: int) -> list[str]:
    """A name for each positional argument."""
    try:
        parameters = list(inspect.signature(f).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][:count]
    rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), "x")
    return names + [f"{rest}{i}" for i in range(count - len(names))]


def _leaf_names(f: Any, traced: Traced) -> list[str]:
    """How Python code would reach each leaf of the arguments: w, params.w1, layers[0]."""
    names: list[str] = []
    for name, structure in zip(_parameters(f, len(traced.structures)), traced.structures, strict=True):
        names += _paths(structure, f"{name}_" if name in RESERVED else name)
    return names


def _paths(structure: trees.Structure, prefix: str) -> list[str]:
    if structure.kind is None:
        return [prefix]
    keys = structure.keys or tuple(range(len(structure.children)))
    found = []
    for key, child in zip(keys, structure.children, strict=True):
        plain = isinstance(key, str) and key.isidentifier() and key.isascii()
        found += _paths(child, f"{prefix}.{key}" if plain else f"{prefix}[{key!r}]")
    return found


def _variable_names(f: Any, graph: Graph) -> Callable[[Node], str]:
    """Which nodes the function itself binds to a name: `h = np.tanh(x @ w)` calls the tanh node h.

    Found by the user's line of each node: the value of a statement is its only node that no other node of it reads. Without source
    code there are no names.
    """
    try:
        f = inspect.unwrap(f)
        lines, first = inspect.getsourcelines(f)
        module = ast.parse(textwrap.dedent("".join(lines)))
        file = f.__code__.co_filename
    except (TypeError, OSError, SyntaxError, AttributeError, ValueError):
        return lambda node: ""
    bound: dict[str, tuple[int, str]] = {}
    for statement in ast.walk(module):
        if isinstance(statement, ast.Assign) and len(statement.targets) == 1 and isinstance(statement.targets[0], ast.Name):
            for line in range(statement.lineno, (statement.end_lineno or statement.lineno) + 1):
                bound[f"{file}:{line + first - 1}"] = (statement.lineno, statement.targets[0].id)
    names: dict[Node, str] = {}

    def search(graph: Graph) -> None:
        statements: dict[tuple[int, str], list[Node]] = {}
        for node in graph.nodes():
            if node.op == "scan":
                search(node.attrs["body"])
            if node.source in bound and node.op not in ("input", "constant", "output", "scan"):
                statements.setdefault(bound[node.source], []).append(node)
        for (_, name), nodes in statements.items():
            read = {a for n in nodes for a in n.args}
            ends = [n for n in nodes if n not in read]
            if len(ends) == 1:
                names[ends[0]] = name

    search(graph)
    return lambda node: names.get(node, "")
