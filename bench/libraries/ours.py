"""chainrule, through its public API: `net.fit`. Only the passes measured alone go one level deeper, to programs and sessions."""

from __future__ import annotations

from itertools import pairwise
from math import ceil
from time import perf_counter

import numpy as np

from chainrule import losses, nn, optim
from chainrule.run.backend import Session, Steps, backends
from chainrule.train.history import Run
from chainrule.train.objective import DIVISOR, SEED, STEP, TARGET, make_program

from ..layers import Layer
from ..rows import Array, Row
from . import BOTH_PASSES, FORWARD, ONE_THREAD, Settings, Trainee, Unsupported


class Fit:
    """`net.fit` over the data, again and again."""

    def __init__(self, row: Row, backend: str, threads: int | None) -> None:
        self.row, self.backend, self.threads = row, backend, threads
        self.x, self.y, self.lengths = data(row)
        self.net = network(row, backend, self.x, self.y, self.lengths)
        self.optimizer = optim.Adam(row.learning_rate)
        self.at = 0

    def losses(self, steps: int) -> list[float]:
        """One `fit` on each batch: each goes on where the last one ended."""
        edges = [(self.at + i) * self.row.batch for i in range(steps + 1)]
        self.at += steps
        return [self._fit(first, last, 1).loss[-1] for first, last in pairwise(edges)]

    def train(self, steps: int) -> tuple[int, float]:
        """One `fit` of several epochs over as much of the data as makes about four of them. The clock starts after one more epoch
        before them, when all is set up, and runs to the end: what chainrule does between epochs counts."""
        taken = min(ceil(steps / 4), self.row.steps)
        epochs = ceil(steps / taken)
        run = self._fit(0, taken * self.row.batch, 1 + epochs)
        return taken * epochs, sum(run.epoch_seconds[1:])

    def _fit(self, first: int, last: int, epochs: int) -> Run:
        return self.net.fit(
            self.x[first:last], self.y[first:last], lengths=None if self.lengths is None else self.lengths[first:last],
            loss=self.row.loss, optimizer=self.optimizer, epochs=epochs, batch_size=self.row.batch, shuffle=False,
            threads=self.threads, backend=self.backend, verbose=False,
        )  # fmt: skip


class Passes:
    """Entries of the network's program without an update: "evaluate" is the forward pass with the loss, "gradient" both passes.

    The public `evaluate` and `gradients` check and trace at each call, which would drown a small network.
    """

    def __init__(self, row: Row, backend: str, entry: str) -> None:
        self.row, self.entry = row, entry
        x, y, lengths = data(row)
        net = network(row, backend, x, y, lengths)
        loss, inputs = losses.resolve(row.loss), net._inputs(x, lengths)
        target = loss.check_target(y, net._built["outputs"])
        self.arrays = {**inputs.all, TARGET: target}
        program = make_program(net._task(loss, target, inputs=inputs), row.batch, (entry,))
        state = {**net._arrays("parameter"), **net._arrays("statistic")}
        self.session: Session = backends[backend].session({row.batch: program}, state)

    def losses(self, steps: int) -> list[float]:
        """Not of a training: the weights stay."""
        raise Unsupported("passes without an update have no losses to compare")

    def train(self, steps: int) -> tuple[int, float]:
        """The entry over batch after batch."""
        taken = min(steps, self.row.steps)
        numbers = {DIVISOR: np.full(taken, float(self.row.batch))}
        if self.entry == "gradient":
            numbers |= {SEED: np.zeros((taken, 2), np.uint32), STEP: np.arange(taken, dtype=np.uint32)}
        order = np.arange(taken * self.row.batch)
        many = Steps([self.entry] * taken, self.arrays, order, [self.row.batch] * taken, numbers, ("loss",))
        times = ceil(steps / taken)
        begun = perf_counter()
        for _ in range(times):
            self.session.run(many)
        return taken * times, perf_counter() - begun


def data(row: Row) -> tuple[Array, Array, Array | None]:
    """x, y and lengths as `fit` takes them."""
    x, y = row.data()
    return x, y.astype(np.float32) if row.loss == "binary_cross_entropy" else y, row.lengths()


def layer_of(kind: Layer) -> nn.Module:
    """chainrule's layer of this kind.

    Raises: `Unsupported` if it has none.
    """
    name = type(kind).__name__
    if not hasattr(nn, name):
        raise Unsupported(f"chainrule has no layer {name} yet")
    made: nn.Module = getattr(nn, name)(**{k: layer_of(v) if isinstance(v, Layer) else v for k, v in vars(kind).items()})
    return made


def network(row: Row, backend: str, x: Array, y: Array, lengths: Array | None) -> nn.Sequential:
    """The network with the row's initial weights."""
    net, rows = nn.Sequential(*map(layer_of, row.layers)), slice(row.batch)
    first = None if lengths is None else lengths[rows]
    net.fit(x[rows], y[rows], lengths=first, loss=row.loss, epochs=0, backend=backend, verbose=False)
    net.load_parameters(row.parameters())
    return net


def prepare(row: Row, way: str, settings: Settings) -> Trainee:
    """See `bench.libraries`."""
    if settings.backend not in backends:
        raise Unsupported(f"there is no backend {settings.backend}; there is {', '.join(backends)}")
    if way in (FORWARD, BOTH_PASSES):
        return Passes(row, settings.backend, "evaluate" if way == FORWARD else "gradient")
    # Given a number, chainrule takes it; without one it chooses, which is what a user gets.
    threads = 1 if way == ONE_THREAD else None if settings.all_threads else settings.threads
    return Fit(row, settings.backend, threads)
