"""Machine code for AArch64, run by an emulator: for the tests, on any Linux machine that has QEMU and a linker for such code.

A module's object file is linked into a program of a few instructions (START), without a C library. All that the code reads and writes
lies in one file, which that program maps at a fixed address, so pointers in it are known beforehand and results are read from it
afterwards. What the file holds between arrays must stay as it is.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from chainrule.compiler import driver, jit
from chainrule.compiler.layout import laid_out, logical
from chainrule.compiler.pipeline import Code
from chainrule.compiler.target import Target, narrowed
from chainrule.errors import DataError
from chainrule.graph.node import DTYPES, Graph
from chainrule.program import Program
from chainrule.run.backend import Function, Session, Steps, Taken
from chainrule.run.native import ENTRY, NativeBackend, own
from chainrule.run.reference import cast
from chainrule.run.threads import BARRIER_BYTES, barrier_ir, flush_ir

Array = np.ndarray
TOOLS = {"qemu-aarch64": "qemu-user", "aarch64-linux-gnu-as": "binutils-aarch64-linux-gnu"}  # program -> Debian's package
MISSING = sorted({package for tool, package in TOOLS.items() if shutil.which(tool) is None})
TARGET = narrowed("aarch64")
PROCESSOR = "cortex-a53"  # the oldest instructions of the family: what TARGET has not traps
SECONDS = 100  # for a run
STACK = 1 << 16

BASE, SPACE, MARK = 16 << 32, 192, 0xA5  # where the file is mapped; the least number of bytes between arrays, and what they are

# The file begins with the number of calls; a call is 6 words: function, four arguments, result.
START = f"""
.globl _start, memcpy, memmove, memset, syscall, sched_yield, spawn, join
_start:
    ldr x1, [sp, #16]
    mov x0, #-100
    mov x2, #2
    mov x8, #56              // openat(AT_FDCWD, argv[1], O_RDWR)
    svc #0
    mov x19, x0
    mov x1, #0
    mov x2, #2
    mov x8, #62              // lseek(file, 0, SEEK_END)
    svc #0
    mov x1, x0
    mov x0, #{BASE >> 32}
    lsl x0, x0, #32
    mov x2, #3
    mov x3, #0x11
    mov x4, x19
    mov x5, #0
    mov x8, #222             // mmap(BASE, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, 0)
    svc #0
    mov x19, x0
    ldr x20, [x19], #8
next:
    cbz x20, finish
    ldp x9, x0, [x19]
    ldp x1, x2, [x19, #16]
    ldr x3, [x19, #32]
    blr x9
    str x0, [x19, #40]
    add x19, x19, #48
    sub x20, x20, #1
    b next
finish:
    mov x0, #0
    mov x8, #94              // exit_group
    svc #0

memmove:
    cmp x0, x1
    b.ls memcpy
    add x3, x0, x2
0:  cmp x3, x0
    b.eq 1f
    sub x2, x2, #1
    ldrb w4, [x1, x2]
    strb w4, [x3, #-1]!
    b 0b
memcpy:
    mov x3, x0
0:  cbz x2, 1f
    ldrb w4, [x1], #1
    strb w4, [x3], #1
    sub x2, x2, #1
    b 0b
memset:
    mov x3, x0
0:  cbz x2, 1f
    strb w1, [x3], #1
    sub x2, x2, #1
    b 0b
1:  ret

syscall:
    mov x8, x0
    mov x0, x1
    mov x1, x2
    mov x2, x3
    mov x3, x4
    mov x4, x5
    mov x5, x6
    svc #0
    ret
sched_yield:
    mov x8, #124
    svc #0
    ret

spawn:                       // (function, argument, end of a stack, word): a thread; the word is 0 when it has ended
    stp x0, x1, [x2, #-16]!
    mov x1, x2
    mov x2, x3
    mov x4, x3
    mov x3, #0
    mov x0, #0x0f00
    movk x0, #0x35, lsl #16  // as pthread_create has it, but for thread-local storage
    mov x8, #220             // clone
    svc #0
    cbnz x0, 1b
    ldp x9, x0, [sp], #16
    blr x9
    mov x0, #0
    mov x8, #93              // exit
    svc #0
join:                        // (word)
    ldr w1, [x0]
    cbz w1, 1b
    mov x9, x0
    mov x8, #124             // sched_yield
    svc #0
    mov x0, x9
    b join
"""


def assembled(text: str) -> bytes:
    """The object file of an assembly text."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "out.o")
        _tool("as", "-o", path, "-", given=text)
        return path.read_bytes()


@cache
def _start() -> bytes:
    return assembled(START)


@cache
def compiled(text: str, target: Target = TARGET, level: int = jit.LEVEL) -> bytes:
    """The object file of a module."""
    return jit._object(text, target, level)


def _tool(name: str, *arguments: Any, given: str | None = None) -> str:
    done = subprocess.run(
        [f"aarch64-linux-gnu-{name}", *map(str, arguments)], input=given, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


class Emulator:
    """Memory, and calls of functions in it, one after the other.

    Args:
        modules: object files; a name that several have is prefixed by their key in this mapping and a dot.
        processor: what QEMU pretends to be.
    """

    def __init__(self, modules: Mapping[str, bytes], processor: str = PROCESSOR) -> None:
        self._processor = processor
        folder = tempfile.mkdtemp(prefix="chainrule-aarch64-")
        weakref.finalize(self, shutil.rmtree, folder, True)
        self._program = Path(folder, "program")
        objects = [self._program.with_name("start.o")]
        objects[0].write_bytes(_start())
        for n, (name, code) in enumerate(modules.items()):
            plain, renamed = (self._program.with_name(f"{n}{kind}.o") for kind in ("plain", ""))
            plain.write_bytes(code)
            own_names = [line.split()[2] for line in _tool("nm", "--defined-only", "--extern-only", plain).splitlines()]
            _tool("objcopy", *(f"--redefine-sym={s}={name}.{s}" for s in own_names), plain, renamed)
            objects.append(renamed)
        _tool("ld", "-static", "-z", "noexecstack", "-o", self._program, *objects)
        lines = (line.split() for line in _tool("nm", self._program).splitlines())
        self.address = {parts[2]: int(parts[0], 16) for parts in lines if len(parts) == 3}
        self._arrays: list[tuple[int, Array]] = []
        self._calls: list[tuple[int, ...]] = []
        self._end = BASE + 4096 * 16

    def place(self, array: Array, shift: int = 0) -> int:
        """The address at which a copy of the array will lie; it gets what is there after the run. shift: bytes after a cache line."""
        start = self._end + SPACE - (self._end + SPACE) % 128 + shift
        self._arrays.append((start, array))
        self._end = start + array.nbytes
        return start

    def call(self, function: str, *arguments: int) -> None:
        """Another call; `run` makes them."""
        self._calls.append((self.address[function], *arguments, *[0] * (5 - len(arguments))))

    def run(self) -> list[int]:
        """What the calls return."""
        image = np.full(self._end + SPACE - BASE, MARK, np.uint8)
        head = np.array([len(self._calls), *(word for call in self._calls for word in call)], np.uint64)
        assert head.nbytes <= 4096 * 16, "too many calls for one run"
        image[: head.nbytes] = head.view(np.uint8)
        between = np.ones(len(image), bool)
        between[: head.nbytes] = False
        for start, array in self._arrays:
            image[start - BASE : start - BASE + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            between[start - BASE : start - BASE + array.nbytes] = False
        path = self._program.with_name("image")
        image.tofile(path)
        command = ["qemu-aarch64", "-cpu", self._processor, str(self._program), str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
        assert done.returncode == 0, f"the emulated program ended with {done.returncode}: {done.stderr}"
        image = np.fromfile(path, np.uint8)
        changed = np.flatnonzero(between & (image != MARK))
        assert not len(changed), (
            f"written beside arrays, {len(changed)} bytes: {[self._nearest(BASE + at) for at in changed[:4]]}"
        )
        for start, array in self._arrays:
            after = image[start - BASE : start - BASE + array.nbytes].view(array.dtype).reshape(array.shape)
            if array.flags.writeable:
                array[...] = after
            else:
                assert after.tobytes() == array.tobytes(), "an input was written to"
        words = image[8 : head.nbytes].view(np.uint64).reshape(-1, 6)
        return [int(w) & 0xFFFFFFFF for w in words[:, 5]]

    def _nearest(self, address: int) -> str:
        n, start = max(((n, s) for n, (s, _) in enumerate(self._arrays) if s <= address), default=(-1, BASE))
        return f"byte {address - start} of array {n}"


def fixed(array: Any, dtype: Any) -> Array:
    """A copy that code must not write to."""
    made = own(array, dtype)
    made.flags.writeable = False
    return made


# ---- a backend ---------------------------------------------------------------------------------------------------------------


class Emulated(NativeBackend):
    """The native backend for AArch64, emulated; the scratch memory holds `poison` and keeps it between the buffers. threads: how many
    run a session's steps."""

    def __init__(self, level: int = jit.LEVEL, guard: int = 64, poison: int | None = 0xFF, threads: int = 1, target: Target = TARGET,
                 processor: str = PROCESSOR) -> None:  # fmt: skip
        super().__init__(target, level, guard, 0xFF if poison is None else poison)
        self.threads, self.processor = threads, processor

    def function(self, graph: Graph) -> EmulatedFunction:
        return EmulatedFunction(self, graph)

    def session(self, programs: Mapping[int, Program], state: Mapping[str, Array], threads: int | None = None) -> Session:
        return EmulatedSession(self, programs, state)

    def arena(self, code: Code) -> Array:
        return np.full(code.arena.bytes, self.poison, np.uint8)

    def check_arena(self, code: Code, arena: Array) -> None:
        """All of it that belongs to no buffer is as it was."""
        free = np.ones(len(arena), bool)
        for buffer, start in code.arena.offsets.items():
            free[start : start + buffer.bytes] = False
        assert (arena[free] == self.poison).all(), "written between the buffers"


class EmulatedFunction(Function):
    def __init__(self, backend: Emulated, graph: Graph, last: Sequence[Array] = ()) -> None:
        self._backend, self._graph, self._last = backend, graph, last

    def bound(self, last: Sequence[Any]) -> EmulatedFunction:
        return EmulatedFunction(self._backend, self._graph, [np.array(v) for v in last])

    def __call__(self, arrays: Sequence[Any], shift: int = 0) -> list[Array]:
        """shift: elements by which every array begins after a cache line."""
        backend, graph = self._backend, self._graph
        code = backend._function(graph)
        emulator = Emulator({"m": compiled(code.text, backend.target, backend.level)}, backend.processor)
        arena, report = backend.arena(code), np.zeros(8, np.int64)
        given = [fixed(a, n.dtype) for a, n in zip((*arrays, *self._last), graph.inputs, strict=True)]
        results = [np.full(o.shape, 0x55).astype(o.dtype) for o in graph.outputs]
        places = [emulator.place(arena), emulator.place(report)]
        places += [emulator.place(a, shift * a.itemsize) for a in (*given, *results)]
        emulator.call(f"m.{ENTRY}", emulator.place(np.array(places, np.int64)), 0, 1, 0)
        (bad,) = emulator.run()
        if bad:
            raise DataError("an index lies outside its array")
        backend.check_arena(code, arena)
        return results


class EmulatedSession(Session):
    """Steps by the loop in machine code, on as many threads as the backend says, all in one run of the emulator."""

    def __init__(self, backend: Emulated, programs: Mapping[int, Program], state: Mapping[str, Array]) -> None:
        self._backend, self._programs = backend, programs
        self._shapes = {k: np.shape(v) for k, v in state.items()}
        self._state = {k: own(laid_out(np.asarray(v), backend.target), np.asarray(v).dtype) for k, v in state.items()}

    def state(self) -> dict[str, Array]:
        return {k: np.array(logical(v, self._shapes[k])) for k, v in self._state.items()}

    def call(self, rows: int, entry: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        made, known = self._programs[rows].entries[entry], self._programs[rows].inputs
        data = {i: inputs[i] for i in made.inputs if known[i].rows is not None}
        numbers = {i: np.asarray(inputs[i])[None] for i in made.inputs if known[i].rows is None}
        taken = self.run(Steps([entry], data, np.arange(rows), [rows], numbers, made.results))
        return {r: taken.results[r].reshape(o.shape) for r, o in zip(made.results, made.graph.outputs, strict=False)}

    def run(self, steps: Steps, pulse: Callable[[int], bool] | None = None) -> Taken:
        return _Run(self._backend, self._programs, self._state, steps).taken()


class _Run:
    """Everything that the loop in machine code wants, in an emulator's memory; see driver.py."""

    def __init__(self, backend: Emulated, programs: Mapping[int, Program], state: Mapping[str, Array], steps: Steps) -> None:
        self.backend, self.programs, self.steps = backend, programs, steps
        pairs = list(zip(steps.entries, map(int, steps.sizes), strict=True))
        self.kinds = list(dict.fromkeys(pairs))
        self.which = np.array([self.kinds.index(p) for p in pairs], np.int64)
        self.entries = [programs[size].entries[name] for name, size in self.kinds]
        self.data = {k: self._data(k, v) for k, v in steps.data.items()}
        self.results = list(dict.fromkeys(r for e in self.entries for r in e.results))
        names = ["arena", "report", "order", *state, *(f"in/{k}" for k in (*steps.data, *steps.numbers))]
        names += [f"out/{r}" for r in self.results]
        captured = {
            f"capture/{s}/{n}/{i}": c
            for (n, s), e in zip(self.kinds, self.entries, strict=True)
            for i, c in enumerate(e.captures)
        }
        self.slots = {name: i for i, name in enumerate([*names, *captured])}
        self.codes = [self._code(size, e) for (_, size), e in zip(self.kinds, self.entries, strict=True)]
        modules = {f"k{i}": compiled(c.text, backend.target, backend.level) for i, c in enumerate(self.codes)}
        triple = backend.target.triple
        modules["d"] = compiled(driver.driver_ir(triple, barrier_ir(triple), flush_ir(triple)), backend.target)
        self.emulator = Emulator(modules, backend.processor)
        self.table = np.zeros(len(self.slots), np.int64)
        self.report = np.zeros(8, np.int64)
        place = self.emulator.place
        for name, array in [("report", self.report), *state.items()]:
            self.table[self.slots[name]] = place(array)
        for name, array in [*((f"in/{k}", v) for k, v in self.data.items()), *captured.items()]:
            self.table[self.slots[name]] = place(fixed(array, np.asarray(array).dtype))
        self.arenas = [backend.arena(c) for c in self.codes]

    def _type(self, name: str) -> Any:
        return next(p.inputs[name] for p in self.programs.values() if name in p.inputs)

    def _data(self, name: str, value: Any) -> Array:
        array, known = np.asarray(value), self._type(name)
        return np.asarray(cast(array, known)) if known.type.dtype.kind in "iu" or array.dtype not in DTYPES else array

    def _code(self, size: int, entry: Any) -> Code:
        program = self.programs[size]
        dtypes = [self.data[i].dtype if program.inputs[i].rows is not None else None for i in entry.inputs]
        return self.backend._compiled(program, entry, dtypes, self.slots, self.backend.threads)

    def _moves(self) -> list[tuple[int, Array, Array]]:
        """(slot, memory, offset in it for each step) of the pointers that go on from step to step."""
        found = []
        for name, values in self.steps.numbers.items():
            numbers = np.stack([np.asarray(cast(np.asarray(v), self._type(name))) for v in values])
            found.append((self.slots[f"in/{name}"], numbers, np.arange(len(self.which)) * numbers[0].nbytes))
        sizes = np.array([8 * size for _, size in self.kinds], np.int64)[self.which]
        found.append((self.slots["order"], fixed(self.steps.order, np.int64), np.cumsum(sizes) - sizes))
        for name in self.results:
            kinds = [e.graph.outputs[e.results.index(name)] if name in e.results else None for e in self.entries]
            sizes = np.array([0 if o is None else o.type.size * o.dtype.itemsize for o in kinds], np.int64)[self.which]
            found.append((self.slots[f"out/{name}"], np.zeros(int(sizes.sum()), np.uint8), np.cumsum(sizes) - sizes))
        return found

    def taken(self) -> Taken:
        place, threads = self.emulator.place, self.backend.threads
        moves, address = self._moves(), self.emulator.address
        # One pointer goes on evenly, as the order of rows does where all steps have the same number, the others by lists of offsets.
        lists = [
            0 if n == 0 and len(self.kinds) == 1 else place(offsets.astype(np.int64)) for n, (_, _, offsets) in enumerate(moves)
        ]
        strides = [int(offsets[1]) if len(offsets) > 1 else 0 for _, _, offsets in moves]
        functions = [(address[f"k{i}.{ENTRY}_prepare"], address[f"k{i}.{ENTRY}"]) for i in range(len(self.codes))]
        shared = np.zeros(driver.WORDS, np.int64)
        values = {
            driver.STEPS: len(self.which), driver.THREADS: threads, driver.BEFORE: -1, driver.MOVES: len(moves),
            driver.BARRIER: place(np.zeros(BARRIER_BYTES, np.uint8)), driver.KINDS: place(self.which),
            driver.FUNCTIONS: place(np.array(functions, np.int64)),
            driver.ARENAS: place(np.array([place(a) for a in self.arenas], np.int64)),
            driver.SLOTS: place(np.array([slot for slot, _, _ in moves], np.int64)),
            driver.BASES: place(np.array([place(memory) for _, memory, _ in moves], np.int64)),
            driver.OFFSETS: place(np.array(list(zip(strides, lists, strict=True)), np.int64)),
        }  # fmt: skip
        for word, value in values.items():
            shared[word] = value
        at = place(shared)
        blocks = [place(np.array([at, t, place(self.table.copy())], np.int64)) for t in range(threads)]
        words = [place(np.zeros(1, np.int64)) for _ in blocks[1:]]
        for block, word in zip(blocks[1:], words, strict=True):
            self.emulator.call("spawn", address["d.run"], block, place(np.zeros(STACK, np.uint8)) + STACK, word)
        self.emulator.call("d.run", blocks[0])
        for word in words:
            self.emulator.call("join", word)
        self.emulator.run()
        for code, arena in zip(self.codes, self.arenas, strict=True):
            self.backend.check_arena(code, arena)
        done = int(shared[driver.DONE])
        if self.report[0]:
            raise DataError("an index lies outside its array")
        memories = [memory for _, memory, _ in moves[-len(self.results) :]] if self.results else []
        return Taken(done, {k: self._kept(k, m) for k, m in zip(self.results, memories, strict=True) if k in self.steps.keep})

    def _kept(self, name: str, memory: Array) -> Array:
        """A result of all steps: rows one after the other where it has rows, else one entry a step."""
        parts, at = [], 0
        rows: Any = None
        for kind in self.which:
            entry = self.entries[kind]
            if name in entry.results:
                node, rows = entry.graph.outputs[entry.results.index(name)], entry.result_rows[entry.results.index(name)]
                size = node.type.size * node.dtype.itemsize
                parts.append(memory[at : at + size].view(node.dtype).reshape(node.shape))
                at += size
        return np.concatenate(parts, rows) if isinstance(rows, int) else np.stack(parts)
