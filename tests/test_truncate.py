"""Truncated backpropagation through time against its definition, written as plain loops over time that the package `autograd`
differentiates: no windows of data, no padding, no masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import autograd
import autograd.numpy as anp
import numpy as np
import pytest
import recurrent_oracle as oracle
from same import assert_same, state

import chainrule as cr
from chainrule import nn
from chainrule.train.windows import Windows

Array = np.ndarray
Cell = Callable[[Any, Any, Any], tuple[Any, Any]]  # (parameters, state, x) -> (state, output)

T = 12
PAIRS = [(1, 1), (4, 4), (5, 5), (4, 8), (4, 6), (2, 12), (3, 100), (5, 7), (7, 9), (11, 12)]
WHOLE = [(12, 12), (12, 20), (100, 100)]  # nothing to cut


def data(rows: int = 6, steps: int = T, width: int = 3, outputs: int = 2, seed: int = 0) -> tuple[Array, Array]:
    r = np.random.default_rng(seed)
    return r.normal(size=(rows, steps, width)), r.normal(size=(rows, steps, outputs))


def leaky(state: Any, x: Any) -> tuple[Any, Any]:
    """A cell of one's own, whose output is not its state."""
    h = np.tanh(0.5 * state + x)
    return h, h * h + x


@dataclass
class Definition:
    """Windows of a stack of layers, each a cell with the sizes of its states, and a dense layer behind it."""

    cells: Sequence[tuple[Cell, list[int]]]
    every: int
    back: int

    def start(self, p: Any, rows: int) -> list[list[Any]]:
        names = oracle.STATES
        first = [
            [oracle.inner(p, str(i)).get(f"initial_{names[k]}", anp.zeros(size)) for k, size in enumerate(sizes)]
            for i, (_, sizes) in enumerate(self.cells)
        ]
        return [[h + anp.zeros((rows, len(h))) for h in each] for each in first]

    def window(self, p: Any, states: Any, x: Array, y: Array, n: Array, w: Array, j: int) -> tuple[Any, Any]:
        """The loss of window j, a sum, and the state with which the next one begins. states: None at the beginning."""
        first = j * self.every
        begin, end = max(0, first - (self.back - self.every)), min(first + self.every, x.shape[1])
        following = max(0, first + self.every - (self.back - self.every))
        states = self.start(p, len(x)) if begin == 0 else states
        passed, loss = (None if following == 0 else states), 0.0
        for t in range(begin, end):
            inside, value = (n > t)[:, None], x[:, t]
            for i, (cell, _) in enumerate(self.cells):
                new, value = cell(oracle.inner(p, str(i)), states[i], value)
                states = [*states[:i], [anp.where(inside, a, b) for a, b in zip(new, states[i], strict=True)], *states[i + 1 :]]
            dense = oracle.inner(p, str(len(self.cells)))
            score = anp.dot(value, dense["weight"]) + dense["bias"]
            if t >= first:
                loss = loss + anp.sum(anp.where(inside, (score - y[:, t]) ** 2, 0.0) * w[:, None]) / y.shape[2]
            if t + 1 == following:
                passed = states
        return loss, passed

    def weight(self, n: Array, w: Array, j: int) -> float:
        return float(np.sum(w * np.clip(n - j * self.every, 0, self.every)))

    def windows(self, x: Array) -> range:
        return range(-(-x.shape[1] // self.every))

    def gradient(self, p: dict[str, Array], states: Any, *data: Array, j: int) -> tuple[float, dict[str, Array], Any]:
        loss, passed = self.window(p, states, *data, j)
        return float(loss), autograd.grad(lambda p: self.window(p, states, *data, j)[0])(p), passed

    def gradients(self, p: dict[str, Array], x: Array, y: Array, n: Array, w: Array) -> dict[str, Array]:
        """All windows with the same weights, over the weight of all steps."""
        total, states = {k: np.zeros_like(v) for k, v in p.items()}, None
        for j in self.windows(x):
            _, g, states = self.gradient(p, states, x, y, n, w, j=j)
            total = {k: v + g[k] for k, v in total.items()}
        return {k: v / np.sum(w * n) for k, v in total.items()}

    def fit(
        self, p: dict[str, Array], x: Array, y: Array, n: Array, w: Array, *, rate: float, batch: int, epochs: int
    ) -> tuple[dict[str, Array], list[float]]:
        """Gradient descent, batch by batch, window by window."""
        losses = []
        for _ in range(epochs):
            total = 0.0
            for at in range(0, len(x), batch):
                rows, states = slice(at, at + batch), None
                for j in self.windows(x):
                    weight = self.weight(n[rows], w[rows], j)
                    loss, g, states = self.gradient(p, states, x[rows], y[rows], n[rows], w[rows], j=j)
                    total += loss
                    p = {k: v - rate * g[k] / (weight or 1.0) for k, v in p.items()}
            losses.append(total / float(np.sum(w * n)))
        return p, losses


def rnn(p: Any, state: Any, x: Any) -> tuple[Any, Any]:
    return oracle.rnn(p, state, x)


def own(p: Any, state: Any, x: Any) -> tuple[Any, Any]:
    h = anp.tanh(0.5 * state[0] + x)
    return [h], h * h + x


@dataclass
class Case:
    """A network, and its definition."""

    make: Callable[[], list[nn.Module]]
    cells: list[tuple[Cell, list[int]]] = field(default_factory=list)

    def built(self, x: Any, y: Any, **options: Any) -> nn.Sequential:
        net = nn.Sequential(*self.make(), nn.Dense(2))
        net.fit(x, y, epochs=0, dtype="float64", loss="mse", **options)
        r = np.random.default_rng(1)
        net.load_parameters({k: 0.5 * r.normal(size=v.shape) for k, v in net.parameters.items()})
        return net


CASES = {
    "RNN": Case(lambda: [nn.RNN(4, return_sequences=True)], [(rnn, [4])]),
    "LSTM": Case(lambda: [nn.LSTM(4, True)], [(oracle.lstm, [4, 4])]),
    "GRU": Case(lambda: [nn.GRU(4, True)], [(oracle.gru, [4])]),
    "learnt": Case(lambda: [nn.LSTM(4, True, learn_initial=True)], [(oracle.lstm, [4, 4])]),
    "stack": Case(lambda: [nn.LSTM(4, True), nn.GRU(3, True, learn_initial=True)], [(oracle.lstm, [4, 4]), (oracle.gru, [3])]),
    "own": Case(lambda: [nn.Recurrent(leaky, state=3, return_sequences=True)], [(own, [3])]),
}


def ones(x: Array) -> tuple[Array, Array]:
    return np.full(len(x), x.shape[1]), np.ones(len(x))


def close(found: Any, wanted: Any, tolerance: float = 1e-10) -> None:
    assert list(found) == list(wanted)
    for name, value in found.items():
        np.testing.assert_allclose(value, wanted[name], rtol=tolerance, atol=tolerance, err_msg=name)


# ---- the gradient is what it claims to be ------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("case", ["LSTM", "stack"])
def test_every_window_has_the_gradient_of_the_definition(case: str, pair: tuple[int, int]) -> None:
    x, y = data()
    net = CASES[case].built(x, y)
    wanted = Definition(CASES[case].cells, *pair).gradients(dict(net.parameters), x, y, *ones(x))
    close(net.gradients(x, y, truncate=pair, backend="reference"), wanted)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("pair", [(4, 4), (5, 8)])
def test_every_cell_learns_as_the_definition_does(case: str, pair: tuple[int, int]) -> None:
    """Native code, several epochs and batches, a short one among them; each window begins with what the one before left."""
    x, y = data(5)
    net = CASES[case].built(x, y)
    definition = Definition(CASES[case].cells, *pair)
    close(net.gradients(x, y, truncate=pair), definition.gradients(dict(net.parameters), x, y, *ones(x)))
    p, losses = definition.fit(dict(net.parameters), x, y, *ones(x), rate=0.1, batch=2, epochs=2)
    run = net.fit(x, y, truncate=pair, optimizer=cr.SGD(0.1), batch_size=2, epochs=2, shuffle=False)
    close(net.parameters, p)
    assert run.loss == pytest.approx(losses, rel=1e-10)
    assert run.steps == 2 * 3 * len(definition.windows(x))


@pytest.mark.parametrize("pair", [(4, 4), (4, 6), (5, 5), (5, 13)])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_lengths_and_weights(pair: tuple[int, int], backend: str) -> None:
    """Sequences of different length, two of them empty, whose rows have weights; what lies beyond an end changes no bit."""
    x, y = data()
    n, w = np.array([12, 3, 0, 8, 5, 0]), np.array([1.0, 2.0, 1.0, 0.5, 3.0, 1.0])
    net = CASES["stack"].built(x, y)
    other = CASES["stack"].built(x, y)
    definition = Definition(CASES["stack"].cells, *pair)
    close(
        net.gradients(x, y, lengths=n, truncate=pair, backend=backend),
        definition.gradients(dict(net.parameters), x, y, n, np.ones(6)),
    )
    p, losses = definition.fit(dict(net.parameters), x, y, n, w, rate=0.1, batch=3, epochs=2)
    options: dict[str, Any] = {
        "truncate": pair, "sample_weight": w, "optimizer": cr.SGD(0.1), "batch_size": 3, "epochs": 2, "shuffle": False,
        "backend": backend,
    }  # fmt: skip
    run = net.fit(x, y, lengths=n, **options)
    close(net.parameters, p)
    assert run.loss == pytest.approx(losses, rel=1e-10)
    inside = np.arange(T) < n[:, None]
    rough = np.where(inside[..., None], x, 1e6), np.where(inside[..., None], y, -1e6)
    again = other.fit(*rough, mask=inside, **options)
    assert again.loss == run.loss
    assert_same(state(other), state(net))


@pytest.mark.parametrize("pair", WHOLE)
def test_nothing_is_cut_where_a_window_holds_all(pair: tuple[int, int]) -> None:
    x, y = data()
    one, other = CASES["LSTM"].built(x, y), CASES["LSTM"].built(x, y)
    assert_same(one.gradients(x, y, truncate=pair), other.gradients(x, y))
    runs = [one.fit(x, y, truncate=pair, epochs=2), other.fit(x, y, epochs=2)]
    assert runs[0].loss == runs[1].loss
    assert_same(state(one), state(other))


def test_a_gradient_that_goes_back_to_the_beginning_is_the_whole_one() -> None:
    """With one set of weights, k2 at least T leaves nothing out."""
    x, y = data()
    net = CASES["stack"].built(x, y)
    close(net.gradients(x, y, truncate=(4, 12)), net.gradients(x, y))
    shorter = net.gradients(x, y, truncate=(4, 4))
    assert not np.allclose(shorter["0.weight_hidden"], net.gradients(x, y)["0.weight_hidden"], rtol=1e-3)


def test_a_learnt_first_state_is_taught_by_the_windows_that_reach_it() -> None:
    x, y = data()
    net = CASES["learnt"].built(x, y)
    late = np.arange(T)[None, :, None] >= 4  # all errors after the first window
    y = np.where(late, y, net.predict(x))
    assert np.abs(net.gradients(x, y, truncate=(4, 4))["0.initial_hidden"]).max() < 1e-15
    assert np.abs(net.gradients(x, y, truncate=(4, 8))["0.initial_hidden"]).max() > 1e-6


# ---- the state goes on -------------------------------------------------------------------------------------------------------


class Watched:
    """A metric that keeps the scores it sees."""

    __name__ = "watched"

    def __init__(self) -> None:
        self.seen: list[Array] = []

    def __call__(self, scores: Array, target: Array) -> float:
        self.seen.append(np.array(scores))
        return 0.0


def heads(backend: str) -> Callable[[], nn.Sequential]:
    """Compiled, a layer behind the loop is a product over all steps at once, whose order of summation depends on how many there are."""
    behind = [nn.Dense(2)] if backend == "reference" else [nn.RNN(2, return_sequences=True)]
    return lambda: nn.Sequential(nn.LSTM(5, True), nn.GRU(4, True), *behind)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("pair", [(4, 4), (4, 6), (3, 12), (5, 7)])
def test_states_are_those_of_whole_sequences_to_the_bit(pair: tuple[int, int], backend: str, dtype: str) -> None:
    x, y = data()
    net = heads(backend)()
    options: dict[str, Any] = {"optimizer": cr.SGD(0.0), "batch_size": 6, "shuffle": False, "epochs": 1, "backend": backend}
    seen = []
    for more in ({"dtype": dtype}, {"truncate": pair}):
        watched = Watched()
        net.fit(x, y, metrics=[watched], **options, **more)
        seen.append(watched.seen[0].reshape(-1, 2))
    windows = Windows(T, *pair, ("x",))
    rows = np.arange(6 * T).reshape(6, T, 1)
    order = windows.cut_target(rows)[windows.order(np.arange(6), 6)].reshape(-1)  # which step of which row, as steps see them
    counted = windows.cut_lengths(np.full(6, T))[1][windows.order(np.arange(6), 6)]
    order = order[(np.arange(pair[0]) < counted[:, None]).reshape(-1)]
    np.testing.assert_array_equal(seen[1], seen[0][order])


@pytest.mark.parametrize("make", [lambda **o: nn.LSTM(4, True, **o), lambda **o: nn.GRU(4, True, **o)])
def test_windows_of_a_batch_are_the_batches_of_a_stateful_layer(make: Callable[..., nn.Module]) -> None:
    x, y = data(4)
    cut = nn.Sequential(make(), nn.Dense(2))
    stateful = nn.Sequential(make(stateful=4), nn.Dense(2))
    cut.fit(x, y, truncate=(4, 4), batch_size=4, epochs=1)
    parts = [np.concatenate([a[:, t : t + 4] for t in (0, 4, 8)]) for a in (x, y)]
    stateful.fit(*parts, batch_size=4, epochs=1, shuffle=False)
    assert_same(cut.parameters, stateful.parameters)


def test_a_stateful_layer_goes_on_from_batch_to_batch_too() -> None:
    x, y = data(4)
    one, other = (nn.Sequential(nn.LSTM(4, True, stateful=2), nn.Dense(2)) for _ in range(2))
    one.fit(x, y, truncate=(4, 4), batch_size=2, epochs=2, shuffle=False)
    parts = [np.concatenate([a[i : i + 2, t : t + 4] for i in (0, 2) for t in (0, 4, 8)]) for a in (x, y)]
    other.fit(*parts, batch_size=2, epochs=2, shuffle=False)
    assert_same(state(one), state(other))


def test_nothing_is_left_on_the_network() -> None:
    x, y = data()
    net = CASES["stack"].built(x, y)
    before = list(net.parameters)
    net.fit(x, y, truncate=(4, 6), epochs=1)
    assert list(net.parameters) == before
    assert not net.statistics
    assert not [n for n in net._state() if "kept" in n]


# ---- epochs ------------------------------------------------------------------------------------------------------------------


def test_two_epochs_are_as_one_and_one_and_a_reset_starts_over() -> None:
    x, y = data(7)
    one, other = (nn.Sequential(nn.LSTM(4, True, dropout=0.2, recurrent_dropout=0.2), nn.Dense(2)) for _ in range(2))
    run = one.fit(x, y, truncate=(4, 6), epochs=2, batch_size=3)
    parts = [other.fit(x, y, truncate=(4, 6), epochs=1, batch_size=3) for _ in range(2)]
    assert run.loss == [part.loss[0] for part in parts]
    assert_same(state(one), state(other))
    other.reset()
    assert other.fit(x, y, truncate=(4, 6), epochs=2, batch_size=3).loss == run.loss
    assert_same(state(one), state(other))


@pytest.mark.parametrize("pair", [(4, 4), (5, 8)])
def test_threads_change_no_bits_and_backends_agree(pair: tuple[int, int]) -> None:
    x, y = data(70, width=8)
    nets = [nn.Sequential(nn.LSTM(32, True), nn.Dense(2)) for _ in range(3)]
    runs = [
        net.fit(x, y, truncate=pair, epochs=2, batch_size=32, threads=threads, backend=backend, dtype="float32")
        for net, threads, backend in zip(nets, (1, 2, None), ("native", "native", "reference"), strict=True)
    ]
    assert runs[0].loss == runs[1].loss
    assert_same(state(nets[0]), state(nets[1]))
    assert runs[0].loss == pytest.approx(runs[2].loss, rel=1e-5)
    close(nets[0].parameters, nets[2].parameters, 2e-4)


def test_rows_are_shuffled_as_without_windows() -> None:
    windows = Windows(12, 5, 5, ("x",))
    assert windows.order(np.array([4, 0, 3, 1, 2]), 2).tolist() == [12, 0, 13, 1, 14, 2, 9, 3, 10, 4, 11, 5, 6, 7, 8]
    two = windows.order(np.array([[0, 1], [1, 0]]), 2)
    assert two.tolist() == [[0, 3, 1, 4, 2, 5], [3, 0, 4, 1, 5, 2]]


def test_an_update_may_be_made_of_several_windows() -> None:
    x, y = data(4)
    n = np.array([12, 12, 7, 2])
    net = CASES["LSTM"].built(x, y)
    p = dict(net.parameters)
    definition = Definition(CASES["LSTM"].cells, 4, 4)
    states, at = None, dict(p)
    for rows in (slice(0, 2), slice(2, 4)):
        total, weight, states = {k: np.zeros_like(v) for k, v in p.items()}, 0.0, None
        for j in range(3):
            _, g, states = definition.gradient(at, states, x[rows], y[rows], n[rows], np.ones(2), j=j)
            total, weight = {k: v + g[k] for k, v in total.items()}, weight + definition.weight(n[rows], np.ones(2), j)
        at = {k: v - 0.1 * total[k] / weight for k, v in at.items()}
    net.fit(x, y, lengths=n, truncate=(4, 4), optimizer=cr.SGD(0.1, accumulate=3), batch_size=2, epochs=1, shuffle=False)
    close(net.parameters, at)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_window_in_which_nothing_is_left_makes_no_update(backend: str) -> None:
    """Momentum and decay would move weights without any gradient. One batch ends in its second window, the other in its third."""
    x, y = data(4)
    n = np.array([5, 7, 12, 9])
    nets = [nn.Sequential(nn.LSTM(4, True), nn.Dense(2)) for _ in range(2)]
    rule = cr.Adam(0.01, l2=0.1)
    options: dict[str, Any] = {"truncate": (4, 4), "optimizer": rule, "shuffle": False, "backend": backend, "metrics": ["rmse"]}
    run = nets[0].fit(x, y, lengths=n, batch_size=2, epochs=2, **options)
    for _ in range(2):
        nets[1].fit(x[:2, :8], y[:2, :8], lengths=n[:2], batch_size=2, epochs=1, **options)
        last = nets[1].fit(x[2:], y[2:], lengths=n[2:], batch_size=2, epochs=1, **options)
    close(nets[0].parameters, nets[1].parameters, 1e-6)
    assert run.steps == 12
    # An epoch may end with such a window; its penalty is that of the weights.
    nets[1].reset()
    turned = nets[1].fit(x[::-1], y[::-1], lengths=n[::-1], batch_size=2, epochs=1, **options)
    assert turned.penalty[0] == pytest.approx(
        0.05 * sum(np.sum(v**2) for k, v in nets[1].parameters.items() if v.ndim > 1), rel=1e-2
    )
    assert last.penalty[0] > 0


def test_rows_without_weight_do_no_harm() -> None:
    x, y = data(4)
    net = nn.Sequential(nn.LSTM(4, True), nn.Dense(2))
    w = np.array([0.0, 0.0, 1.0, 1.0])
    run = net.fit(x, y, truncate=(4, 4), sample_weight=w, batch_size=2, epochs=2, shuffle=False, metrics=["rmse", "mae"])
    assert np.all(np.isfinite(run.loss + run.metrics["rmse"] + run.metrics["mae"]))


@pytest.mark.parametrize("pair", [(4, 4), (5, 8)])
def test_validation_and_metrics_are_those_of_whole_sequences(pair: tuple[int, int]) -> None:
    x, y = data(9)
    net = nn.Sequential(nn.GRU(4, True), nn.Dense(2))
    watched = Watched()
    run = net.fit(
        x[:6], y[:6], truncate=pair, validation=(x[6:], y[6:]), metrics=["rmse", "r2", watched], epochs=2, optimizer=cr.SGD(0.0),
        batch_size=4, early_stopping=5,
    )  # fmt: skip
    wanted = net.evaluate(x[6:], y[6:], metrics=["rmse", "r2"])
    seen = net.evaluate(x[:6], y[:6], metrics=["rmse", "r2"])
    assert run.validation_loss[-1] == pytest.approx(wanted["loss"], rel=1e-5)
    assert run.loss[-1] == pytest.approx(seen["loss"], rel=1e-5)
    for name in ("rmse", "r2"):
        assert run.metrics[f"validation_{name}"][-1] == pytest.approx(wanted[name], rel=1e-4)
        assert run.metrics[name][-1] == pytest.approx(seen[name], rel=1e-4)
    held = nn.Sequential(nn.GRU(4, True), nn.Dense(2)).fit(x, y, truncate=pair, validation=0.3, epochs=1)
    assert len(held.validation_loss) == 1


def test_a_run_that_goes_wrong_keeps_the_weights_of_before() -> None:
    x, y = data()
    net = nn.Sequential(nn.LSTM(4, True), nn.Dense(2))
    net.fit(x, y, epochs=0)
    before = state(net)
    with pytest.raises(cr.DivergenceError, match=r"epoch 1, step \d of 6"):
        net.fit(x, y, truncate=(4, 4), optimizer=cr.SGD(1e30), batch_size=3, epochs=2)
    assert_same(state(net), before)


def test_another_truncation_is_another_program() -> None:
    """Programs are kept for the next call, but not for one in which the same shapes mean something else."""
    x, y = data()
    net, fresh = (CASES["LSTM"].built(x, y) for _ in range(2))
    before = dict(net.parameters)
    options: dict[str, Any] = {"epochs": 1, "batch_size": 3, "shuffle": False, "optimizer": cr.SGD(0.1)}
    for who, steps, pair in ((net, 4, None), (net, 12, (4, 4)), (fresh, 12, (4, 4))):
        who.load_parameters(before)
        run = who.fit(x[:, :steps], y[:, :steps], truncate=pair, **options)
    assert run.steps == 6
    assert_same(net.parameters, fresh.parameters)


@pytest.mark.parametrize("pair", [(4, 4), (5, 7)])
def test_a_run_that_is_interrupted_goes_on_with_the_next_batch_from_its_beginning(pair: tuple[int, int]) -> None:
    """An epoch that ends early leaves no state behind: the next one is as any other."""
    x, y = data()
    nets = [CASES["LSTM"].built(x, y) for _ in range(2)]
    options: dict[str, Any] = {
        "truncate": pair,
        "batch_size": 3,
        "shuffle": False,
        "optimizer": cr.SGD(0.1),
        "backend": "reference",
    }
    count = [0]

    def metric(scores: Array, target: Array) -> float:
        count[0] += 1
        raise KeyboardInterrupt

    run = nets[0].fit(x, y, epochs=2, metrics=[metric], **options)
    assert run.interrupted
    assert count == [1]
    nets[1].load_parameters(nets[0].parameters)
    assert nets[0].fit(x, y, epochs=1, **options).loss == nets[1].fit(x, y, epochs=1, **options).loss
    assert_same(nets[0].parameters, nets[1].parameters)


@pytest.mark.parametrize("pair", [(4, 4), (5, 8)])
def test_validation_of_sequences_that_differ_in_length(pair: tuple[int, int]) -> None:
    x, y = data(8)
    n = np.array([12, 3, 7, 9, 1, 12, 4, 8])
    net = nn.Sequential(nn.LSTM(4, True), nn.Dense(2))
    run = net.fit(
        x[:5],
        y[:5],
        lengths=n[:5],
        truncate=pair,
        validation=(x[5:, :9], y[5:, :9], np.minimum(n[5:], 9)),
        metrics=["mae"],
        epochs=2,
    )
    wanted = net.evaluate(x[5:, :9], y[5:, :9], lengths=np.minimum(n[5:], 9), metrics=["mae"])
    assert run.validation_loss[-1] == pytest.approx(wanted["loss"], rel=1e-5)
    assert run.metrics["validation_mae"][-1] == pytest.approx(wanted["mae"], rel=1e-5)
    seen = net.fit(x[:5], y[:5], lengths=n[:5], truncate=pair, metrics=["mae"], epochs=1, optimizer=cr.SGD(0.0))
    whole = net.evaluate(x[:5], y[:5], lengths=n[:5], metrics=["mae"])
    assert seen.loss[0] == pytest.approx(whole["loss"], rel=1e-5)
    assert seen.metrics["mae"][0] == pytest.approx(whole["mae"], rel=1e-5)


def test_the_compiled_step_can_be_looked_at() -> None:
    x, y = data()
    net = nn.Sequential(nn.LSTM(4, True), nn.Dense(2))
    net.fit(x, y, truncate=(4, 6), epochs=1, batch_size=3)
    assert "[3, 6, 3]" in net.compiled.text("graph")
    assert net.compiled.cost().total.flops > net.compiled.cost(entry="forward").total.flops > 0


# ---- other networks ----------------------------------------------------------------------------------------------------------


class Conditioned(nn.Module):
    """Two sequences and a vector that says how they begin; the inner LSTM has a time of its own."""

    def __init__(self) -> None:
        self.first, self.rnn, self.again = nn.Dense(4, "tanh"), nn.GRU(4, True), nn.GRU(4, True)
        self.inner, self.dense = nn.TimeDistributed(nn.LSTM(2)), nn.Dense(2)

    def __call__(self, a: Any, b: Any, c: Any) -> Any:
        h = self.rnn(a, self.first(c))
        h = self.again(h)
        h = np.concatenate([self.again(h), self.inner(b), b[:, :, 0]], axis=-1)
        return self.dense(h)


@pytest.mark.parametrize("pair", [(4, 4), (4, 8), (5, 5)])
def test_several_inputs_and_a_layer_that_stands_twice(pair: tuple[int, int]) -> None:
    r = np.random.default_rng(3)
    _, y = data(4)
    x = {"a": r.normal(size=(4, T, 3)), "b": r.normal(size=(4, T, 5, 2)), "c": r.normal(size=(4, 3))}
    net = Conditioned()
    net.fit(x, y, epochs=0, dtype="float64", loss="mse")
    whole = net.gradients(x, y, truncate=(pair[0], 100))
    close(whole, net.gradients(x, y))
    # Windows by hand: with all errors in the second window, the gradient is that of the steps it reaches, from the state before them.
    reach = range(pair[0] - (pair[1] - pair[0]), 2 * pair[0])
    y = np.where((np.arange(T) >= pair[0])[None, :, None] & (np.arange(T) < 2 * pair[0])[None, :, None], y, net.predict(x))
    found = net.gradients(x, y, truncate=pair)
    assert (np.abs(found["first.weight"]).max() > 1e-12) == (reach.start == 0)
    if reach.start == 0:
        part = {"a": x["a"][:, : reach.stop], "b": x["b"][:, : reach.stop], "c": x["c"]}
        share = reach.stop / T
        close(found, {k: v * share for k, v in net.gradients(part, y[:, : reach.stop]).items()})


def test_words_and_classes() -> None:
    r = np.random.default_rng(0)
    x, y = r.integers(0, 7, (6, T)), r.integers(0, 3, (6, T))
    net = nn.Sequential(nn.Embedding(7, 4), nn.LSTM(5, True), nn.Dropout(0.1), nn.TimeDistributed(nn.Dense(3)))
    run = net.fit(
        x, y, truncate=(5, 7), loss="cross_entropy", epochs=100, optimizer=cr.Adam(0.02), batch_size=6, metrics=["accuracy"]
    )
    assert run.loss[-1] < run.loss[0]
    assert run.metrics["accuracy"][-1] > 0.5
    lists = [row[:k] for row, k in zip(x, (3, 12, 1, 8, 5, 9), strict=True)]
    targets = [row[:k] for row, k in zip(y, (3, 12, 1, 8, 5, 9), strict=True)]
    assert np.isfinite(net.fit(lists, targets, truncate=(5, 7), epochs=1).loss[0])


def test_the_norms_of_the_gradient_through_time() -> None:
    x, y = data()
    net = CASES["stack"].built(x, y)
    whole = net.gradients(x, y, through_time=True)
    close(net.gradients(x, y, truncate=(4, 12), through_time=True), whole)
    y = np.where(np.arange(T)[None, :, None] == T - 1, y, net.predict(x))  # one error, at the last step
    short, last = net.gradients(x, y, truncate=(4, 4), through_time=True), net.gradients(x, y, through_time=True)
    for name, norms in short.items():
        np.testing.assert_allclose(norms[8:], last[name][8:], rtol=1e-10)
        assert not np.any(norms[:8])
    uneven = net.gradients(x, y, truncate=(5, 7), through_time=True)
    for name, norms in uneven.items():
        np.testing.assert_allclose(norms[8:], last[name][8:], rtol=1e-10)
        assert not np.any(norms[:8])


# ---- what makes no sense -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [4, (4,), (0, 4), (4, 4, 4), (4.0, 4.0), (True, 2), "44", (None, 4)])
def test_what_is_no_pair_of_numbers_is_refused(wrong: Any) -> None:
    x, y = data()
    net = nn.Sequential(nn.LSTM(4, True), nn.Dense(2))
    with pytest.raises(cr.UsageError, match=r"truncate is a pair \(k1, k2\) of whole numbers"):
        net.fit(x, y, truncate=wrong)
    assert not net.built
    with pytest.raises(cr.UsageError, match=r"at least so many.*such as \(4, 4\)"):
        net.fit(x, y, truncate=(4, 3))


def last_only() -> nn.Module:
    return nn.Sequential(nn.LSTM(4, True), nn.LSTM(4), nn.Dense(2))


class Encoder(nn.Module):
    """The second half begins where the first has ended."""

    def __init__(self) -> None:
        self.encoder, self.decoder, self.dense = nn.GRU(4, True, return_state=True), nn.GRU(4, True), nn.Dense(2)

    def __call__(self, x: Any) -> Any:
        y, h = self.encoder(x)
        return self.dense(self.decoder(y, h))


class MeanFirst(nn.Module):
    """The first state knows all steps."""

    def __init__(self) -> None:
        self.rnn, self.dense = nn.GRU(3, True), nn.Dense(2)

    def __call__(self, x: Any) -> Any:
        return self.dense(self.rnn(x, np.mean(x, axis=1)))


class Attention(nn.Module):
    """Each step sees all of them."""

    def __init__(self) -> None:
        self.rnn, self.dense = nn.GRU(3, True), nn.Dense(2)

    def __call__(self, x: Any) -> Any:
        h = self.rnn(x)
        return self.dense(h - np.mean(h, axis=1, keepdims=True))


class Captured(nn.Module):
    """Each step reads what `make` has made of all of them."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self.make, self.dense = make, nn.Dense(2)
        self.rnn = nn.Recurrent(self.step, state=3, return_sequences=True)

    def step(self, h: Any, x: Any) -> Any:
        h = np.tanh(0.5 * h + x[:, :1] + self.taken)
        return h, h

    def __call__(self, x: Any) -> Any:
        self.taken = self.make(x)
        return self.dense(self.rnn(x))


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "no recurrent layer": (
        lambda: nn.Sequential(nn.Dense(4), nn.Dense(2)),
        r"for sequences that a recurrent layer reads.*has none",
    ),
    "last only": (last_only, r"with a loss at the last step only, the windows before it have nothing to learn from"),
    "both": (lambda: nn.Sequential(nn.Bidirectional(nn.LSTM(2, True)), nn.Dense(2)), r"Bidirectional.*the whole future"),
    "reverse": (
        lambda: nn.Sequential(nn.LSTM(2, True, reverse=True), nn.Dense(2)),
        r"this LSTM goes from the last.*whole future",
    ),
    "encoder": (Encoder, r"this GRU gives what it has at the end of a sequence"),
    "first state": (MeanFirst, r"truncate cuts x into windows of time, and .*mixes their steps"),
    "captured": (
        lambda: Captured(lambda x: np.mean(x, (1, 2))[:, None]),
        r"step takes something from outside .*test_truncate.py",
    ),
    "attention": (Attention, r"where scores mix steps"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_networks_that_need_more_than_a_window_are_refused(name: str) -> None:
    make, message = REFUSED[name]
    x, y = data()
    net = make()
    with pytest.raises(cr.ChainruleError, match=message):
        net.fit(x, y[:, 0] if name == "last only" else y, truncate=(4, 4), loss="mse")
    assert not net.built, "refused before anything is changed"


def test_further_refusals() -> None:
    x, y = data()
    stateful = nn.Sequential(nn.LSTM(4, True, stateful=6), nn.Dense(2))
    with pytest.raises(cr.UsageError, match=r"truncate=\(4, 6\): a stateful layer.*use truncate=\(4, 4\)"):
        stateful.fit(x, y, truncate=(4, 6), batch_size=6)
    with pytest.raises(cr.UsageError, match="LBFGS looks at all rows"):
        nn.Sequential(nn.LSTM(4, True), nn.Dense(2)).fit(x, y, truncate=(4, 4), optimizer=cr.LBFGS())


def test_a_first_state_that_knows_all_steps_is_refused_with_lengths_too() -> None:
    x, y = data()
    with pytest.raises(cr.DataError, match=r"rows differ in length, and .*mixes their steps"):
        MeanFirst().fit(x, y, lengths=[12, 3, 4, 5, 6, 7])


@pytest.mark.parametrize(
    "make", [lambda x: np.mean(x, (1, 2))[:, None], lambda x: x[:, 2, :1], lambda x: np.sum(x @ x.transpose(0, 2, 1), 2)[:, :1]]
)
def test_a_step_that_reads_other_steps_from_outside_is_refused_with_lengths(make: Callable[[Any], Any]) -> None:
    x, y = data()
    net = Captured(make)
    with pytest.raises(
        cr.DataError, match=r"x has rows that differ in length, and the step takes something from outside .*part of x"
    ):
        net.fit(x, y, lengths=[12, 3, 4, 5, 6, 7])
    net.fit(x, y, epochs=1)


def test_a_step_may_read_what_knows_no_time() -> None:
    x, y = data()
    nets = [
        Captured(lambda x: np.arange(3, dtype=x.dtype)),
        Captured(lambda x: cr.random.normal((x.shape[0], 3), seed=0).astype(x.dtype)),
    ]
    for net in nets:
        for options in ({"lengths": [12, 3, 4, 5, 6, 7]}, {"truncate": (4, 4)}):
            net.fit(x, y, epochs=1, **options)
