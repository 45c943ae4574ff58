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
from chainrule.compiler.pipeline import Code
from chainrule.compiler.target import Target, narrowed
from chainrule.errors import DataError
from chainrule.graph.node import Graph
from chainrule.program import Program
from chainrule.run.backend import Function, Kept, Session, Steps
from chainrule.run.machines import ENTRY, own
from chainrule.run.native import NativeBackend, NativeSession
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
        return EmulatedSession(programs, state, self, self.threads)

    def arena(self, code: Code) -> Array:
        return np.full(code.arena.bytes, self.poison, np.uint8)

    def check_arena(self, code: Code, arena: Array) -> None:
        """All of it that belongs to no buffer is as it was."""
        free = np.ones(len(arena), bool)
        for buffer, start in code.arena.offsets.items():
            free[start : start + code.arena.sizes[buffer]] = False
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


class EmulatedSession(NativeSession):
    """A native session whose steps are taken by as many threads as the backend says, all in one run of the emulator."""

    _backend: Emulated

    def _go(self, steps: Steps, layout: Any, moved: Sequence[Array], lying: Sequence[int], sources: Mapping[str, Array],
            pulse: Callable[[int], bool] | None) -> tuple[int, bool]:  # fmt: skip
        """Places what `NativeSession._go` takes from this process's memory in the emulator's."""
        backend, threads = self._backend, self._backend.threads
        codes = [self._code(name, rows, sources) for name, rows in layout.kinds]
        triple = backend.target.triple
        modules = {f"k{i}": compiled(c.text, backend.target, backend.level) for i, c in enumerate(codes)}
        modules["d"] = compiled(driver.driver_ir(triple, barrier_ir(triple), flush_ir(triple)), backend.target)
        emulator = Emulator(modules, backend.processor)
        place, address = emulator.place, emulator.address
        table = np.zeros(len(self._slots), np.int64)
        table[self._slots["step/report"]] = place(self._report)
        for name, array in (*self._state.arrays.items(), *((n, fixed(c, c.dtype)) for n, c in self._captures.items())):
            table[self._slots[name]] = place(array)
        still = [*sources.values(), *(self._numbers(k, steps.numbers[k]) for k in layout.fixed)]
        table[layout.lying] = [place(fixed(a, a.dtype)) for a in still]
        table[[slot for slot, _ in layout.unread]] = [place(np.zeros(size, np.uint8)) for _, size in layout.unread]
        inputs = len(moved) - len(layout.readers)  # the order and numbers; results come after them
        table[layout.moving] = [place(fixed(a, a.dtype) if i < inputs else a) for i, a in enumerate(moved)]
        arenas = [backend.arena(c) for c in codes]
        functions = [(address[f"k{i}.{ENTRY}_prepare"], address[f"k{i}.{ENTRY}"]) for i in range(len(codes))]
        shared = np.zeros(driver.WORDS, np.int64)
        words = {
            driver.STEPS: steps.count, driver.THREADS: threads, driver.BEFORE: -1, driver.ROUND: len(layout.which),
            driver.BARRIER: place(np.zeros(BARRIER_BYTES, np.uint8)), driver.KINDS: place(layout.which),
            driver.FUNCTIONS: place(np.array(functions, np.int64)),
            driver.ARENAS: place(np.array([place(a) for a in arenas], np.int64)),
            driver.MOVES: len(layout.moving), driver.SLOTS: place(layout.moving),
            driver.BYTES: place(layout._bytes), driver.REWOUND: place(layout._rewound),
        }  # fmt: skip
        for word, value in words.items():
            shared[word] = value
        at = place(shared)
        blocks = [place(np.array([at, t, place(table.copy())], np.int64)) for t in range(threads)]
        ends = [place(np.zeros(1, np.int64)) for _ in blocks[1:]]
        for block, end in zip(blocks[1:], ends, strict=True):
            emulator.call("spawn", address["d.run"], block, place(np.zeros(STACK, np.uint8)) + STACK, end)
        emulator.call("d.run", blocks[0])
        for end in ends:
            emulator.call("join", end)
        emulator.run()
        for code, arena in zip(codes, arenas, strict=True):
            backend.check_arena(code, arena)
        done = int(shared[driver.DONE])
        if self._report[0]:
            self._raise(steps, done)
        return done, False

    def _code(self, name: str, rows: int, sources: Mapping[str, Array]) -> Code:
        program = self._programs[rows]
        entry = program.entries[name]
        dtypes = [sources[i].dtype if program.inputs[i].rows is not None else None for i in entry.inputs]
        return self._backend._compiled(program, entry, dtypes, self._slots, storage=self._storage, threads=self._backend.threads)

    def keep(self) -> Kept | None:
        state = self._state.arrays
        copies = {name: np.zeros_like(v) for name, v in state.items()}
        module = f'target triple = "{self._backend.target.triple}"\n{driver.keep_ir()}'
        emulator = Emulator({"d": compiled(module, self._backend.target)}, self._backend.processor)
        rows = [
            (
                emulator.place(to),
                emulator.place(fixed(v, v.dtype)),
                v.nbytes,
                *driver.EXPONENTS.get(v.dtype.char, driver.NO_EXPONENT),
            )
            for to, v in zip(copies.values(), state.values(), strict=True)
        ]
        emulator.call("d.keep", emulator.place(np.array(rows, np.int64)), len(rows))
        (bad,) = emulator.run()
        return Kept(self._seen(copies)) if bad == 0 else None
