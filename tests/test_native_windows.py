"""Sliding windows in native code, forward and backward: convolutions and pooling of random geometry against NumPy's values, at each width
of vectors, in both precisions, with the same bits for every number of threads."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from native import WIDTHS, Threaded, backend_of, registered
from rarely import rarely
from same import assert_same, state
from tracing import trace_function

import chainrule as cr
from chainrule import nn
from chainrule.compiler.cost import work
from chainrule.compiler.fold import parts
from chainrule.compiler.kernels import Buffer, Kernel, bounds, kernels_of
from chainrule.compiler.pipeline import Given, compile_graph
from chainrule.compiler.schedule import schedule
from chainrule.compiler.target import host, narrowed
from chainrule.graph.interpret import evaluate
from chainrule.normalize import normalize
from chainrule.ops.contract import contract
from chainrule.ops.window import count, windows

Array = np.ndarray


@dataclass(frozen=True)
class Geometry:
    """Windows along one axis."""

    length: int
    size: int
    stride: int
    dilation: int

    @property
    def windows(self) -> int:
        return count(self.length, self.size, self.stride, self.dilation)


@st.composite
def geometries(draw: st.DrawFn, most: int = 13) -> Geometry:
    size, dilation = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    least = (size - 1) * dilation + 1
    return Geometry(draw(st.integers(least, max(most, least))), size, draw(st.integers(1, 4)), dilation)


@given(geometries(30), st.integers(0, 5), st.integers(0, 5), st.booleans())
def test_parts_are_what_windows_reach(g: Geometry, before: int, after: int, apart: bool) -> None:
    """Each place between two once, and with it each (window, offset) that stands on it."""
    low = min(before, g.length)
    high = max(low, g.length - after)
    found: dict[int, list[tuple[int, int]]] = {}
    for p in parts(g.length, g.size, g.stride, g.dilation, g.windows, low, high, apart):
        for q in range(p.count):
            for r in range(p.spread):
                pairs = [(p.shift + q - p.reach * j, p.offset + r + p.between * j) for j in range(p.terms)]
                inside = [(w, k) for w, k in pairs if 0 <= w < g.windows]
                assert p.bounded or inside == pairs
                y = p.first + p.step * q + r
                assert y not in found
                found[y] = inside
    reached: dict[int, list[tuple[int, int]]] = {y: [] for y in range(g.length)}
    for w in range(g.windows):
        for k in range(g.size):
            reached[w * g.stride + k * g.dilation].append((w, k))
    assert {y: sorted(f) for y, f in found.items()} == {y: sorted(f) for y, f in reached.items() if low <= y < high}


def test_places_near_the_ends_are_apart() -> None:
    """All that three windows reach are one part, whose sum needs no bounds; nor does that of a single place."""
    found = parts(34, 3, 1, 1, 32, 1, 33, apart=True)
    assert [(p.first, p.count, p.terms, p.offset, p.bounded) for p in found] == [
        (1, 1, 2, 0, False), (2, 30, 3, 0, False), (32, 1, 2, 1, False)
    ]  # fmt: skip
    assert [(p.count, p.bounded) for p in parts(12, 5, 1, 1, 8, apart=True)] == [(4, True), (4, False), (4, True)]
    assert [(p.count, p.bounded) for p in parts(7, 3, 1, 1, 5, apart=True)] == [(7, True)]  # three places are not worth it
    assert [(p.count, p.bounded) for p in parts(12, 5, 1, 1, 8)] == [(12, True)]


@given(st.integers(1, 6), st.integers(7, 40), st.integers(0, 90), st.integers(0, 7), st.integers(0, 7))
def test_a_large_stride_has_few_parts(size: int, stride: int, more: int, before: int, after: int) -> None:
    """Places that are reached alike are one part, not one for each remainder: for images there are so many kernels squared."""
    length, low = size + more, min(before, size)
    windows, high = count(length, size, stride, 1), max(low, length - after)
    found = parts(length, size, stride, 1, windows, low, high)
    assert len(found) <= 7
    reached = {w * stride + k: (w, k) for w in range(windows) for k in range(size)}
    places = {}
    for p in found:
        for q in range(p.count):
            for r in range(p.spread):
                places[p.first + p.step * q + r] = (p.shift + q, p.offset + r) if p.terms else None
    assert places == {y: reached.get(y) for y in range(low, high)}
    assert sum(p.count * p.spread for p in found) == high - low


@pytest.mark.parametrize("width", WIDTHS)
def test_gradients_with_strides_that_are_larger_than_the_kernel(width: str) -> None:
    check(width, 3, (2, 3), Geometry(50, 3, 24, 1), Geometry(45, 2, 20, 5), np.float64)


def _layers(x: Any, w: Any, v: Any, g: Geometry, h: Geometry) -> Any:
    """Pads, convolves by g along one axis and h along the other, takes the largest of windows, and convolves again with 1x1 windows."""
    y = contract("bhwcij,ijco->bhwo", windows(x, [1, 2], [g.size, h.size], [g.stride, h.stride], [g.dilation, h.dilation]), w)
    y = np.maximum(y, 0)
    pool = [min(2, n) for n in y.shape[1:3]]
    y = np.max(windows(y, [1, 2], pool, [1, 2]), axis=(4, 5))
    y = contract("bhwcij,ijco->bhwo", windows(y, [1, 2], [1, 1], [2, 1]), v)
    return np.sum(np.tanh(y) ** 2, axis=(1, 2, 3))


def check(width: str, rows: int, channels: tuple[int, int], g: Geometry, h: Geometry, dtype: Any) -> None:
    """Loss and gradients: native against NumPy."""
    r = np.random.default_rng(0)
    c, o = channels
    x, w = r.normal(size=(rows, g.length, h.length, c)), r.normal(size=(g.size, h.size, c, o))
    arrays = [a.astype(dtype) for a in (x, w, r.normal(size=(1, 1, o, 3)))]

    def f(x: Any, w: Any, v: Any) -> Any:
        return cr.value_and_grad(lambda *a: np.sum(_layers(*a, g, h)), (0, 1, 2))(x, w, v)

    graph = normalize(trace_function(f, arrays)[0])
    known = evaluate(graph, [*arrays, *graph.captures])
    got = backend_of(width).function(graph)([*arrays, *graph.captures])
    tolerance = 1e-10 if dtype == np.float64 else 2e-4
    for a, b in zip(got, known, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1.0, float(np.max(np.abs(b), initial=0.0))))


@pytest.mark.parametrize("width", WIDTHS)
@settings(max_examples=max(settings().max_examples // 2, 1))
@given(
    rows=st.sampled_from([1, 3, 16, 32, 37]), channels=st.sampled_from([(1, 6), (3, 4), (5, 17)]), g=geometries(),
    h=geometries(), dtype=st.sampled_from([np.float32, np.float64]),
)  # fmt: skip
def test_random_convolutions(width: str, rows: int, channels: tuple[int, int], g: Geometry, h: Geometry, dtype: Any) -> None:
    check(width, rows, channels, g, h, dtype)


class Convolution(nn.Module):
    """Windows times a weight; relu."""

    def __init__(self, filters: int, g: Geometry, h: Geometry, pad: tuple[int, int] = (0, 0)) -> None:
        self.filters, self.g, self.h, self.pad = filters, g, h, pad

    def __call__(self, x: Any) -> Any:
        g, h = self.g, self.h
        w = self.parameter("weight", (g.size, h.size, x.shape[-1], self.filters), "he_uniform")
        x = np.pad(x, ((0, 0), self.pad, self.pad[::-1], (0, 0)))
        y = windows(x, [1, 2], [g.size, h.size], [g.stride, h.stride], [g.dilation, h.dilation])
        return np.maximum(contract("bhwcij,ijco->bhwo", y, w) + self.parameter("bias", (self.filters,), "zeros"), 0)


class Pool(nn.Module):
    """The largest of windows that may overlap."""

    def __init__(self, size: int, stride: int) -> None:
        self.size, self.stride = size, stride

    def __call__(self, x: Any) -> Any:
        size = [min(self.size, n) for n in x.shape[1:3]]
        return np.max(windows(x, [1, 2], size, [self.stride] * 2), axis=(4, 5))


class Flat(nn.Module):
    """Rows of numbers."""

    def __call__(self, x: Any) -> Any:
        return np.reshape(x, (x.shape[0], -1))


def network(filters: int, g: Geometry, h: Geometry, pool: tuple[int, int], norm: bool) -> nn.Sequential:
    """Images to three classes."""
    small = Geometry(1, 3, 2, 1)
    return nn.Sequential(
        Convolution(filters, g, h), Pool(*pool), *([nn.BatchNorm()] if norm else []), Convolution(3, small, small, (1, 2)), Flat(),
        nn.Dense(7, "tanh"), nn.Dense(3),
    )  # fmt: skip


@pytest.mark.parametrize("width", WIDTHS)
@settings(max_examples=max(settings().max_examples // 4, 1))
@given(
    rows=st.sampled_from([16, 32, 37, 48, 50, 64, 65, 67, 79]), channels=st.sampled_from([(1, 6), (3, 4), (5, 17)]),
    g=geometries(9), h=geometries(9), pool=st.sampled_from([(2, 2), (3, 2), (2, 1)]), norm=st.booleans(),
    dtype=st.sampled_from(["float32", "float64"]),
)  # fmt: skip
def test_random_networks(
    width: str, rows: int, channels: tuple[int, int], g: Geometry, h: Geometry, pool: tuple[int, int], norm: bool, dtype: str
) -> None:
    """Gradients of a batch whose rows lie in lanes."""
    r = np.random.default_rng(1)
    x = r.normal(size=(rows, g.length, h.length, channels[0])).astype(dtype)
    y = r.integers(0, 3, rows)
    net = network(channels[1], g, h, pool, norm)
    net.fit(x, y, loss="cross_entropy", epochs=0, seed=0, dtype=dtype, verbose=False)
    with registered(backend_of(width)) as name:
        got = net.gradients(x, y, loss="cross_entropy", backend=name)
    known = net.gradients(x, y, loss="cross_entropy", backend="reference")
    tolerance = 1e-9 if dtype == "float64" else 2e-4
    for key, a in got.items():
        b = known[key]
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1.0, float(np.max(np.abs(b)))), err_msg=key)


def _residual(channels: int, stride: int) -> nn.Module:
    inner = nn.Sequential(nn.Conv2D(channels, 3, stride, "same", bias=False), nn.BatchNorm())
    return nn.Residual(inner, nn.Conv2D(channels, 1, stride, bias=False))


NETWORKS: dict[str, tuple[tuple[int, ...], Callable[[], list[nn.Module]]]] = {
    "lenet": ((12, 12, 1), lambda: [nn.Conv2D(3, 3, activation="relu"), nn.MaxPool2D(2), nn.Conv2D(5, 3), nn.Flatten()]),
    "residual": ((7, 6, 3), lambda: [nn.Conv2D(6, 3, padding="same"), _residual(5, 2), nn.Activation("relu"), nn.GlobalAvgPool()]),
    "drops": ((8, 8, 2), lambda: [nn.Conv2D(6, 3), nn.Dropout2D(0.3), nn.AvgPool2D(2), nn.Dropout(0.2), nn.Flatten()]),
    "groups": ((6, 6, 4), lambda: [nn.Conv2D(6, 3, groups=2, padding="same"), nn.LayerNorm(), nn.Conv2D(6, 3, groups=6), nn.Flatten()]),
    "groups with norm": ((7, 6, 8), lambda: [
        nn.Conv2D(8, 3, 2, "same", "relu", groups=4), nn.Conv2D(16, 3, padding="same", groups=2, bias=False), nn.BatchNorm(),
        nn.Activation("relu"), nn.MaxPool2D(2), nn.Flatten(),
    ]),
    "depthwise": ((6, 7, 3), lambda: [
        nn.Conv2D(6, 3, padding="same", activation="relu", groups=3), nn.Conv2D(6, 3, padding="same", activation="tanh", groups=6),
        nn.Conv2D(4, 1), nn.GlobalAvgPool(),
    ]),
    "groups in time": ((15, 6), lambda: [
        nn.Conv1D(12, 3, 2, "causal", "relu", groups=3), nn.Conv1D(12, 2, dilation=2, activation="relu", groups=4), nn.GRU(4),
    ]),
    "dilated": ((20, 3), lambda: [nn.Conv1D(5, 3, padding="causal", dilation=2), nn.Conv1D(5, 2, 3, 2, "tanh"), nn.Flatten()]),
    "padded pool": ((9, 9, 2), lambda: [nn.MaxPool2D(3, 2, "same"), nn.Conv2D(7, 2), nn.AvgPool2D(3, 1, "same"), nn.GlobalAvgPool()]),
    "recurrent": ((15, 3), lambda: [nn.Conv1D(5, 3, activation="relu"), nn.MaxPool1D(2), nn.LSTM(4)]),
    "steps": ((15, 3), lambda: [nn.GRU(5, return_sequences=True), nn.Conv1D(3, 3, 2), nn.Flatten()]),
    "dense between": ((8, 8, 1), lambda: [nn.Conv2D(5, 3), nn.Dense(3, "relu"), nn.Conv2D(2, 3), nn.Flatten(), nn.Dense(7)]),
    "images": ((6, 6, 2), lambda: [nn.Conv2D(3, 3, padding="same"), nn.Reshape(6, 18), nn.Conv1D(5, 2), nn.Flatten()]),
}  # fmt: skip


@pytest.mark.parametrize("rows", [16, 50, 74, *rarely(48, 65)])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_many_layers(name: str, rows: int) -> None:
    """Gradients, with dropout and batch statistics; and what a run with a short last batch leads to."""
    shape, make = NETWORKS[name]
    r = np.random.default_rng(3)
    x, y = r.normal(size=(rows + 5, *shape)), r.integers(0, 3, rows + 5)
    options: dict[str, Any] = {"loss": "cross_entropy", "seed": 4}
    net = nn.Sequential(*make(), nn.Dense(3))
    net.fit(x, y, epochs=0, dtype="float64", verbose=False, **options)
    got, known = (net.gradients(x[:rows], y[:rows], backend=b, **options) for b in ("native", "reference"))
    for key, a in got.items():
        np.testing.assert_allclose(a, known[key], rtol=1e-8, atol=1e-10, err_msg=key)
    ends = []
    start = net.parameters
    for backend in ("native", "reference"):
        net.reset()
        net.fit(x, y, epochs=0, dtype="float64", verbose=False, **options)
        net.load_parameters(start)
        net.fit(x, y, epochs=2, batch_size=rows, optimizer=cr.SGD(0.1), backend=backend, verbose=False, **options)
        ends.append(state(net))
    for key, a in ends[0].items():
        np.testing.assert_allclose(a, ends[1][key], rtol=1e-7, atol=1e-9, err_msg=key)


def _plain() -> nn.Module:
    return network(6, Geometry(9, 3, 2, 1), Geometry(8, 2, 1, 1), (2, 2), True)


def _grouped() -> nn.Module:
    first = nn.Conv2D(12, 3, padding="same", activation="relu", groups=3)
    return nn.Sequential(first, nn.Conv2D(12, 3, 2, "same", "relu", groups=12), nn.BatchNorm(), nn.GlobalAvgPool(), nn.Dense(3))


@pytest.mark.parametrize("rows", [37, 50, 64, *rarely(32, 65, 74)])
@pytest.mark.parametrize("make", [_plain, _grouped])
def test_threads_give_the_same_bits(make: Callable[[], nn.Module], rows: int) -> None:
    """A run over images with a short last batch."""
    r = np.random.default_rng(2)
    x, y = r.normal(size=(rows * 2 + 19, 9, 8, 3)).astype("f4"), r.integers(0, 3, rows * 2 + 19)
    states = []
    for threads in (1, 2, 3):
        net = make()
        with registered(Threaded(threads)) as name:
            net.fit(x, y, loss="cross_entropy", epochs=2, batch_size=rows, seed=0, backend=name, verbose=False)
        states.append(state(net))
    for other in states[1:]:
        assert_same(states[0], other)


def _kernels(f: Callable[..., Any], arrays: list[Array]) -> list[Kernel]:
    """Those of a function without captures."""
    graph = normalize(trace_function(f, arrays)[0])
    inputs = [Given(Buffer(f"in{i}", n.shape, n.dtype, "input")) for i, n in enumerate(graph.inputs)]
    outputs = [Buffer(f"out{i}", n.shape, n.dtype, "result") for i, n in enumerate(graph.outputs)]
    slots = {b.name: i for i, b in enumerate([*(g.buffer for g in inputs), *outputs], 2)}
    code = compile_graph("f", graph, inputs, outputs, [], slots, [0, *[None] * (len(inputs) - 1)], host())
    return list(kernels_of([i for items in code.plan.phases for i in items]))


def _gradient_by_the_input(rows: int, side: int, channels: int, filters: int) -> list[Kernel]:
    """Its kernels: of a convolution with windows of 3 x 3."""
    x, w = np.zeros((rows, side, side, channels)), np.zeros((3, 3, channels, filters))
    f = lambda x, w: contract("bhwcij,ijco->bhwo", windows(x, [1, 2], [3, 3]), w)
    return _kernels(lambda x, w, g: cr.vjp(f, x, w)[1](g)[0], [x, w, np.zeros((rows, side - 2, side - 2, filters))])


def test_cost_counts_the_terms_that_there_are() -> None:
    """A place near the border is reached by fewer windows: 6 x 6 of them with 9 offsets each, of 2 channels."""
    assert sum(work(k).flops for k in _gradient_by_the_input(4, 8, 2, 5)) == 2 * 4 * 6 * 6 * 9 * 2 * 5


def test_a_tile_may_have_columns_inside_a_gradient() -> None:
    """Of the places of a row that all windows reach, several stand in registers side by side."""
    largest = max(_gradient_by_the_input(4, 16, 8, 8), key=lambda k: work(k).flops)
    assert [a.extent for a in largest.domain] == [4, 16, 12, 8]
    assert {a for i in bounds(largest.values()) for a in i.axes} & {*largest.domain} == {largest.domain[1]}
    assert schedule(largest, narrowed("avx512")).tile is largest.domain[2]


@pytest.mark.parametrize(
    ("rows", "blocks"), [(64, [(4, 16)]), (100, [(4, 25)]), (130, [(8, 16), (1, 2)]), (67, [(4, 16), (1, 3)]), (50, [(2, 25)])]
)
def test_rows_that_are_left_lie_beside_whole_blocks(rows: int, blocks: list[tuple[int, int]]) -> None:
    """The rows of a batch that no number from 16 to 64 divides, or none that fills vectors, are in lanes too."""
    x, y = np.ones((rows, 8, 7, 1), "f4"), np.zeros(rows, int)
    net = nn.Sequential(nn.Conv2D(3, 3, activation="relu"), nn.Flatten(), nn.Dense(2))
    net.fit(x, y, loss="cross_entropy", epochs=1, batch_size=rows, verbose=False)
    text = net.compiled.text("kernels")
    products = re.findall(r"kernel \w+ \[\w+<(\d+)\*? \w+<6 \w+<5 \w+<3 \w+<(\d+)\] over \[\w+<3 \w+<3\]", text)
    lanes = [(int(count), int(inside)) for count, inside in products]
    assert lanes == blocks
    assert sum(n * inside for n, inside in lanes) == rows


def _by_groups(w: Any, weight: Any) -> Any:
    y = np.einsum("bhwgcij,ijcgf->bhwgf", np.reshape(w, (*w.shape[:3], 3, 4, 3, 3)), np.reshape(weight, (3, 3, 4, 3, 4)))
    return np.reshape(y, (*w.shape[:3], 12))


def _groups_first(w: Any, weight: Any) -> Any:
    w = np.reshape(np.transpose(w, (0, 3, 1, 2, 4, 5)), (w.shape[0], 3, 4, *w.shape[1:3], 3, 3))
    return np.reshape(
        np.einsum("bgchwij,gfcij->bghwf", w, np.reshape(weight, (3, 4, 4, 3, 3))), (w.shape[0], 3, *w.shape[3:5], 4)
    )


def _filters_first(w: Any, weight: Any) -> Any:
    return np.einsum("bhwcij,fijc->bhwf", w, np.reshape(weight, (4, 3, 3, 12)))


def _each_channel(w: Any, weight: Any) -> Any:
    return np.einsum("bhwcij,ijcf->bhwcf", w, np.reshape(weight, (3, 3, 12, 4)))


@pytest.mark.parametrize("rows", [5, 32])
@pytest.mark.parametrize("product", [_by_groups, _groups_first, _filters_first, _each_channel])
def test_products_read_windows_where_they_are(product: Callable[[Any, Any], Any], rows: int) -> None:
    """Values and gradients of windows of a padded array, seen otherwise and multiplied; no array is as large as they are."""
    r = np.random.default_rng(0)
    arrays = [r.normal(size=(rows, 6, 7, 12)), r.normal(size=3 * 3 * 12 * 4)]

    def f(x: Any, weight: Any) -> Any:
        w = windows(np.pad(np.tanh(x), ((0, 0), (1, 1), (1, 1), (0, 0))), [1, 2], [3, 3])
        return np.sum(np.maximum(product(w, weight), 0) ** 2)

    both = lambda *a: cr.value_and_grad(f, (0, 1))(*a)
    graph = normalize(trace_function(both, arrays)[0])
    for a, b in zip(backend_of().function(graph)(arrays), evaluate(graph, arrays), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)
    largest = max(s.buffer.size for k in _kernels(both, arrays) for s in k.stores)
    assert largest < rows * 6 * 7 * 12 * 9


@pytest.mark.parametrize("rows", [15, 16])
@pytest.mark.parametrize("groups", [2, 8])
def test_groups_take_as_much_memory_as_one(groups: int, rows: int) -> None:
    """Of a step: activations, and none of the windows."""
    x, y = np.ones((rows, 8, 8, 8), "f4"), np.zeros(rows, int)
    bytes_ = []
    for g in (1, groups):
        convolutions = [nn.Conv2D(8, 3, padding="same", activation="relu", groups=g) for _ in range(3)]
        net = nn.Sequential(*convolutions, nn.GlobalAvgPool(), nn.Dense(2))
        net.fit(x, y, loss="cross_entropy", epochs=1, batch_size=rows, verbose=False)
        bytes_.append(net.compiled.plan().bytes)
    assert bytes_[1] < 1.2 * bytes_[0]


class Last(nn.Module):
    """Keeps what it saw last, if that was a whole batch."""

    def __call__(self, x: Any) -> Any:
        last = self.statistic("last", (67, *x.shape[1:]))
        if x.shape[0] == 67:
            self.update("last", np.tanh(x))
        return x + np.mean(last)


class Picture(nn.Module):
    """One picture that is learnt, seen through a convolution."""

    def __init__(self) -> None:
        self.conv = nn.Conv2D(3, 3, padding="same", activation="tanh")

    def __call__(self, x: Any) -> Any:
        return x + np.mean(self.conv(self.parameter("image", (1, 8, 9, 2), "glorot_uniform")), axis=(1, 2))


STATES: dict[str, tuple[tuple[int, ...], Callable[[], list[nn.Module]]]] = {
    "rows that are left": ((6, 5, 1), lambda: [nn.Conv2D(3, 3), Last(), nn.Flatten(), nn.Dense(3)]),
    "parts of a gradient": ((3,), lambda: [Picture(), nn.Dense(3)]),
}


@pytest.mark.parametrize("name", STATES)
def test_state_that_several_kernels_write(name: str) -> None:
    shape, make = STATES[name]
    r = np.random.default_rng(5)
    x, y = r.normal(size=(67, *shape)), r.integers(0, 3, 67)
    ends = []
    for backend in ("native", "reference"):
        net = nn.Sequential(*make())
        net.fit(x, y, loss="cross_entropy", epochs=3, batch_size=67, seed=1, dtype="float64", backend=backend, verbose=False)
        ends.append(state(net))
    for key, a in ends[0].items():
        np.testing.assert_allclose(a, ends[1][key], rtol=1e-8, atol=1e-10, err_msg=key)


@pytest.mark.parametrize(("rows", "blocks"), [(64, True), (67, False)])
def test_blocks_go_through_kernels_side_by_side(rows: int, blocks: bool) -> None:
    """The entry loops over them; kernels that share out features do not take blocks for their units."""
    r = np.random.default_rng(0)
    x, y = r.normal(size=(rows, 8, 7, 2)).astype("f4"), r.integers(0, 3, rows)
    net = nn.Sequential(nn.Conv2D(6, 3), nn.BatchNorm(), nn.MaxPool2D(2), nn.Flatten(), nn.Dense(3))
    net.fit(x, y, loss="cross_entropy", epochs=1, batch_size=rows, verbose=False)
    text = net.compiled.text("llvm")
    called = re.findall(r"@(k\d+)\(ptr %table, i64 %count", text)
    assert bool(called) == blocks
    kernels = net.compiled.text("kernels")
    for name in called:
        assert re.search(rf"kernel {name} \[(\w+<\d+ )*\w+<{rows // 16}\*", kernels), name
