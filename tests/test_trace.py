"""What is recorded is what NumPy would have computed: values, shapes and types, over every recorded function and every kind of index."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from expressions import function, listed
from tracing import trace_function

import chainrule as cr
from chainrule.errors import ChainruleError
from chainrule.graph import tree as trees
from chainrule.graph.interpret import evaluate
from chainrule.graph.trace import FUNCTIONS, METHODS
from chainrule.graph.verify import verify
from chainrule.normalize import normalize

Array = np.ndarray


def assert_like_numpy(f: Callable[..., Any], *args: Any) -> None:
    """The recorded function gives what the function itself gives, by the graph as it is and in normal form."""
    with np.errstate(all="ignore"):
        wanted, structure = trees.flatten(f(*args))
    graph, recorded = trace_function(f, args)
    assert recorded == structure or not isinstance(f(*args), (list, tuple))
    leaves = [np.asarray(leaf) for leaf in trees.flatten(args)[0]]
    for made in (verify(graph), verify(normalize(graph), normal=True)):
        for got, want, node in zip(evaluate(made, leaves), wanted, made.outputs, strict=True):
            got, want = np.asarray(got), np.asarray(want)
            assert (got.shape, got.dtype) == (want.shape, want.dtype) == (node.shape, node.dtype)
            if want.dtype.kind == "f":
                precision = np.finfo(want.dtype).eps
                np.testing.assert_allclose(got, want, rtol=16 * precision, atol=4 * precision)
            else:
                np.testing.assert_array_equal(got, want)


# ---- ufuncs ------------------------------------------------------------------------------------------------------------------

UNARY = [f for f in FUNCTIONS if isinstance(f, np.ufunc) and f.nin == 1]
BINARY = [f for f in FUNCTIONS if isinstance(f, np.ufunc) and f.nin == 2 and f is not np.matmul]
DOMAIN = {np.arcsin: (-1, 1), np.arccos: (-1, 1), np.arctanh: (-0.9, 0.9), np.arccosh: (1, 3), np.log: (0, 3), np.log2: (0, 3),
          np.log10: (0, 3), np.log1p: (-1, 3), np.sqrt: (0, 3)}  # fmt: skip


def sample(dtype: str, low: float = -2.5, high: float = 2.5, size: int = 11) -> Array:
    """Numbers that include the borders and 0, halves, and for whole numbers both signs."""
    if dtype == "bool":
        return np.arange(size) % 3 == 1
    if dtype[0] in "iu":
        return np.arange(size).astype(dtype) - (np.dtype(dtype).type(4) if dtype[0] == "i" else np.dtype(dtype).type(0))
    return np.concatenate([np.linspace(low, high, size - 3), np.clip([0.0, 0.5, 1.0], low, high)]).astype(dtype)


def _refused(f: Callable[..., Any], *args: Any) -> bool:
    """Whether NumPy refuses this call, or answers in a type that chainrule does not know (float16 for small integers)."""
    try:
        with np.errstate(all="ignore"):
            return np.asarray(f(*args)).dtype == np.float16
    except (TypeError, ValueError):
        return True


@pytest.mark.parametrize("dtype", ["f8", "f4", "i8", "i4", "i1", "u1", "bool"])
@pytest.mark.parametrize("ufunc", UNARY, ids=lambda f: f.__name__)
def test_every_function_of_one_array(ufunc: np.ufunc, dtype: str) -> None:
    x = sample(dtype, *DOMAIN.get(ufunc, (-2.5, 2.5)))
    if _refused(ufunc, x) or _not_offered(ufunc, x):
        with pytest.raises(ChainruleError):
            trace_function(ufunc, [x])
        return
    assert_like_numpy(ufunc, x)
    assert_like_numpy(lambda x: ufunc(x), x[3])
    assert_like_numpy(lambda x: ufunc(x), x[:0].reshape(0, 2))


def _not_offered(ufunc: np.ufunc, *args: Any) -> bool:
    """What NumPy computes on whole numbers and chainrule refuses: bits, reciprocals that are 0, powers that might be negative."""
    kind = np.result_type(*args).kind
    if ufunc in (np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.invert):
        return kind in "iu"
    if ufunc is np.power:
        return kind in "biu" and (type(args[1]) is not int or np.asarray(args[0]).dtype == bool)
    return ufunc is np.reciprocal and kind in "biu"


OPERANDS: dict[str, Any] = {
    "f8": np.array([[-1.5], [2.0], [0.75]]),
    "f4": np.array([[-1.25], [2.0], [0.5]], np.float32),
    "i8": np.array([[-3], [2], [5]]),
    "i4": np.array([[-3], [2], [5]], np.int32),
    "i1": np.array([[-3], [2], [5]], np.int8),
    "u1": np.array([[3], [2], [5]], np.uint8),
    "bool": np.array([[True], [False], [True]]),
    "f4 scalar": np.float32(1.75),
    "f8 scalar": np.float64(1.75),
    "i8 scalar": np.int64(2),
    "float": 1.5,
    "int": 2,
    "true": True,
}
PAIRS = [p for p in itertools.product(OPERANDS, OPERANDS) if not set(p) <= {"float", "int", "true"}]


@pytest.mark.parametrize("ufunc", BINARY, ids=lambda f: f.__name__)
def test_every_function_of_two_arrays_in_all_types(ufunc: np.ufunc) -> None:
    for left, right in PAIRS:
        a, b = OPERANDS[left], OPERANDS[right]
        b = np.abs(b).reshape(-1)[::-1].astype(b.dtype) if np.ndim(b) else b  # so that (3, 1) meets (3,)

        # Python's numbers stay outside, as a user writes them; arrays are traced, on either side and on both.
        def whole(*arrays: Any, a: Any = a, b: Any = b) -> Any:
            given = iter(arrays)
            return ufunc(*(x if type(x) in (float, int, bool) else next(given) for x in (a, b)))

        args = [x for x in (a, b) if type(x) not in (float, int, bool)]
        if _refused(whole, *args) or _not_offered(ufunc, a, b):
            try:
                trace_function(whole, args)
            except ChainruleError:
                continue
            pytest.fail(f"{left}, {right}: recorded, but NumPy refuses it or chainrule does not offer it")
        try:
            assert_like_numpy(whole, *args)
        except AssertionError as error:
            raise AssertionError(f"{left}, {right}: {error}") from None


OPERATORS = """
x + 1.5; 1.5 - x; x * 2; 2 / x; -x; +x; abs(x); x // 2; x % 2; 2 // x; x @ x; x + True
x ** 2; x ** 3; x ** 0.5; x ** -1; x ** 1; x ** 1.7; x ** 0; x ** 7; 2.5 ** x
x < 1.0; x <= 1; x > 1.0; x >= 1; x == 2; x != 2; (x > 1) & (x < 2); (x > 1) | (x < 1); (x > 1) ^ (x < 2); ~(x > 1)
x * np.float32(2); x * np.float64(2); x + np.int64(2)
"""


@pytest.mark.parametrize("expression", listed(OPERATORS))
@pytest.mark.parametrize("dtype", ["f4", "f8", "i4", "i8"])
def test_operators_promote_as_numpy_2_does(expression: str, dtype: str) -> None:
    if expression == "x ** -1" and dtype[0] == "i":
        pytest.skip("NumPy refuses whole numbers to negative powers")
    assert_like_numpy(function(expression, "x"), np.array([1, 2, 3, 5], dtype))


def test_python_numbers_as_arguments_are_weak() -> None:
    single, whole = np.float32([1.5, 2.5]), np.array([1, 2])
    assert_like_numpy(lambda c, x: c * x + c, 0.1, single)
    assert_like_numpy(lambda c, x: c * x, 0.1, whole)
    assert_like_numpy(lambda c, d, x: (c * d + 2) * x, 0.1, 3.0, single)
    assert_like_numpy(lambda c: np.tanh(c) * 2, 0.1)
    assert_like_numpy(lambda c, x: np.where(x > 2, c, x), 0.1, single)
    assert_like_numpy(lambda c, x: np.maximum(c, x), 0.1, single)


@pytest.mark.parametrize("x", [0.0, -0.0, np.inf, -np.inf, np.nan, 1e308, -1e308, 5e-324, 1e-200])
@pytest.mark.parametrize("ufunc", UNARY, ids=lambda f: f.__name__)
def test_extreme_numbers(ufunc: np.ufunc, x: float) -> None:
    if ufunc is np.invert:
        pytest.skip("takes booleans only")
    x = np.array([x])
    with np.errstate(all="ignore"):
        want = ufunc(x)
    got = evaluate(trace_function(ufunc, [x])[0], [x])[0]
    if ufunc in (np.sin, np.cos, np.tan) and abs(x[0]) > 1e300:
        np.testing.assert_allclose(got, want, rtol=1e-9)
    else:
        np.testing.assert_allclose(got, want, rtol=1e-13, atol=1e-307)


# ---- everything else ---------------------------------------------------------------------------------------------------------

random = np.random.default_rng(7)
ARRAYS: dict[str, Any] = {
    "x": random.normal(size=(2, 3, 4)),
    "y": random.normal(size=(2, 4, 5)),
    "m": random.normal(size=(3, 4)),
    "q": random.normal(size=(3, 3)),
    "r": random.uniform(0.5, 2.0, (4, 3)),
    "v": random.normal(size=4),
    "w": random.normal(size=3),
    "s": np.float64(1.25),
    "o": random.normal(size=(1, 3, 1)),
    "e": np.zeros((0, 3)),
    "f": random.normal(size=(3, 4)).astype(np.float32),
    "g": random.normal(size=4).astype(np.float32),
    "i": np.array([[3, 1, 4, 1], [5, 9, 2, 6], [5, 3, 5, 8]]),
    "j": np.array([3, -1, 4, 0], np.int32),
    "u": np.array([[3, 1, 4], [1, 5, 0]], np.uint8),
    "b": random.uniform(size=(3, 4)) < 0.5,
    "n": np.array([np.nan, np.inf, -np.inf, 0.5]),
    "k": np.array([2, 0, 1, 1]),
    "l": np.array([[-1, 0], [1, -3]]),
    "z": np.array([[0.5], [1.5], [-2.5]]),
}


# Every recorded function that is no ufunc, at least once; names are the arrays above.
CALLS = """
np.sum(x); np.sum(x, axis=0); np.sum(x, axis=-1, keepdims=True); np.sum(x, axis=(0, 2)); np.sum(x, (0, -1), keepdims=True);
np.sum(x, axis=())
np.sum(i); np.sum(j); np.sum(u); np.sum(b); np.sum(f); np.sum(f, dtype=np.float64); np.sum(e); np.sum(e, axis=0); np.sum(s)
np.sum(m, axis=0, keepdims=1); np.sum(m, axis=0, keepdims=0); np.sum(m, axis=np.int64(1))
np.mean(x); np.mean(x, axis=1); np.mean(x, axis=(0, 2), keepdims=True); np.mean(f, axis=0); np.mean(i); np.mean(b, axis=0);
np.mean(f, dtype=np.float64)
np.max(x); np.max(x, axis=1); np.max(x, axis=(0, 2)); np.max(x, -1, keepdims=True); np.max(i, axis=0); np.max(b, axis=0);
np.amax(m, axis=1)
np.min(x); np.min(x, axis=1); np.min(x, axis=(0, 2)); np.min(x, -1, keepdims=True); np.min(i, axis=0); np.min(b, axis=0);
np.amin(m, axis=1)
np.max(n); np.min(n[1:]); np.any(b); np.any(b, axis=0); np.any(m > 0, axis=-1, keepdims=True); np.any(i); np.any(e);
np.any(e, axis=0); np.any(n[:1])
np.all(b); np.all(b, axis=0); np.all(m > 0, axis=-1, keepdims=True); np.all(i); np.all(e); np.all(e, axis=0)
np.var(x); np.var(x, axis=0); np.var(x, axis=(0, 1), ddof=1, keepdims=True); np.var(f, axis=1); np.var(i, axis=0);
np.std(x, axis=-1); np.std(i); np.std(f, ddof=1)
np.count_nonzero(i); np.count_nonzero(b, axis=0); np.count_nonzero(m, axis=1, keepdims=True)
np.argmax(x); np.argmax(x, axis=1); np.argmax(i, axis=-1); np.argmax(i, axis=0, keepdims=True); np.argmax(b, axis=1);
np.argmax(n)
np.argmin(x); np.argmin(x, axis=1); np.argmin(i, axis=-1); np.argmin(i, axis=0, keepdims=True); np.argmin(u, axis=1);
np.argmin(b, axis=1); np.argmin(n)
np.argmin(np.array([-128, 5], np.int8) + (j[:2] * 0).astype(np.int8))
np.linalg.norm(v); np.linalg.norm(m); np.linalg.norm(m, axis=0); np.linalg.norm(m, axis=-1, keepdims=True);
np.linalg.norm(v, 2); np.linalg.norm(m, "fro")
np.linalg.norm(m, 2, axis=1); np.linalg.norm(i, axis=1); np.linalg.norm(f); np.linalg.norm(n); np.linalg.norm(v * 0);
np.linalg.norm(x, axis=(0, 1))
np.cumsum(v); np.cumsum(m); np.cumsum(m, axis=0); np.cumsum(x, axis=-1); np.cumsum(f, axis=1); np.cumsum(j); np.cumsum(b);
np.cumsum(u, axis=0); np.cumsum(e, axis=0)
np.cumprod(v); np.cumprod(m, axis=0); np.cumprod(j); np.cumprod(b); np.cumprod(f)
np.prod(v); np.prod(m); np.prod(m, axis=0); np.prod(x, axis=-1, keepdims=True); np.prod(j); np.prod(b); np.prod(e);
np.prod(f, axis=0); np.prod(x, axis=(0, 2)); np.prod(m, keepdims=True)
np.diff(v); np.diff(m, axis=0); np.diff(x, n=2); np.diff(i); np.diff(m, 0)
np.average(m); np.average(m, axis=0); np.average(m, axis=1, weights=np.abs(m)); np.average(i, weights=i); np.average(f)
m @ r; m @ v; v @ r; v @ v; x @ y; x @ y[0]; m @ y[0]; m @ y; x @ v; w @ x; o @ w[None, :]; x[:, None] @ y[None]; f @ v; f @ g;
i @ k; j @ k; u @ w; x[:1] @ y; e @ q
np.matmul(m, r); np.matmul(np.ones((3, 4)), v); np.matmul(v, np.ones((4, 2)))
np.dot(m, r); np.dot(m, v); np.dot(v, v); np.dot(s, v); np.dot(v, 2.0); np.dot(x, v); np.dot(x, r); np.dot(x, y); np.dot(v, y);
np.dot(w, x); np.dot(f, g)
np.inner(v, v); np.inner(m, v); np.inner(x, m); np.inner(s, m); np.outer(v, w); np.outer(m, w); np.outer(i, f); np.vdot(m, m);
np.vdot(v, v); np.vdot(i, m)
np.tensordot(x, y, 0).shape and np.tensordot(x, y, 0); np.tensordot(m, r, 1); np.tensordot(m, m);
np.tensordot(x, y, axes=([2, 0], [1, 0])); np.tensordot(m, r, (1, 0)); np.tensordot(x, m, axes=[(1, 2), (0, 1)])
np.einsum("ij,jk->ik", m, r); np.einsum("ij,jk", m, r); np.einsum("ij->ji", m); np.einsum("ij->", m); np.einsum("ij->i", m);
np.einsum("ij,ij->j", m, m); np.einsum("ii", q)
np.einsum("ii->i", q); np.einsum("ii,i->i", q, w); np.einsum("ij,j,j->i", m, v, v); np.einsum("i,j", w, v); np.einsum("ba", m);
np.einsum("bij,bjk->bik", x, y)
np.einsum("...ij,...jk->...ik", x, y); np.einsum("...ij,jk->...ik", x, y[0]); np.einsum("...i->...", x);
np.einsum("...i,i", x, v); np.einsum("i...,i->...", m, w); np.einsum("...,...->...", m, v)
np.einsum("...ij->...ji", x); np.einsum("...ij,...jk->...ik", x, y[:1]); np.einsum("ij,ij->ij", m, m[:1]);
np.einsum("ij,j->ij", m, v[:1]); np.einsum("i,i->", v, v); np.einsum("i,i,i", v, v, v)
np.einsum("ij , jk -> k", m, r); np.einsum("bij,bkj->bik", x, x, optimize=True); np.einsum("ij->i", j[None]);
np.einsum("ij,j->i", f, g); np.einsum("ij,j->i", f, v); np.einsum("ij,kl->", m, r)
np.einsum("aij,aij->a", x, x); np.einsum(",i->i", s, v); np.einsum("i->i", v); np.einsum("ijj->i", x[:, :, :3]);
np.einsum("iji->j", q[:, None, :]); np.einsum("Zj,jZ->Z", m, r)
np.einsum("iii->i", x[:, :2, :2]); np.einsum("iijj->ij", q[None, None] * q[:, :, None, None][:1, :1]); np.einsum("ii", i[:, :3])
np.trace(q); np.trace(m); np.trace(x); np.trace(i); np.trace(j[:, None]); np.diagonal(q); np.diagonal(m); np.diagonal(r);
np.trace(m, 1); np.trace(m, -1); np.trace(x, 1, 1, 2); np.trace(f, 0, 1, 0, np.float64); np.trace(b); np.diagonal(m, 1);
np.diagonal(m, -2); np.diagonal(m, 7); np.diagonal(m, -7); np.diagonal(x, 1, 2, 0); np.diagonal(x, axis1=-1, axis2=1);
np.diagonal(e); np.diagonal(i, offset=1); np.diagonal(b); m.diagonal(1); x.trace(0, 2, 1)
np.kron(m, q); np.kron(v, w); np.kron(v, m); np.kron(np.eye(2), q)
np.reshape(x, (6, 4)); np.reshape(x, -1); np.reshape(x, (2, -1)); np.reshape(x, 24); np.reshape(e, (3, -1));
np.reshape(s, (1, 1)); np.ravel(x); np.ravel(s); np.ravel(e)
np.expand_dims(m, 0); np.expand_dims(m, -1); np.expand_dims(m, (0, 2)); np.expand_dims(m, (-1, 0)); np.squeeze(o);
np.squeeze(o, 0); np.squeeze(o, axis=(0, -1)); np.atleast_1d(s); np.atleast_1d(v)
np.transpose(x); np.transpose(x, (1, 2, 0)); np.transpose(x, (-1, 0, 1)); np.transpose(v); np.swapaxes(x, 0, -1);
np.moveaxis(x, 0, -1); np.moveaxis(x, [0, 1], [-1, 0]); np.moveaxis(x, -1, 1)
x.T; x.mT; m.T @ m; np.broadcast_to(v, (2, 3, 4)); np.broadcast_to(s, 3); np.broadcast_to(z, (3, 4));
np.broadcast_to(e, (2, 0, 3)); np.broadcast_arrays(m, v, 1.5); np.broadcast_arrays(z, v)
np.concatenate([m, i]); np.concatenate([m, f, m], axis=1); np.concatenate((x, x), -1); np.concatenate([m, r], axis=None);
np.concatenate([f, np.ones((1, 4), np.float32)]); np.concatenate([e, q]); np.concatenate([j, u[0]])
np.stack([m, i]); np.stack([v, g], axis=-1); np.stack((v, v), 1); np.stack([v, [1, 2, 3, 4]]); np.stack([s, v[0], 1.0]);
np.hstack([v, w]); np.hstack([m, z]); np.hstack([s, v]); np.vstack([m, v]); np.vstack([v, v])
np.vstack([s, s]); np.column_stack([v, r]); np.column_stack((w, m)); np.split(v, 2); np.split(m, [1, 3], axis=1);
np.split(m, 2, -1); np.split(v, [1, 8]); np.split(v, [-1]); np.array_split(v, 3); np.array_split(m, 2); np.array_split(v, [1])
np.tile(v, 2); np.tile(m, (2, 1, 3)); np.tile(x, (2, 3)); np.tile(s, 3); np.tile(v, [2, 2]); np.repeat(v, 3);
np.repeat(m, 2, axis=0); np.repeat(m, 2); np.repeat(x, 2, -1); np.repeat(v, 0); np.repeat(v, np.int64(2))
np.roll(v, 1); np.roll(m, -1, axis=0); np.roll(m, 5); np.roll(x, 2, -1); np.roll(e, 1, 0); np.roll(m, (1, 2), (0, 1));
np.roll(m, 1, (0, 1)); np.flip(x); np.flip(x, 0); np.flip(m, (0, 1)); np.flip(m, -1); m[::-1]
np.pad(m, 1); np.pad(m, (1, 2)); np.pad(m, ((0, 1), (2, 0)), constant_values=1.5); np.pad(i, ((1,), (0,)));
np.pad(v, 2, "constant", constant_values=-1); np.pad(f, 1, mode="constant"); np.pad(e, 1)
np.triu(q); np.triu(m, 1); np.triu(x, -1); np.tril(q); np.tril(m, -1); np.tril(i, 1); np.tril(b); np.triu(f); np.copy(m);
m.copy()
np.zeros_like(m); np.zeros_like(i); np.zeros_like(m, dtype=np.float32); np.ones_like(f); np.ones_like(m, shape=(2,));
np.full_like(m, 1.5); np.full_like(i, 2.7); np.full_like(f, np.inf); np.full_like(m, 2, dtype=int, shape=3); np.zeros_like(s)
np.where(m > 0, m, 0.0); np.where(m > 0, f, 1); np.where(m > 0, i, f); np.where(b, 1.0, 0.0); np.where(b, 1, 0);
np.where(i, m, -m); np.where(z > 0, v, 0); np.where(True, m, f); np.where(b, f, 1.5); np.where(b, b, True);
np.where(b, True, 1.5)
np.where(m > 0, b, 2); np.where([True, False, True, True], m, 0); np.where(m > 0, u[0, 0], np.float32(1));
np.where(b, g, np.float64(2))
np.clip(m, -0.5, 0.5); np.clip(m, None, 0.5); np.clip(m, -0.5, None); np.clip(m, v, 1.0); np.clip(f, 0, 1); np.clip(i, 2, 5);
np.clip(i, 1.5, 5); np.clip(m, min=0.0); np.clip(m, max=0.0); np.clip(n, 0, 1); np.clip(m, 0.5, -0.5)
np.round(m); np.round(m, 2); np.round(m * 100, -1); np.round(z); np.round(i); np.round(f, 1); np.round(n); m.round(1);
np.round(i, 1); np.round(i * 7, -1)
np.nan_to_num(n); np.nan_to_num(n, nan=1.0, posinf=2.0, neginf=-2.0); np.nan_to_num(n.astype(np.float32)); np.nan_to_num(i)
np.isclose(m, m + 1e-9); np.isclose(m, m + 1e-3); np.isclose(n, n); np.isclose(m, m * 1.01, rtol=0.1);
np.isclose(m, v, atol=10.0); np.array_equal(m, m); np.array_equal(m, -m); np.array_equal(m, v); np.array_equal(i, f)
np.take(v, k); np.take(m, 1); np.take(m, k, axis=0); np.take(m, l, axis=1); np.take(x, l, -1); np.take(m, l);
np.take(v, [0, -1]); np.take(m, -1, axis=1); np.take(f, k[:0], axis=0)
np.take_along_axis(m, l[:, :1].repeat(2, 1)[[0, 1, 0]], 1); np.take_along_axis(m, np.argmax(m, 1)[:, None], axis=1);
np.take_along_axis(m, np.argmin(m, 0)[None], 0); np.take_along_axis(x, np.argmax(x, -1)[..., None], -1)
np.shape(m); np.ndim(m); np.size(m); np.size(m, 1); m.shape; m.ndim; m.size; len(m); np.ones(4, np.result_type(f, i)) * f;
np.ones(4, np.result_type(f, 1.0)) * f
np.astype(m, np.float32); m.astype(int); i.astype(np.float32); m.astype("f4"); (m > 0).astype(float); b.astype(np.int8);
np.astype(m, bool); np.iscomplexobj(m)
x.sum(); x.sum(0); x.sum(axis=(0, 1), keepdims=True); x.mean(-1); x.max(); x.max(1); x.min(axis=0); b.any(); b.all(1);
x.var(0); x.std(); x.argmax(1); x.argmin(); x.clip(-1, 1); v.cumsum(); m.cumsum(0); v.cumprod(); m.prod(1); m.prod()
x.reshape(6, 4); x.reshape((6, 4)); x.reshape(-1); x.reshape(2, -1); x.ravel(); x.flatten(); o.squeeze(); o.squeeze(0);
x.transpose(); x.transpose(1, 0, 2); x.transpose((2, 0, 1)); x.swapaxes(0, 1); v.repeat(2); m.repeat(2, 0); v.take(k);
m.take(k, axis=0); m.dot(v); q.trace(); q.diagonal()
np.add.reduce(m); np.add.reduce(m, axis=1); np.maximum.reduce(m, 0); np.minimum.reduce(m, axis=-1);
np.multiply.reduce(m, axis=0); np.add.reduce(m, axis=None)
np.interp
"""
EXPRESSIONS = listed(CALLS)


def named(expression: str) -> list[str]:
    """The arrays that an expression names."""
    return sorted({n.id for n in ast.walk(ast.parse(expression)) if isinstance(n, ast.Name)} & set(ARRAYS))


@pytest.mark.parametrize("expression", [e for e in EXPRESSIONS if e not in ("np.interp", "np.iscomplexobj(m)")])
def test_every_recorded_function(expression: str) -> None:
    names = named(expression)
    assert_like_numpy(function(expression, names), *(ARRAYS[n] for n in names))


OFF_DIAGONAL = {
    "diagonal": np.diagonal,
    "trace": np.trace,
    "ii": lambda a: np.einsum("ii", a),
    "ii->i": lambda a: np.einsum("ii->i", a),
    "ii,i": lambda a: np.einsum("ii,i", a, np.array([2.0, 3.0, 4.0])),
    "batched": lambda a: np.einsum("bii->bi", a[None] * np.ones((2, 1, 1))),
    "thrice": lambda a: np.einsum("iii->i", a[:, :, None] * np.ones((1, 1, 3))),
    "rectangular": lambda a: np.diagonal(a[:2]),
}


@pytest.mark.parametrize("name", OFF_DIAGONAL)
def test_a_diagonal_does_not_read_what_is_beside_it(name: str) -> None:
    f = OFF_DIAGONAL[name]
    a = np.array([[1.0, np.inf, np.nan], [np.nan, 5.0, -np.inf], [np.inf, np.nan, 9.0]])
    finite = np.where(np.isfinite(a), a, 7.0)
    cubes = lambda a: np.sum(f(a) ** 3)
    np.testing.assert_array_equal(cr.compile(lambda a: f(a))(a), f(a))
    np.testing.assert_array_equal(cr.grad(cubes)(a), cr.grad(cubes)(finite))
    np.testing.assert_array_equal(cr.hvp(cubes, a, np.ones((3, 3))), cr.hvp(cubes, finite, np.ones((3, 3))))
    assert np.isfinite(cr.grad(cubes)(a)).all()


def test_no_recorded_function_is_left_out() -> None:
    called = {n.attr for e in EXPRESSIONS for n in ast.walk(ast.parse(e)) if isinstance(n, ast.Attribute)}
    assert {f.__name__ for f in FUNCTIONS if not isinstance(f, np.ufunc)} - called == set()
    assert {m for m in METHODS if not m.startswith("__")} - called == set()


# ---- indexing ----------------------------------------------------------------------------------------------------------------

INDICES = """
x[0]; x[-1]; x[1, 2]; x[1, 2, 3]; x[:, 1]; x[..., 0]; x[0, ..., -1]; x[...]; x[()]; x[:]; x[1:]; x[:, 1:3]; x[:, :-1];
x[:, -2:]
x[:, ::2]; x[:, 1::2, ::3]; x[::-1]; x[:, ::-1, ::-2]; x[:, 2:0:-1]; x[:, :0:-1]; x[..., 3:0:-2]; x[:, 5:]; x[:, 2:1];
x[:, 1:1:-1]; x[:, 2:10]; x[:, -10:2]
x[None]; x[:, None]; x[..., None]; x[None, 0, None, :, None]; x[0, None, 1]; x[np.newaxis, ..., 0]; x[np.int64(1)];
x[np.array(1)]
x[k % 2]; x[[0, 1, 1]]; x[:, k]; x[:, l]; x[..., k]; x[..., l]; x[l % 2]; x[:, [0, -1]]; x[:, k[:0]]; x[:, []]; x[range(2)]
x[k % 2, k]; x[k % 2, k, k]; x[k % 2, :, k]; x[:, k, k]; x[:, l, l]; x[l % 2, :, l]; x[k % 2, l[:, :1]]; x[[0, 1], [2, 0]]
x[0, k]; x[0, :, k]; x[k % 2, 0]; x[k % 2, :, 0]; x[:, 0, k]; x[:, k, 0]; x[0, k, 1]; x[..., 0, k]; x[0, ..., k]; x[0, 1, k];
x[k % 2, 0, k]; x[0, None, k]
x[None][:, 0, :, k]; x[None][:, k % 2, :, k]; x[None][:, k % 2, k, 0]; x[None][:, 0, k]; x[None, k % 2]; x[k % 2, None];
x[k % 2, None, k]; x[:, None, k]; x[None, :, k, None]; x[1:, k]; x[::-1, k]; x[:, ::-1, k]; x[k % 2, ::-1]; x[k % 2, 1:, ::2]
x[-1, k - 3]; x[np.array(0), :, np.array(1)]; x[np.array(0), :, k]; x[:, k.astype(np.uint8)]; x[:, k.astype(np.int32)];
e[:, 0]; e[::-1]; e[:, k]; s[...]; s[None]; s[()]
m[np.array([True, False, True])]; m[:, [True, False, True, True]]; m[np.eye(3, 4) > 0];
x[:, np.array([True, False, True]), k[:2]]; x[np.ones((2, 3)) > 0]
m[np.arange(3), np.argmax(m, axis=1)]; m[:, np.argmax(v)]; m[np.argmax(w)]; v[np.argmin(v)]; v[i % 4]; i[k]; b[k]; f[:, ::-2];
f[k, ::-1]; m[k][:, k]; list(m); list(v[1:]); m[0:2][1:][0]
"""
INDEXED = listed(INDICES)


@pytest.mark.parametrize("expression", INDEXED)
def test_indexing(expression: str) -> None:
    names = named(expression)
    assert_like_numpy(function(expression, names), *(ARRAYS[n] for n in names))


@pytest.mark.parametrize("expression", [e for e in INDEXED if "e[" not in e and "i[" not in e and "b[" not in e])
def test_indexing_has_the_derivative_of_its_places(expression: str) -> None:
    """∂(Σ c · x[...])/∂x adds each c where its number came from."""
    names = named(expression)
    f = function(expression, names)
    base = expression.removeprefix("list(")[0]
    at = names.index(base)
    args = [ARRAYS[n].astype(float) if n == base else ARRAYS[n] for n in names]
    places = np.arange(args[at].size).reshape(args[at].shape)
    fixed = [args[i] for i in range(len(names)) if i != at]
    chosen = trees.flatten(f(*(places if i == at else a for i, a in enumerate(args))))[0] if "arg" not in expression else None
    if chosen is None:
        pytest.skip("its places depend on the numbers")
    weights = [np.linspace(0.5, 1.5, np.size(c)).reshape(np.shape(c)) for c in chosen]

    def total(x: Any) -> Any:
        given = iter(fixed)
        results = trees.flatten(f(*(x if i == at else next(given) for i in range(len(names)))))[0]
        return sum(np.sum(r * c) for r, c in zip(results, weights, strict=True)) + 0.0 * np.sum(x)

    wanted = np.zeros(args[at].size)
    for c, weight in zip(chosen, weights, strict=True):
        np.add.at(wanted, np.ravel(c), np.ravel(weight))
    np.testing.assert_allclose(cr.grad(total)(args[at]), wanted.reshape(args[at].shape), rtol=1e-14)
