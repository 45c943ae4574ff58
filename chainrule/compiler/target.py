"""The processor that code is made for: its vector registers, its instructions, its caches.

In: what LLVM and the operating system say of this machine, or the name of a level such as "avx2". Out: a Target, which schedules are
cut to and machine code is made for. What the system does not tell is assumed to be small.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import UsageError

KIB = 1024
SMALL_CACHES = (32 * KIB, 512 * KIB, 8 * 1024 * KIB)  # most processors of the last ten years have at least this
CPU0 = Path("/sys/devices/system/cpu/cpu0")

# Explicit 512-bit registers are meant; x86-64-v4 and some processors would otherwise be asked to avoid them.
FULL_WIDTH = "-prefer-256-bit"


@dataclass(frozen=True)
class Target:
    """A processor.

    Attributes:
        triple, cpu, features: it in LLVM's words.
        vector_bytes: width of a vector register: 64 with AVX-512, 32 with AVX, 16 with SSE2 and NEON.
        registers: number of vector registers: 32 with AVX-512 and NEON, else 16.
        fma: a b + c is one instruction with one rounding.
        rounding: rounding to an integer is one instruction (SSE4.1, NEON).
        level1, level2, level3: bytes of data cache: of a core, a core's share, the whole.
        cores: processors for which it is weighed what threads share out. What decides the order of sums depends on it, so it is the same
            on all machines.
        panels: columns of a panel of a matrix, which lies in one piece: whole tiles. The first that divides the matrix is taken.
    """

    triple: str
    cpu: str
    features: str
    vector_bytes: int
    registers: int
    fma: bool
    rounding: bool
    level1: int
    level2: int
    level3: int
    cores: int = 2
    panels: tuple[int, ...] = (64, 48, 32)

    @property
    def family(self) -> str:
        """First word of the triple, with one name for each family: "x86_64", "aarch64"."""
        name = self.triple.split("-")[0]
        return {"arm64": "aarch64", "amd64": "x86_64"}.get(name, name)


@dataclass(frozen=True)
class Level:
    """A set of instructions that many processors share; `needs` are the features, in LLVM's words, without which it does not run."""

    family: str
    cpu: str
    features: str
    needs: frozenset[str]
    vector_bytes: int
    registers: int
    fma: bool
    rounding: bool


AVX2 = frozenset(["avx", "avx2", "fma", "bmi", "bmi2", "f16c", "lzcnt", "movbe", "sse4.1", "sse4.2"])
AVX512 = AVX2 | frozenset(["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"])

# Named processors rather than the host's with features taken away: features imply one another (avx10.1 brings back avx512f), and
# code for a level is the same text on every machine.
LEVEL_TABLE = {
    "avx512": Level("x86_64", "x86-64-v4", FULL_WIDTH, AVX512, 64, 32, True, True),
    "avx2": Level("x86_64", "x86-64-v3", "", AVX2, 32, 16, True, True),
    "sse2": Level("x86_64", "x86-64", "", frozenset(("sse2",)), 16, 16, False, False),
    "aarch64": Level("aarch64", "generic", "+neon", frozenset(), 16, 32, True, True),
}
LEVELS = tuple(LEVEL_TABLE)


@functools.cache
def host() -> Target:
    """The processor that this runs on."""
    from llvmlite import binding as llvm

    triple, has = llvm.get_process_triple(), llvm.get_host_cpu_features()
    known = Target(triple, llvm.get_host_cpu_name(), has.flatten(), 16, 16, False, False, *_caches())
    if known.family == "x86_64":
        return _x86(known, {name for name, there in has.items() if there})
    if known.family == "aarch64":
        return replace(known, registers=32, fma=True, rounding=True)
    return known


def narrowed(level: str) -> Target:
    """A processor of this level with the host's caches.

    Args:
        level: a name of LEVELS. What the host cannot run can be compiled but not called; see `runnable`.

    Raises:
        UsageError: no such level.
    """
    if level not in LEVEL_TABLE:
        raise UsageError(f"no processor level {level!r}; there are {', '.join(LEVELS)}")
    here, it = host(), LEVEL_TABLE[level]
    triple = here.triple if here.family == it.family else f"{it.family}-unknown-linux-gnu"
    return Target(
        triple,
        it.cpu,
        it.features,
        it.vector_bytes,
        it.registers,
        it.fma,
        it.rounding,
        here.level1,
        here.level2,
        here.level3,
        here.cores,
    )


@functools.cache
def runnable() -> tuple[str, ...]:
    """The levels that the host can execute, widest first."""
    from llvmlite import binding as llvm

    here = host()
    has = {name for name, there in llvm.get_host_cpu_features().items() if there}
    return tuple(name for name, it in LEVEL_TABLE.items() if it.family == here.family and it.needs <= has)


def _x86(target: Target, has: set[str]) -> Target:
    """The target with what its features mean for vectors."""
    wide = has >= {"avx512f", "avx512vl", "avx512dq", "avx512bw"}
    return replace(
        target,
        features=f"{target.features},{FULL_WIDTH}" if wide else target.features,
        vector_bytes=64 if wide else 32 if "avx" in has else 16,
        registers=32 if wide else 16,
        fma="fma" in has,
        rounding="sse4.1" in has,
    )


# ---- caches ------------------------------------------------------------------------------------------------------------------


def _caches() -> tuple[int, int, int]:
    """Bytes of the three levels of data cache; SMALL_CACHES where the system does not tell."""
    found: dict[int, int] = {}
    try:
        if sys.platform == "linux":
            found = _linux_caches() or _posix_caches()
        elif sys.platform == "darwin":
            found = _mac_caches()
    except (OSError, ValueError, AttributeError):
        pass  # a system that hides them: the assumption below is good enough
    first, second, third = (found.get(k) or SMALL_CACHES[k - 1] for k in (1, 2, 3))
    return first, second, third


def _linux_caches() -> dict[int, int]:
    """Level -> bytes, from what the kernel says of the first processor."""
    siblings = CPU0 / "topology" / "thread_siblings_list"
    threads = _listed(siblings.read_text()) if siblings.exists() else 1
    found: dict[int, int] = {}
    for folder in sorted((CPU0 / "cache").glob("index*")):
        if (folder / "type").read_text().strip() == "Instruction":
            continue
        level = int((folder / "level").read_text())
        cores = max(_listed((folder / "shared_cpu_list").read_text()) // threads, 1) if level < 3 else 1
        found[level] = _bytes((folder / "size").read_text()) // cores
    return found


def _posix_caches() -> dict[int, int]:
    """Level -> bytes, from sysconf, which containers without /sys still have."""
    names = ("SC_LEVEL1_DCACHE_SIZE", "SC_LEVEL2_CACHE_SIZE", "SC_LEVEL3_CACHE_SIZE")
    return {k: max(os.sysconf(name), 0) for k, name in enumerate(names, 1)}


def _mac_caches() -> dict[int, int]:
    """Level -> bytes, of a fast core where there are two kinds."""
    found: dict[int, int] = {}
    for prefix in ("hw.perflevel0.", "hw."):
        cores = _sysctl(prefix + "cpusperl2") or 1
        found[1] = found.get(1) or _sysctl(prefix + "l1dcachesize")
        found[2] = found.get(2) or _sysctl(prefix + "l2cachesize") // cores
        found[3] = found.get(3) or _sysctl(prefix + "l3cachesize")
    return found


def _sysctl(name: str) -> int:
    """A number of the macOS kernel; 0 if it has none of that name."""
    value, size = ctypes.c_uint64(0), ctypes.c_size_t(8)
    failed = ctypes.CDLL(None).sysctlbyname(name.encode(), ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0))
    return 0 if failed else value.value


def _bytes(text: str) -> int:
    """48K -> 49152."""
    text = text.strip()
    unit = {"K": KIB, "M": KIB * KIB, "G": KIB**3}.get(text[-1:], 1)
    return int(text.rstrip("KMG")) * unit


def _listed(text: str) -> int:
    """How many processors a list such as 0-3,8 names."""
    ends = [part.split("-") for part in text.strip().split(",")]
    return sum(int(end[-1]) - int(end[0]) + 1 for end in ends)
