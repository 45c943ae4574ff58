"""Machine code: whole runs of steps without Python.

In: programs and graphs. Out: a backend that compiles each entry to one native function when it is first needed. A run hands native
code a list of steps; it gathers rows by their numbers, runs the entry of each step, and looks at a stop flag after each. Python is
entered several times a second, for progress and Ctrl-C.
"""

from __future__ import annotations

import ctypes
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..compiler.driver import (
    ARENAS,
    BARRIER,
    BASES,
    DONE,
    FIRST,
    FUNCTIONS,
    KINDS,
    MOVES,
    OFFSETS,
    SLOTS,
    STEPS,
    THREADS,
    WORDS,
    driver_ir,
)  # fmt: skip
from ..compiler.jit import LEVEL
from ..compiler.target import Target, host
from ..errors import DataError
from ..graph.interpret import evaluate
from ..graph.node import DTYPES, Array, Graph, Rows
from ..normalize import graph_key
from ..program import Entry, Program
from .backend import Backend, Session, Steps, Taken, backends
from .crew import Crew, Way
from .reference import cast

SLICE = 0.1  # seconds in native code before Python looks for Ctrl-C
KEPT_FUNCTIONS = 256
CLOCKS = 8  # words of the report before the cycles of each kernel


@dataclass(frozen=True)
class Machine:
    """One entry as machine code."""

    code: Any
    loaded: Any
    address: int
    prepare: int


_machines: OrderedDict[Any, Machine] = OrderedDict()


def _machine(key: Any, make: Callable[[], Any], target: Target, level: int) -> Machine:
    """The machine code for a key, compiled once in this process."""
    if key in _machines:
        _machines.move_to_end(key)
        return _machines[key]
    from ..compiler import jit  # llvmlite is imported with the first compilation

    code = make()
    loaded = jit.compile_module(code.text, target, level=level)
    made = _machines[key] = Machine(code, loaded, loaded.address(code.name), loaded.address(f"{code.name}_prepare"))
    while len(_machines) > KEPT_FUNCTIONS:
        _machines.popitem(last=False)
    return made


def aligned(size: int, dtype: Any = np.uint8, fill: int | None = None) -> Array:
    """An array of `size` elements that begins at a cache line."""
    dtype = np.dtype(dtype)
    memory = np.empty(size * dtype.itemsize + 64, np.uint8)
    if fill is not None:
        memory[:] = fill
    start = -memory.ctypes.data % 64
    made: Array = memory[start : start + size * dtype.itemsize].view(dtype)
    return made


def own(value: Any, dtype: Any) -> Array:
    """An aligned copy."""
    array = np.asarray(value, dtype)
    made: Array = aligned(array.size, dtype).reshape(array.shape)
    made[...] = array
    return made


class NativeSession(Session):
    """State at work in native code."""

    def __init__(
        self, programs: Mapping[int, Program], state: Mapping[str, Array], backend: NativeBackend, threads: int | None
    ) -> None:
        self._programs = programs
        self._backend, self._crew = backend, Crew(threads)
        names: dict[str, None] = {}
        for program in programs.values():
            names.update(dict.fromkeys([*program.state, *(f"in/{i}" for i in program.inputs)]))
            for entry in program.entries.values():
                names.update(dict.fromkeys(f"out/{r}" for r in entry.results))
                names.update(dict.fromkeys(_captured(program, entry, i) for i in range(len(entry.captures))))
        self._slots = {name: i for i, name in enumerate(["arena", "report", "order", *names])}
        types = {n: v.type for p in programs.values() for n, v in p.state.items()}
        self._state = {n: own(state[n], t.dtype) for n, t in types.items()}
        self._captures: dict[str, Array] = {}
        for program in programs.values():
            for entry in program.entries.values():
                for i, (node, value) in enumerate(zip(entry.graph.inputs[-len(entry.captures) :], entry.captures, strict=False)):
                    self._captures[_captured(program, entry, i)] = own(value, node.dtype)
        self._known: dict[Any, Machine] = {}
        self._arenas: dict[Any, Array] = {}
        self._dump = aligned(64)
        self._report = np.zeros(CLOCKS + (4096 if backend.timed else 0), np.int64)

    # ---- code ----------------------------------------------------------------------------------------------------------------

    def _machines(self, kinds: Sequence[tuple[str, int]], sources: Mapping[str, Array], units: int) -> list[Machine]:
        """Machine code for each kind of step, its work cut into `units`."""
        found = []
        for name, rows in kinds:
            program = self._programs[rows]
            entry = program.entries[name]
            dtypes = tuple(sources[i].dtype if program.inputs[i].rows is not None else None for i in entry.inputs)
            key = (rows, name, dtypes, units)
            if key not in self._known:
                self._known[key] = made = self._backend.entry(program, entry, dtypes, self._slots, units)
                self._arenas[made] = aligned(made.code.arena.bytes, fill=self._backend.poison)
            found.append(self._known[key])
        return found

    # ---- running -------------------------------------------------------------------------------------------------------------

    def run(self, steps: Steps, pulse: Callable[[int], bool] | None = None) -> Taken:
        count = len(steps.sizes)
        sources = {k: self._source(k, v) for k, v in steps.data.items()}
        numbers = {k: self._numbers(k, v) for k, v in steps.numbers.items()}
        kinds, which = _kinds(steps)
        for name, size in kinds:
            self._crew.expect(self._programs[size].entries[name].graph)
        order = np.ascontiguousarray(steps.order, np.int64)
        self._in_range(order, sources)
        moves = [Move.along("order", order, np.array([size * 8 for _, size in kinds], np.int64), which)]
        for k, v in numbers.items():
            if f"in/{k}" in self._slots:
                moves.append(Move(f"in/{k}", v.ctypes.data, v.nbytes // max(count, 1)))
        kept = self._kept(steps, kinds, which, moves)
        done, interrupted = self._go(steps, kinds, which, moves, sources, pulse)
        return Taken(done, {k: v(done) for k, v in kept.items()}, interrupted)

    def _source(self, name: str, value: Array) -> Array:
        """Data as native code can gather it: contiguous, of a type it knows, indices checked."""
        known = next(p.inputs[name] for p in self._programs.values() if name in p.inputs)
        array = np.asarray(value)
        if known.type.dtype.kind in "iu" or array.dtype not in DTYPES or not array.dtype.isnative:
            array = cast(array, known)
        return np.require(array, requirements=["C", "A"])

    def _numbers(self, name: str, value: Array) -> Array:
        known = next((p.inputs[name] for p in self._programs.values() if name in p.inputs), None)
        return np.require(np.asarray(value) if known is None else cast(np.asarray(value), known), requirements=["C", "A"])

    def _in_range(self, order: Array, sources: Mapping[str, Array]) -> None:
        least = min((len(v) for v in sources.values()), default=0)
        if sources and order.size and (order.min() < 0 or order.max() >= least):
            raise DataError(f"row {order.max() if order.max() >= least else order.min()} of {least} rows")

    def _kept(self, steps: Steps, kinds: Sequence[tuple[str, int]], which: Array, moves: list[Move]) -> dict[str, Any]:
        """Memory for results, and how they are read from it; what is not kept is written to a place of its own."""
        kept: dict[str, Any] = {k: lambda done: np.zeros(0) for k in steps.keep}
        entries = [self._programs[size].entries[name] for name, size in kinds]
        largest = 0
        for result in dict.fromkeys(r for e in entries for r in e.results):
            found = [e.graph.outputs[e.results.index(result)] if result in e.results else None for e in entries]
            sizes = np.array([n.type.size * n.dtype.itemsize if n is not None else 0 for n in found], np.int64)
            if result in steps.keep:
                memory = aligned(int(sizes @ np.bincount(which, minlength=len(kinds))))
                moves.append(Move.along(f"out/{result}", memory, sizes, which))
                rows = next(e.result_rows[e.results.index(result)] for e in entries if result in e.results)
                kept[result] = _Reader(memory, found, sizes, which, rows)
            else:
                largest = max(largest, int(sizes.max(initial=0)))
        if largest > self._dump.size:
            self._dump = aligned(largest)
        return kept

    def _go(self, steps: Steps, kinds: Sequence[tuple[str, int]], which: Array, moves: Sequence[Move], sources: Mapping[str, Array],
            pulse: Callable[[int], bool] | None) -> tuple[int, bool]:  # fmt: skip
        """Slices of steps in native code until all are taken; between them Python looks for Ctrl-C."""
        shared = np.zeros(WORDS, np.int64)
        slots = np.array([self._slots[m.name] for m in moves], np.int64)
        bases = np.array([m.base for m in moves], np.int64)
        offsets = np.array([(m.stride, 0 if m.offsets is None else m.offsets.ctypes.data) for m in moves], np.int64)
        barrier = aligned(512, fill=0)
        shared[[BARRIER, KINDS, MOVES]] = barrier.ctypes.data + -barrier.ctypes.data % 128, which.ctypes.data, len(moves)
        shared[[SLOTS, BASES, OFFSETS]] = slots.ctypes.data, bases.ctypes.data, offsets.ctypes.data
        table = self._table(sources)
        prepared: dict[Way, Any] = {}
        self._report[:CLOCKS] = 0
        run = self._backend.driver()
        at, count, length, interrupted = 0, len(which), 1, False
        try:
            while at < count:
                way = self._crew.way(count - at)
                if way not in prepared:
                    prepared[way] = _Ready(self._machines(kinds, sources, way.units), self._arenas, way.threads, shared, table)
                ready = prepared[way]
                shared[[FIRST, STEPS, THREADS]] = at, min(count, at + length), way.threads
                shared[[FUNCTIONS, ARENAS]] = ready.functions.ctypes.data, ready.arenas.ctypes.data
                begun = time.perf_counter()
                run(ready.arguments)
                took = time.perf_counter() - begun
                taken, at = int(shared[DONE]) - at, int(shared[DONE])
                if self._report[0]:
                    self._raise(steps, at)
                self._crew.took(way, taken, took)
                if pulse is not None and not pulse(at):
                    break
                length = max(1, min(length * 8, int(length * SLICE / max(took, 1e-7))))
        except KeyboardInterrupt:
            at, interrupted = int(shared[DONE]), True
        return at, interrupted

    def _table(self, sources: Mapping[str, Array]) -> Array:
        table = np.full(len(self._slots), self._dump.ctypes.data, np.int64)
        table[1] = self._report.ctypes.data
        for name, array in (*self._state.items(), *self._captures.items(), *((f"in/{k}", v) for k, v in sources.items())):
            table[self._slots[name]] = array.ctypes.data
        return table

    def _raise(self, steps: Steps, at: int) -> None:
        """An index of step `at` lies outside its array: let NumPy find which, and say so. The state is as that step found it."""
        self._report[:] = 0
        program = self._programs[int(steps.sizes[at])]
        entry = program.entries[steps.entries[at]]
        first = int(np.sum(np.asarray(steps.sizes[:at], np.int64)))
        rows = np.asarray(steps.order)[first : first + int(steps.sizes[at])]
        given = {k: np.asarray(v)[rows] for k, v in steps.data.items()} | {k: np.asarray(v)[at] for k, v in steps.numbers.items()}
        values = [*(self._state[n] for n in entry.reads), *(cast(given[i], program.inputs[i]) for i in entry.inputs)]
        evaluate(entry.graph, values)
        raise DataError("an index lies outside its array")

    def call(self, rows: int, entry: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        program = self._programs[rows]
        made = program.entries[entry]
        data = {i: inputs[i] for i in made.inputs if program.inputs[i].rows is not None}
        numbers = {i: np.asarray(inputs[i])[None] for i in made.inputs if program.inputs[i].rows is None}
        taken = self.run(Steps([entry], data, np.arange(rows), [rows], numbers, made.results))
        if taken.interrupted:
            raise KeyboardInterrupt
        shapes = zip(made.results, made.graph.outputs, strict=False)
        return {r: taken.results[r].reshape(o.shape) for r, o in shapes}

    def state(self) -> dict[str, Array]:
        return {name: value.copy() for name, value in self._state.items()}


class _Ready:
    """What a number of threads needs to enter native code."""

    def __init__(
        self, machines: Sequence[Machine], arenas: Mapping[Any, Array], threads: int, shared: Array, table: Array
    ) -> None:
        self.functions = np.array([(m.prepare, m.address) for m in machines], np.int64).reshape(-1)
        self.arenas = np.array([arenas[m].ctypes.data for m in machines], np.int64)
        self._tables = [table.copy() for _ in range(threads)]
        self._blocks = [np.array([shared.ctypes.data, t, own.ctypes.data], np.int64) for t, own in enumerate(self._tables)]
        self.arguments = [b.ctypes.data for b in self._blocks]


@dataclass(frozen=True)
class Move:
    """A pointer that goes on from step to step: by `stride` bytes, or where steps differ to `offsets` from the base."""

    name: str
    base: int
    stride: int
    offsets: Array | None = None

    @classmethod
    def along(cls, name: str, memory: Array, sizes: Array, which: Array) -> Move:
        """Past the bytes that each step takes; sizes: those of each kind of step, which: the kind of each step."""
        if len(sizes) and np.all(sizes == sizes[0]):
            return cls(name, memory.ctypes.data, int(sizes[0]))
        each = sizes[which] if len(sizes) else np.zeros(0, np.int64)
        return cls(name, memory.ctypes.data, 0, np.cumsum(each) - each)


@dataclass(frozen=True)
class _Reader:
    """The kept results of the steps that were taken. found: for each kind of step the result's node, None if it has none."""

    memory: Array
    found: Sequence[Any]
    sizes: Array
    which: Array
    rows: Rows

    def __call__(self, done: int) -> Array:
        taken = np.bincount(self.which[:done], minlength=len(self.found))
        node = next(n for n in self.found if n is not None)
        used: Array = self.memory[: int(self.sizes @ taken)].view(node.dtype)
        count = int(sum(n for n, f in zip(taken, self.found, strict=True) if f is not None))
        if not count:
            return np.zeros(0)
        if not isinstance(self.rows, int):
            return used.reshape(count, *node.shape)
        if self.rows == 0:
            return used.reshape(-1, *node.shape[1:])
        parts, at = [], 0
        for kind in self.which[:done]:
            if (one := self.found[kind]) is not None:
                parts.append(used[at : at + one.type.size].reshape(one.shape))
                at += one.type.size
        return np.concatenate(parts, self.rows)


def _kinds(steps: Steps) -> tuple[list[tuple[str, int]], Array]:
    """The different (entry, size) of the steps, and which of them each step is. Sorting would cost more than the steps."""
    sizes = np.asarray(steps.sizes, np.int64)
    names = list(dict.fromkeys(steps.entries))
    of_name = np.zeros(len(sizes), np.int64)
    if len(names) > 1:
        of_name = np.fromiter(map(names.index, steps.entries), np.int64, len(sizes))
    kinds: list[tuple[str, int]] = []
    which = np.full(len(sizes), -1)
    while len(sizes) and which[at := int(np.argmin(which))] < 0:
        same = (sizes == sizes[at]) & (of_name == of_name[at])
        which[same] = len(kinds)
        kinds.append((names[of_name[at]], int(sizes[at])))
    return kinds, which


def _captured(program: Program, entry: Entry, at: int) -> str:
    return f"capture/{program.rows}/{entry.name}/{at}"


class NativeBackend(Backend):
    """Compiled for the processor it runs on. target, level: for tests; guard, poison: bytes between buffers, and what fills them."""

    name = "native"

    def __init__(
        self, target: Target | None = None, level: int = LEVEL, guard: int = 0, poison: int | None = None, timed: bool = False
    ) -> None:
        self._target, self.level, self.guard, self.poison, self.timed = target, level, guard, poison, timed
        self._run: Callable[[Sequence[int]], None] | None = None

    @property
    def target(self) -> Target:
        return self._target or host()

    def session(self, programs: Mapping[int, Program], state: Mapping[str, Array], threads: int | None = None) -> Session:
        return NativeSession(programs, state, self, threads)

    def entry(self, program: Program, entry: Entry, dtypes: Sequence[Any], slots: Mapping[str, int], threads: int) -> Machine:
        """Machine code for one entry, its rows gathered from data of these types."""
        key = (self.target, self.level, self.guard, self.timed,
               graph_key(entry.graph), entry.reads, entry.inputs, entry.results, entry.writes,
               program.rows, dtypes, tuple(slots.items()), threads)  # fmt: skip

        def make() -> Any:
            from ..compiler.kernels import Buffer
            from ..compiler.pipeline import Given, compile_graph
            from .threads import barrier_ir

            state = {
                n: Buffer(n, program.state[n].type.shape, program.state[n].type.dtype, "state")
                for n in (*entry.reads, *entry.writes)
            }
            inputs = [Given(state[n]) for n in entry.reads]
            rows: list[Rows] = [program.state[n].rows for n in entry.reads]
            for n, dtype in zip(entry.inputs, dtypes, strict=True):
                known = program.inputs[n]
                buffer = Buffer(f"in/{n}", known.type.shape, dtype or known.type.dtype, "input")
                inputs.append(Given(buffer, program.rows if known.rows is not None else 0))
                rows.append(known.rows)
            for i, node in enumerate(entry.graph.inputs[len(inputs) :]):
                inputs.append(Given(Buffer(_captured(program, entry, i), node.shape, node.dtype, "input")))
                rows.append(None)
            results = [
                Buffer(f"out/{r}", o.shape, o.dtype, "result") for r, o in zip(entry.results, entry.graph.outputs, strict=False)
            ]
            outputs = [*results, *(state[w] for w in entry.writes)]
            barrier = barrier_ir(self.target.triple) if threads > 1 else ""
            return compile_graph(
                "entry", entry.graph, inputs, outputs, list(state.values()), slots, rows, self.target, threads=threads,
                guard=self.guard, barrier=barrier, timed=self.timed,
            )  # fmt: skip

        return _machine(key, make, self.target, self.level)

    def driver(self) -> Callable[[Sequence[int]], None]:
        """Runs the threads of a run, one for each argument block."""
        if self._run is None:
            from ..compiler import jit
            from .threads import barrier_ir, flush_ir, pool

            triple = self.target.triple
            loaded = jit.compile_module(driver_ir(triple, barrier_ir(triple), flush_ir(triple)), self.target)
            address = loaded.address("run")

            def run(arguments: Sequence[int], loaded: Any = loaded) -> None:
                pool().run(address, arguments)

            self._run = run
        return self._run

    def function(self, graph: Graph) -> Callable[[Sequence[Array]], list[Any]]:
        target = self.target

        def make() -> Any:
            from ..compiler.kernels import Buffer
            from ..compiler.pipeline import Given, compile_graph

            inputs = [Given(Buffer(f"in{i}", n.shape, n.dtype, "input")) for i, n in enumerate(graph.inputs)]
            outputs = [Buffer(f"out{i}", o.shape, o.dtype, "result") for i, o in enumerate(graph.outputs)]
            slots = {b.name: i for i, b in enumerate([*(g.buffer for g in inputs), *outputs], 2)}
            return compile_graph("entry", graph, inputs, outputs, [], slots, [None] * len(inputs), target, guard=self.guard)

        return _Function(
            _machine(("function", target, self.level, self.guard, graph_key(graph)), make, target, self.level), graph, self
        )


class _Function:
    """A compiled graph as a function of arrays."""

    def __init__(self, machine: Machine, graph: Graph, backend: NativeBackend) -> None:
        self.machine, self._graph = machine, graph
        self._call = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)(
            machine.address
        )
        self._inputs = [(n.dtype, n.shape) for n in graph.inputs]
        self._outputs = [(o.shape, o.dtype) for o in graph.outputs]
        self._bytes = machine.code.arena.bytes
        self._poison = backend.poison
        self._slots = 2 + len(self._inputs) + len(self._outputs)

    def __call__(self, arrays: Sequence[Array]) -> list[Any]:
        given = [
            a if type(a) is np.ndarray and a.dtype == dtype and a.flags.c_contiguous and a.flags.aligned else _plain(a, dtype)
            for a, (dtype, _) in zip(arrays, self._inputs, strict=True)
        ]
        results = [np.empty(shape, dtype) for shape, dtype in self._outputs]
        arena = aligned(self._bytes, fill=self._poison) if self._bytes else results
        report = np.zeros(4, np.int64)
        table = (ctypes.c_void_p * self._slots)(
            _address(arena) if self._bytes else None, _address(report), *map(_address, given), *map(_address, results)
        )
        if self._call(table, 0, 1, None):
            evaluate(self._graph, given)  # NumPy finds which index it was, and says so
            raise DataError("an index lies outside its array")
        return results


def _plain(a: Any, dtype: Any) -> Array:
    return np.require(np.asarray(a, dtype), requirements=["C", "A"])


def _address(a: Any) -> int:
    address: int = a.__array_interface__["data"][0]
    return address


backends.add("native", NativeBackend())
