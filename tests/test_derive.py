"""The chain rule: what is summed, what is kept apart, every recorded function, loops."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from differences import check
from expressions import function, listed
from tracing import trace_function

import chainrule as cr
from chainrule.derive.backward import backward
from chainrule.graph.interpret import evaluate
from chainrule.graph.trace import FUNCTIONS
from chainrule.graph.verify import verify
from chainrule.normalize import normalize

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
