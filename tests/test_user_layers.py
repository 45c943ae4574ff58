"""Layers written by a user: they compute what the built-in ones do, and a mistake in one is named with its line."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from networks import MyDense, data
from same import assert_same, state

import chainrule as cr
from chainrule import nn

# -------------------------------------------------------------------------------------------------------- a user's own layers


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
    lines = [int(n) for n in re.findall(r"test_user_layers\.py:(\d+)", str(caught.value))]
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
    with pytest.raises(cr.UsageError, match="__call__"):
        nn.Module().fit(*data())
