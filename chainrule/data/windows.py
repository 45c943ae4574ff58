"""Windows over a table in time order: so many rows in, the target some rows later out; and the split of such windows by time.

In: the number of rows, or their features. Out: `Window`, which cuts; `Spans`, which windows are learnt from, decide when to stop, and
are scored. A window is named by its last row, counted from 0: the row at which the forecast is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import DataError, FileFormatError, UsageError
from .fields import fields_of
from .table import Values
from .target import LARGEST


@dataclass(frozen=True)
class Window:
    """x = rows end - length + 1 .. end, y = the target of row end + horizon.

    Of a quantity, what is learnt is how it changes: y = (t[end + horizon] - t[end]) / change with t as `TargetCode` encodes it. So a
    series that leaves the range of its past can be followed, and a network that knows nothing says "as now".

    Args:
        length: rows that a forecast sees.
        horizon: how many rows after the window's last one the target stands, at least 1.
        change: the root of the mean square of t[end + horizon] - t[end] over the training windows; 1 for classes.

    >>> window = Window(3, 2)
    >>> window.ends(6), window.cut(np.arange(6.0)[:, None], np.array([3]))[0].ravel()
    (array([2, 3, 4, 5]), array([1., 2., 3.]))
    """

    length: int
    horizon: int
    change: float = 1.0

    def __post_init__(self) -> None:
        for name, value, least in (("sequence length", self.length, 1), ("horizon", self.horizon, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UsageError(f"the {name} is a whole number of rows, {least} at least, not {value!r}")

    def ends(self, rows: int) -> Values:
        """The last rows of all windows that fit into so many rows; for the last `horizon` of them the target is still to come."""
        return np.arange(self.length - 1, rows)

    def cut(self, features: Values, ends: Values) -> Values:
        """The windows (len(ends), length, features) of features (rows, features)."""
        return features[ends[:, None] + np.arange(1 - self.length, 1)]

    def targets(self, encoded: Values, ends: Values) -> Values:
        """What a network learns of an encoded target (rows,): the change of a quantity, float32, or the code of a class; (len(ends),)."""
        later = encoded[ends + self.horizon]
        return later if encoded.dtype.kind == "i" else np.asarray((later - encoded[ends]) / self.change, dtype=np.float32)

    @classmethod
    def restore(cls, data: Mapping[str, Any]) -> Window:
        """From the parts of a JSON file. Raises: `FileFormatError` for what no training gives."""
        parts = fields_of(data, {"length": int, "horizon": int, "change": float}, "the window of the preparation")
        if not (0 < parts["length"] < 2**31 and 0 < parts["horizon"] < 2**31 and 0 < parts["change"] <= LARGEST):
            raise FileFormatError(f"the window of the preparation makes no sense: {str(dict(data))[:120]}")
        return cls(**parts)


@dataclass(frozen=True)
class Spans:
    """Which windows are for what, by their last rows, in time order.

    Whatever is learnt from is known when the first validation forecast is made, and whatever decides when to stop is known when the
    first scored one is: between the targets of two spans, horizon - 1 rows are left out.

    Args: training, validation, testing: last rows of windows; validation may be empty. known: how many rows, from the first, the
    training windows and their targets lie in; everything that is fitted may see these and no others.
    """

    training: Values
    validation: Values
    testing: Values
    known: int

    @property
    def before_test(self) -> Values:
        """All windows whose targets are known when the first scored forecast is made, but for those left out between spans."""
        return np.concatenate([self.training, self.validation])


def spans(rows: int, window: Window, validation: float, test: float) -> Spans:
    """The last share `test` of the rows are the targets of scored forecasts, the last share `validation` of the rows before those of
    validation, and earlier ones those of training.

    Raises: `DataError` if there are too few rows for that.

    >>> parts = spans(20, Window(3, 2), 0.25, 0.2)
    >>> (parts.training + 2).tolist(), (parts.validation + 2).tolist(), (parts.testing + 2).tolist()
    ([4, 5, 6, 7, 8, 9, 10], [12, 13, 14], [16, 17, 18, 19])
    """
    least = window.length + window.horizon
    if rows < least:
        raise DataError(
            f"windows of {window.length:,} rows with a target {window.horizon:,} rows later need {least:,} rows, and there are "
            f"{rows:,}: take a smaller --sequence or --horizon, or a longer table"
        )
    scored = rows - max(1, round(test * rows))
    judged = scored - max(1, round(validation * scored)) if validation else scored
    ends = window.ends(rows - window.horizon)
    targets = ends + window.horizon
    training = ends[targets <= judged - window.horizon]
    held = ends[(targets >= judged) & (targets <= scored - window.horizon)]
    parts = {"training": training, "validation": held, "testing": ends[targets >= scored]}
    empty = [name for name, part in parts.items() if not len(part) and (name != "validation" or validation)]
    if empty:
        raise DataError(
            f"{rows:,} rows are too few: split by time, with windows of {window.length:,} rows and a horizon of {window.horizon:,}, no "
            f"window is left for {' and '.join(empty)}. Take a smaller --sequence or --horizon, a longer table, or another --test or "
            "--validation (0: none)"
        )
    return Spans(training, held, parts["testing"], int(training[-1]) + window.horizon + 1)
