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

from ..rows import Array, Row
from . import BOTH_PASSES, FORWARD, ONE_THREAD, Settings, Trainee, Unsupported


class Fit:
    """`net.fit` over the data, again and again."""

    def __init__(self, row: Row, backend: str, threads: int | None) -> None:
        self.row, self.backend, self.threads = row, backend, threads
        self.x, self.y = data(row)
        self.net = network(row, self.x, self.y, backend)
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
            self.x[first:last], self.y[first:last], loss=self.row.loss, optimizer=self.optimizer, epochs=epochs,
            batch_size=self.row.batch, shuffle=False, threads=self.threads, backend=self.backend, verbose=False,
        )  # fmt: skip


class Passes:
    """Entries of the network's program without an update: "evaluate" is the forward pass with the loss, "gradient" both passes.

    The public `evaluate` and `gradients` check and trace at each call, which would drown a small network.
    """

    def __init__(self, row: Row, backend: str, entry: str) -> None:
        self.row, self.entry = row, entry
        self.x, self.y = data(row)
        net = network(row, self.x, self.y, backend)
        loss = losses.resolve(row.loss)
        self.target = loss.check_target(self.y, net._built["outputs"])
        self.name = next(iter(net._built["inputs"]))
        program = make_program(net._task(loss, self.target), row.batch, (entry,))
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
        arrays, order = {self.name: self.x, TARGET: self.target}, np.arange(taken * self.row.batch)
        many = Steps([self.entry] * taken, arrays, order, [self.row.batch] * taken, numbers, ("loss",))
        times = ceil(steps / taken)
        begun = perf_counter()
        for _ in range(times):
            self.session.run(many)
        return taken * times, perf_counter() - begun


def data(row: Row) -> tuple[Array, Array]:
    """x and y as `fit` takes them."""
    x, y = row.data()
    return x, y.astype(np.float32) if row.loss == "binary_cross_entropy" else y


def network(row: Row, x: Array, y: Array, backend: str) -> nn.Sequential:
    """The network with the row's initial weights."""
    missing = [type(layer).__name__ for layer in row.layers if not hasattr(nn, type(layer).__name__)]
    if missing:
        raise Unsupported(f"chainrule has no layer {missing[0]} yet")
    net = nn.Sequential(*(getattr(nn, type(layer).__name__)(**vars(layer)) for layer in row.layers))
    net.fit(x[: row.batch], y[: row.batch], loss=row.loss, epochs=0, backend=backend, verbose=False)
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
