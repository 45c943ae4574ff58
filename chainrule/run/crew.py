"""How many threads a run takes.

In: what the user asked for, the graphs that a run is made of, and how long steps took. Out: into how many units work is cut, and how many
threads do them. Results have the same bits whatever is chosen, so the choice may change while a run goes on.

Where nobody asked for a number, there are as many as have enough to do, and that is timed against one thread. The way that was not
chosen is timed again as often as costs little, for a machine becomes busy, or idle: where both take about as long, at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from math import prod
from weakref import WeakKeyDictionary

from ..graph.node import Graph
from ..ops.contract import parse
from ..recent import keep, recall
from .threads import available

SHARE = 4e5  # operations in a step for each thread, at least: a few microseconds, twenty times what it takes to meet
RATE = 5e10  # operations in a second: a guess, until steps have been timed
SHORT = 0.001  # seconds of work that are over before threads that sleep have all begun
SLICES = 3  # how often a way is timed before it is judged
CLEARLY = 1.3  # a way that takes so many times as long as the other is judged at once
TRIAL = 0.004  # seconds in native code while ways are timed
SLICE = 0.1  # and when one has been chosen
PRICE = 0.01  # of the time, at most, is lost by timing the way that seems the slower one once more
KEPT = 256  # how many kinds of steps are remembered


@dataclass(frozen=True)
class Way:
    """units: what the code was cut into; threads: how many run it."""

    units: int
    threads: int


_counted: WeakKeyDictionary[Graph, float] = WeakKeyDictionary()


@cache
def processors() -> int:
    """How many processors this process may use; asked once, since it takes a while."""
    return available()


def operations(graph: Graph) -> float:
    """About how many additions and multiplications a graph takes."""
    known = _counted.get(graph)
    return known if known is not None else _counted.setdefault(graph, _count(graph))


def _count(graph: Graph) -> float:
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
class Pace:
    """What is known of steps of one size, in seconds. rough: how long those of the last slice by each way took, however short it was,
    which only tells how many to take at a time; last: those of the last slices that were long enough to judge by; idle: time since
    a way was last taken."""

    work: float
    rough: dict[Way, float] = field(default_factory=dict)
    last: dict[Way, deque[float]] = field(default_factory=dict)
    idle: dict[Way, float] = field(default_factory=dict)

    def likely(self) -> float:
        """About how long a step takes: what is known, or a guess."""
        return min(tuple(self.rough.values()), default=self.work / RATE)

    def step(self, way: Way) -> float:
        """Seconds of a step this way: the least of the last few, since whatever disturbs makes it longer."""
        return min(self.last[way])

    def timed(self, way: Way, other: Way) -> bool:
        """Whether enough is known of this way, which is taken or the other one."""
        mine, others = self.last.get(way, ()), self.last.get(other, ())
        return len(mine) >= SLICES or (bool(mine) and bool(others) and min(mine) > CLEARLY * min(others))

    def order(self, way: Way, other: Way) -> tuple[Way, Way]:
        """The better one first."""
        return (way, other) if self.step(way) <= self.step(other) else (other, way)

    def due(self, way: Way, better: Way) -> bool:
        """Whether it is time to see if this way is still the slower one: what that is going to cost is little beside the time since."""
        mine, others = self.step(way), self.step(better)
        return PRICE * self.idle.get(way, 0.0) >= max(TRIAL, mine) * (1 - others / mine)


# By the number of operations in a step: networks that have it in common have much else in common, and a session that begins with what
# another has found out need not try again. Several Python threads may use one Pace at the same moment.
_paces: dict[tuple[float, int | None], Pace] = {}


class Crew:
    """The choice of one session. threads: what the user asked for, None for what is best."""

    def __init__(self, threads: int | None) -> None:
        self._asked = threads

    def pace(self, graphs: Iterable[Graph]) -> Pace:
        """What is known of steps made of these graphs."""
        work = max(map(operations, graphs), default=0.0)
        key = (work, self._asked)
        return recall(_paces, key) or keep(_paces, key, Pace(work), KEPT)

    def most(self, graphs: Iterable[Graph]) -> int:
        """The most threads that steps made of any of these graphs take."""
        return self._ways(self.pace(graphs))[0].threads

    def way(self, pace: Pace, left: int) -> Way:
        """How to take the next steps, of which `left` are left."""
        several, one = self._ways(pace)
        if several == one or left * pace.likely() < SHORT:
            return one
        if not pace.timed(several, one):
            return several
        if not pace.timed(one, several):
            return one
        best, other = pace.order(several, one)
        return other if pace.due(other, best) else best

    def _ways(self, pace: Pace) -> tuple[Way, Way]:
        """On several threads and on one, by the same code; the same twice where there is no choice."""
        if self._asked is not None:
            return Way(self._asked, self._asked), Way(self._asked, self._asked)
        count = max(1, min(processors(), int(pace.work / SHARE)))
        return Way(count, count), Way(count, 1)

    def steps(self, pace: Pace, way: Way, left: int) -> int:
        """How many steps to take before Python looks again: one to begin with, few while ways are being timed."""
        if way not in pace.rough:
            return 1
        step = min([pace.rough[way], *pace.last.get(way, ())])  # too few steps would be over before they can be judged
        several, one = self._ways(pace)
        known = pace.timed(several, one) and pace.timed(one, several)
        trying = several != one and not (known and way == pace.order(several, one)[0])
        return max(1, min(left, int((TRIAL if trying else SLICE) / max(step, 1e-9))))

    def took(self, pace: Pace, way: Way, steps: int, seconds: float) -> None:
        """Be told how long steps took."""
        if not steps:
            return
        for other in tuple(pace.last):
            pace.idle[other] = pace.idle.get(other, 0.0) + seconds
        known = way in pace.rough  # the very first slice finds caches cold and threads asleep
        pace.rough[way] = seconds / steps
        if known and seconds >= SHORT:
            pace.idle[way] = 0.0
            pace.last.setdefault(way, deque(maxlen=SLICES)).append(seconds / steps)
