"""Backpropagation through time within a budget of memory, beside the plain one.

In: a `Bench`. Out: a `Table`. Times are measured in rounds, both ways in one process. Memory is that of the operating system: the most
that a process of its own had in use during a fit, less what it had before, when network, data and code were there already. The budget
is one of state, so a copy of a batch comes on top.
"""

from __future__ import annotations

from math import prod
from statistics import median

from .libraries import OURS, WITHIN
from .measure import LIMIT, Bench, Candidate
from .pool import Failure, Process
from .results import Measured, Table
from .rows import LONG
from .tables import duration

BUDGET = 16e6  # bytes
PROMISED_TIME = 1.4  # times as long as plain
MOST = 1.1 * BUDGET + 4 * LONG.batch * prod(LONG.input)  # a tenth may be missed; x in float32
WAYS = ("fit", f"{WITHIN}16MB")


def memory(table: Table, bench: Bench) -> None:
    """Both ways; `table` is filled if both can be measured."""
    ready = [Candidate(OURS.name, way, LONG, Measured(OURS.name, way, False)) for way in WAYS]
    taken = []
    try:
        for candidate in ready:
            bench.say(f"{LONG.name}: memory of {candidate.way}")
            taken.append(_most(bench, candidate.way))
            bench.say(f"{LONG.name}: {candidate.way} gets ready")
            bench.process(OURS.name).ask("prepare", LIMIT, row=LONG.name, way=candidate.way)
        bench.rounds(ready, table.notes)
    except Failure as failure:
        table.notes.append(f"failed: {failure}")
    bench.forget()
    if all(c.result.times for c in ready):
        fill(table, [c.result for c in ready], taken)
    table.failed = not table.cells


def _most(bench: Bench, way: str) -> int:
    """Bytes. Large arrays go back to the system as soon as they are free, so that what a fit had before is not counted as there."""
    process = Process(OURS, bench.settings, {"MALLOC_MMAP_THRESHOLD_": "65536"})
    try:
        process.start()
        process.ask("prepare", LIMIT, row=LONG.name, way=way)
        return int(process.ask("most_memory", LIMIT, row=LONG.name, way=way)["bytes"])
    finally:
        process.end()


def fill(table: Table, found: list[Measured], taken: list[int]) -> None:
    """A line for each way: the first is the plain one."""
    plain = found[0]
    for i, (m, most) in enumerate(zip(found, taken, strict=True)):
        ratio = median(b / a for a, b in zip(plain.times, m.times, strict=True))
        over = " (too much)" if i and most > MOST else ""
        slow = " (too much)" if ratio > PROMISED_TIME else ""
        table.cells.append((m.way, f"{most / 1e6:.1f} MB{over}", duration(m.step), f"{ratio:.2f}{slow}"))
        table.values.append({"way": m.way, "bytes": most, "step": m.step, "ratio": ratio})


def new_table() -> Table:
    """Empty."""
    heading = (
        "",
        f"most memory in use (at most {MOST / 1e6:.1f} MB, a copy of the batch included)",
        "step",
        "times as long as plain (at most 1.4)",
    )
    return Table("memory", f"{LONG.title}: trained in 16 MB of state", heading)
