"""Layers for pictures: bytes that stay bytes in memory, and pictures that are changed at random in training."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from native import Threaded

import chainrule as cr
from chainrule import nn
from chainrule.graph.node import OPS, Type
from chainrule.ops.random import fold_in, key_of
from chainrule.program import Input, ProgramBuilder
from chainrule.run.backend import Backend, backends

Array = np.ndarray


def pictures(rows: int, shape: tuple[int, ...] = (7, 6), seed: int = 0) -> tuple[Array, Array]:
    r = np.random.default_rng(seed)
    return r.integers(0, 256, (rows, *shape), dtype=np.uint8), r.integers(0, 3, rows)


def network(first: Any) -> nn.Sequential:
    return nn.Sequential(first, nn.Flatten(), nn.Dense(16, "relu"), nn.Dense(3))


# ------------------------------------------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("channels", [(), (3,)])
def test_bytes_give_the_bits_of_numbers_that_were_converted_first(backend: str, channels: tuple[int, ...]) -> None:
    x, y = pictures(70, (7, 6, *channels))
    mean, std = ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)) if channels else (0.5, 0.3)
    layer = nn.Rescale(mean=mean, std=std)
    options: Any = {"loss": "cross_entropy", "epochs": 3, "batch_size": 32, "validation": 0.2, "backend": backend}
    whole = x.astype(np.float32)
    converted = (whole * np.float32(1 / 255) - np.float32(mean)) / np.float32(std)
    nets = [network(layer), network(layer)]
    plain = network(nn.Activation("identity"))
    runs = [net.fit(given, y, **options) for net, given in zip([*nets, plain], [x, whole, converted], strict=True)]
    for net, run, given in zip([nets[1], plain], runs[1:], [whole, converted], strict=True):
        assert run.loss == runs[0].loss
        assert run.validation_loss == runs[0].validation_loss
        assert all(np.array_equal(net.parameters[n], v) for n, v in nets[0].parameters.items())
        assert np.array_equal(net.predict(given, backend=backend), nets[0].predict(x, backend=backend))
        assert net.evaluate(given, y, backend=backend) == nets[0].evaluate(x, y, backend=backend)
        ours, theirs = (n.gradients(g, y, backend=backend) for n, g in ((nets[0], x), (net, given)))
        assert all(np.array_equal(ours[n], theirs[n]) for n in ours)


def test_no_copy_of_bytes_as_numbers_is_made() -> None:
    """A float32 copy of the data would take four times the data; what is allowed is one of the bytes, where rows are held out."""
    x, y = pictures(40_000, (16, 16))
    net = network(nn.Rescale(mean=0.5, std=0.3))
    net.fit(x[:256], y[:256], loss="cross_entropy", epochs=1)  # compiling takes memory of its own
    net.fit(x[:256], y[:256], epochs=1, validation=0.1)
    uses: dict[str, tuple[float, Callable[[], Any]]] = {
        "fit": (0.5, lambda: net.fit(x, y, epochs=1)),
        "evaluate": (0.5, lambda: net.evaluate(x, y, metrics=["accuracy"])),
        "predict": (0.5, lambda: net.predict(x)),
        "fit with validation": (1.4, lambda: net.fit(x, y, epochs=1, validation=0.1)),
    }
    for name, (most, use) in uses.items():
        tracemalloc.start()
        use()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < most * x.nbytes, name


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Rescale(scale=(1.0, 2.0)), "scale is one number"),
        (lambda: nn.Rescale(std=0), "std above 0"),
        (lambda: nn.Rescale(mean=float("nan")), "mean is a finite number"),
        (lambda: nn.Rescale(mean="half"), "mean is a finite number"),
    ],
)
def test_what_rescale_refuses(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(cr.UsageError, match=message):
        make()


def test_rescale_needs_as_many_channels_as_it_has_numbers() -> None:
    x, y = pictures(4, (5, 5, 4))
    with pytest.raises(cr.ShapeError, match=r"3 numbers for mean.*\(2, 5, 5, 4\)"):
        network(nn.Rescale(mean=(0.1, 0.2, 0.3))).fit(x, y, loss="cross_entropy", epochs=0)


# ------------------------------------------------------------------------------------------------- pictures changed at random


def changed(layer: nn.Augment, x: Array, *, seed: int = 0, step: int = 0, backend: Backend | None = None) -> Array:
    """What the layer makes of pictures in a step of a training."""
    dtype = "float64" if x.dtype == np.float64 else "float32"
    layer.reset()
    layer.fit(x, np.zeros_like(x), loss=lambda s, t: np.mean(s), epochs=0, dtype=dtype)
    key = [Input("seed", Type((2,), np.dtype(np.uint32))), Input("step", Type((), np.dtype(np.uint32)))]
    builder = ProgramBuilder([], [Input("x", Type(x.shape, np.dtype(dtype)), rows=0), *key], len(x))

    def entry(state: Any, given: Any) -> Any:
        return {"y": layer._forward(state, {"x": given["x"]}, True)[0]}, {}

    builder.entry("step", entry, ["x", "seed", "step"], key=lambda given: fold_in(given["seed"], given["step"]))
    session = (backend or backends["native"]).session({len(x): builder.build()}, {})
    return session.call(len(x), "step", {"x": x, "seed": key_of(seed), "step": np.uint32(step)})["y"]


class Numbers:
    """The random numbers of a step, drawn in float64 or float32 as the layer draws them: one stream for each use."""

    def __init__(self, dtype: Any, seed: int = 0, step: int = 0) -> None:
        self.bits, self.dtype, self.stream = OPS["random_bits"].value, np.dtype(dtype), 0
        self.key = self.bits(key_of(seed), np.uint32(step), shape=(2,), stream=0)

    def __call__(self, shape: tuple[int, ...], normal: bool = False) -> Array:
        self.stream += 1
        words = [self.bits(self.key, np.uint32(0), shape=shape, stream=4 * self.stream + i).astype(np.float64) for i in range(4)]
        if self.dtype == np.float64:
            parts = [(np.floor(a / 32) * 2.0**26 + np.floor(b / 64)) * 2.0**-53 for a, b in (words[:2], words[2:])]
        else:
            parts = [np.floor(w / 256) * 2.0**-24 for w in words]
        if not normal:
            return parts[0]
        return np.sqrt(-2 * np.log(1 - parts[0])) * np.cos(2 * math.pi * parts[1])

    def coin(self, shape: tuple[int, ...]) -> Array:
        self.stream += 1
        return np.floor(self.bits(self.key, np.uint32(0), shape=shape, stream=4 * self.stream) / 256) * 2.0**-24 < 0.5


def oracle(x: Array, draw: Numbers, shift: int = 0, flip: bool = False, rotate: float = 0, scale: float = 0, noise: float = 0,
           cutout: int = 0) -> Array:  # fmt: skip
    """The layer's docstring, pixel by pixel."""
    rows, height, width = x.shape[:3]
    one = (rows, 1, 1)
    zero = np.zeros(rows)
    down = np.floor(draw(one) * (2 * shift + 1)).ravel() - shift if shift else zero
    right = np.floor(draw(one) * (2 * shift + 1)).ravel() - shift if shift else zero
    factor = 1 - scale + 2 * scale * draw(one).ravel() if scale else zero + 1
    angle = math.radians(rotate) * (2 * draw(one).ravel() - 1) if rotate else zero
    mirrored = draw.coin(one).ravel() if flip else zero > 0
    y = np.zeros(x.shape)
    for b, i, j in np.ndindex(rows, height, width):
        p, q = i - (height - 1) / 2 - down[b], j - (width - 1) / 2 - right[b]
        p, q = p / factor[b], q / factor[b]
        p, q = math.cos(angle[b]) * p + math.sin(angle[b]) * q, math.cos(angle[b]) * q - math.sin(angle[b]) * p
        q = -q if mirrored[b] else q
        p, q = p + (height - 1) / 2, q + (width - 1) / 2
        for r in range(max(math.ceil(p - 1), 0), min(math.floor(p + 1), height - 1) + 1):
            for c in range(max(math.ceil(q - 1), 0), min(math.floor(q + 1), width - 1) + 1):
                y[b, i, j] += x[b, r, c] * (1 - abs(p - r)) * (1 - abs(q - c))
    if noise:
        y = y + noise * draw(x.shape, normal=True)
    if cutout:
        top = np.floor(draw(one) * height).ravel() - cutout // 2
        left = np.floor(draw(one) * width).ravel() - cutout // 2
        for b, i, j in np.ndindex(rows, height, width):
            if top[b] <= i < top[b] + cutout and left[b] <= j < left[b] + cutout:
                y[b, i, j] = 0
    return y


ALL: dict[str, Any] = {"shift": 2, "flip": True, "rotate": 20, "scale": 0.2, "noise": 0.05, "cutout": 3}
KINDS: list[dict[str, Any]] = [{k: v} for k, v in ALL.items()] + [{"shift": 3, "flip": True}, {"shift": 1, "rotate": 45}, ALL]


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("shape", [(6, 7), (5, 6, 3)])
@pytest.mark.parametrize("options", KINDS, ids=lambda o: "-".join(o))
def test_augment_against_the_definition(options: dict[str, Any], shape: tuple[int, ...], dtype: str, backend: str) -> None:
    x = np.random.default_rng(0).normal(size=(9, *shape)).astype(dtype)
    found = changed(nn.Augment(**options), x, seed=3, step=2, backend=backends[backend])
    assert found.dtype == dtype
    expected = oracle(x.astype(np.float64), Numbers(dtype, 3, 2), **options)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 if dtype == "float64" else 2e-5)


@pytest.mark.parametrize("options", KINDS, ids=lambda o: "-".join(o))
def test_augment_gives_the_same_bits_on_any_number_of_threads(options: dict[str, Any]) -> None:
    x = np.random.default_rng(0).normal(size=(37, 9, 8)).astype(np.float32)
    found = [changed(nn.Augment(**options), x, backend=Threaded(n)) for n in (1, 2, 5)]
    assert all(np.array_equal(found[0], other) for other in found[1:])


def test_training_on_changed_bytes_has_the_same_bits_on_any_number_of_threads() -> None:
    x, y = pictures(200, (9, 8))

    def parameters(threads: int) -> dict[str, Array]:
        net = nn.Sequential(nn.Rescale(), nn.Augment(**ALL), nn.Flatten(), nn.Dense(16, "relu"), nn.Dense(3))
        net.fit(x, y, loss="cross_entropy", epochs=2, threads=threads)
        return net.parameters

    one, three = parameters(1), parameters(3)
    assert all(np.array_equal(one[n], three[n]) for n in one)


def test_augment_is_off_at_evaluation() -> None:
    x = np.random.default_rng(0).normal(size=(8, 6, 5)).astype(np.float32)
    layer = nn.Augment(**ALL)
    layer.fit(x, x, loss="mse", epochs=0)
    assert np.array_equal(layer.predict(x), x)
    assert np.array_equal(changed(nn.Augment(), x), x)


def test_each_step_and_each_picture_is_changed_anew() -> None:
    x = np.tile(np.random.default_rng(0).normal(size=(1, 12, 12)), (6, 1, 1))
    layer = nn.Augment(rotate=10)
    first, second = changed(layer, x, step=0), changed(layer, x, step=1)
    every = [*first, *second]
    assert all(not np.array_equal(a, b) for n, a in enumerate(every) for b in every[:n])
    assert np.array_equal(first, changed(layer, x, step=0))
    assert not np.array_equal(first, changed(layer, x, step=0, seed=1))


ROWS = 4000


def dots(places: list[tuple[int, int]], size: int = 15) -> Array:
    x = np.zeros((ROWS, size, size))
    for at, (i, j) in enumerate(places):
        x[:, i, j] = at + 1
    return x


def even(counts: Array) -> bool:
    """Whether counts of equally likely things are within five standard deviations."""
    p = 1 / counts.size
    return bool((np.abs(counts / ROWS - p) < 5 * math.sqrt(p * (1 - p) / ROWS)).all())


def test_shifts_are_even_and_independent() -> None:
    y = changed(nn.Augment(shift=2), dots([(7, 7)]))
    assert (y.sum(axis=(1, 2)) == 1).all()
    _, i, j = np.nonzero(y)
    counts = np.histogram2d(i, j, bins=[np.arange(5, 11), np.arange(5, 11)])[0]
    assert counts.sum() == ROWS
    assert even(counts)


def test_what_leaves_the_picture_is_lost_and_0_comes_in() -> None:
    y = changed(nn.Augment(shift=1), np.ones((ROWS, 4, 4)))
    assert set(y.sum(axis=(1, 2)).tolist()) == {9.0, 12.0, 16.0}


def test_half_of_the_pictures_are_mirrored() -> None:
    x = np.random.default_rng(0).normal(size=(ROWS, 3, 4))
    y = changed(nn.Augment(flip=True), x)
    same, other = (y == x).all(axis=(1, 2)), (y == x[:, :, ::-1]).all(axis=(1, 2))
    assert (same ^ other).all()
    assert even(np.array([same.sum(), other.sum()]))


def centre_of_mass(y: Array) -> Iterator[Array]:
    for axis in (1, 2):
        at = np.arange(y.shape[axis]) - (y.shape[axis] - 1) / 2
        yield y.sum(axis=3 - axis) @ at / y.sum(axis=(1, 2))


def test_rotation_and_scale_are_within_their_ranges_and_fill_them() -> None:
    """A dot six pixels right of the middle: its way round says the angle, its distance the factor."""
    down, right = centre_of_mass(changed(nn.Augment(rotate=30), dots([(7, 13)])))
    angle = np.degrees(np.arctan2(down, right))
    assert np.abs(angle).max() < 31
    assert even(np.histogram(angle, bins=[-31, 0, 31])[0])
    assert (np.abs(angle) > 25).mean() == pytest.approx(1 / 6, abs=0.05)
    down, right = centre_of_mass(changed(nn.Augment(scale=0.25), dots([(7, 11)])))
    assert np.abs(down).max() < 1e-9
    assert (right / 4).min() > 0.7
    assert (right / 4).max() < 1.3
    assert even(np.histogram(right / 4, bins=[0.7, 1, 1.3])[0])
    assert (right / 4 > 1.2).mean() == pytest.approx(0.1, abs=0.05)


def test_noise_is_normal() -> None:
    y = changed(nn.Augment(noise=0.5), np.zeros((ROWS, 5, 5)))
    each = y.ravel()
    assert abs(each.mean()) < 5 * 0.5 / math.sqrt(each.size)
    assert each.std() == pytest.approx(0.5, rel=0.02)
    assert (np.abs(each) < 0.5).mean() == pytest.approx(0.6827, abs=0.01)
    assert abs(np.corrcoef(y[:, 0, 0], y[:, 0, 1])[0, 1]) < 5 / math.sqrt(ROWS)


def test_the_square_lies_anywhere() -> None:
    gone = changed(nn.Augment(cutout=3), np.ones((ROWS, 5, 6))) == 0
    heights, widths = gone.any(axis=2).sum(axis=1), gone.any(axis=1).sum(axis=1)
    assert (gone.sum(axis=(1, 2)) == heights * widths).all()
    assert set(heights.tolist()) == set(widths.tolist()) == {2, 3}
    top, left = gone.any(axis=2).argmax(axis=1), gone.any(axis=1).argmax(axis=1)
    middles = np.stack(
        [np.where(heights == 3, top + 1, np.where(top == 0, 0, 4)), np.where(widths == 3, left + 1, np.where(left == 0, 0, 5))]
    )
    assert even(np.histogram2d(*middles, bins=[np.arange(6), np.arange(7)])[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shift": -1}, "shift is at least 0, in whole pixels"),
        ({"shift": 1.5}, "shift is at least 0, in whole pixels"),
        ({"cutout": True}, "cutout is at least 0"),
        ({"rotate": 181}, "rotate is at least 0, in degrees, up to 180"),
        ({"scale": 1}, "scale is at least 0, in a share below 1"),
        ({"noise": float("nan")}, "noise is at least 0"),
        ({"noise": "much"}, "noise is at least 0"),
        ({"noise": float("inf")}, "noise is at least 0, in a deviation, up to 1e30"),
        ({"noise": 1e308}, "noise is at least 0, in a deviation, up to 1e30"),
        ({"shift": 10**30}, "shift is at least 0, in whole pixels, up to a million"),
        ({"cutout": 10**30}, "cutout is at least 0, in whole pixels, up to a million"),
    ],
)
def test_what_augment_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(cr.UsageError, match=message):
        nn.Augment(**options)


def test_augment_needs_pictures() -> None:
    with pytest.raises(cr.ShapeError, match=r"needs pictures .*\(2, 6\)"):
        nn.Augment(shift=1).fit(np.ones((4, 6)), np.ones((4, 6)), loss="mse", epochs=0)
