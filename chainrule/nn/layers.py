"""The layers of feedforward networks.

In: arrays with the rows of a batch first. Out: the same. To add a layer, write a class and put `@layers.declare("name")` above it:
saving, the reference tables and the tests find it there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from math import prod
from typing import Any

import numpy as np

from .. import initializers
from ..errors import ShapeError, UsageError
from ..graph.trace import located
from ..ops import random
from ..ops.index import lookup
from ..ops.reduce import standardize
from .module import Module, activation_of, positive
from .saving import layers


@layers.declare("Dense")
class Dense(Module):
    """A dense layer: every output sees every input.

    y = φ(x W + b)

    Args: units O; activation φ: a name, any function, None for none; init: of the weight, by default he_uniform for relu and its
    kin, lecun_normal for selu, glorot_uniform otherwise; bias: whether there is a b, which starts at 0.
    Shapes: x (B, ..., I), weight (I, O), bias (O,), y (B, ..., O).
    Source: Rumelhart, Hinton, Williams, "Learning representations by back-propagating errors", Nature 323, 1986.

    >>> Dense(2, "relu")
    Dense(2, 'relu')
    """

    examples = (
        {"args": (3, "tanh"), "input": (4, 5)},
        {"args": (2,), "input": (2, 3, 4)},
        {"args": (2, "gelu", "orthogonal", False), "input": (4, 3)},
    )

    def __init__(self, units: int, activation: Any = None, init: Any = None, bias: bool = True) -> None:
        self.units = positive(units, "Dense: units")
        self.activation = activation_of(activation)
        self.init = initializers.resolve(init if init is not None else suited(activation))
        self.bias = bias

    def __call__(self, x: Any) -> Any:
        if x.ndim < 2:
            raise ShapeError(
                located(f"Dense needs rows of features, shape (B, ..., I); it got {x.shape}: give a column as x[:, None]")
            )
        z = x @ self.parameter("weight", (x.shape[-1], self.units), self.init)
        if self.bias:
            z = z + self.parameter("bias", (self.units,), "zeros")
        return self.activation(z)


def suited(activation: Any) -> str:
    """The initializer that keeps the variance of signals for this activation (He et al. 2015; Klambauer et al. 2017)."""
    if activation in ("relu", "leaky_relu", "elu", "gelu", "silu", "mish"):
        return "he_uniform"
    return "lecun_normal" if activation == "selu" else "glorot_uniform"


@layers.declare("Activation")
class Activation(Module):
    """y = φ(x), for a φ by name or any function of one array.

    >>> Activation("tanh")
    Activation('tanh')
    """

    examples = ({"args": ("softplus",), "input": (4, 3)},)

    def __init__(self, activation: Any) -> None:
        self.activation = activation_of(activation)

    def __call__(self, x: Any) -> Any:
        return self.activation(x)


@layers.declare("Dropout")
class Dropout(Module):
    """In training sets each element to 0 with probability `rate` and divides the others by 1 - rate; else passes x on.

    y = x m / (1 - rate), m ~ Bernoulli(1 - rate), drawn anew in each step

    Args: rate in [0, 1). Shapes: any.
    Source: Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting", JMLR 15, 2014 (section 10: the
    scaling in training).

    >>> Dropout(0.5)
    Dropout(0.5)
    """

    examples = ({"args": (0.5,), "input": (4, 6)},)

    def __init__(self, rate: float) -> None:
        self.rate = rate_of(rate, "Dropout: the rate")

    def __call__(self, x: Any) -> Any:
        if not self.training or self.rate == 0:
            return x
        kept = random.bernoulli(x.shape, 1 - self.rate)
        return np.where(kept, x * (1 / (1 - self.rate)), 0.0)


@layers.declare("BatchNorm")
class BatchNorm(Module):
    """Normalises each feature by the mean and variance of the batch, then scales and shifts it.

    y = (x - μ) / sqrt(σ² + eps) · scale + shift; in training μ and σ² are those of the batch, over all axes but the last, and the
    running statistics move: r ← (1 - momentum) r + momentum · (μ, or the unbiased σ² n / (n - 1)); else the running ones are used.

    Args: momentum 0.1, eps 1e-5, as in PyTorch. Shapes: x (B, ..., C), of any number of axes: images and sequences have one mean for
    each channel; scale, shift, mean, variance (C,).
    Source: Ioffe & Szegedy, "Batch normalization", ICML 2015, algorithms 1 and 2.
    Differs: a frozen layer uses its running statistics in training too, and they stay.

    >>> BatchNorm()
    BatchNorm()
    """

    examples = ({"args": (), "input": (5, 3)}, {"args": (0.3, 1e-3), "input": (3, 2, 4)})

    def __init__(self, momentum: float = 0.1, eps: float = 1e-5) -> None:
        if not 0 < momentum <= 1 or not eps > 0:
            raise UsageError(f"BatchNorm: momentum must lie in (0, 1] and eps above 0, not {momentum!r} and {eps!r}")
        self.momentum, self.eps = float(momentum), float(eps)

    def __call__(self, x: Any) -> Any:
        channels = (x.shape[-1],)
        mean, variance = self.statistic("mean", channels, 0.0), self.statistic("variance", channels, 1.0)
        if self.training and not self.frozen:
            axes = tuple(range(x.ndim - 1))
            count = prod(x.shape[:-1])
            if count < 2:
                raise ShapeError(located(
                    f"BatchNorm needs at least 2 values of each feature in a training batch, got shape {x.shape}; "
                    "choose a batch_size that leaves no single row over"
                ))  # fmt: skip
            m, deviation = self.momentum, x - np.mean(x, axis=axes, keepdims=True)
            self.update("mean", (1 - m) * mean + m * np.mean(x, axis=axes))
            self.update("variance", (1 - m) * variance + m * (np.sum(deviation * deviation, axis=axes) / (count - 1)))
            y = standardize(x, axes=axes, eps=self.eps)
        else:
            y = (x - mean) / np.sqrt(variance + self.eps)
        return y * self.parameter("scale", channels, "ones") + self.parameter("shift", channels, "zeros")


@layers.declare("LayerNorm")
class LayerNorm(Module):
    """Normalises each row by its own mean and variance over the last axis, then scales and shifts it.

    y = (x - μ) / sqrt(σ² + eps) · scale + shift

    Args: eps 1e-5, as in PyTorch. Shapes: x (B, ..., C); scale, shift (C,).
    Source: Ba, Kiros, Hinton, "Layer normalization", 2016, eq. 3 and 4.

    >>> LayerNorm()
    LayerNorm()
    """

    examples = ({"args": (), "input": (4, 5)},)

    def __init__(self, eps: float = 1e-5) -> None:
        if not eps > 0:
            raise UsageError(f"LayerNorm: eps must be above 0, not {eps!r}")
        self.eps = float(eps)

    def __call__(self, x: Any) -> Any:
        y = standardize(x, axes=(x.ndim - 1,), eps=self.eps)
        return y * self.parameter("scale", (x.shape[-1],), "ones") + self.parameter("shift", (x.shape[-1],), "zeros")


@layers.declare("Flatten")
class Flatten(Module):
    """All axes of a row as one: (B, ...) -> (B, N).

    >>> Flatten()
    Flatten()
    """

    examples = ({"args": (), "input": (3, 2, 4)},)

    def __call__(self, x: Any) -> Any:
        return np.reshape(x, (x.shape[0], prod(x.shape[1:])))


@layers.declare("Reshape")
class Reshape(Module):
    """Rows in another shape: (B, ...) -> (B, *shape). One length may be -1. `shape` is that of a row, without the batch.

    >>> Reshape(8, 8)
    Reshape(8, 8)
    """

    examples = ({"args": (2, 3), "input": (4, 6)}, {"args": ((-1, 2),), "input": (4, 6)})

    def __init__(self, *shape: Any) -> None:
        sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
        if (
            any(isinstance(n, bool) or not isinstance(n, (int, np.integer)) or (n < 1 and n != -1) for n in sizes)
            or list(sizes).count(-1) > 1
        ):
            raise UsageError(f"Reshape: lengths of at least 1, one of them perhaps -1, not {sizes!r}")
        self.shape = tuple(int(n) for n in sizes)

    def __call__(self, x: Any) -> Any:
        size, known = prod(x.shape[1:]), prod(n for n in self.shape if n != -1)
        full = tuple(size // known if n == -1 else n for n in self.shape)
        if prod(full) != size:
            raise ShapeError(
                located(f"Reshape: a row of shape {x.shape[1:]} ({size} numbers) cannot take the shape {self.shape}")
            )
        return np.reshape(x, (x.shape[0], *full))


@layers.declare("Embedding")
class Embedding(Module):
    """A row of a table for each integer: words, categories.

    y[b, ...] = weight[x[b, ...]]

    Args: entries N: integers 0..N-1 are allowed, others are refused; units O; init normal(0.05).
    Shapes: x (B, ...) of integers, weight (N, O), y (B, ..., O).
    Source: Bengio et al., "A neural probabilistic language model", JMLR 3, 2003, section 2.

    >>> Embedding(10, 4)
    Embedding(10, 4)
    """

    examples = ({"args": (7, 3), "input": (4, 2), "below": 7},)

    def __init__(self, entries: int, units: int, init: Any = "normal") -> None:
        self.entries, self.units = positive(entries, "Embedding: entries"), positive(units, "Embedding: units")
        self.init = initializers.resolve(init)

    def __call__(self, x: Any) -> Any:
        if x.dtype.kind not in "iu":
            raise ShapeError(
                located(
                    f"Embedding needs integers 0..{self.entries - 1}, not {x.dtype}; it must be the first layer, on integer data"
                )
            )
        return lookup(self.parameter("weight", (self.entries, self.units), self.init), x)


@layers.declare("Residual")
class Residual(Module):
    """A layer beside a way around it: y = x + layer(x), or y = projection(x) + layer(x).

    Args: layer; projection: a layer for the way around, where `layer` changes the shape: of images `Conv2D(filters, 1, stride)`,
    of rows `Dense(units)`.
    Shapes: x any; layer(x) of x's shape, or of that of projection(x).
    Raises: `ShapeError` if the two differ in shape.
    Source: He et al., "Deep residual learning for image recognition", CVPR 2016, eq. 1 and 2. Differs: no activation after the sum;
    let `Activation` follow, or none (He et al., "Identity mappings in deep residual networks", ECCV 2016).

    >>> Residual(Dense(4))
    Residual(Dense(4))
    >>> Residual(Dense(4, "relu"), Dense(4, bias=False))
    Residual(Dense(4, 'relu'), Dense(4, bias=False))
    """

    examples = ({"args": (Dense(5, "tanh"),), "input": (3, 5)}, {"args": (Dense(2, "tanh"), Dense(2)), "input": (3, 5)})

    def __init__(self, layer: Module, projection: Module | None = None) -> None:
        self.layer = layer_of(layer, "Residual")
        self.projection = None if projection is None else layer_of(projection, "Residual: projection")

    def __call__(self, x: Any) -> Any:
        y = self.layer(x)
        if self.projection is None:
            if y.shape != x.shape:
                raise ShapeError(located(
                    f"Residual: its layer turned shape {x.shape} into {y.shape}; to be added to x it must keep the shape, or a projection "
                    f"must give x the same one: Residual(layer, {_projection(x.shape, y.shape)})"
                ))  # fmt: skip
            return x + y
        way = self.projection(x)
        if y.shape != way.shape:
            raise ShapeError(located(
                f"Residual: its layer turned shape {x.shape} into {y.shape}, its projection into {way.shape}; to be added they must agree"
            ))  # fmt: skip
        return way + y


def _projection(shape: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    """A layer that turns one shape into the other, if there is an obvious one."""
    if shape[:-1] == wanted[:-1]:
        return f"Dense({wanted[-1]}, bias=False)"
    spatial = len(shape) - 2
    if len(shape) != len(wanted) or spatial not in (1, 2):
        return "projection"
    strides = tuple(-(-n // m) for n, m in zip(shape[1:-1], wanted[1:-1], strict=True))
    if any(-(-n // s) != m for n, s, m in zip(shape[1:-1], strides, wanted[1:-1], strict=True)):
        return "projection"
    return f"Conv{spatial}D({wanted[-1]}, 1, stride={strides[0] if len(set(strides)) == 1 else strides}, bias=False)"


@layers.declare("Sequential")
class Sequential(Module, overrides=["_children"]):
    """Layers one after the other. A function of one array may stand among them. Parameters are named by position: "2.weight".

    >>> net = Sequential(Dense(8, "relu"), Dense(1))
    >>> net[0]
    Dense(8, 'relu')
    """

    examples = ({"args": (Dense(4, "tanh"), Dense(2)), "input": (3, 5)},)

    def __init__(self, *layers: Module | Callable[[Any], Any]) -> None:
        parts: Iterable[Any] = layers[0] if len(layers) == 1 and isinstance(layers[0], (list, tuple)) else layers
        self.layers = [layer_of(part, "Sequential") if not _is_function(part) else Activation(part) for part in parts]

    def _children(self) -> Iterator[tuple[str, Module]]:
        return ((str(i), layer) for i, layer in enumerate(self.layers))

    def __call__(self, x: Any) -> Any:
        for layer in self.layers:
            x = layer(x)
        return x

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, index: int) -> Module:
        return self.layers[index]

    def __iter__(self) -> Iterator[Module]:
        return iter(self.layers)


def _is_function(part: Any) -> bool:
    return callable(part) and not isinstance(part, (Module, type))


def layer_of(part: Any, where: str) -> Module:
    """A layer to be held by another one.

    Raises: `UsageError` for anything else.
    """
    if isinstance(part, type) and issubclass(part, Module):
        raise UsageError(f"{where} got the class {part.__name__}, not a layer: write {part.__name__}(...)")
    if not isinstance(part, Module):
        raise UsageError(f"{where} takes layers, not {part!r}")
    return part


def rate_of(value: Any, what: str) -> float:
    """A share of elements to be dropped."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)) or not 0 <= value < 1:
        raise UsageError(f"{what} must be at least 0 and less than 1, not {value!r}")
    return float(value)
