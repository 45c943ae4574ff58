"""The training loop: epochs of steps on a backend, validation, early stopping, and what happens when things go wrong.

In: a `Task` with data. Out: a new state, and the history in a `Run`. Python is entered once an epoch and for progress; the steps of
an epoch are one call of the backend.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np

from ..errors import DivergenceError, UsageError
from ..graph.interpret import first_not_finite
from ..graph.node import Array
from ..metrics import Metric
from ..ops.random import key_of
from ..program import Program
from ..registry import nearest
from ..run.backend import Backend, Session, Steps
from ..run.batches import epoch_order, step_sizes
from ..schedules import Schedule
from .history import Callback, EarlyStopping, Run
from .objective import DIVISOR, RATE, SEED, STEP, TARGET, WEIGHT, Task, make_program
from .progress import Progress

EVALUATION_ROWS = 512  # rows that are evaluated at once; it changes nothing but rounding


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
        return self.weight_of(rows) or 1.0

    def weight_of(self, rows: Array) -> float:
        """The sum of the weights of these rows."""
        return float(len(rows)) if self.weight is None else float(np.sum(self.weight[rows]))


@dataclass
class Training:
    """One `fit`. `counters` holds the steps (batches), updates of the weights and epochs that the network has behind it."""

    task: Task
    data: Data
    validation: Data | None
    backend: Backend
    epochs: int
    batch_size: int
    shuffle: bool
    seed: int
    metrics: Sequence[Metric]
    callbacks: Sequence[Callback]
    early_stopping: EarlyStopping | None
    verbose: bool
    run: Run
    counters: dict[str, int]
    schedule_state: dict[str, float]
    save: Callable[[Mapping[str, Array]], None]
    _programs: dict[tuple[int, tuple[str, ...]], Program] = field(default_factory=dict)
    _best: dict[str, Any] = field(default_factory=dict)
    _tied: bool | None = None  # whether the learning rate depends on the run's length

    def prepare(self, state: Mapping[str, Array]) -> None:
        """Record all programs and check all names, before anything is changed."""
        self._session(state)
        if self.early_stopping is not None:
            self._sign(self.early_stopping.monitor or "loss")

    def __call__(self, state: Mapping[str, Array]) -> None:
        """Train from this state; `save` receives the state after every epoch, whatever happens."""
        started = time.perf_counter()
        session = self._session(state)
        good = dict(state)
        progress = Progress(self.run, self.epochs, self.verbose)
        try:
            for _ in range(self.epochs):
                good = self._epoch(session, good, progress)
                self.run.seconds = time.perf_counter() - started
                progress.epoch()
                for callback in self.callbacks:
                    callback(self.run)
                if self.worse_for_long(good) or self.run.stopped:
                    break
        except KeyboardInterrupt:
            self.run.interrupted, self.run.stopped = True, "interrupted"
        finally:
            self.run.seconds = time.perf_counter() - started
            progress.close(self.run.stopped)
        self.restore_best()

    def restore_best(self) -> None:
        """Bring back the weights of the best epoch, if early stopping is to."""
        best = self._best.get("state")
        if best is not None and self.early_stopping is not None and self.early_stopping.restore_best:
            self.run.best_epoch = self._best["epoch"]
            self.save(best)

    # ---- one epoch -----------------------------------------------------------------------------------------------------------

    def program(self, rows: int, entries: tuple[str, ...]) -> Program:
        """The program of this run for a number of rows."""
        key = (rows, entries)
        if key not in self._programs:
            self._programs[key] = make_program(self.task, rows, entries)
        return self._programs[key]

    def session(self, state: Mapping[str, Array], entries: tuple[str, ...], sizes: Sequence[int]) -> Session:
        """A session with these entries for these numbers of rows, and for the rows of validation "evaluate"."""
        wanted = dict.fromkeys(sizes, entries)
        for size in evaluation_sizes(self.validation.rows) if self.validation is not None else ():
            wanted[size] = (*(e for e in wanted.get(size, ()) if e != "evaluate"), "evaluate")
        return self.backend.session({rows: self.program(rows, names) for rows, names in wanted.items()}, state)

    def _session(self, state: Mapping[str, Array]) -> Session:
        return self.session(state, self._entries, list(dict.fromkeys(step_sizes(self.data.rows, self.batch_size))))

    @property
    def _accumulate(self) -> int:
        return self.task.optimizer.accumulate if self.task.optimizer is not None else 1

    def _steps(self) -> Steps:
        """All steps of the epoch at hand."""
        optimizer = self.task.optimizer
        assert optimizer is not None
        order = epoch_order(self.data.rows, shuffle=self.shuffle, seed=self.seed, epoch=self.counters["epochs"])
        sizes = step_sizes(self.data.rows, self.batch_size)
        count, group = len(sizes), self._accumulate
        edges = np.cumsum([0, *sizes])
        divisors = np.empty(count)
        entries = []
        for i in range(count):
            first, last = i - i % group, min(i - i % group + group, count)  # the batches that make one update
            divisors[i] = self.data.total(order[edges[first] : edges[last]])
            entries.append("step" if i == last - 1 else "accumulate")
        taken = self.counters["steps"] + np.arange(count)
        update, updates = np.arange(count) // group, -(-count // group)  # a schedule counts updates of the weights
        rates = self._rates(
            optimizer.schedule, self.counters["updates"] + update, self.run.epochs * updates + update, self.epochs * updates
        )
        numbers = {
            DIVISOR: divisors,
            SEED: np.broadcast_to(key_of(self.seed), (count, 2)),
            STEP: taken.astype(np.uint32),
            RATE: rates,
            **{f"hyper.{k}": np.full(count, v) for k, v in optimizer.hyper().items()},
        }
        keep = ("loss", "penalty", *(("scores",) if self.metrics else ()))
        return Steps(entries, self.data.arrays(), order, sizes, numbers, keep)

    def _rates(self, schedule: Schedule, taken: Array, in_run: Array, total: int) -> Array:
        """Learning rates. A schedule that depends on the run's length counts the steps of this run; any other goes on counting
        where the last run ended, so that two short runs equal a long one."""
        if self._tied is None:
            whole = np.arange(total)
            self._tied = not np.array_equal(schedule(whole, total), schedule(whole, 2 * total))
        return schedule(in_run if self._tied else taken, total) * self.schedule_state.get("scale", 1.0)

    def _epoch(self, session: Session, good: dict[str, Array], progress: Progress) -> dict[str, Array]:
        """One epoch; returns the state after it. `good` is the state before it, in which everything was finite."""
        begun = time.perf_counter()
        steps = self._steps()
        count = len(steps.sizes)

        def pulse(done: int) -> bool:
            progress.step(done, count)
            return True

        taken = session.run(steps, pulse)
        state = session.state()
        losses = taken.results["loss"].astype(np.float64)
        finite = bool(np.all(np.isfinite(losses))) and all(np.all(np.isfinite(v)) for v in state.values())
        if taken.interrupted:
            if finite:  # else the weights from before this epoch stay
                self._commit(state, taken.steps, 0, steps.entries[: taken.steps].count("step"))
            raise KeyboardInterrupt
        if not finite:
            self._diverged(steps, losses, good)
        self._commit(state, taken.steps, 1, steps.entries.count("step"))
        edges = np.cumsum([0, *steps.sizes])
        weights = np.array([self.data.weight_of(steps.order[a:b]) for a, b in pairwise(edges)])
        updates = np.array([e == "step" for e in steps.entries])
        sums = losses * steps.numbers[DIVISOR]
        loss = float(np.sum(np.where(weights > 0, sums, 0.0)) / np.sum(weights))
        added, rate = float(taken.results["penalty"][updates][-1]), float(steps.numbers[RATE][-1])
        seen = self.measured("", taken.results.get("scores"), self.data.take(steps.order) if self.metrics else self.data)
        self.record(loss, added, rate, seen, self.judged(session), begun)
        optimizer = self.task.optimizer
        assert optimizer is not None
        watched = (self.run.validation_loss or self.run.loss)[-1]
        self.schedule_state.update(optimizer.schedule.observe(watched, self.schedule_state))
        return state

    def _commit(self, state: Mapping[str, Array], steps: int, epochs: int, updates: int) -> None:
        """State and counters change together."""
        self.save(state)
        self.run.steps += steps
        for name, more in (("steps", steps), ("epochs", epochs), ("updates", updates)):
            self.counters[name] += more

    def judged(self, session: Session) -> dict[str, float]:
        """Loss and metrics on the rows held out: nothing if there are none."""
        if self.validation is None:
            return {}
        value, scores = evaluate(session, self.validation)
        return {"validation_loss": value, **self.measured("validation_", scores, self.validation)}

    def measured(self, prefix: str, scores: Array | None, data: Data) -> dict[str, float]:
        """All metrics over these rows."""
        values = {}
        for metric in self.metrics:
            assert scores is not None
            assert self.task.loss is not None
            values[prefix + metric.name] = metric(self.task.loss, scores, data.target, data.weight)
        return values

    def record(self, loss: float, added: float, rate: float, seen: Mapping[str, float], judged: Mapping[str, float],
               begun: float) -> None:  # fmt: skip
        """One more epoch in the history, all of it at once: a user's metric that raises leaves no column longer than another."""
        run = self.run
        run.loss.append(loss)
        run.penalty.append(added)
        run.learning_rate.append(rate)
        for name, value in {**seen, **judged}.items():
            (run.validation_loss if name == "validation_loss" else run.metrics.setdefault(name, [])).append(value)
        run.epoch_seconds.append(time.perf_counter() - begun)

    # ---- when to stop --------------------------------------------------------------------------------------------------------

    def worse_for_long(self, state: dict[str, Array]) -> bool:
        stopping = self.early_stopping
        if stopping is None:
            return False
        name = stopping.monitor or ("validation_loss" if self.run.validation_loss else "loss")
        values = getattr(self.run, name) if name in ("loss", "validation_loss") else self.run.metrics[name]
        value = self._sign(name) * values[-1]
        value = math.inf if math.isnan(value) else value  # a metric that is not defined is no best one
        if not self._best or value < self._best["value"] - stopping.min_delta:
            self._best.update(value=value, epoch=self.run.epochs, state=state)
        elif self.run.epochs - self._best["epoch"] >= stopping.patience:
            self.run.stop(f"no better {name.replace('_', ' ')} for {stopping.patience} epochs")
            return True
        return False

    def _sign(self, name: str) -> float:
        """1 if less of this is better, -1 if more is.

        Raises: `UsageError` if the run does not record it, or nobody said which is better.
        """
        prefixes = ["", "validation_"] if self.validation is not None else [""]
        known = {f"{p}{m.name}": m for p in prefixes for m in self.metrics}
        if name in {f"{p}loss" for p in prefixes}:
            return 1.0
        if name not in known:
            names = [*(f"{p}loss" for p in prefixes), *known]
            raise UsageError(f'early stopping monitors "{name}", but this run records {", ".join(names)}.{nearest(name, names)}')
        better = known[name].greater_is_better
        if better is None:
            raise UsageError(
                f'early stopping cannot tell whether more or less of "{name}" is better: give the function an attribute greater_is_better'
            )
        return -1.0 if better else 1.0

    def _diverged(self, steps: Steps, losses: Array, good: dict[str, Array]) -> None:
        """Go through the epoch again from its beginning, step by step, and find the first value that is not finite."""
        self.run.stopped = "diverged"
        session = self._session(good)
        edges = np.cumsum([0, *steps.sizes])
        place, at, state = "", 0, good
        for at in range(len(steps.sizes)):
            place = self._first_not_finite(steps, at, steps.order[edges[at] : edges[at + 1]], state)
            if place:
                break
            numbers = {k: v[at : at + 1] for k, v in steps.numbers.items()}
            order = steps.order[edges[at] : edges[at + 1]]
            one = replace(steps, entries=steps.entries[at : at + 1], sizes=steps.sizes[at : at + 1], order=order, numbers=numbers)
            if session.run(one).interrupted:
                raise KeyboardInterrupt
            state = session.state()
        raise DivergenceError(
            f"training diverged in epoch {self.counters['epochs'] + 1}, step {at + 1} of {len(steps.sizes)} "
            f"(loss {losses[at]:.4g}): {place}. The network keeps the weights from before this epoch, and the error's .run the history. "
            "Use a smaller learning rate, clip_norm=1.0 in the optimizer, or scale the data to zero mean and unit variance",
            self.run,
        )

    def _first_not_finite(self, steps: Steps, at: int, rows: Array, state: Mapping[str, Array]) -> str:
        program = self.program(steps.sizes[at], self._entries)
        entry = program.entries[steps.entries[at]]
        values = {**{k: v[rows] for k, v in steps.data.items()}, **{k: v[at] for k, v in steps.numbers.items()}}
        arrays = [*(state[r] for r in entry.reads), *(np.asarray(values[i], program.inputs[i].type.dtype) for i in entry.inputs)]
        return first_not_finite(entry.graph, arrays, (*entry.reads, *entry.inputs))

    @property
    def _entries(self) -> tuple[str, ...]:
        return ("step", "accumulate") if self._accumulate > 1 else ("step",)


def evaluation_sizes(rows: int) -> list[int]:
    """The numbers of rows for which an evaluation needs a program."""
    return list(dict.fromkeys(step_sizes(rows, EVALUATION_ROWS)))


def evaluate(session: Session, data: Data) -> tuple[float, Array]:
    """Loss over all rows as one, and the scores, from a session with "evaluate" programs."""
    sizes = step_sizes(data.rows, EVALUATION_ROWS)
    divisors = np.full(len(sizes), data.total(np.arange(data.rows)))
    steps = Steps(["evaluate"] * len(sizes), data.arrays(), np.arange(data.rows), sizes, {DIVISOR: divisors}, ("loss", "scores"))
    taken = session.run(steps)
    if taken.interrupted:
        raise KeyboardInterrupt
    return float(math.fsum(taken.results["loss"].tolist())), taken.results["scores"]
