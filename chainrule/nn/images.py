"""Layers that stand between pictures and a network.

In: images (B, H, W) or (B, H, W, C), bytes as they come from a file or any other numbers. Out: the same, as numbers a network
learns well from. Data of uint8 stays so in memory: the rows of a batch are gathered, converted and normalised in native code.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import ShapeError, UsageError
from ..graph.trace import located
from .module import Module
from .saving import layers


@layers.declare("Rescale")
class Rescale(Module):
    """Numbers on the scale that networks learn well on: bytes 0 .. 255 become 0 .. 1, and are standardised if mean and std are given.

    y = (x · scale - mean) / std

    Args: scale 1/255; mean, std: of the scaled images, one number for all or one for each channel, the last axis.
    Shapes: x (B, ..., C), y the same.

    >>> Rescale(mean=0.13, std=0.31)
    Rescale(mean=0.13, std=0.31)
    """

    examples = ({"args": (), "input": (3, 4)}, {"args": (0.5, (0.1, -0.2), (2.0, 3.0)), "input": (3, 4, 2)})

    def __init__(self, scale: float = 1 / 255, mean: Any = 0.0, std: Any = 1.0) -> None:
        self.scale, self.mean, self.std = (
            _numbers(value, f"Rescale: {name}") for name, value in (("scale", scale), ("mean", mean), ("std", std))
        )
        if isinstance(self.scale, tuple) or np.any(np.asarray(self.std) <= 0):
            raise UsageError(f"Rescale: scale is one number and std above 0, not {scale!r} and {std!r}")

    def __call__(self, x: Any) -> Any:
        y = x * self.scale
        if np.any(self.mean):
            y = y - _by_channel(self.mean, y, "mean")
        return y / _by_channel(self.std, y, "std") if np.any(np.not_equal(self.std, 1)) else y


def _numbers(value: Any, what: str) -> float | tuple[float, ...]:
    """One finite number, or a tuple of them."""
    try:
        array = np.asarray(value, np.float64)
    except (TypeError, ValueError):
        array = np.full(1, np.nan)
    if array.ndim > 1 or not array.size or not np.isfinite(array).all():
        raise UsageError(f"{what} is a finite number, or one for each channel, not {value!r}")
    return tuple(array.tolist()) if array.ndim else float(array)


def _by_channel(value: float | tuple[float, ...], x: Any, what: str) -> Any:
    """The number, or the numbers in the type of x."""
    if isinstance(value, float):
        return value
    if x.ndim < 2 or x.shape[-1] != len(value):
        raise ShapeError(located(f"Rescale has {len(value)} numbers for {what}, so it needs as many channels, not {x.shape}"))
    return np.array(value, x.dtype)
