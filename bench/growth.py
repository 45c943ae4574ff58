"""How chainrule's own time grows: from the forward pass to both passes, with width and threads, with the number of parameters.

In: a `Bench`. Out: `Table`s, filled bit by bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import numpy as np

from .libraries import BOTH_PASSES, FORWARD, ONE_THREAD, OURS
from .measure import LIMIT, Bench, Candidate
from .pool import Failure
from .results import Measured, Table
from .rows import Row
from .tables import duration

PROMISED_PASSES = 3.0  # both passes take at most this many forward passes
PROMISED_THREADS = 1.05  # threads never make a run slower than this


def candidates(bench: Bench, rows: Sequence[Row], ways: Sequence[str], notes: list[str]) -> list[list[Candidate]]:
    """chainrule's ways on these rows, ready to be measured: one list a row. A row that cannot be done is noted and left out."""
    ready = []
    for row in rows:
        bench.say(f"{row.name}: {' and '.join(ways)} get ready")
        each = [Candidate(OURS.name, way, row, Measured(OURS.name, f"{way}, {row.name}", False)) for way in ways]
        try:
            for candidate in each:
                bench.process(OURS.name).ask("prepare", LIMIT, row=row.name, way=candidate.way)
        except Failure as failure:
            notes.append(f"{row.name}: {failure}")
            continue
        ready.append(each)
    return ready


def passes(table: Table, bench: Bench, rows: Sequence[Row]) -> None:
    """Forward and backward pass over the forward pass alone."""
    ready = candidates(bench, rows, (FORWARD, BOTH_PASSES, "fit"), table.notes)
    for each in ready:
        bench.rounds(each, table.notes)
        forward, both, step = (c.result for c in each)
        row = each[0].row
        if not (forward.times and both.times and step.times):
            table.failed = True
            continue
        ratio = median(b / a for a, b in zip(forward.times, both.times, strict=True))
        verdict = "" if ratio <= PROMISED_PASSES else " (too much)"
        table.cells.append((row.title, duration(forward.step), duration(both.step), f"{ratio:.2f}{verdict}", duration(step.step)))
        table.values.append({"row": row.name, "forward": forward.step, "both": both.step, "ratio": ratio, "step": step.step})
    bench.forget()


def widths(table: Table, line: Table, bench: Bench, rows: Sequence[Row]) -> None:
    """Steps on one thread and on all, for networks of growing width; then a line through time against parameters."""
    ready = candidates(bench, rows, (ONE_THREAD, "fit"), table.notes)
    for each in ready:
        bench.rounds(each, table.notes)
        one, several = (c.result for c in each)
        row = each[0].row
        if not (one.times and several.times):
            table.failed = True
            continue
        ratio = median(b / a for a, b in zip(one.times, several.times, strict=True))
        verdict = "" if ratio <= PROMISED_THREADS else " (slower)"
        table.cells.append(
            (row.title, f"{row.parameter_count:,}", duration(one.step), duration(several.step), f"{ratio:.2f}{verdict}")
        )
        table.values.append(
            {"row": row.name, "parameters": row.parameter_count, "one": one.step, "all": several.step, "ratio": ratio}
        )
    for threads, name in (("one", "one thread"), ("all", f"{bench.settings.threads} threads")):
        fit_line(line, name, [(v["parameters"], v[threads]) for v in table.values])
    bench.forget()


def fit_line(table: Table, name: str, points: Sequence[tuple[float, float]]) -> None:
    """time = a + b parameters, by least squares of relative errors, so that small networks count as much as large ones."""
    if len(points) < 3:
        return
    count, time = np.array(points, float).T
    (a, b), *_ = np.linalg.lstsq(np.stack([1 / time, count / time], 1), np.ones(len(time)), rcond=None)
    off = np.abs(a + b * count - time) / time
    r2 = 1 - np.sum((a + b * count - time) ** 2) / np.sum((time - time.mean()) ** 2)
    table.cells.append((name, duration(a), f"{b * 1e9:.3f} ns", f"{np.max(off):.0%}", f"{r2:.4f}"))
    table.values.append({"threads": name, "constant": a, "per_parameter": b, "worst": float(np.max(off)), "r2": float(r2)})


def new_tables(threads: int) -> tuple[Table, Table, Table]:
    """Empty: passes, widths, line."""
    first = ("network", "forward", "forward and backward", "ratio (at most 3)", "a whole step")
    second = ("network", "parameters", "one thread", f"{threads} threads allowed", "ratio (at most 1.05)")
    third = ("", "constant", "for each parameter", "furthest point", "R²")
    return (
        Table("passes", "Backpropagation costs about two forward passes", first),
        Table("widths", "Width, and threads", second),
        Table("line", "Time of a step against the number of parameters, over these widths", third),
    )
