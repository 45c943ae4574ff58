"""What epochs are made of: which rows each step takes and the numbers that go with it, for many epochs at once.

In: data, the options of a run, and how much the network has behind it. Out: `Steps` for one call of a backend, and the history of
the epochs out of what comes back. Nothing here loops over steps, for a step may cost less than a line of Python.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from ..graph.node import Array, Graph, Node
from ..graph.rows import rows_of_nodes
from ..ops.random import key_of
from ..optim import Optimizer
from ..program import Entry, Program
from ..run.backend import Steps
from ..run.batches import SHUFFLE, by_length, epoch_order, step_sizes
from ..schedules import Schedule
from .objective import DIVISOR, RATE, REST, SEED, STEP, TARGET, WEIGHT
from .sequences import steps_of_rows
from .windows import BEGIN, Windows

_AHEAD = 4096  # row numbers that are shuffled ahead where epochs are asked for one by one, and
_MOST_AHEAD = 64  # the epochs: what a run that ends early has shuffled in vain costs less than a millisecond
_MANY = 8  # epochs from which on their generators are seeded together

# Operators whose result is not finite where one of so many first arguments is not; the others may hide it, as max(-inf, 0) does.
_CARRYING = {"add": 2, "subtract": 2, "multiply": 2, "divide": 1, "negative": 1, "broadcast": 1, "reshape": 1}


@dataclass(frozen=True)
class Data:
    """Rows to learn from or to be judged by. weight None: all 1."""

    inputs: Mapping[str, Array]
    target: Array
    weight: Array | None

    @property
    def rows(self) -> int:
        return len(self.target)

    def arrays(self) -> dict[str, Array]:
        weight = {} if self.weight is None else {WEIGHT: self.weight}
        return {**self.inputs, TARGET: self.target, **weight}

    def take(self, rows: Array) -> Data:
        return Data(
            {k: v[rows] for k, v in self.inputs.items()}, self.target[rows], None if self.weight is None else self.weight[rows]
        )

    def total(self, rows: Array) -> float:
        """The divisor of a loss over these rows. Rows of weight 0 alone cost nothing and move nothing."""
        return (float(len(rows)) if self.weight is None else float(np.sum(self.weight[rows]))) or 1.0


@dataclass(frozen=True)
class Behind:
    """What a network has behind it: steps (batches), updates of the weights, epochs; and epochs of the run at hand."""

    steps: int
    updates: int
    epochs: int
    of_run: int


class Epochs:
    """The steps of a run.

    Args: planned: its epochs; keep: the results of steps that are asked for; reads: the inputs that steps read. windows: of which the
    rows of data are some; then a step is a window of a batch, and rests where nothing in it has a weight; free: whether rows may change
    places within a batch.
    """

    def __init__(self, data: Data, batch_size: int, *, shuffle: bool, seed: int, optimizer: Optimizer, planned: int,
                 keep: Sequence[str], reads: Collection[str], windows: Windows | None = None, rests: bool = False,
                 free: bool = False) -> None:  # fmt: skip
        self._data, self._arrays, self._batch, self._windows, self._rests = data, data.arrays(), batch_size, windows, rests
        self._optimizer, self.schedule = optimizer, optimizer.schedule
        self.watched = type(self.schedule).observe is not Schedule.observe  # whether rates depend on how epochs went
        self._planned, self.keep, self._counts_steps = planned, tuple(keep), STEP in reads
        each = windows.count if windows is not None else 1
        sizes = step_sizes(data.rows // each, batch_size)
        self._sizes = [size for size in sizes for _ in range(each)]
        self._whole = data.rows // each // batch_size * batch_size * each  # rows in steps of full size
        self.steps = len(self._sizes)  # of an epoch
        lengths = steps_of_rows(data.inputs) if free else None
        if lengths is not None:
            lengths = lengths.reshape(-1, each).sum(axis=1)
        self._orders = Orders(data.rows // each, batch_size, shuffle=shuffle, seed=seed, lengths=lengths)
        self._group = optimizer.accumulate
        self._update = np.arange(self.steps) // self._group
        self.updates = int(self._update[-1]) + 1  # of an epoch
        self.entries = ["accumulate"] * self.steps
        self.entries[self._group - 1 :: self._group] = ["step"] * (self.steps // self._group)
        self.entries[-1] = "step"
        self._numbers = {SEED: key_of(seed)[None]} | {f"hyper.{k}": np.array([v]) for k, v in optimizer.hyper().items()}
        if windows is not None:
            self._numbers[BEGIN] = np.tile(windows.begins(), len(sizes))
        if data.weight is None:
            rows = np.add.reduceat(np.array(self._sizes, np.float64), np.arange(0, self.steps, self._group))
            self._numbers[DIVISOR] = _shortest(rows[self._update])
        self._steady = self.schedule(np.zeros(1), 1) if _is_ours(self.schedule) and self.schedule.steady else None
        self._tied = self._steady is None and _is_tied(self.schedule, planned * self.updates)

    def after(self, behind: Behind, epochs: int) -> Behind:
        """What the network has behind it after so many more epochs."""
        steps, updates = behind.steps + epochs * self.steps, behind.updates + epochs * self.updates
        return Behind(steps, updates, behind.epochs + epochs, behind.of_run + epochs)

    def take(self, behind: Behind, epochs: int, scale: float = 1.0) -> Steps:
        """The steps of the next epochs. scale: what the schedule's rates are multiplied by."""
        order = self._orders.take(behind.epochs, epochs, most=self._planned - behind.of_run)
        rates = self._rates(behind, epochs)
        numbers = {**self._numbers, RATE: rates if scale == 1.0 else rates * scale}
        if self._counts_steps:
            numbers[STEP] = np.arange(behind.steps, behind.steps + epochs * self.steps).astype(np.uint32)
        entries = self.entries
        if self._windows is not None:
            order = self._windows.order(order, self._batch)
        if self._data.weight is not None:
            totals = self._sums(self._data.weight[order], self._group)[:, self._update].reshape(-1)
            none = totals == 0  # rows of weight 0 alone cost nothing
            numbers[DIVISOR] = np.where(none, 1.0, totals)
            if self._rests and none.any():
                assert epochs == 1
                entries = [REST if n else e for e, n in zip(entries, none.tolist(), strict=True)]
        return Steps(entries, self._arrays, order, self._sizes, numbers, self.keep, epochs)

    def _sums(self, weights: Array, group: int = 1) -> Array:
        """The weights of the rows, in an epoch's order, of so many steps at a time, of which an epoch's last ones may be fewer: (epochs,
        groups)."""
        each, rows = weights.reshape(-1, self._data.rows), self._data.rows
        if self._windows is None:
            size, group = self._batch * group, 1
            whole = rows // size * size
            last = rows - whole
        else:
            size, whole, last = self._batch, self._whole, self._sizes[-1]
        parts = [(each[:, :whole], size), (each[:, whole:], last)]
        sums = np.concatenate([p.reshape(len(each), -1, n).sum(axis=2) for p, n in parts if p.size], axis=1)
        return sums if group == 1 else np.asarray(np.add.reduceat(sums, np.arange(0, self.steps, group), axis=1))

    def _rates(self, behind: Behind, epochs: int) -> Array:
        """Learning rates. A schedule counts updates of the weights: one that depends on the run's length those of this run, any
        other goes on counting where the last run ended, so that two short runs equal a long one."""
        schedule, total = self.schedule, self._planned * self.updates
        if self._steady is not None:
            return self._steady
        first = behind.of_run * self.updates if self._tied else behind.updates
        steps = np.arange(first, first + epochs * self.updates)
        if self._group > 1:
            steps = steps.reshape(epochs, self.updates)[:, self._update].reshape(-1)
        if _is_ours(schedule) or epochs == 1:
            return schedule(steps, total)
        # A schedule of a user may look at an epoch as a whole.
        return np.concatenate([schedule(epoch, total) for epoch in np.split(steps, epochs)])

    # ---- what came of them ---------------------------------------------------------------------------------------------------

    def history(self, steps: Steps, results: Mapping[str, Array], epochs: int) -> dict[str, list[float]]:
        """Loss, penalty and learning rate of the first epochs of a call: one number each. The loss is the mean over all rows."""
        count = epochs * self.steps
        last = slice(self.steps - 1, count, self.steps)  # an epoch's last step is always an update
        divisor, rates = steps.numbers[DIVISOR], steps.numbers[RATE]
        divisor = divisor if len(divisor) <= self.steps else divisor.reshape(-1, self.steps)[:epochs]
        sums, rows = results["loss"][:count].astype(np.float64).reshape(epochs, self.steps) * divisor, float(self._data.rows)
        if self._data.weight is None:
            loss = sums.sum(axis=1) / rows
        else:
            weights = self._sums(self._data.weight[np.atleast_2d(steps.order)[:epochs]])
            loss = np.where(weights > 0, sums, 0.0).sum(axis=1) / weights.sum(axis=1)
        return {
            "loss": loss.tolist(),
            "penalty": results["penalty"][last].astype(np.float64).tolist(),
            "learning_rate": (rates[last] if len(rates) > 1 else np.repeat(rates, epochs)).astype(np.float64).tolist(),
        }


def _shortest(numbers: Array) -> Array:
    """One number, where all steps have the same."""
    return numbers[:1] if np.all(numbers == numbers[0]) else numbers


def _is_tied(schedule: Schedule, total: int, at_once: int = 2**16) -> bool:
    """Whether the learning rate depends on the run's length. A schedule of the package, whose rates change everywhere if they change
    anywhere, is asked for its first and last steps and some between, a user's own for all."""
    parts: Iterable[Array] = (np.arange(i, min(i + at_once, total)) for i in range(0, total, at_once))
    if _is_ours(schedule) and total > 3 * at_once:
        between = np.linspace(0, total - 1, at_once).astype(np.int64)
        parts = (np.arange(at_once), between, np.arange(total - at_once, total))
    return any(not np.array_equal(schedule(steps, total), schedule(steps, 2 * total)) for steps in parts)


def _is_ours(schedule: Schedule) -> bool:
    return type(schedule).__module__ == Schedule.__module__


# ---- how many epochs go into one call --------------------------------------------------------------------------------------------


class Pace:
    """How many epochs go into one call of a backend: first one, then twice as many each time, until a call takes long enough that
    the way through Python does not count, and short enough for a progress line.

    most: the limit, for memory.
    """

    shortest, longest = 0.1, 0.5  # seconds

    def __init__(self, most: int) -> None:
        self._most = max(1, most)
        self._epochs = 1

    def next(self, left: int) -> int:
        """Epochs of the next call, of those that are left."""
        return min(self._epochs, left)

    def took(self, epochs: int, seconds: float) -> None:
        """Learn from a call."""
        if seconds > self.longest:
            self._epochs = max(1, epochs // 2)
        elif seconds < self.shortest and epochs == self._epochs:
            self._epochs = min(2 * epochs, self._most)


def lasting(programs: Sequence[Program]) -> bool:
    """Whether a number in the state that is not finite stays until someone looks, however many steps are taken.

    So it is where the new value of everything is the old one plus, minus or times something, as it is for weights and averages. Then
    the state after several epochs tells whether it was sound after each of them. A slot that an epoch's last step clears does no harm.
    """
    return all(_keeps(entry) for program in programs for entry in program.entries.values())


def _keeps(entry: Entry) -> bool:
    known = dict(zip(entry.reads, entry.graph.inputs, strict=False))
    written = zip(entry.writes, entry.graph.outputs[len(entry.results) :], strict=True)
    return all(
        (name in known and _carries(value, known[name])) or (entry.name == "step" and _is_number(value))
        for name, value in written
    )


def _carries(value: Node, old: Node) -> bool:
    """Whether `value` is not finite wherever `old` is not."""
    look, seen = [value], {value}
    while look:
        node = look.pop()
        if node is old:
            return True
        fresh = [a for a in node.args[: _CARRYING.get(node.op, 0)] if a not in seen]
        seen.update(fresh)
        look += reversed(fresh)  # the old value mostly comes first
    return False


def _is_number(value: Node) -> bool:
    value = value.args[0] if value.op == "broadcast" else value
    return value.op == "constant" and bool(np.isfinite(value.attrs["value"]))


def order_counts(programs: Iterable[Program]) -> bool:
    """Whether the order of the rows within a step may make a difference, beyond the rounding of sums: whether anything looks at other
    rows but by sums over them all. Random numbers belong to places in the batch and are as good in any order."""
    return any(_mixes(program, entry) for program in programs for entry in program.entries.values())


def rows_are_free(programs: Iterable[Program]) -> bool:
    """Whether rows may change places within a batch: nothing depends on their order, and no state belongs to a place."""
    programs = list(programs)
    return not order_counts(programs) and all(v.rows is None for p in programs for v in p.state.values())


_mixing: WeakKeyDictionary[Graph, bool] = WeakKeyDictionary()  # what `_mixes` has found, which takes as long as some fits


def _mixes(program: Program, entry: Entry) -> bool:
    found = _mixing.get(entry.graph)
    if found is None:
        rows = [*(program.state[n].rows for n in entry.reads), *(program.inputs[i].rows for i in entry.inputs)]
        table = rows_of_nodes(entry.graph, [*rows, *(None for _ in entry.captures)])
        found = _mixing[entry.graph] = "mixed" in table.values()
    return found


# ---- the order of rows -----------------------------------------------------------------------------------------------------------


class Orders:
    """The orders of epochs one after the other, each that of `epoch_order`; just one where they are not shuffled. lengths: of the rows,
    by which they stand in their batch."""

    def __init__(self, rows: int, batch: int, *, shuffle: bool, seed: int, lengths: Array | None = None) -> None:
        self._rows, self._batch, self._shuffle, self._seed, self._lengths = rows, batch, shuffle, seed, lengths
        self._first = 0
        self._made = np.zeros((0, rows), np.int64)
        self._plain = self._arranged(np.arange(rows))

    def _arranged(self, order: Array) -> Array:
        return order if self._lengths is None else by_length(order, self._lengths, self._batch)

    def take(self, first: int, epochs: int, most: int) -> Array:
        """The orders of these epochs, (epochs, rows), or (rows,) for all. most: epochs that may be asked for from `first` on."""
        if not self._shuffle:
            return self._plain
        if not self._first <= first <= first + epochs <= self._first + len(self._made):
            ahead = min(most, _MOST_AHEAD, _AHEAD // self._rows)
            self._first = first
            self._made = self._arranged(shuffled(self._rows, self._seed, first, max(epochs, ahead)))
        at = first - self._first
        return self._made[at : at + epochs]


def shuffled(rows: int, seed: int, first: int, epochs: int) -> Array:
    """`epoch_order` of so many epochs: (epochs, rows). To make a generator takes ten times as long as to shuffle a few rows, so
    one generator is given the key that each of them would have had."""
    if epochs < _MANY or first + epochs > 2**32:
        return np.stack([epoch_order(rows, shuffle=True, seed=seed, epoch=e) for e in range(first, first + epochs)])
    orders = np.tile(np.arange(rows), (epochs, 1))
    bits = np.random.Philox(key=0)
    shuffle = np.random.Generator(bits).shuffle
    state: Any = bits.state
    state["buffer"] = [0] * 4  # lists are read faster than arrays
    for order, key in zip(orders, _keys(seed, SHUFFLE, np.arange(first, first + epochs)).tolist(), strict=True):
        state["state"] = {"counter": [0] * 4, "key": key}
        bits.state = state
        shuffle(order)
    return orders


def _keys(seed: int, purpose: int, numbers: Array) -> Array:
    """The keys of `generator(seed, purpose, number)`: what NumPy's SeedSequence makes of the three, for many numbers: (numbers, 2).

    Source: O'Neill, "Developing a seed_seq alternative", 2015, with the constants of numpy/random/bit_generator.pyx, which NumPy
    promises to keep.
    """
    words = [w for n in (seed, purpose) for w in ((n & 0xFFFFFFFF, n >> 32) if n >> 32 else (n,))]
    entropy = [np.full(len(numbers), w, np.uint32) for w in words] + [numbers.astype(np.uint32)]
    entropy += [np.zeros(len(numbers), np.uint32)] * (4 - len(entropy))
    hashed = _hash(0x43B0D7E5, 0x931E8875)
    pool = [hashed(w) for w in entropy[:4]]
    for source in range(4):
        for i in range(4):
            if i != source:
                pool[i] = _mixed(pool[i], hashed(pool[source]))
    for word in entropy[4:]:
        pool = [_mixed(p, hashed(word)) for p in pool]
    last = _hash(0x8B51F9DD, 0x58F38DED)
    low0, high0, low1, high1 = (last(p).astype(np.uint64) for p in pool)
    return np.stack([low0 | high0 << np.uint64(32), low1 | high1 << np.uint64(32)], axis=1)


def _hash(constant: int, factor: int) -> Callable[[Array], Array]:
    """A hash of words of 32 bits that is another one at each call."""

    def hashed(word: Array) -> Array:
        nonlocal constant
        word = word ^ np.uint32(constant)
        constant = constant * factor & 0xFFFFFFFF
        word = word * np.uint32(constant)
        return word ^ word >> np.uint32(16)

    return hashed


def _mixed(x: Array, y: Array) -> Array:
    word: Array = x * np.uint32(0xCA01F9DD) - y * np.uint32(0x4973F715)
    word ^= word >> np.uint32(16)
    return word
