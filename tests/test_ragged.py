"""Sequences of different lengths: a loop over them ends with them, and nothing else changes."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from native import backend_of
from rarely import rarely
from test_compiler_graphs import graph_of

import chainrule as cr
from chainrule import nn
from chainrule.compiler import pipeline
from chainrule.compiler.affine import Axis, of
from chainrule.compiler.kernels import Buffer, Kernel, Store, constant, elementwise, kernels_text, load, reduce
from chainrule.compiler.schedule import together
from chainrule.compiler.verify import verify
from chainrule.errors import GraphError
from chainrule.ops.loop import apply_iota
from chainrule.run import machines
from chainrule.run.batches import by_length

T, F = 11, 3


LAYERS = {
    "RNN": lambda: [nn.RNN(5), nn.Dense(2)],
    "LSTM": lambda: [nn.LSTM(5), nn.Dense(2)],
    "GRU": lambda: [nn.GRU(5), nn.Dense(2)],
    "GRU, reset before": lambda: [nn.GRU(5, reset_after=False), nn.Dense(2)],
    "peephole": lambda: [nn.LSTM(5, peephole=True), nn.Dense(2)],
    "layer norm": lambda: [nn.LSTM(5, layer_norm=True), nn.Dense(2)],
    "reverse": lambda: [nn.GRU(5, reverse=True), nn.Dense(2)],
    "both": lambda: [nn.Bidirectional(nn.LSTM(4)), nn.Dense(2)],
    "stack": lambda: [nn.LSTM(4, return_sequences=True), nn.GRU(5), nn.Dense(2)],
    "stack of both": lambda: [nn.Bidirectional(nn.RNN(3, return_sequences=True)), nn.Bidirectional(nn.GRU(3)), nn.Dense(2)],
    "dropout": lambda: [nn.LSTM(5, dropout=0.3, recurrent_dropout=0.2), nn.Dense(2)],
}


# ---- cells of one's own -------------------------------------------------------------------------------------------------------


def sigmoid(a: Any) -> Any:
    return 1 / (1 + np.exp(-a))


class Cell(nn.Recurrent):
    """One step of a cell of one's own: `made(w, state, x)` -> the new state; w(name, *shape) is a weight."""

    def __init__(self, made: Any, state: Any) -> None:
        super().__init__(state=state)
        self.made = made

    def step(self, state: Any, x: Any) -> Any:
        new = self.made(
            lambda name, *shape: self.parameter(name, shape, "zeros" if len(shape) == 1 else "glorot_uniform"), state, x
        )
        return new, new[0] if isinstance(new, tuple) else new


def joined(w: Any, h: Any, x: Any) -> Any:
    return np.tanh(np.concatenate([x, h], axis=-1) @ w("w", x.shape[1] + h.shape[1], h.shape[1]))


def state_first(w: Any, h: Any, x: Any) -> Any:
    return np.tanh(np.concatenate([h, x], axis=-1) @ w("w", x.shape[1] + h.shape[1], h.shape[1]))


def with_one(w: Any, h: Any, x: Any) -> Any:
    one = np.ones((h.shape[0], 1), h.dtype)
    return np.tanh(np.hstack([x, h, one]) @ w("w", x.shape[1] + h.shape[1] + 1, h.shape[1]))


def joined_twice(w: Any, h: Any, x: Any) -> Any:
    n = h.shape[1]
    a = np.tanh(np.concatenate([x, h], axis=-1) @ w("w", x.shape[1] + n, n))
    return np.tanh(np.concatenate([a, h], axis=-1) @ w("v", 2 * n, n))


def joined_lstm(w: Any, state: Any, x: Any) -> Any:
    h, c = state
    n = h.shape[1]
    z = np.concatenate([x, h], axis=-1) @ w("w", x.shape[1] + n, 4 * n) + w("b", 4 * n)
    i, f, g, o = (z[:, k * n : (k + 1) * n] for k in range(4))
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c), c


def joined_gru(w: Any, h: Any, x: Any) -> Any:
    n = h.shape[1]
    z, r = np.split(sigmoid(np.concatenate([x, h], axis=-1) @ w("w", x.shape[1] + n, 2 * n)), 2, axis=-1)
    new = np.tanh(np.concatenate([x, r * h], axis=-1) @ w("v", x.shape[1] + n, n))
    return z * h + (1 - z) * new


def halves(w: Any, h: Any, x: Any) -> Any:
    """The new state is put together of two parts."""
    n, half = h.shape[1], h.shape[1] // 2
    both = np.concatenate([x, h], axis=-1)
    return np.concatenate([np.tanh(both @ w("w", x.shape[1] + n, half)), both @ w("v", x.shape[1] + n, n - half)], axis=-1)


def stacked(w: Any, h: Any, x: Any) -> Any:
    """Two sums of a stack of the state and what is made of the input."""
    pair = np.stack([h, x @ w("u", x.shape[1], h.shape[1])], axis=1)
    return np.tanh(np.einsum("rkn,knm->rm", pair, w("w", 2, h.shape[1], h.shape[1])))


def by_parts(w: Any, h: Any, x: Any) -> Any:
    return np.tanh(x @ w("w", x.shape[1], h.shape[1]) + h @ w("v", h.shape[1], h.shape[1]) + w("b", h.shape[1]))


def squared(w: Any, h: Any, x: Any) -> Any:
    both = np.concatenate([x, h, x * x, h * h], axis=-1)
    return np.tanh(both @ w("w", 2 * (x.shape[1] + h.shape[1]), h.shape[1]) + w("b", h.shape[1]))


def in_place(w: Any, h: Any, x: Any) -> Any:
    """The features are rolled before they are joined."""
    both = np.roll(np.concatenate([x, h], axis=-1), 2, axis=-1)
    return np.tanh(both @ w("w", x.shape[1] + h.shape[1], h.shape[1]))


OWN: dict[str, tuple[Any, Any]] = {
    f.__name__.replace("_", " "): (f, state)
    for f, state in (
        (joined, 6), (state_first, 6), (with_one, 6), (joined_twice, 6), (joined_lstm, [6, 6]), (joined_gru, 6), (halves, 6),
        (stacked, 6), (by_parts, 6), (squared, 6), (in_place, 6),
    )
}  # fmt: skip


LAYERS |= {name: lambda f=f, state=state: [Cell(f, state), nn.Dense(2)] for name, (f, state) in OWN.items()}


def network(name: str, rows: int, dtype: str = "float64") -> tuple[nn.Module, Any, Any, Any]:
    r = np.random.default_rng(rows)
    x, y, n = r.normal(size=(rows, T, F)), r.normal(size=(rows, 2)), r.integers(0, T + 1, rows)
    net = nn.Sequential(*LAYERS[name]())
    net.fit(x, y, lengths=n, epochs=0, seed=1, dtype=dtype, verbose=False)
    return net, x, y, n


def loops_of(kernels: str) -> list[str]:
    return [line for line in kernels.splitlines() if "loop" in line and "in phases" not in line]


@pytest.mark.parametrize("name", list(LAYERS))
def test_loops_end_with_their_rows(name: str) -> None:
    net, x, y, n = network(name, 16)
    net.fit(x, y, lengths=n, epochs=1, verbose=False)
    loops = loops_of(net.compiled.text("kernels"))
    assert loops
    assert all("each row to" in line for line in loops), "\n".join(loops)


@pytest.mark.parametrize("rows", [1, 3, 13, 50, *rarely(8, 20)])
@pytest.mark.parametrize("name", list(LAYERS))
def test_native_equals_reference(name: str, rows: int) -> None:
    net, x, y, n = network(name, rows)
    one, other = (net.gradients(x, y, lengths=n, loss="mse", backend=b, training=False) for b in ("native", "reference"))
    for k in one:
        np.testing.assert_allclose(one[k], other[k], rtol=1e-9, atol=1e-12)
    given = [net.predict(x, lengths=n, backend=b) for b in ("native", "reference")]
    np.testing.assert_allclose(*given, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["LSTM", "GRU, reset before", "both", "stack"])
@pytest.mark.parametrize("rows", [7, 24, 48])
def test_the_same_bits_for_any_number_of_threads_and_any_budget(name: str, rows: int) -> None:
    def weights(**options: Any) -> dict[str, Any]:
        net, x, y, n = network(name, rows, "float32")
        net.fit(x, y, lengths=n, epochs=3, batch_size=rows, seed=2, verbose=False, **options)
        return dict(net.parameters)

    first = weights(threads=1)
    for options in ({"threads": 2}, {"threads": 3}, {"threads": 5}, {"memory": 10**6, "threads": 2}):
        for k, v in weights(**options).items():
            assert v.tobytes() == first[k].tobytes(), (k, options)


@pytest.mark.parametrize("name", ["LSTM", "both", *OWN])
def test_the_same_bits_as_by_loops_that_go_on_to_the_end(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    """Of what belongs to rows; sums over rows are in another order then (`gather.py`)."""

    def results() -> tuple[Any, dict[str, Any], dict[str, Any]]:
        net, x, y, n = network(name, 24)
        sums = net.gradients(x, y, lengths=n, loss="mse", training=False)
        norms = net.gradients(x, y, lengths=n, loss="mse", through_time=True)
        return net.predict(x, lengths=n), norms, sums

    expected = results()
    monkeypatch.setattr(pipeline, "ragged", lambda items, names: items)
    monkeypatch.setattr(machines, "_machines", {})
    monkeypatch.setenv("CHAINRULE_CACHE", str(tmp_path))
    got = results()
    np.testing.assert_array_equal(got[0], expected[0])
    for k, v in expected[1].items():
        np.testing.assert_array_equal(got[1][k], v)
    for k, v in expected[2].items():
        np.testing.assert_allclose(got[2][k], v, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", ["LSTM", "GRU, reset before", "both", "stack"])
def test_what_lies_beyond_the_end_is_not_even_read(name: str) -> None:
    net, x, y, n = network(name, 16)
    expected = net.predict(x, lengths=n), net.gradients(x, y, lengths=n, loss="mse", training=False)
    beyond = np.where(np.arange(T) < n[:, None], 0.0, np.nan)[..., None]
    given = net.predict(x + beyond, lengths=n), net.gradients(x + beyond, y, lengths=n, loss="mse", training=False)
    np.testing.assert_array_equal(given[0], expected[0])
    for k, v in expected[1].items():
        np.testing.assert_array_equal(given[1][k], v)


def test_each_step_of_all_sequences_may_be_an_output() -> None:
    r = np.random.default_rng(0)
    x, y, n = r.normal(size=(16, T, F)), r.normal(size=(16, T, 2)), r.integers(0, T + 1, 16)
    net = nn.Sequential(nn.LSTM(5, return_sequences=True), nn.TimeDistributed(nn.Dense(2)))
    net.fit(x, y, lengths=n, epochs=1, verbose=False, dtype="float64", batch_size=16)
    assert "each row to" in net.compiled.text("kernels")
    scores = net.predict(x, lengths=n)
    assert not scores[np.arange(T) >= n[:, None]].any()
    np.testing.assert_allclose(scores, net.predict(x, lengths=n, backend="reference"), rtol=1e-12, atol=1e-14)


MASKS: dict[str, tuple[int, Any]] = {  # masks in which numbers are not what they are in lengths and time; steps
    "lengths as uint8": (11, lambda t, n: np.less(t, n.astype(np.uint8))),
    "time as int8": (300, lambda t, n: np.less(t.astype(np.int8), n)),
    "lengths as uint64": (11, lambda t, n: np.less(t, n.astype(np.uint64))),
}


@pytest.mark.parametrize("stored", ["cast in the mask", "cast before"])
@pytest.mark.parametrize("name", MASKS)
def test_a_mask_of_numbers_that_have_wrapped_around_is_kept(name: str, stored: str) -> None:
    """-1 is 255 as uint8, and step 200 is step -56 as int8: such rows do not end when their lengths say so."""
    steps, mask = MASKS[name]
    n = np.array([-1, 3, 0, 5, -7, 2, 1, 4])
    if stored == "cast before" and "lengths" in name:
        n = n.astype(name.split()[-1])
    x = np.random.default_rng(0).normal(size=(steps, 8, 3))

    def last(x: Any, n: Any) -> Any:
        def step(h: Any, along: Any) -> tuple[Any, None]:
            t, x = along
            return np.where(mask(t, n)[:, None], np.tanh(h * 0.5 + x), h), None

        return cr.scan(step, np.zeros((8, 3)), (apply_iota(steps), x))[0]

    h = np.zeros((8, 3))
    for t, row in enumerate(x):
        h = np.where(mask(np.uint32(t), n)[:, None], np.tanh(h * 0.5 + row), h)
    np.testing.assert_allclose(cr.compile(last)(x, n), h, rtol=1e-12, atol=1e-14)


SAME = lambda a: a
FLIPPED = lambda a: a[:, ::-1]

HANDED_ON: dict[str, tuple[bool, Any, Any]] = {  # whether a state is left as it was; what is kept of it; what is made of that
    "as it is": (True, SAME, SAME),
    "in halves": (True, SAME, lambda a: np.concatenate([a[:, :2], a[:, 2:]], axis=1)),
    "flipped and back": (True, FLIPPED, FLIPPED),
    "kept flipped": (False, FLIPPED, SAME),
    "flipped": (False, SAME, FLIPPED),
    "rolled": (False, SAME, lambda a: np.concatenate([a[:, 1:], a[:, :1]], axis=1)),
    "to another row": (False, SAME, lambda a: a[::-1]),
}


def is_told(f: Any, *arrays: Any) -> tuple[bool, list[Any]]:
    """Whether the only loop of a function knows when rows end; and the results."""
    graph, given = graph_of(f, arrays)
    function = backend_of().function(graph)
    (loop,) = loops_of(function.machine.code.stage("kernels"))
    return "each row to" in loop, function(given)


def cell(n: int) -> tuple[Any, ...]:
    """States, inputs of 6 steps, lengths, and two weights, for 16 rows of n numbers."""
    r = np.random.default_rng(n)
    return r.normal(size=(16, n)), r.normal(size=(6, 16, n)), r.integers(0, 7, 16), *r.normal(size=(2, n, n)) * 0.3


@pytest.mark.parametrize("name", HANDED_ON)
def test_a_state_may_go_through_several_kernels(name: str) -> None:
    """The second product needs all of the first, so `a`, which is the old state where the mask is off, is in memory between them."""
    same, kept, made = HANDED_ON[name]

    def step(h: Any, mask: Any, row: Any, w: Any, v: Any) -> Any:
        a = kept(np.where(mask, 0, h)) + np.where(mask, np.tanh(h + row), 0) @ w
        return made(a) + np.where(mask, np.tanh(a), 0) @ v

    def last(h: Any, x: Any, n: Any, w: Any, v: Any) -> Any:
        return cr.scan(lambda h, at: (step(h, np.less(at[0], n)[:, None], at[1], w, v), None), h, (apply_iota(6), x))[0]

    h, x, n, w, v = cell(4)
    told, (got,) = is_told(last, h, x, n, w, v)
    assert told == same
    for t, row in enumerate(x):
        h = step(h, (t < n)[:, None], row, w, v)
    np.testing.assert_allclose(got, h, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("swapped", [False, True])
def test_two_states_may_go_through_one_array(swapped: bool) -> None:
    def step(h: Any, g: Any, mask: Any, row: Any, w: Any, v: Any) -> tuple[Any, Any]:
        kept = [np.where(mask, 0, s) + np.where(mask, np.tanh(s + row[:, :4]), 0) @ w[:4, :4] for s in (h, g)]
        a = np.concatenate(kept, axis=1)
        new = np.where(mask, np.tanh(a), 0) @ v
        one, other = a[:, :4] + new[:, :4], a[:, 4:] + new[:, 4:]
        return (other, one) if swapped else (one, other)

    def last(h: Any, x: Any, n: Any, w: Any, v: Any) -> Any:
        body = lambda s, at: (step(*s, np.less(at[0], n)[:, None], at[1], w, v), None)
        return cr.scan(body, (h[:, :4], h[:, 4:]), (apply_iota(6), x))[0]

    h, x, n, w, v = cell(8)
    told, got = is_told(last, h, x, n, w, v)
    assert told != swapped
    states = h[:, :4], h[:, 4:]
    for t, row in enumerate(x):
        states = step(*states, (t < n)[:, None], row, w, v)
    np.testing.assert_allclose(got, states, rtol=1e-12, atol=1e-14)


# ---- the order of rows in a batch ------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 30), min_size=1, max_size=200), st.integers(1, 100))
@settings(max_examples=100, deadline=None)
def test_rows_stay_in_their_batch(lengths: list[int], batch: int) -> None:
    n, order = np.array(lengths), np.random.default_rng(0).permutation(len(lengths))
    made = by_length(order, n, batch)
    for at in range(0, len(n), batch):
        assert sorted(made[at : at + batch]) == sorted(order[at : at + batch])


@pytest.mark.parametrize("rows", [16, 64, 96, 128])
def test_halves_of_a_batch_have_as_much_to_do(rows: int) -> None:
    n = np.random.default_rng(rows).integers(5, 200, rows)
    made = n[by_length(np.arange(rows), n, rows)]
    size = together(rows)
    work = [size * made[at : at + size].max() for at in range(0, rows, size)]
    half = -(-len(work) // 2)
    assert abs(sum(work[:half]) - sum(work[half:])) < 0.2 * sum(work)
    assert sum(work) < n.sum() + size * n.max()  # each group of rows goes on to the end of its longest


def test_predictions_come_in_the_order_of_the_rows() -> None:
    net, x, _, n = network("LSTM", 40)
    alone = np.concatenate([net.predict(x[i : i + 1], lengths=n[i : i + 1]) for i in range(40)])
    np.testing.assert_allclose(net.predict(x, lengths=n), alone, rtol=1e-12, atol=1e-14)


# ---- what the compiler shows and verifies ---------------------------------------------------------------------------------------


def added(known: bool) -> Kernel:
    """sum = sum + Σ over groups g, their steps r and rows q of x[g, r, q], each group up to steps[g]; or with steps outermost, which nobody
    can."""
    i, g, r, q = Axis("i", 1), Axis("g", 3), Axis("r", 5), Axis("q", 2)
    total, x = Buffer("total", (1,), np.dtype(np.float64), "state"), Buffer("x", (3, 5, 2), np.dtype(np.float64), "input")
    steps = Buffer("steps", (3,), np.dtype(np.int64), "input")
    reduced = (g, r, q) if known else (r, g, q)
    term = reduce("sum", load(x, (of(g), of(r), of(q))), reduced)
    value = elementwise("add", total.dtype, [load(total, (of(i),)), term])
    limits = constant(0, steps.dtype), load(steps, (of(g),))
    return Kernel("k", (i,), reduced, [Store(total, (of(i),), value)], i, between={r: limits})


def test_the_text_of_a_kernel_says_how_far_it_sums() -> None:
    kernel = added(known=True)
    verify([kernel])
    lines = kernels_text([kernel]).splitlines()
    (steps,) = (line.split(":")[0].strip() for line in lines if "steps[g]" in line)
    assert any("r <" in line and line.endswith(steps) for line in lines)


def test_a_sum_to_an_end_that_is_not_known_yet_is_refused() -> None:
    with pytest.raises(GraphError, match="as far as nobody knows yet"):
        verify([added(known=False)])


def test_a_mask_that_is_multiplied_by_lets_nan_through() -> None:
    """0 times NaN is NaN in NumPy, so such steps are not left out."""

    def f(x: Any, n: Any) -> Any:
        def step(h: Any, along: Any) -> Any:
            t, row = along
            return h + np.less(t, n)[:, None] * row, None

        return cr.scan(step, np.zeros((16, 3)), (apply_iota(6), x))[0]

    x, n = np.ones((6, 16, 3)), np.full(16, 2, np.int32)
    x[4] = np.nan
    assert np.isnan(cr.compile(f)(x, n)).all()


def test_a_step_may_see_what_it_has_written_in_another_shape() -> None:
    """Heads: written as (rows, 4), read as (rows, 2, 2)."""

    class Heads(nn.Recurrent):
        def step(self, h: Any, x: Any) -> Any:
            w, v = self.parameter("w", (x.shape[1], 4)), self.parameter("v", (2, 2))
            new = (np.tanh(x @ w + h).reshape(h.shape[0], 2, 2) @ v).reshape(h.shape) + h
            return new, h

    r = np.random.default_rng(0)
    x, lengths = r.normal(size=(16, 6, 3)).astype(np.float32), r.integers(0, 7, 16)
    got = []
    for backend in ("native", "reference"):
        net = nn.Sequential(Heads(state=4), nn.Dense(1))
        net.fit(x, x[:, 0, :1], lengths=lengths, optimizer=cr.SGD(0.1), epochs=3, seed=0, verbose=False, backend=backend)
        got.append(net.predict(x, lengths=lengths))
    np.testing.assert_allclose(*got, rtol=1e-4, atol=1e-5)
