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
from ..sizes import bytes_of
from ..transforms import DEFAULT_BACKEND
from .compiled import Compiled, Fitted
from .data import Inputs, aligned, as_array, begun, fits_into, row_weights, same_length, weights_fit
from .epochs import Data
from .fit import EVALUATION_ROWS, Training, evaluate, evaluation_order, evaluation_sizes
from .fullbatch import FullBatch
from .history import Callback, EarlyStopping, Run, early_stopping_of
from .objective import DIVISOR, SEED, STEP, TARGET, WEIGHT, Task, batch_type, initial_slots, make_program, objective, slot_name
from .recipe import recipe
from .scope import KEPT, TAP
from .sequences import cleared, is_ragged, lengths_name, measured_by, padded, refilled
from .state import LENGTHS, Stateful, dtype_of
from .windows import BEGIN, COUNTED, Windows, truncation


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
        lengths: Any = None,
        mask: Any = None,
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
        truncate: tuple[int, int] | None = None,
        verbose: bool = True,
    ) -> Run:
        """Train by backpropagation. Called again, it goes on where it ended.

        Args:
            x: inputs, rows first; a tuple of arrays for several inputs, a dict for named ones. Sequences are (rows, time, ...), or a
                list of arrays (time, ...) of different length.
            y: targets, one row for each row of x. `cross_entropy` takes class numbers 0..C-1 or rows of probabilities.
            loss: a name, a `Loss` with options (`cr.losses.huber(2.0)`), or a function (scores, target) -> elements; None is the
                loss of the last call, at first "mse".
            optimizer: a name or an optimizer; None is the optimizer of the last call, at first `Adam()`.
            epochs: passes over the data; 0 only builds the network.
            batch_size: rows of a step; the last one may be shorter and is exact. `LBFGS` takes all rows at once.
            shuffle: take the rows of each epoch in a new order.
            validation: a fraction of the rows, chosen at random by the seed (the last rows without shuffle), or (x, y), or
                (x, y, lengths).
            lengths: (rows,), how many steps of each sequence count; what lies beyond changes nothing, and losses of single steps are
                averaged over those that count. mask: the same as (rows, time) of True, and False at the end. For several inputs a
                dict or tuple like x.
            sample_weight: (rows,), each row's weight in the loss. class_weight: class -> weight, or "balanced".
            metrics: names ("accuracy", "r2", "rmse", "mae", "auc", "log_loss") or functions (prediction, target) -> number.
            callbacks: functions of the `Run`, called after each epoch; `run.stop()` ends it.
            early_stopping: a patience in epochs, or `cr.EarlyStopping`; the best weights come back.
            seed: fixes initial weights, order, dropout; None draws one and records it in `run.seed`.
            threads: None for as many as pay, or up to 1024; results have the same bits whatever their number.
            memory: so much ("64MB", or bytes) is kept at most between forward and backward pass, over all threads, gradients of
                weights and all that a step needs to work in included; data, weights, the optimizer's slots and what is returned do
                not count. A recurrent network then keeps some states and computes the steps between them again:
                `net.compiled.plan()` says which. The gradient has the same bits as without. A budget that cannot be kept is
                refused with the least that can. What it can cut is what loops keep from step to step. Sequences that go whole from
                one layer to the next, or to a loss at each step, and their gradients are kept whole: the least budget grows by
                2 numbers (8 bytes in float32) for each step, row and unit of a layer that another recurrent one reads (3, if its
                two directions are joined), and by 3 (12 bytes) for each of a last layer with an output at each step.
            dtype: "float32" (None, at first) or "float64", fixed when the network is built.
            truncate: (k1, k2), truncated backpropagation through time, for recurrent networks with a loss at each step: along the
                sequences of a batch an update every k1 steps, whose gradient goes back k2 steps. See below.
            backend: "native", machine code, or "reference", NumPy one operator at a time.
            verbose: a progress line, if standard error is a terminal.
        Returns: a `Run` with the history.
        Raises: `DataError`, `ShapeError`, `UsageError` before anything is changed; `DivergenceError` if the loss is no longer
        finite, with the last good weights kept; `BusyError` if another thread is training this network.
        Ctrl-C ends the run after the step at hand and returns what has been learnt; `run.interrupted` says so.

        Truncation: window j makes an update of the mean loss of steps j k1 to (j + 1) k1 - 1, by the gradient through these and the
        k2 - k1 steps before them, which are taken again with the weights of the moment. The state with which that begins goes on from
        window to window as a constant, with the bits that one pass would give it (sums of layers behind the loop are ordered for the
        rows and steps of a window, and may differ from those of one pass in the last bit). Each batch begins with the layer's first
        state, so with `learn_initial` only windows that reach the beginning teach it. A window that does not fill is shorter; one in
        which no sequence has a step left makes no update. Masks of dropout last for one window. With k1 as long as the sequences
        nothing is cut, with larger k2 the gradient goes back to the beginning. Metrics of your own see windows as rows. Validation is
        of whole sequences. Refused: a loss at the last step only, of which earlier windows have nothing to learn; Bidirectional, which
        needs the future; layers that mix steps. Source: Williams & Peng, Neural Computation 2, 1990, BPTT(h; h') with h = k2, h' = k1.

        >>> import numpy as np
        >>> from chainrule import nn, optim
        >>> x = np.linspace(-1, 1, 64)[:, None]
        >>> net = nn.Sequential(nn.Dense(16, "tanh"), nn.Dense(1))
        >>> run = net.fit(x, x ** 2, epochs=100, optimizer=optim.Adam(0.01), batch_size=16)
        >>> run.loss[-1] < 0.01
        True
        """
        with Watch() as watch, self._busy("fit"):
            watch.release()
            options = _Options(epochs, batch_size, seed, threads)
            budget = _budget(memory, backend)
            shortened = truncation(truncate)
            engine = backends[backend]
            run = Run(options.seed, planned_epochs=epochs, network=self)
            chosen = losses.resolve(loss) if loss is not None else self._loss or losses.mse()
            rule = optim.resolve(optimizer) if optimizer is not None else self._optimizer or optim.Adam()
            driven = bool(getattr(rule, "driver", False))
            if driven and shortened is not None:
                raise UsageError(
                    f"{type(rule).__name__} looks at all rows for one update, so truncate= makes no sense with it: use Adam"
                )
            measures = [_metric(m, chosen) for m in ((metrics,) if isinstance(metrics, str) else metrics)]
            stopping = early_stopping_of(early_stopping)
            if callable(callbacks) or not all(callable(c) for c in _listed(callbacks)):
                raise UsageError(
                    f"callbacks is a list of functions of the run, such as [lambda run: print(run)], not {callbacks!r}"
                )
            with self._undone_if_it_fails():
                inputs = self._ready(x, options.seed, dtype, lengths, mask)
                windows = self._windows(inputs, shortened)
                inputs, judged = self._judged(_measured(inputs, windows), validation)
                data, held = self._split(
                    inputs, y, judged, chosen, validation, sample_weight, class_weight, shuffle, options.seed
                )
                slots, schedule_state = self._optimizer_state(rule)
                task = self._task(chosen, data.target, data.weight is not None, rule, inputs=inputs, metrics=measures)
                task = replace(task, memory=budget)
                rule.fits(task.dtype)
                state, judge, batch_size = {**self._state(), **slots}, None, min(batch_size, data.rows)
                if windows is not None:
                    judge = task
                    task, data = self._cut(task, data, inputs, windows, batch_size)
                    state |= _unknown(task)
                store = partial(self._store_later, places=self._places())
                training = (FullBatch if driven else Training)(
                    task, data, held, engine, epochs, batch_size, shuffle, options.seed, measures, tuple(callbacks), stopping,
                    verbose, run, self._counters, schedule_state, store, self._recorded, threads, watch, judge,
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

    # ---- windows of time -----------------------------------------------------------------------------------------------------

    def _windows(self, inputs: Inputs, shortened: tuple[int, int] | None) -> Windows | None:
        """How sequences are cut; None where they are not, or are shorter than a window.

        Raises: `UsageError` for a network that has nothing to cut, or needs more than a window of it.
        """
        if shortened is None:
            return None
        every, back = shortened
        seen = self._seen(inputs)
        if not seen.sequences:
            raise UsageError("truncate is for sequences that a recurrent layer reads (RNN, LSTM, GRU), and this network has none")
        names = seen.timed
        if not set(seen.sequences) <= set(names):
            raise UsageError(
                "truncate needs a score, and a target, for each step of the sequences: with a loss at the last step only, the windows "
                "before it have nothing to learn from, and where scores mix steps (a mean over time, Flatten), no window holds what it "
                "takes. Let recurrent layers return_sequences, or leave truncate out"
            )
        steps = {n: inputs.arrays[n].shape[1] for n in names}
        if len(set(steps.values())) > 1:
            raise UsageError(
                f"truncate cuts sequences of one length only, not of {', '.join(f'{k} ({n})' for n, k in steps.items())}"
            )
        count = steps[names[0]]
        windows = Windows(count, every, min(back, -(-count // every) * every), names)
        return windows if windows.count > 1 else None

    def _cut(self, task: Task, data: Data, inputs: Inputs, windows: Windows, rows: int) -> tuple[Task, Data]:
        """Task and data for windows instead of whole sequences. rows: of a batch."""
        if windows.uneven and task.steps is None:
            raise UsageError(
                f"truncate: {windows.steps} steps are no multiple of {windows.every}, so the last window is shorter; give lengths for "
                f"all of {', '.join(windows.inputs)}, or for none"
            )
        lengths = data.inputs[task.steps] if task.steps is not None else None
        made = windows.cut_inputs(data.inputs, task.steps)
        data = Data(made, windows.cut_target(data.target), windows.cut_weight(data.weight, lengths))
        types = {n: Type((windows.back, *t.shape[1:]), t.dtype) if n in windows.inputs else t for n, t in task.inputs.items()}
        steps = task.steps
        if COUNTED in made:
            types[COUNTED], steps = Type((), LENGTHS), COUNTED
        target = None if task.target is None else Type(data.target.shape[1:], task.target.dtype)
        task = replace(task, inputs=types, target=target, steps=steps)
        windows = replace(windows, rows=rows, kept=self._kept(task, windows, rows))
        return replace(task, windows=windows, forward=partial(self._forward, windows=windows)), data

    def _kept(self, task: Task, windows: Windows, rows: int) -> dict[str, Type]:
        """The states that go on from window to window: name -> type of one row."""
        shapes: dict[str, tuple[int, ...]] = {}
        given = {**{n: batch_type(t, rows) for n, t in task.inputs.items()}, BEGIN: Type((), np.dtype(np.int32))}
        self._watch(partial(self._forward, windows=windows), task, given, True, shapes)
        return {n: Type(shape[1:], task.dtype) for n, shape in shapes.items() if n.startswith(KEPT)}

    def _watch(
        self, forward: Any, task: Task, given: Mapping[str, Type], training: bool, shapes: dict[str, tuple[int, ...]]
    ) -> None:
        """Trace a forward pass for the shapes of what layers would give away (`Scope.tap` and `Scope.kept`)."""
        fixed = {**task.parameters, **task.statistics}

        def look(*values: Any) -> list[Any]:
            return [
                forward(
                    dict(zip(fixed, values, strict=False)), dict(zip(given, values[len(fixed) :], strict=True)), training, shapes
                )[0]
            ]

        build(look, [*fixed.values(), *given.values()], key=lambda: key_of(0))

    def _split(self, inputs: Inputs, y: Any, judged: Inputs | None, loss: Loss, validation: Any, sample_weight: Any,
               class_weight: Any, shuffle: bool, seed: int) -> tuple[Data, Data | None]:  # fmt: skip
        """Checked data for training and for validation."""
        data = self._data(inputs, y, loss, sample_weight, class_weight)
        if validation is None or (isinstance(validation, (int, float, np.number)) and validation == 0):
            return data, None
        if isinstance(validation, (int, float, np.number)):
            if not 0 < validation < 1 or inputs.rows < 2:
                raise UsageError(
                    f"validation is a fraction between 0 and 1 of at least 2 rows, or a pair (x, y), not {validation!r}"
                )
            train, held = split_rows(inputs.rows, float(validation), shuffle=shuffle, seed=seed)
            return data.take(train), data.take(held)
        if not isinstance(validation, (tuple, list)) or len(validation) not in (2, 3):
            raise UsageError("validation is a fraction of the rows, or a pair (x, y), or (x, y, lengths)")
        assert judged is not None
        even = None if data.weight is None else np.ones(judged.rows)  # the same programs serve both
        return data, self._data(judged, validation[1], loss, even)

    def _judged(self, inputs: Inputs, validation: Any) -> tuple[Inputs, Inputs | None]:
        """Inputs for training, and those for validation if they are given. One program takes both, so sequences in them are made to
        have as many steps."""
        if not isinstance(validation, (tuple, list)) or len(validation) not in (2, 3):
            return inputs, None
        return aligned(inputs, self._inputs(validation[0], *validation[2:]), self._built["sequences"])

    def _data(self, inputs: Inputs, y: Any, loss: Loss, sample_weight: Any = None, class_weight: Any = None) -> Data:
        """Rows with their targets and weights. Where each step has a loss, a row weighs as much as its steps together."""
        target = self._target(inputs, y, loss)
        weight = row_weights(inputs.rows, sample_weight, class_weight, target, loss.is_classification)
        steps = self._steps(inputs)
        if steps is not None:
            weight = (np.ones(inputs.rows) if weight is None else weight) * inputs.lengths[steps]
        if weight is not None:
            weights_fit(weight, self._built["dtype"])
        return Data(inputs.all, target, weight)

    def _target(self, inputs: Inputs, y: Any, loss: Loss) -> Array:
        if y is None:
            raise DataError(f"the loss {loss.name} needs a target y")
        steps = self._steps(inputs)
        y, own = padded(y, "y") if is_ragged(y) else (y, None)
        if own is not None and (steps is None or not np.array_equal(own, inputs.lengths[steps])):
            reason = "its sequences have not the lengths of those of x" if steps else "the outputs of this network do not"
            raise DataError(f"the rows of y differ in length, but {reason}")
        given = as_array(y, "y")
        if given.ndim == 0:
            raise DataError("y is a single number; it needs one target for each row of x")
        same_length({**inputs.arrays, "y": given})
        outputs = self._seen(inputs).outputs
        if steps is not None and given.ndim > 1:
            given = y = refilled(given, inputs.lengths[steps], outputs[0])
        target = loss.check_target(y if given.dtype != object else given, outputs)
        fits_into(target, self._built["dtype"], "y")
        return target

    # ---- using ---------------------------------------------------------------------------------------------------------------

    def predict(self, x: Any, *, lengths: Any = None, mask: Any = None, backend: str = DEFAULT_BACKEND) -> Array:
        """Raw outputs (scores) for each row of x, in evaluation mode: (rows, *outputs).

        lengths, mask: as in `fit`; outputs of steps beyond a sequence's end are 0. No rows give no outputs, (0, *outputs), and
        sequences without a step the outputs of length 0.
        Raises: `NotBuiltError` before the first fit; `ShapeError` for rows of another shape. Sequences that recurrent layers read may
        have any number of steps.
        """
        self._require_built("predict")
        given = self._inputs(x, lengths, mask, empty=None)
        inputs = begun(given, self._built["sequences"])
        scores, steps = self._predicted(inputs, backend), self._steps(inputs)
        if steps is None:
            return scores
        timed = next(n for n in self._seen(inputs).stepwise if n in measured_by(steps))
        return cleared(scores, inputs.lengths[steps])[:, : given.arrays[timed].shape[1]]

    def _predicted(self, inputs: Inputs, backend: str) -> Array:
        """What the network makes of each row, in their order."""
        if not inputs.rows:
            entry = self._forward_program(1, inputs).entries["forward"]
            of_one = entry.graph.outputs[entry.results.index("scores")].type
            return np.empty((0, *of_one.shape[1:]), of_one.dtype)
        sizes = step_sizes(inputs.rows, EVALUATION_ROWS)
        programs = {n: self._forward_program(n, inputs) for n in dict.fromkeys(sizes)}
        session = backends[backend].session(programs, self._state())
        order = evaluation_order(inputs.rows, inputs.all, programs.values())
        taken = session.run(Steps(["forward"] * len(sizes), inputs.all, order, sizes, {}, ("scores",)))
        if taken.interrupted:
            raise KeyboardInterrupt
        scores = np.empty_like(taken.results["scores"])
        scores[order] = taken.results["scores"]
        return scores

    def predict_proba(self, x: Any, *, lengths: Any = None, mask: Any = None) -> Array:
        """Probabilities by the output link of the last loss: (rows, classes); for one sigmoid output two columns, [1 - p, p].

        Raises: `UsageError` if the network was not trained as a classifier.
        """
        loss = self._loss
        if loss is None or not loss.is_classification or loss.link == "identity":
            raise UsageError(
                "predict_proba: the last loss gives no probabilities; train with cross_entropy or binary_cross_entropy"
            )
        p = loss.apply_link(self.predict(x, lengths=lengths, mask=mask))
        return np.concatenate([1 - p, p], axis=1) if p.ndim == 2 and p.shape[1] == 1 and loss.link == "sigmoid" else p

    def evaluate(self, x: Any, y: Any, *, lengths: Any = None, mask: Any = None, loss: Any = None, metrics: Sequence[Any] = (),
                 sample_weight: Any = None, backend: str = DEFAULT_BACKEND) -> dict[str, float]:  # fmt: skip
        """Loss and metrics over all rows: {"loss": ..., "accuracy": ...}. loss None: that of the last fit. lengths, mask: as in `fit`;
        only the steps that they count are judged."""
        self._require_built("evaluate")
        chosen = self._known_loss(loss, "evaluate")
        inputs = self._inputs(x, lengths, mask, empty=NO_MEAN)
        data = self._data(inputs, y, chosen, sample_weight)
        measures = [_metric(m, chosen) for m in ((metrics,) if isinstance(metrics, str) else metrics)]
        task = self._task(chosen, data.target, data.weight is not None, inputs=inputs, metrics=measures)
        programs = {n: self._recorded(task, n, ("evaluate",)) for n in evaluation_sizes(data.rows)}
        value, measured = evaluate(programs.values(), backends[backend].session(programs, self._state()), data, measures, task)
        return {"loss": value, **measured}

    def _known_loss(self, loss: Any, what: str) -> Loss:
        if loss is None and self._loss is None:
            raise UsageError(f'{what}: this network has not been trained, so name the loss: loss="mse"')
        return losses.resolve(loss) if loss is not None else self._loss  # type: ignore[return-value]  # one of the two is there

    def gradients(self, x: Any, y: Any, *, lengths: Any = None, mask: Any = None, loss: Any = None, training: bool = True,
                  seed: int = 0, dtype: Any = None, backend: str | None = None, memory: str | int | None = None,
                  truncate: tuple[int, int] | None = None, through_time: bool = False) -> dict[str, Array]:  # fmt: skip
        """The gradient of the mean loss over these rows by every trainable parameter: full name -> array.

        Args: lengths, mask: as in `fit`; loss None: that of the last fit; training: with batch statistics and the dropout of `seed`
        (running statistics stay untouched), else in evaluation mode; dtype: "float64" for another precision than the network's;
        memory: as in `fit`: it cuts what loops keep from step to step, not the sequences between layers or to a loss at each step, with
        which the least budget grows: 8 and 12 bytes in float32 for each step, row and unit.
        truncate: (k1, k2) as in `fit`: the sum of what all windows would learn from, all with these weights.
        through_time: instead, how much gradient reaches each time step of each recurrent layer: the norm of ∂L/∂h_t over all rows and
        units, (T,), for each array of the state, such as "0.hidden" and "0.cell" of an LSTM. h_t is the state that step t leaves, and
        all that depends on it counts, later steps too. A norm that falls towards the beginning shows a gradient that vanishes, one
        that grows towards it a gradient that explodes. inf: the gradient has become larger than its precision holds; nan: further back,
        such numbers have met each other or a 0. dtype="float64" sees further.

        >>> import numpy as np
        >>> from chainrule import nn
        >>> net = nn.Sequential(nn.RNN(8), nn.Dense(1))
        >>> x, y = np.ones((4, 20, 2)), np.ones((4, 1))
        >>> _ = net.fit(x, y, epochs=0)
        >>> norms = net.gradients(x, y, loss="mse", through_time=True)["0.hidden"]
        >>> norms.shape, bool(norms[0] < norms[-1])
        ((20,), True)
        """
        budget = _budget(memory, backend or DEFAULT_BACKEND)
        chosen = self._known_loss(loss, "gradients")
        shortened = truncation(truncate)
        inputs = self._ready(x, seed, None, lengths, mask, empty=NO_MEAN)
        windows = self._windows(inputs, shortened)
        inputs = _measured(inputs, windows)
        data = self._data(inputs, y, chosen)
        task = self._task(
            chosen, data.target, data.weight is not None, dtype=None if dtype is None else dtype_of(dtype), inputs=inputs
        )
        task = replace(task, memory=budget)
        if windows is not None:
            task, data = self._cut(task, data, inputs, windows, inputs.rows)
            windows = task.windows
        forward = partial(self._forward, windows=windows)
        state = {n: np.asarray(v, task.dtype) for n, v in self._state().items()} | _unknown(task)
        if through_time:
            task, taps = self._tapped(task, inputs.rows, forward, training)
            state |= taps
        elif not training:
            task = replace(task, forward=lambda state, given, _: forward(state, given, False))
        program = make_program(task, inputs.rows, ("gradient",))
        session = backends[backend or DEFAULT_BACKEND].session({inputs.rows: program}, state)
        numbers = {DIVISOR: np.asarray(data.total(np.arange(data.rows))), SEED: key_of(seed)}
        parts = []
        for step, begin in enumerate(windows.begins() if windows is not None else [-1]):
            rows = data.arrays() if windows is None else {n: a[step :: windows.count] for n, a in data.arrays().items()}
            at = {STEP: np.asarray(step)} if windows is None else {STEP: np.asarray(step), BEGIN: np.asarray(begin)}
            results = session.call(inputs.rows, "gradient", {**rows, **numbers, **at})
            parts.append({n.removeprefix("gradient."): v for n, v in results.items() if n.startswith("gradient.")})
        if through_time:
            return {n.removeprefix(TAP): _norms(_over_time([p[n] for p in parts], windows)) for n in parts[0]}
        return {n: _over_time([p[n] for p in parts], None) for n in parts[0]}

    def _tapped(self, task: Task, rows: int, of: Any, training: bool) -> tuple[Task, dict[str, Array]]:
        """The task with zeros added to the states of recurrent layers, by which it is differentiated in place of the parameters. of: the
        forward pass."""
        shapes: dict[str, tuple[int, ...]] = {}

        def forward(
            state: Mapping[str, Any], given: Mapping[str, Any], _: bool, watched: Any = None
        ) -> tuple[Any, dict[str, Any]]:
            result: tuple[Any, dict[str, Any]] = of(state, given, training, watched)
            return result

        self._watch(forward, task, {n: batch_type(t, rows) for n, t in task.inputs.items()}, training, shapes)
        if not shapes:
            raise UsageError("through_time: this network has no recurrent layer")
        taps = {n: np.zeros(shape, task.dtype) for n, shape in shapes.items()}
        parameters = {**task.parameters, **{n: Type(v.shape, v.dtype) for n, v in taps.items()}}
        return replace(task, forward=forward, parameters=parameters, trainable=tuple(taps)), taps

    def check_gradients(
        self, x: Any, y: Any, *, lengths: Any = None, mask: Any = None, loss: Any = None, seed: int = 0, tolerance: float = 1e-6,
        most: int = 50,
    ) -> GradientReport:  # fmt: skip
        """Compare every gradient of this network with central differences in float64, in training and in evaluation mode.

        Args: x, y a few rows (the cost is two forward passes for each element checked); lengths, mask: as in `fit`; most: elements
        checked of each parameter.
        Returns: a report to print. Raises: `GradientMismatch` if a gradient is wrong.
        """
        reports = []
        for training in (True, False):
            o = self._explained(x, y, loss, seed=seed, training=training, dtype="float64", lengths=lengths, mask=mask)
            graph = Graph(o.graph.inputs, o.graph.outputs[:1], o.graph.captures)
            label = "training" if training else "evaluation"
            names = [f"{o.names[i]} ({label})" for i in o.wrt]
            reports.append(check_graph(graph, list(o.values), o.wrt, names, tolerance=tolerance, most=most, seed=seed))
        return GradientReport([c for r in reports for c in r.comparisons], tolerance)

    def _explained(
        self, x: Any, y: Any, loss: Any = None, *, seed: int = 0, training: bool = True, dtype: Any = None, lengths: Any = None,
        mask: Any = None,
    ) -> Objective:  # fmt: skip
        """The objective as a graph: outputs [objective, scores], inputs named, with their values."""
        chosen = self._known_loss(loss, "explain")
        inputs = self._ready(x, seed, None, lengths, mask, empty=NO_MEAN)
        data = self._data(inputs, y, chosen)
        task = self._task(
            chosen, data.target, data.weight is not None, dtype=None if dtype is None else dtype_of(dtype), inputs=inputs
        )
        rows = inputs.rows
        state = self._state()
        target_type = data.target.dtype if data.target.dtype.kind == "i" else task.dtype
        given: dict[str, Array] = {n: np.asarray(a, task.inputs[n].dtype) for n, a in inputs.all.items()}
        given |= {WEIGHT: np.asarray(data.weight, task.dtype)} if data.weight is not None else {}
        given |= {TARGET: np.asarray(data.target, target_type), SEED: key_of(seed), STEP: np.asarray(0, np.uint32)}
        given[DIVISOR] = np.asarray(data.total(np.arange(rows)), task.dtype)
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


def _measured(inputs: Inputs, windows: Windows | None) -> Inputs:
    """The same; with lengths, if the last window is shorter and there are none."""
    if windows is None or not windows.uneven or any(set(measured_by(n)) & set(windows.inputs) for n in inputs.lengths):
        return inputs
    lengths = {**inputs.lengths, lengths_name(windows.inputs): np.full(inputs.rows, windows.steps, np.int64)}
    return replace(inputs, lengths=lengths)


def _unknown(task: Task) -> dict[str, Array]:
    """What goes on from window to window, before the first."""
    windows = task.windows
    return {n: np.zeros((windows.rows, *t.shape), t.dtype) for n, t in windows.kept.items()} if windows is not None else {}


@np.errstate(over="ignore", invalid="ignore")
def _over_time(parts: Sequence[Array], windows: Windows | None) -> Array:
    """The sum of gradients. windows: if they are by the steps of windows, (k2, ...), each is put where its steps are: (T, ...)."""
    if windows is None:
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total
    ahead = np.zeros((windows.before + windows.count * windows.every, *parts[0].shape[1:]), parts[0].dtype)
    for j, part in enumerate(parts):
        ahead[j * windows.every :][: windows.back] += part
    return ahead[windows.before :][: windows.steps]


def _norms(gradient: Array) -> Array:
    """√(Σ g²) over all but the first axis, the time: at each time in units of the power of two next to its largest number, so that no
    square overflows, or vanishes, where the norm does not. What has overflowed before is no news: inf and nan stay what they are."""
    wide = gradient.astype(np.float64).reshape(len(gradient), -1)
    _, exponents = np.frexp(np.max(np.abs(wide), axis=1))
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        shares = np.ldexp(wide, -exponents[:, None])
        return np.asarray(np.ldexp(np.sqrt(np.sum(shares * shares, axis=1)), exponents))


NO_MEAN = "there is nothing to take the mean over"  # why a loss of no numbers is refused
MOST_THREADS = 1024  # of a run: each takes memory of its own, whether there is a processor for it or not


def _budget(memory: Any, backend: str) -> int | None:
    if memory is not None and backend != "native":
        raise UsageError(f'memory= is kept by the backend "native"; "{backend}" keeps what it needs, so leave it out')
    return None if memory is None else bytes_of(memory)


@record(frozen=True)
class _Options:
    """Run options, checked before anything is changed."""

    epochs: int
    batch_size: int
    seed_given: int | None
    threads: int | None

    def __post_init__(self) -> None:
        whole = (("epochs", self.epochs, 0), ("batch_size", self.batch_size, 1), ("threads", self.threads, 1))
        for name, value, least in whole:
            if value is None and name == "threads":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
                raise UsageError(f"{name} is a whole number of at least {least}, not {value!r}")
        if self.threads is not None and self.threads > MOST_THREADS:
            raise UsageError(f"threads is at most {MOST_THREADS}, not {self.threads}; None takes as many as pay")
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
