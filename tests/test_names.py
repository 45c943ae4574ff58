"""Names that a layer of one's own may not take by chance, and those that it may."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest

from chainrule import nn
from chainrule.errors import UsageError
from chainrule.nn.module import Module
from chainrule.train.state import OWN

METHODS = sorted(Module._closed - OWN - {"_closed"})


def layer_with(base: type = nn.Module, **members: Any) -> Any:
    return type(base)("Attention", (base,), members)


# ------------------------------------------------------------------------------------------------------------------- in classes


def test_all_methods_of_layers_are_closed_and_nothing_else() -> None:
    assert {"_scores", "_layers", "_children", "_build", "fit", "predict", "parameters", "training", "parameter", "save"} <= set(
        METHODS
    )
    assert not {"__call__", "__init__", "__repr__", "trainable", "forward", "build", "step"} & set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_that_training_calls_is_not_replaced_by_chance(name: str) -> None:
    with pytest.raises(UsageError, match=f'^Attention defines "{name}", which Module needs .* name.*overrides=\\[{name!r}\\]'):
        layer_with(**{name: lambda self, x: x})


@pytest.mark.parametrize("name", sorted(OWN))
def test_attributes_that_hold_a_networks_state_are_not_defined_by_classes(name: str) -> None:
    with pytest.raises(UsageError, match=f'"{name}".*another name.$'):
        layer_with(**{name: None})
    with pytest.raises(UsageError, match=f'overrides=\\["{name}"\\] names no method'):
        type(nn.Module)("Attention", (nn.Module,), {name: None}, overrides=[name])


def test_names_of_built_in_layers_are_closed_to_those_who_derive_from_them() -> None:
    with pytest.raises(UsageError, match='Attention defines "_first", which LSTM needs'):
        layer_with(nn.LSTM, _first=lambda self: 0)
    layer_with(_first=lambda self: 0)  # other layers have no such method


def test_what_is_there_to_be_defined_may_be() -> None:
    class Leaky(nn.Recurrent):
        state_names = ("level",)
        trainable = False
        examples = ()

        def __init__(self) -> None:
            super().__init__(state=2)

        def __repr__(self) -> str:
            return "Leaky()"

        def step(self, state: Any, x: Any) -> Any:
            return self.forward(state, x)

        def forward(self, state: Any, x: Any) -> Any:
            h = 0.5 * state + x
            return h, h

        def build(self) -> None: ...

    net = Leaky()
    net.fit(np.ones((3, 4, 2)), np.ones((3, 2)), epochs=0)
    assert net.predict(np.ones((3, 4, 2))).tolist() == [[1.875] * 2] * 3


def test_a_class_that_is_mixed_in_hides_no_method() -> None:
    class Logged:
        def fit(self) -> None: ...

    with pytest.raises(UsageError, match='Both, by way of Logged, defines "fit", which Dense needs'):

        class Both(Logged, nn.Dense): ...

    class Behind(nn.Dense, Logged): ...  # the layer's own method is found first

    class Other(nn.Module): ...

    with pytest.raises(UsageError, match='Between, by way of Logged, defines "fit"'):

        class Between(Other, Logged, nn.Dropout): ...  # Python looks there before it comes to what all layers have

    assert Behind.fit is nn.Module.fit


def test_a_method_is_replaced_on_purpose() -> None:
    class Short(nn.Sequential, overrides=["summary"]):
        def summary(self) -> str:
            return "short: " + super().summary()

    class Shorter(Short):  # it is theirs now
        def summary(self) -> str:
            return "shorter"

    assert Short(nn.Dense(1)).summary().startswith("short: ")
    assert Shorter(nn.Dense(1)).summary() == "shorter"
    with pytest.raises(UsageError, match=r'overrides=\["sumary"\] names no method of Module.*summary'):

        class Slip(nn.Module, overrides=["sumary"]): ...


# ----------------------------------------------------------------------------------------------------------------- on instances


@pytest.mark.parametrize("name", [*METHODS, *sorted(OWN)])
def test_an_attribute_hides_no_method_and_no_state(name: str) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            setattr(self, name, 3)

    with pytest.raises(UsageError, match=f'^Attention sets the attribute "{name}".*hide.*Module.*another name .*test_names.py'):
        Attention()
    with pytest.raises(UsageError, match=f'"{name}"'):
        setattr(nn.Dense(3), name, None)


def test_an_attribute_set_in_a_forward_pass_is_named_with_layer_and_line() -> None:
    class Attention(nn.Module):
        def __call__(self, x: Any) -> Any:
            self._scores = x @ self.parameter("weight", (x.shape[1], 2))
            return self._scores

    net = nn.Sequential(nn.Dense(3), Attention())
    with pytest.raises(UsageError, match=r'"_scores".*\[layer "1", .*test_names.py:\d+\]'):
        net.fit(np.ones((4, 3)), np.ones((4, 2)), epochs=1)


def test_other_attributes_are_free() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            self.query, self._weights, self._first = nn.Dense(2), [1, 2], None

        def __call__(self, x: Any) -> Any:
            self._shape = x.shape
            return self.query(x)

    net = Own()
    net.fit(np.ones((4, 3)), np.ones((4, 2)), epochs=1, verbose=False)
    assert net._shape == (4, 3)
    assert net.trainable
    net.trainable = False
    assert copy.deepcopy(net)._weights == [1, 2]


@pytest.mark.parametrize(("name", "example"), [(n, e) for n, layer in nn.layers.items() for e in layer.examples])
def test_layers_of_the_package_hide_nothing_of_their_own(name: str, example: dict[str, Any]) -> None:
    layer = nn.layers[name](*example.get("args", ()), **example.get("kwargs", {}))
    for part in layer._layers().values():
        assert not set(vars(part)) & (part._closed - OWN)
    again = pickle.loads(pickle.dumps(layer))
    assert vars(again).keys() == vars(layer).keys()


# -------------------------------------------------------------------------------------------------------------- odd, but legal


def test_a_layer_may_look_at_what_is_set() -> None:
    """By a `__setattr__` of its own: what the package sets through it is the package's."""

    class Watched(nn.Module):
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)

        def __call__(self, x: Any) -> Any:
            return x * self.parameter("w", (x.shape[-1],), "ones")

    net = Watched()
    net.fit(np.ones((4, 2)), np.ones((4, 2)), epochs=1, verbose=False)
    with pytest.raises(UsageError, match='sets the attribute "_loss"'):
        net._loss = 3


def test_how_overrides_are_named() -> None:
    with pytest.raises(UsageError, match=r'overrides="summary" is to be a list of names: overrides=\["summary"\]'):
        type(nn.Module)("Net", (nn.Module,), {}, overrides="summary")
    with pytest.raises(UsageError, match="free= is for layers of chainrule itself"):
        type(nn.Module)("Net", (nn.Module,), {}, free=["fit"])
