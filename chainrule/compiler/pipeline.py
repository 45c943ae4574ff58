"""A graph through all passes: kernels, phases, memory, loops, LLVM IR.

In: a graph in normal form, and for each input and output the buffer of the caller that it is. Out: `Code`, which can show each stage
and is one native function. `threads` says into how many units work is cut; a run may use fewer threads, and the results have the
same bits whatever it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from math import prod
from typing import Any

import numpy as np

from ..graph.node import Graph, Node, Rows
from .affine import Axis, of
from .alike import Likeness, adapted, counterparts, likeness
from .cost import work
from .driver import CLOCKS, MOST_CLOCKS, ORDER
from .flatten import split
from .fuse import Index, Names, Sink, Source, fuse
from .kernels import Buffer, Item, Kernel, Store, Value, elementwise, kernels_of, kernels_text, load, verify
from .llvm import REPORT, Layout, Module
from .loops import Call, For, Function, If, Statement, loops_text
from .lower import lower
from .memory import Arena, arena
from .panels import in_panels
from .phases import Plan, accesses, plan
from .schedule import TINY, Schedule, block, packs, schedule, units
from .share import share
from .simplify import simplify
from .target import Target


@dataclass(frozen=True)
class Given:
    """An input of a graph. rows: it is gathered from `buffer`, an array of any number of rows, at the numbers in the step's order;
    else it is `buffer` itself."""

    buffer: Buffer
    rows: int = 0


@dataclass(eq=False)
class Code:
    """One entry, ready to be made machine code. `slots`: names of the caller's buffers, in the order of the table of pointers."""

    name: str
    graph: Graph
    plan: Plan
    arena: Arena
    functions: list[Function]
    slots: dict[Buffer, int]
    text: str

    def stage(self, stage: str) -> str:
        """The text of a stage: "kernels" or "loops"."""
        if stage == "kernels":
            return "\n".join(f"phase {n}\n{kernels_text(items, '    ')}" for n, items in enumerate(self.plan.phases))
        return loops_text(self.functions)


def compile_graph(
    name: str, graph: Graph, inputs: Sequence[Given], outputs: Sequence[Buffer], state: Sequence[Buffer], slots: Mapping[str, int],
    rows: Sequence[Rows], target: Target, *, threads: int = 1, guard: int = 0, barrier: str = "", timed: bool = False,
) -> Code:  # fmt: skip
    """All passes.

    Args: outputs: where each output goes (a buffer of the state is written after it has been read); slots: the place of each of the
    caller's buffers, by name, in the table of pointers; rows: the row axis of each input; timed: cycles are counted for each kernel.
    """
    names = Names()
    graph = simplify(graph)
    items, sources = _gathered(inputs, graph, names)
    items += fuse(graph, sources, [[Sink(b)] for b in outputs], rows, names)
    items, panels = in_panels(split(items, target, names), set(state), target, names)
    items = share(items, panels, set(state), target, names)
    verify(items)
    planned = plan(items, list(state), names, threads)
    every = list(dict.fromkeys([*planned.late, *(i for items in planned.phases for i in items)]))
    schedules, first = _scheduled(every, target)
    for k, made in schedules.items():
        _set_aside(k, made, names, threads, target)
    memory = arena(planned.phases, planned.late, guard)
    functions = [f for item in every if item not in first for f in _functions(item, planned, schedules, threads, target)]
    table = {b: slots[b.name] for b in _callers(planned)}
    tiny = sum(work(i).flops for i in every) <= TINY and not timed
    module = Module(Layout(table, memory.offsets), target, inline=tiny)
    for f in functions:
        module.add(f)
    for item, (like, one, other) in first.items():
        module.add_alike(item.name, like.name, dict(zip(counterparts(like, one), counterparts(item, other), strict=True)))
    prepare = Plan([list(planned.late)], planned.inner, planned.units, [])
    entries = [
        _entry(name, planned, threads, module, set(state), timed),
        _entry(f"{name}_prepare", prepare, threads, module, set()),
    ]
    if timed and "@llvm.readcyclecounter()" not in barrier:
        module.declarations.add("declare i64 @llvm.readcyclecounter()")
    text = module.text(barrier, *entries)
    return Code(name, graph, planned, memory, functions, table, text)


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


def _gathered(inputs: Sequence[Given], graph: Graph, names: Names) -> tuple[list[Item], list[Source]]:
    """What each input is at an index. Rows that only products read are read where they are; others are copied together first, and
    cast."""
    items: list[Item] = []
    sources: list[Source] = []
    users: dict[Node, set[str]] = {}
    for n in graph.nodes():
        for a in n.args:
            users.setdefault(a, set()).add(n.op)
    for given, node in zip(inputs, graph.inputs, strict=True):
        buffer = given.buffer
        if not given.rows:
            sources.append(partial(load, buffer))
            continue
        order = Buffer(ORDER, (given.rows,), np.dtype(np.int64), "input")
        if users.get(node) == {"contract"} and buffer.dtype == node.dtype and len(node.shape) == 2 and node not in graph.outputs:
            sources.append(partial(_row, buffer, order))
            continue
        copy = Buffer(names("x"), node.shape, node.dtype)
        domain = tuple(Axis(names("i"), n) for n in node.shape)
        index = tuple(of(a) for a in domain)
        value = _row(buffer, order, index)
        if buffer.dtype != node.dtype:
            value = elementwise("cast", node.dtype, [value])
        items.append(Kernel(names("k"), domain, (), [Store(copy, index, value)], domain[0]))
        sources.append(partial(load, copy))
    return items, sources


def _row(buffer: Buffer, order: Buffer, index: Index) -> Value:
    """An element of the row whose number stands in the step's order."""
    return load(buffer, (load(order, index[:1]), *index[1:]))


def _callers(planned: Plan) -> list[Buffer]:
    items = [*planned.late, *(i for items in planned.phases for i in items)]
    return list(dict.fromkeys(a.buffer for i in items for a in accesses(i) if a.buffer.space != "scratch"))


def _set_aside(kernel: Kernel, made: Schedule, names: Names, threads: int, target: Target) -> None:
    """Memory for the operands that the kernel copies together."""
    count = units(kernel.unit.extent, threads)[0] if kernel.unit is not None else 1
    chosen = packs(kernel, made, threads, target)
    kernel.block = block(kernel, made, target) if chosen else 0
    for v in chosen:
        size = (kernel.block or prod(a.extent for a in kernel.reduced if a in v.axes)) * made.vectors * made.width
        kernel.packed[v] = Buffer(names("pack"), (count, size), v.dtype)
    if kernel.block and made.tile is not None:
        sums = [v for v in kernel.values() if v.op == "reduce"]
        rows = units(made.tile.extent, threads)[1] if made.tile is kernel.unit else made.tile.extent
        size = rows * made.vectors * made.width * made.chains * len(sums)
        kernel.partial = Buffer(names("sum"), (count, size), sums[0].dtype)


def _functions(
    item: Item,
    planned: Plan,
    schedules: Mapping[Kernel, Schedule],
    threads: int,
    target: Target,
    variables: tuple[Axis, ...] = (),
) -> list[Function]:
    if isinstance(item, Kernel):
        return [lower(item, schedules[item], threads, target, variables)]
    inside = (*variables, item.axis)
    made = [f for i in planned.inner[item] for f in _functions(i, planned, schedules, threads, target, inside)]
    alone = planned.units[item] is None
    calls: list[Statement] = [
        Call(i.name, 0, _count(i, planned, threads), inside) if alone else Call(i.name, "lo", "hi", inside)
        for i in planned.inner[item]
    ]
    loop = For(item.axis, 0, item.axis.extent, calls, descending=item.reverse)
    return [*made, Function(item.name, variables, [If("hi", 0, [loop])] if alone else [loop])]


def _count(item: Item, planned: Plan, threads: int) -> int:
    extent = planned.units[item]
    return 1 if extent is None else units(extent, threads)[0]


def _entry(name: str, planned: Plan, threads: int, module: Module, state: set[Buffer], timed: bool = False) -> str:
    """`i32 name(table, thread, threads, barrier)`: 1 if an index was out of range, before any state is written."""
    lines: list[str] = []
    clock = count()
    numbers = count()

    def line(text: str) -> str:
        register = f"%p{next(numbers)}"
        lines.append(f"  {register} = {text}")
        return register

    pointers: dict[Any, str] = {}
    for items in planned.phases:
        for item in items:
            for buffer in module.known[item.name].buffers:
                module.pointer(buffer, line, pointers)
    shares: dict[int, tuple[str, str]] = {}
    if threads > 1:
        lines.append("  %after = add i64 %thread, 1")
        for n in sorted({_count(i, planned, threads) for items in planned.phases for i in items}):
            for which, t in (("lo", "%thread"), ("hi", "%after")):
                lines += [f"  %{which}m{n} = mul i64 {t}, {n}", f"  %{which}{n} = udiv i64 %{which}m{n}, %threads"]
            shares[n] = (f"%lo{n}", f"%hi{n}")
    tested = not module.checks
    for at, items in enumerate(planned.phases):
        if at and threads > 1:
            lines.append("  call void @barrier(ptr %barrier, i64 %threads)")
        writes = any(a.write and a.buffer in state for i in items for a in accesses(i))
        if not tested and writes:
            lines += _test_report(at)
            tested = True
        for item in items:
            n = _count(item, planned, threads)
            lo, hi = shares.get(n, ("0", str(n)))
            callee = module.known[item.name]
            buffers = "".join(f", ptr {pointers[b]}" for b in callee.buffers)
            call = f"  call void @{callee.name}(ptr %table, i64 {lo}, i64 {hi}{buffers})"
            number = next(clock)
            lines += _clocked(call, number) if timed and number < MOST_CLOCKS else [call]
    if not tested:
        lines += _test_report(len(planned.phases))
    head = f"define i32 @{name}(ptr %table, i64 %thread, i64 %threads, ptr %barrier) nounwind {{"
    return "\n".join([head, "entry:", *lines, "  ret i32 0", "}"])


def _clocked(call: str, number: int) -> list[str]:
    """The call, and the cycles it takes added to its word of the report."""
    place = f"%clock{number}"
    return [
        f"  {place}s = getelementptr ptr, ptr %table, i64 {REPORT}",
        f"  {place}r = load ptr, ptr {place}s, align 8",
        f"  {place} = getelementptr i64, ptr {place}r, i64 {CLOCKS + number}",
        f"  {place}b = call i64 @llvm.readcyclecounter()",
        call,
        f"  {place}e = call i64 @llvm.readcyclecounter()",
        f"  {place}d = sub i64 {place}e, {place}b",
        f"  {place}o = load i64, ptr {place}, align 8",
        f"  {place}n = add i64 {place}o, {place}d",
        f"  store i64 {place}n, ptr {place}, align 8",
    ]


def _test_report(at: int) -> list[str]:
    return [
        f"  %place{at} = getelementptr ptr, ptr %table, i64 {REPORT}",
        f"  %report{at} = load ptr, ptr %place{at}, align 8",
        f"  %word{at} = load i64, ptr %report{at}, align 8",
        f"  %bad{at} = icmp ne i64 %word{at}, 0",
        f"  br i1 %bad{at}, label %stop{at}, label %go{at}",
        f"stop{at}:",
        "  ret i32 1",
        f"go{at}:",
    ]
