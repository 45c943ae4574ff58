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
from chainrule.compiler import phases, pipeline
from chainrule.compiler.affine import Axis, of
from chainrule.compiler.kernels import Buffer, Item, Kernel, Loop, Store, Value, constant, load, reduce
from chainrule.compiler.phases import Plan, plan
from chainrule.compiler.races import verify_plan
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
    units: dict[Item, int | None] = {i: phases._extent(i, inner, 2) for i in everything}
    for loop in inner:
        units.update({i: phases._extent(i, inner, 2) for i in inner[loop]})
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
    """Cut for three: two units of eight and four rows, and three of four; two threads hold rows 0 to 8 or 0 to 4 of them."""
    x, y = Axis("x", 12), Axis("y", 12)
    short = Kernel("m", (y,), (), [Store(B, (of(y), of(Axis("z", 1))), load(A, (of(y), of(Axis("z", 1)))))], y)
    makes = Kernel("k", (x,), (), [Store(A, (of(x), of(Axis("z", 1))), ONE)], x)
    shares = planned([makes, short])
    shares.units[short] = 5  # five units of three rows: the second thread of two begins at row 6, and of the other at row 6 too
    verify_plan(shares, [], 2)
    with pytest.raises(GraphError, match="does not wait"):
        verify_plan(shares, [], 5)


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
    """One thread writes row t in turn t, and another reads all rows."""
    time, i = Axis("time", 12), Axis("i", 4)
    makes = Kernel("k", (i,), (), [Store(A, (of(time), of(i)), ONE)], i)
    n = Axis("n", 4)
    j = Axis("j", 4)
    reads = Kernel("m", (j,), (n,), [Store(B, (of(time), of(j)), reduce("sum", load(A, (of(time), of(n))), [n]))], j)
    for meets in (True, False):
        loop = Loop("l", time, False, [makes, reads], [], meets=meets)
        made = planned([loop], inner={loop: [makes, reads]})
        made.units[loop] = 4
        if meets:
            verify_plan(made, [], 2)
        else:
            with pytest.raises(GraphError, match="does not wait"):
                verify_plan(made, [], 2)


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


def step_of_a_network(compiled_anew: pytest.MonkeyPatch) -> tuple[Plan, list[Buffer]]:
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
    compiled_anew.setattr(phases, "local", lambda *_: True)
    with pytest.raises(GraphError, match="does not wait"):
        fit()
