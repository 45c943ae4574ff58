"""The programs of a network: what it gives, what it costs, and how it learns.

In: a network (seen only through `Forward`), a loss, an optimizer, metrics. Out: `Program`s with entries "forward" (scores), "evaluate"
(scores and summed loss), "gradient" (by each parameter), "update" (from given gradients), "accumulate" (add to the running sums), "step"
(gradient and update in one), "observed" (a step that also gives the norm of each gradient) and "rest" (a step with nothing to learn
from). What evaluates or learns also gives the sums that metrics are made of.

The objective of a batch is Σ w l / divisor over the elements l of the loss, where the divisor, a run-time number, is the sum of the
weights of all rows that one update is made of. So a short batch and a sum over several batches are exact. Where a loss is taken at
each step of sequences that differ in length, the weight of a row is that of all its steps together, and only these count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, Protocol

import numpy as np

from ..errors import ShapeError, UsageError
from ..graph.node import Array, Graph, Type
from ..graph.trace import located
from ..losses import Loss
from ..metrics import Metric
from ..ops.random import fold_in
from ..optim import Optimizer, apply_update, penalty
from ..program import Input, Program, ProgramBuilder, Variable, differentiate
from ..records import record
from .windows import BEGIN, Windows

TARGET, WEIGHT, DIVISOR, SEED, STEP, RATE = "target", "weight", "divisor", "seed", "step", "learning_rate"
REST = "rest"  # an entry


class Forward(Protocol):
    """The network as the programs see it: scores and new statistics from state and inputs."""

    def __call__(self, state: Mapping[str, Any], given: Mapping[str, Any], training: bool, /) -> tuple[Any, dict[str, Any]]: ...


@record(frozen=True)
class Task:
    """Everything that a program depends on, but for the number of rows."""

    forward: Forward
    parameters: Mapping[str, Type]
    trainable: Sequence[str]
    statistics: Mapping[str, Type]
    inputs: Mapping[str, Type]  # of one row
    dtype: np.dtype[Any]
    loss: Loss | None = None
    target: Type | None = None  # of one row
    weighted: bool = False
    optimizer: Optimizer | None = None
    steps: str | None = None  # the lengths of the sequences whose steps have a loss each
    metrics: tuple[Metric, ...] = ()  # those that are sums over rows
    memory: int | None = None  # bytes that may be kept between forward and backward pass
    windows: Windows | None = None  # of which the inputs are some


def sums_name(metric: Metric) -> str:
    """What entries call the sums that a metric is made of."""
    return f"metric.{metric.name}"


def slot_name(parameter: str, slot: str) -> str:
    """The name in the state of what an optimizer keeps for a parameter."""
    return f"slot/{parameter}.{slot}"


def initial_slots(optimizer: Optimizer, parameters: Mapping[str, Array], dtype: Any) -> dict[str, Array]:
    """The optimizer's state before the first step."""
    slots = {slot_name(p, k): np.asarray(v, dtype) for p, w in parameters.items() for k, v in optimizer.slots(w).items()}
    slots.update({f"slot/{k}": np.asarray(v, dtype) for k, v in optimizer.shared().items()})
    if optimizer.accumulate > 1:
        slots.update({slot_name(p, "sum"): np.zeros_like(w) for p, w in parameters.items()})
    return slots


def weighted_mean(loss: Loss, scores: Any, target: Any, weight: Any, divisor: Any, rows: int, lengths: Any = None) -> Any:
    """Σ w l / divisor, where `divisor` counts rows; the mean over the elements of a row is taken as well.

    lengths: of the sequences (rows, time) that have a loss at each step; then `weight` is that of all steps of a row, and `divisor`
    their sum: steps beyond a sequence's end do not count.
    Raises: `ShapeError` if the loss returns neither one number nor an array with the rows (and the steps) first.
    """
    elements = loss(scores, target)
    if lengths is not None:
        return _mean_of_steps(loss, elements, scores.shape[:2], weight, divisor, lengths)
    if not hasattr(elements, "ndim"):
        raise UsageError(f"the loss {loss.name} returns {elements!r}, not an array of losses; perhaps a `return` is missing")
    if elements.ndim == 0:
        if weight is not None:
            raise UsageError(
                f"the loss {loss.name} returns one number for the whole batch, so rows cannot be weighted; return one for each row"
            )
        return elements * (rows / divisor)
    if elements.shape[0] != rows:
        raise ShapeError(
            located(f"the loss {loss.name} returns shape {elements.shape}; its first axis must be the {rows} rows of the batch")
        )
    if weight is not None:
        elements = elements * np.reshape(weight, (rows, *(1,) * (elements.ndim - 1)))
    each = prod(elements.shape[1:])
    return np.sum(elements) / (divisor * each if each != 1 else divisor)


def _mean_of_steps(loss: Loss, elements: Any, shape: tuple[int, int], weight: Any, divisor: Any, lengths: Any) -> Any:
    if np.shape(elements)[:2] != shape:
        raise ShapeError(located(
            f"the loss {loss.name} returns shape {np.shape(elements)}; with sequences of different length its first axes must be rows "
            f"and steps, {shape}, so that steps beyond a sequence's end can be left out"
        ))  # fmt: skip
    within, each = _steps(lengths, weight, shape[1])
    rest = (1,) * (elements.ndim - 2)
    weighted = elements * np.reshape(each, (shape[0], 1, *rest))
    counted = np.where(np.reshape(within, (*shape, *rest)), weighted, np.zeros((), elements.dtype))
    return np.sum(counted) / (divisor * prod(elements.shape[2:]))


def _steps(lengths: Any, weight: Any, steps: int) -> tuple[Any, Any]:
    """Which steps count, (rows, steps), and what one of a row weighs, (rows, 1). weight: that of all steps of a row together."""
    each = weight / np.maximum(lengths, 1).astype(weight.dtype)
    return np.less(np.arange(steps), lengths[:, None]), each[:, None]


def batch_type(row: Type, rows: int) -> Type:
    """The type of a batch of such rows."""
    return Type((rows, *row.shape), row.dtype)


def make_program(task: Task, rows: int, entries: Sequence[str]) -> Program:
    """The program for batches of `rows` rows with these entries."""
    optimizer, dtype = task.optimizer, task.dtype
    scalar = Type((), dtype)
    state = [Variable(n, t, "parameter") for n, t in task.parameters.items()]
    state += [Variable(n, t, "statistic") for n, t in task.statistics.items()]
    state += _kept(task.windows, rows) if task.windows is not None else []
    data = [Input(n, batch_type(t, rows), rows=0) for n, t in task.inputs.items()]
    target = [Input(TARGET, batch_type(task.target, rows), rows=0)] if task.target is not None else []
    weight = [Input(WEIGHT, Type((rows,), dtype), rows=0)] if task.weighted else []
    numbers = [Input(DIVISOR, scalar), Input(SEED, Type((2,), np.dtype(np.uint32))), Input(STEP, Type((), np.dtype(np.uint32)))]
    if task.windows is not None:
        numbers.append(Input(BEGIN, Type((), np.dtype(np.int32))))
    hyper: list[Input] = []
    gradients: list[Input] = []
    if optimizer is not None:
        state += [Variable(n, Type(v.shape, dtype), "slot") for n, v in _slot_shapes(optimizer, task).items()]
        hyper = [Input(RATE, scalar), *(Input(f"hyper.{n}", scalar) for n in optimizer.hyper())]
        gradients = [Input(f"gradient.{n}", task.parameters[n]) for n in task.trainable]
    builder = ProgramBuilder(state, [*data, *target, *weight, *numbers, *hyper, *gradients], rows, task.memory)
    makers: dict[str, tuple[Callable[..., Any], list[Input]]] = {
        "forward": (_forward(task), data),
        "evaluate": (_evaluate(task, rows), [*data, *target, *weight, numbers[0]]),
        "gradient": (_gradient(task, rows), [*data, *target, *weight, *numbers]),
        "update": (_update(task), [*gradients, *hyper]),
        "accumulate": (_accumulate(task, rows), [*data, *target, *weight, *numbers]),
        "step": (_step(task, rows, observed=False), [*data, *target, *weight, *numbers, *hyper]),
        "observed": (_step(task, rows, observed=True), [*data, *target, *weight, *numbers, *hyper]),
        REST: (_rest(task), [*data, *target, *weight, numbers[0], *hyper]),
    }
    for name in entries:
        function, inputs = makers[name]
        names = [i.name for i in inputs]
        builder.entry(
            name, function, names, key=_key if SEED in names else None, rows_of={"scores": 0} if name != "update" else None
        )
    return builder.build()


def _kept(windows: Windows, rows: int) -> list[Variable]:
    """What goes on from window to window, as long as the largest batch."""
    alike = 0 if windows.rows == rows else None
    return [Variable(n, batch_type(t, windows.rows), "statistic", alike) for n, t in windows.kept.items()]


def holds_random_numbers(graph: Graph) -> bool:
    """Whether anything in the graph, bodies of loops included, is drawn at random."""
    bodies = [n.attrs["body"] for n in graph.nodes() if n.op == "scan"]
    return any(n.op == "random_bits" and n.attrs["stream"] for n in graph.nodes()) or any(map(holds_random_numbers, bodies))


def _key(given: Mapping[str, Any]) -> Any:
    """Random numbers of a step: from the run's seed and the number of the step."""
    return fold_in(given[SEED], given[STEP])


def _slot_shapes(optimizer: Optimizer, task: Task) -> dict[str, Array]:
    return initial_slots(optimizer, {n: np.zeros(task.parameters[n].shape, task.dtype) for n in task.trainable}, task.dtype)


def _forward(task: Task) -> Callable[..., Any]:
    def entry(state: Mapping[str, Any], given: Mapping[str, Any]) -> Any:
        return {"scores": task.forward(state, given, False)[0]}, {}

    return entry


def _evaluate(task: Task, rows: int) -> Callable[..., Any]:
    def entry(state: Mapping[str, Any], given: Mapping[str, Any]) -> Any:
        scores, _ = task.forward(state, given, False)
        return {
            "loss": _mean(task, rows, scores, given),
            "scores": scores,
            **_sums(task, scores, given),
        }, {}

    return entry


def _rest(task: Task) -> Callable[..., Any]:
    """A step over rows that have no weight left: all of its results, and nothing changes."""

    def entry(state: Mapping[str, Any], given: Mapping[str, Any]) -> Any:
        optimizer = task.optimizer
        assert optimizer is not None
        scores, _ = task.forward(state, given, False)
        seen = {"scores": scores, **_sums(task, scores, given)}
        h = {RATE: given[RATE], **{k: given[f"hyper.{k}"] for k in optimizer.hyper()}}
        none = np.zeros_like(given[DIVISOR])
        added = np.add(penalty(optimizer, {n: state[n] for n in task.trainable}, h), none)
        return {"loss": none, "penalty": added, **{n: np.zeros_like(v) for n, v in seen.items()}}, {}

    return entry


def _sums(task: Task, scores: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """What metrics are made of: sums over the rows, or over all steps of them that count."""
    assert task.loss is not None
    weight = given.get(WEIGHT)
    if task.steps is not None and task.metrics:
        within, each = _steps(given[task.steps], weight, scores.shape[1])
        weight = np.where(within, each, np.zeros((), each.dtype))
    sums = {sums_name(m): m.sums(task.loss, scores, given[TARGET], weight) for m in task.metrics}
    return sums if task.steps is None else {name: np.sum(each, axis=0) for name, each in sums.items()}


def objective(
    task: Task, rows: int, given: Mapping[str, Any], state: Mapping[str, Any], training: bool = True
) -> tuple[Any, Any, dict[str, Any]]:
    """While tracing: the objective of a batch (without penalties), the scores, and the new statistics."""
    scores, statistics = task.forward(state, given, training)
    return _mean(task, rows, scores, given), scores, statistics


def _mean(task: Task, rows: int, scores: Any, given: Mapping[str, Any]) -> Any:
    assert task.loss is not None
    lengths = given[task.steps] if task.steps is not None else None
    return weighted_mean(task.loss, scores, given[TARGET], given.get(WEIGHT), given[DIVISOR], rows, lengths)


def _differentiated(
    task: Task, rows: int, state: Mapping[str, Any], given: Mapping[str, Any]
) -> tuple[Any, Any, dict[str, Any], dict[str, Any]]:
    moving_names = set(task.trainable)
    fixed = {n: v for n, v in state.items() if n not in moving_names}

    def of_parameters(moving: dict[str, Any]) -> tuple[Any, Any]:
        value, scores, statistics = objective(task, rows, given, {**fixed, **moving})
        return value, (scores, statistics)

    value, (scores, statistics), gradients = differentiate(of_parameters, {n: state[n] for n in task.trainable})
    return value, scores, statistics, gradients


def _gradient(task: Task, rows: int) -> Callable[..., Any]:
    def entry(state: Mapping[str, Any], given: Mapping[str, Any]) -> Any:
        value, scores, statistics, gradients = _differentiated(task, rows, state, given)
        return {"loss": value, "scores": scores, **{f"gradient.{n}": gradients[n] for n in task.trainable}}, statistics

    return entry


def _apply(
    task: Task, state: Mapping[str, Any], given: Mapping[str, Any], gradients: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """The optimizer's step: the penalty (reported apart), and all that it writes."""
    optimizer = task.optimizer
    assert optimizer is not None
    parameters = {n: state[n] for n in task.trainable}
    slots = {n: {k: state[slot_name(n, k)] for k in optimizer.slots(np.zeros(w.shape))} for n, w in parameters.items()}
    shared = {k: state[f"slot/{k}"] for k in optimizer.shared()}
    h = {RATE: given[RATE], **{k: given[f"hyper.{k}"] for k in optimizer.hyper()}}
    moved, new_slots, new_shared = apply_update(optimizer, parameters, gradients, slots, shared, h)
    writes = {**moved, **{slot_name(n, k): v for n, each in new_slots.items() for k, v in each.items()}}
    writes.update({f"slot/{k}": v for k, v in new_shared.items()})
    return np.add(penalty(optimizer, parameters, h), np.zeros_like(given[RATE])), writes


def _update(task: Task) -> Callable[..., Any]:
    def entry(state: Mapping[str, Any], given: Mapping[str, Any]) -> Any:
        _, writes = _apply(task, state, given, {n: given[f"gradient.{n}"] for n in task.trainable})
        return {}, writes

    return entry


def _accumulate(task: Task, rows: int) -> Callable[..., Any]:
    def entry(state: Mapping[str, Any], given: Mapping[str, Any]) -> Any:
        value, scores, statistics, gradients = _differentiated(task, rows, state, given)
        sums = {slot_name(n, "sum"): state[slot_name(n, "sum")] + gradients[n] for n in task.trainable}
        results = {"loss": value, "scores": scores, "penalty": np.zeros_like(given[DIVISOR]), **_sums(task, scores, given)}
        return results, {**statistics, **sums}

    return entry


def _step(task: Task, rows: int, *, observed: bool) -> Callable[..., Any]:
    def entry(state: Mapping[str, Any], given: Mapping[str, Any]) -> Any:
        value, scores, statistics, gradients = _differentiated(task, rows, state, given)
        assert task.optimizer is not None
        cleared = {}
        if task.optimizer.accumulate > 1:
            gradients = {n: state[slot_name(n, "sum")] + g for n, g in gradients.items()}
            cleared = {slot_name(n, "sum"): np.zeros_like(g) for n, g in gradients.items()}
        added, writes = _apply(task, state, given, gradients)
        results = {"loss": value, "scores": scores, "penalty": added, **_sums(task, scores, given)}
        if observed:
            results |= {f"norm.{n}": np.sqrt(np.sum(g * g)) for n, g in gradients.items()}
        return results, {**statistics, **writes, **cleared}

    return entry
