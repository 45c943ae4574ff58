"""What is recorded is what NumPy would have computed: values, shapes and types, over every recorded function; and what cannot be
recorded says so, with the user's line."""

from __future__ import annotations

import ast
import itertools
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np
import pytest
from expressions import function, listed
from tracing import trace_function

import chainrule as cr
from chainrule import transforms
from chainrule.compiler.kernels import kernels_of
from chainrule.derive.backward import backward
from chainrule.errors import ChainruleError, DataError, DtypeError, ShapeError, TraceError, UsageError
from chainrule.graph import tree as trees
from chainrule.graph.interpret import evaluate
from chainrule.graph.node import Graph, Type
from chainrule.graph.trace import FUNCTIONS, METHODS, Tracer, build
from chainrule.graph.verify import verify
from chainrule.normalize import normalize
from chainrule.run.native import NativeBackend

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
np.trace(q); np.trace(m); np.trace(x); np.trace(i); np.trace(j[:, None]); np.diagonal(q); np.diagonal(m); np.diagonal(r);
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


# ---- what cannot be recorded -------------------------------------------------------------------------------------------------
# Each function breaks a rule in its second line; the message has to name that line of this file.

W = np.array([1.0, 2.0])


def if_on_a_traced_value(x: Any) -> Any:
    return x if x[0] > 0 else -x


def while_on_a_traced_value(x: Any) -> Any:
    while np.sum(x) < 1:
        x = x + 1
    return x


def truth_by_and(x: Any) -> Any:
    return x[0] > 0 and x[1] > 0


def chained_comparison(x: Any) -> Any:
    return 0 < x[0] < 1


def python_max(x: Any) -> Any:
    return max(x[0], x[1])


def to_float(x: Any) -> Any:
    return float(x[0])


def to_int(x: Any) -> Any:
    return int(x[0])


def to_complex(x: Any) -> Any:
    return complex(x[0])


def from_math(x: Any) -> Any:
    return math.sin(x[0])


def as_array(x: Any) -> Any:
    return np.asarray(x)


def list_of_traced(x: Any) -> Any:
    return np.array([x[0], x[1]])


def by_item(x: Any) -> Any:
    return x[0].item()


def by_tolist(x: Any) -> Any:
    return x.tolist()


def range_over(x: Any) -> Any:
    return list(range(x.astype(int)[0]))


def membership(x: Any) -> Any:
    return 1.0 in x


def set_item(x: Any) -> Any:
    x[0] = 1.0


def in_place_on_plain_array(x: Any) -> Any:
    np.zeros(2).__iadd__(x)


def out_of_a_ufunc(x: Any) -> Any:
    np.add(x, 1, out=np.zeros(2))


def out_is_traced(x: Any) -> Any:
    np.add(W, 1, out=x)


def out_of_a_function(x: Any) -> Any:
    np.sum(x, axis=0, out=np.zeros(()))


def mask(x: Any) -> Any:
    return x[x > 0]


def truth_as_index(x: Any) -> Any:
    return x[True]


def where_alone(x: Any) -> Any:
    return np.where(x > 0)


def traced_slice(x: Any) -> Any:
    return x[: x.astype(int)[0]]


def float_index(x: Any) -> Any:
    return x[x]


def plain_array_by_traced_index(x: Any) -> Any:
    return W[np.argmax(x)]


def plain_array_by_traced_indices(x: Any) -> Any:
    return W[x.astype(int)]


def unknown_function(x: Any) -> Any:
    return np.sort(x)


def unknown_ufunc_method(x: Any) -> Any:
    return np.add.accumulate(x)


def unknown_option(x: Any) -> Any:
    return np.sum(x, initial=1.0)


def unknown_ufunc_option(x: Any) -> Any:
    return np.exp(x, where=np.array([True, False]))


def wrong_option(x: Any) -> Any:
    return np.cumsum(x, dtype=np.float32)


def spectral_norm(x: Any) -> Any:
    return np.linalg.norm(x[None], 2)


def spectral_norm_over_axes(x: Any) -> Any:
    return np.linalg.norm(x[None], 2, axis=(0, 1))


def interpolation(x: Any) -> Any:
    return np.interp(x, W, W)


def column_order(x: Any) -> Any:
    return np.reshape(x, (1, 2), order="F")


def counted_repeats(x: Any) -> Any:
    return np.repeat(x, np.array([1, 2]))


def reflected(x: Any) -> Any:
    return np.pad(x, 1, mode="reflect")


def traced_repeats(x: Any) -> Any:
    return np.repeat(x, x.astype(int)[0])


def traced_shift(x: Any) -> Any:
    return np.roll(x, x.astype(int)[0])


def traced_axis(x: Any) -> Any:
    return np.sum(x, axis=x.astype(int)[0])


def traced_option(x: Any) -> Any:
    return cr.leaky_relu(x, x[0])


def small_integers(x: Any) -> Any:
    return np.exp(x.astype(np.int8))


def bits_of_numbers(x: Any) -> Any:
    return x.astype(int) & 1


def negative_truth(x: Any) -> Any:
    return -(x > 0)


def half_precision(x: Any) -> Any:
    return x.astype(np.float16)


def complex_constant(x: Any) -> Any:
    return x * np.array([1j, 2j])


BAD = [f for f in list(globals().values()) if isinstance(f, FunctionType) and f.__code__.co_varnames[:1] == ("x",)
       and f.__module__ == __name__]  # fmt: skip
REMEDY = {
    if_on_a_traced_value: r"np\.where",
    while_on_a_traced_value: r"cr\.scan",
    mask: r"np\.where",
    plain_array_by_traced_index: r"cr\.lookup",
    plain_array_by_traced_indices: r"cr\.lookup",
    spectral_norm: "ord=2",
    spectral_norm_over_axes: "ord=2",
    reflected: "reflect",
    traced_option: "plain Python value",
    list_of_traced: r"np\.stack",
    set_item: r"np\.where",
    out_of_a_ufunc: "bind the result",
    unknown_function: "np.sort is not recorded",
    half_precision: "float16 is not known",
    where_alone: "size depends on the data",
}


def line_after(f: Any) -> str:
    """Where the body of a function starts, as messages and nodes name it."""
    return f"{__file__}:{f.__code__.co_firstlineno + 1}"


@pytest.mark.parametrize("bad", BAD, ids=lambda f: f.__name__)
def test_what_cannot_be_recorded_names_the_line(bad: Any) -> None:
    for transformed in (cr.compile(bad), cr.grad(bad), lambda x: trace_function(bad, [x])):
        with pytest.raises(ChainruleError, match=REMEDY.get(bad, ".")) as caught:
            transformed(np.array([0.5, 1.5]))
        assert line_after(bad) in str(caught.value)
    assert issubclass(caught.type, (TypeError, ValueError))


def test_assigning_a_traced_value_into_a_plain_array_is_numpys_error_caused_by_ours() -> None:
    def f(x: Any) -> Any:
        np.zeros(2)[0] = x[0]

    with pytest.raises(ValueError, match="setting an array element") as caught:
        cr.compile(f)(np.ones(2))
    assert isinstance(caught.value.__cause__, TraceError)
    assert line_after(f) in str(caught.value.__cause__)


def test_a_result_that_is_no_array() -> None:
    with pytest.raises(DtypeError, match="U4"):
        cr.compile(lambda x: "text")(np.ones(2))


def test_the_list_of_bad_functions_is_not_empty() -> None:
    assert len(BAD) >= 46
    assert set(REMEDY) <= set(BAD)


@pytest.mark.parametrize(
    ("f", "shapes"),
    [
        (lambda a, b: a + b, ["(3,)", "(4,)"]),
        (lambda a, b: a @ b, ["(3,)", "(4,)"]),
        (lambda a, b: np.concatenate([a[None], b[None]]), ["float64[1, 3]", "float64[1, 4]"]),
        (lambda a, b: np.stack([a, b]), ["(3,)", "(4,)"]),
        (lambda a, b: np.einsum("i,i", a, b), ["(3,)", "(4,)"]),
        (lambda a, b: np.where(a > 0, a, b), ["(3,)", "(4,)"]),
        (lambda a, b: np.reshape(a, (2, 2)), ["(3,)", "(2, 2)"]),
        (lambda a, b: np.broadcast_to(a, (4,)), ["(3,)", "(4,)"]),
        (lambda a, b: np.sum(a, axis=1), ["axis 1", "1 axes"]),
        (lambda a, b: a[0, 0], ["2 indices", "(3,)"]),
        (lambda a, b: np.split(a, 2), ["(3,)", "2"]),
        (lambda a, b: np.squeeze(a, 0), ["(3,)"]),
        (lambda a, b: np.max(a[:0]), ["(0,)"]),
    ],
)
def test_shapes_that_do_not_fit_give_both_and_the_line(f: Any, shapes: list[str]) -> None:
    with pytest.raises(ShapeError) as caught:
        trace_function(f, [np.ones(3), np.ones(4)])
    for shape in [*shapes, f"{__file__}:{f.__code__.co_firstlineno}"]:
        assert shape in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_indices_out_of_range() -> None:
    x = np.arange(4.0)
    for index in (4, -5, np.array([0, 4]), [-5]):
        with pytest.raises(IndexError, match="length 4"):
            cr.compile(lambda x, index=index: x[index])(x)
    for bad in (4, -5):  # known only when running: an error too, and never clamped
        with pytest.raises(DataError, match=str(bad)):
            cr.compile(lambda x, i: x[i])(x, np.array([0, bad]))
        with pytest.raises(DataError, match=str(bad)):
            cr.compile(lambda x, i: cr.scatter_add(x, i, np.ones(2)))(x, np.array([0, bad]))
    assert cr.compile(lambda x, i: x[i])(x, np.array([-1, 3])).tolist() == [3.0, 3.0]


def test_lookup_in_a_table_from_outside_counts_from_the_front_only() -> None:
    table = np.arange(6.0).reshape(3, 2)
    for f in (cr.lookup, cr.compile(cr.lookup), lambda t, i: cr.compile(lambda i: cr.lookup(t, i))(i)):
        np.testing.assert_array_equal(f(table, np.array([[2, 0]])), table[np.array([[2, 0]])])
        for bad in (-1, 3):
            with pytest.raises(DataError, match=str(bad)):
                f(table, np.array([0, bad]))
    np.testing.assert_array_equal(cr.grad(lambda t: np.sum(cr.lookup(t, np.array([1, 1]))))(table), [[0, 0], [2, 2], [0, 0]])


MASKED = np.ma.masked_array(np.arange(4.0), mask=[False, True, False, True])


@pytest.mark.parametrize(
    "call",
    [
        lambda: cr.compile(np.sin)(MASKED),
        lambda: cr.compile(lambda x, y: x["a"] + y)({"a": np.ones(4)}, MASKED),
        lambda: cr.compile(lambda x: x * MASKED)(np.ones(4)),
        lambda: cr.grad(np.sum)(MASKED),
        lambda: cr.grad(lambda x: np.sum(np.where(x > 0, x, MASKED)))(np.ones(4)),
        lambda: cr.vjp(np.sin, np.ones(4))[1](MASKED),
        lambda: cr.jvp(np.sin, [np.ones(4)], [MASKED]),
        lambda: cr.hvp(lambda x: np.sum(x**3), np.ones(4), MASKED),
        lambda: cr.jacobian(np.sin)(MASKED),
        lambda: cr.check_gradients(np.sum, MASKED),
        lambda: cr.explain(np.sum, MASKED),
        lambda: cr.compile(lambda xs: cr.scan(lambda h, x: (h + x, h), 0.0, xs))(MASKED),
    ],
)
def test_masked_arrays_are_refused(call: Any) -> None:
    with pytest.raises(cr.DataError, match=r"shape \(4,\) has 2 masked values.*numpy\.ma\.filled"):
        call()


def test_a_masked_array_is_refused_where_a_plain_one_was_taken_before() -> None:
    double = cr.compile(lambda x: 2 * x)
    assert double(np.ones(4)).tolist() == [2] * 4
    with pytest.raises(cr.DataError, match="masked"):
        double(MASKED)
    assert double(np.ma.masked_array(np.ones(4))).tolist() == [2] * 4  # nothing is masked


def test_nests_that_no_function_can_take() -> None:
    inside: list[Any] = [1.0]
    inside.append(inside)
    deep: Any = 1.0
    for _ in range(5000):
        deep = [deep]
    for nest in (inside, deep):
        for call in (cr.compile(lambda x: x), cr.grad(lambda x: 1.0), lambda x: cr.vjp(lambda y: y, x)):
            with pytest.raises(UsageError, match="contains itself, or is hundreds of levels deep"):
                call(nest)


@pytest.mark.parametrize("argnums", ["x", 0.0, None, True, (0, "x"), [None]])
def test_arguments_are_chosen_by_numbers(argnums: Any) -> None:
    with pytest.raises(UsageError, match=r"argnums=.*by their numbers"):
        cr.grad(lambda x: x, argnums=argnums)(1.0)


def test_numpys_global_generator_is_refused() -> None:
    for draw in (lambda: np.random.normal(), lambda: np.random.rand(3), lambda: np.random.permutation(3)):
        with pytest.raises(TraceError, match=r"cr\.random"):
            cr.grad(lambda x, draw=draw: (draw(), np.sum(x))[1])(np.ones(3))
        with pytest.raises(TraceError, match=r"cr\.random"):
            cr.compile(lambda x, draw=draw: (draw(), x)[1])(np.ones(3))
    own = np.random.default_rng(0)
    noise = own.normal(size=3)
    np.testing.assert_array_equal(cr.compile(lambda x: x + noise)(np.zeros(3)), noise)


def test_in_place_operators_bind_a_new_array() -> None:
    def f(x: Any) -> Any:
        y = x
        y += 1.0
        y *= x
        y -= 2
        y /= 2.0
        y **= 2
        y @= np.eye(2)
        return y, x

    x = np.array([1.0, 2.0])
    got, same = cr.compile(f)(x)
    np.testing.assert_array_equal(same, x)
    np.testing.assert_allclose(got, (((x + 1) * x - 2) / 2) ** 2)
    np.testing.assert_array_equal(x, [1.0, 2.0])


# ---- tracers that outlive their trace ----------------------------------------------------------------------------------------


def test_a_traced_array_that_leaked_says_where_it_was_recorded() -> None:
    kept = []
    cr.grad(lambda x: (kept.append(x * 2), np.sum(x))[1])(np.ones(2))
    with pytest.raises(TraceError, match="outside the function"):
        kept[0] + 1
    for use in (lambda x: np.sum(x + kept[0]), lambda x: np.sum(kept[0])):
        with pytest.raises(TraceError, match=r"has ended.*test_trace\.py|recorded at .*test_trace\.py"):
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
