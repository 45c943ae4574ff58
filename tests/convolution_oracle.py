"""Convolution and pooling as plain loops over windows, for the package `autograd` to differentiate.

It knows nothing of padding: an element outside the image is left out of the sums. Sequences are images of height 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import autograd.numpy as np

ACTIVATIONS: dict[Any, Callable[[Any], Any]] = {
    None: lambda z: z,
    "tanh": np.tanh,
    "relu": lambda z: np.where(z > 0, z, 0.0),
    "softplus": lambda z: np.log(1 + np.exp(z)),
}


def starts(n: int, k: int, stride: int, dilation: int, padding: Any) -> tuple[range, int]:
    """Where windows begin along an axis of length n, counted from its first element, and how long one reaches."""
    reach = (k - 1) * dilation + 1
    if padding == "same":
        count = math.ceil(n / stride)
        overhang = max((count - 1) * stride + reach - n, 0)
        return range(-(overhang // 2), -(overhang // 2) + count * stride, stride), reach
    if padding == "causal":
        return range(1 - reach, n - reach + 1, stride), reach
    before, after = (0, 0) if padding == "valid" else (padding, padding) if isinstance(padding, int) else padding
    return range(-before, n + after - reach + 1, stride), reach


def two(value: Any) -> tuple[Any, Any]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


def places(x: Any, size: Any, stride: Any, padding: Any, dilation: Any) -> Iterator[list[list[tuple[int, int, int, int]]]]:
    """For each row of windows a list of windows; each is the (offset i, offset j, row, column) of its elements within the image."""
    height, width = x.shape[1:3]
    (kh, kw), (dh, dw) = two(size), two(dilation)
    rows, _ = starts(height, kh, two(stride)[0], dh, two(padding)[0])
    columns, _ = starts(width, kw, two(stride)[1], dw, two(padding)[1])
    for top in rows:
        yield [
            [
                (i, j, top + i * dh, left + j * dw)
                for i in range(kh)
                for j in range(kw)
                if 0 <= top + i * dh < height and 0 <= left + j * dw < width
            ]
            for left in columns
        ]


def over_windows(x: Any, function: Callable[[list[tuple[int, int, int, int]]], Any], *geometry: Any) -> Any:
    """function(window) -> (B, channels), for all windows: (B, H', W', channels)."""
    return np.stack([np.stack([function(w) for w in row], axis=1) for row in places(x, *geometry)], axis=1)


def convolution(
    x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = "valid", act: Any = None, dilation: Any = 1, groups: int = 1
) -> Any:  # fmt: skip
    """x (B, H, W, C), weight (kh, kw, C / groups, F)."""
    channels, filters = x.shape[3] // groups, weight.shape[3] // groups

    def product(window: list[tuple[int, int, int, int]]) -> Any:
        parts = []
        for g in range(groups):
            total = np.zeros((x.shape[0], filters))
            for i, j, h, w in window:
                part = x[:, h, w, g * channels : (g + 1) * channels]
                total = total + np.dot(part, weight[i, j, :, g * filters : (g + 1) * filters])
            parts.append(total)
        return np.concatenate(parts, axis=1) + (0.0 if bias is None else bias)

    return ACTIVATIONS[act](over_windows(x, product, two(weight.shape[:2]), stride, padding, dilation))


def max_pool(x: Any, size: Any = 2, stride: Any = None, padding: Any = "valid") -> Any:
    largest = lambda window: np.max(np.stack([x[:, h, w] for _, _, h, w in window]), axis=0)
    return over_windows(x, largest, size, size if stride is None else stride, padding, 1)


def avg_pool(x: Any, size: Any = 2, stride: Any = None, padding: Any = "valid", count_padding: bool = False) -> Any:
    def mean(window: list[tuple[int, int, int, int]]) -> Any:
        return sum(x[:, h, w] for _, _, h, w in window) / (two(size)[0] * two(size)[1] if count_padding else len(window))

    return over_windows(x, mean, size, size if stride is None else stride, padding, 1)


# Sequences (B, T, C) are images of one row, with windows of height 1.


def conv1d(
    x: Any, weight: Any, bias: Any = None, stride: int = 1, padding: Any = "valid", act: Any = None, dilation: int = 1, groups: int = 1
) -> Any:  # fmt: skip
    args = (1, stride), ("valid", padding), act, (1, dilation), groups
    return convolution(x[:, None], weight[None], bias, *args)[:, 0]


def max_pool1d(x: Any, size: int = 2, stride: int | None = None, padding: Any = "valid") -> Any:
    return max_pool(x[:, None], (1, size), (1, stride or size), ("valid", padding))[:, 0]


def avg_pool1d(x: Any, size: int = 2, stride: int | None = None, padding: Any = "valid", count_padding: bool = False) -> Any:
    return avg_pool(x[:, None], (1, size), (1, stride or size), ("valid", padding), count_padding)[:, 0]
