"""What a network holds: names of its parameters, values that are set, copies and pickles, starting over."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from networks import data, rich
from same import assert_same, state

import chainrule as cr
from chainrule import nn

Array = np.ndarray

# ----------------------------------------------------------------------------------------------------------- parameter names


class Holder(nn.Module):
    """Layers in a list, a tuple, a dict, and within each other."""

    def __init__(self) -> None:
        self.blocks = [nn.Dense(3), nn.Dropout(0.1), nn.Sequential(nn.Dense(3), np.tanh, nn.Dense(3))]
        self.pair = (nn.Residual(nn.Dense(3)),)
        self.heads = {"mean": nn.Dense(1), "spread": nn.Dense(1)}

    def __call__(self, x: Any) -> Any:
        for block in self.blocks:
            x = block(x)
        x = self.pair[0](x) * self.parameter("gain", (3,), "ones")
        return np.concatenate([self.heads[name](x) for name in ("mean", "spread")], axis=1)


def test_names_of_nested_parameters() -> None:
    x, t = data(6, 4, 2)
    net = Holder()
    assert net.parameters == {}
    net.fit(x, t, epochs=1, dtype="float64")
    dense = ["blocks.0", "blocks.2.0", "blocks.2.2", "pair.0.layer", "heads.mean", "heads.spread"]
    assert set(net.parameters) == {f"{d}.{p}" for d in dense for p in ("weight", "bias")} | {"gain"}
    assert list(net.gradients(x, t)) == list(net.parameters)
    for name in dense:
        weight, bias = net.parameters[f"{name}.weight"], net.parameters[f"{name}.bias"]
        assert weight.ndim == 2
        assert bias.shape == weight.shape[1:]
    net.check_gradients(x, t)


def test_positions_count_all_layers() -> None:
    x, t = data(6)
    net = nn.Sequential(nn.Dense(4), np.tanh, nn.Dropout(0.1), nn.BatchNorm(), nn.Dense(2))
    net.fit(x, t, epochs=0)
    assert list(net.parameters) == ["0.weight", "0.bias", "3.scale", "3.shift", "4.weight", "4.bias"]
    assert list(net.statistics) == ["3.mean", "3.variance"]
    assert net.parameters["0.weight"].shape == (4, 4)
    assert net.parameters["4.weight"].shape == (4, 2)


def test_a_layer_kept_at_two_places_has_its_first_name() -> None:
    class Ends(nn.Module):
        def __init__(self) -> None:
            self.first = nn.Dense(3)
            self.middle = nn.Sequential(nn.Dense(3), self.first)

        def __call__(self, x: Any) -> Any:
            return self.middle(x)

    net = Ends()
    net.fit(np.ones((2, 3)), np.ones((2, 3)), epochs=0)
    assert set(net.parameters) == {"first.weight", "first.bias", "middle.0.weight", "middle.0.bias"}


def test_parameters_are_read_only_copies() -> None:
    x, t = data()
    net = nn.Dense(2)
    net.fit(x, t, epochs=1)
    before = net.parameters
    with pytest.raises(ValueError, match="read-only"):
        before["weight"][0, 0] = 9.0
    kept = before["weight"].copy()
    net.fit(x, t, epochs=1)
    np.testing.assert_array_equal(before["weight"], kept)
    assert not np.array_equal(net.parameters["weight"], kept)


# ---------------------------------------------------------------------------------------------------------- load_parameters


def test_load_parameters_sets_values_and_copies_them() -> None:
    x, t = data()
    net, other = (nn.Sequential(nn.Dense(3, "tanh"), nn.BatchNorm(), nn.Dense(2)) for _ in range(2))
    net.fit(x, t, epochs=3)
    other.fit(x, t, epochs=0, seed=9)
    values = state(net)
    values["0.weight"] = values["0.weight"].copy()
    other.load_parameters(values)
    assert_same(state(other), state(net))
    np.testing.assert_array_equal(other.predict(x), net.predict(x))
    values["0.weight"][:] = 0.0
    assert_same(state(other), state(net))


def test_load_parameters_takes_lists_other_dtypes_and_parts() -> None:
    net = nn.Dense(2)
    net.fit(np.ones((1, 1)), np.ones((1, 2)), epochs=0)
    net.load_parameters({"weight": [[1, 2]], "bias": np.array([0.5, 0.25], np.float64)})
    assert net.parameters["weight"].dtype == net.parameters["bias"].dtype == np.float32
    net.load_parameters({"bias": [3.0, 4.0]}, strict=False)
    assert (net.parameters["weight"].tolist(), net.parameters["bias"].tolist()) == ([[1, 2]], [3, 4])


REFUSED: list[tuple[str, Callable[[dict[str, Array]], dict[str, Any]], type[Exception], str]] = [
    ("unknown", lambda p: {**p, "0.wieght": p["0.weight"]}, cr.UnknownNameError, r'"0\.wieght".*Did you mean "0\.weight"'),
    ("missing", lambda p: {"0.weight": p["0.weight"]}, cr.DataError, r"0\.bias"),
    (
        "shape",
        lambda p: {**p, "0.weight": np.ones((3, 4))},
        cr.ShapeError,
        r"0\.weight.*\(3, 4\).*\(4, 3\)|0\.weight.*\(4, 3\).*\(3, 4\)",
    ),
    ("no broadcast", lambda p: {**p, "0.bias": 1.0}, cr.ShapeError, r"0\.bias.*\(\)"),
    ("nan", lambda p: {**p, "0.bias": [1.0, np.nan, 2.0]}, cr.DataError, r"0\.bias"),
    ("overflow", lambda p: {**p, "0.bias": [1.0, 1e300, 2.0]}, cr.DataError, r"0\.bias"),
    ("text", lambda p: {**p, "0.bias": ["a", "b", "c"]}, cr.ChainruleError, r"0\.bias"),
    ("ragged", lambda p: {**p, "0.bias": [[1.0], [1.0, 2.0]]}, cr.ChainruleError, r"0\.bias"),
    ("complex", lambda p: {**p, "0.bias": [1j, 2j, 3j]}, cr.ChainruleError, r"0\.bias"),
]


@pytest.mark.parametrize(("change", "error", "said"), [c[1:] for c in REFUSED], ids=[c[0] for c in REFUSED])
def test_load_parameters_refuses_and_changes_nothing(change: Callable[..., Any], error: type[Exception], said: str) -> None:
    x, t = data()
    net = nn.Sequential(nn.Dense(3), nn.Dense(2))
    net.fit(x, t, epochs=0)
    before = net.parameters
    with pytest.raises(error, match=said):
        net.load_parameters(change({name: value + 1 for name, value in before.items()}))
    assert_same(net.parameters, before)


def test_load_parameters_before_building() -> None:
    with pytest.raises(cr.NotBuiltError, match="fit"):
        nn.Dense(2).load_parameters({"weight": np.ones((1, 2))})


# ----------------------------------------------------------------------------------------------- copies, pickles, starting over

COPIES: dict[str, Callable[[Any], Any]] = {"deepcopy": copy.deepcopy, "pickle": lambda net: pickle.loads(pickle.dumps(net))}


@pytest.mark.parametrize("duplicate", list(COPIES.values()), ids=list(COPIES))
def test_a_copy_is_the_same_and_stands_alone(duplicate: Callable[[Any], Any]) -> None:
    x, t = data(20)
    net = rich()
    net.fit(x, t, epochs=2, batch_size=6, optimizer=cr.Adam(0.01))
    twin = duplicate(net)
    assert_same(state(twin), state(net))
    np.testing.assert_array_equal(twin.predict(x), net.predict(x))
    assert twin.summary() == net.summary()
    before = state(net)
    twin.fit(x, t, epochs=2, batch_size=6)
    assert_same(state(net), before)
    net.fit(x, t, epochs=2, batch_size=6)
    assert_same(state(twin), state(net))  # optimizer slots, step numbers and randomness went along
    assert not np.array_equal(state(net)["0.weight"], before["0.weight"])


@pytest.mark.parametrize("duplicate", list(COPIES.values()), ids=list(COPIES))
def test_a_copy_of_a_network_that_is_not_built(duplicate: Callable[[Any], Any]) -> None:
    x, t = data(20)
    net = rich()
    twin = duplicate(net)
    assert not twin.built
    twin.fit(x, t, epochs=1)
    assert not net.built
    net.fit(x, t, epochs=1)
    assert_same(state(twin), state(net))


@pytest.mark.parametrize("duplicate", list(COPIES.values()), ids=list(COPIES))
def test_a_copy_keeps_sharing_and_freezing(duplicate: Callable[[Any], Any]) -> None:
    layer = nn.Dense(4, "tanh")
    net = nn.Sequential(layer, layer, nn.Dense(2))
    net[2].trainable = False
    x, t = data()
    net.fit(x, t, epochs=1)
    twin = duplicate(net)
    assert twin[0] is twin[1]
    assert list(twin.gradients(x, t)) == ["0.weight", "0.bias"]


def test_a_deepcopy_with_a_lambda() -> None:
    x, t = data()
    net = nn.Dense(2, lambda z: z**2)
    net.fit(x, t, epochs=1)
    np.testing.assert_array_equal(copy.deepcopy(net).predict(x), net.predict(x))


def test_reset_starts_over() -> None:
    x, t = data(20)
    net, fresh = rich(), rich()
    net.fit(x, t, epochs=3, optimizer=cr.SGD(0.1, momentum=0.9))
    net.reset()
    assert (net.parameters, net.statistics, net.built) == ({}, {}, False)
    with pytest.raises(cr.NotBuiltError):
        net.predict(x)
    wider = np.hstack([x, x])
    for each in (net, fresh):
        each.fit(wider, t, epochs=2, dtype="float64")
    assert_same(state(net), state(fresh))


def test_reset_of_a_network_frees_layers_for_another_one() -> None:
    x, t = data()
    layer = nn.Dense(4)
    net = nn.Sequential(layer, nn.Dense(2))
    net.fit(x, t, epochs=1)
    net.reset()
    other = nn.Sequential(nn.Flatten(), layer)
    other.fit(x[:, :3], x, epochs=0)
    assert other.parameters["1.weight"].shape == (3, 4)
