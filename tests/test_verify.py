"""What the verifier of kernels says of what several kernels do together: whether they write different elements, and whether what is read
has been written; and when it looks. What it says of single kernels is tested in test_compiler.py.

Elements are counted by arithmetic on evenly spaced places; here they are counted one by one beside it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chainrule import nn
from chainrule.compiler import pipeline
from chainrule.compiler.affine import Affine, Axis, affine, of
from chainrule.compiler.kernels import Buffer, Ends, Item, Kernel, Loop, Store, Value, constant, kernels_of, load
from chainrule.compiler.phases import Plan
from chainrule.compiler.regions import Region, Run, common, region, shared
from chainrule.compiler.target import host
from chainrule.compiler.verify import _Memory, verify
from chainrule.errors import GraphError
from chainrule.graph.node import Graph, Type
from chainrule.graph.trace import build
from chainrule.normalize import normalize

F4, I8 = np.dtype(np.float32), np.dtype(np.int64)
ONE = constant(1, F4)
TIME = Axis("time", 4)
T = of(TIME)
PAIR, THREE = Axis("step", 2), Axis("step", 3)

# ---- counting ----------------------------------------------------------------------------------------------------------------

runs = st.builds(Run, st.integers(-9, 30), st.integers(1, 7), st.integers(0, 9))


def places(run: Run) -> set[int]:
    return {run.first + run.step * i for i in range(run.length)}


@given(runs, runs)
def test_places_that_two_runs_have_in_common(a: Run, b: Run) -> None:
    assert common(a, b) == len(places(a) & places(b))


@given(runs, st.integers(-9, 30), st.integers(-9, 30))
def test_a_run_between_two_places(run: Run, low: int, high: int) -> None:
    assert places(run.between(low, high)) == {p for p in places(run) if low <= p <= high}


AXES = (Axis("i", 2), Axis("j", 3), Axis("k", 4), Axis("l", 1))
indices = st.builds(affine, st.integers(0, 5), st.lists(st.tuples(st.sampled_from(AXES), st.integers(-4, 6)), max_size=3))
VIEWS = ((2, 3, 4), (6, 4), (2, 12), (24,), (1, 24), (3, 8))


def elements(index: Sequence[Affine], shape: tuple[int, ...]) -> set[int]:
    """The places in memory of all elements at an index that lie inside of the array."""
    found = set()
    for values in itertools.product(*(range(a.extent) for a in AXES)):
        at = dict(zip(AXES, values, strict=True))
        place = [i.constant + sum(c * at[a] for a, c in i.terms) for i in index]
        if all(0 <= p < n for p, n in zip(place, shape, strict=True)):
            found.add(int(np.ravel_multi_index(place, shape)))
    return found


def made(index: Sequence[Affine], shape: tuple[int, ...]) -> Region:
    ranges = [(max(0, i.smallest), min(n - 1, i.largest)) for i, n in zip(index, shape, strict=True)]
    return region(index, shape, ranges, set())


@given(st.data(), st.sampled_from(VIEWS), st.sampled_from(VIEWS))
def test_elements_that_two_indices_have_in_common(data: st.DataObject, view: tuple[int, ...], other: tuple[int, ...]) -> None:
    one, two = ([data.draw(indices) for _ in shape] for shape in (view, other))
    a, b, first, second = made(one, view), made(two, other), elements(one, view), elements(two, other)
    assert len(first) == a.size if a.exact else len(first) <= a.size
    count = shared(a, b)
    if count is None:
        assert not (a.exact and b.exact) or view != other
    elif count:
        assert count == len(first & second)
    else:
        assert not first & second


@given(st.data())
def test_all_turns_of_a_loop(data: st.DataObject) -> None:
    k = AXES[2]
    index = [data.draw(indices), data.draw(indices)]
    inside = region(index, (40, 40), [(x.smallest, x.largest) for x in index], {k})
    whole, direct = inside.over(k, k.extent), region(index, (40, 40), [(x.smallest, x.largest) for x in index], set())
    assert whole.exact <= direct.exact
    if whole.exact:
        assert (whole.runs, whole.base) == (direct.runs, direct.base)


# ---- kernels together --------------------------------------------------------------------------------------------------------


def array(*shape: int, space: Any = "scratch", name: str = "a", dtype: Any = F4) -> Buffer:
    return Buffer(name, shape, dtype, space)


def fill(buffer: Buffer, *parts: tuple[int, int, int], value: Value = ONE) -> Kernel:
    """buffer[first + step · i, ...] = value; parts: (first, step, count) for each dimension."""
    domain = tuple(Axis(f"i{d}", count) for d, (_, _, count) in enumerate(parts))
    index = [of(a) * step + first for a, (first, step, _) in zip(domain, parts, strict=True)]
    return Kernel("fill", domain, (), [Store(buffer, tuple(index), value)])


def read(buffer: Buffer, *index: Affine | Value, domain: Sequence[Axis] = (), shape: tuple[int, ...] | None = None) -> Kernel:
    """out[domain] = buffer[index]"""
    out = Buffer("out", tuple(a.extent for a in domain), buffer.dtype, "result")
    return Kernel("read", tuple(domain), (), [Store(out, tuple(map(of, domain)), load(buffer, index, shape))])


def whole(buffer: Buffer, shape: tuple[int, ...] | None = None) -> Kernel:
    """A kernel that reads all of an array."""
    domain = tuple(Axis(f"j{d}", n) for d, n in enumerate(shape or buffer.shape))
    return read(buffer, *map(of, domain), domain=domain, shape=shape)


def all_of(*shape: int) -> list[tuple[int, int, int]]:
    return [(0, 1, n) for n in shape]


def loop(*items: Item, reverse: bool = False, axis: Axis = TIME, **more: Any) -> Loop:
    return Loop("loop", axis, reverse, list(items), [], **more)


def at_time(buffer: Buffer, time: Affine, value: Value = ONE) -> Kernel:
    """buffer[time, i] = value"""
    i = Axis("i", buffer.shape[1])
    return Kernel("step", (i,), (), [Store(buffer, (time, of(i)), value)])


def taken(buffer: Buffer, time: Affine) -> Kernel:
    """out[j] = buffer[time, j]"""
    j = Axis("j", buffer.shape[1])
    return read(buffer, time, of(j), domain=(j,))


def both(buffer: Buffer, first: int, second: int) -> Kernel:
    """One kernel that writes two of every three columns of a matrix."""
    i, j = Axis("i", buffer.shape[0]), Axis("j", 3)
    return Kernel("both", (i, j), (), [Store(buffer, (of(i), of(j) * 3 + k), ONE) for k in (first, second)])


A, M, STACK = array(6), array(2, 9), array(5, 3)
N = Axis("n", 3)
PLACE = load(array(3, space="input", name="places", dtype=I8), (of(N),))
STEPS = array(2, name="steps", dtype=I8)
ENDS = Ends(STEPS, T)
DIAGONAL = Kernel("diagonal", (N,), (), [Store(array(3, 3, name="d"), (of(N), of(N)), ONE)])
ADDED = Kernel("added", (N,), (), [Store(A, (of(N),), ONE, "add")])
CHUNK = Axis("chunk", 2)
FIRST, SECOND = loop(whole(A), axis=PAIR), loop(fill(A, *all_of(6)), axis=PAIR)
IN_CHUNKS = loop(loop(at_time(STACK, of(CHUNK) * 2 + of(PAIR)), axis=PAIR), axis=CHUNK)
BEFORE_LAST = loop(taken(STACK, of(THREE)), at_time(STACK, of(THREE) + 2), axis=THREE)

GOOD: dict[str, Sequence[Item]] = {
    "a concatenation": [fill(A, (3, 1, 3)), fill(A, (0, 1, 3)), whole(A)],
    "every second element, and the others": [fill(A, (0, 2, 3)), fill(A, (1, 2, 3)), whole(A)],
    "columns of one kernel": [both(M, 0, 2), fill(M, (0, 1, 2), (1, 3, 3)), whole(M)],
    "a part written over": [fill(M, *all_of(2, 9)), fill(M, (0, 1, 1), (2, 2, 3)), whole(M)],
    "a part that is read": [fill(A, (2, 1, 3)), read(A, of(N) + 2, domain=(N,))],
    "a part seen in another shape": [fill(M, (1, 1, 1), (0, 1, 3)), read(M, of(N) + 9, domain=(N,), shape=(18,))],
    "memory that serves again": [fill(A, (0, 1, 3)), read(A, of(N), domain=(N,)), fill(A, (2, 1, 4)), read(A, of(N) + 3, domain=(N,))],
    "a place that is looked up in all of an array": [fill(A, *all_of(6)), read(A, PLACE, domain=(N,))],
    "a place that is looked up in a part": [fill(A, (0, 1, 3)), read(A, PLACE, domain=(N,))],
    "a diagonal": [DIAGONAL, whole(DIAGONAL.stores[0].buffer)],
    "what is added to": [fill(A, (0, 1, 3)), ADDED, read(A, of(N), domain=(N,))],
    "a state": [fill(A, *all_of(6)), loop(whole(A), fill(A, *all_of(6)))],
    "what a turn has written": [loop(at_time(STACK, T), taken(STACK, T))],
    "what the turn before has written": [at_time(STACK, Affine()), loop(taken(STACK, T), at_time(STACK, T + 1)), whole(STACK)],
    "the same backward": [at_time(STACK, Affine(4)), loop(taken(STACK, T + 1), at_time(STACK, T), reverse=True), whole(STACK)],
    "what the turn before the last has written": [fill(STACK, (0, 1, 2), (0, 1, 3)), BEFORE_LAST],
    "a loop in chunks": [IN_CHUNKS, fill(STACK, (4, 1, 1), (0, 1, 3)), whole(STACK)],
    "a loop of no turns": [loop(whole(A), axis=Axis("never", 0))],
    "rows that end": [fill(STEPS, *all_of(2), value=constant(1, I8)), loop(whole(STEPS), ends=ENDS)],
    "parts of which one runs first": [loop(FIRST, SECOND, turns=((1, 0), (0, 0)))],
}  # fmt: skip


@pytest.mark.parametrize("items", GOOD.values(), ids=GOOD.keys())
def test_what_may_be(items: Sequence[Item]) -> None:
    verify(items)


RESULT = array(6, space="result")
UNWRITTEN, OVER, TWICE = (
    "reads a where nobody has written",
    "writes over some of a that nobody has read",
    "writes elements of a by two stores",
)
MISSING = "is the last to write a, of which something is missing"
BROKEN: dict[str, tuple[Sequence[Item], str]] = {
    "two stores of a kernel at one place": ([both(M, 1, 1)], TWICE),
    "two stores of a kernel that meet": ([both(array(2, 12), 0, 3)], TWICE),
    "parts that overlap": ([fill(A, (0, 1, 3)), fill(A, (2, 1, 3))], OVER),
    "a part of every second element that meets another": ([fill(A, (0, 2, 3)), fill(A, (1, 3, 2))], OVER),
    "all written over a part": ([fill(M, (0, 1, 1), (2, 2, 3)), fill(M, *all_of(2, 9))], OVER),
    "a part twice, another never": ([fill(A, (0, 1, 3)), fill(A, (0, 1, 3)), whole(A)], UNWRITTEN),
    "an element between two parts": ([fill(A, (0, 1, 3)), fill(A, (4, 1, 2)), whole(A)], UNWRITTEN),
    "every second element": ([fill(A, (0, 2, 3)), whole(A)], UNWRITTEN),
    "a row too few": ([fill(M, (0, 1, 1), (0, 1, 9)), whole(M)], UNWRITTEN),
    "a row too few in another shape": ([fill(M, (0, 1, 1), (0, 1, 9)), whole(M, (18,))], UNWRITTEN),
    "a border that is missing": ([fill(M, (0, 1, 2), (0, 1, 1)), fill(M, (0, 1, 2), (1, 1, 7)), whole(M)], UNWRITTEN),
    "an order that cannot be": ([whole(A), fill(A, *all_of(6))], UNWRITTEN),
    "added to nothing": ([fill(A, (1, 1, 5)), ADDED], UNWRITTEN),
    "a result with a hole": ([fill(RESULT, (0, 1, 5))], MISSING),
    "new state with a hole": ([fill(array(6, space="state"), (1, 1, 5))], MISSING),
    "a result that is read too early": ([whole(RESULT), fill(RESULT, *all_of(6))], UNWRITTEN),
    "a state that begins with nothing": ([loop(whole(A), fill(A, *all_of(6)))], UNWRITTEN),
    "a turn that reads what it writes later": ([loop(taken(STACK, T), at_time(STACK, T))], UNWRITTEN),
    "a stack that begins with nothing": ([loop(taken(STACK, T), at_time(STACK, T + 1))], UNWRITTEN),
    "a stack that begins at the other end": ([at_time(STACK, Affine(4)), loop(taken(STACK, T), at_time(STACK, T + 1))], UNWRITTEN),
    "a stack read the other way": ([at_time(STACK, Affine()), loop(taken(STACK, T), at_time(STACK, T + 1), reverse=True)], UNWRITTEN),
    "too few turns before": ([at_time(STACK, Affine()), BEFORE_LAST], UNWRITTEN),
    "a turn too few": ([loop(at_time(STACK, T)), whole(STACK)], UNWRITTEN),
    "chunks that leave steps out": ([IN_CHUNKS, whole(STACK)], UNWRITTEN),
    "rows that end nobody knows where": ([loop(fill(A, *all_of(6)), ends=ENDS)], "reads steps where nobody has written"),
    "a part that runs too early": ([loop(FIRST, SECOND, turns=((0, 0), (1, 0)))], UNWRITTEN),
}  # fmt: skip


@pytest.mark.parametrize(("items", "problem"), BROKEN.values(), ids=BROKEN.keys())
def test_what_is_refused(items: Sequence[Item], problem: str) -> None:
    with pytest.raises(GraphError, match=problem):
        verify(items)
    with pytest.raises(GraphError, match=problem):
        verify([loop(*items, axis=Axis("around", 2))])


def test_a_result_is_written_whole_by_all_turns_together() -> None:
    stack = array(4, 3, space="result")
    verify([loop(at_time(stack, T))])
    with pytest.raises(GraphError, match=MISSING):
        verify([loop(at_time(stack, T), axis=TIME), at_time(array(4, 3, space="result"), Affine())])


def test_time_does_not_depend_on_how_large_arrays_are() -> None:
    large = array(10**9, 10**9)
    verify([fill(large, (0, 1, 10**9), (0, 2, 5 * 10**8)), fill(large, (0, 1, 10**9), (1, 2, 5 * 10**8)), whole(large)])


def test_many_parts_in_a_row_are_one() -> None:
    """So the time to verify a concatenation grows with the number of its parts, not with its square."""
    long = array(4000)
    parts = [fill(long, (4 * n, 1, 4)) for n in range(1000)]
    memory = _Memory()
    memory.items(parts)
    assert [p.region.runs for p in memory.parts[0][long]] == [(Run(0, 1, 4000),)]


# ---- after which passes ------------------------------------------------------------------------------------------------------

KERNEL_PASSES = (
    "fuse", "in_lanes", "in_blocks", "with_siblings", "absorbed", "pooled", "split", "in_panels", "ragged", "parted", "replayed",
    "gathered", "carried", "share", "with_better_copies", "plan",
)  # fmt: skip


def breaking(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same pass, whose first kernel then writes behind its buffer."""

    def broken(*args: Any) -> Any:
        made = function(*args)
        items = made[0] if isinstance(made, tuple) else made.phases[0] if isinstance(made, Plan) else made
        kernel = next(k for k in kernels_of(items) if k.stores[0].index)
        store = kernel.stores[0]
        kernel.stores[0] = replace(store, index=(Affine(store.view[0]), *store.index[1:]))
        return made

    return broken


def square() -> None:
    """A small graph through the pipeline."""
    graph, out = build(lambda x: [x * x + 1], [Type((4, 5), F4)]), Buffer("out", (4, 5), F4, "result")
    given = [pipeline.Given(Buffer("x", (4, 5), F4, "input"))]
    pipeline.compile_graph("entry", normalize(graph), given, [out], [], {"x": 2, "out": 3}, [None], host())


@pytest.mark.parametrize("name", KERNEL_PASSES)
def test_a_pass_that_breaks_a_kernel_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, name, breaking(getattr(pipeline, name)))
    with pytest.raises(GraphError, match=f"after {name}: kernel k.* writes .* outside of it"):
        square()


@pytest.mark.parametrize("name", ["branched", "simplify", "improve"])
def test_a_pass_that_breaks_a_graph_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, name, lambda graph: Graph((), graph.outputs))
    with pytest.raises(GraphError, match=f"after {name}: .* an input that is not one of this graph"):
        square()


def test_outside_of_tests_the_last_pass_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "VERIFY_EACH_PASS", False)
    looks: list[Sequence[Item]] = []
    monkeypatch.setattr(pipeline, "verify", lambda items: looks.append(items))
    square()
    assert len(looks) == 1
    monkeypatch.undo()
    monkeypatch.setattr(pipeline, "VERIFY_EACH_PASS", False)
    for name in ("in_lanes", "summed"):
        with monkeypatch.context() as patched:
            patched.setattr(pipeline, name, breaking(getattr(pipeline, name)))
            with pytest.raises(GraphError, match=r"after summed: .* writes .* outside of it"):
                square()


def test_sums_of_halves_of_the_rows_are_sums_of_their_kernels() -> None:
    """Where rows lie in blocks, a half may be one block: its axis is gone from the index, and is no less one that is summed over."""
    x, t = np.zeros((70, 20, 5), np.float32), np.zeros((70, 3), np.float32)
    nn.Sequential(nn.LSTM(8), nn.Dense(3)).fit(x, t, epochs=1, batch_size=32, backend="native")
