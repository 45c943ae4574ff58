"""Branches of a network that are joined: what becomes of products of them, values, bits; state that several kernels write in parts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from native import SMALL, Threaded, backend_of, registered
from native_graphs import compare_wide
from same import assert_same, state
from tracing import trace_function
from training import OPTIMIZERS

import chainrule as cr
from chainrule import nn
from chainrule.compiler import phases
from chainrule.compiler.affine import Affine, Axis, of
from chainrule.compiler.branches import branched
from chainrule.compiler.kernels import Buffer
from chainrule.compiler.phases import Access, disjoint
from chainrule.derive.backward import backward
from chainrule.graph.interpret import evaluate
from chainrule.graph.node import Graph, Type
from chainrule.graph.verify import verify
from chainrule.normalize import normalize
from chainrule.ops.window import windows
from chainrule.optim import optimizers
from chainrule.program import Input, ProgramBuilder, Variable
from chainrule.run import machines
from chainrule.run.backend import Steps, backends

Array = np.ndarray


def graph_of(f: Callable[..., Any], *arrays: Array) -> Graph:
    return normalize(traced(f, arrays))


def traced(f: Callable[..., Any], arrays: Sequence[Array]) -> Graph:
    graph, _ = trace_function(f, arrays)
    return graph


def with_gradients(f: Callable[..., Any], *arrays: Array) -> Graph:
    return normalize(backward(traced(f, arrays), list(range(len(arrays))), [0], values=True))


def numbers(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape)


def joined_products(graph: Graph) -> int:
    """Products that read something that is put together."""
    return sum(n.op == "contract" and any(a.op == "concatenate" for a in n.args) for n in graph.nodes())


def check_same(graph: Graph, *arrays: Array) -> Graph:
    """Taken apart, in NumPy, and in native code with many panels."""
    made = branched(graph)
    verify(made, normal=True)
    want = evaluate(graph, arrays)
    for a, b in zip(evaluate(made, arrays), want, strict=True):
        compare_wide(a, b)
    for a, b in zip(backend_of(panels=SMALL).function(graph)([*arrays, *graph.captures]), want, strict=True):
        compare_wide(a, b)
    return made


# ---- graphs ------------------------------------------------------------------------------------------------------------------


def test_a_product_of_two_branches_is_a_sum_of_two() -> None:
    def f(a: Any, b: Any, w: Any) -> Any:
        return np.tanh(np.concatenate([np.tanh(a), np.exp(b)], axis=1) @ w)

    arrays = numbers(5, 3), numbers(5, 4, seed=1), numbers(7, 2, seed=2)
    made = check_same(graph_of(f, *arrays), *arrays)
    assert not any(n.op == "concatenate" for n in made.nodes())
    assert sum(n.op == "contract" for n in made.nodes()) == 2
    backward_graph = with_gradients(f, *arrays)
    forward_and_back = check_same(backward_graph, *arrays, numbers(5, 2))
    assert joined_products(forward_and_back) == 0
    assert sum(n.op == "contract" for n in forward_and_back.nodes()) == 6  # two forward, two by the weights, two by the branches
    for n in forward_and_back.nodes():
        assert n.op != "slice" or n.args[0] in forward_and_back.inputs  # the gradient of what was joined is never made as a whole


def test_what_else_is_read_stays_joined() -> None:
    def also_an_output(a: Any, b: Any, w: Any) -> Any:
        both = np.concatenate([a, b], axis=1)
        return [both @ w, both]

    def also_activated(a: Any, b: Any, w: Any) -> Any:
        both = np.concatenate([a, b], axis=1)
        return np.tanh(both) @ w + np.sum(both)

    def rows(a: Any, b: Any, w: Any) -> Any:  # no sum goes along what is joined
        return np.concatenate([a[:, :3], b[:, :3]], axis=0) @ w[:3]

    def many(a: Any, b: Any, w: Any) -> Any:
        return np.concatenate([a[:, :1], a[:, 1:2], a[:, 2:3], b[:, :1], b[:, 1:]], axis=1) @ w

    def beside_a_loop(a: Any, b: Any, w: Any) -> Any:
        last, _ = cr.scan(lambda s, x: (s + x, s), np.zeros(2), np.concatenate([a, b], axis=1) @ w)
        return last

    def often(a: Any, b: Any, w: Any) -> Any:
        return sum(np.sum(np.concatenate([a[:, :i], y], axis=1) @ w[: i + 4]) for i in (1, 2, 3) for y in (b, np.cos(b)))

    arrays = numbers(5, 3), numbers(5, 4, seed=1), numbers(7, 2, seed=2)
    for f in (also_an_output, also_activated, rows, many, often, beside_a_loop):
        graph = graph_of(f, *arrays)
        assert branched(graph) is graph, f.__name__
        check_same(graph, *arrays)


CASES: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "both operands": (lambda a, b, c, d: np.concatenate([a, b], 1) @ np.concatenate([c, d], 0), ((4, 3), (4, 2), (3, 5), (2, 5))),
    "both, cut elsewhere": (
        lambda a, b, c, d: np.concatenate([a, b], 1) @ np.concatenate([c, d], 0), ((4, 3), (4, 2), (1, 5), (4, 5)),
    ),
    "itself": (lambda a, b: np.concatenate([a, b], 1) @ np.concatenate([a, b], 1).T, ((4, 3), (4, 2))),
    "on the left": (lambda a, b, w: w @ np.concatenate([a, b], 0), ((3, 5), (2, 5), (4, 5))),
    "twice": (
        lambda a, b, w, v: (lambda x: np.sum(x @ w) + np.sum(np.cos(x @ v)))(np.concatenate([a, b], 1)),
        ((4, 3), (4, 2), (5, 2), (5, 3)),
    ),
    "one matrix, two cuts": (
        lambda a, b, c, w: np.concatenate([a, b, c], 1) @ w + np.concatenate([b, c, a], 1) @ w, ((4, 3), (4, 2), (4, 1), (6, 2)),
    ),
    "nested": (
        lambda a, b, c, w, v: np.concatenate([np.concatenate([a, b], 1) @ w, c], 1) @ v,
        ((4, 3), (4, 2), (4, 3), (5, 2), (5, 6)),
    ),
    "parts of a product": (
        lambda a, b, w, v: (lambda y: y[:, :2] * y[:, 2:])(np.concatenate([a, b], 1) @ w) @ v, ((4, 3), (4, 2), (5, 4), (2, 3)),
    ),
    "batched": (lambda a, b, w: np.concatenate([a, b], 2) @ w, ((2, 4, 3), (2, 4, 2), (2, 5, 3))),
    "summed along two": (
        lambda a, b, w: np.einsum("ijk,jkl->il", np.concatenate([a, b], 1), w), ((4, 2, 3), (4, 1, 3), (3, 3, 2)),
    ),
    "along the one that is kept too": (
        lambda a, b, w, u: np.sum(np.concatenate([a, b], 1) @ w) + np.sum(np.sin(u @ np.concatenate([a, b], 1))),
        ((4, 3), (4, 2), (5, 2), (3, 4)),
    ),
    "slices of which some fit": (
        lambda a, b, w: (lambda y: np.sum(y[:, :3]) + np.sum(np.sin(y[:, 2:])))((np.concatenate([a, b], 1) @ w) @ w.T),
        ((4, 3), (4, 2), (5, 2)),
    ),
    "with a part of no columns": (lambda a, b, w: np.concatenate([a, b], 1) @ w, ((4, 3), (4, 0), (3, 2))),
    "without rows": (lambda a, b, w: np.concatenate([a, b], 1) @ w, ((0, 3), (0, 2), (5, 2))),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str) -> None:
    f, shapes = CASES[name]
    arrays = [numbers(*s, seed=i) for i, s in enumerate(shapes)]
    check_same(graph_of(f, *arrays), *arrays)

    def loss(*xs: Any) -> Any:
        return np.sum(np.tanh(f(*xs)) ** 2)

    check_same(with_gradients(loss, *arrays), *arrays, np.ones(()))


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=5), st.integers(1, 4), st.integers(1, 6),
    st.sampled_from(["sum", "updated", "norm", "parts"]), st.sampled_from([np.float32, np.float64]),
)  # fmt: skip
def test_random_branches(sizes: Sequence[int], rows: int, outputs: int, use: str, dtype: Any) -> None:
    """What is made of the gradient by the weights, which comes in parts: new weights, its norm, pieces that are cut otherwise."""
    total = sum(sizes)
    arrays = [numbers(rows, n, seed=i).astype(dtype) for i, n in enumerate(sizes)]
    arrays += [numbers(total, outputs, seed=9).astype(dtype), numbers(rows, outputs, seed=8).astype(dtype)]

    def f(*xs: Any) -> Any:
        *parts, w, t = xs
        both = np.concatenate([np.tanh(p) for p in parts], axis=1)
        error = both @ w - t
        gradient = both.T @ error
        if use == "sum":
            return [np.sum(gradient), error]
        if use == "updated":
            return w - 0.1 * gradient / (np.sqrt(gradient * gradient) + 1)
        if use == "norm":
            return w - gradient * (1 / (1 + np.sqrt(np.sum(gradient**2))))
        return [gradient[: total // 2], gradient[total // 2 :], (error @ w.T)[:, : sizes[0]]]

    check_same(graph_of(f, *arrays), *arrays)


# ---- networks ----------------------------------------------------------------------------------------------------------------


class Critic(nn.Module):
    """Two inputs, each through a layer of its own if it has one, joined, and two layers more."""

    def __init__(self, widths: tuple[int, int], at: int = 3) -> None:
        self.at = at
        self.first, self.second = (nn.Dense(n, "relu") if n else None for n in widths)
        self.hidden, self.out = nn.Dense(12, "tanh"), nn.Dense(2)

    def __call__(self, x: Any) -> Any:
        a, b = x[:, : self.at], x[:, self.at :]
        a, b = (layer(part) if layer is not None else part for layer, part in ((self.first, a), (self.second, b)))
        return self.out(self.hidden(np.concatenate([a, b], axis=1)))


WIDTHS = [(8, 4), (16, 16), (0, 4), (8, 0), (0, 0), (1, 16), (32, 48)]


def trained(widths: tuple[int, int], backend: str, **options: Any) -> dict[str, Array]:
    net = Critic(widths)
    x, t = numbers(50, 5), numbers(50, 2, seed=1)
    net.fit(x, t, epochs=3, batch_size=16, backend=backend, **options)
    return state(net)


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("optimizer", [cr.Adam(), cr.SGD(0.1, momentum=0.9, clip_norm=0.1)], ids=["adam", "clipped"])
def test_networks_learn_what_the_reference_learns(widths: tuple[int, int], optimizer: cr.Optimizer) -> None:
    check_learning(widths, optimizer)


@pytest.mark.parametrize(("name", "options"), OPTIMIZERS)
def test_with_every_optimizer(name: str, options: dict[str, Any]) -> None:
    check_learning(WIDTHS[0], optimizers[name](**options))


def check_learning(widths: tuple[int, int], optimizer: Any) -> None:
    want = trained(widths, "reference", optimizer=optimizer, dtype="float64")
    with registered(Threaded(2)) as backend:
        got = trained(widths, backend, optimizer=optimizer, dtype="float64")
    assert got.keys() == want.keys()
    for key, value in want.items():
        np.testing.assert_allclose(got[key], value, rtol=1e-7, atol=1e-9, err_msg=key)


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_the_same_bits_for_every_number_of_threads(widths: tuple[int, int]) -> None:
    found = []
    for threads in (1, 2, 3, 5):
        with registered(Threaded(threads)) as backend:
            found.append(trained(widths, backend))
    for other in found[1:]:
        assert_same(other, found[0])


def test_weights_are_updated_branch_by_branch_where_they_stand() -> None:
    net = Critic((32, 16))
    net.fit(numbers(64, 5), numbers(64, 2), epochs=1, batch_size=32, optimizer=cr.Adam(), backend="native")
    text = net.compiled.text("kernels")
    stores = [line.strip() for line in text.splitlines() if line.strip().startswith("hidden.weight[")]
    assert len(stores) == 2, stores
    assert not any(line.endswith("= v0") for line in stores), "no copy"


def test_branches_of_one_width_are_updated_in_place_by_one_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With the norm of all gradients known, both parts of a matrix are updated in one kernel; their squares are summed part by part."""
    monkeypatch.setenv("CHAINRULE_CACHE", str(tmp_path))
    copied = copies_of_state(monkeypatch)
    net = Critic((16, 16))
    net.fit(numbers(64, 5), numbers(64, 2), epochs=1, batch_size=32, optimizer=cr.Adam(clip_norm=1.0), backend="native")
    (update,) = (k for k in net.compiled.text("kernels").split("    kernel ") if "        hidden.weight[" in k)
    assert update.count("\n        hidden.weight[") == 2
    assert copied == []


def copies_of_state(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of state of which all is computed beside it and then copied, of what is compiled from now on."""
    found: list[str] = []
    make = phases._copied
    monkeypatch.setattr(
        phases, "_copied", lambda other, buffer, names: (found.append(buffer.name), make(other, buffer, names))[1]
    )
    monkeypatch.setattr(machines, "_machines", OrderedDict())
    return found


# ---- state in parts ------------------------------------------------------------------------------------------------------------


def program(parts: Callable[[Any, Any], Sequence[Any]], axis: int = 0) -> Any:
    """w ← parts of it, one after the other."""
    f4 = np.dtype("f4")
    builder = ProgramBuilder([Variable("w", Type((6, 4), f4), "parameter")], [Input("x", Type((2, 6), f4), rows=0)], 2)

    def step(s: Any, g: Any) -> Any:
        w = s["w"]
        return {"loss": np.sum(g["x"] @ w)}, {"w": np.concatenate([p + 0.25 for p in parts(w, g["x"])], axis=axis)}

    builder.entry("step", step, ["x"])
    return builder.build()


PARTS: dict[str, tuple[Callable[[Any, Any], Sequence[Any]], int]] = {
    "each in its place": (lambda w, x: [w[:2] * 2, w[2:] * 3], 0),
    "columns in their place": (lambda w, x: [w[:, :1] * 2, w[:, 1:] * 3], 1),
    "parts change places": (lambda w, x: [w[2:] * 2, w[:2] * 3], 0),
    "one reads what the other writes": (lambda w, x: [w[:2] * 2, w[:4] + w[2:]], 0),
    "one reads all": (lambda w, x: [w[:2] * 2, w[2:] + np.sum(w)], 0),
    "each reads the other": (lambda w, x: [w[:2] + w[4:], w[2:] - w[:4]], 0),
    "each reads the other, halves": (lambda w, x: [w[:3] + w[3:], w[3:] - w[:3]], 0),
    "one turned round": (lambda w, x: [w[:2] * 2, w[2:][::-1] * 3], 0),
    "in a circle": (lambda w, x: [w[2:4], w[4:], w[:2]], 0),
    "in a circle, unequal": (lambda w, x: [w[5:], w[:2], w[1:4]], 0),
    "overlapping": (lambda w, x: [w[1:3], w[1:5]], 0),
    "products": (lambda w, x: [x[:, :2].T @ (x @ w), w[2:] + x[:, 2:].T @ (x @ w)], 0),
}


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_state_that_is_written_in_parts(name: str, threads: int) -> None:
    made = {2: program(*PARTS[name])}
    x, w = numbers(8, 6).astype("f4"), numbers(6, 4, seed=1).astype("f4")
    sessions = [b.session(made, {"w": w.copy()}) for b in (Threaded(threads), backends["reference"])]
    for s in sessions:
        s.run(Steps(["step"], {"x": x}, np.arange(8).reshape(4, 2), [2], {}, ("loss",), 4))
    got, want = (s.state()["w"] for s in sessions)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_a_part_that_cannot_be_written_in_place_holds_no_other_state_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The first part of v could be, after all that read it; the second is turned round, so both go beside, and w stays in place."""
    monkeypatch.setenv("CHAINRULE_CACHE", str(tmp_path))
    copied = copies_of_state(monkeypatch)
    f4 = np.dtype("f4")
    variables = [Variable(name, Type((6, 4), f4), "parameter") for name in "vw"]
    builder = ProgramBuilder(variables, [Input("x", Type((2, 6), f4), rows=0)], 2)

    def step(s: Any, g: Any) -> Any:
        v, w = s["v"], s["w"]
        return {"loss": np.sum(g["x"] @ v)}, {"v": np.concatenate([v[:2] * 2 + w[:2], v[2:][::-1] * 3]), "w": w * 2 + v}

    builder.entry("step", step, ["x"])
    made = {2: builder.build()}
    x = numbers(8, 6).astype("f4")
    start = {"v": numbers(6, 4, seed=1).astype("f4"), "w": numbers(6, 4, seed=2).astype("f4")}
    sessions = [b.session(made, {k: a.copy() for k, a in start.items()}) for b in (Threaded(2), backends["reference"])]
    for s in sessions:
        s.run(Steps(["step"], {"x": x}, np.arange(8).reshape(4, 2), [2], {}, ("loss",), 4))
    assert set(copied) == {"v"}
    for name in start:
        np.testing.assert_allclose(sessions[0].state()[name], sessions[1].state()[name], rtol=1e-5, err_msg=name)


# ---- loops -------------------------------------------------------------------------------------------------------------------


def halves(x: Any, w: Any) -> Any:
    def step(c: Any, xt: Any) -> Any:
        c = np.concatenate([np.tanh(c[:, :2] @ w[:2, :2] + xt[:, :2]), np.tanh(c[:, 2:] @ w[2:, 2:] + xt[:, 2:])], axis=1)
        return c, c

    c, ys = cr.scan(step, np.zeros(x.shape[1:]), x)
    return np.sum(c) + np.sum(ys * ys)


def sums(x: Any, w: Any) -> Any:
    def step(c: Any, xt: Any) -> Any:
        h, s, p = c
        h = np.tanh(h @ w + xt)
        s = np.concatenate([s[:2] + np.sum((h * xt)[:, :2], axis=0), s[2:] + np.sum((h * xt)[:, 2:], axis=0)])
        p = np.concatenate([p[:2] + h[:, :2].T @ xt, p[2:] + (h[:, 2:] * 2).T @ xt])
        return (h, s, p), h

    (h, s, p), _ = cr.scan(step, (np.zeros(x.shape[1:]), np.zeros(w.shape[0]), np.zeros(w.shape)), x)
    return np.sum(h) + np.sum(s) + np.sum(p * p)


def delayed(x: Any, w: Any) -> Any:
    def step(c: Any, xt: Any) -> Any:
        h, d = c
        h = np.tanh(h @ w + xt + d[:, 0])
        d = np.concatenate([d[:, 1:], h[:, None]], axis=1)
        return (h, d), np.concatenate([h, d[:, 1]], axis=1)

    rows, n = x.shape[1:]
    (h, d), ys = cr.scan(step, (np.zeros((rows, n)), np.zeros((rows, 3, n))), x)
    return np.sum(h) + np.sum(d * 2) + np.sum(np.sin(ys))


def seen_through_windows(x: Any, w: Any) -> Any:
    """The gradient by w comes back to each place from one window or two: by several kernels."""

    def step(h: Any, xt: Any) -> Any:
        h = np.tanh(h @ w[:, :6] + xt)
        return h, np.tanh(np.einsum("bk,lck->blc", h[:, :4], windows(w, [0], [4], [2])))

    h, ys = cr.scan(step, np.zeros(x.shape[1:]), x)
    return np.sum(h) + np.sum(ys * ys)


@pytest.mark.parametrize("rows", [1, 6, 64])
@pytest.mark.parametrize("f", [halves, sums, delayed, seen_through_windows])
def test_states_of_loops_that_are_made_of_parts(f: Callable[..., Any], rows: int) -> None:
    arrays = numbers(12, rows, 6), numbers(6, 6, seed=1) * 0.3
    check_same(graph_of(f, *arrays), *arrays)
    check_same(with_gradients(f, *arrays), *arrays, np.ones(()))


def test_disjoint() -> None:
    i, j = Axis("i", 4), Axis("j", 3)
    buffer = Buffer("b", (8, 3), np.dtype("f4"))

    def access(*index: Any, view: tuple[int, ...] = (8, 3)) -> Access:
        return Access(buffer, index, view, None, True)

    assert disjoint(access(of(i), of(j)), access(of(i) + 4, of(j)))
    assert disjoint(access(of(i) + 4, of(j)), access(of(i), of(j)))
    assert not disjoint(access(of(i), of(j)), access(of(i) + 3, of(j)))
    assert not disjoint(access(of(i) * 2, of(j)), access(of(i) * 2 + 1, of(j)))  # true, and not noticed
    assert disjoint(access(of(i), Affine(0)), access(of(i), Affine(1)))
    assert not disjoint(access(of(i), of(j)), access(of(i) + 4, of(j), view=(12, 2)))
