"""JAX: one jitted step a call; a scan over all steps in one call; the same with all parameters in one vector.

Adam is written out: the compiler then fuses it, and no further package is needed. In one vector it is a single loop rather than one
for each parameter, which pays in networks of many small ones.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
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

# Each builder is a function (layer, parameters, statistics, x, key, lengths of sequences or None) -> (y, new statistics).


def dense(layer: kinds.Dense, w: dict[str, Any], s: Any, x: Any, key: Any, n: Any) -> tuple[Any, Any]:
    """φ(x W + b)."""
    return ACTIVATIONS[layer.activation](x @ w["weight"] + w["bias"]), s


def dropout(layer: kinds.Dropout, w: dict[str, Any], s: Any, x: Any, key: Any, n: Any) -> tuple[Any, Any]:
    """Zeros by the key of the step and the layer."""
    if not layer.rate:
        return x, s
    return jnp.where(jax.random.bernoulli(key, 1 - layer.rate, x.shape), x / (1 - layer.rate), 0.0), s


def batch_norm(layer: kinds.BatchNorm, w: dict[str, Any], s: Any, x: Any, key: Any, n: Any) -> tuple[Any, Any]:
    """By the batch; running statistics as in PyTorch."""
    axes, count = tuple(range(x.ndim - 1)), x.size // x.shape[-1]
    mean, variance = jnp.mean(x, axes), jnp.var(x, axes)
    s = {"mean": 0.9 * s["mean"] + 0.1 * mean, "variance": 0.9 * s["variance"] + 0.1 * variance * count / (count - 1)}
    return (x - mean) * lax.rsqrt(variance + 1e-5) * w["scale"] + w["shift"], lax.stop_gradient(s)


def cell(layer: Any, w: dict[str, Any], state: Any, x: Any) -> Any:
    """A step: (h, c), of which RNN and GRU have no c, and x (B, I) -> (h, c). One product for all gates."""
    h, c = state
    of_x = x if project_before(layer) else x @ w["weight_input"] + w["bias"]
    of_h = h @ w["weight_hidden"]
    if type(layer) is kinds.LSTM:
        i, f, g, o = jnp.split(of_x + of_h, 4, -1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return jax.nn.sigmoid(o) * jnp.tanh(c), c
    if type(layer) is kinds.GRU:
        (xr, xz, xn), (hr, hz, hn) = jnp.split(of_x, 3, -1), jnp.split(of_h + w["bias_hidden"], 3, -1)
        r, z = jax.nn.sigmoid(xr + hr), jax.nn.sigmoid(xz + hz)
        return (1 - z) * jnp.tanh(xn + r * hn) + z * h, None
    return jnp.tanh(of_x + of_h), None


def project_before(layer: Any) -> bool:
    """Whether the products with the inputs of all steps are taken at once before the loop. In trials that was faster for RNN (by 20 to
    45 %) and slower for the others (by 10 to 60 %); unrolling the loop by 4 or 10 gained nothing."""
    return type(layer) is kinds.RNN


def loop(layer: Any, w: dict[str, Any], x: Any, n: Any, step: Callable[..., Any]) -> tuple[Any, Any]:
    """A scan over x (T, ..., B, I). Returns the last h and, for a layer that returns sequences, all of them. A step beyond a
    sequence's end keeps the state."""
    shape = (*x.shape[1:-1], layer.units)
    if project_before(layer):
        x = x @ w["weight_input"] + w["bias"]

    def body(state: Any, along: Any) -> tuple[Any, Any]:
        t, x = along
        new = step(w, state, x)
        if n is not None:
            new = jax.tree.map(lambda a, b: jnp.where((t < n)[:, None], a, b), new, state)
        return new, new[0] if layer.return_sequences else None

    zero = jnp.zeros(shape, x.dtype)
    (h, _), every = lax.scan(body, (zero, zero if type(layer) is kinds.LSTM else None), (jnp.arange(len(x)), x))
    return h, every


def recurrent(layer: Any, w: dict[str, Any], s: Any, x: Any, key: Any, n: Any) -> tuple[Any, Any]:
    """From the first step to the last."""
    h, every = loop(layer, w, jnp.swapaxes(x, 0, 1), n, partial(cell, layer))
    return (jnp.swapaxes(every, 0, 1) if layer.return_sequences else h), s


def bidirectional(layer: kinds.Bidirectional, w: dict[str, Any], s: Any, x: Any, key: Any, n: Any) -> tuple[Any, Any]:
    """Both directions in one scan, by products of a batch of two matrices: of four ways the fastest in trials."""
    one: Any = layer.layer
    if n is not None or not one.return_sequences or project_before(one):
        raise Unsupported(
            "bench/libraries/with_jax.py runs GRU and LSTM in two directions, on sequences of one length, for all outputs"
        )
    names = [name.removeprefix("forward.") for name in w if name.startswith("forward.")]
    both = {name: jnp.stack([w[f"forward.{name}"], w[f"backward.{name}"]]) for name in names}
    steps = jnp.swapaxes(x, 0, 1)
    _, every = loop(one, both, jnp.stack([steps, steps[::-1]], 1), None, jax.vmap(partial(cell, one)))
    return jnp.swapaxes(jnp.concatenate([every[:, 0], every[::-1, 1]], -1), 0, 1), s


def conv2d(layer: kinds.Conv2D, w: dict[str, Any], s: Any, x: Any, key: Any, n: Any) -> tuple[Any, Any]:
    """Convolution, channels last."""
    stride, around = (layer.stride,) * 2, [(layer.padding,) * 2] * 2
    y = lax.conv_general_dilated(x, w["weight"], stride, around, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return ACTIVATIONS[layer.activation](y + w["bias"] if layer.bias else y), s


def conv1d(layer: kinds.Conv1D, w: dict[str, Any], s: Any, x: Any, key: Any, n: Any) -> tuple[Any, Any]:
    """Convolution over time, channels last."""
    around = [(layer.padding, layer.padding)]
    y = lax.conv_general_dilated(x, w["weight"], (layer.stride,), around, dimension_numbers=("NWC", "WIO", "NWC"))
    return ACTIVATIONS[layer.activation](y + w["bias"]), s


def max_pool(layer: kinds.MaxPool2D, w: dict[str, Any], s: Any, x: Any, key: Any, n: Any) -> tuple[Any, Any]:
    """The largest of each window."""
    size = (1, layer.size, layer.size, 1)
    return lax.reduce_window(x, -jnp.inf, lax.max, size, size, "VALID"), s


def sequential(layer: kinds.Sequential, w: dict[str, Any], s: Any, x: Any, key: Any, n: Any) -> tuple[Any, Any]:
    """One after the other."""
    new = []
    for i, (part, own) in enumerate(zip(layer.layers, s, strict=True)):
        x, changed = apply(part, part_of(w, str(i)), own, x, None if key is None else jax.random.fold_in(key, i), n)
        new.append(changed)
    return x, new


def residual(layer: kinds.Residual, w: dict[str, Any], s: Any, x: Any, key: Any, n: Any) -> tuple[Any, Any]:
    """A layer and the way around it."""
    made = {name: apply(part, part_of(w, name), s[name], x, key, n) for name, part in layer.parts.items()}
    around = made["projection"][0] if "projection" in made else x
    return around + made["layer"][0], {name: changed for name, (_, changed) in made.items()}


def part_of(w: dict[str, Any], name: str) -> dict[str, Any]:
    """The parameters of a part, by its own names."""
    return {n.removeprefix(f"{name}."): v for n, v in w.items() if n.startswith(f"{name}.")}


BUILDERS: dict[type[kinds.Layer], Callable[..., tuple[Any, Any]]] = {
    kinds.Dense: dense,
    kinds.Activation: lambda layer, w, s, x, key, n: (ACTIVATIONS[layer.activation](x), s),
    kinds.Dropout: dropout,
    kinds.BatchNorm: batch_norm,
    kinds.Flatten: lambda layer, w, s, x, key, n: (x.reshape(x.shape[0], -1), s),
    kinds.RNN: recurrent,
    kinds.GRU: recurrent,
    kinds.LSTM: recurrent,
    kinds.Bidirectional: bidirectional,
    kinds.Conv1D: conv1d,
    kinds.Conv2D: conv2d,
    kinds.MaxPool2D: max_pool,
    kinds.GlobalAvgPool: lambda layer, w, s, x, key, n: (jnp.mean(x, (1, 2)), s),
    kinds.Sequential: sequential,
    kinds.Residual: residual,
}


def apply(layer: kinds.Layer, w: dict[str, Any], s: Any, x: Any, key: Any, n: Any) -> tuple[Any, Any]:
    """A layer by its kind."""
    return BUILDERS[type(layer)](layer, w, s, x, key, n)


def statistics_of(layer: kinds.Layer, shape: kinds.Shape) -> Any:
    """What it has measured before it has seen anything. Layers of no known kind are found here.

    Raises: `Unsupported` for those.
    """
    if type(layer) not in BUILDERS:
        raise Unsupported(f"bench/libraries/with_jax.py has no line for {type(layer).__name__}")
    if isinstance(layer, kinds.Sequential):
        return [statistics_of(part, own) for part, own in zip(layer.layers, layer.shapes(shape), strict=False)]
    if isinstance(layer, kinds.Residual):
        return {name: statistics_of(part, shape) for name, part in layer.parts.items()}
    if isinstance(layer, kinds.BatchNorm):
        return {"mean": jnp.zeros(shape[-1]), "variance": jnp.ones(shape[-1])}
    return None


class Training:
    """The step as a function of (carry, batch), where the carry is (parameters, m, v, statistics, number of the step)."""

    def __init__(self, row: Row, flat: bool) -> None:
        self.row, statistics = row, statistics_of(row.network, row.input)
        given = (*row.data(), row.lengths())  # of a batch: x, y, and lengths, if sequences have any
        self.data = tuple(jnp.asarray(a.reshape(row.steps, row.batch, *a.shape[1:])) for a in given if a is not None)
        values: Any = {name: jnp.asarray(value) for name, value in row.parameters().items()}
        self.unflatten: Callable[[Any], Any] = lambda p: p
        if flat:
            values, self.unflatten = ravel_pytree(values)
        zeros = [jax.tree.map(jnp.zeros_like, values) for _ in range(2)]
        self.carry = (values, *zeros, statistics, jnp.zeros((), jnp.int32))
        self.key = jax.random.key(0, impl="rbg")  # the processor's fastest: threefry took longer in trials

    def objective(self, parameters: Any, statistics: Any, key: Any, x: Any, y: Any, n: Any = None) -> tuple[Any, Any]:
        """The mean loss of a batch, and new statistics."""
        x, new = apply(self.row.network, self.unflatten(parameters), statistics, x, key, n)
        if self.row.loss == "binary_cross_entropy":
            return jnp.mean(jax.nn.softplus(x[:, 0]) - y * x[:, 0]), new
        if self.row.loss == "mse":
            return jnp.mean((x.reshape(y.shape) - y) ** 2), new
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(x), y[..., None], -1)), new

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
        self.batches = [tuple(a[i] for a in self.data) for i in range(cut)]
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
    """All batches of the data in one call, or as many as the row says."""

    def __init__(self, row: Row, flat: bool) -> None:
        super().__init__(row, flat)
        self.run = jax.jit(lambda carry, batches: lax.scan(self.step, carry, batches), donate_argnums=0)
        starts = range(0, row.steps, row.call)
        self.parts = [tuple(a[i : i + row.call] for a in self.data) for i in starts] if len(starts) > 1 else [self.data]
        self.at = 0
        self.found: list[float] = []

    def losses(self, steps: int) -> list[float]:
        """Out of calls."""
        while len(self.found) < steps:
            self.found += self._call().tolist()
        found, self.found = self.found[:steps], self.found[steps:]
        return found

    def train(self, steps: int) -> tuple[int, float]:
        """Whole calls."""
        calls = ceil(steps / self.row.call)
        begun = perf_counter()
        for _ in range(calls):
            self._call()
        jax.block_until_ready(self.carry)
        return calls * self.row.call, perf_counter() - begun

    def _call(self) -> Any:
        self.carry, losses = self.run(self.carry, self.parts[self.at])
        self.at = (self.at + 1) % len(self.parts)
        return losses


def prepare(row: Row, way: str, settings: Settings) -> Trainee:
    """See `bench.libraries`."""
    return (Jit if way == "jit" else Scan)(row, "flat" in way)
