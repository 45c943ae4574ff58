"""Files of networks: what is written comes back and goes on, and a file is replaced whole or not at all."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import saved
from networks import data
from same import assert_same, state
from saved import Scaled, built, there_and_back

import chainrule as cr
from chainrule import nn
from chainrule.losses import losses
from chainrule.optim import optimizers
from chainrule.schedules import schedules

no_code_is_run = saved.no_code_is_run  # a fixture


class Branches(nn.Module):
    """Two named inputs."""

    def __init__(self) -> None:
        self.a, self.b = nn.Dense(2), nn.Dense(2)

    def __call__(self, left: Any, right: Any) -> Any:
        return self.a(left) * self.b(right)


# ------------------------------------------------------------------------------------------------------------- there and back

EXAMPLES = [(name, example) for name, layer in nn.layers.items() for example in layer.examples]


@pytest.mark.parametrize(("name", "example"), EXAMPLES, ids=[f"{n}-{k}" for k, (n, _) in enumerate(EXAMPLES)])
def test_every_registered_layer(name: str, example: Mapping[str, Any], tmp_path: Path) -> None:
    r = np.random.default_rng(0)
    x = r.integers(0, example["below"], example["input"]) if "below" in example else r.normal(size=example["input"])
    layer = nn.layers[name](*copy.deepcopy(example["args"]))
    net = nn.Sequential(layer, nn.Flatten(), nn.Dense(2))
    t = r.normal(size=(len(x), 2))
    net.fit(x, t, epochs=2, batch_size=2, optimizer=cr.Adam(0.01)) if len(x) % 2 == 0 else net.fit(x, t, epochs=2)
    again = there_and_back(net, tmp_path)
    assert repr(again) == repr(net)
    assert again.summary() == net.summary()
    assert_same(state(again), state(net))
    np.testing.assert_array_equal(again.predict(x), net.predict(x))
    assert_same(again.gradients(x, t, seed=3), net.gradients(x, t, seed=3))
    for each in (net, again):
        each.fit(x, t, epochs=1)
    assert_same(state(again), state(net))
    assert again.evaluate(x, t) == net.evaluate(x, t)


OPTIMIZERS = [(name, options) for name, rule in optimizers.items() for options in rule.examples]


@pytest.mark.parametrize(("name", "options"), OPTIMIZERS, ids=[f"{n}-{'-'.join(o)}" for n, o in OPTIMIZERS])
def test_every_optimizer_goes_on(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    x, t = data()
    net = nn.Sequential(nn.Dense(3, "tanh"), nn.Dense(2))
    net.fit(x, t, epochs=3, batch_size=5, optimizer=optimizers[name](**options))
    again = there_and_back(net, tmp_path)
    runs = [each.fit(x, t, epochs=2, batch_size=5) for each in (net, again)]
    assert_same(state(again), state(net))
    assert runs[0].loss == runs[1].loss


@pytest.mark.parametrize("name", list(schedules))
def test_every_schedule_goes_on(name: str, tmp_path: Path) -> None:
    x, t = data()
    net = nn.Dense(2)
    net.fit(x, t, epochs=3, batch_size=5, optimizer=cr.SGD(schedules[name](0.1), accumulate=2, clip_norm=1.0, l2=0.1))
    again = there_and_back(net, tmp_path)
    runs = [each.fit(x, t, epochs=2, batch_size=5) for each in (net, again)]
    assert runs[0].learning_rate == runs[1].learning_rate
    assert_same(state(again), state(net))


LOSSES = [(name, number) for name, loss in losses.items() for number in range(len(loss.examples))]


@pytest.mark.parametrize(("name", "number"), LOSSES, ids=[f"{n}-{k}" for n, k in LOSSES])
def test_every_loss_is_remembered(name: str, number: int, tmp_path: Path) -> None:
    example = losses[name].examples[number]
    loss = losses[name](**example.options)
    x = np.arange(float(len(example.scores)))[:, None]
    net = nn.Sequential(nn.Dense(int(np.prod(example.scores.shape[1:]))), nn.Reshape(*example.scores.shape[1:]))
    net.fit(x, example.target, loss=loss, epochs=1)
    again = there_and_back(net, tmp_path)
    assert again.evaluate(x, example.target) == net.evaluate(x, example.target)
    if loss.is_classification and loss.link != "identity":
        np.testing.assert_array_equal(again.predict_proba(x), net.predict_proba(x))


def test_sharing_freezing_precision_and_names(tmp_path: Path) -> None:
    x, t = data()
    layer = nn.Dense(4, "tanh")
    net = nn.Sequential(layer, nn.Sequential(layer, nn.BatchNorm(momentum=0.2)), nn.Dense(2))
    net[1].trainable = False
    net.fit(x, t, epochs=2, dtype="float64")
    again = there_and_back(net, tmp_path)
    assert again[0] is again[1][0]
    assert [again[k].trainable for k in range(3)] == [True, False, True]
    assert list(again.gradients(x, t)) == list(net.gradients(x, t))
    assert {value.dtype for value in state(again).values()} == {np.dtype("float64")}
    assert repr(again) == repr(net)
    np.testing.assert_array_equal(again.predict(x), net.predict(x))


def test_a_network_that_is_not_built(tmp_path: Path) -> None:
    x, t = data()
    net = nn.Sequential(nn.Dense(3, "relu"), nn.Dropout(0.2), nn.Dense(2))
    again = there_and_back(net, tmp_path)
    assert not again.built
    for each in (net, again):
        each.fit(x, t, epochs=2)
    assert_same(state(again), state(net))


def test_an_attribute_that_was_changed_is_not_lost_silently(tmp_path: Path) -> None:
    """A file holds the arguments that made a layer; where they no longer tell the truth, saving says so."""
    net = nn.Sequential(nn.Dropout(0.1), Scaled(nn.Dense(2), 0.5))
    net[0].rate = 0.9
    with pytest.raises(cr.UsageError, match=r"Dropout|rate"):
        net.save(tmp_path / "net.safetensors")
    net[0].rate = 0.1
    net[1].factor = 3.0
    with pytest.raises(cr.UsageError, match=r"Scaled|factor"):
        net.save(tmp_path / "net.safetensors")
    net[1].factor = 0.5
    net.save(tmp_path / "net.safetensors")


def test_layers_of_a_user(tmp_path: Path) -> None:
    x, t = data()
    net = nn.Sequential(Scaled(nn.Dense(3), 0.5, names=("a", "b")), Scaled(layer=nn.Dense(2)))
    net.fit(x, t, epochs=2)
    again = there_and_back(net, tmp_path, layers=[Scaled])
    assert isinstance(again[0], Scaled)
    assert (again[0].factor, tuple(again[0].names), again[1].factor) == (0.5, ("a", "b"), 2.0)
    assert list(again.parameters) == ["0.gain", "0.layer.weight", "0.layer.bias", "1.gain", "1.layer.weight", "1.layer.bias"]
    assert_same(state(again), state(net))
    np.testing.assert_array_equal(again.predict(x), net.predict(x))


def test_a_layer_of_a_user_must_be_named_when_loading(tmp_path: Path) -> None:
    net = nn.Sequential(Scaled(nn.Dense(3)))
    net.save(tmp_path / "net.safetensors")
    with pytest.raises(cr.FileFormatError, match=r"Scaled.*layers="):
        cr.load(tmp_path / "net.safetensors")


def test_several_inputs(tmp_path: Path) -> None:
    x, t = data()
    net = Branches()
    net.fit({"right": x, "left": x[:, :3]}, t, epochs=1)
    again = there_and_back(net, tmp_path, layers=[Branches])
    given = {"left": x[:, :3], "right": x}
    np.testing.assert_array_equal(again.predict(given), net.predict(given))
    with pytest.raises(cr.ShapeError, match="left"):
        again.predict(x)


def test_functions_known_by_name(tmp_path: Path) -> None:
    x, t = data()
    net = nn.Sequential(
        nn.Dense(3, "gelu", init="orthogonal"), nn.Activation("mish"), nn.Dense(2, init=cr.initializers.normal(0.3))
    )
    net.fit(x, t, epochs=1)
    again = there_and_back(net, tmp_path)
    np.testing.assert_array_equal(again.predict(x), net.predict(x))
    for each in (net, again):
        each.reset()
        each.fit(x, t, epochs=1, seed=4)
    assert_same(state(again), state(net))


NO_NAMES: Any = object()
NO_FILE: dict[str, Callable[[], nn.Module]] = {
    "lambda": lambda: nn.Dense(2, lambda z: z**3),
    "function of a user": lambda: nn.Sequential(nn.Dense(2), there_and_back),
    "initializer": lambda: nn.Dense(2, init=lambda generator, shape: np.ones(shape)),
    "object": lambda: Scaled(nn.Dense(2), names=NO_NAMES),
}


@pytest.mark.parametrize("make", list(NO_FILE.values()), ids=list(NO_FILE))
def test_what_no_file_can_describe_is_refused_and_an_old_file_stays(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    nn.Dense(1).save(path)
    before = path.read_bytes()
    with pytest.raises(cr.UsageError):
        make().save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["net.safetensors"]


def test_a_loss_of_a_user_does_not_keep_the_weights_from_being_saved(tmp_path: Path) -> None:
    x, t = data()
    net = nn.Dense(2)
    net.fit(x, t, loss=lambda s, t: (s - t) ** 4, epochs=1)
    again = there_and_back(net, tmp_path)
    np.testing.assert_array_equal(again.predict(x), net.predict(x))
    with pytest.raises(cr.UsageError, match="loss"):
        again.evaluate(x, t)
    assert again.evaluate(x, t, loss="mse") == net.evaluate(x, t, loss="mse")


# ------------------------------------------------------------------------------------------------------------ how it is written


def test_the_file_is_plain_safetensors(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    x, t = data()
    net = nn.Sequential(nn.Dense(3), nn.BatchNorm(), nn.Dense(2))
    net.fit(x, t, epochs=1)
    net.save(tmp_path / "net.safetensors")
    arrays = load_file(tmp_path / "net.safetensors")
    for name, value in state(net).items():
        assert any(key.endswith(name) and np.array_equal(array, value) for key, array in arrays.items()), name


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    """Who reads the old file while a new one is written sees all of the old one."""
    path = tmp_path / "net.safetensors"
    nn.Dense(1).save(path)
    before = path.read_bytes()
    with path.open("rb") as reader:
        first = reader.read(10)
        built(tmp_path, path)
        assert first + reader.read() == before
    assert path.read_bytes() != before
    assert os.listdir(tmp_path) == ["net.safetensors"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net.safetensors"
    nn.Dense(1).save(path)
    before = path.read_bytes()

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    for name in ("replace", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            try:
                nn.Dense(5).save(path)
            except OSError:
                assert path.read_bytes() == before
                assert os.listdir(tmp_path) == ["net.safetensors"]
            else:
                assert name == "fsync"  # not every writer asks for it


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        nn.Dense(1).save(tmp_path / "nowhere" / "net.safetensors")
    with pytest.raises(FileNotFoundError):
        cr.load(tmp_path / "net.safetensors")


def test_text_paths(tmp_path: Path) -> None:
    path = str(tmp_path / "a net")
    nn.Dense(3).save(path)
    assert repr(cr.load(path)) == "Dense(3)"
