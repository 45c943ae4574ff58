"""`explain`: a computation and its gradients as equations.

In: a function and arguments, or a network with data and a loss. Out: an `Explanation` in plain text, LaTeX and HTML. The equations are
read off the recorded graph and off the graph that the chain rule makes of it.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from .. import optim
from ..derive.backward import sweep
from ..errors import DtypeError, ShapeError, UsageError
from ..graph import tree as trees
from ..graph.node import OPS, Array, Graph, Node, constant_node, topological
from ..graph.trace import Trace
from ..transforms import Traced, trace_call
from .build import Builder, Equation, Item, Library, equations, kind_of, prepared
from .document import Document, Named, Part, Section, functions_in, grouped, settle_names, tidy
from .plain import plain_text
from .terms import Term, Terms, Var
from .text import RESERVED
from .values import Values


class Objective(Protocol):
    """What a network tells about itself: the objective as a graph [objective, scores] of named inputs, and its layers."""

    graph: Graph
    names: Sequence[str]
    values: Sequence[Array]
    wrt: Sequence[int]
    layers: Mapping[str, str]


@dataclass(frozen=True)
class Explanation:
    """Equations of a computation and its gradients. Printed, it is plain text; a notebook shows it as formulas.

    values: the arrays of the example by the names that the equations use (with `numbers=True`).
    """

    document: Document

    @cached_property
    def text(self) -> str:
        """Plain text; the equations are Python with NumPy's meaning."""
        return plain_text(self.document)

    @cached_property
    def latex(self) -> str:
        r"""LaTeX for a document that uses amsmath and amssymb."""
        from .page import latex

        return latex(self.document)

    @cached_property
    def html(self) -> str:
        """A page of its own, with formulas in MathML."""
        from .page import html_page

        return html_page(self.document)

    @property
    def values(self) -> dict[str, Array]:
        return {var.name: value for var, value in self.document.numbers.items() if value is not None}

    def __str__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        from .page import html_fragment

        return html_fragment(self.document)

    def _repr_latex_(self) -> str:
        return self.latex


def explain(f: Any, *args: Any, numbers: bool = False, argnums: int | Sequence[int] | None = None, loss: Any = None,
            optimizer: Any = None, seed: int = 0, training: bool = True) -> Explanation:  # fmt: skip
    """The forward pass, the backward pass and the update of a function or a network, as equations.

    Args: f a function that returns one number, with its arguments; or a network, with x and y. numbers: whether to show the values
    of this example; argnums: the arguments to differentiate by, by default all that are floating-point; optimizer: a name or an
    optimizer whose update rule is shown too. For a network also loss (by default that of the last fit), seed (of dropout), training.
    Returns: an `Explanation` with `.text`, `.latex` and `.html`.
    Raises: `ShapeError` if the function returns anything but one floating-point number; `DtypeError` for arguments without derivative.

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
    if hasattr(f, "_explained"):
        return _explain_network(f, args, numbers, argnums, loss, optimizer, seed, training)
    if loss is not None:
        raise UsageError("explain: loss= is for networks; a function returns its loss itself")
    return _explain_function(f, args, numbers, argnums, optimizer)


# ---- functions ---------------------------------------------------------------------------------------------------------------


def _explain_function(f: Callable[..., Any], args: Sequence[Any], numbers: bool, argnums: Any, optimizer: Any) -> Explanation:
    if not callable(f):
        raise UsageError(f"explain takes a function or a network, not {f!r:.60}")
    traced = trace_call(f, args)
    outputs = traced.graph.outputs
    if len(outputs) != 1 or outputs[0].shape != () or outputs[0].dtype.kind != "f":
        raise ShapeError(
            f"explain needs a function that returns one floating-point number; this one returns {', '.join(str(o.type) for o in outputs)}"
            " (use np.sum or np.mean)"
        )
    wrt = _wanted(traced, argnums)
    names = _leaf_names(f, traced)
    labels = [names[i] for i in traced.inputs]
    values = [np.asarray(traced.leaves[i]) for i in traced.inputs]
    called = getattr(f, "__name__", type(f).__name__)
    called = called if called.isidentifier() else "f"
    title = f"L = {called}({', '.join(_parameters(f, len(args)))})"
    inputs = [_Input(name, "", name) for name in labels]
    core = _Core(traced.graph, inputs, values, wrt)
    core.wish = _variable_names(f, core.graph)
    return core.explanation(title, {}, numbers, optimizer)


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


# ---- networks ----------------------------------------------------------------------------------------------------------------


def _explain_network(net: Any, args: Sequence[Any], numbers: bool, argnums: Any, loss: Any, optimizer: Any, seed: int,
                     training: bool) -> Explanation:  # fmt: skip
    if len(args) != 2:
        raise UsageError(f"explain: a network takes x and y, explain(net, x, y, loss=...); got {len(args)} arguments besides it")
    if argnums is not None:
        raise UsageError("explain: argnums= is for functions; a network is differentiated by its trainable parameters")
    o: Objective = net._explained(*args, loss, seed=seed, training=training)
    graph = Graph(o.graph.inputs, o.graph.outputs[:1], o.graph.captures)
    inputs = [_network_input(name, i in set(o.wrt)) for i, name in enumerate(o.names)]
    core = _Core(graph, inputs, list(o.values), list(o.wrt))
    core.layers(o.layers)
    word = loss if isinstance(loss, str) else getattr(loss, "name", getattr(loss, "__name__", ""))
    title = f"{type(net).__name__}: {len(o.wrt)} parameters to train" + (f", loss {word}" if word else "")
    return core.explanation(title, o.layers, numbers, optimizer)


def _suffix(path: str) -> str:
    """A layer's name as the end of a variable's: "0" -> "0", "2.1" -> "2_1", "encoder.0" -> "_encoder_0"."""
    word = "".join(c if c.isalnum() else "_" for c in path)
    return word if not word or word[0].isdigit() else f"_{word}"


_SYMBOLS = {"weight": "W", "bias": "b"}
_INPUTS = {
    "target": ("y", "target"),
    "weight": ("r", "weight of each row"),
    "divisor": ("n", "rows, or the sum of their weights"),
    "seed": ("seed", "seed of the random numbers"),
    "step": ("step", "number of the step"),
}


@dataclass(frozen=True)
class _Input:
    """An input of the graph: its symbol, what to say about it, and its full name."""

    symbol: str
    about: str
    full: str


def _network_input(name: str, trainable: bool) -> _Input:
    path, _, last = name.rpartition(".")
    if not path:
        symbol, about = _INPUTS.get(name, (name, "input" if not trainable else ""))
        return _Input(symbol, about, name)
    last = "".join(c if c.isalnum() else "_" for c in last)
    return _Input(_SYMBOLS.get(last, last) + _suffix(path), name, name)


# ---- what both have in common ------------------------------------------------------------------------------------------------


class _Core:
    """A graph on its way to a document."""

    def __init__(self, graph: Graph, inputs: Sequence[_Input], values: list[Array], wrt: list[int]) -> None:
        self.graph = prepared(graph)
        self.wish: Callable[[Node], str] = lambda node: ""
        self.loss = self.graph.outputs[0]
        own = len(self.graph.inputs) - len(self.graph.captures)
        captured = [f"c{i}" for i in range(1, len(self.graph.captures) + 1)]
        self.inputs = [*inputs, *(_Input(c, "an array from outside the function", c) for c in captured)]
        self.values = [*values, *(np.asarray(v) for v in self.graph.captures)]
        taken: set[str] = {"L"}
        self.vars: list[Var] = []
        for node, given in zip(self.graph.inputs, self.inputs, strict=True):
            name = given.symbol
            while name in taken or (name in RESERVED and "." not in name and "[" not in name):
                name += "_"
            taken.add(name)
            self.vars.append(Var(node.shape, kind_of(node), "input", name, name=name))
        self.taken = taken
        self.terms = Terms(taken, 1e-14 if self.loss.dtype == np.float64 else 1e-7)
        self.library = Library(self.terms)
        self.wrt = wrt
        self.own = own
        self.forced: dict[Node, Var] = {}
        self.deltas: dict[Node, str] = {}

    def layers(self, layers: Mapping[str, str]) -> None:
        """Names for the values of layers: z before the activation, a after it, δ for the gradient by z."""
        for node, letter, path in layer_values(self.graph):
            self.forced[node] = Var(node.shape, kind_of(node), "value", f"{letter}{_suffix(path)}", kept=True)
            if letter == "z":
                self.deltas[node] = f"δ{_suffix(path)}"

    def explanation(self, title: str, layers: Mapping[str, str], numbers: bool, optimizer: Any) -> Explanation:
        forward, backward_, zero_wins, gradients = self.equations()
        sections = tidy(self.terms, [forward, backward_], gradients=[False, True])
        every = [*sections[0], *sections[1]]
        settle_names(every, self.taken)

        def heading(scope: str) -> str:
            return f"Layer {scope}: {layers[scope]}" if scope in layers else "Loss" if layers and not scope else ""

        parts = [Section("Forward pass", grouped(sections[0], heading)), Section("Backward pass", grouped(sections[1], heading))]
        if not layers:
            parts = [Section(s.title, [Part("", [i for p in s.parts for i in p.items])]) for s in parts]
        values: dict[Var, Any] = {}
        if numbers:
            run = Values(self.terms, dict(zip(self.vars, self.values, strict=True)))
            for section in parts:
                run.run([i for p in section.parts for i in p.items])
            values = {v: run.of(v) for v in [*self.vars, *dict.fromkeys(e.var for e in equations(every))]}
        document = Document(title, [], parts, numbers=values)
        if optimizer is not None:
            from .update import add_update

            add_update(document, self.terms, optim.resolve(optimizer), [self.vars[i] for i in self.wrt], gradients,
                       [self.values[i] for i in self.wrt], {v.name for v in values} | self.taken)  # fmt: skip
        self._finish(document, every, zero_wins)
        return Explanation(document)

    def _finish(self, document: Document, every: list[Item], zero_wins: bool) -> None:
        """The table of names and the functions, as far as the equations use them."""
        shown: list[Equation] = [e for s in document.sections for e in equations([i for p in s.parts for i in p.items])]
        terms = [e.term for e in shown if e.mode != "draw"]
        from .terms import variables

        read = set(variables(terms))
        for i, (var, given, value) in enumerate(zip(self.vars, self.inputs, self.values, strict=True)):
            if var in read or i in self.wrt:
                single = np.asarray(value)
                document.names.append(Named(var, given.about, f"{single[()]:.6g}" if single.shape == () and single.dtype.kind in "fiu" else ""))
        document.functions = functions_in(terms)
        if zero_wins:
            document.remarks.append("zero")

    # ---- the equations -------------------------------------------------------------------------------------------------------

    def equations(self) -> tuple[list[Item], list[Item], bool, list[Var]]:
        graph, terms = self.graph, self.terms
        wrt = [graph.inputs[i] for i in self.wrt]
        order = topological([self.loss, *self.forced])
        depends = _depends_on(order, set(wrt))
        watched = [n for n in order if n in depends and n.op != "input" and len(n.types) == 1 and n.dtype.kind == "f"]
        trace = Trace(name="explain")
        trace.captures.update({id(n): (n, v) for n, v in zip(graph.inputs[self.own :], graph.captures, strict=True)})
        with trace.active():
            seed = constant_node(1.0, self.loss.dtype)
            swept = sweep(trace, [(self.loss, seed)], [*wrt, *watched]) if self.loss in depends else [0.0] * len(wrt)
            found = [trace.lift(g) for g in swept]
        by_parameter, by_value = found[: len(wrt)], dict(zip(watched, found[len(wrt) :], strict=False))
        deltas = {by_value[n]: (n, name) for n, name in self.deltas.items() if n in by_value}

        builder = Builder(terms, self.library, wish=self.wish)
        builder.forced = {self.loss: Var((), "f", "value", "L", kept=True, name="L"), **self.forced}
        for node, var in zip(graph.inputs, self.vars, strict=True):
            builder.table[node] = self._input_term(node, var)
        ends = [*reversed(deltas), *by_parameter]
        extra = [n for n in topological([self.loss, *ends]) if n.op == "input" and n not in builder.table]
        outside = {id(n): v for n, v in trace.captures.values()}
        for node in extra:  # arrays that the rules brought in
            name = f"c{len(self.vars)}"
            var = Var(node.shape, kind_of(node), "input", name, name=name)
            self.vars.append(var)
            self.taken.add(name)
            self.inputs.append(_Input(name, "an array that a rule of the chain rule uses", name))
            self.values.append(np.asarray(outside[id(node)]))
            builder.table[node] = self._input_term(node, var)
        forward_nodes = set(order)
        everything = topological([self.loss, *self.forced, *ends])
        builder.nodes([n for n in everything if n in forward_nodes], [self.loss], everything)
        forward = builder.items
        builder.start_section()
        builder.wish = lambda node: ""
        builder.backward_nodes = set(everything) - forward_nodes
        builder.gradient_of = {g: n for n, g in by_value.items() if g not in forward_nodes}
        for adjoint, (node, name) in deltas.items():
            if adjoint in builder.backward_nodes:
                of = builder.table[node].attrs[0]
                builder.forced[adjoint] = Var(adjoint.shape, "f", "gradient", name, of=of, kept=True)
                builder.scopes[adjoint] = node.scope
        gradients = self._gradients(builder, deltas, by_parameter, everything, forward_nodes)
        return forward, builder.items, builder.zero_wins, gradients

    def _gradients(self, builder: Builder, deltas: Mapping[Node, Any], by_parameter: Sequence[Node], everything: Sequence[Node],
                   forward_nodes: set[Node]) -> list[Var]:  # fmt: skip
        """Equations of the backward pass. Returns: the variable of the gradient by each parameter."""
        builder.nodes([n for n in everything if n not in forward_nodes], [*deltas, *by_parameter], everything)
        made = []
        for i, node in zip(self.wrt, by_parameter, strict=True):
            of = self.vars[i]
            builder._scope = self._scope_of(of, node)
            term = builder._force(Var(of.shape, "f", "gradient", "", of=of, kept=True), builder.table[node], of.shape)
            made.append(term.attrs[0])
        return made

    def _scope_of(self, parameter: Var, gradient: Node) -> str:
        full = next(g.full for g, v in zip(self.inputs, self.vars, strict=False) if v is parameter)
        path = full.rpartition(".")[0]
        return path if any(n.scope == path for n in self.graph.nodes()) else gradient.scope

    def _input_term(self, node: Node, var: Var) -> Term:
        value = self.values[self.vars.index(var)]
        captured = self.vars.index(var) >= self.own
        if captured and value.ndim == 1 and value.dtype.kind in "iu" and value.size > 1 and np.array_equal(value, np.arange(value.size)):
            return self.terms.make("iota", (), (value.size,), (value.size,), "i", 10)
        if captured and value.size and value.dtype.kind in "fiu" and np.all(value == value.reshape(-1)[0]):
            return self.terms.const(value.reshape(-1)[0], kind_of(node))  # np.zeros, np.ones and the like
        return self.terms.var(var)


def _depends_on(order: Sequence[Node], wrt: set[Node]) -> set[Node]:
    """The nodes through which `wrt` has an influence on real numbers."""
    found: set[Node] = set()
    for node in order:
        if (node in wrt or any(a in found for a in node.args)) and any(t.dtype.kind == "f" for t in node.types):
            found.add(node)
    return found


def layer_values(graph: Graph) -> list[tuple[Node, str, str]]:
    """The values of each layer that have a name in every textbook: (node, "z" or "a", layer).

    z is what a layer computes by products and sums with its parameters; a is what it passes on. A layer that is used twice or
    that has several such z (attention) keeps no name for them.
    """
    order = graph.nodes()
    users: dict[Node, list[Node]] = {}
    for node in order:
        for a in node.args:
            users.setdefault(a, []).append(node)
    by_scope: dict[str, list[Node]] = {}
    for node in order:
        if node.scope and node.op not in ("input", "constant"):
            by_scope.setdefault(node.scope, []).append(node)
    found = []
    for scope, nodes in by_scope.items():
        inside = set(nodes)
        passed = [n for n in nodes if any(u.scope != scope for u in users.get(n, ())) or n in graph.outputs]
        passed = [n for n in passed if n.dtype.kind == "f" and len(n.types) == 1]
        affine: set[Node] = set()
        for n in nodes:
            if n.op == "contract" or (n.op in ("add", "subtract") and _affine_sum(n, affine)):
                affine.add(n)
        tops = [n for n in affine if any(u not in affine for u in users.get(n, ())) or n in graph.outputs]
        z = tops[0] if len(tops) == 1 else None
        a = passed[-1] if len(passed) == 1 else None
        if z is None and a is not None and not affine and len(a.args) == 1 and a.args[0] in inside and _activation(a):
            z = a.args[0]
        if z is not None:
            found.append((z, "z", scope))
        if a is not None and a is not z:
            found.append((a, "a", scope))
    return found


def _activation(node: Node) -> bool:
    return node.op == "call" or (node.op in OPS and OPS[node.op].elementwise)


def _affine_sum(node: Node, affine: set[Node]) -> bool:
    a, b = node.args
    for one, other in ((a, b), (b, a)):
        if one in affine:
            while other.op in ("broadcast", "reshape"):
                other = other.args[0]
            return other.op == "input" or other in affine
    return False


__all__ = ["Explanation", "explain"]
