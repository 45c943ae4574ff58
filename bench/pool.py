"""Starting, asking and ending the processes of libraries.

In: a `Library` and `Settings`. Out: `Process`, which answers, or says why not: it never hangs for longer than the limit given, and a
process that dies harms nobody else. Processes are in sessions of their own, so Ctrl-C reaches only the benchmark, which ends them.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .libraries import Library, Settings

ROOT = Path(__file__).resolve().parent.parent


class Failure(Exception):
    """A library did not answer as it should; the message says why."""


class NotOffered(Failure):
    """The library said that it cannot do this."""


def environment(settings: Settings) -> dict[str, str]:
    """The same number of threads for every pool that a library may have. Bytecode may be kept on the disk, as that of a library that an
    installer compiled is: without, each process would compile the source of this package first, and that of no other."""
    pools = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NPROC")  # NPROC: XLA
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**inherited, **dict.fromkeys(pools, str(settings.threads)), "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}


class Process:
    """A process with one library in it. variables: of its environment, besides those of all."""

    def __init__(self, library: Library, settings: Settings, variables: Mapping[str, str] | None = None) -> None:
        self.library = library
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed by `end`
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.worker", library.name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
            env={**environment(settings), **(variables or {})}, start_new_session=True,
        )  # fmt: skip
        self.settings = settings
        self._rest = b""

    def start(self, limit: float = 120.0) -> str:
        """Import the library; returns its version."""
        return str(self.ask("start", limit, settings=asdict(self.settings))["version"])

    def ask(self, do: str, limit: float, **request: Any) -> Mapping[str, Any]:
        """One request and its answer.

        Raises: `NotOffered`; `Failure` if the library raised an error, died, or took longer than `limit` seconds (it is then ended).
        """
        if self.process.poll() is not None:
            raise Failure(f"its process ended: {self._why()}")
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **request}).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise Failure(f"its process ended: {self._why()}") from None
        answer: dict[str, Any] = json.loads(self._line(limit))
        if "unsupported" in answer:
            raise NotOffered(answer["unsupported"])
        if "failed" in answer:
            raise Failure(answer["failed"])
        return answer

    def _line(self, limit: float) -> bytes:
        assert self.process.stdout is not None
        end = time.monotonic() + limit
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self.process.stdout], [], [], max(end - time.monotonic(), 0.0))
            if not ready:
                self.end()
                raise Failure(f"no answer within {limit:.0f} s")
            more = os.read(self.process.stdout.fileno(), 1 << 16)
            if not more:
                raise Failure(f"its process ended: {self._why()}")
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _why(self) -> str:
        """The signal or the exit status, and the last line that it printed."""
        code = self.process.wait(timeout=10)
        if self.errors.closed:
            return "it was ended"
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        cause = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        return f"{cause}; {lines[-1][:200]}" if lines else cause

    def end(self) -> None:
        """End it and all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with suppress(BrokenPipeError):
                    stream.close()
        self.errors.close()
