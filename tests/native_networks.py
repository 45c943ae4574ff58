"""Networks and programs for the tests of native code, and what of them is compared with NumPy's numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from native import Array, assert_as_precise, registered
from native_graphs import compare_wide, float_inputs
from same import state
from test_layers import inputs as layer_inputs

import chainrule as cr
from chainrule import nn
from chainrule.graph.node import Type
from chainrule.optim import optimizers
from chainrule.program import Input, ProgramBuilder, Variable


def compare_named(got: dict[str, Array], theirs: dict[str, Array], exact: dict[str, Array] | None) -> None:
    assert list(got) == list(theirs)
    for name, value in got.items():
        if exact is None:
            compare_wide(value, theirs[name])
        else:
            assert_as_precise(value, theirs[name], exact[name], name, multiple=8, ulps=32)


def twins(make: Callable[[], nn.Module], x: Any, outputs: tuple[int, ...]) -> tuple[nn.Module, nn.Module]:
    """A network in single and in double precision with the same random parameters, which single precision holds exactly."""
    nets = []
    for dtype in ("float32", "float64"):
        net = make()
        net.fit(x, np.zeros((len(x), *outputs)), loss=lambda s, t: np.mean(s), epochs=0, dtype=dtype)
        r = np.random.default_rng(1)
        values = {n: r.normal(size=v.shape).astype(np.float32) for n, v in net.parameters.items()}
        values |= {n: r.uniform(0.5, 2.0, v.shape).astype(np.float32) for n, v in net.statistics.items()}
        net.load_parameters(values)
        nets.append(net)
    return nets[0], nets[1]


class Gain(nn.Module):
    """layer(x) · gain, so that layers without parameters have a gradient too."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def __call__(self, x: Any) -> Any:
        y = self.layer(x) if self.layer is not None else x
        return y * self.parameter("gain", y.shape[1:], "ones")


def check_network(nets: tuple[nn.Module, nn.Module], x: Any, t: Any, loss: Any, random: bool = False, both: bool = True) -> None:
    """Predictions, losses and gradients of the two precisions against NumPy."""
    for training in (True, False) if both else (True,):
        single, double = (
            [net.gradients(x, t, loss=loss, training=training, backend=b) for b in ("native", "reference")] for net in nets
        )
        compare_wide_all(double)
        compare_named(single[0], single[1], None if random and training else double[1])
    a, b, c = nets[0].predict(x, backend="native"), nets[0].predict(x), nets[1].predict(x)
    assert_as_precise(a, b, c, "predict")
    compare_wide(nets[1].predict(x, backend="native"), c)
    for net in nets:
        got, want = (net.evaluate(x, t, loss=loss, backend=b)["loss"] for b in ("native", "reference"))
        assert got == pytest.approx(want, rel=2e-6 if net is nets[0] else 1e-12)


def compare_wide_all(pair: Sequence[dict[str, Array]]) -> None:
    compare_named(pair[0], pair[1], None)


def check_layer(name: str, example: dict[str, Any]) -> None:
    """The example that stands beside a layer, in both precisions and both modes."""
    x = layer_inputs(example).astype(np.float64)
    x = x.astype(np.int64) if "below" in example else x.astype(np.float32).astype(np.float64)
    make = lambda: Gain(nn.layers[name](*copy.deepcopy(example["args"])))
    probe = make()
    probe.fit(x, np.zeros((len(x), 1)), loss=lambda s, t: np.mean(s), epochs=0)
    outputs = probe.predict(x).shape[1:]
    t = np.random.default_rng(2).normal(size=(len(x), *outputs)).astype(np.float32)
    check_network(twins(make, x, outputs), x, t, "mse", random="Dropout" in name)


def check_weights_as_they_are_seen(inputs: int, outputs: int) -> None:
    """However native code has a matrix, it goes in and comes out as everybody else has it."""
    net = nn.Dense(outputs)
    net.fit(np.ones((4, inputs)), np.ones((4, outputs)), epochs=0)
    weight = np.arange(inputs * outputs, dtype=np.float32).reshape(inputs, outputs)
    net.load_parameters({"weight": weight, "bias": np.zeros(outputs)})
    net.fit(np.zeros((4, inputs)), np.zeros((4, outputs)), epochs=1, optimizer=cr.SGD(0.1))
    np.testing.assert_array_equal(net.parameters["weight"], weight)
    np.testing.assert_array_equal(net.predict(np.eye(inputs)), weight)


def check_optimizer(name: str, options: dict[str, Any]) -> None:
    """Losses of some epochs as the reference backend has them."""
    x = float_inputs((40, 4), "float32")
    t = np.tanh(x @ float_inputs((4, 2), "float32"))
    rate = {"lbfgs": 1.0, "adadelta": 1.0, "lion": 0.005}.get(name, 0.03)
    runs = []
    for backend in ("reference", "native"):
        net = nn.Sequential(nn.Dense(8, "tanh"), nn.Dense(2))
        runs.append(
            net.fit(x, t, optimizer=optimizers[name](rate, **options), epochs=4, batch_size=16, backend=backend, dtype="float64")
        )
    np.testing.assert_allclose(runs[1].loss, runs[0].loss, rtol=1e-9)
    assert runs[0].steps == runs[1].steps


class Recurrent(nn.Module):
    """h ← tanh(x_t W + h U) over the time axis of x (B, T, I); the last h."""

    def __init__(self, units: int) -> None:
        self.units = units

    def __call__(self, x: Any) -> Any:
        w = self.parameter("w", (x.shape[2], self.units), "glorot_uniform")
        u = self.parameter("u", (self.units, self.units), "orthogonal")
        start = np.zeros((x.shape[0], self.units), x.dtype)
        return cr.scan(lambda h, now: (np.tanh(now @ w + h @ u), None), start, np.swapaxes(x, 0, 1))[0]


def dense_net() -> nn.Module:
    return nn.Sequential(nn.Dense(70, "relu"), nn.BatchNorm(), nn.Dropout(0.3), nn.Dense(33, "tanh"), nn.LayerNorm(), nn.Dense(3))


def token_net() -> nn.Module:
    return nn.Sequential(nn.Embedding(19, 6), Recurrent(21), nn.Dropout(0.2), nn.Dense(3))


NETS = {"dense": dense_net, "tokens": token_net}


def rows_for(kind: str, rows: int) -> tuple[Array, Array]:
    r = np.random.default_rng(rows)
    x = r.integers(0, 19, (rows, 7)) if kind == "tokens" else r.normal(size=(rows, 11)).astype(np.float32)
    return x, r.normal(size=(rows, 3)).astype(np.float32)


def trained(kind: str, rows: int, backend: str = "native", **options: Any) -> dict[str, Array]:
    x, t = rows_for(kind, rows)
    net = NETS[kind]()
    run = net.fit(x, t, **{"epochs": 2, "batch_size": 32, **options}, backend=backend)
    scores = net.predict(x, backend=backend)
    return {**state(net), "loss": np.array(run.loss), "scores": scores}


def trained_on(kind: str, rows: int, backend: Any, **options: Any) -> dict[str, Array]:
    with registered(backend) as name:
        return trained(kind, rows, name, **options)


def rounds_program(rows: int) -> Any:
    """w ← w · 0.5 + a + Σ x · b, with results of each kind: a number, one a row, rows on the second axis."""
    f4 = np.dtype("f4")
    inputs = [
        Input("x", Type((rows, 2), f4), rows=0),
        *(Input(n, Type(s, f4)) for n, s in (("a", ()), ("b", (2,)), ("unread", ()))),
    ]
    builder = ProgramBuilder([Variable("w", Type((2,), f4), "parameter")], inputs, rows)

    def step(s: Any, g: Any) -> Any:
        y = g["x"] * g["b"]
        return {"loss": np.sum(s["w"]) + g["a"], "y": y, "across": np.transpose(y)}, {
            "w": 0.5 * s["w"] + g["a"] + np.sum(y, axis=0)
        }

    def look(s: Any, g: Any) -> Any:
        return {"loss": np.sum(s["w"]) * g["a"]}, {}

    builder.entry("step", step, ["x", "a", "b"], rows_of={"y": 0, "across": 1})
    builder.entry("look", look, ["a"])
    return builder.build()


ROUNDS = [
    (["step"], [4], 6),
    (["step", "step", "look", "step"], [4, 4, 4, 3], 5),
    (["look", "step", "step"], [3, 4, 3], 1),
    (["step"] * 100, [4] * 99 + [3], 3),
]
