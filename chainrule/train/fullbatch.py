"""Optimizers that look at all rows at once: LBFGS.

In: a training whose optimizer is a driver. Out: a new state and the history. An epoch is one iteration; the optimizer works on one
flat float64 vector and asks for objective and gradient as often as its line search needs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import DivergenceError, UsageError
from ..graph.interpret import first_not_finite
from ..graph.node import Array
from ..ops.random import key_of
from ..optim import LBFGS, penalty
from ..run.backend import Kept, Session
from ..run.batches import step_sizes
from .fit import EVALUATION_ROWS, Training, evaluate
from .objective import DIVISOR, SEED, STEP, holds_random_numbers
from .progress import Progress


class FullBatch(Training):
    """Training by iterations over all rows, `epochs` of them, or fewer if the search converges."""

    def prepare(self, state: Mapping[str, Array]) -> None:
        """Refuse what changes from call to call: a line search would compare different functions."""
        super().prepare(state)
        changing = "running statistics (BatchNorm)" if self.task.statistics else ""
        if any(holds_random_numbers(p.entries["gradient"].graph) for p in self._programs.values() if "gradient" in p.entries):
            changing = "random numbers (Dropout)"
        if changing:
            raise UsageError(
                f"LBFGS needs an objective that is the same at every call, and layers with {changing} change it: use Adam"
            )

    def _session(self, state: Mapping[str, Array]) -> Session:
        sizes = {*step_sizes(self.data.rows, EVALUATION_ROWS)}
        return self.session({n: v for n, v in state.items() if not n.startswith("slot/")}, self.entries, sorted(sizes))

    @property
    def entries(self) -> tuple[str, ...]:
        return ("gradient", "evaluate") if self.metrics else ("gradient",)

    def __call__(self, state: Mapping[str, Array]) -> None:
        """Run from this state; `save` receives the state after every iteration."""
        rule, run = self.task.optimizer, self.run
        assert isinstance(rule, LBFGS)
        started = time.perf_counter()
        problem = _Problem(self, state)
        w = problem.flat(state)
        memory: dict[str, Any] = rule.renew({k.removeprefix("slot/"): v for k, v in state.items() if k.startswith("slot/")})
        progress = Progress(run, self.epochs, self.verbose)
        try:
            for _ in range(self.epochs):
                self.watch.look()
                begun = time.perf_counter()
                w, value, memory = rule.iterate(problem.objective, w, memory)
                moved = problem.arrays(w)
                w = problem.flat(moved)  # as the network will keep it, so that two short runs equal a long one
                if not np.isfinite(value):
                    run.stopped = "diverged"
                    raise DivergenceError(
                        f"training diverged in epoch {self.counters['epochs'] + 1}, step {problem.take_calls()} (objective {value:.4g}): "
                        f"{problem.first_not_finite(moved)}. The network keeps the weights from before this epoch, and the error's .run "
                        "the history. Scale the data to zero mean and unit variance, or start from smaller weights",
                        run,
                    )
                kept = {f"slot/{k}": np.asarray(memory[k]) for k in ("s", "y", "evaluations")}
                good = {**{n: v for n, v in state.items() if not n.startswith("slot/")}, **moved, **kept}
                self._commit(Kept(good), problem.take_calls(), 1, 1)
                self._record(rule, value, moved, self._session(good), begun)
                run.seconds = time.perf_counter() - started
                progress.epoch()
                self.call_back()
                if memory["converged"] and not run.stopped:
                    run.stop("converged")
                if self.worse_for_long(Kept(good)) or run.stopped:
                    break
            self.watch.hold()  # all is done: from here on it is too late
        except KeyboardInterrupt:
            self.watch.hold()
            self.watch.forget()
            run.interrupted, run.stopped = True, "interrupted"
        finally:
            run.seconds = time.perf_counter() - started
            progress.close(run.stopped)
        self.restore_best()

    def _record(self, rule: LBFGS, value: float, moved: Mapping[str, Array], session: Session, begun: float) -> None:
        """History, metrics and validation of one iteration."""
        added = float(penalty(rule, {n: v.astype(np.float64) for n, v in moved.items()}, rule.hyper()))
        rate = float(rule.schedule(np.zeros(1), 1)[0])
        seen = evaluate(self._programs.values(), session, self.data, self.metrics, self.task)[1] if self.metrics else {}
        self.record(value - added, added, rate, seen, self.judged(session), begun)


class _Problem:
    """The objective over all rows as a function of one flat float64 vector."""

    def __init__(self, training: FullBatch, state: Mapping[str, Array]) -> None:
        self._training = training
        self._state = state
        self._names: Sequence[str] = training.task.trainable
        self._calls = 0

    def flat(self, arrays: Mapping[str, Array]) -> Array:
        return np.concatenate([arrays[n].reshape(-1).astype(np.float64) for n in self._names])

    def arrays(self, w: Array) -> dict[str, Array]:
        shapes = [self._state[n].shape for n in self._names]
        parts = np.split(w, np.cumsum([int(np.prod(s)) for s in shapes])[:-1])
        return {n: p.reshape(s).astype(self._state[n].dtype) for n, p, s in zip(self._names, parts, shapes, strict=True)}

    def take_calls(self) -> int:
        """Evaluations since the last time it was asked: the steps of the run."""
        calls, self._calls = self._calls, 0
        return calls

    def _given(self) -> Iterator[tuple[int, dict[str, Array]]]:
        """Blocks of rows, and what the entry "gradient" reads of them beside the state."""
        data, at = self._training.data, 0
        whole = np.asarray(data.total(np.arange(data.rows)))
        for size in step_sizes(data.rows, EVALUATION_ROWS):
            rows = {k: v[at : at + size] for k, v in data.arrays().items()}
            yield size, {**rows, DIVISOR: whole, SEED: key_of(self._training.seed), STEP: np.asarray(0)}
            at += size

    def first_not_finite(self, moving: Mapping[str, Array]) -> str:
        """Where NaN or infinity first appears with these parameters, in words."""
        state = {**self._state, **moving}
        for size, given in self._given():
            program = self._training.program(size, self._training.entries)
            entry = program.entries["gradient"]
            inputs = [np.asarray(given[i], program.inputs[i].type.dtype) for i in entry.inputs]
            place = first_not_finite(entry.graph, [*(state[r] for r in entry.reads), *inputs], (*entry.reads, *entry.inputs))
            if place:
                return place
        return "the sum over all rows, or a penalty, is not finite"

    def objective(self, w: Array) -> tuple[float, Array]:
        """Objective and gradient, penalties included, summed over blocks of rows."""
        training, rule = self._training, self._training.task.optimizer
        assert rule is not None
        moving = self.arrays(w)
        session = training._session({**self._state, **moving})
        double = {n: v.astype(np.float64) for n, v in moving.items()}
        value = float(penalty(rule, double, rule.hyper()))
        gradient = {n: (rule.l1 * np.sign(v) + rule.l2 * v) if v.ndim >= 2 else np.zeros_like(v) for n, v in double.items()}
        for size, given in self._given():
            results = session.call(size, "gradient", given)
            value += float(results["loss"])
            gradient = {n: g + results[f"gradient.{n}"] for n, g in gradient.items()}
        self._calls += 1
        return value, self.flat(gradient)
