"""Programs that are kept from one fit to the next: what needs a new recording, and what does not."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import together
from same import assert_same, state
from together import Neighbours, Projected, noisy
from training import data

import chainrule as cr
from chainrule import losses, nn
from chainrule.train.objective import make_program

slowly = together.slowly  # a fixture


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

    ways: list[tuple[Callable[[], nn.Module], dict[str, Any]]] = [
        (lambda: nn.Dense(4), {"loss": loss}),
        (lambda: nn.Dense(4, lambda z: given[0] * z), {}),
        (lambda: nn.Sequential(nn.Dense(4), Own()), {}),
        (lambda: nn.Dense(4), {"optimizer": Projected(0.1)}),
    ]
    for make, options in ways:
        net, twin = make(), make()
        for k in range(3):
            given[0] = FACTOR[0] = 2.0 + k
            recorded.clear()
            net.fit(x, t, epochs=1, batch_size=20, **options)
            assert len(recorded) == 1
            twin._programs.clear()
            twin.fit(x, t, epochs=1, batch_size=20, **options)
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
