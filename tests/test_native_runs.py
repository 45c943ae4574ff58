"""Whole runs in native code: memory, the same bits on any number of threads, rounds of steps, interruptions, errors and the end."""

from __future__ import annotations

import ctypes
import gc
import itertools
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import native
import numpy as np
import pytest
from native import GUARD, POISONS, Array, Guards, Server, Threaded, backend_of, registered, untouched
from native_graphs import float_inputs
from native_networks import NETS, ROUNDS, dense_net, rounds_program, rows_for, trained, trained_on
from same import assert_same, state
from training import DROPPED

import chainrule as cr
from chainrule import nn
from chainrule.graph.trace import build, type_of
from chainrule.normalize import normalize
from chainrule.run import function, machines, pieces, rounds
from chainrule.run import native as native_run
from chainrule.run.backend import Steps, backends
from chainrule.run.crew import Crew

server = native.server  # a fixture


# ---- memory ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(NETS))
@pytest.mark.parametrize("threads", [1, 3])
def test_nothing_is_written_beside_arrays(kind: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = trained(kind, 64)
    guards = Guards()
    for module in (machines, pieces, rounds, function, native_run):
        monkeypatch.setattr(module, "aligned", guards)
    assert_same(trained_on(kind, 64, Threaded(threads)), plain)
    guards.check()
    assert len(guards.zones) > 4


@pytest.mark.parametrize("kind", list(NETS))
@pytest.mark.parametrize("threads", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_scratch_memory_between_buffers_stays_as_it_was(kind: str, threads: int) -> None:
    """All steps have the same rows, so one entry owns the memory; what it holds at first changes no bit."""
    x, t = rows_for(kind, 64)
    plain = trained(kind, 64)
    for poison in POISONS:
        backend = Threaded(threads, guard=GUARD, poison=poison)
        net = NETS[kind]()
        with registered(backend) as name:
            run = net.fit(x, t, epochs=2, batch_size=32, backend=name)
        assert_same({**state(net), "loss": np.array(run.loss)}, {k: v for k, v in plain.items() if k != "scores"})
        (session,) = backend.sessions
        (machine,) = session._known.values()
        assert session._arena.size == machine.code.arena.bytes
        untouched(session._arena, machine.code, poison)


def test_all_steps_of_a_session_work_in_the_same_memory() -> None:
    backend = Threaded(1)
    trained_on("dense", 77, backend, validation=0.3)
    assert max(len(session._known) for session in backend.sessions) > 2, "whole batches, a short one, and validation"
    for session in backend.sessions:
        assert session._arena.size == max(machine.code.arena.bytes for machine in session._known.values())
        for machine in session._known.values():
            ends = [start + machine.code.arena.sizes[buffer] for buffer, start in machine.code.arena.offsets.items()]
            assert machine.code.arena.bytes - max(ends) < 64


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


WORDS = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


class Heap(ctypes.Structure):
    """`struct mallinfo2` of the GNU C library."""

    _fields_ = [(name, ctypes.c_size_t) for name in WORDS]


LIBRARY = ctypes.CDLL(None)


def held() -> Array:
    """What this process holds: small objects of Python, bytes of the C library's heap, and bytes of memory, code included."""
    gc.collect()
    LIBRARY.mallinfo2.restype = Heap
    heap = LIBRARY.mallinfo2()
    return np.array([sys.getallocatedblocks(), heap.uordblks + heap.hblkhd, resident()])


LEAKS: dict[str, Callable[[], Any]] = {  # of 2 kB
    "none": lambda: None,
    "objects": lambda: [(n, n) for n in range(30)],
    "arrays": lambda: np.zeros(256),
}


def growth(fits: int) -> dict[str, Array]:
    """What is held more after so many fits, when the first are over; and after some fits that leak."""
    x, t = rows_for("dense", 40)
    kept: list[Any] = []

    def run(count: int, leak: str) -> None:
        for _ in range(count):
            net = nn.Sequential(nn.Dense(5, "tanh"), nn.Dropout(0.1), nn.Dense(3))
            net.fit(x, t, epochs=1, batch_size=16, backend="native")
            kept.append(LEAKS[leak]())

    run(60, "none")
    found = {}
    for leak in LEAKS:
        before, count = held(), fits if leak == "none" else 50
        run(count, leak)
        found[leak] = (held() - before) / count
    return found


@pytest.mark.skipif(not hasattr(LIBRARY, "mallinfo2"), reason="asks the GNU C library, and /proc")
@pytest.mark.parametrize("fits", [100, pytest.param(10_000, marks=pytest.mark.slow)])
def test_memory_does_not_grow(fits: int) -> None:
    """In each fit by less than two objects and 500 bytes of the heap; and, which is less exact, not by pages."""
    server = Server(seconds=600)
    found = server(growth, fits)
    server.stop()
    objects, heap, pages = found["none"]
    assert objects < 2
    assert heap < 500
    assert pages * fits < 500_000 + 100 * fits
    assert found["objects"][0] > 10  # so such leaks would be seen
    assert found["arrays"][1] > 1500


# ---- the same bits -----------------------------------------------------------------------------------------------------------

THREADS = (2, 3, 5)


def check_threads(kind: str, rows: int, several: Sequence[int] = THREADS) -> None:
    plain = trained(kind, rows)
    for threads in several:
        assert_same(trained_on(kind, rows, Threaded(threads)), plain)


@pytest.mark.parametrize(("kind", "rest"), [("dense", 17), ("tokens", 1)])
def test_any_number_of_threads_gives_the_same_bits(kind: str, rest: int) -> None:
    check_threads(kind, 96 + rest, THREADS[1:] if kind == "tokens" else THREADS[1:2])


BATCH = 24
SHARED_OUT: dict[
    str, tuple[Callable[[], nn.Module], tuple[int, ...]]
] = {  # what threads share out differs: the network, and a row
    "panels": (lambda: nn.Sequential(nn.Dense(96, "relu"), nn.Dense(3)), (10,)),
    "tall": (lambda: nn.Sequential(nn.Dense(6, "tanh"), nn.Dense(3)), (400,)),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2D(4, 3, activation="relu"), nn.MaxPool2D(2), nn.Flatten(), nn.Dense(3)),
        (8, 8, 1),
    ),
    "lengths": (lambda: nn.Sequential(nn.GRU(4), nn.Dense(3)), (6, 2)),
    "normalised": (lambda: nn.Sequential(nn.Dense(9), nn.BatchNorm(), nn.Dropout(0.2), nn.Dense(3)), (5,)),
}


@pytest.mark.parametrize("kind", SHARED_OUT)
def test_threads_and_rests_of_batches(kind: str) -> None:
    make, shape = SHARED_OUT[kind]
    r = np.random.default_rng(0)
    for rest in (0, 2 if kind == "normalised" else 1, 7, BATCH - 1):  # batch norm refuses a batch of one row
        rows = 2 * BATCH + rest
        x, t = r.normal(size=(rows, *shape)).astype(np.float32), r.normal(size=(rows, 3)).astype(np.float32)
        options = {"lengths": r.integers(1, shape[0] + 1, rows)} if kind == "lengths" else {}
        found = []
        for threads in (1, *THREADS):
            net, backend = make(), Threaded(threads)
            with registered(backend) as name:
                run = net.fit(x, t, epochs=2, batch_size=BATCH, backend=name, **options)
            assert {key[-1] for session in backend.sessions for key in session._known} == {threads}
            found.append({**state(net), "loss": np.array(run.loss)})
        for other in found[1:]:
            assert_same(other, found[0])


RESTS = [(kind, rest) for kind in NETS for rest in (0, 1, 2, 3, 5, 7, 8, 15, 16, 31)]
RESTS.remove(("dense", 1))  # batch norm refuses a batch of one row


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "rest"), RESTS)
def test_any_number_of_threads_gives_the_same_bits_for_any_rest(kind: str, rest: int) -> None:
    check_threads(kind, 96 + rest)


def test_two_processes_give_the_same_bits(server: Server) -> None:
    for kind in NETS:
        assert_same(server(trained, kind, 101), trained(kind, 101))


def forked(kind: str, rows: int, threads: int) -> list[dict[str, Array]]:
    """What a network learns here, in a child made after that, and here again."""
    import pickle

    found = [trained_on(kind, rows, Threaded(threads))]
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with os.fdopen(writing, "wb") as file:
                pickle.dump(trained_on(kind, rows, Threaded(threads)), file)
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        found.append(pickle.load(file))
    os.waitpid(child, 0)
    return [*found, trained_on(kind, rows, Threaded(threads))]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("threads", [1, 3])
def test_a_forked_child_gives_the_same_bits(server: Server, threads: int) -> None:
    a, b, c = server(forked, "dense", 101, threads)
    assert_same(b, a)
    assert_same(c, a)


@pytest.mark.parametrize("threads", [1, 2])
def test_two_fits_at_once(threads: int) -> None:
    plain = {kind: trained(kind, 101, epochs=8) for kind in NETS}
    found: dict[str, Any] = {}
    with registered(Threaded(threads)) as name:

        def work(kind: str) -> None:
            found[kind] = trained(kind, 101, name, epochs=8)

        workers = [threading.Thread(target=work, args=(kind,)) for kind in NETS]
        for w in workers:
            w.start()
        for w in workers:
            w.join(60)
    for kind in NETS:
        assert_same(found[kind], plain[kind])


# ---- rounds ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("entries", "sizes", "rounds"), ROUNDS)
@pytest.mark.parametrize("slices", [(1,), (2, 5, 1), (1000,)])
def test_rounds_of_steps(
    entries: list[str], sizes: list[int], rounds: int, threads: int, slices: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Orders and numbers of all rounds, of one, and a single number; however the steps are cut, and again in the same session."""
    r = np.random.default_rng(0)
    programs = {n: rounds_program(n) for n in (4, 3)}
    x, each, count = r.normal(size=(50, 2)), len(entries), rounds * len(entries)
    order = r.integers(0, 50, (rounds, sum(sizes)))
    of = {n: {"a": r.normal(size=n), "b": r.normal(size=(n, 2))} for n in (1, each, count)}
    turn = itertools.cycle(slices)
    monkeypatch.setattr(Crew, "steps", lambda self, pace, way, left: min(next(turn), left))
    sessions = [b.session(programs, {"w": np.ones(2, "f4")}) for b in (Threaded(threads), backends["reference"])]
    for rows in (order, order[0], order):
        for a, b in itertools.product(of, of):
            numbers = {"a": of[a]["a"], "b": of[b]["b"], "unread": np.zeros(1)}
            steps = Steps(entries, {"x": x}, rows, sizes, numbers, ("loss", "y", "across"), rounds)
            native, plain = (s.run(steps) for s in sessions)
            assert native.steps == plain.steps == count
            for name, value in plain.results.items():
                np.testing.assert_allclose(native.results[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(sessions[0].state()["w"], sessions[1].state()["w"], rtol=1e-4)
    for stop in range(1, min(count, 9)):
        turn = itertools.repeat(1)
        native, plain = (s.run(steps, lambda done, stop=stop: done < stop) for s in sessions)
        assert native.steps == plain.steps == stop
        for name, value in plain.results.items():
            np.testing.assert_allclose(native.results[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


# ---- interruptions -----------------------------------------------------------------------------------------------------------


@DROPPED
@pytest.mark.parametrize("threads", [1, 2])
def test_ctrl_c_in_the_middle_of_an_epoch(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = 100_000
    x, t = float_inputs((rows, 16), "float32"), float_inputs((rows, 2), "float32", seed=2)
    make = lambda: nn.Sequential(nn.Dense(64, "tanh"), nn.Dense(2))
    options = {"batch_size": 1, "shuffle": False, "optimizer": cr.SGD(1e-4)}
    with registered(Threaded(threads)) as name:
        make().fit(x[:10], t[:10], epochs=1, backend=name, **options)  # compiled
        net, plain = make(), make()
        alarm = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
        took, begun = Crew.steps, list[float]()

        def steps(self: Crew, pace: Any, way: Any, left: int) -> int:
            if not begun:  # however long it took until the first step
                begun.append(time.perf_counter())
                alarm.start()
            return took(self, pace, way, left)

        monkeypatch.setattr(Crew, "steps", steps)
        try:
            run = net.fit(x, t, epochs=10_000, backend=name, **options)
        finally:
            alarm.cancel()
            alarm.join()
        assert time.perf_counter() - begun[0] < 5
        assert run.interrupted
        assert run.steps > 0
        whole, part = divmod(run.steps, rows)
        assert run.epochs == whole
        if whole:
            plain.fit(x, t, epochs=whole, backend=name, **options)
        if part:
            plain.fit(x[:part], t[:part], epochs=1, backend=name, **options)
        assert_same(state(net), state(plain))
        assert not net.fit(x[:10], t[:10], epochs=1, backend=name, **options).interrupted


@DROPPED
def test_ctrl_c_at_any_moment() -> None:
    x, t = rows_for("dense", 64)
    for delay in (0.0, 0.002, 0.01, 0.03, 0.06, 0.1, 0.2):
        net = dense_net()
        net.fit(x, t, epochs=1, batch_size=8, backend="native")
        before = state(net)
        alarm = threading.Timer(delay, lambda: os.kill(os.getpid(), signal.SIGINT))
        try:
            alarm.start()
            run = net.fit(
                x, t, epochs=10**5, batch_size=8, backend="native", callbacks=[lambda run: None] if delay > 0.05 else ()
            )
            assert run.interrupted
        except KeyboardInterrupt:
            assert_same(state(net), before)  # the programs were still being made
        finally:
            alarm.join()
        assert all(np.isfinite(v).all() for v in state(net).values())
        assert len(net.fit(x, t, epochs=1, batch_size=8, backend="native").loss) == 1


def test_an_exception_in_a_callback() -> None:
    x, t = rows_for("dense", 77)

    def fail(run: Any) -> None:
        if run.epochs == 2:
            raise RuntimeError("callback")

    net, plain = dense_net(), dense_net()
    with pytest.raises(RuntimeError, match="callback"):
        net.fit(x, t, epochs=5, backend="native", callbacks=[fail])
    plain.fit(x, t, epochs=2, backend="native")
    assert_same(state(net), state(plain))
    net.fit(x, t, epochs=1, backend="native")
    plain.fit(x, t, epochs=1, backend="native")
    assert_same(state(net), state(plain))


def test_divergence_is_found_as_by_the_reference() -> None:
    x, t = rows_for("dense", 64)
    texts = []
    for backend in ("reference", "native"):
        net = nn.Sequential(nn.Dense(4), nn.Dense(3))
        net.fit(x, t, epochs=1, backend=backend)
        before = state(net)
        with pytest.raises(cr.DivergenceError) as caught:
            net.fit(x, t, epochs=9, optimizer=cr.SGD(1e30), backend=backend)
        texts.append(str(caught.value))
        assert_same(state(net), before)
    assert texts[0] == texts[1]


def collected() -> None:
    """Code that only a cycle of references keeps."""
    for _ in range(20):
        f = backend_of().function(normalize(build(lambda x: [x * 2.0], [type_of(np.ones(3))])))
        machines._machines.clear()
        cycle: list[Any] = [f]
        cycle.append(cycle)
        del f, cycle
        gc.collect()


def test_code_in_a_cycle_of_references_is_freed(server: Server) -> None:
    server(collected)


def test_a_process_ends_in_silence() -> None:
    code = "import numpy as np, chainrule.run.native; from chainrule import nn; "
    code += "nn.Dense(2).fit(np.ones((4, 3)), np.ones((4, 2)), epochs=1, backend='native')"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout + ended.stderr == ""
