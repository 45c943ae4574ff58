"""The training loop: epochs of steps on a backend, validation, early stopping, and what happens when things go wrong.

In: a `Task` with data. Out: a new state, and the history in a `Run`. The steps of an epoch are one call of the backend; where nobody
looks at a run between its epochs, so are those of as many epochs as take a moment together.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..errors import DivergenceError, UsageError
from ..graph.interpret import first_not_finite
from ..graph.node import Array
from ..metrics import Metric
from ..program import Program
from ..registry import nearest
from ..run.backend import Backend, Kept, Session, Steps, Taken, finite
from ..run.batches import by_length, step_sizes
from ..run.interrupt import Watch
from .epochs import Behind, Data, Epochs, Pace, lasting, order_counts, rows_are_free
from .history import Callback, EarlyStopping, Run
from .objective import DIVISOR, REST, Task, make_program, sums_name
from .progress import Progress
from .sequences import counted, steps_of_rows

EVALUATION_ROWS = 512  # rows that are evaluated at once; it changes nothing but rounding
MOST_STEPS, MOST_ROWS = 2**18, 2**21  # of one call, if it takes several epochs: some tens of MB of numbers and results


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
    save: Callable[[Kept], None]
    record_program: Callable[[Task, int, tuple[str, ...]], Program] = make_program
    threads: int | None = None
    watch: Watch = field(default_factory=Watch)
    judge: Task | None = None  # for validation on whole sequences, where `task` is for windows of them
    _programs: dict[tuple[int, tuple[str, ...]], Program] = field(default_factory=dict)
    _judging: dict[int, Program] = field(default_factory=dict)
    _best: dict[str, Any] = field(default_factory=dict)
    _ready: Session | None = None
    _plan: Epochs = field(init=False)
    _due: Callable[[], None] | None = None  # what belongs together and is being kept

    def prepare(self, state: Mapping[str, Array]) -> None:
        """Record all programs and check all names, before anything is changed."""
        self._ready = self._session(state)
        if self.judge is not None and self.validation is not None:
            self._judging = self._judges(self.judge, self.validation)
        if self.early_stopping is not None:
            self._sign(self.early_stopping.monitor or "loss")

    def __call__(self, state: Mapping[str, Array]) -> None:
        """Train from this state, inside the context `watch`; `save` receives the state after each call of the backend, whatever
        happens."""
        started = time.perf_counter()
        session = self._session(state) if self._ready is None else self._ready
        self._ready, good = None, Kept(state)
        progress = Progress(self.run, self.epochs, self.verbose)
        try:
            self._plan = self._planned()
            pace = Pace(self._most())
            while self.run.epochs < self.epochs:
                self.watch.look()
                good = self._advance(session, good, progress, pace)
                self.run.seconds = time.perf_counter() - started
                progress.epoch()
                self.call_back()
                if self.worse_for_long(good) or self.run.stopped:
                    break
            self.watch.hold()  # all is done: from here on it is too late
        except KeyboardInterrupt:
            self.watch.hold()
            self.watch.forget()
            if self._due is not None:
                self._due()
            self.run.interrupted, self.run.stopped = True, "interrupted"
        finally:
            self.run.seconds = time.perf_counter() - started
            progress.close(self.run.stopped)
        self.restore_best()

    def call_back(self) -> None:
        """Call the user's functions. A Ctrl-C that one of them catches is its own affair."""
        self.watch.look()
        for callback in self.callbacks:
            callback(self.run)
        self.watch.forget()

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
            self._programs[key] = self.record_program(self.task, rows, entries)
        return self._programs[key]

    @property
    def programs(self) -> dict[int, Program]:
        """Those that have been recorded, by their number of rows."""
        return {rows: program for (rows, _), program in self._programs.items()}

    def session(self, state: Mapping[str, Array], entries: tuple[str, ...], sizes: Sequence[int]) -> Session:
        """A session with these entries for these numbers of rows, and for the rows of validation "evaluate"."""
        wanted = dict.fromkeys(sizes, entries)
        held = self.validation if self.judge is None else None
        for size in evaluation_sizes(held.rows) if held is not None else ():
            wanted[size] = (*(e for e in wanted.get(size, ()) if e != "evaluate"), "evaluate")
        return self.backend.session({rows: self.program(rows, names) for rows, names in wanted.items()}, state, self.threads)

    def _session(self, state: Mapping[str, Array]) -> Session:
        return self.session(state, self._entries, list(dict.fromkeys(step_sizes(self._sequences, self.batch_size))))

    def _judges(self, task: Task, data: Data) -> dict[int, Program]:
        return {rows: self.record_program(task, rows, ("evaluate",)) for rows in evaluation_sizes(data.rows)}

    @property
    def _sequences(self) -> int:
        """Rows, as the user counts them."""
        return self.data.rows // (self.task.windows.count if self.task.windows is not None else 1)

    @property
    def _rests(self) -> bool:
        """Whether steps rest over windows in which all sequences have ended. Statistics see all that there is."""
        return self.task.windows is not None and self.task.weighted and not self.task.statistics

    @property
    def _accumulate(self) -> int:
        return self.task.optimizer.accumulate if self.task.optimizer is not None else 1

    def _planned(self) -> Epochs:
        optimizer = self.task.optimizer
        assert optimizer is not None
        keep = ("loss", "penalty", *wanted(self.metrics, self.task))
        reads = {i for program in self._programs.values() for entry in program.entries.values() for i in entry.inputs}
        programs = list(self._programs.values())
        rows = self.data.rows // (self.task.windows.count if self.task.windows is not None else 1)
        shuffle = self.shuffle and (self.batch_size < rows or order_counts(programs))
        return Epochs(
            self.data, self.batch_size, shuffle=shuffle, seed=self.seed, optimizer=optimizer, planned=self.epochs, keep=keep,
            reads=reads, windows=self.task.windows, rests=self._rests, free=rows_are_free(programs),
        )  # fmt: skip

    def _most(self) -> int:
        """How many epochs one call may take: one where somebody looks at the run or the network after each, or where numbers that
        are not finite could come and go unseen."""
        looked_at = self.validation or self.callbacks or self.early_stopping or self._looks_at_scores or self._plan.watched
        looked_at = looked_at or self._rests
        if looked_at or self.epochs < 2 or not lasting(list(self._programs.values())):
            return 1
        entries = [e for p in self._programs.values() for e in p.entries.values()]
        size = max(
            sum(o.type.size for r, o in zip(e.results, e.graph.outputs, strict=False) if r in self._plan.keep) for e in entries
        )
        return min(2 * MOST_STEPS // size // self._plan.steps, MOST_ROWS // self.data.rows)

    def _behind(self) -> Behind:
        return Behind(**self.counters, of_run=self.run.epochs)

    def _take(self, behind: Behind, epochs: int) -> Steps:
        return self._plan.take(behind, epochs, self.schedule_state.get("scale", 1.0))

    def _advance(self, session: Session, good: Kept, progress: Progress, pace: Pace) -> Kept:
        """Some epochs, in one call of the backend; returns the state after them. `good` is the state before, in which everything
        was finite."""
        begun = time.perf_counter()
        epochs, each = pace.next(self.epochs - self.run.epochs), self._plan.steps
        steps = self._take(self._behind(), epochs)

        def pulse(done: int) -> bool:
            progress.step(done, each)
            self.watch.look()
            return True

        self.watch.hold()  # from the first step until what was learnt is kept
        taken = session.run(steps, pulse)
        pace.took(epochs, time.perf_counter() - begun)
        losses = taken.results["loss"]
        whole, part = divmod(taken.steps, each)
        kept, state = whole, session.keep() if finite([losses]) else None
        if state is None:
            kept, state = self._sound(good, losses, whole, part)
            part = 0  # of an epoch that has gone wrong nothing is kept
        self._keep(state, steps, taken, kept, part, session, begun)
        if kept < whole:
            self._diverged(losses[kept * each :], state)
        if taken.interrupted:
            raise KeyboardInterrupt
        return state

    def _keep(self, state: Kept, steps: Steps, taken: Taken, epochs: int, part: int, session: Session,
              begun: float) -> None:  # fmt: skip
        """State, counters and history after so many epochs of a call, and `part` steps of one more."""
        count = epochs * self._plan.steps + part
        updates = epochs * self._plan.updates + steps.entries[:part].count("step")
        history = self._plan.history(steps, taken.results, epochs) if epochs else {}
        judged = self.validation is not None or self._looks_at_scores
        if epochs and not judged:
            seen = self._measured_as_seen(taken, self.data, epochs)
            self._commit(state, count, epochs, updates, self._lines(history, seen, begun, self._observed(history, seen)))
        elif count:
            self._commit(state, count, epochs, updates)
        self.watch.release()
        if epochs and judged:  # by functions of the user, which may raise: what has been learnt is kept before
            lengths = {n: self.data.inputs[n] for n in [self.task.steps] if n is not None}
            data = Data(lengths, self.data.target, self.data.weight)
            data = data.take(steps.order.reshape(-1)) if self._looks_at_scores else data
            seen = self._measured_as_seen(taken, data, 1)
            seen |= {k: [v] for k, v in self.judged(session).items()}
            self._whole(self._lines(history, seen, begun, self._observed(history, seen)))

    @property
    def _looks_at_scores(self) -> bool:
        """Whether there are metrics, the user's own perhaps, that are not made of sums."""
        return any(m not in self.task.metrics for m in self.metrics)

    def _observed(self, history: Mapping[str, list[float]], measured: Mapping[str, list[float]]) -> Mapping[str, float]:
        """The schedule's state after it has seen the last of these epochs."""
        if not self._plan.watched:
            return {}
        return self._plan.schedule.observe(measured.get("validation_loss", history["loss"])[-1], self.schedule_state)

    def _sound(self, good: Kept, losses: Array, whole: int, part: int) -> tuple[int, Kept]:
        """How many of the first `whole` epochs of a call left everything finite, and the state after these. Losses are known step
        by step, but of the states only the last: so epochs are taken again, and since what is not finite stays, halves will do.

        part: steps of one more epoch that was interrupted.
        """
        bad = np.flatnonzero(~np.isfinite(losses))
        fine = min(whole, int(bad[0]) // self._plan.steps) if len(bad) else whole  # epochs of finite losses
        kept, broken = 0, fine if fine == whole and not part else fine + 1
        tried = broken - 1  # mostly the last state before the first bad loss is still sound
        while broken - kept > 1:
            state = self._again(good, kept, tried - kept)
            if state is not None:
                kept, good = tried, state
            else:
                broken = tried
            tried = (kept + broken) // 2
        return kept, good

    def _again(self, good: Kept, skip: int, epochs: int) -> Kept | None:
        """The state after these epochs from now on, from `good`, the state before them; None if it is not finite."""
        session = self._session(good.arrays())
        if session.run(self._take(self._plan.after(self._behind(), skip), epochs)).interrupted:
            raise KeyboardInterrupt
        return session.keep()

    def _commit(self, state: Kept, steps: int, epochs: int, updates: int,
                also: Callable[[], None] = lambda: None) -> None:  # fmt: skip
        """State and counters change together, even if Ctrl-C comes between the two."""
        taken = self.run.steps + steps
        counters = {k: self.counters[k] + more for k, more in (("steps", steps), ("epochs", epochs), ("updates", updates))}

        def keep() -> None:
            self.save(state)
            self.run.steps = taken
            self.counters.update(counters)
            also()

        self._whole(keep)

    def _whole(self, keep: Callable[[], None]) -> None:
        """Do this to the end: if Ctrl-C comes between, by doing it again."""
        self._due = keep
        keep()
        self._due = None

    def judged(self, session: Session) -> dict[str, float]:
        """Loss and metrics on the rows held out: nothing if there are none."""
        if self.validation is None:
            return {}
        if self.judge is not None:
            session = self.backend.session(self._judging, session.state(), self.threads)
        value, measured = evaluate(self._judging.values(), session, self.validation, self.metrics, self.judge or self.task)
        return {"validation_loss": value, **{f"validation_{name}": v for name, v in measured.items()}}

    def _measured_as_seen(self, taken: Taken, data: Data, epochs: int) -> dict[str, list[float]]:
        """All metrics over the rows of each of the first epochs, as the steps saw them; data: in this order, if any looks at scores."""
        count = epochs * self._plan.steps
        results = {k: v if k == "scores" else v[:count] for k, v in taken.results.items()}
        return measured(self.metrics, self.task, results, data, epochs)

    def record(self, loss: float, added: float, rate: float, seen: Mapping[str, float], judged: Mapping[str, float],
               begun: float) -> None:  # fmt: skip
        """One more epoch in the history, all of it at once: a user's metric that raises leaves no column longer than another."""
        history = {"loss": [loss], "penalty": [added], "learning_rate": [rate]}
        self._whole(self._lines(history, {k: [v] for k, v in (*seen.items(), *judged.items())}, begun, {}))

    def _lines(self, history: Mapping[str, list[float]], measured: Mapping[str, list[float]], begun: float,
               schedule_state: Mapping[str, float]) -> Callable[[], None]:  # fmt: skip
        """What writes these epochs into the history; the schedule's state goes with it."""
        at, epochs = self.run.epochs, len(history["loss"])
        columns = {**history, "epoch_seconds": [(time.perf_counter() - begun) / epochs] * epochs}
        metrics = dict(measured)
        if "validation_loss" in metrics:
            columns["validation_loss"] = metrics.pop("validation_loss")

        def write() -> None:
            self.run.write(at, columns, metrics)
            self.schedule_state.update(schedule_state)

        return write

    # ---- when to stop --------------------------------------------------------------------------------------------------------

    def worse_for_long(self, state: Kept) -> bool:
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

    def _diverged(self, losses: Array, good: Kept) -> None:
        """Go through the next epoch again from its beginning, step by step, and find the first value that is not finite."""
        self.run.stopped = "diverged"
        state = good.arrays()
        session, steps = self._session(state), self._take(self._behind(), 1)
        place, at = "", -1
        for name, size, rows, numbers in steps.each():
            at += 1
            given = {**{k: v[rows] for k, v in steps.data.items()}, **numbers}
            place = self._first_not_finite(self.program(size, self._entries), name, given, state)
            if place:
                break
            each = {k: v[None] for k, v in numbers.items()}
            if session.run(replace(steps, entries=[name], sizes=[size], order=rows, numbers=each)).interrupted:
                raise KeyboardInterrupt
            state = session.state()
        raise DivergenceError(
            f"training diverged in epoch {self.counters['epochs'] + 1}, step {at + 1} of {len(steps.sizes)} "
            f"(loss {losses[at]:.4g}): {place}. The network keeps the weights from before this epoch, and the error's .run the history. "
            "Use a smaller learning rate, clip_norm=1.0 in the optimizer, or scale the data to zero mean and unit variance",
            self.run,
        )

    def _first_not_finite(self, program: Program, name: str, given: Mapping[str, Array], state: Mapping[str, Array]) -> str:
        entry = program.entries[name]
        arrays = [*(state[r] for r in entry.reads), *(np.asarray(given[i], program.inputs[i].type.dtype) for i in entry.inputs)]
        return first_not_finite(entry.graph, arrays, (*entry.reads, *entry.inputs))

    @property
    def _entries(self) -> tuple[str, ...]:
        entries = ("step", "accumulate") if self._accumulate > 1 else ("step",)
        return (*entries, REST) if self._rests else entries


def evaluation_sizes(rows: int) -> list[int]:
    """The numbers of rows for which an evaluation needs a program."""
    return list(dict.fromkeys(step_sizes(rows, EVALUATION_ROWS)))


def wanted(metrics: Sequence[Metric], task: Task) -> list[str]:
    """The results of entries that these metrics are made of."""
    return list(dict.fromkeys(sums_name(m) if m in task.metrics else "scores" for m in metrics))


def measured(
    metrics: Sequence[Metric], task: Task, results: Mapping[str, Array], data: Data, epochs: int = 1
) -> dict[str, list[float]]:
    """All metrics over the rows of each epoch, or over all steps of them that count, from the `wanted` results of the steps that saw
    them. Only sums tell epochs apart."""
    assert task.loss is not None
    lengths = data.inputs[task.steps] if task.steps is not None else None
    target, weight, scores = counted(lengths, data.target, data.weight, results.get("scores"))
    values = {}
    for m in metrics:
        if m in task.metrics:
            steps = results[sums_name(m)]
            sums = steps.reshape(epochs, -1, *steps.shape[1:]).sum(axis=1)
            values[m.name] = [m.finished(each, target, weight) for each in sums]
        else:
            assert scores is not None
            values[m.name] = [m(task.loss, scores, target, weight)]
    return values


def evaluation_order(rows: int, inputs: Mapping[str, Array], programs: Iterable[Program]) -> Array:
    """The order in which to look at all rows: as they are, or those together whose sequences end together."""
    order, steps = np.arange(rows), steps_of_rows(inputs)
    return order if steps is None or order_counts(programs) else by_length(order, steps, EVALUATION_ROWS)


def evaluate(
    programs: Iterable[Program], session: Session, data: Data, metrics: Sequence[Metric], task: Task
) -> tuple[float, dict[str, float]]:
    """Loss and metrics over all rows as one, from a session with "evaluate" programs of the task."""
    sizes = step_sizes(data.rows, EVALUATION_ROWS)
    divisor = np.array([data.total(np.arange(data.rows))])
    keep = ("loss", *wanted(metrics, task))
    order = evaluation_order(data.rows, data.inputs, programs)
    taken = session.run(Steps(["evaluate"] * len(sizes), data.arrays(), order, sizes, {DIVISOR: divisor}, keep))
    if taken.interrupted:
        raise KeyboardInterrupt
    values = measured(metrics, task, taken.results, data.take(order) if "scores" in keep else data)
    return float(math.fsum(taken.results["loss"].tolist())), {name: each[0] for name, each in values.items()}
