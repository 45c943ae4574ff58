"""Functions that are recorded: nests, arrays from outside, loops, the user's lines, what `compile` keeps, symbols after their trace."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pytest
from tracing import trace_function

import chainrule as cr
from chainrule import transforms
from chainrule.compiler.kernels import kernels_of
from chainrule.derive.backward import backward
from chainrule.errors import ChainruleError, DataError, DtypeError, ShapeError, TraceError, UsageError
from chainrule.graph import tree as trees
from chainrule.graph.node import Graph, Type
from chainrule.graph.trace import Tracer, build
from chainrule.normalize import normalize
from chainrule.run.native import NativeBackend

# ---- nests -------------------------------------------------------------------------------------------------------------------


class Point(NamedTuple):
    x: Any
    y: Any


@dataclass
class Layer:
    weight: Any
    bias: Any
    name: str = "dense"
    made: Any = field(init=False, default=None)


NESTS = [
    {"b": np.ones(2), "a": np.zeros(3)},
    OrderedDict(b=np.ones(2), a=np.zeros(3)),
    [np.ones(2), (np.zeros(1), {"c": np.ones(())})],
    (np.ones(2),),
    Point(np.ones(2), [np.zeros(2)]),
    {"p": Point(1.5, np.ones(1)), 3: np.ones(2), "none": None, "empty": ()},
]


@pytest.mark.parametrize("nest", NESTS, ids=lambda n: type(n).__name__)
def test_gradients_come_as_nests_like_the_arguments(nest: Any) -> None:
    def half_square(nest: Any) -> Any:
        return sum(0.5 * np.sum(leaf * leaf) for leaf in trees.flatten(nest)[0])

    gradient = cr.grad(half_square)(nest)
    assert isinstance(nest, type(gradient))
    leaves, structure = trees.flatten(nest)
    found, same = trees.flatten(gradient)
    assert same == structure
    for g, leaf in zip(found, leaves, strict=True):
        np.testing.assert_array_equal(g, leaf)


def test_functions_see_and_return_nests_of_the_same_kind() -> None:
    def swap(p: Point, layer: Layer) -> Any:
        assert isinstance(p, Point)
        assert layer.name == "dense"
        return Point(p.y, p.x), {"weight": layer.weight @ p.x, "rest": [layer.bias, None]}

    point, layer = Point(np.ones(2), np.arange(2.0)), Layer(np.eye(2), np.ones(2))
    got, rest = cr.compile(swap)(point, layer)
    assert isinstance(got, Point)
    np.testing.assert_array_equal(got.x, [0.0, 1.0])
    assert list(rest) == ["rest", "weight"] or list(rest) == ["weight", "rest"]
    assert rest["rest"][1] is None
    gradient = cr.grad(lambda layer: np.sum(layer.weight * 2) + np.sum(layer.bias) if layer.name == "dense" else 0.0)
    with pytest.raises(DtypeError, match="dense"):
        gradient(layer)  # its name is no number
    weights = {"w": layer.weight, "b": layer.bias}
    back = cr.grad(lambda p: np.sum(Layer(p["w"], p["b"]).weight * 2))(weights)
    np.testing.assert_array_equal(back["w"], np.full((2, 2), 2.0))
    np.testing.assert_array_equal(back["b"], np.zeros(2))


# ---- tracers that outlive their trace ----------------------------------------------------------------------------------------


def test_a_traced_array_that_leaked_says_where_it_was_recorded() -> None:
    kept = []
    cr.grad(lambda x: (kept.append(x * 2), np.sum(x))[1])(np.ones(2))
    with pytest.raises(TraceError, match="outside the function"):
        kept[0] + 1
    for use in (lambda x: np.sum(x + kept[0]), lambda x: np.sum(kept[0])):
        with pytest.raises(TraceError, match=r"has ended.*test_trace_functions\.py|recorded at .*test_trace_functions\.py"):
            cr.grad(use)(np.ones(2))
    with pytest.raises(ChainruleError):
        cr.grad(np.sum)(kept[0])


def test_a_traced_array_that_leaked_from_a_loop_body() -> None:
    kept = []

    def step(h: Any, x: Any) -> Any:
        kept.append(h)
        return h + x, None

    with pytest.raises(TraceError, match="has ended"):
        cr.compile(lambda xs: cr.scan(step, 0.0, xs)[0] + kept[0])(np.ones(3))


def test_an_error_inside_a_function_leaves_no_trace_open() -> None:
    def broken(x: Any) -> Any:
        raise RuntimeError("mine")

    for transformed in (cr.grad(broken), cr.compile(broken), lambda x: cr.scan(lambda h, y: broken(y), x, np.ones(2))):
        with pytest.raises(RuntimeError, match="mine"):
            transformed(1.0)
    with pytest.raises(TraceError, match="outside the function"):
        Tracer(trace_function(np.sin, [1.0])[0].outputs[0], None) + 1  # type: ignore[arg-type]  # no trace is active


def test_traced_arrays_refuse_to_be_pickled_and_copy_as_themselves() -> None:
    import copy
    import pickle

    def f(x: Any) -> Any:
        with pytest.raises(TraceError):
            pickle.dumps(x)
        assert copy.deepcopy(x) is x
        return x

    cr.compile(f)(np.ones(2))


def test_traced_arrays_answer_what_needs_no_numbers() -> None:
    def f(x: Any) -> Any:
        assert (x.shape, x.ndim, x.size, x.dtype, len(x)) == ((2, 3), 2, 6, np.dtype("f4"), 2)
        assert np.shape(x) == (2, 3)
        assert np.size(x, 1) == 3
        assert [row.shape for row in x] == [(3,), (3,)]
        assert "float32[2, 3]" in repr(x)
        assert not hasattr(x, "nonsense")
        with pytest.raises(AttributeError, match="reshape"):
            x.reshap(3)
        with pytest.raises(AttributeError):
            x.weight = 1
        with pytest.raises(TypeError):
            hash(x)
        with pytest.raises(TypeError):
            len(x[0, 0])
        return x

    cr.compile(f)(np.ones((2, 3), np.float32))


# ---- closures ----------------------------------------------------------------------------------------------------------------


def test_captured_arrays_are_inputs() -> None:
    a = np.arange(3.0)
    graph, _ = trace_function(lambda x: x * a + a, [np.ones(3)])
    assert len(graph.captures) == 1  # it is read twice, and one input
    np.testing.assert_array_equal(graph.captures[0], a)
    assert [n.op for n in graph.nodes()].count("input") == 2
    nested, _ = trace_function(lambda x: cr.scan(lambda h, y: (h + y * a, None), x, np.ones((2, 3)))[0], [np.ones(3)])
    assert any(np.array_equal(c, a) for c in nested.captures)
    assert all(not n.attrs["body"].captures for n in nested.nodes() if n.op == "scan")


def test_captured_arrays_are_taken_as_they_are_at_that_moment() -> None:
    buffer = np.zeros(3)

    def f(x: Any) -> Any:
        buffer[:] = 1.0
        y = x * buffer
        buffer[:] = 2.0
        return y, x * buffer

    for call in (f, cr.compile(f)):
        one, two = call(np.ones(3))
        assert (one.tolist(), two.tolist()) == ([1.0] * 3, [2.0] * 3)
    x = np.ones(3)
    value, pull = cr.vjp(lambda x: np.sum(x * x * buffer), x)
    buffer[:] = x[:] = 9.0
    assert (float(value), pull(1.0)[0].tolist()) == (6.0, [4.0] * 3)


def test_a_fresh_lambda_needs_no_new_code() -> None:
    x = np.linspace(0.1, 1.0, 5)

    def use(scale: float) -> float:
        a = np.full(5, scale)
        square = cr.custom_gradient(lambda v: (v * v, lambda g: 2 * g * v))
        results = [
            cr.grad(lambda x: np.sum(np.tanh(x * a)))(x),
            cr.grad(lambda x: np.sum(square(x) * a))(x),
            cr.grad(lambda x: np.sum(cr.relu(x) * cr.stop_gradient(a * x)))(x),
            cr.grad(lambda x: np.sum(cr.scan(lambda h, y: (h * a + y, h), x, x)[0]))(x),
            cr.jacobian(lambda x: x * a)(x),
            cr.hvp(lambda x: np.sum(x**3 * a), x, a),
            cr.jvp(lambda x: x * a, [x], [a])[1],
        ]
        return sum(float(np.sum(r)) for r in results)

    first = use(1.0)
    known = list(transforms._functions)
    assert use(2.0) != first
    assert set(transforms._functions) == set(known)


def test_capturing_in_a_loop_body_is_no_error() -> None:
    w, xs = np.array([0.5, -0.25]), np.arange(6.0).reshape(3, 2)

    def f(w: Any, xs: Any) -> Any:
        scale = np.sum(w)  # traced outside, used inside
        return cr.scan(lambda h, x: (np.tanh(h * scale + x * w), h), np.zeros(2), xs)

    def plain(w: Any, xs: Any) -> Any:
        h, hs = np.zeros(2), []
        for x in xs:
            hs.append(h)
            h = np.tanh(h * np.sum(w) + x * w)
        return h, np.array(hs)

    for got, want in zip(cr.compile(f)(w, xs), plain(w, xs), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-15)
    for got, want in zip(f(w, xs), plain(w, xs), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-15)


# ---- loops -------------------------------------------------------------------------------------------------------------------


def test_scan_over_nests_both_ways() -> None:
    xs = {"a": np.arange(4.0), "b": np.arange(8.0).reshape(4, 2)}

    def step(h: Any, x: Any) -> Any:
        new = {"sum": h["sum"] + x["a"], "count": h["count"] + 1}
        return new, (h["sum"], {"b": x["b"] * new["count"]})

    for reverse in (False, True):
        h, ys = cr.scan(step, {"sum": 0.0, "count": 0}, xs, reverse=reverse)
        order = range(3, -1, -1) if reverse else range(4)
        total, sums, bs = 0.0, np.zeros(4), np.zeros((4, 2))
        for n, t in enumerate(order, 1):
            sums[t], bs[t] = total, xs["b"][t] * n
            total += xs["a"][t]
        assert (float(h["sum"]), int(h["count"])) == (6.0, 4)
        assert h["count"].dtype.kind == "i"
        np.testing.assert_array_equal(ys[0], sums)
        np.testing.assert_array_equal(ys[1]["b"], bs)


@pytest.mark.parametrize("length", [0, 1, 5])
def test_scan_of_few_steps(length: int) -> None:
    xs = np.arange(length, dtype=np.float32)
    for f in (cr.scan, lambda *args: cr.compile(lambda xs: cr.scan(args[0], args[1], xs))(args[2])):
        h, ys = f(lambda h, x: (h + x, h * 2), np.float32(1), xs)
        assert (h.dtype, ys.dtype, ys.shape) == (np.float32, np.float32, (length,))
        assert h == 1 + xs.sum()
    h, ys = cr.scan(lambda h, _: (h * 2, None), 1.0, None, length=length)
    assert (float(h), ys) == (2.0**length, None)


def test_a_loop_stays_a_loop() -> None:
    def nodes(length: int) -> int:
        graph, _ = trace_function(lambda xs: cr.scan(lambda h, x: (np.tanh(h + x), h), 0.0, xs), [np.ones(length)])
        return len(normalize(graph).nodes())

    assert nodes(3) == nodes(3000)


def test_python_numbers_as_first_states_take_the_type_of_the_step() -> None:
    single = np.ones(3, np.float32)
    assert cr.scan(lambda h, x: (h + x, None), 0.0, single)[0].dtype == np.float32
    assert cr.scan(lambda h, x: (h + x, None), 0, single)[0].dtype == np.float32
    assert cr.scan(lambda h, x: (h + 1, None), 0, single)[0].dtype == np.int64
    fibonacci = cr.scan(lambda h, x: ((h[1], h[0] + h[1] * x), None), (0.0, 1.0), single)[0]
    assert [(f.dtype, float(f)) for f in fibonacci] == [(np.float32, 2.0), (np.float32, 3.0)]
    shifted = cr.scan(lambda h, x: ((h[1], h[2], x), None), (0.0, 0.0, 0.0), single)[0]
    assert [f.dtype for f in shifted] == [np.float32] * 3


@pytest.mark.parametrize(
    ("step", "h0", "xs", "error", "message"),
    [
        (lambda h, x: (np.stack([h, h]), None), np.float64(0), np.ones(3), ShapeError, "keep shape"),
        (lambda h, x: (np.stack([h, h]), None), 0.0, np.ones(3), ShapeError, "shape"),
        (lambda h, x: (h.astype(np.float32), None), np.float64(0), np.ones(3), ShapeError, "keep shape and type"),
        (lambda h, x: (0.5, None), np.int64(0), np.ones(3), ShapeError, "keep shape and type"),
        (lambda h, x: ((h, h), None), np.float64(0), np.ones(3), UsageError, "structure"),
        (lambda h, x: h + x, np.float64(0), np.ones(3), UsageError, "pair"),
        (lambda h, x: (h, None), 0.0, (np.ones(3), np.ones(4)), UsageError, "3.*4"),
        (lambda h, x: (h, None), 0.0, None, UsageError, "number of steps"),
        (lambda h, x: (h, None), 0.0, np.float64(1), UsageError, "number of steps"),
    ],
)
def test_scan_refuses_steps_that_make_no_loop(step: Any, h0: Any, xs: Any, error: Any, message: str) -> None:
    for call in (lambda: cr.scan(step, h0, xs), lambda: cr.compile(lambda h: cr.scan(step, h, xs))(h0)):
        with pytest.raises(error, match=message) as caught:
            call()
        assert __file__ in str(caught.value)


# ---- lines -------------------------------------------------------------------------------------------------------------------


def lines_of(graph: Graph) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for node in graph.nodes():
        found.setdefault(node.op, set()).add(node.source)
        if isinstance(node.attrs.get("body"), Graph) and node.op == "scan":
            for op, sources in lines_of(node.attrs["body"]).items():
                found.setdefault(op, set()).update(sources)
    return found


def three_lines(x: Any, xs: Any) -> Any:
    y = np.tanh(x)
    z = cr.sigmoid(y) @ x
    h, _ = cr.scan(lambda h, row: (np.sin(h + row), None), z, xs)
    return np.exp(h)


def test_every_node_knows_the_users_line() -> None:
    start = three_lines.__code__.co_firstlineno
    graph, _ = trace_function(three_lines, [np.ones(3), np.ones(4)])
    for made in (graph, normalize(graph)):
        found = lines_of(made)
        for op, offset in (("tanh", 1), ("contract", 2), ("sin", 3), ("scan", 3)):
            assert found[op] == {f"{__file__}:{start + offset}"}
    assert f"{__file__}:{start + 2}" in lines_of(normalize(graph))["logistic"]  # of the sigmoid, whose body lies in chainrule
    assert all(source.startswith(__file__) for sources in lines_of(normalize(graph)).values() for source in sources if source)


# ---- compile -----------------------------------------------------------------------------------------------------------------


class Counted:
    """A function that counts how often it is traced."""

    def __init__(self, f: Callable[..., Any]) -> None:
        self.f, self.calls = f, 0
        self.__name__ = "counted"

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        return self.f(*args)


def test_compile_traces_once_for_shapes_types_nests_and_static_arguments() -> None:
    counted = Counted(lambda x, n, flag, name: (x["a"] * n if flag else x["a"]) + len(name))
    fast = cr.compile(counted)
    a = np.ones(3)
    for args, calls in [
        (({"a": a}, 2, True, "xy"), 1),
        (({"a": a * 5}, 2, True, "xy"), 1),
        (({"a": a}, 3, True, "xy"), 2),
        (({"a": a}, 1, True, "xy"), 3),
        (({"a": a}, True, True, "xy"), 4),
        (({"a": a}, 2, False, "xy"), 5),
        (({"a": a}, 2, True, "xyz"), 6),
        (({"a": a.astype(np.float32)}, 2, True, "xy"), 7),
        (({"a": np.ones(4)}, 2, True, "xy"), 8),
        (({"a": 1.5}, 2, True, "xy"), 9),
        (({"a": 2.5}, 2, True, "xy"), 9),
        (({"a": np.float64(2.5)}, 2, True, "xy"), 10),
        (({"a": a, "b": None}, 2, True, "xy"), 11),
        (({"a": a}, 2, True, "xy"), 11),
    ]:
        got = fast(*args)
        want = counted.f(*args)
        assert counted.calls == calls
        assert np.asarray(got).dtype == np.asarray(want).dtype
        np.testing.assert_array_equal(got, want)


A, B = np.array([1.0, 2.0]), np.array([3.0, 4.0])
SIMILAR: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    *[((A, n), {}) for n in (1, True, 1.0, np.float64(1), np.float32(1), np.int64(1), np.array(1), np.array(1.0), None, 2, False)],
    *[(args, {}) for args in ((A, B), ([A, B],), ((A, B),), ([A], B), (A, [B]), ([[A], B],), ([A, [B]],), ((A,), (B,)), ([], A, B))],
    *[((A, {"x": B}), {}), ((A,), {"x": B}), ((A, {"x": 3}), {}), ((A,), {"x": 3}), ((), {"x": A, "y": B}), ((A, "x", 0), {})],
    *[(({"y": A, "x": B},), {}), (({"x": B, "y": A},), {}), (({"x": A, "y": B},), {}), ((), {"y": A, "x": B}), ((A, b"x", 0), {})],
    *[(({1: A, 0: B},), {}), (({"x": {"x": A}, "y": B},), {}), (({"x": A, "y": {"x": B}},), {}), (({"x": [], "y": A},), {})],
    *[((Point(A, B),), {}), ((OrderedDict(y=A, x=B),), {}), ((A[::2], B[None]), {}), ((A.astype(">f8"), B), {}), (([],), {"x": A})],
    *[((A, "keywords", {"x": B}), {}), ((A, "keywords"), {"x": B}), ((A, (2,)), {}), ((A, 2, ()), {}), ((A[:0], A[:1]), {})],
]  # fmt: skip


def test_compile_tells_similar_arguments_apart() -> None:
    """In the first call and in later ones, which find what is compiled with less effort; dicts in any order of their keys."""

    def f(*args: Any, **kwargs: Any) -> Any:
        shown = lambda leaf: len(leaf) * (1 if isinstance(leaf, str) else 100) if isinstance(leaf, (str, bytes)) else leaf
        return trees.tree_map(shown, [args, kwargs])

    fast = cr.compile(f)
    for args, kwargs in [*SIMILAR, *SIMILAR[::-1], *SIMILAR]:
        got, made = trees.flatten(fast(*args, **kwargs))
        want, structure = trees.flatten(f(*args, **kwargs))
        assert made == structure
        for g, w in zip(got, want, strict=True):
            w = np.asarray(w)
            assert (np.shape(g), np.asarray(g).dtype) == (w.shape, w.dtype.newbyteorder("="))
            np.testing.assert_array_equal(g, w)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((A, 3), {}), ((A, True, "x", None, b"y"), {}), ((A, 2.0), {}), ((A, np.float32(2)), {}), ((A,), {"scale": B, "n": 3}),
        (([A, B], (A, {"w": A, "b": [B]})), {}), ((), {"x": {"w": A}}),
    ],
    ids=["int", "static", "float", "NumPy", "keywords", "nests", "keyword alone"],
)  # fmt: skip
def test_a_later_call_takes_the_quick_way(monkeypatch: pytest.MonkeyPatch, args: Any, kwargs: Any) -> None:
    """Without the work that a first call takes: it costs more than the whole call may."""
    fast = cr.compile(
        lambda *args, **kwargs: [sum(np.sum(x) for x in trees.flatten((args, kwargs))[0] if isinstance(x, Tracer)), A]
    )
    before = fast(*args, **kwargs)
    monkeypatch.setattr(trees, "flatten", None)
    after = fast(*args, **kwargs)
    assert before[0] == after[0]


def test_a_nest_that_contains_itself_and_masked_values_are_refused_in_later_calls_too() -> None:
    fast = cr.compile(lambda x: x[0] * 2.0)
    endless: list[Any] = [A]
    endless.append(endless)
    for refused, error in ((endless, UsageError), (np.ma.masked_array(A, [True, False]), DataError)):
        for _ in range(2):
            assert fast([A, B]).tolist() == [2.0, 4.0]
            assert fast(A) == 2.0
            with pytest.raises(error):
                fast(refused)


def test_compile_hands_static_arguments_over_as_they_are() -> None:
    def f(x: Any, axis: int, keep: bool, mode: str, extra: None, sizes: tuple[int, ...]) -> Any:
        assert (type(axis), type(keep), type(mode), extra, sizes) == (int, bool, str, None, (3, 2))
        return np.reshape(np.sum(x, axis=axis, keepdims=keep), sizes[:1] if mode == "flat" else (-1,))

    assert cr.compile(f)(np.ones((2, 3)), 0, False, "flat", None, (3, 2)).tolist() == [2.0] * 3
    with pytest.raises(UsageError, match="static"):
        cr.compile(lambda x, y: x)(1.0, {1, 2})


def test_compiled_functions_keep_the_arrays_they_took_from_outside() -> None:
    a = np.ones(2)
    fast = cr.compile(lambda x: x * a)
    assert fast(np.array([1.0, 2.0])).tolist() == [1.0, 2.0]
    a[:] = 5.0
    assert fast(np.array([1.0, 2.0])).tolist() == [1.0, 2.0]
    assert cr.grad(lambda x: np.sum(x * a))(np.ones(2)).tolist() == [5.0, 5.0]  # grad looks anew


def test_results_belong_to_the_caller() -> None:
    """They can be written to, and writing to them changes neither arguments nor later results."""
    x, table = np.arange(6.0), np.arange(3.0)
    recorded: list[Callable[..., Any]] = [
        *(lambda x: x, lambda x: x.reshape(2, 3), lambda x: x[::-1], lambda x: x[1:] + 0, lambda x: np.broadcast_to(x, (2, 6))),
        *(lambda x: table, lambda x: np.zeros_like(x)),
    ]
    derived: list[Callable[..., Any]] = [
        *(cr.grad(lambda x: np.sum(x)), cr.grad(lambda x: np.sum(table)), cr.jacobian(lambda x: x)),
        *(lambda x: cr.vjp(lambda x: x, x)[0], lambda x: cr.vjp(lambda x: x, x)[1](x)[0]),
        *(lambda x: cr.jvp(lambda x: x, [x], [x])[1], lambda x: cr.hvp(lambda x: np.sum(x * x), x, x)),
    ]
    for f in (*map(cr.compile, recorded), *derived):
        before = np.array(f(x))
        result = f(x)
        result += 7.0
        np.testing.assert_array_equal(x, np.arange(6.0))
        np.testing.assert_array_equal(table, np.arange(3.0))
        np.testing.assert_array_equal(f(x), before)


def test_a_compiled_function_inside_another_is_the_function_itself() -> None:
    fast = cr.compile(lambda x: np.tanh(x) * 2)
    assert cr.grad(lambda x: fast(x) ** 2)(0.3) == cr.grad(lambda x: (np.tanh(x) * 2) ** 2)(0.3)

    def inner(w: Any) -> Any:
        return np.sum(cr.compile(lambda x: x * w)(np.arange(3.0)))  # takes a traced array from outside

    np.testing.assert_array_equal(cr.grad(inner)(np.ones(3)), np.arange(3.0))
    np.testing.assert_array_equal(cr.grad(inner)(np.ones(3)), np.arange(3.0))


def test_a_long_chain_needs_no_stack() -> None:
    def f(x: Any) -> Any:
        for _ in range(1200):
            x = x + 0.001 * x
        return x

    assert cr.grad(f)(1.0) == pytest.approx(1.001**1200)


def views(x: Any) -> Any:
    return x.T[::-1]


def moved(x: Any) -> Any:
    return np.broadcast_to(np.swapaxes(x, 0, 1)[None, :, ::-1], (1, 3, 3))[0].reshape(3, 1, 3)[:, 0]


@pytest.mark.parametrize(
    ("step", "depth"),
    [(views, 5000), (moved, 100), (lambda x: x + 1e-9, 5000), (lambda x: x.T - 0.5 * x, 500), (lambda x: x - 1e-9 * np.sum(x), 500)],
)  # fmt: skip
def test_a_deep_program_needs_no_stack_and_no_square_of_its_depth(step: Any, depth: int) -> None:
    def f(x: Any) -> Any:
        for _ in range(depth):
            x = step(x)
        return x

    x = np.arange(9.0).reshape(3, 3)
    began = time.perf_counter()
    np.testing.assert_allclose(cr.compile(f)(x), f(x), rtol=1e-9)
    assert np.all(np.isfinite(cr.grad(lambda x: np.sum(f(x) * x))(x)))
    assert time.perf_counter() - began < 40


def test_a_long_chain_of_expensive_functions_becomes_several_kernels() -> None:
    """LLVM's time grows with the square of what stands in one loop."""

    def f(x: Any) -> Any:
        for _ in range(120):
            x = np.sin(x)
        return np.sum(x)

    graph = normalize(backward(build(lambda x: [f(x)], [Type((64,), np.dtype(float))]), [0]))
    code = NativeBackend()._function(graph)
    kernels = [k for items in code.plan.phases for k in kernels_of(items)]
    expensive = [sum(v.op in ("sin", "cos") for v in k.values()) for k in kernels]
    assert sum(expensive) < 300
    assert max(expensive) <= 40
    x = np.linspace(-2, 2, 64)
    np.testing.assert_allclose(cr.compile(f)(x), f(x), atol=1e-14)
    slope, y = np.ones(64), x
    for _ in range(120):
        slope, y = slope * np.cos(y), np.sin(y)
    np.testing.assert_allclose(cr.grad(f)(x), slope, rtol=1e-12)


def test_numpy_results_of_functions_without_traced_arrays() -> None:
    assert cr.compile(lambda x: 3)(1.0) == 3
    assert cr.compile(lambda x: None)(1.0) is None
    assert cr.compile(lambda x: {"a": np.arange(2)})(1.0)["a"].tolist() == [0, 1]
    assert cr.grad(lambda x: 5.0)(np.ones(2)).tolist() == [0.0, 0.0]
