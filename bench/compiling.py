"""How long compiling takes: a recurrent network on short sequences and on long ones, with nothing kept from before.

In: chainrule's settings. Out: a `Table`. A loop over time stays a loop, so the number of its steps must not matter. Each measurement
is two processes with one folder for compiled code, empty at first. The first compiles another network, so that the compiler itself has
been loaded; then it makes the network and takes its first steps. The second does the same, and finds the code in the folder: the
difference is what compiling took. Both fill memory that no step has used before, which takes longer than compiling if there is much.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from statistics import median

from .libraries import OURS, Settings
from .measure import LIMIT
from .pool import Failure, Process
from .results import Table
from .rows import SHORT_AND_LONG
from .tables import duration

PROMISED = 1.2  # the one takes at most so many times as long as the other


def once(name: str, settings: Settings) -> tuple[float, float]:
    """Seconds until a process has taken the first steps: with nothing compiled before, and again.

    Raises: `Failure`.
    """
    with tempfile.TemporaryDirectory() as folder:
        return _first_steps(name, settings, folder), _first_steps(name, settings, folder)


def _first_steps(name: str, settings: Settings, folder: str) -> float:
    process = Process(OURS, settings, {"CHAINRULE_CACHE": folder})
    try:
        process.start()
        process.ask("prepare", LIMIT, row="xor", way="fit")
        return float(process.ask("prepare", LIMIT, row=name, way="fit")["seconds"])
    finally:
        process.end()


def compiling(table: Table, settings: Settings, repeats: int, say: Callable[[str], None]) -> None:
    """Rounds of both; `table` is filled also if they are interrupted."""
    times: dict[str, list[tuple[float, float]]] = {row.name: [] for row in SHORT_AND_LONG}
    try:
        for i in range(repeats):
            say(f"compiling: round {i + 1} of {repeats}")
            for name, each in times.items():
                each.append(once(name, settings))
    except Failure as failure:
        table.notes.append(f"failed: {failure}")
        table.failed = True
    finally:
        fill(table, times)


def fill(table: Table, times: dict[str, list[tuple[float, float]]]) -> None:
    """Medians, and the ratio of the long to the short."""
    first: float | None = None
    for row in SHORT_AND_LONG:
        each = times[row.name]
        if not each:
            continue
        cold, again, took = median(c for c, _ in each), median(a for _, a in each), median(c - a for c, a in each)
        first = took if first is None else first
        verdict = "" if 1 / PROMISED <= took / first <= PROMISED else " (not the same)"
        table.cells.append((row.title, duration(cold), duration(again), duration(took), f"{took / first:.2f}{verdict}"))
        table.values.append({"row": row.name, "cold": cold, "again": again, "compiling": took, "ratio": took / first})


def new_table() -> Table:
    """Empty."""
    heading = ("network", "first steps, nothing compiled", "the same again", "compiling", "ratio (0.83 to 1.2)")
    return Table("compiling", "Compiling a loop over time, whatever its length", heading)
