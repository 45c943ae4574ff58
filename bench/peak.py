"""What the processor can do: its rate of fused multiply-adds in float32, on one core and on several.

In: a number of threads. Out: floating-point operations a second, as `chainrule.compiler.peak` measures them. Without chainrule or
llvmlite there is no answer.
"""

from __future__ import annotations


def measure(threads: int, seconds: float = 0.01, repeats: int = 3) -> float | None:
    """Operations a second on this many threads, the best of a few short runs; None if there is nothing to measure with."""
    try:
        from chainrule.compiler import peak

        return peak.measure(threads, seconds, repeats)
    except ImportError:
        return None


def vectors() -> str:
    """The vectors that were measured."""
    from chainrule.compiler import peak

    return peak.kernel()[2]
