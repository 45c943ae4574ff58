"""What native code is given: every layout and type of arrays as NumPy takes them, and no index out of range read or written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import native_graphs
import numpy as np
import pytest
from expressions import function, listed
from native import Array, Threaded, assert_bits, registered
from native_graphs import float_inputs
from native_networks import rows_for, token_net
from same import assert_same, state

import chainrule as cr
import chainrule.run.function
from chainrule import nn
from chainrule.graph.node import Graph, Type
from chainrule.losses import losses
from chainrule.program import Input, ProgramBuilder, Variable
from chainrule.run.backend import Steps, backends
from chainrule.train.objective import initial_slots, make_program

native_functions = native_graphs.native_functions  # a fixture


# ---- inputs ------------------------------------------------------------------------------------------------------------------


def unaligned(a: Array) -> Array:
    memory = np.zeros(a.nbytes + 1, np.uint8)
    view = memory[1:].view(np.uint8)[: a.nbytes]
    made = np.ndarray(a.shape, a.dtype, view.data)
    made[...] = a
    assert not made.flags.aligned or a.dtype.itemsize == 1 or a.size == 0
    return made


def strided(a: Array) -> Array:
    wide = np.zeros((2 * a.shape[0], *a.shape[1:-1], 3 * a.shape[-1]), a.dtype)
    wide[::2, ..., ::3] = a
    return wide[::2, ..., ::3]


def read_only(a: Array) -> Array:
    made = a.copy()
    made.flags.writeable = False
    return made


LAYOUTS: dict[str, Callable[[Array], Array]] = {
    "unaligned": unaligned,
    "strided": strided,
    "negative strides": lambda a: np.ascontiguousarray(a[::-1, ..., ::-1])[::-1, ..., ::-1],
    "read-only": read_only,
    "Fortran": np.asfortranarray,
    "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "float16": lambda a: a.astype(np.float16),
    "float64": lambda a: a.astype(np.float64),
    "int8": lambda a: a.astype(np.int8),
    "int64": lambda a: a.astype(np.int64),
    "list": lambda a: a.tolist(),
}


@pytest.mark.parametrize("threads", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_every_layout_and_type_of_data(threads: int) -> None:
    x, t = rows_for("dense", 70)
    x, t = np.round(x * 4), np.round(t * 4)  # every type holds them
    weight = np.arange(1.0, 71.0, dtype=np.float32)

    def learnt(x: Any, t: Any, weight: Any) -> dict[str, Array]:
        net = nn.Sequential(nn.Dense(7, "relu"), nn.BatchNorm(), nn.Dense(3))
        with registered(Threaded(threads)) as name:
            run = net.fit(x, t, sample_weight=weight, epochs=1, backend=name)
            return {**state(net), "loss": np.array(run.loss), "scores": net.predict(x, backend=name)}

    plain = learnt(x, t, weight)
    for name, change in LAYOUTS.items():
        before = np.array(change(x))
        one, other = change(x), change(t)
        assert_same(learnt(one, other, weight), plain)
        np.testing.assert_array_equal(np.array(one), before, err_msg=name)
    for name in ("unaligned", "strided", "big-endian", "float64", "int64"):
        changed = weight[:, None].copy()
        assert_same(learnt(x, t, np.asarray(LAYOUTS[name](changed))[:, 0]), plain)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int32", "uint32", "int64", ">i4"])
def test_every_type_of_indices(dtype: str) -> None:
    x, t = rows_for("tokens", 40)
    results = []
    for indices in (x, x.astype(dtype)):
        net = token_net()
        run = net.fit(indices, t, epochs=1, backend="native")
        results.append({**state(net), "loss": np.array(run.loss)})
    assert_same(results[1], results[0])


def taking(b: Array) -> Callable[..., Any]:
    """A function that takes an array from outside."""
    return cr.compile(lambda a: (np.tanh(a) @ b.T, a[::-1] + b, np.sum(a)))


def test_every_layout_of_arguments(native_functions: Callable[[str], None]) -> None:
    native_functions("native")
    f = cr.compile(lambda a, b: (np.tanh(a) @ b.T, a[::-1] + b, np.sum(a)))
    for dtype in ("float32", "float64"):
        a, b = np.round(float_inputs((5, 7), dtype) * 3), float_inputs((5, 7), dtype, seed=9)
        want = f(a, b)
        for name in ("unaligned", "strided", "negative strides", "read-only", "Fortran", "big-endian"):
            assert_bits(f(LAYOUTS[name](a), LAYOUTS[name](b)), want, name)
            assert_bits(taking(LAYOUTS[name](b))(a), want, name)
        slope = cr.grad(lambda a: np.sum(np.tanh(a) ** 2))
        assert_bits([slope(LAYOUTS["big-endian"](a))], [slope(a)])
    np.testing.assert_array_equal(cr.compile(lambda b, i: b[i])(b, np.array([1, 0], ">i4")), b[[1, 0]])


def test_arguments_without_axes_and_without_elements(native_functions: Callable[[str], None]) -> None:
    native_functions("native")
    assert cr.compile(lambda a: a * 2.0)(np.array(3.0)) == 6.0
    assert cr.compile(lambda a, b: a * b)(np.float32(3.0), 0.5) == 1.5
    assert cr.grad(lambda a: a * a)(np.array(3.0)) == 6.0
    for shape in ((0,), (0, 3), (3, 0), (2, 0, 4)):
        empty = np.zeros(shape)
        total, moved, joined_up = cr.compile(lambda a: (np.sum(a), np.sin(a) + 1.0, np.concatenate([a, a])))(empty)
        assert total == 0.0
        assert moved.shape == shape
        assert joined_up.shape == (2 * shape[0], *shape[1:])
    assert_bits(cr.compile(lambda a: (np.zeros((3, 0)) @ a, np.sum(a, 0)))(np.zeros((0, 4))), [np.zeros((3, 4)), np.zeros(4)])


def test_arguments_that_numpy_warns_of_when_they_are_written_to() -> None:
    for a in np.broadcast_arrays(np.ones((1, 3)), np.arange(3.0)):
        assert cr.compile(lambda a: a + 1)(a).tolist() == (a + 1).tolist()  # any warning fails a test


def test_results_belong_to_the_caller(native_functions: Callable[[str], None]) -> None:
    native_functions("native")
    f = cr.compile(lambda a: (a, a * 1.0, a[1:]))
    a = np.arange(4.0)
    first = f(a)
    for r in first:
        r[...] = 7.0
    np.testing.assert_array_equal(a, np.arange(4.0))
    assert_bits(f(a), [np.arange(4.0), np.arange(4.0), np.arange(1.0, 4.0)])


def test_equal_entries_with_arrays_of_their_own() -> None:
    arrays = {"first": np.array([1.0, 2.0, 3.0]), "second": np.array([10.0, 20.0, 30.0])}
    builder = ProgramBuilder([], [Input("x", Type((4, 3), np.dtype("f8")), rows=0)], 4)
    for name, own in arrays.items():
        builder.entry(name, lambda s, g, own=own: ({"y": g["x"] * own}, {}), ["x"])
    session = backends["native"].session({4: builder.build()}, {})
    for name, own in arrays.items():
        np.testing.assert_array_equal(session.call(4, name, {"x": np.ones((4, 3))})["y"], np.ones((4, 3)) * own)


# ---- indices out of range ----------------------------------------------------------------------------------------------------


class Shifted(nn.Module):
    """An embedding whose index is computed, so that nobody can check the data beforehand."""

    def __init__(self, by: int) -> None:
        self.by = by
        self.inner = nn.Embedding(9, 4)

    def __call__(self, x: Any) -> Any:
        return self.inner(x + self.by)


def index_session(backend: Any, threads: int = 1) -> tuple[Any, dict[str, Array], dict[str, Any]]:
    net = nn.Sequential(Shifted(1), nn.Flatten(), nn.Dense(5, "tanh"), nn.BatchNorm(), nn.Dense(2))
    x, t = np.arange(24).reshape(8, 3) % 8, float_inputs((8, 2), "float32")
    rule = cr.Adam(0.05)
    net.fit(x, t, epochs=0, optimizer=rule)
    program = make_program(net._task(losses["mse"](), t, False, rule), 4, ("step",))
    start = {**state(net), **initial_slots(rule, net.parameters, np.float32)}
    return backend.session({4: program}, start), {"x": x, "target": t}, program.inputs


def index_steps(data: dict[str, Array], inputs: dict[str, Any], order: Sequence[int]) -> Any:

    count = len(order) // 4
    name = next(n for n in inputs if inputs[n].type.dtype.kind == "i" and inputs[n].rows == 0)
    values = {
        "divisor": 4.0,
        "seed": np.array([1, 2]),
        "step": 0,
        "learning_rate": 0.05,
        **{f"hyper.{k}": v for k, v in cr.Adam(0.05).hyper().items()},
    }
    numbers = {n: np.stack([np.asarray(values[n], i.type.dtype)] * count) for n, i in inputs.items() if n in values}
    return Steps(["step"] * count, {name: data["x"], "target": data["target"]}, np.array(order), [4] * count, numbers, ("loss",))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("bad", [8, -11, 2**40, -(2**62)])
def test_an_index_out_of_range_in_a_step(bad: int, threads: int) -> None:
    good, wrong = [0, 1, 2, 3], [4, 5, 6, 7]
    texts, states = [], []
    for backend in (backends["reference"], Threaded(threads)):
        session, data, inputs = index_session(backend)
        session.run(index_steps(data, inputs, good))
        before = session.state()
        data["x"] = data["x"].copy()
        data["x"][6, 1] = bad
        with pytest.raises(cr.DataError) as caught:
            session.run(index_steps(data, inputs, wrong))
        texts.append(str(caught.value))
        assert_same(session.state(), before)
        with pytest.raises(cr.DataError):
            session.run(index_steps(data, inputs, [*good, *wrong, *good]))
        session.run(index_steps(data, inputs, good))
        states.append(session.state())
    assert texts[0] == texts[1]
    for name, value in states[0].items():
        np.testing.assert_allclose(states[1][name], value, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("bad", [0, 63, 64, 127, 128, 191])
def test_an_index_out_of_range_where_no_state_is_written(bad: int, threads: int) -> None:
    """Such a step has one phase, at the end of which threads differ about what they have seen. The step is named all the same."""
    inputs = [Input("x", Type((64,), np.dtype("i8")), rows=0)]
    builder = ProgramBuilder([Variable("w", Type((10, 4), np.dtype("f4")), "parameter")], inputs, 64)
    builder.entry("look", lambda s, g: ({"y": s["w"][g["x"]]}, {}), ["x"])
    x = np.zeros(192, np.int64)
    x[bad] = 99
    steps = Steps(["look"] * 3, {"x": x}, np.arange(192), [64] * 3, {}, ("y",))
    for _ in range(30):
        session = Threaded(threads).session({64: builder.build()}, {"w": np.ones((10, 4), "f4")})
        with pytest.raises(cr.DataError, match=rf"index 99 \(element {bad % 64} of the indices\)"):
            session.run(steps)


@pytest.mark.parametrize("bad", [8, -11, 2**40])
def test_an_index_out_of_range_in_fit_and_predict(bad: int) -> None:
    x, t = np.arange(24).reshape(8, 3) % 8, float_inputs((8, 2), "float32")
    wrong = x.copy()
    wrong[5, 2] = bad
    texts = []
    for backend in ("reference", "native"):
        net = nn.Sequential(Shifted(1), nn.Flatten(), nn.Dense(2))
        net.fit(x, t, epochs=1, batch_size=4, backend=backend)
        before = state(net)
        with pytest.raises(cr.DataError) as caught:
            net.fit(wrong, t, epochs=2, batch_size=4, shuffle=False, backend=backend)
        texts.append(str(caught.value))
        with pytest.raises(cr.DataError) as caught:
            net.predict(wrong, backend=backend)
        texts.append(str(caught.value))
        assert_same(state(net), before)
        net.fit(x, t, epochs=1, batch_size=4, backend=backend)
        assert np.isfinite(net.predict(x, backend=backend)).all()
    assert texts[:2] == texts[2:]


INDEXING = """
np.take(w, i, axis=0); w[i]; np.take(w, i[:, None], axis=1); cr.grad(lambda w: np.sum(w[i] ** 2))(w);
cr.scan(lambda h, k: (h + w[k], None), w[0], i)[0]
"""


@pytest.mark.parametrize("text", listed(INDEXING))
@pytest.mark.parametrize("bad", [4, -5, 2**31])
def test_an_index_out_of_range_in_a_function(text: str, bad: int, native_functions: Callable[[str], None]) -> None:
    w, i = float_inputs((4, 4), "float64"), np.array([0, 3, -4, bad, 1, bad + 1])
    texts, values, f = [], [], function(text, "wi")
    for name in ("reference", "native"):
        native_functions(name)
        compiled = cr.compile(f)
        with pytest.raises(cr.DataError) as caught:
            compiled(w, i)
        texts.append(str(caught.value))
        values.append(compiled(w, i % 4))
    np.testing.assert_allclose(values[1], values[0], rtol=1e-12)
    assert texts[0] == texts[1]


class LookedUpBehindNorm(nn.Module):
    """The kernel that looks up waits for the one that makes the running mean."""

    def __init__(self) -> None:
        self.norm, self.out = nn.BatchNorm(), nn.Dense(2)

    def __call__(self, x: Any, i: Any) -> Any:
        return self.out(np.tanh(self.norm(x) + cr.lookup(np.ones((5, 6), np.float32), i + 0 * i)))


@pytest.mark.parametrize("threads", [1, 2])
def test_an_index_that_is_looked_up_behind_a_running_mean(threads: int) -> None:
    """No step after the wrong one is taken, and the message is NumPy's."""
    r = np.random.default_rng(0)
    x, i, t = r.normal(size=(48, 6)).astype(np.float32), r.integers(0, 5, 48), r.normal(size=(48, 2)).astype(np.float32)
    net = LookedUpBehindNorm()
    net.fit((x, i), t, epochs=1, batch_size=16, threads=threads, shuffle=False, backend="native")
    before = state(net)
    i[20] = 99
    with pytest.raises(cr.DataError, match=r"index 99 \(element 4 of the indices\) lies outside"):
        net.fit((x, i), t, epochs=1, batch_size=16, threads=threads, shuffle=False, backend="native")
    assert_same(state(net), before)


def test_an_index_that_another_thread_changes_before_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy, asked which index it was, gets copies: it would crash if one changed between its check and its use."""
    w, i = float_inputs((4, 4), "float64"), np.array([0, 3, 9])
    real = chainrule.run.function.evaluate

    def changed(graph: Graph, values: Sequence[Any]) -> Any:
        i[2] = 1
        return real(graph, values)

    compiled = cr.compile(lambda w, i: w[i])
    with monkeypatch.context() as patch:
        patch.setattr(chainrule.run.function, "evaluate", changed)
        with pytest.raises(cr.DataError, match="index 9"):
            compiled(w, i)
    np.testing.assert_array_equal(compiled(w, i), w[[0, 3, 1]])
    with monkeypatch.context() as patch:
        patch.setattr(chainrule.run.function, "evaluate", lambda graph, values: [])
        with pytest.raises(cr.DataError, match="another thread, changes the data"):
            compiled(w, np.array([9]))


@pytest.mark.parametrize("name", ["arena", "report", "order", "turn", "x", "target", "loss", "learning_rate"])
def test_a_parameter_may_have_any_name(name: str) -> None:
    """Also one that the memory of a step has for itself."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            self.dense = nn.Dense(3, "tanh")

        def __call__(self, x: Any) -> Any:
            return self.dense(x) * self.parameter(name, (3,), "ones")

    x = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)

    def learnt(backend: str) -> dict[str, Any]:
        net = Scaled()
        net.fit(x, x[:, :3], loss="mse", optimizer=cr.SGD(0.1), epochs=2, batch_size=5, backend=backend, verbose=False)
        return dict(net.parameters)

    native, reference = learnt("native"), learnt("reference")
    assert name in native
    for key, value in reference.items():
        np.testing.assert_allclose(native[key], value, rtol=1e-4, atol=1e-6, err_msg=key)
