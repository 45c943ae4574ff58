"""Layers that stand between pictures and a network.

In: images (B, H, W) or (B, H, W, C), bytes as they come from a file or any other numbers. Out: the same, as numbers a network
learns well from. Data of uint8 stays so in memory: the rows of a batch are gathered, converted and normalised in native code.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..errors import ShapeError, UsageError
from ..graph.trace import located
from ..ops import random
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


@layers.declare("Augment")
class Augment(Module):
    """Changes each picture at random in training, anew in each step, so that a network sees more than there is; else passes x on.

    First the picture is moved: y[i, j] = x(s), where s is the place from which the pixel comes, with the picture's middle as origin:
    s = R(a) ((i, j) - d) / f, the column mirrored where it is flipped. x(s) is interpolated between the four pixels around s
    (bilinear), and 0 outside the picture. Then y + σ n, n ~ N(0, 1) for each number; then a square is set to 0.

    Args: shift: pixels; d is whole, each coordinate uniform in -shift .. shift. flip: whether every other picture, at random, is
    mirrored, left for right. rotate: degrees; a is uniform in [-rotate, rotate). scale: f is uniform in [1 - scale, 1 + scale). noise: σ,
    in the units of x: let `Rescale` stand before. cutout: the side of the square in pixels; its middle lies anywhere in the picture, so
    part of the square may lie outside.
    Shapes: x (B, H, W) or (B, H, W, C), y the same; channels are moved and cut alike.
    Source: Simard, Steinkraus, Platt, "Best practices for convolutional neural networks applied to visual document analysis", ICDAR 2003,
    section 2 (moved pictures); DeVries & Taylor, "Improved regularization of convolutional neural networks with cutout", 2017.

    >>> Augment(shift=2, rotate=10)
    Augment(shift=2, rotate=10)
    """

    examples = ({"args": (1, True, 10, 0.1, 0.05, 2), "input": (2, 4, 3)}, {"args": (1,), "input": (3, 3, 4, 2)})

    def __init__(
        self, shift: int = 0, flip: bool = False, rotate: float = 0, scale: float = 0, noise: float = 0, cutout: int = 0
    ) -> None:
        self.shift, self.cutout = (
            _amount(value, f"Augment: {name}", "whole pixels, up to a million", most=1_000_000, whole=True)
            for name, value in (("shift", shift), ("cutout", cutout))
        )
        self.rotate = _amount(rotate, "Augment: rotate", "degrees, up to 180", most=180)
        self.scale = _amount(scale, "Augment: scale", "a share below 1", most=0.99)
        self.noise = _amount(noise, "Augment: noise", "a deviation, up to 1e30", most=1e30)
        self.flip = bool(flip)

    def __call__(self, x: Any) -> Any:
        if x.ndim not in (3, 4):
            raise ShapeError(located(f"Augment needs pictures (B, H, W) or (B, H, W, C), not {x.shape}"))
        if not self.training:
            return x
        if self.shift or self.flip or self.rotate or self.scale:
            x = self._moved(x)
        if self.noise:
            x = x + random.normal(x.shape, 0.0, self.noise, dtype=x.dtype)
        if self.cutout:
            x = np.where(self._square(x), np.zeros((), x.dtype), x)
        return x

    def _moved(self, x: Any) -> Any:
        """Each picture as it is seen from its places s."""
        rows, height, width = x.shape[:3]
        one, middle = (rows, 1, 1), ((height - 1) / 2, (width - 1) / 2)
        i, j = _axis(height, x.dtype)[:, None] - middle[0], _axis(width, x.dtype)[None, :] - middle[1]
        if self.shift:
            i, j = (at - _whole(one, 2 * self.shift + 1, x.dtype) + self.shift for at in (i, j))
        if self.scale:
            f = random.uniform(one, 1 - self.scale, 1 + self.scale, dtype=x.dtype)
            i, j = i / f, j / f
        if self.rotate:
            a = random.uniform(one, -math.radians(self.rotate), math.radians(self.rotate), dtype=x.dtype)
            i, j = np.cos(a) * i + np.sin(a) * j, np.cos(a) * j - np.sin(a) * i
        if self.flip:
            j = np.where(random.bernoulli(one), -j, j)
        i, j = (np.broadcast_to(at + m, (rows, height, width)) for at, m in zip((i, j), middle, strict=True))
        kind = np.int32 if rows * height * width < 1 << 31 else np.int64  # half as much memory to write and to read
        first = np.arange(rows, dtype=kind)[:, None, None] * (height * width)
        if not self.rotate and not self.scale:  # whole pixels
            return _pixels(x, i, j, first)
        top, left = np.floor(i), np.floor(j)
        down, right = (_beside(part, x) for part in (i - top, j - left))
        above = (1 - right) * _pixels(x, top, left, first) + right * _pixels(x, top, left + 1, first)
        below = (1 - right) * _pixels(x, top + 1, left, first) + right * _pixels(x, top + 1, left + 1, first)
        return (1 - down) * above + down * below

    def _square(self, x: Any) -> Any:
        """Where the square lies, (B, H, W) or (B, H, W, 1)."""
        inside = []
        for axis, length in ((1, x.shape[1]), (2, x.shape[2])):
            first = _whole((x.shape[0], 1, 1), length, x.dtype) - self.cutout // 2
            at = np.reshape(_axis(length, x.dtype), (1, length, 1) if axis == 1 else (1, 1, length))
            inside.append((at >= first) & (at < first + self.cutout))
        return _beside(inside[0] & inside[1], x)


def _axis(length: int, dtype: Any) -> Any:
    return np.arange(length).astype(dtype)


def _whole(shape: tuple[int, ...], count: int, dtype: Any) -> Any:
    """Whole numbers from 0 to count - 1, all alike likely."""
    return np.floor(random.uniform(shape, dtype=dtype) * count)


def _beside(values: Any, x: Any) -> Any:
    """One number a pixel, for all channels of x."""
    return values if x.ndim == 3 else values[..., None]


def _pixels(x: Any, i: Any, j: Any, first: Any) -> Any:
    """x[b, i[b, ...], j[b, ...]], and 0 outside the picture. i, j: whole numbers (B, H, W); first: the number of each picture's first
    pixel."""
    rows, height, width = x.shape[:3]
    inside = (i >= 0) & (i < height) & (j >= 0) & (j < width)
    place = np.clip(i, 0, height - 1).astype(first.dtype) * width + np.clip(j, 0, width - 1).astype(first.dtype) + first
    found = np.take(np.reshape(x, (rows * height * width, *x.shape[3:])), place, axis=0)
    return np.where(_beside(inside, x), found, np.zeros((), x.dtype))


def _amount(value: Any, what: str, unit: str, most: float, whole: bool = False) -> Any:
    """A number of at least 0. None is so large that it, or what is drawn by it, would be infinite in float32."""
    kinds = (int, np.integer) if whole else (int, float, np.integer, np.floating)
    if isinstance(value, bool) or not isinstance(value, kinds) or not 0 <= value <= most:
        raise UsageError(f"{what} is at least 0, in {unit}, not {value!r}")
    return int(value) if whole else float(value)


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
