"""From a graph to equations.

In: a closed graph with named inputs. Out: equations in the order of the computation, loops as loops. Each node becomes a term; a term
gets a name of its own if several nodes read it, if the expression would grow too long, or if it is known by name anyway (a layer's
values, the user's own variables). The backward pass is not written down here: it is the graph that the sweep gives.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from ..graph.node import OPS, Graph, Node, topological
from ..normalize import graph_key
from ..ops.call import COMPOSITIONS
from .algebra import factored, merge_cases, shared_parts
from .equations import Equation, Item, Loop, Place, equations
from .prepare import is_elementwise
from .terms import ATOMS, ELEMENTWISE, ONE, Function, Index, Ratio, Shape, Term, Terms, Var, variables, walk
from .text import definition_text

LONG = 76  # an expression longer than about this many characters is split
SHORT = 11  # one that is used several times gets a name from here on
LONGEST_DEFINITION = 260  # a function whose definition is longer, or has more nodes than this, is put in place instead
LARGEST_FUNCTION = 120


# ---- functions that stay named -----------------------------------------------------------------------------------------------


class Library:
    """The functions that equations call, each with a definition made from its graph."""

    def __init__(self, terms: Terms) -> None:
        self.terms = terms
        self._made: dict[str, list[Function]] = {}
        self._known: dict[Any, tuple[Graph, Function | None]] = {}

    def function(self, node: Node) -> Function | None:
        """The function that a call stands for; None if its body must be put in place: too long, or it holds a loop."""
        body: Graph = node.attrs["body"]
        options = tuple(node.attrs.get("options", ()))
        key = (id(body), options)
        if key not in self._known:
            self._known[key] = (body, self._make(node, body, options))
        return self._known[key][1]

    def _make(self, node: Node, body: Graph, options: tuple[tuple[str, Any], ...]) -> Function | None:
        order = body.nodes()
        if len(order) > LARGEST_FUNCTION or len(node.types) > 1 or any(n.op in ("scan", "random_bits") for n in order):
            return None
        name, prime = str(node.attrs.get("name") or body.name).rstrip("'"), "'" * body.name.endswith("'")
        name = name if name.isidentifier() else "f"
        used = [i for i in body.inputs if i in order] or list(body.inputs[:1])
        words = _parameter_names(name, len(body.inputs))
        parameters = {
            i: Var(i.shape, kind_of(i), "input", w, name=w) for i, w in zip(body.inputs, words, strict=True) if i in used
        }
        builder = Builder(self.terms, self, naming=False)
        (definition,) = builder.graph(body, {i: self.terms.var(p) for i, p in parameters.items()})
        if definition.weight > LONGEST_DEFINITION:
            return None
        definition = merge_cases(self.terms, factored(self.terms, definition) if prime else definition)
        letters = (c for c in (*"uvw", *(f"u{i}" for i in range(1, LONGEST_DEFINITION))) if c not in words)
        definition, parts = shared_parts(self.terms, definition, LONG, SHORT, letters)
        note = "its derivative is given with it" if "name" in node.attrs else ""
        note = "no gradient flows through" if name == "stop_gradient" else note
        notation = str(node.attrs.get("notation") or "")
        made = Function(name + prime, options, tuple(parameters.values()), definition, is_elementwise(body),
                        notation and notation + prime, note, tuple(parts))  # fmt: skip
        known = self._made.setdefault(made.name, [])
        for other in known:
            if definition_text(other) == definition_text(made):
                return other
        if any(o.options == options for o in known):  # one name, but it means something else for these shapes
            made.name, made.notation = f"{name}{len(known) + 1}{prime}", ""
        known.append(made)
        return made


def _parameter_names(function: str, count: int) -> list[str]:
    if function in COMPOSITIONS:
        signature = inspect.signature(COMPOSITIONS[function].function)
        names = [p.name for p in signature.parameters.values() if p.default is p.empty]
        if len(names) == count:
            return names
    return ["x"] if count == 1 else [*"abcdefgh"[:count], *(f"x{i}" for i in range(8, count))]


def kind_of(node: Node) -> str:
    """The kind of a node's values, as terms have it."""
    return {"f": "f", "b": "b"}.get(node.dtype.kind, "i")


# ---- graphs ------------------------------------------------------------------------------------------------------------------


class Builder:
    """Turns nodes into terms and collects the equations that name some of them.

    forced: nodes that must be named, with the name. wish: a name for a node that needs one. naming False: no names at all.
    """

    def __init__(
        self, terms: Terms, library: Library, *, naming: bool = True, wish: Callable[[Node], str] = lambda node: ""
    ) -> None:
        self.terms = terms
        self.library = library
        self.naming = naming
        self.wish = wish
        self.items: list[Item] = []
        self.forced: dict[Node, Var] = {}
        self.scopes: dict[Node, str] = {}  # where a forced node belongs, if not where it was recorded
        self.gradient_of: dict[Node, Node] = {}  # a node of the backward pass -> the node whose gradient it is
        self.backward_nodes: set[Node] | None = None  # set while the backward pass is built
        self.zero_wins = False  # whether a gradient of 0 may meet an infinite slope
        self.table: dict[Node, Term] = {}
        self._tables: list[dict[Node, Term]] = [self.table]  # for the graph, and for each body that is being built
        self._several: list[dict[Node, list[Term | None]]] = [{}]  # the same for nodes with several results
        self._containers: list[list[Item]] = [self.items]
        self._counters: list[Index] = []
        self._read: dict[Node, set[int]] = {}
        self._loops: dict[Any, list[Term | None]] = {}  # loops by what they compute
        self._args: list[list[Term]] = []  # kept alive, for the keys of `_loops` hold their identities
        self._deriving = False  # within a loop that the chain rule made
        self._arrays: set[tuple[Node, int]] = set()  # results of loops that are read as whole arrays
        self._scope = ""
        self._states: dict[Node, tuple[Var, tuple[Place, ...]]] = {}  # the nodes that give states of a loop their next value

    def start_backward(self, nodes: set[Node], gradient_of: dict[Node, Node]) -> None:
        """What follows is the backward pass; its equations go to a new list."""
        self.items = []
        self._containers[0] = self.items
        self.backward_nodes = nodes
        self.gradient_of = gradient_of

    def name(self, var: Var, term: Term, shape: Shape, scope: str) -> Var:
        """Name a term of this shape, as an equation of layer `scope`. Returns: the variable that it is now."""
        self._scope = scope
        named: Var = self._force(var, term, shape).attrs[0]
        return named

    def graph(self, graph: Graph, table: Mapping[Node, Term]) -> list[Term]:
        """The outputs of a graph whose inputs are these terms."""
        self._enter(dict(table))
        self.nodes(graph.nodes(), graph.outputs)
        made = [self._tables[-1][o] for o in graph.outputs]
        self._leave()
        return made

    def _enter(self, table: dict[Node, Term]) -> None:
        self._tables.append(table)
        self._several.append({})

    def _leave(self) -> None:
        self._tables.pop()
        self._several.pop()

    def nodes(self, order: Sequence[Node], outputs: Sequence[Node], among: Sequence[Node] = ()) -> None:
        """Terms for these nodes, arguments first. among: all nodes that may read them, if there are others."""
        uses: dict[Node, int] = {}
        for o in outputs:
            uses[o] = uses.get(o, 0) + 1
            if o.op == "output":
                self._arrays.add((o.args[0], o.attrs["index"]))
        for node in among or order:
            for a in node.args:
                uses[a] = uses.get(a, 0) + 1
            if node.op == "output":
                self._read.setdefault(node.args[0], set()).add(node.attrs["index"])
            elif node.op != "scan":
                self._arrays |= {(a.args[0], a.attrs["index"]) for a in node.args if a.op == "output"}
        here = self._tables[-1]
        for node in order:
            if node in here or node in self._several[-1]:
                continue
            self._scope = node.scope or self._scope if self._counters else node.scope
            args = [here[a] for a in node.args] if node.op != "output" else []
            here_term = self._node(node, args)
            if here_term is not None:
                here[node] = self._named(node, here_term, uses.get(node, 0))

    # ---- names ---------------------------------------------------------------------------------------------------------------

    def _named(self, node: Node, term: Term, uses: int) -> Term:
        """The term, or the name it is known by from now on."""
        term = self._known(term)
        if not self.naming:
            return term
        if node in self._states:
            return self._step_state(*self._states[node], term)
        if node in self.forced:
            self._scope = self.scopes.get(node, self._scope)
            return self._force(self.forced[node], term, node.shape)
        if term.op in ATOMS or term.op in ("full", "iota", "random_bits"):
            return term
        wish = self.wish(node)
        if wish and term.weight > 4:
            return self.define(term, wish=wish, kept=True)
        if term.weight > LONG or (uses > 1 and term.weight >= SHORT):
            return self.define(term, of=self._origin(node))
        return term

    def _known(self, term: Term) -> Term:
        known = self.terms.names.get(term)
        return known if known is not None and known.loops <= set(self._counters) else term

    def _origin(self, node: Node) -> Var | None:
        """The value whose gradient a node of the backward pass is."""
        forward = self.gradient_of.get(node)
        term = self.table.get(forward) if forward is not None else None
        return term.attrs[0] if term is not None and term.op == "var" and term.attrs[0].role == "value" else None

    def _force(self, var: Var, term: Term, shape: Shape) -> Term:
        """Name a term as it was wished, even if it has a name already."""
        full = self.terms.full(term, shape)
        known: Var
        if full.op == "var" and not full.attrs[0].kept and not full.attrs[0].wish and full.attrs[0].role in ("value", "gradient"):
            known = full.attrs[0]  # it got a name of no meaning before
            known.wish, known.of, known.role, known.kept = var.wish, var.of, var.role, True
            return full
        if full.op == "at" and full.attrs[0].role == "sum" and full.attrs[0].of is None and len(full.attrs[1]) == 1:
            full.attrs[0].of, full.attrs[0].kept = var.of, True
            return full
        if full.op == "sequence" and full.attrs[1] == 0 and full.attrs[0].role == "gradient" and full.attrs[0].of is None:
            known = full.attrs[0]
            if len(known.indices) == 1:
                known.of, known.wish = var.of, var.wish
                return full
        return self.define(full, var=var)

    def define(self, term: Term, *, wish: str = "", of: Var | None = None, var: Var | None = None, kept: bool = False,
               mode: str = "define", role: str = "value") -> Term:  # fmt: skip
        """A new equation, in the innermost loop that the term depends on. Returns: how to refer to it."""
        level = max((ix.level for ix in term.loops), default=0)
        if var is None:
            role = "gradient" if role == "value" and self.backward_nodes is not None else role
            var = Var(term.shape, term.kind, role, wish, tuple(self._counters[:level]), of, kept)
        var.shape, var.kind, var.indices = term.shape, term.kind, tuple(self._counters[:level])
        self._containers[level].append(Equation(var, term, mode, scope=self._scope))
        reference = self.terms.reference(var)
        if term.op not in ATOMS:
            self.terms.names.setdefault(term, reference)
        return reference

    def _lighten(self, args: list[Term]) -> list[Term]:
        """Name the longest arguments until together they make a readable expression."""
        if not self.naming:
            return args
        while sum(a.weight for a in args) > LONG:
            heaviest = max(args, key=lambda a: 0 if a.op in ATOMS else a.weight)
            if heaviest.op in ATOMS or heaviest.weight < 20:
                break
            named = self._known(heaviest)
            named = self.define(heaviest) if named is heaviest else named
            args = [named if a is heaviest else a for a in args]
        return args

    # ---- one node ------------------------------------------------------------------------------------------------------------

    def _node(self, node: Node, args: list[Term]) -> Term | None:
        op, t, shapes = node.op, self.terms, [a.shape for a in node.args]
        if op == "output":
            made = self._several[-1][node.args[0]][node.attrs["index"]]
            assert made is not None
            return made
        if op == "scan":
            results = self._scan(node, args, shapes)
            if len(node.types) == 1:
                return results[0]
            self._several[-1][node] = results
            return None
        if op == "constant":
            return t.const(node.attrs["value"], kind_of(node))
        if op == "call":
            return self._call(node, args, shapes)
        if op == "where":
            x = _sign_of(node)
            if x is not None:
                return t.elementwise("sign", (self._tables[-1][x],))
        args = self._lighten(args)
        if op in _SIMPLE:
            return _SIMPLE[op](t, *args)
        if op in ("strong_multiply", "strong_divide"):
            g, b = args
            if g.op != "const" and not _vanishes_by_case(g) and (op == "strong_divide" or _unbounded(b)) and b.op != "const":
                self.zero_wins = True
            return t.times(g, b) if op == "strong_multiply" else t.over(g, b)
        if op == "cast":
            return self._cast(node, args[0])
        if op in OPS and OPS[op].elementwise and not node.attrs:
            return t.elementwise(op, args, "b" if node.dtype.kind == "b" else kind_of(node))
        method = getattr(self, f"_op_{op}", None)
        if method is not None:
            made_here: Term = method(node, args, shapes, **node.attrs)
            return made_here
        full = [t.full(a, s) for a, s in zip(args, shapes, strict=True)]
        attrs = tuple(sorted(node.attrs.items()))
        if len(node.types) == 1:
            return t.make(op, full, ("generic", *attrs), node.shape, kind_of(node))
        whole = self.define(t.make(op, full, ("generic", *attrs), (), "f"), kept=True)
        self._several[-1][node] = [t.make("item", (whole,), (i,), each.shape, "f") for i, each in enumerate(node.types)]
        return None

    def _cast(self, node: Node, x: Term) -> Term:
        t, to = self.terms, kind_of(node)
        if to == x.kind or x.op == "const" or (x.kind == "i" and _counts(x)):
            return x if x.op != "const" else t.const(x.attrs[0], to)
        if to == "b":
            return t.logical_not(t.compare("equal", x, t.zero))
        if x.kind == "b":
            return t.iverson(x)
        return t.elementwise("cast" if to == "f" else "trunc", (x,), to)

    def _op_broadcast(self, node: Node, args: list[Term], shapes: list[Shape], **attrs: Any) -> Term:
        return args[0]

    def _op_iota(self, node: Node, args: list[Term], shapes: list[Shape], *, length: int, dtype: Any) -> Term:
        return self.terms.make("iota", (), (length,), (length,), kind_of(node), 10)

    def _op_random_bits(self, node: Node, args: list[Term], shapes: list[Shape], *, shape: Shape, stream: int) -> Term:
        return self.terms.make("random_bits", args, (shape, stream), shape, "i", 1)

    def _op_reshape(self, node: Node, args: list[Term], shapes: list[Shape], *, shape: Shape) -> Term:
        (x,), (old,) = args, shapes
        if [n for n in old if n != 1] != [n for n in shape if n != 1]:
            return self.terms.reshape(self.terms.full(x, old), shape) if x.op not in ("const", "special") else x
        places = iter(i for i, n in enumerate(old) if n != 1)  # only axes of length 1 come or go
        missing = len(old) - len(x.shape)
        sources = [next(places) if n != 1 else None for n in shape]
        spec = [None if s is None or s < missing else s - missing for s in sources]
        while spec and spec[0] is None:
            del spec[0]
        return self.terms.expand(x, spec)

    def _reduce(self, node: Node, args: list[Term], shapes: list[Shape], *, axes: tuple[int, ...]) -> Term:
        (x,), (full,), t = args, shapes, self.terms
        missing = len(full) - len(x.shape)
        real = [a - missing for a in axes if a >= missing]
        if node.op == "sum":
            count = 1
            for a in axes:
                if a < missing or x.shape[a - missing] != full[a]:
                    count *= full[a]
            return t.mul((t.reduce("sum", x, real), 1), by=Ratio(Fraction(count), 1))
        return t.reduce(node.op, x, real)

    _op_sum = _op_max = _op_min = _reduce

    def _op_argmax(self, node: Node, args: list[Term], shapes: list[Shape], *, axis: int) -> Term:
        return self.terms.make("argmax", (self.terms.full(args[0], shapes[0]),), (axis,), node.shape, "i")

    def _op_contract(self, node: Node, args: list[Term], shapes: list[Shape], *, spec: str) -> Term:
        return self.terms.contract(spec, *(self.terms.full(a, s) for a, s in zip(args, shapes, strict=True)))

    def _op_transpose(self, node: Node, args: list[Term], shapes: list[Shape], *, axes: tuple[int, ...]) -> Term:
        return self.terms.transpose(self.terms.padded(args[0], len(axes)), axes)

    def _op_slice(self, node: Node, args: list[Term], shapes: list[Shape], *, start: Shape, stop: Shape, step: Shape) -> Term:
        return self.terms.slice(self._moved(args[0], shapes[0]), start, stop, step)

    def _moved(self, x: Term, shape: Shape) -> Term:
        """An argument of an operator that moves numbers: one number for all places needs no moving."""
        return x if x.op in ("const", "special") else self.terms.full(x, shape)

    def _op_flip(self, node: Node, args: list[Term], shapes: list[Shape], *, axes: tuple[int, ...]) -> Term:
        x = self._moved(args[0], shapes[0])
        return x if x.op in ("const", "special") else self.terms.make("flip", (x,), (axes,), node.shape, x.kind)

    def _op_pad(self, node: Node, args: list[Term], shapes: list[Shape], *, amounts: Any) -> Term:
        x, fill = args
        if x is fill:
            return x
        attrs = (tuple(tuple(a) for a in amounts),)
        return self.terms.make(
            "pad", (self.terms.full(x, shapes[0]), fill), attrs, node.shape, x.kind, x.weight + 8 + 8 * len(amounts)
        )

    def _op_concatenate(self, node: Node, args: list[Term], shapes: list[Shape], *, axis: int) -> Term:
        full = [self.terms.full(a, s) for a, s in zip(args, shapes, strict=True)]
        return self.terms.make("concatenate", full, (axis,), node.shape, kind_of(node))

    def _op_take(self, node: Node, args: list[Term], shapes: list[Shape], *, axis: int, **attrs: Any) -> Term:
        x, at = (self.terms.full(a, s) for a, s in zip(args, shapes, strict=True))
        return self.terms.make("take", (x, at), (axis,), node.shape, x.kind)

    def _op_scatter_add(self, node: Node, args: list[Term], shapes: list[Shape], *, axis: int, **attrs: Any) -> Term:
        full = [self.terms.full(a, s) for a, s in zip(args, shapes, strict=True)]
        return self.terms.make("scatter_add", full, (axis,), node.shape, kind_of(node))

    def _op_window(self, node: Node, args: list[Term], shapes: list[Shape], **attrs: Any) -> Term:
        full = self.terms.full(args[0], shapes[0])
        return self.terms.make(node.op, (full,), tuple(sorted(attrs.items())), node.shape, kind_of(node), full.weight + 40)

    _op_fold = _op_window

    def _call(self, node: Node, args: list[Term], shapes: list[Shape]) -> Term | None:
        body, t = node.attrs["body"], self.terms
        if body.name in ("unit_interval", "unit_interval64") and all(a.op == "random_bits" for a in args):
            term = t.make("uniform", args, (), node.shape, "f", 1)
            known = self._known(term)
            return known if known is not term or not self.naming else self.define(term, mode="draw", role="draw", kept=True)
        function = self.library.function(node)
        if function is None:
            made = self.graph(body, dict(zip(body.inputs, args, strict=True)))
            if len(node.types) == 1:
                return made[0]
            self._several[-1][node] = list(made)
            return None
        live = [(a, s, i) for a, s, i in zip(args, shapes, body.inputs, strict=True) if i in set(body.nodes())]
        given = [a if function.elementwise else t.full(a, s) for a, s, _ in live] or [t.full(args[0], shapes[0])]
        given = self._lighten(given)
        shape = np.broadcast_shapes(*(a.shape for a in given)) if function.elementwise else node.shape
        length = len(function.notation or function.name) + sum(a.weight + 2 for a in given)
        return t.make("call", given, (function,), shape, kind_of(node), length)

    # ---- loops ---------------------------------------------------------------------------------------------------------------

    def _scan(self, node: Node, args: list[Term], shapes: list[Shape]) -> list[Term | None]:
        """A loop with an equation for each state and each value that is named in a step.

        A state of a loop that the user wrote has at t its value after step t, so it enters the step as h[t-1]. The loop that the
        chain rule makes of it runs the other way; its states are counted so that what goes back to h[t] stands at t as well.
        """
        body: Graph = node.attrs["body"]
        states, sequences, length, reverse = (node.attrs[k] for k in ("states", "sequences", "length", "reverse"))
        read = self._read.get(node, set()) if len(node.types) > 1 else {0}
        ix = self.terms.counter(len(self._counters) + 1, length)
        outer: tuple[Place, ...] = tuple((c, 0) for c in self._counters)
        derived = self._deriving or (self.backward_nodes is not None and node in self.backward_nodes)
        key = (graph_key(body), states, sequences, length, reverse, tuple(id(a) for a in args))
        known = self._loops.get(key)
        if known is not None and all((r := known[i]) is not None and r.loops <= set(self._counters) for i in read):
            return known
        before, after = (0, -1 if reverse else 1) if derived else (1 if reverse else -1, 0)
        first, last = (0, length - 1) if not reverse else (length - 1, 0)
        live = _live_states(body, states, read)
        wanted = [i for i in range(len(body.outputs)) if i in live or (i in read and i >= states)]
        order = topological([body.outputs[i] for i in wanted])

        t = self.terms
        carried: dict[int, Var] = {}
        inputs: dict[Node, Term] = {}
        for i in sorted(live):
            carried[i] = Var(shapes[i], kind_of(body.inputs[i]), "state", "", (*self._counters, ix))
            start = t.full(args[i], shapes[i])
            self._containers[-1].append(Equation(carried[i], start, "start", (*outer, (None, first + before)), self._scope))
            inputs[body.inputs[i]] = t.at(carried[i], (*outer, (ix, before)))
        reachable = set(order)
        for k, x in enumerate(body.inputs[states:], states):
            if x not in reachable:
                continue
            if k < states + sequences:
                inputs[x] = self._element(args[k], shapes[k], ix)
            else:
                inputs[x] = args[k]
        self._name_states(node, carried, args, derived)

        loop = Loop(ix, reverse, scope=self._scope)
        deriving, self._deriving = self._deriving, derived
        self._counters.append(ix)
        self._containers.append(loop.items)
        self._enter(inputs)
        taken: set[Node] = set()
        places: dict[Var, tuple[Place, ...]] = dict.fromkeys(carried.values(), (*outer, (ix, after)))
        for i in sorted(live):
            out = body.outputs[i]
            if out.op != "input" and out not in taken:
                taken.add(out)
                self._states[out] = (carried[i], places[carried[i]])
        scope = self._scope
        self.nodes(order, [body.outputs[i] for i in wanted])
        self._scope = scope
        for i in sorted(live):
            out = body.outputs[i]
            if out not in taken or self._states[out][0] is not carried[i]:
                self._step_state(carried[i], places[carried[i]], inputs[out])
        results: list[Term | None] = [None] * len(body.outputs)
        for j in sorted(read):
            if j >= states:
                results[j] = self._stacked(
                    inputs[body.outputs[j]], body.outputs[j], ix, outer, (node, j) in self._arrays, derived
                )
        for out in taken:
            del self._states[out]
        self._leave()
        self._containers.pop()
        self._counters.pop()
        self._containers[-1].append(loop)
        self._deriving = deriving
        for i, var in carried.items():
            summed = _as_sum(loop, var, t.at(var, (*outer, (ix, before))), results)
            if summed is not None:
                t.names.pop(summed, None)
            results[i] = t.at(var, (*outer, (None, last + after)))
        for j in range(states, len(body.outputs)):  # the states on entry, which the loop of the backward pass reads
            entry = inputs.get(body.outputs[j])
            if (
                results[j] is None
                and entry is not None
                and entry.op == "at"
                and entry.attrs[0] in carried.values()
                and entry.attrs[0].role == "state"
            ):
                results[j] = self._sequence(entry, ix, outer)
        self._loops[key] = results
        self._args.append(args)
        return results

    def _step_state(self, var: Var, places: tuple[Place, ...], term: Term) -> Term:
        """The equation that gives a state its next value."""
        full = self.terms.full(term, var.shape)
        self._containers[-1].append(Equation(var, full, "define", places, self._scope))
        reference = self.terms.at(var, places)
        if full.op not in ATOMS and max((ix.level for ix in full.loops), default=0) == len(self._counters):
            self.terms.names.setdefault(full, reference)
        return reference

    def _name_states(self, node: Node, carried: Mapping[int, Var], args: list[Term], derived: bool) -> None:
        """In a loop of the backward pass the first states are what goes back to the states of the forward loop."""
        if not derived:
            for i, var in carried.items():
                var.wish = self.wish(node.attrs["body"].outputs[i]) or "h"
            return
        entered = [
            a.attrs[0] for a in args if a.op == "sequence" and a.attrs[1] != 0 and a.attrs[0].role == "state" and a.kind == "f"
        ]
        for i, var in carried.items():
            if i < len(entered) and entered[i].shape == var.shape:
                var.of = entered[i]

    def _stacked(self, term: Term, node: Node, ix: Index, outer: tuple[Place, ...], whole: bool, derived: bool) -> Term:
        """All values that a term takes in a loop, as an array. whole: it is read as an array, not step by step in another loop."""
        named = term.op == "at" and term.attrs[1][:-1] == outer and term.attrs[1][-1][0] == ix
        if not named or (whole and term.attrs[1][-1][1] != 0):
            term = self.terms.full(term, node.shape)
            role, wish = ("gradient", "") if derived else ("value", self.wish(node) or "y")
            var = Var(term.shape, term.kind, role, wish, tuple(self._counters), kept=True)
            self._containers[-1].append(Equation(var, term, scope=self._scope))
            if term.op not in ATOMS and ix in term.loops:
                self.terms.names.setdefault(term, self.terms.reference(var))
            term = self.terms.reference(var)
        return self._sequence(term, ix, outer)

    def _sequence(self, term: Term, ix: Index, outer: tuple[Place, ...]) -> Term:
        var, offset = term.attrs[0], term.attrs[1][-1][1]
        loops = [c for c, _ in outer if c is not None]
        return self.terms.make("sequence", (), (var, offset), (ix.length, *var.shape), var.kind, 3, loops=loops)

    def _element(self, x: Term, shape: Shape, ix: Index) -> Term:
        """x[t], for an x that stands for a value of this shape."""
        t = self.terms
        if x.op == "sequence":
            var, offset = x.attrs
            return t.at(var, (*((c, 0) for c in var.indices[:-1]), (ix, offset)))
        if x.op == "iota":
            return t.index(ix)
        if len(x.shape) < len(shape) or x.op in ("const", "special"):
            return x
        if x.shape[0] != shape[0]:
            return t.expand(x, range(1, len(shape)))
        if x.op in ELEMENTWISE and x.weight <= LONG:
            return t.rebuild(x, [self._element(a, shape, ix) for a in x.args])
        if x.op == "transpose" and list(x.attrs[0][1:]) == sorted(x.attrs[0][1:]):
            return t.make("pick", x.args, (ix, x.attrs[0][0]), x.shape[1:], x.kind, x.weight + 3, loops=(ix,))
        if x.op not in ATOMS and x.weight >= SHORT and self.naming:
            known = self._known(x)
            x = self.define(x) if known is x else known
        return t.make("pick", (x,), (ix, 0), x.shape[1:], x.kind, x.weight + 3, loops=(ix,))


_SIMPLE: dict[str, Callable[..., Term]] = {
    "negative": Terms.negative,
    "add": Terms.plus,
    "subtract": Terms.minus,
    "multiply": Terms.times,
    "divide": Terms.over,
    "power": Terms.power,
    "where": Terms.where,
    "less": lambda t, a, b: t.compare("less", a, b),
    "less_equal": lambda t, a, b: t.compare("less_equal", a, b),
    "equal": lambda t, a, b: t.compare("equal", a, b),
    "logical_not": Terms.logical_not,
    "normal_cdf": lambda t, x: t.times(
        t.const(0.5, "f"), t.plus(t.one, t.elementwise("erf", (t.times(t.const(math.sqrt(0.5), "f"), x),)))
    ),
    "logistic": lambda t, x: t.over(t.one, t.plus(t.one, t.elementwise("exp", (t.negative(x),)))),
    "tanh_softplus": lambda t, x: t.elementwise("tanh", (t.elementwise("log", (t.plus(t.one, t.elementwise("exp", (x,))),)),)),
}


def _sign_of(node: Node) -> Node | None:
    """x, if a node is 0 < x ? 1 : x < 0 ? -1 : x == 0 ? 0 : x, which is how np.sign is recorded."""

    def number(n: Node) -> Any:
        n = n.args[0] if n.op == "broadcast" else n
        return n.attrs["value"] if n.op == "constant" else None

    def match(n: Node, test: str, first: bool, value: float, x: Node) -> Node | None:
        if n.op != "where" or n.args[0].op != test or number(n.args[1]) != value:
            return None
        a, b = n.args[0].args
        return n.args[2] if (number(a) == 0 and b is x if first else number(b) == 0 and a is x) else None

    if node.args[0].op != "less":
        return None
    x = node.args[0].args[1]
    below = match(node, "less", True, 1, x)
    zero = match(below, "less", False, -1, x) if below is not None else None
    return x if zero is not None and match(zero, "equal", False, 0, x) is x else None


def _counts(x: Term) -> bool:
    """Whether whole numbers come from a count of cases, which multiplies with real numbers as it is."""
    return x.op == "iverson" or (x.op in ("mul", "add", "sum", "expand") and all(_counts(a) for a in x.args))


def _vanishes_by_case(g: Term) -> bool:
    return g.op == "iverson" or (g.op == "mul" and any(a.op == "iverson" for a in g.args))


def _unbounded(t: Term) -> bool:
    """Whether a term may be infinite where its variables are not."""
    return any(e.op in ("log", "log1p", "power") or (e.op == "mul" and min(e.attrs[1]) < 0) for e in walk(t))


def _live_states(body: Graph, states: int, read: set[int]) -> set[int]:
    """The states that something read depends on."""
    live = {i for i in read if i < states}
    while True:
        used = set(topological([body.outputs[i] for i in sorted(live | {i for i in read if i >= states})]))
        more = live | {i for i in range(states) if body.inputs[i] in used}
        if more == live:
            return live
        live = more


def _as_sum(loop: Loop, var: Var, entering: Term, results: Sequence[Term | None]) -> Term | None:
    """A state that each step only adds to is a sum, written G += ... . Returns: its next value, if it is one."""
    mine = [e for e in equations(loop.items) if e.var is var]
    if len(mine) != 1 or mine[0].term.op != "add" or mine[0] not in loop.items:
        return None
    ratios, args = mine[0].term.attrs[0], mine[0].term.args
    if not any(a is entering and r == ONE for a, r in zip(args, ratios, strict=True)):
        return None
    reads = sum(v is var for e in equations(loop.items) for v in variables([e.term]))
    if reads != 1 or any(r is not None and r.op == "sequence" and r.attrs[0] is var for r in results):
        return None
    mine[0].mode, var.role = "add", "sum"
    return mine[0].term
