"""Schedules against their formulas, step by step."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest

from chainrule import schedules
from chainrule.errors import UnknownNameError, UsageError
from chainrule.schedules import Schedule, resolve
from chainrule.schedules import schedules as registry


def one_cycle(t: int, total: int) -> float:
    """PyTorch's OneCycleLR with anneal_strategy="cos": two phases, ends included."""
    top, first, last = 0.3 * total - 1, 1 / 25, 1 / 25 / 1e4
    start, end, part = (first, 1.0, t / top) if t <= top else (1.0, last, (t - top) / (total - 1 - top))
    return end + (start - end) / 2 * (1 + math.cos(math.pi * part))


FORMULAS: dict[str, Callable[[int, int], float]] = {  # with the default options and a learning rate of 1
    "constant": lambda t, total: 1.0,
    "step": lambda t, total: 0.1 ** (t // round(total / 3)),
    "exponential": lambda t, total: 0.5 ** (t / round(total / 10)),
    "cosine": lambda t, total: (1 + math.cos(math.pi * t / total)) / 2,
    "warmup_cosine": lambda t, total: (t + 1) / 2 if t < 2 else (1 + math.cos(math.pi * (t - 2) / (total - 2))) / 2,
    "one_cycle": one_cycle,
    "reduce_on_plateau": lambda t, total: 1.0,
}


@pytest.mark.parametrize("name", registry)
def test_every_schedule_follows_its_formula(name: str) -> None:
    total = 40
    rates = registry[name](1.0)(np.arange(total), total)
    assert rates.dtype == np.float64
    np.testing.assert_allclose(rates, [FORMULAS[name](t, total) for t in range(total)], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", registry)
def test_every_schedule_keeps_the_contract(name: str) -> None:
    schedule = registry[name](0.25)
    for total in (0, 1, 2, 3, 1000):
        rates = schedule(np.arange(total + 3).reshape(1, -1), total)  # also past the end, when a run goes on
        assert rates.shape == (1, total + 3)
        assert np.all((rates >= 0) & (rates <= 0.25))
    np.testing.assert_array_equal(schedule(np.arange(90, 100), 100), schedule(np.arange(100), 100)[90:])
    assert schedule.steady == (len(np.unique(schedule(np.arange(1000), 1000))) == 1)
    assert schedule.name == name
    assert schedules.from_config(json.loads(json.dumps(schedules.config(schedule)))) == schedule
    assert hash(schedule) == hash(registry[name](0.25))
    state = schedule.observe(1.0, schedule.start())
    assert json.loads(json.dumps(state)) == state
    assert schedule.__doc__
    assert ">>>" in schedule.__doc__


def test_lengths_are_steps_or_fractions() -> None:
    t = np.arange(100)
    np.testing.assert_array_equal(schedules.step(1.0, every=25)(t, 100), schedules.step(1.0, every=0.25)(t, 100))
    np.testing.assert_array_equal(schedules.exponential(1.0, every=10)(t, 100), schedules.exponential(1.0, every=0.1)(t, 100))
    np.testing.assert_array_equal(schedules.warmup_cosine(1.0, warmup=5)(t, 100), schedules.warmup_cosine(1.0)(t, 100))
    np.testing.assert_array_equal(schedules.warmup_cosine(1.0, warmup=0)(t, 100), schedules.cosine(1.0)(t, 100))


def test_final_rates() -> None:
    assert schedules.cosine(1.0, final=0.1)(np.array([10]), 10)[0] == pytest.approx(0.1)
    assert schedules.warmup_cosine(1.0, warmup=2, final=0.1)(np.array([10]), 10)[0] == pytest.approx(0.1)
    ends = schedules.one_cycle(1.0, rise=0.5, divide=10, final_divide=100)(np.array([0, 4, 9]), 10)
    np.testing.assert_allclose(ends, [0.1, 1.0, 0.001])


def test_reduce_on_plateau_counts_bad_epochs() -> None:
    schedule = schedules.reduce_on_plateau(1.0, factor=0.5, patience=1, threshold=0.1, minimum=0.2)
    state, scales = schedule.start(), []
    #            best  bad   falls          best        falls         nan, falls to the minimum and stays
    for value in [10.0, 9.5, 9.5, 9.5, 8.9, 8.9, 8.5, 8.5, math.nan, math.nan, math.nan]:
        state = schedule.observe(value, state)
        scales.append(state["scale"])
    assert scales == [1, 1, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25, 0.2, 0.2, 0.2]
    assert state["best"] == 8.9


def test_reduce_on_plateau_with_negative_values() -> None:
    schedule = schedules.reduce_on_plateau(1.0, patience=0, threshold=0.1)
    state = schedule.observe(-10.0, schedule.start())
    assert schedule.observe(-10.5, state)["scale"] == 0.1
    assert schedule.observe(-11.5, state) == {"scale": 1.0, "bad": 0.0, "best": -11.5}


def test_plateau_state_is_never_changed_in_place() -> None:
    schedule = schedules.reduce_on_plateau(1.0, patience=0)
    state = schedule.observe(1.0, schedule.start())
    before = dict(state)
    schedule.observe(2.0, state)
    assert state == before


def test_resolve() -> None:
    assert resolve(0.1) == resolve(np.float64(0.1)) == schedules.constant(0.1)
    assert resolve("cosine") == schedules.cosine()
    assert resolve(schedules.step) == schedules.step()
    with pytest.raises(UnknownNameError, match='Did you mean "one_cycle"'):
        resolve("onecycle")
    for wrong in (None, True, [0.1]):
        with pytest.raises(UsageError, match="a learning rate is"):
            resolve(wrong)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("constant", {"learning_rate": -1}),
        ("constant", {"learning_rate": math.nan}),
        ("constant", {"learning_rate": math.inf}),
        ("constant", {"learning_rate": "0.1"}),
        ("constant", {"learning_rate": True}),
        ("step", {"every": 0}),
        ("step", {"every": 1.0}),
        ("step", {"every": True}),
        ("step", {"factor": 0}),
        ("exponential", {"every": -0.1}),
        ("exponential", {"factor": 1.5}),
        ("cosine", {"final": -1e-3}),
        ("warmup_cosine", {"warmup": 1.5}),
        ("warmup_cosine", {"warmup": -1}),
        ("one_cycle", {"rise": 1.0}),
        ("one_cycle", {"divide": 0.5}),
        ("one_cycle", {"final_divide": math.nan}),
        ("reduce_on_plateau", {"factor": 1.0}),
        ("reduce_on_plateau", {"patience": 1.5}),
        ("reduce_on_plateau", {"patience": -1}),
        ("reduce_on_plateau", {"threshold": -1}),
        ("reduce_on_plateau", {"minimum": math.nan}),
    ],
)
def test_bad_options(name: str, options: dict[str, object]) -> None:
    (option,) = options
    with pytest.raises(UsageError, match=rf"{name}\({option}=.*\): {option} must be "):
        registry[name](**options)  # type: ignore[arg-type]


def test_from_config_refuses_what_it_does_not_know() -> None:
    with pytest.raises(UsageError, match="does not take these options"):
        schedules.from_config({"name": "cosine", "cycles": 3})
    with pytest.raises(UnknownNameError):
        schedules.from_config({"learning_rate": 1.0})


def test_a_new_one_is_one_declaration() -> None:
    class linear(Schedule):
        def __call__(self, steps: np.ndarray, total: int) -> np.ndarray:
            return np.asarray(self.learning_rate * (1 - steps / total))

    assert resolve(linear)(np.arange(2), 2).tolist() == [1e-3, 5e-4]
