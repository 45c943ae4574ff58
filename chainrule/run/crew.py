"""How many threads a run takes.

In: what the user asked for, the graphs that a run is made of, and how long steps took. Out: into how many units work is cut, and how many
threads do them. Results have the same bits whatever is chosen, so the choice may change while a run goes on.

Where nobody asked for a number, ways are timed against each other: a small step begins on one thread, and others are tried only if
there is enough left to do that compiling it again pays; a large one begins on all processors. A machine that becomes busy is noticed by
steps that take longer, and the ways are timed again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import prod

from ..graph.node import Graph
from ..ops.contract import parse
from .threads import available

LARGE = 4e6  # operations in a step from which on threads surely help
LEAST_STEP = 4e-6  # seconds: a step shorter than that is over before threads have met
LEAST_LEFT = 0.5  # seconds of work left that are worth another compilation
SLICES = 3  # how often a way is timed before it is judged
WORSE = 1.5  # times its best, several times in a row: the machine has become busy


@dataclass(frozen=True)
class Way:
    """units: what the code was cut into; threads: how many run it."""

    units: int
    threads: int


@cache
def processors() -> int:
    """How many processors this process may use; asked once, since it takes a while."""
    return available()


def operations(graph: Graph) -> float:
    """About how many additions and multiplications a graph takes."""
    total = 0.0
    for node in graph.nodes():
        if node.op == "contract":
            left, right, _ = parse(node.attrs["spec"])
            a, b = node.args
            sizes = dict(zip(left, a.shape, strict=True)) | dict(zip(right, b.shape, strict=True))
            total += 2.0 * prod(sizes.values())
        elif node.op == "scan":
            total += node.attrs["length"] * operations(node.attrs["body"])
        else:
            total += node.type.size
    return total


class Crew:
    """The choice of one session. threads: what the user asked for, None for what is best."""

    def __init__(self, threads: int | None) -> None:
        self._asked = threads
        self._large: bool | None = None
        self._best: dict[Way, float] = {}  # seconds of a step
        self._timed: dict[Way, int] = {}
        self._slow = 0

    def expect(self, graph: Graph) -> None:
        """Be told of what steps are made of, before they are taken."""
        if self._large is None or not self._large:
            self._large = operations(graph) >= LARGE

    def way(self, left: int) -> Way:
        """How to take the next steps, of which `left` are left."""
        if self._asked is not None:
            return Way(self._asked, self._asked)
        count = processors()
        if count == 1:
            return Way(1, 1)
        first, second = (Way(count, count), Way(count, 1)) if self._large else (Way(1, 1), Way(count, count))
        if self._timed.get(first, 0) < SLICES or not self._worth(first, left):
            return first
        if self._timed.get(second, 0) < SLICES:
            return second
        return min((first, second), key=lambda w: self._best[w])

    def _worth(self, first: Way, left: int) -> bool:
        step = self._best[first]
        known = len(self._best) > 1 or self._large
        return bool(known) or (step >= LEAST_STEP and step * left >= LEAST_LEFT)

    def took(self, way: Way, steps: int, seconds: float) -> None:
        """Be told how long steps took."""
        if not steps:
            return
        each = seconds / steps
        self._timed[way] = self._timed.get(way, 0) + 1
        self._slow = self._slow + 1 if each > WORSE * self._best.get(way, each) else 0
        self._best[way] = min(each, self._best.get(way, each))
        if self._slow >= SLICES and way.threads > 1:
            self._slow = 0
            self._best.clear()
            self._timed.clear()
