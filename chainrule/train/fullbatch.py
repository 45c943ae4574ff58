"""Optimizers that look at all rows at once: LBFGS.

In: a `Training` whose optimizer is a driver. Out: a new state and the history. An epoch is one iteration; the optimizer works on one
flat float64 vector and asks for objective and gradient as often as its line search needs.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import DivergenceError, UsageError
from ..graph.node import Array
from ..ops.random import key_of
from ..optim import LBFGS, penalty
from ..run.backend import Steps
from ..run.batches import step_sizes
from .fit import EVALUATION_ROWS, Training, evaluate
from .objective import DIVISOR, SEED, STEP
from .progress import Progress


def fit_full_batch(training: Training, state: Mapping[str, Array]) -> None:
    """Run `training.epochs` iterations, or fewer if the search converges."""
    rule = training.task.optimizer
    assert isinstance(rule, LBFGS)
    if training.task.statistics:
        raise UsageError(
            "LBFGS needs an objective that does not change from call to call; layers with running statistics (BatchNorm) do: use Adam"
        )
    started = time.perf_counter()
    run, data, names = training.run, training.data, training.task.trainable
    sizes = step_sizes(data.rows, max(training.batch_size, EVALUATION_ROWS))
    wanted: dict[int, tuple[str, ...]] = dict.fromkeys(sizes, ("gradient",))
    if training.validation is not None:
        for size in step_sizes(training.validation.rows, EVALUATION_ROWS):
            wanted[size] = tuple(dict.fromkeys((*wanted.get(size, ()), "evaluate")))
    programs = {rows: training.programs(training.task, rows, entries) for rows, entries in wanted.items()}
    fixed = {n: v for n, v in state.items() if n not in names and not n.startswith("slot/")}
    arrays, divisor, edges = data.arrays(), data.total(np.arange(data.rows)), np.cumsum([0, *sizes])
    numbers = {DIVISOR: np.asarray(divisor), SEED: key_of(training.seed), STEP: np.asarray(0)}
    hyper = rule.hyper()

    def session(w: Array) -> Any:
        return training.backend.session(programs, {**fixed, **unflatten(w)})

    def unflatten(w: Array) -> dict[str, Array]:
        out, at = {}, 0
        for n in names:
            size = state[n].size
            out[n] = w[at : at + size].reshape(state[n].shape).astype(state[n].dtype)
            at += size
        return out

    def objective(w: Array) -> tuple[float, Array]:
        moving = {n: v.astype(np.float64) for n, v in unflatten(w).items()}
        here = session(w)
        value, gradient = float(penalty(rule, moving, hyper)), _penalty_gradient(rule, moving)
        for size, first in zip(sizes, edges, strict=False):
            rows = slice(first, first + size)
            results = here.call(size, "gradient", {**{k: v[rows] for k, v in arrays.items()}, **numbers})
            value += float(results["loss"])
            for n in names:
                gradient[n] = gradient[n] + results[f"gradient.{n}"]
        run.steps += 1
        return value, np.concatenate([gradient[n].reshape(-1) for n in names])

    w = np.concatenate([state[n].reshape(-1).astype(np.float64) for n in names])
    memory: dict[str, Any] = rule.renew({k.removeprefix("slot/"): v for k, v in state.items() if k.startswith("slot/")})
    progress = Progress(run, training.epochs, training.verbose)
    try:
        for _ in range(training.epochs):
            begun = time.perf_counter()
            w, value, memory = rule.iterate(objective, w, memory)
            if not np.isfinite(value):
                run.stopped = "diverged"
                raise DivergenceError(
                    f"the objective is {value} at the start of epoch {run.epochs + 1}; scale the data, or start from smaller weights",
                    run,
                )
            moved = unflatten(w)
            kept = {f"slot/{k}": np.asarray(memory[k]) for k in ("s", "y", "evaluations")}
            training.counters["epochs"] += 1
            added = float(penalty(rule, {n: v.astype(np.float64) for n, v in moved.items()}, hyper))
            run.loss.append(value - added)
            run.penalty.append(added)
            run.learning_rate.append(float(rule.schedule(np.zeros(1), 1)[0]))
            _judge(training, session(w))
            run.epoch_seconds.append(time.perf_counter() - begun)
            run.seconds = time.perf_counter() - started
            good = {**state, **moved, **kept}
            training.save(good)
            progress.epoch()
            for callback in training.callbacks:
                callback(run)
            if training.worse_for_long(good):
                break
            if memory["converged"]:
                run.stop("converged")
            if run.stopped:
                break
    except KeyboardInterrupt:
        run.interrupted, run.stopped = True, "interrupted"
    finally:
        run.seconds = time.perf_counter() - started
        progress.close(run.stopped)
    training.restore_best()


def _penalty_gradient(rule: LBFGS, moving: Mapping[str, Array]) -> dict[str, Array]:
    return {n: (rule.l1 * np.sign(w) + rule.l2 * w) if w.ndim >= 2 else np.zeros_like(w) for n, w in moving.items()}


def _judge(training: Training, session: Any) -> None:
    """Metrics on the training rows and on the held-out ones."""
    if training.metrics:
        outputs = session.run(_forward_steps(training))["scores"]
        training.measure("", outputs, training.data)
    if training.validation is not None:
        value, scores = evaluate(session, training.validation, bool(training.metrics))
        training.run.validation_loss.append(value)
        training.measure("validation_", scores, training.validation)


def _forward_steps(training: Training) -> Steps:
    data = training.data
    sizes = step_sizes(data.rows, max(training.batch_size, EVALUATION_ROWS))
    count = len(sizes)
    numbers = {
        DIVISOR: np.full(count, 1.0),
        SEED: np.broadcast_to(key_of(training.seed), (count, 2)),
        STEP: np.zeros(count, np.uint32),
    }
    return Steps(["gradient"] * count, data.arrays(), np.arange(data.rows), sizes, numbers, ("scores",))
