"""What the processor can do: its rate of fused multiply-adds in float32, on one core and on several.

In: a number of threads. Out: floating-point operations a second, measured with a loop of independent multiply-adds on registers, as
wide as the host's vectors. No program of this arithmetic is faster; without llvmlite there is no answer.
"""

from __future__ import annotations

import ctypes
import threading
import time
from functools import cache
from typing import Any

CHAINS = 12  # independent sums: a multiply-add takes 4 cycles and two start in each; 12 and two factors fit 16 registers
KERNEL = """
define float @spin(i64 %n, float %factor, float %start) "prefer-vector-width"="{bits}" "min-legal-vector-width"="{bits}" {{
entry:
  %f0 = insertelement {v} poison, float %factor, i32 0
  %f = shufflevector {v} %f0, {v} poison, <{lanes} x i32> zeroinitializer
  %s0 = insertelement {v} poison, float %start, i32 0
  %s = shufflevector {v} %s0, {v} poison, <{lanes} x i32> zeroinitializer
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
  ret float %r
}}
declare {v} @llvm.fma.v{lanes}f32({v}, {v}, {v})
"""


@cache
def kernel() -> tuple[Any, float, str]:
    """The loop as a function (n, factor, start), its operations for each n, and the vectors it uses.

    Raises: ImportError without llvmlite.
    """
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features()
    lanes = 16 if features.get("avx512f") else 8 if features.get("avx2") else 4
    fused = bool(features.get("fma") or features.get("neon") or features.get("fp-armv8"))
    v = f"<{lanes} x float>"

    def step(i: int) -> str:
        if fused:
            return f"  %x{i} = call {v} @llvm.fma.v{lanes}f32({v} %a{i}, {v} %f, {v} %s)"
        return f"  %m{i} = fmul {v} %a{i}, %f\n  %x{i} = fadd {v} %m{i}, %s"

    text = KERNEL.format(
        v=v, lanes=lanes, bits=32 * lanes, last=CHAINS - 1,
        phis="\n".join(f"  %a{i} = phi {v} [ %c{i}, %entry ], [ %x{i}, %loop ]" for i in range(CHAINS)),
        steps="\n".join(step(i) for i in range(CHAINS)),
        sums="\n".join(f"  %t{i} = fadd {v} %x{i}, {f'%t{i - 1}' if i else '%s'}" for i in range(CHAINS)),
    )  # fmt: skip
    # Each chain starts elsewhere, or the compiler would see that they are one.
    starts = "\n".join(f"  %c{i} = fmul {v} %s, <{', '.join(['float ' + str(float(i + 1))] * lanes)}>" for i in range(CHAINS))
    text = text.replace("  br label %loop\n", starts + "\n  br label %loop\n", 1)
    module = llvm.parse_assembly(text)
    module.verify()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=features.flatten(), opt=3
    )
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    function = ctypes.CFUNCTYPE(ctypes.c_float, ctypes.c_int64, ctypes.c_float, ctypes.c_float)(
        engine.get_function_address("spin")
    )
    function.engine = engine  # type: ignore[attr-defined]  # it lives as long as its code
    return function, 2.0 * lanes * CHAINS, f"{32 * lanes}-bit {'multiply-add' if fused else 'multiply and add'}"


def measure(threads: int, seconds: float = 0.01, repeats: int = 3) -> float | None:
    """Operations a second on this many threads, the best of a few short runs; None without llvmlite."""
    try:
        function, operations, _ = kernel()
    except ImportError:
        return None
    n = 100_000
    while True:
        begun = time.perf_counter()
        function(n, 0.5, 1.0)
        if (took := time.perf_counter() - begun) > seconds / 4:
            break
        n *= 2
    n = int(n * seconds / took)
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
