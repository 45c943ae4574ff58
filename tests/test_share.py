"""What threads share out, and matrices in panels: plans of known networks by hand; values and bits of all kinds of networks with panels
so small that every matrix lies in some, and for machines of few and many processors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
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
from chainrule.compiler.affine import Axis, of
from chainrule.compiler.alike import likeness
from chainrule.compiler.kernels import Buffer, Kernel, Store, constant, elementwise, kernels_of, load
from chainrule.compiler.layout import Storage
from chainrule.compiler.schedule import units
from chainrule.compiler.target import host
from chainrule.run.backend import backends

Array = np.ndarray
CORES = (1, 2, 16)


@pytest.fixture(params=CORES, ids=lambda n: f"{n} cores")
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The native backend with small panels, for a machine of so many processors."""
    monkeypatch.setattr(backends["native"], "_target", replace(host(), panels=SMALL, cores=request.param))


# ---- layout ------------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 9), max_size=3).map(tuple), st.sampled_from([SMALL, (64, 48, 32), (1,)]))
def test_there_and_back(shape: tuple[int, ...], panels: tuple[int, ...]) -> None:
    storage = Storage(replace(host(), panels=panels))
    array = np.random.default_rng(0).normal(size=shape)
    inside = storage.laid_out(array)
    assert inside.shape == storage.physical(shape)
    np.testing.assert_array_equal(storage.logical(inside.copy(), shape), array)


def test_a_panel_holds_some_columns_of_all_rows() -> None:
    array = np.arange(12.0).reshape(2, 6)
    inside = Storage(replace(host(), panels=(3,))).laid_out(array)
    np.testing.assert_array_equal(inside, [[[0, 1, 2], [6, 7, 8]], [[3, 4, 5], [9, 10, 11]]])


# ---- plans -------------------------------------------------------------------------------------------------------------------


def kernels(
    net: nn.Module, inputs: int | tuple[int, ...], classes: int, rows: int, cores: int, threads: int = 2
) -> list[list[Kernel]]:
    """The kernels of a training step, phase by phase."""
    backend = Threaded(threads, target=replace(host(), cores=cores))
    given = tuple(np.ones((rows, n), np.float32) for n in (inputs if isinstance(inputs, tuple) else (inputs,)))
    x, y = given if len(given) > 1 else given[0], np.arange(rows) % classes
    with registered(backend) as name:
        net.fit(x, y, loss="cross_entropy", optimizer=cr.Adam(), batch_size=rows, backend=name, threads=threads)
        code = net.compiled._request("step", None).code(threads)
    return [list(kernels_of(items)) for items in code.plan.phases]


def digits() -> nn.Module:
    return nn.Sequential(nn.Dense(128, "relu"), nn.Dense(10))


def unit_of(kernel: Kernel, buffer: str) -> int | None:
    """The dimension of the buffer that this kernel shares out, where it writes it."""
    (store,) = (s for s in kernel.stores if s.buffer.name == buffer)
    found = [d for d, i in enumerate(store.index) if kernel.unit in getattr(i, "axes", ())]
    return found[0] if found else None


def writer(phases: Sequence[Sequence[Kernel]], buffer: str) -> Kernel:
    (found,) = (k for items in phases for k in items if any(s.buffer.name == buffer for s in k.stores))
    return found


def test_a_small_network_is_cut_along_its_hidden_units() -> None:
    phases = kernels(digits(), 64, 10, 32, cores=2)
    assert len(phases) == 3  # the hidden layer and partial sums; scores and loss; backward and update
    update = writer(phases, "0.weight")
    assert unit_of(update, "0.weight") == 0  # its panels
    readers = [k for items in phases for k in items if any(v.buffer and v.buffer.name == "0.weight" for v in k.loads())]
    for kernel in readers:  # each thread reads those weights only that it writes
        (index,) = {v.index for v in kernel.loads() if v.buffer and v.buffer.name == "0.weight"}
        assert kernel.unit in index[0].axes


def test_rows_are_cut_where_there_are_more_processors_than_panels() -> None:
    phases = kernels(nn.Sequential(nn.Dense(256, "relu"), nn.Dense(128, "relu"), nn.Dense(10)), 784, 10, 512, cores=32)
    first = next(k for items in phases for k in items if k.reduced and k.reduced[-1].extent == 784)
    assert first.unit is not None
    assert first.unit.extent == 512


@pytest.mark.parametrize("inputs", [400, 402, 100])
def test_a_tall_matrix_is_cut_along_its_rows(inputs: int) -> None:
    """Where partial sums are less than the matrix, and rows can be cut in four."""
    phases = kernels(nn.Sequential(nn.Dense(20, "tanh"), nn.Dense(10)), inputs, 10, 32, cores=2)
    readers = [k for items in phases for k in items if any(v.buffer and v.buffer.name == "0.weight" for v in k.loads())]
    assert len(readers) == 2  # the product, and the update
    for kernel in readers:
        (index,) = {v.index for v in kernel.loads() if v.buffer and v.buffer.name == "0.weight"}
        assert (kernel.unit in index[0].axes and kernel.unit.extent == 4) == (inputs == 400)


class Towers(nn.Module):
    """Two layers side by side, each for an input of its own; activated before or after they are joined."""

    def __init__(self, before: bool) -> None:
        self.before = before

    def __call__(self, x: Any, y: Any) -> Any:
        parts = []
        for name, part, width in (("a", x, 64), ("b", y, 32)):
            weight = self.parameter(name, (part.shape[-1], width), "glorot_uniform")
            parts.append(np.maximum(part @ weight, 0) if self.before else part @ weight)
        joined = np.concatenate(parts, axis=1)
        return (joined if self.before else np.maximum(joined, 0)) @ self.parameter("c", (96, 10), "glorot_uniform")


def test_gradients_are_shared_out_as_threads_read_least_of_each_other() -> None:
    """The data is nobody's; of errors that both have written each reads those of its units only."""
    phases = kernels(Towers(before=False), (40, 24), 10, 64, cores=2)
    assert len(phases) == 2, "rows go through all layers without waiting, as they did"
    for name in ("a", "b"):
        update = writer(phases, name)
        read = [v for v in update.loads() if v.axes & set(update.reduced) and v.buffer and v.buffer.name.startswith("t")]
        assert len(read) == 1, [str(v.buffer) for v in read]
        assert any(update.unit in i.axes for i in read[0].index)


def test_branches_are_shared_out_along_their_units() -> None:
    """Of a product of what is joined each branch has its own, so what goes around is a sum for each of its panels."""
    phases = kernels(Towers(before=True), (40, 24), 10, 64, cores=2)
    assert len(phases) == 3
    first = writer(phases, "a")
    assert unit_of(first, "a") == 0, "its panels"
    (product,) = (k for k in phases[0] if k.reduced and any(v.buffer and v.buffer.name == "a" for v in k.loads()))
    assert product.unit is not None
    assert first.unit is not None
    assert product.unit.extent == first.unit.extent == 2
    second = writer(phases, "b")
    assert unit_of(second, "b") == 1, "halves of the columns of its only panel"
    assert second.unit is not None
    assert second.unit.extent == 2


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_branches_learn_what_the_reference_learns(before: bool, dtype: str) -> None:
    r = np.random.default_rng(0)
    x, y = tuple(r.normal(size=(150, n)) for n in (40, 24)), r.integers(0, 10, 150)
    found = []
    for threads in (1, 2, 3, None):
        net = Towers(before)
        with registered(Threaded(threads)) if threads else nullcontext("reference") as backend:
            net.fit(x, y, loss="cross_entropy", epochs=2, batch_size=64, backend=backend, dtype=dtype)
        found.append(dict(net.parameters))
    for other in found[1:3]:
        assert_same(other, found[0])
    for name, value in found[3].items():
        np.testing.assert_allclose(found[0][name], value, rtol=1e-7 if dtype == "float64" else 1e-2, atol=1e-3, err_msg=name)


def test_late_copies_follow_and_hold_nothing_back() -> None:
    """A copy of a weight in another order is made by the thread that has written it, whichever that is."""
    phases = kernels(nn.Sequential(*(nn.Dense(n, "tanh") for n in (16, 32, 64)), nn.Dense(10)), 8, 10, 64, cores=2)
    assert unit_of(writer(phases, "1.weight"), "1.weight") == 1


def test_no_two_threads_write_to_one_line_of_memory() -> None:
    """Ten columns could be shared out in the same way, but would end in the middle of a line."""
    phases = kernels(nn.Sequential(*(nn.Dense(24, "tanh") for _ in range(3)), nn.Dense(10)), 64, 10, 64, cores=2)
    for kernel in (k for items in phases for k in items if k.reduced and k.unit is not None and len(k.domain) > 1):
        for store in kernel.stores:
            if store.index and store.index[-1] == of(kernel.unit):
                assert store.buffer.dtype.itemsize * units(kernel.unit.extent, 2)[1] % 64 == 0


def test_columns_of_a_product_are_not_cut_as_rows() -> None:
    phases = kernels(nn.Sequential(nn.Dense(200, "tanh"), nn.Dense(10)), 20, 10, 4, cores=2)
    (scores,) = (
        k for items in phases for k in items if k.reduced and any(v.buffer and v.buffer.name == "1.weight" for v in k.loads())
    )
    assert len(scores.reduced) == 1


TALL: dict[str, Callable[[], nn.Module]] = {
    "regression": lambda: nn.Sequential(nn.Dense(1)),
    "dropout": lambda: nn.Sequential(nn.Dropout(0.2), nn.Dense(10, "relu"), nn.Dense(3)),
    "norm": lambda: nn.Sequential(nn.BatchNorm(), nn.Dense(12, "gelu"), nn.LayerNorm(), nn.Dense(2)),
    "images": lambda: nn.Sequential(nn.Rescale(), nn.Flatten(), nn.Dense(10)),
    "twice": lambda: nn.Sequential(Twice(), nn.Dense(3)),
}


class Twice(nn.Module):
    """Two matrices of which the rows belong together."""

    def __call__(self, x: Any) -> Any:
        w, v = (self.parameter(name, (x.shape[-1], 5), "glorot_uniform") for name in "wv")
        return np.tanh(x @ w) * (x @ v)


@pytest.mark.parametrize("kind", TALL)
def test_tall_matrices_as_by_the_reference_in_the_same_bits(kind: str) -> None:
    r = np.random.default_rng(2)
    x = r.integers(0, 255, (45, 20, 10, 1)).astype(np.uint8) if kind == "images" else r.normal(size=(45, 200))

    def learnt(backend: str) -> dict[str, Array]:
        net = TALL[kind]()
        y = np.arange(45.0)[:, None] % np.array([2, 3, 5, 7, 2, 3, 5, 7, 2, 3])
        outputs = {"regression": 1, "norm": 2, "images": 10}.get(kind, 3)
        options = {"optimizer": cr.AdamW(0.01, clip_norm=1.0), "dtype": "float64", "backend": backend, "verbose": False}
        run = net.fit(x, y[:, :outputs], epochs=2, batch_size=16, **options)
        return {**net.parameters, "loss": np.array(run.loss)}

    runs = []
    for threads in (1, 2, 3, 5):
        with registered(Threaded(threads, target=replace(host(), cores=2))) as name:
            runs.append(learnt(name))
    for other in runs[1:]:
        assert_same(other, runs[0])
    for name, value in learnt("reference").items():
        np.testing.assert_allclose(runs[0][name], value, rtol=1e-8, atol=1e-10, err_msg=name)


def test_without_a_second_processor_sums_stay_whole() -> None:
    phases = kernels(digits(), 64, 10, 32, cores=1)
    assert {a.extent for a in writer(phases, "out/scores").reduced} == {2, 64}  # panels of the hidden layer, all in one kernel


# ---- kernels that are alike ---------------------------------------------------------------------------------------------------


def test_layers_of_one_size_are_made_once() -> None:
    net = nn.Sequential(*(nn.Dense(24, "tanh") for _ in range(9)), nn.Dense(24, "relu"), nn.Dense(2))
    net.fit(np.ones((16, 24), np.float32), np.ones((16, 2), np.float32), epochs=1)
    code = net.compiled._request("step", None).code()
    count = sum(len(list(kernels_of(items))) for items in code.plan.phases)
    assert count > 40
    assert len(code.functions) < 20


@pytest.mark.parametrize("change", ["buffer twice", "shape", "order of arguments", "constant", "unit"])
def test_what_differs_is_not_alike(change: str) -> None:
    def kernel(changed: bool) -> Kernel:
        def of_change(name: str) -> bool:
            return changed and change == name

        rows = 5 if of_change("shape") else 4
        i, j = Axis("i", rows), Axis("j", 3)
        a, b, c = (Buffer(n, (rows, 3), np.dtype("f4")) for n in "abc")
        index = (of(i), of(j))
        args = [load(a, index), load(a if of_change("buffer twice") else b, index)]
        args.reverse() if of_change("order of arguments") else None
        value = elementwise("subtract", a.dtype, args)
        value = elementwise("multiply", a.dtype, [value, constant(2.5 if of_change("constant") else 2.0, a.dtype)])
        return Kernel("k", (i, j), (), [Store(c, index, value)], j if of_change("unit") else i)

    plain, again, other = (likeness(kernel(changed)).key for changed in (False, False, True))
    assert plain == again
    assert (other != plain) == (change != "order of arguments")  # buffers are numbered as they come


# ---- values ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "example"), LAYER_CASES, ids=LAYER_IDS)
@pytest.mark.parametrize("small", [2], indirect=True)
def test_every_layer(small: None, name: str, example: dict[str, Any]) -> None:
    check_layer(name, example)


@pytest.mark.parametrize(("name", "options"), OPTIMIZERS[::3])
@pytest.mark.parametrize("small", [2], indirect=True)
def test_epochs_with_optimizers(small: None, name: str, options: dict[str, Any]) -> None:
    check_optimizer(name, options)


class Odd(nn.Module):
    """Reads a weight in ways that fit no panel: every second column, another shape, looked-up columns, from behind, transposed."""

    def __call__(self, x: Any) -> Any:
        w = self.parameter("w", (6, 12), "glorot_uniform")
        picked = np.take(w, np.array([1, 5, 1, 11, 0, 7]), axis=1)
        return x @ w[:, ::2] + x @ w.reshape(12, 6)[:6] + x @ picked + x @ w[:, ::-1][:, 3:9] + x @ w.T[:6, :6] + x @ w[:, 2:8]


NETS: dict[str, Callable[[], nn.Module]] = {
    "odd": lambda: nn.Sequential(Odd(), nn.Dense(3)),
    "norm": lambda: nn.Sequential(nn.Dense(12, "tanh"), nn.BatchNorm(), nn.Dropout(0.3), nn.Dense(8, "relu"), nn.Dense(3)),
    "table": lambda: nn.Sequential(nn.Embedding(6, 8), nn.Flatten(), nn.Dense(12, "gelu"), nn.LayerNorm(), nn.Dense(3)),
}


def data(kind: str, rows: int) -> tuple[Array, Array]:
    r = np.random.default_rng(rows)
    x = r.integers(0, 6, (rows, 6)) if kind == "table" else r.normal(size=(rows, 6)).astype(np.float32)
    return x, r.normal(size=(rows, 3)).astype(np.float32)


def learnt(kind: str, backend: str, **options: Any) -> dict[str, Array]:
    x, y = data(kind, 45)
    net = NETS[kind]()
    run = net.fit(x, y, epochs=2, batch_size=16, optimizer=cr.SGD(0.05, momentum=0.9), backend=backend, verbose=False, **options)
    found = {**net.parameters, "loss": np.array(run.loss), "scores": net.predict(x, backend=backend)}
    return {**found, **net.gradients(x[:9], y[:9], backend=backend)} if kind != "norm" else found


@pytest.mark.parametrize("kind", NETS)
def test_networks_as_by_the_reference(small: None, kind: str) -> None:
    got, want = (learnt(kind, backend, dtype="float64") for backend in ("native", "reference"))
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-9, atol=1e-11, err_msg=name)


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("cores", CORES)
def test_any_number_of_threads_gives_the_same_bits(kind: str, cores: int) -> None:
    target = replace(host(), panels=SMALL, cores=cores)
    runs = []
    for threads in (1, 2, 3, 5):
        with registered(Threaded(threads, target=target)) as name:
            runs.append(learnt(kind, name))
    for other in runs[1:]:
        assert_same(other, runs[0])


@pytest.mark.parametrize("sizes", [(128, 10), (256, 1), (96, 64, 3)])
def test_the_same_bits_with_whole_panels(sizes: tuple[int, ...]) -> None:
    """Networks of the widths that panels are made for, cut along hidden units."""
    r = np.random.default_rng(1)
    x, y = r.normal(size=(100, 20)).astype(np.float32), r.normal(size=(100, sizes[-1])).astype(np.float32)
    runs = []
    for threads in (1, 2, 3, 4):
        with registered(Threaded(threads, target=replace(host(), cores=2))) as name:
            net = nn.Sequential(*(nn.Dense(n, "tanh") for n in sizes))
            net.fit(x, y, epochs=3, batch_size=32, backend=name, verbose=False)
            runs.append(net.parameters)
    for other in runs[1:]:
        assert_same(other, runs[0])


def test_state_goes_in_and_comes_out_as_it_is_seen(small: None) -> None:
    check_weights_as_they_are_seen(6, 12)


class Parts(nn.Module):
    """Goes on with a part of what a product makes, or with that beside something else."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __call__(self, x: Any) -> Any:
        w = self.parameter("w", (30, 128), "glorot_uniform")
        y = x @ (np.roll(w, 1, axis=1) if self.kind == "weight turned" else w)
        beside = {"before": [y, x[:, :5]], "behind": [x[:, :5], y], "turned": [y[:, 127:], y[:, :127]]}
        if self.kind in beside:
            return np.tanh(2 * np.concatenate(beside[self.kind], axis=1))
        return {"some": lambda: np.tanh(y[:, :100]), "one": lambda: np.tanh(y[:, :1])}.get(self.kind, lambda: np.tanh(y))()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", ["before", "behind", "turned", "some", "one", "weight turned"])
def test_what_runs_through_no_whole_panels(kind: str, threads: int) -> None:
    r = np.random.default_rng(0)
    x = r.normal(size=(40, 30))
    y = r.normal(size=(40, {"before": 133, "behind": 133, "some": 100, "one": 1}.get(kind, 128)))

    def run(backend: str) -> dict[str, Array]:
        net = nn.Sequential(Parts(kind))
        learnt = net.fit(x, y, epochs=2, batch_size=16, optimizer=cr.SGD(0.1), dtype="float64", backend=backend, verbose=False)
        return {**net.parameters, "loss": np.array(learnt.loss), "predicted": net.predict(x[:7], backend=backend)}

    with registered(Threaded(threads, guard=64, poison=0xFF)) as name:
        got, want = run(name), run("reference")
    for key, value in want.items():
        np.testing.assert_allclose(got[key], value, rtol=1e-10, atol=1e-12, err_msg=key)
