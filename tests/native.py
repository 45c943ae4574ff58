"""What the tests of native code share: backends that differ in one thing, equality of bits, and a process that may crash."""

from __future__ import annotations

import ctypes
import os
import pickle
import select
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emulation import Emulated

from chainrule.compiler import pipeline
from chainrule.compiler.target import host, narrowed, runnable
from chainrule.graph.node import Graph
from chainrule.program import Program
from chainrule.run.backend import Session, backends
from chainrule.run.native import NativeBackend

Array = np.ndarray
WIDTHS = runnable()
GUARD, POISONS = 64, (0x00, 0xFF, 0x7F)


SMALL = (4, 3, 2)  # panels so small that the small matrices of tests lie in some


def backend_of(width: str | None = None, level: int = 2, panels: tuple[int, ...] | None = None, **options: Any) -> NativeBackend:
    """The backend for a narrower processor, emulated if this one is of another family; None: the host itself. panels: of matrices, in
    place of its own."""
    target = host() if width is None else narrowed(width)
    if panels is not None:
        target = replace(target, panels=panels)
    if target.family != host().family:
        return Emulated(level, target=target, **options)
    return NativeBackend(target, level, **options)


KEPT: list[Any] = []  # backends with their sessions, until the process ends


class Threaded(NativeBackend):
    """Native code that always runs on so many threads."""

    def __init__(self, threads: int, **options: Any) -> None:
        super().__init__(**options)
        self.threads = threads
        self.sessions: list[Any] = []
        KEPT.append(self)

    def session(self, programs: Mapping[int, Program], state: Mapping[str, Array], threads: int | None = None) -> Session:
        self.sessions.append(super().session(programs, state, threads=self.threads))
        return self.sessions[-1]


@contextmanager
def registered(backend: NativeBackend, name: str = "native under test") -> Iterator[str]:
    """The backend under a name that `fit` takes."""
    backends._things[name] = backend
    try:
        yield name
    finally:
        del backends._things[name]


# ---- comparing ---------------------------------------------------------------------------------------------------------------


def pattern(value: Any) -> tuple[Any, ...]:
    """Type, shape and bits, all NaN being one."""
    array = np.asarray(value)
    if array.dtype.kind == "f":
        array = np.where(np.isnan(array), np.array(np.nan, array.dtype), array)
    return (array.dtype.str, array.shape, np.ascontiguousarray(array).tobytes())


def assert_bits(got: Sequence[Any], want: Sequence[Any], label: Any = "") -> None:
    assert len(got) == len(want), label
    for n, (a, b) in enumerate(zip(got, want, strict=True)):
        if pattern(a) != pattern(b):
            a, b = np.asarray(a), np.asarray(b)
            assert (a.dtype, a.shape) == (b.dtype, b.shape), (label, n)
            differ = np.argwhere(~((a == b) & (np.signbit(a) == np.signbit(b)) | ((a != a) & (b != b))))
            at = tuple(differ[0])
            raise AssertionError(
                f"{label}: result {n} differs at {len(differ)} of {a.size} places, first {at}: {a[at]!r}, {b[at]!r}"
            )


def assert_as_precise(got: Any, numpy: Any, exact: Any, label: Any = "", multiple: float = 4.0, ulps: float = 16.0) -> None:
    """`got` is no further from the exact values than a small multiple of what NumPy is at worst, and a few ulp of the largest."""
    got, numpy, exact = np.asarray(got), np.asarray(numpy), np.asarray(exact)
    assert (got.dtype, got.shape) == (numpy.dtype, numpy.shape), label
    if got.dtype.kind != "f":
        np.testing.assert_array_equal(got, numpy, err_msg=str(label))
        return
    wide = np.longdouble if got.dtype == np.float64 else np.float64
    with np.errstate(all="ignore"):
        a, b, c = (v.astype(wide) for v in (got, numpy, exact))
        fine = np.isfinite(b) & np.isfinite(c)
        np.testing.assert_array_equal(got[~fine], numpy[~fine], err_msg=f"{label}: not finite")
        assert np.isfinite(a[fine]).all(), f"{label}: not finite: {got[fine][~np.isfinite(a[fine])][:3]}"
        errors, theirs = np.abs(a - c)[fine], np.abs(b - c)[fine]
        largest = np.max(np.abs(c[fine]), initial=0.0)
    tiny = np.finfo(got.dtype).tiny  # denormal numbers may be flushed to zero
    bound = multiple * np.max(theirs, initial=0.0) + ulps * np.finfo(got.dtype).eps * largest + tiny
    worst = np.max(errors, initial=0.0)
    assert worst <= bound, f"{label}: off by {worst:.3g}, NumPy by {np.max(theirs, initial=0.0):.3g}, largest value {largest:.3g}"


def widened(graph: Graph, arrays: Sequence[Any]) -> list[Array]:
    return [a.astype(np.float64) if np.asarray(a).dtype == np.float32 else np.asarray(a) for a in arrays]


# ---- a process that may crash ------------------------------------------------------------------------------------------------


class Crash(AssertionError):
    """The process that computes has died."""


class Server:
    """A process in which functions of modules beside this file are called; it is started again after a crash."""

    def __init__(self, seconds: float = 120.0) -> None:
        self.seconds = seconds
        self._process: Any = None

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        """function(*args) over there. Raises: `Crash`, or what the function raised, as an AssertionError."""
        if self._process is None:
            self._start()
        message = pickle.dumps((function.__module__, function.__name__, args))
        try:
            self._process.stdin.write(struct.pack("<q", len(message)) + message)
            self._process.stdin.flush()
            (length,) = struct.unpack("<q", self._read(8))
            fine, answer = pickle.loads(self._read(length))
        except (OSError, EOFError) as error:
            raise Crash(f"{function.__name__}{args!r}: {error} {self.stop()}") from None
        if not fine:
            raise AssertionError(f"{function.__name__}{args!r}:\n{answer}")
        return answer

    def _start(self) -> None:
        here = Path(__file__).parent
        path = os.pathsep.join([str(here), str(here.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # read when the process has ended
        self._process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-c", "import native; native.serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, "PYTHONPATH": path},
        )

    def _read(self, count: int) -> bytes:
        parts = []
        while count:
            ready, _, _ = select.select([self._process.stdout], [], [], self.seconds)
            if not ready:
                raise EOFError(f"no answer in {self.seconds} s;")
            part = os.read(self._process.stdout.fileno(), min(count, 1 << 20))
            if not part:
                raise EOFError("it crashed;")
            parts.append(part)
            count -= len(part)
        return b"".join(parts)

    def stop(self) -> str:
        """End the process; how it ended, and the last it said."""
        if self._process is None:
            return ""
        self._process.stdin.close()
        try:
            self._process.wait(2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace")[-2000:]
        self._errors.close()
        code, self._process = self._process.returncode, None
        return f"exit status {code}\n{said}"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.stop()


def serve() -> None:
    """Answer calls until standard input ends."""
    import importlib
    import traceback

    pipeline.VERIFY_EACH_PASS = True  # as conftest.py does
    incoming, outgoing = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while head := incoming.read(8):
        (length,) = struct.unpack("<q", head)
        module, name, args = pickle.loads(incoming.read(length))
        try:
            answer = (True, getattr(importlib.import_module(module), name)(*args))
        except Exception:
            answer = (False, traceback.format_exc(limit=-12))
        message = pickle.dumps(answer)
        outgoing.write(struct.pack("<q", len(message)) + message)
        outgoing.flush()


# ---- memory between guards ---------------------------------------------------------------------------------------------------


class Guards:
    """Memory between zones of known bytes; made in place of `aligned` of chainrule.run.machines, wherever that is used."""

    ZONE, MARK = 128, 0xA5

    def __init__(self) -> None:
        self.zones: list[tuple[Array, Array]] = []

    def __call__(self, size: int, dtype: Any = np.uint8, fill: int | None = None) -> Array:
        """An array that begins at a cache line and ends where it ends."""
        dtype = np.dtype(dtype)
        count = size * dtype.itemsize
        memory = np.full(count + 2 * self.ZONE + 64, self.MARK, np.uint8)
        start = self.ZONE + -(memory.ctypes.data + self.ZONE) % 64
        memory[start : start + count] = 0xFF if fill is None else fill
        self.zones.append((memory[:start], memory[start + count :]))
        return memory[start : start + count].view(dtype)

    def check(self) -> None:
        for n, (before, after) in enumerate(self.zones):
            assert (before == self.MARK).all(), (
                f"array {n}: written before it at {np.flatnonzero(before != self.MARK) - len(before)}"
            )
            assert (after == self.MARK).all(), f"array {n}: written after it at {np.flatnonzero(after != self.MARK)}"


def untouched(arena: Array, code: Any, poison: int) -> None:
    """All of the scratch memory that belongs to no buffer is as it was."""
    free = np.ones(len(arena), bool)
    for buffer, start in code.arena.offsets.items():
        free[start : start + code.arena.sizes[buffer]] = False
    changed = np.flatnonzero(free & (arena != poison))
    assert not len(changed), f"written between the buffers at {changed[:8]} of {len(arena)}"


def call_between_guards(backend: NativeBackend, graph: Graph, arrays: Sequence[Any], shift: int = 0) -> list[Array]:
    """A graph's results, computed in arrays between guards, which begin `shift` elements after a cache line."""
    if isinstance(backend, Emulated):  # it always looks
        return backend.function(graph)(arrays, shift)
    compiled = backend.function(graph)
    guards, poison = Guards(), 0xFF if backend.poison is None else backend.poison

    def place(dtype: Any, shape: Sequence[int]) -> Array:
        size = int(np.prod(shape, dtype=np.int64))
        return guards(size + shift, dtype)[shift:].reshape(shape)

    given = [place(n.dtype, n.shape) for n in graph.inputs]
    for to, value in zip(given, arrays, strict=True):
        to[...] = value
    results = [place(o.dtype, o.shape) for o in graph.outputs]
    code = compiled.machine.code
    arena, report = guards(code.arena.bytes, fill=poison), np.zeros(4, np.int64)
    pointers = [a.ctypes.data for a in (arena, report, *given, *results)]
    failed = compiled._call((ctypes.c_void_p * len(pointers))(*pointers), 0, 1, None)
    assert not failed
    guards.check()
    if backend.guard:
        untouched(arena, code, poison)
    for to, value in zip(given, arrays, strict=True):
        assert pattern(to) == pattern(np.broadcast_to(np.asarray(value, to.dtype), to.shape)), "an input was written to"
    return results
