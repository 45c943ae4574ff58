"""Machine code: whole runs of steps without Python.

In: programs and graphs. Out: a backend that compiles each entry to one native function when it is first needed. A run hands native
code a list of steps; it gathers rows by their numbers and runs the entry of each step. Python is entered several times a second, for
progress and Ctrl-C.
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, ref

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
    NO_EXPONENT,
    ORDER,
    PLACE,
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
from ..compiler.schedule import APART
from ..compiler.target import Target, host
from ..errors import BudgetError, DataError
from ..graph.interpret import evaluate
from ..graph.node import DTYPES, Array, Graph, Rows
from ..normalize import graph_key
from ..program import Entry, Program
from ..recent import keep, recall
from .backend import Backend, Function, Kept, Session, Steps, Taken, backends
from .crew import Crew, Pace, Way
from .reference import cast

if TYPE_CHECKING:
    from ..compiler.pipeline import Code

ENTRY = "entry"  # what a module calls its function
KEPT_FUNCTIONS = 256
KEPT_LAYOUTS = 4
SHORT = 64  # so many steps are compared one by one; of more, the lists have to be the same objects
LINE = 16  # words of two cache lines, which some processors fetch together
KEPT_ARENA = 2**20  # bytes of scratch memory that a function keeps for its next call
CHANGED = "an index lay outside its array and no longer does: something, such as another thread, changes the data meanwhile"


class Machine:
    """One entry as machine code. arena: bytes of scratch memory; anew: compiles it once more, with the texts of all stages."""

    def __init__(self, loaded: Any, arena: int, anew: Callable[[], Code]) -> None:
        self.loaded, self.arena, self.anew = loaded, arena, anew
        self.address, self.prepare = loaded.address(ENTRY), loaded.address(f"{ENTRY}_prepare")

    @cached_property
    def code(self) -> Code:
        """All stages, made when they are first asked for: the texts take more memory than the code."""
        return self.anew()


_machines: dict[Any, Machine] = {}
_identities: WeakKeyDictionary[Graph, Any] = WeakKeyDictionary()


def _machine(key: Any, make: Callable[[], Code], target: Target, level: int) -> Machine:
    """The machine code for a key: made once in this process, and kept on the disk for the next."""
    known = recall(_machines, key)
    if known is not None:
        return known
    name = jit.program_key(key)
    found = jit.load(name, target, level=level) if name is not None else None
    if found is not None:
        loaded, meta = found
        made = Machine(loaded, int(meta), make)
    else:
        with _collector_paused():
            code = make()
        size = code.arena.bytes
        loaded = jit.compile_module(code.text, target, level=level, key=name, meta=b"%d" % size)
        made = Machine(loaded, size, make)
    return keep(_machines, key, made, KEPT_FUNCTIONS)


@contextmanager
def _collector_paused() -> Iterator[None]:
    """The passes make some ten thousand objects, all of which they keep; to look through them for garbage again and again takes a
    seventh of their time. Where threads overlap, the one that found the collector at work sets it to work again."""
    working = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if working:
            gc.enable()


def _identity(graph: Graph) -> Any:
    """What is equal for graphs that compute the same. A digest, since the whole key is long and looked up for each session."""
    found = _identities.get(graph)
    if found is None:
        key = graph_key(graph)
        found = _identities[graph] = jit.told(key) or key
    return found


def _bare(graph: Graph) -> Graph:
    """The graph without the arrays it took from outside: nobody shall keep them who does not need them."""
    return Graph(graph.inputs, graph.outputs, (), graph.name)


def aligned(size: int, dtype: Any = np.uint8, fill: int | None = None) -> Array:
    """An array of `size` elements that begins at a cache line, and memory of nobody behind it: threads write parts of such arrays, and a
    core that reads ahead of its own part would take lines from another."""
    dtype = np.dtype(dtype)
    memory = np.empty(size * dtype.itemsize + 64 + APART, np.uint8)
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
        self._slots = {name: i for i, name in enumerate(["arena", "report", ORDER, *names])}
        types = {n: v.type for p in programs.values() for n, v in p.state.items()}
        self._storage = storage = storage_of(programs.values(), backend.target)
        self._seen: Seen = partial(_copied, shapes={n: t.shape for n, t in types.items()}, storage=storage)
        self._state = {n: own(storage.laid_out(np.asarray(state[n])), t.dtype) for n, t in types.items()}  # as it lies in memory
        self._captures: dict[str, Array] = {}
        for program in programs.values():
            for entry in program.entries.values():
                nodes = entry.graph.inputs[len(entry.reads) + len(entry.inputs) :]
                for name, node, value in zip(_captures(program, entry), nodes, entry.captures, strict=True):
                    self._captures[name] = own(value, node.dtype)
        self._known: dict[Any, Machine] = {}
        self._arena = aligned(0)  # scratch memory: no entry leaves there what it does not prepare anew when its turn comes again
        self._layouts: dict[Any, _Layout] = {}
        self._converted: dict[str, tuple[Array, Array]] = {}
        self._checked: tuple[Array, int] | None = None  # row numbers that are smaller than this
        self._report = np.zeros(CLOCKS + (MOST_CLOCKS if backend.timed else 0), np.int64)
        self._last: Machine | None = None  # whose copies of the state are those of the state as it is
        self._shared, barrier = np.zeros(WORDS, np.int64), aligned(512, fill=0)
        self._barrier = (barrier, barrier.ctypes.data + -barrier.ctypes.data % 128)
        self._table = np.zeros(len(self._slots), np.int64)  # where each buffer lies
        self._table[1] = self._report.ctypes.data
        for name, array in (*self._state.items(), *self._captures.items()):
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

    def _layout(self, steps: Steps) -> _Layout:
        """What is the same for all runs of such steps, made for the first of them."""
        short = len(steps.sizes) <= SHORT
        sequence = (tuple(steps.entries), tuple(steps.sizes)) if short else (id(steps.entries), id(steps.sizes))
        each = len(steps.entries)
        numbers = [(k, 1 if len(v) == 1 else each if len(v) == each else 0) for k, v in steps.numbers.items()]
        key = (sequence, steps.order.ndim, *numbers, 0, *steps.keep, 0, *steps.data)
        found = self._layouts.get(key)
        if found is None:
            found = keep(self._layouts, key, _Layout(steps, self._programs, self._slots), KEPT_LAYOUTS)
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

    def _go(self, steps: Steps, layout: _Layout, moved: Sequence[Array], lying: Sequence[int], sources: Mapping[str, Array],
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
                    self._last = ready.machines[int(layout.which[(at - 1) % len(layout.which)])]
                crew.took(pace, way, taken, took)
                if pulse is not None and not pulse(at):
                    break
        except KeyboardInterrupt:
            at, interrupted = int(self._shared[DONE]), True
        return at, interrupted

    def _words(self, layout: _Layout) -> list[int]:
        """What threads share, as far as it is the same in all slices of a run."""
        words = [0] * WORDS
        words[BARRIER], words[ROUND] = self._barrier[1], len(layout.which)
        words[KINDS], words[MOVES], words[SLOTS], words[BYTES], words[REWOUND] = layout.words
        return words

    def _slice(self, ready: _Ready, layout: _Layout, words: list[int]) -> float:
        """The steps of one slice; how many seconds they took. What is not known any more if they end in the middle, such as whose copies
        of the state are true, is forgotten before."""
        run = self._backend.driver().run
        words[FUNCTIONS], words[ARENAS] = ready.words
        words[PLACE] = place = words[FIRST] % len(layout.which)
        words[BEFORE] = ready.begin(int(layout.which[place]), self._arena.ctypes.data, self._last)
        self._last = None
        self._shared[:] = words
        begun = time.perf_counter()
        run(ready.arguments)
        return time.perf_counter() - begun

    def _ready(self, layout: _Layout, way: Way, sources: Mapping[str, Array]) -> _Ready:
        """What it takes to go this way: code for the data's types above all."""
        key = (way, *[a.dtype for a in sources.values()])
        found = layout.ready.get(key)
        if found is None:
            machines = self._machines(layout.kinds, sources, way.units)
            found = layout.ready[key] = _Ready(machines, way.threads, self._shared, len(self._table))
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
        return self._seen(self._state)

    def keep(self) -> Kept | None:
        copy = next((c for c in self._copies if c.free), None)
        if copy is None:
            self._copies.append(copy := _Copy(self._state, self._seen))
        return copy.kept() if self._backend.driver().keep(*copy.arguments) == 0 else None


class _Copy:
    """Memory for a copy of a state. It serves again when nobody holds what was kept in it: to fill fresh memory takes several times as
    long, since the operating system has to find and clear it."""

    def __init__(self, state: Mapping[str, Array], seen: Seen) -> None:
        self.arrays = {name: aligned(v.size, v.dtype).reshape(v.shape) for name, v in state.items()}
        self._seen = seen
        self._holder: Callable[[], Kept | None] = lambda: None
        rows = np.zeros((len(state), 5), np.int64)
        for row, to, value in zip(rows, self.arrays.values(), state.values(), strict=True):
            row[:3] = to.ctypes.data, value.ctypes.data, value.nbytes
            row.view(np.uint32)[6:] = EXPONENTS.get(str(value.dtype), NO_EXPONENT)
        self._rows = rows
        self.arguments = (rows.ctypes.data, len(rows))

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


@dataclass(frozen=True)
class Driver:
    """run: takes the threads of a run through its steps, one for each argument block; keep: see `keep_ir`."""

    run: Callable[[Sequence[int]], None]
    keep: Callable[[int, int], int]


class _Ready:
    """What a number of threads needs to enter native code."""

    def __init__(self, machines: Sequence[Machine], threads: int, shared: Array, slots: int) -> None:
        self.machines = machines
        self._functions = np.array([(m.prepare, m.address) for m in machines], np.int64)
        self._arenas = np.zeros(len(machines), np.int64)
        self.words = (self._functions.ctypes.data, self._arenas.ctypes.data)
        line = -(-slots // LINE) * LINE  # each thread writes to a table of its own, in cache lines of its own
        self._tables = aligned(threads * line, np.int64).reshape(threads, line)[:, :slots]
        self._blocks = [np.array([shared.ctypes.data, t, own.ctypes.data], np.int64) for t, own in enumerate(self._tables)]
        self.arguments = [b.ctypes.data for b in self._blocks]

    def begin(self, kind: int, arena: int, last: Machine | None) -> int:
        """Work in this memory. Returns the kind of the first step if the last one was of it too, so that what it has prepared holds."""
        self._tables[:, 0] = self._arenas[:] = arena
        return kind if self.machines[kind] is last else -1

    def fill(self, table: Array | None, slots: Array, pointers: Sequence[int] | Array) -> None:
        """Where all buffers lie: as in `table`, if that is given, but for those in `slots`."""
        if table is not None:
            self._tables[:] = table
        self._tables[:, slots] = pointers


class _Layout:
    """What is the same for all runs of the same rounds: the kinds of steps, and how pointers go on from step to step.

    which: the kind of each step of a round; lying: the slots of what does not move, data and `fixed`, the numbers that are the same in
    all steps; moving: the slots of what does: the order, `numbers`, and the results that are kept, which `readers` read; unread: slots
    and bytes of the others; pace: what is known of how long its steps take.
    """

    def __init__(self, steps: Steps, programs: Mapping[int, Program], slots: Mapping[str, int]) -> None:
        self._held = (steps.entries, steps.sizes)  # so that no other lists come to lie where they do
        self.kinds, self.which = _kinds(steps)
        self.ready: dict[Any, _Ready] = {}
        self.pace = Pace(0.0)
        entries = [programs[size].entries[name] for name, size in self.kinds]
        inputs = {
            name: programs[e_size].inputs[name].type
            for e, (_, e_size) in zip(entries, self.kinds, strict=True)
            for name in e.inputs
        }
        read = [k for k in steps.numbers if k in inputs]
        self.fixed = [k for k in read if len(steps.numbers[k]) == 1]
        self.numbers = [k for k in read if len(steps.numbers[k]) != 1]
        self.lying = np.array([slots[f"in/{k}"] for k in (*steps.data, *self.fixed)], np.int64)
        self._counts = np.bincount(self.which, minlength=len(self.kinds))
        sizes = np.array([size for _, size in self.kinds], np.int64)
        every, each = np.ones(len(sizes), np.int64), len(self.which)
        moves = [(slots[ORDER], 8 * sizes, steps.order.ndim == 1)]
        for k in self.numbers:
            moves.append((slots[f"in/{k}"], every * inputs[k].size * inputs[k].dtype.itemsize, len(steps.numbers[k]) == each))
        self.readers: list[_Reader] = []
        self.unread: list[tuple[int, int]] = []
        for result in dict.fromkeys(r for e in entries for r in e.results):
            reader = _reader(result, entries, self.which)
            if result in steps.keep:
                self.readers.append(reader)
                moves.append((slots[f"out/{result}"], reader.sizes, False))
            else:
                self.unread.append((slots[f"out/{result}"], int(reader.sizes.max(initial=1))))
        self.moving = np.array([slot for slot, _, _ in moves], np.int64)
        self._bytes = np.stack([bytes for _, bytes, _ in moves], axis=1)  # (kinds, moves)
        # A round ends where the next one begins: by then all that it went on, or none of it if rounds have the same.
        self._round = self._counts @ self._bytes * [not again for _, _, again in moves]
        before = (self._counts - np.eye(len(sizes), dtype=np.int64)[self.which[-1:]].sum(axis=0)) @ self._bytes
        self._rewound = self._round - before
        self.words = tuple(a.ctypes.data if isinstance(a, np.ndarray) else a
                           for a in (self.which, len(moves), self.moving, self._bytes, self._rewound))  # fmt: skip

    def offsets(self, at: int) -> Array:
        """How far the pointers of what moves have gone before step `at`."""
        turn, place = divmod(at, len(self.which))
        return turn * self._round + np.bincount(self.which[:place], minlength=len(self.kinds)) @ self._bytes


@dataclass(frozen=True)
class _Reader:
    """Reads a result out of the memory to which steps wrote it. bytes: what all of a round write; found: for each kind of step the
    result's node, None if it has none; sizes: the bytes of each; which: the kind of each step of a round."""

    name: str
    bytes: int
    found: Sequence[Any]
    sizes: Array
    which: Array
    rows: Rows

    def __call__(self, memory: Array, done: int) -> Array:
        """The results of the steps that were taken."""
        taken = [done] if len(self.found) == 1 else np.bincount(np.resize(self.which, done), minlength=len(self.found)).tolist()
        count = sum(n for n, f in zip(taken, self.found, strict=True) if f is not None)
        if not count:
            return np.zeros(0)
        node = next(n for n in self.found if n is not None)
        used: Array = memory[: sum(map(int.__mul__, taken, self.sizes.tolist()))].view(node.dtype)
        if not isinstance(self.rows, int):
            return used.reshape(count, *node.shape)
        if self.rows == 0:
            return used.reshape(-1, *node.shape[1:])
        parts, at = [], 0
        for kind in np.resize(self.which, done):
            if (one := self.found[kind]) is not None:
                parts.append(used[at : at + one.type.size].reshape(one.shape))
                at += one.type.size
        return np.concatenate(parts, self.rows)


def _reader(result: str, entries: Sequence[Entry], which: Array) -> _Reader:
    """entries: that of each kind of step."""
    found = [e.graph.outputs[e.results.index(result)] if result in e.results else None for e in entries]
    sizes = np.array([n.type.size * n.dtype.itemsize if n is not None else 0 for n in found], np.int64)
    rows = next(e.result_rows[e.results.index(result)] for e in entries if result in e.results)
    return _Reader(result, int(sizes @ np.bincount(which, minlength=len(entries))), found, sizes, which, rows)


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


def _factors(programs: Iterable[Program]) -> set[Shape]:
    """The shapes of state that products read, and nothing looks up."""
    found: dict[str, set[Shape]] = {"contract": set(), "take": set()}
    for entry in (e for p in programs for e in p.entries.values()):
        state = set(entry.graph.inputs[: len(entry.reads)])
        for node in entry.graph.nodes():
            found.get(node.op, set()).update(a.shape for a in node.args if a in state)
    return found["contract"] - found["take"]


def _captures(program: Program, entry: Entry) -> tuple[str, ...]:
    """What the table of pointers calls the arrays that an entry took from outside."""
    count = len(entry.graph.inputs) - len(entry.reads) - len(entry.inputs)
    return tuple(f"capture/{program.rows}/{entry.name}/{at}" for at in range(count))


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
               _identity(entry.graph), entry.reads, entry.inputs, _captures(program, entry), entry.results, entry.writes, along,
               program.rows, dtypes, tuple(slots.items()), storage.transposed, threads, program.memory)  # fmt: skip
        bare, alone = replace(entry, graph=_bare(entry.graph)), replace(program, entries={})
        return _machine(
            key, lambda: self._compiled(alone, bare, dtypes, slots, storage=storage, threads=threads), self.target, self.level
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
        key = ("function", self.target, self.level, self.guard, _identity(graph))
        bare = _bare(graph)
        return NativeFunction(_machine(key, lambda: self._function(bare), self.target, self.level), graph, self.poison)

    def _function(self, graph: Graph) -> Code:
        from ..compiler.kernels import Buffer
        from ..compiler.pipeline import Given, compile_graph

        inputs = [Given(Buffer(f"in{i}", n.shape, n.dtype, "input")) for i, n in enumerate(graph.inputs)]
        outputs = [Buffer(f"out{i}", o.shape, o.dtype, "result") for i, o in enumerate(graph.outputs)]
        slots = {b.name: i for i, b in enumerate([*(g.buffer for g in inputs), *outputs], 2)}
        return compile_graph(ENTRY, graph, inputs, outputs, [], slots, [None] * len(inputs), self.target, guard=self.guard)


_Keep = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64)
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


backends.add("native", NativeBackend())
