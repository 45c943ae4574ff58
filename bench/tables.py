"""Results as text for a terminal, as Markdown for the README, as JSON.

In: a `Report`. Out: strings. Every table is made once, as rows of cells, and then laid out in either way.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from .libraries import LIBRARIES
from .results import Report, RowResult, Table

BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"
NOISY = 0.15  # a spread of rounds that is pointed out


def duration(seconds: float | None) -> str:
    """Three digits and a unit.

    >>> duration(1.234e-5), duration(0.0432), duration(None)
    ('12.3 µs', '43.2 ms', '-')
    """
    if seconds is None:
        return "-"
    for factor, unit in ((1e9, "ns"), (1e6, "µs"), (1e3, "ms"), (1.0, "s")):
        value = seconds * factor
        if abs(value) < 999.5 or unit == "s":
            digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
            return f"{value:.{digits}f} {unit}"
    raise AssertionError


def main_table(rows: Sequence[RowResult]) -> Table:
    """The rows of networks: the best way of each library, ours, the ratio, the share of the peak, the floor."""
    names = list(LIBRARIES)
    heading = ("network", *names, "set-up", "times faster", "at least / aim", "share of peak, 1 core / all", "floor")
    table = Table("networks", "A training step (forward, backward, Adam); for each library its fastest way", heading)
    for r in rows:
        cells = []
        for name in names:
            best = r.best(name)
            way = "" if best is None or len(LIBRARIES[name].ways) < 2 else f" ({best.way})"
            noise = "" if best is None or best.spread < NOISY else f" ±{best.spread:.0%}"
            cells.append("-" if best is None else f"{duration(best.step)}{way}{noise}")
        ratio = "losses disagree" if r.agreed is False else "-" if r.ratio is None else f"{r.ratio:.2f}"
        if r.ratio is not None and r.row.least is not None and r.ratio < r.row.least:
            ratio += " (too little)"
        if r.ratio is not None and r.missing():
            ratio += f" (without {', '.join(r.missing())})"
        wanted = "-" if r.row.least is None else f"{r.row.least:g} / {r.row.aim:g}"
        shares = "-" if r.shares is None else f"{r.shares[0]:.1%} / {r.shares[1]:.1%}"
        setup = duration(r.ours.setup if r.ours else None)
        table.cells.append((r.row.title, *cells, setup, ratio, wanted, shares, duration(r.floor)))
    return table


def ways_table(rows: Sequence[RowResult]) -> Table:
    """Every way of every library."""
    heading = ("network", "library", "way", "step", "±", "set-up", "losses differ by")
    table = Table("ways", "All ways that were measured", heading)
    for r in rows:
        for m in r.measured:
            off = "-" if m.deviation is None else f"{m.deviation:.0e}"
            step, spread = (duration(m.step), f"{m.spread:.0%}") if m.times else ("-", "-")
            table.cells.append((r.row.name, m.library, m.way, step, spread, duration(m.setup), off))
    return table


def all_tables(report: Report) -> list[Table]:
    """Those with something in them."""
    rows = [r for r in report.rows if r.measured or r.notes]
    main = main_table(rows)
    main.notes = [f"{r.row.name}: {note}" for r in rows for note in r.notes]
    return [t for t in (main, ways_table(rows), *report.tables) if t.cells or t.notes]


def about(report: Report) -> list[str]:
    """The machine, the versions, the time: a line each."""
    machine, versions = report.machine, ", ".join(f"{n} {v}" for n, v in report.versions.items())
    cut = " Interrupted: not everything is here." if report.interrupted else ""
    return [
        f"{machine['processor']}, {machine['threads']} of {machine['cores']} cores, {machine['system']}. {versions}.",
        f"Multiply-adds in float32: {machine['peak']}. Medians of {machine['repeats']} rounds; it took {report.seconds:.0f} s.{cut}",
        *retaken(machine.get("retaken", {}), machine.get("short", 0)),
    ]


def retaken(by_library: Mapping[str, int], short: int) -> list[str]:
    """For lack of cores near each other.

    >>> retaken({"JAX": 3, "chainrule": 0}, 1)
    ['For lack of cores near each other, measurements were taken again (JAX 3); without them in the end: 1.']
    """
    found = ", ".join(f"{name} {n}" for name, n in by_library.items() if n)
    lack = f"For lack of cores near each other, measurements were taken again ({found}); without them in the end: {short}."
    return [lack] if found else []


def text(report: Report) -> str:
    """For a terminal."""
    parts = ["\n".join(about(report))]
    for table in all_tables(report):
        grid = [table.heading, *table.cells]
        widths = [max(len(row[i]) for row in grid) for i in range(len(table.heading))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in grid]
        lines.insert(1, "  ".join("-" * w for w in widths))
        parts.append("\n".join([table.title, "", *(lines if table.cells else []), *(f"  {note}" for note in table.notes)]))
    return "\n\n".join(parts) + "\n"


def markdown(report: Report) -> str:
    """For the README: everything but the table of all ways."""
    parts = []
    for table in all_tables(report):
        if table.name == "ways":
            continue
        lines = [f"| {' | '.join(row)} |" for row in (table.heading, ("---",) * len(table.heading), *table.cells)]
        notes = "".join(f"\n- {note}" for note in table.notes)
        parts.append(f"{table.title}:\n\n" + "\n".join(lines if table.cells else []) + ("\n" + notes if notes else ""))
    return "\n\n".join([" ".join(about(report)), *parts]) + "\n"


def write(report: Report, to_json: Path | None, to_markdown: Path | None) -> None:
    """Files. A Markdown file with the lines `<!-- bench: begin -->` and `<!-- bench: end -->` keeps all but what is between them."""
    if to_json is not None:
        to_json.write_text(json.dumps(report.plain(), indent=1, default=str) + "\n", encoding="utf-8")
    if to_markdown is not None:
        made = markdown(report)
        old = to_markdown.read_text(encoding="utf-8") if to_markdown.exists() else ""
        if BEGIN in old and END in old:
            pattern = f"{re.escape(BEGIN)}.*?{re.escape(END)}"
            made = re.sub(pattern, lambda _: f"{BEGIN}\n{made}{END}", old, count=1, flags=re.DOTALL)
        to_markdown.write_text(made, encoding="utf-8")
