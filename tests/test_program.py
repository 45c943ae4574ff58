"""Programs and their execution by the reference backend: what an entry reads and writes, what many steps return, and that whatever
stops them leaves a whole step behind."""

from __future__ import annotations

import dataclasses
import math
import signal
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import chainrule as cr
from chainrule.errors import ChainruleError, DataError, GraphError, TraceError
from chainrule.graph.node import OPS, Type
from chainrule.graph.verify import verify
from chainrule.ops.random import fold_in
from chainrule.program import Input, Program, ProgramBuilder, Variable, differentiate
from chainrule.run.backend import Session, Steps, backends
from chainrule.run.batches import epoch_order, split_rows, step_sizes

Array = np.ndarray
RATE = 0.1
X = np.random.default_rng(0).normal(size=(10, 3))
Y = X @ np.array([1.0, -2.0, 0.5]) + 0.25


def f8(*shape: int) -> Type:
    return Type(shape, np.dtype("f8"))


def program(rows: int) -> Program:
    """Least squares: weights and bias are parameters, their momentum is a slot, the number of rows seen a statistic."""
    state = [
        Variable("w", f8(3), "parameter"),
        Variable("b", f8(), "parameter"),
        Variable("m", f8(3), "slot"),
        Variable("seen", f8(), "statistic"),
    ]
    inputs = [Input("x", f8(rows, 3), 0), Input("y", f8(rows), 0), Input("rate", f8())]
    builder = ProgramBuilder(state, inputs, rows)

    def forward(state: Any, given: Any) -> Any:
        return {"prediction": given["x"] @ state["w"] + state["b"]}, {}

    def step(state: Any, given: Any) -> Any:
        def loss(p: Any) -> Any:
            error = given["x"] @ p["w"] + p["b"] - given["y"]
            return np.mean(error * error), {"error": error}

        value, extra, g = differentiate(loss, {"w": state["w"], "b": state["b"]})
        m = 0.5 * state["m"] + g["w"]
        new = {
            "w": state["w"] - given["rate"] * m,
            "b": state["b"] - given["rate"] * g["b"],
            "m": m,
            "seen": state["seen"] + rows,
        }
        return {"loss": value, "error": extra["error"]}, new

    builder.entry("forward", forward, ["x", "y", "rate"])
    builder.entry("step", step, ["x", "y", "rate"])
    return builder.build()


PROGRAMS = {n: program(n) for n in (4, 2, 1)}
START = {"w": np.array([0.1, 0.2, 0.3]), "b": np.zeros(()), "m": np.zeros(3), "seen": np.zeros(())}


def session() -> Session:
    return backends["reference"].session(PROGRAMS, START)


def by_hand(order: Array, sizes: list[int], rates: list[float]) -> tuple[dict[str, Array], list[float], Array]:
    """The same steps in plain NumPy."""
    w, b, m, seen = START["w"].copy(), 0.0, np.zeros(3), 0
    losses, errors, at = [], [], 0
    for size, rate in zip(sizes, rates, strict=True):
        x, y = X[order[at : at + size]], Y[order[at : at + size]]
        at += size
        error = x @ w + b - y
        losses.append(float(np.mean(error**2)))
        errors.append(error)
        gw, gb = 2 * x.T @ error / size, 2 * np.mean(error)
        m = 0.5 * m + gw
        w, b, seen = w - rate * m, b - rate * gb, seen + size
    return {"w": w, "b": np.array(b), "m": m, "seen": np.array(seen)}, losses, np.concatenate(errors)


def steps(order: Array, sizes: list[int], keep: tuple[str, ...] = ("loss", "error"), **more: Any) -> Steps:
    rates = RATE / np.arange(1.0, len(sizes) + 1)
    given: dict[str, Any] = {"entries": ["step"] * len(sizes), "data": {"x": X, "y": Y}, "numbers": {"rate": rates}}
    return Steps(order=order, sizes=sizes, keep=keep, **{**given, **more})


def assert_state(got: dict[str, Array], wanted: dict[str, Array]) -> None:
    assert set(got) == set(wanted)
    for name, value in wanted.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-12, err_msg=name)


# ---- entries -----------------------------------------------------------------------------------------------------------------


def test_an_entry_takes_only_what_it_reads() -> None:
    forward, step = (PROGRAMS[4].entries[name] for name in ("forward", "step"))
    assert (forward.reads, forward.inputs, forward.writes) == (("w", "b"), ("x",), ())
    assert (step.reads, step.inputs) == (("w", "b", "m", "seen"), ("x", "y", "rate"))
    assert (step.results, step.result_rows, step.writes) == (("loss", "error"), (None, 0), ("w", "b", "m", "seen"))
    for entry in PROGRAMS[4].entries.values():
        verify(entry.graph, normal=True)
    assert [v.kind for v in PROGRAMS[4].state.values()] == ["parameter", "parameter", "slot", "statistic"]


def test_old_state_is_read_before_any_is_written() -> None:
    builder = ProgramBuilder([Variable(n, f8(2), "slot") for n in "abc"], [], 1)
    builder.entry("turn", lambda s, i: ({"before": s["a"] * 1.0}, {"a": s["b"], "b": s["c"], "c": s["a"] + s["b"]}), [])
    state = {n: np.full(2, float(k)) for k, n in enumerate("abc", 1)}
    running = backends["reference"].session({1: builder.build()}, state)
    for _ in range(4):
        results = running.call(1, "turn", {})
        np.testing.assert_array_equal(results["before"], state["a"])
        state = {"a": state["b"], "b": state["c"], "c": state["a"] + state["b"]}
        assert_state(running.state(), state)


def test_writes_must_fit_the_state() -> None:
    builder = ProgramBuilder([Variable("a", f8(2), "parameter")], [Input("x", f8(2))], 1)
    for value in (lambda s: s["a"][:1], lambda s: s["a"].astype(np.float32), lambda s: np.sum(s["a"])):
        with pytest.raises(GraphError, match=r'writes .* to "a", which is float64\[2\]'):
            builder.entry("bad", lambda s, i, value=value: ({}, {"a": value(s)}), [])
    with pytest.raises(GraphError, match='"missing"'):
        builder.entry("bad", lambda s, i: ({}, {"missing": s["a"]}), [])
    with pytest.raises(TraceError, match=r"cr\.random"):
        builder.entry("bad", lambda s, i: ({}, {"a": s["a"] + np.random.normal(size=2)}), [])
    assert builder.entries == {}


def test_captured_arrays_belong_to_the_entry() -> None:
    table = np.array([[3.0, 1.0], [4.0, 1.0], [5.0, 9.0]])

    def function(state: Any, given: Any) -> Any:
        result = cr.lookup(table, given["i"]) * np.full(2, 2.0) + np.arange(2) * np.array([0.0, -0.0])
        return {"r": result, "sign": 1.0 / (given["one"] * np.array([0.0, -0.0]))}, {}

    builder = ProgramBuilder([], [Input("i", Type((2,), np.dtype("i8")), 0), Input("one", f8())], 2)
    builder.entry("look", function, ["i", "one"])
    built = builder.build()
    table[:] = 0.0  # what was recorded stays
    entry = built.entries["look"]
    assert entry.result_rows[0] == 0
    assert len(entry.captures) == 3  # the table, and twice zeros of both signs; one number, or 0, 1, 2, ... need no array
    got = backends["reference"].session({2: built}, {}).call(2, "look", {"i": np.array([2, 0]), "one": np.array(1.0)})
    np.testing.assert_array_equal(got["r"], [[10.0, 18.0], [6.0, 2.0]])
    np.testing.assert_array_equal(got["sign"], [np.inf, -np.inf])


def test_equal_programs_have_equal_keys() -> None:
    assert program(4).key == PROGRAMS[4].key
    assert program(4).key != PROGRAMS[2].key
    hash(PROGRAMS[4].key)

    def one(scale: float, kind: Any = "slot", rows: int | None = None) -> Any:
        builder = ProgramBuilder([Variable("a", f8(2), kind)], [Input("x", f8(2), rows)], 2)
        builder.entry("e", lambda s, i: ({"r": s["a"] * scale + i["x"]}, {}), ["x"])
        return builder.build().key

    keys = [one(1.0), one(2.0), one(1.0, "parameter"), one(1.0, rows=0), one(0.0), one(-0.0), one(float("nan"))]
    assert len(set(keys)) == len(keys)
    assert one(float("nan")) == keys[-1]


def test_a_program_can_be_read() -> None:
    text = PROGRAMS[2].text()
    state = ("parameter w float64[3]", "slot m", "statistic seen")
    for words in (*state, "input x float64[2, 3] rows on axis 0", "step: reads w, b, m, seen", "new w"):
        assert words in text


# ---- many steps --------------------------------------------------------------------------------------------------------------


def test_steps_with_a_short_last_batch() -> None:
    order = np.random.default_rng(1).permutation(10)
    sizes = step_sizes(10, 4)
    assert sizes == [4, 4, 2]
    running = session()
    taken = running.run(steps(order, sizes))
    wanted, losses, errors = by_hand(order, sizes, [RATE, RATE / 2, RATE / 3])
    assert_state(running.state(), wanted)
    assert (taken.steps, taken.interrupted) == (3, False)
    np.testing.assert_allclose(taken.results["loss"], losses, rtol=1e-12)  # one number a step
    np.testing.assert_allclose(taken.results["error"], errors, rtol=1e-12)  # one number a row, in the order of the rows


def test_steps_may_repeat_and_leave_out_rows_and_run_other_entries() -> None:
    order, sizes = np.array([3, 3, 9, 0, 5, 3, 7]), [4, 1, 2]
    running = session()
    taken = running.run(steps(order, sizes, ("prediction",), entries=["step", "forward", "forward"]))
    wanted, _, _ = by_hand(order[:4], [4], [RATE])
    assert_state(running.state(), wanted)
    np.testing.assert_allclose(taken.results["prediction"], X[[5, 3, 7]] @ wanted["w"] + wanted["b"], rtol=1e-12)


def test_one_run_is_the_same_as_several() -> None:
    order, sizes = np.arange(10), [4, 4, 2]
    whole, parts = session(), session()
    whole.run(steps(order, sizes))
    rates, at = RATE / np.arange(1.0, 4.0), 0
    for i, size in enumerate(sizes):
        parts.run(steps(order[at : at + size], [size], numbers={"rate": rates[i : i + 1]}))
        at += size
    for name, value in whole.state().items():
        np.testing.assert_array_equal(parts.state()[name], value)


def test_no_steps() -> None:
    running = session()
    taken = running.run(steps(np.zeros(0, int), []))
    assert (taken.steps, taken.interrupted, {k: v.size for k, v in taken.results.items()}) == (0, False, {"loss": 0, "error": 0})
    assert_state(running.state(), START)


def test_results_with_rows_on_another_axis_and_with_rows_mixed() -> None:
    def built(rows: int) -> Program:
        builder = ProgramBuilder([], [Input("x", f8(rows, 3), 0)], rows)
        function = lambda s, i: ({"t": i["x"].T, "all": np.sum(i["x"]), "last": np.sum(np.cumsum(i["x"], 0)[-1])}, {})
        builder.entry("e", function, ["x"])
        return builder.build()

    running = backends["reference"].session({n: built(n) for n in (4, 2)}, {})
    everything = Steps(["e"] * 3, {"x": X}, np.arange(10), [4, 4, 2], {}, ("t", "all", "last"))
    results = running.run(everything).results
    np.testing.assert_array_equal(results["t"], X.T)
    for name in ("all", "last"):  # one a step
        np.testing.assert_allclose(results[name], [np.sum(X[:4]), np.sum(X[4:8]), np.sum(X[8:])], rtol=1e-12)


def test_data_is_cast_while_it_is_gathered() -> None:
    def built(kind: str) -> Session:
        builder = ProgramBuilder([], [Input("x", Type((2,), np.dtype(kind)), 0), Input("c", Type((), np.dtype("f4")))], 2)
        builder.entry("e", lambda s, i: ({"x": i["x"], "c": i["c"]}, {}), ["x", "c"])
        return backends["reference"].session({2: builder.build()}, {})

    def run(kind: str, data: Any) -> Array:
        results = (
            built(kind)
            .run(Steps(["e"], {"x": np.asarray(data)}, np.array([1, 0]), [2], {"c": np.array([0.1])}, ("x", "c")))
            .results
        )
        assert results["c"].dtype == np.float32
        assert results["x"].dtype == np.dtype(kind)
        return results["x"]

    np.testing.assert_array_equal(run("f4", np.array([0.1, 0.2])), np.float32([0.2, 0.1]))
    np.testing.assert_array_equal(run("f4", [1, 2]), [2, 1])
    np.testing.assert_array_equal(run("f8", np.array([True, False])), [0, 1])
    np.testing.assert_array_equal(run("i4", np.array([7.0, 8.0])), [8, 7])
    np.testing.assert_array_equal(run("i4", np.array([7, 8])), [8, 7])
    for bad in ([0.5, 1.0], [np.nan, 1.0], [np.inf, 0.0], [2**40, 0], [3e9, 0.0]):  # indices are never bent into range
        with pytest.raises(DataError, match='"x"'):
            run("i4", bad)
    with pytest.raises(DataError, match='"x"'):
        built("u1").call(2, "e", {"x": np.array([-1, 0]), "c": np.array(0.1)})


def test_results_and_state_belong_to_the_caller() -> None:
    builder = ProgramBuilder([Variable("a", f8(2), "slot"), Variable("z", f8(2), "slot")], [Input("x", f8(2))], 1)
    builder.entry("e", lambda s, i: ({"a": s["a"], "view": s["a"][::-1], "x": i["x"]}, {"z": i["x"]}), ["x"])
    start, given = {"a": np.ones(2), "z": np.zeros(2)}, np.full(2, 5.0)
    running = backends["reference"].session({1: builder.build()}, start)
    start["a"][:] = 7.0
    results = running.call(1, "e", {"x": given})
    given[:] = 8.0
    for value in results.values():
        value += 100.0
    running.state()["a"][:] = 9.0
    assert_state(running.state(), {"a": np.ones(2), "z": np.full(2, 5.0)})


def test_random_numbers_of_an_entry_start_from_its_key() -> None:
    u4 = np.dtype(np.uint32)

    def built(rows: int) -> Program:
        inputs = [Input("x", f8(rows, 6), 0), Input("seed", Type((2,), u4)), Input("step", Type((), u4))]
        builder = ProgramBuilder([Variable("w", f8(6), "parameter")], inputs, rows)

        def step(state: Any, given: Any) -> Any:
            def loss(w: Any) -> Any:
                mask = cr.random.bernoulli(given["x"].shape, 0.5)
                return np.sum(np.where(mask, given["x"] * w, 0.0)), {"mask": mask}

            _, extra, g = differentiate(loss, state["w"])
            return {"mask": extra["mask"], "gradient": g}, {}

        builder.entry("step", step, ["x", "seed", "step"], key=lambda given: fold_in(given["seed"], given["step"]))
        return builder.build()

    running = backends["reference"].session({4: built(4), 2: built(2)}, {"w": np.ones(6)})
    seed = np.array([1, 2], u4)

    def call(rows: int, step: int) -> dict[str, Array]:
        return running.call(rows, "step", {"x": np.ones((rows, 6)), "seed": seed, "step": np.array(step, u4)})

    first = call(4, 0)
    np.testing.assert_array_equal(first["gradient"], first["mask"].sum(0))  # the backward pass sees the same numbers
    np.testing.assert_array_equal(call(4, 0)["mask"], first["mask"])
    assert not np.array_equal(call(4, 1)["mask"], first["mask"])
    np.testing.assert_array_equal(call(2, 0)["mask"], first["mask"][:2])  # a row draws the same in a short batch


def test_two_backends_are_one_registry() -> None:
    assert "reference" in backends
    with pytest.raises(ChainruleError, match="reference"):
        backends["refrence"]


# ---- stopping ----------------------------------------------------------------------------------------------------------------

ORDER, SIZES = np.concatenate([np.arange(10)] * 2), [4, 4, 2] * 2


def after(count: int) -> dict[str, Array]:
    rates = list(RATE / np.arange(1.0, count + 1))
    return by_hand(ORDER, SIZES[:count], rates)[0] if count else START


def test_pulse_hears_of_steps_and_stops_them() -> None:
    for stop in (1, 3, 5):
        running = session()
        heard: list[int] = []

        def pulse(done: int, stop: int = stop, heard: list[int] = heard) -> bool:
            heard.append(done)
            return done < stop

        taken = running.run(steps(ORDER, SIZES), pulse)
        assert heard == sorted(set(heard))
        assert heard[-1] == taken.steps >= stop
        assert not taken.interrupted
        assert_state(running.state(), after(taken.steps))
        assert len(taken.results["loss"]) == taken.steps
        assert len(taken.results["error"]) == sum(SIZES[: taken.steps])


def _raise(error: BaseException) -> Any:
    raise error


def test_ctrl_c_while_python_reports_leaves_a_whole_step() -> None:
    for stop in (1, 4):
        running = session()
        taken = running.run(steps(ORDER, SIZES), lambda done, stop=stop: done < stop or _raise(KeyboardInterrupt()))
        assert (taken.steps, taken.interrupted) == (stop, True)
        assert_state(running.state(), after(stop))
        assert len(taken.results["loss"]) == stop


@pytest.mark.parametrize("moment", range(0, 120, 7))
def test_ctrl_c_inside_a_step_leaves_a_whole_step(moment: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interrupt comes at the `moment`-th operation: whatever was computed of that step is dropped."""
    left = [math.inf]

    def counted(value: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                left[0] = math.inf
                raise KeyboardInterrupt
            return value(*args, **kwargs)

        return run

    for name, op in list(OPS.items()):
        monkeypatch.setitem(OPS._things, name, dataclasses.replace(op, value=counted(op.value)))
    running = backends["reference"].session({n: program(n) for n in (4, 2)}, START)
    left[0] = moment  # only now: recording computes with numbers as well
    taken = running.run(steps(ORDER, SIZES))
    left[0] = math.inf
    assert taken.interrupted == (taken.steps < len(SIZES))
    assert_state(running.state(), after(taken.steps))
    assert len(taken.results["loss"]) == taken.steps
    rates = (RATE / np.arange(1.0, len(SIZES) + 1))[taken.steps :]
    rest = running.run(steps(ORDER[sum(SIZES[: taken.steps]) :], SIZES[taken.steps :], numbers={"rate": rates}))
    assert rest.steps == len(SIZES) - taken.steps  # and the run goes on from there
    assert_state(running.state(), after(len(SIZES)))


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals reach the main thread only")
def test_a_real_signal_between_any_two_instructions() -> None:
    """A timer interrupts a long run somewhere; the state is that of the steps which the run says it took."""
    many = 3000
    sizes, order = [2] * many, np.arange(2 * many) % 10
    kept = signal.signal(signal.SIGALRM, lambda *_: _raise(KeyboardInterrupt()))
    try:
        for delay in (0.013, 0.0171, 0.0233):
            running = session()
            signal.setitimer(signal.ITIMER_REAL, delay)
            taken = running.run(steps(order, sizes, numbers={"rate": np.full(many, 1e-3)}))
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert taken.interrupted
            assert 0 < taken.steps < many
            assert float(running.state()["seen"]) == 2 * taken.steps
            assert_state(running.state(), by_hand(order, sizes[: taken.steps], [1e-3] * taken.steps)[0])
            assert len(taken.results["loss"]) == taken.steps
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, kept)


def test_an_error_of_the_pulse_is_the_callers_and_leaves_a_whole_step() -> None:
    running = session()
    with pytest.raises(ZeroDivisionError):
        running.run(steps(ORDER, SIZES), lambda done: done < 2 or _raise(ZeroDivisionError()))
    assert_state(running.state(), after(2))


# ---- which rows --------------------------------------------------------------------------------------------------------------


def test_batches_are_a_pure_function_of_seed_and_epoch() -> None:
    orders = [epoch_order(50, shuffle=True, seed=s, epoch=e) for s, e in ((1, 0), (1, 1), (2, 0))]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(50))
    assert len({o.tobytes() for o in orders}) == 3
    np.testing.assert_array_equal(epoch_order(50, shuffle=True, seed=1, epoch=0), orders[0])
    np.testing.assert_array_equal(epoch_order(5, shuffle=False, seed=1, epoch=3), np.arange(5))
    assert [step_sizes(*args) for args in ((10, 5), (10, 4), (3, 8), (0, 4))] == [[5, 5], [4, 4, 2], [3], []]


@pytest.mark.parametrize(
    ("rows", "fraction", "held"), [(10, 0.2, 2), (10, 0.01, 1), (10, 0.99, 9), (2, 0.5, 1), (1000, 0.125, 125)]
)
def test_validation_rows_are_random_or_the_last(rows: int, fraction: float, held: int) -> None:
    for shuffle in (True, False):
        train, validation = split_rows(rows, fraction, shuffle=shuffle, seed=3)
        assert len(validation) == held
        np.testing.assert_array_equal(np.sort(np.concatenate([train, validation])), np.arange(rows))
        again = split_rows(rows, fraction, shuffle=shuffle, seed=3)
        np.testing.assert_array_equal(again[1], validation)
    np.testing.assert_array_equal(validation, np.arange(rows - held, rows))
