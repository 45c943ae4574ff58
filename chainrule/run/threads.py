"""Several threads in native code at once: the barrier they meet at, the pool they come from, how many there may be.

In: the address of a native function `void f(ptr)` and one argument for each thread. Out: LLVM IR text to put into modules (`barrier_ir`,
`flush_ir`), `pool().run(...)`, `available()`.
"""

from __future__ import annotations

import _thread
import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from operator import call
from pathlib import Path
from queue import SimpleQueue
from typing import Any
from weakref import ref

from ..compiler import jit
from ..compiler.target import host

BARRIER_BYTES = 256  # two pairs of cache lines: processors fetch lines in pairs of 64 bytes, or have lines of 128
BARRIER_ALIGNMENT = 128

# How long a thread that waits looks before it sleeps: 15 to 20 µs, a few times what it takes to be woken. With a quarter of it, two
# threads on an idle machine that have slept once go on waking each other for ever; with more, a very busy machine costs more.
_CYCLES = 48_000  # x86-64 counts time, because `pause` takes from 10 to 140 cycles; others count how often they looked
_ROUNDS = 600
_FUTEX = {"x86_64": 202, "amd64": 202, "aarch64": 98, "arm64": 98, "riscv64": 98}  # number of the system call, Linux only
_WAIT, _WAKE, _ALL = 128, 129, 2**31 - 1  # FUTEX_WAIT and FUTEX_WAKE, both private to the process; how many to wake


def barrier_ir(triple: str) -> str:
    """LLVM IR of `void @barrier(ptr %state, i64 %threads)`, which returns when `threads` threads have called it.

    The state is `BARRIER_BYTES` bytes, aligned to `BARRIER_ALIGNMENT`, zeroed once; it can be used again at once, also by another
    number of threads. What a thread wrote before the barrier, every thread reads after it. Needs the external symbol `syscall` on
    Linux, `sched_yield` elsewhere. The text also declares the intrinsics `llvm.x86.sse2.pause` and `llvm.readcyclecounter` on x86-64,
    `llvm.aarch64.isb` on AArch64.

    A thread that has waited for some microseconds sleeps until it is woken, on Linux. That matters on a busy machine: a thread that
    only yields gets its processor back after its neighbour's time slice, when its partner has just lost his, so that they hardly ever
    run at the same time. One that was asleep is put in front when it is woken.
    """
    pause, pause_declaration = _pause(triple)
    begin, spent, since, limit = _spent(triple)
    sleep, wake, declaration = _sleep(triple)
    return f"""{pause_declaration}
{declaration}
define internal void @barrier(ptr %state, i64 %threads) noinline {{
entry:
  %alone = icmp ule i64 %threads, 1
  br i1 %alone, label %done, label %arrive
arrive:
  %sleepers = getelementptr i8, ptr %state, i64 4
  %generation = getelementptr i8, ptr %state, i64 128
  %mine = load atomic i32, ptr %generation monotonic, align 4
  %before = atomicrmw add ptr %state, i32 1 acq_rel, align 4
  %count = add i32 %before, 1
  %all = trunc i64 %threads to i32
  %last = icmp eq i32 %count, %all
  br i1 %last, label %open, label %wait
open:
  store atomic i32 0, ptr %state monotonic, align 4
  %next = add i32 %mine, 1
  store atomic i32 %next, ptr %generation seq_cst, align 4
{wake}
wait:
  %begin = {begin}
  br label %look
look:
  %since = phi i64 [ %begin, %wait ], [ {since}, %spin ], [ %later, %rest ]
  %now = load atomic i32, ptr %generation acquire, align 4
  %opened = icmp ne i32 %now, %mine
  br i1 %opened, label %done, label %closed
closed:
{spent}
  %enough = icmp ugt i64 %spent, {limit}
  br i1 %enough, label %rest, label %spin
spin:
  {pause}
  br label %look
rest:
{sleep}
  %later = {begin}
  br label %look
done:
  ret void
}}
"""


def _pause(triple: str) -> tuple[str, str]:
    """(instruction, declaration): tells the processor that this is a waiting loop. No inline assembly: it would need a parser."""
    machine = _machine(triple)
    if machine in ("x86_64", "amd64"):
        return "call void @llvm.x86.sse2.pause()", "declare void @llvm.x86.sse2.pause()\ndeclare i64 @llvm.readcyclecounter()"
    if machine in ("aarch64", "arm64"):  # `yield` does nothing on most; `isb` waits 10 to 20 ns
        return "call void @llvm.aarch64.isb(i32 15)", "declare void @llvm.aarch64.isb(i32)"
    return "; no instruction for waiting", ""


def _spent(triple: str) -> tuple[str, str, str, int]:
    """(when waiting begins, lines that make %spent out of %since, the next %since, limit of %spent): the clock, or a count."""
    if _machine(triple) in ("x86_64", "amd64"):
        clock = "call i64 @llvm.readcyclecounter()"
        return clock, f"  %clock = {clock}\n  %spent = sub i64 %clock, %since", "%since", _CYCLES
    return "add i64 0, 0", "  %spent = add i64 %since, 1", "%spent", _ROUNDS


def _sleep(triple: str) -> tuple[str, str, str]:
    """(lines that wait for some time, lines that wake all and return, declaration).

    No wake-up is lost: the sleeper counts itself, then the kernel compares the generation; the opener changes the generation, then
    reads the count. Both are sequentially consistent, so at least one of them sees the other.
    """
    number = _FUTEX.get(_machine(triple)) if "linux" in triple else None
    if number is None:
        return "  %yielded = call i32 @sched_yield()", "  ret void", "declare i32 @sched_yield()"
    futex = f"call i64 (i64, ...) @syscall(i64 {number}, ptr %generation,"
    sleep = f"""  %asleep = atomicrmw add ptr %sleepers, i32 1 seq_cst, align 4
  %slept = {futex} i64 {_WAIT}, i32 %mine, ptr null, ptr null, i64 0)
  %awake = atomicrmw sub ptr %sleepers, i32 1 seq_cst, align 4"""
    wake = f"""  %sleeping = load atomic i32, ptr %sleepers seq_cst, align 4
  %nobody = icmp eq i32 %sleeping, 0
  br i1 %nobody, label %done, label %wake
wake:
  %woken = {futex} i64 {_WAKE}, i32 {_ALL}, ptr null, ptr null, i64 0)
  ret void"""
    return sleep, wake, "declare i64 @syscall(i64, ...)"


def _machine(triple: str) -> str:
    return triple.split("-")[0]


def flush_ir(triple: str) -> str:
    """LLVM IR of `i64 @flush_on()`, which makes this thread take denormal numbers for zero, and `void @flush_restore(i64 %old)`.

    `flush_on` returns the control word as it was. Where the processor has no such switch known here, both do nothing. LLVM believes
    that arithmetic does not depend on the control word: put what lies between the two into a function of its own, not inlined.
    """
    machine = _machine(triple)
    if machine in ("x86_64", "amd64"):
        return _FLUSH_X86
    if machine in ("aarch64", "arm64"):
        return _FLUSH_ARM
    return _FLUSH_NONE


_FLUSH_X86 = f"""declare void @llvm.x86.sse.stmxcsr(ptr)
declare void @llvm.x86.sse.ldmxcsr(ptr)
define internal i64 @flush_on() noinline {{
  %place = alloca i32, align 4
  call void @llvm.x86.sse.stmxcsr(ptr %place)
  %old = load i32, ptr %place, align 4
  %new = or i32 %old, {0x8040}
  store i32 %new, ptr %place, align 4
  call void @llvm.x86.sse.ldmxcsr(ptr %place)
  %result = zext i32 %old to i64
  ret i64 %result
}}
define internal void @flush_restore(i64 %old) noinline {{
  %place = alloca i32, align 4
  %word = trunc i64 %old to i32
  store i32 %word, ptr %place, align 4
  call void @llvm.x86.sse.ldmxcsr(ptr %place)
  ret void
}}
"""  # 0x8000 flushes results to zero (FTZ), 0x40 takes denormal operands for zero (DAZ)

_FLUSH_ARM = f"""declare i64 @llvm.aarch64.get.fpcr()
declare void @llvm.aarch64.set.fpcr(i64)
define internal i64 @flush_on() noinline {{
  %old = call i64 @llvm.aarch64.get.fpcr()
  %new = or i64 %old, {1 << 24}
  call void @llvm.aarch64.set.fpcr(i64 %new)
  ret i64 %old
}}
define internal void @flush_restore(i64 %old) noinline {{
  call void @llvm.aarch64.set.fpcr(i64 %old)
  ret void
}}
"""  # FZ, for operands and results

_FLUSH_NONE = """define internal i64 @flush_on() {
  ret i64 0
}
define internal void @flush_restore(i64 %old) {
  ret void
}
"""

_Entry = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_Member = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


@cache
def _member() -> Callable[..., None]:
    """The native function that a thread of a run executes: f(argument), then a barrier at which all of the run meet.

    Its code is never freed: daemon threads may still be in it while the interpreter ends.
    """
    triple = host().triple
    loaded = jit.compile_module(
        f"""target triple = "{triple}"
{barrier_ir(triple)}
define void @member(ptr %f, ptr %argument, ptr %state, i64 %threads) {{
  call void %f(ptr %argument)
  call void @barrier(ptr %state, i64 %threads)
  ret void
}}
""",
        host(),
    )
    address = loaded.address("member")
    loaded.keep()
    return _Member(address)


def yield_address() -> int:
    """Address of a native function `i32 ()` that lets other threads run: what `sched_yield` stands for in `barrier_ir`."""
    if sys.platform == "win32":
        function = ctypes.WinDLL("kernel32").SwitchToThread
    else:
        function = ctypes.CDLL(None).sched_yield
    return ctypes.cast(function, ctypes.c_void_p).value or 0


class _Worker:
    """A thread that waits for tasks (argument lists of `_member`); it ends when this handle is dropped.

    Started by `_thread`, in one call that no Ctrl-C can divide. It is a daemon: the interpreter does not wait for it.
    """

    def __init__(self) -> None:
        self.tasks: SimpleQueue[Any] = SimpleQueue()
        self.number: list[int] = []  # by which the operating system knows it, as soon as it runs
        # A weak reference that calls `put` with itself, rather than __del__: no Python code that Ctrl-C could cut short.
        _thread.start_new_thread(_serve, (_member(), self.tasks, ref(self, self.tasks.put), self.number))


def _serve(member: Callable[..., None], tasks: SimpleQueue[Any], handle: ref[_Worker], number: list[int]) -> None:
    """What a worker does until it finds `handle` among the tasks."""
    number.append(_thread.get_native_id())
    while (task := tasks.get()) is not handle:
        member(*task)


class _Crew(threading.local):
    """The workers of one Python thread, and the state of the barrier at which its runs end."""

    def __init__(self) -> None:
        self.workers: list[_Worker] = []
        # The processor of the caller when the workers were placed, and their number; (-1,): forbidden.
        self.placed: tuple[int, ...] = ()
        memory = (ctypes.c_char * (BARRIER_BYTES + BARRIER_ALIGNMENT))()
        # A view, so that every task that holds it keeps the memory: a worker may still look at the barrier when `run` has returned.
        self.meeting = (ctypes.c_char * BARRIER_BYTES).from_buffer(memory, -ctypes.addressof(memory) % BARRIER_ALIGNMENT)


_Calls = list[Callable[[], None]]


def _place(crew: _Crew) -> tuple[_Calls, _Calls]:
    """Let no two workers have a processor in common, and none the caller's, where the operating system lets us. Returns what keeps the
    caller where it is for the time of a run, and what lets it go again.

    All processors are shared out among the workers, so where there are many of them, other processes and callers do not meet on a few.
    Left alone, a guest system of some virtual machines wakes a thread on the processor of its waker, though another one rests; the two
    then wait for each other in turn, and since only one of them is ever running, nothing moves either away: two threads took as long as
    one, for minutes.
    """
    here = _processor()
    if here < 0 or crew.placed == (-1,):
        return [], []
    try:
        allowed = os.sched_getaffinity(0)
        others = sorted(allowed - {here})
        numbers = [w.number[0] for w in crew.workers if w.number]
        if not len(others) >= len(crew.workers) == len(numbers):
            return [], []
        if crew.placed != (here, len(numbers)):
            for at, number in enumerate(numbers):
                os.sched_setaffinity(number, others[at :: len(numbers)])
            crew.placed = (here, len(numbers))
    except OSError:  # a container may forbid it; then they run where they are put
        crew.placed = (-1,)
        return [], []
    return [partial(os.sched_setaffinity, 0, {here})], [partial(os.sched_setaffinity, 0, allowed)]


@cache
def _getcpu() -> Callable[[], int] | None:
    if not hasattr(os, "sched_setaffinity"):
        return None
    return getattr(ctypes.CDLL(None), "sched_getcpu", None)


def _processor() -> int:
    """The processor that this thread is on; -1 if nobody knows."""
    ask = _getcpu()
    return ask() if ask is not None else -1


class Pool:
    """Threads that are kept alive between runs, for native functions `void f(ptr)`.

    Each Python thread that calls `run` has workers of its own, so runs in several threads do not meet. They end with that thread.
    """

    def __init__(self) -> None:
        self._crew = _Crew()
        self._lost: list[_Crew] = []

    def forget(self) -> None:
        """Start anew, in the child of a fork, where only one thread is left."""
        self._lost.append(self._crew)  # not dropped: there is nobody behind the handles
        self._crew = _Crew()

    def run(self, function_address: int, arguments: Sequence[int]) -> None:
        """Call f(arguments[0]) on this thread and f(a) for every other argument on a worker; return when all have returned.

        Ctrl-C is raised before anything has begun or after all is done, never in between; the pool stays as it is.
        Raises: `RuntimeError` if the operating system gives no more threads; then nothing has been run.
        """
        if len(arguments) == 1:
            _Entry(function_address)(arguments[0])
            return
        crew = self._crew
        while len(crew.workers) < len(arguments) - 1:
            crew.workers.append(_Worker())
        stay, leave = _place(crew)
        function, count = ctypes.c_void_p(function_address), ctypes.c_int64(len(arguments))
        first, *tasks = [(function, ctypes.c_void_p(argument), crew.meeting, count) for argument in arguments]
        steps: list[Callable[[], None]] = [
            *stay,
            *(partial(worker.tasks.put, task) for worker, task in zip(crew.workers, tasks, strict=False)),
            partial(_member(), *first),
            *leave,
        ]
        # Python runs signal handlers between bytecodes. This is one call, all of it in C (each step returns None, so `any` goes
        # through all), so no Ctrl-C comes between starting the first worker, on which the others will wait, and the end of them all.
        any(map(call, steps))


_POOL = Pool()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_POOL.forget)


def pool() -> Pool:
    """The pool of this process."""
    return _POOL


def available(root: Path = Path("/")) -> int:
    """Processors that this process may keep busy: its affinity, limited by the container's quota; 1.5 processors count as 1.

    `root` is where the files of the operating system are found.
    """
    if hasattr(os, "sched_getaffinity"):
        processors = len(os.sched_getaffinity(0))
    else:
        processors = getattr(os, "process_cpu_count", os.cpu_count)() or 1
    return max(1, int(min([processors, *_quotas(root)])))


def _quotas(root: Path) -> Iterator[float]:
    """The processors that each control group above this process grants; version 2 and 1 of the interface may be there together."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, names, path = [*line.split(":", 2), "", ""][:3]
        if number == "0" and not names:
            places, parse = ["", "unified"], _quota2
        elif "cpu" in names.split(","):
            places, parse = ["cpu", names], _quota1
        else:
            continue
        for place in places:
            top = root / "sys/fs/cgroup" / place
            for group in _upward(path):
                yield from parse(top / group)


def _upward(path: str) -> Iterator[str]:
    """ "/a/b" -> "a/b", "a", "": in a container the path may be the host's, and only the last of these be there."""
    parts = [part for part in path.split("/") if part and part != ".."]
    for end in range(len(parts), -1, -1):
        yield "/".join(parts[:end])


def _quota2(group: Path) -> Iterator[float]:
    quota, period = [*_read(group / "cpu.max").split(), "", ""][:2]  # "max 100000" or "150000 100000"
    if quota.isdigit() and period.isdigit() and int(period):
        yield int(quota) / int(period)


def _quota1(group: Path) -> Iterator[float]:
    quota, period = (_read(group / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))  # -1: no limit
    if quota.isdigit() and period.isdigit() and int(period):
        yield int(quota) / int(period)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""
