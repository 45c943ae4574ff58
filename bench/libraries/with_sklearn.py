"""scikit-learn's MLPClassifier: `partial_fit`, which is one epoch of `fit` that goes on with weights and optimizer."""

from __future__ import annotations

import warnings
from time import perf_counter
from typing import Any

import numpy as np
from sklearn.neural_network import MLPClassifier

from ..layers import Dense
from ..rows import Row
from . import Settings, Trainee, Unsupported


class Perceptron:
    """An MLPClassifier that starts from given weights."""

    def __init__(self, row: Row, sizes: list[int], activation: str) -> None:
        self.row = row
        self.x, self.y = row.data()
        self.classes = np.arange(max(row.shapes()[-1][-1], 2))
        self.net: Any = MLPClassifier(
            sizes,
            activation,
            solver="adam",
            alpha=0.0,
            batch_size=row.batch,
            learning_rate_init=row.learning_rate,
            shuffle=False,
            epsilon=1e-9,  # it is added before the correction of bias: ours would weigh 7 to 30 times as much in the first steps
        )
        warnings.simplefilter("ignore")  # advice about convergence
        self._fit(0, 1)  # builds; there is no other way to give it weights
        values = list(row.parameters().values())
        for to, value in zip(self.net.coefs_ + self.net.intercepts_, values[::2] + values[1::2], strict=True):
            to[...] = value
        del self.net._optimizer  # made anew, with moments of 0, by the next call
        self.at = 0

    def _fit(self, first: int, last: int) -> None:
        rows = slice(first * self.row.batch, last * self.row.batch)
        self.net.partial_fit(self.x[rows], self.y[rows], classes=self.classes)

    def losses(self, steps: int) -> list[float]:
        """One call a batch."""
        found = []
        for _ in range(steps):
            self._fit(self.at, self.at + 1)
            self.at += 1
            found.append(float(self.net.loss_))
        return found

    def train(self, steps: int) -> tuple[int, float]:
        """Epochs over the data, or over a part of it."""
        taken, begun = 0, perf_counter()
        while taken < steps:
            now = min(steps - taken, self.row.steps)
            self._fit(0, now)
            taken += now
        return taken, perf_counter() - begun


def prepare(row: Row, way: str, settings: Settings) -> Trainee:
    """See `bench.libraries`."""
    layers = [layer for layer in row.layers if isinstance(layer, Dense)]
    kinds = {layer.activation for layer in layers[:-1]}
    if len(layers) != len(row.layers) or len(kinds) != 1 or layers[-1].activation or len(row.input) != 1:
        raise Unsupported("its networks are dense layers with one activation")
    return Perceptron(row, [layer.units for layer in layers[:-1]], str(kinds.pop()))
