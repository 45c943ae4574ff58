"""Truncated backpropagation through time: sequences cut into windows.

In: `truncate=(k1, k2)` and data with sequences of T steps. Out: data whose rows are windows of sequences, and the numbers by which
layers know where the sequences begin.

Window j makes an update from the losses of the k1 steps from j k1 on. Its gradient goes back to step j k1 - (k2 - k1), from whose state
the window starts; so it has k2 steps, of which the first k2 - k1 have no loss of their own. It leaves for the next window the state
after its first k1 steps. Steps before a sequence's beginning and beyond its end leave the state as it is.

Source: Williams & Peng, "An efficient gradient-based algorithm for on-line training of recurrent network trajectories", Neural
Computation 2, 1990: BPTT(h; h') with h = k2, h' = k1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Any

import numpy as np

from ..errors import UsageError
from ..graph.node import Array, Type
from ..records import record
from .sequences import measured_by

BEGIN = "begin"  # the input that says where in a window its sequences begin
COUNTED = "steps with a loss"  # the input that says how many steps of a window's last k1 count


def truncation(given: Any) -> tuple[int, int] | None:
    """(k1, k2), checked.

    Raises: `UsageError` for anything else.
    """
    if given is None:
        return None
    pair = tuple(given) if isinstance(given, (tuple, list)) else ()
    if len(pair) != 2 or any(isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1 for k in pair):
        raise UsageError(
            "truncate is a pair (k1, k2) of whole numbers of at least 1: an update every k1 steps, whose gradient goes back k2 steps; "
            f"not {given!r}"
        )
    every, back = int(pair[0]), int(pair[1])
    if back < every:
        raise UsageError(
            f"truncate=({every}, {back}): the gradient of an update every {every} steps must go back at least so many, or some losses "
            f"would reach no weight; (k1, k2) with k2 at least k1, such as ({every}, {every})"
        )
    return every, back


@record(frozen=True)
class Windows:
    """How sequences are cut.

    Attributes: steps: T; every: k1; back: k2, no more than any window can use; inputs: the names of the sequences; kept: the states that
    go on from window to window, name -> type of one row; rows: the most rows of a batch.
    """

    steps: int
    every: int
    back: int
    inputs: tuple[str, ...]
    kept: Mapping[str, Type] = field(default_factory=dict)
    rows: int = 0

    @property
    def count(self) -> int:
        """Windows of a sequence."""
        return -(-self.steps // self.every)

    @property
    def before(self) -> int:
        """Steps of a window before the first that has a loss."""
        return self.back - self.every

    @property
    def uneven(self) -> bool:
        """Whether the last window is not full."""
        return self.steps % self.every != 0

    def begins(self) -> Array:
        """For each window the place in it at which its sequences begin, or -1 where they have begun before: (windows,)."""
        first = self.before - self.every * np.arange(self.count)
        return np.maximum(first, -1).astype(np.int32)

    def cut(self, array: Array) -> Array:
        """Sequences (rows, T, ...) as their windows, (rows · windows, k2, ...), those of a row together; 0 where there is no step."""
        rows, rest = len(array), array.shape[2:]
        missing = self.count * self.every - self.steps
        if self.before or missing:
            array = np.pad(array, [(0, 0), (self.before, missing), *[(0, 0)] * len(rest)])
        if self.before:
            views = np.lib.stride_tricks.sliding_window_view(array, self.back, axis=1)[:, :: self.every]
            array = np.moveaxis(views, -1, 2)
        return array.reshape(rows * self.count, self.back, *rest)

    def cut_target(self, target: Array) -> Array:
        """Targets (rows, T, ...) of the steps of windows that have a loss, (rows · windows, k1, ...); any legal value, the last one,
        where there is no step."""
        rows, rest = len(target), target.shape[2:]
        if self.uneven:
            missing = self.count * self.every - self.steps
            target = np.pad(target, [(0, 0), (0, missing), *[(0, 0)] * len(rest)], mode="edge")
        return target.reshape(rows * self.count, self.every, *rest)

    def cut_lengths(self, lengths: Array) -> tuple[Array, Array]:
        """For sequences of these lengths: how many steps of each window there are, those before a beginning counted, and how many of
        its last k1: both (rows · windows,)."""
        left = lengths[:, None] - self.every * np.arange(self.count)
        within, counted = np.clip(left + self.before, 0, self.back), np.clip(left, 0, self.every)
        return within.reshape(-1), counted.reshape(-1)

    def cut_inputs(self, inputs: Mapping[str, Array], counting: str | None) -> dict[str, Array]:
        """All inputs of windows; what is no sequence is the same in all windows of a row. counting: the lengths by which a loss counts
        steps; if windows have steps without a loss, `COUNTED` takes their place."""
        made = {}
        for name, array in inputs.items():
            if name in self.inputs:
                made[name] = self.cut(array)
            elif set(measured_by(name)) & set(self.inputs):
                made[name] = self.cut_lengths(array)[0]
            else:
                made[name] = np.repeat(array, self.count, axis=0)
        if counting is not None and self.before:
            made[COUNTED] = self.cut_lengths(inputs[counting])[1]
        return made

    def cut_weight(self, weight: Array | None, lengths: Array | None) -> Array | None:
        """The weights of windows: of a row that has lengths, what its steps weigh that are in the window."""
        if weight is None or lengths is None:
            return weight if weight is None else np.repeat(weight, self.count)
        each = weight / np.maximum(lengths, 1)
        return np.repeat(each, self.count) * self.cut_lengths(lengths)[1]

    def order(self, rows: Array, batch: int) -> Array:
        """Rows of data (..., rows) in the order of an epoch, as rows of cut data: batch by batch, and of each batch window by window."""
        whole = rows.shape[-1] // batch * batch
        parts = (rows[..., :whole], batch), (rows[..., whole:], rows.shape[-1] - whole)
        made = [self._turned(part, size) for part, size in parts if size and part.size]
        return np.concatenate(made, axis=-1)

    def _turned(self, rows: Array, batch: int) -> Array:
        each = rows.reshape(*rows.shape[:-1], -1, 1, batch) * self.count + np.arange(self.count)[:, None]
        return each.reshape(*rows.shape[:-1], -1)
