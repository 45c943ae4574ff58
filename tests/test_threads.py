"""Barrier, pool, denormals and the count of processors, with small native functions."""

from __future__ import annotations

import ctypes
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import FrameType

import llvmlite.binding as llvm
import pytest

from chainrule.run import threads
from chainrule.run.threads import Pool, available, barrier_ir, flush_ir, pool

TRIPLE = llvm.get_default_triple()

# Job of a thread: shared memory, its number, number of threads, rounds, result. Shared: the barrier, then a line of 128 bytes each.
FUNCTIONS = f"""
target triple = "{TRIPLE}"
{barrier_ir(TRIPLE)}
{flush_ir(TRIPLE)}
%job = type {{ ptr, i64, i64, i64, i64 }}

define internal ptr @slot(ptr %shared, i64 %k) {{
  %offset = mul i64 %k, 128
  %place = add i64 %offset, {threads.BARRIER_BYTES}
  %slot = getelementptr i8, ptr %shared, i64 %place
  ret ptr %slot
}}

define void @exchange(ptr %job) {{  ; counts in its slot, meets the others, expects all slots to have the same count
entry:
  %shared = load ptr, ptr %job
  %numberp = getelementptr %job, ptr %job, i64 0, i32 1
  %number = load i64, ptr %numberp
  %threadsp = getelementptr %job, ptr %job, i64 0, i32 2
  %threads = load i64, ptr %threadsp
  %roundsp = getelementptr %job, ptr %job, i64 0, i32 3
  %rounds = load i64, ptr %roundsp
  %resultp = getelementptr %job, ptr %job, i64 0, i32 4
  %own = call ptr @slot(ptr %shared, i64 %number)
  br label %round
round:
  %r = phi i64 [ 0, %entry ], [ %r1, %after ]
  %wrong = phi i64 [ 0, %entry ], [ %wrong1, %after ]
  %count = load i64, ptr %own
  %count1 = add i64 %count, 1
  store i64 %count1, ptr %own
  call void @barrier(ptr %shared, i64 %threads)
  br label %look
look:
  %k = phi i64 [ 0, %round ], [ %k1, %look ]
  %bad = phi i64 [ %wrong, %round ], [ %wrong1, %look ]
  %other = call ptr @slot(ptr %shared, i64 %k)
  %theirs = load i64, ptr %other
  %differs = icmp ne i64 %theirs, %count1
  %one = zext i1 %differs to i64
  %wrong1 = add i64 %bad, %one
  %k1 = add i64 %k, 1
  %all = icmp uge i64 %k1, %threads
  br i1 %all, label %after, label %look
after:
  call void @barrier(ptr %shared, i64 %threads)
  %r1 = add i64 %r, 1
  %more = icmp ult i64 %r1, %rounds
  br i1 %more, label %round, label %end
end:
  store i64 %wrong1, ptr %resultp
  ret void
}}

define void @endless(ptr %flag) {{
entry:
  br label %loop
loop:
  %value = load volatile i64, ptr %flag
  %go = icmp eq i64 %value, 0
  br i1 %go, label %loop, label %end
end:
  ret void
}}

define internal double @half(double %x) noinline {{
  %y = fmul double %x, 5.0e-1
  ret double %y
}}

define void @flushed(ptr %p) {{  ; p: x; out: x / 2 with and without flushing, control word before and after
  %x = load double, ptr %p
  %p1 = getelementptr i64, ptr %p, i64 1
  %p2 = getelementptr i64, ptr %p, i64 2
  %p3 = getelementptr i64, ptr %p, i64 3
  %p4 = getelementptr i64, ptr %p, i64 4
  %old = call i64 @flush_on()
  %flat = call double @half(double %x)
  store double %flat, ptr %p1
  call void @flush_restore(i64 %old)
  %full = call double @half(double %x)
  store double %full, ptr %p2
  store i64 %old, ptr %p3
  %again = call i64 @flush_on()
  call void @flush_restore(i64 %again)
  store i64 %again, ptr %p4
  ret void
}}
"""


@cache
def native() -> dict[str, int]:
    """Addresses of the functions above; their code is never freed."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    llvm.add_symbol("sched_yield", threads.yield_address())
    module = llvm.parse_assembly(FUNCTIONS)
    module.verify()
    engine = llvm.create_mcjit_compiler(module, llvm.Target.from_default_triple().create_target_machine(opt=2))
    engine.finalize_object()
    addresses = {name: engine.get_function_address(name) for name in ("exchange", "endless", "flushed")}
    engine.detach()
    return addresses


class Job(ctypes.Structure):
    _fields_ = [
        ("shared", ctypes.c_void_p),
        ("number", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("rounds", ctypes.c_int64),
        ("result", ctypes.c_int64),
    ]


class Exchange:
    """One job for each of `count` threads."""

    def __init__(self, count: int, rounds: int) -> None:
        size = threads.BARRIER_BYTES + 128 * count
        self.memory = ctypes.create_string_buffer(size + threads.BARRIER_ALIGNMENT)
        self.base = -(-ctypes.addressof(self.memory) // threads.BARRIER_ALIGNMENT) * threads.BARRIER_ALIGNMENT
        self.jobs = [Job(self.base, k, count, rounds, -1) for k in range(count)]
        self.arguments = [ctypes.addressof(job) for job in self.jobs]

    def run(self, workers: Pool | None = None) -> None:
        (workers or pool()).run(native()["exchange"], self.arguments)

    @property
    def wrong(self) -> list[int]:
        return [job.result for job in self.jobs]

    @property
    def counts(self) -> list[int]:
        return [ctypes.c_int64.from_address(self.base + threads.BARRIER_BYTES + 128 * k).value for k in range(len(self.jobs))]


@pytest.mark.parametrize(("count", "rounds"), [(1, 10_000), (2, 10_000), (3, 10_000), (5, 3_000)])
def test_every_thread_sees_what_the_others_wrote(count: int, rounds: int) -> None:
    exchange = Exchange(count, rounds)
    exchange.run()
    assert exchange.wrong == [0] * count
    assert exchange.counts == [rounds] * count


def test_a_barrier_serves_runs_of_different_sizes() -> None:
    exchange = Exchange(4, 20)
    for repeat in range(50):
        count = repeat % 4 + 1
        for job in exchange.jobs:
            job.threads = count
        ctypes.memset(exchange.base + threads.BARRIER_BYTES, 0, 128 * 4)
        pool().run(native()["exchange"], exchange.arguments[:count])
        assert exchange.wrong[:count] == [0] * count


def test_workers_are_kept() -> None:
    Exchange(3, 1).run()
    before = sys._current_frames().keys()
    for _ in range(20):
        Exchange(3, 1).run()
    assert sys._current_frames().keys() == before


def test_several_python_threads_run_at_once_and_leave_no_workers() -> None:
    Exchange(2, 1).run()
    before = len(sys._current_frames())
    results: list[list[int]] = []

    def work() -> None:
        for _ in range(20):
            exchange = Exchange(3, 100)
            exchange.run()
            results.append(exchange.wrong)

    callers = [threading.Thread(target=work) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert results == [[0, 0, 0]] * 60
    wait_until(lambda: len(sys._current_frames()) == before)


def wait_until(condition) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_a_worker_that_cannot_start_is_reported_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    exchange = Exchange(3, 10)
    started = []
    start = threads._thread.start_new_thread

    def fail_at_the_second(*args: object) -> int:
        if started:
            raise RuntimeError("can't start new thread")
        started.append(True)
        return start(*args)

    errors: list[Exception] = []

    def work() -> None:
        monkeypatch.setattr(threads._thread, "start_new_thread", fail_at_the_second)
        try:
            exchange.run()
        except RuntimeError as error:
            errors.append(error)
        monkeypatch.undo()
        untouched = exchange.counts == [0, 0, 0]
        exchange.run()
        results.append(untouched)

    results: list[bool] = []
    caller = threading.Thread(target=work)  # has no workers yet
    caller.start()
    caller.join()
    assert len(errors) == 1
    assert results == [True]
    assert exchange.wrong == [0, 0, 0]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads cannot be placed here")
@pytest.mark.parametrize(("processors", "workers"), [(2, 1), (4, 3), (16, 1), (16, 3)])
def test_processors_are_shared_out_among_workers(processors: int, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    crew = threads._Crew()
    crew.workers = [types.SimpleNamespace(number=[1000 + i]) for i in range(workers)]
    placed: dict[int, set[int]] = {}
    monkeypatch.setattr(threads, "_processor", lambda: 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda number: set(range(processors)))
    monkeypatch.setattr(os, "sched_setaffinity", lambda number, where: placed.update({number: set(where)}))
    stay, leave = threads._place(crew)
    assert sorted(p for where in placed.values() for p in where) == [p for p in range(processors) if p != 1]
    assert len(placed) == workers
    for step in stay:
        step()
    assert placed[0] == {1}
    for step in leave:
        step()
    assert placed[0] == set(range(processors))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_the_child_of_a_fork_has_a_pool_of_its_own() -> None:
    Exchange(3, 10).run()
    held = pool()  # also one that was asked for before the fork
    child = os.fork()
    if child == 0:
        exchange = Exchange(3, 1000)
        held.run(native()["exchange"], exchange.arguments)
        os._exit(0 if exchange.wrong == [0, 0, 0] else 1)
    assert status_of(child) == 0
    exchange = Exchange(3, 1000)
    exchange.run()
    assert exchange.wrong == [0, 0, 0]


def status_of(child: int) -> int:
    """Exit status of a child process; it is killed after 10 s."""
    end = time.monotonic() + 10
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.005)


# ---- interrupts ----

needs_timer = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no interval timer here")


@pytest.fixture
def alarm() -> Iterator[None]:
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


@needs_timer
@pytest.mark.usefixtures("alarm")
@pytest.mark.parametrize("fresh", [False, True], ids=["workers there", "workers to be started"])
def test_interrupts_at_any_place_leave_the_pool_in_order(fresh: bool) -> None:
    """Every run has happened in all threads or in none, and the next one is right."""
    hits = []
    armed = False  # a last signal may still be on its way, by a worker, when the timer is off

    def interrupt(signum: int, frame: FrameType | None) -> None:
        if armed and frame and frame.f_code.co_filename == threads.__file__:
            hits.append((frame.f_code.co_name, frame.f_lasti))
            raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, interrupt)
    chance = random.Random(1)
    Exchange(3, 1).run()
    known = len(sys._current_frames())
    counts = []
    end = time.monotonic() + 1
    while time.monotonic() < end:
        exchange = Exchange(chance.choice([2, 3]), chance.choice([1, 3, 30]))
        workers = Pool() if fresh else pool()
        signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-6, 2e-4), chance.uniform(1e-5, 2e-4))
        armed = True
        with suppress(KeyboardInterrupt):
            for _ in range(5):
                exchange.run(workers)
        armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert len(set(exchange.counts)) == 1
        assert exchange.counts[0] % exchange.jobs[0].rounds == 0
        counts.append(exchange.counts[0])
        del workers
        exchange.run()
        assert not any(exchange.wrong)
    assert len(hits) > 20
    assert 0 in counts
    assert any(counts)
    wait_until(lambda: len(sys._current_frames()) == known)


@needs_timer
@pytest.mark.usefixtures("alarm")
def test_a_signal_handler_may_run_the_pool_itself() -> None:
    inner, outer = Exchange(2, 10), Exchange(3, 10)
    outer.run()
    calls = []

    def handler(signum: int, frame: object) -> None:
        inner.run()
        calls.append(inner.wrong)
        signal.setitimer(signal.ITIMER_REAL, 1e-3)

    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 1e-3)
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        outer.run()
        assert outer.wrong == [0, 0, 0]
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert len(calls) > 10
    assert all(call == [0, 0] for call in calls)


# ---- the end of the interpreter ----

START = f"""
import os, sys, time, threading, signal
sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parent.parent)!r}]
from test_threads import *
flag = ctypes.c_int64(0)
def endless():
    pool().run(native()["endless"], [ctypes.addressof(flag)] * 3)
    print("ended", flush=True)
def stop_after(seconds):
    def stop():
        time.sleep(seconds)
        flag.value = 1
    threading.Thread(target=stop).start()
"""

ENDINGS = {
    "idle workers": ("Exchange(3, 100).run()", 0, ""),
    "a thread in a run is waited for": (
        "threading.Thread(target=endless).start(); time.sleep(0.1); stop_after(0.3); raise SystemExit(3)",
        3,
        "ended\n",
    ),
    "a daemon in a run is left": ("threading.Thread(target=endless, daemon=True).start(); time.sleep(0.1); sys.exit(3)", 3, ""),
    "a run ends while the interpreter does": (
        (
            "class Last:\n  def __del__(self, flag=flag, sleep=time.sleep): flag.value = 1; sleep(0.05)\n"
            "sys.last = Last(); threading.Thread(target=endless, daemon=True).start(); time.sleep(0.1); sys.exit(3)"
        ),
        3,
        None,  # the daemon may or may not come to print
    ),
    "Ctrl-C in a run": (
        (
            "stop_after(0.4); threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT)).start()\n"
            "try: endless()\nexcept KeyboardInterrupt: print(flag.value); Exchange(3, 9).run(); sys.exit(3)"
        ),
        3,
        "1\n",
    ),
}


@pytest.mark.parametrize(("code", "status", "output"), ENDINGS.values(), ids=ENDINGS.keys())
def test_the_end_of_the_interpreter(code: str, status: int, output: str | None) -> None:
    if "SIGINT" in code and sys.platform == "win32":
        pytest.skip("os.kill ends the process there")
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", START + code], capture_output=True, text=True, timeout=20, check=False
    )
    assert (done.returncode, done.stderr) == (status, "")
    assert output is None or done.stdout == output


# ---- denormals ----


def test_denormals_are_flushed_in_each_thread_and_the_old_mode_comes_back() -> None:
    if "ret i64 0" in flush_ir(TRIPLE):
        pytest.skip("no flush-to-zero known for this processor")
    smallest = sys.float_info.min
    memory = [(ctypes.c_double * 5)(smallest) for _ in range(3)]
    pool().run(native()["flushed"], [ctypes.addressof(m) for m in memory])
    for m in memory:
        assert list(m[:3]) == [smallest, 0.0, smallest / 2]
        before, after = ctypes.c_int64.from_buffer(m, 24).value, ctypes.c_int64.from_buffer(m, 32).value
        assert before == after
    assert smallest / 2 > 0


@pytest.mark.parametrize(
    ("triple", "pause", "rest", "flush"),
    [
        ("x86_64-unknown-linux-gnu", "pause", "syscall", "ldmxcsr"),
        ("x86_64-pc-windows-msvc", "pause", "sched_yield", "ldmxcsr"),
        ("x86_64-apple-darwin", "pause", "sched_yield", "ldmxcsr"),
        ("aarch64-unknown-linux-gnu", "isb", "syscall", "FPCR"),
        ("arm64-apple-darwin", "isb", "sched_yield", "FPCR"),
        ("riscv64-unknown-linux-gnu", "", "syscall", ""),
        ("s390x-unknown-linux-gnu", "", "sched_yield", ""),
    ],
)
def test_the_text_is_right_for_other_processors(triple: str, pause: str, rest: str, flush: str) -> None:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    use = (
        "define void @use(ptr %p) {\n %old = call i64 @flush_on()\n call void @barrier(ptr %p, i64 2)\n"
        " call void @flush_restore(i64 %old)\n ret void\n}\n"
    )
    module = llvm.parse_assembly(barrier_ir(triple) + flush_ir(triple) + use)
    module.verify()
    text = llvm.Target.from_triple(triple).create_target_machine(opt=2).emit_assembly(module)
    for word in (pause, rest, flush):
        assert re.search(word, text, re.IGNORECASE)


# ---- processors ----

FILES = {
    "version 2": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "300000 100000\n"}, 3),
    "version 2, unlimited": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 8),
    "rounded down": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1),
    "at least one": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "20000 100000\n"}, 1),
    "never more than the affinity": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "6400000 100000\n"}, 8),
    "the least on the way up": (
        {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
            "sys/fs/cgroup/a/cpu.max": "200000 100000\n",
            "sys/fs/cgroup/cpu.max": "400000 100000\n",
        },
        2,
    ),
    "the host's path in a container": ({"proc/self/cgroup": "0::/host/x\n", "sys/fs/cgroup/cpu.max": "500000 100000\n"}, 5),
    "version 1": (
        {
            "proc/self/cgroup": "4:memory:/x\n3:cpu,cpuacct:/x\n0::/\n",
            "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_quota_us": "250000\n",
            "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_period_us": "100000\n",
        },
        2,
    ),
    "version 1, by the short name": (
        {
            "proc/self/cgroup": "3:cpuacct,cpu:/\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "400000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        4,
    ),
    "version 1, unlimited": (
        {
            "proc/self/cgroup": "3:cpu:/\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        8,
    ),
    "no such files": ({}, 8),
    "nonsense": ({"proc/self/cgroup": "\n7\n0::/../..\n", "sys/fs/cgroup/cpu.max": "\n"}, 8),
}


@pytest.mark.parametrize(("files", "expected"), FILES.values(), ids=FILES.keys())
def test_available_heeds_the_container(
    files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    for name, text in files.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    assert available(tmp_path) == expected


def test_available_here() -> None:
    assert 1 <= available() <= (os.cpu_count() or 1)
