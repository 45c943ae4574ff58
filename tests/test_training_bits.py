"""The same seed, the same bits: in one fit or several, whatever the network was before and in whatever form the data comes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from same import assert_same, differ, state
from training import CONFIGS, at_zero, data, fit, noisy

import chainrule as cr
from chainrule import nn


@pytest.mark.parametrize("options", list(CONFIGS.values()), ids=list(CONFIGS))
def test_same_seed_same_bits(options: dict[str, Any]) -> None:
    one, two = noisy(), noisy()
    runs = [fit(net, 3, **options) for net in (one, two)]
    assert_same(state(one), state(two))
    assert runs[0].loss == runs[1].loss
    assert runs[0].validation_loss == runs[1].validation_loss
    assert runs[0].metrics == runs[1].metrics


@pytest.mark.parametrize("options", list(CONFIGS.values()), ids=list(CONFIGS))
def test_fit_twice_is_fit_of_two_epochs(options: dict[str, Any]) -> None:
    once, parts = noisy(), noisy()
    whole = fit(once, 3, **options)
    runs = [fit(parts, epochs, **options) for epochs in (1, 0, 2)]
    assert_same(state(parts), state(once))
    assert [loss for run in runs for loss in run.loss] == whole.loss
    assert [loss for run in runs for loss in run.validation_loss] == whole.validation_loss
    assert [rate for run in runs for rate in run.learning_rate] == whole.learning_rate
    assert [value for run in runs for value in run.metrics.get("mae", [])] == whole.metrics["mae"]
    assert whole.loss[0] != whole.loss[1]


def test_going_on_without_naming_the_optimizer_again() -> None:
    once, parts = noisy(), noisy()
    fit(once, 2, optimizer=cr.SGD(0.05, momentum=0.9))
    fit(parts, 1, optimizer=cr.SGD(0.05, momentum=0.9))
    fit(parts, 1)
    assert_same(state(parts), state(once))


def test_lbfgs_twice() -> None:
    x, t = data(20)
    nets = [nn.Sequential(nn.Dense(4, "tanh"), nn.Dense(2)) for _ in range(2)]
    nets[0].fit(x, t, epochs=8, optimizer="lbfgs", dtype="float64")
    nets[1].fit(x, t, epochs=3, optimizer="lbfgs", dtype="float64")
    nets[1].fit(x, t, epochs=5)
    assert_same(nets[0].parameters, nets[1].parameters)


CHANCES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "first weights": (lambda: nn.Dense(2), {"epochs": 0}),
    "order": (lambda: at_zero(2), {"epochs": 1, "batch_size": 4}),
    "dropout": (lambda: nn.Sequential(nn.Dropout(0.5), at_zero(2)), {"epochs": 1, "shuffle": False}),
    "validation rows": (lambda: at_zero(2), {"epochs": 1, "batch_size": 100, "validation": 0.5}),
}


@pytest.mark.parametrize(("network", "options"), list(CHANCES.values()), ids=list(CHANCES))
def test_another_seed_changes(network: Callable[[], nn.Module], options: dict[str, Any]) -> None:
    x, t = data(20)
    results = []
    for seed in (0, 0, 1, 2**40):
        net = network()
        net.fit(x, t, optimizer=cr.SGD(0.1), dtype="float64", seed=seed, **options)
        results.append(net.parameters)
    assert_same(results[0], results[1])
    assert differ(results[0], results[2])
    assert differ(results[2], results[3])


def test_a_first_weight_depends_on_seed_and_name_only() -> None:
    x, t = data(20)
    short, long = nn.Sequential(nn.Dense(3), nn.Dense(2)), nn.Sequential(nn.Dense(3), nn.Dense(2), nn.Dense(2))
    for net in (short, long):
        net.fit(x, t, epochs=0)
    np.testing.assert_array_equal(short.parameters["0.weight"], long.parameters["0.weight"])
    np.testing.assert_array_equal(short.parameters["1.weight"], long.parameters["1.weight"])
    assert not np.array_equal(long.parameters["1.weight"][:2], long.parameters["2.weight"])


def test_no_seed_draws_one_and_records_it() -> None:
    nets = [noisy() for _ in range(3)]
    runs = [fit(net, 2, seed=None, validation=0.2) for net in nets[:2]]
    assert all(type(run.seed) is int and run.seed >= 0 for run in runs)
    assert runs[0].seed != runs[1].seed
    assert differ(state(nets[0]), state(nets[1]))
    again = fit(nets[2], 2, seed=runs[0].seed, validation=0.2)
    assert_same(state(nets[2]), state(nets[0]))
    assert (again.loss, again.validation_loss, again.seed) == (runs[0].loss, runs[0].validation_loss, runs[0].seed)


def test_numpys_own_generator_is_neither_read_nor_moved() -> None:
    np.random.seed(0)
    first = noisy()
    fit(first, 1)
    np.random.seed(1)
    before = np.random.get_state(legacy=False)["state"]
    second = noisy()
    fit(second, 1)
    assert_same(state(first), state(second))
    after = np.random.get_state(legacy=False)["state"]
    assert before["pos"] == after["pos"]
    np.testing.assert_array_equal(before["key"], after["key"])


def test_fit_of_no_epochs_only_builds() -> None:
    net, other = noisy(), noisy()
    run = fit(net, 0)
    assert (run.loss, run.steps, run.epochs, run.metrics.get("mae", [])) == ([], 0, 0, [])
    assert net.built
    assert len(net.parameters) == 8
    assert other.parameters == {}
    fit(net, 2)
    fit(other, 2)
    assert_same(state(net), state(other))
    before = state(net)
    fit(net, 0, optimizer=cr.SGD(9.0), seed=5)
    assert_same(state(net), before)


def test_a_different_optimizer_starts_new_slots() -> None:
    x, t = data(10)
    old, fresh = nn.Dense(2), nn.Dense(2)
    old.fit(x, t, epochs=5, batch_size=10, shuffle=False, optimizer=cr.SGD(0.05, momentum=0.9), dtype="float64")
    fresh.fit(x, t, epochs=0, dtype="float64")
    fresh.load_parameters(old.parameters)
    for net in (old, fresh):
        net.fit(x, t, epochs=2, batch_size=10, shuffle=False, optimizer=cr.Adam(0.05))
    assert_same(old.parameters, fresh.parameters)
    back = nn.Dense(2)
    back.fit(x, t, epochs=0, dtype="float64")
    back.load_parameters(old.parameters)
    for net in (old, back):
        net.fit(x, t, epochs=2, batch_size=10, shuffle=False, optimizer=cr.SGD(0.05, momentum=0.9))
    assert_same(old.parameters, back.parameters)


def test_momentum_that_is_switched_off_and_on_starts_anew() -> None:
    x, t = data(10)
    net, fresh = nn.Dense(2), nn.Dense(2)
    net.fit(x, t, epochs=3, optimizer=cr.SGD(0.05, momentum=0.9), dtype="float64", shuffle=False)
    net.fit(x, t, epochs=1, optimizer=cr.SGD(0.05), shuffle=False)
    fresh.fit(x, t, epochs=0, dtype="float64")
    fresh.load_parameters(net.parameters)
    for each in (net, fresh):
        each.fit(x, t, epochs=1, optimizer=cr.SGD(0.05, momentum=0.9, nesterov=True), shuffle=False)
    assert_same(net.parameters, fresh.parameters)


def test_parameters_are_independent_of_the_network() -> None:
    net = noisy()
    fit(net, 1)
    kept = {name: value.copy() for name, value in state(net).items()}
    shown = state(net)
    fit(net, 1)
    assert_same(shown, kept)
    assert differ(state(net), kept)


@pytest.mark.parametrize(("dtype", "expected"), [("float32", np.float32), ("float64", np.float64), (np.float64, np.float64)])
def test_dtype_is_fixed_when_building(dtype: Any, expected: type) -> None:
    x, t = data(20)
    net = noisy()
    net.fit(x, t, epochs=1, dtype=dtype)
    net.fit(x.astype(np.float32), t.astype(np.float32), epochs=1)
    assert {value.dtype for value in state(net).values()} == {np.dtype(expected)}
    assert net.predict(x).dtype == expected
    assert {g.dtype for g in net.gradients(x, t).values()} == {np.dtype(expected)}


def test_double_precision_goes_beyond_single() -> None:
    x, t = data(20)
    nets = [nn.Dense(2) for _ in range(2)]
    for net, dtype in zip(nets, ("float32", "float64"), strict=True):
        net.fit(x, t, epochs=3, dtype=dtype)
    a, b = (net.parameters["weight"] for net in nets)
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert np.any(b != b.astype(np.float32))


def test_data_in_any_container_gives_the_same_network() -> None:
    x, t = (np.round(a, 1).astype(np.float32) for a in data(20))
    frozen = x.copy()
    frozen.flags.writeable = False
    wide = np.zeros((40, 8), np.float32)
    wide[::2, ::2] = x
    expected = nn.Dense(2)
    expected.fit(x, t, epochs=2, dtype="float64")
    for other in (frozen, np.asfortranarray(x), wide[::2, ::2], x.tolist(), x.astype(np.float64)):
        net = nn.Dense(2)
        before = np.array(other)
        net.fit(other, t, epochs=2, dtype="float64")
        if isinstance(other, list):
            np.testing.assert_allclose(net.parameters["weight"], expected.parameters["weight"], rtol=1e-6)
        elif other.dtype == np.float32:
            assert_same(net.parameters, expected.parameters)
        np.testing.assert_array_equal(before, other)


def test_whole_numbers_are_data_too() -> None:
    x = np.random.default_rng(0).integers(0, 256, (20, 4), dtype=np.uint8)
    t = np.random.default_rng(1).integers(-3, 4, 20)
    nets = [nn.Dense(1) for _ in range(2)]
    for net, kind in zip(nets, (x.dtype, np.float64), strict=True):
        net.fit(x.astype(kind), t, epochs=2, dtype="float64")
    assert_same(nets[0].parameters, nets[1].parameters)
    np.testing.assert_array_equal(nets[0].predict(x), nets[1].predict(x.astype(float)))


def test_a_flat_target_is_one_output() -> None:
    x, t = data(20, outputs=1)
    nets = [nn.Dense(1) for _ in range(2)]
    for net, target in zip(nets, (t, t[:, 0]), strict=True):
        net.fit(x, target, epochs=2)
    assert_same(nets[0].parameters, nets[1].parameters)
