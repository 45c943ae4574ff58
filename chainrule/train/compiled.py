"""What the machine does with a network: each stage of its training step, and what every kernel costs.

In: a network that has been fitted. Out: texts, and a `Cost`. Programs are those that the last fit recorded, and machine code that is
there already is found again rather than made.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from ..compiler.driver import MOST_CLOCKS
from ..errors import NotBuiltError, UnknownNameError, UsageError
from ..graph.node import Array
from ..graph.text import graph_text
from ..ops.random import key_of
from ..program import Entry, Program
from ..records import record
from ..registry import nearest
from ..run.backend import Backend, Steps, backends
from ..run.crew import Crew
from ..run.native import NativeBackend, NativeSession
from ..sizes import said
from .objective import DIVISOR, RATE, SEED, STEP, TARGET, WEIGHT, Task, make_program
from .windows import BEGIN

if TYPE_CHECKING:
    from ..compiler.kernels import Item
    from ..compiler.pipeline import Code
    from .fit import Training

STAGES = ("graph", "kernels", "loops", "llvm", "assembly")
ENTRIES = ("step", "forward", "evaluate", "gradient")
RUN = 0.015  # seconds of a run that is timed: long beside the way through Python, short beside what disturbs it
RUNS = 20
MOST = 1.0  # seconds after which no further run is begun
HEADING = ("kernel", "layer", "computes", "loops", "flop", "read", "written", "predicted", "measured", "of peak")


@record(frozen=True)
class Fitted:
    """What the last fit ran. data: arrays without rows, for their types and shapes; rows: of a whole batch; programs: by rows."""

    task: Task
    data: Mapping[str, Array]
    rows: int
    programs: Mapping[int, Program]
    engine: Backend
    threads: int | None

    @classmethod
    def of(cls, training: Training) -> Fitted:
        """What this training is about to run."""
        data = {n: np.empty((0, *a.shape[1:]), a.dtype) for n, a in training.data.arrays().items()}
        driven = bool(getattr(training.task.optimizer, "driver", False))
        rows = min(training.data.rows, max(training.programs)) if driven else training.batch_size
        return cls(training.task, data, rows, training.programs, training.backend, training.threads)


@record(frozen=True)
class KernelCost:
    """One kernel, or one loop of kernels, in a step.

    Attributes:
        name: as in `text("kernels")`; layers: the dotted names of the layers it works for; work: the operators that it computes, and
            what it gives; loops: their lengths.
        flops: operations on floating-point numbers; read, written: bytes.
        predicted: seconds that it needs at least; measured: seconds, None where the processor does not let cycles be counted.
        share: of the peak of one core, flops / measured / peak.
    """

    name: str
    layers: tuple[str, ...]
    work: str
    loops: str
    flops: int
    read: int
    written: int
    predicted: float
    measured: float | None
    share: float | None


@record(frozen=True)
class Cost:
    """What an entry costs on one thread.

    Attributes:
        rows: one for each kernel, in the order in which they run.
        total: their sums; its measured time is that of whole steps of the code without counters, one after the other.
        entry, batch, dtype: what was measured, for so many rows, in this type.
        peak: floating-point operations a second of one core; bandwidth: bytes a second, where all that a step touches has its place.
    """

    rows: tuple[KernelCost, ...]
    total: KernelCost
    entry: str
    batch: int
    dtype: str
    peak: float
    bandwidth: float

    def __str__(self) -> str:
        lines = [HEADING, *map(_cells, self.rows), _cells(self.total)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        aligned = ["  ".join(_set(c, w, i) for i, (c, w) in enumerate(zip(line, widths, strict=True))).rstrip() for line in lines]
        rule = "-" * max(map(len, aligned))
        first = (
            f"{self.entry} of {self.batch} rows in {self.dtype}, one thread; a core computes at most {_si(self.peak, 'flop/s')} and "
            f"moves {_si(self.bandwidth, 'B/s')} where all that this touches has its place"
        )
        return "\n".join([first, "", aligned[0], rule, *aligned[1:-1], rule, aligned[-1]])


@record(frozen=True)
class LoopPlan:
    """What is kept of one loop over time until its backward pass.

    Attributes: layer: the dotted name of the layer it belongs to, "" for the network itself; cell: that layer's class; number, of: it is
    the first, second, ... of so many loops of this layer, in the order in which they run, where it is used more than once or has several;
    reverse: whether it goes from the last step to the first; kind: "all" (the inner values of all steps), "segments" (the state that each
    segment of steps begins with) or "recursive" (fewer states, some of them computed again several times); steps: T; segment: the inner
    values of so many steps are kept at a time; states: kept at a time; extra: forward steps that are computed again; bytes: what all this
    takes.
    """

    layer: str
    cell: str
    number: int
    of: int
    reverse: bool
    kind: str
    steps: int
    segment: int
    states: int
    extra: int
    bytes: int

    def __str__(self) -> str:
        which = f'{self.cell} "{self.layer}"' if self.layer else self.cell
        said_of_it = ["the network itself"] * (not self.layer) + [f"loop {self.number} of {self.of}"] * (self.of > 1)
        if said_of_it:
            which += f", {', '.join(said_of_it)},"
        way = "from the last step to the first" if self.reverse else "from the first step to the last"
        kept = f"the inner values of all {self.steps:,} steps"
        if self.kind != "all":
            kept = (
                f"{_many(self.states, 'state')} and the inner values of {_many(self.segment, 'step')} ({self.kind}); {self.extra:,} of "
                f"{_many(self.steps, 'step')} are computed again ({self.extra / self.steps:.2f} forward passes)"
            )
        return f"{which} goes {way} and keeps {kept}: {said(self.bytes)}"


@record(frozen=True)
class MemoryPlan:
    """What an entry keeps between its forward and its backward pass.

    Attributes: loops: one for each loop that a backward pass follows; bytes: all scratch memory, of a run on one thread; data: so much
    of it holds copies of the batch, which the budget does not count; budget: what `memory=` allowed, or None.
    """

    loops: tuple[LoopPlan, ...]
    bytes: int
    data: int
    budget: int | None

    def __str__(self) -> str:
        allowed = "no budget" if self.budget is None else f"budget {said(self.budget)}"
        copies = f", {said(self.data)} of it copies of data" if self.data else ""
        return "\n".join([*map(str, self.loops), f"scratch memory in all: {said(self.bytes)}{copies} ({allowed})"])


class Compiled:
    """A network's entries as machine code. `net.compiled` is one."""

    def __init__(self, network: Any) -> None:
        self._network = network

    def __repr__(self) -> str:
        return f"Compiled({type(self._network).__name__}): text(stage) of {', '.join(STAGES)}; cost()"

    def text(self, stage: str, *, entry: str = "step", rows: int | None = None) -> str:
        """A stage of the last fit's training step.

        Args:
            stage: "graph", the operators, with the lines of your code; "kernels", index spaces and what is computed at each place;
                "loops", loops over registers; "llvm", LLVM IR; "assembly", for this processor.
            entry: "step" (gradient and update), "forward" (scores), "evaluate" (loss and scores), "gradient".
            rows: of a batch; None for the batch size of the last fit.
        Raises: `UnknownNameError` for another stage or entry; `NotBuiltError` before a fit; `UsageError` for a step of an optimizer
        that has none (LBFGS asks for gradients).

        >>> import numpy as np
        >>> from chainrule import nn
        >>> net = nn.Dense(3)
        >>> _ = net.fit(np.ones((8, 2)), np.ones((8, 3)), epochs=1)
        >>> print(net.compiled.text("graph", entry="forward", rows=4))
        x0 float32[2, 3]
        ...
        >>> "fmul" in net.compiled.text("llvm") or "fma" in net.compiled.text("llvm")
        True
        """
        if stage not in STAGES:
            raise UnknownNameError(f'there is no stage "{stage}".{nearest(stage, STAGES)} Known: {", ".join(STAGES)}')
        request = self._request(entry, rows)
        if stage == "graph":
            return graph_text(request.entry.graph)
        code = request.code()
        if stage in ("kernels", "loops"):
            return code.stage(stage)
        if stage == "llvm":
            return code.text
        from ..compiler import jit

        return jit.assembly(code.text, request.backend.target, request.backend.level)

    def cost(self, *, entry: str = "step", rows: int | None = None) -> Cost:
        """What each kernel of the last fit's training step costs, counted, predicted and measured.

        predicted = max(flops / peak, bytes / bandwidth), about what a kernel takes at least. The peak is that of independent
        multiply-adds on one core. The bandwidth is that of a copy: for state, data and results where all that the step touches has
        its place (a level of cache, or memory), for what a step makes for itself where all that the kernel touches has.

        Measured are whole steps on random data of the right shapes, always the same rows, on one thread: the least of a few runs.
        They run on a copy of the state, and with learning rate 0: the network's weights do not change. Kernels are timed by the
        processor's counter of cycles, and its cycles by the clock. A core's own clock is not constant, so a share may exceed 100 %.

        Args: see `text`.
        Returns: a `Cost`: `print` shows a table; `.rows` and `.total` hold the numbers, in operations, bytes and seconds.
        Raises: as `text`.

        >>> import numpy as np
        >>> from chainrule import nn
        >>> net = nn.Dense(3)
        >>> _ = net.fit(np.ones((8, 2)), np.ones((8, 3)), epochs=1, batch_size=4)
        >>> cost = net.compiled.cost(entry="forward")
        >>> cost.total.flops == 4 * 3 * (2 * 2 + 1)  # products, sums and the bias
        True
        """
        from ..compiler import cost, peak

        request = self._request(entry, rows)
        items = [i for phase in request.code(units=1).plan.phases for i in phase]
        dtype = str(request.fitted.task.dtype)
        fastest, moved = peak.of_one_core(dtype), peak.bandwidth(cost.touched(items))
        whole, each = request.measured(len(items))
        lines = tuple(_line(i, t, fastest, moved) for i, t in zip(items, each, strict=True))
        return Cost(lines, _total(lines, whole, fastest), entry, request.program.rows, dtype, fastest, moved)

    def plan(self, *, entry: str = "step", rows: int | None = None) -> MemoryPlan:
        """What the last fit's training step keeps of its loops over time until the backward pass, by its `memory=`.

        Args: see `text`.
        Returns: a `MemoryPlan`; `print` shows it in words.
        Raises: as `text`.

        >>> import numpy as np
        >>> from chainrule import nn
        >>> net = nn.Sequential(nn.RNN(32), nn.Dense(1))
        >>> _ = net.fit(np.ones((4, 2000, 2)), np.ones((4, 1)), epochs=1, memory="500kB")
        >>> (loop,) = net.compiled.plan().loops
        >>> print(loop)
        RNN "0" goes from the first step to the last and keeps 4 states and the inner values of 512 steps (segments); ...
        >>> loop.layer, loop.kind, loop.steps, loop.segment, loop.states
        ('0', 'segments', 2000, 512, 4)
        """
        from ..compiler import cost

        request = self._request(entry, rows)
        code = request.code(units=1)
        names = [loop.layer for loop, _ in code.plans]
        cells = {n: type(layer).__name__ for n, layer in self._network._layers().items()}
        loops = [
            LoopPlan(
                name, cells.get(name, "a layer"), names[: at + 1].count(name), names.count(name), loop.reverse, p.kind, p.steps,
                p.segment, p.states, p.advances, p.bytes,
            )
            for at, (name, (loop, p)) in enumerate(zip(names, code.plans, strict=True))
        ]  # fmt: skip
        data = sum(b.bytes for b in cost.copies_of_data(i for items in code.plan.phases for i in items))
        return MemoryPlan(tuple(loops), code.arena.bytes, data, request.program.memory)

    def _request(self, entry: str, rows: int | None) -> _Request:
        if entry not in ENTRIES:
            raise UnknownNameError(f'there is no entry "{entry}".{nearest(entry, ENTRIES)} Known: {", ".join(ENTRIES)}')
        fitted: Fitted | None = self._network._fitted
        if fitted is None:
            raise NotBuiltError("compiled: this network has taken no step yet, so there is nothing to show; call fit first")
        if rows is not None and (isinstance(rows, bool) or not isinstance(rows, (int, np.integer)) or rows < 1):
            raise UsageError(f"rows is a whole number of at least 1, not {rows!r}")
        if entry == "step" and getattr(fitted.task.optimizer, "driver", False):
            raise UsageError(
                f'{type(fitted.task.optimizer).__name__} takes no steps of one program; it asks for gradients: entry="gradient"'
            )
        return _Request(self._network, fitted, entry, fitted.rows if rows is None else int(rows))


class _Request:
    """An entry for so many rows, with the session in which its code is found or made."""

    def __init__(self, network: Any, fitted: Fitted, name: str, rows: int) -> None:
        self.network, self.fitted = network, fitted
        known = fitted.programs.get(rows)
        self.programs = fitted.programs  # all of them: the table of pointers depends on them, and code on that table
        if known is None or name not in known.entries:
            self.programs = {rows: make_program(fitted.task, rows, (name,))}
        self.program = self.programs[rows]
        self.entry = self.program.entries[name]
        self.backend = fitted.engine if isinstance(fitted.engine, NativeBackend) else _native()

    def code(self, units: int | None = None) -> Code:
        """The code that the fit ran, or what a fit would run. units: into how many parts work is cut; None: as the fit does."""
        if units is None:
            crew = Crew(self.fitted.threads)
            units = crew.way(crew.pace([self.entry.graph]), 0).units
        return code_of(self._session(self.backend), self.program, self.entry, self.fitted.data, units)

    def _session(self, backend: NativeBackend) -> NativeSession:
        """A session on a copy of the state. Where there is none of the right shapes any more, zeros do."""
        have = {**self.network._state(), **self.network._slots}
        state = {}
        for program in self.programs.values():
            for n, v in program.state.items():
                fits = n in have and have[n].shape == v.type.shape
                state[n] = have[n] if fits else np.zeros(v.type.shape, v.type.dtype)
        return NativeSession(self.programs, state, backend, threads=1)

    # ---- measuring -----------------------------------------------------------------------------------------------------------

    def measured(self, kernels: int) -> tuple[float, Sequence[float | None]]:
        """Seconds of a step, and of each kernel in it. Runs with and without counters take turns: both meet the same disturbances, and
        of each the least counts."""
        from ..compiler import peak

        plain, b = self._session(self.backend), self.backend
        count, counter = self._count(plain), peak.counter() if kernels <= MOST_CLOCKS else None
        cycles, reading = counter or (lambda: 0, 0.0)
        timed = self._session(NativeBackend(b.target, b.level, b.guard, b.poison, timed=True)) if counter else None
        wholes: list[float] = []
        parts: list[Array] = []
        lengths: list[float] = []  # seconds of a cycle
        begun = time.perf_counter()
        while len(wholes) < 2 or (len(wholes) < RUNS and time.perf_counter() - begun < MOST):
            wholes.append(self._taken(plain, count)[0] / count)
            if timed is not None:
                before = timed.cycles()[:kernels]
                seconds, ticks = self._taken(timed, count, cycles)
                parts.append((timed.cycles()[:kernels] - before) / count - reading)
                lengths.append(seconds / ticks)
        if timed is None:
            return min(wholes), [None] * kernels
        # The counter goes at one pace: the median is its own, and a run in which a thread was stopped between two readings is none.
        return min(wholes), [float(t) for t in np.maximum(np.min(parts, axis=0), 0.0) * np.median(lengths)]

    def _count(self, session: NativeSession) -> int:
        """How many steps make a run long enough to be timed."""
        self._taken(session, 1)  # compiles
        count = 1
        while (took := self._taken(session, count)[0]) < RUN / 4:
            count *= 4
        return max(1, int(count * RUN / took))

    def _taken(self, session: NativeSession, count: int, cycles: Callable[[], int] = lambda: 0) -> tuple[float, int]:
        """Seconds and cycles of so many steps."""
        steps = self._steps(count)
        begun, first = time.perf_counter(), cycles()
        taken = session.run(steps)
        last, ended = cycles(), time.perf_counter()
        if taken.interrupted:
            raise KeyboardInterrupt
        return ended - begun, last - first

    def _steps(self, count: int) -> Steps:
        rows, task = self.program.rows, self.fitted.task
        random = np.random.default_rng(0)
        data = {n: self._data(n, a, random) for n, a in self.fitted.data.items()}
        hyper = task.optimizer.hyper() if task.optimizer is not None else {}
        numbers: dict[str, Array] = {f"hyper.{k}": np.full(count, v) for k, v in hyper.items()}
        numbers |= {SEED: np.broadcast_to(key_of(0), (count, 2)), STEP: np.arange(count, dtype=np.uint32)}
        numbers |= {DIVISOR: np.full(count, float(rows)), RATE: np.zeros(count), BEGIN: np.zeros(count, np.int32)}
        return Steps([self.entry.name] * count, data, np.tile(np.arange(rows), count), [rows] * count, numbers, ())

    def _data(self, name: str, like: Array, random: np.random.Generator) -> Array:
        """Random numbers that any loss can take (0 to 1, or classes), and indices that are allowed."""
        shape = (self.program.rows, *like.shape[1:])
        if like.dtype.kind == "f" and name in (TARGET, WEIGHT):
            return random.random(shape).astype(like.dtype)
        wanted = self.program.inputs[name].type.dtype
        if wanted.kind == "f":
            return random.standard_normal(shape).astype(like.dtype) if like.dtype.kind == "f" else np.ones(shape, like.dtype)
        built = self.network._built
        low, high = 0, max(prod(built["outputs"][-1:]), 2) - 1
        for use in built["index"].get(name, ()) if name != TARGET else ():
            high = min(high, use.high) if use.high is not None and high else 0
        return random.integers(low, high + 1, shape).astype(like.dtype)


def code_of(session: NativeSession, program: Program, entry: Entry, data: Mapping[str, Array], units: int) -> Code:
    """All stages of an entry for data of these types. Machine code that this process or its cache on disk has is not made again."""
    given = {n: a for n, a in data.items() if n in program.inputs}
    return session.machine(entry.name, program.rows, given, units).code


def _native() -> NativeBackend:
    backend = backends["native"]
    assert isinstance(backend, NativeBackend)
    return backend


# ---- the table ---------------------------------------------------------------------------------------------------------------


def _line(item: Item, measured: float | None, fastest: float, far: float) -> KernelCost:
    from ..compiler import cost, peak

    done = cost.work(item)
    predicted = cost.seconds(item, fastest, peak.bandwidth(cost.touched([item])), far)
    share = done.flops / measured / fastest if measured else None
    return KernelCost(
        item.name,
        cost.layers(item),
        cost.words(item),
        cost.sizes(item),
        done.flops,
        done.read,
        done.written,
        predicted,
        measured,
        share,
    )


def _total(lines: Sequence[KernelCost], whole: float, fastest: float) -> KernelCost:
    flops = sum(line.flops for line in lines)
    return KernelCost(
        "total", (), f"{len(lines)} kernels", "", flops, sum(line.read for line in lines), sum(line.written for line in lines),
        sum(line.predicted for line in lines), whole, flops / whole / fastest,
    )  # fmt: skip


def _cells(line: KernelCost) -> tuple[str, ...]:
    return (
        line.name, _short(", ".join(line.layers), 16), _short(line.work, 44), line.loops, _si(line.flops), _si(line.read, "B"),
        _si(line.written, "B"), _time(line.predicted), _time(line.measured), "-" if line.share is None else f"{line.share:.1%}",
    )  # fmt: skip


def _set(cell: str, width: int, column: int) -> str:
    """Words to the left, numbers to the right."""
    return cell.ljust(width) if column < 4 else cell.rjust(width)


def _many(count: int, word: str) -> str:
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _si(value: float, unit: str = "") -> str:
    """532480 -> "532 k"."""
    for prefix in ("", "k", "M", "G", "T"):
        if value < 999.5 or prefix == "T":
            break
        value /= 1000
    number = f"{value:.{0 if value >= 99.95 else 1}f}".removesuffix(".0")
    return f"{number} {prefix}{unit}".rstrip()


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    for size, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.0f} ns"
