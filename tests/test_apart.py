"""apart.py: which memory of loops lies part by part, and that kernels find their way in it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from rarely import rarely
from test_compiler import AVX2, compiled

import chainrule as cr
from chainrule import nn
from chainrule.compiler.apart import moved
from chainrule.compiler.fuse import Names
from chainrule.compiler.kernels import Item, Kernel, kernels_of
from chainrule.compiler.phases import accesses
from chainrule.compiler.pipeline import Code
from chainrule.compiler.schedule import schedule
from chainrule.compiler.verify import verify


def recurrent(w: Any, v: Any, x: Any, rate: Any) -> Any:
    def loss(w: Any, v: Any) -> Any:
        last, _ = cr.scan(lambda h, x: ((n := np.tanh(x @ w + h @ v)), n), np.tanh(x[:, 0] @ w), x.swapaxes(0, 1))
        return np.mean(last**2)

    value, (dw, dv) = cr.value_and_grad(loss, (0, 1))(w, v)
    return [value, w - rate * dw, v - rate * dv]


def code(rows: int, threads: int) -> Code:
    shapes = {"w": (3, 16), "v": (16, 16), "x": (rows, 20, 3), "rate": ()}
    return compiled(recurrent, shapes, ["loss", "w", "v"], state=["w", "v"], rows=["x"], threads=threads)


def parts(made: Code) -> dict[tuple[int, ...], tuple[int, int]]:
    """The shapes of buffers that lie in parts, and how."""
    kernels = kernels_of([i for items in made.plan.phases for i in items])
    return {a.buffer.shape: a.buffer.apart for k in kernels for a in accesses(k) if a.buffer.apart is not None}


def test_what_a_loop_keeps_lies_thread_by_thread() -> None:
    assert parts(code(32, 1)) == {}
    assert parts(code(32, 2)) == {(21, 32, 16): (1, 16), (16, 32, 16): (1, 16)}, (
        "the states of all steps, and what a chunk leaves"
    )
    assert parts(code(33, 2)) == {}, "the second thread has a row less"
    assert parts(code(48, 3)) == {}, "gradients are summed in halves of the rows, which are no thirds"


@pytest.mark.parametrize(("rows", "threads"), [(32, 2), (40, 2), (48, 3)])
def test_kernels_stay_within_such_buffers(rows: int, threads: int) -> None:
    made = code(rows, threads)

    def rewritten(items: Sequence[Item]) -> list[Item]:
        return [
            moved(i, schedule(i, AVX2), threads, Names())[0] if isinstance(i, Kernel) else replace(i, items=rewritten(i.items))
            for i in items
        ]

    kernels = list(kernels_of(items := rewritten([*made.plan.late, *(i for items in made.plan.phases for i in items)])))
    verify(items)
    assert any(a.view != a.buffer.shape for k in kernels for a in accesses(k)) == bool(parts(made))


LAYERS = {
    "RNN": lambda: [nn.RNN(6, return_sequences=True), nn.Flatten()],
    "LSTM": lambda: [nn.LSTM(5)],
    "GRU, backward": lambda: [nn.GRU(7, reverse=True, return_sequences=True), nn.Flatten()],
    "both": lambda: [nn.Bidirectional(nn.GRU(4, return_sequences=True)), nn.Flatten()],
    "stack": lambda: [nn.LSTM(4, return_sequences=True), nn.GRU(5)],
    "peephole": lambda: [nn.LSTM(5, peephole=True)],
    "layer norm": lambda: [nn.LSTM(5, layer_norm=True, recurrent_dropout=0.2)],
}


@pytest.mark.parametrize("name", list(LAYERS))
@pytest.mark.parametrize("rows", [16, 33, *rarely(30, 100)])
def test_the_same_bits_for_any_number_of_threads_and_any_budget(name: str, rows: int) -> None:
    r = np.random.default_rng(rows)
    x, y = r.normal(size=(rows + 5, 23, 3)).astype("f4"), r.normal(size=(rows + 5, 2)).astype("f4")

    def weights(**options: Any) -> dict[str, Any]:
        net = nn.Sequential(*LAYERS[name](), nn.Dense(2))
        net.fit(x, y, epochs=2, batch_size=rows, seed=2, verbose=False, **options)
        return dict(net.parameters)

    first = weights(threads=1)
    for options in ({"threads": 2}, {"threads": 3}, {"threads": 5}, {"memory": 10**6, "threads": 2}):
        for k, v in weights(**options).items():
            assert v.tobytes() == first[k].tobytes(), (k, options)


@pytest.mark.parametrize(("options", "so"), [({}, True), ({"lengths": True}, False)])
def test_rows_of_small_recurrent_layers_fill_lanes(options: dict[str, bool], so: bool) -> None:
    """Six units fill six lanes of sixteen; rows of different length end at different steps, and stay apart."""
    r = np.random.default_rng(0)
    x, y = r.normal(size=(100, 12, 1)).astype("f4"), r.normal(size=(100, 1)).astype("f4")
    net = nn.Sequential(nn.GRU(6), nn.Dense(1))
    lengths = {"lengths": r.integers(1, 13, 100)} if options else {}
    net.fit(x, y, epochs=1, batch_size=100, verbose=False, **lengths)
    assert bool(re.search(r"\[b\d+<4\*? i\d+<6 i\d+<25\]", net.compiled.text("kernels"))) == so


def test_results_are_computed_in_lanes_and_handed_over_row_by_row() -> None:
    """What a loss makes of scores reads them where they were computed; the caller's array is written once, by a copy."""
    r = np.random.default_rng(0)
    x, y = r.normal(size=(100, 12, 1)).astype("f4"), r.integers(0, 10, (100, 12))
    net = nn.Sequential(nn.GRU(6, return_sequences=True), nn.Dense(10))
    net.fit(x, y, loss="cross_entropy", epochs=1, batch_size=100, verbose=False)
    seen = [line.strip() for line in net.compiled.text("kernels").splitlines() if "out/scores" in line]
    assert len(seen) == 1
    assert re.fullmatch(r"out/scores\[25\*\w+ \+ \w+, \w+\] = v0", seen[0])
    np.testing.assert_allclose(net.predict(x), net.predict(x, backend="reference"), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("rows", [16, 33, 50])
@pytest.mark.parametrize("features", [1, 3, 9])
def test_results_of_loops_lie_as_they_are_meant_to(rows: int, features: int) -> None:
    """Stacked, the rows on their second axis; and the last state, the rows on its first."""
    r = np.random.default_rng(rows)
    w, x = r.normal(size=(features, features)) * 0.3, r.normal(size=(7, rows, features))

    def f(w: Any, x: Any) -> Any:
        return cr.scan(lambda h, x: (np.tanh(h @ w + x), np.exp(h)), np.zeros((rows, features)), x)

    h, outputs = np.zeros((rows, features)), []
    for step in x:
        outputs.append(np.exp(h))
        h = np.tanh(h @ w + step)
    for got, want in zip(cr.compile(f)(w, x), (h, np.stack(outputs)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-13)
