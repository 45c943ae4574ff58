"""What the verifier of plans says of the order of kernels: whether state is read before it is written, and whether a thread touches
what another one writes. That plans the compiler makes pass is tested wherever something is compiled under test.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chainrule import nn
from chainrule.compiler import phases as phases_
from chainrule.compiler import pipeline
from chainrule.compiler.affine import Affine, Axis, of
from chainrule.compiler.kernels import Buffer, Ends, Item, Kernel, Loop, Store, Value, constant, load, reduce
from chainrule.compiler.phases import Plan, plan
from chainrule.compiler.pipeline import compile_graph
from chainrule.compiler.races import _race, _SharedOut, verify_plan
from chainrule.errors import GraphError
from chainrule.run import machines

F4 = np.dtype(np.float32)
ONE = constant(1, F4)
W = Buffer("w", (12, 4), F4, "state")
A, B = (Buffer(name, (12, 4), F4) for name in "ab")


def kernel(name: str, into: Buffer, value: Callable[[Axis, Axis], Value], shared: int | None = 0) -> Kernel:
    """into[i, j] = value(i, j), cut along one of the axes."""
    i, j = axes = tuple(Axis(f"{name}{n}", extent) for n, extent in zip("ij", into.shape, strict=True))
    return Kernel(name, axes, (), [Store(into, (of(i), of(j)), value(i, j))], None if shared is None else axes[shared])


def reading(buffer: Buffer) -> Callable[[Axis, Axis], Value]:
    return lambda i, j: load(buffer, (of(i), of(j)))


def turned(buffer: Buffer) -> Callable[[Axis, Axis], Value]:
    """The row that is as far from the end."""
    return lambda i, j: load(buffer, (of(i) * -1 + (i.extent - 1), of(j)))


def one(i: Axis, j: Axis) -> Value:
    return ONE


def planned(*items: Sequence[Item], inner: dict[Loop, list[Item]] | None = None, late: Sequence[Kernel] = ()) -> Plan:
    """These phases, each kernel shared out along its unit."""
    inner = inner or {}
    everything = [i for phase in items for i in phase]
    units: dict[Item, int | None] = {i: phases_._extent(i, inner, 2) for i in everything}
    for loop in inner:
        units.update({i: phases_._extent(i, inner, 2) for i in inner[loop]})
    meeting = {loop: [[i] for i in inner[loop]] for loop in inner if loop.meets}
    return Plan([list(phase) for phase in items], inner, meeting, units, list(late))


# ---- state -------------------------------------------------------------------------------------------------------------------


def test_old_state_is_read_first() -> None:
    reads, writes = kernel("k", A, reading(W)), kernel("m", W, one)
    verify_plan(planned([reads], [writes]), [W], 2)
    with pytest.raises(GraphError, match=r"kernel k, .* reads w, whose old value m has written over"):
        verify_plan(planned([writes], [reads]), [W], 2)
    verify_plan(planned([writes], [reads]), [], 2)


def test_a_part_of_the_state_may_be_read_when_another_has_been_written() -> None:
    i, j = axes = Axis("i", 6), Axis("j", 4)
    lower = Kernel("m", axes, (), [Store(W, (of(i), of(j)), ONE)])
    for first, fine in ((6, True), (5, False)):
        reads = Kernel("k", axes, (), [Store(A, (of(i), of(j)), load(W, (of(i) + first, of(j))))])
        if fine:
            verify_plan(planned([lower], [reads]), [W], 2)
        else:
            with pytest.raises(GraphError, match="reads w, whose old value m has written over"):
                verify_plan(planned([lower], [reads]), [W], 2)


def test_a_late_copy_reads_new_state() -> None:
    copy, writes = kernel("k", A, reading(W)), kernel("m", W, one)
    copy.late = True
    verify_plan(planned([writes], [copy], late=[copy]), [W], 2)
    with pytest.raises(GraphError, match=r"kernel m, .* writes w after the late copy of it by k"):
        verify_plan(planned([copy], [writes], late=[copy]), [W], 2)


def test_the_state_of_a_loop_is_read_first_in_each_turn() -> None:
    time = Axis("time", 5)
    reads, writes = kernel("k", A, reading(B)), kernel("m", B, one)
    for order, fine in (([reads, writes], True), ([writes, reads], False)):
        loop = Loop("l", time, False, list(order), [B])
        if fine:
            verify_plan(planned([loop], inner={loop: list(order)}), [], 2)
        else:
            with pytest.raises(GraphError, match="reads b, whose old value m has written over"):
                verify_plan(planned([loop], inner={loop: list(order)}), [], 2)


def test_a_kernel_reads_what_it_stores_into_where_it_stores() -> None:
    verify_plan(planned([kernel("k", W, reading(W))]), [W], 1)
    with pytest.raises(GraphError, match=r"kernel k, .* reads w at other places than it stores it"):
        verify_plan(planned([kernel("k", W, turned(W), shared=None)]), [W], 1)


# ---- threads -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_what_each_thread_made_for_itself_needs_no_meeting(threads: int) -> None:
    verify_plan(planned([kernel("k", A, one), kernel("m", B, reading(A))]), [], threads)


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_what_another_thread_made_needs_one(threads: int) -> None:
    makes, reads = kernel("k", A, one), kernel("m", B, turned(A))
    verify_plan(planned([makes], [reads]), [], threads)
    with pytest.raises(GraphError, match=r"kernel k, .* touches a where another one does in m, and does not wait"):
        verify_plan(planned([makes, reads]), [], threads)
    verify_plan(planned([makes, reads]), [], 1)


def test_other_cuts_need_one() -> None:
    """Along columns instead of rows, and by one thread instead of two."""
    for shared in (1, None):
        with pytest.raises(GraphError, match="does not wait"):
            verify_plan(planned([kernel("k", A, one), kernel("m", B, reading(A), shared)]), [], 2)


def test_what_only_fewer_threads_than_units_share_is_found() -> None:
    """Three units write one row each, two read rows 0 and 2: two threads, and four, have each its own, but of three the second has row 1,
    and both units of the other kernel fall to it and the third."""
    x, y, z = Axis("x", 3), Axis("y", 2), Affine()
    makes = Kernel("k", (x,), (), [Store(A, (of(x), z), ONE)], x)
    reads = Kernel("m", (y,), (), [Store(B, (of(y), z), load(A, (of(y) * 2, z)))], y)
    shares = planned([makes, reads])
    for threads in (2, 3):
        made = _SharedOut(shares, 4)
        fits = not any(_race(a, b, threads, made, frozenset()) for a in made.touches(makes) for b in made.touches(reads))
        assert fits == (threads == 2)
    with pytest.raises(GraphError, match="does not wait"):
        verify_plan(shares, [], 4)


def test_everybody_reads_what_nobody_writes() -> None:
    x, n = Buffer("x", (12, 4), F4, "input"), Axis("n", 12)
    sums = [kernel(name, into, lambda i, j: reduce("sum", load(x, (of(n), of(j))), [n])) for name, into in (("k", A), ("m", B))]
    for k in sums:
        k.reduced = (n,)
    verify_plan(planned(sums), [], 5)


def test_threads_meet_in_a_loop() -> None:
    """In each turn, after each phase; in a loop in which they do not meet, a thread may be some turns ahead."""
    time = Axis("time", 5)
    makes, reads = kernel("k", A, one), kernel("m", B, turned(A))
    loop = Loop("l", time, False, [makes, reads], [], meets=True)
    verify_plan(planned([loop], inner={loop: [makes, reads]}), [], 2)
    both = planned([loop], inner={loop: [makes, reads]})
    both.meeting[loop] = [[makes, reads]]
    with pytest.raises(GraphError, match="does not wait"):
        verify_plan(both, [], 2)


def test_a_thread_may_be_ahead_in_a_loop() -> None:
    """In each turn row t + 1 is written, and row t read where another thread has written it, a turn before."""
    time, i, j = Axis("time", 11), Axis("i", 4), Axis("j", 4)
    makes = Kernel("k", (i,), (), [Store(A, (of(time) + 1, of(i)), ONE)], i)
    reads = Kernel("m", (j,), (), [Store(B, (of(time), of(j)), load(A, (of(time), of(j) * -1 + 3)))], j)
    for meets in (True, False):
        loop = Loop("l", time, False, [makes, reads], [], meets=meets)
        made = planned([loop], inner={loop: [makes, reads]})
        made.units[loop] = None if meets else 4
        if meets:
            verify_plan(made, [], 2)
        else:
            with pytest.raises(GraphError, match="does not wait"):
                verify_plan(made, [], 2)


def test_kernels_in_a_loop_in_which_threads_meet_are_shared_out_each_by_itself() -> None:
    """One thread makes what each of them reads in the first turn."""
    makes, reads = kernel("k", A, one, None), kernel("m", B, reading(A))
    loop = Loop("l", Axis("time", 5), False, [reads], [], meets=True)
    verify_plan(planned([makes], [loop], inner={loop: [reads]}), [], 2)
    with pytest.raises(GraphError, match="does not wait"):
        verify_plan(planned([makes, loop], inner={loop: [reads]}), [], 2)


def test_one_buffer_under_two_shapes() -> None:
    """Rows of four and of eight: half as many of them are as much."""
    x, y, z = Axis("x", 12), Axis("y", 6), Axis("z", 8)
    i = Axis("i", 4)
    makes = Kernel("k", (x, i), (), [Store(A, (of(x), of(i)), ONE)], x)

    def reads(index: Affine) -> Kernel:
        return Kernel("m", (y, z), (), [Store(B, (of(y), of(z)), load(A, (index, of(z)), (6, 8)), shape=(6, 8))], y)

    verify_plan(planned([makes, reads(of(y))]), [], 2)
    with pytest.raises(GraphError, match="does not wait"):
        verify_plan(planned([makes, reads(of(y) * -1 + 5)]), [], 2)
    time = Axis("time", 6)
    makes = Kernel("k", (i,), (), [Store(A, (of(time), of(i)), ONE)])
    ahead = Kernel("m", (z,), (), [Store(B, (of(time), of(z)), load(A, (of(time), of(z)), (6, 8)), shape=(6, 8))])
    loop = Loop("l", time, False, [makes, ahead], [A])
    with pytest.raises(GraphError, match="reads a, whose old value k has written over"):
        verify_plan(planned([loop], inner={loop: [makes, ahead]}), [], 2)


def test_when_rows_end_is_known_before() -> None:
    """A kernel that computes the lengths is one that a loop over sequences waits for, unless each thread makes those of its rows."""
    steps, rows = Buffer("steps", (12,), np.dtype(np.int64)), [Axis(name, 12) for name in "xy"]
    time = Axis("time", 5)
    inside = Kernel("m", rows[:1], (), [Store(B, (of(rows[0]), Affine()), ONE)], rows[0])
    loop = Loop("l", time, False, [inside], [], ends=Ends(steps, of(time)))
    for place, fine in ((of(rows[1]), True), (of(rows[1]) * -1 + 11, False)):
        makes = Kernel("k", (rows[1],), (), [Store(steps, (place,), constant(3, steps.dtype))], rows[1])
        verify_plan(planned([makes], [loop], inner={loop: [inside]}), [], 2)
        if fine:
            verify_plan(planned([makes, loop], inner={loop: [inside]}), [], 2)
        else:
            with pytest.raises(GraphError, match="touches steps where another one does"):
                verify_plan(planned([makes, loop], inner={loop: [inside]}), [], 2)


def test_uneven_parts_of_panels_are_told_apart() -> None:
    """Of 64 columns two of three threads have 22, in each of two panels: no evenly spaced places of a line."""
    line, p, i = Buffer("line", (128,), F4), Axis("p", 2), Axis("i", 64)
    place = of(p) * 64 + of(i)
    makes = Kernel("k", (p, i), (), [Store(line, (place,), load(line, (place,)))], i)
    for threads in (2, 3, 5):
        verify_plan(planned([makes]), [], threads)
    q, j = Axis("q", 2), Axis("j", 64)
    reads = Kernel(
        "m", (q, j), (), [Store(Buffer("o", (128,), F4), (of(q) * 64 + of(j),), load(line, (of(q) * -64 + of(j) + 64,)))], j
    )
    verify_plan(planned([makes, reads]), [], 3)  # the other panel, but the same columns
    other = Kernel(
        "m", (q, j), (), [Store(Buffer("o", (128,), F4), (of(q) * 64 + of(j),), load(line, (of(q) * 64 + of(j) * -1 + 63,)))], j
    )
    with pytest.raises(GraphError, match="does not wait"):
        verify_plan(planned([makes, other]), [], 3)


def test_private_copies_are_for_their_units_alone() -> None:
    area = Buffer("area", (2, 48), F4)
    own = Buffer("own", (12, 4), F4, part_of=(area, 0))
    unit = Axis("unit", 2)
    i, j = Axis("i", 12), Axis("j", 4)
    makes = Kernel("k", (i, j), (), [Store(own, (of(i), of(j)), ONE)], unit)
    verify_plan(planned([makes, kernel("m", B, reading(own))]), [], 2)
    with pytest.raises(GraphError, match="touches own where another one does"):
        verify_plan(planned([makes, kernel("m", B, reading(own), None)]), [], 2)


def test_what_is_added_to_is_read() -> None:
    i, j = Axis("i", 12), Axis("j", 4)
    adds = Kernel("k", (i, j), (), [Store(W, (of(i), of(j)), ONE, "add")], i)
    verify_plan(planned([adds]), [W], 2)
    with pytest.raises(GraphError, match="reads w, whose old value m has written over"):
        verify_plan(planned([kernel("m", W, one)], [adds]), [W], 2)
    v = Buffer("v", (4,), F4)
    adds = Kernel("k", (i, j), (), [Store(v, (of(j),), load(v, (of(j),)), "add")], None, 1)
    with pytest.raises(GraphError, match="reads what it is adding to"):
        verify_plan(planned([adds]), [], 2)


def test_late_copies_are_read_before_they_are_made_anew() -> None:
    writes, copy, reads = kernel("m", W, one), kernel("k", A, reading(W)), kernel("n", B, reading(A))
    copy.late = True
    verify_plan(planned([reads], [writes], [copy], late=[copy]), [W], 2)
    with pytest.raises(GraphError, match="reads a, whose old value k has written over"):
        verify_plan(planned([writes], [copy], [reads], late=[copy]), [W], 2)
    second = kernel("n", B, turned(A))
    second.late = True
    made = planned(late=[copy, second])
    made.units.update({copy: 12, second: 12})
    with pytest.raises(GraphError, match="does not wait"):
        verify_plan(made, [W], 2)


def test_a_loop_does_not_write_state_of_what_it_stands_in() -> None:
    inside = [kernel("m", W, one), kernel("k", A, reading(W))]
    loop = Loop("l", Axis("time", 5), False, list(inside), [])
    with pytest.raises(GraphError, match="writes to state of what it stands in"):
        verify_plan(planned([loop], inner={loop: inside}), [W], 2)


def test_state_is_written_when_all_indices_are_known_to_be_right() -> None:
    place = Value("checked", np.dtype(np.int64), (constant(3, np.dtype(np.int64)),))
    checks = kernel("k", A, lambda i, j: load(B, (place, of(j))), None)
    writes = kernel("m", W, one)
    verify_plan(planned([checks], [writes]), [W], 2)
    with pytest.raises(GraphError, match=r"kernel m, .* writes state before all indices are known to be right"):
        verify_plan(planned([checks, writes]), [W], 2)


# ---- from one step to the next -----------------------------------------------------------------------------------------------


def following(*phases: Sequence[Item], twice: Sequence[Buffer] = (), late: Sequence[Kernel] = ()) -> Plan:
    """Steps between which no thread waits for others."""
    return replace(planned(*phases, late=late), waits=False, twice={b: replace(b) for b in twice})


def test_the_next_step_makes_what_the_last_phase_still_reads() -> None:
    """By one thread for all: then there have to be two of it; and each for itself: then there need not."""
    middle, reads = kernel("n", Buffer("c", (12, 4), F4), one), kernel("m", B, reading(A))
    verify_plan(following([kernel("k", A, one, None)], [middle], [reads], twice=[A]), [], 2)
    with pytest.raises(GraphError, match="touches a where another one does in k, and does not wait"):
        verify_plan(following([kernel("k", A, one, None)], [middle], [reads]), [], 2)
    verify_plan(planned([kernel("k", A, one, None)], [middle], [reads]), [], 2)
    verify_plan(following([kernel("k", A, one)], [middle], [reads]), [], 2)


def test_threads_meet_once_in_a_step_at_least() -> None:
    """Or one could be any number of steps ahead."""
    with pytest.raises(GraphError, match="is in the only phase: threads never meet"):
        verify_plan(following([kernel("k", A, one), kernel("m", B, reading(A))]), [], 2)


def test_the_next_step_reads_new_state() -> None:
    """All of it, where another thread still writes its part; there cannot be two of it."""
    reads, writes = kernel("k", A, turned(W)), kernel("m", W, one)
    verify_plan(planned([reads], [writes]), [W], 2)
    with pytest.raises(GraphError, match="touches w where another one does in k"):
        verify_plan(following([reads], [writes]), [W], 2)
    with pytest.raises(GraphError, match="reads w, in which a step finds what the one before the last has left"):
        verify_plan(following([reads], [writes], twice=[W]), [W], 2)


def test_threads_wait_where_indices_are_checked() -> None:
    """Or one would take a step that must not be taken."""
    place = Value("checked", np.dtype(np.int64), (constant(3, np.dtype(np.int64)),))
    looks = kernel("k", A, lambda i, j: load(Buffer("x", (12, 4), F4, "input"), (place, of(j))))
    verify_plan(planned([looks], [kernel("m", B, reading(A))]), [], 2)
    with pytest.raises(GraphError, match="checks an index, and nobody waits for it"):
        verify_plan(following([looks], [kernel("m", B, reading(A))]), [], 2)


def between(*phases: Sequence[Item]) -> list[str] | None:
    """What has to be there twice if threads do not meet after these; None: they have to."""
    items = [i for phase in phases for i in phase]
    level = {i: n for n, phase in enumerate(phases) for i in phase}
    inner = {i: list(i.items) for i in items if isinstance(i, Loop)}
    found = phases_._between_steps(items, level, {i: phases_._extent(i, inner, 2) for i in items}, 2)
    return None if found is None else [b.name for b in found]


def test_when_threads_need_not_meet_at_the_end_of_a_step() -> None:
    middle = kernel("n", Buffer("c", (12, 4), F4), one)
    reads = kernel("m", B, reading(A))
    assert between([kernel("k", A, one)], [middle], [reads]) == []
    assert between([kernel("k", A, one, None)], [middle], [reads]) == ["a"]
    assert between([kernel("k", A, one)]) is None  # they would never meet
    assert between([kernel("k", A, turned(W))], [kernel("m", W, one)]) is None  # state
    late = kernel("k", A, one, None)
    late.late = True
    assert between([late], [middle], [reads]) is None
    large = Buffer("l", (12, phases_.MOST_TWICE // 48 + 1), F4)
    assert between([kernel("k", large, one, None)], [middle], [kernel("m", Buffer("o", large.shape, F4), reading(large))]) is None
    place = Value("checked", np.dtype(np.int64), (constant(3, np.dtype(np.int64)),))
    looks = kernel("x", A, lambda i, j: load(Buffer("x", (12, 4), F4, "input"), (place, of(j))))
    assert between([looks], [middle], [reads]) is None
    loop = Loop("l", Axis("time", 5), False, [reads], [], meets=True)
    assert between([kernel("k", A, one)], [middle], [loop]) is None
    loop.meets = False
    assert between([kernel("k", A, one)], [middle], [loop]) == []
    own = Buffer("own", (12, 4), F4, part_of=(Buffer("area", (2, 48), F4), 0))
    assert between([kernel("k", own, one, None)], [middle], [kernel("m", B, reading(own))]) is None


def test_what_stays_from_step_to_step_is_there_once() -> None:
    copy, writes, reads = kernel("k", A, reading(W), None), kernel("m", W, one), kernel("n", B, reading(A))
    copy.late = True
    first = kernel("f", Buffer("c", (12, 4), F4), one)
    with pytest.raises(GraphError, match="reads a, in which a step finds what the one before the last has left"):
        verify_plan(following([reads, first], [writes], [copy], twice=[A], late=[copy]), [W], 2)


# ---- the compiler's own plans ------------------------------------------------------------------------------------------------


@pytest.fixture
def compiled_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """Nothing has been compiled before, and nobody else gets what is compiled here."""
    monkeypatch.setenv("CHAINRULE_CACHE", str(tmp_path))
    monkeypatch.setattr(machines, "_machines", OrderedDict())
    return monkeypatch


def fit() -> None:
    net, generator = nn.Sequential(nn.Dense(16, "relu"), nn.Dense(3)), np.random.default_rng(0)
    x, y = generator.normal(size=(24, 6)).astype(F4), generator.integers(0, 3, 24)
    net.fit(x, y, loss="cross_entropy", epochs=1, batch_size=12, threads=2)


def fit_of_hidden_units(**options: Any) -> None:
    net, generator = nn.Sequential(nn.Dense(256, "tanh"), nn.Dense(1)), np.random.default_rng(0)
    x, y = generator.normal(size=(128, 20)).astype(F4), generator.normal(size=(128, 1)).astype(F4)
    net.fit(x, y, loss="mse", epochs=1, batch_size=64, **{"threads": 2, **options})


def step_of_a_network(compiled_anew: pytest.MonkeyPatch, fit: Callable[[], None] = fit) -> tuple[Plan, list[Buffer]]:
    """The plan with the most phases, and its state."""
    seen: list[tuple[Plan, list[Buffer]]] = []

    def watched(items: Sequence[Item], state: list[Buffer], *args: Any) -> Plan:
        seen.append((plan(items, state, *args), state))
        return seen[-1][0]

    compiled_anew.setattr(pipeline, "plan", watched)
    fit()
    return max(seen, key=lambda made: len(made[0].phases))


def test_one_meeting_less_is_found(compiled_anew: pytest.MonkeyPatch) -> None:
    """Any two neighbouring phases made one."""
    made, state = step_of_a_network(compiled_anew)
    verify_plan(made, state, 2)
    assert len(made.phases) > 1
    for n in range(len(made.phases) - 1):
        joined = [*made.phases[:n], [*made.phases[n], *made.phases[n + 1]], *made.phases[n + 2 :]]
        with pytest.raises(GraphError, match="does not wait"):
            verify_plan(replace(made, phases=joined), state, 2)


def test_state_that_is_written_too_early_is_found(compiled_anew: pytest.MonkeyPatch) -> None:
    made, state = step_of_a_network(compiled_anew)
    with pytest.raises(GraphError, match=r"reads .*, whose old value .* has written over"):
        verify_plan(replace(made, phases=made.phases[::-1]), state, 2)


def test_a_rule_that_is_too_lenient_is_found(compiled_anew: pytest.MonkeyPatch) -> None:
    compiled_anew.setattr(phases_, "local", lambda *_: True)
    with pytest.raises(GraphError, match="does not wait"):
        fit()


def test_threads_that_should_wait_between_steps_are_found(compiled_anew: pytest.MonkeyPatch) -> None:
    """Here each thread reads all weights, also those that another one writes at the end of a step."""
    made, state = step_of_a_network(compiled_anew)
    assert made.waits
    with pytest.raises(GraphError, match="does not wait"):
        verify_plan(replace(made, waits=False), state, 2)


def test_a_rule_between_steps_that_is_too_lenient_is_found(compiled_anew: pytest.MonkeyPatch) -> None:
    compiled_anew.setattr(phases_, "_between_steps", lambda *_: [])
    with pytest.raises(GraphError, match="does not wait"):
        fit()


def test_networks_that_are_cut_along_hidden_units_do_not_wait_between_steps(compiled_anew: pytest.MonkeyPatch) -> None:
    """The factors of Adam, which one thread computes for all, are there twice."""
    made, state = step_of_a_network(compiled_anew, fit_of_hidden_units)
    assert made.twice
    assert not made.waits
    verify_plan(made, state, 2)
    for buffer in made.twice:
        with pytest.raises(GraphError, match=f"touches {buffer.name} where another one does"):
            verify_plan(replace(made, twice={b: other for b, other in made.twice.items() if b is not buffer}), state, 2)


def test_the_entry_says_so_and_takes_turns(compiled_anew: pytest.MonkeyPatch) -> None:
    """One choice for each buffer that is there twice, and the other turn at the end; alone, and within a budget, none."""
    texts: list[tuple[Plan, str]] = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        code = compile_graph(*args, **kwargs)
        texts.append((code.plan, code.text.partition("define i32 @entry(")[2].partition("}")[0]))
        return code

    compiled_anew.setattr(pipeline, "compile_graph", watched)
    fit_of_hidden_units()
    plan, text = next((p, t) for p, t in texts if p.twice)
    assert text.count("select i1") >= len(plan.twice)
    assert text.count("xor i64") == 1
    assert "ret i32 2" in text
    texts.clear()
    fit_of_hidden_units(threads=1)
    fit_of_hidden_units(memory="100MB")
    assert texts
    for plan, text in texts:
        assert plan.waits
        assert "xor i64" not in text
        assert "ret i32 2" not in text
