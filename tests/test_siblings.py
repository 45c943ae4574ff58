"""Sums over all of one array in one kernel: which kernels are joined, which are not, and that values stay what they are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from native import Threaded, registered
from same import assert_same, state

import chainrule as cr
from chainrule import nn
from chainrule.compiler.affine import Axis, of
from chainrule.compiler.kernels import Buffer, Kernel, Space, Store, Value, elementwise, load, reduce
from chainrule.compiler.siblings import MOST_SUMS, with_siblings
from chainrule.compiler.verify import verify

F4 = np.dtype(np.float32)
X = Buffer("x", (6, 5, 4), F4)
G, N = (Buffer(name, (6, 5, 4), F4, "input") for name in "gn")


def total(reads: Sequence[Buffer], out: str = "out", turned: bool = False, space: Space = "scratch") -> Kernel:
    """For each value of the last axis, the sum over the others of the product of these arrays. turned: the other way round."""
    i, r, s = (Axis(n, e) for n, e in (("i", 4), ("r", 6), ("s", 5)))
    value: Value | None = None
    for buffer in reads:
        one = load(buffer, (of(r), of(s), of(i)))
        value = one if value is None else elementwise("multiply", F4, [value, one])
    assert value is not None
    over = (s, r) if turned else (r, s)
    result = Buffer(out, (4,), F4, space)
    return Kernel(f"k_{out}", (i,), over, [Store(result, (of(i),), reduce("sum", value, over))], i)


def written(out: Buffer) -> Kernel:
    a, b, c = (Axis(n, e) for n, e in zip("abc", out.shape, strict=True))
    index = (of(a), of(b), of(c))
    return Kernel("k_w", (a, b, c), (), [Store(out, index, load(N, index))], a)


def names(kernels: Sequence[Kernel]) -> list[list[str]]:
    return [[s.buffer.name for s in k.stores] for k in kernels]


def test_sums_of_the_same_array_are_one_kernel() -> None:
    made = with_siblings([total([G], "a"), written(X), total([G, X], "b"), total([N], "c"), total([G, N], "d")])
    assert names(made) == [["a", "d"], ["x"], ["b"], ["c"]]  # what x holds is known too late for b
    verify(made)
    kernel = made[0]
    assert [v.buffer for v in kernel.loads()] == [G, N]  # G once


@pytest.mark.parametrize(
    "items",
    [
        [total([G], "a"), total([X], "b")],
        [total([G], "a"), total([G, X], "b", turned=True)],
        [total([G], "a"), written(G), total([G, X], "b")],
        [total([G], "a", space="state"), total([G, X], "b")],
        [total([G], "a"), total([G, X], "b", space="result")],
    ],
    ids=["another array", "another order", "written in between", "state", "result"],
)
def test_others_stay_apart(items: list[Kernel]) -> None:
    assert with_siblings(items) == items


def test_a_kernel_has_so_many_sums_at_most() -> None:
    made = with_siblings([total([G] * (n + 1), f"t{n}") for n in range(2 * MOST_SUMS)])
    assert [len(k.stores) for k in made] == [MOST_SUMS, MOST_SUMS]


def test_batch_norm_over_images_learns_the_same() -> None:
    """As NumPy has it, with the same bits for every number of threads."""
    r = np.random.default_rng(0)
    x, y = r.normal(size=(96, 6, 5, 3)).astype("f4"), r.integers(0, 3, 96)

    def learnt(backend: str) -> nn.Sequential:
        net = nn.Sequential(
            nn.Conv2D(16, 3, padding="same", bias=False), nn.BatchNorm(), nn.Activation("relu"), nn.GlobalAvgPool(), nn.Dense(3)
        )
        net.fit(
            x, y, loss="cross_entropy", optimizer=cr.SGD(0.1), epochs=2, batch_size=32, seed=0, backend=backend, verbose=False
        )
        return net

    states = []
    for threads in (1, 2, 3):
        with registered(Threaded(threads)) as name:
            states.append(state(learnt(name)))
    for other in states[1:]:
        assert_same(states[0], other)
    for name, value in learnt("reference").parameters.items():
        np.testing.assert_allclose(states[0][name], value, rtol=1e-3, atol=1e-5)
