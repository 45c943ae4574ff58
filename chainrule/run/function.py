"""Compiled graphs as functions of arrays.

In: machine code and the graph that it is of. Out: `NativeFunction`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..errors import DataError
from ..graph.interpret import evaluate
from ..graph.node import Array, Graph
from .backend import Function
from .machines import CHANGED, Machine, aligned, own

KEPT_ARENA = 2**20  # bytes of scratch memory that a function keeps for its next call

_Call = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)


class NativeFunction(Function):
    """A compiled graph as a function of arrays. last: values of its last inputs, which are the same in each call."""

    def __init__(self, machine: Machine, graph: Graph, poison: int | None, last: Sequence[Array] = ()) -> None:
        self.machine, self._graph, self._poison = machine, graph, poison
        self._call = _Call(machine.address)
        free = len(graph.inputs) - len(last)
        self._inputs = [n.dtype for n in graph.inputs[:free]]
        self._last = [own(v, n.dtype) for v, n in zip(last, graph.inputs[free:], strict=True)]
        self._outputs = [(o.shape, o.dtype) for o in graph.outputs]
        self._first_output = 2 + len(graph.inputs)
        self._table = ctypes.c_void_p * (self._first_output + len(self._outputs))
        self._spare: list[tuple[Any, Array, Array]] = []  # memory to work in, which no call uses at present

    def bound(self, last: Sequence[Array]) -> NativeFunction:
        """The same with fixed values of the last inputs; they are copied."""
        return NativeFunction(self.machine, self._graph, self._poison, last)

    def __call__(self, arrays: Sequence[Any]) -> list[Array]:
        given = [
            a
            if type(a) is np.ndarray and (a.dtype is d or a.dtype == d) and (flags := a.flags).c_contiguous and flags.aligned
            else _plain(a, d)
            for a, d in zip(arrays, self._inputs, strict=True)
        ]
        results = [np.empty(shape, dtype) for shape, dtype in self._outputs]
        work = self._taken()
        table, arena, _ = work
        at = 2
        for a in given:
            table[at] = _address(a)
            at += 1
        at = self._first_output
        for a in results:
            table[at] = _address(a)
            at += 1
        if self._poison is not None:
            arena[:] = self._poison
        if self._call(table, 0, 1, None):
            # NumPy finds which index it was, and says so. It gets copies: where it checks an array that another thread changes, and
            # reads it afterwards, it crashes.
            evaluate(self._graph, [*map(np.array, given), *self._last])
            raise DataError(CHANGED)
        if arena.size <= KEPT_ARENA:
            self._spare.append(work)
        return results

    def _taken(self) -> tuple[Any, Array, Array]:
        try:
            return self._spare.pop()
        except IndexError:  # in the first call, and where several threads call at once
            return self._work()

    def _work(self) -> tuple[Any, Array, Array]:
        """A table of pointers, scratch memory, and the report of a bad index."""
        table, arena, report = self._table(), aligned(self.machine.arena), np.zeros(4, np.int64)
        table[0], table[1] = arena.ctypes.data, report.ctypes.data
        for at, a in enumerate(self._last, 2 + len(self._inputs)):
            table[at] = a.ctypes.data
        return table, arena, report


def _plain(a: Any, dtype: Any) -> Array:
    a = np.asarray(a, dtype)
    return a if (flags := a.flags).c_contiguous and flags.aligned else np.require(a, requirements=["C", "A"])


def _address(a: Array) -> int:
    """Of the first number. `ctypes.data` takes a microsecond, the short way a fifth, but only where an array may be written to; a view
    is not asked, for that is a warning where it comes from `np.broadcast_arrays`."""
    if (flags := a.flags).owndata and flags.writeable and a.size:
        return ctypes.addressof(_first_byte(a))
    return int(a.ctypes.data)


_first_byte: Callable[[Any], Any] = ctypes.c_char.from_buffer
