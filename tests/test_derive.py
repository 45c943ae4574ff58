"""The chain rule: what is summed, what is kept apart, what happens at the borders, and that the checker of all this would notice."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from differences import assert_gradient, central
from expressions import function, listed
from tracing import trace_function

import chainrule as cr
from chainrule.derive.backward import backward
from chainrule.errors import ChainruleError, DataError, DtypeError, GradientMismatch, ShapeError, UsageError
from chainrule.gradcheck import check_graph
from chainrule.graph.interpret import evaluate
from chainrule.graph.node import OPS
from chainrule.graph.trace import FUNCTIONS, build, type_of
from chainrule.graph.verify import verify
from chainrule.normalize import normalize
from chainrule.ops.loop import apply_many

Array = np.ndarray


def check(f: Callable[..., Any], *args: Any, rel: float = 1e-6) -> None:
    """First derivatives of f by all arguments, and second ones, against differences of f itself and of its gradient."""
    everything = tuple(range(len(args)))
    arrays = [np.asarray(a, np.float64) for a in args]
    weights = [np.linspace(0.5, 1.5, a.size).reshape(a.shape) for a in arrays]
    gradient = cr.grad(f, everything)

    def slope(*xs: Any) -> Any:
        return sum(np.sum(g * w) for g, w in zip(gradient(*xs), weights, strict=True))

    for i, g in enumerate(gradient(*arrays)):
        assert_gradient(lambda *xs: float(f(*xs)), arrays, i, g, rel)
    for i, g in enumerate(cr.grad(slope, everything)(*arrays)):
        assert_gradient(lambda *xs: float(slope(*xs)), arrays, i, g, rel)


# ---- what is summed ----------------------------------------------------------------------------------------------------------


def test_fan_out_is_summed_before_it_is_passed_on() -> None:
    def f(x: Any) -> Any:
        y = np.sin(x)
        return y * y + y * x + np.exp(y) + y

    check(f, 0.7)
    graph, _ = trace_function(f, [np.float64(0.7)])
    cosines = [n for n in normalize(backward(graph, [0])).nodes() if n.op == "cos"]
    assert len(cosines) == 1  # the local derivative of sin is taken once, not once for each of its readers


def test_fan_out_grows_no_faster_than_the_graph() -> None:
    def f(x: Any) -> Any:
        for _ in range(40):
            x = x + x * 0.01  # 2**40 paths
        return x

    assert cr.grad(f)(1.0) == pytest.approx(1.01**40, rel=1e-12)


def test_shared_weights_get_the_sum_of_all_their_uses() -> None:
    w, x = np.random.default_rng(0).normal(size=(2, 3, 3))

    def tied(w: Any) -> Any:
        return np.sum(np.tanh(np.tanh(x @ w) @ w.T) @ w)

    def untied(a: Any, b: Any, c: Any) -> Any:
        return np.sum(np.tanh(np.tanh(x @ a) @ b.T) @ c)

    np.testing.assert_allclose(cr.grad(tied)(w), sum(cr.grad(untied, (0, 1, 2))(w, w, w)), rtol=1e-13)


def test_the_same_array_twice_as_argument() -> None:
    x = np.array([1.0, 2.0])
    a, b = cr.grad(lambda a, b: np.sum(a * a * b), (0, 1))(x, x)
    np.testing.assert_array_equal(a, 2 * x * x)
    np.testing.assert_array_equal(b, x * x)
    twice = cr.grad(lambda a: np.sum(a), (0, 0))(x)
    np.testing.assert_array_equal(twice, np.ones((2, 2)))


def test_unused_inputs_have_a_gradient_of_zero() -> None:
    arrays = {"used": np.ones(2), "unused": np.ones((2, 3), np.float32), "dead": np.ones(4)}
    g = cr.grad(lambda p: np.sum(p["used"]) + 0 * len(p["dead"] * 2))(arrays)
    np.testing.assert_array_equal(g["used"], np.ones(2))
    assert (g["unused"].shape, g["unused"].dtype) == ((2, 3), np.float32)
    np.testing.assert_array_equal(g["unused"], np.zeros((2, 3)))
    np.testing.assert_array_equal(g["dead"], np.zeros(4))
    np.testing.assert_array_equal(cr.grad(cr.grad(lambda x: 3.0 * x))(2.0), 0.0)


def test_no_gradient_flows_through_whole_numbers_and_truths() -> None:
    x = np.array([0.4, 1.6, 2.5])
    for f in (np.floor, np.round, np.ceil, np.trunc, np.sign, lambda x: x.astype(int).astype(float), lambda x: (x > 1).astype(float),
              lambda x: np.argmax(x) * 1.0, lambda x: x // 1.0, np.isnan):  # fmt: skip
        np.testing.assert_array_equal(cr.grad(lambda x, f=f: np.sum(f(x) * 2.0))(x), np.zeros(3))
    np.testing.assert_array_equal(cr.grad(lambda x: np.sum(x % 1.0))(x), np.ones(3))


def test_gradients_keep_the_type_of_their_argument() -> None:
    single, double = np.ones(3, np.float32), np.ones(3)
    a, b = cr.grad(lambda a, b: np.sum(np.tanh(a) * b * 2.0), (0, 1))(single, double)
    assert (a.dtype, b.dtype) == (np.float32, np.float64)
    assert cr.grad(lambda a: np.mean(a**2))(single).dtype == np.float32
    assert cr.grad(lambda a: np.sum(a[np.array([0, 0])] * np.float64(2)))(single).dtype == np.float32
    assert cr.grad(lambda c, a: np.sum(c * a))(2.0, single).dtype == np.float64
    for f in (
        np.var,
        np.std,
        np.max,
        np.linalg.norm,
        lambda x: np.sum(np.cumsum(x)),
        np.prod,
        cr.logsumexp,
        lambda x: np.sum(cr.gelu(x)),
    ):
        assert cr.grad(f)(np.linspace(0.5, 1, 3, dtype=np.float32)).dtype == np.float32


# ---- every recorded function -------------------------------------------------------------------------------------------------

SMOOTH_UFUNCS = [f for f in FUNCTIONS if isinstance(f, np.ufunc) and f is not np.matmul]
PLACES = {
    **dict.fromkeys((np.arcsin, np.arccos, np.arctanh), (-0.9, 0.9)),
    **dict.fromkeys((np.log, np.log2, np.log10, np.sqrt, np.power, np.float_power), (0.2, 3.0)),
    np.arccosh: (1.1, 3.0),
    np.log1p: (-0.8, 3.0),
}


@pytest.mark.parametrize("ufunc", SMOOTH_UFUNCS, ids=lambda f: f.__name__)
def test_every_recorded_function_has_first_and_second_derivatives(ufunc: np.ufunc) -> None:
    low, high = PLACES.get(ufunc, (-2.3, 2.3))
    random = np.random.default_rng(5)
    args = [random.uniform(low, high, 6) for _ in range(ufunc.nin)]
    try:
        result = ufunc(*args)
    except TypeError:
        pytest.skip("takes no floating-point numbers")
    if result.dtype.kind != "f":
        pytest.skip("its results are truths")
    check(lambda *xs: np.sum(ufunc(*xs) * np.arange(1.0, 7.0)), *args)


OF_ARRAYS = """
np.mean(x, axis=0); np.var(x); np.var(x, 0, ddof=1); np.std(x, axis=1); np.max(x); np.min(x, axis=1); np.linalg.norm(x);
np.linalg.norm(x, axis=0); np.cumsum(x); np.cumsum(x, 1); np.cumprod(x, 0); np.prod(x); np.prod(x, (0, 1)); np.diff(x, 2);
np.average(x, 0, np.abs(x)); x @ x.T @ x; np.einsum("ij,kj,kl->il", x, x, x); np.einsum("ii->i", x[:, :3]);
np.trace(x[:, :3] @ x[:, 1:]); np.diagonal(x * x, 1); np.trace(x * x, -1, 1, 0); np.kron(x, x); np.outer(x, x);
np.tensordot(x, x, ([1], [1])); np.dot(x, x.T);
np.concatenate([x, x * x], 1); np.stack([x, np.sin(x)]); np.tile(x * x, (2, 1)); np.repeat(x * x, 2, 0); np.roll(x * x, 1, 0);
np.pad(x * x, 1); np.pad(x, ((1, 0), (2, 1)), constant_values=x[0, 0]); np.split(x * x, 3)[1]; np.flip(x * x); np.triu(x * x);
np.clip(x, -0.5, 0.5) ** 2; np.where(x > 0, x * x, x); np.take(x * x, [0, 2, 2], 0); (x * x)[::-1, ::2];
np.take_along_axis(x * x, np.argmax(x, 1)[:, None], 1); cr.softmax(x); cr.log_softmax(x, 0); cr.logsumexp(x);
cr.windows(x * x, [1], [2], [2]); cr.scatter_add(x, np.array([1, 1]), x[:2] * x[1:]); np.squeeze((x * x)[None]);
np.nan_to_num(x) ** 2; np.moveaxis(x * x, 0, 1); np.broadcast_to(x * x, (2, 3, 4)); cr.erf(x); x ** np.arange(4);
np.abs(x) ** x; 2.0 ** x; (x * x + 1) ** (-0.5); x ** 3 / (1 + x ** 4)
"""


@pytest.mark.parametrize("expression", listed(OF_ARRAYS))
def test_derivatives_of_functions_of_arrays(expression: str) -> None:
    f = function(expression, "x")
    x = np.random.default_rng(11).uniform(-1.5, 1.5, (3, 4))

    def weighted(x: Any) -> Any:
        y = f(x)
        return np.sum(np.sin(y) * np.linspace(0.5, 1.5, int(np.prod(y.shape))).reshape(y.shape))

    check(weighted, x)


def test_third_derivatives() -> None:
    for f, third in [
        (lambda x: x**5, lambda x: 60 * x**2),
        (np.sin, lambda x: -np.cos(x)),
        (np.log, lambda x: 2 / x**3),
        (lambda x: 1 / x, lambda x: -6 / x**4),
        (np.sqrt, lambda x: 0.375 * x**-2.5),
        (lambda x: x**1.5, lambda x: -0.375 * x**-1.5),
        (np.tanh, lambda x: -2 * (1 - np.tanh(x) ** 2) * (1 - 3 * np.tanh(x) ** 2)),
        (cr.sigmoid, lambda x: (s := 1 / (1 + np.exp(-x))) * (1 - s) * (1 - 6 * s + 6 * s * s)),
        (lambda x: np.prod(np.stack([x, x, x])), lambda x: 6.0),
        (lambda x: cr.scan(lambda h, _: (h * x, None), 1.0, None, length=4)[0], lambda x: 24 * x),
    ]:
        got = cr.grad(cr.grad(cr.grad(f)))(0.8)
        assert got == pytest.approx(third(0.8), rel=1e-10)


# ---- loops -------------------------------------------------------------------------------------------------------------------

W = np.array([[0.4, -0.3], [0.2, 0.5]])
XS = np.random.default_rng(3).normal(size=(4, 2))


def by_loop(step: Callable[..., Any], h: Any, xs: Any, reverse: bool = False) -> Any:
    """What scan means, unrolled: the oracle for its derivative."""
    ys: list[Any] = [None] * len(xs)
    for t in reversed(range(len(xs))) if reverse else range(len(xs)):
        h, ys[t] = step(h, xs[t])
    return h, np.stack(ys) if ys else np.zeros((0, 2))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [0, 1, 4])
def test_gradient_through_a_loop_is_that_of_the_unrolled_one(length: int, reverse: bool) -> None:
    """The trap: values that the body takes from outside (w, scale) and the state of earlier steps must each be counted once."""

    def loss(loop: Any, w: Any, h0: Any, xs: Any) -> Any:
        scale = np.sum(w * w)  # computed outside, read by each step

        def step(h: Any, x: Any) -> Any:
            new = np.tanh(h @ w + x * scale)
            return new, new * np.cos(x) + w[0]

        h, ys = loop(step, h0, xs)
        return np.sum(h * h) + np.sum(ys * np.arange(2.0)) + np.sum(ys * w[1])

    args = (W, np.array([0.1, -0.2]), XS[:length])
    loops = [lambda *a, scan=scan: loss(lambda *s: scan(*s, reverse=reverse), *a) for scan in (cr.scan, by_loop)]
    rolled, unrolled = (cr.grad(f, (0, 1, 2))(*args) for f in loops)
    for a, b in zip(rolled, unrolled, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)
    second = [
        cr.grad(lambda w, f=f: np.sum(cr.grad(f, 0)(w, *args[1:]) * W) + np.sum(cr.grad(f, 1)(w, *args[1:])))(W) for f in loops
    ]
    np.testing.assert_allclose(*second, rtol=1e-11, atol=1e-13)
    if length == 4 and not reverse:
        check(loops[0], *args)


def test_nested_loops() -> None:
    def loss(loop: Any, w: Any, h0: Any) -> Any:
        def outer(h: Any, x: Any) -> Any:
            inner_h, ys = loop(lambda k, z: (np.sin(k * w + z * h), k * z), h, XS * x[0])
            return inner_h, np.sum(ys, axis=0) * w

        h, ys = loop(outer, h0, XS)
        return np.sum(h) + np.sum(ys * ys)

    args = (np.array([0.7, -0.4]), np.array([0.1, 0.3]))
    rolled, unrolled = (cr.grad(lambda w, h, loop=loop: loss(loop, w, h), (0, 1))(*args) for loop in (cr.scan, by_loop))
    for a, b in zip(rolled, unrolled, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
    check(lambda w, h: loss(cr.scan, w, h), *args)


def test_gradient_inside_a_loop_body() -> None:
    """Gradient descent as a loop, differentiated by its rate and its start."""

    def valley(w: Any) -> Any:
        return np.sum(w**4) / 4 + w[0] * w[1]

    def descend(rate: Any, start: Any) -> Any:
        w, _ = cr.scan(lambda w, _: (w - rate * cr.grad(valley)(w), None), start, None, length=5)
        return valley(w)

    check(descend, 0.1, np.array([1.0, 0.5]))


def test_loop_with_whole_numbers_in_its_state() -> None:
    def f(w: Any, xs: Any) -> Any:
        def step(h: Any, x: Any) -> Any:
            count, value, seen = h
            even = np.equal(count % 2, 0)
            return (count + 1, np.where(even, value * w + x, value - w * x), np.logical_or(seen, x > 0)), (count, value)

        (count, value, _), (counts, values) = cr.scan(step, (0, 1.0, False), xs)
        return value * count + np.sum(values * counts)

    check(f, 0.7, XS[:, 0])


def test_loop_that_gives_only_states_or_only_results() -> None:
    check(lambda w: cr.scan(lambda h, x: (h * w + x, None), 0.5, XS[:, 0])[0], 0.7)
    check(lambda w: np.sum(cr.scan(lambda _, x: (None, np.sin(x * w)), None, XS)[1]), 0.7)
    check(lambda w: np.sum(cr.scan(lambda h, x: (h * w + x, h * x), 0.5, XS[:, 0])[1]), 0.7)
    check(lambda w: np.sum(cr.scan(lambda _, x: (None, (x * w, np.sin(x * w))), None, XS)[1][1]), 0.7)
    check(lambda w: cr.scan(lambda h, _: (h * w, None), 1.5, None, length=3)[0], 0.7)


def test_loop_that_passes_its_state_on_unchanged_or_ignores_it() -> None:
    check(lambda w: np.sum(cr.scan(lambda h, x: (h, h * x), w, XS)[1]), np.array([0.3, 0.4]))
    check(lambda w: np.sum(cr.scan(lambda h, x: (x * w, h), w, XS)[1]), np.array([0.3, 0.4]))
    check(lambda w: np.sum(cr.scan(lambda h, x: ((h[1], h[0]), h[0] * x), (w, w * w), XS)[1]), np.array([0.3, 0.4]))


def test_derivative_of_a_loop_in_normal_form() -> None:
    """Normalization takes away what nobody reads, the states on entry among it; the derivative must not rely on them."""
    f = lambda w, h, xs: cr.scan(lambda h, x: (np.tanh(h @ w + x), h * x), h, xs)
    args = [W, np.array([0.1, -0.2]), XS]
    graph, _ = trace_function(f, args)
    seeds = [np.array([1.0, 2.0]), np.cos(XS)]
    wanted = evaluate(backward(graph, [0, 1, 2]), [*args, *seeds])
    for got, want in zip(evaluate(verify(backward(normalize(graph), [0, 1, 2])), [*args, *seeds]), wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-13)
    for by in ([0], [1]):
        trimmed = normalize(dataclasses.replace(graph, outputs=tuple(graph.outputs[i] for i in by)))
        full = evaluate(backward(graph, [0, 1, 2], by), [*args, *(seeds[i] for i in by)])
        for got, want in zip(evaluate(backward(trimmed, [0, 1, 2]), [*args, *(seeds[i] for i in by)]), full, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-13)


def test_a_loop_keeps_its_size_when_differentiated() -> None:
    def nodes(length: int) -> int:
        gradient = cr.grad(lambda w: np.sum(cr.scan(lambda h, x: (np.tanh(h * w + x), h), 0.0, np.ones(length))[1]))
        graph, _ = trace_function(lambda w: cr.grad(gradient)(w), [0.3])
        return len(normalize(graph).nodes())

    assert nodes(4) == nodes(400)


# ---- where, and numbers that are not finite ----------------------------------------------------------------------------------


def guarded(f: Callable[[Any], Any], taken: Callable[[Any], Any] = lambda x: x >= 1) -> Callable[[Any], Any]:
    """f where x ≥ 1, x² elsewhere: its derivatives below 1 are those of x², whatever f does there."""
    return lambda x: np.where(taken(x), f(x), x * x)


NOT_FINITE: dict[str, Callable[[Any], Any]] = {
    "sqrt": np.sqrt,
    "log": np.log,
    "log1p": lambda x: np.log1p(x - 1),
    "log2 log10": lambda x: np.log2(x) + np.log10(x),
    "x log x": lambda x: x * np.log(x),
    "log x / x": lambda x: np.log(x) / x,
    "1 / x": lambda x: 1 / x,
    "1 / x twice": lambda x: 1 / (1 / x),
    "x / x": lambda x: x / x,
    "x ** -2": lambda x: x**-2.0,
    "x ** 0.5": lambda x: x ** np.float64(0.5),
    "x ** 1.5": lambda x: x**1.5,
    "x ** x": lambda x: x**x,
    "sqrt sqrt": lambda x: np.sqrt(np.sqrt(x)),
    "log sqrt": lambda x: np.log(np.sqrt(x)),
    "sqrt log": lambda x: np.sqrt(np.log(x) + 1),
    "tanh log": lambda x: np.tanh(np.log(x)),
    "sin 1/x": lambda x: np.sin(1 / x),
    "cos sqrt": lambda x: np.cos(np.sqrt(x)),
    "arctan log": lambda x: np.arctan(np.log(x)),
    "abs log": lambda x: np.abs(np.log(x)),
    "erf log": lambda x: cr.erf(np.log(x)),
    "sigmoid log": lambda x: cr.sigmoid(np.log(x)),
    "softplus sqrt": lambda x: cr.softplus(np.sqrt(x)),
    "gelu silu mish": lambda x: cr.gelu(np.log(x)) + cr.silu(np.sqrt(x)) + cr.mish(1 / x),
    "relu elu selu": lambda x: cr.relu(np.log(x)) + cr.elu(np.sqrt(x)) + cr.selu(1 / x),
    "logaddexp hypot": lambda x: np.logaddexp(np.log(x), x) + np.hypot(np.sqrt(x), x),
    "maximum": lambda x: np.maximum(np.log(x), 0.1),
    "clip": lambda x: np.clip(np.log(x), -1, 1),
    "remainder": lambda x: np.log(x) % 0.7,
    "arcsin arccosh": lambda x: np.arccosh(x + 0.1) + np.arcsin(1 / (x + 0.5)),
    "exp of 1000": lambda x: np.exp(1000 * (1 - x)) * np.exp(-1000 * (1 - x)),
    "exp overflow": lambda x: np.log(1 + np.exp(2000 * (1 - x))) + x,
    "expm1 cosh": lambda x: 1 / (np.expm1(2000 * (1 - x)) + 2) + 1 / np.cosh(2000 * (1 - x)) + x,
    "mixed": lambda x: np.sqrt(x) * np.log(x) / (x - 0.0) ** 1.5 + np.tanh(1 / np.sqrt(x)),
}


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("name", NOT_FINITE)
def test_where_lets_nothing_through_from_the_branch_not_taken(name: str, order: int) -> None:
    derivative: Callable[[Any], Any] = guarded(NOT_FINITE[name])
    for _ in range(order):
        derivative = cr.grad(derivative)
    for x in (0.0, -0.0, -1.0, 0.5, -1e-300):
        want = {1: 2 * x, 2: 2.0, 3: 0.0}[order]
        assert derivative(x) == want, f"at {x}"
    if order < 3:  # the branch that is taken keeps its derivative
        plain: Callable[[Any], Any] = NOT_FINITE[name]
        for _ in range(order):
            plain = cr.grad(plain)
        assert derivative(1.7) == pytest.approx(plain(1.7), rel=1e-12)


def test_where_guards_arrays_and_reductions() -> None:
    x = np.array([-1.0, 0.0, 2.0, 4.0])
    g = cr.grad(lambda x: np.sum(np.where(x > 0, np.log(x), 0.0)))(x)
    np.testing.assert_array_equal(g, [0, 0, 0.5, 0.25])
    rows = np.array([[-np.inf, -np.inf], [0.0, 1.0], [np.nan, 1.0]])
    keep = np.array([False, True, False])
    for f in (
        cr.softmax,
        cr.log_softmax,
        lambda z: z - cr.logsumexp(z, axis=1, keepdims=True),
        lambda z: z - np.max(z, 1, keepdims=True),
    ):
        g = cr.grad(lambda z, f=f: np.sum(np.where(keep[:, None], f(z), 0.0) * np.arange(2.0)))(rows)
        np.testing.assert_array_equal(g[[0, 2]], np.zeros((2, 2)))
        assert np.all(np.isfinite(g))
    masked = cr.grad(lambda z: np.sum(np.where(z > -np.inf, cr.softmax(z), 0.0) * np.arange(3.0)))(np.array([0.5, -np.inf, 1.0]))
    assert masked[1] == 0
    assert np.all(np.isfinite(masked))


def test_where_hides_nothing_in_the_branch_taken() -> None:
    assert cr.grad(lambda x: np.where(x >= 0, np.sqrt(x), 0.0))(0.0) == np.inf
    assert np.isnan(cr.grad(np.log)(np.nan))
    assert cr.grad(np.log)(0.0) == np.inf


@pytest.mark.parametrize(
    ("f", "x", "second", "third"),
    [
        (lambda x: np.log(x) ** 2, 1.0, 2.0, -6.0),
        (lambda x: np.sqrt(x) * (np.sqrt(x) - 2), 1.0, 0.5, -0.75),
        (lambda x: (1 / x - 1) ** 2, 1.0, 2.0, -12.0),
        (lambda x: (x**1.5 - 1) ** 2, 1.0, 4.5, 6.75),
        (lambda x: np.exp(np.log(x) ** 2), 1.0, 2.0, -6.0),
        (lambda x: np.sin(x) ** 2, 0.0, 2.0, 0.0),
        (lambda x: (np.exp(x) - 1) ** 2, 0.0, 2.0, 6.0),
        (lambda x: x * x, 0.0, 2.0, 0.0),
        (lambda x: x**2.0 * np.cos(x), 0.0, 2.0, 0.0),
        (lambda x: x ** np.float64(2), 0.0, 2.0, 0.0),
        (lambda x: x ** np.float64(3), 0.0, 0.0, 6.0),
        (lambda x: x * np.tanh(x), 0.0, 2.0, 0.0),
        (lambda x: cr.sigmoid(x) * x, 0.0, 0.5, 0.0),
        (lambda x: np.prod(np.stack([x, x])), 0.0, 2.0, 0.0),
        (lambda x: x / (1 + x) * x, 0.0, 2.0, -6.0),
        (lambda x: np.arcsinh(x) ** 2, 0.0, 2.0, 0.0),
    ],
)
def test_no_curvature_is_lost_where_the_incoming_gradient_is_exactly_zero(f: Any, x: float, second: float, third: float) -> None:
    assert cr.grad(cr.grad(f))(x) == pytest.approx(second, abs=1e-12)
    assert cr.grad(cr.grad(cr.grad(f)))(x) == pytest.approx(third, abs=1e-11)


# ---- borders -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("f", "x", "wanted"),
    [
        (cr.relu, 0.0, 0.0),
        (cr.relu, -0.0, 0.0),
        (lambda x: np.maximum(x, 0.0), 0.0, 0.5),  # ties share
        (lambda x: np.minimum(x, 0.0), 0.0, 0.5),
        (lambda x: np.maximum(x, x), 2.0, 1.0),
        (np.abs, 0.0, 0.0),
        (np.sign, 0.0, 0.0),
        (cr.leaky_relu, 0.0, 0.01),
        (cr.elu, 0.0, 1.0),
        (lambda x: np.clip(x, 0.0, 1.0), 0.0, 1.0),
        (lambda x: np.clip(x, 0.0, 1.0), 1.0, 1.0),
        (lambda x: np.clip(x, 0.0, 1.0), 1.1, 0.0),
        (lambda x: np.clip(x, 0.0, 1.0), -0.1, 0.0),
        (np.sqrt, 0.0, np.inf),
        (lambda x: 0 * np.sqrt(x), 0.0, 0.0),
        (lambda x: np.sqrt(x * x), 0.0, 0.0),
        (lambda x: np.sqrt(np.where(x >= 1, np.log(x), x * x)), 0.0, 0.0),
        (lambda x: np.linalg.norm(np.stack([x, x])), 0.0, 0.0),
        (lambda x: np.std(np.stack([x, x])), 2.0, 0.0),
        (lambda x: x**0, 0.0, 0.0),
        (lambda x: x**1, 0.0, 1.0),
        (lambda x: x ** np.float64(1), 0.0, 1.0),
        (lambda x: x ** np.float64(0), 0.0, 0.0),
        (lambda x: 0.0**x, 2.0, 0.0),
        (np.cbrt, 8.0, 1 / 12),
        (np.cbrt, -8.0, 1 / 12),
        (np.arcsinh, 0.0, 1.0),
        (np.sinh, 0.0, 1.0),
        (np.tan, 0.0, 1.0),
        (cr.softplus, 0.0, 0.5),
        (cr.softsign, 0.0, 1.0),
        (cr.sigmoid, 1000.0, 0.0),
        (cr.sigmoid, -1000.0, 0.0),
        (cr.softplus, -1000.0, 0.0),
        (np.tanh, 1000.0, 0.0),
        (cr.gelu, -1000.0, 0.0),
        (cr.mish, -1000.0, 0.0),
        (cr.silu, -1000.0, 0.0),
        (lambda x: np.logaddexp(x, 0.0), 1000.0, 1.0),
        (lambda x: np.hypot(x, 0.0), 0.0, 0.0),
        (lambda x: np.copysign(x, -1.0), 2.0, -1.0),
        (lambda x: np.nan_to_num(x), np.nan, 0.0),
        (lambda x: np.fabs(x), -2.0, -1.0),
    ],
)  # fmt: skip
def test_derivative_at_the_border(f: Any, x: float, wanted: float) -> None:
    assert cr.grad(f)(x) == pytest.approx(wanted, rel=1e-12, abs=1e-300)


def test_ties_of_max_and_min_share_the_gradient_in_equal_parts() -> None:
    x = np.array([[3.0, 1.0, 3.0], [2.0, 2.0, 2.0]])
    np.testing.assert_array_equal(cr.grad(lambda x: np.sum(np.max(x, axis=1)))(x), [[0.5, 0, 0.5], [1 / 3] * 3])
    np.testing.assert_array_equal(cr.grad(lambda x: np.sum(np.min(-x, axis=1)))(x), -np.array([[0.5, 0, 0.5], [1 / 3] * 3]))
    np.testing.assert_array_equal(cr.grad(np.max)(x), [[0.5, 0, 0.5], [0, 0, 0]])
    a, b = cr.grad(lambda a, b: np.sum(np.maximum(a, b)), (0, 1))(np.array([1.0, 2.0]), np.array([1.0, 3.0]))
    assert (a.tolist(), b.tolist()) == ([0.5, 0.0], [0.5, 1.0])


def test_norm_away_from_zero_and_at_zero() -> None:
    check(np.linalg.norm, np.array([3.0, -4.0]))
    np.testing.assert_array_equal(cr.grad(np.linalg.norm)(np.zeros(2)), np.zeros(2))
    g = cr.grad(lambda x: np.sum(np.linalg.norm(x, axis=1)))(np.array([[0.0, 0.0], [3.0, 4.0]]))
    np.testing.assert_allclose(g, [[0, 0], [0.6, 0.8]], rtol=1e-15)


# ---- stop_gradient and custom_gradient ---------------------------------------------------------------------------------------


def test_stop_gradient() -> None:
    assert cr.grad(lambda x: x * cr.stop_gradient(x))(3.0) == 3
    assert cr.grad(cr.grad(lambda x: x * x * cr.stop_gradient(x * x)))(3.0) == 18
    assert cr.grad(lambda x: np.sin(cr.stop_gradient(x)))(3.0) == 0
    nest = {"a": np.ones(2), "b": [2.0]}
    same = cr.stop_gradient(nest)
    assert same["a"] is nest["a"]
    g = cr.grad(lambda p: np.sum(p["a"] * cr.stop_gradient(p)["a"]) + p["b"][0] * cr.stop_gradient(p)["b"][0])(nest)
    assert (g["a"].tolist(), float(g["b"][0])) == ([1.0, 1.0], 2.0)
    assert cr.jvp(lambda x: x * cr.stop_gradient(x), [3.0], [2.0])[1] == 6
    assert cr.grad(lambda x: cr.scan(lambda h, _: (cr.stop_gradient(h) * x, None), x, None, length=3)[0])(2.0) == 8


def test_custom_gradient_replaces_the_derivative_at_every_order() -> None:
    @cr.custom_gradient
    def cube(x: Any) -> Any:
        return x**3, lambda g: g * 7.0 * x**2  # wrong on purpose, so that it can be recognised

    assert cube(2.0) == 8
    assert cr.grad(cube)(2.0) == 28
    assert cr.grad(cr.grad(cube))(2.0) == 28  # d(7 x²)/dx = 14 x
    assert cr.grad(lambda x: cube(x) ** 2)(2.0) == 2 * 8 * 28
    assert cr.compile(cr.grad(cube))(2.0) == 28
    assert cr.jvp(cube, [2.0], [1.0])[1] == 28
    np.testing.assert_array_equal(cr.jacobian(cube)(np.array([1.0, 2.0])), np.diag([7.0, 28.0]))
    assert cr.grad(lambda x: cr.scan(lambda h, _: (cube(h), None), x, None, length=2)[0])(1.0) == 49


def test_custom_gradient_takes_from_outside_and_gives_nothing_back() -> None:
    a = np.array([1.0, 2.0])

    def f(x: Any, w: Any) -> Any:
        scale = np.sum(w) * 2

        @cr.custom_gradient
        def inner(x: Any) -> Any:
            return x * scale + a, lambda g: g * (scale + a) * w

        return np.sum(inner(x))

    x, w = np.ones(2), np.array([0.5, 1.5])
    gx, gw = cr.grad(f, (0, 1))(x, w)
    np.testing.assert_array_equal(gx, (4 + a) * w)
    np.testing.assert_array_equal(gw, np.zeros(2))
    again = cr.grad(lambda w: np.sum(cr.grad(f)(x, w)))(w)
    np.testing.assert_allclose(again, central(lambda w: float(np.sum((2 * np.sum(w) + a) * w)), [w], 0), rtol=1e-8)


def test_custom_gradient_of_several_arguments_and_nests() -> None:
    @cr.custom_gradient
    def f(p: Any, x: Any) -> Any:
        def pull(g: Any) -> Any:
            return {"w": g[0] * 2 * x, "b": [g[1]["y"] * 3]}, g[0] * 5 * p["w"]

        return (p["w"] * x, {"y": p["b"][0] + 0 * x}), pull

    p, x = {"w": np.array([1.0, 2.0]), "b": [np.array([3.0, 4.0])]}, np.array([5.0, 6.0])

    def loss(p: Any, x: Any) -> Any:
        a, rest = f(p, x)
        return np.sum(a) + np.sum(rest["y"] * rest["y"])

    gp, gx = cr.grad(loss, (0, 1))(p, x)
    np.testing.assert_array_equal(gp["w"], 2 * x)
    np.testing.assert_array_equal(gp["b"][0], 3 * 2 * p["b"][0])
    np.testing.assert_array_equal(gx, 5 * p["w"])
    only_one = cr.grad(lambda p: np.sum(f(p, x)[0]))(p)
    np.testing.assert_array_equal(only_one["b"][0], np.zeros(2))


def test_custom_gradient_sees_static_arguments_as_they_are() -> None:
    @cr.custom_gradient
    def total(x: Any, axis: int, mode: str) -> Any:
        assert (type(axis), type(mode)) == (int, str)
        return np.sum(x, axis=axis), lambda g: (np.expand_dims(g, axis) * np.ones_like(x) * len(mode), None, None)

    np.testing.assert_array_equal(cr.grad(lambda x: np.sum(total(x, 1, "abc")))(np.ones((2, 3))), np.full((2, 3), 3.0))


def test_custom_gradient_of_a_nest_that_holds_whole_numbers() -> None:
    @cr.custom_gradient
    def pick(p: Any, axis: int) -> Any:
        return p["x"][p["at"]], lambda g: ({"at": p["at"] * 0, "x": cr.scatter_add(p["x"] * 0, p["at"], 5 * g, axis)}, None)

    p = {"at": np.array([2, 2]), "x": np.ones(3)}
    g = cr.grad(lambda x: np.sum(pick({"at": p["at"], "x": x}, 0)))(p["x"])
    np.testing.assert_array_equal(g, [0.0, 0.0, 10.0])


def test_custom_gradient_keeps_types_and_refuses_other_shapes() -> None:
    wide = cr.custom_gradient(lambda x: (x * 2, lambda g: g * np.full(3, 2.0)))
    assert cr.grad(lambda x: np.sum(wide(x)))(np.ones(3, np.float32)).dtype == np.float32
    wrong = cr.custom_gradient(lambda x: (x * 2, lambda g: np.sum(g)))
    with pytest.raises(ShapeError, match=r"\(3,\).*\(\)") as caught:
        cr.grad(lambda x: np.sum(wrong(x)))(np.ones(3))
    assert __file__ in str(caught.value)


def test_custom_gradient_draws_the_same_numbers_in_value_and_derivative() -> None:
    def f(x: Any) -> Any:
        @cr.custom_gradient
        def drop(x: Any) -> Any:
            mask = cr.random.bernoulli(x.shape, 0.5)
            return np.where(mask, x, 0.0), lambda g: np.where(mask, g, 0.0)

        other = cr.random.bernoulli(x.shape, 0.5)
        return drop(x), other

    x = np.ones(64)
    graph = build(lambda x: list(f(x)), [type_of(x)], key=lambda: np.array([1, 2], np.uint32))
    value, other = evaluate(graph, [x])
    (gradient,) = evaluate(backward(graph, [0], [0]), [x, np.ones(64)])
    np.testing.assert_array_equal(gradient, value)
    assert not np.array_equal(value, other)


# ---- products with Jacobians -------------------------------------------------------------------------------------------------


def two(a: Any, b: Any) -> Any:
    return {"u": np.tanh(a @ b), "v": [np.sum(a * a, axis=0), b[0] * 3.0]}


A, B = np.random.default_rng(1).normal(size=(2, 3, 3))


def flat(nest: Any) -> Array:
    from chainrule.graph.tree import flatten

    return np.concatenate([np.ravel(leaf) for leaf in flatten(nest)[0]])


def full_jacobian() -> Array:
    """∂(all results)/∂(all arguments) by central differences."""
    columns = []
    for i, x in enumerate((A, B)):
        for place in np.ndindex(*x.shape):
            up, down = [A.copy(), B.copy()], [A.copy(), B.copy()]
            up[i][place] += 1e-6
            down[i][place] -= 1e-6
            columns.append((flat(two(*up)) - flat(two(*down))) / 2e-6)
    return np.stack(columns, axis=1)


def test_vjp_jvp_and_jacobian_are_one_matrix() -> None:
    J = full_jacobian()
    random = np.random.default_rng(2)
    jacobian = cr.jacobian(two, (0, 1))(A, B)
    parts = [np.concatenate([np.reshape(d, (-1, 9)) for d in row], axis=1) for row in (jacobian["u"], *jacobian["v"])]
    np.testing.assert_allclose(np.concatenate(parts), J, atol=1e-8)
    value, pull = cr.vjp(two, A, B)
    g = {"u": random.normal(size=(3, 3)), "v": [random.normal(size=3), random.normal(size=3)]}
    np.testing.assert_allclose(flat(value), flat(two(A, B)), rtol=1e-14)
    np.testing.assert_allclose(flat(pull(g)), flat(g) @ J, atol=1e-7)
    tangents = random.normal(size=(2, 3, 3))
    value, d = cr.jvp(two, (A, B), tuple(tangents))
    np.testing.assert_allclose(flat(value), flat(two(A, B)), rtol=1e-14)
    np.testing.assert_allclose(flat(d), J @ tangents.ravel(), atol=1e-7)
    np.testing.assert_allclose(flat(g) @ flat(d), flat(pull(g)) @ tangents.ravel(), rtol=1e-12)


def energy(x: Any) -> Any:
    return np.sum(np.sin(x) * np.exp(x @ A)) + np.prod(x)


X3 = np.array([0.3, -0.7, 1.1])


def test_hessians_every_way() -> None:
    H = cr.jacobian(cr.grad(energy))(X3)
    np.testing.assert_allclose(H, H.T, rtol=1e-12)
    for i in range(3):
        e = np.eye(3)[i]
        np.testing.assert_allclose(H[i], central(lambda x, e=e: float(cr.grad(energy)(x) @ e), [X3], 0), rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(cr.hvp(energy, X3, e), H[i], rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(cr.jvp(cr.grad(energy), [X3], [e])[1], H[i], rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(cr.grad(lambda x, e=e: cr.jvp(energy, [x], [e])[1])(X3), H[i], rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(cr.vjp(cr.grad(energy), X3)[1](e)[0], H[i], rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(cr.jacobian(lambda x: cr.jacobian(energy)(x))(X3), H, rtol=1e-12, atol=1e-14)
    for f in (lambda x: cr.jacobian(cr.grad(energy))(x), lambda x: cr.jacobian(cr.jacobian(energy))(x)):
        np.testing.assert_allclose(cr.compile(f)(X3), H, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(cr.compile(lambda x, v: cr.hvp(energy, x, v))(X3, X3), H @ X3, rtol=1e-12)
    third = cr.jacobian(cr.jacobian(cr.grad(energy)))(X3)
    for order in ((1, 0, 2), (2, 1, 0)):
        np.testing.assert_allclose(third, np.transpose(third, order), rtol=1e-11, atol=1e-13)
    g = cr.grad(lambda x: np.sum(cr.hvp(energy, x, X3) * X3))(X3)
    np.testing.assert_allclose(g, np.einsum("ijk,i,j->k", third, X3, X3), rtol=1e-11)


def test_transforms_inside_loops_and_each_other() -> None:
    def step(x: Any, v: Any) -> Any:
        value, d = cr.jvp(np.tanh, [x], [v])
        _, pull = cr.vjp(np.sin, value)
        return value, pull(d)[0]

    def total(x: Any) -> Any:
        h, ys = cr.scan(step, x, np.array([[1.0, 2.0, 3.0], [0.5, 0.1, -0.2]]))
        return np.sum(h * h) + np.sum(ys)

    check(total, X3)
    got = cr.compile(cr.value_and_grad(total))(X3)
    for a, b in zip(got, cr.value_and_grad(total)(X3), strict=True):
        np.testing.assert_array_equal(a, b)


def test_value_and_grad_of_nests_and_several_arguments() -> None:
    f = lambda p, c, n: np.sum(p["w"] ** n) * c
    value, (gp, gc) = cr.value_and_grad(f, (0, 1))({"w": np.array([1.0, 2.0])}, 3.0, 2)
    assert (float(value), gp["w"].tolist(), float(gc)) == (15.0, [6.0, 12.0], 5.0)
    assert cr.grad(f, -2)({"w": np.array([1.0, 2.0])}, 3.0, 2) == 5.0
    assert cr.grad(f, (1,))({"w": np.array([1.0, 2.0])}, 3.0, 2) == (5.0,)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: cr.grad(lambda x: x * 2)(np.ones(3)), ShapeError, r"one floating-point number.*float64\[3\]"),
        (lambda: cr.grad(lambda x: (x, x))(1.0), ShapeError, "one floating-point number"),
        (lambda: cr.grad(lambda x: None)(1.0), ShapeError, "one floating-point number"),
        (lambda: cr.grad(lambda x: np.argmax(x))(np.ones(3)), ShapeError, "int64"),
        (lambda: cr.grad(lambda x: x * 1.0)(np.array(3)), DtypeError, "no derivative"),
        (lambda: cr.grad(lambda x, n: x, 1)(1.0, 2), DtypeError, "argnums"),
        (lambda: cr.grad(lambda x: x, 3)(1.0), UsageError, "argnums=3"),
        (lambda: cr.jacobian(lambda x: np.argmax(x))(np.ones(3)), DtypeError, "int64"),
        (lambda: cr.vjp(lambda x: x, np.ones(3))[1](np.ones(2)), ShapeError, r"\(3,\).*\(2,\)"),
        (lambda: cr.vjp(lambda x: (x, x), np.ones(3))[1](np.ones(3)), ShapeError, "tuple"),
        (lambda: cr.jvp(lambda x: x, [np.ones(3)], [np.ones(2)]), ShapeError, r"\(2,\).*\(3,\)"),
        (lambda: cr.jvp(lambda x: x, [np.ones(3)], [np.ones(3), 1.0]), UsageError, "nests"),
        (lambda: cr.check_gradients(lambda n: n * 2, 3), UsageError, "floating-point"),
        (lambda: cr.check_gradients(np.log, -1.0), DataError, "not finite"),
    ],
)
def test_what_cannot_be_differentiated(call: Callable[[], Any], error: type[ChainruleError], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# ---- the checker -------------------------------------------------------------------------------------------------------------


@contextmanager
def declared(name: str, **changes: Any) -> Iterator[None]:
    """An operator with a changed declaration, for a while."""
    kept = OPS[name]
    OPS._things[name] = dataclasses.replace(kept, **changes)
    try:
        yield
    finally:
        OPS._things[name] = kept


def off_by(factor: float, name: str, at: int) -> Any:
    """The derivative of an operator with its rule for argument `at` wrong by a factor."""
    rules = OPS[name].derivative
    if isinstance(rules, tuple):
        return tuple(
            (lambda *a, rule=rule, **k: rule(*a, **k) * factor) if i == at and rule is not None else rule
            for i, rule in enumerate(rules)
        )
    return lambda need, *a, **k: [d if d is None or i != at else d * factor for i, d in enumerate(rules(need, *a, **k))]


def _wrong_rules() -> list[Any]:
    cases = []
    for name, op in OPS.items():
        if not op.smooth:
            continue
        arrays, attrs = next(iter(op.examples(np.random.default_rng(0))), ([], {}))
        for at, a in enumerate(arrays):
            if np.asarray(a).dtype.kind == "f":
                cases.append(pytest.param(name, [np.asarray(x) for x in arrays], attrs, at, id=f"{name}-{at}"))
    return cases


@pytest.mark.parametrize(("name", "arrays", "attrs", "at"), _wrong_rules())
def test_check_gradients_catches_a_rule_wrong_by_a_thousandth(name: str, arrays: list[Array], attrs: Any, at: int) -> None:
    graph = build(lambda *xs: apply_many(name, xs, **attrs), [type_of(a) for a in arrays])
    wrt = [i for i, a in enumerate(arrays) if a.dtype.kind == "f"]
    names = [f"argument {i}" for i in wrt]
    assert check_graph(graph, list(arrays), wrt, names).ok
    with declared(name, derivative=off_by(1.001, name, at)), pytest.raises(GradientMismatch) as caught:
        check_graph(graph, list(arrays), wrt, names)
    wrong = [c.name for c in caught.value.report.comparisons if c.error > 1e-6]  # type: ignore[attr-defined]
    assert wrong == [f"argument {at}"]
    assert f"argument {at}" in str(caught.value)


def test_check_gradients_catches_a_custom_gradient_in_a_deep_function() -> None:
    def network(factor: float) -> Callable[..., Any]:
        act = cr.custom_gradient(lambda x: (np.tanh(x), lambda g: factor * g * (1 - np.tanh(x) ** 2)))
        return lambda w, x: np.mean((act(act(x @ w["a"]) @ w["b"]) - 0.5) ** 2)

    random = np.random.default_rng(4)
    w, x = {"a": random.normal(size=(3, 4)), "b": random.normal(size=(4, 2))}, random.normal(size=(5, 3))
    report = cr.check_gradients(network(1.0), w, x)
    assert report.ok
    assert [c.name for c in report.comparisons] == ["0.a", "0.b", "1"]
    assert [c.checked for c in report.comparisons] == [12, 8, 15]
    assert report.error < 1e-6
    with pytest.raises(GradientMismatch) as caught:
        cr.check_gradients(network(1.001), w, x)
    assert {c.name for c in caught.value.report.comparisons if c.error > 1e-6} == {"0.a", "0.b", "1"}  # type: ignore[attr-defined]
    assert isinstance(caught.value, AssertionError)


def test_check_gradients_catches_a_gradient_of_zero_and_of_nan() -> None:
    for pull in (lambda g: 0.0 * g, lambda g: g * np.nan):
        with pytest.raises(GradientMismatch):
            cr.check_gradients(cr.custom_gradient(lambda x, pull=pull: (x * 2, pull)), np.ones(2))
    with pytest.raises(GradientMismatch):  # also where the function is flat
        cr.check_gradients(cr.custom_gradient(lambda x: (x * 0, lambda g: g * 0.01)), np.ones(2))


def test_check_gradients_counts_kinks_and_leaves_them_out() -> None:
    x = np.array([0.0, 1.0, -2.0, 0.0])
    for f in (cr.relu, np.abs, lambda x: np.maximum(x, 0.0), lambda x: np.clip(x, 0.0, 5.0)):
        report = cr.check_gradients(f, x)
        (c,) = report.comparisons
        assert (c.checked, c.kinks) == (2, 2)
        assert "kinks" in str(report)
    wrong = cr.custom_gradient(lambda x: (np.abs(x), lambda g: g * 3.0))  # 3 is no slope of |x|, on neither side of 0
    with pytest.raises(GradientMismatch):
        cr.check_gradients(wrong, np.array([0.0]))
    noisy = cr.check_gradients(lambda x: np.sum(cr.relu(x) * np.array([0.3, 0.7, 1.1])) + 1 / 3, np.array([0.0, 0.0, 0.0]))
    assert noisy.comparisons[0].kinks == 3  # one-sided differences carry rounding
    ties = cr.check_gradients(np.max, np.array([1.0, 1.0, 0.5]))
    assert (ties.comparisons[0].checked, ties.comparisons[0].kinks) == (1, 2)


def test_check_gradients_is_always_double_and_leaves_its_arguments_alone() -> None:
    x = np.linspace(0.1, 1, 5, dtype=np.float32)
    kept = x.copy()
    assert cr.check_gradients(lambda x: np.sum(np.exp(x)), x).error < 1e-7
    np.testing.assert_array_equal(x, kept)
    assert x.dtype == np.float32
    report = cr.check_gradients(lambda x, n: x**n, np.full((30, 30), 1.5), 3, most=50)
    assert report.comparisons[0].checked == 50
    assert cr.check_gradients(lambda a, b: a * b, 2.0, 3.0, argnums=1).comparisons[0].name == "1"
    again = cr.check_gradients(lambda x: np.sum(x * x), np.ones(500), most=10, seed=3)
    assert str(again) == str(cr.check_gradients(lambda x: np.sum(x * x), np.ones(500), most=10, seed=3))


def test_a_textbook_network_by_hand() -> None:
    """A 3-2-1 logistic network, squared error halved: δ of the output (a - y) a (1 - a), δ of the hidden layer by its weights."""
    x, y = np.array([1.0, 0.0, 1.0]), 1.0
    w1 = np.array([[0.2, -0.3], [0.4, 0.1], [-0.5, 0.2]])
    b1, w2, b2 = np.array([-0.4, 0.2]), np.array([-0.3, -0.2]), 0.1
    logistic = lambda z: 1 / (1 + np.exp(-z))

    def loss(w1: Any, b1: Any, w2: Any, b2: Any) -> Any:
        return 0.5 * (y - logistic(logistic(x @ w1 + b1) @ w2 + b2)) ** 2

    hidden = [1 / (1 + math.exp(0.7)), 1 / (1 + math.exp(-0.1))]
    out = 1 / (1 + math.exp(-(-0.3 * hidden[0] - 0.2 * hidden[1] + 0.1)))
    assert (round(hidden[0], 3), round(hidden[1], 3), round(out, 3)) == (0.332, 0.525, 0.474)  # as printed in the book
    delta = (out - y) * out * (1 - out)
    deltas = [h * (1 - h) * delta * w for h, w in zip(hidden, w2, strict=True)]
    g1, gb1, g2, gb2 = cr.grad(loss, (0, 1, 2, 3))(w1, b1, w2, b2)
    np.testing.assert_allclose(g2, [delta * h for h in hidden], rtol=1e-12)
    np.testing.assert_allclose(gb2, delta, rtol=1e-12)
    np.testing.assert_allclose(gb1, deltas, rtol=1e-12)
    np.testing.assert_allclose(g1, np.outer(x, deltas), rtol=1e-12)
    new = [w - 0.9 * g for w, g in zip((w1, b1, w2, b2), (g1, gb1, g2, gb2), strict=True)]
    np.testing.assert_allclose(new[2], [-0.261, -0.138], atol=5e-4)  # Han & Kamber, "Data Mining", 2nd ed., table 6.5
    np.testing.assert_allclose(new[3], 0.218, atol=5e-4)
    np.testing.assert_allclose(new[0], [[0.192, -0.306], [0.4, 0.1], [-0.508, 0.194]], atol=5e-4)
    np.testing.assert_allclose(new[1], [-0.408, 0.194], atol=5e-4)
