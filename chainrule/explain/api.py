"""`explain`: a computation and its gradients as equations.

In: a function and arguments, or a network with data and a loss. Out: an `Explanation` in plain text, LaTeX and HTML. The equations are
read off the recorded graph and off the graph that the chain rule makes of it. They hold in exact arithmetic: where the program
distinguishes cases only to keep exponentials from overflowing, or multiplies by one, they leave it out.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from .. import optim
from ..errors import DtypeError, ShapeError, UsageError
from ..graph import tree as trees
from ..graph.node import Array, Graph, Node
from ..transforms import Traced, trace_call
from .assemble import Assembly
from .document import Document
from .network import Input, Objective, network_input
from .page import html_fragment, html_page, latex
from .plain import plain_text
from .text import RESERVED


@dataclass(frozen=True)
class Explanation:
    """Equations of a computation and its gradients. Printed, it is plain text; a notebook shows it as formulas.

    Attributes:
        text: plain text; the equations are Python with NumPy's meaning.
        latex: for a LaTeX document that uses amsmath; ASCII only.
        html: a page of its own, with formulas in MathML, for light and dark.
        values: the arrays of the example by the names that the equations use (empty without numbers=True).
    """

    document: Document

    @cached_property
    def text(self) -> str:
        return plain_text(self.document)

    @cached_property
    def latex(self) -> str:
        return latex(self.document)

    @cached_property
    def html(self) -> str:
        return html_page(self.document)

    @property
    def values(self) -> dict[str, Array]:
        return {var.name: value for var, value in self.document.numbers.items()}

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"Explanation({self.document.title!r})"

    def _repr_html_(self) -> str:
        return html_fragment(self.document)

    def _repr_latex_(self) -> str:
        return self.latex


def explain(f: Any, *args: Any, numbers: bool = False, argnums: int | Sequence[int] | None = None, loss: Any = None,
            optimizer: Any = None, seed: int = 0, training: bool = True) -> Explanation:  # fmt: skip
    """The forward pass, the backward pass and the update of a function or a network, as equations.

    L = f(...);  ∂L/∂a for each argument a, by the chain rule, with a name for each value that is used more than once

    Args: f, a function that returns one number, and its arguments; or a network, and x and y. numbers: whether to show the values
    of this example; argnums: the arguments to differentiate by, by default all that are floating-point; optimizer: a name or an
    optimizer whose update rule is shown too. For a network also loss (this and the optimizer by default those of the last fit),
    seed (of dropout), training.
    Returns: an `Explanation`; print it, or take its `.text`, `.latex`, `.html`.
    Raises: `ShapeError` if f returns anything but one floating-point number; `DtypeError` for an argument without derivative.

    >>> import numpy as np
    >>> def f(w, x):
    ...     return np.sum(np.tanh(x @ w))
    >>> print(explain(f, np.ones((2, 1)), np.ones((3, 2)), argnums=0))
    L = f(w, x)
    <BLANKLINE>
    Names
      w   (2, 1)
      x   (3, 2)
    <BLANKLINE>
    Forward pass
      v1 = tanh(x @ w)           (3, 1)
      L = sum(v1)                number
    <BLANKLINE>
    Backward pass
      ∂L/∂w = x.T @ (1 - v1**2)  (2, 1)
    """
    chosen = None if optimizer is None else optim.resolve(optimizer)
    if hasattr(f, "_explained"):
        return Explanation(_of_network(f, args, numbers, argnums, loss, chosen, seed, training))
    if not callable(f):
        raise UsageError(f"explain takes a function or a network, not {f!r:.60}")
    if loss is not None:
        raise UsageError("explain: loss= is for networks; a function returns its loss itself")
    return Explanation(_of_function(f, args, numbers, argnums, chosen))


# ---- networks ----------------------------------------------------------------------------------------------------------------


def _of_network(net: Any, args: Sequence[Any], numbers: bool, argnums: Any, loss: Any, optimizer: optim.Optimizer | None, seed: int,
                training: bool) -> Document:  # fmt: skip
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


def _of_function(f: Callable[..., Any], args: Sequence[Any], numbers: bool, argnums: int | Sequence[int] | None,
                 optimizer: optim.Optimizer | None) -> Document:  # fmt: skip
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
