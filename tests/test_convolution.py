"""Convolution and pooling against plain loops that the package `autograd` differentiates; their geometry; what wrong inputs get."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import autograd
import autograd.numpy as anp
import convolution_oracle as oracle
import numpy as np
import pytest
import scipy.signal
from hypothesis import given, settings
from hypothesis import strategies as st
from native import Threaded, registered
from same import assert_same, state

import chainrule as cr
from chainrule import examples, nn

Array = np.ndarray
Shape = tuple[int, ...]


# ----------------------------------------------------------------------------------------------------------- against the oracle


def conv2d(*shape: int, filters: int = 4, kernel: Any = 3, **options: Any) -> tuple[Any, Any, Shape]:
    named = {"act" if k == "activation" else k: v for k, v in options.items() if k not in ("bias", "init")}
    return (
        lambda: nn.Conv2D(filters, kernel, **options),
        lambda p, x: oracle.convolution(x, p["weight"], p.get("bias"), **named),
        shape,
    )


def conv1d(*shape: int, filters: int = 4, kernel: Any = 3, **options: Any) -> tuple[Any, Any, Shape]:
    named = {"act" if k == "activation" else k: v for k, v in options.items()}
    return lambda: nn.Conv1D(filters, kernel, **options), lambda p, x: oracle.conv1d(x, p["weight"], p["bias"], **named), shape


def pool(kind: str, equation: Callable[..., Any], *shape: int, **options: Any) -> tuple[Any, Any, Shape]:
    return lambda: getattr(nn, kind)(**options), lambda p, x: equation(x, **options), shape


VARIANTS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Any], Any], Shape]] = {
    "plain": conv2d(2, 5, 4, 2),
    "one by one": conv2d(2, 3, 4, 3, kernel=1),
    "one by one, strides": conv2d(2, 5, 4, 3, kernel=1, stride=2, bias=False),
    "as large as the image": conv2d(2, 3, 4, 2, kernel=(3, 4), activation="relu"),
    "strides that do not divide": conv2d(2, 6, 8, 2, stride=(2, 3)),
    "strides that leave elements out": conv2d(2, 8, 7, 1, kernel=2, stride=3),
    "same, even kernel": conv2d(2, 4, 5, 2, kernel=(2, 4), padding="same"),
    "same, strides": conv2d(2, 6, 7, 2, kernel=(3, 5), stride=(2, 3), padding="same", activation="tanh"),
    "same, larger than the image": conv2d(2, 2, 3, 2, kernel=5, padding="same"),
    "explicit": conv2d(2, 4, 3, 2, padding=2),
    "explicit, by axis": conv2d(2, 4, 3, 2, padding=(0, 1), stride=2),
    "explicit, by side": conv2d(2, 4, 3, 2, padding=((2, 0), (0, 3)), stride=2),
    "dilation": conv2d(2, 6, 7, 2, dilation=(2, 3)),
    "dilation, same": conv2d(2, 5, 4, 2, dilation=2, padding="same", stride=2),
    "causal": conv2d(2, 4, 3, 2, padding="causal"),
    "causal, strides": conv2d(2, 5, 6, 2, kernel=(2, 3), stride=(2, 3), padding="causal", activation="tanh"),
    "causal, dilation": conv2d(2, 4, 5, 1, kernel=(3, 2), dilation=(1, 3), padding="causal"),
    "causal, larger than the image": conv2d(2, 2, 3, 4, kernel=4, padding="causal", groups=2),
    "groups": conv2d(2, 4, 5, 4, filters=6, groups=2),
    "depthwise": conv2d(2, 4, 5, 3, filters=3, groups=3, padding="same"),
    "depthwise, multiplied": conv2d(2, 5, 4, 3, filters=6, groups=3, stride=2, dilation=2, padding=1),
    "time": conv1d(2, 5, 2),
    "time, strides": conv1d(2, 8, 2, kernel=4, stride=3, padding="same", activation="softplus"),
    "time, causal": conv1d(2, 6, 2, kernel=2, padding="causal", dilation=3),
    "time, causal, strides": conv1d(2, 7, 2, padding="causal", stride=2),
    "time, explicit": conv1d(2, 4, 2, padding=(0, 2)),
    "time, groups": conv1d(2, 5, 4, groups=4, padding=1, dilation=2),
    "max": pool("MaxPool2D", oracle.max_pool, 2, 5, 6, 2),
    "max, overlapping": pool("MaxPool2D", oracle.max_pool, 2, 6, 5, 2, size=3, stride=(1, 2)),
    "max, same": pool("MaxPool2D", oracle.max_pool, 2, 5, 4, 2, size=(3, 2), stride=2, padding="same"),
    "max, same, far larger": pool("MaxPool2D", oracle.max_pool, 2, 5, 4, 2, size=(12, 9), stride=(2, 3), padding="same"),
    "max, explicit": pool("MaxPool2D", oracle.max_pool, 2, 4, 3, 2, size=3, padding=((2, 0), 1)),
    "max, time": pool("MaxPool1D", oracle.max_pool1d, 2, 7, 2, size=3, stride=2, padding=1),
    "mean": pool("AvgPool2D", oracle.avg_pool, 2, 5, 6, 2),
    "mean, overlapping": pool("AvgPool2D", oracle.avg_pool, 2, 6, 5, 2, size=3, stride=(1, 2)),
    "mean, same": pool("AvgPool2D", oracle.avg_pool, 2, 5, 4, 2, size=(3, 2), stride=2, padding="same"),
    "mean, same, far larger": pool("AvgPool2D", oracle.avg_pool, 2, 5, 4, 2, size=(12, 9), stride=(2, 3), padding="same"),
    "mean, same, far larger, padding counts": pool(
        "AvgPool2D", oracle.avg_pool, 2, 5, 4, 2, size=(12, 9), stride=(2, 3), padding="same", count_padding=True
    ),
    "mean, explicit": pool("AvgPool2D", oracle.avg_pool, 2, 4, 3, 2, size=3, padding=((2, 0), 1)),
    "mean, padding counts": pool("AvgPool2D", oracle.avg_pool, 2, 4, 3, 2, size=3, padding=1, count_padding=True),
    "mean, time": pool("AvgPool1D", oracle.avg_pool1d, 2, 7, 2, size=3, stride=2, padding="same"),
    "mean, time, padding counts": pool("AvgPool1D", oracle.avg_pool1d, 2, 7, 2, size=3, padding=(2, 1), count_padding=True),
    "18 rows": conv2d(18, 4, 5, 2, filters=3, padding="same"),
    "18 rows, causal": conv2d(18, 4, 3, 2, kernel=2, padding="causal", activation="tanh"),
    "18 rows, depthwise": conv2d(18, 4, 3, 3, filters=6, kernel=2, groups=3, padding=1, stride=2),
    "18 rows, max": pool("MaxPool2D", oracle.max_pool, 18, 4, 5, 2, size=3, stride=(1, 2)),
    "37 rows, strides": conv2d(37, 5, 4, 1, kernel=2, stride=2, activation="relu"),
    "37 rows, groups, dilation": conv2d(37, 3, 4, 4, kernel=2, groups=2, dilation=2, padding=1),
    "37 rows, time": conv1d(37, 6, 2, stride=2, padding="same", activation="softplus"),
    "37 rows, mean": pool("AvgPool2D", oracle.avg_pool, 37, 4, 3, 2, size=3, stride=2, padding="same"),
    "mean of all": (nn.GlobalAvgPool, lambda p, x: anp.mean(anp.reshape(x, (2, 12, 3)), axis=1), (2, 4, 3, 3)),
    "mean of all time": (nn.GlobalAvgPool, lambda p, x: anp.mean(x, axis=1), (2, 4, 3)),
}  # fmt: skip


def images(shape: Shape, seed: int = 0) -> Array:
    """Random numbers that are all different by 0.01 at least, so that no largest of them changes when one moves a little."""
    r = np.random.default_rng(seed)
    n = int(np.prod(shape))
    return ((r.permutation(n) - n / 2) * max(0.02, 3 / n) + r.uniform(0, 0.01, n)).reshape(shape)


class Gain(nn.Module):
    """layer(x) · gain, so that layers without parameters have gradients to compare."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(self, x: Any) -> Any:
        y = self.layer(x)
        return y * self.parameter("gain", y.shape[1:], "ones")


class Slope(nn.Module):
    """∂/∂x Σ sin(layer(x)): gradients of this network are second derivatives of the layer."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(self, x: Any) -> Any:
        return cr.grad(lambda x: np.sum(np.sin(self.layer(x))))(x)


def built(net: nn.Module, x: Array, dtype: str = "float64") -> nn.Module:
    """With random biases: those that are 0 hide errors."""
    net.fit(x, np.zeros((len(x), 1)), loss=lambda s, t: np.mean(s), epochs=0, dtype=dtype)
    r = np.random.default_rng(1)
    net.load_parameters({n: r.normal(size=v.shape) for n, v in net.parameters.items()})
    return net


def inner(p: Any, prefix: str = "layer.") -> dict[str, Any]:
    return {n.removeprefix(prefix): v for n, v in p.items() if n.startswith(prefix)}


@pytest.mark.parametrize("name", VARIANTS)
def test_values_and_gradients_agree_with_autograd(name: str) -> None:
    make, equation, shape = VARIANTS[name]
    x = images(shape)
    net = built(Gain(make()), x)
    p = {n: np.array(v) for n, v in net.parameters.items()}
    forward = lambda p: equation(inner(p), x) * p["gain"]
    expected = forward(p)
    t = np.random.default_rng(2).normal(size=expected.shape)
    gradients = autograd.grad(lambda p: anp.mean((forward(p) - t) ** 2))(p)
    single = built(Gain(make()), x, "float32")
    assert single.predict(x).dtype == np.float32
    np.testing.assert_allclose(single.predict(x), expected, rtol=1e-4, atol=1e-5)
    for backend in ("native", "reference"):
        np.testing.assert_allclose(net.predict(x, backend=backend), expected, rtol=1e-12, atol=1e-13)
        got = net.gradients(x, t, loss="mse", backend=backend)
        assert list(got) == list(p)
        for n, value in gradients.items():
            np.testing.assert_allclose(got[n], value, rtol=1e-10, atol=1e-13, err_msg=n)
        for n, value in single.gradients(x, t, loss="mse", backend=backend).items():
            np.testing.assert_allclose(value, gradients[n], rtol=1e-3, atol=1e-4 * np.abs(gradients[n]).max(), err_msg=n)


@pytest.mark.parametrize("name", VARIANTS)
def test_first_and_second_derivatives_by_input_agree_with_autograd(name: str) -> None:
    make, equation, shape = VARIANTS[name]
    x, v = images(shape), np.random.default_rng(3).normal(size=shape)
    net = built(Gain(make()), x)
    p = {n: np.array(value) for n, value in net.parameters.items()}
    f = lambda x: np.sum(np.sin(net(x)))
    of_oracle = lambda x: anp.sum(anp.sin(equation(inner(p), x) * p["gain"]))
    np.testing.assert_allclose(cr.grad(f)(x), autograd.grad(of_oracle)(x), rtol=1e-10, atol=1e-12)
    second = cr.hvp(f, x, v)
    np.testing.assert_allclose(second, autograd.hessian_vector_product(of_oracle)(x, v), rtol=1e-9, atol=1e-11)
    assert np.any(second != 0)


@pytest.mark.parametrize("name", VARIANTS)
def test_second_derivatives_by_input_and_parameters_agree_with_autograd(name: str) -> None:
    make, equation, shape = VARIANTS[name]
    x = images(shape)
    net = built(Slope(Gain(make())), x)
    t = np.random.default_rng(2).normal(size=shape)
    p = {n: np.array(value) for n, value in net.parameters.items()}

    def objective(p: Any) -> Any:
        layer = inner(p)
        slope = autograd.grad(lambda x: anp.sum(anp.sin(equation(inner(layer), x) * layer["gain"])))(x)
        return anp.mean((slope - t) ** 2)

    expected = autograd.grad(objective)(p)
    single = built(Slope(Gain(make())), x, "float32").gradients(x, t, loss="mse")
    for n, value in net.gradients(x, t, loss="mse").items():
        np.testing.assert_allclose(value, expected[n], rtol=1e-9, atol=1e-12, err_msg=n)
        np.testing.assert_allclose(single[n], expected[n], rtol=2e-3, atol=2e-4 * np.abs(expected[n]).max(), err_msg=n)
        assert np.any(value != 0)


def test_a_convolution_is_the_correlation_of_scipy() -> None:
    x = images((2, 7, 6, 3))
    for padding in ("valid", "same"):
        net = built(nn.Conv2D(2, (3, 5), padding=padding), x)
        w, b = net.parameters["weight"], net.parameters["bias"]
        for image, made in zip(x, net.predict(x), strict=True):
            for f in range(2):
                each = [scipy.signal.correlate(image[..., c], w[..., c, f], mode=padding) for c in range(3)]
                np.testing.assert_allclose(made[..., f], sum(each) + b[f], rtol=1e-11, atol=1e-12)


AXES = st.tuples(st.integers(1, 7), st.integers(1, 4), st.integers(1, 3), st.integers(1, 2))
PADDINGS = st.one_of(st.sampled_from(("valid", "same", "causal")), st.tuples(st.integers(0, 2), st.integers(0, 3)))


@given(axes=st.tuples(AXES, AXES), padding=PADDINGS, channels=st.integers(1, 3), groups=st.integers(1, 2), each=st.integers(1, 3))
@settings(max_examples=25)
def test_any_geometry(axes: Any, padding: Any, channels: int, groups: int, each: int) -> None:
    """Convolution and pooling of random size, stride, dilation, padding and groups; or a `ShapeError` where no window fits."""
    (height, width), kernel, stride, dilation = zip(*axes, strict=True)
    x = images((2, height, width, channels * groups))
    sides = (padding, padding) if isinstance(padding, tuple) else padding
    net = Gain(nn.Conv2D(each * groups, kernel, stride, sides, None, dilation, groups))
    extra = sum(padding) if isinstance(padding, tuple) else 0
    lacking = any((k - 1) * d + 1 > n + extra for n, k, d in zip((height, width), kernel, dilation, strict=True))
    if lacking and padding not in ("same", "causal"):
        with pytest.raises(cr.ShapeError, match=r"Conv2D: a window .* does not fit"):
            built(net, x)
    else:
        compare(net, lambda p: oracle.convolution(x, p["weight"], p["bias"], stride, sides, None, dilation, groups), x)
    if all(k <= n for n, k in zip((height, width), kernel, strict=True)) and padding in ("valid", "same"):
        compare(Gain(nn.MaxPool2D(kernel, stride, padding)), lambda p: oracle.max_pool(x, kernel, stride, padding), x)
        compare(Gain(nn.AvgPool2D(kernel, stride, padding)), lambda p: oracle.avg_pool(x, kernel, stride, padding), x)


def compare(net: nn.Module, equation: Callable[[Any], Any], x: Array) -> None:
    built(net, x)
    p = {n: np.array(v) for n, v in net.parameters.items()}
    forward = lambda p: equation(inner(p)) * p["gain"]
    np.testing.assert_allclose(net.predict(x), forward(p), rtol=1e-12, atol=1e-12)
    t = np.random.default_rng(2).normal(size=forward(p).shape)
    expected = autograd.grad(lambda p: anp.mean((forward(p) - t) ** 2))(p)
    for n, value in net.gradients(x, t, loss="mse").items():
        np.testing.assert_allclose(value, expected[n], rtol=1e-9, atol=1e-12, err_msg=n)


# ---------------------------------------------------------------------------------------------------- what definitions leave open


def test_equally_large_elements_share_the_gradient() -> None:
    x = np.array([[2.0, 2.0, 1.0, 0.0], [0.0, 2.0, 0.0, 0.0]])[None, :, :, None]
    net = nn.MaxPool2D(2)
    net.fit(x, np.zeros((1, 1, 2, 1)), epochs=0, dtype="float64")
    gradient = cr.grad(lambda x: np.sum(net(x)))(x)[0, :, :, 0]
    np.testing.assert_allclose(gradient, [[1 / 3, 1 / 3, 1, 0], [0, 1 / 3, 0, 0]])


def test_padding_is_never_the_largest() -> None:
    x = -1 - np.abs(images((2, 3, 3, 2)))
    net = built(nn.MaxPool2D(3, 1, 1), x)
    assert net.predict(x).max() == x.max()
    assert np.isfinite(net.predict(x)).all()


def test_causal_outputs_do_not_see_the_future() -> None:
    x = images((1, 9, 2))
    net = built(nn.Conv1D(3, 3, padding="causal", dilation=2), x)
    before = net.predict(x)
    x[:, 5] += 1
    changed = np.any(net.predict(x) != before, axis=(0, 2))
    assert changed.tolist() == [False] * 5 + [True, False, True, False]


@given(axes=st.tuples(AXES, AXES), at=st.tuples(st.integers(0, 6), st.integers(0, 6)))
@settings(max_examples=15)
def test_causal_outputs_see_no_later_row_and_no_later_column(axes: Any, at: tuple[int, int]) -> None:
    """And of the others exactly those under the elements of their window."""
    lengths, kernel, stride, dilation = zip(*axes, strict=True)
    at = (at[0] % lengths[0], at[1] % lengths[1])
    x = images((1, *lengths, 2))
    net = built(nn.Conv2D(3, kernel, stride, "causal", dilation=dilation), x)
    before = net.predict(x)
    assert before.shape == (1, *(-(-n // s) for n, s in zip(lengths, stride, strict=True)), 3)
    x[:, at[0], at[1]] += 1
    changed = np.any(net.predict(x) != before, axis=(0, 3))
    for place in np.ndindex(*changed.shape):
        back = [p * s - a for p, s, a in zip(place, stride, at, strict=True)]
        assert changed[place] == all(b in range(0, k * d, d) for b, k, d in zip(back, kernel, dilation, strict=True))


def test_groups_do_not_see_each_other() -> None:
    x = images((1, 4, 4, 6))
    net = built(nn.Conv2D(9, 2, groups=3), x)
    before = net.predict(x)
    x[..., 2] += 1
    assert np.any(net.predict(x) != before, axis=(0, 1, 2)).tolist() == [False] * 3 + [True] * 3 + [False] * 3


SIZES = [
    (nn.Conv2D(4, 3), (5, 28, 27, 1), (5, 26, 25, 4)),
    (nn.Conv2D(4, 3, 2, "same"), (5, 28, 27, 1), (5, 14, 14, 4)),
    (nn.Conv2D(4, (5, 1), padding=(2, 0)), (5, 28, 27, 3), (5, 28, 27, 4)),
    (nn.Conv1D(25, 5, 2), (5, 40, 1), (5, 18, 25)),
    (nn.Conv1D(25, 5, 2, "causal"), (5, 40, 1), (5, 20, 25)),
    (nn.MaxPool2D(), (5, 9, 8, 3), (5, 4, 4, 3)),
    (nn.MaxPool2D(3, 2, "same"), (5, 9, 8, 3), (5, 5, 4, 3)),
    (nn.AvgPool1D(3, 2), (5, 9, 3), (5, 4, 3)),
    (nn.GlobalAvgPool(), (5, 9, 8, 3), (5, 3)),
    (nn.Dropout2D(0.5), (5, 9, 8, 3), (5, 9, 8, 3)),
    (nn.BatchNorm(), (5, 9, 8, 3), (5, 9, 8, 3)),
]


@pytest.mark.parametrize(("net", "shape", "expected"), SIZES, ids=[repr(s[0]) for s in SIZES])
def test_output_shape(net: nn.Module, shape: Shape, expected: Shape) -> None:
    x = np.ones(shape)
    net.fit(x, np.zeros(expected), epochs=0)
    assert net.predict(x).shape == expected
    assert net.predict(x[:1]).shape == (1, *expected[1:])


def test_first_weights() -> None:
    """The fan-in of a filter is all that it sees: window times channels of its group."""
    x = np.ones((1, 5, 5, 32))
    for layer, std in (
        (nn.Conv2D(64, 5, activation="relu"), np.sqrt(2 / (25 * 32))),
        (nn.Conv2D(64, 5), np.sqrt(2 / (25 * 32 + 25 * 64))),
        (nn.Conv2D(64, 5, activation="relu", groups=4), np.sqrt(2 / (25 * 8))),
        (nn.Conv2D(64, 5, groups=4), np.sqrt(2 / (25 * 8 + 25 * 16))),
        (nn.Conv2D(64, 5, init=cr.initializers.normal(0.3)), 0.3),
    ):
        layer.fit(x, np.zeros((1, 1, 1, 64)), epochs=0)
        assert layer.parameters["weight"].std() == pytest.approx(std, rel=0.03)
        assert not np.any(layer.parameters["bias"])
    copies = nn.Conv2D(32, 3, padding="same", groups=4, init="identity")
    copies.fit(x, x, epochs=0)
    np.testing.assert_array_equal(copies.predict(images(x.shape).astype("f4")), images(x.shape).astype("f4"))


# -------------------------------------------------------------------------------------------------------------------- Dropout2D


def dropped(net: nn.Module, x: Array, seed: int = 0) -> Array:
    """The output in training, by the gradient of the gain: Σ over rows."""
    y = np.ones(x.shape)
    return net.gradients(x, y, loss=lambda s, t: s * t, training=True, seed=seed)["gain"] * x.size


@pytest.mark.parametrize("shape", [(1, 4, 3, 200), (1, 5, 200)])
def test_dropout_takes_whole_channels(shape: Shape) -> None:
    x = np.random.default_rng(0).uniform(1, 2, shape)
    net = built(Gain(nn.Dropout2D(0.25)), x)
    y = dropped(net, x)
    kept = y.reshape(-1, 200) != 0
    assert np.all(kept == kept[0]), "a channel is dropped everywhere or nowhere"
    assert abs(kept[0].mean() - 0.75) < 4 * np.sqrt(0.75 * 0.25 / 200)
    np.testing.assert_allclose(y[y != 0], (x[0] / 0.75)[y != 0], rtol=1e-12)
    assert np.any((dropped(net, x, seed=1) != 0) != (y != 0))
    np.testing.assert_allclose(net.predict(x), x * net.parameters["gain"], rtol=1e-12)


def test_dropout_differs_by_row() -> None:
    x = np.zeros((2, 3, 3, 64))
    x[0] = 1.0
    first = dropped(built(Gain(nn.Dropout2D(0.5)), x), x)
    second = dropped(built(Gain(nn.Dropout2D(0.5)), x), x[::-1].copy())
    assert 10 < np.sum((first != 0)[0, 0] != (second != 0)[0, 0]) < 54


# --------------------------------------------------------------------------------------------------------------- blocks and nets


def block(filters: int, stride: int = 1) -> nn.Residual:
    """A basic block of a residual network."""
    body = nn.Sequential(
        nn.Conv2D(filters, 3, stride, "same", bias=False), nn.BatchNorm(), nn.Activation("relu"),
        nn.Conv2D(filters, 3, padding="same", bias=False), nn.BatchNorm(),
    )  # fmt: skip
    return nn.Residual(body, nn.Conv2D(filters, 1, stride, bias=False) if stride > 1 else None)


def resnet() -> nn.Module:
    stem = nn.Conv2D(3, 3, padding="same", activation="tanh")
    return nn.Sequential(
        stem,
        block(3),
        nn.Activation("relu"),
        block(4, 2),
        nn.Activation("relu"),
        nn.Dropout2D(0.2),
        nn.GlobalAvgPool(),
        nn.Dense(3),
    )


def lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2D(4, 3, activation="tanh"), nn.AvgPool2D(2, padding="same"), nn.Conv2D(6, (2, 3), activation="relu", groups=2),
        nn.MaxPool2D(2, 1), nn.Flatten(), nn.Dense(5, "relu"), nn.Dense(3),
    )  # fmt: skip


def temporal() -> nn.Module:
    return nn.Sequential(
        nn.Conv1D(5, 3, padding="causal", activation="relu"), nn.MaxPool1D(2), nn.Conv1D(4, 2, dilation=2, activation="tanh"),
        nn.AvgPool1D(2, 1), nn.BatchNorm(), nn.GlobalAvgPool(), nn.Dense(3),
    )  # fmt: skip


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Shape]] = {
    "resnet": (resnet, (12, 7, 6, 2)),
    "lenet": (lenet, (12, 9, 10, 1)),
    "temporal": (temporal, (12, 11, 2)),
}


def task(name: str) -> tuple[nn.Module, Array, Array]:
    make, shape = NETWORKS[name]
    return make(), images(shape), np.arange(shape[0]) % 3


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_against_central_differences(name: str) -> None:
    net, x, y = task(name)
    net.fit(x, y, loss="cross_entropy", epochs=1, batch_size=6, dtype="float64")
    assert len(net.check_gradients(x, y).comparisons) == 2 * len(net.parameters)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_natively_as_by_the_reference(name: str) -> None:
    learnt = []
    for backend in ("native", "reference"):
        net, x, y = task(name)
        run = net.fit(
            x, y, loss="cross_entropy", epochs=3, batch_size=5, optimizer=cr.SGD(0.1), dtype="float64", backend=backend, seed=1
        )
        learnt.append({**state(net), "loss": np.array(run.loss), "scores": net.predict(x)})
    for n, value in learnt[0].items():
        np.testing.assert_allclose(value, learnt[1][n], rtol=1e-8, atol=1e-11, err_msg=n)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_bits_for_any_number_of_threads(name: str) -> None:
    learnt = []
    for threads in (1, 2, 3):
        net, x, y = task(name)
        with registered(Threaded(threads)) as backend:
            net.fit(x, y, loss="cross_entropy", epochs=2, batch_size=5, seed=1, backend=backend)
        learnt.append(state(net))
    assert_same(learnt[0], learnt[1])
    assert_same(learnt[0], learnt[2])


def test_a_block_projects_where_shapes_differ() -> None:
    x = images((3, 5, 4, 2))
    projecting = built(nn.Residual(nn.Conv2D(4, 3, 2, "same", "tanh"), nn.Conv2D(4, 1, 2, bias=False)), x)
    p = projecting.parameters
    assert list(p) == ["layer.weight", "layer.bias", "projection.weight"]
    body = oracle.convolution(x, p["layer.weight"], p["layer.bias"], 2, "same", "tanh")
    way = oracle.convolution(x, p["projection.weight"], None, 2)
    np.testing.assert_allclose(projecting.predict(x), body + way, rtol=1e-12, atol=1e-13)


def test_batch_norm_has_a_mean_for_each_channel() -> None:
    x = np.random.default_rng(0).normal(2.0, 3.0, (6, 5, 4, 3))
    net = nn.BatchNorm(momentum=1.0)
    net.fit(x, x, epochs=1, batch_size=6, optimizer=cr.SGD(0.0), dtype="float64")
    np.testing.assert_allclose(net.statistics["mean"], x.mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(net.statistics["variance"], x.reshape(-1, 3).var(axis=0, ddof=1), rtol=1e-12)


class Picture(nn.Recurrent):
    """A recurrent cell whose state is an image."""

    def __init__(self) -> None:
        self.of_input, self.of_state = nn.Conv2D(2, 3, padding="same"), nn.Conv2D(2, 3, padding="same", bias=False)
        super().__init__(state=(4, 3, 2))

    def step(self, state: Any, x: Any) -> tuple[Any, Any]:
        h = np.tanh(self.of_input(x) + self.of_state(state))
        return h, h


FILMS: dict[str, Callable[[], list[nn.Module]]] = {
    "convolutions in a cell": lambda: [Picture(), nn.Flatten()],
    "convolutions of each step": lambda: [
        nn.TimeDistributed(nn.Sequential(nn.Conv2D(3, 2, activation="tanh"), nn.MaxPool2D(2, 1), nn.Flatten())), nn.GRU(3)
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", FILMS)
def test_films(name: str) -> None:
    """Images in time, (batch, time, height, width, channel), of different length."""
    x, y, lengths = images((4, 5, 4, 3, 2)), np.linspace(-1, 1, 4), [5, 2, 4, 1]
    learnt = []
    for backend in ("native", "reference"):
        net = nn.Sequential(*FILMS[name](), nn.Dense(1))
        net.fit(x, y, lengths=lengths, epochs=2, batch_size=2, optimizer=cr.SGD(0.1), dtype="float64", backend=backend, seed=0)
        learnt.append(state(net))
    for n, value in learnt[0].items():
        np.testing.assert_allclose(value, learnt[1][n], rtol=1e-9, atol=1e-12, err_msg=n)
    net.check_gradients(x, y, lengths=lengths)
    short = net.predict(x[1:2, :2])
    np.testing.assert_allclose(net.predict(x, lengths=lengths)[1:2], short, rtol=1e-12)


def test_a_small_network_reads_handwritten_digits() -> None:
    """At least 98 % of 397 digits that it has not seen."""
    x, y = examples.digits()
    order = np.random.default_rng(0).permutation(len(x))
    x, y = x.reshape(-1, 8, 8, 1)[order], y[order]
    net = nn.Sequential(
        nn.Conv2D(16, 3, padding="same", activation="relu"), nn.MaxPool2D(2), nn.Conv2D(32, 3, padding="same", activation="relu"),
        nn.Flatten(), nn.Dense(10),
    )  # fmt: skip
    net.fit(x[:1400], y[:1400], loss="cross_entropy", optimizer=cr.Adam(3e-3), epochs=12, batch_size=50, seed=0)
    assert net.evaluate(x[1400:], y[1400:], metrics=["accuracy"])["accuracy"] >= 0.98


# ------------------------------------------------------------------------------------------------------------ PyTorch's weights


def test_weights_of_pytorch_load_by_name() -> None:
    r = np.random.default_rng(0)
    x = images((3, 6, 5, 4))
    layers = (nn.Conv2D(6, 3, groups=2), nn.BatchNorm(), nn.Flatten(), nn.Dense(2))
    net = nn.Sequential(*layers)
    net.fit(x, np.zeros((3, 2)), epochs=0, dtype="float64")
    weights = {
        "conv.weight": r.normal(size=(6, 2, 3, 3)), "conv.bias": r.normal(size=6),
        "norm.weight": r.normal(size=6), "norm.bias": r.normal(size=6), "norm.running_mean": r.normal(size=6),
        "norm.running_var": r.uniform(1, 2, 6), "norm.num_batches_tracked": np.array(7),
        "head.weight": r.normal(size=(2, 72)), "head.bias": r.normal(size=2),
    }  # fmt: skip
    for name, prefix, flattened in (("0", "conv.", None), ("1", "norm.", None), ("3", "head.", (6, 4, 3))):
        net.load_parameters(nn.torch_parameters(weights, name, prefix=prefix, flattened=flattened), strict=False)
    z = np.empty((3, 6, 4, 3))  # PyTorch's own layout: (B, C, H, W)
    for f in range(6):
        own = x.transpose(0, 3, 1, 2)[:, 2 * (f // 3) : 2 * (f // 3) + 2]
        each = [scipy.signal.correlate(image, weights["conv.weight"][f], mode="valid")[0] for image in own]
        scaled = (np.array(each) + weights["conv.bias"][f] - weights["norm.running_mean"][f]) / np.sqrt(
            weights["norm.running_var"][f] + 1e-5
        )
        z[:, f] = scaled * weights["norm.weight"][f] + weights["norm.bias"][f]
    expected = z.reshape(3, 72) @ weights["head.weight"].T + weights["head.bias"]
    np.testing.assert_allclose(net.predict(x), expected, rtol=1e-10, atol=1e-12)
    along = nn.torch_parameters({"weight": r.normal(size=(5, 2, 3))}, "")
    assert {n: v.shape for n, v in along.items()} == {"weight": (3, 2, 5)}


def test_weights_of_pytorch_that_do_not_fit() -> None:
    w = {"conv.weight": np.ones((6, 2, 3, 3)), "conv.bias": np.ones(6), "head.weight": np.ones((2, 72))}
    with pytest.raises(cr.DataError, match=r'no "weight" and no "weight_ih_l0" among conv\.weight'):
        nn.torch_parameters(w, "0")
    with pytest.raises(cr.DataError, match="that of one layer: name one of ours, not 2"):
        nn.torch_parameters(w, "0", "1", prefix="conv.")
    with pytest.raises(cr.DataError, match=r"shape \(2, 72\) does not read images of shape \(6, 4, 4\).*would be 96"):
        nn.torch_parameters(w, "0", prefix="head.", flattened=(6, 4, 4))
    with pytest.raises(cr.DataError, match="does not read images"):
        nn.torch_parameters(w, "0", prefix="conv.", flattened=(18,))
    with pytest.raises(cr.DataError, match=r'there is no "lstm\.weight" among'):
        nn.torch_parameters(w, "0", prefix="lstm.", flattened=(18,))


# ------------------------------------------------------------------------------------------------------------------- wrong inputs

FITTING: list[tuple[nn.Module, Shape, str]] = [
    (nn.Conv2D(4, 3), (6, 28, 28), r"Conv2D needs images.*\(B, H, W, C\).*28, 28\).*grey images have one channel, x\[\.\.\., None\]"),
    (nn.Conv2D(4, 3), (6, 784), r"Conv2D needs images.*Reshape\(height, width, channels\)"),
    (nn.Conv2D(4, 3), (6, 2, 8, 8, 3), r"Conv2D needs images.*it got \(\w+, 2, 8, 8, 3\)"),
    (nn.Conv1D(4, 3), (6, 40), r"Conv1D needs sequences.*\(B, T, C\).*x\[\.\.\., None\]"),
    (nn.Conv1D(4, 3), (6, 8, 8, 1), r"Conv1D needs sequences.*Conv2D"),
    (nn.MaxPool2D(), (6, 28, 28), r"MaxPool2D needs images.*x\[\.\.\., None\].*MaxPool1D"),
    (nn.AvgPool1D(), (6, 8, 8, 1), r"AvgPool1D needs sequences.*AvgPool2D"),
    (nn.GlobalAvgPool(), (6, 8), r"GlobalAvgPool needs images"),
    (nn.Dropout2D(0.1), (6, 8), r"Dropout2D needs images"),
    (nn.Conv2D(4, 5), (6, 4, 9, 1), r"Conv2D: a window of 5 x 5 does not fit into 4 x 9: .*padding=\"same\""),
    (nn.Conv2D(4, 3, dilation=2, padding=1), (6, 2, 9, 1), r"of 3 x 3, 5 x 5 with its dilation, .*into 2 x 9, 4 x 11 with its padding"),
    (nn.Conv1D(4, 7), (6, 5, 1), r"Conv1D: a window of 7 does not fit into 5: "),
    (nn.MaxPool2D(3), (6, 9, 2, 1), r"MaxPool2D: a window of 3 x 3 does not fit into 9 x 2"),
    (nn.Conv2D(4, 3, groups=2), (6, 8, 8, 3), r"Conv2D: 3 channels do not divide into 2 groups"),
    (nn.Residual(nn.Conv2D(4, 3, 2, "same")), (6, 7, 8, 3), r"Residual: .*Residual\(layer, Conv2D\(4, 1, stride=2, bias=False\)"),
    (nn.Residual(nn.Conv1D(3, 3, 3, "same")), (6, 7, 3), r"Residual: .*Residual\(layer, Conv1D\(3, 1, stride=3, bias=False\)"),
    (nn.Residual(nn.Conv2D(4, 1)), (6, 7, 8, 3), r"Residual: .*Residual\(layer, Dense\(4, bias=False\)"),
    (nn.Residual(nn.Conv2D(4, 3, 2, "same"), nn.Conv2D(4, 1)), (6, 7, 8, 3), r"its projection into \(\w+, 7, 8, 4\); .*agree"),
]  # fmt: skip


@pytest.mark.parametrize(("layer", "shape", "said"), FITTING, ids=[f"{n[0]!r}-{n[1]}" for n in FITTING])
def test_inputs_that_do_not_fit(layer: nn.Module, shape: Shape, said: str) -> None:
    net = nn.Sequential(nn.Activation("tanh"), layer)
    with pytest.raises(cr.ShapeError, match=said) as caught:
        net.fit(np.ones(shape), np.ones((6, 1)))
    assert 'layer "1"' in str(caught.value)
    assert re.search(r"test_convolution\.py:\d+", str(caught.value))
    assert not net.built


def test_what_the_proposed_projection_says_is_true() -> None:
    x = np.ones((2, 7, 8, 3))
    net = nn.Residual(nn.Conv2D(4, 3, 2, "same"), nn.Conv2D(4, 1, stride=2, bias=False))
    net.fit(x, np.zeros((2, 4, 4, 4)), epochs=0)


@pytest.mark.parametrize("use", ["predict", "fit", "gradients", "call"])
@pytest.mark.parametrize(
    ("built_for", "given", "remedy"),
    [
        ((6, 6, 3), (6, 6, 1), "np.repeat(x, 3, axis=-1) makes grey images of three channels"),
        ((6, 6, 1), (6, 6, 3), "np.mean(x, axis=-1, keepdims=True) makes colour images grey"),
        ((6, 6, 1), (6, 6), "x[..., None] gives it the last axis"),
        ((6, 6, 3), (6, 6), "net.reset()"),
        ((6, 6, 3), (6, 7, 3), "net.reset()"),
    ],
)
def test_images_of_another_kind_than_a_network_was_built_for(use: str, built_for: Shape, given: Shape, remedy: str) -> None:
    net = nn.Sequential(nn.Conv2D(4, 3), nn.GlobalAvgPool(), nn.Dense(2))
    net.fit(np.ones((4, *built_for)), np.ones((4, 2)), epochs=0)
    uses: dict[str, Callable[[Array], Any]] = {
        "predict": net.predict,
        "fit": lambda x: net.fit(x, np.ones((4, 2))),
        "gradients": lambda x: net.gradients(x, np.ones((4, 2))),
        "call": net,
    }
    said = f"rows of shape {given}, but this network was built for rows of shape {built_for}; {remedy}"
    with pytest.raises(cr.ShapeError, match=re.escape(said)):
        uses[use](np.ones((4, *given)))


def test_bytes_are_images_too() -> None:
    x = np.random.default_rng(0).integers(0, 256, (6, 7, 5, 1)).astype(np.uint8)
    net = nn.Sequential(nn.Conv2D(4, 3, activation="relu"), nn.MaxPool2D(2), nn.Flatten(), nn.Dense(3))
    net.fit(x, np.arange(6) % 3, loss="cross_entropy", epochs=2)
    np.testing.assert_array_equal(net.predict(x), net.predict(x.astype(np.float32)))


def test_sequences_of_different_length_are_refused() -> None:
    texts, y = [np.ones((4, 2)), np.ones((6, 2))], np.ones(2)
    causal = nn.Conv1D(3, 2, padding="causal")
    for rest in ([nn.GlobalAvgPool()], [nn.GRU(3)]):
        with pytest.raises(cr.DataError, match=r"no layer of this network knows where .* unless a layer before them mixes steps"):
            nn.Sequential(causal, *rest, nn.Dense(1)).fit(texts, y)
    with pytest.raises(cr.DataError, match=r'rows differ in length, and layer "1".* mixes their steps'):
        nn.Sequential(nn.GRU(3, True), causal, nn.GlobalAvgPool(), nn.Dense(1)).fit(texts, y)
    net = nn.Sequential(nn.GRU(3, True), causal)
    with pytest.raises(cr.UsageError, match=r"truncate needs a score.* where scores mix steps"):
        net.fit(np.ones((2, 6, 2)), np.ones((2, 6, 3)), truncate=(2, 2))


MAKING = [
    (lambda: nn.Conv2D(0, 3), "Conv2D: filters .*not 0"),
    (lambda: nn.Conv2D(4, 0), "Conv2D: kernel .*not 0"),
    (lambda: nn.Conv2D(4, (3, 3, 3)), r"Conv2D: kernel must be one number, or two: \(height, width\), not \(3, 3, 3\)"),
    (lambda: nn.Conv1D(4, (3, 3)), r"Conv1D: kernel must be one number, not \(3, 3\)"),
    (lambda: nn.Conv2D(4, 3, stride=0), "Conv2D: stride .*not 0"),
    (lambda: nn.Conv2D(4, 3, stride=1.5), r"Conv2D: stride .*1\.5"),
    (lambda: nn.Conv2D(4, 3, dilation=0), "Conv2D: dilation .*not 0"),
    (lambda: nn.Conv2D(4, 3, groups=0), "Conv2D: groups .*not 0"),
    (lambda: nn.Conv2D(4, 3, groups=3), "Conv2D: 4 filters do not divide into 3 groups.*multiple of 3"),
    (lambda: nn.Conv2D(4, 3, padding="full"), 'Conv2D: there is no padding "full".*Known: valid, same, causal, a number'),
    (lambda: nn.Conv2D(4, 3, padding=-1), "Conv2D: padding must be .*not -1"),
    (lambda: nn.Conv2D(4, 3, padding=(1, 2, 3)), r"Conv2D: padding .*\(1, 2, 3\)"),
    (lambda: nn.Conv2D(4, 3, padding=(1, (2, 3, 4))), r"Conv2D: padding .*\(1, \(2, 3, 4\)\)"),
    (lambda: nn.Conv1D(4, 3, padding=(1, 1.5)), r"Conv1D: padding .*causal.*\(1, 1\.5\)"),
    (lambda: nn.Conv1D(4, 3, activation="rellu"), 'no activation called "rellu"'),
    (lambda: nn.MaxPool2D(0), "MaxPool2D: size .*not 0"),
    (lambda: nn.MaxPool2D(2, padding=2), "MaxPool2D: padding 2 is not less than the size 2 x 2"),
    (lambda: nn.AvgPool1D(2, padding=(0, 3)), r"AvgPool1D: padding \(0, 3\) is not less than the size 2"),
    (lambda: nn.MaxPool1D(2, padding="causal"), r'MaxPool1D: padding="causal" is for convolutions; .* \(n, 0\)'),
    (lambda: nn.AvgPool2D(2, padding="causal"), r'AvgPool2D: padding="causal" is for convolutions; .*\(\(n, 0\), \(n, 0\)\)'),
    (lambda: nn.Dropout2D(1.0), r"Dropout2D: the rate .*1\.0"),
    (lambda: nn.Residual(nn.Dense(3), nn.Dense), "the class Dense"),
    (lambda: nn.Residual(nn.Dense(3), 3), "Residual: projection takes layers, not 3"),
]


@pytest.mark.parametrize(("make", "said"), MAKING, ids=[said[:40] for _, said in MAKING])
def test_a_layer_made_wrongly(make: Callable[[], Any], said: str) -> None:
    with pytest.raises((cr.UsageError, cr.UnknownNameError), match=said):
        make()


@pytest.mark.parametrize("kind", ["MaxPool2D", "AvgPool2D"])
def test_a_pooling_far_larger_than_the_image_sees_all_of_it_at_once(kind: str) -> None:
    x = np.random.default_rng(0).normal(size=(2, 28, 28, 1))
    net = getattr(nn, kind)(10**6, padding="same")
    net.fit(x, np.ones((2, 1, 1, 1)), epochs=0)
    whole = x.max(axis=(1, 2)) if kind == "MaxPool2D" else x.mean(axis=(1, 2))
    np.testing.assert_allclose(net.predict(x)[:, 0, 0], whole, rtol=1e-5)
