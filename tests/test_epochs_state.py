"""The state of a network while epochs are taken together: whoever looks sees that of the moment, and no number that breaks is missed."""

from __future__ import annotations

import copy
import math
import pickle
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import together
from same import assert_same, state
from together import Neighbours, Projected, at_once, noisy, outcome
from training import Array, Leap, data

import chainrule as cr
from chainrule import losses, nn
from chainrule.graph.node import Type
from chainrule.optim import optimizers
from chainrule.program import ProgramBuilder, Variable
from chainrule.run.backend import Kept, backends, finite
from chainrule.run.native import _NativeKept
from chainrule.run.reference import ReferenceSession
from chainrule.schedules import Schedule
from chainrule.train.epochs import lasting
from chainrule.train.objective import make_program

slowly, calls = together.slowly, together.calls  # fixtures


@dataclass(frozen=True)
class Spike(Schedule):
    """A rate that is so large at one step that decaying weights overflow, though the loss of that step does not."""

    at: int = 0

    def __call__(self, steps: Array, total: int) -> Array:
        return np.where(np.asarray(steps) == self.at, 3e38, self.learning_rate)


# --------------------------------------------------------------------------------------------------- state when somebody looks


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each state that is fetched from a training."""
    seen: list[int] = []
    for kind in (Kept, _NativeKept):
        fetch = vars(kind)["arrays"]
        monkeypatch.setattr(kind, "arrays", lambda self, fetch=fetch: seen.append(1) or fetch(self))
    return seen


@pytest.mark.parametrize("backend", list(backends))
def test_the_state_is_fetched_when_somebody_looks(backend: str, fetched: list[int]) -> None:
    x, t = data()
    net = noisy()
    options: dict[str, Any] = {"batch_size": 5, "backend": backend, "validation": (x, t), "metrics": ("mae",)}
    net.fit(x, t, epochs=0)
    fetched.clear()
    looks = [3, 4, 6]
    seen: list[Any] = []
    net.fit(x, t, epochs=8, callbacks=[lambda run: run.epochs in looks and seen.append((state(net), net._slots))], **options)
    assert len(fetched) == len(looks)
    for epochs, (weights, slots) in zip(looks, seen, strict=True):
        plain = noisy()
        plain.fit(x, t, epochs=epochs, **options)
        assert_same(weights, state(plain))
        assert_same(slots, plain._slots)
    fetched.clear()
    weights = state(net)
    assert_same(weights, state(net))
    assert len(fetched) == 1
    plain.fit(x, t, epochs=2, **options)
    assert_same(weights, state(plain))


@pytest.mark.parametrize("inputs", [1, 2])
@pytest.mark.parametrize("backend", list(backends))
def test_a_state_that_was_looked_at_stays_as_it_is(backend: str, inputs: int) -> None:
    """However its matrices lie in native code: one of a single row lies the same in all layouts."""
    x, t = data(inputs=inputs)
    net, seen = nn.Sequential(nn.Dense(256, "tanh"), nn.Dense(2)), []
    net.fit(x, t, epochs=4, batch_size=5, backend=backend, callbacks=[lambda run: seen.append((state(net), net._state()))])
    for copied, looked in seen:
        assert_same(copied, looked)
    plain = nn.Sequential(nn.Dense(256, "tanh"), nn.Dense(2))
    plain.fit(x, t, epochs=2, batch_size=5, backend=backend)
    assert_same(seen[1][1], state(plain))


@pytest.mark.parametrize("backend", list(backends))
def test_every_way_to_look_sees_the_state_of_the_moment(backend: str) -> None:
    """Copies, files, other networks that share a layer."""
    x, t = data()
    shared = nn.Dense(2)
    net, other = nn.Sequential(nn.Dense(3, "tanh"), shared), nn.Sequential(shared)
    net.fit(x, t, epochs=0)
    other.fit(np.ones((4, 3)), np.ones((4, 2)), epochs=0)
    looks: list[Callable[[], Any]] = [
        lambda: net.parameters,
        lambda: copy.deepcopy(net).parameters,
        lambda: pickle.loads(pickle.dumps(net)).parameters,
        lambda: {f"1.{n.partition('.')[2]}": v for n, v in other.parameters.items()},
        lambda: {f"1.{n.partition('.')[2]}": v for n, v in copy.deepcopy(other).parameters.items()},
        lambda: {"scores": net.predict(x)},
        lambda: net.parameters if net.summary() else None,
    ]
    for look in looks:
        net.reset()
        other.reset()
        net.fit(x, t, epochs=0)
        other.fit(np.ones((4, 3)), np.ones((4, 2)), epochs=0)
        before, found = look(), list[Any]()
        net.fit(
            x, t, epochs=3, batch_size=5, backend=backend, callbacks=[lambda run, look=look, found=found: found.append(look())]
        )
        assert_same(found[-1], look())
        for name, value in before.items():
            assert not np.array_equal(found[0][name], value), name
            assert not np.array_equal(found[0][name], found[1][name]), name


def test_what_another_network_has_put_into_a_shared_layer_stays() -> None:
    """Whoever stores last is right, and the other's layers get theirs all the same."""
    x, t = data()
    shared = nn.Dense(2)
    net, other = nn.Sequential(nn.Dense(4), shared), nn.Sequential(shared)
    net.fit(x, t, epochs=0)
    before = net.parameters
    net.fit(x, t, epochs=2)  # and nobody has looked yet
    other.fit(x, t, epochs=1)
    latest = other.parameters
    assert_same({n: net.parameters[f"1.{n[2:]}"] for n in latest}, latest)
    assert not np.array_equal(net.parameters["0.weight"], before["0.weight"])


@pytest.mark.parametrize("backend", list(backends))
def test_other_threads_see_whole_states(backend: str) -> None:
    """Both layers of a network that begin alike and learn alike."""
    x, t = data(64, inputs=1, outputs=1)

    class Twins(nn.Module):
        def __call__(self, x: Any) -> Any:
            parts = [self.parameter(name, (300, 1), 0.01) for name in ("a", "b")]
            return np.broadcast_to(x, (*x.shape[:1], 300)) @ (parts[0] + parts[1])

    net = Twins()
    net.fit(x, t, epochs=0)
    seen, torn = set(), []
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            now = net.parameters
            seen.add(float(now["a"][0, 0]))
            torn.append(not np.array_equal(now["a"], now["b"]) or len(np.unique(now["a"])) > 1)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        net.fit(x, t, epochs=300, batch_size=8, optimizer=cr.SGD(1e-5), backend=backend, callbacks=[lambda run: None])
    finally:
        done.set()
        thread.join()
    assert len(seen) > 2
    assert not any(torn)


@pytest.mark.parametrize("backend", list(backends))
def test_the_best_state_is_kept_while_training_goes_on(backend: str, fetched: list[int]) -> None:
    x, t = data()
    net, plain = noisy(), noisy()
    net.fit(x, t, epochs=0)
    fetched.clear()
    rule = cr.SGD(Neighbours(0.5))
    run = net.fit(x, t, epochs=40, batch_size=5, optimizer=rule, early_stopping=7, validation=(x, t), backend=backend)
    assert run.best_epoch is not None
    assert 1 < run.best_epoch < run.epochs
    assert not fetched
    plain.fit(x, t, epochs=run.best_epoch, batch_size=5, optimizer=rule, backend=backend, validation=(x, t))
    assert_same(state(net), state(plain))


def session_of(arrays: dict[str, Array]) -> Any:
    """A native session that holds these arrays and does nothing with them."""
    builder = ProgramBuilder([Variable(n, Type(v.shape, v.dtype), "parameter") for n, v in arrays.items()], [], 1)
    return backends["native"].session({1: builder.build()}, arrays)


@pytest.mark.parametrize("dtype", ["float32", "float64", "int32", "int64", "bool"])
@pytest.mark.parametrize("size", [0, 1, 2, 15, 16, 17, 33, 1000])
def test_native_code_keeps_a_state_that_is_finite(dtype: str, size: int) -> None:
    r = np.random.default_rng(0)
    full = {n: (r.normal(size=size) * 100).astype(dtype) for n in "ab"} | {"c": np.float64(np.finfo(np.float64).max)}
    kept = session_of({n: np.asarray(v) for n, v in full.items()}).keep()
    assert_same(kept.arrays(), {n: np.asarray(v) for n, v in full.items()})
    if dtype.startswith("float"):
        info = np.finfo(dtype)
        for where in dict.fromkeys([0, size // 2, size - 1] if size else []):
            for value in (math.nan, -math.nan, math.inf, -math.inf, info.max, info.tiny, -info.smallest_subnormal):
                broken = {n: np.array(v) for n, v in full.items()}
                broken["b"][where] = value
                kept = session_of(broken).keep()
                assert (kept is not None) == math.isfinite(value), (where, value)
                if kept is not None:
                    assert_same(kept.arrays(), broken)
    elif size:
        whole = {n: np.array(v) for n, v in full.items()}
        whole["a"].view(np.uint8)[:] = 0x7F if dtype != "bool" else 1  # what in a float would be no number
        assert_same(session_of(whole).keep().arrays(), whole)


def test_nothing_to_keep() -> None:
    assert session_of({}).keep().arrays() == {}


def test_memory_of_a_state_that_nobody_holds_serves_again() -> None:
    session = session_of({"a": np.zeros(5)})
    first = session.keep()
    session._state.arrays["a"][:] = 1
    second = session.keep()
    session._state.arrays["a"][:] = 2
    del second
    third = session.keep()
    assert len(session._copies) == 2
    session._state.arrays["a"][:] = 3
    assert session.keep().arrays()["a"][0] == 3
    assert len(session._copies) == 3  # two are held
    assert (first.arrays()["a"][0], third.arrays()["a"][0]) == (0, 2)


def test_evaluation_sees_the_state_of_the_moment() -> None:
    x, t = data()
    net = noisy()
    seen: list[float] = []
    run = net.fit(x, t, epochs=6, validation=(x, t), callbacks=[lambda run: seen.append(net.evaluate(x, t)["loss"])])
    np.testing.assert_allclose(run.validation_loss, seen, rtol=1e-6)
    assert len(set(seen)) == 6


@pytest.mark.parametrize("backend", list(backends))
def test_validation_on_a_pair_counts_all_rows_alike(backend: str) -> None:
    """Also where training has weights."""
    x, t = data(30)
    net = nn.Dense(2)
    run = net.fit(x, t, epochs=1, validation=(x[:7], t[:7]), sample_weight=np.arange(30.0), metrics=("mae",), backend=backend)
    plain = net.evaluate(x[:7], t[:7], metrics=("mae",))
    assert run.validation_loss == pytest.approx([plain["loss"]], rel=1e-6)
    assert run.metrics["validation_mae"] == pytest.approx([plain["mae"]], rel=1e-6)


# ------------------------------------------------------------------------------------------------------- numbers that are no more


def task_of(net: nn.Module, rule: cr.Optimizer, t: Array) -> Any:
    return net._task(losses.mse(), t, False, rule)


RULES = [
    (name, options) for name, rule in optimizers.items() for options in (*rule.examples, {"accumulate": 2}) if not rule.driver
]


@pytest.mark.parametrize(("name", "options"), RULES, ids=[f"{n}-{'-'.join(o)}" for n, o in RULES])
def test_what_lasts_does_last(name: str, options: dict[str, Any]) -> None:
    """Put what is not finite anywhere into a state that is said to keep it, take steps, and look for it."""
    x, t = data(6)
    rule = optimizers[name](0.01, clip_value=1.0, l2=0.1, weight_decay=0.1, **options)
    net = noisy()
    net.fit(x, t, epochs=0)
    entries = ("step", "accumulate") if rule.accumulate > 1 else ("step",)
    program = make_program(task_of(net, rule, t), 6, entries)
    assert lasting([program]) == (name not in ("rprop", "adamax"))
    if not lasting([program]):
        return
    net.fit(x, t, epochs=1, batch_size=6, optimizer=rule)
    sound = {**net._state(), **net._slots}
    assert finite(sound.values())
    numbers = {
        "divisor": np.asarray(6.0),
        "seed": np.zeros(2, np.uint32),
        "step": np.asarray(0),
        "learning_rate": np.asarray(0.01),
    }
    given = {"x": x, "target": t, **numbers, **{f"hyper.{k}": np.asarray(v) for k, v in rule.hyper().items()}}
    for where in sound:
        for bad in (math.nan, math.inf, -math.inf):
            broken = {n: v.copy() for n, v in sound.items()}
            broken[where].reshape(-1)[-1] = bad
            session = ReferenceSession({6: program}, broken)
            for entry in (*entries[::-1], *entries[::-1]):
                session.call(6, entry, {k: v for k, v in given.items() if k in program.entries[entry].inputs})
            after = session.state()
            assert where.endswith(".sum") or not np.all(np.isfinite(after[where])), (where, bad)


def test_what_does_not_last_is_told() -> None:
    class Latest(nn.Module):
        """A statistic that forgets."""

        def __call__(self, x: Any) -> Any:
            self.statistic("largest", (x.shape[-1],))
            self.update("largest", np.max(x, axis=0))
            return x * self.parameter("scale", (x.shape[-1],), "ones")

    x, t = data(6, inputs=2)
    for net, rule, expected in (
        (nn.Dense(2), cr.Adam(), True),
        (nn.Dense(2), Projected(), False),
        (Latest(), cr.Adam(), False),
        (nn.Sequential(nn.Dense(2, trainable=False), nn.Dense(2)), cr.Adam(), True),
    ):
        net.fit(x, t, epochs=0)
        assert lasting([make_program(task_of(net, rule, t), 6, ("step",))]) == expected


def test_finite() -> None:
    small, large = np.full((3, 2), 1e30, np.float32), np.full(5000, 1e30, np.float32)
    assert finite([small, large, np.zeros(()), np.zeros(0), np.arange(3)])
    for array in (small, large, np.zeros(())):
        for bad in (math.nan, math.inf, -math.inf):
            broken = array.copy()
            broken.reshape(-1)[-1] = bad
            assert not finite([small, broken])


def diverge(net: nn.Module, rate: Any, **options: Any) -> tuple[Any, ...]:
    x, t = data(12)
    with pytest.raises(cr.DivergenceError) as caught:
        net.fit(x, t, **{"epochs": 30, "batch_size": 4, "optimizer": cr.SGD(rate), **options})
    run = caught.value.run
    assert {len(column) for column in run.table().values()} == {run.epochs}
    return str(caught.value), *outcome(net, run)


@pytest.mark.parametrize("at", [0, 2, 3, 16, 17, 40, 41, 83, 84])
@pytest.mark.parametrize("kind", [Leap, Spike])
@pytest.mark.parametrize("options", [{}, {"batch_size": 12}, {"optimizer": "accumulate"}], ids=["", "one step", "accumulated"])
def test_a_divergence_is_found_in_the_midst_of_many_epochs(
    kind: Any, at: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same epoch, step, message, weights and history as when each epoch is looked at by itself."""
    results = []
    rate = kind(0.01, at=at // 3 if "batch_size" in options else at // 3 * 2 if "optimizer" in options else at)
    rule = cr.SGD(rate, weight_decay=10.0, accumulate=2 if "optimizer" in options else 1)
    for numbers in ((1,), (4, 7, 100), (100,)):
        at_once(monkeypatch, *numbers)
        net = nn.Sequential(nn.Dense(4, "relu"), nn.Dense(4), nn.BatchNorm(), nn.Dense(2))
        results.append((diverge(net, rate, **{**options, "optimizer": rule}), state(net), net._slots))
    for told, weights, slots in results[1:]:
        assert told == results[0][0]
        assert_same(weights, results[0][1])
        assert_same(slots, results[0][2])


def test_a_slow_divergence(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for numbers in ((1,), (1, 2, 4, 8, 16, 32, 64, 128), (300,)):
        at_once(monkeypatch, *numbers)
        net = nn.Dense(2)
        results.append((diverge(net, 1.2, epochs=5000), state(net)))
    assert results[0][0][5] > 20  # epochs that went well
    for told, weights in results[1:]:
        assert told == results[0][0]
        assert_same(weights, results[0][1])


def test_training_goes_on_after_a_divergence_as_if_it_had_not_been(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once(monkeypatch, 100)
    x, t = data(12)
    net, plain = noisy(), noisy()
    diverge(net, Leap(0.01, at=10))
    plain.fit(x, t, epochs=3, batch_size=4, optimizer=cr.SGD(0.01))
    for each in (net, plain):
        each.fit(x, t, epochs=4, batch_size=4, optimizer=cr.SGD(0.01))
    assert_same(state(net), state(plain))


def test_finding_a_divergence_costs_about_as_much_as_the_call(
    calls: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Halves of halves, not epoch by epoch."""
    at_once(monkeypatch, 500)
    diverge(nn.Sequential(nn.Dense(4), nn.Dense(2)), Leap(0.01, at=777), epochs=500)
    assert calls[0][0] == 1500
    again = [steps for steps, _ in calls[1:] if steps > 1]
    assert sum(again) < 2 * 1500
    assert len(again) < 12
