"""The order of kernels and the memory that they work in (phases.py, memory.py): which buffers may share memory, where state is written,
and, element by element, what threads touch that do not wait for each other. What the verifier of plans says of this is tested in
test_races.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_compiler import F4, NETS, code_of

from chainrule.compiler import pipeline
from chainrule.compiler.affine import Affine, Axis, flat, of
from chainrule.compiler.kernels import Buffer, Item, Kernel, Loop, Store, constant, kernels_of, load
from chainrule.compiler.memory import ALIGNMENT, arena
from chainrule.compiler.phases import Plan, plan
from chainrule.compiler.pipeline import Code
from chainrule.compiler.schedule import units

Array = np.ndarray

# ---- memory ------------------------------------------------------------------------------------------------------------------


@st.composite
def lifetimes(draw: Any) -> list[tuple[Buffer, int, int]]:
    """Buffers, each with the phase that writes and the one that reads it."""
    phases = draw(st.integers(1, 6))
    made = []
    for n in range(draw(st.integers(0, 12))):
        first = draw(st.integers(0, phases - 1))
        last = draw(st.integers(first, phases - 1))
        made.append((Buffer(f"t{n}", (draw(st.integers(0, 90)),), F4), first, last))
    return made


def writer(b: Buffer, reads: Sequence[Buffer] = ()) -> Kernel:
    axis = Axis("i", max(b.size, 1))
    value = load(reads[0], (of(axis),)) if reads else constant(0, F4)
    return Kernel("k", (axis,), (), [Store(b, (of(axis),), value)])


@given(lifetimes(), st.sampled_from([0, 64, 100]), st.integers(0, 3))
def test_buffers_that_are_alive_together_lie_apart(made: list[tuple[Buffer, int, int]], guard: int, late: int) -> None:
    count = max((last for _, _, last in made), default=0) + 1
    phases: list[list[Item]] = [[] for _ in range(count)]
    for b, first, last in made:
        phases[first].append(writer(b))
        phases[last].append(writer(Buffer("out", b.shape, F4, "result"), [b]))
    always = {b for b, _, _ in made[:late]}
    found = arena(Plan(phases, {}, {}, {}, [writer(b) for b in always]), guard)
    assert set(found.offsets) == {b for b, _, _ in made}
    for b, start in found.offsets.items():
        assert start % ALIGNMENT == 0
        assert start + b.bytes + guard <= found.bytes
    for (a, first_a, last_a), (b, first_b, last_b) in itertools.combinations(made, 2):
        together = (first_a <= last_b and first_b <= last_a) or a in always or b in always
        if together or guard:
            below, above = sorted((a, b), key=lambda x: (found.offsets[x], x.bytes))
            assert found.offsets[below] + below.bytes + guard <= found.offsets[above]


def test_memory_is_used_again() -> None:
    buffers = [Buffer(f"t{i}", (100,), F4) for i in range(6)]
    phases: list[list[Item]] = [[writer(b, buffers[i - 1 : i])] for i, b in enumerate(buffers)]
    assert arena(Plan(phases, {}, {}, {}, [])).bytes <= 2 * (400 + ALIGNMENT)


@given(lifetimes(), st.integers(0, 3))
def test_steps_that_follow_each_other_without_waiting_use_other_memory(made: list[tuple[Buffer, int, int]], several: int) -> None:
    """What is alive in the last phase lies apart from what is alive in the first one, but for itself; of some there are two."""
    last = max((last for _, _, last in made), default=0)
    phases: list[list[Item]] = [[] for _ in range(last + 1)]
    for b, first, end in made:
        phases[first].append(writer(b))
        phases[end].append(writer(Buffer("out", b.shape, F4, "result"), [b]))
    twice = {b: replace(b) for b, _, _ in made[:several]}
    offsets = arena(Plan(phases, {}, {}, {}, [], False, twice)).offsets
    every = [*made, *((twice[b], first, end) for b, first, end in made[:several])]
    for (a, first_a, last_a), (b, first_b, last_b) in itertools.combinations(every, 2):
        around = (first_a == 0 and last_b == last) or (first_b == 0 and last_a == last)
        if around or (first_a <= last_b and first_b <= last_a):
            below, above = sorted((a, b), key=lambda x: (offsets[x], x.bytes))
            assert offsets[below] + below.bytes <= offsets[above]


# ---- phases ------------------------------------------------------------------------------------------------------------------


def copies_of(buffer: Buffer) -> int:
    return buffer.part_of[0].shape[0] if buffer.part_of is not None else 1


def elements(
    index: Sequence[Any], view: Sequence[int], unit: Axis | None, owner: Array, threads: int, size: int, copies: int = 1
) -> Array:
    """Which elements of a buffer each thread touches: (threads, size · copies). owner: the thread of each value of the unit axis;
    copies: how many there are of the buffer, one for each unit."""
    index = [i if isinstance(i, Affine) else of(Axis("any", n)) for i, n in zip(index, view, strict=True)]  # looked up: any
    position = flat(index, view)
    axes = [a for a, _ in position.terms if a is not unit]
    where = np.array(position.constant).reshape(1)
    for a in axes:
        where = (where[:, None] + position.coefficient(a) * np.arange(a.extent)).reshape(-1)
    touched = np.zeros((threads, size * copies), bool)
    step = position.coefficient(unit) if unit is not None else 0
    length = units(unit.extent, threads)[1] if unit is not None else 1
    for value, thread in enumerate(owner):
        touched[thread, where + step * value + (value // length * size if copies > 1 else 0)] = True
    return touched


def owners(code: Code, item: Item, unit: Axis | None, threads: int) -> Array:
    """The thread that does each value of a kernel's unit axis, as the entry shares them out."""
    count = pipeline._count(item, code.plan, threads)
    thread = [t for t in range(threads) for _ in range((t + 1) * count // threads - t * count // threads)]
    if count == 1 or unit is None:
        return np.full(unit.extent if unit is not None else 1, thread[0])
    return np.array(thread)[np.arange(unit.extent) // units(unit.extent, threads)[1]]


class Touched:
    """What the threads read and write of each buffer, element by element."""

    def __init__(self, code: Code, item: Item, threads: int) -> None:
        self.read: dict[Buffer, Array] = {}
        self.written: dict[Buffer, Array] = {}
        for kernel in kernels_of([item]):
            owner = owners(code, item, kernel.unit, threads)
            accesses = [(self.read, v.buffer, v.index, v.shape) for v in kernel.loads()]
            accesses += [(self.written, s.buffer, s.index, s.view) for s in kernel.stores]
            for table, buffer, index, view in accesses:
                size = prod(view) if buffer.space == "input" else buffer.size
                found = elements(index, view, kernel.unit, owner, threads, size, copies_of(buffer))
                table[buffer] = table[buffer] | found if buffer in table else found


@pytest.mark.parametrize("threads", [2, 3, 5])
@pytest.mark.parametrize("name", NETS)
def test_threads_that_do_not_wait_touch_different_elements(name: str, threads: int) -> None:
    code = code_of(name, threads)
    for n, items in enumerate(code.plan.phases):
        read: dict[Buffer, Array] = {}
        written: dict[Buffer, Array] = {}
        for item in items:
            touched = Touched(code, item, threads)
            for mine, theirs in ((read, touched.read), (written, touched.written)):
                for b, found in theirs.items():
                    mine[b] = mine[b] | found if b in mine else found
        for b, who in written.items():
            several = (who | read.get(b, who)).sum(0) > 1
            assert not (several & who.any(0)).any(), f"phase {n}: {b} is touched by several threads\n{code.stage('kernels')}"
    assert len(code.plan.phases) > 1


@pytest.mark.parametrize("name", NETS)
def test_scratch_is_written_before_it_is_read_and_state_after(name: str) -> None:
    code = code_of(name, 2)
    known: dict[Buffer, Array] = {s.buffer: np.ones(s.buffer.size, bool) for k in code.plan.late for s in k.stores}
    changed: dict[Buffer, Array] = {}
    for item in (i for items in code.plan.phases for i in items):
        touched = Touched(code, item, 2)
        late = isinstance(item, Kernel) and item.late
        for b, found in touched.read.items():
            if b.space == "scratch":
                own = touched.written[b].any(0) if isinstance(item, Loop) and b in touched.written else False
                assert (known.get(b, np.zeros(b.size, bool)) | own)[found.any(0)].all(), f"{item.name} reads {b} too early"
            if b.space == "state":
                new = changed.get(b, np.zeros(b.size, bool))[found.any(0)]
                assert new.all() if late else not new.any(), f"{item.name} reads {b}, {'old' if late else 'new'}"
        for b, found in touched.written.items():
            if b.space == "scratch":
                known[b] = known.get(b, np.zeros(b.size * copies_of(b), bool)) | found.any(0)
            if b.space == "state":
                before = changed.get(b, np.zeros(b.size, bool))
                assert not (before & found.any(0)).any(), f"{b} is written twice"
                changed[b] = before | found.any(0)
    assert changed
    assert all(c.all() for c in changed.values()), "state is written in part"


def test_state_that_changes_places_is_written_beside_first() -> None:
    """a, b = b, a: no order does it in place."""
    a, b = (Buffer(n, (4,), F4, "state") for n in "ab")
    kernels = [writer(a, [b]), writer(b, [a])]
    made = plan(kernels, [a, b], pipeline.Names())
    order = [k for items in made.phases for k in kernels_of(items)]
    state_of: dict[Buffer, str] = {a: "old a", b: "old b"}
    for k in order:
        (source,) = [v.buffer for v in k.loads()]
        state_of[k.stores[0].buffer] = state_of[source]
    assert (state_of[a], state_of[b]) == ("old b", "old a")


def test_state_read_at_another_index_is_written_beside_first() -> None:
    """a = a[::-1]: in place it would read what it has written."""
    a, i = Buffer("a", (4,), F4, "state"), Axis("i", 4)
    kernel = Kernel("k", (i,), (), [Store(a, (of(i),), load(a, (of(i) * -1 + 3,)))], i)
    made = plan([kernel], [a], pipeline.Names())
    first, second = (k for items in made.phases for k in kernels_of(items))
    assert first is kernel
    assert kernel.stores[0].buffer is not a
    assert [s.buffer for s in second.stores] == [a]


def test_a_dependence_across_units_makes_a_phase() -> None:
    i, j = Axis("i", 4), Axis("j", 4)
    x, t, y = Buffer("x", (4,), F4, "input"), Buffer("t", (4,), F4), Buffer("y", (4,), F4, "result")

    def count(index: Affine) -> int:
        first = Kernel("k0", (i,), (), [Store(t, (of(i),), load(x, (of(i),)))], i)
        second = Kernel("k1", (j,), (), [Store(y, (of(j),), load(t, (index,)))], j)
        return len(plan([first, second], [], pipeline.Names()).phases)

    assert count(of(j)) == 1
    assert count(of(j) * -1 + 3) == 2


def test_indices_are_checked_before_state_is_written() -> None:
    phases = code_of("words", 2).plan.phases
    checks = [n for n, items in enumerate(phases) for k in kernels_of(items) if any(v.op == "checked" for v in k.values())]
    writes = [n for n, items in enumerate(phases) for k in kernels_of(items) if any(s.buffer.space == "state" for s in k.stores)]
    assert max(checks) < min(writes)
