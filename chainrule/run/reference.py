"""The reference backend: each node by its NumPy definition, in the order of the graph.

In: programs and graphs. Out: their results. It is slow and plain; other backends are tested against it. Denormal numbers are kept,
where compiled networks flush them to zero.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import DataError
from ..graph.interpret import Plan, plan_of
from ..graph.node import Array, Graph, Rows
from ..program import Entry, Input, Program
from .backend import Backend, Function, Kept, Session, Steps, Taken, backends, finite


class ReferenceSession(Session):
    """A state in logical layout, and a plan for each entry that has run."""

    def __init__(self, programs: Mapping[int, Program], state: Mapping[str, Array]) -> None:
        self._programs = programs
        self._at = ({name: np.array(value) for name, value in state.items()}, 0)  # the state, and the steps it has behind it
        self._plans: dict[tuple[int, str], tuple[Entry, Plan]] = {}

    def _step(self, rows: int, name: str, inputs: Mapping[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
        """The results of one entry, and the state that it leaves."""
        if (rows, name) not in self._plans:
            entry = self._programs[rows].entries[name]
            self._plans[rows, name] = (entry, plan_of(entry.graph))
        entry, plan = self._plans[rows, name]
        state = self._at[0]
        outputs = plan([*[state[r] for r in entry.reads], *[inputs[i] for i in entry.inputs], *entry.captures])
        count = len(entry.results)
        written = (_own(v, inputs) for v in outputs[count:])
        after = {**state, **dict(zip(entry.writes, written, strict=True))} if entry.writes else state
        return dict(zip(entry.results, outputs, strict=False)), after

    def run(self, steps: Steps, pulse: Callable[[int], bool] | None = None) -> Taken:
        with one_thread():
            return self._run(steps, pulse)

    def _run(self, steps: Steps, pulse: Callable[[int], bool] | None) -> Taken:
        kept: dict[str, list[Array]] = {name: [] for name in steps.keep}
        rows_of: dict[str, Rows] = {}
        self._at = (self._at[0], 0)
        interrupted = False
        try:
            for i, (name, size, rows, numbers) in enumerate(steps.each()):
                program = self._programs[size]
                inputs = {k: cast(v[rows], program.inputs[k]) for k, v in steps.data.items()}
                inputs.update({k: cast(v, program.inputs[k]) for k, v in numbers.items()})
                entry = program.entries[name]
                results, state = self._step(size, name, inputs)
                rows_of.update(zip(entry.results, entry.result_rows, strict=True))
                for k in kept:
                    if k in results:
                        kept[k].append(np.asarray(results[k]))
                self._at = (state, i + 1)  # one assignment: an interrupt finds a whole step behind it
                if pulse is not None and not pulse(i + 1):
                    break
        except KeyboardInterrupt:
            interrupted = True
        taken = self._at[1]
        return Taken(taken, {k: _join(v[:taken], rows_of.get(k)) for k, v in kept.items()}, interrupted)

    def call(self, rows: int, entry: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        known = self._programs[rows].inputs
        given = {k: cast(v, known[k]) for k, v in inputs.items()}
        with one_thread():
            results, state = self._step(rows, entry, given)
        self._at = (state, 0)
        return {k: np.array(v) for k, v in results.items()}

    def state(self) -> dict[str, Array]:
        return {name: np.array(value) for name, value in self._at[0].items()}

    def keep(self) -> Kept | None:
        state = self._at[0]  # a step makes new arrays and leaves the old ones as they are
        return Kept(state) if finite(state.values()) else None


class _OneThread:
    """Products of matrices on one thread: the order of their sums, and so every bit, must not depend on the number of threads.
    Small products are also slower on several, many times so where other processes compute.

    The setting belongs to the process, so the first that enters makes it and the last that leaves takes it back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._controller: Any = None
        self._limit: Any = None

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                if self._controller is None:
                    from threadpoolctl import ThreadpoolController  # here, for it looks through the loaded libraries

                    self._controller = ThreadpoolController()
                self._limit = self._controller.limit(limits=1, user_api="blas")
                self._limit.__enter__()
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._limit.__exit__(None, None, None)


_guard = _OneThread()


def one_thread() -> _OneThread:
    """The process's guard; enter it around products of matrices."""
    return _guard


def _own(value: Any, inputs: Mapping[str, Array]) -> Array:
    """New state as an array that nobody else writes to."""
    array = np.asarray(value)
    return array if array.flags.owndata and not any(array is given for given in inputs.values()) else array.copy()


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
        with np.errstate(invalid="ignore"):
            whole = array.astype(to.type.dtype)
        if not np.array_equal(whole, array):
            raise DataError(f'"{to.name}" takes whole numbers of {to.type.dtype}; the data of {array.dtype} holds others')
        return whole
    return np.asarray(array, to.type.dtype)


class ReferenceBackend(Backend):
    """NumPy, one node at a time."""

    name = "reference"

    def session(self, programs: Mapping[int, Program], state: Mapping[str, Array], threads: int | None = None) -> Session:
        return ReferenceSession(programs, state)

    def function(self, graph: Graph) -> Function:
        return _Function(graph)


class _Function(Function):
    def __init__(self, graph: Graph, last: Sequence[Array] = ()) -> None:
        self._graph, self._plan, self._last = graph, plan_of(graph), last

    def __call__(self, arrays: Sequence[Any]) -> list[Array]:
        given = [np.asarray(a, n.dtype) for a, n in zip((*arrays, *self._last), self._graph.inputs, strict=True)]
        with one_thread():
            return [_private(r, given) for r in self._plan(given)]

    def bound(self, last: Sequence[Any]) -> Function:
        return _Function(self._graph, [np.array(v) for v in last])


def _private(result: Any, arguments: Sequence[Array]) -> Array:
    """A result that the caller may write to: no view of an argument, a constant or itself."""
    array = np.asarray(result)
    alone = array.flags.owndata and array.flags.writeable and not any(array is a for a in arguments)
    return array if alone else array.copy()


backends.add("reference", ReferenceBackend())
