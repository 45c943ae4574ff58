"""Strong products made as plain ones, in the hope that none is NaN (hope.py): the same bits as without hope, wherever NaN appears."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from native import assert_bits, backend_of
from test_compiler import compiled

import chainrule as cr
from chainrule.compiler.hope import PLAIN, SPREADS
from chainrule.compiler.target import runnable
from chainrule.graph.interpret import evaluate
from chainrule.graph.node import Type
from chainrule.graph.trace import apply, build
from chainrule.normalize import normalize
from chainrule.ops.elementwise import strong_divide, strong_multiply

Array = np.ndarray[Any, np.dtype[Any]]
VALUES = [0.0, -0.0, 1.0, -3.0, np.inf, -np.inf, np.nan, 1e-42]


def chain(a: Any, b: Any, c: Any) -> Any:
    """Products of products, one of them stored, and one that `where` drops."""
    first = strong_multiply(a, b)
    second = strong_divide(strong_multiply(first, c) - a, c)
    return [first, second + a, np.where(b > 0, first, c) + strong_multiply(b, c)]


def one(a: Any, b: Any, c: Any) -> Any:
    return [strong_multiply(a + c, b)]


def decided(a: Any, b: Any, c: Any) -> Any:
    """What is chosen hangs on a strong product: NaN would not show."""
    return [np.where(strong_multiply(a, b) >= 0, c, -c)]


def summed(a: Any, b: Any, c: Any) -> Any:
    return [np.sum(strong_multiply(a, b)) + c]


def lost(a: Any, b: Any, c: Any) -> Any:
    """NaN to the power of 0 is 1."""
    return [np.power(strong_multiply(a, b), c)]


HOPEFUL: dict[Callable[..., Any], bool] = {chain: True, one: True, decided: False, summed: False, lost: False}


@pytest.mark.parametrize("f", HOPEFUL, ids=lambda f: f.__name__)
def test_hope_where_nan_would_show(f: Callable[..., Any]) -> None:
    shapes = dict.fromkeys("abc", (40,))
    text = compiled(f, shapes, [f"out{i}" for i in range(3 if f is chain else 1)]).stage("loops")
    assert ("if NaN is in" in text) is HOPEFUL[f]


@pytest.mark.parametrize("width", runnable())
@pytest.mark.parametrize("f", [chain, one, decided], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bits_are_those_of_strong_products(f: Callable[..., Any], width: str, dtype: Any) -> None:
    """All triples of special values, in an order in which each vector has some; and of harmless ones."""
    a, b, c = (x.reshape(-1).astype(dtype) for x in np.meshgrid(VALUES, VALUES, VALUES))
    shuffled = np.random.default_rng(0).permutation(len(a))[: len(a) - 3]
    harmless = np.random.default_rng(1).normal(size=(3, 37)).astype(dtype)
    for arrays in ([x[shuffled] for x in (a, b, c)], [x[:1] for x in (a, b, c)], list(harmless)):
        graph = normalize(build(f, [Type(x.shape, x.dtype) for x in arrays]))
        with np.errstate(all="ignore"):
            want = evaluate(graph, arrays)
        assert_bits(backend_of(width, 1).function(graph)(arrays), want, f.__name__)


@pytest.mark.parametrize("op", sorted(SPREADS - {"where"}))
def test_nan_spreads_through_all_that_are_said_to_spread_it(op: str) -> None:
    """Each is asked for by name, as it is in the list; on each argument."""
    count = 2 if op in {"add", "subtract", "multiply", "divide", "maximum", "minimum", *PLAIN} else 1
    for at in range(count):
        arrays = [np.linspace(0.5, 0.9, 19, dtype=np.float32) for _ in range(count)]
        arrays[at][7] = np.nan

        def f(*given: Any) -> Any:
            return [apply(op, *given)]

        graph = normalize(build(f, [Type(x.shape, x.dtype) for x in arrays]))
        (got,) = backend_of(None, 1).function(graph)(arrays)
        assert list(np.flatnonzero(np.isnan(got))) == [7], op


@pytest.mark.parametrize("width", runnable())
def test_zero_wins_in_a_loop(width: str) -> None:
    """Of the steps of a recurrence some are infinite, and nobody looks at them: their gradient is 0."""

    def loss(w: Any, x: Any) -> Any:
        def step(h: Any, t: Any) -> Any:
            new = np.where(np.abs(t) < 10, np.tanh(h * w + t), h)
            return new, np.where(np.abs(t) < 10, np.exp(t) * new, 0.0)

        last, ys = cr.scan(step, np.zeros_like(x[0]), x)
        return np.sum(last) + np.sum(ys)

    x = np.random.default_rng(2).normal(size=(6, 21)).astype(np.float32)
    x[2, 3], x[4, 20], x[5, 0] = np.inf, 1e30, -np.inf
    w = np.linspace(-1, 1, 21, dtype=np.float32)
    graph = normalize(build(cr.grad(loss, (0, 1)), [Type(w.shape, w.dtype), Type(x.shape, x.dtype)]))
    with np.errstate(all="ignore"):
        want = evaluate(graph, [w, x])
    got = backend_of(width, 1).function(graph)([w, x])
    for g, r in zip(got, want, strict=True):
        assert np.isfinite(g).all()
        np.testing.assert_allclose(g, r, rtol=1e-5, atol=1e-6)
