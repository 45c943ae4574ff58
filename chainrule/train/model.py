"""What every network can do: learn, predict, be judged, show its gradients.

In: a subclass that says how scores come from inputs (`nn.Module`). Out: `fit`, `predict`, `evaluate`, `gradients`, ...
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from .. import losses, metrics, optim
from ..errors import DataError, UsageError
from ..gradcheck import GradientReport, check_graph
from ..graph.node import Array, Graph, Type
from ..graph.trace import build
from ..losses import Loss
from ..ops.random import fold_in, key_of
from ..optim import Optimizer
from ..program import Program
from ..records import record
from ..run.backend import Steps, backends
from ..run.batches import split_rows, step_sizes
from ..run.interrupt import Watch
from ..transforms import DEFAULT_BACKEND
from .compiled import Compiled, Fitted
from .data import Inputs, as_array, fits_into, row_weights, same_length
from .epochs import Data
from .fit import EVALUATION_ROWS, Training, evaluate, evaluation_sizes
from .fullbatch import FullBatch
from .history import Callback, EarlyStopping, Run, early_stopping_of
from .objective import DIVISOR, SEED, STEP, TARGET, Task, initial_slots, make_program, objective, slot_name
from .recipe import recipe
from .state import Stateful, dtype_of


@record(frozen=True)
class Objective:
    """The objective of a network on given data, as a graph with everything needed to read and to evaluate it."""

    graph: Graph
    names: list[str]
    values: list[Array]
    wrt: list[int]
    layers: dict[str, str]


class Model(Stateful):
    """The part of a network that is the same for all."""

    # ---- learning ------------------------------------------------------------------------------------------------------------

    def fit(
        self,
        x: Any,
        y: Any,
        *,
        loss: str | Loss | Callable[[Any, Any], Any] | None = None,
        optimizer: str | Optimizer | None = None,
        epochs: int = 20,
        batch_size: int = 32,
        shuffle: bool = True,
        validation: float | tuple[Any, Any] | None = None,
        sample_weight: Any = None,
        class_weight: Mapping[Any, float] | str | None = None,
        metrics: Sequence[Any] = (),
        callbacks: Sequence[Callback] = (),
        early_stopping: EarlyStopping | int | bool | None = None,
        seed: int | None = 0,
        threads: int | None = None,
        dtype: str | None = None,
        backend: str = DEFAULT_BACKEND,
        memory: str | int | None = None,
        verbose: bool = True,
    ) -> Run:
        """Train by backpropagation. Called again, it goes on where it ended.

        Args:
            x: inputs, rows first; a tuple of arrays for several inputs, a dict for named ones.
            y: targets, one row for each row of x. `cross_entropy` takes class numbers 0..C-1 or rows of probabilities.
            loss: a name, a `Loss` with options (`cr.losses.huber(2.0)`), or a function (scores, target) -> elements; None is the
                loss of the last call, at first "mse".
            optimizer: a name or an optimizer; None is the optimizer of the last call, at first `Adam()`.
            epochs: passes over the data; 0 only builds the network.
            batch_size: rows of a step; the last one may be shorter and is exact. `LBFGS` takes all rows at once.
            shuffle: take the rows of each epoch in a new order.
            validation: a fraction of the rows, chosen at random by the seed (the last rows without shuffle), or (x, y).
            sample_weight: (rows,), each row's weight in the loss. class_weight: class -> weight, or "balanced".
            metrics: names ("accuracy", "r2", "rmse", "mae", "auc", "log_loss") or functions (prediction, target) -> number.
            callbacks: functions of the `Run`, called after each epoch; `run.stop()` ends it.
            early_stopping: a patience in epochs, or `cr.EarlyStopping`; the best weights come back.
            seed: fixes initial weights, order, dropout; None draws one and records it in `run.seed`.
            threads: None for as many as pay; results have the same bits whatever their number. memory: not yet of use.
            dtype: "float32" (None, at first) or "float64", fixed when the network is built.
            backend: "native", machine code, or "reference", NumPy one operator at a time.
            verbose: a progress line, if standard error is a terminal.
        Returns: a `Run` with the history.
        Raises: `DataError`, `ShapeError`, `UsageError` before anything is changed; `DivergenceError` if the loss is no longer
        finite, with the last good weights kept; `BusyError` if another thread is training this network.
        Ctrl-C ends the run after the step at hand and returns what has been learnt; `run.interrupted` says so.

        >>> import numpy as np
        >>> from chainrule import nn, optim
        >>> x = np.linspace(-1, 1, 64)[:, None]
        >>> net = nn.Sequential(nn.Dense(16, "tanh"), nn.Dense(1))
        >>> run = net.fit(x, x ** 2, epochs=100, optimizer=optim.Adam(0.01), batch_size=16)
        >>> run.loss[-1] < 0.01
        True
        """
        with self._busy("fit"), Watch() as watch:
            options = _Options(epochs, batch_size, seed, threads, memory)
            engine = backends[backend]
            run = Run(options.seed, planned_epochs=epochs, network=self)
            chosen = losses.resolve(loss) if loss is not None else self._loss or losses.mse()
            rule = optim.resolve(optimizer) if optimizer is not None else self._optimizer or optim.Adam()
            measures = [_metric(m, chosen) for m in ((metrics,) if isinstance(metrics, str) else metrics)]
            stopping = early_stopping_of(early_stopping)
            if callable(callbacks) or not all(callable(c) for c in _listed(callbacks)):
                raise UsageError(
                    f"callbacks is a list of functions of the run, such as [lambda run: print(run)], not {callbacks!r}"
                )
            with self._undone_if_it_fails():
                inputs = self._ready(x, options.seed, dtype)
                data, held = self._split(inputs, y, chosen, validation, sample_weight, class_weight, shuffle, options.seed)
                slots, schedule_state = self._optimizer_state(rule)
                task = self._task(chosen, data.target, data.weight is not None, rule, metrics=measures)
                state = {**self._state(), **slots}
                store = partial(self._store_later, places=self._places())
                training = (FullBatch if getattr(rule, "driver", False) else Training)(
                    task, data, held, engine, epochs, min(batch_size, data.rows), shuffle, options.seed, measures,
                    tuple(callbacks), stopping, verbose, run, self._counters, schedule_state, store, self._recorded, threads, watch,
                )  # fmt: skip
                if epochs:
                    training.prepare(state)
            self._loss, self._optimizer, self._slots, self._schedule_state = chosen, rule, slots, schedule_state
            if epochs:
                self._fitted = Fitted.of(training)
                training(state)
            return run

    def _recorded(self, task: Task, rows: int, entries: tuple[str, ...]) -> Program:
        """The program of this task for batches of `rows` rows: what was recorded before, if it is sure to be the same."""
        depends = recipe(self, task)
        if depends is None:
            return make_program(task, rows, entries)
        return self._kept_program((depends, rows, entries), lambda: make_program(task, rows, entries))

    def _optimizer_state(self, rule: Optimizer) -> tuple[dict[str, Array], dict[str, float]]:
        """Slots and schedule state to start with. What the last optimizer kept goes on if it is of the same kind, parameter by
        parameter; a different optimizer starts anew."""
        before = self._optimizer
        same = before is not None and type(before) is type(rule)
        parameters = self._arrays("parameter")
        moving = {n: parameters[n] for n in self._trainable()}
        if getattr(rule, "driver", False):
            size = sum(w.size for w in moving.values())
            pairs = self._slots.get("slot/s")
            slots = dict(self._slots) if same and pairs is not None and pairs.shape[1] == size else {}
        else:
            fresh = initial_slots(rule, moving, self._built["dtype"])
            kept = self._slots if same else {}
            sums = (
                {slot_name(n, "sum") for n in moving} if rule.accumulate > 1 else set()
            )  # of a group that was interrupted: begun anew
            slots = {n: kept[n] if n in kept and kept[n].shape == v.shape and n not in sums else v for n, v in fresh.items()}
        goes_on = same and before is not None and before.schedule == rule.schedule and self._schedule_state
        return slots, dict(self._schedule_state) if goes_on else rule.schedule.start()

    def _split(self, inputs: Inputs, y: Any, loss: Loss, validation: Any, sample_weight: Any, class_weight: Any, shuffle: bool,
               seed: int) -> tuple[Data, Data | None]:  # fmt: skip
        """Checked data for training and for validation."""
        target = self._target(inputs, y, loss)
        weight = row_weights(inputs.rows, sample_weight, class_weight, target, loss.is_classification)
        data = Data(inputs.arrays, target, weight)
        if validation is None or (isinstance(validation, (int, float, np.number)) and validation == 0):
            return data, None
        if isinstance(validation, (int, float, np.number)):
            if not 0 < validation < 1 or inputs.rows < 2:
                raise UsageError(
                    f"validation is a fraction between 0 and 1 of at least 2 rows, or a pair (x, y), not {validation!r}"
                )
            train, held = split_rows(inputs.rows, float(validation), shuffle=shuffle, seed=seed)
            return data.take(train), data.take(held)
        if not isinstance(validation, (tuple, list)) or len(validation) != 2:
            raise UsageError("validation is a fraction of the rows, or a pair (x, y)")
        other = self._inputs(validation[0])
        even = None if weight is None else np.ones(other.rows)  # the same programs serve both
        return data, Data(other.arrays, self._target(other, validation[1], loss), even)

    def _target(self, inputs: Inputs, y: Any, loss: Loss) -> Array:
        if y is None:
            raise DataError(f"the loss {loss.name} needs a target y")
        given = as_array(y, "y")
        if given.ndim == 0:
            raise DataError("y is a single number; it needs one target for each row of x")
        same_length({**inputs.arrays, "y": given})
        target = loss.check_target(y if given.dtype != object else given, self._built["outputs"])
        fits_into(target, self._built["dtype"], "y")
        return target

    # ---- using ---------------------------------------------------------------------------------------------------------------

    def predict(self, x: Any, *, backend: str = DEFAULT_BACKEND) -> Array:
        """Raw outputs (scores) for each row of x, in evaluation mode: (rows, *outputs).

        Raises: `NotBuiltError` before the first fit; `ShapeError` for rows of another shape.
        """
        self._require_built("predict")
        inputs = self._inputs(x)
        sizes = step_sizes(inputs.rows, EVALUATION_ROWS)
        programs = {n: self._forward_program(n) for n in dict.fromkeys(sizes)}
        session = backends[backend].session(programs, self._state())
        taken = session.run(Steps(["forward"] * len(sizes), inputs.arrays, np.arange(inputs.rows), sizes, {}, ("scores",)))
        if taken.interrupted:
            raise KeyboardInterrupt
        return taken.results["scores"]

    def predict_proba(self, x: Any) -> Array:
        """Probabilities by the output link of the last loss: (rows, classes); for one sigmoid output two columns, [1 - p, p].

        Raises: `UsageError` if the network was not trained as a classifier.
        """
        loss = self._loss
        if loss is None or not loss.is_classification or loss.link == "identity":
            raise UsageError(
                "predict_proba: the last loss gives no probabilities; train with cross_entropy or binary_cross_entropy"
            )
        p = loss.apply_link(self.predict(x))
        return np.concatenate([1 - p, p], axis=1) if p.ndim == 2 and p.shape[1] == 1 and loss.link == "sigmoid" else p

    def evaluate(self, x: Any, y: Any, *, loss: Any = None, metrics: Sequence[Any] = (), sample_weight: Any = None,
                 backend: str = DEFAULT_BACKEND) -> dict[str, float]:  # fmt: skip
        """Loss and metrics over all rows: {"loss": ..., "accuracy": ...}. loss None: that of the last fit."""
        self._require_built("evaluate")
        chosen = self._known_loss(loss, "evaluate")
        inputs = self._inputs(x)
        target = self._target(inputs, y, chosen)
        data = Data(inputs.arrays, target, row_weights(inputs.rows, sample_weight, None, target, chosen.is_classification))
        measures = [_metric(m, chosen) for m in ((metrics,) if isinstance(metrics, str) else metrics)]
        task = self._task(chosen, target, data.weight is not None, metrics=measures)
        programs = {n: self._recorded(task, n, ("evaluate",)) for n in evaluation_sizes(data.rows)}
        value, measured = evaluate(backends[backend].session(programs, self._state()), data, measures, task)
        return {"loss": value, **measured}

    def _known_loss(self, loss: Any, what: str) -> Loss:
        if loss is None and self._loss is None:
            raise UsageError(f'{what}: this network has not been trained, so name the loss: loss="mse"')
        return losses.resolve(loss) if loss is not None else self._loss  # type: ignore[return-value]  # one of the two is there

    def gradients(self, x: Any, y: Any, *, loss: Any = None, training: bool = True, seed: int = 0, dtype: Any = None,
                  backend: str | None = None, memory: str | int | None = None) -> dict[str, Array]:  # fmt: skip
        """The gradient of the mean loss over these rows by every trainable parameter: full name -> array.

        Args: loss None: that of the last fit; training: with batch statistics and the dropout of `seed` (running statistics stay
        untouched), else in evaluation mode; dtype: "float64" for another precision than the network's.
        """
        if memory is not None:
            raise UsageError(_NO_MEMORY)
        o = self._objective(x, y, loss, training=training, seed=seed, dtype=dtype, backend=backend or DEFAULT_BACKEND)
        return {n.removeprefix("gradient."): v for n, v in o.items() if n.startswith("gradient.")}

    def _objective(self, x: Any, y: Any, loss: Any, *, training: bool, seed: int, dtype: Any, backend: str) -> dict[str, Array]:
        chosen = self._known_loss(loss, "gradients")
        inputs = self._ready(x, seed, None)
        target = self._target(inputs, y, chosen)
        task = self._task(chosen, target, dtype=None if dtype is None else dtype_of(dtype))
        if not training:
            task = replace(task, forward=lambda state, given, _: self._forward(state, given, False))
        program = make_program(task, inputs.rows, ("gradient",))
        state = {n: np.asarray(v, task.dtype) for n, v in self._state().items()}
        session = backends[backend].session({inputs.rows: program}, state)
        numbers = {DIVISOR: np.asarray(inputs.rows), SEED: key_of(seed), STEP: np.asarray(0)}
        return session.call(inputs.rows, "gradient", {**inputs.arrays, TARGET: target, **numbers})

    def check_gradients(
        self, x: Any, y: Any, *, loss: Any = None, seed: int = 0, tolerance: float = 1e-6, most: int = 50
    ) -> GradientReport:
        """Compare every gradient of this network with central differences in float64, in training and in evaluation mode.

        Args: x, y a few rows (the cost is two forward passes for each element checked); most: elements checked of each parameter.
        Returns: a report to print. Raises: `GradientMismatch` if a gradient is wrong.
        """
        reports = []
        for training in (True, False):
            o = self._explained(x, y, loss, seed=seed, training=training, dtype="float64")
            graph = Graph(o.graph.inputs, o.graph.outputs[:1], o.graph.captures)
            label = "training" if training else "evaluation"
            names = [f"{o.names[i]} ({label})" for i in o.wrt]
            reports.append(check_graph(graph, list(o.values), o.wrt, names, tolerance=tolerance, most=most, seed=seed))
        return GradientReport([c for r in reports for c in r.comparisons], tolerance)

    def _explained(
        self, x: Any, y: Any, loss: Any = None, *, seed: int = 0, training: bool = True, dtype: Any = None
    ) -> Objective:
        """The objective as a graph: outputs [objective, scores], inputs named, with their values."""
        chosen = self._known_loss(loss, "explain")
        inputs = self._ready(x, seed, None)
        target = self._target(inputs, y, chosen)
        task = self._task(chosen, target, dtype=None if dtype is None else dtype_of(dtype))
        rows = inputs.rows
        state = self._state()
        target_type = target.dtype if target.dtype.kind == "i" else task.dtype
        given: dict[str, Array] = {n: np.asarray(a, task.inputs[n].dtype) for n, a in inputs.arrays.items()}
        given |= {TARGET: np.asarray(target, target_type), DIVISOR: np.asarray(rows, task.dtype), SEED: key_of(seed)}
        given[STEP] = np.asarray(0, np.uint32)
        names = [*state, *given]
        values = [*(np.asarray(v, task.dtype) for v in state.values()), *given.values()]
        at: dict[str, Any] = {}

        def flat(*tracers: Any) -> list[Any]:
            at.update(zip(given, tracers[len(state) :], strict=True))
            value, scores, _ = objective(task, rows, at, dict(zip(state, tracers, strict=False)), training)
            return [value, scores]

        graph = build(flat, [Type(v.shape, v.dtype) for v in values], key=lambda: fold_in(at[SEED], at[STEP]))
        trainable = self._trainable()
        layers = {path: repr(layer) for path, layer in self._layers().items() if path}
        return Objective(graph, names, values, [i for i, n in enumerate(state) if n in trainable], layers)

    # ---- looking -------------------------------------------------------------------------------------------------------------

    @property
    def compiled(self) -> Compiled:
        """The machine code of the last fit's training step: `net.compiled.text(stage)` shows how it came to be, from the graph to the
        assembly, and `net.compiled.cost()` what each kernel of it costs."""
        return Compiled(self)

    def summary(self) -> str:
        """A table of layers: name, kind, parameters. Printed by `print(net.summary())`."""
        rows = [("layer", "kind", "parameters", "shapes")]
        total = frozen_total = 0
        frozen = self._frozen_paths()
        for path, layer in self._layers().items():
            count = sum(v.size for n, v in layer._values.items() if layer._kinds[n] == "parameter")
            total += count
            frozen_total += count if frozen(path) else 0
            shapes = ", ".join(f"{n} {tuple(v.shape)}" for n, v in layer._values.items())
            if path or layer._values:
                rows.append(
                    (
                        path or "(network)",
                        repr(layer).replace("\n", " ")[:50],
                        f"{count:,}" + (" frozen" if frozen(path) and count else ""),
                        shapes,
                    )
                )
        widths = [max(len(r[i]) for r in rows) for i in range(4)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        inputs = ", ".join(f"{n} {tuple(t.shape)} {t.dtype}" for n, t in self._built.get("inputs", {}).items()) or "not built yet"
        lines.append(
            f"{total:,} parameters, {frozen_total:,} of them frozen; a row of input: {inputs}; of output: {self._built.get('outputs', '-')}"
        )
        return "\n".join(lines)


_NO_MEMORY = "memory= bounds recurrent networks on a compiled backend; the reference backend keeps what it needs, so leave it out"


@record(frozen=True)
class _Options:
    """Run options, checked before anything is changed."""

    epochs: int
    batch_size: int
    seed_given: int | None
    threads: int | None
    memory: Any

    def __post_init__(self) -> None:
        whole = (("epochs", self.epochs, 0), ("batch_size", self.batch_size, 1), ("threads", self.threads, 1))
        for name, value, least in whole:
            if value is None and name == "threads":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
                raise UsageError(f"{name} is a whole number of at least {least}, not {value!r}")
        if self.memory is not None:
            raise UsageError(_NO_MEMORY)
        seed = secrets.randbits(32) if self.seed_given is None else self.seed_given
        key_of(seed)
        object.__setattr__(self, "seed_given", int(seed))

    @property
    def seed(self) -> int:
        assert self.seed_given is not None
        return self.seed_given


def _listed(things: Any) -> list[Any]:
    try:
        return list(things)
    except TypeError:
        return [None]


def _metric(thing: Any, loss: Loss) -> metrics.Metric:
    metric = metrics.resolve(thing)
    metric.check(loss)
    return metric
