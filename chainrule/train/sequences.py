"""Sequences of different length: where time lies in data and in the values of a trace, and what lies beyond a sequence's end.

In: arrays (rows, time, ...) with `lengths` or a mask, or lists of arrays of different length. Out: padded arrays with lengths, and,
while a network is traced, an answer to the question which axis of a value is time. Padding is 0 wherever it is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import DataError, ShapeError, UsageError
from ..graph.node import OPS, Array, Graph, Node, Rows
from ..graph.trace import Trace, Tracer, located
from ..records import record

_LENGTHS = "lengths of "  # the name of a program's input begins so; the names of the inputs that it measures follow


def lengths_name(inputs: Sequence[str]) -> str:
    """The name of the lengths of these inputs."""
    return _LENGTHS + ", ".join(inputs)


def measured_by(name: str) -> tuple[str, ...]:
    """The inputs that lengths of this name belong to; none if it is another name."""
    return tuple(name.removeprefix(_LENGTHS).split(", ")) if name.startswith(_LENGTHS) else ()


def steps_of_rows(inputs: Mapping[str, Array]) -> Array | None:
    """How many steps each row has, of all its sequences; None where no input says how many there are. inputs: by name."""
    found = [np.asarray(v, np.int64) for n, v in inputs.items() if measured_by(n)]
    return np.sum(found, axis=0) if found else None


# ---- data --------------------------------------------------------------------------------------------------------------------


def is_ragged(value: Any) -> bool:
    """Whether `value` is a list of arrays (or lists) whose first axes differ in length."""
    if not isinstance(value, (list, np.ndarray)) or (isinstance(value, np.ndarray) and value.dtype != object):
        return False
    lengths = {_length(v) for v in value}
    return len(lengths) > 1 and None not in lengths


def _length(value: Any) -> int | None:
    """How many steps a sequence has; None for what is none."""
    try:
        return None if isinstance(value, (str, bytes, Mapping)) else len(value)
    except TypeError:
        return None


def padded(value: Sequence[Any], name: str) -> tuple[Array, Array]:
    """Arrays (time, ...) of different length as one, (rows, longest, ...), with 0 beyond their ends, and their lengths.

    Raises: `DataError` if they differ in anything but their length.
    """
    try:
        rows = [np.asarray(v) for v in value]
    except ValueError:
        raise DataError(f"{name}: the rows of one of its sequences differ in length, so it is no array") from None
    full = [r for r in rows if r.size]
    shapes = {r.shape[1:] for r in full}
    if not full:
        raise DataError(f"{name}: its sequences hold no numbers")
    if len(shapes) > 1:
        one, other = sorted(shapes)[:2]
        raise DataError(f"{name}: its rows differ in more than their length: steps of shape {one} and {other}")
    lengths = np.array([len(r) for r in rows], np.int64)
    dtype = np.result_type(*(r.dtype for r in full))
    array = np.zeros((len(rows), max(1, int(lengths.max())), *next(iter(shapes))), dtype)
    for place, row in zip(array, rows, strict=True):
        if row.size:
            place[: len(row)] = row
    return array, lengths


def checked_lengths(lengths: Any, mask: Any, array: Array, name: str) -> Array | None:
    """How many steps of each row count: (rows,).

    Raises: `DataError` or `ShapeError` that says which row is wrong: lengths that are negative, too long, no integers or of another
    number than the rows; masks with holes.
    """
    if lengths is not None and mask is not None:
        raise UsageError("give lengths or a mask, not both: they say the same")
    if lengths is None and mask is None:
        return None
    if array.ndim < 2:
        raise ShapeError(f"lengths belong to sequences, (rows, time, ...), but {name} has shape {array.shape}")
    rows, steps = array.shape[:2]
    if mask is not None:
        return _of_mask(np.asarray(mask), rows, steps, name)
    given = np.asarray(lengths)
    if given.shape != (rows,):
        raise ShapeError(f"lengths must hold one number for each of the {rows} rows of {name}, not shape {given.shape}")
    if given.dtype.kind not in "iu" and not (given.dtype.kind == "f" and np.array_equal(given, np.floor(given))):
        raise DataError(f"lengths are whole numbers of steps, not {given.dtype} ({given.reshape(-1)[0]!r})")
    bad = (given < 0) | (given > steps)
    if np.any(bad):
        row = int(np.argmax(bad))
        what = "negative" if given[row] < 0 else f"longer than its {steps} steps"
        raise DataError(f"the length of row {row} of {name}, counted from 0, is {what}: {given[row]}")
    return given.astype(np.int64)


def _of_mask(mask: Array, rows: int, steps: int, name: str) -> Array:
    if mask.shape != (rows, steps):
        raise ShapeError(f"the mask of {name} must have shape {(rows, steps)}, rows and steps, not {mask.shape}")
    if mask.dtype != bool and not np.isin(mask, (0, 1)).all():
        raise DataError(f"a mask holds True and False (or 1 and 0): whether a step counts; this one is of {mask.dtype}")
    mask = mask.astype(bool)
    holes = np.any(mask[:, 1:] & ~mask[:, :-1], axis=1)
    if np.any(holes):
        row = int(np.argmax(holes))
        raise DataError(
            f"the mask of row {row} of {name}, counted from 0, has a hole: a step that counts follows one that does not. Only the "
            "end of a sequence can be masked; move the steps that count to its beginning"
        )
    return np.asarray(mask.sum(axis=1), np.int64)


def cleared(array: Array, lengths: Array) -> Array:
    """The same with 0 beyond each sequence's end; a copy, if something else stands there."""
    beyond = ~inside(lengths, array.shape[1])
    if not np.any(array[beyond] != 0):
        return array
    array = array.copy()
    array[beyond] = 0
    return array


def stretched(array: Array, steps: int) -> Array:
    """The same with 0 behind, up to so many steps."""
    return (
        array if array.shape[1] == steps else np.pad(array, [(0, 0), (0, steps - array.shape[1]), *[(0, 0)] * (array.ndim - 2)])
    )


def refilled(target: Array, lengths: Array, steps: int) -> Array:
    """A target (rows, time, ...) for so many steps, with a legal value beyond each sequence's end, where anything may stand: that of
    some step.

    Raises: `DataError` if all sequences are empty; `ShapeError` if it has fewer steps than they are long, or more than there are.
    """
    longest = int(lengths.max())
    if not longest:
        raise DataError("all sequences have length 0, so there is no step to learn from")
    if not longest <= target.shape[1] <= steps:
        raise ShapeError(
            f"y must have a target for each of the {steps} steps of x, (rows, {steps}, ...), not shape {target.shape}"
        )
    target = stretched(target, steps)
    within = inside(lengths, steps)
    if np.all(within):
        return target
    target = target.copy()
    target[~within] = target[within][0]
    return target


def inside(lengths: Array, steps: int) -> Array:
    """Which steps count: (rows, steps)."""
    return np.asarray(np.arange(steps) < np.asarray(lengths)[:, None])


def counted(
    lengths: Array | None, target: Array, weight: Array | None, scores: Array | None
) -> tuple[Array, Array | None, Array | None]:
    """Targets of all steps that count, one after the other, with their weights and scores, for metrics. weight: that of all steps of
    a row together. Without lengths: what was given."""
    if lengths is None:
        return target, weight, scores
    assert weight is not None
    within = inside(lengths, target.shape[1])
    each = weight / np.maximum(lengths, 1)
    return target[within], np.broadcast_to(each[:, None], within.shape)[within], scores if scores is None else scores[within]


# ---- while tracing -----------------------------------------------------------------------------------------------------------


@record(frozen=True)
class _Clock:
    """Inputs of one time, and the lengths of their rows, traced, if there are any. `axes`: where values have this time, as far as
    anyone has asked; `mixed`: for values in which its steps are mixed, the node that did it; `cut`: whether they are windows."""

    inputs: tuple[str, ...]
    lengths: Any
    axes: dict[Node, Rows]
    mixed: dict[Node, Node]
    cut: bool

    @property
    def strict(self) -> bool:
        """Whether its steps must not be mixed."""
        return self.lengths is not None or self.cut


class Times:
    """Which axis of a traced value is time.

    The second axis of each input is, as far as anyone knows. The rules that follow the rows of a batch follow it through all
    operators (`graph/rows.py`), except that a sum over time is no value without time but one that mixes its steps.

    Args: given: all inputs of a program by name, lengths among them; sequences: the names of the network's inputs; fixed: further
    traced values, which have no time; cut: the inputs that are windows of longer sequences.
    """

    def __init__(self, given: Mapping[str, Any], sequences: Sequence[str], fixed: Sequence[Any], cut: Sequence[str] = ()) -> None:
        groups = {measured_by(n): v for n, v in given.items() if measured_by(n)}
        alone = [n for n in sequences if not any(n in inputs for inputs in groups)]
        groups |= {(n,): None for n in alone}
        others = [v for v in (*given.values(), *fixed) if isinstance(v, Tracer)]
        self._clocks = []
        for inputs, lengths in groups.items():
            axes: dict[Node, Rows] = {v.node: None for v in others}
            axes |= {given[n].node: 1 for n in inputs if given[n].ndim >= 2}
            self._clocks.append(_Clock(inputs, lengths, axes, {}, bool(set(inputs) & set(cut))))
        self.reached: set[str] = set()  # inputs whose time is that of a layer which reads lengths

    @property
    def limited(self) -> bool:
        """Whether any sequences have lengths, or are windows."""
        return any(c.strict for c in self._clocks)

    def lengths_of(self, x: Any) -> Any:
        """For a layer whose time is axis 1 of x: the lengths of its rows, or None.

        Raises: `DataError` if a layer before has mixed the steps of sequences that have lengths.
        """
        found = []
        for clock in self._clocks:
            axis = self._axis(clock, x)
            if axis == "mixed" and clock.strict:
                self._refuse(clock, x)
            if axis == 1:
                self.reached.update(clock.inputs)
                if clock.lengths is not None:
                    found.append(clock)
        if len(found) > 1:
            names = " and ".join(", ".join(c.inputs) for c in found)
            raise UsageError(
                located(f"sequences with lengths of their own, {names}, meet here; a layer can go by one of them only")
            )
        return found[0].lengths if found else None

    def is_cut(self, x: Any) -> bool:
        """Whether axis 1 of x is the time of windows."""
        return any(c.cut and self._axis(c, x) == 1 for c in self._clocks)

    def follows(self, y: Any, x: Any, at: int = 1, axis: int = 1) -> None:
        """Axis `axis` of y is the time that axis `at` of x is."""
        for clock in self._clocks:
            if self._axis(clock, x) == at:
                clock.axes[y.node] = axis

    def ends(self, x: Any, *values: Any) -> None:
        """The time on axis 1 of x has come to its end in these values, which know lengths."""
        for clock in self._clocks:
            if self._axis(clock, x) == 1:
                clock.axes.update((v.node, None) for v in values)

    def of_scores(self, scores: Tracer) -> tuple[str, ...]:
        """The inputs whose time is axis 1 of the scores, so that a loss counts their steps.

        Raises: `DataError` if the scores mix the steps of sequences that have lengths.
        """
        found: tuple[str, ...] = ()
        for clock in self._clocks:
            axis = self._axis(clock, scores)
            if clock.strict and axis not in (None, 1):
                self._refuse(clock, scores)
            if axis == 1 and (not found or clock.lengths is not None):
                found = clock.inputs
        return found

    def along(self, scores: Tracer) -> tuple[str, ...]:
        """All inputs whose time is axis 1 of the scores."""
        return tuple(n for c in self._clocks if self._axis(c, scores) == 1 for n in c.inputs)

    def check(self, values: Mapping[str, Any]) -> None:
        """What knows no time, new statistics and first states, must not depend on the steps of sequences that end or are cut."""
        for clock in self._clocks:
            for value in values.values():
                if clock.strict and isinstance(value, Tracer) and self._axis(clock, value) is not None:
                    self._refuse(clock, value)

    def check_step(self, x: Any, result: Any) -> None:
        """What the step of a loop over axis 1 of x takes from outside must not be made of the steps of sequences that end or are cut.

        Args: result: one of the loop.
        Raises: `DataError`, `UsageError`.
        """
        loop = result.node.args[0] if result.node.op == "output" else result.node
        for node in loop.args[loop.attrs["states"] + loop.attrs["sequences"] :]:
            for clock in self._clocks:
                if clock.strict and self._axis(clock, x) == 1 and self._axis(clock, Tracer(node, result.home)) is not None:
                    kind, what = (
                        (UsageError, "is cut into windows of time")
                        if clock.cut
                        else (DataError, "has rows that differ in length")
                    )
                    raise kind(located(
                        f"{', '.join(clock.inputs)} {what}, and the step takes something from outside ({node.source or node.op}) that is "
                        "made of more than one of its time steps. A step may look at its state, its input and what knows no time: let "
                        "what else it needs be part of x"
                    ))  # fmt: skip

    def _refuse(self, clock: _Clock, x: Tracer) -> None:
        node = clock.mixed.get(x.node)
        place = "" if node is None else ", ".join(p for p in (node.scope and f'layer "{node.scope}"', node.source) if p)
        if clock.cut:
            raise UsageError(
                f"truncate cuts {', '.join(clock.inputs)} into windows of time, and {place or 'the network'} mixes their steps, or moves "
                "time from the second axis: only recurrent layers, TimeDistributed and losses may look at more than one step"
            )
        raise DataError(
            f"{', '.join(clock.inputs)}: its rows differ in length, and {place or 'the network'} mixes their steps, or moves time from the "
            "second axis: only recurrent layers, TimeDistributed and losses know where a sequence ends. Let a recurrent layer "
            "without return_sequences come first, or pass rows of one length"
        )

    # ---- following -------------------------------------------------------------------------------------------------------------

    def _axis(self, clock: _Clock, x: Tracer) -> Rows:
        """Where x has this time: an axis, None if nowhere, or "mixed"."""
        stack = [x.node]
        results: dict[Node, tuple[Rows, ...]] = {}
        while stack:
            node = stack[-1]
            if node in clock.axes or node in results:
                stack.pop()
                continue
            if node.op == "input":
                clock.axes[node] = self._outside(clock, node, x.home)
                continue
            missing = [a for a in node.args if a not in clock.axes and a not in results]
            if missing:
                stack.extend(missing)
                continue
            self._settle(clock, node, results)
        return clock.axes[x.node]

    def _settle(self, clock: _Clock, node: Node, results: dict[Node, tuple[Rows, ...]]) -> None:
        if node.op == "output":
            maker = node.args[0]
            clock.axes[node] = results[maker][node.attrs["index"]] if maker in results else clock.axes[maker]
            if maker in clock.mixed:
                clock.mixed[node] = clock.mixed[maker]
            return
        rows = [clock.axes[a] for a in node.args]
        made = _through(node, rows)
        if "mixed" in made:
            origin = next((clock.mixed.get(a, node) for a, r in zip(node.args, rows, strict=True) if r == "mixed"), node)
            clock.mixed[node] = origin
        if len(made) == 1:
            clock.axes[node] = made[0]
        else:
            results[node] = made

    def _outside(self, clock: _Clock, node: Node, trace: Trace | None) -> Rows:
        """An input of a trace: what was taken from an enclosing one has its time there."""
        while trace is not None:
            for inner, value in trace.captures.values():
                if inner is node:
                    return self._axis(clock, value) if isinstance(value, Tracer) else None
            trace = trace.parent
        if clock.strict:
            raise UsageError(located(
                "sequences that differ in length or are cut into windows cannot be followed into a function that is traced by itself "
                "(cr.grad, cr.scan): call recurrent layers outside it"
            ))  # fmt: skip
        return None


def _through(node: Node, rows: Sequence[Rows]) -> tuple[Rows, ...]:
    """The time axis of each result of an operator."""
    if all(r is None for r in rows):
        return tuple(None for _ in node.types)
    if "mixed" in rows:
        return tuple("mixed" for _ in node.types)
    if node.op == "call":
        return _inside(node.attrs["body"], rows)
    if node.op == "scan":
        return _loop(node, rows)
    result = OPS[node.op].rows(rows, [a.type for a in node.args], **node.attrs)
    results = result if isinstance(result, tuple) else (result,)
    return tuple("mixed" if r is None else r for r in results)


def _inside(body: Graph, rows: Sequence[Rows]) -> tuple[Rows, ...]:
    table: dict[Node, tuple[Rows, ...]] = {n: (r,) for n, r in zip(body.inputs, rows, strict=True)}
    for node in body.nodes():
        if node.op == "output":
            table[node] = (table[node.args[0]][node.attrs["index"]],)
        elif node.op != "input":
            table[node] = _through(node, [table[a][0] for a in node.args])
    return tuple(table[o][0] for o in body.outputs)


def _loop(node: Node, rows: Sequence[Rows]) -> tuple[Rows, ...]:
    """As the rule of scan does it for rows: the state's axis is what the step makes of it."""
    states, sequences = node.attrs["states"], node.attrs["sequences"]
    along = rows[states : states + sequences]
    if 0 in along:
        return tuple("mixed" for _ in node.types)
    state, constants = list(rows[:states]), rows[states + sequences :]
    inner: list[Rows] = [r - 1 if isinstance(r, int) else r for r in along]
    while True:
        out = _inside(node.attrs["body"], [*state, *inner, *constants])
        merged: list[Rows] = [a if a == b or b is None else b if a is None else "mixed" for a, b in zip(state, out, strict=False)]
        if merged == state:
            return (*state, *(r + 1 if isinstance(r, int) else r for r in out[states:]))
        state = merged
