"""compiler/driver.py: when the threads of a run meet. Steps are stand-ins, and one thread runs them, which counts how often it would meet
others. Everything else that the driver does is tested by what whole runs of networks compute (test_native_runs.py).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import pytest

from chainrule.compiler import driver
from chainrule.compiler.jit import compile_module
from chainrule.compiler.target import host
from chainrule.run.threads import flush_ir

COUNTS = """define internal void @barrier(ptr %state, i64 %threads) {
  %before = load i64, ptr %state, align 8
  %after = add i64 %before, 1
  store i64 %after, ptr %state, align 8
  ret void
}
"""
SAYS = """define i32 @says{what}(ptr %table, i64 %thread, i64 %threads, ptr %barrier) {{
  ret i32 {what}
}}
"""


def meetings(
    kinds: Sequence[int], says: Sequence[int], *, steps: int, first: int = 0, before: int = -1, threads: int = 2
) -> list[int]:
    """[how often a thread meets others, the steps that were done] in a run of steps of these kinds, over and over, of which each says
    so much."""
    triple = host().triple
    entries = "".join(SAYS.format(what=what) for what in (driver.FINE, driver.BAD, driver.ONWARD))
    loaded = compile_module(driver.driver_ir(triple, COUNTS, flush_ir(triple)) + entries, host())
    prepares = loaded.address(f"says{driver.FINE}")
    functions = np.array([(prepares, loaded.address(f"says{what}")) for what in says], np.int64)
    which, arenas = np.array(kinds, np.int64), np.zeros(len(says), np.int64)
    met, table = np.zeros(1, np.int64), np.zeros(8, np.int64)
    shared = np.zeros(driver.WORDS, np.int64)
    words = {
        driver.FIRST: first, driver.STEPS: steps, driver.THREADS: threads, driver.BARRIER: met.ctypes.data,
        driver.ROUND: len(kinds), driver.PLACE: first % len(kinds), driver.KINDS: which.ctypes.data,
        driver.FUNCTIONS: functions.ctypes.data, driver.ARENAS: arenas.ctypes.data, driver.BEFORE: before,
    }  # fmt: skip
    for word, value in words.items():
        shared[word] = value
    block = np.array([shared.ctypes.data, 0, table.ctypes.data], np.int64)
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(loaded.address("run"))(block.ctypes.data)
    return [int(met[0]), int(shared[driver.DONE])]


def test_threads_meet_after_each_step() -> None:
    assert meetings([0], [driver.FINE], steps=5, before=0) == [5, 5]
    assert meetings([0], [driver.FINE], steps=5) == [6, 5]  # and when copies of the state have been prepared
    assert meetings([0], [driver.FINE], steps=5, before=0, first=3) == [2, 5]
    assert meetings([0], [driver.FINE], steps=5, before=0, threads=1) == [0, 5]


def test_threads_go_on_where_they_need_not_wait() -> None:
    """After the last step all of them have to be there."""
    assert meetings([0], [driver.ONWARD], steps=5, before=0) == [1, 5]
    assert meetings([0, 0, 0], [driver.ONWARD], steps=5, before=0) == [1, 5]
    assert meetings([0], [driver.ONWARD], steps=1, before=0) == [1, 1]


@pytest.mark.parametrize("other", [driver.FINE, driver.ONWARD])
def test_threads_meet_where_the_kind_of_steps_changes(other: int) -> None:
    """Twice: before copies are prepared, and after. Kinds 0 0 1 | 0 0 1 | 0."""
    assert meetings([0, 0, 1], [driver.ONWARD, other], steps=7, before=0) == [4 + 4 + 1, 7]
    waits = other == driver.FINE
    assert meetings([0, 1, 1], [driver.ONWARD, other], steps=7, before=0) == [4 + 4 + 2 * waits + 1, 7]


def test_the_run_ends_where_an_index_is_wrong() -> None:
    assert meetings([0, 0, 1], [driver.ONWARD, driver.BAD], steps=9, before=0) == [1 + 1 + 1, 2]
