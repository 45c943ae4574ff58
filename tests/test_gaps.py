"""Gaps between the parts of arrays that threads have each for itself: which arrays have them, and that nobody sees them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from native import Array, Threaded, registered
from same import assert_same, state

import chainrule as cr
from chainrule import nn
from chainrule.compiler.affine import Affine, Axis, of
from chainrule.compiler.gaps import parts_of
from chainrule.compiler.kernels import Buffer, Index, Item, Kernel, Loop, Store, constant, load
from chainrule.compiler.memory import arena
from chainrule.compiler.phases import plan
from chainrule.compiler.races import verify_plan
from chainrule.compiler.schedule import APART, MOST_APART, Parts
from chainrule.errors import GraphError
from chainrule.run.backend import backends
from chainrule.run.crew import Crew, Way
from chainrule.run.pieces import Pieces, pieces, starts_for

F4 = np.dtype("f4")
NAMES = iter(f"x{n}" for n in range(10**6))


def names(prefix: str) -> str:
    return next(NAMES)


# ---- which arrays ------------------------------------------------------------------------------------------------------------

W = Buffer("w", (12, 4), F4, "state")


def writing(into: Buffer, unit: int | None = 0, place: Callable[[Axis, Axis], Index] = lambda i, j: (of(i), of(j))) -> Kernel:
    """into[i, j] = 1, cut along one of the axes, with an index of its own."""
    i, j = axes = tuple(Axis(f"{into}{n}", extent) for n, extent in zip("ij", into.shape, strict=True))
    return Kernel("k", axes, (), [Store(into, place(i, j), constant(1, F4))], None if unit is None else axes[unit])


def reading(buffer: Buffer, index: Callable[[Axis, Axis], Index], unit: int = 0) -> Kernel:
    """Another array of what stands somewhere in this one."""
    into = Buffer("r", (12, 4), F4)
    i, j = axes = Axis("ri", 12), Axis("rj", 4)
    return Kernel("r", axes, (), [Store(into, (of(i), of(j)), load(buffer, index(i, j)))], axes[unit])


def parts(*items: Item, threads: int = 2, among: Buffer = W) -> Parts | None:
    planned = plan(list(items), [W], names, threads)
    return parts_of(planned).get(among)


def test_an_array_that_each_thread_has_a_part_of() -> None:
    assert parts(writing(W)) == (2, 6 * 4 * 4)
    assert parts(writing(W), reading(W, lambda i, j: (of(i), of(j)))) == (2, 6 * 4 * 4)
    assert parts(writing(W), threads=3) == (3, 4 * 4 * 4)
    assert parts(writing(W), threads=5) == (4, 3 * 4 * 4), "as many units as there are"
    assert parts(writing(Buffer("t", (12, 4), F4)), threads=1) is None


@pytest.mark.parametrize(
    "kernel",
    [
        writing(W, unit=1),
        writing(W, unit=None),
        writing(W, place=lambda i, j: (of(i) * -1 + 11, of(j))),
        reading(W, lambda i, j: (of(i) * -1 + 11, of(j))),
        reading(W, lambda i, j: (of(j), Affine())),
        reading(W, lambda i, j: (of(i), of(j)), unit=1),
    ],
    ids=["along its columns", "by one thread", "from the end", "another's is read", "by all threads", "read along columns"],
)
def test_an_array_whose_parts_others_touch_has_no_gaps(kernel: Kernel) -> None:
    items = [kernel] if kernel.stores[0].buffer is W else [kernel, writing(W)]
    assert parts(*items) is None


def test_arrays_without_gaps() -> None:
    small, large = (Buffer("w", (MOST_APART // 4 + more, 1), F4, "state") for more in (0, 1))
    assert parts(writing(small), among=small) == (2, MOST_APART // 2)
    assert parts(writing(large), among=large) is None
    for space in ("input", "result"):
        given_ = Buffer("g", (12, 4), F4, space)
        assert parts(writing(given_), among=given_) is None
    read = Buffer("w", (12, 4), F4, "state")
    assert parts(reading(read, lambda i, j: (of(i), of(j))), among=read) is None, "nobody writes it"
    area = Buffer("a", (2, 100), F4)
    private = Buffer("p", (12, 4), F4, part_of=(area, 0))
    assert parts(writing(private), among=private) is None
    t = Buffer("t", (12, 4), F4)
    loop = Loop("l", Axis("s", 3), False, [writing(t)], [])
    assert parts(loop, among=t) is None
    assert parts(loop, writing(W)) is None


def test_the_verifier_finds_a_part_that_another_thread_touches() -> None:
    for kernel in (reading(W, lambda i, j: (of(i) * -1 + 11, of(j))), reading(W, lambda i, j: (of(j), Affine()))):
        planned = plan([kernel, writing(W)], [W], names, 2)
        verify_plan(planned, [W], 2)
        with pytest.raises(GraphError, match="touches w in the part of another thread"):
            verify_plan(replace(planned, parts={W: Parts(2, 96)}), [W], 2)
    planned = plan([writing(W)], [W], names, 2)
    verify_plan(replace(planned, parts={W: Parts(2, 96)}), [W], 2)
    with pytest.raises(GraphError, match="touches w in the part of another thread"):
        verify_plan(replace(planned, parts={W: Parts(2, 80)}), [W], 2)


def test_scratch_memory_has_room_for_gaps() -> None:
    t, u = Buffer("t", (12, 4), F4), Buffer("u", (12, 4), F4)
    planned = plan([writing(t), writing(u)], [], names, 3)
    plain, spread = arena(planned), arena(replace(planned, parts={t: Parts(3, 64)}))
    assert plain.sizes == {t: 192, u: 192}
    assert spread.sizes == {t: 192 + 3 * APART, u: 192}
    assert sorted(spread.offsets.values()) == [0, 192 + 3 * APART]


# ---- in memory ---------------------------------------------------------------------------------------------------------------


@st.composite
def states(draw: st.DrawFn) -> tuple[dict[str, Array], int, list[dict[str, tuple[int, ...]]]]:
    """Some arrays, the most threads, and ways in which the arrays lie one after the other."""
    r = np.random.default_rng(draw(st.integers(0, 99)))
    threads = draw(st.integers(1, 5))
    arrays = {
        f"a{n}": (r.normal(size=draw(st.sampled_from([1, 7, 40, 3000]))) * 100).astype(draw(st.sampled_from(["f4", "f8", "i4"])))
        for n in range(draw(st.integers(0, 4)))
    }
    ways = []
    for _ in range(draw(st.integers(1, 4))):
        count = draw(st.integers(1, threads))
        ways.append(
            {
                name: tuple(min(t * draw(st.sampled_from([0, 1, 3, 1500])), a.size) * a.itemsize for t in range(count))
                for name, a in arrays.items()
                if draw(st.booleans())
            }
        )
    return arrays, threads, [{k: tuple(sorted(v)) for k, v in way.items()} for way in ways]


@given(states())
def test_arrays_lie_in_parts_and_come_together_again(
    made: tuple[dict[str, Array], int, list[dict[str, tuple[int, ...]]]],
) -> None:
    arrays, threads, ways = made
    held = Pieces(arrays, threads, backends["native"].driver().keep)
    for starts in ways:
        held.part(starts)
        for name, array in arrays.items():
            raw = np.ascontiguousarray(array).view(np.uint8)
            for start, place, size in held.pieces(name):
                lies = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(held.places[name] + place))
                np.testing.assert_array_equal(lies, raw[start : start + size])
            assert sum(p.size for p in held.pieces(name)) == array.nbytes
    for name, array in held.join().items():
        np.testing.assert_array_equal(array, arrays[name])
    assert held.starts == {}


def test_there_is_room_for_as_many_threads_as_a_session_may_take() -> None:
    held = Pieces({"a": np.arange(100.0)}, 2, backends["native"].driver().keep)
    held.part({"a": (0, 80)})
    with pytest.raises(AssertionError, match="no room for parts of 2 threads"):
        held.part({"a": (0, 80, 160)})
    np.testing.assert_array_equal(held.join()["a"], np.arange(100.0))
    assert pieces(100, (0, 0, 64, 64)) == [(0, APART, 64), (64, 64 + 3 * APART, 36)], "two threads have nothing to do"


def machine(**parts: tuple[int, int]) -> Any:
    return SimpleNamespace(parts={int(slot[1:]): Parts(*part) for slot, part in parts.items()})


def test_parts_are_what_all_code_of_a_run_wants() -> None:
    slots = {"a": 5, "b": 6, "c": 7}
    one, other = machine(s5=(2, 64), s6=(2, 32)), machine(s5=(2, 64), s6=(2, 48), s7=(2, 4))
    assert starts_for([one], 2, slots) == {"a": (0, 64), "b": (0, 32)}
    assert starts_for([one, other], 2, slots) == {"a": (0, 64)}
    assert starts_for([one, machine()], 2, slots) == {}
    assert starts_for([one], 1, slots) == {}
    assert starts_for([machine(s5=(4, 64))], 3, slots) == {"a": (0, 64, 128)}, "the last thread has two units"
    assert pieces(250, (0, 64, 128)) == [(0, 0, 64), (64, 64 + APART, 64), (128, 128 + 2 * APART, 122)]


# ---- networks ----------------------------------------------------------------------------------------------------------------


def two_layers() -> Any:
    return nn.Sequential(nn.Dense(64, "relu"), nn.Dense(3))


def deep() -> Any:
    return nn.Sequential(*(nn.Dense(32, "tanh") for _ in range(4)), nn.Dense(3))


def with_norm() -> Any:
    return nn.Sequential(nn.Dense(96, "tanh"), nn.BatchNorm(), nn.Dense(64, "relu"), nn.Dense(3))


SHAPES = {"two layers": two_layers, "deep": deep, "with norm": with_norm}


def rows() -> tuple[Array, Array]:
    r = np.random.default_rng(1)
    return r.normal(size=(77, 12)).astype("f4"), r.normal(size=(77, 3)).astype("f4")


def fitted(make: Callable[[], Any], backend: Any, fits: int = 2, **options: Any) -> tuple[Any, dict[str, Array]]:
    net, (x, t) = make(), rows()
    with registered(backend) as name:
        for _ in range(fits):
            run = net.fit(x, t, epochs=3, batch_size=16, optimizer=cr.Adam(0.01), backend=name, **options)
    return net, {**state(net), "loss": np.array(run.loss)}


@pytest.mark.parametrize("kind", list(SHAPES))
def test_networks_whose_arrays_have_gaps_train_to_the_same_bits(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    laid: list[Any] = []
    part = Pieces.part
    monkeypatch.setattr(Pieces, "part", lambda self, starts: laid.append(starts) or part(self, starts))
    _, plain = fitted(SHAPES[kind], Threaded(1))
    assert not any(laid)
    for threads in (2, 3):
        laid.clear()
        backend = Threaded(threads)
        _, got = fitted(SHAPES[kind], backend)
        assert_same(got, plain)
        found = {n for s in backend.sessions for m in s._known.values() for n, slot in s._slots.items() if slot in m.parts}
        assert sum(n.startswith("slot/") for n in found) >= 4
        assert any(sum(n.startswith("slot/") for n in starts) >= 4 for starts in laid)


@pytest.mark.parametrize("kind", list(SHAPES))
def test_the_number_of_threads_may_change_in_the_middle(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays of the state, and copies of it that are made once, lie where the threads that run next look for them."""
    _, plain = fitted(SHAPES[kind], Threaded(1))
    turns: Iterator[int] = iter(())

    def way(crew: Crew, pace: Any, left: int) -> Way:
        return Way(3, next(turns, 2))

    monkeypatch.setattr(Crew, "way", way)
    monkeypatch.setattr(Crew, "steps", lambda *_: 1)
    for seed in range(3):
        turns = iter(np.random.default_rng(seed).integers(1, 4, 10**3).tolist())
        _, got = fitted(SHAPES[kind], Threaded(3))
        assert_same(got, plain)


def test_who_looks_at_the_state_sees_it_in_one_piece() -> None:
    """After each epoch, by callbacks, copies that are kept, and validation by code that wants other parts."""
    seen: dict[int, list[dict[str, Array]]] = {}
    for threads in (1, 2):
        mine = seen.setdefault(threads, [])
        net, (x, t) = two_layers(), rows()

        def look(progress: Any, net: Any = net, mine: list[dict[str, Array]] = mine) -> None:
            mine.append({name: value.copy() for name, value in net.parameters.items()})

        with registered(Threaded(threads)) as name:
            run = net.fit(x, t, epochs=4, batch_size=16, validation=0.3, callbacks=[look], backend=name)
        mine.append({**state(net), "loss": np.array(run.loss), "validation": np.array(run.validation_loss)})
    assert len(seen[1]) == len(seen[2]) == 5
    for one, other in zip(seen[1], seen[2], strict=True):
        assert_same(other, one)


def test_within_a_budget_arrays_have_no_gaps(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Gaps would be a part of the scratch memory."""
    made: list[dict[Buffer, Parts]] = []
    monkeypatch.setattr("chainrule.compiler.pipeline.parts_of", lambda *given: made.append(parts_of(*given)) or made[-1])
    monkeypatch.setenv("CHAINRULE_CACHE", str(tmp_path))
    monkeypatch.setattr("chainrule.run.machines._machines", {})
    net, (x, t) = two_layers(), rows()
    net.fit(x, t, epochs=1, threads=2, memory="1 MB")
    assert made == []
    net.fit(x, t, epochs=1, threads=2)
    assert any(made)


def test_without_gaps_bits_are_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    _, spread = fitted(deep, Threaded(2))
    monkeypatch.setattr("chainrule.compiler.pipeline.parts_of", lambda *_: {})
    monkeypatch.setenv("CHAINRULE_CACHE", str(tmp_path))
    monkeypatch.setattr("chainrule.run.machines._machines", {})
    backend = Threaded(2)
    _, plain = fitted(deep, backend)
    assert all(not m.parts for s in backend.sessions for m in s._known.values())
    assert_same(spread, plain)
