"""Machine code: whole runs of steps without Python.

In: programs and graphs. Out: a backend that compiles each entry to one native function when it is first needed. A run hands native
code a list of steps; it gathers rows by their numbers and runs the entry of each step. Python is entered several times a second, for
progress and Ctrl-C.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any
from weakref import ref

import numpy as np

from ..compiler import jit
from ..compiler.driver import (
    ARENAS,
    BARRIER,
    BEFORE,
    BYTES,
    CLOCKS,
    DONE,
    EXPONENTS,
    FIRST,
    FUNCTIONS,
    KINDS,
    MOST_CLOCKS,
    MOVES,
    NAMES,
    NO_EXPONENT,
    PLACE,
    REPORT,
    REWOUND,
    ROUND,
    SLOTS,
    STEPS,
    THREADS,
    WORDS,
    driver_ir,
    keep_ir,
)  # fmt: skip
from ..compiler.jit import LEVEL
from ..compiler.layout import Shape, Storage, storage_of
from ..compiler.target import Target, host
from ..errors import BudgetError, DataError
from ..graph.interpret import evaluate
from ..graph.node import DTYPES, Array, Graph, Rows
from ..program import Entry, Program
from ..recent import keep
from .backend import Backend, Kept, Session, Steps, Taken, backends
from .crew import Crew, Way
from .function import NativeFunction
from .machines import CHANGED, ENTRY, Machine, aligned, bare, identity, machine_code, own
from .pieces import Pieces, Starts
from .reference import cast
from .rounds import Last, Layout, Ready

if TYPE_CHECKING:
    from ..compiler.pipeline import Code

KEPT_LAYOUTS = 4
SHORT = 64  # so many steps are compared one by one; of more, the lists have to be the same objects

Seen = Callable[[Mapping[str, Array]], dict[str, Array]]  # a state as everybody else has it


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
                names.update(dict.fromkeys(_captures(program, entry)))
        self._slots = {name: i for i, name in enumerate([*NAMES, *names])}
        types = {n: v.type for p in programs.values() for n, v in p.state.items()}
        self._storage = storage = storage_of(programs.values(), backend.target)
        self._seen: Seen = partial(_copied, shapes={n: t.shape for n, t in types.items()}, storage=storage)
        laid_out = {n: np.asarray(storage.laid_out(np.asarray(state[n])), t.dtype) for n, t in types.items()}
        writing = [e.graph for p in programs.values() if p.memory is None for e in p.entries.values() if e.writes]
        self._state = Pieces(laid_out, self._crew.most(writing), lambda rows, count: backend.driver().keep(rows, count))
        self._captures: dict[str, Array] = {}
        for program in programs.values():
            for entry in program.entries.values():
                nodes = entry.graph.inputs[len(entry.reads) + len(entry.inputs) :]
                for name, node, value in zip(_captures(program, entry), nodes, entry.captures, strict=True):
                    self._captures[name] = own(value, node.dtype)
        self._known: dict[Any, Machine] = {}
        self._arena = aligned(0)  # scratch memory: no entry leaves there what it does not prepare anew when its turn comes again
        self._layouts: dict[Any, Layout] = {}
        self._converted: dict[str, tuple[Array, Array]] = {}
        self._checked: tuple[Array, int] | None = None  # row numbers that are smaller than this
        self._report = np.zeros(CLOCKS + (MOST_CLOCKS if backend.timed else 0), np.int64)
        self._last: Last | None = None
        self._shared, barrier = np.zeros(WORDS, np.int64), aligned(512, fill=0)
        self._barrier = (barrier, barrier.ctypes.data + -barrier.ctypes.data % 128)
        self._table = np.zeros(len(self._slots), np.int64)  # where each buffer lies, and whose turn it is
        self._table[REPORT] = self._report.ctypes.data
        for name, place in self._state.places.items():
            self._table[self._slots[name]] = place
        for name, array in self._captures.items():
            self._table[self._slots[name]] = array.ctypes.data
        self._places: dict[int, Array] = {}  # slots of results that nobody asked for -> where they go
        self._copies: list[_Copy] = []

    def _place(self, slot: int, size: int) -> None:
        """Memory for a result that nobody asked for. Each has its own, since other kernels of the step may read it from there."""
        if slot not in self._places or self._places[slot].size < size:
            self._places[slot] = aligned(size)
            self._table[slot] = self._places[slot].ctypes.data

    # ---- code ----------------------------------------------------------------------------------------------------------------

    def _machines(self, kinds: Sequence[tuple[str, int]], sources: Mapping[str, Array], units: int) -> list[Machine]:
        """Machine code for each kind of step, its work cut into `units`. Raises: `BudgetError` with the least that does for all."""
        found = []
        refused: list[BudgetError] = []
        for name, rows in kinds:
            program = self._programs[rows]
            entry = program.entries[name]
            dtypes = tuple(sources[i].dtype if program.inputs[i].rows is not None else None for i in entry.inputs)
            key = (rows, name, dtypes, units)
            if key not in self._known:
                try:
                    self._known[key] = made = self._backend.entry(
                        program, entry, dtypes, self._slots, storage=self._storage, threads=units
                    )
                except BudgetError as error:
                    refused.append(error)
                    continue
                if made.arena > self._arena.size:
                    self._arena, self._last = aligned(made.arena, fill=self._backend.poison), None
            found.append(self._known[key])
        if refused:
            raise max(refused, key=lambda e: e.least)
        return found

    def machine(self, entry: str, rows: int, data: Mapping[str, Array], units: int) -> Machine:
        """The machine code of an entry for data of these types, to be looked at."""
        return self._machines([(entry, rows)], {k: self._source(k, v) for k, v in data.items()}, units)[0]

    def cycles(self) -> Array:
        """The cycles that each kernel of a step has taken so far, in the order of the phases. Only a timed backend counts them."""
        return self._report[CLOCKS:].copy()

    # ---- running -------------------------------------------------------------------------------------------------------------

    def run(self, steps: Steps, pulse: Callable[[int], bool] | None = None) -> Taken:
        layout = self._layout(steps)
        sources = {k: self._source(k, v) for k, v in steps.data.items()}
        order = np.ascontiguousarray(steps.order, np.int64)
        self._in_range(order, sources)
        fixed, numbers = ([self._numbers(k, steps.numbers[k]) for k in names] for names in (layout.fixed, layout.numbers))
        memory = [aligned(r.bytes * steps.rounds) for r in layout.readers]
        lying = [a.ctypes.data for a in (*sources.values(), *fixed)]
        done, interrupted = self._go(steps, layout, [order, *numbers, *memory], lying, sources, pulse)
        read = {r.name: r(m, done) for r, m in zip(layout.readers, memory, strict=True)}
        return Taken(done, {k: read[k] if k in read else np.zeros(0) for k in steps.keep}, interrupted)

    def _layout(self, steps: Steps) -> Layout:
        """What is the same for all runs of such steps, made for the first of them."""
        short = len(steps.sizes) <= SHORT
        sequence = (tuple(steps.entries), tuple(steps.sizes)) if short else (id(steps.entries), id(steps.sizes))
        each = len(steps.entries)
        numbers = [(k, 1 if len(v) == 1 else each if len(v) == each else 0) for k, v in steps.numbers.items()]
        key = (sequence, steps.order.ndim, *numbers, 0, *steps.keep, 0, *steps.data)
        found = self._layouts.get(key)
        if found is None:
            found = keep(self._layouts, key, Layout(steps, self._programs, self._slots), KEPT_LAYOUTS)
            found.pace = self._crew.pace(self._programs[size].entries[name].graph for name, size in found.kinds)
        for slot, size in found.unread:
            self._place(slot, size)
        return found

    def _source(self, name: str, value: Array) -> Array:
        """Data as native code can gather it: contiguous, of a type it knows, indices checked."""
        known = next(p.inputs[name] for p in self._programs.values() if name in p.inputs).type.dtype
        if type(value) is np.ndarray and value.dtype == known and (flags := value.flags).c_contiguous and flags.aligned:
            return value
        array = np.asarray(value)
        if known.kind in "iu" or array.dtype not in DTYPES or not array.dtype.isnative:
            array = cast(array, next(p.inputs[name] for p in self._programs.values() if name in p.inputs))
        return np.require(array, requirements=["C", "A"])

    def _numbers(self, name: str, value: Array) -> Array:
        """One number for each step, of the type that the program wants. What is the same object is the same numbers."""
        given, found = self._converted.get(name, (None, None))
        if given is not value or found is None:
            known = next(p.inputs[name] for p in self._programs.values() if name in p.inputs)
            found = np.require(cast(np.asarray(value), known), requirements=["C", "A"])
            self._converted[name] = (value, found)
        return found

    def _in_range(self, order: Array, sources: Mapping[str, Array]) -> None:
        if not sources or not order.size:
            return
        least = min([len(v) for v in sources.values()])
        if self._checked is not None and self._checked[0] is order and self._checked[1] <= least:
            return
        if order.view(np.uint64).max() >= least:  # a negative number is a large one
            raise DataError(f"row {order.max() if order.max() >= least else order.min()} of {least} rows")
        self._checked = (order, least)

    def _go(self, steps: Steps, layout: Layout, moved: Sequence[Array], lying: Sequence[int], sources: Mapping[str, Array],
            pulse: Callable[[int], bool] | None) -> tuple[int, bool]:  # fmt: skip
        """Slices of steps in native code until all are taken; between them Python looks for Ctrl-C. moved: arrays in which pointers go
        on; lying: addresses of those that are read from their beginning in each step."""
        bases = np.array([a.ctypes.data for a in moved], np.int64)
        words = self._words(layout)
        self._report[:CLOCKS] = 0
        filled: set[Way] = set()
        at, count, interrupted = 0, steps.count, False
        crew, pace = self._crew, layout.pace
        self._shared[DONE] = 0
        try:
            while at < count:
                way = crew.way(pace, count - at)
                until = at + crew.steps(pace, way, count - at)
                ready = self._ready(layout, way, sources)
                if way not in filled:
                    filled.add(way)
                    ready.fill(self._table, layout.lying, lying)
                words[FIRST], words[STEPS], words[THREADS], words[DONE] = at, until, way.threads, at
                ready.fill(None, layout.moving, bases + layout.offsets(at) if at else bases)
                took = self._slice(ready, layout, words)
                taken, at = int(self._shared[DONE]) - at, int(self._shared[DONE])
                if self._report[0]:
                    self._raise(steps, at)
                if taken:
                    self._last = Last(ready.machines[int(layout.which[(at - 1) % len(layout.which)])], way.threads)
                crew.took(pace, way, taken, took)
                if pulse is not None and not pulse(at):
                    break
        except KeyboardInterrupt:
            at, interrupted = int(self._shared[DONE]), True
        return at, interrupted

    def _words(self, layout: Layout) -> list[int]:
        """What threads share, as far as it is the same in all slices of a run."""
        words = [0] * WORDS
        words[BARRIER], words[ROUND] = self._barrier[1], len(layout.which)
        words[KINDS], words[MOVES], words[SLOTS], words[BYTES], words[REWOUND] = layout.words
        return words

    def _slice(self, ready: Ready, layout: Layout, words: list[int]) -> float:
        """The steps of one slice; how many seconds they took. What is not known any more if they end in the middle, such as whose copies
        of the state are true, is forgotten before."""
        run = self._backend.driver().run
        words[FUNCTIONS], words[ARENAS] = ready.words
        words[PLACE] = place = words[FIRST] % len(layout.which)
        words[BEFORE] = ready.begin(int(layout.which[place]), self._arena.ctypes.data, self._last)
        self._last = None
        self._state.part(ready.starts)
        self._shared[:] = words
        begun = time.perf_counter()
        run(ready.arguments)
        return time.perf_counter() - begun

    def _ready(self, layout: Layout, way: Way, sources: Mapping[str, Array]) -> Ready:
        """What it takes to go this way: code for the data's types above all."""
        key = (way, *[a.dtype for a in sources.values()])
        found = layout.ready.get(key)
        if found is None:
            machines = self._machines(layout.kinds, sources, way.units)
            found = layout.ready[key] = Ready(machines, way.threads, self._shared, self._slots)
        return found

    def _raise(self, steps: Steps, at: int) -> None:
        """An index of step `at` lies outside its array: let NumPy find which, and say so. The state is as that step found it."""
        self._report[:] = 0
        name, size, rows, numbers = next(islice(steps.each(), at, None))
        program = self._programs[size]
        entry = program.entries[name]
        given = {k: np.asarray(v)[rows] for k, v in steps.data.items()} | numbers
        state = self.state()
        values = [*(state[n] for n in entry.reads), *(cast(given[i], program.inputs[i]) for i in entry.inputs)]
        evaluate(entry.graph, values)
        raise DataError(CHANGED)

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
        return self._seen(self._state.join())

    def keep(self) -> Kept | None:
        copy = next((c for c in self._copies if c.free), None)
        if copy is None:
            self._copies.append(copy := _Copy(self._state, self._seen))
        return copy.kept() if self._backend.driver().keep(*copy.arguments()) == 0 else None


class _Copy:
    """Memory for a copy of a state. It serves again when nobody holds what was kept in it: to fill fresh memory takes several times as
    long, since the operating system has to find and clear it."""

    def __init__(self, state: Pieces, seen: Seen) -> None:
        self.arrays = {name: aligned(v.size, v.dtype).reshape(v.shape) for name, v in state.arrays.items()}
        self._places = [a.ctypes.data for a in self.arrays.values()]
        self._state, self._seen = state, seen
        self._holder: Callable[[], Kept | None] = lambda: None
        self._made: tuple[Mapping[str, Starts] | None, Array] = (None, np.zeros((0, 5), np.int64))

    def arguments(self) -> tuple[int, int]:
        """The rows of `keep_ir`, and how many: one for each piece of the state as it lies now."""
        starts, rows = self._made
        if starts is not self._state.starts:
            self._made = starts, rows = self._state.starts, self._rows()  # both at once, whenever a Ctrl-C comes
        return rows.ctypes.data, len(rows)

    def _rows(self) -> Array:
        rows = [
            (to + start, self._state.places[name] + place, size, *EXPONENTS.get(array.dtype.char, NO_EXPONENT))
            for to, (name, array) in zip(self._places, self.arrays.items(), strict=True)
            for start, place, size in self._state.pieces(name)
        ]
        return np.array(rows, np.int64)

    @property
    def free(self) -> bool:
        return self._holder() is None

    def kept(self) -> Kept:
        made = _NativeKept(self.arrays, self._seen)
        self._holder = ref(made)
        return made


class _NativeKept(Kept):
    """A state in memory that a session uses again when this is gone."""

    def __init__(self, arrays: Mapping[str, Array], seen: Seen) -> None:
        super().__init__(arrays)
        self._seen = seen

    def arrays(self) -> dict[str, Array]:
        return self._seen(self._arrays)


def _copied(state: Mapping[str, Array], shapes: Mapping[str, Shape], storage: Storage) -> dict[str, Array]:
    """A state as everybody else has it, in memory of its own."""
    found = {name: storage.logical(v, shapes[name]) for name, v in state.items()}
    return {name: v.copy() if np.may_share_memory(v, state[name]) else v for name, v in found.items()}


def _captures(program: Program, entry: Entry) -> tuple[str, ...]:
    """What the table of pointers calls the arrays that an entry took from outside."""
    count = len(entry.graph.inputs) - len(entry.reads) - len(entry.inputs)
    return tuple(f"capture/{program.rows}/{entry.name}/{at}" for at in range(count))


_Keep = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64)


@dataclass(frozen=True)
class Driver:
    """run: takes the threads of a run through its steps, one for each argument block; keep: see `keep_ir`."""

    run: Callable[[Sequence[int]], None]
    keep: Callable[[int, int], int]


class NativeBackend(Backend):
    """Compiled for the processor it runs on. target, level: for tests; guard, poison: bytes between buffers, and what fills them."""

    name = "native"

    def __init__(
        self, target: Target | None = None, level: int = LEVEL, guard: int = 0, poison: int | None = None, timed: bool = False
    ) -> None:
        self._target, self.level, self.guard, self.poison, self.timed = target, level, guard, poison, timed
        self._driver: Driver | None = None

    @property
    def target(self) -> Target:
        return self._target or host()

    def session(self, programs: Mapping[int, Program], state: Mapping[str, Array], threads: int | None = None) -> Session:
        return NativeSession(programs, state, self, threads)

    def entry(
        self, program: Program, entry: Entry, dtypes: Sequence[Any], slots: Mapping[str, int], *, storage: Storage, threads: int
    ) -> Machine:
        """Machine code for one entry, its rows gathered from data of these types. storage: how the state lies."""
        along = tuple(program.state[n].rows for n in (*entry.reads, *entry.writes))
        key = ("entry", self.target, self.level, self.guard, self.timed,
               identity(entry.graph), entry.reads, entry.inputs, _captures(program, entry), entry.results, entry.writes, along,
               program.rows, dtypes, tuple(slots.items()), storage.transposed, threads, program.memory)  # fmt: skip
        plain, alone = replace(entry, graph=bare(entry.graph)), replace(program, entries={})
        return machine_code(
            key, lambda: self._compiled(alone, plain, dtypes, slots, storage=storage, threads=threads), self.target, self.level
        )

    def _compiled(
        self, program: Program, entry: Entry, dtypes: Sequence[Any], slots: Mapping[str, int], *, storage: Storage, threads: int
    ) -> Code:
        from ..compiler.kernels import Buffer
        from ..compiler.pipeline import Given, compile_graph
        from .threads import barrier_ir

        state = {
            n: Buffer(n, program.state[n].type.shape, program.state[n].type.dtype, "state") for n in (*entry.reads, *entry.writes)
        }
        inputs = [Given(state[n]) for n in entry.reads]
        rows: list[Rows] = [program.state[n].rows for n in entry.reads]
        for n, dtype in zip(entry.inputs, dtypes, strict=True):
            known = program.inputs[n]
            buffer = Buffer(f"in/{n}", known.type.shape, dtype or known.type.dtype, "input")
            inputs.append(Given(buffer, program.rows if known.rows is not None else 0))
            rows.append(known.rows)
        for name, node in zip(_captures(program, entry), entry.graph.inputs[len(inputs) :], strict=True):
            inputs.append(Given(Buffer(name, node.shape, node.dtype, "input")))
            rows.append(None)
        results = [
            Buffer(f"out/{r}", o.shape, o.dtype, "result") for r, o in zip(entry.results, entry.graph.outputs, strict=False)
        ]
        outputs = [*results, *(state[w] for w in entry.writes)]
        barrier = barrier_ir(self.target.triple) if threads > 1 else ""
        return compile_graph(
            ENTRY, entry.graph, inputs, outputs, list(state.values()), slots, rows, self.target, threads=threads,
            guard=self.guard, barrier=barrier, timed=self.timed, memory=program.memory, storage=storage,
        )  # fmt: skip

    def driver(self) -> Driver:
        """What is the same for all programs."""
        if self._driver is None:
            from .threads import barrier_ir, flush_ir, pool

            triple = self.target.triple
            loaded = jit.compile_module(driver_ir(triple, barrier_ir(triple), flush_ir(triple)) + keep_ir(), self.target)
            address, keep = loaded.address("run"), _Keep(loaded.address("keep"))

            def run(arguments: Sequence[int], loaded: Any = loaded) -> None:
                pool().run(address, arguments)

            self._driver = Driver(run, keep)
        return self._driver

    def function(self, graph: Graph) -> NativeFunction:
        key = ("function", self.target, self.level, self.guard, identity(graph))
        plain = bare(graph)
        return NativeFunction(machine_code(key, lambda: self._function(plain), self.target, self.level), graph, self.poison)

    def _function(self, graph: Graph) -> Code:
        from ..compiler.kernels import Buffer
        from ..compiler.pipeline import Given, compile_graph

        inputs = [Given(Buffer(f"in{i}", n.shape, n.dtype, "input")) for i, n in enumerate(graph.inputs)]
        outputs = [Buffer(f"out{i}", o.shape, o.dtype, "result") for i, o in enumerate(graph.outputs)]
        slots = {b.name: i for i, b in enumerate([*(g.buffer for g in inputs), *outputs], 2)}
        return compile_graph(ENTRY, graph, inputs, outputs, [], slots, [None] * len(inputs), self.target, guard=self.guard)


backends.add("native", NativeBackend())
