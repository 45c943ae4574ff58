"""How many threads a run takes.

In: what the user asked for, the graphs that a run is made of, and how long steps took. Out: into how many units work is cut, and how many
threads do them. Results have the same bits whatever is chosen, so the choice may change while a run goes on.

Where nobody asked for a number, ways are timed against each other: a small step begins on one thread, and others are tried only if
there is enough left to do that compiling it again pays; a large one begins on all processors. A machine that becomes busy is noticed by
steps that take longer, and the ways are timed again.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from functools import cache
from math import prod

from ..graph.node import Graph
from ..ops.contract import parse
from .threads import available

LARGE = 4e6  # operations in a step from which on threads surely help
LEAST_STEP = 4e-6  # seconds: a step shorter than that is over before threads have met
LEAST_WORK = 0.5  # seconds of work, behind and ahead, that are worth another compilation
SLICES = 3  # how often a way is timed before it is judged
TRIAL = 0.002  # seconds in native code while ways are timed
SLICE = 0.1  # and when one has been chosen
WORSE = 1.5  # times its best, several times in a row: the machine has become busy
KEPT = 256  # how many kinds of steps are remembered


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


@dataclass
class _Timing:
    """What is known of steps of one size: seconds of a step by each way, how often each was timed, and all seconds so far."""

    best: dict[Way, float] = field(default_factory=dict)
    timed: dict[Way, int] = field(default_factory=dict)
    spent: float = 0.0
    slow: int = 0


# By the number of operations in a step: networks that have it in common have much else in common, and a session that begins with what
# another has found out need not try again.
_timings: OrderedDict[float, _Timing] = OrderedDict()


class Crew:
    """The choice of one session. threads: what the user asked for, None for what is best."""

    def __init__(self, threads: int | None) -> None:
        self._asked = threads
        self._work = 0.0
        self._timing = _Timing()

    def expect(self, graph: Graph) -> None:
        """Be told of what steps are made of, before they are taken."""
        work = operations(graph)
        if work > self._work:
            self._work = work
            self._timing = _timings.setdefault(work, _Timing())
            _timings.move_to_end(work)
            while len(_timings) > KEPT:
                _timings.popitem(last=False)

    def way(self, left: int) -> Way:
        """How to take the next steps, of which `left` are left."""
        if self._asked is not None:
            return Way(self._asked, self._asked)
        first, second = self._ways()
        timed = self._timing.timed
        if first == second or timed.get(first, 0) < SLICES or not self._worth(first, left):
            return first
        if timed.get(second, 0) < SLICES:
            return second
        return min((first, second), key=lambda w: self._timing.best[w])

    def _ways(self) -> tuple[Way, Way]:
        count = processors()
        large = self._work >= LARGE
        return (Way(count, count), Way(count, 1)) if large else (Way(1, 1), Way(count, count))

    def _worth(self, first: Way, left: int) -> bool:
        t = self._timing
        step = t.best[first]
        return len(t.best) > 1 or self._work >= LARGE or (step >= LEAST_STEP and step * left + t.spent >= LEAST_WORK)

    @property
    def patience(self) -> float:
        """Seconds that the next steps may take before Python looks again: few while ways are being timed."""
        if self._asked is not None or all(self._timing.timed.get(w, 0) >= SLICES for w in self._ways()):
            return SLICE
        return SLICE if self._timing.timed.get(Way(1, 1), 0) >= SLICES else TRIAL

    def took(self, way: Way, steps: int, seconds: float) -> None:
        """Be told how long steps took."""
        if not steps:
            return
        each, t = seconds / steps, self._timing
        t.spent += seconds
        t.timed[way] = t.timed.get(way, 0) + 1
        t.slow = t.slow + 1 if each > WORSE * t.best.get(way, each) else 0
        t.best[way] = min(each, t.best.get(way, each))
        if t.slow >= SLICES and way.threads > 1:
            t.slow = 0
            t.best.clear()
            t.timed.clear()
