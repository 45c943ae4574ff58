"""Layers against their equations written in NumPy, their first and second derivatives, and what training changes in them."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import convolution_oracle
import numpy as np
import pytest
import recurrent_oracle
from differences import assert_gradient

import chainrule as cr
from chainrule import nn

Array = np.ndarray
Named = Mapping[str, Array]

CASES = [(name, example) for name, layer in nn.layers.items() for example in layer.examples]
IDS = [f"{name}-{number}" for number, (name, _) in enumerate(CASES)]
FLOATS = [(case, name) for case, name in zip(CASES, IDS, strict=True) if "below" not in case[1]]
FLOAT_CASES, FLOAT_IDS = [case for case, _ in FLOATS], [name for _, name in FLOATS]


# ------------------------------------------------------------------------------------------- the equations, one for each layer

erf = np.vectorize(math.erf, otypes=[float])
SELU_SCALE, SELU_ALPHA = 1.0507009873554805, 1.6732632423543772

ACTIVATIONS: dict[Any, Callable[[Array], Array]] = {
    None: lambda z: z,
    "identity": lambda z: z,
    "relu": lambda z: np.maximum(z, 0),
    "leaky_relu": lambda z: np.where(z > 0, z, 0.01 * z),
    "elu": lambda z: np.where(z > 0, z, np.exp(np.minimum(z, 0)) - 1),
    "selu": lambda z: SELU_SCALE * np.where(z > 0, z, SELU_ALPHA * (np.exp(np.minimum(z, 0)) - 1)),
    "gelu": lambda z: z * (1 + erf(z / math.sqrt(2))) / 2,
    "silu": lambda z: z / (1 + np.exp(-z)),
    "mish": lambda z: z * np.tanh(np.log(1 + np.exp(z))),
    "tanh": lambda z: (np.exp(2 * z) - 1) / (np.exp(2 * z) + 1),
    "sigmoid": lambda z: 1 / (1 + np.exp(-z)),
    "softplus": lambda z: np.log(1 + np.exp(z)),
    "softsign": lambda z: z / (1 + np.abs(z)),
    "softmax": lambda z: np.exp(z) / np.exp(z).sum(axis=-1, keepdims=True),
}


def inner(p: Named, prefix: str) -> dict[str, Array]:
    """The parameters whose names begin with `prefix.`, without it."""
    return {name.removeprefix(f"{prefix}."): value for name, value in p.items() if name.startswith(f"{prefix}.")}


def dense(
    x: Array, p: Named, s: Named, training: bool, units: int, act: Any = None, init: Any = None, bias: bool = True
) -> Array:
    assert p["weight"].shape == (x.shape[-1], units)
    assert ("bias" in p) == bias
    z = np.sum(x[..., :, None] * p["weight"], axis=-2)
    return ACTIVATIONS[act](z + p["bias"] if bias else z)


def batch_norm(x: Array, p: Named, s: Named, training: bool, momentum: float = 0.1, eps: float = 1e-5) -> Array:
    rows = x.reshape(-1, x.shape[-1])
    mean, variance = (rows.mean(axis=0), rows.var(axis=0)) if training else (s["mean"], s["variance"])
    return (x - mean) / np.sqrt(variance + eps) * p["scale"] + p["shift"]


def layer_norm(x: Array, p: Named, s: Named, training: bool, eps: float = 1e-5) -> Array:
    y = np.empty_like(x)
    for place in np.ndindex(*x.shape[:-1]):
        row = x[place]
        y[place] = (row - row.sum() / len(row)) / math.sqrt(((row - row.sum() / len(row)) ** 2).sum() / len(row) + eps)
    return y * p["scale"] + p["shift"]


def reshape(x: Array, p: Named, s: Named, training: bool, *shape: Any) -> Array:
    return x.reshape(len(x), *(shape[0] if isinstance(shape[0], tuple) else shape))


def rescale(x: Array, p: Named, s: Named, training: bool, scale: float = 1 / 255, mean: Any = 0, std: Any = 1) -> Array:
    return (x * scale - np.array(mean)) / np.array(std)


def equation_of(layer: nn.Module, x: Array, p: Named, s: Named, training: bool) -> Array:
    """The output of a Dense layer within another one; its options are read from how it prints itself."""
    found = re.fullmatch(r"Dense\((\d+)(?:, '(\w+)')?\)", repr(layer))
    assert found, f"write the equation of {layer!r} here"
    return dense(x, p, s, training, int(found[1]), found[2])


def residual(x: Array, p: Named, s: Named, training: bool, layer: nn.Module, projection: nn.Module | None = None) -> Array:
    way = x if projection is None else equation_of(projection, x, inner(p, "projection"), {}, training)
    return way + equation_of(layer, x, inner(p, "layer"), {}, training)


def sequential(x: Array, p: Named, s: Named, training: bool, *layers: nn.Module) -> Array:
    for position, layer in enumerate(layers):
        x = equation_of(layer, x, inner(p, str(position)), {}, training)
    return x


def embedding(x: Array, p: Named, s: Named, training: bool, entries: int, units: int) -> Array:
    assert p["weight"].shape == (entries, units)
    return np.array([p["weight"][i] for i in x.ravel()]).reshape(*x.shape, units)


def recurrent(kind: str) -> Callable[..., Array]:
    """RNN takes its activation as second argument, the others whether all outputs are asked for."""

    def equation(x: Array, p: Named, s: Named, training: bool, units: int, second: Any = None) -> Array:
        if kind == "RNN":
            return np.asarray(recurrent_oracle.layer("RNN", p, x, units, activation=second or "tanh"))
        return np.asarray(recurrent_oracle.layer(kind, p, x, units, bool(second)))

    return equation


def around(x: Array, p: Named, s: Named, training: bool, layer: nn.Module) -> Array:
    """A layer around a recurrent one, which says by how it prints itself what it is."""
    found = re.fullmatch(r"(\w+)\((\d+)(, True)?\)", repr(layer))
    assert found, f"write the equation of {layer!r} here"
    kind, units, sequences = found[1], int(found[2]), bool(found[3])
    if p and "forward.bias" in p:
        return np.asarray(recurrent_oracle.layer(kind, p, x, units, sequences, both=True))
    if "cell.bias" in p:
        return np.asarray(recurrent_oracle.layer(kind, inner(p, "cell"), x, units))
    flat = np.reshape(x, (-1, *x.shape[2:]))
    y = np.asarray(recurrent_oracle.layer(kind, inner(p, "layer"), flat, units, sequences))
    return np.reshape(y, (*x.shape[:2], *y.shape[1:]))


def convolution(equation: Callable[..., Any]) -> Callable[..., Array]:
    def of(
        x: Array, p: Named, s: Named, training: bool, filters: int, kernel: Any, stride: Any = 1, padding: Any = "valid",
        act: Any = None, dilation: Any = 1, groups: int = 1, init: Any = None, bias: bool = True,
    ) -> Array:  # fmt: skip
        assert p["weight"].shape == (*np.broadcast_to(kernel, x.ndim - 2), x.shape[-1] // groups, filters)
        assert ("bias" in p) == bias
        return np.asarray(equation(x, p["weight"], p.get("bias"), stride, padding, act, dilation, groups))

    return of


def pooling(equation: Callable[..., Any]) -> Callable[..., Array]:
    return lambda x, p, s, training, *args: np.asarray(equation(x, *args))


# Dropout and Augment are random in training: their equations there have tests of their own.
RANDOM = ("Dropout", "Dropout2D", "Augment")
EQUATIONS: dict[str, Callable[..., Array]] = {
    "Dense": dense,
    "Activation": lambda x, p, s, training, name: ACTIVATIONS[name](x),
    "Dropout": lambda x, p, s, training, rate: x,
    "BatchNorm": batch_norm,
    "LayerNorm": layer_norm,
    "Flatten": lambda x, p, s, training: x.reshape(len(x), -1),
    "Reshape": reshape,
    "Rescale": rescale,
    "Augment": lambda x, p, s, training, *amounts: x,
    "Embedding": embedding,
    "Residual": residual,
    "Conv1D": convolution(convolution_oracle.conv1d),
    "Conv2D": convolution(convolution_oracle.convolution),
    "MaxPool1D": pooling(convolution_oracle.max_pool1d),
    "MaxPool2D": pooling(convolution_oracle.max_pool),
    "AvgPool1D": pooling(convolution_oracle.avg_pool1d),
    "AvgPool2D": pooling(convolution_oracle.avg_pool),
    "GlobalAvgPool": lambda x, p, s, training: x.reshape(len(x), -1, x.shape[-1]).mean(axis=1),
    "Dropout2D": lambda x, p, s, training, rate: x,
    "Sequential": sequential,
    **{kind: recurrent(kind) for kind in ("RNN", "LSTM", "GRU")},
    **dict.fromkeys(("Recurrent", "Bidirectional", "TimeDistributed"), around),
}


# ------------------------------------------------------------------------------------------------------------------ tools


class Gain(nn.Module):
    """layer(x) · gain. The gradient by the gain under the loss Σ t y / n shows the layer's output in training too."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def __call__(self, x: Any) -> Any:
        y = self.layer(x)
        return y * self.parameter("gain", y.shape[1:], "ones")


class Slope(nn.Module):
    """∂/∂x Σ sin(layer(x)): the gradients of this network are second derivatives of the layer."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def __call__(self, x: Any) -> Any:
        return cr.grad(lambda x: np.sum(np.sin(self.layer(x))))(x)


def product(scores: Any, target: Any) -> Any:
    """A loss that is linear in the scores."""
    return scores * target


def output(layer: nn.Module, x: Array, training: bool = True, seed: int = 0) -> Array:
    """The output of a built `Gain` network's layer, row by row, by the gradient of its gain."""
    rows = []
    shape = layer.predict(x).shape
    for row in range(len(x)):
        target = np.zeros(shape)
        target[row] = 1.0
        gradient = layer.gradients(x, target, loss=product, training=training, seed=seed)["gain"]
        rows.append(gradient * target.size)  # the objective is the mean over all elements
    return np.array(rows)


def inputs(example: Mapping[str, Any], seed: int = 0) -> Array:
    """Random inputs as a layer's example describes them; away from the kinks of activations."""
    r = np.random.default_rng(seed)
    if "below" in example:
        return r.integers(0, example["below"], example["input"])
    return r.uniform(0.2, 1.5, example["input"]) * r.choice([-1.0, 1.0], example["input"])


def make(name: str, example: Mapping[str, Any]) -> nn.Module:
    return nn.layers[name](*copy.deepcopy(example["args"]))


def build(net: nn.Module, x: Any, outputs: tuple[int, ...] | None = None, dtype: str = "float64", seed: int = 1) -> nn.Module:
    """Build by `fit(epochs=0)`, then give parameters and statistics random values: defaults such as 0 and 1 hide errors."""
    rows = len(next(iter(x.values())) if isinstance(x, dict) else x[0] if isinstance(x, tuple) else x)
    net.fit(x, np.zeros((rows, *(outputs or (1,)))), loss=lambda s, t: np.mean(s), epochs=0, dtype=dtype)
    r = np.random.default_rng(seed)
    values = {name: r.normal(size=value.shape) for name, value in net.parameters.items()}
    values |= {name: r.uniform(0.5, 2.0, value.shape) for name, value in net.statistics.items()}
    net.load_parameters(values)
    return net


def declared(name: str, example: Mapping[str, Any], net: nn.Module, x: Array, training: bool, prefix: str = "") -> Array:
    """What the layer's equation gives with the parameters and statistics of `net`."""
    p, s = (inner(named, prefix) if prefix else dict(named) for named in (net.parameters, net.statistics))
    return EQUATIONS[name](x, p, s, training, *example["args"])


# ------------------------------------------------------------------------------------------------- every registered layer


def test_every_registered_layer_has_an_equation_and_an_example() -> None:
    assert set(EQUATIONS) == set(nn.layers)
    assert all(layer.examples for layer in nn.layers.values())
    assert all(getattr(nn, name) is layer for name, layer in nn.layers.items())


@pytest.mark.parametrize(("name", "example"), CASES, ids=IDS)
@pytest.mark.parametrize(("dtype", "rtol"), [("float64", 1e-12), ("float32", 2e-5)])
def test_value_follows_the_equation(name: str, example: Mapping[str, Any], dtype: str, rtol: float) -> None:
    x = inputs(example)
    net = build(make(name, example), x, dtype=dtype)
    y = net.predict(x)
    assert y.dtype == dtype
    np.testing.assert_allclose(y, declared(name, example, net, x, training=False), rtol=rtol, atol=rtol)


@pytest.mark.parametrize(
    ("name", "example"), [c for c in CASES if c[0] not in RANDOM], ids=[i for i in IDS if i.split("-")[0] not in RANDOM]
)
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_value_in_both_modes(name: str, example: Mapping[str, Any], training: bool) -> None:
    x = inputs(example)
    net = build(Gain(make(name, example)), x)
    net.load_parameters({"gain": np.ones_like(net.parameters["gain"])}, strict=False)
    expected = declared(name, example, net, x, training, "layer")
    np.testing.assert_allclose(output(net, x, training), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("name", "example"), CASES, ids=IDS)
def test_gradients_by_parameters(name: str, example: Mapping[str, Any]) -> None:
    """Central differences of the network itself, and of the independent equation."""
    x = inputs(example)
    net = build(Gain(make(name, example)), x)
    shape = net.predict(x).shape
    t = np.random.default_rng(2).normal(size=shape)
    report = net.check_gradients(x, t, loss="mse")
    assert {c.name for c in report.comparisons} == {
        f"{p} ({mode})" for p in net.parameters for mode in ("training", "evaluation")
    }
    assert all(c.checked == math.prod(c.shape) and not c.kinks for c in report.comparisons)

    gradients = net.gradients(x, t, loss="mse", training=False)
    assert list(gradients) == list(net.parameters)
    for at, (parameter, value) in enumerate(net.parameters.items()):

        def objective(*values: Array, names: tuple[str, ...] = tuple(net.parameters)) -> float:
            p = dict(zip(names, values, strict=True))
            y = EQUATIONS[name](x, inner(p, "layer"), inner(net.statistics, "layer"), False, *example["args"])
            return float(np.mean((y * p["gain"] - t) ** 2))

        assert value.shape == gradients[parameter].shape
        assert_gradient(objective, list(net.parameters.values()), at, gradients[parameter])


@pytest.mark.parametrize(("name", "example"), FLOAT_CASES, ids=FLOAT_IDS)
def test_first_and_second_derivative_by_the_input(name: str, example: Mapping[str, Any]) -> None:
    x = inputs(example)
    net = build(make(name, example), x)
    r = np.random.default_rng(3)
    c, v = r.normal(size=net.predict(x).shape), r.normal(size=x.shape)

    def f(x: Any) -> Any:
        return np.sum(c * np.sin(net(x)))

    def oracle(x: Array) -> float:
        return float(np.sum(c * np.sin(declared(name, example, net, x, training=False))))

    gradient = cr.grad(f)
    assert_gradient(oracle, [x], 0, gradient(x))
    second = cr.hvp(f, x, v)
    eps = 1e-6
    np.testing.assert_allclose(second, (gradient(x + eps * v) - gradient(x - eps * v)) / (2 * eps), rtol=1e-6, atol=1e-7)
    assert np.any(second != 0)


@pytest.mark.parametrize(("name", "example"), FLOAT_CASES, ids=FLOAT_IDS)
def test_second_derivatives_by_parameters_in_both_modes(name: str, example: Mapping[str, Any]) -> None:
    """A network whose output is a gradient: its gradients are mixed second derivatives by input and parameters."""
    x = inputs(example)
    net = build(Slope(nn.Sequential(nn.Dense(x.shape[-1]), make(name, example))), x)
    t = np.random.default_rng(2).normal(size=x.shape)
    report = net.check_gradients(x, t, loss="mse")
    assert len(report.comparisons) == 2 * len(net.parameters)
    assert all(np.any(g) for g in net.gradients(x, t, loss="mse", training=False).values())


@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name])
def test_dense_with_every_activation(activation: str) -> None:
    from chainrule.ops.activations import activations

    assert set(activations) == set(ACTIVATIONS) - {None}
    x = inputs({"input": (4, 3)})
    net = build(nn.Dense(5, activation), x)
    np.testing.assert_allclose(net.predict(x), dense(x, net.parameters, {}, False, 5, activation), rtol=1e-12, atol=1e-15)
    net.check_gradients(x, np.ones((4, 5)), loss="mse")


def test_an_activation_may_be_any_function() -> None:
    x = inputs({"input": (4, 3)})
    net = build(nn.Sequential(nn.Dense(3, lambda z: z**3), nn.Activation(np.sin), np.exp), x)
    expected = np.exp(np.sin((x @ net.parameters["0.weight"] + net.parameters["0.bias"]) ** 3))
    np.testing.assert_allclose(net.predict(x), expected, rtol=1e-12)
    net.check_gradients(x, np.ones((4, 3)), loss="mse")


SHAPES = [
    (lambda: nn.Dense(7), (5, 4), (5, 7)),
    (lambda: nn.Dense(7), (5, 2, 3, 4), (5, 2, 3, 7)),
    (lambda: nn.Activation("softmax"), (5, 2, 4), (5, 2, 4)),
    (lambda: nn.Dropout(0.3), (5, 2, 4), (5, 2, 4)),
    (lambda: nn.BatchNorm(), (5, 2, 3, 4), (5, 2, 3, 4)),
    (lambda: nn.LayerNorm(), (5, 2, 4), (5, 2, 4)),
    (lambda: nn.Flatten(), (5, 4), (5, 4)),
    (lambda: nn.Flatten(), (5, 2, 3, 4), (5, 24)),
    (lambda: nn.Flatten(), (5,), (5, 1)),
    (lambda: nn.Reshape(2, 6), (5, 12), (5, 2, 6)),
    (lambda: nn.Reshape((2, -1)), (5, 3, 4), (5, 2, 6)),
    (lambda: nn.Reshape(-1), (5, 3, 4), (5, 12)),
    (lambda: nn.Residual(nn.Dense(4)), (5, 2, 4), (5, 2, 4)),
    (lambda: nn.Sequential(), (5, 2), (5, 2)),
    (lambda: nn.Sequential(nn.Dense(3), nn.Reshape(3, 1), nn.Flatten(), nn.Dense(2)), (5, 6), (5, 2)),
]


@pytest.mark.parametrize(("layer", "shape", "expected"), SHAPES, ids=[f"{s[0]()!r}-{s[1]}" for s in SHAPES])
def test_output_shape(layer: Callable[[], nn.Module], shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    net = layer()
    x = inputs({"input": shape})
    net.fit(x, np.zeros(expected), epochs=0)
    assert net.predict(x).shape == expected
    assert net.predict(x[:1]).shape == (1, *expected[1:])
    assert net.predict(np.concatenate([x] * 3)).shape == (3 * expected[0], *expected[1:])


@pytest.mark.parametrize(
    ("layer", "weight", "expected"),
    [
        (lambda: nn.Dense(400, "relu"), "weight", math.sqrt(2 / 300)),
        (lambda: nn.Dense(400, "leaky_relu"), "weight", math.sqrt(2 / 300)),
        (lambda: nn.Dense(400, "selu"), "weight", math.sqrt(1 / 300)),
        (lambda: nn.Dense(400, "tanh"), "weight", math.sqrt(2 / 700)),
        (lambda: nn.Dense(400), "weight", math.sqrt(2 / 700)),
        (lambda: nn.Dense(400, init="lecun_normal"), "weight", math.sqrt(1 / 300)),
        (lambda: nn.Dense(400, init=cr.initializers.normal(0.3)), "weight", 0.3),
        (lambda: nn.Dense(400, init=lambda generator, shape: generator.normal(2.0, 0.2, shape)), "weight", 0.2),
    ],
)
def test_first_weights(layer: Callable[[], nn.Dense], weight: str, expected: float) -> None:
    net = layer()
    net.fit(np.zeros((2, 300)), np.zeros((2, 400)), epochs=0)
    assert net.parameters[weight].std() == pytest.approx(expected, rel=0.02)
    assert not np.any(net.parameters["bias"])


def test_first_table_of_an_embedding() -> None:
    net = nn.Embedding(1000, 50)
    net.fit(np.zeros((2,), int), np.zeros((2, 50)), epochs=0)
    assert net.parameters["weight"].std() == pytest.approx(0.05, rel=0.02)


# --------------------------------------------------------------------------------------------------------- batch normalization


@pytest.mark.parametrize(("momentum", "eps", "shape"), [(0.1, 1e-5, (5, 3)), (0.3, 1e-3, (4, 2, 3)), (1.0, 1e-5, (2, 3))])
def test_batch_norm_moves_its_statistics_as_pytorch_does(momentum: float, eps: float, shape: tuple[int, ...]) -> None:
    """r ← (1 - momentum) r + momentum · (mean, unbiased variance), at each step, from 0 and 1 on."""
    r = np.random.default_rng(0)
    x = r.normal(2.0, 3.0, (3 * shape[0], *shape[1:]))
    layer = nn.BatchNorm(momentum, eps)
    layer.fit(x, x, epochs=0, dtype="float64")
    assert (layer.statistics["mean"].tolist(), layer.statistics["variance"].tolist()) == ([0.0] * 3, [1.0] * 3)
    mean, variance = np.zeros(3), np.ones(3)
    for _ in range(2):
        layer.fit(x, x, epochs=1, batch_size=shape[0], shuffle=False, optimizer=cr.SGD(0.01), dtype="float64")
        for batch in np.split(x, 3):
            rows = batch.reshape(-1, 3)
            mean = (1 - momentum) * mean + momentum * rows.mean(axis=0)
            variance = (1 - momentum) * variance + momentum * rows.var(axis=0, ddof=1)
        np.testing.assert_allclose(layer.statistics["mean"], mean, rtol=1e-12)
        np.testing.assert_allclose(layer.statistics["variance"], variance, rtol=1e-12)
    scale, shift = layer.parameters["scale"], layer.parameters["shift"]
    np.testing.assert_allclose(layer.predict(x), (x - mean) / np.sqrt(variance + eps) * scale + shift, rtol=1e-12)


def test_short_last_batch_counts_with_its_own_length() -> None:
    x = np.random.default_rng(0).normal(size=(7, 2))
    layer = nn.BatchNorm(0.5)
    layer.fit(x, x, epochs=1, batch_size=4, shuffle=False, optimizer=cr.SGD(0.0), dtype="float64")
    variance = 0.5 * (0.5 + 0.5 * x[:4].var(axis=0, ddof=1)) + 0.5 * x[4:].var(axis=0, ddof=1)
    np.testing.assert_allclose(layer.statistics["variance"], variance, rtol=1e-12)


READERS: dict[str, Callable[[nn.Module, Array], Any]] = {
    "gradients": lambda net, x: net.gradients(x, x),
    "gradients in evaluation": lambda net, x: net.gradients(x, x, training=False),
    "check_gradients": lambda net, x: net.check_gradients(x, x),
    "predict": lambda net, x: net.predict(x),
    "evaluate": lambda net, x: net.evaluate(x, x),
    "call": lambda net, x: net(x),
    "grad": lambda net, x: cr.grad(lambda x: np.sum(net(x) ** 2))(x),
    "validation": lambda net, x: net.fit(x, x, validation=(5 * x, x), epochs=0),
    "fit(epochs=0)": lambda net, x: net.fit(5 * x, x, epochs=0, seed=3),
}


@pytest.mark.parametrize("reader", list(READERS))
def test_only_fit_moves_running_statistics(reader: str) -> None:
    x = np.random.default_rng(0).normal(size=(6, 3))
    net = nn.Sequential(nn.BatchNorm(), nn.Dense(3), nn.BatchNorm())
    net.fit(x, x, epochs=2, dtype="float64")
    before = (net.statistics, net.parameters)
    READERS[reader](net, x + 1)
    after = (net.statistics, net.parameters)
    for old, new in zip(before, after, strict=True):
        assert {n: v.tolist() for n, v in old.items()} == {n: v.tolist() for n, v in new.items()}


def test_validation_uses_and_keeps_the_running_statistics() -> None:
    x = np.random.default_rng(0).normal(size=(8, 3))
    with_validation, without = nn.BatchNorm(), nn.BatchNorm()
    run = with_validation.fit(x, x, epochs=2, dtype="float64", validation=(9 * x + 5, x))
    without.fit(x, x, epochs=2, dtype="float64")
    for name, value in without.statistics.items():
        np.testing.assert_array_equal(with_validation.statistics[name], value)
    assert run.validation_loss[-1] == pytest.approx(np.mean((without.predict(9 * x + 5) - x) ** 2), rel=1e-12)


def test_batch_norm_with_one_row_left_over_is_refused_before_anything_changes() -> None:
    x = np.random.default_rng(0).normal(size=(5, 3))
    net = nn.Sequential(nn.Dense(3), nn.BatchNorm())
    net.fit(x[:4], x[:4], epochs=1, batch_size=4)
    before = {**net.parameters, **net.statistics}
    with pytest.raises(cr.ShapeError, match=r"BatchNorm needs at least 2 values.*batch_size.*layer \"1\""):
        net.fit(x, x, batch_size=4)
    for name, value in {**net.parameters, **net.statistics}.items():
        np.testing.assert_array_equal(value, before[name])


# --------------------------------------------------------------------------------------------------------------------- dropout


def kept(net: nn.Module, x: Array, seed: int = 0) -> Array:
    """Which elements the dropout of this seed lets through (x is a batch of ones)."""
    return output(net, x, training=True, seed=seed) > 0


@pytest.mark.parametrize("kind", [nn.Dropout, nn.Dropout2D])
def test_a_rate_may_be_a_number_of_numpy(kind: Any) -> None:
    assert kind(np.float32(0.5)).rate == 0.5
    with pytest.raises(cr.UsageError, match="less than 1"):
        kind(np.float32(1))


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
def test_dropout_scales_what_it_keeps(rate: float) -> None:
    x = np.random.default_rng(0).uniform(1.0, 2.0, (20, 30))
    net = build(Gain(nn.Dropout(rate)), x)
    net.load_parameters({"gain": np.ones((30,))})
    y = output(net, x)
    np.testing.assert_allclose(y[y != 0], (x / (1 - rate))[y != 0], rtol=1e-12)
    share, sigma = np.mean(y != 0), math.sqrt(rate * (1 - rate) / y.size)
    assert abs(share - (1 - rate)) <= 4 * sigma
    assert np.any(y == 0) == (rate > 0)
    np.testing.assert_array_equal(net.predict(x), x)
    np.testing.assert_allclose(output(net, x, training=False), x, rtol=1e-12)


def test_dropout_masks_differ_by_row_layer_and_seed() -> None:
    x = np.ones((16, 32))
    net = build(Gain(nn.Dropout(0.5)), x)
    net.load_parameters({"gain": np.ones(32)})
    first = kept(net, x, seed=0)
    np.testing.assert_array_equal(first, kept(net, x, seed=0))
    other = kept(net, x, seed=1)
    n = first.size
    assert abs(np.mean(first == other) - 0.5) < 4 * 0.5 / math.sqrt(n)
    assert len({row.tobytes() for row in first}) == 16
    assert len({column.tobytes() for column in first.T}) == 32
    # Two layers one after the other keep a quarter, not the same half: their masks are independent.
    two = build(Gain(nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5))), x)
    two.load_parameters({"gain": np.ones(32)})
    assert abs(np.mean(kept(two, x)) - 0.25) < 4 * math.sqrt(0.25 * 0.75 / n)


def test_dropout_is_drawn_anew_at_each_step_and_epoch() -> None:
    """The weight of a lone feature moves by the number of rows that were let through: a trace of each step's mask."""
    x, y = np.ones((64, 1)), np.ones((64, 1))
    net = nn.Sequential(nn.Dropout(0.5), nn.Dense(1, init="zeros", bias=False))
    counts = []
    net.fit(x, y, epochs=0, dtype="float64")
    for _ in range(3):
        net.load_parameters({"1.weight": np.zeros((1, 1))})
        net.fit(x[:32], y[:32], loss=product, epochs=1, batch_size=32, optimizer=cr.SGD(1.0), dtype="float64")
        counts.append(-net.parameters["1.weight"].item() * 16)
    assert all(count == round(count) for count in counts)
    assert len(set(counts)) > 1
    net.load_parameters({"1.weight": np.zeros((1, 1))})
    run = net.fit(x, y, loss=product, epochs=12, batch_size=64, optimizer=cr.SGD(1.0), dtype="float64")
    moves = np.diff([0.0, *run.loss])
    assert len(set(np.round(moves, 12))) > 3


def test_dropout_is_unbiased() -> None:
    """The mean over many seeds is the input: E[m / (1 - rate)] = 1."""
    x = np.ones((40, 50))
    net = build(Gain(nn.Dropout(0.2)), x)
    net.load_parameters({"gain": np.ones(50)})
    target = np.ones((40, 50))
    sums = [net.gradients(x, target, loss=product, seed=seed)["gain"].sum() for seed in range(20)]
    assert abs(np.mean(sums) - 1) < 4 * math.sqrt(0.2 / 0.8 / (20 * x.size))


# -------------------------------------------------------------------------------------------------------------------- embedding

INTEGERS = np.array([[1, 4], [0, 0], [2, 4]])
BAD_INDICES = [
    (np.array([[1, 2], [3, 5]]), "5"),
    (np.array([[1, 2], [3, -1]]), "-1"),
    (np.array([[1, 2**40], [0, 0]]), str(2**40)),
    (np.array([[-(2**40), 1], [0, 0]]), str(-(2**40))),
    (np.array([[1, 2**32 + 1], [0, 0]]), str(2**32 + 1)),
    (np.array([[1, 2**64 - 1], [0, 0]], np.uint64), "1844674407370955161[0-9]"),
    (np.array([[1, 255], [0, 0]], np.uint8), "255"),
    (np.array([[1, -128], [0, 0]], np.int8), "-128"),
]
INDEX_USERS: dict[str, Callable[[nn.Module, Array, Array], Any]] = {
    "fit": lambda net, x, y: net.fit(x, y, epochs=1),
    "validation": lambda net, x, y: net.fit(INTEGERS, np.ones((3, 6)), epochs=1, validation=(x, y)),
    "predict": lambda net, x, y: net.predict(x),
    "evaluate": lambda net, x, y: net.evaluate(x, y),
    "gradients": lambda net, x, y: net.gradients(x, y),
    "check_gradients": lambda net, x, y: net.check_gradients(x, y),
    "call": lambda net, x, y: net(x),
}


@pytest.mark.parametrize("use", list(INDEX_USERS))
@pytest.mark.parametrize(("bad", "said"), BAD_INDICES, ids=[f"{bad.ravel()[1]}-{bad.dtype}" for bad, _ in BAD_INDICES])
def test_an_index_outside_the_table_is_refused_never_clamped_or_wrapped(use: str, bad: Array, said: str) -> None:
    net = nn.Sequential(nn.Embedding(5, 3), nn.Flatten())
    net.fit(INTEGERS, np.ones((3, 6)), epochs=0)
    before = net.parameters["0.weight"]
    with pytest.raises(cr.DataError) as caught:
        INDEX_USERS[use](net, bad, np.ones((2, 6)))
    if not said.startswith("-"):
        assert re.search(rf"(?<![\d-]){said}(?!\d)", str(caught.value)), caught.value
    assert re.search(r"0\.\.4|length 5", str(caught.value)), caught.value
    assert 'layer "0"' in str(caught.value)
    np.testing.assert_array_equal(net.parameters["0.weight"], before)


@pytest.mark.parametrize("at", [np.array([[0, 0], [0, 5]]), np.array([[0, 0], [0, -1]])], ids=["too large", "negative"])
def test_an_index_outside_is_refused_at_the_first_fit_too(at: Array) -> None:
    net = nn.Sequential(nn.Embedding(5, 3), nn.Flatten())
    with pytest.raises(cr.DataError, match=r'(0\.\.4|length 5).*layer "0"'):
        net.fit(at, np.ones((2, 6)))
    assert not net.built


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"])
def test_any_integer_type_is_an_index(dtype: str) -> None:
    net = build(nn.Sequential(nn.Embedding(5, 3), nn.Flatten()), INTEGERS)
    np.testing.assert_array_equal(net.predict(INTEGERS.astype(dtype)), net.predict(INTEGERS))
    fresh = nn.Sequential(nn.Embedding(5, 3), nn.Flatten())
    fresh.fit(INTEGERS.astype(dtype), np.ones((3, 6)), epochs=1)
    np.testing.assert_array_equal(fresh.predict(INTEGERS), fresh.parameters["0.weight"][INTEGERS].reshape(3, 6))


def test_numbers_with_a_point_are_no_indices() -> None:
    fresh = nn.Sequential(nn.Embedding(5, 3), nn.Flatten())
    for x in (INTEGERS + 0.5, INTEGERS * 1.0):  # at first use only the type can tell what they are
        with pytest.raises(cr.ChainruleError, match=r"integers"):
            fresh.fit(x, np.ones((3, 6)))
    net = build(nn.Sequential(nn.Embedding(5, 3), nn.Flatten()), INTEGERS)
    for call in INDEX_USERS.values():
        with pytest.raises(cr.DataError, match=r"whole numbers"):
            call(net, INTEGERS + 0.5, np.ones((3, 6)))
        with pytest.raises(cr.DataError):
            call(net, but(INTEGERS * 1.0, (2, 1), 1e300), np.ones((3, 6)))


def but(a: Array, at: Any, value: Any) -> Array:
    """A copy with another element at one place."""
    copied = a.copy()
    copied[at] = value
    return copied


def test_rows_of_the_table_that_occur_twice_get_the_sum() -> None:
    net = build(nn.Sequential(nn.Embedding(5, 3), nn.Flatten()), INTEGERS)
    t = np.random.default_rng(0).normal(size=(3, 6))
    expected = np.zeros((5, 3))
    for row, words in enumerate(INTEGERS):
        for place, word in enumerate(words):
            expected[word] += t[row, 3 * place : 3 * place + 3] / 18
    np.testing.assert_allclose(net.gradients(INTEGERS, t, loss=product)["0.weight"], expected, rtol=1e-12, atol=1e-16)


def test_an_index_beyond_the_precision_of_float32_stays_exact() -> None:
    """2²⁴ + 1 is no float32: an index that was cast like other inputs would point at the wrong row."""
    last = 2**24 + 1
    net = nn.Embedding(last + 1, 1, init="zeros")
    x = np.array([last, last - 1])
    net.fit(x, np.array([[1.0], [0.0]]), loss=product, epochs=1, optimizer=cr.SGD(1.0))
    np.testing.assert_array_equal(np.flatnonzero(net.parameters["weight"]), [last])


# ------------------------------------------------------------------------------------------------------- wrong use of layers

MAKING = [
    (lambda: nn.Dense(0), "Dense: units .* at least 1, not 0"),
    (lambda: nn.Dense(-3), "Dense: units .*-3"),
    (lambda: nn.Dense(2.5), "Dense: units .*2.5"),
    (lambda: nn.Dense(True), "Dense: units .*True"),
    (lambda: nn.Dense("relu"), "Dense: units .*'relu'"),
    (lambda: nn.Dense(3, "rellu"), 'no activation called "rellu". Did you mean "relu"'),
    (lambda: nn.Activation("sigmoide"), 'Did you mean "sigmoid"'),
    (lambda: nn.Dense(3, init="he_unifrom"), 'no initializer called "he_unifrom". Did you mean "he_uniform"'),
    (lambda: nn.Dropout(1.0), r"Dropout: .*less than 1, not 1\.0"),
    (lambda: nn.Dropout(-0.1), r"Dropout: .*not -0\.1"),
    (lambda: nn.Dropout(math.nan), r"Dropout: .*nan"),
    (lambda: nn.Dropout("0.5"), r"Dropout: .*'0\.5'"),
    (lambda: nn.BatchNorm(momentum=0.0), r"BatchNorm: momentum .*0\.0"),
    (lambda: nn.BatchNorm(momentum=1.5), r"BatchNorm: momentum .*1\.5"),
    (lambda: nn.BatchNorm(eps=0.0), r"BatchNorm: .*eps above 0"),
    (lambda: nn.LayerNorm(eps=-1.0), r"LayerNorm: eps .*-1\.0"),
    (lambda: nn.Embedding(0, 3), "Embedding: entries .*not 0"),
    (lambda: nn.Embedding(3, 0), "Embedding: units .*not 0"),
    (lambda: nn.Reshape(-1, -1), r"Reshape: .*\(-1, -1\)"),
    (lambda: nn.Reshape(0), r"Reshape: .*\(0,\)"),
    (lambda: nn.Reshape(2, 1.5), r"Reshape: .*1\.5"),
    (lambda: nn.Sequential(3), "Sequential takes layers, not 3"),
    (lambda: nn.Sequential(nn.Dense), r"the class Dense.*write Dense\(\.\.\.\)"),
    (lambda: nn.Residual(3), "Residual takes layers, not 3"),
    (lambda: nn.Residual(nn.Dense), "the class Dense"),
]


@pytest.mark.parametrize(("make_layer", "said"), MAKING, ids=[said[:40] for _, said in MAKING])
def test_a_layer_made_wrongly(make_layer: Callable[[], Any], said: str) -> None:
    with pytest.raises((cr.UsageError, cr.UnknownNameError), match=said):
        make_layer()


FITTING = [
    (lambda: nn.Sequential(nn.Dense(4), nn.Residual(nn.Dense(3))), (6, 2), r"Residual.*\(\w+, 4\).*\(\w+, 3\).*layer \"1\""),
    (lambda: nn.Sequential(nn.Dense(4), nn.Reshape(3, -1)), (6, 2), r"Reshape.*\(4,\).*\(3, -1\).*layer \"1\""),
    (lambda: nn.Sequential(nn.Reshape(3, 5)), (6, 4), r"Reshape.*\(4,\).*\(3, 5\).*layer \"0\""),
    (lambda: nn.Sequential(nn.Dense(4), nn.Embedding(3, 2)), (6, 2), r"Embedding needs integers.*layer \"1\""),
]


@pytest.mark.parametrize(("network", "shape", "said"), FITTING)
def test_shapes_that_do_not_fit_name_shapes_layer_and_line(network: Callable[[], nn.Module], shape: Any, said: str) -> None:
    net = network()
    with pytest.raises(cr.ShapeError, match=said) as caught:
        net.fit(np.ones(shape), np.ones((6, 1)))
    assert re.search(r"test_layers\.py:\d+", str(caught.value))
    assert not net.built
