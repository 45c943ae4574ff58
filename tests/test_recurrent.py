"""Recurrent layers against plain loops that `autograd` differentiates: cells, states, dropout, names, gradients through time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import autograd
import autograd.numpy as anp
import numpy as np
import pytest
import recurrent_oracle as oracle
from recurrent import LENGTHS, Array, data, made, shaken
from same import assert_same, state

import chainrule as cr
from chainrule import nn
from chainrule.losses import mse
from chainrule.program import Program
from chainrule.train.objective import make_program

CELLS: list[tuple[str, dict[str, Any]]] = [
    ("RNN", {}),
    ("RNN", {"activation": "relu"}),
    ("LSTM", {}),
    ("LSTM", {"peephole": True}),
    ("LSTM", {"layer_norm": True}),
    ("LSTM", {"peephole": True, "layer_norm": True}),
    ("GRU", {}),
    ("GRU", {"reset_after": False}),
]
CELL_IDS = ["-".join([kind, *options]) for kind, options in CELLS]
FORMS: dict[str, dict[str, Any]] = {
    "last": {},
    "sequences": {"return_sequences": True},
    "reverse": {"reverse": True},
    "reverse sequences": {"reverse": True, "return_sequences": True},
    "learnt": {"learn_initial": True},
    "both": {"both": True},
    "both sequences": {"both": True, "return_sequences": True},
}

# ----------------------------------------------------------------------------------------------------------- against the oracle


def mean_square(y: Any, t: Any, lengths: Any, sequences: bool) -> Any:
    """The objective, sequence by sequence."""
    if not sequences:
        return anp.mean((y - t) ** 2)
    each = [anp.sum((y[i, :n] - t[i, :n]) ** 2) for i, n in enumerate(lengths)]
    return sum(each) / (sum(lengths) * y.shape[-1])


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize(("kind", "options"), CELLS, ids=CELL_IDS)
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["full", "ragged"])
def test_values_and_gradients_agree_with_autograd(kind: str, options: dict[str, Any], form: str, lengths: Any) -> None:
    x, units = data(), 3
    sequences, both = FORMS[form].get("return_sequences", False), FORMS[form].get("both", False)
    width = units * (2 if both else 1)
    t = np.random.default_rng(5).normal(size=(4, 5, width) if sequences else (4, width))
    net = shaken(made(kind, units, **options, **FORMS[form]), x, t)
    ends = [5] * 4 if lengths is None else lengths
    more = {**options, "reverse": FORMS[form].get("reverse", False)} if not both else {**options, "both": True}

    def forward(p: Any) -> Any:
        return oracle.layer(kind, p, [row[:n] for row, n in zip(x, ends, strict=True)], units, sequences, steps=5, **more)

    p = {name: np.array(value) for name, value in net.parameters.items()}
    np.testing.assert_allclose(net.predict(x, lengths=lengths), forward(p), rtol=1e-12, atol=1e-14)
    expected = autograd.grad(lambda p: mean_square(forward(p), t, ends, sequences))(p)
    for backend in ("native", "reference"):
        got = net.gradients(x, t, lengths=lengths, loss="mse", backend=backend)
        assert list(got) == list(p)
        for name, value in expected.items():
            np.testing.assert_allclose(got[name], value, rtol=1e-9, atol=1e-13, err_msg=name)


@pytest.mark.parametrize(("kind", "options"), CELLS, ids=CELL_IDS)
def test_single_precision(kind: str, options: dict[str, Any]) -> None:
    x, t = data(steps=9), data(width=3)[:, 0]
    nets = [shaken(made(kind, 3, **options), x, t, dtype=dtype) for dtype in ("float32", "float64")]
    assert nets[0].predict(x).dtype == np.float32
    np.testing.assert_allclose(nets[0].predict(x), nets[1].predict(x), rtol=2e-3, atol=2e-4)
    single, double = (net.gradients(x, t, lengths=[9, 4, 0, 1]) for net in nets)
    for name, value in double.items():
        assert single[name].dtype == np.float32
        np.testing.assert_allclose(single[name], value, rtol=2e-3, atol=1e-3 * np.abs(value).max())


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["full", "ragged"])
@pytest.mark.parametrize("sequences", [False, True])
def test_stacks(sequences: bool, lengths: Any) -> None:
    """Layers on layers, in both directions, with a dense layer at the end."""
    x, t = data(), data(width=2, seed=3) if sequences else data(width=2, seed=3)[:, 0]
    layers = [nn.LSTM(3, True), nn.LayerNorm(), nn.Bidirectional(nn.GRU(2, True)), nn.Dense(3, "tanh")]
    net = nn.Sequential(*layers, nn.RNN(2, return_sequences=sequences), nn.Dense(2))
    shaken(net, x, t)
    ends = [5] * 4 if lengths is None else lengths

    def forward(p: Any) -> Any:
        rows = []
        for row, n in zip(x, ends, strict=True):
            h = row[:n]
            if n:
                h = oracle.layer("LSTM", oracle.inner(p, "0"), [h], 3, True)[0]
                h = anp.stack([oracle.normed(v) for v in h]) * p["1.scale"] + p["1.shift"]
                h = oracle.layer("GRU", oracle.inner(p, "2"), [h], 2, True, both=True)[0]
                h = anp.tanh(anp.dot(h, p["3.weight"]) + p["3.bias"])
            h = oracle.layer("RNN", oracle.inner(p, "4"), [h], 2, sequences, steps=5)[0]
            rows.append(anp.dot(h, p["5.weight"]) + p["5.bias"])
        return anp.stack(rows)

    p = {name: np.array(value) for name, value in net.parameters.items()}
    got, want = net.predict(x, lengths=lengths), forward(p)
    for row, n in enumerate(ends):
        at = (row, slice(n)) if sequences else (row,)
        np.testing.assert_allclose(got[at], want[at], rtol=1e-12, atol=1e-14)
        assert not sequences or not np.any(got[row, n:])
    expected = autograd.grad(lambda p: mean_square(forward(p), t, ends, sequences))(p)
    for name, value in net.gradients(x, t, lengths=lengths).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-8, atol=1e-13, err_msg=name)
    assert len(net.check_gradients(x, t, lengths=lengths).comparisons) == 2 * len(p)


@pytest.mark.parametrize(("kind", "options"), CELLS, ids=CELL_IDS)
def test_second_derivatives_by_input_agree_with_autograd(kind: str, options: dict[str, Any]) -> None:
    x, v = data(2, 4), data(2, 4, seed=7)
    net = shaken(made(kind, 3, **options), x, np.zeros((2, 3)))
    p = {name: np.array(value) for name, value in net.parameters.items()}
    got = cr.hvp(lambda x: np.sum(np.sin(net(x))), x, v)
    expected = autograd.hessian_vector_product(lambda x: anp.sum(anp.sin(oracle.layer(kind, p, x, 3, **options))))(x, v)
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12)
    assert np.any(got != 0)


def test_hessian_of_a_scanned_cell_by_its_weights() -> None:
    x = data(2, 6)
    w = np.random.default_rng(1).normal(size=(2 + 3, 3))
    v = np.random.default_rng(2).normal(size=w.shape)

    def last(w: Any, module: Any, loop: Callable[..., Any]) -> Any:
        step = lambda h, x: module.tanh(module.dot(x, w[:2]) + module.dot(h, w[2:]))
        return module.sum(module.sin(loop(step)))

    def scanned(step: Callable[..., Any]) -> Any:
        return cr.scan(lambda h, x: (step(h, x), None), np.zeros((2, 3)), np.moveaxis(x, 1, 0))[0]

    def looped(step: Callable[..., Any]) -> Any:
        h = np.zeros((2, 3))
        for t in range(6):
            h = step(h, x[:, t])
        return h

    expected = autograd.hessian_vector_product(lambda w: last(w, anp, looped))(w, v)
    np.testing.assert_allclose(cr.hvp(lambda w: last(w, np, scanned), w, v), expected, rtol=1e-9)


# ------------------------------------------------------------------------------------------------------------ cells of one's own


def sigma(z: Any) -> Any:
    return cr.ops.activations.sigmoid(z)


class Handwritten(nn.Recurrent):
    """An LSTM as a user may write it."""

    def __init__(self, units: int, **options: Any) -> None:
        super().__init__(state=[units, units], **options)
        self.units = units

    def step(self, state: Any, x: Any) -> Any:
        h, c = state
        n = self.units
        z = x @ self.parameter("weight_input", (x.shape[-1], 4 * n)) + h @ self.parameter(
            "weight_hidden", (n, 4 * n), "orthogonal"
        )
        z = z + self.parameter("bias", (4 * n,), "zeros")
        c = sigma(z[:, n : 2 * n]) * c + sigma(z[:, :n]) * np.tanh(z[:, 2 * n : 3 * n])
        h = sigma(z[:, 3 * n :]) * np.tanh(c)
        return (h, c), h


class Cell(nn.Module):
    """The same as a part of its own."""

    def __init__(self, units: int) -> None:
        self.state, self.units = [units, units], units

    step = Handwritten.step


def program_of(net: nn.Module, x: Array, y: Array, lengths: Any = None) -> Program:
    inputs = net._inputs(x, lengths)
    return make_program(net._task(mse(), y, lengths is not None, cr.Adam(), inputs=inputs), len(x), ("step",))


@pytest.mark.parametrize("sequences", [False, True])
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["full", "ragged"])
def test_a_cell_written_by_hand_is_the_very_program_of_the_built_in_one(sequences: bool, lengths: Any) -> None:
    x = data()
    y = np.zeros((4, 5, 3) if sequences else (4, 3))
    options = {"return_sequences": sequences}
    nets = [nn.LSTM(3, **options), Handwritten(3, **options), nn.Recurrent(Cell(3), **options)]
    for net in nets:
        net.fit(x, y, epochs=0)
    keys = [program_of(net, x, y, lengths if sequences else None).key for net in nets]
    assert keys[0] == keys[1]
    entry, other = keys[0][-1][0], keys[2][-1][0]
    assert entry[-1] == other[-1]  # the graph; the names of the state are another matter
    assert list(nets[2].parameters) == ["cell.weight_input", "cell.weight_hidden", "cell.bias"]


def test_a_function_as_cell() -> None:
    def step(state: Any, x: Any) -> Any:
        total, largest = state
        return (total + x, np.maximum(largest, x)), np.concatenate([total, largest], axis=-1) * 0.5 + np.concatenate(
            [x, x], axis=-1
        )

    x = data()
    net = nn.Recurrent(step, state=[2, (2,)])
    net.fit(x, np.zeros((4, 4)), epochs=0, dtype="float64")
    for lengths in (None, LENGTHS):
        got = net.predict(x, lengths=lengths)
        for row, n in enumerate(lengths or [5] * 4):
            total, largest, y = np.zeros(2), np.zeros(2), np.zeros(4)
            for v in x[row, :n]:
                y = 0.5 * np.concatenate([total, largest]) + np.concatenate([v, v])
                total, largest = total + v, np.maximum(largest, v)
            np.testing.assert_allclose(got[row], y, rtol=1e-13)
    backwards = nn.Recurrent(step, state=[2, 2], reverse=True, return_sequences=True)
    backwards.fit(x, np.zeros((4, 5, 4)), epochs=0, dtype="float64")
    np.testing.assert_allclose(backwards.predict(x)[:, ::-1], nn_sequences(step, x[:, ::-1]), rtol=1e-13)


def nn_sequences(step: Any, x: Array) -> Array:
    net = nn.Recurrent(step, state=[2, 2], return_sequences=True)
    net.fit(x, np.zeros((4, 5, 4)), epochs=0, dtype="float64")
    return net.predict(x)


MAKING: list[tuple[Callable[[], Any], str]] = [
    (lambda: nn.LSTM(0), r"LSTM: units.*not 0"),
    (lambda: nn.GRU(2.5), r"GRU: units.*2\.5"),
    (lambda: nn.RNN(3, "tanhh"), r'Did you mean "tanh"'),
    (lambda: nn.RNN(3, dropout=1.0), r"RNN: dropout.*less than 1"),
    (lambda: nn.GRU(3, recurrent_dropout=-0.1), r"GRU: recurrent_dropout"),
    (lambda: nn.LSTM(3, stateful=4, reverse=True), r"stateful.*reverse"),
    (lambda: nn.LSTM(3, stateful=4, learn_initial=True), r"stateful.*learn_initial"),
    (lambda: nn.LSTM(3, stateful=-1), r"stateful.*-1"),
    (lambda: nn.LSTM(3, forget_bias=np.nan), r"finite"),
    (lambda: nn.Recurrent(lambda h, x: (h, h)), r"size of its state"),
    (lambda: nn.Recurrent(lambda h, x: (h, h), state=[]), r"names no array"),
    (lambda: nn.Recurrent(lambda h, x: (h, h), state=(2, 0)), r"state.*not 0"),
    (lambda: nn.Recurrent(3, state=3), r"function step.*not 3"),
    (lambda: nn.Recurrent(Cell, state=3), r"class Cell.*write Cell\(\.\.\.\)"),
    (lambda: nn.Bidirectional(nn.Dense(3)), r"recurrent layer such as LSTM"),
    (lambda: nn.Bidirectional(nn.LSTM), r"class LSTM"),
    (lambda: nn.Bidirectional(nn.LSTM(3, reverse=True)), r"none that has reverse"),
    (lambda: nn.Bidirectional(nn.LSTM(3, stateful=2)), r"none that has stateful"),
    (lambda: nn.TimeDistributed(3), r"takes layers, not 3"),
]


@pytest.mark.parametrize(("make", "said"), MAKING, ids=[said for _, said in MAKING])
def test_layers_made_wrongly(make: Callable[[], Any], said: str) -> None:
    with pytest.raises((cr.UsageError, cr.UnknownNameError), match=said):
        make()


STEPS_GONE_WRONG: list[tuple[Any, type[Exception], str]] = [
    (lambda h, x: h, cr.UsageError, r"pair \(state, output\)"),
    (lambda h, x: (h[:, :1], h), cr.ShapeError, r"state like the one it takes.*\(\d+, 2\).*\(\d+, 1\)"),
    (lambda h, x: ((h, h), h), cr.ShapeError, r"state like the one it takes.*\* of.*tuple\(\*, \*\)"),
    (lambda h, x: (h, None), cr.ShapeError, r"output with the rows first"),
    (lambda h, x: (h, h.T), cr.ShapeError, r"output with the rows first"),
]


@pytest.mark.parametrize(("step", "error", "said"), STEPS_GONE_WRONG, ids=[said[:20] for *_, said in STEPS_GONE_WRONG])
def test_steps_that_return_something_else(step: Any, error: type[Exception], said: str) -> None:
    net = nn.Recurrent(step, state=2)
    with pytest.raises(error, match=said):
        net.fit(data(3), np.zeros((3, 2)))


# ------------------------------------------------------------------------------------------------------ dropout, states, names


class Shown(nn.Module):
    """The gradient by `gain` under a loss Σ t y shows the layer's output in training."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def __call__(self, x: Any) -> Any:
        y = self.layer(x)
        return y * self.parameter("gain", y.shape[1:], "ones")


def shown(net: nn.Module, x: Array, seed: int) -> Array:
    rows = []
    for row in range(len(x)):
        target = np.zeros(net.predict(x).shape)
        target[row] = 1.0
        rows.append(net.gradients(x, target, loss=lambda s, t: s * t, seed=seed)["gain"] * target.size)
    return np.array(rows)


def test_dropout_has_one_mask_for_all_steps() -> None:
    x = np.ones((3, 6, 40))
    net = Shown(nn.Recurrent(lambda h, x: (h, x), state=1, dropout=0.25, return_sequences=True))
    net.fit(x, np.zeros((3, 6, 40)), epochs=0, dtype="float64")
    y = shown(net, x, seed=0)
    assert np.allclose(y[y != 0], 1 / 0.75)
    assert np.all(y == y[:, :1])  # the same at all steps
    assert len({row.tobytes() for row in y[:, 0]}) == 3  # another for each row
    assert np.any(y != shown(net, x, seed=1))
    assert 0.1 < np.mean(y == 0) < 0.4
    np.testing.assert_array_equal(net.predict(x), x)


class Reads(nn.Recurrent):
    """What the step reads of a state that stays 1."""

    def step(self, state: Any, x: Any) -> Any:
        return state * 0 + 1.0, self.drop(state)


def test_recurrent_dropout_has_one_mask_for_all_steps_and_leaves_the_state() -> None:
    x = np.ones((3, 6, 1))
    net = Shown(Reads(state=40, recurrent_dropout=0.25, return_sequences=True))
    net.fit(x, np.zeros((3, 6, 40)), epochs=0, dtype="float64")
    y = shown(net, x, seed=0)[:, 1:]
    assert np.all(y == y[:, :1])
    assert np.allclose(y[y != 0], 1 / 0.75)
    assert 0.1 < np.mean(y == 0) < 0.4
    assert len({row.tobytes() for row in y[:, 0]}) == 3
    np.testing.assert_array_equal(net.predict(x)[:, 1:], 1.0)
    with pytest.raises(cr.UsageError, match=r"self\.drop\(h\).*does not call it"):
        nn.Recurrent(lambda h, x: (h, h), state=2, recurrent_dropout=0.5).fit(x, np.zeros((3, 2)), epochs=1)


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_dropout_of_every_cell_has_right_gradients(kind: str) -> None:
    x, y = data(), data()[:, 0]
    net = nn.Sequential(made(kind, 3, dropout=0.3, recurrent_dropout=0.4), nn.Dropout(0.2), nn.Dense(2))
    shaken(net, x, y)
    net.check_gradients(x, y, lengths=LENGTHS)
    first, again, other = (net.gradients(x, y, seed=seed)["0.bias"] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)


class Halves(nn.Module):
    """A sequence in two parts: the second begins with the state that the first ended with."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def __call__(self, x: Any) -> Any:
        half = x.shape[1] // 2
        first, last = self.layer(x[:, :half])
        return np.concatenate([first, self.layer(x[:, half:], last)[0]], axis=1)


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_a_given_first_state_goes_on(kind: str) -> None:
    x = data(3, 8)
    net = shaken(Halves(made(kind, 4, return_sequences=True, return_state=True)), x, np.zeros((3, 8, 4)))
    whole = made(kind, 4, return_sequences=True)
    whole.fit(x, np.zeros((3, 8, 4)), epochs=0, dtype="float64")
    whole.load_parameters({n.removeprefix("layer."): v for n, v in net.parameters.items()})
    np.testing.assert_allclose(net.predict(x), whole.predict(x), rtol=1e-12, atol=1e-14)
    got, want = net.gradients(x, x[:, :, [0, 1, 0, 1]]), whole.gradients(x, x[:, :, [0, 1, 0, 1]], loss="mse")
    for name, value in want.items():
        np.testing.assert_allclose(got[f"layer.{name}"], value, rtol=1e-9, atol=1e-13)


class Given(nn.Module):
    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def __call__(self, x: Any, h: Any) -> Any:
        return self.layer(x, h)


def test_a_first_state_as_data() -> None:
    x, h = data(), data(width=3)[:, 0]
    net = shaken(Given(nn.GRU(3)), (x, h), np.zeros((4, 3)))
    for row in range(4):
        p = {**oracle.inner(net.parameters, "layer"), "initial_hidden": h[row]}
        np.testing.assert_allclose(net.predict((x, h))[row], oracle.outputs("GRU", p, x[row], 3)[1], rtol=1e-12)
    assert net.predict((x, h), lengths=(LENGTHS, None))[1].tolist() == h[1].tolist()
    net.check_gradients((x, h), np.ones((4, 3)), lengths=(LENGTHS, None))
    with pytest.raises(cr.ShapeError, match=r"first state must be \* of shapes \[\(2, 3\)\]"):
        Given(nn.GRU(3)).fit((x, h[:, :2]), np.zeros((4, 3)))
    both = nn.Bidirectional(nn.GRU(3, return_state=True))

    class Last(nn.Module):
        def __init__(self) -> None:
            self.layer = both

        def __call__(self, x: Any, h: Any) -> Any:
            y, (first, second) = self.layer(x, (h, h))
            return np.concatenate([y, first, second], axis=-1)

    net = shaken(Last(), (x, h), np.zeros((4, 12)))
    np.testing.assert_array_equal(net.predict((x, h))[:, :6], net.predict((x, h))[:, 6:])


def test_stateful_batches_continue_each_other() -> None:
    """Four sequences of 12 steps in three windows: the state after them is that of the whole."""
    x = data(4, 12)
    windows = np.concatenate([x[:, k : k + 4] for k in (0, 4, 8)])
    net = nn.LSTM(3, True, stateful=4)
    zero = np.zeros((12, 4, 3))
    run = net.fit(windows, zero, epochs=1, batch_size=4, shuffle=False, optimizer=cr.SGD(0.0), dtype="float64")
    whole, _ = oracle.outputs("LSTM", net.parameters, x[0], 3)
    np.testing.assert_allclose(net.statistics["state_hidden"][0], whole[-1], rtol=1e-12)
    full = np.asarray(oracle.layer("LSTM", net.parameters, x, 3, True))
    assert run.loss[0] == pytest.approx(np.mean(full**2), rel=1e-12)
    # Another epoch goes on from there, until the states are set back.
    again = net.fit(windows, zero, epochs=1, batch_size=4, shuffle=False)
    assert again.loss[0] != pytest.approx(run.loss[0], rel=1e-6)
    net.reset_state()
    assert net.fit(windows, zero, epochs=1, batch_size=4, shuffle=False).loss == run.loss
    # Evaluation starts anew and moves nothing.
    before = net.statistics
    np.testing.assert_allclose(net.predict(windows[4:8])[0], oracle.outputs("LSTM", net.parameters, windows[4], 3)[0], rtol=1e-12)
    assert_same(net.statistics, before)
    with pytest.raises(cr.ShapeError, match=r"states of 4 rows, but this batch has 5.*batch_size"):
        net.fit(windows, zero, epochs=1, batch_size=5)


def test_a_short_batch_moves_the_states_of_its_rows_only() -> None:
    x = data(6, 3)
    net = nn.RNN(2, stateful=4)
    net.fit(x, np.zeros((6, 2)), epochs=1, batch_size=4, shuffle=False, optimizer=cr.SGD(0.0), dtype="float64")
    p = net.parameters
    for row in range(4):
        steps = np.concatenate([x[row], x[row + 4]]) if row < 2 else x[row]
        np.testing.assert_allclose(net.statistics["state_hidden"][row], oracle.outputs("RNN", p, steps, 2)[1], rtol=1e-12)


def test_names_shapes_and_first_values() -> None:
    x = data(width=100)
    layer = nn.Sequential(nn.LSTM(40), nn.Dense(1))
    layer.fit(x, np.zeros((4, 1)), epochs=0, dtype="float64")
    p = oracle.inner(layer.parameters, "0")
    assert {n: v.shape for n, v in p.items()} == {"weight_input": (100, 160), "weight_hidden": (40, 160), "bias": (160,)}
    for k in range(4):  # each gate by itself
        w, u = oracle.part(p["weight_input"], k, 4), oracle.part(p["weight_hidden"], k, 4)
        assert np.abs(w).max() <= np.sqrt(6 / 140)
        assert w.std() == pytest.approx(np.sqrt(2 / 140), rel=0.05)
        np.testing.assert_allclose(u.T @ u, np.eye(40), atol=1e-12)
    assert p["bias"].tolist() == [0.0] * 40 + [1.0] * 40 + [0.0] * 80
    gru = nn.GRU(5, learn_initial=True)
    gru.fit(x, np.zeros((4, 5)), epochs=0)
    assert {n: v.shape for n, v in gru.parameters.items()} == {
        "initial_hidden": (5,), "weight_input": (100, 15), "bias": (15,), "weight_hidden": (5, 15), "bias_hidden": (15,),
    }  # fmt: skip
    irnn = nn.RNN(5, "relu", init=cr.initializers.normal(0.001), init_hidden="identity")
    irnn.fit(x, np.zeros((4, 5)), epochs=0)
    np.testing.assert_array_equal(irnn.parameters["weight_hidden"], np.eye(5))
    assert irnn.parameters["weight_input"].std() == pytest.approx(0.001, rel=0.1)


def test_both_directions_start_from_weights_of_their_own() -> None:
    layer = nn.GRU(4)
    layer.fit(data(), np.zeros((4, 4)), epochs=0)
    net = nn.Bidirectional(layer)
    net.fit(data(), np.zeros((4, 8)), epochs=0)
    assert np.any(net.parameters["forward.weight_input"] != net.parameters["backward.weight_input"])
    assert net.backward.reverse
    assert not net.forward.reverse


OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("RNN", {"activation": "relu", "init_hidden": "identity"}),
    ("LSTM", {"peephole": True, "layer_norm": True, "forget_bias": 0.5}),
    ("GRU", {"reset_after": False, "learn_initial": True, "reverse": True}),
    ("GRU", {"dropout": 0.1, "recurrent_dropout": 0.2, "init": cr.initializers.normal(0.1)}),
    ("LSTM", {"stateful": 2}),
]


@pytest.mark.parametrize(("kind", "options"), OPTIONS, ids=[f"{k}-{'-'.join(o)}" for k, o in OPTIONS])
def test_a_saved_network_goes_on(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    x, y = data(6), data(6)[:, 0]
    net = nn.Sequential(made(kind, 3, **options), nn.Dense(2))
    net.fit(x, y, epochs=1, batch_size=2, lengths=[1, 2, 3, 4, 5, 0])
    net.save(tmp_path / "net.safetensors")
    again = cr.load(tmp_path / "net.safetensors")
    assert repr(again) == repr(net)
    for each in (net, again):
        each.fit(x, y, epochs=2, batch_size=2, lengths=[1, 2, 3, 4, 5, 0])
    assert_same(state(again), state(net))
    longer = data(3, 8)
    np.testing.assert_array_equal(again.predict(longer, lengths=[8, 0, 3]), net.predict(longer, lengths=[8, 0, 3]))


# ------------------------------------------------------------------------------------------------------------- PyTorch's weights


def torch_like(kind: str, gates: int, layers: int, both: bool, r: np.random.Generator) -> dict[str, Array]:
    weights: dict[str, Array] = {}
    for number in range(layers):
        width = 2 if number == 0 else 3 * (2 if both else 1)
        for suffix in ("", "_reverse") if both else ("",):
            shapes = {
                "weight_ih": (gates * 3, width),
                "weight_hh": (gates * 3, 3),
                "bias_ih": (gates * 3,),
                "bias_hh": (gates * 3,),
            }
            weights |= {f"{name}_l{number}{suffix}": r.normal(size=shape) for name, shape in shapes.items()}
    return weights


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize(("kind", "gates"), [("RNN", 1), ("LSTM", 4), ("GRU", 3)])
def test_weights_of_pytorch_load_by_name(kind: str, gates: int, both: bool) -> None:
    w = torch_like(kind, gates, 2, both, np.random.default_rng(0))
    make = lambda: made(kind, 3, both=both, return_sequences=True)
    net = nn.Sequential(make(), make())
    x = data()
    net.fit(x, np.zeros((4, 5, 6 if both else 3)), epochs=0, dtype="float64")
    net.load_parameters(nn.torch_parameters({f"rnn.{n}": v for n, v in w.items()}, "0", "1", prefix="rnn."))
    h = x
    for number in range(2):  # PyTorch's own layout: rows of gates, two biases
        halves = []
        for suffix in ("", "_reverse") if both else ("",):
            p = {name: w[f"{name}_l{number}{suffix}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
            halves.append(pytorch(kind, p, h[:, ::-1])[:, ::-1] if suffix else pytorch(kind, p, h))
        h = np.concatenate(halves, axis=-1)
    np.testing.assert_allclose(net.predict(x), h, rtol=1e-11, atol=1e-13)


def pytorch(kind: str, p: dict[str, Array], x: Array) -> Array:
    """The definitions of PyTorch's documentation."""
    s = lambda z: 1 / (1 + np.exp(-z))
    h, c, ys = np.zeros((len(x), 3)), np.zeros((len(x), 3)), []
    for t in range(x.shape[1]):
        a, b = x[:, t] @ p["weight_ih"].T + p["bias_ih"], h @ p["weight_hh"].T + p["bias_hh"]
        if kind == "RNN":
            h = np.tanh(a + b)
        elif kind == "LSTM":
            i, f, g, o = np.split(a + b, 4, axis=1)
            c = s(f) * c + s(i) * np.tanh(g)
            h = s(o) * np.tanh(c)
        else:
            (ar, az, an), (br, bz, bn) = np.split(a, 3, axis=1), np.split(b, 3, axis=1)
            z = s(az + bz)
            h = (1 - z) * np.tanh(an + s(ar + br) * bn) + z * h
        ys.append(h)
    return np.stack(ys, axis=1)


def test_weights_of_pytorch_that_do_not_fit() -> None:
    w = torch_like("LSTM", 4, 2, False, np.random.default_rng(0))
    with pytest.raises(cr.DataError, match="a layer 1: name ours"):
        nn.torch_parameters(w, "0")
    with pytest.raises(cr.DataError, match='no "weight_ih_l2"'):
        nn.torch_parameters(w, "0", "1", "2")
    with pytest.raises(cr.DataError, match="proj_size"):
        nn.torch_parameters({**w, "weight_hr_l0": np.ones((2, 3))}, "0", "1")
    without = {n: v for n, v in w.items() if "bias" not in n}
    assert not np.any(nn.torch_parameters(without, "0", "1")["1.bias"])


# ----------------------------------------------------------------------------------------------------------------- through time


def test_gradient_through_time_of_a_linear_network() -> None:
    """h_t = h_{t-1} W + x: ∂L/∂h_t = ∂L/∂h_T Wᵀ^(T-t)."""
    x, y = data(3, 6, 2), data(3, 6, 2, seed=4)[:, 0]
    for scale in (0.5, 1.5):
        net = nn.RNN(2, "identity")
        net.fit(x, y, epochs=0, dtype="float64")
        w = scale * np.array([[0.6, -0.8], [0.8, 0.6]])
        net.load_parameters({"weight_input": np.eye(2), "weight_hidden": w, "bias": np.zeros(2)})
        g = 2 * (net.predict(x) - y) / y.size
        norms = net.gradients(x, y, loss="mse", through_time=True)
        assert list(norms) == ["hidden"]
        np.testing.assert_allclose(norms["hidden"], [np.linalg.norm(g) * scale ** (5 - t) for t in range(6)], rtol=1e-10)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_gradient_through_time_that_explodes(backend: str) -> None:
    """Norms are right up to the largest number that there is, and from there on inf, and nan where inf has met inf."""
    x, y = np.zeros((3, 100, 2)), data(3, 100, 2)[:, 0]
    net = nn.RNN(2, "identity")
    net.fit(x, y, epochs=0, dtype="float64")
    w = np.array([[0.6, -0.8], [0.8, 0.6]])
    for scale, begin in ((1e4, 25), (1e-4, 25)):
        net.load_parameters({"weight_input": np.eye(2), "weight_hidden": scale * w, "bias": np.zeros(2)})
        norms = net.gradients(x, y, loss="mse", through_time=True, backend=backend)["hidden"]
        expected = [np.linalg.norm(2 * y / y.size) * scale ** (99.0 - t) for t in range(begin, 100)]
        np.testing.assert_allclose(norms[begin:], expected, rtol=1e-10)
        if scale > 1:
            assert np.isinf(norms[20:23]).any()
            assert np.isnan(norms[0])
    assert norms[0] == 0


def test_gradient_through_time_of_a_stack_agrees_with_autograd() -> None:
    x, y = data(3, 4), data(3, 4)[:, 0]
    net = shaken(nn.Sequential(nn.LSTM(3, True), nn.Bidirectional(nn.GRU(2)), nn.Dense(2)), x, y)
    p = {n: np.array(v) for n, v in net.parameters.items()}
    ends = [4, 2, 0]

    def objective(taps: Any) -> Any:
        rows = []
        for row, n in enumerate(ends):
            state, hs = [np.zeros(3), np.zeros(3)], []
            for t in range(n):
                state, _ = oracle.lstm(oracle.inner(p, "0"), state, x[row, t])
                state = [s + tap[t, row] for s, tap in zip(state, taps, strict=True)]
                hs.append(state[0])
            h = oracle.layer("GRU", oracle.inner(p, "1"), [hs], 2, both=True)[0]
            rows.append(anp.dot(h, p["2.weight"]) + p["2.bias"])
        return anp.mean((anp.stack(rows) - y) ** 2)

    expected = autograd.grad(objective)((np.zeros((4, 3, 3)), np.zeros((4, 3, 3))))
    got = net.gradients(x, y, lengths=ends, through_time=True)
    assert list(got) == ["0.hidden", "0.cell", "1.forward.hidden", "1.backward.hidden"]
    for name, g in zip(("0.hidden", "0.cell"), expected, strict=True):
        np.testing.assert_allclose(got[name], np.sqrt(np.sum(g**2, axis=(1, 2))), rtol=1e-9, atol=1e-14)
    with pytest.raises(cr.UsageError, match="no recurrent layer"):
        shaken(nn.Dense(2), x[:, 0], y).gradients(x[:, 0], y, through_time=True)
