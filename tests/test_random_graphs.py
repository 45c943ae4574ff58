"""Random programs over the vocabulary: what is recorded means what NumPy computes, normal form means the same, gradients agree
with central differences and with the package autograd."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import autograd
import autograd.numpy as anp
import numpy as np
import pytest
from differences import assert_gradient
from expressions import function, listed
from hypothesis import given, settings
from hypothesis import strategies as st
from tracing import trace_function

import chainrule as cr
from chainrule.graph.interpret import evaluate
from chainrule.graph.node import Graph
from chainrule.graph.rows import propagate_rows, rows_of_nodes
from chainrule.graph.verify import verify
from chainrule.normalize import graph_key, normalize

Array = np.ndarray


# ---- programs ----------------------------------------------------------------------------------------------------------------


def _axis(x: Any, k: int) -> int:
    return k % x.ndim - (x.ndim if k % 2 else 0)


def _loop(step: Callable[..., Any], h: Any, xs: Any, reverse: bool) -> Any:
    """What cr.scan means, unrolled; also the only loop that autograd knows."""
    ys: list[Any] = [None] * len(xs)
    for t in reversed(range(len(xs))) if reverse else range(len(xs)):
        h, ys[t] = step(h, xs[t])
    return h, ys


def _scan(xp: Any, x: Any, k: int) -> Any:
    def step(h: Any, row: Any) -> Any:
        new = xp.tanh(h * (0.5 + 0.1 * k) + row)
        return new, new * row + h

    start, reverse = np.zeros(x.shape[1:], x.dtype), k % 2 == 1
    if isinstance(xp, Numpy):
        h, ys = cr.scan(step, start, x, reverse=reverse)
        return ys + h
    h, ys = _loop(step, start, x, reverse)
    return xp.stack(ys) + h


class Numpy:
    """NumPy's functions for arrays and traced arrays alike, with a scan that chainrule records as a loop."""

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


# Functions of one array and a whole number that chooses among variants. All are smooth, or have kinks where no example stands.
ONE: dict[str, Callable[[Any, Any, int], Any]] = {
    "tanh": lambda xp, x, k: xp.tanh(x),
    "sin": lambda xp, x, k: xp.sin(x),
    "exp": lambda xp, x, k: xp.exp(-x * x),
    "log": lambda xp, x, k: xp.log(1.5 + x * x),
    "sqrt": lambda xp, x, k: xp.sqrt(x * x + 0.5),
    "log1p expm1": lambda xp, x, k: xp.log1p(xp.abs(xp.expm1(xp.tanh(x)))),
    "power": lambda xp, x, k: (x * x + 1.0) ** (0.7 - 0.3 * k),
    "square": lambda xp, x, k: xp.sin(x) ** (k % 4),
    "reciprocal": lambda xp, x, k: 1.0 / (x * x + 1.0),
    "cosh": lambda xp, x, k: xp.cosh(xp.sin(x)) - xp.sinh(xp.cos(x)),
    "where": lambda xp, x, k: xp.where(x > 0.1 * k - 0.25, x * 0.5, xp.sin(x)),
    "maximum": lambda xp, x, k: xp.maximum(x, 0.05 + 0.1 * k),
    "clip": lambda xp, x, k: xp.clip(x, -0.77, 0.03 + 0.1 * k),
    "negate": lambda xp, x, k: 0.25 - x,
    "sum": lambda xp, x, k: xp.sum(x, axis=_axis(x, k), keepdims=k > 2) if x.ndim else x,
    "mean": lambda xp, x, k: xp.mean(x, axis=_axis(x, k), keepdims=k > 2) if x.ndim else x,
    "total": lambda xp, x, k: xp.sum(x) * 0.3,
    "max": lambda xp, x, k: xp.max(x, axis=_axis(x, k), keepdims=k > 2) if x.ndim else x,
    "var": lambda xp, x, k: xp.var(x, axis=_axis(x, k), keepdims=k > 2) if x.ndim else x,
    "transpose": lambda xp, x, k: xp.transpose(x) if k % 2 else xp.swapaxes(x, 0, -1) if x.ndim else x,
    "flat": lambda xp, x, k: xp.reshape(x, (-1,)) if k % 2 else xp.reshape(x, (1, -1, 1)),
    "expand": lambda xp, x, k: xp.expand_dims(x, k % (x.ndim + 1)) if x.ndim < 3 else x,
    "slice": lambda xp, x, k: x[1:] if k % 2 and x.ndim and x.shape[0] > 1 else x[..., ::-1] if x.ndim else x,
    "stride": lambda xp, x, k: x[:: k % 3 + 1] if x.ndim else x,
    "pick": lambda xp, x, k: x[np.array([0, -1, 0])] if x.ndim else x,
    "item": lambda xp, x, k: x[k % x.shape[0]] if x.ndim else x,
    "join": lambda xp, x, k: xp.concatenate([x, xp.sin(x)], axis=_axis(x, k)) if x.ndim else x,
    "stack": lambda xp, x, k: xp.stack([x, x * xp.sin(x)], axis=k % (x.ndim + 1)) if x.ndim < 3 else x,
    "repeat": lambda xp, x, k: xp.tile(x, (2,)) if x.ndim and x.size < 40 else x,
    "cumsum": lambda xp, x, k: xp.cumsum(x, axis=_axis(x, k)) if x.ndim else x,
    "pad": lambda xp, x, k: xp.pad(x, 1, mode="constant") if x.ndim and x.size < 10 else x,
    "matmul": lambda xp, x, k: xp.matmul(xp.cos(x), xp.swapaxes(x, -1, -2)) if x.ndim > 1 else x,
    "einsum": lambda xp, x, k: xp.einsum("...i,...i->...", x, xp.sin(x)) if x.ndim else x,
    "scan": lambda xp, x, k: _scan(xp, x, k) if x.ndim else x,
    "float": lambda xp, x, k: x.astype(np.float64),
    "test": lambda xp, x, k: (x > 0.11 * k) * x,
}
TWO: dict[str, Callable[[Any, Any, Any, int], Any]] = {
    "add": lambda xp, a, b, k: a + b,
    "subtract": lambda xp, a, b, k: a - b * 0.5,
    "multiply": lambda xp, a, b, k: a * xp.sin(b),
    "divide": lambda xp, a, b, k: a / (1.5 + b * b),
    "maximum": lambda xp, a, b, k: xp.maximum(a, b + 0.013),
    "choose": lambda xp, a, b, k: xp.where(a + 0.017 > b, a, b * 0.5),
    "logaddexp": lambda xp, a, b, k: xp.logaddexp(a, b),
    "power": lambda xp, a, b, k: (a * a + 0.5) ** xp.sin(b),
}


@dataclasses.dataclass(frozen=True)
class Program:
    """Inputs of these shapes and types; then instructions (name, operands, variant) over all values so far."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    steps: tuple[tuple[str, tuple[int, ...], int], ...]

    def inputs(self, seed: int = 0) -> list[Array]:
        random = np.random.default_rng([seed, len(self.steps)])
        return [random.normal(size=s).astype(d) for s, d in zip(self.shapes, self.dtypes, strict=True)]

    def run(self, xp: Any, arrays: Sequence[Any]) -> list[Any]:
        """All values that no later instruction reads."""
        values = list(arrays)
        read: set[int] = set()
        for name, operands, k in self.steps:
            if len(operands) == 1:
                values.append(ONE[name](xp, values[operands[0]], k))
            else:
                values.append(TWO[name](xp, values[operands[0]], values[operands[1]], k))
            read.update(operands)
        return [v for i, v in enumerate(values) if i not in read]

    def loss(self, xp: Any) -> Callable[..., Any]:
        """One number of all results, each element with a weight of its own."""

        def f(*arrays: Any) -> Any:
            total: Any = 0.0
            for v in self.run(xp, arrays):
                weights = np.cos(np.arange(max(v.size, 1))).reshape(v.shape)
                total = total + xp.sum(xp.arctan(v) * weights)
            return total

        return f


def make_program(seed: int, length: int, dtypes: Sequence[str], without: Sequence[str]) -> Program:
    """The first `length` instructions of the endless program number `seed`: so a failing one shrinks from its end."""
    random = np.random.default_rng(seed)
    shapes = tuple(tuple(map(int, random.integers(1, 4, random.integers(4)))) for _ in range(random.integers(1, 4)))
    program = Program(shapes, tuple(str(random.choice(dtypes)) for _ in shapes), ())
    values = program.inputs()
    steps: list[tuple[str, tuple[int, ...], int]] = []
    while len(steps) < length:
        a, b = (len(values) - 1 - int(i) for i in random.integers(0, min(len(values), 5), 2))
        two = _fits(values[a], values[b]) and random.random() < 0.4
        name, k = str(random.choice([n for n in (TWO if two else ONE) if n not in without])), int(random.integers(6))
        made = TWO[name](np, values[a], values[b], k) if two else ONE[name](np, values[a], k)
        if made.size <= 200:
            values.append(made)
            steps.append((name, (a, b) if two else (a,), k))
    return dataclasses.replace(program, steps=tuple(steps))


def programs(dtypes: Sequence[str] = ("f8",), without: Sequence[str] = ()) -> st.SearchStrategy[Program]:
    return st.builds(make_program, st.integers(0, 2**32 - 1), st.integers(4, 14), st.just(dtypes), st.just(without))


def _fits(a: Array, b: Array) -> bool:
    try:
        return len(np.broadcast_shapes(a.shape, b.shape)) <= 3
    except ValueError:
        return False


def assert_close(got: Any, want: Any, rtol: float) -> None:
    got, want = np.asarray(got), np.asarray(want)
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    np.testing.assert_allclose(got, want, rtol=rtol, atol=rtol * max(1.0, float(np.max(np.abs(want), initial=0.0))))


NUMPY = Numpy()
more_samples = settings(max_examples=2 * settings().max_examples)


@more_samples
@given(programs(("f8", "f4")))
def test_programs_mean_the_same_recorded_and_normalized(program: Program) -> None:
    arrays = program.inputs(1)
    wanted = [np.asarray(w) for w in program.run(np, arrays)]
    graph, _ = trace_function(lambda *xs: program.run(NUMPY, xs), arrays)
    normal = normalize(graph)
    precise = 1e-12 if "f4" not in program.dtypes else 2e-4
    for made in (verify(graph), verify(normal, normal=True)):
        for got, want in zip(evaluate(made, arrays), wanted, strict=True):
            assert_close(got, want, precise)
    for got, want in zip(evaluate(graph, arrays), evaluate(normal, arrays), strict=True):
        np.testing.assert_array_equal(got, want)  # normal form changes no bit
    for got, want in zip(cr.compile(lambda *xs: program.run(NUMPY, xs))(*arrays), wanted, strict=True):
        assert_close(got, want, precise)


@more_samples
@given(programs())
def test_normal_form_is_a_fixed_point_and_no_larger(program: Program) -> None:
    f = program.loss(NUMPY)
    gradient, _ = trace_function(lambda *xs: cr.grad(f, tuple(range(len(xs))))(*xs), program.inputs())
    once = normalize(gradient)
    assert graph_key(normalize(once)) == graph_key(once)
    assert len(once.nodes()) <= len(_expanded(gradient).nodes())
    arrays = program.inputs(2)
    for got, want in zip(evaluate(once, arrays), evaluate(gradient, arrays), strict=True):
        np.testing.assert_array_equal(got, want)


def _expanded(graph: Graph) -> Graph:
    from chainrule.ops.call import expand

    return expand(graph)


@more_samples
@given(programs())
def test_gradients_agree_with_central_differences(program: Program) -> None:
    arrays = program.inputs(3)
    everything = tuple(range(len(arrays)))
    f = program.loss(NUMPY)
    plain = program.loss(np)
    for i, g in enumerate(cr.grad(f, everything)(*arrays)):
        assert_gradient(lambda *xs: float(plain(*xs)), arrays, i, g, rel=1e-5)


@more_samples
@given(programs())
def test_second_derivatives_agree_with_central_differences(program: Program) -> None:
    arrays = program.inputs(4)
    gradient = cr.compile(cr.grad(program.loss(NUMPY)))
    v = np.cos(np.arange(max(arrays[0].size, 1))).reshape(arrays[0].shape)
    slope = lambda x: float(np.sum(gradient(x, *arrays[1:]) * v))
    hv = cr.hvp(lambda x: program.loss(NUMPY)(x, *arrays[1:]), arrays[0], v)
    assert_gradient(slope, [arrays[0]], 0, hv, rel=1e-5)


# autograd 1.9 fails or errs where `where` broadcasts and where `tile` has fewer repetitions than axes, and it casts nothing.
FOREIGN = ("float", "choose", "repeat")


@more_samples
@given(programs(without=FOREIGN))
def test_gradients_agree_with_autograd(program: Program) -> None:
    arrays = program.inputs(5)
    everything = tuple(range(len(arrays)))
    wanted = autograd.grad(program.loss(anp), everything)(*arrays)
    for got, want in zip(cr.grad(program.loss(NUMPY), everything)(*arrays), wanted, strict=True):
        assert_close(got, want, 1e-10)


@more_samples
@given(programs(("f4",), without=("float",)))
def test_gradients_in_single_precision(program: Program) -> None:
    arrays = program.inputs(6)
    everything = tuple(range(len(arrays)))
    double = dataclasses.replace(program, dtypes=("f8",) * len(arrays))
    wanted = cr.grad(double.loss(NUMPY), everything)(*(a.astype(np.float64) for a in arrays))
    largest = max(float(np.max(np.abs(w), initial=1.0)) for w in wanted)
    for got, want in zip(cr.grad(program.loss(NUMPY), everything)(*arrays), wanted, strict=True):
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3 * largest)


@more_samples
@given(programs(), st.integers(0, 2))
def test_rows_are_kept_apart_through_whole_graphs(program: Program, which: int) -> None:
    """Where propagation says that a result carries the rows, a row of it depends on that row of the input only."""
    arrays = program.inputs(9)
    which %= len(arrays)
    if not arrays[which].shape:
        return
    graph = normalize(trace_function(lambda *xs: program.run(NUMPY, xs), arrays)[0])
    given_rows = [0 if i == which else None for i in range(len(arrays))] + [None] * len(graph.captures)
    table = rows_of_nodes(graph, given_rows)
    if any(table[n, 0] is None and any(isinstance(table[a, 0], int) for a in n.args) for n in graph.nodes() if n.op != "output"):
        return  # a statistic of the batch: what reads it depends on all rows
    rows = propagate_rows(graph, given_rows)
    before = evaluate(graph, arrays)
    for j in range(len(arrays[which])):
        moved = [a.copy() for a in arrays]
        moved[which][j] += 0.37
        others = [i for i in range(len(arrays[which])) if i != j]
        for a, b, carried in zip(before, evaluate(graph, moved), rows, strict=True):
            if isinstance(carried, int):
                assert a.shape[carried] == len(arrays[which])
                np.testing.assert_array_equal(a.take(others, carried), b.take(others, carried))


# ---- dense networks ----------------------------------------------------------------------------------------------------------

ACTIVATIONS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "tanh": (np.tanh, anp.tanh),
    "relu": (cr.relu, lambda z: anp.where(z > 0, z, 0.0)),
    "sigmoid": (cr.sigmoid, lambda z: 1 / (1 + anp.exp(-z))),
    "softplus": (cr.softplus, lambda z: anp.log(1 + anp.exp(z))),
    "elu": (cr.elu, lambda z: anp.where(z > 0, z, anp.exp(z) - 1)),
    "softmax": (cr.softmax, lambda z: anp.exp(z) / anp.sum(anp.exp(z), axis=-1, keepdims=True)),
    "identity": (lambda z: z, lambda z: z),
}


@given(st.data())
def test_dense_networks_agree_with_autograd(data: st.DataObject) -> None:
    widths = data.draw(st.lists(st.integers(1, 6), min_size=2, max_size=5))
    names = [data.draw(st.sampled_from(list(ACTIVATIONS))) for _ in widths[1:]]
    rows, classes = data.draw(st.integers(1, 5)), data.draw(st.booleans())
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    weights = [(random.normal(size=s) / np.sqrt(s[0]), random.normal(size=s[1])) for s in itertools.pairwise(widths)]
    x, labels = random.normal(size=(rows, widths[0])), random.integers(0, widths[-1], rows)

    def loss(xp: Any, which: int) -> Callable[[Any], Any]:
        def f(weights: Any) -> Any:
            h = x
            for (w, b), name in zip(weights, names, strict=True):
                h = ACTIVATIONS[name][which](xp.dot(h, w) + b)
            if not classes:
                return xp.mean((h - 0.3) ** 2)
            return -xp.mean(h[np.arange(rows), labels] - xp.log(xp.sum(xp.exp(h), axis=1)))

        return f

    ours, theirs = cr.grad(loss(np, 0))(weights), autograd.grad(loss(anp, 1))(weights)
    for (w, b), (v, c) in zip(ours, theirs, strict=True):
        assert_close(w, v, 1e-11)
        assert_close(b, c, 1e-11)
    compiled = cr.compile(cr.value_and_grad(loss(np, 0)))(weights)
    np.testing.assert_allclose(compiled[0], loss(np, 0)(weights), rtol=1e-13, atol=1e-15)
    np.testing.assert_array_equal(compiled[1][0][0], ours[0][0])


def test_hessians_agree_with_autograd() -> None:
    random = np.random.default_rng(8)
    w, x = random.normal(size=(4, 3)), random.normal(size=(6, 4))
    ours = lambda w: np.sum(np.log(1.0 + np.exp(np.tanh(x @ w))) * np.sin(w[0]))
    theirs = lambda w: anp.sum(anp.log(1.0 + anp.exp(anp.tanh(anp.dot(x, w)))) * anp.sin(w[0]))
    assert_close(cr.jacobian(cr.grad(ours))(w), autograd.hessian(theirs)(w), 1e-12)


# ---- keys --------------------------------------------------------------------------------------------------------------------


def key(f: Callable[..., Any], *args: Any) -> Any:
    graph = trace_function(f, args or [np.ones(3)])[0]
    assert (graph_key(graph) == graph_key(graph)) is True
    return graph_key(normalize(graph))


def test_equal_programs_have_equal_keys() -> None:
    a, b = np.arange(3.0), np.ones(3)
    equal: list[tuple[Callable[..., Any], Callable[..., Any]]] = [
        (lambda x: np.tanh(x) + 1.0, lambda y: np.tanh(y) + 1.0),
        (lambda x: x * a, lambda x: x * b),  # captured arrays are inputs
        (lambda x: x + np.nan, lambda x: x + np.nan),
        (lambda x: x * (2.0 * 3.0), lambda x: x * 6.0),
        (lambda x: np.sin(x) + np.sin(x), lambda x: (s := np.sin(x)) + s),
        (lambda x: cr.relu(x), lambda x: np.where(x <= 0, 0.0, x)),
        (lambda x: (np.cos(x), x * 2)[1], lambda x: x * 2),
        (lambda x: cr.scan(lambda h, y: (h + y, np.cos(y)), 0.0, x)[0], lambda x: cr.scan(lambda h, y: (h + y, None), 0.0, x)[0]),
        (lambda x: cr.grad(lambda v: np.sum(v * v))(x), lambda z: cr.grad(lambda u: np.sum(u * u))(z)),
    ]
    for one, other in equal:
        assert key(one) == key(other)
        assert hash(key(one)) == hash(key(other))


DIFFERENT = """
x + 0.0; x + -0.0; x + np.nan; x + np.inf; x + 1.0; x - 1.0; 1.0 - x; x * np.float64(1.0000000000000002); np.sum(x); np.max(x);
x[::-1]; x[:2]; x[1:]; x[None]; x[:, None]; (x, x); (x, x + 1.0); (x + 1.0, x); x.astype(np.float32); x > 0; x >= 0; x < 0;
np.where(x > 0, x, 0.0); np.where(x > 0, 0.0, x); np.where(x > 0, x, -0.0); np.pad(x, (1, 0)); np.pad(x, (0, 1));
np.zeros_like(x); -np.zeros_like(x); np.full_like(x, 1.0); cr.scan(lambda h, y: (h + y, None), 0.0, x)[0];
cr.scan(lambda h, y: (h - y, None), 0.0, x)[0]; cr.scan(lambda h, y: (h + y, h), 0.0, x);
cr.scan(lambda h, y: (h + y, None), 0.0, x, reverse=True)[0]; cr.scan(lambda h, y: (h + y * 0.5, None), 0.0, x)[0];
cr.random.normal((3,), seed=1) + x * 0; x * np.ones(3); np.ones(3) * x * np.ones(3); x ** np.float64(2.5);
np.take(x, np.array([0, 1])); np.take(x, np.array([0, 1, 2])); cr.one_hot(np.argmax(x), 3); cr.one_hot(np.argmax(x), 4)
"""


def test_different_programs_have_different_keys() -> None:
    expressions = listed(DIFFERENT)
    keys = [key(function(e, "x")) for e in expressions]
    assert [(a, b) for (a, k), (b, l) in itertools.combinations(zip(expressions, keys, strict=True), 2) if k == l] == []
    arguments = (np.ones(3), np.ones(4), np.ones((3, 1)), np.ones(3, np.float32), np.float64(1))
    assert len({key(lambda x: x * 2.0, x) for x in arguments}) == len(arguments)


@more_samples
@given(programs(), st.data())
def test_programs_with_equal_keys_compute_the_same(program: Program, data: st.DataObject) -> None:
    """One instruction is changed; then either the key is another, or nothing is different."""
    at = data.draw(st.integers(0, len(program.steps) - 1))
    name, operands, k = program.steps[at]
    changed = dataclasses.replace(program, steps=(*program.steps[:at], (name, operands, (k + 1) % 6), *program.steps[at + 1 :]))
    arrays = program.inputs(7)
    try:
        wanted = changed.run(np, arrays)
    except (ValueError, IndexError):
        return  # the variant has shapes that later instructions cannot take
    keys, results = [], []
    for p in (program, changed):
        graph = trace_function(lambda *xs, p=p: p.run(NUMPY, xs), arrays)[0]
        keys.append((graph_key(normalize(graph)), tuple(np.asarray(c).tobytes() for c in graph.captures)))
        results.append(evaluate(graph, arrays))
    if keys[0] == keys[1]:
        for a, b in zip(*results, strict=True):
            np.testing.assert_array_equal(a, b)
    for got, want in zip(results[1], wanted, strict=True):
        assert_close(got, np.asarray(want), 1e-12)


def test_the_sample_of_programs_reaches_the_whole_vocabulary() -> None:
    used: set[str] = set()

    @given(programs())
    def collect(program: Program) -> None:
        used.update(name for name, _, _ in program.steps)

    collect()
    assert len(used) > 0.9 * len({*ONE, *TWO})


@pytest.mark.slow
@more_samples
@given(programs(("f8", "f4")))
def test_programs_under_every_transform(program: Program) -> None:
    arrays = program.inputs(8)
    f = program.loss(NUMPY)
    value, pull = cr.vjp(f, *arrays)
    everything = tuple(range(len(arrays)))
    for a, b in zip(pull(np.ones((), value.dtype)), cr.grad(f, everything)(*arrays), strict=True):
        np.testing.assert_array_equal(a, b)
    tangents = [np.cos(a) for a in arrays]
    wanted = sum(float(np.sum(g.astype(np.float64) * t)) for g, t in zip(cr.grad(f, everything)(*arrays), tangents, strict=True))
    precise = 1e-9 if "f4" not in program.dtypes else 1e-3
    np.testing.assert_allclose(cr.jvp(f, arrays, tangents)[1], wanted, rtol=precise, atol=precise * 10)
