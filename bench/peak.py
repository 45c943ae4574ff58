"""What the processor can do: its rate of fused multiply-adds in float32, on one core and on several, and how long these take to meet.

In: a number of threads. Out: floating-point operations a second, as `chainrule.compiler.peak` measures them; seconds, by the barrier of
`chainrule.run.threads`. Without chainrule or llvmlite there is no answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import numpy as np

MEETINGS = 2000  # one after the other, in a measurement


def measure(threads: int, seconds: float = 0.01, repeats: int = 3) -> float | None:
    """Operations a second on this many threads, the best of a few short runs; None if there is nothing to measure with."""
    try:
        from chainrule.compiler import peak

        return peak.measure(threads, seconds, repeats)
    except ImportError:
        return None


def meeting(threads: int, repeats: int = 3) -> float | None:
    """Seconds that so many threads take to meet, the shortest of a few short runs; None if there is nothing to measure with."""
    try:
        run = _meetings()
    except ImportError:
        return None
    from chainrule.run.threads import BARRIER_ALIGNMENT, BARRIER_BYTES

    state = np.zeros(BARRIER_BYTES + BARRIER_ALIGNMENT, np.uint8)
    barrier = state.ctypes.data + -state.ctypes.data % BARRIER_ALIGNMENT
    block = np.array([barrier, threads, MEETINGS], np.int64)
    took = []
    for _ in range(repeats):
        begun = time.perf_counter()
        run([block.ctypes.data] * threads)
        took.append(time.perf_counter() - begun)
    return min(took) / MEETINGS


@cache
def _meetings() -> Callable[[list[int]], None]:
    """Lets threads meet many times; each is given the address of {barrier, how many threads, how often}."""
    from chainrule.compiler import jit
    from chainrule.compiler.target import host
    from chainrule.run.threads import barrier_ir, pool

    triple = host().triple
    loaded = jit.compile_module(
        f"""target triple = "{triple}"
{barrier_ir(triple)}
define void @meetings(ptr %block) {{
entry:
  %barrier = load ptr, ptr %block, align 8
  %threadsp = getelementptr i64, ptr %block, i64 1
  %threads = load i64, ptr %threadsp, align 8
  %countp = getelementptr i64, ptr %block, i64 2
  %count = load i64, ptr %countp, align 8
  br label %meet
meet:
  %i = phi i64 [ 0, %entry ], [ %next, %meet ]
  call void @barrier(ptr %barrier, i64 %threads)
  %next = add i64 %i, 1
  %more = icmp slt i64 %next, %count
  br i1 %more, label %meet, label %out
out:
  ret void
}}
""",
        host(),
    )
    address = loaded.address("meetings")
    loaded.keep()
    return lambda blocks: pool().run(address, blocks)


def vectors() -> str:
    """The vectors that were measured."""
    from chainrule.compiler import peak

    return peak.kernel()[2]
