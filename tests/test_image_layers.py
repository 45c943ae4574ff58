"""Layers for pictures: bytes that stay bytes in memory, and pictures that are changed at random in training."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import chainrule as cr
from chainrule import nn

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
