"""A graph through all passes: kernels, phases, memory, loops, LLVM IR.

In: a graph in normal form, and for each input and output the buffer of the caller that it is. Out: `Code`, which can show each stage
and is one native function. `threads` says into how many units work is cut; a run may use fewer threads, and the results have the
same bits whatever it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from itertools import count, groupby
from math import ceil, prod
from typing import Any

import numpy as np

from ..derive.checkpoint import Checkpoints
from ..errors import GraphError
from ..graph.node import Graph, Node, Rows
from ..graph.verify import verify as verify_graph
from .absorb import absorbed
from .affine import Affine, Axis, of
from .alike import Likeness, adapted, counterparts, likeness
from .apart import moved, set_apart
from .branches import branched
from .carry import carried
from .copies import are_shared_alike, with_better_copies
from .cost import work
from .driver import BAD, CLOCKS, FINE, MOST_CLOCKS, NAMES, ONWARD, ORDER, REPORT, TURN
from .flatten import split
from .former import Index, Source
from .fuse import Names, Sink, fuse
from .gaps import parts_of
from .gather import gathered, parted
from .kernels import (
    I8,
    Buffer,
    Ends,
    Item,
    Kernel,
    Loop,
    Store,
    Value,
    elementwise,
    kernels_of,
    kernels_text,
    load,
    loops_of,
)
from .lanes import in_blocks, in_lanes
from .layout import Storage
from .llvm import Layout, Module
from .loops import Call, For, Function, If, Let, Place, Read, Register, Statement, loops_text
from .lower import lower
from .memory import Arena, arena
from .panels import in_panels
from .phases import Plan, accesses, plan
from .pooling import pooled
from .races import verify_plan
from .ragged import ragged
from .replay import fitted, pairs_of, plans_of, replayed
from .scans import improve
from .schedule import FAR, TINY, Parts, Schedule, block, cut, packs, schedule, together, units
from .share import share
from .siblings import with_siblings
from .simplify import simplify
from .summed import summed
from .target import Target
from .verify import verify

VERIFY_EACH_PASS = False  # the tests set it: what any pass makes is verified, not only what the last one does


@dataclass(frozen=True)
class Given:
    """An input of a graph. rows: it is gathered from `buffer`, an array of any number of rows, at the numbers in the step's order;
    else it is `buffer` itself."""

    buffer: Buffer
    rows: int = 0


@dataclass(eq=False)
class Code:
    """One entry, ready to be made machine code. `slots`: names of the caller's buffers, in the order of the table of pointers;
    `plans`: what is kept of each loop that another goes through backward, if there is a budget."""

    name: str
    graph: Graph
    plan: Plan
    arena: Arena
    functions: list[Function]
    slots: dict[Buffer, int]
    text: str
    plans: list[tuple[Loop, Checkpoints]]

    @property
    def parts(self) -> dict[int, Parts]:
        """The slots of the caller's arrays of which each thread touches its own part only, and the parts."""
        return {self.slots[b]: parts for b, parts in self.plan.parts.items() if b in self.slots}

    def stage(self, stage: str) -> str:
        """The text of a stage: "kernels" or "loops"."""
        if stage == "kernels":
            return "\n".join(f"phase {n}\n{kernels_text(items, '    ')}" for n, items in enumerate(self.plan.phases))
        return loops_text(self.functions)


def compile_graph(
    name: str, graph: Graph, inputs: Sequence[Given], outputs: Sequence[Buffer], state: Sequence[Buffer], slots: Mapping[str, int],
    rows: Sequence[Rows], target: Target, *, threads: int = 1, guard: int = 0, barrier: str = "", timed: bool = False,
    memory: int | None = None, storage: Storage | None = None,
) -> Code:  # fmt: skip
    """All passes.

    Args: outputs: where each output goes (a buffer of the state is written after it has been read); slots: the place of each of the
    caller's buffers, by name, in the table of pointers; rows: the row axis of each input; timed: cycles are counted for each kernel;
    memory: so many bytes of scratch may be taken, copies of data not counted. Whether that is possible is judged for one thread.
    storage: how the state lies.
    """
    graph = _verified_graph("branched", branched(_verified_graph("normalize", graph)))
    graph = _verified_graph("improve", improve(_verified_graph("simplify", simplify(graph))))
    steps = memory is None and all(name in slots for name in NAMES)
    arranged = cache(partial(_arranged, graph, inputs, outputs, state, rows, target, storage or Storage(target), steps))
    spare = fitted(lambda spare: arranged(spare, 1).bytes, memory)
    made = arranged(spare, threads)
    planned, every = made.planned, made.every
    schedules, first = _scheduled(every, target)
    for k, how in schedules.items():
        _set_aside(k, how, made.names, threads, target)
    if memory is not None:
        _unpack(made, memory)
    places = arena(planned, guard)
    functions = [
        f for item in every if item not in first for f in _functions(item, planned, schedules, threads, target, made.names)
    ]
    table = {b: slots[b.name] for b in _callers(planned)}
    layout = Layout(table, places.offsets, planned.twice, slots.get(TURN, 0), planned.parts)
    tiny = sum(work(i).flops for i in every) <= TINY and not timed
    module = Module(layout, target, inline=tiny)
    for f in functions:
        module.add(f)
    for item, (like, one, other) in first.items():
        module.add_alike(item.name, like.name, dict(zip(counterparts(like, one), counterparts(item, other), strict=True)))
    text = _written(name, made, module, barrier, threads, timed)
    return Code(name, graph, planned, places, functions, table, text, made.plans)


def _written(name: str, made: _Arrangement, module: Module, barrier: str, threads: int, timed: bool) -> str:
    """The text of a module that holds all kernels, with the entry that calls them and the one that prepares late copies."""
    prepare = Plan([list(made.planned.late)], {}, {}, made.planned.units, [])
    entries = [
        _Entry(made.planned, threads, module, made.state, timed).text(name),
        _Entry(prepare, threads, module, set()).text(f"{name}_prepare"),
    ]
    if timed and "@llvm.readcyclecounter()" not in barrier:
        module.declarations.add("declare i64 @llvm.readcyclecounter()")
    return module.text(barrier, *entries)


@dataclass(frozen=True)
class _Arrangement:
    """Kernels in the order in which they run; every: all of them, copies included; plans: of loops that are gone through backward;
    state: its buffers; data: bytes of copies of data; bytes: of all other scratch memory, as a budget counts it."""

    planned: Plan
    every: list[Item]
    plans: list[tuple[Loop, Checkpoints]]
    state: set[Buffer]
    data: int
    bytes: int
    names: Names


def _arranged(
    graph: Graph, inputs: Sequence[Given], outputs: Sequence[Buffer], state: Sequence[Buffer], rows: Sequence[Rows],
    target: Target, storage: Storage, steps: bool, spare: int | None, threads: int,
) -> _Arrangement:  # fmt: skip
    """The passes up to the order of kernels. steps: whether they are those of a step, which may use buffers in turns, and parts with gaps;
    spare: so many bytes above the least loops may keep; None: all that they can."""
    names, verified = Names(), _Verified()
    own = {b: replace(b) for b in (*(g.buffer for g in inputs), *outputs, *state)}  # passes settle how a state is laid out
    kept = {own[b]: None for b in state}
    items, sources = _gathered([replace(g, buffer=own[g.buffer]) for g in inputs], graph, target, names)
    data = sum(s.buffer.bytes for k in kernels_of(items) for s in k.stores)
    items = verified("fuse", items + fuse(graph, sources, [[Sink(own[b])] for b in outputs], rows, names))
    items = verified("in_lanes", in_lanes(items, target, names))
    items = verified("in_blocks", in_blocks(items, names))
    items = verified("with_siblings", with_siblings(items))
    items = verified("absorbed", absorbed(items))
    items = verified("pooled", pooled(items))
    items = verified("split", split(items, storage, names))
    items, panels = in_panels(items, set(kept), storage, names)
    items = verified("ragged", ragged(verified("in_panels", items), names))
    items = verified("parted", parted(items, names))
    pairs = pairs_of(items)
    costs = [max(1.0, work(p.forward).flops / p.steps) for p in pairs]
    plans = plans_of(pairs, costs, spare)
    items = verified("replayed", replayed(items, pairs, plans, names, threads))
    items = verified("gathered", gathered(items, names, threads))
    items = verified("carried", carried(items, names))
    items = verified("share", share(items, panels, set(kept), target, names))
    items = verified("with_better_copies", with_better_copies(items, target, names, threads))
    items = verified("summed", summed(items, target), last=True)
    planned = plan(items, list(kept), names, threads, steps and threads > 1)
    planned.parts = parts_of(planned) if steps else {}
    every = list(dict.fromkeys([*planned.late, *(i for items in planned.phases for i in items)]))
    verified("plan", every)
    if VERIFY_EACH_PASS:
        with _named("plan"):
            verify_plan(planned, kept, threads)
    for loop in loops_of(every):
        if loop.ends is not None:
            _set_lengths(loop, loop.ends, threads)
    set_apart(every, threads)
    if not any(isinstance(i, Loop) for i in every):  # what a loop shares out is not cut otherwise around it
        for kernel in kernels_of(every):
            kernel.length = 1 if _goes_by_blocks(kernel) else 0
    assert are_shared_alike(every, threads)
    size = arena(planned).bytes
    loops = [p.forward for p in pairs]
    return _Arrangement(planned, every, list(zip(loops, plans, strict=True)), set(kept), data, size - data, names)


class _Verified:
    """What a pass has made: under test it is verified after each that has changed something, else after the last of those that make
    kernels."""

    def __init__(self) -> None:
        self._known: list[Any] = []

    def __call__(self, made_by: str, items: list[Item], last: bool = False) -> list[Item]:
        if VERIFY_EACH_PASS or last:
            now = [*_contents(items)]
            if now != self._known:
                with _named(made_by):
                    verify(items)
            self._known = now
        return items


@contextmanager
def _named(made_by: str) -> Iterator[None]:
    """What is found wrong is said with the name of the pass."""
    try:
        yield
    except GraphError as error:
        raise GraphError(f"after {made_by}: {error}") from error


def _contents(items: Sequence[Item]) -> Iterator[Any]:
    """All that passes can change: equal if nothing has been. What is made of axes, values and stores is never changed itself."""
    for item in items:
        for f in fields(item):
            value = getattr(item, f.name)
            if f.name == "items":
                yield "loop", len(value)
                yield from _contents(value)
            elif f.init and f.name not in ("name", "origin"):
                yield tuple(value.items()) if isinstance(value, dict) else tuple(value) if isinstance(value, list) else value
        if isinstance(item, Kernel):
            yield from ((a.buffer, a.buffer.shape, a.buffer.lanes) for a in accesses(item))


def _verified_graph(made_by: str, graph: Graph) -> Graph:
    """A graph that a pass has made, verified under test."""
    if VERIFY_EACH_PASS:
        with _named(made_by):
            verify_graph(graph, normal=True)
    return graph


def _scheduled(
    every: Sequence[Item], target: Target
) -> tuple[dict[Kernel, Schedule], dict[Kernel, tuple[Kernel, Likeness, Likeness]]]:
    """The schedule of each kernel; and the first one like it, of those outside loops that are like another."""
    schedules: dict[Kernel, Schedule] = {}
    first: dict[Kernel, tuple[Kernel, Likeness, Likeness]] = {}
    known: dict[Any, tuple[Kernel, Likeness]] = {}
    outside = set(every)
    for kernel in kernels_of(every):
        own = likeness(kernel)
        like, one = known.setdefault(own.key, (kernel, own))
        schedules[kernel] = schedule(kernel, target) if like is kernel else adapted(schedules[like], one, own)
        if like is not kernel and like in outside and kernel in outside:
            first[kernel] = (like, one, own)
    return schedules, first


def _gathered(inputs: Sequence[Given], graph: Graph, target: Target, names: Names) -> tuple[list[Item], list[Source]]:
    """What each input is at an index. Rows that only products read are read where they are, if they are matrices, or so
    large that a copy would not stay near; others are copied together first, and cast."""
    items: list[Item] = []
    sources: list[Source] = []
    for given, node in zip(inputs, graph.inputs, strict=True):
        buffer = given.buffer
        if not given.rows:
            sources.append(partial(load, buffer))
            continue
        order = Buffer(ORDER, (given.rows,), np.dtype(np.int64), "input")
        size = prod(node.shape) * node.dtype.itemsize
        large = len(node.shape) == 2 or size > FAR * target.level2
        if large and buffer.dtype == node.dtype and _only_products_read(node, graph):
            sources.append(partial(_row, buffer, order))
            continue
        copy = Buffer(names("x"), node.shape, node.dtype, row=0)
        domain = tuple(Axis(names("i"), n) for n in node.shape)
        index = tuple(of(a) for a in domain)
        value = _row(buffer, order, index)
        if buffer.dtype != node.dtype:
            value = elementwise("cast", node.dtype, [value])
        items.append(Kernel(names("k"), domain, (), [Store(copy, index, value)], domain[0]))
        sources.append(partial(load, copy))
    return items, sources


def _only_products_read(node: Node, graph: Graph) -> bool:
    """Whether a node is read, and by products alone, inside loops too; as it is, or in another order of its axes."""
    users = [n for n in graph.nodes() if node in n.args]
    return bool(users) and node not in graph.outputs and all(_is_product_of(n, node, graph) for n in users)


def _is_product_of(user: Node, node: Node, graph: Graph) -> bool:
    if user.op == "contract":
        return True
    if user.op == "transpose":
        return _only_products_read(user, graph)
    if user.op != "scan":
        return False
    body: Graph = user.attrs["body"]
    first = user.attrs["states"]
    places = [i for i, a in enumerate(user.args) if a is node]
    within = range(first, first + user.attrs["sequences"])
    return all(i in within and _only_products_read(body.inputs[i], body) for i in places)


def _row(buffer: Buffer, order: Buffer, index: Index) -> Value:
    """An element of the row whose number stands in the step's order."""
    return load(buffer, (load(order, index[:1]), *index[1:]))


def _callers(planned: Plan) -> list[Buffer]:
    items = [*planned.late, *(i for items in planned.phases for i in items)]
    return list(dict.fromkeys(a.buffer for i in items for a in accesses(i) if a.buffer.space != "scratch"))


def _set_aside(kernel: Kernel, made: Schedule, names: Names, threads: int, target: Target) -> None:
    """Memory for the operands that the kernel copies together."""
    count, length = cut(kernel, threads)
    chosen = packs(kernel, made, threads, target)
    kernel.block = block(kernel, made, target) if chosen else 0
    lengths = {v: kernel.block or prod(a.extent for a in kernel.reduced if a in v.axes) for v in chosen}
    width = made.vectors * made.width
    kernel.packed = {v: Buffer(names("pack"), (count, n * width), v.dtype) for v, n in lengths.items()}  # never another kernel's
    if kernel.block and made.tile is not None:
        sums = [v for v in kernel.values() if v.op == "reduce"]
        rows = length if made.tile is kernel.unit else made.tile.extent
        size = rows * made.vectors * made.width * made.chains * len(sums)
        kernel.partial = Buffer(names("sum"), (count, size), sums[0].dtype)


def _unpack(made: _Arrangement, memory: int) -> None:
    """Let kernels read operands where they are, as long as there is no memory left to copy them together; the largest first."""
    for kernel in sorted(kernels_of(made.every), key=lambda k: -sum(b.bytes for b in _packs(k))):
        if not _packs(kernel) or arena(made.planned).bytes - made.data <= memory:
            return
        kernel.packed, kernel.block, kernel.partial = {}, 0, None


def _packs(kernel: Kernel) -> list[Buffer]:
    return [*kernel.packed.values(), *([kernel.partial] if kernel.partial is not None else [])]


def _functions(
    item: Item,
    planned: Plan,
    schedules: Mapping[Kernel, Schedule],
    threads: int,
    target: Target,
    names: Names,
    variables: tuple[Axis, ...] = (),
) -> list[Function]:
    if isinstance(item, Kernel):
        return [lower(*moved(item, schedules[item], threads, names), threads, target, variables)]
    inside = (*variables, item.axis)
    made = [f for i in planned.inner[item] for f in _functions(i, planned, schedules, threads, target, names, inside)]
    if item.meets:
        return made  # the entry holds the loop
    if item.ends is not None:
        return [*made, Function(item.name, variables, _to_its_end(item, item.ends, planned.inner[item], threads, inside))]
    alone = planned.units[item] is None
    calls: list[Statement] = [
        Call(i.name, 0, _count(i, planned, threads), inside) if alone else Call(i.name, "lo", "hi", inside)
        for i in planned.inner[item]
    ]
    lets = _Lets(Names())
    first, last = lets.limits(item)
    loop = For(item.axis, first, last, calls, descending=item.reverse)
    return [*made, Function(item.name, variables, [*lets.made, If("hi", 0, [loop]) if alone else loop])]


def _set_lengths(loop: Loop, ends: Ends, threads: int) -> None:
    """A loop whose rows end goes through blocks of rows one after the other, each to its own end."""
    rows = ends.steps.size
    length, size = units(rows, threads)[1], together(rows)
    for kernel in kernels_of([loop]):
        kernel.length = length if length % size else size


def _goes_by_blocks(kernel: Kernel) -> bool:
    """Whether what threads share out are blocks of rows in lanes: then each goes through all kernels that stand side by side before
    the next, while what they write is still in the cache."""
    unit, inner = kernel.unit, kernel.inner
    if unit is None or inner is None or kernel.sequential:
        return False
    return any(a.buffer.lanes and a.index[0] == of(unit) and a.index[-1] == of(inner) for a in accesses(kernel))


class _Lets:
    """Statements that compute single integers."""

    def __init__(self, names: Names) -> None:
        self.made: list[Statement] = []
        self.names = names

    def let(self, op: str, *args: Register, **attrs: Any) -> Register:
        target = Register(self.names("n"), I8, 1)
        self.made.append(Let(target, op, args, attrs))
        return target

    def read(self, place: Place) -> Register:
        target = Register(self.names("n"), I8, 1)
        self.made.append(Read(target, place))
        return target

    def number(self, n: int | Affine) -> Register:
        return self.let("constant", value=n) if isinstance(n, int) else self.let("iota", address=n, stride=0)

    def limits(self, loop: Loop) -> tuple[int | Register, int | Register]:
        """From where to where a loop goes."""
        if loop.between is None:
            return 0, loop.axis.extent
        first, end = (self.number(i) for i in loop.between)
        return self.let("maximum", first, self.number(0)), self.let("minimum", end, self.number(loop.axis.extent))


def _to_its_end(loop: Loop, ends: Ends, items: Sequence[Item], threads: int, variables: tuple[Axis, ...]) -> list[Statement]:
    """For each block of rows the steps up to the end of its last row; `lo` and `hi` count what a thread does of rows that do not end."""
    rows = ends.steps.size
    count, length = units(rows, threads)
    own = next(k.length for k in kernels_of(items))
    whole, rest = divmod(rows, own)
    block, names = Axis("block", whole), Names()

    def steps(number: Affine, size: int) -> list[Statement]:
        lets = _Lets(names)
        last: Register | None = None
        for row in range(0, size, own if own == together(rows) else 1):  # rows that end together say the same
            read = lets.read(Place(ends.steps, number * own + row))
            last = read if last is None else lets.let("maximum", last, read)
        assert last is not None
        left = lets.let("subtract", last, lets.number(ends.time.without(loop.axis)))
        first, end = lets.limits(loop)
        end = lets.let("minimum", left, end if isinstance(end, Register) else lets.number(end))
        calls: list[Statement] = [Call(i.name, number, number + 1, variables) for i in items]
        return [*lets.made, For(loop.axis, first, end, calls, descending=loop.reverse)]

    body: list[Statement] = [For(block, "lo", ("hi", whole), steps(of(block), own), scale=ceil(length / own))]
    return body + ([If("hi", count - 1, steps(Affine(whole), rest))] if rest else [])


def _count(item: Item, planned: Plan, threads: int) -> int:
    extent = planned.units[item]
    return 1 if extent is None else units(extent, threads)[0]


class _Entry:
    """`i32 name(table, thread, threads, barrier)`: BAD if an index was out of range, before any state is written; else FINE, or ONWARD."""

    def __init__(self, planned: Plan, threads: int, module: Module, state: set[Buffer], timed: bool = False) -> None:
        self.planned, self.threads, self.module, self.state, self.timed = planned, threads, module, state, timed
        self.lines: list[str] = []
        self.numbers, self.clock = count(), count()
        self.pointers: dict[Buffer | str, str] = {}
        self.label = "entry"
        self.heads: dict[int, tuple[str, int]] = {}
        self.of_blocks: dict[int, tuple[str, str]] = {}
        self.inside = dict.fromkeys(i for turn in planned.meeting.values() for items in turn for i in items)

    def text(self, name: str) -> str:
        phases = self.planned.phases
        called = [i for i in [*(i for items in phases for i in items), *self.inside] if i not in self.planned.meeting]
        for item in called:
            for buffer in self.module.known[item.name].buffers:
                self.module.pointer(buffer, self._line, self.pointers)
        self.shares = self._shares(called)
        tested = not self.module.checks
        for at, items in enumerate(phases):
            if at:
                self._meet()
            writes = any(a.write and a.buffer in self.state for i in items for a in accesses(i))
            if not tested and writes:
                self._test_report()
                tested = True
            for blocks, run in groupby(items, self._blocks):
                self._together(blocks, list(run))
        if not tested:
            self._test_report()
        if self.planned.twice:
            self._other_turn()
        head = f"define i32 @{name}(ptr %table, i64 %thread, i64 %threads, ptr %barrier) nounwind {{"
        says = FINE if self.planned.waits else ONWARD
        return "\n".join([head, "entry:", *self.lines, f"  ret i32 {says}", "}"])

    def _blocks(self, item: Item) -> int:
        """How many blocks of rows threads share out, if each is a unit of its own; else 0."""
        if not isinstance(item, Kernel) or not item.length or item.unit is None or item in self.inside:
            return 0
        return item.unit.extent if item.unit.extent > 1 else 0

    def _together(self, blocks: int, items: Sequence[Item]) -> None:
        """Kernels one after the other, or all of them block by block."""
        if not blocks or len(items) == 1:
            for item in items:
                self._timed(partial(self._item, item), next(self.clock))
            return
        first, end = self._share(items[0])
        number = self._turns(first, end)
        after = self._line(f"add nuw nsw i64 %count{number}, 1")
        for item in items:
            self._timed(partial(self._call, item, (), (f"%count{number}", after)), next(self.clock))
        self._next(number)

    def _timed(self, inside: Callable[[], None], number: int) -> None:
        """Code whose cycles are counted, if any are."""
        timed = self.timed and number < MOST_CLOCKS
        before = self._clock() if timed else ""
        inside()
        if timed:
            self._clocked(before, number)

    def _line(self, text: str) -> str:
        register = f"%p{next(self.numbers)}"
        self.lines.append(f"  {register} = {text}")
        return register

    def _start(self, label: str) -> None:
        self.lines.append(f"{label}:")
        self.label = label

    def _shares(self, called: Sequence[Item]) -> dict[int, tuple[str, str]]:
        """For each number of units, those of this thread."""
        if self.threads == 1:
            return {}
        shares: dict[int, tuple[str, str]] = {}
        self.lines.append("  %after = add i64 %thread, 1")
        for n in sorted({_count(i, self.planned, self.threads) for i in called}):
            for which, t in (("lo", "%thread"), ("hi", "%after")):
                self.lines += [f"  %{which}m{n} = mul i64 {t}, {n}", f"  %{which}{n} = udiv i64 %{which}m{n}, %threads"]
            shares[n] = (f"%lo{n}", f"%hi{n}")
        return shares

    def _meet(self) -> None:
        if self.threads > 1:
            self.lines.append("  call void @barrier(ptr %barrier, i64 %threads)")

    def _item(self, item: Item, variables: tuple[str, ...] = ()) -> None:
        if item not in self.planned.meeting:
            self._call(item, variables)
        elif isinstance(item, Loop) and item.turns:
            self._replay(item, variables)
        elif isinstance(item, Loop):
            self._loop(item, variables)

    def _share(self, item: Item) -> tuple[str, str]:
        """From which unit to which (exclusive) is this thread's part of an item."""
        n, blocks = _count(item, self.planned, self.threads), self._blocks(item)
        if not blocks:
            return self.shares.get(n, ("0", str(n)))
        if n not in self.shares:
            return "0", str(blocks)
        if blocks not in self.of_blocks:
            length = units(blocks, self.threads)[1]
            lo, hi = (self._line(f"mul nuw nsw i64 {end}, {length}") for end in self.shares[n])
            within = self._line(f"icmp slt i64 {hi}, {blocks}")
            self.of_blocks[blocks] = lo, self._line(f"select i1 {within}, i64 {hi}, i64 {blocks}")
        return self.of_blocks[blocks]

    def _call(self, item: Item, variables: tuple[str, ...], share: tuple[str, str] | None = None) -> None:
        lo, hi = share or self._share(item)
        callee = self.module.known[item.name]
        more = "".join([f", i64 {v}" for v in variables] + [f", ptr {self.pointers[b]}" for b in callee.buffers])
        self.lines.append(f"  call void @{callee.name}(ptr %table, i64 {lo}, i64 {hi}{more})")

    def _loop(self, loop: Loop, variables: tuple[str, ...]) -> None:
        """A loop in which threads meet."""
        number = self._turns("0", str(loop.axis.extent))
        variable = f"%count{number}"
        if loop.reverse:
            variable = self._line(f"sub nsw i64 {loop.axis.extent - 1}, {variable}")
        self._turn(loop, (*variables, variable))
        self._next(number)

    def _turn(self, loop: Loop, variables: tuple[str, ...]) -> None:
        """Threads meet after each phase, and so before the next turn."""
        for items in self.planned.meeting[loop]:
            for item in items:
                self._item(item, variables)
            self._meet()

    def _replay(self, loop: Loop, variables: tuple[str, ...]) -> None:
        """A loop that runs one of its items in each turn: a table says which, and where."""
        number = self._turns("0", str(len(loop.turns)))
        table, kind = f"@{loop.name}_turns", f"[{2 * len(loop.turns)} x i64]"
        words = ", ".join(f"i64 {word}" for turn in loop.turns for word in turn)
        self.module.declarations.add(f"{table} = internal constant {kind} [{words}]")
        place = self._line(f"getelementptr [2 x i64], ptr {table}, i64 %count{number}")
        which = self._line(f"load i64, ptr {place}, align 8")
        where = self._line(f"load i64, ptr {self._line(f'getelementptr i64, ptr {place}, i64 1')}, align 8")
        cases = [i for i, _ in enumerate(loop.items)]
        labels = " ".join(f"i64 {i}, label %case{number}_{i}" for i in cases[1:])
        self.lines.append(f"  switch i64 {which}, label %case{number}_0 [ {labels} ]")
        for i, item in zip(cases, loop.items, strict=True):
            assert isinstance(item, Loop)
            self._start(f"case{number}_{i}")
            self._turn(item, (*variables, f"%count{number}", where))
            self.lines.append(f"  br label %after{number}")
        self._start(f"after{number}")
        self._next(number)

    def _turns(self, first: str, end: str) -> int:
        """The head of a loop from one number to another (exclusive); its own number, by which its counter is called."""
        number = next(self.numbers)
        self.lines.append(f"  br label %turn{number}")
        before = self.label
        self._start(f"turn{number}")
        self.heads[number] = f"[ {first}, %{before} ]", len(self.lines)
        self.lines += [
            "",
            f"  %more{number} = icmp slt i64 %count{number}, {end}",
            f"  br i1 %more{number}, label %body{number}, label %done{number}",
        ]
        self._start(f"body{number}")
        return number

    def _next(self, number: int) -> None:
        """The end of a loop."""
        entered, line = self.heads[number]
        self.lines[line] = f"  %count{number} = phi i64 {entered}, [ %next{number}, %{self.label} ]"
        self.lines += [f"  %next{number} = add nuw nsw i64 %count{number}, 1", f"  br label %turn{number}"]
        self._start(f"done{number}")

    def _clock(self) -> str:
        return self._line("call i64 @llvm.readcyclecounter()")

    def _clocked(self, before: str, number: int) -> None:
        """The cycles since then are added to their place behind the report."""
        spent = self._line(f"sub i64 {self._clock()}, {before}")
        report = self._line(f"load ptr, ptr {self._report()}, align 8")
        place = self._line(f"getelementptr i64, ptr {report}, i64 {CLOCKS + number}")
        total = self._line(f"add i64 {self._line(f'load i64, ptr {place}, align 8')}, {spent}")
        self.lines.append(f"  store i64 {total}, ptr {place}, align 8")

    def _other_turn(self) -> None:
        """The next step uses the other ones of what is there twice."""
        place = self._line(f"getelementptr i64, ptr %table, i64 {self.module.layout.turn}")
        turn = self._line(f"xor i64 {self._line(f'load i64, ptr {place}, align 8')}, 1")
        self.lines.append(f"  store i64 {turn}, ptr {place}, align 8")

    def _report(self) -> str:
        return self._line(f"getelementptr ptr, ptr %table, i64 {REPORT}")

    def _test_report(self) -> None:
        number = next(self.numbers)
        report = self._line(f"load ptr, ptr {self._report()}, align 8")
        bad = self._line(f"icmp ne i64 {self._line(f'load i64, ptr {report}, align 8')}, 0")
        self.lines += [f"  br i1 {bad}, label %stop{number}, label %go{number}", f"stop{number}:", f"  ret i32 {BAD}"]
        self._start(f"go{number}")
