"""How each kernel runs: which axis lies in vector lanes, how large a tile of registers is, in what order the loops stand.

In: a kernel and the target. Out: a `Schedule`. All tuning numbers of how a kernel runs, and of what threads share out, are in this file
(what decides which kernels there are stands in simplify.py, fuse.py and flatten.py, how arrays of rows lie in lanes.py); they follow
from the number of registers, the width of a vector and the sizes of the caches. Lanes, chains and parts of sums settle the order of
sums, so they may depend neither on the number of threads nor on the caches: those two only say what is packed, and in how many pieces
work is cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from math import ceil, prod
from typing import NamedTuple

import numpy as np

from .affine import Affine, Axis, flat
from .former import EXPENSIVE
from .kernels import Kernel, Store, Value, bounds, ordered, plain, terms
from .target import Target

MOST_VECTORS = {32: 4, 16: 2}  # vectors side by side in a tile, by the number of registers
ACCUMULATORS = {32: 24, 16: 12}  # what is left holds operands; more would spill
MOST_ROWS = {32: 12, 16: 6}
SAME_SET = 4096  # bytes, and multiples of it, between lines of memory that share a set of the first cache
MOST_IN_SET = 6  # rows of a tile whose lines do: a set holds 8 lines, and the other operand wants some
MOST_COLUMNS = 4  # of a tile with a second axis beside its rows
MOST_ACROSS = 6  # the same where sums are over lanes
LEAST_ACROSS = 128  # terms of such sums
LEAST_FETCH = 32  # bytes read at a time of rows that are fetched ahead: less would fetch each line again and again
COSTLY = 15  # instructions of an expensive operator, about
LEAST_CHAINS = 8  # products in flight that hide the latency of a multiply-add (4 cycles, two a cycle)
MOST_CHAINS = 4
PACKED_REUSE = 4  # tiles of rows that read a packed operand at least
PACKED_LINE = 2048  # bytes from one line of an operand to the next
LONG_SUM = 1024  # terms, from which on they are summed in parts: each part's error is small, and there are few parts
NESTED_SUM = 64  # terms of the inner sums of a nest that is as long, from which on each is summed from nothing
CHUNK = 512  # terms (steps times rows) of a sum over a loop's steps that are added at a time
PARTS = 2  # of the rows that a loop sums over, each with a sum of its own
LEAST_PART = 8  # rows
MOST_HALVED = 2**19  # bytes of such sums: larger ones go through the caches once more for each part
TOGETHER = (8, 4)  # rows of sequences that end together, as far as work is concerned: a tile of registers has about as many;
GROUPS = 6  # the fewer where a batch would have less such groups, since each goes on to the end of its longest
FAR = 8  # times the second cache: a copy of data as large as that gains nothing
EVEN = (16, 8, 4)  # a unit is a multiple of the first of these that does not make it much longer: lanes stay full
LONGER = 1.07  # times as long
SMALL_BODY = 8  # instructions in a loop's body below which it is unrolled
UNROLL = 4
MOST_ALONE = 4  # hidden layers up to which each is tried alone as what threads share out
FEW_PANELS = 10  # so few, if their number is odd, are shared out badly
BROKEN_PANELS = (64, 128)  # columns of a panel that is no whole tiles, at least and at most
ENOUGH = 0.93  # of the lanes that would be full without such panels; of all lanes, in those of transposed matrices
LEAST_TRANSPOSED = 512  # rows of a matrix that lies transposed: sums across lanes cost little beside sums that long
NARROW = 0.75  # of the lanes that its columns would leave full, less than that
MOST_TRANSPOSED = 1024  # rows of a panel of such a matrix: one of ten columns takes little of the second cache
PARTS_OF_ROWS = 4  # of a matrix that is shared out along its rows
PARTS_OF_COLUMNS = 2  # of a matrix of one panel, if it is shared out along its columns
MOST_PARTS = 16  # of a sum over an axis that threads share out, so also panels of a transposed matrix
LINE = 64  # bytes of memory that processors fetch at a time
APART = 4096  # bytes between what threads write, each for itself: a core reads ahead no further, though from page to page
MOST_APART = 2**16  # bytes of an array whose parts are set apart for that: of longer parts their ends are little
MOST_PRIVATE = 1 / 4  # of the second cache, for copies of the state that a thread makes for itself
MOST_TWICE = 2**15  # bytes that are there twice so that threads need not meet at the end of a step; steps with more are long
TINY = 10_000  # operations in a step up to which calls of its kernels count
OPERATIONS = 5e10  # operators on numbers in a second and core, a multiply-add being two
BARRIER = 0.2e-6  # seconds that threads take to meet
FOREIGN = 0.14e-9  # seconds for each byte that another core has written


@dataclass(frozen=True)
class Schedule:
    """lanes: the axis in vector lanes (of the domain, or reduced), None for one number at a time. tile: the axis of which `rows`
    values stand in registers at once, beside `vectors` vectors of the lanes; side: another, of which `columns` do. chains: partial sums of
    each accumulator."""

    width: int
    lanes: Axis | None
    tile: Axis | None
    rows: int
    vectors: int
    chains: int
    unroll: int
    inner_rows: bool  # the loop over tiles of rows stands inside the one over tiles of lanes
    side: Axis | None = None
    columns: int = 1
    across: Axis | None = None  # a transposed copy: it is read along this axis and written along `lanes`, square by square

    def __str__(self) -> str:
        return (
            f"lanes {self.lanes} x{self.width}, tile {self.rows} of {self.tile} by {self.vectors}, {self.chains} chains, "
            f"unrolled {self.unroll}"
        )


def stride(touched: Value | Store, axis: Axis) -> int | None:
    """How far apart in memory neighbours along `axis` are of what is read or written; None if that is looked up."""
    if any(isinstance(i, Value) and axis in i.axes for i in touched.index):
        return None
    shape = touched.view if isinstance(touched, Store) else touched.shape
    return flat((i if isinstance(i, Affine) else Affine() for i in touched.index), shape).coefficient(axis)


def width_for(kernel: Kernel, target: Target, extent: int) -> int:
    """Lanes: as many of the widest floating-point type as fit; no more than there is work for."""
    values = kernel.values()
    floats = [v.dtype.itemsize for v in values if v.dtype.kind == "f"]
    sizes = floats or [v.dtype.itemsize for v in values if v.dtype.kind in "iu"]
    width = target.vector_bytes // max(sizes, default=4)
    while width > 1 and width // 2 >= extent:
        width //= 2
    return width


def schedule(kernel: Kernel, target: Target) -> Schedule:
    """The cheapest of a few ways to run the kernel."""
    square = _square(kernel, target)
    if square is not None:
        return square
    all_indices = [*(v.index for v in kernel.loads()), *(s.index for s in kernel.stores)]
    indices = [i for index in all_indices for i in index if isinstance(i, Value)]
    looked_up: frozenset[Axis] = frozenset().union(*(i.axes for i in indices))
    blocked = looked_up  # lanes that would each look at a place of their own
    # Axes on which it depends how much is summed: no two of their values stand side by side.
    single = frozenset().union(*(i.axes for i in bounds(kernel.values())), *(v.axes for v in ordered(list(kernel.limits()))))
    blocked |= single | kernel.between.keys()
    alone = {kernel.unit} if kernel.length == 1 else set()  # no two of a unit's places either
    free = [a for a in kernel.domain[kernel.sequential :] if a.extent > 1 and a not in single and a not in alone]
    summed = () if kernel.inside() else kernel.reduced  # what is stored where it is a term lies along lanes of the domain
    lanes: list[Axis | None] = [a for a in (*reversed(free), *summed) if a.extent > 1 and a not in blocked]
    ways = [
        _way(kernel, target, lane, tile)
        for lane in lanes or [None]
        for tile in [*(a for a in reversed(free) if a is not lane), None]
    ]
    beside = [*(a for a in free if a in looked_up), *(a for a in reversed(free) if a not in looked_up)]  # rows of data once
    ways += [
        _way(kernel, target, lane, tile, side, columns, vectors)
        for lane, most in _lanes_of_wide_tiles(kernel, lanes)
        for vectors in sorted({_most_vectors(kernel, lane, target), 1}, reverse=True)
        for tile, side in permutations((a for a in beside if a is not lane), 2)
        for columns in range(2, most + 1)
        if columns <= side.extent
    ]
    return min(ways, key=lambda w: w[0])[1]


def _lanes_of_wide_tiles(kernel: Kernel, lanes: Sequence[Axis | None]) -> Iterator[tuple[Axis, int]]:
    """Along which lanes a tile with two axes may pay, and of how many columns. Sums are not over lanes where an operand is turned: that is
    done while it is packed, for lanes of the domain."""
    turned = any(v.attrs.get("turned") for v in kernel.loads())
    for lane in lanes if kernel.reduced else ():
        if lane is not None and lane is kernel.inner:
            yield lane, MOST_COLUMNS
        elif lane in kernel.reduced and lane.extent >= LEAST_ACROSS and not turned:
            yield lane, MOST_ACROSS


def packs(kernel: Kernel, made: Schedule, threads: int, target: Target) -> list[Value]:
    """Operands whose part for one tile of lanes is first copied together, since all tiles of rows then read it from end to end: their
    lines lie so far apart that they would share few sets of the cache and few entries of the table of pages."""
    if made.tile is None or not made.inner_rows or made.lanes is None:
        return []
    length = cut(kernel, threads)[1] if made.tile is kernel.unit else made.tile.extent
    if length < PACKED_REUSE * made.rows:
        return []
    chosen = []
    for v in kernel.loads():
        over = [a for a in kernel.reduced if a in v.axes]
        if (
            made.tile in v.axes
            or made.side in v.axes
            or not over
            or not (stride(v, made.lanes) == 1 or _turned(v, over[-1]))
            or any(isinstance(i, Value) for i in v.index)
        ):
            continue
        line = (stride(v, over[-1]) or 0) * v.dtype.itemsize
        part = block(kernel, made, target)
        size = (part or prod(a.extent for a in over)) * made.vectors * made.width * v.dtype.itemsize
        if (part or line >= PACKED_LINE or v.attrs.get("turned")) and size >= target.level1 // 4 and size <= target.level2 // 2:
            chosen.append(v)
    return chosen


def _turned(v: Value, innermost: Axis) -> bool:
    """Whether an operand can be turned, square by square, while it is packed (copies.py)."""
    return bool(v.attrs.get("turned")) and stride(v, innermost) == 1


def block(kernel: Kernel, made: Schedule, target: Target) -> int:
    """How much of a long reduced axis is summed at a time, so that the part of an operand that all rows read stays in the cache; 0 if
    all of it does. It is a number of whole parts of LONG_SUM, in which long sums are taken anyway, so that no sum changes its order."""
    if made.tile is None or not made.inner_rows or len(kernel.reduced) != 1 or made.lanes in kernel.reduced:
        return 0
    (axis,) = kernel.reduced
    step = made.vectors * made.width * max(v.dtype.itemsize for v in kernel.loads())
    if axis.extent <= max(LONG_SUM, target.level2 // 2 // step):
        return 0
    return max(1, target.level2 // 4 // step // LONG_SUM) * LONG_SUM


def _square(kernel: Kernel, target: Target) -> Schedule | None:
    """For a kernel that only copies, in another order: squares that are transposed in registers."""
    if len(kernel.stores) != 1 or kernel.sequential or kernel.stores[0].value.op != "load":
        return None
    (store,) = kernel.stores
    if any(isinstance(i, Value) for i in (*store.value.index, *store.index)) or store.value.dtype.itemsize < 4:
        return None
    read, write = (flat(plain(i), n) for i, n in ((store.value.index, store.value.shape), (store.index, store.view)))
    across = [a for a in kernel.domain if read.coefficient(a) == 1 and write.coefficient(a) > 1]
    lanes = [a for a in kernel.domain if write.coefficient(a) == 1 and read.coefficient(a) > 1]
    width = target.vector_bytes // store.value.dtype.itemsize
    if len(across) != 1 or len(lanes) != 1 or min(across[0].extent, lanes[0].extent) < width // 2:
        return None
    return Schedule(width, lanes[0], None, 1, 1, 1, 1, False, across=across[0])


def _way(
    kernel: Kernel, target: Target, lane: Axis | None, tile: Axis | None, side: Axis | None = None, most_columns: int = 1,
    vectors: int = 0,
) -> tuple[float, Schedule]:  # fmt: skip
    """What it costs to run a kernel with these axes in registers, and how it then runs."""
    width = width_for(kernel, target, lane.extent) if lane is not None else 1
    sums = sum(v.op == "reduce" for v in kernel.values())
    vectors = vectors or _most_vectors(kernel, lane, target)
    columns = balanced(side.extent, most_columns)[0][2] if side is not None else 1
    rows = 1
    if tile is not None and sums and not kernel.inside():  # whose terms are made for one row only
        most = MOST_IN_SET if _share_a_set(kernel, tile) else MOST_ROWS[target.registers]
        budget = max(1, min(ACCUMULATORS[target.registers] // (vectors * columns * sums), most))
        rows = balanced(tile.extent, budget)[0][2]
    chains = _chains(kernel, lane, width, rows * columns * vectors * sums) if sums else 1
    spilled = _spilled(kernel, lane, (tile, rows), (side, columns), vectors, sums, target) if side is not None else 0
    cost, body = _cost(kernel, lane, tile, width, rows, vectors, side, columns, spilled)
    unroll = chains * (UNROLL if body * chains <= SMALL_BODY else 1)
    reuse = any(
        v.op == "load" and tile not in v.axes and lane in v.axes and (v.axes & set(kernel.reduced)) for v in kernel.values()
    )
    made = Schedule(width, lane, tile if rows > 1 else None, rows, vectors, chains, max(unroll, 1), reuse, side, columns)
    return cost, made


def _spilled(
    kernel: Kernel, lane: Axis | None, rows: tuple[Axis | None, int], columns: tuple[Axis | None, int], vectors: int, sums: int,
    target: Target,
) -> int:  # fmt: skip
    """How many registers a tile with two axes wants beyond those that there are: accumulators, and either the operands of all columns and
    of a row, or those of all rows and of a column (sums.py)."""

    def operands(axis: Axis | None) -> int:
        read = (v for v in kernel.loads() if axis in v.axes and not v.axes.isdisjoint(kernel.reduced))
        return max((vectors if lane in v.axes and lane in kernel.domain else 1 for v in read), default=0)

    row, column = operands(rows[0]), operands(columns[0])
    kept = min(columns[1] * column + row, rows[1] * row + column)
    return max(0, rows[1] * columns[1] * vectors * sums + kept - target.registers)


def _most_vectors(kernel: Kernel, lane: Axis | None, target: Target) -> int:
    """How many vectors of the lanes stand side by side: as many as leave all tiles about as full."""
    if lane is None or lane not in kernel.domain:
        return 1
    count = ceil(lane.extent / width_for(kernel, target, lane.extent))
    return ceil(count / ceil(count / MOST_VECTORS[target.registers]))


def _chains(kernel: Kernel, lane: Axis | None, width: int, accumulators: int) -> int:
    """Partial sums of each of so many accumulators: as many as hide the latency of an addition, if the innermost loop is long enough."""
    innermost = (lane if lane in kernel.reduced else kernel.reduced[-1]) if kernel.reduced else None
    steps = ceil(innermost.extent / (width if innermost is lane else 1)) if innermost is not None else 1
    if any(innermost in i.axes for i in bounds(kernel.values())):
        steps = 1  # how many there are is only known while running
    chains = 1
    while chains < MOST_CHAINS and accumulators * chains < LEAST_CHAINS and steps >= 4 * chains:
        chains *= 2
    return chains


def _share_a_set(kernel: Kernel, tile: Axis) -> bool:
    """Whether neighbours along `tile` of an array that is read for sums lie so that few of them fit into the first cache at once."""
    summed = set(kernel.reduced)
    read = (v for v in kernel.loads() if tile in v.axes and v.axes & summed)
    return any((stride(v, tile) or 1) * v.dtype.itemsize % SAME_SET == 0 for v in read)


def _cost(
    kernel: Kernel, lane: Axis | None, tile: Axis | None, width: int, rows: int, vectors: int, side: Axis | None = None,
    columns: int = 1, spilled: int = 0,
) -> tuple[float, float]:  # fmt: skip
    """About how many instructions, all in all and in the body of the innermost loop; so many registers are spilled there."""
    reduced = set(kernel.reduced)

    def registers(axes: frozenset[Axis]) -> int:
        beside = columns if side in axes else 1
        return (rows if tile in axes else 1) * beside * (vectors if lane in axes and lane not in reduced else 1)

    inner, outer = 2.0 * spilled, 0.0
    below = terms(v for v in kernel.values() if v.op == "reduce")
    limits = set(ordered(list(kernel.limits())))  # not counted: a sum has one order, whatever is known of where it ends
    for v in kernel.values():
        if v in limits:
            continue
        if v.op == "reduce":
            inner += 0.5 * registers(v.axes)
            outer += registers(v.axes) * (3 * np.log2(width) if lane in reduced and width > 1 else 0)
        elif v in below and v.axes & reduced:
            inner += _instructions(v, lane, width) * registers(v.axes)
        else:
            outer += _instructions(v, lane, width) * registers(v.axes)
    for s in kernel.stores:
        step = 1
        if lane is not None and lane not in reduced:
            step = flat((i if isinstance(i, Affine) else Affine() for i in s.index), s.view).coefficient(lane)
        outer += registers(frozenset(kernel.domain)) * (1.0 if step == 1 else 2.0 * width)

    def count(axis: Axis) -> int:
        if axis is lane:
            return ceil(axis.extent / (width * (vectors if axis not in reduced else 1)))
        if axis is side:
            return len_tiles(axis.extent, columns)
        return len_tiles(axis.extent, rows) if axis is tile else axis.extent

    tiles = prod(count(a) for a in kernel.domain)
    times = prod(count(a) for a in kernel.reduced)
    return tiles * (times * (inner + 1) + outer + 1), inner


def _instructions(v: Value, lane: Axis | None, width: int) -> float:
    """About how many a value takes for each register, if it is no sum."""
    if v.op == "load":
        if v.attrs.get("turned"):
            return 1.0  # it is packed in the other order
        step = stride(v, lane) if lane is not None and lane in v.axes else 0
        return 1.0 if step in (0, 1) else 2.0 * width
    if v.op == "philox":
        return 100.0
    return COSTLY if v.op in EXPENSIVE else 0.0 if v.op in ("constant", "iota") else 1.0


def len_tiles(extent: int, most: int) -> int:
    """How many tiles of at most `most` there are."""
    return ceil(extent / most)


def balanced(extent: int, most: int) -> list[tuple[int, int, int]]:
    """`extent` in tiles of at most `most`, as equal as can be: (start, how many, size), larger ones first.

    >>> balanced(32, 6)
    [(0, 2, 6), (12, 4, 5)]
    """
    if extent == 0:
        return [(0, 0, 1)]
    count = ceil(extent / most)
    size, larger = divmod(extent, count)
    parts = [(0, larger, size + 1), (larger * (size + 1), count - larger, size)]
    return [p for p in parts if p[1]]


def pieces(extent: int, size: int) -> list[tuple[int, int, int]]:
    """`extent` in pieces of `size` and a rest: (start, how many, size)."""
    count, rest = divmod(extent, size)
    return [p for p in ((0, count, size), (count * size, 1 if rest else 0, rest)) if p[1]]


def units(extent: int, threads: int) -> tuple[int, int]:
    """How many units an axis is shared out in, and the length of one; depends on nothing but these two numbers.

    >>> units(64, 2), units(100, 2), units(10, 2)
    ((2, 32), (2, 52), (2, 5))
    """
    least = max(1, ceil(extent / threads))
    even = (ceil(least / n) * n for n in EVEN if least >= n)
    length = next((n for n in even if n <= LONGER * least), least)
    return ceil(extent / length) if extent else 0, length


def share_of(thread: int, threads: int, count: int) -> tuple[int, int]:
    """Which of so many units a thread does: from one to another (exclusive)."""
    return thread * count // threads, (thread + 1) * count // threads


class Parts(NamedTuple):
    """An array in pieces of so many bytes, one for each unit; the last may be shorter."""

    units: int
    bytes: int

    def start(self, thread: int, threads: int) -> int:
        """The byte at which a thread's part begins."""
        return share_of(thread, threads, self.units)[0] * self.bytes


def cut(kernel: Kernel, threads: int) -> tuple[int, int]:
    """How many units a kernel has for so many threads, and the length of one."""
    if kernel.unit is None:
        return 1, 0
    if kernel.length:
        return ceil(kernel.unit.extent / kernel.length), kernel.length
    return units(kernel.unit.extent, threads)


def together(rows: int) -> int:
    """How many rows of a batch of sequences end together: work goes on to the end of the last of them.

    >>> together(64), together(32)
    (8, 4)
    """
    many, few = TOGETHER
    return many if rows >= GROUPS * many else few
