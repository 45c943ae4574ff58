"""Named compositions: functions built from core forms, kept under their name.

In: a function written in NumPy. Out: the same function, which on plain arrays runs as it is and on traced arrays is recorded as
one node "call" that holds its body as a closed graph. `expand` puts the bodies in place; no backend sees a call. A derivative is
written only where the derived one is unstable or slow.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from ..errors import DtypeError, ShapeError
from ..graph.interpret import evaluate
from ..graph.node import OPS, Array, Graph, Node, Op, Rows, Rule, Type
from ..graph.rows import propagate_rows
from ..graph.trace import answers, apply, build, inline, is_traced, located, type_of
from ..records import record
from ..registry import Registry
from .elementwise import common


@record(frozen=True)
class Composition:
    """What is known of a named composition. `function` runs eagerly and when traced; the rest is as in `Op`."""

    name: str
    function: Callable[..., Any]
    derivative: tuple[Rule | None, ...] | None
    examples: Callable[[np.random.Generator], Iterable[tuple[Sequence[Any], dict[str, Any]]]]
    smooth: bool
    notation: str


COMPOSITIONS: Registry[Composition] = Registry("function")


def _one_argument(r: np.random.Generator) -> Iterable[Any]:
    yield [r.normal(size=(3, 4))], {}


def composition(
    name: str,
    *,
    derivative: tuple[Rule | None, ...] | None = None,
    numpy: Sequence[Any] = (),
    method: str = "",
    elementwise: bool = False,
    smooth: bool = True,
    notation: str = "",
    examples: Callable[[np.random.Generator], Iterable[Any]] = _one_argument,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declare a function of arrays (positional) and static options (by keyword in its body's signature) as a named composition.

    elementwise: arguments are brought to one shape and floating-point type first. notation: how equations write it, "σ".
    derivative: rules (g, y, *arguments, **options), one for each array argument.
    """

    def declare(body: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(body)
        arrays = [p.name for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty]

        @functools.lru_cache(maxsize=1024)
        def graph_of(types: tuple[Type, ...], options: tuple[tuple[str, Any], ...]) -> Graph:
            return build(lambda *xs: [body(*xs, **dict(options))], types, name=name)

        @functools.wraps(body)
        def function(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            values = [bound.arguments.pop(a) for a in arrays]
            if not is_traced(*values):
                return body(*args, **kwargs)
            if elementwise:
                values = common(np.tanh if len(values) == 1 else np.arctan2, values)
            options = tuple(sorted((k, _static(name, v)) for k, v in bound.arguments.items()))
            body_graph = graph_of(tuple(type_of(v) for v in values), options)
            return apply(
                "call", *values, *body_graph.captures, body=body_graph, derivative=derivative, options=options, notation=notation
            )

        COMPOSITIONS.add(name, Composition(name, function, derivative, examples, smooth, notation))
        return answers(*numpy, method=method)(function)

    return declare


def named(name: str, body: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A function of one array that equations show under this name, for use in derivatives; nobody finds it by it."""

    @functools.lru_cache(maxsize=1024)
    def graph_of(type: Type) -> Graph:
        return build(lambda x: [body(x)], [type], name=name)

    def function(x: Any) -> Any:
        return apply("call", x, body=graph_of(type_of(x)), derivative=None, options=(), notation="") if is_traced(x) else body(x)

    return function


def _static(name: str, value: Any) -> Any:
    if is_traced(value):
        raise DtypeError(located(f"{name}: this option must be a plain Python value, not a traced array"))
    return tuple(value) if isinstance(value, list) else value


def _infer(*types: Type, body: Graph, **attrs: Any) -> tuple[Type, ...]:
    if [(t.shape, t.dtype) for t in types] != [(i.shape, i.dtype) for i in body.inputs]:
        raise ShapeError(f"a call with {[str(t) for t in types]} of a body that takes {[str(i.type) for i in body.inputs]}")
    return tuple(o.type for o in body.outputs)


def _value(*arrays: Array, body: Graph, **attrs: Any) -> Any:
    results = evaluate(body, arrays)
    return results[0] if len(results) == 1 else tuple(results)


def _derivative(
    need: Sequence[bool], g: Any, y: Any, *args: Any, body: Graph, derivative: Any, options: Any = (), **attrs: Any
) -> list[Any]:
    """By the rules that were written; without rules, `expand` has put the body in place before the sweep."""
    if callable(derivative):
        return list(derivative(need, g, y, *args))
    own = args[: len(derivative)]  # what follows are arrays that the body took from outside
    gradients = [rule(g, y, *own, **dict(options)) if n and rule else None for n, rule in zip(need, derivative, strict=False)]
    return [*gradients, *[None] * (len(args) - len(own))]


def _rows(rows: Sequence[Rows], types: Sequence[Type], *, body: Graph, **attrs: Any) -> Any:
    results = propagate_rows(body, rows)
    return results[0] if len(results) == 1 else tuple(results)


def _examples(r: np.random.Generator) -> Iterable[Any]:
    body = build(lambda a, b: [np.tanh(a) * b], [Type((3,), np.dtype("f8"))] * 2, name="example")
    rules = (lambda g, y, a, b: g * b * (1 - np.tanh(a) ** 2), lambda g, y, a, b: g * np.tanh(a))
    yield [r.normal(size=3), r.normal(size=3)], {"body": body, "derivative": rules}


OPS.add("call", Op("call", _infer, _value, _derivative, _rows, _examples))


def expand(graph: Graph, keep: Callable[[Node], bool] = lambda node: False) -> Graph:
    """The graph with each call replaced by its body, at every depth, except calls that `keep` wants kept.

    Bodies of loops are expanded too.
    """
    if not any(n.op in ("call", "scan") for n in graph.nodes()):
        return graph
    table: dict[Node, Node] = {}
    parts: dict[Node, list[Node]] = {}

    def copy(order: Sequence[Node], table: dict[Node, Node], site: Node | None = None) -> None:
        for node in order:
            if node in table:
                continue
            args = tuple(table[a] for a in node.args)
            source, scope = (site.source, site.scope) if site else (node.source, node.scope)
            attrs = node.attrs
            if node.op == "output" and node.args[0] in parts:
                table[node] = parts[node.args[0]][attrs["index"]]
                continue
            if node.op == "call" and not keep(node):
                body: Graph = attrs["body"]
                inner = dict(zip(body.inputs, args, strict=True))
                copy(body.nodes(), inner, Node("call", (), {}, (), source, scope))
                parts[node] = [inner[o] for o in body.outputs]
                table[node] = parts[node][0]
                continue
            if node.op in ("scan", "call"):
                attrs = {**attrs, "body": expand(attrs["body"], keep)}
            elif args == node.args and site is None:
                table[node] = node
                continue
            table[node] = Node(node.op, args, attrs, node.types, source, scope)

    copy(graph.nodes(), table)
    return Graph(graph.inputs, tuple(table[o] for o in graph.outputs), graph.captures, graph.name)


__all__ = ["COMPOSITIONS", "Composition", "composition", "expand", "inline", "named"]
