"""Networks for tests: small data, a layer as a user writes it, a network in which training changes everything that it can."""

from __future__ import annotations

from typing import Any

import numpy as np

from chainrule import nn

Array = np.ndarray


def data(rows: int = 12, inputs: int = 4, outputs: int = 2, seed: int = 0) -> tuple[Array, Array]:
    r = np.random.default_rng(seed)
    return r.normal(size=(rows, inputs)), r.normal(size=(rows, outputs))


class MyDense(nn.Module):
    def __init__(self, units: int, activation: Any = None) -> None:
        self.units, self.activation = units, activation

    def __call__(self, x: Any) -> Any:
        y = x @ self.parameter("weight", (x.shape[-1], self.units), "glorot_uniform")
        y = y + self.parameter("bias", (self.units,), "zeros")
        return y if self.activation is None else self.activation(y)


def rich() -> nn.Sequential:
    return nn.Sequential(nn.Dense(5, "tanh"), nn.BatchNorm(), nn.Dropout(0.2), nn.Residual(MyDense(5)), nn.Dense(2))
