"""Networks: gradients against another library, layers written by a user, several inputs, shared and frozen layers, names, copies."""

from __future__ import annotations

import copy
import math
import pickle
import re
from collections.abc import Callable
from typing import Any

import autograd
import autograd.numpy as anp
import numpy as np
import pytest
from autograd.scipy.special import erf
from differences import assert_gradient

import chainrule as cr
from chainrule import nn
from chainrule.ops.activations import activations

Array = np.ndarray


def assert_same(a: dict[str, Array], b: dict[str, Array]) -> None:
    """The same names, in the same order, with the same bits."""
    assert list(a) == list(b)
    for name, value in a.items():
        assert value.dtype == b[name].dtype
        np.testing.assert_array_equal(value, b[name], err_msg=name)


def state(net: nn.Module) -> dict[str, Array]:
    return {**net.parameters, **net.statistics}


def data(rows: int = 12, inputs: int = 4, outputs: int = 2, seed: int = 0) -> tuple[Array, Array]:
    r = np.random.default_rng(seed)
    return r.normal(size=(rows, inputs)), r.normal(size=(rows, outputs))


# ------------------------------------------------------------------------------------------- the PyPI package autograd agrees

SELU_SCALE, SELU_ALPHA = 1.0507009873554805, 1.6732632423543772
OUTSIDE: dict[str, Callable[[Any], Any]] = {
    "identity": lambda z: z,
    "relu": lambda z: anp.maximum(z, 0.0),
    "leaky_relu": lambda z: anp.where(z > 0, z, 0.01 * z),
    "elu": lambda z: anp.where(z > 0, z, anp.expm1(z)),
    "selu": lambda z: SELU_SCALE * anp.where(z > 0, z, SELU_ALPHA * anp.expm1(z)),
    "gelu": lambda z: 0.5 * z * (1 + erf(z / math.sqrt(2))),
    "silu": lambda z: z / (1 + anp.exp(-z)),
    "mish": lambda z: z * anp.tanh(anp.logaddexp(0.0, z)),
    "tanh": anp.tanh,
    "sigmoid": lambda z: 1 / (1 + anp.exp(-z)),
    "softplus": lambda z: anp.logaddexp(0.0, z),
    "softsign": lambda z: z / (1 + anp.abs(z)),
    "softmax": lambda z: anp.exp(z) / anp.sum(anp.exp(z), axis=-1, keepdims=True),
}


def log_softmax(s: Any) -> Any:
    return s - anp.log(anp.sum(anp.exp(s), axis=-1, keepdims=True))


OUTSIDE_LOSSES: dict[str, Callable[[Any, Any], Any]] = {
    "mse": lambda s, t: anp.mean((s - t) ** 2),
    "cross_entropy": lambda s, t: -anp.mean(anp.sum(t * log_softmax(s), axis=-1)),
    "binary_cross_entropy": lambda s, t: anp.mean(anp.logaddexp(0.0, s) - t * s),
    "poisson": lambda s, t: anp.mean(anp.exp(s) - t * s),
}


def forward(p: Any, x: Any, names: list[str]) -> Any:
    for position, activation in enumerate(names):
        x = OUTSIDE[activation](anp.dot(x, p[f"{position}.weight"]) + p[f"{position}.bias"])
    return x


def random_network(seed: int, activation: str) -> tuple[list[int], list[str]]:
    r = np.random.default_rng(seed)
    depth = int(r.integers(1, 5))
    widths = [int(n) for n in r.integers(1, 8, depth)] + [3]
    return widths, [activation] * depth + ["identity"]


@pytest.mark.parametrize("activation", list(activations))
@pytest.mark.parametrize("seed", range(4))
def test_gradients_of_random_networks_agree_with_autograd(activation: str, seed: int) -> None:
    widths, names = random_network(seed, activation)
    r = np.random.default_rng(100 + seed)
    rows, features = int(r.integers(1, 9)), int(r.integers(1, 6))
    loss = list(OUTSIDE_LOSSES)[seed]
    x = r.normal(size=(rows, features))
    t = r.dirichlet(np.ones(3), rows)
    net = nn.Sequential(*(nn.Dense(n, name) for n, name in zip(widths, names, strict=True)))
    net.fit(x, t, loss=loss, epochs=0, dtype="float64", seed=seed)
    net.load_parameters({name: r.normal(size=value.shape) for name, value in net.parameters.items()})

    ours = net.gradients(x, t, loss=loss)
    theirs = autograd.grad(lambda p: OUTSIDE_LOSSES[loss](forward(p, x, names), t))(net.parameters)
    assert list(ours) == list(theirs)
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-9, atol=1e-12, err_msg=name)
    by_input = cr.grad(lambda x: np.sum(net(x) ** 2))(x)
    theirs_by_input = autograd.grad(lambda x: anp.sum(forward(net.parameters, x, names) ** 2))(x)
    np.testing.assert_allclose(by_input, theirs_by_input, rtol=1e-9, atol=1e-14)


def test_gradients_of_a_network_in_which_everything_fans_out() -> None:
    """A tensor read by three layers, and results that meet again: the sum over all paths."""

    class Web(nn.Module):
        def __init__(self) -> None:
            self.a, self.b, self.c = nn.Dense(4, "tanh"), nn.Dense(4, "sigmoid"), nn.Dense(2)

        def __call__(self, x: Any) -> Any:
            h = self.a(x)
            k = self.b(h) * h + np.sin(h)
            return self.c(np.concatenate([h, k, h * k], axis=1)) + np.sum(h * k, axis=1, keepdims=True)

    def theirs(p: Any) -> Any:
        h = anp.tanh(anp.dot(x, p["a.weight"]) + p["a.bias"])
        k = h / (1 + anp.exp(-(anp.dot(h, p["b.weight"]) + p["b.bias"]))) + anp.sin(h)
        z = anp.dot(anp.concatenate([h, k, h * k], axis=1), p["c.weight"]) + p["c.bias"]
        return anp.mean((z + anp.sum(h * k, axis=1, keepdims=True) - t) ** 2)

    x, t = data()
    net = Web()
    net.fit(x, t, epochs=0, dtype="float64")
    expected = autograd.grad(theirs)(net.parameters)
    for name, g in net.gradients(x, t, loss="mse").items():
        np.testing.assert_allclose(g, expected[name], rtol=1e-10, atol=1e-14)


def test_a_parameter_that_nothing_reads_gets_zeros() -> None:
    class Idle(nn.Module):
        def __call__(self, x: Any) -> Any:
            self.parameter("idle", (3,), "ones")
            return x * self.parameter("scale", (x.shape[-1],), "ones")

    x, _ = data()
    net = Idle()
    net.fit(x, x + 1, epochs=1, optimizer=cr.SGD(0.1), dtype="float64")
    assert net.parameters["idle"].tolist() == [1.0, 1.0, 1.0]
    assert net.gradients(x, x + 1)["idle"].tolist() == [0.0, 0.0, 0.0]


def test_one_step_of_gradient_descent_subtracts_the_gradients() -> None:
    x, t = data()
    net = nn.Sequential(nn.Dense(5, "tanh"), nn.Dense(2))
    net.fit(x, t, epochs=0, dtype="float64")
    before, g = net.parameters, net.gradients(x, t, loss="mse")
    net.fit(x, t, epochs=1, batch_size=len(x), optimizer=cr.SGD(0.5), dtype="float64")
    for name, value in net.parameters.items():
        np.testing.assert_allclose(value, before[name] - 0.5 * g[name], rtol=1e-12, atol=1e-15)


# -------------------------------------------------------------------------------------------------------- a user's own layers


class MyDense(nn.Module):
    def __init__(self, units: int, activation: Any = None) -> None:
        self.units, self.activation = units, activation

    def __call__(self, x: Any) -> Any:
        y = x @ self.parameter("weight", (x.shape[-1], self.units), "glorot_uniform")
        y = y + self.parameter("bias", (self.units,), "zeros")
        return y if self.activation is None else self.activation(y)


class MyDropout(nn.Module):
    def __init__(self, rate: float) -> None:
        self.rate = rate

    def __call__(self, x: Any) -> Any:
        if not self.training:
            return x
        return np.where(cr.random.bernoulli(x.shape, 1 - self.rate), x * (1 / (1 - self.rate)), 0.0)


class MyBatchNorm(nn.Module):
    def __call__(self, x: Any) -> Any:
        mean = self.statistic("mean", x.shape[-1:])
        variance = self.statistic("variance", x.shape[-1:], 1.0)
        if self.training and not self.frozen:
            n = x.shape[0]
            m, v = np.mean(x, axis=0), np.var(x, axis=0)
            self.update("mean", 0.9 * mean + 0.1 * m)
            self.update("variance", 0.9 * variance + 0.1 * (v * (n / (n - 1))))
            mean, variance = m, v
        scale = self.parameter("scale", x.shape[-1:], "ones")
        return (x - mean) / np.sqrt(variance + 1e-5) * scale + self.parameter("shift", x.shape[-1:], "zeros")


class MyEmbedding(nn.Module):
    def __init__(self, entries: int, units: int) -> None:
        self.entries, self.units = entries, units

    def __call__(self, x: Any) -> Any:
        return self.parameter("weight", (self.entries, self.units), "normal")[x]


PAIRS = {
    "Dense": (lambda: nn.Dense(4, "tanh"), lambda: MyDense(4, np.tanh)),
    "Dropout": (lambda: nn.Dropout(0.25), lambda: MyDropout(0.25)),
    "Embedding": (
        lambda: nn.Sequential(nn.Embedding(9, 2), nn.Flatten()),
        lambda: nn.Sequential(MyEmbedding(9, 2), nn.Flatten()),
    ),
}


@pytest.mark.parametrize("name", list(PAIRS))
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_users_own_layer_gives_the_bits_of_the_built_in_one(name: str, dtype: str) -> None:
    x, t = data(20)
    words = name == "Embedding"
    x = np.random.default_rng(0).integers(0, 9, (20, 3)) if words else x
    results = []
    for layer in PAIRS[name]:
        net = nn.Sequential(layer(), nn.Dense(2))
        run = net.fit(x, t, epochs=3, batch_size=8, optimizer=cr.Adam(0.01), dtype=dtype)
        results.append((run.loss, net.gradients(x, t, seed=5), net.parameters, net.predict(x)))
    (loss, gradients, parameters, y), (my_loss, my_gradients, my_parameters, my_y) = results
    assert loss == my_loss
    assert_same(gradients, my_gradients)
    assert_same(parameters, my_parameters)
    np.testing.assert_array_equal(y, my_y)


def test_a_users_own_batch_norm_behaves_as_the_built_in_one() -> None:
    x, t = data(20)
    nets = [nn.Sequential(nn.Dense(4, bias=False), norm(), nn.Dense(2)) for norm in (nn.BatchNorm, MyBatchNorm)]
    for net in nets:
        net.fit(x, t, epochs=5, batch_size=8, optimizer=cr.SGD(0.1, momentum=0.9), dtype="float64")
    for name, value in state(nets[0]).items():
        np.testing.assert_allclose(value, state(nets[1])[name], rtol=1e-9, atol=1e-12, err_msg=name)
    assert set(nets[0].statistics) == {"1.mean", "1.variance"}


def test_an_attribute_that_is_changed_between_calls_is_seen() -> None:
    class Power(nn.Module):
        def __init__(self, exponent: int) -> None:
            self.exponent = exponent

        def __call__(self, x: Any) -> Any:
            return x**self.exponent * self.parameter("scale", (x.shape[-1],), "ones")

    x, _ = data()
    net = nn.Sequential(Power(1), nn.Dropout(0.0))
    net.fit(x, x, epochs=1, optimizer=cr.SGD(0.0), dtype="float64")
    np.testing.assert_array_equal(net.predict(x), x)
    net[0].exponent = 2
    net[1].rate = 0.5
    np.testing.assert_array_equal(net.predict(x), x**2)
    assert net.evaluate(x, x)["loss"] == pytest.approx(np.mean((x**2 - x) ** 2), rel=1e-12)
    dropped = net.fit(x, x, epochs=1, optimizer=cr.SGD(0.0)).loss[0]
    assert abs(dropped / np.mean((x**2 - x) ** 2) - 1) > 0.1


def test_a_trained_part_in_a_new_network_keeps_what_it_has_learnt() -> None:
    x, t = data()
    body = nn.Sequential(nn.Dense(4, "tanh"), nn.Dense(3, "tanh"))
    body.fit(x, np.ones((12, 3)), epochs=3)
    learnt = body.parameters
    net = nn.Sequential(body, nn.Dense(2))
    body.trainable = False
    net.fit(x, t, epochs=3)
    for name, value in learnt.items():
        np.testing.assert_array_equal(net.parameters[f"0.{name}"], value)
    other = nn.Sequential(body, nn.Dense(2))
    with pytest.raises(cr.UsageError, match="float32"):  # the arrays are shared, so they cannot be of two types
        other.fit(x, t, epochs=1, dtype="float64")
    assert not other.built
    np.testing.assert_array_equal(body.parameters["0.weight"], learnt["0.weight"])


def test_a_layer_with_a_gradient_inside() -> None:
    """A network that is trained on its own slope: y' = cos x, by second derivatives."""

    class Slope(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            self.layer = layer

        def __call__(self, x: Any) -> Any:
            return cr.grad(lambda x: np.sum(self.layer(x)))(x)

    x = np.linspace(-2, 2, 32)[:, None]
    curve = nn.Sequential(nn.Dense(16, "tanh"), nn.Dense(1))
    net = Slope(curve)
    net.fit(x, np.cos(x), optimizer="lbfgs", epochs=200, dtype="float64")
    net.check_gradients(x[:4], np.cos(x[:4]))
    assert np.abs(net.predict(x) - np.cos(x)).max() < 0.01


def test_user_layer_with_a_loop_of_steps() -> None:
    class Steps(nn.Module):
        def __call__(self, x: Any) -> Any:
            w = self.parameter("w", (2, 3, 3), "glorot_uniform")
            for k in range(2):
                x = np.tanh(x @ w[k])
            return x

    x, _ = data(5, 3)
    net = Steps()
    net.fit(x, x, epochs=0, dtype="float64")
    expected = np.tanh(np.tanh(x @ net.parameters["w"][0]) @ net.parameters["w"][1])
    np.testing.assert_allclose(net.predict(x), expected, rtol=1e-12)
    net.check_gradients(x, x, loss="mse")


@pytest.mark.parametrize(
    ("init", "expected"),
    [
        ("ones", 1.0),
        (0.25, 0.25),
        (3, 3.0),
        (cr.initializers.constant(2.0), 2.0),
        (lambda generator, shape: np.full(shape, 7.0), 7.0),
    ],
)
def test_init_of_a_parameter(init: Any, expected: float) -> None:
    class Scale(nn.Module):
        def __call__(self, x: Any) -> Any:
            return x * self.parameter("scale", x.shape[-1], init)

    net = Scale()
    net.fit(np.ones((2, 3)), np.ones((2, 3)), epochs=0)
    assert net.parameters["scale"].tolist() == [expected] * 3


def test_statistics_of_a_users_layer_move_in_training_only() -> None:
    class Count(nn.Module):
        def __call__(self, x: Any) -> Any:
            self.update("seen", self.statistic("seen", ()) + np.sum(x[:, 0]))
            return x * self.parameter("scale", (x.shape[-1],), "ones")

    x = np.ones((7, 2))
    net = Count()
    net.fit(x, x, epochs=2, batch_size=3)
    assert net.statistics["seen"].tolist() == 14.0
    net.predict(x)
    net.evaluate(x, x)
    net.gradients(x, x)
    assert net.statistics["seen"].tolist() == 14.0
    net.trainable = False
    net.fit(x, x, epochs=1)
    assert net.statistics["seen"].tolist() == 14.0
    holder = nn.Sequential(nn.Sequential(Count()), nn.Dense(2))
    holder[0].trainable = False
    holder.fit(x, x, epochs=1)
    assert holder.statistics["0.0.seen"].tolist() == 0.0


# ------------------------------------------------------------------------------------------------------------ several inputs


class Join(nn.Module):
    """Two branches that are joined."""

    def __init__(self) -> None:
        self.left, self.right, self.head = nn.Dense(3, "tanh"), nn.Dense(2, "tanh"), nn.Dense(1)

    def __call__(self, a: Any, b: Any) -> Any:
        return self.head(np.concatenate([self.left(a), self.right(b)], axis=1))


def joined(p: dict[str, Array], a: Array, b: Array) -> Array:
    left = np.tanh(a @ p["left.weight"] + p["left.bias"])
    right = np.tanh(b @ p["right.weight"] + p["right.bias"])
    return np.hstack([left, right]) @ p["head.weight"] + p["head.bias"]


@pytest.mark.parametrize("named", [False, True], ids=["tuple", "dict"])
def test_two_branches(named: bool) -> None:
    (a, t), (b, _) = data(10, 4, 1), data(10, 2, seed=1)
    x: Any = {"b": b, "a": a} if named else (a, b)
    net = Join()
    run = net.fit(x, t, epochs=3, batch_size=4, validation=0.2, dtype="float64")
    assert len(run.validation_loss) == 3
    np.testing.assert_allclose(net.predict(x), joined(net.parameters, a, b), rtol=1e-12)
    np.testing.assert_allclose(net(**x) if named else net(*x), net.predict(x), rtol=1e-12)
    assert net.evaluate(x, t)["loss"] == pytest.approx(np.mean((joined(net.parameters, a, b) - t) ** 2), rel=1e-12)
    net.check_gradients(x, t)
    names, values = list(net.parameters), list(net.parameters.values())
    for at, (name, g) in enumerate(net.gradients(x, t).items()):
        assert names[at] == name
        assert_gradient(lambda *v: float(np.mean((joined(dict(zip(names, v, strict=True)), a, b) - t) ** 2)), values, at, g)


def test_named_and_positional_inputs_learn_alike() -> None:
    (a, t), (b, _) = data(10, 4, 1), data(10, 2, seed=1)
    nets = []
    for x in ((a, b), {"a": a, "b": b}, {"b": b, "a": a}):
        nets.append(Join())
        nets[-1].fit(x, t, epochs=2, batch_size=4)
    for net in nets[1:]:
        assert_same(net.parameters, nets[0].parameters)


def test_a_table_beside_a_sequence_of_words() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            self.words, self.table, self.head = nn.Embedding(11, 4), nn.Dense(4), nn.Dense(1)

        def __call__(self, table: Any, words: Any) -> Any:
            return self.head(np.tanh(self.table(table) + np.mean(self.words(words), axis=1)))

    r = np.random.default_rng(0)
    x = {"table": r.normal(size=(12, 3)), "words": r.integers(0, 11, (12, 5))}
    t = r.normal(size=(12, 1))
    net = Both()
    net.fit(x, t, epochs=2, dtype="float64")
    p = net.parameters
    h = np.tanh(x["table"] @ p["table.weight"] + p["table.bias"] + p["words.weight"][x["words"]].mean(axis=1))
    np.testing.assert_allclose(net.predict(x), h @ p["head.weight"] + p["head.bias"], rtol=1e-12)
    net.check_gradients(x, t)


def test_one_input_in_a_tuple_and_nested_calls() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            self.join = Join()

        def __call__(self, a: Any) -> Any:
            return self.join(a, b=a[:, :2] ** 2)

    x, t = data(6, 4, 1)
    net = Outer()
    net.fit(x, t, epochs=1, dtype="float64")
    expected = joined({n.removeprefix("join."): v for n, v in net.parameters.items()}, x, x[:, :2] ** 2)
    np.testing.assert_allclose(net.predict(x), expected, rtol=1e-12)


# ------------------------------------------------------------------------------------------------------------- shared layers


class Twins(nn.Module):
    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        self.first, self.second = first, second

    def __call__(self, a: Any, b: Any) -> Any:
        return self.first(a) - self.second(b)


def test_a_shared_layer_keeps_its_first_name_and_its_gradient_is_the_sum() -> None:
    (a, t), (b, _) = data(6, 3, 4), data(6, 3, seed=1)
    layer = nn.Dense(4, "tanh")
    shared, apart = Twins(layer, layer), Twins(nn.Dense(4, "tanh"), nn.Dense(4, "tanh"))
    for net in (shared, apart):
        net.fit((a, b), t, epochs=0, dtype="float64")
    assert list(shared.parameters) == ["first.weight", "first.bias"]
    assert list(apart.parameters) == ["first.weight", "first.bias", "second.weight", "second.bias"]
    w = shared.parameters
    apart.load_parameters({**w, "second.weight": w["first.weight"], "second.bias": w["first.bias"]})
    np.testing.assert_array_equal(shared.predict((a, b)), apart.predict((a, b)))
    one, two = shared.gradients((a, b), t, loss="mse"), apart.gradients((a, b), t, loss="mse")
    for name in ("weight", "bias"):
        assert np.any(two[f"first.{name}"])
        assert np.any(two[f"second.{name}"])
        np.testing.assert_allclose(one[f"first.{name}"], two[f"first.{name}"] + two[f"second.{name}"], rtol=1e-12, atol=1e-15)
    shared.check_gradients((a, b), t, loss="mse")


def test_a_layer_twice_in_a_row() -> None:
    layer = nn.Dense(3, "tanh")
    net = nn.Sequential(layer, layer, nn.Dense(1))
    x, t = data(5, 3, 1)
    net.fit(x, t, epochs=0, dtype="float64")
    assert list(net.parameters) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    w, b = net.parameters["0.weight"], net.parameters["0.bias"]
    h = np.tanh(np.tanh(x @ w + b) @ w + b)
    np.testing.assert_allclose(net.predict(x), h @ net.parameters["2.weight"] + net.parameters["2.bias"], rtol=1e-12)
    net.check_gradients(x, t, loss="mse")
    assert re.search(r"^16 parameters", net.summary(), re.MULTILINE)


def test_tied_weights_move_once_a_step() -> None:
    layer = nn.Dense(3, bias=False)
    net = Twins(layer, layer)
    (a, t), (b, _) = data(6, 3, 3), data(6, 3, seed=1)
    net.fit((a, b), t, epochs=0, dtype="float64")
    w, g = net.parameters["first.weight"], net.gradients((a, b), t, loss="mse")["first.weight"]
    net.fit((a, b), t, epochs=1, batch_size=6, optimizer=cr.SGD(0.1), dtype="float64")
    np.testing.assert_allclose(net.parameters["first.weight"], w - 0.1 * g, rtol=1e-12, atol=1e-15)


# ------------------------------------------------------------------------------------------------------------- frozen layers

HARSH = cr.SGD(0.1, momentum=0.9, l1=0.01, l2=0.01, weight_decay=0.01)


@pytest.mark.parametrize("optimizer", [HARSH, cr.AdamW(0.1, weight_decay=0.1)], ids=["sgd", "adamw"])
def test_a_frozen_layer_stays_as_it_is(optimizer: cr.Optimizer) -> None:
    x, t = data(12)
    net = nn.Sequential(nn.Dense(4, "tanh"), nn.BatchNorm(), nn.Dense(2))
    net.fit(x, t, epochs=1, dtype="float64")
    net[0].trainable = net[1].trainable = False
    before = state(net)
    net.fit(x, t, epochs=3, batch_size=5, optimizer=optimizer, dtype="float64")
    after = state(net)
    for name, value in after.items():
        assert np.array_equal(value, before[name]) == (not name.startswith("2.")), name
    assert list(net.gradients(x, t)) == ["2.weight", "2.bias"]
    assert {c.name.split()[0] for c in net.check_gradients(x, t).comparisons} == {"2.weight", "2.bias"}
    assert list(net.parameters) == ["0.weight", "0.bias", "1.scale", "1.shift", "2.weight", "2.bias"]


def test_lbfgs_leaves_a_frozen_layer_alone() -> None:
    x, t = data(12)
    net = nn.Sequential(nn.Dense(4, "tanh"), nn.Dense(2))
    net.fit(x, t, epochs=0, dtype="float64")
    net[0].trainable = False
    before = net.parameters
    net.fit(x, t, epochs=5, optimizer="lbfgs")
    for name, value in net.parameters.items():
        assert np.array_equal(value, before[name]) == name.startswith("0."), name


@pytest.mark.parametrize("wrap", [lambda norm: norm, nn.Sequential], ids=["itself", "what holds it"])
def test_a_frozen_batch_norm_uses_its_running_statistics_in_training(wrap: Callable[[Any], nn.Module]) -> None:
    x, t = data(12)
    net = nn.Sequential(wrap(nn.BatchNorm()), nn.Dense(2))
    net.fit(x, t, epochs=3, dtype="float64")
    training, evaluation = (net.gradients(x, t, training=mode)["1.weight"] for mode in (True, False))
    assert not np.allclose(training, evaluation)
    net[0].trainable = False
    np.testing.assert_allclose(net.gradients(x, t, training=True)["1.weight"], evaluation, rtol=1e-12)
    before = net.statistics
    net.fit(x, t, epochs=1)
    assert_same(net.statistics, before)


def test_freezing_a_whole_branch_and_thawing_it() -> None:
    x, t = data(12)
    body = nn.Sequential(nn.Dense(4, "tanh"), nn.Residual(nn.Dense(4)))
    net = nn.Sequential(body, nn.Dense(2))
    body.trainable = False
    net.fit(x, t, epochs=0)
    first = net.parameters
    net.fit(x, t, epochs=1)
    for name in ("0.0.weight", "0.1.layer.weight", "0.1.layer.bias"):
        np.testing.assert_array_equal(net.parameters[name], first[name])
    assert "50 parameters, 40 of them frozen" in net.summary()
    body.trainable = True
    net.fit(x, t, epochs=1)
    for name in first:
        assert not np.array_equal(net.parameters[name], first[name])


def test_gradients_flow_through_a_frozen_layer() -> None:
    x, t = data(12)
    nets = [nn.Sequential(nn.Dense(4, "tanh"), nn.Dense(3, "tanh"), nn.Dense(2)) for _ in range(2)]
    for net in nets:
        net.fit(x, t, epochs=0, dtype="float64")
    nets[1][1].trainable = False
    free, frozen = (net.gradients(x, t, loss="mse") for net in nets)
    assert list(frozen) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    for name, g in frozen.items():
        np.testing.assert_array_equal(g, free[name])


def test_a_class_may_be_frozen_from_the_start() -> None:
    class Projection(nn.Module):
        trainable = False

        def __call__(self, x: Any) -> Any:
            return x @ self.parameter("weight", (x.shape[-1], 3), "orthogonal")

    x, t = data(8, 5)
    net = nn.Sequential(Projection(), nn.Dense(2))
    net.fit(x, t, epochs=0)
    first = net.parameters["0.weight"]
    net.fit(x, t, epochs=2)
    np.testing.assert_array_equal(net.parameters["0.weight"], first)


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
    assert all(
        w.shape == (net.parameters[f"{d}.bias"].shape or (0,)) or w.ndim == 2
        for d in dense
        for w in [net.parameters[f"{d}.weight"]]
    )
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


def rich() -> nn.Sequential:
    return nn.Sequential(nn.Dense(5, "tanh"), nn.BatchNorm(), nn.Dropout(0.2), nn.Residual(MyDense(5)), nn.Dense(2))


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


# ------------------------------------------------------------------------------------------- summary, probabilities, evaluation


def test_summary() -> None:
    x, t = data(6, 4, 2)
    net = nn.Sequential(nn.Dense(3, "relu"), nn.BatchNorm(), nn.Dense(2))
    net[0].trainable = False
    assert "Dense(3, 'relu', trainable=False)" in net.summary()
    net.fit(x, t, epochs=0)
    lines = net.summary().splitlines()
    rows = {line.split()[0]: line for line in lines[1:4]}
    assert re.search(r"Dense\(3, 'relu', trainable=False\).*\b15\b.*weight \(4, 3\), bias \(3,\)", rows["0"])
    assert re.search(r"BatchNorm\(\).*\b6\b", rows["1"])
    assert re.search(r"Dense\(2\).*\b8\b.*weight \(3, 2\), bias \(2,\)", rows["2"])
    assert re.search(r"29 parameters, 15 of them frozen", lines[-1])


def test_repr_can_be_read_back() -> None:
    net = nn.Sequential(nn.Dense(3, "relu"), nn.Dropout(0.5), nn.Residual(nn.Dense(3)), nn.Reshape(1, 3))
    text = repr(net)
    again = eval(text, vars(nn).copy())
    assert repr(again) == text == "Sequential(Dense(3, 'relu'), Dropout(0.5), Residual(Dense(3)), Reshape(1, 3))"


def test_probabilities_of_classes() -> None:
    x, _ = data()
    labels = np.arange(12) % 3
    net = nn.Dense(3)
    net.fit(x, labels, loss="cross_entropy", epochs=2, dtype="float64")
    e = np.exp(net.predict(x))
    np.testing.assert_allclose(net.predict_proba(x), e / e.sum(axis=1, keepdims=True), rtol=1e-12)


def test_probabilities_of_yes_and_no() -> None:
    x, _ = data()
    net = nn.Dense(1)
    net.fit(x, np.arange(12) % 2, loss="binary_cross_entropy", epochs=2, dtype="float64")
    p = 1 / (1 + np.exp(-net.predict(x)))
    np.testing.assert_allclose(net.predict_proba(x), np.hstack([1 - p, p]), rtol=1e-12)


def test_probabilities_of_several_labels() -> None:
    x, _ = data()
    net = nn.Dense(3)
    net.fit(x, np.eye(3)[np.arange(12) % 3], loss="binary_cross_entropy", epochs=2, dtype="float64")
    np.testing.assert_allclose(net.predict_proba(x), 1 / (1 + np.exp(-net.predict(x))), rtol=1e-12)


@pytest.mark.parametrize(
    "loss", ["mse", "hinge", "poisson", lambda s, t: (s - t) ** 2], ids=["mse", "hinge", "poisson", "function"]
)
def test_no_probabilities_without_a_classifier(loss: Any) -> None:
    x, _ = data()
    net = nn.Dense(1)
    net.fit(x, np.ones(12), loss=loss, epochs=1)
    with pytest.raises(cr.UsageError, match=r"probabilities.*cross_entropy"):
        net.predict_proba(x)


def test_before_the_first_use() -> None:
    x, t = data()
    net = nn.Sequential(nn.Dense(3), nn.Dropout(0.1))
    for call in (net.predict, net, lambda x: net.evaluate(x, t)):
        with pytest.raises(cr.NotBuiltError, match="fit"):
            call(x)
    with pytest.raises(cr.UsageError, match="train"):
        net.predict_proba(x)


def test_evaluate() -> None:
    x, t = data()
    net = nn.Sequential(nn.Dense(4, "tanh"), nn.BatchNorm(), nn.Dropout(0.5), nn.Dense(2))
    net.fit(x, t, epochs=2, dtype="float64")
    y = net.predict(x)
    scores = net.evaluate(x, t, metrics=("rmse", "mae", "r2"))
    assert list(scores) == ["loss", "rmse", "mae", "r2"]
    assert all(type(value) is float for value in scores.values())
    assert scores["loss"] == pytest.approx(np.mean((y - t) ** 2), rel=1e-12)
    assert scores["rmse"] == pytest.approx(math.sqrt(np.mean((y - t) ** 2)), rel=1e-12)
    assert scores["mae"] == pytest.approx(np.mean(np.abs(y - t)), rel=1e-12)
    assert scores["r2"] == pytest.approx(
        np.mean(1 - ((y - t) ** 2).sum(axis=0) / ((t - t.mean(axis=0)) ** 2).sum(axis=0)), rel=1e-12
    )
    assert net.evaluate(x, t, loss="mae")["loss"] == pytest.approx(np.mean(np.abs(y - t)), rel=1e-12)
    w = np.arange(12.0)
    weighted = net.evaluate(x, t, sample_weight=w, metrics=("mae",))
    assert weighted["loss"] == pytest.approx(np.sum(w[:, None] * (y - t) ** 2) / (2 * w.sum()), rel=1e-12)
    assert weighted["mae"] == pytest.approx(np.sum(w[:, None] * np.abs(y - t)) / (2 * w.sum()), rel=1e-12)


def test_evaluate_of_a_classifier() -> None:
    x, _ = data()
    labels = np.arange(12) % 3
    net = nn.Dense(3)
    net.fit(x, labels, loss="cross_entropy", epochs=2, dtype="float64")
    p = net.predict_proba(x)
    scores = net.evaluate(
        x, labels, metrics=("accuracy", "log_loss", lambda prediction, target: float(np.sum(prediction != target)))
    )
    assert scores["loss"] == pytest.approx(-np.mean(np.log(p[np.arange(12), labels])), rel=1e-12)
    assert scores["accuracy"] == np.mean(p.argmax(axis=1) == labels)
    assert list(scores.values())[-1] == np.sum(p.argmax(axis=1) != labels)


# ---------------------------------------------------------------------------------------------------------------- gradients


def test_gradients_build_the_network_as_fit_does() -> None:
    x, t = data()
    net, built = (nn.Sequential(nn.Dense(3, "tanh"), nn.Dense(2)) for _ in range(2))
    g = net.gradients(x, t, loss="mse")
    built.fit(x, t, epochs=0)
    assert_same(net.parameters, built.parameters)
    assert_same(g, built.gradients(x, t, loss="mse"))


def test_gradients_in_another_precision() -> None:
    x, t = data()
    net = nn.Sequential(nn.Dense(3, "tanh"), nn.Dense(2))
    net.fit(x, t, epochs=1)
    single, double = net.gradients(x, t), net.gradients(x, t, dtype="float64")
    twin = nn.Sequential(nn.Dense(3, "tanh"), nn.Dense(2))
    twin.fit(x, t, epochs=0, dtype="float64")
    twin.load_parameters(net.parameters)
    for name in single:
        assert (single[name].dtype, double[name].dtype) == (np.float32, np.float64)
        np.testing.assert_allclose(double[name], twin.gradients(x, t, loss="mse")[name], rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(single[name], double[name], rtol=1e-4, atol=1e-6)
    assert net.parameters["0.weight"].dtype == np.float32


def test_gradients_with_the_dropout_of_a_seed() -> None:
    x, t = data()
    net = nn.Sequential(nn.Dense(8), nn.Dropout(0.5), nn.Dense(2))
    net.fit(x, t, epochs=1)
    assert_same(net.gradients(x, t, seed=1), net.gradients(x, t, seed=1))
    assert not np.array_equal(net.gradients(x, t, seed=1)["0.weight"], net.gradients(x, t, seed=2)["0.weight"])
    off = net.gradients(x, t, training=False, seed=1)
    assert_same(off, net.gradients(x, t, training=False, seed=2))
    assert not np.array_equal(net.gradients(x, t, seed=1)["0.weight"], off["0.weight"])


def test_gradients_do_not_change_what_training_does_next() -> None:
    x, t = data(20)
    watched, plain = rich(), rich()
    for net in (watched, plain):
        net.fit(x, t, epochs=2, optimizer=cr.Adam(0.01))
    watched.gradients(x, t, loss="mae", seed=7, dtype="float64")
    watched.check_gradients(x[:3], t[:3], loss="mae")
    watched.predict(x)
    watched.evaluate(x, t, loss="mae")
    for net in (watched, plain):
        net.fit(x, t, epochs=2)
    assert_same(state(watched), state(plain))


def test_check_gradients_catches_a_wrong_derivative() -> None:
    """A layer whose derivative is wrong by a factor 1.001 is reported, with its parameter's name."""

    @cr.custom_gradient
    def wrong(x: Any) -> Any:
        return np.tanh(x), lambda g: 1.001 * g * (1 - np.tanh(x) ** 2)

    x, t = data()
    net = nn.Sequential(nn.Dense(3, wrong), nn.Dense(2))
    with pytest.raises(cr.GradientMismatch, match=r"0\.weight"):
        net.check_gradients(x, t, loss="mse")
    right = nn.Sequential(nn.Dense(3, np.tanh), nn.Dense(2))
    assert right.check_gradients(x, t, loss="mse").ok


def test_a_network_within_a_function_is_differentiated() -> None:
    x, t = data()
    net = nn.Sequential(nn.Dense(3, "tanh"), nn.Dropout(0.5), nn.Dense(2))
    net.fit(x, t, epochs=1, dtype="float64")
    np.testing.assert_array_equal(net(x), net.predict(x))
    p = net.parameters
    h = np.tanh(x @ p["0.weight"] + p["0.bias"])
    jacobian = cr.jacobian(net)(x[0:1])
    expected = ((1 - h[0] ** 2) * p["0.weight"]) @ p["2.weight"]
    np.testing.assert_allclose(np.squeeze(jacobian), expected.T, rtol=1e-12)


# ------------------------------------------------------------------------------------------------------- wrong layers of a user


def network(call: Callable[[Any, Any], Any]) -> nn.Module:
    return type("Mine", (nn.Module,), {"__call__": call})()


def twice(self: Any, x: Any) -> Any:
    return x @ self.parameter("w", (x.shape[-1], 2)) + self.parameter("w", (x.shape[-1], 3))[:, :1]


def no_match(self: Any, x: Any) -> Any:
    return x @ self.parameter("w", (x.shape[-1] + 1, 2))


def branch(self: Any, x: Any) -> Any:
    if np.sum(x) > 0:
        return x
    return -x


def convert(self: Any, x: Any) -> Any:
    return x * float(np.sum(x))


def assign(self: Any, x: Any) -> Any:
    x[0] = 0.0
    return x


def numpy_random(self: Any, x: Any) -> Any:
    return x + np.random.normal(size=x.shape)


def unknown_statistic(self: Any, x: Any) -> Any:
    self.update("meen", np.mean(x, axis=0))
    return x


def statistic_shape(self: Any, x: Any) -> Any:
    self.statistic("mean", x.shape[-1:])
    self.update("mean", np.mean(x))
    return x


def odd_name(self: Any, x: Any) -> Any:
    return x * self.parameter("my scale", (x.shape[-1],))


def dotted_name(self: Any, x: Any) -> Any:
    return x * self.parameter("a.b", (x.shape[-1],))


def unknown_init(self: Any, x: Any) -> Any:
    return x @ self.parameter("w", (x.shape[-1], 2), "glorot")


def init_shape(self: Any, x: Any) -> Any:
    return x @ self.parameter("w", (x.shape[-1], 2), lambda generator, shape: np.ones(3))


def nothing(self: Any, x: Any) -> Any:
    np.tanh(x)


def loses_rows(self: Any, x: Any) -> Any:
    return np.sum(x * self.parameter("w", (x.shape[-1],), "ones"), axis=0)


WRONG = [
    (twice, cr.ShapeError, r'\bw".*\(4, 2\).*\(4, 3\)'),
    (no_match, cr.ShapeError, r"\(\w+, 4\).*\(5, 2\)"),
    (branch, cr.TraceError, r"np\.where|scan"),
    (convert, cr.TraceError, r"float"),
    (assign, cr.TraceError, r"np\.where|assign"),
    (numpy_random, cr.TraceError, r"cr\.random"),
    (unknown_statistic, cr.ChainruleError, r"meen"),
    (statistic_shape, cr.ShapeError, r'"?mean"?.*\(\).*\(4,\)|"?mean"?.*\(4,\).*\(\)'),
    (odd_name, cr.UsageError, r"my scale"),
    (dotted_name, cr.UsageError, r"a\.b"),
    (unknown_init, cr.UnknownNameError, r'"glorot".*Did you mean "glorot_'),
    (init_shape, cr.ShapeError, r"\(3,\).*\(4, 2\)|\(4, 2\).*\(3,\)"),
    (nothing, cr.ChainruleError, r"None"),
    (loses_rows, cr.ShapeError, r"row"),
]


@pytest.mark.parametrize(("call", "error", "said"), WRONG, ids=[w[0].__name__ for w in WRONG])
def test_a_users_mistake_is_named_with_its_line(call: Callable[..., Any], error: type[Exception], said: str) -> None:
    x, _ = data(6, 4)
    net = nn.Sequential(network(call))
    with pytest.raises(error, match=said) as caught:
        net.fit(x, x)
    first = call.__code__.co_firstlineno
    lines = [int(n) for n in re.findall(r"test_networks\.py:(\d+)", str(caught.value))]
    if call not in (nothing, loses_rows, numpy_random):  # seen in what they return or leave behind, at no line
        assert any(first < line <= first + 4 for line in lines), str(caught.value)
    assert not net.built
    assert net.parameters == {}


def test_an_error_of_the_users_own_stays_what_it_is() -> None:
    def broken(self: Any, x: Any) -> Any:
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        network(broken).fit(*data())


def test_a_module_without_a_call() -> None:
    with pytest.raises((NotImplementedError, cr.UsageError, TypeError), match="__call__"):
        nn.Module().fit(*data())
