"""Which states of a long chain of steps to keep for the backward pass, and which to compute again.

In: a number of steps, and a number of slots or a budget of bytes; for several chains, one budget for all of them. Out: integers only:
how many steps are computed again, and the actions in their order. What a step is, and where a slot lies, is the affair of whoever runs
them.

A chain of `steps` steps is cut at t = 0, L, 2 L, ... into units of `segment` = L steps, of which the last may be shorter. The backward
pass goes through the units from the last to the first. For each it needs the state that the unit begins with, from which it takes the
unit's steps once more, now with all their inner values written on the tape, and then backward. A slot holds the state that some unit
begins with; the first unit's counts as one. One more place, number `slots`, holds the state of a unit that is about to go backward and
has no slot.

An advance is a step taken without the tape. With n units and s slots of which one holds the start, the least number of advances is
L · t(n, s), where

    t(n, s) = r n - β(s + 1, r - 1), r the least with n ≤ β(s, r), β(s, r) = (s + r)! / (s! r!)

is reached by leaving a state in a slot on the way, going backward through all that follows with one slot less, and then through what
lies before with all of them.

Source: Griewank & Walther, "Algorithm 799: revolve", ACM Transactions on Mathematical Software 26, 2000, propositions 1 and 2;
Gruslys et al., "Memory-efficient backpropagation through time", NIPS 2016, whose cost counts each step on the tape as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import comb

import numpy as np

from ..errors import UsageError
from ..graph.node import Array
from ..records import record

BACKWARD = -1  # as the place where an action leaves its state
MOST_SLOTS = 1000  # numbers of slots that are tried for one length of segments
MOST_SUMS = 2**16  # plans of two chains that are put together in every way; of longer lists only some plans are


@record(frozen=True)
class Checkpoints:
    """A plan for a chain.

    Attributes: steps T; segment: the steps of a unit; slots: at most so many states are kept at a time, the start of the chain among
    them; advances: steps that are computed again, or for the first time without the tape; states: the slots, and the place of a unit
    that has none; bytes: what all of it takes, by the cost model it was chosen by.
    """

    steps: int
    segment: int
    slots: int
    advances: int
    bytes: int = 0

    @property
    def units(self) -> int:
        return _units(self.steps, self.segment)

    @property
    def states(self) -> int:
        return _states(self.units, self.slots)

    @property
    def kind(self) -> str:
        """In words: "all" inner values are kept; "segments" where each unit's first state is; else "recursive"."""
        return "all" if self.units == 1 else "segments" if self.slots >= self.units - 1 else "recursive"

    def actions(self) -> Array:
        """What to do, in order: (2 · units - 1, 4) integers, each line (from, to, first, end).

        With `to` a place: begin with the state in place `from`, take the steps first to end - 1, and leave the state in place `to`,
        another one. With `to` BACKWARD: take the steps of one unit from the state in place `from` with the tape, then go
        backward through them. Places are 0 to slots; 0 holds the start of the chain from the beginning on.

        >>> plan(5, 2, segment=2).actions().tolist()
        [[0, 1, 0, 2], [1, 2, 2, 4], [2, -1, 4, 5], [1, -1, 2, 4], [0, -1, 0, 2]]
        """
        lines = np.array(list(_actions(self.units, self.slots)), np.int64)
        lines[:, 2:] = np.minimum(lines[:, 2:] * self.segment, self.steps)
        return lines


def plan(steps: int, slots: int, segment: int = 1) -> Checkpoints:
    """The plan with the fewest advances for so many slots; more than can be used are left out.

    >>> [plan(1000, s).advances for s in (50, 20, 10)], plan(10_000, 141).advances
    ([1948, 2747, 3636], 19857)
    """
    if min(steps, slots, segment) < 1:
        raise UsageError(f"checkpoints need at least one step, slot and step of a segment, not {steps}, {slots} and {segment}")
    segment = min(segment, steps)
    units = _units(steps, segment)
    slots = min(slots, max(units - 1, 1))  # the last unit begins with a state that needs no slot
    return Checkpoints(steps, segment, slots, segment * least_advances(units, slots))


def least_advances(units: int, slots: int) -> int:
    """t(n, s) of the module's formula: the fewest advances, in units.

    >>> least_advances(1000, 1) == sum(range(1000))  # from the start each time
    True
    """
    if slots == 1:
        return units * (units - 1) // 2
    r = _repetitions(units, slots)
    return r * units - _reach(slots + 1, r - 1)


def choose(steps: int, budget: int, *, state: int, taped: int, chunk: int = 1, fixed: int = 0, saved: int = 0) -> Checkpoints:
    """The plan with the fewest advances of all that fit a budget; of several, the smallest.

    Args: steps T; budget: bytes; state: bytes of one state; taped: bytes of one step on the tape, all that it keeps counted, but for the
    state that the unit begins with; chunk: segments are multiples of so many steps; fixed: bytes that any plan takes; saved: so many
    fewer have to fit where all steps are on the tape, because something else can lie there as well.
    Raises: `UsageError` with the least budget, if none fits.

    >>> chosen = choose(1000, 100_000, state=100, taped=400, chunk=8)
    >>> chosen.kind, chosen.segment, chosen.slots, chosen.advances, chosen.bytes
    ('segments', 200, 4, 800, 80500)
    """
    _check(steps, state, taped, chunk, fixed)
    best: Checkpoints | None = None
    least = 0
    for segment in _segments(steps, chunk):
        tape, units = fixed + segment * taped, _units(steps, segment)
        within = budget if units > 1 else budget + saved
        smallest = tape + state * _states(units, 1)
        least = min(least or smallest, smallest - (within - budget))
        if smallest > within:
            continue
        found = plan(steps, 1 if units == 1 else (within - tape) // state - 1, segment)
        found = Checkpoints(steps, segment, found.slots, found.advances, tape + state * found.states)
        if best is None or (found.advances, found.bytes) < (best.advances, best.bytes):
            best = found
    if best is None:
        raise UsageError(
            f"{budget:,} bytes of memory are too few for {steps:,} steps: at least {least:,} are needed. Give that much, or train on "
            "fewer rows at a time or shorter sequences"
        )
    return best


def _check(steps: int, state: int, taped: int, chunk: int, fixed: int) -> None:
    if min(steps, state, taped, chunk) < 1 or fixed < 0:
        raise UsageError(
            f"checkpoints need positive numbers of steps, bytes and steps of a chunk, not {(steps, state, taped, chunk, fixed)}"
        )


# ---- several chains ----------------------------------------------------------------------------------------------------------


def frontier(steps: int, *, state: int, taped: int, chunk: int = 1, fixed: int = 0, saved: int = 0) -> tuple[Array, Array]:
    """The bytes and the advances of all plans that another one beats in one of them only: bytes rise, advances fall to 0.

    Args: as for `choose`. Of more than `MOST_SLOTS` numbers of slots for one length of segments, some are left out.

    >>> [part.tolist() for part in frontier(6, state=1, taped=10)]
    [[12, 13, 14, 15, 16, 23, 32, 61], [15, 8, 7, 6, 5, 4, 3, 0]]
    """
    _check(steps, state, taped, chunk, fixed)
    lengths = list(_segments(steps, chunk))
    numbers = [_numbers_of_slots(_units(steps, n)) for n in lengths]
    segment, slots = np.repeat(lengths, [len(n) for n in numbers]), np.concatenate(numbers)
    units = -(-steps // segment)
    advances = segment * _fewest_advances(units, slots)
    return _best(fixed + segment * taped + np.where(units > 1, state * (slots + 1), state - saved), advances)[:2]


def shares(chains: Sequence[tuple[Array, Array]], budget: int) -> list[int]:
    """How many bytes each of several chains may take, such that they take no more than a budget together and the least work.

    Args: chains: the bytes and the work of each one's plans, as `frontier` gives them. One plan of each fits.
    Returns: the bytes of one plan of each. Of three chains or more, plans that differ by little are not all tried.

    >>> shares([(np.array([10, 50]), np.array([7, 0])), (np.array([20, 30, 70]), np.array([9, 5, 0]))], 100)
    [50, 30]
    """
    *others, last = chains
    size, effort, ways = np.zeros(1, np.int64), np.zeros(1), []
    for n, chain in enumerate(others):
        free = budget - sum(int(c[0][0]) for c in chains[n + 1 :])
        size, effort, way = _together((size, effort), chain, free)
        ways.append(way)
    at = np.searchsorted(last[0], budget - size, "right") - 1  # the most that is left for the last one
    place = np.lexsort((size + last[0][at], effort + last[1][at]))[0]
    found = [int(last[0][at[place]])]
    for chain, way in zip(reversed(others), reversed(ways), strict=True):
        place, own = way[:, place]
        found.append(int(chain[0][own]))
    return found[::-1]


def _together(one: tuple[Array, Array], other: tuple[Array, Array], budget: int) -> tuple[Array, Array, Array]:
    """The frontier of two together, as far as a budget goes: bytes, work, and the places in both."""
    i = np.flatnonzero(one[0] + other[0][0] <= budget)
    j = np.flatnonzero(other[0] + one[0][0] <= budget)
    if len(i) * len(j) > MOST_SUMS:
        i, j = (n[_spread(part[0][n])] for n, part in ((i, one), (j, other)))
    size, effort = ((a[i][:, None] + b[j]).ravel() for a, b in zip(one, other, strict=True))
    size, effort, kept = _best(size, effort)
    fits = size <= budget
    return size[fits], effort[fits], np.stack([i[kept[fits] // len(j)], j[kept[fits] % len(j)]])


def _spread(size: Array) -> Array:
    """Places in a rising list, few enough, by equal ratios; its ends are among them."""
    marks = np.geomspace(max(size[0], 1), max(size[-1], 1), int(MOST_SUMS**0.5) - 1)
    return np.unique([0, *np.searchsorted(size, marks[1:-1]), len(size) - 1])


def _best(size: Array, effort: Array) -> tuple[Array, Array, Array]:
    """Those that are smaller or less work than each other one, and their places; the smallest first."""
    order = np.lexsort((effort, size))
    least = np.minimum.accumulate(effort[order])
    kept = order[np.r_[True, least[1:] < least[:-1]]]
    return size[kept], effort[kept], kept


def _numbers_of_slots(units: int) -> Array:
    most = max(units - 1, 1)
    found: Array = np.arange(1, most + 1)
    if most > MOST_SLOTS:
        found = np.unique(np.rint(np.geomspace(1, most, MOST_SLOTS)).astype(np.int64))
    return found


def _fewest_advances(units: Array, slots: Array) -> Array:
    """`least_advances` of many at a time: r goes up until β(s, r) reaches each n."""
    found: Array = units * (units - 1) // 2  # with one slot
    left = np.flatnonzero(slots > 1)
    reach, r = np.ones(len(left), np.int64), 0
    while left.size:
        n, s, before, r = units[left], slots[left], reach, r + 1
        reach = before * (s + r) // r
        done = reach >= n
        found[left[done]] = (r * n - before * (s + r) // (s + 1))[done]  # β(s + 1, r - 1) = β(s, r - 1) (s + r) / (s + 1)
        left, reach = left[~done], reach[~done]
    return found


# ---- segments, units and slots -----------------------------------------------------------------------------------------------


def _segments(steps: int, chunk: int) -> Iterator[int]:
    """Of all segments, those that are the shortest with their number of units: any longer one takes more memory and more time. There
    are about 2 √(T / c)."""
    chunks = units = -(-steps // chunk)
    while units > 1:
        each = -(-chunks // units)
        units = -(-chunks // each)
        yield each * chunk
        units -= 1
    yield steps


def _units(steps: int, segment: int) -> int:
    return -(-steps // segment)


def _states(units: int, slots: int) -> int:
    """States in memory at a time: the slots, and the one that the unit on the tape begins with; but one that begins with the start of
    the chain has it in its slot."""
    return slots + 1 if units > 1 else 1


def _reach(slots: int, repetitions: int) -> int:
    """β(s, r): so many units can be gone through backward if none is taken more often than r times without the tape."""
    return comb(slots + repetitions, slots) if repetitions >= 0 else 0


def _repetitions(units: int, slots: int) -> int:
    """The least r with n ≤ β(s, r), by halving."""
    low, high = -1, 1
    while _reach(slots, high) < units:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _reach(slots, middle) < units else (low, middle)
    return high


def _actions(units: int, slots: int) -> Iterator[tuple[int, int, int, int]]:
    """The actions as lines of places and units."""
    work = slots
    waiting = [(0, units, 0, _repetitions(units, slots))]  # parts to go through: first unit, end, place of its state, r or more
    while waiting:
        first, end, place, r = waiting.pop()
        left = slots - place  # places of its own, that of its first state included
        if left == 1:
            for last in range(end - 1, first, -1):
                yield place, work, first, last
                yield work, BACKWARD, last, last + 1
            yield place, BACKWARD, first, first + 1
        elif end - first == 1:
            yield place, BACKWARD, first, end
        else:
            count = end - first
            while _reach(left, r - 1) >= count:
                r -= 1
            cut = first + max(1, _reach(left, r - 2), count - _reach(left - 1, r))
            yield place, place + 1, first, cut
            waiting.append((first, cut, place, r - 1))
            waiting.append((cut, end, place + 1, r))
