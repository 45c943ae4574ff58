"""What a run tells, and whom: validation, early stopping, callbacks, the history, the progress line."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from same import assert_same, differ, state
from training import Array, at_zero, data, fit, noisy

import chainrule as cr
from chainrule import nn

# ------------------------------------------------------------------------------------------------------------------- validation


def held_out(n: int, fraction: float, **options: Any) -> tuple[list[int], cr.Run]:
    """The rows that training never touched: those whose own weight is still exactly zero."""
    ids = np.arange(n)
    net = nn.Embedding(n, 1, init="zeros")
    run = net.fit(ids, 1.0 + ids, epochs=2, batch_size=3, optimizer=cr.SGD(0.1), validation=fraction, dtype="float64", **options)
    rows = np.flatnonzero(net.parameters["weight"] == 0).tolist()
    assert run.validation_loss[-1] == pytest.approx(net.evaluate(ids[rows], 1.0 + ids[rows])["loss"], rel=1e-12)
    return rows, run


def test_validation_on_random_rows_of_the_seed() -> None:
    rows, run = held_out(20, 0.25)
    assert len(rows) == 5 == len(run.validation_loss) + 3
    assert rows != list(range(15, 20))
    assert held_out(20, 0.25)[0] == rows
    others = [held_out(20, 0.25, seed=seed)[0] for seed in range(1, 9)]
    assert all(len(other) == 5 for other in others)
    assert len({row for other in others for row in other}) > 10


def test_validation_on_the_last_rows_without_shuffling() -> None:
    assert held_out(20, 0.25, shuffle=False)[0] == [15, 16, 17, 18, 19]
    assert held_out(20, 0.25, shuffle=False, seed=5)[0] == [15, 16, 17, 18, 19]


@pytest.mark.parametrize(("n", "fraction", "count"), [(20, 0.1, 2), (7, 0.1, 1), (2, 0.5, 1), (7, 0.9, 6), (3, 0.99, 2)])
def test_a_fraction_leaves_at_least_one_row_on_each_side(n: int, fraction: float, count: int) -> None:
    assert len(held_out(n, fraction)[0]) == count


def test_validation_with_a_pair() -> None:
    x, t = data(20)
    v, u = data(7, seed=1)
    watched, plain = noisy(), noisy()
    run = watched.fit(x, t, epochs=3, validation=(v, u), metrics=("mae", "rmse"), dtype="float64")
    plain.fit(x, t, epochs=3, dtype="float64")
    assert_same(state(watched), state(plain))
    scores = watched.evaluate(v, u, metrics=("mae", "rmse"))
    assert run.validation_loss[-1] == pytest.approx(scores["loss"], rel=1e-12)
    assert run.metrics["validation_mae"][-1] == pytest.approx(scores["mae"], rel=1e-12)
    assert run.metrics["validation_rmse"][-1] == pytest.approx(scores["rmse"], rel=1e-12)
    assert set(run.metrics) == {"mae", "rmse", "validation_mae", "validation_rmse"}


def test_no_validation_no_numbers() -> None:
    assert fit(noisy(), 2).validation_loss == []


# --------------------------------------------------------------------------------------------------------------- early stopping


def overfit(net: nn.Module, stopping: Any, epochs: int = 60, **options: Any) -> tuple[cr.Run, list[dict[str, Array]]]:
    """A large rate on few rows, and validation rows of another kind: the validation loss soon rises."""
    x, t = data(8)
    v, u = data(8, seed=3)
    seen: list[dict[str, Array]] = []
    run = net.fit(
        x, t, epochs=epochs, batch_size=4, optimizer=cr.SGD(0.05), validation=(v, u), early_stopping=stopping,
        callbacks=[lambda run: seen.append(state(net))], **options,
    )  # fmt: skip
    return run, seen


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Dense(8, "tanh"), nn.BatchNorm(), nn.Dense(2))


@pytest.mark.parametrize("stopping", [4, cr.EarlyStopping(4), cr.EarlyStopping(4, monitor="validation_loss")])
def test_early_stopping_brings_back_the_best_weights(stopping: Any) -> None:
    net = two_layers()
    run, seen = overfit(net, stopping)
    best = int(np.argmin(run.validation_loss)) + 1
    assert run.best_epoch == best
    assert run.epochs == len(run.loss) == best + 4 < 60
    assert run.stopped
    assert_same(state(net), seen[best - 1])
    assert differ(seen[best - 1], seen[-1])
    v, u = data(8, seed=3)
    assert net.evaluate(v, u)["loss"] == pytest.approx(min(run.validation_loss), rel=1e-6)


def test_early_stopping_restores_also_when_epochs_run_out() -> None:
    whole, _ = overfit(two_layers(), 4)
    net = two_layers()
    run, seen = overfit(net, 1000, epochs=whole.epochs)
    assert (run.best_epoch, run.stopped) == (whole.best_epoch, "")
    assert_same(state(net), seen[whole.best_epoch - 1])


def test_early_stopping_without_restoring() -> None:
    net = two_layers()
    run, seen = overfit(net, cr.EarlyStopping(4, restore_best=False))
    assert run.epochs < 60
    assert_same(state(net), seen[-1])


def test_early_stopping_watches_what_it_is_told() -> None:
    x = np.random.default_rng(0).normal(size=(20, 3))
    labels = (x[:, 0] > 0).astype(int)
    net = nn.Dense(2)
    run = net.fit(x, labels, loss="cross_entropy", epochs=50, optimizer=cr.SGD(0.01), metrics=("accuracy",),
                  early_stopping=cr.EarlyStopping(3, monitor="accuracy"))  # fmt: skip
    accuracy = run.metrics["accuracy"]
    assert run.best_epoch == int(np.argmax(accuracy)) + 1
    assert run.epochs == min(50, run.best_epoch + 3)
    improves = nn.Dense(2).fit(x, labels, loss="cross_entropy", epochs=10, early_stopping=1)
    assert improves.epochs == 10  # without validation the training loss is watched
    stalls = nn.Dense(2).fit(x, labels, loss="cross_entropy", epochs=10, early_stopping=cr.EarlyStopping(2, min_delta=100.0))
    assert (stalls.epochs, stalls.best_epoch) == (3, 1)


def test_a_metric_that_is_not_defined_at_first_is_no_best_value() -> None:
    values = iter([math.nan, 3.0, 2.0, math.nan, 1.0, 5.0, 5.0])

    def odd(prediction: Array, target: Array) -> float:
        return next(values)

    odd.greater_is_better = False  # type: ignore[attr-defined]  # functions may have any
    x, t = data(8)
    run = nn.Dense(2).fit(x, t, epochs=7, metrics=(odd,), early_stopping=cr.EarlyStopping(2, monitor="odd"))
    assert (run.best_epoch, run.epochs) == (5, 7)


def test_early_stopping_true_is_a_patience_of_ten() -> None:
    run, _ = overfit(two_layers(), True)
    assert run.epochs == run.best_epoch + cr.EarlyStopping().patience == run.best_epoch + 10


# ---------------------------------------------------------------------------------------------------------- callbacks, history


def test_callbacks_see_each_epoch() -> None:
    x, t = data(20)
    net = noisy()
    calls: list[tuple[str, int, int]] = []

    def first(run: cr.Run) -> None:
        calls.append(("first", run.epochs, run.steps))
        assert run.network is net
        assert len(run.loss) == len(run.epoch_seconds) == len(run.learning_rate) == run.epochs
        assert run.planned_epochs == 3
        assert net.evaluate(x, t)["loss"] > 0  # the network can be used

    run = net.fit(x, t, epochs=3, batch_size=6, callbacks=[first, lambda run: calls.append(("second", run.epochs, run.steps))])
    assert calls == [(who, epoch, 4 * epoch) for epoch in (1, 2, 3) for who in ("first", "second")]
    assert run.stopped == ""
    assert not run.interrupted


def test_callbacks_see_the_weights_of_their_epoch() -> None:
    net, plain = noisy(), noisy()
    seen: list[dict[str, Array]] = []
    fit(net, 3, callbacks=[lambda run: seen.append(state(net))])
    for weights in seen:
        fit(plain, 1)
        assert_same(weights, state(plain))


def test_using_the_network_in_a_callback_changes_nothing() -> None:
    x, t = data(20)
    watched, plain = noisy(), noisy()

    def use(run: cr.Run) -> None:
        watched.gradients(x, t, loss="mae", seed=9)
        watched.predict(x)
        watched.check_gradients(x[:3], t[:3])
        watched.summary()

    fit(watched, 2, callbacks=[use])
    fit(plain, 2)
    assert_same(state(watched), state(plain))


def test_a_callback_ends_the_run() -> None:
    net, plain = noisy(), noisy()
    calls: list[int] = []

    def stop(run: cr.Run) -> None:
        if run.epochs == 2:
            run.stop("good enough")

    run = fit(net, 100, callbacks=[stop, lambda run: calls.append(run.epochs)])
    assert (run.epochs, run.stopped, calls) == (2, "good enough", [1, 2])
    fit(plain, 2)
    assert_same(state(net), state(plain))
    fit(net, 1)
    fit(plain, 1)
    assert_same(state(net), state(plain))


def test_a_callback_cannot_change_the_weights_under_the_run() -> None:
    """Refused, rather than lost with the next step."""
    x, t = data(20)
    net, plain = at_zero(2), at_zero(2)
    for change in (lambda: net.load_parameters({"weight": np.ones((4, 2)), "bias": [1, 2]}), net.reset, lambda: net.fit(x, t)):
        with pytest.raises(cr.BusyError, match="callback"):
            net.fit(x, t, epochs=2, callbacks=[lambda run, change=change: change()])
        plain.fit(x, t, epochs=1)
        assert_same(net.parameters, plain.parameters)


def test_the_history() -> None:
    run = fit(noisy(), 3, validation=0.25)
    assert run.epochs == run.planned_epochs == len(run.loss) == len(run.validation_loss) == len(run.epoch_seconds) == 3
    assert run.steps == 3 * 3
    assert 0 < sum(run.epoch_seconds) <= run.seconds + 1e-6
    assert all(type(value) is float for value in [*run.loss, *run.validation_loss, *run.learning_rate, *run.metrics["mae"]])
    table = run.table()
    assert {len(column) for column in table.values()} == {3}
    assert {"loss", "validation_loss", "mae", "validation_mae", "learning_rate"} <= set(table)
    assert table["loss"] == run.loss


def test_metrics_are_over_the_rows_as_they_were_seen() -> None:
    x, t = data(20)
    net = two_layers()
    net.fit(x, t, epochs=0, dtype="float64")
    net[1].trainable = False  # so that training and evaluation mode agree
    before = net.evaluate(x, t, metrics=("r2", "rmse", "mae"))

    def worst(prediction: Array, target: Array) -> float:
        return float(np.max(np.abs(prediction - target)))

    largest = float(np.max(np.abs(net.predict(x) - t)))
    run = net.fit(x, t, epochs=2, batch_size=20, metrics=("r2", "rmse", "mae", worst), optimizer=cr.SGD(0.1))
    for name in ("r2", "rmse", "mae"):
        assert run.metrics[name][0] == pytest.approx(before[name], rel=1e-10)
    assert run.metrics["worst"][0] == pytest.approx(largest, rel=1e-10)
    assert run.loss[0] == pytest.approx(before["loss"], rel=1e-12)


def test_metrics_over_several_batches_are_of_all_rows() -> None:
    x, t = data(10)
    net = nn.Dense(2)
    net.fit(x, t, epochs=0, dtype="float64")
    before = net.evaluate(x, t, metrics=("r2", "rmse"))
    run = net.fit(x, t, epochs=1, batch_size=3, metrics=("r2", "rmse"), optimizer=cr.SGD(0.0))
    assert run.metrics["r2"][0] == pytest.approx(before["r2"], rel=1e-10)
    assert run.metrics["rmse"][0] == pytest.approx(before["rmse"], rel=1e-10)


# --------------------------------------------------------------------------------------------------------------------- progress


def test_silent_when_standard_error_is_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    fit(noisy(), 2, verbose=True, validation=0.2)
    assert capfd.readouterr() == ("", "")


SHOW = """
import sys
import numpy as np
from chainrule import nn
x = np.random.default_rng(0).normal(size=(64, 4))
net = nn.Dense(2)
print("quiet", file=sys.stderr)
net.fit(x, x[:, :2], epochs=3, verbose=False)
print("loud", file=sys.stderr, flush=True)
net.fit(x, x[:, :2], epochs=400, batch_size=4, validation=0.25)
print("end", file=sys.stderr)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are a matter of Unix")
def test_progress_on_a_terminal() -> None:
    import pty

    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", SHOW], stderr=theirs, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
    os.close(theirs)
    text = b""
    try:
        while True:
            part = os.read(ours, 65536)
            if not part:
                break
            text += part
    except OSError:  # Linux says so when the other side has gone
        pass
    finally:
        os.close(ours)
        out, _ = process.communicate(timeout=60)
    said = text.decode()
    assert (process.returncode, out) == (0, b""), said
    quiet, loud = said.split("loud")
    assert quiet.strip() == "quiet"
    shown = loud.split("end")[0]
    for word in ("epoch", "400", "loss", "val", "left"):
        assert word in shown, shown
    assert "\r" in shown  # one line, written over
