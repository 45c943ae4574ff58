"""Saved networks for tests: layers of a user, a file with everything in it and what stands in it, and a watch that no file runs code."""

from __future__ import annotations

import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from networks import data

import chainrule as cr
from chainrule import nn


class Scaled(nn.Module):
    """A layer of a user."""

    def __init__(self, layer: nn.Module, factor: float = 2.0, *, names: tuple[str, ...] = ()) -> None:
        self.layer, self.factor, self.names = layer, factor, names

    def __call__(self, x: Any) -> Any:
        return self.factor * self.layer(x) * self.parameter("gain", (1,), "ones")


class Noted(nn.Module):
    """A layer with an array that it only keeps."""

    def __init__(self, notes: Any) -> None:
        self.notes = notes

    def __call__(self, x: Any) -> Any:
        return x


def there_and_back(net: nn.Module, folder: Path, layers: Any = ()) -> nn.Module:
    path = folder / "net.safetensors"
    net.save(path)
    return cr.load(path, layers=layers)


def same_array(a: Any, b: Any) -> bool:
    """The same bits in the same order, of the same type, byte order included."""
    return type(a) is type(b) is np.ndarray and (a.shape, a.dtype.str, a.tobytes()) == (b.shape, b.dtype.str, b.tobytes())


def built(folder: Path, path: Path | None = None) -> Path:
    """A file with everything in it: nested and shared layers, arrays as arguments, statistics, slots, a schedule's state, several
    epochs."""
    _, t = data()
    shared = nn.Dense(3, "tanh")
    net = nn.Sequential(nn.Embedding(9, 2), nn.Flatten(), nn.Dense(3), shared, nn.Residual(shared), nn.BatchNorm(), nn.Dropout(0.1),
                        nn.Reshape(3), nn.Dense(2), nn.Rescale(1.0, np.array([0.1, 0.2]), np.array([1, 2], ">f4")))  # fmt: skip
    words = np.arange(24).reshape(12, 2) % 9
    plateau = cr.schedules.reduce_on_plateau(0.1, patience=0)
    net.fit(words, t, epochs=2, batch_size=6, loss=cr.losses.huber(2.0), optimizer=cr.RMSprop(plateau, momentum=0.5))
    path = path or folder / "whole.safetensors"
    net.save(path)
    return path


def parts(raw: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file: 8 bytes of length, JSON, arrays."""
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


@pytest.fixture(autouse=True)
def no_code_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"a file made us run {args}")

    for place, name in ((os, "system"), (os, "popen"), (pickle, "loads"), (pickle, "load"), (pickle, "Unpickler")):
        monkeypatch.setattr(place, name, run)
