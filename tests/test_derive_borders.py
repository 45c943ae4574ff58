"""Derivatives at the borders: where, numbers that are not finite, gradients that are exactly zero, kinks and ties."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from differences import check

import chainrule as cr

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
        (cr.gelu, np.inf, 1.0),
        (cr.gelu, -np.inf, 0.0),
        (lambda x: cr.gelu(x) * 0.0, np.inf, 0.0),
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
