"""The networks that are measured.

In: nothing. Out: `ROWS`, and for each row its data and initial weights, pure functions of its declaration: every process makes
the same ones by itself.

Targets are random, so that no network ever learns them: a network that has learnt has vanishing gradients, and then measures how a
library treats denormal numbers.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import numpy as np

from .layers import Activation, BatchNorm, Dense, Dropout, Layer, Shape

Array = np.ndarray[Any, np.dtype[Any]]
CHECKED_STEPS = 20  # steps over which the losses of all libraries must agree


def random_classes(row: Row, random: np.random.Generator) -> tuple[Array, Array]:
    """Normal inputs and classes that have nothing to do with them; 0 or 1 for one output."""
    classes = max(row.shapes()[-1][-1], 2)
    n = row.batch * row.steps
    return random.standard_normal((n, *row.input), dtype=np.float32), random.integers(0, classes, n)


def xor(row: Row, random: np.random.Generator) -> tuple[Array, Array]:
    """The four rows of XOR in each batch, one answer in four of them wrong."""
    x = np.array([[0, 0], [0, 1], [1, 0], [1, 1]], np.float32)
    right = np.tile(np.array([0, 1, 1, 0]), row.steps)
    return np.tile(x, (row.steps, 1)), np.where(random.random(len(right)) < 0.25, 1 - right, right)


@dataclass(frozen=True)
class Row:
    """A network and how it is trained: Adam, batches in the order of the data.

    name: for the command line; title: for the table; input: the shape of a row of data; steps: batches that the data holds (at least
    `CHECKED_STEPS`; all libraries go through them again and again); loss: "cross_entropy" or "binary_cross_entropy"; least, aim:
    how many times faster than the best peer chainrule must and should be (None: not said); tolerance: how far losses of the first
    steps may lie from the median of all libraries, relative to 1 + |loss|. Rounding parts them, for Adam turns the sign of a gradient
    that is all but 0 into a whole step: by 1e-7 to 5e-5 here, and by 5e-4 where the network is wide and the rate high for it. A
    learning rate that is wrong by 2 % parts them by 1e-4 to 5e-4 (wide: 1e-2).
    """

    name: str
    title: str
    input: Shape
    layers: tuple[Layer, ...]
    batch: int
    steps: int
    loss: str = "cross_entropy"
    least: float | None = None
    aim: float | None = None
    learning_rate: float = 1e-3
    tolerance: float = 1e-4
    make_data: Callable[[Row, np.random.Generator], tuple[Array, Array]] = field(default=random_classes, repr=False)

    def __post_init__(self) -> None:
        if self.steps < CHECKED_STEPS:
            raise ValueError(f"row {self.name}: {self.steps} batches of data, but losses are checked over {CHECKED_STEPS} steps")

    def shapes(self) -> list[Shape]:
        """The shape of a row of data before each layer and after the last."""
        shapes = [self.input]
        for layer in self.layers:
            shapes.append(layer.outputs(shapes[-1]))
        return shapes

    def random(self, purpose: str) -> np.random.Generator:
        """A generator for one purpose of this row."""
        return np.random.default_rng([zlib.crc32(self.name.encode()), zlib.crc32(purpose.encode())])

    def data(self) -> tuple[Array, Array]:
        """x (steps * batch, *input) float32, y (steps * batch,) int64."""
        return self.make_data(self, self.random("data"))

    def parameters(self) -> dict[str, Array]:
        """Initial values by chainrule's names, "0.weight". Matrices are normal with variance 1 / fan-in; biases 0; scales 1."""
        random, values = self.random("parameters"), {}
        for i, (layer, shape) in enumerate(zip(self.layers, self.shapes(), strict=False)):
            for name, size in layer.parameters(shape).items():
                if len(size) > 1:
                    value = random.standard_normal(size, dtype=np.float32) / np.float32(prod(size[:-1]) ** 0.5)
                else:
                    value = np.full(size, name == "scale", np.float32)
                values[f"{i}.{name}"] = value
        return values

    @property
    def parameter_count(self) -> int:
        """How many numbers are trained."""
        pairs = zip(self.layers, self.shapes(), strict=False)
        return sum(prod(size) for layer, shape in pairs for size in layer.parameters(shape).values())

    @property
    def flops(self) -> float:
        """Floating-point operations that the products of a training step need (see `Work`); the optimizer counts nothing."""
        total, first = 0.0, True
        for layer, shape in zip(self.layers, self.shapes(), strict=False):
            work = layer.work(shape)
            total += work.forward + work.weights + work.through + (0.0 if first else work.inputs)
            first = first and not layer.parameters(shape)
        return total * self.batch

    @property
    def has_dropout(self) -> bool:
        """Whether losses depend on random numbers, which differ between libraries."""
        return any(isinstance(layer, Dropout) and layer.rate for layer in self.layers)

    def comparable(self) -> Row:
        """The same network with all dropout rates 0: its losses can be compared."""
        return replace(self, layers=tuple(Dropout(0.0) if isinstance(layer, Dropout) else layer for layer in self.layers))


def dense(sizes: Sequence[int], activation: str) -> tuple[Layer, ...]:
    """Dense layers with this activation after all but the last."""
    return (*(Dense(n, activation) for n in sizes[:-1]), Dense(sizes[-1]))


def normalised(units: int) -> tuple[Layer, ...]:
    """A dense layer with batch norm, relu and dropout."""
    return Dense(units), BatchNorm(), Activation("relu"), Dropout(0.2)


BINARY = "binary_cross_entropy"

ROWS: tuple[Row, ...] = (
    Row("xor", "XOR 2-8-1 tanh, batch 4", (2,), dense([8, 1], "tanh"), 4, 20_000, BINARY, 20, 35, make_data=xor),
    Row("digits", "digits 64-128-10 relu, batch 32", (64,), dense([128, 10], "relu"), 32, 1000, least=3, aim=4),
    Row("shallow", "wide and shallow 20-256-1 tanh, batch 64", (20,), dense([256, 1], "tanh"), 64, 1000, BINARY, 2.5, 3.5),
    Row("deep", "deep and narrow 32-(32)x10-1 tanh, batch 32", (32,), dense([32] * 10 + [1], "tanh"), 32, 1000, BINARY, 4, 6),
    Row("mnist", "MNIST 784-256-128-10 relu, batch 128", (784,), dense([256, 128, 10], "relu"), 128, 64, least=1.5, aim=1.8),
    Row("mnist-norm", "the same with batch norm and dropout 0.2", (784,), (*normalised(256), *normalised(128), Dense(10)), 128, 64,
        least=1.5, aim=2),
    Row("wide", "wide 1024-1024-1024-1024-10 relu, batch 256", (1024,), dense([1024] * 3 + [10], "relu"), 256, 20, least=1.1, aim=1.3,
        tolerance=2e-3),
)  # fmt: skip

WIDTHS: tuple[Row, ...] = tuple(
    Row(f"width-{n}", f"64-{n}-{n}-10 relu, batch 64", (64,), dense([n, n, 10], "relu"), 64, 400)
    for n in (8, 16, 32, 64, 128, 256, 512)
)

ALL_ROWS: dict[str, Row] = {row.name: row for row in (*ROWS, *WIDTHS)}
