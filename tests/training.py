"""Training for tests: small data, networks that show any difference between two runs, every optimizer, a target for each loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import chainrule as cr
from chainrule import nn
from chainrule.optim import optimizers
from chainrule.schedules import Schedule

Array = np.ndarray


def data(rows: int = 20, inputs: int = 4, outputs: int = 2, seed: int = 0) -> tuple[Array, Array]:
    r = np.random.default_rng(seed)
    x = r.normal(size=(rows, inputs))
    return x, np.tanh(x @ r.normal(size=(inputs, outputs))) + 0.1 * r.normal(size=(rows, outputs))


def noisy() -> nn.Sequential:
    """Everything that could depend on order, step or chance."""
    return nn.Sequential(nn.Dense(6, "tanh"), nn.BatchNorm(), nn.Dropout(0.3), nn.Dense(5, "relu"), nn.Dropout(0.1), nn.Dense(2))


def at_zero(outputs: int = 1, bias: bool = True) -> nn.Dense:
    return nn.Dense(outputs, init="zeros", bias=bias)


CONFIGS: dict[str, dict[str, Any]] = {
    "adam": {"optimizer": cr.Adam(0.01)},
    "momentum": {"optimizer": cr.SGD(0.05, momentum=0.9, nesterov=True)},
    "accumulation": {"optimizer": cr.Adam(0.01, accumulate=3, clip_norm=1.0)},
    "radam": {"optimizer": cr.RAdam(0.01, weight_decay=0.01, l2=0.01)},
    "nadam": {"optimizer": cr.Nadam(0.01)},
    "rprop": {"optimizer": cr.Rprop(0.01), "batch_size": 20},
    "float64": {"optimizer": cr.Adamax(0.01), "dtype": "float64"},
    "validation": {"optimizer": cr.Adam(0.01), "validation": 0.25},
    "in order": {"optimizer": cr.RMSprop(0.01, momentum=0.9), "shuffle": False},
    "stairs": {"optimizer": cr.SGD(cr.schedules.step(0.1, every=3, factor=0.5))},
    "plateau": {"optimizer": cr.SGD(cr.schedules.reduce_on_plateau(0.3, factor=0.5, patience=0, threshold=0.5))},
    "weights": {"optimizer": cr.Adagrad(0.05), "sample_weight": np.linspace(0.1, 2.0, 20)},
    "seed 7": {"optimizer": cr.Lion(0.001), "seed": 7},
}


def fit(net: nn.Module, epochs: int, **options: Any) -> cr.Run:
    x, t = data(20)
    return net.fit(x, t, epochs=epochs, **{"batch_size": 6, "metrics": ("mae",), **options})


def target_for(name: str, kind: str, x: Array) -> Array:
    """A target that can be learnt from x, in the domain of the loss."""
    r = np.random.default_rng(5)
    s = x @ r.normal(size=(x.shape[1], 3))
    p = np.exp(s) / np.exp(s).sum(axis=1, keepdims=True)
    domains = {
        "identity": s,
        "exp": np.floor(np.exp(np.clip(s, -2, 2))),
        "sigmoid": (s > 0).astype(float),
        "softmax": p,
    }
    return np.sign(s) if name == "hinge" else domains[kind]


OPTIMIZERS = [(name, options) for name, rule in optimizers.items() for options in rule.examples]


@dataclass(frozen=True)
class Leap(Schedule):
    """A rate that is huge from one step on."""

    at: int = 0

    def __call__(self, steps: Array, total: int) -> Array:
        return np.where(np.asarray(steps) >= self.at, 1e30, self.learning_rate)


# Where a signal happens to arrive inside a finaliser, Python drops the exception with a warning.
DROPPED = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
