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

from .layers import (
    GRU,
    LSTM,
    RNN,
    Activation,
    BatchNorm,
    Bidirectional,
    Conv1D,
    Conv2D,
    Dense,
    Dropout,
    Flatten,
    GlobalAvgPool,
    Layer,
    MaxPool2D,
    Residual,
    Sequential,
    Shape,
    TwoInputs,
)

Array = np.ndarray[Any, np.dtype[Any]]
CHECKED_STEPS = 20  # steps over which the losses of all libraries must agree


def random_targets(row: Row, random: np.random.Generator) -> tuple[Array, Array]:
    """Normal inputs, and targets that have nothing to do with them: normal numbers for mse, else classes; 0 or 1 for one output."""
    *outer, outputs = row.shapes()[-1]
    x = random.standard_normal((row.batch * row.steps, *row.input), dtype=np.float32)
    shape = (len(x), *outer)
    if row.loss == "mse":
        return x, random.standard_normal(shape if outputs == 1 else (*shape, outputs), dtype=np.float32)
    return x, random.integers(0, max(outputs, 2), shape)


def xor(row: Row, random: np.random.Generator) -> tuple[Array, Array]:
    """The four rows of XOR in each batch, one answer in four of them wrong."""
    x = np.array([[0, 0], [0, 1], [1, 0], [1, 1]], np.float32)
    right = np.tile(np.array([0, 1, 1, 0]), row.steps)
    return np.tile(x, (row.steps, 1)), np.where(random.random(len(right)) < 0.25, 1 - right, right)


@dataclass(frozen=True)
class Row:
    """A network and how it is trained: Adam, batches in the order of the data.

    name: for the command line; title: for the table; input: the shape of a row of data; steps: batches that the data holds (at least
    `CHECKED_STEPS` where losses are compared; all libraries go through them again and again); loss: "cross_entropy",
    "binary_cross_entropy" or "mse"; least, aim: how many times faster than the best peer chainrule must and should be (None: not
    said); tolerance: how far losses of the first steps may lie from the median of all libraries, relative to 1 + |loss|. Rounding
    parts them, for Adam turns the sign of a gradient that is all but 0 into a whole step: by 1e-7 to 5e-5 here, by 1.4e-4 in the
    residual network, and by 5e-4 where the network is wide and the rate high for it. A learning rate that is wrong by 2 % parts them
    by 1e-4 to 5e-4 (wide: 1e-2).
    ragged: the least and the greatest length of sequences that differ in length, for networks with one output a sequence; at_once:
    how many steps a call may take at most where a library takes several a call, so that slow networks are not measured for minutes
    (None: all that the data holds).
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
    make_data: Callable[[Row, np.random.Generator], tuple[Array, Array]] = field(default=random_targets, repr=False)
    ragged: tuple[int, int] | None = None
    at_once: int | None = None

    def __post_init__(self) -> None:
        if self.steps % self.call:
            raise ValueError(f"row {self.name}: {self.steps} batches of data cannot be taken {self.call} at once")
        if self.ragged and len(self.shapes()[-1]) != 1:
            raise ValueError(f"row {self.name}: an output a step, but losses leave no step out where sequences differ in length")

    @property
    def call(self) -> int:
        """Steps that a library takes in one call, where it takes several."""
        return self.at_once or self.steps

    @property
    def network(self) -> Sequential:
        """All layers as one."""
        return Sequential(self.layers)

    @property
    def of_images(self) -> bool:
        """Whether a row of data is an image."""
        return len(self.input) == 3

    def shapes(self) -> list[Shape]:
        """The shape of a row of data before each layer and after the last."""
        return self.network.shapes(self.input)

    def random(self, purpose: str) -> np.random.Generator:
        """A generator for one purpose of this row."""
        return np.random.default_rng([zlib.crc32(self.name.encode()), zlib.crc32(purpose.encode())])

    def data(self) -> tuple[Array, Array]:
        """x (steps * batch, *input) float32, y (steps * batch, ...): int64 classes or float32 numbers. What lies beyond the end of
        a sequence is 0."""
        x, y = self.make_data(self, self.random("data"))
        lengths = self.lengths()
        if lengths is not None:
            x[np.arange(x.shape[1]) >= lengths[:, None]] = 0
        return x, y

    def lengths(self) -> Array | None:
        """How long each sequence is, if they differ: (steps * batch,), the longest of a batch first, as PyTorch packs them best."""
        if self.ragged is None:
            return None
        drawn = self.random("lengths").integers(self.ragged[0], self.ragged[1] + 1, (self.steps, self.batch))
        return np.sort(drawn, axis=1)[:, ::-1].reshape(-1)

    def parameters(self) -> dict[str, Array]:
        """Initial values by chainrule's names, "0.weight". Matrices are normal with variance 1 / fan-in; biases 0; scales 1."""
        random, values = self.random("parameters"), {}
        for name, size in self.network.parameters(self.input).items():
            if len(size) > 1:
                values[name] = random.standard_normal(size, dtype=np.float32) / np.float32(prod(size[:-1]) ** 0.5)
            else:
                values[name] = np.full(size, name.endswith(".scale"), np.float32)
        return values

    @property
    def parameter_count(self) -> int:
        """How many numbers are trained."""
        return sum(prod(size) for size in self.network.parameters(self.input).values())

    @property
    def flops(self) -> float:
        """Floating-point operations that the products of a training step need (see `Work`); the optimizer counts nothing. Where
        sequences differ in length, the mean over all batches."""
        lengths = self.lengths()
        if lengths is None:
            return self._work(self.input) * self.batch
        counts = zip(*np.unique(lengths, return_counts=True), strict=True)
        return float(sum(n * self._work((int(length), *self.input[1:])) for length, n in counts) / self.steps)

    def _work(self, shape: Shape) -> float:
        """Operations of a step for one row of this shape."""
        work = self.network.work(shape)
        return work.forward + work.weights + work.through

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


def convolution(filters: int, kernel: int = 3, stride: int = 1) -> tuple[Layer, ...]:
    """A convolution with batch norm, whose shift makes a bias needless; as many outputs as inputs, but for the stride."""
    return Conv2D(filters, kernel, stride, kernel // 2, bias=False), BatchNorm()


def residual(filters: int, stride: int = 1) -> tuple[Layer, ...]:
    """Two convolutions and the way around them, projected where a stride changes the shape: the basic block of He et al. 2016."""
    both = Sequential((*convolution(filters, 3, stride), Activation("relu"), *convolution(filters)))
    return Residual(both, Sequential(convolution(filters, 1, stride)) if stride > 1 else None), Activation("relu")


LENET = (
    *(Conv2D(6, 5, activation="relu"), MaxPool2D(2), Conv2D(16, 5, activation="relu"), MaxPool2D(2)),
    *(Flatten(), *dense([120, 84, 10], "relu")),
)
RESIDUAL = (*convolution(16), Activation("relu"), *residual(16), *residual(32, 2), *residual(64, 2), GlobalAvgPool(), Dense(10))
MNIST_1D = (*(Conv1D(25, k, 2, 1, "relu") for k in (5, 3, 3)), Flatten(), Dense(10))

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
    Row("lstm-32", "LSTM 16-32, T 50, batch 16", (50, 16), (LSTM(32), Dense(1)), 16, 100, "mse", 7, 10),
    Row("lstm-64", "LSTM 32-64, T 100, batch 32", (100, 32), (LSTM(64), Dense(1)), 32, 20, "mse", 2.8, 3.5),
    Row("lstm-256", "LSTM 64-256, T 100, batch 64", (100, 64), (LSTM(256), Dense(1)), 64, 20, "mse", 1.6, 2, at_once=2),
    Row("gru-64", "GRU 32-64, T 100, batch 32", (100, 32), (GRU(64), Dense(1)), 32, 20, "mse", 5, 6.5),
    Row("gru-both", "GRU bidirectional 1-6, T 40, batch 100, 10 classes a step", (40, 1), (Bidirectional(GRU(6, True)), Dense(10)), 100,
        100, least=6, aim=10),
    Row("rnn-1000", "RNN 8-32, T 1000, batch 16", (1000, 8), (RNN(32), Dense(1)), 16, 20, "mse", 8, 10),
    Row("rnn-10000", "RNN 2-32, T 10000, batch 4", (10_000, 2), (RNN(32), Dense(1)), 4, 20, "mse", 15, 20, at_once=5),
    Row("lstm-ragged", "LSTM 32-64, lengths 5 to 200, batch 64", (200, 32), (LSTM(64), Dense(1)), 64, 20, "mse", 5, 10,
        ragged=(5, 200), at_once=5),
    Row("lenet", "LeNet-5 28x28, batch 64", (28, 28, 1), LENET, 64, 40, least=9, aim=13, tolerance=5e-4, at_once=20),
    Row("mnist-1d", "Conv1D 25-25-25, kernels 5/3/3, stride 2, T 40, batch 100", (40, 1), MNIST_1D, 100, 100, least=8, aim=12, at_once=20),
    Row("residual", "residual 32x32x3, channels 16-32-64, 8 layers, batch norm, batch 64", (32, 32, 3), RESIDUAL, 64, 20,
        least=1.8, aim=2.5, tolerance=2.5e-4, at_once=2),
)  # fmt: skip

WIDTHS: tuple[Row, ...] = tuple(
    Row(f"width-{n}", f"64-{n}-{n}-10 relu, batch 64", (64,), dense([n, n, 10], "relu"), 64, 400)
    for n in (8, 16, 32, 64, 128, 256, 512)
)

SHORT_AND_LONG: tuple[Row, ...] = tuple(
    Row(f"steps-{T}", f"LSTM 8-32, T {T}, batch 4", (T, 8), (LSTM(32), Dense(1)), 4, 1, "mse") for T in (10, 1_000, 10_000)
)

LONG = Row("long", "LSTM 16-128, T 10000, batch 32", (10_000, 16), (LSTM(128), Dense(1)), 32, 1, "mse")

# Shapes that nobody had in mind when the compiler was made. No sizes that suit vectors or panels are looked for, nor avoided.
GENERAL: tuple[Row, ...] = (
    Row("gelu", "30-100-50-3 gelu, batch 48", (30,), dense([100, 50, 3], "gelu"), 48, 200),
    Row("regression", "13-64-64-1 tanh, batch 25, mse", (13,), dense([64, 64, 1], "tanh"), 25, 200, "mse"),
    Row("classes", "200-300-20 relu, batch 100", (200,), dense([300, 20], "relu"), 100, 100),
    Row("one-hidden", "784-512-10 relu, batch 128", (784,), dense([512, 10], "relu"), 128, 40),
    Row("six", "50-(40)x6-5 tanh, batch 60", (50,), dense([40] * 6 + [5], "tanh"), 60, 200),
    Row("linear", "1000-10, batch 64", (1000,), dense([10], "relu"), 64, 100),
    Row("softmax", "784-10, batch 128", (784,), dense([10], "relu"), 128, 64),
    Row("tiny", "7-33-17-2 sigmoid, batch 10", (7,), dense([33, 17, 2], "sigmoid"), 10, 1000),
    Row("autoencoder", "300-77-300 tanh, batch 40, mse", (300,), dense([77, 300], "tanh"), 40, 100, "mse"),
    Row("silu", "17-200-1 silu, batch 7, mse", (17,), dense([200, 1], "silu"), 7, 1000, "mse"),
    Row("two-inputs", "40-64 and 24-32 side by side, -10 relu, batch 64", (64,),
        (TwoInputs(Dense(64, "relu"), Dense(32, "relu"), 40), Dense(10)), 64, 200),
    Row("float64", "100-80-10 relu, batch 50, float64", (100,), dense([80, 10], "relu"), 50, 200),
)  # fmt: skip

ALL_ROWS: dict[str, Row] = {row.name: row for row in (*ROWS, *WIDTHS, *SHORT_AND_LONG, LONG, *GENERAL)}
