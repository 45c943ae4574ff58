"""Graph -> kernels.

In: a graph in normal form, what its inputs stand for, and where its outputs go. Out: kernels and loops in an order in which they can
run. No operator here knows of layers: products with their bias, activation, derivative of the activation and weight update become one
kernel because of how their index spaces meet.

1. *Kinds.* Layout operators are virtual: they only change the index at which their argument is read. Products, reductions, lookups
   and the like start a group. Everything elementwise joins a group or is computed where it is read.
2. *Homes.* An elementwise node joins the latest group among those that it reads at its own index, unless another argument is only
   known after that group. What must be in memory and finds no home gets a group of its own.
3. *Forming*, from the last group to the first: each group asks for the values it needs. A node of another group is computed again if
   that is cheap and all it needs is in memory; otherwise its group is asked to store it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count, product
from math import prod
from typing import Any

import numpy as np

from ..graph.node import OPS, Graph, Node, Rows
from ..graph.rows import propagate_rows, rows_of_nodes
from .affine import Affine, Axis, flat, of
from .fold import parts
from .former import EXPENSIVE, VIRTUAL, Folded, Former, Index, Source, plain_reshape, viewed
from .kernels import Buffer, Item, Kernel, Loop, Store, Value, elementwise, iota, kernels_of, load
from .views import added_up, extents, is_windows, joined, joins_groups, runs

SCATTERED = {"concatenate", "pad", "scatter_add", "scan", "random_bits"}  # several kernels, or none with a plain domain
MUCH_LONGER = 4  # times as long as the first axis
DEAR = 10  # cheap operators, which take about as long as an expensive one
HEAVIEST = 400  # cheap operators, or ten times as few expensive ones, in a kernel: the time to compile it grows with their square
DEEPEST = 40  # elementwise nodes computed one inside the other, before one is put into memory


@dataclass(frozen=True)
class Sink:
    """Where a node goes: a buffer, and indices that stand before its own (the time of a loop). carried: others still read there
    what the step before has left; offsets: it is the part of a larger array that begins at that place."""

    buffer: Buffer
    before: Index = ()
    carried: bool = False
    offsets: tuple[int, ...] = ()

    def at(self, index: Index) -> Index:
        moved = (i + first for i, first in zip(index, self.offsets, strict=True)) if self.offsets else index
        return (*self.before, *moved)


@dataclass(eq=False)
class Group:
    """Nodes that become one kernel. heavy: the product, reduction or other operator that it began with; needs: groups before it;
    before: itself and all that it waits for, one bit for each group's number; holds, weight: all operators that it computes."""

    number: int
    shape: tuple[int, ...]
    heavy: Node | None
    needs: set[Group] = field(default_factory=set)
    nodes: list[Node] = field(default_factory=list)
    before: int = 0
    holds: set[Node] = field(default_factory=set)
    weight: int = 0

    def __post_init__(self) -> None:
        self.before = 1 << self.number

    @property
    def open(self) -> bool:
        return self.heavy is None or self.heavy.op not in SCATTERED

    def waits_for(self, other: Group) -> bool:
        """Whether this group is, or comes after, the other."""
        return bool(self.before >> other.number & 1)


def _before(groups: Iterable[Group]) -> int:
    """All that these groups are and wait for."""
    found = 0
    for g in groups:
        found |= g.before
    return found


class Names:
    """Fresh names for axes, kernels and buffers."""

    def __init__(self) -> None:
        self._count: dict[str, count[int]] = {}

    def __call__(self, stem: str) -> str:
        return f"{stem}{next(self._count.setdefault(stem, count()))}"


def fuse(
    graph: Graph, sources: Sequence[Source], sinks: Sequence[Sequence[Sink]], rows: Sequence[Rows], names: Names | None = None
) -> list[Item]:  # fmt: skip
    """Kernels for a graph.

    Args: sources: for each input, the value at an index; sinks: for each output, where it goes; rows: the row axis of each input.
    """
    return _Fusion(graph, sources, sinks, rows, names or Names()).items()


class _Fusion:
    def __init__(
        self, graph: Graph, sources: Sequence[Source], sinks: Sequence[Sequence[Sink]], rows: Sequence[Rows], names: Names
    ) -> None:
        self.graph, self.names = graph, names
        self.sources = dict(zip(graph.inputs, sources, strict=True))
        self.sinks: dict[Node, list[Sink]] = {}
        for node, places in zip(graph.outputs, sinks, strict=True):
            self.sinks.setdefault(node, []).extend(places)
        self.rows = {n: r for (n, i), r in rows_of_nodes(graph, rows).items() if i == 0}
        self.order = [n for n in graph.nodes() if n.op != "input"]
        self.position = {n: i for i, n in enumerate(self.order)}
        self.home: dict[Node, Group] = {}
        self.feeds: dict[Node, frozenset[Group]] = {}  # the groups that a node needs
        self.same: dict[Node, frozenset[Group]] = {}  # those among them that it reads at its own index, elementwise
        self.pending: dict[Node, frozenset[Node]] = {}  # a node and those of its arguments that have no home
        self.other: dict[Node, frozenset[Group]] = {}  # and those that it reads at another
        self.groups: list[Group] = []
        self.crops: set[Node] = set()  # parts of arrays that windows are added back to, and of which nobody reads the rest
        self.within = self._within()
        self.must = self._must()
        self._settle()
        self.must |= self._shared()
        self._settle()
        self.stored: dict[Node, Buffer] = {}
        self.asked: dict[Group, list[Node]] = {}

    # ---- kinds ---------------------------------------------------------------------------------------------------------------

    def _within(self) -> set[Node]:
        """Products that only a fold reads, and how it sees them: their sum and that over windows are one. Folds of which only a part is
        read: no more is made."""
        users: dict[Node, list[Node]] = {}
        for n in self.order:
            for a in n.args:
                users.setdefault(a, []).append(n)
        found = set()
        alone = {n: readers[0] for n, readers in users.items() if len(readers) == 1 and n not in self.sinks}
        for n, reader in alone.items():
            if reader.op == "fold" and all(a in alone for a in added_up(reader)):
                found.update(added_up(reader))
            if n.op == "fold" and reader.op == "slice" and _crops(reader, n.attrs["axes"]):
                found.add(n)
                self.crops.add(reader)
        return found

    def _must(self) -> set[Node]:
        """Nodes that have to be in memory: what leaves the graph, and what products, lookups and loops read again and again."""
        must = {o for o in self.graph.outputs if o.op != "output"}
        for n in self.order:
            if n.op in ("contract", "scan", "take", "scatter_add"):
                must |= {b for a in n.args if (b := self._beneath(a)).op not in ("input", "constant", "iota", "output")}
            if n.op == "contract":
                turned = {a for a in n.args if a.op == "transpose" and not is_windows(a) and not _keeps_order(a)}
                must |= turned  # in memory in the order in which it is read
            if n.op == "concatenate":
                must |= {a for a in n.args if a.op not in {*VIRTUAL, "input"} and OPS[a.op].elementwise}
            if n.op == "scan":
                fixed = n.args[n.attrs["states"] + n.attrs["sequences"] :]
                must |= {a for a in fixed if a.op == "transpose" and not _keeps_order(a)}  # an operand of a product in the loop
                whole = _seen_whole(n.attrs["body"])
                inputs = zip(n.args, n.attrs["body"].inputs, strict=True)
                must |= {a for a, i in inputs if i in whole and a.op in VIRTUAL and a.op not in ("constant", "iota", "output")}
            if n.op == "take":
                must |= {b for a in n.args[:1] if (b := viewed(a)).op != "input"}
            if n.op == "reshape" and not (plain_reshape(n) or is_windows(n) or joins_groups(n)):
                must |= {b for b in (viewed(n),) if b.op not in ("input", "constant", "output")}
        depth: dict[Node, int] = {}
        weight: dict[Node, int] = {}
        for n in self.order:
            alone = n.op not in VIRTUAL and not OPS[n.op].elementwise
            depth[n] = 0 if alone else 1 + max((depth.get(a, 0) for a in n.args), default=0)
            weight[n] = 0 if alone else _weight(n) + max((weight.get(a, 0) for a in n.args), default=0)
            if (depth[n] > DEEPEST or weight[n] > HEAVIEST) and n.op not in VIRTUAL:
                must.add(n)
                depth[n] = weight[n] = 0
        return must

    def _beneath(self, node: Node) -> Node:
        """What a chain of virtual operators reads."""
        while node.op in VIRTUAL and node.args and node.op != "output" and node not in self.crops:
            node = node.args[0]
        return node

    # ---- homes ---------------------------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """A home for each node that has one, first nodes first."""
        self.home, self.groups = {}, []
        free: dict[tuple[Any, ...], int] = {}
        nothing: frozenset[Group] = frozenset()
        nobody: frozenset[Node] = frozenset()
        self.pending = {}
        for n in self.order:
            below = [self.pending.get(a, nobody) for a in n.args]
            self.pending[n] = below[0] if n.op in VIRTUAL and n.args else nobody.union([n], *below)
            feeds = nothing.union(*(self.feeds.get(a, nothing) for a in n.args))
            same = nothing
            other = nothing.union(*(self.other.get(a, nothing) for a in n.args))
            if joins_groups(n) and n not in self.must:
                same = self.same[n.args[0]]
            elif (n.op in VIRTUAL and n not in self.crops) or n in self.within:
                other = feeds
                if n in self.must:
                    same = feeds = self._copied(n, feeds, free)
                    other = nothing
            elif OPS[n.op].elementwise and n not in self.crops:
                near = nothing.union(*(self.same.get(a, nothing) for a in n.args))
                best = self._latest(near - other, feeds, n)
                if best is not None:
                    self._live_in(n, best, feeds)
                    same = feeds = frozenset({best})
                    other = nothing
                elif n in self.must:
                    same = feeds = self._join(n, feeds, free)
                    other = nothing
                else:
                    same = near
            else:
                same = feeds = frozenset({self._new(n.shape, n, feeds)})
                other = nothing
            self.feeds[n], self.same[n], self.other[n] = feeds, same, other

    def _copied(self, n: Node, feeds: frozenset[Group], free: dict[tuple[Any, ...], int]) -> frozenset[Group]:
        """A group for something that is only looked at otherwise: one for each, as each is read in an order of its own."""
        if not n.args:
            self._join(n, feeds, free)
            return frozenset()  # a constant is never read from memory
        group = self._new(n.shape, None, feeds)
        self._live_in(n, group, feeds)
        return frozenset({group})

    def _latest(self, near: frozenset[Group], feeds: frozenset[Group], node: Node) -> Group | None:
        """The group among `near` that an elementwise node can live in: all else that the node needs is known without that group, and
        there is room."""
        for group in sorted(near, key=lambda g: -g.number):
            awaited = _before(g for g in feeds if g is not group) >> group.number & 1
            if group.open and not awaited and self._has_room(group, node):
                return group
        return None

    def _new(self, shape: tuple[int, ...], heavy: Node | None, feeds: frozenset[Group]) -> Group:
        group = Group(len(self.groups), shape, heavy, set(feeds))
        group.before |= _before(feeds)
        self.groups.append(group)
        if heavy is not None:
            self._live_in(heavy, group, feeds)
        return group

    def _live_in(self, node: Node, group: Group, feeds: frozenset[Group]) -> None:
        self.home[node] = group
        group.nodes.append(node)
        group.weight += self._more(group, node)
        group.holds |= self.pending[node]
        self.pending[node] = frozenset()
        self._need(group, feeds - {group})

    def _more(self, group: Group, node: Node) -> int:
        """What a node would add to the weight of a group, with those of its arguments that have no home."""
        return sum(map(_weight, self.pending[node] - group.holds))

    def _has_room(self, group: Group, node: Node) -> bool:
        return group.weight + self._more(group, node) <= HEAVIEST

    def _need(self, group: Group, feeds: frozenset[Group]) -> None:
        """`group` comes after `feeds` too, and with it all that wait for it."""
        group.needs |= feeds
        more = _before(feeds)
        if more & ~group.before:
            for g in self.groups:
                if g.waits_for(group):
                    g.before |= more

    def _join(self, n: Node, feeds: frozenset[Group], free: dict[tuple[Any, ...], int]) -> frozenset[Group]:
        """Into a group of its shape without product or reduction that has room and that nothing it needs waits for; or a new one."""
        key = (n.shape, self.rows.get(n))
        made = free.get(key, 0) & ~_before(feeds)
        group = self.groups[made.bit_length() - 1] if made else None
        if group is None or not self._has_room(group, n):
            group = self._new(n.shape, None, feeds)
            free[key] = free.get(key, 0) | 1 << group.number
        self._live_in(n, group, feeds)
        return frozenset({group})

    def _shared(self) -> set[Node]:
        """Expensive nodes without a home that several groups read. What follows from others of them by little is computed again."""
        sites: dict[Node, set[Any]] = {n: {"out"} for n in self.graph.outputs}
        cost: dict[Node, int] = {}
        for n in self.order:
            cost[n] = 0 if n in self.home else _weight(n) + sum(cost.get(a, 0) for a in n.args)
        shared = set()
        for n in reversed(self.order):
            here = {self.home[n]} if n in self.home else sites.get(n, set())
            if n not in self.home and n.op not in VIRTUAL and len(here) > 1 and cost[n] >= DEAR:
                shared.add(n)
                here = {n}
            for a in n.args:
                sites.setdefault(a, set()).update(here)
        for n in self.order:
            cost[n] = 0 if n in self.home else _weight(n) + sum(cost.get(a, 0) for a in n.args)
            if n in shared and cost[n] < DEAR:
                shared.remove(n)
            elif n in shared:
                cost[n] = 0
        return shared

    # ---- forming -------------------------------------------------------------------------------------------------------------

    def items(self) -> list[Item]:
        for node in self.must:
            if node in self.home:
                self._ask(node)
        for node in self.sinks:
            if node.op == "output":
                self.buffer(node)
        made: list[tuple[Group, list[Item]]] = []
        for group in reversed(self._in_order()):
            formed = self._form(group)
            for kernel in kernels_of(formed):
                kernel.origin = kernel.origin or tuple(group.nodes)
            made.append((group, formed))
        passed = [self._passed(n, sink) for n in self.sinks if n.op == "input" for sink in self.sinks[n]]
        return [*(item for _, items in reversed(made) for item in items), *passed]

    def _in_order(self) -> list[Group]:
        done: dict[Group, None] = {}
        for group in self.groups:
            stack = [group]
            while stack:
                waiting = [g for g in stack[-1].needs if g not in done]
                if waiting:
                    stack += sorted(waiting, key=lambda g: -g.number)
                else:
                    done[stack.pop()] = None
        return list(done)

    def _passed(self, node: Node, sink: Sink) -> Kernel:
        """An input that is an output."""
        domain = self.axes(node.shape)
        index = tuple(of(a) for a in domain)
        row = self.rows.get(node)
        unit = _unit(domain, row if isinstance(row, int) else None)
        return Kernel(self.names("k"), domain, (), [Store(sink.buffer, sink.at(index), self.sources[node](index))], unit)

    def _ask(self, node: Node) -> None:
        asked = self.asked.setdefault(self.home[node], [])
        if node not in asked:
            asked.append(node)

    def buffer(self, node: Node) -> Buffer:
        """Where a node is in memory; asks its group to put it there."""
        if node not in self.stored:
            places = self.sinks.get(node, ())
            plain = [
                s.buffer
                for s in places
                if s.buffer.space == "result" and not s.before and not s.carried and s.buffer.shape == node.shape
            ]
            row = self.rows.get(node)
            known = row if isinstance(row, int) else None
            self.stored[node] = plain[0] if plain else Buffer(self.names("t"), node.shape, node.dtype, row=known)
            if node.op != "output":
                self._ask(node)
            elif node.args[0] in self.home:
                self._ask(node.args[0])
        return self.stored[node]

    def _form(self, group: Group) -> list[Item]:
        asked = self.asked.get(group, [])
        if group.heavy is not None and group.heavy.op in SCATTERED:
            if not asked and group.heavy not in self.must:
                return []
            return self._scattered(group)
        if not asked:
            return []
        if group.heavy is not None and (group.heavy.op == "fold" or group.heavy in self.crops):
            return [self._kernel(group, asked, *space) for space in self._folds(group.heavy)]
        domain = self.axes(group.shape)
        return [self._kernel(group, asked, domain, tuple(of(a) for a in domain), ())]

    def _kernel(
        self, group: Group, asked: Sequence[Node], domain: tuple[Axis, ...], index: Index, folded: Sequence[Folded]
    ) -> Kernel:  # fmt: skip
        """The kernel that computes these nodes at `index`."""
        former = Former(self, group, domain, folded)
        stores: list[Store] = []
        row: int | None = None
        for node in sorted(asked, key=self.position.__getitem__):
            own = joined(index, group.shape, node.shape)
            row = row if row is not None else _place_of(own, self.rows.get(node), domain)
            value = former.at(node, own)
            places = [Sink(self.stored[node])] if node in self.stored else []
            places += [s for s in self.sinks.get(node, ()) if not places or s.buffer is not places[0].buffer]
            stores += [Store(p.buffer, p.at(own), value) for p in places]
        return Kernel(self.names("k"), domain, former.reduced, stores, _unit(domain, row))

    def _folds(self, node: Node) -> Iterator[tuple[tuple[Axis, ...], Index, list[Folded]]]:
        """The parts of an array that windows are added back to, or of a part of one: domain, index, and what reaches it."""
        fold = node.args[0] if node in self.crops else node
        starts = node.attrs["start"] if node in self.crops else (0,) * len(node.shape)
        a = fold.attrs
        (w,) = fold.args
        geometry = zip(a["axes"], a["size"], a["stride"], a["dilation"], strict=True)
        last = a["axes"][-1]
        lengths = extents(added_up(fold)) if w in self.within else [(n,) for n in w.shape]
        cuts = [
            parts(fold.shape[x], k, s, d, w.shape[x], starts[x], starts[x] + node.shape[x], x == last) for x, k, s, d in geometry
        ]
        for chosen in product(*cuts):
            by_axis = dict(zip(a["axes"], chosen, strict=True))
            domain: list[Axis] = []
            index: list[Affine] = []
            folded: dict[int, Folded] = {}
            for d in range(len(node.shape)):
                part = by_axis.get(d)
                own = (part.count,) if part is not None else lengths[d]
                axes = self.axes(own)
                domain += axes
                index.append(flat((of(a) for a in axes), own))
                if part is not None:
                    (q,) = axes
                    (r,) = self.axes((part.spread,))
                    domain += [r] if part.spread > 1 else []
                    index[d] = of(q) * part.step + (part.first - starts[d]) + of(r)
                    folded[d] = Folded(part, of(q), of(r), w.shape[d])
            yield tuple(domain), tuple(index), [folded[d] for d in a["axes"]]

    def axes(self, shape: tuple[int, ...], stem: str = "i") -> tuple[Axis, ...]:
        return tuple(Axis(self.names(stem), n) for n in shape)

    # ---- operators that are several kernels ----------------------------------------------------------------------------------

    def _scattered(self, group: Group) -> list[Item]:
        node = group.heavy
        assert node is not None
        if node.op == "scan":
            return self._scan(node, group)
        if node.op == "concatenate" and self._only_leaves(node):
            return [k for sink in self.sinks[node] for k in self._concatenated(node, group, sink)]
        target = self.buffer(node)
        items: list[Item] = list(getattr(self, f"_{node.op}")(node, group, target))
        for sink in self.sinks.get(node, ()):
            if sink.buffer is not target:
                items.append(self.copy(target, sink))
        return items

    def _only_leaves(self, node: Node) -> bool:
        """Whether nobody here reads it, and it leaves no loop's step: the passes for loops know one kernel that makes a state."""
        sinks = self.sinks.get(node, ())
        return bool(sinks) and node not in self.stored and not any(s.before or s.carried for s in sinks)

    def copy(self, source: Buffer, sink: Sink) -> Kernel:
        domain = self.axes(source.shape)
        index = tuple(of(a) for a in domain)
        return Kernel(
            self.names("k"), domain, (), [Store(sink.buffer, sink.at(index), load(source, index))], _unit(domain, source.row)
        )

    def _part(
        self, group: Group, target: Buffer, shape: tuple[int, ...], value: Callable[[Former, Index], Value],
        place: Callable[[Index], Index] = lambda i: i, row: Rows = None, sequential: int = 0,
    ) -> Kernel:  # fmt: skip
        domain = self.axes(shape)
        former = Former(self, group, domain)
        index = tuple(of(a) for a in domain)
        made = value(former, index)
        unit = None if sequential else _unit(domain, row if isinstance(row, int) else None)
        mode: Any = "add" if sequential else "set"
        return Kernel(self.names("k"), domain, former.reduced, [Store(target, place(index), made, mode)], unit, sequential)

    def _concatenate(self, node: Node, group: Group, target: Buffer) -> list[Kernel]:
        return self._concatenated(node, group, Sink(target))

    def _concatenated(self, node: Node, group: Group, sink: Sink) -> list[Kernel]:
        """Each part is stored in its place by the group that computes it; others are copied."""
        axis, kernels = node.attrs["axis"], []
        first = list(sink.offsets or (0,) * len(node.shape))
        for arg in node.args:
            part = replace(sink, offsets=tuple(first))
            first[axis] += arg.shape[axis]
            if self._can_store(arg):
                self.sinks.setdefault(arg, []).append(part)
                self._ask(arg)
            else:
                value = partial(_at, arg)
                kernels.append(self._part(group, sink.buffer, arg.shape, value, part.at, row=self.rows.get(node)))
        return kernels

    def _can_store(self, node: Node) -> bool:
        """Whether the kernel that computes a node can put it where others want it."""
        group = self.home.get(node)
        return group is not None and group.open and runs(group.shape, node.shape) is not None

    def _pad(self, node: Node, group: Group, target: Buffer) -> list[Kernel]:
        x, fill = node.args
        row = self.rows.get(node)
        amounts = node.attrs["amounts"]
        if self._can_store(x) and all(
            min(low, high) >= 0 and not mid for low, high, mid in amounts
        ):  # its group stores it inside
            self.sinks.setdefault(x, []).append(Sink(target, offsets=tuple(low for low, _, _ in amounts)))
            self._ask(x)
            return self._borders(node, group, target)

        def place(i: Index) -> Index:
            return tuple(e * (mid + 1) + lo for e, (lo, _, mid) in zip(i, node.attrs["amounts"], strict=True))

        return [
            self._part(group, target, node.shape, lambda f, i: f.at(fill, ()), row=row),
            self._part(group, target, x.shape, lambda f, i: f.at(x, i), place, row=row),
        ]

    def _borders(self, node: Node, group: Group, target: Buffer) -> list[Kernel]:
        """What stands around an array: before and after it along each axis; of the axes before that one only what is inside."""
        x, fill = node.args
        amounts = node.attrs["amounts"]
        kernels = []
        for d, (low, high, _) in enumerate(amounts):
            for first, extent in ((0, low), (low + x.shape[d], high)):
                shape = (*x.shape[:d], extent, *node.shape[d + 1 :])
                start = (*(a[0] for a in amounts[:d]), first, *(0 for _ in amounts[d + 1 :]))

                def place(i: Index, start: tuple[int, ...] = start) -> Index:
                    return tuple(e + first for e, first in zip(i, start, strict=True))

                if extent:
                    kernels.append(self._part(group, target, shape, lambda f, i: f.at(fill, ()), place, self.rows.get(node)))
        return kernels

    def _scatter_add(self, node: Node, group: Group, target: Buffer) -> list[Kernel]:
        """A copy, then the updates one index after the other."""
        x, indices, updates = node.args
        axis, k = node.attrs["axis"], len(indices.shape)
        first = self._part(group, target, x.shape, lambda f, i: f.at(x, i))
        former_index: list[Value] = []

        def value(f: Former, i: Index) -> Value:
            before, looked, after = i[k : k + axis], i[:k], i[k + axis :]
            former_index.append(f.looked_up(indices, looked, x.shape[axis], True))
            return f.at(updates, (*before, *looked, *after))

        def place(i: Index) -> Index:
            return (*i[k : k + axis], former_index[0], *i[k + axis :])

        shape = (*indices.shape, *x.shape[:axis], *x.shape[axis + 1 :])
        return [first, self._part(group, target, shape, value, place, sequential=max(k, 1))]

    def _random_bits(self, node: Node, group: Group, target: Buffer) -> list[Kernel]:
        """Four words for each group of four elements of a row."""
        key, offset = node.args
        rows, width = (node.shape[0], prod(node.shape[1:])) if node.shape else (1, 1)
        whole, rest = divmod(width, 4)
        kernels = []
        for first, groups, words in ((0, whole, 4), (whole, 1, rest)):
            if not groups or not words:
                continue
            domain = (Axis(self.names("i"), rows), Axis(self.names("i"), groups))
            f = Former(self, group, domain)
            row, at = of(domain[0]), of(domain[1]) + first
            args = [f.at(key, (Affine(0),)), f.at(key, (Affine(1),)), f.at(offset, ())]
            u4 = np.dtype(np.uint32)
            args += [iota(at, u4), iota(row, u4)]
            stores = []
            for word in range(words):
                bits = elementwise("philox", u4, args, {"stream": node.attrs["stream"], "word": word})
                stores.append(Store(target, (row, at * 4 + word), bits, shape=(rows, width)))
            kernels.append(Kernel(self.names("k"), domain, (), stores, _unit(domain, 0 if node.shape else None)))
        return kernels

    # ---- loops ---------------------------------------------------------------------------------------------------------------

    def _scan(self, node: Node, group: Group) -> list[Item]:
        """Kernels that set the states to what they begin with, the loop, and copies of its results for all who want one."""
        states = node.attrs["states"]
        known = list(zip(self._results(node), node.types, strict=True))
        carried = [b or Buffer(self.names("h"), t.shape, t.dtype) for b, t in known[:states]]
        items: list[Item] = []
        for buffer, arg in zip(carried, node.args, strict=False):

            def first(f: Former, i: Index, arg: Node = arg) -> Value:
                return f.at(arg, i)

            items.append(self._part(group, buffer, buffer.shape, first))
        results = [*carried, *(b or Buffer(self.names("t"), t.shape, t.dtype) for b, t in known[states:])]
        if node.attrs["length"]:
            items.append(self._loop(node, group, results))
        for at, buffer in enumerate(results):
            items += [self.copy(buffer, sink) for sink in self._result_sinks(node, at) if sink.buffer is not buffer]
        return items

    def _loop(self, node: Node, group: Group, results: Sequence[Buffer]) -> Loop:
        """The steps, which read and leave the states where they are and store the rest at their time."""
        states, sequences, body = node.attrs["states"], node.attrs["sequences"], node.attrs["body"]
        former, time = Former(self, group, ()), Axis(self.names("time"), node.attrs["length"])
        carried = list(results[:states])
        sources: list[Source] = [partial(load, b) for b in carried]
        sources += [partial(_at_time, former, x, of(time)) for x in node.args[states : states + sequences]]
        sources += [partial(former.at, x) for x in node.args[states + sequences :]]
        sinks = [[Sink(b, carried=True)] for b in carried] + [[Sink(r, (of(time),))] for r in results[states:]]
        made = fuse(body, sources, sinks, self._rows_inside(node), self.names)
        reverse, memory = node.attrs["reverse"], node.attrs.get("memory")
        return Loop(self.names("loop"), time, reverse, made, carried, memory=memory, layer=node.scope)

    def _rows_inside(self, node: Node) -> list[Rows]:
        """The row axis of each input of a loop's step. A state that begins with the same number in all rows has none before the loop, but
        the one of what the step makes of it inside."""
        states, sequences = node.attrs["states"], node.attrs["sequences"]
        outside = [self.rows.get(x) for x in node.args]
        rows: list[Rows] = [
            r - 1 if isinstance(r, int) and states <= i < states + sequences else r for i, r in enumerate(outside)
        ]
        while True:
            rows = [r if r != "mixed" else None for r in rows]
            new = propagate_rows(node.attrs["body"], rows)[:states]
            found = [n if r is None and isinstance(n, int) else r for r, n in zip(rows, new, strict=False)]
            if found == rows[:states]:
                return rows
            rows[:states] = found

    def _results(self, node: Node) -> list[Buffer | None]:
        """Where the results of a loop go: all that anybody reads have been asked for by now."""
        found: list[Buffer | None] = []
        for i in range(len(node.types)):
            reader = node if len(node.types) == 1 else self._output(node, i)
            if reader is None:
                found.append(None)
            elif reader in self.stored or reader in self.sinks:
                found.append(self.buffer(reader))
            else:
                found.append(None)
        return found

    def _output(self, node: Node, index: int) -> Node | None:
        return next((n for n in self.order if n.op == "output" and n.args[0] is node and n.attrs["index"] == index), None)

    def _result_sinks(self, node: Node, index: int) -> list[Sink]:
        reader = node if len(node.types) == 1 else self._output(node, index)
        return self.sinks.get(reader, []) if reader is not None else []


def _weight(node: Node) -> int:
    """About how many instructions an operator is."""
    return 0 if node.op in VIRTUAL else DEAR if node.op in EXPENSIVE else 1


def _at(node: Node, former: Former, index: Index) -> Value:
    return former.at(node, index)


def _at_time(former: Former, node: Node, time: Affine, index: Index) -> Value:
    return former.at(node, (time, *index))


def _unit(domain: tuple[Axis, ...], row: int | None) -> Axis | None:
    """The axis that threads share out: rows; else the first, whose parts lie together in memory, or one that is so much longer that
    the threads then share much less of what all of them read."""
    if row is not None and row < len(domain):
        return domain[row]
    return max(domain, key=lambda a: a.extent * (MUCH_LONGER if a is domain[0] else 1), default=None)


def _place_of(index: Index, row: Rows, domain: Sequence[Axis]) -> int | None:
    """The place in the domain of the axis that is the index of the rows."""
    return next((i for i, a in enumerate(domain) if isinstance(row, int) and index[row] == of(a)), None)


def _crops(node: Node, axes: Sequence[int]) -> bool:
    """Whether a slice is one piece of an array, and whole but for these axes."""
    others = set(range(len(node.shape))).difference(axes)
    return set(node.attrs["step"]) == {1} and all(node.shape[d] == node.args[0].shape[d] for d in others)


def _keeps_order(node: Node) -> bool:
    """Whether a transposition only moves axes of length 1."""
    moved = [a for a in node.attrs["axes"] if node.args[0].shape[a] != 1]
    return moved == sorted(moved)


def _seen_whole(body: Graph) -> set[Node]:
    """The inputs of a loop's body that it reads as arrays in memory, in another shape or at places that are looked up."""
    found: set[Node] = set()
    for n in body.nodes():
        if n.op == "reshape" and not plain_reshape(n):
            found.add(viewed(n))
        elif n.op == "take":
            found.add(viewed(n.args[0]))
        elif n.op == "scan":
            inner = _seen_whole(n.attrs["body"])
            found |= {viewed(a) for a, i in zip(n.args, n.attrs["body"].inputs, strict=True) if i in inner}
    return found
