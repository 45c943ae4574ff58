"""How matrices of a state are stored: which lie transposed, what is made of them, values, bits."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from native import SMALL, Threaded, registered
from native_networks import check_layer, check_optimizer, check_weights_as_they_are_seen
from same import assert_same
from test_layers import CASES as LAYER_CASES
from test_layers import IDS as LAYER_IDS
from training import OPTIMIZERS

import chainrule as cr
from chainrule import nn
from chainrule.compiler import layout
from chainrule.compiler.kernels import Kernel, kernels_of
from chainrule.compiler.layout import Storage, rows_of_panel
from chainrule.compiler.target import host, narrowed, runnable
from chainrule.losses import losses
from chainrule.run.native import NativeBackend
from chainrule.train.objective import initial_slots, make_program

Array = np.ndarray
LEVELS = ("avx512", "avx2", "sse2")
ADAM = cr.Adam()


def several(rows: int, target: Any, most: int) -> int:
    """Rows of a panel, so that there are several wherever that is possible."""
    return next((rows // n for n in range(most, 1, -1) if rows % n == 0 and rows // n > 1), rows)


@pytest.fixture
def all_transposed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every matrix by which products multiply and that follows no layer of as many units lies transposed."""
    monkeypatch.setattr(layout, "LEAST_TRANSPOSED", 2)
    monkeypatch.setattr(layout, "NARROW", 2.0)
    monkeypatch.setattr(layout, "rows_of_panel", partial(several, most=getattr(request, "param", 3)))


# ---- there and back ----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 3000), st.integers(0, 40), st.sampled_from(LEVELS))
def test_there_and_back(rows: int, columns: int, level: str) -> None:
    shape = (rows, columns)
    array = np.arange(rows * columns).reshape(shape)
    target = narrowed(level)
    for transposed in ((), ((shape, rows_of_panel(rows, target)),) if rows else ()):
        storage = Storage(target, transposed)
        inside = storage.laid_out(array)
        assert inside.shape == storage.physical(shape)
        np.testing.assert_array_equal(storage.logical(inside.copy(), shape), array)


def test_a_square_matrix_comes_back_as_it_was() -> None:
    storage = Storage(host(), (((6, 6), 3),))
    array = np.arange(36).reshape(6, 6)
    np.testing.assert_array_equal(storage.logical(storage.laid_out(array), (6, 6)), array)


def test_a_panel_holds_some_rows_of_all_columns() -> None:
    array = np.arange(3000).reshape(1000, 3)
    np.testing.assert_array_equal(Storage(host(), (((1000, 3), 500),)).laid_out(array)[1], array[500:].T)


@given(st.integers(1, 100_000), st.sampled_from(LEVELS))
def test_panels_of_rows_are_equal_and_few(rows: int, level: str) -> None:
    size = rows_of_panel(rows, narrowed(level))
    assert rows % size == 0
    assert rows // size <= 16


# ---- which ones --------------------------------------------------------------------------------------------------------------


def session_of(net: nn.Module, x: Array, outputs: int = 10) -> tuple[Any, Any]:
    """A session that takes training steps of the network, and its program; no code is made."""
    t = np.zeros((len(x), outputs), np.float32)
    net.fit(x, t, epochs=0, optimizer=ADAM)
    program = make_program(net._task(losses["mse"](), t, False, ADAM), len(x), ("step",))
    start = {**net._state(), **initial_slots(ADAM, net.parameters, np.float32)}
    backend = NativeBackend(replace(narrowed("avx512"), cores=2))
    return backend.session({len(x): program}, start), program


def transposed_in(net: nn.Module, x: Array) -> list[tuple[int, ...]]:
    session, _ = session_of(net, x)
    return [shape for shape, _ in session._storage.transposed]


NUMBERS, WORDS = np.ones((4, 1000), np.float32), np.zeros((4, 6), np.int64)
FOUND: dict[str, tuple[Callable[[], nn.Module], Array, list[tuple[int, ...]]]] = {
    "one layer": (lambda: nn.Dense(10), NUMBERS, [(1000, 10)]),
    "first of two": (lambda: nn.Sequential(nn.Dense(20, "relu"), nn.Dense(10)), NUMBERS, [(1000, 20)]),
    "behind others": (lambda: nn.Sequential(nn.Dropout(0.1), nn.BatchNorm(), nn.Dense(10)), NUMBERS, [(1000, 10)]),
    "not after as many units": (lambda: nn.Sequential(nn.Dense(600, "relu"), nn.Dense(10)), NUMBERS, []),
    "not where columns fill lanes": (lambda: nn.Sequential(nn.Dense(16, "relu"), nn.Dense(10)), NUMBERS, []),
    "not one column": (lambda: nn.Sequential(nn.Dense(1), nn.Dense(10)), NUMBERS, []),
    "not if it is short": (lambda: nn.Dense(10), NUMBERS[:, :500], []),
    "not a table": (lambda: nn.Sequential(nn.Embedding(1000, 4), nn.Flatten(), nn.Dense(10)), WORDS, []),
    "not in a loop": (lambda: nn.Sequential(nn.RNN(10), nn.Dense(10)), NUMBERS[:, None], []),
}


@pytest.mark.parametrize("kind", FOUND)
def test_which_lie_transposed(kind: str) -> None:
    make, x, want = FOUND[kind]
    assert transposed_in(make(), x) == want


class Tied(nn.Module):
    """A table that a product reads too; loop: it is looked up by the steps of one."""

    def __init__(self, loop: bool) -> None:
        self.loop = loop

    def __call__(self, words: Any) -> Any:
        table = self.parameter("table", (1000, 10), "normal")
        if self.loop:
            found = cr.scan(lambda h, w: (h + np.take(table, w, axis=0), None), np.zeros((len(words), 10), np.float32), words.T)[
                0
            ]
        else:
            found = np.take(table, words[:, 0], axis=0)
        return found + np.ones((1, 1000), np.float32) @ table


@pytest.mark.parametrize("loop", [False, True])
def test_a_table_that_a_product_reads_too_is_none(loop: bool) -> None:
    assert transposed_in(Tied(loop), WORDS) == []


# ---- what is made of them ----------------------------------------------------------------------------------------------------


def step(inputs: int, outputs: int = 10, rows: int = 64) -> Any:
    """A training step of one layer, its work cut for two threads, through all passes but LLVM."""
    session, program = session_of(nn.Dense(outputs), np.ones((rows, inputs), np.float32), outputs)
    entry = program.entries["step"]
    dtypes = tuple(program.inputs[i].type.dtype if program.inputs[i].rows is not None else None for i in entry.inputs)
    backend = session._backend
    return backend._compiled(program, entry, dtypes, session._slots, storage=session._storage, threads=2)


def touching(code: Any, buffer: str) -> list[Kernel]:
    every = [k for items in code.plan.phases for k in kernels_of(items)]
    return [k for k in every if any(v.buffer and v.buffer.name == buffer for v in k.loads())]


def test_threads_share_out_panels_and_meet_twice() -> None:
    code = step(1000)
    assert len(code.plan.phases) == 3
    product, update = touching(code, "weight")
    for kernel in (product, update):  # each thread reads those weights only that it writes
        (index,) = {v.index for v in kernel.loads() if v.buffer and v.buffer.name == "weight"}
        assert kernel.unit in index[0].axes
        assert kernel.unit.extent == 2
    assert update.reduced, "the gradient is summed where it is used"


def test_what_is_written_transposed_is_gone_through_as_it_lies() -> None:
    """The gradient's norm is known before the update, which reads the gradient from memory: a line for each panel."""
    net, x = nn.Dense(5), np.ones((64, 1000), np.float32)
    with registered(Threaded(1)) as name:
        net.fit(x, np.ones((64, 5), np.float32), optimizer=cr.Adam(clip_norm=1.0), backend=name, batch_size=64, verbose=False)
        code = net.compiled._request("step", None).code(1)
    (update,) = (k for k in touching(code, "slot/weight.m") if not k.reduced)
    store = next(s for s in update.stores if s.buffer.name == "weight")
    assert len(store.index) == 3
    assert [i for a in update.domain for i in store.index if i.axes == {a}] == list(store.index)


def test_rows_of_data_are_fetched_a_tile_ahead() -> None:
    text = step(1000).stage("loops")
    product = next(f for f in text.split("\n\n") if "fetch in/x" in f)
    assert "constant  value=63" in product  # the last tile fetches a row that exists
    rows = re.findall(r"= step/order\[(\d+)\*(\w+)( \+ \d+)?\]", product)
    size = int(rows[0][0])
    assert size > 1
    ahead = set(re.findall(r"iota  address=(\d+\*\w+ \+ \d+)", product))
    assert ahead == {f"{size}*{variable} + {size + int(more[3:] or 0)}" for _, variable, more in rows}
    lines = product.splitlines()
    for at in (n for n, line in enumerate(lines) if "fetch in/x" in line):  # of the same place in that row
        assert re.sub(r"r\d+\*", "r*", lines[at].split("fetch ")[1].split(",")[0]) in re.sub(r"r\d+\*", "r*", lines[at - 1])


@pytest.mark.parametrize("inputs", [64, 500])
def test_nothing_is_fetched_where_no_lanes_go_through_rows(inputs: int) -> None:
    assert "fetch" not in step(inputs).stage("loops")


# ---- values ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "example"), LAYER_CASES, ids=LAYER_IDS)
def test_every_layer(all_transposed: None, name: str, example: dict[str, Any]) -> None:
    check_layer(name, example)


@pytest.mark.parametrize(("name", "options"), OPTIMIZERS[::3])
def test_epochs_with_optimizers(all_transposed: None, name: str, options: dict[str, Any]) -> None:
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


@pytest.mark.parametrize("level", runnable())
@pytest.mark.parametrize("kind", NETS)
def test_networks_as_by_the_reference(all_transposed: None, kind: str, level: str) -> None:
    with registered(NativeBackend(target=narrowed(level))) as name:
        got, want = (learnt(kind, 45, backend, dtype="float64") for backend in (name, "reference"))
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-8, atol=1e-10, err_msg=name)


@pytest.mark.parametrize(("rows", "all_transposed"), [(45, 7), (2, 1)], indirect=["all_transposed"])
@pytest.mark.parametrize("kind", NETS)
def test_any_number_of_threads_gives_the_same_bits(all_transposed: None, kind: str, rows: int) -> None:
    target = replace(host(), panels=SMALL, cores=2)
    runs = []
    for threads in (1, 2, 3, 5):
        with registered(Threaded(threads, target=target)) as name:
            runs.append(learnt(kind, rows, name))
    for other in runs[1:]:
        assert_same(other, runs[0])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("inputs", "outputs"), [(999, 2), (1000, 5), (784, 2), (2048, 5)])
def test_real_sizes_as_by_the_reference(inputs: int, outputs: int, threads: int) -> None:
    """With so few columns that they leave any processor's lanes empty."""
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
    check_weights_as_they_are_seen(600, 2)


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
    assert (600, 5) in dict(backend.sessions[0]._storage.transposed)
    for key, value in want.items():
        np.testing.assert_allclose(got[key], value, rtol=1e-9, atol=1e-11, err_msg=key)
