"""A table: named columns of one length, as a file has them.

In: arrays. Out: `Table`, which knows how to say where something stands. A column is text (NumPy's StringDType, "" where a
value is missing), numbers (float or integer, NaN where missing), or a block (rows, ...) such as images. Text stays text until
someone asks for numbers: `understand.py` decides what a column means for training, the stored preparation for predicting.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from ..errors import DataError
from ..registry import nearest

Values = np.ndarray[Any, Any]

# Strings that stand for a missing value, compared without regard to case. "None" is no such string: files use it as a category
# (houses without remodelling), and taking a category for a gap loses more than the reverse.
MISSING = ("", "na", "n/a", "nan", "null", "<na>", "#n/a")
STRING = np.dtypes.StringDType()
DATES = "dates, read as days since 1970-01-01"


@dataclass(frozen=True)
class Table:
    """Named columns of one length.

    Args:
        columns: name -> values, shape (rows,) or (rows, ...) for blocks.
        source: what messages call it: the name of its file.
        notes: what reading it had to decide, one sentence each.

    >>> table = Table.of({"size": [70.0, float("nan")], "town": ["Roxbury", ""]})
    >>> table.rows, list(table.columns)
    (2, ['size', 'town'])
    >>> table.column("twon")
    Traceback (most recent call last):
    chainrule.errors.DataError: the table has no column "twon". Did you mean "town"? Columns: size, town
    """

    columns: Mapping[str, Values]
    source: str = "the table"
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, columns: Mapping[str, Any], source: str = "the table", notes: Iterable[str] = ()) -> Table:
        """A table from anything NumPy makes arrays of; strings and None become text.

        Raises: `DataError` for columns of different length, and for values that are neither numbers nor text.
        """
        made = {name: _values(name, values) for name, values in columns.items()}
        notes = [
            *notes,
            *(f"{name}: {DATES}" for name, values in columns.items() if getattr(values, "dtype", STRING).kind == "M"),
        ]
        lengths = {len(values) for values in made.values()}
        if len(lengths) > 1:
            said = ", ".join(f"{name} {len(values):,}" for name, values in made.items())
            raise DataError(f"{source}: the columns have different numbers of rows: {said}")
        return cls(MappingProxyType(made), source, tuple(notes))

    @property
    def rows(self) -> int:
        return len(next(iter(self.columns.values()))) if self.columns else 0

    @property
    def dates(self) -> tuple[str, ...]:
        """The columns that held dates."""
        return tuple(name for name in self.columns if f"{name}: {DATES}" in self.notes)

    def column(self, name: str) -> Values:
        """The values of a column. Raises: `DataError` that offers the nearest name and lists the columns."""
        if name not in self.columns:
            shown = ", ".join(list(self.columns)[:30]) + (", ..." if len(self.columns) > 30 else "")
            why = next((f" ({note})" for note in self.notes if note.startswith(f"{name}: left out")), "")
            raise DataError(f'{self.source} has no column "{name}"{why}.{nearest(name, self.columns)} Columns: {shown}')
        return self.columns[name]

    def take(self, rows: Values) -> Table:
        """The table of these rows, by index."""
        return replace(self, columns=MappingProxyType({name: values[rows] for name, values in self.columns.items()}))


def _values(name: str, values: Any) -> Values:
    """One column as text, numbers or a block."""
    array: Values = np.asarray(values)
    if array.ndim == 0:
        raise DataError(f'column "{name}" is a single value; give one value for each row')
    if array.dtype.kind in "OUST" and array.ndim == 1:
        return text("" if v is None or v != v else _word(v) for v in array.tolist())
    if array.dtype.kind == "M" and array.ndim == 1:  # dates as days since 1970-01-01, as in text
        return np.where(np.isnat(array), np.nan, array.astype("datetime64[us]").astype(np.float64) / 86_400e6)
    if array.dtype.kind == "b":
        return array.astype(np.int8)
    if array.dtype.kind not in "iuf":
        raise DataError(f'column "{name}" holds {array.dtype} of shape {array.shape}: give numbers, or text of shape (rows,)')
    return array


def _word(value: Any) -> str:
    return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else str(value)


def text(strings: Iterable[str], missing: Iterable[str] = ()) -> Values:
    """Strings as a text column: stripped, and "" where they stand for a missing value; `missing` adds words to `MISSING`."""
    column: Values = np.strings.strip(np.array(list(strings), dtype=STRING))
    lowered = np.strings.lower(column)
    gone = np.zeros(column.shape, dtype=bool)
    for word in {*MISSING, *(word.strip().lower() for word in missing)} - {""}:
        gone |= lowered == word
    column[gone] = ""
    return column


def is_text(values: Values) -> bool:
    """Whether a column holds text."""
    return bool(values.dtype.kind == "T")


def absent(values: Values) -> Values:
    """True where a value is missing: "" or NaN, anywhere in its row of a block. Shape (rows,)."""
    if is_text(values):
        return np.asarray(values == "")
    if values.dtype.kind != "f":
        return np.zeros(len(values), dtype=bool)
    return np.asarray(np.isnan(values).reshape(len(values), -1).any(axis=1))


def numbers(values: Values) -> tuple[Values, Values]:
    """A column as float64 with NaN where missing, and True where a value is there but is no number; shapes (rows,), (rows,)."""
    none = np.zeros(len(values), dtype=bool)
    if not is_text(values):
        return values.astype(np.float64), none
    out = np.full(len(values), np.nan)
    there = values != ""
    try:
        out[there] = values[there].astype(np.float64)
        return out, none
    except ValueError:
        bad = none
        for i in np.flatnonzero(there):  # the slow way only for columns that are no numbers, to find which values are not
            try:
                out[i] = float(values[i])
            except ValueError:
                bad[i] = True
        return out, bad


def strings(values: Values) -> Values:
    """A column as text with "" where missing; whole numbers lose their ".0", so that 1 and 1.0 are one category."""
    if is_text(values):
        return values
    return np.array(["" if v != v else str(int(v)) if v == int(v) else repr(v) for v in values.tolist()], dtype=STRING)


def first(mask: Values) -> int:
    """The first row where `mask` is true, counted from 1 as messages do: row 1 is the first below the header."""
    return int(np.argmax(mask)) + 1


def refuse_infinite(name: str, values: Values) -> None:
    """Raises: `DataError` if the numbers have an infinity: unlike a gap it cannot be filled without inventing a value."""
    infinite = np.asarray(np.isinf(values).reshape(len(values), -1).any(axis=1))
    if infinite.any():
        count = int(infinite.sum())
        raise DataError(
            f'column "{name}" holds infinity in {count:,} {"row" if count == 1 else "rows"}, first in row {first(infinite):,} '
            "(row 1 is the first below the header): correct the values or leave the column out"
        )
