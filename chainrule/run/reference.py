"""The reference backend: each node by its NumPy definition, in the order of the graph.

In: programs and graphs. Out: their results. It is slow and plain; other backends are tested against it. Denormal numbers are kept,
where compiled networks flush them to zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import numpy as np

from ..errors import DataError
from ..graph.interpret import Plan, plan_of
from ..graph.node import Array, Graph, Rows
from ..program import Entry, Input, Program
from .backend import Backend, Session, Steps, backends


class ReferenceSession(Session):
    """A state in logical layout, and a plan for each entry that has run."""

    def __init__(self, programs: Mapping[int, Program], state: Mapping[str, Array]) -> None:
        self._programs = programs
        self._state = {name: np.array(value) for name, value in state.items()}
        self._plans: dict[tuple[int, str], tuple[Entry, Plan]] = {}

    def _step(self, rows: int, name: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        if (rows, name) not in self._plans:
            entry = self._programs[rows].entries[name]
            self._plans[rows, name] = (entry, plan_of(entry.graph))
        entry, plan = self._plans[rows, name]
        state = self._state
        outputs = plan([*[state[r] for r in entry.reads], *[inputs[i] for i in entry.inputs], *entry.captures])
        count = len(entry.results)
        if entry.writes:  # one assignment: an interrupt finds the old state or the new one, never a mixture
            self._state = {**state, **dict(zip(entry.writes, outputs[count:], strict=True))}
        return dict(zip(entry.results, outputs, strict=False))

    def run(self, steps: Steps, pulse: Callable[[int], bool] | None = None) -> dict[str, Array]:
        with one_thread():
            return self._run(steps, pulse)

    def _run(self, steps: Steps, pulse: Callable[[int], bool] | None) -> dict[str, Array]:
        kept: dict[str, list[Array]] = {name: [] for name in steps.keep}
        at = 0
        rows_of: dict[str, Rows] = {}
        for i, (name, size) in enumerate(zip(steps.entries, steps.sizes, strict=True)):
            program = self._programs[size]
            rows = steps.order[at : at + size]
            at += size
            inputs = {k: cast(v[rows], program.inputs[k]) for k, v in steps.data.items()}
            inputs.update({k: cast(v[i], program.inputs[k]) for k, v in steps.numbers.items()})
            results = self._step(size, name, inputs)
            entry = program.entries[name]
            rows_of.update(zip(entry.results, entry.result_rows, strict=True))
            for k in kept:
                if k in results:
                    kept[k].append(np.asarray(results[k]))
            if pulse is not None and not pulse(i + 1):
                break
        return {k: _join(v, rows_of.get(k)) for k, v in kept.items()}

    def call(self, rows: int, entry: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        known = self._programs[rows].inputs
        given = {k: cast(v, known[k]) for k, v in inputs.items()}
        with one_thread():
            return {k: np.asarray(v) for k, v in self._step(rows, entry, given).items()}

    def state(self) -> dict[str, Array]:
        return {name: np.array(value) for name, value in self._state.items()}


@cache
def _pools() -> Any:
    from threadpoolctl import ThreadpoolController  # here, for it looks through the loaded libraries

    return ThreadpoolController()


def one_thread() -> AbstractContextManager[Any]:
    """Products of matrices on one thread: the order of their sums, and so every bit, must not depend on the number of threads.
    Small products are also slower on several, many times so where other processes compute."""
    manager: AbstractContextManager[Any] = _pools().limit(limits=1, user_api="blas")
    return manager


def _join(parts: list[Array], rows: Rows) -> Array:
    """The results of all steps: their rows one after the other where they have rows, else one entry a step."""
    if not parts:
        return np.zeros(0)
    return np.concatenate(parts, rows) if isinstance(rows, int) else np.stack(parts)


def cast(value: Array, to: Input) -> Array:
    """A gathered input in the type that the program wants.

    Raises: `DataError` for numbers that an integer input cannot hold as they are: they may be indices, and are never bent into range.
    """
    array = np.asarray(value)
    if to.type.dtype.kind in "iu" and not np.can_cast(array.dtype, to.type.dtype):
        whole = array.astype(to.type.dtype)
        if not np.array_equal(whole, array):
            raise DataError(f'"{to.name}" takes whole numbers of {to.type.dtype}; the data of {array.dtype} holds others')
        return whole
    return np.asarray(array, to.type.dtype)


class ReferenceBackend(Backend):
    """NumPy, one node at a time."""

    name = "reference"

    def session(self, programs: Mapping[int, Program], state: Mapping[str, Array]) -> Session:
        return ReferenceSession(programs, state)

    def function(self, graph: Graph) -> Callable[[Sequence[Array]], list[Any]]:
        return plan_of(graph)


backends.add("reference", ReferenceBackend())
