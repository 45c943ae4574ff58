"""Networks: gradients against another library, several inputs, shared and frozen layers, gradients as they are asked for."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import autograd
import autograd.numpy as anp
import numpy as np
import pytest
from autograd.scipy.special import erf
from differences import assert_gradient
from networks import data, rich
from same import assert_same, state

import chainrule as cr
from chainrule import nn
from chainrule.ops.activations import activations

Array = np.ndarray

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
