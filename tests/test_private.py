"""private.py: which copies of the state each thread makes for itself, and that no number depends on it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from test_compiler import AVX2, compiled

import chainrule as cr
from chainrule import nn
from chainrule.compiler.kernels import Kernel, kernels_of
from chainrule.compiler.pipeline import Code
from chainrule.compiler.target import Target


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
    return [k for k in every if k.stores[0].buffer.copies > 1], made.plan.late


@pytest.mark.parametrize("rows", [32, 33])
def test_each_thread_copies_what_it_has_read_anyway(rows: int) -> None:
    made = code(rows, 2)
    (own,), late = copies(made)
    assert not late
    assert own.stores[0].buffer.copies == 2
    first = [k.name for k in made.plan.phases[0] if isinstance(k, Kernel)]
    (forward,) = (k.name for k in kernels_of(made.plan.phases[0]) if k.reduced and "v" in {str(v.buffer) for v in k.loads()})
    assert first.index(own.name) == first.index(forward) + 1, "while the state is in the cache"
    assert "by each of 2 units" in made.stage("kernels")
    alone, (once,) = copies(code(rows, 1))
    assert not alone
    assert once.late


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
