"""Epochs that are taken together: the same numbers as one by one, whatever happens, and as good as no Python between them."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from same import assert_same, state

import chainrule as cr
from chainrule import losses, nn
from chainrule.graph.node import Type
from chainrule.ops.random import key_of
from chainrule.optim import optimizers
from chainrule.program import ProgramBuilder, Variable
from chainrule.run import interrupt
from chainrule.run.backend import Kept, Steps, backends, finite
from chainrule.run.batches import epoch_order, step_sizes
from chainrule.run.native import _NativeKept
from chainrule.run.reference import ReferenceSession
from chainrule.schedules import Schedule, schedules
from chainrule.train import epochs as module
from chainrule.train.epochs import Behind, Data, Epochs, Orders, Pace, lasting, shuffled
from chainrule.train.fit import Training
from chainrule.train.objective import DIVISOR, RATE, SEED, STEP, make_program
from chainrule.train.progress import Progress

Array = np.ndarray


def data(rows: int = 20, inputs: int = 4, outputs: int = 2, seed: int = 0) -> tuple[Array, Array]:
    r = np.random.default_rng(seed)
    x = r.normal(size=(rows, inputs))
    return x, np.tanh(x @ r.normal(size=(inputs, outputs))) + 0.1 * r.normal(size=(rows, outputs))


def noisy() -> nn.Sequential:
    """Everything that could depend on order, step or chance."""
    return nn.Sequential(nn.Dense(6, "tanh"), nn.BatchNorm(), nn.Dropout(0.3), nn.Dense(2))


@dataclass(frozen=True)
class Neighbours(Schedule):
    """A user's schedule that looks at all the steps it is asked for together."""

    def __call__(self, steps: Array, total: int) -> Array:
        return np.full(np.shape(steps), self.learning_rate / (1 + steps[0] % 5))


@dataclass(frozen=True)
class Leap(Schedule):
    """A rate that is huge from one step on."""

    at: int = 0

    def __call__(self, steps: Array, total: int) -> Array:
        return np.where(np.asarray(steps) >= self.at, 1e30, self.learning_rate)


@dataclass(frozen=True)
class Spike(Schedule):
    """A rate that is so large at one step that decaying weights overflow, though the loss of that step does not."""

    at: int = 0

    def __call__(self, steps: Array, total: int) -> Array:
        return np.where(np.asarray(steps) == self.at, 3e38, self.learning_rate)


@pytest.fixture(autouse=True)
def slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training, where a test does not say otherwise, is on the backend that is in Python and reports each step."""
    monkeypatch.setitem(nn.Module.fit.__kwdefaults__, "backend", "reference")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(steps, rows) of each call of the reference backend that trains."""
    seen: list[tuple[int, int]] = []
    run = ReferenceSession.run

    def counted(self: ReferenceSession, steps: Any, pulse: Any = None) -> Any:
        if steps.entries[0] != "evaluate":
            seen.append((steps.count, steps.rounds * sum(steps.sizes)))
        return run(self, steps, pulse)

    monkeypatch.setattr(ReferenceSession, "run", counted)
    return seen


def at_once(monkeypatch: pytest.MonkeyPatch, *numbers: int) -> None:
    """Take so many epochs in the first call, so many in the second ...; the last number holds on."""

    def init(self: Pace, most: int) -> None:
        self._most, self._numbers = max(1, most), list(numbers)  # type: ignore[attr-defined]

    def following(self: Pace, left: int) -> int:
        numbers = self._numbers  # type: ignore[attr-defined]
        return min(numbers.pop(0) if len(numbers) > 1 else numbers[0], left, self._most)

    monkeypatch.setattr(Pace, "__init__", init)
    monkeypatch.setattr(Pace, "next", following)
    monkeypatch.setattr(Pace, "took", lambda *_: None)


def outcome(net: nn.Module, run: cr.Run) -> tuple[Any, ...]:
    """All that a run leaves behind but for times."""
    return (run.loss, run.penalty, run.learning_rate, run.steps, run.epochs, run.stopped, net._counters, net._schedule_state)


# ----------------------------------------------------------------------------------------------------------- the order of rows


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1, 2**32, 2**64 - 1])
@pytest.mark.parametrize("rows", [1, 2, 5, 64, 700])
def test_orders_of_many_epochs_are_those_of_each(seed: int, rows: int) -> None:
    for first in (0, 3, 2**32 - 20):
        expected = [epoch_order(rows, shuffle=True, seed=seed, epoch=first + i) for i in range(20)]
        np.testing.assert_array_equal(shuffled(rows, seed, first, 20), expected)


def test_orders_where_the_number_of_an_epoch_needs_two_words() -> None:
    first = 2**32 - 4
    expected = [epoch_order(5, shuffle=True, seed=1, epoch=first + i) for i in range(20)]
    np.testing.assert_array_equal(shuffled(5, 1, first, 20), expected)


@pytest.mark.parametrize("shuffle", [False, True])
def test_orders_one_by_one_in_groups_and_again(shuffle: bool) -> None:
    orders = Orders(6, 6, shuffle=shuffle, seed=3)
    for first, epochs in ((0, 1), (1, 1), (2, 1), (3, 70), (73, 1), (5, 2), (0, 4), (4, 8), (200, 9), (209, 1)):
        expected = np.stack([epoch_order(6, shuffle=shuffle, seed=3, epoch=first + i) for i in range(epochs)])
        taken = orders.take(first, epochs, most=max(epochs, 50))
        np.testing.assert_array_equal(taken, expected if shuffle else expected[0])


# ------------------------------------------------------------------------------------------------------------- steps, by hand


def steps_by_hand(
    given: Data, batch: int, rule: cr.Optimizer, shuffle: bool, behind: Behind, planned: int
) -> dict[str, list[Any]]:
    """One epoch, step by step."""
    sizes = step_sizes(given.rows, batch)
    order = epoch_order(given.rows, shuffle=shuffle, seed=5, epoch=behind.epochs)
    edges = np.cumsum([0, *sizes])
    groups = -(-len(sizes) // rule.accumulate)
    made: dict[str, list[Any]] = {"entries": [], "sizes": list(sizes), "order": order.tolist(), DIVISOR: [], STEP: [], RATE: []}
    for i in range(len(sizes)):
        first = i - i % rule.accumulate
        last = min(first + rule.accumulate, len(sizes))
        made["entries"].append("step" if i == last - 1 else "accumulate")
        made[DIVISOR].append(given.total(order[edges[first] : edges[last]]))
        made[STEP].append((behind.steps + i) % 2**32)
        in_run, in_all = behind.of_run * groups + i // rule.accumulate, behind.updates + i // rule.accumulate
        tied = isinstance(rule.schedule, schedules["cosine"])
        made[RATE].append(float(rule.schedule(np.array([in_run if tied else in_all]), planned * groups)[0]))
    return made


def spelt_out(steps: Steps) -> dict[str, list[Any]]:
    """Steps one by one."""
    each = list(steps.each())
    made: dict[str, list[Any]] = {"entries": [e for e, *_ in each], "sizes": [s for _, s, *_ in each]}
    made["order"] = [int(r) for _, _, rows, _ in each for r in rows]
    return made | {k: [numbers[k].tolist() for *_, numbers in each] for k in steps.numbers}


READS = (DIVISOR, SEED, STEP, RATE, "hyper.momentum")


@pytest.mark.parametrize("rows", [1, 7, 24])
@pytest.mark.parametrize("batch", [1, 4, 6, 24])
@pytest.mark.parametrize("accumulate", [1, 2, 3, 50])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_steps_of_several_epochs_by_hand(rows: int, batch: int, accumulate: int, weighted: bool) -> None:
    x, t = data(rows)
    r = np.random.default_rng(0)
    given = Data({"x": x}, t, r.uniform(0, 3, rows) * (r.random(rows) > 0.6) if weighted else None)
    for rate in (0.1, cr.schedules.exponential(0.1, every=7), cr.schedules.cosine(0.1)):
        rule = cr.SGD(rate, accumulate=accumulate, momentum=0.9)
        epochs = Epochs(given, min(batch, rows), shuffle=True, seed=5, optimizer=rule, planned=9, keep=("loss",), reads=READS)
        behind = epochs.after(Behind(2**32 - 5, 11, 4, 0), 2)
        steps = epochs.take(behind, 3)
        parts = [steps_by_hand(given, min(batch, rows), rule, True, epochs.after(behind, i), 9) for i in range(3)]
        found = spelt_out(steps)
        for name in ("entries", "sizes", "order", DIVISOR, STEP, RATE):
            assert found[name] == [value for part in parts for value in part[name]], name
        assert steps.count == len(found["sizes"])
        assert found["hyper.momentum"] == [0.9] * steps.count
        assert found[SEED] == [key_of(5).tolist()] * steps.count
        later = epochs.take(epochs.after(behind, 3), 2)
        assert later.entries is steps.entries  # so a backend may keep what it made of them
        assert later.sizes is steps.sizes


def test_numbers_that_do_not_change_are_not_repeated() -> None:
    x, t = data(24)
    given = Data({"x": x}, t, None)
    for rule, batch, divisors, rates in (
        (cr.Adam(0.1), 6, 1, 1),
        (cr.Adam(0.1), 7, 4, 1),
        (cr.Adam(cr.schedules.exponential(0.1, every=7)), 6, 1, 20),
    ):
        epochs = Epochs(given, batch, shuffle=False, seed=5, optimizer=rule, planned=9, keep=(), reads=(DIVISOR, RATE))
        steps = epochs.take(Behind(0, 0, 0, 0), 5)
        assert {k: len(v) for k, v in steps.numbers.items()} == {
            **{f"hyper.{k}": 1 for k in rule.hyper()}, SEED: 1, DIVISOR: divisors, RATE: rates,
        }  # fmt: skip
        assert (steps.order.shape, steps.rounds, len(steps.sizes)) == ((24,), 5, 4)


def test_all_rows_at_once_have_no_order() -> None:
    """Where each row is taken by itself, and sums over all of them, as batch norm does."""
    x, t = data()
    nets = [noisy(), noisy()]
    for net, shuffle in zip(nets, (False, True), strict=True):
        net.fit(x, t, epochs=5, batch_size=20, shuffle=shuffle)
    assert_same(state(nets[0]), state(nets[1]))


class Blended(nn.Module):
    """Each row with some of the one before it in the batch."""

    def __init__(self) -> None:
        self.dense = nn.Dense(2)

    def __call__(self, x: Any) -> Any:
        return self.dense(0.75 * x + 0.25 * np.roll(x, 1, axis=0))


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_all_rows_at_once_are_shuffled_where_a_layer_looks_at_others(backend: str) -> None:
    x, t = data()
    losses = {}
    for shuffle in (False, True):
        run = Blended().fit(x, t, epochs=5, batch_size=20, shuffle=shuffle, optimizer=cr.SGD(0.0), backend=backend)
        losses[shuffle] = len(set(run.loss))
    assert losses == {False: 1, True: 5}


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_the_loss_of_each_epoch_by_hand(weighted: bool) -> None:
    """Σ over batches of loss · divisor / Σ of weights; a batch without weight counts nothing, whatever its loss."""
    x, t = data(300)
    r = np.random.default_rng(0)
    weight = np.where(np.arange(300) < 60, 0.0, r.uniform(0, 3, 300)) if weighted else None
    given = Data({"x": x}, t, weight)
    for shuffle in (False, True):
        epochs = Epochs(given, 7, shuffle=shuffle, seed=5, optimizer=cr.SGD(0.1), planned=9, keep=(), reads=READS)
        steps = epochs.take(Behind(0, 0, 0, 0), 4)
        count, sizes, order = steps.count, list(steps.sizes) * 4, np.array(spelt_out(steps)["order"])
        values = r.normal(size=count).astype(np.float32)
        history = epochs.history(steps, {"loss": values, "penalty": np.arange(count, dtype=np.float32)}, 3)
        edges = np.cumsum([0, *sizes])
        for e, found in enumerate(history["loss"]):
            places = range(e * count // 4, (e + 1) * count // 4)
            rows = [order[edges[i] : edges[i + 1]] for i in places]
            each = np.array([float(len(k)) if weight is None else float(np.sum(weight[k])) for k in rows])
            sums = np.array([float(values[i]) * given.total(k) for i, k in zip(places, rows, strict=True)])
            assert found == np.sum(np.where(each > 0, sums, 0.0)) / np.sum(each)
        assert history["penalty"] == [count // 4 * (e + 1) - 1 for e in range(3)]
        assert history["learning_rate"] == [0.1] * 3


# --------------------------------------------------------------------------------------------------- the same bits, however many

SETTINGS: dict[str, dict[str, Any]] = {
    **{name: {"optimizer": rule(0.01, **options)} for name, rule in optimizers.items() for options in rule.examples[-1:]},
    "accumulation": {"optimizer": cr.Adam(0.01, accumulate=3, clip_norm=1.0)},
    "penalties": {"optimizer": cr.Adam(0.01, l1=0.1, l2=0.1, weight_decay=0.1)},
    "in order": {"shuffle": False},
    "one step": {"batch_size": 20},
    "short last batch": {"batch_size": 6},
    "weights": {"sample_weight": np.linspace(0, 2.0, 20), "batch_size": 6, "optimizer": cr.SGD(0.1, accumulate=2)},
    "seed 7": {"seed": 7},
    "neighbours": {"optimizer": cr.SGD(Neighbours(0.1))},
    "float64": {"dtype": "float64"},
    **{f"schedule {name}": {"optimizer": cr.SGD(schedule(0.1), momentum=0.5)} for name, schedule in schedules.items()},
}


@pytest.mark.parametrize("options", list(SETTINGS.values()), ids=list(SETTINGS))
def test_the_same_bits_one_by_one_and_together(
    options: dict[str, Any], calls: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, t = data()
    results = []
    for numbers in ((1,), (2, 1, 3, 10), (100,)):
        calls.clear()
        at_once(monkeypatch, *numbers)
        net = noisy() if options.get("optimizer", cr.SGD()).name != "lbfgs" else nn.Dense(2)
        runs = [net.fit(x, t, epochs=e, **{"batch_size": 5, **options}) for e in (13, 2)]
        results.append((state(net), net._slots, [outcome(net, run) for run in runs], len(calls)))
    for weights, slots, histories, _ in results[1:]:
        assert_same(weights, results[0][0])
        assert_same(slots, results[0][1])
        assert histories == results[0][2]


@pytest.mark.parametrize("backend", list(backends))
@pytest.mark.parametrize("rule", [cr.Adam(0.01), cr.SGD(0.1, momentum=0.9, accumulate=3)], ids=["", "accumulated"])
def test_the_same_bits_on_every_backend(backend: str, rule: cr.Optimizer, monkeypatch: pytest.MonkeyPatch) -> None:
    x, t = data()
    results = []
    for numbers in ((1,), (2, 1, 3, 100)):
        at_once(monkeypatch, *numbers)
        net = noisy()
        options: dict[str, Any] = {
            "batch_size": 6,
            "optimizer": rule,
            "sample_weight": np.linspace(0, 2.0, 20),
            "backend": backend,
        }
        runs = [net.fit(x, t, epochs=e, **options) for e in (40, 2)]
        with pytest.raises(cr.DivergenceError) as caught:
            net.fit(
                x,
                t,
                epochs=90,
                **{**options, "optimizer": replace(rule, learning_rate=Leap(0.01, at=net._counters["updates"] + 50))},
            )
        told = [outcome(net, run) for run in (*runs, caught.value.run)]
        results.append((state(net), net._slots, (str(caught.value), told)))
    assert_same(results[0][0], results[1][0])
    assert_same(results[0][1], results[1][1])
    assert results[0][2] == results[1][2]


def test_epochs_are_taken_together_where_nobody_looks(calls: list[tuple[int, int]]) -> None:
    x, t = data()
    run = noisy().fit(x, t, epochs=40, batch_size=5)
    assert run.epochs == 40
    assert sum(steps for steps, _ in calls) == 160
    assert calls[0] == (4, 20)
    assert len(calls) < 10


def observing(schedule: Schedule) -> dict[str, Any]:
    return {"optimizer": cr.SGD(schedule)}


class Projected(cr.SGD):
    """A user's rule that brings weights back from infinity."""

    def update(self, w: Any, g: Any, slots: Any, shared: Any, h: Any) -> Any:
        return np.minimum(w - h["learning_rate"] * g, 1.0), {}


LOOKS: dict[str, dict[str, Any]] = {
    "callback": {"callbacks": [lambda run: None]},
    "validation": {"validation": 0.2},
    "metric": {"metrics": ("mae", lambda prediction, target: 0.0)},
    "early stopping": {"early_stopping": 5},
    "plateau": {"optimizer": cr.SGD(cr.schedules.reduce_on_plateau(0.1))},
    "not lasting": {"optimizer": Projected(0.1)},
}


@pytest.mark.parametrize("options", list(LOOKS.values()), ids=list(LOOKS))
def test_epochs_are_taken_one_by_one_where_somebody_looks(options: dict[str, Any], calls: list[tuple[int, int]]) -> None:
    x, t = data()
    run = noisy().fit(x, t, epochs=5, batch_size=4, **options)
    assert run.epochs == 5
    assert [steps for steps, _ in calls] == [4 if "validation" in options else 5] * 5


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
    session._state["a"][:] = 1
    second = session.keep()
    session._state["a"][:] = 2
    del second
    third = session.keep()
    assert len(session._copies) == 2
    session._state["a"][:] = 3
    assert session.keep().arrays()["a"][0] == 3
    assert len(session._copies) == 3  # two are held
    assert (first.arrays()["a"][0], third.arrays()["a"][0]) == (0, 2)


def test_metrics_that_are_sums_take_epochs_together(calls: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    x, t = data()
    kept: list[Any] = []
    run_of = ReferenceSession.run
    watched = lambda self, steps, pulse=None: kept.append(steps.keep) or run_of(self, steps, pulse)
    monkeypatch.setattr(ReferenceSession, "run", watched)
    results = []
    for numbers in ((1,), (2, 3, 100)):
        with monkeypatch.context() as patch:
            at_once(patch, *numbers)
            net = noisy()
            run = net.fit(x, t, epochs=9, batch_size=6, metrics=("r2", "mae"), sample_weight=np.arange(20) % 3)
        assert {len(column) for column in run.table().values()} == {9}
        results.append(run)
    assert results[0].metrics == results[1].metrics
    assert set(kept) == {("loss", "penalty", "metric.r2", "metric.mae")}
    assert len(kept) == 9 + 3
    monkeypatch.setattr("chainrule.train.fit.MOST_STEPS", 4 * 6 * 3)  # loss, penalty, and a number for each output and metric
    calls.clear()
    noisy().fit(x, t, epochs=40, batch_size=6, metrics=("r2", "mae"))
    assert max(steps for steps, _ in calls) == 4 * 6


def test_memory_is_bounded(calls: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chainrule.train.fit.MOST_STEPS", 30)
    x, t = data()
    nn.Dense(2).fit(x, t, epochs=40, batch_size=5)
    assert max(steps for steps, _ in calls) == 28  # seven epochs of four
    calls.clear()
    monkeypatch.setattr("chainrule.train.fit.MOST_ROWS", 70)
    nn.Dense(2).fit(x, t, epochs=40, batch_size=5)
    assert max(rows for _, rows in calls) == 60
    calls.clear()
    monkeypatch.setattr("chainrule.train.fit.MOST_ROWS", 7)
    nn.Dense(2).fit(x, t, epochs=4, batch_size=5)
    assert {rows for _, rows in calls} == {20}


def test_pace() -> None:
    pace, taken = Pace(1000), []
    for seconds in (1e-6, 1e-6, 0.05, 0.2, 0.2, 0.7, 0.3, 0.05, 0.05):
        taken.append(pace.next(10**9))
        pace.took(taken[-1], seconds)
    assert taken == [1, 2, 4, 8, 8, 8, 4, 4, 8]
    assert pace.next(3) == 3
    pace.took(3, 1e-6)  # the end of a run says nothing of a whole call
    assert pace.next(10**9) == 16
    for _ in range(20):
        pace.took(pace.next(10**9), 0.0)
    assert pace.next(10**9) == 1000
    for _ in range(20):
        pace.took(pace.next(10**9), 9.0)
    assert pace.next(10**9) == 1
    assert Pace(0).next(5) == 1


def test_the_history_of_epochs_taken_together(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once(monkeypatch, 1, 6)
    x, t = data()
    run = noisy().fit(x, t, epochs=9, batch_size=5)
    assert {len(column) for column in run.table().values()} == {9}
    assert 0 < sum(run.epoch_seconds) <= run.seconds + 1e-6
    assert len(set(run.epoch_seconds)) == 3
    assert all(type(v) is float for v in [*run.loss, *run.penalty, *run.learning_rate, *run.epoch_seconds])


def test_a_metric_may_bear_the_name_of_a_column() -> None:
    def penalty(prediction: Array, target: Array) -> float:
        return 7.0

    x, t = data()
    run = nn.Dense(2).fit(x, t, epochs=3, metrics=(penalty,))
    assert run.metrics["penalty"] == [7.0] * 3
    assert run.penalty == [0.0] * 3


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


# Where a signal happens to arrive inside a finaliser, Python drops the exception with a warning.
DROPPED = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


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


# --------------------------------------------------------------------------------------------------------------------- progress


class Terminal:
    """A stream that says it is a terminal, and keeps what is written."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self.lines: list[str] = []

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> None:
        self.lines += [text.strip()] if text.strip() else []

    def flush(self) -> None:
        pass


def test_the_progress_line_counts_epochs_within_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chainrule.train.progress._REDRAW", 0.0)
    run, stream = cr.Run(0), Terminal()
    progress = Progress(run, 20, True, stream)  # type: ignore[arg-type]  # all that is asked of a stream
    run.write(0, {"loss": [0.5] * 5}, {})
    for done in (1, 10, 11, 100):
        progress.step(done, 10)
    assert [line.split()[1] for line in stream.lines] == ["6/20", "6/20", "7/20", "15/20"]
    run.write(5, {"loss": [0.25] * 15}, {})
    progress.epoch()
    assert stream.lines[-1].split()[1] == "20/20"


def test_progress_while_epochs_are_taken_together(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once(monkeypatch, 1, 5, 100)
    monkeypatch.setattr("chainrule.train.progress._REDRAW", 0.0)
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    x, t = data()
    nn.Dense(2).fit(x, t, epochs=12, batch_size=5)
    shown = [int(line.split()[1].split("/")[0]) for line in stream.lines]
    assert shown == sorted(shown)
    assert set(shown) == set(range(1, 13))


# --------------------------------------------------------------------------------------------- programs that need no new recording


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, tuple[str, ...]]]]:
    """(rows, entries) of each program that `fit` and `evaluate` record."""
    seen: list[tuple[int, tuple[str, ...]]] = []

    def record(task: Any, rows: int, entries: Any) -> Any:
        seen.append((rows, tuple(entries)))
        return make_program(task, rows, entries)

    monkeypatch.setattr("chainrule.train.model.make_program", record)
    return seen


def test_a_loop_of_fits_records_once(recorded: list[Any]) -> None:
    x, t = data()
    loop, once = noisy(), noisy()
    for _ in range(4):
        loop.fit(x, t, epochs=1, batch_size=6, validation=(x, t))
        loop.evaluate(x, t)
    assert recorded == [(6, ("step",)), (2, ("step",)), (20, ("evaluate",)), (20, ("evaluate",))]  # one of fit, one of evaluate
    once.fit(x, t, epochs=4, batch_size=6)
    assert_same(state(loop), state(once))


def test_other_metrics_are_another_recording(recorded: list[Any]) -> None:
    x, t = data()
    net = nn.Dense(2)
    for metrics in (("mae",), ("mae",), ("mae", "rmse"), (lambda prediction, target: 0.0,), (), ("mae",)):
        net.fit(x, t, epochs=1, batch_size=20, metrics=metrics)
    assert len(recorded) == 3


def test_new_numbers_need_no_new_recording(recorded: list[Any]) -> None:
    """Weights, rates, data and seeds are no part of a program."""
    net = nn.Sequential(nn.Dense(3, "tanh"), nn.Dense(2))
    for k in range(4):
        x, t = data(seed=k)
        net.fit(x, t, epochs=1, seed=k, optimizer=cr.Adam(Neighbours(10.0**-k)))
        net.load_parameters({n: v + 1 for n, v in net.parameters.items()})
    assert len(recorded) == 1


CHANGES: dict[str, Callable[[nn.Sequential, dict[str, Any]], Any]] = {
    "rows": lambda net, o: o.update(x=o["x"][:-1], y=o["y"][:-1]),
    "batch size": lambda net, o: o.update(batch_size=5),
    "activation": lambda net, o: setattr(net[0], "activation", np.sin),
    "momentum of batch norm": lambda net, o: setattr(net[1], "momentum", 0.5),
    "dropout": lambda net, o: setattr(net[2], "rate", 0.25),
    "frozen layer": lambda net, o: setattr(net[0], "trainable", False),
    "frozen statistics": lambda net, o: setattr(net[1], "trainable", False),
    "loss": lambda net, o: o.update(loss="mae"),
    "option of the loss": lambda net, o: o.update(loss=losses.huber(0.3)),
    "optimizer": lambda net, o: o.update(optimizer="sgd"),
    "flag of the optimizer": lambda net, o: o.update(optimizer=cr.SGD(0.01, momentum=0.9, nesterov=True)),
    "a penalty": lambda net, o: o.update(optimizer=cr.Adam(l2=0.1)),
    "accumulation": lambda net, o: o.update(optimizer=cr.Adam(accumulate=2)),
    "weights": lambda net, o: o.update(sample_weight=np.arange(20.0)),
    "target": lambda net, o: o.update(loss=losses.cross_entropy(), y=np.arange(20) % 2),
}


@pytest.mark.parametrize("change", list(CHANGES.values()), ids=list(CHANGES))
def test_whatever_a_program_depends_on_is_noticed(change: Callable[..., Any], recorded: list[Any]) -> None:
    """The network that was trained before learns what one that forgets its programs learns."""
    results, counts = [], []
    for forgets in (False, True):
        x, t = data()
        options: dict[str, Any] = {"x": x, "y": t, "batch_size": 20, "loss": "huber", "optimizer": cr.Adam(0.01)}
        net = noisy()
        for turn in range(3):
            if turn == 2:
                change(net, options)
            if forgets:
                net._programs.clear()
            recorded.clear()
            net.fit(epochs=1, **options)
            counts.append(len(recorded))
        results.append(state(net))
    assert_same(results[0], results[1])
    assert counts[:2] == [1, 0]
    assert counts[2] >= 1


class Own(nn.Module):
    """A user's layer that reads from outside."""

    def __call__(self, x: Any) -> Any:
        return FACTOR[0] * x


FACTOR = [1.0]


def test_functions_and_layers_of_a_user_are_recorded_each_time(recorded: list[Any]) -> None:
    """Whatever they read, none of it is forgotten."""
    x, t = data(outputs=4)
    given = [2.0]

    def loss(s: Any, t: Any) -> Any:
        return given[0] * (s - t) ** 2

    for make, options in (
        (lambda: nn.Dense(4), {"loss": loss}),
        (lambda: nn.Dense(4, lambda z: given[0] * z), {}),
        (lambda: nn.Sequential(nn.Dense(4), Own()), {}),
        (lambda: nn.Dense(4), {"optimizer": Projected(0.1)}),
    ):
        net, twin = make(), make()
        for k in range(3):
            given[0] = FACTOR[0] = 2.0 + k
            recorded.clear()
            net.fit(x, t, epochs=1, batch_size=20, **options)  # type: ignore[arg-type]
            assert len(recorded) == 1
            twin._programs.clear()
            twin.fit(x, t, epochs=1, batch_size=20, **options)  # type: ignore[arg-type]
        assert_same(net.parameters, twin.parameters)


def test_another_function_at_the_same_place_in_memory_is_another_function() -> None:
    x, t = data()
    net = nn.Sequential(nn.Dense(2, lambda z: z), nn.Dense(2))
    net.fit(x, t, epochs=0, dtype="float64")
    w = net.parameters
    for k in range(20):
        net[0].activation = None  # now the old one is gone
        net[0].activation = eval("lambda z: k * z", {"k": float(k)})
        expected = k * (x @ w["0.weight"] + w["0.bias"]) @ w["1.weight"] + w["1.bias"]
        np.testing.assert_allclose(net.predict(x), expected, rtol=1e-10)


def test_the_line_that_is_named_is_that_of_the_call(recorded: list[Any]) -> None:
    x, t = data()
    net = nn.Dense(2)
    net.fit(x, t, epochs=1)
    net.fit(x, t, epochs=1)
    assert len(recorded) == 2


def test_programs_that_are_kept_are_not_copied(recorded: list[Any]) -> None:
    x, t = data()
    net = nn.Dense(2)
    for other in (copy.deepcopy, lambda n: pickle.loads(pickle.dumps(n)), lambda n: n):
        recorded.clear()
        twin = other(net)
        for _ in range(2):
            twin.fit(x, t, epochs=1)
        assert len(recorded) == 1


def test_whether_a_schedule_depends_on_the_length_of_the_run() -> None:
    """Found without an array of all steps, and for the package's own schedules without asking for all of them."""
    made: list[int] = []

    @dataclass(frozen=True)
    class Late(Schedule):
        """Falls before the end, but only just."""

        tied: bool = True

        def __call__(self, steps: Array, total: int) -> Array:
            made.append(len(steps))
            return np.where(steps >= total - 3, 0.0, self.learning_rate) if self.tied else np.full(len(steps), 0.1)

    assert not module._is_tied(Late(tied=False), 10_000, at_once=1000)
    assert (max(made), sum(made)) == (1000, 20_000)
    for total in (5, 50, 10_000):
        assert module._is_tied(Late(), total, at_once=1000)
    for total in (50, 5000, 10**9):
        for name, schedule in schedules.items():
            expected = name not in ("constant", "reduce_on_plateau")
            assert module._is_tied(schedule(), total, at_once=1000) == expected, (name, total)
        for part in (1e-8, 1e-3, 0.3, 0.999):
            every, longer = (max(1, round(part * n)) for n in (total, 2 * total))
            assert module._is_tied(schedules["step"](every=part), total, at_once=1000) == (every != longer and every < total)
        assert not module._is_tied(schedules["step"](every=5), total, at_once=1000)
        assert not module._is_tied(schedules["exponential"](every=5), total, at_once=1000)
