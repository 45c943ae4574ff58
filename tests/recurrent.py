"""Recurrent networks for tests: small data, networks with random parameters."""

from __future__ import annotations

from typing import Any

import numpy as np

from chainrule import nn

Array = np.ndarray

LENGTHS = [5, 0, 2, 1]


def data(rows: int = 4, steps: int = 5, width: int = 2, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=(rows, steps, width))


def shaken(net: nn.Module, x: Any, y: Any, seed: int = 1, dtype: str = "float64", **options: Any) -> nn.Module:
    """A network that was built, with random parameters: zeros and ones hide errors."""
    net.fit(x, y, loss="mse", epochs=0, dtype=dtype, **options)
    r = np.random.default_rng(seed)
    net.load_parameters({name: r.normal(size=value.shape) for name, value in net.parameters.items()})
    return net


def made(kind: str, units: int, both: bool = False, **options: Any) -> nn.Module:
    layer = getattr(nn, kind)(units, **options)
    return nn.Bidirectional(layer) if both else layer
