"""Graphs that are hard to order or to cut into tiles, in native code against NumPy: state made of other old state, loops whose states are
put together from pieces, products whose operands are copied first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from native import GUARD, WIDTHS, Server, Threaded, assert_as_precise, assert_bits, backend_of, call_between_guards

import chainrule as cr
from chainrule.graph.interpret import evaluate
from chainrule.graph.node import Graph, Type
from chainrule.graph.trace import build, type_of
from chainrule.normalize import normalize
from chainrule.program import Input, Program, ProgramBuilder, Variable
from chainrule.run.backend import Steps, backends

Array = np.ndarray


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.stop()


def flat(tree: Any) -> list[Any]:
    if isinstance(tree, (tuple, list)):
        return [x for part in tree for x in flat(part)]
    return [] if tree is None else [tree]


def numbers(*shape: int, seed: int = 3) -> Array:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def graph_of(f: Callable[..., Any], arrays: Sequence[Array]) -> tuple[Graph, list[Array]]:
    graph = normalize(build(lambda *xs: flat(f(*xs)), [type_of(a) for a in arrays]))
    return graph, [*arrays, *(np.asarray(c) for c in graph.captures)]


def agree(f: Callable[..., Any], arrays: Sequence[Array], width: str, label: str, level: int = 1) -> None:
    graph, given = graph_of(f, arrays)
    wide, more = graph_of(f, [a.astype(np.float64) if a.dtype == np.float32 else a for a in arrays])
    got = backend_of(width, level).function(graph)(given)
    for n, (a, b, c) in enumerate(zip(got, evaluate(graph, given), evaluate(wide, more), strict=True)):
        assert_as_precise(a, b, c, f"{label}, result {n}", multiple=16, ulps=128)
    assert_bits(call_between_guards(backend_of(width, level, guard=GUARD, poison=0xFF), graph, given, 1), got, label)


# ---- loops -------------------------------------------------------------------------------------------------------------------

Bodies = dict[str, Callable[[Any, Any, Any], Any]]
BODIES: Bodies = {  # state h (n,), what comes in x (n,), weights w (n, n) -> new state, result
    "rolled": lambda h, x, w: (np.roll(h, 1), h[::-1]),
    "rolled and added to": lambda h, x, w: (np.roll(h, 1) * 0.5 + x, np.roll(h, 2)),
    "flipped": lambda h, x, w: (h[::-1], h),
    "padded": lambda h, x, w: (np.pad(h[1:], (0, 1)), np.sum(h)),
    "summed along": lambda h, x, w: (np.cumsum(h) * 0.1 + x, h),
    "a product": lambda h, x, w: (h @ w * 0.1, w @ h),
    "a product read again": lambda h, x, w: ((g := h @ w * 0.1), g @ w.T + h),
    "softmax": lambda h, x, w: (cr.softmax(h + x), np.max(h)),
    "a loop": lambda h, x, w: (cr.scan(lambda g, y: (g * 0.5 + y, None), h, w)[0], x),
    "a loop that rolls": lambda h, x, w: cr.scan(lambda g, y: (np.roll(g, 1) + y, g[0]), h, w),
    "looked up": lambda h, x, w: (np.take(h, np.arange(h.shape[0])[::-1]), h[np.argmax(h)]),
}
PAIRS: Bodies = {  # states (a, b)
    "swapped": lambda h, x, w: ((h[1], h[0]), h[0]),
    "swapped and added to": lambda h, x, w: ((h[1] + x, h[0]), h[0] - h[1]),
    "swapped and rolled": lambda h, x, w: ((np.roll(h[1], 1), h[0][::-1]), None),
    "products of each other": lambda h, x, w: ((h[1] @ w * 0.1, np.tanh(w @ h[0])), h),
    "one chosen": lambda h, x, w: ((np.tanh(h[1]), np.where(h[0] < h[1], h[0], x)), None),
}


def loop_faults(length: int, n: int, width: str) -> None:
    x, w, h = numbers(length, n), numbers(n, n), numbers(n)
    for reverse in (False, True):

        def every(x: Any, w: Any, h: Any, reverse: bool = reverse) -> Any:
            step = lambda f: lambda s, y: f(s, y, w)
            found = [cr.scan(step(f), h, x, reverse=reverse) for f in BODIES.values()]
            return found + [cr.scan(step(f), (h, h * 2.0), x, reverse=reverse) for f in PAIRS.values()]

        agree(every, [x, w, h], width, f"{length} times {n}, reverse {reverse}")


@pytest.mark.parametrize(("length", "n"), [(1, 3), (3, 17)])
def test_states_of_loops(server: Server, length: int, n: int) -> None:
    server(loop_faults, length, n, WIDTHS[0])


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("length", [0, 1, 2, 5])
@pytest.mark.parametrize("n", [1, 2, 16, 33])
def test_states_of_more_loops(server: Server, length: int, n: int, width: str) -> None:
    server(loop_faults, length, n, width)


# ---- products ----------------------------------------------------------------------------------------------------------------

PRODUCTS = [(64, 1000, 600), (48, 2048, 768), (70, 9000, 136)]
MORE_PRODUCTS = [(1, 4096, 1), (1, 300, 4000), (4000, 300, 1), (65, 1001, 613), (100, 257, 1031), (513, 2, 515), (47, 513, 2049)]


def product_faults(m: int, k: int, n: int, width: str) -> None:
    agree(lambda x, y: [x @ y, np.maximum(x[::-1] @ y + y[0], 0.0)], [numbers(m, k), numbers(k, n)], width, f"{m} {k} {n}")


@pytest.mark.parametrize("shape", PRODUCTS)
def test_large_products(server: Server, shape: tuple[int, int, int]) -> None:
    server(product_faults, *shape, WIDTHS[0])


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("shape", [*PRODUCTS, *MORE_PRODUCTS, (1000, 1000, 1000)])
def test_more_large_products(server: Server, shape: tuple[int, int, int], width: str) -> None:
    server(product_faults, *shape, width)


# ---- programs over state -----------------------------------------------------------------------------------------------------

New = Callable[[dict[str, Any], Any], dict[str, Any]]
WRITES: dict[str, New] = {  # matrices a, b, c, vectors u, v, rows x -> new state
    "swapped": lambda s, x: {"a": s["b"], "b": s["a"]},
    "turned round": lambda s, x: {"a": s["b"], "b": s["c"], "c": s["a"]},
    "swapped and transposed": lambda s, x: {"a": s["b"].T, "b": s["a"].T},
    "a transposed self": lambda s, x: {"a": s["a"].T, "b": s["b"][::-1], "c": np.roll(s["c"], 1, 1)},
    "copied": lambda s, x: {"a": s["c"], "b": s["c"].T, "v": s["c"][0], "u": s["c"][:, 0]},
    "one read that is written beside": lambda s, x: {"a": np.tanh(s["b"]), "c": np.where(s["a"] < s["b"], s["a"], s["c"])},
    "written by the same kernel": lambda s, x: {"b": s["a"] * 0.5 + s["v"], "a": cr.softmax(s["b"]), "c": s["a"] + s["b"]},
    "products": lambda s, x: {"a": np.tanh(s["a"] @ s["b"]), "b": np.tanh(s["b"] @ s["a"].T), "v": np.sum(s["a"] @ s["c"], 0)},
    "gradients": lambda s, x: {
        "a": s["a"] - 0.1 * (x.T @ np.tanh(x @ s["b"])) / len(x),
        "b": s["a"],
        "u": np.mean(x @ s["a"], 0),
    },
    "outer products": lambda s, x: {"a": np.outer(s["u"], s["v"]), "u": s["v"][::-1], "v": s["u"] + s["a"][1]},
    "a loop": lambda s, x: {"a": cr.scan(lambda h, y: (np.roll(h, 1) * 0.5 + y, h), s["v"], s["a"])[1], "v": s["a"][-1]},
}
STATE = {"a": 2, "b": 2, "c": 2, "u": 1, "v": 1}


def state_program(new: New, n: int, rows: int) -> Program:
    f4 = np.dtype(np.float32)
    builder = ProgramBuilder(
        [Variable(k, Type((n,) * d, f4), "parameter") for k, d in STATE.items()], [Input("x", Type((rows, n), f4), 0)], rows
    )

    def step(state: Any, given: Any) -> Any:
        results = {"loss": np.sum(np.tanh(given["x"] @ state["a"])), "old": state["b"], "rows": given["x"] @ state["b"]}
        return results, new(dict(state), given["x"])

    builder.entry("step", step, ["x"])
    return builder.build()


def state_after(backend: Any, program: Program, n: int, rows: int, steps: int = 2) -> dict[str, Array]:
    session = backend.session({rows: program}, {k: numbers(*(n,) * d, seed=ord(k)) for k, d in STATE.items()})
    order = np.arange(rows * steps)
    taken = session.run(
        Steps(["step"] * steps, {"x": numbers(rows * steps, n)}, order, [rows] * steps, {}, ("loss", "old", "rows"))
    )
    return {**session.state(), **taken.results}


def state_faults(n: int, rows: int, threads: Sequence[int]) -> None:
    for name, new in WRITES.items():
        program = state_program(new, n, rows)
        want = state_after(backends["reference"], program, n, rows)
        got = state_after(Threaded(1, level=1), program, n, rows)
        for k, value in want.items():
            np.testing.assert_allclose(got[k], value, rtol=2e-4, atol=2e-4, err_msg=f"{name}: {k}")
        for t in threads:
            other = state_after(Threaded(t, level=1, guard=GUARD, poison=0xFF), program, n, rows)
            assert_bits([other[k] for k in got], list(got.values()), f"{name}, {t} threads")


def test_new_state_made_of_other_old_state(server: Server) -> None:
    server(state_faults, 17, 10, (3,))


@pytest.mark.slow
@pytest.mark.parametrize(("n", "rows"), [(2, 1), (3, 3), (8, 5), (16, 64), (33, 31), (40, 96)])
def test_new_state_made_of_other_old_state_of_any_size(server: Server, n: int, rows: int) -> None:
    server(state_faults, n, rows, (2, 3, 5))
