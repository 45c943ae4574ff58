"""Kinds of layers, for all libraries alike.

In: the shape of a row of input. Out: the shape of a row of output, the parameters with their shapes, the floating-point operations.
Class names, fields and parameter names are those of `chainrule.nn`, so chainrule needs no table of kinds; every other library has one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Work:
    """Floating-point operations for one row; a multiply-add counts as 2. Elementwise and elementary functions count nothing.

    forward: of the forward pass; weights: of the gradient by the weights; through: of the gradient that stays in the layer (through
    time, or between its own layers); inputs: of the gradient by the input, which the first layer with parameters is spared.
    """

    forward: float = 0.0
    weights: float = 0.0
    through: float = 0.0
    inputs: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.forward + other.forward, self.weights + other.weights, self.through + other.through, self.inputs + other.inputs
        )


@dataclass(frozen=True)
class Layer:
    """A layer without parameters that keeps the shape, unless a subclass says otherwise."""

    def outputs(self, shape: Shape) -> Shape:
        """The shape of a row of output."""
        return shape

    def parameters(self, shape: Shape) -> dict[str, Shape]:
        """Name -> shape, in the order in which the libraries hold them."""
        return {}

    def work(self, shape: Shape) -> Work:
        """Operations for one row."""
        return Work()


@dataclass(frozen=True)
class Dense(Layer):
    """φ(x W + b) over the last axis."""

    units: int
    activation: str | None = None

    def outputs(self, shape: Shape) -> Shape:
        """The last axis becomes `units`."""
        return (*shape[:-1], self.units)

    def parameters(self, shape: Shape) -> dict[str, Shape]:
        """weight (I, O), bias (O,)."""
        return {"weight": (shape[-1], self.units), "bias": (self.units,)}

    def work(self, shape: Shape) -> Work:
        """Three products of the same size."""
        each = 2.0 * prod(shape) * self.units
        return Work(each, each, 0.0, each)


@dataclass(frozen=True)
class TwoInputs(Layer):
    """Two inputs, each through a layer of its own, side by side: the first `at` features are one, the others the second. Only
    chainrule's adapter has it, as a layer written by hand."""

    first: Layer
    second: Layer
    at: int

    def outputs(self, shape: Shape) -> Shape:
        """As long as both together."""
        (first,), (second,) = (layer.outputs(part) for layer, part in self._parts(shape))
        return (first + second,)

    def parameters(self, shape: Shape) -> dict[str, Shape]:
        """first.weight, ..., second.weight, ..."""
        names = zip(("first", "second"), self._parts(shape), strict=True)
        return {f"{side}.{n}": size for side, (layer, part) in names for n, size in layer.parameters(part).items()}

    def work(self, shape: Shape) -> Work:
        """That of both."""
        a, b = (layer.work(part) for layer, part in self._parts(shape))
        return a + b

    def _parts(self, shape: Shape) -> tuple[tuple[Layer, Shape], tuple[Layer, Shape]]:
        return (self.first, (self.at,)), (self.second, (shape[0] - self.at,))


@dataclass(frozen=True)
class Activation(Layer):
    """φ(x)."""

    activation: str


@dataclass(frozen=True)
class Dropout(Layer):
    """Drops elements with this probability."""

    rate: float


@dataclass(frozen=True)
class BatchNorm(Layer):
    """Normalises each feature by the batch; momentum 0.1 and eps 1e-5, as everywhere."""

    def parameters(self, shape: Shape) -> dict[str, Shape]:
        """scale (C,), shift (C,)."""
        return {"scale": shape[-1:], "shift": shape[-1:]}


@dataclass(frozen=True)
class Flatten(Layer):
    """A row as one axis."""

    def outputs(self, shape: Shape) -> Shape:
        """One axis."""
        return (prod(shape),)


@dataclass(frozen=True)
class _Recurrent(Layer):
    units: int
    return_sequences: bool = False

    def outputs(self, shape: Shape) -> Shape:
        """(T, H) or the last (H,)."""
        return (shape[0], self.units) if self.return_sequences else (self.units,)

    @property
    def gates(self) -> int:
        """How many products of size H a step consists of."""
        return {"RNN": 1, "GRU": 3, "LSTM": 4}[type(self).__name__]

    def parameters(self, shape: Shape) -> dict[str, Shape]:
        """weight_input (I, G H), weight_hidden (H, G H), bias (G H,)."""
        width = self.gates * self.units
        return {"weight_input": (shape[-1], width), "weight_hidden": (self.units, width), "bias": (width,)}

    def work(self, shape: Shape) -> Work:
        """Products with the input and with the state, at each of the T steps."""
        T, I = shape
        outer, inner = (2.0 * T * n * self.gates * self.units for n in (I, self.units))
        return Work(outer + inner, outer + inner, inner, outer)


@dataclass(frozen=True)
class RNN(_Recurrent):
    """h ← tanh(x Wx + h Wh + b)."""


@dataclass(frozen=True)
class LSTM(_Recurrent):
    """Gates i, f, g, o, as in PyTorch, with one bias."""


@dataclass(frozen=True)
class GRU(_Recurrent):
    """Gates r, z, n, as in PyTorch: the reset gate acts on h Wh + bias_hidden."""

    def parameters(self, shape: Shape) -> dict[str, Shape]:
        """With bias_hidden (3 H,) besides."""
        return {**super().parameters(shape), "bias_hidden": (3 * self.units,)}


@dataclass(frozen=True)
class Bidirectional(Layer):
    """A recurrent layer from the first step to the last and another from the last to the first, side by side."""

    layer: Layer

    def outputs(self, shape: Shape) -> Shape:
        """The last axis twice as long."""
        *outer, units = self.layer.outputs(shape)
        return (*outer, 2 * units)

    def parameters(self, shape: Shape) -> dict[str, Shape]:
        """forward.weight_input, ..., backward.weight_input, ..."""
        own = self.layer.parameters(shape)
        return {f"{direction}.{name}": size for direction in ("forward", "backward") for name, size in own.items()}

    def work(self, shape: Shape) -> Work:
        """Twice that of one direction."""
        one = self.layer.work(shape)
        return one + one


@dataclass(frozen=True)
class Conv2D(Layer):
    """Convolution of (H, W, C) with `padding` zeros on all sides, every `stride`-th window along both axes, then φ."""

    filters: int
    kernel: int
    stride: int = 1
    padding: int = 0
    activation: str | None = None
    bias: bool = True

    def outputs(self, shape: Shape) -> Shape:
        """As many windows as fit."""
        height, width = ((n + 2 * self.padding - self.kernel) // self.stride + 1 for n in shape[:2])
        return (height, width, self.filters)

    def parameters(self, shape: Shape) -> dict[str, Shape]:
        """weight (k, k, I, O) and, unless it has none, bias (O,)."""
        named: dict[str, Shape] = {"weight": (self.kernel, self.kernel, shape[-1], self.filters)}
        return {**named, "bias": (self.filters,)} if self.bias else named

    def work(self, shape: Shape) -> Work:
        """Three products of the same size."""
        each = 2.0 * prod(self.outputs(shape)) * self.kernel**2 * shape[-1]
        return Work(each, each, 0.0, each)


@dataclass(frozen=True)
class Conv1D(Layer):
    """Convolution of (T, C) with `padding` zeros at both ends, every `stride`-th window, then φ."""

    filters: int
    kernel: int
    stride: int = 1
    padding: int = 0
    activation: str | None = None

    def outputs(self, shape: Shape) -> Shape:
        """As many windows as fit."""
        return ((shape[0] + 2 * self.padding - self.kernel) // self.stride + 1, self.filters)

    def parameters(self, shape: Shape) -> dict[str, Shape]:
        """weight (k, I, O), bias (O,)."""
        return {"weight": (self.kernel, shape[-1], self.filters), "bias": (self.filters,)}

    def work(self, shape: Shape) -> Work:
        """Three products of the same size."""
        each = 2.0 * prod(self.outputs(shape)) * self.kernel * shape[-1]
        return Work(each, each, 0.0, each)


@dataclass(frozen=True)
class MaxPool2D(Layer):
    """The largest of each `size` x `size` elements."""

    size: int = 2

    def outputs(self, shape: Shape) -> Shape:
        """Smaller by `size`."""
        return (shape[0] // self.size, shape[1] // self.size, shape[2])


@dataclass(frozen=True)
class GlobalAvgPool(Layer):
    """The mean of each channel of (H, W, C)."""

    def outputs(self, shape: Shape) -> Shape:
        """The channels."""
        return shape[-1:]


@dataclass(frozen=True)
class Sequential(Layer):
    """Layers one after the other."""

    layers: tuple[Layer, ...]

    def shapes(self, shape: Shape) -> list[Shape]:
        """The shape of a row before each layer and after the last."""
        shapes = [shape]
        for layer in self.layers:
            shapes.append(layer.outputs(shapes[-1]))
        return shapes

    def outputs(self, shape: Shape) -> Shape:
        """The last layer's."""
        return self.shapes(shape)[-1]

    def parameters(self, shape: Shape) -> dict[str, Shape]:
        """0.weight, ..., 1.scale, ..."""
        each = enumerate(zip(self.layers, self.shapes(shape), strict=False))
        return {f"{i}.{name}": size for i, (layer, own) in each for name, size in layer.parameters(own).items()}

    def work(self, shape: Shape) -> Work:
        """That of all. Only the gradient by the input of the first layer with parameters is one by the network's input."""
        total, first = Work(), True
        for layer, own in zip(self.layers, self.shapes(shape), strict=False):
            work = layer.work(own)
            total += work if first else replace(work, through=work.through + work.inputs, inputs=0.0)
            first = first and not layer.parameters(own)
        return total


@dataclass(frozen=True)
class Residual(Layer):
    """projection(x) + layer(x), without a projection x + layer(x)."""

    layer: Layer
    projection: Layer | None = None

    def outputs(self, shape: Shape) -> Shape:
        """The layer's."""
        return self.layer.outputs(shape)

    def parameters(self, shape: Shape) -> dict[str, Shape]:
        """layer.0.weight, ..., projection.0.weight, ..."""
        return {f"{name}.{n}": size for name, part in self.parts.items() for n, size in part.parameters(shape).items()}

    def work(self, shape: Shape) -> Work:
        """That of both."""
        return sum((part.work(shape) for part in self.parts.values()), Work())

    @property
    def parts(self) -> dict[str, Layer]:
        """What is added up, by name; where there is no projection, the layer alone."""
        return {"layer": self.layer} if self.projection is None else {"layer": self.layer, "projection": self.projection}
