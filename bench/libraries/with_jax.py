"""JAX: one jitted step a call; a scan over all steps in one call; the same with all parameters in one vector.

Adam is written out: the compiler then fuses it, and no further package is needed. In one vector it is a single loop rather than one
for each parameter, which pays in networks of many small ones.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree

from .. import layers as kinds
from ..rows import Row
from . import Settings, Trainee, Unsupported

ACTIVATIONS: dict[str | None, Callable[[Any], Any]] = {None: lambda x: x, "relu": jax.nn.relu, "tanh": jnp.tanh}
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8

# Each builder is a function (layer, parameters, statistics, x, key) -> (y, new statistics).


def dense(layer: kinds.Dense, w: dict[str, Any], s: Any, x: Any, key: Any) -> tuple[Any, Any]:
    """φ(x W + b)."""
    return ACTIVATIONS[layer.activation](x @ w["weight"] + w["bias"]), s


def dropout(layer: kinds.Dropout, w: dict[str, Any], s: Any, x: Any, key: Any) -> tuple[Any, Any]:
    """Zeros by the key of the step and the layer."""
    if not layer.rate:
        return x, s
    return jnp.where(jax.random.bernoulli(key, 1 - layer.rate, x.shape), x / (1 - layer.rate), 0.0), s


def batch_norm(layer: kinds.BatchNorm, w: dict[str, Any], s: Any, x: Any, key: Any) -> tuple[Any, Any]:
    """By the batch; running statistics as in PyTorch."""
    axes, count = tuple(range(x.ndim - 1)), x.size // x.shape[-1]
    mean, variance = jnp.mean(x, axes), jnp.var(x, axes)
    s = {"mean": 0.9 * s["mean"] + 0.1 * mean, "variance": 0.9 * s["variance"] + 0.1 * variance * count / (count - 1)}
    return (x - mean) * lax.rsqrt(variance + 1e-5) * w["scale"] + w["shift"], lax.stop_gradient(s)


def recurrent(layer: Any, w: dict[str, Any], s: Any, x: Any, key: Any) -> tuple[Any, Any]:
    """A scan over time; the products with the inputs of all steps are taken at once before it."""
    H, kind = layer.units, type(layer)

    def step(state: Any, z: Any) -> tuple[Any, Any]:
        h, c = state
        if kind is kinds.LSTM:
            i, f, g, o = jnp.split(z + h @ w["weight_hidden"], 4, -1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
        elif kind is kinds.GRU:
            (zr, zz, zn), (hr, hz, hn) = jnp.split(z, 3, -1), jnp.split(h @ w["weight_hidden"] + w["bias_hidden"], 3, -1)
            r, u = jax.nn.sigmoid(zr + hr), jax.nn.sigmoid(zz + hz)
            h = (1 - u) * jnp.tanh(zn + r * hn) + u * h
        else:
            h = jnp.tanh(z + h @ w["weight_hidden"])
        return (h, c), h if layer.return_sequences else None

    zero = jnp.zeros((x.shape[0], H), x.dtype)
    (h, _), all_h = lax.scan(step, (zero, zero), jnp.swapaxes(x @ w["weight_input"] + w["bias"], 0, 1))
    return (jnp.swapaxes(all_h, 0, 1) if layer.return_sequences else h), s


def conv2d(layer: kinds.Conv2D, w: dict[str, Any], s: Any, x: Any, key: Any) -> tuple[Any, Any]:
    """Convolution, channels last."""
    y = lax.conv_general_dilated(x, w["weight"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return ACTIVATIONS[layer.activation](y + w["bias"]), s


def max_pool(layer: kinds.MaxPool2D, w: dict[str, Any], s: Any, x: Any, key: Any) -> tuple[Any, Any]:
    """The largest of each window."""
    size = (1, layer.size, layer.size, 1)
    return lax.reduce_window(x, -jnp.inf, lax.max, size, size, "VALID"), s


BUILDERS: dict[type[kinds.Layer], Callable[..., tuple[Any, Any]]] = {
    kinds.Dense: dense,
    kinds.Activation: lambda layer, w, s, x, key: (ACTIVATIONS[layer.activation](x), s),
    kinds.Dropout: dropout,
    kinds.BatchNorm: batch_norm,
    kinds.Flatten: lambda layer, w, s, x, key: (x.reshape(x.shape[0], -1), s),
    kinds.RNN: recurrent,
    kinds.GRU: recurrent,
    kinds.LSTM: recurrent,
    kinds.Conv2D: conv2d,
    kinds.MaxPool2D: max_pool,
}


class Training:
    """The step as a function of (carry, batch), where the carry is (parameters, m, v, statistics, number of the step)."""

    def __init__(self, row: Row, flat: bool) -> None:
        missing = [type(layer).__name__ for layer in row.layers if type(layer) not in BUILDERS]
        if missing:
            raise Unsupported(f"bench/libraries/with_jax.py has no line for {missing[0]}")
        self.row = row
        x, y = row.data()
        self.x = jnp.asarray(x.reshape(row.steps, row.batch, *row.input))
        self.y = jnp.asarray(y.reshape(row.steps, row.batch))
        values: Any = [{} for _ in row.layers]
        for name, value in row.parameters().items():
            at, _, own = name.partition(".")
            values[int(at)][own] = jnp.asarray(value)
        self.unflatten: Callable[[Any], Any] = lambda p: p
        if flat:
            values, self.unflatten = ravel_pytree(values)
        zeros = [jax.tree.map(jnp.zeros_like, values) for _ in range(2)]
        statistics = [
            {"mean": jnp.zeros(shape[-1]), "variance": jnp.ones(shape[-1])} if isinstance(layer, kinds.BatchNorm) else None
            for layer, shape in zip(row.layers, row.shapes(), strict=False)
        ]
        self.carry = (values, *zeros, statistics, jnp.zeros((), jnp.int32))
        self.key = jax.random.key(0, impl="rbg")  # the processor's fastest: threefry took longer in trials

    def objective(self, parameters: Any, statistics: Any, key: Any, x: Any, y: Any) -> tuple[Any, Any]:
        """The mean loss of a batch, and new statistics."""
        new = []
        for i, (layer, w, s) in enumerate(zip(self.row.layers, self.unflatten(parameters), statistics, strict=True)):
            own = jax.random.fold_in(key, i) if isinstance(layer, kinds.Dropout) and layer.rate else key
            x, s = BUILDERS[type(layer)](layer, w, s, x, own)
            new.append(s)
        if self.row.loss == "binary_cross_entropy":
            return jnp.mean(jax.nn.softplus(x[:, 0]) - y * x[:, 0]), new
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(x), y[:, None], 1)), new

    def step(self, carry: Any, batch: Any) -> tuple[Any, Any]:
        """Forward, backward, Adam."""
        w, m, v, statistics, t = carry
        key = jax.random.fold_in(self.key, t) if self.row.has_dropout else None
        (loss, statistics), g = jax.value_and_grad(self.objective, has_aux=True)(w, statistics, key, *batch)
        t = t + 1
        c1, c2 = 1 - BETA1 ** t.astype(jnp.float32), 1 - BETA2 ** t.astype(jnp.float32)
        m = jax.tree.map(lambda m, g: BETA1 * m + (1 - BETA1) * g, m, g)
        v = jax.tree.map(lambda v, g: BETA2 * v + (1 - BETA2) * g * g, v, g)
        rate = self.row.learning_rate
        w = jax.tree.map(lambda w, m, v: w - rate * (m / c1) / (jnp.sqrt(v / c2) + EPS), w, m, v)
        return (w, m, v, statistics, t), loss


class Jit(Training):
    """A call a step; the old weights' memory is given to the new ones."""

    def __init__(self, row: Row, flat: bool) -> None:
        super().__init__(row, flat)
        self.run = jax.jit(self.step, donate_argnums=0)
        cut = min(row.steps, 256)  # cutting makes an array a batch; enough of them not to stay in a cache
        self.batches = [(self.x[i], self.y[i]) for i in range(cut)]
        self.at = 0

    def losses(self, steps: int) -> list[float]:
        """Step by step."""
        found = []
        for _ in range(steps):
            self.carry, loss = self.run(self.carry, self.batches[self.at])
            self.at += 1
            found.append(float(loss))
        return found

    def train(self, steps: int) -> tuple[int, float]:
        """Step by step; JAX works behind, so the end is waited for."""
        begun = perf_counter()
        for i in range(steps):
            self.carry, _ = self.run(self.carry, self.batches[i % len(self.batches)])
        jax.block_until_ready(self.carry)
        return steps, perf_counter() - begun


class Scan(Training):
    """All batches of the data in one call."""

    def __init__(self, row: Row, flat: bool) -> None:
        super().__init__(row, flat)
        self.run = jax.jit(lambda carry, x, y: lax.scan(self.step, carry, (x, y)), donate_argnums=0)
        self.found: list[float] = []

    def losses(self, steps: int) -> list[float]:
        """Out of a pass over the data."""
        while len(self.found) < steps:
            self.carry, losses = self.run(self.carry, self.x, self.y)
            self.found += losses.tolist()
        found, self.found = self.found[:steps], self.found[steps:]
        return found

    def train(self, steps: int) -> tuple[int, float]:
        """Whole passes over the data."""
        passes = ceil(steps / self.row.steps)
        begun = perf_counter()
        for _ in range(passes):
            self.carry, _ = self.run(self.carry, self.x, self.y)
        jax.block_until_ready(self.carry)
        return passes * self.row.steps, perf_counter() - begun


def prepare(row: Row, way: str, settings: Settings) -> Trainee:
    """See `bench.libraries`."""
    return (Jit if way == "jit" else Scan)(row, "flat" in way)
