"""Central differences: the oracle that the tests of derivatives share. It knows nothing of graphs;
`check` alone asks chainrule, for the derivatives that are compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import chainrule as cr

Array = np.ndarray
EPSILON = 1e-6


def central(f: Callable[..., float], arrays: Sequence[Any], at: int, eps: float = EPSILON) -> Array:
    """∂f/∂arrays[at] by (f(x + ε) - f(x - ε)) / 2ε, one element at a time. The arrays that are passed stay as they are."""
    moved = [np.array(a, np.float64) if i == at else a for i, a in enumerate(arrays)]
    x = moved[at]
    gradient = np.empty(x.shape)
    for place in np.ndindex(*x.shape):
        kept = x[place]
        x[place] = kept + eps
        above = f(*moved)
        x[place] = kept - eps
        below = f(*moved)
        x[place] = kept
        gradient[place] = (above - below) / (2 * eps)
    return gradient


def assert_gradient(f: Callable[..., float], arrays: Sequence[Any], at: int, gradient: Any, rel: float = 1e-6) -> None:
    """`gradient` is that of `f` by arrays[at]: each element within `rel`, beside what rounding of f leaves of a difference."""
    rounding = 1e-8 * max(1.0, abs(f(*arrays)))
    gradient = np.asarray(gradient)
    assert gradient.shape == np.shape(arrays[at])
    np.testing.assert_allclose(gradient, central(f, arrays, at), rtol=rel, atol=rounding)


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


def floats(arrays: Sequence[Any]) -> list[int]:
    """Positions of the floating-point arrays: those that have a derivative."""
    return [i for i, a in enumerate(arrays) if np.asarray(a).dtype.kind == "f"]
