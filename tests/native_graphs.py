"""Graphs in native code against NumPy's values, many at a time: all operators and compositions, elementwise forms of all types and sizes,
expressions on matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import test_code
from expressions import function, listed
from native import Array, assert_as_precise, backend_of
from test_ops import COMPOSITION_CASES, OP_CASES, composition_graph, op_graph, single

import chainrule as cr
from chainrule import transforms
from chainrule.derive.backward import backward
from chainrule.graph.interpret import evaluate
from chainrule.graph.node import OPS, Graph
from chainrule.graph.trace import build, inline, type_of
from chainrule.normalize import normalize

# ---- many graphs in one ------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """A graph and arguments for it; where `exact` is None, float64 is compared with NumPy's float64."""

    name: str
    graph: Graph
    arrays: list[Array]
    exact: list[Array] | None = None


def joined(cases: Sequence[Case]) -> tuple[Graph, list[Array]]:
    """One graph that computes them all."""
    arrays = [np.asarray(a) for c in cases for a in c.arrays]

    def all_of(*xs: Any) -> list[Any]:
        results, at = [], 0
        for c in cases:
            results += inline(c.graph, xs[at : at + len(c.arrays)])
            at += len(c.arrays)
        return results

    graph = normalize(build(all_of, [type_of(a) for a in arrays]))
    return graph, [*arrays, *graph.captures]


def results_of(cases: Sequence[Case], width: str | None = None, level: int = 2, **options: Any) -> list[list[Array]]:
    graph, arrays = joined(cases)
    assert len(graph.inputs) == len(arrays)
    flat = iter(backend_of(width, level, **options).function(graph)(arrays))
    return [[next(flat) for _ in c.graph.outputs] for c in cases]


def faults(cases: Sequence[Case], width: str | None = None) -> list[str]:
    """What is wrong, case by case; a case that cannot be compiled is found by itself."""
    try:
        everything = results_of(cases, width)
    except Exception as error:
        if len(cases) == 1:
            return [f"{cases[0].name}: {type(error).__name__}: {error}"]
        half = len(cases) // 2
        return faults(cases[:half], width) + faults(cases[half:], width) or [f"only together: {[c.name for c in cases]}: {error}"]
    found = []
    for c, got in zip(cases, everything, strict=True):
        theirs = evaluate(c.graph, [*c.arrays, *c.graph.captures])
        for n, (a, b) in enumerate(zip(got, theirs, strict=True)):
            try:
                if c.exact is None:
                    compare_wide(a, b)
                else:
                    assert_as_precise(a, b, c.exact[n])
            except AssertionError as error:
                found.append(f"{c.name}, result {n}: {str(error).strip()[:600]}")
    return found


def compare_wide(got: Any, want: Any, rel: float = 1e-12) -> None:
    """float64 against NumPy's float64, which may be as far off itself; others exactly."""
    got, want = np.asarray(got), np.asarray(want)
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    if got.dtype.kind != "f":
        np.testing.assert_array_equal(got, want)
        return
    rel = rel if got.dtype == np.float64 else 1e-4
    largest = np.max(np.abs(want[np.isfinite(want)]), initial=0.0)
    np.testing.assert_allclose(got, want, rtol=rel, atol=rel * largest)


def with_gradients(graph: Graph, arrays: Sequence[Array]) -> tuple[Graph, list[Array]]:
    """Values and gradients from seeds that differ from place to place."""
    wrt = [i for i, a in enumerate(arrays) if np.asarray(a).dtype.kind == "f"]
    by = [i for i, o in enumerate(graph.outputs) if o.dtype.kind == "f"]
    if not wrt or not by:
        return graph, list(arrays)
    seeds = [np.cos(np.arange(o.type.size)).reshape(o.shape).astype(o.dtype) for o in (graph.outputs[i] for i in by)]
    return backward(graph, wrt, by, values=True), [*arrays, *seeds]


def registry_cases(narrow: bool) -> list[Case]:
    """The examples of all operators and compositions, values and gradients."""
    found = []
    for parameters, graph_of in ((OP_CASES, op_graph), (COMPOSITION_CASES, composition_graph)):
        for p in parameters:
            name, arrays, attrs = p.values
            if narrow and (name in ("call", "scan", "cast", "iota") or not any(a.dtype.kind == "f" for a in arrays)):
                continue
            wide, given = with_gradients(graph_of(name, arrays, attrs), arrays)
            if not narrow:
                found.append(Case(p.id, wide, given))
                continue
            graph, less = with_gradients(graph_of(name, single(arrays), attrs), single(arrays))
            exact = evaluate(wide, [np.asarray(a, n.dtype) for a, n in zip((*less, *wide.captures), wide.inputs, strict=True)])
            found.append(Case(p.id, graph, less, exact))
    return found


def registry_faults(narrow: bool, width: str) -> list[str]:
    return faults(registry_cases(narrow), width)


# ---- elementwise forms: every type and size ----------------------------------------------------------------------------------


SIZES = (0, 1, 3, 7, 16, 17, 33, 65)


def form_graph(case: Any, shape: tuple[int, ...], args: Sequence[Array]) -> tuple[Graph, list[Array]]:
    count = int(np.prod(shape))
    arrays = [np.resize(a, count).reshape(shape) if count else np.zeros(shape, a.dtype) for a in args]
    return op_graph(case.name, arrays, dict(case.attrs)), arrays


def form_faults(shapes: Sequence[tuple[int, ...] | None], width: str) -> list[str]:
    """Each elementwise form with all types that it takes; a shape of None stands for all special values with one another."""
    found = []
    for shape in shapes:
        tested, cases = [], []
        for case in test_code.CASES:
            args = test_code.arguments(case.name, case.dtypes)
            graph, arrays = form_graph(case, args[0].shape if shape is None else shape, args)
            tested.append(case)
            cases.append(Case(str(case), graph, arrays))
        for case, c, (got,) in zip(tested, cases, results_of(cases, width), strict=True):
            with np.errstate(all="ignore"):
                want = np.asarray(OPS[case.name].value(*c.arrays, **dict(case.attrs)))
            try:
                assert (got.shape, got.dtype) == (want.shape, want.dtype), (str(case), got.dtype, want.dtype)
                test_code.agree(case, got, want, c.arrays, shape)
            except AssertionError as error:
                found.append(str(error)[:500])
    return found


# ---- other forms: shapes -----------------------------------------------------------------------------------------------------

ON_MATRICES = """
np.sum(x); np.sum(x, 0); np.sum(x, 1); np.mean(x, 1, keepdims=True); np.var(x, 0); np.max(x, 0); np.min(x, 1); np.max(x);
np.cumsum(x, 0); np.cumsum(x, 1); x.T; x.T + 1.0; x[::-1]; x[:, ::-1]; x[::2, 1:]; x[:, ::3]; x[1:-1]; x[-1]; x[:, 0];
np.pad(x, ((1, 2), (0, 3))); np.concatenate([x, x * 2.0], 1); np.concatenate([x, np.sin(x), x[:1]], 0);
np.stack([x, x * x], 1); np.tile(x, (2, 3)); np.repeat(x, 2, 1); np.reshape(x, (-1,)) * 2.0; np.reshape(x.T, x.shape);
x @ x.T; x.T @ x; np.sin(x) @ np.cos(x.T); np.einsum("ij,ij->i", x, x); np.einsum("ij,ik->jk", x, x); x @ x[0]; x[:, 0] @ x;
np.einsum("ij,kj->ikj", x, x); np.outer(x[0], x[:, 0]); np.sum(x @ x.T, 0); np.tanh(x @ x.T + x[:, 0]); np.max(x @ x.T, 1);
x - np.mean(x, 0); (x - np.mean(x, 1, keepdims=True)) / np.sqrt(np.var(x, 1, keepdims=True) + 1e-3);
cr.softmax(x); cr.softmax(x, axis=0); cr.log_softmax(x); cr.logsumexp(x, axis=1); np.sum(np.maximum(x, x[:, :1]) * x);
np.take(x, np.array([0, -1, 0]), axis=0); np.take(x, np.array([[0, -1], [-1, 0]]), axis=1); x[np.array([0, 0, -1])];
np.where(x > 0.1, x, np.sin(x)); np.abs(x) ** 1.5; np.abs(x) ** 0.5; x ** 3; x[:, None] * x[None]; np.clip(x, -0.5, 0.5);
np.prod(np.tanh(x[:2, :2])); np.swapaxes(np.stack([x, x]), 0, 2); np.roll(x, 1, 0); np.diff(x, axis=1);
cr.scan(lambda h, r: (np.tanh(h + r), h * r), x[0], x); cr.scan(lambda h, r: (h * 0.5 + r, None), x[0], x, reverse=True);
cr.scan(lambda h, r: (np.tanh(h @ (x.T @ x) * 0.01 + r), h), x[0], x); cr.scan(lambda h, r: (h + np.sum(r), h), 0.0, x)
"""
ON_INDICES = (
    "np.argmax(x); np.argmax(x, 0); np.argmax(x, 1); np.argmin(x, 1); x > 0; x[:, 0] == x[0, 0]; cr.one_hot(np.argmax(x, 1), 4)"
)
MATRICES = [(1, 1), (3, 7), (17, 33), (65, 16)]
MORE_MATRICES = [(0, 3), (3, 0), (1, 65), (65, 1), (7, 3), (16, 16), (33, 17), (33, 65), (2, 130), (130, 2)]


def float_inputs(shape: tuple[int, ...], dtype: str, seed: int = 5) -> Array:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(dtype)


def flat_list(result: Any) -> list[Any]:
    return [r for r in result if r is not None] if isinstance(result, (tuple, list)) else [result]


def weighted(results: Sequence[Any]) -> Any:
    # 0.1: the rounding of a long sum shall not decide where on its wave the sine is
    return sum(
        np.sum(np.sin(0.1 * r) * np.cos(np.arange(max(r.size, 1))[: r.size]).reshape(r.shape).astype(r.dtype)) for r in results
    )


def matrix_cases(shape: tuple[int, int], dtype: str) -> list[Case]:
    found = []
    for text in listed(ON_MATRICES) + listed(ON_INDICES):
        f = function(text, "x")

        def both(x: Any, f: Callable[..., Any] = f, text: str = text) -> list[Any]:
            values = flat_list(f(x))
            return values if text in ON_INDICES else [*values, cr.grad(lambda x: weighted(flat_list(f(x))))(x)]

        x = float_inputs(shape, dtype)
        try:
            graphs = {d: build(both, [type_of(x.astype(d))]) for d in {dtype, "float64"}}
        except (ValueError, IndexError, cr.ShapeError, cr.UsageError):
            assert 0 in shape or 1 in shape, text  # only such shapes may be refused
            continue
        wide = graphs["float64"]
        exact = evaluate(wide, [x.astype(np.float64), *wide.captures]) if dtype == "float32" else None
        found.append(Case(f"{text} of {dtype} {shape}", graphs[dtype], [x], exact))
    return found


def matrix_faults(shapes: Sequence[tuple[int, int]], dtypes: Sequence[str], width: str) -> list[str]:
    return [fault for shape in shapes for dtype in dtypes for fault in faults(matrix_cases(shape, dtype), width)]


@pytest.fixture
def native_functions(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def choose(name: str) -> None:
        monkeypatch.setattr(transforms, "DEFAULT_BACKEND", name)
        monkeypatch.setattr(transforms, "_functions", type(transforms._functions)())

    return choose
