"""Layers and losses of chainrule as a user would write them, in NumPy: what they cost beside the built-in ones.

In: the kinds' own fields. Out: `LAYERS` and `LOSSES` by name. Parameters have the names of the built-in layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import chainrule as cr
from chainrule import nn


def sigmoid(z: Any) -> Any:
    """σ(z), as everyone writes it."""
    return 1 / (1 + np.exp(-z))


ACTIVATIONS: dict[str | None, Callable[[Any], Any]] = {None: lambda z: z, "relu": lambda z: np.maximum(z, 0), "tanh": np.tanh}


class Dense(nn.Module):
    """φ(x W + b)."""

    def __init__(self, units: int, activation: str | None) -> None:
        self.units, self.activation = units, activation

    def __call__(self, x: Any) -> Any:
        w, b = self.parameter("weight", (x.shape[-1], self.units)), self.parameter("bias", self.units, "zeros")
        return ACTIVATIONS[self.activation](x @ w + b)


class BatchNorm(nn.Module):
    """By the batch in training, else by what was seen."""

    def __call__(self, x: Any) -> Any:
        n, channels = x.shape
        mean, variance = self.statistic("mean", channels, 0.0), self.statistic("variance", channels, 1.0)
        if self.training:
            seen, spread = np.mean(x, axis=0), np.var(x, axis=0)
            self.update("mean", 0.9 * mean + 0.1 * seen)
            self.update("variance", 0.9 * variance + 0.1 * spread * n / (n - 1))
            mean, variance = seen, spread
        scale, shift = self.parameter("scale", channels, "ones"), self.parameter("shift", channels, "zeros")
        return (x - mean) / np.sqrt(variance + 1e-5) * scale + shift


class Dropout(nn.Module):
    """Drops elements in training, and makes the others larger."""

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def __call__(self, x: Any) -> Any:
        if not self.training:
            return x
        return x * (cr.random.uniform(x.shape) >= self.rate) / (1 - self.rate)


class LSTM(nn.Recurrent):
    """A cell of one's own: gates i, f, g, o."""

    def __init__(self, units: int, return_sequences: bool) -> None:
        self.units = units
        super().__init__(state=[units, units], return_sequences=return_sequences)

    def step(self, state: Any, x: Any) -> Any:
        """(h, c) and x (B, I) -> the next (h, c), and h."""
        (h, c), n = state, self.units
        z = x @ self.parameter("weight_input", (x.shape[1], 4 * n)) + h @ self.parameter("weight_hidden", (n, 4 * n))
        z = z + self.parameter("bias", 4 * n, "zeros")
        c = sigmoid(z[:, n : 2 * n]) * c + sigmoid(z[:, :n]) * np.tanh(z[:, 2 * n : 3 * n])
        h = sigmoid(z[:, 3 * n :]) * np.tanh(c)
        return (h, c), h


class TwoInputs(nn.Module):
    """Two inputs side by side, each through a layer of its own."""

    def __init__(self, first: nn.Module, second: nn.Module, at: int) -> None:
        self.first, self.second, self.at = first, second, at

    def __call__(self, x: Any) -> Any:
        a, b = x
        return np.concatenate([self.first(a), self.second(b)], axis=-1)


class OfTwo(nn.Sequential):
    """Layers one after the other, of which the first takes two inputs."""

    def __call__(self, a: Any, b: Any) -> Any:  # type: ignore[override]  # so that the network takes two
        return super().__call__((a, b))


def cross_entropy(scores: Any, target: Any) -> Any:
    """-log softmax(scores) of the classes."""
    shifted = scores - np.max(scores, axis=-1, keepdims=True)
    log_p = shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))
    return -log_p[np.arange(len(target)), target]


LAYERS: dict[str, type[nn.Module]] = {
    "Dense": Dense,
    "BatchNorm": BatchNorm,
    "Dropout": Dropout,
    "LSTM": LSTM,
    "TwoInputs": TwoInputs,
}
LOSSES: dict[str, Callable[[Any, Any], Any]] = {"cross_entropy": cross_entropy}
