"""copies.py: which copies of the state each thread makes for itself, which are not made, and that no number depends on it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from native import Threaded, registered
from test_compiler import AVX2, compiled

import chainrule as cr
from chainrule import nn
from chainrule.compiler.kernels import Kernel, kernels_of
from chainrule.compiler.pipeline import Code
from chainrule.compiler.target import Target, narrowed, runnable


def dense(w: Any, v: Any, x: Any, rate: Any) -> Any:
    """Two layers: the gradient of the first reads the weights of the second in another order."""

    def loss(w: Any, v: Any) -> Any:
        return np.mean((np.tanh(x @ w) @ v) ** 2)

    value, (dw, dv) = cr.value_and_grad(loss, (0, 1))(w, v)
    return [value, w - rate * dw, v - rate * dv]


def code(rows: int, threads: int, target: Target = AVX2) -> Code:
    shapes = {"w": (3, 20), "v": (20, 24), "x": (rows, 3), "rate": ()}
    return compiled(dense, shapes, ["loss", "w", "v"], state=["w", "v"], rows=["x"], threads=threads, target=target)


def copies(made: Code) -> tuple[list[Kernel], list[Kernel]]:
    """Those that each unit makes, and those that are made once."""
    every = kernels_of([i for items in made.plan.phases for i in items])
    return [k for k in every if k.stores[0].buffer.part_of is not None], made.plan.late


@pytest.mark.parametrize("rows", [32, 33])
def test_each_thread_copies_what_it_has_read_anyway(rows: int) -> None:
    made = code(rows, 2)
    (own,), late = copies(made)
    assert not late
    copy = own.stores[0].buffer
    assert copy.part_of is not None
    area, place = copy.part_of
    assert (area.shape[0], place) == (2, 0)
    assert area.shape[1] >= copy.size + 1024, "no core reads ahead into what is another's"
    assert made.arena.offsets[copy] == made.arena.offsets[area]
    first = [k.name for k in made.plan.phases[0] if isinstance(k, Kernel)]
    (forward,) = (k.name for k in kernels_of(made.plan.phases[0]) if k.reduced and "v" in {str(v.buffer) for v in k.loads()})
    assert first.index(own.name) == first.index(forward) + 1, "while the state is in the cache"
    assert "by each of 2 units" in made.stage("kernels")
    alone, (once,) = copies(code(rows, 1))
    assert not alone
    assert once.late


def test_one_column_in_another_order_is_no_copy() -> None:
    """The gradient reads it as one row, which lies in memory as it does."""

    def f(w: Any, v: Any, x: Any, rate: Any) -> Any:
        value, (dw, dv) = cr.value_and_grad(lambda w, v: np.mean((np.tanh(x @ w) @ v) ** 2), (0, 1))(w, v)
        return [value, w - rate * dw, v - rate * dv]

    shapes = {"w": (3, 20), "v": (20, 1), "x": (32, 3), "rate": ()}
    made = compiled(f, shapes, ["loss", "w", "v"], state=["w", "v"], rows=["x"], threads=2)
    assert copies(made) == ([], [])


def test_threads_share_a_product_and_what_follows_alike() -> None:
    """150 units lie in two panels of 75, which is what threads share out. The update of the next layer, in a kernel of its own since three
    columns fill lanes badly, is cut at 75 too, not at 80, and nobody waits for it."""

    def f(w: Any, v: Any, s: Any, x: Any, rate: Any) -> Any:
        value, (dw, dv) = cr.value_and_grad(lambda w, v: np.mean((np.tanh(x @ w) @ v) ** 2), (0, 1))(w, v)
        new = s + dv * dv
        return [value, w - rate * dw, v - rate * dv / np.sqrt(new), new]

    shapes = {"w": (300, 150), "v": (150, 3), "s": (150, 3), "x": (64, 300), "rate": ()}
    made = compiled(f, shapes, ["loss", "w", "v", "s"], state=["w", "v", "s"], rows=["x"], threads=2)
    place = {k: n for n, items in enumerate(made.plan.phases) for k in kernels_of(items)}
    (update,) = (k for k in place if any(s.buffer.name == "v" for s in k.stores))
    gradient = {v.buffer for v in update.loads() if v.buffer is not None and v.buffer.space == "scratch" and v.axes}
    (product,) = (k for k in place if any(s.buffer in gradient for s in k.stores))
    assert product.unit is not None
    assert update.unit is not None
    assert (product.unit.extent, update.unit.extent) == (2, 2)
    assert place[product] == place[update]


def test_large_copies_are_made_once() -> None:
    own, late = copies(code(32, 2, replace(AVX2, level2=4 * 20 * 24 * 4 - 1)))
    assert not own
    assert len(late) == 1


def test_state_that_never_changes_is_copied_once() -> None:
    def back(v: Any, x: Any) -> Any:
        return [x @ v.T]

    made = compiled(back, {"v": (20, 24), "x": (32, 24)}, ["out"], state=["v"], rows=["x"], threads=2)
    own, late = copies(made)
    assert not own
    assert len(late) == 1


@pytest.mark.parametrize("rows", [24, 13])
def test_no_bit_depends_on_who_copies(rows: int) -> None:
    random = np.random.default_rng(0)
    x, y = random.normal(size=(60, 20)).astype(np.float32), random.normal(size=(60, 3)).astype(np.float32)

    def trained(threads: int) -> list[bytes]:
        net = nn.Sequential(nn.Dense(30, "tanh"), nn.Dense(33, "tanh"), nn.Dense(3))
        net.fit(x, y, loss="mse", optimizer=cr.Adam(1e-2), epochs=4, batch_size=rows, seed=1, verbose=False, threads=threads)
        return [a.tobytes() for a in net.parameters.values()]

    one = trained(1)
    assert all(trained(threads) == one for threads in (2, 3, 5))


# ---- none --------------------------------------------------------------------------------------------------------------------


def three(w: Any, v: Any, u: Any, x: Any, rate: Any) -> Any:
    def loss(w: Any, v: Any, u: Any) -> Any:
        return np.mean((np.tanh(np.tanh(x @ w) @ v) @ u) ** 2)

    value, grads = cr.value_and_grad(loss, (0, 1, 2))(w, v, u)
    return [value, *(a - rate * g for a, g in zip((w, v, u), grads, strict=True))]


def small_caches(target: Target) -> Target:
    """So small that the copy of 130 x 192 numbers stays in none, but the part for some vectors is worth packing."""
    return replace(target, level1=8 * 1024, level2=96_000)


@pytest.mark.parametrize("level2", [2000, 2**20])
def test_what_is_computed_of_state_is_computed_once(level2: int) -> None:
    """One kernel with two results; and a power, which eight threads shall not take each for itself."""

    def two(w: Any, x: Any, rate: Any) -> Any:
        def loss(w: Any) -> Any:
            a = np.exp(w)
            return np.mean((x @ a) ** 2) + np.mean((x @ np.tanh(a)) ** 2) + np.mean(x @ np.abs(w) ** 1.7)

        value, g = cr.value_and_grad(loss)(w)
        return [value, w - rate * g]

    shapes = {"w": (20, 30), "x": (64, 20), "rate": ()}
    made = compiled(two, shapes, ["loss", "w"], state=["w"], rows=["x"], threads=8, target=replace(AVX2, level2=level2))
    own, late = copies(made)
    assert not own
    assert any(len(k.stores) > 1 for k in late)


def test_large_copies_are_not_made() -> None:
    shapes = {"w": (5, 130), "v": (130, 192), "u": (192, 3), "x": (64, 5), "rate": ()}
    names = ["w", "v", "u"]

    def made(target: Target) -> Code:
        return compiled(three, shapes, ["loss", *names], state=names, rows=["x"], threads=2, target=target)

    large = [k for k in made(replace(AVX2, level2=4 * 130 * 192)).plan.late if k.stores[0].buffer.size == 130 * 192]
    assert len(large) == 1, "no larger than the cache"
    small = made(small_caches(AVX2))
    assert not any(s.buffer.size == 130 * 192 for k in small.plan.late for s in k.stores)
    (reader,) = (k for k in kernels_of([i for p in small.plan.phases for i in p]) if any("turned" in v.attrs for v in k.loads()))
    assert [v.buffer.name for v in reader.packed if v.buffer is not None] == ["v"]
    assert " turned" in small.stage("kernels")


@pytest.mark.parametrize("units", [192, 199])
@pytest.mark.parametrize("level", runnable())
def test_no_bit_depends_on_the_caches(level: str, units: int) -> None:
    """Operands that are turned while they are packed, also where neither lanes nor squares are full."""
    random = np.random.default_rng(1)
    x, y = random.normal(size=(192, 5)).astype(np.float32), random.normal(size=(192, 3)).astype(np.float32)

    def trained(target: Target, threads: int) -> tuple[list[bytes], str]:
        net = nn.Sequential(nn.Dense(130, "tanh"), nn.Dense(units, "tanh"), nn.Dense(3))
        with registered(Threaded(threads, target=target)) as backend:
            net.fit(x, y, loss="mse", epochs=2, batch_size=64, seed=1, verbose=False, backend=backend)
            return [a.tobytes() for a in net.parameters.values()], net.compiled.text("kernels")

    target = narrowed(level)
    large, text = trained(replace(target, level1=2**15, level2=2**20), 1)
    assert " turned" not in text
    for threads in (1, 2):
        small, text = trained(small_caches(target), threads)
        assert " turned" in text
        assert small == large
