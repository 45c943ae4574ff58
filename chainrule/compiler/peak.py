"""What the processor can do: its rate of multiply-adds, the bytes a second that it moves, and its counter of cycles.

In: a type and a number of threads. Out: rates, measured by short loops in machine code that do nothing else. The rate of multiply-adds
is that of independent ones on registers, as wide as the processor's vectors: no program of this arithmetic is faster. Bytes are moved
by a loop that copies, once for each level of cache and once for memory; bytes read and bytes written both count.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from . import jit
from .target import Target, host

CHAINS = 12  # independent sums: a multiply-add takes 4 cycles and two start in each; 12 and two factors fit 16 registers
UNROLLED = 4  # vectors that one turn of the copying loop moves
NAMES = {"float32": ("float", "f32", 4), "float64": ("double", "f64", 8)}  # in LLVM's words, and bytes
LARGEST = 256 * 2**20  # bytes of the largest copy, both ends together: a larger cache than that is taken for memory
SPIN = """
define {t} @spin(i64 %n, {t} %factor, {t} %start) "prefer-vector-width"="{bits}" "min-legal-vector-width"="{bits}" {{
entry:
  %f0 = insertelement {v} poison, {t} %factor, i32 0
  %f = shufflevector {v} %f0, {v} poison, <{lanes} x i32> zeroinitializer
  %s0 = insertelement {v} poison, {t} %start, i32 0
  %s = shufflevector {v} %s0, {v} poison, <{lanes} x i32> zeroinitializer
{starts}
  br label %loop
loop:
  %i = phi i64 [ 0, %entry ], [ %next, %loop ]
{phis}
{steps}
  %next = add i64 %i, 1
  %more = icmp ult i64 %next, %n
  br i1 %more, label %loop, label %end
end:
{sums}
  %r = extractelement {v} %t{last}, i32 0
  ret {t} %r
}}
declare {v} @llvm.fma.v{lanes}{short}({v}, {v}, {v})
"""
COPY = """
define void @copy(ptr %to, ptr %from, i64 %n, i64 %times) "prefer-vector-width"="{bits}" "min-legal-vector-width"="{bits}" {{
entry:
  br label %again
again:
  %k = phi i64 [ 0, %entry ], [ %k1, %done ]
  br label %loop
loop:
  %i = phi i64 [ 0, %again ], [ %next, %loop ]
{moves}
  %next = add i64 %i, {unrolled}
  %more = icmp ult i64 %next, %n
  br i1 %more, label %loop, label %done
done:
  %k1 = add i64 %k, 1
  %repeat = icmp ult i64 %k1, %times
  br i1 %repeat, label %again, label %end
end:
  ret void
}}
"""
CYCLES = """
declare i64 @llvm.readcyclecounter()
define i64 @cycles() {
  %now = call i64 @llvm.readcyclecounter()
  ret i64 %now
}
define i64 @reading() {
  %first = call i64 @llvm.readcyclecounter()
  %second = call i64 @llvm.readcyclecounter()
  %took = sub i64 %second, %first
  ret i64 %took
}
"""


# ---- arithmetic --------------------------------------------------------------------------------------------------------------


@cache
def kernel(dtype: str = "float32") -> tuple[Callable[..., Any], float, str]:
    """The loop as a function (n, factor, start), its operations for each n, and the vectors it uses."""
    target = host()
    scalar = ctypes.c_float if dtype == "float32" else ctypes.c_double
    lanes = target.vector_bytes // NAMES[dtype][2]
    spin = _function(spin_ir(target, dtype), "spin", scalar, ctypes.c_int64, scalar, scalar)
    kind = f"{8 * target.vector_bytes}-bit {'multiply-add' if target.fma else 'multiply and add'}"
    return spin, 2.0 * lanes * CHAINS, kind


def spin_ir(target: Target, dtype: str) -> str:
    """LLVM IR of the loop of multiply-adds."""
    name, short, size = NAMES[dtype]
    lanes = target.vector_bytes // size
    v = f"<{lanes} x {name}>"

    def step(i: int) -> str:
        if target.fma:
            return f"  %x{i} = call {v} @llvm.fma.v{lanes}{short}({v} %a{i}, {v} %f, {v} %s)"
        return f"  %m{i} = fmul {v} %a{i}, %f\n  %x{i} = fadd {v} %m{i}, %s"

    # Each chain starts elsewhere, or a compiler could see that they are one.
    starts = (f"  %c{i} = fmul {v} %s, <{', '.join([f'{name} {float(i + 1)}'] * lanes)}>" for i in range(CHAINS))
    return SPIN.format(
        t=name, v=v, lanes=lanes, short=short, bits=8 * target.vector_bytes, last=CHAINS - 1, starts="\n".join(starts),
        phis="\n".join(f"  %a{i} = phi {v} [ %c{i}, %entry ], [ %x{i}, %loop ]" for i in range(CHAINS)),
        steps="\n".join(step(i) for i in range(CHAINS)),
        sums="\n".join(f"  %t{i} = fadd {v} %x{i}, {f'%t{i - 1}' if i else '%s'}" for i in range(CHAINS)),
    )  # fmt: skip


def measure(threads: int, seconds: float = 0.01, repeats: int = 3, dtype: str = "float32") -> float:
    """Floating-point operations a second on this many threads, the best of a few short runs; a multiply-add is two."""
    function, operations, _ = kernel(dtype)
    n = _times(lambda n: function(n, 0.5, 1.0), seconds, 100_000)
    best = 0.0
    for _ in range(repeats):
        barrier = threading.Barrier(threads)
        spans: list[tuple[float, float]] = []

        def spin(barrier: threading.Barrier = barrier, spans: list[tuple[float, float]] = spans) -> None:
            barrier.wait()
            begun = time.perf_counter()
            function(n, 0.5, 1.0)  # ctypes lets other threads run meanwhile
            spans.append((begun, time.perf_counter()))

        workers = [threading.Thread(target=spin) for _ in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        took = max(end for _, end in spans) - min(begun for begun, _ in spans)
        best = max(best, threads * n * operations / took)
    return best


@cache
def of_one_core(dtype: str = "float32") -> float:
    """Floating-point operations a second of one core; measured once in a process."""
    return measure(1, seconds=0.005, repeats=16, dtype=dtype)


# ---- bytes -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bandwidth:
    """Bytes read and written a second, where everything that is touched again and again fits into `holds` bytes (None: memory)."""

    holds: int | None
    rate: float


@cache
def bandwidths() -> tuple[Bandwidth, ...]:
    """Of one core, for each level of cache and for memory, nearest first; measured once in a process.

    A copy whose ends fill half a level stands for the level; one of four times the last level for memory.
    """
    target = host()
    levels = [n for n in (target.level1, target.level2, target.level3) if n <= LARGEST]
    found = [Bandwidth(n, _copied(n // 2)) for n in sorted(set(levels))]
    return (*found, Bandwidth(None, _copied(min(4 * target.level3, LARGEST))))


def bandwidth(touched: float) -> float:
    """Bytes a second for work that touches so many different bytes again and again: the rate of the first level that holds them."""
    return next(b.rate for b in bandwidths() if b.holds is None or touched <= b.holds)


def _copied(touched: int, seconds: float = 0.004, repeats: int = 3) -> float:
    width = host().vector_bytes
    count = max(touched // 2 // width // UNROLLED, 1) * UNROLLED
    memory = np.ones(2 * count * width + 64, np.uint8)
    start = memory.ctypes.data + -memory.ctypes.data % 64
    copy = _function(copy_ir(host()), "copy", None, *(ctypes.c_void_p,) * 2, *(ctypes.c_int64,) * 2)

    def run(times: int) -> None:
        copy(start + count * width, start, count, times)

    times = _times(run, seconds, 1)
    return 2 * count * width * times / min(_seconds(run, times) for _ in range(repeats))


def copy_ir(target: Target) -> str:
    """LLVM IR of the loop that copies."""
    v = f"<{target.vector_bytes // 4} x i32>"
    moves = []
    for j in range(UNROLLED):
        moves += [
            f"  %i{j} = add i64 %i, {j}",
            f"  %from{j} = getelementptr {v}, ptr %from, i64 %i{j}",
            f"  %to{j} = getelementptr {v}, ptr %to, i64 %i{j}",
            f"  %v{j} = load {v}, ptr %from{j}, align {target.vector_bytes}",
            f"  store {v} %v{j}, ptr %to{j}, align {target.vector_bytes}",
        ]
    return COPY.format(bits=8 * target.vector_bytes, moves="\n".join(moves), unrolled=UNROLLED)


# ---- cycles ------------------------------------------------------------------------------------------------------------------


def counts_cycles(target: Target) -> bool:
    """Whether a program may read a counter of cycles there. On ARM there are two: one that only the kernel of the system may read
    (reading it ends the process), and one that anyone may. Which of them LLVM takes depends on its version."""
    if target.family == "aarch64":
        return "cntvct" in jit.assembly(CYCLES, target).lower()
    return target.family == "x86_64"


@cache
def counter() -> tuple[Callable[[], int], float] | None:
    """The counter of cycles as a function, and the cycles that reading it twice takes; None where there is none.

    Its cycles are those of the counter's own clock, which is not that of the core: only their ratio to seconds counts.
    """
    if not counts_cycles(host()):
        return None
    cycles, reading = (_function(CYCLES, name, ctypes.c_int64) for name in ("cycles", "reading"))
    if cycles() == 0:
        return None
    return cycles, float(min(reading() for _ in range(100)))


# ---- running -----------------------------------------------------------------------------------------------------------------


def _function(text: str, name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
    """A function of the module as one of Python, which keeps the module."""
    loaded = jit.compile_module(text, host())
    made = ctypes.CFUNCTYPE(result, *arguments)(loaded.address(name))
    made.loaded = loaded  # type: ignore[attr-defined]  # it lives as long as its code
    return made


def _seconds(run: Callable[[int], Any], times: int) -> float:
    begun = time.perf_counter()
    run(times)
    return time.perf_counter() - begun


def _times(run: Callable[[int], Any], seconds: float, times: int) -> int:
    """How many times take about so many seconds."""
    while (took := _seconds(run, times)) < seconds / 4:
        times *= 2
    return max(int(times * seconds / took), 1)
