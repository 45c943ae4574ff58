"""Random programs in native code: their values and gradients against NumPy's at each width of vectors, the same bits without
optimization, with guards, and whatever the scratch memory holds."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from native import GUARD, POISONS, SMALL, WIDTHS, Crash, Server, assert_as_precise, assert_bits, backend_of, call_between_guards
from test_random_graphs import NUMPY, Program, make_program
from tracing import trace_function

import chainrule as cr
from chainrule.graph.interpret import evaluate
from chainrule.graph.node import Graph
from chainrule.normalize import normalize

Array = np.ndarray
SEED = 11


def graph_of(program: Program) -> Graph:
    """All results of a program, and the gradients of its loss."""
    everything = tuple(range(len(program.shapes)))

    def f(*xs: Any) -> Any:
        return [*program.run(NUMPY, xs), *cr.grad(program.loss(NUMPY), everything)(*xs)]

    return normalize(trace_function(f, program.inputs())[0])


def wide(program: Program) -> Program:
    return dataclasses.replace(program, dtypes=("f8",) * len(program.dtypes))


def arguments(program: Program, graph: Graph) -> list[Array]:
    return [*program.inputs(SEED), *(np.asarray(c) for c in graph.captures)][: len(graph.inputs)]


def check(program: Program, width: str, thorough: bool = False, panels: tuple[int, ...] | None = None) -> None:
    """Over there: native against NumPy; between guards; whatever scratch memory holds; and without optimization."""
    graph = graph_of(program)
    arrays = arguments(program, graph)
    theirs = evaluate(graph, arrays)
    exact_graph = graph_of(wide(program))
    exact = evaluate(exact_graph, [*(a.astype(np.float64) for a in program.inputs(SEED)), *exact_graph.captures])
    got = backend_of(width, panels=panels).function(graph)(arrays)
    for n, (a, b, c) in enumerate(zip(got, theirs, exact, strict=True)):
        if np.asarray(a).dtype == np.float64:  # there is no wider arithmetic: against NumPy itself
            largest = max(1.0, float(np.max(np.abs(b), initial=0.0)))
            tolerance = 1e-11 if "f4" not in program.dtypes else 1e-3
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * largest, err_msg=f"result {n}")
        else:
            assert_as_precise(a, b, c, f"result {n}", multiple=16, ulps=64)
    for shift, poison in enumerate(POISONS if thorough else POISONS[1:2]):
        other = call_between_guards(backend_of(width, panels=panels, guard=GUARD, poison=poison), graph, arrays, shift)
        assert_bits(other, got, f"poison {poison:#x}, {shift} elements after a cache line")
    if thorough:
        level = 0
        assert_bits(backend_of(width, level, panels).function(graph)(arrays), got, f"level {level}")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.stop()


def programs(*dtypes: str) -> st.SearchStrategy[Program]:
    return st.builds(make_program, st.integers(0, 2**32 - 1), st.integers(4, 14), st.just(dtypes), st.just(()))


TYPES = st.sampled_from([("f4",), ("f8",), ("f4", "f8")])
few = settings(max_examples=max(settings().max_examples // 3, 1))


@few
@given(data=st.data())
def test_random_programs(server: Server, data: st.DataObject) -> None:
    program = data.draw(programs(*data.draw(TYPES)))
    server(check, program, data.draw(st.sampled_from(WIDTHS)))


@few
@given(data=st.data())
def test_random_programs_with_matrices_in_panels(server: Server, data: st.DataObject) -> None:
    program = data.draw(programs(*data.draw(TYPES)))
    server(check, program, data.draw(st.sampled_from(WIDTHS)), False, SMALL)


@pytest.mark.slow
@settings(max_examples=3 * settings().max_examples)
@given(data=st.data())
@pytest.mark.parametrize("width", WIDTHS)
def test_random_programs_at_every_width(server: Server, width: str, data: st.DataObject) -> None:
    server(check, data.draw(programs(*data.draw(TYPES))), width, True)


def die() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def test_a_crash_is_a_failed_test_with_a_name() -> None:
    server = Server()
    with pytest.raises(Crash, match=r"die\(\): it crashed; exit status -11"):
        server(die)
    with pytest.raises(AssertionError, match=r"(?s)check.*WrongWidth.*no processor level"):
        server(check, make_program(1, 4, ("f4",), ()), "WrongWidth")
    server(check, make_program(1, 4, ("f4",), ()), WIDTHS[0])
    server.stop()
