"""Recurrent layers against plain loops that the package `autograd` differentiates; sequences of different length against one sequence
at a time; what they must learn; and what they refuse."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import autograd
import autograd.numpy as anp
import numpy as np
import pytest
import recurrent_oracle as oracle
from same import assert_same, state

import chainrule as cr
from chainrule import nn
from chainrule.losses import mse
from chainrule.program import Program
from chainrule.train.objective import make_program

Array = np.ndarray

LENGTHS = [5, 0, 2, 1]
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


def data(rows: int = 4, steps: int = 5, width: int = 2, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=(rows, steps, width))


def shaken(net: nn.Module, x: Any, y: Any, seed: int = 1, dtype: str = "float64", **options: Any) -> nn.Module:
    """A network that was built, with random parameters: zeros and ones hide errors."""
    net.fit(x, y, loss="mse", epochs=0, dtype=dtype, **options)
    r = np.random.default_rng(seed)
    net.load_parameters({name: r.normal(size=value.shape) for name, value in net.parameters.items()})
    return net


def made(kind: str, units: int, both: bool = False, **options: Any) -> nn.Module:
    layer = getattr(nn, kind)(units, **options)
    return nn.Bidirectional(layer) if both else layer


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


# ------------------------------------------------------------------------------------------------------- sequences that differ


def ragged_net(sequences: bool, **options: Any) -> nn.Module:
    return nn.Sequential(nn.Bidirectional(nn.LSTM(4, True, **options)), nn.GRU(3, sequences), nn.Dense(2))


@pytest.mark.parametrize("sequences", [False, True])
@pytest.mark.parametrize("junk", [np.nan, np.inf, -1e30, 7.0])
def test_what_lies_beyond_the_end_changes_no_bit(sequences: bool, junk: float) -> None:
    clean, target = data(8, 6), data(8, 6, seed=2) if sequences else data(8, 6, seed=2)[:, 0]
    lengths = np.array([6, 3, 0, 1, 5, 2, 6, 4])
    beyond = np.arange(6) >= lengths[:, None]
    dirty, dirty_target = clean.copy(), target.copy()
    dirty[beyond] = junk
    if sequences:
        dirty_target[beyond] = junk
    nets, runs = [], []
    for x, y in ((clean, target), (dirty, dirty_target)):
        net = ragged_net(sequences, dropout=0.2, recurrent_dropout=0.2)
        runs.append(net.fit(x, y, lengths=lengths, epochs=3, batch_size=3, validation=0.25, metrics=["r2"]))
        nets.append(net)
    assert (runs[0].loss, runs[0].validation_loss, runs[0].metrics) == (runs[1].loss, runs[1].validation_loss, runs[1].metrics)
    assert_same(state(nets[0]), state(nets[1]))
    np.testing.assert_array_equal(nets[0].predict(clean, lengths=lengths), nets[0].predict(dirty, lengths=lengths))
    assert nets[0].evaluate(clean, target, lengths=lengths) == nets[0].evaluate(dirty, dirty_target, lengths=lengths)
    pair = [nets[0].gradients(x, y, lengths=lengths) for x, y in ((clean, target), (dirty, dirty_target))]
    assert_same(*pair)


@pytest.mark.parametrize("sequences", [False, True])
def test_a_list_an_array_with_lengths_and_one_with_a_mask_are_the_same(sequences: bool) -> None:
    x, y = data(6, 5), data(6, 5, seed=2) if sequences else data(6, 5, seed=2)[:, 0]
    lengths = np.array([5, 3, 0, 1, 4, 2])
    mask = np.arange(5) < lengths[:, None]
    listed = [row[:n] for row, n in zip(x, lengths, strict=True)]
    targets = [row[:n] for row, n in zip(y, lengths, strict=True)] if sequences else y
    forms: list[tuple[Any, Any, dict[str, Any]]] = [
        (x, y, {"lengths": lengths}), (x, y, {"lengths": list(lengths * 1.0)}), (x, y, {"mask": mask}),
        (x, y, {"mask": mask * 1.0}), (listed, y, {}), (listed, targets, {}),
    ]  # fmt: skip
    nets = [ragged_net(sequences) for _ in forms]
    runs = [net.fit(a, b, epochs=2, batch_size=4, **form) for net, (a, b, form) in zip(nets, forms, strict=True)]
    assert all(run.loss == runs[0].loss for run in runs)
    for net, (a, b, form) in zip(nets, forms, strict=True):
        assert_same(state(net), state(nets[0]))
        np.testing.assert_array_equal(net.predict(a, **form), nets[0].predict(x, lengths=lengths))
        assert net.evaluate(a, b, **form) == nets[0].evaluate(x, y, lengths=lengths)


@pytest.mark.parametrize("sequences", [False, True])
def test_ragged_equals_one_sequence_at_a_time(sequences: bool) -> None:
    x, y = data(5, 6), data(5, 6, seed=2) if sequences else data(5, 6, seed=2)[:, 0]
    lengths = [6, 1, 3, 5, 2]
    net = shaken(ragged_net(sequences), x, y)
    whole = net.predict(x, lengths=lengths)
    together = net.gradients(x, y, lengths=lengths)
    loss = net.evaluate(x, y, lengths=lengths)["loss"]
    sums, losses = {name: np.zeros_like(g) for name, g in together.items()}, []
    for row, n in enumerate(lengths):
        alone, target = x[row : row + 1, :n], y[row : row + 1, :n] if sequences else y[row : row + 1]
        share = n / sum(lengths) if sequences else 1 / len(lengths)
        np.testing.assert_allclose(whole[row, :n] if sequences else whole[row], net.predict(alone)[0], rtol=1e-12, atol=1e-14)
        for name, g in net.gradients(alone, target).items():
            sums[name] += share * g
        losses.append(share * net.evaluate(alone, target)["loss"])
    assert loss == pytest.approx(sum(losses), rel=1e-12)
    for name, g in together.items():
        np.testing.assert_allclose(g, sums[name], rtol=1e-9, atol=1e-13)


def test_more_padding_is_the_same_to_rounding() -> None:
    x, y, lengths = data(5, 4), data(5, 4, seed=2), [4, 1, 3, 0, 2]
    net = shaken(ragged_net(True), x, y)
    wide, wide_y = np.pad(x, [(0, 0), (0, 3), (0, 0)]), np.pad(y, [(0, 0), (0, 3), (0, 0)])
    np.testing.assert_allclose(net.predict(wide, lengths=lengths)[:, :4], net.predict(x, lengths=lengths), rtol=1e-13, atol=1e-15)
    for name, g in net.gradients(x, y, lengths=lengths).items():
        np.testing.assert_allclose(net.gradients(wide, wide_y, lengths=lengths)[name], g, rtol=1e-10, atol=1e-14)
    for name, g in net.gradients(x, y, lengths=lengths).items():  # targets may stop where the longest sequence does
        np.testing.assert_allclose(net.gradients(wide, y, lengths=lengths)[name], g, rtol=1e-10, atol=1e-14)


def test_lengths_of_all_steps_are_as_none() -> None:
    x, y = data(6, 5), data(6, 5, seed=2)
    net = shaken(ragged_net(True), x, y)
    full = net.gradients(x, y, lengths=[5] * 6)
    for name, g in net.gradients(x, y).items():
        np.testing.assert_allclose(full[name], g, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("sequences", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
def test_any_number_of_threads_gives_the_same_bits(sequences: bool, ragged: bool) -> None:
    x, y = data(24, 7, 5), data(24, 7, 2, seed=2) if sequences else data(24, 7, 2, seed=2)[:, 0]
    lengths = np.random.default_rng(0).integers(0, 8, 24) if ragged else None
    nets = []
    for threads in (1, 2, 3):
        net = nn.Sequential(nn.LSTM(6, True, recurrent_dropout=0.3), nn.Bidirectional(nn.GRU(5, sequences)), nn.Dense(2))
        run = net.fit(x, y, lengths=lengths, epochs=3, batch_size=10, threads=threads)
        nets.append((net, run.loss))
    for net, loss in nets[1:]:
        assert loss == nets[0][1]
        assert_same(state(net), state(nets[0][0]))


def test_sequences_of_no_length_give_the_first_state() -> None:
    x = data(3, 4)
    net = shaken(nn.LSTM(2, learn_initial=True), x, np.zeros((3, 2)))
    np.testing.assert_array_equal(net.predict(x, lengths=[0, 0, 0]), np.tile(net.parameters["initial_hidden"], (3, 1)))
    np.testing.assert_array_equal(net.predict([row[:0] for row in x[:2]] + [x[2]])[0], net.parameters["initial_hidden"])
    cell = shaken(nn.Recurrent(lambda h, x: (h + x, 1 + h), state=2), x, np.zeros((3, 2)))
    assert cell.predict(x, lengths=[0, 4, 1])[0].tolist() == [0.0, 0.0]


def test_one_step() -> None:
    x, y = data(4, 1), data(4, 1)[:, 0]
    net = shaken(ragged_net(False), x, y)
    np.testing.assert_allclose(net.predict(x), net.predict(data(4, 1), lengths=[1] * 4), rtol=1e-14)
    net.check_gradients(x, y, lengths=[1, 0, 1, 1])


def test_other_numbers_of_steps_than_the_network_was_built_for() -> None:
    net = nn.Sequential(nn.GRU(4), nn.Dense(2))
    net.fit(data(6, 5), data(6, 5)[:, 0], epochs=2, dtype="float64")
    for steps in (1, 3, 9):
        x = data(4, steps, seed=steps)
        expected = (
            oracle.layer("GRU", oracle.inner(net.parameters, "0"), x, 4) @ net.parameters["1.weight"] + net.parameters["1.bias"]
        )
        np.testing.assert_allclose(net.predict(x), expected, rtol=1e-12, atol=1e-14)
        assert net.evaluate(x, x[:, 0])["loss"] == pytest.approx(np.mean((expected - x[:, 0]) ** 2), rel=1e-12)
        net.fit(x, x[:, 0], epochs=1)
        net.check_gradients(x, x[:, 0])
    fixed = nn.Sequential(nn.GRU(4, True), nn.Flatten(), nn.Dense(2))
    fixed.fit(data(6, 5), data(6, 5)[:, 0], epochs=0)
    with pytest.raises(cr.ShapeError, match=r'"2.weight" has shape \(20, 2\)'):
        fixed.predict(data(6, 4))
    with pytest.raises(cr.ShapeError, match=r"rows of shape \(5, 3\).*built for rows of shape \(5, 2\)"):
        net.predict(data(6, 5, 3))


def test_validation_may_have_other_lengths() -> None:
    r = np.random.default_rng(0)
    sequences = [r.normal(size=(n, 2)) for n in (3, 5, 2, 4)]
    others = [r.normal(size=(n, 2)) for n in (8, 1, 6)]
    net = nn.Sequential(nn.LSTM(3, True), nn.Dense(2))
    run = net.fit(sequences, sequences, validation=(others, others), epochs=2, metrics=["r2"], dtype="float64")
    assert run.validation_loss[-1] == pytest.approx(net.evaluate(others, others)["loss"], rel=1e-12)
    assert run.metrics["validation_r2"][-1] == pytest.approx(net.evaluate(others, others, metrics=["r2"])["r2"], rel=1e-12)
    x = data(4, 5)
    run = net.fit(x, x, validation=(x, x, [1, 2, 3, 4]), epochs=1)
    assert run.validation_loss[-1] == pytest.approx(net.evaluate(x, x, lengths=[1, 2, 3, 4])["loss"], rel=1e-12)


def test_losses_and_metrics_count_each_step_once() -> None:
    x, lengths = data(5, 6), [6, 1, 3, 0, 2]
    y = np.random.default_rng(3).integers(0, 3, (5, 6))
    weight = np.array([1.0, 2.0, 0.5, 1.0, 3.0])
    net = shaken(nn.Sequential(nn.RNN(4, return_sequences=True), nn.Dense(3)), x, np.zeros((5, 6, 3)))
    y_padded = np.where(np.arange(6) < np.array(lengths)[:, None], y, -1)
    got = net.evaluate(x, y_padded, lengths=lengths, loss="cross_entropy", metrics=["accuracy", "log_loss"], sample_weight=weight)
    scores = net.predict(x, lengths=lengths)
    steps = [(row, t) for row, n in enumerate(lengths) for t in range(n)]
    logs = [np.log(np.exp(scores[s]).sum()) - scores[s][y[s]] for s in steps]
    each = [weight[row] for row, _ in steps]
    assert got["loss"] == pytest.approx(np.average(logs, weights=each), rel=1e-12)
    assert got["log_loss"] == pytest.approx(got["loss"], rel=1e-12)
    assert got["accuracy"] == pytest.approx(np.average([np.argmax(scores[s]) == y[s] for s in steps], weights=each), rel=1e-12)
    net.fit(x, y_padded, lengths=lengths, loss="cross_entropy", epochs=0)
    np.testing.assert_allclose(net.predict_proba(x, lengths=lengths)[0].sum(axis=-1), 1.0)
    run = net.fit(
        x, y_padded, lengths=lengths, epochs=1, batch_size=2, optimizer=cr.SGD(0.0), metrics=["accuracy"], sample_weight=weight
    )
    assert run.loss[0] == pytest.approx(got["loss"], rel=1e-12)
    assert run.metrics["accuracy"][0] == pytest.approx(got["accuracy"], rel=1e-12)


def spread_of(prediction: Array, target: Array) -> float:
    """A metric of a user's own: it sees no weights, and says how many numbers there are."""
    return float(np.ptp(prediction) + prediction.size)


def of_steps(loss: str, s: Array, t: Array, w: Array) -> dict[str, float]:
    """Metrics by NumPy over steps one after the other: scores and targets (steps, 2) or classes (steps,), weights (steps,)."""
    if loss == "mse":
        e = np.average((s - t) ** 2, axis=0, weights=w)
        about = np.average((t - np.average(t, axis=0, weights=w)) ** 2, axis=0, weights=w)
        mae = np.average(np.abs(s - t).mean(axis=1), weights=w)
        return {"r2": np.mean(1 - e / about), "rmse": np.sqrt(e.mean()), "mae": mae, "spread_of": spread_of(s, t)}
    logs = np.log(np.exp(s).sum(axis=1)) - s[np.arange(len(s)), t]
    rank, up = s[:, 1] - s[:, 0], t == 1
    pairs = w[up][:, None] * w[~up]
    wins = np.sum(pairs * (rank[up][:, None] > rank[~up])) / pairs.sum()
    right = np.average(s.argmax(axis=1) == t, weights=w)
    return {"accuracy": right, "log_loss": np.average(logs, weights=w), "auc": wins, "spread_of": spread_of(s.argmax(axis=1), t)}


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("own", [False, True], ids=["sums", "scores too"])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_metrics_are_those_of_the_steps_that_count(loss: str, own: bool, weighted: bool, backend: str) -> None:
    r = np.random.default_rng(7)
    x, lengths = data(7, 6), np.array([6, 1, 3, 0, 2, 5, 4])
    y = r.normal(size=(7, 6, 2)) if loss == "mse" else r.integers(0, 2, (7, 6))
    weight = np.array([1.0, 2.0, 0.5, 1.0, 3.0, 0.0, 0.25]) if weighted else None
    within = np.arange(6) < lengths[:, None]
    net = shaken(nn.Sequential(nn.GRU(4, return_sequences=True), nn.Dense(2)), x, np.zeros((7, 6, 2)))
    sums = ["r2", "rmse", "mae"] if loss == "mse" else ["accuracy", "log_loss"]
    names = [*sums, *([] if loss == "mse" else ["auc"]), spread_of] if own else sums

    def judged(x: Array, y: Array) -> Iterator[dict[str, float]]:
        """By `evaluate`; as seen in three epochs of several batches that learn nothing, and on the same rows held out, of which each
        has weight 1."""
        rows = {"loss": loss, "lengths": lengths, "metrics": names, "sample_weight": weight, "backend": backend}
        for rule in (cr.SGD(0.0), cr.SGD(0.0, accumulate=2)):
            fitted = copy.deepcopy(net)
            run = fitted.fit(x, y, epochs=3, batch_size=3, optimizer=rule, validation=(x, y, lengths), **rows)
            seen = [{k: v[epoch] for k, v in run.metrics.items()} for epoch in range(3)]
            yield from ({k: v for k, v in each.items() if not k.startswith("validation_")} for each in seen)
            yield {k.removeprefix("validation_"): v[-1] for k, v in run.metrics.items() if k.startswith("validation_")}
            run = fitted.fit(x, y, epochs=3, batch_size=3, optimizer=rule, **rows)
            yield from ({k: v[epoch] for k, v in run.metrics.items()} for epoch in range(3))
        found = net.evaluate(x, y, **rows)
        del found["loss"]
        yield found

    results = list(judged(x, y))
    scores, even = net.predict(x, lengths=lengths), np.broadcast_to(np.ones((7, 1)), within.shape)[within]
    each = even if weight is None else np.broadcast_to(weight[:, None], within.shape)[within]
    for at, got in enumerate(results):
        want = of_steps(loss, scores[within], y[within], even if at in (3, 10) else each)
        assert got == pytest.approx({k: want[k] for k in got}, rel=1e-10), at
        assert len(got) == len(names)
    x, y = x.copy(), y.copy()
    x[~within], y[~within] = 1e30, -1
    assert list(judged(x, y)) == results  # to the bit


@pytest.mark.parametrize("layer", [lambda: nn.RNN(3, return_sequences=True), lambda: nn.Dense(3)], ids=["RNN", "Dense"])
def test_validation_on_a_pair_beside_weighted_sequences(layer: Callable[[], nn.Module]) -> None:
    """Rows of such a pair have weight 1; lengths hold for the rows that have some, and for no others."""
    x, y = data(6, 5), data(6, 5, seed=2)
    net = nn.Sequential(layer(), nn.Dense(2))
    for lengths, pair in ((None, (x, y)), ([1, 2, 3, 4, 5, 0], (x, y)), (None, (x, y, [5, 0, 1, 2, 3, 4]))):
        rows = {"lengths": lengths, "sample_weight": np.arange(6.0), "metrics": ["mae"]}
        run = net.fit(x, y, validation=pair, epochs=1, optimizer=cr.SGD(0.0), **rows)
        found = net.evaluate(x, y, **rows)
        assert (run.loss[-1], run.metrics["mae"][-1]) == pytest.approx((found["loss"], found["mae"]), rel=1e-6)
        found = net.evaluate(*pair[:2], lengths=pair[2] if len(pair) == 3 else None, metrics=["mae"])
        assert run.validation_loss[-1] == pytest.approx(found["loss"], rel=1e-6)
        assert run.metrics["validation_mae"][-1] == pytest.approx(found["mae"], rel=1e-6)


@pytest.mark.parametrize("rule", [lambda: cr.SGD(0.1, accumulate=2), lambda: cr.optim.LBFGS()], ids=["accumulate", "LBFGS"])
def test_updates_from_several_batches_are_exact(rule: Callable[[], Any]) -> None:
    """The divisor is the number of steps that count in all batches of an update."""
    x, y, lengths = data(8, 5), data(8, 5, seed=1), [5, 1, 0, 2, 3, 3, 1, 4]
    nets = [nn.Sequential(nn.RNN(3, return_sequences=True), nn.Dense(2)) for _ in range(2)]
    nets[0].fit(x, y, lengths=lengths, epochs=1, batch_size=4, shuffle=False, optimizer=rule(), dtype="float64")
    whole = cr.SGD(0.1) if isinstance(rule(), cr.SGD) else rule()
    nets[1].fit(x, y, lengths=lengths, epochs=1, batch_size=8, shuffle=False, optimizer=whole, dtype="float64")
    for name, value in nets[1].parameters.items():
        np.testing.assert_allclose(nets[0].parameters[name], value, rtol=1e-9, atol=1e-12)


def test_equations_and_costs_of_a_recurrent_network() -> None:
    x, y = data(), data()
    net = nn.Sequential(nn.GRU(3, True), nn.Dense(2))
    net.fit(x, y, lengths=LENGTHS, epochs=1)
    assert "tanh" in cr.explain(net, x, y).text
    assert net.compiled.cost().total.flops > 0


def test_words_of_different_number() -> None:
    texts = [[1, 2, 3], [4], [2, 2], [0, 1, 2, 3, 4]]
    net = nn.Sequential(nn.Embedding(5, 3), nn.Bidirectional(nn.GRU(4)), nn.Dense(2))
    net.fit(texts, [0, 1, 0, 1], loss="cross_entropy", epochs=2, dtype="float64")
    for text, row in zip(texts, net.predict(texts), strict=True):
        np.testing.assert_allclose(net.predict(np.array([text]))[0], row, rtol=1e-12, atol=1e-14)
    with pytest.raises(cr.DataError, match=r"outside -?\d+\.\.4"):
        net.predict([[1, 2], [9]])


class Pair(nn.Module):
    """Two sequences with lengths of their own."""

    def __init__(self) -> None:
        self.first, self.second = nn.LSTM(3), nn.GRU(2)

    def __call__(self, first: Any, second: Any) -> Any:
        return np.concatenate([self.first(first), self.second(second)], axis=-1)


def test_two_inputs_with_lengths_of_their_own() -> None:
    a, b, y = data(4, 5), data(4, 3, seed=2), np.zeros((4, 5))
    net = shaken(Pair(), {"first": a, "second": b}, y)
    lengths = {"first": [5, 0, 2, 1], "second": [1, 2, 3, 0]}
    got = net.predict({"first": a, "second": b}, lengths=lengths)
    for row in range(4):
        parts = []
        for name, kind, x, units in (("first", "LSTM", a, 3), ("second", "GRU", b, 2)):
            alone = x[row : row + 1, : lengths[name][row]]
            parts.append(oracle.layer(kind, oracle.inner(net.parameters, name), alone, units))
        np.testing.assert_allclose(got[row], np.concatenate(parts, axis=-1)[0], rtol=1e-12, atol=1e-14)
    listed = {"first": [a[i, :n] for i, n in enumerate([5, 0, 2, 1])], "second": b}
    np.testing.assert_array_equal(net.predict(listed), net.predict({"first": a, "second": b}, lengths={"first": [5, 0, 2, 1]}))
    net.check_gradients({"first": a, "second": b}, y, lengths=lengths)
    with pytest.raises(cr.UsageError, match=r"several inputs.*lengths=\{'first'"):
        net.predict({"first": a, "second": b}, lengths=[1, 1, 1, 1])


class Joined(nn.Module):
    def __init__(self) -> None:
        self.layer = nn.GRU(3)

    def __call__(self, first: Any, second: Any) -> Any:
        return self.layer(np.concatenate([first, second], axis=-1))


def test_inputs_that_share_their_lengths_may_be_joined() -> None:
    a, b, y = data(4, 5), data(4, 5, seed=2), np.zeros((4, 3))
    net = shaken(Joined(), (a, b), y)
    got = net.predict((a, b), lengths=(LENGTHS, LENGTHS))
    both = np.concatenate([a, b], axis=-1)
    rows = [both[i, :n] for i, n in enumerate(LENGTHS)]
    np.testing.assert_allclose(got, oracle.layer("GRU", oracle.inner(net.parameters, "layer"), rows, 3), rtol=1e-12, atol=1e-14)
    with pytest.raises(cr.UsageError, match="lengths of their own"):
        net.predict((a, b), lengths=(LENGTHS, [1, 2, 3, 4]))


# -------------------------------------------------------------------------------------------------------------- what is refused

BAD_LENGTHS = [
    ({"lengths": [5, 6, 1, 1]}, cr.DataError, r"row 1 of x.*longer than its 5 steps: 6"),
    ({"lengths": [5, 1, -2, 1]}, cr.DataError, r"row 2 of x.*negative: -2"),
    ({"lengths": [5, 1, 2]}, cr.ShapeError, r"4 rows of x, not shape \(3,\)"),
    ({"lengths": 3}, cr.ShapeError, r"4 rows of x, not shape \(\)"),
    ({"lengths": [1.5, 1, 1, 1]}, cr.DataError, r"whole numbers"),
    ({"lengths": ["a"] * 4}, cr.DataError, r"whole numbers"),
    ({"mask": [[1, 0, 1, 0, 0]] + [[1] * 5] * 3}, cr.DataError, r"row 0 of x.*hole"),
    ({"mask": [[1] * 5] * 3 + [[0, 1, 1, 1, 1]]}, cr.DataError, r"row 3 of x.*hole"),
    ({"mask": [[1] * 4] * 4}, cr.ShapeError, r"\(4, 5\).*not \(4, 4\)"),
    ({"mask": [[2] * 5] * 4}, cr.DataError, r"True and False"),
    ({"lengths": [1] * 4, "mask": [[1] * 5] * 4}, cr.UsageError, r"not both"),
]


@pytest.mark.parametrize(("given", "error", "said"), BAD_LENGTHS, ids=[said for _, _, said in BAD_LENGTHS])
@pytest.mark.parametrize("use", ["fit", "predict", "evaluate", "gradients", "check_gradients"])
def test_bad_lengths_and_masks(given: dict[str, Any], error: type[Exception], said: str, use: str) -> None:
    x, y = data(), data()[:, 0]
    net = nn.Sequential(nn.GRU(3), nn.Dense(2))
    net.fit(x, y, epochs=0)
    with pytest.raises(error, match=said):
        getattr(net, use)(*((x,) if use == "predict" else (x, y)), **given)
    with pytest.raises(error, match=said):
        nn.GRU(2).fit(x, y, **given)


def test_data_that_are_no_sequences() -> None:
    net = nn.Sequential(nn.GRU(3), nn.Dense(2))
    with pytest.raises(cr.DataError, match=r"x is empty \(shape \(4, 0, 2\)\)"):
        net.fit(data(4, 0), data(4, 1)[:, 0])
    with pytest.raises(cr.DataError, match=r"more than their length.*\(2,\) and \(3,\)"):
        net.fit([np.ones((4, 2)), np.ones((3, 3))], np.ones((2, 2)))
    with pytest.raises(cr.DataError, match=r"hold no numbers"):
        net.fit([np.ones((4, 0)), np.ones((3, 0))], np.ones((2, 2)))
    with pytest.raises(cr.DataError, match=r"rows of one of its sequences differ in length"):
        net.fit([[[1.0], [1.0, 2.0]], [[1.0]]], np.ones((2, 2)))
    with pytest.raises(cr.DataError, match=r"text"):
        net.fit([["a", "b"], ["c"]], np.ones((2, 2)))
    with pytest.raises(cr.ShapeError, match=r"GRU needs sequences.*x\[\.\.\., None\]"):
        net.fit(np.ones((4, 5)), np.ones((4, 2)))
    with pytest.raises(cr.ShapeError, match=r"GRU needs sequences"):
        net.fit(np.ones(4), np.ones((4, 2)))
    with pytest.raises(cr.UsageError, match=r"leave lengths and mask out"):
        net.fit([np.ones((4, 2)), np.ones((3, 2))], np.ones((2, 2)), lengths=[4, 3])
    assert not net.built
    with pytest.raises(cr.DataError, match=r"no layer of this network knows where a sequence ends"):
        nn.Dense(2).fit([[1.0, 2.0], [1.0]], np.ones((2, 2)))


def test_targets_that_do_not_fit_the_sequences() -> None:
    r = np.random.default_rng(0)
    x = [r.normal(size=(n, 2)) for n in (3, 5, 2)]
    steps = nn.Sequential(nn.GRU(3, True), nn.Dense(2))
    with pytest.raises(cr.DataError, match=r"y differ in length.*not the lengths of those of x"):
        steps.fit(x, [r.normal(size=(n, 2)) for n in (3, 5, 1)])
    with pytest.raises(cr.ShapeError, match=r"each of the 5 steps of x.*\(3, 4, 2\)"):
        steps.fit(x, np.ones((3, 4, 2)))
    with pytest.raises(cr.ShapeError, match=r"each of the 5 steps of x.*\(3, 2\)"):
        steps.fit(x, np.ones((3, 2)))
    with pytest.raises(cr.DataError, match=r"outputs of this network do not"):
        nn.Sequential(nn.GRU(3), nn.Dense(2)).fit(x, x)
    with pytest.raises(cr.DataError, match=r"all sequences have length 0"):
        steps.fit(np.ones((3, 5, 2)), np.ones((3, 5, 2)), lengths=[0, 0, 0])
    with pytest.raises(cr.ShapeError, match=r"first axes must be rows and steps"):
        steps.fit(x, x, loss=lambda s, t: np.mean((s - t) ** 2))


class Average(nn.Module):
    def __call__(self, x: Any) -> Any:
        return x - np.mean(x, axis=1, keepdims=True)


class Backwards(nn.Module):
    def __call__(self, x: Any) -> Any:
        return x[:, ::-1]


class Cumulated(nn.Module):
    def __call__(self, x: Any) -> Any:
        return np.cumsum(x, axis=1)


class Sloped(nn.Module):
    """A recurrent layer inside a function that is traced by itself."""

    def __init__(self) -> None:
        self.layer = nn.GRU(2)

    def __call__(self, x: Any) -> Any:
        return cr.grad(lambda x: np.sum(self.layer(x)))(x)


MIXING: dict[str, tuple[Callable[[], list[Any]], str]] = {
    "flatten": (lambda: [nn.Flatten()], r'layer "1"'),
    "batch norm": (lambda: [nn.BatchNorm(), nn.GRU(2)], r'layer "1"'),
    "batch norm at the end": (lambda: [nn.BatchNorm()], r'layer "1"'),
    "mean": (lambda: [Average(), nn.GRU(2)], r'layer "1"'),
    "backwards": (lambda: [Backwards(), nn.GRU(2)], r'layer "1"'),
    "cumsum": (lambda: [Cumulated(), nn.GRU(2)], r'layer "1"'),
    "a function": (lambda: [lambda x: np.max(x, axis=1)], r'layer "1"'),
    "softmax over time": (lambda: [lambda x: np.exp(x) / np.sum(np.exp(x), axis=1, keepdims=True)], r'layer "1"'),
    "one step": (lambda: [lambda x: x[:, -1]], r'layer "1"'),
    "a reshape": (lambda: [nn.Reshape(-1), nn.Dense(3)], r'layer "1"'),
    "time moved": (lambda: [lambda x: np.swapaxes(x, 1, 2)], "the network"),
    "batch norm in each step": (lambda: [nn.TimeDistributed(nn.BatchNorm()), nn.GRU(2)], r'layer "1.layer"'),
    "traced by itself": (lambda: [Sloped()], "traced by itself"),
}


@pytest.mark.parametrize("name", list(MIXING))
def test_layers_that_mix_steps_are_refused(name: str) -> None:
    x = data()
    layers, said = MIXING[name]
    net = nn.Sequential(nn.RNN(3, return_sequences=True), *layers())
    net.fit(x, np.zeros((4, 1)), loss=lambda s, t: np.mean(s), epochs=0)
    y = np.zeros(net.predict(x).shape)
    net.fit(x, y, loss="mse", epochs=1)
    before = net.parameters
    with pytest.raises((cr.DataError, cr.UsageError), match=said):
        net.fit(x, y, lengths=LENGTHS, epochs=1)
    with pytest.raises((cr.DataError, cr.UsageError), match=said):
        net.gradients(x, y, lengths=LENGTHS)
    assert_same(net.parameters, before)


KEEPING: dict[str, Callable[[], list[Any]]] = {
    "dense": lambda: [nn.Dense(3, "tanh")],
    "layer norm": lambda: [nn.LayerNorm()],
    "dropout": lambda: [nn.Dropout(0.3)],
    "residual": lambda: [nn.Residual(nn.GRU(3, True))],
    "functions": lambda: [np.tanh, lambda x: x * 2 - x[:, :, :1], lambda x: np.concatenate([x, x], axis=-1)],
    "softmax over features": lambda: [nn.Activation("softmax")],
    "each step": lambda: [nn.Reshape(5, 3, 1), nn.TimeDistributed(nn.Sequential(nn.Flatten(), nn.Dense(2)))],
    "einsum": lambda: [lambda x: np.einsum("btf,fg->btg", x, np.ones((3, 2)))],
}


@pytest.mark.parametrize("name", list(KEEPING))
def test_layers_that_keep_steps_apart(name: str) -> None:
    """Whatever stands beyond the ends, in the middle of the network too, nothing changes."""
    x = data()
    net = nn.Sequential(nn.RNN(3, return_sequences=True), *KEEPING[name](), nn.LSTM(2))
    shaken(net, x, np.zeros((4, 2)))
    whole = net.predict(x, lengths=LENGTHS)
    for row, n in enumerate(LENGTHS):
        if name != "each step" and n:
            np.testing.assert_allclose(net.predict(x[row : row + 1, :n])[0], whole[row], rtol=1e-12, atol=1e-14)
    net.check_gradients(x, np.ones((4, 2)), lengths=LENGTHS)


def test_a_batch_norm_after_the_last_output_is_fine() -> None:
    x, y = data(), data()[:, 0]
    net = nn.Sequential(nn.GRU(3), nn.BatchNorm(), nn.Dense(2))
    net.fit(x, y, lengths=LENGTHS, epochs=1)
    net.check_gradients(x, y, lengths=LENGTHS)


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


# ---------------------------------------------------------------------------------------------------------------- what is learnt


def adding(rows: int, steps: int, seed: int) -> tuple[Array, Array]:
    """Numbers, two of them marked: what is their sum? The variance of the answer is 1/6. (Hochreiter & Schmidhuber 1997.)"""
    r = np.random.default_rng(seed)
    marks = np.zeros((rows, steps))
    first, second = r.integers(0, steps // 2, rows), r.integers(steps // 2, steps, rows)
    marks[np.arange(rows), first] = marks[np.arange(rows), second] = 1.0
    numbers = r.uniform(size=(rows, steps))
    x = np.stack([numbers, marks], axis=-1)
    return x, np.sum(numbers * marks, axis=1)[:, None]


def until(loss: float) -> Callable[[Any], None]:
    return lambda run: run.stop() if run.loss[-1] < loss else None


def irnn() -> nn.Module:
    return nn.RNN(64, "relu", init=cr.initializers.normal(0.001), init_hidden="identity")


@pytest.mark.parametrize(
    ("layer", "rate", "epochs"),
    [(lambda: nn.LSTM(32), 0.01, 20), (lambda: nn.GRU(32), 0.01, 20), (irnn, 0.001, 60)],
    ids=["LSTM", "GRU", "IRNN"],
)
def test_the_adding_problem_over_a_hundred_steps_is_learnt(layer: Callable[[], nn.Module], rate: float, epochs: int) -> None:
    x, y = adding(5000, 100, 0)
    net = nn.Sequential(layer(), nn.Dense(1))
    rule = cr.Adam(rate, clip_norm=1.0)
    net.fit(x, y, epochs=epochs, batch_size=50, optimizer=rule, callbacks=[until(0.004)])
    assert net.evaluate(*adding(1000, 100, 1))["loss"] < 0.01  # a constant reaches 1/6


def test_a_simple_network_with_small_weights_does_not_learn_the_adding_problem() -> None:
    """The gradient of a mark that lies far back has vanished, which the norms show."""
    x, y = adding(5000, 100, 0)
    small = cr.initializers.normal(0.01)
    net = nn.Sequential(nn.RNN(32, init=small, init_hidden=small), nn.Dense(1))
    net.fit(x, y, epochs=5, batch_size=50, optimizer=cr.Adam(0.001, clip_norm=1.0))
    assert net.evaluate(*adding(1000, 100, 1))["loss"] == pytest.approx(1 / 6, rel=0.1)
    norms = net.gradients(x[:50], y[:50], through_time=True)["0.hidden"]
    assert norms[0] < 1e-6 * norms[-1]


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_a_symbol_is_remembered_over_a_lag(kind: str) -> None:
    """The first of 20 symbols, the others being noise, is asked for at the end."""
    symbols = np.random.default_rng(0).integers(0, 4, (1000, 20))
    net = nn.Sequential(nn.Embedding(4, 8), made(kind, 32), nn.Dense(4))
    rule = cr.Adam(0.003, clip_norm=1.0)
    net.fit(symbols[:800], symbols[:800, 0], loss="cross_entropy", epochs=100, optimizer=rule, callbacks=[until(0.02)])
    assert net.evaluate(symbols[800:], symbols[800:, 0], metrics=["accuracy"])["accuracy"] > 0.97


def test_the_parity_of_bits_is_learnt_at_each_step_of_sequences_of_any_length() -> None:
    r = np.random.default_rng(0)
    bits = [r.integers(0, 2, n) for n in r.integers(1, 12, 600)]
    x, y = [b[:, None] * 2.0 - 1 for b in bits], [(np.cumsum(b) % 2)[:, None] for b in bits]
    net = nn.Sequential(nn.GRU(16, True), nn.Dense(1))
    options = {"loss": "binary_cross_entropy", "optimizer": cr.Adam(0.01), "epochs": 100}
    net.fit(x[:500], y[:500], callbacks=[until(0.01)], **options)
    assert net.evaluate(x[500:], y[500:], metrics=["accuracy"])["accuracy"] == 1.0
    longer = r.integers(0, 2, (20, 40))  # a rule, not a table
    assert (
        net.evaluate(longer[..., None] * 2.0 - 1, (np.cumsum(longer, axis=1) % 2)[..., None], metrics=["accuracy"])["accuracy"]
        > 0.95
    )


def test_the_words_of_the_summary_and_errors_name_layers() -> None:
    net = nn.Sequential(nn.Bidirectional(nn.LSTM(3)), nn.Dense(2))
    net.fit(data(), data()[:, 0], epochs=0)
    assert re.search(r"0\.backward +LSTM\(3\)", net.summary())
