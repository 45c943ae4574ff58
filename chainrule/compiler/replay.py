"""Loops whose inner values are not all kept: a few states are, and what lies between is computed again when the backward loop needs it.

In: items, and budgets of bytes. Out: items whose scratch buffers fit them. A forward loop stacks the state that each step begins with and
what else the backward loop reads of a step: its tape. Where that is too much, the forward loop goes through units of steps without
tape and leaves states in slots; the backward loop takes unit after unit from the last to the first, each of them once more, with a tape
that is as long as a unit (derive/checkpoint.py says in which order).

    advance u    the steps of unit u, without tape               save p       state -> slot p
    back u       its steps with tape, and the backward loop's    restore p    slot p -> state

The last unit comes first and its steps are taken once only: what is computed from the last state stands between them and their
backward steps. Units are aligned at the step with which the forward loop begins, and are whole numbers of the chunks in which sums
over steps are gathered (gather.py), so every sum has the same order whatever the plan: gradients have the same bits.

A budget for the whole is one of the arena: what buffers come to once those that are never needed at the same time share memory. That is
known when all passes up to there have been made, which takes a tenth of the time of compiling; so they are made for the plan that
keeps all, for the smallest, and then for one that uses what this leaves over. A loop's own budget is counted by the model of
derive/checkpoint.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ..derive.checkpoint import BACKWARD, Checkpoints, choose, frontier, shares
from ..errors import BudgetError
from .affine import Affine, Axis, of
from .carry import doubled
from .fuse import Names
from .gather import chunk, gathered
from .kernels import Buffer, Index, Item, Kernel, Loop, Store, Value, kernels_of, load, rebuilt, reindexed, roots

SAVE, RESTORE, ADVANCE, BACK = range(4)


@dataclass(frozen=True)
class Pair:
    """A forward loop, the backward loop that reads its tape, and the buffers of the tape; `doubled`: those that the forward loop writes
    and that come to lie where another lies, if all of the tape is kept (carry.py)."""

    forward: Loop
    back: Loop
    tape: tuple[Buffer, ...]
    doubled: frozenset[Buffer]

    @property
    def steps(self) -> int:
        return self.forward.axis.extent

    @property
    def bytes(self) -> int:
        """Of the whole tape."""
        return self.steps * self.taped

    @property
    def taped(self) -> int:
        """Bytes of one step on the tape."""
        return max(1, sum(b.bytes for b in self.tape if b not in self.doubled) // self.steps)

    @property
    def state(self) -> int:
        """Bytes of one state."""
        return max(1, sum(b.bytes for b in self.forward.states))

    @property
    def saved(self) -> int:
        """Bytes of what others read of each step that has the tape for its memory, if all of that is kept."""
        return sum(b.bytes for b in self.doubled - set(self.tape))

    def model(self) -> dict[str, int]:
        """What plans are counted by: the state at hand and what the sums of a chunk are made of are part of any."""
        steps, fixed = chunk(self.back)
        return {"state": self.state, "taped": self.taped, "chunk": steps, "fixed": self.state + fixed}


def replayed(
    items: Sequence[Item], pairs: Sequence[Pair], plans: Sequence[Checkpoints], names: Names, threads: int = 2
) -> list[Item]:
    """The items with these pairs of loops by these plans."""
    made = list(items)
    for pair, plan in zip(pairs, plans, strict=True):
        if plan.units > 1:
            made = _Replay(pair, plan, names, threads).items(made)
    return made


def pairs_of(items: Sequence[Item]) -> list[Pair]:
    """The loops that another goes through backward. Each loop is in one pair at most: it can be cut into units by one plan only. Sums of
    these loops stay in their steps: a plan may cut them anywhere, and sums shall have the same order under each.

    Raises: `BudgetError` for a loop with a budget of its own that a loop goes through backward but no plan can cut, and that keeps more.
    """
    loops = [i for i in items if isinstance(i, Loop)]
    hidden = doubled(items)
    found: list[Pair] = []
    for at, forward in enumerate(loops):
        for back in loops[at + 1 :]:
            taken = {loop for p in found for loop in (p.forward, p.back)}
            if is_way_back(forward, back) and not {forward, back} & taken:
                tape = _tape(forward, back, items)
                if tape:
                    written = {s.buffer for k in kernels_of([forward]) for s in k.stores}
                    found.append(Pair(forward, back, tape, frozenset(hidden & written)))
                    break
    for pair in found:
        pair.forward.gathers = False
    _check_others(items, {p.forward for p in found})
    return found


def is_way_back(forward: Loop, back: Loop) -> bool:
    """Whether one loop may go through another backward: as many steps in the other direction."""
    return back.axis.extent == forward.axis.extent and back.reverse != forward.reverse


def _check_others(items: Sequence[Item], planned: set[Loop]) -> None:
    """Loops with a budget of their own that stand in other loops, or are gone through backward in more than one way."""
    loops = [i for i in items if isinstance(i, Loop)]
    for at, loop in enumerate(loops):
        _check_others(loop.items, planned)
        if loop.memory is None or loop in planned:
            continue
        read = {v.buffer for o in loops[at + 1 :] if is_way_back(loop, o) for k in kernels_of([o]) for v in k.loads()}
        stacked = {
            s.buffer
            for k in kernels_of([loop])
            for s in k.stores
            if s.buffer.space == "scratch" and s.index[:1] == (of(loop.axis),)
        }
        kept = sum(b.bytes for b in stacked & read)
        if kept > loop.memory:
            raise BudgetError(
                f"memory={loop.memory:,} bytes is too little: this loop stands in another, or more than one loop goes through it "
                f"backward, so nothing of it is computed again, and {kept:,} bytes have to be kept. Give that much, or take the "
                "budget for the whole",
                kept,
            )


def _tape(forward: Loop, back: Loop, items: Sequence[Item]) -> tuple[Buffer, ...]:
    """The scratch buffers that one loop writes at each time, and only the other reads, at the same time."""
    outside = {b for k in kernels_of([i for i in items if i not in (forward, back)]) for b in _buffers(k)}
    found: dict[Buffer, bool] = {}
    for loop in (forward, back):
        for kernel in kernels_of([loop]):
            uses = [(v.buffer, v.index, v.shape, False) for v in kernel.loads()]
            uses += [(s.buffer, s.index, s.view, True) for s in kernel.stores]
            for buffer, index, view, writes in uses:
                assert buffer is not None
                by_time = bool(index) and index[0] == of(loop.axis) and view == buffer.shape
                by_time = by_time and not any(isinstance(i, Affine) and loop.axis in i.axes for i in index[1:])
                fits = by_time and writes == (loop is forward) and buffer.space == "scratch" and buffer not in outside
                found[buffer] = found.get(buffer, True) and fits
    written = {s.buffer for k in kernels_of([forward]) for s in k.stores}
    return tuple(b for b, fits in found.items() if fits and b in written)


def _buffers(kernel: Kernel) -> Iterable[Buffer]:
    return [*(v.buffer for v in kernel.loads() if v.buffer is not None), *(s.buffer for s in kernel.stores)]


# ---- what to keep ------------------------------------------------------------------------------------------------------------


def fitted(taken: Callable[[int | None], int], memory: int | None) -> int | None:
    """How many bytes above the least loops may be planned for, such that a budget is kept; None: everything can be.

    Args: taken: the bytes that all takes with loops planned so, as far as budgets count it.
    Raises: `BudgetError` with the least budget.
    """
    if memory is None or (whole := taken(None)) <= memory:
        return None
    smallest = taken(0)
    spare = memory - smallest
    if spare < 0:
        raise _too_little(memory, min(whole, smallest))
    while spare > 0 and (excess := taken(spare) - memory) > 0:
        spare -= excess
    return max(spare, 0)


def plans_of(pairs: Sequence[Pair], costs: Sequence[float], spare: int | None) -> list[Checkpoints]:
    """A plan for each pair: of those that take so many bytes more than the smallest, together, the ones with the least work in all;
    None: all is kept. A loop with a budget of its own has that for itself.

    Args: costs: of a forward step of each pair.
    Raises: `BudgetError` for a pair whose own budget is too little.
    """
    found = {p: _alone(p, p.forward.memory) for p in pairs if p.forward.memory is not None or spare is None}
    others = {p: cost for p, cost in zip(pairs, costs, strict=True) if p not in found}
    if others and spare is not None:
        found.update(_together(others, spare))
    return [found[p] for p in pairs]


def _alone(pair: Pair, own: int | None) -> Checkpoints:
    """The plan of a pair with a budget of its own; None: all is kept."""
    model = pair.model()
    least = int(frontier(pair.steps, **model)[0][0]) if own is not None else 0
    if own is not None and own < least:
        raise _too_little(own, least)
    return choose(pair.steps, model["fixed"] + pair.bytes + pair.state if own is None else own, **model)


def _together(costs: Mapping[Pair, float], spare: int) -> Iterator[tuple[Pair, Checkpoints]]:
    """Plans of pairs that share a budget. What no plan has a use for goes from each to the next: where not all have been tried, it may
    be enough for a better one."""
    fronts = {p: frontier(p.steps, **p.model(), saved=p.saved) for p in costs}
    rest = spare + sum(int(size[0]) for size, _ in fronts.values())
    parts = shares(
        [(size, cost * advances) for (size, advances), cost in zip(fronts.values(), costs.values(), strict=True)], rest
    )
    rest -= sum(parts)
    for pair, part in zip(costs, parts, strict=True):
        made = choose(pair.steps, part + rest, **pair.model(), saved=pair.saved)
        rest += part - made.bytes + (pair.saved if made.units == 1 else 0)
        yield pair, made


def _too_little(memory: int, least: int) -> BudgetError:
    return BudgetError(
        f"memory={memory:,} bytes is too little: at least {least:,} bytes have to be kept between forward and backward pass. Give that "
        "much, or take fewer rows at a time or shorter sequences",
        least,
    )


# ---- the loops anew ----------------------------------------------------------------------------------------------------------


class _Replay:
    """One pair of loops, by a plan of several units."""

    def __init__(self, pair: Pair, plan: Checkpoints, names: Names, threads: int) -> None:
        self.pair, self.plan, self.names, self.threads = pair, plan, names, threads
        self.full = plan.units - 1  # units of full length; the last one may be shorter
        self.unit = Axis(names("unit"), self.full)
        self.place = Axis(names("place"), plan.slots + 1)
        self.tape = {b: Buffer(names("t"), (plan.segment, *b.shape[1:]), b.dtype) for b in pair.tape}
        self.states = {b: Buffer(names("h"), b.shape, b.dtype, lanes=b.lanes) for b in pair.forward.states}
        self.slots = {b: Buffer(names("t"), (plan.slots + 1, *b.shape), b.dtype) for b in pair.forward.states}
        self.outside: set[Buffer] = set()  # what anything but the forward loop touches

    def items(self, items: Sequence[Item]) -> list[Item]:
        """All items with the two loops replaced. The state that the loop ends with is copied to where others expect it."""
        self.outside = {b for k in kernels_of([i for i in items if i is not self.pair.forward]) for b in _buffers(k)}
        turns = list(self._turns())
        last = turns.index((BACK, self.full))
        rest = self.pair.steps - self.full * self.plan.segment
        step, where = self._steps(rest, None)
        made: list[Item] = []
        for item in items:
            if item is self.pair.forward:
                made += [
                    self._replay(turns[:last]),
                    self._loop(self.pair.forward, step, where, True),
                    *(self._copy(self.states[b], (), b, ()) for b in self.states),
                ]
            elif item is self.pair.back:
                made += [
                    *self._gathered(step, where),
                    self._replay(turns[last + 1 :]),
                ]
            elif isinstance(item, Kernel) and any(s.buffer in self.states for s in item.stores):
                made.append(replace(item, stores=[replace(s, buffer=self.states.get(s.buffer, s.buffer)) for s in item.stores]))
            else:
                made.append(item)
        return made

    def _turns(self) -> Iterator[tuple[int, int]]:
        """What to do turn after turn, and at which place or unit."""
        yield SAVE, 0
        current = 0  # the place that holds the state at hand
        for start, goal, first, end in self.plan.actions().tolist():
            if start != current:
                yield RESTORE, start
            units = range(first // self.plan.segment, -(-end // self.plan.segment))
            if goal == BACKWARD:
                yield BACK, units[0]
                current = BACKWARD
            else:
                yield from ((ADVANCE, u) for u in units)
                yield SAVE, goal
                current = goal

    def _replay(self, turns: Sequence[tuple[int, int]]) -> Loop:
        """A loop over turns, each of which runs one of four parts."""
        step, where = self._steps(self.plan.segment, self.unit)
        place, forward = of(self.place), self.pair.forward
        taped = [
            self._loop(forward, step, where, True),
            *self._gathered(step, where),
        ]
        parts: list[tuple[Axis, list[Item]]] = [
            (self.place, [self._copy(self.states[b], (), s, (place,)) for b, s in self.slots.items()]),
            (self.place, [self._copy(s, (place,), self.states[b], ()) for b, s in self.slots.items()]),
            (self.unit, [self._loop(forward, step, where, False)]),
            (self.unit, taped),
        ]
        loops: list[Kernel | Loop] = [Loop(self.names("loop"), axis, False, items, [], True) for axis, items in parts]
        turn = Axis(self.names("turn"), len(turns))
        return Loop(self.names("loop"), turn, False, loops, [], True, tuple(turns))

    def _steps(self, length: int, unit: Axis | None) -> tuple[Axis, Mapping[Axis, Affine]]:
        """The axis over the steps of a unit (None: the last one), and what time is in terms of it."""
        step = Axis(self.names("step"), length)
        size, total = self.plan.segment, self.pair.steps
        if self.pair.forward.reverse:
            first = Affine(0) if unit is None else of(unit) * -size + (total - size)
        else:
            first = Affine(self.full * size) if unit is None else of(unit) * size
        return step, {self.pair.forward.axis: first + of(step), self.pair.back.axis: first + of(step)}

    def _loop(self, loop: Loop, step: Axis, where: Mapping[Axis, Affine], taped: bool) -> Loop:
        """One of the two loops over the steps of a unit."""
        items = [self._moved(i, where, of(step), taped) for i in loop.items]
        if not taped:
            items = self._needed(items)
        states = [self.states.get(b, b) for b in loop.states]
        ends = loop.ends.moved(where) if loop.ends is not None else None
        return Loop(self.names("loop"), step, loop.reverse, items, states, gathers=loop.gathers, ends=ends)

    def _gathered(self, step: Axis, where: Mapping[Axis, Affine]) -> list[Item]:
        """The backward loop over the steps of a unit, its sums over chunks of them."""
        return gathered([self._loop(self.pair.back, step, where, True)], self.names, self.threads, chunk(self.pair.back)[0])

    def _moved(self, item: Item, where: Mapping[Axis, Affine], step: Affine, taped: bool) -> Item:
        if isinstance(item, Loop):
            inside = [self._moved(i, where, step, taped) for i in item.items]
            return Loop(self.names("loop"), item.axis, item.reverse, inside, item.states)
        table = rebuilt(roots(item.stores), {}, where, lambda v: self._loaded(v, step))
        stores = []
        for s in item.stores:
            index = reindexed(s.index, table, where)
            new = replace(s, index=index, value=table[s.value], buffer=self.states.get(s.buffer, s.buffer))
            if s.buffer in self.tape:
                new = replace(new, buffer=self.tape[s.buffer], index=(step, *index[1:]), shape=())
            stores.append(new)
        return replace(item, name=self.names("k"), stores=stores)

    def _loaded(self, v: Value, step: Affine) -> Value:
        if v.op != "load" or v.buffer is None:
            return v
        if v.buffer in self.tape:
            return load(self.tape[v.buffer], (step, *v.index[1:]))
        return replace(v, buffer=self.states[v.buffer]) if v.buffer in self.states else v

    def _needed(self, items: Sequence[Item]) -> list[Item]:
        """The items without stores to the tape, and without what is then computed for nobody."""
        kept = {*self.states.values(), *self.outside}
        while True:
            read = {v.buffer for k in kernels_of(items) for v in k.loads()}
            stores = {k: [s for s in k.stores if s.buffer in kept or s.buffer in read] for k in kernels_of(items)}
            if all(len(stores[k]) == len(k.stores) for k in stores):
                return list(items)
            items = [i for i in items if isinstance(i, Loop) or stores[i]]
            for kernel in kernels_of(items):
                kernel.stores = stores[kernel]
                kernel.reduced = tuple(a for a in kernel.reduced if any(a in v.attrs.get("over", ()) for v in kernel.values()))

    def _copy(self, source: Buffer, before: Index, target: Buffer, place: Index) -> Kernel:
        """A state to or from a slot, cut as the loop's kernels that write it are."""
        (own,) = {source, target} & set(self.states.values())
        state = next(b for b, other in self.states.items() if other is own)
        domain = tuple(Axis(self.names("i"), n) for n in own.used)
        index = tuple(of(a) for a in domain)
        writer, store = next((k, s) for k in kernels_of([self.pair.forward]) for s in k.stores if s.buffer is state)
        cut = [d for d, i in enumerate(store.index) if writer.unit is not None and i == of(writer.unit)]
        stores = [Store(target, (*place, *index), load(source, (*before, *index)))]
        return Kernel(self.names("k"), domain, (), stores, domain[cut[0]] if cut and store.view == own.shape else None)
