"""Every operator and every named composition, over the examples that stand beside its declaration.

A new operator is tested as soon as it is registered: its value before and after normalization and in both precisions, its first
and second derivative against central differences, and what its rule says of rows against what its numbers do.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from differences import assert_gradient, floats

from chainrule.derive.backward import backward
from chainrule.errors import ShapeError
from chainrule.graph.interpret import evaluate
from chainrule.graph.node import OPS, Graph, Rows, Type
from chainrule.graph.trace import build, type_of
from chainrule.graph.verify import verify
from chainrule.normalize import normalize
from chainrule.ops.call import COMPOSITIONS, expand
from chainrule.ops.loop import apply_many

Array = np.ndarray
SEED = 20240607


def _cases(registry: Any) -> list[Any]:
    found = []
    for name, thing in registry.items():
        for number, (arrays, attrs) in enumerate(thing.examples(np.random.default_rng(SEED))):
            found.append(pytest.param(name, [np.asarray(a) for a in arrays], attrs, id=f"{name}-{number}"))
    return found


OP_CASES = _cases(OPS)
COMPOSITION_CASES = _cases(COMPOSITIONS)
every_op = pytest.mark.parametrize(("name", "arrays", "attrs"), OP_CASES)
every_composition = pytest.mark.parametrize(("name", "arrays", "attrs"), COMPOSITION_CASES)


def op_graph(name: str, arrays: Sequence[Array], attrs: dict[str, Any]) -> Graph:
    return build(lambda *xs: apply_many(name, xs, **attrs), [type_of(a) for a in arrays])


def composition_graph(name: str, arrays: Sequence[Array], options: dict[str, Any]) -> Graph:
    return build(lambda *xs: [COMPOSITIONS[name].function(*xs, **options)], [type_of(a) for a in arrays])


def as_tuple(results: Any) -> tuple[Any, ...]:
    return tuple(results) if isinstance(results, tuple) else (results,)


def assert_same(got: Sequence[Any], wanted: Sequence[Any], **close: float) -> None:
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a, b, **(close or {"rtol": 0.0}))


def single(arrays: Sequence[Array]) -> list[Array]:
    return [a.astype(np.float32) if a.dtype.kind == "f" else a for a in arrays]


# ---- values ------------------------------------------------------------------------------------------------------------------


def _einsum(a: Array, b: Array, *, spec: str) -> Array:
    return np.einsum(spec, a, b)


def _pad(x: Array, fill: Array, *, amounts: Any) -> Array:
    for axis, (before, after, between) in enumerate(amounts):
        rows: list[Array] = []
        for row in np.moveaxis(x, axis, 0):
            rows += [np.full_like(row, fill)] * (between if rows else 0) + [row]
        empty = np.full_like(x.take(0, axis), fill)
        x = np.stack([*[empty] * before, *rows, *[empty] * after], axis)
    return x


def _scatter_add(x: Array, indices: Array, updates: Array, *, axis: int) -> Array:
    y = x.copy()
    for place, index in np.ndenumerate(indices):
        before = (slice(None),) * axis
        y[(*before, index)] += updates[(*before, *place)]
    return y


def _windows(x: Array, axes: Any, size: Any, stride: Any, dilation: Any) -> list[tuple[tuple[Any, ...], tuple[Any, ...]]]:
    """Pairs of places: in the windows, and in the array that they are taken from."""
    pairs = []
    counts = [(x.shape[a] - (k - 1) * d - 1) // s + 1 for a, k, s, d in zip(axes, size, stride, dilation, strict=True)]
    for position in np.ndindex(*counts):
        for offset in np.ndindex(*size):
            source: list[Any] = [slice(None)] * x.ndim
            target: list[Any] = [slice(None)] * x.ndim
            for a, p, o, s, d in zip(axes, position, offset, stride, dilation, strict=True):
                source[a], target[a] = p * s + o * d, p
            pairs.append(((*target, *offset), tuple(source)))
    return pairs


def _window(x: Array, *, axes: Any, size: Any, stride: Any, dilation: Any) -> Array:
    shape = list(x.shape)
    for a, k, s, d in zip(axes, size, stride, dilation, strict=True):
        shape[a] = (x.shape[a] - (k - 1) * d - 1) // s + 1
    y = np.empty((*shape, *size), x.dtype)
    for target, source in _windows(x, axes, size, stride, dilation):
        y[target] = x[source]
    return y


def _fold(w: Array, *, shape: Any, **attrs: Any) -> Array:
    y = np.zeros(shape, w.dtype)
    for target, source in _windows(y, **attrs):
        y[source] += w[target]
    return y


def _scan(h: Array, xs: Array, w: Array, *, reverse: bool, **attrs: Any) -> tuple[Array, ...]:
    """What the declared example does: h = tanh(h w + x), with h x and the state on entry stacked."""
    products, entered = np.empty_like(xs), np.empty_like(xs)
    for t in reversed(range(len(xs))) if reverse else range(len(xs)):
        entered[t] = h
        h = np.tanh(h * w + xs[t])
        products[t] = h * xs[t]
    return h, products, entered


def _bits(key: Array, offset: Array, *, shape: tuple[int, int], stream: int) -> Array:
    """Philox-4x32-10 in Python's integers."""
    words = np.empty(shape, np.uint32)
    for row, element in np.ndindex(*shape):
        c, k = [element // 4, row, int(offset), stream], [int(v) for v in key]
        for _ in range(10):
            p, q = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
            c = [(q >> 32) ^ c[1] ^ k[0], q & 0xFFFFFFFF, (p >> 32) ^ c[3] ^ k[1], p & 0xFFFFFFFF]
            k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
        words[row, element] = c[element % 4]
    return words


# What an operator means, said a second time where NumPy has no function of its name. Operators that stand in neither are tested
# against their own definition only.
MEANINGS: dict[str, Callable[..., Any]] = {
    "strong_multiply": np.multiply,
    "strong_divide": np.divide,
    "erf": np.vectorize(math.erf),
    "normal_cdf": np.vectorize(lambda x: math.erfc(-x / math.sqrt(2)) / 2),
    "logistic": lambda x: 1 / (1 + np.exp(-x)),
    "tanh_softplus": lambda x: np.tanh(np.log1p(np.exp(x))),
    "cast": lambda x, dtype: x.astype(dtype),
    "call": lambda a, b, **attrs: np.tanh(a) * b,
    "broadcast": np.broadcast_to,
    "slice": lambda x, start, stop, step: x[tuple(map(slice, start, stop, step))],
    "concatenate": lambda *xs, axis: np.concatenate(xs, axis),
    "flip": lambda x, axes: np.flip(x, axes),
    "iota": lambda length, dtype: np.arange(length).astype(dtype),
    "sum": lambda x, axes: np.sum(x, axes),
    "max": lambda x, axes: np.max(x, axes),
    "min": lambda x, axes: np.min(x, axes),
    "contract": _einsum,
    "pad": _pad,
    "scatter_add": _scatter_add,
    "window": _window,
    "fold": _fold,
    "scan": _scan,
    "random_bits": _bits,
}


@every_op
def test_op_means_what_numpy_means(name: str, arrays: list[Array], attrs: dict[str, Any]) -> None:
    meaning = MEANINGS.get(name) or getattr(np, name, None) or OPS[name].value
    wanted = [np.asarray(r) for r in as_tuple(meaning(*arrays, **attrs))]
    assert_same(as_tuple(OPS[name].value(*arrays, **attrs)), wanted, rtol=1e-14, atol=1e-15)


@every_op
def test_op_in_a_graph_is_its_definition(name: str, arrays: list[Array], attrs: dict[str, Any]) -> None:
    graph = verify(op_graph(name, arrays, attrs))
    wanted = as_tuple(OPS[name].value(*arrays, **attrs))
    assert [(o.shape, o.dtype) for o in graph.outputs] == [(np.shape(w), np.asarray(w).dtype) for w in wanted]
    assert_same(evaluate(graph, arrays), wanted)
    assert_same(evaluate(verify(normalize(graph), normal=True), arrays), wanted)


@every_op
def test_op_in_single_precision(name: str, arrays: list[Array], attrs: dict[str, Any]) -> None:
    if name in ("call", "scan", "cast", "iota") or not floats(arrays):
        pytest.skip("its types are fixed by its attributes")
    narrow = single(arrays)
    graph = op_graph(name, narrow, attrs)
    wanted = [w.astype(np.float32) if np.asarray(w).dtype.kind == "f" else w for w in as_tuple(OPS[name].value(*arrays, **attrs))]
    assert_same(evaluate(graph, narrow), wanted, rtol=2e-5, atol=2e-6)
    by = [i for i, o in enumerate(graph.outputs) if o.dtype.kind == "f"]
    if by:
        wrt = floats(arrays)
        ones = [np.ones(graph.outputs[i].shape, np.float64) for i in by]
        wide = evaluate(backward(op_graph(name, arrays, attrs), wrt, by), [*arrays, *ones])
        derived = evaluate(verify(backward(graph, wrt, by)), [*narrow, *single(ones)])
        assert_same(derived, [w.astype(np.float32) for w in wide], rtol=2e-4, atol=2e-5)


def _real(formula: Callable[..., float]) -> Callable[..., Array]:
    return np.vectorize(formula, otypes=[np.float64])


def _softmax(x: Array, axis: int = -1) -> Array:
    rows = [np.array([math.exp(v) for v in row]) / math.fsum(math.exp(v) for v in row) for row in np.moveaxis(x, axis, -1)]
    return np.moveaxis(np.array(rows), -1, axis)


def _logsumexp(x: Array, axis: int | None = None) -> Array:
    return np.log(np.sum(np.exp(x), axis))


def _unit64(high: int, low: int) -> float:
    return ((int(high) >> 5) * 2**26 + (int(low) >> 6)) / 2**53


EQUATIONS: dict[str, Callable[..., Any]] = {
    "softmax": _softmax,
    "log_softmax": lambda x, axis=-1: np.log(_softmax(x, axis)),
    "logsumexp": _logsumexp,
    "relu": _real(lambda x: max(x, 0.0)),
    "leaky_relu": _real(lambda x: x if x > 0 else 0.01 * x),
    "elu": _real(lambda x: x if x > 0 else math.exp(x) - 1),
    "selu": _real(lambda x: 1.0507009873554805 * (x if x > 0 else 1.6732632423543772 * (math.exp(x) - 1))),
    "gelu": _real(lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2)))),
    "sigmoid": _real(lambda x: 1 / (1 + math.exp(-x))),
    "softplus": _real(lambda x: math.log(1 + math.exp(x))),
    "silu": _real(lambda x: x / (1 + math.exp(-x))),
    "mish": _real(lambda x: x * math.tanh(math.log(1 + math.exp(x)))),
    "softsign": _real(lambda x: x / (1 + abs(x))),
    "hypot": _real(math.hypot),
    "logaddexp": _real(lambda a, b: math.log(math.exp(a) + math.exp(b))),
    "unit_interval": lambda bits: np.array([(int(b) >> 8) / 2**24 for b in bits], np.float32),
    "unit_interval64": lambda high, low: np.array([_unit64(a, b) for a, b in zip(high, low, strict=True)]),
    "stop_gradient": lambda x: x,
}


@every_composition
def test_composition_is_the_same_eager_and_recorded(name: str, arrays: list[Array], attrs: dict[str, Any]) -> None:
    eager = [np.asarray(COMPOSITIONS[name].function(*arrays, **attrs))]
    if name in EQUATIONS:
        assert_same(eager, [EQUATIONS[name](*arrays, **attrs)], rtol=1e-13, atol=1e-15)
    graph = verify(composition_graph(name, arrays, attrs))
    assert_same(evaluate(graph, arrays), eager, rtol=1e-15)
    assert_same(evaluate(verify(normalize(graph), normal=True), arrays), eager, rtol=1e-15)
    if floats(arrays):
        narrow = evaluate(composition_graph(name, single(arrays), attrs), single(arrays))
        assert_same(narrow, [e.astype(np.float32) for e in eager], rtol=2e-5, atol=2e-6)


# ---- derivatives -------------------------------------------------------------------------------------------------------------


def check_derivatives(graph: Graph, arrays: Sequence[Array], smooth: bool, rel: float = 1e-6) -> None:
    """The gradient against differences of the value; the gradient of the gradient, by arguments and seeds alike, against
    differences of the gradient."""
    wrt, by = floats(arrays), [i for i, o in enumerate(graph.outputs) if o.dtype.kind == "f"]
    if not wrt or not by:
        return
    random = np.random.default_rng(SEED)
    seeds = [random.uniform(0.5, 1.5, graph.outputs[i].shape) for i in by]
    first = verify(backward(graph, wrt, by))
    second = verify(backward(first, [*wrt, *range(len(arrays), len(arrays) + len(seeds))]))
    given = [*arrays, *seeds]
    gradients = evaluate(first, given)
    assert_same(evaluate(normalize(first), given), gradients, rtol=1e-13, atol=1e-15)
    if not smooth:
        assert all(not np.any(g) for g in gradients), "an operator that is not smooth lets a gradient through"
        return

    def value(*xs: Any) -> float:
        results = evaluate(graph, xs)
        return float(sum(np.sum(results[i] * s) for i, s in zip(by, seeds, strict=True)))

    for i, gradient in zip(wrt, gradients, strict=True):
        assert_gradient(value, arrays, i, gradient, rel)
    more = [random.uniform(0.5, 1.5, g.shape) for g in gradients]

    def slope(*xs: Any) -> float:
        return float(sum(np.sum(g * m) for g, m in zip(evaluate(first, xs), more, strict=True)))

    places = [*wrt, *range(len(arrays), len(given))]
    for i, gradient in zip(places, evaluate(second, [*given, *more]), strict=True):
        assert_gradient(slope, given, i, gradient, rel)


@every_op
def test_op_derivatives(name: str, arrays: list[Array], attrs: dict[str, Any]) -> None:
    check_derivatives(op_graph(name, arrays, attrs), arrays, OPS[name].smooth)


@every_composition
def test_composition_derivatives(name: str, arrays: list[Array], attrs: dict[str, Any]) -> None:
    check_derivatives(composition_graph(name, arrays, attrs), arrays, COMPOSITIONS[name].smooth)


@every_composition
def test_a_written_derivative_is_the_derived_one(name: str, arrays: list[Array], attrs: dict[str, Any]) -> None:
    composition = COMPOSITIONS[name]
    if composition.derivative is None or not composition.smooth:
        pytest.skip("its derivative is not written, or zero on purpose")
    graph = composition_graph(name, arrays, attrs)
    seed = np.random.default_rng(SEED).normal(size=graph.outputs[0].shape)
    written, derived = (evaluate(backward(g, floats(arrays)), [*arrays, seed]) for g in (graph, expand(graph)))
    assert_same(written, derived, rtol=1e-12, atol=1e-15)


def test_every_smooth_op_has_an_example_with_a_derivative() -> None:
    tested = {p.values[0] for p in OP_CASES if floats(p.values[1])}
    assert {name for name, op in OPS.items() if op.smooth} - tested == {"iota"}


# ---- rows --------------------------------------------------------------------------------------------------------------------


def row_choices(arrays: Sequence[Array]) -> list[tuple[Rows, ...]]:
    """Every way in which the arguments might carry rows: at least one does, and all that do have equally many."""
    choices = itertools.product(*([None, *range(a.ndim)] for a in arrays))
    return [c for c in choices if len({a.shape[r] for a, r in zip(arrays, c, strict=True) if r is not None}) == 1]


def other_row(a: Array, axis: int, j: int, random: np.random.Generator) -> Array:
    """`a` with other numbers in row j: between the least and the largest, or from those that stand in `a` where they are indices or
    truths."""
    b = np.moveaxis(a.copy(), axis, 0)
    b[j] = random.uniform(a.min(), a.max(), b[j].shape) if a.dtype.kind == "f" else random.choice(a.reshape(-1), b[j].shape)
    return np.moveaxis(b, 0, axis)


def same_for_all_rows(a: Array, n: int) -> Array:
    """An argument without rows is the same for all of them: constant along any axis that could be met by the row axis."""
    for axis, length in enumerate(a.shape):
        if length == n:
            a = np.broadcast_to(a.take([0], axis), a.shape)
    return a


@every_op
def test_rule_of_rows(name: str, arrays: list[Array], attrs: dict[str, Any]) -> None:
    op, random = OPS[name], np.random.default_rng(SEED)
    types = [Type(a.shape, a.dtype) for a in arrays]

    def compute(xs: Sequence[Array]) -> list[Array]:
        return [np.asarray(r) for r in as_tuple(op.value(*xs, **attrs))]

    for rows in row_choices(arrays):
        results = as_tuple(op.rows(rows, types, **attrs))
        n = next(a.shape[r] for a, r in zip(arrays, rows, strict=True) if r is not None)
        even = [same_for_all_rows(a, n) if r is None else a for a, r in zip(arrays, rows, strict=True)]
        order = np.roll(np.arange(n)[::-1], 1)
        shuffled = [a if r is None else a.take(order, r) for a, r in zip(even, rows, strict=True)]
        before, after = compute(even), compute(shuffled)
        for k, carried in enumerate(results):
            if carried is None:
                np.testing.assert_allclose(after[k], before[k], rtol=1e-12, atol=1e-14, err_msg=f"{rows} -> None")
            elif isinstance(carried, int):
                wanted = before[k].take(order, carried)
                np.testing.assert_allclose(after[k], wanted, rtol=1e-12, atol=1e-14, err_msg=f"{rows} -> {carried}")
        plain = compute(arrays)
        for j in range(n):
            moved = compute([a if r is None else other_row(a, r, j, random) for a, r in zip(arrays, rows, strict=True)])
            for k, carried in enumerate(results):
                if isinstance(carried, int):
                    others = [i for i in range(n) if i != j]
                    assert plain[k].shape[carried] == n
                    assert np.array_equal(moved[k].take(others, carried), plain[k].take(others, carried)), f"{rows} -> {carried}"


def f8(*shape: int) -> Type:
    return Type(shape, np.dtype("f8"))


I8 = Type((3,), np.dtype("i8"))


@pytest.mark.parametrize(
    ("name", "rows", "types", "attrs", "carried"),
    [
        ("multiply", (0, None), (f8(5, 2), f8(5, 2)), {}, 0),
        ("multiply", (0, 1), (f8(5, 5), f8(5, 5)), {}, "mixed"),
        ("contract", (0, None), (f8(5, 3), f8(3, 2)), {"spec": "ij,jk->ik"}, 0),
        ("contract", (None, 1), (f8(5, 3), f8(3, 2)), {"spec": "ij,jk->ik"}, 1),
        ("contract", (0, 0), (f8(5, 3), f8(5, 2)), {"spec": "ij,ik->jk"}, None),
        ("contract", (0, 0), (f8(5, 3), f8(5, 2)), {"spec": "ij,ik->ijk"}, 0),
        ("contract", (0, 0), (f8(5, 3), f8(5, 3)), {"spec": "ij,kj->ik"}, "mixed"),
        ("sum", (0,), (f8(5, 3),), {"axes": (1,)}, 0),
        ("sum", (1,), (f8(5, 3),), {"axes": (0,)}, 0),
        ("sum", (0,), (f8(5, 3),), {"axes": (0,)}, None),
        ("argmax", (0,), (f8(5, 3),), {"axis": 1}, 0),
        ("broadcast", (0,), (f8(5, 1),), {"shape": (2, 5, 3)}, 1),
        ("reshape", (0,), (f8(5, 6),), {"shape": (5, 2, 3)}, 0),
        ("reshape", (0,), (f8(5, 6),), {"shape": (30,)}, "mixed"),
        ("reshape", (1,), (f8(2, 5, 6),), {"shape": (2, 5, 3, 2)}, 1),
        ("transpose", (0,), (f8(5, 3, 2),), {"axes": (2, 0, 1)}, 1),
        ("slice", (0,), (f8(5, 3),), {"start": (0, 1), "stop": (5, 3), "step": (1, 1)}, 0),
        ("slice", (0,), (f8(5, 3),), {"start": (1, 0), "stop": (5, 3), "step": (1, 1)}, "mixed"),
        ("flip", (0,), (f8(5, 3),), {"axes": (1,)}, 0),
        ("flip", (0,), (f8(5, 3),), {"axes": (0,)}, "mixed"),
        ("concatenate", (0, 0), (f8(5, 3), f8(5, 2)), {"axis": 1}, 0),
        ("concatenate", (0, 0), (f8(5, 3), f8(5, 3)), {"axis": 0}, "mixed"),
        ("take", (None, 0), (f8(9, 2), I8), {"axis": 0}, 0),
        ("take", (0, None), (f8(5, 9), I8), {"axis": 1}, 0),
        ("scatter_add", (None, 0, 0), (f8(9, 2), I8, f8(3, 2)), {"axis": 0}, None),
        ("window", (0,), (f8(5, 9),), {"axes": (1,), "size": (2,), "stride": (1,), "dilation": (1,)}, 0),
        ("pad", (0, None), (f8(5, 3), f8()), {"amounts": ((0, 0, 0), (1, 1, 0))}, 0),
    ],
)
def test_rows_are_kept_apart_where_networks_need_it(name: str, rows: Any, types: Any, attrs: Any, carried: Rows) -> None:
    assert OPS[name].rows(rows, types, **attrs) == carried


# ---- what the shape rules refuse ---------------------------------------------------------------------------------------------


@every_op
def test_one_axis_more_is_refused_or_understood(name: str, arrays: list[Array], attrs: dict[str, Any]) -> None:
    """The shape rule refuses an argument with one axis more, or says what the definition does with it."""
    for i in range(len(arrays)):
        types = [Type((2, *a.shape) if k == i else a.shape, a.dtype) for k, a in enumerate(arrays)]
        try:
            inferred = as_tuple(OPS[name].infer(*types, **attrs))
        except ShapeError:
            continue
        results = as_tuple(OPS[name].value(*(np.ones(t.shape, t.dtype) for t in types), **attrs))
        assert [t.shape for t in inferred] == [np.shape(r) for r in results]
