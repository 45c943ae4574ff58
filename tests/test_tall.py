"""Tall matrices with few columns, which lie transposed: which they are, what is made of them, values, bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from native import SMALL, Threaded, registered
from native_networks import check_layer, check_optimizer
from same import assert_same
from test_layers import CASES as LAYER_CASES
from test_layers import IDS as LAYER_IDS
from training import OPTIMIZERS

import chainrule as cr
from chainrule import nn
from chainrule.compiler import layout
from chainrule.compiler.kernels import Kernel, kernels_of
from chainrule.compiler.layout import laid_out, logical, panels, physical, tall
from chainrule.compiler.target import host, narrowed
from chainrule.run.backend import backends
from chainrule.run.native import NativeBackend

Array = np.ndarray
LEVELS = ("avx512", "avx2", "sse2")


@pytest.fixture
def all_tall(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every matrix that products read and that follows no layer of as many units lies transposed."""
    monkeypatch.setattr(layout, "TALL", 2)
    monkeypatch.setattr(layout, "NARROW", 2.0)


# ---- layout ------------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 5000), st.integers(0, 40), st.sampled_from(LEVELS))
def test_there_and_back(rows: int, columns: int, level: str) -> None:
    target, shape = narrowed(level), (rows, columns)
    array = np.arange(rows * columns).reshape(shape)
    for transposed in ([], [shape] if rows > columns else []):
        inside = laid_out(array, target, transposed)
        assert inside.shape == physical(shape, target, transposed)
        np.testing.assert_array_equal(logical(inside.copy(), shape), array)


def test_a_panel_holds_some_rows_of_all_columns() -> None:
    array = np.arange(3000).reshape(1000, 3)
    np.testing.assert_array_equal(laid_out(array, host(), [(1000, 3)])[1], array[500:].T)


@given(st.integers(1, 100_000), st.sampled_from(LEVELS))
def test_panels_of_rows_are_equal_and_few(rows: int, level: str) -> None:
    found = panels((rows, 3), narrowed(level), [(rows, 3)])
    assert found is not None
    axis, size = found
    assert axis == 0
    assert rows % size == 0
    assert rows // size <= 16


# ---- which ones --------------------------------------------------------------------------------------------------------------


def tall_of(net: nn.Module, x: Array, outputs: int = 10) -> tuple[Any, ...]:
    """The shapes of matrices that lie transposed while the network learns."""
    found = []

    class Looking(NativeBackend):
        def session(self, *args: Any, **kwargs: Any) -> Any:
            made: Any = super().session(*args, **kwargs)
            found.append(made._tall)
            return made

    with registered(Looking(target=narrowed("avx512"))) as name:
        net.fit(x, np.zeros((len(x), outputs)), epochs=1, backend=name, verbose=False)
    return found[0]


NUMBERS, WORDS = np.ones((4, 1000), np.float32), np.zeros((4, 6), np.int64)
TALL: dict[str, tuple[Callable[[], nn.Module], Array, tuple[Any, ...]]] = {
    "one layer": (lambda: nn.Dense(10), NUMBERS, ((1000, 10),)),
    "first of two": (lambda: nn.Sequential(nn.Dense(20, "relu"), nn.Dense(10)), NUMBERS, ((1000, 20),)),
    "in a module": (lambda: nn.Sequential(nn.Dropout(0.1), nn.BatchNorm(), nn.Dense(10)), NUMBERS, ((1000, 10),)),
    "not after as many units": (lambda: nn.Sequential(nn.Dense(600, "relu"), nn.Dense(10)), NUMBERS, ()),
    "not where columns fill lanes": (lambda: nn.Sequential(nn.Dense(16, "relu"), nn.Dense(10)), NUMBERS, ()),
    "not one column": (lambda: nn.Sequential(nn.Dense(1), nn.Dense(10)), NUMBERS, ()),
    "not if it is short": (lambda: nn.Dense(10), NUMBERS[:, :500], ()),
    "not a table": (lambda: nn.Sequential(nn.Embedding(1000, 4), nn.Flatten(), nn.Dense(10)), WORDS, ()),
    "not in a loop": (lambda: nn.Sequential(nn.RNN(10), nn.Dense(10)), NUMBERS[:, None], ()),
}


@pytest.mark.parametrize("kind", TALL)
def test_which_lie_transposed(kind: str) -> None:
    make, x, want = TALL[kind]
    assert tall_of(make(), x) == want


def test_a_table_that_a_product_reads_too_is_none() -> None:
    class Tied(nn.Module):
        def __call__(self, words: Any) -> Any:
            table = self.parameter("table", (1000, 10), "normal")
            return np.take(table, words[:, 0], axis=0) + np.ones((1, 1000), np.float32) @ table

    assert tall_of(Tied(), WORDS) == ()


def test_order_of_shapes_is_always_the_same() -> None:
    shapes = [(900, 5), (1000, 5), (900, 3)]
    assert tall(shapes, shapes, host()) == tall(shapes[::-1], shapes[::-1], host()) == ((900, 3), (900, 5), (1000, 5))


# ---- what is made of them ----------------------------------------------------------------------------------------------------


def step(inputs: int, rows: int) -> Any:
    """A training step of one layer with ten units."""
    net = nn.Dense(10)
    with registered(Threaded(2, target=replace(narrowed("avx512"), cores=2))) as name:
        net.fit(np.ones((rows, inputs), np.float32), np.arange(rows) % 10, loss="cross_entropy", epochs=1, batch_size=rows,
                optimizer=cr.Adam(), backend=name, threads=2, verbose=False)  # fmt: skip
        return net.compiled._request("step", None).code(2)


def touching(code: Any, buffer: str) -> list[Kernel]:
    every = [k for items in code.plan.phases for k in kernels_of(items)]
    return [k for k in every if any(v.buffer and v.buffer.name == buffer for v in k.loads())]


def test_threads_share_out_panels_and_meet_twice() -> None:
    code = step(1000, 64)
    assert len(code.plan.phases) == 3
    for kernel in touching(code, "weight"):  # each thread reads those weights only that it writes
        (index,) = {v.index for v in kernel.loads() if v.buffer and v.buffer.name == "weight"}
        assert kernel.unit in index[0].axes
        assert kernel.unit.extent == 2


def test_rows_of_data_are_fetched_a_tile_ahead() -> None:
    text = step(1000, 64).stage("loops")
    product = next(f for f in text.split("\n\n") if "fetch in/x" in f)
    assert "constant  value=63" in product  # the last tile fetches a row that exists
    assert (
        product.count("minimum") == product.count("fetch in/x") // 2
    )  # where whole vectors are summed, and where the last one is not


def test_nothing_is_fetched_where_no_lanes_go_through_rows() -> None:
    assert "fetch" not in step(64, 64).stage("loops")


# ---- values ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "example"), LAYER_CASES, ids=LAYER_IDS)
def test_every_layer(all_tall: None, name: str, example: dict[str, Any]) -> None:
    check_layer(name, example)


@pytest.mark.parametrize(("name", "options"), OPTIMIZERS[::3])
def test_epochs_with_optimizers(all_tall: None, name: str, options: dict[str, Any]) -> None:
    check_optimizer(name, options)


class Odd(nn.Module):
    """Reads a weight in many ways."""

    def __call__(self, x: Any) -> Any:
        w = self.parameter("w", (12, 6), "glorot_uniform")
        part = x[:, :6]
        return x @ w + part @ w[::2] + part @ w.reshape(6, 12)[:, :6] + part @ w[::-1][3:9] + part @ w.T[:, :6] + part @ w[2:8]


NETS: dict[str, Callable[[], nn.Module]] = {
    "one": lambda: nn.Sequential(nn.Dense(3)),
    "odd": lambda: nn.Sequential(Odd(), nn.Dense(3)),
    "norm": lambda: nn.Sequential(
        nn.BatchNorm(), nn.Dense(7, "tanh"), nn.Dropout(0.3), nn.Dense(5, "gelu"), nn.LayerNorm(), nn.Dense(3)
    ),
    "loop": lambda: nn.Sequential(nn.Reshape(3, 4), nn.GRU(5), nn.Dense(3)),
}


def learnt(kind: str, rows: int, backend: str, **options: Any) -> dict[str, Array]:
    r = np.random.default_rng(rows)
    x, y = r.normal(size=(rows, 12)).astype(np.float32), r.normal(size=(rows, 3)).astype(np.float32)
    net = NETS[kind]()
    run = net.fit(
        x, y, epochs=2, batch_size=16, optimizer=cr.AdamW(0.01, clip_norm=1.0), backend=backend, verbose=False, **options
    )
    found = {**net.parameters, "loss": np.array(run.loss), "scores": net.predict(x, backend=backend)}
    return {**found, **net.gradients(x[:9], y[:9], backend=backend)} if kind != "norm" else found


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", NETS)
def test_networks_as_by_the_reference(all_tall: None, kind: str, level: str) -> None:
    with registered(NativeBackend(target=narrowed(level))) as name:
        got, want = (learnt(kind, 45, backend, dtype="float64") for backend in (name, "reference"))
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-8, atol=1e-10, err_msg=name)


@pytest.mark.parametrize("rows", [45, 2])
@pytest.mark.parametrize("kind", NETS)
def test_any_number_of_threads_gives_the_same_bits(all_tall: None, kind: str, rows: int) -> None:
    target = replace(host(), panels=SMALL, cores=2)
    runs = []
    for threads in (1, 2, 3, 5):
        with registered(Threaded(threads, target=target)) as name:
            runs.append(learnt(kind, rows, name))
    for other in runs[1:]:
        assert_same(other, runs[0])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("inputs", "outputs"), [(999, 10), (1000, 20), (784, 3), (2048, 10)])
def test_real_sizes_as_by_the_reference(inputs: int, outputs: int, threads: int) -> None:
    r = np.random.default_rng(inputs)
    x, y = r.normal(size=(100, inputs)), r.integers(0, outputs, 100)

    def run(backend: str) -> dict[str, Array]:
        net = nn.Dense(outputs)
        history = net.fit(x, y, loss="cross_entropy", epochs=2, batch_size=32, dtype="float64", backend=backend, verbose=False)
        return {**net.parameters, "loss": np.array(history.loss), "predicted": net.predict(x[:7], backend=backend)}

    with registered(Threaded(threads)) as name:
        got, want = run(name), run("reference")
    for key, value in want.items():
        np.testing.assert_allclose(got[key], value, rtol=1e-9, atol=1e-11, err_msg=key)


def test_state_goes_in_and_comes_out_as_it_is_seen() -> None:
    net = nn.Dense(3)
    net.fit(np.ones((4, 600)), np.ones((4, 3)), epochs=0)
    weight = np.arange(1800, dtype=np.float32).reshape(600, 3)
    net.load_parameters({"weight": weight, "bias": np.zeros(3)})
    net.fit(np.zeros((4, 600)), np.zeros((4, 3)), epochs=1, optimizer=cr.SGD(0.1))
    np.testing.assert_array_equal(net.parameters["weight"], weight)
    np.testing.assert_array_equal(net.predict(np.eye(600)), weight)
    assert backends["native"] is not None


@pytest.mark.parametrize("threads", [1, 2])
def test_state_of_rows_that_has_the_shape_of_a_tall_matrix(threads: int) -> None:
    """What a recurrent layer hands on from window to window is (rows, units); here as large as a weight that lies transposed. It is made
    in blocks of rows, which are no parts of panels."""

    class Net(nn.Module):
        def __init__(self) -> None:
            self.rnn, self.last = nn.RNN(5, return_sequences=True), nn.TimeDistributed(nn.Dense(2))

        def __call__(self, x: Any) -> Any:
            return self.last(self.rnn(x @ self.parameter("w", (600, 5), "glorot_uniform")))

    r = np.random.default_rng(0)
    x, y = r.normal(size=(600, 4, 600)), r.normal(size=(600, 4, 2))

    def run(backend: str) -> dict[str, Array]:
        net = Net()
        learnt = net.fit(
            x, y, loss="mse", truncate=(2, 2), epochs=1, batch_size=600, dtype="float64", backend=backend, verbose=False
        )
        return {**net.parameters, "loss": np.array(learnt.loss)}

    backend = Threaded(threads)
    with registered(backend) as name:
        got, want = run(name), run("reference")
    assert (600, 5) in backend.sessions[0]._tall
    for key, value in want.items():
        np.testing.assert_allclose(got[key], value, rtol=1e-9, atol=1e-11, err_msg=key)
