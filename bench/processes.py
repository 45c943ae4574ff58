"""Whole processes: import, set up, 1000 steps of XOR, end. What a script or a command costs.

In: the libraries. Out: a `Table`. Each script is what a user of that library would write; it must have learnt XOR, or there is no
ratio. The first run is told apart: it may fill caches on the disk.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median

from .libraries import Library, Settings
from .pool import environment
from .results import Table

LEARNT = 0.1  # the loss starts near log 2 = 0.69
LEAST, AIM = 4.0, 6.0
AGAINST = "scikit-learn"
LIMIT = 120.0


def once(library: Library, settings: Settings) -> float:
    """Seconds from start to end.

    Raises: RuntimeError if the script fails or does not learn.
    """
    begun = time.perf_counter()
    said = output(library.whole, [] if library.peer else [settings.backend], environment(settings))
    seconds = time.perf_counter() - begun
    loss = float(said.split()[-1])
    if not loss < LEARNT:
        raise RuntimeError(f"it did not learn XOR: its last loss is {loss:.3g}")
    return seconds


def output(script: str, arguments: Sequence[str], variables: Mapping[str, str]) -> str:
    """What a script in the folder `whole` prints.

    Raises: RuntimeError if it fails.
    """
    command = [sys.executable, str(Path(__file__).parent / "whole" / f"{script}.py"), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, env=variables, check=False)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"took longer than {LIMIT:.0f} s") from None
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1][:200])
    return done.stdout


def whole(table: Table, libraries: Sequence[Library], settings: Settings, repeats: int, say: Callable[[str], None]) -> None:
    """Rounds of all scripts; `table` is filled also if they are interrupted."""
    times: dict[str, list[float]] = {library.name: [] for library in libraries if library.installed}
    missing = [library.name for library in libraries if not library.installed]
    table.notes += [f"{name}: not installed" for name in missing]
    try:
        for i in range(repeats + 1):
            say(f"whole processes: round {i} of {repeats}")
            for library in libraries:
                if library.name not in times:
                    continue
                try:
                    times[library.name].append(once(library, settings))
                except RuntimeError as error:
                    table.notes.append(f"{library.name} failed: {error}")
                    table.failed = True
                    del times[library.name]
    finally:
        fill(table, libraries, {name: each for name, each in times.items() if len(each) > 1})


def fill(table: Table, libraries: Sequence[Library], times: dict[str, list[float]]) -> None:
    """Medians without the first run, and how many times as long as ours each takes."""
    ours = next((median(times[x.name][1:]) for x in libraries if not x.peer and x.name in times), None)
    for library in libraries:
        each = times.get(library.name)
        if each is None:
            table.cells.append((library.name, "-", "-", "-"))
            continue
        middle = median(each[1:])
        ratio = None if ours is None or not library.peer else middle / ours
        wanted = f" (at least {LEAST:g}, aim {AIM:g})" if library.name == AGAINST else ""
        table.cells.append((library.name, f"{each[0]:.2f} s", f"{middle:.2f} s", "" if ratio is None else f"{ratio:.2f}{wanted}"))
        table.values.append({"library": library.name, "first": each[0], "median": middle, "times": each[1:], "ratio": ratio})


def new_table() -> Table:
    """Empty."""
    heading = ("library", "first run", "median of the others", "times as long as chainrule")
    return Table("process", "A whole process: import, compile, 1000 steps of XOR 2-8-1", heading)
