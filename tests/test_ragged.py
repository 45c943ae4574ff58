"""Sequences of different lengths: a loop over them ends with them, and nothing else changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chainrule import nn
from chainrule.compiler.schedule import together
from chainrule.run.batches import by_length

T, F = 11, 3


LAYERS = {
    "RNN": lambda: [nn.RNN(5), nn.Dense(2)],
    "LSTM": lambda: [nn.LSTM(5), nn.Dense(2)],
    "GRU": lambda: [nn.GRU(5), nn.Dense(2)],
    "peephole": lambda: [nn.LSTM(5, peephole=True), nn.Dense(2)],
    "layer norm": lambda: [nn.LSTM(5, layer_norm=True), nn.Dense(2)],
    "reverse": lambda: [nn.GRU(5, reverse=True), nn.Dense(2)],
    "both": lambda: [nn.Bidirectional(nn.LSTM(4)), nn.Dense(2)],
    "stack": lambda: [nn.LSTM(4, return_sequences=True), nn.GRU(5), nn.Dense(2)],
    "stack of both": lambda: [nn.Bidirectional(nn.RNN(3, return_sequences=True)), nn.Bidirectional(nn.GRU(3)), nn.Dense(2)],
    "dropout": lambda: [nn.LSTM(5, dropout=0.3, recurrent_dropout=0.2), nn.Dense(2)],
}


def network(name: str, rows: int, dtype: str = "float64") -> tuple[nn.Module, Any, Any, Any]:
    r = np.random.default_rng(rows)
    x, y, n = r.normal(size=(rows, T, F)), r.normal(size=(rows, 2)), r.integers(0, T + 1, rows)
    net = nn.Sequential(*LAYERS[name]())
    net.fit(x, y, lengths=n, epochs=0, seed=1, dtype=dtype, verbose=False)
    return net, x, y, n


@pytest.mark.parametrize(
    "name", [n for n in LAYERS if n != "peephole"]
)  # whose gradient is three sums side by side: not gathered
def test_loops_end_with_their_rows(name: str) -> None:
    net, x, y, n = network(name, 16)
    net.fit(x, y, lengths=n, epochs=1, verbose=False)
    loops = [line for line in net.compiled.text("kernels").splitlines() if "loop" in line and "in phases" not in line]
    assert loops
    assert all("each row to" in line for line in loops), "\n".join(loops)


@pytest.mark.parametrize("rows", [1, 3, 8, 13, 20, 50])
@pytest.mark.parametrize("name", list(LAYERS))
def test_native_equals_reference(name: str, rows: int) -> None:
    net, x, y, n = network(name, rows)
    one, other = (net.gradients(x, y, lengths=n, loss="mse", backend=b, training=False) for b in ("native", "reference"))
    for k in one:
        np.testing.assert_allclose(one[k], other[k], rtol=1e-9, atol=1e-12)
    given = [net.predict(x, lengths=n, backend=b) for b in ("native", "reference")]
    np.testing.assert_allclose(*given, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["LSTM", "both", "stack"])
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


@pytest.mark.parametrize("name", ["LSTM", "both", "stack"])
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
