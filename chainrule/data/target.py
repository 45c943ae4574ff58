"""The target as a network sees it, and back: classes as 0 .. C-1, quantities with mean 0 and deviation 1.

In: a target column. Out: `TargetCode`. Mean and deviation come from the rows it is fitted on, the training rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from ..errors import DataError, FileFormatError
from .fields import fields_of
from .table import Values, absent, first, numbers, refuse_infinite, strings
from .understand import Label, Task

LARGEST = 1e100


@dataclass(frozen=True)
class TargetCode:
    """How a target is encoded.

    Regression: (t - mean) / scale, where t is the value or, with `log`, its natural logarithm. Classes: the place in `classes`.

    >>> code = TargetCode.fit("price", np.array([1.0, 3.0]), "regression", ())
    >>> code.encode(np.array([5.0])), code.decode(np.array([[3.0]]))
    (array([3.], dtype=float32), array([5.]))
    """

    name: str
    task: Task
    classes: tuple[Label, ...] = ()
    mean: float = 0.0
    scale: float = 1.0
    log: bool = False

    @classmethod
    def fit(cls, name: str, values: Values, task: Task, classes: tuple[Label, ...], *, log: bool = False) -> TargetCode:
        """Raises: `DataError` for `log` with values that have no logarithm, and for values beyond all measure."""
        if task != "regression":
            return cls(name, task, classes)
        t = numbers(values)[0]
        if log:
            if (t <= 0).any():
                raise DataError(f'the target "{name}" is 0 or less in row {first(t <= 0):,}: it has no logarithm')
            t = np.log(t)
        if np.abs(t).max() > LARGEST:
            row = first(np.abs(t) > LARGEST)
            raise DataError(f'the target "{name}" is {t[row - 1]:g} in row {row:,}: take another unit, its square is no number')
        spread, size = float(t.std()), float(np.abs(t).max())
        alike = spread <= max(1e-14 * size, 1 / LARGEST)  # but for rounding
        return cls(name, task, (), float(t.mean()), (size or 1.0) if alike else spread, log)

    @property
    def outputs(self) -> int:
        """How many outputs the network needs."""
        return len(self.classes) if self.task == "multiclass" else 1

    @property
    def loss(self) -> str:
        return {"regression": "mse", "binary": "binary_cross_entropy", "multiclass": "cross_entropy"}[self.task]

    def encode(self, values: Values) -> Values:
        """float32 (rows,) for a quantity, int64 (rows,) for classes.

        Raises: `DataError` for gaps, infinities, text among numbers, and classes that training did not have.
        """
        gone = absent(values)
        if gone.any():
            raise DataError(f'the target "{self.name}" is missing in {int(gone.sum()):,} rows, first in row {first(gone):,}')
        if self.task != "regression":
            return self._codes(values)
        t, bad = numbers(values)
        if bad.any():
            raise DataError(f'the target "{self.name}" is no number in row {first(bad):,}: "{values[bad][0]}"')
        refuse_infinite(self.name, t)
        if self.log and (t <= 0).any():
            raise DataError(f'the target "{self.name}" is 0 or less in row {first(t <= 0):,}: it has no logarithm')
        return np.asarray(((np.log(t) if self.log else t) - self.mean) / self.scale, dtype=np.float32)

    def _codes(self, values: Values) -> Values:
        words = any(isinstance(label, str) for label in self.classes)
        given = strings(values) if words else numbers(values)[0]
        codes = np.full(len(values), -1, dtype=np.int64)
        for code, label in enumerate(self.classes):
            codes[given == label] = code
        unknown = codes < 0
        if unknown.any():
            row = first(unknown)
            raise DataError(
                f'the target "{self.name}" is "{values[row - 1]}" in row {row:,}, a class that training did not have: '
                f"{', '.join(map(str, self.classes[:20]))}"
            )
        return codes

    def decode(self, outputs: Values) -> Values:
        """Quantities from raw outputs (rows, 1), labels from probabilities (rows, C); for two classes (rows, 1) or (rows, 2)."""
        if self.task == "regression":
            t = outputs.reshape(-1).astype(np.float64) * self.scale + self.mean
            return np.asarray(np.exp(t)) if self.log else t
        if outputs.ndim == 2 and outputs.shape[1] > 1:
            codes = outputs.argmax(axis=1)
        else:
            codes = (outputs.reshape(-1) > 0.5).astype(np.int64)
        return np.asarray(np.array(self.classes, dtype=object)[codes])

    @classmethod
    def restore(cls, data: Mapping[str, Any]) -> TargetCode:
        """From the parts of a JSON file. Raises: `FileFormatError` for what no fit gives."""
        wanted = {"name": str, "task": str, "classes": list, "mean": float, "scale": float, "log": bool}
        parts = fields_of(data, wanted, "the target of the preparation")
        classes = parts["classes"]
        sizes = {"regression": len(classes) == 0, "binary": len(classes) == 2, "multiclass": len(classes) > 1}
        if parts["task"] not in get_args(Task) or not sizes[parts["task"]] or not parts["scale"] > 0:
            raise FileFormatError(f"the target of the preparation makes no sense: {str(dict(data))[:120]}")
        if not all(type(label) in (str, int, float) for label in classes) or len(set(classes)) != len(classes):
            raise FileFormatError("the classes of the preparation are not distinct texts or numbers")
        return cls(**{**parts, "classes": tuple(classes)})
