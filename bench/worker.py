"""The process in which a library lives.

In: requests, one JSON object a line on standard input. Out: an answer a line on what was standard output; what the library itself
prints goes to standard error. The end of the input is the end of the process.

    {"do": "start", "settings": {...}}                       -> {"version": ..., "seconds": of importing}
    {"do": "losses", "row": ..., "way": ..., "steps": n}     -> {"losses": [...], "seconds": until the first is there}: without dropout
    {"do": "prepare", "row": ..., "way": ...}                -> {"seconds": until the first step is taken}, unless `losses` did it
    {"do": "train", "row": ..., "way": ..., "steps": n}      -> {"seconds": ..., "steps": taken}
    {"do": "operations", "row": ..., "way": ...}             -> {"operations": of a step, as the library itself counts them}
    {"do": "most_memory", "row": ..., "way": ...}            -> {"bytes": in use at most while a step is taken, less those before}
    {"do": "forget"}                                         -> {}: networks are dropped

or {"unsupported": reason} or {"failed": error}.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .libraries import LIBRARIES, Adapter, Counted, Library, Settings, Trainee, Unsupported
from .rows import ALL_ROWS


class Worker:
    """The library's networks by row and way."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self.trainees: dict[tuple[str, str], Trainee] = {}
        self.adapter: Adapter
        self.settings: Settings

    def start(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Import the library."""
        begun = time.perf_counter()
        self.settings = Settings(**settings)
        self.adapter = importlib.import_module(f"bench.libraries.{self.library.module}")
        name = "scikit-learn" if self.library.needs == "sklearn" else self.library.needs
        try:
            found = version(name)
        except Exception:  # not installed, only on the path
            found = str(getattr(importlib.import_module(self.library.needs), "__version__", "?"))
        return {"version": found, "seconds": time.perf_counter() - begun}

    def losses(self, row: str, way: str, steps: int) -> dict[str, Any]:
        """The losses of the first steps. A network that has no dropout to begin with is kept: the one checked is the one measured."""
        begun = time.perf_counter()
        trainee = self.adapter.prepare(ALL_ROWS[row].comparable(), way, self.settings)
        found = trainee.losses(1)
        seconds = time.perf_counter() - begun
        found += trainee.losses(steps - 1)
        if not ALL_ROWS[row].has_dropout:
            self.trainees[row, way] = trainee
        return {"losses": found, "seconds": seconds}

    def prepare(self, row: str, way: str) -> dict[str, Any]:
        """Make the network, and take the first step: compilers wait for it."""
        if (row, way) in self.trainees:
            return {"seconds": None}
        begun = time.perf_counter()
        trainee = self.trainees[row, way] = self.adapter.prepare(ALL_ROWS[row], way, self.settings)
        trainee.train(1)
        return {"seconds": time.perf_counter() - begun}

    def train(self, row: str, way: str, steps: int) -> dict[str, Any]:
        """Steps against the clock."""
        trainee = self.trainees[row, way]
        gc.collect()
        taken, seconds = trainee.train(steps)
        return {"seconds": seconds, "steps": taken}

    def operations(self, row: str, way: str) -> dict[str, Any]:
        """Of a network that is there."""
        trainee = self.trainees[row, way]
        if not isinstance(trainee, Counted):
            raise Unsupported("it does not count its operations")
        return {"operations": trainee.operations()}

    def most_memory(self, row: str, way: str) -> dict[str, Any]:
        """As Linux counts it."""
        marks = Path("/proc/self/clear_refs")
        if not marks.exists():
            raise Unsupported("only Linux tells how much memory was in use at most")
        gc.collect()
        before = resident("VmRSS")
        marks.write_text("5", encoding="ascii")  # the highest mark falls to what is in use
        self.trainees[row, way].train(1)
        return {"bytes": resident("VmHWM") - before}

    def forget(self) -> dict[str, Any]:
        """Make room."""
        self.trainees.clear()
        gc.collect()
        return {}


def resident(what: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{what}:"))


def main() -> None:
    """Answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker(LIBRARIES[sys.argv[1]])
    for line in sys.stdin:
        request = json.loads(line)
        method: Callable[..., dict[str, Any]] = getattr(worker, request.pop("do"))
        try:
            answer = method(**request)
        except Unsupported as reason:
            answer = {"unsupported": str(reason)}
        except Exception as error:
            traceback.print_exc()
            answer = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
