"""compiler/absorb.py: small sums inside the kernel that reads them."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

import chainrule as cr
from chainrule import nn
from chainrule.compiler.absorb import absorbed
from chainrule.compiler.affine import Affine, Axis, of
from chainrule.compiler.kernels import Buffer, Item, Kernel, Store, elementwise, load, reduce

F4 = np.dtype(np.float32)

POOLS: dict[str, tuple[tuple[int, ...], Any, bool]] = {
    "2 x 2": ((8, 8, 2), lambda: [nn.Conv2D(3, 3, activation="relu"), nn.MaxPool2D(2)], True),
    "3 x 3": ((11, 11, 2), lambda: [nn.Conv2D(3, 3, activation="tanh"), nn.MaxPool2D(3)], True),
    "along one axis": ((10, 2), lambda: [nn.Conv1D(3, 3), nn.MaxPool1D(2)], True),
    "windows that overlap": ((9, 9, 2), lambda: [nn.Conv2D(3, 3, activation="relu"), nn.MaxPool2D(3, 2)], False),
    "too wide for a tile": ((14, 2), lambda: [nn.Conv1D(3, 3), nn.MaxPool1D(6)], False),
}


def trained(shape: tuple[int, ...], layers: Any) -> tuple[nn.Sequential, Any, Any]:
    """Pictures with few different numbers, so that windows have several largest ones."""
    r = np.random.default_rng(0)
    x, y = r.integers(0, 3, (32, *shape)).astype("f4"), r.integers(0, 3, 32)
    net = nn.Sequential(*layers(), nn.Flatten(), nn.Dense(3))
    net.fit(x, y, loss="cross_entropy", epochs=1, batch_size=32, seed=1, verbose=False)
    return net, x, y


@pytest.mark.parametrize("name", POOLS)
def test_counts_of_a_pooling_are_made_where_they_are_read(name: str) -> None:
    shape, layers, so = POOLS[name]
    net, x, y = trained(shape, layers)
    kernels = re.split(r"\n(?=    kernel )", net.compiled.text("kernels"))
    assert any("strong_divide(" in k and "where(" in k for k in kernels) == so
    got, known = (net.gradients(x, y, loss="cross_entropy", backend=b) for b in ("native", "reference"))
    for key, a in got.items():
        np.testing.assert_allclose(a, known[key], rtol=1e-4, atol=1e-5, err_msg=key)


def kernels(
    readers: int = 1, between: bool = False, terms: int = 4, lanes: bool = True, unit: int = 0, twice: bool = False,
    into: bool = False, wide: int = 3,
) -> list[Item]:  # fmt: skip
    """The sums of `terms` numbers each, and kernels that read one sum for `wide` places. between: a kernel that writes what they are made
    of; unit: the axis that readers share out; twice: they read two places; into: they write what the sums are made of."""
    x, sums = Buffer("x", (5, terms, 16), F4), Buffer("sums", (5, 16), F4)
    b, r, i = Axis("b", 5), Axis("r", terms), Axis("i", 16)
    total = reduce("sum", load(x, (of(b), of(r), of(i))), (r,))
    made: list[Item] = [Kernel("k0", (b, i), (r,), [Store(sums, (of(b), of(i)), total)], b, inner=i if lanes else None)]
    if between:
        other = load(Buffer("y", (5, 16), F4, "input"), (of(b), of(i)))
        made.append(Kernel("k1", (b, i), (), [Store(x, (of(b), Affine(0), of(i)), other)], b, inner=i))
    for n in range(readers):
        c, p, j = domain = Axis(f"c{n}", 5), Axis(f"p{n}", wide), Axis(f"j{n}", 16)
        out = x if into else Buffer(f"out{n}", (5, wide, 16), F4, "result")
        read = load(sums, (of(c), of(j)))
        if twice:
            read = elementwise("add", F4, [read, load(sums, (Affine(0), of(j)))])
        made.append(
            Kernel(f"r{n}", domain, (), [Store(out, (of(c), of(p), of(j)), read)], domain[unit], inner=j if lanes else None)
        )
    return made


def test_a_sum_goes_into_its_only_reader() -> None:
    (one,) = absorbed(kernels())
    assert isinstance(one, Kernel)
    assert [a.extent for a in one.reduced] == [4]
    assert {v.buffer.name for v in one.loads() if v.buffer is not None} == {"x"}
    assert one.unit is one.domain[0]


ELSE: dict[str, dict[str, Any]] = {
    "two read it": {"readers": 2},
    "nobody does": {"readers": 0},
    "something writes what it is made of": {"between": True},
    "its reader does": {"into": True},
    "two of its elements are read": {"twice": True},
    "it is long": {"terms": 17},
    "too many places for a tile": {"wide": 5},
    "no rows in lanes": {"lanes": False},
    "threads share out another axis": {"unit": 1},
}


@pytest.mark.parametrize("options", ELSE.values(), ids=ELSE)
def test_else_it_stays(options: dict[str, Any]) -> None:
    items = kernels(**options)
    assert absorbed(items) == items


def test_a_derivative_of_one_or_zero_chooses() -> None:
    """So 0 times an infinite gradient is 0, as in NumPy's formula, without a product that has to look for it."""
    r = np.random.default_rng(3)
    x, g = r.integers(0, 3, (7, 5)).astype(float), r.normal(size=7)
    g[2], g[4], g[5] = np.inf, np.nan, -0.0
    gradient = lambda x, g: cr.vjp(lambda x: np.max(x, axis=1), x)[1](g)[0]
    got, known = cr.compile(gradient)(x, g), gradient(x, g)
    np.testing.assert_array_equal(got, known)
    assert (got[2] == 0).any()
    assert np.isinf(got[2]).any()
