"""What a legal graph is, what normal form takes away, and nests of arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from expressions import function, listed
from tracing import trace_function

import chainrule as cr
from chainrule.errors import ChainruleError, GraphError, UnknownNameError, UsageError
from chainrule.graph import tree as trees
from chainrule.graph.interpret import Plan, evaluate, plan_of
from chainrule.graph.node import OPS, Graph, Node, Type, constant_node, input_node, make, output_node
from chainrule.graph.rows import propagate_rows
from chainrule.graph.text import graph_text
from chainrule.graph.verify import verify
from chainrule.normalize import normalize

F8 = np.dtype("f8")


def f8(*shape: int) -> Type:
    return Type(shape, F8)


def recorded(f: Callable[..., Any], *args: Any) -> Graph:
    return trace_function(f, args)[0]


# ---- verify ------------------------------------------------------------------------------------------------------------------


def one_input() -> tuple[Node, Node]:
    x = input_node(f8(3))
    return x, make("sin", (x,), {})


def stranger() -> Graph:
    x, y = one_input()
    return Graph((x,), (make("add", (y, input_node(f8(3))), {}),))


def unknown_operator() -> Graph:
    x, _ = one_input()
    return Graph((x,), (Node("sine", (x,), {}, (f8(3),)),))


def wrong_type() -> Graph:
    x, _ = one_input()
    return Graph((x,), (Node("sin", (x,), {}, (f8(4),)),))


def wrong_arguments() -> Graph:
    x, y = one_input()
    return Graph((x,), (Node("add", (y, constant_node(1.0, F8)), {}, (f8(3),)),))


def twice() -> Graph:
    x, y = one_input()
    return Graph((x, x), (y,))


def big_constant() -> Graph:
    return Graph((), (Node("constant", (), {"value": np.float64(1)}, (f8(2),)),))


def wide_constant() -> Graph:
    return Graph((), (Node("constant", (), {"value": np.float32(1)}, (f8(),)),))


def loop(**changes: Any) -> Node:
    """h, ys = scan: h + x, h * x."""
    h, x = input_node(f8()), input_node(f8())
    body = Graph((h, x), (make("add", (h, x), {}), make("multiply", (h, x), {})))
    attrs = {"body": body, "states": 1, "sequences": 1, "length": 4, "reverse": False} | changes
    first, xs = input_node(f8()), input_node(f8(4))
    return Node("scan", (first, xs), attrs, (f8(), f8(4)))


def unchosen_result() -> Graph:
    node = loop()
    return Graph(node.args, (make("sin", (node,), {}),))


def missing_result() -> Graph:
    node = loop()
    return Graph(node.args, (Node("output", (node,), {"index": 2}, (f8(4),)),))


def body_that_captures() -> Graph:
    node = loop()
    body = node.attrs["body"]
    node = loop(body=Graph(body.inputs, body.outputs, (np.zeros(()),)))
    return Graph(node.args, (output_node(node, 0),))


def body_that_is_illegal() -> Graph:
    node = loop()
    body = node.attrs["body"]
    node = loop(body=Graph(body.inputs, (body.outputs[0], make("add", (body.inputs[0], input_node(f8())), {}))))
    return Graph(node.args, (output_node(node, 0),))


def loop_of_another_length() -> Graph:
    node = loop(length=5)
    return Graph(node.args, (output_node(node, 0),))


def captured_value_of_another_shape() -> Graph:
    x, y = one_input()
    return Graph((x,), (y,), (np.zeros(4),))


def captured_value_of_another_type() -> Graph:
    x, y = one_input()
    return Graph((x,), (y,), (np.zeros(3, np.float32),))


ILLEGAL = {
    stranger: "recorded elsewhere", unknown_operator: "not registered", wrong_type: "shape rule", wrong_arguments: "one shape and type",
    twice: "twice", big_constant: "scalar", wide_constant: "scalar", unchosen_result: "without choosing", missing_result: "result 2",
    body_that_captures: "captures", body_that_is_illegal: "recorded elsewhere", loop_of_another_length: "5 steps",
    captured_value_of_another_shape: "captured value", captured_value_of_another_type: "captured value",
}  # fmt: skip


@pytest.mark.parametrize("build", ILLEGAL, ids=lambda f: f.__name__)
def test_illegal_graphs_are_found(build: Callable[[], Graph]) -> None:
    with pytest.raises(GraphError, match=ILLEGAL[build]):
        verify(build())


def test_the_legal_counterparts_are_legal() -> None:
    x, y = one_input()
    verify(Graph((x,), (y,)), normal=True)
    verify(Graph((x,), (y,), (np.zeros(3),)))
    node = loop()
    verify(Graph(node.args, (output_node(node, 0), output_node(node, 1))), normal=True)


def test_what_is_legal_but_not_normal() -> None:
    x, y = one_input()
    equal = Graph((x,), (make("add", (y, make("sin", (x,), {})), {}),))
    call = recorded(cr.relu, np.ones(3))
    weak = recorded(lambda c, x: (c * 2.0) * x, 0.5, np.ones(3))
    for graph, message in ((equal, "equal node"), (call, "call"), (weak, "weak")):
        verify(graph)
        with pytest.raises(GraphError, match=message):
            verify(graph, normal=True)
        verify(normalize(graph), normal=True)


# ---- normal form -------------------------------------------------------------------------------------------------------------


def ops(graph: Graph) -> list[str]:
    return [n.op for n in graph.nodes()]


def test_equal_subexpressions_become_one_also_across_calls_and_loops() -> None:
    graph = normalize(recorded(lambda x: np.sin(x) * cr.silu(x) + np.sin(x) * (x * cr.sigmoid(x)), np.ones(3)))
    assert ops(graph).count("sin") == 1
    assert ops(graph).count("logistic") == 1
    total = lambda x: cr.scan(lambda h, y: (h + y, h), 0.0, x)[0]
    twins = normalize(recorded(lambda x: total(x) + total(x), np.ones(3)))
    assert ops(twins).count("scan") == 1
    inside = normalize(recorded(lambda x: cr.scan(lambda h, y: (h + np.sin(y) + np.sin(y), None), 0.0, x)[0], np.ones(3)))
    (scan,) = (n for n in inside.nodes() if n.op == "scan")
    assert ops(scan.attrs["body"]).count("sin") == 1


def test_random_numbers_of_two_places_are_not_one() -> None:
    graph = recorded(lambda x: x + cr.random.uniform((3,), seed=1) + cr.random.uniform((3,), seed=2), np.zeros(3))
    got = evaluate(normalize(graph), [np.zeros(3)])[0]
    np.testing.assert_array_equal(got, cr.random.uniform((3,), seed=1).astype(float) + cr.random.uniform((3,), seed=2))


def test_arithmetic_on_known_numbers_is_done() -> None:
    x = input_node(f8())
    graph = Graph((x,), (make("multiply", (x, make("add", (constant_node(2.0, F8), constant_node(3.0, F8)), {})), {}),))
    assert ops(normalize(graph)) == ["input", "constant", "multiply"]
    assert evaluate(normalize(graph), [np.array(2.0)])[0] == 10
    zeros = normalize(recorded(lambda x: (x + 0.0, x + -0.0), np.ones(3)))
    assert len({n.attrs["value"].tobytes() for n in zeros.nodes() if n.op == "constant"}) == 2
    zero = constant_node(0.0, F8)
    for node in (make("log", (zero,), {}), make("divide", (zero, zero), {}), make("exp", (constant_node(1000.0, F8),), {})):
        (result,) = normalize(Graph((), (node,))).outputs  # without a warning
        assert result.op == "constant"
        assert not np.isfinite(result.attrs["value"])


def test_unread_parts_of_loops_fall_away() -> None:
    def f(x: Any) -> Any:
        def step(h: Any, row: Any) -> Any:
            a, b, c = h
            return (a + row, b * np.tanh(row), c + b), (np.exp(a), np.cos(b), np.sin(c))

        (a, _, _), (ys, _, _) = cr.scan(step, (0.0, 1.0, 2.0), x)
        return a, ys

    graph = recorded(f, np.arange(4.0))
    normal = verify(normalize(graph), normal=True)
    (scan,) = (n for n in normal.nodes() if n.op == "scan")
    assert (scan.attrs["states"], scan.attrs["sequences"], len(scan.types)) == (1, 1, 2)
    assert sorted(ops(scan.attrs["body"])) == ["add", "exp", "input", "input"]
    for got, want in zip(evaluate(normal, [np.arange(4.0)]), evaluate(graph, [np.arange(4.0)]), strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_state_that_only_another_needs_is_kept() -> None:
    f = lambda x: cr.scan(lambda h, row: ((h[0] + h[1], h[1] * row, h[2] + 1.0), None), (0.0, 1.0, 0.0), x)[0][0]
    x = np.array([2.0, 3.0, 4.0])
    normal = normalize(recorded(f, x))
    (scan,) = (n for n in normal.nodes() if n.op == "scan")
    assert scan.attrs["states"] == 2
    assert evaluate(normal, [x])[0] == 1 + 2 + 6


def test_unread_parts_of_nested_loops_fall_away() -> None:
    def f(x: Any) -> Any:
        def outer(h: Any, row: Any) -> Any:
            (a, b), ys = cr.scan(lambda k, z: ((k[0] + z, k[1] * z), np.exp(k[1])), (h, 1.0), row)
            return a, (b, ys)

        return cr.scan(outer, 0.0, x)[0]

    x = np.arange(6.0).reshape(2, 3)
    normal = normalize(recorded(f, x))
    (scan,) = (n for n in normal.nodes() if n.op == "scan")
    (inner,) = (n for n in scan.attrs["body"].nodes() if n.op == "scan")
    assert (len(scan.types), len(inner.types)) == (1, 1)
    assert evaluate(normal, [x])[0] == 15


def test_inputs_stay_also_when_nothing_reads_them() -> None:
    graph = normalize(recorded(lambda a, b: b * 2, np.ones(2), np.ones(3)))
    assert [i.shape for i in graph.inputs] == [(2,), (3,)]
    assert evaluate(graph, [np.ones(2), np.ones(3)])[0].tolist() == [2.0] * 3


# ---- running -----------------------------------------------------------------------------------------------------------------


BROADCASTS = """
r + c; m * r + c * s; np.where(r > c, r, c); np.broadcast_to(r, (2, 3)); np.broadcast_to(r, (2, 3)) @ np.ones((3, 2));
np.sum(r * np.ones((2, 3)) * s); (r + c, r * m); np.where(m > 0, s, r); np.stack([np.broadcast_to(c, (2, 3)), m]);
np.maximum(s, np.broadcast_to(s, (2, 3))); np.broadcast_to(r, (2, 3)).astype(np.float32) * m.astype(np.float32);
np.transpose(r + c) * 2
"""


def test_broadcasts_that_are_left_to_numpy_change_nothing() -> None:
    row, column, scalar, full = np.arange(3.0), np.arange(2.0)[:, None], np.float64(2), np.ones((2, 3))
    for expression in listed(BROADCASTS):
        f = function(expression, "rcsm")
        args = (row, column, scalar, full)
        for got, want in zip(evaluate(recorded(f, *args), args), trees.flatten(f(*args))[0], strict=True):
            assert (np.shape(got), got.dtype) == (np.shape(want), want.dtype)
            np.testing.assert_array_equal(got, want)


def test_a_plan_lives_as_long_as_its_graph_and_forgets_values() -> None:
    graph = recorded(lambda x: np.sum(np.sin(x) * np.cos(x)), np.ones(3))
    assert plan_of(graph) is plan_of(graph)
    assert isinstance(plan_of(graph), Plan)
    assert evaluate(graph, [np.ones(3)]) == evaluate(graph, [np.ones(3)])
    with pytest.raises(ChainruleError, match="1 arrays, got 0"):
        evaluate(graph, [])


def test_deep_graphs_need_no_stack() -> None:
    x = node = input_node(f8())
    for _ in range(5000):
        node = make("negative", (node,), {})
    graph = Graph((x,), (node,))
    assert evaluate(verify(normalize(graph)), [np.ones(())])[0] == 1


def test_text_of_a_graph() -> None:
    graph = recorded(lambda x: cr.scan(lambda h, y: (h + y, None), 0.0, np.tanh(x))[0], np.ones(3))
    text = graph_text(graph)
    for words in ("x0 float64[3]", "= tanh(x0)", "scan(", "test_graph.py:", "length=3", "return"):
        assert words in text
    assert "test_graph.py" not in graph_text(graph, sources=False)


def test_rows_through_a_network_and_back() -> None:
    x, w, v = np.ones((5, 4)), np.ones((4, 3)), np.ones((3, 2))

    def network(x: Any, w: Any, v: Any) -> Any:
        h = np.tanh(x @ w)
        z = (h - np.mean(h, axis=0)) @ v
        states, _ = cr.scan(lambda s, t: (np.tanh(s + t @ v), None), z, np.stack([h, h]))
        return z, cr.softmax(z), states, np.mean(z), z.T, h[1:], np.sum(h[:, None] * h[None], axis=(1, 2))

    graph = normalize(recorded(network, x, w, v))
    rows = propagate_rows(graph, [0, None, None, *[None] * len(graph.captures)])
    assert rows == [0, 0, 0, None, 1, "mixed", "mixed"]
    gradient = normalize(recorded(lambda *a: cr.grad(lambda *a: np.sum(network(*a)[2]), (0, 1, 2))(*a), x, w, v))
    assert propagate_rows(gradient, [0, None, None, *[None] * len(gradient.captures)]) == [0, None, None]


# ---- nests -------------------------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    a: Any
    b: Any


@dataclasses.dataclass
class Box:
    inside: Any
    other: Any = 1


@pytest.mark.parametrize(
    ("nest", "leaves", "paths"),
    [
        (3, [3], [""]),
        ({"b": 1, "a": [2, (3,)]}, [2, 3, 1], ["a.0", "a.1.0", "b"]),
        (Pair(1, {"x": None, "y": 2}), [1, 2], ["0", "1.y"]),
        (Box([1, 2], Pair(3, ())), [1, 2, 3], ["inside.0", "inside.1", "other.0"]),
        ({2: "two", "one": 1}, ["two", 1], ["2", "one"]),
        ((), [], []),
        (None, [], []),
    ],
)
def test_leaves_paths_and_back(nest: Any, leaves: list[Any], paths: list[str]) -> None:
    found, structure = trees.flatten(nest)
    assert found == leaves
    assert trees.paths(structure) == paths
    assert trees.unflatten(structure, found) == nest
    assert structure.leaves == len(leaves)
    assert hash(structure) == hash(trees.flatten(nest)[1])
    assert trees.tree_map(lambda leaf, other: (leaf, other)[0], nest, nest) == nest


def test_trees_of_different_structure() -> None:
    with pytest.raises(UsageError, match=r"dict\(x: \*\).*dict\(y: \*\)"):
        trees.tree_map(lambda a, b: a, {"x": 1}, {"y": 1})
    with pytest.raises(UsageError, match="2 leaves cannot be filled with 1"):
        trees.unflatten(trees.flatten([1, 2])[1], [1])


# ---- registries --------------------------------------------------------------------------------------------------------------


def test_operators_are_found_by_name_once() -> None:
    with pytest.raises(UnknownNameError, match=r'"tahn".*Did you mean "tanh"'):
        OPS["tahn"]
    with pytest.raises(ChainruleError, match="twice"):
        OPS.add("tanh", OPS["tanh"])
    assert all(op.name == name for name, op in OPS.items())
    assert "tanh" in OPS
    assert len(list(OPS)) == len(OPS) > 40
