"""The layers of convolutional networks: convolution, pooling, dropout of whole channels.

In: images (batch, height, width, channel), or sequences (batch, time, channel). Out: the same, smaller as a rule. All of it is windows
that slide over the padded input: a convolution is their product with the weight, a pooling their maximum or mean.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from .. import initializers
from ..errors import ShapeError, UsageError
from ..graph.trace import located
from ..ops import random
from ..ops.window import count, windows
from .layers import rate_of, suited
from .module import Module, activation_of, positive
from .saving import layers

Sizes = tuple[int, ...]
Pairs = tuple[tuple[int, int], ...]

_INPUTS = {1: "sequences, shape (B, T, C)", 2: "images, shape (B, H, W, C)"}
_REMEDIES = {
    1: {2: "give a series of numbers as x[..., None]", 4: "images are for {twin}"},
    2: {
        2: "let Reshape(height, width, channels) come first",
        3: "grey images have one channel, x[..., None]; sequences are for {twin}",
    },
}


_RULES = ("valid", "same", "causal")


class _Sliding(Module):
    """What layers with windows share. `spatial`: along how many axes they slide."""

    spatial = 2

    def __init__(self, size: Any, stride: Any, padding: Any, dilation: Any, word: str) -> None:
        name = type(self).__name__
        self.size = _each(size, self.spatial, f"{name}: {word}")
        self.stride = _each(stride, self.spatial, f"{name}: stride")
        self.dilation = _each(dilation, self.spatial, f"{name}: dilation")
        self.padding = _padding_of(padding, self.spatial, name)

    def _size_over(self, lengths: Sizes) -> Sizes:
        """How large windows are over an input of these lengths."""
        return self.size

    def _around(self, lengths: Sizes) -> Pairs:
        """How much to put before and after each of the axes that windows slide along."""
        around, window = [], self._size_over(lengths)
        for axis, n in enumerate(lengths):
            k, s = (window[axis] - 1) * self.dilation[axis] + 1, self.stride[axis]
            if self.padding == "causal":
                around.append((k - 1, 0))
            elif self.padding == "same":
                missing = max((-(-n // s) - 1) * s + k - n, 0)
                around.append((missing // 2, missing - missing // 2))
            else:
                around.append((0, 0) if isinstance(self.padding, str) else self.padding[axis])
        return tuple(around)

    def _slid(self, x: Any, fill: float) -> Any:
        """(B, *windows along each axis, C, *size)."""
        self._refuse(x)
        around, size = self._around(x.shape[1:-1]), self._size_over(x.shape[1:-1])
        if any(a or b for a, b in around):
            x = np.pad(x, ((0, 0), *around, (0, 0)), constant_values=fill)
        return windows(x, range(1, 1 + self.spatial), size, self.stride, self.dilation)

    def _refuse(self, x: Any) -> None:
        name = type(self).__name__
        if x.ndim != self.spatial + 2:
            twin = f"{name[:-2]}{3 - self.spatial}D"
            remedy = _REMEDIES[self.spatial].get(x.ndim, "").format(twin=twin)
            raise ShapeError(located(f"{name} needs {_INPUTS[self.spatial]}; it got {x.shape}{remedy and ': ' + remedy}"))
        around = self._around(x.shape[1:-1])
        reach = tuple((k - 1) * d + 1 for k, d in zip(self._size_over(x.shape[1:-1]), self.dilation, strict=True))
        padded = tuple(n + a + b for n, (a, b) in zip(x.shape[1:-1], around, strict=True))
        if any(k > n for k, n in zip(reach, padded, strict=True)):
            spread = f", {_by(reach)} with its dilation," if reach != self.size else ""
            more = f", {_by(padded)} with its padding" if padded != x.shape[1:-1] else ""
            raise ShapeError(located(
                f"{name}: a window of {_by(self.size)}{spread} does not fit into {_by(x.shape[1:-1])}{more}: take a smaller window, "
                'padding="same", fewer layers that make the input smaller, or larger inputs'
            ))  # fmt: skip


def _by(sizes: Sizes) -> str:
    return " x ".join(map(str, sizes))


def _each(value: Any, spatial: int, what: str) -> Sizes:
    """A whole number for each axis; one number is for all."""
    values = value if isinstance(value, (tuple, list)) else [value] * spatial
    if len(values) != spatial:
        one_each = "one number" if spatial == 1 else "one number, or two: (height, width)"
        raise UsageError(f"{what} must be {one_each}, not {value!r}")
    return tuple(positive(v, what) for v in values)


def _padding_of(padding: Any, spatial: int, name: str) -> str | Pairs:
    """A rule by name, or what goes before and after each axis."""
    form = (
        "a number for both ends or a pair (before, after)"
        if spatial == 1
        else "a number for all sides, or (height, width), each a number or a pair (before, after)"
    )
    if isinstance(padding, str):
        if padding in _RULES:
            return padding
        raise UsageError(f'{name}: there is no padding "{padding}". Known: {", ".join(_RULES)}, {form}')
    wanted = f"{name}: padding must be {', '.join(_RULES)}, {form}, none of them negative; not {padding!r}"
    if spatial == 1:
        return (_pair(padding, wanted),)
    axes = padding if isinstance(padding, (tuple, list)) else (padding, padding)
    if len(axes) != spatial:
        raise UsageError(wanted)
    return tuple(_pair(axis, wanted) for axis in axes)


def _pair(value: Any, wanted: str) -> tuple[int, int]:
    ends = value if isinstance(value, (tuple, list)) else (value, value)
    if len(ends) != 2 or any(isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 0 for n in ends):
        raise UsageError(wanted)
    return int(ends[0]), int(ends[1])


# ---- convolution -------------------------------------------------------------------------------------------------------------


class _Convolution(_Sliding):
    def __init__(
        self,
        filters: int,
        kernel: Any,
        stride: Any = 1,
        padding: Any = "valid",
        activation: Any = None,
        dilation: Any = 1,
        groups: int = 1,
        init: Any = None,
        bias: bool = True,
    ) -> None:
        name = type(self).__name__
        super().__init__(kernel, stride, padding, dilation, "kernel")
        self.filters, self.groups = positive(filters, f"{name}: filters"), positive(groups, f"{name}: groups")
        if self.filters % self.groups:
            raise UsageError(
                f"{name}: {self.filters} filters do not divide into {self.groups} groups of one size; take a multiple of {self.groups}"
            )
        self.activation = activation_of(activation)
        self.init = initializers.resolve(init if init is not None else suited(activation))
        self.bias = bias

    def __call__(self, x: Any) -> Any:
        w = self._slid(x, 0.0)
        channels = x.shape[-1]
        if channels % self.groups:
            raise ShapeError(located(
                f"{type(self).__name__}: {channels} channels do not divide into {self.groups} groups of one size, shape {x.shape}"
            ))  # fmt: skip
        shape = (*self.size, channels // self.groups, self.filters)
        z = self._product(w, self.parameter("weight", shape, initializers.PerPart(self.init, self.groups)))
        if self.bias:
            z = z + self.parameter("bias", (self.filters,), "zeros")
        return self.activation(z)

    def _product(self, w: Any, weight: Any) -> Any:
        """Σ over the places of a window and its channels: (B, *windows, F)."""
        at, offset = "hw"[: self.spatial], "ij"[: self.spatial]
        if self.groups == 1:
            return np.einsum(f"b{at}c{offset},{offset}cf->b{at}f", w, weight)
        rows, size = w.shape[: 1 + self.spatial], self.size
        w = np.reshape(w, (*rows, self.groups, w.shape[1 + self.spatial] // self.groups, *size))
        weight = np.reshape(weight, (*weight.shape[:-1], self.groups, self.filters // self.groups))
        return np.reshape(np.einsum(f"b{at}gc{offset},{offset}cgf->b{at}gf", w, weight), (*rows, self.filters))


@layers.declare("Conv2D")
class Conv2D(_Convolution):
    """A convolution over images: every output sees a window of the input, through the same weights everywhere.

    y[b, h, w, f] = φ(Σ_{i, j, c} x[b, h s + i d - p, w s + j d - p, c] W[i, j, c, f] + b[f]), x being 0 outside

    Args:
        filters F; kernel: the size of a window, K or (height, width); stride s: windows lie so far apart; one number, or two.
        padding: "valid": none, only windows that lie inside; "same": zeros around, so that there are ceil(H / s) windows, an odd one
            after; "causal": (K - 1) d zeros before each axis and none after, p = (K - 1) d, so that y[b, h, w] sees no row of x
            later than h s and no column later than w s; a number p for all sides; (height, width), each a number or a pair
            (before, after).
        activation φ: a name, any function, None for none.
        dilation d: elements of a window lie so far apart. groups G: channels and filters are cut into G parts, and each part of the
            filters sees its part of the channels; G = C is the depthwise convolution, with F / C filters for each channel.
        init: of the weight, as for `Dense`, for each group by itself; bias: whether there is a b, which starts at 0.
    Shapes: x (B, H, W, C), weight (K, K, C / G, F), bias (F,), y (B, H', W', F), H' = (H + padding - (K - 1) d - 1) // s + 1.
    Raises: `ShapeError` for anything but images, images that are smaller than the kernel, channels that the groups do not divide.
    Source: LeCun et al., "Backpropagation applied to handwritten zip code recognition", Neural Computation 1, 1989; dilation: Yu &
    Koltun, ICLR 2016; groups: Krizhevsky et al., NIPS 2012; depthwise: Chollet, CVPR 2017.
    Differs: like everywhere in this field it is a correlation, the kernel is not turned. "same" with a stride is that of Keras and
    TensorFlow; PyTorch has none. Elsewhere "causal" is for sequences only; here it is the rule of `Conv1D` along both axes.

    >>> net = Conv2D(8, 3, stride=2, padding="same", activation="relu")
    >>> _ = net.fit(np.ones((1, 5, 5, 3)), np.ones((1, 3, 3, 8)), epochs=0)
    >>> net.parameters["weight"].shape, net.predict(np.ones((1, 5, 5, 3))).shape
    ((3, 3, 3, 8), (1, 3, 3, 8))
    """

    spatial = 2
    examples = (
        {"args": (3, (3, 2), 1, "same", "tanh"), "input": (2, 3, 3, 2)},
        {"args": (2, 2, (2, 1), ((1, 0), 1), None, 1, 1, "orthogonal", False), "input": (2, 4, 3, 1)},
        {"args": (4, 2, 1, "valid", None, (1, 2), 2), "input": (2, 3, 4, 2)},
        {"args": (2, (2, 3), (1, 2), "causal"), "input": (2, 3, 4, 1)},
    )


@layers.declare("Conv1D")
class Conv1D(_Convolution):
    """A convolution over time: every output sees a window of the sequence, through the same weights everywhere.

    y[b, t, f] = φ(Σ_{i, c} x[b, t s + i d - p, c] W[i, c, f] + b[f]), x being 0 outside

    Args: filters F; kernel: the size K of a window; stride s; padding: "valid", "same", a number p for both ends, or a pair (before,
    after), as for `Conv2D`; "causal": (K - 1) d zeros before, so that output t sees nothing later than step t s. activation φ,
    dilation d, groups, init and bias: see `Conv2D`.
    Shapes: x (B, T, C), weight (K, C / G, F), bias (F,), y (B, T', F), T' = (T + padding - (K - 1) d - 1) // s + 1.
    Raises: `ShapeError` for anything but sequences, sequences that are shorter than the kernel, channels that the groups do not
    divide. Sequences that differ in length (`lengths=`) are refused: windows would reach over their ends.
    Source: Waibel et al., "Phoneme recognition using time-delay neural networks", IEEE Transactions on Acoustics, Speech, and Signal
    Processing 37, 1989; causal: van den Oord et al., "WaveNet", 2016.

    >>> Conv1D(16, 3, padding="causal", dilation=4)
    Conv1D(16, 3, padding='causal', dilation=4)
    """

    spatial = 1
    examples = (
        {"args": (3, 3, 2, "causal", "tanh"), "input": (3, 5, 2)},
        {"args": (2, 2, 1, (2, 0), None, 2), "input": (2, 4, 3)},
    )


# ---- pooling -----------------------------------------------------------------------------------------------------------------


class _Pool(_Sliding, overrides=["_size_over"]):
    def __init__(self, size: Any = 2, stride: Any = None, padding: Any = "valid") -> None:
        super().__init__(size, size if stride is None else stride, padding, 1, "size")
        if self.padding == "causal":
            before = "(n, 0)" if self.spatial == 1 else "((n, 0), (n, 0))"
            raise UsageError(
                f'{type(self).__name__}: padding="causal" is for convolutions; give how much goes before as {before}'
            )
        if not isinstance(self.padding, str) and any(max(p) >= k for p, k in zip(self.padding, self.size, strict=True)):
            raise UsageError(
                f"{type(self).__name__}: padding {padding!r} is not less than the size {_by(self.size)}: a window would see no element"
            )

    def _size_over(self, lengths: Sizes) -> Sizes:
        """With padding "same", every window of 2 n - 1 or more elements sees all n: a larger one would only hold more padding."""
        if self.padding != "same":
            return self.size
        return tuple(min(k, max(2 * n - 1, 1)) for k, n in zip(self.size, lengths, strict=True))

    def _within(self, ndim: int) -> Sizes:
        """The axes of places within a window."""
        return tuple(range(ndim - self.spatial, ndim))


class _MaxPool(_Pool):
    def __call__(self, x: Any) -> Any:
        w = self._slid(x, -np.inf)
        return np.max(w, axis=self._within(w.ndim))


@layers.declare("MaxPool2D")
class MaxPool2D(_MaxPool):
    """The largest element of each window, channel by channel.

    y[b, h, w, c] = max_{i, j} x[b, h s + i - p, w s + j - p, c]

    Args: size K or (height, width); stride s: as large as the window unless given; padding: as for `Conv2D` (not causal), less than
    the size. Padding is never the largest. Elements that are equally large share the gradient in equal parts, as in `np.max`
    everywhere here.
    Shapes: x (B, H, W, C), y (B, H', W', C), H' = (H + padding - K) // s + 1.
    Raises: `ShapeError` for anything but images, and for images that are smaller than a window.
    Source: Riesenhuber & Poggio, "Hierarchical models of object recognition in cortex", Nature Neuroscience 2, 1999.
    Differs: PyTorch gives the gradient to the first of equal elements.

    >>> pool = MaxPool2D(2)
    >>> x = np.array([[0.0, 3.0, 1.0], [2.0, 1.0, 9.0]])[None, :, :, None]
    >>> _ = pool.fit(x, np.ones((1, 1, 1, 1)), epochs=0)
    >>> pool.predict(x)[0, :, :, 0].tolist()
    [[3.0]]
    """

    spatial = 2
    examples = (
        {"args": (2,), "input": (2, 5, 4, 2)},
        {"args": ((3, 2), (2, 1), "same"), "input": (2, 4, 3, 2)},
    )


@layers.declare("MaxPool1D")
class MaxPool1D(_MaxPool):
    """The largest element of each window of time, channel by channel: y[b, t, c] = max_i x[b, t s + i - p, c].

    Args: size K; stride s: as large as the window unless given; padding: as for `Conv1D` (not causal), less than the size. See
    `MaxPool2D` for equal elements.
    Shapes: x (B, T, C), y (B, T', C), T' = (T + padding - K) // s + 1.
    Raises: `ShapeError` for anything but sequences, and for sequences that are shorter than a window.

    >>> MaxPool1D(3, stride=2)
    MaxPool1D(3, stride=2)
    """

    spatial = 1
    examples = ({"args": (3, 2, 1), "input": (3, 6, 2)},)


class _AvgPool(_Pool):
    def __init__(self, size: Any = 2, stride: Any = None, padding: Any = "valid", *, count_padding: bool = False) -> None:
        super().__init__(size, stride, padding)
        self.count_padding = bool(count_padding)

    def __call__(self, x: Any) -> Any:
        w = self._slid(x, 0.0)
        within, around = self._within(w.ndim), self._around(x.shape[1:-1])
        if self.count_padding or not any(a or b for a, b in around):
            share = prod(self._size_over(x.shape[1:-1])) / prod(self.size)
            return np.mean(w, axis=within) * share if share < 1 else np.mean(w, axis=within)
        return np.sum(w, axis=within) * self._shares(x.shape[1:-1], around).astype(x.dtype)

    def _shares(self, lengths: Sizes, around: Pairs) -> np.ndarray:
        """1 / how many elements of the input each window sees: (*windows, 1)."""
        seen = np.ones((1,) * (self.spatial + 1))
        for axis, (n, pair, k, s) in enumerate(zip(lengths, around, self._size_over(lengths), self.stride, strict=True)):
            first = np.arange(count(n + sum(pair), k, s, 1)) * s - pair[0]
            inside = np.minimum(first + k, n) - np.maximum(first, 0)
            seen = seen * inside.reshape((-1, *(1,) * (self.spatial - axis)))
        return np.asarray(1 / seen)


@layers.declare("AvgPool2D")
class AvgPool2D(_AvgPool):
    """The mean of each window, channel by channel.

    y[b, h, w, c] = Σ_{i, j} x[b, h s + i - p, w s + j - p, c] / n, n being the number of elements of x in the window

    Args: size K or (height, width); stride s: as large as the window unless given; padding: as for `Conv2D` (not causal), less than
    the size. count_padding: n = K² also where a window reaches over the border, so that padding counts as zeros.
    Shapes: x (B, H, W, C), y (B, H', W', C), H' = (H + padding - K) // s + 1.
    Raises: `ShapeError` for anything but images, and for images that are smaller than a window.
    Source: LeCun et al., "Gradient-based learning applied to document recognition", Proceedings of the IEEE 86, 1998 (whose
    subsampling also scales and shifts).
    Differs: padding does not count, as in Keras and ONNX; PyTorch counts it by default: `count_padding=True`.

    >>> pool = AvgPool2D(2, padding="same")
    >>> x = np.array([[0.0, 3.0, 1.0], [2.0, 1.0, 9.0]])[None, :, :, None]
    >>> _ = pool.fit(x, np.ones((1, 1, 2, 1)), epochs=0)
    >>> pool.predict(x)[0, :, :, 0].tolist()
    [[1.5, 5.0]]
    """

    spatial = 2
    examples = (
        {"args": (2,), "input": (2, 5, 4, 2)},
        {"args": ((3, 2), 2, (1, (0, 1))), "input": (2, 4, 3, 2)},
    )


@layers.declare("AvgPool1D")
class AvgPool1D(_AvgPool):
    """The mean of each window of time, channel by channel: y[b, t, c] = Σ_i x[b, t s + i - p, c] / n.

    Args: size K; stride s: as large as the window unless given; padding: as for `Conv1D` (not causal), less than the size.
    count_padding: see `AvgPool2D`.
    Shapes: x (B, T, C), y (B, T', C), T' = (T + padding - K) // s + 1.
    Raises: `ShapeError` for anything but sequences, and for sequences that are shorter than a window.

    >>> AvgPool1D(4, padding="same")
    AvgPool1D(4, padding='same')
    """

    spatial = 1
    examples = ({"args": (3, 2, "same"), "input": (3, 6, 2)},)


@layers.declare("GlobalAvgPool")
class GlobalAvgPool(Module):
    """The mean of each channel over the whole image, or over all time: (B, ..., C) -> (B, C).

    Source: Lin, Chen, Yan, "Network in network", ICLR 2014, section 3.2.
    Raises: `ShapeError` for an input without an axis between rows and channels.

    >>> pool = GlobalAvgPool()
    >>> _ = pool.fit(np.ones((1, 2, 2, 3)), np.ones((1, 3)), epochs=0)
    >>> pool.predict(np.ones((1, 2, 2, 3))).tolist()
    [[1.0, 1.0, 1.0]]
    """

    examples = ({"args": (), "input": (2, 3, 4, 2)}, {"args": (), "input": (3, 4, 2)})

    def __call__(self, x: Any) -> Any:
        return np.mean(x, axis=_between(self, x))


@layers.declare("Dropout2D")
class Dropout2D(Module):
    """In training sets whole channels of a row to 0, each with probability `rate`, and divides the others by 1 - rate.

    y[b, ..., c] = x[b, ..., c] m[b, c] / (1 - rate), m ~ Bernoulli(1 - rate), drawn anew in each step

    Neighbouring places of a channel are much alike, so that dropping single ones takes little away.

    Args: rate in [0, 1). Shapes: x (B, ..., C), images or sequences; y the same.
    Raises: `ShapeError` for an input without an axis between rows and channels.
    Source: Tompson et al., "Efficient object localization using convolutional networks", CVPR 2015, section 3.2.

    >>> Dropout2D(0.2)
    Dropout2D(0.2)
    """

    examples = ({"args": (0.5,), "input": (2, 3, 2, 4)},)

    def __init__(self, rate: float) -> None:
        self.rate = rate_of(rate, "Dropout2D: the rate")

    def __call__(self, x: Any) -> Any:
        between = _between(self, x)
        if not self.training or self.rate == 0:
            return x
        kept = random.bernoulli((x.shape[0], *(1 for _ in between), x.shape[-1]), 1 - self.rate)
        return np.where(kept, x * (1 / (1 - self.rate)), 0.0)


def _between(layer: Module, x: Any) -> Sizes:
    """The axes between rows and channels."""
    if x.ndim < 3 or not prod(x.shape[1:-1]):
        raise ShapeError(located(
            f"{type(layer).__name__} needs images, shape (B, H, W, C), or sequences, (B, T, C); it got {x.shape}"
        ))  # fmt: skip
    return tuple(range(1, x.ndim - 1))
