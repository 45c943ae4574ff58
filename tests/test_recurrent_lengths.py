"""Sequences of different length against one sequence at a time, and what is refused of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import recurrent_oracle as oracle
from recurrent import LENGTHS, Array, data, shaken
from same import assert_same, state

import chainrule as cr
from chainrule import nn

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


@pytest.mark.parametrize("sequences", [False, True])
def test_predictions_of_nothing(sequences: bool) -> None:
    x = data(4, 6)
    y = data(4, 6, seed=2) if sequences else data(4, 6, seed=2)[:, 0]
    net = shaken(ragged_net(sequences), x, y)
    zero = net.predict(x, lengths=[0] * 4)
    expected = zero[:, :0] if sequences else zero
    rows = [x[0, :0]] * 4
    for got in (net.predict(rows), net.predict(x[:, :0]), net.predict(x[:, :0], lengths=[0] * 4)):
        np.testing.assert_array_equal(got, expected)
        assert got.dtype == np.float64
    for none in (x[:0], x[:0, :0], x[:0, :3]):
        got = net.predict(none)
        assert (got.shape, got.dtype) == ((0, none.shape[1], 2) if sequences else (0, 2), np.float64)
    assert net.predict(x[:0], lengths=[]).shape == net.predict(x[:0], mask=np.ones((0, 6))).shape == (0, *y.shape[1:])
    for use in (net.evaluate, net.gradients, net.check_gradients):
        for none in (slice(0), (slice(None), slice(0))):
            with pytest.raises(cr.DataError, match=r"x is empty .*there is nothing to take the mean over"):
                use(x[none], y[none])
    with pytest.raises(cr.DataError, match=r"x is empty .*there is nothing to learn from"):
        net.fit(x[:0], y[:0])
    with pytest.raises(cr.ShapeError, match=r"\(6, 0\)"):
        net.predict(x[..., :0])


@pytest.mark.parametrize(("outputs", "loss"), [(3, "cross_entropy"), (1, "binary_cross_entropy")])
def test_probabilities_of_nothing(outputs: int, loss: str) -> None:
    x = data(4, 5)[:, 0]
    net = nn.Dense(outputs)
    net.fit(x, [0, 1, 0, 1], loss=loss, epochs=1)
    assert (net.predict(x[:0]).shape, net.predict(x[:0]).dtype) == ((0, outputs), np.float32)
    assert net.predict_proba(x[:0]).shape == (0, max(outputs, 2))
    assert net.predict(x[:0], backend="reference").shape == (0, outputs)
    with pytest.raises(cr.ShapeError, match=r"\(0,\)"):
        net.predict(x[:, :0])


def test_an_input_without_a_step_beside_one_with_some() -> None:
    a, b = data(4, 5), data(4, 3, seed=2)
    net = shaken(Pair(), (a, b), np.zeros((4, 5)))
    np.testing.assert_array_equal(net.predict((a[:, :0], b)), net.predict((a, b), lengths=([0] * 4, None)))
    given = net.predict((a[:, :0], b), lengths=(None, [1, 0, 2, 3]))
    np.testing.assert_array_equal(given, net.predict((a, b), lengths=([0] * 4, [1, 0, 2, 3])))


def test_a_tuple_of_sequences_is_no_list() -> None:
    net = nn.Sequential(nn.GRU(3), nn.Dense(2))
    with pytest.raises(cr.ShapeError, match=r"x\.0 has 5 rows, x\.1 has 2 rows; sequences of different length come as a list"):
        net.fit((np.ones((5, 2)), np.ones((2, 2))), np.ones((2, 2)))
    with pytest.raises(cr.ShapeError, match=r"x\.a has 5 rows, x\.b has 2 rows$"):
        net.fit({"a": np.ones((5, 2)), "b": np.ones((2, 2))}, np.ones((2, 2)))


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
