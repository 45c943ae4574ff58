"""What a run leaves behind when exceptions, Ctrl-C, other threads or a divergence come between."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from same import assert_same, differ, state
from training import CONFIGS, DROPPED, Array, Leap, data, fit, noisy

import chainrule as cr
from chainrule import nn
from chainrule.schedules import Schedule

# ------------------------------------------------------------------------------------------------- when something comes between


class Mine(Exception):
    """A user's own exception."""


def raise_at(epoch: int, error: BaseException) -> Callable[[cr.Run], None]:
    def callback(run: cr.Run) -> None:
        if run.epochs == epoch:
            raise error

    return callback


def test_an_exception_in_a_callback_leaves_a_usable_network() -> None:
    net, plain = noisy(), noisy()
    with pytest.raises(Mine):
        fit(net, 5, callbacks=[raise_at(2, Mine())])
    fit(plain, 2)
    assert_same(state(net), state(plain))
    fit(net, 1)
    fit(plain, 1)
    assert_same(state(net), state(plain))


def test_ctrl_c_in_a_callback_keeps_weights_and_history() -> None:
    net, plain = noisy(), noisy()
    handler = signal.getsignal(signal.SIGINT)
    run = fit(net, 5, callbacks=[raise_at(2, KeyboardInterrupt())])
    assert run.interrupted
    assert run.epochs == len(run.loss) == 2
    whole = fit(plain, 2)
    assert whole.loss == run.loss
    assert_same(state(net), state(plain))
    assert signal.getsignal(signal.SIGINT) is handler
    fit(net, 1)
    fit(plain, 1)
    assert_same(state(net), state(plain))


def test_ctrl_c_by_a_signal_in_a_callback() -> None:
    net = noisy()
    run = fit(net, 5, callbacks=[lambda run: signal.raise_signal(signal.SIGINT) if run.epochs == 2 else None])
    assert run.interrupted
    assert run.epochs == 2
    plain = noisy()
    fit(plain, 2)
    if run.steps == 8:
        assert_same(state(net), state(plain))


@pytest.mark.parametrize("where", ["metric", "metric of the validation rows"])
def test_ctrl_c_in_a_metric_leaves_a_history_of_whole_epochs(where: str) -> None:
    x, t = data(20)
    calls: list[int] = []

    def metric(prediction: Array, target: Array) -> float:
        calls.append(len(target))
        if len(calls) == (5 if where == "metric" else 6):  # twice an epoch; in the third one
            signal.raise_signal(signal.SIGINT)
        return 0.0

    net = noisy()
    run = net.fit(x, t, epochs=5, batch_size=6, metrics=(metric,), validation=0.25)
    assert run.interrupted
    assert run.epochs in (2, 3)
    assert {len(column) for column in run.table().values()} == {run.epochs}
    assert len(net.fit(x, t, epochs=1).loss) == 1


def test_an_exception_in_a_metric_leaves_a_usable_network() -> None:
    x, t = data(20)
    calls: list[int] = []

    def metric(prediction: Array, target: Array) -> float:
        calls.append(1)
        if len(calls) == 2:
            raise Mine
        return 0.0

    net = noisy()
    with pytest.raises(Mine):
        net.fit(x, t, epochs=5, batch_size=6, metrics=(metric,))
    plain = noisy()
    plain.fit(x, t, epochs=2, batch_size=6)
    early = noisy()
    early.fit(x, t, epochs=1, batch_size=6)
    assert not differ(state(net), state(plain)) or not differ(state(net), state(early))
    assert len(net.fit(x, t, epochs=1).loss) == 1


@dataclass(frozen=True)
class Alarm(Schedule):
    """Ctrl-C comes `after` seconds after the first epoch has begun, wherever the run is then."""

    after: float = 0.0

    def __call__(self, steps: Array, total: int) -> Array:
        if not ALARMS:
            ALARMS.append(threading.Timer(self.after, lambda: os.kill(os.getpid(), signal.SIGINT)))
            ALARMS[0].start()
        return np.full(np.shape(steps), self.learning_rate)


ALARMS: list[threading.Timer] = []


@pytest.fixture(autouse=True)
def no_alarm_is_left() -> Iterator[None]:
    ALARMS.clear()
    yield
    for alarm in ALARMS:
        alarm.cancel()
        alarm.join()


@DROPPED
def test_ctrl_c_within_an_epoch_keeps_the_steps_so_far() -> None:
    x, t = data(20_000)
    net, plain = nn.Dense(2), nn.Dense(2)
    slow: dict[str, Any] = {"batch_size": 1, "shuffle": False, "backend": "reference"}  # so that there is time to press a key
    run = net.fit(x, t, epochs=1, optimizer=cr.SGD(Alarm(1e-3, after=0.2)), **slow)
    assert run.interrupted
    assert run.epochs == 0
    assert 0 < run.steps < 20_000
    plain.fit(x[: run.steps], t[: run.steps], epochs=1, optimizer=cr.SGD(1e-3), **slow)
    assert_same(net.parameters, plain.parameters)


@DROPPED
def test_ctrl_c_after_the_numbers_broke_keeps_the_last_good_weights() -> None:
    """The epoch is long, its first steps lead to NaN, and the user has seen enough."""
    x, t = data(20_000)
    net = nn.Sequential(nn.Dense(4), nn.Dense(2))
    net.fit(x[:8], t[:8], epochs=1)
    before = net.parameters
    run = net.fit(x, t, epochs=1, batch_size=1, optimizer=cr.SGD(Alarm(1e30, after=0.2)), backend="reference")
    assert run.interrupted
    assert run.epochs == 0
    assert_same(net.parameters, before)


@DROPPED
@pytest.mark.parametrize("delay", [0.0, 0.03, 0.1])
def test_ctrl_c_at_any_moment(delay: float) -> None:
    """A signal that arrives somewhere within a step ends the run after it; the weights are whole, the history too."""
    x, t = data(64)
    net = noisy()
    handler = signal.getsignal(signal.SIGINT)
    started = time.perf_counter()
    run = net.fit(x, t, epochs=10**5, batch_size=8, optimizer=cr.SGD(Alarm(1e-5, after=delay)), validation=0.2)
    assert time.perf_counter() - started < delay + 10
    assert run.interrupted
    assert {len(column) for column in run.table().values()} == {run.epochs}
    assert run.steps >= 7 * run.epochs
    assert signal.getsignal(signal.SIGINT) is handler
    assert all(np.isfinite(value).all() for value in state(net).values())
    going_on = net.fit(x, t, epochs=1, batch_size=8, optimizer="sgd")
    assert not going_on.interrupted
    assert len(going_on.loss) == 1


def test_ctrl_c_while_a_loss_is_traced() -> None:
    """Before the first step there is nothing to keep: the interrupt reaches the caller, and the network stays usable."""
    x, t = data(8)

    def loss(s: Any, t: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return (s - t) ** 2

    net = nn.Dense(2)
    try:
        run = net.fit(x, t, loss=loss, epochs=2)
        assert run.interrupted
    except KeyboardInterrupt:
        pass
    assert len(net.fit(x, t, epochs=2).loss) == 2


def test_an_interrupted_group_of_batches_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of four batches are summed when Ctrl-C comes: no weight has moved, and their sum must not enter the next update."""
    x, t = data()

    def fit(net: nn.Module) -> cr.Run:
        return net.fit(x, t, optimizer=cr.SGD(0.1, accumulate=4), batch_size=5, epochs=1, backend="reference")

    def build() -> nn.Sequential:
        return nn.Sequential(nn.Dense(3, "tanh"), nn.Dense(2))

    def interrupt(self: object, done: int, of: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    net, twin = build(), build()
    with monkeypatch.context() as patch:
        patch.setattr("chainrule.train.fit.Progress.step", interrupt)
        assert fit(net).interrupted
    fit(net)
    fit(twin)
    assert_same(state(net), state(twin))


def test_two_threads() -> None:
    x, t = data(20)
    net = noisy()
    running, release = threading.Event(), threading.Event()

    def wait(run: cr.Run) -> None:
        running.set()
        assert release.wait(20)

    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(fit(net, 2, callbacks=[wait])))
    thread.start()
    try:
        assert running.wait(20)
        with pytest.raises(cr.BusyError, match=r"another thread"):
            net.fit(x, t, epochs=1)
        assert results == []
    finally:
        release.set()
        thread.join(20)
    assert results[0].epochs == 2
    plain = noisy()
    fit(plain, 2)
    assert_same(state(net), state(plain))
    net.fit(x, t, epochs=1)


def test_two_networks_in_two_threads() -> None:
    nets = [noisy(), noisy()]
    threads = [threading.Thread(target=fit, args=(net, 5)) for net in nets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    plain = noisy()
    fit(plain, 5)
    for net in nets:
        assert_same(state(net), state(plain))


@pytest.mark.parametrize("options", list(CONFIGS.values()), ids=list(CONFIGS))
def test_interrupted_saved_loaded_and_resumed_equals_uninterrupted(options: dict[str, Any], tmp_path: Path) -> None:
    whole, parts = noisy(), noisy()
    run = fit(whole, 5, **options)
    first = fit(parts, 5, callbacks=[raise_at(2, KeyboardInterrupt())], **options)
    parts.save(tmp_path / "net.safetensors")
    resumed = cr.load(tmp_path / "net.safetensors")
    second = fit(resumed, 3, **options)
    assert_same(state(resumed), state(whole))
    assert first.loss + second.loss == run.loss
    assert first.validation_loss + second.validation_loss == run.validation_loss
    assert first.learning_rate + second.learning_rate == run.learning_rate


# ------------------------------------------------------------------------------------------------------------------- divergence


def test_divergence_names_epoch_step_and_layer_and_loses_nothing() -> None:
    x, t = data(12)
    net, good = (nn.Sequential(nn.Dense(4, "relu"), nn.Dense(4), nn.BatchNorm(), nn.Dense(2)) for _ in range(2))
    with pytest.raises(cr.DivergenceError) as caught:
        net.fit(x, t, epochs=9, batch_size=4, optimizer=cr.SGD(Leap(0.01, at=6)), validation=(x, t))
    message = str(caught.value)
    assert "epoch 3" in message
    assert "step 2 of 3" in message
    assert 'layer "1"' in message  # 1e30 is within float32, what layer "1" makes of it is not
    assert isinstance(caught.value, ArithmeticError)
    run = caught.value.run
    assert (run.epochs, len(run.loss), len(run.validation_loss)) == (2, 2, 2)
    whole = good.fit(x, t, epochs=2, batch_size=4, optimizer=cr.SGD(Leap(0.01, at=6)), validation=(x, t))
    assert whole.loss == run.loss
    assert_same(state(net), state(good))
    assert np.isfinite(net.predict(x)).all()
    assert len(net.fit(x, t, epochs=1, optimizer=cr.SGD(0.01)).loss) == 1


def test_after_a_divergence_training_goes_on_as_if_it_had_not_been() -> None:
    x, t = data(12)
    nets = [noisy(), noisy()]
    for net in nets:
        net.fit(x, t, epochs=1, batch_size=5, optimizer=cr.SGD(0.05, momentum=0.9))
    with pytest.raises(cr.DivergenceError):
        nets[0].fit(x, t, epochs=3, batch_size=5, optimizer=cr.SGD(1e36, momentum=0.9))
    for net in nets:
        net.fit(x, t, epochs=2, batch_size=5, optimizer=cr.SGD(0.05, momentum=0.9))
    assert_same(state(nets[0]), state(nets[1]))


def test_divergence_in_a_users_layer() -> None:
    class Log(nn.Module):
        def __call__(self, x: Any) -> Any:
            return np.log(x)

    x, t = data(12)
    net = nn.Sequential(nn.Dense(4), nn.Sequential(nn.Dense(4), Log()), nn.Dense(2))
    with pytest.raises(cr.DivergenceError, match=r'epoch 1, step 1 .*"1\.1"'):
        net.fit(x, t, epochs=2)
    assert all(np.isfinite(value).all() for value in net.parameters.values())


def test_a_last_step_that_breaks_the_weights_is_noticed() -> None:
    """The loss of the only step is finite, the update overflows: the network must not end up with infinite weights."""
    x, t = data(8)
    net = nn.Dense(2)
    net.fit(x, 1e6 * t, epochs=0)
    before = net.parameters
    with pytest.raises(cr.DivergenceError, match="epoch 1, step 1"):
        net.fit(x, 1e6 * t, epochs=1, batch_size=8, optimizer=cr.SGD(1e35))
    assert_same(net.parameters, before)


def test_divergence_with_lbfgs_and_accumulation() -> None:
    x, t = data(8)
    net = nn.Sequential(nn.Dense(3), nn.Dense(2, lambda z: np.log(z - 1e3)))
    for optimizer in ("lbfgs", cr.SGD(0.1, accumulate=4)):
        with pytest.raises(cr.DivergenceError, match=r'epoch 1.*layer "1"'):
            net.fit(x, t, epochs=2, optimizer=optimizer)
    net = nn.Dense(2)
    net.fit(x, t, epochs=0)
    before = net.parameters
    with pytest.raises(cr.DivergenceError):
        net.fit(x, t, epochs=1, batch_size=2, optimizer=cr.SGD(1e38, accumulate=2))
    assert_same(net.parameters, before)


def test_divergence_warns_about_nothing_else() -> None:
    """NumPy's own warnings on overflow would hide the message (warnings are errors in these tests)."""
    x, t = data(8)
    with pytest.raises(cr.DivergenceError):
        nn.Sequential(nn.Dense(4, np.exp), nn.Dense(2)).fit(1e3 * x, t, epochs=50, optimizer=cr.SGD(1.0))
