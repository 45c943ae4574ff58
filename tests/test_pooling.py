"""Poolings in the kernels of convolutions: which are, what is stored, and the same bits as without."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from native import Threaded, registered
from same import assert_same, state

from chainrule import nn
from chainrule.compiler import pipeline
from chainrule.compiler.affine import Affine, Axis, of
from chainrule.compiler.kernels import Kernel, kernels_of
from chainrule.compiler.pooling import _covers, pooled
from chainrule.run import machines

Array = np.ndarray
Make = Callable[[], nn.Module]

NETS: dict[str, tuple[tuple[int, ...], Make, int]] = {  # shape of an image, network, how many poolings become part of another kernel
    "max": ((10, 10, 2), lambda: nn.Sequential(nn.Conv2D(3, 3, activation="relu"), nn.MaxPool2D(2)), 1),
    "average": ((10, 10, 2), lambda: nn.Sequential(nn.Conv2D(3, 3, activation="tanh"), nn.AvgPool2D(2)), 1),
    "of four along one axis": ((11, 2), lambda: nn.Sequential(nn.Conv1D(3, 4, activation="relu"), nn.MaxPool1D(4)), 1),
    "of three": ((11, 2), lambda: nn.Sequential(nn.Conv1D(3, 3, activation="relu"), nn.MaxPool1D(3)), 1),
    "activation behind": ((10, 10, 1), lambda: nn.Sequential(nn.Conv2D(3, 3), nn.MaxPool2D(2), np.tanh), 1),
    "one filter": ((10, 10, 2), lambda: nn.Sequential(nn.Conv2D(1, 3, activation="relu"), nn.MaxPool2D(2)), 1),
    "two": (
        (14, 14, 1),
        lambda: nn.Sequential(
            nn.Conv2D(3, 3, activation="relu"), nn.MaxPool2D(2), nn.Conv2D(4, 3, activation="relu"), nn.MaxPool2D(2)
        ),
        2,
    ),
    "a row is left over": ((9, 10, 2), lambda: nn.Sequential(nn.Conv2D(3, 3, activation="relu"), nn.MaxPool2D(2)), 0),
    "windows overlap": ((9, 9, 2), lambda: nn.Sequential(nn.Conv2D(3, 3, activation="relu"), nn.MaxPool2D(3, stride=2)), 0),
    "too many places": ((11, 11, 2), lambda: nn.Sequential(nn.Conv2D(3, 3, activation="relu"), nn.MaxPool2D(3)), 0),
    "padded": ((8, 8, 2), lambda: nn.Sequential(nn.Conv2D(3, 3, padding="same"), nn.MaxPool2D(2)), 1),
    "of the data": ((8, 8, 2), lambda: nn.Sequential(nn.MaxPool2D(2), nn.Conv2D(3, 3)), 0),
    "channels in lanes": ((8, 8, 2), lambda: nn.Sequential(nn.Conv2D(64, 3, activation="relu"), nn.MaxPool2D(2)), 0),
}  # fmt: skip


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Callable[..., Any]], list[list[Kernel]]]:
    """Machine code is made anew, by this in place of the pass; kernels before and after it are noted."""
    turns = count()

    def use(taken: Callable[..., Any]) -> list[list[Kernel]]:
        noted: list[list[Kernel]] = []

        def noting(items: Any) -> list[Any]:
            noted.append([*kernels_of(items)])
            made = [*taken(items)]
            noted.append([*kernels_of(made)])
            return made

        monkeypatch.setenv("CHAINRULE_CACHE", str(tmp_path / str(next(turns))))
        monkeypatch.setattr(machines, "_machines", OrderedDict())
        monkeypatch.setattr(pipeline, "pooled", noting)
        return noted

    return use


def trained(shape: tuple[int, ...], make: Make, threads: int) -> tuple[dict[str, Array], Array]:
    """What a network has learnt from batches of 32, 32 and 1, and what it says."""
    r = np.random.default_rng(0)
    x = r.normal(size=(65, *shape)).astype(np.float32)
    net = nn.Sequential(make(), nn.Flatten(), nn.Dense(2))
    with registered(Threaded(threads)) as name:
        net.fit(x, r.normal(size=(65, 2)), epochs=2, batch_size=32, backend=name)
        return state(net), net.predict(x, backend=name)


@pytest.mark.parametrize("name", NETS)
def test_the_same_bits_as_without(name: str, passes: Callable[..., Any]) -> None:
    shape, make, fewer = NETS[name]
    noted = passes(pooled)
    got, said = trained(shape, make, 1)
    assert max(len(a) - len(b) for a, b in zip(noted[::2], noted[1::2], strict=True)) == fewer
    several = trained(shape, make, 3)
    passes(list)
    want, theirs = trained(shape, make, 1)
    assert_same(got, want)
    assert_same(several[0], want)
    np.testing.assert_array_equal(said, theirs)
    np.testing.assert_array_equal(several[1], theirs)


@pytest.mark.parametrize("name", ["max", "average", "two", "of four along one axis"])
def test_as_the_reference_says(name: str) -> None:
    shape, make, _ = NETS[name]
    nets = [nn.Sequential(make(), nn.Flatten(), nn.Dense(2)) for _ in range(2)]
    x = np.random.default_rng(0).normal(size=(65, *shape))
    for net, backend in zip(nets, ("native", "reference"), strict=True):
        net.fit(x, np.ones((65, 2)), epochs=2, batch_size=32, backend=backend, dtype="float64")
    for key, value in state(nets[1]).items():
        np.testing.assert_allclose(state(nets[0])[key], value, rtol=1e-8, atol=1e-10, err_msg=key)


def test_what_is_no_number_stays_none() -> None:
    shape, make, _ = NETS["two"]
    x = np.random.default_rng(0).normal(size=(32, *shape)).astype(np.float32)
    net = make()
    net.fit(x, np.zeros((32, 2, 2, 4)), epochs=1, batch_size=32, backend="native")
    x[3:8] = np.sign(x[3:8]) * 3e38
    net.load_parameters({name: value * 10 for name, value in net.parameters.items()})
    got, want = (net.predict(x, backend=b) for b in ("native", "reference"))
    assert np.isnan(want[3:8]).any()  # ∞ - ∞, in the second convolution
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    np.testing.assert_array_equal(np.isinf(got), np.isinf(want))


def test_what_is_pooled_is_stored_only_for_the_way_back(passes: Callable[..., Any]) -> None:
    noted = passes(pooled)
    shape, make, _ = NETS["max"]
    x = np.zeros((32, *shape), np.float32)
    net = make()
    net.fit(x, np.zeros((32, 4, 4, 3)), epochs=1, batch_size=32, backend="native")

    def stores() -> int:
        (fused,) = (k for k in noted[-1] if sum(v.op == "reduce" for v in k.values()) == 4)
        return len(fused.stores)

    assert stores() == 10  # of four places what came out and whether it is above 0; the largest; the loss's gradient by it
    net.predict(x, backend="native")
    assert stores() == 1


def test_the_average_of_minus_zeros_is_zero() -> None:
    x = np.full((32, 10, 10, 2), -0.0, np.float32)
    net = nn.Sequential(nn.Conv2D(3, 3, bias=False), lambda y: y * -1, nn.AvgPool2D(2))  # a convolution's own sum is +0
    net.fit(x, np.zeros((32, 4, 4, 3)), epochs=1, batch_size=32, backend="native")
    net.load_parameters({name: np.ones_like(value) for name, value in net.parameters.items()})
    got, want = (net.predict(x, backend=b) for b in ("native", "reference"))
    np.testing.assert_array_equal(np.signbit(got), np.signbit(want))


def test_a_kernel_does_not_grow_without_end(passes: Callable[..., Any]) -> None:
    """An activation of many expensive operators is computed once for each place: not four times in one kernel."""

    def heavy(x: Any) -> Any:
        for _ in range(6):
            x = np.tanh(x) + np.exp(-x * x)
        return x

    noted = passes(pooled)
    trained((10, 10, 2), lambda: nn.Sequential(nn.Conv2D(3, 3), heavy, nn.MaxPool2D(2)), 1)
    assert all(len(a) == len(b) for a, b in zip(noted[::2], noted[1::2], strict=True))


def test_covers() -> None:
    i, j, k = Axis("i", 3), Axis("j", 2), Axis("k", 2)
    assert _covers(of(i), 3)
    assert _covers(of(i) * 2 + of(j), 6)
    assert _covers(of(i) * 4 + of(j) * 2 + of(k), 12)
    assert not _covers(of(i) * 2 + of(j), 7)
    assert not _covers(of(i) + of(j), 4)
    assert not _covers(of(i) * 3 + of(j), 8)
    assert not _covers(of(i) * 2 + of(j) + 1, 6)
    assert not _covers(Affine(), 2)
