"""Ctrl-C and exceptions while epochs are taken together: whatever was learnt before is kept, and belongs together."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import together
from same import assert_same, state
from together import at_once, noisy, outcome
from training import DROPPED, Array, Leap, data

import chainrule as cr
from chainrule import nn
from chainrule.run import interrupt
from chainrule.run.backend import backends
from chainrule.run.reference import ReferenceSession
from chainrule.schedules import Schedule
from chainrule.train.fit import Training
from chainrule.train.progress import Progress

slowly = together.slowly  # a fixture


# ----------------------------------------------------------------------------------------------------------------------- Ctrl-C


@pytest.fixture
def press(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Ctrl-C after so many steps of the run."""

    def at(step: int) -> None:
        before = [0]

        def pressed(self: Progress, done: int, of: int) -> None:
            if before[0] + done == step:
                raise KeyboardInterrupt

        def reported(self: Progress) -> None:
            before[0] = self._run.steps

        monkeypatch.setattr(Progress, "step", pressed)
        monkeypatch.setattr(Progress, "epoch", reported)

    return at


@pytest.mark.parametrize("step", [1, 4, 7, 8, 19, 20, 21, 39])
@pytest.mark.parametrize("rule", [cr.Adam(0.01), cr.SGD(0.1, accumulate=3)], ids=["", "accumulated"])
def test_ctrl_c_in_the_midst_of_many_epochs(
    step: int, rule: cr.Optimizer, press: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps so far are kept; the history holds whole epochs; nothing depends on how many were taken together."""
    x, t = data()
    weight = np.linspace(0, 2.0, 20)
    results = []
    for numbers in ((1,), (2, 3, 100), (100,)):
        at_once(monkeypatch, *numbers)
        net = noisy()
        press(step)
        run = net.fit(x, t, epochs=10, batch_size=5, optimizer=rule, sample_weight=weight)
        assert run.interrupted
        assert (run.steps, run.epochs) == (step, step // 4)
        assert {len(column) for column in run.table().values()} == {run.epochs}
        assert net._counters["epochs"] == step // 4
        assert net._counters["updates"] == step // 4 * len(net_updates(rule)) + sum(u <= step % 4 for u in net_updates(rule))
        press(-1)
        net.fit(x, t, epochs=2, batch_size=5, optimizer=rule, sample_weight=weight)
        results.append((outcome(net, run), state(net)))
    for told, weights in results[1:]:
        assert told == results[0][0]
        assert_same(weights, results[0][1])


def net_updates(rule: cr.Optimizer) -> list[int]:
    """After which of four batches the weights move."""
    return [1, 2, 3, 4] if rule.accumulate == 1 else [3, 4]


def test_ctrl_c_between_whole_epochs_and_going_on_is_no_interruption(
    press: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once(monkeypatch, 2, 100)
    x, t = data()
    net, whole = noisy(), noisy()
    press(20)
    first = net.fit(x, t, epochs=10, batch_size=5)
    press(-1)
    second = net.fit(x, t, epochs=5, batch_size=5)
    run = whole.fit(x, t, epochs=10, batch_size=5)
    assert first.loss + second.loss == run.loss
    assert_same(state(net), state(whole))


def test_ctrl_c_after_the_numbers_broke_in_the_same_epoch(press: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the epoch at hand nothing is kept, of those before it everything."""
    x, t = data(12)
    for numbers in ((1,), (100,)):
        at_once(monkeypatch, *numbers)
        net, good = noisy(), noisy()
        press(14)
        run = net.fit(x, t, epochs=9, batch_size=4, optimizer=cr.SGD(Leap(0.01, at=12)))
        press(-1)
        assert run.interrupted
        assert (run.epochs, run.steps, net._counters["epochs"]) == (4, 12, 4)
        good.fit(x, t, epochs=4, batch_size=4, optimizer=cr.SGD(0.01))
        assert_same(state(net), state(good))


def test_ctrl_c_after_the_numbers_broke_epochs_ago(press: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken one by one, the run would have ended with the error before."""
    x, t = data(12)
    at_once(monkeypatch, 100)
    net, good = noisy(), noisy()
    press(20)
    with pytest.raises(cr.DivergenceError, match="epoch 5, step") as caught:
        net.fit(x, t, epochs=9, batch_size=4, optimizer=cr.SGD(Leap(0.01, at=12)))
    assert caught.value.run.epochs == 4
    good.fit(x, t, epochs=4, batch_size=4, optimizer=cr.SGD(0.01))
    assert_same(state(net), state(good))


def test_ctrl_c_while_a_divergence_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once(monkeypatch, 3, 100)
    x, t = data(12)
    net, good = noisy(), noisy()
    run_of = ReferenceSession.run
    seen: list[int] = []

    def interrupted(self: ReferenceSession, steps: Any, pulse: Any = None) -> Any:
        seen.append(steps.count)
        taken = run_of(self, steps, pulse)
        return replace(taken, interrupted=True) if len(seen) == 3 else taken

    with monkeypatch.context() as patch:
        patch.setattr(ReferenceSession, "run", interrupted)
        run = net.fit(x, t, epochs=20, batch_size=4, optimizer=cr.SGD(Leap(0.01, at=30)))
    assert (run.interrupted, run.epochs, len(seen)) == (True, 3, 3)
    good.fit(x, t, epochs=3, batch_size=4, optimizer=cr.SGD(0.01))
    assert_same(state(net), state(good))


@dataclass(frozen=True)
class Alarm(Schedule):
    """Ctrl-C comes a while after the first rate was asked for."""

    timer: Any = None

    def __call__(self, steps: Array, total: int) -> Array:
        if not self.timer.ident:
            self.timer.start()
        return np.full(np.shape(steps), self.learning_rate)


@DROPPED
@pytest.mark.parametrize("backend", list(backends))
def test_ctrl_c_by_a_signal(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal somewhere within a call that takes many epochs."""
    at_once(monkeypatch, 10**4)
    monkeypatch.setitem(nn.Module.fit.__kwdefaults__, "backend", backend)
    x, t = data(64)
    for delay in (0.0, 0.05, 0.3):
        net, twin = noisy(), noisy()
        alarm = threading.Timer(delay, os.kill, [os.getpid(), signal.SIGINT])
        run = net.fit(x, t, epochs=10**7, batch_size=8, optimizer=cr.SGD(Alarm(0.01, alarm)))
        alarm.join()
        assert run.interrupted
        assert run.steps // 8 == run.epochs == net._counters["epochs"]
        assert {len(column) for column in run.table().values()} == {run.epochs}
        twin.fit(x, t, epochs=run.epochs, batch_size=8, optimizer=cr.SGD(0.01))
        if run.steps == 8 * run.epochs:
            assert_same(state(net), state(twin))
        assert len(net.fit(x, t, epochs=2, batch_size=8, optimizer=cr.SGD(0.01)).loss) == 2


class Dropping:
    """What happens to it at the end is Ctrl-C, inside a finaliser."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


@DROPPED
@pytest.mark.parametrize("backend", list(backends))
@pytest.mark.parametrize("rule", [cr.SGD(0.01), cr.LBFGS()], ids=["", "lbfgs"])
@pytest.mark.parametrize("where", ["step", "epoch", "close"])
def test_ctrl_c_that_python_drops_ends_the_run(
    backend: str, rule: cr.Optimizer, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, t = data()
    net, twin = nn.Dense(2), nn.Dense(2)
    report, pressed = getattr(Progress, where), []

    def drop(self: Progress, *given: Any) -> None:
        report(self, *given)
        if self._run.epochs >= 2 and not pressed:
            pressed.append(Dropping())
            pressed[0] = None

    with monkeypatch.context() as patch:
        patch.setattr(Progress, where, drop)
        run = net.fit(x, t, epochs=20, batch_size=5, optimizer=rule, backend=backend, callbacks=[lambda run: None])
    assert run.interrupted == bool(pressed and where != "close")  # LBFGS reports no steps; after the last one it is too late
    assert run.epochs in ((2, 3) if run.interrupted else (20,)) or rule.driver  # as many steps as one look takes
    twin.fit(x, t, epochs=run.epochs, batch_size=5, optimizer=rule, backend=backend)
    if where == "epoch":
        assert_same(state(net), state(twin))
    assert not net.fit(x, t, epochs=2, batch_size=5, optimizer=rule, backend=backend).interrupted


@DROPPED
def test_ctrl_c_that_python_drops_before_the_first_step() -> None:
    x, t = data()
    dropped: list[Any] = []

    def loss(s: Any, t: Any) -> Any:
        if not dropped:
            dropped.append(Dropping())
            dropped[0] = None
        return (s - t) ** 2

    run = nn.Dense(2).fit(x, t, loss=loss, epochs=5)
    assert (run.interrupted, run.steps) == (True, 0)


@pytest.mark.parametrize("backend", list(backends))
@pytest.mark.parametrize(
    ("owner", "name"), [(Training, "_keep"), (Training, "_commit"), (Training, "restore_best"), (Progress, "close")]
)
@pytest.mark.parametrize("after", [False, True])
def test_ctrl_c_parts_nothing_that_belongs_together(
    backend: str, owner: Any, name: str, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal before or after what keeps the steps of a call, or ends the run."""
    x, t = data()
    net, twin = nn.Dense(2), nn.Dense(2)
    own, calls = getattr(owner, name), [0]

    def pressing(self: Any, *given: Any) -> None:
        calls[0] += 1
        if calls[0] == 1 and not after:
            signal.raise_signal(signal.SIGINT)
        own(self, *given)
        if calls[0] == 1 and after:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, pressing)
        run = net.fit(x, t, epochs=6, batch_size=5, backend=backend, callbacks=[lambda run: None])
    assert (run.interrupted, run.epochs) == ((True, 1) if owner is Training and name != "restore_best" else (False, 6))
    twin.fit(x, t, epochs=run.epochs, batch_size=5, backend=backend)
    assert_same(state(net), state(twin))
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)  # nothing is held any more


def test_a_second_ctrl_c_is_not_held() -> None:
    with interrupt.Watch():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_run_leaves_the_handling_of_signals_as_it_was() -> None:
    x, t = data()
    default, seen = signal.default_int_handler, []

    def fail(run: Any) -> None:
        seen.append(signal.getsignal(signal.SIGINT))
        raise RuntimeError

    assert signal.getsignal(signal.SIGINT) is default
    with pytest.raises(RuntimeError):
        nn.Dense(2).fit(x, t, epochs=2, callbacks=[fail])
    assert signal.getsignal(signal.SIGINT) is default
    assert seen[0] is not default
    own = lambda number, frame: seen.append(number)
    nn.Dense(2).fit(x, t, epochs=2, callbacks=[lambda run: signal.signal(signal.SIGINT, own)])
    try:
        assert signal.getsignal(signal.SIGINT) is own  # put there in the midst of a run
        run = nn.Dense(2).fit(x, t, epochs=4, callbacks=[lambda run: signal.raise_signal(signal.SIGINT)])
        assert (run.interrupted, run.epochs) == (False, 4)
        assert seen[1:] == [signal.SIGINT] * 4
    finally:
        signal.signal(signal.SIGINT, default)


def test_a_run_in_another_thread_leaves_ctrl_c_to_the_main_one() -> None:
    x, t = data()
    seen: list[Any] = []
    run: list[cr.Run] = []
    look = lambda run: seen.append(signal.getsignal(signal.SIGINT))
    thread = threading.Thread(target=lambda: run.append(nn.Dense(2).fit(x, t, epochs=3, callbacks=[look])))
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler] * 3
    assert run[0].epochs == 3


@DROPPED
@pytest.mark.parametrize("dropped", [False, True])
def test_ctrl_c_in_a_run_inside_a_run_ends_the_inner_one(dropped: bool) -> None:
    x, t = data()
    inner: list[cr.Run] = []

    class Pressing(Schedule):
        """Ctrl-C with the rates of the third epoch."""

        def __call__(self, steps: Array, total: int) -> Array:
            if steps[0] == 8 and len(steps) == 4:
                Dropping() if dropped else signal.raise_signal(signal.SIGINT)
            return np.full(np.shape(steps), 0.01)

    def nested(run: cr.Run) -> None:
        rule = cr.SGD(Pressing())
        inner.append(nn.Dense(2).fit(x, t, epochs=5, batch_size=5, optimizer=rule, callbacks=[lambda run: None]))

    run = nn.Dense(2).fit(x, t, epochs=3, callbacks=[nested])
    assert [(r.interrupted, r.epochs) for r in inner] == [(True, 2)] * 3
    assert (run.interrupted, run.epochs) == (False, 3)


def test_ctrl_c_that_a_callback_catches_is_its_own_affair() -> None:
    x, t = data()

    def ask(run: cr.Run) -> None:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)

    run = nn.Dense(2).fit(x, t, epochs=4, callbacks=[ask])
    assert (run.interrupted, run.epochs) == (False, 4)


class Trap:
    """Ctrl-C at a certain line of the training loop."""

    def __init__(self, line: int) -> None:
        self.line, self.seen = line, 0
        self.files = tuple(
            sys.modules[n].__file__ for n in ("chainrule.train.fit", "chainrule.train.epochs", "chainrule.train.history")
        )

    def __call__(self, frame: Any, event: str, arg: Any) -> Any:
        if frame.f_code.co_filename not in self.files or frame.f_code.co_name in ("pulse", "restore_best"):
            return None
        return self.within

    def within(self, frame: Any, event: str, arg: Any) -> Any:
        if event == "line":
            self.seen += 1
            if self.seen == self.line:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self.within


@pytest.mark.skipif(sys.gettrace() is not None, reason="needs the interpreter's trace function")
@pytest.mark.parametrize("options", [{}, {"validation": 0.25, "metrics": ("mae",)}], ids=["together", "one by one"])
@pytest.mark.parametrize("part", range(3))
def test_ctrl_c_at_any_line_of_the_loop(options: dict[str, Any], part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it comes, weights, slots and counters belong together: who goes on ends where the uninterrupted run ends. The history
    holds whole lines; only where metrics or validation come between may it lack the epoch at hand."""
    at_once(monkeypatch, 2, 3)
    x, t = data()
    rule = cr.SGD(cr.schedules.step(0.1, every=5), momentum=0.9)
    small = lambda: nn.Sequential(nn.Dropout(0.3), nn.Dense(2))
    whole = small()
    expected = whole.fit(x, t, epochs=7, batch_size=5, optimizer=rule, **options)
    enter = Training.__call__
    line = 1 + part
    reached = True
    while reached:
        net, trap = small(), Trap(line)

        def entered(self: Training, begin: Any, trap: Trap = trap) -> None:
            sys.settrace(trap)
            try:
                enter(self, begin)
            finally:
                sys.settrace(None)

        run = None
        with monkeypatch.context() as patch:
            patch.setattr(Training, "__call__", entered)
            with contextlib.suppress(KeyboardInterrupt):  # outside of what a run guards: before its first line, after its last
                run = net.fit(x, t, epochs=7, batch_size=5, optimizer=rule, **options)
        reached = trap.seen >= line
        left = 7 - net._counters["epochs"]
        if run is not None:
            assert len({len(column) for column in run.table().values()}) == 1
            assert run.loss == expected.loss[: run.epochs]
            assert run.epochs in ((7 - left,) if not options else (7 - left, 6 - left))
            assert run.interrupted or not left
        net.fit(x, t, epochs=left, batch_size=5, optimizer=rule, **options)
        assert_same(state(net), state(whole))
        assert_same(net._slots, whole._slots)
        assert net._counters == whole._counters
        line += 3 if line < 300 else 17
    assert line > 300


def test_an_exception_in_a_backend_leaves_what_was_learnt_before(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once(monkeypatch, 2, 3, 100)
    x, t = data()
    net, plain = noisy(), noisy()
    run_of = ReferenceSession.run
    seen: list[int] = []

    def failing(self: ReferenceSession, steps: Any, pulse: Any = None) -> Any:
        seen.append(1)
        if len(seen) == 3:
            raise MemoryError
        return run_of(self, steps, pulse)

    with monkeypatch.context() as patch:
        patch.setattr(ReferenceSession, "run", failing)
        with pytest.raises(MemoryError):
            net.fit(x, t, epochs=20, batch_size=5)
    plain.fit(x, t, epochs=5, batch_size=5)
    assert_same(state(net), state(plain))
    for each in (net, plain):
        each.fit(x, t, epochs=2, batch_size=5)
    assert_same(state(net), state(plain))
