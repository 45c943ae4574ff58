"""What the compiler does to loops over time (scans.py, gather.py, replay.py): values that leave a loop or are read from another one, sums
taken out of the steps, steps taken again. All of it against NumPy, step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from native import GUARD, Server, assert_bits, backend_of, call_between_guards
from test_compiler_graphs import flat, graph_of

import chainrule as cr
from chainrule.compiler import gather
from chainrule.compiler.affine import Affine, Axis, of
from chainrule.compiler.cost import work
from chainrule.compiler.kernels import Buffer, Kernel, Loop, Store, kernels_of, load
from chainrule.compiler.scans import improve
from chainrule.compiler.simplify import simplify
from chainrule.compiler.verify import verify
from chainrule.errors import BudgetError, GraphError
from chainrule.graph.interpret import evaluate
from chainrule.graph.node import Graph, Node

Array = np.ndarray
Made = Callable[[Any], Callable[..., Any]]  # a budget -> a function of arrays
CHUNK = 6  # terms of a sum that are added at a time, over there: so that short loops have several chunks
LENGTHS = (0, 1, 2, 5, 7, 13)
F8 = np.dtype(np.float64)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.stop()


def numbers(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).normal(size=shape)


# ---- harness -----------------------------------------------------------------------------------------------------------------


def assert_close(got: Sequence[Any], want: Sequence[Any], label: Any) -> None:
    """In double precision, to rounding."""
    for n, (a, b) in enumerate(zip(got, want, strict=True)):
        b = np.asarray(b)
        scale = max(1.0, float(np.max(np.abs(b), initial=0.0)))
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10 * scale, err_msg=f"{label}: result {n}")


def least(made: Made, arrays: Sequence[Array], memory: int = 1) -> int:
    """The least budget that each of the loops can keep; 1 if none is gone through backward."""
    graph, _ = graph_of(made(memory), arrays)
    try:
        backend_of(None, 1).function(graph)
    except BudgetError as refused:
        return least(made, arrays, refused.least)
    return memory


def check(made: Made, arrays: Sequence[Array], label: Any, budgets: bool = True) -> None:
    """Native code against NumPy, between guards, and the same bits within the least budget and within a larger one."""
    gather.CHUNK = CHUNK
    graph, given = graph_of(made(None), arrays)
    theirs = evaluate(graph, given)
    got = backend_of(None, 1).function(graph)(given)
    assert_close(got, theirs, label)
    assert_bits(call_between_guards(backend_of(None, 1, guard=GUARD, poison=0xFF), graph, given), got, label)
    assert_close(evaluate(improve(graph), given), theirs, f"{label}, improved")
    if not budgets:
        return
    needed = least(made, arrays)
    for memory in (needed, needed * 3 // 2) if needed > 1 else ():
        graph, given = graph_of(made(memory), arrays)
        again = call_between_guards(backend_of(None, 1, guard=GUARD, poison=0x7F), graph, given)
        assert_bits(again, got, f"{label}, {memory} bytes, of at least {needed}")


# ---- loops that are hard -----------------------------------------------------------------------------------------------------


def gradients_of(loop: Callable[..., Any]) -> Made:
    """What a loop gives, and the gradients of its sum by all arrays. loop(memory, h, x, w) -> values."""

    def made(memory: Any) -> Callable[..., Any]:
        def values(*arrays: Any) -> list[Any]:
            return flat(loop(memory, *arrays))

        def loss(*arrays: Any) -> Any:
            return sum(np.sum(np.cos(v * (n + 0.5))) for n, v in enumerate(values(*arrays)))

        return lambda *arrays: [*values(*arrays), *cr.grad(loss, tuple(range(len(arrays))))(*arrays)]

    return made


def only(loop: Callable[..., Any]) -> Made:
    return lambda memory: lambda *arrays: loop(memory, *arrays)


def scan(step: Any, first: Any, xs: Any, memory: Any = None, reverse: bool = False) -> Any:
    return cr.scan(step, first, xs, memory=memory, reverse=reverse)


def back(h: Any, w: Any, *sequences: Any) -> Any:
    """A reversed loop over what others have stacked, which adds up two sums."""

    def step(state: Any, along: Any) -> Any:
        g, total, row = state
        for s in along:
            g = np.tanh(g @ w + s)
        return (g, total + along[0].T @ g, row + np.sum(g, axis=0)), g * 0.5

    return scan(step, (h, w * 0.0, w[0] * 0.0), sequences, reverse=True)


def tanh_step(w: Any) -> Any:
    return lambda h, y: ((n := np.tanh(h @ w + y)), n)


def entered(w: Any) -> Any:
    """A step that gives the state it began with, as the loop of a derivative does."""
    return lambda h, y: (np.tanh(h @ w + y), h)


def split_step(p: Any) -> Callable[[Any, Any], Any]:
    """A step that reads halves of a vector apart: the vector's gradient is two sums over rows, side by side."""
    n = p.shape[0] // 2
    return lambda s, y: (np.tanh(s * p[:n] + y * p[n:]), None)


LOOPS: dict[str, Made] = {  # of h (rows, n), x (length, rows, n), w (n, n)
    "plain": gradients_of(lambda m, h, x, w: scan(tanh_step(w), h, x, m)),
    "only the last state": gradients_of(lambda m, h, x, w: scan(tanh_step(w), h, x, m)[0]),
    "reversed": gradients_of(lambda m, h, x, w: scan(tanh_step(w), h, x, m, True)),
    "a sum that is given at each step": gradients_of(
        lambda m, h, x, w: scan(lambda s, y: ((t := s + y.T @ np.tanh(y)), t), w, x, m)
    ),
    "a sum that the state reads": gradients_of(
        lambda m, h, x, w: scan(lambda s, y: ((np.tanh(s[0] @ s[1] * 0.1 + y), s[1] + y.T @ s[0]), None), (h, w), x, m)[0]
    ),
    "a sum whose term reads it": gradients_of(lambda m, h, x, w: scan(lambda s, y: (s + np.tanh(y @ s).T @ y * 0.1, None), w, x, m)),
    "a sum whose term reads it elsewhere": gradients_of(
        lambda m, h, x, w: scan(lambda s, y: (s + 0.1 * s[::-1] + np.sum(y), None), w, x, m)[0]
    ),
    "two sums of the same": gradients_of(
        lambda m, h, x, w: scan(
            lambda s, y: ((np.tanh(s[0] + y), s[1] + y.T @ s[0], s[2] + 2.0 * (y.T @ s[0])), None), (h, w, w), x, m
        )[0]
    ),
    "sums along different axes": gradients_of(
        lambda m, h, x, w: scan(
            lambda s, y: ((s[0] * 0.5 + y, s[1] + np.sum(y, axis=0), s[2] + np.sum(y), s[3] + y), None), (h, w[0], w[0, 0], h), x, m
        )[0]
    ),
    "a sum beside a state that a reversed loop reads": gradients_of(
        lambda m, h, x, w: scan(lambda s, y: ((np.tanh(s[0] @ w + y), s[1] + y.T @ np.sin(y)), None), (h, w), x, m)[0]
    ),
    "a sum minus its term": gradients_of(lambda m, h, x, w: scan(lambda s, y: (s - y.T @ np.tanh(y), None), w, x, m)[0]),
    "a term before its sum": gradients_of(lambda m, h, x, w: scan(lambda s, y: (y.T @ np.tanh(y) + s, None), w, x, m)[0]),
    "a largest value": gradients_of(lambda m, h, x, w: scan(lambda s, y: (np.maximum(s, np.max(y * w[0], axis=0)), None), h[0], x, m)[0]),
    "a sum of looked-up places": gradients_of(
        lambda m, h, x, w: scan(lambda s, y: (s + np.take(y, np.argmax(y, axis=1), axis=1).sum(), None), w[0, 0], x, m)[0]
    ),
    "nothing but invariants": gradients_of(
        lambda m, h, x, w: scan(lambda s, y: (np.tanh(np.exp(w) @ w.T)[0] + 0.0 * s, np.sin(w) @ w), w[0], x, m)
    ),
    "an invariant result": gradients_of(lambda m, h, x, w: scan(lambda s, y: (s * 0.5 + y, np.tanh(w)), h, x, m)),
    "an invariant state": gradients_of(lambda m, h, x, w: scan(lambda s, y: ((s[0], np.tanh(s[1] @ s[0] + y)), None), (w, h), x, m)[0]),
    "a state that is forgotten": gradients_of(lambda m, h, x, w: scan(lambda s, y: (np.tanh(y), s), h, x, m)),
    "states that change places": gradients_of(
        lambda m, h, x, w: scan(lambda s, y: ((s[1], np.tanh(s[0] @ w + y)), None), (h, h * 2), x, m)[0]
    ),
    "a state given twice": gradients_of(lambda m, h, x, w: (lambda r: [r[0], r[0] * 2.0, r[1], r[1][::-1]])(scan(tanh_step(w), h, x, m))),
    "a loop in a loop": gradients_of(
        lambda m, h, x, w: scan(lambda s, y: scan(lambda g, v: (np.tanh(g * 0.5 + v), g + v), s, (w[:1] + y)[None] * s), h, x, m)
    ),
    "a loop over the steps of a loop": gradients_of(
        lambda m, h, x, w: scan(lambda s, y: (np.tanh(s + scan(lambda g, v: (g * 0.5 + v, None), s[0], y)[0]), s @ w), h, x, m)
    ),
    "one after the other": gradients_of(lambda m, h, x, w: scan(tanh_step(w), *scan(entered(w), h, x, m), m)),
    "the last state begins another": gradients_of(lambda m, h, x, w: scan(tanh_step(w.T), scan(tanh_step(w), h, x, m)[0], x, m)),
    "one there and one back": gradients_of(lambda m, h, x, w: scan(tanh_step(w), h, scan(tanh_step(w.T), h, x, m)[1], m, True)),
    "two over the same": gradients_of(
        lambda m, h, x, w: [scan(tanh_step(w), h, x, m), scan(tanh_step(w.T), h, x, m, True)]
    ),
    "a stack that several loops read": gradients_of(
        lambda m, h, x, w: (lambda ys: [scan(tanh_step(w), h, ys, m), scan(tanh_step(w.T), h, ys, m, True), ys[::-1] * 2.0])(
            scan(tanh_step(w), h, x, m)[1]
        )
    ),
    "read backward": only(lambda m, h, x, w: back(h, w, scan(tanh_step(w), h, x, m)[1])),
    "its states read backward": only(lambda m, h, x, w: back(h, w, scan(entered(w), h, x, m)[1])),
    "its states read backward, and the last one": only(
        lambda m, h, x, w: (lambda r: back(r[0], w, r[1], x))(scan(entered(w), h, x, m))
    ),
    "its states read backward and given": only(
        lambda m, h, x, w: (lambda r: [back(r[0], w, r[1]), r[0], r[1]])(scan(entered(w), h, x, m))
    ),
    "two loops read backward by one": only(
        lambda m, h, x, w: back(h, w, scan(entered(w), h, x, m)[1], scan(entered(w.T), h, x, m)[1])
    ),
    "one loop read backward by two": only(
        lambda m, h, x, w: (lambda ys: [back(h, w, ys), back(h, w.T, ys)])(scan(entered(w), h, x, m)[1])
    ),
    "two stacks read backward by two": only(
        lambda m, h, x, w: (lambda ys: [back(h, w, ys[0]), back(h, w.T, ys[1])])(
            scan(lambda s, y: (np.tanh(s @ w + y), (s, np.sin(s) * y)), h, x, m)[1]
        )
    ),
    "read backward a step later": only(
        lambda m, h, x, w: (lambda ys: back(h, w, np.concatenate([ys[1:], ys[:1]])) if len(x) else back(h, w, ys))(
            scan(entered(w), h, x, m)[1]
        )
    ),
    "forward again over what a reversed loop stacked": only(
        lambda m, h, x, w: scan(lambda s, y: ((s[0] + y.T @ s[1], np.tanh(s[1] + y)), None), (w, h), scan(entered(w), h, x, m, True)[1])
    ),
    "sums side by side": gradients_of(lambda m, h, x, w: scan(split_step(np.concatenate([w[0], w[-1]])), h, x, m)),
    "sums side by side that are given": gradients_of(
        lambda m, h, x, w: scan(
            lambda s, y: (s + np.concatenate([np.sum(y, axis=0), np.sum(y * w[0], axis=0)]), s), np.concatenate([w[0], w[-1]]), x, m
        )
    ),
    "sums side by side that the step gives anew": only(
        lambda m, h, x, w: scan(
            lambda s, y: ((n := s + np.concatenate([np.sum(y, axis=0), np.sum(y * w[0], axis=0)])), n), np.concatenate([w[0], w[-1]]), x, m
        )
    ),
    "sums side by side that another state takes": only(
        lambda m, h, x, w: scan(
            lambda s, y: (((n := s[0] + np.concatenate([np.sum(y, axis=0), np.sum(y * w[0], axis=0)])), n * s[1]), None),
            (np.concatenate([w[0], w[-1]]), np.concatenate([w[0], w[0]])), x, m
        )
    ),
    "products side by side": gradients_of(
        lambda m, h, x, w: scan(lambda s, y: (np.concatenate([np.tanh(s @ w[:, :1]), (y * s) @ w[:, 1:]], axis=1), None), h, x, m)
    ),
    "second derivatives": only(
        lambda m, h, x, w: cr.hvp(lambda v: np.sum(np.cos(scan(tanh_step(v), h, x, m)[1])), w, np.cos(w))
    ),
}  # fmt: skip
SIZES = [(13, 3, 2), (7, 1, 3)]


def loop_faults(name: str, length: int, rows: int, n: int) -> None:
    check(
        LOOPS[name], [numbers(rows, n), numbers(length, rows, n), numbers(n, n)], f"{name}, {length} steps of {rows} rows of {n}"
    )


@pytest.mark.parametrize("name", list(LOOPS))
def test_loops_that_are_hard(server: Server, name: str) -> None:
    server(loop_faults, name, 13, 3, 2)


@pytest.mark.parametrize("length", [0, 1, 2])
@pytest.mark.parametrize("name", ["plain", "a sum that is given at each step", "its states read backward and given"])
def test_loops_of_few_steps(server: Server, name: str, length: int) -> None:
    server(loop_faults, name, length, 2, 2)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(7, 1, 3), (12, 2, 2), (6, 6, 1), (5, 7, 16), (30, 1, 1), (0, 2, 2), (1, 2, 2), (2, 3, 2)])
@pytest.mark.parametrize("name", list(LOOPS))
def test_loops_of_other_sizes(server: Server, name: str, size: tuple[int, int, int]) -> None:
    server(loop_faults, name, *size)


# ---- random loops ------------------------------------------------------------------------------------------------------------


def random_loops(seed: int) -> tuple[Made, list[Array]]:
    """One to three loops over each other's results, of steps put together at random, and the gradients through all of them."""
    random = np.random.default_rng(seed)
    length, rows, n = (int(random.choice(c)) for c in (LENGTHS, (1, 2, 3), (1, 2, 3)))
    arrays = [numbers(rows, n, seed=seed), numbers(length, rows, n, seed=seed), 0.5 * numbers(n, n, seed=seed)]
    plans = [(int(s), bool(random.random() < 0.5)) for s in random.integers(0, 2**32, random.integers(1, 4))]

    def made(memory: Any) -> Callable[..., Any]:
        def values(h: Any, x: Any, w: Any) -> list[Any]:
            stacked, found = [x], []
            for s, reverse in plans:
                last, ys = scan(random_step(s, h, w), (h, w, w[0]), stacked[-2:], memory, reverse)
                found += [*last, *ys]
                stacked += [y for y in ys if np.shape(y) == np.shape(x)]
            return found

        def loss(*given: Any) -> Any:
            return sum(np.sum(v) * (0.5 + k % 3) for k, v in enumerate(values(*given)))

        return lambda *given: [*values(*given), *cr.grad(loss, (0, 1, 2))(*given)]

    return made, arrays


def random_step(seed: int, first: Any, w: Any) -> Callable[[Any, Any], Any]:
    """State (h (rows, n), a matrix, a row), of which the last two are sums, or something less plain."""

    def step(state: Any, along: Any) -> Any:
        random = np.random.default_rng(seed)
        h, matrix, row = state
        pool = [h, *along]
        pick = lambda: pool[random.integers(len(pool))]
        unary: list[Callable[[Any], Any]] = [
            np.tanh, np.sin, lambda p: p * row, lambda p: p @ w, lambda p: p @ np.tanh(w).T, lambda p: np.exp(-p * p),
            lambda p: p + np.exp(w[0]), lambda p: p - np.sum(p, axis=0), lambda p: p * np.sum(np.sin(first)), lambda p: p[::-1],
            lambda p: scan(lambda g, v: (np.tanh(g + v), g * v), p[0], p)[1], lambda p: np.where(along[0] > 0, p, 0.0),
            lambda p: p @ matrix * 0.1, lambda p: np.cumsum(p, axis=0), lambda p: p / (1.0 + np.max(p * p, axis=1, keepdims=True)),
        ]  # fmt: skip
        for _ in range(random.integers(2, 7)):
            p = pick()
            pool.append(unary[random.integers(len(unary))](p) if random.random() < 0.7 else np.tanh(p * pick() + pick()))
        new = np.tanh(pool[-1] * 0.5 + pick() * 0.5)
        matrices = [
            matrix + pick().T @ pick(), matrix - pick().T @ np.sin(pick()), matrix * 0.5 + np.sum(pick()), matrix, np.sum(pick()) + matrix,
        ]  # fmt: skip
        rows = [
            row + np.sum(pick(), axis=0),
            row + np.sum(pick() * pick(), axis=0) * 0.1,
            np.tanh(row + pick()[0]),
            row + h[-1] * pick()[0],
        ]
        results = [pick(), h, new, pick() * 2.0, row]
        kept = [results[k] for k in random.choice(len(results), random.integers(1, 4), replace=False)]
        return (new, matrices[random.integers(len(matrices))], rows[random.integers(len(rows))]), kept

    return step


def random_faults(seed: int) -> None:
    made, arrays = random_loops(seed)
    check(made, arrays, f"loops number {seed}")


@settings(max_examples=max(settings().max_examples // 3, 1))
@given(seed=st.integers(0, 2**32 - 1))
def test_random_loops(server: Server, seed: int) -> None:
    server(random_faults, seed)


@settings(max_examples=settings().max_examples)
@given(seed=st.integers(0, 2**32 - 1))
def test_improved_loops_mean_the_same(seed: int) -> None:
    made, arrays = random_loops(seed)
    graph, given = graph_of(made(None), arrays)
    better = improve(graph)
    assert_close(evaluate(better, given), evaluate(graph, given), seed)
    assert_close(evaluate(improve(better), given), evaluate(graph, given), f"{seed}, twice")


# ---- what the passes do ------------------------------------------------------------------------------------------------------


def loops_of(graph: Graph) -> list[Node]:
    return [n for n in graph.nodes() if n.op == "scan"]


def improved(f: Callable[..., Any], *arrays: Array) -> list[Node]:
    return loops_of(improve(graph_of(f, arrays)[0]))


def operators(loop: Node) -> list[str]:
    return [n.op for n in loop.attrs["body"].nodes()]


SEQUENCE = (numbers(3, 2), numbers(7, 3, 2), numbers(2, 2))


def test_what_is_the_same_in_all_steps_goes_out_of_the_loop() -> None:
    (loop,) = improved(lambda h, x, w: scan(lambda s, y: (s @ np.tanh(w @ w) + y, None), h, x)[0], *SEQUENCE)
    assert operators(loop).count("contract") == 1
    assert "tanh" not in operators(loop)


def test_it_goes_out_of_both_loops() -> None:
    inner = lambda s, y, w: scan(lambda g, v: (g * np.exp(w[0]) + v, None), s, y)[0]
    (outer,) = improved(lambda h, x, w: scan(lambda s, y: (inner(s, y, w), None), h[0], x)[0], *SEQUENCE)
    (loop,) = loops_of(outer.attrs["body"])
    assert "exp" not in operators(outer)
    assert "exp" not in operators(loop)


def test_the_backward_loop_reads_what_costs_much() -> None:
    loss = lambda h, x, w: np.sum(scan(lambda s, y: (np.exp(np.sin(s @ w + y)), None), h, x)[0])
    forward, backward = improved(cr.grad(loss, (0, 2)), *SEQUENCE)
    assert {"exp", "sin"} <= set(operators(forward))
    assert not {"exp", "sin"} & set(operators(backward))
    assert operators(backward).count("contract") == 2, "one for the state, one for the weights, none for the forward step"


def test_what_costs_little_is_computed_again() -> None:
    loss = lambda h, x, w: np.sum(scan(lambda s, y: (s * s * 0.1 + y, None), h, x)[0])
    forward, backward = improved(cr.grad(loss), *SEQUENCE)
    assert len(forward.types) == 2, "the last state, and the states that steps begin with"
    assert backward.attrs["sequences"] == 1


def sum_loops(f: Callable[..., Any], *arrays: Array) -> list[Loop]:
    """The loops over chunks that native code has of a function."""
    graph, _ = graph_of(f, arrays)
    phases = backend_of().function(graph).machine.code.plan.phases
    loops = [i for items in phases for i in items if isinstance(i, Loop)]
    return [i for i in loops if any(isinstance(j, Loop) for j in i.items) and any(isinstance(j, Kernel) for j in i.items)]


LONG = (numbers(64, 16), numbers(50, 64, 16), numbers(16, 16))  # 64 rows: 8 steps a chunk


def test_sums_are_gathered_over_chunks() -> None:
    (loop,) = sum_loops(cr.grad(lambda w, h, x: np.sum(scan(tanh_step(w), h, x)[0])), *(LONG[i] for i in (2, 0, 1)))
    assert loop.axis.extent == 7, "the first one is shorter, and a turn like the others"
    steps = [i for i in loop.items if isinstance(i, Loop)]
    assert [s.axis.extent for s in steps] == [8]
    assert not loop.meets
    sums = [k for k in loop.items if isinstance(k, Kernel)]
    assert any({a.extent for a in k.reduced} == {8, 32} and k.domain[0].extent == 2 for k in sums), "half of the rows at a time"


def test_sums_side_by_side_have_states_of_their_own_and_are_gathered() -> None:
    loss = lambda p, h, x: np.sum(scan(split_step(p), h, x)[0])
    _, backward = loops_of(improve(simplify(graph_of(cr.grad(loss), [numbers(4), *SEQUENCE[:2]])[0])))
    assert [t.shape for t in backward.types[: backward.attrs["states"]]] == [(3, 2), (2,), (2,)]
    (loop,) = sum_loops(cr.grad(loss), numbers(32), *LONG[:2])
    assert not loop.meets


@pytest.mark.parametrize("reverse", [False, True])
def test_code_is_as_long_whether_or_not_the_steps_are_whole_chunks(reverse: bool) -> None:
    def size(length: int) -> tuple[int, int]:
        loss = lambda w, h, x: np.sum(scan(tanh_step(w), h, x, reverse=reverse)[0])
        graph, _ = graph_of(cr.grad(loss), [numbers(3, 3), numbers(4, 3), numbers(length, 4, 3)])
        code = backend_of().function(graph).machine.code
        return len(code.functions), code.text.count("\n")

    (functions, lines), (others, more) = size(9_984), size(10_000)  # 128 steps a chunk
    assert functions == others
    assert lines <= more <= 1.1 * lines


@settings(max_examples=max(settings().max_examples // 5, 1), deadline=None)
@given(
    st.integers(1, 70), st.sampled_from([8, 15, 16, 64, 100]), st.booleans(), st.sampled_from([0, 2]), st.integers(0, 2**32 - 1)
)
def test_each_step_is_added_once(length: int, rows: int, reverse: bool, level: int, seed: int) -> None:
    """Sums of small whole numbers are exact in any order."""
    random = np.random.default_rng(seed)
    arrays = [random.integers(-3, 4, shape).astype("f4") for shape in ((3, 4), (rows, 4), (length, rows, 3))]

    def gradient(memory: Any) -> Callable[..., Any]:
        step = lambda w: lambda h, y: ((n := np.maximum(y @ w, 0) - h), n)
        return cr.grad(lambda w, h, x: np.sum(scan(step(w), h, x, memory, reverse)[1]))

    graph, given = graph_of(gradient(None), arrays)
    plain = backend_of(None, 1).function(graph)(given)
    np.testing.assert_array_equal(plain[0], evaluate(graph, given)[0])
    assert_bits(backend_of(None, level).function(graph)(given), plain)
    graph, given = graph_of(gradient(least(gradient, arrays)), arrays)
    assert_bits(backend_of(None, level).function(graph)(given), plain)


def test_operations_are_those_of_the_steps_that_exist() -> None:
    def operations(length: int) -> int:
        h, x, w = LONG
        (loop,) = sum_loops(cr.grad(lambda w, h, x: np.sum(scan(tanh_step(w), h, x)[0])), w, h, x[:length])
        return work(loop).flops

    assert operations(44) / operations(48) == pytest.approx(44 / 48, rel=1e-3)


def test_limits_of_axes_are_looked_at() -> None:
    turn, step, place = Axis("turn", 2), Axis("step", 8), Axis("i", 1)
    source, target = Buffer("a", (13,), F8, "input"), Buffer("b", (8,), F8)
    time = of(turn) * 8 + of(step)

    def items(between: tuple[Affine, Affine] | None) -> list[Loop]:
        kernel = Kernel("k", (place,), (), [Store(target, (of(step),), load(source, (time,)))])
        return [Loop("chunks", turn, False, [Loop("steps", step, False, [kernel], [], between=between)], [])]

    verify(items((Affine(), of(turn) * -8 + 13)))
    for between in (None, (Affine(), of(turn) * -8 + 14)):
        with pytest.raises(GraphError, match="reads a outside of it"):
            verify(items(between))


@pytest.mark.parametrize(("rows", "units"), [(30, 2), (15, 2), (64, 400)])
def test_rows_without_even_halves_and_large_sums_are_added_as_one(rows: int, units: int) -> None:
    step = lambda w: lambda h, y: (np.tanh((y + h) @ w), None)
    arrays = numbers(units, units), numbers(rows, units), numbers(120, rows, units)
    (loop,) = sum_loops(cr.grad(lambda w, h, x: np.sum(scan(step(w), h, x)[0])), *arrays)
    assert loop.meets
    length = loop.items[0].axis.extent  # type: ignore[union-attr]  # the steps of a chunk
    assert any({length, rows} <= {a.extent for a in k.reduced} for k in loop.items if isinstance(k, Kernel))


NO_SUMS: dict[str, Callable[..., Any]] = {
    "read in the step": lambda w, h, x: scan(lambda s, y: ((s[0] + y.T @ y, s[1] @ s[0]), None), (w, h), x)[0],
    "given at each step": lambda w, h, x: scan(lambda s, y: ((t := s + y.T @ y), t), w, x),
    "its own term": lambda w, h, x: scan(lambda s, y: (s + np.tanh(y @ s).T @ y, None), w, x)[0],
    "scaled": lambda w, h, x: scan(lambda s, y: (0.5 * s + y.T @ y, None), w, x)[0],
}


@pytest.mark.parametrize("name", list(NO_SUMS))
def test_what_is_no_sum_stays_in_its_steps(name: str) -> None:
    assert sum_loops(NO_SUMS[name], *(LONG[i] for i in (2, 0, 1))) == []


@pytest.mark.parametrize(
    ("length", "rows", "steps"), [(1000, 512, 1), (1000, 513, 1), (1000, 511, 2), (3, 1, 3), (1000, 0, 512), (1, 4, 1)]
)
def test_steps_of_a_chunk(length: int, rows: int, steps: int) -> None:
    assert gather.steps_of_a_chunk(length, rows) == steps


def test_a_loop_within_a_budget_has_no_stack_of_all_steps() -> None:
    """Steps times rows times units stand in no buffer."""
    f = lambda m: cr.grad(lambda w, h, x: np.sum(scan(tanh_step(w), h, x, m)[0]))
    arrays = [LONG[i] for i in (2, 0, 1)]
    found = {}
    for memory in (None, least(f, arrays)):
        graph, _ = graph_of(f(memory), arrays)
        code = backend_of().function(graph).machine.code
        buffers = {s.buffer for items in code.plan.phases for k in kernels_of(items) for s in k.stores}
        found[memory] = max(b.shape[0] for b in buffers if b.space == "scratch" and len(b.shape) == 3)
    whole, cut = found.values()
    assert whole >= 50
    assert cut <= 9, "a chunk, and the state with which it ends"


def test_operands_that_are_copied_together_are_those_of_each_kernel_alone() -> None:
    """The first chunk is shorter than the others: of its operands only the steps that exist are copied."""
    arrays = [numbers(*shape).astype("f4") for shape in ((50, 1009), (64, 1009), (12, 64, 50))]

    def loss(w: Any, h: Any, x: Any) -> Any:
        return np.sum(scan(lambda h, x: (np.tanh(x @ w + 0.5 * h), None), h, x)[0])

    graph, given = graph_of(cr.grad(loss), arrays)
    function = backend_of(None, 1).function(graph)
    found = list(kernels_of([i for items in function.machine.code.plan.phases for i in items]))
    assert sum(bool(k.packed) for k in found) > 1, "else this would prove nothing"
    assert all(v in k.values() for k in found for v in k.packed)
    np.testing.assert_allclose(function(given)[0], evaluate(graph, given)[0], rtol=1e-3, atol=1e-2)
