"""What comes on top of the work: importing chainrule, compiling a network, calling a compiled function.

In: chainrule's settings. Out: a `Table`. A round is two processes with one folder for compiled code, empty at first: the first compiles
the network, the second finds it there. Compiling is what the first epoch takes longer than the next ones, in a process that has compiled
another network before.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

from .libraries import Settings
from .pool import environment
from .processes import output
from .results import Table
from .tables import duration


@dataclass(frozen=True)
class Cost:
    """What is measured, and the seconds that it may take. name: in what the script prints; runs: the processes of a round it is taken
    from."""

    title: str
    name: str
    limit: float
    runs: tuple[int, ...] = field(default=(0, 1))


COSTS = (
    Cost("importing chainrule", "import", 0.25),
    Cost("compiling MNIST 784-256-128-10, nothing compiled before", "compiling", 0.5, (0,)),
    Cost("the same, compiled by an earlier process", "compiling", 0.06, (1,)),
    Cost("a call of a compiled function: an array", "array", 10e-6),
    Cost("a call: an array, for value and gradient", "gradient", 10e-6),
    Cost("a call: an array, a whole number by keyword", "keyword", 10e-6),
    Cost("a call: a dict of two arrays, an array", "nest", 10e-6),
)


def once(settings: Settings) -> list[dict[str, float]]:
    """What both processes say.

    Raises: RuntimeError if one fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        variables = {**environment(settings), "CHAINRULE_CACHE": folder}
        return [json.loads(output("overhead_ours", [settings.backend, str(settings.threads)], variables)) for _ in range(2)]


def overhead(table: Table, settings: Settings, repeats: int, say: Callable[[str], None]) -> None:
    """Rounds of both; `table` is filled also if they are interrupted."""
    rounds: list[list[dict[str, float]]] = []
    try:
        for i in range(repeats):
            say(f"overhead: round {i + 1} of {repeats}")
            rounds.append(once(settings))
    except RuntimeError as error:
        table.notes.append(f"failed: {error}")
        table.failed = True
    finally:
        fill(table, rounds)


def fill(table: Table, rounds: list[list[dict[str, float]]]) -> None:
    """Medians, and which are above their limits."""
    for cost in COSTS if rounds else ():
        times = [each[run][cost.name] for each in rounds for run in cost.runs]
        seconds = median(times)
        verdict = "" if seconds <= cost.limit else " (too long)"
        table.cells.append((cost.title, f"{duration(seconds)}{verdict}", duration(cost.limit)))
        table.values.append({"what": cost.title, "median": seconds, "times": times, "limit": cost.limit})


def new_table() -> Table:
    """Empty."""
    return Table("overhead", "What comes on top of the work", ("", "time", "at most"))
