"""What native code promises, on networks that nobody measured: layers written by hand, odd widths, batches that leave a rest.

The layers here are as a user would write them; several mix the rows of a batch, so a last short batch must be computed as such.
"""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np
import pytest

import chainrule as cr
from chainrule import nn
from chainrule.run.backend import backends

Array = np.ndarray
ROWS, FEATURES, BATCH = 13, 5, 5  # the last batch has 3 rows
FAST_MATH = re.compile(r"\b(fast|nnan|ninf|nsz|arcp|reassoc|afn)\b")


class Layer(nn.Module):
    """A function (layer, x) as a layer."""

    def __init__(self, function: Callable[[Any, Any], Any]) -> None:
        self.function = function

    def __call__(self, x: Any) -> Any:
        return self.function(self, x)


def gated(s: Any, x: Any) -> Any:
    shape = (x.shape[1], 7)
    return (x @ s.parameter("a", shape)) * cr.sigmoid(x @ s.parameter("b", shape))


def tied(s: Any, x: Any) -> Any:
    w = s.parameter("w", (x.shape[1], 3))
    return np.tanh(x @ w) @ w.T


def pairs(s: Any, x: Any) -> Any:
    w = s.parameter("w", (x.shape[1], 5))
    return (x @ w) ** 2 - (x**2) @ (w**2)


def distances(s: Any, x: Any) -> Any:
    centre = s.parameter("c", (11, x.shape[1]), "normal")
    return np.exp(-np.sum((x[:, None, :] - centre) ** 2, axis=2))


def maxout(s: Any, x: Any) -> Any:
    return np.max(np.einsum("bi,ijk->bjk", x, s.parameter("w", (x.shape[1], 4, 3))), axis=2)


def experts(s: Any, x: Any) -> Any:
    gate = cr.softmax(x @ s.parameter("g", (x.shape[1], 3)), axis=-1)
    return np.einsum("bi,eij,be->bj", x, s.parameter("w", (3, x.shape[1], 5)), gate)


def attention(s: Any, x: Any) -> Any:
    x = x[:, :, None]
    q, k, v = (x @ s.parameter(n, (1, 4)) for n in "qkv")
    return np.reshape(cr.softmax(q @ np.swapaxes(k, 1, 2) / 2.0, axis=-1) @ v, (x.shape[0], -1))


def whitened(s: Any, x: Any) -> Any:
    centred = x - x.mean(axis=0)
    return centred / np.sqrt(np.mean(centred**2, axis=0) + 0.1) * s.parameter("scale", (x.shape[1],), "ones")


def rows_with_rows(s: Any, x: Any) -> Any:
    return np.tanh(x @ x.T) @ (x @ s.parameter("w", (x.shape[1], 2))) / x.shape[0]


def largest_row(s: Any, x: Any) -> Any:
    return x * np.max(x, axis=0) + np.min(x, axis=0)


def turned(s: Any, x: Any) -> Any:
    return np.concatenate([x[:, ::-1], x[:, ::2] * s.parameter("k", (), 0.5), x[::-1]], axis=1)


def normed(s: Any, x: Any) -> Any:
    w = s.parameter("w", (x.shape[1], 6), "normal")
    return x @ (w / np.sqrt(np.sum(w * w, axis=0))) * s.parameter("scale", (6,), "ones")


def learnt_power(s: Any, x: Any) -> Any:
    return (np.abs(x) + 0.5) ** s.parameter("p", (x.shape[1],), 1.3)


def table(s: Any, x: Any) -> Any:
    return cr.lookup(s.parameter("t", (2, 3), "normal"), (x[:, 0] > 0).astype(np.int32))


def prefixes(s: Any, x: Any) -> Any:
    return np.cumsum(x * s.parameter("c", (x.shape[1],), 0.5), axis=1)


def again(s: Any, x: Any) -> Any:
    w = s.parameter("w", (x.shape[1], x.shape[1]))
    for _ in range(4):
        x = np.tanh(x @ w) + x
    return x


def loop(s: Any, x: Any) -> Any:
    w = s.parameter("w", (x.shape[1], x.shape[1]))
    last, sums = cr.scan(lambda h, _: (np.tanh(h @ w) + 0.1 * x, np.sum(h, axis=1)), x, np.arange(5))
    return np.concatenate([last, sums.T], axis=1)


LAYERS = [gated, tied, pairs, distances, maxout, experts, attention, whitened, rows_with_rows, largest_row, turned, normed,
          learnt_power, table, prefixes, again, loop]  # fmt: skip
MIXING = [whitened, rows_with_rows, largest_row, turned]


def network(*functions: Callable[[Any, Any], Any]) -> nn.Sequential:
    return nn.Sequential(nn.Dense(5, "tanh"), *(Layer(f) for f in functions), nn.Dense(2))


def data(rows: int = ROWS) -> tuple[Array, Array]:
    random = np.random.default_rng(0)
    return random.normal(size=(rows, FEATURES)), random.normal(size=(rows, 2))


def fitted(net: nn.Module, **options: Any) -> cr.Run:
    defaults = {"loss": "mse", "optimizer": cr.SGD(0.01, momentum=0.9), "epochs": 2, "batch_size": BATCH, "verbose": False}
    return net.fit(*data(), **{**defaults, **options})


def bits(net: nn.Module) -> bytes:
    return b"".join(v.tobytes() for v in net.parameters.values())


def error(found: dict[str, Array], exact: dict[str, Array]) -> float:
    """The largest error, as a share of the largest gradient."""
    scale = max(float(np.max(np.abs(v))) for v in exact.values())
    return max(float(np.max(np.abs(found[n] - v))) for n, v in exact.items()) / scale


# ---- networks ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", LAYERS, ids=lambda f: f.__name__)
def test_a_layer_written_by_hand(function: Callable[[Any, Any], Any]) -> None:
    net, (x, y) = network(function), data()
    net.fit(x, y, epochs=0, loss="mse")
    exact = net.gradients(x, y, dtype="float64", backend="reference")
    assert error(net.gradients(x, y), exact) <= max(4 * error(net.gradients(x, y, backend="reference"), exact), 1e-6)
    assert error(net.gradients(x, y, dtype="float64"), exact) < 1e-14
    by_reference = fitted(network(function), backend="reference")
    one = network(function)
    run = fitted(one, threads=1)
    assert run.loss == pytest.approx(by_reference.loss, rel=1e-5)
    assert not FAST_MATH.search(one.compiled.text("llvm"))
    for threads in (2, 3, 4):
        several = network(function)
        assert fitted(several, threads=threads).loss == run.loss
        assert bits(several) == bits(one), threads


WIDTHS = {
    "one": (1, 1, 2),
    "narrow and wide": (3, 100, 3, 257, 1, 2),
    "a rest of everything": (257, 100, 2),
    "deep": (*(4,) * 20, 2),
}


@pytest.mark.parametrize("batch", [1, 7, 100], ids="batch {}".format)
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
def test_odd_widths_and_batches(widths: tuple[int, ...], batch: int) -> None:
    def net() -> nn.Sequential:
        return nn.Sequential(*(nn.Dense(w, "softplus" if w > 4 else "tanh") for w in widths[:-1]), nn.Dense(widths[-1]))

    one, several = net(), net()
    run = fitted(one, batch_size=batch, threads=1)
    assert run.loss == pytest.approx(fitted(net(), batch_size=batch, backend="reference").loss, rel=1e-5)
    assert fitted(several, batch_size=batch, threads=3).loss == run.loss
    assert bits(several) == bits(one)


@pytest.mark.parametrize("function", MIXING, ids=lambda f: f.__name__)
def test_a_short_batch_of_rows_that_are_mixed_is_exact(function: Callable[[Any, Any], Any]) -> None:
    """Each step of SGD by hand, from the gradients of its own rows."""
    x, y = data()
    net, by_hand = network(function), network(function)
    fitted(net, optimizer=cr.SGD(0.05), epochs=1, shuffle=False, dtype="float64")
    by_hand.fit(x, y, epochs=0, loss="mse", dtype="float64")
    weights = by_hand.parameters
    for first in range(0, ROWS, BATCH):
        rows = slice(first, first + BATCH)
        by_hand.load_parameters(weights)
        gradients = by_hand.gradients(x[rows], y[rows], backend="reference")
        weights = {n: w - 0.05 * gradients[n] for n, w in weights.items()}
    for n, w in net.parameters.items():
        np.testing.assert_allclose(w, weights[n], rtol=1e-11, atol=1e-13)


def test_threads_and_backend_may_change_between_calls() -> None:
    def net() -> nn.Sequential:
        return nn.Sequential(nn.Dense(33, "relu"), nn.Dropout(0.3), nn.Dense(2))

    whole, parts = net(), net()
    fitted(whole, epochs=4, threads=1)
    for threads in (1, 3, None, 2):
        fitted(parts, epochs=1, threads=threads)
    assert bits(parts) == bits(whole)
    fitted(whole, epochs=1, backend="reference")
    fitted(whole, epochs=1)
    fitted(parts, epochs=2)
    for n, w in parts.parameters.items():
        np.testing.assert_allclose(whole.parameters[n], w, rtol=1e-4, atol=1e-6)


class Swapped(nn.Module):
    """Two statistics that change places in each step: none may be written before both have been read."""

    def __call__(self, x: Any) -> Any:
        a, b = self.statistic("a", (FEATURES,), 1.0), self.statistic("b", (FEATURES,), 2.0)
        self.update("a", b)
        self.update("b", a + np.mean(x, axis=0))
        return x * a + b


@pytest.mark.parametrize("threads", [1, 3])
def test_a_state_is_read_before_any_of_it_is_written(threads: int) -> None:
    layer = Swapped()
    fitted(nn.Sequential(layer, nn.Dense(2)), epochs=1, shuffle=False, threads=threads, dtype="float64")
    a, b = np.full(FEATURES, 1.0), np.full(FEATURES, 2.0)
    for first in range(0, ROWS, BATCH):
        a, b = b, a + data()[0][first : first + BATCH].mean(axis=0)
    np.testing.assert_allclose(layer._values["a"], a, rtol=1e-14)
    np.testing.assert_allclose(layer._values["b"], b, rtol=1e-14)


def test_nothing_is_given_to_the_reference_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> Any:
        raise AssertionError("the reference backend was asked")

    for method in ("session", "function"):
        monkeypatch.setattr(type(backends["reference"]), method, refuse)
    net = network(*MIXING, table, loop)
    fitted(net, validation=0.3, metrics=["rmse", "r2"], loss=lambda scores, target: np.abs(scores - target) ** 1.5)
    net.predict(data()[0])
    net.evaluate(*data())
    net.gradients(*data(), dtype="float64")
    cr.grad(lambda v: np.sum(np.hypot(v, v[::-1]) + np.cumsum(np.sinh(v))))(np.ones(3))
    cr.compile(lambda v: np.round(np.cbrt(v)) // 2.0)(np.ones(3))


# ---- what may happen in the middle of a run ----------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_fork_while_another_thread_trains() -> None:
    plain = network(gated)
    fitted(plain, threads=3)
    begun, enough = threading.Event(), threading.Event()

    def look(run: cr.Run) -> None:
        begun.set()
        if enough.is_set():
            run.stop()

    other = threading.Thread(target=lambda: fitted(network(experts), threads=3, epochs=10**9, callbacks=[look]))
    other.start()
    try:
        assert begun.wait(30)
        for _ in range(3):
            child = os.fork()
            if child == 0:
                signal.alarm(30)  # a child that hangs is a failed test
                net = network(gated)
                fitted(net, threads=3)
                os._exit(0 if bits(net) == bits(plain) else 1)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        enough.set()
        other.join(30)
    assert not other.is_alive()


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_exception_in_a_handler_of_another_signal() -> None:
    """Where a signal happens to arrive inside a finaliser, Python drops the exception with a warning: another one follows."""

    class Expired(Exception):
        pass

    def expire(*_: Any) -> None:
        raise Expired

    net = network(gated)
    fitted(net, epochs=1)
    before = signal.signal(signal.SIGALRM, expire)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2, 0.5)
        with pytest.raises(Expired):
            fitted(net, epochs=10**7, threads=2)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert np.isfinite(net.predict(data()[0])).all()
    assert fitted(net).steps == 6


# ---- numbers -----------------------------------------------------------------------------------------------------------------


def _cube_root(x: Any) -> Any:
    return mpmath.sign(x) * mpmath.cbrt(abs(x))


EXACT: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any], float, float]] = {
    "sigmoid": (cr.sigmoid, lambda x: 1 / (1 + mpmath.exp(-x)), -80, 80),
    "softplus": (cr.softplus, lambda x: mpmath.log1p(mpmath.exp(x)), -80, 80),
    "exp2": (np.exp2, lambda x: mpmath.mpf(2) ** x, -120, 120),
    "log2": (np.log2, lambda x: mpmath.log(x, 2), 0, 1e6),
    "tan": (np.tan, mpmath.tan, -40, 40),
    "sinh": (np.sinh, mpmath.sinh, -89.4, 89.4),
    "cosh": (np.cosh, mpmath.cosh, -89.4, 89.4),
    "arcsin": (np.arcsin, mpmath.asin, -1, 1),
    "arccos": (np.arccos, mpmath.acos, -1, 1),
    "arcsinh": (np.arcsinh, mpmath.asinh, -1e6, 1e6),
    "arccosh": (np.arccosh, mpmath.acosh, 1, 1e6),
    "arctanh": (np.arctanh, mpmath.atanh, -1, 1),
    "cbrt": (np.cbrt, _cube_root, -3e38, 3e38),
}


@pytest.mark.parametrize(("dtype", "bound"), [(np.float32, 4.0), (np.float64, 2.0)], ids=["float32", "float64"])
@pytest.mark.parametrize("name", EXACT)
def test_functions_that_are_combinations_against_mpmath(name: str, dtype: Any, bound: float) -> None:
    function, exact, low, high = EXACT[name]
    random = np.random.default_rng(0)
    near = np.concatenate([low + random.random(40) * 1e-3, high - random.random(40) * 1e-3])
    x = np.concatenate([random.uniform(low, high, 150), random.normal(size=80), near, 2.0 ** random.uniform(-30, 5, 40)])
    x = x.astype(dtype)
    x = x[(x > low) & (x < high)]
    found = cr.compile(lambda v: function(v))(x)
    assert found.dtype == dtype
    with mpmath.workprec(160):
        for a, y in zip(x, found, strict=True):
            true = exact(mpmath.mpf(float(a)))
            ulp = mpmath.mpf(float(np.spacing(np.abs(dtype(float(true))))))
            assert abs(mpmath.mpf(float(y)) - true) <= bound * ulp, (a, y, true)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "name", ["sinh", "cosh", "tan", "arcsin", "arccos", "arcsinh", "arctanh", "cbrt", "exp2", "log2", "rint"]
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_special_values_of_combinations(name: str, dtype: Any) -> None:
    function = getattr(np, name)
    tiny, largest = np.finfo(dtype).smallest_subnormal, np.finfo(dtype).max
    x = np.array([0.0, -0.0, 1, -1, 0.5, -0.5, np.inf, -np.inf, np.nan, tiny, -tiny, largest, -largest], dtype)
    if name == "tan":
        x = x[np.abs(x) < 2]  # NumPy's own is off at the largest numbers on some platforms
    found, expected = cr.compile(lambda v: function(v))(x), function(x)
    np.testing.assert_allclose(found, expected, rtol=4 * np.finfo(dtype).eps, atol=0)
    zero = expected == 0
    assert np.array_equal(np.signbit(found[zero]), np.signbit(expected[zero]))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ["hypot", "logaddexp", "floor_divide"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_special_pairs_of_combinations(name: str, dtype: Any) -> None:
    function = getattr(np, name)
    values = [0.0, -0.0, 1, -1, 0.5, -2, np.inf, -np.inf, np.nan, 1e-30, -1e-30, 1e30, -1e30]
    a, b = (v.ravel() for v in np.meshgrid(*[np.array(values, dtype)] * 2))
    found = cr.compile(lambda a, b: function(a, b))(a, b)
    np.testing.assert_allclose(found, function(a, b), rtol=4 * np.finfo(dtype).eps, atol=0)


def test_derivatives_of_combinations_at_their_seams() -> None:
    def second(f: Callable[[Any], Any], x: float) -> float:
        return float(cr.grad(cr.grad(f))(x))

    assert second(lambda x: np.logaddexp(x, 0.0), 0.0) == 0.25
    assert second(lambda x: np.logaddexp(x, -1000.0), 0.0) == 0.0
    assert second(np.cosh, 0.0) == 1.0
    assert second(np.sinh, 0.0) == 0.0
    assert second(np.cosh, 65.0) == pytest.approx(np.cosh(65.0), rel=1e-14)
    assert second(lambda x: np.hypot(x, 3.0), 3.0) == pytest.approx(3.0**2 / 18**1.5, rel=1e-14)
    assert second(np.cbrt, -8.0) == pytest.approx(2 / 9 * 8 ** (-5 / 3), rel=1e-14)
    assert second(np.exp2, 3.0) == pytest.approx(8 * np.log(2) ** 2, rel=1e-14)
    assert second(np.arccos, 0.999) == pytest.approx(-0.999 / (1 - 0.999**2) ** 1.5, rel=1e-12)
    assert [float(g) for g in cr.grad(np.logaddexp, (0, 1))(-np.inf, -np.inf)] == [0.5, 0.5]
    assert [float(g) for g in cr.grad(np.hypot, (0, 1))(3e200, 4e200)] == pytest.approx([0.6, 0.8], rel=1e-15)


LONG: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "all of a line": (lambda a: np.sum(a), (999_983,)),
    "a long axis": (lambda a: np.sum(a, axis=0), (300_000, 3)),
    "a long axis in lanes": (lambda a: np.sum(a, axis=1), (3, 300_000)),
    "both, the long one last": (lambda a: np.sum(a), (3, 300_000)),
    "both, the long one first": (lambda a: np.sum(a), (300_000, 3)),
    "two long ones": (lambda a: np.sum(a), (1000, 1000)),
    "a product": (lambda a: a.T @ a, (300_000, 3)),
    "squares": (lambda a: a.ravel() @ a.ravel(), (3, 300_000)),
    "exponentials": (lambda a: cr.logsumexp(a), (999_983,)),
}


@pytest.mark.parametrize("name", LONG)
def test_long_sums_are_as_exact_as_numpys_best(name: str) -> None:
    """NumPy sums a line pairwise; a sum of n terms one after the other would be off by hundreds of ulp."""
    function, shape = LONG[name]
    a = np.random.default_rng(0).random(shape).astype(np.float32)
    found, exact = cr.compile(function)(a), function(a.astype(np.float64))
    np.testing.assert_allclose(found, exact, rtol=16 * np.finfo(np.float32).eps)
