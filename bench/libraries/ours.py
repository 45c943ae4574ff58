"""chainrule, through its public API: `net.fit`. Only the passes measured alone go one level deeper, to programs and sessions."""

from __future__ import annotations

from collections.abc import Collection
from itertools import pairwise
from math import ceil
from time import perf_counter

import numpy as np

from chainrule import losses, nn, optim
from chainrule.run.backend import Session, Steps, backends
from chainrule.train.history import Run
from chainrule.train.objective import DIVISOR, SEED, STEP, TARGET, make_program

from ..layers import Layer, Sequential, TwoInputs
from ..rows import Array, Row
from . import BOTH_PASSES, BY_HAND, FLOAT64, FLOAT64_ALONE, FORWARD, ONE_THREAD, WITHIN, Settings, Trainee, Unsupported
from .by_hand import LAYERS, LOSSES, OfTwo


class Fit:
    """`net.fit` over the data, again and again. dtype: of the network; by_hand: names of layers and losses that are not built in;
    memory: the budget of backpropagation through time."""

    def __init__(
        self,
        row: Row,
        backend: str,
        threads: int | None,
        dtype: str = "float32",
        by_hand: Collection[str] = (),
        memory: str | None = None,
    ) -> None:
        self.row, self.backend, self.threads, self.memory = row, backend, threads, memory
        x, self.y, self.lengths = data(row)
        self.x = tuple(part.astype(dtype) for part in inputs(row, x))
        self.net = network(row, by_hand)
        self.loss = LOSSES[row.loss] if row.loss in by_hand else row.loss
        self._fit(0, row.batch, 0, dtype=dtype)
        self.net.load_parameters(row.parameters())
        self.optimizer = optim.Adam(row.learning_rate)
        self.at = 0

    def losses(self, steps: int) -> list[float]:
        """One `fit` on each batch: each goes on where the last one ended."""
        edges = [(self.at + i) * self.row.batch for i in range(steps + 1)]
        self.at += steps
        return [self._fit(first, last, 1, self.optimizer).loss[-1] for first, last in pairwise(edges)]

    def train(self, steps: int) -> tuple[int, float]:
        """One `fit` of several epochs over as much of the data as makes about four of them. The clock starts after one more epoch
        before them, when all is set up, and runs to the end: what chainrule does between epochs counts."""
        taken = min(ceil(steps / 4), self.row.steps)
        epochs = ceil(steps / taken)
        run = self._fit(0, taken * self.row.batch, 1 + epochs, self.optimizer)
        return taken * epochs, sum(run.epoch_seconds[1:])

    def operations(self) -> float:
        """As `net.compiled.cost()` counts them."""
        return float(self.net.compiled.cost().total.flops)

    def _fit(self, first: int, last: int, epochs: int, optimizer: optim.Optimizer | None = None, dtype: str | None = None) -> Run:
        x = tuple(part[first:last] for part in self.x)
        return self.net.fit(
            x if len(x) > 1 else x[0], self.y[first:last], lengths=None if self.lengths is None else self.lengths[first:last],
            loss=self.loss, optimizer=optimizer, epochs=epochs, batch_size=self.row.batch, shuffle=False, threads=self.threads,
            dtype=dtype, backend=self.backend, memory=self.memory, verbose=False,
        )  # fmt: skip


class Passes:
    """Entries of the network's program without an update: "evaluate" is the forward pass with the loss, "gradient" both passes.

    The public `evaluate` and `gradients` check and trace at each call, which would drown a small network.
    """

    def __init__(self, row: Row, backend: str, entry: str) -> None:
        self.row, self.entry = row, entry
        fit = Fit(row, backend, None)
        net, loss, given = fit.net, losses.resolve(row.loss), fit.net._inputs(fit.x[0], fit.lengths)
        target = loss.check_target(fit.y, net._built["outputs"])
        self.arrays = {**given.all, TARGET: target}
        program = make_program(net._task(loss, target, inputs=given), row.batch, (entry,))
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


def inputs(row: Row, x: Array) -> tuple[Array, ...]:
    """The inputs of the network, which are one array in the row's data."""
    first = row.layers[0]
    return (x[:, : first.at], x[:, first.at :]) if isinstance(first, TwoInputs) else (x,)


def layer_of(kind: Layer, by_hand: Collection[str] = ()) -> nn.Module:
    """chainrule's layer of this kind, or the one written by hand.

    Raises: `Unsupported` if there is none.
    """
    if isinstance(kind, Sequential):
        return nn.Sequential(*(layer_of(part, by_hand) for part in kind.layers))
    name = type(kind).__name__
    kept = LAYERS if name in by_hand or not hasattr(nn, name) else vars(nn)
    if name not in kept:
        raise Unsupported(f"chainrule has no layer {name} yet")
    made: nn.Module = kept[name](**{k: layer_of(v, by_hand) if isinstance(v, Layer) else v for k, v in vars(kind).items()})
    return made


def network(row: Row, by_hand: Collection[str] = ()) -> nn.Sequential:
    """The network, not built yet."""
    layers = [layer_of(kind, by_hand) for kind in row.layers]
    return OfTwo(*layers) if isinstance(row.layers[0], TwoInputs) else nn.Sequential(*layers)


def prepare(row: Row, way: str, settings: Settings) -> Trainee:
    """See `bench.libraries`."""
    if settings.backend not in backends:
        raise Unsupported(f"there is no backend {settings.backend}; there is {', '.join(backends)}")
    if way in (FORWARD, BOTH_PASSES):
        return Passes(row, settings.backend, "evaluate" if way == FORWARD else "gradient")
    # Given a number, chainrule takes it; without one it chooses, which is what a user gets.
    threads = 1 if way in (ONE_THREAD, FLOAT64_ALONE) else None if settings.all_threads else settings.threads
    if way.startswith(WITHIN):
        return Fit(row, settings.backend, threads, memory=way.removeprefix(WITHIN))
    if way.startswith(BY_HAND):
        return Fit(row, settings.backend, threads, by_hand=way.removeprefix(BY_HAND).split(", "))
    return Fit(row, settings.backend, threads, "float64" if way in (FLOAT64, FLOAT64_ALONE) else "float32")
