"""The command line: `python -m bench [ROW ...]`."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

from . import compiling, general, growth, memory, overhead, peak, processes, tables
from .libraries import LIBRARIES, OURS, PEERS, Settings
from .measure import Bench
from .results import Report, RowResult
from .rows import ROWS, WIDTHS

EXTRAS = {
    "process": "a whole process, from import to end",
    "overhead": "importing chainrule, compiling the MNIST network, calling compiled functions",
    "compiling": "a recurrent network on short and on long sequences, with nothing compiled before",
    "memory": "backpropagation through 10,000 steps in 16 MB, beside the plain one",
    "passes": "forward and backward pass over the forward pass alone",
    "widths": "width 8 to 512 on one thread and on all; time against parameters",
}


def arguments() -> argparse.Namespace:
    """What was asked for."""
    rows = "\n".join(f"  {name:12} {what}" for name, what in ({r.name: r.title for r in ROWS} | EXTRAS).items())
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=f"{(__doc__ or '').splitlines()[0]}\n\nrows:\n{rows}\n\nexample: python -m bench xor digits",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    names = [*(r.name for r in ROWS), *EXTRAS]
    parser.add_argument("rows", nargs="*", metavar="ROW", help="what to measure; nothing: all")
    parser.add_argument("--repeats", type=int, default=5, help="rounds, whose medians are taken (5)")
    parser.add_argument("--seconds", type=float, default=0.3, help="of each measurement (0.3)")
    parser.add_argument("--threads", type=int, default=cores(), help="for every library (all cores)")
    parser.add_argument("--backend", help="chainrule's (native, if there is one)")
    parser.add_argument(
        "--only", action="append", metavar="LIBRARY", choices=list(LIBRARIES), help="leave out all others; repeatable"
    )
    parser.add_argument(
        "--general", action="store_true", help="only chainrule, on networks that nobody measured, and on layers written by hand"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there; between the marks, if it has them")
    given = parser.parse_args()
    wrong = [name for name in given.rows if name not in names]
    if wrong:
        parser.error(f'there is no row "{wrong[0]}"; there are {", ".join(names)}')
    if given.repeats < 1 or given.threads < 1 or not given.seconds > 0:
        parser.error("--repeats, --threads and --seconds are above 0")
    if given.general and (given.rows or given.only):
        parser.error("--general chooses its own networks, of chainrule alone")
    given.rows = given.rows or names
    given.backend = given.backend or default_backend()
    return given


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_backend() -> str:
    """The native one, as soon as there is one."""
    if not OURS.installed:
        return "none"
    from chainrule.nn import Module  # noqa: F401  # registers all backends, as any use of chainrule does
    from chainrule.run.backend import backends

    return "native" if "native" in backends else "reference"


def machine(settings: Settings, given: argparse.Namespace) -> dict[str, Any]:
    """What it was measured on."""
    rates = [peak.measure(n) for n in (1, settings.threads)]
    known = "not known, for llvmlite is not installed"
    if rates[0] is not None and rates[1] is not None:
        known = f"{rates[0] / 1e9:.0f} GFLOP/s on one core, {rates[1] / 1e9:.0f} on {settings.threads} ({peak.vectors()})"
    return {
        "processor": processor(), "cores": cores(), "threads": settings.threads, "system": platform.platform(terse=True),
        "python": platform.python_version(), "backend": settings.backend, "repeats": given.repeats, "seconds": given.seconds,
        "peak": known, "rates": rates, "load_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }  # fmt: skip


def processor() -> str:
    """Its name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def say(message: str) -> None:
    """Progress: one line that is written over, on a terminal; elsewhere a line each time something else is done."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{message}", end="", file=sys.stderr, flush=True)
    elif message and not message.partition(": round ")[2]:
        print(time.strftime("%H:%M:%S"), message, file=sys.stderr, flush=True)


def measure_all(given: argparse.Namespace, report: Report, bench: Bench) -> None:
    """Fill the report, in the order of the rows."""
    if given.general:
        report.tables += general.measure(bench)
        return
    chosen = [row for row in ROWS if row.name in given.rows]
    for row in chosen:
        result = RowResult(row, bench.settings.threads)
        report.rows.append(result)
        bench.row(row, result)
    if "process" in given.rows:
        table = processes.new_table()
        report.tables.append(table)
        processes.whole(table, bench.libraries, bench.settings, given.repeats, say)
    if OURS not in bench.libraries:
        return
    if "overhead" in given.rows:
        table = overhead.new_table()
        report.tables.append(table)
        overhead.overhead(table, bench.settings, given.repeats, say)
    if "compiling" in given.rows:
        table = compiling.new_table()
        report.tables.append(table)
        compiling.compiling(table, bench.settings, given.repeats, say)
    if "memory" in given.rows:
        table = memory.new_table()
        report.tables.append(table)
        memory.memory(table, bench)
    passes, widths, line = growth.new_tables(bench.settings.threads)
    report.tables += [passes, widths, line]
    if "passes" in given.rows:
        growth.passes(passes, bench, chosen or ROWS)
    if "widths" in given.rows:
        growth.widths(widths, line, bench, WIDTHS)


def main() -> int:
    """Measure, print, write. Returns 0; 1 if losses disagree or a library failed; 130 after Ctrl-C."""
    begun = time.perf_counter()
    given = arguments()
    settings = Settings(given.threads, given.threads == cores(), given.backend)
    libraries = [x for x in (*PEERS, OURS) if not given.only or x.name in given.only]
    report = Report(machine(settings, given))
    bench = Bench(settings, libraries, given.repeats, given.seconds, say)
    try:
        measure_all(given, report, bench)
    except KeyboardInterrupt:
        report.interrupted = True
    finally:
        bench.close()
        say("")
    report.machine |= {"retaken": bench.retaken, "short": bench.short}
    report.versions, report.seconds = dict(bench.versions), time.perf_counter() - begun
    print(tables.text(report), end="")
    tables.write(report, given.json, given.markdown)
    return 130 if report.interrupted else 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
