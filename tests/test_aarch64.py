"""Machine code for AArch64, run by an emulator: operators, random graphs, products, loops and elementary functions as on this processor,
the loop over steps on several threads, whole runs of training, indices out of range.

An emulator on x86-64 keeps that processor's order of memory accesses, which is stricter than AArch64's: what the barrier forgets would
not show here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import elementary_harness
import native_graphs
import native_networks
import numpy as np
import pytest
import test_compiler_graphs as graphs
import test_elementary as elementary
import test_native_random as random_tests
from emulation import MISSING, TARGET, Emulated, Emulator, compiled
from hypothesis import given, settings
from hypothesis import strategies as st
from native import Server, assert_bits, backend_of, pattern, registered
from same import assert_same

import chainrule as cr
from chainrule.compiler.elementary import FUNCTIONS
from chainrule.compiler.target import host
from chainrule.errors import DataError
from chainrule.graph.node import Type
from chainrule.program import Input, ProgramBuilder, Variable
from chainrule.run.backend import Steps, backends
from chainrule.run.threads import BARRIER_BYTES, barrier_ir, flush_ir

Array = np.ndarray
LEVEL = "aarch64"
pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),  # elementary.error goes to the ends of the range
    pytest.mark.skipif(host().family == "aarch64", reason="the other tests run on this processor itself"),
    pytest.mark.skipif(bool(MISSING), reason=f"no {' and no '.join(MISSING)}, see make test-aarch64"),
]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.stop()


# ---- the emulator itself -----------------------------------------------------------------------------------------------------


def test_a_write_beside_an_array_is_found() -> None:
    text = "define void @f(ptr %p) {\n %q = getelementptr i8, ptr %p, i64 8\n store i8 7, ptr %q\n ret void\n}"
    emulator = Emulator({"m": compiled(text)})
    emulator.call("m.f", emulator.place(np.zeros(1)))
    with pytest.raises(AssertionError, match=r"written beside arrays, 1 bytes: \['byte 8 of array 0'"):
        emulator.run()


def test_a_crash_is_a_failed_test() -> None:
    emulator = Emulator({"m": compiled("define void @f() {\n store i8 7, ptr inttoptr (i64 64 to ptr)\n ret void\n}")})
    emulator.call("m.f")
    with pytest.raises(AssertionError, match=r"the emulated program ended with -?\d+"):
        emulator.run()


def test_memory_is_copied_in_both_directions() -> None:
    """The emulated program's own memcpy, memmove and memset."""
    emulator = Emulator({})
    data = np.arange(40, dtype=np.uint8)
    want = data.copy()
    want[3:13], want[20:30], want[35:37] = data[:10], data[25:35], 9
    at = emulator.place(data)
    emulator.call("memmove", at + 3, at, 10)
    emulator.call("memmove", at + 20, at + 25, 10)
    emulator.call("memset", at + 35, 9, 2)
    emulator.run()
    np.testing.assert_array_equal(data, want)


# ---- graphs ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("narrow", [False, True], ids=["float64", "float32"])
def test_every_operator_and_composition_with_its_gradient(server: Server, narrow: bool) -> None:
    assert server(native_graphs.registry_faults, narrow, LEVEL) == []


def faults_on(processor: str) -> list[str]:
    """Operators in code that uses all that a processor has."""
    backend = Emulated(target=dataclasses.replace(TARGET, cpu=processor, features=""), processor="max")
    cases = native_graphs.registry_cases(True)
    graph, arrays = native_graphs.joined(cases)
    plain = backend_of(LEVEL).function(graph)(arrays)
    return [
        f"result {n}"
        for n, (a, b) in enumerate(zip(backend.function(graph)(arrays), plain, strict=True))
        if pattern(a) != pattern(b)
    ]


@pytest.mark.parametrize("processor", ["neoverse-v1", "apple-m1"])  # the first has scalable vectors
def test_newer_processors_give_the_same_bits(server: Server, processor: str) -> None:
    assert server(faults_on, processor) == []


def test_elementwise_forms_of_every_type_at_special_values(server: Server) -> None:
    assert server(native_graphs.form_faults, (None,), LEVEL) == []


def test_expressions_on_matrices(server: Server) -> None:
    assert server(native_graphs.matrix_faults, native_graphs.MATRICES[2:3], ("float32",), LEVEL) == []


def test_states_of_loops(server: Server) -> None:
    server(graphs.loop_faults, 3, 17, LEVEL)


@pytest.mark.parametrize("shape", [(64, 300, 136), (1, 65, 33), (7, 3, 1)])
def test_products(server: Server, shape: tuple[int, int, int]) -> None:
    server(graphs.product_faults, *shape, LEVEL)


@settings(max_examples=max(settings().max_examples // 3, 1))
@given(data=st.data())
def test_random_programs(server: Server, data: st.DataObject) -> None:
    server(random_tests.check, data.draw(random_tests.programs(*data.draw(random_tests.TYPES))), LEVEL)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(n,) for n in native_graphs.SIZES] + [(3, 17), (2, 3, 5), (1, 1, 1, 4), ()])
def test_elementwise_forms_of_every_type_and_size(server: Server, shape: tuple[int, ...]) -> None:
    assert server(native_graphs.form_faults, [shape], LEVEL) == []


@pytest.mark.slow
@pytest.mark.parametrize("shape", native_graphs.MATRICES + native_graphs.MORE_MATRICES)
def test_expressions_on_more_matrices(server: Server, shape: tuple[int, int]) -> None:
    assert server(native_graphs.matrix_faults, [shape], ("float32", "float64"), LEVEL) == []


@pytest.mark.slow
@pytest.mark.parametrize("shape", [*graphs.PRODUCTS, *graphs.MORE_PRODUCTS])
def test_large_products(server: Server, shape: tuple[int, int, int]) -> None:
    server(graphs.product_faults, *shape, LEVEL)


@pytest.mark.slow
@settings(max_examples=3 * settings().max_examples)
@given(data=st.data())
def test_more_random_programs_with_and_without_optimization(server: Server, data: st.DataObject) -> None:
    server(random_tests.check, data.draw(random_tests.programs(*data.draw(random_tests.TYPES))), LEVEL, True)


# ---- elementary functions ----------------------------------------------------------------------------------------------------

WIDTHS = (1, 4, 16)


def test_elementary_functions() -> None:
    """The same errors as on x86-64, the same bits at every width, and those of x86-64 with FMA."""
    names = [(name, bits) for name in FUNCTIONS for bits in (32, 64)]
    emulator = Emulator({f"{n}{b}.{w}": compiled(elementary_harness.text(n, b, w)) for n, b in names for w in WIDTHS})
    found: dict[Any, Array] = {}
    given = {}
    for name, bits in names:
        args = elementary.arguments("power" if name in elementary.ARITY else name, bits, 250)
        given[name, bits] = args
        padded = [np.resize(a, -(-len(a) // max(WIDTHS)) * max(WIDTHS)) for a in args]
        places = [emulator.place(a) for a in padded]
        for width in WIDTHS:
            found[name, bits, width] = np.zeros_like(padded[0])
            place = emulator.place(found[name, bits, width])
            emulator.call(f"{name}{bits}.{width}.f", *places, place, len(padded[0]))
    emulator.run()
    for name, bits in names:
        got, args = found[name, bits, 4][: len(given[name, bits][0])], given[name, bits]
        for width in WIDTHS:
            assert_bits([found[name, bits, width]], [found[name, bits, 4]], (name, bits, width))
        if "+fma" in host().features:
            assert_bits([got], [elementary_harness.compiled(name, bits, 4)(*args)], (name, bits, "x86-64"))
        if name in elementary.EXACT:
            worst, where = elementary.error(name, bits, got, args)
            assert worst <= elementary.BOUND[bits], (name, bits, where)
        else:
            with np.errstate(all="ignore"):
                np.testing.assert_array_equal(got, elementary.CHEAP[name](*args))


# ---- threads and the loop over steps -----------------------------------------------------------------------------------------

# Each thread writes the number of the round to its place and reads everybody's between two barriers; returns how often one was wrong.
ROUNDS = f"""target triple = "{TARGET.triple}"
{barrier_ir(TARGET.triple)}
define void @rounds(ptr %block) {{
entry:
  %state = load ptr, ptr %block, align 8
  %p1 = getelementptr i64, ptr %block, i64 1
  %places = load ptr, ptr %p1, align 8
  %p2 = getelementptr i64, ptr %block, i64 2
  %thread = load i64, ptr %p2, align 8
  %p3 = getelementptr i64, ptr %block, i64 3
  %threads = load i64, ptr %p3, align 8
  %p4 = getelementptr i64, ptr %block, i64 4
  %rounds = load i64, ptr %p4, align 8
  %wrong = getelementptr i64, ptr %block, i64 5
  %mine = getelementptr i64, ptr %places, i64 %thread
  br label %round
round:
  %i = phi i64 [ 0, %entry ], [ %i1, %met ]
  store i64 %i, ptr %mine, align 8
  call void @barrier(ptr %state, i64 %threads)
  br label %look
look:
  %k = phi i64 [ 0, %round ], [ %k1, %look ]
  %their = getelementptr i64, ptr %places, i64 %k
  %value = load i64, ptr %their, align 8
  %differs = icmp ne i64 %value, %i
  %more = zext i1 %differs to i64
  %sofar = load i64, ptr %wrong, align 8
  %now = add i64 %sofar, %more
  store i64 %now, ptr %wrong, align 8
  %k1 = add i64 %k, 1
  %others = icmp ult i64 %k1, %threads
  br i1 %others, label %look, label %met
met:
  call void @barrier(ptr %state, i64 %threads)
  %i1 = add i64 %i, 1
  %again = icmp ult i64 %i1, %rounds
  br i1 %again, label %round, label %out
out:
  ret void
}}
"""


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_meet_at_the_barrier(threads: int) -> None:
    emulator, rounds = Emulator({"m": compiled(ROUNDS)}), 300
    state, places = emulator.place(np.zeros(BARRIER_BYTES, np.uint8)), np.full(threads, -1)
    at = emulator.place(places)
    blocks = [np.array([state, at, t, threads, rounds, 0]) for t in range(threads)]
    words = [emulator.place(np.zeros(1, np.int64)) for _ in blocks]
    for block, word in zip(blocks, words, strict=True):
        stack = emulator.place(np.zeros(1 << 16, np.uint8)) + (1 << 16)
        emulator.call("spawn", emulator.address["m.rounds"], emulator.place(block), stack, word)
    for word in words:
        emulator.call("join", word)
    emulator.run()
    assert [int(b[5]) for b in blocks] == [0] * threads
    assert (places == rounds - 1).all()


def test_denormals_are_flushed_and_the_old_mode_comes_back() -> None:
    text = f"""{flush_ir(TARGET.triple)}
define internal void @half(ptr %p, i64 %k) noinline {{
  %x = load double, ptr %p, align 8
  %y = fmul double %x, 0.5
  %q = getelementptr double, ptr %p, i64 %k
  store double %y, ptr %q, align 8
  ret void
}}
define void @f(ptr %p) {{
  call void @half(ptr %p, i64 1)
  %old = call i64 @flush_on()
  call void @half(ptr %p, i64 2)
  call void @flush_restore(i64 %old)
  call void @half(ptr %p, i64 3)
  ret void
}}"""
    emulator, tiny = Emulator({"m": compiled(text)}), float(np.finfo(np.float64).tiny)
    numbers = np.array([tiny, 1.0, 1.0, 1.0])
    emulator.call("m.f", emulator.place(numbers))
    emulator.run()
    assert numbers.tolist() == [tiny, tiny / 2, 0.0, tiny / 2]


OPTIMIZERS = {
    "adam": lambda: cr.Adam(0.01),
    "momentum": lambda: cr.SGD(0.05, momentum=0.9, nesterov=True),
    "lion": lambda: cr.Lion(0.01),
}


def check_training(optimizer: str, dtype: str) -> None:
    """Losses and scores as NumPy has them; the last batch is short, and the data is of another type than the weights."""
    r = np.random.default_rng(1)
    x, t = r.normal(size=(45, 11)), r.integers(0, 3, 45)
    found = []
    with registered(Emulated()) as emulated:
        for name in (emulated, "reference"):
            net = cr.nn.Sequential(cr.nn.Dense(128, "tanh"), native_networks.dense_net())  # the first weight lies in panels
            run = net.fit(
                x, t, loss="cross_entropy", optimizer=OPTIMIZERS[optimizer](), epochs=3, batch_size=16, dtype=dtype, backend=name
            )
            found.append((run.loss, net.predict(x, backend=name)))
    (loss, scores), (their_loss, theirs) = found
    precise = 1e-11 if dtype == "float64" else 2e-5
    np.testing.assert_allclose(loss, their_loss, rtol=precise)
    np.testing.assert_allclose(scores, theirs, rtol=100 * precise, atol=10 * precise)


@pytest.mark.parametrize(("optimizer", "dtype"), [("adam", "float32"), ("momentum", "float64"), ("lion", "float64")])
def test_training(server: Server, optimizer: str, dtype: str) -> None:
    server(check_training, optimizer, dtype)


def check_training_by_threads(kind: str, several: Sequence[int]) -> None:
    theirs = native_networks.trained(kind, 101, "reference")
    plain = native_networks.trained_on(kind, 101, Emulated())
    for name in theirs:
        np.testing.assert_allclose(plain[name], theirs[name], rtol=1e-4, atol=1e-5, err_msg=name)
    for threads in several:
        assert_same(native_networks.trained_on(kind, 101, Emulated(threads=threads)), plain)


@pytest.mark.parametrize(("kind", "threads"), [("dense", 3), ("tokens", 2)])
def test_any_number_of_threads_gives_the_same_bits(server: Server, kind: str, threads: int) -> None:
    """With Adam, dropout, batch norm; and with an embedding and a loop."""
    server(check_training_by_threads, kind, (threads,))


def state_faults() -> None:
    n, rows = 17, 10
    for name, new in graphs.WRITES.items():
        program = graphs.state_program(new, n, rows)
        want = graphs.state_after(backends["reference"], program, n, rows)
        for backend in (Emulated(), Emulated(threads=2)):
            got = graphs.state_after(backend, program, n, rows)
            for k, value in want.items():
                np.testing.assert_allclose(got[k], value, rtol=2e-4, atol=2e-4, err_msg=f"{name}: {k}")


def test_new_state_made_of_other_old_state(server: Server) -> None:
    server(state_faults)


def check_rounds(threads: int) -> None:
    """Orders and numbers of all rounds and of one; the state that is kept after them, unless some of it is not finite."""
    entries, sizes, rounds = native_networks.ROUNDS[1]
    r = np.random.default_rng(0)
    x, order = r.normal(size=(50, 2)), r.integers(0, 50, (rounds, sum(sizes)))
    programs = {n: native_networks.rounds_program(n) for n in set(sizes)}
    sessions = [b.session(programs, {"w": np.ones(2, "f4")}) for b in (Emulated(threads=threads), backends["reference"])]
    for rows, count in ((order, rounds * len(entries)), (order[0], len(entries))):
        numbers = {"a": r.normal(size=count), "b": r.normal(size=(count, 2)), "unread": np.zeros(1)}
        steps = Steps(entries, {"x": x}, rows, sizes, numbers, ("loss", "y", "across"), rounds)
        ours, theirs = (s.run(steps) for s in sessions)
        assert ours.steps == theirs.steps == steps.count
        for name, value in theirs.results.items():
            np.testing.assert_allclose(ours.results[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    assert_same(sessions[0].keep().arrays(), sessions[0].state())
    np.testing.assert_allclose(sessions[0].state()["w"], sessions[1].state()["w"], rtol=1e-4)
    for value in (np.nan, -np.inf):
        sessions[0]._state.arrays["w"][1] = value
        assert sessions[0].keep() is None


@pytest.mark.parametrize("threads", [1, 3])
def test_rounds_of_steps(server: Server, threads: int) -> None:
    server(check_rounds, threads)


# ---- indices out of range ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [5, -6, 2**62, -(2**63)])
def test_an_index_out_of_range_of_a_function(bad: int) -> None:
    x, i = np.arange(10.0).reshape(5, 2), np.array([0, 4, -5, -1])
    graph, arrays = graphs.graph_of(lambda x, i: [np.take(x, i, axis=0)], [x, i])
    assert_bits(Emulated().function(graph)(arrays), [x[i]])
    with pytest.raises(DataError, match="an index lies outside"):
        Emulated().function(graph)([x, np.array([0, 4, bad, 1])])


@pytest.mark.parametrize("threads", [1, 2])
def test_an_index_out_of_range_ends_a_run_before_state_is_written(threads: int) -> None:
    rows, f4, i8 = 6, np.dtype(np.float32), np.dtype(np.int64)
    builder = ProgramBuilder([Variable("w", Type((5, 3), f4), "parameter")], [Input("i", Type((rows,), i8), 0)], rows)
    builder.entry("step", lambda s, x: ({"loss": np.sum(s["w"][x["i"]])}, {"w": s["w"] * 0.5 + 1.0}), ["i"])
    w = graphs.numbers(5, 3)
    session = Emulated(threads=threads).session({rows: builder.build()}, {"w": w})
    i = np.arange(4 * rows) % 5
    i[2 * rows + 1] = 5
    with pytest.raises(DataError, match=r"index 5 \(element 1 of the indices\) lies outside"):
        session.run(Steps(["step"] * 4, {"i": i}, np.arange(4 * rows), [rows] * 4, {}, ("loss",)))
    np.testing.assert_array_equal(session.state()["w"], (w * np.float32(0.5) + 1) * np.float32(0.5) + 1)
