"""From a graph with named inputs to a document.

In: a graph whose first output is the loss, names and values of its inputs, and which of them to differentiate by. Out: the document,
with the forward pass as it was recorded and the backward pass as the sweep makes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..derive.backward import sweep
from ..graph.node import Array, Graph, Node, constant_node, topological
from ..graph.trace import Trace
from ..optim import Optimizer
from .build import Builder, Library, kind_of
from .document import Document, Named, Part, Section, functions_in, grouped, settle_names, tidy
from .equations import Item, equations
from .network import Input, layer_values, suffix
from .prepare import prepared
from .terms import Term, Terms, Var, variables
from .text import RESERVED
from .update import add_update
from .values import Values


class Assembly:
    """A graph on its way to a document.

    layers: for a network, what each of its layers is. wish: a name for a value of the graph, "" for none.
    """

    def __init__(self, graph: Graph, inputs: Sequence[Input], values: Sequence[Array], wrt: Sequence[int],
                 layers: Mapping[str, str] | None = None) -> None:  # fmt: skip
        self.graph = prepared(graph)
        self.loss = self.graph.outputs[0]
        self.wrt = list(wrt)
        self.layers = layers
        self.wish: Callable[[Node], str] = lambda node: ""
        outside = [Input(f"c{i}", "an array from outside the function") for i in range(1, len(self.graph.captures) + 1)]
        self.own = len(inputs)
        self.inputs = [*inputs, *outside]
        self.values = [*values, *(np.asarray(v) for v in self.graph.captures)]
        self.taken = {"L"}
        self.vars = [self._variable(node, given) for node, given in zip(self.graph.inputs, self.inputs, strict=True)]
        self.terms = Terms(self.taken, 1e-14 if self.loss.dtype == np.float64 else 1e-7)
        self.library = Library(self.terms)
        self.builder = Builder(self.terms, self.library, wish=self._wished)
        self.builder.forced[self.loss] = Var((), "f", wish="L", name="L", kept=True)
        self.deltas: dict[Node, str] = {}  # z of a layer -> the name of the gradient by it
        if layers is not None:
            for node, letter, path in layer_values(self.graph):
                self.builder.forced.setdefault(node, Var(node.shape, kind_of(node), wish=f"{letter}{suffix(path)}", kept=True))
                if letter == "z":
                    self.deltas[node] = f"δ{suffix(path)}"

    def _wished(self, node: Node) -> str:
        return self.wish(node)

    def _variable(self, node: Node, given: Input) -> Var:
        name = given.symbol
        while name in self.taken or name in RESERVED:
            name += "_"
        self.taken.add(name)
        return Var(node.shape, kind_of(node), "input", name, name=name)

    def document(self, title: str, numbers: bool, optimizer: Optimizer | None) -> Document:
        gradients = self._equations()
        forward, backward = tidy(self.terms, [self.forward, self.builder.items], gradients=[False, True])
        settle_names([*forward, *backward], self.taken)
        sections = [Section("Forward pass", self._parts(forward)), Section("Backward pass", self._parts(backward))]
        document = Document(title, [], sections)
        if numbers:
            run = Values(self.terms, dict(zip(self.vars, self.values, strict=True)))
            for section in sections:
                run.run([i for part in section.parts for i in part.items])
            made = dict.fromkeys(e.var for e in equations([*forward, *backward]))
            document.numbers = {v: value for v in (*self.vars, *made) if (value := run.of(v)) is not None}
        if optimizer is not None:
            used = self.taken | {e.var.name for e in equations([*forward, *backward])}
            chosen = [(self.vars[i], g, self.values[i]) for i, g in zip(self.wrt, gradients, strict=True)]
            add_update(document, self.terms, optimizer, chosen, used)
        self._finish(document)
        return document

    def _parts(self, items: list[Item]) -> list[Part]:
        if self.layers is None:
            return [Part("", [i for part in grouped(items, lambda scope: "") for i in part.items])]
        headings = {path: f"Layer {path}: {' '.join(what.split())}" for path, what in self.layers.items()}
        return grouped(items, lambda scope: headings.get(scope, "" if scope else "Loss"))

    def _finish(self, document: Document) -> None:
        """The table of names and the functions, as far as the equations need them."""
        shown = [e for s in document.sections for part in s.parts for e in equations(part.items)]
        terms = [e.term for e in shown if e.mode != "draw"]
        read = set(variables(terms))
        for i, (var, given, value) in enumerate(zip(self.vars, self.inputs, self.values, strict=True)):
            if var in read or i in self.wrt:
                scalar = np.ndim(value) == 0 and np.asarray(value).dtype.kind in "fiu"
                document.names.append(Named(var, given.about, f"{np.asarray(value)[()]:.6g}" if scalar else ""))
        document.functions = functions_in(terms)
        names = RESERVED | {v.name for v in self.vars} | {e.var.name for e in shown}
        for f in document.functions:
            if (f.notation or f.name) in names:
                f.name, f.notation = f"{f.name}_", ""
        if self.builder.zero_wins:
            document.remarks.append("zero")

    # ---- the equations -------------------------------------------------------------------------------------------------------

    def _equations(self) -> list[Var]:
        """Builds both passes. Returns: the variable of the gradient by each parameter."""
        graph, builder = self.graph, self.builder
        for node, var, value in zip(graph.inputs, self.vars, self.values, strict=True):
            builder.table[node] = self._input_term(node, var, value)
        order = topological([self.loss, *builder.forced])
        by_parameter, adjoint, captured = self._sweep(order)
        deltas = {adjoint[z]: z for z in self.deltas if z in adjoint}
        everything = topological([self.loss, *builder.forced, *reversed(deltas), *by_parameter])
        for node in everything:
            if node.op == "input" and node not in builder.table:  # an array that a rule of the sweep uses
                self.inputs.append(Input(f"c{len(self.inputs) - self.own + 1}", "an array that the chain rule uses"))
                self.values.append(captured[node])
                self.vars.append(self._variable(node, self.inputs[-1]))
                builder.table[node] = self._input_term(node, self.vars[-1], captured[node])

        first = set(order)
        builder.nodes([n for n in everything if n in first], [self.loss], everything)
        self.forward = builder.items
        builder.start_backward(set(everything) - first, {g: n for n, g in adjoint.items() if g not in first})
        self.wish = lambda node: ""
        for g, z in deltas.items():
            if g not in first:
                var = Var(g.shape, "f", "gradient", self.deltas[z], of=builder.table[z].attrs[0], kept=True)
                builder.forced[g], builder.scopes[g] = var, z.scope
        builder.nodes([n for n in everything if n not in first], [*deltas, *by_parameter], everything)
        scopes = {n.scope for n in order}
        made = []
        for i, g in zip(self.wrt, by_parameter, strict=True):
            of, scope = self.vars[i], self.inputs[i].scope
            var = Var(of.shape, "f", "gradient", of=of, kept=True)
            made.append(builder.name(var, builder.table[g], of.shape, scope if scope in scopes else g.scope))
        return made

    def _sweep(self, order: Sequence[Node]) -> tuple[list[Node], dict[Node, Node], dict[Node, Array]]:
        """The gradient by each parameter, by each value on the way, and the arrays that the rules brought in."""
        wrt = [self.graph.inputs[i] for i in self.wrt]
        depends: set[Node] = set()
        for node in order:
            reached = node in wrt or any(a in depends for a in node.args)
            if reached and any(t.dtype.kind == "f" for t in node.types):
                depends.add(node)
        watched = [n for n in order if n in depends and n.op != "input" and len(n.types) == 1 and n.dtype.kind == "f"]
        trace = Trace(name="explain")
        trace.captures.update({id(n): (n, v) for n, v in zip(self.graph.inputs[self.own :], self.graph.captures, strict=True)})
        with trace.active():
            if self.loss not in depends:
                return [trace.lift(0.0) for _ in wrt], {}, {}
            one = constant_node(1.0, self.loss.dtype)
            nodes = [trace.lift(g) for g in sweep(trace, [(self.loss, one)], [*wrt, *watched])]
        captured = {n: np.asarray(v) for n, v in trace.captures.values()}
        return nodes[: len(wrt)], dict(zip(watched, nodes[len(wrt) :], strict=True)), captured

    def _input_term(self, node: Node, var: Var, value: Any) -> Term:
        """An input; an array from outside that is arange(n), or the same everywhere, is written as that."""
        if self.vars.index(var) >= self.own and value.size and value.dtype.kind in "fiu":
            if value.ndim == 1 and value.size > 1 and value.dtype.kind in "iu" and np.array_equal(value, np.arange(value.size)):
                return self.terms.make("iota", (), (value.size,), (value.size,), "i", 10)
            if np.all(value == value.flat[0]):
                return self.terms.const(value.flat[0], kind_of(node))
        return self.terms.var(var)
